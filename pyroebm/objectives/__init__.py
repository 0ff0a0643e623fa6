"""Objectives: what turns an energy and draws into a loss."""

from pyroebm.objectives.base import Objective
from pyroebm.objectives.centring import Centring, Sparsity
from pyroebm.objectives.contrastive import ContrastiveDivergence, PersistentCD
from pyroebm.objectives.discrete import MinimumProbabilityFlow, Pseudolikelihood, RatioMatching
from pyroebm.objectives.flow_contrastive import FlowContrastive
from pyroebm.objectives.likelihood import ExactLikelihood, MeanFieldLikelihood
from pyroebm.objectives.noise import gaussian_noise
from pyroebm.objectives.noise_contrastive import ConditionalNCE, NoiseContrastive, RankingNCE
from pyroebm.objectives.selection import TotalDimSelection, select_total_dim
from pyroebm.objectives.svi import flow_guide, flow_model
from pyroebm.objectives.variational import ReverseKL, evaluate_j, fit_flow

__all__ = [
    "Centring",
    "ConditionalNCE",
    "ContrastiveDivergence",
    "ExactLikelihood",
    "FlowContrastive",
    "MeanFieldLikelihood",
    "MinimumProbabilityFlow",
    "NoiseContrastive",
    "Objective",
    "PersistentCD",
    "Pseudolikelihood",
    "RankingNCE",
    "RatioMatching",
    "ReverseKL",
    "Sparsity",
    "TotalDimSelection",
    "evaluate_j",
    "fit_flow",
    "flow_guide",
    "flow_model",
    "gaussian_noise",
    "select_total_dim",
]
