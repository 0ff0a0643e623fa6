"""Energy-based models on Pyro."""

from pyroebm.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.supports import spin
from pyroebm.views import Unconstrained

__version__ = "0.1.0"

__all__ = ["Energy", "Sum", "Tempered", "Unconstrained", "score", "spin", "value_and_grad", "__version__"]
