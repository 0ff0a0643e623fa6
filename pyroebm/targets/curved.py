"""Curved densities in few dimensions: banana, Rosenbrock, funnel, ring."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pyroebm.targets.base import LOG_TWO_PI, Target, check_each, check_positive, rejection

__all__ = ["Banana", "Funnel", "Ring", "Rosenbrock"]


class _Bent(Target):
    # base of Banana and Rosenbrock, normalized: x ~ N(location, variance), y ~ N(bend x^2 + shift,
    # noise)
    event_shape = torch.Size([2])

    def __init__(
        self,
        location: float,
        variance: float,
        bend: float,
        shift: float,
        noise: float,
        dtype: torch.dtype | None,
    ) -> None:
        check_each("finite", torch.isfinite, location=location, bend=bend)
        check_positive(variance=variance, noise=noise)
        super().__init__(dtype=dtype)
        self.first = (location, variance)
        self.curve = (bend, shift)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        (location, variance), (bend, shift) = self.first, self.curve
        a, b = x[..., 0], x[..., 1]
        constant = LOG_TWO_PI + 0.5 * math.log(variance * self.noise)
        return (
            0.5 * ((a - location) ** 2 / variance + (b - bend * a * a - shift) ** 2 / self.noise)
            + constant
        )

    def _log_z(self) -> float:
        return 0.0

    @property
    def mean(self) -> Tensor:
        (m, v), (bend, shift) = self.first, self.curve
        return self._number([m, bend * (m * m + v) + shift])

    @property
    def variance(self) -> Tensor:
        (m, v), (bend, _) = self.first, self.curve
        return self._number([v, bend**2 * (2.0 * v * v + 4.0 * m * m * v) + self.noise])

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self._within_two_deviations(num_chains, generator)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        (m, v), (bend, shift) = self.first, self.curve
        a, b = self._normal((2, n), generator)
        a = m + math.sqrt(v) * a
        return torch.stack([a, bend * a * a + shift + math.sqrt(self.noise) * b], -1)


class Banana(_Bent):
    r"""The twisted normal distribution, or banana, of Haario, Saksman and Tamminen (1999).

    .. math:: x_0 \sim N(0, v), \qquad x_1 \sim N(b (x_0^2 - v), 1), \qquad \log Z = 0

    Args:
        bend: :math:`b`.
        variance: :math:`v > 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``variance`` is not positive or a number is not finite.

    Example:
        >>> Banana().mean, Banana().variance
        (tensor([0., 0.]), tensor([100.,  19.]))
    """

    def __init__(
        self, bend: float = 0.03, variance: float = 100.0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(0.0, variance, bend, -bend * variance, 1.0, dtype)


class Rosenbrock(_Bent):
    r"""The Rosenbrock density, a curved valley (Pagani, Wiegand and Nadarajah, 2022).

    .. math:: x \sim N(a, 1), \qquad y \sim N(x^2, v), \qquad \log Z = 0

    Args:
        location: :math:`a`.
        noise: :math:`v > 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``noise`` is not positive or a number is not finite.

    Example:
        >>> Rosenbrock().mean, Rosenbrock().variance
        (tensor([1., 2.]), tensor([1.0000, 6.1000]))
    """

    def __init__(
        self, location: float = 1.0, noise: float = 0.1, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(location, 1.0, 1.0, 0.0, noise, dtype)


class Funnel(Target):
    r"""Neal's funnel ("Slice Sampling", 2003).

    .. math:: \theta \sim N(0, v), \qquad x_i \sim N(0, e^\theta), \qquad \log Z = 0

    An event is :math:`(\theta, x_1, \dots)`. Publications use different :math:`v` (9, 3 or 1):
    report it with every number. The tails of :math:`x_i` are too heavy to test samplers with its
    moments; the coordinates of :meth:`whiten` are standard normal.

    Args:
        dim: number of entries of an event, :math:`\theta` included, at least 2.
        variance: :math:`v > 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``dim`` < 2 or ``variance`` is not positive and finite.

    Example:
        >>> e = Funnel(dim=3)
        >>> e.whiten(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
        tensor([[0., 1., 2.],
                [1., 0., 0.]])
    """

    def __init__(
        self, dim: int = 10, variance: float = 9.0, *, dtype: torch.dtype | None = None
    ) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got dim={dim}")
        check_positive(variance=variance)
        super().__init__((dim,), dtype=dtype)
        self.theta_variance = variance

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        theta, rest = x[..., 0], x[..., 1:]
        n = rest.shape[-1]
        constant = 0.5 * ((n + 1) * LOG_TWO_PI + math.log(self.theta_variance))
        return (
            0.5
            * (
                theta**2 / self.theta_variance
                + rest.square().sum(-1) * torch.exp(-theta)
                + n * theta
            )
            + constant
        )

    def whiten(self, x: Tensor) -> Tensor:
        r"""Transform states to independent standard normal coordinates, of the same shape.

        They are :math:`(\theta / \sqrt v,\, x_i e^{-\theta / 2})`.
        """
        theta, rest = x[..., :1], x[..., 1:]
        return torch.cat([theta / math.sqrt(self.theta_variance), rest * torch.exp(-theta / 2)], -1)

    def _log_z(self) -> float:
        return 0.0

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([0.0] * self.event_shape[0])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        v = self.theta_variance
        return self._number([v] + [math.exp(v / 2)] * (self.event_shape[0] - 1))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        noise = self._normal((n, *self.event_shape), generator)
        theta = math.sqrt(self.theta_variance) * noise[:, :1]
        return torch.cat([theta, torch.exp(theta / 2) * noise[:, 1:]], -1)


class Ring(Target):
    r"""A ring with two modes: :math:`U_1` of Rezende and Mohamed (2015).

    .. math:: U_1(x) = \tfrac12 \Bigl(\frac{|x| - 2}{0.4}\Bigr)^2
        - \log\Bigl(e^{-\frac12 ((x_1 - 2) / 0.6)^2} + e^{-\frac12 ((x_1 + 2) / 0.6)^2}\Bigr)

    The modes are the halves :math:`x_1 < 0` and :math:`x_1 > 0`. (:math:`U_2` to :math:`U_4` have
    no finite Z on the plane.)

    Args:
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``dtype`` is not a floating-point type.

    Example:
        >>> e = Ring()
        >>> round(e.log_z, 6), e.mode_weights
        (1.877502, tensor([0.5000, 0.5000]))
    """

    event_shape = torch.Size([2])

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return 0.5 * ((torch.linalg.vector_norm(x, dim=-1) - 2.0) / 0.4) ** 2 - self._log_bumps(
            x[..., 0]
        )

    @staticmethod
    def _log_bumps(x: Tensor) -> Tensor:
        return torch.logaddexp(-0.5 * ((x - 2.0) / 0.6) ** 2, -0.5 * ((x + 2.0) / 0.6) ** 2)

    def _log_z(self) -> float:
        return _ring_truth()[0]

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([0.0, 0.0])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number(_ring_truth()[1:])

    @property
    def mode_weights(self) -> Tensor:
        """Probability of each mode, shape ``(k,)``."""
        return self._number([0.5, 0.5])

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state: ``(*batch, *event) -> (*batch)``, int64."""
        self.batch_shape(x)
        return (x[..., 0] > 0).long()

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        # The proposal has a uniform angle and a radius N(2.08, 0.4^2), which is r N(r | 2, 0.4^2)
        # with r replaced by its bound 2 exp(r/2 - 1). The sum of the bumps is at most 1 +
        # exp(-(2/0.6)^2 / 2).
        def propose(k: int) -> tuple[Tensor, Tensor]:
            r = 2.08 + 0.4 * self._normal((k,), generator)
            angle = 2.0 * math.pi * self._uniform((k,), generator)
            x = r.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
            # NaN for a negative radius, which is then rejected
            radial = (r / 2.0).log() - (r / 2.0 - 1.0)
            return x, radial + self._log_bumps(x[:, 0]) - math.log1p(
                math.exp(-0.5 * (2.0 / 0.6) ** 2)
            )

        return rejection(n, propose, lambda shape: self._uniform(shape, generator))


@cache
def _ring_truth() -> tuple[float, float, float]:
    # log Z and both variances of U1 in polar coordinates: Gauss-Legendre in the radius, the
    # trapezoid rule in the angle
    nodes, weights = np.polynomial.legendre.leggauss(200)
    r, w = 3.0 * (nodes + 1.0)[:, None], 3.0 * weights[:, None]
    angle = np.linspace(0.0, 2.0 * np.pi, 400, endpoint=False)
    x, y = r * np.cos(angle), r * np.sin(angle)
    bumps = np.exp(-0.5 * ((x - 2.0) / 0.6) ** 2) + np.exp(-0.5 * ((x + 2.0) / 0.6) ** 2)
    density = w * r * np.exp(-0.5 * ((r - 2.0) / 0.4) ** 2) * bumps * (2.0 * np.pi / len(angle))
    z = density.sum()
    return float(np.log(z)), float((density * x * x).sum() / z), float((density * y * y).sum() / z)
