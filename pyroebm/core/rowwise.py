"""Energies of variables with names, written for one row: run on a batch by vmap, replayed from a
captured graph."""

from __future__ import annotations

import abc
import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyroebm.core._checks import stacklevel_of_user
from pyroebm.core._torch_private import (
    TraceInputsOnly,
    all_true,
    is_batchedtensor,
    outside_transforms,
    storage_of,
    tree_leaves,
    tree_map_only,
    version_of,
)
from pyroebm.core.energy import Energy, unchecked_value_and_grad
from pyroebm.core.supports import event_numel
from pyroebm.core.wrappers import eval_mode

__all__ = ["RowsFailAlone", "RowwiseEnergy"]

#: Graphs kept at a time: one for each batch shape, type and device.
MAX_GRAPHS = 8


#: The author's code runs in one thread at a time: Pyro's stack of messengers, and what a capture
#: changes in torch, belong to all threads.
ONE_AT_A_TIME = threading.RLock()


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
    """Inside, what would raise for a whole batch because of one row is NaN in that row: a
    factorisation that does not exist.

    The checks that a distribution with ``validate_args=True`` makes of a batch are passed. Beyond
    the range of its arguments a density is then what its formula gives, as in Pyro without
    validation: NaN or infinite for most distributions, finite for some (a Beta, a Categorical).
    """

    STAND_INS: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.linalg.cholesky: _cholesky,
        # deprecated, and to be removed from torch
        getattr(torch, "cholesky", None): _cholesky,
        getattr(Tensor, "cholesky", None): _cholesky,
        torch.linalg.inv: _inverse,
        torch.inverse: _inverse,
        Tensor.inverse: _inverse,
        torch.linalg.solve: _solve,
        all_true: lambda valid: True,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.STAND_INS.get(func, func)(*args, **(kwargs or {}))


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


def _cut_off(x: Tensor) -> Tensor:
    """``x`` on the same memory, without a gradient.

    A capture may record ``detach`` as an alias, which has one. Integers have none.
    """
    if not x.is_floating_point():
        return x.detach()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(integers).view(x.dtype)


#: Methods that change what a tensor is, and not its values.
_CHANGE_NO_VALUES = {
    f"{name}_"
    for name in (
        *("as_strided", "detach", "rename", "resize", "resize_as", "squeeze", "swapaxes"),
        *("swapdims", "t", "transpose", "unsqueeze"),
    )
}


