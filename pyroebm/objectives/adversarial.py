"""Adversarial training: the expectation under the model is taken under a law that is trained to be
the model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, score
from pyroebm.core.supports import event_sum, is_real
from pyroebm.core.wrappers import eval_mode
from pyroebm.flows.flow import Flow
from pyroebm.nn.generators import Generator, batch_norms
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.base import Objective
from pyroebm.objectives.contrastive import check_batch
from pyroebm.objectives.variational.reverse_kl import check_options, estimate_kl

__all__ = [
    "Adversarial",
    "AdversarialFlow",
    "DeepDirected",
    "Negative",
    "batch_norm_entropy",
    "check_generator",
    "trainable",
]

Facts = dict[str, Tensor]


class Negative(NamedTuple):
    """What stands for the model's expectation in one step.

    Attributes:
        losses: of q, by name; ``"generator"`` is :math:`E_q[E] - H(q)`, as far as its law knows it.
        x: events, ``(m, *event)``.
        weights: of each, ``(m,)``, of sum 1; None: all alike.
        facts: detached.
    """

    losses: dict[str, Tensor]
    x: Tensor
    weights: Tensor | None
    facts: Facts


class Adversarial(Objective):
    r"""The maximin objective: an energy and a law q against each other.

    .. math::

        \log Z \ge E_q[-E] + H(q), \qquad
        \max_\theta \min_q \; E_q[E_\theta] - H(q) - E_{data}[E_\theta]

    The inner minimum, at q = p, is the mean log-likelihood; for any fixed q the value is an *upper*
    bound of it, by :math:`KL(q \| p)`. A subclass says in :meth:`negative` what q is. The two
    losses have their own parameters: that of the energy is :math:`E_{data}[E] - E_q[E]` with q held
    fixed, that of q is :math:`E_q[E] - H(q)` with the energy held fixed.

    Called as any objective it gives the sum of the losses, whose gradient in each parameter is that
    of its own loss, so that one optimizer may step all of them. Its value says nothing.

    Args:
        num_samples: m, draws of q in each step; None: as many as the batch has rows.
        gradient_penalty: :math:`\gamma \ge 0`: adds :math:`\tfrac\gamma2 E_{data} |\nabla_x E|^2`
            to the energy's loss (R1; Mescheder, Geiger and Nowozin, 2018). It steadies the game,
            and draws the energy away from maximum likelihood.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.flows import NICE
        >>> objective = AdversarialFlow(NICE(2))
        >>> losses, facts = objective.losses(MLPEnergy((2,)), torch.zeros(5, 2))
        >>> sorted(losses), "log_likelihood_bound" in facts
        (['energy', 'generator'], True)
    """

    #: Whether the loss of q is E_q[E] - H(q) in the mean: only then is anything a bound.
    exact_entropy: bool = False

    def __init__(self, num_samples: int | None = None, gradient_penalty: float = 0.0) -> None:
        super().__init__()
        if num_samples is not None:
            check_counts({"num_samples": 1}, num_samples)
        if not 0.0 <= gradient_penalty < math.inf:
            raise ValueError(
                "gradient_penalty must be finite and not negative, got"
                f" gradient_penalty={gradient_penalty}"
            )
        self.num_samples, self.gradient_penalty = num_samples, float(gradient_penalty)

    def negative(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Negative:
        """The losses of q, and n of its draws. The energy is in eval mode and its parameters are
        constants."""
        raise NotImplementedError(
            f"{type(self).__name__} must define negative(energy, n, generator) -> Negative"
        )

    def trained(self, energy: Energy) -> Mapping[str, Sequence[nn.Parameter]]:
        """The parameters of each of the :meth:`losses`, by the same names."""
        return {"energy": trainable(energy), "generator": trainable(self)}

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Facts]:
        """The losses of the energy and of q, each to be minimised in its own parameters.

        Args:
            energy: E.
            batch: data, ``(n, *event)``.
            generator: source of the draws.

        Returns:
            ``"energy"``, ``"generator"`` and whatever else :meth:`trained` names, scalars; and
            facts: ``energy_data``, ``energy_model`` (under q), ``energy_gap``; ``gradient_penalty``
            where there is one; where the entropy is exact ``entropy`` and ``log_likelihood_bound``,
            an estimate without bias of an upper bound of the batch's mean log-likelihood.

        Raises:
            ValueError: if the batch or q does not fit the energy.
        """
        check_batch(energy, batch)
        with eval_mode(energy), frozen(energy):
            q = self.negative(
                energy, len(batch) if self.num_samples is None else self.num_samples, generator
            )
        data, model = energy(batch).mean(), _mean(energy(q.x.detach()), q.weights)
        loss = data - model
        facts = {
            "energy_data": data.detach(),
            "energy_model": model.detach(),
            "energy_gap": loss.detach(),
            **q.facts,
        }
        if self.gradient_penalty:
            slopes = event_sum(score(energy, batch).square(), len(energy.event_shape))
            penalty = 0.5 * self.gradient_penalty * slopes.mean()
            loss, facts["gradient_penalty"] = loss + penalty, penalty.detach()
        if self.exact_entropy:
            value = q.losses["generator"].detach()
            facts |= {
                "entropy": facts["energy_model"] - value,
                "log_likelihood_bound": value - facts["energy_data"],
            }
        return {"energy": loss, **q.losses}, facts

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The sum of the losses, and the facts of :meth:`losses`."""
        losses, facts = self.losses(energy, batch, generator=generator)
        return torch.stack(list(losses.values())).sum(), facts


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (weights.detach() * values).sum()


