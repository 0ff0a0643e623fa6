"""Annealed reweighting: forward KL on weighted draws of the flow, at decreasing temperatures."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.wrappers import check_weighable
from pyroebm.flows.flow import Flow
from pyroebm.flows.importance import ess_fraction
from pyroebm.objectives.variational.base import FlowObjective
from pyroebm.objectives.variational.divergences import ForwardKL

__all__ = ["AnnealedReweighting"]


class AnnealedReweighting(FlowObjective):
    r"""Forward KL on weighted draws of the flow, annealed (Schopmans and Friederich, 2025).

    .. math::

        L = -\sum_i \bar w_i \log q_\theta(x_i), \qquad w_i = e^{-\beta U(x_i)} / q(x_i), \qquad
        x_i \sim q

    A buffer is filled with draws of q, and ``reuse`` batches are drawn from it in proportion to the
    weights (:class:`ForwardKL`); then it is filled with draws of the current q. Modes that q has at
    a high temperature keep their mass as the temperature decreases, whereas with the reverse
    divergence they can be lost. Neither a chain nor a gradient of U is needed. (Dibak, Klein,
    Krämer and Noé, 2022, use flows with the temperature as an input instead.)

    :math:`\beta` of the weights starts at that of the first loss. At each refresh it increases as
    long as the effective sample size of the weights is at least ``min_ess`` of the draws, up to the
    :math:`\beta` of the step. Choose ``beta_start`` so that the modes are not yet separated. If the
    effective sample size is too small at the current :math:`\beta`, it is kept, and the weights are
    tempered for the gradient: :math:`w^\lambda`, with the largest power that has ``min_ess``.

    **The flow is fitted to the target itself only if** ``reached_beta`` **and** ``tempering``
    **are 1.** If the flow is too inflexible for ``min_ess`` at a temperature, the temperature does
    not decrease further: train longer, use a more flexible flow, or decrease ``min_ess``. A mode
    that is missed at the first temperature is not found later, and no metric shows it.

    With auxiliary variables the weight is that of the augmented densities, and y is drawn again for
    each batch. Calling the objective with another flow starts again at the first temperature.

    Metrics: those of :class:`ForwardKL`, with ``beta`` of the step; and of the last refresh
    ``reached_beta`` (its :math:`\beta`), ``tempering`` (:math:`\lambda`), ``ess_fraction`` (of the
    weights before tempering) and ``evaluations`` (of the target, in total).

    Args:
        energy: U.
        num_samples: draws of a batch, with replacement, at least 2.
        min_ess: minimum effective sample size, as a fraction of the draws, in (0, 1).
        buffer_size: number of draws of q, and of evaluations of the target, for each refresh.
        reuse: number of batches that are drawn from each buffer.
        beta_start: initial inverse temperature, in (0, 1].
        anneal: as in :class:`FlowObjective`.

    Raises:
        ValueError: if a number is out of its range, or the energy is log-regularized; when called,
            if the flow does not fit the energy.
        FloatingPointError: when called, if a weight is NaN or infinite, or all are 0.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> flow, objective = NICE(2), AnnealedReweighting(Gaussian([1.0, 0.0]))
        >>> loss, metrics = objective(flow, generator=torch.Generator().manual_seed(0))
        >>> loss.backward()
        >>> bool(flow.transform.parts[-1].offset.grad[0] < 0)  # descent moves q to its target
        True
        >>> float(metrics["evaluations"])
        4096.0
    """

    batches: Tensor
    evaluations: Tensor
    reached_beta: Tensor
    tempering: Tensor
    ess_fraction: Tensor
    fitted: ForwardKL | None

    def __init__(
        self,
        energy: Energy,
        num_samples: int = 512,
        *,
        min_ess: float = 0.3,
        buffer_size: int = 4096,
        reuse: int = 16,
        beta_start: float = 0.1,
        anneal: float = 0.4,
    ) -> None:
        super().__init__(energy, num_samples, beta_start=beta_start, anneal=anneal)
        check_weighable(energy)
        check_counts({"buffer_size": 2, "reuse": 1}, buffer_size, reuse)
        if not 0.0 < min_ess < 1.0:
            raise ValueError(f"min_ess must be in (0, 1), got min_ess={min_ess}")
        self.min_ess = min_ess
        self.buffer_size = buffer_size
        self.reuse = reuse
        for name in ("batches", "evaluations"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        for name in ("reached_beta", "tempering", "ess_fraction"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_module("fitted", None)
        # the flow to which the buffer belongs
        self._flow: weakref.ref[Flow] | None = None

    def loss(
        self, flow: Flow, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch from the buffer, which is refilled first when it is due."""
        if self._flow not in (None, weakref.ref(flow)):
            self.fitted = None  # draws of another flow
        self._flow, fitted = weakref.ref(flow), self.fitted
        if fitted is None or int(self.batches) % self.reuse == 0:
            fitted = self._refresh(flow, self.beta, generator)
        self.batches += 1
        loss, metrics = fitted.loss(flow, generator)
        names = ("reached_beta", "tempering", "ess_fraction", "evaluations")
        return loss, metrics | {name: getattr(self, name).clone() for name in names}

    def _refresh(self, flow: Flow, beta: float, generator: torch.Generator | None) -> ForwardKL:
        """Fill the buffer with draws of the current q, weighted at the largest possible beta."""
        x, energies, log_ratio = self._draw(flow, generator)
        self.evaluations += self.buffer_size

        def log_weights(at: float) -> Tensor:
            return log_ratio - at * energies

        start = beta if self.fitted is None else min(float(self.reached_beta), beta)
        reached, power = start, 1.0
        min_ess = self.min_ess * self.buffer_size / len(x)  # of the draws of finite energy alone
        if ess_fraction(log_weights(start)) >= min_ess:
            reached = _bisect(log_weights, start, beta, min_ess)
        else:
            power = _bisect(lambda power: power * log_weights(start), 0.0, 1.0, min_ess)
        self.fitted = ForwardKL(x, power * log_weights(reached), num_samples=self.num_samples)
        self.reached_beta.fill_(reached)
        self.tempering.fill_(power)
        self.ess_fraction.fill_(ess_fraction(log_weights(reached)) * len(x) / self.buffer_size)
        return self.fitted

    @torch.no_grad()
    def _draw(self, flow: Flow, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draw from q, and drop draws of infinite energy.

        Returns:
            x, U(x) and :math:`\log N(y \mid M(x), \Sigma(x)) - \log q(x, y)`, the latter two in
            float64.
        """
        target = flow.extend(self.energy)
        xy, log_q = flow.forward_and_log_prob(flow.rsample_base(self.buffer_size, generator))
        x, y = target.split(xy)
        energies = self.energy(x).double()
        log_ratio = (
            -log_q
            if flow.conditional is None
            else flow.conditional.log_prob(y, target.vectors(x)) - log_q
        )
        possible = energies != math.inf
        wrong = int((~(energies + log_ratio)[possible].isfinite()).sum())
        if wrong or not bool(possible.any()):
            raise FloatingPointError(
                f"of buffer_size={self.buffer_size} draws of the flow {wrong} have a weight that"
                f" is NaN or infinite and {int((~possible).sum())} have weight 0, since their"
                " energy is +inf"
            )
        return x[possible], energies[possible], log_ratio[possible].double()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        draws = state_dict.get(f"{prefix}fitted.draws")  # torch does not load into None
        self.fitted = None
        if draws is not None:
            self.fitted = ForwardKL(torch.zeros_like(draws), num_samples=self.num_samples)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _bisect(
    log_weights: Callable[[float], Tensor], start: float, end: float, min_ess: float
) -> float:
    """Find the point nearest to ``end`` with effective sample size at least ``min_ess``."""
    if ess_fraction(log_weights(end)) >= min_ess:
        return end
    for _ in range(60):
        middle = 0.5 * (start + end)
        start, end = (
            (middle, end) if ess_fraction(log_weights(middle)) >= min_ess else (start, middle)
        )
    return start
