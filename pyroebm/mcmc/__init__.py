"""MCMC with many chains in one process, runs that can be resumed, and draws streamed to files."""

from pyroebm.mcmc.sampler import MCMC
from pyroebm.mcmc.storage import open_run

__all__ = [
    "MCMC",
    "open_run",
]
