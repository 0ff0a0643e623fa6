"""Denoising score matching: score matching without second derivatives, on noised data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, score
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.core.supports import event_sum
from pyroebm.objectives.base import Objective, check_rows
from pyroebm.objectives.score_matching import Metrics, check_real, score_matching_loss

__all__ = ["DenoisingScoreMatching"]


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching (Vincent, 2011).

    .. math::

        L = \frac1n \sum_i
        \Big[ \tfrac12 |\nabla E(\tilde x_i)|^2 - \frac{z_i^T \nabla E(\tilde x_i)}{\sigma} \Big],
        \qquad \tilde x_i = x_i + \sigma z_i, \quad z_i \sim N(0, I)

    This is Vincent's :math:`\tfrac12 |\nabla E(\tilde x) - z / \sigma|^2` without the constant
    :math:`|z|^2 / 2 \sigma^2`. Its expectation is the loss of :class:`ScoreMatching` on noised
    data, so the values are comparable. It fits the **noised** distribution :math:`p_{data} * N(0,
    \sigma^2 I)`, not that of the data: the covariance S of a normal distribution becomes :math:`S +
    \sigma^2 I`.

    With several noise levels :math:`\sigma_k`, the level of each row is drawn with probability
    :math:`w_k` at each call. The energy does not depend on k, so it is fitted to the mixture
    :math:`\sum_k w_k \, p_{data} * N(0, \sigma_k^2 I)`. Large levels give gradients in the regions
    between modes, which helps samplers; small levels resolve details.

    As :math:`\sigma \to 0` the variance of the second term grows as :math:`1 / \sigma^2`. The
    control variate subtracts a term of mean zero (Wang et al., 2020),

    .. math::

        \frac{z^T \big(\nabla E(\tilde x) - \nabla E(x)\big)}{\sigma}
        = z^T \nabla^2 E(x) \, z + O(\sigma)

    so that L converges to sliced score matching, at the cost of a second gradient for each row. It
    reduces the variance where :math:`\sigma` is small compared to the length scale of E, and
    increases it where :math:`\nabla E(x)` and :math:`\nabla E(\tilde x)` are hardly correlated.

    Args:
        sigma: noise level :math:`\sigma > 0`, or several, standard deviations in units of x.
        weights: :math:`w_k > 0` of the noise levels, normalized here; None for equal weights. The
            smallest level has the largest variance.
        control_variate: whether to subtract :math:`z^T \nabla E(x) / \sigma`.

    Raises:
        ValueError: if a noise level or weight is not positive and finite, their numbers differ, or
            the support is not real.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> noise = torch.Generator().manual_seed(0)
        >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
        >>> objective = DenoisingScoreMatching(0.5, control_variate=True)
        >>> loss, metrics = objective(Gaussian(0.0), x, generator=noise)
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
        self.sigmas = tuple(torch.as_tensor(sigma, dtype=torch.float64).flatten().tolist())
        given = (1.0,) * len(self.sigmas) if weights is None else tuple(map(float, weights))
        if not self.sigmas or not all(0.0 < value < math.inf for value in (*self.sigmas, *given)):
            raise ValueError(
                f"sigma and weights must be positive and finite, got sigma={sigma!r},"
                f" weights={weights!r}"
            )
        if len(given) != len(self.sigmas):
            raise ValueError(
                "weights must have one number for each noise level of sigma,"
                f" {len(self.sigmas)}, got {len(given)}"
            )
        self.weights = tuple(value / sum(given) for value in given)
        self.control_variate = control_variate

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data`` (of the data without noise), ``squared_score`` and ``laplacian`` on
        noised data, as in :class:`ScoreMatching`.
        """
        check_real(self, energy)
        check_rows(batch)
        energy.check_states(batch, "batch")
        batch, dims = batch.detach(), len(energy.event_shape)
        sigma = self._draw_levels(batch, dims, generator)
        z = standard_normal(batch.shape, generator, batch.dtype, batch.device)
        gradient = -score(energy, batch + sigma * z)
        rise = gradient + score(energy, batch) if self.control_variate else gradient
        return score_matching_loss(
            energy, batch, event_sum(gradient.square(), dims), event_sum(z * rise / sigma, dims)
        )

    def _draw_levels(self, batch: Tensor, dims: int, generator: torch.Generator | None) -> Tensor:
        """Draw a noise level for each event, in a shape that broadcasts to the batch."""
        sigmas = batch.new_tensor(self.sigmas)
        if len(sigmas) == 1:
            return sigmas[0]
        edges = batch.new_tensor(self.weights).cumsum(0)
        shape = (*batch.shape[: batch.dim() - dims], *[1] * dims)
        u = uniform(shape, generator, batch.dtype, batch.device)
        return sigmas[torch.searchsorted(edges[:-1], u, right=True)]

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"sigma={self.sigmas}, control_variate={self.control_variate}"
