"""Energies that count their calls, and runs that stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroebm import MCMC, Energy


class Stops(Energy):
    """A normal of two dimensions and unequal scales; evaluation number ``at`` of a run's steps does
    what it is told to."""

    def __init__(self, at: int = -1, act: Callable[[], None] | None = None) -> None:
        super().__init__((2,))
        self.calls, self.at, self.act = -(10**9), at, act  # until a run begins

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act() if self.act else signal.raise_signal(signal.SIGINT)
        return 0.5 * (x**2 * torch.tensor([1.0, 4.0], dtype=x.dtype)).sum(-1)


class Counted(MCMC):
    """Evaluations are counted from the first step on: starts may take any number of them."""

    def _advance(self, *arguments: Any) -> None:
        if isinstance(self._target.energy, Stops):
            self._target.energy.calls = 0
        super()._advance(*arguments)
