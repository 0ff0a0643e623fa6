"""Networks of images: the first layer at full size, each further one halving it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyroebm.nn import convolutions


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_sizes_of_the_layers(height: int, width: int) -> None:
    x = torch.ones(3, 2, height, width)
    sizes = []
    for layer in convolutions((2, height, width), 6, (4, 5, 6)):
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append(tuple(x.shape[1:]))
    half = ((height + 1) // 2, (width + 1) // 2)
    quarter = ((half[0] + 1) // 2, (half[1] + 1) // 2)
    assert sizes == [(4, height, width), (5, *half), (6, *quarter)]
    assert x.shape == (3, 6)
