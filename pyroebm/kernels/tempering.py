"""Parallel tempering around any kernel: non-reversible swaps, adaptive temperature ladder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from pyroebm.core.annealing_path import GeometricPath
from pyroebm.core.energy import Energy, unchecked_value_and_grad
from pyroebm.core.supports import is_discrete
from pyroebm.core.wrappers import unconstrain
from pyroebm.kernels.adaptation.step_size import DualAveraging
from pyroebm.kernels.adaptation.windows import windows
from pyroebm.kernels.base import HasGradient, Info, Kernel, WrappedKernel, uniform_like

__all__ = [
    "ParallelTempering",
    "TemperedState",
    "TemperingReport",
    "LadderAdaptation",
    "LadderAdaptationState",
    "respaced",
]

T = TypeVar("T")


class TemperedState(NamedTuple):
    """Replicas of every chain and the swap statistics since the warm-up.

    R is the number of temperatures, coldest first.
    """

    x: Tensor  #: positions of the cold replica, shape ``(chains, *event)``
    energy: Tensor  #: :math:`U(x)` at these positions, shape ``(chains,)``
    #: state of the inner kernel, each field ``(chains, R, ...)``; its energies are those of the
    #: path
    inner: Any
    replica: Tensor  #: which replica is at each temperature, shape ``(chains, R)``
    #: whether the replica was last at the cold end (1), since then at the hot end (2), or at
    #: neither yet (0), shape ``(chains, R)``
    heading: Tensor
    round_trips: Tensor  #: completed round trips cold to hot to cold, shape ``(chains,)``
    #: number of steps; pairs (0, 1), (2, 3), ... swap if it is even, the others if it is odd,
    #: shape ``(chains,)``
    steps: Tensor
    #: sums over steps of the swap probability of each neighboring pair, float64, shape
    #: ``(chains, R - 1)``
    swaps: Tensor
    #: sums over steps of :math:`U - V` at each temperature, float64, shape ``(chains, R)``
    slopes: Tensor


class TemperingReport(NamedTuple):
    r"""Swap statistics of all chains, from :meth:`ParallelTempering.report`.

    With efficient swaps a round trip takes at least :math:`2 + 2 \Lambda` steps of a chain, for any
    number of temperatures (Syed et al., 2022). A temperature ladder of about :math:`2 \Lambda + 1`
    rungs comes close to this; more rungs cost more than they gain.
    """

    betas: Tensor  #: inverse temperatures of the ladder, shape ``(R,)``
    swap_rates: Tensor  #: mean swap probability of neighbors, shape ``(R - 1,)``
    barrier: float  #: global communication barrier :math:`\Lambda`, the sum of rejection rates
    round_trips: Tensor  #: number of round trips of each chain, shape ``(chains,)``
    #: round trips per step of a chain, to compare with :math:`1 / (2 + 2 \Lambda)`
    round_trip_rate: float
    #: mean :math:`U - V` at each temperature, the integrand of thermodynamic integration, shape
    #: ``(chains, R)``
    mean_slopes: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelTempering(WrappedKernel[TemperedState]):
    r"""Parallel tempering: replicas at several inverse temperatures that swap their states.

    With :math:`1 = \beta_0 > \dots > \beta_{R-1}`

    .. math:: p_k(x) \propto e^{-(1 - \beta_k) V(x) - \beta_k U(x)}, \qquad
        \alpha(k, l) = \min\bigl(1, e^{(\beta_k - \beta_l) ((U - V)(x_k) - (U - V)(x_l))}\bigr)

    Each step moves every replica of all chains with the inner kernel and then swaps neighbors: even
    pairs in even steps, odd pairs in odd steps. This order is not reversible and gives shorter
    round trips (Geyer, 1991; Okabe et al., 2001; Syed, Bouchard-Côté, Deligiannidis and Doucet,
    "Non-reversible parallel tempering", 2022). Without a reference, V = 0. With one, the hottest
    replica is drawn from it in every step. The draws are those of the replica at :math:`\beta = 1`.
    ``Info`` reports on this replica, except that ``diverging`` and ``n_steps`` include all
    replicas.

    Warm-up is :class:`pyroebm.kernels.LadderAdaptation`: a step size for each temperature, and
    temperatures of equal swap rates.

    Args:
        kernel: the inner kernel, of any kind; its ``step_size`` may be one number, or one for each
            temperature, shape ``(R,)``.
        betas: :math:`\beta_k`, decreasing from 1: to a small positive number, or to 0 with a
            reference.
        reference: V, an energy with exact draws, on the space of the energy that is sampled. Its
            support must contain that of the energy, because no replica enters regions where V is
            infinite.

    Raises:
        ValueError: if ``betas`` does not decrease from 1 as above, or if the reference has no exact
            draws.

    Example:
        >>> from pyroebm import HMC, MCMC
        >>> from pyroebm.targets import GaussianMixture
        >>> energy = GaussianMixture([[-5.0], [5.0]], weights=[0.8, 0.2])
        >>> kernel = ParallelTempering(HMC(num_steps=5), betas=[1.0, 0.5, 0.2, 0.1, 0.03])
        >>> mcmc = MCMC(kernel, num_samples=200, warmup_steps=200, num_chains=64, seed=0)
        >>> mcmc.run(energy)
        >>> round(float((mcmc.get_samples()["x"] < 0).double().mean()), 1)
        0.8
        >>> report = mcmc.kernel.report(mcmc.state)
        >>> bool((report.swap_rates > 0.3).all()), int(report.round_trips.sum()) > 64
        (True, True)
    """

    betas: Tensor
    reference: Energy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        object.__setattr__(self, "betas", betas)
        if (
            betas.dim() != 1
            or len(betas) < 2
            or not bool((betas[:-1] > betas[1:]).all())
            or betas[0] != 1.0
        ):
            raise ValueError(
                f"betas must decrease from 1, with at least two of them, got betas={betas.tolist()}"
            )
        if not (betas[-1] > 0.0 if self.reference is None else betas[-1] == 0.0):
            rule = (
                "end above 0 without a reference"
                if self.reference is None
                else "end at 0, the reference"
            )
            raise ValueError(f"betas must {rule}, got betas={betas.tolist()}")
        if self.reference is not None and not self.reference.has_exact_draws:
            raise ValueError(
                f"reference must have exact draws, but {type(self.reference).__name__} has none;"
                " use an energy with sample(), such as a Gaussian of pyroebm.targets"
            )

    @property
    def has_momentum(self) -> bool:
        """False: after the swaps the report contains the energy."""
        return False

    @property
    def target_acceptance(self) -> float | None:
        """None: :class:`LadderAdaptation` uses the target of the inner kernel."""
        return None

    @property
    def expected_gradients(self) -> float:
        """Expected gradient evaluations of all replicas, and one for each after the swaps."""
        return len(self.betas) * (self.kernel.expected_gradients + 1.0)

    @property
    def compiles(self) -> Literal["nothing"]:
        """``"nothing"``: the energy of the replicas is a geometric path, which is not compiled."""
        return "nothing"

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the settings that warm-up may change: the inner kernel's and ``betas``."""
        return (
            *(name for name in ("step_size", "inverse_mass") if name in self.kernel.learned),
            "betas",
        )

    def own_adaptation(self) -> LadderAdaptation:
        """Return a :class:`LadderAdaptation`."""
        return LadderAdaptation()

    def path(self, energy: Energy, num_chains: int) -> GeometricPath:
        """Return the energy of ``num_chains * R`` replicas, those of one chain adjacent."""
        reference = None if self.reference is None else unconstrain(self.reference)
        return GeometricPath(energy, self.betas.repeat(num_chains), reference)

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> TemperedState:
        # Check x first, so that an error names the caller's chains and not replicas.
        """Return the state at ``x``, with all replicas of a chain at the same position."""
        self.kernel.init(energy, x, generator)
        chains, rungs = len(x), len(self.betas)
        inner = self.kernel.init(
            self.path(energy, chains), x.repeat_interleave(rungs, 0), generator
        )
        replica = torch.arange(rungs, device=x.device).repeat(chains, 1)
        count = replica.new_zeros(chains)
        state = TemperedState(
            x=x.detach(),
            energy=inner.energy,
            inner=by_chain(inner, chains),
            replica=replica,
            heading=(replica == 0).long(),
            round_trips=count,
            steps=count,
            swaps=torch.zeros(chains, rungs - 1, dtype=torch.float64, device=x.device),
            slopes=torch.zeros(chains, rungs, dtype=torch.float64, device=x.device),
        )
        return state._replace(energy=state.inner.energy[:, 0])

    def step(
        self, energy: Energy, state: TemperedState, generator: torch.Generator | None = None
    ) -> tuple[TemperedState, Info]:
        """Move all replicas with the inner kernel and swap neighbors."""
        state, info, _ = self.transition(energy, state, generator)
        return state, info

    def transition(
        self, energy: Energy, state: TemperedState, generator: torch.Generator | None = None
    ) -> tuple[TemperedState, Info, Info]:
        """Run :meth:`step`; also return the inner kernel's report.

        Its fields have shape ``(chains, R)`` and are from before the swaps.
        """
        chains, rungs = state.replica.shape
        path = self.path(energy, chains)
        moved, replica_info = self._kernel_of_replicas(chains).step(
            path, flattened(state.inner), generator
        )
        inner, inner_info = by_chain(moved, chains), by_chain(replica_info, chains)
        if path.reference is None:
            slope = inner.energy / path.betas.reshape(chains, rungs)
        else:
            inner = inner._replace(x=_with_fresh_reference(path, path.reference, inner, generator))
            slope = path.slope(flattened(inner).x).reshape(chains, rungs)

        probability = swap_probability(path.betas.reshape(chains, rungs), slope)
        active = torch.arange(rungs - 1, device=slope.device) % 2 == state.steps.unsqueeze(1) % 2
        swapped = active & (uniform_like(probability, generator) < probability)
        order = swapped_order(swapped)
        # Positions are swapped. Energies and gradients are those of the previous temperature and
        # are recomputed.
        inner = by_chain(self.kernel.refresh(path, flattened(reordered(inner, order))), chains)
        heading, returned = headings(state.heading.gather(1, order))
        new = TemperedState(
            x=inner.x[:, 0],
            energy=inner.energy[:, 0],
            inner=inner,
            replica=state.replica.gather(1, order),
            heading=heading,
            round_trips=state.round_trips + returned,
            steps=state.steps + 1,
            swaps=state.swaps + probability,
            slopes=state.slopes + slope,
        )
        # A replica drawn from the reference cannot diverge.
        by_kernel = slice(None) if path.reference is None else slice(-1)
        info: Info = _each(inner_info, lambda field: field[:, 0])._replace(
            accepted=inner_info.accepted[:, 0] | swapped[:, 0],
            diverging=inner_info.diverging[:, by_kernel].any(1),
            energy=new.energy,
            # The refresh after the swap costs one gradient per replica.
            n_steps=inner_info.n_steps.sum(1) + rungs,
        )
        return new, info, inner_info

    def refresh(self, energy: Energy, state: TemperedState) -> TemperedState:
        """Recompute energies of all replicas after the energy was trained."""
        chains = len(state.x)
        inner = by_chain(
            self.kernel.refresh(self.path(energy, chains), flattened(state.inner)), chains
        )
        return state._replace(energy=inner.energy[:, 0], inner=inner)

    def restart(self, state: TemperedState) -> TemperedState:
        """Return the state with all swap statistics set to 0."""
        names = ("round_trips", "steps", "swaps", "slopes")
        return state._replace(**{name: torch.zeros_like(getattr(state, name)) for name in names})

    def report(self, state: TemperedState) -> TemperingReport:
        """Summarize swap rates, round trips and mean energies of the steps since the warm-up.

        Raises:
            ValueError: if the state has not taken a step.
        """
        steps = state.steps.sum()
        if int(steps) == 0:
            raise ValueError(
                "state must have taken at least one step since the warm-up, got one with 0 steps;"
                " draw samples first"
            )
        rates = state.swaps.sum(0) / steps
        return TemperingReport(
            betas=self.betas,
            swap_rates=rates,
            barrier=float((1.0 - rates).sum()),
            round_trips=state.round_trips,
            round_trip_rate=float(state.round_trips.sum() / steps),
            mean_slopes=state.slopes / state.steps.unsqueeze(1),
        )

    def _kernel_of_replicas(self, chains: int) -> Kernel[Any]:
        size = self.kernel.step_size
        if isinstance(size, Tensor) and size.dim() == 1:
            return self.kernel.replace(step_size=size.repeat(chains))
        return self.kernel


