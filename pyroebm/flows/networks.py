"""The conditional Gaussian of auxiliary variables y given x."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroebm.core.rng import standard_normal
from pyroebm.core.saving import Saveable
from pyroebm.nn.mlp import mlp

__all__ = ["ConditionalGaussian"]

LOG_2PI = math.log(2.0 * math.pi)


class ConditionalGaussian(Saveable):
    r"""A learned Gaussian :math:`N(y \mid M(x), \Sigma(x))` with full covariance.

    One network returns :math:`M(x)` and the inverse Cholesky factor :math:`W(x) = L(x)^{-1}` of
    :math:`\Sigma = L L^\top`, lower triangular with diagonal :math:`e^{w(x)} > 0`, so no linear
    system is solved for the density:

    .. math::

        \log N(y \mid M, \Sigma) = \sum_i w_i - \tfrac12 |W (y - M)|^2 - \tfrac{k}{2} \log 2\pi,
        \qquad \log\det\Sigma = -2 \sum_i w_i.

    Initially it is the standard normal for every x.

    Args:
        dim: d, number of entries of x.
        extra: k = D - d, number of entries of y.
        hidden_sizes: widths of the hidden layers of the network.
        activation: ``"silu"`` or ``"tanh"``.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ValueError: if ``dim`` or ``extra`` is below 1.

    Example:
        >>> conditional = ConditionalGaussian(dim=1, extra=2)
        >>> conditional.log_prob(torch.zeros(3, 2), torch.ones(3, 1)).detach()
        tensor([-1.8379, -1.8379, -1.8379])
    """

    def __init__(
        self,
        dim: int,
        extra: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if dim < 1 or extra < 1:
            raise ValueError(f"dim and extra must be at least 1, got dim={dim}, extra={extra}")
        super().__init__()
        self.dim, self.extra = dim, extra
        outputs = 2 * extra + extra * (extra - 1) // 2
        self.net = mlp(
            dim, outputs, hidden_sizes, activation=activation, dtype=dtype, generator=generator
        )

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate the network at x ``(*batch, d)``.

        Returns:
            M ``(*batch, k)``, w ``(*batch, k)`` and the strictly lower triangular part of W
            ``(*batch, k, k)``.
        """
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (*batch, dim) with dim={self.dim}, got shape {tuple(x.shape)}"
            )
        k = self.extra
        out = self.net(x)
        below = out.new_zeros(*out.shape[:-1], k, k)
        if k > 1:
            row, column = torch.tril_indices(k, k, offset=-1, device=out.device)
            below[..., row, column] = out[..., 2 * k :]
        return out[..., :k], out[..., k : 2 * k], below

    def forward(self, x: Tensor) -> dist.MultivariateNormal:
        """Return the Pyro distribution of y given x ``(*batch, d)``, of event shape ``(k,)``."""
        mean, log_diagonal, below = self.parts(x)
        whitening = below + torch.diag_embed(log_diagonal.exp())
        identity = torch.eye(self.extra, dtype=x.dtype, device=x.device).expand_as(whitening)
        return dist.MultivariateNormal(
            mean, scale_tril=torch.linalg.solve_triangular(whitening, identity, upper=False)
        )

    def log_prob(self, y: Tensor, x: Tensor) -> Tensor:
        r"""Compute :math:`\log N(y \mid M(x), \Sigma(x))` in nats.

        Shapes are ``(*batch, k), (*batch, d) -> (*batch)``.
        """
        if y.shape != (*x.shape[:-1], self.extra):
            raise ValueError(
                f"y must have shape {(*x.shape[:-1], self.extra)} for x of shape"
                f" {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        mean, log_diagonal, below = self.parts(x)
        white = log_diagonal.exp() * (y - mean)
        if self.extra > 1:
            white = white + (below @ (y - mean).unsqueeze(-1)).squeeze(-1)
        return (log_diagonal - 0.5 * white**2).sum(-1) - 0.5 * self.extra * LOG_2PI

    def sample(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw y given x, reparameterized: ``(*batch, d) -> (num_samples, *batch, k)``."""
        conditional = self(x)
        noise = standard_normal(
            (num_samples, *x.shape[:-1], self.extra), generator, x.dtype, x.device
        )
        return conditional.loc + (conditional.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
