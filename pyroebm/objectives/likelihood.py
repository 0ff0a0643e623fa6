"""Likelihoods without a Markov chain: with exact log Z, or its mean-field approximation."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.objectives.base import Objective, check_rows
from pyroebm.objectives.layered import PartialLayers, mean_field, visible

__all__ = ["ExactLikelihood", "HasLogPartition", "MeanFieldLikelihood"]

Metrics = dict[str, Tensor]


@runtime_checkable
class HasLogPartition(Protocol):
    r"""An energy that computes :math:`\log Z` with its graph, shape ``()``.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), HasLogPartition)
        True
    """

    def log_partition(self) -> Tensor:
        r"""Return :math:`\log Z`, shape ``()``."""
        ...


@runtime_checkable
class HasLogLikelihood(Protocol):
    r"""An energy that computes :math:`\log p(v)` of its visible units with its graph.

    Example:
        >>> from pyroebm.energies import DeepBoltzmannMachine
        >>> isinstance(DeepBoltzmannMachine([4, 3, 2]), HasLogLikelihood)
        True
    """

    def log_likelihood(self, x: Tensor, log_z: float | Tensor | None = None, /) -> Tensor:
        r"""Return :math:`\log p(v)` of visible units, ``(n,)``, given :math:`\log Z`."""
        ...


class ExactLikelihood(Objective):
    r"""Exact negative mean log-likelihood, for energies that compute log Z.

    .. math:: L = \frac1n \sum_i E(x_i) + \log Z

    If ``batch`` has only the visible units of an energy over visible and hidden ones (a deep
    Boltzmann machine, a dense one with hidden units), E is replaced by the free energy F(v) of its
    ``log_likelihood``.

    Raises:
        ValueError: if the energy has no ``log_partition()``, or too many units for it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, metrics = ExactLikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2
        2.7726
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, ``log_z``, ``log_likelihood`` (the mean over the batch).
        """
        if not isinstance(energy, HasLogPartition):
            raise ValueError(
                "energy must have log_partition() for ExactLikelihood, but"
                f" {type(energy).__name__} has none: use ContrastiveDivergence or PersistentCD,"
                " which do not need log Z"
            )
        check_rows(batch)
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
    r"""Negative mean log-likelihood with log Z in naive mean field (Peterson and Anderson, 1987).

    .. math::

        L = \frac1n \sum_i F(x_i) + \max_q \big(-E_q[E] + H(q)\big) \le -\frac1n \sum_i \log p(x_i)

    with q a product over units, for layered machines. The maximum is approximated by alternating
    updates from each row of the batch, of which the best result is kept.

    **L is biased.** It is a lower bound on the negative log-likelihood, so it can decrease while
    the latter increases; with more than one hidden layer F is an upper bound by mean field too, and
    L is no bound. A single q cannot approximate several modes. The bias is small for small weights.

    Raises:
        ValueError: if the energy is no layered machine, or a batch does not fit it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, metrics = MeanFieldLikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2: exact without weights
        2.7726
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, ``log_z_bound`` (a lower bound on log Z).
        """
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                "energy must be a layered machine, such as BernoulliRBM, for MeanFieldLikelihood,"
                f" got {type(energy).__name__}"
            )
        layers = energy.layers()
        data = mean_field(layers, visible(layers, batch, type(energy).__name__))
        free = free_energy_of(layers, mean_field(layers, None, data))
        best = free[free.detach().argmin()]
        positive = free_energy_of(layers, data, seen=True).mean()
        loss = positive - best
        return loss, {"energy_data": positive.detach(), "log_z_bound": -best.detach()}


def free_energy_of(layers: Layers, even: PartialLayers, seen: bool = False) -> Tensor:
    r"""Return :math:`E_q[E] - H(q)` given means of the even layers, minimized over the odd ones.

    Args:
        layers: the model.
        even: means of the even layers, ``(n, units)``.
        seen: whether layer 0 has states of visible units, which have no entropy.

    Returns:
        The free energies with their graph, ``(n,)``.
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
