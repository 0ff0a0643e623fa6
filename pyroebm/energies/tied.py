"""Restricted Boltzmann machines with copies of their layers: what a deep Boltzmann machine is
pretrained with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.energies.rbm import RBM, BernoulliRBM, GaussianRBM

__all__ = ["TiedRBM", "compose"]


class TiedRBM(LayeredMachine):
    r"""An RBM whose layers stand there several times with tied parameters (Salakhutdinov and
    Hinton, 2009).

    With two copies of the visible layer each hidden unit feels :math:`2 (W^\top v + c)`: what it
    will feel in a deep machine, where the layer above brings the second half. Half of that is what
    it takes along (:func:`compose`).

    .. math:: E = \sum_{a, b} E_{RBM}(v_a, h_b), \qquad a = 1, \ldots, A, \quad b = 1, \ldots, B

    Args:
        rbm: whose parameters are shared.
        copies: A and B, of the visible and of the hidden layer.

    Raises:
        ValueError: if ``rbm`` is no RBM, or a number of copies is below 1.

    Example:
        >>> rbm = BernoulliRBM(4, 3)
        >>> tied = TiedRBM(rbm, (2, 1))
        >>> v = torch.ones(5, 4)
        >>> tied.event_shape, tied(tied.repeat(v)).shape
        (torch.Size([8]), torch.Size([5]))
    """

    def __init__(self, rbm: RBM, copies: tuple[int, int]) -> None:
        if not isinstance(rbm, RBM) or min(copies) < 1:
            raise ValueError(
                "rbm must be an RBM and copies two numbers of at least 1, got"
                f" {type(rbm).__name__}, copies={copies}"
            )
        super().__init__((copies[0] * rbm.event_shape[0],), rbm.support)
        self.rbm, self.copies = rbm, copies

    def repeat(self, visible: Tensor) -> Tensor:
        """Data for the copies: ``(*batch, n)`` to ``(*batch, A n)``."""
        return torch.cat([visible] * self.copies[0], -1)

    def layers(self) -> Layers:
        (weight,), (b, c), precision, offset = self.rbm.layers()
        below, above = self.copies
        tiled = None if precision is None else above * precision.repeat(below)
        return Layers(
            (weight.repeat(below, above),),
            (above * b.repeat(below), below * c.repeat(above)),
            tiled,
            below * above * offset,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.layers().free_energy([x, None])


def compose(rbms: Sequence[RBM]) -> DeepBoltzmannMachine:
    r"""The deep Boltzmann machine of RBMs that were trained one on top of the other, as
    :class:`TiedRBM`.

    The lowest one has two copies of its visible layer, the highest one two of its hidden layer,
    those between two of both. Each hidden layer then takes half of what it felt in the RBM below it
    and half of what it felt in that above: the weights as they are, and the sum of both biases.

    Args:
        rbms: from below, at least two; the first may be Gaussian, of the convention ``"hinton"``.

    Raises:
        ValueError: if there are fewer, or their sizes do not fit.

    Example:
        >>> compose([BernoulliRBM(4, 3), BernoulliRBM(3, 2)]).sizes
        (4, 3, 2)
    """
    if len(rbms) < 2:
        raise ValueError(f"rbms must hold at least two, got {len(rbms)}")
    for below, above in itertools.pairwise(rbms):
        if len(below.hidden_bias) != above.event_shape[0] or not isinstance(above, BernoulliRBM):
            raise ValueError(
                "each RBM must be a BernoulliRBM on the hidden units of the one below, got"
                f" {above.event_shape[0]} visible units"
                f" of a {type(above).__name__} on {len(below.hidden_bias)} hidden ones"
            )
    first = rbms[0]
    if isinstance(first, GaussianRBM) and first.convention != "hinton":
        raise ValueError(
            f'a Gaussian first RBM must have convention "hinton", got {first.convention!r}'
        )
    sizes = [first.event_shape[0], *(len(rbm.hidden_bias) for rbm in rbms)]
    shared = [below.hidden_bias + above.visible_bias for below, above in itertools.pairwise(rbms)]
    return DeepBoltzmannMachine(
        sizes,
        visible="gaussian" if isinstance(first, GaussianRBM) else "bits",
        weights=[rbm.weight for rbm in rbms],
        biases=[first.visible_bias, *shared, rbms[-1].hidden_bias],
        log_sigma=first.log_sigma if isinstance(first, GaussianRBM) else None,
        dtype=first.dtype,
    ).to(first.device)
