"""A known law, tilted: what a model is with a correction on top, such as a generator's latents seen
by its discriminator.
"""

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
    r"""A base law tilted by a function, :math:`p(z) \propto p_0(z)\, e^{-f(z)}`.

    .. math:: E(z) = E_0(z) + f(z), \qquad Z / Z_0 = E_{p_0}[e^{-f(z)}]

    With :math:`p_0` the prior of a latent model's z and f a network this is an energy-based prior
    (Pang et al., 2020). With f(z) = -d(G(z)), of a generator G and the logit d of its
    discriminator, G(z) is distributed as G's law times the density ratio :math:`e^d`; where d is
    optimal, :math:`d = \log p_d / p_g`, that is the data's law, as far as G reaches it, and
    :math:`Z = 1` (Che et al., "Your GAN is secretly an energy-based model", 2020).

    Args:
        base: :math:`p_0`, an energy, or a distribution of Pyro or torch with an empty batch shape.
        f: from rows ``(n, *event)`` to ``(n,)`` or ``(n, 1)``, in nats; what grows faster than
            :math:`E_0` downwards leaves no density. A module's parameters are parameters of this
            energy; those inside a lambda are not, and are not trained.
        dtype: floating-point type where the base is a distribution; None for torch's default.

    Raises:
        ValueError: if ``base`` is neither, ``f`` cannot be called, or its result has another shape.

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
        """Draws of the base where it has exact ones, else its starting states; another try where
        the tilt is not finite.
        """

        def draw(count: int) -> Tensor:
            return (self.base.sample if self.base.has_exact_draws else self.base.initial)(
                count, generator
            )

        return search_finite(type(self).__name__, draw, self, num_chains)
