"""Score matching: every loss and gradient against closed forms, Hessians of another making and
quadrature; mutants."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import flat_grad, seeded
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.utils.data import DataLoader

from pyroebm import Energy
from pyroebm.core import Unconstrained, curvatures, unit_directions
from pyroebm.data import dequantized, digits, quantized
from pyroebm.energies import MLPEnergy
from pyroebm.objectives import (
    DenoisingScoreMatching,
    NonNegativeScoreMatching,
    Objective,
    ScoreMatching,
    SlicedScoreMatching,
    fisher_divergence,
    sliced_fisher_divergence,
)
from pyroebm.objectives import denoising as denoising_module
from pyroebm.objectives import fisher as fisher_module
from pyroebm.objectives import score_matching as exact_module
from pyroebm.objectives import sliced as sliced_module
from pyroebm.targets import Exponential, Gamma, Gaussian, GaussianMixture
from pyroebm.training import fit, fit_steps

F64 = torch.float64
S = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=F64)
DEVIATIONS = math.sqrt(2) * torch.cat([torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)])
POINTS = DEVIATIONS @ torch.linalg.cholesky(S).mT  # four points of mean 0 and covariance S, exactly


class Quadratic(Energy):
    """A normal distribution with its precision to be learned, and a constant that score matching
    cannot see."""

    def __init__(self, precision: Tensor, event_shape: tuple[int, ...] = (2,)) -> None:
        super().__init__(event_shape)
        self.precision = nn.Parameter(precision.clone())
        self.constant = nn.Parameter(torch.zeros((), dtype=precision.dtype))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*self.batch_shape(x), -1)
        return 0.5 * ((flat @ self.precision) * flat).sum(-1) + self.constant


class Gammas(Energy):
    """Gamma distributions with shapes and rates to be learned."""

    def __init__(self, shape: Tensor, rate: Tensor) -> None:
        super().__init__(tuple(shape.shape), constraints.positive)
        self.shape, self.rate = nn.Parameter(shape.clone()), nn.Parameter(rate.clone())

    def forward(self, x: Tensor) -> Tensor:
        entries = self.rate * x - (self.shape - 1.0) * x.log()
        return entries.reshape(*self.batch_shape(x), -1).sum(-1)


def network(
    shape: tuple[int, ...], seed: int = 0, support: Constraint = constraints.real, dtype: Any = F64
) -> MLPEnergy:
    """A small perceptron whose last layer is not zero."""
    energy = MLPEnergy(
        shape, (6, 5), support=support, scale=2.0, dtype=dtype, generator=seeded(seed)
    )
    with torch.no_grad():
        for k, parameter in enumerate(energy.parameters()):
            parameter.add_(
                0.4 * torch.randn(parameter.shape, generator=seeded(10 * seed + k), dtype=dtype)
            )
    return energy


def rows(shape: tuple[int, ...], n: int = 5, seed: int = 3, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(seed), dtype=dtype)


def by_hessian(energy: Energy, x: Tensor, noise: float = 0.0) -> Tensor:
    """Score matching's loss, row by row, from the Jacobian and the whole Hessian of another part of
    torch."""

    def value(flat: Tensor) -> Tensor:
        return energy(flat.reshape(1, *energy.event_shape)).squeeze(0)

    terms = []
    for row in x.reshape(len(x), -1):
        gradient = torch.autograd.functional.jacobian(value, row, create_graph=True)
        diagonal = torch.autograd.functional.hessian(value, row, create_graph=True).diagonal()
        terms.append(
            0.5 * gradient @ gradient - diagonal.sum() + 0.5 * noise**2 * (diagonal**2).sum()
        )
    return torch.stack(terms).mean()


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.

SHAPES: list[tuple[int, ...]] = [(), (3,), (1, 2, 2)]


def check_exact(shape: tuple[int, ...], noise: float = 0.0) -> None:
    energy, x = network(shape), rows(shape)
    loss, metrics = ScoreMatching(noise=noise)(energy, x)
    truth = by_hessian(energy, x, noise)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(flat_grad(energy, loss), flat_grad(energy, truth))
    penalty = truth.detach() - by_hessian(energy, x).detach()
    torch.testing.assert_close(
        0.5 * metrics["squared_score"] - metrics["laplacian"] + penalty, loss.detach()
    )


def check_mean_gradient(
    objective: Objective, shape: tuple[int, ...], truth: Callable[[Energy, Tensor], Tensor]
) -> None:
    """Over many draws the loss and its gradient average to the truth's."""
    energy = network(shape)
    x = rows(shape, 4)
    noise = seeded(11)
    exact = truth(energy, x)
    exact = torch.cat([exact.detach().reshape(1), flat_grad(energy, exact)])
    draws = []
    for _ in range(60):
        loss, _ = objective(energy, x.repeat(100, *[1] * len(shape)), generator=noise)
        draws.append(torch.cat([loss.detach().reshape(1), flat_grad(energy, loss)]))
    mean, se = mean_and_se(torch.stack(draws))
    seen = se > 1e-12 * np.abs(mean).max()  # the last bias moves nothing
    assert seen.sum() >= len(seen) - 1
    within_se(mean[seen], exact.numpy()[seen], se[seen], what="the gradient")


