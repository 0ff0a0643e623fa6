"""Evaluation of a flow with its own draws (reverse) and with draws of its target (forward)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import subset
from pyroebm.core.statistics import (
    Estimate,
    energy_distance,
    maximum_mean_discrepancy,
    mode_coverage_entropy,
)
from pyroebm.core.wrappers import eval_mode
from pyroebm.flows.flow import Flow
from pyroebm.flows.importance import ImportanceResult, ess_fraction, importance_sample

__all__ = ["FlowReport", "evaluate_flow"]

#: A mode is missing if its share of the flow's draws is less than this fraction of its weight.
MISSING_SHARE = 0.1
#: Number of draws for the marginal weights of x, with auxiliary variables.
NUM_MARGINAL = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class FlowReport:
    r"""Metrics of a flow q for a target p, from :func:`evaluate_flow`.

    Log weights are :math:`-U(x) - \log q(x)`. Reverse metrics are means over draws of the flow, and
    do not depend on modes without such draws. Forward metrics are means over draws of the target,
    and None without such draws.

    Attributes:
        weighted: importance sampling with n draws: log Z, effective sample size, Pareto k.
        elbo: mean log weight over q, at most log Z; of (x, y) with auxiliary variables.
        marginal_ess: effective sample size of the weights of x, as a fraction; at least that of (x,
            y), and equal to it for D = d. For D - d > 1 it uses a K-sample bound on q(x).
        eubo: mean log weight over p, at least log Z.
        forward_ess: effective sample size over p, as a fraction: the inverse of the product of the
            mean weight and the mean inverse weight.
        energy_distance: squared energy distance between draws of q and of p.
        discrepancy: unbiased estimate of the squared maximum mean discrepancy between them.
        corrected_distance: squared energy distance for draws resampled by weight.
        mode_weights: exact weights of the modes, ``(k,)``, if the target knows them.
        mode_shares: shares of the modes among the flow's draws, ``(k,)``.
        weighted_shares: shares of the modes among the weighted draws, ``(k,)``.
        coverage_entropy: :func:`pyroebm.core.statistics.mode_coverage_entropy` of ``mode_shares``.
        missing: indices of modes whose share is less than a tenth of their weight.
        log_z: exact log Z, if it is known.
        evaluations: number of evaluations of the target for this report.
        findings: problems in words, the most severe first.
    """

    weighted: ImportanceResult
    elbo: Estimate
    marginal_ess: float
    eubo: Estimate | None
    forward_ess: float | None
    energy_distance: Estimate | None
    discrepancy: Estimate | None
    corrected_distance: Estimate | None
    mode_weights: Tensor | None
    mode_shares: Tensor | None
    weighted_shares: Tensor | None
    coverage_entropy: float | None
    missing: tuple[int, ...]
    log_z: float | None
    evaluations: int
    findings: tuple[str, ...]

    @property
    def redundancy_gap(self) -> float:
        """ESS of x minus that of (x, y), as fractions: the cost of the auxiliary variables."""
        return self.marginal_ess - self.weighted.ess_fraction

    def __str__(self) -> str:
        w = self.weighted
        truth = "" if self.log_z is None else f" (exact {self.log_z:.5g})"
        lines = [
            f"log Z {w.log_z.value:.5f} +- {w.log_z.standard_error:.2g}{truth}; ELBO {self.elbo}",
            f"reverse ESS {w.ess_fraction:.4f} of n, of x alone {self.marginal_ess:.4f} (gap"
            f" {self.redundancy_gap:.4f});"
            f" Pareto k {w.pareto_k:.2f}",
        ]
        if self.eubo is not None:
            lines += [
                f"forward ESS {self.forward_ess:.4f}; EUBO {self.eubo}",
                f"energy distance {self.energy_distance}, after weighting"
                f" {self.corrected_distance}",
                f"discrepancy {self.discrepancy}",
            ]
        if (
            self.mode_weights is not None
            and self.mode_shares is not None
            and self.weighted_shares is not None
        ):
            errors = (self.weighted_shares - self.mode_weights).abs()
            # of many modes, the one with the largest error
            shown = range(len(errors)) if len(errors) <= 9 else [int(errors.argmax())]
            lines.append(
                f"mode-coverage entropy {self.coverage_entropy:.4f}; mass of modes, drawn,"
                " weighted (true):"
            )
            lines += [
                f"  {k}: {self.mode_shares[k]:.4f}, {self.weighted_shares[k]:.4f}"
                f" ({self.mode_weights[k]:.4f})"
                for k in shown
            ]
        return "\n".join([*lines, f"{self.evaluations} evaluations of the target", *self.findings])


def evaluate_flow(
    flow: Flow,
    energy: Energy,
    num_samples: int = 100_000,
    draws: Tensor | np.ndarray | None = None,
    *,
    num_distances: int = 2000,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> FlowReport:
    r"""Evaluate a flow by its own draws and by draws of the target.

    Args:
        flow: q.
        energy: U. Its exact draws, ``mode_weights`` and ``log_z`` are used if it has them.
        num_samples: number of draws of the flow, and of exact draws of the target.
        draws: draws of the target, instead of exact ones: independent, ``(m, *event)``, or of
            chains that have mixed, ``(chains, m, *event)``. Standard errors of the EUBO and the
            distances then assume independent chains, not independent draws.
        num_distances: number of draws of each distribution for the distances.
        generator: source of the draws; None is torch's default generator.
        progress: as in :func:`importance_sample`, for the draws of the flow.

    Returns:
        The metrics, which print as a table with findings.

    Raises:
        ValueError: if a number is below 40, or the flow or the draws do not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import DoubleWell
        >>> flow = NICE(1)
        >>> with torch.no_grad():  # a normal approximation of the left well
        ...     _ = flow.linear.log_diagonal.fill_(math.log(0.245))
        ...     _ = flow.transform.parts[-1].offset.fill_(-1.413)
        >>> report = evaluate_flow(flow, DoubleWell(), num_samples=1000)
        >>> report.weighted.ess_fraction > 0.8, report.missing, report.forward_ess < 0.01
        (True, (1,), True)
    """
    check_counts({"num_samples": 40, "num_distances": 40}, num_samples, num_distances)
    target = flow.extend(energy)
    chains = None
    if draws is not None:
        draws = energy.as_states(draws, "draws")
        if draws.dim() == len(energy.event_shape) + 2:
            chains, draws = len(draws), draws.flatten(0, 1)
    weighted = importance_sample(flow, energy, num_samples, generator=generator, progress=progress)
    elbo = Estimate.of(weighted.log_weights[torch.isfinite(weighted.log_weights)])
    if not bool(torch.isfinite(weighted.log_weights).all()):
        elbo = Estimate(-math.inf, math.nan)  # q has mass where p is 0
    marginal, evaluations = weighted.ess_fraction, num_samples
    with torch.no_grad(), eval_mode(energy):
        if flow.conditional is not None:
            x = weighted.x[:NUM_MARGINAL]
            log_q = flow.log_prob_x(target.vectors(x), generator=generator)
            marginal = ess_fraction(-energy(x).double() - log_q.double())
            evaluations += len(x)
        if draws is None and energy.has_exact_draws:
            draws = energy.sample(num_samples, generator)
        log_forward = eubo = None
        if draws is not None:
            xy = target.augment(draws, generator)
            log_forward = (-target(xy) - flow.log_prob(xy)).double()
            eubo = Estimate.of(
                log_forward if chains is None else log_forward.reshape(chains, -1).mean(1)
            )
            evaluations += len(draws)
    some = min(num_distances, num_samples)
    far = near = discrepancy = None
    if draws is not None:
        some_draws = subset(len(draws), some, generator, flow.device)
        # draws of a chain are contiguous, as the groups of the jackknife require
        y = draws[some_draws.sort().values.to(draws.device)]
        far, discrepancy = (
            energy_distance(weighted.x[:some], y),
            maximum_mean_discrepancy(weighted.x[:some], y),
        )
        near = energy_distance(weighted.resample(some, generator), y)
    weights = getattr(energy, "mode_weights", None)
    shares = corrected = entropy = None
    missing: tuple[int, ...] = ()
    if weights is not None:
        modes = energy.mode_of(weighted.x)  # type: ignore[operator]
        weights = weights.double().cpu()
        shares = torch.bincount(modes.cpu(), minlength=len(weights)).double() / num_samples
        corrected = torch.bincount(modes.cpu(), weighted.weights.cpu(), minlength=len(weights))
        entropy = mode_coverage_entropy(modes.cpu(), weights)
        # modes with few expected draws are not judged
        missing = tuple(
            int(k)
            for k in range(len(weights))
            if shares[k] < MISSING_SHARE * weights[k] and num_samples * weights[k] > 30.0
        )
    report = FlowReport(
        weighted=weighted,
        elbo=elbo,
        marginal_ess=marginal,
        eubo=eubo,
        forward_ess=None if log_forward is None else _forward_ess(log_forward),
        energy_distance=far,
        discrepancy=discrepancy,
        corrected_distance=near,
        mode_weights=weights,
        mode_shares=shares,
        weighted_shares=corrected,
        coverage_entropy=entropy,
        missing=missing,
        log_z=energy.log_z,
        evaluations=evaluations,
        findings=(),
    )
    return dataclasses.replace(report, findings=_findings(report))


def _findings(report: FlowReport) -> tuple[str, ...]:
    findings, weighted = [], report.weighted
    if report.missing and report.mode_weights is not None:
        mass = float(report.mode_weights[list(report.missing)].sum())
        findings.append(
            f"missing: {len(report.missing)} of {len(report.mode_weights)} modes, {100 * mass:.3g}"
            " % of the mass; importance weights cannot correct for modes without draws"
        )
    # rounding is the only error of a flow that equals its target
    rounding = 1e-12 * max(1.0, abs(report.log_z or 0.0))
    if (
        report.log_z is not None
        and abs(weighted.log_z.value - report.log_z)
        > 5.0 * weighted.log_z.standard_error + rounding
    ):
        off = (
            (weighted.log_z.value - report.log_z) / weighted.log_z.standard_error
            if weighted.log_z.standard_error
            else math.inf
        )
        findings.append(f"log Z is {off:+.3g} of its standard errors from the exact one")
    if math.isinf(weighted.log_z.standard_error):
        few, n = weighted.ess, len(weighted.log_weights)
        difference = (
            ""
            if report.log_z is None
            else f", which is {weighted.log_z.value - report.log_z:+.3g} from the exact one"
        )
        findings.append(
            f"a few weights dominate (ESS {few:.0f} of {n}): log Z{difference}, has no standard"
            " error"
        )
    if report.forward_ess is not None and report.forward_ess < 0.1 * weighted.ess_fraction:
        findings.append(
            f"the forward ESS ({report.forward_ess:.2g}) is far below the reverse one"
            f" ({weighted.ess_fraction:.2g}): the target has mass where the flow has few draws"
        )
    if weighted.pareto_k > 0.7:
        findings.append(
            f"Pareto k {weighted.pareto_k:.2f} is above 0.7: a few weights dominate, and weighted"
            " means are unreliable"
        )
    if report.eubo is not None and report.eubo.value - report.elbo.value > 1.0:
        gap = report.eubo.value - report.elbo.value
        findings.append(
            f"the flow is {gap:.3g} nats from its target (EUBO minus ELBO, the sum of both KL"
            " divergences)"
        )
    if report.eubo is None:
        findings.append(
            "no draws of the target: none of these metrics depends on modes that the flow has not"
            " found"
        )
    elif not findings:
        findings.append("forward and reverse metrics agree")
    return tuple(findings)


def _forward_ess(log_weights: Tensor) -> float:
    """Return 1 / (mean w * mean 1/w) over draws of the target, the ESS of reverse weights."""
    n = len(log_weights)
    return math.exp(
        2.0 * math.log(n) - float(log_weights.logsumexp(0)) - float((-log_weights).logsumexp(0))
    )
