"""Data in random batches, of which a process may take a share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.rng import seeded_generator

__all__ = ["Batches", "Data"]

Data = Tensor | tuple[Tensor, ...]


class Batches:
    """Data in random batches: each row once in an epoch, the last batch smaller where it must be.

    The order of an epoch depends on the seed and on its number alone, so that any step's batch can
    be had at once.

    Args:
        data: N rows, or a tuple of such (images and labels), each ``(N, ...)``.
        batch_size: rows of a batch.
        seed: of the orders.
        ranks: number of this process and of all, which share each batch: process r of w takes every
            w-th row from row r on.

    Raises:
        ValueError: if there are no rows, the tensors have different numbers of them, ``batch_size``
            < 1, or a batch has fewer rows than there are processes.

    Example:
        >>> batches = Batches(torch.arange(5), batch_size=2)
        >>> len(batches), sorted(torch.cat([batches(step) for step in range(3)]).tolist())
        (3, [0, 1, 2, 3, 4])
    """

    def __init__(
        self, data: Data, batch_size: int, seed: int = 0, ranks: tuple[int, int] = (0, 1)
    ) -> None:
        parts = data if isinstance(data, tuple) else (data,)
        if not parts or not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
            raise ValueError(
                f"data must be a tensor of rows, or a tuple of such, got {type(data).__name__}"
            )
        rows = {len(part) for part in parts}
        if len(rows) > 1 or 0 in rows:
            raise ValueError(
                f"data must have rows, as many in each tensor, got {[len(part) for part in parts]}"
            )
        check_counts({"batch_size": 1}, batch_size)
        self.data = data
        self.rows = len(parts[0])
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        smallest = (self.rows - 1) % batch_size + 1
        if smallest < ranks[1]:
            raise ValueError(
                f"each of {ranks[1]} processes needs a row of each batch, but {self.rows} rows"
                f" with batch_size={batch_size} make"
                f" a batch of {smallest}"
            )
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.rows / self.batch_size)

    def __call__(self, step: int) -> Data:
        """The batch of a step, or this process's share of it, counted from 0 through all epochs."""
        chosen = self.numbers(step)
        if isinstance(self.data, tuple):
            return tuple(part.index_select(0, chosen.to(part.device)) for part in self.data)
        return self.data.index_select(0, chosen.to(self.data.device))

    def numbers(self, step: int) -> Tensor:
        """Which rows these are."""
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            order = torch.randperm(self.rows, generator=seeded_generator(self.seed, spawned=epoch))
            self._epoch, self._order = epoch, order
        rank, world = self.ranks
        return self._order[number * self.batch_size : (number + 1) * self.batch_size][rank::world]
