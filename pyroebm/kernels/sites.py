"""Helpers of kernels on discrete supports: a flat event as sites with K values each."""

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
    """Kernel on a discrete support: bits, spins, one-hot vectors or bounded integers.

    Example:
        >>> from pyroebm.kernels import Gibbs
        >>> isinstance(Gibbs(), DiscreteKernel)
        True
    """

    discrete: ClassVar[bool] = True

    def check_start(self, energy: Energy, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a batch of positions in the support of the energy."""
        super().check_start(energy, x)
        outside = ~inside(energy.support, x, len(energy.event_shape))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"x must lie in support={energy.support}: {int(outside.sum())} of {len(x)} rows do"
                f" not, the first is row {row} with {x[row].tolist()}; start from"
                " energy.initial(n)"
            )


def values_of(energy: Energy, x: Tensor) -> Tensor:
    """Return the K values of one site, ``(K, width)``, in the dtype and on the device of ``x``."""
    return site_values(energy.support, energy.event_shape, x.dtype, x.device)


def to_sites(x: Tensor, values: Tensor) -> Tensor:
    """Reshape ``(chains, *event)`` to ``(chains, sites, width)``."""
    return x.reshape(len(x), -1, values.shape[1])


def squared_distances(x: Tensor, values: Tensor) -> Tensor:
    """Compute squared distances of sites ``(chains, sites, width)`` to the values.

    The shape is ``(chains, K, sites)``; the distance to the current value is exactly 0.
    """
    return (x**2).sum(2).unsqueeze(1) - 2.0 * values @ x.mT + (values**2).sum(1, keepdim=True)


def draw_index(p: Tensor, noise: Tensor) -> Tensor:
    """Draw categories along dimension 1 by the inverse CDF.

    Args:
        p: probabilities, not necessarily normalized, shape ``(chains, K, ...)``.
        noise: uniform numbers, shape ``(chains, ...)``.
    """
    # Scale by the total, so that a category of probability 0 is never drawn, not even the last.
    cdf = p.cumsum(1)
    return (noise.unsqueeze(1) * cdf[:, -1:] >= cdf[:, :-1]).sum(1)
