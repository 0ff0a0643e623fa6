"""Objectives: what turns an energy and draws into a loss."""

from pyroebm.objectives.base import HasLosses, Objective
from pyroebm.objectives.bootstrap import AlphaBootstrap
from pyroebm.objectives.centring import Centring, Sparsity
from pyroebm.objectives.contrastive import ContrastiveDivergence
from pyroebm.objectives.divergences import ForwardKL, LogVariance
from pyroebm.objectives.improved import ImprovedCD
from pyroebm.objectives.likelihood import ExactLikelihood, MeanFieldLikelihood, Pseudolikelihood
from pyroebm.objectives.persistent import PersistentCD
from pyroebm.objectives.selection import TotalDimSelection, select_total_dim
from pyroebm.objectives.short_run import ShortRun, langevin
from pyroebm.objectives.svi import flow_guide, flow_model
from pyroebm.objectives.variational import ReverseKL, evaluate_j, fit_flow

__all__ = [
    "AlphaBootstrap",
    "Centring",
    "ContrastiveDivergence",
    "evaluate_j",
    "ExactLikelihood",
    "fit_flow",
    "flow_guide",
    "flow_model",
    "ForwardKL",
    "HasLosses",
    "ImprovedCD",
    "langevin",
    "LogVariance",
    "MeanFieldLikelihood",
    "Objective",
    "PersistentCD",
    "Pseudolikelihood",
    "ReverseKL",
    "select_total_dim",
    "ShortRun",
    "Sparsity",
    "TotalDimSelection",
]
