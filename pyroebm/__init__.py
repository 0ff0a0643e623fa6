"""Energy-based models on Pyro: define an energy, sample it, fit flows to it, see whether it mixed.

Subpackages are attributes, imported when they are first named: ``pyroebm.partition.ais``.
"""

import importlib
from types import ModuleType

from pyroebm.core.annealing_path import DistributionEnergy, Path
from pyroebm.core.energy import Energy, Sum, Tempered, score, value_and_grad
from pyroebm.core.minibatch import MinibatchEnergy
from pyroebm.core.saving import load, save
from pyroebm.core.supports import spin
from pyroebm.core.wrappers import Unconstrained
from pyroebm.diagnostics.streaming import StreamingMoments
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
from pyroebm.kernels.adaptation.windows import WindowAdaptation
from pyroebm.mcmc.sampler import MCMC
from pyroebm.mcmc.storage import open_run
from pyroebm.ppl.distribution import Boltzmann, initial_states
from pyroebm.ppl.guide import FlowGuide
from pyroebm.ppl.kernel import PyroKernel
from pyroebm.ppl.model import ModelEnergy
from pyroebm.smc import SMCResult, tempered_smc

__version__ = "0.1.0"

_SUBPACKAGES = frozenset(
    {
        "cli",
        "core",
        "data",
        "diagnostics",
        "energies",
        "flows",
        "infer",
        "kernels",
        "mcmc",
        "nn",
        "objectives",
        "partition",
        "ppl",
        "smc",
        "targets",
        "training",
    }
)

__all__ = [
    "AdjustedMCLMC",
    "Barker",
    "BlockGibbs",
    "Boltzmann",
    "ChEES",
    "DMALA",
    "DULA",
    "DistributionEnergy",
    "Energy",
    "FlowGuide",
    "Gibbs",
    "GibbsWithGradients",
    "HMC",
    "IndependenceMetropolis",
    "Info",
    "Jumps",
    "Kernel",
    "MALA",
    "MCLMC",
    "MCMC",
    "MetropolisUnderdamped",
    "MinibatchEnergy",
    "ModelEnergy",
    "NUTS",
    "ParallelTempering",
    "Path",
    "PyroKernel",
    "RandomWalk",
    "SMCResult",
    "State",
    "StochasticGradientLangevin",
    "StreamingMoments",
    "Sum",
    "Tempered",
    "ULA",
    "Unconstrained",
    "UnderdampedLangevin",
    "WindowAdaptation",
    "__version__",
    "initial_states",
    "load",
    "open_run",
    "save",
    "score",
    "spin",
    "tempered_smc",
    "value_and_grad",
]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyroebm.{name}")
    raise AttributeError(f"module 'pyroebm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
