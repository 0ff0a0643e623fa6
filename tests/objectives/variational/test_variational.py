"""Reverse KL: against quadrature, closed forms and Pyro's ELBO; its gradients; the temperature of a
fit, and what it reaches; mutants."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.flow_cases import F64, noise, stirred
from pyro.distributions.transforms import affine_coupling
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy.optimize import minimize
from torch import Tensor, nn

from pyroebm import Boltzmann, Energy
from pyroebm.core import Unnormalized
from pyroebm.core.rng import seeded_generator
from pyroebm.flows import (
    NICE,
    AdditiveCoupling,
    ConditionalGaussian,
    Flow,
    PLULinear,
    RedundantNICE,
    importance_sample,
)
from pyroebm.nn.mlp import frozen
from pyroebm.objectives import (
    FlowObjective,
    ForwardKL,
    ReverseKL,
    estimate_augmented_kl,
)
from pyroebm.objectives.variational.reverse_kl import kl_summands
from pyroebm.ppl import flow_guide, flow_model
from pyroebm.targets import DoubleWell, Gaussian
from pyroebm.training import fit, fit_steps


def redundant(
    dim: int = 1, total_dim: int = 2, hidden: int = 8, scale: float = 0.15
) -> RedundantNICE:
    flow = RedundantNICE(dim, total_dim, num_layers=2, hidden_sizes=(hidden,), dtype=F64)
    stirred(flow, scale=scale)
    return flow


class Known(Energy):
    """The density of a flow, copied, as an energy: the optimum of fitting that flow."""

    log_z = 0.0

    def __init__(self, flow: Flow) -> None:
        super().__init__((flow.dim,))
        self.flow = copy.deepcopy(flow).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def j_r_by_quadrature(flow: RedundantNICE, energy: Energy) -> float:
    """The written formula of J_R, term by term, integrated over z on a grid; determinants by torch,
    nothing from log_prob."""
    axis = torch.linspace(-8.0, 8.0, 321, dtype=F64)
    z = torch.cartesian_prod(*[axis] * flow.total_dim).reshape(-1, flow.total_dim)
    weight = (
        torch.exp(-0.5 * z.square().sum(-1))
        * (float(axis[1] - axis[0]) / math.sqrt(2 * math.pi)) ** flow.total_dim
    )
    d, extra = flow.dim, flow.total_dim - flow.dim
    with torch.no_grad():
        xy = flow.forward_and_log_prob(z)[0]
        terms = (
            energy(xy[:, :d].reshape(-1, *energy.event_shape))
            - torch.linalg.slogdet(flow.linear.matrix()).logabsdet
        )
        if flow.conditional is not None:
            distribution, y = flow.conditional(xy[:, :d]), xy[:, d:]
            deviation = (y - distribution.mean).unsqueeze(-1)
            quadratic = (
                deviation.mT @ torch.linalg.solve(distribution.covariance_matrix, deviation)
            ).reshape(-1)
            terms = (
                terms
                + 0.5 * torch.logdet(distribution.covariance_matrix)
                + 0.5 * quadratic
                + 0.5 * extra * math.log(2 * math.pi)
            )
    assert energy.log_z is not None
    h_z = 0.5 * flow.total_dim * (1 + math.log(2 * math.pi))
    return float((weight * terms).sum()) - h_z + energy.log_z


def check_j_r(flow: RedundantNICE, energy: Energy) -> None:
    truth = j_r_by_quadrature(flow, energy)
    value, se = estimate_augmented_kl(flow, energy, 40_000)
    within_se(value, truth, se, what="J_R")


def gradient(flow: Flow, objective: ReverseKL, z: Tensor) -> Tensor:
    loss, _ = objective.loss_at(flow, z)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=F64) if g is None else g.flatten()
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


def check_stl_has_no_noise_at_the_optimum(flow: Flow) -> Energy:
    energy = Known(flow)
    stl = gradient(flow, ReverseKL(energy, gradient="stl"), noise(64, flow.total_dim))
    assert float(stl.abs().max()) < 1e-10, (
        "the path derivative is not 0 where the flow is the target"
    )
    return energy


# --------------------------------------------------------------------------------------------------
# The value


@pytest.mark.parametrize("total_dim", [1, 2])
@pytest.mark.parametrize(
    "energy",
    [DoubleWell(dtype=F64), Gaussian([0.5], scale=0.7, dtype=F64)],
    ids=["wells", "gaussian"],
)
def test_j_r_is_the_written_formula(total_dim: int, energy: Energy) -> None:
    check_j_r(redundant(1, total_dim), energy)


def test_j_of_two_dimensions_is_the_written_formula() -> None:
    check_j_r(redundant(2, 2), Gaussian([0.5, -1.0], scale=0.7, dtype=F64))


@pytest.mark.parametrize("dim", [1, 3])
def test_j_of_a_gaussian_target_is_the_analytic_divergence(dim: int) -> None:
    flow = NICE(dim, num_layers=0, dtype=F64)
    stirred(flow, scale=0.5)
    s, c = flow.linear.matrix().detach(), flow.transform.parts[-1].offset.detach()
    covariance = torch.eye(dim, dtype=F64) + 0.3
    q, p = (
        dist.MultivariateNormal(c, s @ s.T),
        dist.MultivariateNormal(torch.ones(dim, dtype=F64), covariance),
    )
    truth = torch.distributions.kl_divergence(q, p)
    energy = Gaussian(torch.ones(dim), covariance=covariance, dtype=F64)
    value, se = estimate_augmented_kl(flow, energy, 40_000)
    within_se(value, truth, se)


def test_j_r_bounds_the_divergence_of_the_marginal() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    x = torch.linspace(-8.0, 8.0, 801, dtype=F64)
    log_q = flow.log_prob_x(x.unsqueeze(-1))
    kl = float((log_q.exp() * (log_q + energy(x) + energy.log_z)).sum() * (x[1] - x[0]))
    value, se = estimate_augmented_kl(flow, energy, 40_000)
    assert kl > 0.0
    assert value > kl - 5 * se
    assert j_r_by_quadrature(flow, energy) > kl + 1e-3  # strictly: M and Sigma are not those of q


def test_the_estimate_has_no_error_at_the_optimum() -> None:
    flow = redundant(2, 2)
    value, error = estimate_augmented_kl(flow, Known(flow), 2000)
    assert abs(value) < 1e-12  # J >= 0, and 0 here
    assert error < 1e-12


def test_metrics_and_what_is_not_guessed() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    z = noise(100, 2)
    objective = ReverseKL(energy)
    loss, metrics = objective.loss_at(flow, z)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert metrics["augmented_kl"] == loss.detach() + energy.log_z
    assert metrics["negative_elbo"] == loss.detach()
    xy, log_q = flow.forward_and_log_prob(z)
    terms = flow.extend(energy)(xy) + log_q
    torch.testing.assert_close(metrics["standard_error"], terms.detach().std() / 10.0)
    objective.beta = 0.5
    cold, metrics = objective.loss_at(flow, z)
    torch.testing.assert_close(loss - cold, 0.5 * energy(xy[:, 0]).mean())
    assert "augmented_kl" not in metrics  # log C of a tempered energy is not known
    unknown = Unnormalized(lambda x: -(x**2), event_shape=()).double()
    assert "augmented_kl" not in ReverseKL(unknown)(flow)[1]
    with pytest.raises(
        ValueError, match=r"log C of Unnormalized is not known.*log_z=0.0 for J_R - log C"
    ):
        estimate_augmented_kl(flow, unknown)
    assert math.isfinite(estimate_augmented_kl(flow, unknown, 100, log_z=0.0)[0])


def test_objective_refuses() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    for make in (
        lambda **wrong: ReverseKL(energy, **wrong),
        partial(estimate_augmented_kl, flow, energy),
    ):
        with pytest.raises(
            ValueError, match="num_samples must be an integer of at least 2, got num_samples=1"
        ):
            make(num_samples=1)
    with pytest.raises(ValueError, match=r"gradient must be one of .* got gradient='path'"):
        ReverseKL(energy, gradient="path")
    with pytest.raises(ValueError, match="dim=1 entries"):
        ReverseKL(Gaussian([0.0, 0.0], dtype=F64))(flow)
    with pytest.raises(ValueError, match="the same dtype"):
        ReverseKL(DoubleWell())(flow)
    with pytest.raises(ValueError, match=r"beta must be a positive finite number, got beta=0\.0"):
        ReverseKL(energy).beta = 0.0
    with pytest.raises(ValueError, match=r"batch must be None: ReverseKL makes its own draws"):
        ReverseKL(energy)(flow, torch.zeros(3, 1))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# The gradients


def cached_affine() -> Flow:
    """Pyro's transforms keep the last (z, x): the trap that makes frozen parameters have no
    effect."""
    flow = Flow(
        [affine_coupling(2, hidden_dims=[4]), affine_coupling(2, hidden_dims=[4])], 2, 2
    ).double()
    return stirred(flow)


AT_OPTIMUM: dict[str, Callable[[], Flow]] = {
    "nice1": lambda: stirred(NICE(1, dtype=F64), scale=0.15),
    "nice2": lambda: redundant(2, 2),
    "nice3": lambda: redundant(3, 3),
    "pyro_affine": cached_affine,
}


@pytest.mark.parametrize("name", AT_OPTIMUM)
def test_stl_has_no_noise_at_the_optimum_and_the_total_gradient_has(name: str) -> None:
    flow = AT_OPTIMUM[name]()
    energy = check_stl_has_no_noise_at_the_optimum(flow)
    total = gradient(flow, ReverseKL(energy, gradient="total"), noise(64, flow.total_dim))
    assert float(total.abs().max()) > 1e-2


@pytest.mark.parametrize(("dim", "total_dim"), [(2, 2), (1, 2), (1, 3)])
def test_stl_and_total_gradients_agree_in_mean(dim: int, total_dim: int) -> None:
    flow, energy = (
        redundant(dim, total_dim, hidden=3),
        Gaussian([0.5, -1.0][:dim], scale=0.7, dtype=F64),
    )
    differences = []
    for seed in range(300):
        z = noise(32, total_dim, seed=seed)
        total, stl = (gradient(flow, ReverseKL(energy, gradient=g), z) for g in ("total", "stl"))
        differences.append(total - stl)
    stacked = torch.stack(differences)
    # M and Sigma have one gradient in both, and unused triangles have none
    varies = stacked.abs().amax(0) > 1e-12
    assert int(varies.sum()) > 10
    mean, se = mean_and_se(stacked[:, varies])
    within_se(mean, np.zeros_like(mean), se)


# --------------------------------------------------------------------------------------------------
# Pyro's SVI


SYSTEMS: dict[str, Callable[[], tuple[Flow, Energy]]] = {
    "scalar_redundant": lambda: (redundant(1, 3), DoubleWell(dtype=F64)),
    "scalar": lambda: (stirred(NICE(1, dtype=F64), scale=0.15), DoubleWell(dtype=F64)),
    "vector_redundant": lambda: (redundant(2, 3), Gaussian([0.5, -1.0], scale=0.7, dtype=F64)),
    "image": lambda: (redundant(4, 4), Gaussian(torch.zeros(1, 2, 2), dtype=F64)),
    "pyro_affine": lambda: (cached_affine(), Gaussian([0.5, -1.0], dtype=F64)),
}


@pytest.mark.parametrize("gradient_kind", ["total", "stl"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_j_r_is_minus_the_elbo_draw_by_draw(name: str, gradient_kind: str) -> None:
    flow, energy = SYSTEMS[name]()
    model, guide = flow_model(flow, energy), flow_guide(flow, energy, stl=gradient_kind == "stl")
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    torch.manual_seed(3)
    z = flow().base_dist.sample((50,))
    objective = ReverseKL(energy, gradient=gradient_kind)
    loss, _ = objective.loss_at(flow, z)
    torch.manual_seed(3)
    assert elbo.loss(model, guide) == pytest.approx(float(loss.detach()), abs=1e-9)
    ours = gradient(flow, objective, z)
    torch.manual_seed(3)
    elbo.loss_and_grads(model, guide)
    theirs = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in flow.parameters()
        ]
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-8)
    torch.manual_seed(3)
    single = Trace_ELBO().loss(model, guide)  # one particle, without a plate
    assert single == pytest.approx(
        float(kl_summands(flow, energy, _first(flow))[0].detach()), abs=1e-9
    )


def _first(flow: Flow) -> Tensor:
    torch.manual_seed(3)
    return flow().base_dist.sample((1,))


def test_svi_trains_every_parameter_and_leaves_the_energy_alone() -> None:
    flow = redundant(1, 3)
    energy = Known(stirred(NICE(1, dtype=F64), scale=0.15))
    energy.flow.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(
        flow_model(flow, energy), flow_guide(flow, energy), pyro.optim.Adam({"lr": 1e-3}), elbo
    )
    svi.step()
    for name, parameter in flow.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert all(p.grad is None for p in energy.parameters())


def test_users_read_x_and_y_and_may_bring_their_own_model() -> None:
    flow, energy = redundant(1, 3), DoubleWell(dtype=F64)
    model, guide = flow_model(flow, energy), flow_guide(flow, energy)
    draws = Predictive(guide, num_samples=7, parallel=True, return_sites=("x", "y"))()
    assert {name: tuple(draw.shape) for name, draw in draws.items()} == {"x": (7,), "y": (7, 2)}

    def own_model() -> None:
        x = pyro.sample("x", Boltzmann(energy))
        assert flow.conditional is not None
        pyro.sample("y", flow.conditional(x.unsqueeze(-1)))

    losses = []
    for candidate in (model, own_model):
        torch.manual_seed(0)
        losses.append(
            Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0).loss(
                candidate, guide
            )
        )
    # Boltzmann knows log C: this is J_R itself
    assert losses[1] - losses[0] == pytest.approx(energy.log_z)


# --------------------------------------------------------------------------------------------------
# The loop


def test_a_fit_follows_its_schedule_and_repeats_itself() -> None:
    before = torch.get_rng_state()
    start = RedundantNICE(1, 2, hidden_sizes=(8,), dtype=F64, generator=seeded_generator(0))
    histories = [
        fit(
            copy.deepcopy(start),
            ReverseKL(DoubleWell(dtype=F64), 16),
            num_steps=10,
            lr=0.01,
            seed=s,
        )
        for s in (0, 0, 1)
    ]
    one, again, other = (history["loss"].tolist() for history in histories)
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)
    history = histories[0]
    assert history["beta"] == pytest.approx([0.1, 0.325, 0.55, 0.775] + [1.0] * 6)
    assert history["lr"] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    )
    # log C is known where beta is 1
    assert np.isfinite(history["augmented_kl"]).tolist() == [False] * 4 + [True] * 6
    assert (history["grad_norm"] > 0).all()
    assert fit(start, ReverseKL(DoubleWell(dtype=F64)), num_steps=1)["lr"] == ReverseKL.lr


def test_beta_rises_over_a_fraction_of_the_steps_and_is_1_elsewhere() -> None:
    energy = DoubleWell(dtype=F64)

    def betas(objective: FlowObjective, num_steps: int) -> list[float]:
        found = []
        for step in range(num_steps):
            objective.begin_step(step, num_steps)
            found.append(objective.beta)
        return found

    assert ReverseKL(energy).beta == 1.0
    assert betas(ReverseKL(energy, beta_start=0.5, anneal=1.0), 4) == [0.5, 0.625, 0.75, 0.875]
    assert betas(ReverseKL(energy, beta_start=0.5, anneal=0.0), 2) == [1.0, 1.0]
    assert betas(ReverseKL(energy, beta_start=1.0), 3) == [1.0] * 3
    assert betas(ForwardKL(torch.zeros(5, 1, dtype=F64)), 3) == [1.0] * 3


class _Modes(nn.Module):
    """Whether it was called in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones((), dtype=F64))
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        return -self.c * x**2


