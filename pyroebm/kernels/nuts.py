"""The no-U-turn sampler for many chains in lock-step: one leapfrog step of all chains at a time."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroebm.energy import Energy
from pyroebm.kernels.base import GradientKernel, Info, State, column, rows, state_of_rows, uniform_like
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR, draw_momentum, kinetic, leapfrog
from pyroebm.kernels.metric import Metric, metric_of

__all__ = ["NUTS"]


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
            forwards = uniform_like(h0, rng) < 0.5
            depth += growing
            end = _Point(*_where(forwards, right, left))
            signed = torch.where(forwards.unsqueeze(1), eps, -eps)
            run = _Subtree(energy, h0, metric, signed, rng).grow(end, growing, 2**level)
            diverging |= run.diverged
            n_steps += run.n_steps
            acceptance += run.acceptance
            whole = growing & ~run.diverged & ~run.turned
            # Biased progressive draw between the halves: min(1, w_new / w_old).
            take = whole & (uniform_like(h0, rng).log() < run.tree.log_weight - tree.log_weight)
            accepted |= take
            proposal = _where(take, run.tree[:4], tree[:4])
            log_weight = torch.where(whole, torch.logaddexp(tree.log_weight, run.tree.log_weight), tree.log_weight)
            momentum_sum = torch.where(whole.unsqueeze(1), tree.momentum_sum + run.tree.momentum_sum, tree.momentum_sum)
            tree = _Tree._make([*proposal, log_weight, momentum_sum])
            right = _Point(*_where(whole & forwards, run.end, right))
            left = _Point(*_where(whole & ~forwards, run.end, left))
            growing = whole & ~_is_turning(left.p, right.p, momentum_sum)

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


class _Subtree:
    """One doubling: ``leaves`` leapfrog steps from one end, checked for turns of every balanced subtree within."""

    def __init__(self, energy: Energy, h0: Tensor, metric: Metric, signed_eps: Tensor, rng: torch.Generator) -> None:
        self.energy, self.h0, self.metric, self.signed_eps, self.rng = energy, h0, metric, signed_eps, rng
        self.turned, self.diverged = torch.zeros_like(h0, dtype=torch.bool), torch.zeros_like(h0, dtype=torch.bool)
        self.n_steps, self.acceptance = torch.zeros_like(h0, dtype=torch.long), torch.zeros_like(h0)

    def grow(self, start: _Point, running: Tensor, leaves: int) -> _Subtree:
        tree = _Tree(start.q, self.h0, start.grad, self.h0, torch.full_like(self.h0, -torch.inf), torch.zeros_like(start.p))
        point, stored = start, dict[int, tuple[Tensor, Tensor]]()
        log_uniform = uniform_like(self.h0.expand(leaves, -1), self.rng).log()
        for leaf in range(leaves):
            q, p, values, grad = leapfrog(self.energy, *point, self.signed_eps, self.metric)
            hamiltonian = values + kinetic(p)  # a non-finite gradient is in the momentum, and so in here
            error = torch.where(torch.isfinite(hamiltonian), hamiltonian - self.h0, torch.inf)
            self.n_steps += running
            self.acceptance += torch.exp(-error).clamp(max=1.0) * running
            self.diverged |= running & (error > MAX_ENERGY_ERROR)
            running = running & ~self.diverged
            # A row that stopped stands still on its last valid point: its energy is evaluated, but never at a NaN.
            point = _Point(*_where(running, (q, p, grad), point))
            log_weight = torch.logaddexp(tree.log_weight, -error)
            take = running & (log_uniform[leaf] < -error - log_weight)
            proposal = _where(take, (q, values, grad, hamiltonian), tree[:4])
            tree = _Tree._make([*proposal, log_weight, tree.momentum_sum + point.p])
            low, high = _slots(leaf)
            if leaf % 2 == 0:
                stored[high] = (point.p, tree.momentum_sum)
            for slot in range(high, low - 1, -1) if leaf % 2 else ():
                p_first, sum_first = stored[slot]
                self.turned |= running & _is_turning(p_first, point.p, tree.momentum_sum - sum_first + p_first)
            running = running & ~self.turned
            if leaf + 1 < leaves and not bool(running.any()):
                break
        self.tree, self.end = tree, point
        return self
