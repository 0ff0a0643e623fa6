"""What is added to plain gradients of machines of layers: centering, and a target for the activity
of hidden units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyroebm.core.energy import Energy
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.objectives.layered import mean_field, odd_fields, visible

__all__ = ["Centering", "Sparsity"]


class Centering(nn.Module):
    r"""The centered gradient (Montavon and Müller, 2012; Melchior, Fischer and Wiskott, 2016): that
    of the same machine with each layer's units counted from an offset :math:`m_l`, a running mean
    of the layer under the data.

    With weights and biases as they are, it is a transform of their plain gradients :math:`dW_l,
    db_l`:

    .. math::
        dW_l \leftarrow dW_l - db_l\, m_{l+1}^\top - m_l\, db_{l+1}^\top, \qquad
        db_l \leftarrow db_l - dW_{l-1}^\top m_{l-1} - dW_l\, m_{l+1}

    (the dW on the right being centered already). Learning is then indifferent to a swap of zeros
    and ones in the data.

    Args:
        rate: weight of a batch in the running means.

    Attributes:
        offsets: one buffer for each layer, ``offset_0``, ``offset_1``, ...; those of the first
            batch are its own means.

    Raises:
        ValueError: if ``rate`` is outside [0, 1].

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import ContrastiveDivergence
        >>> rbm, data, centering = BernoulliRBM(4, 3), torch.ones(5, 4), Centering()
        >>> loss, facts = ContrastiveDivergence()(rbm, data)
        >>> loss.backward()
        >>> centering(rbm, data, facts)
        >>> centering.offsets[0]
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be in [0, 1], got rate={rate}")
        self.rate, self.count = rate, 0

    @property
    def offsets(self) -> list[Tensor]:
        """The offset of each layer; none before the first batch."""
        return [self.get_buffer(f"offset_{layer}") for layer in range(self.count)]

    @torch.no_grad()
    def forward(self, energy: Energy, batch: Tensor, facts: Mapping[str, Tensor]) -> None:
        """Center the gradients of the energy's parameters, in place.

        Args:
            energy: a machine of layers whose weights and biases are parameters, with their
                gradients.
            batch: the data that the gradients are of.
            facts: of the objective; its ``mean_0``, ``mean_1``, ... save the products that yield
                them.

        Raises:
            ValueError: if the energy has no layers, or its parameters are others than their weights
                and biases.
        """
        layers = _trained_layers(energy)
        self._move(layers, batch, facts)
        offsets, biases = self.offsets, [_gradient(bias) for bias in layers.biases]
        steps = [bias.clone() for bias in biases]
        for k, weight in enumerate(layers.weights):
            below = offsets[k]
            above = offsets[k + 1]
            gradient = _gradient(weight)
            gradient.addmm_(
                torch.stack([biases[k], below], 1), torch.stack([above, biases[k + 1]]), alpha=-1.0
            )
            steps[k] -= gradient @ above
            steps[k + 1] -= below @ gradient
        for bias, step in zip(biases, steps, strict=True):
            bias.copy_(step)

    def _move(self, layers: Layers, batch: Tensor, facts: Mapping[str, Tensor]) -> None:
        if "mean_0" not in facts:
            even = mean_field(layers, visible(layers, batch, "the energy"))
            hidden = odd_fields(layers, even)
            means = [
                layers.mean(k, hidden[k]) if kept is None else kept for k, kept in enumerate(even)
            ]
            facts = {f"mean_{k}": mean.mean(0) for k, mean in enumerate(means)}
        for layer in range(len(layers.biases)):
            mean, name = facts[f"mean_{layer}"], f"offset_{layer}"
            if layer < self.count:
                self.get_buffer(name).lerp_(mean, self.rate)
            else:
                self.register_buffer(name, mean.clone())
                self.count += 1

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object
    ) -> None:
        while (name := f"{prefix}offset_{self.count}") in state_dict:
            self.register_buffer(f"offset_{self.count}", torch.empty_like(state_dict[name]))
            self.count += 1
        super()._load_from_state_dict(state_dict, prefix, *args)


class Sparsity(nn.Module):
    r"""A penalty that draws each hidden unit's mean activity to a target (Lee, Ekanadham and Ng,
    2008; Hinton, 2012).

    .. math:: c \sum_j \Big(t - \frac1n \sum_i E[h_j \mid x_i]\Big)^2

    over the units of all hidden layers; with more than one of these, the layers between are at
    their mean field.

    Args:
        target: t, in (0, 1).
        cost: c, in nats.

    Raises:
        ValueError: if ``target`` is outside (0, 1), ``cost`` is negative, or the energy is no
            machine of layers.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(4, 3, weight=torch.zeros(4, 3))
        >>> Sparsity(target=0.1, cost=1.0)(rbm, torch.ones(5, 4)).detach()  # 3 (0.5 - 0.1)^2
        tensor(0.4800)
    """

    def __init__(self, target: float, cost: float) -> None:
        super().__init__()
        if not (0.0 < target < 1.0 and cost >= 0.0):
            raise ValueError(
                f"target must be in (0, 1) and cost at least 0, got target={target}, cost={cost}"
            )
        self.target, self.cost = target, cost

    def forward(self, energy: Energy, batch: Tensor) -> Tensor:
        """The penalty, with its graph, shape ``()``."""
        if not isinstance(energy, LayeredMachine):
            raise ValueError(f"Sparsity is for machines of layers, got {type(energy).__name__}")
        layers = energy.layers()
        x = mean_field(layers, visible(layers, batch, type(energy).__name__))
        hidden: list[Tensor | None] = [None] * len(x)
        # the odd from the even, then these from them
        for side, beside in zip(reversed(layers.sides()), (x, hidden), strict=True):
            for layer in side:
                hidden[layer] = layers.mean(layer, layers.field(layer, beside)) if layer else None
        gaps = [self.target - mean.mean(0) for mean in hidden if mean is not None]
        return self.cost * torch.cat(gaps).square().sum()


def _trained_layers(energy: Energy) -> Layers:
    if not isinstance(energy, LayeredMachine):
        raise ValueError(f"centering is for machines of layers, got {type(energy).__name__}")
    layers = energy.layers()
    own = [*layers.weights, *layers.biases]
    if (
        not all(tensor.is_leaf and tensor.requires_grad for tensor in own)
        or layers.precision is not None
    ):
        raise ValueError(
            f"centering transforms gradients of weights and biases, but in {type(energy).__name__}"
            " these are frozen or functions"
            " of other parameters; a Gaussian machine is centered by centering its data (and by"
            " fit_visible)"
        )
    return layers


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("centering needs gradients: call it after backward()")
    return parameter.grad
