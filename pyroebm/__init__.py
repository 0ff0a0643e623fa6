"""Energy-based models on Pyro: define an energy, sample it, fit flows to it, see whether it mixed."""

from pyroebm.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.kernels import HMC, MALA, NUTS, ULA, Info, Kernel, ParallelTempering, State
from pyroebm.kernels.adaptation import WindowAdaptation
from pyroebm.mcmc import MCMC
from pyroebm.paths import DistributionEnergy, Path
from pyroebm.ppl import Boltzmann, PyroKernel, initial_states
from pyroebm.smc import SMCResult, tempered_smc
from pyroebm.supports import spin
from pyroebm.views import Unconstrained

__version__ = "0.1.0"

__all__ = [
    "Boltzmann",
    "PyroKernel",
    "initial_states",
    "HMC",
    "MALA",
    "MCMC",
    "NUTS",
    "ULA",
    "DistributionEnergy",
    "Energy",
    "Info",
    "Kernel",
    "ParallelTempering",
    "Path",
    "SMCResult",
    "State",
    "Sum",
    "Tempered",
    "Unconstrained",
    "WindowAdaptation",
    "__version__",
    "score",
    "spin",
    "tempered_smc",
    "value_and_grad",
]
