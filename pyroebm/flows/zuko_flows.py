"""Spline, autoregressive and continuous flows with layers of zuko."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm.core._checks import check_counts
from pyroebm.flows.adapters import installed_zuko, reversed_layer, zuko_layer
from pyroebm.flows.affine import coupling_masks
from pyroebm.flows.base import Base
from pyroebm.flows.flow import Flow
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.nn.mlp import ACTIVATIONS

__all__ = ["AutoregressiveFlow", "ContinuousFlow", "SplineFlow"]

#: interval [-B, B] on which splines act, in units of the base: zuko's default
BOUND = 5.0


def _affine_end(dim: int, scale: float, dtype: torch.dtype) -> list[Any]:
    if not (scale > 0.0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got scale={scale}")
    return [PLULinear(scale * torch.eye(dim, dtype=dtype)), Shift(torch.zeros(dim, dtype=dtype))]


def _activation(name: str) -> Callable[[], nn.Module]:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got activation={name!r}"
        )
    return ACTIVATIONS[name]


@functools.cache
def _spline() -> Any:
    """Return zuko's spline with inverses that are finite despite rounding."""

    class Spline(installed_zuko().transforms.MonotonicRQSTransform):  # type: ignore[misc]
        """Rational-quadratic spline; the discriminant of its inverse is not negative."""

        def _inverse(self, y: Tensor) -> Tensor:
            mask, x0, x1, y0, y1, d0, d1, s = self.bin(self.searchsorted(self.vertical, y) - 1)
            height, above = y1 - y0, torch.where(mask, y - y0, 0.0)
            bend = above * (d0 + d1 - 2 * s)
            a = height * (s - d0) + bend
            b = height * d0 - bend
            c = -s * above
            # In float32 it is negative in one of thousands of rows. The square root has no
            # derivative at 0. A NaN stays NaN.
            square = b**2 - 4 * a * c
            root = torch.where(square <= 0.0, torch.finfo(y.dtype).tiny, square).sqrt()
            return torch.where(mask, x0 + 2 * c / (-b - root) * (x1 - x0), y)

    return Spline


class SplineFlow(Flow):
    r"""Neural spline flow (Durkan, Bekasov, Murray and Papamakarios, 2019), with layers of zuko.

    .. math:: x = S\, f_L \circ \dots \circ f_1(z) + c

    Each :math:`f_l` is a coupling with rational-quadratic splines, which are monotone maps of
    :math:`[-5, 5]` onto itself and the identity outside. Outside the density is that of the base:
    **modes beyond** ``5 * scale`` **cannot be fitted until S and c have grown.** Choose ``scale``
    such that the target lies within.

    Args:
        dim: d.
        num_layers: L.
        hidden_sizes: widths of the hidden layers of the conditioners.
        num_bins: number of bins of each spline.
        scale: initial S, times the identity.
        autoregressive: whether each entry depends on all previous ones, as in zuko's NSF; the
            inverse then costs d evaluations instead of one.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial weights and the masks; None is torch's default generator.

    Raises:
        ImportError: if zuko is not installed.
        ValueError: if an argument is out of range.

    Example:
        >>> xy, log_q = (flow := SplineFlow(2, num_layers=2)).forward_and_log_prob(
        ...     torch.zeros(3, 2)
        ... )
        >>> xy.shape, log_q.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        num_bins: int = 8,
        scale: float = 1.0,
        autoregressive: bool = False,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"dim": 1, "num_layers": 1, "num_bins": 2}, dim, num_layers, num_bins)
        zuko = installed_zuko()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        common: dict[str, Any] = {
            "univariate": functools.partial(_spline(), bound=BOUND),
            "shapes": [(num_bins,), (num_bins,), (num_bins - 1,)],
        }
        if dim > 1:
            common |= {
                "hidden_features": tuple(hidden_sizes),
                "activation": _activation(activation),
            }
        parts: list[Any] = []
        masks = coupling_masks(dim, num_layers, generator)
        for k in range(num_layers):
            if autoregressive:
                order = torch.arange(dim) if k % 2 == 0 else torch.arange(dim).flip(0)
                make, own = (
                    zuko.flows.autoregressive.MaskedAutoregressiveTransform,
                    {"order": order},
                )
            else:
                make, own = (
                    zuko.flows.coupling.GeneralCouplingTransform,
                    {"mask": masks[k]} if dim > 1 else {},
                )
            parts.append(zuko_layer(make, dim, generator, dtype, **common, **own))
        super().__init__(parts + _affine_end(dim, scale, dtype), dim, dim, base=base)


class AutoregressiveFlow(Flow):
    r"""Autoregressive flow with masked layers of zuko.

    .. math:: x_i = e^{r_i(z_{<i})} z_i + m_i(z_{<i})

    With ``fast="draw"`` a draw and its density take one evaluation, and the density at a given x
    takes d evaluations (inverse autoregressive flow; Kingma et al., 2016): use it for the reverse
    KL divergence. With ``fast="density"`` it is the other way round (masked autoregressive flow;
    Papamakarios, Pavlakou and Murray, 2017): use it for training on samples. The order of the
    entries is reversed in every second layer.

    Args:
        dim: d.
        num_layers: number of layers.
        hidden_sizes: widths of the hidden layers of the networks.
        fast: ``"draw"`` or ``"density"``.
        scale: initial matrix of the final affine layer, times the identity.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ImportError: if zuko is not installed.
        ValueError: if an argument is out of range.

    Example:
        >>> AutoregressiveFlow(3, num_layers=2, hidden_sizes=(8,)).log_prob(torch.zeros(3)).detach()
        tensor(-2.7568)
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 4,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        fast: str = "draw",
        scale: float = 1.0,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"dim": 1, "num_layers": 1}, dim, num_layers)
        if fast not in ("draw", "density"):
            raise ValueError(f"fast must be 'draw' or 'density', got fast={fast!r}")
        zuko = installed_zuko()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        common: dict[str, Any] = {}
        if dim > 1:
            common = {"hidden_features": tuple(hidden_sizes), "activation": _activation(activation)}
        parts: list[Any] = []
        for k in range(num_layers):
            order = torch.arange(dim) if k % 2 == 0 else torch.arange(dim).flip(0)
            make = zuko.flows.autoregressive.MaskedAutoregressiveTransform
            layer = zuko_layer(make, dim, generator, dtype, order=order, **common)
            parts.append(layer if fast == "draw" else reversed_layer(layer))
        super().__init__(parts + _affine_end(dim, scale, dtype), dim, dim, base=base)


