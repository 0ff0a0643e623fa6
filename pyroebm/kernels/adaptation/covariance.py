"""What warm-up learns a metric from: draws and gradients of all chains together, gathered row by
row into immutable values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroebm.kernels.metric import Dense, LowRank

__all__ = ["PooledCovariance", "PooledRows", "PooledVariance", "shrunk"]

#: Most rows that are kept for a low-rank metric (three steps of all chains are, however many the
#: chains).
LIMIT = 2048

#: A direction whose variance is within this factor of 1 is left alone (Seyboldt, Carlson and
#: Carpenter, 2024).
CUTOFF = 2.0


def _merged(draws: int, mean: Tensor, q: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Counts and means of old rows and new, deviations of the new from their mean, and the weighted
    gap of the two means."""
    total, delta = draws + len(q), q.mean(0) - mean
    gap = delta * (draws * len(q) / total) ** 0.5
    return total, mean + delta * (len(q) / total), q - q.mean(0), gap


class PooledVariance(NamedTuple):
    """Marginal variances of the draws of all chains together, merged batch by batch (Chan, Golub
    and LeVeque, 1983).

    Args:
        draws: draws so far.
        mean: running mean, shape ``(dim,)``.
        squares: sum of squared deviations, shape ``(dim,)``.

    Example:
        >>> pooled = PooledVariance.start(torch.zeros(1, 2)).update(
        ...     torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        ... )
        >>> pooled.mean, pooled.squares
        (tensor([1., 1.]), tensor([2., 0.]))
    """

    draws: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> PooledVariance:
        """Empty, for rows shaped as ``like`` ``(chains, dim)``."""
        return cls(0, torch.zeros_like(like[0]), torch.zeros_like(like[0]))

    def update(
        self, q: Tensor, grad: Tensor | None = None, moved: Tensor | None = None
    ) -> PooledVariance:
        """Add rows ``(chains, dim)``, of the chains that ``moved`` (None: of all)."""
        q = q if moved is None else q[moved]
        if not len(q):
            return self
        draws, mean, deviations, gap = _merged(self.draws, self.mean, q)
        return PooledVariance(draws, mean, self.squares + (deviations**2).sum(0) + gap**2)

    def variance(self) -> Tensor:
        """The variances, shape ``(dim,)``; 0 where they are no more than rounding of the mean, or
        not finite."""
        variance = self.squares / (self.draws - 1)
        resolution = 16.0 * torch.finfo(variance.dtype).eps * self.mean
        told = torch.isfinite(variance) & (variance > resolution**2)
        return torch.where(told, variance, 0.0)

    def metric(self, before: Tensor | None = None) -> Tensor | None:
        """The variances, shrunk towards those ``before``."""
        return shrunk(self.variance(), self.draws, before)


def shrunk(variance: Tensor, num_draws: int, before: Tensor | None = None) -> Tensor | None:
    r"""Variances of so many draws, shrunk towards those ``before`` (None: 1) as if five more draws
    had said so.

    .. math:: \log v = \frac{n \log s^2 + 5 \log v_0}{n + 5}

    The mean of logarithms has no unit, so that no scale is too small to be learned. An entry that
    is 0 or not finite keeps the one before; None says that all do.

    Example:
        >>> shrunk(torch.tensor([4.0, 0.0]), 5)
        tensor([2., 1.])
    """
    known = torch.isfinite(variance) & (variance > 0.0)
    if not bool(known.any()):
        return None
    old = torch.ones_like(variance) if before is None else before.reshape(-1).to(variance)
    weight = num_draws / (num_draws + 5.0)
    return torch.where(known, variance.pow(weight) * old.pow(1.0 - weight), old)


class PooledCovariance(NamedTuple):
    """The covariance of the draws of all chains together, merged as in :class:`PooledVariance`.

    Args:
        draws: draws so far.
        mean: running mean, shape ``(dim,)``.
        squares: sum of outer products of deviations, shape ``(dim, dim)``.

    Example:
        >>> pooled = PooledCovariance.start(torch.zeros(1, 2))
        >>> pooled.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).squares
        tensor([[2., 0.],
                [0., 0.]])
    """

    draws: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> PooledCovariance:
        """Empty, for rows shaped as ``like`` ``(chains, dim)``."""
        return cls(0, torch.zeros_like(like[0]), like.new_zeros(like.shape[1], like.shape[1]))

    def update(
        self, q: Tensor, grad: Tensor | None = None, moved: Tensor | None = None
    ) -> PooledCovariance:
        """Add rows ``(chains, dim)``, of the chains that ``moved`` (None: of all)."""
        q = q if moved is None else q[moved]
        if not len(q):
            return self
        draws, mean, deviations, gap = _merged(self.draws, self.mean, q)
        return PooledCovariance(
            draws, mean, self.squares + deviations.mT @ deviations + gap.outer(gap)
        )

    def metric(self, before: object = None) -> Dense | None:
        """The covariance, shrunk towards 1e-3 of its diagonal as if five more draws had said so
        (Stan's rule, without a unit)."""
        if self.draws < 2:
            return None
        covariance = self.squares.double() / (self.draws - 1)
        variance = covariance.diagonal()
        ridge = 1e-3 * torch.where(variance > 0.0, variance, 1.0)
        covariance = (self.draws * covariance + 5.0 * ridge.diag()) / (self.draws + 5.0)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        factor = factor.to(self.squares)
        return None if int(failed) or not bool(torch.isfinite(factor).all()) else Dense(factor)


