"""Energies of events and hidden binary units that are coupled through deep features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, constraints
from torch.nn.functional import softplus

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy
from pyroebm.core.rng import standard_normal, uniform
from pyroebm.core.supports import event_sum
from pyroebm.core.wrappers import eval_mode
from pyroebm.energies.neural import warn_of_network

__all__ = ["FeatureLatentEnergy", "FeatureLatentJoint"]


class FeatureLatentEnergy(Energy):
    r"""Energy of events with hidden binary units, coupled through features :math:`f_\theta`.

    .. math::
        E(x, h) = x'x + h'W f_\theta(x) - c'h - b'x, \qquad
        F(x) = x'x - b'x - \sum_k \log\left(1 + e^{c_k - (W f_\theta(x))_k}\right)

    The energy of an event is the free energy F, in which the hidden units :math:`h \in \{0, 1\}^K`
    are summed out. Given x they are independent, :math:`p(h_k = 1 \mid x) = \sigma(c_k - (W
    f_\theta(x))_k)`; given h the entries of x are dependent, unless f acts on each entry alone.
    With f(x) = x and W in place of -W it is a Gaussian RBM of variance 1/2 (Welling, Rosen-Zvi and
    Hinton, "Exponential family harmoniums", 2004). Z is finite if the features grow no faster than
    :math:`|x|`. The events should have a variance of about 1/2, which is that of :math:`e^{-x'x}`.

    The gradient of the log-likelihood, in :math:`\theta`, W, b and c alike, is

    .. math:: \nabla \frac1n \sum_i \log p(x_i)
        = E_{p(x, h)}[\nabla E(x, h)] - \frac1n \sum_i E_{p(h \mid x_i)}[\nabla E(x_i, h)]

    and both terms are gradients of :meth:`expected_energy`.

    Args:
        features: f, a module ``(n, *event) -> (n, m)``; smooth, without batch normalization.
        event_shape: shape of one event.
        num_hidden: K.
        weight: W, shape ``(K, m)``; None draws entries of standard deviation :math:`1 / \sqrt m`.
        visible_bias: b, of ``event_shape``, in the unit of 1 / x; None for 0.
        hidden_bias: c, shape ``(K,)``; None for 0.
        generator: source of the initial W; None for torch's default one.

    Raises:
        ValueError: if ``num_hidden`` < 1, if the features are not vectors, or if a parameter has
            another shape.

    Warns:
        UserWarning: for batch normalization and for piecewise linear features, as
            :class:`~pyroebm.energies.NeuralEnergy`.

    Example:
        >>> energy = FeatureLatentEnergy(
        ...     nn.Sequential(nn.Linear(2, 8), nn.Tanh()), (2,), num_hidden=3
        ... )
        >>> x = torch.zeros(5, 2)
        >>> energy(x).shape, energy.hidden_given(x).event_shape, energy.joint().event_shape
        (torch.Size([5]), torch.Size([3]), torch.Size([5]))
    """

    def __init__(
        self,
        features: nn.Module,
        event_shape: Sequence[int],
        num_hidden: int,
        *,
        weight: Tensor | None = None,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(event_shape)
        check_counts({"num_hidden": 1}, num_hidden)
        self.features = features
        warn_of_network(features, self.support, scale=math.sqrt(0.5))
        like, m = self._reference(), self._num_features()
        if weight is None:
            weight = standard_normal(
                (num_hidden, m), generator, like.dtype, like.device
            ) / math.sqrt(m)
        start = {
            "weight": (weight, (num_hidden, m)),
            "visible_bias": (visible_bias, tuple(event_shape)),
        }
        for name, (value, shape) in (start | {"hidden_bias": (hidden_bias, (num_hidden,))}).items():
            given = torch.zeros(shape) if value is None else torch.as_tensor(value).detach()
            if tuple(given.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got shape {tuple(given.shape)}")
            self.register_parameter(
                name, nn.Parameter(given.to(like.device, like.dtype, copy=True))
            )

    weight: nn.Parameter
    visible_bias: nn.Parameter
    hidden_bias: nn.Parameter

    def _num_features(self) -> int:
        like = self._reference()
        with torch.no_grad(), eval_mode(self):
            probe: Tensor = self.features(
                torch.zeros(2, *self.event_shape, dtype=like.dtype, device=like.device)
            )
        if probe.dim() != 2 or len(probe) != 2:
            raise ValueError(
                f"features must map (n, *event_shape) to (n, m), got shape {tuple(probe.shape)}"
                " for n = 2"
            )
        return probe.shape[1]

    def hidden_logits(self, x: Tensor) -> Tensor:
        """Return the log-odds :math:`c - W f(x)` of the hidden units, shape ``(*batch, K)``."""
        batch = self.batch_shape(x)
        features: Tensor = self.features(x.reshape(-1, *self.event_shape))
        return (self.hidden_bias - features @ self.weight.mT).reshape(*batch, -1)

    def hidden_given(self, x: Tensor) -> Distribution:
        r"""Return :math:`p(h \mid x)`, with batch shape ``(*batch)`` and events ``(K,)``."""
        return Independent(Bernoulli(logits=self.hidden_logits(x)), 1)

    def quadratic(self, x: Tensor) -> Tensor:
        """Return :math:`x'x - b'x`, the term without hidden units, shape of the batch."""
        return event_sum(x * x - self.visible_bias * x, len(self.event_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.quadratic(x) - softplus(self.hidden_logits(x)).sum(-1)

    def expected_energy(self, x: Tensor) -> Tensor:
        r"""Return :math:`E_{p(h \mid x)}[E(x, h)]`, without a gradient in :math:`p(h \mid x)`.

        Its gradient in the parameters is :math:`E_{p(h \mid x)}[\nabla E(x, h)]`, which is that of
        the free energy. Its value is larger than the free energy by the entropy of the units.

        Args:
            x: events, shape ``(*batch, *event)``.
        """
        logits = self.hidden_logits(x)
        return self.quadratic(x) - (torch.sigmoid(logits).detach() * logits).sum(-1)

    def joint(self) -> FeatureLatentJoint:
        """Return the energy of events and hidden units together, which shares the parameters."""
        return FeatureLatentJoint(self)

    def marginal(self) -> FeatureLatentEnergy:
        """Return this energy, which is over events alone."""
        return self

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the density without hidden units, :math:`N(b / 2, 1/2)`."""
        noise = standard_normal((num_chains, *self.event_shape), generator, self.dtype, self.device)
        return 0.5 * self.visible_bias.detach() + math.sqrt(0.5) * noise


