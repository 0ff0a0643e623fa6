"""Splines, autoregressive and continuous flows for energies, of zuko's layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pyroebm.core._checks import check_counts
from pyroebm.flows.adapters import installed_zuko, reversed_layer, zuko_layer
from pyroebm.flows.affine import coupling_masks
from pyroebm.flows.base import Base
from pyroebm.flows.flow import Flow
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.nn.mlp import ACTIVATIONS

__all__ = ["AutoregressiveFlow", "ContinuousFlow", "SplineFlow"]


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


class SplineFlow(Flow):
    r"""Rational-quadratic splines (Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows",
    2019), by zuko.

    .. math:: x = S\, f_L \circ \dots \circ f_1(z) + c

    Each :math:`f_l` is a coupling, whose splines are monotone maps of :math:`[-B, B]` onto itself
    and the identity outside. So what lies beyond B before S is reached by the base alone, whatever
    the splines are: **modes beyond** ``scale * bound`` **are out of reach until S and c have
    grown.** Choose ``scale`` or ``bound`` such that their product covers the target.

    Args:
        dim: d.
        num_layers: L.
        hidden_sizes: widths of the conditioners' hidden layers.
        num_bins: of each spline.
        bound: B, in units of the base.
        scale: of the initial S.
        autoregressive: as zuko's NSF: each entry depends on all before it; the inverse then costs d
            evaluations, not one.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: of the parameters (default torch's).
        generator: source of the initial weights and of who is coupled to whom; None is torch's
            default generator.

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
        bound: float = 5.0,
        scale: float = 1.0,
        autoregressive: bool = False,
        activation: str = "silu",
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"dim": 1, "num_layers": 1, "num_bins": 2}, dim, num_layers, num_bins)
        if not (bound > 0.0 and math.isfinite(bound)):
            raise ValueError(f"bound must be positive and finite, got bound={bound}")
        zuko = installed_zuko()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        common: dict[str, Any] = {
            "univariate": functools.partial(zuko.transforms.MonotonicRQSTransform, bound=bound),
            "shapes": [(num_bins,), (num_bins,), (num_bins - 1,)],
        }
        if dim > 1:
            common |= {
                "hidden_features": tuple(hidden_sizes),
                "activation": _activation(activation),
            }
        parts: list[Any] = []
        masks = coupling_masks(dim, "halves", num_layers, generator)
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
    r"""Masked autoregressive layers, by zuko: :math:`x_i = e^{r_i(z_{<i})} z_i + m_i(z_{<i})`.

    Written from z to x they make a draw and its density in one evaluation (inverse autoregressive
    flow; Kingma et al., 2016), and the density of a given x in d; ``fast="density"`` exchanges the
    two (masked autoregressive flow; Papamakarios, Pavlakou and Murray, 2017). The reverse KL
    divergence wants the former, training on samples the latter. Layers alternate their order.

    Args:
        dim: d.
        num_layers: how many.
        hidden_sizes: widths of the networks' hidden layers.
        fast: ``"draw"`` or ``"density"``.
        scale: of the initial matrix of the final affine layer.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`.
        base: density of z; None is the standard normal.
        dtype: of the parameters (default torch's).
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
    r"""A continuous flow (Chen et al., "Neural ordinary differential equations", 2018; FFJORD,
    Grathwohl et al., 2019), by zuko.

    .. math:: \dot u = f(u, t), \quad u(0) = z, \quad x = S u(1) + c, \qquad
        \log|\det \partial u(1)/\partial z| = \int_0^1 \mathrm{tr}\, \frac{\partial f}{\partial u}\,
        dt

    The trace is exact. Everything else holds to the tolerance of the adaptive solver: densities,
    inverses, gradients, and that a row does not depend on the others of its batch, since they share
    its steps. There are no second derivatives.

    Args:
        dim: d.
        hidden_sizes: widths of the hidden layers of f.
        num_frequencies: of the sines and cosines of t that f sees.
        atol: absolute tolerance of the solver.
        rtol: relative tolerance.
        scale: of the initial S.
        activation: one of :data:`pyroebm.nn.ACTIVATIONS`; a smooth one.
        base: density of z; None is the standard normal.
        dtype: of the parameters (default torch's).
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
        least = torch.finfo(dtype).eps
        if not (atol >= least and rtol >= 10.0 * least):
            raise ValueError(
                f"atol >= {least:.1e} and rtol >= {10.0 * least:.1e} must hold in {dtype}, or the"
                " solver never ends, got"
                f" atol={atol}, rtol={rtol}"
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
