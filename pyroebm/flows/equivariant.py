"""A continuous flow of equal particles, which turns, reflects and renumbers with them."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts
from pyroebm.core.supports import mean_free_basis
from pyroebm.flows.bijection import Bijection, check_event
from pyroebm.flows.flow import Flow

__all__ = ["EquivariantFlow", "PairField"]

#: A uniform cubic B-spline on one of its cells: coefficients of 1, f, f^2, f^3, f in [0, 1], from
#: four of the spline's.
CUBIC = (
    torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]], dtype=torch.float64)
    / 6.0
)


class PairField(Bijection):
    r"""Where a velocity that is a sum over pairs carries particles from time 0 to time 1.

    .. math:: \dot x_i = a(t)\, x_i + \frac1n \sum_{j \ne i} \phi(s_{ij}, t)\, (x_i - x_j), \qquad
        s_{ij} = \log\bigl(1 + |x_i - x_j|^2 / \ell^2\bigr)

    a and :math:`\phi` are cubic splines. In the coordinates u of mean-free configurations, x = B u
    with an orthonormal B, a difference :math:`r_{ij} = (b_i - b_j) u` has :math:`|b_i - b_j|^2 =
    2`, so that

    .. math::

        \nabla_u \cdot \dot u = (n - 1)\, k\, a + \frac2n \sum_{i<j}
        \Bigl(k\, \phi + |r_{ij}|\, \frac{\partial \phi}{\partial |r_{ij}|}\Bigr)

    Runge and Kutta's rule of fourth order integrates both; the inverse takes the steps back. Its
    error falls with the fourth power of the number of steps, up to the kinks in the splines' third
    derivatives.

    Args:
        num_particles, space, reach, length, num_cells, num_stages, num_steps, scale, dtype: of
            :class:`EquivariantFlow`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> field = PairField(4, 2)
        >>> field.weights.shape  # a in the first column, phi in the others
        torch.Size([9, 33])
    """

    incidence: Tensor

    def __init__(
        self,
        num_particles: int,
        space: int,
        *,
        reach: float = 8.0,
        length: float = 1.0,
        num_cells: int = 32,
        num_stages: int = 6,
        num_steps: int = 20,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        least = {"num_particles": 2, "space": 1, "num_cells": 1, "num_stages": 1, "num_steps": 1}
        check_counts(least, num_particles, space, num_cells, num_stages, num_steps)
        for name, value in (("reach", reach), ("length", length), ("scale", scale)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {name}={value}")
        super().__init__((num_particles - 1) * space)
        self.num_particles = num_particles
        self.space = space
        self.num_steps = num_steps
        self.length, self.width = float(length), math.log1p((reach / length) ** 2) / num_cells
        basis, pairs = (
            mean_free_basis(num_particles, dtype),
            torch.triu_indices(num_particles, num_particles, 1),
        )
        self.register_buffer("incidence", basis[pairs[0]] - basis[pairs[1]], persistent=False)
        self.weights = nn.Parameter(torch.zeros(num_stages + 3, 1 + num_cells, dtype=basis.dtype))
        nn.init.constant_(self.weights[:, 0], math.log(scale))

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._carry(z, 1.0)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self._carry(x, -1.0)
        return z, -log_det

    def features(self, u: Tensor, t: Tensor) -> Tensor:
        r"""The field as a linear map of its weights: :math:`\dot u = \sum_{qm} f_{qm}(u, t)\,
        w_{qm}`.

        Args:
            u: coordinates, shape ``(rows, dim)``.
            t: times in [0, 1], shape ``(rows,)``.

        Returns:
            f of shape ``(rows, dim, *weights.shape)``.
        """
        check_event(u, self.dim)
        moved, at = self._by_axis(u), t * (len(self.weights) - 3)
        r, _, at_pairs = self._pairs(moved)
        cell = at.detach().long().clamp(0, len(self.weights) - 4)
        in_time = _spread(at, cell, len(self.weights))
        cells = self.weights.shape[1] - 1
        cell = at_pairs.detach().long().clamp(0, cells)
        # those from cells on are beyond the reach
        in_space = _spread(at_pairs, cell, cells + 4)[..., :cells] / self.num_particles
        pairs = torch.einsum("rkp,rpm,pi->rikm", r, in_space, self.incidence).reshape(
            *u.shape, cells
        )
        return in_time[:, None, :, None] * torch.cat([u.unsqueeze(-1), pairs], -1)[:, :, None, :]

    def _by_axis(self, u: Tensor) -> Tensor:
        """``(*batch, dim) -> (rows, k, n - 1)``."""
        return u.reshape(-1, self.num_particles - 1, self.space).mT.contiguous()

    def _carry(self, u: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """From one end of time to the other, and the integral of the divergence on the way."""
        check_event(u, self.dim)
        shape = u.shape
        u = self._by_axis(u)
        h = sign / self.num_steps
        fields = self._in_time() if sign > 0 else self._in_time()[::-1]
        log_det = u.new_zeros(len(u))
        for now, half, then in zip(fields[:-1:2], fields[1::2], fields[2::2], strict=True):
            v1, d1 = self._velocity(u, *now)
            v2, d2 = self._velocity(u + 0.5 * h * v1, *half)
            v3, d3 = self._velocity(u + 0.5 * h * v2, *half)
            v4, d4 = self._velocity(u + h * v3, *then)
            u = u + h / 6.0 * (v1 + 2.0 * (v2 + v3) + v4)
            log_det = log_det + h / 6.0 * (d1 + 2.0 * (d2 + d3) + d4)
        return u.mT.reshape(shape), log_det.reshape(shape[:-1])

    def _in_time(self) -> list[tuple[Tensor, Tensor]]:
        """At the time of each half step: a, and the polynomial of phi in each cell and in one
        beyond, where it is 0."""
        stages, cubic = len(self.weights) - 3, CUBIC.to(self.weights)
        at = torch.arange(2 * self.num_steps + 1, dtype=cubic.dtype, device=cubic.device) * (
            stages / (2 * self.num_steps)
        )
        now = _spread(at, at.long().clamp(max=stages - 1), stages + 3) @ self.weights
        phi = nn.functional.pad(now[:, 1:], (0, 4)).unfold(1, 4, 1) @ (cubic.T / self.num_particles)
        return list(zip(now[:, 0], phi, strict=True))

    def _pairs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair the difference ``(rows, k, pairs)``, its square, and where it is among the
        cells, ``(rows, pairs)``."""
        r = u @ self.incidence.T
        squared = r.square().sum(1)
        return r, squared, torch.log1p(squared / self.length**2) / self.width

    def _velocity(self, u: Tensor, pull: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and divergence: ``(rows, k, n - 1) -> (rows, k, n - 1), (rows,)``."""
        r, squared, at = self._pairs(u)
        cell = at.detach().long().clamp(0, len(table) - 1)
        c0, c1, c2, c3 = table.index_select(0, cell.flatten()).view(*cell.shape, 4).unbind(-1)
        f = at - cell
        phi = c0 + f * (c1 + f * (c2 + f * c3))
        slope = (
            (c1 + f * (2.0 * c2 + f * 3.0 * c3))
            * (2.0 / self.width)
            * (squared / (self.length**2 + squared))
        )
        velocity = pull * u + (phi.unsqueeze(1) * r) @ self.incidence
        return velocity, self.dim * pull + 2.0 * (self.space * phi + slope).sum(-1)


class EquivariantFlow(Flow):
    r"""A continuous flow of n equal particles in k dimensions (Köhler, Klein and Noé, "Equivariant
    Flows", 2020).

    .. math:: x = x(1), \quad x(0) = B z, \quad z \sim N(0, I), \qquad
        \log q(u) = \log N(z \mid 0, I) - \int_0^1 \nabla_u \cdot \dot u\, dt

    with the velocity of :class:`PairField`, a sum over pairs. An event is :math:`u \in R^{(n - 1)
    k}` with positions x = B u, the coordinates of :class:`pyroebm.targets.Particles`: no direction
    is flat. The density is the same for particles that are turned, reflected or renumbered, as
    their energy is, since the base is, and the velocity moves with them.

    The density is as good as the integration: compare it at ``flow.num_steps`` and at half of them.
    What trains on it, with too few steps, finds fields whose error looks like likelihood.
    :func:`pyroebm.objectives.match_flow` is where to start from.

    Args:
        num_particles: n, at least 2.
        space: k, at least 1.
        reach: distance beyond which a pair does not move.
        length: :math:`\ell`, the distance at which the splines' cells are narrowest.
        cells: of :math:`\phi` in s.
        stages: cells in t.
        num_steps: of the integrator, which may be set anew: ``flow.num_steps = 60``.
        scale: a fresh flow is the base times this.
        dtype: of the parameters (default torch's).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> flow = EquivariantFlow(4, 2)
        >>> flow.log_prob(torch.zeros(6)).detach()
        tensor(-5.5136)
    """

    def __init__(
        self,
        num_particles: int,
        space: int,
        *,
        reach: float = 8.0,
        length: float = 1.0,
        num_cells: int = 32,
        num_stages: int = 6,
        num_steps: int = 20,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        field = PairField(
            num_particles,
            space,
            reach=reach,
            length=length,
            num_cells=num_cells,
            num_stages=num_stages,
            num_steps=num_steps,
            scale=scale,
            dtype=dtype,
        )
        super().__init__([field], field.dim, field.dim)

    @property
    def field(self) -> PairField:
        """What moves the particles."""
        return cast(PairField, self.transform.parts[0])

    @property
    def num_steps(self) -> int:
        """Of the integrator."""
        return self.field.num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        check_counts({"num_steps": 1}, num_steps)
        self.field.num_steps = num_steps


def _spread(at: Tensor, cell: Tensor, size: int) -> Tensor:
    """Values at ``at`` of all basis splines, of which four are not 0, those from ``cell`` on:
    ``(*batch) -> (*batch, size)``."""
    power = torch.arange(4, device=at.device)
    four = (at - cell).unsqueeze(-1) ** power @ CUBIC.to(at)
    return at.new_zeros(*at.shape, size).scatter(-1, cell.unsqueeze(-1) + power, four)
