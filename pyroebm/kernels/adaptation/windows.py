"""Windowed warm-up as in Stan: adaptation of step sizes and the metric. It returns a new kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.covariance import PooledCovariance, PooledDraws, PooledVariance
from pyroebm.kernels.adaptation.step_size import (
    DualAveraging,
    find_step_size,
    near_the_median,
    shared_mean,
)
from pyroebm.kernels.base import AnyState, HasGradient, Info, Kernel, Steps, rows
from pyroebm.kernels.metric import Metric, scaled

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

#: Number of steps of the initial buffer.
INITIAL = 15
#: Number of steps of the first window. It is earlier than Stan's: the draws of many chains soon
#: determine a rough metric, and with the identity one step of NUTS may need hundreds of gradients.
FIRST = 15
#: Number of steps of the final buffer.
FINAL = 50
#: For a low-rank metric, the number of leading directions of the draws, and of the gradients.
RANK = 32


@runtime_checkable
class Adaptation(Protocol):
    """Protocol of an adaptation.

    ``adaptation_state`` is what it keeps between two steps, a NamedTuple.
    """

    def start(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any]:
        """Return an initial kernel and the initial adaptation state."""

    def step(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: Any,
        adaptation_state: Any,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any, Info, Any]:
        """Run one step of a warm-up of ``num_steps``.

        Returns:
            the kernel for the next step, the state, the report and the adaptation state.
        """


def windows(num_steps: int) -> list[tuple[int, int]]:
    """Return the half-open windows ``[start, stop)`` in which a metric is learned.

    The lengths double, between an initial and a final buffer, as in Stan.

    Args:
        num_steps: number of warm-up steps.

    Example:
        >>> windows(1000)
        [(15, 30), (30, 60), (60, 120), (120, 240), (240, 950)]
        >>> windows(50)
        [(7, 25)]
    """
    # Too short: a new metric needs a new step size, which takes some steps to adapt.
    if num_steps < 20:
        return []
    initial, final = INITIAL, FINAL
    size = FIRST
    if initial + size + final > num_steps:
        initial, final = int(0.15 * num_steps), int(0.5 * num_steps)
        size = num_steps - initial - final
    found = []
    start = initial
    while start < num_steps - final:
        stop = start + size
        # The next window would not fit, so this one extends to the final buffer.
        if stop + 2 * size > num_steps - final:
            stop = num_steps - final
        found.append((start, stop))
        start, size = stop, 2 * size
    return found


class Warmup(NamedTuple):
    """State of the adaptation between two steps.

    It consists of numbers, tensors and NamedTuples of them; None if nothing is adapted.
    """

    tuning: DualAveraging | None
    pooled: PooledVariance | PooledCovariance | PooledDraws | None
    together: Tensor | None  #: which chains share one step size, ``(chains,)``
    moved: Tensor | None  #: which chains moved in this window, ``(chains,)``
    #: sum of the acceptance rates of each chain since the last search of a step size, ``(chains,)``
    rates: Tensor | None
    step: int


@dataclasses.dataclass(frozen=True)
class WindowAdaptation:
    r"""Adaptation of step sizes by dual averaging and of a metric in windows, as in Stan.

    The schedule is that of Carpenter et al. (2017).

    During the windows each chain has its own step size, so that a chain that starts in a steep
    region can take steps small enough to leave it. After the last window the chains whose step
    sizes are within a factor of 2 of the median share one, adapted to their mean acceptance rate.
    The others keep their own. So does a chain whose acceptance rate at the shared step size is
    below a quarter of the target.

    The metric is learned from the draws of all chains, so many chains learn it in few steps. Chains
    that have not moved since the window began are left out. A chain with a non-finite energy or
    gradient keeps its previous state and reports acceptance 0, so nothing non-finite enters the
    adaptation. A window that does not determine a metric keeps the previous one, except that with
    a fixed step size the variances are divided by 1000 where no chain moved.

    Args:
        target_acceptance: acceptance rate to aim at; None uses the kernel's own.
        metric: what to learn for ``inverse_mass``: "diagonal", the variances; "dense", the
            covariance; "low_rank", a diagonal with a few corrected directions, from draws and
            gradients; None does not adapt it. Not used by a kernel without a metric.
        step_size: "grouped", as above; "per_chain", one for each chain throughout; "pooled", one
            for all, adapted to their mean acceptance rate, which counts as 0 until the end of the
            last window while a chain has not moved; None does not adapt it. Kernels on discrete
            supports have one for all, adapted to the mean acceptance rate.
        blocks: for "dense", tuples of entries of the flattened event. Covariances are learned
            within each tuple, and variances of the entries that are in none; None is one block of
            all entries.

    Raises:
        ValueError: if a setting is not one of these, if ``metric="low_rank"`` and the states of
            the kernel have no gradient, or if ``blocks`` does not fit the event.

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
    blocks: tuple[tuple[int, ...], ...] | None = None

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
        if self.blocks is not None:
            entries = [entry for block in self.blocks for entry in block]
            if self.metric != "dense" or len(set(entries)) < len(entries):
                raise ValueError(
                    'blocks must hold each entry at most once, with metric="dense", got'
                    f" blocks={self.blocks} and metric={self.metric!r}"
                )

    def start(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """Return a kernel with an initial step size, and the initial adaptation state."""
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
        adaptation_state: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Any, Info, Warmup]:
        """Run one step of the kernel and update the adaptation."""
        state, info = kernel.step(energy, state, generator)
        kernel, adaptation_state = self.update(
            kernel, energy, state, info, adaptation_state, num_steps, generator
        )
        return kernel, state, info, adaptation_state

    def update(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        info: Info,
        adaptation_state: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """Return the kernel for the next step, after step ``adaptation_state.step``."""
        tuning, target = adaptation_state.tuning, self.aims_at(kernel)
        if tuning is not None and target is not None:
            overdue = self._overdue(adaptation_state, info, target, num_steps)
            together = overdue if adaptation_state.together is None else adaptation_state.together
            tuning = tuning.update(
                self._rates(info.acceptance_rate.double(), together, overdue), target
            )
            kernel = kernel.replace(step_size=tuning.step_size)
        adaptation_state = adaptation_state._replace(tuning=tuning)
        return self.learn(
            kernel, energy, Steps.of(state, info), adaptation_state, num_steps, generator
        )

    def free_steps(self, kernel: Kernel[Any], adaptation_state: Warmup, num_steps: int) -> int:
        """Return how many steps each chain may take asynchronously, with its own step size.

        The steps end with the window; the number is 0 if chains share a step size. During these
        steps the driver runs the dual averaging of each chain, and :meth:`learn` receives the
        result.
        """
        if adaptation_state.moved is None:
            return num_steps - adaptation_state.step
        if adaptation_state.tuning is not None and (
            adaptation_state.together is None or bool(adaptation_state.together.any())
        ):
            return 0
        ends = [stop for _, stop in windows(num_steps) if stop > adaptation_state.step]
        return (ends[0] if ends else num_steps) - adaptation_state.step

    def aims_at(self, kernel: Kernel[Any]) -> float | None:
        """Return the acceptance rate that step sizes are adapted to; None if there is none."""
        if kernel.target_acceptance is None or self.target_acceptance is None:
            return kernel.target_acceptance
        return self.target_acceptance

    def learn(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        taken: Steps,
        adaptation_state: Warmup,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Kernel[Any], Warmup]:
        """Update the adaptation with steps that were taken.

        None of them is beyond the end of a window. The last step of the warm-up sets the step sizes
        for the draws.

        Args:
            kernel: the kernel, with the step size of the next step.
            energy: the target.
            taken: the steps from number ``adaptation_state.step`` on.
            adaptation_state: the state before these steps, except for ``tuning``, which includes
                them.
            num_steps: number of steps of the whole warm-up.
            generator: source of randomness, for the initial search of new step sizes.

        Returns:
            the kernel for the next step and the adaptation state.
        """
        tuning, pooled, together, moved, rates, step = adaptation_state
        if moved is None or rates is None or together is None:
            return kernel, adaptation_state._replace(step=step + taken.number)
        plan = windows(num_steps)
        # Update step by step: the result must not depend on how many steps arrive at once.
        for i in range(taken.number):
            rates = rates + taken.info.acceptance_rate[i]
            moved = moved | taken.info.accepted[i]
            if pooled is not None and any(start <= step < stop for start, stop in plan):
                grad: Any = None if taken.grad is None else rows(taken.grad[i])
                pooled = pooled.update(rows(taken.x[i]), grad, moved)
            step += 1
        adaptation_state = Warmup(tuning, pooled, together, moved, rates, step)
        state = taken.last
        if step in [stop for _, stop in plan]:
            kernel, adaptation_state = self._end_window(
                kernel, energy, state, adaptation_state, step == plan[-1][1], generator
            )
        if step == num_steps and adaptation_state.tuning is not None:
            kernel, adaptation_state = self._end(
                kernel, energy, state, adaptation_state, bool(plan), generator
            )
        return kernel, adaptation_state

    def _end_window(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        state: AnyState,
        adaptation_state: Warmup,
        is_last: bool,
        generator: torch.Generator | None,
    ) -> tuple[Kernel[Any], Warmup]:
        """Set the metric of a window and search for new step sizes."""
        tuning, pooled, together, moved, rates, step = adaptation_state
        if pooled is not None:
            before = kernel.inverse_mass if isinstance(kernel.inverse_mass, Tensor) else None
            learned: Tensor | Metric | None = pooled.metric(before)
            if tuning is None and moved is not None and not bool(moved.any()):
                # Only the metric can make the steps shorter.
                learned = scaled(kernel.inverse_mass, 1e-3, rows(state.x))
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
        adaptation_state: Warmup,
        has_windows: bool,
        generator: torch.Generator | None,
    ) -> tuple[Kernel[Any], Warmup]:
        """Set the step sizes for the draws."""
        tuning, _, together, _, rates, _ = adaptation_state
        target = self.aims_at(kernel)
        if tuning is None or together is None or rates is None or target is None:
            return kernel, adaptation_state
        # Dual averaging overshoots at first: after a few steps a new search is more reliable than
        # the average.
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
        kernel = kernel.replace(step_size=_shared(size, together))
        return kernel, adaptation_state._replace(together=together)

    def _overdue(self, adaptation_state: Warmup, info: Info, target: float, steps: int) -> Tensor:
        """Return the chains that have not moved since the window began and should have.

        A chain accepted at the target rate has moved in so many steps with probability 1 - 1e-4.
        """
        plan, step = windows(steps), adaptation_state.step
        seen = step + 1 - max([stop for _, stop in plan if stop <= step], default=0)
        late = (1.0 - target) ** seen < 1e-4 and (not plan or step < plan[-1][1])
        moved = (
            info.accepted
            if adaptation_state.moved is None
            else adaptation_state.moved | info.accepted
        )
        return ~moved & late

    def _shares(self, kernel: Kernel[Any]) -> bool:
        """Whether all chains share one step size from the start."""
        return self.step_size == "pooled" or kernel.discrete

    def _rates(self, rates: Tensor, together: Tensor, overdue: Tensor) -> float | Tensor:
        """Return the observation for dual averaging.

        A number if all chains share a step size, else a rate for each.
        """
        if not bool(together.all()):
            return shared_mean(rates, together)
        return 0.0 if self.step_size == "pooled" and bool(overdue.any()) else float(rates.mean())

    def _empty(
        self, kernel: Kernel[Any], state: AnyState
    ) -> PooledVariance | PooledCovariance | PooledDraws | None:
        if not self.metric or "inverse_mass" not in kernel.learned:
            return None
        q = rows(state.x)
        if self.metric != "low_rank":
            return (
                PooledVariance.start(q)
                if self.metric == "diagonal"
                else PooledCovariance.start(q, self.blocks)
            )
        if not isinstance(state, HasGradient):
            raise ValueError(
                "metric='low_rank' is learned from gradients, but the states of"
                f" {type(kernel).__name__} have none: use metric='diagonal' or metric='dense'"
            )
        return PooledDraws.start(q, RANK)


