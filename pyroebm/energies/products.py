"""Products of experts on learned features, for training deep directed models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import standard_normal
from pyroebm.core.supports import event_sum
from pyroebm.energies.neural import warn_of_network

__all__ = ["ProductOfExpertsEnergy"]


class ProductOfExpertsEnergy(Energy):
    r"""Product of experts on learned features, with a quadratic envelope (Kim and Bengio, 2016).

    .. math::

        E(x)
        = \frac{|x|^2}{\sigma^2} - b^\top x - \sum_i \log\bigl(1 + e^{w_i^\top f(x) + c_i}\bigr)

    An expert is a hidden binary unit summed out: :math:`e^{-E}` is a normal density times
    :math:`\prod_i (1 + e^{w_i^\top f(x) + c_i})`, so that :math:`Z < \infty` if f grows no faster
    than :math:`|x|`. The biases are initialized to 0, the weights to random numbers, since equal
    experts would remain equal.

    Args:
        features: f, a smooth module ``(n, *event) -> (n, num_features)``.
        num_features: width of the output of f.
        event_shape: shape of one event.
        num_experts: number of experts.
        sigma: :math:`\sigma`, in the unit of x; without experts the variance is :math:`\sigma^2 /
            2`.
        generator: source of the initial weights, of variance 1 / ``num_features``; None for torch's
            default one.

    Raises:
        ValueError: if a number is not positive; when called, if the output of f has another width.

    Warns:
        UserWarning: for batch normalization and for piecewise linear features, as
            :class:`~pyroebm.energies.NeuralEnergy`.

    Example:
        >>> energy = ProductOfExpertsEnergy(nn.Tanh(), 2, (2,), num_experts=4, sigma=2.0)
        >>> energy(torch.zeros(1, 2)).detach()  # -4 log 2
        tensor([-2.7726])
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        event_shape: Sequence[int],
        num_experts: int = 128,
        sigma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"num_features": 1, "num_experts": 1}, num_features, num_experts)
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got sigma={sigma}")
        super().__init__(event_shape)
        warn_of_network(features, self.support, sigma)
        like = next((p for p in features.parameters() if p.is_floating_point()), self._anchor)
        self.features, self.sigma = features, float(sigma)
        weight = standard_normal((num_experts, num_features), generator, like.dtype, like.device)
        self.weight = nn.Parameter(weight / math.sqrt(num_features))
        self.expert_bias = nn.Parameter(like.new_zeros(num_experts))
        self.bias = nn.Parameter(like.new_zeros(tuple(event_shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        dims = len(self.event_shape)
        batch = x.shape[: x.dim() - dims]
        features: Tensor = self.features(x.reshape(-1, *self.event_shape))
        if features.shape != (batch.numel(), self.weight.shape[1]):
            raise ValueError(
                f"features must map (n, *event_shape) to (n, {self.weight.shape[1]}), got shape"
                f" {tuple(features.shape)} for"
                f" n = {batch.numel()}"
            )
        experts = nn.functional.softplus(
            nn.functional.linear(features, self.weight, self.expert_bias)
        ).sum(-1)
        return event_sum(x.square() / self.sigma**2 - self.bias * x, dims) - experts.reshape(batch)
