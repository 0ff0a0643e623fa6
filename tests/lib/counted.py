"""Energies that count their calls, and runs that are interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroebm import MCMC, Energy
from pyroebm.kernels import Kernel


class Stops(Energy):
    """A normal distribution in two dimensions that acts at evaluation number ``at`` of a run."""

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
    """An energy that counts evaluations from the first step on.

    Initial states may take any number of evaluations.
    """

    def _advance(self, *arguments: Any) -> None:
        if isinstance(self._target, Stops):
            self._target.calls = 0
        super()._advance(*arguments)


def driven(kernel: Kernel, chains: int = 8, **options: object) -> MCMC:
    """Return a run with chain batches of 3, 3 and 2 chains, and a warm-up with a metric."""
    settings = {
        "num_samples": 6,
        "warmup_steps": 62,
        "seed": 5,
        "chain_batch_size": 3,
        "thinning": 2,
        **options,
    }
    return Counted(kernel, num_chains=chains, **settings)  # type: ignore[arg-type]
