"""Energies of the systems that the field works with."""

from pyroebm.energies.lattice import Ising, Potts
from pyroebm.energies.layers import Layers
from pyroebm.energies.rbm import BernoulliRBM, GaussianRBM

__all__ = ["BernoulliRBM", "GaussianRBM", "Ising", "Layers", "Potts"]
