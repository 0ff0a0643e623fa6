"""What the objectives do with layers: mean fields of the hidden ones, Gibbs sweeps between the even
and the odd, at one temperature or at several."""

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
    "Kept",
    "Ladder",
    "contrast",
    "draw_even",
    "draw_odd",
    "mean_field",
    "odd_fields",
    "visible",
]

#: A tensor for each layer that is there, None for the others.
Kept = Sequence[Tensor | None]


def visible(layers: Layers, batch: Tensor, name: str) -> Tensor:
    """``batch``, if it has rows of visible units; else ValueError."""
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


def odd_fields(layers: Layers, x: Kept) -> dict[int, Tensor]:
    """What each odd layer feels from the even ones."""
    return {layer: layers.field(layer, x) for layer in layers.sides()[1]}


def draw_even(layers: Layers, x: Kept, generator: torch.Generator | None) -> list[Tensor | None]:
    """The even layers drawn given the odd ones; None in place of the latter."""
    return layers.draw_side(layers.sides()[0], x, generator)


def draw_odd(
    layers: Layers, fields: dict[int, Tensor], generator: torch.Generator | None
) -> list[Tensor | None]:
    """The odd layers drawn from their fields; None in place of the even ones."""
    return layers.draw_side(layers.sides()[1], (), generator, fields=fields)


def _parts(x: Kept) -> list[Tensor]:
    """The layers that are there."""
    return [layer for layer in x if layer is not None]


class Contrast(torch.autograd.Function):
    """A difference of mean energies, with its gradient in the layers' parameters straight from the
    rows' statistics.

    The energy is linear in these, so autograd through the energy would find the same, in twice the
    passes over the units.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, signs: Tensor, num_tensors: int, *tensors: Tensor
    ) -> Tensor:
        """``signs`` ``(rows,)`` weigh rows in minus the difference; ``tensors`` are ``num_tensors``
        layers (rows, or means of rows), then weights, biases, and the precision where there is
        one."""
        ctx.save_for_backward(signs, *tensors[:num_tensors])
        ctx.gaussian = len(tensors) == 3 * num_tensors
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signs, *x = ctx.saved_tensors
        signs = grads[0] * signs
        # of two neighbours, one
        signed = [signs.unsqueeze(1) * layer if k % 2 else layer for k, layer in enumerate(x)]
        weights = [below.mT @ above for below, above in pairwise(signed)]
        biases = [layer.mT @ signs for layer in x]
        precision = [-0.5 * (x[0] ** 2).mT @ signs] if ctx.gaussian else []
        return None, None, None, *[None] * len(x), *weights, *biases, *precision


def contrast(
    layers: Layers, even: Kept, fields: dict[int, Tensor], num_data: int
) -> tuple[Tensor, dict[str, Tensor]]:
    r""":math:`\frac1n \sum F - \frac1m \sum F` of the first n rows and of the m others, and facts.

    Args:
        layers: the model; the gradient is in its tensors.
        even: rows of the even layers, or of their means; None for the odd ones, which are summed
            out.
        fields: of the odd layers.
        num_data: rows of data.
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
        facts = {"energy_data": data, "energy_model": model, "energy_gap": data - model}
        facts |= {f"mean_{k}": layer[:num_data].mean(0) for k, layer in enumerate(x)}
    own = [
        *layers.weights,
        *layers.biases,
        *([] if layers.precision is None else [layers.precision]),
    ]
    return cast(Tensor, Contrast.apply(facts["energy_gap"], signs, len(x), *x, *own)), facts


def _rows_of(x: Kept, rows: Tensor) -> list[Tensor | None]:
    """Some rows of each layer."""
    return [None if layer is None else layer[rows] for layer in x]


@torch.no_grad()
def mean_field(
    layers: Layers, seen: Tensor | None, start: Kept | None = None
) -> list[Tensor | None]:
    r"""Even layers of the factorised law that is nearest to the model
    (:meth:`pyroebm.energies.Layers.mean_field`).

    Args:
        layers: the model.
        seen: visible units to be held fixed ``(n, n_0)``; with one hidden layer the answer is then
            exact. None holds none.
        start: even layers to begin at where none are held.

    Returns:
        means of the even layers (``seen`` first where it is given), None for the odd ones.
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


class Ladder:
    r"""Replicas of a layered machine at inverse temperatures :math:`1 = \beta_1 > \ldots >
    \beta_R`, the first n rows at 1.

    Args:
        betas: the temperatures.
        num_chains: n, replicas of each.

    Raises:
        ValueError: unless they fall from 1 to a positive number.
    """

    def __init__(self, betas: Sequence[float], num_chains: int) -> None:
        self.num_chains, self.betas = num_chains, tuple(float(beta) for beta in betas)
        if (
            len(self.betas) < 2
            or self.betas[0] != 1.0
            or not all(a > b > 0.0 for a, b in pairwise(self.betas))
        ):
            raise ValueError(
                "betas must fall from 1 to a positive number, such as (1.0, 0.75, 0.5), got"
                f" betas={tuple(betas)}"
            )

    def column(self, like: Tensor) -> Tensor:
        """The temperature of each row, shape ``(R n, 1)``."""
        betas = torch.tensor(self.betas, dtype=like.dtype, device=like.device)
        return betas.repeat_interleave(self.num_chains).unsqueeze(1)

    def sweep(
        self, layers: Layers, odd: Kept, generator: torch.Generator | None
    ) -> tuple[list[Tensor | None], Tensor]:
        """All layers after a Gibbs sweep at each temperature and one round of swaps; and the mean
        rate at which they swapped."""
        beta = self.column(layers.biases[0])
        even_side, odd_side = layers.sides()
        even = layers.draw_side(even_side, odd, generator, beta=beta)
        odd = layers.draw_side(odd_side, even, generator, beta=beta)
        x = [a if b is None else b for a, b in zip(even, odd, strict=True)]
        order, rate = self.swaps(layers.energy(_parts(x)), generator)
        return _rows_of(x, order), rate

    def swaps(self, energies: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        r"""Which row each row's state comes from, and the mean acceptance rate of the swaps of
        neighbours, :math:`\min(1, e^{(\beta_k - \beta_l)(E_k - E_l)})`; even pairs, then odd
        ones."""
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
