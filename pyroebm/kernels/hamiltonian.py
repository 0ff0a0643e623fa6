"""Hamiltonian dynamics on rows ``(chains, dim)``: kinetic energy, leapfrog, and the Metropolis-corrected trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.base import Info, State, choose, normal_like, row_value_and_grad, rows, state_of_rows, uniform_like

__all__ = ["MAX_ENERGY_ERROR", "kinetic", "draw_momentum", "leapfrog", "metropolis_trajectory"]

#: An energy error above this many nats counts as a divergence (Betancourt, 2017; the value Stan uses).
MAX_ENERGY_ERROR = 1000.0


def kinetic(p: Tensor, inverse_mass: Tensor) -> Tensor:
    r""":math:`K(p) = \frac12 p^\top M^{-1} p` of each row."""
    return 0.5 * torch.linalg.vecdot(p, p * inverse_mass)


def draw_momentum(q: Tensor, inverse_mass: Tensor, generator: torch.Generator | None) -> Tensor:
    r""":math:`p \sim N(0, M)` for each row."""
    return normal_like(q, generator) * inverse_mass.rsqrt()


def leapfrog(
    energy: Energy, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, inverse_mass: Tensor, num_steps: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""``num_steps`` steps of the leapfrog integrator: reversible, volume preserving, of second order.

    .. math:: p \leftarrow p - \tfrac{\epsilon}{2} \nabla E(q), \quad q \leftarrow q + \epsilon M^{-1} p, \quad
        p \leftarrow p - \tfrac{\epsilon}{2} \nabla E(q)

    Args:
        energy: the energy of the positions.
        q, p, grad: positions, momenta and energy gradients at ``q``, shape ``(chains, dim)``.
        step_size: :math:`\epsilon`, shape ``(chains, 1)``; negative steps run backwards in time.
        inverse_mass: diagonal of :math:`M^{-1}`, shape ``(dim,)``.
        num_steps: number of steps.

    Returns:
        positions, momenta, energies ``(chains,)`` and gradients at the end.
    """
    drift = step_size * inverse_mass
    half = 0.5 * step_size
    p = p - half * grad
    for step in range(num_steps):
        q = q + drift * p
        values, grad = row_value_and_grad(energy, q)
        p = p - (step_size if step + 1 < num_steps else half) * grad
    return q, p, values, grad


def metropolis_trajectory(
    energy: Energy, state: State, step_size: Tensor, inverse_mass: Tensor, num_steps: int, generator: torch.Generator | None
) -> tuple[State, Info]:
    r"""Draw a momentum, follow ``num_steps`` leapfrog steps, accept with :math:`\min(1, e^{H_0 - H_1})`; row by row."""
    q = rows(state.x)
    p = draw_momentum(q, inverse_mass, generator)
    start = state.energy + kinetic(p, inverse_mass)
    q, p, values, grad = leapfrog(energy, q, p, rows(state.grad), step_size, inverse_mass, num_steps)
    end = values + kinetic(p, inverse_mass)
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
