"""Underdamped Langevin kernels, with momenta in the state: BAOAB (biased) and GHMC (exact)."""

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
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR, kinetic, leapfrog, metropolis
from pyroebm.kernels.metric import metric_of

__all__ = ["GHMC", "MomentumState", "BAOAB"]


class MomentumState(NamedTuple):
    """State of a kernel with persistent momenta. Entry i of each field belongs to chain i alone.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> GHMC().init(DoubleWell(), torch.tensor([1.0, -1.0])).momentum.shape
        torch.Size([2, 1])
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: :math:`E(x)`, shape ``(chains,)``, finite
    grad: Tensor  #: :math:`\nabla E(x)`, shape ``(chains, *event)``, finite
    momentum: Tensor  #: whitened momenta (or velocities), shape ``(chains, dim)``


def momentum_state(
    like: MomentumState, q: Tensor, values: Tensor, grad: Tensor, p: Tensor
) -> MomentumState:
    """Return a :class:`MomentumState` from flattened events, with the event shape of ``like``."""
    return MomentumState(q.reshape(like.x.shape), values, grad.reshape(like.x.shape), p)


@dataclasses.dataclass(frozen=True, eq=False)
class MomentumKernel(ContinuousKernel[MomentumState]):
    """A :class:`pyroebm.kernels.ContinuousKernel` with persistent momenta, initially N(0, I)."""

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> MomentumState:
        """Return the state at ``x``, with new momenta."""
        self.check_start(energy, x)
        return MomentumState(*start_state(energy, x), momentum=normal_like(rows(x), generator))

    def refresh(self, energy: Energy, state: MomentumState) -> MomentumState:
        """Recompute energy and gradient after the energy was trained; momenta are unchanged."""
        return MomentumState(*start_state(energy, state.x), momentum=state.momentum)


@dataclasses.dataclass(frozen=True, eq=False)
class _Underdamped(MomentumKernel):
    friction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.friction < math.inf:
            raise ValueError(
                f"{type(self).__name__}: friction must be positive and finite, got"
                f" friction={self.friction}"
            )


def partial_refreshment(
    p: Tensor, time: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    r"""Refresh momenta partially, by an Ornstein-Uhlenbeck process that leaves N(0, T I) invariant.

    .. math:: p' = e^{-t} p + \sqrt{T (1 - e^{-2t})}\, n, \qquad n \sim N(0, I)

    The time t is in units of 1 / friction.
    """
    return torch.exp(-time) * p + torch.sqrt(-temperature * torch.expm1(-2.0 * time)) * normal_like(
        p, generator
    )


@dataclasses.dataclass(frozen=True, eq=False)
class BAOAB(_Underdamped):
    r"""Underdamped Langevin dynamics by BAOAB (Leimkuhler and Matthews, 2013). **Not exact**.

    .. math::

        dx = A p\, dt, \qquad dp = -A^\top \nabla E(x)\, dt - \gamma p\, dt + \sqrt{2 \gamma T}\, dW

    One step is half a kick (B), half a drift (A), the whole friction (O), half a drift and half a
    kick, with one gradient. The bias of the positions is of second order in :math:`\epsilon` and
    vanishes for a normal distribution: N(0, 1) keeps its variance 1 for every :math:`\epsilon < 2`,
    while the momenta have :math:`1 - \epsilon^2 / 4`. A step with a non-finite number, or with an
    energy error above 1,000 T, is rejected: the chain keeps its position, counts as diverging and
    reverses its momentum.

    Args:
        step_size: :math:`\epsilon`.
        inverse_mass: :math:`M^{-1} = A A^\top`: a tensor is its diagonal, or a metric; None is the
            identity.
        friction: :math:`\gamma > 0`, per unit of time in whitened coordinates.
        temperature: :math:`T > 0`; the chain samples approximately :math:`e^{-E/T}`.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = BAOAB(step_size=0.1), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> info.accepted.all()
        tensor(True)
    """

    _: dataclasses.KW_ONLY
    temperature: float = 1.0

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                "BAOAB: temperature must be positive and finite, got"
                f" temperature={self.temperature}"
            )

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> MomentumState:
        """Return the state at ``x``, with momenta from N(0, T I)."""
        state = super().init(energy, x, generator)
        return state._replace(momentum=math.sqrt(self.temperature) * state.momentum)

    def step(
        self, energy: Energy, state: MomentumState, generator: torch.Generator | None = None
    ) -> tuple[MomentumState, Info]:
        """Run one BAOAB step of every chain."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        p = state.momentum - 0.5 * eps * metric.transpose(rows(state.grad))
        q = q + 0.5 * eps * metric.apply(p)
        refreshed = partial_refreshment(p, self.friction * eps, self.temperature, generator)
        heat, p = kinetic(refreshed) - kinetic(p), refreshed
        q = q + 0.5 * eps * metric.apply(p)
        values, grad = row_value_and_grad(energy, q)
        p = p - 0.5 * eps * metric.transpose(grad)
        # Beyond the stability limit, numbers stay finite for some steps. The energy error shows
        # it; the heat of the friction is not an error.
        error = (
            values + kinetic(p) - state.energy - kinetic(state.momentum) - heat
        ) / self.temperature
        valid = (error < MAX_ENERGY_ERROR) & torch.isfinite(error) & torch.isfinite(grad).all(1)
        reversed_state = state._replace(momentum=-state.momentum)
        state = choose(valid, momentum_state(state, q, values, grad, p), reversed_state)
        return state, Info(
            acceptance_rate=valid.to(q.dtype),
            accepted=valid,
            diverging=~valid,
            energy=state.energy + kinetic(state.momentum),
            n_steps=torch.ones_like(valid, dtype=torch.long),
            step_size=eps.squeeze(1),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class GHMC(_Underdamped):
    r"""Generalized HMC, or Metropolis-adjusted underdamped Langevin (Horowitz, 1991): exact.

    .. math::

        p \leftarrow e^{-\gamma \epsilon} p + \sqrt{1 - e^{-2 \gamma \epsilon}}\, n, \qquad
        n \sim N(0, I),

    then one leapfrog step, accepted with probability :math:`\min(1, e^{H_0 - H_1})`. On rejection
    the momentum is reversed; without that the target would not be invariant. A reversed chain
    retraces its path, so the acceptance rate should be high.

    ``Info.energy`` is the Hamiltonian. BFMI is not meaningful, because the momentum persists.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.9.
        inverse_mass: :math:`M^{-1} = A A^\top`: a tensor is its diagonal, or a metric; None is the
            identity.
        friction: :math:`\gamma > 0`, per unit of time in whitened coordinates.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = GHMC(step_size=0.2), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> state.momentum.shape
        torch.Size([8, 1])
    """

    target_acceptance: ClassVar[float | None] = 0.9

    def step(
        self, energy: Energy, state: MomentumState, generator: torch.Generator | None = None
    ) -> tuple[MomentumState, Info]:
        """Refresh the momenta partially, run one leapfrog step and accept it by Metropolis."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        p0 = partial_refreshment(state.momentum, self.friction * eps, 1.0, generator)
        q, p, values, grad = leapfrog(energy, q, p0, rows(state.grad), eps, metric)
        error = values + kinetic(p) - state.energy - kinetic(p0)
        new, rejected = momentum_state(state, q, values, grad, p), state._replace(momentum=-p0)
        state, info = metropolis(rejected, new, error, eps, 1, generator)
        return state, info._replace(energy=state.energy + kinetic(state.momentum))
