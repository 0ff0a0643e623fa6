"""Warm-up: a step size and a metric, learned in windows. Adaptation returns a new kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.covariance import PooledCovariance, PooledRows, PooledVariance
from pyroebm.kernels.adaptation.step_size import (
    DualAveraging,
    find_step_size,
    near_the_median,
    shared_mean,
)
from pyroebm.kernels.base import AnyState, HasGradient, Info, Kernel, Steps, rows

__all__ = [
    "Adaptation",
    "Warmup",
    "WarmupStep",
    "WindowAdaptation",
    "resolve",
    "warmup",
    "warmup_step",
    "windows",
]

METRICS = ("diagonal", "dense", "low_rank")
STEP_SIZES = ("grouped", "per_chain", "pooled")


@runtime_checkable
class Adaptation(Protocol):
    """What warm-up asks of an adaptation. ``memory`` is its own state between two steps, a
    NamedTuple."""

    def start(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any]:
        """A kernel to begin with, and the memory."""

    def step(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        memory: Any,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any, Info, Any]:
        """One step of a warm-up of ``num_steps``: the kernel for the next step, the state, the
        report and the memory."""


def windows(
    num_steps: int, initial: int = 15, first: int = 15, final: int = 50
) -> list[tuple[int, int]]:
    """Half-open windows ``[start, stop)`` in which a metric is learned: doubling, between two
    buffers.

    Stan's schedule, but the first window comes early: with the draws of many chains pooled, a rough
    metric is soon worth more than a long wait on the identity, where one step of NUTS may need
    hundreds of gradients.

    Example:
        >>> windows(1000)
        [(15, 30), (30, 60), (60, 120), (120, 240), (240, 950)]
        >>> windows(50)
        [(7, 25)]
    """
    # a new metric needs a new step size, and that needs some steps: too short for both
    if num_steps < 20:
        return []
    if initial + first + final > num_steps:
        initial, final = int(0.15 * num_steps), int(0.5 * num_steps)
        first = num_steps - initial - final
    found = []
    start = initial
    size = first
    while start < num_steps - final:
        stop = start + size
        # the next window would not fit: this one takes the rest
        if stop + 2 * size > num_steps - final:
            stop = num_steps - final
        found.append((start, stop))
        start, size = stop, 2 * size
    return found


class Warmup(NamedTuple):
    """The state of the adaptation between two steps: numbers, tensors and NamedTuples of them; None
    where nothing is learned."""

    tuning: DualAveraging | None
    pooled: PooledVariance | PooledCovariance | PooledRows | None
    together: Tensor | None  #: which chains share one step size, ``(chains,)``
    moved: Tensor | None  #: which chains moved in this window, ``(chains,)``
    #: sum of the acceptance rates of each chain since the step sizes were set anew, ``(chains,)``
    rates: Tensor | None
    step: int


@dataclasses.dataclass(frozen=True)
class WindowAdaptation:
    r"""Step sizes and a metric, learned in windows as in Stan (Carpenter et al., 2017) by dual
    averaging.

    During the windows each chain has a step size of its own, so that a chain that starts in a steep
    region takes steps small enough to leave it, whatever the others do. After the last window, the
    chains whose step sizes lie within a factor of 2 of the median share one, tuned to their mean
    acceptance rate; the others keep their own, and so does a chain that this one leaves at less
    than a quarter of the acceptance rate aimed at.

    The metric is learned from the draws of all chains together, so many chains learn it in few
    steps. Chains that have not moved since the window began are left out. A chain that meets a NaN
    reports acceptance 0 and stays where it was, so nothing non-finite reaches the adaptation; a
    window that does not determine a metric keeps the old one.

    Args:
        target_acceptance: acceptance rate to aim at; None takes the kernel's own.
        metric: what to learn for ``inverse_mass``: "diagonal", the variances; "dense", the
            covariance; "low_rank", from draws and gradients, a diagonal stretched along a few
            directions; None leaves it as it is. A kernel without one learns none.
        step_size: "grouped", as above; "per_chain", one for each chain throughout; "pooled", one
            for all, tuned to their mean acceptance rate, which until the last window ends counts as
            0 while a chain has yet to move; None leaves it as it is. Kernels on discrete supports
            have one for all, tuned to the mean acceptance rate.
        initial, first, final: lengths of the first buffer, of the first window and of the last
            buffer.
        rank: for "low_rank", leading directions to take of the draws, and as many of the gradients.

    Raises:
        ValueError: if a setting is not one of these; if "low_rank" is asked of a kernel whose
            states have no gradient.

    Example:
        >>> from pyroebm.kernels import HMC
        >>> from pyroebm.targets import Gaussian
        >>> energy, plan = Gaussian(torch.zeros(3)), WindowAdaptation()
        >>> generator = torch.Generator().manual_seed(0)
        >>> state = HMC().init(energy, energy.initial(16, generator))
        >>> kernel, state = warmup(HMC(), energy, state, 100, plan, generator=generator)
        >>> kernel.inverse_mass.shape
        torch.Size([3])
    """

    target_acceptance: float | None = None
    metric: Literal["diagonal", "dense", "low_rank"] | None = "diagonal"
    step_size: Literal["grouped", "per_chain", "pooled"] | None = "grouped"
    _: dataclasses.KW_ONLY
    initial: int = 15
    first: int = 15
    final: int = 50
    rank: int = 32

    def __post_init__(self) -> None:
        if self.target_acceptance is not None and not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(
                "target_acceptance must be in (0, 1), got"
                f" target_acceptance={self.target_acceptance}"
            )
        if self.metric not in (*METRICS, None, False):
            raise ValueError(
                f"metric must be one of {', '.join(map(repr, METRICS))}, or None, got"
                f" metric={self.metric!r}"
            )
        if self.step_size not in (*STEP_SIZES, None):
            raise ValueError(
                f"step_size must be one of {', '.join(map(repr, STEP_SIZES))}, or None, got"
                f" step_size={self.step_size!r}"
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got rank={self.rank}")

    def start(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """A kernel with a first guess of the step size, and the adaptation's state."""
        if kernel.target_acceptance is None:
            return kernel, Warmup(None, None, None, None, None, 0)
        pooled = self._empty(kernel, state)
        still = torch.zeros(len(state.energy), dtype=torch.bool, device=state.energy.device)
        rates = torch.zeros_like(state.energy, dtype=torch.float64)
        if self.step_size is None:
            return kernel, Warmup(None, pooled, still, still, rates, 0)
        together = ~still if self._shares(kernel) else still
        size = find_step_size(kernel, energy, state, generator, together)
        return kernel.replace(step_size=size), Warmup(
            DualAveraging.start(size), pooled, together, still, rates, 0
        )

    def step(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        memory: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any, Info, Warmup]:
        """One step of the kernel, and what is learned from it."""
        state, info = kernel.step(energy, state, generator)
        kernel, memory = self.update(kernel, energy, state, info, memory, num_steps, generator)
        return kernel, state, info, memory

    def update(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        info: Info,
        memory: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """The kernel for the next step, after step number ``memory.step`` of ``num_steps``."""
        tuning, target = memory.tuning, self.aims_at(kernel)
        if tuning is not None and target is not None:
            overdue = self._overdue(memory, info, target, num_steps)
            together = overdue if memory.together is None else memory.together
            tuning = tuning.update(
                self._rates(info.acceptance_rate.double(), together, overdue), target
            )
            kernel = kernel.replace(step_size=tuning.step_size)
        memory = memory._replace(tuning=tuning)
        return self.learn(kernel, energy, Steps.of(state, info), memory, num_steps, generator)

    def free_steps(self, kernel: Kernel[Any], memory: Warmup, num_steps: int) -> int:
        """Steps that each chain may take by itself before all meet, each with a step size of its
        own: up to the end of the window; 0 where chains share a step size.

        In these steps the dual averaging of ``memory`` is the chains' own business, and
        :meth:`learn` is told of what came of it.
        """
        if memory.moved is None:
            return num_steps - memory.step
        if memory.tuning is not None and (memory.together is None or bool(memory.together.any())):
            return 0
        ends = [stop for _, stop in self._windows(num_steps) if stop > memory.step]
        return (ends[0] if ends else num_steps) - memory.step

    def aims_at(self, kernel: Kernel[Any]) -> float | None:
        """The acceptance rate that step sizes are tuned to; None where there is none."""
        if kernel.target_acceptance is None or self.target_acceptance is None:
            return kernel.target_acceptance
        return self.target_acceptance

    def learn(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        taken: Steps,
        memory: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """What is learned from steps that were taken, none of them beyond the end of a window; the
        last step of the warm-up fixes the step sizes.

        Args:
            kernel: the kernel, with the step size that comes next.
            energy: what it moves on.
            taken: the steps from number ``memory.step`` on.
            memory: from before these steps, but for ``tuning``, which knows of them.
            num_steps: steps of the whole warm-up.
            generator: source of randomness, for a first guess of new step sizes.
        """
        tuning, pooled, together, moved, rates, step = memory
        if moved is None or rates is None or together is None:
            return kernel, memory._replace(step=step + taken.number)
        plan = self._windows(num_steps)
        # step by step: what is learned must not depend on how many come together
        for i in range(taken.number):
            rates = rates + taken.info.acceptance_rate[i]
            moved = moved | taken.info.accepted[i]
            if pooled is not None and any(start <= step < stop for start, stop in plan):
                grad: Any = None if taken.grad is None else rows(taken.grad[i])
                pooled = pooled.update(rows(taken.x[i]), grad, moved)
            step += 1
        memory = Warmup(tuning, pooled, together, moved, rates, step)
        state = taken.last
        if step in [stop for _, stop in plan]:
            kernel, memory = self._end_window(
                kernel, energy, state, memory, step == plan[-1][1], generator
            )
        if step == num_steps and memory.tuning is not None:
            kernel, memory = self._end(kernel, energy, state, memory, bool(plan), generator)
        return kernel, memory

    def _end_window(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        memory: Warmup,
        is_last: bool,
        generator: torch.Generator | None,
    ) -> tuple[Kernel[Any], Warmup]:
        """The metric of a window, and new step sizes for it."""
        tuning, pooled, together, moved, rates, step = memory
        if pooled is not None:
            before = kernel.inverse_mass if isinstance(kernel.inverse_mass, Tensor) else None
            learned = pooled.metric(before)
            kernel = kernel if learned is None else kernel.replace(inverse_mass=learned)
            pooled = self._empty(kernel, state)
        if tuning is not None and rates is not None:
            groups = self.step_size == "grouped" and not kernel.discrete
            if groups and is_last:
                together = near_the_median(torch.as_tensor(tuning.average))
            if pooled is not None or self.step_size == "grouped":
                size = find_step_size(kernel, energy, state, generator, together)
                kernel = kernel.replace(step_size=size)
                tuning = DualAveraging.start(size)
                rates = torch.zeros_like(rates)
        moved = None if moved is None else torch.zeros_like(moved)
        return kernel, Warmup(tuning, pooled, together, moved, rates, step)

    def _end(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        memory: Warmup,
        has_windows: bool,
        generator: torch.Generator | None,
    ) -> tuple[Kernel[Any], Warmup]:
        """The step sizes for the draws."""
        tuning, _, together, _, rates, _ = memory
        target = self.aims_at(kernel)
        if tuning is None or together is None or rates is None or target is None:
            return kernel, memory
        # Dual averaging begins by overshooting: an average of a few steps is worth less than a look
        # at where the chains are.
        few = tuning.steps < 15
        size = (
            0.5 * find_step_size(kernel, energy, state, generator, together)
            if few
            else tuning.average
        )
        if self.step_size == "grouped" and not kernel.discrete:
            together = together if has_windows else near_the_median(torch.as_tensor(size))
            left_behind = together & (rates < 0.25 * target * tuning.steps)
            if not few and bool(left_behind.any()):
                together = together & ~left_behind
                guess = find_step_size(kernel, energy, state, generator, together)
                size = torch.where(left_behind, 0.5 * guess, size)
        return kernel.replace(step_size=_shared(size, together)), memory._replace(together=together)

    def _windows(self, steps: int) -> list[tuple[int, int]]:
        return windows(steps, self.initial, self.first, self.final)

    def _overdue(self, memory: Warmup, info: Info, target: float, steps: int) -> Tensor:
        """The chains that should have moved since the window began, and have not: one that is
        accepted at the rate aimed at has moved in so many steps, but for a chance of 1e-4."""
        plan, step = self._windows(steps), memory.step
        seen = step + 1 - max([stop for _, stop in plan if stop <= step], default=0)
        late = (1.0 - target) ** seen < 1e-4 and (not plan or step < plan[-1][1])
        moved = info.accepted if memory.moved is None else memory.moved | info.accepted
        return ~moved & late

    def _shares(self, kernel: Kernel[Any]) -> bool:
        """Whether all chains have one step size from the start."""
        return self.step_size == "pooled" or kernel.discrete

    def _rates(self, rates: Tensor, together: Tensor, overdue: Tensor) -> float | Tensor:
        """What dual averaging is told: a number where all chains share a step size, else a rate for
        each."""
        if not bool(together.all()):
            return shared_mean(rates, together)
        return 0.0 if self.step_size == "pooled" and bool(overdue.any()) else float(rates.mean())

    def _empty(
        self, kernel: Kernel[Any], state: AnyState
    ) -> PooledVariance | PooledCovariance | PooledRows | None:
        if not self.metric or "inverse_mass" not in kernel.learned:
            return None
        q = rows(state.x)
        if self.metric != "low_rank":
            return (
                PooledVariance.start(q) if self.metric == "diagonal" else PooledCovariance.start(q)
            )
        if not isinstance(state, HasGradient):
            raise ValueError(
                "metric='low_rank' is learned from gradients, and the states of"
                f" {type(kernel).__name__} have none:"
                " choose 'diagonal' or 'dense'"
            )
        return PooledRows.start(q, self.rank)


def _shared(sizes: float | Tensor, together: Tensor) -> float | Tensor:
    """Step sizes ``(chains,)``, those of the chains in ``together`` as their geometric mean; a
    number if that is all of them."""
    if not isinstance(sizes, Tensor):
        return sizes
    shared = shared_mean(sizes.log(), together).exp()
    return float(shared[0]) if bool(together.all()) else shared


def resolve(
    kernel: Kernel[Any], adaptation: Adaptation | Literal["default"] | None
) -> Adaptation | None:
    """What ``adaptation`` means for a kernel: "default" is the kernel's own way, or a
    :class:`WindowAdaptation`."""
    if adaptation == "default":
        chosen: Adaptation = kernel.own_adaptation() or WindowAdaptation()
        return chosen
    if adaptation is not None and (
        isinstance(adaptation, type | str) or not isinstance(adaptation, Adaptation)
    ):
        raise ValueError(
            "adaptation must be a WindowAdaptation() or the like of it, or None, got"
            f" adaptation={adaptation!r}"
        )
    if isinstance(adaptation, WindowAdaptation) and kernel.target_acceptance is None:
        own = kernel.own_adaptation()
        way_out = (
            "leave adaptation out" if own is None else f'"default" is its own {type(own).__name__}'
        )
        raise ValueError(
            f"WindowAdaptation tunes a kernel by its acceptance rate, and {type(kernel).__name__}"
            f" has none to aim at: {way_out}"
        )
    return adaptation


class WarmupStep(NamedTuple):
    """What a step of a warm-up leaves: all that the next one needs."""

    kernel: Kernel[Any]  #: for the next step
    state: Any
    info: Info
    memory: Any  #: of the adaptation


def warmup_step(
    kernel: Kernel[Any],
    energy: Energy,
    state: Any,
    memory: Any,
    num_steps: int,
    adaptation: Adaptation | None,
    generator: torch.Generator | None = None,
) -> WarmupStep:
    """One step of a warm-up of ``num_steps``, for drivers that take it step by step.

    Args:
        kernel, state, memory: as the step before left them; ``memory`` is None at the first.
        energy: what the kernel moves on.
        num_steps: steps of the whole warm-up.
        adaptation: how to adapt; None leaves the kernel as it is.
        generator: source of randomness; None is torch's global one.
    """
    if adaptation is None:
        return WarmupStep(kernel, *kernel.step(energy, state, generator), None)
    if memory is None:
        kernel, memory = adaptation.start(kernel, energy, state, generator)
    return WarmupStep(*adaptation.step(kernel, energy, state, memory, num_steps, generator))


def warmup(
    kernel: Kernel[Any],
    energy: Energy,
    state: Any,
    num_steps: int,
    adaptation: Adaptation | Literal["default"] | None = "default",
    *,
    generator: torch.Generator | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> tuple[Kernel[Any], Any]:
    """Adapt a kernel while its chains move.

    Args:
        kernel: the kernel to begin with.
        energy: what it moves on.
        state: where the chains are, from ``kernel.init``.
        num_steps: steps of the warm-up, at least 0.
        adaptation: how to adapt: the kernel's own way, or a :class:`WindowAdaptation`; None leaves
            the kernel as it is.
        generator: source of randomness; None is torch's global one.
        after_step: called after each step, for progress.

    Returns:
        the adapted kernel and the state of its chains.

    Raises:
        ValueError: if the adaptation is none, or cannot adapt this kernel.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> from pyroebm.targets import DoubleWell
        >>> energy, generator = DoubleWell(), torch.Generator().manual_seed(0)
        >>> state = MALA().init(energy, energy.initial(64, generator))
        >>> kernel, state = warmup(MALA(), energy, state, 200, generator=generator)
        >>> 0.1 < kernel.step_size < 1.0
        True
    """
    chosen, memory = resolve(kernel, adaptation), None
    for _ in range(num_steps):
        kernel, state, _, memory = warmup_step(
            kernel, energy, state, memory, num_steps, chosen, generator
        )
        after_step()
    return kernel, state
