"""Classifiers that start from a deep belief network or a deep Boltzmann machine, for fine-tuning by
backpropagation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyroebm.core.progress import Progress
from pyroebm.core.saving import Saveable
from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.training.loop import Batches

__all__ = ["Classifier", "fine_tune"]


class Classifier(Saveable):
    r"""A feed-forward network of sigmoid layers that starts as a generative model, with a linear
    layer of logits on top.

    Of a deep belief network (Hinton and Salakhutdinov, 2006): :math:`h_l = \sigma(W_l^\top h_{l-1}
    + c_l)`, its recognition pass. Of a deep Boltzmann machine (Salakhutdinov and Hinton, 2009) each
    hidden layer also takes the mean-field means of the layer above, :math:`h_l = \sigma(W_l^\top
    h_{l-1} + V_l \mu_{l+1}(v) + b_l)`, where :math:`V_l` starts at :math:`W_{l+1}` and :math:`\mu`
    stays that of the machine as it was: at the start h are its own means. All weights are trained.

    Args:
        model: the network or machine to start from; it is copied.
        num_classes: number of classes, at least 2.
        mean_field_steps: sweeps of mean field for each batch, of a deep Boltzmann machine.

    Raises:
        ValueError: if ``model`` is neither, or ``num_classes`` < 2.

    Example:
        >>> classifier = Classifier(DeepBeliefNetwork([4, 3, 2]), num_classes=10)
        >>> classifier(torch.ones(5, 4)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        model: DeepBeliefNetwork | DeepBoltzmannMachine,
        num_classes: int,
        mean_field_steps: int = 10,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got num_classes={num_classes}")
        if not isinstance(model, DeepBeliefNetwork | DeepBoltzmannMachine):
            raise ValueError(
                "model must be a DeepBeliefNetwork or a DeepBoltzmannMachine, got"
                f" {type(model).__name__}"
            )
        if isinstance(model, DeepBeliefNetwork):
            rbms = [model.rbm(k) for k in range(len(model.rbms))]
            weights, biases = (
                [rbm.weight.detach() for rbm in rbms],
                [rbm.hidden_bias.detach() for rbm in rbms],
            )
            above, self.machine = list[Tensor](), None
        else:
            layers = model.layers()
            weights, biases = list(layers.weights), list(layers.biases[1:])
            above, self.machine = (
                [weight.mT for weight in weights[1:]],
                copy.deepcopy(model).requires_grad_(False),
            )
        self.mean_field_steps = mean_field_steps
        self.up = nn.ModuleList([_linear(w.mT, b) for w, b in zip(weights, biases, strict=True)])
        self.side = nn.ModuleList([_linear(w.mT) for w in above])
        top = weights[-1]
        self.readout = nn.Linear(top.shape[1], num_classes, dtype=top.dtype, device=top.device)
        nn.init.zeros_(self.readout.bias)
        nn.init.normal_(self.readout.weight, std=0.01)

    def forward(self, visible: Tensor) -> Tensor:
        """Logits of the classes: ``(*batch, num_visible)`` to ``(*batch, num_classes)``."""
        means = (
            [] if self.machine is None else self.machine.mean_field(visible, self.mean_field_steps)
        )
        hidden = visible
        for layer, up in enumerate(self.up):
            field = up(hidden)
            if layer < len(self.side):
                field = field + self.side[layer](means[layer + 1])
            hidden = torch.sigmoid(field)
        logits: Tensor = self.readout(hidden)
        return logits

    @torch.no_grad()
    def error(self, visible: Tensor, labels: Tensor) -> float:
        """The share of examples that are given another class than their label; ValueError unless
        each has one label."""
        if labels.shape != visible.shape[:-1]:
            raise ValueError(
                f"labels must have shape {tuple(visible.shape[:-1])}, one for each example, got"
                f" {tuple(labels.shape)}"
            )
        return float((self(visible).argmax(-1) != labels).double().mean())


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with a copy of these parameters; ``weight`` is ``(out, in)`` as torch has
    it."""
    layer = nn.Linear(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        dtype=weight.dtype,
        device=weight.device,
    )
    layer.weight.data.copy_(weight.detach())
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer


def fine_tune(
    classifier: nn.Module,
    visible: Tensor,
    labels: Tensor,
    epochs: int,
    *,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[tuple[int, float]]:
    """Backpropagation of the cross-entropy by Adam, in place, an epoch for each turn of your loop.

    Args:
        classifier: from ``(n, num_visible)`` to logits.
        visible: examples, shape ``(N, num_visible)``.
        labels: int64, shape ``(N,)``.
        epochs: passes over the examples, at least 1.
        batch_size: examples of a batch.
        learning_rate: of Adam.
        seed: of the batches.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Yields:
        number of epochs done, and their last one's mean cross-entropy in nats.

    Raises:
        FloatingPointError: at a loss that is not finite.

    Example:
        >>> classifier = Classifier(DeepBeliefNetwork([2, 3]), num_classes=2)
        >>> x = torch.eye(2).repeat(50, 1)
        >>> for epoch, loss in fine_tune(
        ...     classifier, x, x[:, 0].long(), epochs=200, learning_rate=0.05
        ... ):
        ...     pass
        >>> classifier.error(x, x[:, 0].long())
        0.0
    """
    batches = Batches((visible, labels), batch_size, seed)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
    with Progress(epochs * len(batches), "fine_tune", show=progress) as shown:
        for epoch in range(epochs):
            total = 0.0
            for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
                x, y = batches(step)
                loss = nn.functional.cross_entropy(classifier(x), y)
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(
                        f"fine_tune: the loss is {float(loss.detach())} at step {step}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
                shown.update()
            shown.note(loss=total / len(batches))
            yield epoch + 1, total / len(batches)
