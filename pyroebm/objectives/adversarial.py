"""Adversarial training: a trained sampler replaces the model in the likelihood gradient."""

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
from pyroebm.objectives.variational.reverse_kl import check_gradient, estimate_kl

__all__ = [
    "Adversarial",
    "AdversarialFlow",
    "DeepDirected",
    "Negative",
    "batch_norm_entropy",
    "check_generator",
    "trainable",
]

Metrics = dict[str, Tensor]


class Negative(NamedTuple):
    """Draws of q, which estimate the model's expectation in one step, and the losses of q.

    Attributes:
        losses: losses of q by name; ``"generator"`` is :math:`E_q[E] - H(q)`, or with a surrogate
            or an estimate of the entropy.
        x: events, ``(m, *event)``.
        weights: normalized weights of the events, ``(m,)``; None for equal weights.
        metrics: detached metrics.
    """

    losses: dict[str, Tensor]
    x: Tensor
    weights: Tensor | None
    metrics: Metrics


class Adversarial(Objective):
    r"""Base class of adversarial objectives: an energy and a sampler q with opposed losses.

    .. math::

        \log Z \ge E_q[-E] + H(q), \qquad
        \max_\theta \min_q \; E_q[E_\theta] - H(q) - E_{data}[E_\theta]

    The inner minimum, at q = p, is the mean log-likelihood. For any fixed q the value is an *upper*
    bound on it, with gap :math:`KL(q \| p)`. A subclass defines q in :meth:`negative`. The two
    losses have disjoint parameters: the loss of the energy is :math:`E_{data}[E] - E_q[E]` with q
    held fixed, the loss of q is :math:`E_q[E] - H(q)` with the energy held fixed.

    ``forward`` returns the sum of the losses. Its gradient in each parameter is that of the
    parameter's own loss, so one optimizer can train all of them. The value of the sum has no
    meaning.

    Args:
        num_samples: m, number of draws of q in each step; None for the size of the batch.
        gradient_penalty: :math:`\gamma \ge 0`: adds :math:`\tfrac\gamma2 E_{data} |\nabla_x E|^2`
            to the loss of the energy (R1; Mescheder, Geiger and Nowozin, 2018). It stabilizes
            training, and biases the energy away from maximum likelihood.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.flows import NICE
        >>> objective = AdversarialFlow(NICE(2))
        >>> losses, metrics = objective.losses(MLPEnergy((2,)), torch.zeros(5, 2))
        >>> sorted(losses), "log_likelihood_bound" in metrics
        (['energy', 'generator'], True)
    """

    measures_fit = False

    #: Whether the loss of q is an unbiased estimate of E_q[E] - H(q). Only then is its value a
    #: bound on the likelihood.
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
        """Return the losses of q and ``num_samples`` of its draws.

        The energy is in eval mode and its parameters are constants.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define negative(energy, num_samples, generator) ->"
            " Negative"
        )

    def trained(self, energy: Energy) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return the parameters that each of the :meth:`losses` trains, by the same names."""
        return {"energy": trainable(energy), "generator": trainable(self)}

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Return the losses of the energy and of q, each a function of its own parameters.

        Args:
            energy: E.
            batch: data, ``(n, *event)``.
            generator: source of the draws; None is torch's default generator.

        Returns:
            The scalar losses by name (``"energy"``, ``"generator"`` and the other names of
            :meth:`trained`), and the metrics: ``energy_data``, ``energy_model`` (under q),
            ``energy_gap``; ``gradient_penalty`` if it is positive; and, where the entropy is exact,
            ``entropy`` and ``log_likelihood_bound``, an unbiased estimate of an upper bound on the
            mean log-likelihood of the batch.

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
        metrics = {
            "energy_data": data.detach(),
            "energy_model": model.detach(),
            "energy_gap": loss.detach(),
            **q.metrics,
        }
        if self.gradient_penalty:
            slopes = event_sum(score(energy, batch).square(), len(energy.event_shape))
            penalty = 0.5 * self.gradient_penalty * slopes.mean()
            loss, metrics["gradient_penalty"] = loss + penalty, penalty.detach()
        if self.exact_entropy:
            value = q.losses["generator"].detach()
            metrics |= {
                "entropy": metrics["energy_model"] - value,
                "log_likelihood_bound": value - metrics["energy_data"],
            }
        return {"energy": loss, **q.losses}, metrics

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the sum of the losses, and the metrics of :meth:`losses`."""
        losses, metrics = self.losses(energy, batch, generator=generator)
        return torch.stack(list(losses.values())).sum(), metrics


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (weights.detach() * values).sum()


class AdversarialFlow(Adversarial):
    r"""Adversarial training of an energy against a flow, which gives a likelihood bound.

    The entropy of a flow is exact, so ``log_likelihood_bound`` is an upper bound on the mean
    log-likelihood. With auxiliary variables (:class:`~pyroebm.flows.RedundantNICE`) the loss of q
    is :math:`J_R - \log Z \ge E_q[E] - H(q)` with q(x) the marginal of the flow. The value is then
    a looser upper bound, and ``entropy`` is a lower bound on the entropy of x.

    Args:
        flow: q.
        num_samples: as in :class:`Adversarial`.
        gradient_penalty: as in :class:`Adversarial`.
        gradient: "stl" or "total", as in :class:`~pyroebm.objectives.ReverseKL`.

    Raises:
        ValueError: as :class:`Adversarial`, and if the flow does not fit the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> _, metrics = AdversarialFlow(NICE(2)).losses(
        ...     Gaussian(torch.zeros(2)), torch.zeros(5, 2)
        ... )
        >>> round(float(metrics["log_likelihood_bound"]), 4)  # -log 2 pi: q is p
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
        check_gradient(gradient)
        self.flow, self.gradient = flow, gradient

    def negative(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Negative:
        """Return the reverse KL loss of the flow, and its draws."""
        z = self.flow.rsample_base(num_samples, generator)
        loss, *_, xy = estimate_kl(self.flow, energy, z, gradient=self.gradient)
        return Negative({"generator": loss}, self.flow.extend(energy).split(xy)[0], None, {})


class DeepDirected(Adversarial):
    r"""Adversarial training against a generator with batch normalization.

    .. math:: L_G = \frac1m \sum_j E(g(z_j)) - \sum_i \tfrac12 \log(2 \pi e\, a_i^2)

    with :math:`a_i` the scales of all normalized units (Kim and Bengio, 2016). The second term is
    the entropy of independent normal units with these scales, a surrogate for H(q): it keeps the
    units from collapsing, but depends neither on the layers after them nor on the shape of the
    distribution, and is unbounded where a later layer undoes the scales. So neither a bound on a
    likelihood nor an estimate of one is available. Batch normalization couples the draws of q.

    Args:
        model: the generator; see :class:`~pyroebm.nn.MLPGenerator` with ``batch_norm=True``.
        num_samples: as in :class:`Adversarial`; at least 2 draws.
        gradient_penalty: as in :class:`Adversarial`.

    Raises:
        ValueError: as :class:`Adversarial`, and if the generator has no batch normalization with
            scales, or does not fit the energy.

    Example:
        >>> from pyroebm.nn import MLPGenerator
        >>> from pyroebm.targets import Gaussian
        >>> model = MLPGenerator((2,), latent_dim=2, hidden_sizes=(8,), batch_norm=True)
        >>> losses, metrics = DeepDirected(model).losses(
        ...     Gaussian(torch.zeros(2)), torch.zeros(5, 2)
        ... )
        >>> round(float(metrics["entropy_surrogate"]), 4)  # 8 units of scale 1
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
        """Return the loss of the generator with the surrogate entropy, and its draws."""
        check_generator(self.model, energy)
        if num_samples < 2:
            raise ValueError(
                "num_samples must be at least 2 with batch normalization, got"
                f" num_samples={num_samples}: give num_samples, or a larger batch"
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
    r"""Compute the entropy of batch-normalized units from their scales, in nats.

    .. math:: H = \sum_i \tfrac12 \log(2 \pi e\, a_i^2)

    over the scales of all batch normalizations. It is exact where the normalized units are the
    output, normal and independent.

    Raises:
        ValueError: if no batch normalization of the module has scales.

    Example:
        >>> batch_norm_entropy(nn.BatchNorm1d(2)).detach()  # 1 + log 2 pi
        tensor(2.8379)
    """
    scales = [part.weight for part in batch_norms(module) if part.weight is not None]
    if not scales:
        raise ValueError(
            f"{type(module).__name__} must have batch normalization with scales, which give the"
            " entropy: use batch_norm=True or nn.BatchNorm1d(..., affine=True)"
        )
    return (
        0.5 * math.log(2.0 * math.pi * math.e)
        + torch.cat([a.flatten() for a in scales]).abs().log()
    ).sum()


def check_generator(model: Generator, energy: Energy) -> None:
    """Raise ValueError unless a generator's draws are events of the energy: real, of its shape."""
    if tuple(model.event_shape) != tuple(energy.event_shape):
        raise ValueError(
            "the generator and the energy must have the same event_shape, got"
            f" {tuple(model.event_shape)} and"
            f" {tuple(energy.event_shape)} ({type(energy).__name__})"
        )
    if not is_real(energy.support):
        raise ValueError(
            "energy must have real support, as the generator has, but"
            f" {type(energy).__name__} has support={energy.support}; wrap it:"
            " Unconstrained(energy)"
        )
