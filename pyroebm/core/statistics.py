"""Statistics of draws and weights: ArviZ's R-hat, effective sample size (ESS) and PSIS."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "arviz",
    "is_new_arviz",
    "embed_angles",
    "as_array",
    "r_hat",
    "ess_bulk",
    "ess_tail",
    "mcse_mean",
    "bfmi",
    "pareto_k",
    "Kind",
    "LogMean",
    "effective",
    "log_mean",
    "too_few",
    "weight_problem",
    "Estimate",
    "energy_distance",
    "maximum_mean_discrepancy",
    "median_distance",
    "mode_coverage_entropy",
]

#: What a number is: exact, an estimate, or a bound in expectation ("lower" or "upper").
Kind = Literal["exact", "estimate", "lower", "upper"]


@functools.cache
def arviz() -> Any:
    """Import ArviZ on first use, without the announcement that its 0.23 line prints.

    The import takes seconds.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        return importlib.import_module("arviz")


def is_new_arviz() -> bool:
    """Whether the installed ArviZ is of the 1.x line, whose functions and containers differ."""
    return int(arviz().__version__.split(".")[0]) >= 1


def embed_angles(values: Mapping[str, Tensor], angles: Collection[str]) -> dict[str, Tensor]:
    """Replace angles by their cosine and sine, which have means and variances.

    Args:
        values: values by name.
        angles: the names of those that are angles modulo 2 pi.

    Example:
        >>> x = torch.zeros(2)
        >>> list(embed_angles({"phi": x, "y": x}, ["phi"]))
        ['cos(phi)', 'sin(phi)', 'y']
    """
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name in angles:
            found |= {f"cos({name})": value.cos(), f"sin({name})": value.sin()}
        else:
            found[name] = value
    return found


def as_array(draws: Tensor | np.ndarray, name: str = "draws") -> np.ndarray:
    """Convert draws to a NumPy array.

    Raises:
        ValueError: unless they have a chain and a draw dimension.
    """
    array = draws.detach().cpu().numpy() if isinstance(draws, Tensor) else np.asarray(draws)
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (chains, draws, *event), got shape {array.shape}")
    return array


def _statistic(name: str, draws: Tensor | np.ndarray, **options: Any) -> np.ndarray:
    array = as_array(draws)
    if np.issubdtype(array.dtype, np.bool_):
        array = array.astype(np.float64)
    compute = getattr(arviz(), name)
    flat = array.reshape(*array.shape[:2], -1)
    # R-hat of a constant entry is NaN; NumPy's division warning adds nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # `item`: if numba is installed, ArviZ 0.23 returns some numbers in arrays of shape (1,)
        values = [
            np.asarray(compute(np.ascontiguousarray(flat[..., k]), **options)).item()
            for k in range(flat.shape[-1])
        ]
    return np.asarray(values).reshape(array.shape[2:])


def r_hat(draws: Tensor | np.ndarray) -> np.ndarray:
    r"""Compute the rank-normalized split :math:`\hat R` with ArviZ (Vehtari et al., 2021).

    Args:
        draws: shape ``(chains, draws, *event)``, at least two chains and four draws.

    Returns:
        one value for each entry of an event, shape ``event``. Values above 1.01 indicate that the
        chains have not mixed.

    Example:
        >>> bool(r_hat(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) < 1.01)
        True
    """
    return _statistic("rhat", draws)


def ess_bulk(draws: Tensor | np.ndarray) -> np.ndarray:
    """Compute the bulk effective sample size with ArviZ (Vehtari et al., 2021).

    Args:
        draws: shape ``(chains, draws, *event)``.

    Returns:
        one value for each entry of an event, shape ``event``.

    Example:
        >>> bool(ess_bulk(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) > 1500)
        True
    """
    return _statistic("ess", draws, method="bulk")


def ess_tail(draws: Tensor | np.ndarray) -> np.ndarray:
    """Compute the tail effective sample size with ArviZ (Vehtari et al., 2021).

    It is the minimum of those of the 5 % and 95 % quantiles.

    Args:
        draws: shape ``(chains, draws, *event)``.

    Returns:
        one value for each entry of an event, shape ``event``.

    Example:
        >>> bool(ess_tail(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) > 1000)
        True
    """
    return _statistic("ess", draws, method="tail", prob=(0.05, 0.95))


