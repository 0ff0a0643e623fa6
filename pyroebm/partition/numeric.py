"""log Z without chance: by a sum over all states, or by quadrature in one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Transform

from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.enumeration import BATCH, state_batches
from pyroebm.core.progress import Progress
from pyroebm.core.rng import seeded_generator
from pyroebm.core.supports import is_discrete, site_values, to_support
from pyroebm.core.wrappers import check_weighable, eval_mode, unconstrain
from pyroebm.energies.layered import LayeredMachine
from pyroebm.partition.result import LogZ

__all__ = ["exact", "expectation", "quadrature"]

#: Gauss-Legendre nodes in one panel.
NODES = 16
#: The golden section: at an edge of the density, the errors of a rule with that share of the panels
#: are others.
GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)
#: Nats below the peak at which a density has ended.
DEPTH = 50.0
#: Panels from which log Z starts, and an expectation, by the number of dimensions: fewer might all
#: miss a small region.
FIRST, FIRST_OF_EXPECTATION = 2, {1: 128, 2: 8}


def exact(energy: Energy, max_units: float = 24, *, progress: bool | None = None) -> LogZ:
    r""":math:`\log Z` as the energy knows it, or by a sum over every state of a discrete energy, in
    float64.

    .. math:: Z = \sum_x e^{-E(x)}

    A machine made of layers (RBM, GRBM, DBM) is summed over the smaller of its two sides, the other
    being summed in closed form.

    Args:
        energy: of any discrete support with a table of site values, made of layers, or with a known
            ``log_z``.
        max_units: bits to enumerate at most, :math:`\log_2` of the number of states; each one more
            doubles the time.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Raises:
        ValueError: if there are more states, or if the energy is continuous and knows no ``log_z``.
        FloatingPointError: if an energy is NaN or -inf, or all are +inf.

    Example:
        >>> from pyroebm.energies import Ising
        >>> print(exact(Ising((3, 3), coupling=0.2) * 1.0))
        log Z = 6.6697 +- 0 (sum over 2^9 states; exact: no bias)
    """
    check_energy(energy)
    with torch.no_grad(), eval_mode(energy):
        if isinstance(energy, LayeredMachine):
            layers = energy.layers()
            units = sum(layers.sizes[layer] for layer in layers.smaller_side())
            _check_units(energy, units, max_units)
            return _exact(
                float(layers.double().log_partition(progress=progress)),
                f"sum over 2^{units} states of one side",
            )
        if energy.log_z is not None:
            return _exact(energy.log_z, "known")
        if not is_discrete(energy.support):
            raise ValueError(
                "exact needs a discrete energy or one that knows its log_z, but"
                f" {type(energy).__name__} has support"
                f" {energy.support}: see quadrature, or ais"
            )
        values = site_values(energy.support, energy.event_shape, energy.dtype, energy.device)
        sites = energy.event_shape.numel() // values.shape[1]
        bits = sites * math.log2(len(values))
        _check_units(energy, bits, max_units)
        total = torch.tensor(-math.inf, dtype=torch.float64, device=energy.device)
        with Progress(len(values) ** sites, "enumeration", "state", progress) as shown:
            for states in state_batches(values, sites):
                minus = -energy(states.reshape(-1, *energy.event_shape)).double()
                wrong = int((minus.isnan() | (minus == math.inf)).sum())
                if wrong:
                    raise FloatingPointError(
                        f"{type(energy).__name__} is NaN or -inf at {wrong} of {len(minus)} states"
                    )
                total = torch.logaddexp(total, minus.logsumexp(0))
                shown.update(len(states))
    return _exact(float(total), f"sum over 2^{bits:.4g} states")


def _exact(value: float, method: str) -> LogZ:
    if not math.isfinite(value):
        raise FloatingPointError(f"log Z is {value} ({method}): an energy is not finite")
    return LogZ(value, 0.0, "exact", method)


def _check_units(energy: Energy, units: float, max_units: float) -> None:
    if units > max_units:
        raise ValueError(
            f"log Z of {type(energy).__name__} needs a sum over 2^{units:.4g} states, more than"
            f" max_units={max_units} allows:"
            " estimate it (ais)"
        )


def quadrature(
    energy: Energy,
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    tolerance: float = 1e-8,
    max_panels: int | None = None,
    progress: bool | None = None,
) -> LogZ:
    r""":math:`\log \int e^{-E(x)} dx` in one or two dimensions, by Gauss-Legendre rules in equal
    panels that are halved.

    Panels are halved until the value changes by no more than ``tolerance``, and a rule of .618
    times as many panels agrees as well, since two rules may agree by chance at an edge of the
    density. The error given is the larger of the two differences, or the largest of the last four
    where ``max_panels`` are reached. A float32 energy limits it. Constrained supports are
    integrated in unconstrained coordinates.

    Args:
        energy: continuous, of one or two unconstrained entries.
        bounds: ``(low, high)`` of each entry in unconstrained coordinates, which are those of the
            energy where the support is real; nothing outside counts. None finds a box beyond which
            the density is below :math:`e^{-50}` of its peak; a peak far from ``energy.initial`` and
            narrow beside that distance may escape it.
        tolerance: change of log Z in nats at which to stop.
        max_panels: of one dimension, a power of two; None is 4,096 for one dimension and 64 for
            two.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Returns:
        kind "exact" where the tolerance was reached, else "estimate".

    Raises:
        ValueError: if the energy is discrete or has more dimensions, the bounds do not fit, or no
            box is found.
        FloatingPointError: if an energy is NaN or -inf, or the density is 0 everywhere.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> print(quadrature(DoubleWell(dtype=torch.float64)).value)  # doctest: +ELLIPSIS
        5.03228400...
    """
    value, _, error, dim = _integrate(energy, None, bounds, tolerance, max_panels, progress)
    return LogZ(
        value, error, "exact" if error <= tolerance else "estimate", f"quadrature in {dim}-D"
    )


def expectation(
    energy: Energy,
    function: Callable[[Tensor], Tensor],
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    tolerance: float = 1e-6,
    max_panels: int | None = None,
    progress: bool | None = None,
) -> tuple[Tensor, float]:
    r""":math:`E_p[f(x)] = \int f(x)\, e^{-E(x)} dx / Z` in one or two dimensions, by the panels of
    :func:`quadrature`.

    Probabilities of regions are expectations of their indicators, which converge slowly where the
    density at their edges is not small: look at the error. The first panels have 2,048 nodes in one
    dimension and 128 x 128 in two; a region that lies between the nodes is not seen, and its error
    is 0: give bounds about it.

    Args:
        energy: as for :func:`quadrature`.
        function: f, of states ``(n, *event)`` to ``(n,)`` or ``(n, k)``; where the density is 0 it
            is not heeded.
        bounds, tolerance, max_panels, progress: as for :func:`quadrature`; the tolerance is that of
            each entry.

    Returns:
        the expectation, float64, a scalar or ``(k,)``; and the error of its worst entry, by the
        rule of :func:`quadrature`: at most the tolerance unless ``max_panels`` were reached.

    Raises:
        ValueError: as :func:`quadrature`, and if f gives another shape.
        FloatingPointError: as :func:`quadrature`, and if f is NaN or infinite where the density is
            not 0.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> well = DoubleWell(dtype=torch.float64)
        >>> value, error = expectation(well, lambda x: torch.stack([x, x * x], -1))
        >>> value
        tensor([-1.2273,  2.0119], dtype=torch.float64)
    """
    _, mean, error, _ = _integrate(energy, function, bounds, tolerance, max_panels, progress)
    return mean, error


def _integrate(
    energy: Energy,
    function: Callable[[Tensor], Tensor] | None,
    bounds: Sequence[tuple[float, float]] | None,
    tolerance: float,
    max_panels: int | None,
    progress: bool | None,
) -> tuple[float, Tensor, float, int]:
    """log Z, the expectation of a function, the error of the one asked for, and the dimensions."""
    check_energy(energy)
    check_weighable(energy)
    if is_discrete(energy.support):
        raise ValueError(
            f"quadrature integrates over continuous supports, but {type(energy).__name__} has the"
            f" discrete support {energy.support}; sum over its states: pyroebm.partition.exact"
        )
    target, transform = unconstrain(energy), to_support(energy.support)
    dim = target.event_shape.numel()
    if dim not in (1, 2):
        raise ValueError(
            f"quadrature needs one or two unconstrained entries, but {type(energy).__name__} has"
            f" {dim}"
        )
    with (
        torch.no_grad(),
        eval_mode(energy),
        Progress(None, "quadrature", "node", progress) as shown,
    ):
        box = _find_box(target, dim) if bounds is None else _checked(bounds, dim)
        limit = (4096 if dim == 1 else 64) if max_panels is None else max_panels
        panels = max(1, min(FIRST if function is None else FIRST_OF_EXPECTATION[dim], limit // 2))
        coordinates = target, transform, box
        found, asked = _panels(*coordinates, panels, function, shown), int(function is not None)

        def change(other: tuple[Tensor, Tensor]) -> float:
            return float((found[asked] - other[asked]).abs().max())

        changes, error = list[float](), math.inf
        while error > tolerance and 2 * panels <= limit:
            panels *= 2
            before, found = found, _panels(*coordinates, panels, function, shown)
            changes.append(change(before))
            if changes[-1] <= tolerance or 2 * panels > limit:
                fewer = math.ceil(GOLDEN * panels)
                changes.append(change(_panels(*coordinates, fewer, function, shown)))
                error = max(changes[-2:])
    value, mean = float(found[0]), found[1]
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the density of {type(energy).__name__} is 0 everywhere in the box {box}"
        )
    return value, mean, error if error <= tolerance else max(changes[-4:], default=math.inf), dim


Box = list[tuple[float, float]]


def _checked(bounds: Sequence[tuple[float, float]], dim: int) -> Box:
    box = [(float(low), float(high)) for low, high in bounds]
    if len(box) != dim or not all(
        low < high and math.isfinite(low) and math.isfinite(high) for low, high in box
    ):
        raise ValueError(
            f"bounds must be {dim} finite pairs (low, high) with low < high, got bounds={bounds}"
        )
    return box


def _log_density(target: Energy, axes: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Log densities, float64, over the grid of the axes, and the states, in pieces of the first
    axis.
    """
    rows = max(1, BATCH * 4 // math.prod(len(axis) for axis in axes[1:]))
    for first in range(0, len(axes[0]), rows):
        piece = slice(first, first + rows)
        grid = torch.stack(torch.meshgrid(axes[0][piece], *axes[1:], indexing="ij"), -1)
        states = grid.reshape(-1, *target.event_shape).to(target.dtype)
        values = -target(states).double().reshape(grid.shape[:-1])
        wrong = int((values.isnan() | (values == math.inf)).sum())
        if wrong:
            raise FloatingPointError(
                f"the energy is NaN or -inf at {wrong} of {values.numel()} nodes of the grid"
            )
        yield values, states, piece


def _panels(
    target: Energy,
    transform: Transform,
    box: Box,
    panels: int,
    function: Callable[[Tensor], Tensor] | None,
    shown: Progress,
) -> tuple[Tensor, Tensor]:
    """log of the integral over a box with that many panels on each axis, and the expectation of a
    function.
    """
    node, weight = (
        torch.as_tensor(part, device=target.device)
        for part in np.polynomial.legendre.leggauss(NODES)
    )
    axes, weights = [], []
    for low, high in box:
        half = 0.5 * (high - low) / panels
        center = low + half * (
            2.0 * torch.arange(panels, dtype=torch.float64, device=target.device) + 1.0
        )
        axes.append((center.unsqueeze(1) + half * node).flatten())
        weights.append((half * weight).log().repeat(panels))
    total = torch.tensor(-math.inf, dtype=torch.float64, device=target.device)
    mean = torch.zeros((), dtype=torch.float64, device=target.device)
    for values, states, piece in _log_density(target, axes):
        values = values + weights[0][piece].reshape(-1, *[1] * (len(box) - 1))
        if len(box) == 2:
            values = values + weights[1]
        values = values.flatten()
        here = values.logsumexp(0)
        both = torch.logaddexp(total, here)
        if function is not None and bool(here > -math.inf):
            mean = mean * (total - both).exp() + (here - both).exp() * _mean(
                function, transform(states), values.softmax(0)
            )
        total = both
        shown.update(len(values))
    return total, mean


def _mean(function: Callable[[Tensor], Tensor], states: Tensor, weights: Tensor) -> Tensor:
    found = function(states).double()
    if found.dim() not in (1, 2) or len(found) != len(states):
        raise ValueError(
            f"function must map (n, *event) to (n,) or (n, k), got shape {tuple(found.shape)} for"
            f" n = {len(states)}"
        )
    there = weights > 0.0
    result = weights[there] @ found[there]
    if not bool(torch.isfinite(result).all()):
        raise FloatingPointError("function is NaN or infinite where the density is not 0")
    return result


def _find_box(target: Energy, dim: int) -> Box:
    """A box outside of which the density is negligible: grown where it is not yet, then shrunk to
    where it lives.
    """
    start = target.initial(256, seeded_generator(0, target.device)).double().reshape(256, dim)
    middle, reach = start.mean(0), (start.amax(0) - start.amin(0)).clamp(min=1.0)
    box = [(float(m - r), float(m + r)) for m, r in zip(middle, reach, strict=True)]
    for _ in range(64):
        alive = _alive(target, box)
        grown = [
            (low - (high - low) * bool(a[0]), high + (high - low) * bool(a[-1]))
            for (low, high), a in zip(box, alive, strict=True)
        ]
        if grown == box:
            break
        box = grown
    else:
        raise ValueError(
            "no box holds the density: its tails are heavy, or it cannot be normalised; give"
            f" bounds (reached {box})"
        )
    for _ in range(2):
        shrunk = []
        for (low, high), a in zip(box, _alive(target, box), strict=True):
            cell, where = (high - low) / (len(a) - 1), a.nonzero().flatten()
            shrunk.append(
                (
                    max(low, low + cell * (int(where[0]) - 1)),
                    min(high, low + cell * (int(where[-1]) + 1)),
                )
            )
        box = shrunk
    return box


def _alive(target: Energy, box: Box) -> list[Tensor]:
    """For each axis, at which of its grid points the density is not negligible anywhere across."""
    count = 1025 if len(box) == 1 else 129
    axes = [
        torch.linspace(low, high, count, dtype=torch.float64, device=target.device)
        for low, high in box
    ]
    values = torch.cat([values for values, _, _ in _log_density(target, axes)])
    if bool((values == -math.inf).all()):
        raise FloatingPointError(
            f"the density is 0 at every point of a grid over {box}; give bounds"
        )
    alive = values > values.max() - DEPTH
    return [alive] if len(box) == 1 else [alive.any(1), alive.any(0)]
