"""The no-U-turn sampler for many chains in lock-step: one leapfrog step of all chains at a time."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroebm.compiled import fused, is_compiled
from pyroebm.energy import Energy
from pyroebm.kernels.base import GradientKernel, Info, State, column, rows, state_of_rows, uniform_like
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR, draw_momentum, kinetic, leapfrog
from pyroebm.kernels.metric import Metric, metric_of

__all__ = ["NUTS"]

#: Leapfrog steps in one compiled block; an eager one is a single step, so that no row waits longer than it must.
LEAVES = 4


class _Point(NamedTuple):
    """One end of a trajectory, rows ``(chains, dim)``."""

    q: Tensor
    p: Tensor
    grad: Tensor


class _Tree(NamedTuple):
    """What a trajectory, or half of one, has gathered; a proposal of each row and the weight of what it was drawn from."""

    q: Tensor
    energy: Tensor
    grad: Tensor
    hamiltonian: Tensor
    log_weight: Tensor  # log sum exp(H0 - H) over the leaves
    momentum_sum: Tensor


class _Counts(NamedTuple):
    """Which rows go on, and what is counted of each, ``(chains,)``."""

    running: Tensor
    turned: Tensor
    diverged: Tensor
    n_steps: Tensor
    acceptance: Tensor


def _where(rows_: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.where(rows_.unsqueeze(1) if a.dim() == 2 else rows_, a, b) for a, b in zip(new, old, strict=True)]


def _is_turning(p_a: Tensor, p_b: Tensor, momentum_sum: Tensor) -> Tensor:
    """Whether the ends of a trajectory move towards each other.

    The sum of momenta less half of both ends is the trapezoidal rule for the distance between the ends: without the correction
    a trajectory of few leaves looks longer than it is. Symmetric in the ends, so the direction of time does not matter. Momenta
    are whitened, and so is the way.
    """
    way = momentum_sum - 0.5 * (p_a + p_b)
    return torch.minimum(torch.linalg.vecdot(p_a, way), torch.linalg.vecdot(p_b, way)) <= 0


def _slots(leaf: int) -> tuple[int, int]:
    """Which stored left ends close a balanced subtree at an odd ``leaf``: slots low to high.

    An even leaf is kept in slot (number of ones in leaf // 2). Slot numbers are Python ints, shared by all chains.
    """
    high = (leaf >> 1).bit_count()
    trailing_ones = (~leaf & (leaf + 1)).bit_length() - 1
    return high - trailing_ones + 1, high


@dataclasses.dataclass(frozen=True, eq=False)
class NUTS(GradientKernel):
    r"""Multinomial no-U-turn sampler (Hoffman and Gelman, 2014; Betancourt, 2017): exact.

    A trajectory doubles forwards or backwards in time until its ends approach each other; the next state is drawn from its leaves
    with weights :math:`e^{-H}`, biased towards the newer half. The tree is built by iteration, with one stored left end for each
    level (Phan, Pradhan and Jankowiak, 2019), so that all chains take each leapfrog step together; a chain that is done waits.

    Random numbers of a step come from a generator spawned for it: what one chain draws does not depend on how far others go.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.8.
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric; None is the identity.
        max_tree_depth: most doublings, 1 to 20: at most :math:`2^{depth} - 1` leapfrog steps.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = NUTS(step_size=0.2), DoubleWell()
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape, bool((info.n_steps <= 2**info.tree_depth - 1).all())
        (torch.Size([8]), True)
    """

    max_tree_depth: int = 10

    target_acceptance: ClassVar[float | None] = 0.8
    has_momentum: ClassVar[bool] = True
    expected_gradients: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_tree_depth <= 20:
            raise ValueError(f"NUTS: max_tree_depth must be from 1 to 20, got max_tree_depth={self.max_tree_depth}")

    def step(self, energy: Energy, state: State, generator: torch.Generator | None = None) -> tuple[State, Info]:
        q, grad = rows(state.x), rows(state.grad)
        rng = _spawn(generator, q.device)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        p = draw_momentum(q, rng)
        h0 = state.energy + kinetic(p)
        left = right = _Point(q, p, grad)
        tree = _Tree(q, state.energy, grad, h0, torch.zeros_like(h0), p)
        growing = torch.ones_like(h0, dtype=torch.bool)
        diverging, accepted = torch.zeros_like(growing), torch.zeros_like(growing)
        depth, n_steps = torch.zeros_like(h0, dtype=torch.long), torch.zeros_like(h0, dtype=torch.long)
        acceptance = torch.zeros_like(h0)

        for level in range(self.max_tree_depth):
            if not bool(growing.any()):
                break
            noise = uniform_like(h0.expand(2, -1), rng)
            log_uniform = uniform_like(h0.expand(2**level, -1), rng).log()
            *point, signed, zeros, unlikely = fused(_open, energy, noise[0], eps, h0, *left, *right)
            half = _Tree(point[0], h0, point[2], h0, unlikely, zeros)
            none = torch.zeros_like(growing)
            counts = _Counts(growing, none, none, n_steps, acceptance)
            end, half, counts = _grow(energy, metric, h0, signed, log_uniform, _Point(*point), half, counts)
            n_steps, acceptance = counts.n_steps, counts.acceptance
            out = fused(_merge, energy, noise, growing, *counts[1:3], *end, *half, *tree, *left, *right)
            left, right, tree = _Point(*out[:3]), _Point(*out[3:6]), _Tree(*out[6:12])
            depth, diverging, accepted = depth + growing, diverging | counts.diverged, accepted | out[12]
            growing = out[13]

        info = Info(
            acceptance_rate=acceptance / n_steps,
            accepted=accepted,
            diverging=diverging,
            energy=tree.hamiltonian,
            n_steps=n_steps,
            step_size=eps.squeeze(1),
            tree_depth=depth,
        )
        return state_of_rows(energy, tree.q, tree.energy, tree.grad), info


def _spawn(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return torch.Generator(device).manual_seed(seed)


def _open(energy: Energy, uniform: Tensor, eps: Tensor, h0: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
    """The end from which a doubling goes on, its step, and an empty half: momentum sum 0, log weight minus infinity."""
    forwards = uniform < 0.5
    left, right = ends[:3], ends[3:]
    signed = torch.where(forwards.unsqueeze(1), eps, -eps)
    return (*_where(forwards, right, left), signed, torch.zeros_like(left[0]), torch.full_like(h0, -torch.inf))


def _grow(
    energy: Energy,
    metric: Metric,
    h0: Tensor,
    signed: Tensor,
    log_uniform: Tensor,
    point: _Point,
    tree: _Tree,
    counts: _Counts,
) -> tuple[_Point, _Tree, _Counts]:
    """One doubling from one end, in blocks of leaves; blocks are the leaves of a tree of their own, checked like it."""
    leaves = len(log_uniform)
    size = LEAVES if is_compiled(energy) and leaves >= LEAVES else 1
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for block in range(leaves // size):
        noise = log_uniform[block * size : (block + 1) * size]
        out = fused(_leaves, energy, noise, h0, signed, *point, *tree, *counts, *metric, kind=type(metric), size=size)
        point, tree, counts = _Point(*out[:3]), _Tree(*out[3:9]), _Counts(*out[9:14])
        low, high = _slots(block)
        if block % 2 == 0:
            stored[high] = (out[14], out[15])
            continue
        for slot in range(high, low - 1, -1):
            turned = fused(_check, energy, *stored[slot], point.p, tree.momentum_sum, counts.running, counts.turned)[0]
            counts = counts._replace(turned=turned)
        counts = counts._replace(running=counts.running & ~counts.turned)
        if block + 1 < leaves // size and not bool(counts.running.any()):
            break
    return point, tree, counts


def _leaves(
    energy: Energy, log_uniform: Tensor, h0: Tensor, signed: Tensor, *tensors: Tensor, kind: type[Metric], size: int
) -> tuple[Tensor, ...]:
    """``size`` leaves of a doubling, checked for turns of every balanced subtree within; with it, what its first leaf stores."""
    point, tree, counts, metric = _Point(*tensors[:3]), _Tree(*tensors[3:9]), _Counts(*tensors[9:14]), kind(*tensors[14:])
    running, turned, diverged, n_steps, acceptance = counts
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf in range(size):
        q, p, values, grad = leapfrog(energy, *point, signed, metric)
        hamiltonian = values + kinetic(p)  # a non-finite gradient is in the momentum, and so in here
        error = torch.where(torch.isfinite(hamiltonian), hamiltonian - h0, torch.inf)
        n_steps = n_steps + running
        acceptance = acceptance + torch.exp(-error).clamp(max=1.0) * running
        diverged = diverged | (running & (error > MAX_ENERGY_ERROR))
        running = running & ~diverged
        # A row that stopped stands still on its last valid point: its energy is evaluated, but never at a NaN.
        point = _Point(*_where(running, (q, p, grad), point))
        log_weight = torch.logaddexp(tree.log_weight, -error)
        take = running & (log_uniform[leaf] < -error - log_weight)
        proposal = _where(take, (q, values, grad, hamiltonian), tree[:4])
        tree = _Tree._make([*proposal, log_weight, tree.momentum_sum + point.p])
        low, high = _slots(leaf)
        if leaf % 2 == 0:
            stored[high] = (point.p, tree.momentum_sum)
            continue
        for slot in range(high, low - 1, -1):
            (turned,) = _check(energy, *stored[slot], point.p, tree.momentum_sum, running, turned)
        running = running & ~turned
    return (*point, *tree, running, turned, diverged, n_steps, acceptance, *stored[0])


def _check(
    energy: Energy, p_first: Tensor, sum_first: Tensor, p: Tensor, total: Tensor, running: Tensor, turned: Tensor
) -> tuple[Tensor]:
    """Mark the rows whose subtree from a stored first leaf to the last one turns."""
    return (turned | (running & _is_turning(p_first, p, total - sum_first + p_first)),)


def _merge(
    energy: Energy, noise: Tensor, growing: Tensor, turned: Tensor, diverged: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Join a doubling to its trajectory: biased progressive draw between the halves, min(1, w_new / w_old), and a last check."""
    end, half, tree = _Point(*tensors[:3]), _Tree(*tensors[3:9]), _Tree(*tensors[9:15])
    left, right = _Point(*tensors[15:18]), _Point(*tensors[18:21])
    whole, forwards = growing & ~diverged & ~turned, noise[0] < 0.5
    take = whole & (noise[1].log() < half.log_weight - tree.log_weight)
    proposal = _where(take, half[:4], tree[:4])
    log_weight = torch.where(whole, torch.logaddexp(tree.log_weight, half.log_weight), tree.log_weight)
    momentum_sum = torch.where(whole.unsqueeze(1), tree.momentum_sum + half.momentum_sum, tree.momentum_sum)
    right = _Point(*_where(whole & forwards, end, right))
    left = _Point(*_where(whole & ~forwards, end, left))
    growing = whole & ~_is_turning(left.p, right.p, momentum_sum)
    return (*left, *right, *proposal, log_weight, momentum_sum, take, growing)
