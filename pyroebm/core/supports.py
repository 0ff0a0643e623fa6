"""Supports of energies, their transforms to unconstrained coordinates, and default starting states.

Supports are :mod:`torch.distributions.constraints`; :data:`spin` is the one that torch lacks. An
elementwise constraint holds for every entry of an event, so ``real`` is valid for events of any
shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import identity_transform

from pyroebm.core.rng import uniform

__all__ = [
    "spin",
    "base_constraint",
    "is_discrete",
    "is_real",
    "same_support",
    "draw_initial",
    "inside",
    "mean_free_basis",
    "search_finite",
    "site_values",
    "to_support",
    "unconstraining",
]

#: Maximum number of draws of states whose energy is not finite.
MAX_TRIES = 100


class _Spin(Constraint):
    """Each entry is -1 or +1."""

    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        return (value == 1) | (value == -1)


spin = _Spin()


def base_constraint(support: Constraint) -> Constraint:
    """Return the constraint inside any ``constraints.independent`` wrappers."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_discrete(support: Constraint) -> bool:
    """Whether events are discrete, so that no gradient in x exists."""
    return bool(base_constraint(support).is_discrete)


def is_real(support: Constraint) -> bool:
    """Whether the support is all of R^d, so that no transform is needed."""
    return isinstance(base_constraint(support), type(constraints.real))


def same_support(a: Constraint, b: Constraint) -> bool:
    """Whether two constraints describe the same set (torch compares instances, not sets)."""
    a, b = base_constraint(a), base_constraint(b)
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_same_setting(vars(a)[name], vars(b)[name]) for name in vars(a))


