"""Convergence diagnostics: R-hat, effective sample sizes, diagnoses, Stein residuals, ArviZ.

Figures are in :mod:`pyroebm.diagnostics.plots`.
"""

from pyroebm.core.statistics import (
    Estimate,
    arviz,
    bfmi,
    energy_distance,
    ess_bulk,
    ess_tail,
    maximum_mean_discrepancy,
    mcse_mean,
    median_distance,
    mode_coverage_entropy,
    pareto_k,
    r_hat,
)
from pyroebm.diagnostics.arviz_data import summary, to_arviz
from pyroebm.diagnostics.convergence import Diagnosis, Finding, diagnose, mode_masses
from pyroebm.diagnostics.pyro_model import from_pyro
from pyroebm.diagnostics.stein import stein_residual, stein_z
from pyroebm.diagnostics.streaming import StreamingMoments
from pyroebm.diagnostics.stuck import describe_stuck, stuck_chains

__all__ = [
    "Estimate",
    "Finding",
    "StreamingMoments",
    "Diagnosis",
    "arviz",
    "bfmi",
    "describe_stuck",
    "diagnose",
    "energy_distance",
    "ess_bulk",
    "ess_tail",
    "from_pyro",
    "maximum_mean_discrepancy",
    "mcse_mean",
    "median_distance",
    "mode_coverage_entropy",
    "mode_masses",
    "pareto_k",
    "r_hat",
    "stein_residual",
    "stein_z",
    "stuck_chains",
    "summary",
    "to_arviz",
]
