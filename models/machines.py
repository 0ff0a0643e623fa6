"""Data, training, evaluation and figures that the recipes of Boltzmann machines share."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from models.recipe import Recipe
from pyroebm.data import digits, load_binary
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import BernoulliRBM, DeepBeliefNetwork, DeepBoltzmannMachine, LayeredMachine
from pyroebm.objectives import Centering, CrossEntropy, PersistentCD
from pyroebm.partition import BidirectionalAIS, base_rates, bidirectional_ais
from pyroebm.training import Classifier, fit, fit_steps, impute

__all__ = [
    "Images",
    "floor",
    "gibbs",
    "in_double",
    "load_images",
    "machine_bracket",
    "pcd_options",
    "plot_completions",
    "train_pcd",
]

M = TypeVar("M", bound=torch.nn.Module)


class Images:
    """Binary training and test images in float32, the dtype of the training.

    Args:
        train, test: binary pixels, shape ``(n, pixels)``.
        train_labels, test_labels: classes, shape ``(n,)``.
        binarization: how pixels were binarized; likelihoods of different ways are not comparable.
    """

    def __init__(
        self,
        train: Tensor,
        test: Tensor,
        train_labels: Tensor,
        test_labels: Tensor,
        binarization: str,
    ) -> None:
        self.train = train.float()
        self.test = test.float()
        self.binarization = binarization
        self.train_labels, self.test_labels = train_labels.long(), test_labels.long()
        side = math.isqrt(train.shape[1])
        self.shape = (side, side)

    def inverted(self) -> Images:
        """Swap ones and zeros."""
        return Images(
            1.0 - self.train,
            1.0 - self.test,
            self.train_labels,
            self.test_labels,
            f"{self.binarization}, inverted",
        )

    def fewer(self, n: int) -> Images:
        """Keep the first ``n`` images of each set, for a quick run."""
        return Images(
            self.train[:n],
            self.test[:n],
            self.train_labels[:n],
            self.test_labels[:n],
            self.binarization,
        )


def load_images(path: Path | None) -> Images:
    """Load the binary MNIST files at ``path``, or scikit-learn's digits if it is None."""
    data = digits() if path is None else load_binary(path)
    return Images(data.train, data.test, data.train_labels, data.test_labels, data.binarization)


def in_double(machine: M) -> M:
    """Copy a machine to float64, without gradients, to compute likelihoods."""
    return copy.deepcopy(machine).double().requires_grad_(False)


def floor(images: Images) -> Tensor:
    """Return test log-likelihoods of independent pixels with the training frequencies.

    A trained machine whose mean is lower has an error.
    """
    independent = BernoulliRBM(
        images.train.shape[1], 1, weight=torch.zeros(images.train.shape[1], 1), dtype=torch.float64
    )
    independent.fit_visible(images.train.double(), pseudocount=0.1)
    return independent.requires_grad_(False).log_likelihood(images.test.double())


def gibbs(machine: LayeredMachine, visible: Tensor, sweeps: int, seed: int) -> list[Tensor]:
    """Return the states of all layers after sweeps of Gibbs sampling.

    The visible layer starts at ``visible``, the hidden ones at uniformly random states.
    """
    generator, layers = torch.Generator().manual_seed(seed), machine.layers()
    with torch.no_grad():
        x = [
            visible,
            *(
                torch.full_like(visible[:, :1], 0.5).expand(-1, size).bernoulli(generator=generator)
                for size in layers.sizes[1:]
            ),
        ]
        for _ in range(sweeps):
            for side in reversed(layers.sides()):
                for layer in side:
                    x[layer] = layers.draw(layer, layers.field(layer, x), generator)
    return x


def pcd_options(
    data: Tensor, epochs: int, learning_rate: float, *, decay: bool, batch_size: int = 100
) -> dict[str, Any]:
    """Return options of ``fit`` for stochastic gradient descent.

    With ``decay`` the learning rate decreases linearly to a hundredth.
    """
    steps = epochs * math.ceil(len(data) / batch_size)
    schedule = functools.partial(LinearLR, start_factor=1.0, end_factor=0.01, total_iters=steps)
    return {
        "num_epochs": epochs,
        "batch_size": batch_size,
        "optimizer": "sgd",
        "lr": learning_rate,
        "schedule": schedule if decay else None,
    }


