"""Objectives that fit a flow to an energy."""

from pyroebm.objectives.variational.base import FlowObjective
from pyroebm.objectives.variational.bootstrap import AlphaBootstrap
from pyroebm.objectives.variational.compiled_kl import CompiledKL
from pyroebm.objectives.variational.divergences import ForwardKL, LogVariance
from pyroebm.objectives.variational.flow_matching import match_flow
from pyroebm.objectives.variational.reverse_kl import ReverseKL, estimate_augmented_kl
from pyroebm.objectives.variational.reweighting import AnnealedReweighting
from pyroebm.objectives.variational.symmetric import SymmetrizedKL

__all__ = [
    "AlphaBootstrap",
    "AnnealedReweighting",
    "CompiledKL",
    "FlowObjective",
    "ForwardKL",
    "LogVariance",
    "ReverseKL",
    "SymmetrizedKL",
    "estimate_augmented_kl",
    "match_flow",
]
