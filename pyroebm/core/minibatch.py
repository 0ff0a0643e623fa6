"""Energies that are sums over data, and their unbiased estimates from minibatches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.rng import subset

__all__ = ["MinibatchEnergy"]


class MinibatchEnergy(Energy):
    r"""A posterior: a prior and a sum over N data, with an unbiased estimate from a minibatch of n.

    .. math::

        E(x) = E_0(x) + \sum_{i=1}^N \ell(x, d_i), \qquad
        \hat E(x) = E_0(x) + \frac{N}{n} \sum_{i \in B} \ell(x, d_i)

    Args:
        prior: the energy :math:`E_0` of the parameters x; the posterior has its event
            shape and support.
        loss: :math:`(x, d) \mapsto \sum_i \ell(x, d_i)`, minus the log-likelihood of data ``(n,
            ...)`` summed over them, shape ``(*batch)`` for x of shape ``(*batch, *event)``.
        data: all N data, shape ``(N, ...)``.
        batch_size: n, from 1 to N.

    Raises:
        ValueError: if ``batch_size`` is not from 1 to N.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> data = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> loss = lambda x, d: 0.5 * ((d - x) ** 2).sum(-1)
        >>> energy = MinibatchEnergy(Gaussian(torch.zeros(1)), loss, data, batch_size=2)
        >>> energy(torch.zeros(1, 1)), energy.subsample(torch.Generator().manual_seed(0)).size
        (tensor([15.]), 2)
    """

    def __init__(
        self, prior: Energy, loss: Callable[[Tensor, Tensor], Tensor], data: Tensor, batch_size: int
    ) -> None:
        if not 1 <= batch_size <= len(data):
            raise ValueError(
                f"batch_size must be from 1 to the {len(data)} rows of data, got"
                f" batch_size={batch_size}"
            )
        super().__init__(prior.event_shape, prior.support)
        self.prior = prior
        self.loss = loss
        self.batch_size = batch_size
        self.register_buffer("data", data, persistent=False)
        self.data: Tensor
        self.total = len(data)

    @property
    def size(self) -> int:
        """Number of data that the energy sums over: N, or n for a minibatch."""
        return len(self.data)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.prior(x) + self.total / self.size * self.loss(x, self.data)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.prior.initial(num_chains, generator)

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the states as a dictionary of named variables."""
        return self.prior.named(x)

    def on(self, rows: Tensor) -> MinibatchEnergy:
        r"""Return :math:`\hat E` on the data numbered ``rows``, shape ``(n,)``."""
        part = MinibatchEnergy(self.prior, self.loss, self.data[rows], len(rows))
        part.total = self.total
        return part

    def subsample(self, generator: torch.Generator | None = None) -> MinibatchEnergy:
        r"""Return :math:`\hat E` on ``batch_size`` data drawn without replacement.

        All chains use the same minibatch.
        """
        return self.on(subset(self.size, self.batch_size, generator, self.data.device))
