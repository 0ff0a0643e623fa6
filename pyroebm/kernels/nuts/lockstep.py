"""The no-U-turn sampler for many chains in lock-step: one leapfrog step of all chains at a time."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroebm.core.compilation import fused, is_compiled
from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    GradientKernel,
    Info,
    State,
    column,
    rows,
    state_of_rows,
    uniform_like,
)
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR, draw_momentum, kinetic, leapfrog
from pyroebm.kernels.metric import Metric, metric_of

__all__ = ["NUTS"]

#: Leapfrog steps in one block, after which it is asked whether any row goes on. A doubling of no
#: more is one block.
LEAVES = 4

#: Doublings in the first block of a compiled energy: every tree begins small. Their random numbers
#: are drawn together.
TRUNK = 3


class _Point(NamedTuple):
    """One end of a trajectory, rows ``(chains, dim)``."""

    q: Tensor
    p: Tensor
    grad: Tensor


class _Tree(NamedTuple):
    """What a trajectory, or half of one, has gathered; a proposal of each row and the weight of
    what it was drawn from."""

    q: Tensor
    energy: Tensor
    grad: Tensor
    hamiltonian: Tensor
    log_weight: Tensor  # log sum exp(H0 - H) over the leaves
    momentum_sum: Tensor


class _Half(NamedTuple):
    """What a doubling adds: its last leaf, what it gathered, which rows go on, and counts of each
    row, ``(chains,)``."""

    end: _Point
    tree: _Tree
    running: Tensor
    turned: Tensor
    diverged: Tensor
    n_steps: Tensor
    acceptance: Tensor

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> _Half:
        return cls(_Point(*tensors[:3]), _Tree(*tensors[3:9]), *tensors[9:14])

    def flat(self) -> tuple[Tensor, ...]:
        return (*self.end, *self.tree, *self[2:])


class _Trajectory(NamedTuple):
    """The end reached last and the step that led there, the other end, what lies between, and a
    report of each row."""

    front: _Point
    back: _Point
    tree: _Tree
    step: Tensor  # (chains, 1), negative backwards in time
    growing: Tensor
    diverging: Tensor
    accepted: Tensor
    depth: Tensor
    n_steps: Tensor
    acceptance: Tensor

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> _Trajectory:
        return cls(
            _Point(*tensors[:3]), _Point(*tensors[3:6]), _Tree(*tensors[6:12]), *tensors[12:19]
        )

    def flat(self) -> tuple[Tensor, ...]:
        return (*self.front, *self.back, *self.tree, *self[3:])


def _where(rows_: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        torch.where(rows_.unsqueeze(1) if a.dim() == 2 else rows_, a, b)
        for a, b in zip(new, old, strict=True)
    ]


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


@dataclasses.dataclass(frozen=True, eq=False)
class NUTS(GradientKernel):
    r"""Multinomial no-U-turn sampler (Hoffman and Gelman, 2014; Betancourt, 2017): exact.

    A trajectory doubles forwards or backwards in time until its ends approach each other; the next
    state is drawn from its leaves with weights :math:`e^{-H}`, biased towards the newer half. The
    tree is built by iteration, with one stored left end for each level (Phan, Pradhan and
    Jankowiak, 2019), so that all chains take each leapfrog step together; a chain that is done
    waits.

    Random numbers of a step come from a generator spawned for it: what one chain draws does not
    depend on how far others go.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.8.
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric;
            None is the identity.
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
            raise ValueError(
                "NUTS: max_tree_depth must be from 1 to 20, got"
                f" max_tree_depth={self.max_tree_depth}"
            )

    def probe(self) -> NUTS:
        return self.replace(max_tree_depth=1)

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        q, grad = rows(state.x), rows(state.grad)
        rng = _spawn(generator, q.device)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        trunk = min(TRUNK, self.max_tree_depth)
        p, early = (
            draw_momentum(q, rng),
            uniform_like(state.energy.expand(_first_row(trunk), -1), rng),
        )
        level = trunk if is_compiled(energy) else 0
        start = (eps, q, p, state.energy, grad)
        h0, *out = fused(_trunk, energy, early, *start, *metric, kind=type(metric), levels=level)
        way = _Trajectory.of(tuple(out))
        while level < self.max_tree_depth and bool(way.growing.any()):
            first, size = _first_row(level), 2**level + 2
            noise = (
                early[first : first + size]
                if level < trunk
                else uniform_like(h0.expand(size, -1), rng)
            )
            way = _double(energy, metric, h0, noise, way)
            level += 1
        info = Info(
            acceptance_rate=way.acceptance / way.n_steps,
            accepted=way.accepted,
            diverging=way.diverging,
            energy=way.tree.hamiltonian,
            n_steps=way.n_steps,
            step_size=eps.squeeze(1),
            tree_depth=way.depth,
        )
        return state_of_rows(energy, way.tree.q, way.tree.energy, way.tree.grad), info


