"""A deep belief network on scikit-learn's digits, or on binary MNIST with --data.

Evaluated by the variational bound, importance-sampled likelihoods, draws and a classifier.

- python -m models.dbn [--seed N] [--quick] [--out DIR]: digits, 64-100-64, 2 minutes
- python -m models.dbn --data PATH: 784-500-784, the second layer initialized to the transposed
  first one, a quarter of an hour
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from models.machines import (
    Images,
    classify,
    floor,
    in_double,
    load_images,
    machine_bracket,
    pcd_options,
    plot_completions,
)
from models.recipe import Recipe, run
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import DeepBeliefNetwork
from pyroebm.objectives import PersistentCD
from pyroebm.training import pretrain_belief_network


def evaluate(
    recipe: Recipe,
    network: DeepBeliefNetwork,
    images: Images,
    temperatures: int,
    samples: int,
    progress: bool | None,
) -> None:
    """Record the variational bound and the importance-sampled likelihood.

    Both use log Z of the top layers by AIS and by reverse AIS.
    """
    double, test = in_double(network), images.test[:1000].double()
    generator = torch.Generator().manual_seed(recipe.seed)
    below = double.means_up(images.train[:1000].double())
    found = machine_bracket(double.top, below, temperatures, 100, 1000, recipe.seed, progress)
    print(found)
    recipe.add_log_z("log Z of the top, AIS", found.forward)
    recipe.add_log_z("log Z of the top, reverse AIS", found.reverse)
    weights = torch.cat(
        [double.log_weights(rows, samples, generator) for rows in test.split(50)], 1
    )
    bound, better = weights.mean(0), weights.logsumexp(0) - torch.log(torch.tensor(float(samples)))
    for name, end in (("AIS", found.forward), ("reverse AIS", found.reverse)):
        recipe.add_mean(
            f"variational bound, {name}",
            bound - end.value,
            "estimate",
            "of the first 1,000 test images",
        )
        recipe.add_mean(
            f"importance-sampled log-likelihood, {name}",
            better - end.value,
            "estimate",
            f"{samples} draws",
        )


def main(
    data: Path | None = None,
    sizes: tuple[int, ...] | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    temperatures: int = 10_000,
    samples: int = 1_000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Pretrain layer by layer with PCD, evaluate, and fine-tune a classifier by backpropagation.

    Args:
        data: binary MNIST: a folder of IDX files, an .npz, a folder of dataset-fashion-mnist;
            digits without.
        sizes: hidden layers; 100 64 on digits, 500 784 on MNIST, whose second layer starts from the
            transposed first one.
        epochs: passes over the data for each layer; 400 on digits, 50 on MNIST.
        learning_rate: 0.05 on digits, 0.01 on MNIST.
        temperatures: of AIS.
        samples: draws of the recognition distribution for each test image.
        seed: of weights and draws.
        quick: a few batches only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/dbn.
        progress: show progress; None shows that of what takes longer than a second.
    """
    images = load_images(data)
    sizes = sizes or ((100, 64) if data is None else (500, 784))
    epochs, learning_rate = (
        epochs or (400 if data is None else 50),
        learning_rate or (0.05 if data is None else 0.01),
    )
    fine_epochs = 100 if data is None else 30
    if quick:
        images = images.fewer(200)
        epochs = 2
        temperatures = 100
        samples = 10
        fine_epochs = 1
    recipe = Recipe(
        "dbn",
        out,
        seed,
        data=data,
        sizes=sizes,
        epochs=epochs,
        learning_rate=learning_rate,
        binarization=images.binarization,
        quick=quick,
    )
    recipe.add_mean("independent bits: test log-likelihood", floor(images), "exact")

    network = pretrain_belief_network(
        [images.train.shape[1], *sizes],
        images.train,
        PersistentCD(num_chains=100),
        **pcd_options(images.train, epochs, learning_rate, decay=True),
        seed=seed,
        progress=progress,
    )
    evaluate(recipe, network, images, temperatures, samples, progress)
    curve = classify(recipe, network, images, fine_epochs, progress)

    fig, grid = plt.subplots(2, 2, figsize=(10, 10), layout="constrained")
    axes = grid.flatten()
    first = network.rbm(0)
    plot_images(first.weight.detach().mT[:100], images.shape, limits=None, ax=axes[0]).set_title(
        "receptive fields, layer 1"
    )
    drawn = network.sample(64, torch.Generator().manual_seed(seed), num_steps=50 if quick else 2000)
    plot_images(drawn, images.shape, ax=axes[1]).set_title(
        "draws: Gibbs sampling in the top layers, one pass down"
    )
    axes[2].plot(range(len(curve)), curve, marker=".")
    axes[2].set(
        xlabel="epoch of fine-tuning",
        ylabel="test error",
        title="classifier initialized from the network",
        yscale="log",
    )
    axes[3].set_visible(data is None)
    if data is None:  # Gibbs sampling by sites: takes minutes for 784 pixels
        plot_completions(network, images, 12, 5 if quick else 100, seed, axes[3]).set_title(
            "test images, observed halves, imputations"
        )
    recipe.figure("dbn", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
