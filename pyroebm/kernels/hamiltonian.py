r"""Hamiltonian dynamics on rows ``(chains, dim)``: kinetic energy, leapfrog, and the Metropolis-corrected trajectory.

Momenta are whitened: with :math:`A A^\top = M^{-1}` the momentum kept is :math:`A^\top p`, standard normal in equilibrium
whatever the metric is. In these coordinates the mass is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.compiled import fused, is_compiled
from pyroebm.energy import Energy
from pyroebm.kernels.base import Info, State, choose, normal_like, row_value_and_grad, rows, state_of_rows, uniform_like
from pyroebm.kernels.metric import Metric

__all__ = ["MAX_ENERGY_ERROR", "kinetic", "draw_momentum", "leapfrog", "metropolis_trajectory", "trajectory"]

#: An energy error above this many nats counts as a divergence (Betancourt, 2017; the value Stan uses).
MAX_ENERGY_ERROR = 1000.0


def kinetic(p: Tensor) -> Tensor:
    r""":math:`K(p) = \frac12 |p|^2` of each row, for whitened momenta."""
    return 0.5 * torch.linalg.vecdot(p, p)


def draw_momentum(q: Tensor, generator: torch.Generator | None) -> Tensor:
    r""":math:`p \sim N(0, I)` for each row."""
    return normal_like(q, generator)


def leapfrog(
    energy: Energy, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, metric: Metric, num_steps: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""``num_steps`` steps of the leapfrog integrator: reversible, volume preserving, of second order.

    .. math:: p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q), \quad q \leftarrow q + \epsilon A p, \quad
        p \leftarrow p - \tfrac{\epsilon}{2} A^\top \nabla E(q)

    Args:
        energy: the energy of the positions.
        q, p, grad: positions, whitened momenta and energy gradients at ``q``, shape ``(chains, dim)``.
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


def trajectory(
    energy: Energy, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, metric: Metric, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`leapfrog`, for a compiled energy in blocks of four steps and of one, so that any length needs two graphs."""
    if not is_compiled(energy):
        return leapfrog(energy, q, p, grad, step_size, metric, num_steps)
    for size in (4,) * (num_steps // 4) + (1,) * (num_steps % 4):
        q, p, values, grad = fused(_leapfrogs, energy, q, p, grad, step_size, *metric, kind=type(metric), num_steps=size)
    return q, p, values, grad


def _leapfrogs(
    energy: Energy, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, *metric: Tensor, kind: type[Metric], num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return leapfrog(energy, q, p, grad, step_size, kind(*metric), num_steps)


def metropolis_trajectory(
    energy: Energy, state: State, step_size: Tensor, metric: Metric, num_steps: int, generator: torch.Generator | None
) -> tuple[State, Info]:
    r"""Draw a momentum, follow ``num_steps`` leapfrog steps, accept with :math:`\min(1, e^{H_0 - H_1})`; row by row."""
    q, grad = rows(state.x), rows(state.grad)
    p = draw_momentum(q, generator)
    uniform = uniform_like(state.energy, generator)
    end = trajectory(energy, q, p, grad, step_size, metric, num_steps)
    out = fused(_accept, energy, uniform, p, q, state.energy, grad, *end)
    info = Info(
        acceptance_rate=out[3],
        accepted=out[4],
        diverging=out[5],
        energy=out[6],
        n_steps=torch.full_like(out[4], num_steps, dtype=torch.long),
        step_size=step_size.squeeze(1),
    )
    return state_of_rows(energy, *out[:3]), info


def _accept(
    energy: Energy, uniform: Tensor, p_old: Tensor, q_old: Tensor, old: Tensor, grad_old: Tensor, *end: Tensor
) -> tuple[Tensor, ...]:
    q, p, values, grad = end
    start, stop = old + kinetic(p_old), values + kinetic(p)
    # A row that met a NaN or an infinity in its energy or its gradient (which is in the momentum) has no valid end point: its
    # probability is 0, and no other row knows.
    error = torch.where(torch.isfinite(stop), stop - start, torch.inf)
    probability = torch.exp(-error).clamp(max=1.0)
    accepted = uniform < probability
    kept = choose(accepted, State(q, values, grad), State(q_old, old, grad_old))
    return (*kept, probability, accepted, error > MAX_ENERGY_ERROR, torch.where(accepted, stop, start))
