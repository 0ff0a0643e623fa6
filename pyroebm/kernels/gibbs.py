"""Gibbs samplers: draw one site, or one Gibbs block of sites, from its conditional."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from pyroebm.core.conditionals import blocks_of, conditional_of
from pyroebm.core.energy import Energy
from pyroebm.core.rng import drawing_from
from pyroebm.kernels.base import Info, PointState, choose, rows, uniform_like
from pyroebm.kernels.sites import DiscreteKernel, draw_index, to_sites, values_of

__all__ = ["BlockGibbs", "Gibbs"]


def point_state(energy: Energy, x: Tensor) -> PointState:
    """Compute energies at starting positions; raise ValueError unless all are finite."""
    with torch.no_grad():
        values = energy(x)
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"chains must start where the energy is finite: {int(bad.sum())} of {len(x)} rows of x"
            f" are not, the first is row {row} with x={x[row].tolist()} and energy"
            f" {float(values[row])}; start from energy.initial(n)"
        )
    return PointState(x.detach(), values)


@dataclasses.dataclass(frozen=True, eq=False)
class Gibbs(DiscreteKernel[PointState]):
    r"""Single-site Gibbs sampling (Geman and Geman, 1984): exact, on any discrete support.

    .. math:: x_i \sim p(x_i \mid x_{-i}) \propto e^{-E(x_i,\, x_{-i})}

    The conditionals are those of :meth:`pyroebm.Energy.site_logits`: the energy of all K values of
    a site is evaluated in one call of K times the chains, unless the energy overrides the method
    with a faster one. One step updates as many sites as there are. A value of energy
    :math:`+\infty` has probability 0. A site with a NaN or :math:`-\infty` among its energies is
    not updated, and its chain counts as diverging.

    Args:
        scan: "systematic" updates all sites in order; "random" draws the site of each update
            independently for each chain, which is reversible.

    Raises:
        ValueError: if ``scan`` is neither.

    Example:
        >>> from pyroebm.energies import Ising
        >>> kernel, energy = Gibbs(), Ising((4, 4), coupling=0.4)
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape, info.n_steps[0]
        (torch.Size([8, 4, 4]), tensor(16))
    """

    scan: Literal["systematic", "random"] = "systematic"

    def __post_init__(self) -> None:
        if self.scan not in ("systematic", "random"):
            raise ValueError(
                f'Gibbs: scan must be "systematic" or "random", got scan={self.scan!r}'
            )

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> PointState:
        """Return the state at ``x``, with its energies."""
        self.check_start(energy, x)
        values_of(energy, x)
        return point_state(energy, x)

    def step(
        self, energy: Energy, state: PointState, generator: torch.Generator | None = None
    ) -> tuple[PointState, Info]:
        """Run one sweep: draw each site from its conditional."""
        values = values_of(energy, state.x)
        x = to_sites(state.x, values).clone()
        row, rejected = torch.arange(len(x), device=x.device), torch.zeros_like(state.energy)
        noise = uniform_like(x[..., 0], generator)
        order = self._order(noise, generator)
        with torch.no_grad():
            for site, u in zip(order.unbind(1), noise.unbind(1), strict=True):
                logits = energy.site_logits(x.reshape(state.x.shape), site)
                if logits.shape != (len(x), len(values)):
                    raise ValueError(
                        f"{type(energy).__name__}.site_logits must return shape (chains, values) ="
                        f" {(len(x), len(values))}, got {tuple(logits.shape)}"
                    )
                legal = (logits < torch.inf).all(1) & (logits > -torch.inf).any(1)
                drawn = values[draw_index(torch.softmax(logits, 1), u)]
                x[row, site] = torch.where(legal.unsqueeze(1), drawn, x[row, site])
                rejected += ~legal
            return swept(energy, state, x, rejected, order.shape[1])

    def _order(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        chains, sites = noise.shape
        if self.scan == "systematic":
            return torch.arange(sites, device=noise.device).expand(chains, sites)
        return (uniform_like(noise, generator) * sites).long().clamp(max=sites - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockGibbs(DiscreteKernel[PointState]):
    r"""Block Gibbs sampling (Jensen, Kong and Kjaerulff, 1995): exact.

    .. math:: x_B \sim p(x_B \mid x_{-B})

    for each Gibbs block B in turn, all of its entries at once. An energy defines its blocks by the
    attribute ``blocks`` and the method ``conditional`` of
    :class:`pyroebm.core.conditionals.HasBlocks`: for example the halves of a checkerboard, or the
    layers of a Boltzmann machine. A chain whose draw has a non-finite energy keeps its previous
    state and counts as diverging.

    Example:
        >>> from pyroebm.energies import Ising
        >>> kernel, energy = BlockGibbs(), Ising((4, 4), coupling=0.4)
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape, info.n_steps[0]
        (torch.Size([8, 4, 4]), tensor(2))
    """

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> PointState:
        """Return the state at ``x``, with its energies.

        Raises:
            ValueError: if the energy has no Gibbs blocks, or if they do not cover each entry once.
        """
        self.check_start(energy, x)
        blocks = blocks_of(energy)
        if not blocks:
            raise ValueError(
                "BlockGibbs requires an energy with an attribute blocks and a method"
                f" conditional(block, x), but {type(energy).__name__} has none; Gibbs() draws one"
                " site at a time from any discrete energy"
            )
        covered = torch.zeros(energy.event_shape.numel(), dtype=torch.long)
        for index in blocks.values():
            covered[index if isinstance(index, slice) else index.cpu()] += 1
        if not bool((covered == 1).all()):
            raise ValueError(
                f"the blocks of {type(energy).__name__} must cover each entry of an event once,"
                f" got {list(blocks)}"
                f" covering entry {int((covered != 1).nonzero()[0])}"
                f" {int(covered[covered != 1][0])} times"
            )
        return point_state(energy, x)

    def step(
        self, energy: Energy, state: PointState, generator: torch.Generator | None = None
    ) -> tuple[PointState, Info]:
        """Run one sweep: draw each Gibbs block from its conditional."""
        blocks, x = blocks_of(energy), rows(state.x).clone()
        with torch.no_grad():
            for name, index in blocks.items():
                with drawing_from(generator):
                    drawn = conditional_of(energy, name, x.reshape(state.x.shape)).sample()
                if drawn.shape[0] != len(x) or drawn[0].numel() != x[0, index].numel():
                    raise ValueError(
                        f"{type(energy).__name__}.conditional({name!r}, x) must draw"
                        f" {x[0, index].numel()} entries for each of"
                        f" {len(x)} chains, got a draw of shape {tuple(drawn.shape)}"
                    )
                x[:, index] = rows(drawn)
            return swept(energy, state, x, torch.zeros_like(state.energy), len(blocks))


def swept(
    energy: Energy, state: PointState, x: Tensor, rejected: Tensor, updates: int
) -> tuple[PointState, Info]:
    """Return the state and report after a sweep.

    Args:
        energy: the target.
        state: the state before the sweep.
        x: positions after the sweep, in any layout.
        rejected: number of updates that were rejected in each chain, shape ``(chains,)``.
        updates: number of updates of a sweep.
    """
    x = x.reshape(state.x.shape)
    values = energy(x)
    finite = torch.isfinite(values)
    new = choose(finite, PointState(x, values), state)
    return new, Info(
        acceptance_rate=finite * (1.0 - rejected / updates),
        accepted=(rows(new.x) != rows(state.x)).any(1),
        diverging=~finite | (rejected > 0),
        energy=new.energy,
        n_steps=torch.full_like(finite, updates, dtype=torch.long),
    )
