"""Energies that count their calls, and runs that stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroebm import MCMC, Energy
from pyroebm.kernels import Kernel


class Stops(Energy):
    """A normal of two dimensions and unequal scales; evaluation number ``at`` of a run's steps does
    what it is told to."""

    def __init__(self, at: int = -1, act: Callable[[], None] | None = None) -> None:
        super().__init__((2,))
        # until a run begins
        self.calls = -(10**9)
        self.at = at
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act() if self.act else signal.raise_signal(signal.SIGINT)
        return 0.5 * (x**2 * torch.tensor([1.0, 4.0], dtype=x.dtype)).sum(-1)


class Counted(MCMC):
    """Evaluations are counted from the first step on: starts may take any number of them."""

    def _advance(self, *arguments: Any) -> None:
        if isinstance(self._target, Stops):
            self._target.calls = 0
        super()._advance(*arguments)


def driven(kernel: Kernel, chains: int = 8, **options: object) -> MCMC:
    """Blocks of 3, 3 and 2 chains; a warm-up long enough for a metric."""
    settings = {
        "num_samples": 6,
        "warmup_steps": 62,
        "seed": 5,
        "chain_batch_size": 3,
        "thinning": 2,
        **options,
    }
    return Counted(kernel, num_chains=chains, **settings)  # type: ignore[arg-type]
