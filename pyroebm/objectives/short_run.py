"""Maximum likelihood with short chains from a fixed initial distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import Kernel
from pyroebm.kernels.langevin import ULA
from pyroebm.objectives.base import Objective
from pyroebm.objectives.contrastive import (
    Initial,
    Metrics,
    check_batch,
    check_chain,
    contrastive_loss,
    initial_states,
    kernel_metrics,
    run_chains,
)

__all__ = ["ShortRun", "langevin"]


class ShortRun(Objective):
    r"""Short-run maximum likelihood: chains restart at each batch (Nijkamp et al., 2019).

    .. math::

        L = \frac1n \sum_i E(x_i) - \frac1n \sum_j E(\tilde x_j), \qquad
        \tilde x_j = K^k(x_0), \quad x_0 \sim p_0

    with :math:`\tilde x_j` held fixed and :math:`K^k` k steps of a kernel. Short chains have not
    converged. The distribution of the data is learned by the *sampler*, k steps from :math:`p_0`,
    from which :meth:`sample` draws. The energy is in general not a density of the data, and longer
    chains have another distribution.

    Args:
        k: steps of a chain.
        kernel: any kernel of :mod:`pyroebm.kernels`, such as ``ULA(step_size, temperature=...)`` or
            :func:`langevin`; None as in :class:`ContrastiveDivergence`.
        initial: :math:`p_0`: a distribution of events, or a function of the number of chains and a
            generator; None is ``energy.initial``.

    Raises:
        ValueError: if a number is out of range, ``kernel`` is no kernel, or states do not fit the
            energy.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> energy = MLPEnergy((2,), (8,))
        >>> objective = ShortRun(k=10, kernel=langevin(drift=0.01, noise=0.01))
        >>> loss, metrics = objective(energy, torch.randn(5, 2))
        >>> round(float(metrics["temperature"]), 6)
        0.005
        >>> objective.sample(energy, 7).shape
        torch.Size([7, 2])
    """

    measures_fit = False

    def __init__(
        self,
        k: int = 100,
        kernel: Kernel[Any] | None = None,
        *,
        initial: Initial = None,
    ) -> None:
        super().__init__()
        check_chain(k, kernel)
        self.k = k
        self.kernel = kernel
        self.initial = initial

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics.

        Metrics: ``energy_data``, ``energy_model``, ``energy_gap``, the kernel's
        ``acceptance_rate`` and, where it has one, ``temperature``.
        """
        check_batch(energy, batch)
        x, rate = run_chains(
            energy,
            self.kernel,
            initial_states(energy, self.initial, len(batch), generator),
            self.k,
            generator,
        )
        return contrastive_loss(energy(batch), energy(x), kernel_metrics(self.kernel, rate))

    def sample(
        self, energy: Energy, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the trained sampler: last states of short chains, ``(num_samples, *event)``."""
        return run_chains(
            energy,
            self.kernel,
            initial_states(energy, self.initial, num_samples, generator),
            self.k,
            generator,
        )[0]


def langevin(drift: float, noise: float) -> ULA:
    r"""Make a Langevin kernel from the two constants that papers use.

    .. math:: x' = x - a \nabla E(x) + b n, \qquad n \sim N(0, I)

    It is :class:`~pyroebm.ULA` with step size :math:`\epsilon = \sqrt{2a}` at temperature :math:`T
    = b^2 / 2a`, and samples :math:`e^{-E/T}` up to the discretization error. With a = 1 and b =
    0.01 (Grathwohl et al., 2020) T is 0.00005, not 1.

    Args:
        drift: a > 0, in squared units of x.
        noise: b > 0, in units of x.

    Raises:
        ValueError: if a number is not positive and finite.

    Example:
        >>> langevin(drift=1.0, noise=0.01).temperature
        5e-05
    """
    if not (0.0 < drift < math.inf and 0.0 < noise < math.inf):
        raise ValueError(
            f"drift and noise must be positive and finite, got drift={drift}, noise={noise}"
        )
    return ULA(math.sqrt(2.0 * drift), temperature=noise**2 / (2.0 * drift))
