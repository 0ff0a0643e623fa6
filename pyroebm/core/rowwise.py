"""Energies of variables with names, written for one row: run on a batch by vmap, replayed from a
captured graph."""

from __future__ import annotations

import abc
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyroebm.core._torch_private import all_true, is_being_traced, version_of
from pyroebm.core.energy import Energy, unchecked_value_and_grad
from pyroebm.core.supports import event_numel
from pyroebm.core.wrappers import eval_mode

__all__ = ["RowsFailAlone", "RowwiseEnergy"]

#: Graphs kept at a time: one for each batch shape, type and device.
MAX_GRAPHS = 8


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

    The checks that a distribution with ``validate_args=True`` makes of a batch are passed: its
    density is not finite where its arguments are out of their range.
    """

    STAND_INS: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.linalg.cholesky: _cholesky,
        torch.cholesky: _cholesky,
        Tensor.cholesky: _cholesky,
        torch.linalg.inv: _inverse,
        torch.inverse: _inverse,
        Tensor.inverse: _inverse,
        torch.linalg.solve: _solve,
        all_true: lambda valid: True,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.STAND_INS.get(func, func)(*args, **(kwargs or {}))


def _version(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), 0 if tensor.is_inference() else version_of(tensor)


def _folded(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with all that no row enters computed once, and without what nobody uses."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if (
            node.op == "call_function"
            and isinstance(value, Tensor)
            and any(user not in known for user in node.users)
        ):
            module.register_buffer(f"folded_{node.name}", value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"folded_{node.name}"))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class RowwiseEnergy(Energy):
    r"""An energy over a flat vector of named variables in unconstrained coordinates, whose author
    writes one row.

    A subclass calls ``super().__init__(shapes, like)``, sets itself up and ends with
    ``self.batch_by(rows)``, which tries on two rows how a batch can be run, and takes the first way
    whose values and gradients are those of a plain loop:

    - ``"graph"``: :func:`torch.func.vmap` over the rows, captured once by ``make_fx`` for each
      batch shape as a plain graph of tensor operations without Python in it, and replayed;
    - ``"vmap"``: the same without the capture;
    - ``"loop"``: one row after the other, with a warning that says why.

    Everything but the rows is a constant of a captured graph. What :meth:`constants` lists is
    watched: when one of these tensors is replaced or written to, the next call captures anew. Under
    a transform of somebody else (``make_fx``, ``vmap``, ``grad``) nothing is replayed: the rows run
    through ``vmap``, so that an energy can be inlined in a larger graph.

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
            with RowsFailAlone():
                values = torch.stack([self.row_energy(row) for row in rows])
        elif self.batching == "vmap" or is_being_traced():
            values = self._vmapped(rows)
        else:
            values = self._graph(rows)(rows)
        return values.reshape(u.shape[:-1])

    def _vmapped(self, rows: Tensor) -> Tensor:
        with RowsFailAlone():
            values: Tensor = torch.func.vmap(self.row_energy)(rows)
        return values

    def _graph(self, rows: Tensor) -> fx.GraphModule:
        constants = self.constants()
        key = (rows.shape, rows.dtype, rows.device, self.training, *map(_version, constants))
        if key not in self._graphs:
            with torch.inference_mode(False), torch.no_grad():
                # Functional, so that no replay writes into a folded constant.
                functional = torch.func.functionalize(self._vmapped)
                graph = make_fx(lambda r: functional(r))(torch.zeros_like(rows))
                graph = _folded(graph)
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
            if not torch.allclose(expected[0], again.detach(), rtol=0.0, atol=0.0, equal_nan=True):
                raise ValueError(
                    f"{type(self).__name__} must be a function of its variables, but gave"
                    f" {expected[0].tolist()} and then"
                    f" {again.tolist()} for the same rows: a random number that is no sample site"
                    " enters it"
                )
            for way in ("graph", "vmap"):
                self.batching = way
                try:
                    found = unchecked_value_and_grad(self, rows)
                except Exception as error:  # whatever vmap or the capture cannot do, the loop can
                    said = str(error).strip()
                    reason = f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
                else:
                    if all(
                        torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
                        for a, b in zip(found, expected, strict=True)
                    ):
                        return
                    there = found[0].tolist()
                    reason = f"its values there are {there}, those of a loop {expected[0].tolist()}"
            self.batching = "loop"
        warnings.warn(
            f"{self._name()} cannot be vectorised with torch.func.vmap and runs chain by chain,"
            f" which is slow: {reason}."
            " Branches and shapes that depend on a latent value are written with torch.where and"
            " masks",
            RuntimeWarning,
            stacklevel=4,
        )

    def _name(self) -> str:
        return type(self).__name__
