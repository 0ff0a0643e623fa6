"""States of parallel tempering."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm import (
    Energy,
    ParallelTempering,
)
from pyroebm.kernels import TemperedState
from pyroebm.kernels.tempering import by_chain


def state_at(
    kernel: ParallelTempering, energy: Energy, x: Tensor, generator: torch.Generator
) -> TemperedState:
    """The state with replicas at ``x`` of shape ``(chains, R, *event)``."""
    state = kernel.init(energy, x[:, 0], generator)
    inner = kernel.kernel.init(kernel.path(energy, len(x)), x.flatten(0, 1), generator)
    inner = by_chain(inner, len(x))
    return state._replace(x=x[:, 0], energy=inner.energy[:, 0], inner=inner)
