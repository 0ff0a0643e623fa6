"""Compiled inner loops for chains that continue while their energy is trained."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.compilation import choose_compiled, is_compiled
from pyroebm.core.energy import Energy
from pyroebm.core.rowwise import RowwiseEnergy, version
from pyroebm.kernels.base import Info, S, WrappedKernel

__all__ = ["CompiledKernel"]


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledKernel(WrappedKernel[S]):
    """Kernel with its inner loops compiled for the energy of the last call.

    For objectives with persistent chains. The draws are those of the inner kernel, up to rounding.
    Parameters may be trained in place between calls; numbers and branches of Python in the energy
    must not change. (:class:`pyroebm.MCMC` has its own option ``compile``.)

    Args:
        kernel: any kernel; one on discrete supports runs without compilation.
        num_planned_steps: planned number of steps of each chain. Compilation takes about ten
            seconds and is skipped if these steps would not save as much, by the same rule as
            ``MCMC(compile="auto")``. None compiles in any case.

    Raises:
        ValueError: if ``kernel`` is not a kernel, or ``num_planned_steps`` < 1.
        RuntimeError: at the first step, if ``num_planned_steps`` is None and the energy cannot be
            compiled; otherwise it warns.

    Example:
        >>> from pyroebm.kernels import ULA
        >>> from pyroebm.objectives import ReplayBufferCD
        >>> objective = ReplayBufferCD(
        ...     256, k=20, kernel=CompiledKernel(ULA(0.1), num_planned_steps=20 * 5000)
        ... )
        >>> objective.kernel.step_size, objective.kernel.exact
        (0.1, False)
    """

    num_planned_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_planned_steps is not None:
            check_counts({"num_planned_steps": 1}, self.num_planned_steps)
        object.__setattr__(self, "_last", _Last())

    def init(self, energy: Energy, x: Tensor, generator: torch.Generator | None = None) -> S:
        """Return the initial state of the inner kernel."""
        state: S = self.kernel.init(energy, x, generator)
        return state

    def step(
        self, energy: Energy, state: S, generator: torch.Generator | None = None
    ) -> tuple[S, Info]:
        """Run one step of the inner kernel on the compiled energy."""
        return self.kernel.step(self._view(energy, len(state.x)), state, generator)

    def steps(
        self, energy: Energy, state: S, num_steps: int, generator: torch.Generator | None = None
    ) -> tuple[S, Tensor]:
        """Run ``num_steps`` steps of the inner kernel on the compiled energy."""
        return self.kernel.steps(self._view(energy, len(state.x)), state, num_steps, generator)

    def _view(self, energy: Energy, chains: int) -> Energy:
        """Return the energy, compiled if that is worth it.

        The compiled energy of the last call is reused if energy and tensors are the same.
        """
        last: _Last = vars(self)["_last"]
        seen = (type(energy), energy._source, energy.training, _held(energy))
        if last.seen != seen:
            steps = self.num_planned_steps
            view = choose_compiled(
                energy, True if steps is None else "auto", self.kernel, chains, steps or 1
            )
            last.seen, last.view = seen, view if is_compiled(view) else None
        return last.view or energy


class _Last:
    """Energy of the last call and its compiled view, if there is one. A copy starts empty."""

    def __init__(self) -> None:
        self.seen: Any = None
        self.view: Energy | None = None

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()


def _held(energy: Energy) -> list[Any]:
    """Identify the tensors of an energy by their addresses.

    Constants of a model may be folded into the compiled graph, so their versions are included.
    """
    held: list[Any] = [
        tensor.data_ptr() for tensor in itertools.chain(energy.parameters(), energy.buffers())
    ]
    for module in energy.modules():
        if isinstance(module, RowwiseEnergy):
            held += [version(tensor) for tensor in module.constants()]
    return held
