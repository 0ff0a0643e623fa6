"""Statistics of thousands of chains whose draws are not kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["StreamingMoments"]


class StreamingMoments(NamedTuple):
    r"""Means and variances of each chain, updated draw by draw (Welford, 1962), as an immutable
    value in float64.

    Args:
        draws: n, draws so far of each chain, shape ``(chains,)``.
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
        """Empty, for states shaped as ``like`` ``(chains, *event)``."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return cls(torch.zeros(len(like), dtype=torch.float64, device=like.device), zero, zero)

    def update(self, x: Tensor) -> StreamingMoments:
        """Add one draw of each chain, ``(chains, *event)``."""
        draws = self.draws + 1
        deviation = x - self.mean
        mean = self.mean + deviation / draws.reshape(-1, *[1] * (x.dim() - 1))
        return StreamingMoments(draws, mean, self.squares + deviation * (x - mean))

    @classmethod
    def joined(cls, blocks: list[StreamingMoments]) -> StreamingMoments:
        """All chains of several."""
        return cls(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

    def means(self) -> Tensor:
        """Means over all draws, shape ``event``; every chain counts the same."""
        return self.mean.mean(0)

    def variances(self) -> Tensor:
        """Variances over all draws, between chains as well as within them, shape ``event``."""
        return self._within().mean(0) * (1 - 1 / self.draws.mean()) + self.mean.var(
            0, unbiased=False
        )

    def mcse(self) -> Tensor:
        r"""Standard errors of :meth:`means` from chains, which are independent:
        :math:`\operatorname{sd}(\bar x_c) / \sqrt C`.
        """
        return self.mean.std(0) / len(self.mean) ** 0.5

    def ess(self) -> Tensor:
        """Effective sample sizes, :meth:`variances` over squared :meth:`mcse`; as good as the
        number of chains is large.
        """
        return self.variances() / self.mcse() ** 2

    def r_hat(self) -> Tensor:
        r""":math:`\hat R = \sqrt{(n - 1) / n + B / W}` (Gelman and Rubin, 1992), neither split nor
        ranked, shape ``event``.

        B is the variance of the chains' means and W the mean of their variances.
        """
        return torch.sqrt(1 - 1 / self.draws.mean() + self.mean.var(0) / self._within().mean(0))

    def nested_r_hat(self, num_superchains: int) -> Tensor:
        r"""Nested :math:`\hat R` for many short chains (Margossian, Hoffman, Sountsov, Riou-Durand,
        Vehtari and Gelman, 2024).

        .. math:: \hat R_\nu = \sqrt{1 + B / W}, \quad B = \operatorname{var}_k \bar x_k, \quad
            W = \operatorname{mean}_k (\operatorname{var}_m \bar x_{mk} + \operatorname{mean}_m
            s^2_{mk})

        over chains m of superchain k. It tells bias apart from the noise of short chains, which
        averages out within a superchain: for that all chains of one must start at one point,
        ``initial=points.repeat_interleave(chains_of_each, 0)``.

        Args:
            num_superchains: number of superchains, each of as many chains in a row.

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
        return self.squares / (self.draws - 1).reshape(-1, *[1] * (self.mean.dim() - 1))
