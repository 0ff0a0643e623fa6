"""Persistent contrastive divergence: chains, or a buffer of them, that go on from batch to
batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import subset, uniform
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.kernels.base import Kernel
from pyroebm.objectives.base import Objective
from pyroebm.objectives.contrastive import (
    Facts,
    HasMeanField,
    Initial,
    about,
    advance,
    check_batch,
    check_chain,
    difference,
    joined,
    stacked,
    starts,
)
from pyroebm.objectives.layered import (
    Kept,
    Ladder,
    contrast,
    draw_even,
    draw_odd,
    mean_field,
    odd_fields,
    visible,
)

__all__ = ["PersistentCD", "ReplayBufferCD"]


class _Persistent(Objective):
    """Chains that go on from batch to batch: a buffer, so that ``state_dict`` has them."""

    chains: Tensor | None

    def __init__(self, num_chains: int, k: int) -> None:
        super().__init__()
        check_counts({"num_chains": 1, "k": 1}, num_chains, k)
        self.num_chains = num_chains
        self.k = k
        self.register_buffer("chains", None)

    def _check_chains(self, energy: Energy, chains: Tensor, shape: tuple[int, ...]) -> None:
        if (
            tuple(chains.shape) != shape
            or chains.dtype != energy.dtype
            or chains.device != energy.device
        ):
            raise ValueError(
                f"chains must have shape {shape}, {energy.dtype}, on {energy.device} for"
                f" {type(energy).__name__} and these"
                f" settings, got {tuple(chains.shape)}, {chains.dtype}, on {chains.device}: they"
                " are of another machine or"
                " objective. Set chains = None to start anew"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}chains" in state_dict:  # a buffer that is None takes no state
            self.chains = torch.empty_like(state_dict[f"{prefix}chains"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class PersistentCD(_Persistent):
    r"""Persistent contrastive divergence of machines of layers (Tieleman, 2008; Younes, 1989):
    block Gibbs chains that go on from batch to batch.

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1m \sum_j E(\tilde x_j)

    with :math:`\tilde x_j` the state of chain j after k more sweeps, held fixed. With a frozen
    energy the chains converge, and :math:`\nabla L` is then an unbiased estimate of :math:`-\nabla
    \log p`. Layers are treated as in :class:`ContrastiveDivergence`; a step of PCD-1 takes five
    products with a matrix of weights, four of them in pairs. Other energies, and other moves than
    block Gibbs, are for :class:`ReplayBufferCD`.

    With ``betas`` the machine has replicas at lower inverse temperatures, whose states are swapped
    after each sweep with probability :math:`\min(1, e^{(\beta_k - \beta_l)(E_k - E_l)})`
    (Desjardins et al., 2010; Cho, Raiko and Ilin, 2010): chains cross barriers that the first
    replica does not. Only the replica at 1 enters the loss.

    Args:
        num_chains: m, the chains that go on at a batch.
        k: sweeps for each batch.
        betas: inverse temperatures, falling from 1; None is the one at 1.

    Attributes:
        chains: states of the odd layers ``(rows, units)``, with ``num_chains`` rows for each
            temperature; None before the first batch. A buffer, so ``state_dict`` has it.

    Raises:
        ValueError: if a number is out of range, ``betas`` do not fall from 1, the energy is no
            machine of layers, or a batch does not fit it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, objective = BernoulliRBM(4, 3), PersistentCD(num_chains=10)
        >>> loss, facts = objective(
        ...     rbm, torch.ones(5, 4), generator=torch.Generator().manual_seed(0)
        ... )
        >>> objective.chains.shape, list(objective.state_dict())
        (torch.Size([10, 3]), ['chains'])
    """

    def __init__(
        self, num_chains: int = 100, k: int = 1, *, betas: Sequence[float] | None = None
    ) -> None:
        super().__init__(num_chains, k)
        self.ladder = None if betas is None else Ladder(betas, num_chains)

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: those of :class:`ContrastiveDivergence` for layers, and
        ``swap_rate`` with ``betas``."""
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                f"PersistentCD sweeps machines of layers, and {type(energy).__name__} is none:"
                " give ReplayBufferCD(num_chains, k, kernel)"
            )
        layers, n = energy.layers(), len(batch)
        facts: Facts = {}
        with torch.no_grad():
            data = mean_field(layers, visible(layers, batch, type(energy).__name__))
            x: Kept = self._odd(energy, layers, generator)
            for sweep in range(self.k):
                if self.ladder is not None:
                    x, facts["swap_rate"] = self.ladder.sweep(layers, x, generator)
                    continue
                x = draw_odd(layers, odd_fields(layers, x), generator) if sweep else x
                x = draw_even(layers, x, generator)
            even = stacked(
                data, [None if layer is None else layer[: self.num_chains] for layer in x]
            )
            fields = odd_fields(layers, even)  # of data and chains in one product each
            odd = (
                draw_odd(layers, {k: f[n:] for k, f in fields.items()}, generator)
                if self.ladder is None
                else x
            )
            self.chains = joined([odd[layer] for layer in layers.sides()[1]])
        loss, seen = contrast(layers, even, fields, n)
        return loss, facts | seen

    def _odd(
        self, energy: LayeredMachine, layers: Layers, generator: torch.Generator | None
    ) -> Kept:
        """The odd layers of all chains; at first from the field of the even ones in
        ``energy.initial``."""
        replicas = 1 if self.ladder is None else len(self.ladder.betas)
        if self.chains is not None:
            units = sum(layers.sizes[layer] for layer in layers.sides()[1])
            self._check_chains(energy, self.chains, (replicas * self.num_chains, units))
            return layers.place(self.chains, layers.sides()[1])
        first = energy.initial(replicas * self.num_chains, generator)
        even: Kept = layers.split(first) if isinstance(energy, LayeredEnergy) else [first, None]
        return draw_odd(layers, odd_fields(layers, even), generator)


