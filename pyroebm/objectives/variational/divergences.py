"""The forward KL divergence on draws of the target, and the log-variance divergence."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.arrays import as_tensor
from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.flows.flow import Flow
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.variational.base import FlowObjective

__all__ = ["ForwardKL", "LogVariance"]

Metrics = dict[str, Tensor]


class ForwardKL(FlowObjective):
    r"""The forward KL divergence :math:`KL(p \| q)`: maximum likelihood on draws of the target.

    .. math::

        L = -E_{x \sim p} E_{y \sim N(M(x), \Sigma(x))}
        [\log q(x, y) - \log N(y \mid M(x), \Sigma(x))]

    It covers every mode that the draws have. For D = d it is :math:`-E_p \log q(x)`. Plus the
    entropy of p it is the KL divergence of the augmented densities, an upper bound on that of x.
    The draws may come from any sampler, with importance weights if their density is not p.

    Metrics: ``log_q`` (the mean of the summands), its ``standard_error``, ``beta`` (1).

    Args:
        draws: states x, shape ``(n, *event)``, a buffer.
        log_weights: log weights of the draws, shape ``(n,)``, in nats, up to a constant; None for
            equal weights. Batches are drawn in proportion to the weights.
        energy: U, required by the path gradient.
        num_samples: draws for each loss, with replacement, at least 2.
        gradient: ``"total"``, which needs no energy; or ``"path"``: the path gradient of the
            divergence from p pulled back to z (Vaitl, Nicoli, Nakajima and Kessel, 2022), which
            uses the gradient of the target and has no variance where q = p. It requires D = d.

    Raises:
        ValueError: if the numbers of draws and weights differ, a draw or all weights are not
            finite, ``gradient`` is unknown, or ``energy`` is missing for the path gradient; when
            called, if the flow does not fit the draws or the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> target = Gaussian(torch.zeros(2))
        >>> draws = target.sample(1000, torch.Generator().manual_seed(0))
        >>> objective = ForwardKL(draws, num_samples=500)
        >>> loss, metrics = objective(NICE(2), generator=torch.Generator().manual_seed(1))
        >>> # a fresh flow is the target: the loss is its entropy
        >>> abs(float(loss.detach()) - 2.8379) < 0.2
        True
    """

    constants = ("draws", "cumulative")
    draws: Tensor
    cumulative: Tensor

    def __init__(
        self,
        draws: Tensor | np.ndarray,
        log_weights: Tensor | np.ndarray | None = None,
        *,
        energy: Energy | None = None,
        num_samples: int = 512,
        gradient: str = "total",
    ) -> None:
        super().__init__(energy, num_samples)
        if gradient not in ("total", "path"):
            raise ValueError(f"gradient must be 'total' or 'path', got gradient={gradient!r}")
        if gradient == "path" and energy is None:
            raise ValueError("energy must be given for gradient='path', got energy=None")
        draws = _as_draws(draws, energy)
        if not len(draws) or not bool(torch.isfinite(draws).all()):
            raise ValueError(
                "draws must have at least one row and finite entries, got shape"
                f" {tuple(draws.shape)} with {int((~draws.isfinite()).sum())} non-finite entries"
            )
        log_weights = (
            draws.new_zeros(len(draws))
            if log_weights is None
            else as_tensor(log_weights, torch.float64, draws.device, "log_weights")
        )
        if log_weights.shape != (len(draws),) or not bool(torch.isfinite(log_weights.max()).all()):
            raise ValueError(
                f"log_weights must have shape ({len(draws)},) and a finite maximum, got shape"
                f" {tuple(log_weights.shape)} with maximum {float(log_weights.max())}"
            )
        self.gradient = gradient
        self.register_buffer("draws", draws.detach())
        self.register_buffer(
            "cumulative", torch.softmax(log_weights.detach().double(), 0).cumsum(0).to(draws.device)
        )

    def loss(self, flow: Flow, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Return the loss of a batch of the draws, and its metrics."""
        u = (
            uniform((self.num_samples,), generator, torch.float64, self.draws.device)
            * self.cumulative[-1]
        )
        chosen = torch.searchsorted(self.cumulative, u, right=True).clamp(max=len(self.draws) - 1)
        x = self.draws[chosen].reshape(self.num_samples, -1)
        if x.shape[1] != flow.dim:
            raise ValueError(
                f"draws must have events of as many entries as the flow's dim={flow.dim}, got draws"
                f" of shape {tuple(self.draws.shape)}"
            )
        if flow.conditional is None:
            terms = flow.log_prob(x)
        else:
            y = flow.conditional.sample(x, 1, generator).squeeze(0)
            terms = flow.log_prob(torch.cat((x, y), -1)) - flow.conditional.log_prob(y, x)
        loss = -terms.mean()
        if self.gradient == "path":
            loss = self._path(flow, x, loss)
        return loss, {
            "log_q": terms.detach().mean(),
            "standard_error": terms.detach().std() / math.sqrt(self.num_samples),
        }

    def _path(self, flow: Flow, x: Tensor, loss: Tensor) -> Tensor:
        if flow.conditional is not None:
            raise ValueError(
                "gradient='path' must have a flow with D = d, got auxiliary variables: use"
                " gradient='total'"
            )
        z = x
        for transform in reversed(flow.transform.parts):
            z = transform.inv(z)
        # log p pulled back to z minus the log density of the base: only z has a gradient, the map
        # of the flow is constant
        with frozen(flow):
            # a copy: transforms with a cache would return x with its graph
            image, log_q = flow.forward_and_log_prob(z.clone())
            path = -(flow.extend(self.energy)(image) + log_q).mean()
        # a trained base has a gradient only through its own density at z
        path = path - flow.base.log_prob(z.detach()).mean()
        return path + (loss - path).detach()


