"""Base classes of machines with layers: over all units, and over the visible ones."""

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

#: ``log_z`` is computed by enumeration if the number of states of the enumerated side, times the
#: number of units of the other, is at most this.
MAX_WORK = 1 << 26


class LayeredMachine(Energy):
    """Base class of energies defined by :class:`Layers`, over all layers or the visible one.

    A subclass defines :meth:`layers`, whose tensors have gradients in its parameters.

    Attributes:
        log_z: log Z in nats by enumeration in float64, if that takes less than about a second, else
            None; :meth:`log_partition` computes it for larger machines.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), LayeredMachine)
        True
    """

    def layers(self) -> Layers:
        """Return the layers in natural parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define layers()")

    def joint(self) -> LayeredEnergy:
        """Return the energy of all layers, with Gibbs blocks; it shares the parameters."""
        return Joint(self)

    def log_partition(self, max_units: int = 24) -> Tensor:
        r"""Compute log Z by a sum over all states of the smaller side, shape ``()``.

        It is differentiable. A side consists of all even or of all odd layers.

        Args:
            max_units: maximum number of units to enumerate; each additional unit doubles the time.

        Raises:
            ValueError: if the smaller side has more units.
        """
        units = self._enumerated()
        if units > max_units:
            raise ValueError(
                f"log Z of {type(self).__name__} needs a sum over 2^{units} states, more than"
                f" max_units={max_units} allows: estimate it (pyroebm.partition)"
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
        """Whether the smaller side can be enumerated."""
        return self._is_small

    def draw_layers(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Draw exact independent samples of all layers.

        Args:
            num_samples: number of draws.
            generator: source of randomness; None for torch's default one.

        Returns:
            states of each layer, shape ``(num_samples, n_l)``.

        Raises:
            NotImplementedError: if the smaller side is too large to enumerate.
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
    """Base class of energies over all layers in one flat event, with the layers as Gibbs blocks.

    The blocks are those of :class:`pyroebm.kernels.BlockGibbs`.

    Attributes:
        blocks: slice of each layer in the event, by name: ``visible``, then ``hidden`` or
            ``hidden1``, ``hidden2``, ...
        num_visible: number of visible units.

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
        """Return this energy, which is over all layers."""
        return self

    def marginal(self) -> Energy:
        """Return the energy of the visible units alone.

        Raises:
            ValueError: if the sum over the hidden units has no closed form.
        """
        raise ValueError(
            f"{type(self).__name__} has {len(self.blocks) - 1} hidden layers that depend on each"
            " other: the sum over them has no closed form; use joint(), bound the likelihood"
            " (variational_bound), or estimate it"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        layers = self.layers()
        return layers.energy(layers.split(x))

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of a layer given those next to it.

        Args:
            block: name of the layer.
            x: states, shape ``(chains, *event)``; the entries of the layer itself are ignored.

        Raises:
            ValueError: if there is no such layer.
        """
        if block not in self.blocks:
            raise ValueError(f"block must be one of {list(self.blocks)}, got block={block!r}")
        layers, index = self.layers(), list(self.blocks).index(block)
        return layers.distribution(index, layers.field(index, layers.split(x)))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return torch.cat(self.draw_layers(num_samples, generator), -1)


class Joint(LayeredEnergy):
    """Energy of all layers of a machine whose own events are the visible layer.

    It shares the machine's parameters.

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
        """Return the layers of the machine."""
        return self.machine.layers()

    def marginal(self) -> Energy:
        """Return the machine, whose events are the visible layer."""
        return self.machine

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        layers, visible = self.layers(), self.machine.initial(num_chains, generator)
        with torch.no_grad():
            return torch.cat(
                [visible, layers.draw(1, layers.field(1, [visible, None]), generator)], -1
            )


def layered_support(sizes: Sequence[int], gaussian: bool) -> Constraint:
    """Return the support: binary units, with real numbers in the first layer if ``gaussian``."""
    if not gaussian:
        return constraints.boolean
    return constraints.cat(
        [constraints.real, constraints.boolean], dim=-1, lengths=[sizes[0], sum(sizes[1:])]
    )


def layer_names(num_layers: int) -> list[str]:
    """Return ``visible`` and ``hidden``, or ``visible``, ``hidden1``, ``hidden2`` and so on."""
    return (
        ["visible", "hidden"]
        if num_layers == 2
        else ["visible", *(f"hidden{k}" for k in range(1, num_layers))]
    )


def check_sizes(name: str, **sizes: object) -> None:
    """Check that every layer has at least one unit.

    Raises:
        ValueError: otherwise.
    """
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(
                f"{name}: {argument} must be an integer of at least 1, got {argument}={size!r}"
            )


def parameter(
    name: str,
    value: Tensor | None,
    shape: Sequence[int],
    std: float,
    dtype: torch.dtype | None,
    generator: torch.Generator | None = None,
) -> nn.Parameter:
    """Return a parameter: a copy of ``value``, or normal numbers of standard deviation ``std``.

    Raises:
        ValueError: if ``value`` has another shape or is not finite.
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
