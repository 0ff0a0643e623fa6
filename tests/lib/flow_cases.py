"""Flows with random parameters (new ones are the identity), and noise."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from lib.reseed import problem_generator
from pyroebm.flows import NICE

F64 = torch.float64
M = TypeVar("M", bound=nn.Module)


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Return standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def stirred(module: M, seed: int = 5, scale: float = 0.3) -> M:
    """Return the module with every parameter changed at random."""
    generator = problem_generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            move = torch.randn(parameter.shape, dtype=F64, generator=generator)
            parameter += scale * move.to(parameter.dtype)
    return module


def normal_flow(mean: float = 0.3, deviation: float = 1.4) -> NICE:
    """Return a flow that is a normal distribution in one dimension."""
    flow = NICE(1)
    with torch.no_grad():
        flow.linear.log_diagonal.fill_(math.log(deviation))
        flow.transform.parts[-1].offset.fill_(mean)
    return flow
