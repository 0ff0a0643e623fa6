"""Generators and gradients: `from lib.seeds import flat_grad, seeded`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["flat_grad", "seeded"]


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with this seed."""
    return torch.Generator().manual_seed(seed)


def flat_grad(module: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient of a loss in all parameters of a module as one vector.

    It is 0 for parameters on which the loss does not depend.
    """
    parameters = list(module.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
    )
