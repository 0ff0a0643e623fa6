"""Base class of targets, checks of arguments, and samplers by inverse CDF and by rejection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyroebm.core.energy import Energy
from pyroebm.core.rng import standard_normal, uniform

__all__ = [
    "LOG_TWO_PI",
    "TabulatedDensity",
    "Target",
    "as_floats",
    "check_each",
    "check_positive",
    "rejection",
]

LOG_TWO_PI = math.log(2.0 * math.pi)


class Target(Energy):
    r"""An energy with exactly known properties, to compare samplers and estimators with.

    A subclass defines :meth:`forward`; those of ``_log_z()``, :attr:`mean`, :attr:`variance` and
    :attr:`mode_weights` that are known exactly, the others are None; and ``_draw(n, generator)`` if
    exact draws are possible. The properties are computed from the parameters at each access, so
    they follow ``load_state_dict`` and ``.to()``.

    Args:
        event_shape: shape of one event; a class attribute of the same name is the default.
        support: constraint of one event (default real).
        dtype: floating-point type of its parameters; None for torch's default.

    Raises:
        ValueError: if ``dtype`` is not a floating-point type.

    Example:
        >>> import torch
        >>> class Flat(Target):
        ...     def forward(self, x):
        ...         return 0 * x
        >>> Flat().log_z is None, Flat().has_exact_draws
        (True, False)
    """

    def __init__(
        self,
        event_shape: Sequence[int] | None = None,
        support: Constraint | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(event_shape, support)
        if dtype is not None:
            if not dtype.is_floating_point:
                raise ValueError(f"dtype must be a floating-point type, got dtype={dtype}")
            self.to(dtype)

    @property
    def has_exact_draws(self) -> bool:
        """Whether the class defines exact draws, by ``_draw`` or :meth:`sample`."""
        cls = type(self)
        return cls._draw is not Target._draw or cls.sample is not Target.sample

    @property
    def log_z(self) -> float | None:
        r"""Log of the normalizing constant in nats, computed in float64; None where unknown."""
        return self._log_z()

    def _log_z(self) -> float | None:
        return None

    @property
    def mean(self) -> Tensor | None:
        """Mean of each entry, shape ``event_shape``; None where unknown or infinite."""
        return None

    @property
    def variance(self) -> Tensor | None:
        """Variance of each entry, shape ``event_shape``; None where unknown or infinite."""
        return None

    @property
    def mode_weights(self) -> Tensor | None:
        """Probability of each mode, shape ``(k,)``; None where modes are not known."""
        return None

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state in :attr:`mode_weights`.

        Args:
            x: states, shape ``(*batch, *event)``.

        Returns:
            shape ``(*batch)``, int64.

        Raises:
            NotImplementedError: if the modes are not known.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no known modes: its mode_weights is None; override"
            " mode_weights and mode_of(x) in a subclass to define them"
        )

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact independent samples, shape ``(num_samples, *event_shape)``, detached.

        They have the dtype and device of the target. The noise is drawn in float64 on the
        generator's device, so draws of one seed agree across dtypes up to rounding.

        Args:
            num_samples: number of draws, at least 1.
            generator: source of randomness; None for torch's default one.

        Raises:
            ValueError: if ``num_samples`` < 1.
            NotImplementedError: if the target has no exact draws.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got num_samples={num_samples}")
        with torch.no_grad():
            return self._draw(num_samples, generator).to(self.dtype)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} has no exact draws: run an MCMC kernel from initial(n,"
            " generator), or override"
            " _draw(n, generator) in a subclass"
        )

    def _uniform(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return uniform(shape, generator, torch.float64, self.device)

    def _normal(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return standard_normal(shape, generator, torch.float64, self.device)

    def _number(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def _within_two_deviations(self, num_chains: int, generator: torch.Generator | None) -> Tensor:
        # overdispersed starting states: uniform within two standard deviations of the mean
        if num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got num_chains={num_chains}")
        if self.mean is None or self.variance is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no known mean and variance: override initial"
            )
        return self.mean + self.variance.sqrt() * (
            4.0 * self._uniform((num_chains, *self.event_shape), generator) - 2.0
        ).to(self.dtype)


def as_floats(dtype: torch.dtype | None, **values: Any) -> list[Tensor]:
    """Convert numbers, arrays or tensors to detached tensors of one dtype and device.

    Args:
        dtype: floating-point type; None for that of the first tensor.
        values: the values, by name.

    Raises:
        ValueError: if a value is not finite, with its name; if ``dtype`` is not a floating-point
            type.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got dtype={dtype}")
    tensors = {
        k: v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64)
        for k, v in values.items()
    }
    given = next(
        (t for t in values.values() if isinstance(t, Tensor) and t.is_floating_point()),
        torch.empty(0),
    )
    check_each("finite", torch.isfinite, **tensors)
    return [
        t.detach().to(given.device, dtype or given.dtype, copy=True).contiguous()
        for t in tensors.values()
    ]


