r"""Metrics: linear maps A with :math:`A A^\top = M^{-1}`, which whiten positions and momenta."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Dense", "Diagonal", "Identity", "LowRank", "Metric", "metric_of"]


class Identity(NamedTuple):
    """:math:`M = I`: vectors are returned unchanged and not copied.

    Example:
        >>> Identity().apply(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def apply(self, v: Tensor) -> Tensor:
        """Return ``v`` unchanged."""
        return v

    def transpose(self, g: Tensor) -> Tensor:
        """Return ``g`` unchanged."""
        return g


class Diagonal(NamedTuple):
    r"""Diagonal metric :math:`M^{-1} = \operatorname{diag}(s)^2`.

    Args:
        scale: s, standard deviations of the target, shape ``(dim,)``, or ``(chains, dim)`` for one
            metric per chain.

    Example:
        >>> Diagonal(torch.tensor([2.0, 3.0])).apply(torch.ones(1, 2))
        tensor([[2., 3.]])
    """

    scale: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Compute A v for v ``(chains, dim)``: from whitened coordinates to those of the energy."""
        return v * self.scale

    def transpose(self, g: Tensor) -> Tensor:
        r"""Compute :math:`A^\top g`, a gradient in whitened coordinates; g is ``(chains, dim)``."""
        return g * self.scale


class Dense(NamedTuple):
    r"""Dense metric :math:`M^{-1} = L L^\top`.

    Args:
        factor: L, lower triangular, shape ``(dim, dim)``.

    Example:
        >>> Dense.of_covariance(torch.tensor([[4.0, 0.0], [0.0, 9.0]])).apply(torch.ones(1, 2))
        tensor([[2., 3.]])
    """

    factor: Tensor

    @classmethod
    def of_covariance(cls, covariance: Tensor) -> Dense:
        """Return the metric whose inverse mass is a covariance matrix.

        Args:
            covariance: positive definite matrix, shape ``(dim, dim)``.

        Raises:
            ValueError: if it is not square, or not positive definite and finite.
        """
        if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(
                f"covariance must have shape (dim, dim), got shape {tuple(covariance.shape)}"
            )
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) != 0 or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                "covariance must be positive definite and finite, got one that has no Cholesky"
                " factor"
            )
        return cls(factor)

    def apply(self, v: Tensor) -> Tensor:
        """Compute L v for v ``(chains, dim)``."""
        return v @ self.factor.mT

    def transpose(self, g: Tensor) -> Tensor:
        r"""Compute :math:`L^\top g` for g ``(chains, dim)``."""
        return g @ self.factor


class LowRank(NamedTuple):
    r"""Diagonal metric with a correction along a few directions.

    .. math:: A = \operatorname{diag}(s) (I + U (\operatorname{diag}(\lambda)^{1/2} - I) U^\top)

    Args:
        scale: s, shape ``(dim,)``.
        vectors: orthonormal columns U, shape ``(dim, rank)``.
        values: variances :math:`\lambda > 0` along them after scaling, shape ``(rank,)``.

    Example:
        >>> metric = LowRank(torch.ones(2), torch.tensor([[1.0], [0.0]]), torch.tensor([9.0]))
        >>> metric.apply(torch.ones(1, 2))
        tensor([[3., 1.]])
    """

    scale: Tensor
    vectors: Tensor
    values: Tensor

    def _stretch(self, v: Tensor) -> Tensor:
        return v + ((v @ self.vectors) * (self.values.sqrt() - 1.0)) @ self.vectors.mT

    def apply(self, v: Tensor) -> Tensor:
        """Compute A v for v ``(chains, dim)``."""
        return self._stretch(v) * self.scale

    def transpose(self, g: Tensor) -> Tensor:
        r"""Compute :math:`A^\top g` for g ``(chains, dim)``."""
        return self._stretch(g * self.scale)


Metric: TypeAlias = Identity | Diagonal | Dense | LowRank


def metric_of(inverse_mass: Tensor | Metric | None, like: Tensor) -> Metric:
    """Return the metric of a kernel's ``inverse_mass`` for positions of shape ``(chains, dim)``.

    None is the identity, a tensor is the diagonal.
    """
    dim = like.shape[1]
    if inverse_mass is None or isinstance(inverse_mass, Identity):
        return Identity()
    if isinstance(inverse_mass, Tensor):
        if inverse_mass.numel() != dim:
            raise ValueError(
                f"inverse_mass must have {dim} entries, one for each of the event, got shape"
                f" {tuple(inverse_mass.shape)}; pass a full matrix as Dense.of_covariance(matrix)"
            )
        return Diagonal(inverse_mass.reshape(-1).to(like).sqrt())
    if inverse_mass[0].shape[-1] != dim:
        raise ValueError(
            f"inverse_mass must be a metric over {dim} entries, those of the event, got one over"
            f" {inverse_mass[0].shape[-1]}"
        )
    return type(inverse_mass)(*(part.to(like) for part in inverse_mass))


def scaled(inverse_mass: Tensor | Metric | None, factor: float, like: Tensor) -> Tensor | Metric:
    """Return ``inverse_mass`` multiplied by a number, for positions of shape ``(chains, dim)``."""
    metric = metric_of(inverse_mass, like)
    if isinstance(metric, Identity):
        return torch.full_like(like[0], factor)
    if isinstance(metric, Diagonal):
        return factor * metric.scale**2
    return metric._replace(**{metric._fields[0]: factor**0.5 * metric[0]})


def metric_tensors(inverse_mass: Tensor | Metric | None) -> tuple[Tensor, ...]:
    """Return the tensors of ``inverse_mass``, for checks."""
    if inverse_mass is None:
        return ()
    return (inverse_mass,) if isinstance(inverse_mass, Tensor) else tuple(inverse_mass)
