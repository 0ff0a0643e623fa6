"""Importance sampling with a flow, or any Pyro distribution, as the proposal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.enumeration import draw_numbers
from pyroebm.core.progress import Progress
from pyroebm.core.rng import draw_from
from pyroebm.core.statistics import Estimate, effective, log_mean, pareto_k, too_few
from pyroebm.core.supports import inside
from pyroebm.core.wrappers import check_weighable, eval_mode
from pyroebm.flows.flow import Flow

__all__ = ["ImportanceResult", "ess_fraction", "importance_sample"]

#: Number of draws that are evaluated at once.
BATCH_SIZE = 65_536


@dataclasses.dataclass(frozen=True, eq=False)
class ImportanceResult:
    r"""Weighted draws for :math:`p(x) = e^{-U(x)} / C`, from :func:`importance_sample`.

    No attribute depends on modes without draws: a proposal that covers one of two modes can have a
    large ESS and a small Pareto k although ``log_z`` is too small by many standard errors.

    Attributes:
        x: the draws, shape ``(n, *event)``.
        log_weights: unnormalized log weights in nats, float64, shape ``(n,)``; :math:`-\infty`
            where :math:`U = \infty`.
        log_z: log of the mean weight, an estimate of log C of kind "lower": the mean weight is
            unbiased for C. Its standard error is :math:`\mathrm{sd}(w) / (\bar w \sqrt n)` (delta
            method). It is ``inf`` if a few weights dominate: if ``ess`` is at most 400 and at most
            a quarter of n.
        ess: effective sample size :math:`(\sum w)^2 / \sum w^2` (Kong, 1992).
        pareto_k: shape parameter of the tail of the weights (Vehtari, Simpson, Gelman, Yao and
            Gabry, 2024), computed by ArviZ; above 0.7 the estimates are unreliable. Above 0.5 the
            weights have infinite variance and standard errors are too small: for 400 to 400,000
            Pareto weights by a factor of 1.4 to 1.8 for k = 0.6 and of 2 to 3 for k = 0.7. It is
            ``inf`` if the tail has fewer than five weights, and ``-inf`` if all weights are equal.
    """

    x: Tensor
    log_weights: Tensor
    log_z: Estimate
    ess: float
    pareto_k: float

    @property
    def ess_fraction(self) -> float:
        """``ess / n``, in [0, 1]."""
        return self.ess / len(self.log_weights)

    @property
    def weights(self) -> Tensor:
        """Normalized weights, float64, shape ``(n,)``."""
        return self.log_weights.softmax(0)

    def expectation(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        r"""Estimate :math:`E_p[f(x)]` by self-normalized importance sampling.

        .. math:: \hat\mu = \sum_i \bar w_i f(x_i), \qquad
            \mathrm{se}^2 = \sum_i \bar w_i^2 (f(x_i) - \hat\mu)^2, \qquad \bar w_i = w_i /
            \textstyle\sum_j w_j.

        The standard error is infinite if that of ``log_z`` is.

        Args:
            f: a function of the draws, ``(n, *event) -> (n, *shape)``. Its values at draws of
                weight 0 are ignored, also if they are not finite.

        Returns:
            The estimate and its standard error, float64, both of shape ``shape``.

        Raises:
            ValueError: if f does not return one value for each draw.
        """
        values = f(self.x).to(torch.float64)
        if values.dim() < 1 or len(values) != len(self.x):
            raise ValueError(
                f"f must map {len(self.x)} draws to as many values, got shape {tuple(values.shape)}"
            )
        kept = self.weights > 0
        values, weights = values[kept], self.weights[kept].reshape(-1, *[1] * (values.dim() - 1))
        mean = (weights * values).sum(0)
        error = (weights * (values - mean)).square().sum(0).sqrt()
        return mean, torch.full_like(error, math.inf) if too_few(self.ess, len(self.x)) else error

    def resample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Resample draws in proportion to their weights, ``(num_samples, *event)``.

        They are approximately distributed as p if ``ess`` is large.

        Raises:
            ValueError: if ``num_samples`` < 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got num_samples={num_samples}")
        return self.x[draw_numbers(self.log_weights, num_samples, generator)]


def importance_sample(
    proposal: Flow | Distribution,
    energy: Energy,
    num_samples: int = 100_000,
    *,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> ImportanceResult:
    r"""Draw from a proposal with importance weights for :math:`p(x) = e^{-U(x)} / C`.

    For a flow with auxiliary variables the weights are those of (x, y), so that the mean weight is
    unbiased for C, for any M and :math:`\Sigma`:

    .. math:: w = \frac{e^{-U(x)} N(y \mid M(x), \Sigma(x))}{q(x, y)}
        = \frac{e^{-U(x)} N(y \mid M(x), \Sigma(x)) |\det S|}{N(z \mid 0, I)}

    Args:
        proposal: a flow for the energy, or a Pyro distribution with the energy's event shape, which
            is sampled by :func:`pyroebm.core.rng.draw_from`.
        energy: U.
        num_samples: number of draws.
        generator: source of the draws; None is torch's default generator.
        progress: True shows progress, False hides it, None shows it after one second.

    Returns:
        The draws with their weights, log Z, ESS and Pareto k, detached.

    Raises:
        ValueError: if ``num_samples`` < 1, or if shapes, dtypes or devices differ.
        FloatingPointError: if a log weight is NaN or +inf, or all weights are 0.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroebm.targets import Gaussian
        >>> result = importance_sample(dist.Normal(0.0, 1.5), Gaussian(0.0), 10_000)
        >>> log_z = result.log_z
        >>> abs(log_z.value - 0.5 * math.log(2 * math.pi)) < 5 * log_z.standard_error
        True
    """
    check_counts({"num_samples": 1}, num_samples)
    check_energy(energy)
    check_weighable(energy)
    draw = (
        _flow_weights(proposal, energy)
        if isinstance(proposal, Flow)
        else _distribution_weights(proposal, energy)
    )
    parts = []
    with (
        torch.no_grad(),
        eval_mode(energy),
        Progress(num_samples, "importance sampling", "draw", progress) as shown,
    ):
        for start in range(0, num_samples, BATCH_SIZE):
            size = min(BATCH_SIZE, num_samples - start)
            parts.append(draw(size, generator))
            shown.update(size)
    return _summary(
        torch.cat([x for x, _ in parts]), torch.cat([log_w for _, log_w in parts]).double()
    )


_Draw = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]


def _flow_weights(flow: Flow, energy: Energy) -> _Draw:
    target = flow.extend(energy)

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        xy, log_q = flow.forward_and_log_prob(flow.rsample_base(n, generator))
        return target.split(xy)[0], -target(xy) - log_q

    return draw


def _distribution_weights(proposal: Distribution, energy: Energy) -> _Draw:
    if not getattr(proposal, "normalized", True):
        raise ValueError(
            f"proposal must be normalized, but {type(proposal).__name__} has an unknown log Z: give"
            " it log_z, or use a flow or another distribution"
        )
    if proposal.batch_shape or proposal.event_shape != energy.event_shape:
        raise ValueError(
            "proposal must have batch_shape () and the energy's event_shape"
            f" {tuple(energy.event_shape)}, got batch_shape {tuple(proposal.batch_shape)} and"
            f" event_shape {tuple(proposal.event_shape)}; give a flow itself, not flow()"
        )

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = draw_from(proposal, n, generator)
        energy.check_states(x, "the proposal's draw")
        valid = inside(energy.support, x, len(energy.event_shape))
        log_weights = torch.full((n,), -torch.inf, dtype=energy.dtype, device=energy.device)
        log_weights[valid] = -energy(x[valid]) - proposal.log_prob(x)[valid]
        return x, log_weights

    return draw


def ess_fraction(log_weights: Tensor) -> float:
    """Return the effective sample size of weights, as a fraction of their number."""
    return effective(log_weights) / len(log_weights)


def _summary(x: Tensor, log_weights: Tensor) -> ImportanceResult:
    n = len(log_weights)
    nan, infinite = int(log_weights.isnan().sum()), int((log_weights == math.inf).sum())
    if nan or infinite:
        raise FloatingPointError(
            f"of n={n} log weights {nan} are NaN and {infinite} are +inf: the energy or the"
            " log density of the proposal is not finite there"
        )
    if bool((log_weights == -math.inf).all()):
        raise FloatingPointError(
            f"all n={n} weights are 0: the energy is +inf at all draws of the proposal"
        )
    log_z, error, ess = log_mean(log_weights)
    return ImportanceResult(
        x=x,
        log_weights=log_weights,
        log_z=Estimate(log_z, error, "lower"),
        ess=ess,
        pareto_k=pareto_k(log_weights),
    )
