"""Two-dimensional toy distributions with the exact densities of their well-known generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.targets.base import LOG_TWO_PI, check_each, check_positive
from pyroebm.targets.noisy_curves import Plane
from pyroebm.targets.normals import GaussianMixture

__all__ = ["Checkerboard", "Circles", "Pinwheel", "eight_gaussians"]


class Circles(Plane):
    r"""Concentric circles of radii :math:`R_k` with normal noise, equally likely. Normalized.

    .. math::

        p(x) = \frac1K \sum_k \frac1{2 \pi \sigma^2} e^{-(|x| - R_k)^2 / 2 \sigma^2}
        \tilde I_0(|x| R_k / \sigma^2), \qquad \tilde I_0(t) = e^{-t} I_0(t)

    The defaults are the distribution of scikit-learn's ``make_circles(factor=0.5, noise=0.08)``
    times 3 (Grathwohl et al., 2021).

    Args:
        radii: :math:`R_k > 0`.
        noise: :math:`\sigma > 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if a radius or ``noise`` is not positive.

    Example:
        >>> Circles().variance
        tensor([2.8701, 2.8701])
    """

    def __init__(
        self,
        radii: Sequence[float] = (3.0, 1.5),
        noise: float = 0.24,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(radii=torch.tensor(radii), noise=noise)
        super().__init__(dtype=dtype)
        self.radii, self.noise = tuple(map(float, radii)), float(noise)

    @classmethod
    def rings(cls, *, dtype: torch.dtype | None = None) -> Circles:
        """Return four rings of radii 3, 2.25, 1.5, 0.75 with noise 0.08 (Grathwohl et al., 2019).

        Args:
            dtype: floating-point type; None for torch's default.
        """
        return cls((3.0, 2.25, 1.5, 0.75), 0.08, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        r = torch.linalg.vector_norm(x, dim=-1).unsqueeze(-1) / self.noise
        radii = self._number(self.radii) / self.noise
        parts = torch.special.i0e(r * radii).log() - 0.5 * (r - radii).square()
        return LOG_TWO_PI + math.log(self.noise**2 * len(self.radii)) - torch.logsumexp(parts, -1)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([0.0, 0.0])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number(
            [0.5 * sum(r * r for r in self.radii) / len(self.radii) + self.noise**2] * 2
        )

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        u, angle = self._uniform((2, n), generator)
        radius = torch.tensor(self.radii, dtype=torch.float64, device=u.device)[
            (u * len(self.radii)).long()
        ]
        angle = 2.0 * math.pi * angle
        return torch.stack(
            [radius * angle.cos(), radius * angle.sin()], -1
        ) + self.noise * self._normal((n, 2), generator)


class Checkerboard(Plane):
    r"""The uniform distribution on the black squares of a 4 x 4 board over :math:`[-4, 4]^2`.

    The squares have side 2 and total area 32. The energy is infinite elsewhere.

    Args:
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``dtype`` is not a floating-point type.

    Example:
        >>> Checkerboard()(torch.tensor([[1.0, 1.0], [1.0, 3.0], [3.0, 3.0]]))
        tensor([3.4657,    inf, 3.4657])
    """

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        # the squares are closed, so that a draw that is rounded to an edge stays inside
        low, high = (0.5 * x).floor(), (0.5 * x).ceil() - 1.0
        black = torch.zeros_like(x[..., 0], dtype=torch.bool)
        for i in (low[..., 0], high[..., 0]):
            for j in (low[..., 1], high[..., 1]):
                inside = (torch.minimum(i, j) >= -2.0) & (torch.maximum(i, j) <= 1.0)
                black = black | (inside & ((i + j) % 2.0 == 0.0))
        zero = 0.0 * x.sum(-1)  # NaN where x is NaN
        return torch.where(black, zero + math.log(32.0), torch.where(zero.isnan(), zero, math.inf))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([0.0, 0.0])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        # each coordinate is uniform on [-4, 4]
        return self._number([16.0 / 3.0] * 2)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.sample(num_chains, generator)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        x, y, row = self._uniform((3, n), generator)
        x = 4.0 * x - 2.0
        return 2.0 * torch.stack([x, y + x.floor() % 2.0 - 2.0 * (row < 0.5)], -1)


class Pinwheel(Plane):
    r"""The pinwheel of Johnson et al. (2016): K normal arms, twisted along their length.

    .. math:: f \sim N\big((1, 0), \operatorname{diag}(0.3^2, 0.1^2)\big), \quad
        x = s\, R(-\psi) f, \quad \psi = \frac{2 \pi k}K + \gamma e^{f_1}

    with R a rotation. The density of x is the sum of :math:`p(f) / (K s^2 |1 + \gamma e^{f_1}
    f_2|)` over all f that map to x: those with :math:`f(\psi) = R(\psi) x / s` and :math:`\psi -
    \gamma e^{f_1(\psi)}` a multiple of :math:`2 \pi / K`. There are K of them, except in the far
    tails, where the determinant passes through zero and the density has poles, which hold less than
    :math:`10^{-8}` of the mass.

    Args:
        num_arms: K, at least 3.
        rate: :math:`\gamma`.
        scale: :math:`s > 0`, in the unit of x.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if ``scale`` is not positive, ``rate`` is not finite, or
            ``num_arms`` is below 3.

    Example:
        >>> Pinwheel().variance
        tensor([2.2000, 2.2000])
    """

    spread = (0.3, 0.1)  # radial and tangential standard deviation of f
    cells = 128  # intervals of the angle in which roots are searched
    candidates = 3  # roots beyond the number of arms

    def __init__(
        self,
        num_arms: int = 5,
        *,
        rate: float = 0.25,
        scale: float = 2.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts({"num_arms": 3}, num_arms)  # with two arms the variances would differ
        check_positive(scale=scale)
        check_each("finite", torch.isfinite, rate=rate)
        super().__init__(dtype=dtype)
        self.num_arms = num_arms
        self.rate = rate
        self.scale = scale

    def _log_normal(self, f: tuple[Tensor, Tensor]) -> Tensor:
        radial, tangential = self.spread
        constant = LOG_TWO_PI + math.log(radial * tangential)
        return -0.5 * ((f[0] - 1.0) / radial) ** 2 - 0.5 * (f[1] / tangential) ** 2 - constant

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        u, v = (x / self.scale).unsqueeze(-1).unbind(-2)

        def turned(angle: Tensor) -> tuple[Tensor, Tensor]:  # f(angle)
            cos, sin = angle.cos(), angle.sin()
            return u * cos - v * sin, u * sin + v * cos

        # an integer at a root
        def turns(angle: Tensor, f: tuple[Tensor, Tensor]) -> Tensor:
            return (angle - self.rate * f[0].exp()) * (self.num_arms / (2.0 * math.pi))

        with torch.no_grad():
            edges = torch.linspace(
                0.0, 2.0 * math.pi, self.cells + 1, dtype=x.dtype, device=x.device
            )
            f = turned(edges)
            level = turns(edges, f)
            floors = level.floor()
            crossed = floors[..., 1:] != floors[..., :-1]
            likely = torch.where(crossed, self._log_normal(f)[..., 1:], -math.inf)
            cell = likely.topk(self.num_arms + self.candidates, -1).indices
            goal = torch.maximum(floors[..., 1:], floors[..., :-1]).gather(-1, cell)
            low, width = edges[cell], 2.0 * math.pi / self.cells
            below, above = level.gather(-1, cell), level.gather(-1, cell + 1)
            # start in the middle of a flat cell
            share = torch.where(above == below, 0.5, (goal - below) / (above - below))
            angle = low + width * share.clamp(0.0, 1.0)
            found = crossed.gather(-1, cell)
            for _ in range(4):
                angle = torch.minimum(
                    torch.maximum(self._newton(angle, goal, turned), low), low + width
                )
        for _ in range(2):  # with the graph, for the first and second derivatives of a root in x
            angle = self._newton(angle, goal, turned)
        f = turned(angle)
        log_det = self._slope(f).abs().log() + math.log(self.num_arms * self.scale**2)
        terms = torch.where(found, self._log_normal(f) - log_det, -math.inf)
        return -torch.logsumexp(terms, -1) + 0.0 * x.sum(-1)  # NaN where x is NaN

    def _slope(self, f: tuple[Tensor, Tensor]) -> Tensor:
        return 1.0 + self.rate * f[0].exp() * f[1]

    def _newton(
        self, angle: Tensor, goal: Tensor, turned: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        f = turned(angle)
        return angle - (
            angle - self.rate * f[0].exp() - goal * (2.0 * math.pi / self.num_arms)
        ) / self._slope(f)

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number([0.0, 0.0])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._number(
            [0.5 * self.scale**2 * (1.0 + self.spread[0] ** 2 + self.spread[1] ** 2)] * 2
        )

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        first, second = self._normal((2, n), generator)
        first, second = 1.0 + self.spread[0] * first, self.spread[1] * second
        arm = (self._uniform((n,), generator) * self.num_arms).floor()
        angle = 2.0 * math.pi / self.num_arms * arm + self.rate * first.exp()
        cos, sin = angle.cos(), angle.sin()
        return self.scale * torch.stack(
            [first * cos + second * sin, second * cos - first * sin], -1
        )


def eight_gaussians(*, dtype: torch.dtype | None = None) -> GaussianMixture:
    """Return eight equal normal distributions on a circle (Grathwohl et al., 2019).

    The radius is 4 / 1.414 and the standard deviation 0.5 / 1.414.

    Args:
        dtype: floating-point type; None for torch's default.

    Example:
        >>> eight_gaussians().mode_weights[0], len(eight_gaussians().loc)
        (tensor(0.1250), 8)
    """
    angle = 0.25 * math.pi * torch.arange(8, dtype=torch.float64)
    means = 4.0 / 1.414 * torch.stack([angle.cos(), angle.sin()], -1)
    return GaussianMixture(means, scale=0.5 / 1.414, dtype=dtype or torch.get_default_dtype())
