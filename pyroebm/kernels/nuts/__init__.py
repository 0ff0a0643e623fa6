"""No-U-turn sampler: asynchronous chains on CPUs, chains in lock-step on other devices."""

from pyroebm.kernels.nuts.kernel import NUTS, LockstepNUTS

__all__ = [
    "NUTS",
    "LockstepNUTS",
]
