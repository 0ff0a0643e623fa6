"""Flows away from the identity that fresh ones are, and their noise."""

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
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def stirred(module: M, seed: int = 5, scale: float = 0.3) -> M:
    """The module with every parameter moved at random."""
    generator = problem_generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            move = torch.randn(parameter.shape, dtype=F64, generator=generator)
            parameter += scale * move.to(parameter.dtype)
    return module


def normal_flow(mean: float = 0.3, deviation: float = 1.4) -> NICE:
    """A flow that is a normal distribution of one dimension."""
    flow = NICE(1)
    with torch.no_grad():
        flow.linear.log_diagonal.fill_(math.log(deviation))
        flow.transform.parts[-1].offset.fill_(mean)
    return flow