def check_denoising(objective: DenoisingScoreMatching) -> None:
    """Against score matching of the mixture of noised distributions, the noise integrated on a
    grid."""
    z = torch.linspace(-8.0, 8.0, 161, dtype=F64)

    def truth(energy: Energy, x: Tensor) -> Tensor:
        levels = [(0.3, 0.25), (1.2, 0.75)] if len(objective.sigmas) > 1 else [(0.5, 1.0)]
        total = torch.zeros((), dtype=F64)
        for sigma, weight in levels:
            noised = (x.unsqueeze(1) + sigma * z).requires_grad_()
            (first,) = torch.autograd.grad(energy(noised).sum(), noised, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), noised, create_graph=True)
            total = (
                total + weight * ((0.5 * first**2 - second) @ torch.softmax(-0.5 * z**2, 0)).mean()
            )
        return total

    check_mean_gradient(objective, (), truth)


def check_direction_distribution(distribution: str) -> None:
    """E[vv'] = I, and the variance of v'Av in closed form."""
    d, n = 3, 200_000
    v = sliced_module.projections_like(
        torch.zeros(n, 1, d, 1, dtype=F64), 3, 1, distribution, seeded(2)
    ).reshape(n, d)
    outer = (v.unsqueeze(2) * v.unsqueeze(1)).reshape(n, -1)
    mean, se = mean_and_se(outer)
    fixed = se < 1e-12
    np.testing.assert_allclose(mean[fixed], np.eye(d).flatten()[fixed])
    within_se(
        mean[~fixed], np.eye(d).flatten()[~fixed], se[~fixed], what=f"E[vv'] of {distribution}"
    )
    a = torch.tensor([[2.0, 0.3, -0.4], [0.3, 1.0, 0.5], [-0.4, 0.5, -1.0]], dtype=F64)
    forms = ((v @ a) * v).sum(1)
    full, trace = float((a**2).sum()), float(a.trace())
    variance = {
        "normal": 2 * full,
        "rademacher": 2 * (full - float((a.diagonal() ** 2).sum())),
        "sphere": 2 * d / (d + 2) * (full - trace**2 / d),
    }[distribution]
    mean, se = mean_and_se(forms)
    within_se(mean, trace, se, what="the trace")
    mean, se = mean_and_se((forms - trace) ** 2)
    within_se(mean, variance, se, what="its variance")


def check_non_negative(shape: tuple[int, ...]) -> None:
    """Hyvärinen's form is score matching in log x, up to d / 2."""
    energy, x = network(shape, support=constraints.positive), rows(shape).exp()
    loss, _ = NonNegativeScoreMatching()(energy, x)
    truth = by_hessian(Unconstrained(energy), x.log())
    torch.testing.assert_close(loss + 0.5 * max(1, math.prod(shape)), truth)
    torch.testing.assert_close(flat_grad(energy, loss), flat_grad(energy, truth))


def check_fisher() -> None:
    """Between normal distributions, and as the excess of the loss."""
    p = Gaussian(torch.tensor([[1.0], [-0.5]], dtype=F64), covariance=S)
    q = Gaussian(
        torch.zeros(2, 1, dtype=F64), covariance=torch.tensor([[1.0, -0.3], [-0.3, 2.0]], dtype=F64)
    )
    off = torch.linalg.inv(q.covariance) - torch.linalg.inv(S)
    shift = torch.linalg.solve(q.covariance, p.mean.flatten())
    truth = 0.5 * float((off @ S @ off).trace() + shift @ shift)
    x = p.sample(20_000, seeded(4))
    found = fisher_divergence(q, p, x)
    within_se(found.value, truth, found.standard_error, what="the Fisher divergence")
    assert found.standard_error < 0.02 * truth
    for distribution in sliced_module.DISTRIBUTIONS:
        sliced = sliced_fisher_divergence(q, p, x, 2, distribution, seeded(5))
        within_se(sliced.value, truth, sliced.standard_error, what="the sliced Fisher divergence")
        within_se(sliced.value, found.value, sliced.standard_error)
    pairs = torch.stack(
        [
            torch.stack([ScoreMatching()(e, part)[0].detach() for e in (q, p)])
            for part in x.chunk(20)
        ]
    )
    mean, se = mean_and_se(pairs[:, 0] - pairs[:, 1])
    within_se(mean, truth, se, what="the excess of the loss")


