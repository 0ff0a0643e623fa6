"""Objectives of discrete energies that compare each state with its neighbours, one site away: no
log Z, no chain."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.core.supports import is_discrete
from pyroebm.kernels.sites import squared_distances, to_sites, values_of
from pyroebm.objectives.base import Objective

__all__ = ["MinimumProbabilityFlow", "Pseudolikelihood", "RatioMatching", "SiteObjective"]

Facts = dict[str, Tensor]


class SiteObjective(Objective):
    r"""A sum over sites of what a subclass makes of the energies of the states that differ at that
    site alone.

    .. math::

        L = \frac1n \sum_i \sum_s \ell\big(\{E(x_i) - E(x_s', x_{i, -s}) : x_s' \ne x_{is}\}\big)

    These differences are :math:`\log p(x') - \log p(x)`: log Z is in none of them. Any discrete
    support will do: bits, spins, one-hot rows, bounded integers. One call evaluates the energy at n
    x sites x (K - 1) neighbours.

    Args:
        num_sites: number of sites to look at in each row, drawn at random without replacement;
            their sum is scaled up to all sites, which leaves value and gradient unbiased. None
            looks at all.

    Raises:
        ValueError: if the support is not discrete, a row is not in it, or ``num_sites`` is not from
            1 to the number of sites.

    Example:
        >>> from pyroebm.energies import Ising
        >>> class Worst(SiteObjective):
        ...     def score(self, log_ratios):
        ...         return log_ratios.amax(2)
        >>> float(Worst()(Ising((4,), coupling=1.0), torch.ones(1, 4))[0])  # each flip costs 4
        -16.0
    """

    def __init__(self, num_sites: int | None = None) -> None:
        super().__init__()
        if num_sites is not None and (
            isinstance(num_sites, bool) or not isinstance(num_sites, int) or num_sites < 1
        ):
            raise ValueError(
                f"num_sites must be a whole number of at least 1, or None for all, got"
                f" num_sites={num_sites!r}"
            )
        self.num_sites = num_sites

    def score(self, log_ratios: Tensor) -> Tensor:
        r""":math:`\ell` of each site: :math:`\log p(x') - \log p(x)` of its K - 1 neighbours ``(n,
        sites, K - 1)`` to ``(n, sites)``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define score(log_ratios): (n, sites, K - 1) -> (n, sites)"
        )

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts, means over the batch: ``energy_data`` and
        ``pseudo_log_likelihood``, which is the same for all objectives of sites."""
        data, log_ratios, scale = self._neighbours(energy, batch, generator)
        loss = scale * self.score(log_ratios).sum(1).mean()
        pseudo = scale * _log_conditional(log_ratios.detach()).sum(1).mean()
        return loss, {"energy_data": data.detach().mean(), "pseudo_log_likelihood": pseudo}

    def _neighbours(
        self, energy: Energy, batch: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, float]:
        """Energies of the rows, their excess over each neighbour's, and the number of sites for
        each that is looked at."""
        energy.check_states(batch, "batch")
        if not is_discrete(energy.support):
            raise ValueError(
                f"{type(self).__name__} is for discrete supports, but {type(energy).__name__} has"
                f" {energy.support}"
            )
        values = values_of(energy, batch)
        x = to_sites(batch, values)
        chosen = self._sites(x[..., 0], generator)
        # the number of each site's value, (n, sites)
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
        """Numbers of the sites to look at in each row, ``(n, sites)``."""
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
    """All K values of a site, its own first: ``(n, sites, K)``."""
    return torch.cat([torch.zeros_like(log_ratios[..., :1]), log_ratios], 2)


def _log_conditional(log_ratios: Tensor) -> Tensor:
    r""":math:`\log p(x_s \mid x_{-s})`, ``(n, sites)``."""
    return -_with_own(log_ratios).logsumexp(2)


class Pseudolikelihood(SiteObjective):
    r"""Minus the mean log-pseudolikelihood (Besag, 1975): each site given all others. It needs
    neither log Z nor a chain.

    .. math:: L = -\frac1n \sum_i \sum_s \log p(x_{is} \mid x_{i, -s})
        = \frac1n \sum_i \sum_s \log\Big(1 + \sum_{x_s' \ne x_{is}} e^{E(x_i) - E(x_s', x_{i,
        -s})}\Big)

    It is consistent, and can improve while the likelihood falls.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, facts = Pseudolikelihood()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> round(float(loss.detach()), 4)  # 4 log 2
        2.7726
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        return -_log_conditional(log_ratios)


class RatioMatching(SiteObjective):
    r"""Ratio matching (Hyvärinen, "Some extensions of score matching", 2007): each site's chance of
    its other value, squared.

    .. math:: L = \frac1n \sum_i \sum_s \Big(1 + \frac{p(x_i)}{p(\bar x_i^s)}\Big)^{-2}
        = \frac1n \sum_i \sum_s \big(1 - p(x_{is} \mid x_{i, -s})\big)^2

    with :math:`\bar x^s` the state x with site s flipped. That is the quadratic score (Brier, 1950)
    of the conditionals where the pseudo-likelihood takes their logarithm: it is bounded, so that
    single rows that the energy finds impossible weigh little. It is consistent. At sites of K
    values we take half that score,

    .. math:: \tfrac12 \sum_k \big(1[x_s = k] - p(x_s = k \mid x_{-s})\big)^2,

    which for K = 2 is the published one, and is proper for every K.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, facts = RatioMatching()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> float(loss.detach())  # 4 sites, each (1 / 2)^2
        1.0
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        p = _with_own(log_ratios).softmax(2)
        others = p[..., 1:]
        # 1 - p of the own value, without its rounding
        return 0.5 * (others.sum(2).square() + others.square().sum(2))


class MinimumProbabilityFlow(SiteObjective):
    r"""Minimum probability flow (Sohl-Dickstein, Battaglino and DeWeese, 2011): the rate at which
    the data's law would leave for its neighbours under dynamics that keep the model's.

    .. math::

        L = \frac1n \sum_i \sum_s \sum_{x_s' \ne x_{is}} e^{\frac12 (E(x_i) - E(x_s', x_{i, -s}))}

    It is convex in E and consistent. As published the sum leaves out neighbours that are data
    themselves; here it is over all of them, so that L is a mean over rows, whatever the batch, and
    has the same minimum where the model can be the data's law. A row that the energy finds far less
    likely than its neighbour weighs exponentially: start from small weights.

    Args:
        num_sites: as in :class:`SiteObjective`.

    Raises:
        ValueError: as :class:`SiteObjective`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> loss, facts = MinimumProbabilityFlow()(
        ...     BernoulliRBM(4, 3, weight=torch.zeros(4, 3)), torch.ones(5, 4)
        ... )
        >>> float(loss.detach())  # 4 neighbours, as likely each
        4.0
    """

    def score(self, log_ratios: Tensor) -> Tensor:
        return torch.exp(0.5 * log_ratios).sum(2)
