"""What kernels on discrete supports share: a flat event as sites, each of which takes one of K
values."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.core.supports import inside, site_values
from pyroebm.kernels.base import Kernel, S

__all__ = ["DiscreteKernel", "draw_index", "squared_distances", "to_sites", "values_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteKernel(Kernel[S]):
    """A kernel that moves on a discrete support itself: bits, spins, one-hot rows, bounded
    integers.

    Example:
        >>> from pyroebm.kernels import Gibbs
        >>> isinstance(Gibbs(), DiscreteKernel)
        True
    """

    discrete: ClassVar[bool] = True

    def check_start(self, energy: Energy, x: Tensor) -> None:
        super().check_start(energy, x)
        outside = ~inside(energy.support, x, len(energy.event_shape))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"x must lie in support={energy.support}: {int(outside.sum())} of {len(x)} rows do"
                f" not, the first is row {row}"
                f" with {x[row].tolist()}; start from energy.initial(n)"
            )


def values_of(energy: Energy, x: Tensor) -> Tensor:
    """The K values of one site, ``(K, width)``, in the dtype and on the device of ``x``."""
    return site_values(energy.support, energy.event_shape, x.dtype, x.device)


def to_sites(x: Tensor, values: Tensor) -> Tensor:
    """``(chains, *event)`` as ``(chains, sites, width)``."""
    return x.reshape(len(x), -1, values.shape[1])


def squared_distances(x: Tensor, values: Tensor) -> Tensor:
    """Squared distances of sites ``(chains, sites, width)`` to the values: ``(chains, K, sites)``;
    exactly 0 at a site's own."""
    return (x**2).sum(2).unsqueeze(1) - 2.0 * values @ x.mT + (values**2).sum(1, keepdim=True)


def draw_index(p: Tensor, noise: Tensor) -> Tensor:
    """Categories along dimension 1 by inverse CDF: ``p (chains, K, ...)``, uniform ``noise (chains,
    ...)``."""
    # scaled by its own end, so that a category of probability 0 is never drawn, the last one
    # neither
    cdf = p.cumsum(1)
    return (noise.unsqueeze(1) * cdf[:, -1:] >= cdf[:, :-1]).sum(1)
