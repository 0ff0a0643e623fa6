"""Plane curves with noise, with densities by quadrature along the curve: two moons, two spirals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.targets.base import LOG_TWO_PI, Target, check_each, check_positive

__all__ = ["NoisyCurves", "Plane", "TwoMoons", "TwoSpirals"]

#: Events whose distances to all nodes are computed at once, so that they fit the processor's cache.
EVENTS = 64
#: Quadrature nodes on each axis of the box.
BOX_NODES = 6


class Plane(Target):
    """Base class of normalized densities of two real numbers, with known moments.

    Example:
        >>> TwoMoons().event_shape, TwoMoons().log_z
        (torch.Size([2]), 0.0)
    """

    event_shape = torch.Size([2])

    def _log_z(self) -> float:
        return 0.0

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self._within_two_deviations(num_chains, generator)


class NoisyCurves(Plane):
    r"""Points on plane curves :math:`c_k` with noise; all curves are equally likely. Normalized.

    .. math::

        x = c_k(u) + b\, v + \sigma z, \qquad p(x) = \frac1K \sum_k \int_0^1 \kappa(x - c_k(u))\, du

    with u uniform, v uniform on the square :math:`[0, 1]^2`, z standard normal, and :math:`\kappa`
    the density of the noise. The integral is computed by a Gauss-Legendre rule in :math:`\sqrt u`,
    which is accurate to rounding if the distance of its nodes is small against the noise.

    Args:
        curves: :math:`c`, from u of shape ``(n,)`` to points ``(K, n, 2)``; smooth in :math:`\sqrt
            u`.
        noise: :math:`\sigma > 0`, in the unit of x.
        box: :math:`b \ge 0`, the side of the square, in the unit of x.
        num_nodes: quadrature nodes on each curve; about three times its length over :math:`\sigma`
            is enough.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``noise`` is not positive, ``box`` negative, or ``num_nodes`` below 1.

    Example:
        >>> line = NoisyCurves(
        ...     lambda u: torch.stack([4 * u, 0 * u], -1).unsqueeze(0), noise=0.5, num_nodes=40
        ... )
        >>> value = float(line(torch.tensor([2.0, 0.0])))
        >>> round(value, 4)  # log 4 of the line, and of N(0, 0.25) at 0
        1.6121
    """

    nodes: Tensor
    log_weights: Tensor

    def __init__(
        self,
        curves: Callable[[Tensor], Tensor],
        noise: float,
        box: float = 0.0,
        num_nodes: int = 256,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(noise=noise)
        check_each("finite and at least 0", lambda t: (t >= 0) & torch.isfinite(t), box=box)
        check_counts({"num_nodes": 1}, num_nodes)
        super().__init__()
        self.curves = curves
        self.noise = float(noise)
        self.box = float(box)
        root, weight = (
            torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(num_nodes)
        )
        root = 0.5 * (root + 1.0)
        points = curves(root.square())
        self.register_buffer("nodes", (points + 0.5 * box).flatten(0, 1))
        self.register_buffer("log_weights", (weight * root / len(points)).log().repeat(len(points)))
        self.to(dtype or torch.get_default_dtype())

    def _log_noise(self, x: Tensor) -> Tensor:  # of one coordinate of the noise, centered at 0
        normal = -0.5 * (x / self.noise).square() - 0.5 * LOG_TWO_PI - math.log(self.noise)
        if not self.box:
            return normal
        # N(x | v, sigma^2) is N(x | 0, sigma^2) e^(v x / sigma^2 - v^2 / 2 sigma^2), integrated
        # over the box without overflow
        far, edge = x.abs(), 0.5 * self.box
        total = torch.zeros_like(far)
        for v, weight in self._box_rule:
            total = total + weight * torch.exp((v - edge) / self.noise**2 * far)
        return normal + total.log() + edge / self.noise**2 * far

    @cached_property
    def _box_rule(self) -> list[tuple[float, float]]:
        root, weight = np.polynomial.legendre.leggauss(BOX_NODES)
        v = 0.5 * self.box * root
        return list(
            zip(
                v.tolist(),
                (0.5 * weight * np.exp(-0.5 * (v / self.noise) ** 2)).tolist(),
                strict=True,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""

        def energy(events: Tensor) -> Tensor:
            parts = self._log_noise(events[:, :1] - self.nodes[:, 0]) + self._log_noise(
                events[:, 1:] - self.nodes[:, 1]
            )
            return -torch.logsumexp(parts + self.log_weights, 1)

        return torch.cat([energy(events) for events in x.reshape(-1, 2).split(EVENTS)]).reshape(
            x.shape[:-1]
        )

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self.log_weights.exp() @ self.nodes

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return (
            self.log_weights.exp() @ (self.nodes - self.mean).square()
            + self.noise**2
            + self.box**2 / 12.0
        )

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        points = self.curves(self._uniform((n,), generator))
        which = (self._uniform((n,), generator) * len(points)).long()
        chosen = points[which, torch.arange(n, device=points.device)] + self.noise * self._normal(
            (n, 2), generator
        )
        return chosen + self.box * self._uniform((n, 2), generator) if self.box else chosen


class TwoMoons(NoisyCurves):
    r"""The distribution of scikit-learn's ``make_moons``: two half circles with normal noise.

    They have radius 1 and the centers (0, 0) and (1, 1/2).

    Args:
        noise: :math:`\sigma > 0`, before the scaling.
        scale: factor of all lengths.
        shift: added after the scaling. Grathwohl et al. (2021) use scale 2 and shift (-1, -0.2).
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``noise`` or ``scale`` is not positive.

    Example:
        >>> TwoMoons().mean
        tensor([0.5000, 0.2500])
    """

    def __init__(
        self,
        noise: float = 0.1,
        scale: float = 1.0,
        shift: tuple[float, float] = (0.0, 0.0),
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(noise=noise, scale=scale)

        def arcs(u: Tensor) -> Tensor:
            x, y = torch.cos(math.pi * u), torch.sin(math.pi * u)
            both = torch.stack([torch.stack([x, y], -1), torch.stack([1.0 - x, 0.5 - y], -1)])
            return scale * both + both.new_tensor(shift)

        super().__init__(arcs, scale * noise, num_nodes=40 + math.ceil(8.0 / noise), dtype=dtype)


class TwoSpirals(NoisyCurves):
    r"""The two spirals of Grathwohl et al. (FFJORD, 2019), with normal noise.

    .. math:: x = \pm (-n \cos n + v_1 / 2,\, n \sin n + v_2 / 2) / 3, \qquad n = 3 \pi \sqrt u

    with u uniform and v uniform on the square :math:`[0, 1]^2`.

    Args:
        noise: :math:`\sigma > 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``noise`` is not positive.

    Example:
        >>> TwoSpirals(dtype=torch.float64).mean.abs().max() < 1e-12
        tensor(True)
    """

    def __init__(self, noise: float = 0.1, *, dtype: torch.dtype | None = None) -> None:
        check_positive(noise=noise)

        def arms(u: Tensor) -> Tensor:
            n = 3.0 * math.pi * u.sqrt()
            arm = torch.stack([-n * torch.cos(n), n * torch.sin(n)], -1) / 3.0
            # the square of the second arm is on its other side
            return torch.stack([arm, -arm - 1.0 / 6.0])

        super().__init__(
            arms, noise, box=1.0 / 6.0, num_nodes=30 + math.ceil(26.0 / noise), dtype=dtype
        )
