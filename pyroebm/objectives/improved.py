"""Improved contrastive divergence, with a KL gradient through the last step of the sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, score
from pyroebm.core.supports import is_real
from pyroebm.core.wrappers import eval_mode
from pyroebm.kernels.base import column, normal_like, rows
from pyroebm.kernels.langevin import ULA
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.contrastive import (
    Initial,
    Metrics,
    check_batch,
    contrastive_loss,
    kernel_metrics,
    run_chains,
)
from pyroebm.objectives.persistent import ReplayBufferCD

__all__ = ["ImprovedCD", "nearest_neighbor_entropy"]

EULER = 0.5772156649015329


class ImprovedCD(ReplayBufferCD):
    r"""Contrastive divergence with a KL term for the sampler (Du et al., 2021).

    The distribution :math:`q_\theta` of the chains after their Langevin steps depends on the
    energy. The term

    .. math:: \mathrm{KL}(q_\theta \,\|\, p_{\bar\theta}) + \text{const}
        = E_{q_\theta}[E_{\bar\theta}(x)] - H(q_\theta)

    is added to the loss of :class:`ReplayBufferCD`, with :math:`\bar\theta = \theta` held fixed in
    the energy. Its gradient is taken through the last step of the sampler alone, as in the paper,
    and moves the sampler towards the model. The exact gradient of :math:`\mathrm{KL}(p_D \|
    p_\theta) - \mathrm{KL}(q_\theta \| p_\theta)` has this term with the *opposite* sign (Hinton,
    2002), so the loss does not descend on this difference.

    H is estimated from nearest neighbors (:func:`nearest_neighbor_entropy`), which couples the
    chains.

    Args:
        num_chains: as in :class:`ReplayBufferCD`, at least 2.
        k: as in :class:`ReplayBufferCD`.
        kernel: Langevin steps with a scalar step size; None is ``ULA(0.1)``.
        buffer_size: as in :class:`ReplayBufferCD`.
        restart: as in :class:`ReplayBufferCD`.
        initial: as in :class:`ReplayBufferCD`.

    Raises:
        ValueError: if a number is out of range, ``kernel`` is no ULA or has a metric, or the
            support is not real.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> objective = ImprovedCD(num_chains=10, k=5, kernel=ULA(0.1))
        >>> loss, metrics = objective(MLPEnergy((2,), (8,)), torch.randn(5, 2))
        >>> sorted(metrics)[:4]
        ['acceptance_rate', 'energy_data', 'energy_gap', 'energy_model']
    """

    def __init__(
        self,
        num_chains: int = 100,
        k: int = 20,
        kernel: ULA | None = None,
        *,
        buffer_size: int | None = None,
        restart: float = 0.0,
        initial: Initial = None,
    ) -> None:
        kernel = ULA(0.1) if kernel is None else kernel
        super().__init__(
            num_chains, k, kernel, buffer_size=buffer_size, restart=restart, initial=initial
        )
        if not isinstance(kernel, ULA) or kernel.inverse_mass is not None:
            raise ValueError(f"kernel must be a ULA without inverse_mass, got {kernel}")
        if num_chains < 2:
            raise ValueError(
                "num_chains must be at least 2 to estimate the entropy from neighbors, got"
                f" num_chains={num_chains}"
            )
        self.langevin = kernel

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: those of :class:`ReplayBufferCD`, and ``entropy_model`` in nats.
        """
        if not is_real(energy.support):
            raise ValueError(
                f"energy must have real support for ImprovedCD, but {type(energy).__name__} has"
                f" {energy.support}"
            )
        check_batch(energy, batch)
        taken, x = self.take(energy, generator)
        rate = torch.ones((), dtype=energy.dtype, device=energy.device)
        if self.k > 1:
            x, rate = run_chains(energy, self.langevin, x, self.k - 1, generator)
        with eval_mode(energy):
            x = langevin_step(energy, x, self.langevin, generator)
            with frozen(energy):
                values = energy(x)
        self.put(taken, x.detach())
        loss, metrics = contrastive_loss(
            energy(batch), energy(x.detach()), kernel_metrics(self.langevin, rate)
        )
        entropy = nearest_neighbor_entropy(x)
        divergence = values.mean() - entropy
        # only the gradient is added: the value of the loss stays that of ReplayBufferCD
        return (
            loss + (divergence - divergence.detach()),
            metrics | {"entropy_model": entropy.detach()},
        )


def langevin_step(
    energy: Energy, x: Tensor, kernel: ULA, generator: torch.Generator | None
) -> Tensor:
    """Take a step of ULA with its graph, with the random numbers of :class:`~pyroebm.ULA`."""
    q = rows(x)
    eps = column(kernel.step_size, q)
    noise = math.sqrt(kernel.temperature) * normal_like(q, generator)
    return (q + eps * noise + 0.5 * eps**2 * rows(score(energy, x))).reshape(x.shape)


def nearest_neighbor_entropy(x: Tensor) -> Tensor:
    r"""Estimate a differential entropy from nearest neighbors (Kozachenko and Leonenko, 1987).

    .. math::

        \hat H = \frac dn \sum_i \log \rho_i + \log(n - 1) + \log \frac{\pi^{d/2}}{\Gamma(d/2 + 1)}
        + \gamma

    with :math:`\rho_i` the distance of draw i to its nearest neighbor, and :math:`\gamma =
    0.5772...` Euler's constant. Its bias vanishes as n grows, slowly in many dimensions. In one or
    two dimensions its gradient has no finite variance. Equal draws give minus infinity.

    Args:
        x: draws ``(n, *event)``, n at least 2.

    Returns:
        The estimate in nats with its graph, shape ``()``.

    Example:
        >>> x = torch.randn(
        ...     2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ... )
        >>> abs(float(nearest_neighbor_entropy(x)) - 0.5 * math.log(2 * math.pi * math.e)) < 0.1
        True
    """
    q = rows(x)
    n, d = q.shape
    with torch.no_grad():
        nearest = torch.cdist(q, q).fill_diagonal_(math.inf).argmin(1)
    # half the logarithm of the squared distance: a norm has no gradient at 0
    log_distance = 0.5 * (q - q[nearest]).square().sum(1).log()
    log_ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1.0)
    return d * log_distance.mean() + math.log(n - 1) + log_ball + EULER
