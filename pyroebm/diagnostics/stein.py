"""Stein residuals: consistency of draws with the gradient of their energy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.energy import Energy, value_and_grad
from pyroebm.core.statistics import mcse_mean
from pyroebm.diagnostics.energy_probes import has_gradient

__all__ = ["stein_residual", "stein_z"]

#: Maximum number of draws at which :func:`stein_residual` evaluates the gradient.
MAX_GRADIENTS = 2**16

#: Number of states in one evaluation of the energy.
ROWS = 4096


def stein_z(draws: Tensor, scores: Tensor) -> float:
    r"""Compute the largest :math:`|z|` of the Langevin-Stein identities.

    Standard errors account for autocorrelation. For :math:`s(x) = \nabla \log p(x)` of a density
    that vanishes at infinity, integration by parts gives, for any constant m (Stein, 1972; Gorham
    and Mackey, "Measuring Sample Quality with Stein's Method", 2015),

    .. math:: E[s_i(x)] = 0, \quad E[(x_i - m_i) s_i(x)] = -1, \quad E[(x - m) \cdot s(x)] = -d

    Args:
        draws: x, shape ``(chains, draws, *event)``; m is their mean.
        scores: s(x), of the same shape.

    Returns:
        the largest :math:`|z|` over the identities of the entries that moved, which is of order 1
        for draws of p. NaN if no entry moved; infinite if a score is not finite, or if a residual
        is constant and not 0.

    Example:
        >>> x = torch.randn(4, 1000, 3, generator=torch.Generator().manual_seed(0))
        >>> stein_z(x, -x) < 5, stein_z(1.2 * x, -1.2 * x) < 5
        (True, False)
    """
    x, s = (t.reshape(*t.shape[:2], -1).double() for t in (draws, scores))
    moved = (x != x[:1, :1]).flatten(0, 1).any(0)
    x, s = x[..., moved], s[..., moved]
    if not s.shape[-1]:
        return math.nan
    if not bool(torch.isfinite(s).all()):
        return math.inf
    products = (x - x.mean((0, 1))) * s + 1.0
    residuals = torch.cat([s, products, products.sum(-1, keepdim=True)], -1)
    off, error = residuals.mean((0, 1)).abs().cpu().numpy(), mcse_mean(residuals)
    # A constant residual has no standard error: 0 / 0 must not mask the others.
    constant = ~(error > 0)
    error = np.where(constant, np.where(off > 0, 0.0, 1.0), error)
    with np.errstate(divide="ignore"):
        return float(np.max(off / error))


def stein_residual(energy: Energy, draws: Tensor) -> float:
    """Compute :func:`stein_z` of draws of an energy in unconstrained coordinates.

    Args:
        energy: the energy whose draws they should be.
        draws: shape ``(chains, draws, *event)``; they are thinned evenly, so that the gradient is
            evaluated at 65,536 of them at most.

    Returns:
        the largest :math:`|z|`. NaN if it is not defined: for an energy without a gradient, or a
        density with an edge, for which the identities need not hold (the energy is not finite at
        twice a draw's distance from the mean).

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> x = DoubleWell().sample(4000, torch.Generator().manual_seed(0)).reshape(4, 1000)
        >>> stein_residual(DoubleWell(), x) < 5
        True
    """
    chains = len(draws)
    draws = draws[:, :: -(-draws.shape[1] * chains // MAX_GRADIENTS)]
    rows = draws.reshape(-1, *draws.shape[2:])
    mean, scores = rows.mean(0), []
    if not has_gradient(energy, rows):
        return float("nan")
    for part in rows.split(ROWS):
        with torch.no_grad():
            if not bool(torch.isfinite(energy(mean + 2.0 * (part - mean))).all()):
                return float("nan")
        scores.append(-value_and_grad(energy, part)[1])
    return stein_z(draws, torch.cat(scores).reshape(draws.shape))