def _shared(sizes: float | Tensor, together: Tensor) -> float | Tensor:
    """Replace step sizes ``(chains,)`` of the chains in ``together`` by their geometric mean.

    Returns:
        a number if these are all chains, else a tensor ``(chains,)``.
    """
    if not isinstance(sizes, Tensor):
        return sizes
    shared = shared_mean(sizes.log(), together).exp()
    return float(shared[0]) if bool(together.all()) else shared


def resolve(
    kernel: Kernel[Any], adaptation: Adaptation | Literal["default"] | None
) -> Adaptation | None:
    """Return the adaptation that ``adaptation`` denotes for a kernel.

    "default" is the kernel's own adaptation, or a :class:`WindowAdaptation`.
    """
    if adaptation == "default":
        chosen: Adaptation = kernel.own_adaptation() or WindowAdaptation()
        return chosen
    if adaptation is not None and (
        isinstance(adaptation, type | str) or not isinstance(adaptation, Adaptation)
    ):
        raise ValueError(
            'adaptation must be "default", None, or an instance with the methods of Adaptation,'
            f" such as WindowAdaptation(), got adaptation={adaptation!r}"
        )
    if isinstance(adaptation, WindowAdaptation) and kernel.target_acceptance is None:
        own = kernel.own_adaptation()
        advice = (
            "leave adaptation out"
            if own is None
            else f'use adaptation="default", its own {type(own).__name__}'
        )
        raise ValueError(
            "WindowAdaptation requires a kernel with a target acceptance rate, and"
            f" {type(kernel).__name__} has none: {advice}"
        )
    return adaptation


