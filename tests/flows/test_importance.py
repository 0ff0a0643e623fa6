"""Importance sampling: unbiased, standard errors calibrated, diagnostics against known cases, and
what they cannot see."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.reseed import fixed_problem, problem_generator
from torch import Tensor
from torch.distributions import constraints

from pyroebm import Boltzmann, Energy
from pyroebm.core import Unnormalized
from pyroebm.core import statistics as weights
from pyroebm.core.rng import seeded_generator
from pyroebm.core.statistics import log_mean, pareto_k
from pyroebm.flows import NICE, ImportanceResult, RedundantNICE, importance_sample
from pyroebm.flows.importance import _summary
from pyroebm.partition.result import from_weights
from pyroebm.targets import DoubleWell, Exponential, Gaussian

F64 = torch.float64


def stirred_flow(dim: int = 1, total_dim: int = 2, scale: float = 0.05) -> RedundantNICE:
    """Near the identity, and the same for every seed: further off, weights have no variance."""
    with fixed_problem():
        flow = RedundantNICE(dim, total_dim, num_layers=2, hidden_sizes=(8,), dtype=F64)
    generator = problem_generator(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, dtype=F64, generator=generator)
    return flow


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def normal(mean: float, scale: float) -> dist.Normal:
    return dist.Normal(number(mean), number(scale))


def check_unbiased_and_calibrated(weigh: object, energy: Energy, repeats: int = 200) -> None:
    """Over repetitions: the mean weight is C, and errors are of the size that the standard errors
    say."""
    results = [
        importance_sample(weigh, energy, 400, generator=torch.Generator().manual_seed(seed))
        for seed in range(repeats)
    ]  # type: ignore[arg-type]
    assert energy.log_z is not None
    z = np.exp([r.log_z.value - energy.log_z for r in results])
    mean, se = mean_and_se(z)
    within_se(mean, 1.0, se, what="mean of C")
    scores = [(r.log_z.value - energy.log_z) / r.log_z.standard_error for r in results]
    within_se(*_spread(scores), what="spread of log C")
    truth = energy.mean  # type: ignore[attr-defined]
    values = [r.expectation(lambda x: x) for r in results]
    scores = np.concatenate([((v - truth) / e).reshape(-1).numpy() for v, e in values])
    within_se(*_spread(scores), what="spread of E[x]")


def test_there_is_no_error_bar_where_a_few_weights_decide() -> None:
    """Of log-normal weights: with a deviation of 3 nats the delta method is off by more than 5 of
    its errors, again and again."""
    noise = torch.randn(400, 1000, dtype=F64, generator=torch.Generator().manual_seed(0))
    for deviation, honest in ((0.5, True), (3.0, False)):
        found = [log_mean(deviation * row) for row in noise]
        assert all(math.isfinite(each.standard_error) is honest for each in found)
        errors = [
            math.sqrt((len(noise[0]) / each.ess - 1.0) / (len(noise[0]) - 1)) for each in found
        ]
        off = np.array([each.value - 0.5 * deviation**2 for each in found]) / errors
        assert (np.abs(off) < 5.0).all() == honest
        if honest:
            assert [each.standard_error for each in found] == pytest.approx(errors)
            within_se(*_spread(off))


def test_mutant_error_bars_of_a_few_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "too_few", lambda ess, n: False)
    with pytest.raises(AssertionError):
        test_there_is_no_error_bar_where_a_few_weights_decide()


def test_every_error_of_a_few_weights_is_infinite() -> None:
    uneven = torch.linspace(0.0, 40.0, 100, dtype=F64)
    result = _summary(torch.arange(100.0), uneven)
    assert result.log_z.standard_error == math.inf
    assert float(result.expectation(lambda x: x)[1]) == math.inf
    assert "+- inf (AIS" in str(from_weights(uneven, 0.0, "lower", "AIS"))


def _spread(scores: object) -> tuple[float, float, float]:
    scores = np.asarray(scores)
    return float((scores**2).mean()), 1.0, float((scores**2).std() / math.sqrt(len(scores)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3), (2, 2), (2, 4)])
def test_flow_weights_are_unbiased_and_errors_calibrated(shape: tuple[int, int]) -> None:
    check_unbiased_and_calibrated(
        stirred_flow(*shape), Gaussian([0.3, -0.2][: shape[0]], scale=0.8, dtype=F64)
    )


def test_distribution_weights_are_unbiased_and_errors_calibrated() -> None:
    check_unbiased_and_calibrated(normal(0.0, 1.2), Gaussian(0.3, dtype=F64))


class _WithoutDeterminant(RedundantNICE):
    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        xy, log_q = super().forward_and_log_prob(z)
        return xy, log_q + 0.5 * self.log_abs_det()  # half of the determinant forgotten


def test_mutant_that_halves_the_determinant_is_caught() -> None:
    flow, energy = stirred_flow(), Gaussian([0.3], scale=0.8, dtype=F64)
    with torch.no_grad():
        flow.linear.log_diagonal += 0.2
    check_unbiased_and_calibrated(flow, energy, repeats=50)
    flow.__class__ = _WithoutDeterminant
    with pytest.raises(AssertionError, match="mean of C"):
        check_unbiased_and_calibrated(flow, energy, repeats=50)


def test_weight_is_the_written_formula() -> None:
    flow, energy = stirred_flow(1, 3), DoubleWell(dtype=F64)
    result = importance_sample(flow, energy, 50, generator=seeded_generator(4))
    z = flow.rsample_base(50, seeded_generator(4))
    xy = flow.forward_and_log_prob(z)[0].detach()
    assert flow.conditional is not None
    with torch.no_grad():
        conditional = flow.conditional(xy[:, :1])
        covariance = conditional.covariance_matrix
        deviation = xy[:, 1:] - conditional.mean
        quadratic = (
            deviation.unsqueeze(-2) @ torch.linalg.solve(covariance, deviation.unsqueeze(-1))
        ).reshape(-1)
        log_w = -(xy[:, 0] ** 4 - 4 * xy[:, 0] ** 2 + xy[:, 0])
        log_w += -0.5 * (torch.logdet(covariance) + quadratic + 2 * math.log(2 * math.pi))
        log_w += torch.linalg.slogdet(flow.linear.matrix()).logabsdet
        log_w += 0.5 * (z**2).sum(-1) + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(result.log_weights, log_w, rtol=1e-10, atol=1e-10)
    assert torch.equal(result.x, xy[:, 0])
    assert not result.log_weights.requires_grad


def test_summary_is_its_definition() -> None:
    x, log_w = torch.arange(4.0, dtype=F64), torch.tensor([0.0, 1.0, -math.inf, 0.5], dtype=F64)
    result, w = _summary(x, log_w), log_w.exp()
    assert result.log_z.value == pytest.approx(float(w.mean().log()))
    assert result.log_z.standard_error == pytest.approx(float(w.std() / (2 * w.mean())))
    assert result.ess == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
    assert result.ess_fraction == pytest.approx(result.ess / 4)
    mean, se = result.expectation(lambda x: torch.stack([x, x**2], dim=-1))
    expected = (w / w.sum()) @ torch.stack([x, x**2], dim=-1)
    torch.testing.assert_close(mean, expected)
    assert float(se[0]) == pytest.approx(
        float((((w / w.sum()) * (x - expected[0])) ** 2).sum().sqrt())
    )
    shifted = _summary(x, log_w + 1000.0)  # nothing overflows
    assert shifted.log_z.value == pytest.approx(result.log_z.value + 1000.0)
    assert shifted.ess == pytest.approx(result.ess)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.log_z = 0.0  # type: ignore[misc]


def test_draws_of_weight_zero_do_not_count_whatever_f_is_there() -> None:
    result = _summary(
        torch.tensor([1.0, 2.0, -1.0], dtype=F64), torch.tensor([0.0, 0.0, -math.inf], dtype=F64)
    )
    mean, se = result.expectation(torch.sqrt)  # NaN at the draw of weight 0
    assert float(mean) == pytest.approx(0.5 * (1.0 + math.sqrt(2.0)))
    assert math.isfinite(float(se))


def test_expectation_and_resample_refuse() -> None:
    result = importance_sample(normal(0.0, 1.0), Gaussian(0.0, dtype=F64), 10)
    with pytest.raises(ValueError, match=r"f must map 10 draws to as many values, got shape \(\)"):
        result.expectation(torch.sum)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got num_samples=0"):
        result.resample(0)


def test_resampled_draws_follow_the_target() -> None:
    energy = Gaussian(0.5, scale=0.7, dtype=F64)
    result = importance_sample(
        normal(0.0, 1.5), energy, 200_000, generator=torch.Generator().manual_seed(1)
    )
    draws = result.resample(20_000, seeded_generator(2))
    assert torch.equal(draws, result.resample(20_000, seeded_generator(2)))
    within_se(*_against(draws, number(0.5)))
    within_se(*_against((draws - 0.5) ** 2, number(0.49)))
    sparse = _summary(
        torch.arange(4.0, dtype=F64),
        torch.tensor([-math.inf, 0.0, -math.inf, -math.inf], dtype=F64),
    )
    assert sparse.resample(100, seeded_generator(0)).unique().tolist() == [1.0]


def _against(draws: Tensor, truth: Tensor) -> tuple[object, Tensor, object]:
    mean, se = mean_and_se(draws)
    return mean, truth, se


# --------------------------------------------------------------------------------------------------
# Diagnostics against known cases


def test_equal_weights_are_the_best_there_is() -> None:
    result = importance_sample(normal(0.0, 1.0), Gaussian(0.0, dtype=F64), 1000)
    assert result.ess_fraction == pytest.approx(1.0, abs=1e-12)
    assert result.pareto_k == -math.inf
    assert result.log_z.standard_error < 1e-12


@pytest.mark.parametrize("scale", [1.1, 1.3, 2.0])
def test_ess_of_a_wide_normal_is_known(scale: float) -> None:
    """For N(0, 1) from N(0, s^2) the weights' E[w]^2 / E[w^2] is sqrt(2 s^2 - 1) / s^2."""
    fractions = [
        importance_sample(
            normal(0.0, scale),
            Gaussian(0.0, dtype=F64),
            20_000,
            generator=torch.Generator().manual_seed(s),
        ).ess_fraction
        for s in range(30)
    ]
    truth = math.sqrt(2 * scale**2 - 1) / scale**2
    mean, se = mean_and_se(fractions)
    within_se(mean, truth, se)


