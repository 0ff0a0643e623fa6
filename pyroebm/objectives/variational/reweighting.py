"""Annealed reweighting: a flow fitted by forward KL to its own draws, weighed at a temperature a
little lower each time."""

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
from pyroebm.objectives.base import Objective
from pyroebm.objectives.variational.divergences import ForwardKL

__all__ = ["AnnealedReweighting"]


class AnnealedReweighting(Objective):
    r"""Forward KL on the flow's own draws, weighed at falling temperatures (Schopmans and
    Friederich, "Temperature-Annealed Boltzmann Generators", 2025). Flows that take the temperature
    as an input are those of Dibak, Klein, Krämer and Noé ("Temperature Steerable Flows and
    Boltzmann Generators", 2022).

    .. math::

        L = -\sum_i \bar w_i \log q_\theta(x_i), \qquad w_i = e^{-\beta U(x_i)} / q(x_i), \qquad
        x_i \sim q

    Draws of q fill a buffer, from which ``reuse`` batches are taken in proportion to the weights
    (:class:`ForwardKL`); then q, as it is by then, fills it anew. A mode that q holds at a high
    temperature keeps its mass on the way down, where the reverse divergence gives it up. No chain
    and no gradient of U is needed.

    :math:`\beta` starts at that of the first call. At each refresh it rises as far as the effective
    sample size of the weights stays above ``least_ess`` of the draws, and never above that of the
    call: what :func:`fit_flow` says is the bound. Give it a ``beta_start`` at which the modes are
    one. While q does not yet carry the present temperature, it stays there, and the weights are
    tempered for the gradient: :math:`w^\lambda`, with the largest power that has ``least_ess``.

    **The flow is fitted to the target itself only once** ``reached_beta`` **and** ``tempering``
    **are 1.** A flow too weak to have ``least_ess`` at a temperature never goes below it: train
    longer, make it richer, or ask for less. A mode that is lost at the first temperature stays
    lost, and no fact here shows it.

    With redundant latents the weight is the extended one, and y is drawn anew for each batch.
    Another flow or energy starts anew.

    Args:
        least_ess: least effective sample size, as a fraction of the draws, in (0, 1).
        buffer_size: draws of q for each refresh, as many evaluations of the target.
        reuse: batches taken from each buffer.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> flow, objective = NICE(2), AnnealedReweighting()
        >>> loss, facts = objective(
        ...     flow,
        ...     Gaussian([1.0, 0.0]),
        ...     num_samples=500,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> loss.backward()
        >>> bool(flow.transform.parts[-1].offset.grad[0] < 0)  # descent moves q to its target
        True
        >>> float(facts["evaluations"])
        4096.0
    """

    batches: Tensor
    evaluations: Tensor
    reached_beta: Tensor
    tempering: Tensor
    ess_fraction: Tensor
    fitted: ForwardKL | None

    def __init__(self, least_ess: float = 0.3, buffer_size: int = 4096, reuse: int = 16) -> None:
        super().__init__()
        check_counts({"buffer_size": 2, "reuse": 1}, buffer_size, reuse)
        if not 0.0 < least_ess < 1.0:
            raise ValueError(f"least_ess must lie between 0 and 1, got least_ess={least_ess}")
        self.least_ess = least_ess
        self.buffer_size = buffer_size
        self.reuse = reuse
        for name in ("batches", "evaluations"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        for name in ("reached_beta", "tempering", "ess_fraction"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_module("fitted", None)
        # whose the buffer is
        self._given: tuple[weakref.ref[Flow], weakref.ref[Energy]] | None = None

    def forward(
        self,
        flow: Flow,
        energy: Energy,
        num_samples: int = 512,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The loss and its facts: those of :class:`ForwardKL`, and of the last refresh
        ``reached_beta`` (its :math:`\beta`), ``tempering`` (:math:`\lambda`), ``ess_fraction`` (of
        the weights at it, not tempered) and ``evaluations`` (of the target, so far).

        Args:
            flow: q.
            energy: U.
            num_samples: draws of a batch, with replacement.
            beta: largest inverse temperature of the next refresh; of the first, the one to start
                from.
            generator: source of all draws.

        Raises:
            ValueError: if the flow does not fit the energy, or the energy is compressed.
            FloatingPointError: if a weight is NaN or infinite, or all are 0.
        """
        given = weakref.ref(flow), weakref.ref(energy)
        if self._given not in (None, given):
            self.fitted = None  # draws of another flow, or weights of another energy
        self._given, fitted = given, self.fitted
        if fitted is None or int(self.batches) % self.reuse == 0:
            fitted = self._refresh(flow, energy, beta, generator)
        self.batches += 1
        loss, facts = fitted(flow, energy, num_samples, generator=generator)
        names = ("reached_beta", "tempering", "ess_fraction", "evaluations")
        return loss, facts | {name: getattr(self, name).clone() for name in names}

    def _refresh(
        self, flow: Flow, energy: Energy, beta: float, generator: torch.Generator | None
    ) -> ForwardKL:
        """Fill the buffer with draws of q as it is now, weighed at the lowest temperature that they
        carry."""
        check_weighable(energy)
        x, energies, log_ratio = self._draw(flow, energy, generator)
        self.evaluations += self.buffer_size

        def log_weights(at: float) -> Tensor:
            return log_ratio - at * energies

        start = beta if self.fitted is None else min(float(self.reached_beta), beta)
        reached, power = start, 1.0
        least = self.least_ess * self.buffer_size / len(x)  # of the draws of finite energy alone
        if ess_fraction(log_weights(start)) >= least:
            reached = _farthest(log_weights, start, beta, least)
        else:
            power = _farthest(lambda power: power * log_weights(start), 0.0, 1.0, least)
        self.fitted = ForwardKL(x, power * log_weights(reached))
        self.reached_beta.fill_(reached)
        self.tempering.fill_(power)
        self.ess_fraction.fill_(ess_fraction(log_weights(reached)) * len(x) / self.buffer_size)
        return self.fitted

    @torch.no_grad()
    def _draw(
        self, flow: Flow, energy: Energy, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draws x of finite energy, U(x), and :math:`\log N(y \mid M(x), \Sigma(x)) - \log q(x,
        y)`, both in float64."""
        target = flow.extend(energy)
        xy, log_q = flow.push(flow.draw_noise(self.buffer_size, generator))
        x, y = target.split(xy)
        energies = energy(x).double()
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
                " is NaN or infinite and"
                f" {int((~possible).sum())} have weight 0, the energy being +inf"
            )
        return x[possible], energies[possible], log_ratio[possible].double()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        draws = state_dict.get(f"{prefix}fitted.draws")  # a module that is None takes no state
        self.fitted = None if draws is None else ForwardKL(torch.zeros_like(draws))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _farthest(
    log_weights: Callable[[float], Tensor], start: float, end: float, least: float
) -> float:
    """Bisection from ``start`` to ``end``, or to where the effective sample size falls below
    ``least``."""
    if ess_fraction(log_weights(end)) >= least:
        return end
    for _ in range(60):
        middle = 0.5 * (start + end)
        start, end = (
            (middle, end) if ess_fraction(log_weights(middle)) >= least else (start, middle)
        )
    return start
