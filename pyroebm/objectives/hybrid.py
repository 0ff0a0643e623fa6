"""One network that classifies and generates: the log-probability of the class, and any objective of
the events."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.energies.classifier import ClassifierEnergy, check_labels
from pyroebm.objectives.base import HasLosses, Objective
from pyroebm.objectives.persistent import ReplayBufferCD

__all__ = ["Hybrid", "Mode"]

Facts = dict[str, Tensor]
Mode = Literal["joint", "marginal", "conditional"]


class Hybrid(Objective):
    r"""A :class:`~pyroebm.energies.ClassifierEnergy` trained on events with classes, as in JEM
    (Grathwohl et al., 2020).

    .. math:: L = -\frac{a}{n} \sum_i \log p(y_i \mid x_i) + w\, G

    G is the loss of any objective of events alone, which stands for minus their mean log-likelihood
    (contrastive ones have its gradient, score matching its optimum). What is learned, by ``mode``:

    ============= ============================= ================
    ============================================== mode          G is of                       a
    for w = 1 ============= ============================= ================
    ============================================== "joint"       :math:`p(x)`                  1
    :math:`p(x, y) = p(x)\, p(y \mid x)`, JEM "marginal"    :math:`p(x)`                  0
    :math:`p(x)`; classes are not looked at "conditional" :math:`p(x \mid y)`           1
    :math:`p(x \mid y)\, p(y \mid x)` ============= ============================= ================
    ==============================================

    Without ``generative`` it is a plain classifier, :math:`p(y \mid x)` alone. With weight w
    between 0 and 1 the density counts for less than the classes. Draws of a class are those of
    ``energy.given(y)``, whatever the mode.

    Args:
        generative: an objective called with x alone, such as :class:`ContrastiveDivergence` or
            :class:`ReplayBufferCD`; its chains and parameters are kept here. None has no G.
        mode: "joint", "marginal" or "conditional".
        weight: w > 0, no unit.

    Raises:
        ValueError: if ``mode`` is none of these, ``weight`` not positive and finite, ``generative``
            no objective or missing where there is nothing else; "conditional" with
            :class:`ReplayBufferCD`, whose chains go on from batch to batch while the classes of its
            rows change, or with an objective of several players, whose law knows no class; the
            energy is no classifier; or the batch is no pair of events and classes.

    Example:
        >>> from pyroebm.energies import ClassifierEnergy
        >>> from pyroebm.objectives import ContrastiveDivergence
        >>> energy = ClassifierEnergy(torch.nn.Linear(2, 3), (2,), 3, scale=1.0)
        >>> objective, noise = Hybrid(ContrastiveDivergence(k=5)), torch.Generator().manual_seed(0)
        >>> loss, facts = objective(
        ...     energy, (torch.ones(4, 2), torch.tensor([0, 1, 2, 2])), generator=noise
        ... )
        >>> sorted(facts)
        ['acceptance_rate', 'accuracy', 'class_nll', 'energy_data', 'energy_gap', 'energy_model']
    """

    def __init__(
        self, generative: Objective | None = None, *, mode: Mode = "joint", weight: float = 1.0
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {list(get_args(Mode))}, got mode={mode!r}")
        if not 0.0 < weight < math.inf:
            raise ValueError(
                f"weight must be positive and finite, got weight={weight}; no generative term is"
                " generative=None"
            )
        if generative is not None and not isinstance(generative, Objective):
            raise ValueError(
                f"generative must be an Objective or None, got {type(generative).__name__}"
            )
        if generative is None and mode == "marginal":
            raise ValueError(
                "mode='marginal' learns from the generative term alone: give generative"
            )
        if mode == "conditional" and isinstance(generative, ReplayBufferCD):
            raise ValueError(
                "mode='conditional' cannot take ReplayBufferCD: its chains go on from batch to"
                " batch, and the classes change. Start"
                " from the data (ContrastiveDivergence), or take mode='joint' and draw from"
                " energy.given(y)"
            )
        if mode == "conditional" and isinstance(generative, HasLosses):
            raise ValueError(
                f"mode='conditional' cannot take {type(generative).__name__}: one law for all"
                " classes stands for none of them."
                " Take mode='joint'"
            )
        self.generative = generative
        self.mode = mode
        self.weight = weight

    def forward(
        self,
        energy: Energy,
        batch: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``class_nll`` and ``accuracy`` on the batch, and those of
        ``generative``."""
        if not isinstance(energy, ClassifierEnergy):
            raise ValueError(f"Hybrid trains a ClassifierEnergy, got {type(energy).__name__}")
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(
                f"batch must be a pair of events and classes (x, y), got {type(batch).__name__}"
            )
        x, y = batch
        energy.check_states(x)
        check_labels(y, energy.batch_shape(x), energy.num_classes)
        log_prob = energy.class_log_prob(x)
        class_nll = -log_prob.gather(-1, y.unsqueeze(-1)).mean()
        facts: Facts = {
            "class_nll": class_nll.detach(),
            "accuracy": (log_prob.argmax(-1) == y).to(x.dtype).mean(),
        }
        if self.generative is None:
            with torch.no_grad():
                return class_nll, facts | {"energy_data": energy(x).mean()}
        target = energy.given(y) if self.mode == "conditional" else energy
        loss, seen = self.generative(target, x, generator=generator)
        loss = self.weight * loss if self.mode == "marginal" else class_nll + self.weight * loss
        return loss, facts | seen
