"""Warm-up: a step size and a metric, learned in windows. Adaptation returns a new kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.base import AnyState, Info, Kernel, rows
from pyroebm.kernels.covariance import PooledCovariance, PooledRows, PooledVariance
from pyroebm.kernels.step_size import DualAveraging, find_step_size

__all__ = ["Adaptation", "WindowAdaptation", "Warmup", "windows"]

METRICS = ("diagonal", "dense", "low_rank")


class Adaptation(Protocol):
    """What warm-up asks of an adaptation. ``memory`` is its own state between two steps, a NamedTuple."""

    def start(
        self, kernel: Kernel[Any], energy: Energy, state: Any, generator: torch.Generator | None = None
    ) -> tuple[Kernel[Any], Any]:
        """A kernel to begin with, and the memory."""

    def step(
        self, kernel: Kernel[Any], energy: Energy, state: Any, memory: Any, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Kernel[Any], Any, Info, Any]:
        """One step of a warm-up of ``steps``: the kernel for the next step, the state, the report and the memory."""


def windows(steps: int, initial: int = 15, first: int = 15, final: int = 50) -> list[tuple[int, int]]:
    """Half-open windows ``[start, stop)`` in which a metric is learned: doubling, between two buffers.

    Stan's schedule, but the first window comes early: with the draws of many chains pooled, a rough metric is soon worth more
    than a long wait on the identity, where one step of NUTS may need hundreds of gradients.

    Example:
        >>> windows(1000)
        [(15, 30), (30, 60), (60, 120), (120, 240), (240, 950)]
    """
    if steps < 60:  # a new metric needs a new step size, and that needs some tens of steps: too short for both
        return []
    if initial + first + final > steps:
        initial, final = int(0.15 * steps), int(0.5 * steps)
        first = steps - initial - final
    found, start, size = [], initial, first
    while start < steps - final:
        stop = start + size
        if stop + 2 * size > steps - final:  # the next window would not fit: this one takes the rest
            stop = steps - final
        found.append((start, stop))
        start, size = stop, 2 * size
    return found


class Warmup(NamedTuple):
    """The adaptation's own state between two steps: numbers, tensors and NamedTuples of them; None where nothing is learned."""

    tuning: DualAveraging | None
    pooled: PooledVariance | PooledCovariance | PooledRows | None
    step: int


