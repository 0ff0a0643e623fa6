"""Energies, supports, gradients, wrappers, compilation, random numbers and files."""

from pyroebm.core.annealing_path import DistributionEnergy, GeometricPath
from pyroebm.core.derivatives import curvatures, unit_directions
from pyroebm.core.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.core.enumeration import all_bits
from pyroebm.core.files import FileError
from pyroebm.core.minibatch import MinibatchEnergy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import seeded_generator
from pyroebm.core.saving import Saveable
from pyroebm.core.statistics import Estimate
from pyroebm.core.supports import circular, spin
from pyroebm.core.wrappers import (
    Conditioned,
    LogRegularized,
    PotentialFn,
    Relaxed,
    Unconstrained,
    Unnormalized,
)

__all__ = [
    "LogRegularized",
    "Conditioned",
    "DistributionEnergy",
    "Energy",
    "Estimate",
    "FileError",
    "MinibatchEnergy",
    "GeometricPath",
    "PotentialFn",
    "Progress",
    "Relaxed",
    "Saveable",
    "Sum",
    "Tempered",
    "Unconstrained",
    "Unnormalized",
    "all_bits",
    "curvatures",
    "score",
    "seeded_generator",
    "circular",
    "spin",
    "unit_directions",
    "value_and_grad",
]
