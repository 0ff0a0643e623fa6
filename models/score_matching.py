"""Score matching in all its forms: two-dimensional densities, mode weights, digits.

Evaluated by quadrature. About 3 minutes.

python -m models.score_matching [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import constraints

from models.recipe import Recipe, run
from pyroebm import MALA, MCMC, Energy
from pyroebm.core import score
from pyroebm.data import dequantized, digits
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import MLPEnergy
from pyroebm.objectives import (
    DenoisingScoreMatching,
    NonNegativeScoreMatching,
    Objective,
    ScoreMatching,
    SlicedScoreMatching,
    fisher_divergence,
)
from pyroebm.partition import quadrature
from pyroebm.targets import Gamma, Gaussian, GaussianMixture
from pyroebm.training import fit

LEVELS = 17  # gray levels of the digits
TOLERANCE = 1e-5  # of log Z, in nats
NOISE = 0.3  # of the digits, in standard deviations of a pixel


def train(
    energy: Energy,
    objective: Objective,
    data: Tensor,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
    progress: bool | None,
) -> float:
    """Train with Adam and a learning rate that decays to 0, and return the seconds it took."""
    began = time.perf_counter()
    fit(
        energy,
        objective,
        data,
        num_steps=steps,
        batch_size=batch_size,
        lr=rate,
        schedule="cosine",
        seed=seed,
        progress=progress,
    )
    energy.requires_grad_(False)
    return time.perf_counter() - began


def circle(*noise: float) -> GaussianMixture:
    """Return a mixture of eight overlapping normal modes on a circle, with weights 1 to 8.

    With ``noise`` it is the mixture, with equal weights, over normal noise of these standard
    deviations.
    """
    angles = 2.0 * math.pi * torch.arange(8) / 8
    means = 2.0 * torch.stack([angles.cos(), angles.sin()], 1)
    levels = torch.tensor(noise or (0.0,)).repeat_interleave(8)
    scale = (0.45**2 + levels**2).sqrt()
    return GaussianMixture(
        means.repeat(len(levels) // 8, 1),
        scale=scale,
        weights=torch.arange(1.0, 9.0).repeat(len(levels) // 8),
    )


def plane(recipe: Recipe, steps: int, points: int, progress: bool | None) -> dict[str, Energy]:
    """Train each objective on the circle.

    Records NLL and Fisher divergence relative to the density that the objective estimates.
    """
    noise = torch.Generator().manual_seed(recipe.seed)
    data = circle().sample(points, noise)
    forms: dict[str, tuple[Objective, GaussianMixture]] = {
        "exact": (ScoreMatching(), circle()),
        "exact, noise .1": (ScoreMatching(noise=0.1), circle()),
        "sliced": (SlicedScoreMatching(distribution="rademacher"), circle()),
        "sliced, not reduced": (SlicedScoreMatching(variance_reduced=False), circle()),
        "sliced, differences": (
            SlicedScoreMatching(variance_reduced=False, finite_difference=0.05),
            circle(),
        ),
        "denoising, .1": (DenoisingScoreMatching(0.1), circle(0.1)),
        "denoising, .1, controlled": (
            DenoisingScoreMatching(0.1, control_variate=True),
            circle(0.1),
        ),
        "denoising, .1 .3 1": (DenoisingScoreMatching((0.1, 0.3, 1.0)), circle(0.1, 0.3, 1.0)),
    }
    found: dict[str, Energy] = {}
    for name, (objective, target) in forms.items():
        energy = MLPEnergy(
            (2,), (64, 64), scale=1.0, generator=torch.Generator().manual_seed(recipe.seed)
        )
        energy.fit_envelope(data)
        seconds = train(energy, objective, data, steps, 3e-3, 256, recipe.seed, progress)
        log_z = quadrature(energy, tolerance=TOLERANCE, progress=progress)
        test = target.sample(points, noise)
        unnoised = circle().sample(points, noise)
        recipe.add_mean(
            f"circle, {name}: nats above the density it estimates",
            energy(test) + log_z.value - target(test),
            "exact",
            "standard error over the test set",
        )
        recipe.add_mean(
            f"circle, {name}: nats above the data's",
            energy(unnoised) + log_z.value - circle()(unnoised),
            "exact",
        )
        recipe.add(f"circle, {name}: Fisher divergence", *fisher_divergence(energy, target, test))
        recipe.add(f"circle, {name}: seconds", seconds)
        found[name] = energy
    return found


def two_modes(recipe: Recipe, steps: int, points: int, progress: bool | None) -> None:
    """Train on two separated modes with weights .9 and .1.

    The score does not depend on the weights of separated modes; that of data with wide noise does.
    """
    means = torch.tensor([[-3.0, 0.0], [3.0, 0.0]])
    deviation = 0.6
    noise_levels = (0.2, 0.8, 2.0)
    weights = torch.tensor([0.9, 0.1])
    target = GaussianMixture(means, scale=deviation, weights=weights)
    data = target.sample(points, torch.Generator().manual_seed(recipe.seed))
    widths = (deviation**2 + torch.tensor(noise_levels).repeat_interleave(2) ** 2).sqrt()
    noised = GaussianMixture(means.repeat(3, 1), scale=widths, weights=weights.repeat(3))
    for name, objective, truth in (
        ("exact", ScoreMatching(), target),
        ("denoising, .2 .8 2", DenoisingScoreMatching(noise_levels), noised),
    ):
        energy = MLPEnergy(
            (2,), (64, 64), scale=1.0, generator=torch.Generator().manual_seed(recipe.seed)
        )
        energy.fit_envelope(data)
        train(energy, objective, data, steps, 3e-3, 256, recipe.seed, progress)
        recipe.add(
            f"two modes, {name}: mass on the right",
            right(energy, progress),
            kind="exact",
            note=f"of the density it estimates: {right(truth, progress):.4f}",
        )
        recipe.add(
            f"two modes, {name}: Fisher divergence",
            *fisher_divergence(energy, truth, truth.sample(points)),
        )


def right(energy: Energy, progress: bool | None) -> float:
    """Return the probability of the right half-plane, by quadrature."""
    halves = [
        quadrature(energy, [side, (-10.0, 10.0)], tolerance=TOLERANCE, progress=progress).value
        for side in ((-12.0, 0.0), (0.0, 12.0))
    ]
    return 1.0 / (1.0 + math.exp(halves[0] - halves[1]))


def positive(recipe: Recipe, steps: int, points: int, progress: bool | None) -> None:
    """Train a multilayer perceptron on positive numbers by non-negative score matching."""
    gamma = Gamma(shape=torch.tensor([2.0, 4.0]), rate=torch.tensor([1.0, 2.0]))
    noise = torch.Generator().manual_seed(recipe.seed)
    data, test = gamma.sample(points, noise), gamma.sample(points, noise)
    energy = MLPEnergy((2,), (64, 64), support=constraints.positive, scale=10.0, generator=noise)
    train(energy, NonNegativeScoreMatching(), data, steps, 3e-3, 256, recipe.seed, progress)
    gap = (
        energy(test)
        + quadrature(energy, tolerance=TOLERANCE, progress=progress).value
        - gamma(test)
        - (gamma.log_z or 0.0)
    )
    recipe.add_mean(
        "gamma, non-negative: nats above the truth",
        gap,
        "exact",
        "standard error over the test set",
    )


def images(
    recipe: Recipe, steps: int, chain: int, progress: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Train on noisy digits by denoising and sliced score matching.

    Records the loss on test data relative to that of a normal distribution, and energies of chains.

    Returns:
        test images with noise, samples, and samples after one step of Tweedie's formula,
        x - sigma^2 grad E.
    """
    noise, pixels = torch.Generator().manual_seed(recipe.seed), digits(threshold=None)
    spread, middle = pixels.train.std(), pixels.train.mean(0)

    def scaled(x: Tensor) -> Tensor:
        return ((dequantized(x, LEVELS, noise) - middle) / spread).reshape(-1, 1, 8, 8)

    data, test = scaled(pixels.train.repeat(20, 1)), scaled(pixels.test)
    flat = data.reshape(-1, 64)
    normal = Gaussian(
        flat.mean(0).reshape(1, 8, 8), covariance=flat.mT.cov() + NOISE**2 * torch.eye(64)
    )
    noised = data + NOISE * torch.randn(data.shape, generator=noise)
    models: dict[str, Energy] = {"normal distribution": normal}
    for name, objective, rows in (
        ("denoising", DenoisingScoreMatching(NOISE), data),
        ("sliced", SlicedScoreMatching(distribution="rademacher"), noised),
    ):
        energy = MLPEnergy(
            (1, 8, 8), (256, 256), scale=1.0, generator=torch.Generator().manual_seed(recipe.seed)
        )
        energy.fit_envelope(data)
        seconds = train(energy, objective, rows, steps, 2e-3, 128, recipe.seed, progress)
        recipe.add(f"digits, {name}: seconds", seconds)
        models[name] = energy
    parts = (
        test.repeat(4, 1, 1, 1) + NOISE * torch.randn((4 * len(test), 1, 8, 8), generator=noise)
    ).split(72)
    # of 64 second derivatives; all models use the same directions
    objective = SlicedScoreMatching(4, distribution="rademacher")
    values = {
        name: torch.stack(
            [
                objective(energy, x, generator=torch.Generator().manual_seed(k))[0].detach()
                for k, x in enumerate(parts)
            ]
        )
        for name, energy in models.items()
    }
    for name, value in values.items():
        recipe.add_mean(f"digits, {name}: score matching's loss, test", value)
        if name != "normal distribution":
            recipe.add_mean(
                f"digits, {name}: Fisher divergence below the normal distribution's",
                values["normal distribution"] - value,
            )

    energy = models["denoising"]
    ends = {}
    for start, x in (("noise", energy.initial(64, noise)), ("data", torch.cat(parts)[:64])):
        mcmc = MCMC(
            MALA(),
            num_samples=1,
            warmup_steps=chain,
            num_chains=64,
            seed=recipe.seed,
            progress=progress,
        )
        mcmc.run(energy, initial=x)
        ends[start] = mcmc.get_samples()["x"]
        recipe.add_mean(f"digits, denoising: energy of chains from {start}", energy(ends[start]))
    recipe.add_mean("digits, denoising: energy of noised test data", energy(torch.cat(parts)))
    clean = ends["noise"] + NOISE**2 * score(energy, ends["noise"]).detach()
    shown = [
        (x.reshape(-1, 64) * spread + middle) for x in (torch.cat(parts)[:64], ends["noise"], clean)
    ]
    return shown[0], shown[1], shown[2]