@dataclasses.dataclass(frozen=True)
class WindowAdaptation:
    """Step size and metric learned in windows as in Stan (Carpenter et al., 2017), from all chains together.

    Draws of all chains are pooled, so many chains learn a metric in few steps. A row that met a NaN reports acceptance 0 and
    stays where it was, so nothing non-finite reaches the adaptation; a window that does not determine a metric keeps the old one.

    Args:
        target_acceptance: acceptance rate to aim at; None takes the kernel's own.
        metric: what to learn for ``inverse_mass``: "diagonal", the variances; "dense", the covariance; "low_rank", from draws and
            gradients, a diagonal stretched along a few directions; None leaves it as it is. A kernel without one learns none.
        step_size: "pooled", one for all chains, or "per_chain", one for each.
        initial, first, final: lengths of the first buffer, of the first window and of the last buffer.
        rank: for "low_rank", leading directions to take of the draws, and as many of the gradients.

    Raises:
        ValueError: if a setting is not one of these; if "low_rank" is asked of a kernel whose states have no gradient.

    Example:
        >>> from pyroebm.kernels import HMC
        >>> from pyroebm.targets import Gaussian
        >>> energy, plan = Gaussian(torch.zeros(3)), WindowAdaptation()
        >>> generator = torch.Generator().manual_seed(0)
        >>> state = HMC().init(energy, energy.initial(16, generator))
        >>> kernel, warmup = plan.start(HMC(), energy, state, generator)
        >>> for _ in range(100):
        ...     kernel, state, info, warmup = plan.step(kernel, energy, state, warmup, 100, generator)
        >>> kernel.inverse_mass.shape
        torch.Size([3])
    """

    target_acceptance: float | None = None
    metric: Literal["diagonal", "dense", "low_rank"] | None = "diagonal"
    step_size: Literal["pooled", "per_chain"] = "pooled"
    initial: int = 15
    first: int = 15
    final: int = 50
    rank: int = 32

    def __post_init__(self) -> None:
        if self.target_acceptance is not None and not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(f"target_acceptance must be in (0, 1), got target_acceptance={self.target_acceptance}")
        if self.metric not in (*METRICS, None, False):
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, or None, got metric={self.metric!r}")
        if self.step_size not in ("pooled", "per_chain"):
            raise ValueError(f"step_size must be 'pooled' or 'per_chain', got step_size={self.step_size!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got rank={self.rank}")

    def start(
        self, kernel: Kernel[Any], energy: Energy, state: AnyState, generator: torch.Generator | None = None
    ) -> tuple[Kernel[Any], Warmup]:
        """A kernel with a first guess of the step size, and the adaptation's state."""
        if kernel.target_acceptance is None:
            return kernel, Warmup(None, None, 0)
        pooled = self._empty(kernel, state)
        size = self._first_guess(kernel, energy, state, generator)
        return kernel.replace(step_size=size), Warmup(DualAveraging.start(size), pooled, 0)

    def step(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        memory: Warmup,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any, Info, Warmup]:
        """One step of the kernel, and what is learned from it."""
        state, info = kernel.step(energy, state, generator)
        kernel, memory = self.update(kernel, energy, state, info, memory, steps, generator)
        return kernel, state, info, memory

    def update(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        info: Info,
        warmup: Warmup,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """The kernel for the next step, after step number ``warmup.step`` of ``steps``; the last one fixes the average."""
        tuning, pooled, step = warmup
        if tuning is None or kernel.target_acceptance is None:
            return kernel, warmup._replace(step=step + 1)
        target = kernel.target_acceptance if self.target_acceptance is None else self.target_acceptance
        rates = info.acceptance_rate
        tuning = tuning.update(rates.double() if self.step_size == "per_chain" else float(rates.mean()), target)
        kernel = kernel.replace(step_size=tuning.step_size)
        if pooled is not None:
            plan = windows(steps, self.initial, self.first, self.final)
            if any(start <= step < stop for start, stop in plan):
                grad: Any = rows(state.grad) if hasattr(state, "grad") else None
                pooled = pooled.update(rows(state.x), grad)
            if any(step + 1 == stop for _, stop in plan):
                learned = pooled.metric()
                kernel = kernel if learned is None else kernel.replace(inverse_mass=learned)
                size = self._first_guess(kernel, energy, state, generator)
                kernel, tuning, pooled = kernel.replace(step_size=size), DualAveraging.start(size), self._empty(kernel, state)
        if step + 1 == steps:
            # Dual averaging begins by overshooting: an average of a few steps is worth less than a look at where the chains are.
            few = tuning.steps < 15
            size = 0.5 * self._first_guess(kernel, energy, state, generator) if few else tuning.average
            kernel = kernel.replace(step_size=size)
        return kernel, Warmup(tuning, pooled, step + 1)

    def _first_guess(
        self, kernel: Kernel[Any], energy: Energy, state: AnyState, generator: torch.Generator | None
    ) -> float | Tensor:
        return find_step_size(kernel, energy, state, generator, per_chain=self.step_size == "per_chain")

    def _empty(self, kernel: Kernel[Any], state: AnyState) -> PooledVariance | PooledCovariance | PooledRows | None:
        if not self.metric or not hasattr(kernel, "inverse_mass"):
            return None
        q = rows(state.x)
        if self.metric != "low_rank":
            return PooledVariance.start(q) if self.metric == "diagonal" else PooledCovariance.start(q)
        if not hasattr(state, "grad"):
            raise ValueError(
                f"metric='low_rank' is learned from gradients, and the states of {type(kernel).__name__} have none:"
                " choose 'diagonal' or 'dense'"
            )
        return PooledRows.start(q, self.rank)


def resolve(kernel: Kernel[Any], adaptation: Adaptation | Literal["default"] | None) -> Adaptation | None:
    """What ``adaptation`` means for a kernel: "default" is the kernel's own way, or a :class:`WindowAdaptation`."""
    if adaptation == "default":
        chosen: Adaptation = kernel.own_adaptation() or WindowAdaptation()
        return chosen
    if adaptation is not None and (isinstance(adaptation, type | str) or not hasattr(adaptation, "start")):
        raise ValueError(f"adaptation must be a WindowAdaptation() or the like of it, or None, got adaptation={adaptation!r}")
    if isinstance(adaptation, WindowAdaptation) and kernel.target_acceptance is None:
        own = kernel.own_adaptation()
        way_out = "leave adaptation out" if own is None else f'"default" is its own {type(own).__name__}'
        raise ValueError(
            f"WindowAdaptation tunes a kernel by its acceptance rate, and {type(kernel).__name__} has none to aim at: {way_out}"
        )
    return adaptation