# --------------------------------------------------------------------------------------------------
# Exact score matching


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_is_that_of_the_whole_hessian(shape: tuple[int, ...], noise: float) -> None:
    check_exact(shape, noise)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)], ids=str)
def test_a_normal_distribution_is_the_minimum(shape: tuple[int, ...]) -> None:
    """At the precision itself, of value -tr(P) / 2, and no other precision nearby is better."""
    precision, x = torch.linalg.inv(S), POINTS.reshape(-1, *shape)
    energy = Quadratic(precision, shape)
    loss, _ = ScoreMatching()(energy, x)
    assert float(loss.detach()) == pytest.approx(-0.914634146, abs=5e-10)
    torch.testing.assert_close(flat_grad(energy, loss), torch.zeros(5, dtype=F64))
    for step in 0.1 * torch.tensor(
        [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]], dtype=F64
    ):
        assert (
            float(ScoreMatching()(Quadratic(precision + step, shape), x)[0].detach())
            > -0.914634146 + 1e-3
        )


def test_the_regulariser_is_noise_on_a_normal_distribution_without_correlations() -> None:
    variances = torch.tensor([2.0, 0.5], dtype=F64)
    energy = Quadratic(torch.diag(1.0 / (variances + 0.36)))
    loss, _ = ScoreMatching(noise=0.6)(energy, DEVIATIONS * variances.sqrt())
    torch.testing.assert_close(flat_grad(energy, loss)[[0, 3]], torch.zeros(2, dtype=F64))


def test_metrics_say_whether_the_data_are_draws_of_the_model() -> None:
    """E|grad E|^2 = E[laplacian E], by partial integration."""
    distribution = GaussianMixture([[-1.0, 0.0], [1.5, 0.5]], scale=0.8, dtype=F64)
    parts = distribution.sample(40_000, seeded(6)).chunk(40)
    metrics = [ScoreMatching()(distribution, part)[1] for part in parts]
    mean, se = mean_and_se([float(fact["squared_score"] - fact["laplacian"]) for fact in metrics])
    within_se(mean, 0.0, se)


# --------------------------------------------------------------------------------------------------
# Sliced


@pytest.mark.parametrize("distribution", sliced_module.DISTRIBUTIONS)
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=str)
def test_slices_average_to_the_exact_gradient(
    shape: tuple[int, ...], reduced: bool, distribution: str
) -> None:
    check_mean_gradient(
        SlicedScoreMatching(2, variance_reduced=reduced, distribution=distribution),
        shape,
        by_hessian,
    )


@pytest.mark.parametrize("distribution", sliced_module.DISTRIBUTIONS)
def test_directions_have_unit_covariance(distribution: str) -> None:
    check_direction_distribution(distribution)


@pytest.mark.parametrize("reduced", [True, False])
def test_the_error_falls_as_one_over_the_root_of_the_projections(reduced: bool) -> None:
    energy = network((4,))
    x = rows((4,), 1).repeat(2_400, 1)
    noise = seeded(7)
    exact = float(by_hessian(energy, x[:1]).detach())
    with torch.no_grad():
        for m in (1, 4, 16):
            v = [
                SlicedScoreMatching(m, variance_reduced=reduced)(energy, part, generator=noise)[0]
                for part in x.split(20)
            ]
            mean, se = mean_and_se((torch.stack(v) - exact) ** 2 * 20 * m)
            if m == 1:
                one, one_se = mean, se
            else:
                within_se(mean, one, math.hypot(se, one_se), what=f"variance x M at M = {m}")


