"""What every objective is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Objective"]


class Objective(nn.Module):
    """Turns an energy, or a flow and an energy, into a loss. What it learns beside them is parameters, its chains are buffers.
    Numbers and words among its attributes are settings: they stay as they are, and a checkpoint is of one set of them.

    A subclass writes ``forward``: objectives of energies take ``(energy, batch, *, generator=None)``, those of flows
    ``(flow, energy, ...)``; both return a scalar loss and detached facts.

    Example:
        >>> from pyroebm.objectives import ReverseKL
        >>> issubclass(ReverseKL, Objective)
        True
    """

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its facts."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(...) -> (loss, facts)")
