"""The no-U-turn sampler."""

from pyroebm.kernels.nuts.lockstep import NUTS

__all__ = [
    "NUTS",
]