@pytest.mark.parametrize("at", [0.3, 3.0])
def test_the_variance_of_both_forms(at: float) -> None:
    """2 |H|^2, and |g|^4 / 2 - 2 g'Hg more without variance reduction: away from the mode much,
    near it less than nothing."""
    energy = Quadratic(torch.linalg.inv(S))
    x = torch.full((1, 2), at, dtype=F64)
    n = 500
    hessian = energy.precision.detach()
    g = x[0] @ hessian
    reduced = 2.0 * float((hessian**2).sum())
    more = 0.5 * float(g @ g) ** 2 - 2.0 * float(g @ hessian @ g)
    assert (more > 0) == (at > 1)
    for how, truth in ((True, reduced), (False, reduced + more)):
        noise = seeded(1)
        losses = [
            float(
                SlicedScoreMatching(1, variance_reduced=how)(energy, x, generator=noise)[0].detach()
            )
            for _ in range(n)
        ]
        exact = 0.5 * float(g @ g) - float(hessian.trace())
        mean, se = mean_and_se([(loss - exact) ** 2 for loss in losses])
        within_se(mean, truth, se, what="the variance")


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("shape", [(), (1, 2, 2)], ids=str)
def test_differences_are_of_second_order(shape: tuple[int, ...], reduced: bool) -> None:
    energy = network(shape)
    x = rows(shape)
    errors = []
    truth = flat_grad(
        energy, SlicedScoreMatching(2, variance_reduced=reduced)(energy, x, generator=seeded(8))[0]
    )
    for eps in (0.1, 0.05, 0.025):
        loss, _ = SlicedScoreMatching(2, variance_reduced=reduced, finite_difference=eps)(
            energy, x, generator=seeded(8)
        )
        errors.append(float((flat_grad(energy, loss) - truth).norm()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2.0, 2.0], abs=0.15), errors
    assert errors[-1] < 0.01 * float(truth.norm())


# --------------------------------------------------------------------------------------------------
# Denoising


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    "sigma",
    [{"sigma": 0.5}, {"sigma": (0.3, 1.2), "weights": (1.0, 3.0)}],
    ids=["one level", "ladder of weights"],
)
def test_denoising_is_score_matching_of_the_noised_distribution(
    sigma: dict[str, Any], control: bool
) -> None:
    check_denoising(DenoisingScoreMatching(**sigma, control_variate=control))


