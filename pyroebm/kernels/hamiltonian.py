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
    total = num_steps
    kind = type(metric)
    start = (p, q, state.energy, grad)
    point: tuple[Tensor, ...] = (q, p, grad)
    most = MAX_BLOCK if is_compiled(energy) else num_steps
    # blocks of one length, and a last one of that or less: few graphs for any number of steps
    while num_steps > most:
        point = fused(_leapfrogs, energy, *point, step_size, *metric, kind=kind, num_steps=most)
        num_steps -= most
    out = fused(
        _finish, energy, uniform, *start, *point, step_size, *metric, kind=kind, num_steps=num_steps
    )
    info = Info(
        acceptance_rate=out[3],
        accepted=out[4],
        diverging=out[5],
        energy=out[6],
        n_steps=torch.full_like(out[4], total, dtype=torch.long),
        step_size=step_size.squeeze(1),
    )
    return state_of_rows(energy, *out[:3]), info, Trajectory(q, p, out[7], out[8])


def _leapfrogs(
    energy: Energy,
    q: Tensor,
    p: Tensor,
    grad: Tensor,
    step_size: Tensor,
    *metric: Tensor,
    kind: type[Metric],
    num_steps: int,
) -> tuple[Tensor, ...]:
    q, p, _, grad = leapfrog(energy, q, p, grad, step_size, kind(*metric), num_steps)
    return q, p, grad


def _finish(
    energy: Energy,
    uniform: Tensor,
    p_old: Tensor,
    q_old: Tensor,
    old: Tensor,
    grad_old: Tensor,
    *tensors: Tensor,
    kind: type[Metric],
    num_steps: int,
) -> tuple[Tensor, ...]:
    """The last leapfrog steps, and whether what they reach is accepted."""
    q, p, grad, step_size, *metric = tensors
    q, p, values, grad = leapfrog(energy, q, p, grad, step_size, kind(*metric), num_steps)
    start, stop = old + kinetic(p_old), values + kinetic(p)
    # A row that met a NaN or an infinity in its energy or its gradient (which is in the momentum)
    # has no valid end point: its probability is 0, and no other row knows.
    error = torch.where(torch.isfinite(stop), stop - start, torch.inf)
    probability = torch.exp(-error).clamp(max=1.0)
    accepted = uniform < probability
    kept = choose(accepted, State(q, values, grad), State(q_old, old, grad_old))
    return (
        *kept,
        probability,
        accepted,
        error > MAX_ENERGY_ERROR,
        torch.where(accepted, stop, start),
        q,
        p,
    )
