"""The tail of importance weights."""

from __future__ import annotations

import math

import numpy as np
import torch

__all__ = ["pareto_k"]


def pareto_k(log_weights: torch.Tensor | np.ndarray) -> float:
    r"""Shape of the tail of importance weights: a generalized Pareto distribution fitted to the largest of them.

    The tail is the largest :math:`\min(n / 5, 3 \sqrt n)` weights (Vehtari, Simpson, Gelman, Yao and Gabry, 2024); the fit is
    that of Zhang and Stephens (2009) with Vehtari's prior, which adds 10 weights of shape 1/2. ArviZ's own ``psislw`` is not
    called, because its 1.x line takes the negative of the log weights that 0.x takes, and raises where there is no tail.

    Args:
        log_weights: log weights, shape ``(n,)``.

    Returns:
        k; above 0.7 the estimates cannot be trusted. ``inf`` where fewer than five weights make the tail, ``-inf`` where all
        weights are equal and there is none.

    Example:
        >>> pareto_k(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1) < 0.5
        True
    """
    logs = np.asarray(log_weights.detach().cpu().numpy() if isinstance(log_weights, torch.Tensor) else log_weights, dtype=float)
    if np.ptp(logs) < 1e-12:
        return -np.inf
    weights = np.sort(np.exp(logs - logs.max()))
    cutoff = max(weights[-math.ceil(min(len(logs) / 5, 3 * math.sqrt(len(logs)))) - 1], 1e-300)  # reciprocals must not overflow
    tail = weights[weights > cutoff] - cutoff
    n = len(tail)
    if n < 5:
        return np.inf
    points = 30 + math.isqrt(n)  # of a grid over b = -k / scale, in which the posterior is averaged
    b = 1.0 / tail[-1] + (1.0 - np.sqrt(points / (np.arange(points) + 0.5))) / (3.0 * tail[int(n / 4 + 0.5) - 1])
    k = np.log1p(-b[:, None] * tail).mean(1)
    log_likelihood = n * (np.log(-b / k) - k - 1.0)
    b_mean = np.average(b, weights=np.exp(log_likelihood - log_likelihood.max()))
    return float((n * np.log1p(-b_mean * tail).mean() + 5.0) / (n + 10.0))
