"""Generators: networks that map noise to events."""

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
    r"""A generator :math:`x = g(z) + s\,\varepsilon` with z and :math:`\varepsilon` normal.

    Without noise (s = 0) the distribution of x is on a manifold of at most ``latent_dim``
    dimensions and has no density that could be evaluated. With noise the density is the integral

    .. math:: q(x) = \int N(x \mid g(z), s^2 I)\, N(z \mid 0, I)\, dz

    Args:
        net: g, a module ``(n, latent_dim) -> (n, *event)``; it may flatten the event.
        latent_dim: number of entries of z.
        event_shape: shape of one event.
        sigma: initial s, in the unit of x; its logarithm is a parameter. None for no noise.

    Raises:
        ValueError: if a size or ``sigma`` is not positive and finite; when called, if the output of
            ``net`` has another number of entries.

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
        # .to() converts this empty buffer, which has the dtype and the device
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
        """Standard deviation s of the noise, a scalar; 0 without noise."""
        return self._anchor.new_zeros(()) if self.log_sigma is None else self.log_sigma.exp()

    def sample_latent(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` values of z, shape ``(num_samples, latent_dim)``."""
        return standard_normal((num_samples, self.latent_dim), generator, self.dtype, self.device)

    def forward(self, z: Tensor) -> Tensor:
        """Compute g(z): ``(n, latent_dim) -> (n, *event)``."""
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"z must have shape (n, latent_dim) with latent_dim={self.latent_dim}, got shape"
                f" {tuple(z.shape)}"
            )
        x: Tensor = self.net(z)
        if x.numel() != len(z) * event_numel(self.event_shape):
            raise ValueError(
                f"net must return events of shape {tuple(self.event_shape)}, got {tuple(x.shape)}"
                f" for n = {len(z)}"
            )
        return x.reshape(len(z), *self.event_shape)

    def emit(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x given z, with its graph: g(z), plus noise if there is any."""
        x = self(z)
        return (
            x
            if self.log_sigma is None
            else x + self.sigma * standard_normal(x.shape, generator, x.dtype, x.device)
        )

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` events, shape ``(num_samples, *event_shape)``, in evaluation mode.

        Batch normalization then uses its running statistics, so that the draws are independent.

        Raises:
            ValueError: if ``num_samples`` < 1.
        """
        check_counts({"num_samples": 1}, num_samples)
        with eval_mode(self):
            return self.emit(self.sample_latent(num_samples, generator), generator)


class MLPGenerator(Generator):
    """A :class:`Generator` whose network is a multi-layer perceptron.

    Args:
        event_shape: shape of one event.
        latent_dim: number of entries of z.
        hidden_sizes: widths of the hidden layers.
        batch_norm: normalize each hidden layer before its activation (Ioffe and Szegedy, 2015),
            which couples the events of a batch in training.
        activation: as in :class:`~pyroebm.energies.MLPEnergy`.
        sigma: as in :class:`Generator`.
        dtype: floating-point type of the parameters; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: as :class:`Generator`; if ``hidden_sizes`` is empty or ``activation`` is
            unknown.

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
    """Yield the batch normalizations in a module."""
    return (part for part in module.modules() if isinstance(part, BatchNorm))
