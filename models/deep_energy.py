"""A network as the density of handwritten digits, trained by persistent Langevin chains with replay. TODO

python -m models.deep_energy [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.recipe import Recipe, run
from pyroebm import HMC, MALA, Energy
from pyroebm.datasets import digits
from pyroebm.energies import MLPEnergy
from pyroebm.guards import Guard
from pyroebm.objectives import PersistentCD
from pyroebm.objectives.contrastive import advance
from pyroebm.partition import bracket
from pyroebm.paths import DistributionEnergy
from pyroebm.plotting import plot_images
from pyroebm.randomness import seeded_generator
from pyroebm.training import fit


class Pixels(NamedTuple):
    """Noised images in the coordinates in which the training images have mean 0 and covariance I; events (1, 8, 8)."""

    train: Tensor
    test: Tensor
    mean: Tensor
    root: Tensor  #: Cholesky factor of the covariance of the pixels

    def images(self, z: Tensor) -> Tensor:
        return self.mean + z.flatten(1) @ self.root.mT

    @property
    def log_jacobian(self) -> Tensor:
        """log |dz / dx|, which a log-density of z takes to be one of pixels."""
        return -self.root.diagonal().log().sum()


def noised_digits(noise: float, copies: int, seed: int) -> Pixels:
    """Grey levels from 0 to 1 with normal noise, several times for each training image, whitened by the training images."""
    split, generator = digits(threshold=None), seeded_generator(seed)
    x = split.train.repeat(copies, 1)
    train, test = (part + noise * torch.randn(part.shape, generator=generator) for part in (x, split.test))
    mean = split.train.mean(0)
    covariance = torch.cov(split.train.mT, correction=0) + noise**2 * torch.eye(64)
    root = torch.linalg.cholesky(covariance)
    white = [torch.linalg.solve_triangular(root, (part - mean).mT, upper=False).mT.reshape(-1, 1, 8, 8) for part in (train, test)]
    return Pixels(white[0], white[1], mean, root)
