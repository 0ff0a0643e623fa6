r"""Hamiltonian dynamics of positions ``(chains, dim)``: leapfrog and Metropolis correction.

Momenta are whitened: with :math:`A A^\top = M^{-1}` the momentum is :math:`A^\top p`, which is
standard normal in equilibrium for any metric. In these coordinates the mass is the identity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroebm.core.compilation import fused, is_compiled
from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    Info,
    S,
    State,
    choose,
    normal_like,
    row_value_and_grad,
    rows,
    state_of_rows,
    uniform_like,
)
from pyroebm.kernels.metric import Metric

__all__ = [
    "MAX_ENERGY_ERROR",
    "MAX_STEPS",
    "draw_momentum",
    "jittered_steps",
    "kinetic",
    "leapfrog",
    "metropolis",
    "metropolis_trajectory",
]

#: An energy error above this many nats counts as a divergence (Betancourt, 2017; Stan's value).
MAX_ENERGY_ERROR = 1000.0

#: Maximum number of leapfrog steps of a trajectory of jittered length.
MAX_STEPS = 1000

#: Number of leapfrog steps in one compiled function.
MAX_FUSED_STEPS = 4


def kinetic(p: Tensor) -> Tensor:
    r"""Compute :math:`K(p) = \frac12 |p|^2` of each chain, for whitened momenta."""
    energies: Tensor = 0.5 * torch.linalg.vecdot(p, p)
    return energies


def draw_momentum(q: Tensor, generator: torch.Generator | None) -> Tensor:
    r"""Draw momenta :math:`p \sim N(0, I)`."""
    return normal_like(q, generator)


def leapfrog(
    energy: Energy,
    q: Tensor,
    p: Tensor,
    grad: Tensor,
    step_size: Tensor,
    metric: Metric,
    num_steps: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Run ``num_steps`` leapfrog steps: reversible, volume preserving, of second order.

    .. math::

        p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q), \quad
        q \leftarrow q + \epsilon A p, \quad p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q)

    Args:
        energy: the target.
        q: positions, shape ``(chains, dim)``.
        p: whitened momenta, shape ``(chains, dim)``.
        grad: energy gradients at ``q``, shape ``(chains, dim)``.
        step_size: :math:`\epsilon`, shape ``(chains, 1)``; negative steps run backwards in time.
        metric: the map :math:`A`.
        num_steps: number of steps.

    Returns:
        positions, momenta, energies ``(chains,)`` and gradients at the end.
    """
    half = 0.5 * step_size
    p = p - half * metric.transpose(grad)
    for step in range(num_steps):
        q = q + step_size * metric.apply(p)
        values, grad = row_value_and_grad(energy, q)
        p = p - (step_size if step + 1 < num_steps else half) * metric.transpose(grad)
    return q, p, values, grad


def jittered_steps(length: float, step_size: Tensor, generator: torch.Generator | None) -> int:
    r"""Draw a number of leapfrog steps :math:`\lceil h \ell / \epsilon \rceil`.

    h is uniform on (0, 1) and :math:`\epsilon` is the median over chains.
    """
    h = uniform_like(step_size[:1], generator)
    return max(1, min(math.ceil(float(h * length / step_size.median())), MAX_STEPS))