class ReplayBufferCD(_Persistent):
    r"""Persistent contrastive divergence of any energy, by a kernel, with a buffer of chains (Du
    and Mordatch, 2019; Younes, 1989).

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1m \sum_j E(\tilde x_j)

    with :math:`\tilde x_j` the state of chain j after k more steps, held fixed. With
    ``buffer_size`` there are more chains than a batch moves: m of them, drawn without replacement,
    go on and are written back to where they were, the others wait. With ``restart`` a chain that
    goes on begins anew at times: modes that the energy has given up are found again, at the price
    of chains that have not converged.

    The hidden units of a :class:`~pyroebm.energies.BoltzmannMachine` are summed out by mean field
    in the data where ``batch`` has its visible ones alone (Salakhutdinov, 2008); the chains' are
    drawn. Machines of layers have block Gibbs sampling in :class:`PersistentCD`.

    Args:
        num_chains: m, the chains that go on at a batch.
        k: steps for each batch.
        kernel: as in :class:`ContrastiveDivergence`.
        buffer_size: number of chains in all, at least m; None is m.
        restart: probability that a chain starts anew, in [0, 1].
        initial: the distribution of starts, the first among them; None is ``energy.initial``.
        energy_penalty: as in :class:`ContrastiveDivergence`.

    Attributes:
        chains: where the chains stand, ``(buffer_size, *event)``; None before the first batch. A
            buffer, so ``state_dict`` has it.

    Raises:
        ValueError: if a number is out of range, a machine of layers has no kernel, or a batch does
            not fit the energy.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.kernels import MALA
        >>> objective = ReplayBufferCD(10, k=5, kernel=MALA(0.1), buffer_size=100, restart=0.05)
        >>> loss, facts = objective(MLPEnergy((2,), (8,)), torch.randn(5, 2))
        >>> objective.chains.shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        num_chains: int = 100,
        k: int = 1,
        kernel: Kernel[Any] | None = None,
        *,
        buffer_size: int | None = None,
        restart: float = 0.0,
        initial: Initial = None,
        energy_penalty: float = 0.0,
    ) -> None:
        super().__init__(num_chains, k)
        check_chain(k, kernel, energy_penalty)
        size = num_chains if buffer_size is None else buffer_size
        check_counts({"buffer_size": num_chains}, size)
        if not 0.0 <= restart <= 1.0:
            raise ValueError(f"restart must be a probability, got restart={restart}")
        self.kernel = kernel
        self.buffer_size = size
        self.restart = restart
        self.initial = initial
        self.energy_penalty = energy_penalty

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts, those of :class:`ContrastiveDivergence`."""
        if self.kernel is None and isinstance(energy, LayeredMachine):
            raise ValueError(
                f"give kernel for {type(energy).__name__}, or PersistentCD(num_chains, k), which"
                " sweeps its layers"
            )
        if not (isinstance(energy, HasMeanField) and batch.shape[1:] != energy.event_shape):
            check_batch(energy, batch)
        rows, x = self.take(energy, generator)
        x, rate = advance(energy, self.kernel, x, self.k, generator)
        self.put(rows, x)
        return difference(
            data_energy(energy, batch), energy(x), about(self.kernel, rate), self.energy_penalty
        )

    def take(
        self, energy: Energy, generator: torch.Generator | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Chains to go on with: their rows in the buffer (None: all), and their states, some of
        them new."""
        if self.chains is None:
            # a copy: chains are written to in place, and a law of starts may hand out what it keeps
            self.chains = starts(energy, self.initial, self.buffer_size, generator).clone()
        self._check_chains(energy, self.chains, (self.buffer_size, *energy.event_shape))
        whole = self.buffer_size == self.num_chains
        rows = (
            None if whole else subset(self.buffer_size, self.num_chains, generator, energy.device)
        )
        x = self.chains if rows is None else self.chains[rows]
        if self.restart:
            anew = (
                (uniform((len(x),), generator, energy.dtype, energy.device) < self.restart)
                .nonzero()
                .squeeze(1)
            )
            if len(anew):
                x = x.index_copy(0, anew, starts(energy, self.initial, len(anew), generator))
        return rows, x

    def put(self, rows: Tensor | None, x: Tensor) -> None:
        """Write chains back to the rows that they were taken from."""
        if rows is None or self.chains is None:
            self.chains = x
        else:
            self.chains.index_copy_(0, rows, x)


def data_energy(energy: Energy, batch: Tensor) -> Tensor:
    """Energies of data; where these are the visible units alone, the mean-field bound on their free
    energy."""
    if isinstance(energy, HasMeanField) and batch.shape[1:] != energy.event_shape:
        return energy.variational_free_energy(batch)
    return energy(batch)
