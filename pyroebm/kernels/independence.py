"""Jumps to places that a normalised density proposes: Metropolis with an independent proposal,
alone or between local steps."""

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
    """A normalised law that is drawn from by pushing noise: every :class:`pyroebm.flows.Flow` is
    one.

    Example:
        >>> from pyroebm.flows import NICE
        >>> isinstance(NICE(2), Proposal)
        True
    """

    def rsample_base(
        self, num_samples: int, generator: torch.Generator | None = None, /
    ) -> Tensor: ...
    def forward_and_log_prob(self, z: Tensor, /) -> tuple[Tensor, Tensor]: ...
    def log_prob(self, x: Tensor, /) -> Tensor: ...


class IndependenceState(NamedTuple):
    """A state of :class:`IndependenceMetropolis`.

    Example:
        >>> IndependenceState._fields
        ('x', 'energy', 'log_q')
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: E(x), shape ``(chains,)``
    log_q: Tensor  #: log-density of the proposal there, shape ``(chains,)``


@dataclasses.dataclass(frozen=True, eq=False)
class IndependenceMetropolis(Kernel[IndependenceState]):
    r"""Metropolis-Hastings with proposals that do not depend on the state (Tierney, 1994): exact.

    .. math::

        x' \sim q, \qquad
        \text{accepted with } \min\Big(1, \frac{e^{-E(x')} q(x)}{e^{-E(x)} q(x')}\Big)

    With a flow fitted to the energy as q, chains jump between modes. Where q has lighter tails than
    the target a chain may wait very long there: look at the longest stretch without a move, or take
    :class:`LocalGlobalMixture`. A flow with redundant latents moves on ``flow.extend(energy)``, of
    which x is the first part.

    Args:
        proposal: q, over vectors of as many entries as an event has.

    Raises:
        ValueError: if ``proposal`` has not the methods of :class:`Proposal`; at the start, if it
            does not fit the energy, or a chain starts where energy or q are not finite; at a step,
            if its draws have another dtype or device than the energy.

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
                f" {len(x)} rows of x are not, the"
                f" first is row {row} with energy {float(state.energy[row])} and log q"
                f" {float(state.log_q[row])}"
            )
        return state

    def step(
        self, energy: Energy, state: IndependenceState, generator: torch.Generator | None = None
    ) -> tuple[IndependenceState, Info]:
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
    """A state of :class:`LocalGlobalMixture`.

    Example:
        >>> LocalGlobalState._fields
        ('x', 'energy', 'local')
    """

    x: Tensor  #: positions, shape ``(chains, *event)``
    energy: Tensor  #: E(x), shape ``(chains,)``
    local: Any  #: state of the local kernel


@dataclasses.dataclass(frozen=True, eq=False)
class LocalGlobalMixture(WrappedKernel[LocalGlobalState]):
    r"""A few steps of a local kernel, then one independent proposal (Gabrié, Rotskoff and
    Vanden-Eijnden, 2022): exact.

    The local kernel explores a mode, the jumps move between modes with their weights.
    ``acceptance_rate`` and ``diverging`` are the local kernel's, which warm-up tunes; ``accepted``
    is whether the chain moved, by either.

    Args:
        kernel: the local kernel, one that warm-up tunes by its step size and metric (such as MALA
            or HMC).
        proposal: q, as in :class:`IndependenceMetropolis`.
        every: local steps before each jump.

    Raises:
        ValueError: if ``every`` < 1, an argument is of the wrong kind, or the local kernel is
            discrete or has a warm-up of its own.

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
                "the local kernel must be continuous and tuned by its step size, such as MALA or"
                f" HMC, got {self.kernel}"
            )

    @property
    def has_momentum(self) -> bool:
        """Never: what is reported after a jump is the energy."""
        return False

    @property
    def expected_gradients(self) -> float:
        """Of all local steps, and those about the jump."""
        return self.every * self.kernel.expected_gradients + 3.0

    def probe(self) -> LocalGlobalMixture:
        return self.replace(kernel=self.kernel.probe(), every=1)

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> LocalGlobalState:
        IndependenceMetropolis(self.proposal).init(energy, x)
        local = self.kernel.init(energy, x, generator)
        return LocalGlobalState(local.x, local.energy, local)

    def step(
        self, energy: Energy, state: LocalGlobalState, generator: torch.Generator | None = None
    ) -> tuple[LocalGlobalState, Info]:
        local, infos = state.local, []
        for _ in range(self.every):
            local, info = self.kernel.step(energy, local, generator)
            infos.append(info)
        with torch.no_grad():
            log_q = self.proposal.log_prob(local.x.reshape(len(local.x), -1))
        before = IndependenceState(local.x, energy(local.x).detach(), log_q)
        after, jump = IndependenceMetropolis(self.proposal).step(energy, before, generator)
        # a place without a gradient is no place to go on from: its row stays, and no other row
        # knows
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
        local = self.kernel.refresh(energy, state.local)
        return LocalGlobalState(local.x, local.energy, local)
