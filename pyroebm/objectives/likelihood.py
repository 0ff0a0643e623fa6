"""Likelihoods without a Markov chain: the exact one, and the one with log Z in mean field."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.objectives.base import Objective
from pyroebm.objectives.layered import Kept, mean_field, visible

__all__ = ["ExactLikelihood", "HasLogPartition", "MeanFieldLikelihood"]

Facts = dict[str, Tensor]


@runtime_checkable
class HasLogPartition(Protocol):
    r"""An energy that computes :math:`\log Z` with its graph, shape ``()``.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), HasLogPartition)
        True
    """

    def log_partition(self) -> Tensor: ...


@runtime_checkable
class HasLogLikelihood(Protocol):
    r"""An energy that computes :math:`\log p(v)` of its visible units with its graph, given
    :math:`\log Z`.

    Example:
        >>> from pyroebm.energies import DeepBoltzmannMachine
        >>> isinstance(DeepBoltzmannMachine([4, 3, 2]), HasLogLikelihood)
        True
    """

    def log_likelihood(self, x: Tensor, log_z: float | Tensor | None = None, /) -> Tensor: ...


class ExactLikelihood(Objective):
    r"""Minus the mean log-likelihood itself, where log Z can be computed.

    .. math:: L = \frac1n \sum_i E(x_i) + \log Z

    Where ``batch`` has the visible units alone of an energy over all of them (a deep Boltzmann
    machine, a dense one with hidden units), F(v) of its ``log_likelihood`` stands for E.

    Raises:
        ValueError: if the energy has no ``log_partition()``, or too many units for it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, facts = ExactLikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2
        2.7726
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, ``log_z``, ``log_likelihood`` (a mean over the
        batch)."""
        if not isinstance(energy, HasLogPartition):
            raise ValueError(
                "ExactLikelihood needs an energy with log_partition(), but"
                f" {type(energy).__name__} has none: a Markov chain does"
                " without it (ContrastiveDivergence, PersistentCD)"
            )
        seen_only = isinstance(energy, HasLogLikelihood) and batch.shape[1:] != energy.event_shape
        values = -energy.log_likelihood(batch, 0.0) if seen_only else energy(batch)  # type: ignore[operator]
        data, log_z = values.mean(), energy.log_partition()
        loss = data + log_z
        return loss, {
            "energy_data": data.detach(),
            "log_z": log_z.detach(),
            "log_likelihood": -loss.detach(),
        }


class MeanFieldLikelihood(Objective):
    r"""The likelihood of a machine of layers with its log Z in naive mean field (Peterson and
    Anderson, 1987). **Biased.**

    .. math::

        L = \frac1n \sum_i F(x_i) + \max_q \big(-E_q[E] + H(q)\big) \le -\frac1n \sum_i \log p(x_i)

    (of machines with more than one hidden layer F is an upper bound, by mean field too, and L lies
    on neither side)

    with q a product over units. The maximum is sought by alternating updates from each row of the
    batch, and the best is kept. A single q stands in for all modes, and it pushes the likelihood's
    bound the wrong way: L lies below what it stands for, and may fall while that rises. It is near
    the truth for small weights.

    Raises:
        ValueError: if the energy is no machine of layers, or a batch does not fit it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, facts = MeanFieldLikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2: exact without weights
        2.7726
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, ``log_z_bound`` (a lower one)."""
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                f"MeanFieldLikelihood is for machines of layers, got {type(energy).__name__}"
            )
        layers = energy.layers()
        data = mean_field(layers, visible(layers, batch, type(energy).__name__))
        free = free_energy_of(layers, mean_field(layers, None, data))
        best = free[free.detach().argmin()]
        positive = free_energy_of(layers, data, seen=True).mean()
        loss = positive - best
        return loss, {"energy_data": positive.detach(), "log_z_bound": -best.detach()}


def free_energy_of(layers: Layers, even: Kept, seen: bool = False) -> Tensor:
    r""":math:`E_q[E] - H(q)` of rows of means of the even layers, the odd ones at their best;
    ``(n,)``, with its graph.

    Where layer 0 is ``seen`` it is no mean, and has no entropy.
    """
    free = layers.free_energy(even)
    for layer, mean in enumerate(even):
        if mean is None or (seen and layer == 0):
            continue
        # the variance of q is that of the layer given the others
        if layer == 0 and layers.precision is not None:
            free = free + 0.5 * (layers.precision / (2.0 * math.pi)).log().sum()
        else:
            free = free + (torch.xlogy(mean, mean) + torch.xlogy(1.0 - mean, 1.0 - mean)).sum(-1)
    return free
