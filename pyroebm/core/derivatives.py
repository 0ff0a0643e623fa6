"""Second derivatives of an energy in x for score matching, differentiable in the parameters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyroebm.core.energy import Energy, score
from pyroebm.core.supports import event_sum, is_real

__all__ = ["curvatures", "unit_directions"]


def unit_directions(x: Tensor, event_dims: int) -> Tensor:
    """Return the d unit vectors of an event, for each event of ``x``: shape ``(d, *x.shape)``.

    The curvatures along them are the diagonal of the Hessian.

    Args:
        x: states, shape ``(*batch, *event)``.
        event_dims: number of dimensions of one event.

    Example:
        >>> unit_directions(torch.zeros(5, 3, 4), 2).shape
        torch.Size([12, 5, 3, 4])
    """
    event = x.shape[x.dim() - event_dims :]
    units = torch.eye(event.numel(), dtype=x.dtype, device=x.device)
    batch = [1] * (x.dim() - event_dims)
    return units.reshape(event.numel(), *batch, *event).expand(event.numel(), *x.shape)


def curvatures(energy: Energy, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the gradient of an energy and its second derivatives along given directions.

    .. math:: \nabla E(x), \qquad c_m(x) = v_m^T \, \nabla^2 E(x) \, v_m

    Each direction costs one Hessian-vector product (Pearlmutter, "Fast Exact Multiplication by the
    Hessian", 1994).

    Args:
        energy: an energy of continuous support.
        x: states, shape ``(*batch, *event)``, of the energy's dtype and device; it is copied, and
            receives no gradient.
        directions: :math:`v_m`, shape ``(M, *batch, *event)``.

    Returns:
        the gradient, shape ``(*batch, *event)``, and the curvatures, ``(M, *batch)``,
        differentiable in the parameters.

    Raises:
        ValueError: as :func:`~pyroebm.core.value_and_grad`; if ``directions`` has another shape; if
            the support is R^d and the gradient does not depend on x through autograd. (A linear
            energy is a density on x > 0, so it is accepted there.)

    Warns:
        UserWarning: if the support is R^d and all curvatures are exactly 0.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> gradient, curvature = curvatures(DoubleWell(), torch.tensor([1.0]), torch.ones(1, 1))
        >>> gradient, curvature  # 4 x^3 - 8 x + 1 and 12 x^2 - 8
        (tensor([-3.], grad_fn=<NegBackward0>), tensor([[4.]], grad_fn=<StackBackward0>))
    """
    dims = x.dim() - len(energy.batch_shape(x))
    if directions.dim() != x.dim() + 1 or directions.shape[1:] != x.shape or not len(directions):
        raise ValueError(
            f"directions must have shape (M, *x.shape) with M >= 1, got {tuple(directions.shape)}"
            f" for x {tuple(x.shape)}"
        )
    with torch.inference_mode(False), torch.enable_grad():
        x, directions = (t.clone() if t.is_inference() else t.detach() for t in (x, directions))
        gradient = -score(energy, x.requires_grad_(True))
        found, depends = [], True
        for v in directions:
            product = None
            if gradient.requires_grad:
                product = torch.autograd.grad(gradient, x, v, create_graph=True, allow_unused=True)[
                    0
                ]
            depends = product is not None
            found.append(event_sum(torch.zeros_like(x) if product is None else product * v, dims))
        values = torch.stack(found)
    if is_real(energy.support) and not bool(values.any()):
        _report_zero_curvature(type(energy).__name__, depends)
    return gradient, values


def _report_zero_curvature(name: str, depends: bool) -> None:
    """Raise an error, or warn, if all second derivatives are exactly zero.

    The error is for a gradient that does not depend on x through autograd; the warning for second
    derivatives that exist and are 0.
    """
    why = (
        f"every second derivative of {name} is exactly 0: score matching cannot fit an energy that"
        " is piecewise linear (ReLU), or whose gradient does not depend on x through autograd. Use"
        " smooth activations (SiLU, softplus, tanh), or DenoisingScoreMatching, which needs first"
        " derivatives only"
    )
    if not depends:
        raise ValueError(why)
    warnings.warn(
        f"{why}. (This is harmless for a network that is initialized to 0 and has no envelope.)",
        UserWarning,
        stacklevel=4,
    )
