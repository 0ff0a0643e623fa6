"""Greedy layer-wise pretraining of deep belief networks and deep Boltzmann machines."""

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
    **options: Any,
) -> DeepBeliefNetwork:
    r"""Pretrain a deep belief network as a stack of RBMs (Hinton, Osindero and Teh, 2006).

    Each RBM is trained on the means of the recognition network of the layers below. A layer is
    initialized with the transposed weights of the one below if their sizes agree; adding it then
    does not change the likelihood.

    Args:
        sizes: number of units of each layer, the visible one first.
        data: binary data, shape ``(n, sizes[0])``, floating point.
        objective: the objective, of which each layer has a copy, such as
            ``PersistentCD(num_chains=100)``.
        options: options of :func:`pyroebm.training.fit` for all layers, such as ``num_epochs``. The
            number of the layer is appended to the file names of ``checkpoint``, ``log`` and
            ``tensorboard``, for example ``pretrained-1.safetensors``.

    Returns:
        The network, with the dtype and device of the data.

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
        network.grow(size, tied=size == below)
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
    r"""Pretrain a deep Boltzmann machine as a stack of RBMs (Salakhutdinov and Hinton, 2009).

    A hidden layer of the deep machine has inputs from two layers, that of an RBM from one. So the
    lowest RBM is trained with two tied copies of its visible layer, the highest with two of its
    hidden layer, and those in between with two of both (:class:`pyroebm.energies.TiedRBM`).
    :func:`pyroebm.energies.compose` makes the deep machine of them.

    Args:
        sizes: number of units of each layer, the visible one first; at least three layers.
        data: data, shape ``(n, sizes[0])``, floating point.
        objective: the objective, of which each layer has a copy.
        visible: kind of the visible units, ``"bits"`` (binary) or ``"gaussian"``.
        options: as in :func:`pretrain_belief_network`.

    Returns:
        The deep machine, with the dtype and device of the data, to be trained jointly.

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
        raise ValueError(f"sizes must have at least three layers, got sizes={list(sizes)}")
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
    """Train a layer with a copy of the objective and its own files."""
    own = dict(options)
    for name in ("checkpoint", "log", "tensorboard"):
        if own.get(name) is not None:
            path = Path(own[name])
            own[name] = path.with_name(f"{path.stem}-{layer}{path.suffix}")
    fit(machine, copy.deepcopy(objective), inputs, **own)
