"""A flow symmetrized by a finite group."""

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
    r"""A flow whose draws are transformed by a random element of a finite group, :math:`x = g x_0`.

    .. math:: q(x, y) = \sum_{g \in G} \pi_g\, q_0(g^{-1} x, y)

    The elements are linear maps of determinant :math:`\pm 1`; auxiliary variables y are unchanged.
    The weights :math:`\pi` are

    * ``"uniform"``: q is invariant, :math:`q(g x) = q(x)`, for any :math:`q_0`.
    * ``"learned"``: for a target whose modes are images of each other with different masses.

    A density costs G evaluations of :math:`q_0`. The noise has one more entry than (x, y), a
    uniform number that selects g. This selection has no gradient in :math:`\pi`, so
    :meth:`forward_and_log_prob` holds :math:`\pi` constant. It is trained through :meth:`log_prob`
    at given points, or :meth:`terms`, the reverse KL divergence summed over the group
    (:class:`pyroebm.objectives.SymmetrizedKL`); Pyro's ELBOs use the score function estimator.

    Args:
        flow: :math:`q_0`; its parameters are shared, not copied.
        group: all elements, shape ``(G, d, d)``, see :mod:`pyroebm.flows.groups`.
        weights: ``"uniform"`` or ``"learned"``.
        dtype: dtype to which the flow is converted, in place; None does not convert it.

    Raises:
        ValueError: if ``group`` is no complete group of maps of :math:`R^d`, ``weights`` is
            unknown, or the flow is symmetrized already.

    Example:
        >>> from pyroebm.flows import NICE, sign_flips
        >>> flow = Symmetrized(NICE(2), sign_flips(2))
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
        >>> flow.log_prob(x).diff().detach()
        tensor([0.])
    """

    elements: Tensor
    quotients: Tensor

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
                "flow must not be Symmetrized already: give the maps of both groups at once,"
                " completed by generated_group()"
            )
        if weights not in ("uniform", "learned"):
            raise ValueError(f"weights must be 'uniform' or 'learned', got weights={weights!r}")
        flow = flow if dtype is None else flow.to(dtype)
        elements = torch.as_tensor(group).to(flow.dtype).cpu()
        table = multiplication_table(elements)
        if elements.shape[-1] != flow.dim:
            raise ValueError(
                f"group must have shape (G, dim, dim) with the flow's dim={flow.dim} entries of x,"
                f" got shape {tuple(elements.shape)}"
            )
        super().__init__(
            list(flow.transform.parts), flow.dim, flow.total_dim, flow.conditional, flow.base
        )
        size = len(table)
        # the identity is first: its summand is known from the forward pass
        identity = int((table == torch.arange(size)).all(1).nonzero())
        order = torch.tensor([identity, *(i for i in range(size) if i != identity)])
        table = order.argsort()[table[order][:, order]]
        self.register_buffer("elements", elements[order], persistent=False)
        # [g, k]: the index of g k^-1
        self.register_buffer("quotients", table[:, (table == 0).int().argmax(1)], persistent=False)
        self.weights = weights
        self.logits = (
            nn.Parameter(torch.zeros(size, dtype=flow.dtype)) if weights == "learned" else None
        )
        self.to(flow.device)

    def log_weights(self) -> Tensor:
        r"""Return :math:`\log \pi`, with the identity first, shape ``(G,)``."""
        if self.logits is None:
            return self.elements.new_full((len(self.elements),), -math.log(len(self.elements)))
        return self.logits.log_softmax(0)

    def rsample_base(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw z and the uniform number that selects g, shape ``(num_samples, D + 1)``."""
        z = super().rsample_base(num_samples, generator)
        return torch.cat((z, uniform((num_samples, 1), generator, z.dtype, z.device)), dim=-1)

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Transform z, and compute the log density at the image, with :math:`\pi` held constant.

        Args:
            z: shape ``(*batch, D + 1)``.

        Returns:
            (x, y) ``(*batch, D)`` and :math:`\log q(x, y)` ``(*batch)``.
        """
        self._check(z, "z", self.total_dim + 1)
        xy, log_q = super().forward_and_log_prob(z[..., :-1])
        log_pi = self.log_weights().detach()
        # the last cumulative sum may be below the uniform number, by rounding
        g = (z[..., -1:] > log_pi.exp().cumsum(0)).sum(-1, keepdim=True).clamp(max=len(log_pi) - 1)
        return self._images(xy, self.elements[g]).squeeze(-2), self._log_density(
            xy, log_q, g, log_pi
        ).squeeze(-1)

    def log_prob(self, xy: Tensor) -> Tensor:
        r"""Compute :math:`\log q(x, y)` through G inverses: ``(*batch, D) -> (*batch)``."""
        self._check(xy, "xy", self.total_dim)
        identity = torch.zeros(*xy.shape[:-1], 1, dtype=torch.int64, device=xy.device)
        return self._log_density(xy, super().log_prob(xy), identity, self.log_weights()).squeeze(-1)

    def terms(self, energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the summands of the reverse KL divergence, summed over the group.

        .. math::

            \sum_g \pi_g
            \big(U(g x_0) - \log N(y_0 \mid M(g x_0), \Sigma(g x_0)) + \log q(g x_0, y_0)\big)

        Their mean over z is :math:`J_R - \log C`, as that of the bracket over draws. The variance
        is smaller, and there is a gradient in :math:`\pi`.

        Args:
            energy: U.
            z: noise ``(n, D + 1)``, whose last entry is not used.

        Returns:
            The summands ``(n,)`` in nats; the augmented energies, summed with the weights,
            ``(n,)``; the images ``(n, G, D)``.
        """
        self._check(z, "z", self.total_dim + 1)
        xy, log_q = super().forward_and_log_prob(z[..., :-1])
        log_pi = self.log_weights()
        all_elements = torch.arange(len(log_pi), device=z.device).expand(*xy.shape[:-1], -1)
        images = self._images(xy, self.elements)
        augmented = (log_pi.exp() * self.extend(energy)(images)).sum(-1)
        log_density = self._log_density(xy, log_q, all_elements, log_pi)
        return augmented + (log_pi.exp() * log_density).sum(-1), augmented, images

    def _images(self, xy: Tensor, elements: Tensor) -> Tensor:
        """Return (g x, y) for m elements, shared or one set for each row.

        Shapes are ``(*batch, D) -> (*batch, m, D)``.
        """
        x = (elements @ xy[..., None, : self.dim, None]).squeeze(-1)
        return torch.cat((x, xy[..., None, self.dim :].expand(*x.shape[:-1], -1)), dim=-1)

    def _log_density(self, xy: Tensor, log_q: Tensor, g: Tensor, log_pi: Tensor) -> Tensor:
        """Return log q(g x, y) at elements g ``(*batch, m)``, given log q_0(x, y)."""
        others = super().log_prob(self._images(xy, self.elements[1:]))
        # log q_0(k x, y), (*batch, 1, G)
        summands = torch.cat((log_q.unsqueeze(-1), others), dim=-1).unsqueeze(-2)
        if self.weights == "uniform":  # the same for every g
            return (summands + log_pi).logsumexp(-1).expand(g.shape)
        return (log_pi[self.quotients[g]] + summands).logsumexp(-1)

    def forward(self, stl: bool = False) -> dist.Distribution:
        """Return the joint Pyro distribution of (x, y), event shape ``(D,)``.

        It is not reparameterized if the weights are learned.

        Args:
            stl: as in :meth:`Flow.forward`; it has no effect if the weights are learned.
        """
        path = self.path_log_prob if stl else None
        has_rsample = self.weights == "uniform"
        return Drawn(
            lambda n: self.forward_and_log_prob(self.rsample_base(n))[0],
            self.log_prob,
            self.total_dim,
            path,
            has_rsample,
        )
