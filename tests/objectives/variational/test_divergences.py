"""Forward KL and log-variance against closed forms; compressed energies."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lib.checks import within_se
from lib.reseed import problem_generator
from lib.seeds import seeded
from pyro.distributions.transforms import affine_coupling
from torch import Tensor, nn

from pyroebm import HMC, Energy
from pyroebm.core import LogRegularized, value_and_grad
from pyroebm.core.wrappers import check_weighable
from pyroebm.flows import NICE, Flow, MixtureBase, RedundantNICE, importance_sample
from pyroebm.kernels import IndependenceMetropolis, LocalGlobalMixture
from pyroebm.objectives import (
    AlphaBootstrap,
    AnnealedReweighting,
    FlowObjective,
    ForwardKL,
    LogVariance,
    ReverseKL,
    estimate_augmented_kl,
)
from pyroebm.partition import ais, bridge, quadrature, smc
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture
from pyroebm.training import fit

pytestmark = pytest.mark.usefixtures("float64")


def stirred(flow: Flow, scale: float = 0.2) -> Flow:
    generator = problem_generator(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return flow


def gradient(loss: Tensor, flow: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for g, p in zip(grads, flow.parameters(), strict=True)
        ]
    )


def many(objective: FlowObjective, flow: Flow, batches: int) -> Tensor:
    """Gradients of so many losses."""
    generator = seeded(0)
    return torch.stack(
        [gradient(objective(flow, generator=generator)[0], flow) for _ in range(batches)]
    )


TARGET = Gaussian([0.5, -0.5], covariance=[[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)


def linear(dim: int = 2) -> NICE:
    return NICE(dim, num_layers=0)


# What every objective of a flow does, from a constructor that is given the energy, draws of it and
# a number of samples

OBJECTIVES: dict[str, Callable[[Energy, Tensor, int], FlowObjective]] = {
    "reverse": lambda energy, draws, n: ReverseKL(energy, n),
    "reverse_total": lambda energy, draws, n: ReverseKL(energy, n, gradient="total"),
    "forward": lambda energy, draws, n: ForwardKL(draws, num_samples=n),
    "log_variance": lambda energy, draws, n: LogVariance(energy, num_samples=n),
    "log_variance_off_policy": lambda energy, draws, n: LogVariance(energy, draws, num_samples=n),
    "alpha_bootstrap": lambda energy, draws, n: AlphaBootstrap(
        energy, n, num_temperatures=2, reuse=2
    ),
    "annealed_reweighting": lambda energy, draws, n: AnnealedReweighting(
        energy, n, buffer_size=200, reuse=2
    ),
}
EVERY_OBJECTIVE = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


@EVERY_OBJECTIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 2)])
def test_every_objective_trains_on_events_of_any_shape(
    make: Callable[..., FlowObjective], shape: tuple[int, ...], dtype
) -> None:
    energy = Gaussian(torch.ones(shape, dtype=dtype))
    dim = math.prod(shape)
    for flow in (
        NICE(dim, hidden_sizes=(4,), dtype=dtype),
        RedundantNICE(dim, dim + 1, hidden_sizes=(4,), dtype=dtype),
    ):
        objective = make(energy, energy.sample(500, seeded()), 500)
        loss, metrics = objective(flow, generator=seeded())
        loss.backward()
        assert loss.dtype == dtype
        assert loss.shape == ()
        # descent moves the flow to its target
        assert float(flow.transform.parts[-1].offset.grad[0]) < 0.0
        assert not any(metric.requires_grad for metric in metrics.values())
        assert metrics["beta"] == 1.0


@EVERY_OBJECTIVE
def test_every_objective_repeats_itself_and_goes_on_where_it_was_saved(
    make: Callable[..., FlowObjective],
) -> None:
    draws, flow = TARGET.sample(50, seeded()), stirred(NICE(2, hidden_sizes=(4,)))

    def losses(objective: FlowObjective, seeds: range) -> list[float]:
        return [float(objective(flow, generator=seeded(seed))[0].detach()) for seed in seeds]

    one, two, saved = (make(TARGET, draws, 16) for _ in range(3))
    assert losses(one, range(3)) == losses(two, range(3))
    saved.load_state_dict(one.state_dict())
    assert losses(saved, range(3, 6)) == losses(one, range(3, 6)) != losses(two, range(6, 9))


def test_the_best_linear_flow_on_draws_has_their_covariance() -> None:
    draws = TARGET.sample(2000, seeded())
    flow = linear()
    fit(flow, ForwardKL(draws, num_samples=500), num_steps=400, lr=0.05, seed=1)
    matrix = flow.linear.matrix().detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.cov(draws.T), atol=0.08, rtol=0)
    held = ForwardKL(draws, num_samples=20_000)(flow, generator=seeded(2))[1]
    best = float(
        torch.distributions.MultivariateNormal(draws.mean(0), torch.cov(draws.T))
        .log_prob(draws)
        .mean()
    )
    assert (
        best - 5 * float(held["standard_error"]) - 0.01
        < float(held["log_q"])
        < best + 5 * float(held["standard_error"])
    )


@pytest.mark.parametrize(
    "make",
    [linear, lambda: stirred(NICE(2, num_layers=2, hidden_sizes=(8,)))],
    ids=["linear", "nice"],
)
def test_path_gradients_have_the_mean_of_the_total_ones(make: object) -> None:
    """On fresh draws of the target; the batch is drawn from 200,000 of them."""
    flow: Flow = make()  # type: ignore[operator]
    draws = TARGET.sample(200_000, seeded(3))
    total, path = (
        many(ForwardKL(draws, energy=TARGET, num_samples=1000, gradient=kind), flow, 40)
        for kind in ("total", "path")
    )
    se = (total.var(0) / 40 + path.var(0) / 40).sqrt()
    moving = se > 1e-9
    assert int(moving.sum()) > 2
    within_se(path.mean(0)[moving], total.mean(0)[moving], se[moving])


def test_path_gradients_reach_a_learned_base() -> None:
    base = MixtureBase(2, 3, learn_weights=True, dtype=torch.float64)
    flow, draws = (
        stirred(NICE(2, num_layers=1, hidden_sizes=(4,), base=base)),
        TARGET.sample(20_000, seeded()),
    )
    total, path = (
        many(ForwardKL(draws, energy=TARGET, num_samples=1000, gradient=kind), flow, 20)
        for kind in ("total", "path")
    )
    se = (total.var(0) / 20 + path.var(0) / 20).sqrt()
    within_se(path.mean(0), total.mean(0), se.clamp(min=1e-9))


def test_path_gradients_have_no_noise_at_the_optimum() -> None:
    flow = linear()
    energy = Gaussian(torch.zeros(2))
    draws = energy.sample(500, seeded())
    path = ForwardKL(draws, energy=energy, num_samples=100, gradient="path")
    assert float(many(path, flow, 3).abs().max()) < 1e-12
    assert float(many(ForwardKL(draws, num_samples=100), flow, 3).abs().max()) > 1e-2


def test_path_gradients_through_transforms_that_cache() -> None:
    flow = Flow([affine_coupling(2, hidden_dims=[8])], 2, 2).double()
    for transform in flow.transform.parts:
        transform._cache_size = 1
    draws = TARGET.sample(100_000, seeded(3))
    total, path = (
        many(ForwardKL(draws, energy=TARGET, num_samples=1000, gradient=kind), flow, 30)
        for kind in ("total", "path")
    )
    se = (total.var(0) / 30 + path.var(0) / 30).sqrt()
    moving = se > 1e-9
    within_se(path.mean(0)[moving], total.mean(0)[moving], se[moving])


def test_weights_choose_the_draws() -> None:
    draws = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    weights = torch.tensor([0.2, 0.0, 0.8])
    objective = ForwardKL(draws, weights.log() + 7.0, num_samples=40_000)
    loss, metrics = objective(linear(), generator=seeded())
    expected = -math.log(2 * math.pi) - 0.5 * (0.2 * 1.0 + 0.8 * 4.0)
    within_se(-loss.detach(), expected, metrics["standard_error"])
    with pytest.raises(AssertionError, match="standard errors"):  # mutant: all alike
        within_se(
            -ForwardKL(draws, num_samples=40_000)(linear(), generator=seeded())[0].detach(),
            expected,
            metrics["standard_error"],
        )


def test_redundant_latents_enter_forward_kl_as_they_should() -> None:
    """For a flow whose y is independent of x and the standard normal, the loss is that of x
    alone."""
    wide, plain = RedundantNICE(2, 3, num_layers=0), linear()
    draws = TARGET.sample(5000, seeded())
    objective = ForwardKL(draws, num_samples=5000)
    found, metrics = objective(wide, generator=seeded(1))
    assert float(found.detach()) == pytest.approx(
        float(objective(plain, generator=seeded(1))[0].detach())
    )
    assert float(metrics["standard_error"]) > 0


def test_forward_kl_finds_both_modes_and_reverse_kl_need_not() -> None:
    energy = GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scale=0.7, weights=[0.8, 0.2])
    flow = RedundantNICE(2, 3, num_layers=6, hidden_sizes=(32, 32))
    objective = ForwardKL(energy.sample(4000, seeded()), num_samples=256)
    fit(flow, objective, num_steps=400, lr=5e-3, seed=0)
    x = flow.forward_and_log_prob(flow.rsample_base(20_000, seeded(1)))[0][:, :2].detach()
    assert float((energy.mode_of(x) == 1).double().mean()) == pytest.approx(0.2, abs=0.06)


# The variance of the log weights


def test_log_variance_is_half_the_variance_of_the_log_weights() -> None:
    flow, energy = stirred(NICE(2, num_layers=2, hidden_sizes=(8,))), TARGET
    loss, metrics = LogVariance(energy, num_samples=4000)(flow, generator=seeded())
    z = flow.rsample_base(4000, seeded())
    x, log_q = flow.forward_and_log_prob(z)
    log_weights = -energy(x) - log_q
    assert float(loss.detach()) == pytest.approx(0.5 * float(log_weights.detach().var()))
    assert float(metrics["negative_elbo"]) == pytest.approx(-float(log_weights.detach().mean()))


def test_on_policy_its_gradient_is_that_of_the_reverse_divergence() -> None:
    flow = stirred(NICE(2, num_layers=2, hidden_sizes=(8,)))
    ours, reverse = (
        many(objective, flow, 60)
        for objective in (
            LogVariance(TARGET, num_samples=500),
            ReverseKL(TARGET, 500, gradient="total"),
        )
    )
    se = (ours.var(0) / 60 + reverse.var(0) / 60).sqrt()
    moving = se > 1e-9
    within_se(ours.mean(0)[moving], reverse.mean(0)[moving], se[moving])


@pytest.mark.parametrize("draws", [None, torch.randn(50, 2, generator=seeded()) * 5.0])
def test_it_has_neither_noise_nor_slope_at_the_optimum(draws: Tensor | None) -> None:
    flow, energy = linear(), Gaussian(torch.zeros(2))
    objective = LogVariance(energy, draws, num_samples=100)
    assert float(many(objective, flow, 3).abs().max()) < 1e-12


def test_off_policy_it_sees_the_mode_that_the_flow_has_not_found() -> None:
    energy = GaussianMixture([[-6.0, 0.0], [6.0, 0.0]], scale=1.0)
    flow = linear()
    with torch.no_grad():
        # one of the two modes, exactly
        flow.transform.parts[-1].offset.copy_(torch.tensor([-6.0, 0.0]))
    blind, seeing = (
        LogVariance(energy, draws, num_samples=200)
        for draws in (None, energy.sample(1000, seeded()))
    )
    assert float(blind(flow, generator=seeded(1))[0].detach()) < 1e-6
    assert float(seeing(flow, generator=seeded(1))[0].detach()) > 1.0


def test_objectives_are_saved_with_their_draws() -> None:
    draws = torch.randn(10, 2, generator=seeded())
    one, two = ForwardKL(draws), ForwardKL(torch.zeros(10, 2))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.draws, draws)
    assert list(LogVariance(TARGET, draws).state_dict()) == ["draws"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: ForwardKL(torch.zeros(3, 2), gradient="best"),
            "gradient must be 'total' or 'path', got gradient='best'",
        ),
        (lambda: ForwardKL(torch.full((3, 2), math.nan)), "draws must have .* finite entries"),
        (
            lambda: ForwardKL(torch.zeros(3, 2), torch.zeros(2)),
            r"log_weights must have shape \(3,\)",
        ),
        (lambda: ForwardKL(torch.zeros(3, 2), torch.full((3,), -math.inf)), "a finite maximum"),
        (lambda: LogVariance(TARGET, torch.zeros(0, 2)), "draws must have"),
        (
            lambda: ForwardKL(torch.zeros(3, 2), num_samples=1),
            "num_samples must be an integer of at least 2",
        ),
        (
            lambda: LogVariance(TARGET, num_samples=3),
            "num_samples must be an integer of at least 4",
        ),
        (
            lambda: ForwardKL(torch.zeros(3, 2), energy=TARGET, gradient="path")(
                RedundantNICE(2, 3)
            ),
            "must have a flow with D = d",
        ),
        (
            lambda: ForwardKL(torch.zeros(3, 2), gradient="path"),
            "energy must be given for gradient='path'",
        ),
        (
            lambda: ForwardKL(torch.zeros(3, 2))(linear(3)),
            r"as many entries as the flow's dim=3, got draws of shape \(3, 2\)",
        ),
        (
            lambda: ForwardKL(torch.zeros(3, 2)).energy,
            "ForwardKL has no energy: give energy=",
        ),
        (lambda: LogRegularized(TARGET, math.inf), "height must be finite, got height=inf"),
    ],
)
def test_refusals(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


# Log-regularized energies


def test_compressed_above_its_height_alone() -> None:
    inner = DoubleWell()
    energy = LogRegularized(inner, 3.0)
    x = torch.linspace(-4.0, 4.0, 81)
    values, grad = value_and_grad(energy, x)
    truth, slope = value_and_grad(inner, x)
    below = truth <= 3.0
    assert torch.equal(values[below], truth[below])
    assert torch.equal(grad[below], slope[below])
    torch.testing.assert_close(values[~below], 3.0 + torch.log1p(truth[~below] - 3.0))
    torch.testing.assert_close(grad[~below], slope[~below] / (truth[~below] - 2.0))
    assert LogRegularized(inner, 3.0)(torch.tensor([math.nan, math.inf]))[0].isnan()
    assert energy.log_z is None


def test_no_weight_is_made_of_a_compressed_energy() -> None:
    energy = LogRegularized(DoubleWell(), 3.0)
    check_weighable(DoubleWell())
    for hidden in (energy, 0.5 * energy):
        with pytest.raises(ValueError, match="must not be LogRegularized"):
            importance_sample(RedundantNICE(1, 2), hidden, 100)
    flow, vector = NICE(2), LogRegularized(Gaussian(torch.zeros(2)), 3.0)
    x, base = torch.zeros(4, 2), Gaussian(torch.zeros(2))
    for made in (
        lambda: ais(vector, base),
        lambda: smc(vector, base),
        lambda: bridge(vector, base, draws=torch.zeros(10, 2)),
        lambda: quadrature(energy),
        lambda: estimate_augmented_kl(flow, vector, 100, log_z=0.0),
        lambda: IndependenceMetropolis(flow).init(vector, x),
        lambda: LocalGlobalMixture(HMC(), flow).init(vector, x),
        lambda: AlphaBootstrap(vector),
        lambda: AnnealedReweighting(vector),
    ):
        with pytest.raises(ValueError, match="must not be LogRegularized"):
            made()
