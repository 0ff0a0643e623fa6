"""Hybrid generative and discriminative training of a classifier as an energy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.energies.classifier import ClassifierEnergy, check_labels
from pyroebm.objectives.base import Objective

__all__ = ["Hybrid"]

Metrics = dict[str, Tensor]


class Hybrid(Objective):
    r"""Hybrid loss of a :class:`~pyroebm.energies.ClassifierEnergy` (JEM; Grathwohl et al., 2020).

    .. math:: L = -\frac1n \sum_i \log p(y_i \mid x_i) + w\, G

    G is the loss of any objective of unlabeled events, which replaces their negative mean
    log-likelihood (contrastive objectives approximate its gradient, score matching has the same
    minimum). For w = 1 the fitted distribution is :math:`p(x, y) = p(x)\, p(y \mid x)`. Without
    ``generative`` only :math:`p(y \mid x)` is trained, an ordinary classifier. ``energy.given(y)``
    is the energy of the events of a class, from which they are sampled.

    Args:
        generative: an objective that is called with x alone, such as
            :class:`ContrastiveDivergence` or :class:`ReplayBufferCD`, a submodule. None omits G.
        weight: w > 0, dimensionless.

    Raises:
        ValueError: if ``weight`` is not positive and finite, ``generative`` is no objective, the
            energy is no classifier, or the batch is no pair of events and classes.

    Example:
        >>> from pyroebm.energies import ClassifierEnergy
        >>> from pyroebm.objectives import ContrastiveDivergence
        >>> energy = ClassifierEnergy(torch.nn.Linear(2, 3), (2,), 3, scale=1.0)
        >>> objective, noise = Hybrid(ContrastiveDivergence(k=5)), torch.Generator().manual_seed(0)
        >>> loss, metrics = objective(
        ...     energy, (torch.ones(4, 2), torch.tensor([0, 1, 2, 2])), generator=noise
        ... )
        >>> sorted(metrics)
        ['acceptance_rate', 'accuracy', 'class_nll', 'energy_data', 'energy_gap', 'energy_model']
    """

    takes_labels = True

    def __init__(self, generative: Objective | None = None, *, weight: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < weight < math.inf:
            raise ValueError(
                f"weight must be positive and finite, got weight={weight}; give generative=None for"
                " no generative term"
            )
        if generative is not None and not isinstance(generative, Objective):
            raise ValueError(
                f"generative must be an Objective or None, got {type(generative).__name__}"
            )
        self.measures_fit = generative is None or generative.measures_fit
        self.generative = generative
        self.weight = weight

    def forward(
        self,
        energy: Energy,
        batch: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``class_nll`` and ``accuracy`` on the batch, and those of ``generative``.
        """
        if not isinstance(energy, ClassifierEnergy):
            raise ValueError(
                f"energy must be a ClassifierEnergy for Hybrid, got {type(energy).__name__}: use"
                " ClassifierEnergy(net, event_shape, num_classes)"
            )
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(
                f"batch must be a pair of events and classes (x, y), got {type(batch).__name__}"
            )
        x, y = batch
        energy.check_states(x)
        check_labels(y, energy.batch_shape(x), energy.num_classes)
        log_prob = energy.class_log_prob(x)
        class_nll = -log_prob.gather(-1, y.unsqueeze(-1)).mean()
        metrics: Metrics = {
            "class_nll": class_nll.detach(),
            "accuracy": (log_prob.argmax(-1) == y).to(x.dtype).mean(),
        }
        if self.generative is None:
            with torch.no_grad():
                return class_nll, metrics | {"energy_data": energy(x).mean()}
        loss, generative_metrics = self.generative(energy, x, generator=generator)
        return class_nll + self.weight * loss, metrics | generative_metrics
