"""A continuous flow of particles that respects what their energy does not see: turns, reflections, and which particle is which."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyroebm.flows.base import Base
from pyroebm.flows.bijection import Bijection, check_event
from pyroebm.flows.flow import Flow
from pyroebm.front_door import check_counts
from pyroebm.supports import mean_free_basis

__all__ = ["EquivariantFlow", "PairField"]

#: A uniform cubic B-spline on one cell: from four coefficients to those of 1, f, f^2, f^3, where f in [0, 1] runs through it.
CUBIC = torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]], dtype=torch.float64) / 6.0


class PairField(Bijection):
    r"""The way that particles go in one unit of time along a velocity which is a sum over pairs, from z to x.

    .. math:: \dot x_i = a(t)\, x_i + \frac1n \sum_{j \ne i} \phi(s_{ij}, t)\, (x_i - x_j), \qquad
        s_{ij} = \log\bigl(1 + |x_i - x_j|^2 / \ell^2\bigr)

    a and :math:`\phi` are cubic splines, linear in what is learned. With r the differences of the pairs i < j, linear in the
    coordinates u of the configurations of mean zero, the divergence there is

    .. math:: \nabla_u \cdot \dot u = (n - 1)\, k\, a + \frac2n \sum_{i<j} \Bigl(k\, \phi + |r_{ij}|\,
        \frac{\partial \phi}{\partial |r_{ij}|}\Bigr)

    Both are integrated by Runge and Kutta's rule of fourth order, the inverse by the same steps taken back.

    Args:
        particles: n, at least 2.
        space: k, at least 1.
        reach: distance beyond which :math:`\phi` is 0.
        length: :math:`\ell`: of the spline's resolution, which is finest there.
        cells: of the spline in s.
        stages: cells of the splines in t.
        steps: of the integrator.
        scale: initial :math:`e^a`.
        dtype: of the parameters (default torch's).

    Raises:
        ValueError: if an argument is out of range.
    """

    incidence: Tensor

    def __init__(
        self,
        particles: int,
        space: int,
        reach: float,
        length: float,
        cells: int,
        stages: int,
        steps: int,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts({"space": 1, "cells": 1, "stages": 1, "steps": 1}, space, cells, stages, steps)
        for name, value in (("reach", reach), ("length", length), ("scale", scale)):
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {name}={value}")
        basis = mean_free_basis(particles, dtype)
        super().__init__((particles - 1) * space)
        self.particles, self.space, self.steps = particles, space, steps
        self.length, self.width = length, math.log1p((reach / length) ** 2) / cells
        first, second = torch.triu_indices(particles, particles, 1)
        self.register_buffer("incidence", basis[first] - basis[second], persistent=False)
        self.pull = nn.Parameter(torch.full((stages + 3,), math.log(scale), dtype=basis.dtype))
        self.pairs = nn.Parameter(torch.zeros(stages + 3, cells, dtype=basis.dtype))

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._integrated(z, 1)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self._integrated(x, -1)
        return z, -log_det

    def _integrated(self, u: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """From one end of time to the other, and the integral of the divergence on the way."""
        check_event(u, self.dim)
        shape, u = u.shape, u.reshape(-1, self.particles - 1, self.space).mT.contiguous()
        pulls, tables = self._in_time()
        h, log_det = sign / self.steps, u.new_zeros(len(u))
        halves = range(2 * self.steps + 1) if sign > 0 else range(2 * self.steps, -1, -1)
        for now, middle, then in zip(halves[::2], halves[1::2], halves[2::2], strict=False):
            v1, d1 = self._velocity(u, pulls[now], tables[now])
            v2, d2 = self._velocity(u + 0.5 * h * v1, pulls[middle], tables[middle])
            v3, d3 = self._velocity(u + 0.5 * h * v2, pulls[middle], tables[middle])
            v4, d4 = self._velocity(u + h * v3, pulls[then], tables[then])
            u = u + h / 6.0 * (v1 + 2.0 * (v2 + v3) + v4)
            log_det = log_det + h / 6.0 * (d1 + 2.0 * (d2 + d3) + d4)
        return u.mT.reshape(shape), log_det.reshape(shape[:-1])

    def _in_time(self) -> tuple[Tensor, Tensor]:
        """At the times of all half steps: a; and for each cell in s, and the rest beyond, the polynomial of phi."""
        stages, cubic = len(self.pull) - 3, CUBIC.to(self.pull)
        at = torch.arange(2 * self.steps + 1, dtype=cubic.dtype, device=cubic.device) * (stages / (2 * self.steps))
        cell = at.long().clamp(max=stages - 1)
        weights = (at - cell).unsqueeze(1) ** torch.arange(4, device=cubic.device) @ cubic
        pairs = nn.functional.pad(self.pairs, (0, 4)) / self.particles
        both = torch.cat([self.pull.unsqueeze(1), pairs], 1).unfold(0, 4, 1)[cell]  # (times, 1 + cells + 4, 4)
        both = (both @ weights.unsqueeze(-1)).squeeze(-1)
        return both[:, 0], both[:, 1:].unfold(1, 4, 1) @ cubic.T

    def _velocity(self, u: Tensor, pull: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and divergence: ``(rows, k, n - 1) -> (rows, k, n - 1), (rows,)``."""
        r = u @ self.incidence.T
        squared = r.square().sum(1)
        at = torch.log1p(squared / self.length**2) / self.width
        cell = at.detach().long().clamp(0, len(table) - 1)
        c0, c1, c2, c3 = table.index_select(0, cell.flatten()).view(*cell.shape, 4).unbind(-1)
        f = at - cell
        phi = c0 + f * (c1 + f * (c2 + f * c3))
        slope = (c1 + f * (2.0 * c2 + f * 3.0 * c3)) / self.width
        velocity = pull * u + (phi.unsqueeze(1) * r) @ self.incidence
        around = self.space * phi + slope * (2.0 * squared / (self.length**2 + squared))
        return velocity, self.dim * pull + 2.0 * around.sum(-1)


class EquivariantFlow(Flow):
    r"""A continuous flow of n equal particles (Köhler, Klein and Noé, "Equivariant Flows", 2020), in the coordinates of :class:`pyroebm.targets.Particles`.

    Args:
        particles: n, at least 2.

    Example:
        >>> flow = EquivariantFlow(4, 2)
        >>> flow.log_prob(torch.zeros(6)).detach()
        tensor(-5.5136)
    """

    def __init__(
        self,
        particles: int,
        space: int,
        reach: float = 8.0,
        length: float = 1.0,
        cells: int = 32,
        stages: int = 6,
        steps: int = 12,
        scale: float = 1.0,
        *,
        base: Base | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        field = PairField(particles, space, reach, length, cells, stages, steps, scale, dtype)
        super().__init__([field], field.dim, field.dim, base=base)
        self._config = {
            "particles": particles, "space": space, "reach": reach, "length": length, "cells": cells, "stages": stages,
            "steps": steps, "scale": scale, "base": base,
        }  # fmt: skip
