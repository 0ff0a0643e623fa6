"""HMC and NUTS with Pyro's arguments, and their conversion to kernels of the library."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from pyroebm import kernels
from pyroebm.core.energy import Energy
from pyroebm.kernels.adaptation.windows import WindowAdaptation
from pyroebm.kernels.base import Info, Kernel, State

__all__ = ["HMC", "NUTS", "Settings"]

#: Maximum number of leapfrog steps of a trajectory of given length while the step size adapts.
MAX_STEPS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class _Trajectory(kernels.HMC):
    """HMC with a number of steps that follows the step size, for a trajectory of given length."""

    length: float = 2.0 * math.pi

    def probe(self) -> _Trajectory:
        return self.replace(length=0.0)

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        # The median, so that a chain of another scale does not change the length of the others.
        size = float(torch.as_tensor(self.step_size).median())
        steps = max(1, min(MAX_STEPS, int(self.length / size)))
        return kernels.HMC(self.step_size, self.inverse_mass, steps, jitter=self.jitter).step(
            energy, state, generator
        )


class Settings(abc.ABC):
    """Settings shared by HMC and NUTS: a model or a potential, and the adaptation."""

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Tensor] | None,
        step_size: float,
        adapt: tuple[bool, bool],
        full_mass: bool,
        transforms: Mapping[str, Any] | None,
        target_accept_prob: float,
        init_strategy: Callable[..., Any],
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError(
                f"exactly one of model and potential_fn must be given, got model={model!r} and"
                f" potential_fn={potential_fn!r}"
            )
        self.model = model
        self.potential_fn = potential_fn
        self.transforms = transforms
        self.init_strategy = init_strategy
        self.step_size = self.start_step_size = step_size
        step, mass = adapt
        metric: Literal["dense", "diagonal"] | None = (
            ("dense" if full_mass else "diagonal") if mass else None
        )
        self.adaptation = (
            WindowAdaptation(target_accept_prob, metric, "grouped" if step else None)
            if step or mass
            else None
        )

    @abc.abstractmethod
    def build(self) -> Kernel[Any]:
        """Return the kernel of the library with these settings."""


class NUTS(Settings):
    """No-U-turn sampler with the arguments of ``pyro.infer.NUTS``.

    The algorithm is that of Hoffman and Gelman (2014) and Betancourt (2017).

    Args:
        model: a Pyro model; or
        potential_fn: a function of a dict of unconstrained tensors of one chain, to a scalar.
        step_size: initial step size, or the fixed one.
        adapt_step_size: whether warm-up adapts the step size.
        adapt_mass_matrix: whether warm-up adapts the mass matrix.
        full_mass: whether the mass matrix is dense.
        use_multinomial_sampling: ignored; the draw from a trajectory is multinomial.
        transforms: map each constrained site to the unconstrained space. With ``potential_fn`` they
            are applied to the draws only, and the potential includes the log-Jacobian; with
            ``model`` they define the coordinates of ``initial_params`` (the sampler has its own).
        max_plate_nesting: ignored.
        jit_compile: ignored.
        jit_options: ignored.
        ignore_jit_warnings: ignored.
        target_accept_prob: acceptance rate to which the step size is adapted.
        max_tree_depth: maximum number of doublings of a trajectory.
        init_strategy: one of Pyro's, for a model without ``initial_params``.

    Raises:
        ValueError: unless exactly one of ``model`` and ``potential_fn`` is given; if a setting is
            out of its range.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> NUTS(model, max_tree_depth=5).build().max_tree_depth
        5
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Tensor] | None = None,
        step_size: float = 1.0,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
        use_multinomial_sampling: bool = True,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        jit_options: Mapping[str, Any] | None = None,
        ignore_jit_warnings: bool = False,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        adapt = (adapt_step_size, adapt_mass_matrix)
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt,
            full_mass,
            transforms,
            target_accept_prob,
            init_strategy,
        )
        self.max_tree_depth = max_tree_depth
        self.build()  # checks the settings here instead of in run

    def build(self) -> kernels.NUTS:
        """Return a :class:`pyroebm.kernels.NUTS`."""
        return kernels.NUTS(self.start_step_size, max_tree_depth=self.max_tree_depth)


class HMC(Settings):
    r"""Hamiltonian Monte Carlo with the arguments of ``pyro.infer.HMC``.

    The algorithm is that of Duane et al. (1987) and Neal (2011). With ``num_steps`` every
    trajectory has that many leapfrog steps, for any step size. Otherwise it has
    ``int(trajectory_length / step_size)``, at least 1 and at most 1024, and its length is jittered
    by up to 30 %: the default :math:`2 \pi` is the period of a standard normal, for which a
    trajectory of exactly this length returns to its start.

    Args:
        model: as for :class:`NUTS`.
        potential_fn: as for :class:`NUTS`.
        step_size: as for :class:`NUTS`.
        trajectory_length: length of a trajectory; None is :math:`2 \pi`.
        num_steps: number of leapfrog steps of a trajectory; replaces ``trajectory_length``.
        adapt_step_size: as for :class:`NUTS`.
        adapt_mass_matrix: as for :class:`NUTS`.
        full_mass: as for :class:`NUTS`.
        transforms: as for :class:`NUTS`.
        max_plate_nesting: ignored.
        jit_compile: ignored.
        jit_options: ignored.
        ignore_jit_warnings: ignored.
        target_accept_prob: as for :class:`NUTS`.
        init_strategy: as for :class:`NUTS`.
        min_stepsize: ignored.
        max_stepsize: ignored.

    Raises:
        ValueError: as :class:`NUTS`.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> HMC(model, step_size=0.5, num_steps=4).build()
        HMC(step_size=0.5, inverse_mass=None, num_steps=4, jitter=0.0)
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Tensor] | None = None,
        step_size: float = 1.0,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        jit_options: Mapping[str, Any] | None = None,
        ignore_jit_warnings: bool = False,
        target_accept_prob: float = 0.8,
        init_strategy: Callable[..., Any] = init_to_uniform,
        *,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
    ) -> None:
        adapt = (adapt_step_size, adapt_mass_matrix)
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt,
            full_mass,
            transforms,
            target_accept_prob,
            init_strategy,
        )
        self.num_steps = num_steps
        self.trajectory_length = 2.0 * math.pi if trajectory_length is None else trajectory_length
        if not 0.0 < self.trajectory_length < math.inf:
            raise ValueError(
                "trajectory_length must be positive and finite, got"
                f" trajectory_length={trajectory_length}"
            )
        self.build()

    def build(self) -> kernels.HMC:
        """Return a :class:`pyroebm.kernels.HMC`."""
        if self.num_steps is not None:
            return kernels.HMC(self.start_step_size, num_steps=self.num_steps, jitter=0.0)
        return _Trajectory(self.start_step_size, length=self.trajectory_length)
