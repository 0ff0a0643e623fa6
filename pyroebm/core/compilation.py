"""Compilation by TorchInductor of an energy's gradient, or of the inner loops of kernels."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyroebm.core._torch_private import FixedShapes, compile_graph, record_calls
from pyroebm.core.energy import Energy, SharesLogZ, View, unchecked_value_and_grad
from pyroebm.core.rowwise import RowsFailAlone

__all__ = [
    "Compiled",
    "CompiledGradient",
    "choose_compiled",
    "compiled_call",
    "fused",
    "is_compiled",
]

#: A compiled function; each argument is one tensor.
_Call = Callable[..., Any]

T = TypeVar("T")

#: Compiled functions of this process, by function, settings, shapes, and the code of the energy's
#: graphs, whose constants are inputs.
_graphs: dict[Hashable, _Call] = {}
#: The batch shapes at which a function evaluates the energy.
_shapes: dict[Hashable, tuple[torch.Size, ...]] = {}
_MAX_GRAPHS = 256

#: Events are short, and short loops fill wide vector registers badly: 256 bits are faster than 512
#: for most energies.
_OPTIONS: dict[str, Any] = (
    {"cpp.simdlen": 256} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
)

#: A gradient is called only with the shapes and strides that it was compiled for.
_UNCHECKED = _OPTIONS | {"size_asserts": False, "alignment_asserts": False}

#: Time to compile the functions of a kernel with empty caches, and the extra time of one eager
#: leapfrog step over a compiled one.
_COMPILE_SECONDS = 30.0
_SECONDS_PER_STEP = 250e-6
_SECONDS_PER_ENTRY = 15e-9

#: Time of one evaluation of a captured gradient without compilation, and time to compile it with
#: empty caches. A compiled evaluation takes a fifth of the time or less.
_SECONDS_PER_CALL = 30e-6
_SECONDS_PER_OPERATION = 3e-6
_SECONDS_PER_RESULT = 0.5e-9
_COMPILE_GRADIENT_SECONDS = 2.5
_COMPILE_SECONDS_PER_OPERATION = 0.015
_SAVED_FRACTION = 0.8

#: Runs of fewer gradients are not compiled: they would not repay even the compiler's imports.
_FEW_GRADIENTS = 2000


def _example(energy: Energy, count: int) -> Tensor:
    """Return states to capture an energy with, zeros if none of finite energy is found."""
    try:
        return energy.initial(count, torch.Generator(energy.device).manual_seed(0))
    except ValueError:  # the run starts from states of the user
        return torch.zeros(count, *energy.event_shape, dtype=energy.dtype, device=energy.device)


class Captured(NamedTuple):
    """Value and gradient of a batch as a graph of tensor operations, with the tensors it holds.

    The tensors that the energy holds are inputs of the graph, after x.
    """

    graph: GraphModule
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, energy: Energy, shape: torch.Size) -> Captured:
        """Capture a batch of this shape.

        Raises:
            ValueError: if random numbers are drawn.
        """
        count = shape[: len(shape) - len(energy.event_shape)].numel()
        x = _example(energy, count).reshape(shape)

        def traced(x: Tensor) -> tuple[Tensor, Tensor]:
            # a distribution that validates its arguments would branch on the values of the batch
            with RowsFailAlone(), FixedShapes(x):
                return unchecked_value_and_grad(energy, x)

        graph = make_fx(traced)(x)
        drawn = [
            str(n.target)
            for n in graph.graph.nodes
            if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        ]
        if drawn:
            raise ValueError(
                f"an energy that is compiled must draw no random numbers, got {drawn[0]} in its"
                " forward"
            )
        graph.graph.eliminate_dead_code()
        return cls(graph, _lift_constants(graph))

    def seconds(self) -> tuple[float, float]:
        """Estimate the seconds of one evaluation without compilation, and of the compilation.

        Both are computed from the numbers of operations and entries, so that every process gets the
        same.
        """
        calls = [node for node in self.graph.graph.nodes if node.op == "call_function"]
        values = [node.meta.get("val") for node in calls]
        entries = sum(value.numel() for value in values if isinstance(value, Tensor))
        return (
            _SECONDS_PER_CALL + len(calls) * _SECONDS_PER_OPERATION + entries * _SECONDS_PER_RESULT,
            _COMPILE_GRADIENT_SECONDS + len(calls) * _COMPILE_SECONDS_PER_OPERATION,
        )


class CompiledView(SharesLogZ, View):
    """Base class of compiled energies; everything but the compiled part is passed on to the energy.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> isinstance(Compiled(DoubleWell()), CompiledView)
        True
    """

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return self.energy.sample(num_samples, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        return self.energy.subsample(generator)


class CompiledGradient(CompiledView):
    """An energy whose value and gradient are compiled.

    Parameters and other tensors that the energy holds are inputs of the compiled graph, so in-place
    training takes effect. Python attributes and branches are fixed when the graph is captured, and
    so are the tensors that a :class:`pyroebm.core.rowwise.RowwiseEnergy` derives from its
    constants. There is one graph for each prepared batch shape; batches of other shapes are
    evaluated without compilation.

    Args:
        energy: an energy of continuous support whose forward is made of torch operations alone,
            without random numbers.

    Example:
        >>> from pyroebm.core import value_and_grad
        >>> from pyroebm.targets import DoubleWell
        >>> energy, x = CompiledGradient(DoubleWell()), torch.tensor([1.0, 2.0])
        >>> energy.prepare(x.shape)
        >>> value_and_grad(energy, x)
        (tensor([-2.,  2.]), tensor([-3., 17.]))
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy)
        self._captured: dict[torch.Size, Captured] = {}
        self._calls: dict[torch.Size, tuple[_Call, tuple[Tensor, ...]]] = {}

    def captured(self, shape: torch.Size) -> Captured:
        """Return the graph of value and gradient of a batch of this shape."""
        if shape not in self._captured:
            self._captured[shape] = Captured.of(self.energy, shape)
        return self._captured[shape]

    def prepare(self, shape: torch.Size) -> None:
        """Compile value and gradient for batches of this shape, unless that is done already."""
        if shape in self._calls:
            return
        graph, held = self.captured(shape)
        known = (shape, self.energy.dtype, self.energy.device, graph.code, *map(_kind, held))
        if known not in _graphs:
            if len(_graphs) >= _MAX_GRAPHS:
                _graphs.pop(next(iter(_graphs)))
            x = torch.zeros(shape, dtype=self.energy.dtype, device=self.energy.device)
            with torch.no_grad(), _quiet_compiler():
                _graphs[known] = compile_graph(graph, [x, *_copies(held)], _UNCHECKED)
        self._calls[shape] = _graphs[known], held

    def _value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self._calls.get(x.shape)
        if found is None:
            return self.energy._value_and_grad(x)
        call, held = found
        values, grad = call(x.contiguous(), *held)
        return values, grad

    def bound_to(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[], None]] | None:
        """Bind the compiled value and gradient to a batch at a fixed address in memory.

        Args:
            x: states, contiguous, which are changed in place.

        Returns:
            the values, the gradient, and a function that recomputes both in place; None if the
            graph cannot be recorded, or none was prepared for this shape.
        """
        found = self._calls.get(x.shape)
        if found is None or x.device.type != "cpu":
            return None
        call, held = found
        with torch.no_grad():
            recorded = record_calls(call, (x, *held))
        if recorded is None:
            return None
        (values, grad), compute = recorded
        return values, grad, compute