def train_pcd(
    machine: LayeredMachine,
    data: Tensor,
    epochs: int,
    learning_rate: float,
    *,
    centered: bool = True,
    decay: bool = False,
    batch_size: int = 100,
    chains: int = 100,
    k: int = 1,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[int]:
    """Train by persistent contrastive divergence and yield the number of finished epochs.

    Args:
        machine: trained in place.
        data: training examples.
        epochs: passes over the data.
        learning_rate: of stochastic gradient descent.
        centered: use centered gradients.
        decay: decrease the learning rate linearly to a hundredth, which removes the noise of the
            chains from the parameters.
        batch_size: examples of a batch.
        chains: number of persistent chains.
        k: Gibbs sweeps for each step.
        checkpoint: file to continue from and to save to.
        seed: of batches and chains.
        progress: show progress.
    """
    loop = fit_steps(
        machine,
        PersistentCD(num_chains=chains, k=k),
        data,
        **pcd_options(data, epochs, learning_rate, decay=decay, batch_size=batch_size),
        transform=Centering() if centered else None,
        checkpoint=checkpoint,
        resume=checkpoint is not None,
        seed=seed,
        progress=progress,
    )
    steps = math.ceil(len(data) / batch_size)
    for step in loop:
        if (step.number + 1) % steps == 0:
            yield (step.number + 1) // steps


def machine_bracket(
    machine: LayeredMachine,
    data: Tensor,
    temperatures: int,
    chains: int,
    sweeps: int,
    seed: int,
    progress: bool | None,
) -> BidirectionalAIS:
    """Estimate log Z by AIS and reverse AIS in float64, from the base rates of the data.

    Reverse AIS starts from Gibbs chains. Half of them begin at training images, half at draws of
    the base density: a difference between the two groups would be seen in the weights.
    """
    rates = data.to(machine.dtype).mean(0).expand(chains - chains // 2, -1)
    seeds = torch.cat(
        [
            data[: chains // 2].to(machine.dtype),
            rates.bernoulli(generator=torch.Generator().manual_seed(seed)),
        ]
    )
    draws, joint = torch.cat(gibbs(machine, seeds, sweeps, seed + 1), 1), machine.joint()
    base = base_rates(joint, data.to(machine.dtype))
    return bidirectional_ais(
        joint,
        base,
        draws=draws,
        betas=temperatures,
        num_chains=chains,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )


def plot_completions(
    model: LayeredMachine | DeepBeliefNetwork,
    images: Images,
    n: int,
    steps: int,
    seed: int,
    ax: Axes,
) -> Axes:
    """Plot test images, their upper halves, and imputations of the lower halves, in three rows."""
    whole = images.test[:n].to(next(iter(model.parameters())).dtype)
    known = torch.zeros(images.shape, dtype=torch.bool)
    known[: images.shape[0] // 2] = True
    drawn = impute(
        model,
        whole,
        known.flatten(),
        num_sweeps=steps,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    rows = torch.cat([whole, torch.where(known.flatten(), whole, 0.5), drawn])
    return plot_images(rows, images.shape, columns=n, ax=ax)


def every(epochs: int, points: int) -> Callable[[int], bool]:
    """Return a function that is true for about ``points`` of the epochs, and for the last one."""
    stride = max(1, epochs // points)
    return lambda epoch: epoch % stride == 0 or epoch == epochs


def classify(
    recipe: Recipe,
    model: DeepBeliefNetwork | DeepBoltzmannMachine,
    images: Images,
    epochs: int,
    progress: bool | None,
) -> list[float]:
    """Fine-tune a classifier that starts from the model.

    Returns:
        the test error before the first epoch and after each epoch.
    """
    classifier = Classifier(model, int(images.train_labels.max()) + 1)
    curve = [classifier.error(images.test, images.test_labels)]
    history = fit(
        classifier,
        CrossEntropy(),
        (images.train, images.train_labels),
        num_epochs=epochs,
        validation=(images.test, images.test_labels),
        seed=recipe.seed,
        progress=progress,
    )
    curve += history.validation["error"].tolist()
    spread = math.sqrt(curve[-1] * (1.0 - curve[-1]) / len(images.test))
    recipe.add(
        "fine-tuned: test error", curve[-1], spread, "exact", f"{len(images.test)} test images"
    )
    return curve
