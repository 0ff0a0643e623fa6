"""Markov kernels on rows: each file one algorithm, each kernel a frozen set of settings with ``init`` and ``step``."""

from pyroebm.kernels.base import Info, Kernel, State
from pyroebm.kernels.hmc import HMC
from pyroebm.kernels.langevin import MALA, ULA
from pyroebm.kernels.nuts import NUTS

__all__ = ["HMC", "Info", "Kernel", "MALA", "NUTS", "State", "ULA"]
