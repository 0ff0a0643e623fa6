"""Small data sets that need no download, and readers of a user's own image files."""

from pyroebm.data.datasets import (
    LAPLACE_LOG_LIKELIHOOD,
    Split,
    bars_and_stripes,
    dequantised,
    digits,
    image_patches,
    laplace_mixture,
    parity,
    quantised,
    whitened,
)
from pyroebm.data.readers import FASHION_MNIST, load_binary, read_idx

__all__ = [
    "FASHION_MNIST",
    "LAPLACE_LOG_LIKELIHOOD",
    "Split",
    "bars_and_stripes",
    "dequantised",
    "digits",
    "image_patches",
    "laplace_mixture",
    "load_binary",
    "parity",
    "quantised",
    "read_idx",
    "whitened",
]
