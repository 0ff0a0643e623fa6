"""Neural networks with seeded initial weights: perceptrons, convolutions, generators."""

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
