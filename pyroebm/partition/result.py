"""What every estimator of log Z answers with: a value, its error, and which way it is biased."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from pyroebm.core.statistics import Kind, log_mean

__all__ = ["BidirectionalAIS", "LogZ"]

BIAS: dict[str, str] = {
    "exact": "no bias",
    "estimate": "biased either way",
    "lower": "low on average",
    "upper": "high on average",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LogZ:
    r"""A value of :math:`\log Z`, in nats, and how far to trust it.

    "lower" and "upper" are stochastic bounds: their expectation lies on that side of the truth
    (Jensen), and a single value passes it by more than b nats with a probability of at most
    :math:`e^{-b}` (Markov). A standard error says how much a value scatters. It does not see the
    bias, and no method sees a mode that none of its draws has met.

    Attributes:
        value: :math:`\log Z`.
        standard_error: its standard error; 0 where it is a sum over all states, the error of the
            rule for a quadrature, ``inf`` where a few of the weights decide
            (:func:`pyroebm.core.statistics.log_mean`).
        kind: "exact", "estimate", "lower" or "upper".
        method: how it was found, in words.
        ess: effective sample size :math:`(\sum w)^2 / \sum w^2` of the weights (Kong, 1992); None
            where there are none.
        log_weights: float64, shape ``(n,)``; None where there are none.

    Example:
        >>> import torch
        >>> print(LogZ(5.0322, 0.0021, "lower", "AIS", 83.2, torch.zeros(100)))
        log Z = 5.0322 +- 0.0021 (AIS; lower: low on average; ESS 83.2 of 100)
    """

    value: float
    standard_error: float
    kind: Kind
    method: str
    ess: float | None = None
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in BIAS:
            raise ValueError(f"kind must be one of {list(BIAS)}, got kind={self.kind!r}")

    @property
    def bias(self) -> str:
        """Which way the value is biased, in words."""
        return BIAS[self.kind]

    def __str__(self) -> str:
        weights = (
            ""
            if self.ess is None or self.log_weights is None
            else f"; ESS {self.ess:.4g} of {len(self.log_weights)}"
        )
        what = f"{self.method}; {self.kind}: {self.bias}{weights}"
        return f"log Z = {self.value:.4f} +- {self.standard_error:.2g} ({what})"


def from_weights(log_weights: Tensor, log_z: float, kind: Kind, method: str, sign: int = 1) -> LogZ:
    r""":math:`\log Z_0 \pm \log \frac1n \sum_i w_i` of independent weights, with the standard error
    of the delta method.

    Args:
        log_weights: shape ``(n,)``.
        log_z: :math:`\log Z_0`, of what the weights are relative to.
        kind, method: of the result.
        sign: 1, or -1 where the weights go from the target to the base.

    Raises:
        FloatingPointError: if a log weight is NaN or +inf, or if every weight is 0.
    """
    log_weights = log_weights.detach().double()
    n = len(log_weights)
    nan = int(log_weights.isnan().sum())
    infinite = int((log_weights == math.inf).sum())
    if nan or infinite:
        raise FloatingPointError(
            f"{method}: of {n} log weights {nan} are NaN and {infinite} are +inf: an energy is not"
            " finite"
        )
    if bool((log_weights == -math.inf).all()):
        raise FloatingPointError(
            f"{method}: all {n} weights are 0: the two densities do not meet at any draw"
        )
    found = log_mean(log_weights)
    return LogZ(
        log_z + sign * found.value, found.standard_error, kind, method, found.ess, log_weights
    )


@dataclasses.dataclass(frozen=True, eq=False)
class BidirectionalAIS:
    """A forward and a reverse run beside each other, and what both together say.

    Attributes:
        forward: from the base to the target, low on average.
        reverse: from the target to the base; a bound only where its kind is "upper".
        combined: the acceptance ratio of both (:func:`pyroebm.partition.bennett_acceptance_ratio`),
            mostly much closer than either.

    Example:
        >>> import torch
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import bidirectional_ais
        >>> print(
        ...     bidirectional_ais(
        ...         BernoulliRBM(3, 2, weight=torch.zeros(3, 2)), betas=10, num_chains=5
        ...     )
        ... )
        log Z = 3.4657 +- 0 (AIS; lower: low on average; ESS 5 of 5)
        log Z = 3.4657 +- 0 (reverse AIS; upper: high on average; ESS 5 of 5)
        log Z = 3.4657 +- 0 (AIS both ways; estimate: biased either way)
    """

    forward: LogZ
    reverse: LogZ
    combined: LogZ

    @property
    def width(self) -> float:
        """Reverse less forward, in nats."""
        return self.reverse.value - self.forward.value

    def __str__(self) -> str:
        return "\n".join(map(str, (self.forward, self.reverse, self.combined)))
