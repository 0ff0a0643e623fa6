"""Fisher divergences as measured quantities: how far an energy's gradient is from the truth's,
where the truth is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, value_and_grad
from pyroebm.core.statistics import Estimate
from pyroebm.core.supports import event_sum
from pyroebm.core.wrappers import eval_mode
from pyroebm.objectives.sliced import check_law, projections_like

__all__ = ["fisher_divergence", "sliced_fisher_divergence"]

#: Rows of one evaluation.
ROWS = 4096

Score = Callable[[Tensor], Tensor]


def fisher_divergence(energy: Energy, truth: Energy | Score, x: Tensor) -> Estimate:
    r"""The Fisher divergence of an energy from the law of some draws, of which the score is known.

    .. math:: F = \tfrac12 E_{x \sim p} |\nabla \log p(x) + \nabla E(x)|^2

    It is the excess of :class:`ScoreMatching`'s mean over its minimum. It does not see Z nor, where
    modes lie apart, their weights.

    Args:
        energy: E.
        truth: p as an energy, or its score, a function from ``(n, *event)`` to ``(n, *event)``.
        x: independent draws of p, shape ``(n, *event)`` with n > 1.

    Raises:
        ValueError: if there are fewer than two rows, the truth's score has another shape, or as
            :func:`~pyroebm.core.value_and_grad`.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> p, q = Gaussian(torch.zeros(2), scale=2.0), Gaussian(torch.ones(2), scale=2.0)
        >>> round(fisher_divergence(q, p, p.sample(10)).value, 6)  # |(1/4, 1/4)|^2 / 2, everywhere
        0.0625
    """
    return _half(
        torch.cat([event_sum(gap.square(), gap.dim() - 1) for gap in _gaps(energy, truth, x)])
    )


def sliced_fisher_divergence(
    energy: Energy,
    truth: Energy | Score,
    x: Tensor,
    num_projections: int = 1,
    law: str = "normal",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The sliced Fisher divergence (Song et al., 2019), with directions of :math:`E[v v^T] = I`.

    .. math:: F_v = \tfrac12 E_{x \sim p} E_v \big( v^T (\nabla \log p(x) + \nabla E(x)) \big)^2 = F

    Its mean is :func:`fisher_divergence`, its variance is larger: it is the yardstick of sliced
    objectives.

    Args:
        energy, truth, x: as in :func:`fisher_divergence`.
        num_projections: directions for each row.
        law: of a direction, as in :class:`SlicedScoreMatching`.
        generator: source of the directions.

    Raises:
        ValueError: as :func:`fisher_divergence`, and if ``num_projections`` < 1 or ``law`` is
            unknown.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> p, q = Gaussian(torch.zeros(1), scale=2.0), Gaussian(torch.ones(1), scale=2.0)
        >>> found = sliced_fisher_divergence(q, p, p.sample(10), law="rademacher")
        >>> round(found.value, 6)  # signs are exact for one entry
        0.03125
    """
    check_counts({"num_projections": 1}, num_projections)
    check_law(law)
    found = []
    for gap in _gaps(energy, truth, x):
        v = projections_like(gap, gap.dim() - 1, num_projections, law, generator)
        found.append(event_sum(v * gap, gap.dim() - 1).square().mean(0))
    return _half(torch.cat(found))


def _gaps(energy: Energy, truth: Energy | Score, x: Tensor) -> list[Tensor]:
    """The difference of the two scores at each row."""
    energy.check_states(x)
    if x.dim() != len(energy.event_shape) + 1 or len(x) < 2:
        raise ValueError(
            f"x must be at least two rows of events of shape {tuple(energy.event_shape)}, got"
            f" shape {tuple(x.shape)}"
        )
    found = []
    with eval_mode(energy):
        for rows in x.split(ROWS):
            true = (
                -value_and_grad(truth, rows)[1]
                if isinstance(truth, Energy)
                else truth(rows).detach()
            )
            if true.shape != rows.shape:
                raise ValueError(
                    f"truth must give a score of the shape of x, {tuple(rows.shape)}, got"
                    f" {tuple(true.shape)}"
                )
            found.append(true + value_and_grad(energy, rows)[1])
    return found


def _half(squares: Tensor) -> Estimate:
    return Estimate.of(0.5 * squares.double())