def mcse_mean(draws: Tensor | np.ndarray) -> np.ndarray:
    """Compute the Monte Carlo standard error of the mean with ArviZ (Vehtari et al., 2021).

    Args:
        draws: shape ``(chains, draws, *event)``.

    Returns:
        one value for each entry of an event, shape ``event``, in the unit of the draws.

    Example:
        >>> bool(mcse_mean(torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))) < 0.02)
        True
    """
    return _statistic("mcse", draws, method="mean")


def bfmi(energy: Tensor | np.ndarray) -> np.ndarray:
    """Compute the Bayesian fraction of missing information of each chain (Betancourt, 2016).

    It is computed by ArviZ.

    Args:
        energy: Hamiltonians, shape ``(chains, draws)``, in nats.

    Returns:
        one value for each chain, shape ``(chains,)``; NaN for a chain of constant energy.

    Example:
        >>> bfmi(torch.randn(2, 500, generator=torch.Generator().manual_seed(0))).shape
        (2,)
    """
    array = as_array(energy, "energy")
    with np.errstate(invalid="ignore"):
        return np.asarray(arviz().bfmi(array))


def pareto_k(log_weights: Tensor | np.ndarray) -> float:
    """Estimate the tail shape k of importance weights with ArviZ's PSIS.

    The reference is Vehtari, Simpson, Gelman, Yao and Gabry (2024).

    Args:
        log_weights: log weights, shape ``(n,)``.

    Returns:
        k; above 0.7 the estimates are unreliable. ``inf`` if the tail has fewer than five weights,
        ``-inf`` if the largest weights, as many as a tail has, are equal.

    Example:
        >>> pareto_k(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1) < 0.5
        True
    """
    logs = np.array(
        log_weights.detach().cpu().numpy() if isinstance(log_weights, Tensor) else log_weights,
        dtype=np.float64,
    )
    tail = math.ceil(min(0.2 * len(logs), 3.0 * math.sqrt(len(logs))))
    if np.ptp(np.sort(logs)[-tail - 1 :]) < 1e-12:
        return -np.inf
    # the fit of the tail computes likelihood ratios outside the range of float64
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            if is_new_arviz():  # takes the negative of the log weights
                data_array = importlib.import_module("xarray").DataArray
                k = float(data_array(-logs, dims="sample").azstats.psislw(dim="sample")[1])
            else:
                k = float(arviz().psislw(logs)[1])
        except (IndexError, ValueError):  # ArviZ 1.x, if there is no tail to fit
            return np.inf
    return np.inf if np.isnan(k) else k


#: Effective sample size that is enough for a standard error, for any number of weights.
ENOUGH = 400.0


class LogMean(NamedTuple):
    """The log of a mean of independent weights, its standard error and the ESS."""

    value: float
    standard_error: float
    ess: float


def effective(log_weights: Tensor) -> float:
    r"""Compute the effective sample size :math:`(\sum w)^2 / \sum w^2` of weights (Kong, 1992).

    At least one weight must be positive.
    """
    ratio = (log_weights - log_weights.max()).exp()
    return float(ratio.sum() ** 2 / ratio.square().sum())


def too_few(ess: float, num_samples: int) -> bool:
    """Whether the weights are too unequal to estimate the standard error of their mean.

    The largest weights then dominate the mean, and larger ones have not been drawn yet, so that the
    mean and even more its standard error are underestimated. For 50 to 10,000 log-normal weights
    with standard deviations of 0.5 to 4 nats, the log of the mean is more than five standard errors
    off in 4 to 14 of 100 cases where this function returns True. Where it returns False, that
    happens in 2 of 100 cases for 50 weights, 4 of 1,000 for 100, 1 of 1,000 for 200 and less than 2
    of 10,000 from 500 on.
    """
    return ess <= min(0.25 * num_samples, ENOUGH)


#: Smallest effective sample size, and largest Pareto k, of weights that have a standard error.
MIN_ESS, MAX_PARETO_K = 10.0, 0.7


def weight_problem(log_weights: Tensor, ess: float, k: float) -> str | None:
    """Return why independent weights give no standard error of their mean; None if they do.

    Args:
        log_weights: log weights, shape ``(n,)``.
        ess: their effective sample size.
        k: their Pareto k.

    Example:
        >>> weight_problem(torch.zeros(100), 100.0, -math.inf) is None
        True
        >>> print(weight_problem(torch.linspace(0.0, 30.0, 100), 3.8, 2.5))
        the ESS of the weights is 3.8 of 100, below 10
    """
    n = len(log_weights)
    if n < 2:
        return "there is one weight"
    if ess < MIN_ESS:
        return f"the ESS of the weights is {ess:.3g} of {n}, below {MIN_ESS:g}"
    if too_few(ess, n):
        return f"the ESS of the weights is {ess:.3g} of {n}: a few of them dominate"
    if MAX_PARETO_K < k < math.inf:  # inf: there are too few weights to estimate k
        return f"the Pareto k of the weights is {k:.2g}, above {MAX_PARETO_K:g}"
    return None


