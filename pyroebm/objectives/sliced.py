"""Sliced score matching: second derivatives along a few random directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.derivatives import curvatures
from pyroebm.core.energy import Energy, score
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.core.supports import event_sum
from pyroebm.objectives.base import Objective, check_rows
from pyroebm.objectives.score_matching import Metrics, check_real, score_matching_loss

__all__ = ["DISTRIBUTIONS", "SlicedScoreMatching", "projections_like"]

#: Distributions of a random direction v; each has E[v v'] = I, so that E[v' A v] = tr A.
DISTRIBUTIONS = ("normal", "rademacher", "sphere")


class SlicedScoreMatching(Objective):
    r"""Sliced score matching (Song et al., 2019).

    .. math::

        L = \frac{1}{nM} \sum_{i,m} \Big[ \tfrac12 (v_{im}^T \nabla E(x_i))^2
        - v_{im}^T \nabla^2 E(x_i) \, v_{im} \Big], \qquad E[v v^T] = I

    Its expectation over v is the loss of :class:`ScoreMatching`, at the cost of M Hessian-vector
    products instead of d. With ``variance_reduced`` the first term is replaced by its expectation
    :math:`\tfrac12 |\nabla E|^2`. For normal v and Hessian H this reduces the variance by
    :math:`\tfrac12 |\nabla E|^4 - 2 \nabla E^T H \nabla E`, which is large far from the modes and
    negative close to them. Both have the same expectation because v is not normalized: the radius
    of the sphere is :math:`\sqrt d`.

    With ``finite_difference`` the second derivative is a difference of energies, with an error of
    order :math:`\epsilon^2` (Pang et al., 2020):

    .. math::

        v^T \nabla^2 E \, v
        \approx \frac{E(x + \epsilon v) + E(x - \epsilon v) - 2 E(x)}{\epsilon^2}, \qquad
        v^T \nabla E \approx \frac{E(x + \epsilon v) - E(x - \epsilon v)}{2 \epsilon}

    Without ``variance_reduced`` it then needs no derivative in x. The rounding error is about
    :math:`|E| \, u / \epsilon^2`, with u = 1e-16 in float64 and 6e-8 in float32.

    Args:
        num_projections: M, number of directions for each row.
        variance_reduced: whether to use :math:`|\nabla E|^2` in the first term.
        distribution: distribution of v: "normal", "rademacher" (random signs, which have the
            smallest variance for a trace) or "sphere".
        finite_difference: :math:`\epsilon`, in units of x for an entry of v; None uses
            Hessian-vector products.

    Raises:
        ValueError: if ``num_projections`` < 1, ``distribution`` is unknown, ``finite_difference``
            is not positive and finite, the support is not real, or the energy has no second
            derivative.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> loss, metrics = SlicedScoreMatching(distribution="rademacher")(
        ...     Gaussian(torch.zeros(2), scale=1.0), x
        ... )
        >>> float(loss.detach())  # signs are exact for a diagonal Hessian
        -1.5
    """

    def __init__(
        self,
        num_projections: int = 1,
        *,
        variance_reduced: bool = True,
        distribution: str = "normal",
        finite_difference: float | None = None,
    ) -> None:
        super().__init__()
        check_counts({"num_projections": 1}, num_projections)
        check_distribution(distribution)
        if finite_difference is not None and not 0.0 < finite_difference < math.inf:
            raise ValueError(
                "finite_difference must be positive and finite, got"
                f" finite_difference={finite_difference!r}"
            )
        self.num_projections = num_projections
        self.variance_reduced = variance_reduced
        self.distribution = distribution
        self.finite_difference = finite_difference

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, and estimates of ``squared_score`` and ``laplacian`` as in
        :class:`ScoreMatching`.
        """
        check_real(self, energy)
        check_rows(batch)
        energy.check_states(batch, "batch")
        batch, dims = batch.detach(), len(energy.event_shape)
        v = projections_like(batch, dims, self.num_projections, self.distribution, generator)
        if self.finite_difference is None:
            gradient, curved = curvatures(energy, batch, v)
            slopes = event_sum(gradient * v, dims)
        else:
            eps = self.finite_difference
            # one direction at a time, since an energy may depend on the number of rows, as
            # ClassifierEnergy.given(y) does
            ahead, behind = (
                torch.stack([energy(batch + step * u) for u in v]) for step in (eps, -eps)
            )
            here = energy(batch)
            slopes, curved = (ahead - behind) / (2.0 * eps), (ahead + behind - 2.0 * here) / eps**2
            gradient = score(energy, batch) if self.variance_reduced else batch
        squared = (
            event_sum(gradient.square(), dims) if self.variance_reduced else slopes.square().mean(0)
        )
        return score_matching_loss(energy, batch, squared, curved.mean(0))


def projections_like(
    x: Tensor,
    event_dims: int,
    num_projections: int,
    distribution: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw random directions for each event of x, ``(num_projections, *x.shape)``.

    They have E[v v'] = I over the d entries of an event.
    """
    shape = (num_projections, *x.shape)
    if distribution == "rademacher":
        return (uniform(shape, generator, x.dtype, x.device) < 0.5).to(x.dtype) * 2.0 - 1.0
    v = standard_normal(shape, generator, x.dtype, x.device)
    if distribution == "normal":
        return v
    squared = event_sum(v.square(), event_dims).reshape(
        *shape[: len(shape) - event_dims], *[1] * event_dims
    )
    return v * (entries(x.shape, event_dims) / squared).sqrt()


def entries(shape: Sequence[int], event_dims: int) -> int:
    """Return the number of entries of an event, the last ``event_dims`` dimensions of a shape."""
    return math.prod(shape[len(shape) - event_dims :])


def check_distribution(distribution: str) -> None:
    """Raise ValueError unless ``distribution`` is one of :data:`DISTRIBUTIONS`."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {DISTRIBUTIONS}, got distribution={distribution!r}"
        )
