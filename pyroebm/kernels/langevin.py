"""Langevin kernels: unadjusted (biased) and Metropolis-adjusted (exact)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroebm.core.compilation import fused, is_compiled
from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    GradientKernel,
    Info,
    State,
    choose,
    column,
    normal_like,
    row_value_and_grad,
    rows,
    state_of_rows,
)
from pyroebm.kernels.hamiltonian import MAX_FUSED_STEPS, metropolis_trajectory
from pyroebm.kernels.metric import Metric, metric_of

__all__ = ["ULA", "MALA"]


@dataclasses.dataclass(frozen=True, eq=False)
class ULA(GradientKernel):
    r"""Unadjusted Langevin algorithm (Parisi, 1981; Roberts and Tweedie, 1996). **Not exact**.

    .. math::

        x' = x - \frac{\epsilon^2}{2} M^{-1} \nabla E(x) + \epsilon \sqrt{T M^{-1}}\, n, \qquad
        n \sim N(0, I)

    The bias grows with the step size: on N(0, 1) with T = 1 the stationary variance is
    :math:`1 / (1 - \epsilon^2 / 4)` instead of 1. A proposal with a non-finite energy or gradient
    is rejected and counts as diverging; all others are accepted.

    Args:
        step_size: :math:`\epsilon`, the standard deviation of the noise at T = 1; the drift is
            :math:`\epsilon^2 / 2`.
        inverse_mass: preconditioner :math:`M^{-1}`: a tensor is its diagonal, or a metric; None is
            the identity.
        temperature: :math:`T > 0`; the chain samples approximately :math:`e^{-E/T}`.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = ULA(step_size=0.1), DoubleWell()
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape, info.accepted.all()
        (torch.Size([8]), tensor(True))
    """

    temperature: float = 1.0

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"ULA: temperature must be positive and finite, got temperature={self.temperature}"
            )

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Run one Langevin step of every chain."""
        state, all_accepted = self._move(energy, state, 1, generator)
        accepted = all_accepted[0]
        return state, Info(
            acceptance_rate=accepted.to(state.x.dtype),
            accepted=accepted,
            diverging=~accepted,
            energy=state.energy,
            n_steps=torch.ones_like(accepted, dtype=torch.long),
            step_size=column(self.step_size, state.energy).squeeze(1),
        )

    def steps(
        self, energy: Energy, state: State, num_steps: int, generator: torch.Generator | None = None
    ) -> tuple[State, Tensor]:
        """Run ``num_steps`` steps; see :meth:`Kernel.steps`."""
        if type(self).step is not ULA.step:  # a subclass overrides step()
            return super().steps(energy, state, num_steps, generator)
        block = MAX_FUSED_STEPS if is_compiled(energy) else num_steps
        accepted = []
        for done in range(0, num_steps, block):
            state, now = self._move(energy, state, min(block, num_steps - done), generator)
            accepted.append(now)
        return state, torch.cat(accepted).to(state.x.dtype).mean(0)

    def _move(
        self, energy: Energy, state: State, num_steps: int, generator: torch.Generator | None
    ) -> tuple[State, Tensor]:
        """Run some steps.

        Returns:
            the last state, and which proposals were accepted, ``(num_steps, chains)``.
        """
        q, grad = rows(state.x), rows(state.grad)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        # Draw step by step, so that many steps at once use the same numbers as calls of step().
        noise = math.sqrt(self.temperature) * torch.stack(
            [normal_like(q, generator) for _ in range(num_steps)]
        )
        # Usually all chains are finite, and one sum shows it. A compiled graph cannot branch on
        # it, and a GPU would have to synchronize.
        quick_check = q.device.type == "cpu" and not is_compiled(energy)
        start = State(q, state.energy, grad)
        moved = fused(_langevin, energy, start, eps, noise, metric, quick_check=quick_check)
        return state_of_rows(energy, *moved.state), moved.accepted


class _Moved(NamedTuple):
    state: State  #: with flattened positions ``(chains, dim)``
    accepted: Tensor  #: which proposals were accepted, ``(steps, chains)``


def _langevin(
    energy: Energy,
    state: State,
    step_size: Tensor,
    noise: Tensor,
    metric: Metric,
    *,
    quick_check: bool,
) -> _Moved:
    """Run one step for each entry of ``noise``, ``(steps, chains, dim)``."""
    pushes = step_size * noise
    drift = 0.5 * step_size**2
    all_chains = torch.ones_like(state.energy, dtype=torch.bool)
    accepted = []
    for push in pushes.unbind():
        q = state.x + metric.apply(push - drift * metric.transpose(state.grad))
        proposal, finite = State(q, *row_value_and_grad(energy, q)), all_chains
        if not (quick_check and math.isfinite(float(proposal.energy.sum() + proposal.grad.sum()))):
            finite = torch.isfinite(proposal.energy) & torch.isfinite(proposal.grad).all(1)
            proposal = choose(finite, proposal, state)
        state = proposal
        accepted.append(finite)
    return _Moved(state, torch.stack(accepted))


@dataclasses.dataclass(frozen=True, eq=False)
class MALA(GradientKernel):
    r"""Metropolis-adjusted Langevin algorithm (Besag, 1994; Roberts and Tweedie, 1996): exact.

    The proposal is that of :class:`ULA` at T = 1, accepted by the Metropolis-Hastings ratio. It is
    equivalent to HMC with one leapfrog step (Neal, 2011) and is computed this way: the ratio is
    then :math:`e^{H_0 - H_1}`.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.574 (Roberts and
            Rosenthal, 1998).
        inverse_mass: preconditioner :math:`M^{-1}`: a tensor is its diagonal, or a metric; None is
            the identity.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = MALA(step_size=0.3), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> state.energy.shape
        torch.Size([8])
    """

    target_acceptance: ClassVar[float | None] = 0.574
    has_momentum: ClassVar[bool] = True

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Propose a Langevin step and accept it by Metropolis-Hastings."""
        q = rows(state.x)
        metric = metric_of(self.inverse_mass, q)
        return metropolis_trajectory(
            energy, state, column(self.step_size, q), metric, 1, generator
        )[:2]