def product_design(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Data of covariance S and noise of covariance I, independent of each other, both exactly."""
    x, z = POINTS.repeat_interleave(4, 0), DEVIATIONS.repeat(4, 1)
    return x.reshape(-1, *shape), z.reshape(-1, *shape)


def check_denoising_optimum(
    shape: tuple[int, ...], control: bool, patch: pytest.MonkeyPatch, scale: float = 1.0
) -> None:
    sigma = 0.7
    x, z = product_design(shape)
    patch.setattr(denoising_module, "standard_normal", lambda *_: scale * z)
    precision = torch.linalg.inv(S + sigma**2 * torch.eye(2, dtype=F64))
    energy = Quadratic(precision, shape)
    loss, _ = DenoisingScoreMatching(sigma, control_variate=control)(energy, x)
    assert float(loss.detach()) == pytest.approx(-0.5 * float(precision.trace()))
    torch.testing.assert_close(flat_grad(energy, loss), torch.zeros(5, dtype=F64))


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)], ids=str)
def test_the_denoising_optimum_of_a_normal_distribution(
    shape: tuple[int, ...], control: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_denoising_optimum(shape, control, monkeypatch)


def test_the_control_variate_bounds_the_variance() -> None:
    """The plain gradient's deviation grows as 1 / sigma; with it the gradient tends to the exact
    one of score matching."""
    energy, x = network((3,)), rows((3,), 4).repeat(50, 1)
    exact = flat_grad(energy, by_hessian(energy, x[:4]))

    def spread(sigma: float, control: bool) -> float:
        objective = DenoisingScoreMatching(sigma, control_variate=control)
        grads = torch.stack(
            [flat_grad(energy, objective(energy, x, generator=seeded(k))[0]) for k in range(100)]
        )
        if control and sigma <= 1e-3:
            mean, se = mean_and_se(grads)
            within_se(mean[se > 1e-12], exact[torch.from_numpy(se > 1e-12)], se[se > 1e-12])
        return float(grads.std(0).norm())

    plain = [spread(sigma, False) for sigma in (1e-1, 1e-2, 1e-3)]
    controlled = [spread(sigma, True) for sigma in (1e-1, 1e-2, 1e-3, 1e-5)]
    ratios = [b / a for a, b in itertools.pairwise(plain)]
    assert ratios == pytest.approx([10.0, 10.0], rel=0.3), plain
    assert controlled == pytest.approx([controlled[-1]] * 4, rel=0.2), controlled
    assert controlled[0] < 0.5 * plain[0]


# --------------------------------------------------------------------------------------------------
# Non-negative data


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_non_negative_data_are_matched_in_logarithms(shape: tuple[int, ...]) -> None:
    check_non_negative(shape)


def test_gamma_distributions_are_fitted_by_their_moments() -> None:
    """The minimum is shape = mean^2 / variance and rate = mean / variance, of the sample,
    exactly."""
    x = Gamma(
        shape=torch.tensor([2.5, 0.7], dtype=F64), rate=torch.tensor([1.5, 3.0], dtype=F64)
    ).sample(1000, seeded(9))
    mean, variance = x.mean(0), x.var(0, correction=0)
    energy = Gammas(mean**2 / variance, mean / variance)
    best, _ = NonNegativeScoreMatching()(energy, x)
    torch.testing.assert_close(
        flat_grad(energy, best), torch.zeros(4, dtype=F64), atol=1e-12, rtol=0.0
    )
    for name in ("shape", "rate"):
        other = Gammas(mean**2 / variance, mean / variance)
        with torch.no_grad():
            getattr(other, name).mul_(1.1)
        assert float(NonNegativeScoreMatching()(other, x)[0].detach()) > float(best.detach())


def test_zeros_and_linear_energies_are_allowed() -> None:
    """An exponential distribution has no second derivative: -2 lambda E[x] + lambda^2 E[x^2] /
    2."""
    x = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    loss, _ = NonNegativeScoreMatching()(Exponential(2.0, dtype=F64), x)
    assert float(loss) == pytest.approx(-4.0 * 4 / 3 + 2.0 * 10 / 3)


# --------------------------------------------------------------------------------------------------
# What is measured; grey levels


def test_fisher_divergences() -> None:
    check_fisher()


def test_a_score_may_stand_for_the_truth() -> None:
    p, q = Gaussian(torch.zeros(3, dtype=F64)), Gaussian(torch.ones(3, dtype=F64), scale=2.0)
    x = p.sample(5000, seeded(1))  # more rows than one evaluation takes
    assert fisher_divergence(q, lambda rows: -rows, x) == fisher_divergence(q, p, x)
    assert fisher_divergence(p, p, x)[:2] == (0.0, 0.0)


def test_grey_levels_there_and_back() -> None:
    pixels = digits(threshold=None, dtype=F64).train
    y = dequantized(pixels, 17, seeded(0))
    assert float(y.min()) >= 0.0
    assert float(y.max()) < 1.0
    assert torch.equal(quantized(y, 17), pixels)
    inside = (17.0 * y - (17.0 * y).floor()).flatten()
    mean, se = mean_and_se(inside)
    within_se(mean, 0.5, se)
    mean, se = mean_and_se((inside - 0.5) ** 2)
    within_se(mean, 1 / 12, se)


def test_the_bound_of_grey_levels() -> None:
    """log P(k) >= E[log p(y)] - log K, against integrals over the cells."""
    levels, distribution = (
        torch.arange(4, dtype=F64) / 3,
        torch.distributions.Beta(torch.tensor(2.0, dtype=F64), 3.0),
    )
    edges = torch.linspace(0.0, 1.0, 5, dtype=F64)
    # the distribution function of Beta(2, 3)
    log_p = (1 - (1 - edges) ** 3 * (1 + 3 * edges)).diff().log()
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(400))
    within = (
        distribution.log_prob((torch.arange(4).unsqueeze(1) + 0.5 + 0.5 * nodes) / 4) @ weights / 2
    )
    bound = torch.stack(
        [distribution.log_prob(dequantized(levels, 4, seeded(k))) for k in range(4000)]
    )
    mean, se = mean_and_se(bound)
    within_se(mean, within, se)
    assert bool((within - math.log(4) < log_p).all())


# --------------------------------------------------------------------------------------------------
# Every objective of the family

Make = Callable[[], Objective]
REAL, POSITIVE = constraints.real, constraints.positive
OBJECTIVES: dict[str, tuple[Make, Constraint]] = {
    "exact": (ScoreMatching, REAL),
    "regularised": (functools.partial(ScoreMatching, noise=0.3), REAL),
    "sliced": (functools.partial(SlicedScoreMatching, variance_reduced=False), REAL),
    "sliced, reduced, sphere": (
        functools.partial(SlicedScoreMatching, 3, distribution="sphere"),
        REAL,
    ),
    "differences": (
        functools.partial(SlicedScoreMatching, distribution="rademacher", finite_difference=0.1),
        REAL,
    ),
    "denoising": (functools.partial(DenoisingScoreMatching, 0.3), REAL),
    "denoising, ladder, controlled": (
        functools.partial(DenoisingScoreMatching, (0.1, 0.5, 1.0), control_variate=True),
        REAL,
    ),
    "non-negative": (NonNegativeScoreMatching, POSITIVE),
}
EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def setting(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = F64, n: int = 5
) -> tuple[Objective, MLPEnergy, Tensor]:
    make, support = OBJECTIVES[name]
    x = rows(shape, n, dtype=dtype)
    return (
        make(),
        network(shape, support=support, dtype=dtype),
        x.exp() if support is POSITIVE else x,
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY
def test_any_shape_and_precision(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    objective, energy, x = setting(name, shape, dtype)
    x.requires_grad_(True)
    loss, metrics = objective(energy, x, generator=seeded(0))
    again, _ = objective(energy, x, generator=seeded(0))
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert torch.equal(loss, again)
    torch.testing.assert_close(metrics["energy_data"], energy(x).mean().detach())
    assert not any(fact.requires_grad for fact in metrics.values())
    loss.backward()
    assert x.grad is None
    *others, last_bias = energy.parameters()
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool(p.grad.any())
        for p in others
    )
    assert last_bias.grad is None or float(last_bias.grad.abs()) < 1e-3 * float(
        others[0].grad.norm()
    )


@EVERY
def test_rows_do_not_know_each_other(name: str) -> None:
    """The loss is a sum over rows: what a row adds does not depend on another."""
    objective, energy, x = setting(name, (2,), n=4)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return objective(energy, torch.stack([a, b]), generator=seeded(1))[0].detach()

    a, a2, b, b2 = x
    torch.testing.assert_close(
        loss(a, b) - loss(a2, b), loss(a, b2) - loss(a2, b2), rtol=1e-8, atol=1e-10
    )


@EVERY
def test_a_row_that_is_not_a_number_is_seen(name: str) -> None:
    objective, energy, x = setting(name, (2,))
    x[1, 0] = math.nan
    loss, _ = objective(energy, x, generator=seeded(0))
    assert bool(loss.isnan())
    before = [p.detach().clone() for p in energy.parameters()]
    with pytest.raises(ValueError, match="data must be finite, got nan in row"):
        fit(energy, objective, x, num_steps=1)
    rows = DataLoader(x, batch_size=len(x))  # whose batches are checked as they come
    with pytest.raises(ValueError, match="data must be finite, got nan in row"):
        fit(energy, objective, rows, num_steps=1)
    assert all(map(torch.equal, before, energy.parameters()))


@EVERY
def test_training_lowers_the_loss_and_resumes(name: str, tmp_path: Path) -> None:
    def run(path: Path | None, until: int, resume: bool = False) -> tuple[MLPEnergy, list[float]]:
        objective, energy, x = setting(name, (2,), n=64)
        adam = functools.partial(torch.optim.Adam, lr=0.01)
        steps = fit_steps(
            energy,
            objective,
            x,
            num_steps=40,
            batch_size=32,
            optimizer=adam,
            checkpoint=path,
            resume=resume,
        )
        losses = []
        for step in steps:
            losses.append(step.loss)
            if step.number + 1 == until:
                break
        steps.close()  # type: ignore[attr-defined]
        return energy, losses

    whole, losses = run(None, 40)
    assert sum(losses[-8:]) < sum(losses[:8])
    run(tmp_path / "run.safetensors", 13)
    rest, _ = run(tmp_path / "run.safetensors", 40, resume=True)
    for ours, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@EVERY
def test_there_is_nothing_to_save(name: str) -> None:
    make, _ = OBJECTIVES[name]
    assert not make().state_dict()
    make().load_state_dict({})


@EVERY
def test_judging_without_gradients(name: str) -> None:
    objective, energy, x = setting(name, (2,))
    loss = objective(energy, x, generator=seeded(0))[0].detach()
    with torch.no_grad():
        assert torch.equal(objective(energy, x, generator=seeded(0))[0], loss)
    with torch.inference_mode():
        torch.testing.assert_close(objective(energy, x, generator=seeded(0))[0], loss)


def test_a_constant_that_gets_no_gradient_does_not_stop_the_loop() -> None:
    energy, x = (
        Quadratic(torch.eye(2, dtype=F64)),
        Gaussian(torch.zeros(2, dtype=F64), covariance=S).sample(500, seeded(0)),
    )
    adam = functools.partial(torch.optim.Adam, lr=0.03)
    history = fit(
        energy,
        ScoreMatching(),
        x,
        num_steps=400,
        batch_size=500,
        optimizer=adam,
        max_grad_norm=10.0,
    )
    assert all(map(math.isfinite, history["grad_norm"]))
    assert energy.constant.grad is None
    symmetric = 0.5 * (energy.precision + energy.precision.mT).detach()
    torch.testing.assert_close(symmetric, torch.linalg.inv(x.mT @ x / len(x)), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# The front door


def test_piecewise_linear_energies_are_named() -> None:
    with (
        pytest.warns(UserWarning, match="piecewise linear"),
        pytest.warns(UserWarning, match="give scale"),
    ):
        energy = MLPEnergy((2,), (8,), activation="relu", scale=None, dtype=F64)
    with torch.no_grad():
        energy.net[-1].weight.fill_(1.0)  # type: ignore[index, union-attr]
    x = rows((2,))
    for objective in (ScoreMatching(), SlicedScoreMatching()):
        with pytest.warns(
            UserWarning, match="every second derivative of MLPEnergy is exactly 0: .*ReLU"
        ):
            objective(energy, x)
    loss, _ = DenoisingScoreMatching(0.5)(energy, x)
    assert bool(torch.isfinite(loss))


class Tilt(Energy):
    """A linear energy without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def test_a_linear_energy_without_parameters_is_refused_too() -> None:
    with pytest.raises(ValueError, match="every second derivative of Tilt is exactly 0"):
        ScoreMatching()(Tilt(), torch.zeros(3))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ScoreMatching(noise=-1.0), "noise must be finite and not negative"),
    (lambda: ScoreMatching(noise=math.nan), "noise must be finite"),
    (lambda: SlicedScoreMatching(0), "num_projections must be an integer of at least 1"),
    (lambda: SlicedScoreMatching(distribution="cube"), "distribution must be one of"),
    (lambda: SlicedScoreMatching(finite_difference=0.0), "finite_difference must be positive"),
    (lambda: DenoisingScoreMatching(0.0), "sigma and weights must be positive"),
    (lambda: DenoisingScoreMatching(()), "sigma and weights must be positive"),
    (
        lambda: DenoisingScoreMatching((0.1, 1.0), weights=(1.0,)),
        "for each noise level of sigma, 2, got 1",
    ),
    (
        lambda: ScoreMatching()(Gamma(2.0), torch.ones(3)),
        "For positive support use NonNegativeScoreMatching",
    ),
    (
        lambda: SlicedScoreMatching()(Gamma(2.0), torch.ones(3)),
        "must have real support for .*, but Gamma has",
    ),
    (
        lambda: DenoisingScoreMatching()(Gamma(2.0), torch.ones(3)),
        "must have real support for .*, but Gamma has",
    ),
    (
        lambda: NonNegativeScoreMatching()(Exponential(2.0), torch.tensor([1.0, -0.5])),
        "batch must be nonnegative, got 1 negative entries",
    ),
    (lambda: DenoisingScoreMatching(torch.tensor(-0.1)), "sigma and weights must be positive"),
    (
        lambda: NonNegativeScoreMatching()(Gaussian(0.0), torch.ones(3)),
        "positive or nonnegative support .*, but Gaussian",
    ),
    (lambda: ScoreMatching()(Gaussian(torch.zeros(2)), torch.ones(3)), r"event_shape \(2,\)"),
    (
        lambda: SlicedScoreMatching()(Gaussian(torch.zeros(2)), torch.ones(3, 2, dtype=F64)),
        "batch must have the dtype",
    ),
    (
        lambda: curvatures(Gaussian(0.0), torch.ones(3), torch.ones(3)),
        r"directions must have shape \(M, \*x.shape\)",
    ),
    (lambda: fisher_divergence(Gaussian(0.0), Gaussian(1.0), torch.ones(1)), "at least two rows"),
    (
        lambda: fisher_divergence(Gaussian(0.0), lambda x: x.sum(), torch.ones(3)),
        "truth must give a score of the shape of x",
    ),
    (
        lambda: sliced_fisher_divergence(Gaussian(0.0), Gaussian(1.0), torch.ones(3), 0),
        "num_projections must be",
    ),
    (
        lambda: sliced_fisher_divergence(
            Gaussian(0.0), Gaussian(1.0), torch.ones(3), distribution="cube"
        ),
        "distribution must be one of",
    ),
    (
        lambda: dequantized(torch.tensor([0.0, 0.3]), 3),
        "x must hold levels from 0 to 1 in steps of 1 / 2",
    ),
    (lambda: dequantized(torch.tensor([1.5]), 3), "x must hold levels"),
    (lambda: dequantized(torch.tensor([math.nan]), 3), "x must hold levels"),
    (lambda: quantized(torch.zeros(1), 1), "levels must be an integer of at least 2"),
]


