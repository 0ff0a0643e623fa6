"""A classifier is an energy: its logits say how likely the image is, and not only which class it
has.
"""

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
    r"""The energy of events in the logits :math:`f_1, \ldots, f_K` of a classifier (Grathwohl et
    al., 2020), in an envelope.

    .. math::

        E(x, y) = -f_y(x) + \sum_i \frac{(x_i - m_i)^2}{2 s_i^2}, \qquad
        E(x) = -\log \sum_y e^{-E(x, y)}

    ``energy(x)`` is the marginal energy, :meth:`joint_energy` that of an event with its class,
    :meth:`given` the energy of events of one class; :math:`p(y \mid x) = e^{f_y(x)} / \sum_k
    e^{f_k(x)}` is the classifier's own, whatever the envelope. A constant added to all logits of an
    event changes its energy, and no class probability: this is what the classifier left undecided.

    With linear logits it is a mixture of K normal laws of one covariance, and :math:`p(y \mid x)`
    linear discriminant analysis.

    Args:
        net: f, a module ``(n, *event) -> (n, K)``.
        event_shape: shape of one event.
        num_classes: K.
        support, scale, center: as in :class:`~pyroebm.energies.NeuralEnergy`, with its warnings.

    Raises:
        ValueError: if ``num_classes`` < 1, the logits have another shape, or as
            :class:`~pyroebm.energies.NeuralEnergy`.

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
        """:math:`f(x)`, ``(*batch, *event) -> (*batch, K)``."""
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
        r""":math:`\log p(y \mid x)` of every class, ``(*batch, *event) -> (*batch, K)``."""
        return torch.log_softmax(self.logits(x), -1)

    def joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """:math:`E(x, y)` of events and their classes: ``(*batch, *event)`` and int64 ``(*batch)``
        to ``(*batch)``.

        Raises:
            ValueError: unless each y is a class, one for each event.
        """
        check_labels(y, self.batch_shape(x), self.num_classes)
        return self.unchecked_joint_energy(x, y)

    def unchecked_joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`joint_energy` for inner loops, whose classes passed the front door once."""
        return self.envelope(x) - self.logits(x).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def given(self, y: int | Tensor) -> GivenClass:
        """The energy of events of class y, :math:`p(x \\mid y)`: sample it for draws of a class.
        See :class:`GivenClass`.
        """
        return GivenClass(self, y)


class GivenClass(Energy):
    r"""The law of events of one class, :math:`p(x \mid y) \propto e^{-E(x, y)}`; it shares the
    classifier's parameters.

    Args:
        classifier: a :class:`ClassifierEnergy`.
        y: a class, or one for each row, int64 ``(rows,)``; ``x`` then has rows first, ``(rows, ...,
            *event)``, and ``initial(n)`` that many.

    Raises:
        ValueError: if a class is none of the classifier's, or rows and classes differ in number.

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
                f"y must be one class or one for each row, got shape {tuple(classes.shape)}"
            )
        check_labels(classes, classes.shape, classifier.num_classes)
        self.classifier = classifier
        self.register_buffer("y", classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        batch = self.batch_shape(x)
        if self.y.dim() and batch[:1] != self.y.shape:
            raise ValueError(
                f"x must have one row for each of {len(self.y)} classes, got batch shape"
                f" {tuple(batch)}"
            )
        classes = self.y.reshape(-1, *[1] * (len(batch) - 1)) if self.y.dim() else self.y
        return self.classifier.unchecked_joint_energy(x, classes.expand(batch))

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.classifier.initial(num_chains, generator)


def check_labels(y: Tensor, batch: Sequence[int], num_classes: int) -> None:
    """ValueError unless ``y`` holds whole numbers of the shape ``batch`` in [0, num_classes)."""
    if y.dtype != torch.int64 or tuple(y.shape) != tuple(batch):
        raise ValueError(
            f"y must be int64 classes of shape {tuple(batch)}, got {y.dtype} of shape"
            f" {tuple(y.shape)}"
        )
    if y.numel() and not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"y must lie in [0, {num_classes}), got {int(y.min())} to {int(y.max())}")
