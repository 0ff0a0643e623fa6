"""Restricted Boltzmann machines on scikit-learn's digits, or on binary MNIST with --data.

Test likelihoods are exact for up to 20 hidden units, else by AIS and reverse AIS.

- python -m models.rbm [--seed N] [--quick] [--out DIR]: digits, 3 seeds, a minute
- python -m models.rbm --data PATH [--no-centered] [--invert]: 784-16, 50 epochs, a minute
- python -m models.rbm --data PATH --hidden 500: 784-500, 200 epochs, 16 minutes
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from models.machines import (
    Images,
    every,
    floor,
    gibbs,
    in_double,
    load_images,
    machine_bracket,
    plot_completions,
    train_pcd,
)
from models.recipe import Recipe, run
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import BernoulliRBM

#: Largest number of hidden units whose states are enumerated for exact likelihoods.
MAX_EXACT = 20


def evaluate(
    recipe: Recipe,
    rbm: BernoulliRBM,
    images: Images,
    key: str,
    temperatures: int,
    progress: bool | None,
) -> tuple[float, float]:
    """Record the test log-likelihood, exact or by AIS and reverse AIS.

    Returns:
        the lower and the upper estimate.
    """
    double, test = in_double(rbm), images.test.double()
    values = -double(test)
    if rbm.weight.shape[1] <= MAX_EXACT:
        log_z = float(double.log_partition())
        recipe.add(
            f"{key}: train log-likelihood",
            (-double(images.train.double())).mean() - log_z,
            kind="exact",
        )
        return (
            recipe.add_mean(
                f"{key}: test log-likelihood",
                values - log_z,
                "exact",
                "standard error over the test set",
            ),
        ) * 2
    found = machine_bracket(
        double, images.train, temperatures, 100, 10 * temperatures // 10, recipe.seed, progress
    )
    print(found)
    recipe.add_log_z(f"{key}: log Z, AIS", found.forward)
    recipe.add_log_z(f"{key}: log Z, reverse AIS", found.reverse)
    recipe.add_log_z(f"{key}: log Z, both", found.combined)
    error = found.reverse.standard_error
    kind = "lower" if found.reverse.kind == "upper" else "estimate"
    high = recipe.add(
        f"{key}: test log-likelihood, AIS",
        values.mean() - found.forward.value,
        found.forward.standard_error,
        "upper",
    )
    low = recipe.add(
        f"{key}: test log-likelihood, reverse AIS", values.mean() - found.reverse.value, error, kind
    )
    return low, high


def curve_point(rbm: BernoulliRBM, images: Images, temperatures: int) -> tuple[float, float]:
    """Return the lower and the upper estimate of the test log-likelihood, from few chains."""
    double, values = in_double(rbm), 0.0
    values = float(-double(images.test.double()).mean())
    if rbm.weight.shape[1] <= MAX_EXACT:
        return (values - float(double.log_partition()),) * 2
    found = machine_bracket(double, images.train, temperatures, 50, temperatures, 0, False)
    return values - found.reverse.value, values - found.forward.value


def main(
    data: Path | None = None,
    hidden: int = 16,
    epochs: int | None = None,
    learning_rate: float | None = None,
    centered: bool = True,
    decay: bool | None = None,
    invert: bool = False,
    seeds: int | None = None,
    temperatures: int = 10_000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train by PCD-1 in batches of 100 with 100 chains, and evaluate on the test set.

    Args:
        data: binary MNIST: a folder of IDX files, an .npz, a folder of dataset-fashion-mnist;
            digits without.
        hidden: number of hidden units; likelihoods are exact up to 20.
        epochs: passes over the data; 600 on digits, else 50, or 200 above 20 hidden units.
        learning_rate: 0.05 on digits, else 0.01.
        centered: centered gradients.
        decay: whether the learning rate falls linearly to a hundredth; on digits it does.
        invert: swap ones and zeros.
        seeds: number of machines; 3 on digits, else 1.
        temperatures: of AIS, for more than 20 hidden units.
        seed: of the first machine.
        quick: a few batches only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/rbm.
        progress: show progress; None shows that of what takes longer than a second.
    """
    images = load_images(data)
    images = images.inverted() if invert else images
    epochs = epochs or (600 if data is None else 50 if hidden <= MAX_EXACT else 200)
    learning_rate = learning_rate or (0.05 if data is None else 0.01)
    decay = data is None if decay is None else decay
    seeds = seeds or (3 if data is None else 1)
    if quick:
        images = images.fewer(200)
        epochs = 2
        seeds = 1
        temperatures = 100
    recipe = Recipe(
        "rbm",
        out,
        seed,
        data=data,
        hidden=hidden,
        epochs=epochs,
        learning_rate=learning_rate,
        centered=centered,
        decay=decay,
        binarization=images.binarization,
        quick=quick,
    )
    recipe.add_mean("independent bits: test log-likelihood", floor(images), "exact")

    ends, curves = [], []
    for number in range(seeds):
        torch.manual_seed(seed + number)
        rbm = BernoulliRBM(images.train.shape[1], hidden, dtype=torch.float32)
        rbm.fit_visible(images.train)
        look, curve = every(epochs, 12), list[tuple[int, float, float]]()
        loop = train_pcd(
            rbm,
            images.train,
            epochs,
            learning_rate,
            centered=centered,
            decay=decay,
            seed=seed + number,
            progress=progress,
            checkpoint=None if quick or data is None else recipe.out / "checkpoint.safetensors",
        )
        for epoch in loop:
            if look(epoch):
                curve.append((epoch, *curve_point(rbm, images, max(100, temperatures // 20))))
        curves.append(curve)
        recipe.model(f"rbm-{seed + number}", rbm)
        ends.append(
            evaluate(
                recipe,
                rbm,
                images,
                f"seed {seed + number}" if seeds > 1 else "rbm",
                temperatures,
                progress,
            )
        )
    if seeds > 1:
        lows = torch.tensor(ends)[:, 0]
        recipe.add(
            "test log-likelihood over seeds",
            lows.mean(),
            lows.std() / len(lows) ** 0.5,
            "exact",
            f"sd {lows.std():.3f}",
        )

    draw_figure(recipe, rbm, images, curves)
    recipe.write()


def draw_figure(
    recipe: Recipe, rbm: BernoulliRBM, images: Images, curves: list[list[tuple[int, float, float]]]
) -> None:
    """Plot receptive fields, draws, likelihoods by epoch, and imputations.

    The images are those of the last machine.
    """
    fig, axes = plt.subplots(2, 2, figsize=(10, 10), layout="constrained")
    plot_images(rbm.weight.detach().mT[:100], images.shape, limits=None, ax=axes[0, 0]).set_title(
        "receptive fields"
    )
    layers = rbm.layers()
    x = gibbs(rbm, images.train[:64], 1000, recipe.seed)
    means = cast(Tensor, layers.mean(0, layers.field(0, x))).detach()
    plot_images(means, images.shape, ax=axes[0, 1]).set_title(
        "means of 64 chains after 1,000 sweeps"
    )
    for curve in curves:
        epochs, low, high = (torch.tensor(column) for column in zip(*curve, strict=True))
        axes[1, 0].fill_between(epochs, low, high, alpha=0.3)
        axes[1, 0].plot(epochs, low, marker=".")
    title = f"test log-likelihood (independent pixels: {float(floor(images).mean()):.2f})"
    axes[1, 0].set(xlabel="epoch", ylabel="nats", title=title)
    plot_completions(rbm, images, 12, 500, recipe.seed, axes[1, 1]).set_title(
        "test images, observed halves, imputations"
    )
    recipe.figure("rbm", fig)


if __name__ == "__main__":
    run(main)
