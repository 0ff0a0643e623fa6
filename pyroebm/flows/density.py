"""The density of a flow as an energy, for annealing from a flow to its target."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow

__all__ = ["FlowEnergy"]


class FlowEnergy(Energy):
    r"""The energy :math:`-\log q(x, y)` of a flow over its D entries.

    It has exact draws and :math:`\log Z = 0`. Use it as the base of annealed importance sampling
    with the target ``flow.extend(energy)``, or with :class:`~pyroebm.objectives.ExactLikelihood` to
    train the flow by maximum likelihood.

    Args:
        flow: q.

    Example:
        >>> from pyroebm import HMC
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.partition import ais
        >>> from pyroebm.targets import Gaussian
        >>> flow, energy = NICE(2), Gaussian([0.5, 0.0])
        >>> result = ais(flow.extend(energy), FlowEnergy(flow), HMC(0.5), betas=20, num_chains=50)
        >>> abs(result.value - energy.log_z) < 5 * result.standard_error
        True
    """

    log_z = 0.0
    has_exact_draws = True

    def __init__(self, flow: Flow) -> None:
        super().__init__((flow.total_dim,))
        self.flow = flow

    def forward(self, xy: Tensor) -> Tensor:
        """Return the energies: ``(*batch, *event) -> (*batch)``."""
        return -self.flow.log_prob(xy)

    def log_partition(self) -> Tensor:
        """Return log Z = 0."""
        return torch.zeros((), dtype=self.flow.dtype, device=self.flow.device)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (x, y) from the flow, ``(num_samples, D)``."""
        with torch.no_grad():
            return self.flow.forward_and_log_prob(self.flow.rsample_base(num_samples, generator))[0]

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial states of chains from the flow, ``(num_chains, D)``."""
        return self.sample(num_chains, generator)
