"""Sliced score matching: second derivatives along a few random directions, by Hessian-vector
products or differences."""

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
from pyroebm.objectives.base import Objective
from pyroebm.objectives.score_matching import Facts, check_real, matched

__all__ = ["LAWS", "SlicedScoreMatching", "projections_like"]

#: Laws of a random direction v; each has E[v v'] = I, so that E[v' A v] = tr A.
LAWS = ("normal", "rademacher", "sphere")


class SlicedScoreMatching(Objective):
    r"""Sliced score matching (Song et al., "Sliced Score Matching: A Scalable Approach to Density
    and Score Estimation", 2019).

    .. math::

        L = \frac{1}{nM} \sum_{i,m} \Big[ \tfrac12 (v_{im}^T \nabla E(x_i))^2
        - v_{im}^T \nabla^2 E(x_i) \, v_{im} \Big], \qquad E[v v^T] = I

    Its mean over v is :class:`ScoreMatching`'s loss, at M Hessian-vector products in place of d.
    With ``variance_reduced`` the first term is its mean :math:`\tfrac12 |\nabla E|^2`, which for
    normal v and H the Hessian takes :math:`\tfrac12 |\nabla E|^4 - 2 \nabla E^T H \nabla E` off the
    variance: much away from the modes, less than nothing close to them. Both are one objective
    because v is not normalised: the sphere's radius is :math:`\sqrt d`.

    With ``finite_difference`` the second derivative is a difference of energies, at an error of
    order :math:`\epsilon^2` (Pang et al., "Efficient Learning of Generative Models via
    Finite-Difference Score Matching", 2020):

    .. math::

        v^T \nabla^2 E \, v
        \approx \frac{E(x + \epsilon v) + E(x - \epsilon v) - 2 E(x)}{\epsilon^2}, \qquad
        v^T \nabla E \approx \frac{E(x + \epsilon v) - E(x - \epsilon v)}{2 \epsilon}

    Without ``variance_reduced`` it then takes no derivative in x at all. Rounding adds an error of
    some :math:`|E| \, u / \epsilon^2`, with u = 1e-16 in float64 and 6e-8 in float32.

    Args:
        num_projections: M, directions for each row.
        variance_reduced: take :math:`|\nabla E|^2` as it is.
        law: of v: "normal", "rademacher" (signs: the least variance for a trace) or "sphere".
        finite_difference: :math:`\epsilon`, in units of x for an entry of v; None takes
            Hessian-vector products.

    Raises:
        ValueError: if ``num_projections`` < 1, ``law`` is unknown, ``finite_difference`` is not
            positive and finite, the support is not real, or the energy has no second derivative.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> loss, facts = SlicedScoreMatching(law="rademacher")(
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
        law: str = "normal",
        finite_difference: float | None = None,
    ) -> None:
        super().__init__()
        check_counts({"num_projections": 1}, num_projections)
        check_law(law)
        if finite_difference is not None and not 0.0 < finite_difference < math.inf:
            raise ValueError(
                "finite_difference must be positive and finite, got"
                f" finite_difference={finite_difference!r}"
            )
        self.num_projections = num_projections
        self.variance_reduced = variance_reduced
        self.law = law
        self.finite_difference = finite_difference

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data``, and estimates of ``squared_score`` and
        ``laplacian`` as in :class:`ScoreMatching`."""
        check_real(self, energy)
        energy.check_states(batch, "batch")
        batch, dims = batch.detach(), len(energy.event_shape)
        v = projections_like(batch, dims, self.num_projections, self.law, generator)
        if self.finite_difference is None:
            gradient, curved = curvatures(energy, batch, v)
            slopes = event_sum(gradient * v, dims)
        else:
            eps = self.finite_difference
            # one direction at a time: rows stay rows, whatever else the energy knows of them
            ahead, behind = (
                torch.stack([energy(batch + step * u) for u in v]) for step in (eps, -eps)
            )
            here = energy(batch)
            slopes, curved = (ahead - behind) / (2.0 * eps), (ahead + behind - 2.0 * here) / eps**2
            gradient = score(energy, batch) if self.variance_reduced else batch
        squared = (
            event_sum(gradient.square(), dims) if self.variance_reduced else slopes.square().mean(0)
        )
        return matched(energy, batch, squared, curved.mean(0))


def projections_like(
    x: Tensor, event_dims: int, num_projections: int, law: str, generator: torch.Generator | None
) -> Tensor:
    """Random directions for each event of x, ``(count, *x.shape)``, with E[v v'] = I over the d
    entries of an event."""
    shape = (num_projections, *x.shape)
    if law == "rademacher":
        return (uniform(shape, generator, x.dtype, x.device) < 0.5).to(x.dtype) * 2.0 - 1.0
    v = standard_normal(shape, generator, x.dtype, x.device)
    if law == "normal":
        return v
    squared = event_sum(v.square(), event_dims).reshape(
        *shape[: len(shape) - event_dims], *[1] * event_dims
    )
    return v * (entries(x.shape, event_dims) / squared).sqrt()


def entries(shape: Sequence[int], event_dims: int) -> int:
    """Number of entries of an event, the last ``event_dims`` dimensions of a shape."""
    return math.prod(shape[len(shape) - event_dims :])


def check_law(law: str) -> None:
    """ValueError unless ``law`` is one of :data:`LAWS`."""
    if law not in LAWS:
        raise ValueError(f"law must be one of {LAWS}, got law={law!r}")
