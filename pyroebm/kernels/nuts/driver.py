"""Asynchronous no-U-turn chains on CPUs: each chain takes its next leapfrog step as soon as its
gradient is there, and waits for no other.

A *tick* is one batched gradient, each chain at its own point, and one call of :func:`tick`, which
numba compiles once for each floating-point type. Chains are state machines (Dance et al., 2025):
take a leapfrog step, weigh the leaf, look for turns, merge, and at the end of the tree record the
draw and begin the next trajectory.

All that numba compiles is in this file, for its cache does not notice an edit in another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.step_size import DualAveraging
from pyroebm.kernels.base import Info, State, Steps, column, row_value_and_grad, rows
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR
from pyroebm.kernels.metric import Diagonal, Identity, Metric, metric_of

__all__ = ["Chains"]

#: Seconds after which finished draws are handed over, be they few: what Ctrl-C may cost.
LONG = 0.05

# Rows of the vectors of a chain. END and END + 3 are the two ends of the trajectory, each a
# position z relative to where the trajectory began, a momentum and a gradient, all in whitened
# coordinates: q = q_0 + A z.
HOME = 0
PROPOSAL, SUB = 1, 4  # position, gradient, whitened gradient
SUM, SUB_SUM = 7, 8  # of momenta
END = 9
STORED = 15  # momentum and sum of momenta at the left ends of subtrees, two rows for each level

# Numbers of a chain.
(
    ENERGY,
    H0,
    STEP,
    WEIGHT,
    SUB_WEIGHT,
    PROPOSAL_ENERGY,
    PROPOSAL_H,
    SUB_ENERGY,
    SUB_H,
    ACCEPTANCE,
    KEPT_ACCEPTANCE,
    MU,
    LOG_STEP,
    LOG_AVERAGE,
    ERROR,
) = range(15)
NUMBERS = 15

# Counts of a chain.
(
    ACTIVE,
    DRAWS,
    STEPS,
    DEPTH,
    LEAF,
    DIRECTION,
    GRADIENTS,
    RANDOM,
    MOVED,
    TUNED,
    KEPT_GRADIENTS,
    KEPT_DIVERGED,
) = range(12)
COUNTS = 12

# Statistics of a draw.
LP, RATE, HAMILTONIAN, SIZE = range(4)
LEAPFROGS, TREE_DEPTH, DIVERGED, ACCEPTED, REACHED = range(5)

# What came of a leapfrog step.
_GOES_ON, _TURNED, _DIVERGED, _FULL = range(4)

_MASK, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ELEVEN = np.uint64(11)


def _compiled(function: Callable[..., Any]) -> Any:
    """``function`` compiled by numba, kept for later processes where a folder can be written to.

    Infinities and NaN keep their meaning.
    """
    flags = {"contract", "reassoc", "nsz"}
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=flags)(function)
    except RuntimeError:  # no folder for the cache
        return numba.njit(nogil=True, error_model="numpy", fastmath=flags)(function)


@_compiled
def philox(key: Any, counter: Any, row: Any, domain: Any) -> Any:
    """Two random numbers of 64 bits: Philox 4 x 32 with ten rounds (Salmon et al., 2011)."""
    k0, k1 = key & _MASK, key >> _SHIFT
    c0, c1 = counter & _MASK, counter >> _SHIFT
    c2, c3 = row & _MASK, domain & _MASK
    for _ in range(10):
        a, b = _M0 * c0, _M1 * c2
        c0, c1 = (b >> _SHIFT) ^ c1 ^ k0, b & _MASK
        c2, c3 = (a >> _SHIFT) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return (c0 << _SHIFT) | c1, (c2 << _SHIFT) | c3


@_compiled
def _unit(bits: Any) -> Any:
    """Bits as a number in (0, 1)."""
    return (np.float64(bits >> _ELEVEN) + 0.5) * 1.1102230246251565e-16


@_compiled
def _uniform(count: Any, row: Any, key: Any) -> Any:
    """The next uniform number of a trajectory."""
    count[RANDOM] += 1
    bits, _ = philox(key, np.uint64(count[RANDOM]), np.uint64(row), np.uint64(0))
    return _unit(bits)


@_compiled
def _draw_momentum(p: Any, row: Any, key: Any) -> Any:
    """Fill ``p`` with standard normal numbers (Box and Muller, 1958)."""
    n = len(p)
    for i in range((n + 1) // 2):
        a, b = philox(key, np.uint64(i), np.uint64(row), np.uint64(1))
        radius, angle = math.sqrt(-2.0 * math.log(_unit(a))), 2.0 * math.pi * _unit(b)
        p[2 * i] = radius * math.cos(angle)
        if 2 * i + 1 < n:
            p[2 * i + 1] = radius * math.sin(angle)


@_compiled
def _copy(to: Any, source: Any) -> Any:
    for i in range(len(to)):
        to[i] = source[i]


@_compiled
def _log_add(a: Any, b: Any) -> Any:
    top, low = max(a, b), min(a, b)
    return top if low == -np.inf else top + math.log1p(math.exp(low - top))


@_compiled
def _is_turning(p_a: Any, p_b: Any, total: Any, before: Any, corrected: Any) -> Any:
    """Whether the ends of a trajectory move towards each other.

    ``total - before`` is the sum of momenta from one end to the other; with ``corrected``, the
    momentum of the first leaf, which is in ``before``, is added. Half of both ends is taken off:
    the trapezoidal rule for the distance between the ends.
    """
    along_a = along_b = 0.0
    for i in range(len(p_a)):
        a, b = np.float64(p_a[i]), np.float64(p_b[i])
        way = total[i] - 0.5 * (a + b)
        if corrected:
            way += a - before[i]
        along_a += a * way
        along_b += b * way
    return min(along_a, along_b) <= 0.0


@_compiled
def _begin(vector: Any, number: Any, count: Any, row: Any, key: Any) -> Any:
    """Begin a trajectory at the last proposal, with a new momentum."""
    size = vector.shape[1]
    p = vector[END + 1]
    _draw_momentum(p, row, key)
    kinetic = 0.0
    for i in range(size):
        vector[HOME, i] = vector[PROPOSAL, i]
        vector[END, i] = vector[END + 3, i] = 0.0
        vector[END + 2, i] = vector[END + 5, i] = vector[PROPOSAL + 2, i]
        vector[END + 4, i] = vector[SUM, i] = p[i]
        kinetic += np.float64(p[i]) * np.float64(p[i])
    number[H0] = number[ENERGY] + 0.5 * kinetic
    number[PROPOSAL_ENERGY], number[PROPOSAL_H] = number[ENERGY], number[H0]
    number[WEIGHT] = number[ACCEPTANCE] = 0.0
    count[ACTIVE] = 1
    count[DEPTH] = count[GRADIENTS] = count[RANDOM] = count[MOVED] = 0
    _double(vector, number, count, row, key)


@_compiled
def _double(vector: Any, number: Any, count: Any, row: Any, key: Any) -> Any:
    """Begin a doubling, forwards or backwards in time with equal chances."""
    count[DIRECTION] = 1 if _uniform(count, row, key) < 0.5 else 0
    count[LEAF] = 0
    number[SUB_WEIGHT] = -np.inf
    for i in range(vector.shape[1]):
        vector[SUB_SUM, i] = 0.0


@_compiled
def _leap(
    vector: Any, number: Any, count: Any, scale: Any, q: Any, z: Any, is_diagonal: Any
) -> Any:
    """Half a step of the momentum and one of the position; whether the position is finite."""
    end = END + 3 * count[DIRECTION]
    way, home = vector[end], vector[HOME]
    p, g = vector[end + 1], vector[end + 2]
    step = number[STEP] if count[DIRECTION] == 1 else -number[STEP]
    zero = 0.0
    for i in range(len(way)):
        p[i] -= 0.5 * step * g[i]
        way[i] += step * p[i]
    if is_diagonal:
        for i in range(len(way)):
            q[i] = home[i] + scale[i] * way[i]
            zero += q[i] * 0.0
    else:
        for i in range(len(way)):
            z[i] = way[i]
            zero += way[i] * 0.0
    return zero == 0.0


@_compiled
def _weigh(
    vector: Any, number: Any, count: Any, q: Any, value: Any, grad: Any, row: Any, key: Any
) -> Any:
    """Finish a leapfrog step, weigh its leaf and look for turns of the subtrees that end with
    it."""
    end = END + 3 * count[DIRECTION]
    p, g = vector[end + 1], vector[end + 2]
    step = number[STEP] if count[DIRECTION] == 1 else -number[STEP]
    kinetic = 0.0
    for i in range(len(p)):
        p[i] -= 0.5 * step * g[i]
        kinetic += np.float64(p[i]) * np.float64(p[i])
    # a non-finite gradient is in the momentum, and so in here
    hamiltonian = value + 0.5 * kinetic
    # a comparison: reassociation folds the x - x == 0 of numba's isfinite into True
    error = hamiltonian - number[H0] if abs(hamiltonian) < np.inf else np.inf
    count[GRADIENTS] += 1
    if error > MAX_ENERGY_ERROR:
        return _DIVERGED
    number[ACCEPTANCE] += math.exp(-error) if error > 0.0 else 1.0
    number[SUB_WEIGHT] = _log_add(number[SUB_WEIGHT], -error)
    if math.log(_uniform(count, row, key)) < -error - number[SUB_WEIGHT]:
        _copy(vector[SUB], q)
        _copy(vector[SUB + 1], grad)
        _copy(vector[SUB + 2], g)
        number[SUB_ENERGY], number[SUB_H] = value, hamiltonian
    total = vector[SUB_SUM]
    for i in range(len(p)):
        total[i] += p[i]
    # An even leaf is kept in the slot of the number of ones in leaf // 2; an odd one closes the
    # subtrees of as many slots as it has trailing ones.
    leaf = count[LEAF]
    high, rest = 0, leaf >> 1
    while rest:
        high += rest & 1
        rest >>= 1
    if leaf % 2 == 0:
        _copy(vector[STORED + 2 * high], p)
        _copy(vector[STORED + 2 * high + 1], total)
    else:
        closing = leaf
        slot = high
        while closing & 1:
            stored = STORED + 2 * slot
            if _is_turning(vector[stored], p, total, vector[stored + 1], True):
                return _TURNED
            closing >>= 1
            slot -= 1
    count[LEAF] = leaf + 1
    return _FULL if count[LEAF] == 1 << count[DEPTH] else _GOES_ON


@_compiled
def _merge(vector: Any, number: Any, count: Any, row: Any, key: Any) -> Any:
    """Join a doubling to its trajectory: biased progressive draw between the halves, min(1, w_new /
    w_old), and a last look for a turn."""
    if math.log(_uniform(count, row, key)) < number[SUB_WEIGHT] - number[WEIGHT]:
        for part in range(3):
            _copy(vector[PROPOSAL + part], vector[SUB + part])
        number[PROPOSAL_ENERGY], number[PROPOSAL_H] = number[SUB_ENERGY], number[SUB_H]
        count[MOVED] = 1
    number[WEIGHT] = _log_add(number[WEIGHT], number[SUB_WEIGHT])
    total, more = vector[SUM], vector[SUB_SUM]
    for i in range(len(total)):
        total[i] += more[i]
    return _is_turning(vector[END + 1], vector[END + 4], total, total, False)


@_compiled
def _tune(number: Any, count: Any, rate: Any, target: Any) -> Any:
    """One update of the dual averaging of the logarithm of the step size; see
    :class:`pyroebm.kernels.adaptation.DualAveraging`."""
    count[TUNED] += 1
    steps = np.float64(count[TUNED])
    weight = 1.0 / (steps + 10.0)
    number[ERROR] = (1.0 - weight) * number[ERROR] + weight * (target - rate)
    number[LOG_STEP] = number[MU] - math.sqrt(steps) / 0.1 * number[ERROR]
    decay = steps**-0.75
    number[LOG_AVERAGE] = decay * number[LOG_STEP] + (1.0 - decay) * number[LOG_AVERAGE]
    number[STEP] = math.exp(min(number[LOG_STEP], 60.0))


@_compiled
def _finish(
    vector: Any,
    number: Any,
    count: Any,
    slot_x: Any,
    slot_f: Any,
    slot_i: Any,
    slot_t: Any,
    outcome: Any,
    depth: Any,
    thinning: Any,
    target: Any,
) -> Any:
    """End a trajectory; after ``thinning`` of them, record the draw."""
    number[ENERGY] = number[PROPOSAL_ENERGY]
    rate, size = number[ACCEPTANCE] / count[GRADIENTS], number[STEP]
    number[KEPT_ACCEPTANCE] += rate
    count[KEPT_GRADIENTS] += count[GRADIENTS]
    count[KEPT_DIVERGED] |= outcome == _DIVERGED
    if target > 0.0:
        _tune(number, count, rate, target)
    count[STEPS] += 1
    if count[STEPS] % thinning:
        return
    _copy(slot_x[0], vector[PROPOSAL])
    _copy(slot_x[1], vector[PROPOSAL + 1])
    slot_f[LP] = -number[ENERGY]
    slot_f[RATE] = number[KEPT_ACCEPTANCE] / thinning
    slot_f[HAMILTONIAN] = number[PROPOSAL_H]
    slot_f[SIZE] = size
    slot_i[LEAPFROGS] = count[KEPT_GRADIENTS]
    slot_i[TREE_DEPTH] = depth
    slot_i[DIVERGED] = count[KEPT_DIVERGED]
    slot_i[ACCEPTED] = count[MOVED]
    slot_i[REACHED] = outcome == _FULL
    slot_t[0] = number[LOG_STEP]
    slot_t[1] = number[LOG_AVERAGE]
    slot_t[2] = number[ERROR]
    number[KEPT_ACCEPTANCE] = 0.0
    count[KEPT_GRADIENTS] = count[KEPT_DIVERGED] = 0
    count[DRAWS] += 1


@_compiled
def tick(
    values: Any,
    grads: Any,
    whitened: Any,
    q: Any,
    z: Any,
    vectors: Any,
    numbers: Any,
    counts: Any,
    scales: Any,
    seeds: Any,
    ring_x: Any,
    ring_f: Any,
    ring_i: Any,
    ring_t: Any,
    limit: Any,
    max_depth: Any,
    thinning: Any,
    target: Any,
    is_diagonal: Any,
) -> Any:
    """Take every chain that is in a trajectory to its next question, and begin trajectories of
    those that have fewer than ``limit`` draws. Return the least number of draws of a chain.

    Args:
        values, grads: energies and gradients at ``q``, ``(chains,)`` and ``(chains, dim)``.
        whitened: the gradients in whitened coordinates; not read if the metric is a diagonal.
        q: positions; where the metric is a diagonal, what is asked next is written here,
        z: and else here, in whitened coordinates relative to the beginning of the trajectory.
        vectors, numbers, counts: the state of the chains.
        scales: square roots of the diagonal of the inverse mass, ``(chains or 1, dim)``.
        seeds: key of each trajectory, at its number modulo their length.
        ring_x, ring_f, ring_i, ring_t: where draws are written, at their number modulo the length.
        limit: no chain has more draws.
        max_depth: most doublings.
        thinning: trajectories from one draw to the next.
        target: acceptance rate to which the step size of each chain is tuned; 0 leaves it.
        is_diagonal: whether the metric is ``scales``.
    """
    least = limit
    for row in range(len(counts)):
        vector, number = vectors[row], numbers[row]
        count = counts[row]
        scale = scales[row % len(scales)]
        key = np.uint64(seeds[count[STEPS] % len(seeds)])
        outcome, depth = _GOES_ON, count[DEPTH] + 1
        if count[ACTIVE]:
            value = np.float64(values[row])
            if is_diagonal:
                g = vector[END + 3 * count[DIRECTION] + 2]
                for i in range(len(g)):
                    g[i] = scale[i] * grads[row, i]
            else:
                _copy(vector[END + 3 * count[DIRECTION] + 2], whitened[row])
            outcome = _weigh(vector, number, count, q[row], value, grads[row], row, key)
            if outcome == _FULL:
                turns = _merge(vector, number, count, row, key)
                count[DEPTH] += 1
                if turns:
                    outcome, depth = _TURNED, count[DEPTH]
                elif count[DEPTH] < max_depth:
                    outcome = _GOES_ON
                    _double(vector, number, count, row, key)
                else:
                    depth = count[DEPTH]
        elif count[DRAWS] < limit:
            _begin(vector, number, count, row, key)
        else:
            continue
        while True:
            if outcome != _GOES_ON:
                slot = count[DRAWS] % len(ring_x)
                _finish(
                    vector,
                    number,
                    count,
                    ring_x[slot, row],
                    ring_f[slot, row],
                    ring_i[slot, row],
                    ring_t[slot, row],
                    outcome,
                    depth,
                    thinning,
                    target,
                )
                if count[DRAWS] >= limit:
                    # at rest, at a point that can be asked about
                    count[ACTIVE] = 0
                    for i in range(vector.shape[1]):
                        q[row, i] = vector[PROPOSAL, i]
                    break
                key = np.uint64(seeds[count[STEPS] % len(seeds)])
                _begin(vector, number, count, row, key)
            if _leap(vector, number, count, scale, q[row], z[row], is_diagonal):
                break
            # no energy is asked about a NaN or an infinity
            count[GRADIENTS] += 1
            outcome, depth = _DIVERGED, count[DEPTH] + 1
        least = min(least, count[DRAWS])
    return least


class Chains:
    """A batch of no-U-turn chains, each at a leapfrog step of its own.

    A draw is a function of the state before it, of the settings and of a number of the generator:
    draws are those that :meth:`NUTS.step` makes one by one, bit for bit. Finished draws wait in a
    ring until all chains have them. Trajectories under way need not be saved, for they are a
    function of the last draws.

    Args:
        energy: the energy, in unconstrained coordinates; on a CPU, in float32 or float64.
        state: where the chains stand.
        generator: gives the seed of each trajectory. It stands after those of the draws taken.
        max_tree_depth: most doublings.
        thinning: trajectories from one draw to the next.
        ahead: draws that a chain may be ahead of those taken.
    """

    def __init__(
        self,
        energy: Energy,
        state: State,
        generator: torch.Generator | None,
        max_tree_depth: int,
        thinning: int = 1,
        ahead: int = 1,
    ) -> None:
        self.energy = energy
        self.generator = generator
        self.max_tree_depth = max_tree_depth
        self.thinning = thinning
        self.ahead = ahead
        self.taken = self.finished = 0  #: draws taken, and draws that all chains have
        q, grad = rows(state.x), rows(state.grad)
        chains, dim = q.shape
        self._q = self._z = q.detach().clone(memory_format=torch.contiguous_format)
        self._vectors = q.new_empty(chains, STORED + 2 * max_tree_depth, dim)
        self._vectors[:, PROPOSAL], self._vectors[:, PROPOSAL + 1] = q, grad
        self._numbers = np.zeros((chains, NUMBERS))
        self._numbers[:, ENERGY] = state.energy.numpy()
        self._counts = np.zeros((chains, COUNTS), np.int64)
        self._seeds = np.zeros((ahead + 1) * thinning, np.int64)
        self._seeded = 0
        self._seeder = torch.Generator()
        self._seeder.set_state(
            torch.get_rng_state() if generator is None else generator.get_state()
        )
        self._ring = (
            q.new_empty(ahead, chains, 2, dim),
            q.new_empty(ahead, chains, 4),
            torch.empty(ahead, chains, 5, dtype=torch.long),
            torch.empty(ahead, chains, 3, dtype=torch.float64),
        )

    def set(
        self,
        step_size: float | Tensor,
        inverse_mass: Tensor | Metric | None,
        tuning: DualAveraging | None = None,
        target: float = 0.0,
    ) -> None:
        """Give the settings of the trajectories from here on, where all chains have met.

        Args:
            step_size: a number, or one for each chain.
            inverse_mass: the metric.
            tuning: where the dual averaging of the step size of each chain stands; None leaves the
                step sizes as they are.
            target: the acceptance rate that it aims at.
        """
        q, numbers = self._q, self._numbers
        self._metric = metric_of(inverse_mass, q)
        self._is_diagonal = isinstance(self._metric, Identity | Diagonal)
        self._z = q if self._is_diagonal else torch.zeros_like(q)
        scale = self._metric.scale if isinstance(self._metric, Diagonal) else torch.ones_like(q[0])
        self._vectors[:, PROPOSAL + 2] = self._metric.transpose(self._vectors[:, PROPOSAL + 1])
        numbers[:, STEP] = column(step_size, q).squeeze(1).numpy()
        self._tuning = tuning
        self._met = self.taken
        self._target = 0.0 if tuning is None else target
        if tuning is not None:
            for place, value in zip((MU, LOG_STEP, LOG_AVERAGE, ERROR), tuning[:4], strict=True):
                numbers[:, place] = torch.as_tensor(value).numpy()
            self._counts[:, TUNED] = tuning.steps
        self._arrays = (
            q.numpy(),
            self._z.numpy(),
            self._vectors.numpy(),
            numbers,
            self._counts,
            np.atleast_2d(scale.contiguous().numpy()),
            self._seeds,
            *(part.numpy() for part in self._ring),
        )

    def run(self, until: int, limit: int) -> None:
        """Go on until every chain has ``until`` draws, and none more than ``limit``; both count
        from the beginning. If that takes long, stop when every chain has one draw to take."""
        limit = min(limit, self.taken + self.ahead)
        until = min(until, limit)
        settings = (limit, self.max_tree_depth, self.thinning, self._target, self._is_diagonal)
        self._draw_seeds(limit * self.thinning)
        under_way = bool(self._counts[:, ACTIVE].any())
        nothing = self._arrays[0]
        answers = (self._numbers[:, ENERGY].astype(nothing.dtype), nothing, nothing)
        stop = time.monotonic() + LONG
        while self.finished < until:
            if under_way:
                answers = self._ask()
            self.finished = tick(*answers, *self._arrays, *settings)
            under_way = True
            if self.finished > self.taken and time.monotonic() > stop:
                break

    def _ask(self) -> tuple[Any, Any, Any]:
        """Energies and gradients at the chains' positions, and gradients in whitened
        coordinates."""
        if not self._is_diagonal:
            torch.add(self._vectors[:, HOME], self._metric.apply(self._z), out=self._q)
        values, grads = row_value_and_grad(self.energy, self._q)
        grads = grads.contiguous()
        answer = grads.numpy()
        if self._is_diagonal:
            return values.contiguous().numpy(), answer, answer
        return values.contiguous().numpy(), answer, self._metric.transpose(grads).numpy()

    def _draw_seeds(self, steps: int) -> None:
        """Draw the seeds of trajectories before number ``steps``."""
        more = steps - self._seeded
        if more > 0:
            drawn = torch.randint(2**63 - 1, (more,), generator=self._seeder).numpy()
            self._seeds[np.arange(self._seeded, steps) % len(self._seeds)] = drawn
            self._seeded = steps

    def take(self, most: int) -> Steps:
        """Take at most so many of the draws that all chains have finished, in order."""
        count = min(most, self.finished - self.taken)
        places = torch.arange(self.taken, self.taken + count) % self.ahead
        where, numbers, counts, tuned = (part[places] for part in self._ring)
        torch.randint(2**63 - 1, (count * self.thinning,), generator=self.generator)
        self.taken += count
        info = Info(
            acceptance_rate=numbers[..., RATE],
            accepted=counts[..., ACCEPTED] > 0,
            diverging=counts[..., DIVERGED] > 0,
            energy=numbers[..., HAMILTONIAN],
            n_steps=counts[..., LEAPFROGS],
            step_size=numbers[..., SIZE],
            tree_depth=counts[..., TREE_DEPTH],
            reached_max_treedepth=counts[..., REACHED] > 0,
        )
        tuning = self._tuning
        if tuning is not None:
            log_step, log_average, error = tuned[-1].unbind(-1)
            steps = tuning.steps + (self.taken - self._met) * self.thinning
            tuning = DualAveraging(tuning.mu, log_step, log_average, error, steps)
        x, grad = where.reshape(*where.shape[:3], *self.energy.event_shape).unbind(2)
        energy = -numbers[..., LP]
        return Steps(State(x[-1], energy[-1], grad[-1]), x, grad, energy, info, tuning)
