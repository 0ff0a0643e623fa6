"""Deep belief networks: a restricted Boltzmann machine above directed sigmoid layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from pyroebm.core._checks import check_counts, check_shape
from pyroebm.core.energy import Energy
from pyroebm.core.enumeration import all_bits
from pyroebm.core.saving import Saveable
from pyroebm.energies.layered import check_sizes, layer_names
from pyroebm.energies.rbm import BernoulliRBM

__all__ = ["BeliefJoint", "DeepBeliefNetwork"]

#: Maximum units of a hidden layer that :meth:`DeepBeliefNetwork.log_likelihood` enumerates.
MAX_ENUMERATED = 14


class DeepBeliefNetwork(Saveable):
    r"""Deep belief network with binary units (Hinton, Osindero and Teh, 2006).

    .. math::

        p(v, h_1, \ldots, h_L) = p(v \mid h_1) \cdots p(h_{L-2} \mid h_{L-1})\, p(h_{L-1}, h_L),
        \qquad p(h_{l-1} = 1 \mid h_l) = \sigma(W_l h_l + b_l)

    It is not a :class:`pyroebm.Energy` of v: :math:`p(v)` is a sum over all hidden states without
    closed form, even unnormalized. Its ``top`` is an energy, and so is :meth:`joint`, the energy
    over all units, whose log Z is that of the top. Each layer is an RBM: its W and visible biases b
    define the generative distribution, its W and hidden biases c the recognition distribution
    :math:`q(h_l \mid h_{l-1}) = \sigma(W^\top h_{l-1} + c)`.

    Args:
        sizes: units of each layer, the visible one first; at least two (a single RBM).
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Attributes:
        rbms: the layers as RBMs, the lowest first; the last one is ``top``.

    Raises:
        ValueError: if there are fewer than two layers or a size is below 1.

    Example:
        >>> network = DeepBeliefNetwork([4, 3])
        >>> network.grow(4)  # tied: starts from the transposed weights of the layer below
        >>> v = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
        >>> torch.allclose(network.log_likelihood(v), network.rbms[0].log_likelihood(v), atol=1e-5)
        True
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must have at least two layers, got sizes={list(sizes)}")
        check_sizes("DeepBeliefNetwork", **{f"sizes[{k}]": size for k, size in enumerate(sizes)})
        self.rbms = nn.ModuleList(
            [
                BernoulliRBM(a, b, dtype=dtype, generator=generator)
                for a, b in itertools.pairwise(sizes)
            ]
        )

    @property
    def sizes(self) -> list[int]:
        """Number of units of each layer."""
        return [
            len(self.rbm(0).visible_bias),
            *(len(self.rbm(k).hidden_bias) for k in range(len(self.rbms))),
        ]

    @property
    def top(self) -> BernoulliRBM:
        """The undirected layer, an energy over the layer below it."""
        return self.rbm(-1)

    def rbm(self, k: int) -> BernoulliRBM:
        """Return layer k, counted from the visible one; -1 is the top."""
        rbm = self.rbms[k]
        if not isinstance(rbm, BernoulliRBM):
            raise ValueError(f"rbms[{k}] must be a BernoulliRBM, got {type(rbm).__name__}")
        return rbm

    def grow(
        self, num_hidden: int, tied: bool = True, generator: torch.Generator | None = None
    ) -> None:
        r"""Add a new RBM on top.

        Args:
            num_hidden: number of its hidden units.
            tied: whether to start from the transposed weights and swapped biases of the RBM below,
                which does not change the likelihood (Hinton, Osindero and Teh, 2006);
                ``num_hidden`` must then be the number of visible units of that RBM.
            generator: source of weights that are not tied; None for torch's default one.

        Raises:
            ValueError: if ``tied`` and ``num_hidden`` is another number.
        """
        below = self.top
        visible, hidden = below.weight.shape
        if tied and num_hidden != visible:
            raise ValueError(
                f"num_hidden must be {visible}, the visible units of the top RBM, if tied=True, got"
                f" num_hidden={num_hidden}; use tied=False for another number"
            )
        start = {"weight": below.weight.mT, "hidden_bias": below.visible_bias} if tied else {}
        fresh = BernoulliRBM(
            hidden,
            num_hidden,
            visible_bias=below.hidden_bias,
            dtype=below.dtype,
            generator=generator,
            **start,
        )
        self.rbms.append(fresh.to(below.device))

    def means_up(self, visible: Tensor) -> Tensor:
        """Return the recognition means of the top's visible layer, on which the top is trained.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
        """
        mean = visible
        for k in range(len(self.rbms) - 1):
            mean = torch.sigmoid(mean @ self.rbm(k).weight + self.rbm(k).hidden_bias)
        return mean

    def down(self, hidden: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw the layers below the top given the top's visible layer.

        Args:
            hidden: states of the top's visible layer, shape ``(n, units)``.
            generator: source of randomness; None for torch's default one.

        Returns:
            the states of the layers, the visible one first, ``hidden`` last.
        """
        states = [hidden]
        for k in range(len(self.rbms) - 2, -1, -1):
            parts = self.rbm(k).layers()
            states.insert(0, parts.draw(0, parts.field(0, [None, states[0]]), generator))
        return states

    def sample(
        self, num_samples: int, generator: torch.Generator | None = None, num_steps: int = 1000
    ) -> Tensor:
        """Draw v: from the top, followed by one pass down, shape ``(num_samples, num_visible)``.

        The draws are exact if the top can be enumerated. Otherwise the top is sampled by Gibbs
        sampling, which starts from its visible biases.

        Args:
            num_samples: number of draws.
            generator: source of randomness; None for torch's default one.
            num_steps: number of Gibbs sweeps.
        """
        with torch.no_grad():
            if self.top.has_exact_draws:
                return self.down(self.top.sample(num_samples, generator), generator)[0]
            layers = self.top.layers()
            state = layers.draw(0, self.top.visible_bias.expand(num_samples, -1), generator)
            for _ in range(num_steps):
                hidden = layers.draw(1, layers.field(1, [state, None]), generator)
                state = layers.draw(0, layers.field(0, [None, hidden]), generator)
            return self.down(state, generator)[0]

    def log_weights(
        self, visible: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Return :math:`\log p^*(v, h) - \log q(h \mid v)` for draws of q, without log Z.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            num_samples: number of draws of q for each v.
            generator: source of randomness; None for torch's default one.

        Returns:
            shape ``(num_samples, *batch)``.
        """
        check_shape(type(self).__name__, visible, torch.Size(self.sizes[:1]))
        check_counts({"num_samples": 1}, num_samples)
        below, total = (
            visible.expand(num_samples, *visible.shape),
            torch.zeros((), dtype=visible.dtype, device=visible.device),
        )
        for k in range(len(self.rbms) - 1):
            rbm = self.rbm(k)
            parts = rbm.layers()
            field = parts.field(1, [below, None])
            above = parts.draw(1, field, generator)
            total = (
                total
                + _log_bernoulli(below, parts.field(0, [None, above]))
                - _log_bernoulli(above, field)
            )
            below = above
        return total - self.top(below)

    def variational_bound(
        self,
        visible: Tensor,
        log_z: float | Tensor | None = None,
        num_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Estimate the variational lower bound of :math:`\log p(v)`, shape of the batch.

        .. math:: \log p(v) \ge E_q[\log p^*(v, h) - \log q(h \mid v)] - \log Z

        It is the mean over draws of q, which is unbiased.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            log_z: log Z of the top; None enumerates its smaller layer.
            num_samples: number of draws of q for each v.
            generator: source of randomness; None for torch's default one.
        """
        return self.log_weights(visible, num_samples, generator).mean(0) - self._top_log_z(log_z)

    def importance_log_likelihood(
        self,
        visible: Tensor,
        log_z: float | Tensor | None = None,
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Estimate :math:`\log p(v)` by importance sampling, shape of the batch.

        .. math:: \log \frac1K \sum_k p(v, h_k) / q(h_k \mid v), \qquad h_k \sim q

        On average it is between the variational bound and :math:`\log p(v)`, and approaches the
        latter as K grows (Burda, Grosse and Salakhutdinov, 2016). The arguments are those of
        :meth:`variational_bound`.
        """
        weights = self.log_weights(visible, num_samples, generator)
        return weights.logsumexp(0) - math.log(num_samples) - self._top_log_z(log_z)

    def log_likelihood(self, visible: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r"""Compute :math:`\log p(v)` by sums over all states of the hidden layers below the top's.

        Args:
            visible: v, shape ``(*batch, num_visible)``.
            log_z: log Z of the top; None enumerates its smaller layer.

        Returns:
            shape of the batch.

        Raises:
            ValueError: if such a layer has more than 14 units.
        """
        wide = [size for size in self.sizes[1:-1] if size > MAX_ENUMERATED]
        if wide:
            raise ValueError(
                f"each hidden layer below the top must have at most {MAX_ENUMERATED} units to"
                f" enumerate log p(v), got {self.sizes[1:-1]}: bound it (variational_bound) or"
                " estimate it (importance_log_likelihood)"
            )
        if len(self.rbms) == 1:
            return -self.top(visible) - self._top_log_z(log_z)
        log_p = -self.top(all_bits(self.sizes[-2], dtype=visible.dtype, device=visible.device))
        for k in range(len(self.rbms) - 2, -1, -1):
            above = all_bits(self.sizes[k + 1], dtype=visible.dtype, device=visible.device)
            field = self.rbm(k).layers().field(0, [None, above])
            below = (
                visible
                if k == 0
                else all_bits(self.sizes[k], dtype=visible.dtype, device=visible.device)
            )
            conditional = below @ field.mT - softplus(field).sum(-1)  # (*batch, states above)
            log_p = torch.logsumexp(conditional + log_p, -1)
        return log_p - self._top_log_z(log_z)

    def _top_log_z(self, log_z: float | Tensor | None) -> float | Tensor:
        return self.top.log_partition() if log_z is None else log_z

    def joint(self) -> BeliefJoint:
        """Return the energy over all units, which shares the parameters."""
        return BeliefJoint(self)

    def forward(self, x: Tensor) -> Tensor:
        """Raise an error: a deep belief network has no energy of v.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a DeepBeliefNetwork is no energy of its visible units, whose probability is a sum over"
            " all hidden states; use joint(), top, variational_bound or importance_log_likelihood"
        )


class BeliefJoint(Energy):
    r"""Energy of all units of a deep belief network.

    .. math:: E = -\sum_l \log p(h_{l-1} \mid h_l) + E_{top}(h_{L-1}, h_L)

    Its log Z is that of the top, and its draws are those of the top with one pass down. Given the
    layers above and below, the units of a directed layer are dependent (explaining away), so there
    are no Gibbs blocks: :class:`pyroebm.Gibbs` draws one unit at a time.

    Args:
        network: the network; its parameters are shared.

    Attributes:
        spans: slice of each layer in the event, by name.
        num_visible: number of visible units.

    Example:
        >>> BeliefJoint(DeepBeliefNetwork([4, 3, 2])).spans
        {'visible': slice(0, 4, None), 'hidden1': slice(4, 7, None), 'hidden2': slice(7, 9, None)}
    """

    def __init__(self, network: DeepBeliefNetwork) -> None:
        sizes = network.sizes
        super().__init__((sum(sizes),), constraints.boolean)
        self.network = network
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.spans, self.num_visible = (
            dict(zip(layer_names(len(sizes)), spans, strict=True)),
            sizes[0],
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        parts = x.split(self.network.sizes, -1)
        total = self.network.top.layers().energy(parts[-2:])
        for k in range(len(parts) - 2):
            total = total - _log_bernoulli(
                parts[k], self.network.rbm(k).layers().field(0, [None, parts[k + 1]])
            )
        return total

    @property
    def log_z(self) -> float | None:
        """Log of the normalizing constant in nats, that of the top; None where it is not known."""
        return self.network.top.log_z

    @property
    def has_exact_draws(self) -> bool:
        """Whether the top has exact draws."""
        return self.network.top.has_exact_draws

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        with torch.no_grad():
            top = self.network.top.draw_layers(num_samples, generator)
            return torch.cat([*self.network.down(top[0], generator), *top[1:]], -1)


def _log_bernoulli(x: Tensor, field: Tensor) -> Tensor:
    r"""Return :math:`\sum_i \log p(x_i)` of binary units with logits ``field``.

    x may be real, since gradients in x use values between 0 and 1.
    """
    return (x * logsigmoid(field) + (1.0 - x) * logsigmoid(-field)).sum(-1)
