"""Microcanonical kernels with velocities of constant norm: unadjusted and adjusted (exact)."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.covariance import PooledVariance
from pyroebm.kernels.adaptation.windows import windows
from pyroebm.kernels.base import (
    GradientKernel,
    Info,
    State,
    choose,
    column,
    normal_like,
    row_value_and_grad,
    rows,
    state_of_rows,
)
from pyroebm.kernels.hamiltonian import jittered_steps, metropolis
from pyroebm.kernels.metric import Metric, metric_of
from pyroebm.kernels.underdamped import MomentumKernel, MomentumState, momentum_state

__all__ = ["AdjustedMCLMC", "EnergyVarianceAdaptation", "MCLMC", "isokinetic_leapfrog", "turn"]

#: Effective number of steps of the running average of :class:`EnergyVarianceAdaptation`.
MEMORY = 50


def turn(u: Tensor, force: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rotate unit velocities under a constant force, by the exact solution.

    The solution of :math:`\dot u = (I - u u^\top) f / (d - 1)` over a time t (Robnik et al., 2023;
    ver Steeg and Galstyan, 2021). With :math:`e = f / |f|`, :math:`\delta = t |f| / (d - 1)` and
    :math:`c = e \cdot u`

    .. math::

        u' = \frac{u + e (\sinh \delta + c (\cosh \delta - 1))}{\cosh \delta + c \sinh \delta},
        \qquad \Delta K = (d - 1) \log(\cosh \delta + c \sinh \delta)

    The map contracts areas of the sphere by :math:`e^{-\Delta K}`, so :math:`E + K` takes the place
    of the Hamiltonian.

    Args:
        u: unit velocities, shape ``(chains, dim)``.
        force: f, minus the energy's whitened gradient, shape ``(chains, dim)``.
        time: t, shape ``(chains, 1)``.

    Returns:
        the turned velocities, and :math:`\Delta K` of shape ``(chains,)``.

    Example:
        >>> u, change = turn(
        ...     torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5]])
        ... )
        >>> u, change  # along the force: no rotation, and K grows by t |f|
        (tensor([[1., 0.]]), tensor([1.]))
    """
    dims = u.shape[1] - 1
    e, delta = (
        normalize(force, dim=1, eps=torch.finfo(u.dtype).tiny),
        time * torch.linalg.vector_norm(force, dim=1, keepdim=True),
    )
    delta = delta / dims
    c = (e * u).sum(1, keepdim=True)
    shrunk = torch.exp(-delta)  # all terms are divided by exp(delta) / 2, which may overflow
    stretch = (1.0 + c) + shrunk**2 * (1.0 - c)
    turned = 2.0 * shrunk * u + e * (1.0 - shrunk) * ((1.0 + shrunk) + c * (1.0 - shrunk))
    return normalize(turned, dim=1), dims * (delta + torch.log(0.5 * stretch)).squeeze(1)


