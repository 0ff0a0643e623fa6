"""Persistent contrastive divergence, with persistent chains or a replay buffer."""

from __future__ import annotations

import math
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
    HasMeanField,
    Initial,
    Metrics,
    check_batch,
    check_chain,
    concatenate_layers,
    contrastive_loss,
    initial_states,
    kernel_metrics,
    run_chains,
    stack_layers,
)
from pyroebm.objectives.layered import (
    PartialLayers,
    TemperatureLadder,
    contrast,
    draw_even,
    draw_odd,
    mean_field,
    odd_fields,
    visible,
)

__all__ = ["PersistentCD", "ReplayBufferCD"]


class _Persistent(Objective):
    """Base class of objectives with persistent chains, which are a buffer in ``state_dict``."""

    measures_fit = False

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
                f" {type(energy).__name__} and these settings, got {tuple(chains.shape)},"
                f" {chains.dtype}, on {chains.device}: they belong to another energy or objective."
                " Set objective.chains = None to start new chains"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}chains" in state_dict:  # torch does not load into a buffer that is None
            self.chains = torch.empty_like(state_dict[f"{prefix}chains"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class PersistentCD(_Persistent):
    r"""Persistent contrastive divergence of layered machines (Younes, 1989; Tieleman, 2008).

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1m \sum_j E(\tilde x_j)

    with :math:`\tilde x_j` the state of chain j after k more block Gibbs sweeps, held fixed. Chains
    persist between batches. For a fixed energy they converge, and :math:`\nabla L` is then an
    unbiased estimate of :math:`-\nabla \log p`. Layers are treated as in
    :class:`ContrastiveDivergence`. Use :class:`ReplayBufferCD` for other energies and kernels.

    With ``betas`` chains at lower inverse temperatures are added, and states are swapped after each
    sweep with probability :math:`\min(1, e^{(\beta_k - \beta_l)(E_k - E_l)})` (parallel tempering;
    Desjardins et al., 2010; Cho, Raiko and Ilin, 2010), so that chains cross energy barriers. Only
    the chains at 1 enter the loss.

    Args:
        num_chains: m, number of chains at each temperature.
        k: sweeps for each batch.
        betas: inverse temperatures, decreasing from 1; None is 1 alone.

    Attributes:
        chains: states of the odd layers, ``(num_temperatures * num_chains, units)``; None before
            the first batch. A buffer, which is in ``state_dict``.

    Raises:
        ValueError: if a number is out of range, ``betas`` do not decrease from 1, the energy is no
            layered machine, or a batch does not fit it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, objective = BernoulliRBM(4, 3), PersistentCD(num_chains=10)
        >>> loss, metrics = objective(
        ...     rbm, torch.ones(5, 4), generator=torch.Generator().manual_seed(0)
        ... )
        >>> objective.chains.shape, list(objective.state_dict())
        (torch.Size([10, 3]), ['chains'])
    """

    def __init__(
        self, num_chains: int = 100, k: int = 1, *, betas: Sequence[float] | None = None
    ) -> None:
        super().__init__(num_chains, k)
        self.ladder = None if betas is None else TemperatureLadder(betas, num_chains)

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: those of :class:`ContrastiveDivergence` for layered machines, and ``swap_rate``
        with ``betas``.
        """
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                "energy must be a layered machine, such as BernoulliRBM, for PersistentCD, got"
                f" {type(energy).__name__}: use ReplayBufferCD(num_chains, k, kernel)"
            )
        layers, n = energy.layers(), len(batch)
        metrics: Metrics = {}
        with torch.no_grad():
            data = mean_field(layers, visible(layers, batch, type(energy).__name__))
            x: PartialLayers = self._odd(energy, layers, generator)
            for sweep in range(self.k):
                if self.ladder is not None:
                    x, metrics["swap_rate"] = self.ladder.sweep(layers, x, generator)
                    continue
                x = draw_odd(layers, odd_fields(layers, x), generator) if sweep else x
                x = draw_even(layers, x, generator)
            even = stack_layers(
                data, [None if layer is None else layer[: self.num_chains] for layer in x]
            )
            fields = odd_fields(layers, even)  # of data and chains in one product each
            odd = (
                draw_odd(layers, {k: f[n:] for k, f in fields.items()}, generator)
                if self.ladder is None
                else x
            )
            self.chains = concatenate_layers([odd[layer] for layer in layers.sides()[1]])
        loss, contrast_metrics = contrast(layers, even, fields, n)
        return loss, metrics | contrast_metrics

    def _odd(
        self, energy: LayeredMachine, layers: Layers, generator: torch.Generator | None
    ) -> PartialLayers:
        """Return the odd layers of all chains, at first drawn given those of ``energy.initial``."""
        num_temperatures = 1 if self.ladder is None else len(self.ladder.betas)
        if self.chains is not None:
            units = sum(layers.sizes[layer] for layer in layers.sides()[1])
            self._check_chains(energy, self.chains, (num_temperatures * self.num_chains, units))
            return layers.place(self.chains, layers.sides()[1])
        first = energy.initial(num_temperatures * self.num_chains, generator)
        even: PartialLayers = (
            layers.split(first) if isinstance(energy, LayeredEnergy) else [first, None]
        )
        return draw_odd(layers, odd_fields(layers, even), generator)


class ReplayBufferCD(_Persistent):
    r"""Persistent contrastive divergence with a replay buffer (Du and Mordatch, 2019).

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1m \sum_j E(\tilde x_j)

    with :math:`\tilde x_j` the state of chain j after k more steps of a kernel, held fixed. It is
    for any energy. For each batch m chains of the buffer are drawn without replacement, continued,
    and written back. With ``restart`` a continued chain is restarted at random: it may then find
    modes that no chain has, but more chains have not converged.

    If ``batch`` has only the visible units of a :class:`~pyroebm.energies.BoltzmannMachine`, the
    hidden units of the data are replaced by their mean field (Salakhutdinov, 2008); those of the
    chains are sampled. For block Gibbs sampling of layered machines use :class:`PersistentCD`.

    Args:
        num_chains: m, number of chains that are continued for each batch.
        k: steps for each batch.
        kernel: as in :class:`ContrastiveDivergence`.
        buffer_size: number of chains in the buffer, at least m; None is m.
        restart: probability that a continued chain is restarted, in [0, 1].
        initial: initial distribution of chains, also of restarted ones; None is
            ``energy.initial``.
        energy_penalty: :math:`\alpha \ge 0`: adds :math:`\alpha (\overline{E(x)^2} +
            \overline{E(\tilde x)^2})` to the loss, which keeps energies near 0 (Du and Mordatch,
            2019).

    Attributes:
        chains: states of the chains, ``(buffer_size, *event)``; None before the first batch. A
            buffer, which is in ``state_dict``.

    Raises:
        ValueError: if a number is out of range, ``kernel`` is None for a layered machine, or a
            batch does not fit the energy.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.kernels import MALA
        >>> objective = ReplayBufferCD(10, k=5, kernel=MALA(0.1), buffer_size=100, restart=0.05)
        >>> loss, metrics = objective(MLPEnergy((2,), (8,)), torch.randn(5, 2))
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
        check_chain(k, kernel)
        size = num_chains if buffer_size is None else buffer_size
        check_counts({"buffer_size": num_chains}, size)
        if not 0.0 <= restart <= 1.0:
            raise ValueError(f"restart must be in [0, 1], got restart={restart}")
        if not 0.0 <= energy_penalty < math.inf:
            raise ValueError(
                f"energy_penalty must be at least 0 and finite, got energy_penalty={energy_penalty}"
            )
        self.kernel = kernel
        self.buffer_size = size
        self.restart = restart
        self.initial = initial
        self.energy_penalty = energy_penalty

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: those of :class:`ContrastiveDivergence`, and ``energy_penalty`` if it is not 0.
        """
        if self.kernel is None and isinstance(energy, LayeredMachine):
            raise ValueError(
                f"kernel must not be None for the layered machine {type(energy).__name__}: give"
                " kernel, or use PersistentCD(num_chains, k), which has block Gibbs sweeps"
            )
        if not (isinstance(energy, HasMeanField) and batch.shape[1:] != energy.event_shape):
            check_batch(energy, batch)
        rows, x = self.take(energy, generator)
        x, rate = run_chains(energy, self.kernel, x, self.k, generator)
        self.put(rows, x)
        data, model = data_energy(energy, batch), energy(x)
        loss, metrics = contrastive_loss(data, model, kernel_metrics(self.kernel, rate))
        if self.energy_penalty:
            penalty = self.energy_penalty * (data.square().mean() + model.square().mean())
            loss, metrics = loss + penalty, {"energy_penalty": penalty.detach(), **metrics}
        return loss, metrics

    def take(
        self, energy: Energy, generator: torch.Generator | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return the chains to be continued, some of them restarted.

        Returns:
            Their indices in the buffer (None for all), and their states.
        """
        if self.chains is None:
            # a copy: chains are written in place, and `initial` may return a tensor that it keeps
            self.chains = initial_states(energy, self.initial, self.buffer_size, generator).clone()
        self._check_chains(energy, self.chains, (self.buffer_size, *energy.event_shape))
        whole = self.buffer_size == self.num_chains
        rows = (
            None if whole else subset(self.buffer_size, self.num_chains, generator, energy.device)
        )
        x = self.chains if rows is None else self.chains[rows]
        if self.restart:
            restarted = (
                (uniform((len(x),), generator, energy.dtype, energy.device) < self.restart)
                .nonzero()
                .squeeze(1)
            )
            if len(restarted):
                new = initial_states(energy, self.initial, len(restarted), generator)
                x = x.index_copy(0, restarted, new)
        return rows, x

    def put(self, rows: Tensor | None, x: Tensor) -> None:
        """Write chains back to the indices that they were taken from."""
        if rows is None or self.chains is None:
            self.chains = x
        else:
            self.chains.index_copy_(0, rows, x)


def data_energy(energy: Energy, batch: Tensor) -> Tensor:
    """Return the energies of data, or of visible units a mean-field bound on the free energies."""
    if isinstance(energy, HasMeanField) and batch.shape[1:] != energy.event_shape:
        return energy.variational_free_energy(batch)
    return energy(batch)
