"""Contrastive divergence: the likelihood's gradient, with draws of a short Markov chain in place of the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.energy import Energy
from pyroebm.front_door import check_counts
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.kernels.gibbs import BlockGibbs, Gibbs, HasBlocks
from pyroebm.kernels.langevin import MALA
from pyroebm.networks import frozen
from pyroebm.objectives.base import Objective
from pyroebm.objectives.layered import Kept, Ladder, contrast, draw_even, draw_odd, mean_field, odd_fields, visible
from pyroebm.supports import is_discrete, is_real
from pyroebm.views import Unconstrained, eval_mode

__all__ = ["ContrastiveDivergence", "HasMeanField", "PersistentCD"]

Facts = dict[str, Tensor]


@runtime_checkable
class HasMeanField(Protocol):
    """An energy over visible and hidden units that bounds the free energy of the visible ones.

    Example:
        >>> from pyroebm.energies import BoltzmannMachine
        >>> isinstance(BoltzmannMachine(4, 3), HasMeanField)
        True
    """

    def variational_free_energy(self, visible: Tensor) -> Tensor: ...


class ContrastiveDivergence(Objective):
    r"""CD-k (Hinton, 2002): k steps of a chain that starts at the data.

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1n \sum_i E(\tilde x_i)

    with :math:`\tilde x_i` the end of a chain from :math:`x_i`, held fixed. As k grows, :math:`\nabla L` becomes the gradient of
    :math:`-\frac1n \sum_i \log p(x_i)`; the *value* of L says nothing about convergence.

    A machine of layers (:class:`~pyroebm.energies.layered.LayeredMachine`) is swept block by block, its odd layers are summed
    out of both terms, and ``batch`` has its visible units alone: with more than one hidden layer the others take the mean field
    given the data (Salakhutdinov and Hinton, 2009). Any other energy is moved by ``kernel`` over whole events.

    Args:
        k: steps of the chain; for layers, sweeps down and up.
        kernel: any of :mod:`pyroebm.kernels`; None sweeps layers, and takes :class:`~pyroebm.BlockGibbs` or
            :class:`~pyroebm.Gibbs` on discrete supports and ``MALA(0.1)`` on others.

    Raises:
        ValueError: if k < 1, ``kernel`` is no kernel, or a batch does not fit the energy.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, data = BernoulliRBM(4, 3), torch.ones(5, 4)
        >>> loss, facts = ContrastiveDivergence(k=1)(rbm, data, generator=torch.Generator().manual_seed(0))
        >>> loss.backward()
        >>> bool((rbm.visible_bias.grad <= 0).all())  # descent raises the biases of units that are always on
        True
    """

    def __init__(self, k: int = 1, kernel: Kernel[Any] | None = None) -> None:
        super().__init__()
        check_counts({"k": 1}, k)
        if kernel is not None:
            check_kernel(kernel)
        self.k, self.kernel = k, kernel

    def forward(self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, ``energy_model``, ``energy_gap``; the kernel's ``acceptance_rate``; and of
        layers ``mean_0``, ``mean_1``, ...: mean units of each under the data, which :class:`Centring` reads."""
        if self.kernel is not None or not isinstance(energy, LayeredMachine):
            end, rate = advance(energy, self.kernel, batch, self.k, generator)
            return _difference(energy(batch), energy(end), {"acceptance_rate": rate})
        layers = energy.layers()
        with torch.no_grad():
            data = mean_field(layers, visible(layers, batch, type(energy).__name__))
            fields = odd_fields(layers, data)
            reached = fields
            for _ in range(self.k):
                even = draw_even(layers, draw_odd(layers, reached, generator), generator)
                reached = odd_fields(layers, even)
        both = {k: torch.cat([field, reached[k]]) for k, field in fields.items()}
        return contrast(layers, stacked(data, even), both, len(batch))


