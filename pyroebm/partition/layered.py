"""Annealing path from independent units to a machine with layers, with one side summed out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroebm.core.annealing_path import GeometricPath
from pyroebm.core.energy import Energy
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.kernels.base import Info, PointState
from pyroebm.kernels.gibbs import point_state, swept
from pyroebm.kernels.sites import DiscreteKernel
from pyroebm.partition.bases import (
    IndependentLayers,
    check_base,
    draw_independent,
    log_z_of_independent,
)

__all__ = ["LayerGibbs", "LayeredPath", "LayeredState"]


class LayeredState(NamedTuple):
    """States of the kept layers of each chain, and the fields of the other layers in the target."""

    x: list[Tensor | None]  #: ``(chains, n_l)`` for each kept layer, None for the others
    fields: dict[int, Tensor]  #: ``(chains, n_l)`` for each of the others


class LayeredPath:
    r"""Path :math:`E_\beta = (1 - \beta) E_0 + \beta E` from independent units to layers.

    The state of a chain is y, the side with fewer units. The other side, z, is summed out of the
    weights,

    .. math::

        \log w_\beta^{\beta'}(y) = \log f_{\beta'}(y) - \log f_\beta(y), \qquad
        f_\beta(y) = \sum_z e^{-E_\beta(y, z)}
    and a move draws z given y, then y given z (Salakhutdinov and Murray, 2008; for three layers
    Salakhutdinov and Hinton, "Deep Boltzmann machines", 2009). Fields are linear in :math:`\beta`
    and those of the base are constant, so a temperature of an RBM costs two matrix products: the
    field of z is used in the weight and in the move.

    Args:
        base: :math:`E_0`, with weights of zero.
        target: :math:`E`.

    Raises:
        ValueError: if the base does not fit.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import base_rates
        >>> rbm = BernoulliRBM(3, 2)
        >>> path = LayeredPath(base_rates(rbm), rbm.layers())
        >>> state = path.move(path.draw_base(5), 0.5)
        >>> path.kept, path.log_weight(state, 0.5, 0.6).shape
        ([1], torch.Size([5]))
    """

    def __init__(self, base: Layers, target: Layers) -> None:
        check_base(base, target)
        self.base, self.target = _detached(base), _detached(target)
        self.kept, self.summed = sorted(
            target.sides(), key=lambda side: sum(target.sizes[layer] for layer in side)
        )
        self.log_z = log_z_of_independent(self.base)
        self.offset = float(self.target.offset) - float(self.base.offset)
        ends = self.target.precision, self.base.precision
        self.curvature = None if ends[0] is None or ends[1] is None else ends[0] - ends[1]

    def enter(self, x: Sequence[Tensor | None]) -> LayeredState:
        """Return the states of the kept layers of ``x``; its other entries may be None."""
        kept = [part if layer in self.kept else None for layer, part in enumerate(x)]
        return LayeredState(kept, {layer: self.target.field(layer, kept) for layer in self.summed})

    def draw_base(self, num_samples: int, generator: torch.Generator | None = None) -> LayeredState:
        r"""Draw exactly from the base, at :math:`\beta = 0`."""
        return self.enter(draw_independent(self.base, self.kept, num_samples, generator))

    def log_weight(self, state: LayeredState, beta: float, then: float) -> Tensor:
        r"""Compute :math:`\log w_\beta^{\beta'}` in float64, shape ``(chains,)``.

        Differences are taken for each unit before the sum, for accuracy.
        """
        now, later = self.target.at(beta, self.base), self.target.at(then, self.base)
        total: Any = (beta - then) * self.offset
        for layer, field in state.fields.items():
            bias = self.base.biases[layer]
            before, after = torch.lerp(bias, field, beta), torch.lerp(bias, field, then)
            if self.target.is_gaussian(layer):
                total = (
                    total
                    + later.log_normalizer(layer, after).double()
                    - now.log_normalizer(layer, before).double()
                )
            else:
                total = total + softplus(after).sub_(softplus(before)).sum(-1, dtype=torch.float64)
        for layer in self.kept:
            x: Any = state.x[layer]
            total = (
                total
                + (then - beta)
                * (x @ (self.target.biases[layer] - self.base.biases[layer])).double()
            )
            if self.curvature is not None and self.target.is_gaussian(layer):
                total = total - 0.5 * (then - beta) * (x**2 @ self.curvature).double()
        weight: Tensor = total
        return weight

    def move(
        self, state: LayeredState, beta: float, generator: torch.Generator | None = None
    ) -> LayeredState:
        """Run one sweep at a temperature: the other side given the kept one, and back."""
        base = self.base
        x = self.target.draw_side(
            self.summed, (), generator, fields=state.fields, beta=beta, base=base
        )
        return self.enter(self.target.draw_side(self.kept, x, generator, beta=beta, base=base))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGibbs(DiscreteKernel[PointState]):
    """Block Gibbs on a :class:`pyroebm.core.GeometricPath` to a machine with layers.

    The path goes from :class:`IndependentLayers` to the machine over all its layers. The kernel
    corresponds to :class:`pyroebm.kernels.BlockGibbs` for one energy. Each chain may have its own
    temperature, so that tempered SMC and parallel tempering can use it.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition.bases import base_energy
        >>> joint = BernoulliRBM(3, 2).joint()
        >>> path = GeometricPath(joint, torch.tensor([0.0, 1.0]), base_energy(joint, None))
        >>> kernel = LayerGibbs()
        >>> state, info = kernel.step(path, kernel.init(path, joint.initial(2)))
        >>> state.x.shape, info.n_steps
        (torch.Size([2, 5]), tensor([2, 2]))
    """

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> PointState:
        """Return the state at ``x``, with its energies."""
        self.check_start(energy, x)
        return point_state(energy, x)

    def step(
        self, energy: Energy, state: PointState, generator: torch.Generator | None = None
    ) -> tuple[PointState, Info]:
        """Run one sweep: odd layers given even ones, and back."""
        base, target, betas = _ends(energy)
        with torch.no_grad():
            beta = betas.reshape(-1, 1) if betas.dim() else betas
            even, odd = target.sides()
            above = target.draw_side(odd, target.split(state.x), generator, beta=beta, base=base)
            below = target.draw_side(even, above, generator, beta=beta, base=base)
            layers = (a if b is None else b for a, b in zip(above, below, strict=True))
            drawn = torch.cat([layer for layer in layers if layer is not None], -1)
            return swept(energy, state, drawn, torch.zeros_like(state.energy), 2)


def _ends(energy: Energy) -> tuple[Layers, Layers, Tensor]:
    if isinstance(energy, GeometricPath) and energy.reference is not None:
        base, target = energy.reference, energy.energy
        if isinstance(base, IndependentLayers) and isinstance(target, LayeredMachine):
            return base.layers, target.layers(), energy.betas
    raise ValueError(
        "LayerGibbs requires the GeometricPath from IndependentLayers to a machine with layers, got"
        f" {type(energy).__name__}; use BlockGibbs() for the machine itself"
    )


def _detached(layers: Layers) -> Layers:
    precision = None if layers.precision is None else layers.precision.detach()
    offset = layers.offset.detach() if isinstance(layers.offset, Tensor) else layers.offset
    return Layers(
        tuple(w.detach() for w in layers.weights),
        tuple(b.detach() for b in layers.biases),
        precision,
        offset,
    )
