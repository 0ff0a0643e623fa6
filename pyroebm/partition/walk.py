"""Walks along a path of densities, with the weights that annealed importance sampling gives
them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.annealing_path import GeometricPath
from pyroebm.core.conditionals import blocks_of
from pyroebm.core.energy import Energy
from pyroebm.core.progress import Progress
from pyroebm.core.supports import is_discrete, to_support
from pyroebm.core.wrappers import unconstrain
from pyroebm.energies.layered import LayeredEnergy
from pyroebm.kernels import HMC, BlockGibbs, Gibbs, Kernel
from pyroebm.partition.layered import LayerGibbs
from pyroebm.smc import SMCResult

__all__ = ["KernelPath", "as_betas", "default_kernel", "increments", "total_weight"]

S = TypeVar("S")


class WeightedPath(Protocol[S]):
    """What a walk needs: weights from one temperature to another, and moves that leave a
    temperature's density unchanged.
    """

    def log_weight(self, state: S, beta: float, then: float) -> Tensor: ...
    def move(self, state: S, beta: float, generator: torch.Generator | None) -> S: ...


class KernelPath:
    """The :class:`pyroebm.core.GeometricPath` from a base to an energy in unconstrained
    coordinates, on which any kernel moves.

    Args:
        energy, base: the two ends.
        kernel: its settings stay as they are along the path, but for
        pilot: an SMC run along the same path, whose step sizes are taken.
    """

    def __init__(
        self, energy: Energy, base: Energy, kernel: Kernel[Any], pilot: SMCResult | None = None
    ) -> None:
        self.target, self.reference = unconstrain(energy), unconstrain(base)
        self.transform = to_support(energy.support)
        self.kernel = kernel
        self.pilot = pilot
        self.log_z = float(base.log_z or 0.0)

    def log_weight(self, x: Tensor, beta: float, then: float) -> Tensor:
        r""":math:`(\beta - \beta') (U - V)(x)`, float64."""
        return (beta - then) * GeometricPath(self.target, beta, self.reference).slope(x).double()

    def move(self, x: Tensor, beta: float, generator: torch.Generator | None = None) -> Tensor:
        """One step of the kernel at a temperature, from a fresh state."""
        path, kernel = GeometricPath(self.target, beta, self.reference), self.kernel
        if self.pilot is not None:
            kernel = kernel.replace(
                step_size=float(np.interp(beta, self.pilot.betas[1:], self.pilot.step_sizes))
            )
        state, _ = kernel.step(path, kernel.init(path, x, generator), generator)
        moved: Tensor = state.x
        return moved

    def alive(self, x: Tensor, beta: float, then: float) -> Tensor:
        """Which rows do not begin where the other end has no density: those have weight 0 from the
        start, and cannot be moved.

        Raises:
            FloatingPointError: if an energy is NaN or -inf.
        """
        first = self.log_weight(x, beta, then)
        wrong = int((first.isnan() | (first == math.inf)).sum())
        if wrong:
            raise FloatingPointError(
                f"an energy is NaN or -inf at {wrong} of {len(x)} draws that the walk starts from"
            )
        return first > -math.inf

    def total_weight(
        self,
        x: Tensor,
        betas: Sequence[float],
        generator: torch.Generator | None,
        progress: bool | None,
    ) -> Tensor:
        """:func:`total_weight` of all rows, alive or not."""
        alive = self.alive(x, *betas[:2])
        log_weights = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        if bool(alive.any()):
            log_weights[alive] = total_weight(self, x[alive], betas, generator, progress)
        return log_weights


def increments(
    path: WeightedPath[S],
    state: S,
    betas: Sequence[float],
    generator: torch.Generator | None,
    progress: bool | None,
) -> Iterator[Tensor]:
    r""":math:`\log f_{\beta_{k+1}}(x_k) - \log f_{\beta_k}(x_k)` for each k, where :math:`x_{k+1}`
    is :math:`x_k` moved at :math:`\beta_{k+1}`.

    The weight comes before the move. Temperatures may rise or fall; the last needs no move.
    """
    with Progress(len(betas) - 1, "annealing", "temperature", progress) as shown:
        for step, (beta, then) in enumerate(itertools.pairwise(betas), start=2):
            yield path.log_weight(state, beta, then)
            if step < len(betas):
                state = path.move(state, then, generator)
            shown.update()


def total_weight(
    path: WeightedPath[S],
    state: S,
    betas: Sequence[float],
    generator: torch.Generator | None,
    progress: bool | None,
) -> Tensor:
    """The log weights of a whole walk, float64, shape ``(rows,)``."""
    terms = increments(path, state, betas, generator, progress)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def as_betas(betas: int | Tensor) -> list[float]:
    """A schedule: that many even steps from 0 to 1, or the one given; ValueError unless it rises
    from 0 to 1.
    """
    if isinstance(betas, int) and not isinstance(betas, bool):
        if betas < 1:
            raise ValueError(f"betas must be at least 1, got betas={betas}")
        return [k / betas for k in range(betas + 1)]
    given = torch.as_tensor(betas, dtype=torch.float64)
    rises = given.dim() == 1 and len(given) > 1 and bool((given.diff() > 0.0).all())
    if not (rises and float(given[0]) == 0.0 and float(given[-1]) == 1.0):
        raise ValueError(
            "betas must be a number of temperatures, or a schedule that rises from 0 to 1, got"
            f" betas={betas}"
        )
    return [float(beta) for beta in given]


def default_kernel(energy: Energy) -> Kernel[Any]:
    """What moves where the caller names no kernel."""
    if isinstance(energy, LayeredEnergy):
        return LayerGibbs()
    if not is_discrete(energy.support):
        return HMC(num_steps=5)
    return BlockGibbs() if blocks_of(energy) else Gibbs()