class Compiled(CompiledView):
    """An energy for which kernels run their inner loops as compiled functions.

    Value and gradient of the energy are traced for each batch shape with
    :func:`torch.fx.experimental.proxy_tensor.make_fx`, together with the operations of the kernel's
    function around them, and TorchInductor compiles the whole graph. Parameters and other tensors
    that the energy holds are inputs of the graph, so in-place training takes effect. Python
    attributes and branches are fixed while tracing, so a new ``Compiled`` is made for each run. A
    function that was compiled for an energy with the same operations is not compiled again.

    Args:
        energy: an energy of continuous support whose forward is made of torch operations alone,
            without random numbers.
        must: whether a function that cannot be compiled raises an error; if False, it warns with
            the reason and runs without compilation.

    Raises:
        RuntimeError: if a function cannot be compiled and ``must`` is True.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> Compiled(DoubleWell())(torch.tensor([1.0]))
        tensor([-2.])
    """

    def __init__(self, energy: Energy, must: bool = True) -> None:
        super().__init__(energy)
        self.must = must
        self._calls: dict[Hashable, tuple[_Call, tuple[Tensor, ...]]] = {}
        self._gradients: dict[torch.Size, Captured] = {}

    def run(self, function: Callable[..., T], inputs: tuple[Any, ...], static: dict[str, Any]) -> T:
        """Return ``function(energy, *inputs, **static)``, computed in one compiled call."""
        tensors: list[Tensor] = []
        key = (function, *static.items(), _flatten(inputs, tensors))
        if key not in self._calls:
            try:
                self.attempt(function, inputs, static)
            # tracing and compiling can raise any kind of exception
            except Exception as error:
                problem = f"{type(self.energy).__name__} cannot be compiled ({_reason(error)})"
                if self.must:
                    raise RuntimeError(f"{problem}; use compile=False") from error
                warnings.warn(
                    f"{problem} and runs without compilation", RuntimeWarning, stacklevel=4
                )

                def uncompiled(*given: Tensor) -> T:
                    return function(self.energy, *_unflatten(key[-1], iter(given)), **static)

                self._calls[key] = uncompiled, ()
        call, constants = self._calls[key]
        return cast(T, call(*tensors, *constants))

    def attempt(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], static: dict[str, Any]
    ) -> None:
        """Compile ``function(energy, *inputs, **static)``; raise the error of the compiler."""
        tensors: list[Tensor] = []
        structure = _flatten(inputs, tensors)
        key = (function, *static.items(), structure)
        examples = _copies(tuple(tensors))

        def flat(energy: Energy, *given: Tensor) -> Any:
            return function(energy, *_unflatten(structure, iter(given)), **static)

        self._calls[key] = self._compile(key, flat, examples)

    def _compile(
        self, key: Hashable, flat: Callable[..., Any], examples: tuple[Tensor, ...]
    ) -> tuple[_Call, tuple[Tensor, ...]]:
        shapes = _shapes.get((key, self.event_shape))
        if shapes is None:
            recorder = _ShapeRecorder(self.energy)
            flat(recorder, *examples)
            shapes = _shapes[key, self.event_shape] = tuple(dict.fromkeys(recorder.shapes))
        gradients = [self._gradient(shape) for shape in shapes]
        constants = tuple(c for _, held in gradients for c in held)
        known = (
            key,
            self.event_shape,
            *[graph.code for graph, _ in gradients],
            *map(_kind, constants),
        )
        if known not in _graphs:
            if len(_graphs) >= _MAX_GRAPHS:
                _graphs.pop(next(iter(_graphs)))

            returned: list[Hashable] = []

            def with_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
                held, traced = list(inputs[len(examples) :]), {}
                for shape, (graph, constants) in zip(shapes, gradients, strict=True):
                    traced[shape] = graph, [held.pop(0) for _ in constants]
                out: list[Tensor] = []
                returned[:] = [
                    _flatten(flat(_Traced(self.energy, traced), *inputs[: len(examples)]), out)
                ]
                return tuple(out)

            compiled = compiled_call(with_gradients, (*examples, *_copies(constants)))
            _graphs[known] = lambda *inputs: _unflatten(returned[0], iter(compiled(*inputs)))
        return _graphs[known], constants

    def _gradient(self, shape: torch.Size) -> Captured:
        if shape not in self._gradients:
            self._gradients[shape] = Captured.of(self.energy, shape)
        return self._gradients[shape]


