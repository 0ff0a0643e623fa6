"""Normalizing flows, which approximate the density of an energy, and importance sampling."""

from pyroebm.flows.adapters import ZukoTransform
from pyroebm.flows.affine import AffineCoupling, Loft
from pyroebm.flows.augmented import AugmentedEnergy
from pyroebm.flows.base import Base, MixtureBase, StandardNormal, StudentBase
from pyroebm.flows.bijection import Bijection
from pyroebm.flows.coupling import AdditiveCoupling
from pyroebm.flows.density import FlowEnergy
from pyroebm.flows.equivariant import EquivariantFlow, PairField
from pyroebm.flows.flow import Flow
from pyroebm.flows.groups import generated_group, permutations, sign_flips
from pyroebm.flows.importance import ImportanceResult, importance_sample
from pyroebm.flows.linear import Permutation, PLULinear, Shift
from pyroebm.flows.networks import ConditionalGaussian
from pyroebm.flows.nice import NICE, RedundantNICE
from pyroebm.flows.pullback import PullbackEnergy
from pyroebm.flows.realnvp import RealNVP
from pyroebm.flows.report import FlowReport, evaluate_flow
from pyroebm.flows.symmetrized import Symmetrized
from pyroebm.flows.zuko_flows import AutoregressiveFlow, ContinuousFlow, SplineFlow

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "AutoregressiveFlow",
    "Base",
    "Bijection",
    "ConditionalGaussian",
    "ContinuousFlow",
    "EquivariantFlow",
    "AugmentedEnergy",
    "Flow",
    "FlowEnergy",
    "FlowReport",
    "ImportanceResult",
    "Loft",
    "MixtureBase",
    "NICE",
    "PLULinear",
    "PairField",
    "Permutation",
    "RealNVP",
    "RedundantNICE",
    "Shift",
    "SplineFlow",
    "StandardNormal",
    "StudentBase",
    "Symmetrized",
    "PullbackEnergy",
    "ZukoTransform",
    "generated_group",
    "importance_sample",
    "evaluate_flow",
    "permutations",
    "sign_flips",
]
