"""No-U-turn sampler for many chains in lock-step: one leapfrog step of all chains at a time."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    Info,
    State,
    column,
    rows,
    state_of_rows,
    uniform_like,
)
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR, draw_momentum, kinetic, leapfrog
from pyroebm.kernels.metric import Metric, metric_of

__all__ = ["step"]

#: Number of leapfrog steps between checks whether all chains are done, which synchronize a GPU.
LEAVES = 4


class _Settings(Protocol):
    """Settings of the kernel that a step uses."""

    @property
    def step_size(self) -> float | Tensor: ...
    @property
    def inverse_mass(self) -> Tensor | Metric | None: ...
    @property
    def max_tree_depth(self) -> int: ...


class _Point(NamedTuple):
    """One end of a trajectory; fields ``(chains, dim)``."""

    q: Tensor
    p: Tensor
    grad: Tensor


class _Proposal(NamedTuple):
    """A leaf drawn from those of a trajectory, or of half of one."""

    q: Tensor
    energy: Tensor
    grad: Tensor
    hamiltonian: Tensor


class _Half(NamedTuple):
    """Half that a doubling adds to a trajectory, and which chains are still extending it."""

    end: _Point
    proposal: _Proposal
    log_weight: Tensor  # log sum exp(H0 - H) over the leaves
    momentum_sum: Tensor
    running: Tensor
    turned: Tensor
    diverged: Tensor
    n_steps: Tensor
    acceptance: Tensor


class _Trajectory(NamedTuple):
    """Trajectory under construction.

    ``front`` is the end reached last, ``step`` the step that led there and ``back`` the other end.
    The remaining fields summarize what is between the ends and report on each chain.
    """

    front: _Point
    back: _Point
    proposal: _Proposal
    log_weight: Tensor
    momentum_sum: Tensor
    step: Tensor  # (chains, 1), negative backwards in time
    growing: Tensor
    diverging: Tensor
    accepted: Tensor
    depth: Tensor
    n_steps: Tensor
    acceptance: Tensor


_T = TypeVar("_T", _Point, _Proposal)


def _where(chosen: Tensor, new: _T, old: _T) -> _T:
    return type(new)(
        *(
            torch.where(chosen.unsqueeze(1) if a.dim() == 2 else chosen, a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _is_turning(p_a: Tensor, p_b: Tensor, momentum_sum: Tensor) -> Tensor:
    """Whether the ends of a trajectory move towards each other.

    The sum of momenta minus half of both ends is the trapezoidal rule for the difference of the
    positions of the ends. Without this correction a trajectory of few leaves seems longer than it
    is. The criterion is symmetric in the ends, so the direction of time does not matter. Momenta
    and the difference are in whitened coordinates.
    """
    span = momentum_sum - 0.5 * (p_a + p_b)
    return torch.minimum(torch.linalg.vecdot(p_a, span), torch.linalg.vecdot(p_b, span)) <= 0


def _slots(leaf: int) -> tuple[int, int]:
    """Return the slots of the left ends of the balanced subtrees that an odd ``leaf`` completes.

    An even leaf is stored in slot (number of ones in leaf // 2). Slot numbers are Python ints,
    shared by all chains. The slots are returned as lowest and highest.
    """
    high = (leaf >> 1).bit_count()
    trailing_ones = (~leaf & (leaf + 1)).bit_length() - 1
    return high - trailing_ones + 1, high


def step(
    kernel: _Settings, energy: Energy, state: State, generator: torch.Generator | None
) -> tuple[State, Info]:
    """Make one draw of every chain.

    Random numbers come from a generator seeded for the step, so that the random numbers of later
    steps do not depend on the depth of the trees.
    """
    q, grad = rows(state.x), rows(state.grad)
    rng = _spawn(generator, q.device)
    size, metric = column(kernel.step_size, q), metric_of(kernel.inverse_mass, q)
    p = draw_momentum(q, rng)
    h0 = state.energy + kinetic(p)
    zero, none = torch.zeros_like(h0), torch.zeros_like(h0, dtype=torch.bool)
    point = _Point(q, p, grad)
    tree = _Trajectory(
        front=point,
        back=point,
        proposal=_Proposal(q, state.energy, grad, h0),
        log_weight=zero,
        momentum_sum=p,
        step=size,
        growing=~none,
        diverging=none,
        accepted=none,
        depth=none.long(),
        n_steps=none.long(),
        acceptance=zero,
    )
    for level in range(kernel.max_tree_depth):
        if not bool(tree.growing.any()):
            break
        tree = _double(energy, metric, h0, tree, 2**level, rng)
    info = Info(
        acceptance_rate=tree.acceptance / tree.n_steps,
        accepted=tree.accepted,
        diverging=tree.diverging,
        energy=tree.proposal.hamiltonian,
        n_steps=tree.n_steps,
        step_size=size.squeeze(1),
        tree_depth=tree.depth,
        reached_max_treedepth=tree.growing,
    )
    found = tree.proposal
    return state_of_rows(energy, found.q, found.energy, found.grad), info


def _spawn(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return torch.Generator(device).manual_seed(seed)


def _double(
    energy: Energy,
    metric: Metric,
    h0: Tensor,
    tree: _Trajectory,
    leaves: int,
    rng: torch.Generator,
) -> _Trajectory:
    """Double the trajectory forwards or backwards in time, with equal probability."""
    noise = uniform_like(h0.expand(leaves + 2, -1), rng)
    forward = noise[0] < 0.5
    front, back = _where(forward, tree.front, tree.back), _where(forward, tree.back, tree.front)
    tree = tree._replace(
        front=front, back=back, step=torch.where(forward.unsqueeze(1), tree.step, -tree.step)
    )
    none = torch.zeros_like(tree.growing)
    half = _Half(
        end=front,
        proposal=tree.proposal,
        log_weight=torch.full_like(h0, -torch.inf),
        momentum_sum=torch.zeros_like(front.p),
        running=tree.growing,
        turned=none,
        diverged=none,
        n_steps=tree.n_steps,
        acceptance=tree.acceptance,
    )
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf in range(leaves):
        half = _leaf(energy, metric, h0, tree.step, noise[2 + leaf], half)
        low, high = _slots(leaf)
        if leaf % 2 == 0:
            stored[high] = (half.end.p, half.momentum_sum)
            continue
        turned = half.turned
        for slot in range(high, low - 1, -1):
            p_first, sum_first = stored[slot]
            turns = _is_turning(p_first, half.end.p, half.momentum_sum - sum_first + p_first)
            turned = turned | (half.running & turns)
        half = half._replace(turned=turned, running=half.running & ~turned)
        if leaf % LEAVES == LEAVES - 1 and not bool(half.running.any()):
            break
    return _merged(noise[1], half, tree)


def _leaf(
    energy: Energy, metric: Metric, h0: Tensor, step: Tensor, uniform: Tensor, half: _Half
) -> _Half:
    """Take one leapfrog step and update the proposal of the half."""
    running = half.running
    q, p, values, grad = leapfrog(energy, *half.end, step, metric)
    # A non-finite gradient enters the momentum, so it is detected here as well.
    hamiltonian = values + kinetic(p)
    error = torch.where(torch.isfinite(hamiltonian), hamiltonian - h0, torch.inf)
    n_steps = half.n_steps + running
    acceptance = half.acceptance + torch.exp(-error).clamp(max=1.0) * running
    diverged = half.diverged | (running & (error > MAX_ENERGY_ERROR))
    running = running & ~diverged
    end = _where(running, _Point(q, p, grad), half.end)
    log_weight = torch.logaddexp(half.log_weight, -error)
    take = running & (uniform.log() < -error - log_weight)
    return half._replace(
        end=end,
        proposal=_where(take, _Proposal(q, values, grad, hamiltonian), half.proposal),
        log_weight=torch.where(running, log_weight, half.log_weight),
        momentum_sum=half.momentum_sum + end.p,
        running=running,
        diverged=diverged,
        n_steps=n_steps,
        acceptance=acceptance,
    )


def _merged(uniform: Tensor, half: _Half, tree: _Trajectory) -> _Trajectory:
    """Merge a doubling into its trajectory, and check the whole for a U-turn.

    The proposal of the new half is accepted with probability min(1, w_new / w_old) (biased
    progressive sampling).
    """
    whole = tree.growing & ~half.diverged & ~half.turned
    take = whole & (uniform.log() < half.log_weight - tree.log_weight)
    momentum_sum = tree.momentum_sum + half.momentum_sum
    return _Trajectory(
        front=half.end,
        back=tree.back,
        proposal=_where(take, half.proposal, tree.proposal),
        log_weight=torch.where(
            whole, torch.logaddexp(tree.log_weight, half.log_weight), tree.log_weight
        ),
        momentum_sum=momentum_sum,
        step=tree.step,
        growing=whole & ~_is_turning(half.end.p, tree.back.p, momentum_sum),
        diverging=tree.diverging | half.diverged,
        accepted=tree.accepted | take,
        depth=tree.depth + tree.growing,
        n_steps=half.n_steps,
        acceptance=half.acceptance,
    )
