"""Energies, their sums and tempered versions, and gradients in x.

Every gradient in x that the library takes is taken in this module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import SupportsFloat, cast

import numpy as np
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
from pyroebm.core.arrays import as_tensor
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
    inside,
    is_circular,
    is_discrete,
    same_support,
    search_finite,
    site_values,
)

__all__ = [
    "Energy",
    "SharesLogZ",
    "Sum",
    "Tempered",
    "View",
    "score",
    "unchecked_value_and_grad",
    "value_and_grad",
]


class Energy(Saveable):
    r"""An unnormalized density :math:`p(x) = e^{-E(x)} / Z`.

    A subclass defines :meth:`forward` and the shape of one event (LeCun et al., "A Tutorial on
    Energy-Based Learning", 2006).

    An energy that wraps others passes on what remains valid. Changes of variables and compiled
    energies keep ``log_z`` and independent draws. Sums, tempered and conditioned energies do not;
    they keep the conditionals of sites (:meth:`site_logits`) and of Gibbs blocks
    (:class:`pyroebm.core.conditionals.HasBlocks`). All keep minibatches (:meth:`subsample`) and the
    names of variables (:meth:`named`).

    Args:
        event_shape: shape of one event; ``()`` for a scalar variable. A class attribute of the
            same name is the default.
        support: constraint of one event. A class attribute of the same name is the default;
            without one it is ``constraints.real``.

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
        # The dtype and device of an energy without parameters are those of this empty buffer, which
        # .to() converts.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``.

        Args:
            x: events, shape ``(*batch, *event)``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(x): (*batch, *event_shape) -> (*batch)"
        )

    def _value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute value and gradient; see :func:`unchecked_value_and_grad`."""
        with (
            torch.inference_mode(False)
            if torch.is_inference_mode_enabled()
            else torch.enable_grad()
        ):
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
            values, grad = _grad(self, x, create_graph=False)
        return values.detach(), grad

    # every evaluation is checked here, so that a wrong broadcast raises where it happens
    def __call__(self, x: Tensor) -> Tensor:
        """Call :meth:`forward`, and check the shapes of ``x`` and of the result."""
        batch = self.batch_shape(x)
        self._check_made()
        values: Tensor = super().__call__(x)
        check_values(type(self).__name__, values, x, self.event_shape, batch)
        return values

    def batch_shape(self, x: Tensor) -> torch.Size:
        """Return the batch shape of ``x``.

        Raises:
            ValueError: unless the last dimensions of ``x`` are ``event_shape``.
        """
        return check_shape(type(self).__name__, x, self.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters and buffers; torch's default if there are none."""
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
                # a view of an energy without tensors has the dtype of the innermost energy
                anchor = tensor
        return anchor

    def check_states(self, x: Tensor, name: str = "x") -> None:
        """Check that ``x`` has the shape, dtype and device of a batch of events.

        Args:
            x: states, shape ``(*batch, *event)``.
            name: name of the argument in the error message.

        Raises:
            ValueError: otherwise, with both shapes, dtypes or devices.
        """
        self.batch_shape(x)
        check_same(type(self).__name__, "dtype", self.dtype, name, x.dtype)
        check_same(type(self).__name__, "device", self.device, name, x.device)

    def as_states(self, x: Tensor | np.ndarray, name: str = "x") -> Tensor:
        """Return states as a tensor; a NumPy array is converted to the energy's dtype and device.

        Args:
            x: states, shape ``(*batch, *event)``.
            name: name of the argument in error messages.

        Raises:
            ValueError: as :meth:`check_states`, or if ``x`` is neither a tensor nor an array.

        Example:
            >>> from pyroebm.targets import DoubleWell
            >>> DoubleWell().as_states(np.zeros(2))
            tensor([0., 0.])
        """
        self._check_made()
        states = as_tensor(x, self.dtype, self.device, name)
        self.check_states(states, name)
        return states

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``.

        Args:
            num_chains: number of states, at least 1.
            generator: source of randomness; None for torch's default one.

        Raises:
            ValueError: if ``num_chains`` < 1, if the support has no default starting states, or if
                no state of finite energy is found in 100 tries.
        """

        def draw(count: int) -> Tensor:
            return draw_initial(
                self.support, (count, *self.event_shape), generator, self.dtype, self.device
            )

        return search_finite(type(self).__name__, draw, self, num_chains)

    @property
    def log_z(self) -> float | None:
        r"""Log of the normalizing constant Z, in nats; None where it is not known exactly."""
        return None

    @property
    def has_exact_draws(self) -> bool:
        """Whether :meth:`sample` is implemented."""
        return False

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact independent samples, shape ``(num_samples, *event)``.

        Args:
            num_samples: number of draws.
            generator: source of randomness; None for torch's default one.

        Raises:
            NotImplementedError: if the energy has no exact draws (see ``has_exact_draws``).
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no exact draws; sample it with MCMC, from initial(n)"
        )

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the K values of one site of each chain given the others.

        They are unnormalized, for an energy of discrete support. This method evaluates K energies
        for each chain. An energy with a faster formula overrides it.

        Args:
            x: states, shape ``(chains, *event)``.
            site: number of the site of each chain, shape ``(chains,)``, int64; sites are numbered
                in the order of the flat event.

        Returns:
            shape ``(chains, K)``. The order of values is 0, 1 for binary units, -1, +1 for spins,
            and that of the categories for one-hot sites.
        """
        values = site_values(self.support, self.event_shape, x.dtype, x.device)
        candidates = x.reshape(len(x), 1, -1, values.shape[1]).repeat(1, len(values), 1, 1)
        candidates[torch.arange(len(x), device=x.device), :, site] = values
        # The chains remain the first axis, since an energy may have a parameter for each chain, as
        # a geometric path does.
        return -self(candidates.reshape(len(x), len(values), *self.event_shape))

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        """Return an unbiased estimate of the energy on a random minibatch.

        Only an energy that is a sum over data has one (:class:`pyroebm.core.MinibatchEnergy`); any
        other energy returns itself.

        Args:
            generator: source of randomness; None for torch's default one.
        """
        return self

    def angles(self) -> tuple[str, ...]:
        """Return the names of the variables of :meth:`named` that are angles modulo 2 pi.

        They are those of the support :data:`pyroebm.core.circular`. Diagnoses use their sine and
        cosine.
        """
        return ("x",) if is_circular(self.support) else ()

    @property
    def angle_mask(self) -> Tensor | None:
        """Entries of a flat state in which the energy has the period 2 pi, a mask; None without."""
        return None

    @property
    def _source(self) -> Energy:
        """The energy that identifies this one in caches: itself, or the one that a view wraps."""
        return self

    def log_ratio(self, x1: Tensor | np.ndarray, x2: Tensor | np.ndarray) -> Tensor:
        r"""Return :math:`\log p(x_1) - \log p(x_2) = E(x_2) - E(x_1)`, which does not depend on Z.

        Args:
            x1: events, shape ``(*batch, *event)``.
            x2: events of the same or a broadcastable batch shape.

        Returns:
            shape of the common batch.
        """
        return self(self.as_states(x2, "x2")) - self(self.as_states(x1, "x1"))

    def score_samples(self, x: Tensor | np.ndarray, log_z: SupportsFloat | None = None) -> Tensor:
        r"""Return the log-density, normalized if log Z is known or given.

        It is :math:`\log p(x) = -E(x) - \log Z` if log Z is known, else :math:`-E(x)`, in nats.
        Give an estimate as ``log_z``, do not subtract it: a small machine knows its log Z, which
        would then be subtracted twice.
        Outside the support it is :math:`-\infty`, as ``logpdf`` and ``logpmf`` of SciPy are, and
        NaN for an event with a NaN; the energy is not evaluated there. The name is that of
        scikit-learn's density estimators.

        Args:
            x: events, shape ``(*batch, *event)``, of the energy's dtype, or a NumPy array.
            log_z: log Z, a number or the result of an estimator of :mod:`pyroebm.partition`. None
                is the ``log_z`` of the energy.

        Returns:
            shape ``(*batch)``.

        Raises:
            ValueError: if ``x`` has another shape, dtype or device.

        Example:
            >>> from pyroebm.targets import Exponential, Gaussian
            >>> Gaussian(0.0).score_samples(torch.tensor([0.0]))  # -log(2 pi) / 2
            tensor([-0.9189])
            >>> Exponential().score_samples(torch.tensor([1.0, -1.0]))
            tensor([-1., -inf])
        """
        x = self.as_states(x)
        dims = len(self.event_shape)
        valid = inside(self.support, x, dims)
        if not bool(valid.any()):
            values = x.new_full(valid.shape, -math.inf)
        else:
            # A state outside is replaced by one inside: an energy need not be defined there, and
            # may have a parameter for each row, so that rows are not dropped.
            rows = valid[(..., *[None] * dims)]
            values = torch.where(valid, -self(torch.where(rows, x, x[valid][0])), -math.inf)
        missing = torch.isnan(x).flatten(-dims).any(-1) if dims else torch.isnan(x)
        values = torch.where(missing, math.nan, values)
        known = self.log_z if log_z is None else float(log_z)
        return values if known is None else values - known

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the states as a dictionary of named variables, each ``(*batch, *shape)``.

        It is ``"x"`` for an energy of one variable, as here.

        Args:
            x: states, shape ``(*batch, *event)``.
        """
        return {"x": x}

    def __add__(self, other: Energy) -> Sum:
        return Sum(self, other) if isinstance(other, Energy) else NotImplemented

    def __radd__(self, other: int) -> Energy:  # sum([e1, e2]) starts from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, beta: float) -> Tempered:
        return Tempered(self, beta)

    __rmul__ = __mul__

    def __truediv__(self, temperature: float) -> Tempered:
        return Tempered(self, 1.0 / temperature if temperature else math.inf)


class Sum(Energy):
    r"""Product of experts: the sum of energies over the same events (Hinton, 2002).

    .. math:: E(x) = \sum_k E_k(x), \qquad p(x) \propto \prod_k p_k(x)

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
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return torch.stack([part(x) for part in self.parts]).sum(0)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        # the starting states of a part can be better than those of the support
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
        """Return the log-probabilities of the values of one site of each chain, ``(chains, K)``."""
        return torch.stack([part.site_logits(x, site) for part in self._parts]).sum(0)

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Gibbs blocks that all parts have."""
        return common_blocks(self._parts)

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the conditional of a Gibbs block: the product of those of the parts."""
        return product_of_powers(*[(conditional_of(part, block, x), 1.0) for part in self._parts])

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        """Return an unbiased estimate of the energy on a random minibatch."""
        return Sum(*[part.subsample(generator) for part in self._parts])

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the states as a dictionary of named variables."""
        return self._parts[0].named(x)


class View(Energy):
    """Base class of energies that wrap another energy over the same events.

    It has the starting states and variable names of the wrapped energy.

    Args:
        energy: the wrapped energy.
        support: constraint of one event; None for that of the energy.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> View(DoubleWell()).energy
        DoubleWell()
    """

    def __init__(self, energy: Energy, support: Constraint | None = None) -> None:
        super().__init__(energy.event_shape, energy.support if support is None else support)
        self.energy: Energy = energy

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.energy.initial(num_chains, generator)

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the states as a dictionary of named variables."""
        return self.energy.named(x)

    def angles(self) -> tuple[str, ...]:
        """Return the names of the variables that are angles."""
        return self.energy.angles()

    @property
    def angle_mask(self) -> Tensor | None:
        """Entries of a flat state in which the energy is periodic."""
        return self.energy.angle_mask