def isokinetic_leapfrog(
    energy: Energy,
    q: Tensor,
    u: Tensor,
    grad: Tensor,
    step_size: Tensor,
    metric: Metric,
    num_steps: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Run ``num_steps`` steps of rotation, drift, rotation.

    The integrator is reversible (with u to -u) and of second order.

    Args:
        energy: the target.
        q: positions, shape ``(chains, dim)``.
        u: unit velocities in whitened coordinates, shape ``(chains, dim)``.
        grad: energy gradients at ``q``, shape ``(chains, dim)``.
        step_size: :math:`\epsilon`, a length in whitened coordinates, shape ``(chains, 1)``.
        metric: the map :math:`A`.
        num_steps: number of steps.

    Returns:
        positions, velocities, energies ``(chains,)`` and gradients at the end, and the sum of all
        :math:`\Delta K`.
    """
    half = 0.5 * step_size
    u, change = turn(u, -metric.transpose(grad), half)
    for step in range(num_steps):
        q = q + step_size * metric.apply(u)
        values, grad = row_value_and_grad(energy, q)
        u, more = turn(u, -metric.transpose(grad), step_size if step + 1 < num_steps else half)
        change = change + more
    return q, u, values, grad, change


def _check_length(kernel: object, name: str, length: float | None) -> None:
    if length is not None and not 0.0 < length < math.inf:
        raise ValueError(
            f"{type(kernel).__name__}: {name} must be positive and finite, or None, got"
            f" {name}={length}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class MCLMC(MomentumKernel):
    r"""Microcanonical Langevin Monte Carlo (Robnik and Seljak, 2023). **Not exact**.

    .. math:: \dot x = A u, \qquad \dot u = -(I - u u^\top) A^\top \nabla E(x) / (d - 1)

    with :math:`|u| = 1`, in steps of :func:`isokinetic_leapfrog`, each followed by a partial
    refresh of the velocity: :math:`u \leftarrow (u + \nu n) / |u + \nu n|` with :math:`\nu^2 =
    (e^{2 \epsilon / L} - 1) / d`. The bias grows with the step size and is not removed;
    :class:`AdjustedMCLMC` is the exact version. A step with a non-finite number is
    rejected: the chain keeps its position, counts as diverging and reverses its velocity.

    Warm-up (:class:`pyroebm.kernels.EnergyVarianceAdaptation`) selects the step size at which the
    energy error has a given variance per dimension. In the whitened coordinates that it learns, all
    variances are 1 and their sum is d: hence the default of L.

    Args:
        step_size: :math:`\epsilon`, a length in whitened coordinates.
        inverse_mass: :math:`M^{-1} = A A^\top`: a tensor is its diagonal, or a metric; None is the
            identity.
        decoherence_length: L, the length over which the direction decorrelates, in whitened
            coordinates; None is :math:`\sqrt d`.

    Raises:
        ValueError: if a setting is not positive and finite; at the start, if events have fewer than
            2 entries.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> kernel, energy = MCLMC(step_size=0.5), Gaussian(torch.zeros(3))
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> torch.allclose(state.momentum.norm(dim=1), torch.ones(8))
        True
    """

    decoherence_length: float | None = None

    exact: ClassVar[bool] = False
    min_dim: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self, "decoherence_length", self.decoherence_length)

    def own_adaptation(self) -> EnergyVarianceAdaptation:
        """Return an :class:`EnergyVarianceAdaptation`."""
        return EnergyVarianceAdaptation()

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> MomentumState:
        """Return the state at ``x``, with velocities uniform on the sphere."""
        state = super().init(energy, x, generator)
        return state._replace(momentum=normalize(state.momentum, dim=1))

    def step(
        self, energy: Energy, state: MomentumState, generator: torch.Generator | None = None
    ) -> tuple[MomentumState, Info]:
        """Run one integrator step and a partial refresh of the velocities."""
        return self.step_with_error(energy, state, generator)[:2]

    def step_with_error(
        self, energy: Energy, state: MomentumState, generator: torch.Generator | None = None
    ) -> tuple[MomentumState, Info, Tensor]:
        """Run one step; also return its error ``(chains,)`` in E + K, a conserved quantity."""
        q, dim = rows(state.x), rows(state.x).shape[1]
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        q, u, values, grad, change = isokinetic_leapfrog(
            energy, q, state.momentum, rows(state.grad), eps, metric
        )
        error = values - state.energy + change
        noise = torch.sqrt(
            torch.expm1(2.0 * eps / (self.decoherence_length or math.sqrt(dim))) / dim
        )
        u = normalize(u + noise * normal_like(u, generator), dim=1)
        finite = torch.isfinite(error) & torch.isfinite(grad).all(1) & torch.isfinite(u).all(1)
        state = choose(
            finite,
            momentum_state(state, q, values, grad, u),
            state._replace(momentum=-state.momentum),
        )
        info = Info(
            acceptance_rate=finite.to(q.dtype),
            accepted=finite,
            diverging=~finite,
            energy=state.energy,
            n_steps=torch.ones_like(finite, dtype=torch.long),
            step_size=eps.squeeze(1),
        )
        return state, info, error


class EnergyVarianceState(NamedTuple):
    """State of :class:`EnergyVarianceAdaptation` between two steps."""

    pooled: PooledVariance
    step: int
    errors: int  #: number of step errors averaged since the last change of the metric
    ratio: float  #: running mean of (squared error per dimension) / step size^6


@dataclasses.dataclass(frozen=True, eq=False)
class EnergyVarianceAdaptation:
    r"""Adaptation of the step size of :class:`MCLMC`, and of a diagonal metric.

    The error :math:`\Delta` of E + K in one step has :math:`E[\Delta^2] / d \propto \epsilon^6`
    (Robnik and Seljak, 2023). The factor of proportionality is averaged over steps and chains, and
    :math:`\epsilon` is set so that :math:`E[\Delta^2] / d` equals the target. The metric is learned
    in windows.

    Args:
        target: squared energy error per dimension to aim at, in nats squared; a smaller value gives
            a smaller bias.
        metric: whether to learn the diagonal metric.

    Raises:
        ValueError: if ``target`` is not positive and finite.

    Example:
        >>> EnergyVarianceAdaptation().target
        0.0005
    """

    target: float = 5e-4
    metric: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.target < math.inf:
            raise ValueError(f"target must be positive and finite, got target={self.target}")

    def start(
        self,
        kernel: Any,
        energy: Energy,
        state: MomentumState,
        generator: torch.Generator | None = None,
    ) -> tuple[MCLMC, EnergyVarianceState]:
        """Return the kernel unchanged and an empty adaptation state.

        Raises:
            ValueError: if the kernel is not an :class:`MCLMC`.
        """
        if not isinstance(kernel, MCLMC):
            raise ValueError(
                "kernel must be MCLMC(), whose step size EnergyVarianceAdaptation adapts, got"
                f" {type(kernel).__name__}; use WindowAdaptation()"
            )
        return kernel, EnergyVarianceState(PooledVariance.start(rows(state.x)), 0, 0, 0.0)

    def step(
        self,
        kernel: MCLMC,
        energy: Energy,
        state: MomentumState,
        adaptation_state: EnergyVarianceState,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[MCLMC, MomentumState, Info, EnergyVarianceState]:
        """Run one step of the kernel and update the adaptation."""
        state, info, error = kernel.step_with_error(energy, state, generator)
        pooled, step, errors, ratio = adaptation_state
        size = float(torch.as_tensor(kernel.step_size).mean())
        if float(info.accepted.double().mean()) < 0.5:
            errors, new = 0, 0.5 * size
        else:
            errors += 1
            squared = float((error[info.accepted].double() ** 2).mean()) / rows(state.x).shape[1]
            ratio += max(1.0 / errors, 1.0 / MEMORY) * (squared / size**6 - ratio)
            new = (
                min((self.target / ratio) ** (1.0 / 6.0), 2.0 * size) if ratio > 0.0 else 2.0 * size
            )
        kernel = kernel.replace(step_size=new)
        plan = windows(num_steps) if self.metric else []
        if any(start <= step < stop for start, stop in plan):
            pooled = pooled.update(rows(state.x))
        if any(step + 1 == stop for _, stop in plan):
            before = kernel.inverse_mass if isinstance(kernel.inverse_mass, Tensor) else None
            if (learned := pooled.metric(before)) is not None:
                kernel, errors = kernel.replace(inverse_mass=learned), 0
            pooled = PooledVariance.start(rows(state.x))
        return kernel, state, info, EnergyVarianceState(pooled, step + 1, errors, ratio)


@dataclasses.dataclass(frozen=True, eq=False)
class AdjustedMCLMC(GradientKernel):
    r"""Metropolis-adjusted microcanonical sampler (Robnik, Cohn-Gordon and Seljak, 2025): exact.

    Draw a direction u uniform on the sphere, follow the dynamics of :class:`MCLMC` without noise
    for about :math:`2 h L / \epsilon` steps, h uniform on (0, 1) and the same for all chains, and
    accept with :math:`\min(1, e^{-\Delta E - \Delta K})`, where :math:`\Delta K` is the
    log-Jacobian of :func:`turn`.

    Args:
        step_size: :math:`\epsilon`, a length in whitened coordinates; warm-up aims at an acceptance
            rate of 0.9.
        inverse_mass: :math:`M^{-1} = A A^\top`: a tensor is its diagonal, or a metric; None is the
            identity.
        trajectory_length: L, mean length in whitened coordinates; None is :math:`\sqrt d`. No
            trajectory has more than 1,000 steps.

    Raises:
        ValueError: if a setting is not positive and finite; at the start, if events have fewer than
            2 entries.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> kernel, energy = AdjustedMCLMC(step_size=0.5), Gaussian(torch.zeros(3))
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> state.x.shape
        torch.Size([8, 3])
    """

    trajectory_length: float | None = None

    target_acceptance: ClassVar[float | None] = 0.9
    min_dim: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self, "trajectory_length", self.trajectory_length)

    def probe(self) -> AdjustedMCLMC:
        """Return the kernel with trajectories of one step."""
        return self.replace(trajectory_length=sys.float_info.min)

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Run one trajectory of every chain and accept it by Metropolis-Hastings."""
        q = rows(state.x)
        eps, metric = column(self.step_size, q), metric_of(self.inverse_mass, q)
        num_steps = jittered_steps(
            2.0 * (self.trajectory_length or math.sqrt(q.shape[1])), eps, generator
        )
        u = normalize(normal_like(q, generator), dim=1)
        q, _, values, grad, change = isokinetic_leapfrog(
            energy, q, u, rows(state.grad), eps, metric, num_steps
        )
        error = torch.where(torch.isfinite(grad).all(1), values - state.energy + change, torch.inf)
        return metropolis(
            state, state_of_rows(energy, q, values, grad), error, eps, num_steps, generator
        )