@pytest.mark.parametrize("rate", [1.25, 2.0, 4.0])
def test_pareto_k_of_exponentials_is_known(rate: float) -> None:
    """For Exponential(1) from Exponential(r) the weights are exactly Pareto, with shape 1 - 1/r."""
    proposal, energy = dist.Exponential(number(rate)), Exponential(1.0, dtype=F64)
    shapes = [
        importance_sample(
            proposal, energy, MANY, generator=torch.Generator().manual_seed(s)
        ).pareto_k
        for s in range(12)
    ]
    mean, se = mean_and_se(shapes)
    within_se(mean, 1.0 - 1.0 / rate, se)


def check_pareto_k(
    estimate: Callable[[np.ndarray], float],
    shape: float,
    log_tail: Callable[[np.ndarray], np.ndarray],
) -> None:
    """``log_tail`` maps Exponential(1) to log weights whose tail has this shape."""
    rng = np.random.default_rng(5)
    mean, se = mean_and_se(
        [estimate(log_tail(rng.exponential(size=MANY)) - 700.0) for _ in range(12)]
    )
    within_se(mean, shape, se, what="k")


# a tail of 1,341 weights: the prior, 10 of shape 1/2, moves k by a quarter of the standard error
MANY = 200_000
PARETO = [(k, partial(np.multiply, k)) for k in (0.2, 0.5, 0.75, 1.5)]  # P(w > t) = t^(-1/k)
GENERALIZED = [(k, lambda e, k=k: np.log(np.expm1(k * e) / k)) for k in (-0.5, 0.2, 0.5, 0.75)]
EXPONENTIAL = [(0.0, np.log)]


