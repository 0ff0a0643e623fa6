"""Supervised training of classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyroebm.energies.classifier import check_labels
from pyroebm.objectives.base import Objective

__all__ = ["CrossEntropy"]


class CrossEntropy(Objective):
    r"""Mean cross-entropy of a classifier, in nats.

    .. math:: L = -\frac1n \sum_i \log p(y_i \mid x_i), \qquad p(y \mid x) = \text{softmax}(f(x))_y

    The batch is a pair of inputs ``(n, ...)`` and int64 labels ``(n,)``, and the module maps inputs
    to logits ``(n, num_classes)``.

    Raises:
        ValueError: if the batch is no such pair, or a label is outside 0 to ``num_classes - 1``.

    Example:
        >>> x, y = torch.eye(2).repeat(50, 1), torch.tensor([0, 1]).repeat(50)
        >>> from pyroebm.training import fit
        >>> history = fit(nn.Linear(2, 2), CrossEntropy(), (x, y), num_epochs=100, lr=0.1)
        >>> float(history["error"][-1])
        0.0
    """

    takes_labels = True

    def forward(
        self,
        classifier: nn.Module,
        batch: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the metric ``error``: the fraction of misclassified inputs."""
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(
                "CrossEntropy needs pairs of inputs and labels, data=(x, labels), got"
                f" {type(batch).__name__}"
            )
        x, labels = batch
        logits = classifier(x)
        check_labels(labels, logits.shape[:-1], logits.shape[-1])
        loss = nn.functional.cross_entropy(logits, labels)
        return loss, {"error": (logits.argmax(-1) != labels).to(loss.dtype).mean()}
