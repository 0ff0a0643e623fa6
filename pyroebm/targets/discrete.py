"""Exponential families of binary units, spins and one-hot vectors. States are floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.supports import spin
from pyroebm.targets.exponential import ExponentialFamily, check_categories

__all__ = ["BernoulliProduct", "CategoricalOneHot", "SpinProduct"]


class BernoulliProduct(ExponentialFamily):
    r"""Independent binary units on :math:`\{0, 1\}^d`.

    .. math:: E(x) = -\langle \eta, x \rangle, \qquad \log Z = \sum_i \log(1 + e^{\eta_i})

    Args:
        logits: :math:`\eta`, shape ``event_shape``; states are floats 0 and 1.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``logits`` is not finite.

    Example:
        >>> e = BernoulliProduct([0.0, 0.0])
        >>> e.mean, round(e.log_z, 6)  # log 4
        (tensor([0.5000, 0.5000]), 1.386294)
    """

    logits: Tensor

    def __init__(self, logits: Any, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.boolean, dtype, logits=logits)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return (self.logits,)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        return torch.nn.functional.softplus(self.logits.double())

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return torch.sigmoid(self.logits)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return torch.sigmoid(self.logits) * torch.sigmoid(-self.logits)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return (
            self._uniform((n, *self.event_shape), generator) < torch.sigmoid(self.logits.double())
        ).to(self.dtype)


class SpinProduct(ExponentialFamily):
    r"""Independent spins on :math:`\{-1, +1\}^d`.

    .. math:: E(x) = -\langle h, x \rangle, \qquad \log Z = \sum_i \log(2 \cosh h_i)

    Args:
        field: :math:`h`, shape ``event_shape``; states are floats -1 and +1.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``field`` is not finite.

    Example:
        >>> e = SpinProduct([0.0, 1.0])
        >>> e.mean, e(torch.tensor([[1.0, -1.0]]))
        (tensor([0.0000, 0.7616]), tensor([1.]))
    """

    field: Tensor

    def __init__(self, field: Any, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(spin, dtype, field=field)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return (self.field,)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        return torch.logaddexp(self.field.double(), -self.field.double())

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return torch.tanh(self.field)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return torch.cosh(self.field) ** -2

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        up = self._uniform((n, *self.event_shape), generator) < torch.sigmoid(
            2.0 * self.field.double()
        )
        return torch.where(up, 1.0, -1.0)


class CategoricalOneHot(ExponentialFamily):
    r"""Independent one-hot vectors.

    .. math:: E(x) = -\langle \eta, x \rangle, \qquad \log Z = \sum_{sites} \log \sum_j e^{\eta_j}

    The modes of a single vector are its categories.

    Args:
        logits: :math:`\eta`, shape ``(*sites, k)``, with k >= 2 categories.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``logits`` is not finite, or if its last dimension is smaller than 2.

    Example:
        >>> e = CategoricalOneHot([0.0, 0.0, 0.0, 0.0])
        >>> e.mean, round(e.log_z, 6)  # log 4
        (tensor([0.2500, 0.2500, 0.2500, 0.2500]), 1.386294)
    """

    logits: Tensor

    def __init__(self, logits: Any, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.one_hot, dtype, logits=logits)
        check_categories(logits=self.logits)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return (self.logits,)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        return torch.logsumexp(self.logits.double(), -1)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return torch.softmax(self.logits, -1)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self.mean * (1.0 - self.mean)

    @property
    def mode_weights(self) -> Tensor | None:
        """Probability of each mode, shape ``(k,)``; None where unknown."""
        return self.mean if len(self.event_shape) == 1 else None

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state: ``(*batch, *event) -> (*batch)``, int64."""
        if len(self.event_shape) > 1:
            return super().mode_of(x)
        self.batch_shape(x)
        return x.argmax(-1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        # Gumbel-max: the category with the largest sum of logit and Gumbel noise (Gumbel, 1954)
        gumbel = -torch.log(-torch.log(self._uniform((n, *self.event_shape), generator)))
        index = (self.logits.double() + gumbel).argmax(-1)
        return torch.nn.functional.one_hot(index, self.event_shape[-1]).to(self.dtype)
