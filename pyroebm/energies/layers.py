"""Layers of units in natural parameters, the common form of restricted and deep Boltzmann machines.

Every unit is coupled to the layers next to its own only, so the units of a layer are independent
given those, and all even layers are independent given all odd ones. Sums over every second layer
have closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from pyro.distributions import Bernoulli, Normal
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyroebm.core.enumeration import bit_batches, bits_of, draw_numbers
from pyroebm.core.progress import Progress
from pyroebm.core.rng import standard_normal, uniform

__all__ = ["Layers"]


class Layers(NamedTuple):
    r"""Layers :math:`x_0, \ldots, x_L` with an energy that is linear in its parameters.

    .. math::

        E(x) = C + \tfrac12 \sum_i \Lambda_i x_{0i}^2 - \sum_l b_l \cdot x_l
        - \sum_l x_l^\top W_l\, x_{l+1}

    Units are binary; those of layer 0 are real if there is a precision (Welling, Rosen-Zvi and
    Hinton, "Exponential Family Harmoniums", 2005).

    Attributes:
        weights: :math:`W_l`, shape ``(n_l, n_{l+1})``.
        biases: :math:`b_l`, shape ``(n_l,)``, one more than weights.
        precision: :math:`\Lambda > 0` of a Gaussian layer 0, shape ``(n_0,)``; None if layer 0 is
            binary.
        offset: C, shape ``()``.

    Example:
        >>> layers = Layers((torch.ones(2, 1),), (torch.zeros(2), torch.zeros(1)))
        >>> layers.energy([torch.tensor([1.0, 1.0]), torch.tensor([1.0])])
        tensor(-2.)
        >>> layers.free_energy([torch.tensor([1.0, 1.0]), None])  # -log(1 + e^2)
        tensor(-2.1269)
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    precision: Tensor | None = None
    offset: Tensor | float = 0.0

    @property
    def sizes(self) -> list[int]:
        """Number of units of each layer."""
        return [len(bias) for bias in self.biases]

    def split(self, x: Tensor) -> list[Tensor]:
        """Split states ``(*batch, units)`` into layers, each ``(*batch, n_l)``."""
        return list(x.split(self.sizes, -1))

    def field(self, layer: int, x: Sequence[Tensor | None]) -> Tensor:
        r"""Return the field :math:`b_l + x_{l-1} W_{l-1} + x_{l+1} W_l^\top` of a layer.

        Args:
            layer: l.
            x: states of the layers, ``(*batch, n_l)`` each; those not next to layer l may be None.
        """
        total = self.biases[layer]
        for weight, neighbor in self._adjacent(layer, x):
            total = (
                torch.addmm(total, neighbor, weight)
                if neighbor.dim() == 2 and total.dim() == 1
                else total + neighbor @ weight
            )
        return total

    def _adjacent(self, layer: int, x: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        found = []
        if layer > 0:
            found.append((self.weights[layer - 1], x[layer - 1]))
        if layer + 1 < len(self.biases):
            found.append((self.weights[layer].mT, x[layer + 1]))
        if any(neighbor is None for _, neighbor in found):
            raise ValueError(f"x must hold the layers next to layer {layer}, got None for one")
        return [(weight, neighbor) for weight, neighbor in found if neighbor is not None]

    def is_gaussian(self, layer: int) -> bool:
        """Whether the units of a layer are real numbers."""
        return layer == 0 and self.precision is not None

    def log_normalizer(self, layer: int, field: Tensor) -> Tensor:
        r"""Return the log-partition function of the units given their field, ``(*batch)``.

        It is :math:`\log \sum_x e^{x f}`, or :math:`\log \int e^{x f - \Lambda x^2 / 2}`, summed
        over the units.
        """
        if not self.is_gaussian(layer):
            return softplus(field).sum(-1)
        precision = self._precision()
        return 0.5 * (field**2 / precision + math.log(2.0 * math.pi) - precision.log()).sum(-1)

    def mean(self, layer: int, field: Tensor) -> Tensor:
        """Return the expectation of the units given their field."""
        return field / self._precision() if self.is_gaussian(layer) else torch.sigmoid(field)

    def distribution(self, layer: int, field: Tensor) -> Distribution:
        """Return the distribution of the units of a layer given their field, events ``(n_l,)``."""
        if not self.is_gaussian(layer):
            return Bernoulli(logits=field, validate_args=False).to_event(1)
        precision = self._precision()
        return Normal(
            field / precision, precision.rsqrt().expand_as(field), validate_args=False
        ).to_event(1)

    def draw(self, layer: int, field: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the units of a layer given their field."""
        if self.is_gaussian(layer):
            noise = standard_normal(field.shape, generator, field.dtype, field.device)
            return field / self._precision() + self._precision().rsqrt() * noise
        # 1 where the probability is above the noise, else 0, and NaN where it is NaN; in place, to
        # save time
        p = torch.sigmoid(field.detach())
        return p.sub_(uniform(p.shape, generator, p.dtype, p.device)).ceil_().abs_()

    def at(self, beta: float | Tensor, base: Layers | None = None) -> Layers:
        r"""Return the precision and offset of :math:`(1 - \beta) E_0 + \beta E`.

        They are needed for the distributions of units given their fields; biases and weights are
        part of the fields.

        Args:
            beta: inverse temperature, a number or one for each chain, shape ``(chains, 1)``.
            base: :math:`E_0`, with weights of zero; None for :math:`E_0 = 0`.
        """
        target = self._replace(weights=(), biases=())
        if base is not None:
            return base._replace(weights=(), biases=()).mix(target, beta)
        precision = None if self.precision is None else beta * self.precision
        return target._replace(precision=precision, offset=beta * self.offset)

    def draw_side(
        self,
        side: Sequence[int],
        x: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
        *,
        fields: Mapping[int, Tensor] | None = None,
        beta: float | Tensor | None = None,
        base: Layers | None = None,
    ) -> list[Tensor | None]:
        """Draw the layers of one side given the other: half a sweep of block Gibbs sampling.

        Args:
            side: one of :meth:`sides`.
            x: the layers of the other side, ``(chains, n_l)`` each; other entries may be None.
            generator: source of randomness; None for torch's default one.
            fields: fields of the layers to be drawn, at ``beta`` = 1, if they are computed already.
            beta: inverse temperature, as in :meth:`at`; None for the machine itself.
            base: energy at ``beta`` = 0, as in :meth:`at`.

        Returns:
            the drawn layers, and None in place of those of the other side.

        Example:
            >>> layers = Layers(
            ...     (torch.full((2, 1), 20.0),), (torch.zeros(2), torch.full((1,), -30.0))
            ... )
            >>> layers.draw_side([1], [torch.tensor([[1.0, 1.0], [0.0, 1.0]]), None])
            [None, tensor([[1.],
                    [0.]])]
        """
        tempered = self if beta is None else self.at(beta, base)
        drawn: list[Tensor | None] = [None] * len(self.biases)
        for layer in side:
            field = self.field(layer, x) if fields is None else fields[layer]
            if beta is not None:
                field = (
                    beta * field if base is None else torch.lerp(base.biases[layer], field, beta)
                )
            drawn[layer] = tempered.draw(layer, field, generator)
        return drawn

    def energy(self, x: Sequence[Tensor]) -> Tensor:
        """Return the energy of all layers: a sequence of ``(*batch, n_l)`` to ``(*batch)``."""
        total = self._own(x)
        for below, weight, above in zip(x[:-1], self.weights, x[1:], strict=True):
            total = total - ((below @ weight) * above).sum(-1)
        return total

    def free_energy(
        self, x: Sequence[Tensor | None], fields: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        r"""Return the free energy :math:`-\log \sum e^{-E}` of some layers, the others summed out.

        Args:
            x: ``(*batch, n_l)`` for each layer kept, None for those summed out; no two of the
                latter may be next to each other.
            fields: fields of the layers summed out, if they are computed already.
        """
        total = self._own(x)
        for layer, kept in enumerate(x):
            above = x[layer + 1] if layer + 1 < len(x) else None
            if kept is None:
                total = total - self.log_normalizer(
                    layer, self.field(layer, x) if fields is None else fields[layer]
                )
            elif above is not None:
                total = total - ((kept @ self.weights[layer]) * above).sum(-1)
        return total

    def _own(self, x: Sequence[Tensor | None]) -> Tensor:
        """Return the terms of the energy that depend on one layer only."""
        total = torch.as_tensor(
            self.offset, dtype=self.biases[0].dtype, device=self.biases[0].device
        )
        for layer, kept in enumerate(x):
            if kept is not None:
                total = total - kept @ self.biases[layer]
                if self.is_gaussian(layer):
                    total = total + 0.5 * kept**2 @ self._precision()
        return total

    def sides(self) -> tuple[list[int], list[int]]:
        """Return the even and the odd layers; each side is independent given the other."""
        every = range(len(self.biases))
        return [layer for layer in every if layer % 2 == 0], [
            layer for layer in every if layer % 2 == 1
        ]

    def smaller_side(self) -> list[int]:
        """Return the side that is enumerated: binary, with fewer units."""
        even, odd = self.sides()
        if self.precision is not None:
            return odd
        return min(even, odd, key=lambda side: sum(self.sizes[layer] for layer in side))

    def place(self, bits: Tensor, side: Sequence[int]) -> list[Tensor | None]:
        """Split units of one side, ``(*batch, units)``, into layers; None for the other side."""
        parts = iter(bits.split([self.sizes[layer] for layer in side], -1))
        return [next(parts) if layer in side else None for layer in range(len(self.biases))]

    def log_partition(self, *, progress: bool | None = False) -> Tensor:
        r"""Compute log Z by a sum over all states of the smaller side, shape ``()``.

        It is differentiable.

        Args:
            progress: True shows the progress, False hides it, None shows it if the sum takes longer
                than a second.
        """
        side = self.smaller_side()
        count = sum(self.sizes[layer] for layer in side)
        batches = bit_batches(count, self.biases[0].dtype, self.biases[0].device)
        parts = []
        with Progress(1 << count, "enumeration", "state", progress) as shown:
            for bits in batches:
                parts.append(torch.logsumexp(-self.free_energy(self.place(bits, side)), 0))
                shown.update(len(bits))
        return torch.stack(parts).logsumexp(0)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw exact independent samples of all layers, by inverse CDF over the smaller side.

        Args:
            num_samples: number of draws.
            generator: source of randomness; None for torch's default one.

        Returns:
            states of each layer, shape ``(num_samples, n_l)``.

        Raises:
            FloatingPointError: if the energies are not finite.
        """
        side, bias = self.smaller_side(), self.biases[0]
        count = sum(self.sizes[layer] for layer in side)
        batches = bit_batches(count, bias.dtype, bias.device)
        log_p = torch.cat([-self.free_energy(self.place(bits, side)) for bits in batches])
        drawn = self.place(
            bits_of(draw_numbers(log_p, num_samples, generator), count, bias.dtype), side
        )
        return [
            self.draw(layer, self.field(layer, drawn), generator) if x is None else x
            for layer, x in enumerate(drawn)
        ]

    def pass_up(self, visible: Tensor) -> list[Tensor]:
        """Return initial means of all layers given the visible one, by one pass up.

        The field from the layer below is doubled, in place of that from the layer above.

        Args:
            visible: states of layer 0, shape ``(*batch, n_0)``.
        """
        means = [visible]
        for layer in range(1, len(self.biases)):
            doubled = 1.0 if layer + 1 == len(self.biases) else 2.0
            means.append(
                torch.sigmoid(self.biases[layer] + doubled * means[-1] @ self.weights[layer - 1])
            )
        return means

    @torch.no_grad()
    def mean_field(
        self,
        start: Sequence[Tensor],
        held: bool = True,
        max_steps: int = 100,
        tolerance: float = 1e-6,
    ) -> list[Tensor]:
        r"""Compute the means of the factorized q that minimizes :math:`KL(q \| p)`.

        Odd and even layers are updated in turn, so that no update increases the divergence
        (parallel updates can oscillate).

        Args:
            start: initial means, ``(*batch, n_l)`` for each layer, such as those of
                :meth:`pass_up`.
            held: whether layer 0 is held fixed.
            max_steps: maximum number of sweeps.
            tolerance: the sweeps stop when no mean changes by more. Events with NaN remain NaN, and
                do not affect the others.

        Returns:
            means of each layer, shape ``(*batch, n_l)``.
        """
        means, (even, odd) = list(start), self.sides()
        for _ in range(max_steps):
            converged = True
            for layer in (*odd, *(k for k in even if k > 0 or not held)):
                new = self.mean(layer, self.field(layer, means))
                converged = converged and not bool(((new - means[layer]).abs() > tolerance).any())
                means[layer] = new
            if converged:
                break
        return means

    def mix(self, other: Layers, beta: float | Tensor) -> Layers:
        r"""Interpolate the parameters: the energy is :math:`(1 - \beta) E + \beta E'`.

        Args:
            other: layers of the same sizes, with energy :math:`E'`.
            beta: :math:`\beta`, a number or one per chain.
        """
        precision = (
            None if self.precision is None else torch.lerp(self.precision, other._precision(), beta)
        )
        mixed = [
            torch.lerp(a, b, beta)
            for a, b in zip(self.weights + self.biases, other.weights + other.biases, strict=True)
        ]
        count = len(self.weights)
        offset = (1.0 - beta) * self.offset + beta * other.offset
        return Layers(tuple(mixed[:count]), tuple(mixed[count:]), precision, offset)

    def double(self) -> Layers:
        """Return the layers in float64, for sums over all states."""
        precision = None if self.precision is None else self.precision.double()
        offset = torch.as_tensor(self.offset, dtype=torch.float64, device=self.biases[0].device)
        return Layers(
            tuple(w.double() for w in self.weights),
            tuple(b.double() for b in self.biases),
            precision,
            offset,
        )

    def _precision(self) -> Tensor:
        if self.precision is None:
            raise ValueError("layer 0 must be Gaussian to have a precision, got binary units")
        return self.precision
