"""Energy-based models on Pyro: define an energy, sample it, fit flows to it, see whether it mixed."""

from pyroebm.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.kernels import DMALA, DULA, HMC, MALA, NUTS, ULA, BlockGibbs, Gibbs, GibbsWithGradients, Info, Kernel, State
from pyroebm.kernels.adaptation import WindowAdaptation
from pyroebm.mcmc import MCMC
from pyroebm.ppl import Boltzmann, PyroKernel, initial_states
from pyroebm.supports import spin
from pyroebm.views import Unconstrained

__version__ = "0.1.0"

__all__ = [
    "Boltzmann",
    "PyroKernel",
    "initial_states",
    "BlockGibbs",
    "DMALA",
    "DULA",
    "Gibbs",
    "GibbsWithGradients",
    "HMC",
    "MALA",
    "MCMC",
    "NUTS",
    "ULA",
    "Energy",
    "Info",
    "Kernel",
    "State",
    "Sum",
    "Tempered",
    "Unconstrained",
    "WindowAdaptation",
    "__version__",
    "score",
    "spin",
    "value_and_grad",
]