class _ShapeRecorder(Energy):
    """An energy that records the batch shapes it is evaluated at."""

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return self.energy(x)


class _Traced(Energy):
    """An energy given by graphs of its value and gradient, one for each batch shape."""

    def __init__(
        self, energy: Energy, graphs: dict[torch.Size, tuple[GraphModule, list[Tensor]]]
    ) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.graphs = graphs

    def forward(self, x: Tensor) -> Tensor:
        graph, constants = self.graphs[x.shape]
        values: Tensor = _TracedValue.apply(x, graph, constants)  # type: ignore[no-untyped-call]
        return values


class _TracedValue(torch.autograd.Function):
    """Return the value of a graph, with the gradient that the graph computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: GraphModule, constants: list[Tensor]) -> Tensor:
        values, grad = graph(x, *constants)
        ctx.save_for_backward(grad)
        result: Tensor = values
        return result

    @staticmethod
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return out[0].reshape(*out[0].shape, *[1] * (grad.dim() - out[0].dim())) * grad, None, None


def compiled_call(
    function: Callable[..., tuple[Tensor, ...]],
    examples: tuple[Tensor, ...],
    options: dict[str, Any] = _OPTIONS,
) -> _Call:
    """Trace a pure function of tensors on examples, and compile it with TorchInductor.

    Tensors that the function holds are inputs of the graph.
    """
    graph = make_fx(function)(*examples)
    graph.graph.eliminate_dead_code()
    held = _lift_constants(graph)  # constants that the function created
    # The graph contains tensor operations only, so the compiler neither analyzes Python code nor
    # adds guards to each call.
    with torch.no_grad(), _quiet_compiler():
        compiled = compile_graph(graph, [*examples, *held], options)
    return (lambda *inputs: compiled(*inputs, *held)) if held else compiled


@contextlib.contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Suppress the deprecation warnings that torch's modules issue about each other."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _flatten(value: Any, tensors: list[Tensor]) -> Hashable:
    """Append the tensors of a structure to ``tensors``, and return the rest of the structure.

    A structure is a tensor or a (named) tuple of structures. The rest is its types, and the shape,
    strides, dtype and device of its tensors.
    """
    if isinstance(value, Tensor):
        tensors.append(value.contiguous())
        return _kind(tensors[-1])
    return type(value), tuple([_flatten(part, tensors) for part in value])


def _unflatten(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """Invert :func:`_flatten`."""
    if not isinstance(structure[0], type):
        return next(tensors)
    kind, parts = structure
    made = [_unflatten(part, tensors) for part in parts]
    return tuple(made) if kind is tuple else kind(*made)


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clone inputs, with their strides, so that aliased tensors are traced as separate inputs."""
    copies = tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors
    )
    for copy, tensor in zip(copies, tensors, strict=True):
        if 0 not in copy.stride():
            copy.copy_(tensor.detach())
    return copies


