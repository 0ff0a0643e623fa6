"""log Z of an energy: exact where it can be had, else estimated, with its error and the side on
which it errs."""

from pyroebm.partition.annealing import ais, bracket, reverse_ais, schedule
from pyroebm.partition.bases import IndependentLayers, IndependentSites, base_rates
from pyroebm.partition.bridging import acceptance_ratio, bridge
from pyroebm.partition.estimators import smc, thermodynamic_integration
from pyroebm.partition.layered import LayeredPath, LayerGibbs
from pyroebm.partition.numeric import exact, expectation, quadrature
from pyroebm.partition.result import Bracket, LogZ

__all__ = [
    "Bracket",
    "IndependentLayers",
    "IndependentSites",
    "LayerGibbs",
    "LayeredPath",
    "LogZ",
    "acceptance_ratio",
    "ais",
    "base_rates",
    "bracket",
    "bridge",
    "exact",
    "expectation",
    "quadrature",
    "reverse_ais",
    "schedule",
    "smc",
    "thermodynamic_integration",
]
