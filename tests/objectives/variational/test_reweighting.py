"""Annealed reweighting: its gradient against quadrature, its temperatures against closed forms,
buffer, modes it must keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from lib.checks import within_se
from lib.flow_cases import normal_flow
from lib.seeds import seeded
from torch import Tensor

from pyroebm import Energy
from pyroebm.core import LogRegularized
from pyroebm.flows import NICE, Flow, RealNVP, RedundantNICE, importance_sample
from pyroebm.objectives import AlphaBootstrap, AnnealedReweighting, FlowObjective
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture
from pyroebm.training import History, fit

pytestmark = pytest.mark.usefixtures("float64")


def slope(loss: Tensor, flow: NICE) -> Tensor:
    """In log s and the mean."""
    return torch.cat(
        torch.autograd.grad(loss, [flow.linear.log_diagonal, flow.transform.parts[-1].offset])
    )


class Walled(Energy):
    """The standard normal below 1, with what is given above."""

    event_shape = (1,)

    def __init__(self, above: float) -> None:
        super().__init__((1,))
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(-1)
        return torch.where(x < 1.0, 0.5 * x**2, self.above)


def at(beta: float, objective: AnnealedReweighting) -> AnnealedReweighting:
    objective.beta = beta
    return objective


def last(history: History) -> dict[str, float]:
    return {name: float(values[-1]) for name, values in history.items()}


# The gradient


def check_gradient(objective: type[AnnealedReweighting], energy: Energy, beta: float) -> None:
    """That of the forward divergence at beta, by quadrature; the ratio of sums is biased by 1 /
    buffer_size."""
    flow = normal_flow()
    generator = seeded(1)
    found = []
    for _ in range(40):
        loss, metrics = at(beta, objective(energy, 2000, min_ess=0.2, buffer_size=20_000, reuse=1))(
            flow, generator=generator
        )
        assert float(metrics["tempering"]) == 1.0
        found.append(slope(loss, flow))
    grid = torch.linspace(-9.0, 9.0, 4001)
    mean = (torch.softmax(-beta * energy(grid), 0) * flow.log_prob(grid.unsqueeze(1))).sum()
    gradients = torch.stack(found)
    within_se(gradients.mean(0), slope(-mean, flow), gradients.std(0) / math.sqrt(40))


TARGETS = [
    (Gaussian(0.5, scale=0.8, dtype=torch.float64), 0.7),
    (DoubleWell(dtype=torch.float64), 0.5),
]


@pytest.mark.parametrize(("energy", "beta"), TARGETS)
def test_its_gradient_is_that_of_the_forward_divergence(energy: Energy, beta: float) -> None:
    check_gradient(AnnealedReweighting, energy, beta)


class _NoDensity(AnnealedReweighting):
    def _draw(self, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        x, energies, log_ratio = super()._draw(*args)  # type: ignore[arg-type]
        return x, energies, torch.zeros_like(log_ratio)


class _Twice(AnnealedReweighting):
    def _draw(self, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        x, energies, log_ratio = super()._draw(*args)  # type: ignore[arg-type]
        return x, 2.0 * energies, 2.0 * log_ratio


class _OldBeta(AnnealedReweighting):
    def _refresh(self, flow: Flow, beta: float, generator: torch.Generator | None) -> object:
        return super()._refresh(flow, 0.8 * beta, generator)


@pytest.mark.parametrize("mutant", [_NoDensity, _Twice, _OldBeta])
def test_mutants_of_the_weights_are_caught(mutant: type[AnnealedReweighting]) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_gradient(mutant, *TARGETS[0])


def test_at_the_optimum_all_weights_are_one_and_the_mean_gradient_is_zero() -> None:
    flow = normal_flow(0.5, 0.8)
    energy = TARGETS[0][0]
    generator = seeded()
    found = []
    for _ in range(60):
        loss, metrics = AnnealedReweighting(energy, 500, reuse=1)(flow, generator=generator)
        assert float(metrics["ess_fraction"]) == pytest.approx(1.0)
        found.append(slope(loss, flow))
    gradients = torch.stack(found)
    within_se(gradients.mean(0), torch.zeros(2), gradients.std(0) / math.sqrt(60))


def test_redundant_latents_are_weighed_as_importance_sampling_weighs_them() -> None:
    flow = RedundantNICE(1, 3, hidden_sizes=(8,))
    energy = DoubleWell()
    generator = seeded(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    x, energies, log_ratio = AnnealedReweighting(energy, buffer_size=500)._draw(flow, seeded())
    weighted = importance_sample(flow, 0.3 * energy, 500, generator=seeded())
    torch.testing.assert_close(log_ratio - 0.3 * energies, weighted.log_weights)
    assert torch.equal(x, weighted.x)
    loss, _ = AnnealedReweighting(energy, 100, buffer_size=500)(flow, generator=seeded())
    loss.backward()
    # those of N(y | M, Sigma) among them
    assert all(parameter.grad is not None for parameter in flow.parameters())


# The temperature


def test_temperature_and_tempering_against_closed_forms() -> None:
    """Of a = beta - 1 the weights exp(-a x^2 / 2) of normal draws have the effective sample size
    sqrt(1 + 2 a) / (1 + a)."""
    flow, energy = NICE(1), Gaussian(torch.zeros(1))
    farthest = (1.0 + math.sqrt(1.0 - 0.3**2)) / 0.3**2  # 1 + a where it is 0.3
    objective = AnnealedReweighting(energy, 2, min_ess=0.3, buffer_size=100_000, reuse=1)
    for beta, reached in ((1.0, 1.0), (5.0, 5.0), (100.0, farthest)):
        _, metrics = at(beta, objective)(flow, generator=seeded())
        assert float(metrics["reached_beta"]) == pytest.approx(reached, rel=0.03)
        assert float(metrics["ess_fraction"]) == pytest.approx(
            math.sqrt(2.0 * reached - 1.0) / reached, rel=0.03
        )
        assert float(metrics["tempering"]) == 1.0
    assert int(metrics["evaluations"]) == 300_000
    objective = AnnealedReweighting(energy, 2, min_ess=0.3, buffer_size=100_000)
    _, metrics = at(100.0, objective)(flow, generator=seeded())
    assert float(metrics["reached_beta"]) == 100.0  # it starts where it is told
    assert float(metrics["tempering"]) == pytest.approx((farthest - 1.0) / 99.0, rel=0.03)
    assert float(metrics["ess_fraction"]) == pytest.approx(math.sqrt(199.0) / 100.0, rel=0.05)


def test_draws_of_weight_0_count_against_the_effective_sample_size() -> None:
    """Of N(2, 1) a share of 0.16 is below the wall, the bound of what any tempering has: nothing is
    reached."""
    flow = normal_flow(2.0, 1.0)
    energy = Walled(math.inf)
    share = 0.5 * math.erfc(1.0 / math.sqrt(2.0))
    objective = AnnealedReweighting(energy, 2, min_ess=0.3, buffer_size=10_000)
    _, metrics = objective(flow, generator=seeded())
    assert float(metrics["tempering"]) == 0.0
    assert objective.fitted is not None
    within_se(
        len(objective.fitted.draws) / 10_000, share, math.sqrt(share * (1.0 - share) / 10_000)
    )
    objective = AnnealedReweighting(energy, 2, min_ess=0.5 * share, buffer_size=10_000)
    _, metrics = objective(flow, generator=seeded())
    # as far as half of the possible draws, not half of all
    assert 0.0 < float(metrics["tempering"]) < 1.0


@pytest.mark.parametrize("make", [AnnealedReweighting, AlphaBootstrap])
def test_another_flow_gets_draws_of_its_own(make: type[FlowObjective]) -> None:
    energy, asked = Gaussian(torch.full((2,), 5.0)), [0]
    energy.register_forward_hook(
        lambda module, inputs, values: asked.__setitem__(0, asked[0] + values.numel())
    )
    first, second = NICE(2), NICE(2)
    objective = make(energy, 50)
    counts = []
    for flow in (first, second, second, first):
        before = asked[0]
        objective(flow, generator=seeded())
        counts.append(asked[0] - before)
    assert [count > 0 for count in counts] == [True, True, False, True]


def test_the_temperature_is_bounded_by_that_of_the_step_and_stays_between_refreshes() -> None:
    flow = NICE(1)
    energy = Gaussian(torch.zeros(1))
    objective = AnnealedReweighting(energy, 2, reuse=2)
    reached = []
    for beta in (0.5, 1.0, 0.8, 0.9, 0.6, 1.0):
        _, metrics = at(beta, objective)(flow, generator=seeded())
        reached.append(float(metrics["reached_beta"]))
    assert reached == [0.5, 0.5, 0.8, 0.8, 0.6, 0.6]
    assert int(metrics["evaluations"]) == 3 * objective.buffer_size


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_a_linear_flow_becomes_the_gaussian_of_the_temperature(beta: float) -> None:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    energy = Gaussian([0.5, -0.5], covariance=covariance)
    flow = NICE(2, num_layers=0)
    # the schedule ends at 1: the energy is that of the temperature
    objective = AnnealedReweighting(beta * energy, 500, beta_start=0.3)
    metrics = last(fit(flow, objective, num_steps=250, lr=0.05, seed=1))
    assert (metrics["reached_beta"], metrics["tempering"]) == (1.0, 1.0)
    assert metrics["ess_fraction"] > 0.99
    matrix = flow.linear.matrix().detach()
    # its error over 12 seeds, at both temperatures in units of the variance at 1
    error = torch.tensor([[0.019, 0.013], [0.013, 0.014]]) / beta
    within_se(matrix @ matrix.T, covariance / beta, error)


def test_a_flow_that_cannot_carry_the_target_says_at_which_temperature_it_stays() -> None:
    energy = GaussianMixture([[-6.0, 0.0], [6.0, 0.0]], scale=0.4)
    flow = RealNVP(2, num_layers=0, scale=4.0)
    objective = AnnealedReweighting(energy, 200, beta_start=0.01)
    metrics = last(fit(flow, objective, num_steps=300, lr=0.02))
    assert metrics["beta"] == 1.0
    assert 0.01 < metrics["reached_beta"] < 0.5
    assert metrics["tempering"] <= 1.0
    assert metrics["ess_fraction"] < 0.4


def test_it_keeps_a_small_mode() -> None:
    """Over 100 seeds of so short a run the mass is .203, with a standard deviation of .031; by the
    reverse divergence, from the same high temperature, it is anything from 0 to 1."""
    energy = GaussianMixture([[-6.0, 0.0], [6.0, 0.0]], scale=0.5, weights=[0.8, 0.2])
    masses = []
    for seed in range(12):
        flow, objective = (
            RealNVP(
                2,
                num_layers=4,
                hidden_sizes=(32,),
                scale=3.0,
                generator=torch.Generator().manual_seed(seed),
            ),
            AnnealedReweighting(energy, 256, buffer_size=2048, beta_start=0.02),
        )
        fit(flow, objective, num_steps=300, lr=5e-3, seed=seed)
        x = flow.forward_and_log_prob(flow.rsample_base(20_000, seeded(seed)))[0].detach()
        masses.append((energy.mode_of(x) == 1).double().mean())
    mass = torch.stack(masses)
    within_se(mass.mean(), 0.2, mass.std() / 12**0.5)
    assert mass.std() < 0.07


# The buffer


def test_the_buffer_is_kept_saved_and_taken_back() -> None:
    flow, energy = RedundantNICE(1, 2, hidden_sizes=(8,)), DoubleWell()
    objective, fresh = (
        AnnealedReweighting(energy, 50, buffer_size=300, reuse=3),
        AnnealedReweighting(energy, 50, buffer_size=300, reuse=3),
    )
    start = objective.state_dict()
    for seed in range(4):
        at(0.3, objective)(flow, generator=seeded(seed))
    fresh.load_state_dict(objective.state_dict())
    for seed in range(4):  # over a refresh
        one, two = (at(0.6, o)(flow, generator=seeded(seed)) for o in (objective, fresh))
        assert torch.equal(one[0], two[0])
        assert one[1] == two[1]
    fresh.load_state_dict(
        {name: value for name, value in start.items() if not name.startswith("fitted")}
    )
    assert fresh.fitted is None


def test_a_run_of_one_seed_repeats_itself_and_of_another_does_not() -> None:
    losses = []
    for seed in (0, 0, 1):
        flow = NICE(2, num_layers=2, hidden_sizes=(8,), generator=seeded())
        objective = AnnealedReweighting(Gaussian([1.0, 0.0]), 64, reuse=2)
        losses.append(fit(flow, objective, num_steps=5, seed=seed)["loss"].tolist())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2)])
def test_events_of_any_shape_in_either_precision(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    flow, energy = (
        RedundantNICE(d := math.prod(shape), d + 1, dtype=dtype),
        Gaussian(torch.ones(shape, dtype=dtype)),
    )
    objective = at(0.5, AnnealedReweighting(energy, 32, reuse=2))
    for _ in itertools.repeat(None, 3):
        loss, metrics = objective(flow, generator=seeded())
        assert loss.dtype == dtype
        assert not any(metric.requires_grad for metric in metrics.values())
    assert objective.fitted is not None
    assert objective.fitted.draws.shape[1:] == shape


def test_draws_of_infinite_energy_have_no_weight() -> None:
    objective = AnnealedReweighting(Walled(math.inf), buffer_size=20_000)
    loss, metrics = objective(NICE(1), generator=seeded())
    assert torch.isfinite(loss)
    assert objective.fitted is not None
    assert float(objective.fitted.draws.max()) < 1.0
    share = 0.5 * (1.0 + math.erf(math.sqrt(0.5)))  # below 1 all weights are alike
    within_se(metrics["ess_fraction"], share, math.sqrt(share * (1.0 - share) / 20_000))


@pytest.mark.parametrize("above", [math.nan, -math.inf])
def test_a_weight_that_is_no_number_is_said(above: float) -> None:
    with pytest.raises(
        FloatingPointError,
        match=r"of buffer_size=100 draws of the flow \d+ have a weight that is NaN or infinite",
    ):
        AnnealedReweighting(Walled(above), buffer_size=100)(NICE(1), generator=seeded())
    with pytest.raises(FloatingPointError, match="100 have weight 0, since their energy"):
        AnnealedReweighting(Walled(math.inf), buffer_size=100)(
            normal_flow(50.0, 1.0), generator=seeded()
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: AnnealedReweighting(DoubleWell(), min_ess=0.0),
            r"min_ess must be in \(0, 1\), got min_ess=0.0",
        ),
        (
            lambda: AnnealedReweighting(DoubleWell(), min_ess=math.nan),
            r"min_ess must be in \(0, 1\), got min_ess=nan",
        ),
        (
            lambda: AnnealedReweighting(DoubleWell(), buffer_size=1),
            "buffer_size must be an integer of at least 2, got buffer_size=1",
        ),
        (
            lambda: AnnealedReweighting(DoubleWell(), reuse=0),
            "reuse must be an integer of at least 1, got reuse=0",
        ),
        (
            lambda: AnnealedReweighting(DoubleWell())(NICE(2)),
            "energy must have events of dim=2 entries",
        ),
        (
            lambda: AnnealedReweighting(0.5 * LogRegularized(DoubleWell(), 3.0)),
            "energy must not be LogRegularized",
        ),
    ],
)
def test_refusals(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
