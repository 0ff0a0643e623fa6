"""The reverse KL divergence of a flow from an energy, as a loss and as an estimate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.progress import Progress
from pyroebm.core.wrappers import check_weighable, eval_mode
from pyroebm.flows.flow import Flow
from pyroebm.objectives.variational.base import FlowObjective

__all__ = [
    "ReverseKL",
    "check_gradient",
    "estimate_augmented_kl",
    "estimate_kl",
    "kl_summands",
]

#: Number of draws that are evaluated at once.
BATCH_SIZE = 65_536


def kl_summands(flow: Flow, energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the summands of :math:`J_R - \log C` at noise z ``(n, D)``.

    Returns:
        The summands ``(n,)``, the augmented energies ``(n,)``, and (x, y) ``(n, D)``.
    """
    xy, log_q = flow.forward_and_log_prob(z)
    augmented = flow.extend(energy)(xy)
    return augmented + log_q, augmented, xy


def estimate_kl(
    flow: Flow, energy: Energy, z: Tensor, gradient: str = "stl"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean of the summands with the chosen gradient, and :func:`kl_summands`.

    ``gradient`` is that of :class:`ReverseKL`.
    """
    if gradient == "total":
        summands, augmented, xy = kl_summands(flow, energy, z)
        return summands.mean(), summands, augmented, xy
    xy, log_q, path_log_q = flow.forward_and_path_log_prob(z)
    augmented = flow.extend(energy)(xy)
    summands = augmented + log_q
    path = (augmented + path_log_q).mean()
    return path + (summands.mean() - path).detach(), summands, augmented, xy


def check_gradient(gradient: str) -> None:
    """Raise ValueError unless this is an option of :class:`ReverseKL`."""
    if gradient not in ("stl", "total"):
        raise ValueError(f"gradient must be one of ('stl', 'total'), got gradient={gradient!r}")


class ReverseKL(FlowObjective):
    r"""The reverse KL divergence :math:`KL(q \| p)` of a flow, or its upper bound :math:`J_R`.

    .. math::
        J_R = E[U(x)] - \log|\det S| + \tfrac12 E[\log\det \Sigma(x)]
        + \tfrac12 E[(y - M(x))^\top \Sigma(x)^{-1} (y - M(x))] + \tfrac{D - d}{2} \log 2\pi
        - H(z) + \log C

    with :math:`p(x) = e^{-U(x)} / C` and :math:`J_R \ge KL(q(x) \| p) \ge 0`. For D = d it is the
    divergence J itself. The loss is :math:`J_R - \log C`, the negative ELBO of the model
    :math:`p(x) N(y \mid M(x), \Sigma(x))` with the flow as guide (:mod:`pyroebm.ppl.svi`). For H(z)
    it has :math:`-\log N(z)` at the drawn z, which has the same mean and gradient and, near the
    optimum, a far smaller variance. So an estimate of :math:`J_R` may be slightly negative, within
    its standard error.

    Metrics: ``negative_elbo`` (the loss), its ``standard_error``, ``augmented_energy`` (the mean of
    :math:`\beta U(x) - \log N(y \mid M, \Sigma)`), ``beta``, and ``augmented_kl`` (:math:`J_R`)
    where log C of the target is known.

    Args:
        energy: U.
        num_samples: draws for each loss, at least 2.
        gradient: ``"stl"``: the path derivative of "sticking the landing" (Roeder, Wu and Duvenaud,
            2017), which has no variance where the flow is the target; or ``"total"``, with the same
            mean and two thirds of the cost, which needs more steps for the same fit.
        beta_start: as in :class:`FlowObjective`.
        anneal: as in :class:`FlowObjective`.

    Raises:
        ValueError: if an option is unknown or a number out of range; when called, if the flow does
            not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> loss, metrics = ReverseKL(Gaussian(torch.zeros(2)), num_samples=8)(NICE(2))
        >>> abs(float(metrics["augmented_kl"])) < 1e-6  # a fresh flow is the standard normal
        True
    """

    def __init__(
        self,
        energy: Energy,
        num_samples: int = 512,
        *,
        gradient: str = "stl",
        beta_start: float = 0.1,
        anneal: float = 0.4,
    ) -> None:
        super().__init__(energy, num_samples, beta_start=beta_start, anneal=anneal)
        check_gradient(gradient)
        self.gradient = gradient

    def loss(
        self, flow: Flow, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Return an estimate of :math:`J_R - \log C` from new draws, and its metrics."""
        return self.loss_at(flow, flow.rsample_base(self.num_samples, generator))

    def loss_at(self, flow: Flow, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics at given noise z ``(n, D)``."""
        loss, summands, augmented, _ = self.estimate(flow, z)
        metrics = {
            "negative_elbo": loss.detach(),
            "standard_error": summands.detach().std() / math.sqrt(len(summands)),
            "augmented_energy": augmented.detach().mean(),
        }
        log_z = self.target.log_z
        if log_z is not None:
            metrics["augmented_kl"] = loss.detach() + log_z
        return loss, metrics

    def estimate(self, flow: Flow, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return :func:`estimate_kl` of the target at noise z ``(n, D)``."""
        return estimate_kl(flow, self.target, z, self.gradient)


@torch.no_grad()
def estimate_augmented_kl(
    flow: Flow,
    energy: Energy,
    num_samples: int = 100_000,
    *,
    log_z: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> tuple[float, float]:
    r"""Estimate :math:`J_R`, or J for D = d, from new draws.

    Args:
        flow: q.
        energy: U.
        num_samples: number of draws.
        log_z: log C; None is ``energy.log_z``. Give 0.0 for :math:`J_R - \log C`, which does not
            depend on log C.
        generator: source of the draws; None is torch's default generator.
        progress: True shows progress, False hides it, None shows it after one second.

    Returns:
        The estimate and its standard error, in nats.

    Raises:
        ValueError: if log C is neither given nor known, or a number is out of range.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> value, error = estimate_augmented_kl(
        ...     NICE(1), Gaussian(1.0), 10_000
        ... )  # KL(N(0, 1) || N(1, 1)) = 0.5
        >>> abs(value - 0.5) < 5 * error
        True
    """
    log_z = energy.log_z if log_z is None else log_z
    if log_z is None:
        raise ValueError(
            f"log C of {type(energy).__name__} is not known: give log_z, or log_z=0.0 for J_R -"
            " log C"
        )
    check_counts({"num_samples": 2}, num_samples)
    check_weighable(energy)
    parts = []
    with (
        eval_mode(energy),
        Progress(num_samples, "estimate_augmented_kl", "draw", progress) as shown,
    ):
        for start in range(0, num_samples, BATCH_SIZE):
            z = flow.rsample_base(min(BATCH_SIZE, num_samples - start), generator)
            parts.append(kl_summands(flow, energy, z)[0].double())
            shown.update(len(z))
    terms = torch.cat(parts)
    return float(terms.mean()) + log_z, float(terms.std()) / math.sqrt(num_samples)
