"""Convergence of chains: masses of modes, and a diagnosis that names cause, chains and entries."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.arrays import tensor_of_numbers
from pyroebm.core.energy import Energy
from pyroebm.core.statistics import bfmi, embed_angles, ess_bulk, ess_tail, mcse_mean, r_hat
from pyroebm.diagnostics.energy_probes import Tail, find_edge, find_tail, flat_part, has_gradient
from pyroebm.diagnostics.stein import stein_residual
from pyroebm.diagnostics.stuck import describe_chains, describe_range, describe_stuck, stuck_chains

__all__ = ["mode_masses", "Diagnosis", "Finding", "diagnose"]


def mode_masses(modes: Tensor, num_modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the fraction of draws in each mode, with standard errors.

    The standard errors account for autocorrelation.

    Args:
        modes: index of the mode of each draw, integers of shape ``(chains, draws)``.
        num_modes: number of known modes; one without a draw has mass 0 and standard error NaN.

    Returns:
        masses and standard errors, both ``(num_modes,)``.

    Example:
        >>> mode_masses(torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]]), 3)[0]
        array([0.5, 0.5, 0. ])
    """
    inside = torch.nn.functional.one_hot(modes.long(), num_modes).double()
    masses = inside.mean((0, 1)).cpu().numpy()
    errors = mcse_mean(inside)
    errors[(masses == 0.0) | (masses == 1.0)] = np.nan
    return masses, errors


@dataclasses.dataclass(frozen=True)
class Finding:
    """One problem of a run.

    Args:
        kind: ``"stuck"``, ``"unbounded"``, ``"nonfinite"``, ``"constant"``, ``"disagreement"``,
            ``"unsettled"``, ``"r_hat"``, ``"ess"``, ``"divergences"``, ``"tree_depth"``,
            ``"acceptance"``, ``"bfmi"``, ``"stein"``, ``"one_chain"`` or ``"inexact"``.
        message: the observation, its place and a remedy.
        chains: numbers of the chains that it names.
        entries: entries of sites that it names, such as ``"theta[3]"``, the largest problem first.
    """

    kind: str
    message: str
    chains: tuple[int, ...] = ()
    entries: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message


