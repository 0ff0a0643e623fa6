"""Layers of zuko as Pyro transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm.core.rng import drawing_from
from pyroebm.flows.bijection import Bijection, check_event

__all__ = ["ZukoTransform", "installed_zuko", "reversed_layer", "zuko_layer"]


class ZukoTransform(Bijection):
    r"""A lazy transform of zuko (Rozet et al., "Zuko: normalizing flows in PyTorch", 2022) as a
    transform of Pyro.

    It is a ``TransformModule``: Pyro finds its parameters, and it serves in
    ``TransformedDistribution`` (``rsample`` too), ``AutoNormalizingFlow``, ``NeuTraReparam`` and as
    a layer of :class:`Flow`. Its direction, z to x, is zuko's own: zuko's flows map data to noise,
    so give ``flow.transform.inv`` to sample as zuko does, or ``flow.transform`` where the fast
    direction is to be that of the draw. What zuko builds is built anew at each call, with the
    parameters as they are then.

    Args:
        lazy: a ``zuko.lazy.LazyTransform`` without context.
        dim: D.

    Raises:
        ValueError: if ``dim`` < 1; when called, if the last dimension is not ``dim`` or the image
            is of another shape or dtype.

    Example:
        >>> import zuko, pyro.distributions as dist
        >>> transform = ZukoTransform(zuko.flows.NSF(2).transform, dim=2)
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> dist.TransformedDistribution(base, [transform]).rsample((3,)).requires_grad
        True
    """

    def __init__(self, lazy: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.lazy = lazy
        self.train(self.training)

    def train(self, mode: bool = True) -> ZukoTransform:
        """As of any module, but for the parts of zuko: its continuous flows in eval mode give their
        parameters no gradient."""
        super().train(mode)
        self.lazy.train(True)
        return self

    def _evaluated(self, transform: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        check_event(value, self.dim)
        image, log_det = transform.call_and_ladj(value)
        if (
            image.shape != value.shape
            or log_det.shape != value.shape[:-1]
            or image.dtype != value.dtype
        ):
            raise ValueError(
                f"the transform must give an event like {tuple(value.shape)} of {value.dtype} and"
                " one log-determinant for each,"
                f" but it gave {tuple(image.shape)} of {image.dtype} and {tuple(log_det.shape)}"
            )
        return image, log_det

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluated(self.lazy(), z)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self._evaluated(self.lazy().inv, x)
        return z, -log_det


def installed_zuko() -> Any:
    """zuko, which is optional."""
    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            "this flow is made of zuko's layers, which are not installed: pip install"
            " 'pyroebm[flows]'"
        ) from error
    return zuko


def zuko_layer(
    make: Callable[..., nn.Module],
    dim: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    **options: Any,
) -> ZukoTransform:
    """zuko draws its weights from torch's global stream and in float32; the last layer is set to
    zero, the identity."""
    with drawing_from(generator):
        lazy = make(dim, **options).to(dtype)
    network = getattr(lazy, "hyper", getattr(lazy, "ode", None))
    # a spline of one entry has no network: numbers alone
    last = lazy if network is None else list(network.children())[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    return ZukoTransform(lazy, dim)


def reversed_layer(layer: ZukoTransform) -> ZukoTransform:
    """The inverse map, with the same parameters."""
    lazy: Any = layer.lazy
    return ZukoTransform(lazy.inv, layer.dim)
