"""Pyro's names and arguments on the vectorized engine: a script changes its import line.

``from pyroebm.infer import MCMC, NUTS`` replaces ``from pyro.infer import MCMC, NUTS``. All chains
run as one batch in one process. Step sizes and metric of the warm-up are adapted across chains, and
NUTS always draws from a trajectory with multinomial weights. ``NUTS`` and ``HMC`` are kernels of
Pyro, which run in Pyro's ``MCMC`` too, and this ``MCMC`` runs the other kernels of Pyro with Pyro's
own driver. Discrete latent variables are enumerated. Arguments about processes and the JIT are
ignored.
"""

from pyroebm.infer.kernels import HMC, NUTS
from pyroebm.infer.mcmc import MCMC
from pyroebm.infer.predictive import Predictive
from pyroebm.infer.streaming import StreamingMCMC

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "Predictive",
    "StreamingMCMC",
]
