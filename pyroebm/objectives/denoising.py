"""Denoising score matching: noise on the data in place of second derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, score
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.core.supports import event_sum
from pyroebm.objectives.base import Objective
from pyroebm.objectives.score_matching import Facts, check_real, matched

__all__ = ["DenoisingScoreMatching"]


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching (Vincent, "A Connection Between Score Matching and Denoising
    Autoencoders", 2011).

    .. math::

        L = \frac1n \sum_i
        \Big[ \tfrac12 |\nabla E(\tilde x_i)|^2 - \frac{z_i^T \nabla E(\tilde x_i)}{\sigma} \Big],
        \qquad \tilde x_i = x_i + \sigma z_i, \quad z_i \sim N(0, I)

    This is Vincent's :math:`\tfrac12 |\nabla E(\tilde x) - z / \sigma|^2` without :math:`|z|^2 / 2
    \sigma^2`, which no parameter moves. Its mean is :class:`ScoreMatching`'s loss on noised data,
    so values are comparable with that. It fits the **noised** law :math:`p_{data} * N(0, \sigma^2
    I)`, not the data's: a normal law of covariance S becomes :math:`S + \sigma^2 I`.

    With a ladder of :math:`\sigma_k`, each row's is drawn anew with probability :math:`w_k`. The
    energy does not see k, so what is fitted is one law, the mixture :math:`\sum_k w_k \, p_{data} *
    N(0, \sigma_k^2 I)`: wide levels fill the emptiness between modes and give a sampler a way down,
    the narrow ones hold the details.

    As :math:`\sigma \to 0` the second term's variance grows as :math:`1 / \sigma^2`. The control
    variate takes what is of mean zero out of it (Wang et al., "A Wasserstein Minimum Velocity
    Approach to Learning Unnormalized Models", 2020),

    .. math::

        \frac{z^T \big(\nabla E(\tilde x) - \nabla E(x)\big)}{\sigma}
        = z^T \nabla^2 E(x) \, z + O(\sigma)

    so that L tends to sliced score matching, at a second gradient for each row. It pays where
    :math:`\sigma` is small beside the details of E; where it is large :math:`\nabla E(x)` has
    little to do with :math:`\nabla E(\tilde x)` and adds variance.

    Args:
        sigma: :math:`\sigma > 0`, or a ladder of such, standard deviations in units of x.
        weights: :math:`w_k > 0` of a ladder, normalised here; None weighs all alike. The narrowest
            level has the most variance.
        control_variate: subtract :math:`z^T \nabla E(x) / \sigma`.

    Raises:
        ValueError: if a :math:`\sigma` or weight is not positive and finite, their numbers differ,
            or the support is not real.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> noise = torch.Generator().manual_seed(0)
        >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
        >>> objective = DenoisingScoreMatching(0.5, control_variate=True)
        >>> loss, facts = objective(Gaussian(0.0), x, generator=noise)
        >>> round(float(loss.detach()), 2)  # (1 + 0.25) / 2 - 1
        -0.38
    """

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.1,
        weights: Sequence[float] | None = None,
        control_variate: bool = False,
    ) -> None:
        super().__init__()
        self.ladder = tuple(torch.as_tensor(sigma, dtype=torch.float64).flatten().tolist())
        given = (1.0,) * len(self.ladder) if weights is None else tuple(map(float, weights))
        if not self.ladder or not all(0.0 < value < math.inf for value in (*self.ladder, *given)):
            raise ValueError(
                f"sigma and weights must be positive and finite, got sigma={sigma!r},"
                f" weights={weights!r}"
            )
        if len(given) != len(self.ladder):
            raise ValueError(
                f"weights must be as many as sigma has levels, {len(self.ladder)}, got {len(given)}"
            )
        self.weights = tuple(value / sum(given) for value in given)
        self.control_variate = control_variate

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``energy_data`` (of the data without noise), ``squared_score``
        and ``laplacian`` of the noised law, as in :class:`ScoreMatching`."""
        check_real(self, energy)
        energy.check_states(batch, "batch")
        batch, dims = batch.detach(), len(energy.event_shape)
        sigma = self._levels(batch, dims, generator)
        z = standard_normal(batch.shape, generator, batch.dtype, batch.device)
        gradient = -score(energy, batch + sigma * z)
        rise = gradient + score(energy, batch) if self.control_variate else gradient
        return matched(
            energy, batch, event_sum(gradient.square(), dims), event_sum(z * rise / sigma, dims)
        )

    def _levels(self, batch: Tensor, dims: int, generator: torch.Generator | None) -> Tensor:
        """The standard deviation for each event: its shape is the batch's, and ones."""
        ladder = batch.new_tensor(self.ladder)
        if len(ladder) == 1:
            return ladder[0]
        edges = batch.new_tensor(self.weights).cumsum(0)
        shape = (*batch.shape[: batch.dim() - dims], *[1] * dims)
        u = uniform(shape, generator, batch.dtype, batch.device)
        return ladder[torch.searchsorted(edges[:-1], u, right=True)]

    def extra_repr(self) -> str:
        return f"sigma={self.ladder}, control_variate={self.control_variate}"
