"""Energies: Boltzmann machines, lattices, neural networks, classifiers, tilted densities."""

from pyroebm.energies.belief import DeepBeliefNetwork
from pyroebm.energies.boltzmann import BoltzmannMachine
from pyroebm.energies.classifier import ClassifierEnergy
from pyroebm.energies.deep import DeepBoltzmannMachine
from pyroebm.energies.features import FeatureLatentEnergy
from pyroebm.energies.lattice import Ising, Potts
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.energies.neural import ConvEnergy, MLPEnergy, NeuralEnergy
from pyroebm.energies.products import ProductOfExpertsEnergy
from pyroebm.energies.rbm import BernoulliRBM, GaussianRBM
from pyroebm.energies.tied import TiedRBM, compose
from pyroebm.energies.tilted import Tilted

__all__ = [
    "BernoulliRBM",
    "BoltzmannMachine",
    "ClassifierEnergy",
    "ConvEnergy",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "FeatureLatentEnergy",
    "GaussianRBM",
    "Ising",
    "LayeredMachine",
    "Layers",
    "MLPEnergy",
    "NeuralEnergy",
    "Potts",
    "ProductOfExpertsEnergy",
    "TiedRBM",
    "Tilted",
    "compose",
]