class AdversarialFlow(Adversarial):
    r"""Adversarial training against a flow, whose entropy is exact: the value is an upper bound of
    the log-likelihood.

    With redundant latents (:class:`~pyroebm.flows.RedundantNICE`) the loss of q is :math:`J_R -
    \log Z`, which is no less than :math:`E_q[E] - H(q)` of the marginal q(x): still an upper bound,
    a wider one, and ``entropy`` is then a lower bound of that of x.

    Args:
        flow: q.
        num_samples, gradient_penalty: as in :class:`Adversarial`.
        gradient: "stl" or "total", as in :class:`~pyroebm.objectives.ReverseKL`.

    Raises:
        ValueError: as :class:`Adversarial`, and if the flow does not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> _, facts = AdversarialFlow(NICE(2)).losses(Gaussian(torch.zeros(2)), torch.zeros(5, 2))
        >>> round(float(facts["log_likelihood_bound"]), 4)  # -log 2 pi: q is p
        -1.8379
    """

    exact_entropy = True

    def __init__(
        self,
        flow: Flow,
        num_samples: int | None = None,
        gradient_penalty: float = 0.0,
        gradient: str = "stl",
    ) -> None:
        super().__init__(num_samples, gradient_penalty)
        check_options(gradient=gradient)
        self.flow, self.gradient = flow, gradient

    def negative(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Negative:
        z = self.flow.rsample_base(num_samples, generator)
        loss, *_, xy = estimate_kl(self.flow, energy, z, gradient=self.gradient)
        return Negative({"generator": loss}, self.flow.extend(energy).split(xy)[0], None, {})


class DeepDirected(Adversarial):
    r"""Adversarial training against a generator with batch normalisation (Kim and Bengio, "Deep
    Directed Generative Models with Energy-Based Probability Estimation", 2016).

    .. math:: L_G = \frac1m \sum_j E(g(z_j)) - \sum_i \tfrac12 \log(2 \pi e\, a_i^2)

    with :math:`a_i` the scales of all normalised units: the entropy that they had if they were
    normal and independent. It stands for H(q) only in that it keeps the units from collapsing: it
    does not see what the layers after them do, or the shape of the law, and grows without end with
    scales that a later layer undoes. So nothing here is a bound, or an estimate, of a likelihood.
    Batch normalisation couples the rows of q's draws.

    Args:
        model: the generator; see :class:`~pyroebm.nn.MLPGenerator` with ``batch_norm=True``.
        num_samples, gradient_penalty: as in :class:`Adversarial`; at least 2 draws.

    Raises:
        ValueError: as :class:`Adversarial`, and if the generator has no batch normalisation with
            scales, or does not fit the energy.

    Example:
        >>> from pyroebm.nn import MLPGenerator
        >>> from pyroebm.targets import Gaussian
        >>> model = MLPGenerator((2,), latent_dim=2, hidden_sizes=(8,), batch_norm=True)
        >>> losses, facts = DeepDirected(model).losses(Gaussian(torch.zeros(2)), torch.zeros(5, 2))
        >>> round(float(facts["entropy_surrogate"]), 4)  # 8 units of scale 1
        11.3515
    """

    def __init__(
        self, model: Generator, num_samples: int | None = None, gradient_penalty: float = 0.0
    ) -> None:
        super().__init__(num_samples, gradient_penalty)
        batch_norm_entropy(model)
        self.model = model

    def negative(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Negative:
        check_generator(self.model, energy)
        if num_samples < 2:
            raise ValueError(
                f"batch normalisation takes at least 2 draws: give num_samples, got a batch of"
                f" {num_samples}"
                " rows"
            )
        x, entropy = (
            self.model.emit(self.model.sample_latent(num_samples, generator), generator),
            batch_norm_entropy(self.model),
        )
        return Negative(
            {"generator": energy(x).mean() - entropy},
            x,
            None,
            {"entropy_surrogate": entropy.detach()},
        )


def batch_norm_entropy(module: nn.Module) -> Tensor:
    r""":math:`\sum_i \tfrac12 \log(2 \pi e\, a_i^2)` over the scales of all batch normalisations,
    in nats, a scalar.

    Exact where the normalised units are the output, and are normal and independent.

    Raises:
        ValueError: if there are none, or none with scales.

    Example:
        >>> batch_norm_entropy(nn.BatchNorm1d(2)).detach()  # 1 + log 2 pi
        tensor(2.8379)
    """
    scales = [part.weight for part in batch_norms(module) if part.weight is not None]
    if not scales:
        raise ValueError(
            "the entropy is that of batch normalisations with scales (affine=True):"
            f" {type(module).__name__} has none"
        )
    return (
        0.5 * math.log(2.0 * math.pi * math.e)
        + torch.cat([a.flatten() for a in scales]).abs().log()
    ).sum()


def check_generator(model: Generator, energy: Energy) -> None:
    """ValueError unless a generator's draws are events of the energy: real, of its shape."""
    if tuple(model.event_shape) != tuple(energy.event_shape):
        raise ValueError(
            "the generator and the energy must have one event_shape, got"
            f" {tuple(model.event_shape)} and"
            f" {tuple(energy.event_shape)} ({type(energy).__name__})"
        )
    if not is_real(energy.support):
        raise ValueError(
            f"energy must have real support, a generator's, but {type(energy).__name__} has"
            f" support={energy.support}; wrap it:"
            " Unconstrained(energy)"
        )
