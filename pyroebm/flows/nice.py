"""NICE: a volume-preserving network and an invertible matrix, with auxiliary variables."""

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
    r"""NICE with auxiliary variables y (redundant latent variables).

    .. math:: (x, y) = S F(z) + c, \qquad \log q(x, y) = \log N(z \mid 0, I) - \log |\det S|

    F is a composition of additive couplings (:class:`AdditiveCoupling`; Dinh, Krueger and Bengio,
    2014), with determinant 1; S is an invertible matrix (:class:`PLULinear`); z is standard normal
    in :math:`R^D`.

    A volume-preserving map does not change the values of the density, so for D = d it cannot fit
    most targets. For D > d the marginal of x is flexible: the conditional of y given x can be wide
    where q(x) is large.

    Initially :math:`(x, y) = z`, and :math:`N(y \mid M(x), \Sigma(x))` is the standard normal.

    Args:
        dim: d, number of entries of x (1 for a scalar energy).
        total_dim: D; if it equals ``dim`` there are no auxiliary variables, as in :class:`NICE`.
        num_layers: number of additive couplings, alternating; none if D = 1.
        hidden_sizes: widths of the hidden layers of every network.
        shift: whether to learn c; otherwise c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
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
            raise ValueError(f"num_layers must be nonnegative, got num_layers={num_layers}")
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
        """The layer with the matrix S."""
        return next(part for part in self.transform.parts if isinstance(part, PLULinear))

    def log_abs_det(self) -> Tensor:
        r"""Return :math:`\log|\det S|`, that of the whole map from z to (x, y), a scalar."""
        return self.linear.log_abs_det()

    def joint_entropy(self) -> Tensor:
        r"""Return the entropy of (x, y) in nats, :math:`\log|\det S| + \tfrac D2 (1 + \log 2\pi)`.

        Raises:
            NotImplementedError: if the base is not the standard normal.
        """
        if not isinstance(self.base, StandardNormal):
            raise NotImplementedError(
                "the entropy has a closed form for the standard normal base alone, got"
                f" {type(self.base).__name__}: average -log_prob over draws"
            )
        return self.log_abs_det() + 0.5 * self.total_dim * (1.0 + LOG_2PI)

    def entropy(self) -> Tensor:
        r"""Return the entropy of x in nats, :math:`\log|\det S| + H(z)`, for D = d.

        Raises:
            NotImplementedError: if D > d, where only the entropy of (x, y) has a closed form.
        """
        if self.total_dim > self.dim:
            raise NotImplementedError(
                "the entropy of x has a closed form for total_dim = dim alone, got"
                f" dim={self.dim}, total_dim={self.total_dim}: joint_entropy() is that of (x, y);"
                " for that of x average -log_prob_x(x) over draws"
            )
        return self.joint_entropy()


class NICE(RedundantNICE):
    r"""NICE without auxiliary variables: :class:`RedundantNICE` with D = d.

    .. math:: x = S F(z) + c, \qquad \log q(x) = \log N(z \mid 0, I) - \log|\det S|, \qquad
        H(x) = \log|\det S| + H(z)

    In one dimension there is nothing to couple, and x = S z + c is normal.

    Args:
        dim: d, number of entries of x.
        num_layers: number of additive couplings, alternating; none if d = 1.
        hidden_sizes: widths of the hidden layers of their networks.
        shift: whether to learn c; otherwise c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
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
