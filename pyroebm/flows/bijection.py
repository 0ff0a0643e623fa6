"""What the layers of flows share: vectors in, vectors out, the log-determinant from the same
evaluation, nothing cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.saving import Saveable
from pyroebm.nn.mlp import frozen

__all__ = ["Bijection", "check_event", "pulled_back"]


def check_event(z: Tensor, dim: int) -> None:
    """ValueError unless the last dimension of ``z`` is ``dim``."""
    if z.dim() < 1 or z.shape[-1] != dim:
        raise ValueError(
            f"the input must have shape (*batch, dim) with dim={dim}, got shape {tuple(z.shape)}"
        )


def pulled_back(weights: Sequence[Tensor], outputs: Sequence[Tensor], z: Tensor) -> Tensor:
    """The gradient in ``z`` of the weighted sum of the outputs, whose graph is kept: 0 where they
    do not depend on it."""
    if not any(output.requires_grad for output in outputs):
        return torch.zeros_like(z)
    return torch.autograd.grad(outputs, z, weights, retain_graph=True, materialize_grads=True)[0]


class Bijection(Saveable, TransformModule):
    r"""A learned bijection of :math:`R^D` that gives image and log-determinant together.

    Subclasses write :meth:`with_log_det` and :meth:`inverse_with_log_det`; the methods of
    :class:`torch.distributions.Transform` follow from these. A flow calls them directly and
    evaluates each network once. Nothing is cached: after a step of the optimizer no image of the
    old parameters is left.

    Args:
        dim: D, entries of z and of x.

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
        r"""x and :math:`\log|\det \partial x/\partial z|`: ``(*batch, D) -> (*batch, D),
        (*batch)``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define with_log_det(z) -> (x, log_det)"
        )

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""z and, again, :math:`\log|\det \partial x/\partial z|`: ``(*batch, D) -> (*batch, D),
        (*batch)``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define inverse_with_log_det(x) -> (z, log_det)"
        )

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""x, :math:`\log|\det J|` with :math:`J = \partial x/\partial z`, and the score of x where
        z has the given one.

        .. math::

            \nabla_x \log q(x) = J^{-\top} \big(\nabla_z \log p(z) - \nabla_z \log|\det J|\big)

        Here through the inverse; a layer that has the product in closed form saves that (Vaitl,
        Nicoli, Nakajima and Kessel, "Fast and unified path gradient estimators for normalizing
        flows", 2024). It is constant: no gradient flows through it.

        Args:
            z: shape ``(*batch, D)``, requiring a gradient.
            score: of the density of z, there: shape ``(*batch, D)``.
        """
        x, log_det = self.with_log_det(z)
        with frozen(self):
            there = x.detach().requires_grad_()
            back, stretch = self.inverse_with_log_det(there)
            (carried,) = torch.autograd.grad(((back * score).sum(-1) - stretch).sum(), there)
        return x, log_det, carried

    def _call(self, z: Tensor) -> Tensor:
        return self.with_log_det(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.inverse_with_log_det(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluated anew at x: ``(*batch, D), (*batch, D) -> (*batch)``."""
        return self.with_log_det(x)[1]
