"""Lattice models: Ising and Potts, with log Z by the transfer matrix for narrow lattices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import OneHotCategorical
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyroebm.core.conditionals import sites_of
from pyroebm.core.energy import Energy
from pyroebm.core.spins import SpinBernoulli
from pyroebm.core.supports import site_values, spin

__all__ = ["Ising", "Lattice", "Potts"]

#: Maximum size of the transfer matrix: the number of states of one row of the lattice.
MAX_STATES = 1024


class Lattice(Energy):
    r"""Sites on a chain or a square lattice with equal couplings between nearest neighbors.

    .. math:: E(x) = -J \sum_{\langle i j \rangle} x_i \cdot x_j - \sum_i h_i \cdot x_i

    with a vector :math:`x_i` at each site.

    Args:
        shape: sides of the lattice, one or two.
        width: number of entries of one site: 1, or K for one-hot sites.
        support: constraint of an event.
        coupling: :math:`J`, in nats.
        field: :math:`h`, in nats, a number or a tensor that broadcasts to the event.
        periodic: whether opposite borders are neighbors (a ring, a torus).
        dtype: floating-point type; None for torch's default.

    Attributes:
        blocks: the two halves of the checkerboard, "even" and "odd", as indices into the flat
            event, for :class:`pyroebm.kernels.BlockGibbs`. Empty if a periodic side has an odd
            length, since there is no checkerboard then.

    Raises:
        ValueError: if ``shape`` does not have one or two sides, if a side is too short, or if a
            number is not finite.

    Example:
        >>> isinstance(Ising((3, 3)), Lattice)
        True
    """

    field: Tensor
    coupling: Tensor
    neighbors: Tensor
    bonds: Tensor
    blocks: dict[str, Tensor]

    def __init__(
        self,
        shape: Sequence[int],
        event_shape: Sequence[int],
        support: Constraint,
        coupling: float,
        field: Any,
        periodic: bool,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(event_shape, support)
        self.shape, self.periodic = torch.Size(shape), periodic
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("coupling", torch.as_tensor(coupling, dtype=dtype))
        self.register_buffer(
            "field", _broadcast(torch.as_tensor(field, dtype=dtype), self.event_shape)
        )
        if (
            self.coupling.dim()
            or not bool(torch.isfinite(self.coupling))
            or not bool(torch.isfinite(self.field).all())
        ):
            raise ValueError(
                f"coupling must be one finite number and field finite, got coupling={coupling},"
                f" field={field}"
            )
        neighbors, bonds = _neighbors(self.shape, periodic)
        self.register_buffer("neighbors", neighbors)
        self.register_buffer("bonds", bonds.to(dtype))
        self.blocks: dict[str, Tensor] = {}
        if not periodic or all(side % 2 == 0 for side in self.shape):
            color = (
                torch.stack(
                    torch.meshgrid(*[torch.arange(side) for side in self.shape], indexing="ij")
                )
                .sum(0)
                .flatten()
                % 2
            )
            entries = torch.arange(self.event_shape.numel()).reshape(len(color), -1)
            self.blocks = {
                "even": entries[color == 0].flatten(),
                "odd": entries[color == 1].flatten(),
            }

    def _values(self) -> Tensor:
        return site_values(self.support, self.event_shape, self.dtype, self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        batch = self.batch_shape(x)
        sites = x.reshape(*batch, *self.shape, -1)
        bonds = torch.zeros(batch, dtype=x.dtype, device=x.device)
        for axis, side in enumerate(self.shape, start=len(batch)):
            pairs = sites * sites.roll(-1, axis)
            bonds = bonds + (pairs if self.periodic else pairs.narrow(axis, 0, side - 1)).flatten(
                len(batch)
            ).sum(-1)
        return -self.coupling * bonds - (self.field * x).flatten(len(batch)).sum(-1)

    def local_field(self, x: Tensor, site: Tensor) -> Tensor:
        r"""Return the local field :math:`J \sum_{j \sim i} x_j + h_i` of given sites.

        Args:
            x: states, shape ``(chains, *event)``.
            site: numbers of the sites, shape ``(chains, n)``, int64.

        Returns:
            shape ``(chains, n, width)``.
        """
        sites = x.reshape(len(x), self.shape.numel(), -1)
        row = torch.arange(len(x), device=x.device)[:, None, None]
        around = (sites[row, self.neighbors[site]] * self.bonds[site].unsqueeze(-1)).sum(2)
        return self.coupling * around + self.field.reshape(sites.shape[1:])[site]

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the values of one site of each chain, ``(chains, K)``."""
        return self.local_field(x, site.unsqueeze(1)).squeeze(1) @ self._values().mT

    def _block_field(self, block: str, x: Tensor) -> Tensor:
        if block not in self.blocks:
            raise ValueError(f"block must be one of {list(self.blocks)}, got block={block!r}")
        sites = x.reshape(len(x), *self.shape, -1)
        around = torch.zeros_like(sites)
        for axis, side in enumerate(self.shape, start=1):
            for shift, border in ((1, 0), (-1, side - 1)):
                near = sites.roll(shift, axis)
                if not self.periodic:
                    near.select(axis, border).zero_()
                around += near
        field = self.coupling * around + self.field.reshape(sites.shape[1:])
        numbers = sites_of(self.blocks[block], self.event_shape, sites.shape[-1])
        return field.flatten(1, -2)[:, numbers.to(x.device)]

    @property
    def log_z(self) -> float | None:
        r"""Log Z in nats by the transfer matrix in float64 (Kramers and Wannier, 1941).

        None if a row along the shorter side has more than 1,024 states (Ising: 10 spins), or if the
        energy of a row exceeds 300 nats, since its exponential could then overflow.
        """
        values = self._values().double().cpu()
        field = self.field.double().cpu().reshape(*self.shape, -1)
        if len(self.shape) == 1:
            field = field.unsqueeze(1)
        elif self.shape[0] < self.shape[1]:
            field = field.transpose(0, 1)
        side = field.shape[1]
        if len(values) ** side > MAX_STATES:
            return None
        states = torch.tensor(list(itertools.product(range(len(values)), repeat=side)))
        rows = values[states]  # (states of a row, side, width)
        coupling = float(self.coupling)
        across = coupling * rows.flatten(1) @ rows.flatten(1).mT
        along = (
            (rows * rows.roll(-1, 1)).sum(2)
            if side > 1
            else torch.zeros(len(rows), 1, dtype=torch.float64)
        )
        within = coupling * (along if self.periodic else along[:, : side - 1]).sum(1)
        weights = within + (field.flatten(1) @ rows.flatten(1).mT)  # (length, states)
        if max(float(across.abs().max()), float(weights.abs().max())) > 300.0:
            return None
        transfer, log_scale = torch.exp(across), 0.0
        start = torch.exp(weights[0])
        product = torch.diag(start) if self.periodic else start.unsqueeze(0)
        for weight in weights[1:]:
            product = (product @ transfer) * torch.exp(weight)
            scale = float(product.max())
            product, log_scale = product / scale, log_scale + math.log(scale)
        total = (product * transfer).sum() if self.periodic else product.sum()
        return float(total.log()) + log_scale


