"""Properties of an energy that explain a failed run.

Non-finite energies near divergent draws, and directions in which the density cannot be
normalized.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, unchecked_value_and_grad
from pyroebm.core.rng import seeded_generator, standard_normal
from pyroebm.core.rowwise import RowsFailAlone
from pyroebm.core.supports import is_discrete
from pyroebm.core.wrappers import Unconstrained
from pyroebm.kernels.hamiltonian import MAX_ENERGY_ERROR

__all__ = [
    "Edge",
    "LostMass",
    "Tail",
    "check_normalizable",
    "find_edge",
    "find_lost_mass",
    "find_tail",
    "flat_part",
    "has_gradient",
]

#: Distances along a line from a divergent draw, in standard deviations.
RADII = torch.logspace(-2.0, 0.5, 16, dtype=torch.float64)
#: Distances along an axis, relative to that of the farthest draw: three decades, with their ends.
POINTS = 16
DISTANCES = torch.logspace(-1.0, 2.0, 3 * POINTS + 1, dtype=torch.float64)
#: Tolerance in nats for the decrease of the mass from one decade to the next, for the rounding of
#: energies in float32: a density 1 / distance has equal masses.
SLACK = 0.05
#: Maximum number of lines on which :func:`check_normalizable` searches.
NUM_LINES = 32
#: Unconstrained coordinates from -LIMIT to LIMIT contain all numbers of a dtype: exp(-LIMIT) is 0.
LIMITS = {torch.float32: 110.0, torch.float64: 760.0}
#: Distance from the edge, in unconstrained coordinates, at which the density is extrapolated.
INSIDE = 6
#: Mass at the edges of a support, as a fraction of the total, from which it biases means.
MAX_LOST_MASS = 1e-3
#: Number of states in one evaluation of the energy.
ROWS = 4096


class Edge(NamedTuple):
    """A place at which an energy stops being finite."""

    share: float  #: fraction of the lines with a state of non-finite energy or gradient
    state: Tensor  #: the first such state, shape ``event``
    energy: float  #: the energy of this state
    coordinate: int | None  #: the flat coordinate that causes it; None if no single one does


class Tail(NamedTuple):
    """A direction in which a density cannot be normalized."""

    near: Tensor  #: the state at the distance of the farthest draw, shape ``event``
    far: Tensor  #: the state at the last distance of finite energy, shape ``event``
    energies: tuple[float, float]  #: the energies of both


class LostMass(NamedTuple):
    """Mass so close to an edge of a support that its states cannot be represented."""

    site: str  #: name of the variable
    share: float  #: fraction of the mass
    #: a, where the density at a distance d from the edge is proportional to d^(a - 1): the
    #: concentration of a beta, gamma or Dirichlet distribution
    concentration: float


def has_gradient(energy: Energy, states: Tensor) -> bool:
    """Whether the energy depends on its states ``(n, *event)`` through autograd.

    Example:
        >>> from pyroebm.core import Unnormalized
        >>> has_gradient(Unnormalized(lambda x: -x.detach()), torch.zeros(1))
        False
    """
    with torch.enable_grad():
        return energy(states[:1].detach().requires_grad_(True)).requires_grad


def find_edge(energy: Energy, states: Tensor, scale: Tensor) -> Edge | None:
    """Search for states of non-finite energy or gradient on a random line from each of some draws.

    A state counts if the energy does not rise by more than the divergence threshold on the way to
    it, so that a trajectory can reach it.

    Args:
        energy: the energy.
        states: draws of finite energy, shape ``(n, *event)``.
        scale: standard deviations of the coordinates, shape ``event``.

    Returns:
        the first such state; None if there is none.

    Example:
        >>> from pyroebm.core import Unnormalized
        >>> x = torch.linspace(0.1, 3.0, 30)
        >>> edge = find_edge(Unnormalized(lambda x: torch.log(x) - x), x, torch.tensor(1.0))
        >>> float(edge.state) < 0, edge.energy, edge.coordinate
        (True, nan, 0)
    """
    noise = standard_normal(
        states.shape, seeded_generator(0, states.device), states.dtype, states.device
    )
    radii = RADII.to(states).reshape(-1, *[1] * (states.dim() - 1))
    points = states.unsqueeze(1) + radii * (scale * noise).unsqueeze(1)
    values, finite = _evaluate(energy, points)
    start, _ = _evaluate(energy, states)
    over = finite & (values - start.unsqueeze(1) > MAX_ENERGY_ERROR)
    found = ~finite & (over.cumsum(1) == 0)
    lines = found.any(1).nonzero().flatten()
    if not len(lines):
        return None
    line = int(lines[0])
    at = int(found[line].int().argmax())
    outside = points[line, at]
    inside = points[line, at - 1] if at else states[line]
    single = inside.flatten().repeat(inside.numel(), 1)
    single.diagonal().copy_(outside.flatten())
    guilty = (~_evaluate(energy, single.reshape(-1, *inside.shape))[1]).nonzero().flatten()
    return Edge(
        len(lines) / len(states),
        outside,
        float(values[line, at]),
        int(guilty[0]) if len(guilty) else None,
    )


def find_tail(energy: Energy, base: Tensor, direction: Tensor) -> Tail | None:
    r"""Search for a tail without a finite integral, on the line through a draw in some direction.

    .. math:: \int_{10^k}^{10^{k+1}} e^{-E(x + t d)} dt

    must decrease from decade to decade, for k = -1, 0, 1, on both sides. It is constant for a
    density 1 / t and increases for a constant density.

    Args:
        energy: the energy.
        base: x, shape ``event``.
        direction: d, with the distance to the farthest draw as its norm, shape ``event``.

    Returns:
        the tail; None if there is none.

    Example:
        >>> from pyroebm.core import Unnormalized
        >>> zero, far = torch.tensor(0.0), torch.tensor(5.0)
        >>> tail = find_tail(Unnormalized(lambda x: x**2), zero, far)
        >>> float(tail.near), tail.energies
        (5.0, (-25.0, -250000.0))
        >>> find_tail(Unnormalized(lambda x: -torch.log1p(x**2)), zero, far)
    """
    distances = DISTANCES.to(base).reshape(-1, *[1] * base.dim())
    for side in (1.0, -1.0):
        points = base + side * distances * direction
        with torch.no_grad(), RowsFailAlone():
            values = energy(points).double()
        if not _decades_fall(values):
            last = int(torch.isfinite(values).nonzero()[-1])
            near = float(values[POINTS]), float(values[last])
            return Tail(points[POINTS], points[last], near)
    return None


def check_normalizable(energy: Energy, states: Tensor) -> None:
    r"""Check that an energy has a finite normalizing constant on lines through a state.

    The lines are the axes, except for angles, or random directions where there are more than 32
    coordinates and no angles. On each,
    :func:`find_tail` must find no tail over nine decades of distance, or over three in coordinates
    transformed to :math:`R^d`, which overflow beyond.

    Args:
        energy: an energy on :math:`R^d`.
        states: states of its typical scale, shape ``(n, *event)``.

    Raises:
        ValueError: if the mass increases without bound on one of the lines.

    Example:
        >>> from pyroebm.core import Unnormalized
        >>> check_normalizable(Unnormalized(lambda x: -(x**2) / 2), torch.randn(8))
        >>> check_normalizable(Unnormalized(lambda x: x**2), torch.randn(8))
        Traceback (most recent call last):
        ...
        ValueError: energy must have a finite normalizing constant, ...
    """
    with torch.no_grad():
        values = energy(states)
    values = torch.where(values.isnan(), math.inf, values)
    best = int(values.argmin())
    if not bool(torch.isfinite(values[best])):
        return
    base = states[best]
    flat, scale = base.flatten(), (states - base).abs().amax(0).flatten()
    scale = torch.where(scale > 0.0, scale, 1.0)
    size = flat.numel()
    if size <= NUM_LINES:
        lines = torch.diag(scale)
    else:
        noise = seeded_generator(0, states.device)
        lines = scale * standard_normal((NUM_LINES, size), noise, states.dtype, states.device)
    if energy.angle_mask is not None:
        lines = lines[~energy.angle_mask[lines.argmax(1)]] if size <= NUM_LINES else lines[:0]
    # a base far narrower than the target sees its mass increase over the first decades
    factors = (1.0,) if isinstance(energy, Unconstrained) else (1.0, 1e3, 1e6)
    for line in lines.reshape(-1, *base.shape):
        tails = [find_tail(energy, base, line)]
        for factor in factors[1:]:
            if tails[-1] is not None:
                tails.append(find_tail(energy, base, factor * line))
        tail = tails[0]
        if tail is not None and tails[-1] is not None:
            named, (near, far) = energy._source, tail.energies
            raise ValueError(
                f"energy must have a finite normalizing constant, but exp(-E) of"
                f" {type(named).__name__} cannot be integrated on a line: E changes from"
                f" {near:.4g} at {_shown(tail.near)} to {far:.4g} at {_shown(tail.far)};"
                " give the energy a support, or add a term (a prior) that increases there"
            )


def _shown(state: Tensor) -> str:
    values = [f"{value:.3g}" for value in state.flatten()[:4].tolist()]
    return f"[{', '.join(values)}{', ...' if state.numel() > 4 else ''}]"


def find_lost_mass(energy: Energy, states: Tensor) -> LostMass | None:
    r"""Search for mass closer to the edge of a support than numbers of a dtype can be.

    A number below 1 is at most :math:`1 - \epsilon`, and a positive number at least
    :math:`10^{-45}` in float32. Beyond the unconstrained coordinate u of this number, the transform
    is constant, and the density in u is wrong. Before it the density is :math:`\propto e^{-a |u|}`
    for a concentration a, and the mass beyond it is extrapolated from there. The density is
    integrated along single coordinates through each of the states.

    Args:
        energy: an energy in unconstrained coordinates.
        states: typical states, shape ``(n, *event)``. Mass must be lost in all of them.

    Returns:
        the largest loss above 0.1 %, of at most 32 coordinates; None if there is none.

    Example:
        >>> from pyroebm.core.wrappers import unconstrain
        >>> from pyroebm.core import Unnormalized
        >>> from torch.distributions import Gamma, constraints
        >>> density = Unnormalized(Gamma(0.02, 1.0).log_prob, support=constraints.positive)
        >>> lost = find_lost_mass(unconstrain(density), torch.zeros(1))
        >>> lost.site, round(lost.share, 2), round(lost.concentration, 2)
        ('x', 0.13, 0.02)
    """
    rows = states.reshape(len(states), -1)
    limit = LIMITS.get(rows.dtype)
    if limit is None or is_discrete(energy.support):
        return None
    size = rows.shape[1]
    found = []
    for k in torch.linspace(0, size - 1, min(size, NUM_LINES)).round().long().unique().tolist():
        if _saturates(energy, rows[0], k, limit):
            lost = [_lost_on_line(energy, row, k, limit) for row in rows]
            least = min(lost, key=lambda each: 0.0 if each is None else each.share)
            if least is not None and least.share > MAX_LOST_MASS:
                found.append(least)
    return max(found, key=lambda each: each.share, default=None)


def _line(row: Tensor, k: int, places: Tensor) -> Tensor:
    points = row.repeat(len(places), 1)
    points[:, k] = places
    return points


def _named(energy: Energy, points: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        named = energy.named(points.reshape(-1, *energy.event_shape))
    return {name: value.reshape(len(points), -1) for name, value in named.items()}


def _saturates(energy: Energy, row: Tensor, k: int, limit: float) -> bool:
    places = row.new_tensor([-limit, 1.0 - limit, limit - 1.0, limit])
    return not all(
        bool((value[::2] != value[1::2]).any(1).all()) and bool(torch.isfinite(value).all())
        for name, value in _named(energy, _line(row, k, places)).items()
        if bool((value[1] != value[2]).any())
    )


def _lost_on_line(energy: Energy, row: Tensor, k: int, limit: float) -> LostMass | None:
    """Return the mass that is lost along one coordinate of a state."""
    places = row[k] + torch.arange(-limit, limit + 1.0).to(row)
    points = _line(row, k, places)
    named = _named(energy, points)
    at = len(places) // 2
    name = next((n for n, value in named.items() if bool((value[at - 1] != value[at]).any())), None)
    if name is None:
        return None
    image = named[name]
    finite = torch.isfinite(image).all(1)
    moves = (image[1:] != image[:-1]).any(1) & finite[1:] & finite[:-1]
    stops = (~moves).nonzero().flatten()
    low = int(stops[stops < at].max()) + 1 if bool((stops < at).any()) else 0
    high = int(stops[stops >= at].min()) if bool((stops >= at).any()) else len(places) - 1
    # Close to 1, numbers are few: the energy is extrapolated from a little further inside.
    low, high = low + INSIDE, high - INSIDE
    if high - low < 4 * INSIDE:
        return None
    ends = _tails_beyond(_values(energy, points[[low, low + 4, high - 4, high, at]]))
    if sum(mass for mass, _ in ends) < 1e-3 * MAX_LOST_MASS:
        return None  # relative to the density at the state
    values = _values(energy, points[low : high + 1])
    lowest = values.min()
    if not bool(torch.isfinite(lowest)):
        return None
    ends = _tails_beyond(torch.stack([*values[[0, 4, -5, -1]], lowest]))
    total = float((lowest - values).exp().sum()) + sum(mass for mass, _ in ends)
    # of which a part is inside
    lost = [(mass * math.exp(-INSIDE * slope), slope) for mass, slope in ends]
    return LostMass(name, sum(mass for mass, _ in lost) / total, max(lost)[1])


def _values(energy: Energy, points: Tensor) -> Tensor:
    """Evaluate energies in float64; NaN counts as infinite."""
    with torch.no_grad(), RowsFailAlone():
        rows = points.reshape(-1, *energy.event_shape)
        values = torch.cat([energy(part) for part in rows.split(ROWS)]).double()
    return torch.where(values.isnan(), math.inf, values)


def _tails_beyond(values: Tensor) -> list[tuple[float, float]]:
    """Extrapolate the mass beyond both ends of a line.

    Args:
        values: energies at the lower end, 4 units inside of it, 4 units inside of the upper end,
            at the upper end, and at a state that has density 1.

    Returns:
        mass and slope of the energy of each end; 0 where the energy does not increase outwards.
    """
    low, inner_low, inner_high, high, origin = values.tolist()
    tails = []
    for end, inner in ((low, inner_low), (high, inner_high)):
        slope = (end - inner) / 4.0
        density = math.exp(min(origin - end, 700.0))
        tails.append((density / slope, slope) if slope > 0.0 and density > 0.0 else (0.0, 0.0))
    return tails


def flat_part(energy: Energy, base: Tensor, direction: Tensor) -> Tensor:
    r"""Compute the component of a direction along which the energy has no curvature.

    .. math:: d - H^+ H d

    with the Hessian H by differences of gradients. Draws that drift along an invariance of the
    energy (all logits shifted alike) also move in the other directions.

    Args:
        energy: the energy.
        base: where the Hessian is computed, shape ``event``.
        direction: d, shape ``event``.

    Returns:
        the component, shape ``event``; 0 if the Hessian is not finite.

    Example:
        >>> from pyroebm.core import Unnormalized
        >>> energy = Unnormalized(lambda x: -((x[..., 0] - x[..., 1]) ** 2), event_shape=(2,))
        >>> flat_part(energy, torch.zeros(2), torch.tensor([3.0, 1.0])).round()
        tensor([2., 2.])
    """
    size = base.numel()
    step = torch.finfo(base.dtype).eps ** (1 / 3) * base.flatten().abs().clamp(min=1.0)
    points = base.flatten() + torch.cat([torch.diag(step), -torch.diag(step)])
    with RowsFailAlone():
        grads = unchecked_value_and_grad(energy, points.reshape(-1, *base.shape))[1]
    ahead, behind = grads.reshape(2, size, size)
    hessian = (ahead - behind) / (2.0 * step.unsqueeze(1))
    if not bool(torch.isfinite(hessian).all()):
        return torch.zeros_like(direction)
    flat = direction.flatten()
    inverse = torch.linalg.pinv(0.5 * (hessian + hessian.T), rtol=1e-3, hermitian=True)
    return (flat - inverse @ (hessian @ flat)).reshape(base.shape)


def _decades_fall(values: Tensor) -> bool:
    """Whether the mass of some decade is smaller than that of the one before.

    The mass is 0 where the energy is +inf or NaN. From the first -inf on, numbers exceed the range
    of their dtype; the result is then whether the mass of an interval of log t increases up to
    there.
    """
    weight = torch.where(values.isnan(), -math.inf, -values) + DISTANCES.log().to(values.device)
    masses: list[float] = []
    for first in range(0, 3 * POINTS, POINTS):
        part = weight[first : first + POINTS + 1]
        known = part[part != math.inf]
        if len(known) < len(part):
            if masses and len(known):
                rises = bool(known[-1] >= known.max() - SLACK)
                masses.append(masses[-1] if rises else -math.inf)
            break
        masses.append(float(torch.logsumexp(part, 0)))
    return len(masses) < 2 or any(
        after < before - SLACK or after == -math.inf for before, after in itertools.pairwise(masses)
    )


def _evaluate(energy: Energy, points: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate energies ``(*batch)``, and whether they and their gradients are finite."""
    event = energy.event_shape
    rows = points.reshape(-1, *event)
    with RowsFailAlone():
        if has_gradient(energy, rows):
            parts = [unchecked_value_and_grad(energy, part) for part in rows.split(ROWS)]
            value, grad = (torch.cat(part) for part in zip(*parts, strict=True))
            finite = torch.isfinite(value) & torch.isfinite(grad.reshape(len(rows), -1)).all(1)
        else:
            with torch.no_grad():
                value = torch.cat([energy(part) for part in rows.split(ROWS)])
            finite = torch.isfinite(value)
    batch = points.shape[: points.dim() - len(event)]
    return value.reshape(batch), finite.reshape(batch)
