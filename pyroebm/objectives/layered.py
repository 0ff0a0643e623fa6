"""Mean fields, block Gibbs sweeps and tempering of layered machines, for the objectives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from pyroebm.core.rng import uniform
from pyroebm.energies.layers import Layers

__all__ = [
    "Contrast",
    "PartialLayers",
    "TemperatureLadder",
    "contrast",
    "draw_even",
    "draw_odd",
    "mean_field",
    "odd_fields",
    "visible",
]

#: A tensor for each layer that is given, None for the others.
PartialLayers = Sequence[Tensor | None]


def visible(layers: Layers, batch: Tensor, name: str) -> Tensor:
    """Return ``batch`` if it has rows of visible units, else raise ValueError."""
    bias = layers.biases[0]
    if (
        batch.dim() != 2
        or not len(batch)
        or batch.shape[1] != len(bias)
        or batch.dtype != bias.dtype
        or batch.device != bias.device
    ):
        raise ValueError(
            f"batch must be rows of visible units of {name}, shape (n, {len(bias)}), n at least 1,"
            f" {bias.dtype}, on"
            f" {bias.device}, got shape"
            f" {tuple(batch.shape)}, {batch.dtype}, on {batch.device}"
        )
    return batch


def odd_fields(layers: Layers, x: PartialLayers) -> dict[int, Tensor]:
    """Return the fields of the odd layers given the even ones."""
    return {layer: layers.field(layer, x) for layer in layers.sides()[1]}


def draw_even(
    layers: Layers, x: PartialLayers, generator: torch.Generator | None
) -> list[Tensor | None]:
    """Draw the even layers given the odd ones; the odd ones are None in the result."""
    return layers.draw_side(layers.sides()[0], x, generator)


def draw_odd(
    layers: Layers, fields: dict[int, Tensor], generator: torch.Generator | None
) -> list[Tensor | None]:
    """Draw the odd layers given their fields; the even ones are None in the result."""
    return layers.draw_side(layers.sides()[1], (), generator, fields=fields)


def _parts(x: PartialLayers) -> list[Tensor]:
    """Return the layers that are not None."""
    return [layer for layer in x if layer is not None]


class Contrast(torch.autograd.Function):
    """A difference of mean energies with its gradient computed from sufficient statistics.

    The energy is linear in the parameters of the layers, so the gradient is that of autograd, at
    half the cost.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, signs: Tensor, num_tensors: int, *tensors: Tensor
    ) -> Tensor:
        """Return ``value`` and save the statistics.

        Args:
            ctx: context of autograd.
            value: the difference of mean energies.
            signs: weights of the rows in minus the difference, ``(rows,)``.
            num_tensors: number of layers.
            tensors: the layers (states or means), then the weights, the biases and, for Gaussian
                machines, the precision.
        """
        ctx.save_for_backward(signs, *tensors[:num_tensors])
        ctx.gaussian = len(tensors) == 3 * num_tensors
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights, biases and precision."""
        signs, *x = ctx.saved_tensors
        signs = grads[0] * signs
        # a weight matrix joins two neighboring layers, of which one carries the signs
        signed = [signs.unsqueeze(1) * layer if k % 2 else layer for k, layer in enumerate(x)]
        weights = [below.mT @ above for below, above in pairwise(signed)]
        biases = [layer.mT @ signs for layer in x]
        precision = [-0.5 * (x[0] ** 2).mT @ signs] if ctx.gaussian else []
        return None, None, None, *[None] * len(x), *weights, *biases, *precision


def contrast(
    layers: Layers, even: PartialLayers, fields: dict[int, Tensor], num_data: int
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Return the mean free energy of the data minus that of the chains, and metrics.

    .. math:: L = \frac1n \sum_{i \le n} F_i - \frac1m \sum_{i > n} F_i

    Args:
        layers: the model, in whose tensors the gradient is.
        even: states or means of the even layers, ``(n + m, units)``; None for the odd ones, which
            are summed out.
        fields: fields of the odd layers.
        num_data: n, number of rows of data.
    """
    with torch.no_grad():
        x = [layers.mean(k, fields[k]) if kept is None else kept for k, kept in enumerate(even)]
        free = layers.free_energy(even, fields)
        data, model = free[:num_data].mean(), free[num_data:].mean()
        signs = torch.cat(
            [
                free.new_full((num_data,), -1.0 / num_data),
                free.new_full((len(free) - num_data,), 1.0 / (len(free) - num_data)),
            ]
        )
        metrics = {"energy_data": data, "energy_model": model, "energy_gap": data - model}
        metrics |= {f"mean_{k}": layer[:num_data].mean(0) for k, layer in enumerate(x)}
    own = [
        *layers.weights,
        *layers.biases,
        *([] if layers.precision is None else [layers.precision]),
    ]
    return cast(Tensor, Contrast.apply(metrics["energy_gap"], signs, len(x), *x, *own)), metrics


