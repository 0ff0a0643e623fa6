"""Energies made of networks: any module, a perceptron, a convolutional net, each with what makes it
normalisable.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

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

#: Modules whose output for one row depends on the others, and those without a second derivative.
COUPLING = (BatchNorm,)
PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh)


class NeuralEnergy(Energy):
    r"""A network as an energy, in a quadratic envelope that makes it normalisable.

    .. math:: E(x) = f_\theta(x) + \sum_i \frac{(x_i - m_i)^2}{2 s_i^2}

    A perceptron of the usual activations grows no faster than :math:`|x|`, so that :math:`Z <
    \infty` with an envelope; on R^d without one it may well be infinite. Bounded and discrete
    supports need none.

    Args:
        net: :math:`f_\theta`, a module ``(n, *event) -> (n,)`` or ``(n, 1)``.
        event_shape: shape of one event.
        support: constraint of one event.
        scale: :math:`s`, in units of x: a number, a tensor of ``event_shape``, or None for no
            envelope.
        center: :math:`m`, likewise.

    Warns:
        UserWarning: of a real support without envelope (:math:`Z` may be infinite), of batch
            normalisation (it couples rows), of piecewise linear activations (their second
            derivative is zero almost everywhere, so score matching learns nothing from it).

    Raises:
        ValueError: if ``scale`` is not positive and finite, or does not fit ``event_shape``.

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
        """The quadratic term, ``(*batch, *event) -> (*batch)``; 0 without one."""
        if self.scale is None:
            return x.new_zeros(self.batch_shape(x))
        return event_sum(0.5 * ((x - self.center) / self.scale) ** 2, len(self.event_shape))

    def fit_envelope(self, data: Tensor, factor: float = 2.0) -> None:
        """Set m to the mean of the data and s to ``factor`` times their largest standard deviation,
        the same for all entries.

        Args:
            data: rows ``(N, *event)``.
            factor: larger leaves more room, and more that the network must learn to empty.

        Raises:
            ValueError: if there is no envelope, ``factor`` is not positive, or the data do not fit
                or do not vary.
        """
        if self.scale is None:
            raise ValueError("fit_envelope needs an envelope: give scale when the energy is made")
        self.check_states(data, "data")
        spread = data.std(0, correction=0).max()
        if not (0.0 < factor < math.inf and bool(spread > 0) and bool(torch.isfinite(spread))):
            raise ValueError(
                f"factor must be positive and data must vary, got factor={factor}, deviation"
                f" {float(spread)}"
            )
        self.center.copy_(data.mean(0))
        self.scale.fill_(factor * spread)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Starting states; with an envelope on R^d they are drawn from its normal law, cut to half
        its width.
        """
        if self.scale is None or not is_real(self.support):
            return super().initial(num_chains, generator)
        where = self.device if generator is None else generator.device
        noise = torch.randn(
            (num_chains, *self.event_shape), generator=generator, dtype=self.dtype, device=where
        ).to(self.device)
        return self.center + 0.5 * self.scale * noise


def row_values(net: Callable[[Tensor], Tensor], x: Tensor, event_shape: Sequence[int]) -> Tensor:
    """One number for each event of ``x``, ``(*batch, *event) -> (*batch)``, of a network of rows
    ``(n, *event) -> (n,)`` or ``(n, 1)``; ValueError for any other shape.
    """
    batch = x.shape[: x.dim() - len(event_shape)]
    # as chains and batches come: each view that is spared is an operation less, there and back
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
    """Warn of what makes a network no density, or a bad one: no envelope, coupled rows, no second
    derivative.
    """
    modules = list(net.modules())
    base = base_constraint(support)
    interval = {"lower_bound", "upper_bound"} <= vars(base).keys()
    bounded = is_discrete(support) or interval or isinstance(base, type(constraints.simplex))
    if scale is None and not bounded:
        warnings.warn(
            "a network alone need not grow where |x| does, so exp(-E) may have no integral over"
            f" {support}: give scale, add an"
            " energy that grows, or name a bounded support",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if any(isinstance(module, COUPLING) for module in modules):
        warnings.warn(
            "batch normalisation makes the energy of a row depend on the others in training: that"
            " is no density of one event",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if any(isinstance(module, PIECEWISE_LINEAR) for module in modules) and not is_discrete(support):
        warnings.warn(
            "a piecewise linear network has no second derivative almost everywhere: score matching"
            " learns nothing from it, and"
            " gradients jump. SiLU, softplus and tanh are smooth",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )


class MLPEnergy(NeuralEnergy):
    r"""A perceptron of the entries of an event as :class:`NeuralEnergy`; it starts as its envelope,
    a normal law.

    Args:
        event_shape: shape of one event; it is flattened.
        hidden_sizes: widths of the hidden layers.
        activation: "silu", "tanh", "gelu", "softplus" or "relu".
        support, scale, center: as in :class:`NeuralEnergy`.
        spectral_norm: divide hidden weights by their largest singular value (Miyato et al., 2018).
        dtype: of the parameters.
        generator: source of the initial weights.

    Raises:
        ValueError: as :class:`NeuralEnergy`, and if ``hidden_sizes`` or ``activation`` is out of
            range.

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
        net = layers if len(event_shape) == 1 else nn.Sequential(_Rows(), *layers)
        super().__init__(net, event_shape, support=support, scale=scale, center=center)


class ConvEnergy(NeuralEnergy):
    r"""A convolutional network of images as :class:`NeuralEnergy`; it starts as its envelope.

    Args:
        event_shape: (colors, height, width).
        channels: filters of each layer; the first at full size, each further one halves it.
        activation, support, scale, center, spectral_norm, dtype, generator: as in
            :class:`MLPEnergy`.

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


class _Rows(nn.Module):
    """Events as rows: ``(n, *event) -> (n, d)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)