class SharesLogZ(Energy):
    """Base class of energies with the log Z of another one, which has other coordinates.

    They have exact draws where ``energy`` has them.

    Example:
        >>> from pyroebm.core.wrappers import unconstrain
        >>> from pyroebm.targets import Exponential
        >>> energy = unconstrain(Exponential())
        >>> isinstance(energy, SharesLogZ), energy.log_z == energy.energy.log_z
        (True, True)
    """

    energy: Energy

    @property
    def log_z(self) -> float | None:
        """Log of the normalizing constant of ``energy``, in nats; None where it is not known."""
        return self.energy.log_z

    @property
    def has_exact_draws(self) -> bool:
        """Whether ``energy`` can be sampled exactly."""
        return self.energy.has_exact_draws


class Tempered(View):
    r"""The density at inverse temperature :math:`\beta`.

    .. math:: p_\beta(x) \propto e^{-\beta E(x)}

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
        # float() would silently drop its gradient
        learned = isinstance(given, Tensor) and given.requires_grad
        if learned or not (isinstance(given, Real | Tensor) and 0.0 < float(given) < math.inf):
            raise ValueError(
                f"beta must be a positive finite number without gradient, got beta={beta!r}"
            )
        super().__init__(energy)
        self.beta: float = float(beta)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.beta * self.energy(x)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the values of one site of each chain, ``(chains, K)``."""
        return self.beta * self.energy.site_logits(x, site)

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Gibbs blocks of the energy."""
        return blocks_of(self.energy)

    def conditional(self, block: str, x: Tensor) -> Distribution:
        r"""Return the conditional of a Gibbs block: that of the energy, to the power beta."""
        return product_of_powers((conditional_of(self.energy, block, x), self.beta))

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        """Return an unbiased estimate of the energy on a random minibatch."""
        return Tempered(self.energy.subsample(generator), self.beta)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"beta={self.beta:g}"


def check_energy(energy: object) -> None:
    """Check that ``energy`` is an Energy.

    Raises:
        ValueError: otherwise.
    """
    check_kind(energy, Energy)


def _grad(energy: Energy, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    if is_discrete(energy.support):
        raise ValueError(
            f"{type(energy).__name__} has the discrete support {energy.support}: it has no"
            " gradient in x; use a kernel for discrete states, such as Gibbs()"
        )
    values, grads = energy(x), None
    # events are independent, so the gradient of the sum holds the gradient of each
    if values.requires_grad:
        (grads,) = torch.autograd.grad(
            values, x, torch.ones_like(values), create_graph=create_graph, allow_unused=True
        )
    if grads is None or values.dtype != x.dtype:
        raise ValueError(no_gradient(type(getattr(energy, "energy", energy)).__name__, values, x))
    return values, grads


def value_and_grad(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute energies and their gradients in x, both detached.

    The parameters receive no gradient.

    Args:
        energy: an energy of continuous support.
        x: states, shape ``(*batch, *event)``, of the energy's dtype and device.

    Returns:
        :math:`E(x)` of shape ``(*batch)`` and :math:`\nabla_x E(x)` of shape ``(*batch, *event)``.

    Raises:
        ValueError: if ``energy(x).shape`` is not the batch shape; if the dtypes or devices of the
            energy and ``x`` differ; if the support is discrete; if the energy does not depend on
            ``x`` through autograd.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> value_and_grad(DoubleWell(), torch.tensor([1.0]))
        (tensor([-2.]), tensor([-3.]))
    """
    energy.check_states(x)
    return unchecked_value_and_grad(energy, x)


def unchecked_value_and_grad(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`value_and_grad` without checks, for inner loops."""
    return energy._value_and_grad(x)


def score(energy: Energy, x: Tensor) -> Tensor:
    r"""Compute the score :math:`\nabla_x \log p(x) = -\nabla_x E(x)`, with its graph for training.

    The score is that of Hyvärinen (2005).

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
