"""One run in several processes: under ``torchrun`` each takes whole blocks of chains."""

from __future__ import annotations

import os

import torch

__all__ = ["ranks"]


def ranks() -> tuple[int, int]:
    """The number of this process and of all: from ``torch.distributed`` if it is initialised, else as ``torchrun`` set them.

    Given to :class:`pyroebm.MCMC`, they divide a run's blocks among the processes. No draw depends on that, and none is sent:
    each process writes its own parts, which open as one.

    Example:
        >>> import tempfile
        >>> from pyroebm import MALA, MCMC, open_run
        >>> from pyroebm.targets import DoubleWell
        >>> with tempfile.TemporaryDirectory() as folder:  # the same script in each process
        ...     mcmc = MCMC(MALA(), 10, 10, num_chains=128, seed=0, ranks=ranks())
        ...     mcmc.run(DoubleWell(), store=folder)
        ...     open_run(folder).posterior["x"].shape
        (128, 10)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