def swap_probability(betas: Tensor, slope: Tensor) -> Tensor:
    r"""Compute the swap probabilities of neighboring temperatures.

    :math:`\min(1, e^{(\beta_k - \beta_l)(s_k - s_l)})` with l = k + 1, from ``(chains, R)`` to
    ``(chains, R - 1)``.
    """
    return torch.exp(betas.diff(dim=1) * slope.diff(dim=1)).clamp(max=1.0)


def swapped_order(swapped: Tensor) -> Tensor:
    """Return from which index each temperature takes its replica, ``(chains, R)``.

    ``swapped`` marks the pairs that swap, ``(chains, R - 1)``; they do not overlap.
    """
    up = torch.nn.functional.pad(swapped.long(), (0, 1))
    return torch.arange(up.shape[1], device=up.device) + up - up.roll(1, 1)


def headings(heading: Tensor) -> tuple[Tensor, Tensor]:
    """Update the headings of replicas after swaps.

    Returns:
        the headings, and whether the replica at the cold end completed a round trip.
    """
    returned = heading[:, 0] == 2
    heading = heading.clone()
    heading[:, 0] = 1
    heading[:, -1] = torch.where(heading[:, -1] == 1, 2, heading[:, -1])
    return heading, returned


def reordered(state: T, order: Tensor) -> T:
    """Reorder the replicas ``(chains, R, ...)`` in every field by ``order`` ``(chains, R)``."""
    chain = torch.arange(len(order), device=order.device).unsqueeze(1)
    return _each(state, lambda field: field[chain, order])