def metropolis(
    old: S,
    new: S,
    error: Tensor,
    step_size: Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> tuple[S, Info]:
    r"""Accept the new state of each chain with probability :math:`\min(1, e^{-\Delta})`.

    Args:
        old: the current state.
        new: the proposal.
        error: :math:`\Delta`, the change of :math:`-\log` of the joint density, or of the
            Metropolis-Hastings ratio, shape ``(chains,)``. A chain with a non-finite entry has
            acceptance probability 0; other chains are unaffected.
        step_size: for the report, shape ``(chains, 1)``.
        num_steps: number of gradient evaluations, for the report.
        generator: source of the uniform numbers.

    Returns:
        the next state and the report of the step.
    """
    error = torch.where(torch.isfinite(error), error, torch.inf)
    probability = torch.exp(-error).clamp(max=1.0)
    accepted = uniform_like(probability, generator) < probability
    state = choose(accepted, new, old)
    return state, Info(
        acceptance_rate=probability,
        accepted=accepted,
        diverging=error > MAX_ENERGY_ERROR,
        energy=state.energy,
        n_steps=torch.full_like(accepted, num_steps, dtype=torch.long),
        step_size=step_size.squeeze(1),
    )


class Trajectory(NamedTuple):
    """End points of a trajectory: positions and whitened momenta, each ``(chains, dim)``."""

    q0: Tensor
    p0: Tensor
    q1: Tensor
    p1: Tensor


def metropolis_trajectory(
    energy: Energy,
    state: State,
    step_size: Tensor,
    metric: Metric,
    num_steps: int,
    generator: torch.Generator | None,
) -> tuple[State, Info, Trajectory]:
    r"""Run HMC trajectories of ``num_steps`` leapfrog steps with new momenta.

    The end point of each chain is accepted with probability :math:`\min(1, e^{H_0 - H_1})`.
    """
    q, grad = rows(state.x), rows(state.grad)
    p = draw_momentum(q, generator)
    uniform = uniform_like(state.energy, generator)
    start, point = State(q, state.energy, grad), Point(q, p, grad)
    longest, left = MAX_FUSED_STEPS if is_compiled(energy) else num_steps, num_steps
    # Calls of one length and a shorter last one: few compiled graphs for any number of steps.
    while left > longest:
        point = fused(_leapfrogs, energy, point, step_size, metric, num_steps=longest)
        left -= longest
    end = fused(_finish, energy, start, p, uniform, point, step_size, metric, num_steps=left)
    info = Info(
        acceptance_rate=end.acceptance_rate,
        accepted=end.accepted,
        diverging=end.diverging,
        energy=end.hamiltonian,
        n_steps=torch.full_like(end.accepted, num_steps, dtype=torch.long),
        step_size=step_size.squeeze(1),
    )
    return state_of_rows(energy, *end.kept), info, Trajectory(q, p, end.q, end.p)


class Point(NamedTuple):
    """A point of a trajectory; positions and momenta ``(chains, dim)``."""

    q: Tensor  #: position
    p: Tensor  #: whitened momentum
    grad: Tensor  #: gradient of the energy


class _End(NamedTuple):
    """End of a trajectory and the result of the accept step."""

    kept: State  #: the next state, with flattened positions ``(chains, dim)``
    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    hamiltonian: Tensor  #: Hamiltonian of the next state, with the momentum of the trajectory
    q: Tensor  #: end point of the trajectory
    p: Tensor


def _leapfrogs(
    energy: Energy, point: Point, step_size: Tensor, metric: Metric, *, num_steps: int
) -> Point:
    q, p, _, grad = leapfrog(energy, *point, step_size, metric, num_steps)
    return Point(q, p, grad)


def _finish(
    energy: Energy,
    start: State,
    momentum: Tensor,
    uniform: Tensor,
    point: Point,
    step_size: Tensor,
    metric: Metric,
    *,
    num_steps: int,
) -> _End:
    """Run the last leapfrog steps and accept or reject the end point."""
    q, p, values, grad = leapfrog(energy, *point, step_size, metric, num_steps)
    before, after = start.energy + kinetic(momentum), values + kinetic(p)
    # A non-finite energy or gradient (the gradient enters the momentum) makes the end point
    # invalid: its probability is 0; other chains are unaffected.
    error = torch.where(torch.isfinite(after), after - before, torch.inf)
    probability = torch.exp(-error).clamp(max=1.0)
    accepted = uniform < probability
    return _End(
        kept=choose(accepted, State(q, values, grad), start),
        acceptance_rate=probability,
        accepted=accepted,
        diverging=error > MAX_ENERGY_ERROR,
        hamiltonian=torch.where(accepted, after, before),
        q=q,
        p=p,
    )
