"""Tilted densities: a known distribution with a correction, such as a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core.annealing_path import DistributionEnergy
from pyroebm.core.energy import Energy
from pyroebm.core.supports import search_finite
from pyroebm.energies.neural import row_values

__all__ = ["Tilted"]


class Tilted(Energy):
    r"""A base distribution tilted by a function, :math:`p(z) \propto p_0(z)\, e^{-f(z)}`.

    .. math:: E(z) = E_0(z) + f(z), \qquad Z / Z_0 = E_{p_0}[e^{-f(z)}]

    With :math:`p_0` the prior of a latent variable z and f a network, it is an energy-based prior
    (Pang et al., 2020). With f(z) = -d(G(z)) for a generator G and the logit d of its
    discriminator, the density of G(z) is that of the generator times :math:`e^d`. For the optimal
    discriminator, :math:`d = \log p_d / p_g`, this is the data distribution, on the range of G, and
    :math:`Z = 1` (Che et al., "Your GAN Is Secretly an Energy-Based Model", 2020).

    Args:
        base: :math:`p_0`, an energy, or a distribution of Pyro or torch with an empty batch shape.
        f: function or module ``(n, *event) -> (n,)`` or ``(n, 1)``, in nats. There is no density if
            :math:`-f` grows faster than :math:`E_0`. The parameters of a module are parameters of
            this energy; those used in a function are not.
        dtype: floating-point type if the base is a distribution; None for torch's default.

    Raises:
        ValueError: if ``base`` is neither an energy nor a distribution, or if ``f`` is not
            callable; when called, if its result has another shape.

    Example:
        >>> import pyro.distributions as dist
        >>> tilted = Tilted(
        ...     dist.Normal(0.0, 1.0), lambda z: -(2.0 * z - 2.0)
        ... )  # the logit of N(2, 1) against N(0, 1)
        >>> torch.allclose(
        ...     tilted(torch.tensor([1.5])), -dist.Normal(2.0, 1.0).log_prob(torch.tensor([1.5]))
        ... )
        True
    """

    def __init__(
        self,
        base: Energy | Distribution,
        f: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(base, Distribution):
            base = DistributionEnergy(base, dtype=dtype)
        if not isinstance(base, Energy) or not callable(f):
            raise ValueError(
                "Tilted takes an Energy or a distribution, and a function of its events, got"
                f" {type(base).__name__} and {type(f).__name__}"
            )
        super().__init__(base.event_shape, base.support)
        self.base, self.f = base, f

    def forward(self, z: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.base(z) + row_values(self.f, z, self.event_shape)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy: exact draws of the base, if it has them.

        Otherwise they are its starting states. States at which the tilt is not finite are drawn
        again.

        Args:
            num_chains: number of states.
            generator: source of randomness; None for torch's default one.
        """

        def draw(count: int) -> Tensor:
            return (self.base.sample if self.base.has_exact_draws else self.base.initial)(
                count, generator
            )

        return search_finite(type(self).__name__, draw, self, num_chains)