def _lift_constants(graph: GraphModule) -> tuple[Tensor, ...]:
    """Turn the tensors that a graph holds into inputs after the others, and return them."""
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, Any] = {}
    for node in nodes:
        if node.target not in inputs:
            with graph.graph.inserting_after(last):
                last = inputs[node.target] = graph.graph.placeholder(f"held_{len(inputs)}")
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    held = tuple(getattr(graph, name).detach() for name in inputs)
    for name in inputs:
        delattr(graph, name)
    graph.recompile()
    return held


def is_compiled(energy: Energy) -> bool:
    """Whether this is a compiled energy."""
    return isinstance(energy, CompiledView)


def fused(function: Callable[..., T], energy: Energy, *inputs: Any, **static: Any) -> T:
    """Return ``function(energy, *inputs, **static)``, compiled if the energy is :class:`Compiled`.

    Args:
        function: a function at the top of a module, pure and without random numbers (noise is an
            argument); it returns a tensor, or a structure like those of ``inputs``.
        energy: the energy.
        inputs: everything that changes from call to call: tensors, and (named) tuples of them, such
            as states and metrics.
        static: settings; each combination has a graph of its own.

    Example:
        >>> from pyroebm.kernels import State
        >>> from pyroebm.targets import DoubleWell
        >>> def moved(energy, state, by):
        ...     return State(state.x + by, energy(state.x + by), state.grad)
        >>> state = State(torch.zeros(1), torch.zeros(1), torch.ones(1))
        >>> fused(moved, DoubleWell(), state, torch.ones(1)).energy
        tensor([-2.])
    """
    if isinstance(energy, Compiled):
        return energy.run(function, inputs, static)
    return function(energy, *inputs, **static)


