"""The augmented energy, to which a flow with auxiliary variables is fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, SharesLogZ
from pyroebm.core.supports import event_numel, is_real
from pyroebm.flows.networks import ConditionalGaussian

__all__ = ["AugmentedEnergy"]


class AugmentedEnergy(SharesLogZ):
    r"""An energy over x and auxiliary variables y.

    .. math:: U(x, y) = U(x) - \log N(y \mid M(x), \Sigma(x)), \qquad (x, y) \in R^D

    Its marginal in x is the density of U and its partition function is that of U, for any M and
    :math:`\Sigma`. If ``conditional`` is None, y is empty and this is U over vectors. The lectures
    call y redundant latent variables.

    Args:
        energy: U, of real support; its events are flattened to vectors of d entries.
        conditional: the Gaussian of y given x, or None.
        dim: d.

    Raises:
        ValueError: if the events of the energy do not have d entries, or its support is not
            :math:`R^d`.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> extended = AugmentedEnergy(DoubleWell(), ConditionalGaussian(dim=1, extra=1), dim=1)
        >>> extended.event_shape, extended(torch.tensor([[-1.0, 0.0]])).detach()
        (torch.Size([2]), tensor([-3.0811]))
    """

    def __init__(self, energy: Energy, conditional: ConditionalGaussian | None, dim: int) -> None:
        if not isinstance(energy, Energy):
            raise ValueError(f"energy must be a pyroebm.Energy, got {type(energy).__name__}")
        if event_numel(energy.event_shape) != dim:
            raise ValueError(
                f"energy must have events of dim={dim} entries, as x in the flow, got event_shape"
                f" {tuple(energy.event_shape)} of {event_numel(energy.event_shape)}"
                f" ({type(energy).__name__})"
            )
        if not is_real(energy.support):
            raise ValueError(
                "energy must have real support, as the flow has, but"
                f" {type(energy).__name__} has support={energy.support}; wrap it:"
                " Unconstrained(energy)"
            )
        super().__init__((dim if conditional is None else dim + conditional.extra,))
        self.energy = energy
        self.conditional = conditional
        self.dim = dim

    def split(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Split into events and auxiliary variables.

        Shapes are ``(*batch, D) -> (*batch, *event), (*batch, D - d)``.
        """
        batch = self.batch_shape(xy)
        return xy[..., : self.dim].reshape(batch + self.energy.event_shape), xy[..., self.dim :]

    def vectors(self, x: Tensor) -> Tensor:
        """Flatten events of the energy: ``(*batch, *event) -> (*batch, d)``."""
        return x.reshape(*self.energy.batch_shape(x), self.dim)

    def forward(self, xy: Tensor) -> Tensor:
        """Return the energies: ``(*batch, *event) -> (*batch)``."""
        x, y = self.split(xy)
        if self.conditional is None:
            return self.energy(x)
        return self.energy(x) - self.conditional.log_prob(y, xy[..., : self.dim])

    def augment(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Append auxiliary variables, drawn given x: ``(n, *event) -> (n, D)``."""
        x = self.vectors(x)
        if self.conditional is None:
            return x
        with torch.no_grad():
            return torch.cat((x, self.conditional.sample(x, 1, generator).squeeze(0)), dim=-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial states of chains, ``(num_chains, D)``."""
        return self.augment(self.energy.initial(num_chains, generator), generator)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw x exactly, and y given x, ``(num_samples, D)``."""
        return self.augment(self.energy.sample(num_samples, generator), generator)
