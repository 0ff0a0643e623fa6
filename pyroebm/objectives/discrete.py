"""Objectives of discrete energies that need neither log Z nor a chain.

They compare each state with its neighbors, the states that differ at one site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.core.supports import is_discrete
from pyroebm.kernels.sites import squared_distances, to_sites, values_of
from pyroebm.objectives.base import Objective, check_rows

__all__ = ["MinimumProbabilityFlow", "Pseudolikelihood", "RatioMatching", "SiteObjective"]

Metrics = dict[str, Tensor]


class SiteObjective(Objective):
    r"""Base class of objectives that are a sum over sites of functions of energy differences.

    .. math::

        L = \frac1n \sum_i \sum_s \ell\big(\{E(x_i) - E(x_s', x_{i, -s}) : x_s' \ne x_{is}\}\big)

    These differences are :math:`\log p(x') - \log p(x)`, in which log Z cancels. A subclass defines
    :math:`\ell` in :meth:`score`. Any discrete support is allowed: binary units, spins, one-hot
    vectors, bounded integers. One call evaluates the energy at n x sites x (K - 1) neighbors.

    Args:
        num_sites: number of sites that are evaluated in each row, drawn at random without
            replacement. Their sum is scaled to all sites, so value and gradient are unbiased. None
            evaluates all sites.

    Raises:
        ValueError: if the support is not discrete, a row is not in it, or ``num_sites`` is not in 1
            to the number of sites.

    Example:
        >>> from pyroebm.energies import Ising
        >>> class LargestRatio(SiteObjective):
        ...     def score(self, log_ratios):
        ...         return log_ratios.amax(2)
        >>> float(
        ...     LargestRatio()(Ising((4,), coupling=1.0), torch.ones(1, 4))[0]
        ... )  # each flip costs 4
        -16.0
    """

    def __init__(self, num_sites: int | None = None) -> None:
        super().__init__()
        if num_sites is not None and (
            isinstance(num_sites, bool) or not isinstance(num_sites, int) or num_sites < 1
        ):
            raise ValueError(
                f"num_sites must be an integer of at least 1, or None for all, got"
                f" num_sites={num_sites!r}"
            )
        self.num_sites = num_sites

    def score(self, log_ratios: Tensor) -> Tensor:
        r"""Compute :math:`\ell` of each site.

        Args:
            log_ratios: :math:`\log p(x') - \log p(x)` of the K - 1 neighbors, ``(n, sites, K -
                1)``.

        Returns:
            The terms of the loss, ``(n, sites)``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define score(log_ratios): (n, sites, K - 1) -> (n, sites)"
        )

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics, means over the batch: ``energy_data`` and ``pseudo_log_likelihood``, which is the
        same for all subclasses.
        """
        check_rows(batch)
        data, log_ratios, scale = self._neighbors(energy, batch, generator)
        loss = scale * self.score(log_ratios).sum(1).mean()
        pseudo = scale * _log_conditional(log_ratios.detach()).sum(1).mean()
        return loss, {"energy_data": data.detach().mean(), "pseudo_log_likelihood": pseudo}

    def _neighbors(
        self, energy: Energy, batch: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, float]:
        """Return the energies of the rows, their differences to the neighbors, and the scale.

        The scale is the number of sites divided by the number of evaluated ones.
        """
        energy.check_states(batch, "batch")
        if not is_discrete(energy.support):
            raise ValueError(
                f"{type(self).__name__} is for discrete supports, but {type(energy).__name__} has"
                f" {energy.support}"
            )
        values = values_of(energy, batch)
        x = to_sites(batch, values)
        chosen = self._sites(x[..., 0], generator)
        # the index of each site's value, (n, sites)
        distances, own = squared_distances(x, values).min(1)
        if not bool((distances == 0.0).all()):
            raise ValueError(
                f"batch must hold states of {type(energy).__name__}, support {energy.support}, got"
                " other values"
            )
        others = (
            own.gather(1, chosen).unsqueeze(2) + torch.arange(1, len(values), device=x.device)
        ) % len(values)
        count = chosen.shape[1]
        around = x[:, None, None].repeat(1, count, len(values) - 1, 1, 1)
        row, place = (
            torch.arange(len(x), device=x.device)[:, None],
            torch.arange(count, device=x.device),
        )
        around[row, place, :, chosen] = values[others]
        data = energy(batch)
        log_ratios = data[:, None, None] - energy(
            around.reshape(*around.shape[:3], *energy.event_shape)
        )
        return data, log_ratios, x.shape[1] / count

    def _sites(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the indices of the sites that are evaluated in each row, ``(n, sites)``."""
        if self.num_sites is None:
            return torch.arange(like.shape[1], device=like.device).expand(like.shape)
        if self.num_sites > like.shape[1]:
            raise ValueError(
                f"num_sites must be at most the {like.shape[1]} sites of an event, got"
                f" num_sites={self.num_sites}"
            )
        return uniform(like.shape, generator, like.dtype, like.device).argsort(1)[
            :, : self.num_sites
        ]


