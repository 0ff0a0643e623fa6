"""Classifiers initialized from deep belief networks or deep Boltzmann machines, for fine-tuning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyroebm.core.saving import Saveable
from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.deep import DeepBoltzmannMachine

__all__ = ["Classifier"]

#: Mean-field sweeps for each batch, for a deep Boltzmann machine.
NUM_SWEEPS = 10


class Classifier(Saveable):
    r"""A feed-forward network of sigmoid layers initialized from a generative model.

    The output is a linear layer of logits. For a deep belief network the layers are its recognition
    network, :math:`h_l = \sigma(W_l^\top h_{l-1} + c_l)` (Hinton and Salakhutdinov, 2006). For a
    deep Boltzmann machine each hidden layer has the mean-field means of the layer above as an
    additional input, :math:`h_l = \sigma(W_l^\top h_{l-1} + V_l \mu_{l+1}(v) + b_l)` (Salakhutdinov
    and Hinton, 2009). :math:`V_l` is initialized with :math:`W_{l+1}`, and :math:`\mu` is that of
    the initial machine, so h is initially its mean field. Train all weights by
    :class:`pyroebm.objectives.CrossEntropy` with :func:`pyroebm.training.fit`.

    Args:
        model: the network or machine, which is copied.
        num_classes: number of classes, at least 2.
        generator: source of the initial weights of the output layer, normal with standard deviation
            0.01; None is torch's default generator.

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
        *,
        generator: torch.Generator | None = None,
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
        self.up = nn.ModuleList([_linear(w.mT, b) for w, b in zip(weights, biases, strict=True)])
        self.side = nn.ModuleList([_linear(w.mT) for w in above])
        top = weights[-1]
        self.readout = nn.Linear(top.shape[1], num_classes, dtype=top.dtype, device=top.device)
        nn.init.zeros_(self.readout.bias)
        nn.init.normal_(self.readout.weight, std=0.01, generator=generator)

    def forward(self, visible: Tensor) -> Tensor:
        """Compute the logits of the classes: ``(*batch, num_visible) -> (*batch, num_classes)``."""
        means = [] if self.machine is None else self.machine.mean_field(visible, NUM_SWEEPS)
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
        """Compute the fraction of misclassified examples.

        Raises:
            ValueError: if there is not one label for each example.
        """
        if labels.shape != visible.shape[:-1]:
            raise ValueError(
                f"labels must have shape {tuple(visible.shape[:-1])}, one for each example, got"
                f" {tuple(labels.shape)}"
            )
        return float((self(visible).argmax(-1) != labels).double().mean())


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear layer with a copy of these parameters, with ``weight`` of shape (out, in)."""
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
