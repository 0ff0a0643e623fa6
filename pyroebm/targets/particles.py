"""Systems of particles with fixed center of mass: double-well and Lennard-Jones potentials."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core.supports import mean_free_basis
from pyroebm.targets.base import Target, check_positive

__all__ = ["DW4", "LennardJones", "Particles"]


class Particles(Target):
    r"""n equal particles in k dimensions with the center of mass at the origin.

    The energy is a function of their distances. An event is :math:`u \in R^{(n - 1) k}`, and the
    positions are :math:`x = B u` with B Helmert's orthonormal basis of the configurations of mean
    zero. Densities are with respect to volume in that subspace, so no direction is flat (Köhler,
    Klein and Noé, "Equivariant Flows", 2020). Only the mean is known, by symmetry: it is 0.

    Args:
        num_particles: n, at least 2.
        space: k, at least 1.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> target = DW4()
        >>> x = target.positions(torch.randn(5, 6))
        >>> x.shape, bool(x.mean(1).abs().max() < 1e-6)
        (torch.Size([5, 4, 2]), True)
    """

    basis: Tensor
    ends: Tensor

    def __init__(self, num_particles: int, space: int, *, dtype: torch.dtype | None = None) -> None:
        if num_particles < 2 or space < 1:
            raise ValueError(
                f"num_particles must be at least 2 and space at least 1, got"
                f" num_particles={num_particles},"
                f" space={space}"
            )
        super().__init__(((num_particles - 1) * space,))
        self.num_particles, self.space = num_particles, space
        self.register_buffer("basis", mean_free_basis(num_particles, dtype))
        self.register_buffer(
            "ends", torch.triu_indices(num_particles, num_particles, 1), persistent=False
        )

    def positions(self, u: Tensor) -> Tensor:
        """Return the positions, with mean zero: ``(*batch, (n - 1) k) -> (*batch, n, k)``."""
        return self.basis @ u.reshape(*self.batch_shape(u), self.num_particles - 1, self.space)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of centered positions: ``(*batch, n, k) -> (*batch, (n - 1) k)``.

        Raises:
            ValueError: if ``x`` has another shape.
        """
        if x.shape[-2:] != (self.num_particles, self.space):
            raise ValueError(
                f"x must have shape (*batch, {self.num_particles}, {self.space}), got shape"
                f" {tuple(x.shape)}"
            )
        return (self.basis.mT @ x).flatten(-2)

    def squared_distances(self, x: Tensor) -> Tensor:
        """Return the squared distance of each pair, shape ``(*batch, n (n - 1) / 2)``."""
        return (x[..., self.ends[0], :] - x[..., self.ends[1], :]).square().sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number(torch.zeros(self.event_shape))

    def _place(
        self, num_chains: int, generator: torch.Generator | None, radius: float, apart: float
    ) -> Tensor:
        """Place particles one after the other in a ball, with a minimum distance if possible.

        Each is placed at the first of 256 random points that keeps the distance ``apart`` from the
        others, or else at the one that is farthest from them.
        """
        if num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got num_chains={num_chains}")
        x = self._normal((num_chains, 0, self.space), generator)
        for _ in range(self.num_particles):
            tries = self._normal((num_chains, 256, self.space), generator)
            depth = self._uniform((num_chains, 256, 1), generator) ** (1.0 / self.space)
            tries = radius * depth * tries / tries.norm(dim=-1, keepdim=True)
            nearest = (
                torch.cdist(tries, x).amin(-1)
                if x.shape[1]
                else torch.full(tries.shape[:2], math.inf).to(tries)
            )
            clear = nearest >= apart
            chosen = torch.where(clear.any(1), clear.to(torch.int8).argmax(1), nearest.argmax(1))
            x = torch.cat([x, tries[torch.arange(num_chains), chosen].unsqueeze(1)], 1)
        return self.coordinates(x.to(self.dtype))


class DW4(Particles):
    r"""Four particles in the plane with a double-well pair potential (Köhler, Klein and Noé, 2020).

    .. math:: E = \sum_{i<j} a (d_{ij} - d_0) + b (d_{ij} - d_0)^2 + c (d_{ij} - d_0)^4,
        \qquad a = 0, \quad b = -4, \quad c = 0.9, \quad d_0 = 4

    Each pair counts once, as in the paper's :math:`\frac{1}{2 \tau} \sum_{i,j}` at :math:`\tau =
    1`.

    Args:
        dtype: floating-point type; None for torch's default.

    Example:
        >>> e = DW4()
        >>> square = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
        >>> round(float(e(e.coordinates(square))), 4)  # four sides at d0, two diagonals
        -8.3966
    """

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(4, 2, dtype=dtype)

    def forward(self, u: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        off = self.squared_distances(self.positions(u)).sqrt() - 4.0
        return (off.square() * (0.9 * off.square() - 4.0)).sum(-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self._place(num_chains, generator, radius=4.0, apart=1.5)


class LennardJones(Particles):
    r"""Lennard-Jones particles with a harmonic potential around their center of mass.

    .. math::

        E = \epsilon \sum_{pairs} \big(r^{-12} - 2 r^{-6}\big) + \frac12 \sum_i |x_i - \bar x|^2

    The system is that of Köhler, Klein and Noé (2020). Publications use two conventions, which
    differ by a factor of two in the first sum; report which one is used.

    Args:
        pairs: "once" sums over :math:`i < j`, "twice" over all :math:`i \ne j`.
        num_particles: number of particles; 13 and 55 are common.
        epsilon: depth of the pair potential, in units of kT.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``pairs`` is another string, or if a number is out of its range.

    Example:
        >>> e = LennardJones("once", num_particles=2)
        >>> x = e.coordinates(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> round(float(e(x)), 6)  # -1 and two springs of 1/8
        -0.75
    """

    def __init__(
        self,
        pairs: str,
        num_particles: int = 13,
        epsilon: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if pairs not in ("once", "twice"):
            raise ValueError(f'pairs must be "once" or "twice", got pairs={pairs!r}')
        check_positive(epsilon=epsilon)
        super().__init__(num_particles, 3, dtype=dtype)
        self.convention, self.epsilon = pairs, float(epsilon)

    def forward(self, u: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        sixth = self.squared_distances(self.positions(u)) ** -3
        depth = self.epsilon * (2.0 if self.convention == "twice" else 1.0)
        return depth * (sixth * (sixth - 2.0)).sum(-1) + 0.5 * u.square().sum(-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self._place(
            num_chains, generator, radius=0.75 * self.num_particles ** (1.0 / 3.0), apart=0.85
        )

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"pairs={self.convention!r}, epsilon={self.epsilon:g}"
