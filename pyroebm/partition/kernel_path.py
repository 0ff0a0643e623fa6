"""Annealed chains along a path of densities, with the weights of annealed importance sampling."""

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

__all__ = [
    "KernelPath",
    "as_betas",
    "default_kernel",
    "increments",
    "log_mass_of_domain",
    "total_weight",
]

S = TypeVar("S")


class WeightedPath(Protocol[S]):
    """Protocol of a path: log weights between temperatures and transitions at a temperature."""

    def log_weight(self, state: S, beta: float, then: float) -> Tensor:
        """Compute the log weights from temperature ``beta`` to ``then``, shape ``(chains,)``."""

    def move(self, state: S, beta: float, generator: torch.Generator | None) -> S:
        """Move the state by a transition that leaves the density at ``beta`` invariant."""


class KernelPath:
    """Path from a base to an energy in unconstrained coordinates, with a kernel as transition.

    Args:
        energy: the target.
        base: the base.
        kernel: the kernel; its settings are constant along the path, except for the step size if a
            pilot is given.
        pilot: an SMC run along the same path, whose step sizes are used.
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
        r"""Compute :math:`(\beta - \beta') (U - V)(x)`, float64."""
        return (beta - then) * GeometricPath(self.target, beta, self.reference).slope(x).double()

    def move(self, x: Tensor, beta: float, generator: torch.Generator | None = None) -> Tensor:
        """Run one step of the kernel at a temperature."""
        path, kernel = GeometricPath(self.target, beta, self.reference), self.kernel
        if self.pilot is not None:
            kernel = kernel.replace(
                step_size=float(np.interp(beta, self.pilot.betas[1:], self.pilot.step_sizes))
            )
        state, _ = kernel.step(path, kernel.init(path, x, generator), generator)
        moved: Tensor = state.x
        return moved

    def alive(self, x: Tensor, beta: float, then: float) -> Tensor:
        """Return which chains start at a state of positive density at the next temperature.

        The others have weight 0 from the start and cannot be moved.

        Raises:
            FloatingPointError: if an energy is NaN or -inf.
        """
        first = self.log_weight(x, beta, then)
        wrong = int((first.isnan() | (first == math.inf)).sum())
        if wrong:
            raise FloatingPointError(
                f"an energy is NaN or -inf at {wrong} of {len(x)} draws at the start of the path"
            )
        return first > -math.inf

    def total_weight(
        self,
        x: Tensor,
        betas: Sequence[float],
        generator: torch.Generator | None,
        progress: bool | None,
    ) -> Tensor:
        """:func:`total_weight` of all chains; those not alive have log weight -inf."""
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
    r"""Yield :math:`\log f_{\beta_{k+1}}(x_k) - \log f_{\beta_k}(x_k)` for each k.

    :math:`x_{k+1}` is :math:`x_k` moved at :math:`\beta_{k+1}`: the weight is computed before the
    move. Temperatures may rise or fall; the last needs no move.
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
    """Compute the total log weights of annealed chains, float64, shape ``(chains,)``."""
    terms = increments(path, state, betas, generator, progress)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


#: Numbers of draws of the base from which the mass of the domain is estimated: at first, and in all
#: if the energy is infinite at one of the first.
FIRST_DRAWS, ALL_DRAWS = 1000, 20_000


def log_mass_of_domain(
    target: Energy, reference: Energy, generator: torch.Generator | None
) -> tuple[float, float]:
    r"""Estimate :math:`\log P_0(E < \infty)`, the mass of the base where the energy is finite.

    A path that starts at the target, or at the base restricted to the target's domain, gives Z
    relative to this part of the base.

    Returns:
        the logarithm and its standard error; both are 0 if the energy is finite at 1,000 draws.

    Raises:
        FloatingPointError: if the energy is infinite at all draws of the base.
    """
    finite = drawn = 0
    while drawn < FIRST_DRAWS or (finite < drawn < ALL_DRAWS):
        with torch.no_grad():
            values = target(reference.sample(FIRST_DRAWS, generator))
        finite, drawn = finite + int(torch.isfinite(values).sum()), drawn + FIRST_DRAWS
    if not finite:
        raise FloatingPointError(
            f"the energy is infinite at all of {drawn} draws of the base; use another base"
        )
    mass = finite / drawn
    return math.log(mass), math.sqrt((1.0 - mass) / (mass * drawn))


def as_betas(betas: int | Tensor) -> list[float]:
    """Return a schedule: that many even steps from 0 to 1, or the one given.

    Raises:
        ValueError: unless it rises from 0 to 1.
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
    """Return the kernel used if none is given."""
    if isinstance(energy, LayeredEnergy):
        return LayerGibbs()
    if not is_discrete(energy.support):
        return HMC(num_steps=5)
    return BlockGibbs() if blocks_of(energy) else Gibbs()
