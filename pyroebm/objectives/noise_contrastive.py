"""Noise-contrastive estimation: an energy is trained to classify data and noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import standard_normal
from pyroebm.core.supports import is_real
from pyroebm.flows import Flow
from pyroebm.objectives.base import Objective
from pyroebm.objectives.noise import Noise

__all__ = ["ConditionalNCE", "NoiseContrastive", "RankingNCE", "classify"]

Metrics = dict[str, Tensor]


class NoiseContrastive(Objective):
    r"""Binary noise-contrastive estimation with a trained log Z (Gutmann and Hyvärinen, 2012).

    .. math:: L = -\frac1n \sum_i \log h(x_i) - \frac\nu m \sum_j \log(1 - h(y_j)), \qquad
        h(x) = \frac{e^{-E(x) - c}}{e^{-E(x) - c} + \nu q(x)}, \quad y_j \sim q

    with :math:`h` the posterior probability of being data, and m = :math:`\nu n` noise draws. The
    minimum over all functions is at :math:`E + c = -\log p_{data}`, so c estimates log Z. As
    :math:`\nu` grows, :math:`\nabla L` converges to the gradient of :math:`-\frac1n \sum_i \log
    p(x_i)`. The estimate is the more efficient the more similar the noise is to the data. E is not
    determined where the noise has no draws.

    Args:
        noise: q, see :class:`~pyroebm.objectives.noise.Noise`;
            :func:`~pyroebm.objectives.gaussian_noise` fits a normal distribution to data. A flow is
            held fixed, and is no submodule.
        nu: :math:`\nu > 0`, ratio of noise draws to rows of data, not necessarily an integer (at
            least one draw is made).
        log_z: initial value of c.
        learn_log_z: False holds c fixed, for an energy with a learned additive constant.

    Attributes:
        log_z: c, a parameter, ``()``. If the energy has an additive constant of its own, only their
            sum is determined.

    Raises:
        ValueError: if ``nu`` is not positive, the noise does not fit the energy, or its density is
            not finite and positive at a row of the data.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroebm.targets import Gaussian
        >>> energy, noise = Gaussian(torch.zeros(2)), dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> nce = NoiseContrastive(noise, log_z=energy.log_z)  # the noise is the model
        >>> loss, metrics = nce(energy, torch.randn(100, 2))
        >>> round(float(loss.detach()), 4), round(float(metrics["posterior_data"]), 4)
        (1.3863, 0.5)
    """

    def __init__(
        self,
        noise: Distribution | Flow | Energy,
        nu: float = 1.0,
        log_z: float = 0.0,
        learn_log_z: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(nu, bool) or not 0.0 < nu < math.inf:
            raise ValueError(
                "nu must be positive and finite, the ratio of noise draws to rows of data, got"
                f" nu={nu!r}"
            )
        self.noise, self.nu = Noise(noise), float(nu)
        start = torch.tensor(float(log_z), dtype=self.noise.dtype, device=self.noise.device)
        self.log_z = nn.Parameter(start, requires_grad=learn_log_z)

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics, those of :meth:`contrast`."""
        log_q_data = self.noise.log_prob(batch, energy)
        draws, log_q = self.noise.draw(max(1, round(self.nu * len(batch))), energy, generator)
        return self.contrast(energy, batch, log_q_data, draws, log_q)

    def contrast(
        self, energy: Energy, data: Tensor, log_q_data: Tensor, noise: Tensor, log_q_noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        r"""Return the loss and its metrics for given data and noise with their :math:`\log q`.

        Metrics: ``energy_data``, ``energy_noise``; ``posterior_data``, ``posterior_noise`` (means
        of h), ``accuracy`` of the classifier (of data and noise in their proportion); ``log_z`` (c)
        and ``log_likelihood`` (the mean of -E - c over the data, an estimate, as c is).
        """
        on_data, on_noise = energy(torch.cat([data, noise])).split([len(data), len(noise)])
        logits = [
            -values - self.log_z - log_q
            for values, log_q in ((on_data, log_q_data), (on_noise, log_q_noise))
        ]
        loss, metrics = classify(logits[0], logits[1], self.nu)
        return loss, {
            "energy_data": on_data.detach().mean(),
            "energy_noise": on_noise.detach().mean(),
            "log_z": self.log_z.detach().clone(),
            "log_likelihood": -(on_data.detach().mean() + self.log_z.detach()),
            **metrics,
        }


class RankingNCE(Objective):
    r"""Ranking noise-contrastive estimation (Jozefowicz et al., 2016; Ma and Collins, 2018).

    .. math:: L = -\frac1n \sum_i \log \frac{w(x_i)}{w(x_i) + \sum_{k=1}^K w(y_{ik})}, \qquad
        w(x) = \frac{e^{-E(x)}}{q(x)}, \quad y_{ik} \sim q

    L is the cross-entropy of identifying a row of data among K noise draws. Z cancels, and E is
    determined up to a constant. The estimate is consistent for every K. The sum over the noise is
    an importance sampling estimate of Z: as K grows, :math:`\nabla L` converges to the gradient of
    the negative log-likelihood.

    Args:
        noise: q, as in :class:`NoiseContrastive`.
        num_negatives: K, number of noise draws for each row of data.

    Raises:
        ValueError: if ``num_negatives`` < 1, the noise does not fit the energy, or its density is
            not finite and positive at a row of the data.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroebm.targets import Gaussian
        >>> ranking = RankingNCE(dist.Normal(torch.zeros(2), 1.0).to_event(1), num_negatives=3)
        >>> loss, metrics = ranking(
        ...     Gaussian(torch.zeros(2)), torch.randn(100, 2)
        ... )  # noise = model: log 4
        >>> round(float(loss), 4)
        1.3863
    """

    def __init__(self, noise: Distribution | Flow | Energy, num_negatives: int = 10) -> None:
        super().__init__()
        check_counts({"num_negatives": 1}, num_negatives)
        self.noise, self.num_negatives = Noise(noise), num_negatives

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics, those of :meth:`contrast`."""
        log_q_data = self.noise.log_prob(batch, energy)
        draws, log_q = self.noise.draw(self.num_negatives * len(batch), energy, generator)
        return self.contrast(energy, batch, log_q_data, draws, log_q)

    def contrast(
        self, energy: Energy, data: Tensor, log_q_data: Tensor, noise: Tensor, log_q_noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        r"""Return the loss and its metrics for given data and K times as many noise draws.

        Metrics: ``energy_data``, ``energy_noise``; ``accuracy`` (the fraction of rows of data with
        the largest w); ``log_z``, the importance sampling estimate from all draws (low on average),
        and ``log_likelihood`` with it.
        """
        on_data, on_noise = energy(torch.cat([data, noise])).split([len(data), len(noise)])
        log_w = torch.cat(
            [
                (-on_data - log_q_data).unsqueeze(1),
                (-on_noise - log_q_noise).reshape(len(data), -1),
            ],
            1,
        )
        loss = (log_w.logsumexp(1) - log_w[:, 0]).mean()
        log_w = log_w.detach()
        log_z = log_w[:, 1:].flatten().logsumexp(0) - math.log(len(noise))
        return loss, {
            "energy_data": on_data.detach().mean(),
            "energy_noise": on_noise.detach().mean(),
            "accuracy": (log_w[:, :1] > log_w[:, 1:]).all(1).to(log_w).mean(),
            "log_z": log_z,
            "log_likelihood": -(on_data.detach().mean() + log_z),
        }


class ConditionalNCE(Objective):
    r"""Conditional noise-contrastive estimation, with perturbed data (Ceylan and Gutmann, 2018).

    .. math:: L = \frac{2}{n K} \sum_{i, k} \log\big(1 + e^{E(x_i) - E(y_{ik})}\big), \qquad
        y_{ik} \sim N(x_i, \epsilon^2)

    The perturbation is symmetric, so its density cancels, as Z does. The estimate is consistent for
    every :math:`\epsilon`. As :math:`\epsilon \to 0` the objective converges to score matching; the
    relative weights of modes further apart than :math:`\epsilon` are poorly determined.

    Args:
        noise_scale: :math:`\epsilon`, standard deviation in units of x: a number, or a tensor that
            broadcasts to the event shape.
        num_negatives: K, number of perturbations of each row.

    Raises:
        ValueError: if ``noise_scale`` is not positive or does not fit, ``num_negatives`` < 1, or
            the support is not real.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> loss, metrics = ConditionalNCE(0.5)(
        ...     Gaussian(torch.zeros(2)), torch.zeros(100, 2)
        ... )  # data at the mode
        >>> bool(loss < 2 * math.log(2)), float(metrics["accuracy"])
        (True, 1.0)
    """

    noise_scale: Tensor

    def __init__(self, noise_scale: float | Tensor, num_negatives: int = 1) -> None:
        super().__init__()
        check_counts({"num_negatives": 1}, num_negatives)
        scale = torch.as_tensor(noise_scale, dtype=torch.float64).detach()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(
                f"noise_scale must be positive and finite, got noise_scale={noise_scale}"
            )
        self.num_negatives = num_negatives
        self.register_buffer("noise_scale", scale)

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics, those of :meth:`contrast`."""
        energy.check_states(batch, "batch")
        if not is_real(energy.support):
            raise ValueError(
                f"energy must have real support for ConditionalNCE, but {type(energy).__name__} has"
                f" support {energy.support}"
            )
        event = tuple(energy.event_shape)
        try:
            scale = self.noise_scale.to(batch).broadcast_to(event)
        except RuntimeError as error:
            given = tuple(self.noise_scale.shape)
            raise ValueError(
                f"noise_scale must broadcast to the event_shape {event}, got shape {given}"
            ) from error
        start = batch.repeat(self.num_negatives, *[1] * len(event))
        noise = standard_normal(start.shape, generator, batch.dtype, batch.device)
        return self.contrast(energy, batch, start + scale * noise)

    def contrast(self, energy: Energy, data: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics for given data and perturbations, ``(K n, *event)``.

        Metrics: ``energy_data``, ``energy_noise``, ``accuracy`` (the fraction of perturbations with
        a higher energy than the data).
        """
        on_data, on_noise = energy(torch.cat([data, noise])).split([len(data), len(noise)])
        rise = on_noise.reshape(-1, len(data)) - on_data
        return -2.0 * logsigmoid(rise).mean(), {
            "energy_data": on_data.detach().mean(),
            "energy_noise": on_noise.detach().mean(),
            "accuracy": (rise.detach() > 0).to(rise).mean(),
        }


def classify(on_data: Tensor, on_noise: Tensor, nu: float) -> tuple[Tensor, Metrics]:
    r"""Return the cross-entropy of classifying data and :math:`\nu` times as much noise.

    Args:
        on_data: :math:`\log p - \log q` of the data.
        on_noise: :math:`\log p - \log q` of the noise.
        nu: :math:`\nu`.

    Returns:
        The loss, and the metrics ``posterior_data``, ``posterior_noise``, ``accuracy``.
    """
    data, noise = on_data - math.log(nu), on_noise - math.log(nu)
    loss = -logsigmoid(data).mean() - nu * logsigmoid(-noise).mean()
    right = (data.detach() > 0).to(data).mean() + nu * (noise.detach() < 0).to(noise).mean()
    return loss, {
        "posterior_data": data.detach().sigmoid().mean(),
        "posterior_noise": noise.detach().sigmoid().mean(),
        "accuracy": right / (1.0 + nu),
    }