def log_mean(log_weights: Tensor) -> LogMean:
    r"""Compute :math:`\log \frac1n \sum_i w_i`, its standard error and the effective sample size.

    The standard error is that of the delta method.

    .. math:: \mathrm{se} = \frac{\mathrm{sd}(w)}{\bar w \sqrt n}

    It is infinite where the effective sample size is at most 400 and at most a quarter of n, and
    NaN for one weight.

    Args:
        log_weights: float64, shape ``(n,)``; ``-inf`` for a weight of 0. At least one weight must
            be positive.

    Example:
        >>> import torch
        >>> found = log_mean(torch.linspace(0.0, 2.0, 100).double())
        >>> print(f"{found.value:.3f} +- {found.standard_error:.3f}, {found.ess:.0f} of 100")
        1.165 +- 0.057, 76 of 100
        >>> log_mean(
        ...     torch.linspace(0.0, 20.0, 100).double()
        ... ).standard_error  # a few weights dominate
        inf
    """
    n, largest = len(log_weights), float(log_weights.max())
    ratio = (log_weights - largest).exp()
    mean, ess = float(ratio.mean()), effective(log_weights)
    error = (
        math.nan
        if n < 2
        else math.inf
        if too_few(ess, n)
        else float(ratio.std()) / (mean * math.sqrt(n))
    )
    return LogMean(largest + math.log(mean), error, ess)


#: Number of groups of the jackknife.
GROUPS = 20