class _NoCompilerError(RuntimeError):
    """No C++ compiler is installed."""


class _Planned(Protocol):
    """The properties of a kernel that :func:`choose_compiled` uses."""

    @property
    def expected_gradients(self) -> float: ...
    @property
    def discrete(self) -> bool: ...
    @property
    def compiles(self) -> str: ...


def choose_compiled(
    energy: Energy,
    compile: bool | Literal["auto"],
    kernel: _Planned,
    num_chains: int,
    num_steps: int,
    say: Callable[[str], None] = lambda text: None,
    sizes: Iterable[int] | None = None,
) -> Energy:
    """Return the energy, compiled if requested or if the planned work repays the compilation.

    Args:
        energy: the energy that the kernel samples.
        compile: True, False, or "auto", which decides from counts (operations of a gradient,
            entries of a state, planned steps) and never from timings, so that the choice is
            reproducible.
        kernel: the kernel; it declares the expected number of gradients of one step, and whether
            to compile its inner loops, the gradient alone, or nothing.
        num_chains: number of chains of one batch.
        num_steps: planned steps of each chain.
        sizes: numbers of chains for which a gradient is compiled; None for ``num_chains`` alone.
        say: called with a message before a compilation that takes seconds.

    Raises:
        ValueError: if ``compile`` is not True, False or "auto".
        RuntimeError: if ``compile`` is True and there is no C++ compiler or the energy cannot be
            captured; the message has the reason.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got compile={compile!r}')
    if compile is False or kernel.compiles == "nothing" or kernel.discrete or is_compiled(energy):
        return energy
    gradients = num_steps * kernel.expected_gradients
    loops = kernel.compiles == "loops"
    entries = num_chains * max(1, energy.event_shape.numel())
    saved = gradients * (_SECONDS_PER_STEP + _SECONDS_PER_ENTRY * entries)
    if compile == "auto" and (
        saved < 2.0 * _COMPILE_SECONDS if loops else gradients < _FEW_GRADIENTS
    ):
        return energy
    try:
        if energy.device.type == "cpu" and not any(
            shutil.which(name) for name in ("g++", "clang++", "c++", "cl")
        ):
            raise _NoCompilerError("no C++ compiler was found")
        if loops:
            return _compiled_loops(energy, compile is True, say)
        batches = (num_chains,) if sizes is None else tuple(sizes)
        return _compiled_gradient(energy, compile is True, num_chains, gradients, say, batches)
    # capturing and compiling can raise any kind of exception
    except Exception as error:
        reason = str(error) if isinstance(error, _NoCompilerError) else _reason(error)
        problem = f"{type(energy).__name__} cannot be compiled ({reason})"
        if compile is True:
            raise RuntimeError(f"{problem}; use compile=False") from error
        warnings.warn(f"{problem} and runs without compilation", RuntimeWarning, stacklevel=3)
        return energy


def _compiled_loops(energy: Energy, must: bool, say: Callable[[str], None]) -> Energy:
    say("compiling the kernel, up to a minute, once for this energy")
    # a later function may fail although this one compiles: it warns if ``must`` is False
    view = Compiled(energy, must)
    view.attempt(_probe, (_example(energy, 2),), {})
    return view


def _compiled_gradient(
    energy: Energy,
    must: bool,
    chains: int,
    gradients: float,
    say: Callable[[str], None],
    sizes: tuple[int, ...],
) -> Energy:
    view = CompiledGradient(energy)
    eager, compiling = view.captured(torch.Size((chains, *energy.event_shape))).seconds()
    if not must and gradients * _SAVED_FRACTION * eager < compiling:
        return energy
    seconds = math.ceil(compiling * len(set(sizes)))
    say(f"compiling the gradient, about {seconds} s the first time")
    for size in sorted(set(sizes)):
        view.prepare(torch.Size((size, *energy.event_shape)))
    return view


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _probe(energy: Energy, x: Tensor) -> tuple[Tensor, ...]:
    return unchecked_value_and_grad(energy, x)
