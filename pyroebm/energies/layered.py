"""Energies made of layers: what is shared by the view of all their units and by that of the visible
ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyroebm.core.energy import Energy
from pyroebm.energies.layers import Layers

__all__ = [
    "MAX_WORK",
    "Joint",
    "LayeredEnergy",
    "LayeredMachine",
    "check_sizes",
    "layer_names",
    "parameter",
]

#: States of the side that is enumerated times units of the other, up to which ``log_z`` is known
#: without being asked for by name.
MAX_WORK = 1 << 26


class LayeredMachine(Energy):
    """An energy that is made of :class:`Layers`: over all of them, or over the visible one.

    A subclass writes :meth:`layers`, whose tensors carry gradients of its parameters.

    Attributes:
        log_z: by enumeration in float64 where that takes less than a second or so, else None;
            :meth:`log_partition` computes it anyway.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), LayeredMachine)
        True
    """

    def layers(self) -> Layers:
        """The layers, in natural parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define layers()")

    def joint(self) -> LayeredEnergy:
        """The energy of all layers together, with blocks for Gibbs sampling. It shares the
        parameters.
        """
        return Joint(self)

    def log_partition(self, max_units: int = 24) -> Tensor:
        r""":math:`\log Z` by a sum over every state of the smaller side of the layers;
        differentiable, shape ``()``.

        Args:
            max_units: most bits to enumerate; each one more doubles the time.

        Raises:
            ValueError: if the smaller side has more bits.
        """
        units = self._enumerated()
        if units > max_units:
            raise ValueError(
                f"log Z of {type(self).__name__} needs a sum over 2^{units} states, more than"
                f" max_units={max_units} allows:"
                " estimate it (pyroebm.partition)"
            )
        return self.layers().log_partition()

    def _enumerated(self) -> int:
        layers = self.layers()
        return sum(layers.sizes[layer] for layer in layers.smaller_side())

    @property
    def _is_small(self) -> bool:
        units = self._enumerated()
        return units <= 24 and (sum(self.layers().sizes) - units) << units <= MAX_WORK

    @property
    def log_z(self) -> float | None:
        """Log of the normalizing constant in nats; None where it is not known."""
        if not self._is_small:
            return None
        with torch.no_grad():
            return float(self.layers().double().log_partition())

    @property
    def has_exact_draws(self) -> bool:
        """Where the smaller side can be enumerated."""
        return self._is_small

    def draw_layers(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """``num_samples`` exact independent draws of all layers; NotImplementedError where none are
        to be had.
        """
        if not self._is_small:
            raise NotImplementedError(
                f"{type(self).__name__} is too large for exact draws; sample joint() with"
                " BlockGibbs"
            )
        with torch.no_grad():
            return self.layers().sample(num_samples, generator)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return self.draw_layers(num_samples, generator)[0]


class LayeredEnergy(LayeredMachine):
    """An energy over all layers side by side in one flat event, with the layers as blocks for
    :class:`pyroebm.kernels.BlockGibbs`.

    Attributes:
        blocks: where each layer lies in the event, by name: ``visible``, then ``hidden`` or
            ``hidden1``, ``hidden2``, ...
        num_visible: units of the visible layer.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> joint = BernoulliRBM(4, 3).joint()
        >>> joint.blocks, joint.conditional("hidden", torch.zeros(2, 7)).batch_shape
        ({'visible': slice(0, 4, None), 'hidden': slice(4, 7, None)}, torch.Size([2]))
    """

    blocks: Mapping[str, slice]

    def __init__(self, sizes: Sequence[int], gaussian: bool) -> None:
        units = sum(sizes)
        super().__init__((units,), layered_support(sizes, gaussian))
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.blocks, self.num_visible = (
            dict(zip(layer_names(len(sizes)), spans, strict=True)),
            sizes[0],
        )

    def joint(self) -> LayeredEnergy:
        return self

    def marginal(self) -> Energy:
        """The energy of the visible units alone.

        Raises:
            ValueError: where the sum over the hidden units has no closed form.
        """
        raise ValueError(
            f"the hidden units of {type(self).__name__} lie in {len(self.blocks) - 1} layers that"
            " depend on each other:"
            " the sum over them has no closed form; work with joint(), bound the likelihood"
            " (variational_bound), or estimate it"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        layers = self.layers()
        return layers.energy(layers.split(x))

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """The law of a layer given those beside it; what ``x`` has in the layer itself is
        ignored.
        """
        if block not in self.blocks:
            raise ValueError(f"block must be one of {list(self.blocks)}, got block={block!r}")
        layers, index = self.layers(), list(self.blocks).index(block)
        return layers.law(index, layers.field(index, layers.split(x)))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return torch.cat(self.draw_layers(num_samples, generator), -1)


class Joint(LayeredEnergy):
    """All layers of a machine whose own events are the visible ones; it shares the machine's
    parameters.

    Args:
        machine: for example an RBM.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> Joint(BernoulliRBM(4, 3))(torch.zeros(2, 7)).detach()
        tensor([0., 0.])
    """

    def __init__(self, machine: LayeredMachine) -> None:
        layers = machine.layers()
        super().__init__(layers.sizes, layers.precision is not None)
        self.machine = machine

    def layers(self) -> Layers:
        return self.machine.layers()

    def marginal(self) -> Energy:
        return self.machine

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        layers, visible = self.layers(), self.machine.initial(num_chains, generator)
        with torch.no_grad():
            return torch.cat(
                [visible, layers.draw(1, layers.field(1, [visible, None]), generator)], -1
            )


def layered_support(sizes: Sequence[int], gaussian: bool) -> Constraint:
    """Bits everywhere, or real numbers in the first layer."""
    if not gaussian:
        return constraints.boolean
    return constraints.cat(
        [constraints.real, constraints.boolean], dim=-1, lengths=[sizes[0], sum(sizes[1:])]
    )


def layer_names(num_layers: int) -> list[str]:
    """``visible``, and ``hidden``, or ``hidden1``, ``hidden2`` and so on."""
    return (
        ["visible", "hidden"]
        if num_layers == 2
        else ["visible", *(f"hidden{k}" for k in range(1, num_layers))]
    )


def check_sizes(name: str, **sizes: object) -> None:
    """ValueError unless every layer has a unit."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(
                f"{name}: {argument} must be a whole number of at least 1, got {argument}={size!r}"
            )


def parameter(
    name: str,
    value: Tensor | None,
    shape: Sequence[int],
    std: float,
    dtype: torch.dtype | None,
    generator: torch.Generator | None = None,
) -> nn.Parameter:
    """A trainable copy of ``value``, or normal numbers of standard deviation ``std``; ValueError
    unless it fits and is finite.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if value is not None:
        start = torch.as_tensor(value).detach().to(dtype, copy=True)
    elif std:
        start = std * torch.randn(tuple(shape), dtype=dtype, generator=generator)
    else:
        start = torch.zeros(tuple(shape), dtype=dtype)
    if tuple(start.shape) != tuple(shape) or not bool(torch.isfinite(start).all()):
        raise ValueError(
            f"{name} must be finite and have shape {tuple(shape)}, got shape {tuple(start.shape)}:"
            f" {start}"
        )
    return nn.Parameter(start)
