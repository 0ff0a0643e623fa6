"""Criteria of reference draws (those of posteriordb), and their storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.files import write_arrays
from pyroebm.core.statistics import ess_bulk, ess_tail, mcse_mean, r_hat
from pyroebm.core.supports import is_discrete
from pyroebm.partition import expectation
from pyroebm.zoo.cards import Check

__all__ = ["check_draws", "compare_moments", "write_draws"]

MAX_R_HAT = 1.01
MAX_AUTOCORRELATION = 0.05
#: Smallest bulk and tail effective sample size, as a fraction of the number of draws.
MIN_ESS_FRACTION = 0.8
#: Largest deviation of a moment from quadrature, in standard errors.
MAX_DEVIATION = 5.0


def _lag_one(x: np.ndarray) -> np.ndarray:
    """Return the autocorrelation of lag 1 of each entry, averaged over the chains."""
    centered = x - x.mean((0, 1))
    products = (centered[:, 1:] * centered[:, :-1]).mean((0, 1))
    found: np.ndarray = products / (centered**2).mean((0, 1))
    return found


def check_draws(energy: Energy, draws: Tensor, num_divergences: int = 0) -> tuple[Check, ...]:
    """Apply the criteria to all entries that vary, and to the energy of the draws.

    Args:
        energy: the energy.
        draws: shape ``(chains, draws, *event)``.
        num_divergences: number of divergent draws.

    Returns:
        R-hat, autocorrelation of lag 1, effective sample sizes, divergences.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> energy = Gaussian(torch.zeros(2, dtype=torch.float64))
        >>> draws = energy.sample(4000, torch.Generator().manual_seed(0)).reshape(4, 1000, 2)
        >>> [check.passed for check in check_draws(energy, draws)]
        [True, True, True, True]
    """
    chains, num_draws = draws.shape[:2]
    with torch.no_grad():
        energies = energy(draws.to(energy.dtype))
    x = torch.cat([draws.reshape(chains, num_draws, -1), energies[..., None].to(draws.dtype)], -1)
    array = x.double().numpy()
    array = array[..., array.std((0, 1)) > 0.0]
    found = {
        "largest R-hat": (float(r_hat(array).max()), MAX_R_HAT),
        "largest autocorrelation of lag 1": (
            float(np.abs(_lag_one(array)).max()),
            MAX_AUTOCORRELATION,
        ),
    }
    smallest = min(float(ess_bulk(array).min()), float(_tails(array).min()))
    least = MIN_ESS_FRACTION * chains * num_draws
    return (
        *(
            Check(name=name, rule=f"< {limit:g}", value=value, passed=value < limit)
            for name, (value, limit) in found.items()
        ),
        Check(
            name=f"smallest ESS, bulk or tail, of {chains * num_draws} draws",
            rule=f"> {least:g}",
            value=smallest,
            passed=smallest > least,
        ),
        Check(
            name="divergences",
            rule="= 0",
            value=float(num_divergences),
            passed=num_divergences == 0,
        ),
    )


def _tails(x: np.ndarray) -> np.ndarray:
    """Return tail ESS of the entries with many values; quantiles of binary ones do not vary."""
    many = [k for k in range(x.shape[-1]) if len(np.unique(x[..., k])) > 10]
    return ess_tail(x[..., many])


def compare_moments(energy: Energy, draws: Tensor) -> Check:
    """Compare means and mean squares of the draws with quadrature, in one or two dimensions."""

    def moments(x: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1)
        return torch.cat([flat, flat.square()], -1)

    truth, _ = expectation(energy, moments, tolerance=1e-5, progress=False)
    chains, num_draws = draws.shape[:2]
    values = moments(draws.flatten(0, 1)).reshape(chains, num_draws, -1).double()
    z = (values.mean((0, 1)) - truth).abs() / torch.from_numpy(mcse_mean(values))
    largest = float(z.max())
    return Check(
        name="largest deviation of means and mean squares from quadrature, in standard errors",
        rule=f"< {MAX_DEVIATION:g}",
        value=largest,
        passed=largest < MAX_DEVIATION,
    )


def write_draws(energy: Energy, draws: Tensor, path: Path) -> None:
    """Store draws ``(chains, draws, *event)``: discrete ones as int8, others in float32."""
    dtype = torch.int8 if is_discrete(energy.support) else torch.float32
    stored = draws.to(dtype)
    if not torch.allclose(stored.to(draws.dtype), draws, rtol=1e-6, atol=1e-6):
        raise ValueError(f"draws must be representable in {dtype}")
    write_arrays(path, {"draws": stored.numpy()})
