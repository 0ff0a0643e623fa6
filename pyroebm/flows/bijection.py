"""The base class of layers of flows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.saving import Saveable
from pyroebm.nn.mlp import frozen

__all__ = ["Bijection", "check_event", "vector_jacobian"]


def check_event(z: Tensor, dim: int) -> None:
    """Raise ValueError unless the last dimension of ``z`` is ``dim``."""
    if z.dim() < 1 or z.shape[-1] != dim:
        raise ValueError(
            f"the input must have shape (*batch, dim) with dim={dim}, got shape {tuple(z.shape)}"
        )


def vector_jacobian(weights: Sequence[Tensor], outputs: Sequence[Tensor], z: Tensor) -> Tensor:
    """Compute the vector-Jacobian product of the outputs in ``z``, and keep their graph.

    It is 0 if they do not depend on ``z``.
    """
    if not any(output.requires_grad for output in outputs):
        return torch.zeros_like(z)
    return torch.autograd.grad(outputs, z, weights, retain_graph=True, materialize_grads=True)[0]


class Bijection(Saveable, TransformModule):
    r"""A learned bijection of :math:`R^D` that computes image and log-determinant together.

    Subclasses define :meth:`with_log_det` and :meth:`inverse_with_log_det`; the methods of
    :class:`torch.distributions.Transform` call these. A flow calls them directly and evaluates each
    network once. There is no cache, which an optimizer step would make invalid.

    Args:
        dim: D, number of entries of z and of x.

    Raises:
        ValueError: if ``dim`` < 1.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got dim={dim}")
        super().__init__()
        self.dim = dim

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return x and :math:`\log|\det \partial x/\partial z|`.

        Args:
            z: shape ``(*batch, D)``.

        Returns:
            x ``(*batch, D)`` and the log-determinant ``(*batch)``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define with_log_det(z) -> (x, log_det)"
        )

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return z and, as :meth:`with_log_det`, :math:`\log|\det \partial x/\partial z|`.

        Args:
            x: shape ``(*batch, D)``.

        Returns:
            z ``(*batch, D)`` and the log-determinant ``(*batch)``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define inverse_with_log_det(x) -> (z, log_det)"
        )

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return x, the log-determinant, and the score at x.

        With :math:`J = \partial x/\partial z` the score is

        .. math::

            \nabla_x \log q(x) = J^{-\top} \big(\nabla_z \log p(z) - \nabla_z \log|\det J|\big)

        By default it is computed through the inverse; a layer with a closed form overrides this
        (Vaitl, Nicoli, Nakajima and Kessel, 2024). The score is detached.

        Args:
            z: shape ``(*batch, D)``, requiring a gradient.
            score: :math:`\nabla_z \log p(z)`, shape ``(*batch, D)``.
        """
        x, log_det = self.with_log_det(z)
        with frozen(self):
            leaf = x.detach().requires_grad_()
            inverse, inverse_log_det = self.inverse_with_log_det(leaf)
            (score_x,) = torch.autograd.grad(
                ((inverse * score).sum(-1) - inverse_log_det).sum(), leaf
            )
        return x, log_det, score_x

    def _call(self, z: Tensor) -> Tensor:
        return self.with_log_det(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.inverse_with_log_det(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the log-determinant at x: ``(*batch, D), (*batch, D) -> (*batch)``."""
        return self.with_log_det(x)[1]
