"""A continuous flow of identical particles, equivariant under their symmetries."""

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

#: Polynomial coefficients of 1, f, f^2, f^3 for f in [0, 1], of a uniform cubic B-spline on a cell,
#: given its four coefficients there.
CUBIC = (
    torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]], dtype=torch.float64)
    / 6.0
)


#: cells of the splines in time
NUM_STAGES = 6


class PairField(Bijection):
    r"""The flow map, from time 0 to 1, of a velocity that is a sum over pairs of particles.

    .. math:: \dot x_i = a(t)\, x_i + \frac1n \sum_{j \ne i} \phi(s_{ij}, t)\, (x_i - x_j), \qquad
        s_{ij} = \log\bigl(1 + |x_i - x_j|^2 / \ell^2\bigr)

    where a and :math:`\phi` are cubic splines. In the coordinates u of mean-free configurations, x
    = B u with orthonormal B, a difference :math:`r_{ij} = (b_i - b_j) u` has :math:`|b_i - b_j|^2 =
    2`, so that

    .. math::

        \nabla_u \cdot \dot u = (n - 1)\, k\, a + \frac2n \sum_{i<j}
        \Bigl(k\, \phi + |r_{ij}|\, \frac{\partial \phi}{\partial |r_{ij}|}\Bigr)

    Both are integrated by the fourth-order Runge-Kutta method, for the inverse backwards in time.
    The error decreases with the fourth power of the number of steps, until the discontinuities in
    the third derivatives of the splines dominate.

    Args:
        num_particles: as in :class:`EquivariantFlow`, like all arguments.
        space: number of dimensions.
        reach: largest distance of interacting pairs.
        length: :math:`\ell`.
        num_cells: cells of :math:`\phi` in s.
        num_steps: number of integration steps.
        scale: initial scale.
        dtype: dtype of the parameters; None is torch's default.

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
        num_steps: int = 20,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        minima = {"num_particles": 2, "space": 1, "num_cells": 1, "num_steps": 1}
        check_counts(minima, num_particles, space, num_cells, num_steps)
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
        self.weights = nn.Parameter(torch.zeros(NUM_STAGES + 3, 1 + num_cells, dtype=basis.dtype))
        nn.init.constant_(self.weights[:, 0], math.log(scale))

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        return self._integrate(z, 1.0)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        z, log_det = self._integrate(x, -1.0)
        return z, -log_det

    def features(self, u: Tensor, t: Tensor) -> Tensor:
        r"""Return the features of the velocity, which is linear in the weights.

        .. math:: \dot u = \sum_{qm} f_{qm}(u, t)\, w_{qm}

        Args:
            u: coordinates, shape ``(rows, dim)``.
            t: times in [0, 1], shape ``(rows,)``.

        Returns:
            The features f, shape ``(rows, dim, *weights.shape)``.
        """
        check_event(u, self.dim)
        axes, at = self._by_axis(u), t * (len(self.weights) - 3)
        r, _, at_pairs = self._pairs(axes)
        cell = at.detach().long().clamp(0, len(self.weights) - 4)
        in_time = _basis_splines(at, cell, len(self.weights))
        cells = self.weights.shape[1] - 1
        cell = at_pairs.detach().long().clamp(0, cells)
        # the last columns are basis splines beyond the reach, whose coefficients are 0
        in_space = _basis_splines(at_pairs, cell, cells + 4)[..., :cells] / self.num_particles
        pairs = torch.einsum("rkp,rpm,pi->rikm", r, in_space, self.incidence).reshape(
            *u.shape, cells
        )
        return in_time[:, None, :, None] * torch.cat([u.unsqueeze(-1), pairs], -1)[:, :, None, :]

    def _by_axis(self, u: Tensor) -> Tensor:
        """Reshape ``(*batch, dim)`` to ``(rows, k, n - 1)``."""
        return u.reshape(-1, self.num_particles - 1, self.space).mT.contiguous()

    def _integrate(self, u: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Integrate the velocity over the time interval, and the divergence along the path."""
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
        """Return a and the polynomials of phi at the times of all half steps.

        The polynomials are those of all cells and of one more beyond the reach, which is 0.
        """
        stages, cubic = len(self.weights) - 3, CUBIC.to(self.weights)
        at = torch.arange(2 * self.num_steps + 1, dtype=cubic.dtype, device=cubic.device) * (
            stages / (2 * self.num_steps)
        )
        now = _basis_splines(at, at.long().clamp(max=stages - 1), stages + 3) @ self.weights
        phi = nn.functional.pad(now[:, 1:], (0, 4)).unfold(1, 4, 1) @ (cubic.T / self.num_particles)
        return list(zip(now[:, 0], phi, strict=True))

    def _pairs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the differences of all pairs, their squares, and their positions in the cells.

        Shapes are ``(rows, k, pairs)``, ``(rows, pairs)`` and ``(rows, pairs)``.
        """
        r = u @ self.incidence.T
        squared = r.square().sum(1)
        return r, squared, torch.log1p(squared / self.length**2) / self.width

    def _velocity(self, u: Tensor, a: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocity and divergence: ``(rows, k, n - 1) -> (rows, k, n - 1), (rows,)``."""
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
        velocity = a * u + (phi.unsqueeze(1) * r) @ self.incidence
        return velocity, self.dim * a + 2.0 * (self.space * phi + slope).sum(-1)


class EquivariantFlow(Flow):
    r"""A continuous flow of n identical particles in k dimensions (Köhler, Klein and Noé, 2020).

    .. math:: x = x(1), \quad x(0) = B z, \quad z \sim N(0, I), \qquad
        \log q(u) = \log N(z \mid 0, I) - \int_0^1 \nabla_u \cdot \dot u\, dt

    with the velocity of :class:`PairField`, a sum over pairs. An event is :math:`u \in R^{(n - 1)
    k}` with positions x = B u, the coordinates of :class:`pyroebm.targets.Particles`, without the
    center of mass. The density is invariant under rotations, reflections and permutations of the
    particles, as their energy is, since the base is invariant and the velocity equivariant.

    The density has an integration error: compare it at ``flow.num_steps`` and at half of them. With
    too few steps, training may exploit this error. Initialize the flow by
    :func:`pyroebm.objectives.match_flow`.

    Args:
        num_particles: n, at least 2.
        space: k, number of dimensions, at least 1.
        reach: distance beyond which pairs do not interact.
        length: :math:`\ell`, the length scale of s, below which the cells of the splines in the
            distance do not become narrower.
        num_cells: number of cells of :math:`\phi` in s.
        num_steps: number of integration steps, which can be changed: ``flow.num_steps = 60``.
        scale: initial scale: the untrained flow is the base times this.
        dtype: dtype of the parameters; None is torch's default.

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
            num_steps=num_steps,
            scale=scale,
            dtype=dtype,
        )
        super().__init__([field], field.dim, field.dim)

    @property
    def field(self) -> PairField:
        """The layer that transforms the particles."""
        return cast(PairField, self.transform.parts[0])

    @property
    def num_steps(self) -> int:
        """Number of integration steps."""
        return self.field.num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        check_counts({"num_steps": 1}, num_steps)
        self.field.num_steps = num_steps


def _basis_splines(at: Tensor, cell: Tensor, size: int) -> Tensor:
    """Evaluate all basis splines, of which four are not 0: ``(*batch) -> (*batch, size)``."""
    power = torch.arange(4, device=at.device)
    four = (at - cell).unsqueeze(-1) ** power @ CUBIC.to(at)
    return at.new_zeros(*at.shape, size).scatter(-1, cell.unsqueeze(-1) + power, four)
