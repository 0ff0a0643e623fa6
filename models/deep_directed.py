"""Deep directed models (Kim and Bengio, 2016): energy and generator on a mixture of known density and on digits. 2 minutes.

The generator's entropy is that of its batch normalisation, which bounds nothing: the energy is judged by quadrature. On the
mixture the generator ends on one mode of four and the energy 2 to 3 nats below the truth: this surrogate learns no weights.

python -m models.deep_directed [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from models.adversarial_flow import Judge, play
from models.recipe import Recipe, run
from pyroebm.datasets import digits
from pyroebm.energies import ProductOfExpertsEnergy
from pyroebm.generators import MLPGenerator
from pyroebm.networks import mlp
from pyroebm.objectives import DeepDirected
from pyroebm.plotting import plot_images
from pyroebm.randomness import seeded_generator
from pyroebm.targets import GaussianMixture

#: An energy that runs ahead of a generator on one mode is lost: it moves a hundred times more slowly.
RATES = {"energy": 3e-5, "generator": 3e-3}
CORNERS = [[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]


def energy_distance(x: Tensor, y: Tensor) -> float:
    r""":math:`2 E|x - y| - E|x - x'| - E|y - y'|` (Székely and Rizzo, 2013), without bias: no point is paired with itself."""

    def within(z: Tensor) -> float:
        return float(torch.pdist(z).mean())

    return 2.0 * float(torch.cdist(x, y).mean()) - within(x) - within(y)


def experts(entries: int, features: int, num_experts: int, sigma: float, seed: int) -> ProductOfExpertsEnergy:
    """The paper's energy, on bounded features: none grows faster than the envelope."""
    noise = seeded_generator(seed, spawned=4)
    net = nn.Sequential(mlp(entries, features, (features,), zero_last=False, generator=noise), nn.Tanh())
    return ProductOfExpertsEnergy(net, features, (entries,), num_experts, sigma, generator=noise)


def mixture(recipe: Recipe, steps: int, width: int, progress: bool | None) -> tuple[Judge, Tensor, Tensor]:
    """Four normal laws of unequal weights: exact likelihood of the energy, shares of the modes of energy and generator."""
    target = GaussianMixture(CORNERS, scale=0.5, weights=[0.4, 0.3, 0.2, 0.1])
    judge = Judge(target)
    data, test = (target.sample(n, seeded_generator(recipe.seed, spawned=k)) for k, n in enumerate((20_000, 4_000)))
    energy = experts(2, width, width, 1.0, recipe.seed)
    model = MLPGenerator((2,), 4, (width, width), batch_norm=True, generator=seeded_generator(recipe.seed, spawned=2))
    for _ in play(energy, DeepDirected(model), data, RATES, steps=steps, seed=recipe.seed, progress=progress):
        pass
    found, drawn = judge(energy.requires_grad_(False)), model.sample(4_000, seeded_generator(recipe.seed, spawned=3))
    recipe.add("mixture: truth, log-likelihood", -judge.entropy, kind="exact")
    recipe.add("mixture: nats below the truth", -judge.entropy - found["log_likelihood"], kind="exact", note="by quadrature")
    values = energy(judge.grid)
    p, modes, law = torch.softmax(-values, 0), target.mode_of(judge.grid), torch.softmax(judge.log_law, 0)
    for k in range(4):
        truth = float(law[modes == k].sum())
        recipe.add(f"mixture: mode {k + 1} of the energy", float(p[modes == k].sum()), kind="exact", note=f"truth {truth:.3f}")
        recipe.add_mean(f"mixture: mode {k + 1} of the generator", (target.mode_of(drawn) == k).double())
    recipe.add("mixture: energy distance, generator to test", energy_distance(drawn, test))
    recipe.add("mixture: energy distance, data to test", energy_distance(data[:4_000], test), note="of two samples of one law")
    return judge, values, drawn


def images(recipe: Recipe, steps: int, width: int, progress: bool | None) -> tuple[Tensor, Tensor, Tensor]:
    """Digits of 8 x 8 pixels: no density to compare with; energies of data and draws, and distances."""
    split = digits(threshold=None)
    noise = seeded_generator(recipe.seed, spawned=5)
    train = split.train + torch.rand(split.train.shape, generator=noise) / 16.0  # grey levels are 17: dequantised
    test = split.test + torch.rand(split.test.shape, generator=noise) / 16.0
    centre = train.mean(0)
    energy = experts(64, width, width, 1.0, recipe.seed)
    model = MLPGenerator((64,), 16, (width, width), batch_norm=True, generator=seeded_generator(recipe.seed, spawned=2))
    for _ in play(energy, DeepDirected(model), train - centre, RATES, steps=steps, seed=recipe.seed, progress=progress):
        pass
    drawn = model.sample(1_000, seeded_generator(recipe.seed, spawned=3))
    shuffled = torch.stack([column[torch.randperm(len(test), generator=noise)] for column in test.mT], 1)
    energies = [energy(x - centre).detach() for x in (test, drawn + centre, shuffled)]
    recipe.add_mean("digits: energy of the test set", energies[0])
    recipe.add_mean("digits: energy of the generator's draws", energies[1])
    above = (energies[2].unsqueeze(0) > energies[0].unsqueeze(1)).double().mean()
    recipe.add("digits: AUROC, test set against shuffled pixels", above)
    recipe.add("digits: energy distance, generator to test", energy_distance(drawn + centre, test))
    recipe.add("digits: energy distance, train to test", energy_distance(train, test), note="of two samples of one law")
    recipe.add("digits: energy distance, shuffled pixels to test", energy_distance(shuffled, test))
    return drawn + centre, energies[0], energies[1]


def main(steps: int = 1500, seed: int = 0, quick: bool = False, out: Path | None = None, progress: bool | None = None) -> None:
    """Train and judge on both data sets.

    Args:
        steps: of each game.
        seed: of data, weights and games.
        quick: a few steps only, to see that everything runs.
        out: folder of metrics.json and the figure; runs/deep_directed without.
        progress: show bars; on a terminal without.
    """
    recipe = Recipe("deep_directed", out, seed, steps=steps, quick=quick)
    steps, width = (20, 16) if quick else (steps, 128)
    judge, values, drawn = mixture(recipe, steps, width // 2, progress)
    made, seen, dreamt = images(recipe, steps, width, progress)

    fig, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    side = len(judge.axis)
    for ax, values_, title in ((axes[0], -judge.log_law, "true law"), (axes[1], values, "energy, and its generator's draws")):
        density = torch.softmax(-values_, 0).reshape(side, side).mT / judge.cell
        ax.contour(judge.axis, judge.axis, density, levels=[0.001, 0.01, 0.03, 0.1, 0.2], colors="tab:red", linewidths=0.9)
        ax.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal")
    axes[1].plot(*drawn[:2000].mT, ".", markersize=1.5, color="tab:gray", zorder=0)
    plot_images(made[:64], (8, 8), ax=axes[2]).set_title("digits: the generator's draws")
    low, high = (float(f(torch.cat([seen, dreamt]))) for f in (torch.amin, torch.amax))
    edges = np.linspace(low, high, max(10, math.isqrt(len(seen)) * 2))
    for energies, label in ((seen, "test set"), (dreamt, "generator")):
        axes[3].stairs(np.histogram(energies.numpy(), edges, density=True)[0], edges, label=label)
    axes[3].set(title="digits", xlabel="energy", ylabel="density")
    axes[3].legend(frameon=False)
    recipe.figure("deep_directed", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
