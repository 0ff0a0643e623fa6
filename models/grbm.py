"""Gaussian restricted Boltzmann machines with exact likelihoods, on two data sets.

The data are a Laplace mixture and patches of images. About 2 minutes.

python -m models.grbm [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from models.recipe import Recipe, run
from pyroebm.data import LAPLACE_LOG_LIKELIHOOD, image_patches, laplace_mixture, whitened
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import GaussianRBM
from pyroebm.objectives import ContrastiveDivergence, ExactLikelihood, Objective, PersistentCD
from pyroebm.training import fit

#: Mean log-likelihood per whitened coordinate under a normal distribution.
GAUSSIAN = -0.5 * math.log(2.0 * math.pi * math.e)


def start(num_visible: int, num_hidden: int, data: Tensor, spread: float) -> GaussianRBM:
    """Return a machine whose hidden units are mostly off and have different weights.

    From small weights the density remains a single normal mode for a long time.
    """
    weight = spread * torch.randn(num_visible, num_hidden)
    rbm = GaussianRBM(
        num_visible,
        num_hidden,
        convention="cho",
        weight=weight,
        hidden_bias=torch.full((num_hidden,), -2.0),
    )
    rbm.fit_visible(data)
    with torch.no_grad():
        rbm.log_sigma.sub_(0.4)
    return rbm


def train(
    rbm: GaussianRBM,
    objective: Objective,
    data: Tensor,
    epochs: int,
    rate: float,
    batch_size: int,
    seed: int,
    progress: bool | None,
) -> None:
    """Train with Adam and a learning rate that decays to 0."""
    fit(
        rbm,
        objective,
        data,
        num_epochs=epochs,
        batch_size=batch_size,
        lr=rate,
        schedule="cosine",
        seed=seed,
        progress=progress,
    )


def true_log_density(x: Tensor, data: Tensor) -> Tensor:
    """Return the true log-density at whitened points.

    It has two Laplace sources, rotated by the angle that fits the data best.
    """
    angles = torch.linspace(0.0, math.pi / 2, 901)[:-1]
    turns = torch.stack(
        [
            torch.stack([angles.cos(), angles.sin()], 1),
            torch.stack([-angles.sin(), angles.cos()], 1),
        ],
        1,
    )
    best = turns[min(range(len(turns)), key=lambda k: float((data @ turns[k].mT).abs().mean()))]
    return -math.sqrt(2.0) * (x @ best.mT).abs().sum(1) - math.log(2.0)


def laplace(
    recipe: Recipe, starts: int, epochs: int, points: int, progress: bool | None
) -> tuple[GaussianRBM, Tensor]:
    """Train with CD-1 in the published setting, then with the exact likelihood.

    The setting is 4 hidden units, batches of 1,000, 50 epochs.
    """
    x = laplace_mixture(points, generator=torch.Generator().manual_seed(recipe.seed))
    data, test = x[: points // 2], x[points // 2 :]
    recipe.add("Laplace: truth", LAPLACE_LOG_LIKELIHOOD, kind="exact")
    recipe.add("Laplace: Gaussian", 2 * GAUSSIAN, kind="exact")
    recipe.add_mean("Laplace: truth on the test points", true_log_density(test, data), "exact")
    found = []
    for number in range(starts):
        torch.manual_seed(recipe.seed + number)
        rbm = start(2, 4, data, 1.0)
        train(rbm, ContrastiveDivergence(k=1), data, epochs, 0.02, 1000, recipe.seed, progress)
        found.append((float(rbm.log_likelihood(data).mean().detach()), number, rbm))
    value, number, rbm = max(found)
    recipe.add(
        "Laplace, CD-1: train log-likelihood",
        value,
        kind="exact",
        note=f"the best of {starts} starts",
    )
    recipe.add_mean(
        "Laplace, CD-1: test log-likelihood",
        rbm.log_likelihood(test).detach(),
        "exact",
        "standard error over the test set",
    )
    short = true_log_density(test, data) - rbm.log_likelihood(test).detach()
    recipe.add_mean(
        "Laplace, CD-1: nats below the truth, test",
        short,
        "exact",
        "published 0.0431, on other points",
    )
    recipe.add("Laplace, CD-1: log Z", rbm.log_partition(), kind="exact")
    train(rbm, ExactLikelihood(), data, epochs, 0.02, 1000, recipe.seed, progress)
    recipe.add(
        "Laplace, exact likelihood: train log-likelihood",
        rbm.log_likelihood(data).mean(),
        kind="exact",
    )
    recipe.add_mean(
        "Laplace, exact likelihood: test log-likelihood", rbm.log_likelihood(test).detach(), "exact"
    )
    return rbm.requires_grad_(False), test


def patches(
    recipe: Recipe, side: int, hidden: int, epochs: int, n: int, progress: bool | None
) -> GaussianRBM:
    """Train on whitened patches of two photographs.

    For a normal distribution only their covariance matters.
    """
    x = whitened(
        image_patches(
            n, side=side, generator=torch.Generator().manual_seed(recipe.seed), whiten=False
        )
    )
    data, test = x[: n // 5 * 4], x[n // 5 * 4 :]
    recipe.add_mean(
        "patches: Gaussian, test",
        -0.5 * (test**2).sum(1) - 0.5 * side**2 * math.log(2.0 * math.pi),
        "exact",
    )
    rbm = start(side**2, hidden, data, 0.3)
    train(rbm, PersistentCD(num_chains=500), data, epochs, 0.01, 500, recipe.seed, progress)
    recipe.add("patches: train log-likelihood", rbm.log_likelihood(data).mean(), kind="exact")
    recipe.add_mean("patches: test log-likelihood", rbm.log_likelihood(test).detach(), "exact")
    return rbm.requires_grad_(False)


def main(
    starts: int = 4,
    hidden: int = 16,
    side: int = 6,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train and evaluate on both data sets.

    Args:
        starts: number of initial weights on the Laplace mixture; the best on the training data is
            used.
        hidden: hidden units on patches, at most 20 for exact likelihoods.
        side: of a patch, in pixels.
        seed: of data and weights.
        quick: a few batches only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/grbm.
        progress: show progress; None shows that of what takes longer than a second.
    """
    recipe = Recipe("grbm", out, seed, starts=starts, hidden=hidden, side=side, quick=quick)
    epochs, points, n = (1, 4_000, 2_500) if quick else (50, 100_000, 50_000)
    rbm, test = laplace(recipe, 1 if quick else starts, epochs, points, progress)
    patch_rbm = patches(recipe, side, hidden, epochs, n, progress)

    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    axis = torch.linspace(-4.0, 4.0, 161)
    density = rbm.log_likelihood(torch.cartesian_prod(axis, axis)).reshape(161, 161).mT
    axes[0].plot(*test[:3000].mT, ".", markersize=1, color="tab:gray")
    axes[0].contour(
        axis, axis, density, levels=[-9, -7, -5, -4, -3, -2], colors="tab:red", linewidths=0.8
    )
    modes = rbm.visible_bias + torch.cat([torch.zeros(1, 2), rbm.weight.mT])
    axes[0].plot(*modes.mT, "o", color="tab:blue")
    axes[0].set(
        title="Laplace mixture: test points, log p, component means",
        xlim=(-4, 4),
        ylim=(-4, 4),
        aspect="equal",
    )
    plot_images(patch_rbm.weight.mT, (side, side), limits=None, ax=axes[1]).set_title(
        "receptive fields on patches"
    )
    drawn = patch_rbm.sample(64, torch.Generator().manual_seed(seed))
    plot_images(drawn, (side, side), limits=(-3.0, 3.0), ax=axes[2]).set_title(
        "exact draws, whitened patches"
    )
    recipe.figure("grbm", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
