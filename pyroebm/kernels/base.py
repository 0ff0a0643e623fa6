"""What every kernel shares: the state, the report, the contract, and how rows, noise and metrics are laid out."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pyroebm.energy import Energy, unchecked_value_and_grad, value_and_grad
from pyroebm.supports import is_real

__all__ = ["State", "Info", "Kernel"]


class State(NamedTuple):
    """What the next step needs. Row i of each field belongs to chain i alone.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> from pyroebm.targets import DoubleWell
        >>> MALA().init(DoubleWell(), torch.tensor([1.0, -1.0]))
        State(x=tensor([ 1., -1.]), energy=tensor([-2., -4.]), grad=tensor([-3.,  5.]))
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: :math:`E(x)`, shape ``(chains,)``, finite
    grad: Tensor  #: :math:`\nabla E(x)`, shape ``(chains, *event)``


class Info(NamedTuple):
    """What a person wants to know of one step; every field has shape ``(chains,)``.

    Example:
        >>> Info._fields
        ('acceptance_rate', 'accepted', 'diverging', 'energy', 'n_steps', 'step_size', 'tree_depth')
    """

    acceptance_rate: Tensor  #: mean Metropolis probability of what was proposed, in [0, 1]
    accepted: Tensor  #: whether the chain moved
    diverging: Tensor  #: energy error above the threshold, or a non-finite number: the row was rejected
    energy: Tensor  #: Hamiltonian of the new state (the energy itself where there is no momentum)
    n_steps: Tensor  #: gradient evaluations
    step_size: Tensor  #: step size used
    tree_depth: Tensor | None = None  #: doublings of the trajectory (NUTS only)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel(abc.ABC):
    r"""A transition of many chains at once: settings only, no adaptation state and no random numbers inside.

    Args:
        step_size: :math:`\epsilon > 0`, a number for all chains or a tensor of shape ``(chains,)``.
        inverse_mass: diagonal of the inverse mass matrix :math:`M^{-1}`, shape of one event or flat ``(dim,)``; None is the
            identity. Near the marginal variances of the target is best.

    Raises:
        ValueError: if a step size or an inverse mass is not positive and finite.

    Example:
        >>> from pyroebm.kernels import MALA
        >>> MALA().replace(step_size=0.2)
        MALA(step_size=0.2, inverse_mass=None)
    """

    step_size: float | Tensor = 0.1
    inverse_mass: Tensor | None = None

    #: acceptance rate that warm-up aims at; None for a kernel that accepts everything and so cannot be tuned by it.
    target_acceptance: ClassVar[float | None] = None
    #: whether the target is left unchanged; False is said in the verdict of every run.
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("step_size", "inverse_mass"):
            value = getattr(self, name)
            if value is None:
                continue
            tensor = torch.as_tensor(value)
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise ValueError(f"{type(self).__name__}: {name} must be positive and finite, got {name}={value}")

    def replace(self, **changes: object) -> Self:
        """A new kernel with some settings changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def init(self, energy: Energy, x: Tensor) -> State:
        """The state at ``x`` of shape ``(chains, *event)``.

        Raises:
            ValueError: if the support is not real (wrap the energy in :class:`pyroebm.Unconstrained`), if shape, dtype or
                device do not fit, or if a start has a non-finite energy or gradient.
        """
        if not is_real(energy.support):
            raise ValueError(
                f"{type(self).__name__} moves in unconstrained coordinates, but {type(energy).__name__} has"
                f" support={energy.support}; wrap it: Unconstrained(energy) (MCMC.run does)"
            )
        energy.check_states(x)
        if len(energy.batch_shape(x)) != 1:
            raise ValueError(
                f"x must have shape (chains, *event_shape) with event_shape {tuple(energy.event_shape)}, got {tuple(x.shape)}"
            )
        values, grad = value_and_grad(energy, x)
        bad = ~(torch.isfinite(values) & torch.isfinite(grad.reshape(len(x), -1)).all(1))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"chains must start where energy and gradient are finite: {int(bad.sum())} of {len(x)} rows of x are not, the"
                f" first is row {row} with x={x[row].tolist()} and energy {float(values[row])}; start from energy.initial(n)"
            )
        return State(x.detach(), values, grad)

    @abc.abstractmethod
    def step(self, energy: Energy, state: State, generator: torch.Generator | None = None) -> tuple[State, Info]:
        """One transition of every chain. ``generator`` is on the device of the states; None is torch's global one."""


def check_kernel(kernel: object) -> None:
    """ValueError unless ``kernel`` is one of ours."""
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        raise ValueError(f"kernel must be an instance: write {kernel.__name__}() in place of {kernel.__name__}")
    if not isinstance(kernel, Kernel):
        raise ValueError(
            f"kernel must be one of pyroebm.kernels, got {type(kernel).__name__}; Pyro's own kernels go into pyro.infer.MCMC"
            " with energy.potential_fn()"
        )


def rows(x: Tensor) -> Tensor:
    """``(chains, *event)`` as ``(chains, dim)``; a scalar variable has dim 1."""
    return x.reshape(x.shape[0], -1)


def row_value_and_grad(energy: Energy, q: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`pyroebm.value_and_grad` on rows ``(chains, dim)``."""
    values, grad = unchecked_value_and_grad(energy, q.reshape(-1, *energy.event_shape))
    return values, rows(grad)


def state_of_rows(energy: Energy, q: Tensor, values: Tensor, grad: Tensor) -> State:
    """A :class:`State` from rows ``(chains, dim)``."""
    shape = (-1, *energy.event_shape)
    return State(q.reshape(shape), values, grad.reshape(shape))


def column(value: float | Tensor, like: Tensor) -> Tensor:
    """A setting for all chains, or one for each, as a column ``(chains, 1)`` beside rows ``(chains, dim)``."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.dim() > 1 or (tensor.dim() == 1 and len(tensor) != len(like)):
        raise ValueError(f"step_size must be one number or one for each of {len(like)} chains, got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1, 1).expand(len(like), 1)


def diagonal(inverse_mass: Tensor | None, like: Tensor) -> Tensor:
    """The diagonal of the inverse mass matrix, ``(dim,)``, for rows ``(chains, dim)``."""
    if inverse_mass is None:
        return torch.ones(like.shape[1], dtype=like.dtype, device=like.device)
    if inverse_mass.numel() != like.shape[1]:
        raise ValueError(
            f"inverse_mass must have {like.shape[1]} entries, one for each of the event, got shape {tuple(inverse_mass.shape)}"
        )
    return inverse_mass.reshape(-1).to(like)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise shaped as ``x``."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform noise on [0, 1) shaped as ``x``."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def choose(condition: Tensor, new: State, old: State) -> State:
    """Row by row: the new state where ``condition`` (chains,) holds. ``where`` and not arithmetic, so that no NaN leaks."""
    wide = condition.reshape(-1, *[1] * (new.x.dim() - 1))
    return State(
        torch.where(wide, new.x, old.x), torch.where(condition, new.energy, old.energy), torch.where(wide, new.grad, old.grad)
    )
