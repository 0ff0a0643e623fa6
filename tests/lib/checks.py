"""Comparisons with a measured standard error: `from lib.checks import within_se`."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["mean_and_se", "within_se"]


def _array(value: Any) -> np.ndarray:
    return np.asarray(
        value.detach().cpu().numpy() if hasattr(value, "detach") else value, dtype=np.float64
    )


def within_se(estimate: Any, truth: Any, se: Any, k: float = 5.0, what: str = "estimate") -> None:
    """Raise AssertionError unless ``|estimate - truth| <= k * se`` everywhere.

    The arguments are numbers, arrays or tensors of one shape. A NaN fails, and so does a standard
    error that is not positive and finite, with which the comparison would have no meaning.

    Example:
        >>> within_se([1.0, 2.1], [1.0, 2.0], 0.03)
        >>> within_se(1.0, 2.0, 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: estimate 1 is not within 5 standard errors of 2: off by -1 = -10 ...
    """
    e = _array(estimate)
    t = _array(truth)
    s = _array(se)
    if t.ndim and e.shape != t.shape:
        raise AssertionError(
            f"{what} has shape {e.shape}, the truth has shape {t.shape}: they would broadcast"
        )
    if s.ndim and e.shape != s.shape:
        raise AssertionError(
            f"{what} has shape {e.shape}, its standard error has shape {s.shape}: they would"
            " broadcast"
        )
    if not e.size:
        raise AssertionError(f"{what} is empty: nothing was compared")
    t, s = np.broadcast_to(t, e.shape), np.broadcast_to(s, e.shape)
    if not (np.isfinite(s) & (s > 0)).all():
        raise AssertionError(
            f"the standard error of {what} must be positive and finite, got {s} (estimate {e},"
            f" truth {t})"
        )
    with np.errstate(invalid="ignore"):
        off = e - t
        ratio = off / s
        good = np.abs(ratio) <= k  # False for a NaN
    if good.all():
        return
    bad = np.argwhere(~good)
    # the worst entry: a NaN before any number
    worst = tuple(max(bad, key=lambda i: np.nan_to_num(abs(ratio[tuple(i)]), nan=np.inf)))
    at = f"{what}[{', '.join(map(str, worst))}]" if e.ndim else what
    more = (
        f"; {len(bad)} of {e.size} entries are off: estimates {e}, truths {t}, standard errors {s}"
        if e.ndim
        else ""
    )
    raise AssertionError(
        f"{at} {e[worst]:.8g} is not within {k:g} standard errors of {t[worst]:.8g}: off by"
        f" {off[worst]:.4g} = {ratio[worst]:.4g} standard errors (se {s[worst]:.4g}){more}"
    )


def mean_and_se(draws: Any, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of independent draws along an axis and its standard error.

    For draws of a chain divide by the ESS instead.

    Example:
        >>> mean, se = mean_and_se([1.0, 2.0, 3.0])
        >>> float(mean), float(se)
        (2.0, 0.5773502691896258)
    """
    x = _array(draws)
    return x.mean(axis), x.std(axis, ddof=1) / np.sqrt(x.shape[axis])
