"""Boltzmann machines on three spins, bars and stripes, and parity, by enumeration.

All likelihoods are exact. About a minute.

python -m models.boltzmann_machine [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.recipe import Recipe, run
from pyroebm.core import all_bits
from pyroebm.data import bars_and_stripes, parity
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import BernoulliRBM, BoltzmannMachine
from pyroebm.objectives import ExactLikelihood
from pyroebm.training import fit


def three_spins(recipe: Recipe) -> None:
    """Print the table of the lecture: every state, its energy, weight and probability."""
    w = torch.tensor([[0.0, -1.0, -1.0], [-1.0, 0.0, 2.0], [-1.0, 2.0, 0.0]])
    machine = BoltzmannMachine(
        3, units="spins", weight=w, bias=torch.tensor([0.0, 1.0, 0.0])
    ).requires_grad_(False)
    states = 2.0 * all_bits(3) - 1.0
    h, z = -machine(states), math.exp(machine.log_partition())
    print(" x1  x2  x3    H = -E   exp(H)        p")
    for x, value in zip(states.tolist(), h.tolist(), strict=True):
        print(
            "".join(f"{int(s):>3} " for s in x)
            + f"{value:>9.0f} {math.exp(value):>9.5f} {math.exp(value) / z:>9.6f}"
        )
    p = h.exp() / z
    given = states[:, 1] == -1
    recipe.add("three spins: Z", z, kind="exact")
    recipe.add("three spins: p(x1 = 1)", p[states[:, 0] == 1].sum(), kind="exact")
    recipe.add(
        "three spins: p(x1 = 1 | x2 = -1)",
        p[given & (states[:, 0] == 1)].sum() / p[given].sum(),
        kind="exact",
    )


def learn(
    machine: BoltzmannMachine | BernoulliRBM, patterns: Tensor, steps: int, progress: bool | None
) -> list[float]:
    """Train by exact maximum likelihood and return the log-likelihood after each step."""
    schedule = functools.partial(CosineAnnealingLR, T_max=steps, eta_min=1e-3)
    history = fit(
        machine.marginal(),
        ExactLikelihood(),
        patterns,
        num_steps=steps,
        batch_size=len(patterns),
        lr=0.05,
        schedule=schedule,
        progress=progress,
    )
    likelihoods: list[float] = history["log_likelihood"].tolist()
    return likelihoods


def start(machine: BoltzmannMachine | BernoulliRBM, scale: float) -> None:
    """Initialize the weights at random, to break the symmetry between hidden units."""
    with torch.no_grad():
        noise = scale * torch.randn_like(machine.weight)
        square = isinstance(machine, BoltzmannMachine)
        machine.weight.copy_(noise.triu(1) + noise.triu(1).mT if square else noise)


def main(
    seed: int = 0, quick: bool = False, out: Path | None = None, progress: bool | None = None
) -> None:
    """Train and evaluate the machines.

    Args:
        seed: of the starting weights.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/boltzmann_machine.
        progress: show progress; None shows that of what takes longer than a second.
    """
    recipe = Recipe("boltzmann_machine", out, seed, quick=quick)
    three_spins(recipe)

    ceilings = {"bars and stripes": -2.59930, "parity": -math.log(4.0)}
    patterns = bars_and_stripes(3)
    bits = parity(3)
    curves = {}
    machines: dict[str, tuple[BoltzmannMachine | BernoulliRBM, Tensor, str]] = {
        "bars and stripes, 6 hidden units": (BoltzmannMachine(9, 6), patterns, "bars and stripes"),
        "parity, visible units only": (BoltzmannMachine(3), bits, "parity"),
        "parity, RBM of 3 hidden units": (BernoulliRBM(3, 3), bits, "parity"),
    }
    for name, (machine, data, ceiling) in machines.items():
        start(machine, 0.3)
        steps = 20 if quick else 1500 if ceiling == "bars and stripes" else 3000
        curves[name] = [
            ceilings[ceiling] - value for value in learn(machine, data, steps, progress)
        ]
        recipe.add(
            f"{name}: nats below the ceiling",
            ceilings[ceiling] - machine.log_likelihood(data).mean(),
            kind="exact",
        )
        recipe.model(name.replace(", ", "-").replace(" ", "-"), machine)

    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    plot_images(patterns.unique(dim=0), (3, 3), ax=axes[0]).set_title("bars and stripes")
    drawn = machines["bars and stripes, 6 hidden units"][0].sample(
        64, torch.Generator().manual_seed(seed)
    )
    plot_images(drawn[:, :9], (3, 3), ax=axes[1]).set_title("64 exact draws")
    for name, curve in curves.items():
        axes[2].semilogy(range(1, len(curve) + 1), curve, label=name)
    axes[2].axhline(math.log(2.0), color="black", linewidth=0.8, linestyle=":", label="log 2")
    axes[2].set(
        xlabel="step",
        ylabel="nats below the maximum",
        title="exact maximum likelihood",
        ylim=(1e-4, 10),
    )
    axes[2].legend(fontsize=7)
    recipe.figure("boltzmann_machine", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
