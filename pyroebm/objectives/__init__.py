"""Objectives: what turns an energy and draws into a loss."""

from pyroebm.objectives.base import Objective
from pyroebm.objectives.centring import Centring, Sparsity
from pyroebm.objectives.contrastive import ContrastiveDivergence, PersistentCD
from pyroebm.objectives.likelihood import ExactLikelihood, MeanFieldLikelihood, Pseudolikelihood
from pyroebm.objectives.selection import TotalDimSelection, select_total_dim
from pyroebm.objectives.svi import flow_guide, flow_model
from pyroebm.objectives.symmetric import SymmetrizedKL
from pyroebm.objectives.variational import ReverseKL, evaluate_j, fit_flow

__all__ = [
    "Centring",
    "ContrastiveDivergence",
    "ExactLikelihood",
    "MeanFieldLikelihood",
    "Objective",
    "PersistentCD",
    "Pseudolikelihood",
    "ReverseKL",
    "Sparsity",
    "SymmetrizedKL",
    "TotalDimSelection",
    "evaluate_j",
    "fit_flow",
    "flow_guide",
    "flow_model",
    "select_total_dim",
]
