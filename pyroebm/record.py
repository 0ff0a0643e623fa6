"""Draws and statistics of one block of chains: preallocated in memory, or a buffer before a file."""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pyroebm.energy import Energy
from pyroebm.kernels.base import AnyState, Info
from pyroebm.supports import event_numel

__all__ = ["Part", "Record", "announce", "bytes_per_draw", "merged"]

#: Bytes of draws from which on a run says beforehand what it will take.
LARGE = 2**30


class Part(Protocol):
    """Where a record writes its draws when its room is full; :class:`pyroebm.store.Part` is a folder of files."""

    def write(self, start: int, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Keep the draws from number ``start`` on."""

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """All draws kept and their statistics, in order."""

    def cut(self, count: int) -> None:
        """Forget the draws after the first ``count``."""


class Record:
    """Draws and statistics of all chains of a block; of the room only the first ``filled`` draws are there.

    Args:
        state: a state, for shapes and types.
        room: draws to make room for.
        part: where full rooms go, so that memory stays bounded; None keeps all draws in memory.
    """

    def __init__(self, state: AnyState, room: int = 0, part: Part | None = None) -> None:
        self.part = part
        self.spilled = self.filled = 0
        self.x = state.x.new_empty((room, *state.x.shape))  # draw by draw, as they are written: what is read is transposed
        self._stats: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Draws of each chain."""
        return self.spilled + self.filled

    def write(self, state: AnyState, info: Info) -> None:
        """Put one draw of every chain after those filled. It is there when the caller raises ``filled``."""
        if self.part is not None and self.filled == len(self.x):
            self.spill()
        facts = {"lp": -state.energy} | {k: v for k, v in info._asdict().items() if v is not None and k != "accepted"}
        for name, value in facts.items():
            if name not in self._stats:
                self._stats[name] = value.new_empty((len(self.x), len(value)))
            self._stats[name][self.filled] = value
        self.x[self.filled] = state.x

    def spill(self) -> None:
        """Write what is filled to the part."""
        if self.part is not None and self.filled:
            self.part.write(self.spilled, *self._in_memory())
            self.spilled, self.filled = self.count, 0

    def _in_memory(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[: self.filled].transpose(0, 1), {n: v[: self.filled].transpose(0, 1) for n, v in self._stats.items()}

    def draws(self) -> Tensor:
        """Unconstrained draws, ``(chains, count, *event)``; read from the part where they went there."""
        x, _ = self._in_memory()
        return torch.cat([self.part.read()[0].to(x), x], 1) if self.part is not None and self.spilled else x

    def stats(self) -> dict[str, Tensor]:
        """Statistics, each ``(chains, count)``."""
        _, stats = self._in_memory()
        if self.part is None or not self.spilled:
            return stats
        there = {name: value.to(self.x.device) for name, value in self.part.read()[1].items()}
        return {name: torch.cat([value, stats[name]], 1) if name in stats else value for name, value in there.items()}

    def make_room(self, count: int) -> None:
        """Make room in memory for ``count`` draws in all; a part needs none."""
        if self.part is None and (more := count - len(self.x)) > 0:
            extend = lambda t: torch.cat([t, t.new_empty((more, *t.shape[1:]))])  # noqa: E731
            self.x, self._stats = extend(self.x), {name: extend(value) for name, value in self._stats.items()}

    def load(self, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Take over draws kept elsewhere."""
        self.x, self.filled = x.transpose(0, 1).contiguous(), x.shape[1]
        self._stats = {name: value.transpose(0, 1).contiguous() for name, value in stats.items()}


def bytes_per_draw(target: Energy) -> int:
    """Memory of one draw of one chain: the state, four statistics of its type, two counts and a flag."""
    return (event_numel(target.event_shape) + 4) * target.dtype.itemsize + 17


def announce(draws: int, chains: int, target: Energy, streams: bool) -> None:
    """Say on stderr, before a run of more than :data:`LARGE`, what it will take and what to do about it."""
    size = draws * chains * bytes_per_draw(target)
    if size > LARGE:
        where = "on disk" if streams else 'in memory; run(energy, store=folder) streams them to files, keep="moments" keeps none'
        said = f"{draws} draws of {chains} chains will take {size / 2**30:.1f} GiB {where}; thinning=k divides that by k"
        tqdm.write(said, file=sys.stderr)


def merged(infos: list[Info]) -> Info:
    """One report for the steps between two kept draws: counts add up, rates are averaged, the rest is the last one's."""
    last = infos[-1]
    if len(infos) == 1:
        return last
    return last._replace(
        acceptance_rate=torch.stack([i.acceptance_rate for i in infos]).mean(0),
        diverging=torch.stack([i.diverging for i in infos]).any(0),
        n_steps=torch.stack([i.n_steps for i in infos]).sum(0),
    )
