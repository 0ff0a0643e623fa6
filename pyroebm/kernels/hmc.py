"""Hamiltonian Monte Carlo with a jittered trajectory length."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import GradientKernel, Info, State, column, rows, uniform_like
from pyroebm.kernels.hamiltonian import metropolis_trajectory
from pyroebm.kernels.metric import metric_of

__all__ = ["HMC"]


@dataclasses.dataclass(frozen=True, eq=False)
class HMC(GradientKernel):
    r"""Hamiltonian Monte Carlo (Duane et al., 1987; Neal, 2011): exact.

    Each chain takes ``num_steps`` leapfrog steps of size :math:`\epsilon (1 + \text{jitter}\, u)`,
    with u uniform on (-1, 1), drawn for each chain and step. The jitter of the trajectory length
    avoids resonance with periods of the target. All chains take the same number of steps, so that
    no chain waits.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.8.
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric;
            None is the identity.
        num_steps: number of leapfrog steps of one trajectory, at least 1.
        jitter: relative half-width of the trajectory length, in [0, 1).

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = HMC(step_size=0.2, num_steps=5), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> info.n_steps.tolist()
        [5, 5, 5, 5, 5, 5, 5, 5]
    """

    num_steps: int = 10
    _: dataclasses.KW_ONLY
    jitter: float = 0.3

    target_acceptance: ClassVar[float | None] = 0.8
    has_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"HMC: num_steps must be at least 1, got num_steps={self.num_steps}")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"HMC: jitter must be in [0, 1), got jitter={self.jitter}")

    @property
    def expected_gradients(self) -> float:
        """Number of leapfrog steps; see :attr:`Kernel.expected_gradients`."""
        return float(self.num_steps)

    def probe(self) -> HMC:
        """Return the kernel with trajectories of one step."""
        return self.replace(num_steps=1)

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Run one trajectory of every chain and accept it by Metropolis-Hastings."""
        q = rows(state.x)
        eps = column(self.step_size, q)
        eps = eps * (1.0 + self.jitter * (2.0 * uniform_like(eps, generator) - 1.0))
        metric = metric_of(self.inverse_mass, q)
        return metropolis_trajectory(energy, state, eps, metric, self.num_steps, generator)[:2]
