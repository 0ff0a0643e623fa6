"""Energies whose log Z, moments, mode weights and exact draws are known, to test samplers with."""

from pyroebm.targets.base import Target
from pyroebm.targets.curved import Banana, Funnel, Ring, Rosenbrock
from pyroebm.targets.discrete import BernoulliProduct, CategoricalOneHot, SpinProduct
from pyroebm.targets.exponential import (
    Beta,
    Dirichlet,
    Exponential,
    ExponentialFamily,
    Gamma,
    LogNormal,
)
from pyroebm.targets.fields import Phi4
from pyroebm.targets.noisy_curves import NoisyCurves, TwoMoons, TwoSpirals
from pyroebm.targets.normals import Gaussian, GaussianMixture, scales_gaussian
from pyroebm.targets.particles import DW4, LennardJones, Particles
from pyroebm.targets.toys import Checkerboard, Circles, Pinwheel, eight_gaussians
from pyroebm.targets.wells import DoubleWell, HalfDisc, ManyWell

__all__ = [
    "Banana",
    "BernoulliProduct",
    "Beta",
    "CategoricalOneHot",
    "Checkerboard",
    "Circles",
    "DW4",
    "Dirichlet",
    "DoubleWell",
    "Exponential",
    "ExponentialFamily",
    "Funnel",
    "Gamma",
    "Gaussian",
    "GaussianMixture",
    "HalfDisc",
    "LennardJones",
    "LogNormal",
    "ManyWell",
    "NoisyCurves",
    "Particles",
    "Phi4",
    "Pinwheel",
    "Ring",
    "Rosenbrock",
    "SpinProduct",
    "Target",
    "TwoMoons",
    "TwoSpirals",
    "eight_gaussians",
    "scales_gaussian",
]
