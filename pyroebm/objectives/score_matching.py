"""Score matching with exact second derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.derivatives import curvatures, unit_directions
from pyroebm.core.energy import Energy
from pyroebm.core.supports import event_sum, is_real, same_support
from pyroebm.objectives.base import Objective, check_rows

__all__ = ["NonNegativeScoreMatching", "ScoreMatching"]

Metrics = dict[str, Tensor]


class ScoreMatching(Objective):
    r"""Score matching (Hyvärinen, 2005).

    .. math:: L = \frac1n \sum_i \Big[ \tfrac12 |\nabla E(x_i)|^2 - \Delta E(x_i) \Big]
        \;\to\; \tfrac12 E_{p_{data}} |\nabla \log p_{data} - \nabla \log p|^2 - \tfrac12
        E_{p_{data}} |\nabla \log p_{data}|^2

    The Laplacian is exact, and takes d Hessian-vector products for events with d entries of any
    shape. So L is suitable for small d; for large d use :class:`SlicedScoreMatching` or
    :class:`DenoisingScoreMatching`. L differs from the Fisher divergence by a constant that depends
    only on the data, so its values are comparable between models. It hardly depends on the weights
    of separated modes.

    With ``noise`` a regularization term is added (Kingma and LeCun, 2010),

    .. math:: \tfrac12 \sigma^2 \, \frac1n \sum_i \sum_j \big(\partial_j^2 E(x_i)\big)^2

    the effect of noise on the data where the score is linear over the width of the noise, with the
    diagonal of the Hessian only. It prevents peaks of the density at single examples and at the
    grid of quantized data.

    Args:
        noise: :math:`\sigma \ge 0`, standard deviation of the noise in units of x.

    Raises:
        ValueError: if ``noise`` is negative or not finite, the support is not real, or the energy
            has no second derivative.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> loss, metrics = ScoreMatching()(Gaussian(torch.zeros(2), scale=1.0), x)
        >>> float(loss.detach())  # 1 / 2 - 2
        -1.5
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= noise < math.inf:
            raise ValueError(f"noise must be finite and not negative, got noise={noise!r}")
        self.noise = float(noise)

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics, means over the batch: ``energy_data``, ``squared_score`` and ``laplacian``. The
        last two have the same expectation if the data are draws of p.
        """
        check_real(self, energy)
        check_rows(batch)
        dims = len(energy.event_shape)
        gradient, diagonal = curvatures(energy, batch, unit_directions(batch, dims))
        squared, laplacian = event_sum(gradient.square(), dims), diagonal.sum(0)
        loss, metrics = score_matching_loss(energy, batch, squared, laplacian)
        if self.noise > 0.0:
            loss = loss + 0.5 * self.noise**2 * diagonal.square().sum(0).mean()
        return loss, metrics


class NonNegativeScoreMatching(Objective):
    r"""Score matching of nonnegative data (Hyvärinen, 2007).

    .. math::

        L = \frac1n \sum_i \sum_j \Big[ \tfrac12 (x_{ij} \, \partial_j E)^2
        - 2 x_{ij} \, \partial_j E - x_{ij}^2 \, \partial_j^2 E \Big]

    which is :math:`\tfrac12 E |x \odot (\nabla \log p_{data} - \nabla \log p)|^2` up to a constant
    that depends only on the data. The factor x makes the boundary terms of partial integration
    vanish, which score matching neglects. L is the loss of :class:`ScoreMatching` for log x, up to
    the constant d / 2, but allows zeros.

    Raises:
        ValueError: if the support is neither positive nor nonnegative, or an entry of the batch is
            negative.

    Example:
        >>> from pyroebm.targets import Exponential
        >>> loss, metrics = NonNegativeScoreMatching()(Exponential(2.0), torch.tensor([0.0, 1.0]))
        >>> float(loss.detach())  # mean of (2 x)^2 / 2 - 4 x
        -1.0
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, the mean over the batch.
        """
        if not any(
            same_support(energy.support, kind)
            for kind in (constraints.positive, constraints.nonnegative)
        ):
            raise ValueError(
                "energy must have positive or nonnegative support for NonNegativeScoreMatching, but"
                f" {type(energy).__name__} has {energy.support}; for real support use ScoreMatching"
            )
        check_rows(batch)
        batch, dims = batch.detach(), len(energy.event_shape)
        if bool((batch < 0.0).any()):
            raise ValueError(
                f"batch must be nonnegative, got {int((batch < 0.0).sum())} negative entries, the"
                f" smallest {float(batch.min())}"
            )
        directions = batch * unit_directions(batch, dims)  # v = x_j e_j: x_j^2 times the diagonal
        gradient, curved = curvatures(energy, batch, directions)
        slopes = batch * gradient
        loss = (event_sum(0.5 * slopes.square() - 2.0 * slopes, dims) - curved.sum(0)).mean()
        return loss, {"energy_data": mean_energy(energy, batch)}


def check_real(objective: Objective, energy: Energy) -> None:
    """Raise ValueError unless the support is R^d: else partial integration has boundary terms."""
    if not is_real(energy.support):
        raise ValueError(
            f"energy must have real support for {type(objective).__name__}, but"
            f" {type(energy).__name__} has {energy.support}. For positive support use"
            " NonNegativeScoreMatching, for other continuous supports Unconstrained(energy) with"
            " its unconstrain(data)"
        )


def score_matching_loss(
    energy: Energy, batch: Tensor, squared: Tensor, laplacian: Tensor
) -> tuple[Tensor, Metrics]:
    r"""Return the mean of :math:`\tfrac12 |\nabla E|^2 - \Delta E`, and its metrics.

    Args:
        energy: E.
        batch: data, ``(n, *event)``.
        squared: :math:`|\nabla E|^2` or an estimate of it, ``(n,)``.
        laplacian: :math:`\Delta E` or an estimate of it, ``(n,)``.
    """
    loss = (0.5 * squared - laplacian).mean()
    return loss, {
        "energy_data": mean_energy(energy, batch),
        "squared_score": squared.detach().mean(),
        "laplacian": laplacian.detach().mean(),
    }


def mean_energy(energy: Energy, batch: Tensor) -> Tensor:
    """Return the mean energy of the data, detached."""
    with torch.no_grad():
        return energy(batch).mean()