#: Headings of a diagnosis, by kinds of findings; the first that applies is shown.
HEADINGS = {
    "Not mixed": {"stuck", "unbounded", "constant", "disagreement", "unsettled", "r_hat"},
    "Draws may be biased": {"nonfinite", "divergences", "bfmi", "stein", "inexact"},
    "Few effective draws": {"ess"},
    "One chain": {"one_chain"},
    "Mixed, but slowly": {"tree_depth", "acceptance"},
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    r"""Result of :func:`diagnose`: summary statistics and findings.

    ``bool(diagnosis)`` raises TypeError: whether the draws passed is ``diagnosis.mixed``.

    Args:
        r_hat: largest R-hat over all entries that are not constant; NaN if there is none, or if
            there are too few draws.
        ess_bulk: minimum bulk effective sample size, likewise.
        ess_tail: minimum tail effective sample size, likewise.
        min_bfmi: minimum BFMI over chains; NaN without a Hamiltonian.
        divergences: number of divergent draws.
        stein_z: largest :math:`|z|` of the Stein identities; NaN if the energy is not known or has
            no gradient.
        findings: the problems found.

    Example:
        >>> print(Diagnosis(1.001, 5000.0, 4000.0, 0.9, 0, 1.2))
        Mixed: R-hat 1.001, bulk ESS 5000, tail ESS 4000, no divergences.
    """

    r_hat: float
    ess_bulk: float
    ess_tail: float
    min_bfmi: float
    divergences: int
    stein_z: float
    findings: tuple[Finding, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether no problem was found."""
        return not self.findings

    def __bool__(self) -> bool:
        """Raise TypeError: whether draws have mixed is :attr:`mixed`."""
        raise TypeError(
            "a Diagnosis is neither true nor false: use diagnosis.mixed, or diagnosis.findings for"
            " the problems"
        )

    @property
    def heading(self) -> str:
        """The main problem in a few words; "Mixed" if none was found."""
        kinds = {finding.kind for finding in self.findings}
        return next((text for text, named in HEADINGS.items() if kinds & named), "Mixed")

    def _numbers(self) -> str:
        return (
            f"{self.heading}: R-hat {self.r_hat:.3f}, bulk ESS"
            f" {self.ess_bulk:.0f}, tail ESS {self.ess_tail:.0f},"
            f" {self.divergences or 'no'} divergence{'' if self.divergences == 1 else 's'}."
        )

    def __str__(self) -> str:
        return "\n".join([self._numbers(), *(f"- {finding}" for finding in self.findings)])

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(str(finding))}</li>" for finding in self.findings)
        return f"<p>{self._numbers()}</p>" + (f"<ul>{items}</ul>" if items else "")


#: Functions of the dictionary of sites ``(chains, draws, *shape)``, by name.
Observables = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]


class KernelProperties(Protocol):
    """Protocol of the properties of a kernel that a diagnosis uses."""

    @property
    def exact(self) -> bool:
        """Whether the kernel leaves the target invariant."""

    @property
    def has_momentum(self) -> bool:
        """Whether the kernel reports a Hamiltonian."""

    @property
    def discrete(self) -> bool:
        """Whether the kernel moves on discrete supports."""

    @property
    def target_acceptance(self) -> float | None:
        """Acceptance rate that warm-up aims at."""


def diagnose(
    draws: Tensor | np.ndarray,
    stats: Mapping[str, Tensor] | None = None,
    max_r_hat: float = 1.01,
    min_ess: float = 400.0,
    *,
    kernel: KernelProperties | None = None,
    energy: Energy | None = None,
    named: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    observables: Observables | None = None,
    angles: Sequence[str] = (),
    first_chain: int = 0,
    num_chains: int | None = None,
) -> Diagnosis:
    r"""Find problems of a run: the cause, the chains and the entries.

    R-hat, effective sample size, BFMI and divergences have the thresholds of Vehtari et al. (2021)
    and Stan. With the energy it also finds states near divergent draws at which the energy is not
    finite, coordinates along which the density cannot be normalized, and draws that are not
    consistent with the gradient (:func:`stein_residual`). A cause is reported without its symptoms:
    divergences of a chain that never moved are not reported separately.

    A mode that no chain has visited has no effect on the draws and cannot be found.

    Args:
        draws: shape ``(chains, draws, *event)``.
        stats: ``diverging`` and, if known, ``lp``, ``energy``, ``acceptance_rate``, ``step_size``
            and ``reached_max_treedepth``, each ``(chains, draws)``, as
            :meth:`pyroebm.MCMC.get_stats` returns them. None if they are not known; there are then
            no divergences.
        max_r_hat: largest :math:`\hat R` to accept.
        min_ess: minimum bulk and tail effective sample size to accept.
        kernel: the kernel that made the draws; None assumes an exact one with momenta.
        energy: the energy in the coordinates of ``draws``; None omits the checks that need it.
        named: function from states ``(*batch, *event)`` to the sites of the results; None is one
            site ``"x"``.
        observables: functions of the dictionary of sites, by name, which are diagnosed in place of
            the sites. For example, draws of an energy with a symmetry need not agree between
            chains, while every invariant observable must:
            ``{"magnetization": lambda sites: sites["x"].mean(-1).abs()}``.
        angles: names of the sites that are angles. Their sine and cosine are diagnosed in place of
            them, since an angle near pi jumps to -pi.
        first_chain: number of the first of these chains in the run, if a rank has some of its
            chains.
        num_chains: number of all chains of the run.

    Returns:
        the summary statistics and the findings.

    Raises:
        ValueError: if ``draws`` are no tensor or array of two or more dimensions.

    Example:
        >>> x = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
        >>> calm = {"diverging": torch.zeros(4, 500, dtype=torch.bool)}
        >>> print(diagnose(x, calm))
        Mixed: R-hat 1.001, bulk ESS 1927, tail ESS 1918, no divergences.
        >>> x[2, :, 1] += 5.0
        >>> finding = diagnose(x, calm).findings[0]
        >>> finding.kind, finding.chains, finding.entries
        ('disagreement', (2,), ('x[1]',))
    """
    if not isinstance(draws, Tensor | np.ndarray) or draws.ndim < 2:
        found = f"shape {tuple(draws.shape)}" if hasattr(draws, "shape") else type(draws).__name__
        raise ValueError(
            f"draws must be a tensor of shape (chains, draws, *event), got {found}; a run is"
            " diagnosed by mcmc.diagnose()"
        )
    if isinstance(draws, np.ndarray):
        draws = tensor_of_numbers(draws, "draws")
    if stats is None:
        stats = {"diverging": torch.zeros(draws.shape[:2], dtype=torch.bool)}
    sites = _diagnosed(named or (lambda x: {"x": x}), observables, angles)
    run = _Run(draws, stats, kernel, energy, sites, first_chain, num_chains or len(draws))
    return Diagnosis(*run.numbers(), run.findings(max_r_hat, min_ess))


def _diagnosed(
    named: Callable[[Tensor], Mapping[str, Tensor]],
    observables: Observables | None,
    angles: Sequence[str],
) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return the function from states to what is diagnosed, by name."""
    if observables is not None and not isinstance(observables, Mapping):
        raise ValueError(
            "observables must be a dictionary of functions by name, such as"
            f' {{"square": lambda sites: sites["x"] ** 2}}, got {type(observables).__name__}'
        )

    def diagnosed(x: Tensor) -> dict[str, Tensor]:
        sites = named(x)
        if observables is not None:
            found = dict[str, Tensor]()
            batch = next(iter(sites.values())).shape[:2]
            for name, function in observables.items():
                try:
                    found[name] = function(sites)
                except (KeyError, TypeError, AttributeError) as error:  # taken for a tensor
                    raise ValueError(
                        f"observables[{name!r}] must be a function of the dictionary of sites, with"
                        f" the keys {list(sites)}, such as lambda sites:"
                        f" sites[{next(iter(sites))!r}] ** 2, but raised {error!r}"
                    ) from error
                if found[name].shape[:2] != batch:
                    raise ValueError(
                        f"observables[{name!r}] must map sites of shape (chains, draws, ...) to"
                        f" values of shape (chains, draws, ...), here {tuple(batch)}, got shape"
                        f" {tuple(found[name].shape)}"
                    )
            return found
        return embed_angles(sites, angles)

    return diagnosed


#: R-hat above which single chains are considered as the cause.
OUTLIER_R_HAT = 1.05

#: Maximum number of entries or coordinates that are examined, the largest R-hat first.
MAX_EXAMINED = 32
#: Number of lines from divergent draws along which the energy is evaluated, and of draws from which
#: one of median energy is chosen.
NUM_LINES = 256
#: Maximum number of entries that a message lists.
MAX_LISTED = 3
#: Minimum fractions that are reported: of those lines, and of truncated trajectories.
MIN_LINE_SHARE, MIN_TRUNCATED_SHARE = 0.05, 0.01


class _Run:
    """Draws of a run, with one method for each problem that may be found.

    The arguments are those of :func:`diagnose`.
    """

    def __init__(
        self,
        draws: Tensor,
        stats: Mapping[str, Tensor],
        kernel: KernelProperties | None,
        energy: Energy | None,
        named: Callable[[Tensor], Mapping[str, Tensor]],
        first_chain: int,
        num_chains: int,
    ) -> None:
        self.draws, self.stats = draws, stats
        self.kernel, self.named = kernel, named
        self.first_chain, self.num_chains = first_chain, num_chains
        self.energy = None if kernel is not None and kernel.discrete else energy
        self.states = draws.reshape(*draws.shape[:2], -1)
        self.names, self.values = _entries(named(draws))
        moves = (self.states[:, 1:] != self.states[:, :-1]).any(2).sum(1)
        self.stuck = stuck_chains(moves, draws.shape[1] - 1)
        #: the chains that moved; the other checks are restricted to them
        self.free = [chain for chain in range(len(draws)) if chain not in self.stuck]
        self.all = _Mixing.of(self.values)
        self.moved = _Mixing.of(self.values[self.free]) if self.stuck and self.free else self.all
        has_momentum = (kernel is None or kernel.has_momentum) and "energy" in stats
        self.bfmi = bfmi(stats["energy"]) if has_momentum else np.full(len(draws), np.nan)
        self.stein_z = float("nan")
        if self.energy is not None and self.free:
            self.stein_z = stein_residual(self.energy, draws[self.free])

    def numbers(self) -> tuple[float, float, float, float, int, float]:
        """Return the summary statistics of a :class:`Diagnosis`."""
        return (
            _largest(self.all.r_hat),
            -_largest(-self.all.bulk),
            -_largest(-self.all.tail),
            -_largest(-self.bfmi),
            int(self.stats["diverging"].sum()),
            self.stein_z,
        )

    def findings(self, max_r_hat: float, min_ess: float) -> tuple[Finding, ...]:
        """Return the findings, causes first; symptoms of a cause that was found are omitted."""
        suspect = (
            self.stuck
            or not bool(torch.isfinite(self.states).all())
            or not (_largest(self.moved.r_hat) < max_r_hat and self.moved.min_ess() >= min_ess)
        )
        unbounded = self.unbounded() if suspect else None
        nonfinite = None if unbounded else self.nonfinite()
        found = [self.never_moved(), unbounded, nonfinite]
        if self.free and not unbounded:
            found += [
                self.alone(),
                self.constant(),
                self.mixing(max_r_hat) or self.small_ess(min_ess),
                None if nonfinite else self.divergences(),
                self.tree_depth(),
                self.acceptance(),
                self.small_bfmi(),
                self.stein(),
            ]
        return tuple(finding for finding in [*found, self.inexact()] if finding)

    def never_moved(self) -> Finding | None:
        """Check for chains that never moved."""
        if not self.stuck:
            return None
        energies = -self.stats["lp"][:, -1] if "lp" in self.stats else None
        message = describe_stuck(
            self.stuck, len(self.draws), energies, self.first_chain, self.num_chains
        )
        return Finding("stuck", message, self.numbered(self.stuck))

    def unbounded(self) -> Finding | None:
        """Check for coordinates along which the density cannot be normalized."""
        if self.energy is None:
            return None
        bad = ~torch.isfinite(self.states)
        rows = self.states[~bad.any(2)]
        entries, seen = [], ""
        if bool(bad.any()):
            chains = self.numbered(bad.any(2).any(1).nonzero().flatten().tolist())
            infinite = (~torch.isfinite(self.values)).any(1).any(0).nonzero().flatten()
            entries = [self.names[k] for k in infinite.tolist()]
            where = describe_chains(chains).lower()
            seen = f" Draws of {_listed(entries)} are not finite in {where}."
        if len(rows):
            for tail, coordinates in self.tails(rows):
                name, (near, far) = self.entry(tail.near, coordinates[0], tail.far)
                seen = seen or (
                    f" The energy changes from {tail.energies[0]:.4g} at {name} = {near:.4g}, the"
                    f" distance of the farthest draw, to {tail.energies[1]:.4g} at {name} ="
                    f" {far:.4g}."
                )
                entries += [self.entry(tail.near, k)[0] for k in coordinates]
        if not entries:
            return None
        entries = list(dict.fromkeys(entries))
        message = (
            f"The density cannot be normalized along {_listed(entries)}.{seen} Give the energy a"
            " support, or add a term (a prior) that increases there."
        )
        return Finding("unbounded", message, entries=tuple(entries))

    def tails(self, rows: Tensor) -> list[tuple[Tail, list[int]]]:
        """Find directions in which the density cannot be normalized, and their leading coordinates.

        The directions start at a draw of median energy. They are single coordinates; if there is
        none, the component without curvature of the direction to the farthest draw. ``rows`` are
        the finite draws, ``(n, dim)``.
        """
        energy: Any = self.energy
        event = energy.event_shape
        some = rows[torch.linspace(0, len(rows) - 1, NUM_LINES).long()]
        with torch.no_grad():
            values = energy(some.reshape(-1, *event))
        base = some[int(values.median(0).indices)]
        offsets = rows - base
        far = offsets.abs().amax(0)
        found = []
        for k in self.drifting():
            direction = torch.zeros_like(base)
            direction[k] = far[k] if far[k] > 0 else 1.0
            tail = find_tail(energy, base.reshape(event), direction.reshape(event))
            found += [(tail, [k])] if tail else []
        if (
            found
            or energy.angle_mask is not None
            or len(base) > NUM_LINES
            or not has_gradient(energy, some.reshape(-1, *event))
        ):
            return found
        farthest = offsets[int(offsets.double().norm(dim=1).argmax())]
        flat = flat_part(energy, base.reshape(event), farthest.reshape(event))
        tail = find_tail(energy, base.reshape(event), flat)
        if tail is None or not flat.norm() > 0.1 * farthest.norm():
            return []
        size = flat.flatten().abs()
        leading = size.argsort(descending=True)[: int((size > 0.1 * size.max()).sum())]
        return [(tail, leading.tolist())]

    def drifting(self) -> list[int]:
        """Return coordinates, ordered by how much their means differ between halves of chains."""
        half = self.states.shape[1] // 2
        parts = self.states[:, : 2 * half].double().reshape(2 * len(self.states), half, -1)
        within = parts.std(1, correction=0).mean(0)
        ratio = parts.mean(1).std(0, correction=0) / within
        order = ratio.nan_to_num(nan=torch.inf).argsort(descending=True)
        found: list[int] = order[:MAX_EXAMINED].tolist()
        periodic = None if self.energy is None else self.energy.angle_mask
        return found if periodic is None else [k for k in found if not bool(periodic[k])]

    def nonfinite(self) -> Finding | None:
        """Check for non-finite energies near divergent draws."""
        places = self.states[self.stats["diverging"].bool()]
        if self.energy is None or not len(places):
            return None
        places = places[torch.linspace(0, len(places) - 1, NUM_LINES).long()]
        edge = find_edge(
            self.energy,
            places.reshape(-1, *self.energy.event_shape),
            self.scale().reshape(self.energy.event_shape),
        )
        if edge is None or edge.share < MIN_LINE_SHARE:
            return None
        what = "The energy" if not np.isfinite(edge.energy) else "The gradient of the energy"
        value = edge.energy if not np.isfinite(edge.energy) else "not finite"
        where, entries = "", tuple[str, ...]()
        if edge.coordinate is not None:
            name, (at,) = self.entry(edge.state, edge.coordinate)
            where, entries = f" at {name} = {at:.4g}", (name,)
        message = (
            f"{what} is {value}{where}, and on {100 * edge.share:.0f} % of the lines tried from"
            f" {int(self.stats['diverging'].sum())} divergent draws. Give the energy the support on"
            " which it is finite (support=), or correct its values there."
        )
        return Finding("nonfinite", message, entries=entries)

    def alone(self) -> Finding | None:
        """Check for a single chain."""
        if self.num_chains > 1:
            return None
        return Finding("one_chain", "One chain cannot show that it mixed. Run at least 4 chains.")

    def constant(self) -> Finding | None:
        """Check for coordinates that never moved in chains that did."""
        moved = self.states[self.free]
        still = (moved.amax(1) == moved.amin(1)).all(0).nonzero().flatten().tolist()
        if not still:
            return None
        entries = tuple(dict.fromkeys(self.entry(moved[0, -1], k)[0] for k in still[:MAX_EXAMINED]))
        message = (
            f"{_listed(entries, len(still))} never moved in any chain, so that R-hat is not"
            " defined. Draw more, or use float64 if the scale is small compared with the value."
        )
        return Finding("constant", message, entries=entries)

    def mixing(self, max_r_hat: float) -> Finding | None:
        """Explain a large R-hat: outlying chains, unsettled entries, or disagreeing chains."""
        if self.draws.shape[1] < 4:
            return Finding("r_hat", "R-hat is not defined for fewer than 4 draws. Draw more.")
        found = self.moved.r_hat
        order = np.argsort(-np.nan_to_num(found, nan=-np.inf, posinf=np.inf))
        failing = [int(k) for k in order if found[k] >= max_r_hat]
        if not failing:
            return None
        return self.outliers(failing[:MAX_EXAMINED], max_r_hat) or self.unsettled(
            failing, max_r_hat
        )

    def outliers(self, failing: list[int], max_r_hat: float) -> Finding | None:
        """Find a few chains without which R-hat is below its threshold."""
        moved, worst = self.values[self.free].double(), failing[0]
        # If R-hat is only slightly too large, leaving out any chain may lower it enough.
        if len(moved) < 3 or self.moved.r_hat[worst] < OUTLIER_R_HAT:
            return None
        mean, sd = moved[..., worst].mean(1), moved[..., worst].std(1)
        center, spread = mean.median(), sd.median()
        off = ((mean - center) / spread).abs() + (sd / spread).log().abs()
        out = ~(off <= 5.0 * off.median())
        if not 0 < int(out.sum()) <= max(1, len(moved) // 8):
            return None
        before, after = self.moved.r_hat[worst], _largest(r_hat(moved[~out][..., failing]))
        if not after < max(max_r_hat, 1.0 + 0.1 * (before - 1.0)):
            return None
        free, name = torch.tensor(self.free), self.names[worst]
        chains = self.numbered(free[out.cpu()].tolist())
        energies = ""
        if "lp" in self.stats:
            energy = -self.stats["lp"][self.free].double().mean(1)
            energies = (
                f"; mean energy {describe_range(energy[out])}, median of the others"
                f" {float(energy[~out].median()):.3g}"
            )
        disagree = "disagrees" if len(chains) == 1 else "disagree"
        message = (
            f"{describe_chains(chains, self.num_chains)} {disagree} with the others in {name}: mean"
            f" {describe_range(mean[out])}, theirs {float(mean[~out].mean()):.3g} (sd"
            f" {float(spread):.2g}){energies}; R-hat is {before:.2f}, and {after:.3f} without."
            " It may be in a separate mode (use tempering), or not have converged (start"
            " elsewhere, or warm up longer)."
        )
        return Finding("disagreement", message, chains, (name,))

    def unsettled(self, failing: list[int], max_r_hat: float) -> Finding:
        """Find entries that differ between the halves of chains, or else between chains."""
        few, half = failing[:8], self.values.shape[1] // 2
        some = self.free[:: -(-len(self.free) // 16)]
        halves = np.median(
            [r_hat(self.values[c, : 2 * half, few].reshape(2, half, -1)) for c in some], axis=0
        )
        moving = [
            (self.names[k], h)
            for k, h in zip(few, halves, strict=True)
            if h >= max(1.05, 0.5 * (1.0 + self.moved.r_hat[k]))
        ]
        share = f" in {len(failing)} of {len(self.names)} entries" if len(self.names) > 1 else ""
        if moving:
            entries = tuple(name for name, _ in moving)
            have = "has" if len(entries) == 1 else "have"
            message = (
                f"{_listed(entries)} {have} not settled: the two halves of a chain differ (R-hat"
                f" {moving[0][1]:.2f}, median of the chains). R-hat should be below {max_r_hat}"
                f" and is not{share}. Draw more, warm up longer, or reparametrize."
            )
            return Finding("unsettled", message, entries=entries)
        entries = tuple(self.names[k] for k in few)
        message = (
            f"R-hat should be below {max_r_hat}: the chains disagree in {_listed(entries)} (R-hat"
            f" {self.moved.r_hat[failing[0]]:.3f}){share and f'; it is not{share}'}. Draw more, or"
            " use tempering."
        )
        return Finding("r_hat", message, entries=entries)

    def small_ess(self, min_ess: float) -> Finding | None:
        """Check the minimum effective sample size."""
        if not self.moved.min_ess() < min_ess:
            return None
        least = np.fmin(self.moved.bulk, self.moved.tail)
        worst = int(np.nanargmin(least))
        message = (
            f"The effective sample size should be at least {min_ess:.0f}: it is"
            f" {self.moved.bulk[worst]:.0f} (bulk) and {self.moved.tail[worst]:.0f} (tail) for"
            f" {self.names[worst]}. Draw more."
        )
        return Finding("ess", message, entries=(self.names[worst],))

    def divergences(self) -> Finding | None:
        """Check for divergent draws, and whether one chain has most of them."""
        counts = self.stats["diverging"][self.free].sum(1)
        total, worst = int(counts.sum()), int(counts.argmax())
        if not total:
            return None
        chains: tuple[int, ...] = ()
        most = ""
        if len(counts) > 1 and 2 * int(counts[worst]) > total:
            chains = self.numbered([self.free[worst]])
            share = "" if int(counts[worst]) == total else f"{int(counts[worst])} of them "
            most = f" ({share}in {describe_chains(chains).lower()})"
        message = (
            f"{total} of {len(self.free) * self.draws.shape[1]} draws diverged{most}."
            " Raise the acceptance rate (adaptation=WindowAdaptation(target_acceptance=0.95), or"
            " target_accept_prob in pyroebm.infer), lower a fixed step size, or reparametrize."
        )
        return Finding("divergences", message, chains)

    def tree_depth(self) -> Finding | None:
        """Check for trajectories of NUTS that reached the maximum tree depth."""
        if "reached_max_treedepth" not in self.stats:
            return None
        shares = self.stats["reached_max_treedepth"][self.free].double().mean(1)
        if float(shares.mean()) < MIN_TRUNCATED_SHARE:
            return None
        worst = int(shares.argmax())
        chains = self.numbered([self.free[worst]])
        most, chain = float(shares[worst]), describe_chains(chains).lower()
        message = (
            f"{100 * float(shares.mean()):.0f} % of the trajectories reached the maximum tree depth"
            f" ({100 * most:.0f} % in {chain}). Warm up longer, so that the metric fits the scales,"
            " reparametrize, or raise max_tree_depth."
        )
        return Finding("tree_depth", message, chains)

    def acceptance(self) -> Finding | None:
        """Check for chains with a small acceptance rate."""
        if "acceptance_rate" not in self.stats:
            return None
        target = None if self.kernel is None else self.kernel.target_acceptance
        least = 0.2 if target is None else min(0.2, 0.5 * target)
        rates = self.stats["acceptance_rate"][self.free].double().mean(1)
        low = ~(rates >= least)
        if not bool(low.any()):
            return None
        chains = self.numbered([c for c, bad in zip(self.free, low.tolist(), strict=True) if bad])
        of, others = "", ""
        if not bool(low.all()):
            of = f" of {describe_chains(chains, self.num_chains).lower()}"
            others = f", of the others {float(rates[~low].mean()):.2g}"
        advice = (
            "The step size is too large: warm up longer, or lower a fixed step size."
            if "step_size" in self.stats
            else "The kernel has no step size to lower: use another kernel, or tempering."
        )
        message = f"The mean acceptance rate{of} is {describe_range(rates[low])}{others}. {advice}"
        return Finding("acceptance", message, chains)

    def small_bfmi(self) -> Finding | None:
        """Check the minimum BFMI."""
        found = self.bfmi[self.free]
        if not (found < 0.3).any():
            return None
        worst = int(np.nanargmin(found))
        chains = self.numbered([self.free[worst]])
        message = (
            f"BFMI is {found[worst]:.2f} in {describe_chains(chains).lower()} and below 0.3 in"
            f" {int((found < 0.3).sum())} of {len(found)} chains: momenta explore the energies"
            " slowly. Reparametrize heavy tails."
        )
        return Finding("bfmi", message, chains)

    def stein(self) -> Finding | None:
        """Check the Stein residual."""
        if not self.stein_z > 5.0:
            return None
        message = (
            f"The Stein residual is {self.stein_z:.1f} standard errors: the draws do not fit the"
            " gradient of the energy (a bias of the kernel, chains that have not converged, or a"
            " discontinuous energy). Lower the step size, use an exact kernel, or warm up longer."
        )
        return Finding("stein", message)

    def inexact(self) -> Finding | None:
        """Check for a kernel that is not exact."""
        if self.kernel is None or self.kernel.exact:
            return None
        message = (
            "The kernel is not exact: its bias grows with its step size, and agreement between"
            " chains does not exclude it."
        )
        return Finding("inexact", message)

    def numbered(self, chains: Sequence[int]) -> tuple[int, ...]:
        """Convert indices of chains here to their numbers in the run."""
        return tuple(self.first_chain + chain for chain in chains)

    def scale(self) -> Tensor:
        """Return standard deviations of the coordinates over the chains that moved, ``(dim,)``.

        They are 1 where they are 0 or not finite.
        """
        rows = self.states[self.free or slice(None)].flatten(0, 1)
        found = rows.double().std(0).to(rows.dtype)
        return torch.where(torch.isfinite(found) & (found > 0), found, 1.0)

    def entry(self, state: Tensor, coordinate: int, *more: Tensor) -> tuple[str, list[float]]:
        """Find the entry of the results that a flat coordinate changes, by changing it.

        Returns:
            its name, and its values at ``state`` and at ``more`` states.
        """
        flat = torch.stack([state.flatten(), *(other.flatten() for other in more)])
        moved = flat[:1].clone()
        moved[0, coordinate] += self.scale()[coordinate]
        rows = torch.cat([moved, flat]).reshape(1, -1, *self.draws.shape[2:])
        _, values = _entries(self.named(rows))
        changed = (values[0, 0] != values[0, 1]).nonzero().flatten()
        if not len(changed):
            return f"unconstrained coordinate {coordinate}", flat[:, coordinate].tolist()
        return self.names[int(changed[0])], values[0, 1:, int(changed[0])].tolist()


class _Mixing(NamedTuple):
    """ArviZ's statistics of each entry, ``(entries,)``."""

    r_hat: np.ndarray
    bulk: np.ndarray
    tail: np.ndarray

    @classmethod
    def of(cls, values: Tensor) -> _Mixing:
        return cls(r_hat(values), ess_bulk(values), ess_tail(values))

    def min_ess(self) -> float:
        return -_largest(-np.concatenate([self.bulk, self.tail]))


def _largest(values: np.ndarray) -> float:
    """Return the largest value that is not NaN; NaN if there is none.

    Constant entries have no statistic and must not mask the others.
    """
    defined = values[~np.isnan(values)]
    return float(defined.max()) if len(defined) else float("nan")


def _entries(sites: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Return the names of all entries, as in ArviZ, and draws ``(chains, draws, entries)``."""
    names = [
        site + (f"[{', '.join(map(str, index))}]" if index else "")
        for site, draws in sites.items()
        for index in np.ndindex(*draws.shape[2:])
    ]
    return names, torch.cat([d.reshape(*d.shape[:2], -1) for d in sites.values()], 2)


def _listed(names: Sequence[str], count: int | None = None) -> str:
    more = (count or len(names)) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
