"""Convolutional networks for images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from pyroebm.nn.mlp import (
    ACTIVATIONS,
    bound_by_spectral_norm,
    check_activation,
    check_widths,
    initialize_weights,
)

__all__ = ["convolutions"]


def convolutions(
    event_shape: Sequence[int],
    out_features: int,
    channels: Sequence[int] = (32, 64, 128),
    *,
    activation: str = "silu",
    spectral_norm: bool = False,
    zero_last: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    r"""Build a convolutional network with 3 x 3 filters and a linear output layer.

    The first layer has the size of the image; each further layer halves height and width.

    Args:
        event_shape: (colors, height, width) of an image.
        out_features: width of the output.
        channels: filters of each layer, at least one.
        activation: one of :data:`~pyroebm.nn.ACTIVATIONS`.
        spectral_norm: divide the filters of each layer by their largest singular value.
        zero_last: whether the output layer is initialized to zero.
        dtype: floating-point type of the parameters; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Returns:
        a module ``(n, *event_shape) -> (n, out_features)``.

    Raises:
        ValueError: if ``event_shape`` does not have three sizes, if ``channels`` is empty or not
            positive, or if ``activation`` is unknown.

    Example:
        >>> convolutions((1, 8, 8), 10, (4, 8))(torch.ones(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_widths("channels", channels)
    check_activation(activation)
    if len(event_shape) != 3:
        raise ValueError(
            f"event_shape must be (colors, height, width), got event_shape={tuple(event_shape)}"
        )
    colors, height, width = event_shape
    filters: list[nn.Module] = []
    for k, (a, b) in enumerate(itertools.pairwise([colors, *channels])):
        stride = 1 if k == 0 else 2
        filters.append(
            nn.utils.skip_init(nn.Conv2d, a, b, 3, stride=stride, padding=1, dtype=dtype)
        )
        height, width = math.ceil(height / stride), math.ceil(width / stride)
    head = nn.utils.skip_init(nn.Linear, channels[-1] * height * width, out_features, dtype=dtype)
    initialize_weights([*filters, head], generator, zero_last)
    if spectral_norm:
        bound_by_spectral_norm(filters, generator)
    activate = ACTIVATIONS[activation]
    return nn.Sequential(
        *itertools.chain.from_iterable((layer, activate()) for layer in filters), nn.Flatten(), head
    )
