"""The energy that a flow with redundant latents is fitted to, and where vectors of flows become
events of energies."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.supports import event_numel, is_real
from pyroebm.flows.networks import ConditionalGaussian

__all__ = ["Extended"]


class Extended(Energy):
    r"""An energy over x extended by redundant latents y: :math:`U(x) - \log N(y \mid M(x),
    \Sigma(x))` on :math:`R^D`.

    Its x-marginal is the energy's own density and its partition function the energy's own, whatever
    M and :math:`\Sigma` are. Without a conditional y is empty, and this is the plain energy over
    vectors.

    Args:
        energy: U, of real support; its event is read as a vector of d entries.
        conditional: the Gaussian of y given x, or None.
        dim: d.

    Raises:
        ValueError: if the energy's event has not d entries, or if its support is not all of
            :math:`R^d`.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> extended = Extended(DoubleWell(), ConditionalGaussian(dim=1, extra=1), dim=1)
        >>> extended.event_shape, extended(torch.tensor([[-1.0, 0.0]])).detach()
        (torch.Size([2]), tensor([-3.0811]))
    """

    def __init__(self, energy: Energy, conditional: ConditionalGaussian | None, dim: int) -> None:
        if not isinstance(energy, Energy):
            raise ValueError(f"energy must be a pyroebm.Energy, got {type(energy).__name__}")
        if event_numel(energy.event_shape) != dim:
            raise ValueError(
                f"energy must have events of dim={dim} entries, as many as x has in the flow, got"
                " event_shape"
                f" {tuple(energy.event_shape)} of {event_numel(energy.event_shape)}"
                f" ({type(energy).__name__})"
            )
        if not is_real(energy.support):
            raise ValueError(
                f"energy must have real support, the flow's, but {type(energy).__name__} has"
                f" support={energy.support}; wrap it:"
                " Unconstrained(energy)"
            )
        super().__init__((dim if conditional is None else dim + conditional.extra,))
        self.energy = energy
        self.conditional = conditional
        self.dim = dim

    @property
    def log_z(self) -> float | None:
        """That of the energy."""
        return self.energy.log_z

    @property
    def has_exact_draws(self) -> bool:
        """Whether the energy can be sampled exactly."""
        return self.energy.has_exact_draws

    def split(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Events of the energy and latents: ``(*batch, D) -> (*batch, *event), (*batch, D -
        d)``."""
        batch = self.batch_shape(xy)
        return xy[..., : self.dim].reshape(batch + self.energy.event_shape), xy[..., self.dim :]

    def vectors(self, x: Tensor) -> Tensor:
        """Events of the energy as the flow has them: ``(*batch, *event) -> (*batch, d)``."""
        return x.reshape(*self.energy.batch_shape(x), self.dim)

    def forward(self, xy: Tensor) -> Tensor:
        x, y = self.split(xy)
        if self.conditional is None:
            return self.energy(x)
        return self.energy(x) - self.conditional.log_prob(y, xy[..., : self.dim])

    def complete(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Events of the energy with latents drawn for them: ``(n, *event) -> (n, D)``."""
        x = self.vectors(x)
        if self.conditional is None:
            return x
        with torch.no_grad():
            return torch.cat((x, self.conditional.sample(x, 1, generator).squeeze(0)), dim=-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self.complete(self.energy.initial(num_chains, generator), generator)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return self.complete(self.energy.sample(num_samples, generator), generator)