def _in_place(func: Any) -> tuple[bool, Callable[..., Any] | None]:
    """Whether a function writes into its first argument, by torch's rule for names, and the method
    that returns what it writes, if there is one: of ``add_`` it is ``Tensor.add``."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"):  # __iadd__ and __add__
        return True, getattr(Tensor, f"__{name[3:]}")
    if name == "__setitem__" or not name.endswith("_") or name.endswith("__"):
        return name == "__setitem__", None
    method = None if name in _CHANGE_NO_VALUES else getattr(Tensor, name[:-1], None)
    return True, method if callable(method) else None


class RowsInABatch(TorchFunctionMode):
    """Inside, what ``vmap`` cannot do with a row is done in another way, if shapes do not depend on
    the row: assignment of one number where a mask holds, selection by a mask that no row enters,
    ``x.data``, and writing into a tensor that no row enters.

    A tensor that no row enters becomes one for each row when a value of a row is written into it.
    The author's variables keep the old tensor and its views: where one of them is an argument
    afterwards, the new tensor, or a view of it, takes its place.

    Args:
        row: the row, within ``vmap``.
    """

    STAND_INS: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.__setitem__: _setitem,
        torch.masked_fill: _masked_fill,
        Tensor.masked_fill: _masked_fill,
        torch.masked_select: _masked_select,
        Tensor.masked_select: _masked_select,
        torch.masked_scatter: _masked_scatter,
        Tensor.masked_scatter: _masked_scatter,
        Tensor.data.__get__: _cut_off,  # type: ignore[attr-defined]
        Tensor.detach: _cut_off,
        torch.detach: _cut_off,
    }

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.row = row
        #: by storage: the flat copy, and a tensor that keeps the storage alive
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes, result = _in_place(func)
        writes = writes and isinstance(next(iter(args), None), Tensor)
        if writes and not is_batchedtensor(args[0]):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if any(is_batchedtensor(self._current(tensor)) for tensor in given):
                self._copy(args[0])
        if self.copies:
            args, kwargs = tree_map_only(Tensor, self._current, (args, kwargs))
        if writes and result is not None and is_batchedtensor(args[0]):
            # vmap knows more functions that return a result than functions that write one
            return args[0].copy_(self.STAND_INS.get(result, result)(*args, **kwargs))
        return self.STAND_INS.get(func, func)(*args, **kwargs)

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
            return copy.view(tensor.shape)  # the usual case, in a graph that is easy to compile
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def version(tensor: Tensor) -> tuple[int, int]:
    """Which tensor this is, and how often it was written to."""
    return id(tensor), 0 if tensor.is_inference() else version_of(tensor)


class RowwiseEnergy(Energy):
    r"""An energy over a flat vector of named variables in unconstrained coordinates, whose author
    writes one row.

    A subclass calls ``super().__init__(shapes, like)``, sets itself up and ends with
    ``self.batch_by(rows)``, which tries on two rows how a batch can be run, and takes the first way
    whose values and gradients are those of a plain loop:

    - ``"graph"``: :func:`torch.func.vmap` over the rows, captured once by ``make_fx`` for each
      batch shape as a plain graph of tensor operations without Python in it, and replayed;
    - ``"vmap"``: the same without the capture, with a warning that says why;
    - ``"loop"``: one row after the other, with a warning that says why.

    What no row enters is computed once, while a graph is captured, and is a constant of the graph:
    Python may branch on it, and it may be a mask that indexes. What :meth:`constants` lists is
    watched: when one of these tensors is replaced or written to, the next call captures anew. Under
    a transform of somebody else (``make_fx``, ``vmap``, ``grad``) the graph is replayed as well, so
    that an energy can be inlined in a larger graph, with the constants of that time.

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
        return self._anchor  # the density decides, not the first parameter of some module in it

    @abc.abstractmethod
    def row_energy(self, u: Tensor) -> Tensor:
        """The energy of one row: ``(dim,) -> ()``."""

    def constants(self) -> list[Tensor]:
        """Tensors that :meth:`row_energy` reads and that somebody may change."""
        return list(itertools.chain(self.parameters(), self.buffers()))

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Rows as variables in unconstrained coordinates: ``(*batch, dim)`` to a dict of ``(*batch,
        *shape)``."""
        parts = u.split([event_numel(shape) for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`.

        Raises:
            ValueError: if a variable is missing or unknown, or a shape does not fit.
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
        rows = u.reshape(-1, *self.event_shape)
        if self.batching == "loop":
            with ONE_AT_A_TIME, RowsFailAlone():
                values = torch.stack([self.row_energy(row) for row in rows])
        elif self.batching == "vmap" or torch.compiler.is_compiling():
            with ONE_AT_A_TIME:
                values = self._vmapped(rows)
        else:
            values = self._graph(rows)(rows)
        return values.reshape(u.shape[:-1])

    def _vmapped(self, rows: Tensor) -> Tensor:
        def value(row: Tensor) -> Tensor:
            with RowsFailAlone(), RowsInABatch(row):
                return self.row_energy(row)

        # a draw that the energy does not depend on, such as a prediction, may differ in each row
        values: Tensor = torch.func.vmap(value, randomness="different")(rows)
        return values

    def _traced(self, rows: Tensor) -> Tensor:
        with TraceInputsOnly(rows):  # functional, so that no replay writes into a constant
            values: Tensor = torch.func.functionalize(self._vmapped)(rows)
        return values

    def _graph(self, rows: Tensor) -> fx.GraphModule:
        constants = self.constants()
        key = (rows.shape, rows.dtype, rows.device, self.training, *map(version, constants))
        if key not in self._graphs:
            with ONE_AT_A_TIME, outside_transforms(), torch.inference_mode(False), torch.no_grad():
                zeros = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
                graph = make_fx(lambda r: self._traced(r))(zeros)
            # nothing in it has effects, draws that do not enter the energy included
            graph.graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
            graph.recompile()
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph, constants  # the constants are kept alive: an id stays theirs
        return self._graphs[key][0]

    def batch_by(self, rows: Tensor) -> None:
        """Choose how batches are run, by trying on ``rows`` of shape ``(2, dim)``.

        Raises:
            ValueError: if the energy of one row is not one number, or is another one when taken
                again.
        """
        with eval_mode(self):
            self.batching = "loop"
            expected, again = unchecked_value_and_grad(self, rows), self(rows)
            # sums may be taken in another order the next time, by threads or by alignment
            tolerance = torch.finfo(self.dtype).eps ** 0.5
            if not torch.allclose(
                expected[0], again.detach(), rtol=tolerance, atol=tolerance, equal_nan=True
            ):
                raise ValueError(
                    f"{type(self).__name__} must be a function of its variables, but gave"
                    f" {expected[0].tolist()} and then"
                    f" {again.tolist()} for the same rows: a random number that is no sample site"
                    " enters it"
                )
            uncaptured = self._why_not("graph", rows, expected)
            if uncaptured is None:
                return
            unbatched = self._why_not("vmap", rows, expected)
            if unbatched is not None:
                self.batching = "loop"
        warnings.warn(
            f"{self._name()} cannot be captured as a graph and runs in Python at each step, which"
            f" is slow: {uncaptured.rstrip('. ')}."
            " A graph has no gradients but those of its operations: not those of an"
            " autograd.Function, of torch.no_grad() or of writes into x.data"
            if unbatched is None
            else f"{self._name()} cannot be vectorised with torch.func.vmap and runs chain by"
            f" chain, which is slow: {unbatched.rstrip('. ')}."
            " Branches and shapes that depend on a latent value are written with torch.where and"
            " masks",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )

    def _why_not(self, way: str, rows: Tensor, expected: tuple[Tensor, Tensor]) -> str | None:
        """Take ``way``; in one line, why it does not give what a loop gives."""
        self.batching = way
        try:
            found = unchecked_value_and_grad(self, rows)
        except Exception as error:  # whatever vmap or the capture cannot do, the loop can
            said = str(error).strip()
            return f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
        for what, a, b in zip(("values", "gradients"), found, expected, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
                return f"its {what} differ from those of a loop by {float((a - b).abs().max()):.3g}"
        return None

    def _name(self) -> str:
        return type(self).__name__
