"""Pyro's own names and arguments over the vectorised core: a script changes its import line, and
all chains run in one process.

``from pyroebm.infer import MCMC, NUTS`` in place of ``from pyro.infer import MCMC, NUTS``. What
differs from Pyro is the engine: every chain is a row of one batch, the step size and the metric of
the warm-up are shared by all chains, and a trajectory of NUTS is drawn from with multinomial
weights always. Arguments about processes and about the JIT have nothing to decide here and are
ignored. Discrete latents, which Pyro enumerates, are refused with the ways out.
"""

from pyroebm.infer.kernels import HMC, NUTS
from pyroebm.infer.mcmc import MCMC

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
]