class PooledRows(NamedTuple):
    r"""Draws and gradients of all chains, thinned to at most ``LIMIT`` rows, for a
    :class:`pyroebm.kernels.LowRank` metric.

    Of two covariances, that of the draws and that of the gradients, the metric wanted is the
    geometric mean of the first and the inverse of the second: it minimises the Fisher divergence
    from a normal law, and on a normal law it is the covariance exactly, once there are more rows
    than entries (Seyboldt, Carlson and Carpenter, 2024). It is taken in the span of the leading
    directions of draws (wide ones) and of gradients (stiff ones), on top of a scale; directions
    whose variance is then within a factor ``CUTOFF`` of 1 stay as they are. Of three scales (of the
    draws, of the gradients, and between) the one that leaves the smallest divergence is taken.

    Args:
        draws, grads: rows kept, shape ``(kept, chains, dim)``.
        rank: leading directions to take of each.
        every: one step in so many is kept.
        steps: steps seen.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> x = x * torch.tensor([1.0, 2.0, 3.0])
        >>> PooledRows.start(x, rank=2).update(x, x / torch.tensor([1.0, 4.0, 9.0])).metric().scale
        tensor([1., 2., 3.])
    """

    draws: Tensor
    grads: Tensor
    rank: int
    every: int = 1
    steps: int = 0

    @classmethod
    def start(cls, like: Tensor, rank: int) -> PooledRows:
        """Empty, for rows shaped as ``like`` ``(chains, dim)``."""
        return cls(like.new_zeros(0, *like.shape), like.new_zeros(0, *like.shape), rank)

    def update(self, q: Tensor, grad: Tensor, moved: Tensor | None = None) -> PooledRows:
        """Add rows ``(chains, dim)`` if it is their turn, of the chains that ``moved`` (None: of
        all).

        Where there are too many, every other step is forgotten.
        """
        draws = self.draws
        grads = self.grads
        every = self.every
        if moved is not None:
            # left out by metric(): a stack of steps has no ragged rows
            q = torch.where(moved.unsqueeze(1), q, torch.nan)
        if self.steps % every == 0:
            draws, grads = torch.cat([draws, q.unsqueeze(0)]), torch.cat([grads, grad.unsqueeze(0)])
            if len(draws) > 2 and draws.shape[0] * draws.shape[1] > LIMIT:
                draws = draws[::2]
                grads = grads[::2]
                every = 2 * every
        return PooledRows(draws, grads, self.rank, every, self.steps + 1)

    def metric(self, before: object = None) -> LowRank | None:
        """The scale, and the directions along which it is not enough."""
        x, g = (rows.flatten(0, 1).double() for rows in (self.draws, self.grads))
        there = ~torch.isnan(x).all(1)
        x, g = x[there], g[there]
        if len(x) < 2:
            return None
        x, g = x - x.mean(0), g - g.mean(0)
        wide, stiff = x.square().mean(0).sqrt(), g.square().mean(0).rsqrt()
        # A few wide directions show in every variance and spare most gradients, a few stiff ones
        # the other way round.
        fits = [
            _fit(x, g, scale, min(self.rank, len(x) // 8))
            for scale in (wide, (wide * stiff).sqrt(), stiff)
        ]
        found = [fit for fit in fits if fit is not None]
        if not found:
            return None
        best = LowRank(
            *(
                part.to(self.draws)
                for part in min(found, key=lambda metric: _divergence(metric, x, g))
            )
        )
        return best if all(bool(torch.isfinite(part).all()) for part in best) else None


def _fit(x: Tensor, g: Tensor, scale: Tensor, rank: int) -> LowRank | None:
    """The metric on top of a scale: the geometric mean in the span of ``rank`` leading directions
    of each."""
    x, g = x / scale, g * scale
    if not bool((torch.isfinite(x) & torch.isfinite(g)).all()):
        return None
    leading = [torch.linalg.svd(rows, full_matrices=False).Vh[:rank] for rows in (x, g)]
    span = torch.linalg.qr(torch.cat(leading).mT).Q
    mean = _geometric_mean(_second_moment(x @ span), _second_moment(g @ span))
    if not bool(torch.isfinite(mean).all()):
        return None
    values, vectors = torch.linalg.eigh(mean)
    far = values.log().abs() > math.log(CUTOFF)
    return LowRank(scale, span @ vectors[:, far], values[far])


def _divergence(metric: LowRank, x: Tensor, g: Tensor) -> float:
    r"""Of :math:`N(0, A A^\top)`, by Fisher, up to a constant: the mean of :math:`|A^{-1} x|^2 +
    |A^\top g|^2`."""
    inverse = LowRank(torch.ones_like(metric.scale), metric.vectors, 1.0 / metric.values)
    return float(
        (inverse.apply(x / metric.scale).square() + metric.transpose(g).square()).sum(1).mean()
    )


def _second_moment(rows: Tensor) -> Tensor:
    """The covariance of centered rows, with the identity as if a hundredth of a row more had said
    so: it has an inverse."""
    return (rows.mT @ rows + 0.01 * torch.eye(rows.shape[1]).to(rows)) / len(rows)


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    r"""The geometric mean of a and the inverse of b: the positive definite M with :math:`M b M =
    a`."""
    lower, _ = torch.linalg.cholesky_ex(b)
    values, vectors = torch.linalg.eigh(lower.mT @ a @ lower)
    half: Tensor = torch.linalg.solve_triangular(lower.mT, vectors * values.pow(0.25), upper=True)
    return half @ half.mT
