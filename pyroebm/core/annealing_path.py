"""Paths of densities from a reference to an energy, for annealing and tempering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core.conditionals import (
    Index,
    common_blocks,
    conditional_of,
    product_of_powers,
)
from pyroebm.core.energy import Energy, View
from pyroebm.core.rng import draw_from, seeded_generator
from pyroebm.core.supports import inside, same_support

__all__ = ["DistributionEnergy", "GeometricPath"]


class GeometricPath(View):
    r"""Geometric path from a reference :math:`V` to an energy :math:`U`, with one beta per chain.

    .. math:: E_\beta(x) = (1 - \beta) V(x) + \beta U(x)

    Without a reference, :math:`V = 0`: plain tempering. It is the geometric path of simulated
    tempering and annealed importance sampling (Marinari and Parisi, 1992; Neal, 2001).

    Args:
        energy: :math:`U`.
        betas: :math:`\beta` in [0, 1], no unit: a number, or one for each chain, shape
            ``(chains,)``; ``x`` then has shape ``(chains, ..., *event)``.
        reference: :math:`V`, of the same event shape, support and dtype.

    Raises:
        ValueError: if a beta is outside [0, 1], or if the reference does not fit the energy.

    Example:
        >>> from pyroebm.targets import DoubleWell, Gaussian
        >>> path = GeometricPath(DoubleWell(), torch.tensor([1.0, 0.5, 0.0]), Gaussian(0.0))
        >>> path(torch.ones(3))
        tensor([-2.0000, -0.7500,  0.5000])
        >>> path.slope(torch.ones(3))
        tensor([-2.5000, -2.5000, -2.5000])
    """

    reference: Energy | None

    def __init__(
        self,
        energy: Energy,
        betas: float | Sequence[float] | Tensor,
        reference: Energy | None = None,
    ) -> None:
        at = torch.as_tensor(betas, dtype=energy.dtype, device=energy.device)
        if at.dim() > 1 or not bool(((at >= 0.0) & (at <= 1.0)).all()):
            raise ValueError(
                f"betas must be one number in [0, 1] or one for each chain, got betas={betas}"
            )
        super().__init__(energy)
        if reference is not None:
            _check_reference(energy, reference)
        self.reference = reference
        self.betas = at

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        beta = self._beta_of(x)
        return (
            beta * self.energy(x)
            if self.reference is None
            else beta * self.energy(x) + (1.0 - beta) * self.reference(x)
        )

    def slope(self, x: Tensor) -> Tensor:
        r"""Return the derivative of the energy with respect to beta.

        It is :math:`\partial E_\beta / \partial \beta = U - V` for all :math:`\beta`; detached, of
        the batch shape.
        """
        with torch.no_grad():
            return self.energy(x) if self.reference is None else self.energy(x) - self.reference(x)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the values of one site of each chain, ``(chains, K)``."""
        beta = self._beta_of(x).unsqueeze(-1)
        logits = beta * self.energy.site_logits(x, site)
        if self.reference is None:
            return logits
        return logits + (1.0 - beta) * self.reference.site_logits(x, site)

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Gibbs blocks that both the energy and the reference have."""
        return common_blocks([end for end in (self.energy, self.reference) if end is not None])

    def conditional(self, block: str, x: Tensor) -> Distribution:
        r"""Return the conditional distribution of a Gibbs block.

        It is the conditional of the energy to the power :math:`\beta`, times that of the reference
        to the power :math:`1 - \beta`.
        """
        beta = self._beta_of(x)
        terms = [(conditional_of(self.energy, block, x), beta)]
        if self.reference is not None:
            terms.append((conditional_of(self.reference, block, x), 1.0 - beta))
        return product_of_powers(*terms)

    def _beta_of(self, x: Tensor) -> Tensor:
        batch = self.batch_shape(x)
        if self.betas.dim() == 0:
            return self.betas
        if batch[:1] != self.betas.shape:
            raise ValueError(
                f"x must have one chain for each of {len(self.betas)} betas, got batch shape"
                f" {tuple(batch)}"
            )
        return self.betas.reshape(-1, *[1] * (len(batch) - 1))


def _check_reference(energy: Energy, reference: Energy) -> None:
    if not isinstance(reference, Energy):
        raise ValueError(
            f"reference must be an Energy, got {type(reference).__name__}; wrap a"
            " distribution as DistributionEnergy(distribution)"
        )
    ours, theirs = (
        (tuple(e.event_shape), str(e.support), str(e.dtype), str(e.device))
        for e in (energy, reference)
    )
    if (
        not same_support(energy.support, reference.support)
        or ours[0] != theirs[0]
        or ours[2:] != theirs[2:]
    ):
        raise ValueError(
            "reference must have the event_shape, support, dtype and device of the energy,"
            f" {ours}, got {theirs}"
        )


class DistributionEnergy(Energy):
    r"""The energy :math:`-\log q` of a normalized distribution, with exact draws and log Z = 0.

    Args:
        distribution: of Pyro or torch, with an empty batch shape. Its draws are those of
            :func:`pyroebm.core.rng.draw_from`.
        dtype: floating-point type of its draws; None for torch's default.

    Raises:
        ValueError: if it has a batch shape, or if its attribute ``normalized`` is False.

    Example:
        >>> import pyro.distributions as dist
        >>> e = DistributionEnergy(dist.Normal(0.0, 1.0))
        >>> e(torch.tensor([0.0])), e.log_z, e.sample(3).shape
        (tensor([0.9189]), 0.0, torch.Size([3]))
    """

    log_z = 0.0
    has_exact_draws = True

    def __init__(self, distribution: Distribution, *, dtype: torch.dtype | None = None) -> None:
        if distribution.batch_shape or not getattr(distribution, "normalized", True):
            raise ValueError(
                "distribution must be normalized and have batch_shape (), got"
                f" {type(distribution).__name__} with batch_shape"
                f" {tuple(distribution.batch_shape)}; write .to_event() to make a batch an event"
            )
        super().__init__(distribution.event_shape, distribution.support)
        self.distribution = distribution
        self.to(dtype or torch.get_default_dtype())
        self._legal = self.sample(1, seeded_generator(0))[0]
        self.to(self._legal.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        legal = inside(self.support, x, len(self.event_shape))
        # torch's distributions raise for a whole batch if one event is outside, or NaN
        where = legal.reshape((*legal.shape, *[1] * len(self.event_shape)))
        values = -self.distribution.log_prob(torch.where(where, x, self._legal))
        return torch.where(legal, values, torch.inf)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        with torch.no_grad():
            return draw_from(self.distribution, num_samples, generator).to(self.dtype)