@pytest.mark.parametrize(("shape", "log_tail"), [*PARETO, *GENERALIZED, *EXPONENTIAL])
def test_pareto_k_of_weights_of_known_shape(
    shape: float, log_tail: Callable[[np.ndarray], np.ndarray]
) -> None:
    check_pareto_k(pareto_k, shape, log_tail)


PARETO_MUTANTS: dict[str, Callable[[np.ndarray], float]] = {
    "the negative of the log weights": lambda logs: pareto_k(-logs),
    "square roots of the weights": lambda logs: pareto_k(0.5 * logs),
    "tail index for shape": lambda logs: 1.0 / pareto_k(logs),
}


@pytest.mark.parametrize("mutant", PARETO_MUTANTS.values(), ids=PARETO_MUTANTS)
@pytest.mark.parametrize(("shape", "log_tail"), PARETO[:3])
def test_mutants_of_pareto_k_are_caught(
    mutant: Callable[[np.ndarray], float],
    shape: float,
    log_tail: Callable[[np.ndarray], np.ndarray],
) -> None:
    with pytest.raises(AssertionError, match="k "):
        check_pareto_k(mutant, shape, log_tail)


def test_pareto_k_where_there_is_no_tail() -> None:
    normal_logs = np.random.default_rng(0).normal(size=1000)
    few = np.where(np.arange(1000) < 4, normal_logs, -np.inf)  # four weights that are not 0
    assert [pareto_k(few), pareto_k(normal_logs[:20]), pareto_k(np.minimum(normal_logs, 0.5))] == [
        math.inf
    ] * 3
    assert [pareto_k(np.zeros(1000)), pareto_k(torch.full((5,), 3.0))] == [-math.inf] * 2
    assert pareto_k(np.append(normal_logs, np.nan)) == math.inf


