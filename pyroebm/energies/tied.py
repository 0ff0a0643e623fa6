"""Restricted Boltzmann machines with tied copies of layers, to pretrain deep Boltzmann machines."""

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
    r"""An RBM with several tied copies of its layers (Salakhutdinov and Hinton, 2009).

    .. math:: E = \sum_{a, b} E_{RBM}(v_a, h_b), \qquad a = 1, \ldots, A, \quad b = 1, \ldots, B

    With two copies of the visible layer the field of each hidden unit is :math:`2 (W^\top v + c)`.
    In a deep machine half of it comes from the layer above; :func:`compose` keeps the other half.

    Args:
        rbm: the RBM; its parameters are shared.
        copies: A and B, the numbers of copies of the visible and of the hidden layer.

    Raises:
        ValueError: if ``rbm`` is not an RBM, or if a number of copies is below 1.

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
        """Repeat data for each copy: ``(*batch, n)`` to ``(*batch, A n)``."""
        return torch.cat([visible] * self.copies[0], -1)

    def layers(self) -> Layers:
        """Return the layers of all copies, in natural parameters."""
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
    r"""Compose a deep Boltzmann machine from RBMs that were trained in turn as :class:`TiedRBM`.

    The lowest RBM has two copies of its visible layer, the highest one two of its hidden layer,
    those between two of both. Half of the field of each hidden layer is that of the RBM below it,
    half that of the RBM above: the weights are those of the RBMs, and its bias is the sum of both
    biases.

    Args:
        rbms: at least two RBMs, the lowest first, which may be Gaussian of the convention
            ``"hinton"``.

    Raises:
        ValueError: if there are fewer than two, if their sizes do not match, or if the first is
            Gaussian of another convention.

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
