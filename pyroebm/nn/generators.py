"""Directed models: a network that turns noise into events, with or without a density that can be
written down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts, check_declaration
from pyroebm.core._torch_private import BatchNorm
from pyroebm.core.rng import standard_normal
from pyroebm.core.saving import Saveable
from pyroebm.core.supports import event_numel
from pyroebm.core.wrappers import eval_mode
from pyroebm.nn.mlp import mlp

__all__ = ["Generator", "MLPGenerator", "batch_norms"]


class Generator(Saveable):
    r"""A law of x given by how it is drawn: :math:`x = g(z) + s\,\varepsilon`, z and
    :math:`\varepsilon` standard normal.

    Without noise (s = 0) the law lies on a manifold of at most ``latent_dim`` dimensions and has no
    density there is a use for. With it :math:`q(x) = \int N(x \mid g(z), s^2 I)\, N(z \mid 0, I)\,
    dz`, an integral.

    Args:
        net: g, a module ``(n, latent_dim) -> (n, *event)``, or to rows of as many entries.
        latent_dim: entries of z.
        event_shape: shape of one event.
        sigma: s at the start, in units of x; it is learned, as its logarithm. None is no noise.

    Raises:
        ValueError: if a size is not positive, ``sigma`` is not positive and finite, or, when
            called, if the net's output has another number of entries.

    Example:
        >>> generator = Generator(nn.Linear(2, 3), latent_dim=2, event_shape=(3,), sigma=0.1)
        >>> generator.sample(5).shape, generator.sigma.detach()
        (torch.Size([5, 3]), tensor(0.1000))
    """

    log_sigma: nn.Parameter | None
    _anchor: Tensor

    def __init__(
        self,
        net: nn.Module,
        latent_dim: int,
        event_shape: Sequence[int],
        sigma: float | None = None,
    ) -> None:
        check_counts({"latent_dim": 1}, latent_dim)
        check_declaration(event_shape, torch.distributions.constraints.real)
        if sigma is not None and not 0.0 < sigma < math.inf:
            raise ValueError(
                f"sigma must be positive and finite, or None for no noise, got sigma={sigma}"
            )
        super().__init__()
        self.net = net
        self.latent_dim = latent_dim
        self.event_shape = torch.Size(event_shape)
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        # An empty buffer knows the dtype and the device that .to() gave.
        self.register_buffer("_anchor", like.new_empty(0), persistent=False)
        self.log_sigma = None if sigma is None else nn.Parameter(like.new_tensor(math.log(sigma)))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._anchor.device

    @property
    def sigma(self) -> Tensor:
        """s, a scalar; 0 without noise."""
        return self._anchor.new_zeros(()) if self.log_sigma is None else self.log_sigma.exp()

    def sample_latent(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_samples`` draws of z, shape ``(n, latent_dim)``."""
        return standard_normal((num_samples, self.latent_dim), generator, self.dtype, self.device)

    def forward(self, z: Tensor) -> Tensor:
        """g(z): ``(n, latent_dim) -> (n, *event)``."""
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"z must have shape (n, latent_dim) with latent_dim={self.latent_dim}, got shape"
                f" {tuple(z.shape)}"
            )
        x: Tensor = self.net(z)
        if x.numel() != len(z) * event_numel(self.event_shape):
            raise ValueError(
                f"net must give events of shape {tuple(self.event_shape)}, got {tuple(x.shape)}"
                f" for {len(z)} rows"
            )
        return x.reshape(len(z), *self.event_shape)

    def emit(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x at z, with its graph: g(z), and noise where there is any."""
        x = self(z)
        return (
            x
            if self.log_sigma is None
            else x + self.sigma * standard_normal(x.shape, generator, x.dtype, x.device)
        )

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_samples`` draws, shape ``(n, *event_shape)``, in eval mode: batch normalisation
        takes its running statistics, so that a row does not depend on the others.

        Raises:
            ValueError: if ``num_samples`` < 1.
        """
        check_counts({"num_samples": 1}, num_samples)
        with eval_mode(self):
            return self.emit(self.sample_latent(num_samples, generator), generator)


class MLPGenerator(Generator):
    """A perceptron as :class:`Generator`.

    Args:
        event_shape: shape of one event.
        latent_dim: entries of z.
        hidden_sizes: widths of the hidden layers.
        batch_norm: normalise each hidden layer before its activation (Ioffe and Szegedy, 2015),
            which couples the rows of a batch in training.
        activation: as in :class:`~pyroebm.energies.MLPEnergy`.
        sigma: as in :class:`Generator`.
        dtype: of the parameters.
        generator: source of the initial weights.

    Raises:
        ValueError: as :class:`Generator`, and if ``hidden_sizes`` or ``activation`` is none.

    Example:
        >>> MLPGenerator((1, 8, 8), latent_dim=10, hidden_sizes=(32, 32), batch_norm=True).sample(
        ...     3
        ... ).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        hidden_sizes: Sequence[int] = (128, 128),
        *,
        batch_norm: bool = False,
        activation: str = "silu",
        sigma: float | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"latent_dim": 1}, latent_dim)
        entries = event_numel(event_shape)
        net = mlp(
            latent_dim,
            entries,
            hidden_sizes,
            activation=activation,
            zero_last=False,
            dtype=dtype,
            generator=generator,
        )
        if batch_norm:
            last, layers = net[-1], []
            for layer in net:
                layers.append(layer)
                if isinstance(layer, nn.Linear) and layer is not last:
                    layers.append(nn.BatchNorm1d(layer.out_features, dtype=dtype))
            net = nn.Sequential(*layers)
        super().__init__(net, latent_dim, event_shape, sigma)


def batch_norms(module: nn.Module) -> Iterator[BatchNorm]:
    """The batch normalisations inside a module."""
    return (part for part in module.modules() if isinstance(part, BatchNorm))
