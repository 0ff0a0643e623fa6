"""Contrastive divergence, and functions that all objectives with Markov chains share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_counts
from pyroebm.core.conditionals import blocks_of
from pyroebm.core.energy import Energy
from pyroebm.core.rng import drawing_from
from pyroebm.core.supports import is_discrete, to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.energies.layered import LayeredMachine
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.kernels.gibbs import BlockGibbs, Gibbs
from pyroebm.kernels.langevin import MALA
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.base import Objective
from pyroebm.objectives.layered import (
    PartialLayers,
    contrast,
    draw_even,
    draw_odd,
    mean_field,
    odd_fields,
    visible,
)

__all__ = ["ContrastiveDivergence", "HasMeanField", "Initial"]

Metrics = dict[str, Tensor]
#: Initial distribution of chains: a distribution of events, a function of the number of chains and
#: a generator, or None for ``energy.initial``.
Initial = Distribution | Callable[[int, torch.Generator | None], Tensor] | None


@runtime_checkable
class HasMeanField(Protocol):
    """An energy over visible and hidden units with a bound on the free energy of the visible ones.

    Example:
        >>> from pyroebm.energies import BoltzmannMachine
        >>> isinstance(BoltzmannMachine(4, 3), HasMeanField)
        True
    """

    def variational_free_energy(self, visible: Tensor) -> Tensor:
        """Return an upper bound on the free energy of visible units, ``(n,)``."""
        ...


class ContrastiveDivergence(Objective):
    r"""Contrastive divergence (CD-k): chains of k steps that start at the data (Hinton, 2002).

    .. math:: L = \frac1n \sum_i E(x_i) - \frac1n \sum_i E(\tilde x_i)

    with :math:`\tilde x_i` the last state of a chain started at :math:`x_i`, held fixed. As k
    grows, :math:`\nabla L` converges to the gradient of :math:`-\frac1n \sum_i \log p(x_i)`. The
    *value* of L is no measure of convergence.

    A layered machine (:class:`~pyroebm.energies.layered.LayeredMachine`) is sampled by block Gibbs
    sweeps, and its odd layers are summed out of both terms. ``batch`` has its visible units. If
    there is more than one hidden layer, the data term sets the hidden layers of even index to their
    mean-field values given the batch (Salakhutdinov and Hinton, 2009). For any other energy
    ``kernel`` updates whole events.

    Args:
        k: number of steps of a chain; for layered machines, of Gibbs sweeps.
        kernel: any kernel of :mod:`pyroebm.kernels`; None uses block Gibbs sweeps for layered
            machines, :class:`~pyroebm.kernels.BlockGibbs` or :class:`~pyroebm.Gibbs` on other
            discrete supports, and ``MALA(0.1)`` on continuous ones.

    Raises:
        ValueError: if k < 1, ``kernel`` is no kernel, or a batch does not fit the energy.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, data = BernoulliRBM(4, 3), torch.ones(5, 4)
        >>> loss, metrics = ContrastiveDivergence(k=1)(
        ...     rbm, data, generator=torch.Generator().manual_seed(0)
        ... )
        >>> loss.backward()
        >>> # descent raises the biases of units that are always on
        >>> bool((rbm.visible_bias.grad <= 0).all())
        True
    """

    measures_fit = False

    def __init__(self, k: int = 1, kernel: Kernel[Any] | None = None) -> None:
        super().__init__()
        check_chain(k, kernel)
        self.k = k
        self.kernel = kernel

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, ``energy_model``, ``energy_gap``; the ``acceptance_rate`` of the
        kernel; and for layered machines ``mean_0``, ``mean_1``, ...: the means of the units of each
        layer under the data, which :class:`Centering` uses.
        """
        if self.kernel is not None or not isinstance(energy, LayeredMachine):
            check_batch(energy, batch)
            end, rate = run_chains(energy, self.kernel, batch, self.k, generator)
            return contrastive_loss(energy(batch), energy(end), kernel_metrics(self.kernel, rate))
        layers = energy.layers()
        with torch.no_grad():
            data = mean_field(layers, visible(layers, batch, type(energy).__name__))
            fields = odd_fields(layers, data)
            chain_fields = fields
            for _ in range(self.k):
                chains = draw_even(layers, draw_odd(layers, chain_fields, generator), generator)
                chain_fields = odd_fields(layers, chains)
        both = {layer: torch.cat([field, chain_fields[layer]]) for layer, field in fields.items()}
        return contrast(layers, stack_layers(data, chains), both, len(batch))