class Estimate(NamedTuple):
    """A number, its standard error, and whether it is exact, an estimate or a bound.

    Attributes:
        value: the number.
        standard_error: its standard error; 0 for an exact number; ``inf`` or NaN if the draws do
            not determine one.
        kind: "exact", "estimate", or "lower" or "upper" if its mean is below or above the true
            value.

    Example:
        >>> print(Estimate(1.0, 0.25))
        1 +- 0.25
    """

    value: float
    standard_error: float
    kind: Kind = "estimate"

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the mean of independent values ``(n,)`` and its standard error."""
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

    def __str__(self) -> str:
        if not math.isfinite(self.standard_error):
            return f"{self.value:.4g} (no standard error)"
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    r"""Estimate the squared energy distance of two samples without bias (Székely and Rizzo, 2013).

    .. math:: D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'| \ge 0

    It is 0 only for equal distributions. Pairs of a draw with itself are left out, so the estimate
    can be negative by its noise.

    Args:
        x: independent draws, shape ``(n, *event)``, n at least 40; or the draws of chains, one
            chain after the other.
        y: draws of the other distribution, shape ``(m, *event)``.

    Returns:
        the estimate, in the unit of x, and its standard error by a jackknife of 20 groups of
        neighboring draws.

    Raises:
        ValueError: if a sample has fewer than 40 draws, if the event shapes differ, or if an entry
            is not finite.

    Example:
        >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> found = energy_distance(x[:500], x[500:])
        >>> abs(found.value) < 5 * found.standard_error
        True
    """
    x, y = _checked(x, y)
    return _jackknife(x, y, torch.cdist, -1.0)


def maximum_mean_discrepancy(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Estimate:
    r"""Estimate the squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., 2012).

    .. math::

        M^2 = E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y), \qquad k(a, b) = e^{-|a - b|^2 / 2 h^2}

    Pairs of a draw with itself are left out: they would add a bias of about 2 / n.

    Args:
        x: independent draws, shape ``(n, *event)``, n at least 40; or the draws of chains, one
            chain after the other.
        y: draws of the other distribution, shape ``(m, *event)``.
        bandwidth: h, in the unit of x; None for :func:`median_distance` of the first 2,000
            draws of both samples together.

    Raises:
        ValueError: as :func:`energy_distance`; if ``bandwidth`` is not positive and finite.

    Example:
        >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> maximum_mean_discrepancy(x[:500], x[500:] + 1.0).value > 0.1
        True
    """
    x, y = _checked(x, y)
    h = median_distance(torch.cat([x[:2000], y[:2000]])) if bandwidth is None else bandwidth
    if not 0.0 < h < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got bandwidth={h}")
    return _jackknife(x, y, lambda a, b: torch.exp(-0.5 * (torch.cdist(a, b) / h).square()), 1.0)


def median_distance(x: Tensor) -> float:
    """Compute the median distance of two draws of a sample ``(n, *event)``.

    Example:
        >>> median_distance(torch.tensor([0.0, 1.0, 3.0]))
        2.0
    """
    return float(torch.pdist(x.reshape(len(x), -1)).median())


def mode_coverage_entropy(modes: Tensor, weights: Tensor) -> float:
    r"""Compute the entropy of the modes of a sample, relative to that of the true mode weights.

    .. math:: -\frac{1}{H(w)} \sum_k \hat w_k \log \hat w_k, \qquad H(w) = -\sum_k w_k \log w_k

    The measure is after Blessing et al. (2024). For equal weights it is 1 only if each mode has its
    weight, and 0 if one mode has all draws. For unequal weights it can exceed 1, if the modes of
    small weight have too many draws.

    Args:
        modes: the mode of each draw, integers, shape ``(n,)``, as ``Target.mode_of`` gives them.
        weights: true weights :math:`w_k`, shape ``(k,)``.

    Raises:
        ValueError: if there are fewer than two weights, if a weight is not positive, or if a mode
            is not an index of ``weights``.

    Example:
        >>> mode_coverage_entropy(torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.5]))
        1.0
    """
    if weights.dim() != 1 or len(weights) < 2 or not bool((weights > 0).all()):
        raise ValueError(
            f"weights must be at least two positive numbers, got shape {tuple(weights.shape)}"
        )
    if (
        modes.dim() != 1
        or not len(modes)
        or modes.is_floating_point()
        or not 0 <= int(modes.min()) <= int(modes.max()) < len(weights)
    ):
        raise ValueError(
            f"modes must be a vector of integers from 0 to {len(weights) - 1}, got shape"
            f" {tuple(modes.shape)}"
        )
    found = torch.bincount(modes, minlength=len(weights)).double() / len(modes)
    return float(
        torch.special.entr(found).sum() / torch.special.entr(weights.double() / weights.sum()).sum()
    )


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2 * GROUPS:
        raise ValueError(
            f"x and y must have one event shape and at least {2 * GROUPS} draws each, got"
            f" {tuple(x.shape)}, {tuple(y.shape)}"
        )
    for name, draws in (("x", x), ("y", y)):
        if not bool(torch.isfinite(draws).all()):
            raise ValueError(
                f"{name} must be finite, got {int((~torch.isfinite(draws)).sum())} entries that are"
                " not"
            )
    return x.detach().double().reshape(len(x), -1), y.detach().double().reshape(len(y), -1)


def _jackknife(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], sign: float
) -> Estimate:
    """Compute ``sign (mean k(X, X') + mean k(Y, Y') - 2 mean k(X, Y))`` and its error."""
    parts = x.tensor_split(GROUPS), y.tensor_split(GROUPS)

    def sums(a: int, b: int) -> tuple[Tensor, Tensor]:
        """Sum the kernel over pairs of different draws, and count the pairs, by pair of groups."""
        totals = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
        for i, left in enumerate(parts[a]):
            for j, right in enumerate(parts[b]):
                if a == b and j < i:
                    totals[i, j] = totals[j, i]
                    continue
                values = kernel(left, right)
                totals[i, j] = values.sum() - (
                    values.diagonal().sum() if a == b and i == j else 0.0
                )
        sizes = [
            torch.tensor([len(part) for part in parts[k]], dtype=torch.float64) for k in (a, b)
        ]
        return totals, torch.outer(*sizes) - (torch.diag(sizes[0]) if a == b else 0.0)

    terms = [(sums(0, 0), 1.0), (sums(1, 1), 1.0), (sums(0, 1), -2.0)]

    def value(kept: Tensor) -> float:
        return sign * sum(
            w * float(t[kept][:, kept].sum() / n[kept][:, kept].sum()) for (t, n), w in terms
        )

    everything = torch.ones(GROUPS, dtype=torch.bool)
    without = torch.tensor(
        [value(everything & (torch.arange(GROUPS) != k)) for k in range(GROUPS)],
        dtype=torch.float64,
    )
    spread = (GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()
    return Estimate(value(everything), math.sqrt(float(spread)))
