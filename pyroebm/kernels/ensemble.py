"""ChEES-HMC: HMC with one trajectory length for all chains, learned across chains."""

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

#: Learning rate of Adam, for the logarithm of the trajectory length.
LEARNING_RATE = 0.025


@dataclasses.dataclass(frozen=True, eq=False)
class ChEES(GradientKernel):
    r"""Jittered HMC with a trajectory length learned across chains: exact.

    The kernel of Hoffman, Radul and Sountsov (2021). Every chain takes
    :math:`\lceil h T / \epsilon \rceil` leapfrog steps, with h uniform on (0, 1), drawn for each
    step and the same for all chains, so that no chain waits. With fixed settings the chains are
    independent; **the warm-up couples them**: :class:`ChEESAdaptation` learns T from all chains and
    requires at least two. No trajectory has more than 1,000 steps.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.651 (Beskos et al.,
            2013).
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric;
            None is the identity.
        trajectory_length: T, the maximum integration time of a trajectory; the mean is half of it.

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
        """Return the kernel with trajectories of one step."""
        return self.replace(trajectory_length=sys.float_info.min)

    def own_adaptation(self) -> ChEESAdaptation:
        """Return a :class:`ChEESAdaptation`."""
        return ChEESAdaptation()

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Run one trajectory of every chain and accept it by Metropolis-Hastings."""
        return self.step_with_trajectory(energy, state, generator)[:2]

    def step_with_trajectory(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info, Trajectory]:
        """Run one step; also return the end points of its trajectories."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        num_steps = jittered_steps(self.trajectory_length, eps, generator)
        return metropolis_trajectory(energy, state, eps, metric, num_steps, generator)


class ChEESAdaptationState(NamedTuple):
    """State of :class:`ChEESAdaptation` between two steps."""

    warmup: Warmup  #: of step size and metric
    log_length: float  #: :math:`\log T` of the next step
    log_average: float  #: weighted average of the iterates, used after warm-up
    square: float = 0.0  #: running mean of the squared gradient
    updates: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ChEESAdaptation:
    r"""Adaptation of the trajectory length by stochastic gradient ascent on the ChEES criterion.

    Step size and metric are adapted as in Stan. The criterion is the change in the estimator of the
    expected square (Hoffman, Radul and Sountsov, 2021):

    .. math::

        \operatorname{ChEES}(T) = \tfrac14 E\bigl[(|x' - \bar x'|^2 - |x - \bar x|^2)^2\bigr],
        \qquad \frac{\partial}{\partial \log T}
        = E\bigl[t\, (|x' - \bar x'|^2 - |x - \bar x|^2)\, (x' - \bar x') \cdot v'\bigr]

    with :math:`x'` the end of a trajectory of time t, :math:`v'` its velocity there, and every
    chain weighted by its acceptance probability. Coordinates are measured in standard deviations.
    :math:`\log T` is updated by Adam without momentum. A chain with a non-finite number has weight
    0.

    Args:
        window: adaptation of step size and metric.

    Raises:
        ValueError: at the start, unless the kernel is :class:`ChEES` and has two chains.

    Example:
        >>> ChEESAdaptation().window.step_size
        'pooled'
    """

    window: WindowAdaptation = dataclasses.field(
        default_factory=lambda: WindowAdaptation(step_size="pooled")
    )

    def start(
        self, kernel: Any, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[ChEES, ChEESAdaptationState]:
        """Return a kernel with an initial step size, and the initial adaptation state."""
        if not isinstance(kernel, ChEES):
            raise ValueError(
                "kernel must be ChEES(), whose trajectory length ChEESAdaptation learns, got"
                f" {type(kernel).__name__}; use WindowAdaptation()"
            )
        if len(state.x) < 2:
            raise ValueError(
                "ChEESAdaptation learns across chains and requires at least 2 in a batch, got"
                f" {len(state.x)}: increase num_chains or chain_batch_size, or use NUTS()"
            )
        short, warmup = self.window.start(kernel.probe(), energy, state, generator)
        log_length = math.log(kernel.trajectory_length)
        return _with_length(short, kernel.trajectory_length), ChEESAdaptationState(
            warmup, log_length, log_length
        )

    def step(
        self,
        kernel: ChEES,
        energy: Energy,
        state: State,
        adaptation_state: ChEESAdaptationState,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[ChEES, State, Info, ChEESAdaptationState]:
        """Run one step of the kernel and update the adaptation."""
        state, info, trajectory = kernel.step_with_trajectory(energy, state, generator)
        slope = float(_slope(kernel, info, trajectory))
        short, warmup = self.window.update(
            kernel.probe(), energy, state, info, adaptation_state.warmup, num_steps, generator
        )
        adaptation_state = self._update_length(adaptation_state._replace(warmup=warmup), slope)
        last = warmup.step == num_steps
        length = math.exp(adaptation_state.log_average if last else adaptation_state.log_length)
        return _with_length(short, length), state, info, adaptation_state

    def _update_length(
        self, adaptation_state: ChEESAdaptationState, slope: float, decay: float = 0.95
    ) -> ChEESAdaptationState:
        if not math.isfinite(slope):
            return adaptation_state
        updates = adaptation_state.updates + 1
        square = decay * adaptation_state.square + (1.0 - decay) * slope**2
        scale = math.sqrt(square / (1.0 - decay**updates))
        log_length = adaptation_state.log_length + (
            LEARNING_RATE * slope / scale if scale > 0.0 else 0.0
        )
        weight = updates**-0.75
        average = weight * log_length + (1.0 - weight) * adaptation_state.log_average
        return ChEESAdaptationState(adaptation_state.warmup, log_length, average, square, updates)


def _with_length(kernel: Kernel[Any], length: float) -> ChEES:
    return cast(ChEES, kernel.replace(trajectory_length=length))


def _slope(kernel: ChEES, info: Info, trajectory: Trajectory) -> Tensor:
    """Estimate the gradient of the criterion in log T, up to a positive factor.

    It is 0 if no trajectory had a positive acceptance probability.
    """
    q0, _, q1, p1 = trajectory
    weight = info.acceptance_rate.unsqueeze(1)
    valid = weight > 0.0
    # A trajectory with a NaN has weight 0, but 0 times NaN is NaN, so it is masked out.
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
