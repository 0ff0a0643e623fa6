"""What every objective is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyroebm.core.energy import Energy

__all__ = ["HasLosses", "Objective"]


class Objective(nn.Module):
    """Turns an energy, or a flow and an energy, into a loss. What it learns beside them is
    parameters, its chains are buffers. Numbers, words, tuples and kernels among its attributes are
    settings: they stay as they are, and a checkpoint is of one set of them.

    A subclass writes ``forward``: objectives of energies take ``(energy, batch, *,
    generator=None)``, those of flows ``(flow, energy, ...)``; both return a scalar loss and
    detached facts. One with several players is :class:`HasLosses`.

    Example:
        >>> from pyroebm.objectives import ReverseKL
        >>> issubclass(ReverseKL, Objective)
        True
    """

    #: Learning rate of Adam where :func:`pyroebm.training.fit` is given none.
    lr: float = 1e-3
    #: Its schedule where ``fit`` is given none: None, or "cosine".
    schedule: str | None = None

    def begin_step(self, step: int, num_steps: int) -> None:
        """Called before each step of a training, with its number and the number of all."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(...) -> (loss, metrics)"
        )


@runtime_checkable
class HasLosses(Protocol):
    """An objective of several players, each with a loss of its own: one of them, ``"energy"``, is
    the energy's.

    ``losses`` gives a loss by the name of each player, and the facts; ``trained`` the parameters
    that each of these losses trains, by the same names and none of them twice.
    :func:`pyroebm.training.fit` steps an optimizer for each, all from the gradients at one point.

    Example:
        >>> class Duel(Objective):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.generator = nn.Linear(1, 2)
        ...
        ...     def losses(self, energy, batch, *, generator=None):
        ...         made = self.generator(torch.randn(len(batch), 1, generator=generator))
        ...         data, model = energy(batch).mean(), energy(made).mean()
        ...         return {"energy": data - model, "generator": model}, {
        ...             "energy_data": data.detach()
        ...         }
        ...
        ...     def trained(self, energy):
        ...         return {
        ...             "energy": list(energy.parameters()),
        ...             "generator": list(self.generator.parameters()),
        ...         }
        >>> isinstance(Duel(), HasLosses)
        True
    """

    def losses(
        self, energy: Energy, batch: Any, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]: ...

    def trained(self, energy: Energy) -> Mapping[str, Sequence[nn.Parameter]]: ...