class ContinuousFlow(Flow):
    r"""Continuous flow (Chen et al., 2018; FFJORD, Grathwohl et al., 2019), with layers of zuko.

    .. math:: \dot u = f(u, t), \quad u(0) = z, \quad x = S u(1) + c, \qquad
        \log|\det \partial u(1)/\partial z| = \int_0^1 \mathrm{tr}\, \frac{\partial f}{\partial u}\,
        dt

    The trace is exact. Densities, inverses and gradients have an error within the tolerance of the
    adaptive solver. Rows of a batch share its steps, so within this tolerance a row depends on the
    others. There are no second derivatives.

    Args:
        dim: d.
        hidden_sizes: widths of the hidden layers of f.
        num_frequencies: number of frequencies of the sines and cosines of t, inputs of f.
        atol: absolute tolerance of the solver.
        rtol: relative tolerance of the solver.
        scale: initial S, times the identity.
        activation: a smooth one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ImportError: if zuko is not installed.
        ValueError: if an argument is out of range.

    Example:
        >>> ContinuousFlow(2, hidden_sizes=(8,)).log_prob(torch.zeros(2)).detach()
        tensor(-1.8379)
    """

    def __init__(
        self,
        dim: int,
        hidden_sizes: Sequence[int] = (64, 64),
        num_frequencies: int = 3,
        *,
        atol: float = 1e-6,
        rtol: float = 1e-5,
        scale: float = 1.0,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"dim": 1, "num_frequencies": 1}, dim, num_frequencies)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        eps = torch.finfo(dtype).eps
        if not (atol >= eps and rtol >= 10.0 * eps):
            raise ValueError(
                f"atol >= {eps:.1e} and rtol >= {10.0 * eps:.1e} must hold in {dtype}, or the"
                f" solver does not terminate, got atol={atol}, rtol={rtol}"
            )
        zuko = installed_zuko()
        options = {
            "freqs": num_frequencies,
            "atol": atol,
            "rtol": rtol,
            "hidden_features": tuple(hidden_sizes),
        }
        options["activation"] = _activation(activation)
        layer = zuko_layer(zuko.flows.continuous.FFJTransform, dim, generator, dtype, **options)
        super().__init__([layer, *_affine_end(dim, scale, dtype)], dim, dim, base=base)
