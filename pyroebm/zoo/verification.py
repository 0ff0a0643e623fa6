"""Recomputing the numbers of a card."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.statistics import Estimate
from pyroebm.zoo.cards import Check, Metric
from pyroebm.zoo.computations import Context, MissingData, compute, load_data
from pyroebm.zoo.references import check_draws
from pyroebm.zoo.registry import REFERENCE, card, load, reference_draws

__all__ = ["Recomputed", "Verification", "verify"]

#: Largest difference of two estimates, in combined standard errors.
MAX_DEVIATION = 5.0
#: Largest difference of exact numbers relative to their size: processors round differently.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recomputed:
    """One line of a verification.

    Args:
        name: of the metric or check.
        stated: what the card says.
        found: what was computed now; None without data.
        status: "holds", "fails" or "needs data".
    """

    name: str
    stated: str
    found: str | None
    status: Literal["holds", "fails", "needs data"]

    def __str__(self) -> str:
        found = "" if self.found is None else f", found {self.found}"
        return f"{self.status:<10} {self.name}: stated {self.stated}{found}"


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`.

    Args:
        name: of the entry.
        rows: one for each number of the card.
    """

    name: str
    rows: tuple[Recomputed, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing fails; numbers that need data do not count."""
        return all(row.status != "fails" for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.name}: {'holds' if self.passed else 'fails'}", *map(str, self.rows)]
        )


def verify(
    name: str | Path,
    *,
    data: str | Path | None = None,
    generator: torch.Generator | None = None,
) -> Verification:
    """Compute log Z and all metrics of an entry again, and compare them with its card.

    Estimates may differ by five combined Monte Carlo standard errors, exact numbers by rounding.
    The criteria of the reference draws are applied again.

    Args:
        name: of the entry, or a folder that :func:`export` wrote.
        data: path of data that does not come with the package, such as MNIST. Numbers that need it
            have the status "needs data" otherwise.
        generator: source of randomness; None for torch's default one.

    Raises:
        ValueError: if there is no such entry.
        FileError: if a file is missing, damaged, or not the one that the card describes.

    Example:
        >>> from pyroebm import zoo
        >>> zoo.verify("boltzmann-machine-bars").passed
        True
    """
    stated, model = card(name), load(name).double()
    reference = reference_draws(name) if REFERENCE in stated.files else None
    context = Context(
        model, [metric.estimate for metric in stated.log_z], None, reference, generator
    )
    path = None if data is None else Path(data)
    rows = [_metric(metric, context, path) for metric in (*stated.log_z, *stated.metrics)]
    if reference is not None and isinstance(model, Energy):
        rows += _draws(model, reference, stated.checks)
    return Verification(stated.name, tuple(rows))


def _metric(metric: Metric, context: Context, path: Path | None) -> Recomputed:
    stated = metric.estimate
    try:
        if metric.data is not None:
            context = dataclasses.replace(context, data=load_data(metric.data, path))
        found = compute(metric.computation, context, metric.arguments)
    except MissingData:
        return Recomputed(name=metric.name, stated=str(stated), found=None, status="needs data")
    holds = found.kind == stated.kind and agree(stated, found)
    return Recomputed(
        name=metric.name,
        stated=_text(stated),
        found=_text(found),
        status="holds" if holds else "fails",
    )


def agree(stated: Estimate, found: Estimate) -> bool:
    """Whether two estimates differ by no more than their errors and rounding allow."""
    error = math.hypot(stated.standard_error, found.standard_error)
    allowed = MAX_DEVIATION * error + ROUNDING * max(1.0, abs(stated.value))
    return abs(found.value - stated.value) <= allowed


def _text(estimate: Estimate) -> str:
    if estimate.kind == "exact":
        return f"{estimate.value:.7g} (exact)"
    return f"{estimate} ({estimate.kind})"


def _draws(energy: Energy, reference: Tensor, checks: tuple[Check, ...]) -> list[Recomputed]:
    stated = {check.name: check for check in checks}
    return [
        Recomputed(
            name=check.name,
            stated=f"{stated[check.name].value:.4g}" if check.name in stated else check.rule,
            found=f"{check.value:.4g}",
            status="holds" if check.passed else "fails",
        )
        for check in check_draws(energy, reference)
        if check.name != "divergences"
    ]
