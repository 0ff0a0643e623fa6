"""Batches of chains that share a generator and an adaptation, and the records of their draws."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.arrays import as_tensor
from pyroebm.core.energy import Energy
from pyroebm.core.serialization import from_text, pack, to_text, unpack
from pyroebm.core.supports import event_numel, inside
from pyroebm.diagnostics.streaming import StreamingMoments
from pyroebm.kernels.adaptation.step_size import DualAveraging
from pyroebm.kernels.adaptation.windows import Adaptation, WindowAdaptation, warmup_step
from pyroebm.kernels.base import AnyState, Info, Kernel, Steps

if TYPE_CHECKING:
    from pyroebm.kernels.nuts.driver import Chains

__all__ = [
    "ChainBatch",
    "Layout",
    "Plan",
    "check_initial",
    "Part",
    "Record",
    "announce_size",
    "bytes_per_draw",
    "merged",
]

#: Bytes of finished draws that asynchronous chains of one batch may buffer.
AHEAD_BYTES = 2**24

#: Maximum number of draws taken at once from asynchronous chains.
MAX_TAKEN = 64

#: Bytes of draws above which a run prints its size beforehand.
ANNOUNCE_BYTES = 2**30


class Part(Protocol):
    """Protocol of the destination of full buffers.

    :class:`pyroebm.mcmc.storage.Part` is a folder of files.
    """

    def write(self, start: int, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Write draws from number ``start`` on."""

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return all draws written and their statistics, in order."""

    def cut(self, num_draws: int) -> None:
        """Remove the draws after the first ``num_draws``."""


class Record:
    """Draws and statistics of all chains of a batch. Only the first ``filled`` slots are valid.

    Args:
        state: a state, for shapes and dtypes.
        buffer_size: number of draws to allocate.
        part: where full buffers are written, so that memory is bounded; None keeps all draws in
            memory.
    """

    def __init__(self, state: AnyState, buffer_size: int = 0, part: Part | None = None) -> None:
        self.part = part
        self.flushed = self.filled = 0
        # The draw is the first axis, in the order of writing; reading transposes.
        self.x = state.x.new_empty((buffer_size, *state.x.shape))
        self._stats: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of draws of each chain."""
        return self.flushed + self.filled

    @property
    def free(self) -> int:
        """Number of free slots; a full buffer is first flushed to the part."""
        if self.part is not None and self.filled == len(self.x):
            self.flush()
        return len(self.x) - self.filled

    def write(self, x: Tensor, energy: Tensor, info: Info) -> None:
        """Write draws of every chain, ``(draws, chains, *event)``, after the valid slots.

        They become valid when the caller increases ``filled``.
        """
        stats = {"lp": -energy} | {
            k: v for k, v in info._asdict().items() if v is not None and k != "accepted"
        }
        stop = self.filled + len(x)
        for name, value in stats.items():
            if name not in self._stats:
                self._stats[name] = value.new_empty((len(self.x), value.shape[1]))
            self._stats[name][self.filled : stop] = value
        self.x[self.filled : stop] = x

    def replace_last(self, x: Tensor, energy: Tensor) -> None:
        """Replace the latest draw of every chain in memory, and its ``lp``."""
        self.x[self.filled - 1] = x
        self._stats["lp"][self.filled - 1] = -energy

    def flush(self) -> None:
        """Write the valid slots to the part."""
        if self.part is not None and self.filled:
            self.part.write(self.flushed, *self._in_memory())
            self.flushed, self.filled = self.count, 0

    def _in_memory(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[: self.filled].transpose(0, 1), {
            n: v[: self.filled].transpose(0, 1) for n, v in self._stats.items()
        }

    def draws(self) -> Tensor:
        """Return unconstrained draws, ``(chains, count, *event)``, including those of the part."""
        x, _ = self._in_memory()
        return (
            torch.cat([self.part.read()[0].to(x), x], 1)
            if self.part is not None and self.flushed
            else x
        )

    def stats(self) -> dict[str, Tensor]:
        """Return statistics, each ``(chains, count)``, including those of the part."""
        _, stats = self._in_memory()
        if self.part is None or not self.flushed:
            return stats
        there = {name: value.to(self.x.device) for name, value in self.part.read()[1].items()}
        return {
            name: torch.cat([value, stats[name]], 1) if name in stats else value
            for name, value in there.items()
        }

    def reserve(self, num_draws: int) -> None:
        """Allocate ``num_draws`` slots in all; not needed with a part."""
        more = num_draws - len(self.x)
        if self.part is None and more > 0:

            def extended(t: Tensor) -> Tensor:
                return torch.cat([t, t.new_empty((more, *t.shape[1:]))])

            self.x = extended(self.x)
            self._stats = {name: extended(value) for name, value in self._stats.items()}

    def load(self, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Replace the contents by given draws ``(chains, draws, *event)`` and statistics."""
        self.x, self.filled = x.transpose(0, 1).contiguous(), x.shape[1]
        self._stats = {name: value.transpose(0, 1).contiguous() for name, value in stats.items()}


def bytes_per_draw(target: Energy) -> int:
    """Return the bytes of one draw of one chain: position, 4 floats, 2 integers and 2 flags."""
    return (event_numel(target.event_shape) + 4) * target.dtype.itemsize + 18


def announce_size(num_draws: int, num_chains: int, target: Energy, streams: bool) -> None:
    """Print the size of a run above ``ANNOUNCE_BYTES`` to stderr, and how to reduce it."""
    size = num_draws * num_chains * bytes_per_draw(target)
    if size > ANNOUNCE_BYTES:
        where = (
            "on disk"
            if streams
            else 'in memory; run(energy, store=folder) streams them to files, keep="moments" keeps'
            " none"
        )
        text = (
            f"{num_draws} draws of {num_chains} chains will take {size / 2**30:.1f} GiB {where};"
            " thinning=k divides that by k"
        )
        print(text, file=sys.stderr)


def merged(infos: list[Info]) -> Info:
    """Merge the reports of the steps between two kept draws.

    Counts are added and rates averaged; the rest is that of the last step.
    """
    last = infos[-1]
    if len(infos) == 1:
        return last
    return last._replace(
        acceptance_rate=torch.stack([i.acceptance_rate for i in infos]).mean(0),
        diverging=torch.stack([i.diverging for i in infos]).any(0),
        n_steps=torch.stack([i.n_steps for i in infos]).sum(0),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Division of chains into batches, and of batches among ranks.

    The chains of a batch are the same for any number of ranks.

    Args:
        num_chains: number of chains of the run.
        size: number of chains of one batch. The last batch has the remainder. A single remaining
            chain is added to the batch before it, because adaptation across chains
            (:class:`pyroebm.ChEES`) requires two.
        ranks: number of this process and number of processes.

    Raises:
        ValueError: if ``ranks`` is out of range, or if a rank would have no batch.

    Example:
        >>> layout = Layout(200, 64, (1, 2))
        >>> {number: layout.chains(number) for number in layout.batches}
        {2: range(128, 192), 3: range(192, 200)}
    """

    num_chains: int
    size: int = 64
    ranks: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        (rank, world), count = self.ranks, self._count()
        if not 0 <= rank < world or world > count:
            raise ValueError(
                f"ranks must be (rank, world) with 0 <= rank < world <= {count}, the number of"
                f" chain batches of {self.num_chains} chains with chain_batch_size={self.size};"
                f" got ranks={self.ranks}; lower chain_batch_size"
            )

    def _count(self) -> int:
        whole, left = divmod(self.num_chains, self.size)
        return max(1, whole + (left > 1))

    @property
    def batches(self) -> range:
        """Numbers of this rank's batches: consecutive, as many as others have or one more."""
        (rank, world), count = self.ranks, self._count()
        return range(rank * count // world, (rank + 1) * count // world)

    def chains(self, batch: int) -> range:
        """Return the numbers of the chains of a batch."""
        stop = self.num_chains if batch + 1 == self._count() else (batch + 1) * self.size
        return range(batch * self.size, stop)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings shared by all chain batches of a run.

    Args:
        kernel: the kernel before adaptation.
        adaptation: adaptation of the warm-up; None does not change the kernel.
        warmup_steps: number of warm-up steps.
        thinning: number of steps from one kept draw to the next.
        save_warmup: whether to keep the draws of the warm-up.
    """

    kernel: Kernel[Any]
    adaptation: Adaptation | None
    warmup_steps: int
    thinning: int
    save_warmup: bool

    def settings(self, warm_left: int) -> dict[str, Any]:
        """Return the settings that a run must share with another one to continue it.

        ``warm_left`` is the number of warm-up steps left.
        """
        names = [
            field.name
            for field in dataclasses.fields(self.kernel)
            if field.name not in self.kernel.learned
        ]
        plain = {name: getattr(self.kernel, name) for name in names}
        plain = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in plain.items()}
        warming = (
            {"warmup_steps": self.warmup_steps, "adaptation": repr(self.adaptation)}
            if warm_left
            else {}
        )
        return {
            "kernel": type(self.kernel).__name__,
            **plain,
            "thinning": self.thinning,
            "warm_left": warm_left,
            **warming,
        }


class ChainBatch:
    """Chains that are warmed up and drawn together. Batches are independent of each other.

    Steps are atomic: a step interrupted by Ctrl-C restores the generator and can be retried with
    the same result.

    Args:
        plan: settings shared by all batches of the run.
        target: the energy that the kernel sees, in unconstrained coordinates.
        start: starting positions in these coordinates, ``(chains, *event)``.
        generator: source of all randomness of the batch, on the device of the states.
        parts: where full buffers of warm-up draws and of draws are written; None keeps them in
            memory.
        buffer_size: number of draws to hold in memory before they are written to a part.
        named: function from positions to the variables whose moments are kept instead of draws;
            None keeps the draws.
    """

    def __init__(
        self,
        plan: Plan,
        target: Energy,
        start: Tensor,
        generator: torch.Generator,
        parts: tuple[Part, Part] | None = None,
        buffer_size: int = 0,
        named: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.plan = plan
        self.target = target
        self.generator = generator
        #: the energy on which the kernel moves: the target, or its compiled view
        self.moving = target
        self.kernel, self.state = plan.kernel, plan.kernel.init(target, start, generator)
        self.adaptation_state: Any = None
        #: asynchronous chains with unfinished trajectories
        self._chains: Chains | None = None
        self.warm_left = plan.warmup_steps  #: number of warm-up steps left
        warm_part, part = parts or (None, None)
        self.warmup = Record(self.state, buffer_size, warm_part)
        self.record = Record(self.state, buffer_size, part)
        self.count = 0  #: number of draws of each chain
        #: number of draws in which each chain moved
        self.moves = torch.zeros(len(start), dtype=torch.long, device=start.device)
        self.named, self.moments = named, dict[str, StreamingMoments]()
        #: number of divergent steps, for the progress bar
        self.divergences = torch.zeros((), dtype=torch.long, device=start.device)
        self.info: Info | None = None  #: report of the latest step

    def warm_up(self, most: int = 1) -> int:
        """Run warm-up steps: one, or as many as all asynchronous chains have finished.

        Returns:
            the number of steps, at most ``most``.
        """
        plan, before = self.plan, self.generator.get_state()
        try:
            kernel, adaptation_state = self.kernel, self.adaptation_state
            adaptation = plan.adaptation
            if adaptation is not None and self.warm_left == plan.warmup_steps:
                kernel, adaptation_state = adaptation.start(
                    kernel, self.moving, self.state, self.generator
                )
            most = min(most, self.warmup.free) if plan.save_warmup else most
            free = self._free_steps(kernel, adaptation_state)
            if free and isinstance(adaptation, WindowAdaptation):
                aim = (adaptation_state.tuning, adaptation.aims_at(kernel) or 0.0)
                taken = self._take(kernel, free, most, *aim)
                kernel, adaptation_state = self._learn(adaptation, kernel, adaptation_state, taken)
            elif free:
                taken = self._take(kernel, free, most)
            else:
                kernel, state, info, adaptation_state = warmup_step(
                    kernel,
                    self.moving,
                    self.state,
                    adaptation_state,
                    plan.warmup_steps,
                    adaptation,
                    self.generator,
                )
                taken = Steps.of(state, info)
            if plan.save_warmup:
                self.warmup.write(taken.x, taken.energy, taken.info)
            divergences = self.divergences + taken.info.diverging.sum()
            info = taken.report(-1)
            number = taken.number
            chains = self._chains if number < free else None
        except BaseException:
            self._chains = None
            self.generator.set_state(before)
            raise
        # Only assignments from here on: Python checks for Ctrl-C at calls, so a step is either
        # complete or has no effect.
        self.kernel = kernel
        self.state = taken.last
        self.adaptation_state = adaptation_state
        self._chains = chains
        self.divergences = divergences
        self.info = info
        self.warm_left -= number
        self.warmup.filled += number * plan.save_warmup
        return number

    def _free_steps(self, kernel: Kernel[Any], adaptation_state: Any) -> int:
        """Return how many warm-up steps the chains may run asynchronously from here."""
        if not kernel.runs_ahead(self.moving):
            return 0
        adaptation = self.plan.adaptation
        if adaptation is None:
            return self.warm_left
        if not isinstance(adaptation, WindowAdaptation):
            return 0
        return adaptation.free_steps(kernel, adaptation_state, self.plan.warmup_steps)

    def _learn(
        self, adaptation: WindowAdaptation, kernel: Kernel[Any], adaptation_state: Any, taken: Steps
    ) -> tuple[Kernel[Any], Any]:
        """Update the adaptation with steps of asynchronous chains."""
        if taken.tuning is not None:
            adaptation_state = adaptation_state._replace(tuning=taken.tuning)
            kernel = kernel.replace(step_size=taken.tuning.step_size)
        return adaptation.learn(
            kernel, self.moving, taken, adaptation_state, self.plan.warmup_steps, self.generator
        )

    def _take(
        self,
        kernel: Any,
        left: int,
        most: int,
        tuning: DualAveraging | None = None,
        target: float = 0.0,
        thinning: int = 1,
    ) -> Steps:
        """Take finished steps, or draws, of asynchronous chains: at least one and at most ``most``.

        No chain runs more than ``left`` steps ahead.
        """
        from pyroebm.kernels.nuts.driver import Chains

        if self._chains is None:
            affordable = AHEAD_BYTES // Chains.bytes_per_draw(self.state.x)
            ahead = min(left, max(2, affordable))
            self._chains = Chains(
                self.moving, self.state, self.generator, kernel.max_tree_depth, thinning, ahead
            )
            self._chains.set(kernel.step_size, kernel.inverse_mass, tuning, target)
        chains = self._chains
        chains.run(chains.taken + min(most, MAX_TAKEN), chains.taken + left)
        return chains.take(most)

    def draw(self, goal: int, most: int = 1) -> int:
        """Make kept draws: one, or as many as all asynchronous chains have finished.

        Args:
            goal: number of draws in all.
            most: maximum number of draws now.

        Returns:
            the number of draws made.
        """
        before = self.generator.get_state()
        try:
            most = min(most, goal - self.count, self.record.free if self.named is None else most)
            if self.kernel.runs_ahead(self.moving):
                taken = self._take(
                    self.kernel, goal - self.count, most, thinning=self.plan.thinning
                )
            else:
                state, infos = self.state, []
                for _ in range(self.plan.thinning):
                    state, info = self.kernel.step(self.moving, state, self.generator)
                    infos.append(info)
                taken = Steps.of(state, merged(infos))
            moments = self.moments
            if self.named is None:
                self.record.write(taken.x, taken.energy, taken.info)
            else:
                moments = self._updated_moments(taken)
            path = torch.cat([self.state.x.unsqueeze(0), taken.x])
            moves = self.moves + (path[1:] != path[:-1]).unsqueeze(2).flatten(2).any(2).sum(0)
            divergences = self.divergences + taken.info.diverging.sum()
            info = taken.report(-1)
            number = taken.number
            chains = self._chains if self.count + number < goal else None
        except BaseException:
            self._chains = None
            self.generator.set_state(before)
            raise
        self.state = taken.last
        self.moments = moments
        self.moves = moves
        self._chains = chains
        self.divergences = divergences
        self.info = info
        self.count += number
        self.record.filled += number * (self.named is None)
        return number

    def _updated_moments(self, taken: Steps) -> dict[str, StreamingMoments]:
        names = ("acceptance_rate", "diverging", "n_steps")
        moments = self.moments
        for i in range(taken.number):
            named = {} if self.named is None else self.named(taken.x[i])
            stats = {name: getattr(taken.info, name)[i] for name in names}
            seen = {
                name: value.double()
                for name, value in {**named, "lp": -taken.energy[i], **stats}.items()
            }
            moments = {
                name: (moments.get(name) or StreamingMoments.start(value)).update(value)
                for name, value in seen.items()
            }
        return moments

    def reserve(self, num_draws: int) -> None:
        """Allocate the rest of the warm-up and ``num_draws`` draws in all."""
        self.warmup.reserve(self.warmup.count + self.warm_left * self.plan.save_warmup)
        if self.named is None:
            self.record.reserve(num_draws)

    def move(self, x: Tensor) -> None:
        """Replace the current positions, and the latest draws, by ``x`` ``(chains, *event)``."""
        self.state = self.kernel.init(self.target, x, self.generator)
        self._chains = None
        record = self.record if self.count else self.warmup
        if record.filled:
            record.replace_last(x, self.state.energy)

    def refresh(self) -> None:
        """Recompute the energies: the target may have been trained since."""
        self.state = self.kernel.refresh(self.target, self.state)
        self._chains = None

    def state_dict(self, draws: bool = True) -> dict[str, Tensor]:
        """Return all that is needed to continue, as tensors; with ``draws`` also all draws."""
        tensors: dict[str, Tensor] = {"rng": self.generator.get_state()}
        metadata = {
            name: pack(getattr(self, name), name, tensors)
            for name in ("state", "kernel", "moments", "warm_left", "count", "moves")
        }
        metadata |= {
            "adaptation_state": pack(self.adaptation_state, "adaptation_state", tensors)
            if self.warm_left
            else None
        }
        for name, record in (("warmup", self.warmup), ("draws", self.record)):
            metadata[f"{name}_count"] = record.count
            if draws and record.count:
                tensors |= {f"{name}.x": record.draws()} | {
                    f"{name}.stats.{k}": v for k, v in record.stats().items()
                }
        tensors["metadata"] = to_text(metadata)
        return {name: value.detach().clone().contiguous() for name, value in tensors.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore a saved batch; draws that are not in the state are those of the parts."""
        metadata = from_text(tensors["metadata"].cpu())
        tensors = {k: v if k == "rng" else v.to(self.target.device) for k, v in tensors.items()}
        self.state = unpack(metadata["state"], self.state, tensors)
        self.kernel = unpack(metadata["kernel"], self.plan.kernel, tensors)
        self.moments = unpack(
            metadata["moments"], {"": StreamingMoments.start(self.state.x)}, tensors
        )
        self.moves = unpack(metadata["moves"], self.moves, tensors)
        self.warm_left = metadata["warm_left"]
        self.count = metadata["count"]
        self.adaptation_state = None
        if metadata["adaptation_state"] is not None and self.plan.adaptation is not None:
            _, like = self.plan.adaptation.start(
                self.plan.kernel, self.target, self.state, self.generator
            )
            self.adaptation_state = unpack(metadata["adaptation_state"], like, tensors)
        self.generator.set_state(tensors["rng"].cpu())
        for name, record in (("warmup", self.warmup), ("draws", self.record)):
            stats = {
                k.removeprefix(f"{name}.stats."): v
                for k, v in tensors.items()
                if k.startswith(f"{name}.stats.")
            }
            if record.part is not None:
                record.part.cut(metadata[f"{name}_count"])
                record.flushed = metadata[f"{name}_count"]
            elif f"{name}.x" in tensors:
                record.load(tensors[f"{name}.x"], stats)


def check_initial(energy: Energy, initial: Tensor | np.ndarray, num_chains: int) -> Tensor:
    """Return starting states as a tensor.

    Raises:
        ValueError: unless ``initial`` holds a state in the support for each chain.
    """
    states = as_tensor(initial, energy.dtype, energy.device, "initial")
    if states.dim() != 1 + len(energy.event_shape) or len(states) != num_chains:
        raise ValueError(
            f"initial must hold one state for each of num_chains={num_chains}, got shape"
            f" {tuple(states.shape)}"
        )
    energy.check_states(states, "initial")
    legal = inside(energy.support, states, len(energy.event_shape))
    if not bool(legal.all()):
        row = int((~legal).nonzero()[0])
        raise ValueError(
            f"initial must lie in support={energy.support}: {int((~legal).sum())} of"
            f" {len(states)} rows do not, the first is row {row} with {states[row].tolist()};"
            " use energy.initial(num_chains)"
        )
    return states
