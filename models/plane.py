"""Maximum likelihood with log Z from a grid, for recipes with two-dimensional densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core import Energy
from pyroebm.objectives import Objective

__all__ = ["GridLikelihood"]


class GridLikelihood(Objective):
    r"""Maximum likelihood with :math:`\log Z` from a sum over a grid.

    .. math:: L = \frac1n \sum_i E(x_i) + \log \sum_g e^{-E(g)}\, \Delta

    The grid is shifted at random in each step.

    Args:
        side: length of the sides of the square around 0.
        points: grid points on an axis.
    """

    def __init__(self, side: float, points: int) -> None:
        super().__init__()
        self.side, self.points = side, points

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics."""
        step = self.side / self.points
        shift = torch.rand(2, 1, generator=generator, dtype=batch.dtype)
        x, y = (torch.arange(self.points, dtype=batch.dtype) + shift) * step - 0.5 * self.side
        data = energy(batch).mean()
        log_z = torch.logsumexp(-energy(torch.cartesian_prod(x, y)), 0) + 2.0 * math.log(step)
        return data + log_z, {"energy_data": data.detach(), "log_z": log_z.detach()}
