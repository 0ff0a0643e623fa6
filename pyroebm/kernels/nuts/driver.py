"""Asynchronous no-U-turn chains on CPUs.

Each chain takes its next leapfrog step as soon as its gradient is computed and waits for no other
chain. A *tick* is one batched gradient, each chain at its own point, and one call of :func:`tick`,
which numba compiles once for each floating-point type. Chains are state machines (Dance et al.,
2025): take a leapfrog step, weigh the leaf, check for U-turns, merge, and at the end of the tree
record the draw and start the next trajectory.

All functions compiled by numba are in this file, because its cache does not detect changes in
other files.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from pyroebm.core.compilation import CompiledGradient
from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.step_size import DualAveraging
from pyroebm.kernels.base import Info, State, Steps, column, row_value_and_grad, rows
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR
from pyroebm.kernels.metric import Diagonal, Identity, Metric, metric_of

__all__ = ["Chains", "compile_for"]

#: Seconds after which finished draws are returned: the work that Ctrl-C may lose.
LONG = 0.05

# Indices of the vectors of a chain. END and END + 3 are the two ends of the trajectory, each a
# position z relative to the start of the trajectory, a momentum and a gradient, all in whitened
# coordinates: q = q_0 + A z.
HOME = 0
PROPOSAL, SUB = 1, 4  # position, gradient, whitened gradient
SUM, SUB_SUM = 7, 8  # sums of momenta
END = 9
STORED = 15  # momentum and sum of momenta at the left ends of subtrees, two vectors per level

# Indices of the floating-point numbers of a chain.
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

# Indices of the integers of a chain.
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
    SEED,
) = range(13)
COUNTS = 13

# Indices of the statistics of a draw.
LP, RATE, HAMILTONIAN, SIZE = range(4)
LEAPFROGS, TREE_DEPTH, DIVERGED, ACCEPTED, REACHED = range(5)

# Outcomes of a leapfrog step.
_GOES_ON, _TURNED, _DIVERGED, _FULL = range(4)

_FLAGS = {"contract", "reassoc", "nsz"}

_MASK, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ELEVEN = np.uint64(11)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile ``function`` with numba, with a cache on disk if a cache folder is writable.

    Infinities and NaN keep their meaning.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FLAGS)(function)
    except RuntimeError:  # no folder for the cache
        return numba.njit(nogil=True, error_model="numpy", fastmath=_FLAGS)(function)


def _inlined(function: Callable[..., Any]) -> Any:
    """Compile ``function`` inlined into its callers, not as a function of its own."""
    return numba.njit(forceinline=True, error_model="numpy", fastmath=_FLAGS)(function)


@_inlined
def _philox(key: Any, counter: Any, row: Any, domain: Any) -> Any:
    """Return two random numbers of 64 bits: Philox 4 x 32 with ten rounds (Salmon et al., 2011)."""
    k0, k1 = key & _MASK, key >> _SHIFT
    c0, c1 = counter & _MASK, counter >> _SHIFT
    c2, c3 = row & _MASK, domain & _MASK
    for _ in range(10):
        a, b = _M0 * c0, _M1 * c2
        c0, c1 = (b >> _SHIFT) ^ c1 ^ k0, b & _MASK
        c2, c3 = (a >> _SHIFT) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return (c0 << _SHIFT) | c1, (c2 << _SHIFT) | c3


@_inlined
def _unit(bits: Any) -> Any:
    """Convert bits to a number in (0, 1)."""
    return (np.float64(bits >> _ELEVEN) + 0.5) * 1.1102230246251565e-16


@_inlined
def _uniform(counts: Any, row: Any) -> Any:
    """Draw the next uniform number of a trajectory."""
    counts[row, RANDOM] += 1
    key, counter = np.uint64(counts[row, SEED]), np.uint64(counts[row, RANDOM])
    bits, _ = _philox(key, counter, np.uint64(row), np.uint64(0))
    return _unit(bits)


@_inlined
def _draw_momenta(vectors: Any, row: Any, place: Any, key: Any) -> Any:
    """Fill a vector with standard normal numbers (Box and Muller, 1958)."""
    size = vectors.shape[2]
    for i in range((size + 1) // 2):
        a, b = _philox(key, np.uint64(i), np.uint64(row), np.uint64(1))
        radius, angle = math.sqrt(-2.0 * math.log(_unit(a))), 2.0 * math.pi * _unit(b)
        vectors[row, place, 2 * i] = radius * math.cos(angle)
        if 2 * i + 1 < size:
            vectors[row, place, 2 * i + 1] = radius * math.sin(angle)


@_inlined
def _move(vectors: Any, row: Any, to: Any, source: Any) -> Any:
    for i in range(vectors.shape[2]):
        vectors[row, to, i] = vectors[row, source, i]


@_inlined
def _log_add(a: Any, b: Any) -> Any:
    top, low = max(a, b), min(a, b)
    return top if low == -np.inf else top + math.log1p(math.exp(low - top))


@_inlined
def _is_turning(vectors: Any, row: Any, p_a: Any, p_b: Any, total: Any, before: Any) -> Any:
    """Whether the ends of a trajectory move towards each other.

    ``total`` is the sum of momenta up to the later end. ``before`` is the index of the same sum at
    the first leaf, which is itself part of the trajectory, or -1. Half of both ends is subtracted:
    the trapezoidal rule for the difference of the positions of the ends.
    """
    along_a = along_b = 0.0
    for i in range(vectors.shape[2]):
        a, b = np.float64(vectors[row, p_a, i]), np.float64(vectors[row, p_b, i])
        way = vectors[row, total, i] - 0.5 * (a + b)
        if before >= 0:
            way += a - vectors[row, before, i]
        along_a += a * way
        along_b += b * way
    return min(along_a, along_b) <= 0.0


@_inlined
def _begin(vectors: Any, numbers: Any, counts: Any, seeds: Any, row: Any) -> Any:
    """Start a trajectory at the last proposal, with a new momentum."""
    counts[row, SEED] = seeds[counts[row, STEPS] % len(seeds)]
    _draw_momenta(vectors, row, END + 1, np.uint64(counts[row, SEED]))
    kinetic = 0.0
    for i in range(vectors.shape[2]):
        p, g = vectors[row, END + 1, i], vectors[row, PROPOSAL + 2, i]
        vectors[row, HOME, i] = vectors[row, PROPOSAL, i]
        vectors[row, END, i] = vectors[row, END + 3, i] = 0.0
        vectors[row, END + 2, i] = vectors[row, END + 5, i] = g
        vectors[row, END + 4, i] = vectors[row, SUM, i] = p
        kinetic += np.float64(p) * np.float64(p)
    numbers[row, H0] = numbers[row, ENERGY] + 0.5 * kinetic
    numbers[row, PROPOSAL_ENERGY] = numbers[row, ENERGY]
    numbers[row, PROPOSAL_H] = numbers[row, H0]
    numbers[row, WEIGHT] = numbers[row, ACCEPTANCE] = 0.0
    counts[row, ACTIVE] = 1
    counts[row, DEPTH] = counts[row, GRADIENTS] = counts[row, RANDOM] = counts[row, MOVED] = 0
    _double(vectors, numbers, counts, row)


@_inlined
def _double(vectors: Any, numbers: Any, counts: Any, row: Any) -> Any:
    """Start a doubling, forwards or backwards in time with equal probability."""
    counts[row, DIRECTION] = 1 if _uniform(counts, row) < 0.5 else 0
    counts[row, LEAF] = 0
    numbers[row, SUB_WEIGHT] = -np.inf
    for i in range(vectors.shape[2]):
        vectors[row, SUB_SUM, i] = 0.0


@_inlined
def _leap(
    vectors: Any, numbers: Any, counts: Any, scales: Any, q: Any, z: Any, row: Any, is_diagonal: Any
) -> Any:
    """Take half a step of the momentum and one of the position; return whether it is finite."""
    end = END + 3 * counts[row, DIRECTION]
    step = numbers[row, STEP] if counts[row, DIRECTION] == 1 else -numbers[row, STEP]
    zero = 0.0
    for i in range(vectors.shape[2]):
        vectors[row, end + 1, i] -= 0.5 * step * vectors[row, end + 2, i]
        vectors[row, end, i] += step * vectors[row, end + 1, i]
    if is_diagonal:
        own = row if len(scales) > 1 else 0
        for i in range(vectors.shape[2]):
            q[row, i] = vectors[row, HOME, i] + scales[own, i] * vectors[row, end, i]
            zero += q[row, i] * 0.0
    else:
        for i in range(vectors.shape[2]):
            z[row, i] = vectors[row, end, i]
            zero += z[row, i] * 0.0
    return zero == 0.0


@_inlined
def _weigh(
    vectors: Any,
    numbers: Any,
    counts: Any,
    scales: Any,
    values: Any,
    grads: Any,
    whitened: Any,
    q: Any,
    row: Any,
    is_diagonal: Any,
    max_error: Any,
) -> Any:
    """Finish a leapfrog step, weigh its leaf and check for U-turns of the subtrees it ends."""
    end = END + 3 * counts[row, DIRECTION]
    step = numbers[row, STEP] if counts[row, DIRECTION] == 1 else -numbers[row, STEP]
    if is_diagonal:
        own = row if len(scales) > 1 else 0
        for i in range(vectors.shape[2]):
            vectors[row, end + 2, i] = scales[own, i] * grads[row, i]
    else:
        for i in range(vectors.shape[2]):
            vectors[row, end + 2, i] = whitened[row, i]
    kinetic = 0.0
    for i in range(vectors.shape[2]):
        p = vectors[row, end + 1, i] - 0.5 * step * vectors[row, end + 2, i]
        vectors[row, end + 1, i] = p
        kinetic += np.float64(p) * np.float64(p)
    # A non-finite gradient enters the momentum, so it is detected here as well.
    value = np.float64(values[row])
    hamiltonian = value + 0.5 * kinetic
    # A comparison, because reassociation folds the x - x == 0 of numba's isfinite into True.
    error = hamiltonian - numbers[row, H0] if abs(hamiltonian) < np.inf else np.inf
    counts[row, GRADIENTS] += 1
    if error > max_error:
        return _DIVERGED
    numbers[row, ACCEPTANCE] += math.exp(-error) if error > 0.0 else 1.0
    weight = _log_add(numbers[row, SUB_WEIGHT], -error)
    numbers[row, SUB_WEIGHT] = weight
    if math.log(_uniform(counts, row)) < -error - weight:
        for i in range(vectors.shape[2]):
            vectors[row, SUB, i] = q[row, i]
            vectors[row, SUB + 1, i] = grads[row, i]
            vectors[row, SUB + 2, i] = vectors[row, end + 2, i]
        numbers[row, SUB_ENERGY], numbers[row, SUB_H] = value, hamiltonian
    for i in range(vectors.shape[2]):
        vectors[row, SUB_SUM, i] += vectors[row, end + 1, i]
    # An even leaf is stored in the slot of the number of ones in leaf // 2. An odd leaf completes
    # the subtrees of as many slots as it has trailing ones.
    leaf = counts[row, LEAF]
    slot, rest = 0, leaf >> 1
    while rest:
        slot += rest & 1
        rest >>= 1
    if leaf % 2 == 0:
        _move(vectors, row, STORED + 2 * slot, end + 1)
        _move(vectors, row, STORED + 2 * slot + 1, SUB_SUM)
    closing = leaf
    while closing & 1:
        stored = STORED + 2 * slot
        if _is_turning(vectors, row, stored, end + 1, SUB_SUM, stored + 1):
            return _TURNED
        closing >>= 1
        slot -= 1
    counts[row, LEAF] = leaf + 1
    return _FULL if counts[row, LEAF] == 1 << counts[row, DEPTH] else _GOES_ON


@_inlined
def _merge(vectors: Any, numbers: Any, counts: Any, row: Any) -> Any:
    """Merge a doubling into its trajectory; return whether the whole makes a U-turn.

    The proposal of the new half is accepted with probability min(1, w_new / w_old) (biased
    progressive sampling).
    """
    if math.log(_uniform(counts, row)) < numbers[row, SUB_WEIGHT] - numbers[row, WEIGHT]:
        for part in range(3):
            _move(vectors, row, PROPOSAL + part, SUB + part)
        numbers[row, PROPOSAL_ENERGY] = numbers[row, SUB_ENERGY]
        numbers[row, PROPOSAL_H] = numbers[row, SUB_H]
        counts[row, MOVED] = 1
    numbers[row, WEIGHT] = _log_add(numbers[row, WEIGHT], numbers[row, SUB_WEIGHT])
    for i in range(vectors.shape[2]):
        vectors[row, SUM, i] += vectors[row, SUB_SUM, i]
    counts[row, DEPTH] += 1
    return _is_turning(vectors, row, END + 1, END + 4, SUM, -1)


@_inlined
def _tune(numbers: Any, counts: Any, row: Any, rate: Any, target: Any) -> Any:
    """Update the dual averaging of the logarithm of the step size.

    See :class:`pyroebm.kernels.adaptation.DualAveraging`.
    """
    counts[row, TUNED] += 1
    steps = np.float64(counts[row, TUNED])
    weight = 1.0 / (steps + 10.0)
    numbers[row, ERROR] = (1.0 - weight) * numbers[row, ERROR] + weight * (target - rate)
    log_step = numbers[row, MU] - math.sqrt(steps) / 0.1 * numbers[row, ERROR]
    decay = steps**-0.75
    numbers[row, LOG_STEP] = log_step
    numbers[row, LOG_AVERAGE] = decay * log_step + (1.0 - decay) * numbers[row, LOG_AVERAGE]
    numbers[row, STEP] = math.exp(min(log_step, 60.0))


@_inlined
def _finish(
    vectors: Any,
    numbers: Any,
    counts: Any,
    ring_x: Any,
    ring_f: Any,
    ring_i: Any,
    ring_t: Any,
    row: Any,
    outcome: Any,
    depth: Any,
    thinning: Any,
    target: Any,
) -> Any:
    """End a trajectory; after ``thinning`` of them, record the draw."""
    numbers[row, ENERGY] = numbers[row, PROPOSAL_ENERGY]
    size = numbers[row, STEP]
    rate = numbers[row, ACCEPTANCE] / counts[row, GRADIENTS]
    numbers[row, KEPT_ACCEPTANCE] += rate
    counts[row, KEPT_GRADIENTS] += counts[row, GRADIENTS]
    counts[row, KEPT_DIVERGED] |= outcome == _DIVERGED
    if target > 0.0:
        _tune(numbers, counts, row, rate, target)
    counts[row, STEPS] += 1
    if counts[row, STEPS] % thinning:
        return
    slot = counts[row, DRAWS] % len(ring_x)
    for i in range(vectors.shape[2]):
        ring_x[slot, row, 0, i] = vectors[row, PROPOSAL, i]
        ring_x[slot, row, 1, i] = vectors[row, PROPOSAL + 1, i]
    ring_f[slot, row, LP] = -numbers[row, ENERGY]
    ring_f[slot, row, RATE] = numbers[row, KEPT_ACCEPTANCE] / thinning
    ring_f[slot, row, HAMILTONIAN] = numbers[row, PROPOSAL_H]
    ring_f[slot, row, SIZE] = size
    ring_i[slot, row, LEAPFROGS] = counts[row, KEPT_GRADIENTS]
    ring_i[slot, row, TREE_DEPTH] = depth
    ring_i[slot, row, DIVERGED] = counts[row, KEPT_DIVERGED]
    ring_i[slot, row, ACCEPTED] = counts[row, MOVED]
    ring_i[slot, row, REACHED] = outcome == _FULL
    ring_t[slot, row, 0] = numbers[row, LOG_STEP]
    ring_t[slot, row, 1] = numbers[row, LOG_AVERAGE]
    ring_t[slot, row, 2] = numbers[row, ERROR]
    numbers[row, KEPT_ACCEPTANCE] = 0.0
    counts[row, KEPT_GRADIENTS] = counts[row, KEPT_DIVERGED] = 0
    counts[row, DRAWS] += 1


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
    max_error: Any,
) -> Any:
    """Advance every chain to the next point at which it needs a gradient.

    Chains with fewer than ``limit`` draws start new trajectories. Arrays are indexed and never
    sliced: a slice counts references, which would take most of the time.

    Args:
        values: energies at ``q``, ``(chains,)``.
        grads: gradients at ``q``, ``(chains, dim)``.
        whitened: gradients in whitened coordinates; not read if the metric is diagonal.
        q: positions. The next positions are written here if the metric is diagonal.
        z: positions in whitened coordinates, relative to the start of the trajectory. The next
            positions are written here if the metric is not diagonal; else it is ``q``.
        vectors: vectors of the chains.
        numbers: floating-point numbers of the chains.
        counts: integers of the chains.
        scales: square roots of the diagonal of the inverse mass, ``(chains or 1, dim)``.
        seeds: key of each trajectory, at its number modulo their length.
        ring_x: positions and gradients of the draws, at their number modulo the length.
        ring_f: floating-point statistics of the draws.
        ring_i: integer statistics of the draws.
        ring_t: state of dual averaging after each draw.
        limit: maximum number of draws of a chain.
        max_depth: maximum number of doublings.
        thinning: number of trajectories from one draw to the next.
        target: acceptance rate to which the step size of each chain is adapted; 0 does not adapt
            it.
        is_diagonal: whether the metric is ``scales``.
        max_error: energy error above which a leaf diverges.

    Returns:
        the minimum number of draws over the chains.
    """
    least = limit
    for row in range(len(counts)):
        outcome, depth = _GOES_ON, counts[row, DEPTH] + 1
        if counts[row, ACTIVE]:
            outcome = _weigh(
                vectors,
                numbers,
                counts,
                scales,
                values,
                grads,
                whitened,
                q,
                row,
                is_diagonal,
                max_error,
            )
            if outcome == _FULL:
                if _merge(vectors, numbers, counts, row):
                    outcome = _TURNED
                elif counts[row, DEPTH] < max_depth:
                    outcome = _GOES_ON
                    _double(vectors, numbers, counts, row)
                depth = counts[row, DEPTH]
        elif counts[row, DRAWS] < limit:
            _begin(vectors, numbers, counts, seeds, row)
        else:
            continue
        while True:
            if outcome != _GOES_ON:
                _finish(
                    vectors,
                    numbers,
                    counts,
                    ring_x,
                    ring_f,
                    ring_i,
                    ring_t,
                    row,
                    outcome,
                    depth,
                    thinning,
                    target,
                )
                if counts[row, DRAWS] >= limit:
                    # The chain is inactive; its point stays one with a finite energy.
                    counts[row, ACTIVE] = 0
                    for i in range(vectors.shape[2]):
                        vectors[row, HOME, i] = vectors[row, PROPOSAL, i]
                        z[row, i] = 0.0
                        q[row, i] = vectors[row, PROPOSAL, i]
                    break
                _begin(vectors, numbers, counts, seeds, row)
            if _leap(vectors, numbers, counts, scales, q, z, row, is_diagonal):
                break
            # The energy is not evaluated at a non-finite position.
            counts[row, GRADIENTS] += 1
            outcome, depth = _DIVERGED, counts[row, DEPTH] + 1
        least = min(least, counts[row, DRAWS])
    return least


def _bound(energy: Energy, q: Tensor) -> Callable[[], tuple[Any, Any]]:
    """Return a function that computes values and gradients at the current contents of ``q``.

    ``q`` has shape ``(chains, dim)``. The next call overwrites the results.
    """
    if isinstance(energy, CompiledGradient):
        bound = energy.bound_to(q.reshape(-1, *energy.event_shape))
        if bound is not None:
            values, grads, compute = bound
            # The driver takes contiguous arrays. They are views of the results, or copies of them,
            # which must be made again after each call.
            if values.is_contiguous() and grads.is_contiguous():
                views = values.numpy(), rows(grads).numpy()

                def computed() -> tuple[Any, Any]:
                    compute()
                    return views

            else:

                def computed() -> tuple[Any, Any]:
                    compute()
                    return values.contiguous().numpy(), rows(grads).contiguous().numpy()

            return computed
    return _called(energy, q)


def _called(energy: Energy, q: Tensor) -> Callable[[], tuple[Any, Any]]:
    def called() -> tuple[Any, Any]:
        values, grads = row_value_and_grad(energy, q)
        return values.contiguous().numpy(), grads.contiguous().numpy()

    return called


class Chains:
    """Batch of asynchronous no-U-turn chains.

    A draw is a function of the previous state, of the settings and of one number of the generator:
    the draws are bit for bit those that :meth:`NUTS.step` makes one by one. Finished draws are kept
    in a ring buffer until all chains have them. Unfinished trajectories need not be saved, because
    they are a function of the last draws.

    Args:
        energy: the energy, in unconstrained coordinates; on a CPU, in float32 or float64.
        state: the initial state of the chains.
        generator: draws the seed of each trajectory. Its state is always that after the seeds of
            the draws taken.
        max_tree_depth: maximum number of doublings.
        thinning: number of trajectories from one draw to the next.
        ahead: number of draws by which a chain may be ahead of those taken.
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
        # Binding to a fixed buffer takes as long as a few calls.
        self._gradient = _bound(energy, self._q) if ahead > 1 else _called(energy, self._q)
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

    @staticmethod
    def bytes_per_draw(x: Tensor) -> int:
        """Return the bytes of one buffered draw of all chains, for positions ``x``."""
        return 2 * x.nbytes + len(x) * (4 * x.element_size() + 8 * (5 + 3))

    def set(
        self,
        step_size: float | Tensor,
        inverse_mass: Tensor | Metric | None,
        tuning: DualAveraging | None = None,
        target: float = 0.0,
    ) -> None:
        """Set the settings of the following trajectories. No chain may be in a trajectory.

        Args:
            step_size: a number, or one for each chain.
            inverse_mass: the metric.
            tuning: dual averaging of the step size of each chain; None does not adapt the step
                sizes.
            target: acceptance rate that it aims at.
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
            # in float64 as in the driver, whatever the dtype of the states
            numbers[:, STEP] = [math.exp(min(log, 60.0)) for log in numbers[:, LOG_STEP]]
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
        """Continue until every chain has ``until`` draws, and none more than ``limit``.

        Both count from the beginning. After ``LONG`` seconds it stops as soon as every chain has
        one draw to take.
        """
        limit = min(limit, self.taken + self.ahead)
        until = min(until, limit)
        settings = (
            limit,
            self.max_tree_depth,
            self.thinning,
            self._target,
            self._is_diagonal,
            MAX_ENERGY_ERROR,
        )
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
        """Evaluate energies and gradients at the chains' positions.

        Returns:
            energies, gradients, and gradients in whitened coordinates.
        """
        if not self._is_diagonal:
            torch.add(self._vectors[:, HOME], self._metric.apply(self._z), out=self._q)
        values, grads = self._gradient()
        if self._is_diagonal:
            return values, grads, grads
        return values, grads, self._metric.transpose(torch.from_numpy(grads)).numpy()

    def _draw_seeds(self, steps: int) -> None:
        """Draw the seeds of trajectories before number ``steps``."""
        more = steps - self._seeded
        if more > 0:
            drawn = torch.randint(2**63 - 1, (more,), generator=self._seeder).numpy()
            self._seeds[np.arange(self._seeded, steps) % len(self._seeds)] = drawn
            self._seeded = steps

    def take(self, most: int) -> Steps:
        """Return at most ``most`` of the draws that all chains have finished, in order."""
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


class _Flat(Energy):
    """Minimal energy to compile the driver for."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x**2


@functools.cache
def compile_for(dtype: torch.dtype) -> None:
    """Compile the driver with numba for states of this dtype, or load it from the cache."""
    x = torch.zeros(1, dtype=dtype)
    chains = Chains(_Flat().to(dtype), State(x, x, x), torch.Generator(), 1)
    chains.set(1.0, None)
    chains.run(1, 1)
