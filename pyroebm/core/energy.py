"""The energy: one noun for the whole library, its algebra, and the one place that differentiates in
x."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.core._checks import (
    check_declaration,
    check_kind,
    check_same,
    check_shape,
    check_values,
    no_gradient,
)
from pyroebm.core.saving import Saveable
from pyroebm.core.supports import draw_initial, is_discrete, same_support, search_finite

__all__ = ["Energy", "Sum", "Tempered", "value_and_grad", "unchecked_value_and_grad", "score"]


class Energy(Saveable):
    r"""An unnormalised density :math:`p(x) = e^{-E(x)} / Z`.

    A subclass writes :meth:`forward` and names the shape of one event; everything else is a view of
    it (LeCun et al., "A Tutorial on Energy-Based Learning", 2006).

    Args:
        event_shape: shape of one event; ``()`` is a scalar variable. A class attribute of the same
            name serves too.
        support: constraint of one event (default ``constraints.real``); a class attribute of the
            same name serves too.

    Attributes:
        log_z: :math:`\log Z` in nats where it is exactly known, else None.
        has_exact_draws: whether :meth:`sample` draws, or raises.

    Example:
        >>> class DoubleWell(Energy):
        ...     def forward(self, x):
        ...         return x**4 - 4 * x**2 + x
        >>> DoubleWell()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-4.,  0., -2.])
    """

    event_shape: torch.Size = torch.Size()
    support: Constraint = constraints.real
    log_z: float | None = None
    has_exact_draws: bool = False
    _anchor: Tensor

    def __init__(
        self, event_shape: Sequence[int] | None = None, support: Constraint | None = None
    ) -> None:
        super().__init__()
        shape = type(self).event_shape if event_shape is None else event_shape
        self.support = type(self).support if support is None else support
        check_declaration(shape, self.support)
        self.event_shape = torch.Size(shape)
        # An energy without parameters still has a dtype and a device: those of this empty buffer,
        # which .to() moves.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Energies of a batch of events: ``(*batch, *event) -> (*batch)``, in nats."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(x): (*batch, *event_shape) -> (*batch)"
        )

    def _value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What :func:`unchecked_value_and_grad` returns."""
        with (
            torch.inference_mode(False)
            if torch.is_inference_mode_enabled()
            else torch.enable_grad()
        ):
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
            values, grad = _grad(self, x, create_graph=False)
        return values.detach(), grad

    # every evaluation passes here: a broadcast mistake is caught where it is made
    def __call__(self, x: Tensor) -> Tensor:
        batch = self.batch_shape(x)
        self._check_made()
        values: Tensor = super().__call__(x)
        check_values(type(self).__name__, values, x, self.event_shape, batch)
        return values

    def batch_shape(self, x: Tensor) -> torch.Size:
        """The batch shape of ``x``; ValueError unless its last dimensions are ``event_shape``."""
        return check_shape(type(self).__name__, x, self.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters and buffers (torch's default for an energy without
        any)."""
        return self._reference().dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and buffers."""
        return self._reference().device

    def _check_made(self) -> None:
        if "_anchor" not in vars(self).get("_buffers", ()):
            raise ValueError(
                f"{type(self).__name__}.__init__ must call super().__init__() before anything else"
            )

    def _reference(self) -> Tensor:
        self._check_made()
        anchor = self._anchor
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                if tensor.numel() > 0:
                    return tensor
                # a view of an energy without tensors takes after the innermost energy, not after
                # itself
                anchor = tensor
        return anchor

    def check_states(self, x: Tensor, name: str = "x") -> None:
        """ValueError unless ``x`` has the shape, dtype and device of a batch of this energy's
        events."""
        self.batch_shape(x)
        check_same(type(self).__name__, "dtype", self.dtype, name, x.dtype)
        check_same(type(self).__name__, "device", self.device, name, x.device)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` legal starting states of finite energy, shape ``(n, *event_shape)``.

        Raises:
            ValueError: if ``n`` < 1, the support has no default, or no finite energy is found in
                100 tries.
        """

        def draw(count: int) -> Tensor:
            return draw_initial(
                self.support, (count, *self.event_shape), generator, self.dtype, self.device
            )

        return search_finite(type(self).__name__, draw, self, n)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact independent draws, shape ``(n, *event_shape)``, where the energy has them
        (``has_exact_draws``).

        Raises:
            NotImplementedError: if it has none; never returns something that is not a draw.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no exact draws; sample it with MCMC, from initial(n)"
        )

    def log_ratio(self, x1: Tensor, x2: Tensor) -> Tensor:
        r""":math:`\log p(x_1) - \log p(x_2) = E(x_2) - E(x_1)`, which needs no :math:`Z`. Shape:
        the common batch shape."""
        return self(x2) - self(x1)

    def named(self, x: Tensor, site: str = "x") -> dict[str, Tensor]:
        """States as the variables that results show, each ``(*batch, *shape)``: here one, called
        ``site``."""
        return {site: x}

    def __add__(self, other: Energy) -> Sum:
        return Sum(self, other) if isinstance(other, Energy) else NotImplemented

    def __radd__(self, other: int) -> Energy:  # sum([e1, e2]) begins at 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, beta: float) -> Tempered:
        return Tempered(self, beta)

    __rmul__ = __mul__

    def __truediv__(self, temperature: float) -> Tempered:
        return Tempered(self, 1.0 / temperature if temperature else math.inf)


class Sum(Energy):
    r"""Product of experts :math:`p(x) \propto \prod_k p_k(x)`, so :math:`E = \sum_k E_k` (Hinton,
    2002).

    Args:
        parts: energies of one event shape and one support.

    Raises:
        ValueError: if there are no parts, or if their event shapes or supports differ.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> e = Gaussian(torch.zeros(2)) + Gaussian(torch.ones(2))
        >>> e(torch.ones(3, 2))
        tensor([1., 1., 1.])
    """

    def __init__(self, *parts: Energy) -> None:
        if not parts:
            raise ValueError("parts must hold at least one Energy, got none")
        first = parts[0]
        for part in parts[1:]:
            if tuple(part.event_shape) != tuple(first.event_shape) or not same_support(
                part.support, first.support
            ):
                raise ValueError(
                    "the parts of a Sum must share one event_shape and one support, got"
                    f" {[(tuple(p.event_shape), str(p.support)) for p in parts]}"
                )
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(
                f"the parts of a Sum must share one dtype, got {[part.dtype for part in parts]}"
            )
        super().__init__(first.event_shape, first.support)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        # a part may know its domain better than the support does
        states = cast(Energy, self.parts[0]).initial(n, generator)
        with torch.no_grad():
            return states if torch.isfinite(self(states)).all() else super().initial(n, generator)


class Tempered(Energy):
    r"""The density at inverse temperature :math:`\beta`: :math:`p_\beta(x) \propto e^{-\beta
    E(x)}`.

    Args:
        energy: the energy :math:`E`.
        beta: inverse temperature :math:`\beta > 0`, no unit.

    Raises:
        ValueError: if ``beta`` is not a positive finite number.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> (0.5 * DoubleWell())(torch.tensor([1.0]))
        tensor([-1.])
    """

    def __init__(self, energy: Energy, beta: float) -> None:
        given: object = beta
        # float() would drop its gradient in silence
        learned = isinstance(given, Tensor) and given.requires_grad
        if learned or not (isinstance(given, Real | Tensor) and 0.0 < float(given) < math.inf):
            raise ValueError(
                f"beta must be a positive finite number without gradient, got beta={beta!r}"
            )
        super().__init__(energy.event_shape, energy.support)
        self.energy: Energy = energy
        self.beta: float = float(beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * self.energy(x)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.energy.initial(n, generator)

    def named(self, x: Tensor, site: str = "x") -> dict[str, Tensor]:
        return self.energy.named(x, site)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


def check_energy(energy: object) -> None:
    """ValueError unless ``energy`` is an Energy."""
    check_kind(energy, Energy)


def _grad(energy: Energy, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    if is_discrete(energy.support):
        raise ValueError(
            f"{type(energy).__name__} has the discrete support {energy.support}: it has no"
            " gradient in x"
        )
    values, grads = energy(x), None
    # rows are independent, so the gradient of their sum is the gradient of each
    if values.requires_grad:
        (grads,) = torch.autograd.grad(
            values, x, torch.ones_like(values), create_graph=create_graph, allow_unused=True
        )
    if grads is None or values.dtype != x.dtype:
        raise ValueError(no_gradient(type(getattr(energy, "energy", energy)).__name__, values, x))
    return values, grads


def value_and_grad(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Energies and their gradients in x, both detached; no parameter receives a gradient.

    Args:
        energy: an energy of continuous support.
        x: states, shape ``(*batch, *event)``, of the energy's dtype and device.

    Returns:
        :math:`E(x)` of shape ``(*batch)`` and :math:`\nabla_x E(x)` of shape ``(*batch, *event)``.

    Raises:
        ValueError: naming both shapes unless ``energy(x).shape`` is the batch shape; naming both
            dtypes or devices on a mismatch; if the support is discrete; if the energy is cut off
            from ``x``.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> value_and_grad(DoubleWell(), torch.tensor([1.0]))
        (tensor([-2.]), tensor([-3.]))
    """
    energy.check_states(x)
    return unchecked_value_and_grad(energy, x)


def unchecked_value_and_grad(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`value_and_grad` for inner loops, whose states passed the front door once."""
    return energy._value_and_grad(x)


def score(energy: Energy, x: Tensor) -> Tensor:
    r"""The score :math:`\nabla_x \log p(x) = -\nabla_x E(x)` (Hyvärinen, 2005), with its graph kept
    for training.

    Args:
        energy: an energy of continuous support.
        x: states, shape ``(*batch, *event)``; a tensor that requires no gradient is copied first.

    Returns:
        the score, shape ``(*batch, *event)``, differentiable in the parameters and in ``x``.

    Raises:
        ValueError: as :func:`value_and_grad`.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> score(DoubleWell(), torch.tensor([1.0])).detach()
        tensor([3.])
    """
    energy.check_states(x)
    with torch.inference_mode(False), torch.enable_grad():
        x = (
            x
            if x.requires_grad
            else (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        )
        return -_grad(energy, x, create_graph=True)[1]
