"""Classifiers as energies: their logits define a density of events (JEM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.energies.neural import NeuralEnergy

__all__ = ["ClassifierEnergy", "GivenClass", "check_labels"]


class ClassifierEnergy(NeuralEnergy):
    r"""The energy defined by the logits of a classifier, with an envelope (Grathwohl et al., 2020).

    .. math::

        E(x, y) = -f_y(x) + \sum_i \frac{(x_i - m_i)^2}{2 s_i^2}, \qquad
        E(x) = -\log \sum_y e^{-E(x, y)}

    ``energy(x)`` is the marginal energy, :meth:`joint_energy` that of an event with its class, and
    :meth:`given` the energy of events of one class. The class probabilities :math:`p(y \mid x) =
    e^{f_y(x)} / \sum_k e^{f_k(x)}` are those of the classifier, for any envelope. A constant added
    to all logits of an event changes its energy but no class probability.

    With linear logits the density is a mixture of K normal distributions of one covariance, and
    :math:`p(y \mid x)` is linear discriminant analysis.

    Args:
        net: f, a module ``(n, *event) -> (n, K)``.
        event_shape: shape of one event.
        num_classes: K.
        support: constraint of one event.
        scale: s, in the unit of x: a number, a tensor of ``event_shape``, or None for no envelope.
        center: m, in the unit of x: a number, or a tensor of ``event_shape``.

    Raises:
        ValueError: if ``num_classes`` < 1; when called, if the logits have another shape; as
            :class:`~pyroebm.energies.NeuralEnergy`.

    Warns:
        UserWarning: as :class:`~pyroebm.energies.NeuralEnergy`.

    Example:
        >>> energy = ClassifierEnergy(nn.Linear(2, 3), (2,), 3, scale=1.0)
        >>> x = torch.zeros(5, 2)
        >>> energy(x).shape, energy.class_log_prob(x).shape, energy.given(2)(x).shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        num_classes: int,
        *,
        support: Constraint = constraints.real,
        scale: float | Tensor | None = None,
        center: float | Tensor = 0.0,
    ) -> None:
        check_counts({"num_classes": 1}, num_classes)
        super().__init__(net, event_shape, support=support, scale=scale, center=center)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.envelope(x) - torch.logsumexp(self.logits(x), -1)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits :math:`f(x)`: ``(*batch, *event) -> (*batch, K)``."""
        batch = self.batch_shape(x)
        values: Tensor = self.net(x.reshape(-1, *self.event_shape))
        if values.shape != (batch.numel(), self.num_classes):
            raise ValueError(
                "net must map (n, *event_shape) to (n, num_classes), got shape"
                f" {tuple(values.shape)} for n = {batch.numel()},"
                f" num_classes = {self.num_classes}"
            )
        return values.reshape(*batch, self.num_classes)

    def class_log_prob(self, x: Tensor) -> Tensor:
        r"""Return :math:`\log p(y \mid x)` of every class: ``(*batch, *event) -> (*batch, K)``."""
        return torch.log_softmax(self.logits(x), -1)

    def joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the energy :math:`E(x, y)` of events with their classes, shape ``(*batch)``.

        Args:
            x: events, shape ``(*batch, *event)``.
            y: classes, int64, shape ``(*batch)``.

        Raises:
            ValueError: if ``y`` has another shape or dtype, or holds numbers that are not classes.
        """
        check_labels(y, self.batch_shape(x), self.num_classes)
        return self.unchecked_joint_energy(x, y)

    def unchecked_joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute :meth:`joint_energy` without checks, for inner loops."""
        return self.envelope(x) - self.logits(x).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def given(self, y: int | Tensor) -> GivenClass:
        r"""Return the energy of events of class y, whose density is :math:`p(x \mid y)`.

        Args:
            y: a class, or one for each event; see :class:`GivenClass`.
        """
        return GivenClass(self, y)


class GivenClass(Energy):
    r"""Energy of events of one class, :math:`p(x \mid y) \propto e^{-E(x, y)}`.

    It shares the parameters of the classifier.

    Args:
        classifier: a :class:`ClassifierEnergy`.
        y: a class, or one for each chain, int64 ``(chains,)``; ``x`` then has shape ``(chains, ...,
            *event)``, and ``num_chains`` of :meth:`initial` is the number of classes.

    Raises:
        ValueError: if a number is not a class; when called, if the numbers of chains and classes
            differ.

    Example:
        >>> energy = ClassifierEnergy(nn.Linear(2, 3), (2,), 3, scale=1.0)
        >>> both = GivenClass(energy, torch.tensor([0, 2]))(torch.ones(2, 2))
        >>> torch.equal(both[1:], energy.given(2)(torch.ones(1, 2)))
        True
    """

    y: Tensor

    def __init__(self, classifier: ClassifierEnergy, y: int | Tensor) -> None:
        super().__init__(classifier.event_shape, classifier.support)
        classes = torch.as_tensor(y, device=classifier.device)
        if classes.dim() > 1:
            raise ValueError(
                f"y must be one class or one for each chain, got shape {tuple(classes.shape)}"
            )
        check_labels(classes, classes.shape, classifier.num_classes)
        self.classifier = classifier
        self.register_buffer("y", classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        batch = self.batch_shape(x)
        if self.y.dim() and batch[:1] != self.y.shape:
            raise ValueError(
                f"x must have one chain for each of {len(self.y)} classes, got batch shape"
                f" {tuple(batch)}"
            )
        classes = self.y.reshape(-1, *[1] * (len(batch) - 1)) if self.y.dim() else self.y
        return self.classifier.unchecked_joint_energy(x, classes.expand(batch))

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.classifier.initial(num_chains, generator)


def check_labels(y: Tensor, batch: Sequence[int], num_classes: int) -> None:
    """Check that ``y`` holds int64 classes of the shape ``batch``.

    Raises:
        ValueError: otherwise.
    """
    if y.dtype != torch.int64 or tuple(y.shape) != tuple(batch):
        raise ValueError(
            f"y must be int64 classes of shape {tuple(batch)}, got {y.dtype} of shape"
            f" {tuple(y.shape)}"
        )
    if y.numel() and not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"y must lie in [0, {num_classes}), got {int(y.min())} to {int(y.max())}")
