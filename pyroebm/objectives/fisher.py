"""Fisher divergences of an energy from a distribution with a known score, as metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, value_and_grad
from pyroebm.core.statistics import Estimate
from pyroebm.core.supports import event_sum
from pyroebm.core.wrappers import eval_mode
from pyroebm.objectives.sliced import check_distribution, projections_like

__all__ = ["fisher_divergence", "sliced_fisher_divergence"]

#: Number of rows of one evaluation.
ROWS = 4096

Score = Callable[[Tensor], Tensor]


def fisher_divergence(energy: Energy, truth: Energy | Score, x: Tensor) -> Estimate:
    r"""Estimate the Fisher divergence of an energy from a distribution p with a known score.

    .. math:: F = \tfrac12 E_{x \sim p} |\nabla \log p(x) + \nabla E(x)|^2

    It is the expected loss of :class:`ScoreMatching` minus its minimum. It does not depend on Z,
    and hardly on the weights of separated modes.

    Args:
        energy: E.
        truth: p as an energy, or its score, a function from ``(n, *event)`` to ``(n, *event)``.
        x: independent draws of p, shape ``(n, *event)`` with n > 1.

    Returns:
        The mean over the draws, with its standard error.

    Raises:
        ValueError: if there are fewer than two rows, the score of the truth has another shape, or
            as :func:`~pyroebm.core.value_and_grad`.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> p, q = Gaussian(torch.zeros(2), scale=2.0), Gaussian(torch.ones(2), scale=2.0)
        >>> round(fisher_divergence(q, p, p.sample(10)).value, 6)  # |(1/4, 1/4)|^2 / 2, everywhere
        0.0625
    """
    return _half(
        torch.cat(
            [event_sum(d.square(), d.dim() - 1) for d in _score_differences(energy, truth, x)]
        )
    )


def sliced_fisher_divergence(
    energy: Energy,
    truth: Energy | Score,
    x: Tensor,
    num_projections: int = 1,
    distribution: str = "normal",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate the sliced Fisher divergence of an energy (Song et al., 2019).

    .. math:: F_v = \tfrac12 E_{x \sim p} E_v \big( v^T (\nabla \log p(x) + \nabla E(x)) \big)^2 = F

    with random directions v of :math:`E[v v^T] = I`. Its expectation is that of
    :func:`fisher_divergence`, its variance is larger.

    Args:
        energy: as in :func:`fisher_divergence`.
        truth: as in :func:`fisher_divergence`.
        x: as in :func:`fisher_divergence`.
        num_projections: number of directions for each row.
        distribution: distribution of a direction, as in :class:`SlicedScoreMatching`.
        generator: source of the directions; None is torch's default generator.

    Returns:
        The mean over the draws, with its standard error.

    Raises:
        ValueError: as :func:`fisher_divergence`, and if ``num_projections`` < 1 or ``distribution``
            is unknown.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> p, q = Gaussian(torch.zeros(1), scale=2.0), Gaussian(torch.ones(1), scale=2.0)
        >>> found = sliced_fisher_divergence(q, p, p.sample(10), distribution="rademacher")
        >>> round(found.value, 6)  # signs are exact for one entry
        0.03125
    """
    check_counts({"num_projections": 1}, num_projections)
    check_distribution(distribution)
    found = []
    for d in _score_differences(energy, truth, x):
        v = projections_like(d, d.dim() - 1, num_projections, distribution, generator)
        found.append(event_sum(v * d, d.dim() - 1).square().mean(0))
    return _half(torch.cat(found))


def _score_differences(energy: Energy, truth: Energy | Score, x: Tensor) -> list[Tensor]:
    """Return the difference of the two scores at each row, in parts of ``ROWS`` rows."""
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