class Ising(Lattice):
    r"""The Ising model (Ising, 1925) on a chain or a square lattice, with spins -1 and +1.

    .. math:: E(x) = -J \sum_{\langle i j \rangle} x_i x_j - \sum_i h_i x_i

    Couplings are in units of the temperature: J is :math:`J / k T`. The critical coupling of the
    square lattice is :math:`J = \tfrac12 \log(1 + \sqrt 2) \approx 0.4407` (Onsager, 1944).

    Args:
        shape: sides of the lattice, ``(L,)`` or ``(L1, L2)``; the event shape.
        coupling: :math:`J`, positive for a ferromagnet.
        field: :math:`h`, a number or one for each site.
        periodic: whether the lattice is a ring or torus; otherwise its borders are open.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``shape`` does not have one or two sides, if a side is too short, or if a
            number is not finite.

    Example:
        >>> e = Ising((3, 3), coupling=0.2)
        >>> e(torch.ones(1, 3, 3)), round(e.log_z, 6)
        (tensor([-3.6000]), 6.669745)
    """

    def __init__(
        self,
        shape: Sequence[int],
        coupling: float = 1.0,
        field: Any = 0.0,
        *,
        periodic: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(_sides(shape, periodic), shape, spin, coupling, field, periodic, dtype)

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of the spins of half a checkerboard given the other half.

        Args:
            block: ``"even"`` or ``"odd"``.
            x: states, shape ``(chains, *event)``.
        """
        spins: Distribution = SpinBernoulli(
            self._block_field(block, x).squeeze(2), validate_args=False
        ).to_event(1)
        return spins


class Potts(Lattice):
    r"""The Potts model (Potts, 1952): each site has one of q colors, :math:`x_i` one-hot.

    .. math:: E(x) = -J \sum_{\langle i j \rangle} x_i \cdot x_j - \sum_i h_i \cdot x_i

    where :math:`x_i \cdot x_j` is 1 for equal colors, else 0. With two colors it is an Ising model
    of half the coupling. The critical coupling of the square lattice is :math:`J = \log(1 + \sqrt
    q)`.

    Args:
        shape: sides of the lattice, ``(L,)`` or ``(L1, L2)``; the event shape is ``(*shape, q)``.
        num_colors: q >= 2.
        coupling: :math:`J`, positive for a ferromagnet.
        field: :math:`h`, a number, one for each color ``(q,)``, or ``(*shape, q)``.
        periodic: whether the lattice is a ring or torus; otherwise its borders are open.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``shape`` does not have one or two sides, if a side or q is too small, or if
            a number is not finite.

    Example:
        >>> e = Potts((3,), num_colors=3, coupling=0.0)
        >>> e.event_shape, round(e.log_z, 6)  # log 27
        (torch.Size([3, 3]), 3.295837)
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_colors: int,
        coupling: float = 1.0,
        field: Any = 0.0,
        *,
        periodic: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_colors < 2:
            raise ValueError(f"num_colors must be at least 2, got num_colors={num_colors}")
        sides = _sides(shape, periodic)
        super().__init__(
            sides, (*sides, num_colors), constraints.one_hot, coupling, field, periodic, dtype
        )

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of the colors of half a checkerboard given the other half.

        Args:
            block: ``"even"`` or ``"odd"``.
            x: states, shape ``(chains, *event)``.
        """
        colors: Distribution = OneHotCategorical(
            logits=self._block_field(block, x), validate_args=False
        ).to_event(1)
        return colors


def _sides(shape: Sequence[int], periodic: bool) -> tuple[int, ...]:
    # in a ring of two sites there would be two bonds between the same sites
    shortest = 3 if periodic else 1
    if len(shape) not in (1, 2) or any(side < shortest for side in shape):
        raise ValueError(
            f"shape must have one or two sides, each at least {shortest}"
            f" {'on a torus' if periodic else 'with open borders'}, got"
            f" shape={tuple(shape)}"
        )
    return tuple(shape)


def _broadcast(field: Tensor, shape: torch.Size) -> Tensor:
    try:
        return field.expand(shape).clone()
    except RuntimeError:
        raise ValueError(
            f"field must broadcast to the event shape {tuple(shape)}, got shape"
            f" {tuple(field.shape)}"
        ) from None


def _neighbors(shape: torch.Size, periodic: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers of the neighbors of each site, and whether each bond exists.

    Bonds across an open border do not exist. Both have shape ``(sites, 2 * dims)``.
    """
    number = torch.arange(shape.numel()).reshape(shape)
    found, bonds = [], []
    for axis, side in enumerate(shape):
        place = (
            torch.arange(side)
            .reshape([-1 if a == axis else 1 for a in range(len(shape))])
            .expand(shape)
        )
        for shift, border in ((1, 0), (-1, side - 1)):
            found.append(number.roll(shift, axis).flatten())
            bonds.append((place != border).flatten() | periodic)
    return torch.stack(found, 1), torch.stack(bonds, 1)
