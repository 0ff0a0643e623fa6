"""The phi^4 field on a ring of sites, with its partition function by the transfer matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroebm.targets.base import Target, check_positive

__all__ = ["Phi4"]


class Phi4(Target):
    r"""The :math:`\phi^4` field on a ring of L sites.

    .. math:: S(f) = \sum_i (f_i - f_{i+1})^2 + m_2 f_i^2 + \lambda f_i^4, \qquad f_{L+1} = f_1

    Albergo, Kanwar and Shanahan (2019) use it on a two-dimensional torus. Only neighboring sites
    are coupled, so that :math:`Z = \mathrm{tr}\, T^L` with the transfer matrix :math:`T(a, b) =
    e^{-(a - b)^2 - V(a)/2 - V(b)/2}`, :math:`V(f) = m_2 f^2 + \lambda f^4`. log Z and the variance
    are computed from the eigenvalues of T on a grid. For :math:`m_2 < 0` the field has two modes,
    the signs of its mean, each of weight one half. For :math:`\lambda = 0` it is normal, with exact
    draws.

    Args:
        length: L, at least 2 (the two sites of a ring of 2 have two bonds).
        m2: :math:`m_2`; positive if :math:`\lambda = 0`.
        lam: :math:`\lambda \ge 0`.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> e = Phi4(16, m2=-4.0, lam=6.975)
        >>> round(e.log_z, 8), e(torch.zeros(3, 16))
        (7.63835191, tensor([0., 0., 0.]))
    """

    #: Nodes of the grid of the transfer matrix. The integrand is smooth and vanishes at the ends,
    #: so the trapezoidal rule converges faster than any power of the step.
    nodes = 601

    def __init__(
        self,
        length: int = 16,
        m2: float = -4.0,
        lam: float = 6.975,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if length < 2:
            raise ValueError(f"length must be at least 2, got length={length}")
        if not (0.0 <= lam < math.inf and -math.inf < m2 < math.inf):
            raise ValueError(
                f"m2 must be finite and lam finite and not negative, got m2={m2}, lam={lam}"
            )
        if lam == 0.0:
            check_positive(m2=m2)
        super().__init__((length,), dtype=dtype)
        self.length = length
        self.m2 = float(m2)
        self.lam = float(lam)

    @property
    def has_exact_draws(self) -> bool:
        """Whether the field is normal: there is no quartic term."""
        return self.lam == 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        square = x.square()
        return ((x - x.roll(-1, -1)).square() + square * (self.m2 + self.lam * square)).sum(-1)

    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nodes, and the logs and vectors ``(nodes, k)`` of the positive eigenvalues.

        Eigenvalues below the rounding error are left out.
        """
        end = 1.0
        while self._potential(end) < self._floor() + 80.0:
            end *= 1.1
        f = torch.linspace(-end, end, self.nodes, dtype=torch.float64)
        half = 0.5 * (f * f * (self.m2 + self.lam * f * f) - self._floor())
        matrix = torch.exp(-((f[:, None] - f).square()) - half[:, None] - half) * (f[1] - f[0])
        values, vectors = torch.linalg.eigh(matrix)
        kept = values > 1e-14 * values[-1]
        return f, values[kept].log() - self._floor(), vectors[:, kept]

    def _potential(self, f: float) -> float:
        return f * f * (self.m2 + self.lam * f * f)

    def _floor(self) -> float:
        return -0.25 * self.m2**2 / self.lam if self.m2 < 0.0 else 0.0

    def _log_z(self) -> float:
        if self.lam == 0.0:
            return 0.5 * self.length * math.log(math.pi) - 0.5 * float(self._modes().log().sum())
        return float(torch.logsumexp(self.length * self._spectrum()[1], 0))

    def _modes(self) -> Tensor:
        """Return the coefficient of each squared Fourier mode in the action of the free field."""
        k = torch.arange(self.length, dtype=torch.float64)
        return self.m2 + 4.0 * torch.sin(math.pi * k / self.length).square()

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self._number(torch.zeros(self.length))

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        f, log_values, vectors = self._spectrum()
        weights = torch.softmax(self.length * log_values, 0)
        return self._number(((f.square() @ vectors.square()) @ weights).expand(self.length))

    @property
    def mode_weights(self) -> Tensor | None:
        """Probability of each mode, shape ``(k,)``; None where unknown."""
        return self._number([0.5, 0.5]) if self.m2 < 0.0 else None

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the mode of each state: 1 where the mean of the field is positive, else 0.

        Args:
            x: states, shape ``(*batch, L)``.

        Returns:
            shape ``(*batch)``, int64.
        """
        if self.m2 >= 0.0:
            return super().mode_of(x)
        self.batch_shape(x)
        return (x.sum(-1) > 0).long()

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        if self.lam > 0.0:
            return super()._draw(n, generator)
        # white noise, whose Fourier modes are scaled to their standard deviations
        spectrum = torch.fft.fft(self._normal((n, self.length), generator), dim=1)
        return torch.fft.ifft(spectrum / (2.0 * self._modes().to(self.device)).sqrt(), dim=1).real
