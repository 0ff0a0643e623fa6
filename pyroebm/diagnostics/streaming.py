"""Moments and R-hat of many chains without storing their draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["StreamingMoments"]


class StreamingMoments(NamedTuple):
    r"""Means and variances of each chain, updated draw by draw (Welford, 1962).

    The value is immutable and in float64.

    Args:
        draws: n, number of draws so far of each chain, shape ``(chains,)``.
        mean: running mean of each chain, shape ``(chains, *event)``.
        squares: sum of squared deviations from it, shape ``(chains, *event)``.

    Example:
        >>> x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        >>> moments = StreamingMoments.start(x[:, 0])
        >>> for draw in x.unbind(1):
        ...     moments = moments.update(draw)
        >>> bool((moments.r_hat() < 1.01) & (moments.nested_r_hat(8) < 1.01))
        True
    """

    draws: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> StreamingMoments:
        """Return empty moments for states of the shape of ``like``, ``(chains, *event)``."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return cls(torch.zeros(len(like), dtype=torch.float64, device=like.device), zero, zero)

    def update(self, x: Tensor) -> StreamingMoments:
        """Add one draw of each chain, ``(chains, *event)``."""
        draws = self.draws + 1
        deviation = x - self.mean
        mean = self.mean + deviation / draws.reshape(-1, *[1] * (x.dim() - 1))
        return StreamingMoments(draws, mean, self.squares + deviation * (x - mean))

    @classmethod
    def joined(cls, batches: list[StreamingMoments]) -> StreamingMoments:
        """Concatenate the chains of several chain batches."""
        return cls(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def means(self) -> Tensor:
        """Return means over all draws, shape ``event``; every chain has the same weight."""
        return self.mean.mean(0)

    def variances(self) -> Tensor:
        """Return variances over all draws, between and within chains, shape ``event``."""
        within = self.squares / self._column(self.draws)
        return within.mean(0) + self.mean.var(0, unbiased=False)

    def mcse(self) -> Tensor:
        r"""Return standard errors of :meth:`means`: :math:`\operatorname{sd}(\bar x_c) / \sqrt C`.

        They are computed from the means of the chains, which are independent.
        """
        return self.mean.std(0) / len(self.mean) ** 0.5

    def ess(self) -> Tensor:
        """Return effective sample sizes: :meth:`variances` divided by squared :meth:`mcse`.

        Their precision increases with the number of chains.
        """
        return self.variances() / self.mcse() ** 2

    def r_hat(self) -> Tensor:
        r"""Return R-hat (Gelman and Rubin, 1992), shape ``event``.

        .. math:: \hat R = \sqrt{(n - 1) / n + B / W}

        B is the variance of the chains' means and W the mean of their variances; chains are neither
        split nor rank-normalized. NaN with one draw, where W is not defined.
        """
        r_hat = torch.sqrt(1 - 1 / self.draws.mean() + self.mean.var(0) / self._within().mean(0))
        return torch.where(self.draws.min() > 1, r_hat, torch.nan)

    def nested_r_hat(self, num_superchains: int) -> Tensor:
        r"""Return nested :math:`\hat R` for many short chains.

        .. math:: \hat R_\nu = \sqrt{1 + B / W}, \quad B = \operatorname{var}_k \bar x_k, \quad
            W = \operatorname{mean}_k (\operatorname{var}_m \bar x_{mk} + \operatorname{mean}_m
            s^2_{mk})

        over chains m of superchain k, with :math:`s^2 = 0` for one draw (Margossian, Hoffman,
        Sountsov, Riou-Durand, Vehtari and Gelman, 2024). It separates bias from the
        noise of short chains, which averages out within a superchain. All chains of a superchain
        must start at the same point:
        ``initial=points.repeat_interleave(chains_of_each, 0)``.

        Args:
            num_superchains: number of superchains of equally many consecutive chains.

        Raises:
            ValueError: if there are fewer than two, or if they do not divide the chains.
        """
        chains = len(self.mean)
        if num_superchains < 2 or chains % num_superchains:
            raise ValueError(
                f"num_superchains must be at least 2 and divide the {chains} chains, got"
                f" num_superchains={num_superchains}"
            )
        mean, within = (
            t.reshape(num_superchains, -1, *t.shape[1:]) for t in (self.mean, self._within())
        )
        between = mean.var(1) if mean.shape[1] > 1 else torch.zeros_like(mean[:, 0])
        return torch.sqrt(1 + mean.mean(1).var(0) / (between + within.mean(1)).mean(0))

    def _within(self) -> Tensor:
        # The squares are 0 after one draw, and so is the variance within a chain.
        return self.squares / self._column((self.draws - 1).clamp(min=1))

    def _column(self, count: Tensor) -> Tensor:
        return count.reshape(-1, *[1] * (self.mean.dim() - 1))