class LogVariance(FlowObjective):
    r"""The log-variance divergence (VarGrad; Richter, Boustati, Nüsken, Ruiz and Akyildiz, 2020).

    .. math:: L = \tfrac12 \mathrm{Var}_{r}[-U(x) - \log q(x)]

    with any fixed density r of x. It is 0 only for q = p, where the log weights are constant. It
    depends neither on log C nor on the gradient of U. On policy (r = q) its gradient is that of the
    reverse KL divergence with reduced variance. Off policy, with draws of other densities, it
    depends on modes that q has not found. With auxiliary variables the weight is that of the
    augmented densities.

    Metrics: ``log_weight`` (the mean log weight of the batch), ``beta``, and ``negative_elbo`` on
    policy.

    Args:
        energy: U.
        draws: states x, shape ``(n, *event)``; half of each batch is drawn from them, the other
            half from q. None is on policy.
        num_samples: number of states of a batch, at least 4.
        beta_start: as in :class:`FlowObjective`.
        anneal: as in :class:`FlowObjective`.

    Raises:
        ValueError: if a draw is not finite or a number out of range; when called, if the flow does
            not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> loss, metrics = LogVariance(Gaussian(torch.zeros(2)), num_samples=8)(NICE(2))
        >>> float(loss.detach()) < 1e-10
        True
    """

    constants = ("draws",)
    draws: Tensor | None

    def __init__(
        self,
        energy: Energy,
        draws: Tensor | np.ndarray | None = None,
        *,
        num_samples: int = 512,
        beta_start: float = 0.1,
        anneal: float = 0.4,
    ) -> None:
        super().__init__(energy, num_samples, min_samples=4, beta_start=beta_start, anneal=anneal)
        draws = None if draws is None else _as_draws(draws, energy)
        if draws is not None and not (len(draws) and bool(torch.isfinite(draws).all())):
            raise ValueError(
                "draws must have at least one row and finite entries, got shape"
                f" {tuple(draws.shape)} with {int((~draws.isfinite()).sum())} non-finite entries"
            )
        self.register_buffer("draws", None if draws is None else draws.detach())

    def loss(self, flow: Flow, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Return half the variance of the log weights, and its metrics."""
        extended = flow.extend(self.target)
        fresh = self.num_samples if self.draws is None else self.num_samples // 2
        with torch.no_grad():
            xy = flow.forward_and_log_prob(flow.rsample_base(fresh, generator))[0]
            if self.draws is not None:
                count = self.num_samples - fresh
                u = uniform((count,), generator, torch.float64, self.draws.device)
                x = extended.vectors(self.draws[(u * len(self.draws)).long()])
                y = (
                    []
                    if flow.conditional is None
                    else [flow.conditional.sample(x, 1, generator).squeeze(0)]
                )
                xy = torch.cat([xy, torch.cat([x, *y], -1)])
        log_weights = -extended(xy) - flow.log_prob(xy)
        metrics = {"log_weight": log_weights.detach().mean()}
        if self.draws is None:
            metrics["negative_elbo"] = -metrics["log_weight"]
        return 0.5 * log_weights.var(), metrics


def _as_draws(draws: Tensor | np.ndarray, energy: Energy | None) -> Tensor:
    """Return draws as a tensor: arrays have the energy's dtype, torch's default without one."""
    if energy is None:
        return as_tensor(draws, torch.get_default_dtype(), torch.device("cpu"), "draws")
    return as_tensor(draws, energy.dtype, energy.device, "draws")
