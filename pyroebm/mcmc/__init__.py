"""Run many chains, keep their draws, go on from where they stand."""

from pyroebm.mcmc.sampler import MCMC
from pyroebm.mcmc.storage import open_run

__all__ = [
    "MCMC",
    "open_run",
]
