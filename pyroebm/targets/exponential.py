r"""Exponential families :math:`E(x) = -\langle \eta, T(x) \rangle` with known log Z."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.core._torch_private import standard_gamma
from pyroebm.core.supports import event_sum
from pyroebm.targets.base import Target, as_floats, check_positive

__all__ = ["Beta", "Dirichlet", "Exponential", "ExponentialFamily", "Gamma", "LogNormal"]


class ExponentialFamily(Target):
    r"""Base class of exponential families, independent over the entries or vectors of an event.

    .. math:: p(x) = e^{\langle \eta, T(x) \rangle - A(\eta)}

    A subclass defines :meth:`natural`, :meth:`statistics`, :meth:`log_partition`, mean, variance
    and draws. See Wainwright and Jordan, "Graphical Models, Exponential Families, and Variational
    Inference" (2008).

    Args:
        support: constraint of an event.
        dtype: floating-point type; None for that of the tensors given, else torch's default.
        parameters: parameters of the family, by name; their broadcast shape is the event shape.

    Raises:
        ValueError: if the parameters do not broadcast or one is not finite.

    Example:
        >>> e = Gamma(shape=2.0, rate=3.0)
        >>> e.natural()
        (tensor(1.), tensor(-3.))
    """

    def __init__(self, support: Constraint, dtype: torch.dtype | None, **parameters: Any) -> None:
        tensors = as_floats(dtype, **parameters)
        try:
            tensors = [t.clone() for t in torch.broadcast_tensors(*tensors)]
        except RuntimeError:
            shapes = ", ".join(
                f"{name} {tuple(t.shape)}" for name, t in zip(parameters, tensors, strict=True)
            )
            raise ValueError(
                f"the parameters must broadcast to one event shape, got shapes {shapes}"
            ) from None
        super().__init__(tensors[0].shape, support, dtype=tensors[0].dtype)
        for name, tensor in zip(parameters, tensors, strict=True):
            self.register_buffer(name, tensor)

    def natural(self) -> tuple[Tensor, ...]:
        r"""Return the natural parameters :math:`\eta`, each of shape ``event_shape``."""
        raise NotImplementedError(f"{type(self).__name__} must define natural()")

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the sufficient statistics, one per natural parameter, ``(*batch, *event)``."""
        return (x,)

    def log_partition(self) -> Tensor:
        r"""Return :math:`A(\eta)` of each entry or vector of an event; :attr:`log_z` is the sum."""
        raise NotImplementedError(f"{type(self).__name__} must define log_partition()")

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        terms = [eta * t for eta, t in zip(self.natural(), self.statistics(x), strict=True)]
        return -event_sum(
            torch.stack(terms).sum(0) if len(terms) > 1 else terms[0], len(self.event_shape)
        )

    def _log_z(self) -> float:
        return float(self.log_partition().sum())

    def _log_gammas(self, shape: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        # Logarithms of gamma draws. For small shapes the draws themselves underflow; G(a) and G(a +
        # 1) U^(1/a) have the same distribution.
        where = self.device if generator is None else generator.device
        shapes = shape.double().to(where).expand(n, *shape.shape)
        raised = standard_gamma(shapes + 1.0, generator).log().to(self.device)
        return raised + torch.log1p(-self._uniform(shapes.shape, generator)) / shape.double()

    def _inside(self, x: Tensor, high: float = math.inf) -> Tensor:
        # rounding to the target's dtype must not move a draw to the boundary of an open set
        return x.to(self.dtype).clamp(torch.finfo(self.dtype).tiny, high)


class Exponential(ExponentialFamily):
    r"""The exponential distribution on :math:`x > 0`.

    .. math:: E(x) = \lambda x, \qquad \log Z = -\log \lambda

    Args:
        rate: :math:`\lambda > 0`, shape ``event_shape``.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``rate`` is not positive and finite.

    Example:
        >>> e = Exponential(2.0)
        >>> e(torch.tensor([1.0])), e.mean, round(e.log_z, 6)
        (tensor([2.]), tensor(0.5000), -0.693147)
    """

    rate: Tensor

    def __init__(self, rate: Any = 1.0, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.positive, dtype, rate=rate)
        check_positive(rate=self.rate)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return (-self.rate,)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        return -self.rate.double().log()

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return 1.0 / self.rate

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self.rate**-2

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._inside(
            -torch.log1p(-self._uniform((n, *self.event_shape), generator)) / self.rate
        )


class Gamma(ExponentialFamily):
    r"""The gamma distribution on :math:`x > 0`.

    .. math::

        E(x) = -(\alpha - 1) \log x + \beta x, \qquad
        \log Z = \log \Gamma(\alpha) - \alpha \log \beta

    Args:
        shape: :math:`\alpha > 0`.
        rate: :math:`\beta > 0`; both broadcast to ``event_shape``.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if a parameter is not positive and finite.

    Example:
        >>> e = Gamma(shape=2.0, rate=4.0)
        >>> e(torch.tensor([1.0])), e.mean, e.variance
        (tensor([4.]), tensor(0.5000), tensor(0.1250))
    """

    shape: Tensor
    rate: Tensor

    def __init__(self, shape: Any, rate: Any = 1.0, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.positive, dtype, shape=shape, rate=rate)
        check_positive(shape=self.shape, rate=self.rate)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return self.shape - 1.0, -self.rate

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the sufficient statistics, each ``(*batch, *event)``."""
        return x.log(), x

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        return torch.lgamma(self.shape.double()) - self.shape.double() * self.rate.double().log()

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self.shape / self.rate

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self.shape / self.rate**2

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._inside(self._log_gammas(self.shape, n, generator).exp() / self.rate)


class Beta(ExponentialFamily):
    r"""The beta distribution on :math:`0 < x < 1`.

    .. math:: E(x) = -(a - 1) \log x - (b - 1) \log(1 - x), \qquad \log Z = \log B(a, b)

    Args:
        a: first parameter, a > 0.
        b: second parameter, b > 0; both broadcast to ``event_shape``.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if a parameter is not positive and finite.

    Example:
        >>> e = Beta(2.0, 3.0)
        >>> round(e.log_z, 6), e.mean, e.variance  # B(2, 3) = 1/12
        (-2.484907, tensor(0.4000), tensor(0.0400))
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Any, b: Any, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.unit_interval, dtype, a=a, b=b)
        check_positive(a=self.a, b=self.b)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return self.a - 1.0, self.b - 1.0

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the sufficient statistics, each ``(*batch, *event)``."""
        return x.log(), torch.log1p(-x)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        a, b = self.a.double(), self.b.double()
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self.mean * (1.0 - self.mean) / (self.a + self.b + 1.0)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        log_odds = self._log_gammas(self.a, n, generator) - self._log_gammas(self.b, n, generator)
        return self._inside(torch.sigmoid(log_odds), 1.0 - torch.finfo(self.dtype).eps / 2)


class Dirichlet(ExponentialFamily):
    r"""The Dirichlet distribution on the simplex.

    .. math::

        E(x) = -\sum_i (\alpha_i - 1) \log x_i, \qquad
        \log Z = \sum_i \log \Gamma(\alpha_i) - \log \Gamma\bigl(\textstyle\sum_i \alpha_i\bigr)

    Z is the integral over all coordinates but the last, the measure of the stick-breaking
    transform.

    Args:
        concentration: :math:`\alpha_i > 0`, shape ``(*sites, k)``: a simplex of k >= 2 entries for
            each site.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``concentration`` is not positive and finite, or if its last dimension is
            smaller than 2.

    Example:
        >>> e = Dirichlet([1.0, 2.0, 1.0])
        >>> e.mean, round(e.log_z, 6)  # 1/3!
        (tensor([0.2500, 0.5000, 0.2500]), -1.791759)
    """

    concentration: Tensor

    def __init__(self, concentration: Any, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(constraints.simplex, dtype, concentration=concentration)
        check_positive(concentration=self.concentration)
        check_categories(concentration=self.concentration)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return (self.concentration - 1.0,)

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the sufficient statistics, each ``(*batch, *event)``."""
        return (x.log(),)

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        alpha = self.concentration.double()
        return torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self.concentration / self.concentration.sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self.mean * (1.0 - self.mean) / (self.concentration.sum(-1, keepdim=True) + 1.0)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._inside(torch.softmax(self._log_gammas(self.concentration, n, generator), -1))


