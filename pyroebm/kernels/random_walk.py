"""Random-walk Metropolis, which requires no gradient."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import ContinuousKernel, Info, PointState, column, normal_like, rows
from pyroebm.kernels.hamiltonian import metropolis
from pyroebm.kernels.metric import metric_of

__all__ = ["RandomWalk"]


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWalk(ContinuousKernel[PointState]):
    r"""Random-walk Metropolis (Metropolis et al., 1953) with a normal proposal: exact.

    .. math:: x' = x + \epsilon A n, \quad n \sim N(0, I), \quad A A^\top = M^{-1}, \qquad
        \alpha = \min(1, e^{E(x) - E(x')})

    ``Info.n_steps`` counts gradients, so it is 0 here: a step costs one evaluation of the energy.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.234 (Roberts, Gelman
            and Gilks, 1997), where it is near :math:`2.38 / \sqrt d`.
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, or a metric; None is the identity.

    Raises:
        ValueError: if a setting is not positive and finite.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = RandomWalk(step_size=0.5), DoubleWell()
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(3)))
        >>> info.n_steps
        tensor([0, 0, 0])
    """

    target_acceptance: ClassVar[float | None] = 0.234

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> PointState:
        """Return the state at ``x``, with its energies."""
        self.check_start(energy, x)
        state = _at(energy, x.detach())
        bad = ~torch.isfinite(state.energy)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"chains must start where the energy is finite: {int(bad.sum())} of {len(x)} rows"
                f" of x are not, the first is row {row} with x={x[row].tolist()} and energy"
                f" {float(state.energy[row])}; start from energy.initial(n)"
            )
        return state

    def step(
        self, energy: Energy, state: PointState, generator: torch.Generator | None = None
    ) -> tuple[PointState, Info]:
        """Propose a normal step and accept it by Metropolis."""
        q = rows(state.x)
        eps = column(self.step_size, q)
        q = q + eps * metric_of(self.inverse_mass, q).apply(normal_like(q, generator))
        new = _at(energy, q.reshape(state.x.shape))
        return metropolis(state, new, new.energy - state.energy, eps, 0, generator)


def _at(energy: Energy, x: Tensor) -> PointState:
    with torch.no_grad():
        return PointState(x, energy(x))
