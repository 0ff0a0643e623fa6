"""Base classes of the kernels: states, step reports, the kernel interface, and shared helpers."""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Callable
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    runtime_checkable,
)

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, unchecked_value_and_grad, value_and_grad
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.core.supports import is_discrete, is_real
from pyroebm.kernels.metric import Metric, metric_tensors

__all__ = [
    "AnyState",
    "ContinuousKernel",
    "Info",
    "Kernel",
    "PointState",
    "State",
    "Steps",
    "WrappedKernel",
]


class AnyState(Protocol):
    """Protocol of every kernel state: a NamedTuple of tensors (or of such states).

    Entry i of each tensor belongs to chain i. Every state has the two properties below.
    """

    @property
    def x(self) -> Tensor:
        """Positions, shape ``(chains, *event)``."""

    @property
    def energy(self) -> Tensor:
        """Energies :math:`E(x)`, shape ``(chains,)``."""


@runtime_checkable
class HasGradient(Protocol):
    """Protocol of a state that keeps the gradient of the energy at its positions."""

    @property
    def grad(self) -> Tensor:
        r"""Gradients :math:`\nabla E(x)`, shape ``(chains, *event)``."""


S = TypeVar("S", bound=AnyState)


class PointState(NamedTuple):
    """State of a kernel without gradients. Entry i of each field belongs to chain i alone.

    Example:
        >>> from pyroebm.kernels import Gibbs
        >>> from pyroebm.targets import BernoulliProduct
        >>> Gibbs().init(BernoulliProduct([1.0, 2.0]), torch.tensor([[1.0, 0.0]]))
        PointState(x=tensor([[1., 0.]]), energy=tensor([-1.]))
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: :math:`E(x)`, shape ``(chains,)``, finite


class State(NamedTuple):
    """State of a gradient-based kernel. Entry i of each field belongs to chain i alone.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> from pyroebm.targets import DoubleWell
        >>> MALA().init(DoubleWell(), torch.tensor([1.0, -1.0]))
        State(x=tensor([ 1., -1.]), energy=tensor([-2., -4.]), grad=tensor([-3.,  5.]))
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: :math:`E(x)`, shape ``(chains,)``, finite
    grad: Tensor  #: :math:`\nabla E(x)`, shape ``(chains, *event)``, finite


class Info(NamedTuple):
    """Report of one step; every field has shape ``(chains,)``.

    Example:
        >>> Info._fields[:5]
        ('acceptance_rate', 'accepted', 'diverging', 'energy', 'n_steps')
    """

    acceptance_rate: Tensor  #: mean Metropolis probability of what was proposed, in [0, 1]
    accepted: Tensor  #: whether the chain moved
    #: energy error above the threshold, or a non-finite number: the proposal was rejected
    diverging: Tensor
    energy: Tensor  #: Hamiltonian of the new state (the energy itself where there is no momentum)
    n_steps: Tensor  #: gradient evaluations (Gibbs kernels: sites or Gibbs blocks drawn)
    step_size: Tensor | None = None  #: step size used, where there is one
    tree_depth: Tensor | None = None  #: doublings of the trajectory (NUTS only)
    #: whether the trajectory reached the maximum tree depth without a U-turn (NUTS only)
    reached_max_treedepth: Tensor | None = None


class Steps(NamedTuple):
    """Consecutive steps, or draws, of every chain.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> from pyroebm.targets import DoubleWell
        >>> kernel, energy = MALA(), DoubleWell()
        >>> steps = Steps.of(*kernel.step(energy, kernel.init(energy, torch.zeros(4))))
        >>> steps.number, steps.x.shape
        (1, torch.Size([1, 4]))
    """

    last: Any  #: the state after the last step
    x: Tensor  #: positions, shape ``(steps, chains, *event)``
    grad: Tensor | None  #: gradients at these positions, if the state has them
    energy: Tensor  #: energies at these positions, shape ``(steps, chains)``
    info: Info  #: each field of shape ``(steps, chains)``
    tuning: Any = None  #: dual averaging of the step sizes, if the chains advance asynchronously

    @classmethod
    def of(cls, state: AnyState, info: Info) -> Steps:
        """Return the ``Steps`` that hold a single step."""
        report = _each(info, lambda value: value.unsqueeze(0))
        return cls(
            state,
            state.x.unsqueeze(0),
            state.grad.unsqueeze(0) if isinstance(state, HasGradient) else None,
            state.energy.unsqueeze(0),
            report,
        )

    @property
    def number(self) -> int:
        """Number of steps."""
        return len(self.x)

    def report(self, step: int) -> Info:
        """Return the report of one of the steps."""
        return _each(self.info, lambda value: value[step])


