"""ChEES-HMC: trajectories of one length for all chains, learned across them."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.windows import Warmup, WindowAdaptation
from pyroebm.kernels.base import GradientKernel, Info, Kernel, State, column, rows
from pyroebm.kernels.hamiltonian import Trajectory, jittered_steps, metropolis_trajectory
from pyroebm.kernels.metric import metric_of

__all__ = ["ChEES", "ChEESAdaptation"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChEES(GradientKernel):
    r"""Jittered HMC with a trajectory length learned across chains (Hoffman, Radul and Sountsov,
    2021): exact.

    Every chain follows :math:`\lceil h T / \epsilon \rceil` leapfrog steps, h uniform on (0, 1),
    drawn for each step and the same for all chains, so none waits. With fixed settings the chains
    are independent; **the warm-up couples them**: :class:`ChEESAdaptation` learns T from all chains
    together and needs two at least. No trajectory has more than 1,000 steps.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.651 (Beskos et al.,
            2013).
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric;
            None is the identity.
        trajectory_length: T, the longest time of a trajectory; the mean is half of it.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm import MCMC
        >>> from pyroebm.targets import scales_gaussian
        >>> mcmc = MCMC(ChEES(), num_samples=100, warmup_steps=200, num_chains=64, seed=0)
        >>> mcmc.run(scales_gaussian())
        >>> 1.0 < mcmc.kernel.trajectory_length < 10.0
        True
    """

    trajectory_length: float = 1.0

    learned: ClassVar[tuple[str, ...]] = ("step_size", "inverse_mass", "trajectory_length")
    target_acceptance: ClassVar[float | None] = 0.651
    has_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.trajectory_length < math.inf:
            raise ValueError(
                "ChEES: trajectory_length must be positive and finite, got"
                f" {self.trajectory_length}"
            )

    def probe(self) -> ChEES:
        return self.replace(trajectory_length=sys.float_info.min)

    def own_adaptation(self) -> ChEESAdaptation:
        return ChEESAdaptation()

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        return self.step_with_trajectory(energy, state, generator)[:2]

    def step_with_trajectory(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info, Trajectory]:
        """One step, and where its trajectories began and ended."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        num_steps = jittered_steps(self.trajectory_length, eps, generator)
        return metropolis_trajectory(energy, state, eps, metric, num_steps, generator)


class ChEESMemory(NamedTuple):
    """What :class:`ChEESAdaptation` knows between two steps."""

    warmup: Warmup  #: of step size and metric
    log_length: float  #: :math:`\log T` to use next
    log_average: float  #: the weighted average of its iterates, what to use in the end
    square: float = 0.0  #: running mean of the squared gradient
    updates: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ChEESAdaptation:
    r"""Trajectory length by stochastic gradient ascent on the ChEES criterion, step size and metric
    as in Stan.

    The change in the estimator of the expected square is made large (Hoffman, Radul and Sountsov,
    2021):

    .. math::

        \operatorname{ChEES}(T) = \tfrac14 E\bigl[(|x' - \bar x'|^2 - |x - \bar x|^2)^2\bigr],
        \qquad \frac{\partial}{\partial \log T}
        = E\bigl[t\, (|x' - \bar x'|^2 - |x - \bar x|^2)\, (x' - \bar x') \cdot v'\bigr]

    with :math:`x'` the end of a trajectory of time t, :math:`v'` its velocity there, and every
    chain weighted by its acceptance probability. Coordinates are measured in standard deviations.
    Adam without momentum climbs :math:`\log T`. A chain that met a NaN has weight 0.

    Args:
        window: how step size and metric are learned.
        lr: Adam's, of :math:`\log T`.

    Raises:
        ValueError: if ``lr`` is not positive and finite; at the start, unless the kernel
            is :class:`ChEES` and has two chains.

    Example:
        >>> ChEESAdaptation().lr
        0.025
    """

    window: WindowAdaptation = dataclasses.field(
        default_factory=lambda: WindowAdaptation(step_size="pooled")
    )
    lr: float = 0.025

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got lr={self.lr}")

    def start(
        self, kernel: Any, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[ChEES, ChEESMemory]:
        """A kernel with a first guess of the step size, and the memory."""
        if not isinstance(kernel, ChEES):
            raise ValueError(
                "ChEESAdaptation learns the trajectory length of ChEES, got"
                f" {type(kernel).__name__}"
            )
        if len(state.x) < 2:
            raise ValueError(
                f"ChEESAdaptation learns across chains and needs at least 2, got {len(state.x)}:"
                " take more chains, in blocks"
                " (chain_batch_size) of two or more, or NUTS"
            )
        short, warmup = self.window.start(kernel.probe(), energy, state, generator)
        log_length = math.log(kernel.trajectory_length)
        return _lengthened(short, kernel.trajectory_length), ChEESMemory(
            warmup, log_length, log_length
        )

    def step(
        self,
        kernel: ChEES,
        energy: Energy,
        state: State,
        memory: ChEESMemory,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[ChEES, State, Info, ChEESMemory]:
        """One step of the kernel, and what is learned from it."""
        state, info, trajectory = kernel.step_with_trajectory(energy, state, generator)
        slope = float(_slope(kernel, info, trajectory))
        short, warmup = self.window.update(
            kernel.probe(), energy, state, info, memory.warmup, num_steps, generator
        )
        memory = self._climb(memory._replace(warmup=warmup), slope)
        last = warmup.step == num_steps
        length = math.exp(memory.log_average if last else memory.log_length)
        return _lengthened(short, length), state, info, memory

    def _climb(self, memory: ChEESMemory, slope: float, decay: float = 0.95) -> ChEESMemory:
        if not math.isfinite(slope):
            return memory
        updates, square = memory.updates + 1, decay * memory.square + (1.0 - decay) * slope**2
        scale = math.sqrt(square / (1.0 - decay**updates))
        log_length = memory.log_length + (self.lr * slope / scale if scale > 0.0 else 0.0)
        weight = updates**-0.75
        average = weight * log_length + (1.0 - weight) * memory.log_average
        return ChEESMemory(memory.warmup, log_length, average, square, updates)


def _lengthened(kernel: Kernel[Any], length: float) -> ChEES:
    return cast(ChEES, kernel.replace(trajectory_length=length))


def _slope(kernel: ChEES, info: Info, trajectory: Trajectory) -> Tensor:
    """The gradient of the criterion in log T, up to a positive factor; 0 where no trajectory was
    acceptable."""
    q0, _, q1, p1 = trajectory
    weight = info.acceptance_rate.unsqueeze(1)
    valid = weight > 0.0
    # A trajectory that met a NaN has weight 0, but 0 times NaN is NaN: it is taken out.
    q1, p1 = torch.where(valid, q1, q0), torch.where(valid, p1, torch.zeros_like(p1))
    total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    metric = metric_of(kernel.inverse_mass, q0)
    variance = q0.var(0)
    variance = torch.where(variance > 0.0, variance, torch.ones_like(variance))
    before, after = q0 - q0.mean(0), q1 - (weight * q1).sum(0) / total
    change = ((after**2 - before**2) / variance).sum(1)
    along = (after * metric.apply(p1) / variance).sum(1)
    time = info.n_steps.to(q0.dtype) * column(kernel.step_size, q0).squeeze(1)
    return (weight.squeeze(1) * time * change * along).sum() / total
