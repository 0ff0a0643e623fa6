"""The general Boltzmann machine, in which every unit is coupled to every other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from pyro.distributions import Bernoulli
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core._checks import check_shape
from pyroebm.core.energy import Energy
from pyroebm.core.enumeration import bit_batches, bits_of, draw_numbers
from pyroebm.core.supports import spin
from pyroebm.energies.layered import MAX_WORK, check_sizes, parameter

__all__ = ["BoltzmannMachine", "Marginal"]

#: Maximum number of hidden units that :meth:`BoltzmannMachine.marginal` sums out.
MAX_SUMMED = 12


class BoltzmannMachine(Energy):
    r"""Boltzmann machine of visible and hidden units (Ackley, Hinton and Sejnowski, 1985).

    .. math:: E(x) = -\tfrac12 x^\top W x - b \cdot x, \qquad x = (v, h)

    W is symmetric with zero diagonal, so each pair counts once. With :math:`f = W x + b` the
    conditionals are :math:`p(x_i = 1 \mid x_{-i}) = \sigma(f_i)` for binary units and
    :math:`\sigma(2 f_i)` for spins. A machine with hidden units is an energy over all units, the
    visible ones first, since the sum over the hidden ones is intractable.

    Args:
        num_visible: number of units of v.
        num_hidden: number of units of h.
        units: ``"bits"`` for binary units in :math:`\{0, 1\}`, ``"spins"`` for units in
            :math:`\{-1, +1\}`.
        weight: W, shape ``(n, n)`` for n units in all, symmetric with zero diagonal; None draws
            normal numbers of standard deviation 0.01. Training keeps it symmetric, since its
            gradient has half of :math:`\langle x_i x_j \rangle` in both entries of a pair.
        bias: b, shape ``(n,)``; None for 0.
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Attributes:
        log_z: log Z in nats by enumeration in float64, for up to about 20 units; None for more.

    Raises:
        ValueError: if a size is out of range, if ``units`` is another string, if W or b has another
            shape or is not finite, or if W is not symmetric with zero diagonal.

    Example:
        >>> w = torch.tensor([[0.0, -1.0, -1.0], [-1.0, 0.0, 2.0], [-1.0, 2.0, 0.0]])
        >>> machine = BoltzmannMachine(
        ...     3, units="spins", weight=w, bias=torch.tensor([0.0, 1.0, 0.0])
        ... )
        >>> round(machine.log_z, 4)
        5.1499
        >>> x, site = torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([0])
        >>> machine.site_logits(x, site).softmax(1).detach()  # p(x_0 = -1) and p(x_0 = 1)
        tensor([[0.0180, 0.9820]])
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
        """Return the field :math:`f = W x + b` of each unit, of the shape of ``x``."""
        return x @ self._coupling() + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return -((0.5 * (x @ self._coupling()) + self.bias) * x).sum(-1)

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the values of one site of each chain, ``(chains, 2)``."""
        field = (x * self._coupling()[site]).sum(-1) + self.bias[site]
        low = torch.zeros_like(field) if self.units == "bits" else -field
        return torch.stack([low, field], 1)

    def joint(self) -> BoltzmannMachine:
        """Return this machine, which is an energy over all units."""
        return self

    def marginal(self) -> Energy:
        """Return the energy of the visible units, by a sum over the states of the hidden ones.

        Raises:
            ValueError: if there are more than 12 hidden units.
        """
        if self.num_hidden > MAX_SUMMED:
            raise ValueError(
                f"num_hidden must be at most {MAX_SUMMED} to sum over the hidden units, got"
                f" num_hidden={self.num_hidden}, that is 2^{self.num_hidden} states: sample"
                " joint(), or use an RBM, whose sum has a closed form"
            )
        return Marginal(self) if self.num_hidden else self

    @torch.no_grad()
    def mean_field(self, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6) -> Tensor:
        r"""Compute the means of a factorized approximation q of :math:`p(h \mid v)`.

        .. math:: \mu \leftarrow \tfrac12 \mu + \tfrac12 \sigma(f_h(v, \mu))

        with tanh for spins (Peterson and Anderson, 1987). A fixed point is a stationary point of
        :math:`KL(q \| p)`. All units are updated at once, with half steps, since full steps can
        oscillate.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            max_steps: maximum number of updates.
            tolerance: the updates stop when no mean changes by more.

        Returns:
            :math:`\mu`, shape ``(*batch, num_hidden)``.
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
        r"""Compute the variational free energy, an upper bound of F(v); shape of the batch.

        .. math:: E_q[E(v, h)] - H(q) \ge F(v)

        with q from :meth:`mean_field`. The means are held fixed in the gradient, since their own
        gradient is 0 at the fixed point. As :math:`-F(v) - \log Z = \log p(v)`, it bounds the
        likelihood if log Z is known (:meth:`variational_bound`).

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            max_steps: maximum number of mean-field updates.
            tolerance: tolerance of :meth:`mean_field`.
        """
        means = self.mean_field(visible, max_steps, tolerance)
        on = means if self.units == "bits" else 0.5 * (1.0 + means)
        return self(torch.cat([visible, means], -1)) - Bernoulli(
            on, validate_args=False
        ).entropy().sum(-1)

    def variational_bound(self, visible: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r"""Compute a lower bound of the log-likelihood, shape of the batch.

        .. math:: \log p(v) \ge -E_q[E(v, h)] + H(q) - \log Z

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            log_z: :math:`\log Z`; None sums over all states (:meth:`log_partition`).
        """
        return -self.variational_free_energy(visible) - (
            self.log_partition() if log_z is None else log_z
        )

    def log_partition(self, max_units: int = 24) -> Tensor:
        r"""Compute :math:`\log Z` by a sum over all states; differentiable, shape ``()``.

        Args:
            max_units: maximum number of units to enumerate; each additional unit doubles the time.

        Raises:
            ValueError: if the machine has more units.
        """
        n = self.event_shape[0]
        if n > max_units:
            raise ValueError(
                f"log Z of {n} units needs a sum over 2^{n} states, more than"
                f" max_units={max_units} allows: estimate it (pyroebm.partition)"
            )
        return torch.stack([torch.logsumexp(-self(x), 0) for x in self._states(n)]).logsumexp(0)

    def log_likelihood(self, x: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r"""Compute :math:`\log p(v)`, with hidden units summed out; shape of the batch.

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
        """Whether the machine is small enough to enumerate all states."""
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
        """Yield all states of n units in batches."""
        return map(self._values, bit_batches(n, self.dtype, self.device))

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"units={self.units!r}, num_visible={self.num_visible}, num_hidden={self.num_hidden}"


class Marginal(Energy):
    r"""Energy of the visible units of a Boltzmann machine, with the hidden units summed out.

    .. math:: F(v) = -\log \sum_h e^{-E(v, h)}

    Args:
        machine: a machine with few hidden units; its parameters are shared.

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
        r"""Compute :math:`\log Z`, which is that of the machine.

        Args:
            max_units: maximum number of units to enumerate.
        """
        return self.machine.log_partition(max_units)

    @property
    def log_z(self) -> float | None:
        """Log of the normalizing constant of the machine in nats; None where it is not known."""
        return self.machine.log_z

    @property
    def has_exact_draws(self) -> bool:
        """Whether the machine has exact draws."""
        return self.machine.has_exact_draws

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return self.machine.sample(num_samples, generator)[:, : self.machine.num_visible]
