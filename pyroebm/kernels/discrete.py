"""Gradient-based kernels on discrete supports, with the energy continued to real numbers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.wrappers import Relaxed
from pyroebm.kernels.base import (
    Info,
    State,
    choose,
    column,
    row_value_and_grad,
    rows,
    start_state,
    state_of_rows,
    uniform_like,
)
from pyroebm.kernels.sites import (
    DiscreteKernel,
    draw_index,
    squared_distances,
    to_sites,
    values_of,
)

__all__ = ["DMALA", "DULA", "GibbsWithGradients"]


@dataclasses.dataclass(frozen=True, eq=False)
class RelaxedKernel(DiscreteKernel[State]):
    """A discrete kernel whose state keeps the gradient of the relaxed energy."""

    def init(self, energy: Energy, x: Tensor, generator: torch.Generator | None = None) -> State:
        """Return the state at ``x``, with energy and gradient of the relaxed energy."""
        self.check_start(energy, x)
        values_of(energy, x)
        return start_state(Relaxed(energy), x)


@dataclasses.dataclass(frozen=True, eq=False)
class GibbsWithGradients(RelaxedKernel):
    r"""Gibbs with gradients (Grathwohl, Swersky, Hashemi, Duvenaud and Maddison, 2021): exact.

    One site i changes to one value v. Both are drawn together, with probabilities from a
    first-order estimate of the change in energy,

    .. math::

        q(i, v \mid x) \propto \exp\bigl(-\tfrac12 \nabla E(x)_i \cdot (v - x_i)\bigr), \qquad
        v \ne x_i

    This is the locally balanced proposal of Zanella (2020). It is accepted by the
    Metropolis-Hastings ratio, with the reverse proposal from the gradient at the new state. A step
    costs one gradient, for any number of sites. The energy must accept real numbers
    (:class:`pyroebm.core.Relaxed`). A poor continuation lowers the acceptance rate; the kernel
    remains exact.

    Example:
        >>> from pyroebm.energies import Ising
        >>> kernel, energy = GibbsWithGradients(), Ising((4, 4), coupling=0.4)
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.x.shape
        torch.Size([8, 4, 4])
    """

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Propose a new value of one site and accept it by Metropolis-Hastings."""
        values = values_of(energy, state.x)
        x = rows(state.x)
        row = torch.arange(len(state.x), device=state.x.device)
        forward = change_logits(x, rows(state.grad), values)
        index = draw_index(forward.exp(), uniform_like(state.energy, generator))
        proposal = to_sites(x, values).clone()
        sites = proposal.shape[1]
        site = index % sites
        own = squared_distances(proposal[row, site].unsqueeze(1), values).argmin(1).squeeze(1)
        proposal[row, site] = values[index // sites]
        q = rows(proposal)
        new = state_of_rows(energy, q, *row_value_and_grad(Relaxed(energy), q))
        backward = change_logits(q, rows(new.grad), values)
        log_q = backward[row, own * sites + site] - forward[row, index]
        return metropolis(state, new, log_q, generator)


@dataclasses.dataclass(frozen=True, eq=False)
class DULA(RelaxedKernel):
    r"""Discrete unadjusted Langevin algorithm (Zhang, Liu and Liu, 2022). **Not exact**.

    The bias grows with the step size. All sites change at once and independently, each to one of
    its values v:

    .. math::

        q_i(v \mid x) \propto
        \exp\Bigl(-\tfrac12 \nabla E(x)_i \cdot (v - x_i) - \frac{|v - x_i|^2}{2 \epsilon^2}\Bigr)

    This is the normal Langevin proposal of step size :math:`\epsilon`, restricted to the support;
    the :math:`\alpha` of the paper is :math:`\epsilon^2`. The energy must accept real numbers
    (:class:`pyroebm.core.Relaxed`). A proposal with a non-finite energy or gradient is rejected and
    counts as diverging; all others are accepted.

    Args:
        step_size: :math:`\epsilon > 0`, a number or one for each chain. A flip has distance 1 for
            bits, 2 for spins and :math:`\sqrt 2` for one-hot vectors.

    Raises:
        ValueError: if ``step_size`` is not positive and finite.

    Example:
        >>> from pyroebm.energies import Ising
        >>> kernel, energy = DULA(step_size=0.5), Ising((4, 4), coupling=0.4)
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> info.accepted.all()
        tensor(True)
    """

    step_size: float | Tensor = 0.5

    exact: ClassVar[bool] = False
    learned: ClassVar[tuple[str, ...]] = ("step_size",)

    def __post_init__(self) -> None:
        size = torch.as_tensor(self.step_size)
        if not bool((torch.isfinite(size) & (size > 0)).all()):
            raise ValueError(
                f"{type(self).__name__}: step_size must be positive and finite, got"
                f" step_size={self.step_size}"
            )

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Draw a new value of every site and accept it if energy and gradient are finite."""
        new, _ = self.propose(energy, state, generator)
        finite = is_finite(new)
        state = choose(finite, new, state)
        return state, Info(
            acceptance_rate=finite.to(state.x.dtype),
            accepted=finite,
            diverging=~finite,
            energy=state.energy,
            n_steps=torch.ones_like(finite, dtype=torch.long),
            step_size=column(self.step_size, rows(state.x)).squeeze(1),
        )

    def propose(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Tensor]:
        r"""Draw a proposal.

        Returns:
            the proposal :math:`x'`, and :math:`\log q(x \mid x') - \log q(x' \mid x)`, shape
            ``(chains,)``.
        """
        values, x = values_of(energy, state.x), rows(state.x)
        forward, own = self._site_logits(x, rows(state.grad), values)
        index = draw_index(forward.exp(), uniform_like(forward[:, 0], generator))
        q = rows(values[index])
        new = state_of_rows(energy, q, *row_value_and_grad(Relaxed(energy), q))
        backward, _ = self._site_logits(q, rows(new.grad), values)
        back = torch.where(own, backward, 0.0).sum((1, 2))
        return new, back - forward.gather(1, index.unsqueeze(1)).sum((1, 2))

    def _site_logits(self, q: Tensor, grad: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities of the values of each site, ``(chains, K, sites)``.

        Returns:
            the log-probabilities, and a mask of the current value of each site.
        """
        squared = squared_distances(to_sites(q, values), values)
        spread = 2.0 * column(self.step_size, q).unsqueeze(2) ** 2
        logits = -0.5 * values @ to_sites(grad, values).mT - squared / spread
        return torch.log_softmax(logits, 1), squared == 0


@dataclasses.dataclass(frozen=True, eq=False)
class DMALA(DULA):
    r"""Discrete Metropolis-adjusted Langevin algorithm (Zhang, Liu and Liu, 2022): exact.

    The proposal of :class:`DULA`, accepted by the Metropolis-Hastings ratio
    :math:`e^{E(x) - E(x')} q(x \mid x') / q(x' \mid x)`.

    Args:
        step_size: :math:`\epsilon > 0`; warm-up aims at an acceptance rate of 0.574 (Sun, Dai and
            Schuurmans, 2022).

    Raises:
        ValueError: if ``step_size`` is not positive and finite.

    Example:
        >>> from pyroebm.energies import Ising
        >>> kernel, energy = DMALA(step_size=1.0), Ising((4, 4), coupling=0.4)
        >>> state = kernel.init(energy, energy.initial(8))
        >>> state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        >>> state.energy.shape
        torch.Size([8])
    """

    exact: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = 0.574

    def step(
        self, energy: Energy, state: State, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Draw a new value of every site and accept by Metropolis-Hastings."""
        new, log_q = self.propose(energy, state, generator)
        size = column(self.step_size, rows(state.x)).squeeze(1)
        new, info = metropolis(state, new, log_q, generator)
        return new, info._replace(step_size=size)


def change_logits(q: Tensor, grad: Tensor, values: Tensor) -> Tensor:
    """Compute log-probabilities ``(chains, K * sites)`` of changing one site to another value.

    The values are in the order of ``values``.
    """
    x, g = to_sites(q, values), to_sites(grad, values)
    gain = 0.5 * ((g * x).sum(2).unsqueeze(1) - values @ g.mT)
    return torch.log_softmax(
        rows(gain.masked_fill(squared_distances(x, values) == 0, -torch.inf)), 1
    )


def is_finite(state: State) -> Tensor:
    """Return which chains have finite energy and gradient."""
    return torch.isfinite(state.energy) & torch.isfinite(rows(state.grad)).all(1)


def metropolis(
    state: State, new: State, log_q: Tensor, generator: torch.Generator | None
) -> tuple[State, Info]:
    r"""Accept each chain's proposal with :math:`\min(1, e^{E - E' + \log q})`.

    ``log_q`` is the log ratio of the reverse to the forward proposal, shape ``(chains,)``.
    """
    # A proposal with a non-finite energy or gradient has probability 0; other chains do not change.
    finite = is_finite(new)
    log_ratio = torch.where(finite, state.energy - new.energy + log_q, -torch.inf)
    probability = torch.exp(log_ratio.clamp(max=0.0))
    accepted = uniform_like(probability, generator) < probability
    state = choose(accepted, new, state)
    return state, Info(
        acceptance_rate=probability,
        accepted=accepted,
        diverging=~finite,
        energy=state.energy,
        n_steps=torch.ones_like(accepted, dtype=torch.long),
    )
