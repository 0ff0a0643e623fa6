"""The no-U-turn sampler for many chains in lock-step: one leapfrog step of all chains at a time."""

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

#: Leapfrog steps after which it is asked whether any row goes on: a device waits for the answer.
LEAVES = 4


class _Settings(Protocol):
    """What a step asks of the kernel."""

    @property
    def step_size(self) -> float | Tensor: ...
    @property
    def inverse_mass(self) -> Tensor | Metric | None: ...
    @property
    def max_tree_depth(self) -> int: ...


class _Point(NamedTuple):
    """One end of a trajectory, rows ``(chains, dim)``."""

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
    """What a doubling adds, and which rows go on with it."""

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
    """The end reached last and the step that led there, the other end, what lies between, and a
    report of each row."""

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

    The sum of momenta less half of both ends is the trapezoidal rule for the distance between the
    ends: without the correction a trajectory of few leaves looks longer than it is. Symmetric in
    the ends, so the direction of time does not matter. Momenta are whitened, and so is the way.
    """
    way = momentum_sum - 0.5 * (p_a + p_b)
    return torch.minimum(torch.linalg.vecdot(p_a, way), torch.linalg.vecdot(p_b, way)) <= 0


def _slots(leaf: int) -> tuple[int, int]:
    """Which stored left ends close a balanced subtree at an odd ``leaf``: slots low to high.

    An even leaf is kept in slot (number of ones in leaf // 2). Slot numbers are Python ints, shared
    by all chains.
    """
    high = (leaf >> 1).bit_count()
    trailing_ones = (~leaf & (leaf + 1)).bit_length() - 1
    return high - trailing_ones + 1, high


def step(
    kernel: _Settings, energy: Energy, state: State, generator: torch.Generator | None
) -> tuple[State, Info]:
    """One draw of every chain.

    Random numbers come from a generator spawned for the step: what one chain draws does not depend
    on how far others go.
    """
    q, grad = rows(state.x), rows(state.grad)
    rng = _spawn(generator, q.device)
    size, metric = column(kernel.step_size, q), metric_of(kernel.inverse_mass, q)
    p = draw_momentum(q, rng)
    h0 = state.energy + kinetic(p)
    zero, none = torch.zeros_like(h0), torch.zeros_like(h0, dtype=torch.bool)
    point = _Point(q, p, grad)
    way = _Trajectory(
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
        if not bool(way.growing.any()):
            break
        way = _double(energy, metric, h0, way, 2**level, rng)
    info = Info(
        acceptance_rate=way.acceptance / way.n_steps,
        accepted=way.accepted,
        diverging=way.diverging,
        energy=way.proposal.hamiltonian,
        n_steps=way.n_steps,
        step_size=size.squeeze(1),
        tree_depth=way.depth,
        reached_max_treedepth=way.growing,
    )
    found = way.proposal
    return state_of_rows(energy, found.q, found.energy, found.grad), info


def _spawn(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return torch.Generator(device).manual_seed(seed)


def _double(
    energy: Energy,
    metric: Metric,
    h0: Tensor,
    way: _Trajectory,
    leaves: int,
    rng: torch.Generator,
) -> _Trajectory:
    """One doubling: go on from the front or turn round, with equal chances."""
    noise = uniform_like(h0.expand(leaves + 2, -1), rng)
    on = noise[0] < 0.5
    front, back = _where(on, way.front, way.back), _where(on, way.back, way.front)
    way = way._replace(
        front=front, back=back, step=torch.where(on.unsqueeze(1), way.step, -way.step)
    )
    none = torch.zeros_like(way.growing)
    half = _Half(
        end=front,
        proposal=way.proposal,
        log_weight=torch.full_like(h0, -torch.inf),
        momentum_sum=torch.zeros_like(front.p),
        running=way.growing,
        turned=none,
        diverged=none,
        n_steps=way.n_steps,
        acceptance=way.acceptance,
    )
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf in range(leaves):
        half = _leaf(energy, metric, h0, way.step, noise[2 + leaf], half)
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
    return _merged(noise[1], half, way)


def _leaf(
    energy: Energy, metric: Metric, h0: Tensor, step: Tensor, uniform: Tensor, half: _Half
) -> _Half:
    """One leapfrog step, and perhaps a new proposal."""
    running = half.running
    q, p, values, grad = leapfrog(energy, *half.end, step, metric)
    # a non-finite gradient is in the momentum, and so in here
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


def _merged(uniform: Tensor, half: _Half, way: _Trajectory) -> _Trajectory:
    """Join a doubling to its trajectory: biased progressive draw between the halves, min(1, w_new /
    w_old), and a last check."""
    whole = way.growing & ~half.diverged & ~half.turned
    take = whole & (uniform.log() < half.log_weight - way.log_weight)
    momentum_sum = way.momentum_sum + half.momentum_sum
    return _Trajectory(
        front=half.end,
        back=way.back,
        proposal=_where(take, half.proposal, way.proposal),
        log_weight=torch.where(
            whole, torch.logaddexp(way.log_weight, half.log_weight), way.log_weight
        ),
        momentum_sum=momentum_sum,
        step=way.step,
        growing=whole & ~_is_turning(half.end.p, way.back.p, momentum_sum),
        diverging=way.diverging | half.diverged,
        accepted=way.accepted | take,
        depth=way.depth + way.growing,
        n_steps=half.n_steps,
        acceptance=half.acceptance,
    )
