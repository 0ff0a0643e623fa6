"""Blocks of chains that share a generator and an adaptation, and the records of their draws."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

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
    "Block",
    "Layout",
    "Plan",
    "check_initial",
    "Part",
    "Record",
    "announce",
    "bytes_per_draw",
    "merged",
]

#: Bytes of finished draws that the chains of a block which run ahead of the others may hold.
AHEAD = 2**24

#: Draws that are taken together from such chains, if they come fast.
TOGETHER = 64

#: Bytes of draws from which on a run says beforehand what it will take.
LARGE = 2**30


class Part(Protocol):
    """Where a record writes its draws when its room is full; :class:`pyroebm.mcmc.storage.Part` is
    a folder of files.
    """

    def write(self, start: int, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Keep the draws from number ``start`` on."""

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """All draws kept and their statistics, in order."""

    def cut(self, num_draws: int) -> None:
        """Forget the draws after the first ``num_draws``."""


class Record:
    """Draws and statistics of all chains of a block; of the room only the first ``filled`` draws
    are there.

    Args:
        state: a state, for shapes and types.
        room: draws to make room for.
        part: where full rooms go, so that memory stays bounded; None keeps all draws in memory.
    """

    def __init__(self, state: AnyState, room: int = 0, part: Part | None = None) -> None:
        self.part = part
        self.spilled = self.filled = 0
        # draw by draw, as they are written: what is read is transposed
        self.x = state.x.new_empty((room, *state.x.shape))
        self._stats: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Draws of each chain."""
        return self.spilled + self.filled

    @property
    def room(self) -> int:
        """Draws that can be written before something else has to be done."""
        if self.part is not None and self.filled == len(self.x):
            self.spill()
        return len(self.x) - self.filled

    def write(self, x: Tensor, energy: Tensor, info: Info) -> None:
        """Put draws of every chain, ``(draws, chains, *event)``, after those filled. They are there
        when the caller raises ``filled``.
        """
        facts = {"lp": -energy} | {
            k: v for k, v in info._asdict().items() if v is not None and k != "accepted"
        }
        stop = self.filled + len(x)
        for name, value in facts.items():
            if name not in self._stats:
                self._stats[name] = value.new_empty((len(self.x), value.shape[1]))
            self._stats[name][self.filled : stop] = value
        self.x[self.filled : stop] = x

    def spill(self) -> None:
        """Write what is filled to the part."""
        if self.part is not None and self.filled:
            self.part.write(self.spilled, *self._in_memory())
            self.spilled, self.filled = self.count, 0

    def _in_memory(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[: self.filled].transpose(0, 1), {
            n: v[: self.filled].transpose(0, 1) for n, v in self._stats.items()
        }

    def draws(self) -> Tensor:
        """Unconstrained draws, ``(chains, count, *event)``; read from the part where they went
        there.
        """
        x, _ = self._in_memory()
        return (
            torch.cat([self.part.read()[0].to(x), x], 1)
            if self.part is not None and self.spilled
            else x
        )

    def stats(self) -> dict[str, Tensor]:
        """Statistics, each ``(chains, count)``."""
        _, stats = self._in_memory()
        if self.part is None or not self.spilled:
            return stats
        there = {name: value.to(self.x.device) for name, value in self.part.read()[1].items()}
        return {
            name: torch.cat([value, stats[name]], 1) if name in stats else value
            for name, value in there.items()
        }

    def make_room(self, num_draws: int) -> None:
        """Make room in memory for ``num_draws`` draws in all; a part needs none."""
        more = num_draws - len(self.x)
        if self.part is None and more > 0:

            def extended(t: Tensor) -> Tensor:
                return torch.cat([t, t.new_empty((more, *t.shape[1:]))])

            self.x = extended(self.x)
            self._stats = {name: extended(value) for name, value in self._stats.items()}

    def load(self, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Take over draws kept elsewhere."""
        self.x, self.filled = x.transpose(0, 1).contiguous(), x.shape[1]
        self._stats = {name: value.transpose(0, 1).contiguous() for name, value in stats.items()}


def bytes_per_draw(target: Energy) -> int:
    """Memory of one draw of one chain: the state, four statistics of its type, two counts and two
    flags.
    """
    return (event_numel(target.event_shape) + 4) * target.dtype.itemsize + 18


