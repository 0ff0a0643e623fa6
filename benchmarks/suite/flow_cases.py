"""Densities that flows are fitted to, and the evaluation of a flow by its weighted draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyroebm import Energy
from pyroebm.diagnostics import mode_coverage_entropy
from pyroebm.targets import DoubleWell, Funnel, GaussianMixture, ManyWell, Phi4

__all__ = ["FLOW_CASES", "METRICS", "Counted", "FlowCase", "judge"]


@dataclasses.dataclass(frozen=True)
class FlowCase:
    """A density.

    Args:
        title: its name in the tables.
        make: returns the target, in float32.
        scale: of the initial draws, the same for every library.
    """

    title: str
    make: Callable[[], Energy]
    scale: float = 1.0


FLOW_CASES = {
    "double well": FlowCase("Tilted double well, d = 1", DoubleWell),
    "many-well": FlowCase("Many-Well, three pairs, d = 6", lambda: ManyWell(num_pairs=3)),
    "grid": FlowCase("Nine modes on a grid, d = 2", GaussianMixture.grid, scale=4.0),
    "funnel flow": FlowCase("Funnel, variance 9, d = 10", Funnel),
    "phi4": FlowCase("phi^4 on a ring of 16", lambda: Phi4(16)),
}

#: What is measured of a flow.
METRICS = ("log_z_error", "log_z_se", "ess", "forward_ess", "eubo_gap", "coverage_entropy")


class Counted(Energy):
    """An energy over vectors that counts evaluated states."""

    def __init__(self, energy: Energy) -> None:
        super().__init__((max(1, energy.event_shape.numel()),))
        self.energy, self.evaluations = energy, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return energies and count them."""
        self.evaluations += x.shape[:-1].numel()
        return self.energy(x.reshape(x.shape[:-1] + self.energy.event_shape))


def judge(
    energy: Energy,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    log_weights: Callable[[Tensor], Tensor],
    n: int,
    batch: int = 10_000,
) -> dict[str, float]:
    """Return :data:`METRICS` of a flow.

    Unknown numbers are left out; those of draws that are not finite are NaN.

    Args:
        energy: the target.
        draw: from a number to draws ``(n, d)`` and their log weights, -U - log q.
        log_weights: of exact draws ``(n, d)``.
        n: draws of the flow and of the target.
        batch: draws of a batch.
    """
    sizes = [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    with torch.no_grad():
        parts = [draw(size) for size in sizes]
        x, log_w = (
            torch.cat([part[0] for part in parts]),
            torch.cat([part[1] for part in parts]).double(),
        )
        found = dict.fromkeys(METRICS[:3], math.nan)
        if bool(torch.isfinite(x).all() and (log_w < math.inf).all() and (log_w > -math.inf).any()):
            ratio = (log_w - log_w.max()).exp()
            log_z = float(log_w.max() + ratio.mean().log())
            found["log_z_error"] = abs(log_z - energy.log_z)
            found["log_z_se"] = float(ratio.std() / (ratio.mean() * math.sqrt(n)))
            found["ess"] = float(ratio.sum() ** 2 / ratio.square().sum()) / n
        if energy.has_exact_draws:
            exact = energy.sample(n, torch.Generator().manual_seed(0)).reshape(n, -1)
            log_w = torch.cat([log_weights(rows) for rows in exact.split(batch)]).double()
            found["forward_ess"] = math.exp(
                2.0 * math.log(n) - float(log_w.logsumexp(0)) - float((-log_w).logsumexp(0))
            )
            found["eubo_gap"] = float(log_w.mean()) - energy.log_z
        weights = energy.mode_weights
        if weights is not None:
            found["coverage_entropy"] = mode_coverage_entropy(
                energy.mode_of(x.reshape(torch.Size([n]) + energy.event_shape)), weights
            )
    return found
