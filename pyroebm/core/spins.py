"""Distribution of independent spins, which torch does not have."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import Constraint, real

from pyroebm.core.supports import spin

__all__ = ["SpinBernoulli"]


class SpinBernoulli(TorchDistribution):
    r"""Distribution of independent spins: :math:`p(x) = e^{h x} / (2 \cosh h)` on {-1, +1}.

    Args:
        field: :math:`h`, of any shape, the batch shape.

    Example:
        >>> SpinBernoulli(torch.tensor([0.0, 1.0])).mean
        tensor([0.0000, 0.7616])
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"field": real}
    support = spin

    def __init__(self, field: Tensor, validate_args: bool | None = None) -> None:
        self.field = field
        super().__init__(field.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpinBernoulli:
        """Return the distribution with its field expanded to another batch shape."""
        return SpinBernoulli(self.field.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of each spin, shape ``batch_shape``."""
        return torch.tanh(self.field)

    @property
    def variance(self) -> Tensor:
        """Variance of each spin, shape ``batch_shape``."""
        return torch.cosh(self.field) ** -2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw independent samples, shape ``(*sample_shape, *batch_shape)``."""
        with torch.no_grad():
            return (
                2.0
                * torch.bernoulli(
                    torch.sigmoid(2.0 * self.field).expand(
                        self._extended_shape(torch.Size(sample_shape))
                    )
                )
                - 1.0
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each spin, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.nn.functional.logsigmoid(2.0 * self.field * value)