def test_pareto_k_takes_arrays_as_they_are() -> None:
    logs = np.random.default_rng(0).normal(size=1000)
    logs.setflags(write=False)
    tensor = torch.tensor(logs, requires_grad=True)
    assert (
        pareto_k(logs)
        == pareto_k(logs[::-1])
        == pareto_k(tensor)
        == pareto_k(tensor + 0.0)
        == pareto_k(logs.tolist())
    )


def test_ess_and_pareto_k_do_not_see_a_mode_that_no_draw_came_near() -> None:
    """A Gaussian in the left well: a good ESS, a harmless Pareto k, and a confident log Z that is
    wrong by many standard errors.

    Of a thousand draws in half of the runs at least, since the weights grow towards the barrier.
    From its draws nobody can tell. Exact draws of the target can: where the right well is, the
    proposal's density is absurd.
    """
    energy, proposal = DoubleWell(dtype=F64), normal(-1.35, 0.3)
    results = [
        importance_sample(proposal, energy, 1000, generator=torch.Generator().manual_seed(seed))
        for seed in range(41)
    ]
    right = [result.expectation(lambda x: (x > energy.barrier).double()) for result in results]
    assert np.median(right, axis=0).tolist() == [0.0, 0.0]
    assert np.median([result.ess_fraction for result in results]) > 0.85
    assert np.median([result.pareto_k for result in results]) < 0.7
    left_only = energy.log_z + math.log1p(-energy.right_mass)
    of_left, of_both = (
        [(truth - r.log_z.value) / r.log_z.standard_error for r in results]
        for truth in (left_only, energy.log_z)
    )
    assert abs(np.median(of_left)) < 1.0  # five standard errors of the median of 41 normal numbers
    assert np.median(of_both) > 4.0
    x = energy.sample(4000, seeded_generator(0))
    # log q - log p under p, which reverse KL never looks at
    forward = energy.log_z + energy(x) + proposal.log_prob(x)
    assert float(forward.mean()) < -2.0
    within_se(*_against((forward < -20.0).double(), number(energy.right_mass)))


def test_the_best_single_gaussian_for_the_double_well() -> None:
    """KL .0966; its ESS is the healthier the fewer the draws. Its Pareto k warns, of the barrier's
    foot and not of the well.

    Of a thousand draws in half of the runs at least: its weights are heavy-tailed, so that single
    runs say anything.
    """
    energy, proposal = DoubleWell(dtype=F64), normal(-1.413, 0.245)
    small = [
        importance_sample(proposal, energy, 1000, generator=torch.Generator().manual_seed(seed))
        for seed in range(41)
    ]
    ess, k, log_z = (
        np.median(values)
        for values in zip(
            *((each.ess_fraction, each.pareto_k, each.log_z.value) for each in small), strict=True
        )
    )
    assert ess > 0.9
    assert k > 0.7
    assert abs(log_z - 4.96) < 0.02
    large = importance_sample(proposal, energy, 200_000, generator=torch.Generator().manual_seed(0))
    kl, kl_se = mean_and_se(energy.log_z - large.log_weights)
    within_se(kl, 0.0966, np.hypot(kl_se, 5e-5))
    assert large.ess_fraction < ess


# --------------------------------------------------------------------------------------------------
# What is not finite, and what does not fit


class Walled(Energy):
    """A standard normal that is cut off below ``low``, with a number of our choice there."""

    def __init__(self, low: float, outside: float) -> None:
        super().__init__(())
        self.low, self.outside = low, outside

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x < self.low, self.outside, 0.5 * x**2)


def test_infinite_energy_is_a_weight_of_zero() -> None:
    energy = Walled(0.0, math.inf).double()
    result = importance_sample(
        normal(0.0, 1.0), energy, 50_000, generator=torch.Generator().manual_seed(0)
    )
    assert bool((result.log_weights[result.x < 0] == -math.inf).all())
    assert (
        abs(result.log_z.value - math.log(0.5 * math.sqrt(2 * math.pi)))
        < 5 * result.log_z.standard_error
    )
    assert result.ess_fraction == pytest.approx(float((result.x >= 0).double().mean()))
    assert bool((result.resample(100, seeded_generator(0)) >= 0).all())


