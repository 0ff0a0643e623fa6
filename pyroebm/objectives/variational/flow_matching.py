"""Flow matching for a velocity that is linear in its weights, by a linear solve."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.arrays import as_tensor
from pyroebm.core.progress import Progress
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.flows.equivariant import EquivariantFlow

__all__ = ["match_flow"]

#: Number of pairs that are processed at once.
BATCH_SIZE = 500


@torch.no_grad()
def match_flow(
    flow: EquivariantFlow,
    draws: Tensor | np.ndarray,
    num_pairs: int = 20_000,
    ridge: float = 1e-4,
    *,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> float:
    r"""Fit a flow to draws by conditional flow matching, in place (Lipman et al., 2023).

    .. math::

        \min_w E\, |v_w(u_t, t) - (u - z)|^2 + \lambda |w|^2, \qquad u_t = (1 - t) z + t u, \quad
        z \sim N(0, I), \quad t \sim U(0, 1)

    with draws u and noise z paired at random. The velocity that minimizes the first term transports
    N(0, I) to the distribution of the draws. Here it is linear in its weights, :math:`v_w = F w`,
    so the minimum is :math:`(E\, F^\top F + \lambda)^{-1}\, E\, F^\top (u - z)`, without an
    optimizer and without integrating the flow. The result is a good start for :class:`ForwardKL`.

    Args:
        flow: the flow, whose weights are replaced.
        draws: u, shape ``(n, d)``: a tensor of the flow's dtype, or a NumPy array.
        num_pairs: number of pairs of a draw and noise; draws are chosen with replacement.
        ridge: :math:`\lambda`, in units of the mean diagonal of :math:`E\, F^\top F`; positive,
            since some weights may belong to distances that no pair has.
        generator: source of the pairs; None is torch's default generator.
        progress: True shows progress, False hides it, None shows it after one second.

    Returns:
        The fraction of :math:`E |u - z|^2` that the velocity explains. Paths of pairs cross, so it
        is far below 1 even if the flow has the distribution of the draws.

    Raises:
        ValueError: if a number is out of range, or the draws do not fit the flow or are not finite.

    Example:
        >>> from pyroebm.core.rng import seeded_generator
        >>> flow = EquivariantFlow(3, 2)
        >>> draws = 2.0 * torch.randn(5000, 4, generator=seeded_generator(0))
        >>> round(match_flow(flow, draws), 1)
        0.4
        >>> round(
        ...     float(
        ...         flow.forward_and_log_prob(flow.rsample_base(5000, seeded_generator(1)))[0]
        ...         .std()
        ...         .detach()
        ...     ),
        ...     1,
        ... )
        2.0
    """
    check_counts({"num_pairs": 1}, num_pairs)
    if not 0.0 < ridge < math.inf:
        raise ValueError(f"ridge must be positive and finite, got ridge={ridge}")
    draws = as_tensor(draws, flow.dtype, flow.device, "draws")
    if (
        draws.dim() != 2
        or not len(draws)
        or draws.shape[1] != flow.dim
        or draws.dtype != flow.dtype
    ):
        raise ValueError(
            f"draws must have shape (n, {flow.dim}) and the flow's dtype {flow.dtype}, got shape"
            f" {tuple(draws.shape)} and {draws.dtype}"
        )
    if not bool(torch.isfinite(draws).all()):
        raise ValueError(
            f"draws must be finite, got {int((~torch.isfinite(draws)).sum())} entries that are not"
        )
    weights = flow.field.weights
    gram = torch.zeros(weights.numel(), weights.numel(), dtype=torch.float64, device=flow.device)
    moment, total = gram.new_zeros(len(gram)), 0.0
    with Progress(num_pairs, "match_flow", "pair", progress) as shown:
        for start in range(0, num_pairs, BATCH_SIZE):
            n = min(BATCH_SIZE, num_pairs - start)
            chosen = (uniform((n,), generator, torch.float64, flow.device) * len(draws)).long()
            u, z = draws[chosen], standard_normal((n, flow.dim), generator, flow.dtype, flow.device)
            t = uniform((n,), generator, flow.dtype, flow.device)
            features = (
                flow.field.features(torch.lerp(z, u, t.unsqueeze(-1)), t)
                .reshape(n * flow.dim, -1)
                .double()
            )
            target = (u - z).flatten().double()
            gram += features.mT @ features
            moment += features.mT @ target
            total += float(target.square().sum())
            shown.update(n)
    found = torch.linalg.solve(
        gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), moment
    )
    weights.copy_(found.view_as(weights))
    return float(2.0 * found @ moment - found @ gram @ found) / total