class FeatureLatentJoint(Energy):
    r"""Energy :math:`E(x, h)` of events and hidden units in one flat event.

    Only the hidden units can be drawn given the rest: :math:`p(x \mid h) \propto e^{b'x - x'x - h'W
    f(x)}` couples the coordinates of x through the features, and has no closed form. Sample x from
    :meth:`marginal` with a gradient-based kernel, then h given x.

    Args:
        energy: the energy over events; its parameters are shared.

    Attributes:
        blocks: slices of ``visible`` (the flattened event) and ``hidden``.

    Example:
        >>> joint = FeatureLatentEnergy(nn.Linear(2, 4), (2,), num_hidden=3).joint()
        >>> joint.blocks, joint.conditional("hidden", torch.zeros(6, 5)).event_shape
        ({'visible': slice(0, 2, None), 'hidden': slice(2, 5, None)}, torch.Size([3]))
    """

    blocks: Mapping[str, slice]

    def __init__(self, energy: FeatureLatentEnergy) -> None:
        d, hidden = math.prod(energy.event_shape), len(energy.hidden_bias)
        support = constraints.cat(
            [constraints.real, constraints.boolean], dim=-1, lengths=[d, hidden]
        )
        super().__init__((d + hidden,), support)
        self.energy = energy
        self.blocks = {"visible": slice(0, d), "hidden": slice(d, d + hidden)}

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Split joint states into events ``(*batch, *event)`` and hidden units ``(*batch, K)``."""
        batch = self.batch_shape(states)
        return states[..., self.blocks["visible"]].reshape(
            *batch, *self.energy.event_shape
        ), states[..., self.blocks["hidden"]]

    def forward(self, states: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        x, h = self.split(states)
        return self.energy.quadratic(x) - (h * self.energy.hidden_logits(x)).sum(-1)

    def conditional(self, block: str, states: Tensor) -> Distribution:
        r"""Return :math:`p(h \mid x)` for the block ``hidden``; the hidden entries are ignored.

        Args:
            block: ``"hidden"``.
            states: joint states, shape ``(chains, d + K)``.

        Raises:
            ValueError: for ``visible``, whose conditional has no closed form, and for unknown
                names.
        """
        if block == "visible":
            raise ValueError(
                "p(x | h) couples the coordinates of x through the features: it has no closed"
                " form. Sample marginal() with a gradient-based kernel, and then h given x"
            )
        if block != "hidden":
            raise ValueError(f"block must be one of {list(self.blocks)}, got block={block!r}")
        return self.energy.hidden_given(self.split(states)[0])

    def marginal(self) -> FeatureLatentEnergy:
        """Return the energy of events alone."""
        return self.energy

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        x = self.energy.initial(num_chains, generator)
        with torch.no_grad():
            p = torch.sigmoid(self.energy.hidden_logits(x))
        h = uniform(p.shape, generator, self.dtype, self.device) < p
        return torch.cat([x.reshape(num_chains, -1), h.to(x.dtype)], -1)
