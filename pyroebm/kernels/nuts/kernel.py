"""The no-U-turn sampler: settings, and the choice between its two implementations."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from typing import ClassVar, Literal

import torch

from pyroebm.core.energy import Energy
from pyroebm.kernels.base import GradientKernel, Info, State
from pyroebm.kernels.nuts import lockstep

__all__ = ["NUTS", "LockstepNUTS"]


@dataclasses.dataclass(frozen=True, eq=False)
class NUTS(GradientKernel):
    r"""Multinomial no-U-turn sampler (Hoffman and Gelman, 2014; Betancourt, 2017): exact.

    A trajectory doubles forwards or backwards in time until its ends approach each other. The next
    state is drawn from its leaves with weights :math:`e^{-H}`, biased towards the newer half. The
    tree is built iteratively, with one stored left end for each level (Phan, Pradhan and Jankowiak,
    2019).

    On a CPU the chains are asynchronous: each takes its next leapfrog step as soon as its gradient
    is computed. :class:`pyroebm.MCMC` lets chains run ahead of each other over many draws;
    :meth:`step` makes the same draws one by one. On other devices the chains are in lock-step, and
    a chain with a finished trajectory waits: :class:`LockstepNUTS`. The two implementations use
    different random numbers.

    Args:
        step_size: :math:`\epsilon`; warm-up aims at an acceptance rate of 0.8.
        inverse_mass: :math:`M^{-1}`: a tensor is its diagonal, shape of one event, or a metric;
            None is the identity.
        max_tree_depth: maximum number of doublings, 1 to 20: at most :math:`2^{depth} - 1` leapfrog
            steps.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = NUTS(step_size=0.2), DoubleWell()
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape, bool((info.n_steps <= 2**info.tree_depth - 1).all())
        (torch.Size([8]), True)
    """

    max_tree_depth: int = 10

    target_acceptance: ClassVar[float | None] = 0.8
    has_momentum: ClassVar[bool] = True
    compiles: ClassVar[Literal["gradient"]] = "gradient"
    expected_gradients: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_tree_depth <= 20:
            raise ValueError(
                "NUTS: max_tree_depth must be from 1 to 20, got"
                f" max_tree_depth={self.max_tree_depth}"
            )

    def probe(self) -> NUTS:
        """Return the kernel with trajectories of one step."""
        return self.replace(max_tree_depth=1)

    def runs_ahead(self, energy: Energy) -> bool:
        """Whether chains run asynchronously: on a CPU, with numba, in float32 or float64."""
        return (
            energy.device.type == "cpu"
            and energy.dtype in (torch.float32, torch.float64)
            and _has_numba()
        )

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Draw the next state of every chain from a new trajectory."""
        if not self.runs_ahead(energy):
            return lockstep.step(self, energy, state, generator)
        from pyroebm.kernels.nuts.driver import Chains

        chains = Chains(energy, state, generator, self.max_tree_depth)
        chains.set(self.step_size, self.inverse_mass)
        chains.run(1, 1)
        steps = chains.take(1)
        return steps.last, steps.report(0)


@functools.cache
def _has_numba() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"numba cannot be imported ({error}): NUTS moves its chains in lock-step, which is"
            " slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class LockstepNUTS(NUTS):
    """:class:`NUTS` with all chains in lock-step, in tensor operations, on any device.

    This is the implementation that :class:`NUTS` uses on a GPU.

    Args:
        step_size: as for :class:`NUTS`.
        inverse_mass: as for :class:`NUTS`.
        max_tree_depth: as for :class:`NUTS`.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> LockstepNUTS().runs_ahead(DoubleWell())
        False
    """

    def runs_ahead(self, energy: Energy) -> bool:
        """False: chains are in lock-step."""
        return False
