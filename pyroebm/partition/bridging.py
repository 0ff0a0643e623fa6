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
from pyroebm.core.statistics import MIN_ESS, ess_bulk
from pyroebm.core.supports import is_discrete, to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.energies.layers import Layers
from pyroebm.partition.bases import base_energy
from pyroebm.partition.result import LogZ, check_exact_draws
from pyroebm.smc import check_path

__all__ = ["bennett_acceptance_ratio", "bridge"]

#: Expected number of constant chains of independent draws below which a constant chain is stuck.
IMPROBABLE = 1e-3


def bennett_acceptance_ratio(forward: LogZ, reverse: LogZ) -> LogZ:
    r"""Combine forward and reverse AIS by Bennett's acceptance ratio (Bennett, 1976; Crooks, 2000).

    Both runs use one schedule. With log weights :math:`w_i` of n forward chains and :math:`w'_j` of
    m reverse chains, it is the root r of

    .. math:: \sum_i \sigma(w_i - r + \log \tfrac mn) = \sum_j \sigma(w'_j + r - \log \tfrac mn)
    with :math:`\log \hat Z = \log Z_0 + r`. Of all combinations of the two it has the minimum
    asymptotic variance (Meng and Wong, 1996). If the two overlap at less than about 10 chains,
    there is no standard error.

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
    root, error, problem = _bennett(ahead, -back, len(back))
    return LogZ(base + root, error, "estimate", "AIS both ways", problem=problem)


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
        ValueError: if a shape does not fit, there are no exact draws, chains have fewer than 4
            draws or never moved (chains of discrete states may be constant by chance), or the
            energy has no finite normalizing constant.
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
    if len(batch) == 2:
        _check_chains(draws, is_discrete(energy.support))
    target, start = unconstrain(energy), unconstrain(reference)
    path = GeometricPath(target, 1.0, start)
    with eval_mode(energy), torch.no_grad():
        check_path(target, start)
        own = -path.slope(to_support(energy.support).inv(draws)).double().cpu()
        other = -path.slope(start.sample(batch.numel(), generator)).double().cpu()
    if (
        bool(own.isnan().any())
        or bool((own == -math.inf).any())
        or bool((other.isnan() | (other == math.inf)).any())
    ):
        raise FloatingPointError("bridge: an energy is NaN, or not finite at its own draws")
    effective = float(ess_bulk(own)) if len(batch) == 2 else float(batch.numel())
    root, error, problem = _bennett(other.numpy(), own.flatten().numpy(), effective)
    value = float(reference.log_z or 0.0) + root
    return LogZ(value, error, "estimate", "bridge sampling", problem=problem)


def _check_chains(draws: Tensor, discrete: bool) -> None:
    """Check that draws ``(chains, n, *event)`` have an effective sample size.

    A chain of discrete states may be constant by chance, at a frequent state.

    Raises:
        ValueError: if n is below 4, if no chain moved, or if one did not that would have if its
            draws were independent.
    """
    if draws.shape[1] < 4:
        raise ValueError(
            "draws must have at least 4 draws in each chain, from which their effective sample size"
            f" is estimated, got shape {tuple(draws.shape)}; run the chains longer, or give"
            " independent draws with the shape (n, *event)"
        )
    constant = (draws == draws[:, :1]).flatten(1).all(1)
    if discrete and not bool(constant.all()):
        chains, n = draws.shape[:2]
        _, state, counts = draws.reshape(chains * n, -1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        frequency = counts[state.reshape(chains, n)[:, 0]] / (chains * n)
        constant &= chains * frequency ** (n - 1) < IMPROBABLE
    if bool(constant.any()):
        stuck = constant.nonzero().flatten().tolist()
        named = ", ".join(map(str, stuck[:5])) + (", ..." if len(stuck) > 5 else "")
        raise ValueError(
            f"draws must be of chains that moved, but {len(stuck)} of {len(draws)} never did"
            f" (numbers {named}), so that they are no sample of the energy; run the chains longer,"
            " or with another kernel"
        )


def _bennett(ahead: Any, back: Any, effective: float) -> tuple[float, float, str | None]:
    r"""Solve for the root r, its standard error, and why there is none.

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
        return root, math.nan, "there is one draw"
    # squared coefficients of variation of the terms of each side
    spreads = [math.expm1(logsumexp(2 * t) - 2 * logsumexp(t) + math.log(len(t))) for t, _ in terms]
    overlap = min(n / (1.0 + spread) for spread, (_, n) in zip(spreads, terms, strict=True))
    if overlap < MIN_ESS:
        problem = f"the two densities overlap at {overlap:.2g} draws, below {MIN_ESS:g}"
        return root, math.inf, problem
    variance = sum(spread / n for spread, (_, n) in zip(spreads, terms, strict=True))
    return root, math.sqrt(max(variance, 0.0)), None
