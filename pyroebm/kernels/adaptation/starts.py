"""Starting states from which a chain can move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, value_and_grad
from pyroebm.kernels.adaptation.step_size import find_step_size
from pyroebm.kernels.base import GradientKernel, Kernel, State, choose, rows

__all__ = ["draw_starts"]

#: Candidates for the start of one chain; where no step from one is accepted, the last of finite
#: energy is taken.
CANDIDATES = 50


def draw_starts(
    kernel: Kernel[Any],
    energy: Energy,
    num_chains: int,
    generator: torch.Generator | None = None,
    adapts: bool = True,
) -> Tensor:
    """Draw a start for each chain: the first candidate from which a trial leapfrog step is
    accepted.

    The step size of the trial is one for all chains, found from the mean acceptance of at least
    half of them, so that a candidate in a region much steeper than those of the other chains is
    drawn anew. Nothing else is compared: the lowest energy, for one, would be in the neck of a
    funnel. Only kernels that follow gradients without a momentum of their own (NUTS, HMC, MALA and
    their like) try their starts; of others the first candidates are taken.

    Args:
        kernel: the kernel that will move the chains.
        energy: the energy in the coordinates of the kernel; its ``initial`` gives the candidates.
        num_chains: number of chains.
        generator: source of randomness; None is torch's global one.
        adapts: whether warm-up adapts the step size; else the trial takes the kernel's own.

    Returns:
        starting states, shape ``(n, *event)``.

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
        # All rows are evaluated, since an energy may hold something of its own for each (a clamped
        # value).
        values, grad = value_and_grad(energy, x)
        finite = torch.isfinite(values) & torch.isfinite(rows(grad)).all(1)
        state = choose(waiting & finite, State(x, values, grad), state)
        known |= finite
        if (
            adapts and 2 * int(known.sum()) >= num_chains
        ):  # the acceptance of one chain of many says little
            crossing = find_step_size(trial, energy, state, generator, counted=known)
            # the search ends where most steps are rejected
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
