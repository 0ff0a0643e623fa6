"""Private functions and attributes of torch; no other module of the package uses any."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import re
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from pyro.ops import special
from torch import Tensor, fx, nn
from torch._C._functorch import (
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.distributions import dirichlet
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "BatchNorm",
    "BoundedAllocation",
    "BoundedResults",
    "Dependents",
    "FixedShapes",
    "PerturbedRounding",
    "RandomOperations",
    "Recorder",
    "SpectralNorm",
    "all_true",
    "compile_graph",
    "functions_in_vmap",
    "held_by",
    "is_batchedtensor",
    "is_functorch_wrapped_tensor",
    "multiply_each",
    "norm_of_each",
    "record_calls",
    "outside_transforms",
    "standard_gamma",
    "storage_of",
    "tree_leaves",
    "tree_map_only",
    "version_of",
]

#: Base class of the batch normalizations of all dimensions.
BatchNorm = nn.modules.batchnorm._BatchNorm

#: The parametrization that ``parametrizations.spectral_norm`` registers.
SpectralNorm = parametrizations._SpectralNorm

#: The function that distributions call to test whether all entries of a mask are true.
all_true = torch._is_all_true


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspend all transforms (``vmap``, ``grad``) and dispatch modes of the caller."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


class FixedShapes(TorchDispatchMode):
    """Dispatch mode for ``make_fx`` that keeps shapes independent of the input's values.

    A compiler needs fixed shapes. A mask that does not depend on the input is converted to integer
    indices where it is used as an index. Other operations with data-dependent output shapes, such
    as ``nonzero``, are evaluated while tracing if their arguments do not depend on the input.
    """

    INDEXING: ClassVar = {
        torch.ops.aten.index,
        torch.ops.aten.index_put,
        torch.ops.aten.index_put_,
    }

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: Tensors that depend on the input, by storage. Keeping them alive keeps the numbers
        #: unique.
        self.dependent = {storage_of(x): x}

    def is_constant(self, leaf: Any) -> bool:
        """Whether an argument of an operation does not depend on the input."""
        return not isinstance(leaf, Tensor) or storage_of(leaf) not in self.dependent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.masked_select.default:
            x, mask = torch.broadcast_tensors(*args)
            func, args = torch.ops.aten.index.Tensor, (x, [mask])
        leaves = tree_leaves((args, kwargs))
        if func.overloadpacket in self.INDEXING:
            args = (args[0], list(self._integers(args[1])), *args[2:])
        elif (
            torch.Tag.dynamic_output_shape in func.tags
            and all(map(self.is_constant, leaves))
            and not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        ):
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        out = self._call(func, args, kwargs)
        if not all(map(self.is_constant, leaves)):
            results = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self.dependent.update((storage_of(result), result) for result in results)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _integers(self, indices: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        for index in indices:
            is_mask = index is not None and index.dtype in {torch.bool, torch.uint8}
            if index is not None and is_mask and self.is_constant(index):
                with disable_proxy_modes_tracing():
                    yield from index.nonzero().unbind(1)
            else:
                yield index


class Recorder(FixedShapes):
    """Dispatch mode that records the operations that depend on the input, as a graph.

    All other operations are evaluated while recording, so that their results are constants of the
    graph and Python code can branch on them. The recorded operations must be functional; equal
    operations on equal arguments are recorded once. It takes a fraction of the time of ``make_fx``.

    Args:
        x: the input.
        watched: constants whose changes the caller follows. All others are copied, so that a later
            change in place does not change a part of the graph.
    """

    def __init__(self, x: Tensor, watched: Sequence[Tensor]) -> None:
        super().__init__(x)
        self._watched = {storage_of(tensor) for tensor in watched}
        self._graph = fx.Graph()
        self._constants: dict[str, Tensor] = {}
        #: By id; keeping the tensors alive keeps the ids unique.
        self._nodes: dict[int, tuple[fx.Node, Tensor]] = {}
        #: The nodes of operations and of constants, by a description of equal ones.
        self._known: dict[Any, Any] = {}
        self._nodes[id(x)] = self._graph.placeholder("x"), x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy.default:  # which has no derivative
            to, source = args[:2]
            with self:
                return source.to(to).expand(to.shape).contiguous()
        if all(map(self.is_constant, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        # a compiled graph wants the strides of a plain tensor
        args, kwargs = tree_map_only(
            Tensor, lambda x: x.contiguous() if self.is_constant(x) else x, (args, kwargs)
        )
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        nodes, named = tree_map_only(Tensor, self._node, (tuple(args), kwargs))
        out = func(*args, **kwargs)
        key = func, _description(nodes), _description(named)
        if key not in self._known or torch.Tag.nondeterministic_seeded in func.tags:
            node = self._graph.call_function(func, nodes, named)
            self._known[key] = (
                node
                if isinstance(out, Tensor)
                else [
                    self._graph.call_function(operator.getitem, (node, i)) for i in range(len(out))
                ]
            )
        self._nodes.update(
            (id(part), (node, part))
            for part, node in zip(tree_leaves(out), tree_leaves(self._known[key]), strict=True)
        )
        return out

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][0]
        if not self.is_constant(tensor):
            raise RuntimeError("a tensor that depends on the input was made by no operation")
        small = tensor.numel() <= 64
        content = str(tensor.tolist()) if small else id(tensor)
        key = tensor.dtype, tensor.device, tensor.shape, content
        if key not in self._known:
            name = f"constant_{len(self._constants)}"
            watched = storage_of(tensor) in self._watched and not small
            self._constants[name] = tensor.detach() if watched else tensor.detach().clone()
            self._known[key] = self._graph.get_attr(name)
        return self._nodes.setdefault(id(tensor), (self._known[key], tensor))[0]

    def graph(self, output: Tensor) -> fx.GraphModule:
        """Return the recorded graph, whose result is this tensor."""
        self._graph.output(self._node(output))
        # no operation has side effects; draws that the output does not depend on are removed too
        self._graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
        return fx.GraphModule(self._constants, self._graph)


def _description(value: Any) -> Any:
    """Describe arguments of an operation, so that equal ones have equal descriptions."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_description, value))
    if isinstance(value, dict):
        return tuple((name, _description(part)) for name, part in value.items())
    return type(value), repr(value)


