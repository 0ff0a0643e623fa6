"""Markov kernels on rows: each file one algorithm, each kernel a frozen set of settings with ``init`` and ``step``."""

from pyroebm.kernels.base import ContinuousKernel, GradientKernel, Info, Kernel, State
from pyroebm.kernels.discrete import DMALA, DULA, GibbsWithGradients
from pyroebm.kernels.gibbs import BlockGibbs, Gibbs
from pyroebm.kernels.hmc import HMC
from pyroebm.kernels.langevin import MALA, ULA
from pyroebm.kernels.metric import Dense, Diagonal, LowRank
from pyroebm.kernels.nuts import NUTS

__all__ = [
    "BlockGibbs",
    "ContinuousKernel",
    "DMALA",
    "DULA",
    "Dense",
    "Diagonal",
    "Gibbs",
    "GibbsWithGradients",
    "GradientKernel",
    "HMC",
    "Info",
    "Kernel",
    "LowRank",
    "MALA",
    "NUTS",
    "State",
    "ULA",
]
