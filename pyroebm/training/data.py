"""Data for training: conversion, checks and random batches.

Data are tensors, arrays, data frames, datasets and loaders. Batches have the shape, dtype and
device of the module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pyroebm.core._checks import check_counts
from pyroebm.core.arrays import is_number, tensor_of_numbers
from pyroebm.core.energy import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.core.supports import base_constraint, inside, is_discrete, is_real, spin
from pyroebm.energies.layered import LayeredMachine
from pyroebm.flows.flow import Flow
from pyroebm.objectives.base import module_dtype

__all__ = ["Batches", "Conversion", "Data", "Passes", "batches_of"]

#: A tensor, a NumPy array, a data frame, a tuple of these, a ``torch.utils.data.Dataset`` with a
#: length, or a ``DataLoader``.
Data = Any

Batch = Tensor | tuple[Tensor, ...]

#: Number of rows that are checked at once.
CHUNK = 4096


@runtime_checkable
class HasVisible(Protocol):
    """A machine that can be trained on data of its visible units."""

    num_visible: int


class Batches:
    """Random batches, with each row once in an epoch; the last batch may be smaller.

    The order of an epoch depends on the seed and the number of the epoch alone, so the batch of any
    step can be computed directly.

    Args:
        data: N rows, or a tuple of tensors with N rows each (images and labels), ``(N, ...)``; or a
            ``torch.utils.data.Dataset`` of N items.
        batch_size: number of rows of a batch.
        seed: seed of the orders.
        ranks: rank of this process and number of processes, which share each batch: process r of w
            has the rows r, r + w, ....
        convert: a function that is applied to each batch; see :class:`Conversion`.

    Raises:
        ValueError: if there are no rows, the tensors have different numbers of them, ``batch_size``
            < 1, or a batch has fewer rows than there are processes.

    Example:
        >>> batches = Batches(torch.arange(5), batch_size=2)
        >>> len(batches), sorted(torch.cat([batches(step) for step in range(3)]).tolist())
        (3, [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        data: Batch | Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        ranks: tuple[int, int] = (0, 1),
        convert: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if isinstance(data, Dataset):
            sizes = [len(data)]  # type: ignore[arg-type]
        else:
            parts = data if isinstance(data, tuple) else (data,)
            if not parts or not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
                raise ValueError(
                    f"data must be a tensor of rows, or a tuple of such, got {type(data).__name__}"
                )
            sizes = [len(part) for part in parts]
        if len(set(sizes)) > 1 or 0 in sizes:
            raise ValueError(f"data must have rows, as many in each tensor, got {sizes}")
        check_counts({"batch_size": 1}, batch_size)
        self.data = data
        self.rows = sizes[0]
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self.convert = convert
        #: Names of the columns of a data frame.
        self.columns = convert.columns if isinstance(convert, Conversion) else None
        smallest = (self.rows - 1) % batch_size + 1
        if smallest < ranks[1]:
            raise ValueError(
                f"each of {ranks[1]} processes needs a row of each batch, but {self.rows} rows"
                f" with batch_size={batch_size} make"
                f" a batch of {smallest}"
            )
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return math.ceil(self.rows / self.batch_size)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, or the share of this process, counted over all epochs."""
        return self.at(self.numbers(step))

    def at(self, chosen: Tensor) -> Batch:
        """Return the batch of rows of given indices."""
        batch: Batch
        if isinstance(self.data, Dataset):
            batch = default_collate([self.data[k] for k in chosen.tolist()])
        elif isinstance(self.data, tuple):
            batch = tuple(part.index_select(0, chosen.to(part.device)) for part in self.data)
        else:
            batch = self.data.index_select(0, chosen.to(self.data.device))
        return batch if self.convert is None else self.convert(batch)

    def numbers(self, step: int) -> Tensor:
        """Return the indices of the rows of this process in the batch of a step."""
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            order = torch.randperm(self.rows, generator=seeded_generator(self.seed, spawned=epoch))
            self._epoch, self._order = epoch, order
        rank, world = self.ranks
        return self._order[number * self.batch_size : (number + 1) * self.batch_size][rank::world]

    def sample(self, num_rows: int = 1000) -> Batch | None:
        """Return evenly spaced rows, converted; None for a ``Dataset``, whose items may be random.

        Args:
            num_rows: largest number of rows.
        """
        if isinstance(self.data, Dataset):
            return None
        chosen = torch.linspace(0, self.rows - 1, min(num_rows, self.rows)).long()
        return self.at(chosen)

    def one_epoch(self) -> Iterator[Batch]:
        """Iterate over the batches of the first epoch."""
        return map(self, range(len(self)))


class Passes:
    """The batches of a ``DataLoader``, iterated repeatedly, with its batch size and order.

    Args:
        loader: a loader of tensors, or tuples of tensors.
        convert: a function that is applied to each batch.

    Example:
        >>> passes = Passes(DataLoader(torch.arange(3.0), batch_size=2))
        >>> [passes(step).tolist() for step in range(3)]
        [[0.0, 1.0], [2.0], [0.0, 1.0]]
    """

    def __init__(
        self, loader: DataLoader[Any], convert: Callable[[Batch], Batch] | None = None
    ) -> None:
        self.loader = loader
        self.convert = convert
        #: Unknown: a setting of checkpoints, from which a training with a loader is not resumed.
        self.rows = None
        #: A loader has tensors, whose columns have no names.
        self.columns = None
        self._left: Iterator[Batch] = iter(())

    def __len__(self) -> int:
        """Return the number of batches of a pass.

        Raises:
            ValueError: if the loader has no length.
        """
        try:
            return len(self.loader)
        except TypeError as error:
            raise ValueError(
                "the DataLoader must have a length for num_epochs, but has none: give num_steps"
            ) from error

    def __call__(self, step: int) -> Batch:
        """Return the next batch, which does not depend on ``step``."""
        for batch in self._left:
            return batch
        self._left = self.one_epoch()
        for batch in self._left:
            return batch
        raise ValueError("the DataLoader must have batches, got none")

    def one_epoch(self) -> Iterator[Batch]:
        """Iterate over the batches of a new pass."""
        batches = iter(self.loader)
        return batches if self.convert is None else map(self.convert, batches)


class Conversion:
    """Convert batches to the form that a module takes, and check them.

    The events are the first part of a tuple; a tuple of one part is that part. Unambiguous
    conversions are made: to the dtype and device of the module; uint8 images ``(N, height, width,
    ...)`` from 0..255 to [0, 1], unless all values are 0 or 1 (an error in batches of a ``Dataset``
    or ``DataLoader``); images ``(N, 28, 28)`` to the event shapes ``(1, 28, 28)`` or ``(784,)``.
    The other parts of a tuple are converted to the module's dtype if they are floating point;
    integers (labels) are not changed.

    Args:
        module: an energy or a flow; for other modules neither shape nor support is checked.
        argument: name of the data in error messages.
        columns: names of the columns of the training data, by which the columns of a data frame are
            ordered; None keeps their order.
        events_for: name of an objective that takes events alone, for which tuples are an error;
            None allows tuples.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> convert = Conversion(MLPEnergy((4,)))
        >>> convert(torch.tensor([[[0, 255], [51, 0]]], dtype=torch.uint8))
        tensor([[0.0000, 1.0000, 0.2000, 0.0000]])
    """

    def __init__(
        self,
        module: nn.Module,
        argument: str = "data",
        *,
        columns: Sequence[Any] | None = None,
        events_for: str | None = None,
    ) -> None:
        self.name = type(module).__name__
        self.argument = argument
        self.expected_columns = columns
        self.events_for = events_for
        self.dtype, self.device = module_dtype(module)
        self.shapes: list[tuple[int, ...]] = []
        self.support: constraints.Constraint = constraints.real
        if isinstance(module, Energy):
            self.shapes, self.support = [tuple(module.event_shape)], module.support
            if isinstance(module, LayeredMachine):
                self.shapes.append((module.layers().sizes[0],))
            elif isinstance(module, HasVisible):
                self.shapes.append((module.num_visible,))
        elif isinstance(module, Flow):
            self.shapes = [(module.dim,)]
        #: Whether the support is {0, 1}, and whether probabilities are allowed too.
        self.binary = isinstance(base_constraint(self.support), type(constraints.boolean))
        self.means = self.binary and isinstance(module, LayeredMachine)
        #: Whether uint8 images have levels 0..255; set by :meth:`table`.
        self.levels = not is_discrete(self.support)
        #: Names of the columns of a data frame.
        self.columns: Sequence[Any] | None = None
        #: Whether an array has masked entries.
        self.masked = False

    def table(self, data: Any) -> Batch:
        """Convert arrays and data frames to tensors, and check all rows."""
        first = f"{self.argument}[0]"
        if isinstance(data, TensorDataset):
            first = f"{self.argument}.tensors[0]"
            data = data.tensors
        if isinstance(data, tuple | list) and not _numbers(data):
            data = _alone(data)
        parts = data if isinstance(data, tuple | list) and not _numbers(data) else (data,)
        events = self._tensor(parts[0], first=True)
        if isinstance(data, tuple | list):
            self._check_alone(len(parts), f"give {first}")
        tensors = (events, *(self._tensor(part, first=False) for part in parts[1:]))
        if _is_binary(events):
            self.levels = False
        for start in range(0, len(events), CHUNK):
            chunk = tuple(part[start : start + CHUNK] for part in tensors)
            self.check(chunk if isinstance(data, tuple | list) else chunk[0], start)
        return tensors if isinstance(data, tuple | list) else events

    def __call__(self, batch: Any) -> Batch:
        """Convert a batch to the module's dtype, device and event shape."""
        batch = _alone(batch)
        if isinstance(batch, Tensor):
            return self._events(batch)
        if not (isinstance(batch, tuple | list) and all(isinstance(p, Tensor) for p in batch)):
            raise ValueError(
                f"{self.argument} must give tensors or tuples of tensors, got a"
                f" {type(batch).__name__}: convert its items in the Dataset"
            )
        self._check_alone(len(batch), "give the events alone in each item")
        events, *others = batch
        kept = (
            part.to(self.device, self.dtype if part.is_floating_point() else part.dtype)
            for part in others
        )
        return (self._events(events), *kept)

    def checked(self, batch: Any) -> Batch:
        """Convert and check a batch, for data that were not checked by :meth:`table`."""
        batch = _alone(batch)
        converted = self.check(batch)
        events = batch if isinstance(batch, Tensor) else batch[0]
        if self.levels and _is_binary(events):
            raise ValueError(
                f"{self.argument} has uint8 images with values of 0 and 1 alone in a batch, which"
                " may be binary or dark grey levels: give images.float() for binary images, or"
                " images / 255.0 for grey levels, in the Dataset"
            )
        return converted

    def check(self, batch: Any, start: int = 0) -> Batch:
        """Convert a batch, whose first row has index ``start``.

        Raises:
            ValueError: unless all numbers are finite and the events in the module's support.
        """
        converted = self(batch)
        given = (batch,) if isinstance(batch, Tensor) else batch
        parts = converted if isinstance(converted, tuple) else (converted,)
        for k, part in enumerate(parts):
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                self._raise_not_finite(part, given[k], start, self.columns if k == 0 else None)
        self._check_support(parts[0], start)
        return converted

    def _check_alone(self, parts: int, fix: str) -> None:
        """Raise ValueError for a tuple if the objective takes events alone."""
        if self.events_for is not None:
            raise ValueError(
                f"{self.argument} must be one tensor of events for {self.events_for}, got a tuple"
                f" of {parts}: {fix}"
            )

    def _check_support(self, events: Tensor, start: int) -> None:
        if not self.shapes or is_real(self.support):
            return
        # visible units are checked against the support of all units if these are of one kind
        whole = tuple(events.shape[1:]) == self.shapes[0]
        if not (whole or self.binary or base_constraint(self.support) is spin):
            return
        if self.means:
            fits = ((events >= 0.0) & (events <= 1.0)).flatten(1).all(1)
        else:
            fits = inside(self.support, events, len(self.shapes[0]))
        if not bool(fits.all()):
            self._raise_outside_support(events, fits, start)

    def _events(self, events: Tensor) -> Tensor:
        """Convert events to the module's dtype and event shape."""
        image = events.dim() > 2
        if events.dtype == torch.uint8 and self.levels and not image and self.columns is None:
            raise ValueError(
                f"{self.argument} has bytes up to 255 in rows of shape"
                f" {tuple(events.shape[1:])}, which may be grey levels or counts: give"
                f" {self.argument} / 255.0 or {self.argument} * 1.0"
            )
        scaled = events.dtype == torch.uint8 and self.levels and image
        events = events.to(self.device, self.dtype)
        if scaled:
            events = events / 255.0
        shape = tuple(events.shape[1:])
        if not self.shapes or shape in self.shapes:
            return events
        for wanted in self.shapes:
            same_image = [n for n in shape if n > 1] == [n for n in wanted if n > 1]
            flattened = len(wanted) == 1 and math.prod(shape) == wanted[0]
            if same_image or flattened:
                return events.reshape(len(events), *wanted)
        raise ValueError(self._shape_message(shape))

    def _shape_message(self, shape: tuple[int, ...]) -> str:
        wanted = " or ".join(f"(N, {', '.join(map(str, s))})" for s in self.shapes)
        wanted = wanted.replace("(N, )", "(N,)")
        message = (
            f"{self.argument} must have shape {wanted} for {self.name}, got"
            f" (N, {', '.join(map(str, shape))})".replace("(N, )", "(N,)")
        )
        event = self.shapes[0]
        if len(shape) == len(event) == 3 and (shape[2], shape[0], shape[1]) == event:
            return f"{message}: move the channels first by permute(0, 3, 1, 2)"
        if self.columns is not None and len(event) == 1:
            return f"{message}; its columns are {list(self.columns)}: select {event[0]} of them"
        return message

    def _entry(self, bad: Tensor, start: int, columns: Sequence[Any] | None) -> str:
        """Describe the position of the first entry that is True, ``(rows, ...)``."""
        row, *rest = (int(k) for k in bad.nonzero()[0])
        if not rest:
            return f"row {start + row}"
        if columns is not None:
            return f"row {start + row}, column {columns[rest[0]]!r}"
        return f"row {start + row}, {'column' if len(rest) == 1 else 'entry'} " + (
            str(rest[0]) if len(rest) == 1 else str(tuple(rest))
        )

    def _raise_not_finite(
        self, part: Tensor, given: Tensor, start: int, columns: Sequence[Any] | None
    ) -> None:
        """Raise ValueError for a converted part of a batch and the part as it was given."""
        bad = ~torch.isfinite(part)
        value = given.to(part.device).reshape(part.shape)[bad][0].item()
        where = self._entry(bad, start, columns)
        if math.isfinite(value):
            raise ValueError(
                f"{self.argument} must be finite in {part.dtype}, the dtype of {self.name}, got"
                f" {value:g} in {where}, which overflows: scale {self.argument}, or give a module"
                " with a wider dtype"
            )
        if columns is not None:
            fix = f"{self.argument}.dropna()"
        elif self.masked:
            fix = f"{self.argument}[~numpy.ma.getmaskarray({self.argument}).any(1)]"
        else:
            fix = f"{self.argument}[isfinite({self.argument}).all(1)]"
        raise ValueError(
            f"{self.argument} must be finite, got {value} in {where}: {fix} drops such rows"
        )

    def _raise_outside_support(self, events: Tensor, fits: Tensor, start: int) -> None:
        base = base_constraint(self.support)
        low, high = float(events.min()), float(events.max())
        if base.event_dim == 0:
            allowed = base.check(events)
            if self.means:
                allowed = (events >= 0.0) & (events <= 1.0)
            where, value = self._entry(~allowed, start, self.columns), float(events[~allowed][0])
            found = f"{value:g} in {where} (values are from {low:g} to {high:g})"
        else:
            found = f"row {start + int((~fits).nonzero()[0])}"
        fix = ""
        if self.binary:
            if low < 0.0:
                fix = f": ({self.argument} + 1) / 2 maps -1 and +1 to 0 and 1"
            elif high > 1.0:
                half = high / 2.0
                fix = f": ({self.argument} > {half:g}) * 1.0 maps 0..{high:g} to 0 and 1"
            else:
                fix = f": ({self.argument} > 0.5) * 1.0 maps probabilities to 0 and 1"
        elif base is spin and low >= 0.0 and high <= 1.0:
            fix = f": 2.0 * {self.argument} - 1 maps 0 and 1 to -1 and +1"
        raise ValueError(
            f"{self.argument} must lie in the support of {self.name}, {self.support}, got"
            f" {found}{fix}"
        )

    def _tensor(self, part: Any, first: bool) -> Tensor:
        """Convert a tensor, an array or a data frame to a tensor of real numbers."""
        if isinstance(part, Tensor):
            if part.layout != torch.strided:
                raise ValueError(
                    f"{self.argument} must be dense, got {part.layout}: {self.argument}.to_dense()"
                )
            if part.is_complex():
                raise ValueError(
                    f"{self.argument} must be real numbers, got {part.dtype}:"
                    " torch.view_as_real(...) makes two real numbers of each"
                )
            tensor = part
        elif hasattr(part, "columns") and hasattr(part, "to_numpy"):
            names = self._column_names(list(part.columns), first)
            columns = [self._array(part[name].to_numpy(), f"column {name!r}") for name in names]
            if not columns:
                raise ValueError(f"{self.argument} must have columns, got none")
            if first:
                self.columns = names
            tensor = torch.from_numpy(np.stack([column.numpy() for column in columns], 1))
            tensor = tensor.squeeze(1) if first and self.shapes == [()] else tensor
        elif hasattr(part, "to_numpy") or isinstance(part, np.ndarray):
            values = part if isinstance(part, np.ndarray) else part.to_numpy()
            tensor = self._array(values, "an array")
        else:
            raise ValueError(
                f"{self.argument} must be a tensor, an array or a data frame of rows, a tuple of"
                f" these, a Dataset or a DataLoader, got {type(part).__name__}: convert lists of"
                " numbers by torch.as_tensor(...)"
            )
        if tensor.dim() == 0:
            raise ValueError(f"{self.argument} must be a tensor of rows, got a single number")
        return tensor

    def _column_names(self, names: list[Any], first: bool) -> list[Any]:
        """Return the names of the columns of a data frame, in the order of the training data."""
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"{self.argument} must have columns of different names, got {repeated} more than"
                f" once in {names}"
            )
        if not first or self.expected_columns is None:
            return names
        expected = list(self.expected_columns)
        if set(names) != set(expected):
            raise ValueError(
                f"{self.argument} must have the columns of the training data, {expected}, got"
                f" {names}"
            )
        return expected

    def _array(self, values: np.ndarray, what: str) -> Tensor:
        """Convert an array to a tensor; masked entries become NaN."""
        self.masked |= bool(np.ma.getmaskarray(values).any())
        return tensor_of_numbers(values, self.argument, what)


def _is_binary(events: Tensor) -> bool:
    """Return whether bytes are 0 and 1 alone, so that images are binary or nearly black."""
    return events.dtype == torch.uint8 and events.numel() > 0 and int(events.max()) <= 1


def _alone(batch: Any) -> Any:
    """Return the part of a tuple of one, such as ``DataLoader(TensorDataset(x))`` gives."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch


def _numbers(values: Sequence[Any]) -> bool:
    return any(is_number(value) for value in values)


def batches_of(
    data: Data,
    module: nn.Module,
    batch_size: int,
    *,
    seed: int = 0,
    ranks: tuple[int, int] = (0, 1),
    argument: str = "data",
    columns: Sequence[Any] | None = None,
    events_for: str | None = None,
) -> Batches | Passes:
    """Make batches of data in any supported form, converted for a module and checked.

    Args:
        data: a tensor, array or data frame, or a tuple of these, of which all rows are checked now;
            or a ``Dataset`` or ``DataLoader``, whose batches are checked when they are used.
        module: the module that is trained.
        batch_size: number of rows of a batch; a ``DataLoader`` has its own.
        seed: seed of the order; a ``DataLoader`` has its own.
        ranks: as in :class:`Batches`.
        argument: name of the data in error messages.
        columns: as in :class:`Conversion`.
        events_for: as in :class:`Conversion`.

    Raises:
        ValueError: if the conversion is ambiguous or a check fails; the message has the row, the
            column and the call that fixes it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> batches_of(np.eye(4), BernoulliRBM(4, 2), batch_size=2)(0).dtype
        torch.float32
    """
    convert = Conversion(module, argument, columns=columns, events_for=events_for)
    if isinstance(data, DataLoader):
        if ranks[1] > 1:
            raise ValueError(
                f"{argument} must be rows or a Dataset in distributed training, so that processes"
                f" share each batch, got a DataLoader in {ranks[1]} processes"
            )
        return Passes(data, convert.checked)
    if isinstance(data, IterableDataset) or (
        isinstance(data, Dataset) and not hasattr(data, "__len__")
    ):
        raise ValueError(
            f"{argument} must have a length and be indexed, got {type(data).__name__}: wrap it in"
            " a DataLoader"
        )
    if isinstance(data, Dataset) and not isinstance(data, TensorDataset):
        return Batches(data, batch_size, seed=seed, ranks=ranks, convert=convert.checked)
    return Batches(convert.table(data), batch_size, seed=seed, ranks=ranks, convert=convert)