def run_chains(
    energy: Energy, kernel: Kernel[Any] | None, x: Tensor, k: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the states ``(chains, *event)`` after k steps of a kernel, and the acceptance rate.

    The energy is in eval mode, and no parameter receives a gradient.
    """
    kernel = default_kernel(energy) if kernel is None else kernel
    target, transform = unconstrain(energy), to_support(energy.support)
    with eval_mode(energy), frozen(energy):
        state, rate = kernel.steps(
            target, kernel.init(target, transform.inv(x), generator), k, generator
        )
        return transform(state.x).detach(), rate.mean()


def default_kernel(energy: Energy) -> Kernel[Any]:
    """Return block Gibbs, Gibbs or ``MALA(0.1)``, whichever fits the energy's support."""
    if not is_discrete(energy.support):
        return MALA(0.1)
    return BlockGibbs() if blocks_of(energy) else Gibbs()


def concatenate_layers(layers: PartialLayers) -> Tensor:
    """Concatenate layers along the units; a single layer is not copied."""
    present = [layer for layer in layers if layer is not None]
    return present[0] if len(present) == 1 else torch.cat(present, 1)


def stack_layers(data: PartialLayers, chains: PartialLayers) -> list[Tensor | None]:
    """Concatenate data and chains along the rows, layer by layer."""
    return [
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(data, chains, strict=True)
    ]


def check_chain(k: int, kernel: Kernel[Any] | None) -> None:
    """Raise ValueError unless these are settings of a chain in an objective."""
    check_counts({"k": 1}, k)
    if kernel is not None:
        check_kernel(kernel)


def check_batch(energy: Energy, batch: Tensor) -> None:
    """Raise ValueError unless the batch has at least one row of the energy's events."""
    energy.check_states(batch, "batch")
    if batch.dim() != len(energy.event_shape) + 1 or not len(batch):
        raise ValueError(
            f"batch must have shape (n, *{tuple(energy.event_shape)}), n at least 1, got"
            f" {tuple(batch.shape)}"
        )


def initial_states(
    energy: Energy, initial: Initial, n: int, generator: torch.Generator | None
) -> Tensor:
    """Draw ``n`` initial states; raise ValueError unless they are events of the energy."""
    if initial is None:
        return energy.initial(n, generator)
    if isinstance(initial, Distribution):
        with drawing_from(generator):
            x = initial.sample(torch.Size([n])).to(energy.device, energy.dtype)
    else:
        x = initial(n, generator)
    energy.check_states(x, "initial")
    if energy.batch_shape(x) != (n,):
        raise ValueError(
            f"initial must give {n} events of shape {tuple(energy.event_shape)}, got shape"
            f" {tuple(x.shape)}"
        )
    return x.detach()


def kernel_metrics(kernel: Kernel[Any] | None, rate: Tensor) -> Metrics:
    """Return the mean acceptance rate, and the temperature at which the kernel samples."""
    temperature = None if kernel is None else kernel.temperature
    return {"acceptance_rate": rate} | (
        {} if temperature is None else {"temperature": rate.new_tensor(float(temperature))}
    )


def contrastive_loss(data: Tensor, model: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    """Return the mean energy of the data minus that of the model, and metrics."""
    positive, negative = data.mean(), model.mean()
    gap = positive - negative
    return gap, {
        "energy_data": positive.detach(),
        "energy_model": negative.detach(),
        "energy_gap": gap.detach(),
        **metrics,
    }
