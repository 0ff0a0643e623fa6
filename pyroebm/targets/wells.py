"""The double well, many double wells, and a truncated density."""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import iv, modstruve
from torch import Tensor

from pyroebm.targets.base import LOG_TWO_PI, TabulatedDensity, Target, rejection

__all__ = ["DoubleWell", "HalfDisc", "ManyWell"]


class DoubleWell(Target):
    r"""The tilted double well :math:`U(x) = x^4 - 4 x^2 + x`.

    93.4 % of the mass is left of the barrier, 6.6 % right of it.

    Args:
        dtype: floating-point type; None for torch's default.

    Attributes:
        barrier: the local maximum of :math:`U` near 0.126.
        right_mass: :math:`P(x > \mathrm{barrier})`.

    Raises:
        ValueError: if ``dtype`` is not a floating-point type.

    Example:
        >>> e = DoubleWell(dtype=torch.float64)
        >>> round(e.log_z, 9), e.mode_weights
        (5.032284009, tensor([0.9335, 0.0665], dtype=torch.float64))
        >>> e.mode_of(torch.tensor([-1.4, 1.3]))
        tensor([0, 1])
    """

    event_shape = torch.Size()
    barrier: ClassVar[float] = brentq(lambda x: 4.0 * x**3 - 8.0 * x + 1.0, 0.0, 0.5, xtol=1e-15)
    density: ClassVar[TabulatedDensity] = TabulatedDensity(
        lambda x: x * x * (x * x - 4.0) + x, -4.0, 4.0, split=barrier
    )

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.density.potential(x)

    def _log_z(self) -> float:
        return self.density.log_z

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number(self.density.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number(self.density.variance)

    @property
    def right_mass(self) -> float:
        """Probability of a state right of the barrier."""
        return self.density.right_mass

    @property
    def mode_weights(self) -> Tensor:
        """Probability of each mode, shape ``(k,)``."""
        return self._number([1.0 - self.right_mass, self.right_mass])

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state: ``(*batch, *event) -> (*batch)``, int64."""
        self.batch_shape(x)
        return (x > self.barrier).long()

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.density.quantile(self._uniform((n,), generator))


class ManyWell(Target):
    r"""Independent pairs of a tilted double well and a normal variable; 2^16 modes by default.

    .. math::

        E(x) = \sum_i a_i^4 - 6 a_i^2 - \tfrac12 a_i + \tfrac12 b_i^2, \qquad
        x = (a_1, b_1, a_2, b_2, \dots)

    The target is that of Noé et al. (2019) and Midgley et al. (2023). The mode of a state is given
    by the signs of its :math:`a_i`: bit i of :meth:`mode_of` is :math:`a_i > 0`. The mode weights,
    products of :attr:`left_mass` and its complement, are computed for up to 16 pairs.

    Args:
        num_pairs: number of pairs, half the number of dimensions.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``num_pairs`` < 1.

    Example:
        >>> e = ManyWell(num_pairs=16)
        >>> round(e.log_z, 6), round(e.left_mass, 6)
        (164.695675, 0.155693)
    """

    density: ClassVar[TabulatedDensity] = TabulatedDensity(
        lambda a: a * (a * (a * a - 6.0) - 0.5), -5.0, 5.0, split=0.0
    )

    def __init__(self, num_pairs: int = 16, *, dtype: torch.dtype | None = None) -> None:
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got num_pairs={num_pairs}")
        super().__init__((2 * num_pairs,), dtype=dtype)
        self.num_pairs = num_pairs

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return (self.density.potential(x[..., ::2]) + 0.5 * x[..., 1::2].square()).sum(-1)

    def _log_z(self) -> float:
        return self.num_pairs * (self.density.log_z + 0.5 * LOG_TWO_PI)

    @property
    def left_mass(self) -> float:
        """Probability of :math:`a < 0` in one pair."""
        return 1.0 - self.density.right_mass

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([self.density.mean, 0.0] * self.num_pairs)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number([self.density.variance, 1.0] * self.num_pairs)

    @property
    def mode_weights(self) -> Tensor | None:
        """Probability of each mode, shape ``(k,)``; None where unknown."""
        if self.num_pairs > 16:
            return None
        weights = torch.ones(1, dtype=torch.float64)
        for _ in range(self.num_pairs):
            weights = torch.cat([weights * self.left_mass, weights * self.density.right_mass])
        return self._number(weights)

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state: ``(*batch, *event) -> (*batch)``, int64."""
        if self.num_pairs > 16:
            return super().mode_of(x)
        self.batch_shape(x)
        return ((x[..., ::2] > 0).long() << torch.arange(self.num_pairs, device=x.device)).sum(-1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        a = self.density.quantile(self._uniform((n, self.num_pairs), generator))
        return torch.stack([a, self._normal((n, self.num_pairs), generator)], -1).flatten(1)


class HalfDisc(Target):
    r"""The energy :math:`E(x) = -2 \sqrt{1 - x^2}` on :math:`|x| < 1`, infinite outside.

    .. math:: Z = \pi \bigl(I_1(2) + L_1(2)\bigr) + 2

    with I the modified Bessel and L the modified Struve function. The density is discontinuous at
    the ends of the interval. The support is the real line, so that kernels propose states outside,
    which they must reject. :meth:`initial` draws inside.

    Args:
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``dtype`` is not a floating-point type.

    Example:
        >>> e = HalfDisc()
        >>> e(torch.tensor([0.0, 0.6, 1.0])), round(e.log_z, 6)
        (tensor([-2.0000, -1.6000,     inf]), 2.347707)
    """

    event_shape = torch.Size()

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        outside = x.abs() >= 1.0  # False for NaN, which stays NaN
        # so that the gradient of the root at an event outside is not NaN
        inside = torch.where(outside, 0.0, x)
        return torch.where(outside, math.inf, -2.0 * torch.sqrt((1.0 - inside) * (1.0 + inside)))

    def _log_z(self) -> float:
        return math.log(math.pi * (iv(1, 2.0) + modstruve(1, 2.0)) + 2.0)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number(0.0)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number(_half_disc_square() / math.exp(self._log_z()))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        def propose(k: int) -> tuple[Tensor, Tensor]:
            # rounded before the energy is evaluated, since 1.0 is outside
            x = (2.0 * self._uniform((k,), generator) - 1.0).to(self.dtype)
            return x, -self(x) - 2.0

        return rejection(n, propose, lambda shape: self._uniform(shape, generator))


@cache
def _half_disc_square() -> float:  # the integral of x^2 exp(-E), with x = sin t
    square = lambda t: math.sin(t) ** 2 * math.cos(t) * math.exp(2.0 * math.cos(t))  # noqa: E731
    return quad(square, -math.pi / 2, math.pi / 2, epsabs=1e-13, epsrel=1e-12)[0]
