"""Draws of numbers by weight: their frequencies, and the last uniform number there is."""

from __future__ import annotations

import pytest
import torch
from lib.checks import within_se
from torch import Tensor

from pyroebm.core import enumeration
from pyroebm.core.enumeration import draw_numbers

LOG_P = torch.tensor([-torch.inf, 0.3, -1.0, 2.0, -torch.inf, -torch.inf], dtype=torch.float64)


def test_numbers_come_in_proportion() -> None:
    n, p = 50_000, LOG_P.softmax(0)
    found = draw_numbers(LOG_P, n, torch.Generator().manual_seed(0)).bincount(minlength=len(p)) / n
    seen = p > 0
    within_se(found[seen], p[seen], (p * (1 - p) / n).sqrt()[seen])
    assert not found[~seen].any()


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_have_numbers_too(
    u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product that rounds up to the total is no number past the end, nor one without
    probability."""

    def at_the_end(shape: tuple[int, ...], *_: object) -> Tensor:
        return torch.full(shape, u, dtype=torch.float64)

    monkeypatch.setattr(enumeration, "uniform", at_the_end)
    for seed in range(200):  # totals that round to above and below 1
        log_p = LOG_P.clone()
        log_p[1:4] = torch.randn(
            3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        assert draw_numbers(log_p, 2).tolist() == ([1, 1] if u == 0.0 else [3, 3])


def test_no_distribution_is_said() -> None:
    with pytest.raises(FloatingPointError, match="of 2 states 1 have an energy that is not finite"):
        draw_numbers(torch.tensor([0.0, torch.nan]), 3)