class LogNormal(ExponentialFamily):
    r"""The log-normal distribution, that of :math:`e^y` with :math:`y \sim N(\mu, \sigma^2)`.

    .. math::

        E(x) = \Bigl(1 - \frac{\mu}{\sigma^2}\Bigr) \log x + \frac{\log^2 x}{2 \sigma^2}, \qquad
        \log Z = \frac{\mu^2}{2 \sigma^2} + \log \sigma + \tfrac12 \log 2\pi

    Args:
        loc: :math:`\mu`.
        scale: :math:`\sigma > 0`; both broadcast to ``event_shape``.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``scale`` is not positive or a parameter is not finite.

    Example:
        >>> e = LogNormal(0.0, 1.0)
        >>> e(torch.tensor([1.0])), e.mean
        (tensor([-0.]), tensor(1.6487))
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, loc: Any = 0.0, scale: Any = 1.0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(constraints.positive, dtype, loc=loc, scale=scale)
        check_positive(scale=self.scale)

    def natural(self) -> tuple[Tensor, ...]:
        """Return the natural parameters, each of shape ``event_shape``."""
        return self.loc / self.scale**2 - 1.0, -0.5 / self.scale**2

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the sufficient statistics, each ``(*batch, *event)``."""
        return x.log(), x.log().square()

    def log_partition(self) -> Tensor:
        """Return the log-partition function of each entry or vector of an event."""
        loc, scale = self.loc.double(), self.scale.double()
        return 0.5 * (loc / scale) ** 2 + scale.log() + 0.5 * math.log(2.0 * math.pi)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return torch.exp(self.loc + 0.5 * self.scale**2)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return torch.expm1(self.scale**2) * self.mean**2

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._inside(
            torch.exp(self.loc + self.scale * self._normal((n, *self.event_shape), generator))
        )


def check_categories(**values: Tensor) -> None:
    """Check that each value has a last dimension of at least two categories.

    Raises:
        ValueError: otherwise.
    """
    for name, value in values.items():
        if value.dim() < 1 or value.shape[-1] < 2:
            raise ValueError(
                f"{name} must have shape (*sites, k) with k >= 2 categories, got shape"
                f" {tuple(value.shape)}"
            )
