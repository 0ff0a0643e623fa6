"""The energy: one noun for the whole library, its algebra, and the one place that differentiates in
x."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyroebm.core._checks import (
    check_declaration,
    check_kind,
    check_same,
    check_shape,
    check_values,
    no_gradient,
)
from pyroebm.core.conditionals import (
    Index,
    blocks_of,
    common_blocks,
    conditional_of,
    product_of_powers,
)
from pyroebm.core.saving import Saveable
from pyroebm.core.supports import (
    draw_initial,
    is_discrete,
    same_support,
    search_finite,
    site_values,
)

__all__ = [
    "Energy",
    "Sum",
    "Tempered",
    "View",
    "score",
    "unchecked_value_and_grad",
    "value_and_grad",
]


class Energy(Saveable):
    r"""An unnormalised density :math:`p(x) = e^{-E(x)} / Z`.

    A subclass writes :meth:`forward` and names the shape of one event; everything else is a view of
    it (LeCun et al., "A Tutorial on Energy-Based Learning", 2006).

    Args:
        event_shape: shape of one event; ``()`` is a scalar variable. A class attribute of the same
            name serves too.
        support: constraint of one event (default ``constraints.real``); a class attribute of the
            same name serves too.

    What it can do beyond its values goes through every energy that is made of it: exact draws and
    ``log_z`` where they are known, the conditionals of sites (:meth:`site_logits`) and of blocks
    (:class:`pyroebm.core.conditionals.HasBlocks`), minibatches (:meth:`subsample`), and the names
    of its variables (:meth:`named`).

    Example:
        >>> class DoubleWell(Energy):
        ...     def forward(self, x):
        ...         return x**4 - 4 * x**2 + x
        >>> DoubleWell()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-4.,  0., -2.])
    """

    event_shape: torch.Size = torch.Size()
    support: Constraint = constraints.real
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

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_chains`` legal starting states of finite energy, shape ``(n, *event_shape)``.

        Raises:
            ValueError: if ``num_chains`` < 1, the support has no default, or no finite energy is
                found in 100 tries.
        """

        def draw(count: int) -> Tensor:
            return draw_initial(
                self.support, (count, *self.event_shape), generator, self.dtype, self.device
            )

        return search_finite(type(self).__name__, draw, self, num_chains)

    @property
    def log_z(self) -> float | None:
        r""":math:`\log Z` in nats where it is exactly known, else None."""
        return None

    @property
    def has_exact_draws(self) -> bool:
        """Whether :meth:`sample` draws, or raises."""
        return False

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_samples`` exact independent draws, shape ``(n, *event_shape)``, where the energy
        has them (``has_exact_draws``).

        Raises:
            NotImplementedError: if it has none; never returns something that is not a draw.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no exact draws; sample it with MCMC, from initial(n)"
        )

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Log-probabilities, up to a constant of each row, of the K values of one site of each row
        given the others, on a discrete support.

        Here they are K energies of each row. An energy that knows them in less time overrides this.

        Args:
            x: states, shape ``(chains, *event)``.
            site: number of the site, row by row, shape ``(chains,)``, int64; sites are numbered as
                the flat event has them.

        Returns:
            shape ``(chains, K)``; values in the order 0, 1 of bits, -1, +1 of spins, and of the
            entries of a one-hot row.
        """
        values = site_values(self.support, self.event_shape, x.dtype, x.device)
        candidates = x.reshape(len(x), 1, -1, values.shape[1]).repeat(1, len(values), 1, 1)
        candidates[torch.arange(len(x), device=x.device), :, site] = values
        # Chains stay the first axis: an energy may treat each of them differently, as a tempered
        # path does.
        return -self(candidates.reshape(len(x), len(values), *self.event_shape))

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        """An energy of which this one is the expectation: that of a random minibatch where it is a
        sum over data (:class:`pyroebm.core.MinibatchEnergy`), else itself."""
        return self

    @property
    def _source(self) -> Energy:
        """What tells this energy from another one: itself, or of a view that is made anew at each
        call the energy that it is made of."""
        return self

    def log_ratio(self, x1: Tensor, x2: Tensor) -> Tensor:
        r""":math:`\log p(x_1) - \log p(x_2) = E(x_2) - E(x_1)`, which needs no :math:`Z`. Shape:
        the common batch shape."""
        return self(x2) - self(x1)

    def score_samples(self, x: Tensor) -> Tensor:
        r"""Log-density :math:`\log p(x) = -E(x) - \log Z` where ``log_z`` is known, else
        :math:`-E(x)`, in nats, as scikit-learn's density estimators call it.

        Args:
            x: events, shape ``(*batch, *event)``.

        Returns:
            shape ``(*batch)``; higher where x is more probable.

        Example:
            >>> from pyroebm.targets import Gaussian
            >>> Gaussian(0.0).score_samples(torch.tensor([0.0]))  # -log(2 pi) / 2
            tensor([-0.9189])
        """
        log_z = self.log_z
        return -self(x) if log_z is None else -self(x) - log_z

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

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        # a part may know its domain better than the support does
        states = self._parts[0].initial(num_chains, generator)
        with torch.no_grad():
            return (
                states
                if torch.isfinite(self(states)).all()
                else super().initial(num_chains, generator)
            )

    @property
    def _parts(self) -> list[Energy]:
        return [cast(Energy, part) for part in self.parts]

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        return torch.stack([part.site_logits(x, site) for part in self._parts]).sum(0)

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Those that all parts have."""
        return common_blocks(self._parts)

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """The product of those of the parts."""
        return product_of_powers(*[(conditional_of(part, block, x), 1.0) for part in self._parts])

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        return Sum(*[part.subsample(generator) for part in self._parts])

    def named(self, x: Tensor, site: str = "x") -> dict[str, Tensor]:
        return self._parts[0].named(x, site)


class View(Energy):
    """An energy made of another one over the same events, whose starting states and names of
    variables it has.

    Args:
        energy: the other one.
        support: constraint of one event; None is that of the energy.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> View(DoubleWell()).energy
        DoubleWell()
    """

    def __init__(self, energy: Energy, support: Constraint | None = None) -> None:
        super().__init__(energy.event_shape, energy.support if support is None else support)
        self.energy: Energy = energy

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self.energy.initial(num_chains, generator)

    def named(self, x: Tensor, site: str = "x") -> dict[str, Tensor]:
        return self.energy.named(x, site)


class Tempered(View):
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
        super().__init__(energy)
        self.beta: float = float(beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * self.energy(x)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        return self.beta * self.energy.site_logits(x, site)

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Those of the energy."""
        return blocks_of(self.energy)

    def conditional(self, block: str, x: Tensor) -> Distribution:
        r"""That of the energy to the power :math:`\beta`."""
        return product_of_powers((conditional_of(self.energy, block, x), self.beta))

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        return Tempered(self.energy.subsample(generator), self.beta)

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
