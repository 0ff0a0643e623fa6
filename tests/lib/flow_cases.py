"""Flows with stirred parameters."""

from __future__ import annotations

import torch

from lib.reseed import problem_generator
from pyroebm.flows import Flow

F64 = torch.float64


def stirred(flow: Flow, scale: float = 0.15) -> Flow:
    generator = problem_generator(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, dtype=F64, generator=generator)
    return flow
