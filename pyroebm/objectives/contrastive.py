"""Contrastive divergence: the likelihood's gradient, with draws of a short Markov chain in place of
the model's; what all objectives with such chains share."""

from __future__ import annotations

import math
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
    Kept,
    contrast,
    draw_even,
    draw_odd,
    mean_field,
    odd_fields,
    visible,
)

__all__ = ["ContrastiveDivergence", "HasMeanField", "Initial"]

Facts = dict[str, Tensor]
#: A law that chains start from: a distribution of events, a function of their number and a
#: generator, or ``energy.initial``.
Initial = Distribution | Callable[[int, torch.Generator | None], Tensor] | None


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

    with :math:`\tilde x_i` the end of a chain from :math:`x_i`, held fixed. As k grows,
    :math:`\nabla L` becomes the gradient of :math:`-\frac1n \sum_i \log p(x_i)`; the *value* of L
    says nothing about convergence.

    A machine of layers (:class:`~pyroebm.energies.layered.LayeredMachine`) is swept block by block,
    its odd layers are summed out of both terms, and ``batch`` has its visible units alone: with
    more than one hidden layer the others take the mean field given the data (Salakhutdinov and
    Hinton, 2009). Any other energy is moved by ``kernel`` over whole events.

    Args:
        k: steps of the chain; for layers, sweeps down and up.
        kernel: any of :mod:`pyroebm.kernels`; None sweeps layers, and takes
            :class:`~pyroebm.kernels.BlockGibbs` or :class:`~pyroebm.Gibbs` on discrete supports and
            ``MALA(0.1)`` on others.
        energy_penalty: :math:`\alpha \ge 0` of :math:`\alpha (\overline{E(x)^2} +
            \overline{E(\tilde x)^2})`, which is added to the loss to keep energies near 0 (Du and
            Mordatch, 2019); for chains that a kernel moves.

    Raises:
        ValueError: if k < 1, ``kernel`` is no kernel, the penalty is negative or does not apply, or
            a batch does not fit the energy.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm, data = BernoulliRBM(4, 3), torch.ones(5, 4)
        >>> loss, facts = ContrastiveDivergence(k=1)(
        ...     rbm, data, generator=torch.Generator().manual_seed(0)
        ... )
        >>> loss.backward()
        >>> # descent raises the biases of units that are always on
        >>> bool((rbm.visible_bias.grad <= 0).all())
        True
    """

    def __init__(
        self, k: int = 1, kernel: Kernel[Any] | None = None, *, energy_penalty: float = 0.0
    ) -> None:
        super().__init__()
        check_chain(k, kernel, energy_penalty)
        self.k = k
        self.kernel = kernel
        self.energy_penalty = energy_penalty

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, ``energy_model``, ``energy_gap``; the kernel's
        ``acceptance_rate``; and of layers ``mean_0``, ``mean_1``, ...: mean units of each under the
        data, which :class:`Centering` reads."""
        if self.kernel is not None or not isinstance(energy, LayeredMachine):
            check_batch(energy, batch)
            end, rate = advance(energy, self.kernel, batch, self.k, generator)
            return difference(
                energy(batch), energy(end), about(self.kernel, rate), self.energy_penalty
            )
        if self.energy_penalty:
            raise ValueError(
                "energy_penalty is for chains that a kernel moves: give kernel for"
                f" {type(energy).__name__}"
            )
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


def advance(
    energy: Energy, kernel: Kernel[Any] | None, x: Tensor, k: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States ``(chains, *event)`` after k steps of a kernel, and its mean acceptance rate. The
    energy is in eval mode, and no parameter receives a gradient."""
    kernel = default_kernel(energy) if kernel is None else kernel
    target, transform = unconstrain(energy), to_support(energy.support)
    with eval_mode(energy), frozen(energy):
        state, rate = kernel.steps(
            target, kernel.init(target, transform.inv(x), generator), k, generator
        )
        return transform(state.x).detach(), rate.mean()


def default_kernel(energy: Energy) -> Kernel[Any]:
    """Gibbs sampling on discrete supports, by blocks where there are any; Langevin steps of 0.1 on
    others."""
    if not is_discrete(energy.support):
        return MALA(0.1)
    return BlockGibbs() if blocks_of(energy) else Gibbs()


def joined(layers: Kept) -> Tensor:
    """Layers side by side; one alone is not copied."""
    there = [layer for layer in layers if layer is not None]
    return there[0] if len(there) == 1 else torch.cat(there, 1)


def stacked(data: Kept, chains: Kept) -> list[Tensor | None]:
    """Rows of data above rows of chains, layer by layer."""
    return [
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(data, chains, strict=True)
    ]


def check_chain(k: int, kernel: Kernel[Any] | None, energy_penalty: float) -> None:
    """ValueError unless these are settings of a chain in an objective."""
    check_counts({"k": 1}, k)
    if kernel is not None:
        check_kernel(kernel)
    if not 0.0 <= energy_penalty < math.inf:
        raise ValueError(
            f"energy_penalty must be at least 0 and finite, got energy_penalty={energy_penalty}"
        )


def check_batch(energy: Energy, batch: Tensor) -> None:
    """ValueError unless the batch is at least one row of the energy's events."""
    energy.check_states(batch, "batch")
    if batch.dim() != len(energy.event_shape) + 1 or not len(batch):
        raise ValueError(
            f"batch must have shape (n, *{tuple(energy.event_shape)}), n at least 1, got"
            f" {tuple(batch.shape)}"
        )


def starts(energy: Energy, initial: Initial, n: int, generator: torch.Generator | None) -> Tensor:
    """``n`` starting states from a law; ValueError unless they are events of the energy."""
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


def about(kernel: Kernel[Any] | None, rate: Tensor) -> Facts:
    """A chain's mean acceptance rate, and the temperature that an unadjusted kernel samples at."""
    temperature = None if kernel is None else kernel.temperature
    return {"acceptance_rate": rate} | (
        {} if temperature is None else {"temperature": rate.new_tensor(float(temperature))}
    )


def difference(
    data: Tensor, model: Tensor, facts: Facts, energy_penalty: float = 0.0
) -> tuple[Tensor, Facts]:
    """Mean energy of the data less that of the model, with the penalty on both; and the facts."""
    positive, negative = data.mean(), model.mean()
    loss = gap = positive - negative
    if energy_penalty:
        penalty = energy_penalty * (data.square().mean() + model.square().mean())
        loss, facts = gap + penalty, {"energy_penalty": penalty.detach(), **facts}
    return loss, {
        "energy_data": positive.detach(),
        "energy_model": negative.detach(),
        "energy_gap": gap.detach(),
        **facts,
    }
