"""Energies of named variables that are written for one event and evaluated in batches.

A batch is evaluated with vmap, and replayed from a captured graph.
"""

from __future__ import annotations

import abc
import itertools
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyroebm.core._checks import stacklevel_of_user
from pyroebm.core._torch_private import (
    PerturbedRounding,
    RandomOperations,
    Recorder,
    all_true,
    functions_in_vmap,
    is_batchedtensor,
    outside_transforms,
    storage_of,
    tree_leaves,
    tree_map_only,
    version_of,
)
from pyroebm.core.energy import Energy, unchecked_value_and_grad
from pyroebm.core.rng import LOCK
from pyroebm.core.supports import event_numel
from pyroebm.core.wrappers import eval_mode

__all__ = ["RowsFailAlone", "RowsInABatch", "RowwiseEnergy", "map_rows"]

#: Maximum number of graphs kept: one for each batch shape, dtype and device.
MAX_GRAPHS = 8


#: Number of evaluations that must agree if random numbers are drawn, and that estimate rounding.
NUM_REPEATS = 8

#: Perturbations of all operations to try, in units of the last place, and the multiple of the
#: resulting change for one unit by which two evaluations may differ.
PERTURBATIONS = (2.0**10, 2.0**5, 1.0)
ROUNDING_FACTOR = 10.0


