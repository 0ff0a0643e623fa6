"""Energy-based models on Pyro: define an energy, sample it, fit flows to it, see whether it mixed."""

from pyroebm.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.guides import FlowGuide
from pyroebm.kernels import (
    DMALA,
    DULA,
    HMC,
    MALA,
    MCLMC,
    NUTS,
    ULA,
    AdjustedMCLMC,
    Barker,
    BlockGibbs,
    ChEES,
    Gibbs,
    GibbsWithGradients,
    IndependenceMetropolis,
    Info,
    Jumps,
    Kernel,
    MetropolisUnderdamped,
    ParallelTempering,
    RandomWalk,
    State,
    StochasticGradientLangevin,
    UnderdampedLangevin,
)
from pyroebm.kernels.adaptation import WindowAdaptation
from pyroebm.mcmc import MCMC
from pyroebm.minibatch import MinibatchEnergy
from pyroebm.model_energy import ModelEnergy
from pyroebm.paths import DistributionEnergy, Path
from pyroebm.ppl import Boltzmann, PyroKernel, initial_states
from pyroebm.smc import SMCResult, tempered_smc
from pyroebm.store import open_run
from pyroebm.streaming import StreamingMoments
from pyroebm.supports import spin
from pyroebm.views import Unconstrained

__version__ = "0.1.0"

__all__ = [
    "AdjustedMCLMC",
    "Barker",
    "ChEES",
    "Boltzmann",
    "PyroKernel",
    "initial_states",
    "BlockGibbs",
    "DMALA",
    "DULA",
    "Gibbs",
    "GibbsWithGradients",
    "HMC",
    "IndependenceMetropolis",
    "Jumps",
    "MALA",
    "MCLMC",
    "MCMC",
    "MetropolisUnderdamped",
    "MinibatchEnergy",
    "NUTS",
    "RandomWalk",
    "ULA",
    "UnderdampedLangevin",
    "DistributionEnergy",
    "Energy",
    "FlowGuide",
    "Info",
    "Kernel",
    "ModelEnergy",
    "ParallelTempering",
    "Path",
    "SMCResult",
    "State",
    "StreamingMoments",
    "StochasticGradientLangevin",
    "Sum",
    "Tempered",
    "Unconstrained",
    "WindowAdaptation",
    "__version__",
    "open_run",
    "score",
    "spin",
    "tempered_smc",
    "value_and_grad",
]