def draw(ax: Axes, energy: Energy, title: str) -> None:
    """Plot a density in two dimensions."""
    axis = torch.linspace(-3.6, 3.6, 121)
    log_density = -energy(torch.cartesian_prod(axis, axis)).reshape(121, 121).mT
    ax.pcolormesh(
        axis.numpy(),
        axis.numpy(),
        (log_density - log_density.max()).exp().numpy(),
        cmap="magma",
        shading="nearest",
    )
    ax.set_title(title, fontsize=9)
    ax.set(aspect="equal", xticks=[], yticks=[])


def main(
    seed: int = 0, quick: bool = False, out: Path | None = None, progress: bool | None = None
) -> None:
    """Train and evaluate all forms.

    Args:
        seed: of data, weights and noise.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/score_matching.
        progress: show progress; None shows that of what takes longer than a second.
    """
    recipe = Recipe("score_matching", out, seed, quick=quick)
    steps, points, pictures, chain = (20, 1_000, 5, 20) if quick else (2_000, 20_000, 1_500, 500)
    found = plane(recipe, steps, points, progress)
    two_modes(recipe, steps, points, progress)
    positive(recipe, steps, points, progress)
    test, samples, clean = images(recipe, pictures, chain, progress)

    fig, axes = plt.subplots(3, 4, figsize=(11, 8.4), layout="constrained")
    draw(axes[0, 0], circle(), "true density")
    for ax, (name, energy) in zip(axes.flat[1:9], found.items(), strict=True):
        draw(ax, energy, name)
    pictures_of = (
        ("digits, test data with noise", test),
        ("MALA from noise", samples),
        ("after one denoising step", clean),
    )
    for ax, (title, shown) in zip(axes.flat[9:], pictures_of, strict=True):
        plot_images(shown, (8, 8), ax=ax).set_title(title, fontsize=9)
    recipe.figure("score_matching", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
