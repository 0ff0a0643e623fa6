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
    r"""A lazy transform of zuko as a transform of Pyro (Rozet et al., 2022).

    It is a ``TransformModule``: Pyro registers its parameters, and it can be used in
    ``TransformedDistribution``, ``AutoNormalizingFlow`` and ``NeuTraReparam`` and as a layer of
    :class:`Flow`. It maps z to x by ``lazy``. The flows of zuko map data to noise, so give
    ``flow.transform.inv`` to sample as zuko does, or ``flow.transform`` if sampling should be the
    fast direction. The transform is built at each call with the current parameters.

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
        """Set the training mode, of this module alone.

        The modules of zuko stay in training mode: in eval mode its continuous flows have no
        gradients in their parameters.
        """
        super().train(mode)
        self.lazy.train(True)
        return self

    def _evaluate(self, transform: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        check_event(value, self.dim)
        image, log_det = transform.call_and_ladj(value)
        if (
            image.shape != value.shape
            or log_det.shape != value.shape[:-1]
            or image.dtype != value.dtype
        ):
            raise ValueError(
                f"the transform must give an image of shape {tuple(value.shape)} and"
                f" {value.dtype} and log-determinants of shape {tuple(value.shape[:-1])}, but it"
                f" gave {tuple(image.shape)} of {image.dtype} and {tuple(log_det.shape)}"
            )
        return image, log_det

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        return self._evaluate(self.lazy(), z)

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        z, log_det = self._evaluate(self.lazy().inv, x)
        return z, -log_det


def installed_zuko() -> Any:
    """Import zuko, an optional dependency."""
    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            "this flow needs zuko, which is not installed: pip install 'pyroebm[flows]'"
        ) from error
    return zuko


def zuko_layer(
    make: Callable[..., nn.Module],
    dim: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    **options: Any,
) -> ZukoTransform:
    """Make a layer of zuko that is the identity, with initial weights drawn from a generator.

    Layers of zuko draw their weights from torch's default generator in float32.
    """
    with drawing_from(generator):
        lazy = make(dim, **options).to(dtype)
    network = getattr(lazy, "hyper", getattr(lazy, "ode", None))
    # a spline of one entry has parameters but no network
    last = lazy if network is None else list(network.children())[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    return ZukoTransform(lazy, dim)


def reversed_layer(layer: ZukoTransform) -> ZukoTransform:
    """Return the inverse map, with the same parameters."""
    lazy: Any = layer.lazy
    return ZukoTransform(lazy.inv, layer.dim)
