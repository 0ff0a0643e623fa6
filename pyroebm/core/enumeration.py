"""Enumeration of all states of a small discrete event, in batches, for exact sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyroebm.core.rng import uniform

__all__ = ["BATCH", "all_bits", "bit_batches", "bits_of", "draw_numbers", "state_batches"]

#: Maximum number of states of one batch.
BATCH = 1 << 14


def all_bits(
    num_bits: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    r"""Return all :math:`2^n` states of n binary units, shape ``(2**n, n)``.

    They are in increasing order as binary numbers, with the first unit as the most significant bit.

    Args:
        num_bits: n.
        dtype: floating-point type of the states; None for torch's default.
        device: device of the states.

    Example:
        >>> all_bits(2)
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    return _states(0, 1 << num_bits, num_bits, dtype, device)


def bit_batches(
    num_bits: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield the states of :func:`all_bits` in batches of at most ``BATCH``, to limit memory."""
    for start in range(0, 1 << num_bits, BATCH):
        yield _states(start, min(start + BATCH, 1 << num_bits), num_bits, dtype, device)


def state_batches(values: Tensor, num_sites: int) -> Iterator[Tensor]:
    """Yield all states of sites with K values each, in batches ``(n, sites, width)``.

    The first site changes slowest.

    Args:
        values: values of one site, shape ``(K, width)``.
        num_sites: number of sites.
    """
    count = len(values) ** num_sites
    power = torch.tensor(
        [len(values) ** k for k in reversed(range(num_sites))], device=values.device
    )
    for first in range(0, count, BATCH):
        number = torch.arange(first, min(first + BATCH, count), device=values.device)
        yield values[number.unsqueeze(1) // power % len(values)]


def bits_of(number: Tensor, num_bits: int, dtype: torch.dtype) -> Tensor:
    """Return the states of :func:`all_bits` with the given numbers: ``(k,)`` to ``(k, n)``."""
    shift = torch.arange(num_bits - 1, -1, -1, device=number.device)
    return ((number.unsqueeze(1) >> shift) & 1).to(dtype)


def draw_numbers(
    log_p: Tensor, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the numbers of states by inverse CDF from the log-probabilities of all states.

    States of probability 0 are never drawn.

    Args:
        log_p: unnormalized log-probabilities, shape ``(num_states,)``.
        num_samples: n, the number of draws.
        generator: source of randomness; None for torch's default one.

    Returns:
        numbers of states, shape ``(n,)``, int64.

    Raises:
        FloatingPointError: if some log-probabilities are NaN or +inf, or all are -inf.
    """
    cdf = log_p.double().softmax(0).cumsum(0)
    if not bool(cdf[-1].isfinite()):
        raise FloatingPointError(
            f"of {len(log_p)} states {int((~log_p.isfinite()).sum())} have an energy that is not"
            " finite"
        )
    # a uniform number below 1 times the total is below the total, so the state that is found has a
    # positive probability
    return torch.searchsorted(
        cdf, uniform((num_samples,), generator, torch.float64, cdf.device) * cdf[-1], right=True
    )


def _states(
    start: int, stop: int, n: int, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    return bits_of(
        torch.arange(start, stop, device=device),
        n,
        torch.get_default_dtype() if dtype is None else dtype,
    )
