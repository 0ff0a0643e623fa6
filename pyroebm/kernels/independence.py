"""Independence Metropolis-Hastings with a normalized density, alone or after local steps."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.wrappers import check_weighable
from pyroebm.kernels.base import (
    Info,
    Kernel,
    WrappedKernel,
    choose,
    row_value_and_grad,
    rows,
    uniform_like,
)

__all__ = [
    "IndependenceMetropolis",
    "IndependenceState",
    "LocalGlobalMixture",
    "LocalGlobalState",
    "Proposal",
]


@runtime_checkable
class Proposal(Protocol):
    """Protocol of a normalized density that is sampled by transforming base noise.

    Every :class:`pyroebm.flows.Flow` is one.

    Example:
        >>> from pyroebm.flows import NICE
        >>> isinstance(NICE(2), Proposal)
        True
    """

    def rsample_base(self, num_samples: int, generator: torch.Generator | None = None, /) -> Tensor:
        """Draw base noise for ``num_samples`` draws."""

    def forward_and_log_prob(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Map base noise to draws ``(num_samples, dim)``; also return their log-densities."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """Compute log-densities of ``x`` ``(n, dim)``, shape ``(n,)``."""


class IndependenceState(NamedTuple):
    """State of :class:`IndependenceMetropolis`.

    Example:
        >>> IndependenceState._fields
        ('x', 'energy', 'log_q')
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: E(x), shape ``(chains,)``
    log_q: Tensor  #: log-density of the proposal at x, shape ``(chains,)``


@dataclasses.dataclass(frozen=True, eq=False)
class IndependenceMetropolis(Kernel[IndependenceState]):
    r"""Metropolis-Hastings with proposals that do not depend on the state (Tierney, 1994): exact.

    .. math::

        x' \sim q, \qquad
        \text{accepted with } \min\Big(1, \frac{e^{-E(x')} q(x)}{e^{-E(x)} q(x')}\Big)

    With a flow fitted to the energy as q, chains move between modes in one step. Where q has
    lighter tails than the target, a chain may reject proposals for a long time: check the longest
    stretch without a move, or use :class:`LocalGlobalMixture`. A flow with auxiliary variables
    moves on ``flow.extend(energy)``, of which x is the first part.

    Args:
        proposal: q, over vectors of as many entries as an event.

    Raises:
        ValueError: if ``proposal`` does not have the methods of :class:`Proposal`; at the start, if
            it does not fit the energy, or if energy or q are not finite at a start; at a step, if
            its draws have another dtype or device than the energy.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> kernel, energy = IndependenceMetropolis(NICE(2)), Gaussian(torch.zeros(2))
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> bool((info.acceptance_rate > 0.9999).all())  # a fresh flow is this target
        True
    """

    proposal: Proposal

    def __post_init__(self) -> None:
        if not isinstance(self.proposal, Proposal):
            raise ValueError(
                "proposal must have rsample_base, forward_and_log_prob and log_prob, as a Flow has,"
                f" got {type(self.proposal).__name__}"
            )

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> IndependenceState:
        """Return the state at ``x``, with energies and log-densities of the proposal."""
        self.check_start(energy, x)
        check_weighable(energy)
        with torch.no_grad():
            state = IndependenceState(
                x.detach(), energy(x), self.proposal.log_prob(x.reshape(len(x), -1))
            )
        bad = ~(torch.isfinite(state.energy) & torch.isfinite(state.log_q))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"chains must start where energy and proposal are finite: {int(bad.sum())} of"
                f" {len(x)} rows of x are not, the first is row {row} with energy"
                f" {float(state.energy[row])} and log q {float(state.log_q[row])}; start from"
                " draws of the proposal"
            )
        return state

    def step(
        self, energy: Energy, state: IndependenceState, generator: torch.Generator | None = None
    ) -> tuple[IndependenceState, Info]:
        """Draw a proposal for every chain and accept it by Metropolis-Hastings."""
        with torch.no_grad():
            x, log_q = self.proposal.forward_and_log_prob(
                self.proposal.rsample_base(len(state.x), generator)
            )
            x = x.reshape(len(x), *energy.event_shape)
            energy.check_states(x, "the proposal's draw")
            new = IndependenceState(x, energy(x), log_q)
        error = (new.energy + new.log_q) - (state.energy + state.log_q)
        finite = torch.isfinite(error) & torch.isfinite(new.energy)
        probability = torch.exp(-torch.where(finite, error, torch.inf)).clamp(max=1.0)
        accepted = uniform_like(probability, generator) < probability
        state = choose(accepted, new, state)
        return state, Info(
            acceptance_rate=probability,
            accepted=accepted,
            diverging=~finite,
            energy=state.energy,
            n_steps=torch.ones_like(accepted, dtype=torch.long),
        )


