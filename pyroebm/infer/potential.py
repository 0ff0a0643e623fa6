"""A ``potential_fn`` of Pyro as an energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroebm.core.rowwise import RowwiseEnergy

__all__ = ["PotentialEnergy"]


class PotentialEnergy(RowwiseEnergy):
    """A ``potential_fn`` of Pyro as an energy over all chains.

    Pyro's function maps a dict of unconstrained tensors of one chain to a tensor of one element.

    Args:
        potential_fn: the potential.
        params: starting values, with a leading chain axis, which define names and shapes.
        transforms: maps from a site's own space to the unconstrained one, applied to the draws
            only.

    Raises:
        ValueError: if the result has not one element.
    """

    def __init__(
        self,
        potential_fn: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        transforms: Mapping[str, Any],
    ) -> None:
        super().__init__(
            {name: value.shape[1:] for name, value in params.items()}, next(iter(params.values()))
        )
        self.potential, self.transforms = potential_fn, transforms
        first = self.join(params)[0].detach()
        self.batch_by(torch.stack([first, 0.9 * first + 0.1]))

    def row_energy(self, u: Tensor) -> Tensor:
        """Compute the energy of one chain."""
        with pyro.validation_enabled(False), poutine.block():
            value = self.potential(self.split(u))
        if value.numel() != 1:
            raise ValueError(
                "potential_fn must return a tensor of one element, the potential energy of one"
                f" chain, got shape {tuple(value.shape)}; sum over the entries of the chain"
            )
        return value.reshape(())

    def _name(self) -> str:
        return "the potential_fn"

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Split states into sites in their own spaces."""
        parts = self.split(x)
        return {
            name: self.transforms[name].inv(part) if name in self.transforms else part
            for name, part in parts.items()
        }
