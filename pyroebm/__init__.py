"""Energy-based models on Pyro: define an energy, sample it, fit flows to it, see whether it mixed.

Subpackages are attributes, imported when they are first named: ``pyroebm.partition.ais``.
"""

import importlib
from types import ModuleType

from pyroebm.core.energy import Energy
from pyroebm.core.saving import load, save
from pyroebm.diagnostics import diagnose
from pyroebm.flows import importance_sample
from pyroebm.kernels import HMC, MALA, NUTS, ULA, ChEES, Gibbs, ParallelTempering
from pyroebm.mcmc.sampler import MCMC
from pyroebm.mcmc.storage import open_run
from pyroebm.ppl.distribution import Boltzmann
from pyroebm.ppl.guide import FlowGuide
from pyroebm.ppl.model import ModelEnergy
from pyroebm.training.fit import fit, fit_steps

__version__ = "0.1.0"

_SUBPACKAGES = frozenset(
    {
        "calibration",
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
        "zoo",
    }
)

__all__ = [
    "Boltzmann",
    "ChEES",
    "Energy",
    "FlowGuide",
    "Gibbs",
    "HMC",
    "MALA",
    "MCMC",
    "ModelEnergy",
    "NUTS",
    "ParallelTempering",
    "ULA",
    "__version__",
    "diagnose",
    "fit",
    "fit_steps",
    "importance_sample",
    "load",
    "open_run",
    "save",
]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyroebm.{name}")
    raise AttributeError(f"module 'pyroebm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
