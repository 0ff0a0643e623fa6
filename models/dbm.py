"""A deep Boltzmann machine on scikit-learn's digits, or on binary MNIST with --data.

Evaluated by the variational bound with AIS and reverse AIS, draws and a classifier.

- python -m models.dbm [--seed N] [--quick] [--out DIR]: digits, 64-64-32, 1 minute
- python -m models.dbm --data PATH [--epochs N]: 784-500-1000, half a minute an epoch
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from models.machines import (
    Images,
    classify,
    every,
    floor,
    gibbs,
    in_double,
    load_images,
    machine_bracket,
    pcd_options,
    plot_completions,
    train_pcd,
)
from models.recipe import Recipe, run
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import DeepBoltzmannMachine
from pyroebm.objectives import PersistentCD
from pyroebm.training import pretrain_boltzmann_machine

#: Published for 784-500-1000 on MNIST: Salakhutdinov and Hinton (2009), as quoted in a
#: re-implementation.
PUBLISHED_BOUND = -84.62


def bounds(
    machine: DeepBoltzmannMachine,
    images: Images,
    temperatures: int,
    sweeps: int,
    seed: int,
    progress: bool | None,
):
    """Return variational bounds of the test set without log Z, and estimates of log Z."""
    double = in_double(machine)
    found = machine_bracket(double, images.train, temperatures, 100, sweeps, seed, progress)
    return -torch.cat(
        [double.variational_free_energy(rows) for rows in images.test.double().split(1000)]
    ), found


def main(
    data: Path | None = None,
    sizes: tuple[int, ...] | None = None,
    pretraining_epochs: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    temperatures: int = 10_000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Pretrain with doubled layers, train all layers together, evaluate, and classify.

    Training uses mean-field values for the data and persistent chains for the model.

    Args:
        data: binary MNIST: a folder of IDX files, an .npz, a folder of dataset-fashion-mnist;
            digits without.
        sizes: hidden layers; 64 32 on digits, 500 1000 on MNIST.
        pretraining_epochs: passes over the data for each layer; 100 on digits, 20 on MNIST.
        epochs: passes over the data for the whole machine; 600 on digits, 60 on MNIST (published:
            300).
        learning_rate: at the start, of both phases; 0.05 on digits, 0.01 on MNIST; it falls to a
            hundredth.
        temperatures: of AIS.
        seed: of weights and draws.
        quick: a few batches only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/dbm.
        progress: show progress; None shows that of what takes longer than a second.
    """
    images = load_images(data)
    sizes = sizes or ((64, 32) if data is None else (500, 1000))
    first, epochs = (
        pretraining_epochs or (100 if data is None else 20),
        epochs or (600 if data is None else 60),
    )
    learning_rate = learning_rate or (0.05 if data is None else 0.01)
    fine_epochs = 100 if data is None else 30
    if quick:
        images = images.fewer(200)
        first = 2
        epochs = 2
        temperatures = 100
        fine_epochs = 1
    recipe = Recipe(
        "dbm",
        out,
        seed,
        data=data,
        sizes=sizes,
        pretraining_epochs=first,
        epochs=epochs,
        learning_rate=learning_rate,
        binarization=images.binarization,
        quick=quick,
    )
    recipe.add_mean("independent bits: test log-likelihood", floor(images), "exact")

    machine = pretrain_boltzmann_machine(
        [images.train.shape[1], *sizes],
        images.train,
        PersistentCD(num_chains=100),
        # Copies share one parameter, whose gradient is not one of the layers': no centering here.
        **pcd_options(images.train, first, 0.5 * learning_rate, decay=True),
        seed=seed,
        progress=progress,
    )
    look, curve = every(epochs, 8), list[tuple[int, float, float]]()
    loop = train_pcd(
        machine,
        images.train,
        epochs,
        learning_rate,
        decay=True,
        seed=seed,
        progress=progress,
        checkpoint=None if quick or data is None else recipe.out / "checkpoint.safetensors",
    )
    for epoch in loop:
        if look(epoch):
            values, found = bounds(machine, images, max(100, temperatures // 20), 500, 0, False)
            mean = float(values.mean())
            curve.append((epoch, mean - found.reverse.value, mean - found.forward.value))

    values, found = bounds(machine, images, temperatures, 100 if quick else 2000, seed, progress)
    print(found)
    recipe.add_log_z("log Z, AIS", found.forward)
    recipe.add_log_z("log Z, reverse AIS", found.reverse)
    for name, end in (("AIS", found.forward), ("reverse AIS", found.reverse)):
        bound = recipe.add_mean(
            f"variational bound on the test set, {name}", values - end.value, "estimate"
        )
        if data is not None:
            recipe.add(
                f"nats below the published bound, {name}",
                PUBLISHED_BOUND - bound,
                end.standard_error,
            )
    errors = classify(recipe, machine, images, fine_epochs, progress)

    fig, axes = plt.subplots(2, 2, figsize=(10, 10), layout="constrained")
    fields = machine.layers().weights[0].detach().mT[:100]
    plot_images(fields, images.shape, limits=None, ax=axes[0, 0]).set_title(
        "receptive fields, layer 1"
    )
    layers = machine.layers()
    means = layers.mean(
        0, layers.field(0, gibbs(machine, images.train[:64], 50 if quick else 2000, seed))
    ).detach()
    plot_images(means, images.shape, ax=axes[0, 1]).set_title(
        "means of 64 chains after 2,000 sweeps"
    )
    passed, low, high = (torch.tensor(column) for column in zip(*curve, strict=True))
    axes[1, 0].fill_between(passed, low, high, alpha=0.3)
    axes[1, 0].plot(passed, low, marker=".")
    title = f"variational bound by AIS and reverse AIS; test error {errors[-1]:.2%}"
    axes[1, 0].set(xlabel="epoch", ylabel="nats", title=title)
    plot_completions(machine, images, 12, 500, seed, axes[1, 1]).set_title(
        "test images, observed halves, imputations"
    )
    recipe.figure("dbm", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
