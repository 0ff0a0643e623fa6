"""A restricted Boltzmann machine with known log Z."""

from __future__ import annotations

import torch

from pyroebm.energies import BernoulliRBM

#: log Z of :func:`oracle_rbm`, by enumeration.
LOG_Z = 5.321338579890


def oracle_rbm(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> BernoulliRBM:
    """Return the RBM W_ij = scale sin(3i + j + 1), b_i = cos(i + 1), c_j = sin(2j + 1) / 2."""
    i, j = torch.arange(4, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    weight = scale * torch.sin(3 * i[:, None] + j + 1)
    biases = {"visible_bias": torch.cos(i + 1), "hidden_bias": torch.sin(2 * j + 1) / 2}
    return BernoulliRBM(4, 3, weight=weight, **biases, dtype=dtype)
