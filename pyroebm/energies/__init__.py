"""Energies of the systems that the field works with."""

from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.boltzmann import BoltzmannMachine
from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.energies.lattice import Ising, Potts
from pyroebm.energies.layers import Layers
from pyroebm.energies.neural import ConvEnergy, MLPEnergy, NeuralEnergy
from pyroebm.energies.products import ProductOfExpertsEnergy
from pyroebm.energies.rbm import BernoulliRBM, GaussianRBM
from pyroebm.energies.tied import TiedRBM, compose

__all__ = [
    "BernoulliRBM",
    "BoltzmannMachine",
    "ConvEnergy",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "GaussianRBM",
    "Ising",
    "Layers",
    "MLPEnergy",
    "NeuralEnergy",
    "Potts",
    "ProductOfExpertsEnergy",
    "TiedRBM",
    "compose",
]
