"""Deep directed models (Kim and Bengio, 2016) on a mixture of four modes, and on digits.

The surrogate entropy of the generator is that of its batch normalization. On hidden units it is not
the entropy of the draws: the generator loses modes, and the log-likelihood of the energy is 8 nats
below the truth (seed 0). On the outputs it is the entropy of a normal distribution with their
variances. With fixed noise of nearly the width of the modes the log-likelihood is .07 and .09 nats
below the truth (seeds 0, 1), but 2.6 with seed 2; against a flow with auxiliary variables, whose
entropy is exact, .04 (seed 0). On digits the energy separates test images from images with shuffled
pixels (AUROC .75), but the generator's draws do not look like digits. About 1 to 2 minutes.

python -m models.deep_directed [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from models.adversarial_flow import GridEvaluation, draws_of, fit_options
from models.recipe import Recipe, run
from pyroebm.core import seeded_generator
from pyroebm.data import digits
from pyroebm.diagnostics import energy_distance
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import ProductOfExpertsEnergy
from pyroebm.flows import RedundantNICE
from pyroebm.nn import Generator, MLPGenerator, mlp
from pyroebm.objectives import Adversarial, AdversarialFlow, DeepDirected
from pyroebm.targets import GaussianMixture
from pyroebm.training import fit

#: A small learning rate of the energy and a gradient penalty at the data: otherwise the training
#: diverges.
RATES, PENALTY = {"energy": 1e-4, "generator": 3e-3}, 0.1
CORNERS, WEIGHTS = [[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]], [0.4, 0.3, 0.2, 0.1]


def experts(
    entries: int, features: int, num_experts: int, sigma: float, seed: int
) -> ProductOfExpertsEnergy:
    """Return the paper's energy on bounded features, which do not outgrow the envelope."""
    noise = seeded_generator(seed, spawned=4)
    net = nn.Sequential(
        mlp(entries, features, (features,), zero_last=False, generator=noise), nn.Tanh()
    )
    return ProductOfExpertsEnergy(net, features, (entries,), num_experts, sigma, generator=noise)


def normalized(data: Tensor, latent_dim: int, width: int, sigma: float, seed: int) -> Generator:
    """Return a generator with batch normalized outputs, initialized to the data's moments.

    The surrogate entropy is that of a normal distribution with the variances of g(z), an upper
    bound of the entropy of g(z). Noise of a fixed scale keeps the draws from collapsing to points,
    where the two differ most.
    """
    noise = seeded_generator(seed, spawned=2)
    norm = nn.BatchNorm1d(data.shape[1])
    with torch.no_grad():
        norm.weight.copy_(data.std(0))
        norm.bias.copy_(data.mean(0))
    net = nn.Sequential(
        mlp(latent_dim, data.shape[1], (width, width), zero_last=False, generator=noise), norm
    )
    model = Generator(net, latent_dim, data.shape[1:], sigma)
    if model.log_sigma is not None:
        # the surrogate entropy does not depend on it: training would reduce it to 0
        model.log_sigma.requires_grad_(False)
    return model


def opponents(data: Tensor, width: int, seed: int) -> dict[str, Callable[[], Adversarial]]:
    """Return the objectives that the energy of the mixture is trained with."""
    hidden, noise = (width, width), functools.partial(seeded_generator, seed, spawned=2)
    return {
        "hidden units": lambda: DeepDirected(
            MLPGenerator((2,), 4, hidden, batch_norm=True, generator=noise()),
            gradient_penalty=PENALTY,
        ),
        "outputs": lambda: DeepDirected(
            normalized(data, 4, width, 0.45, seed), gradient_penalty=PENALTY
        ),
        "flow": lambda: AdversarialFlow(
            RedundantNICE(2, 4, hidden_sizes=hidden, generator=torch.Generator().manual_seed(seed)),
            gradient_penalty=PENALTY,
        ),
    }


