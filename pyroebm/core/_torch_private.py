"""The private functions and attributes of torch that the package uses, in one module, so that a
change in torch is handled here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

__all__ = [
    "BatchNorm",
    "all_true",
    "compile_graph",
    "copy_each",
    "held_by",
    "is_being_traced",
    "multiply_each",
    "norm_of_each",
    "standard_gamma",
    "tree_leaves",
    "version_of",
]

#: What batch normalisations of all dimensions have in common.
BatchNorm = nn.modules.batchnorm._BatchNorm

#: The function by which distributions ask whether all entries of a mask are true.
all_true = torch._is_all_true


def is_being_traced() -> bool:
    """Whether tensors are those of a transform (``vmap``, ``grad``), of a dispatch mode, or of a
    compiler."""
    return (
        torch.compiler.is_compiling()
        or peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile a graph of plain tensor operations with TorchInductor."""
    # a second of imports, for those alone who compile
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile as inductor
    from torch._inductor import config
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # The instruction set is that of the processor: asking the compiler about it takes 8 s. One
    # thread compiles here, so that no pool of processes has to be started, or told of Ctrl-C. The
    # cache that a second process finds asks for an environment of shapes, though all are fixed.
    known = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}), tracing(known):
        compiled = inductor(graph, list(examples), options=options)
    return cast(Callable[..., tuple[Tensor, ...]], compiled)


def standard_gamma(shapes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of gamma distributions of scale 1."""
    return torch._standard_gamma(shapes, generator=generator)


def copy_each(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy each tensor of ``source`` into the one at its place in ``to``, in one call."""
    torch._foreach_copy_(to, source)


def multiply_each(tensors: list[Tensor] | tuple[Tensor, ...], by: Tensor) -> tuple[Tensor, ...]:
    """Products with one number, in one call."""
    return torch._foreach_mul(tensors, by)


def norm_of_each(tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Euclidean norms, in one call."""
    return torch._foreach_norm(tensors)


def held_by(*roots: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """All modules in the given ones, and their parameters and buffers; torch's own iterators take
    five times as long."""
    modules, tensors = list(roots), []
    for module in modules:  # which grows by the children of each
        modules += [child for child in module._modules.values() if child is not None]
        tensors += [
            t
            for named in (module._parameters, module._buffers)
            for t in named.values()
            if t is not None
        ]
    return modules, tensors


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version
