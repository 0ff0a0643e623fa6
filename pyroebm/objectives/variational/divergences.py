"""Divergences that see what the reverse one does not: forward KL on draws of the target, and the
variance of the log weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.flows.flow import Flow
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.variational.base import FlowObjective

__all__ = ["ForwardKL", "LogVariance"]

Metrics = dict[str, Tensor]


class ForwardKL(FlowObjective):
    r"""Maximum likelihood of a flow on draws of the target: :math:`KL(p \| q)`, which leaves no
    mode out that the draws have.

    .. math::

        L = -E_{x \sim p} E_{y \sim N(M(x), \Sigma(x))}
        [\log q(x, y) - \log N(y \mid M(x), \Sigma(x))]

    For D = d this is :math:`-E_p \log q(x)`. Up to the entropy of p it is the divergence of the
    augmented densities, at least that of x alone. The draws may come from any kernel, with weights
    where they are of another density.

    Metrics: ``log_q`` (the mean of the summands), its ``standard_error``, ``beta`` (1).

    Args:
        draws: states x, shape ``(n, *event)``, a buffer.
        log_weights: of the draws, shape ``(n,)``, in nats, any constant apart; None weighs all
            alike. Batches are drawn in proportion to them.
        energy: U, which the path gradient needs.
        num_samples: draws for each loss, with replacement, at least 2.
        gradient: ``"total"``, which needs no energy; or ``"path"``: the path gradient of the
            divergence from p pulled back to z (Vaitl, Nicoli, Nakajima and Kessel, 2022), which
            uses the target's gradient and has no noise where q = p. It is for D = d.

    Raises:
        ValueError: if the numbers of draws and weights differ, a draw or all weights are not
            finite, ``gradient`` is unknown, or the path gradient has no energy; when called, if
            the flow does not fit the draws or the energy.

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

    draws: Tensor
    cumulative: Tensor

    def __init__(
        self,
        draws: Tensor,
        log_weights: Tensor | None = None,
        *,
        energy: Energy | None = None,
        num_samples: int = 512,
        gradient: str = "total",
    ) -> None:
        super().__init__(energy, num_samples)
        if gradient not in ("total", "path"):
            raise ValueError(f"gradient must be 'total' or 'path', got gradient={gradient!r}")
        if gradient == "path" and energy is None:
            raise ValueError("gradient='path' needs the energy: give energy=")
        if not len(draws) or not bool(torch.isfinite(draws).all()):
            raise ValueError(
                f"draws must be rows of finite numbers, got shape {tuple(draws.shape)} with some"
                " that are not"
            )
        log_weights = draws.new_zeros(len(draws)) if log_weights is None else log_weights
        if log_weights.shape != (len(draws),) or not bool(torch.isfinite(log_weights.max()).all()):
            raise ValueError(
                f"log_weights must be one for each of {len(draws)} draws, the largest finite, got"
                " shape"
                f" {tuple(log_weights.shape)} with maximum {float(log_weights.max())}"
            )
        self.gradient = gradient
        self.register_buffer("draws", draws.detach())
        self.register_buffer(
            "cumulative", torch.softmax(log_weights.detach().double(), 0).cumsum(0).to(draws.device)
        )

    def loss(self, flow: Flow, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
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
                "the path gradient is for flows with D = d: take gradient='total' with redundant"
                " latents"
            )
        z = x
        for transform in reversed(flow.transform.parts):
            z = transform.inv(z)
        # log p pulled back to z, less the base's log density: the flow's map is a constant, z is
        # not
        with frozen(flow):
            # a copy: transforms that cache would give back x, parameters and all
            image, log_q = flow.forward_and_log_prob(z.clone())
            path = -(flow.extend(self.energy)(image) + log_q).mean()
        # a base that is learned has no path but its own density at z
        path = path - flow.base.log_prob(z.detach()).mean()
        return path + (loss - path).detach()


class LogVariance(FlowObjective):
    r"""The log-variance divergence (Richter, Boustati, Nüsken, Ruiz and Akyildiz, "VarGrad", 2020),
    which is 0 only for q = p.

    .. math:: L = \tfrac12 \mathrm{Var}_{r}[-U(x) - \log q(x)]

    over any density r of x, held fixed: log C drops out, no gradient of U is used, and every
    summand is constant where q = p. On policy (r = q) its gradient is that of the reverse KL
    divergence with the score's variance reduced; off policy, with draws of other densities among
    them, it sees modes that q has not found. With auxiliary variables the weight is the augmented
    one.

    Metrics: ``log_weight`` (the mean log weight of the batch), ``beta``, and ``negative_elbo`` on
    policy.

    Args:
        energy: U.
        draws: states x of r, shape ``(n, *event)``: half of each batch is drawn from them, the
            other half from q. None is on policy.
        num_samples: states of a batch, at least 4.
        beta_start, anneal: see :class:`FlowObjective`.

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

    draws: Tensor | None

    def __init__(
        self,
        energy: Energy,
        draws: Tensor | None = None,
        *,
        num_samples: int = 512,
        beta_start: float = 0.1,
        anneal: float = 0.4,
    ) -> None:
        super().__init__(energy, num_samples, min_samples=4, beta_start=beta_start, anneal=anneal)
        if draws is not None and not (len(draws) and bool(torch.isfinite(draws).all())):
            raise ValueError(
                f"draws must be rows of finite numbers, got shape {tuple(draws.shape)} with some"
                " that are not"
            )
        self.register_buffer("draws", None if draws is None else draws.detach())

    def loss(self, flow: Flow, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
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