def _cholesky(a: Tensor, upper: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(a, upper=upper)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def _inverse(a: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(a)
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    solution, info = torch.linalg.solve_ex(a, b, left=left)
    is_vector = b.dim() == 1 or b.shape == a.shape[:-1]
    return torch.where(
        (info == 0)[(..., None) if is_vector else (..., None, None)], solution, torch.nan
    )


class RowsFailAlone(TorchFunctionMode):
    """Mode in which an operation that fails for one event returns NaN for it instead of raising.

    Such an operation is a factorization that does not exist. The checks of a distribution with
    ``validate_args=True`` pass. Outside the range of its arguments a density is then the value of
    its formula, as in Pyro without validation: NaN or infinite for most distributions, finite for
    some (a Beta, a Categorical).
    """

    REPLACEMENTS: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.linalg.cholesky: _cholesky,
        # deprecated in torch
        getattr(torch, "cholesky", None): _cholesky,
        getattr(Tensor, "cholesky", None): _cholesky,
        torch.linalg.inv: _inverse,
        torch.inverse: _inverse,
        Tensor.inverse: _inverse,
        torch.linalg.solve: _solve,
        all_true: lambda valid: True,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _setitem(x: Tensor, index: Any, value: Any) -> None:
    if (
        isinstance(index, Tensor)
        and index.dtype == torch.bool
        and not (isinstance(value, Tensor) and value.dim())
    ):
        mask = index.reshape(index.shape + (1,) * (x.dim() - index.dim()))
        x.copy_(_masked_fill(x, mask, value))
    else:
        x[index] = value


def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return torch.where(mask, value.to(x.dtype), x)
    return x.masked_fill(mask, value)


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return x[mask]


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    if is_batchedtensor(mask):
        return x.masked_scatter(mask, source)
    x, mask = torch.broadcast_tensors(x, mask)
    return x.index_put((mask,), source.reshape(-1)[: int(mask.sum())])


def _without_gradient(x: Tensor) -> Tensor:
    """Return ``x`` on the same memory, without a gradient.

    A capture may record ``detach`` as an alias, which has a gradient. Integers have none.
    """
    if not x.is_floating_point():
        return x.detach()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(integers).view(x.dtype)


#: In-place methods that change the shape or metadata of a tensor, but not its values.
_CHANGE_NO_VALUES = {
    f"{name}_"
    for name in (
        *("as_strided", "detach", "rename", "resize", "resize_as", "squeeze", "swapaxes"),
        *("swapdims", "t", "transpose", "unsqueeze"),
    )
}


#: In-place methods that draw random numbers: another one for each event.
_RANDOM = {
    f"{name}_"
    for name in (
        *("bernoulli", "cauchy", "exponential", "geometric", "log_normal"),
        *("normal", "random", "uniform"),
    )
}


def _in_place(func: Any) -> tuple[bool, Callable[..., Any] | None]:
    """Return whether a function writes into its first argument, and its out-of-place method.

    Both are found by torch's naming rule. For ``add_`` the method is ``Tensor.add``; None if there
    is no such method.
    """
    name: str = getattr(func, "__name__", "")
    if name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"):  # __iadd__ and __add__
        return True, getattr(Tensor, f"__{name[3:]}")
    if name == "__setitem__" or not name.endswith("_") or name.endswith("__"):
        return name == "__setitem__", None
    method = None if name in _CHANGE_NO_VALUES else getattr(Tensor, name[:-1], None)
    return True, method if callable(method) else None


class RowsInABatch(TorchFunctionMode):
    """Mode that replaces operations that ``vmap`` does not support by ones that it supports.

    The shapes must not depend on the event. The operations are assignment of one number where a
    mask is True, selection by a mask that does not depend on the event, ``x.data``, and writing
    into a tensor that does not depend on the event, also of random numbers (``x.exponential_()``).

    A tensor that does not depend on the event becomes one for each event when a value of an event
    is written into it. The variables of the caller's code still refer to the old tensor and its
    views: where one of them is an argument later, it is replaced by the new tensor, or a view of
    it.

    Args:
        row: the event, within ``vmap``.
    """

    REPLACEMENTS: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.__setitem__: _setitem,
        torch.masked_fill: _masked_fill,
        Tensor.masked_fill: _masked_fill,
        torch.masked_select: _masked_select,
        Tensor.masked_select: _masked_select,
        torch.masked_scatter: _masked_scatter,
        Tensor.masked_scatter: _masked_scatter,
        Tensor.data.__get__: _without_gradient,  # type: ignore[attr-defined]
        Tensor.detach: _without_gradient,
        torch.detach: _without_gradient,
    }

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.row = row
        #: By storage: the flat copy, and a tensor that keeps the storage alive.
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes, result = _in_place(func)
        writes = writes and isinstance(next(iter(args), None), Tensor)
        if writes and not is_batchedtensor(args[0]):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if getattr(func, "__name__", "") in _RANDOM or any(
                is_batchedtensor(self._current(tensor)) for tensor in given
            ):
                self._copy(args[0])
        if self.copies:
            # a Size stays one: x.new(Size([])) is a scalar, x.new(()) is empty
            args, kwargs = tree_map_only(
                Tensor, self._current, (args, kwargs), is_leaf=lambda part: type(part) is torch.Size
            )
        if writes and result is not None and is_batchedtensor(args[0]):
            # vmap supports more out-of-place functions than in-place ones
            return args[0].copy_(self.REPLACEMENTS.get(result, result)(*args, **kwargs))
        return self.REPLACEMENTS.get(func, func)(*args, **kwargs)

    def _copy(self, old: Tensor) -> None:
        if storage_of(old) not in self.copies:
            flat = old.as_strided((old.untyped_storage().nbytes() // old.element_size(),), (1,), 0)
            copy = self.row.new_empty(flat.shape, dtype=old.dtype, device=old.device).copy_(flat)
            self.copies[storage_of(old)] = copy, old

    def _current(self, tensor: Tensor) -> Tensor:
        if is_batchedtensor(tensor) or storage_of(tensor) not in self.copies:
            return tensor
        copy, _ = self.copies[storage_of(tensor)]
        if tensor.is_contiguous() and tensor.numel() == copy.numel():
            return copy.view(tensor.shape)  # the usual case; this graph is easier to compile
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def map_rows(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    rows: Mapping[str, Tensor],
    num_rows: int,
    *,
    name: str,
    chunk_size: int | None = None,
    random_values: bool = False,
) -> dict[str, Tensor]:
    """Apply a function of the named tensors of one row to all rows, with ``torch.func.vmap``.

    The function is evaluated without gradients.

    Random numbers, from torch's default generator, differ between rows. Where ``vmap`` cannot run
    the function, or its values are not those of a plain call, the rows are computed one by one,
    with a RuntimeWarning that states the reason. So they are where the function draws from the
    generators of Python or NumPy, which would give all rows the same numbers.

    Args:
        function: from the named tensors of a row, each of shape ``event``, to named tensors.
        rows: named tensors of shape ``(num_rows, *event)``; there may be none.
        num_rows: number of rows, at least 1.
        name: what the warning calls the function.
        chunk_size: number of rows that are computed together; None is all.
        random_values: whether the values are random, so that they cannot be compared.

    Returns:
        named tensors of shape ``(num_rows, *shape)``.
    """

    def batched(index: Tensor, row: dict[str, Tensor]) -> dict[str, Tensor]:
        with functions_in_vmap(), RowsFailAlone(), RowsInABatch(index):
            return function(row)

    def single(k: int) -> dict[str, Tensor]:
        with RowsFailAlone():
            return function({key: value[k] for key, value in rows.items()})

    with LOCK, torch.no_grad(), warnings.catch_warnings():
        # torch's remarks on its own batching rules
        warnings.filterwarnings("ignore", message=r"(There is a performance drop|An output with)")
        before = _foreign_generators()
        first = None if random_values else single(0)
        try:
            found: dict[str, Tensor] = torch.func.vmap(
                batched, randomness="different", chunk_size=chunk_size
            )(torch.zeros(num_rows), dict(rows))
            reason = _difference(found, first, before)
        except Exception as error:  # any error of vmap: the loop can still work
            text = str(error).strip()
            reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        if reason is None:
            return found
        first = single(0)  # an error of the function itself is raised here, without a warning
        warnings.warn(
            f"{name} cannot be vectorized with torch.func.vmap and runs draw by draw, which is"
            f" slow: {reason.rstrip('. ')}. Write branches and shapes that depend on a latent value"
            " with torch.where and masks",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )
        each = [first, *(single(k) for k in range(1, num_rows))]
        return {key: torch.stack([values[key] for values in each]) for key in first}


def _foreign_generators() -> tuple[Any, ...]:
    """Return the states of the global generators of Python and NumPy."""
    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (a model may use it)
    return random.getstate(), np.asarray(keys).tobytes(), *rest


def _difference(
    found: dict[str, Tensor], first: dict[str, Tensor] | None, generators: tuple[Any, ...]
) -> str | None:
    """Return why vectorized values are not those of a loop, or None if nothing differs."""
    if _foreign_generators() != generators:
        return "it draws from the generators of Python or NumPy"
    for key, value in (first or {}).items():
        pair = found[key][0].double(), value.double()  # truth values cannot be subtracted
        if not torch.allclose(*pair, rtol=1e-3, atol=1e-3, equal_nan=True):
            return f"its value {key!r} differs from that of a plain call"
    return None


def version(tensor: Tensor) -> tuple[int, int]:
    """Return the identity of a tensor and the number of in-place writes to it."""
    return id(tensor), 0 if tensor.is_inference() else version_of(tensor)


class RowwiseEnergy(Energy):
    r"""An energy over a flat vector of named unconstrained variables, written for one event.

    A subclass calls ``super().__init__(shapes, like)``, defines :meth:`row_energy` and ends its
    constructor with ``self.batch_by(rows)``, which chooses how batches are evaluated. It tries on
    two events, and takes the first way whose values and gradients are those of a plain loop:

    - ``"graph"``: :func:`torch.func.vmap` over the events, captured once for each
      batch shape as a graph of tensor operations, and replayed without Python code;
    - ``"vmap"``: the same without the capture, with a warning that states the reason;
    - ``"loop"``: one event after the other, with a warning that states the reason.

    Operations that do not depend on the event are evaluated once, while a graph is captured, and
    their results are constants of the graph: Python code may branch on them, and they may be masks
    used as indices. If one of the tensors that :meth:`constants` returns is replaced or written to,
    the next call captures a new graph. Under a transform of the caller (``make_fx``, ``vmap``,
    ``grad``) the graph is replayed as well, with the constants of that time, so that an energy can
    be inlined in a larger graph.

    Args:
        shapes: name and unconstrained shape of each variable, in the order of the flat vector.
        like: a tensor of the dtype and device of the states.

    Attributes:
        batching: ``"graph"``, ``"vmap"`` or ``"loop"``.
        shapes: as given.
    """

    batching: str

    def __init__(self, shapes: Mapping[str, torch.Size], like: Tensor) -> None:
        super().__init__((sum(event_numel(shape) for shape in shapes.values()),))
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._anchor = torch.empty(0, dtype=like.dtype, device=like.device)
        self._graphs: dict[Any, tuple[fx.GraphModule, list[Tensor]]] = {}

    def _reference(self) -> Tensor:
        return self._anchor  # not the first parameter of a module that the density uses

    @abc.abstractmethod
    def row_energy(self, u: Tensor) -> Tensor:
        """Return the energy of one event: ``(dim,) -> ()``."""

    def constants(self) -> list[Tensor]:
        """Return the tensors that :meth:`row_energy` reads and that may be changed from outside."""
        return list(itertools.chain(self.parameters(), self.buffers()))

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Split states ``(*batch, dim)`` into named variables ``(*batch, *shape)``."""
        parts = u.split([event_numel(shape) for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the variables of :meth:`split` into states, shape ``(*batch, dim)``.

        Raises:
            ValueError: if a variable is missing or unknown, or if a shape is wrong.
        """
        if set(params) != set(self.shapes):
            raise ValueError(f"the variables must be {sorted(self.shapes)}, got {sorted(params)}")
        flat = []
        for name, shape in self.shapes.items():
            part = torch.as_tensor(params[name])
            cut = part.dim() - len(shape)
            if cut < 0 or part.shape[cut:] != shape:
                raise ValueError(
                    f"{name!r} must have shape (*batch, *{tuple(shape)}), got shape"
                    f" {tuple(part.shape)}"
                )
            flat.append(part.reshape(*part.shape[:cut], -1).to(self.device, self.dtype))
        if len({part.shape[:-1] for part in flat}) > 1:
            raise ValueError(
                "the variables must share one batch shape, got"
                f" {[tuple(part.shape[:-1]) for part in flat]}"
            )
        return torch.cat(flat, -1)

    def forward(self, u: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        rows = u.reshape(-1, *self.event_shape)
        if self.batching == "loop":
            with LOCK, RowsFailAlone():
                values = torch.stack([self.row_energy(row) for row in rows])
        elif self.batching == "vmap" or torch.compiler.is_compiling():
            with LOCK:
                values = self._vmapped(rows)
        else:
            values = self._graph(rows)(rows)
        return values.reshape(u.shape[:-1])

    def _vmapped(self, rows: Tensor) -> Tensor:
        def value(row: Tensor) -> Tensor:
            with functions_in_vmap(), RowsFailAlone(), RowsInABatch(row):
                return self.row_energy(row)

        # a draw that the energy does not depend on, such as a prediction, may differ between events
        values: Tensor = torch.func.vmap(value, randomness="different")(rows)
        return values

    def _recorded(self, rows: Tensor) -> fx.GraphModule:
        # functionalized, so that no replay writes into a constant
        operations, recorder = RandomOperations(), Recorder(rows, self.constants())
        with operations, recorder:
            values: Tensor = torch.func.functionalize(self._vmapped)(rows)
        if drawn := operations.behind(values):
            raise ValueError(self._randomness(drawn))
        return recorder.graph(values)

    def _graph(self, rows: Tensor) -> fx.GraphModule:
        constants = self.constants()
        key = (rows.shape, rows.dtype, rows.device, self.training, *map(version, constants))
        if key not in self._graphs:
            with LOCK, outside_transforms(), torch.inference_mode(False), torch.no_grad():
                zeros = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
                graph = self._recorded(zeros)
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = (
                graph,
                constants,
            )  # keeping the constants alive keeps their ids unique
        return self._graphs[key][0]

    def batch_by(self, rows: Tensor) -> None:
        """Choose how batches are evaluated, by trying on two states.

        Args:
            rows: states, shape ``(2, dim)``.

        Raises:
            ValueError: if the energy of one event is not one number, or if it depends on random
                numbers: it changes by more than rounding when it is evaluated again.
        """
        with eval_mode(self):
            self.batching = "loop"
            expected = unchecked_value_and_grad(self, rows)
            self._check_deterministic(rows, expected[0])
            uncaptured = self._why_not("graph", rows, expected)
            if uncaptured is None:
                return
            unbatched = self._why_not("vmap", rows, expected)
            if unbatched is not None:
                self.batching = "loop"
        warnings.warn(
            f"{self._name()} cannot be captured as a graph and runs in Python at each step, which"
            f" is slow: {uncaptured.rstrip('. ')}."
            " A graph has only the gradients of its operations: it ignores an"
            " autograd.Function, torch.no_grad() and writes into x.data"
            if unbatched is None
            else f"{self._name()} cannot be vectorized with torch.func.vmap and runs chain by"
            f" chain, which is slow: {unbatched.rstrip('. ')}."
            " Write branches and shapes that depend on a latent value with torch.where and masks",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )

    def _check_deterministic(self, rows: Tensor, values: Tensor) -> None:
        """Raise ValueError if the values of a loop depend on random numbers."""
        bound = None
        with torch.no_grad():
            with RandomOperations() as operations:
                second = self(rows)
            drawn = operations.behind(second) or operations.read
            # draws may be equal by chance
            more = (self(rows) for _ in range(NUM_REPEATS if drawn else 0))
            for again in itertools.chain((second,), more):
                same = (again == values) | (again.isnan() & values.isnan())
                if bool(same.all()):
                    continue
                bound = self._rounding(rows, values, drawn) if bound is None else bound
                if not bool((same | ((again - values).abs() <= bound)).all()):
                    raise ValueError(
                        f"{self._randomness(drawn)}. It gave {values.tolist()} and then"
                        f" {again.tolist()} for the same states"
                    )

    def _rounding(self, rows: Tensor, values: Tensor, drawn: str | None) -> Tensor:
        """Bound the differences between evaluations of a deterministic function.

        Threads and the alignment of memory choose the order of sums. The changes by perturbed
        operations are proportional to the perturbation, those by random numbers are not.
        """
        least: Tensor = (1.0 + values.abs()) * torch.finfo(self.dtype).eps ** 0.5
        for units in PERTURBATIONS:
            try:
                change = torch.stack([self._perturbed(rows, k, units) for k in range(NUM_REPEATS)])
            # A factor may not exist for perturbed numbers, or the model's own code checks them.
            except Exception:
                continue
            largest = (change - values).abs().amax(0) / units
            if bool(torch.isfinite(largest).all()):
                return least + ROUNDING_FACTOR * largest
        # What draws no random number of torch is then taken for deterministic.
        return torch.full_like(values, torch.inf) if drawn is None else least

    def _perturbed(self, rows: Tensor, seed: int, units: float) -> Tensor:
        with PerturbedRounding(seed, units):
            return self(rows)

    def _randomness(self, operation: str | None) -> str:
        return (
            f"{self._name()} must be a function of its variables, but depends on a random number"
            " that is not a sample site"
            + (f", drawn by {operation}" if operation else "")
            + ": draw it once, outside, and call .eval() on modules with dropout"
        )

    def _why_not(self, way: str, rows: Tensor, expected: tuple[Tensor, Tensor]) -> str | None:
        """Return why a way of batching does not reproduce a loop, in one line, or None."""
        self.batching = way
        try:
            found = unchecked_value_and_grad(self, rows)
        except Exception as error:  # any error of vmap or the capture: the loop can still work
            text = str(error).strip()
            return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        for what, a, b in zip(("values", "gradients"), found, expected, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
                return f"its {what} differ from those of a loop by {float((a - b).abs().max()):.3g}"
        return None

    def _name(self) -> str:
        return type(self).__name__
