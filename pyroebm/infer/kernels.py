"""HMC and NUTS with Pyro's names and arguments: kernels of Pyro that move one chain of ours."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.infer.mcmc
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.adaptation import ArrowheadMassMatrix
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyroebm import kernels
from pyroebm.core._checks import stacklevel_of_user
from pyroebm.core.energy import Energy
from pyroebm.core.rng import drawing_from
from pyroebm.core.rowwise import RowwiseEnergy
from pyroebm.infer.mass_matrix import Blocks, MassMatrixAdapter, check_full_mass
from pyroebm.infer.potential import PotentialEnergy
from pyroebm.kernels.adaptation.windows import WindowAdaptation
from pyroebm.kernels.base import Info, State
from pyroebm.ppl.kernel import PyroKernel
from pyroebm.ppl.model import ModelEnergy, NoLatentsError

__all__ = ["HMC", "NUTS", "transforms_of"]

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


def transforms_of(energy: ModelEnergy | PotentialEnergy) -> Mapping[str, Any] | None:
    """Return the maps from each site to the unconstrained space.

    None if one depends on other latent variables.
    """
    if isinstance(energy, PotentialEnergy):
        return energy.transforms
    if energy.transforms is None:
        return None
    return {name: transform.inv for name, transform in energy.transforms.items()}


class HMC(MCMCKernel):
    r"""Hamiltonian Monte Carlo with the arguments of ``pyro.infer.HMC``.

    The algorithm is that of Duane et al. (1987) and Neal (2011). With ``num_steps`` every
    trajectory has that many leapfrog steps, for any step size. Otherwise it has
    ``int(trajectory_length / step_size)``, at least 1 and at most 1024, and its length is jittered
    by up to 30 %: the default :math:`2 \pi` is the period of a standard normal, for which a
    trajectory of exactly this length returns to its start.

    It is a kernel as Pyro's: :meth:`setup` and :meth:`sample` move one chain, in this package's
    steps and warm-up, so it also runs in ``pyro.infer.MCMC``. :class:`pyroebm.infer.MCMC` moves all
    chains together. ``isinstance(kernel, pyro.infer.HMC)`` is True, although no code of Pyro's
    class is inherited.

    Args:
        model: a Pyro model; or
        potential_fn: a function of a dict of unconstrained tensors of one chain, to a tensor of one
            element.
        step_size: initial step size, or the fixed one; None is 1.
        trajectory_length: length of a trajectory; None is that of ``num_steps``, or :math:`2 \pi`.
        num_steps: number of leapfrog steps of a trajectory; not used if ``trajectory_length`` is
            given, as in Pyro.
        adapt_step_size: whether warm-up adapts the step size.
        adapt_mass_matrix: whether warm-up adapts the mass matrix.
        full_mass: whether the mass matrix is dense; or a list of tuples of sites, each a dense
            block. Other sites have variances of their own.
        transforms: map each constrained site to the unconstrained space. With ``potential_fn`` they
            are applied to the draws only, and the potential includes the log-Jacobian; with
            ``model`` they define the coordinates of the chains.
        max_plate_nesting: maximum depth of nested plates, for models with discrete latent
            variables; None finds it in a run of the model.
        jit_compile: ignored.
        jit_options: ignored.
        ignore_jit_warnings: ignored.
        target_accept_prob: acceptance rate to which the step size is adapted.
        init_strategy: one of Pyro's, for a model without ``initial_params``.
        min_stepsize: ignored.
        max_stepsize: ignored.

    Raises:
        ValueError: unless exactly one of ``model`` and ``potential_fn`` is given; if ``model`` is
            an :class:`pyroebm.core.Energy`; if a setting is out of its range.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> kernel = HMC(model, step_size=0.5, num_steps=4)
        >>> kernel.setup(warmup_steps=10)
        >>> list(kernel.sample(kernel.initial_params)), kernel.num_steps
        (['x'], 4)
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Tensor] | None = None,
        step_size: float | None = 1.0,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool | Sequence[tuple[str, ...]] = False,
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
        if (model is None) == (potential_fn is None):
            raise ValueError(
                f"exactly one of model and potential_fn must be given, got model={model!r} and"
                f" potential_fn={potential_fn!r}"
            )
        if isinstance(model, Energy):
            name = "NUTS" if isinstance(self, NUTS) else "HMC"
            raise ValueError(
                f"model must be a Pyro model, got the energy {type(model).__name__}: sample it by"
                f" pyroebm.{name}, in pyroebm.MCMC(pyroebm.{name}(), ...).run(energy)"
            )
        self.trajectory_length = 2.0 * math.pi if trajectory_length is None else trajectory_length
        if not 0.0 < self.trajectory_length < math.inf:
            raise ValueError(
                "trajectory_length must be positive and finite, got"
                f" trajectory_length={trajectory_length}"
            )
        check_full_mass(full_mass)
        self.model = model
        self.start_step_size = 1.0 if step_size is None else step_size
        self.full_mass = full_mass
        self.init_strategy = init_strategy
        self.max_plate_nesting = max_plate_nesting
        self._num_steps = num_steps if trajectory_length is None else None
        self._adapts = adapt_step_size, adapt_mass_matrix
        self._target_accept_prob = target_accept_prob
        self._given_potential = self._potential = potential_fn
        self._given_transforms = transforms
        self._initial: Mapping[str, Tensor] | None = None
        self._energy: ModelEnergy | PotentialEnergy | None = None
        self._chain: PyroKernel | None = None
        self.build()  # checks the settings here instead of in setup
        WindowAdaptation(target_accept_prob)

    def build(self) -> kernels.Kernel[Any]:
        """Return the kernel of the library with these settings."""
        if self._num_steps is not None:
            return kernels.HMC(self.start_step_size, num_steps=self._num_steps, jitter=0.0)
        return _Trajectory(self.start_step_size, length=self.trajectory_length)

    def adaptation(self, energy: RowwiseEnergy) -> WindowAdaptation | None:
        """Return the adaptation of the warm-up for an energy; None if nothing is adapted."""
        step, mass = self._adapts
        if not step and not mass:
            return None
        blocks = Blocks(self.full_mass, energy.shapes)
        return WindowAdaptation(
            self._target_accept_prob,
            ("dense" if blocks.dense else "diagonal") if mass else None,
            "grouped" if step else None,
            blocks=blocks.correlated if mass and blocks.dense else None,
        )

    def target(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        transforms: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[ModelEnergy | PotentialEnergy | None, Tensor | None]:
        """Return the energy to sample, and the states at which the chains start.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            initial_params: starting values in unconstrained coordinates, with a leading chain axis.
            num_chains: number of chains.
            transforms: replace those of the kernel.
            generator: source of the draws of the ``init_strategy``.

        Returns:
            the energy, or None if there are no latent variables; the states ``(num_chains, dim)``,
            or None where the driver chooses them.
        """
        given = self._given_transforms if transforms is None else transforms
        transforms = dict(given or {})
        potential = self._given_potential
        if self.model is not None:
            model, own_name = self.model, "max_plate_nesting"
            if own_name in kwargs:  # an argument of the model, not ours
                model = functools.partial(model, **{own_name: kwargs[own_name]})
                kwargs = {name: value for name, value in kwargs.items() if name != own_name}
            try:
                model_energy = ModelEnergy(
                    model, *args, max_plate_nesting=self.max_plate_nesting, **kwargs
                )
            except NoLatentsError:
                return None, None
            if not transforms:
                return model_energy, self._starts(
                    model_energy, initial_params, num_chains, generator
                )
            # Pyro's potential, whose coordinates are those of the transforms
            own = model_energy.transforms or {}
            transforms = {name: transform.inv for name, transform in own.items()} | transforms
            with drawing_from(generator):
                params, potential, _, _ = initialize_model(
                    model,
                    tuple(args),
                    dict(kwargs),
                    transforms=transforms,
                    max_plate_nesting=self.max_plate_nesting,
                    num_chains=num_chains,
                    init_strategy=self.init_strategy,
                    initial_params=initial_params or None,
                )
            if num_chains == 1 and not initial_params:
                params = {name: value.unsqueeze(0) for name, value in params.items()}
            initial_params = params
        if not initial_params or potential is None:
            return None, None
        energy = PotentialEnergy(potential, initial_params, transforms)
        return energy, energy.join(initial_params)

    def _starts(
        self,
        energy: ModelEnergy,
        initial_params: Mapping[str, Tensor] | None,
        num_chains: int,
        generator: torch.Generator | None,
    ) -> Tensor | None:
        if initial_params:
            return energy.join(initial_params)
        if self.init_strategy is init_to_uniform:
            return None  # drawn until a first step is accepted
        return energy.initial(num_chains, generator, self.init_strategy)

    # Pyro's interface of a kernel

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Start a chain.

        Args:
            warmup_steps: number of steps that adapt.
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: if a ``potential_fn`` has no ``initial_params``.
        """
        given = self._initial
        if given is None and self._given_potential is not None:
            raise ValueError(
                "potential_fn requires initial_params, a dict of starting values, for the names and"
                " shapes of its sites: set kernel.initial_params before setup"
            )
        rows = None if given is None else {name: value[None] for name, value in given.items()}
        energy, start = self.target(args, kwargs, rows)
        if energy is None:
            self._energy = self._chain = None
            self._initial = {}
            return
        chain = PyroKernel(self.build(), energy, adaptation=self.adaptation(energy))
        if start is not None:
            chain.initial_params = {chain.site: start[0]}
        chain.setup(warmup_steps)
        self.show(energy, chain)
        self._initial = energy.split(chain.state.x[0].clone())

    def show(self, energy: ModelEnergy | PotentialEnergy, chain: PyroKernel) -> None:
        """Show a chain in the attributes of the kernel (step size, mass matrix and others)."""
        self._energy, self._chain = energy, chain
        if self._given_potential is None:
            self._potential = lambda params: energy(energy.join(params))

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take a step from ``params``, in unconstrained coordinates.

        Args:
            params: the result of the step before, or the initial values. Where they differ from it,
                the energy and the gradient are evaluated again.
        """
        if self._chain is None or self._energy is None:
            if self._initial is None:
                raise ValueError("there is no chain: call setup(warmup_steps, ...) first")
            return dict(params)  # no latent variables
        site = self._chain.site
        return self._energy.split(self._chain.sample({site: self._energy.join(params)})[site])

    def cleanup(self) -> None:
        """Forget the initial values. The adapted step size and mass matrix can still be read."""
        self._initial, self._potential = None, self._given_potential

    def clear_cache(self) -> None:
        """Evaluate the energy and its gradient again in the next step."""
        if self._chain is not None:
            self._chain.refresh()

    def logging(self) -> OrderedDict[str, str]:
        """Return the step size and the mean acceptance rate, as text."""
        if self._chain is not None:
            return self._chain.logging()
        return OrderedDict([("step size", f"{self.step_size:.2e}"), ("acc. prob", "1.000")])

    def diagnostics(self) -> dict[str, Any]:
        """Return the divergent draws, and the mean acceptance rate after the warm-up.

        After a run of several chains in :class:`pyroebm.infer.MCMC` they are those of the first
        one.
        """
        if self._chain is not None:
            return self._chain.diagnostics()
        return {"divergences": [], "acceptance rate": 1.0}

    @property
    def initial_params(self) -> Mapping[str, Tensor] | None:
        """Values at which chains start, in unconstrained coordinates; None if not chosen yet."""
        return self._initial

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial = params and {name: torch.as_tensor(x) for name, x in params.items()}

    @property
    def potential_fn(self) -> Callable[..., Tensor] | None:
        """The ``potential_fn`` given, or between :meth:`setup` and :meth:`cleanup` the model's."""
        return self._potential

    @property
    def transforms(self) -> Mapping[str, Any] | None:
        """The transforms given, or after :meth:`setup` those of the model.

        Raises:
            ValueError: if the support of a latent variable depends on another one.
        """
        if self._energy is None:
            return self._given_transforms
        transforms = transforms_of(self._energy)
        if transforms is None:
            raise ValueError(
                "transforms must not depend on latent variables, but the support of a latent"
                " variable does: run the kernel in pyroebm.infer.MCMC, which maps whole states"
            )
        return transforms

    @property
    def step_size(self) -> float:
        """The current step size."""
        size = self.start_step_size if self._chain is None else self._chain.kernel.step_size
        return float(torch.as_tensor(size).median())

    @property
    def num_steps(self) -> int:
        """Number of leapfrog steps of a trajectory at the current step size."""
        if self._num_steps is not None:
            return self._num_steps
        return max(1, min(MAX_STEPS, int(self.trajectory_length / self.step_size)))

    @property
    def inverse_mass_matrix(self) -> dict[tuple[str, ...], Tensor]:
        """Inverse mass of each block: a vector for a diagonal one, a matrix for a dense one."""
        if self._chain is None or self._energy is None:
            return {}
        blocks = Blocks(self.full_mass, self._energy.shapes)
        return blocks.matrices(self._chain.kernel.inverse_mass, self._chain.state.x)

    @property
    def mass_matrix_adapter(self) -> MassMatrixAdapter:
        """The mass matrix as Pyro's adapter shows it.

        Its ``inverse_mass_matrix`` can be assigned to between two steps, and in a hook, for all
        chains. Assigning an
        ``ArrowheadMassMatrix`` to ``mass_matrix_adapter`` adapts a dense one instead, with a
        RuntimeWarning.
        """
        return MassMatrixAdapter(self.inverse_mass_matrix, self._set_inverse_mass)

    @mass_matrix_adapter.setter
    def mass_matrix_adapter(self, adapter: object) -> None:
        if not isinstance(adapter, ArrowheadMassMatrix):
            raise ValueError(
                "mass_matrix_adapter must be an ArrowheadMassMatrix of Pyro, for which a dense mass"
                f" matrix is adapted, got {type(adapter).__name__}: the structure of a mass matrix"
                " is given by full_mass"
            )
        self.full_mass = True
        warnings.warn(
            "an arrowhead mass matrix is not available: a dense one (full_mass=True), which"
            " includes it, is adapted instead",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )

    def _set_inverse_mass(self, matrices: Mapping[tuple[str, ...], Tensor]) -> None:
        if self._chain is None or self._energy is None:
            raise ValueError(
                "inverse_mass_matrix can be set after setup(...) only: before, the sites and their"
                " sizes are not known"
            )
        blocks = Blocks(self.full_mass, self._energy.shapes)
        kernel = self._chain.kernel.replace(inverse_mass=blocks.inverse_mass(matrices))
        self._chain.kernel = kernel

    @property
    def _potential_energy_last(self) -> Tensor | None:
        """The potential energy of the current state, which examples of Pyro read in hooks."""
        energies: Tensor | None = None if self._chain is None else self._chain.state.energy[0]
        return energies


class NUTS(HMC):
    """No-U-turn sampler with the arguments of ``pyro.infer.NUTS``.

    The algorithm is that of Hoffman and Gelman (2014) and Betancourt (2017). It is a kernel as
    Pyro's, as :class:`HMC` is.

    Args:
        model: as for :class:`HMC`.
        potential_fn: as for :class:`HMC`.
        step_size: as for :class:`HMC`.
        adapt_step_size: as for :class:`HMC`.
        adapt_mass_matrix: as for :class:`HMC`.
        full_mass: as for :class:`HMC`.
        use_multinomial_sampling: the draw from a trajectory is multinomial; False, slice sampling,
            gives a RuntimeWarning and the same draws.
        transforms: as for :class:`HMC`.
        max_plate_nesting: as for :class:`HMC`.
        jit_compile: ignored.
        jit_options: ignored.
        ignore_jit_warnings: ignored.
        target_accept_prob: as for :class:`HMC`.
        max_tree_depth: maximum number of doublings of a trajectory.
        init_strategy: as for :class:`HMC`.

    Raises:
        ValueError: as :class:`HMC`.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> isinstance(NUTS(model, max_tree_depth=5), pyro.infer.NUTS)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Tensor] | None = None,
        step_size: float | None = 1.0,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool | Sequence[tuple[str, ...]] = False,
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
        self.max_tree_depth = max_tree_depth
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            target_accept_prob=target_accept_prob,
            init_strategy=init_strategy,
        )
        if not use_multinomial_sampling:
            warnings.warn(
                "use_multinomial_sampling=False is ignored: NUTS draws from a trajectory with"
                " multinomial weights, which has the same distribution",
                RuntimeWarning,
                stacklevel=stacklevel_of_user(),
            )

    def build(self) -> kernels.NUTS:
        """Return a :class:`pyroebm.kernels.NUTS`."""
        return kernels.NUTS(self.start_step_size, max_tree_depth=self.max_tree_depth)


# A subclass would inherit the methods of Pyro's sampler; a virtual one passes isinstance alone.
pyro.infer.mcmc.HMC.register(HMC)
pyro.infer.mcmc.NUTS.register(NUTS)
