"""Results of estimators of log Z: value, standard error and direction of the bias."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.statistics import Kind, log_mean, pareto_k, weight_problem

__all__ = ["BidirectionalAIS", "LogZ", "check_exact_draws", "from_weights"]

BIAS: dict[str, str] = {
    "exact": "no bias",
    "estimate": "biased either way",
    "lower": "low on average",
    "upper": "high on average",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LogZ:
    r"""Estimate of :math:`\log Z`, in nats, with its error and the direction of its bias.

    "lower" and "upper" are stochastic bounds: their expectation is on that side of the true value
    (Jensen), and a single value exceeds the bound by more than b nats with probability at most
    :math:`e^{-b}` (Markov). The standard error measures the variance of the value. It does not
    include the bias, and no method detects a mode without draws.

    Attributes:
        value: :math:`\log Z`.
        standard_error: its standard error; 0 for a sum over all states, the error of the rule for a
            quadrature, ``inf`` if there is a ``problem`` (NaN with one draw).
        kind: "exact", "estimate", "lower" or "upper".
        method: name of the method.
        ess: effective sample size :math:`(\sum w)^2 / \sum w^2` of the weights (Kong, 1992); None
            without weights.
        log_weights: float64, shape ``(n,)``; None without weights.
        problem: why there is no standard error; None if there is one. For example, the weights have
            an ESS below 10 or a Pareto k above 0.7
            (:func:`pyroebm.core.statistics.weight_problem`). The value may then be far off.
        caveat: what the standard error does not include, or why a quadrature is not exact.

    Example:
        >>> import torch
        >>> print(
        ...     LogZ(5.0322, 0.0021, "lower", "AIS", 83.2, torch.zeros(100))
        ... )  # doctest: +NORMALIZE_WHITESPACE
        log Z = 5.0322 +- 0.0021 (AIS; lower: low on average; ESS 83.2 of 100; modes without draws
        are not included)
        >>> few = LogZ(4.1, math.inf, "lower", "AIS", problem="the ESS of the weights is 2 of 9")
        >>> print(few)  # doctest: +NORMALIZE_WHITESPACE
        log Z = 4.1000, no standard error: the ESS of the weights is 2 of 9 (AIS; lower: low on
        average; modes without draws are not included)
    """

    value: float
    standard_error: float
    kind: Kind
    method: str
    ess: float | None = None
    log_weights: Tensor | None = None
    problem: str | None = None
    caveat: str = dataclasses.field(default="modes without draws are not included", kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in BIAS:
            raise ValueError(f"kind must be one of {list(BIAS)}, got kind={self.kind!r}")

    @property
    def bias(self) -> str:
        """Direction of the bias, in words."""
        return BIAS[self.kind]

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        weights = (
            ""
            if self.ess is None or self.log_weights is None
            else f"; ESS {self.ess:.4g} of {len(self.log_weights)}"
        )
        caveat = "" if self.kind == "exact" else f"; {self.caveat}"
        error = (
            f" +- {self.standard_error:.2g}"
            if math.isfinite(self.standard_error)
            else ", no standard error" + (f": {self.problem}" if self.problem else "")
        )
        what = f"{self.method}; {self.kind}: {self.bias}{weights}{caveat}"
        return f"log Z = {self.value:.4f}{error} ({what})"


def check_exact_draws(energy: Energy) -> None:
    """Check that draws need not be given.

    Raises:
        ValueError: if the energy has no exact draws.
    """
    if not energy.has_exact_draws:
        raise ValueError(
            f"draws must be given, because {type(energy).__name__} has no exact draws, got None;"
            " pass those of MCMC"
        )


def from_weights(
    log_weights: Tensor,
    log_z: float,
    kind: Kind,
    method: str,
    sign: int = 1,
    error: float = 0.0,
) -> LogZ:
    r"""Estimate :math:`\log Z_0 \pm \log \frac1n \sum_i w_i` from independent weights.

    The standard error is that of the delta method, or ``inf`` if the weights do not determine it.

    Args:
        log_weights: shape ``(n,)``.
        log_z: :math:`\log Z_0` of the density to which the weights are relative.
        kind: kind of the result.
        method: method of the result.
        sign: 1, or -1 if the weights are from the target to the base.
        error: standard error of ``log_z``.

    Raises:
        FloatingPointError: if a log weight is NaN or +inf, or if every weight is 0.
    """
    log_weights = log_weights.detach().double()
    n = len(log_weights)
    nan = int(log_weights.isnan().sum())
    infinite = int((log_weights == math.inf).sum())
    if nan or infinite:
        raise FloatingPointError(
            f"{method}: log weights must not be NaN or +inf, but of {n} log weights {nan} are NaN"
            f" and {infinite} are +inf: an energy is not finite"
        )
    if bool((log_weights == -math.inf).all()):
        raise FloatingPointError(
            f"{method}: all {n} weights are 0, because the two densities do not overlap at any"
            " draw; use another base"
        )
    found = log_mean(log_weights)
    problem = weight_problem(log_weights, found.ess, pareto_k(log_weights))
    own = found.standard_error if problem is None or n < 2 else math.inf
    return LogZ(
        log_z + sign * found.value,
        math.hypot(own, error),
        kind,
        method,
        found.ess,
        log_weights,
        problem,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class BidirectionalAIS:
    """Forward and reverse AIS, and their combination.

    Attributes:
        forward: from the base to the target, low on average.
        reverse: from the target to the base; a bound only if its kind is "upper".
        combined: Bennett's acceptance ratio of both
            (:func:`pyroebm.partition.bennett_acceptance_ratio`), usually much more accurate than
            either.

    Example:
        >>> import torch
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import bidirectional_ais
        >>> rbm = BernoulliRBM(3, 2, weight=torch.zeros(3, 2))
        >>> both = bidirectional_ais(rbm, betas=10, num_chains=20)
        >>> for estimate in (both.forward, both.reverse, both.combined):
        ...     print(estimate.kind, round(estimate.value, 4))
        lower 3.4657
        upper 3.4657
        estimate 3.4657
    """

    forward: LogZ
    reverse: LogZ
    combined: LogZ

    @property
    def width(self) -> float:
        """Reverse minus forward estimate, in nats."""
        return self.reverse.value - self.forward.value

    def __str__(self) -> str:
        return "\n".join(map(str, (self.forward, self.reverse, self.combined)))