@pytest.mark.parametrize(
    ("outside", "said"),
    [(math.nan, "{} are NaN and 0 are"), (-math.inf, r"0 are NaN and {} are \+inf")],
)
def test_other_weights_that_are_not_finite_raise_with_their_number(
    outside: float, said: str
) -> None:
    negative = int(
        (
            importance_sample(
                normal(0.0, 1.0),
                Gaussian(0.0, dtype=F64),
                100,
                generator=torch.Generator().manual_seed(1),
            ).x
            < 0.0
        ).sum()
    )
    with pytest.raises(FloatingPointError, match=f"of n=100 log weights {said.format(negative)}"):
        importance_sample(
            normal(0.0, 1.0),
            Walled(0.0, outside).double(),
            100,
            generator=torch.Generator().manual_seed(1),
        )


def test_weights_that_are_all_zero_raise() -> None:
    with pytest.raises(FloatingPointError, match="all n=100 weights are 0"):
        importance_sample(normal(0.0, 1.0), Walled(100.0, math.inf).double(), 100)


def test_refusals() -> None:
    energy = Gaussian([0.0, 0.0], dtype=F64)
    with pytest.raises(
        ValueError, match="num_samples must be an integer of at least 1, got num_samples=0"
    ):
        importance_sample(NICE(2, dtype=F64), energy, 0)
    with pytest.raises(
        ValueError,
        match=r"event_shape \(2,\), got batch_shape \(\) and event_shape \(3,\); give a flow",
    ):
        importance_sample(RedundantNICE(2, 3, dtype=F64)(), energy, 10)
    with pytest.raises(ValueError, match="the proposal's draw must have the dtype of the energy"):
        importance_sample(dist.Normal(torch.zeros(2), 1.0).to_event(1), energy, 10)
    with pytest.raises(ValueError, match="dim=3 entries"):
        importance_sample(NICE(3, dtype=F64), energy, 10)


def test_generators_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroebm.flows.importance.BATCH_SIZE", 30)
    energy = Gaussian([0.0], dtype=F64)
    for proposal in (stirred_flow(1, 2), dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)):
        before = torch.get_rng_state()
        runs: list[ImportanceResult] = [
            importance_sample(proposal, energy, 100, generator=torch.Generator().manual_seed(s))
            for s in (0, 0, 1)
        ]
        assert torch.equal(torch.get_rng_state(), before), "a generator decides alone"
        assert torch.equal(runs[0].log_weights, runs[1].log_weights)
        assert not torch.equal(runs[0].log_weights, runs[2].log_weights)
        batched = []
        for _ in range(2):  # without one, torch's default generator decides, as in torch
            torch.manual_seed(5)
            batched.append(importance_sample(proposal, energy, 100))
        assert batched[0].x.shape == (100, 1)
        assert len(batched[0].x.unique()) == 100
        assert torch.equal(batched[0].log_weights, batched[1].log_weights)
        assert not torch.equal(torch.get_rng_state(), before)


def test_single_precision_is_weighed_in_double() -> None:
    flow = stirred_flow(1, 2).float()
    result = importance_sample(flow, DoubleWell(), 1000)
    assert result.x.dtype == torch.float32
    assert result.log_weights.dtype == result.weights.dtype == F64
    assert float(result.weights.sum()) == pytest.approx(1.0, abs=1e-12)


def test_draws_outside_the_support_weigh_nothing() -> None:
    """An energy is finite where its formula is, also outside its support."""
    result = importance_sample(dist.Normal(0.0, 1.5), Exponential(1.0), 100_000)
    within_se(result.log_z.value, 0.0, result.log_z.standard_error)
    mean, error = result.expectation(lambda x: x)
    within_se(mean, 1.0, error)
    square = Unnormalized(lambda x: -x.sum(-1), event_shape=(2,), support=constraints.unit_interval)
    result = importance_sample(dist.Normal(torch.zeros(2), 1.0).to_event(1), square, 100_000)
    within_se(result.log_z.value, 2 * math.log(1 - math.exp(-1)), result.log_z.standard_error)


def test_weights_are_of_the_energy_in_eval_mode() -> None:
    class Dropped(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * self.drop(x) ** 2

    energy = Dropped().train()
    result = importance_sample(dist.Normal(0.0, 1.5), energy, 50_000)
    within_se(result.log_z.value, 0.5 * math.log(2 * math.pi), result.log_z.standard_error)
    assert energy.training
    assert energy.drop.training


def test_an_unnormalised_proposal_is_refused() -> None:
    proposal = Boltzmann(Unnormalized(lambda x: -(x**4)))
    with pytest.raises(ValueError, match="proposal must be normalized"):
        importance_sample(proposal, Exponential(1.0), 10)
