"""Step size adaptation: an initial search and dual averaging, for all chains or for each chain."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import AnyState, Kernel

__all__ = ["DualAveraging", "find_step_size", "near_the_median", "shared_mean"]

#: Number of steps, each with a new momentum, that estimate the acceptance rate of a single chain.
PROBES = 8


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _exp(value: float | Tensor) -> float | Tensor:
    # If every step is accepted, the logarithm grows without bound. The limit keeps the step size
    # finite in every floating-point type.
    return value.clamp(max=60.0).exp() if isinstance(value, Tensor) else math.exp(min(value, 60.0))


class DualAveraging(NamedTuple):
    r"""Nesterov's dual averaging of :math:`\log\epsilon` (Hoffman and Gelman, 2014, section 3.2).

    .. math::

        \bar H_t = (1 - \tfrac{1}{t + t_0}) \bar H_{t-1} + \tfrac{1}{t + t_0} (\delta - \alpha_t),
        \quad \log\epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar H_t

    The value is immutable. Every field but the count is a number, or a tensor ``(chains,)`` if each
    chain has its own step size.

    Args:
        mu: :math:`\mu`, the value towards which :math:`\log\epsilon` is shrunk.
        log_step: :math:`\log\epsilon_t`, of the next step.
        log_average: weighted average of the iterates, of the step size after warm-up.
        error: :math:`\bar H_t`.
        steps: t.

    Example:
        >>> tuning = DualAveraging.start(0.1)
        >>> tuning.update(1.0, target=0.8).log_step > tuning.log_step
        True
        >>> tuning = DualAveraging.start(torch.tensor([0.1, 0.2]))
        >>> tuning.update(torch.tensor([1.0, 0.0]), target=0.8).step_size.shape
        torch.Size([2])
    """

    mu: float | Tensor
    log_step: float | Tensor
    log_average: float | Tensor
    error: float | Tensor
    steps: int = 0

    @classmethod
    def start(cls, step_size: float | Tensor) -> DualAveraging:
        """Start at ``step_size`` and shrink towards ten times that: large steps cost little."""
        log_step = _log(step_size)
        return cls(_log(10.0 * step_size), log_step, log_step, 0.0 * log_step)

    def update(
        self,
        acceptance: float | Tensor,
        target: float,
        gamma: float = 0.1,
        t0: float = 10.0,
        kappa: float = 0.75,
    ) -> DualAveraging:
        r"""Update with one observation of the acceptance rate.

        The default of ``gamma`` is twice that of the paper, which reduces the oscillations. After
        50 steps the acceptance rate is closer to its target by half or more, for MALA, HMC and NUTS
        with few and many chains.

        Args:
            acceptance: acceptance rate :math:`\alpha_t`.
            target: acceptance rate :math:`\delta` to aim at.
            gamma: :math:`\gamma`.
            t0: :math:`t_0`.
            kappa: exponent of the weights of the average.

        Raises:
            ValueError: if ``acceptance`` is not a number in [0, 1]. A NaN would stop every chain.
        """
        seen = torch.as_tensor(acceptance)
        if not bool(((seen >= 0.0) & (seen <= 1.0)).all()):
            raise ValueError(f"acceptance must be a number in [0, 1], got {acceptance}")
        steps = self.steps + 1
        weight = 1.0 / (steps + t0)
        error = (1.0 - weight) * self.error + weight * (target - acceptance)
        log_step = self.mu - math.sqrt(steps) / gamma * error
        decay = steps**-kappa
        return DualAveraging(
            self.mu, log_step, decay * log_step + (1.0 - decay) * self.log_average, error, steps
        )

    @property
    def step_size(self) -> float | Tensor:
        """Step size of the next step."""
        return _exp(self.log_step)

    @property
    def average(self) -> float | Tensor:
        """Step size after warm-up."""
        return _exp(self.log_average)


def shared_mean(rates: Tensor, together: Tensor) -> Tensor:
    """Replace the entries of the chains in ``together`` by their mean; shape ``(chains,)``."""
    return torch.where(together, rates[together].mean() if bool(together.any()) else rates, rates)


def near_the_median(sizes: Tensor) -> Tensor:
    """Return which step sizes ``(chains,)`` are within a factor of 2 of their median.

    Example:
        >>> near_the_median(torch.tensor([0.1, 0.12, 0.15, 1e-6]))
        tensor([ True,  True,  True, False])
    """
    log_sizes = sizes.log()
    return (log_sizes - log_sizes.quantile(0.5)).abs() <= math.log(2.0)


def find_step_size(
    kernel: Kernel[Any],
    energy: Energy,
    state: AnyState,
    generator: torch.Generator | None = None,
    together: Tensor | None = None,
    counted: Tensor | None = None,
) -> float | Tensor:
    """Find an initial step size: double or halve it until the acceptance rate crosses one half.

    This is the heuristic of NUTS (Hoffman and Gelman, 2014).

    Args:
        kernel: a kernel with a step size, at which the search starts. On a discrete support this
            step size is returned.
        energy: the target.
        state: the current state of the chains.
        generator: source of randomness; None is torch's default generator.
        together: which chains share one step size, found from their mean acceptance rate, shape
            ``(chains,)``. Each of the others has its own, found from ``PROBES`` steps, because the
            acceptance rate of one step of one chain is too noisy. None: all share one.
        counted: which chains count in the mean if all share one step size, shape ``(chains,)``;
            None: all.

    Returns:
        a number if all chains share it, else a tensor ``(chains,)``.
    """
    probe: Kernel[Any] = kernel.probe()
    size = torch.as_tensor(kernel.step_size, dtype=torch.float64, device=state.energy.device)
    chains = len(state.energy)
    if together is None or bool(together.all()):
        size, together = size.mean(), torch.ones(chains, dtype=torch.bool, device=size.device)
    else:
        size = shared_mean(size.expand(chains), together)
    last, settled = torch.zeros_like(size), torch.zeros_like(size, dtype=torch.bool)
    # On a discrete support the distances between values set the scale, and far from equilibrium
    # steps of any size are accepted.
    for _ in range(0 if kernel.discrete else 50):
        probe = probe.replace(step_size=size)
        probes = 1 if size.dim() == 0 else PROBES
        rates = torch.stack(
            [probe.step(energy, state, generator)[1].acceptance_rate for _ in range(probes)]
        ).mean(0)
        shared = rates if counted is None else rates[counted]
        rate = shared.mean() if size.dim() == 0 else shared_mean(rates, together)
        wanted = torch.where(rate > 0.5, 1.0, -1.0).to(size)
        settled |= last * wanted < 0
        if bool(settled.all()):
            break
        last, size = wanted, torch.where(settled, size, size * 2.0**wanted)
    return size if size.dim() else float(size)
