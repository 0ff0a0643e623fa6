"""The pullback of an energy through a flow (NeuTra)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow

__all__ = ["PullbackEnergy"]


class PullbackEnergy(Energy):
    r"""The pullback of an energy through a flow T to its noise z (NeuTra; Hoffman et al., 2019).

    .. math:: E(z) = U(T(z)) - \log |\det \partial T / \partial z|

    MCMC on E samples :math:`e^{-U}` without bias for any flow. If the flow fits well, E is nearly
    the energy of its base, which is easy to sample. With auxiliary variables U is the augmented
    energy :math:`U(x) - \log N(y \mid M(x), \Sigma(x))`, and z has D entries. Results of
    :class:`pyroebm.MCMC` are in the variables of the energy. ``log_z`` is that of the energy.

    Args:
        flow: T, with its conditional Gaussian of y given x.
        energy: U.

    Raises:
        ValueError: if the flow does not fit the energy.

    Example:
        >>> from pyroebm import HMC, MCMC
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> mcmc = MCMC(HMC(), num_samples=20, warmup_steps=20, num_chains=4, seed=0)
        >>> mcmc.run(PullbackEnergy(NICE(2), Gaussian([3.0, 0.0])))
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([4, 20, 2])
    """

    def __init__(self, flow: Flow, energy: Energy) -> None:
        super().__init__((flow.total_dim,))
        self.flow, self.augmented = flow, flow.extend(energy)

    @property
    def log_z(self) -> float | None:
        """Log partition function of the energy, or None."""
        return self.augmented.log_z

    def forward(self, z: Tensor) -> Tensor:
        """Return the energies: ``(*batch, *event) -> (*batch)``."""
        xy, log_q = self.flow.forward_and_log_prob(z)
        return self.augmented(xy) + log_q - self.flow.base.log_prob(z)

    def variables(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the events of the energy and the auxiliary variables at z.

        Shapes are ``(*batch, D) -> (*batch, *event), (*batch, D - d)``.
        """
        return self.augmented.split(self.flow.forward_and_log_prob(z)[0])

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the values by name, in the variables of the energy."""
        with torch.no_grad():
            return self.augmented.energy.named(self.variables(x)[0])

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial states of chains from the base, ``(num_chains, D)``."""
        with torch.no_grad():
            return self.flow.rsample_base(num_chains, generator)
