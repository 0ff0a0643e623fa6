"""Barker proposal: a gradient-based proposal that is robust to the choice of the step size."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    GradientKernel,
    Info,
    State,
    column,
    normal_like,
    row_value_and_grad,
    rows,
    state_of_rows,
    uniform_like,
)
from pyroebm.kernels.hamiltonian import metropolis
from pyroebm.kernels.metric import metric_of

__all__ = ["Barker"]


@dataclasses.dataclass(frozen=True, eq=False)
class Barker(GradientKernel):
    r"""Barker proposal (Livingstone and Zanella, 2022): exact, and robust to its step size.

    In whitened coordinates, with :math:`g = A^\top \nabla E(x)` and :math:`A A^\top = M^{-1}`, each
    coordinate draws a size :math:`z_i \sim N(0, \epsilon^2)` and keeps its sign with probability
    :math:`\sigma(-z_i g_i)`, else flips it, which gives the move :math:`w`:

    .. math:: x' = x + A w, \qquad
        \alpha = \min\Bigl(1, e^{E(x) - E(x')} \prod_i \frac{\sigma(w_i g_i')}{\sigma(-w_i
        g_i)}\Bigr)

    The gradient determines the direction of the move and not its size. A step size that is too
    large lowers the acceptance rate, as for a random walk.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.4 (Vogrinc, Livingstone
            and Zanella, 2023).
        inverse_mass: preconditioner :math:`M^{-1}`: a tensor is its diagonal, or a metric; None is
            the identity.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = Barker(step_size=0.5), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> state.energy.shape
        torch.Size([8])
    """

    target_acceptance: ClassVar[float | None] = 0.4

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Propose a move with the Barker proposal and accept it by Metropolis-Hastings."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        forth = metric.transpose(rows(state.grad))
        size = eps * normal_like(q, generator)
        move = torch.where(uniform_like(q, generator) < torch.sigmoid(-size * forth), size, -size)
        q = q + metric.apply(move)
        values, grad = row_value_and_grad(energy, q)
        ratio = (logsigmoid(move * metric.transpose(grad)) - logsigmoid(-move * forth)).sum(1)
        # The sigmoid of an infinite gradient is finite: reject such proposals explicitly.
        error = torch.where(torch.isfinite(grad).all(1), values - state.energy - ratio, torch.inf)
        return metropolis(state, state_of_rows(energy, q, values, grad), error, eps, 1, generator)