def _each(info: Info, change: Callable[[Tensor], Tensor]) -> Info:
    changed: Any = (None if value is None else change(value) for value in info)
    return Info(*changed)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel(abc.ABC, Generic[S]):
    """Transition of many chains at once.

    A kernel holds settings only: no adaptation state and no random numbers. A subclass is a frozen
    dataclass with :meth:`init` and :meth:`step`. Its state is a NamedTuple of tensors with the
    fields ``x`` and ``energy``.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> MALA().replace(step_size=0.2)
        MALA(step_size=0.2, inverse_mass=None)
    """

    @property
    def target_acceptance(self) -> float | None:
        """Acceptance rate that warm-up aims at; None for a kernel that accepts every proposal."""
        return None

    @property
    def exact(self) -> bool:
        """Whether the kernel leaves the target invariant; ``diagnose()`` warns if not."""
        return True

    @property
    def has_momentum(self) -> bool:
        """Whether ``Info.energy`` is a Hamiltonian with a momentum, so that BFMI is defined."""
        return False

    @property
    def discrete(self) -> bool:
        """Whether the kernel moves on discrete supports instead of unconstrained coordinates."""
        return False

    @property
    def min_dim(self) -> int:
        """Minimum number of entries of an event; dynamics at constant speed need two dimensions."""
        return 1

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the settings that warm-up may replace; a checkpoint stores them."""
        return ()

    @property
    def compiles(self) -> Literal["loops", "gradient", "nothing"]:
        """What is worth compiling.

        "loops" are the inner loops with the energy inlined, "gradient" is the energy and its
        gradient alone.
        """
        return "loops"

    @property
    def expected_gradients(self) -> float:
        """Expected number of gradient evaluations of one step, to decide whether to compile."""
        return 1.0

    @property
    def step_size(self) -> float | Tensor | None:
        """Step size; None for a kernel without one."""
        return None

    @property
    def inverse_mass(self) -> Tensor | Metric | None:
        """Inverse mass matrix; None is the identity."""
        return None

    @property
    def temperature(self) -> float | None:
        """Temperature at which an unadjusted kernel samples; None for the others."""
        return None

    def replace(self, **changes: object) -> Self:
        """Return a new kernel with some settings changed."""
        return dataclasses.replace(self, **changes)

    def probe(self) -> Self:
        """Return the kernel with the shortest trajectory, for the search of a step size."""
        return self

    @abc.abstractmethod
    def init(self, energy: Energy, x: Tensor, generator: torch.Generator | None = None) -> S:
        """Return the state at the positions ``x``.

        Args:
            energy: the target.
            x: positions, shape ``(chains, *event)``.
            generator: source of randomness for kernels that start with a random momentum; None is
                torch's default generator.

        Raises:
            ValueError: if the kernel does not move on the support of the energy, if shape, dtype or
                device do not fit, or if energy or gradient at a position are not finite.
        """

    @abc.abstractmethod
    def step(
        self, energy: Energy, state: S, generator: torch.Generator | None = None
    ) -> tuple[S, Info]:
        """Run one transition of every chain.

        Args:
            energy: the target.
            state: the current state.
            generator: source of randomness, on the device of the state; None is torch's default
                generator.

        Returns:
            the next state and the report of the step.
        """

    def steps(
        self, energy: Energy, state: S, num_steps: int, generator: torch.Generator | None = None
    ) -> tuple[S, Tensor]:
        """Run ``num_steps`` transitions.

        Returns:
            the last state and the mean ``acceptance_rate`` of each chain, shape ``(chains,)``.
        """
        rates = []
        for _ in range(num_steps):
            state, info = self.step(energy, state, generator)
            rates.append(info.acceptance_rate)
        return state, torch.stack(rates).mean(0)

    def runs_ahead(self, energy: Energy) -> bool:
        """Whether chains run asynchronously; see :class:`pyroebm.kernels.nuts.driver.Chains`."""
        return False

    def refresh(self, energy: Energy, state: S) -> S:
        """Recompute energy and gradient of a state after the energy was trained.

        Positions and momenta are unchanged.
        """
        old: Any = state
        fresh = self.init(energy, state.x)
        changes: dict[str, Any] = {"grad": fresh.grad} if isinstance(fresh, HasGradient) else {}
        new: S = old._replace(energy=fresh.energy, **changes)
        return new

    def own_adaptation(self) -> Any:
        """Return the kernel's own adaptation.

        None selects :class:`pyroebm.kernels.WindowAdaptation`.
        """
        return None

    def check_support(self, energy: Energy) -> None:
        """Raise ValueError unless this kernel moves on the support of an energy."""
        discrete = is_discrete(energy.support)
        if self.discrete == discrete and (discrete or is_real(energy.support)):
            return
        if self.discrete:
            where, hint = "on discrete supports", "use one for continuous energies, such as NUTS()"
        elif discrete:
            where = "in unconstrained coordinates"
            hint = (
                "it is discrete and has no gradient in x: use a kernel for discrete supports, such"
                " as Gibbs(), or a continuous relaxation"
            )
        else:
            where, hint = "in unconstrained coordinates", "wrap it: unconstrain(energy)"
        raise ValueError(
            f"{type(self).__name__} moves {where}, but {type(energy).__name__} has"
            f" support={energy.support}; {hint}"
        )

    def check_start(self, energy: Energy, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a batch ``(chains, *event)`` of positions.

        The support of the energy must be one on which the kernel moves.
        """
        self.check_support(energy)
        energy.check_states(x)
        if len(energy.batch_shape(x)) != 1:
            raise ValueError(
                "x must have shape (chains, *event_shape) with event_shape"
                f" {tuple(energy.event_shape)}, got {tuple(x.shape)}"
            )
        if energy.event_shape.numel() < self.min_dim:
            raise ValueError(
                f"{type(self).__name__} requires events of at least {self.min_dim} entries, but"
                f" {type(energy).__name__} has"
                f" event_shape {tuple(energy.event_shape)}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ContinuousKernel(Kernel[S]):
    r"""Kernel on :math:`R^d` with a step size and a metric.

    Args:
        step_size: :math:`\epsilon > 0`, a number for all chains or a tensor of shape ``(chains,)``.
        inverse_mass: inverse mass matrix :math:`M^{-1}`, best near the covariance of the target: a
            tensor is its diagonal (shape of one event, or flat), or a
            :class:`pyroebm.kernels.Dense` or :class:`pyroebm.kernels.LowRank` metric; None is the
            identity.

    Raises:
        ValueError: if a step size or an inverse mass is not positive and finite.

    Example:
        >>> from pyroebm.kernels import HMC
        >>> isinstance(HMC(), ContinuousKernel)
        True
    """

    learned: ClassVar[tuple[str, ...]] = ("step_size", "inverse_mass")
    step_size: float | Tensor = 0.1
    inverse_mass: Tensor | Metric | None = None

    def __post_init__(self) -> None:
        diagonal = self.inverse_mass if isinstance(self.inverse_mass, Tensor) else None
        for name, value in (("step_size", self.step_size), ("inverse_mass", diagonal)):
            if value is None:
                continue
            if not isinstance(value, numbers.Real | Tensor):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a number or a tensor, got"
                    f" {type(value).__name__}; an energy is an argument of MCMC.run, as in"
                    f" MCMC({type(self).__name__}()).run(energy), and a Pyro model of"
                    " pyroebm.infer.NUTS(model) or pyroebm.ModelEnergy(model, *args)"
                )
            tensor = torch.as_tensor(value)
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be positive and finite, got {name}={value}"
                )
        if not all(bool(torch.isfinite(part).all()) for part in metric_tensors(self.inverse_mass)):
            raise ValueError(
                f"{type(self).__name__}: inverse_mass must be finite, got"
                f" inverse_mass={self.inverse_mass}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class GradientKernel(ContinuousKernel[State]):
    """A :class:`ContinuousKernel` whose state is position, energy and gradient."""

    def init(self, energy: Energy, x: Tensor, generator: torch.Generator | None = None) -> State:
        """Return the state at ``x``, with energy and gradient; see :meth:`Kernel.init`."""
        self.check_start(energy, x)
        return start_state(energy, x)


@dataclasses.dataclass(frozen=True, eq=False)
class WrappedKernel(Kernel[S]):
    """Kernel around another one, with the properties of the inner kernel unless overridden.

    Settings that warm-up learns are those of the inner kernel.

    Args:
        kernel: the inner kernel.

    Raises:
        ValueError: if ``kernel`` is not a kernel.

    Example:
        >>> from pyroebm.kernels import ULA, CompiledKernel
        >>> kernel = CompiledKernel(ULA(0.1)).replace(step_size=0.2)
        >>> kernel.step_size, kernel.exact, kernel.kernel
        (0.2, False, ULA(step_size=0.2, inverse_mass=None, temperature=1.0))
    """

    kernel: Kernel[Any]

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    @property
    def target_acceptance(self) -> float | None:
        """Acceptance rate that warm-up aims at, of the inner kernel."""
        return self.kernel.target_acceptance

    @property
    def exact(self) -> bool:
        """Whether the inner kernel leaves the target invariant."""
        return self.kernel.exact

    @property
    def has_momentum(self) -> bool:
        """Whether the inner kernel reports a Hamiltonian."""
        return self.kernel.has_momentum

    @property
    def discrete(self) -> bool:
        """Whether the inner kernel moves on discrete supports."""
        return self.kernel.discrete

    @property
    def min_dim(self) -> int:
        """Minimum number of entries of an event, of the inner kernel."""
        return self.kernel.min_dim

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the settings of the inner kernel that warm-up may change."""
        return self.kernel.learned

    @property
    def compiles(self) -> Literal["loops", "gradient", "nothing"]:
        """What of the inner kernel is worth compiling."""
        return self.kernel.compiles

    @property
    def expected_gradients(self) -> float:
        """Expected number of gradient evaluations of one step of the inner kernel."""
        return self.kernel.expected_gradients

    @property
    def step_size(self) -> float | Tensor | None:
        """Step size of the inner kernel."""
        return self.kernel.step_size

    @property
    def inverse_mass(self) -> Tensor | Metric | None:
        """Inverse mass matrix of the inner kernel."""
        return self.kernel.inverse_mass

    @property
    def temperature(self) -> float | None:
        """Temperature of the inner kernel."""
        return self.kernel.temperature

    def replace(self, **changes: Any) -> Self:
        """Return a new kernel with some settings changed, the learned ones in the inner kernel."""
        inner = {name: changes.pop(name) for name in self.kernel.learned if name in changes}
        if inner:
            changes["kernel"] = changes.get("kernel", self.kernel).replace(**inner)
        return super().replace(**changes)

    def own_adaptation(self) -> Any:
        """Return the adaptation of the inner kernel."""
        return self.kernel.own_adaptation()

    def probe(self) -> Self:
        """Return the kernel with the shortest trajectory of the inner kernel."""
        return self.replace(kernel=self.kernel.probe())


def start_state(energy: Energy, x: Tensor) -> State:
    """Compute energies and gradients at starting positions.

    Raises:
        ValueError: if one of them is not finite.
    """
    values, grad = value_and_grad(energy, x)
    bad = ~(torch.isfinite(values) & torch.isfinite(grad.reshape(len(x), -1)).all(1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"chains must start where energy and gradient are finite: {int(bad.sum())} of {len(x)}"
            f" rows of x are not, the first is row {row} with x={x[row].tolist()} and energy"
            f" {float(values[row])}; start from energy.initial(n)"
        )
    return State(x.detach(), values, grad)


def check_kernel(kernel: object) -> None:
    """Raise ValueError unless ``kernel`` is an instance of :class:`Kernel`."""
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        raise ValueError(
            f"kernel must be an instance: write {kernel.__name__}() in place of {kernel.__name__}"
        )
    if isinstance(kernel, Kernel):
        return
    if type(kernel).__module__.startswith("pyroebm.infer."):
        name = type(kernel).__name__
        raise ValueError(
            f"kernel must be one of pyroebm.kernels, got pyroebm.infer.{name}, which takes a Pyro"
            f" model: import both from one place, pyroebm.infer.MCMC with pyroebm.infer.{name}, or"
            f" pyroebm.MCMC with pyroebm.kernels.{name}"
        )
    raise ValueError(
        f"kernel must be one of pyroebm.kernels, got {type(kernel).__name__}; run Pyro's own"
        " kernels with pyro.infer.MCMC and pyroebm.core.PotentialFn(energy)"
    )


def rows(x: Tensor) -> Tensor:
    """Flatten events: ``(chains, *event)`` to ``(chains, dim)``; a scalar event has dim 1."""
    return x.reshape(x.shape[0], -1)


def row_value_and_grad(energy: Energy, q: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`pyroebm.core.value_and_grad` on flattened events ``(chains, dim)``."""
    # Events are flat already. Skip the reshapes: also a view that changes nothing takes time.
    if len(energy.event_shape) == 1:
        return unchecked_value_and_grad(energy, q)
    values, grad = unchecked_value_and_grad(energy, q.reshape(-1, *energy.event_shape))
    return values, rows(grad)


def state_of_rows(energy: Energy, q: Tensor, values: Tensor, grad: Tensor) -> State:
    """Return a :class:`State` from flattened events ``(chains, dim)``."""
    shape = (-1, *energy.event_shape)
    return State(q.reshape(shape), values, grad.reshape(shape))


def column(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a setting of all chains, or one for each, as a column ``(chains, 1)``."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.dim() > 1 or (tensor.dim() == 1 and len(tensor) != len(like)):
        raise ValueError(
            f"step_size must be one number or one for each of {len(like)} chains, got shape"
            f" {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1, 1).expand(len(like), 1)


def normal_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape of ``x``."""
    return standard_normal(x.shape, generator, x.dtype, x.device)


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw uniform noise on [0, 1) of the shape of ``x``."""
    return uniform(x.shape, generator, x.dtype, x.device)


def choose(condition: Tensor, new: S, old: S) -> S:
    """Select the new state of the chains where ``condition`` ``(chains,)`` holds, else the old one.

    ``torch.where`` instead of arithmetic, so that a NaN of the state not chosen has no effect.
    """

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    fields: Any = zip(new, old, strict=True)  # type: ignore[call-overload]
    kind: Any = type(new)
    chosen: S = kind._make(pick(a, b) for a, b in fields)
    return chosen
