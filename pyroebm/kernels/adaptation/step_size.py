"""Step sizes that reach an acceptance rate: a first guess, and dual averaging from there. One for
all chains, or one for each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import AnyState, Kernel

__all__ = ["DualAveraging", "find_step_size", "near_the_median", "shared_mean"]

#: Steps, each with a fresh momentum, from which the acceptance rate of one chain alone is taken.
PROBES = 8


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _exp(value: float | Tensor) -> float | Tensor:
    # Where every step is accepted, its logarithm grows without end: the step itself must overflow
    # in no floating-point type.
    return value.clamp(max=60.0).exp() if isinstance(value, Tensor) else math.exp(min(value, 60.0))


class DualAveraging(NamedTuple):
    r"""Nesterov's dual averaging of :math:`\log\epsilon` (Hoffman and Gelman, 2014, section 3.2),
    as an immutable value.

    .. math::

        \bar H_t = (1 - \tfrac{1}{t + t_0}) \bar H_{t-1} + \tfrac{1}{t + t_0} (\delta - \alpha_t),
        \quad \log\epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar H_t

    Every field but the count is a number, or a tensor ``(chains,)`` where each chain tunes a step
    size of its own.

    Args:
        mu: :math:`\mu`, where :math:`\log\epsilon` is drawn to.
        log_step: :math:`\log\epsilon_t`, what to use next.
        log_average: the weighted average of the iterates, what to use in the end.
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
        """Begin at ``step_size``, drawn towards ten times that: large steps are cheap to try."""
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
        """One observation of the acceptance rate. A value that is no number in [0, 1] is refused:
        it would freeze every chain.

        ``gamma`` is twice that of the paper: fewer swings to average over. After 50 steps it comes
        nearer its target by half or more, for MALA, HMC and NUTS, with few chains and many.
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
        """What to use next."""
        return _exp(self.log_step)

    @property
    def average(self) -> float | Tensor:
        """What to use in the end."""
        return _exp(self.log_average)


def shared_mean(rates: Tensor, together: Tensor) -> Tensor:
    """``rates`` (chains,) with those of the chains in ``together`` replaced by their mean."""
    return torch.where(together, rates[together].mean() if bool(together.any()) else rates, rates)


def near_the_median(sizes: Tensor) -> Tensor:
    """Which step sizes ``(chains,)`` lie within a factor of 2 of their median.

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
    """A step size to start from: double or halve until the acceptance of one step crosses one half
    (heuristic of NUTS).

    Args:
        kernel: a kernel with a step size; its own is where the search begins, and ends on a
            discrete support.
        energy, state: where the chains are.
        generator: source of randomness; None is torch's global one.
        together: which chains share one step size, found from their mean acceptance, shape
            ``(chains,)``. Each of the others has one of its own, found from ``PROBES`` steps, since
            one step of one chain says little. None: all share one.
        counted: whose acceptance counts where all share one, shape ``(chains,)``; None: that of
            all.

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
