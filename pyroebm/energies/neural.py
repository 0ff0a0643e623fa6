"""Energies defined by neural networks, with an envelope that makes them normalizable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.core._checks import stacklevel_of_user
from pyroebm.core._torch_private import BatchNorm
from pyroebm.core.energy import Energy
from pyroebm.core.supports import base_constraint, event_sum, is_discrete, is_real
from pyroebm.nn.conv import convolutions
from pyroebm.nn.mlp import mlp

__all__ = ["ConvEnergy", "MLPEnergy", "NeuralEnergy", "row_values", "warn_of_network"]

#: Modules whose output for one event depends on the others, and those without second derivatives.
COUPLING = (BatchNorm,)
PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh)


class NeuralEnergy(Energy):
    r"""A network as an energy, with a quadratic envelope that makes it normalizable.

    .. math:: E(x) = f_\theta(x) + \sum_i \frac{(x_i - m_i)^2}{2 s_i^2}

    A perceptron with the usual activations grows no faster than :math:`|x|`, so that :math:`Z <
    \infty` with an envelope. On R^d without one Z may be infinite. Bounded and discrete supports
    need no envelope.

    Args:
        net: :math:`f_\theta`, a module ``(n, *event) -> (n,)`` or ``(n, 1)``.
        event_shape: shape of one event.
        support: constraint of one event.
        scale: :math:`s`, in the unit of x: a number, a tensor of ``event_shape``, or None for no
            envelope.
        center: :math:`m`, in the unit of x: a number, or a tensor of ``event_shape``.

    Raises:
        ValueError: if ``scale`` is not positive and finite, or if ``scale`` or ``center`` does not
            broadcast to ``event_shape``.

    Warns:
        UserWarning: for a real support without envelope (:math:`Z` may be infinite), for batch
            normalization (it couples events), and for piecewise linear activations (their second
            derivative is zero almost everywhere, so score matching cannot train them).

    Example:
        >>> energy = NeuralEnergy(
        ...     nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)), (2,), scale=3.0
        ... )
        >>> energy(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    center: Tensor
    scale: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        *,
        support: Constraint = constraints.real,
        scale: float | Tensor | None = None,
        center: float | Tensor = 0.0,
    ) -> None:
        super().__init__(event_shape, support)
        self.net = net
        warn_of_network(net, support, scale)
        like = next((p for p in net.parameters() if p.is_floating_point()), self._anchor)
        self.register_buffer("center", self._entries("center", center, like))
        self.register_buffer(
            "scale", None if scale is None else self._entries("scale", scale, like)
        )
        if self.scale is not None and not bool(
            ((self.scale > 0) & torch.isfinite(self.scale)).all()
        ):
            raise ValueError(f"scale must be positive and finite, got scale={scale}")

    def _entries(self, name: str, value: float | Tensor, like: Tensor) -> Tensor:
        entries = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        try:
            return entries.broadcast_to(self.event_shape).clone()
        except RuntimeError as error:
            raise ValueError(
                f"{name} must be a number or of the event_shape {tuple(self.event_shape)}, got"
                f" shape {tuple(entries.shape)}"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        values = row_values(self.net, x, self.event_shape)
        return values if self.scale is None else values + self.envelope(x)

    def envelope(self, x: Tensor) -> Tensor:
        """Return the quadratic term: ``(*batch, *event) -> (*batch)``; 0 without an envelope."""
        if self.scale is None:
            return x.new_zeros(self.batch_shape(x))
        return event_sum(0.5 * ((x - self.center) / self.scale) ** 2, len(self.event_shape))

    def fit_envelope(self, data: Tensor | np.ndarray, factor: float = 2.0) -> None:
        """Set the center of the envelope to the mean of data, and its scale from their deviation.

        The scale is ``factor`` times the largest standard deviation, the same for all entries.

        Args:
            data: events, shape ``(N, *event)``: a tensor of the dtype and device of the energy,
                or a NumPy array.
            factor: ratio of the scale to the standard deviation. A wider envelope restricts the
                network less, but the network must then learn to exclude more of the space.

        Raises:
            ValueError: if there is no envelope, if ``factor`` is not positive, or if the data have
                another shape, dtype or device, or do not vary.
        """
        if self.scale is None:
            raise ValueError("fit_envelope needs an envelope: give scale to the constructor")
        data = self.as_states(data, "data")
        spread = data.std(0, correction=0).max()
        if not (0.0 < factor < math.inf and bool(spread > 0) and bool(torch.isfinite(spread))):
            raise ValueError(
                f"factor must be positive and data must vary, got factor={factor}, deviation"
                f" {float(spread)}"
            )
        self.center.copy_(data.mean(0))
        self.scale.fill_(factor * spread)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states, shape ``(num_chains, *event)``.

        With an envelope on R^d they are normal, with half the scale of the envelope.

        Args:
            num_chains: number of states.
            generator: source of randomness; None for torch's default one.
        """
        if self.scale is None or not is_real(self.support):
            return super().initial(num_chains, generator)
        where = self.device if generator is None else generator.device
        noise = torch.randn(
            (num_chains, *self.event_shape), generator=generator, dtype=self.dtype, device=where
        ).to(self.device)
        return self.center + 0.5 * self.scale * noise


def row_values(net: Callable[[Tensor], Tensor], x: Tensor, event_shape: Sequence[int]) -> Tensor:
    """Evaluate a network ``(n, *event) -> (n,)`` or ``(n, 1)`` on events of any batch shape.

    Args:
        net: the network.
        x: events, shape ``(*batch, *event)``.
        event_shape: shape of one event.

    Returns:
        shape ``(*batch)``.

    Raises:
        ValueError: if the network returns another shape.
    """
    batch = x.shape[: x.dim() - len(event_shape)]
    # the usual shape of chains and batches, for which no view is made: it would be one more
    # operation in the forward and in the backward pass
    flat = len(batch) == 1
    values = net(x if flat else x.reshape(-1, *event_shape))
    if values.dim() == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.shape != (batch.numel(),):
        raise ValueError(
            f"net must map (n, *event_shape) to (n,) or (n, 1), got shape {tuple(values.shape)}"
            f" for n = {batch.numel()}"
        )
    return values if flat else values.reshape(batch)


def warn_of_network(net: nn.Module, support: Constraint, scale: object) -> None:
    """Warn if a network may define no density, or one that is hard to train.

    The reasons are a missing envelope, events that are coupled by batch normalization, and second
    derivatives that are zero.
    """
    modules = list(net.modules())
    base = base_constraint(support)
    interval = {"lower_bound", "upper_bound"} <= vars(base).keys()
    bounded = is_discrete(support) or interval or isinstance(base, type(constraints.simplex))
    if scale is None and not bounded:
        warnings.warn(
            "a network need not grow with |x|, so exp(-E) may have no finite integral over"
            f" {support}: give scale, add an energy that grows, or give a bounded support",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if any(isinstance(module, COUPLING) for module in modules):
        warnings.warn(
            "batch normalization makes the energy of an event depend on the others in training, so"
            " that it defines no density of one event",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if any(isinstance(module, PIECEWISE_LINEAR) for module in modules) and not is_discrete(support):
        warnings.warn(
            "a piecewise linear network has no second derivative almost everywhere: score matching"
            " cannot train it, and its gradients are discontinuous; use SiLU, softplus or tanh",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )


class MLPEnergy(NeuralEnergy):
    r"""A multi-layer perceptron on the entries of an event, as :class:`NeuralEnergy`.

    Its last layer is initialized to zero, so that it starts as its envelope, a normal distribution.

    Args:
        event_shape: shape of one event; it is flattened.
        hidden_sizes: widths of the hidden layers.
        activation: "silu", "tanh", "gelu", "softplus" or "relu".
        support: constraint of one event.
        scale: scale of the envelope, as in :class:`NeuralEnergy`.
        center: center of the envelope, as in :class:`NeuralEnergy`.
        spectral_norm: divide hidden weights by their largest singular value (Miyato et al., 2018).
        dtype: floating-point type of the parameters; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: as :class:`NeuralEnergy`; if ``hidden_sizes`` is empty or not positive, or if
            ``activation`` is unknown.

    Example:
        >>> energy = MLPEnergy((2,), hidden_sizes=(128, 128), scale=2.0)
        >>> energy(torch.tensor([[2.0, 0.0]])).detach()
        tensor([0.5000])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden_sizes: Sequence[int] = (128, 128),
        *,
        activation: str = "silu",
        support: Constraint = constraints.real,
        scale: float | Tensor | None = 10.0,
        center: float | Tensor = 0.0,
        spectral_norm: bool = False,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        entries = math.prod(event_shape)
        layers = mlp(
            entries,
            1,
            hidden_sizes,
            activation=activation,
            spectral_norm=spectral_norm,
            dtype=dtype,
            generator=generator,
        )
        net = layers if len(event_shape) == 1 else nn.Sequential(_Flatten(), *layers)
        super().__init__(net, event_shape, support=support, scale=scale, center=center)


class ConvEnergy(NeuralEnergy):
    r"""A convolutional network on images, as :class:`NeuralEnergy`.

    Its last layer is initialized to zero, so that it starts as its envelope.

    Args:
        event_shape: (colors, height, width).
        channels: filters of each layer; each layer after the first halves height and width.
        activation: "silu", "tanh", "gelu", "softplus" or "relu".
        support: constraint of one event.
        scale: scale of the envelope, as in :class:`NeuralEnergy`.
        center: center of the envelope, as in :class:`NeuralEnergy`.
        spectral_norm: divide filters by their largest singular value (Miyato et al., 2018).
        dtype: floating-point type of the parameters; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: as :class:`MLPEnergy`.

    Example:
        >>> ConvEnergy((1, 8, 8), channels=(8, 16), scale=1.0)(torch.zeros(3, 1, 8, 8)).detach()
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 128),
        *,
        activation: str = "silu",
        support: Constraint = constraints.real,
        scale: float | Tensor | None = 10.0,
        center: float | Tensor = 0.0,
        spectral_norm: bool = False,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        net = convolutions(
            event_shape,
            1,
            channels,
            activation=activation,
            spectral_norm=spectral_norm,
            dtype=dtype,
            generator=generator,
        )
        super().__init__(net, event_shape, support=support, scale=scale, center=center)


class _Flatten(nn.Module):
    """Flattens events: ``(n, *event) -> (n, d)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)
