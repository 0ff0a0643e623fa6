"""Deep Boltzmann machines, in which each layer is coupled to the layers next to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from pyroebm.energies.layered import LayeredEnergy, check_sizes, parameter
from pyroebm.energies.layers import Layers

__all__ = ["DeepBoltzmannMachine"]


class DeepBoltzmannMachine(LayeredEnergy):
    r"""Deep Boltzmann machine, over visible and hidden units (Salakhutdinov and Hinton, 2009).

    .. math::

        E(v, h_1, \ldots, h_L)
        = -b_0 \cdot v - \sum_l b_l \cdot h_l - v^\top W_1 h_1 - \sum_l h_l^\top W_{l+1} h_{l+1}

    The field of a middle layer depends on both neighboring layers: :math:`p(h_1 \mid v, h_2) =
    \sigma(b_1 + W_1^\top v + W_2 h_2)`. Gaussian visible units have the energy of
    :class:`pyroebm.energies.GaussianRBM` in the convention ``"hinton"``. The sum over the hidden
    units has no closed form: likelihoods are bounded (:meth:`variational_bound`), or enumerated if
    the layers are small.

    Args:
        sizes: number of units of each layer, the visible one first; at least three layers (two are
            an RBM).
        visible: type of the visible units, ``"bits"`` (binary) or ``"gaussian"``.
        weights: one matrix for each pair of neighboring layers, shape ``(n_l, n_{l+1})``; None
            draws normal numbers of standard deviation 0.01.
        biases: one vector for each layer, shape ``(n_l,)``; None for 0.
        log_sigma: :math:`\log \sigma` of Gaussian visible units, shape ``(n_0,)``; None for 0.
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: if there are fewer than three layers, if a size is below 1, if ``visible`` is
            another string, or if a parameter has another shape or is not finite.

    Example:
        >>> machine = DeepBoltzmannMachine([4, 3, 2])
        >>> machine.event_shape, list(machine.blocks)
        (torch.Size([9]), ['visible', 'hidden1', 'hidden2'])
        >>> v = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
        >>> bool(machine.variational_bound(v, machine.log_z) <= machine.log_likelihood(v))
        True
    """

    log_sigma: nn.Parameter | None

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        visible: Literal["bits", "gaussian"] = "bits",
        weights: Sequence[Tensor] | None = None,
        biases: Sequence[Tensor] | None = None,
        log_sigma: Tensor | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_sizes("DeepBoltzmannMachine", **{f"sizes[{k}]": size for k, size in enumerate(sizes)})
        if len(sizes) < 3:
            raise ValueError(
                f"sizes must have at least three layers, got sizes={list(sizes)}; use"
                " BernoulliRBM or GaussianRBM for two"
            )
        if visible not in ("bits", "gaussian"):
            raise ValueError(
                f'DeepBoltzmannMachine: visible must be "bits" or "gaussian", got'
                f" visible={visible!r}"
            )
        pairs = list(itertools.pairwise(sizes))
        for name, given, count in (
            ("weights", weights, len(pairs)),
            ("biases", biases, len(sizes)),
        ):
            if given is not None and len(given) != count:
                raise ValueError(
                    f"{name} must hold {count} tensors for sizes={list(sizes)}, got {len(given)}"
                )
        super().__init__(sizes, visible == "gaussian")
        self.sizes, self.visible = tuple(sizes), visible
        given_weights, given_biases = (
            list(g) if g is not None else [None] * len(sizes) for g in (weights, biases)
        )
        self.weights = nn.ParameterList(
            [
                parameter(f"weights[{k}]", given_weights[k], pair, 0.01, dtype, generator)
                for k, pair in enumerate(pairs)
            ]
        )
        self.biases = nn.ParameterList(
            [
                parameter(f"biases[{k}]", given_biases[k], (size,), 0.0, dtype)
                for k, size in enumerate(sizes)
            ]
        )
        self.log_sigma = (
            parameter("log_sigma", log_sigma, (sizes[0],), 0.0, dtype)
            if visible == "gaussian"
            else None
        )

    def layers(self) -> Layers:
        """Return the layers in natural parameters."""
        weights, biases = tuple(self.weights), tuple(self.biases)
        if self.log_sigma is None:
            return Layers(weights, biases)
        scale = torch.exp(-self.log_sigma)
        offset = 0.5 * ((scale * biases[0]) ** 2).sum()
        return Layers(
            (weights[0] * scale.unsqueeze(1), *weights[1:]),
            (biases[0] * scale**2, *biases[1:]),
            scale**2,
            offset,
        )

    @torch.no_grad()
    def mean_field(
        self, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6
    ) -> list[Tensor]:
        r"""Compute the means of the factorized q that minimizes :math:`KL(q \| p(h \mid v))`.

        .. math:: \mu_l = \sigma(b_l + W_l^\top \mu_{l-1} + W_{l+1} \mu_{l+1}), \qquad \mu_0 = v

        Odd and even layers are updated in turn, so that no update decreases the bound (parallel
        updates can oscillate). The initial means are those of one pass up with doubled weights.

        Args:
            visible: v, shape ``(*batch, n_0)``.
            max_steps: maximum number of sweeps.
            tolerance: the sweeps stop when no mean changes by more.

        Returns:
            :math:`\mu_l` of each hidden layer, shape ``(*batch, n_l)``.
        """
        layers = self.layers()
        return layers.mean_field(layers.pass_up(visible), True, max_steps, tolerance)[1:]

    def variational_free_energy(
        self, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6
    ) -> Tensor:
        r"""Compute the variational free energy, an upper bound of F(v); shape of the batch.

        .. math:: E_q[E(v, h)] - H(q) \ge F(v)

        with q from :meth:`mean_field`. The means are held fixed in the gradient, since their own
        gradient is 0 at the fixed point.

        Args:
            visible: v, shape ``(*batch, n_0)``.
            max_steps: maximum number of mean-field sweeps.
            tolerance: tolerance of :meth:`mean_field`.
        """
        means = self.mean_field(visible, max_steps, tolerance)
        entropy = sum(Bernoulli(mean, validate_args=False).entropy().sum(-1) for mean in means)
        return self.layers().energy([visible, *means]) - entropy

    def variational_bound(self, visible: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r"""Compute a lower bound of the log-likelihood, shape of the batch.

        .. math:: \log p(v) \ge -E_q[E(v, h)] + H(q) - \log Z

        It is not a bound if log Z is an underestimate, as that of AIS is on average.

        Args:
            visible: v, shape ``(*batch, n_0)``.
            log_z: :math:`\log Z`; None enumerates (:meth:`log_partition`).
        """
        return -self.variational_free_energy(visible) - (
            self.log_partition() if log_z is None else log_z
        )

    def log_likelihood(
        self, visible: Tensor, log_z: float | Tensor | None = None, max_units: int = 20
    ) -> Tensor:
        r"""Compute :math:`\log p(v)` by a sum over all states of every second hidden layer.

        Events are evaluated one after the other.

        Args:
            visible: v, shape ``(*batch, n_0)``.
            log_z: :math:`\log Z`; None enumerates it.
            max_units: maximum number of hidden units to enumerate.

        Returns:
            shape of the batch.

        Raises:
            ValueError: if there are more units to enumerate.
        """
        flat = visible.reshape(-1, self.sizes[0])
        rows = [self._clamped(row) for row in flat]
        units = sum(rows[0].sizes[layer] for layer in rows[0].smaller_side()) if rows else 0
        if units > max_units:
            raise ValueError(
                f"log p(v) sums over 2^{units} states of the hidden units, more than"
                f" max_units={max_units} allows: bound it (variational_bound)"
            )
        values = torch.stack([row.log_partition() for row in rows]).reshape(visible.shape[:-1])
        return values - (self.log_partition() if log_z is None else log_z)

    def _clamped(self, visible: Tensor) -> Layers:
        """Return the hidden layers given one visible state."""
        layers = self.layers()
        offset = layers.energy([visible, *[torch.zeros_like(bias) for bias in layers.biases[1:]]])
        first = layers.biases[1] + visible @ layers.weights[0]
        return Layers(layers.weights[1:], (first, *layers.biases[2:]), None, offset)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw binary units from fair coins, and Gaussian visible units given those."""
        hidden = super().initial(num_chains, generator)
        layers = self.layers()
        if layers.precision is None:
            return hidden
        with torch.no_grad():
            parts = layers.split(hidden)
            return torch.cat([layers.draw(0, layers.field(0, parts), generator), *parts[1:]], -1)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"sizes={list(self.sizes)}, visible={self.visible!r}"
