"""Warm-up: dual averaging of the step size and a pooled diagonal metric, in windows. Adaptation returns a new kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.base import AnyState, Info, Kernel, rows

__all__ = ["Adaptation", "DualAveraging", "PooledVariance", "WindowAdaptation", "Warmup", "find_step_size", "windows"]


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


class DualAveraging(NamedTuple):
    r"""Nesterov's dual averaging of :math:`\log\epsilon` (Hoffman and Gelman, 2014, section 3.2), as an immutable value.

    .. math:: \bar H_t = (1 - \tfrac{1}{t + t_0}) \bar H_{t-1} + \tfrac{1}{t + t_0} (\delta - \alpha_t), \quad
        \log\epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar H_t

    Args:
        mu: :math:`\mu`, where :math:`\log\epsilon` is drawn to.
        log_step: :math:`\log\epsilon_t`, what to use next.
        log_average: the weighted average of the iterates, what to use in the end.
        error: :math:`\bar H_t`.
        steps: t.

    Example:
        >>> tuning = DualAveraging.start(0.1)
        >>> tuning.update(1.0, target=0.8).log_step > tuning.log_step
        True
    """

    mu: float
    log_step: float
    log_average: float
    error: float = 0.0
    steps: int = 0

    @classmethod
    def start(cls, step_size: float) -> DualAveraging:
        """Begin at ``step_size``, drawn towards ten times that: large steps are cheap to try."""
        return cls(math.log(10.0 * step_size), math.log(step_size), math.log(step_size))

    def update(
        self, acceptance: float, target: float, gamma: float = 0.05, t0: float = 10.0, kappa: float = 0.75
    ) -> DualAveraging:
        """One observation of the acceptance rate. A value that is no number in [0, 1] is refused: it would freeze every chain."""
        if not 0.0 <= acceptance <= 1.0:
            raise ValueError(f"acceptance must be a number in [0, 1], got {acceptance}")
        steps = self.steps + 1
        weight = 1.0 / (steps + t0)
        error = (1.0 - weight) * self.error + weight * (target - acceptance)
        log_step = min(self.mu - math.sqrt(steps) / gamma * error, 60.0)  # where every step is accepted, it must not overflow
        decay = steps**-kappa
        return DualAveraging(self.mu, log_step, decay * log_step + (1.0 - decay) * self.log_average, error, steps)


class PooledVariance(NamedTuple):
    """Marginal variances of the draws of all chains together, merged batch by batch (Chan, Golub and LeVeque, 1983).

    Args:
        draws: draws so far.
        mean: running mean, shape ``(dim,)``.
        squares: sum of squared deviations, shape ``(dim,)``.
    """

    draws: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> PooledVariance:
        """Empty, for rows shaped as ``like`` ``(chains, dim)``."""
        return cls(0, torch.zeros_like(like[0]), torch.zeros_like(like[0]))

    def update(self, q: Tensor) -> PooledVariance:
        """Add rows ``(chains, dim)``."""
        n, total = len(q), self.draws + len(q)
        mean = q.mean(0)
        delta = mean - self.mean
        squares = self.squares + ((q - mean) ** 2).sum(0) + delta**2 * (self.draws * n / total)
        return PooledVariance(total, self.mean + delta * (n / total), squares)

    def variance(self) -> Tensor:
        """The variances, shrunk towards 1e-3 as if five more draws had said so (Stan's rule)."""
        if self.draws < 2:
            return torch.ones_like(self.mean)
        return (self.squares / (self.draws - 1)) * (self.draws / (self.draws + 5.0)) + 1e-3 * (5.0 / (self.draws + 5.0))


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


def find_step_size(kernel: Kernel[Any], energy: Energy, state: AnyState, generator: torch.Generator | None) -> float:
    """A step size to start from: double or halve until the mean acceptance of one step crosses one half (heuristic of NUTS)."""
    probe: Kernel[Any] = kernel.replace(max_tree_depth=1) if hasattr(kernel, "max_tree_depth") else kernel
    size = float(torch.as_tensor(getattr(kernel, "step_size")).mean())  # noqa: B009
    direction = 0
    for _ in range(50):
        _, info = probe.replace(step_size=size).step(energy, state, generator)
        wanted = 1 if float(info.acceptance_rate.mean()) > 0.5 else -1
        if direction and wanted != direction:
            break
        direction, size = wanted, size * 2.0**wanted
    return size


class Warmup(NamedTuple):
    """The adaptation's own state between two steps."""

    tuning: DualAveraging | None
    pooled: PooledVariance
    step: int


@dataclasses.dataclass(frozen=True)
class WindowAdaptation:
    """Step size and diagonal metric, one of each for all chains, learned in windows as in Stan (Carpenter et al., 2017).

    Draws of all chains are pooled, so many chains learn a metric in few steps. A row that met a NaN reports acceptance 0 and
    stays where it was, so nothing non-finite reaches the adaptation.

    Args:
        target_acceptance: acceptance rate to aim at; None takes the kernel's own.
        metric: whether to learn the diagonal metric.
        initial, first, final: lengths of the first buffer, of the first window and of the last buffer.

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
    metric: bool = True
    initial: int = 15
    first: int = 15
    final: int = 50

    def __post_init__(self) -> None:
        if self.target_acceptance is not None and not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(f"target_acceptance must be in (0, 1), got target_acceptance={self.target_acceptance}")

    def start(
        self, kernel: Kernel[Any], energy: Energy, state: AnyState, generator: torch.Generator | None = None
    ) -> tuple[Kernel[Any], Warmup]:
        """A kernel with a first guess of the step size, and the adaptation's state."""
        pooled = PooledVariance.start(rows(state.x))
        if kernel.target_acceptance is None:
            return kernel, Warmup(None, pooled, 0)
        size = find_step_size(kernel, energy, state, generator)
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
        tuning = tuning.update(float(info.acceptance_rate.mean()), target)
        kernel = kernel.replace(step_size=math.exp(tuning.log_step))
        learns = self.metric and hasattr(kernel, "inverse_mass")  # a discrete kernel has a step size and no metric
        plan = windows(steps, self.initial, self.first, self.final) if learns else []
        if any(start <= step < stop for start, stop in plan):
            pooled = pooled.update(rows(state.x))
        if any(step + 1 == stop for _, stop in plan):
            kernel = kernel.replace(inverse_mass=pooled.variance())
            size = find_step_size(kernel, energy, state, generator)
            kernel, tuning, pooled = (
                kernel.replace(step_size=size),
                DualAveraging.start(size),
                PooledVariance.start(rows(state.x)),
            )
        if step + 1 == steps:
            # Dual averaging begins by overshooting: an average of a few steps is worth less than a look at where the chains are.
            few = tuning.steps < 15
            size = 0.5 * find_step_size(kernel, energy, state, generator) if few else math.exp(tuning.log_average)
            kernel = kernel.replace(step_size=size)
        return kernel, Warmup(tuning, pooled, step + 1)


def resolve(kernel: Kernel[Any], adaptation: Adaptation | Literal["default"] | None) -> Adaptation | None:
    """What ``adaptation`` means for a kernel: "default" is the kernel's own way, or a :class:`WindowAdaptation`."""
    if adaptation == "default":
        chosen: Adaptation = kernel.own_adaptation() or WindowAdaptation()
        return chosen
    if adaptation is not None and (isinstance(adaptation, type | str) or not hasattr(adaptation, "start")):
        raise ValueError(f"adaptation must be a WindowAdaptation() or the like of it, or None, got adaptation={adaptation!r}")
    return adaptation
