"""Stochastic-gradient Langevin dynamics, with one minibatch of the data in each step."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import (
    ContinuousKernel,
    Info,
    choose,
    column,
    normal_like,
    row_value_and_grad,
    rows,
    start_state,
)
from pyroebm.kernels.metric import metric_of

__all__ = ["CountedState", "StochasticGradientLangevin"]


class CountedState(NamedTuple):
    """Positions and their number of steps. Entry i of each field belongs to chain i alone.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> StochasticGradientLangevin().init(DoubleWell(), torch.tensor([1.0, -1.0]))
        CountedState(x=tensor([ 1., -1.]), energy=tensor([-2., -4.]), steps=tensor([0, 0]))
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    #: :math:`E(x)`, from the minibatch of the last step, shape ``(chains,)``, finite
    energy: Tensor
    steps: Tensor  #: steps so far, shape ``(chains,)``


@dataclasses.dataclass(frozen=True, eq=False)
class StochasticGradientLangevin(ContinuousKernel[CountedState]):
    r"""Stochastic-gradient Langevin dynamics (Welling and Teh, 2011). **Not exact**.

    .. math::

        x' = x - \frac{\epsilon_t^2}{2} M^{-1} \nabla \hat E_t(x) + \epsilon_t A n, \qquad
        n \sim N(0, I), \qquad \epsilon_t^2 = \epsilon^2 (1 + t / b)^{-\gamma}

    :math:`\hat E_t` is :meth:`pyroebm.core.MinibatchEnergy.subsample`, drawn in each step and the
    same for all chains, so chains are independent only given the minibatches. The noise of the
    gradient adds :math:`\epsilon^4 / 4` of its variance to each step. With
    :math:`\tfrac12 < \gamma \le 1` the bias vanishes as t grows, if draws are weighted by
    :math:`\epsilon_t^2` (their :math:`\epsilon_t`); at a constant step size it remains. On any
    other energy the kernel is ULA.

    Args:
        step_size: :math:`\epsilon` at the start, the standard deviation of the noise.
        inverse_mass: preconditioner :math:`M^{-1} = A A^\top`: a tensor is its diagonal, or a
            metric; None is the identity.
        decay: :math:`\gamma \ge 0`.
        delay: :math:`b > 0`, number of steps before the decay sets in.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> from pyroebm.core import MinibatchEnergy
        >>> from pyroebm.targets import Gaussian
        >>> data = torch.linspace(1.0, 3.0, 100)
        >>> energy = MinibatchEnergy(
        ...     Gaussian(torch.zeros(1)),
        ...     lambda x, d: 0.5 * ((d - x) ** 2).sum(-1),
        ...     data,
        ...     batch_size=10,
        ... )
        >>> kernel = StochasticGradientLangevin(step_size=0.02)
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> state.steps.tolist()
        [1, 1, 1, 1, 1, 1, 1, 1]
    """

    decay: float = 0.0
    _: dataclasses.KW_ONLY
    delay: float = 1.0

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.decay < math.inf and 0.0 < self.delay < math.inf):
            raise ValueError(
                "StochasticGradientLangevin: decay must be at least 0 and delay positive, both"
                f" finite, got decay={self.decay}, delay={self.delay}"
            )

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> CountedState:
        """Return the state at ``x``, with no steps counted."""
        self.check_start(energy, x)
        start = start_state(energy, x)
        return CountedState(start.x, start.energy, torch.zeros_like(start.energy, dtype=torch.long))

    def refresh(self, energy: Energy, state: CountedState) -> CountedState:
        """Return the state unchanged: each step computes its own gradient."""
        return state

    def step(
        self, energy: Energy, state: CountedState, generator: torch.Generator | None = None
    ) -> tuple[CountedState, Info]:
        """Run one step with a new minibatch."""
        q, part = rows(state.x), energy.subsample(generator)
        age = state.steps.to(q.dtype).unsqueeze(1)
        eps, metric = (
            column(self.step_size, q) * (1.0 + age / self.delay) ** (-0.5 * self.decay),
            metric_of(self.inverse_mass, q),
        )
        _, grad = row_value_and_grad(part, q)
        q = q + metric.apply(
            eps * normal_like(q, generator) - 0.5 * eps**2 * metric.transpose(grad)
        )
        x = q.reshape(state.x.shape)
        # A chain would never leave a state whose gradient is not finite. An infinite gradient may
        # lead to an infinite position with a finite energy.
        values, ahead = row_value_and_grad(part, q)
        finite = torch.isfinite(values) & (torch.isfinite(q) & torch.isfinite(ahead)).all(1)
        state = choose(finite, CountedState(x, values, state.steps), state)
        return state._replace(steps=state.steps + 1), Info(
            acceptance_rate=finite.to(q.dtype),
            accepted=finite,
            diverging=~finite,
            energy=state.energy,
            n_steps=torch.full_like(finite, 2, dtype=torch.long),
            step_size=eps.squeeze(1),
        )