def by_chain(state: T, chains: int) -> T:
    """Reshape ``(chains * R, ...)`` to ``(chains, R, ...)`` in every field."""
    return _each(state, lambda field: field.reshape(chains, -1, *field.shape[1:]))


def flattened(state: T) -> T:
    """Reshape ``(chains, R, ...)`` to ``(chains * R, ...)`` in every field."""
    return _each(state, lambda field: field.flatten(0, 1))


def _each(state: T, f: Callable[[Tensor], Tensor]) -> T:
    named_tuple: Any = state
    fields = (
        _each(v, f) if isinstance(v, tuple) else v if v is None else f(v) for v in named_tuple
    )
    return cast(T, type(named_tuple)._make(fields))


def _with_fresh_reference(
    path: GeometricPath, reference: Energy, inner: Any, generator: torch.Generator | None
) -> Tensor:
    """Replace the positions of the last replica by draws from the reference.

    A draw is rejected if its energy is not finite, or its gradient if the kernel uses it.

    Returns:
        positions ``(chains, R, *event)``.
    """
    draws = reference.sample(len(inner.x), generator)
    if isinstance(inner, HasGradient) and not is_discrete(path.support):
        values, grad = unchecked_value_and_grad(path.energy, draws)
        finite = torch.isfinite(values) & torch.isfinite(grad.reshape(len(draws), -1)).all(1)
    else:
        with torch.no_grad():
            finite = torch.isfinite(path.energy(draws))
    inside = finite.reshape(-1, *[1] * (draws.dim() - 1))
    return torch.cat([inner.x[:, :-1], torch.where(inside, draws, inner.x[:, -1]).unsqueeze(1)], 1)


