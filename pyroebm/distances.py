"""How far two samples are apart, and which modes a sample has found: what reverse figures cannot see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "energy_distance", "maximum_mean_discrepancy", "median_distance", "mode_coverage_entropy"]

#: Groups of the jackknife.
GROUPS = 20


class Estimate(NamedTuple):
    """A number and its standard error.

    Example:
        >>> print(Estimate(1.0, 0.25))
        1 +- 0.25
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of independent values ``(n,)`` and its standard error."""
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    r"""The squared energy distance (Székely and Rizzo, 2013), estimated without bias.

    .. math:: D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'| \ge 0

    It is 0 for equal laws alone; no pair of a row with itself enters, so the estimate may be below 0 by its noise.

    Args:
        x: independent draws, shape ``(n, *event)``, n at least 40; or those of chains, one chain after the other.
        y: the same of the other distribution, shape ``(m, *event)``.

    Returns:
        the estimate, in the unit of x, and its standard error by a jackknife of 20 groups of neighboring rows.

    Raises:
        ValueError: if there are fewer than 40 rows, the event shapes differ, or an entry is not finite.

    Example:
        >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> found = energy_distance(x[:500], x[500:])
        >>> abs(found.value) < 5 * found.standard_error
        True
    """
    x, y = _rows(x, y)
    return _jackknife(x, y, torch.cdist, -1.0)


def maximum_mean_discrepancy(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Estimate:
    r"""The squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., 2012), estimated without bias.

    .. math:: M^2 = E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y), \qquad k(a, b) = e^{-|a - b|^2 / 2 h^2}

    With the pairs of a row with itself, which are left out here, it would have a floor of about 2 / n.

    Args:
        x: independent draws, shape ``(n, *event)``, n at least 40; or those of chains, one chain after the other.
        y: the same of the other distribution, shape ``(m, *event)``.
        bandwidth: h, in the unit of x; None takes :func:`median_distance` of both samples together.

    Raises:
        ValueError: as :func:`energy_distance`, and if ``bandwidth`` is not positive.

    Example:
        >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> maximum_mean_discrepancy(x[:500], x[500:] + 1.0).value > 0.1
        True
    """
    x, y = _rows(x, y)
    h = median_distance(torch.cat([x[:2000], y[:2000]])) if bandwidth is None else bandwidth
    if not 0.0 < h < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got bandwidth={h}")
    return _jackknife(x, y, lambda a, b: torch.exp(-0.5 * (torch.cdist(a, b) / h).square()), 1.0)


def median_distance(x: Tensor) -> float:
    """Median distance of two rows of a sample ``(n, *event)``.

    Example:
        >>> median_distance(torch.tensor([0.0, 1.0, 3.0]))
        2.0
    """
    return float(torch.pdist(x.reshape(len(x), -1)).median())


def mode_coverage_entropy(modes: Tensor, weights: Tensor) -> float:
    r"""Entropy of the modes that a sample has found, as a fraction of that of the true weights (after Blessing et al., 2024).

    .. math:: -\frac{1}{H(w)} \sum_k \hat w_k \log \hat w_k, \qquad H(w) = -\sum_k w_k \log w_k

    For equal weights it is 1 only if each mode is found with its weight, and 0 if one mode has all; for unequal ones values
    above 1 are possible, and say that small modes have too much.

    Args:
        modes: the mode of each draw, integers, shape ``(n,)``, as ``Target.mode_of`` gives them.
        weights: true weights :math:`w_k`, shape ``(k,)``.

    Raises:
        ValueError: if a mode has no weight, or there are fewer than two modes.

    Example:
        >>> mode_coverage_entropy(torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.5]))
        1.0
    """
    if weights.dim() != 1 or len(weights) < 2 or not bool((weights > 0).all()):
        raise ValueError(f"weights must be at least two positive numbers, got shape {tuple(weights.shape)}")
    if (
        modes.dim() != 1
        or not len(modes)
        or modes.is_floating_point()
        or not 0 <= int(modes.min()) <= int(modes.max()) < len(weights)
    ):
        raise ValueError(f"modes must be a vector of integers from 0 to {len(weights) - 1}, got shape {tuple(modes.shape)}")
    found = torch.bincount(modes, minlength=len(weights)).double() / len(modes)
    return float(torch.special.entr(found).sum() / torch.special.entr(weights.double() / weights.sum()).sum())


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2 * GROUPS:
        raise ValueError(
            f"x and y must have one event shape and at least {2 * GROUPS} rows each, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    for name, rows in (("x", x), ("y", y)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(rows)).sum())} entries that are not")
    return x.detach().double().reshape(len(x), -1), y.detach().double().reshape(len(y), -1)


def _jackknife(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], sign: float) -> Estimate:
    """``sign (mean k(X, X') + mean k(Y, Y') - 2 mean k(X, Y))``: over all rows, and with each group of them left out."""
    parts = x.tensor_split(GROUPS), y.tensor_split(GROUPS)

    def sums(a: int, b: int) -> tuple[Tensor, Tensor]:
        """Sums of the kernel over pairs of different rows, group by group, and the numbers of those pairs."""
        totals = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
        for i, left in enumerate(parts[a]):
            for j, right in enumerate(parts[b]):
                if a == b and j < i:
                    totals[i, j] = totals[j, i]
                    continue
                values = kernel(left, right)
                totals[i, j] = values.sum() - (values.diagonal().sum() if a == b and i == j else 0.0)
        sizes = [torch.tensor([len(part) for part in parts[k]], dtype=torch.float64) for k in (a, b)]
        return totals, torch.outer(*sizes) - (torch.diag(sizes[0]) if a == b else 0.0)

    blocks = [(sums(0, 0), 1.0), (sums(1, 1), 1.0), (sums(0, 1), -2.0)]

    def value(kept: Tensor) -> float:
        return sign * sum(w * float(t[kept][:, kept].sum() / n[kept][:, kept].sum()) for (t, n), w in blocks)

    everything = torch.ones(GROUPS, dtype=torch.bool)
    without = torch.tensor([value(everything & (torch.arange(GROUPS) != k)) for k in range(GROUPS)], dtype=torch.float64)
    spread = (GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()
    return Estimate(value(everything), math.sqrt(float(spread)))
