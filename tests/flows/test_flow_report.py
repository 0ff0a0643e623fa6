"""The report of a flow: closed forms of its figures, and what it says of a mode that is not
there."""

from __future__ import annotations

import math

import pytest
import torch
from lib.checks import within_se

from pyroebm.energies import Ising
from pyroebm.flows import NICE, RedundantNICE, evaluate_flow
from pyroebm.targets import DW4, DoubleWell, Gaussian, GaussianMixture

pytestmark = pytest.mark.usefixtures("float64")


def normal_flow(mean: float, deviation: float, dim: int = 1) -> NICE:
    flow = NICE(dim, num_layers=0)
    with torch.no_grad():
        flow.linear.log_diagonal.fill_(math.log(deviation))
        flow.transform.parts[-1].offset.fill_(mean)
    return flow


def test_figures_between_normal_distributions() -> None:
    """p = N(0, 1), q = N(m, s^2) in one dimension, s^2 > 1/2, so that all moments of the weights
    exist."""
    mean, deviation = 0.3, 1.3
    report = evaluate_flow(
        normal_flow(mean, deviation),
        Gaussian(0.0),
        num_samples=200_000,
        generator=torch.Generator().manual_seed(1),
    )
    log_z = 0.5 * math.log(2 * math.pi)
    kl_qp = 0.5 * (deviation**2 + mean**2 - 1.0) - math.log(deviation)
    kl_pq = 0.5 * (1.0 + mean**2) / deviation**2 - 0.5 + math.log(deviation)
    within_se(report.elbo.value, log_z - kl_qp, report.elbo.standard_error)
    within_se(report.eubo.value, log_z + kl_pq, report.eubo.standard_error)
    # E_q[(p/q)^2] of normal distributions
    second = (
        deviation**2 / math.sqrt(2 * deviation**2 - 1) * math.exp(mean**2 / (2 * deviation**2 - 1))
    )
    assert report.weighted.ess_fraction == pytest.approx(1 / second, abs=0.01)
    assert report.forward_ess == pytest.approx(1 / second, abs=0.01)
    assert report.marginal_ess == report.weighted.ess_fraction
    assert report.findings == ("forward and reverse metrics agree",)
    assert report.evaluations == 400_000

    def folded(m: float, v: float) -> float:
        near = math.sqrt(2 * v / math.pi) * math.exp(-(m**2) / (2 * v))
        return near + m * math.erf(m / math.sqrt(2 * v))

    apart = 2 * folded(mean, 1 + deviation**2) - folded(0.0, 2.0) - folded(0.0, 2 * deviation**2)
    within_se(report.energy_distance.value, apart, report.energy_distance.standard_error)
    within_se(report.corrected_distance.value, 0.0, report.corrected_distance.standard_error)


def test_a_flow_that_is_the_target_is_off_by_rounding_alone() -> None:
    report = evaluate_flow(
        normal_flow(0.3, 0.7, 2), Gaussian(torch.full((2,), 0.3), scale=0.7), num_samples=2000
    )
    assert report.weighted.log_z.standard_error < 1e-15
    assert report.findings == ("forward and reverse metrics agree",)


def test_a_flow_inside_one_well_is_seen_through() -> None:
    """The trap: healthy reverse figures, a log Z that is wrong by many of its standard errors."""
    energy = DoubleWell()
    report = evaluate_flow(normal_flow(-1.413, 0.245), energy, num_samples=1000)
    assert report.weighted.ess_fraction > 0.8
    assert report.weighted.log_z.value == pytest.approx(4.96, abs=0.02)
    assert report.missing == (1,)
    assert report.forward_ess < 1e-3
    assert report.eubo.value > energy.log_z + 1.0
    said = "\n".join(report.findings)
    assert "missing: 1 of 2 modes, 6.65 % of the mass" in said
    assert "1: 0.0000, 0.0000 (0.0665)" in str(report)
    assert "standard errors from the exact one" in said
    assert "forward ESS" in said
    assert str(report).endswith(said)