class LadderAdaptationState(NamedTuple):
    """State of :class:`LadderAdaptation` between two steps."""

    #: one for each temperature; empty if the inner kernel has no step size to adapt
    tunings: tuple[DualAveraging, ...]
    step: int


@dataclasses.dataclass(frozen=True)
class LadderAdaptation:
    r"""Adaptation of step sizes and temperatures of :class:`pyroebm.kernels.ParallelTempering`.

    In rounds of doubling length, the mean rejection rates of neighbors, over all chains, are summed
    to the communication barrier

    .. math:: \Lambda(\beta_k) = \sum_{j \le k} r_j, \qquad r_j = 1 - \bar\alpha(j - 1, j)

    which depends little on the ladder with which it is estimated. The new temperature ladder
    divides it evenly, so that all rejection rates are equal (Syed, Bouchard-Côté, Deligiannidis and
    Doucet, 2022, algorithm 4). Within the rounds, the step size at each temperature follows the
    acceptance rate at that temperature by dual averaging. The metric is not adapted. The swap
    statistics are set to 0 at the end, so that a later report covers the draws that were kept.

    Args:
        target_acceptance: acceptance rate to aim at; None uses the inner kernel's own.

    Raises:
        ValueError: if ``target_acceptance`` is outside (0, 1).

    Example:
        >>> from pyroebm.kernels import MALA, ParallelTempering
        >>> from pyroebm.kernels.adaptation import warmup
        >>> from pyroebm.targets import DoubleWell
        >>> energy, generator = DoubleWell(), torch.Generator().manual_seed(0)
        >>> kernel, plan = ParallelTempering(MALA(), betas=[1.0, 0.9, 0.1]), LadderAdaptation()
        >>> state = kernel.init(energy, energy.initial(64, generator), generator)
        >>> kernel, state = warmup(kernel, energy, state, 200, plan, generator=generator)
        >>> 0.3 < kernel.betas[1] < 0.7, kernel.step_size.shape
        (tensor(True), torch.Size([3]))
    """

    target_acceptance: float | None = None

    def __post_init__(self) -> None:
        if self.target_acceptance is not None and not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(
                "target_acceptance must be in (0, 1), got"
                f" target_acceptance={self.target_acceptance}"
            )

    def start(
        self,
        kernel: Any,
        energy: Energy,
        state: TemperedState,
        generator: torch.Generator | None = None,
    ) -> tuple[ParallelTempering, LadderAdaptationState]:
        """Return a kernel with initial step sizes, and the initial adaptation state."""
        if not isinstance(kernel, ParallelTempering):
            raise ValueError(
                "kernel must be ParallelTempering(), whose ladder LadderAdaptation adapts, got"
                f" {type(kernel).__name__}; use WindowAdaptation()"
            )
        if kernel.kernel.target_acceptance is None:
            return kernel, LadderAdaptationState((), 0)
        sizes = find_step_sizes(kernel, energy, state, generator)
        return kernel.replace(step_size=sizes), LadderAdaptationState(_tunings(sizes), 0)

    def step(
        self,
        kernel: ParallelTempering,
        energy: Energy,
        state: TemperedState,
        adaptation_state: LadderAdaptationState,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[ParallelTempering, TemperedState, Info, LadderAdaptationState]:
        """Run one step of a warm-up of ``num_steps`` and update the adaptation."""
        rounds = windows(num_steps)
        if any(adaptation_state.step == begin for begin, _ in rounds):
            state = kernel.restart(state)
        state, info, inner = kernel.transition(energy, state, generator)
        tunings, last = adaptation_state.tunings, adaptation_state.step + 1 == num_steps
        if tunings:
            target = (
                kernel.kernel.target_acceptance
                if self.target_acceptance is None
                else self.target_acceptance
            )
            rates = inner.acceptance_rate.double().mean(0).tolist()
            tunings = tuple(
                t.update(rate, float(target or 0.0)) for t, rate in zip(tunings, rates, strict=True)
            )
            kernel = kernel.replace(step_size=_sizes(t.step_size for t in tunings))
        if any(adaptation_state.step + 1 == end for _, end in rounds):
            betas, place = respaced(kernel.betas, 1.0 - kernel.report(state).swap_rates)
            if tunings:
                sizes = torch.as_tensor(
                    np.exp(
                        np.interp(
                            place, np.arange(len(place)), [float(t.log_average) for t in tunings]
                        )
                    )
                )
                kernel, tunings = kernel.replace(step_size=sizes), _tunings(sizes)
            kernel = kernel.replace(betas=betas)
            state = kernel.refresh(energy, state)
        if last:
            if tunings:
                # Dual averaging overshoots at first: after a few steps a new search is more
                # reliable than the average.
                few = tunings[0].steps < 15
                found = 0.5 * find_step_sizes(kernel, energy, state, generator) if few else None
                kernel = kernel.replace(
                    step_size=_sizes(t.average for t in tunings) if found is None else found
                )
            state = kernel.restart(state)
        return kernel, state, info, LadderAdaptationState(tunings, adaptation_state.step + 1)


def respaced(betas: Tensor, rejection: Tensor) -> tuple[Tensor, np.ndarray]:
    r"""Return the temperature ladder that divides the estimated barrier evenly.

    It has as many temperatures and the same ends. The barrier is interpolated by a monotone cubic
    (Fritsch and Carlson, 1980), over :math:`\log \beta` if the ladder ends above 0.

    Args:
        betas: the ladder with which it was estimated, shape ``(R,)``.
        rejection: mean rejection rates of its neighbors, shape ``(R - 1,)``.

    Returns:
        the new ladder, and the positions of its temperatures on the old one, as fractional indices.

    Example:
        >>> respaced(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.6, 0.2]))[1].round(2).tolist()
        [0.0, 0.67, 2.0]
    """
    old = betas.double().cpu().numpy()
    # A pair without rejections would make two temperatures equal: assume a rate of at least 1e-3.
    barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rejection.double().cpu().numpy(), 1e-3))])
    even = np.linspace(0.0, barrier[-1], len(old))
    new = (
        np.exp(PchipInterpolator(barrier, np.log(old))(even))
        if old[-1] > 0.0
        else PchipInterpolator(barrier, old)(even)
    )
    new[0], new[-1] = old[0], old[-1]
    return torch.as_tensor(new), np.interp(even, barrier, np.arange(len(old)))


