"""Additive coupling, the volume-preserving layer of NICE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroebm.flows.bijection import Bijection, check_event, vector_jacobian
from pyroebm.nn.mlp import mlp

__all__ = ["AdditiveCoupling"]


class AdditiveCoupling(Bijection):
    r"""Additive coupling layer (Dinh, Krueger and Bengio, 2014).

    One part of z is unchanged and determines the shift of the other:

    .. math:: x_a = z_a, \qquad x_b = z_b + m(z_a), \qquad \log|\det \partial x / \partial z| = 0.

    Args:
        dim: D, number of entries of z and of x, at least 2.
        net: the conditioner m, a module ``(*batch, |a|) -> (*batch, |b|)``; None is an MLP whose
            last layer is initially zero.
        flip: if False, a is the first ``dim // 2`` entries and b the others; if True, a is the
            others. Layers alternate.
        hidden_sizes: widths of the hidden layers of the default conditioner.
        activation: ``"silu"`` or ``"tanh"``, of the default conditioner.
        dtype: dtype of the default conditioner.
        generator: source of the initial weights of the default conditioner.

    Raises:
        ValueError: if ``dim`` < 2; when called, if the last dimension is not ``dim``, or m(z_a) and
            z_b differ in shape or dtype.

    Example:
        >>> layer = AdditiveCoupling(2, net=nn.Identity())
        >>> layer(torch.tensor([[1.0, 10.0]]))
        tensor([[ 1., 11.]])
        >>> layer.inv(torch.tensor([[1.0, 11.0]]))
        tensor([[ 1., 10.]])
    """

    def __init__(
        self,
        dim: int,
        net: nn.Module | None = None,
        *,
        flip: bool = False,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2 for a coupling of two parts, got dim={dim}")
        super().__init__(dim)
        self.flip = flip
        self.cut = dim // 2
        passing, moved = (dim - self.cut, self.cut) if flip else (self.cut, dim - self.cut)
        self.net = (
            mlp(
                passing,
                moved,
                hidden_sizes,
                activation=activation,
                dtype=dtype,
                generator=generator,
            )
            if net is None
            else net
        )

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z_a, z_b and the shift of z_b."""
        check_event(z, self.dim)
        first, rest = z.split((self.cut, self.dim - self.cut), dim=-1)
        passing, moved = (rest, first) if self.flip else (first, rest)
        shift = self.net(passing)
        if shift.shape != moved.shape or shift.dtype != moved.dtype:
            raise ValueError(
                f"net must map {tuple(passing.shape)} to the shape and dtype of the shifted part,"
                f" {tuple(moved.shape)} and {moved.dtype}, but it gave {tuple(shift.shape)} and"
                f" {shift.dtype}"
            )
        return passing, moved, shift

    def _join(self, passing: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, passing) if self.flip else (passing, moved), dim=-1)

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        passing, moved, shift = self._parts(z)
        return self._join(passing, moved + shift), z.new_zeros(z.shape[:-1])

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        passing, moved, shift = self._parts(x)
        return self._join(passing, moved - shift), x.new_zeros(x.shape[:-1])

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, the log-determinant and the score at x, in closed form."""
        passing, moved, shift = self._parts(z)
        first, rest = score.split((self.cut, self.dim - self.cut), dim=-1)
        at_passing, at_moved = (rest, first) if self.flip else (first, rest)
        score_x = self._join(at_passing - vector_jacobian([at_moved], [shift], passing), at_moved)
        return self._join(passing, moved + shift), z.new_zeros(z.shape[:-1]), score_x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros: ``(*batch, D), (*batch, D) -> (*batch)``."""
        return x.new_zeros(x.shape[:-1])