def announce(num_draws: int, num_chains: int, target: Energy, streams: bool) -> None:
    """Say on stderr, before a run of more than :data:`LARGE`, what it will take and what to do
    about it.
    """
    size = num_draws * num_chains * bytes_per_draw(target)
    if size > LARGE:
        where = (
            "on disk"
            if streams
            else 'in memory; run(energy, store=folder) streams them to files, keep="moments" keeps'
            " none"
        )
        said = (
            f"{num_draws} draws of {num_chains} chains will take {size / 2**30:.1f} GiB {where};"
            " thinning=k divides that by k"
        )
        print(said, file=sys.stderr)


def merged(infos: list[Info]) -> Info:
    """One report for the steps between two kept draws: counts add up, rates are averaged, the rest
    is the last one's.
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
    """How chains make blocks, and which blocks are whose. The same chains are in a block whatever
    the number of ranks.

    Args:
        num_chains: chains of the run.
        size: chains of one block. The last block has what is left; a single chain left over joins
            the block before it, for what is learned across chains (:class:`pyroebm.ChEES`) needs
            two.
        ranks: number of this process and of all.

    Raises:
        ValueError: if the ranks are not as they must be, or if one of them would have no block.

    Example:
        >>> layout = Layout(200, 64, (1, 2))
        >>> {number: layout.chains(number) for number in layout.blocks}
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
                f" blocks that {self.num_chains}"
                f" chains make with chain_batch_size={self.size}; got ranks={self.ranks}"
            )

    def _count(self) -> int:
        whole, left = divmod(self.num_chains, self.size)
        return max(1, whole + (left > 1))

    @property
    def blocks(self) -> range:
        """The numbers of this rank's blocks: in one piece, and as many as the others have or one
        more.
        """
        (rank, world), count = self.ranks, self._count()
        return range(rank * count // world, (rank + 1) * count // world)

    def chains(self, block: int) -> range:
        """The numbers of the chains of a block."""
        stop = self.num_chains if block + 1 == self._count() else (block + 1) * self.size
        return range(block * self.size, stop)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all blocks of a run have in common.

    Args:
        kernel: the kernel before it is adapted.
        adaptation: how warm-up adapts it; None leaves it as it is.
        warmup_steps: steps of warm-up.
        thinning: steps from one kept draw to the next.
        save_warmup: whether to keep the draws of the warm-up.
    """

    kernel: Kernel[Any]
    adaptation: Adaptation | None
    warmup_steps: int
    thinning: int
    save_warmup: bool

    def settings(self, warm_left: int) -> dict[str, Any]:
        """What two runs must have in common, with ``warm_left`` steps of warm-up to go, for one to
        go on as the other would.
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


class Block:
    """Chains that are warmed up and drawn together. What happens in one block depends on no other.

    A step is whole or has not been: one that Ctrl-C breaks off gives its random numbers back, and
    is the same when it is taken again.

    Args:
        plan: what all blocks of the run have in common.
        target: the energy that the kernel sees, in unconstrained coordinates.
        start: starting states in these coordinates, ``(chains, *event)``.
        generator: the source of every random number of the block, on the device of the states.
        parts: where the draws of the warm-up and those after it go when their room is full; None
            keeps them in memory.
        room: draws to hold in memory before they go to a part.
        named: states as the variables whose moments are kept, and no draw; None keeps the draws.
    """

    def __init__(
        self,
        plan: Plan,
        target: Energy,
        start: Tensor,
        generator: torch.Generator,
        parts: tuple[Part, Part] | None = None,
        room: int = 0,
        named: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.plan = plan
        self.target = target
        self.generator = generator
        #: what the kernel's steps are taken on: the target, or its compiled view
        self.moving = target
        self.kernel, self.state = plan.kernel, plan.kernel.init(target, start, generator)
        self.memory: Any = None  #: of the adaptation
        #: chains that run ahead of each other, at trajectories of their own
        self._chains: Chains | None = None
        self.warm_left = plan.warmup_steps  #: steps of warm-up to go
        warm_part, part = parts or (None, None)
        self.warmup = Record(self.state, room, warm_part)
        self.record = Record(self.state, room, part)
        self.count = 0  #: draws of each chain
        #: of them, those in which the chain moved
        self.moves = torch.zeros(len(start), dtype=torch.long, device=start.device)
        self.named, self.moments = named, dict[str, StreamingMoments]()
        #: what the progress shows: divergent steps, and acceptance rates of the steps taken last
        self.divergences = torch.zeros((), dtype=torch.long, device=start.device)
        self.acceptance = torch.zeros_like(self.state.energy)

    def warm_up(self, most: int = 1) -> int:
        """One step of the warm-up, or as many as all chains have taken, if a chain may run ahead of
        the others; at most ``most``. Return how many.
        """
        plan, before = self.plan, self.generator.get_state()
        try:
            kernel, memory = self.kernel, self.memory
            adaptation = plan.adaptation
            if adaptation is not None and self.warm_left == plan.warmup_steps:
                kernel, memory = adaptation.start(kernel, self.moving, self.state, self.generator)
            most = min(most, self.warmup.room) if plan.save_warmup else most
            free = self._free_steps(kernel, memory)
            if free and isinstance(adaptation, WindowAdaptation):
                aim = (memory.tuning, adaptation.aims_at(kernel) or 0.0)
                taken = self._taken(kernel, free, most, *aim)
                kernel, memory = self._learned(adaptation, kernel, memory, taken)
            elif free:
                taken = self._taken(kernel, free, most)
            else:
                kernel, state, info, memory = warmup_step(
                    kernel,
                    self.moving,
                    self.state,
                    memory,
                    plan.warmup_steps,
                    adaptation,
                    self.generator,
                )
                taken = Steps.of(state, info)
            if plan.save_warmup:
                self.warmup.write(taken.x, taken.energy, taken.info)
            divergences = self.divergences + taken.info.diverging.sum()
            number = taken.number
            chains = self._chains if number < free else None
        except BaseException:
            self._chains = None
            self.generator.set_state(before)
            raise
        # Assignments alone, from here on: Python looks for Ctrl-C at calls, so that it finds a step
        # done or not begun.
        self.kernel = kernel
        self.state = taken.last
        self.memory = memory
        self._chains = chains
        self.divergences = divergences
        self.acceptance = taken.info.acceptance_rate
        self.warm_left -= number
        self.warmup.filled += number * plan.save_warmup
        return number

    def _free_steps(self, kernel: Kernel[Any], memory: Any) -> int:
        """Steps of the warm-up that each chain may take by itself from here."""
        if not kernel.runs_ahead(self.moving):
            return 0
        adaptation = self.plan.adaptation
        if adaptation is None:
            return self.warm_left
        if not isinstance(adaptation, WindowAdaptation):
            return 0
        return adaptation.free_steps(kernel, memory, self.plan.warmup_steps)

    def _learned(
        self, adaptation: WindowAdaptation, kernel: Kernel[Any], memory: Any, taken: Steps
    ) -> tuple[Kernel[Any], Any]:
        """What warm-up learns from steps that chains took by themselves."""
        if taken.tuning is not None:
            memory = memory._replace(tuning=taken.tuning)
            kernel = kernel.replace(step_size=taken.tuning.step_size)
        return adaptation.learn(
            kernel, self.moving, taken, memory, self.plan.warmup_steps, self.generator
        )

    def _taken(
        self,
        kernel: Any,
        left: int,
        most: int,
        tuning: DualAveraging | None = None,
        target: float = 0.0,
        thinning: int = 1,
    ) -> Steps:
        """At least one step, or draw, of all chains, and at most ``most``, of those that each takes
        by itself; no chain takes more than ``left``.
        """
        from pyroebm.kernels.nuts.driver import Chains

        if self._chains is None:
            room = AHEAD // Chains.bytes_per_draw(self.state.x)
            ahead = min(left, max(2, room))
            self._chains = Chains(
                self.moving, self.state, self.generator, kernel.max_tree_depth, thinning, ahead
            )
            self._chains.set(kernel.step_size, kernel.inverse_mass, tuning, target)
        chains = self._chains
        chains.run(chains.taken + min(most, TOGETHER), chains.taken + left)
        return chains.take(most)

    def draw(self, goal: int, most: int = 1) -> int:
        """One kept draw of every chain, or as many as all chains have made, if a chain may run
        ahead of the others; at most ``most``, and up to ``goal`` in all. Return how many.
        """
        before = self.generator.get_state()
        try:
            most = min(most, goal - self.count, self.record.room if self.named is None else most)
            if self.kernel.runs_ahead(self.moving):
                taken = self._taken(
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
                moments = self._observed(taken)
            path = torch.cat([self.state.x.unsqueeze(0), taken.x])
            moves = self.moves + (path[1:] != path[:-1]).unsqueeze(2).flatten(2).any(2).sum(0)
            divergences = self.divergences + taken.info.diverging.sum()
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
        self.acceptance = taken.info.acceptance_rate
        self.count += number
        self.record.filled += number * (self.named is None)
        return number

    def _observed(self, taken: Steps) -> dict[str, StreamingMoments]:
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

    def make_room(self, num_draws: int) -> None:
        """Make room for the rest of the warm-up and for ``num_draws`` draws in all."""
        self.warmup.make_room(self.warmup.count + self.warm_left * self.plan.save_warmup)
        if self.named is None:
            self.record.make_room(num_draws)

    def refresh(self) -> None:
        """Take the energies anew: the target may have been trained since."""
        self.state = self.kernel.refresh(self.target, self.state)
        self._chains = None

    def state_dict(self, draws: bool = True) -> dict[str, Tensor]:
        """All that the block needs to go on, as tensors; ``draws``: and every draw."""
        tensors: dict[str, Tensor] = {"rng": self.generator.get_state()}
        said = {
            name: pack(getattr(self, name), name, tensors)
            for name in ("state", "kernel", "moments", "warm_left", "count", "moves")
        }
        said |= {"memory": pack(self.memory, "memory", tensors) if self.warm_left else None}
        for name, record in (("warmup", self.warmup), ("draws", self.record)):
            said[f"{name}_count"] = record.count
            if draws and record.count:
                tensors |= {f"{name}.x": record.draws()} | {
                    f"{name}.stats.{k}": v for k, v in record.stats().items()
                }
        tensors["said"] = to_text(said)
        return {name: value.detach().clone().contiguous() for name, value in tensors.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Stand where the block stood whose state it is; draws that the state lacks are those of
        the parts.
        """
        said = from_text(tensors["said"].cpu())
        tensors = {k: v if k == "rng" else v.to(self.target.device) for k, v in tensors.items()}
        self.state = unpack(said["state"], self.state, tensors)
        self.kernel = unpack(said["kernel"], self.plan.kernel, tensors)
        self.moments = unpack(said["moments"], {"": StreamingMoments.start(self.state.x)}, tensors)
        self.moves = unpack(said["moves"], self.moves, tensors)
        self.warm_left = said["warm_left"]
        self.count = said["count"]
        self.memory = None
        if said["memory"] is not None and self.plan.adaptation is not None:
            _, like = self.plan.adaptation.start(
                self.plan.kernel, self.target, self.state, self.generator
            )
            self.memory = unpack(said["memory"], like, tensors)
        self.generator.set_state(tensors["rng"].cpu())
        for name, record in (("warmup", self.warmup), ("draws", self.record)):
            stats = {
                k.removeprefix(f"{name}.stats."): v
                for k, v in tensors.items()
                if k.startswith(f"{name}.stats.")
            }
            if record.part is not None:
                record.part.cut(said[f"{name}_count"])
                record.spilled = said[f"{name}_count"]
            elif f"{name}.x" in tensors:
                record.load(tensors[f"{name}.x"], stats)


def check_initial(energy: Energy, initial: Tensor, num_chains: int) -> None:
    """ValueError unless ``initial`` holds a state of the energy's support for each chain."""
    if (
        not isinstance(initial, Tensor)
        or initial.dim() != 1 + len(energy.event_shape)
        or len(initial) != num_chains
    ):
        shape = tuple(initial.shape) if isinstance(initial, Tensor) else type(initial).__name__
        raise ValueError(
            f"initial must hold one state for each of num_chains={num_chains}, got shape {shape}"
        )
    energy.check_states(initial, "initial")
    legal = inside(energy.support, initial, len(energy.event_shape))
    if not bool(legal.all()):
        row = int((~legal).nonzero()[0])
        raise ValueError(
            f"initial must lie in support={energy.support}: {int((~legal).sum())} of"
            f" {len(initial)} rows do not, the first"
            f" is row {row} with {initial[row].tolist()}"
        )
