"""Two separated modes, and states of parallel tempering with given replicas."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm import Energy, ParallelTempering
from pyroebm.kernels import TemperedState
from pyroebm.kernels.tempering import by_chain
from pyroebm.targets import GaussianMixture


def separated() -> GaussianMixture:
    """Return two modes ten standard deviations apart, with weights .8 and .2."""
    means = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    return GaussianMixture(means, weights=[0.8, 0.2])


def state_at(
    kernel: ParallelTempering, energy: Energy, x: Tensor, generator: torch.Generator
) -> TemperedState:
    """Return the state with replicas at ``x``, shape ``(chains, R, *event)``."""
    state = kernel.init(energy, x[:, 0], generator)
    inner = kernel.kernel.init(kernel.path(energy, len(x)), x.flatten(0, 1), generator)
    inner = by_chain(inner, len(x))
    return state._replace(x=x[:, 0], energy=inner.energy[:, 0], inner=inner)
