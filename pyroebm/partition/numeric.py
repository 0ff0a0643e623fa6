"""Deterministic log Z: by a sum over all states, or by quadrature in one and two dimensions."""

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
from pyroebm.core.statistics import Kind
from pyroebm.core.supports import is_discrete, site_values, to_support
from pyroebm.core.wrappers import check_weighable, eval_mode, unconstrain
from pyroebm.energies.layered import LayeredMachine
from pyroebm.partition.result import LogZ

__all__ = ["exact", "expectation", "quadrature"]

#: Number of Gauss-Legendre nodes in one panel.
NODES = 16
#: Golden ratio: a rule with this fraction of the panels has different errors at an edge of the
#: density.
GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)
#: Nats below the peak at which a density is negligible.
DEPTH = 50.0
#: Maximum number of panels of one dimension, a power of two, by the number of dimensions.
MAX_PANELS = {1: 4096, 2: 64}
#: Initial number of panels for log Z, and for an expectation by the number of dimensions; fewer
#: could all miss a small region.
FIRST, FIRST_OF_EXPECTATION = 2, {1: 128, 2: 8}


def exact(energy: Energy, max_units: float = 24, *, progress: bool | None = None) -> LogZ:
    r"""Compute :math:`\log Z` from the energy's own value or by a sum over all states, in float64.

    .. math:: Z = \sum_x e^{-E(x)}

    A machine with layers (RBM, GRBM, DBM) is summed over the smaller of its two sides; the other is
    summed in closed form.

    Args:
        energy: an energy with layers, with a known ``log_z``, or discrete with a table of site
            values.
        max_units: maximum number of bits to enumerate, :math:`\log_2` of the number of states; each
            further bit doubles the time.
        progress: True shows a progress bar, False does not, None shows it if the sum takes longer
            than a second.

    Returns:
        log Z of kind "exact".

    Raises:
        ValueError: if there are more states, or if the energy is continuous and has no ``log_z``.
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
                "energy must be discrete or have a log_z, but"
                f" {type(energy).__name__} has support {energy.support}; use quadrature or ais"
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
            f"log Z of {type(energy).__name__} requires a sum over 2^{units:.4g} states, more than"
            f" max_units={max_units} allows; estimate it by ais"
        )


def quadrature(
    energy: Energy,
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    tolerance: float = 1e-8,
    progress: bool | None = None,
) -> LogZ:
    r"""Compute :math:`\log \int e^{-E(x)} dx` in one or two dimensions by quadrature.

    The rules are Gauss-Legendre rules in equal panels. Panels are halved until the value changes by
    no more than ``tolerance`` and a rule with .618 times as many panels agrees, because two rules
    may agree by chance at an edge of the density. The error is the larger of the two differences,
    or the largest of the last four if the finest rule is reached: 4,096 panels of 16 nodes in one
    dimension, 64 in each of two. It cannot be smaller than the rounding error of a float32 energy.
    Constrained supports are integrated in unconstrained coordinates.

    Args:
        energy: a continuous energy of one or two unconstrained entries.
        bounds: ``(low, high)`` of each entry in unconstrained coordinates, which are those of the
            energy if the support is real; the density outside is ignored. None searches a box
            outside of which the density is below :math:`e^{-50}` of its peak. The search can miss a
            narrow peak far from ``energy.initial``.
        tolerance: change of log Z in nats at which to stop.
        progress: True shows a progress bar, False does not, None shows it if it takes longer than a
            second.

    Returns:
        log Z of kind "exact" if the tolerance was reached, else "estimate".

    Raises:
        ValueError: if the energy is discrete or has more dimensions, the bounds do not fit, or no
            box is found.
        FloatingPointError: if an energy is NaN or -inf, or the density is 0 everywhere.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> print(quadrature(DoubleWell(dtype=torch.float64)).value)  # doctest: +ELLIPSIS
        5.03228400...
    """
    value, _, error, dim = _integrate(energy, None, bounds, tolerance, progress)
    caveat = f"tolerance {tolerance:g} not reached" + (
        " by the finest rule"
        if energy.dtype == torch.float64
        else f" in {str(energy.dtype).removeprefix('torch.')}; use float64"
    )
    kind: Kind = "exact" if error <= tolerance else "estimate"
    return LogZ(value, error, kind, f"quadrature in {dim}-D", caveat=caveat)


def expectation(
    energy: Energy,
    function: Callable[[Tensor], Tensor],
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    tolerance: float = 1e-6,
    progress: bool | None = None,
) -> tuple[Tensor, float]:
    r"""Compute :math:`E_p[f(x)] = \int f(x)\, e^{-E(x)} dx / Z` in one or two dimensions.

    The rule is that of :func:`quadrature`. Probabilities of regions are expectations of their
    indicators, which converge slowly if the density is not small at their edges: check the error.
    The first panels have 2,048 nodes in one dimension and 128 x 128 in two. A region between the
    nodes is not detected, and its error is 0: pass bounds around it.

    Args:
        energy: as for :func:`quadrature`.
        function: f, from states ``(n, *event)`` to ``(n,)`` or ``(n, k)``; values at states of
            density 0 are ignored.
        bounds: as for :func:`quadrature`.
        tolerance: change of each entry at which to stop.
        progress: as for :func:`quadrature`.

    Returns:
        the expectation, float64, a scalar or ``(k,)``, and the largest error of an entry, by the
        rule of :func:`quadrature`: at most the tolerance unless the finest rule was reached.

    Raises:
        ValueError: as :func:`quadrature`, and if f returns another shape.
        FloatingPointError: as :func:`quadrature`, and if f is NaN or infinite at states of positive
            density.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> well = DoubleWell(dtype=torch.float64)
        >>> value, error = expectation(well, lambda x: torch.stack([x, x * x], -1))
        >>> value
        tensor([-1.2273,  2.0119], dtype=torch.float64)
    """
    _, mean, error, _ = _integrate(energy, function, bounds, tolerance, progress)
    return mean, error


def _integrate(
    energy: Energy,
    function: Callable[[Tensor], Tensor] | None,
    bounds: Sequence[tuple[float, float]] | None,
    tolerance: float,
    progress: bool | None,
) -> tuple[float, Tensor, float, int]:
    """Compute log Z, the expectation of a function, the error of the one requested, and the dim."""
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
            f"quadrature requires one or two unconstrained entries, but {type(energy).__name__} has"
            f" {dim}; use ais or smc"
        )
    with (
        torch.no_grad(),
        eval_mode(energy),
        Progress(None, "quadrature", "node", progress) as shown,
    ):
        box = _find_box(target, dim) if bounds is None else _checked(bounds, dim)
        limit = MAX_PANELS[dim]
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
    """Evaluate log densities, float64, on the grid of the axes, in pieces of the first axis.

    Yields:
        log densities, states and the slice of the first axis.
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
    """Integrate over a box with ``panels`` panels on each axis.

    Returns:
        the log of the integral and the expectation of the function.
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
        raise FloatingPointError(
            "function is NaN or infinite at states of positive density; it must be finite there"
        )
    return result


def _find_box(target: Energy, dim: int) -> Box:
    """Find a box outside of which the density is negligible.

    It is enlarged where the density is not negligible at its boundary, then reduced.
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
            "no box contains the density, because its tails are heavy or it cannot be normalized"
            f" (reached {box}); pass bounds"
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
    """Return for each axis at which grid points the density is not negligible."""
    count = 1025 if len(box) == 1 else 129
    axes = [
        torch.linspace(low, high, count, dtype=torch.float64, device=target.device)
        for low, high in box
    ]
    values = torch.cat([values for values, _, _ in _log_density(target, axes)])
    if bool((values == -math.inf).all()):
        raise FloatingPointError(
            f"the density is 0 at every point of a grid over {box}; pass bounds"
        )
    alive = values > values.max() - DEPTH
    return [alive] if len(box) == 1 else [alive.any(1), alive.any(0)]