def _same_setting(a: Any, b: Any) -> bool:
    if isinstance(a, Constraint):
        return isinstance(b, Constraint) and same_support(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same_setting, a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def inside(support: Constraint, x: Tensor, event_dims: int) -> Tensor:
    """Return whether each event is in the support: ``(*batch, *event) -> (*batch)``, boolean.

    An event with a NaN is in no support.
    """
    base = base_constraint(support)
    fits: Tensor = base.check(x) & torch.isfinite(
        x if base.event_dim == 0 else event_sum(x, base.event_dim)
    )
    missing = event_dims - base.event_dim
    return fits.flatten(-missing).all(-1) if missing > 0 else fits


def site_values(
    support: Constraint, event_shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the K values of one site of a discrete event, shape ``(K, width)``.

    A flat event consists of sites of ``width`` entries each. Binary units, spins and integers are
    sites of width 1; a one-hot vector of K entries is one site of width K.

    Raises:
        ValueError: if the support is none of these, is unbounded, or has fewer than two values.
    """
    base = base_constraint(support)
    if isinstance(base, type(constraints.one_hot)):
        values = torch.eye(event_shape[-1], dtype=dtype, device=device)
    elif isinstance(base, type(constraints.boolean)):
        values = torch.tensor([[0.0], [1.0]], dtype=dtype, device=device)
    elif isinstance(base, _Spin):
        values = torch.tensor([[-1.0], [1.0]], dtype=dtype, device=device)
    elif isinstance(base, constraints.integer_interval) and not isinstance(
        base.lower_bound, Tensor
    ):
        values = torch.arange(
            base.lower_bound, base.upper_bound + 1, dtype=dtype, device=device
        ).unsqueeze(1)
    else:
        raise ValueError(
            f"support={support} has no table of the values of one site: it must be boolean, spin,"
            " one_hot or an integer interval"
            " of the same bounds for every entry"
        )
    if len(values) < 2:
        raise ValueError(
            f"a site must have at least two values, but support={support} with event_shape"
            f" {tuple(event_shape)} has one"
        )
    return values


def unconstraining(support: Constraint) -> Transform:
    """Return the bijection from R^d onto the support (``biject_to``).

    Raises:
        ValueError: if the support is discrete, or if no bijection is registered for it.
    """
    if is_discrete(support):
        raise ValueError(
            f"support={support} is discrete: it has no unconstrained coordinates and no gradient"
            " in x; use a sampler for"
            " discrete states (Gibbs) or a continuous relaxation"
        )
    try:
        transform: Transform = biject_to(base_constraint(support))
    except NotImplementedError:
        raise ValueError(
            f"support={support} has no bijection from R^d registered with"
            " torch.distributions.biject_to; register one, or"
            " give the energy support=constraints.real and return +inf outside the domain"
        ) from None
    return transform


def to_support(support: Constraint) -> Transform:
    """Return the map from the coordinates in which kernels move onto the support.

    It is :func:`unconstraining`, and the identity where the support is real or discrete.

    Example:
        >>> to_support(constraints.positive)(torch.zeros(1)), to_support(spin)(torch.ones(1))
        (tensor([1.]), tensor([1.]))
    """
    if is_real(support) or is_discrete(support):
        identity: Transform = identity_transform
        return identity
    return unconstraining(support)


def draw_initial(
    support: Constraint,
    shape: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw starting states in a support, of a given ``shape`` (batch and event together).

    For continuous supports they are uniform on (-2, 2) in unconstrained coordinates, as in Stan and
    Pyro; for discrete ones, uniform on the values of each site.
    """
    shape = torch.Size(shape)
    base = base_constraint(support)

    def noise(size: Sequence[int]) -> Tensor:
        return uniform(size, generator, dtype, device)

    if isinstance(base, constraints.cat):
        shapes = [[*shape[:-1], length] for length in base.lengths]
        parts = [
            draw_initial(part, s, generator, dtype, device)
            for part, s in zip(base.cseq, shapes, strict=True)
        ]
        return torch.cat(parts, -1)
    if isinstance(base, type(constraints.boolean)):
        return (noise(shape) < 0.5).to(dtype)
    if isinstance(base, _Spin):
        return torch.where(noise(shape) < 0.5, -1.0, 1.0).to(dtype)
    if isinstance(base, type(constraints.one_hot)):
        index = (noise(shape[:-1]) * shape[-1]).long().clamp(max=shape[-1] - 1)
        return torch.nn.functional.one_hot(index, shape[-1]).to(dtype)
    if isinstance(base, constraints.integer_interval):
        low, high = base.lower_bound, base.upper_bound
        drawn: Tensor = low + torch.floor(noise(shape) * (high - low + 1))
        return drawn.clamp(max=high).to(dtype)
    if base.is_discrete:
        raise ValueError(
            f"support={support} has no default starting states; override initial(n, generator) in"
            " the energy, returning"
            " a tensor of shape (n, *event_shape)"
        )
    transform = unconstraining(base)
    x: Tensor = transform(4.0 * noise(transform.inverse_shape(shape)) - 2.0)
    return x.to(dtype)


def search_finite(
    name: str,
    draw: Callable[[int], Tensor],
    energy: Callable[[Tensor], Tensor],
    num_chains: int,
) -> Tensor:
    """Draw states until the energy of each is finite.

    Args:
        name: name of the energy, for the error message.
        draw: draws a given number of states.
        energy: maps states to energies.
        num_chains: number of states.

    Raises:
        ValueError: if some energies are not finite after the last try.
    """
    if num_chains < 1:
        raise ValueError(f"num_chains must be at least 1, got num_chains={num_chains}")
    states = draw(num_chains)
    for _ in range(MAX_TRIES):
        with torch.no_grad():
            bad = ~torch.isfinite(energy(states))
        if not bad.any():
            return states
        states[bad] = draw(int(bad.sum()))
    raise ValueError(
        f"{name}.initial found no state of finite energy for {int(bad.sum())} of"
        f" num_chains={num_chains} chains in"
        f" {MAX_TRIES} tries; override initial(n, generator) with states inside the domain"
    )


def event_sum(values: Tensor, dims: int) -> Tensor:
    """Sum over the last ``dims`` dimensions; if ``dims`` is 0, return the values."""
    return values.flatten(-dims).sum(-1) if dims > 0 else values


def event_numel(event_shape: Sequence[int]) -> int:
    """Return the number of entries of one event; 1 for a scalar variable."""
    return math.prod(event_shape)


def mean_free_basis(num_particles: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return Helmert's orthonormal basis of the vectors with mean 0, as columns, ``(n, n - 1)``.

    Args:
        num_particles: n, at least 2.
        dtype: floating-point type; None for torch's default.

    Example:
        >>> mean_free_basis(3)
        tensor([[ 0.7071,  0.4082],
                [-0.7071,  0.4082],
                [ 0.0000, -0.8165]])
    """
    k = torch.arange(1, num_particles, dtype=torch.float64)
    steps = (
        torch.tril(torch.ones(num_particles - 1, num_particles, dtype=torch.float64))
        - torch.diag_embed(k, offset=1)[:-1]
    )
    return (steps / torch.sqrt(k * (k + 1.0))[:, None]).T.to(
        torch.get_default_dtype() if dtype is None else dtype
    )
