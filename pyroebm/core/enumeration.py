"""Every state of a small discrete event, in batches: sums over all of them are exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyroebm.core.rng import uniform

__all__ = ["BATCH", "all_bits", "bit_batches", "bits_of", "draw_numbers", "state_batches"]

#: States of one batch.
BATCH = 1 << 14


def all_bits(
    num_bits: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    r"""All :math:`2^n` rows of n bits, shape ``(2**n, n)``, counted up with the first bit the
    highest.

    Example:
        >>> all_bits(2)
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    return _rows(0, 1 << num_bits, num_bits, dtype, device)


def bit_batches(
    num_bits: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """The rows of :func:`all_bits` in batches of at most ``BATCH``: memory does not grow with their
    number."""
    for start in range(0, 1 << num_bits, BATCH):
        yield _rows(start, min(start + BATCH, 1 << num_bits), num_bits, dtype, device)


def state_batches(values: Tensor, num_sites: int) -> Iterator[Tensor]:
    """All states of sites that take K values ``(K, width)``, in batches ``(n, sites, width)``, the
    first site highest."""
    count = len(values) ** num_sites
    power = torch.tensor(
        [len(values) ** k for k in reversed(range(num_sites))], device=values.device
    )
    for first in range(0, count, BATCH):
        number = torch.arange(first, min(first + BATCH, count), device=values.device)
        yield values[number.unsqueeze(1) // power % len(values)]


def bits_of(number: Tensor, num_bits: int, dtype: torch.dtype) -> Tensor:
    """The rows of :func:`all_bits` with these numbers: ``(k,)`` to ``(k, n)``."""
    shift = torch.arange(num_bits - 1, -1, -1, device=number.device)
    return ((number.unsqueeze(1) >> shift) & 1).to(dtype)


def draw_numbers(
    log_p: Tensor, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """``num_samples`` numbers of states ``(n,)``, by inverse CDF over unnormalised
    log-probabilities of all of them; none of probability 0.

    Raises:
        FloatingPointError: if these are not finite: there is no such law.
    """
    cdf = log_p.double().softmax(0).cumsum(0)
    if not bool(cdf[-1].isfinite()):
        raise FloatingPointError(
            f"of {len(log_p)} states {int((~log_p.isfinite()).sum())} have an energy that is not"
            " finite"
        )
    # a number below 1 times the total stays below the total, so what is found has a probability
    # above 0
    return torch.searchsorted(
        cdf, uniform((num_samples,), generator, torch.float64, cdf.device) * cdf[-1], right=True
    )


def _rows(
    start: int, stop: int, n: int, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    return bits_of(
        torch.arange(start, stop, device=device),
        n,
        torch.get_default_dtype() if dtype is None else dtype,
    )
