"""Choice of starting positions from which a chain can move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, value_and_grad
from pyroebm.kernels.adaptation.step_size import find_step_size
from pyroebm.kernels.base import GradientKernel, Kernel, State, choose, rows

__all__ = ["draw_starts"]

#: Maximum number of candidates for the start of one chain. If no step from any of them is
#: accepted, the last candidate of finite energy is used.
CANDIDATES = 50


def draw_starts(
    kernel: Kernel[Any],
    energy: Energy,
    num_chains: int,
    generator: torch.Generator | None = None,
    adapts: bool = True,
) -> Tensor:
    """Draw a start for each chain: the first candidate with an accepted trial leapfrog step.

    The trial uses one step size for all chains. It is found from the mean acceptance rate of at
    least half of them, so that a candidate in a region much steeper than those of the other chains
    is replaced. Energies are not compared: the lowest energy would select the neck of a funnel.
    Only kernels that follow gradients without a momentum in their state (NUTS, HMC, MALA and
    others) try their starts; for the others the first candidates are used.

    Args:
        kernel: the kernel that will move the chains.
        energy: the energy in the coordinates of the kernel; its ``initial`` draws the candidates.
        num_chains: number of chains.
        generator: source of randomness; None is torch's default generator.
        adapts: whether warm-up adapts the step size; otherwise the trial uses the kernel's own.

    Returns:
        starting positions, shape ``(num_chains, *event)``.

    Example:
        >>> from pyroebm.kernels import NUTS
        >>> from pyroebm.targets import DoubleWell
        >>> draw_starts(NUTS(), DoubleWell(), 8).shape
        torch.Size([8])
    """
    x = energy.initial(num_chains, generator)
    if not isinstance(kernel, GradientKernel) or kernel.target_acceptance is None:
        return x
    trial: Kernel[Any] = kernel.probe()
    waiting, known = (
        x.new_ones(num_chains, dtype=torch.bool),
        x.new_zeros(num_chains, dtype=torch.bool),
    )
    state = State(x, x.new_zeros(num_chains), torch.zeros_like(x))
    for _ in range(CANDIDATES):
        # Evaluate all chains: an energy may hold a value for each of them (a clamped site).
        values, grad = value_and_grad(energy, x)
        finite = torch.isfinite(values) & torch.isfinite(rows(grad)).all(1)
        state = choose(waiting & finite, State(x, values, grad), state)
        known |= finite
        # The acceptance rate of a few chains is too noisy for a step size.
        if adapts and 2 * int(known.sum()) >= num_chains:
            crossing = find_step_size(trial, energy, state, generator, counted=known)
            # The search ends at a step size at which most steps are rejected.
            trial = trial.replace(step_size=0.5 * crossing)
            adapts = False
        if not adapts:
            _, info = trial.step(energy, state, generator)
            waiting = waiting & ~(finite & info.accepted)
        if not bool(waiting.any()):
            break
        fresh = energy.initial(num_chains, generator)
        x = torch.where(waiting.reshape(-1, *[1] * (x.dim() - 1)), fresh, x)
    return state.x
