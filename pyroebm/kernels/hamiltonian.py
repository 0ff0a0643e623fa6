r"""Hamiltonian dynamics on rows ``(chains, dim)``: kinetic energy, leapfrog, and the Metropolis-corrected trajectory.

Momenta are whitened: with :math:`A A^\top = M^{-1}` the momentum kept is :math:`A^\top p`, standard normal in equilibrium
whatever the metric is. In these coordinates the mass is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.base import Info, State, choose, normal_like, row_value_and_grad, rows, state_of_rows, uniform_like
from pyroebm.kernels.metric import Metric

__all__ = ["MAX_ENERGY_ERROR", "kinetic", "draw_momentum", "leapfrog", "metropolis_trajectory"]

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


def metropolis_trajectory(
    energy: Energy, state: State, step_size: Tensor, metric: Metric, num_steps: int, generator: torch.Generator | None
) -> tuple[State, Info]:
    r"""Draw a momentum, follow ``num_steps`` leapfrog steps, accept with :math:`\min(1, e^{H_0 - H_1})`; row by row."""
    q = rows(state.x)
    p = draw_momentum(q, generator)
    start = state.energy + kinetic(p)
    q, p, values, grad = leapfrog(energy, q, p, rows(state.grad), step_size, metric, num_steps)
    end = values + kinetic(p)
    # A row that met a NaN or an infinity in its energy or its gradient (which is in the momentum) has no valid end point: its
    # probability is 0, and no other row knows.
    error = torch.where(torch.isfinite(end), end - start, torch.inf)
    probability = torch.exp(-error).clamp(max=1.0)
    accepted = uniform_like(probability, generator) < probability
    info = Info(
        acceptance_rate=probability,
        accepted=accepted,
        diverging=error > MAX_ENERGY_ERROR,
        energy=torch.where(accepted, end, start),
        n_steps=torch.full_like(accepted, num_steps, dtype=torch.long),
        step_size=step_size.squeeze(1),
    )
    return choose(accepted, state_of_rows(energy, q, values, grad), state), info
