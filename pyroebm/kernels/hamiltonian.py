r"""Hamiltonian dynamics on rows ``(chains, dim)``: kinetic energy, leapfrog, and the
Metropolis-corrected trajectory.

Momenta are whitened: with :math:`A A^\top = M^{-1}` the momentum kept is :math:`A^\top p`, standard
normal in equilibrium whatever the metric is. In these coordinates the mass is the identity.
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

#: An energy error above this many nats counts as a divergence (Betancourt, 2017; the value Stan
#: uses).
MAX_ENERGY_ERROR = 1000.0

#: No trajectory of jittered length has more leapfrog steps.
MAX_STEPS = 1000

#: Leapfrog steps in one compiled block.
MAX_BLOCK = 4


def kinetic(p: Tensor) -> Tensor:
    r""":math:`K(p) = \frac12 |p|^2` of each row, for whitened momenta."""
    energies: Tensor = 0.5 * torch.linalg.vecdot(p, p)
    return energies


def draw_momentum(q: Tensor, generator: torch.Generator | None) -> Tensor:
    r""":math:`p \sim N(0, I)` for each row."""
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
    r"""``num_steps`` steps of the leapfrog integrator: reversible, volume preserving, of second
    order.

    .. math::

        p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q), \quad
        q \leftarrow q + \epsilon A p, \quad p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q)

    Args:
        energy: the energy of the positions.
        q, p, grad: positions, whitened momenta and energy gradients at ``q``, shape ``(chains,
            dim)``.
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
    r""":math:`\lceil h \ell / \epsilon \rceil` leapfrog steps, h uniform on (0, 1),
    :math:`\epsilon` the median over chains."""
    h = uniform_like(step_size[:1], generator)
    return max(1, min(math.ceil(float(h * length / step_size.median())), MAX_STEPS))


def metropolis(
    old: S,
    new: S,
    error: Tensor,
    step_size: Tensor,
    num_steps: int,
    generator: torch.Generator | None,
) -> tuple[S, Info]:
    r"""Take the new state with probability :math:`\min(1, e^{-\Delta})`, else keep the old one; row
    by row.

    Args:
        old, new: states.
        error: :math:`\Delta`, the change of :math:`-\log` of the joint density, or of the
            Metropolis-Hastings ratio, shape ``(chains,)``. Where it is not finite the row has no
            valid new state: its probability is 0, and no other row knows.
        step_size: for the report, shape ``(chains, 1)``.
        num_steps: gradient evaluations, for the report.
        generator: source of the uniform numbers.
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
    """Where a trajectory began and ended: positions and whitened momenta, each ``(chains,
    dim)``."""

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
    r"""Draw a momentum, follow ``num_steps`` leapfrog steps, accept with :math:`\min(1, e^{H_0 -
    H_1})`; row by row."""
    q, grad = rows(state.x), rows(state.grad)
    p = draw_momentum(q, generator)
    uniform = uniform_like(state.energy, generator)
    start, point = State(q, state.energy, grad), Point(q, p, grad)
    longest, left = MAX_BLOCK if is_compiled(energy) else num_steps, num_steps
    # calls of one length, and a last one of that or less: few graphs for any number of steps
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
    """A point of a trajectory; rows ``(chains, dim)``."""

    q: Tensor  #: position
    p: Tensor  #: whitened momentum
    grad: Tensor  #: gradient of the energy


class _End(NamedTuple):
    """The end of a trajectory, and what becomes of it."""

    kept: State  #: the next state, as rows ``(chains, dim)``
    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    hamiltonian: Tensor  #: of the next state, with the momentum that led there
    q: Tensor  #: where the trajectory ended
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
    """The last leapfrog steps, and whether what they reach is accepted."""
    q, p, values, grad = leapfrog(energy, *point, step_size, metric, num_steps)
    before, after = start.energy + kinetic(momentum), values + kinetic(p)
    # A row that met a NaN or an infinity in its energy or its gradient (which is in the momentum)
    # has no valid end point: its probability is 0, and no other row knows.
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
