"""Greedy layer-wise pretraining: each layer learns from what the layers below it make of the
data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.rbm import RBM, BernoulliRBM, GaussianRBM
from pyroebm.energies.tied import TiedRBM, compose
from pyroebm.objectives.base import Objective
from pyroebm.training.fit import fit

__all__ = ["pretrain_belief_network", "pretrain_boltzmann_machine"]


def pretrain_belief_network(
    sizes: Sequence[int],
    data: Tensor,
    objective: Objective,
    *,
    tied: bool = True,
    **options: Any,
) -> DeepBeliefNetwork:
    r"""Stack RBMs, each trained on the recognition means of the ones below (Hinton, Osindero and
    Teh, 2006).

    Args:
        sizes: units of each layer, the visible one first.
        data: binary, shape ``(n, sizes[0])``, floating point.
        objective: of which each layer is trained by a copy, such as
            ``PersistentCD(num_chains=100)``.
        tied: start a layer from the transposed weights of the one below wherever their sizes allow
            it; each further layer then begins with the likelihood that the network has.
        options: for :func:`pyroebm.training.fit`, the same for each layer, such as ``num_epochs``.
            ``checkpoint``, ``log`` and ``tensorboard`` get the number of the layer added:
            ``pretrained.safetensors`` is ``pretrained-1.safetensors`` for the first.

    Returns:
        the network, of the data's dtype and device.

    Raises:
        ValueError: as :func:`pyroebm.training.fit`.

    Example:
        >>> from pyroebm.objectives import ContrastiveDivergence
        >>> network = pretrain_belief_network(
        ...     [4, 3, 4], torch.ones(5, 4), ContrastiveDivergence(), num_epochs=1
        ... )
        >>> network.sizes
        [4, 3, 4]
    """
    network = DeepBeliefNetwork(sizes[:2], dtype=data.dtype).to(data.device)
    network.top.fit_visible(data)
    _train_layer(1, network.top, data, objective, options)
    for layer, (below, size) in enumerate(zip(sizes[:-2], sizes[2:], strict=True), 2):
        with torch.no_grad():
            inputs = torch.sigmoid(
                network.means_up(data) @ network.top.weight + network.top.hidden_bias
            )
        network.grow(size, tied=tied and size == below)
        _train_layer(layer, network.top, inputs, objective, options)
    return network


def pretrain_boltzmann_machine(
    sizes: Sequence[int],
    data: Tensor,
    objective: Objective,
    *,
    visible: Literal["bits", "gaussian"] = "bits",
    **options: Any,
) -> DeepBoltzmannMachine:
    r"""Stack RBMs with doubled layers, and undo the doubling (Salakhutdinov and Hinton, 2009).

    A hidden layer of the deep machine feels two neighbors, where that of an RBM feels one: so the
    lowest RBM is trained with two tied copies of its visible layer, the highest with two of its
    hidden one, and those between with two of both (:class:`pyroebm.energies.TiedRBM`).
    :func:`pyroebm.energies.compose` puts them together.

    Args:
        sizes: units of each layer, the visible one first; at least three.
        data: shape ``(n, sizes[0])``, floating point.
        objective: of which each layer is trained by a copy.
        visible: ``"bits"`` or ``"gaussian"``.
        options: for :func:`pyroebm.training.fit`, as in :func:`pretrain_belief_network`.

    Returns:
        the deep machine, of the data's dtype and device; train it as a whole next.

    Raises:
        ValueError: if there are fewer than three layers; or as :func:`pyroebm.training.fit`.

    Example:
        >>> from pyroebm.objectives import PersistentCD
        >>> machine = pretrain_boltzmann_machine(
        ...     [4, 3, 2], torch.ones(5, 4), PersistentCD(10), num_epochs=1, lr=0.01
        ... )
        >>> machine.sizes
        (4, 3, 2)
    """
    if len(sizes) < 3:
        raise ValueError(f"sizes must name three layers or more, got sizes={list(sizes)}")
    rbms: list[RBM] = []
    last, inputs = len(sizes) - 2, data
    for k, (below, above) in enumerate(itertools.pairwise(sizes)):
        rbm: RBM
        if k == 0 and visible == "gaussian":
            rbm = GaussianRBM(below, above, dtype=data.dtype)
        else:
            rbm = BernoulliRBM(below, above, dtype=data.dtype)
        rbm.to(data.device)
        if k == 0:
            rbm.fit_visible(data)
        tied = TiedRBM(rbm, (2 if k < last else 1, 2 if k > 0 else 1))
        _train_layer(k + 1, tied, tied.repeat(inputs), objective, options)
        with torch.no_grad():
            layers = tied.layers()
            inputs = layers.mean(1, layers.field(1, [tied.repeat(inputs), None]))[:, :above]
        rbms.append(rbm)
    return compose(rbms)


def _train_layer(
    layer: int,
    machine: LayeredMachine,
    inputs: Tensor,
    objective: Objective,
    options: dict[str, Any],
) -> None:
    """Train one layer by an objective of its own, with files of its own."""
    own = dict(options)
    for name in ("checkpoint", "log", "tensorboard"):
        if own.get(name) is not None:
            path = Path(own[name])
            own[name] = path.with_name(f"{path.stem}-{layer}{path.suffix}")
    fit(machine, copy.deepcopy(objective), inputs, **own)
