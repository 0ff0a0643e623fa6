"""RealNVP: soft-clamped affine couplings and an affine layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyroebm.core._checks import check_counts
from pyroebm.flows.affine import AffineCoupling, coupling_masks
from pyroebm.flows.base import Base
from pyroebm.flows.flow import Flow
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.flows.networks import ConditionalGaussian

__all__ = ["RealNVP"]


class RealNVP(Flow):
    r"""RealNVP: affine couplings (Dinh, Sohl-Dickstein and Bengio, 2017).

    .. math:: (x, y) = S\, f_L \circ \dots \circ f_1(z) + c

    Layers are in pairs with complementary masks, so each pair transforms every entry. The masks of
    all pairs but the first are drawn at random, to couple all entries. Initially the flow is the
    scaled base.

    Args:
        dim: d, number of entries of x.
        num_layers: L, number of :class:`AffineCoupling` layers; none if D = 1.
        hidden_sizes: widths of the hidden layers of the conditioners.
        total_dim: D; None is d. If D > d there are auxiliary variables, as in
            :class:`RedundantNICE`.
        scale: initial S, times the identity.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial weights and the masks; None is torch's default generator.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> flow = RealNVP(2, num_layers=4, hidden_sizes=(16,))
        >>> flow.log_prob(torch.zeros(2)).detach()
        tensor(-1.8379)
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        total_dim: int | None = None,
        scale: float = 1.0,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"dim": 1, "num_layers": 0}, dim, num_layers)
        total = dim if total_dim is None else total_dim
        if total < dim:
            raise ValueError(
                f"dim and total_dim must satisfy 1 <= dim <= total_dim, got dim={dim},"
                f" total_dim={total}"
            )
        if not scale > 0.0:
            raise ValueError(f"scale must be positive, got scale={scale}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        net: dict[str, Any] = {
            "hidden_sizes": hidden_sizes,
            "activation": activation,
            "dtype": dtype,
            "generator": generator,
        }
        parts: list[Any] = []
        masks = coupling_masks(total, num_layers, generator)
        parts += [AffineCoupling(total, mask=passing, **net) for passing in masks]
        parts += [
            PLULinear(scale * torch.eye(total, dtype=dtype)),
            Shift(torch.zeros(total, dtype=dtype)),
        ]
        conditional = ConditionalGaussian(dim, total - dim, **net) if total > dim else None
        super().__init__(parts, dim, total, conditional, base)