class Dependents(TorchDispatchMode):
    """Dispatch mode that follows the tensors that depend on the values of an input.

    Args:
        x: the input.
    """

    #: Operations that read the shape of an argument only.
    LIKE: ClassVar = {
        getattr(torch.ops.aten, f"{prefix}{name}{suffix}")
        for prefix, suffix in (("new_", ""), ("", "_like"))
        for name in ("empty", "zeros", "ones", "full")
    }

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: By storage. Keeping the tensors alive keeps the numbers unique.
        self._found = {storage_of(x): x}
        #: Whether a tensor that depends on the input became a number of Python.
        self.read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depends = any(map(self.has, tree_leaves((args, kwargs))))
        out = func(*args, **kwargs)
        if depends and func.overloadpacket not in self.LIKE:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._found[storage_of(leaf)] = leaf
                self.read |= isinstance(leaf, bool | int | float)
        return out

    def has(self, value: object) -> bool:
        """Whether a value is a tensor that depends on the input."""
        return isinstance(value, Tensor) and storage_of(value) in self._found


class BoundedAllocation(TorchDispatchMode):
    """Dispatch mode that limits the number of tensors and entries that are created.

    Args:
        entries: of all tensors that operations create, together.
        operations: how many.
    """

    def __init__(self, entries: int, operations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = entries
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations -= 1
        out = None
        if any(argument.name == "device" for argument in func._schema.arguments):
            without = {"generator": None} if "generator" in kwargs else {}
            out = func(*args, **{**kwargs, **without, "device": torch.device("meta")})
            self._count(out)
        elif not func._schema.is_mutable:
            out = func(*args, **kwargs)
            self._count(out)
            return out
        return func(*args, **kwargs)

    def _count(self, out: Any) -> None:
        self.entries -= sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        if self.entries < 0 or self.operations < 0:
            raise ValueError(
                "the constructors of the file's modules allocate more than its tensors account for"
            )


class BoundedResults(TorchDispatchMode):
    """Dispatch mode in which no operation may broadcast its arguments to a large tensor.

    Args:
        entries: maximum number of entries of the broadcast arguments.

    Raises:
        MemoryError: before such an operation; the message has its shape.
    """

    def __init__(self, entries: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = entries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        indexed = func.overloadpacket in FixedShapes.INDEXING
        leaves = tree_leaves(args[1] if indexed else (args, kwargs))
        with contextlib.suppress(RuntimeError):  # not an operation that broadcasts
            shape = torch.broadcast_shapes(*(t.shape for t in leaves if isinstance(t, Tensor)))
            if shape.numel() > self.entries:
                raise MemoryError(f"a tensor of shape {tuple(shape)}, {shape.numel():,} entries,")
        return func(*args, **kwargs)


class RandomOperations(TorchDispatchMode):
    """Dispatch mode that follows random numbers of torch through all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: The operation that drew what a tensor depends on, by storage. Keeping the tensors alive
        #: keeps the numbers unique.
        self.drawn: dict[int, tuple[str, Tensor]] = {}
        #: The operation that drew a number that became a number of Python.
        self.read: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [self.behind(leaf) for leaf in tree_leaves((args, kwargs))]
        if torch.Tag.nondeterministic_seeded in func.tags:
            names.append(str(func))
        out = func(*args, **kwargs)
        name = next(filter(None, names), None)
        if name is not None:
            results = tree_leaves(out)
            tensors = [leaf for leaf in results if isinstance(leaf, Tensor)]
            self.drawn.update((storage_of(tensor), (name, tensor)) for tensor in tensors)
            if len(tensors) < len(results):
                self.read = name
        return out

    def behind(self, value: Any) -> str | None:
        """Return the random operation that a tensor depends on, or None."""
        return self.drawn.get(storage_of(value), (None,))[0] if isinstance(value, Tensor) else None


class PerturbedRounding(TorchDispatchMode):
    """Dispatch mode that changes the result of each operation, at random.

    Args:
        seed: seed of the changes.
        units: largest change, in units of the last place.
    """

    def __init__(self, seed: int, units: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.units = units

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if func._schema.returns[0].alias_info is not None:
            return out  # a view, or written in place
        with _disable_current_modes():  # these are no random numbers of the model
            change = torch.rand(out.shape, generator=self.generator) - 0.5
            change = (2.0 * self.units * torch.finfo(out.dtype).eps * change).to(out)
        return torch.addcmul(out, out, change)


def storage_of(tensor: Tensor) -> int:
    """Return a number that identifies the memory of a tensor.

    Tensors that share memory share the number, as long as one of them exists.
    """
    if tensor.layout != torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Raise KeyboardInterrupt of a Ctrl-C at the end, in the main thread; others receive none."""
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile a graph of plain tensor operations with TorchInductor."""
    # These imports take seconds, so only a process that compiles pays for them. Modules that were
    # interrupted halfway (networkx is one) could not be imported again.
    with _interrupt_deferred():
        importlib.import_module("torch._inductor.compile_fx")
        from torch._functorch import config as autograd_config
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile as compile_with_inductor
        from torch._inductor import config
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # The processor's instruction set is assumed to work: testing it with the compiler takes 8 s.
    # One thread compiles in this process, so that no pool of processes is started or interrupted by
    # Ctrl-C. The on-disk cache requires a ShapeEnv although all shapes are fixed. The cache of
    # autograd is disabled: it is not needed for graphs without autograd, and logs failures.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes: list[Any] = [mode.from_tensor(example, static_shapes=True) for example in examples]
    with (
        config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}),
        autograd_config.patch(enable_autograd_cache=False),
        tracing(TracingContext(mode)),
    ):
        compiled = compile_with_inductor(graph, fakes, options=options)
    return cast(Callable[..., tuple[Tensor, ...]], compiled)


#: Names that the Python code of a recordable graph may use: allocations, views, and operations that
#: write to an existing output. Other operations allocate at each call.
_RECORDABLE = re.compile(
    r"cpp_fused\w*|empty_strided_cpu|reinterpret_tensor|extern_kernels|(ba)?(add)?b?mm|clear|torch"
    r"|float(16|32|64)|bfloat16|u?int\d+|bool|assert_(size_stride|alignment)"
)
_MAX_RECORDED_BYTES = 2**28


def record_calls(
    compiled: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Callable[[], None]] | None:
    """Record the kernel calls of a compiled graph on fixed inputs, with the buffers it allocates.

    Replaying the recorded calls skips the Python code around the kernels: a call takes a fraction
    of a microsecond and allocates no memory.

    Args:
        compiled: a graph of :func:`compile_graph`.
        inputs: tensors of fixed addresses; their values may change between replays.

    Returns:
        the outputs, and a function that recomputes them in place from the current values of the
        inputs; None if an operation of the graph cannot be recorded, or if this version of
        torch is not supported.
    """
    try:
        python = _generated_code(compiled)
        function = getattr(python, "__func__", python)
        if not all(map(_RECORDABLE.fullmatch, function.__code__.co_names)):
            return None
        tape: list[Callable[[], Any]] = []
        allocated = [0]

        def recorded(kernel: Callable[..., Any]) -> Callable[..., None]:
            def call(*args: Any, **options: Any) -> None:
                tape.append(functools.partial(kernel, *args, **options))
                kernel(*args, **options)

            return call

        class Externs:
            def __getattr__(self, name: str) -> Callable[..., None]:
                kernel = recorded(getattr(function.__globals__["extern_kernels"], name))
                return lambda *args, out, **options: kernel(*args, out=out, **options)

        def allocate(*args: Any) -> Tensor:
            buffer: Tensor = function.__globals__["empty_strided_cpu"](*args)
            allocated[0] += buffer.nbytes
            return buffer

        own = {
            name: recorded(value) if name.startswith("cpp_fused") else value
            for name, value in function.__globals__.items()
        } | {"extern_kernels": Externs(), "empty_strided_cpu": allocate}
        again = types.FunctionType(
            function.__code__, own, function.__name__, function.__defaults__, function.__closure__
        )
        owner = (python.__self__,) if function is not python else ()
        outputs = again(*owner, list(inputs))
        expected = compiled(*inputs)
        if allocated[0] > _MAX_RECORDED_BYTES or not all(map(_same_bits, outputs, expected)):
            return None
    # another version of torch may lack these private attributes, or call them in another way
    except (AttributeError, KeyError, NameError, StopIteration, TypeError, ValueError):
        return None
    if len(tape) == 1:
        return outputs, tape[0]

    def replay() -> None:
        for call in tape:
            call()

    return outputs, replay


def _generated_code(compiled: Callable[..., Any]) -> Any:
    """Return the function that TorchInductor generated, without the functions wrapped around it."""
    inner: Any = compiled
    while not hasattr(inner, "current_callable"):
        around = dict(zip(inner.__code__.co_freevars, inner.__closure__, strict=True))
        names = ("_inner_compiled_fn", "compiled_fn", "fn")
        inner = next(around[name] for name in names if name in around).cell_contents
    return inner.current_callable


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def standard_gamma(shapes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from gamma distributions of scale 1."""
    return torch._standard_gamma(shapes, generator=generator)


class _Dirichlet:
    """Draws of torch's Dirichlet distribution, in ``vmap`` without their derivative."""

    function = dirichlet._Dirichlet

    @classmethod
    def apply(cls, concentration: Tensor) -> Tensor:
        if peek_interpreter_stack() is None:
            return cast(Tensor, cls.function.apply(concentration))
        return torch._sample_dirichlet(concentration)


class _SafeLog:
    """Pyro's logarithm, whose derivative is bounded at 0."""

    function = special._SafeLog

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        if peek_interpreter_stack() is None:
            return cast(Tensor, cls.function.apply(x))
        bounded = x.detach().clamp(min=torch.finfo(x.dtype).eps)
        return x.detach().log() + (x - x.detach()) / bounded


@contextlib.contextmanager
def functions_in_vmap() -> Iterator[None]:
    """Replace each ``autograd.Function`` of torch and Pyro that ``vmap`` does not support.

    These are the draws of Beta and Dirichlet distributions, which have no derivative then, and
    Pyro's ``safe_log``. Code outside of transforms, as that of other threads, is not affected.
    """
    before = dirichlet._Dirichlet, special._SafeLog
    dirichlet._Dirichlet, special._SafeLog = _Dirichlet, _SafeLog  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        dirichlet._Dirichlet, special._SafeLog = before  # type: ignore[misc]


def multiply_each(tensors: list[Tensor] | tuple[Tensor, ...], by: Tensor) -> tuple[Tensor, ...]:
    """Multiply all tensors by one number, in one call."""
    return torch._foreach_mul(tensors, by)


def norm_of_each(
    tensors: list[Tensor] | tuple[Tensor, ...], order: float = 2.0
) -> tuple[Tensor, ...]:
    """Compute the norms of all tensors, Euclidean by default, in one call."""
    return torch._foreach_norm(tensors, order)


def held_by(*roots: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return all modules below the given ones, with their parameters and buffers.

    torch's own iterators take five times as long.
    """
    modules, tensors = list(roots), []
    for module in modules:  # the list grows by the children of each
        modules += [child for child in module._modules.values() if child is not None]
        tensors += [
            t
            for named in (module._parameters, module._buffers)
            for t in named.values()
            if t is not None
        ]
    return modules, tensors


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor."""
    return tensor._version
