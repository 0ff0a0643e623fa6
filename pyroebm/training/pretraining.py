"""Greedy layer-wise pretraining: each layer learns from what the layers below it make of the
data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.rbm import RBM, BernoulliRBM, GaussianRBM
from pyroebm.energies.tied import TiedRBM, compose

__all__ = ["pretrain_belief_network", "pretrain_boltzmann_machine"]

#: Trains a machine on rows of its visible units, in place: a few lines around
#: :func:`pyroebm.training.fit`.
Trainer = Callable[[LayeredMachine, Tensor], Any]


def pretrain_belief_network(
    sizes: Sequence[int], data: Tensor, train: Trainer, tied: bool = True
) -> DeepBeliefNetwork:
    r"""Stack RBMs, each trained on the recognition means of the ones below (Hinton, Osindero and
    Teh, 2006).

    Args:
        sizes: units of each layer, the visible one first.
        data: bits, shape ``(n, sizes[0])``.
        train: called as ``train(rbm, inputs)`` for each layer, from below.
        tied: start a layer from the transposed weights of the one below wherever their sizes allow
            it; each further layer then begins with the likelihood that the network has.

    Returns:
        the network, of the data's dtype and device.

    Example:
        >>> seen = []
        >>> network = pretrain_belief_network(
        ...     [4, 3, 4], torch.ones(5, 4), lambda rbm, x: seen.append(tuple(x.shape))
        ... )
        >>> network.sizes, seen
        ([4, 3, 4], [(5, 4), (5, 3)])
    """
    network = DeepBeliefNetwork(sizes[:2], dtype=data.dtype).to(data.device)
    network.top.fit_visible(data)
    train(network.top, data)
    for below, size in zip(sizes[:-2], sizes[2:], strict=True):
        with torch.no_grad():
            inputs = torch.sigmoid(
                network.means_up(data) @ network.top.weight + network.top.hidden_bias
            )
        network.grow(size, tied=tied and size == below)
        train(network.top, inputs)
    return network


def pretrain_boltzmann_machine(
    sizes: Sequence[int],
    data: Tensor,
    train: Trainer,
    visible: Literal["bits", "gaussian"] = "bits",
) -> DeepBoltzmannMachine:
    r"""Stack RBMs with doubled layers, and undo the doubling (Salakhutdinov and Hinton, 2009).

    A hidden layer of the deep machine feels two neighbours, where that of an RBM feels one: so the
    lowest RBM is trained with two tied copies of its visible layer, the highest with two of its
    hidden one, and those between with two of both (:class:`pyroebm.energies.TiedRBM`).
    :func:`pyroebm.energies.compose` puts them together.

    Args:
        sizes: units of each layer, the visible one first; at least three.
        data: shape ``(n, sizes[0])``.
        train: called as ``train(tied_rbm, inputs)`` for each layer, from below.
        visible: ``"bits"`` or ``"gaussian"``.

    Returns:
        the deep machine, of the data's dtype and device; train it as a whole next.

    Raises:
        ValueError: if there are fewer than three layers.

    Example:
        >>> seen = []
        >>> machine = pretrain_boltzmann_machine(
        ...     [4, 3, 2], torch.ones(5, 4), lambda rbm, x: seen.append(tuple(x.shape))
        ... )
        >>> machine.sizes, seen  # two copies of the visible units, then one of the hidden ones
        ((4, 3, 2), [(5, 8), (5, 3)])
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
        train(tied, tied.repeat(inputs))
        with torch.no_grad():
            layers = tied.layers()
            inputs = layers.mean(1, layers.field(1, [tied.repeat(inputs), None]))[:, :above]
        rbms.append(rbm)
    return compose(rbms)