def _rows_of(x: PartialLayers, rows: Tensor) -> list[Tensor | None]:
    """Select rows of each layer."""
    return [None if layer is None else layer[rows] for layer in x]


@torch.no_grad()
def mean_field(
    layers: Layers, seen: Tensor | None, start: PartialLayers | None = None
) -> list[Tensor | None]:
    r"""Compute means of the even layers by :meth:`pyroebm.energies.Layers.mean_field`.

    Args:
        layers: the model.
        seen: visible units that are held fixed ``(n, n_0)``; with one hidden layer the result is
            then exact. None holds no units fixed.
        start: initial means of the even layers if ``seen`` is None.

    Returns:
        The means of the even layers (``seen`` itself for the visible ones), None for the odd ones.
    """
    odd = layers.sides()[1]
    if seen is not None and len(layers.biases) == 2:
        return [seen, None]
    if seen is not None:
        means = layers.mean_field(layers.pass_up(seen))
    else:
        given = start or []
        whole = [
            layers.mean(k, layers.field(k, given)) if layer is None else layer
            for k, layer in enumerate(given)
        ]
        means = layers.mean_field(whole, held=False)
    return [None if layer in odd else kept for layer, kept in enumerate(means)]


class TemperatureLadder:
    r"""Parallel tempering of a layered machine at :math:`1 = \beta_1 > \ldots > \beta_R`.

    Chains are ordered by rung: the first n are at inverse temperature 1.

    Args:
        betas: inverse temperatures :math:`\beta_1, \ldots, \beta_R`, R at least 2.
        num_chains: n, chains at each temperature.

    Raises:
        ValueError: unless ``betas`` decrease from 1 to a positive number.
    """

    def __init__(self, betas: Sequence[float], num_chains: int) -> None:
        self.num_chains, self.betas = num_chains, tuple(float(beta) for beta in betas)
        if (
            len(self.betas) < 2
            or self.betas[0] != 1.0
            or not all(a > b > 0.0 for a, b in pairwise(self.betas))
        ):
            raise ValueError(
                "betas must decrease from 1 to a positive number, such as (1.0, 0.75, 0.5), got"
                f" betas={tuple(betas)}"
            )

    def column(self, like: Tensor) -> Tensor:
        """Return the inverse temperature of each chain, shape ``(R n, 1)``."""
        betas = torch.tensor(self.betas, dtype=like.dtype, device=like.device)
        return betas.repeat_interleave(self.num_chains).unsqueeze(1)

    def sweep(
        self, layers: Layers, odd: PartialLayers, generator: torch.Generator | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """Make a Gibbs sweep at each temperature and one round of swaps.

        Returns:
            All layers, and the mean acceptance rate of the swaps.
        """
        beta = self.column(layers.biases[0])
        even_side, odd_side = layers.sides()
        even = layers.draw_side(even_side, odd, generator, beta=beta)
        odd = layers.draw_side(odd_side, even, generator, beta=beta)
        x = [a if b is None else b for a, b in zip(even, odd, strict=True)]
        order, rate = self.swaps(layers.energy(_parts(x)), generator)
        return _rows_of(x, order), rate

    def swaps(self, energies: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        r"""Propose swaps of neighboring rungs, first of the even pairs, then of the odd ones.

        Swaps are accepted with probability :math:`\min(1, e^{(\beta_k - \beta_l)(E_k - E_l)})`.

        Returns:
            The index of the chain whose state each chain receives, ``(R n,)``, and the mean
            acceptance rate.
        """
        energy = energies.reshape(len(self.betas), self.num_chains)
        order, rates = torch.arange(len(energies), device=energies.device).reshape(energy.shape), []
        for first in (0, 1):
            for k in range(first, len(self.betas) - 1, 2):
                log_ratio = (self.betas[k] - self.betas[k + 1]) * (energy[k] - energy[k + 1])
                rates.append(log_ratio.exp().clamp(max=1.0))
                swap = (
                    uniform((self.num_chains,), generator, energy.dtype, energy.device) < rates[-1]
                )
                energy, order = _exchanged(energy, k, swap), _exchanged(order, k, swap)
        return order.flatten(), torch.stack(rates).mean()


def _exchanged(x: Tensor, k: int, swap: Tensor) -> Tensor:
    new = x.clone()
    new[k], new[k + 1] = torch.where(swap, x[k + 1], x[k]), torch.where(swap, x[k], x[k + 1])
    return new