class LocalGlobalState(NamedTuple):
    """State of :class:`LocalGlobalMixture`.

    Example:
        >>> LocalGlobalState._fields
        ('x', 'energy', 'local')
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: E(x), shape ``(chains,)``
    local: Any  #: state of the local kernel


@dataclasses.dataclass(frozen=True, eq=False)
class LocalGlobalMixture(WrappedKernel[LocalGlobalState]):
    r"""Mixture of local moves and global moves of an independent proposal: exact.

    One step is ``every`` steps of a local kernel, then one draw of q accepted by
    Metropolis-Hastings (Gabrié, Rotskoff and Vanden-Eijnden, 2022). The local kernel explores a
    mode; the global moves change between modes according to their weights. ``acceptance_rate`` and
    ``diverging`` are those of the local kernel, which warm-up adapts; ``accepted`` is whether the
    chain moved by either.

    Args:
        kernel: the local kernel, adapted by its step size and metric (such as MALA or HMC).
        proposal: q, as in :class:`IndependenceMetropolis`.
        every: number of local steps before each global move.

    Raises:
        ValueError: if ``every`` < 1, an argument is of the wrong kind, or the local kernel is
            discrete or has its own adaptation.

    Example:
        >>> from pyroebm import MALA
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> kernel, energy = (
        ...     LocalGlobalMixture(MALA(0.5), NICE(2), every=5),
        ...     Gaussian(torch.zeros(2)),
        ... )
        >>> state, info = kernel.step(energy, kernel.init(energy, energy.initial(8)))
        >>> bool(info.accepted.all()), info.n_steps[0]
        (True, tensor(8))
    """

    proposal: Proposal
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts({"every": 1}, self.every)
        IndependenceMetropolis(self.proposal)
        if (
            self.kernel.discrete
            or self.kernel.own_adaptation() is not None
            or self.kernel.step_size is None
        ):
            raise ValueError(
                "kernel, the local one, must be continuous and adapted by its step size, such as"
                f" MALA() or HMC(), got {self.kernel}"
            )

    @property
    def has_momentum(self) -> bool:
        """False: after a global move the report contains the energy."""
        return False

    @property
    def expected_gradients(self) -> float:
        """Expected gradient evaluations of all local steps and of the global move."""
        return self.every * self.kernel.expected_gradients + 3.0

    def probe(self) -> LocalGlobalMixture:
        """Return the kernel with one local step of the shortest trajectory."""
        return self.replace(kernel=self.kernel.probe(), every=1)

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> LocalGlobalState:
        """Return the state at ``x``, with the state of the local kernel."""
        IndependenceMetropolis(self.proposal).init(energy, x)
        local = self.kernel.init(energy, x, generator)
        return LocalGlobalState(local.x, local.energy, local)

    def step(
        self, energy: Energy, state: LocalGlobalState, generator: torch.Generator | None = None
    ) -> tuple[LocalGlobalState, Info]:
        """Run ``every`` local steps and one global move."""
        local, infos = state.local, []
        for _ in range(self.every):
            local, info = self.kernel.step(energy, local, generator)
            infos.append(info)
        with torch.no_grad():
            log_q = self.proposal.log_prob(local.x.reshape(len(local.x), -1))
        before = IndependenceState(local.x, energy(local.x).detach(), log_q)
        after, jump = IndependenceMetropolis(self.proposal).step(energy, before, generator)
        # The local kernel cannot continue from a non-finite gradient: such chains keep their
        # previous state.
        smooth = torch.isfinite(row_value_and_grad(energy, rows(after.x))[1]).all(1)
        moved = jump.accepted & smooth
        local = choose(
            moved, self.kernel.init(energy, choose(moved, after, before).x, generator), local
        )
        return LocalGlobalState(local.x, local.energy, local), infos[-1]._replace(
            acceptance_rate=torch.stack([info.acceptance_rate for info in infos]).mean(0),
            accepted=moved | torch.stack([info.accepted for info in infos]).any(0),
            diverging=torch.stack([info.diverging for info in infos]).any(0)
            | jump.diverging
            | ~smooth,
            energy=local.energy,
            n_steps=torch.stack([info.n_steps for info in infos]).sum(0) + 3,
        )

    def refresh(self, energy: Energy, state: LocalGlobalState) -> LocalGlobalState:
        """Recompute the state of the local kernel after the energy was trained."""
        local = self.kernel.refresh(energy, state.local)
        return LocalGlobalState(local.x, local.energy, local)