def find_step_sizes(
    kernel: ParallelTempering,
    energy: Energy,
    state: TemperedState,
    generator: torch.Generator | None,
) -> Tensor:
    """Find initial step sizes, shape ``(R,)``.

    At each temperature, double or halve until the mean acceptance rate of one step crosses one
    half.
    """
    inner = kernel.kernel
    probe = kernel.replace(kernel=inner.probe())
    sizes = torch.as_tensor(kernel.step_size, dtype=torch.float64).expand(len(kernel.betas)).clone()
    first: Tensor | None = None
    searching = torch.ones_like(sizes, dtype=torch.bool)
    for _ in range(50):
        _, _, info = probe.replace(step_size=sizes).transition(energy, state, generator)
        wanted = torch.where(info.acceptance_rate.mean(0).to(sizes) > 0.5, 1.0, -1.0)
        first = wanted if first is None else first
        searching = searching & (wanted == first)
        if not bool(searching.any()):
            break
        sizes = torch.where(searching, sizes * 2.0**wanted, sizes)
    return sizes


def _sizes(sizes: Iterable[float | Tensor]) -> Tensor:
    return torch.tensor([float(size) for size in sizes], dtype=torch.float64)


def _tunings(sizes: Tensor) -> tuple[DualAveraging, ...]:
    return tuple(DualAveraging.start(size) for size in sizes.tolist())
