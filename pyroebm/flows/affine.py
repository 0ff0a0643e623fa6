"""Affine coupling with a soft-clamped scale, and a layer with logarithmic tails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroebm.flows.bijection import Bijection, check_event, vector_jacobian
from pyroebm.nn.mlp import mlp

__all__ = ["AffineCoupling", "Loft", "coupling_mask", "coupling_masks"]

#: largest log-scale of a layer, in nats
MAX_LOG_SCALE = 2.0


def coupling_mask(dim: int, mask: Sequence[bool] | Tensor | None = None) -> Tensor:
    """Return a mask of the entries that a coupling layer leaves unchanged, ``(D,)``.

    Args:
        dim: D.
        mask: D booleans; None is True for the first ``dim // 2`` entries.

    Raises:
        ValueError: if the mask has another size, or is all True or all False.

    Example:
        >>> coupling_mask(3)
        tensor([ True, False, False])
    """
    passing = torch.arange(dim) < dim // 2 if mask is None else torch.as_tensor(mask)
    if passing.dtype != torch.bool or passing.shape != (dim,) or not 0 < int(passing.sum()) < dim:
        raise ValueError(
            f"mask must be dim={dim} booleans, some True (unchanged) and some False (transformed),"
            f" got dtype {passing.dtype}, shape {tuple(passing.shape)} and {int(passing.sum())}"
            " True"
        )
    return passing


def coupling_masks(dim: int, num_layers: int, generator: torch.Generator | None) -> list[Tensor]:
    """Return masks of coupling layers in pairs, with shuffled entries in all pairs but the first.

    The layers of a pair have complementary masks, so each pair transforms every entry. Without
    shuffling the same entries would always be in the same part. In one dimension there is nothing
    to couple, and the list is empty.

    Args:
        dim: D.
        num_layers: number of masks.
        generator: source of the permutations; None is torch's default generator.
    """
    if dim < 2:
        return []
    passing, masks = coupling_mask(dim), []
    for k in range(num_layers):
        if k and k % 2 == 0 and dim > 2:
            passing = passing[torch.randperm(dim, generator=generator)]
        masks.append(passing if k % 2 == 0 else ~passing)
    return masks


class AffineCoupling(Bijection):
    r"""Affine coupling layer (Dinh, Sohl-Dickstein and Bengio, 2017).

    One part of z is unchanged and determines the scale and shift of the other:

    .. math::

        x_a = z_a, \qquad x_b = e^{r(z_a)} z_b + m(z_a), \qquad
        \log|\det \partial x/\partial z| = \sum_i r_i(z_a).

    The log-scale is clamped softly, :math:`r = c \tanh(s / c)` (Ardizzone et al., 2019) with c = 2
    nats, so a layer scales by at most :math:`e^2`.

    Args:
        dim: D, number of entries of z and of x, at least 2.
        net: the conditioner, a module ``(*batch, |a|) -> (*batch, 2 |b|)`` that returns s, then m;
            None is an MLP whose last layer is initially zero.
        mask: D booleans, True for the unchanged entries; None leaves the first ``dim // 2``
            unchanged.
        hidden_sizes: widths of the hidden layers of the default conditioner.
        activation: activation of the default conditioner.
        dtype: dtype of the default conditioner.
        generator: source of the initial weights of the default conditioner.

    Raises:
        ValueError: if ``dim`` < 2, or ``mask`` has another size or is all True or all False; when
            called, if the last dimension is not ``dim``, or the output of the conditioner has
            another shape or dtype.

    Example:
        >>> layer = AffineCoupling(2, net=nn.Linear(1, 2))
        >>> with torch.no_grad():
        ...     layer.net.weight.copy_(torch.tensor([[100.0], [0.0]])), layer.net.bias.fill_(0.0)
        ...     layer(torch.tensor([1.0, 1.0]))  # the scale is at most e^2
        (...)
        tensor([1.0000, 7.3891])
    """

    passing: Tensor
    moved: Tensor
    back: Tensor

    def __init__(
        self,
        dim: int,
        net: nn.Module | None = None,
        *,
        mask: Sequence[bool] | Tensor | None = None,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2 for a coupling of two parts, got dim={dim}")
        super().__init__(dim)
        passes = coupling_mask(dim, mask)
        passing, moved = passes.nonzero().squeeze(-1), (~passes).nonzero().squeeze(-1)
        # persistent, since the flow may have drawn the mask at random
        self.register_buffer("passing", passing)
        self.register_buffer("moved", moved)
        self.register_buffer("back", torch.cat((passing, moved)).argsort())
        sizes = (len(passing), 2 * len(moved))
        self.net = (
            mlp(*sizes, hidden_sizes, activation=activation, dtype=dtype, generator=generator)
            if net is None
            else net
        )

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return z_a, z_b, the clamped log-scale and the shift."""
        check_event(z, self.dim)
        passing, moved = z.index_select(-1, self.passing), z.index_select(-1, self.moved)
        out, expected = self.net(passing), (*moved.shape[:-1], 2 * moved.shape[-1])
        if out.shape != expected or out.dtype != z.dtype:
            raise ValueError(
                f"net must map {tuple(passing.shape)} to a scale and a shift of each transformed"
                f" entry, {expected} and {z.dtype}, but it gave {tuple(out.shape)} and {out.dtype}"
            )
        s, shift = out.chunk(2, dim=-1)
        return passing, moved, MAX_LOG_SCALE * torch.tanh(s / MAX_LOG_SCALE), shift

    def _join(self, passing: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((passing, moved), dim=-1).index_select(-1, self.back)

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        passing, moved, log_scale, shift = self._parts(z)
        return self._join(passing, moved * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        passing, moved, log_scale, shift = self._parts(x)
        return self._join(passing, (moved - shift) * (-log_scale).exp()), log_scale.sum(-1)

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, the log-determinant and the score at x, in closed form."""
        passing, moved, log_scale, shift = self._parts(z)
        at_passing, at_moved = (
            score.index_select(-1, self.passing),
            score.index_select(-1, self.moved),
        )
        with torch.no_grad():
            shrunk = at_moved * (-log_scale).exp()
            weights = (at_moved * moved + 1.0, shrunk)
        x = self._join(passing, moved * log_scale.exp() + shift)
        score_x = self._join(
            at_passing - vector_jacobian(weights, (log_scale, shift), passing), shrunk
        )
        return x, log_scale.sum(-1), score_x


class Loft(Bijection):
    r"""Log soft extension (LOFT), a layer with logarithmic tails (Andrade, 2024).

    .. math::

        x_i = \mathrm{sign}(z_i) \big(\log(\max(|z_i| - t, 0) + 1) + \min(|z_i|, t)\big), \qquad
        \log|\det \partial x/\partial z| = -\sum_i \log(\max(|z_i| - t, 0) + 1)

    It is the identity on :math:`[-t, t]` and logarithmic outside, and has no parameters. As the
    last layer it prevents single extreme draws from dominating the loss early in training. Its
    inverse grows as :math:`e^{|x| - t}`, so log densities far outside overflow to minus infinity.

    Args:
        dim: D.
        threshold: t > 0, larger than the typical size of the target's entries.

    Raises:
        ValueError: if ``dim`` < 1 or ``threshold`` is not positive.

    Example:
        >>> Loft(2, threshold=10.0)(torch.tensor([3.0, -1009.0]))
        tensor([  3.0000, -16.9078])
    """

    def __init__(self, dim: int, threshold: float = 100.0) -> None:
        if not (threshold > 0.0 and math.isfinite(threshold)):
            raise ValueError(f"threshold must be positive and finite, got threshold={threshold}")
        super().__init__(dim)
        self.threshold = float(threshold)

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(z, self.dim)
        inside, beyond = self._split(z)
        beyond = beyond.log1p()
        return torch.where(inside, z, z.sign() * (self.threshold + beyond)), -beyond.sum(-1)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(x, self.dim)
        inside, beyond = self._split(x)
        return torch.where(inside, x, x.sign() * (self.threshold + beyond.expm1())), -beyond.sum(-1)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return which entries are in [-t, t], and by how much the others exceed t.

        A NaN is outside and is kept. `where` is used because the gradient of `clamp` at its bound
        is 1 up to torch 2.13 and 0 after it.
        """
        inside = z.abs() <= self.threshold
        return inside, torch.where(inside, 0.0, z.abs() - self.threshold)