class PersistentCD(Objective):
    r"""Persistent contrastive divergence (Tieleman, 2008; Younes, 1989): chains that go on from batch to batch.

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1m \sum_j E(\tilde x_j)

    with :math:`\tilde x_j` the state of chain j after k more steps, held fixed. With a frozen energy the chains converge, and
    :math:`\nabla L` is then an unbiased estimate of :math:`-\nabla \log p`. Layers are treated as in
    :class:`ContrastiveDivergence`; a step of PCD-1 takes five products with a matrix of weights, four of them in pairs. So are
    the hidden units of a :class:`~pyroebm.energies.BoltzmannMachine` where ``batch`` has its visible ones alone: the data's take
    the mean field, the chains' are drawn (Salakhutdinov, 2008).

    With ``betas`` the machine has replicas at lower inverse temperatures, whose states are swapped after each sweep with
    probability :math:`\min(1, e^{(\beta_k - \beta_l)(E_k - E_l)})` (Desjardins et al., 2010; Cho, Raiko and Ilin, 2010): chains
    cross barriers that the first replica does not. Only the replica at 1 enters the loss.

    Args:
        num_chains: m.
        k: steps for each batch.
        kernel: as in :class:`ContrastiveDivergence`.
        betas: inverse temperatures, falling from 1; for machines of layers without ``kernel``. None is the one at 1.

    Attributes:
        chains: where the chains stand, None before the first batch: whole events, of layers the odd ones ``(rows, units)``, with
            ``num_chains`` rows for each temperature. A buffer, so ``state_dict`` has it.

    Raises:
        ValueError: if a number is below 1, ``betas`` do not fall from 1 or do not apply, or a batch does not fit the energy.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, objective = BernoulliRBM(4, 3), PersistentCD(num_chains=10)
        >>> loss, facts = objective(rbm, torch.ones(5, 4), generator=torch.Generator().manual_seed(0))
        >>> objective.chains.shape, list(objective.state_dict())
        (torch.Size([10, 3]), ['chains'])
    """

    chains: Tensor | None

    def __init__(
        self, num_chains: int = 100, k: int = 1, kernel: Kernel[Any] | None = None, *, betas: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_counts({"num_chains": 1, "k": 1}, num_chains, k)
        if kernel is not None:
            check_kernel(kernel)
            if betas is not None:
                raise ValueError("betas are for sweeps of layers: give kernel or betas, got both")
        self.num_chains, self.k, self.kernel = num_chains, k, kernel
        self.ladder = None if betas is None else Ladder(betas, num_chains)
        self.register_buffer("chains", None)

    def forward(self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Facts]:
        """The loss and its facts: those of :class:`ContrastiveDivergence`, and ``swap_rate`` with ``betas``."""
        if self.kernel is None and isinstance(energy, LayeredMachine):
            return self._sweep_layers(energy, batch, generator)
        if self.ladder is not None:
            raise ValueError(f"betas are for sweeps of layers, but {type(energy).__name__} is no machine of layers")
        chains = energy.initial(self.num_chains, generator) if self.chains is None else self.chains
        self._check_chains(energy, chains, (self.num_chains, *energy.event_shape))
        x, rate = advance(energy, self.kernel, chains, self.k, generator)
        self.chains = x
        seen_only = isinstance(energy, HasMeanField) and batch.shape[1:] != energy.event_shape
        data = energy.variational_free_energy(batch) if seen_only else energy(batch)  # type: ignore[operator]
        return _difference(data, energy(x), {"acceptance_rate": rate})

    def _sweep_layers(self, energy: LayeredMachine, batch: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Facts]:
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
            even = stacked(data, [None if layer is None else layer[: self.num_chains] for layer in x])
            fields = odd_fields(layers, even)  # of data and chains in one product each
            odd = draw_odd(layers, {k: f[n:] for k, f in fields.items()}, generator) if self.ladder is None else x
            self.chains = joined([odd[layer] for layer in layers.sides()[1]])
        loss, seen = contrast(layers, even, fields, n)
        return loss, facts | seen

    def _odd(self, energy: LayeredMachine, layers: Layers, generator: torch.Generator | None) -> Kept:
        """The odd layers of all chains; at first from the field of the even ones in ``energy.initial``."""
        replicas = 1 if self.ladder is None else len(self.ladder.betas)
        if self.chains is not None:
            units = sum(layers.sizes[layer] for layer in layers.sides()[1])
            self._check_chains(energy, self.chains, (replicas * self.num_chains, units))
            return layers.place(self.chains, layers.sides()[1])
        first = energy.initial(replicas * self.num_chains, generator)
        even: Kept = layers.split(first) if isinstance(energy, LayeredEnergy) else [first, None]
        return draw_odd(layers, odd_fields(layers, even), generator)

    def _check_chains(self, energy: Energy, chains: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(chains.shape) != shape or chains.dtype != energy.dtype or chains.device != energy.device:
            raise ValueError(
                f"chains must have shape {shape}, {energy.dtype}, on {energy.device} for {type(energy).__name__} and these"
                f" settings, got {tuple(chains.shape)}, {chains.dtype}, on {chains.device}: they are of another machine or"
                " objective. Set chains = None to start anew"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}chains" in state_dict:  # a buffer that is None takes no state
            self.chains = torch.empty_like(state_dict[f"{prefix}chains"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def advance(
    energy: Energy, kernel: Kernel[Any] | None, x: Tensor, k: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States ``(chains, *event)`` after k steps of a kernel, and its mean acceptance rate. The energy is in eval mode, and no
    parameter receives a gradient."""
    kernel = default_kernel(energy) if kernel is None else kernel
    view = Unconstrained(energy, keep_discrete=True)
    target = energy if is_real(energy.support) else view  # a view that changes nothing takes its time at each gradient
    with eval_mode(energy), frozen(energy):
        state, rate = kernel.steps(target, kernel.init(target, view.unconstrain(x), generator), k, generator)
        return view.constrain(state.x).detach(), rate.mean()


def default_kernel(energy: Energy) -> Kernel[Any]:
    """Gibbs sampling on discrete supports, by blocks where there are any; Langevin steps of 0.1 on others."""
    if not is_discrete(energy.support):
        return MALA(0.1)
    return BlockGibbs() if isinstance(energy, HasBlocks) else Gibbs()


def joined(layers: Kept) -> Tensor:
    """Layers side by side; one alone is not copied."""
    there = [layer for layer in layers if layer is not None]
    return there[0] if len(there) == 1 else torch.cat(there, 1)


def stacked(data: Kept, chains: Kept) -> list[Tensor | None]:
    """Rows of data above rows of chains, layer by layer."""
    return [None if a is None or b is None else torch.cat([a, b]) for a, b in zip(data, chains, strict=True)]


def _difference(data: Tensor, model: Tensor, facts: Facts) -> tuple[Tensor, Facts]:
    positive, negative = data.mean(), model.mean()
    loss = positive - negative
    return loss, {
        "energy_data": positive.detach(),
        "energy_model": negative.detach(),
        "energy_gap": loss.detach(),
        **facts,
    }
