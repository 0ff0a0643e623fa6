"""Normalised stand-ins for the density of an energy, and importance sampling with them."""

from pyroebm.flows.coupling import AdditiveCoupling
from pyroebm.flows.density import FlowEnergy
from pyroebm.flows.extended import Extended
from pyroebm.flows.flow import Flow
from pyroebm.flows.importance import ImportanceResult, importance_sample
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.flows.networks import ConditionalGaussian
from pyroebm.flows.nice import NICE, RedundantNICE
from pyroebm.flows.report import FlowReport, judge_flow

__all__ = [
    "AdditiveCoupling",
    "ConditionalGaussian",
    "Extended",
    "Flow",
    "FlowEnergy",
    "FlowReport",
    "ImportanceResult",
    "NICE",
    "PLULinear",
    "RedundantNICE",
    "Shift",
    "importance_sample",
    "judge_flow",
]
