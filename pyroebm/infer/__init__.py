"""Pyro's names and arguments on the vectorized engine: a script changes its import line.

``from pyroebm.infer import MCMC, NUTS`` replaces ``from pyro.infer import MCMC, NUTS``. All chains
run as one batch in one process. Step sizes and metric of the warm-up are adapted across chains, and
NUTS always draws from a trajectory with multinomial weights. Arguments about processes and the JIT
are ignored. Discrete latent variables, which Pyro enumerates, raise an error that lists
alternatives.
"""

from pyroebm.infer.kernels import HMC, NUTS
from pyroebm.infer.mcmc import MCMC
from pyroebm.infer.predictive import Predictive

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "Predictive",
]