def _with_own(log_ratios: Tensor) -> Tensor:
    """Prepend the log ratio 0 of a site's own value: ``(n, sites, K)``."""
    return torch.cat([torch.zeros_like(log_ratios[..., :1]), log_ratios], 2)


def _log_conditional(log_ratios: Tensor) -> Tensor:
    r"""Return :math:`\log p(x_s \mid x_{-s})`, ``(n, sites)``."""
    return -_with_own(log_ratios).logsumexp(2)


class Pseudolikelihood(SiteObjective):
    r"""Negative mean log-pseudolikelihood: each site given all others (Besag, 1975).

    .. math:: L = -\frac1n \sum_i \sum_s \log p(x_{is} \mid x_{i, -s})
        = \frac1n \sum_i \sum_s \log\Big(1 + \sum_{x_s' \ne x_{is}} e^{E(x_i) - E(x_s', x_{i,
        -s})}\Big)

    It is consistent. In training it can improve while the likelihood decreases.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, metrics = Pseudolikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2
        2.7726
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        """Return the negative logarithm of the conditional probability of each site."""
        return -_log_conditional(log_ratios)


class RatioMatching(SiteObjective):
    r"""Ratio matching: squared conditional probabilities of the other values (Hyvärinen, 2007).

    .. math:: L = \frac1n \sum_i \sum_s \Big(1 + \frac{p(x_i)}{p(\bar x_i^s)}\Big)^{-2}
        = \frac1n \sum_i \sum_s \big(1 - p(x_{is} \mid x_{i, -s})\big)^2

    with :math:`\bar x^s` the state x with site s flipped. This is the quadratic score (Brier, 1950)
    of the conditional distributions, where the pseudolikelihood is their logarithmic score. It is
    bounded, so outliers have little weight, and consistent. For sites with K values the loss is

    .. math:: \tfrac12 \sum_k \big(1[x_s = k] - p(x_s = k \mid x_{-s})\big)^2,

    half the quadratic score, which equals the published one for K = 2 and is proper for every K.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, metrics = RatioMatching()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> float(loss.detach())  # 4 sites, each (1 / 2)^2
        1.0
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        """Return half the quadratic score of the conditional distribution of each site."""
        p = _with_own(log_ratios).softmax(2)
        others = p[..., 1:]
        # 1 - p of the site's own value, as a sum, to avoid cancellation
        return 0.5 * (others.sum(2).square() + others.square().sum(2))


class MinimumProbabilityFlow(SiteObjective):
    r"""Minimum probability flow (Sohl-Dickstein, Battaglino and DeWeese, 2011).

    .. math::

        L = \frac1n \sum_i \sum_s \sum_{x_s' \ne x_{is}} e^{\frac12 (E(x_i) - E(x_s', x_{i, -s}))}

    L is the rate at which probability flows from the data to neighboring states under dynamics that
    leave the model invariant. It is convex in E and consistent. The published sum omits neighbors
    that are in the data; here it is over all neighbors, so that L is a mean over rows for every
    batch. The minimum is the same if the model contains the distribution of the data. A row that is
    far less probable than a neighbor has exponentially large weight: start from small weights.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, metrics = MinimumProbabilityFlow()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> float(loss.detach())  # 4 equally probable neighbors
        4.0
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        """Return the rate of probability flow from each site to its neighbors."""
        return torch.exp(0.5 * log_ratios).sum(2)
