"""Score matching: an energy fitted through its gradient in x, which knows nothing of Z. Exact
second derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.derivatives import curvatures, unit_directions
from pyroebm.core.energy import Energy
from pyroebm.core.supports import event_sum, is_real, same_support
from pyroebm.objectives.base import Objective

__all__ = ["NonNegativeScoreMatching", "ScoreMatching"]

Facts = dict[str, Tensor]


class ScoreMatching(Objective):
    r"""Score matching (Hyvärinen, "Estimation of Non-Normalized Statistical Models by Score
    Matching", 2005).

    .. math:: L = \frac1n \sum_i \Big[ \tfrac12 |\nabla E(x_i)|^2 - \Delta E(x_i) \Big]
        \;\to\; \tfrac12 E_{p_{data}} |\nabla \log p_{data} - \nabla \log p|^2 - \tfrac12
        E_{p_{data}} |\nabla \log p_{data}|^2

    The Laplacian is exact: d Hessian-vector products for events of d entries, of any shape. So L is
    for small d; sliced and denoising score matching are for large. L differs from the Fisher
    divergence by what depends on the data alone: its value is comparable between models, and says
    nothing of the weights of modes with emptiness between them.

    With ``noise`` the term of Kingma and LeCun ("Regularized Estimation of Image Statistics by
    Score Matching", 2010) is added,

    .. math:: \tfrac12 \sigma^2 \, \frac1n \sum_i \sum_j \big(\partial_j^2 E(x_i)\big)^2

    which is what noise on the data would do if the score were linear over its width, without the
    Hessian's entries off the diagonal: it keeps peaks of the density from growing on single
    examples and on the grid of quantized data.

    Args:
        noise: :math:`\sigma \ge 0`, the noise's standard deviation in units of x.

    Raises:
        ValueError: if ``noise`` is negative or not finite, the support is not real, or the energy
            has no second derivative.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> loss, facts = ScoreMatching()(Gaussian(torch.zeros(2), scale=1.0), x)
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
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, ``squared_score`` and ``laplacian``, means over
        the batch; the last two are equal in the long run where the data are draws of p."""
        check_real(self, energy)
        dims = len(energy.event_shape)
        gradient, diagonal = curvatures(energy, batch, unit_directions(batch, dims))
        squared, laplacian = event_sum(gradient.square(), dims), diagonal.sum(0)
        loss, facts = matched(energy, batch, squared, laplacian)
        if self.noise > 0.0:
            loss = loss + 0.5 * self.noise**2 * diagonal.square().sum(0).mean()
        return loss, facts


class NonNegativeScoreMatching(Objective):
    r"""Score matching of data that are not negative (Hyvärinen, "Some Extensions of Score
    Matching", 2007).

    .. math::

        L = \frac1n \sum_i \sum_j \Big[ \tfrac12 (x_{ij} \, \partial_j E)^2
        - 2 x_{ij} \, \partial_j E - x_{ij}^2 \, \partial_j^2 E \Big]

    which is :math:`\tfrac12 E |x \odot (\nabla \log p_{data} - \nabla \log p)|^2` up to what
    depends on the data alone. The weight x makes the terms at the edge vanish, where plain score
    matching is wrong unless the density does. It is plain score matching of log x, up to the
    constant d / 2, and takes zeros too.

    Raises:
        ValueError: if the support is neither positive nor nonnegative, or an entry of the batch is
            negative.

    Example:
        >>> from pyroebm.targets import Exponential
        >>> loss, facts = NonNegativeScoreMatching()(Exponential(2.0), torch.tensor([0.0, 1.0]))
        >>> float(loss.detach())  # mean of (2 x)^2 / 2 - 4 x
        -1.0
    """

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, a mean over the batch."""
        if not any(
            same_support(energy.support, kind)
            for kind in (constraints.positive, constraints.nonnegative)
        ):
            raise ValueError(
                "NonNegativeScoreMatching is for positive or nonnegative supports, but"
                f" {type(energy).__name__} has"
                f" {energy.support}: ScoreMatching is for real ones"
            )
        batch, dims = batch.detach(), len(energy.event_shape)
        if bool((batch < 0.0).any()):
            raise ValueError(
                f"batch must not be negative, got {int((batch < 0.0).sum())} entries that are,"
                f" least {float(batch.min())}"
            )
        directions = batch * unit_directions(batch, dims)  # v = x_j e_j: x_j^2 times the diagonal
        gradient, curved = curvatures(energy, batch, directions)
        slopes = batch * gradient
        loss = (event_sum(0.5 * slopes.square() - 2.0 * slopes, dims) - curved.sum(0)).mean()
        return loss, {"energy_data": mean_energy(energy, batch)}


def check_real(objective: Objective, energy: Energy) -> None:
    """ValueError unless the support is all of R^d: at an edge partial integration leaves a term
    that nobody computes."""
    if not is_real(energy.support):
        raise ValueError(
            f"{type(objective).__name__} is for real supports, but {type(energy).__name__} has"
            f" {energy.support}:"
            " NonNegativeScoreMatching is for positive ones, and Unconstrained(energy) with its"
            " unconstrain(data) for other"
            " continuous ones"
        )


def matched(
    energy: Energy, batch: Tensor, squared: Tensor, laplacian: Tensor
) -> tuple[Tensor, Facts]:
    r"""The mean of :math:`\tfrac12 |\nabla E|^2 - \Delta E`, or of estimates of the two, and the
    facts of score matching."""
    loss = (0.5 * squared - laplacian).mean()
    return loss, {
        "energy_data": mean_energy(energy, batch),
        "squared_score": squared.detach().mean(),
        "laplacian": laplacian.detach().mean(),
    }


def mean_energy(energy: Energy, batch: Tensor) -> Tensor:
    """Mean energy of the data, detached."""
    with torch.no_grad():
        return energy(batch).mean()
