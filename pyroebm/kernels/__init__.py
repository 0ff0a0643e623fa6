"""Markov kernels that move many chains at once.

Each file holds one family of kernels. A kernel is a frozen dataclass of settings with the methods
``init`` and ``step``; ``column``, ``rows``, ``normal_like``, ``choose``, ``metric_of`` and
``metropolis`` are for those who write one.
"""

from pyroebm.kernels.adaptation.windows import WindowAdaptation
from pyroebm.kernels.barker import Barker
from pyroebm.kernels.base import (
    ContinuousKernel,
    GradientKernel,
    Info,
    Kernel,
    PointState,
    State,
    WrappedKernel,
    choose,
    column,
    normal_like,
    rows,
)
from pyroebm.kernels.compiling import CompiledKernel
from pyroebm.kernels.discrete import DMALA, DULA, GibbsWithGradients
from pyroebm.kernels.ensemble import ChEES, ChEESAdaptation
from pyroebm.kernels.gibbs import BlockGibbs, Gibbs
from pyroebm.kernels.hamiltonian import metropolis
from pyroebm.kernels.hmc import HMC
from pyroebm.kernels.independence import IndependenceMetropolis, LocalGlobalMixture, Proposal
from pyroebm.kernels.langevin import MALA, ULA
from pyroebm.kernels.metric import Dense, Diagonal, LowRank, metric_of
from pyroebm.kernels.microcanonical import MCLMC, AdjustedMCLMC, EnergyVarianceAdaptation
from pyroebm.kernels.nuts.kernel import NUTS, LockstepNUTS
from pyroebm.kernels.random_walk import RandomWalk
from pyroebm.kernels.stochastic import StochasticGradientLangevin
from pyroebm.kernels.tempering import (
    LadderAdaptation,
    ParallelTempering,
    TemperedState,
    TemperingReport,
)
from pyroebm.kernels.underdamped import BAOAB, GHMC

__all__ = [
    "AdjustedMCLMC",
    "Barker",
    "BlockGibbs",
    "ChEES",
    "ChEESAdaptation",
    "CompiledKernel",
    "ContinuousKernel",
    "DMALA",
    "DULA",
    "Dense",
    "Diagonal",
    "EnergyVarianceAdaptation",
    "Gibbs",
    "GibbsWithGradients",
    "GradientKernel",
    "HMC",
    "IndependenceMetropolis",
    "Info",
    "LocalGlobalMixture",
    "Kernel",
    "LadderAdaptation",
    "LockstepNUTS",
    "LowRank",
    "MALA",
    "MCLMC",
    "GHMC",
    "NUTS",
    "ParallelTempering",
    "PointState",
    "Proposal",
    "RandomWalk",
    "State",
    "StochasticGradientLangevin",
    "TemperedState",
    "TemperingReport",
    "ULA",
    "BAOAB",
    "WindowAdaptation",
    "WrappedKernel",
    "choose",
    "column",
    "metric_of",
    "metropolis",
    "normal_like",
    "rows",
]
