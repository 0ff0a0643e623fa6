"""Small data sets without downloads, and readers of image files."""

from pyroebm.data.datasets import (
    LAPLACE_LOG_LIKELIHOOD,
    Split,
    bars_and_stripes,
    dequantized,
    digits,
    image_patches,
    laplace_mixture,
    parity,
    quantized,
    whitened,
)
from pyroebm.data.readers import FASHION_MNIST, load_binary, read_idx

__all__ = [
    "FASHION_MNIST",
    "LAPLACE_LOG_LIKELIHOOD",
    "Split",
    "bars_and_stripes",
    "dequantized",
    "digits",
    "image_patches",
    "laplace_mixture",
    "load_binary",
    "parity",
    "quantized",
    "read_idx",
    "whitened",
]