def mixture(
    recipe: Recipe, steps: int, width: int, progress: bool | None
) -> tuple[GridEvaluation, dict[str, tuple[Tensor, Tensor]]]:
    """Train on four normal modes of unequal weights.

    Records the exact likelihood of each energy, and the mode weights of energy and generator.
    """
    target = GaussianMixture(CORNERS, scale=0.5, weights=WEIGHTS)
    evaluation = GridEvaluation(target)
    data, test = (
        target.sample(n, seeded_generator(recipe.seed, spawned=k))
        for k, n in enumerate((20_000, 4_000))
    )
    recipe.add("mixture: truth, log-likelihood", -evaluation.entropy, kind="exact")
    recipe.add(
        "mixture: energy distance, data to test",
        *energy_distance(data[:4_000], test),
        note="of two samples of one distribution",
    )
    modes, shown = target.mode_of(evaluation.grid), {}
    density = torch.softmax(evaluation.log_density, 0)
    for name, make in opponents(data, width, recipe.seed).items():
        energy, objective = experts(2, width, width, 1.0, recipe.seed), make()
        fit(
            energy,
            objective,
            data,
            **fit_options(RATES, steps),
            seed=recipe.seed,
            progress=progress,
        )
        found, drawn = (
            evaluation(energy.requires_grad_(False)),
            draws_of(objective, 4_000, recipe.seed),
        )
        below = -evaluation.entropy - found["log_likelihood"]
        recipe.add(
            f"mixture, {name}: nats below the truth", below, kind="exact", note="by quadrature"
        )
        values = energy(evaluation.grid)
        p = torch.softmax(-values, 0)
        for k in range(4):
            truth = f"truth {float(density[modes == k].sum()):.3f}"
            recipe.add(
                f"mixture, {name}: mode {k + 1} of the energy",
                float(p[modes == k].sum()),
                kind="exact",
                note=truth,
            )
            recipe.add_mean(
                f"mixture, {name}: mode {k + 1} of q", (target.mode_of(drawn) == k).double()
            )
        recipe.add(f"mixture, {name}: energy distance, q to test", *energy_distance(drawn, test))
        shown[f"{name}: {below:.2f} nats below"] = (values, drawn)
    return evaluation, {"truth, and data": (-evaluation.log_density, data)} | shown


def images(
    recipe: Recipe, steps: int, width: int, progress: bool | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Train on digits of 8 x 8 pixels.

    Records energies of data and draws, and distances between samples.
    """
    split = digits(threshold=None)
    noise = seeded_generator(recipe.seed, spawned=5)
    # dequantized: there are 17 gray levels
    train = split.train + torch.rand(split.train.shape, generator=noise) / 16.0
    test = split.test + torch.rand(split.test.shape, generator=noise) / 16.0
    center = train.mean(0)
    energy = experts(64, width, width, 1.0, recipe.seed)
    objective = DeepDirected(
        normalized(train - center, 16, width, 0.05, recipe.seed), gradient_penalty=PENALTY
    )
    fit(
        energy,
        objective,
        train - center,
        **fit_options(RATES, steps),
        seed=recipe.seed,
        progress=progress,
    )
    drawn = draws_of(objective, 1_000, recipe.seed) + center
    shuffled = torch.stack(
        [column[torch.randperm(len(test), generator=noise)] for column in test.mT], 1
    )
    images = {"test set": test, "generator": drawn, "shuffled pixels": shuffled}
    energies = {name: energy(x - center).detach() for name, x in images.items()}
    for name, values in energies.items():
        recipe.add_mean(f"digits: energy, {name}", values)
    for name in ("generator", "shuffled pixels"):
        above = (energies[name].unsqueeze(0) > energies["test set"].unsqueeze(1)).double().mean()
        recipe.add(f"digits: AUROC, test set against {name}", above)
        recipe.add(f"digits: energy distance, {name} to test", *energy_distance(images[name], test))
    recipe.add(
        "digits: energy distance, train to test",
        *energy_distance(train, test),
        note="of two samples of one distribution",
    )
    return drawn, energies


def main(
    steps: int = 1000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train and evaluate on both data sets.

    Args:
        steps: of each training.
        seed: of data, weights and training.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/deep_directed.
        progress: show progress; None shows that of what takes longer than a second.
    """
    recipe = Recipe("deep_directed", out, seed, steps=steps, quick=quick)
    steps, width = (20, 16) if quick else (steps, 128)
    evaluation, shown = mixture(recipe, steps, width // 2, progress)
    drawn, energies = images(recipe, steps, width, progress)

    fig, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
    side = len(evaluation.axis)
    for ax, (title, (values, points)) in zip(axes.flat, shown.items(), strict=False):
        density = torch.softmax(-values, 0).reshape(side, side).mT / evaluation.cell
        ax.plot(*points[:2000].mT, ".", markersize=1.5, color="tab:gray")
        ax.contour(
            evaluation.axis,
            evaluation.axis,
            density,
            levels=[0.001, 0.01, 0.03, 0.1, 0.2],
            colors="tab:red",
            linewidths=0.9,
        )
        ax.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal")
    plot_images(drawn[:64], (8, 8), ax=axes[1, 1]).set_title("digits: draws of the generator")
    every = torch.cat(list(energies.values())).numpy()
    edges = np.histogram_bin_edges(every, 60)
    for label, some in energies.items():
        axes[1, 2].stairs(np.histogram(some.numpy(), edges, density=True)[0], edges, label=label)
    axes[1, 2].set(title="digits", xlabel="energy", ylabel="density")
    axes[1, 2].legend(frameon=False)
    recipe.figure("deep_directed", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
