"""A flow made symmetric, or its modes copied, by a finite group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroebm.core.energy import Energy
from pyroebm.core.rng import uniform
from pyroebm.flows.base import Drawn
from pyroebm.flows.flow import Flow
from pyroebm.flows.groups import multiplication_table

__all__ = ["Symmetrized"]


class Symmetrized(Flow):
    r"""A flow whose draws are moved by a random element of a finite group: :math:`x = g x_0`.

    .. math:: q(x, y) = \sum_{g \in G} \pi_g\, q_0(g^{-1} x, y)

    The elements are linear maps of determinant :math:`\pm 1`; redundant latents y stay as they are.
    The weights :math:`\pi` are

    * ``"uniform"``: q is invariant, :math:`q(g x) = q(x)`, whatever :math:`q_0` is.
    * ``"learned"``: for a target whose modes are images of each other but not of equal mass.

    A density costs G of :math:`q_0`. The noise has one entry more than (x, y): a uniform number
    that chooses g. No gradient reaches :math:`\pi` through that choice, so
    :meth:`forward_and_log_prob` holds it constant. :meth:`log_prob` of given points trains it, and
    so does :meth:`terms`, the reverse KL summed over the group
    (:class:`pyroebm.objectives.SymmetrizedKL`); Pyro's ELBOs fall back to the score function.

    Args:
        flow: :math:`q_0`; its parameters are shared, not copied.
        group: all elements, shape ``(G, d, d)``: see :mod:`pyroebm.flows.groups`.
        weights: ``"uniform"`` or ``"learned"``.
        dtype: to convert the flow to, in place; None leaves it.

    Raises:
        ValueError: if ``group`` is not a whole group of maps of :math:`R^d`, if ``weights`` is
            unknown, or if the flow is symmetrised already.

    Example:
        >>> from pyroebm.flows import NICE, sign_flips
        >>> flow = Symmetrized(NICE(2), sign_flips(2))
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
        >>> flow.log_prob(x).diff().detach()
        tensor([0.])
    """

    elements: Tensor
    taker: Tensor

    def __init__(
        self,
        flow: Flow,
        group: Tensor | Sequence[Any],
        weights: str = "uniform",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(flow, Symmetrized):
            raise ValueError(
                "flow is symmetrised already: give both groups' maps at once, generated_group()"
                " completes them"
            )
        if weights not in ("uniform", "learned"):
            raise ValueError(f"weights must be 'uniform' or 'learned', got weights={weights!r}")
        flow = flow if dtype is None else flow.to(dtype)
        elements = torch.as_tensor(group).to(flow.dtype).cpu()
        table = multiplication_table(elements)
        if elements.shape[-1] != flow.dim:
            raise ValueError(
                f"group must be of maps of the flow's dim={flow.dim} entries of x, got shape"
                f" {tuple(elements.shape)}"
            )
        super().__init__(
            list(flow.transform.parts), flow.dim, flow.total_dim, flow.conditional, flow.base
        )
        size = len(table)
        # the identity first: its summand is known when a draw is pushed
        identity = int((table == torch.arange(size)).all(1).nonzero())
        order = torch.tensor([identity, *(i for i in range(size) if i != identity)])
        table = order.argsort()[table[order][:, order]]
        self.register_buffer("elements", elements[order], persistent=False)
        # [g, k]: the number of h = g k^-1, which takes k x_0 to g x_0
        self.register_buffer("taker", table[:, (table == 0).int().argmax(1)], persistent=False)
        self.weights = weights
        self.logits = (
            nn.Parameter(torch.zeros(size, dtype=flow.dtype)) if weights == "learned" else None
        )
        self.to(flow.device)

    def log_weights(self) -> Tensor:
        r""":math:`\log \pi`, with the identity first, shape ``(G,)``."""
        if self.logits is None:
            return self.elements.new_full((len(self.elements),), -math.log(len(self.elements)))
        return self.logits.log_softmax(0)

    def rsample_base(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_samples`` draws of z and of the uniform number that chooses g, shape ``(n, D +
        1)``."""
        z = super().rsample_base(num_samples, generator)
        return torch.cat((z, uniform((num_samples, 1), generator, z.dtype, z.device)), dim=-1)

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""(x, y) and :math:`\log q(x, y)`, :math:`\pi` held constant: ``(*batch, D + 1) ->
        (*batch, D), (*batch)``."""
        self._check(z, "z", self.total_dim + 1)
        xy, log_q = super().forward_and_log_prob(z[..., :-1])
        log_pi = self.log_weights().detach()
        # the last sum may be rounded to below the uniform number
        g = (z[..., -1:] > log_pi.exp().cumsum(0)).sum(-1, keepdim=True).clamp(max=len(log_pi) - 1)
        return self._images(xy, self.elements[g]).squeeze(-2), self._log_density(
            xy, log_q, g, log_pi
        ).squeeze(-1)

    def log_prob(self, xy: Tensor) -> Tensor:
        r""":math:`\log q(x, y)`, through G inverses: ``(*batch, D) -> (*batch)``."""
        self._check(xy, "xy", self.total_dim)
        identity = torch.zeros(*xy.shape[:-1], 1, dtype=torch.int64, device=xy.device)
        return self._log_density(xy, super().log_prob(xy), identity, self.log_weights()).squeeze(-1)

    def terms(self, energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Summands of the reverse KL divergence (of :math:`J_R - \log C`), each summed over the
        group.

        .. math::

            \sum_g \pi_g
            \big(U(g x_0) - \log N(y_0 \mid M(g x_0), \Sigma(g x_0)) + \log q(g x_0, y_0)\big)

        Its mean over z is that of the same bracket over draws; its noise is smaller, and its
        gradient reaches :math:`\pi`.

        Args:
            energy: U.
            z: noise ``(n, D + 1)``, whose last entry is not used.

        Returns:
            the summands ``(n,)`` in nats; the extended energies, summed with the weights, ``(n,)``;
            the images ``(n, G, D)``.
        """
        self._check(z, "z", self.total_dim + 1)
        xy, log_q = super().forward_and_log_prob(z[..., :-1])
        log_pi = self.log_weights()
        every = torch.arange(len(log_pi), device=z.device).expand(*xy.shape[:-1], -1)
        images = self._images(xy, self.elements)
        extended = (log_pi.exp() * self.extend(energy)(images)).sum(-1)
        return (
            extended + (log_pi.exp() * self._log_density(xy, log_q, every, log_pi)).sum(-1),
            extended,
            images,
        )

    def _images(self, xy: Tensor, elements: Tensor) -> Tensor:
        """(g x, y) for m elements, the same for all rows or each row's own: ``(*batch, D) ->
        (*batch, m, D)``."""
        x = (elements @ xy[..., None, : self.dim, None]).squeeze(-1)
        return torch.cat((x, xy[..., None, self.dim :].expand(*x.shape[:-1], -1)), dim=-1)

    def _log_density(self, xy: Tensor, log_q: Tensor, g: Tensor, log_pi: Tensor) -> Tensor:
        """log q(g x, y) at elements g ``(*batch, m)``, where log q_0(x, y) is known: ``(*batch,
        m)``."""
        others = super().log_prob(self._images(xy, self.elements[1:]))
        # log q_0(k x, y), (*batch, 1, G)
        summands = torch.cat((log_q.unsqueeze(-1), others), dim=-1).unsqueeze(-2)
        if self.weights == "uniform":  # the same for every g
            return (summands + log_pi).logsumexp(-1).expand(g.shape)
        return (log_pi[self.taker[g]] + summands).logsumexp(-1)

    def forward(self, stl: bool = False) -> dist.Distribution:
        """The joint Pyro distribution over (x, y), event shape ``(D,)``; not reparameterised where
        the weights are learned.

        Args:
            stl: as in :meth:`Flow.forward`; without effect where the weights are learned.
        """
        path = self.path_log_prob if stl else None
        reparameterised = self.weights == "uniform"
        return Drawn(
            lambda n: self.forward_and_log_prob(self.rsample_base(n))[0],
            self.log_prob,
            self.total_dim,
            path,
            reparameterised,
        )
