"""Estimators of the metric from the draws and gradients of all chains, as immutable values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroebm.kernels.metric import Dense, LowRank

__all__ = ["PooledCovariance", "PooledDraws", "PooledVariance", "shrunk"]

#: Maximum number of draws kept for a low-rank metric. Three steps of all chains are kept in any
#: case.
LIMIT = 2048

#: A direction whose variance is within this factor of 1 is not corrected (Seyboldt, Carlson and
#: Carpenter, 2024).
CUTOFF = 2.0


def _merged(draws: int, mean: Tensor, q: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Merge the mean of the old draws with new draws ``q``.

    Returns:
        total count, total mean, deviations of the new draws from their mean, and the weighted
        difference of the two means.
    """
    total, delta = draws + len(q), q.mean(0) - mean
    gap = delta * (draws * len(q) / total) ** 0.5
    return total, mean + delta * (len(q) / total), q - q.mean(0), gap


class PooledVariance(NamedTuple):
    """Marginal variances of the draws of all chains, updated batch by batch.

    The update is that of Chan, Golub and LeVeque (1983).

    Args:
        draws: number of draws so far.
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
        """Return an empty estimate for draws of the shape of ``like``, ``(chains, dim)``."""
        return cls(0, torch.zeros_like(like[0]), torch.zeros_like(like[0]))

    def update(
        self, q: Tensor, grad: Tensor | None = None, moved: Tensor | None = None
    ) -> PooledVariance:
        """Add the draws ``q`` ``(chains, dim)`` of the chains in ``moved`` (None: of all)."""
        q = q if moved is None else q[moved]
        if not len(q):
            return self
        draws, mean, deviations, gap = _merged(self.draws, self.mean, q)
        return PooledVariance(draws, mean, self.squares + (deviations**2).sum(0) + gap**2)

    def variance(self) -> Tensor:
        """Return the variances, shape ``(dim,)``.

        An entry is 0 if it is not finite or not larger than the rounding error of the mean.
        """
        variance = self.squares / (self.draws - 1)
        resolution = 16.0 * torch.finfo(variance.dtype).eps * self.mean
        known = torch.isfinite(variance) & (variance > resolution**2)
        return torch.where(known, variance, 0.0)

    def metric(self, before: Tensor | None = None) -> Tensor | None:
        """Return the variances, shrunk towards the variances ``before``."""
        return shrunk(self.variance(), self.draws, before)


def shrunk(variance: Tensor, num_draws: int, before: Tensor | None = None) -> Tensor | None:
    r"""Shrink variances towards ``before`` (None: 1) with the weight of five draws.

    .. math:: \log v = \frac{n \log s^2 + 5 \log v_0}{n + 5}

    The mean of logarithms is free of units, so variances of any scale can be learned. An entry that
    is 0 or not finite keeps the value of ``before``.

    Args:
        variance: sample variances :math:`s^2`, shape ``(dim,)``.
        num_draws: number of draws n.
        before: variances :math:`v_0`.

    Returns:
        the variances v, or None if no entry is known.

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
    """Covariance of the draws of all chains, updated as in :class:`PooledVariance`.

    Args:
        draws: number of draws so far.
        mean: running mean, shape ``(dim,)``.
        squares: sum of outer products of deviations, shape ``(dim, dim)``.
        mask: True where a covariance is learned, shape ``(dim, dim)``; None is everywhere. The
            others are 0 in the metric.

    Example:
        >>> pooled = PooledCovariance.start(torch.zeros(1, 2))
        >>> pooled.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).squares
        tensor([[2., 0.],
                [0., 0.]])
    """

    draws: int
    mean: Tensor
    squares: Tensor
    mask: Tensor | None = None

    @classmethod
    def start(
        cls, like: Tensor, blocks: tuple[tuple[int, ...], ...] | None = None
    ) -> PooledCovariance:
        """Return an empty estimate for draws of the shape of ``like``, ``(chains, dim)``.

        Args:
            like: draws.
            blocks: tuples of entries whose covariances are learned; None is one tuple of all.

        Raises:
            ValueError: if an entry is out of range.
        """
        dim, mask = like.shape[1], None
        if blocks is not None:
            mask = torch.eye(dim, dtype=torch.bool, device=like.device)
            for block in blocks:
                if not all(0 <= entry < dim for entry in block):
                    raise ValueError(
                        f"blocks must hold entries from 0 to {dim - 1}, those of the event, got"
                        f" {block}"
                    )
                entries = torch.tensor(block, device=like.device)
                mask[entries.unsqueeze(1), entries] = True
        return cls(0, torch.zeros_like(like[0]), like.new_zeros(dim, dim), mask)

    def update(
        self, q: Tensor, grad: Tensor | None = None, moved: Tensor | None = None
    ) -> PooledCovariance:
        """Add the draws ``q`` ``(chains, dim)`` of the chains in ``moved`` (None: of all)."""
        q = q if moved is None else q[moved]
        if not len(q):
            return self
        draws, mean, deviations, gap = _merged(self.draws, self.mean, q)
        squares = self.squares + deviations.mT @ deviations + gap.outer(gap)
        return PooledCovariance(draws, mean, squares, self.mask)

    def metric(self, before: object = None) -> Dense | None:
        """Return the covariance, shrunk towards 1e-3 of its diagonal with the weight of five draws.

        This is Stan's rule, made free of units.
        """
        if self.draws < 2:
            return None
        covariance = self.squares.double() / (self.draws - 1)
        if self.mask is not None:
            covariance = torch.where(self.mask, covariance, 0.0)
        variance = covariance.diagonal()
        ridge = 1e-3 * torch.where(variance > 0.0, variance, 1.0)
        covariance = (self.draws * covariance + 5.0 * ridge.diag()) / (self.draws + 5.0)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        factor = factor.to(self.squares)
        return None if int(failed) or not bool(torch.isfinite(factor).all()) else Dense(factor)