def test_the_energy_is_in_eval_mode_and_no_part_of_the_objective() -> None:
    net = _Modes()
    energy = Unnormalized(net, event_shape=()).double()
    objective = ReverseKL(energy, 8)
    assert objective.energy is energy
    assert not list(objective.parameters())
    assert not list(objective.children())
    assert objective.state_dict() == {}
    objective.float()
    assert net.c.dtype == F64
    fit(redundant(), objective, num_steps=2)
    assert net.seen
    assert not any(net.seen)
    assert energy.training
    assert net.training
    assert net.c.grad is None
    copied = copy.deepcopy(objective)
    assert copied.energy is not energy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        (
            {"beta_start": 0.0},
            r"0 < beta_start <= 1 and 0 <= anneal <= 1 must hold, got beta_start=0.0",
        ),
        ({"beta_start": math.nan}, "beta_start=nan"),
        ({"anneal": 1.5}, r"anneal=1.5"),
    ],
)
def test_settings_are_checked_by_the_constructor(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReverseKL(DoubleWell(dtype=F64), **options)
    with pytest.raises(ValueError, match="Energy"):
        ReverseKL(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_frozen_parameters_stay() -> None:
    flow = redundant()
    flow.linear.requires_grad_(False)
    before = flow.linear.matrix()
    fit(flow, ReverseKL(DoubleWell(dtype=F64), 8), num_steps=2)
    assert torch.equal(flow.linear.matrix(), before)


# --------------------------------------------------------------------------------------------------
# What a fit reaches


def test_fit_of_a_gaussian_finds_it() -> None:
    energy = Gaussian([0.5, -0.5], covariance=[[1.0, 0.6], [0.6, 0.8]], dtype=F64)
    flow = NICE(2, num_layers=2, hidden_sizes=(8,), dtype=F64)
    start = estimate_augmented_kl(flow, energy, 5000)[0]
    fit(flow, ReverseKL(energy, 64), num_steps=400, lr=0.02)
    value, se = estimate_augmented_kl(flow, energy, 5000)
    assert start > 0.3
    assert -5 * se <= value < 1e-3


@pytest.mark.parametrize(("shift", "published"), [(True, 0.0966), (False, 2.4427)])
def test_in_one_dimension_nice_is_a_gaussian_and_reaches_the_best_one(
    shift: bool, published: float
) -> None:
    energy = DoubleWell(dtype=F64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def j(parameters: np.ndarray) -> float:
        x = (parameters[1] if shift else 0.0) + math.exp(parameters[0]) * nodes
        mean = float(weights @ (x**4 - 4 * x**2 + x)) / math.sqrt(2 * math.pi)
        return mean - parameters[0] - 0.5 * (1 + math.log(2 * math.pi)) + energy.log_z

    best = minimize(
        j, [-1.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}
    ).fun
    assert best == pytest.approx(published, abs=1e-4)
    flow = NICE(1, shift=shift, dtype=F64)
    fit(flow, ReverseKL(energy, 256), num_steps=700, lr=0.02)
    assert j_r_by_quadrature(flow, energy) == pytest.approx(best, abs=1e-3)


def test_redundant_latents_find_both_wells_in_a_short_run() -> None:
    """A sixth of the default steps: J_R is below the divergence of any density without the right
    well, and of any Gaussian; weighted, the right well has its mass."""
    energy, flow = DoubleWell(), RedundantNICE(1, 2)
    fit(flow, ReverseKL(energy), num_steps=500, lr=5e-3)
    j_r, se = estimate_augmented_kl(flow, energy)
    assert -5 * se <= j_r < -math.log1p(-energy.right_mass) - 5 * se < 0.0966
    result = importance_sample(flow, energy, 100_000)
    within_se(result.log_z.value, energy.log_z, result.log_z.standard_error)
    right, right_se = result.expectation(lambda x: (x > energy.barrier).double())
    within_se(right, energy.right_mass, right_se)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total_dim", [2, 3])
def test_defaults_fit_the_double_well(total_dim: int, seed: int) -> None:
    energy, flow = (
        DoubleWell(),
        RedundantNICE(1, total_dim, generator=torch.Generator().manual_seed(seed)),
    )
    fit(flow, ReverseKL(energy), num_steps=3000, seed=seed)
    result = importance_sample(flow, energy, 500_000, generator=torch.Generator().manual_seed(seed))
    right, _ = result.expectation(lambda x: (x > energy.barrier).double())
    assert result.ess_fraction > 0.97
    assert abs(result.log_z.value - energy.log_z) < 0.003
    assert abs(float(right) - energy.right_mass) < 0.002
    assert estimate_augmented_kl(flow, energy)[0] < 0.015


@pytest.mark.slow
def test_defaults_give_plain_nice_its_best_gaussian() -> None:
    energy, flow = DoubleWell(), NICE(1)
    fit(flow, ReverseKL(energy), num_steps=3000)
    value, se = estimate_augmented_kl(flow, energy, 400_000)
    within_se(value, 0.0966, np.hypot(se, 5e-4))


# --------------------------------------------------------------------------------------------------
# Mutants: a check that a broken flow passes is no check


class _NoLogDetSigma(ConditionalGaussian):
    def log_prob(self, y: Tensor, x: Tensor) -> Tensor:
        return super().log_prob(y, x) - self.parts(x)[1].sum(-1)


class _FlippedS(PLULinear):
    def log_abs_det(self) -> Tensor:
        return -super().log_abs_det()


class _HalvedS(PLULinear):
    def log_abs_det(self) -> Tensor:
        return 0.5 * super().log_abs_det()


@pytest.mark.parametrize("mutant", [_NoLogDetSigma, _FlippedS, _HalvedS])
def test_mutants_of_j_r_are_caught(mutant: type[nn.Module]) -> None:
    flow, energy = redundant(scale=0.1), Gaussian(0.5, scale=1.5, dtype=F64)
    with torch.no_grad():  # determinants far from 1
        flow.linear.log_diagonal.fill_(-0.6)
        flow.conditional.net[-1].bias[1] += 0.5  # type: ignore[union-attr, index, operator]
    check_j_r(flow, energy)
    (flow.conditional if mutant is _NoLogDetSigma else flow.linear).__class__ = mutant  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="J_R"):
        check_j_r(flow, energy)


class _NotDetached(NICE):
    def forward_and_path_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xy, log_q = self.forward_and_log_prob(z)
        return xy, log_q, self.log_prob(xy)


class _Uncarried(AdditiveCoupling):
    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.with_log_det(z), score


def test_mutant_stl_that_does_not_carry_the_score_is_caught() -> None:
    flow = stirred(NICE(2, num_layers=2, hidden_sizes=(8,), dtype=F64), scale=0.15)
    check_stl_has_no_noise_at_the_optimum(flow)
    flow.transform.parts[0].__class__ = _Uncarried
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)


def test_mutant_stl_without_detached_parameters_is_caught() -> None:
    flow = stirred(_NotDetached(2, num_layers=2, hidden_sizes=(8,), dtype=F64), scale=0.15)
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)


class _NotCopied(Flow):
    def path_log_prob(self, xy: Tensor) -> Tensor:
        with frozen(self):
            return self.log_prob(xy)


def test_mutant_stl_through_a_cached_inverse_is_caught() -> None:
    flow = cached_affine()
    flow.__class__ = _NotCopied
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)


def test_after_a_training_the_temperature_is_that_of_the_energy() -> None:
    """Whether it ended or was left early."""
    objective = ReverseKL(DoubleWell(), num_samples=8, beta_start=0.1, anneal=1.0)
    fit(RedundantNICE(1, 2), objective, num_steps=5)
    assert objective.beta == 1.0
    for step in fit_steps(RedundantNICE(1, 2), objective, num_steps=5):
        assert objective.beta < 1.0
        if step.number == 2:
            break
    assert objective.beta == 1.0
