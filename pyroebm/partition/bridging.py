"""Ratios of normalizing constants: bridge sampling, and Bennett's acceptance ratio for AIS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, log_expit, logsumexp
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_counts
from pyroebm.core.annealing_path import GeometricPath
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.statistics import ess_bulk
from pyroebm.core.supports import to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.energies.layers import Layers
from pyroebm.partition.bases import base_energy
from pyroebm.partition.result import LogZ, check_exact_draws

__all__ = ["bennett_acceptance_ratio", "bridge"]


def bennett_acceptance_ratio(forward: LogZ, reverse: LogZ) -> LogZ:
    r"""Combine forward and reverse AIS by Bennett's acceptance ratio (Bennett, 1976; Crooks, 2000).

    Both runs use one schedule. With log weights :math:`w_i` of n forward chains and :math:`w'_j` of
    m reverse chains, it is the root r of

    .. math:: \sum_i \sigma(w_i - r + \log \tfrac mn) = \sum_j \sigma(w'_j + r - \log \tfrac mn)
    with :math:`\log \hat Z = \log Z_0 + r`. Of all combinations of the two it has the minimum
    asymptotic variance (Meng and Wong, 1996). If the two do not overlap, few weights determine the
    standard error, which is then too small; with one chain it is NaN.

    Args:
        forward: result of :func:`ais`.
        reverse: result of :func:`reverse_ais`, from the same base with the same schedule.

    Returns:
        an estimate of kind "estimate".

    Raises:
        ValueError: if one of them has no log weights.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import bidirectional_ais
        >>> both = bidirectional_ais(BernoulliRBM(3, 2, weight=torch.ones(3, 2)), betas=20)
        >>> bennett_acceptance_ratio(both.forward, both.reverse).value == both.combined.value
        True
    """
    if forward.log_weights is None or reverse.log_weights is None:
        raise ValueError(
            "forward and reverse must have log weights, as the results of ais and reverse_ais do,"
            " got none in one of them"
        )
    ahead, back = (result.log_weights.cpu().numpy() for result in (forward, reverse))  # type: ignore[union-attr]
    base = forward.value - float(logsumexp(ahead)) + math.log(len(ahead))
    root, error = _bennett(ahead, -back, len(back))
    return LogZ(base + root, error, "estimate", "AIS both ways")


def bridge(
    energy: Energy,
    base: Layers | Energy | Distribution | None = None,
    *,
    draws: Tensor | np.ndarray | None = None,
    num_samples: int = 10_000,
    generator: torch.Generator | None = None,
) -> LogZ:
    r"""Estimate log Z by bridge sampling, from draws of the energy and of a base.

    The bridge function is the optimal one (Bennett, 1976; Meng and Wong, 1996):

    .. math::

        \frac{Z}{Z_0} = \frac{E_{x \sim p_0}[e^{-E(x)} h(x)]}{E_{x \sim p}[e^{-E_0(x)} h(x)]},
        \qquad h \propto \frac{1}{n\, e^{-E} / Z + n_0\, e^{-E_0} / Z_0}
    h contains Z itself; the fixed point of their iteration is found as the root of a monotone
    function. The base should overlap the energy; otherwise use :func:`ais`.

    Args:
        energy: E.
        base: :math:`E_0`, as for :func:`ais`; it is drawn from as many times as there are
            ``draws``.
        draws: draws of the energy: independent ones ``(n, *event)``, or those of Markov chains
            ``(chains, n, *event)``, as ``mcmc.get_samples(group_by_chain=True)["x"]`` is; the
            effective sample size of the log ratio (Vehtari et al., 2021) then replaces n. None
            draws ``num_samples`` exactly, if the energy has exact draws.
        num_samples: n if ``draws`` is None.
        generator: source of randomness; None is torch's default generator.

    Returns:
        an estimate of kind "estimate".

    Raises:
        ValueError: if a shape does not fit, or there are no exact draws.
        FloatingPointError: if an energy is not finite at its own draws, or NaN.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> result = bridge(Gaussian(torch.zeros(2)), Gaussian(torch.ones(2)))
        >>> abs(result.value - math.log(2 * math.pi)) < 5 * result.standard_error
        True
    """
    check_energy(energy)
    check_counts({"num_samples": 2}, num_samples)
    reference = base_energy(energy, base)
    if draws is None:
        check_exact_draws(energy)
        draws = energy.sample(num_samples, generator)
    draws = energy.as_states(draws, "draws")
    batch = energy.batch_shape(draws)
    if len(batch) not in (1, 2) or batch.numel() < 2:
        raise ValueError(
            f"draws must have shape (n, *event) or (chains, n, *event), got {tuple(draws.shape)}"
        )
    target, start = unconstrain(energy), unconstrain(reference)
    path = GeometricPath(target, 1.0, start)
    with eval_mode(energy), torch.no_grad():
        own = -path.slope(to_support(energy.support).inv(draws)).double().cpu()
        other = -path.slope(start.sample(batch.numel(), generator)).double().cpu()
    if (
        bool(own.isnan().any())
        or bool((own == -math.inf).any())
        or bool((other.isnan() | (other == math.inf)).any())
    ):
        raise FloatingPointError("bridge: an energy is NaN, or not finite at its own draws")
    effective = float(ess_bulk(own)) if len(batch) == 2 else float(batch.numel())
    root, error = _bennett(other.numpy(), own.flatten().numpy(), effective)
    return LogZ(float(reference.log_z or 0.0) + root, error, "estimate", "bridge sampling")


def _bennett(ahead: Any, back: Any, effective: float) -> tuple[float, float]:
    r"""Solve for the root r and its standard error.

    Args:
        ahead: :math:`\log f / f_0` at draws of the base.
        back: :math:`\log f / f_0` at draws of the target.
        effective: effective number of independent draws of the target.
    """
    shift = math.log(effective / len(ahead))

    def gap(r: float) -> float:
        return float(expit(ahead - r + shift).sum() - expit(r - shift - back).mean() * effective)

    both = np.concatenate([ahead, back])
    both = both[np.isfinite(both)]
    if not len(both):
        raise FloatingPointError(
            "the two densities do not overlap at any draw, so their ratio cannot be estimated; use"
            " another base"
        )
    root = float(brentq(gap, both.min() + shift - 40.0, both.max() + shift + 40.0, xtol=1e-12))
    terms = (
        (log_expit(ahead - root + shift), len(ahead)),
        (log_expit(root - shift - back), effective),
    )
    if min(len(ahead), len(back)) < 2:
        return root, math.nan  # one draw has no sample variance
    variance = sum(
        math.expm1(logsumexp(2 * t) - 2 * logsumexp(t) + math.log(len(t))) / n for t, n in terms
    )
    return root, math.sqrt(variance)