class PooledDraws(NamedTuple):
    r"""Draws and gradients of all chains, for a :class:`pyroebm.kernels.LowRank` metric.

    The draws are thinned to at most ``LIMIT``.

    The metric is the geometric mean of the covariance of the draws and of the inverse covariance of
    the gradients. It minimizes the Fisher divergence from a normal distribution. For a normal
    target it is the exact covariance, as soon as there are more draws than entries (Seyboldt,
    Carlson and Carpenter, 2024). It is computed in the span of the leading directions of the draws
    (directions of large variance) and of the gradients (of small variance), after a diagonal
    scaling. Directions whose scaled variance is within a factor ``CUTOFF`` of 1 are not corrected.
    Of three scalings (by the draws, by the gradients, and their geometric mean) the one with the
    smallest divergence is used.

    Args:
        draws: draws kept, shape ``(kept, chains, dim)``.
        grads: gradients at these draws, shape ``(kept, chains, dim)``.
        rank: number of leading directions of the draws, and of the gradients.
        every: one of ``every`` steps is kept.
        steps: number of steps seen.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> x = x * torch.tensor([1.0, 2.0, 3.0])
        >>> PooledDraws.start(x, rank=2).update(x, x / torch.tensor([1.0, 4.0, 9.0])).metric().scale
        tensor([1., 2., 3.])
    """

    draws: Tensor
    grads: Tensor
    rank: int
    every: int = 1
    steps: int = 0

    @classmethod
    def start(cls, like: Tensor, rank: int) -> PooledDraws:
        """Return an empty estimate for draws of the shape of ``like``, ``(chains, dim)``."""
        return cls(like.new_zeros(0, *like.shape), like.new_zeros(0, *like.shape), rank)

    def update(self, q: Tensor, grad: Tensor, moved: Tensor | None = None) -> PooledDraws:
        """Add the draws ``q`` and gradients of the chains in ``moved`` (None: of all).

        Only one of ``every`` steps is kept. If there are too many, every other step is dropped.
        """
        draws = self.draws
        grads = self.grads
        every = self.every
        if moved is not None:
            # metric() leaves out NaN: a stack of steps needs the same number of chains in each
            q = torch.where(moved.unsqueeze(1), q, torch.nan)
        if self.steps % every == 0:
            draws, grads = torch.cat([draws, q.unsqueeze(0)]), torch.cat([grads, grad.unsqueeze(0)])
            if len(draws) > 2 and draws.shape[0] * draws.shape[1] > LIMIT:
                draws = draws[::2]
                grads = grads[::2]
                every = 2 * every
        return PooledDraws(draws, grads, self.rank, every, self.steps + 1)

    def metric(self, before: object = None) -> LowRank | None:
        """Return the diagonal scale and the directions that need a further correction."""
        x, g = (rows.flatten(0, 1).double() for rows in (self.draws, self.grads))
        there = ~torch.isnan(x).all(1)
        x, g = x[there], g[there]
        if len(x) < 2:
            return None
        x, g = x - x.mean(0), g - g.mean(0)
        wide, stiff = x.square().mean(0).sqrt(), g.square().mean(0).rsqrt()
        # A few directions of large variance affect the variances of all draws and few of the
        # gradients; a few directions of small variance do the opposite.
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
    """Fit a low-rank metric after scaling, in the span of ``rank`` directions of x and g each."""
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
    r"""Fisher divergence of :math:`N(0, A A^\top)`, up to a constant.

    It is the mean of :math:`|A^{-1} x|^2 + |A^\top g|^2`.
    """
    inverse = LowRank(torch.ones_like(metric.scale), metric.vectors, 1.0 / metric.values)
    return float(
        (inverse.apply(x / metric.scale).square() + metric.transpose(g).square()).sum(1).mean()
    )


def _second_moment(rows: Tensor) -> Tensor:
    """Covariance of centered rows, regularized by the identity with the weight of 0.01 rows.

    The regularization makes it invertible.
    """
    return (rows.mT @ rows + 0.01 * torch.eye(rows.shape[1]).to(rows)) / len(rows)


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    r"""Geometric mean of a and the inverse of b: the positive definite M with :math:`M b M = a`."""
    lower, _ = torch.linalg.cholesky_ex(b)
    values, vectors = torch.linalg.eigh(lower.mT @ a @ lower)
    half: Tensor = torch.linalg.solve_triangular(lower.mT, vectors * values.pow(0.25), upper=True)
    return half @ half.mT
