"""An energy seen through a flow: what is left for a kernel to do once the flow has straightened
it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow

__all__ = ["Transported"]


class Transported(Energy):
    r"""An energy pulled back through a flow T to its noise z: neural transport (Hoffman et al.,
    "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport", 2019).

    .. math:: E(z) = U(T(z)) - \log |\det \partial T / \partial z|

    A kernel on E draws from :math:`e^{-U}` exactly, however poor the flow is; a good one makes E
    nearly the energy of its base. With redundant latents U is :math:`U(x) - \log N(y \mid M(x),
    \Sigma(x))` and z has D entries. Results of :class:`pyroebm.MCMC` are in the variables of the
    energy. ``log_z`` is the energy's.

    Args:
        flow: T, with its Gaussian of y given x.
        energy: U.

    Raises:
        ValueError: if the flow does not fit the energy.

    Example:
        >>> from pyroebm import HMC, MCMC
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> mcmc = MCMC(HMC(), num_samples=20, warmup_steps=20, num_chains=4, seed=0)
        >>> mcmc.run(Transported(NICE(2), Gaussian([3.0, 0.0])))
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([4, 20, 2])
    """

    def __init__(self, flow: Flow, energy: Energy) -> None:
        super().__init__((flow.total_dim,))
        self.flow, self.extended = flow, flow.extend(energy)

    @property
    def log_z(self) -> float | None:
        """That of the energy."""
        return self.extended.log_z

    def forward(self, z: Tensor) -> Tensor:
        xy, log_q = self.flow.forward_and_log_prob(z)
        return self.extended(xy) + log_q - self.flow.base.log_prob(z)

    def variables(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The energy's events and the latents at z: ``(*batch, D) -> (*batch, *event), (*batch, D -
        d)``."""
        return self.extended.split(self.flow.forward_and_log_prob(z)[0])

    def named(self, x: Tensor, site: str = "x") -> dict[str, Tensor]:
        with torch.no_grad():
            return self.extended.energy.named(self.variables(x)[0], site)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.flow.rsample_base(num_chains, generator)