def _spawn(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return torch.Generator(device).manual_seed(seed)


def _first_row(level: int) -> int:
    """Where the noise of a doubling begins, after that of those before: 2 rows, and one for each
    leaf."""
    return (1 << level) - 1 + 2 * level


def _trunk(
    energy: Energy, noise: Tensor, *tensors: Tensor, kind: type[Metric], levels: int
) -> tuple[Tensor, ...]:
    """The Hamiltonian at the start, and the trajectory after the first doublings."""
    (eps, q, p, values, grad), metric = tensors[:5], tensors[5:]
    h0, point = values + kinetic(p), _Point(q, p, grad)
    zero, none = torch.zeros_like(h0), torch.zeros_like(h0, dtype=torch.bool)
    tree, count = _Tree(q, values, grad, h0, zero, p), none.long()
    out = _Trajectory(point, point, tree, eps, ~none, none, none, count, count, zero).flat()
    for level in range(levels):
        rows_ = noise[_first_row(level) : _first_row(level + 1)]
        out = _doubling(energy, h0, rows_, *out, *metric, kind=kind)
    return (h0, *out)


def _double(
    energy: Energy, metric: Metric, h0: Tensor, noise: Tensor, way: _Trajectory
) -> _Trajectory:
    """One doubling, in blocks of leaves; blocks are the leaves of a tree of their own, checked like
    it."""
    kind, blocks = type(metric), (len(noise) - 2) // LEAVES
    if blocks <= 1:
        return _Trajectory.of(fused(_doubling, energy, h0, noise, *way.flat(), *metric, kind=kind))
    step, *out = fused(_open, energy, h0, noise[0], *way.flat())
    way, half = _Trajectory.of(tuple(out)), _Half.of(tuple(out[19:]))
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for block in range(blocks):
        uniform = noise[2 + block * LEAVES :][:LEAVES]
        *out, p_first, sum_first = fused(
            _leaves, energy, uniform, h0, step, *half.flat(), *metric, kind=kind
        )
        half = _Half.of(tuple(out))
        low, high = _slots(block)
        if block % 2 == 0:
            stored[high] = (p_first, sum_first)
            continue
        for slot in range(high, low - 1, -1):
            (turned,) = fused(
                _check,
                energy,
                *stored[slot],
                half.end.p,
                half.tree.momentum_sum,
                half.running,
                half.turned,
            )
            half = half._replace(turned=turned)
        half = half._replace(running=half.running & ~half.turned)
        if block + 1 < blocks and not bool(half.running.any()):
            break
    return _Trajectory.of(fused(_merge, energy, noise[1], *half.flat(), *way.flat()))


def _doubling(
    energy: Energy, h0: Tensor, noise: Tensor, *tensors: Tensor, kind: type[Metric]
) -> tuple[Tensor, ...]:
    """A doubling of few leaves."""
    way, metric = tensors[:19], tensors[19:]
    step, *out = _open(energy, h0, noise[0], *way)
    half = _leaves(energy, noise[2:], h0, step, *out[19:], *metric, kind=kind)[:14]
    return _merge(energy, noise[1], *half, *out[:19])


def _open(energy: Energy, h0: Tensor, uniform: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Go on from the front or turn round, with equal chances: the step, the trajectory, and a half
    that is empty as yet."""
    way, on = _Trajectory.of(tensors), uniform < 0.5
    front, back = _Point(*_where(on, way.front, way.back)), _Point(*_where(on, way.back, way.front))
    step = torch.where(on.unsqueeze(1), way.step, -way.step)
    tree = _Tree(
        front.q, h0, front.grad, h0, torch.full_like(h0, -torch.inf), torch.zeros_like(front.p)
    )
    none = torch.zeros_like(way.growing)
    half = _Half(front, tree, way.growing, none, none, way.n_steps, way.acceptance)
    return (step, *way._replace(front=front, back=back, step=step).flat(), *half.flat())


def _leaves(
    energy: Energy, uniform: Tensor, h0: Tensor, step: Tensor, *tensors: Tensor, kind: type[Metric]
) -> tuple[Tensor, ...]:
    """Leaves of a doubling, checked for turns of every balanced subtree within; with it, what the
    first leaf stores."""
    (point, tree, running, turned, diverged, n_steps, acceptance), metric = (
        _Half.of(tensors),
        kind(*tensors[14:]),
    )
    log_uniform = uniform.log()
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf in range(len(uniform)):
        q, p, values, grad = leapfrog(energy, *point, step, metric)
        # a non-finite gradient is in the momentum, and so in here
        hamiltonian = values + kinetic(p)
        error = torch.where(torch.isfinite(hamiltonian), hamiltonian - h0, torch.inf)
        n_steps = n_steps + running
        acceptance = acceptance + torch.exp(-error).clamp(max=1.0) * running
        diverged = diverged | (running & (error > MAX_ENERGY_ERROR))
        running = running & ~diverged
        # A row that stopped goes on unseen: to hold it, each leaf would wait for the sums over the
        # one before. But no energy is asked about a NaN or an infinity (of which alone a - a is not
        # 0): such an entry stays as it was.
        point = _Point._make(
            torch.where(a - a == 0.0, a, b) for a, b in zip((q, p, grad), point, strict=True)
        )
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
    return (*_Half(point, tree, running, turned, diverged, n_steps, acceptance).flat(), *stored[0])


def _check(
    energy: Energy,
    p_first: Tensor,
    sum_first: Tensor,
    p: Tensor,
    total: Tensor,
    running: Tensor,
    turned: Tensor,
) -> tuple[Tensor]:
    """Mark the rows whose subtree from a stored first leaf to the last one turns."""
    return (turned | (running & _is_turning(p_first, p, total - sum_first + p_first)),)


def _merge(energy: Energy, uniform: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Join a doubling to its trajectory: biased progressive draw between the halves, min(1, w_new /
    w_old), and a last check."""
    half, way = _Half.of(tensors[:14]), _Trajectory.of(tensors[14:])
    whole = way.growing & ~half.diverged & ~half.turned
    take = whole & (uniform.log() < half.tree.log_weight - way.tree.log_weight)
    proposal = _where(take, half.tree[:4], way.tree[:4])
    log_weight = torch.where(
        whole, torch.logaddexp(way.tree.log_weight, half.tree.log_weight), way.tree.log_weight
    )
    momentum_sum = way.tree.momentum_sum + half.tree.momentum_sum
    return _Trajectory(
        half.end,
        way.back,
        _Tree._make([*proposal, log_weight, momentum_sum]),
        way.step,
        whole & ~_is_turning(half.end.p, way.back.p, momentum_sum),
        way.diverging | half.diverged,
        way.accepted | take,
        way.depth + way.growing,
        half.n_steps,
        half.acceptance,
    ).flat()