class WarmupStep(NamedTuple):
    """Result of one warm-up step: the input of the next one."""

    kernel: Kernel[Any]  #: for the next step
    state: Any
    info: Info
    adaptation_state: Any


def warmup_step(
    kernel: Kernel[Any],
    energy: Energy,
    state: Any,
    adaptation_state: Any,
    num_steps: int,
    adaptation: Adaptation | None,
    generator: torch.Generator | None = None,
) -> WarmupStep:
    """Run one step of a warm-up of ``num_steps``, for drivers that run it step by step.

    Args:
        kernel: the kernel as the previous step returned it.
        energy: the target.
        state: the state as the previous step returned it.
        adaptation_state: the adaptation state as the previous step returned it; None at the first.
        num_steps: number of steps of the whole warm-up.
        adaptation: the adaptation; None does not change the kernel.
        generator: source of randomness; None is torch's default generator.
    """
    if adaptation is None:
        return WarmupStep(kernel, *kernel.step(energy, state, generator), None)
    if adaptation_state is None:
        kernel, adaptation_state = adaptation.start(kernel, energy, state, generator)
    return WarmupStep(
        *adaptation.step(kernel, energy, state, adaptation_state, num_steps, generator)
    )


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
        kernel: the initial kernel.
        energy: the target.
        state: initial state of the chains, from ``kernel.init``.
        num_steps: number of warm-up steps, at least 0.
        adaptation: "default", the kernel's own adaptation or a :class:`WindowAdaptation`; an
            instance of either; None does not change the kernel.
        generator: source of randomness; None is torch's default generator.
        after_step: called after each step, for progress.

    Returns:
        the adapted kernel and the state of its chains.

    Raises:
        ValueError: if ``adaptation`` is not an adaptation, or cannot adapt this kernel.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> from pyroebm.targets import DoubleWell
        >>> energy, generator = DoubleWell(), torch.Generator().manual_seed(0)
        >>> state = MALA().init(energy, energy.initial(64, generator))
        >>> kernel, state = warmup(MALA(), energy, state, 200, generator=generator)
        >>> 0.1 < kernel.step_size < 1.0
        True
    """
    chosen, adaptation_state = resolve(kernel, adaptation), None
    for _ in range(num_steps):
        kernel, state, _, adaptation_state = warmup_step(
            kernel, energy, state, adaptation_state, num_steps, chosen, generator
        )
        after_step()
    return kernel, state
