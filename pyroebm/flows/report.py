"""What a flow is worth for its target, from both sides: reverse figures, and what they cannot
see."""

from __future__ import annotations

import dataclasses
import math

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

#: A mode with less than this part of its weight among the flow's draws is called missing.
MISSING = 0.1
#: Draws for the weights of x alone, where there are redundant latents.
MARGINAL = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class FlowReport:
    r"""Figures of a flow q for a target p, from :func:`evaluate_flow`; log weights are
    :math:`-U(x) - \log q(x)`.

    The reverse figures are means over the flow's own draws: none of them sees a mode without such
    draws. The forward ones are over draws of the target, and None where there are none.

    Attributes:
        weighted: the importance sampling of ``n`` draws: log Z, effective sample size, Pareto k.
        elbo: mean log weight over q, at most log Z; with redundant latents over (x, y).
        marginal_ess: effective sample size of the weights of x alone, as a fraction; at least the
            extended one. Equal to it for D = d; from a K-sample bound of q(x) where D - d > 1.
        eubo: mean log weight over p, at least log Z.
        forward_ess: effective sample size over p, as a fraction: 1 over the mean weight times the
            mean inverse weight.
        energy_distance: between draws of q and of p (squared), and
        discrepancy: the squared maximum mean discrepancy, without bias.
        corrected_distance: the energy distance of draws resampled by weight.
        mode_weights: true weights of the modes, where the target knows them,
        mode_shares: of the flow's draws, and
        weighted_shares: of the weighted draws, ``(k,)``.
        coverage_entropy: that of ``mode_shares``
            (:func:`pyroebm.core.statistics.mode_coverage_entropy`).
        missing: modes of which the flow draws less than a tenth of their weight.
        log_z: the exact one, where it is known.
        evaluations: of the target, spent on this report.
        findings: in words, the worst first.
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
        """What the latents y cost: the effective sample size of x alone less the extended one, as
        fractions."""
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
            apart = (self.weighted_shares - self.mode_weights).abs()
            # of many the one that is worst
            shown = range(len(apart)) if len(apart) <= 9 else [int(apart.argmax())]
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
    draws: Tensor | None = None,
    *,
    num_distances: int = 2000,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> FlowReport:
    r"""Evaluate a flow by its own draws and by draws of the target.

    Args:
        flow: q.
        energy: U. Its exact draws are taken where it has them, its ``mode_weights`` and ``log_z``
            where it knows them.
        num_samples: draws of the flow, and of the target where it has exact ones.
        draws: of the target in place of exact ones: independent ones ``(m, *event)``, or those of
            chains ``(chains, m, *event)``, which must have mixed. Chains, not their draws, then
            count as independent in the errors of the EUBO and of distances.
        num_distances: draws of each law for the distances between them.
        generator: source of the draws; None is torch's default generator.
        progress: of the flow's draws, as for :func:`importance_sample`.

    Raises:
        ValueError: if a number is below 40, or the flow or the draws do not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import DoubleWell
        >>> flow = NICE(1)
        >>> with torch.no_grad():  # the best normal law within the left well
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
        energy.check_states(draws, "draws")
        if draws.dim() == len(energy.event_shape) + 2:
            chains, draws = len(draws), draws.flatten(0, 1)
    weighted = importance_sample(flow, energy, num_samples, generator=generator, progress=progress)
    elbo = Estimate.of(weighted.log_weights[torch.isfinite(weighted.log_weights)])
    if not bool(torch.isfinite(weighted.log_weights).all()):
        elbo = Estimate(-math.inf, math.nan)  # some of q is where p is not
    marginal, evaluations = weighted.ess_fraction, num_samples
    with torch.no_grad(), eval_mode(energy):
        if flow.conditional is not None:
            x = weighted.x[:MARGINAL]
            log_q = flow.log_prob_x(target.vectors(x), generator=generator)
            marginal = ess_fraction(-energy(x).double() - log_q.double())
            evaluations += len(x)
        if draws is None and energy.has_exact_draws:
            draws = energy.sample(num_samples, generator)
        log_forward = eubo = None
        if draws is not None:
            xy = target.complete(draws, generator)
            log_forward = (-target(xy) - flow.log_prob(xy)).double()
            eubo = Estimate.of(
                log_forward if chains is None else log_forward.reshape(chains, -1).mean(1)
            )
            evaluations += len(draws)
    some = min(num_distances, num_samples)
    far = near = discrepancy = None
    if draws is not None:
        some_draws = subset(len(draws), some, generator, flow.device)
        # a chain's beside each other, for the groups of the jackknife
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
        # of a mode too small to be seen among n draws nothing can be said
        missing = tuple(
            int(k)
            for k in range(len(weights))
            if shares[k] < MISSING * weights[k] and num_samples * weights[k] > 30.0
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
    said, weighted = [], report.weighted
    if report.missing and report.mode_weights is not None:
        mass = float(report.mode_weights[list(report.missing)].sum())
        said.append(
            f"missing: {len(report.missing)} of {len(report.mode_weights)} modes, {100 * mass:.3g}"
            " % of the mass; weights cannot"
            " bring back what is never drawn"
        )
    # a flow that is the target has no other error
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
        said.append(f"log Z is {off:+.3g} of its standard errors from the exact one")
    if math.isinf(weighted.log_z.standard_error):
        few, n = weighted.ess, len(weighted.log_weights)
        told = (
            ""
            if report.log_z is None
            else f", which is {weighted.log_z.value - report.log_z:+.3g} from the exact one"
        )
        said.append(
            f"a few weights decide (ESS {few:.0f} of {n}): log Z{told}, has no standard error"
        )
    if report.forward_ess is not None and report.forward_ess < 0.1 * weighted.ess_fraction:
        said.append(
            f"the forward ESS ({report.forward_ess:.2g}) is far below the reverse one"
            f" ({weighted.ess_fraction:.2g}): there is"
            " mass where the flow hardly draws"
        )
    if weighted.pareto_k > 0.7:
        said.append(
            f"Pareto k {weighted.pareto_k:.2f} is above 0.7: a few weights decide, do not trust"
            " weighted means"
        )
    if report.eubo is not None and report.eubo.value - report.elbo.value > 1.0:
        gap = report.eubo.value - report.elbo.value
        said.append(
            f"the flow is {gap:.3g} nats from its target (EUBO less ELBO, the sum of both"
            " divergences)"
        )
    if report.eubo is None:
        said.append(
            "no draws of the target: none of these figures can see a mode that the flow has not"
            " found"
        )
    elif not said:
        said.append("forward and reverse figures agree")
    return tuple(said)


def _forward_ess(log_weights: Tensor) -> float:
    """1 / (mean w mean 1/w) over draws of the target: there 1/E[w] is the reverse ESS, and E[1/w]
    its normaliser."""
    n = len(log_weights)
    return math.exp(
        2.0 * math.log(n) - float(log_weights.logsumexp(0)) - float((-log_weights).logsumexp(0))
    )
