"""Base densities of annealing: independent units, with exact log Z and exact draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core.annealing_path import DistributionEnergy
from pyroebm.core.arrays import as_tensor
from pyroebm.core.conditionals import blocks_of, independent_sites, sites_of
from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.core.supports import is_discrete, is_real, site_values
from pyroebm.core.wrappers import check_weighable
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.targets import Gaussian

__all__ = ["IndependentLayers", "IndependentSites", "base_energy", "base_rates"]


class IndependentSites(Energy):
    r"""Independent sites on the support of a discrete energy: :math:`E(x) = -\sum_i \log p_i(x_i)`.

    The density is normalized.

    Args:
        like: the energy whose event shape, support, dtype and device are used.
        log_p: :math:`\log p_i(k)`, up to a constant for each site, shape ``(sites, K)``; None is
            uniform.

    Raises:
        ValueError: if ``log_p`` has another shape.

    Example:
        >>> from pyroebm.energies import Ising
        >>> e = IndependentSites(Ising((3, 3)))
        >>> e.log_z, e(torch.ones(1, 3, 3))  # 9 log 2
        (0.0, tensor([6.2383]))
    """

    log_z = 0.0
    has_exact_draws = True
    values: Tensor
    log_p: Tensor

    def __init__(self, like: Energy, log_p: Tensor | None = None) -> None:
        super().__init__(like.event_shape, like.support)
        values = site_values(like.support, like.event_shape, like.dtype, like.device)
        shape = (like.event_shape.numel() // values.shape[1], len(values))
        log_p = (
            torch.zeros(shape, dtype=torch.float64, device=like.device) if log_p is None else log_p
        )
        if tuple(log_p.shape) != shape:
            raise ValueError(
                f"log_p must have shape (sites, values) = {shape}, got {tuple(log_p.shape)}"
            )
        self.register_buffer("values", values)
        self.register_buffer("log_p", log_p.log_softmax(1).to(like.dtype))
        self.blocks = blocks_of(like)

    def forward(self, x: Tensor) -> Tensor:
        """Compute energies of ``x`` ``(*batch, *event)``, shape ``(*batch)``."""
        batch = self.batch_shape(x)
        sites = x.reshape(*batch, len(self.log_p), 1, -1)
        return -((sites == self.values).all(-1) * self.log_p).flatten(len(batch)).sum(-1)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of one site of each chain, ``(chains, K)``."""
        return self.log_p[site]

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of a Gibbs block; its sites are independent of the others."""
        sites = sites_of(self.blocks[block], self.event_shape, self.values.shape[1])
        log_p = self.log_p[sites.to(self.device)]
        return independent_sites(self.support, log_p.expand(len(x), *log_p.shape))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact draws."""
        cdf = self.log_p.double().softmax(1).cumsum(1)
        noise = uniform((num_samples, len(cdf), 1), generator, torch.float64, self.device)
        index = (noise * cdf[:, -1:] >= cdf[:, :-1]).sum(-1)
        return self.values[index].reshape(num_samples, *self.event_shape)


