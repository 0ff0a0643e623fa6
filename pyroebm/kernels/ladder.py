"""Warm-up of parallel tempering: a step size for each temperature, and temperatures of equal swap rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.adaptation import DualAveraging, windows
from pyroebm.kernels.base import Info

if TYPE_CHECKING:  # tempering imports this module
    from pyroebm.kernels.tempering import ParallelTempering, TemperedState

__all__ = ["LadderAdaptation", "LadderMemory", "respaced"]


class LadderMemory(NamedTuple):
    """The adaptation's own state between two steps."""

    tunings: tuple[DualAveraging, ...]  #: one for each temperature; none where the inner kernel has no step size to tune
    step: int


@dataclasses.dataclass(frozen=True)
class LadderAdaptation:
    r"""Step sizes and temperatures of :class:`pyroebm.kernels.ParallelTempering`, pooled over chains.

    In rounds that double in length, the mean rejection rates of neighbours are summed to the communication barrier

    .. math:: \Lambda(\beta_k) = \sum_{j \le k} r_j, \qquad r_j = 1 - \bar\alpha(j - 1, j)

    which hardly depends on the ladder it was measured on. The new ladder divides it evenly, so that all rejection rates are
    equal (Syed, Bouchard-Côté, Deligiannidis and Doucet, 2022, algorithm 4). Between the rounds' ends, each temperature's step
    size follows the acceptance rate at that temperature by dual averaging. The metric stays as it was given. What the state has
    counted is forgotten at the end, so that a report afterwards is about the draws that were kept.

    Args:
        target_acceptance: acceptance rate to aim at; None takes the inner kernel's own.
        ladder: whether to move the temperatures between the two ends.
        initial, first, final: lengths of the first buffer, of the first round and of the last buffer, as in
            :class:`pyroebm.WindowAdaptation`. Below 60 steps of warm-up there are no rounds.

    Raises:
        ValueError: if ``target_acceptance`` is outside (0, 1).

    Example:
        >>> from pyroebm.kernels import MALA, ParallelTempering
        >>> from pyroebm.targets import DoubleWell
        >>> energy, generator = DoubleWell(), torch.Generator().manual_seed(0)
        >>> kernel, plan = ParallelTempering(MALA(), betas=[1.0, 0.9, 0.1]), LadderAdaptation()
        >>> state = kernel.init(energy, energy.initial(64, generator), generator)
        >>> kernel, memory = plan.start(kernel, energy, state, generator)
        >>> for _ in range(200):
        ...     kernel, state, info, memory = plan.step(kernel, energy, state, memory, 200, generator)
        >>> 0.3 < kernel.betas[1] < 0.7, kernel.step_size.shape
        (tensor(True), torch.Size([3]))
    """

    target_acceptance: float | None = None
    ladder: bool = True
    initial: int = 15
    first: int = 15
    final: int = 50

    def __post_init__(self) -> None:
        if self.target_acceptance is not None and not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(f"target_acceptance must be in (0, 1), got target_acceptance={self.target_acceptance}")

    def start(
        self, kernel: Any, energy: Energy, state: TemperedState, generator: torch.Generator | None = None
    ) -> tuple[ParallelTempering, LadderMemory]:
        """A kernel with first guesses of the step sizes, and the adaptation's state."""
        if not hasattr(kernel, "report"):
            raise ValueError(f"LadderAdaptation is for ParallelTempering, got {type(kernel).__name__}")
        if kernel.kernel.target_acceptance is None:
            return kernel, LadderMemory((), 0)
        sizes = find_step_sizes(kernel, energy, state, generator)
        return kernel.replace(step_size=sizes), LadderMemory(_tunings(sizes), 0)

    def step(
        self,
        kernel: ParallelTempering,
        energy: Energy,
        state: TemperedState,
        memory: LadderMemory,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[ParallelTempering, TemperedState, Info, LadderMemory]:
        """One step of a warm-up of ``steps``, and what is learned from it."""
        rounds = windows(steps, self.initial, self.first, self.final) if self.ladder else []
        if any(memory.step == begin for begin, _ in rounds):
            state = kernel.restart(state)
        state, info, inner = kernel.transition(energy, state, generator)
        tunings, last = memory.tunings, memory.step + 1 == steps
        if tunings:
            target = kernel.kernel.target_acceptance if self.target_acceptance is None else self.target_acceptance
            rates = inner.acceptance_rate.double().mean(0).tolist()
            tunings = tuple(t.update(rate, float(target or 0.0)) for t, rate in zip(tunings, rates, strict=True))
            kernel = kernel.replace(step_size=_sizes(t.step_size for t in tunings))
        if any(memory.step + 1 == end for _, end in rounds):
            betas, place = respaced(kernel.betas, 1.0 - kernel.report(state).swap_rates)
            if tunings:
                sizes = torch.as_tensor(np.exp(np.interp(place, np.arange(len(place)), [float(t.log_average) for t in tunings])))
                kernel, tunings = kernel.replace(step_size=sizes), _tunings(sizes)
            kernel = kernel.replace(betas=betas)
            state = kernel.refresh(energy, state)
        if last:
            if tunings:
                # dual averaging begins by overshooting: an average of a few steps is worth less than a look at the replicas
                few = tunings[0].steps < 15
                found = 0.5 * find_step_sizes(kernel, energy, state, generator) if few else None
                kernel = kernel.replace(step_size=_sizes(t.average for t in tunings) if found is None else found)
            state = kernel.restart(state)
        return kernel, state, info, LadderMemory(tunings, memory.step + 1)


def respaced(betas: Tensor, rejection: Tensor) -> tuple[Tensor, np.ndarray]:
    r"""The ladder of as many temperatures, between the same ends, that divides the measured barrier evenly.

    The barrier is interpolated monotonely (Fritsch and Carlson, 1980), over :math:`\log \beta` where the ladder ends above 0.

    Args:
        betas: the ladder it was measured on, shape ``(R,)``.
        rejection: mean rejection rates of its neighbours, shape ``(R - 1,)``.

    Returns:
        the new ladder, and where its temperatures lie on the old one, as fractional indices.

    Example:
        >>> respaced(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.6, 0.2]))[1].round(2).tolist()
        [0.0, 0.67, 2.0]
    """
    old = betas.double().cpu().numpy()
    # a pair that never refused would make two temperatures one: it counts as one refusal in a thousand
    barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rejection.double().cpu().numpy(), 1e-3))])
    even = np.linspace(0.0, barrier[-1], len(old))
    new = np.exp(PchipInterpolator(barrier, np.log(old))(even)) if old[-1] > 0.0 else PchipInterpolator(barrier, old)(even)
    new[0], new[-1] = old[0], old[-1]
    return torch.as_tensor(new), np.interp(even, barrier, np.arange(len(old)))


