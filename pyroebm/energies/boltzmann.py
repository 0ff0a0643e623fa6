"""The Boltzmann machine: every unit coupled to every other, some of them hidden."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from pyro.distributions import Bernoulli
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyroebm.core._checks import check_shape
from pyroebm.core.energy import Energy
from pyroebm.core.enumeration import bit_batches, bits_of, draw_numbers
from pyroebm.core.spins import SpinBernoulli
from pyroebm.core.supports import spin
from pyroebm.energies.layered import MAX_WORK, check_sizes, parameter

__all__ = ["BoltzmannMachine", "Marginal"]

#: Hidden units that :meth:`BoltzmannMachine.marginal` sums out one state at a time.
MAX_SUMMED = 12


class BoltzmannMachine(Energy):
    r"""Boltzmann machine (Ackley, Hinton and Sejnowski, 1985) of visible and hidden units.

    .. math:: E(x) = -\tfrac12 x^\top W x - b \cdot x, \qquad x = (v, h)

    with symmetric W of zero diagonal, so each pair counts once. With :math:`f = W x + b` the
    conditionals are :math:`p(x_i = 1 \mid x_{-i}) = \sigma(f_i)` for bits and :math:`\sigma(2 f_i)`
    for spins. With hidden units it is an energy over all units, since their sum is not tractable;
    the visible ones come first.

    Args:
        num_visible: units of v.
        num_hidden: units of h.
        units: ``"bits"`` in :math:`\{0, 1\}` or ``"spins"`` in :math:`\{-1, +1\}`.
        weight: W, shape ``(n, n)`` with n units in all, symmetric, its diagonal 0; None draws
            normal numbers of standard deviation 0.01. It stays symmetric, for its gradient is: half
            of :math:`\langle x_i x_j \rangle` in each of the two places of a pair.
        bias: b, shape ``(n,)``; None is 0.
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None is torch's default generator.

    Attributes:
        log_z: by enumeration in float64, up to about 20 units; None above.

    Raises:
        ValueError: if a size is out of range, ``units`` is neither, or W or b has another shape, is
            not finite, or W is not symmetric with diagonal 0.

    Example:
        >>> w = torch.tensor([[0.0, -1.0, -1.0], [-1.0, 0.0, 2.0], [-1.0, 2.0, 0.0]])
        >>> machine = BoltzmannMachine(
        ...     3, units="spins", weight=w, bias=torch.tensor([0.0, 1.0, 0.0])
        ... )
        >>> round(machine.log_z, 4)
        5.1499
        >>> machine.site_given_rest(torch.tensor([1.0, -1.0, -1.0]), 0).mean.detach()
        tensor(0.9640)
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int = 0,
        *,
        units: Literal["bits", "spins"] = "bits",
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_sizes(
            "BoltzmannMachine",
            num_visible=num_visible,
            **({"num_hidden": num_hidden} if num_hidden else {}),
        )
        if units not in ("bits", "spins"):
            raise ValueError(
                f'BoltzmannMachine: units must be "bits" or "spins", got units={units!r}'
            )
        n = num_visible + num_hidden
        super().__init__((n,), constraints.boolean if units == "bits" else spin)
        self.num_visible = num_visible
        self.num_hidden = num_hidden
        self.units = units
        self.weight = parameter("weight", weight, (n, n), 0.01, dtype, generator)
        if weight is None:
            self.weight.data = self.weight.data.triu(1) + self.weight.data.triu(1).mT
        if not torch.equal(self.weight, self.weight.mT) or bool(self.weight.diagonal().any()):
            raise ValueError(
                f"weight must be symmetric with diagonal 0, got {self.weight.tolist()}"
            )
        self.bias = parameter("bias", bias, (n,), 0.0, dtype)

    def _coupling(self) -> Tensor:
        off = self.weight - torch.diag(self.weight.diagonal())
        return 0.5 * (off + off.mT)

    def field(self, x: Tensor) -> Tensor:
        """:math:`f = W x + b`, shape of ``x``: what each unit feels from the others."""
        return x @ self._coupling() + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return -((0.5 * (x @ self._coupling()) + self.bias) * x).sum(-1)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Log-probabilities, unnormalised, of the values of one site of each row, from
        its field.
        """
        field = (x * self._coupling()[site]).sum(-1) + self.bias[site]
        low = torch.zeros_like(field) if self.units == "bits" else -field
        return torch.stack([low, field], 1)

    def site_given_rest(self, x: Tensor, site: int) -> Distribution:
        """:math:`p(x_i \\mid x_{-i})` of one unit, batch shape that of ``x``: Pyro's Bernoulli, or
        :class:`pyroebm.core.spins.SpinBernoulli`.
        """
        field = x @ self._coupling()[site] + self.bias[site]
        return (
            Bernoulli(logits=field, validate_args=False)
            if self.units == "bits"
            else SpinBernoulli(field)
        )

    def joint(self) -> BoltzmannMachine:
        """Itself: it is an energy over all units."""
        return self

    def marginal(self) -> Energy:
        """The energy of the visible units: itself without hidden ones, a sum over their states
        where they are few.

        Raises:
            ValueError: if there are more than 12 hidden units: the sum over their states has no
                closed form.
        """
        if self.num_hidden > MAX_SUMMED:
            raise ValueError(
                f"the marginal of {self.num_visible} visible units sums over 2^{self.num_hidden}"
                " states of the hidden ones, and"
                f" 2^{MAX_SUMMED} are the most: sample the joint, or take an RBM, whose sum has a"
                " closed form"
            )
        return Marginal(self) if self.num_hidden else self

    @torch.no_grad()
    def mean_field(self, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6) -> Tensor:
        r"""Means :math:`\mu` of a factorial q near to :math:`p(h \mid v)` in :math:`KL(q \| p)`,
        shape ``(*batch, num_hidden)``.

        .. math:: \mu \leftarrow \tfrac12 \mu + \tfrac12 \sigma(f_h(v, \mu))

        with tanh for spins (Peterson and Anderson, 1987). All units move at once, half-way, since
        full steps can oscillate.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            max_steps: most updates.
            tolerance: they end when no mean moves by more.
        """
        check_shape(type(self).__name__, visible, torch.Size([self.num_visible]))
        bits = self.units == "bits"
        means = visible.new_full((*visible.shape[:-1], self.num_hidden), 0.5 if bits else 0.0)
        for _ in range(max_steps):
            field = self.field(torch.cat([visible, means], -1))[..., self.num_visible :]
            step = 0.5 * ((field.sigmoid() if bits else field.tanh()) - means)
            means = means + step
            if not bool((step.abs() > tolerance).any()):
                break
        return means

    def variational_free_energy(
        self, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6
    ) -> Tensor:
        r""":math:`E_q[E(v, h)] - H(q) \ge F(v)`, q from :meth:`mean_field`; shape of the batch.

        The means are constants of the gradient: at the fixed point their own is 0. :math:`-F(v) -
        \log Z` is :math:`\log p(v)`, so with log Z it bounds the likelihood
        (:meth:`variational_bound`).
        """
        means = self.mean_field(visible, max_steps, tolerance)
        on = means if self.units == "bits" else 0.5 * (1.0 + means)
        return self(torch.cat([visible, means], -1)) - Bernoulli(
            on, validate_args=False
        ).entropy().sum(-1)

    def variational_bound(self, visible: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r""":math:`\log p(v) \ge -E_q[E(v, h)] + H(q) - \log Z`, shape of the batch.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            log_z: :math:`\log Z`; None sums over all states (:meth:`log_partition`).
        """
        return -self.variational_free_energy(visible) - (
            self.log_partition() if log_z is None else log_z
        )

    def log_partition(self, max_units: int = 24) -> Tensor:
        r""":math:`\log Z` by a sum over all states; differentiable, shape ``()``.

        Args:
            max_units: most units to enumerate; each one more doubles the time.

        Raises:
            ValueError: if there are more.
        """
        n = self.event_shape[0]
        if n > max_units:
            raise ValueError(
                f"log Z of {n} units needs a sum over 2^{n} states, more than"
                f" max_units={max_units} allows: estimate it"
                " (pyroebm.partition)"
            )
        return torch.stack([torch.logsumexp(-self(x), 0) for x in self._states(n)]).logsumexp(0)

    def log_likelihood(self, x: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r""":math:`\log p(v)`, hidden units summed out, shape of the batch.

        Args:
            x: visible states, shape ``(*batch, num_visible)``.
            log_z: :math:`\log Z`; None sums over all states (:meth:`log_partition`).
        """
        return -self.marginal()(x) - (self.log_partition() if log_z is None else log_z)

    @property
    def _is_small(self) -> bool:
        n = self.event_shape[0]
        return n <= 24 and n << n <= MAX_WORK

    @property
    def log_z(self) -> float | None:
        """Log of the normalizing constant in nats; None where it is not known."""
        if not self._is_small:
            return None
        with torch.no_grad():
            return float(copy.deepcopy(self).double().log_partition())

    @property
    def has_exact_draws(self) -> bool:
        """Where all states can be enumerated."""
        return self._is_small

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        if not self._is_small:
            return super().sample(num_samples, generator)
        with torch.no_grad():
            log_p = torch.cat([-self(x) for x in self._states(self.event_shape[0])])
        return self._values(
            bits_of(draw_numbers(log_p, num_samples, generator), self.event_shape[0], self.dtype)
        )

    def _values(self, bits: Tensor) -> Tensor:
        return bits if self.units == "bits" else 2.0 * bits - 1.0

    def _states(self, n: int) -> Iterator[Tensor]:
        """Every state of n units, in batches that do not stay in memory."""
        return map(self._values, bit_batches(n, self.dtype, self.device))

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"units={self.units!r}, num_visible={self.num_visible}, num_hidden={self.num_hidden}"


class Marginal(Energy):
    r"""The visible units of a Boltzmann machine, :math:`F(v) = -\log \sum_h e^{-E(v, h)}`, the sum
    taken over every state of h.

    Args:
        machine: with few hidden units; its parameters are shared.

    Example:
        >>> machine = BoltzmannMachine(2, 1)
        >>> abs(float(Marginal(machine).log_z) - machine.log_z) < 1e-6
        True
    """

    def __init__(self, machine: BoltzmannMachine) -> None:
        super().__init__((machine.num_visible,), machine.support)
        self.machine = machine

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        parts = []
        for hidden in self.machine._states(self.machine.num_hidden):
            shape = (*x.shape[:-1], len(hidden))
            whole = torch.cat([x.unsqueeze(-2).expand(*shape, -1), hidden.expand(*shape, -1)], -1)
            parts.append(torch.logsumexp(-self.machine(whole), -1))
        return -torch.stack(parts).logsumexp(0)

    def log_partition(self, max_units: int = 24) -> Tensor:
        r""":math:`\log Z`, that of the machine."""
        return self.machine.log_partition(max_units)

    @property
    def log_z(self) -> float | None:
        """That of the machine."""
        return self.machine.log_z

    @property
    def has_exact_draws(self) -> bool:
        """Where the machine has them."""
        return self.machine.has_exact_draws

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return self.machine.sample(num_samples, generator)[:, : self.machine.num_visible]
