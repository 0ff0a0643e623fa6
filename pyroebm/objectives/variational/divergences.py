"""Divergences that see what the reverse one does not: forward KL on draws of the target, and the
variance of the log weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.flows.flow import Flow
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.base import Objective

__all__ = ["ForwardKL", "LogVariance"]

Facts = dict[str, Tensor]


class ForwardKL(Objective):
    r"""Maximum likelihood of a flow on draws of the target: :math:`KL(p \| q)`, which leaves no
    mode out that the draws have.

    .. math::

        L = -E_{x \sim p} E_{y \sim N(M(x), \Sigma(x))}
        [\log q(x, y) - \log N(y \mid M(x), \Sigma(x))]

    For D = d this is :math:`-E_p \log q(x)`. Up to the entropy of p it is the divergence of the
    extended laws, at least that of x alone. The draws may come from any kernel, with weights where
    they are of another law.

    Args:
        draws: states x, shape ``(n, *event)``, a buffer.
        log_weights: of the draws, shape ``(n,)``, in nats, any constant apart; None weighs all
            alike. Batches are drawn in proportion to them.
        gradient: ``"total"``, which needs no energy; or ``"path"``: the path gradient of the
            divergence from p pulled back to z (Vaitl, Nicoli, Nakajima and Kessel, 2022), which
            uses the target's gradient and has no noise where q = p. It is for D = d.

    Raises:
        ValueError: if the numbers of draws and weights differ, a draw or all weights are not
            finite, or ``gradient`` is unknown.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> target = Gaussian(torch.zeros(2))
        >>> objective = ForwardKL(target.sample(1000, torch.Generator().manual_seed(0)))
        >>> loss, facts = objective(
        ...     NICE(2), target, num_samples=500, generator=torch.Generator().manual_seed(1)
        ... )
        >>> abs(
        ...     float(loss.detach()) - 2.8379
        ... ) < 0.2  # a fresh flow is the target: the loss is its entropy
        True
    """

    draws: Tensor
    cumulative: Tensor

    def __init__(
        self, draws: Tensor, log_weights: Tensor | None = None, gradient: str = "total"
    ) -> None:
        super().__init__()
        if gradient not in ("total", "path"):
            raise ValueError(f"gradient must be 'total' or 'path', got gradient={gradient!r}")
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

    def forward(
        self,
        flow: Flow,
        energy: Energy,
        num_samples: int = 512,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``log_q`` (the mean of the summands) and its ``standard_error``.

        Args:
            flow: q.
            energy: U; its values do not enter with ``gradient="total"``.
            num_samples: draws of this batch, with replacement.
            beta: inverse temperature of the path gradient's target; draws are those given.
            generator: source of the batch and of y.

        Raises:
            ValueError: if the flow does not fit the energy, or the path gradient is asked for where
                D > d.
        """
        check_counts({"num_samples": 2}, num_samples)
        extended = flow.extend(energy if beta == 1.0 else beta * energy)
        u = (
            uniform((num_samples,), generator, torch.float64, self.draws.device)
            * self.cumulative[-1]
        )
        chosen = torch.searchsorted(self.cumulative, u, right=True).clamp(max=len(self.draws) - 1)
        x = extended.vectors(self.draws[chosen])
        if flow.conditional is None:
            terms = flow.log_prob(x)
        else:
            y = flow.conditional.sample(x, 1, generator).squeeze(0)
            terms = flow.log_prob(torch.cat((x, y), -1)) - flow.conditional.log_prob(y, x)
        loss = -terms.mean()
        if self.gradient == "path":
            loss = self._path(flow, extended, x, loss)
        return loss, {
            "log_q": terms.detach().mean(),
            "standard_error": terms.detach().std() / math.sqrt(num_samples),
        }

    def _path(self, flow: Flow, extended: Energy, x: Tensor, loss: Tensor) -> Tensor:
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
            image, log_q = flow.push(z.clone())
            path = -(extended(image) + log_q).mean()
        # a base that is learned has no path but its own density at z
        path = path - flow.base.log_prob(z.detach()).mean()
        return path + (loss - path).detach()


class LogVariance(Objective):
    r"""The log-variance divergence (Richter, Boustati, Nüsken, Ruiz and Akyildiz, "VarGrad", 2020),
    which is 0 only for q = p.

    .. math:: L = \tfrac12 \mathrm{Var}_{r}[-U(x) - \log q(x)]

    over any law r of x, held fixed: log C drops out, no gradient of U is used, and every summand is
    constant where q = p. On policy (r = q) its gradient is that of the reverse KL divergence with
    the score's variance reduced; off policy, with draws of other laws among them, it sees modes
    that q has not found. With redundant latents the weight is the extended one.

    Args:
        draws: states x of r, shape ``(n, *event)``: half of each batch is drawn from them, the
            other half from q. None is on policy.

    Raises:
        ValueError: if a draw is not finite.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> loss, facts = LogVariance()(NICE(2), Gaussian(torch.zeros(2)), num_samples=8)
        >>> float(loss.detach()) < 1e-10
        True
    """

    draws: Tensor | None

    def __init__(self, draws: Tensor | None = None) -> None:
        super().__init__()
        if draws is not None and not (len(draws) and bool(torch.isfinite(draws).all())):
            raise ValueError(
                f"draws must be rows of finite numbers, got shape {tuple(draws.shape)} with some"
                " that are not"
            )
        self.register_buffer("draws", None if draws is None else draws.detach())

    def forward(
        self,
        flow: Flow,
        energy: Energy,
        num_samples: int = 512,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Facts]:
        """The loss and its facts: ``log_weight`` (the mean log weight of the batch) and
        ``j_r_minus_log_z`` on policy.

        Args:
            flow: q.
            energy: U.
            num_samples: states of a batch, at least 4.
            beta: inverse temperature: beta U takes the place of U.
            generator: source of the batch.

        Raises:
            ValueError: if the flow does not fit the energy, or ``num_samples`` is below 4.
        """
        check_counts({"num_samples": 4}, num_samples)
        extended = flow.extend(energy if beta == 1.0 else beta * energy)
        fresh = num_samples if self.draws is None else num_samples // 2
        with torch.no_grad():
            xy = flow.push(flow.draw_noise(fresh, generator))[0]
            if self.draws is not None:
                u = uniform((num_samples - fresh,), generator, torch.float64, self.draws.device)
                x = extended.vectors(self.draws[(u * len(self.draws)).long()])
                y = (
                    []
                    if flow.conditional is None
                    else [flow.conditional.sample(x, 1, generator).squeeze(0)]
                )
                xy = torch.cat([xy, torch.cat([x, *y], -1)])
        log_weights = -extended(xy) - flow.log_prob(xy)
        facts = {"log_weight": log_weights.detach().mean()}
        if self.draws is None:
            facts["j_r_minus_log_z"] = -facts["log_weight"]
        return 0.5 * log_weights.var(), facts
