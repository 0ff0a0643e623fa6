"""Objectives: what turns an energy and draws into a loss."""

from pyroebm.objectives.base import Objective
from pyroebm.objectives.selection import TotalDimSelection, select_total_dim
from pyroebm.objectives.svi import flow_guide, flow_model
from pyroebm.objectives.variational import ReverseKL, evaluate_j, fit_flow

__all__ = [
    "Objective",
    "ReverseKL",
    "TotalDimSelection",
    "evaluate_j",
    "fit_flow",
    "flow_guide",
    "flow_model",
    "select_total_dim",
]