@pytest.mark.parametrize(("call", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# --------------------------------------------------------------------------------------------------
# Mutants


def flipped(energy: Energy, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    gradient, curved = curvatures(energy, x, v)
    return gradient, -curved


def averaged(energy: Energy, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    gradient, curved = curvatures(energy, x, v)
    return gradient, curved / energy.event_shape.numel()


def detached(energy: Energy, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    gradient, curved = curvatures(energy, x, v)
    return gradient, curved.detach()


def normalised(x: Tensor, dims: int, *args: Any) -> Tensor:
    v = ORIGINAL(x, dims, *args)
    return v / v.flatten(-dims).norm(dim=-1).reshape(*v.shape[: v.dim() - dims], *[1] * dims)


def last_dimension_only(values: Tensor, dims: int) -> Tensor:
    return values.sum(-1).flatten(1 - dims)[..., 0] if dims > 1 else values.sum(-1)


def doubled_noise(*args: Any) -> Tensor:
    return 2.0 * STANDARD_NORMAL(*args)


def without_sigma(energy: Energy, batch: Tensor, squared: Tensor, laplacian: Tensor) -> Any:
    return MATCHED(energy, batch, squared, 0.5 * laplacian)


ORIGINAL = sliced_module.projections_like
STANDARD_NORMAL = denoising_module.standard_normal
MATCHED = denoising_module.score_matching_loss
Check = Callable[[], None]
FLAT: Check = functools.partial(check_exact, (3,))
SLICED: Check = functools.partial(
    check_mean_gradient, SlicedScoreMatching(2, distribution="rademacher"), (1, 2, 2), by_hessian
)
DENOISED: Check = functools.partial(check_denoising, DenoisingScoreMatching(0.5))
CONTROLLED: Check = functools.partial(
    check_denoising, DenoisingScoreMatching(0.5, control_variate=True)
)
LADDER: Check = functools.partial(check_denoising, DenoisingScoreMatching((0.3, 1.2), (1.0, 3.0)))
MUTANTS: dict[str, tuple[Any, str, Any, Check]] = {
    "the Laplacian's sign": (exact_module, "curvatures", flipped, FLAT),
    "the trace over d": (exact_module, "curvatures", averaged, FLAT),
    "a detached Laplacian": (exact_module, "curvatures", detached, FLAT),
    "the sign of slices": (sliced_module, "curvatures", flipped, SLICED),
    "slices over d": (sliced_module, "curvatures", averaged, SLICED),
    "detached slices": (sliced_module, "curvatures", detached, SLICED),
    "normalised directions": (sliced_module, "projections_like", normalised, SLICED),
    "a row of an image": (sliced_module, "event_sum", last_dimension_only, SLICED),
    "noise of twice its scale": (denoising_module, "standard_normal", doubled_noise, DENOISED),
    "the target's scale": (denoising_module, "score_matching_loss", without_sigma, DENOISED),
    "a control that is not of mean 0": (
        denoising_module,
        "standard_normal",
        lambda *a: STANDARD_NORMAL(*a) + 0.5,
        CONTROLLED,
    ),
    "levels drawn alike": (
        DenoisingScoreMatching,
        "_draw_levels",
        lambda self, b, d, g: uniform_levels(self, b, g),
        LADDER,
    ),
    "edges unweighted": (
        exact_module,
        "unit_directions",
        lambda x, d: unit_directions(x, d) / x,
        lambda: check_non_negative((3,)),
    ),
    "a divergence without its half": (
        fisher_module,
        "_half",
        lambda s: MEAN(2.0 * s),
        check_fisher,
    ),
    "a divergence of the wrong sign": (
        fisher_module,
        "value_and_grad",
        lambda e, x: (None, GRAD(e, x)[1].abs()),
        check_fisher,
    ),
}
MEAN, GRAD = fisher_module._half, fisher_module.value_and_grad


def uniform_levels(
    objective: DenoisingScoreMatching, batch: Tensor, noise: torch.Generator
) -> Tensor:
    return batch.new_tensor(objective.sigmas)[torch.randint(2, batch.shape, generator=noise)]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, broken, check = MUTANTS[name]
    monkeypatch.setattr(module, attribute, broken)
    with pytest.raises(AssertionError):
        check()


def test_the_wrong_scale_of_noise_moves_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_denoising_optimum((2,), True, monkeypatch, scale=1.1)


def test_directions_of_unit_length_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_module, "projections_like", normalised)
    with pytest.raises(AssertionError, match="E\\[vv'\\]"):
        check_direction_distribution("sphere")