def check_each(rule: str, holds: Callable[[Tensor], Tensor], **values: Tensor | float) -> None:
    """Check that a rule holds for every entry of each value.

    Raises:
        ValueError: otherwise, with the argument's name and up to five entries.
    """
    for name, value in values.items():
        tensor = torch.as_tensor(value)
        if not (good := holds(tensor)).all():
            raise ValueError(
                f"{name} must be {rule}, got {name} with the entries"
                f" {tensor[~good].flatten()[:5].tolist()}"
            )


def check_positive(**values: Tensor | float) -> None:
    """Check that every entry of each value is positive and finite.

    Raises:
        ValueError: otherwise, as :func:`check_each`.
    """
    check_each("positive and finite", lambda t: (t > 0) & torch.isfinite(t), **values)


def rejection(
    num_samples: int,
    propose: Callable[[int], tuple[Tensor, Tensor]],
    uniform: Callable[[Sequence[int]], Tensor],
) -> Tensor:
    """Draw exact samples by rejection (von Neumann, 1951).

    Args:
        num_samples: number of draws.
        propose: draws ``k`` independent proposals ``(k, *event)`` and returns them with their log
            acceptance probabilities ``(k,)``, at most 0.
        uniform: draws uniform numbers in [0, 1) of a given shape.

    Returns:
        shape ``(num_samples, *event)``.
    """
    kept: list[Tensor] = []
    while (missing := num_samples - sum(map(len, kept))) > 0:
        states, log_accept = propose(2 * missing + 16)
        kept.append(states[uniform((len(states),)).log() < log_accept])
    return torch.cat(kept)[:num_samples]


class TabulatedDensity:
    r"""A one-dimensional density :math:`e^{-U(x)} / Z` without heavy tails, by quadrature.

    Draws are made by inverse CDF: the density is interpolated linearly between 65,537 nodes and
    inverted exactly within a cell. For the polynomials here the interpolation error is below what
    float64 draws can show. Tables and integrals are computed at first access.

    Args:
        potential: :math:`U`, a function of floats and of tensors.
        low: lower end of an interval that holds all but a negligible part of the mass.
        high: upper end of that interval.
        split: point between the left and the right well.

    Example:
        >>> density = TabulatedDensity(lambda x: x * x / 2, -12.0, 12.0, split=0.0)
        >>> round(density.log_z, 9), round(density.variance, 9), round(density.right_mass, 9)
        (0.918938533, 1.0, 0.5)
        >>> density.quantile(torch.tensor([0.975], dtype=torch.float64))
        tensor([1.9600], dtype=torch.float64)
    """

    nodes = 65_537

    def __init__(
        self, potential: Callable[[Any], Any], low: float, high: float, split: float
    ) -> None:
        self.potential = potential
        self.low = low
        self.high = high
        self.split = split

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor, float]:
        x = torch.linspace(self.low, self.high, self.nodes, dtype=torch.float64)
        u = self.potential(x)
        floor = float(u.min())
        density = torch.exp(floor - u)
        cdf = torch.cat([density.new_zeros(1), (density[1:] + density[:-1]).cumsum(0)])
        return x, density, cdf / cdf[-1], floor

    def _integral(self, f: Callable[[float], float], low: float, high: float) -> float:
        floor = self._table[-1]
        return quad(
            lambda x: f(x) * math.exp(floor - self.potential(x)),
            low,
            high,
            epsabs=1e-13,
            epsrel=1e-12,
            limit=200,
        )[0]

    def _whole(self, f: Callable[[float], float]) -> float:
        return self._integral(f, self.low, self.split) + self._integral(f, self.split, self.high)

    @cached_property
    def _mass(self) -> float:
        return self._whole(lambda x: 1.0)

    @cached_property
    def log_z(self) -> float:
        """Log of the integral of the unnormalized density, in nats."""
        return math.log(self._mass) - self._table[-1]

    @cached_property
    def mean(self) -> float:
        """Mean of the density."""
        return self._whole(lambda x: x) / self._mass

    @cached_property
    def variance(self) -> float:
        """Variance of the density."""
        return self._whole(lambda x: (x - self.mean) ** 2) / self._mass

    @cached_property
    def right_mass(self) -> float:
        """Probability of a state above the split."""
        return self._integral(lambda x: 1.0, self.split, self.high) / self._mass

    def quantile(self, u: Tensor) -> Tensor:
        """Evaluate the inverse CDF elementwise, for float64 ``u`` in [0, 1)."""
        x, density, cdf = (t.to(u.device) for t in self._table[:3])
        right = torch.searchsorted(cdf, u, right=True).clamp(1, self.nodes - 1)
        left = right - 1
        p, q = density[left], density[right]
        # fraction of the cell's mass; the density is linear, so its inverse CDF solves a quadratic
        share = (u - cdf[left]) / (cdf[right] - cdf[left])
        step = share * (p + q) / (p + torch.sqrt(p * p + share * (q * q - p * p)))
        return x[left] + step * (x[right] - x[left])
