"""NICE for energies: a volume-preserving network, an invertible matrix, and redundant latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroebm.flows.base import Base, StandardNormal
from pyroebm.flows.coupling import AdditiveCoupling
from pyroebm.flows.flow import Flow
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.flows.networks import LOG_2PI, ConditionalGaussian

__all__ = ["NICE", "RedundantNICE"]


class RedundantNICE(Flow):
    r"""NICE with redundant latents: :math:`(x, y) = S F(z) + c`, z standard normal in :math:`R^D`.

    F is a chain of additive couplings (:class:`AdditiveCoupling`; Dinh, Krueger and Bengio, "NICE:
    Non-linear Independent Components Estimation", 2014), so its determinant is 1; S is an
    invertible matrix (:class:`PLULinear`):

    .. math:: \log q(x, y) = \log N(z \mid 0, I) - \log |\det S|

    A map that preserves volume carries the heights of the normal to x as they are, so it cannot fit
    most targets alone (D = d). With D > d the Gaussian of y given x may be wide where q(x) is high:
    the marginal of x becomes flexible.

    A fresh flow is :math:`(x, y) = z`, and its :math:`N(y \mid M(x), \Sigma(x))` is standard.

    Args:
        dim: d, entries of x (1 for a scalar energy).
        total_dim: D; equal to ``dim`` there are no latents, as in :class:`NICE`.
        num_layers: number of additive couplings, alternating; none where D = 1, which has nothing
            to couple.
        hidden_sizes: widths of the hidden layers of every network.
        shift: learn c; without it c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        base: density of z; None is the standard normal.
        dtype: of the parameters (default torch's).
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ValueError: if a number is out of range or an activation unknown.

    Example:
        >>> flow = RedundantNICE(dim=1, total_dim=2)
        >>> xy = flow().sample((5,))
        >>> xy.shape, flow.log_prob_x(xy[:, :1]).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        total_dim: int,
        num_layers: int = 6,
        hidden_sizes: Sequence[int] = (64, 64),
        shift: bool = True,
        *,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got num_layers={num_layers}")
        if not 1 <= dim <= total_dim:
            raise ValueError(
                f"dim and total_dim must satisfy 1 <= dim <= total_dim, got dim={dim},"
                f" total_dim={total_dim}"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        layers: list[Any] = [
            AdditiveCoupling(
                total_dim,
                flip=bool(k % 2),
                hidden_sizes=hidden_sizes,
                activation=activation,
                dtype=dtype,
                generator=generator,
            )
            for k in range(num_layers if total_dim > 1 else 0)
        ]
        layers.append(PLULinear(torch.eye(total_dim, dtype=dtype)))
        if shift:
            layers.append(Shift(torch.zeros(total_dim, dtype=dtype)))
        conditional = None
        if total_dim > dim:
            conditional = ConditionalGaussian(
                dim,
                total_dim - dim,
                hidden_sizes,
                activation=activation,
                dtype=dtype,
                generator=generator,
            )
        super().__init__(layers, dim, total_dim, conditional, base)

    @property
    def linear(self) -> PLULinear:
        """The layer of S."""
        return next(part for part in self.transform.parts if isinstance(part, PLULinear))

    def log_abs_det(self) -> Tensor:
        r""":math:`\log|\det S|`, that of the whole map z to (x, y), a scalar."""
        return self.linear.log_abs_det()

    def joint_entropy(self) -> Tensor:
        r"""Entropy of (x, y) in nats: :math:`\log|\det S| + \tfrac D2 (1 + \log 2\pi)`, a scalar.

        Raises:
            NotImplementedError: for a base other than the standard normal.
        """
        if not isinstance(self.base, StandardNormal):
            raise NotImplementedError(
                "the entropy has a closed form for the standard normal base alone, got"
                f" {type(self.base).__name__}: average"
                " -log_prob over draws"
            )
        return self.log_abs_det() + 0.5 * self.total_dim * (1.0 + LOG_2PI)

    def entropy(self) -> Tensor:
        r"""Entropy of x in nats, :math:`\log|\det S| + H(z)`, a scalar: for D = d.

        Raises:
            NotImplementedError: for D > d, where x is a marginal of the flow and only the joint has
                a closed form.
        """
        if self.total_dim > self.dim:
            raise NotImplementedError(
                f"H(x) = log|det S| + H(z) holds for total_dim = dim; here dim={self.dim},"
                f" total_dim={self.total_dim}: x is a"
                " marginal of the flow. joint_entropy() is that of (x, y); average -log_prob_x(x)"
                " over draws for that of x"
            )
        return self.joint_entropy()


class NICE(RedundantNICE):
    r"""NICE for an energy: :math:`x = S F(z) + c`, the case D = d of :class:`RedundantNICE`, with
    the same methods.

    .. math:: \log q(x) = \log N(z \mid 0, I) - \log|\det S|, \qquad H(x) = \log|\det S| + H(z)

    In one dimension there is nothing to couple: x = S z + c is a Gaussian.

    Args:
        dim: d, entries of x.
        num_layers: number of additive couplings, alternating; none where d = 1.
        hidden_sizes: widths of their networks' hidden layers.
        shift: learn c; without it c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        base: density of z; None is the standard normal.
        dtype: of the parameters (default torch's).
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ValueError: if a number is out of range or an activation unknown.

    Example:
        >>> flow = NICE(dim=3)
        >>> flow.entropy().detach()
        tensor(4.2568)
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_sizes: Sequence[int] = (64, 64),
        shift: bool = True,
        *,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            dim,
            dim,
            num_layers,
            hidden_sizes,
            shift,
            activation=activation,
            base=base,
            dtype=dtype,
            generator=generator,
        )
