"""Adversarial training against a latent-variable generator whose entropy has an estimated
gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import standard_normal
from pyroebm.core.supports import event_sum
from pyroebm.nn.generators import Generator, batch_norms
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.adversarial import Adversarial, Negative, check_generator, trainable

__all__ = ["VERA", "LatentScore", "latent_score"]


class LatentScore(NamedTuple):
    r"""What :func:`latent_score` finds at each x.

    Attributes:
        score: an estimate of :math:`\nabla_x \log q(x)`, shape of x, detached.
        log_q: an estimate of :math:`\log q(x)` in nats, ``(n,)``, with its graph in :math:`\eta`;
            low in the mean, by Jensen's inequality: a lower bound that K tightens (Burda, Grosse
            and Salakhutdinov, 2016).
        effective: effective sample size of the weights, ``(n,)``, detached.
    """

    score: Tensor
    log_q: Tensor
    effective: Tensor


def latent_score(
    model: Generator,
    x: Tensor,
    z: Tensor,
    log_eta: Tensor,
    num_proposals: int = 20,
    generator: torch.Generator | None = None,
) -> LatentScore:
    r"""The score of :math:`q(x) = \int N(x \mid g(z), s^2 I) N(z \mid 0, I) dz` by self-normalised
    importance sampling.

    .. math::

        \nabla_x \log q(x) = E_{q(z \mid x)}\Bigl[\frac{g(z) - x}{s^2}\Bigr]
        \approx \sum_k w_k \frac{g(z_k) - x}{s^2}, \qquad z_k \sim N(z_0, \eta^2 I), \qquad
        w_k \propto \frac{N(x \mid g(z_k), s^2 I)\, N(z_k)}{N(z_k \mid z_0, \eta^2 I)}

    with :math:`z_0` the latents that x was made of, themselves a draw of :math:`q(z \mid x)`
    (Grathwohl et al., "No MCMC for me", 2021). Its bias and its variance fall as 1 / K. Row i
    depends on row i alone.

    Args:
        model: g and s.
        x: its draws, ``(n, *event)``.
        z: :math:`z_0`, ``(n, latent_dim)``.
        log_eta: :math:`\log \eta`, a scalar or ``(latent_dim,)``.
        num_proposals: K.
        generator: source of the proposals.

    Raises:
        ValueError: if the model has no noise, or has batch normalisation, or K < 1.

    Example:
        >>> model = Generator(nn.Linear(1, 2), 1, (2,), sigma=0.5)
        >>> z = model.sample_latent(3)
        >>> latent_score(model, model.emit(z), z, torch.tensor(-1.0)).score.shape
        torch.Size([3, 2])
    """
    check_counts({"num_proposals": 1}, num_proposals)
    if model.log_sigma is None or any(True for _ in batch_norms(model)):
        raise ValueError(
            "q(x | z) must be a normal law of its own for each row: give the generator sigma, and"
            " no batch norm"
        )
    x, n = x.detach(), len(x)
    k = num_proposals
    noise = standard_normal((n, k, model.latent_dim), generator, z.dtype, z.device)
    with frozen(model):
        proposals = z.detach().unsqueeze(1) + log_eta.exp() * noise
        residual = model(proposals.flatten(0, 1)).reshape(n, k, *x.shape[1:]) - x.unsqueeze(1)
        dims, one = x.dim() - 1, log_eta.new_zeros(())
        log_joint = _log_normal(residual, model.log_sigma, dims) + _log_normal(proposals, one, 1)
        log_ratio = log_joint - _log_normal(noise, one, 1) + log_eta.expand(model.latent_dim).sum()
    weights = log_ratio.detach().softmax(1)
    score = (weights.reshape(n, k, *[1] * dims) * residual.detach()).sum(
        1
    ) / model.sigma.detach() ** 2
    return LatentScore(score, log_ratio.logsumexp(1) - math.log(k), 1.0 / weights.square().sum(1))


def _log_normal(deviation: Tensor, log_scale: Tensor, dims: int) -> Tensor:
    """log N of deviations from the mean, with one scale, summed over the last ``dims``
    dimensions."""
    terms = (
        -0.5 * (deviation / log_scale.exp()).square() - log_scale - 0.5 * math.log(2.0 * math.pi)
    )
    return event_sum(terms, dims)


class VERA(Adversarial):
    r"""Adversarial training against a generator with noise, by an estimate of its entropy's
    gradient (Grathwohl, Kelly, Hashemi, Norouzi, Swersky and Duvenaud, "No MCMC for me: Amortized
    sampling for fast and stable training of energy-based models", 2021).

    .. math::

        \nabla_\phi H(q_\phi)
        = -E_{z, \varepsilon}\bigl[\nabla_x \log q(x)^\top\, \partial x / \partial \phi\bigr],
        \qquad x = g_\phi(z) + s_\phi\, \varepsilon

    with :func:`latent_score` for the score. The width :math:`\eta` is trained, as loss
    ``"posterior"``, to the best mean of :math:`\log \hat q`; the paper's bound is that of a single
    proposal, which wants :math:`\eta` too narrow for weights: on a linear generator its score has
    twice the squared error at K = 20, and five times at K = 100. The value :math:`E_q[E] + \log
    \hat q` is an estimate: :math:`-\log \hat q` is above the entropy in the mean, so the value is
    below the bound that the same generator had with its exact entropy, and bounds nothing.

    Args:
        model: the generator, with ``sigma`` and without batch normalisation.
        num_proposals: K.
        eta: :math:`\eta` at the start, in units of z; one for each latent is learned.
        num_samples, gradient_penalty: as in :class:`Adversarial`; the paper takes a penalty.

    Raises:
        ValueError: as :class:`Adversarial` and :func:`latent_score`, and if the generator does not
            fit the energy.

    Example:
        >>> from pyroebm.nn import MLPGenerator
        >>> from pyroebm.targets import Gaussian
        >>> objective = VERA(MLPGenerator((2,), latent_dim=3, sigma=0.1))
        >>> losses, facts = objective.losses(Gaussian(torch.zeros(2)), torch.zeros(5, 2))
        >>> sorted(losses), "log_likelihood_bound" in facts
        (['energy', 'generator', 'posterior'], False)
    """

    def __init__(
        self,
        model: Generator,
        num_proposals: int = 20,
        *,
        eta: float = 0.1,
        num_samples: int | None = None,
        gradient_penalty: float = 0.0,
    ) -> None:
        super().__init__(num_samples, gradient_penalty)
        check_counts({"num_proposals": 1}, num_proposals)
        if not 0.0 < eta < math.inf:
            raise ValueError(f"eta must be positive and finite, got eta={eta}")
        self.model, self.num_proposals = model, num_proposals
        self.log_eta = nn.Parameter(
            torch.full((model.latent_dim,), math.log(eta), dtype=model.dtype, device=model.device)
        )

    def trained(self, energy: Energy) -> Mapping[str, Sequence[nn.Parameter]]:
        return {
            "energy": trainable(energy),
            "generator": trainable(self.model),
            "posterior": [self.log_eta],
        }

    def negative(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Negative:
        check_generator(self.model, energy)
        z = self.model.sample_latent(num_samples, generator)
        x = self.model.emit(z, generator)
        found = latent_score(self.model, x, z, self.log_eta, self.num_proposals, generator)
        values = energy(x)
        path = (values + event_sum(found.score * x, len(energy.event_shape))).mean()
        loss = path + (values + found.log_q - path).detach().mean()
        entropy = -found.log_q.mean()
        facts = {"entropy": entropy.detach(), "effective_proposals": found.effective.mean()}
        return Negative({"generator": loss, "posterior": entropy}, x, None, facts)
