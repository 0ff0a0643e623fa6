"""Sums over enumerated latent variables, in log space.

Pyro's tensor variable elimination finds the order of the sums; this module is its arithmetic.
Pyro's own cannot run under vmap, and underflows where the largest entries of two factors do not
coincide.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["log_marginal"]


def log_sum_exp(x: Tensor, dims: list[int]) -> Tensor:
    """Return ``x.logsumexp(dims)``, with the gradient 0 instead of NaN where all terms are 0."""
    least = torch.finfo(x.dtype).min
    total = x.clamp(min=least).logsumexp(dims)
    return torch.where(total <= least, -torch.inf, total)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Return ``log(einsum(equation, exp(operands)))``."""
    inputs, output = equation.split("->")
    names = output + "".join(sorted(set(inputs) - set(output) - {","}))
    aligned = [
        _aligned(x, dims, names) for x, dims in zip(operands, inputs.split(","), strict=True)
    ]
    total = functools.reduce(torch.add, aligned)
    if summed := list(range(len(output), len(names))):
        return log_sum_exp(total, summed)
    return total.view_as(total) if len(operands) == 1 else total  # Pyro labels the result


def _aligned(x: Tensor, dims: str, names: str) -> Tensor:
    """Order the dimensions of x as in ``names``, with size 1 where it has none."""
    order = [dims.index(name) for name in names if name in dims]
    if order != sorted(order):  # each operation of the graph counts
        x = x.permute(order)
    for axis, name in enumerate(names):
        if name not in dims:
            x = x.unsqueeze(axis)
    return x


#: opt_einsum calls these two and ``einsum`` of the module that a ring names.
tensordot = Tensordot(einsum)


def transpose(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the axes of a tensor."""
    return x.permute(axes)


class _LogSumProduct(LogRing):
    _backend = __name__


def log_marginal(trace: poutine.Trace) -> Tensor:
    """Return the log-density of a trace, with enumerated variables summed out, shape ``()``.

    Args:
        trace: the trace of a model under :func:`pyro.poutine.enum`.

    Raises:
        ValueError: if the plates of the enumerated variables are not nested as a tree.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.25), infer={"enumerate": "parallel"})
        ...     pyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(0.0))
        >>> enumerated = poutine.enum(model, first_available_dim=-1)
        >>> log_marginal(poutine.trace(enumerated).get_trace()).exp()
        tensor(0.3003)
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    nodes: Any = trace.nodes
    for site in nodes.values():
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample):
            plates = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            factors.setdefault(plates, []).append(site["packed"]["log_prob"])
    summed = set(trace.symbol_to_dim) - set(symbols.values())
    try:
        total: Tensor = contract_to_tensor(factors, summed, ring=_LogSumProduct())
    except NotImplementedError as error:
        raise ValueError(
            "discrete latent variables that depend on each other must be in nested plates, got"
            f" plates {sorted(symbols)} some of which cross: make one of them sequential, for i in"
            " pyro.plate(...)"
        ) from error
    return total
