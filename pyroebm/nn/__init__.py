"""Networks, started from a generator of their own: perceptrons, convolutions, directed models."""

from pyroebm.nn.conv import convolutions
from pyroebm.nn.generators import Generator, MLPGenerator
from pyroebm.nn.mlp import ACTIVATIONS, mlp

__all__ = [
    "ACTIVATIONS",
    "Generator",
    "MLPGenerator",
    "convolutions",
    "mlp",
]