class IndependentLayers(Energy):
    """Layers without weights as a base energy for a machine with layers.

    The energy is over all units, or over the visible ones with the hidden ones summed out.

    Args:
        layers: layers with weights of zero.
        like: the machine whose events are used.

    Raises:
        ValueError: if a weight is not zero, or the layers are not those of the machine.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(3, 2)
        >>> base = IndependentLayers(base_rates(rbm), rbm)
        >>> round(base.log_z, 4), base.sample(5).shape  # 5 log 2
        (3.4657, torch.Size([5, 3]))
    """

    has_exact_draws = True

    def __init__(self, layers: Layers, like: LayeredMachine) -> None:
        check_base(layers, like.layers())
        super().__init__(like.event_shape, like.support)
        self.layers, self.visible_only = layers, not isinstance(like, LayeredEnergy)
        self.blocks = blocks_of(like)
        self.to(like.device, like.dtype)

    @property
    def log_z(self) -> float:
        r""":math:`\log Z`."""
        return log_z_of_independent(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Compute energies of ``x`` ``(*batch, *event)``, shape ``(*batch)``."""
        return (
            self.layers.free_energy([x, None])
            if self.visible_only
            else self.layers.energy(self.layers.split(x))
        )

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of the units of a layer; they are independent of the others."""
        layer = list(self.blocks).index(block)
        field = self.layers.biases[layer]
        return self.layers.distribution(layer, field.expand(len(x), -1))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact draws."""
        drawn = draw_independent(
            self.layers,
            range(1 if self.visible_only else len(self.layers.biases)),
            num_samples,
            generator,
        )
        return torch.cat([x for x in drawn if x is not None], -1)


def draw_independent(
    layers: Layers, kept: Sequence[int], n: int, generator: torch.Generator | None
) -> list[Tensor | None]:
    """Draw ``n`` states of the layers in ``kept``, None for the others; there are no weights."""
    return [
        layers.draw(layer, bias.expand(n, -1), generator) if layer in kept else None
        for layer, bias in enumerate(layers.biases)
    ]


def log_z_of_independent(layers: Layers) -> float:
    r"""Compute :math:`\log Z` of layers without weights, in float64."""
    precision = None if layers.precision is None else layers.precision.double()
    plain = layers._replace(precision=precision)
    total = sum(
        float(plain.log_normalizer(layer, bias.double()))
        for layer, bias in enumerate(layers.biases)
    )
    return total - float(layers.offset)


def check_base(base: Layers, target: Layers) -> None:
    """Raise ValueError unless ``base`` has the layers of ``target``, with weights of zero."""
    if base.sizes != target.sizes or (base.precision is None) != (target.precision is None):
        kinds = ["bits" if layers.precision is None else "real" for layers in (target, base)]
        raise ValueError(
            f"base must have the layers of the energy, sizes {target.sizes} with visible"
            f" {kinds[0]}, got sizes {base.sizes} with visible {kinds[1]}; use base_rates(energy)"
        )
    if (
        base.biases[0].dtype != target.biases[0].dtype
        or base.biases[0].device != target.biases[0].device
    ):
        ours, theirs = (
            (layers.biases[0].dtype, str(layers.biases[0].device)) for layers in (target, base)
        )
        raise ValueError(f"base must have the dtype and device of the energy, {ours}, got {theirs}")
    if any(bool(weight.any()) for weight in base.weights):
        raise ValueError(
            "base must have weights of zero, so that its log Z and its draws are exact, got nonzero"
            " weights; use base_rates(energy)"
        )


def base_rates(energy: Energy, data: Tensor | np.ndarray | None = None) -> Layers | Energy:
    r"""Fit independent units to data: the base from which to anneal to a trained energy.

    This is the base-rate model of Salakhutdinov and Murray ("On the quantitative analysis of deep
    belief networks", 2008): weights of zero and visible biases :math:`\log p_i / (1 - p_i)`. Hidden
    units are 0 or 1 with probability 1/2. Gaussian units have the means and variances of the data.
    One count is added to each value of each discrete site, so that no probability is 0.

    Args:
        energy: the target of annealing: with layers, discrete, or over real numbers.
        data: data that the energy was trained on, ``(n, *event)``; for a layered machine its
            visible units ``(n, n_0)``. None is uniform, with the machine's own biases and variances
            for Gaussian visible units.

    Returns:
        :class:`pyroebm.energies.Layers` for a layered machine, else an energy with exact draws.

    Raises:
        ValueError: if the data's shape or values do not fit, or a real column does not vary; for
            real energies without data, because there is no uniform distribution on them; if the
            support is constrained.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> base = base_rates(BernoulliRBM(2, 3), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> base.biases[0]  # log 3 and log 1
        tensor([1.0986, 0.0000])
    """
    if data is not None:
        data = as_tensor(data, energy.dtype, energy.device, "data")
    if isinstance(energy, LayeredMachine):
        return _layers(energy.layers(), data)
    if data is not None and tuple(data.shape[1:]) != tuple(energy.event_shape):
        raise ValueError(
            f"data must have shape (n, *{tuple(energy.event_shape)}), got {tuple(data.shape)}"
        )
    if is_discrete(energy.support):
        if data is None:
            return IndependentSites(energy)
        values = site_values(energy.support, energy.event_shape, data.dtype, data.device)
        own = (data.reshape(len(data), -1, 1, values.shape[1]) == values).all(-1)
        if not bool(own.any(-1).all()):
            raise ValueError(f"data must lie in support={energy.support}, got other values")
        return IndependentSites(energy, (own.double().sum(0) + 1.0).log())
    if data is None or not is_real(energy.support):
        raise ValueError(
            f"base must be given for {type(energy).__name__} with support {energy.support}: an"
            " energy with exact draws and a known log_z (pyroebm.targets.Gaussian), a Pyro"
            " distribution, or base_rates(energy, data) on a real support"
        )
    mean, deviation = _moments(data)
    return Gaussian(mean.to(energy.dtype), scale=deviation.to(energy.dtype))


def _layers(target: Layers, data: Tensor | None) -> Layers:
    weights = tuple(torch.zeros_like(weight, requires_grad=False) for weight in target.weights)
    biases = [torch.zeros_like(bias, requires_grad=False) for bias in target.biases]
    if data is not None and (data.dim() != 2 or data.shape[1] != target.sizes[0]):
        raise ValueError(
            f"data must be visible units of shape (n, {target.sizes[0]}), got {tuple(data.shape)}"
        )
    if target.precision is None:
        if data is not None:
            if not bool(((data >= 0.0) & (data <= 1.0)).all()):
                raise ValueError(
                    "data must be bits, or probabilities from 0 to 1, got other values"
                )
            ones = data.double().sum(0) + 1.0
            biases[0] = torch.logit(ones / (len(data) + 2.0)).to(biases[0])
        return Layers(weights, tuple(biases))
    if data is None:
        return Layers(weights, (target.biases[0].detach(), *biases[1:]), target.precision.detach())
    mean, deviation = _moments(data)
    precision = deviation.pow(-2)
    return Layers(weights, ((mean * precision).to(biases[0]), *biases[1:]), precision.to(biases[0]))


def _moments(data: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = data.double().mean(0), data.double().std(0)
    if not bool((deviation > 0.0).all()):
        raise ValueError(
            f"data must vary in every column, but {int((~(deviation > 0.0)).sum())} of"
            f" {deviation.numel()} do not"
        )
    return mean, deviation


def base_energy(energy: Energy, base: Layers | Energy | Distribution | None) -> Energy:
    """Return a base as an energy with exact draws and a known log Z.

    None is :func:`base_rates` of the energy.
    """
    check_weighable(energy)
    base = base_rates(energy) if base is None else base
    if isinstance(base, Layers):
        if not isinstance(energy, LayeredMachine):
            raise ValueError(
                f"base may be Layers for an energy with layers, but {type(energy).__name__} has"
                " none; use base_rates(energy)"
            )
        return IndependentLayers(base, energy)
    base = DistributionEnergy(base, dtype=energy.dtype) if isinstance(base, Distribution) else base
    if not (isinstance(base, Energy) and base.has_exact_draws and base.log_z is not None):
        raise ValueError(
            "base must be Layers, a distribution, or an Energy with exact draws and a known"
            f" log_z, got {type(base).__name__}"
        )
    return base
