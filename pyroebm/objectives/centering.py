"""Centered gradients and sparsity penalties of layered Boltzmann machines."""

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
    r"""The centered gradient of a layered Boltzmann machine.

    It is the gradient of the same machine with an offset :math:`m_l` subtracted from the units of
    each layer, where :math:`m_l` is a running mean of the layer under the data (Montavon and
    Müller, 2012; Melchior, Fischer and Wiskott, 2016). In terms of the plain gradients :math:`dW_l,
    db_l` of weights and biases:

    .. math::
        dW_l \leftarrow dW_l - db_l\, m_{l+1}^\top - m_l\, db_{l+1}^\top, \qquad
        db_l \leftarrow db_l - dW_{l-1}^\top m_{l-1} - dW_l\, m_{l+1}

    where the dW on the right is already centered. Learning is then invariant under exchanging
    zeros and ones in the data.

    Args:
        rate: weight of a batch in the running means, in [0, 1].

    Attributes:
        offsets: one buffer for each layer, ``offset_0``, ``offset_1``, ...; initialized with the
            means of the first batch.

    Raises:
        ValueError: if ``rate`` is outside [0, 1].

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import ContrastiveDivergence
        >>> rbm, data, centering = BernoulliRBM(4, 3), torch.ones(5, 4), Centering()
        >>> loss, metrics = ContrastiveDivergence()(rbm, data)
        >>> loss.backward()
        >>> centering(rbm, data, metrics)
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
        """The offset of each layer; an empty list before the first batch."""
        return [self.get_buffer(f"offset_{layer}") for layer in range(self.count)]

    @torch.no_grad()
    def forward(self, energy: Energy, batch: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Center the gradients of the energy's parameters, in place.

        Args:
            energy: a layered machine whose weights and biases are parameters with gradients.
            batch: the data of these gradients, ``(n, num_visible)``.
            metrics: those of the objective. If they have ``mean_0``, ``mean_1``, ..., the means of
                the layers are not computed again.

        Raises:
            ValueError: if the energy is no layered machine, or its weights and biases are no
                parameters.
        """
        layers = _trained_layers(energy)
        self._update_offsets(layers, batch, metrics)
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

    def _update_offsets(self, layers: Layers, batch: Tensor, metrics: Mapping[str, Tensor]) -> None:
        if "mean_0" not in metrics:
            even = mean_field(layers, visible(layers, batch, "the energy"))
            hidden = odd_fields(layers, even)
            means = [
                layers.mean(k, hidden[k]) if kept is None else kept for k, kept in enumerate(even)
            ]
            metrics = {f"mean_{k}": mean.mean(0) for k, mean in enumerate(means)}
        for layer in range(len(layers.biases)):
            mean, name = metrics[f"mean_{layer}"], f"offset_{layer}"
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
    r"""Penalize the deviation of each hidden unit's mean activity from a target.

    .. math:: c \sum_j \Big(t - \frac1n \sum_i E[h_j \mid x_i]\Big)^2

    over the units of all hidden layers (Lee, Ekanadham and Ng, 2008; Hinton, 2012). With more than
    one hidden layer the expectations are those of the mean-field approximation.

    Args:
        target: t, in (0, 1).
        cost: c, in nats.

    Raises:
        ValueError: if ``target`` is outside (0, 1), ``cost`` is negative, or the energy is no
            layered machine.

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
        """Return the penalty with its graph, shape ``()``."""
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                "energy must be a layered machine, such as BernoulliRBM or DeepBoltzmannMachine,"
                f" for Sparsity, got {type(energy).__name__}"
            )
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
        raise ValueError(
            "energy must be a layered machine, such as BernoulliRBM or DeepBoltzmannMachine, for"
            f" Centering, got {type(energy).__name__}"
        )
    layers = energy.layers()
    own = [*layers.weights, *layers.biases]
    if (
        not all(tensor.is_leaf and tensor.requires_grad for tensor in own)
        or layers.precision is not None
    ):
        raise ValueError(
            "weights and biases must be trainable parameters for Centering, but in"
            f" {type(energy).__name__} they are frozen or functions of other parameters. To center"
            " a Gaussian machine, center its data, or call fit_visible(data)"
        )
    return layers


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(
            "the parameters must have gradients for Centering: call it after backward()"
        )
    return parameter.grad