def find_step_sizes(kernel: ParallelTempering, energy: Energy, state: TemperedState, generator: torch.Generator | None) -> Tensor:
    """For each temperature, double or halve until the mean acceptance of one step crosses one half; shape ``(R,)``."""
    inner = kernel.kernel
    probe = kernel.replace(kernel=inner.probe())
    sizes = torch.as_tensor(kernel.step_size, dtype=torch.float64).expand(len(kernel.betas)).clone()
    first: Tensor | None = None
    searching = torch.ones_like(sizes, dtype=torch.bool)
    for _ in range(50):
        _, _, info = probe.replace(step_size=sizes).transition(energy, state, generator)
        wanted = torch.where(info.acceptance_rate.mean(0).to(sizes) > 0.5, 1.0, -1.0)
        first = wanted if first is None else first
        searching = searching & (wanted == first)
        if not bool(searching.any()):
            break
        sizes = torch.where(searching, sizes * 2.0**wanted, sizes)
    return sizes


def _sizes(sizes: Iterable[float | Tensor]) -> Tensor:
    return torch.tensor([float(size) for size in sizes], dtype=torch.float64)


def _tunings(sizes: Tensor) -> tuple[DualAveraging, ...]:
    return tuple(DualAveraging.start(size) for size in sizes.tolist())
