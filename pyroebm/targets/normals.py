"""Normal distributions and their mixtures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroebm.core.supports import event_numel, event_sum
from pyroebm.targets.base import LOG_TWO_PI, Target, as_floats, check_positive

__all__ = ["Gaussian", "GaussianMixture", "scales_gaussian"]


class _Normals(Target):
    """Normal distributions with locations ``(*stack, *event)``.

    The stack is empty for a Gaussian and ``(k,)`` for a mixture. ``whitening`` holds W with W'W the
    precision: its diagonal in the shape of ``loc``, or dense matrices over flattened events.
    """

    loc: Tensor
    whitening: Tensor

    def __init__(
        self,
        name: str,
        loc: Any,
        scale: Any,
        covariance: Any,
        stack: int,
        dtype: torch.dtype | None,
    ) -> None:
        if scale is not None and covariance is not None:
            raise ValueError(
                f"give scale or covariance, not both, got scale={scale} and covariance={covariance}"
            )
        dense = covariance is not None
        given = {"covariance": covariance} if dense else {"scale": 1.0 if scale is None else scale}
        loc, spread = as_floats(dtype, **{name: loc}, **given)
        if loc.dim() < stack or loc.numel() == 0:
            raise ValueError(
                f"{name} must have at least {stack} dimensions and one entry, got shape"
                f" {tuple(loc.shape)}"
            )
        super().__init__(loc.shape[stack:], dtype=loc.dtype)
        self.dense = dense
        self.register_buffer("loc", loc)
        self.register_buffer(
            "whitening",
            _whiten_dense(spread, loc, stack) if dense else _whiten_diagonal(spread, loc, stack),
        )

    def _quadratic(self, deviation: Tensor) -> Tensor:  # (..., *stack, *event) -> (..., *stack)
        if not self.dense:
            return 0.5 * event_sum((deviation * self.whitening).square(), len(self.event_shape))
        flat = (
            deviation.flatten(-len(self.event_shape))
            if self.event_shape
            else deviation.unsqueeze(-1)
        )
        if self.whitening.dim() == 2:  # one matrix for all: a plain matrix product
            return 0.5 * torch.nn.functional.linear(flat, self.whitening).square().sum(-1)
        return 0.5 * torch.einsum("...kd,ked->...ke", flat, self.whitening).square().sum(-1)

    # (*stack): log of the integral of exp(-quadratic)
    def _log_norm(self, whitening: Tensor) -> Tensor:
        logs = whitening.diagonal(dim1=-2, dim2=-1).log() if self.dense else whitening.log()
        dims = 1 if self.dense else len(self.event_shape)
        return 0.5 * event_numel(self.event_shape) * LOG_TWO_PI - event_sum(logs, dims)

    # inverse of the whitening, float64: the factor of standard normal noise
    def _coloring(self) -> Tensor:
        return (
            _inverse(self.whitening.double())
            if self.dense
            else self.whitening.double().reciprocal()
        )

    def _variances(self) -> Tensor:  # (*stack, *event), float64
        squares = self._coloring().square()
        return (
            squares.sum(-1).reshape(squares.shape[:-2] + self.event_shape)
            if self.dense
            else squares
        )

    def _draw_part(self, n: int, part: Any, generator: torch.Generator | None) -> Tensor:
        # part: an index into the stack for each draw; the empty tuple for an empty stack
        noise, coloring = self._normal((n, *self.event_shape), generator), self._coloring()
        if not self.dense:
            return self.loc[part] + coloring[part] * noise
        coloring = coloring[part] if coloring.dim() > 2 else coloring
        return self.loc[part] + torch.einsum(
            "...ed,...d->...e", coloring, noise.reshape(n, -1)
        ).reshape(noise.shape)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self._within_two_deviations(num_chains, generator)


def _whiten_diagonal(scale: Tensor, loc: Tensor, stack: int) -> Tensor:
    check_positive(scale=scale)
    if stack and scale.dim() == 1:  # one scale for each component
        scale = scale.reshape(-1, *[1] * (loc.dim() - 1))
    try:
        return scale.expand(loc.shape).reciprocal().contiguous()
    except RuntimeError:
        raise ValueError(
            f"scale must be one number{', one for each component' * stack} or broadcast to"
            f" {tuple(loc.shape)}, got shape"
            f" {tuple(scale.shape)}"
        ) from None


def _whiten_dense(covariance: Tensor, loc: Tensor, stack: int) -> Tensor:
    sides = event_numel(loc.shape[stack:])
    shapes = [(sides, sides), (*loc.shape[:stack], sides, sides)]
    if tuple(covariance.shape) not in shapes:
        rule = " or ".join(map(str, shapes[: stack + 1]))
        raise ValueError(
            f"covariance must have shape {rule}, over flattened events, got"
            f" {tuple(covariance.shape)}"
        )
    matrix = covariance.double()
    asymmetry = float((matrix - matrix.mT).abs().max())
    if asymmetry > 1e-5 * float(matrix.abs().max()):
        raise ValueError(
            "covariance must be symmetric, got entries that differ from their mirror image by up"
            f" to {asymmetry:g}"
        )
    lower, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    if failed.any():
        smallest = float(torch.linalg.eigvalsh(matrix).min())
        raise ValueError(
            f"covariance must be positive definite, got smallest eigenvalue {smallest:g}"
        )
    return _inverse(lower).to(covariance.dtype).contiguous()


def _inverse(lower: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(
        lower, torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device), upper=False
    )


class Gaussian(_Normals):
    r"""The unnormalized normal density with mean m and covariance :math:`\Sigma`.

    .. math::

        E(x) = \tfrac12 (x - m)^T \Sigma^{-1} (x - m), \qquad
        \log Z = \tfrac d2 \log 2\pi + \tfrac12 \log \det \Sigma

    Args:
        mean: :math:`m`, shape ``event_shape``, any shape; numbers or a tensor.
        covariance: :math:`\Sigma`, shape ``(d, d)`` over flattened events, symmetric positive
            definite.
        scale: standard deviations, broadcast to ``event_shape``, in place of ``covariance``; 1 if
            both are None. No matrix is used.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: if ``covariance`` is not symmetric positive definite or has another shape, if
            ``scale`` is not positive or does not broadcast, if both are given, or if a value is not
            finite.

    Example:
        >>> e = Gaussian(torch.zeros(2), covariance=[[2.0, 0.6], [0.6, 1.0]])
        >>> e(torch.tensor([[1.0, 0.0]])), round(e.log_z, 4)
        (tensor([0.3049]), 2.0852)
    """

    def __init__(
        self,
        mean: Any,
        covariance: Any = None,
        scale: Any = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("mean", mean, scale, covariance, 0, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self._quadratic(x - self.loc)

    def _log_z(self) -> float:
        return float(self._log_norm(self.whitening.double()))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return self._variances().to(self.dtype)

    @property
    def covariance(self) -> Tensor:
        """Covariance of flattened events, shape ``(d, d)``."""
        coloring = self._coloring()
        return (coloring @ coloring.mT if self.dense else coloring.square().flatten().diag()).to(
            self.dtype
        )

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._draw_part(n, (), generator)


def scales_gaussian(
    dim: int = 50, low: float = 0.1, high: float = 10.0, *, dtype: torch.dtype | None = None
) -> Gaussian:
    r"""Return the centered normal distribution with log-spaced standard deviations.

    It tests the adaptation of step sizes and metrics.

    Args:
        dim: number of dimensions.
        low: smallest standard deviation.
        high: largest standard deviation.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: unless ``dim`` >= 1 and 0 < ``low`` <= ``high``.

    Example:
        >>> scales_gaussian(3).variance
        tensor([1.0000e-02, 1.0000e+00, 1.0000e+02])
    """
    if dim < 1 or not 0.0 < low <= high < math.inf:
        raise ValueError(
            "dim must be at least 1 and low and high satisfy 0 < low <= high, got"
            f" dim={dim}, low={low}, high={high}"
        )
    scale = torch.logspace(math.log10(low), math.log10(high), dim, dtype=torch.float64)
    return Gaussian(torch.zeros(dim, dtype=dtype), scale=scale)


class GaussianMixture(_Normals):
    r"""A normalized mixture of normal distributions.

    .. math:: E(x) = -\log \sum_k w_k N(x \mid m_k, \Sigma_k), \qquad \log Z = 0

    ``mode_weights`` are the :math:`w_k`, and :meth:`mode_of` returns the component of largest
    responsibility. If components overlap, the frequencies of :meth:`mode_of` differ from the
    weights (by up to 4 % for :meth:`gmm40`); the expected :meth:`responsibilities` are equal to
    them.

    Args:
        means: :math:`m_k`, shape ``(k, *event_shape)``.
        scale: standard deviations: one number, one for each component (shape ``(k,)``), or anything
            that broadcasts to the shape of ``means``; 1 by default.
        covariance: :math:`\Sigma_k` over flattened events, shape ``(d, d)`` or ``(k, d, d)``, in
            place of ``scale``.
        weights: :math:`w_k > 0`, shape ``(k,)``; they are normalized. Equal by default.
        dtype: floating-point type; None for that of the tensors given, else torch's default.

    Raises:
        ValueError: as :class:`Gaussian`; if ``weights`` is not positive or not of shape ``(k,)``.

    Example:
        >>> e = GaussianMixture([[-3.0], [3.0]], scale=0.5, weights=[1.0, 3.0])
        >>> e.log_z, e.mean, e.mode_weights, e.mode_of(torch.tensor([[-2.0], [2.0]]))
        (0.0, tensor([1.5000]), tensor([0.2500, 0.7500]), tensor([0, 1]))
    """

    weights: Tensor

    def __init__(
        self,
        means: Any,
        scale: Any = None,
        covariance: Any = None,
        weights: Any = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("means", means, scale, covariance, 1, dtype)
        (given,) = as_floats(
            torch.float64, weights=[1.0] * len(self.loc) if weights is None else weights
        )
        if given.shape != self.loc.shape[:1]:
            raise ValueError(
                f"weights must have shape ({len(self.loc)},), one for each component, got"
                f" {tuple(given.shape)}"
            )
        check_positive(weights=given)
        self.register_buffer("weights", (given / given.sum()).to(self.loc))

    @classmethod
    def grid(
        cls,
        side: int = 3,
        spacing: float = 5.0,
        variance: float = 0.3,
        *,
        dtype: torch.dtype | None = None,
    ) -> GaussianMixture:
        """Return equal modes on a ``side`` x ``side`` grid centered on 0 (Zhang and Chen, 2022).

        Publications use 9 or 25 modes.

        Args:
            side: modes along an edge, at least 1.
            spacing: distance between neighbors.
            variance: variance of each mode in each direction.
            dtype: floating-point type; None for torch's default.

        Raises:
            ValueError: if ``side`` < 1, or if ``spacing`` or ``variance`` is not positive.
        """
        if side < 1:
            raise ValueError(f"side must be at least 1, got side={side}")
        check_positive(spacing=spacing, variance=variance)
        ticks = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
        means = torch.cartesian_prod(ticks, ticks)
        return cls(means, scale=math.sqrt(variance), dtype=dtype or torch.get_default_dtype())

    @classmethod
    def gmm40(cls, *, dtype: torch.dtype | None = None) -> GaussianMixture:
        """Return the mixture of 40 modes of Midgley et al. (2023).

        Their locations are PyTorch's random numbers of seed 0.

        Args:
            dtype: floating-point type; None for torch's default.
        """
        means = (
            torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32) - 0.5
        ) * 80.0
        return cls(means, scale=math.log1p(math.e), dtype=dtype or torch.get_default_dtype())

    def _log_parts(self, x: Tensor) -> Tensor:  # (*batch, k): log w_k N(x | m_k, Sigma_k)
        deviation = x.unsqueeze(-1 - len(self.event_shape)) - self.loc
        return self.weights.log() - self._log_norm(self.whitening) - self._quadratic(deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return -torch.logsumexp(self._log_parts(x), -1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return the posterior probability of each component: ``(*batch, *event) -> (*batch, k)``.

        Its expectation is the vector of weights.
        """
        self.batch_shape(x)
        return torch.softmax(self._log_parts(x), -1)

    def _log_z(self) -> float:
        return 0.0

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, shape ``event_shape``."""
        return torch.tensordot(self.weights, self.loc, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape ``event_shape``."""
        return torch.tensordot(
            self.weights, (self._variances() + (self.loc - self.mean).square()).to(self.dtype), 1
        )

    @property
    def mode_weights(self) -> Tensor:
        """Probability of each mode, shape ``(k,)``."""
        return self.weights

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each state: ``(*batch, *event) -> (*batch)``, int64."""
        return self.responsibilities(x).argmax(-1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        edges = self.weights.double().cumsum(0)
        part = torch.searchsorted(edges / edges[-1], self._uniform((n,), generator), right=True)
        return self._draw_part(n, part, generator)
