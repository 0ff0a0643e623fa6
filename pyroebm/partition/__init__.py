"""Estimation of log Z: exact, or with a standard error and the direction of its bias."""

from pyroebm.partition.annealing import ais, bidirectional_ais, reverse_ais, schedule
from pyroebm.partition.bases import IndependentLayers, IndependentSites, base_rates
from pyroebm.partition.bridging import bennett_acceptance_ratio, bridge
from pyroebm.partition.estimators import smc, thermodynamic_integration
from pyroebm.partition.layered import LayeredPath, LayerGibbs
from pyroebm.partition.numeric import exact, expectation, quadrature
from pyroebm.partition.result import BidirectionalAIS, LogZ

__all__ = [
    "BidirectionalAIS",
    "IndependentLayers",
    "IndependentSites",
    "LayerGibbs",
    "LayeredPath",
    "LogZ",
    "bennett_acceptance_ratio",
    "ais",
    "base_rates",
    "bidirectional_ais",
    "bridge",
    "exact",
    "expectation",
    "quadrature",
    "reverse_ais",
    "schedule",
    "smc",
    "thermodynamic_integration",
]