def test_without_draws_of_the_target_it_says_what_it_cannot_see() -> None:
    report = evaluate_flow(normal_flow(0.0, 2.0, 6), DW4(), num_samples=500)
    assert (
        report.forward_ess
        is report.eubo
        is report.energy_distance
        is report.coverage_entropy
        is None
    )
    assert (
        "none of these metrics depends on modes that the flow has not found" in report.findings[-1]
    )


def test_draws_of_a_chain_take_the_place_of_exact_ones() -> None:
    energy = DW4()
    report = evaluate_flow(
        normal_flow(0.0, 2.0, 6), energy, num_samples=500, draws=energy.initial(300)
    )
    assert report.eubo is not None
    assert report.evaluations == 800


def test_errors_count_chains_and_not_their_draws() -> None:
    """Chains that never move: 50 draws, each eight times over. The spread of repeated reports is
    what the errors say."""
    noise, flow = torch.Generator().manual_seed(0), normal_flow(0.5, 1.2)
    reports = []
    for seed in range(30):
        chains = torch.randn(50, 1, generator=noise).expand(50, 8)
        mixed = chains.flatten()[torch.randperm(400, generator=noise)]
        found = [
            evaluate_flow(
                flow, Gaussian(0.0), 400, draws, generator=torch.Generator().manual_seed(seed)
            )
            for draws in (chains, mixed)
        ]
        reports.append(
            [[e[:2] for e in (r.eubo, r.energy_distance, r.discrepancy)] for r in found]  # type: ignore[index]
        )
    # (30, chains or draws, three figures, value or error)
    figures = torch.tensor(reports, dtype=torch.float64)
    ratio = figures[..., 1].square().mean(0) / figures[..., 0].var(0)
    error = (2.0 / 29) ** 0.5  # of a variance of 30 normal numbers, relative to it
    assert bool((ratio[0].log().abs() < 5 * error).all()), ratio
    # of distances the flow's own draws have a part
    assert bool((ratio[1] < ratio[0] / 2.0).all()), ratio


def test_modes_are_counted_and_covered() -> None:
    energy = GaussianMixture.grid()
    even = evaluate_flow(normal_flow(0.0, 4.5, 2), energy, num_samples=20_000)
    assert even.missing == ()
    assert even.coverage_entropy > 0.9
    # each against the standard error of its own weighted mean
    for k, weight in enumerate(even.mode_weights):
        share, se = even.weighted.expectation(lambda x, k=k: (energy.mode_of(x) == k).double())
        assert float(even.weighted_shares[k]) == pytest.approx(float(share), abs=1e-12)
        within_se(share, weight, se)
    one = evaluate_flow(normal_flow(0.0, 0.55, 2), energy, num_samples=2000)
    assert len(one.missing) == 8
    assert one.coverage_entropy < 0.01
    assert "missing: 8 of 9 modes, 88.9 % of the mass" in one.findings[0]


def test_redundant_latents_have_two_effective_sizes() -> None:
    """y depends on x in q, and N(y | M, S) does not know it: weights on (x, y) vary, those of x
    alone do not."""
    flow = RedundantNICE(1, 2, num_layers=0)
    with torch.no_grad():
        flow.linear.below[1, 0] = 0.8  # y = .8 z1 + z2, x = z1: q(x) is the target itself
    report = evaluate_flow(flow, Gaussian(0.0), num_samples=20_000)
    assert report.marginal_ess == pytest.approx(1.0, abs=1e-6)
    assert report.redundancy_gap == pytest.approx(1.0 - report.weighted.ess_fraction, abs=1e-6)
    assert f"(gap {report.redundancy_gap:.4f})" in str(report)
    assert report.weighted.ess_fraction < 0.8
    assert report.weighted.log_z.value == pytest.approx(
        0.5 * math.log(2 * math.pi), abs=5 * report.weighted.log_z.standard_error
    )


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match="num_samples must be an integer of at least 40, got num_samples=10"
    ):
        evaluate_flow(NICE(2), Gaussian(torch.zeros(2)), num_samples=10)
    with pytest.raises(ValueError, match=r"event_shape \(2,\)"):
        evaluate_flow(NICE(2), Gaussian(torch.zeros(2)), num_samples=100, draws=torch.zeros(100, 3))
    with pytest.raises(ValueError, match="real support"):
        evaluate_flow(NICE(9), Ising((3, 3), 0.3), num_samples=100)
