"""Operations in the graph of an energy's value and gradient."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyroebm import Energy
from pyroebm.core._torch_private import FixedShapes
from pyroebm.core.energy import unchecked_value_and_grad


def data_dependent(energy: Energy, x: Tensor) -> list[str]:
    """Return operations whose shapes or branches depend on data, which compilers reject."""

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        with FixedShapes(x):
            return unchecked_value_and_grad(energy, x)

    graph = make_fx(traced)(x)
    masks = (torch.bool, torch.uint8)
    found = []
    for node in graph.graph.nodes:
        if str(node.target) in {
            "aten.index.Tensor",
            "aten.index_put.default",
            "aten.index_put_.default",
        }:
            indices = [index for index in node.args[1] if isinstance(index, fx.Node)]
            if any(_value(graph, index).dtype in masks for index in indices):
                found.append(str(node.target))
        elif {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(
            getattr(node.target, "tags", ())
        ):
            found.append(str(node.target))
    return found


def _value(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = getattr(graph, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    return value
