"""Two energies trained separately and multiplied: e1 + e2, with exact KL divergences.

One energy learns a ring, the other a slanted band. Their sum is the energy of a product of experts.
It is compared with the product of the true densities, sampled by NUTS, and conditioned on one
coordinate. A minute.

python -m models.composition [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from models.recipe import Recipe, run
from pyroebm import HMC, MCMC, NUTS, Energy
from pyroebm.core import Conditioned, seeded_generator
from pyroebm.energies import MLPEnergy
from pyroebm.objectives import ReplayBufferCD
from pyroebm.targets import Gaussian
from pyroebm.training import fit

RADIUS, WIDTH = 1.5, 0.2
SLANT, LENGTHS = 0.5, (1.5, 0.3)  #: of the band: angle, and standard deviations along and across it
#: The value of x2 of the conditional density.
CUT = 0.5
AXIS = torch.linspace(-5.0, 5.0, 401, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)


class Ring(Energy):
    """A density on a ring: a normal distribution of the radius."""

    event_shape = torch.Size([2])

    def forward(self, x: Tensor) -> Tensor:
        """Return energies of points ``(*batch, 2)``."""
        return 0.5 * ((x.norm(dim=-1) - RADIUS) / WIDTH) ** 2


def band() -> Gaussian:
    """Return a normal distribution, wide along one direction and narrow across it."""
    cos, sin = math.cos(SLANT), math.sin(SLANT)
    turn = torch.tensor([[cos, sin], [-sin, cos]])
    return Gaussian(
        torch.zeros(2), covariance=turn.mT @ torch.diag(torch.tensor(LENGTHS) ** 2) @ turn
    )


def from_grid(energy: Energy, n: int, generator: torch.Generator) -> Tensor:
    """Draw from the density on the grid, uniformly within its cells."""
    with torch.no_grad():
        cells = torch.multinomial(
            torch.softmax(-energy(GRID), 0), n, replacement=True, generator=generator
        )
    return GRID[cells] + (torch.rand(n, 2, generator=generator) - 0.5) * float(AXIS[1] - AXIS[0])


def log_density(
    energy: Energy, points: Tensor = GRID, spacing: float = float(AXIS[1] - AXIS[0])
) -> Tensor:
    """Return log-densities of grid points in one or two dimensions, normalized over them."""
    with torch.no_grad():
        values = -energy(points)
    return torch.log_softmax(values, 0) - points.shape[-1] * math.log(spacing)


def divergence(truth: Energy, model: Energy, points: Tensor = GRID) -> float:
    """Return KL(truth || model) in nats, by a sum over the grid."""
    p, q = log_density(truth, points), log_density(model, points)
    mass = torch.softmax(p, 0)
    return float((mass * (p - q)).sum())


def train(data: Tensor, hidden: int, steps: int, seed: int, progress: bool | None) -> MLPEnergy:
    """Train by persistent HMC chains with a learning rate that decays to 0."""
    energy = MLPEnergy((2,), (hidden, hidden), scale=1.0, generator=seeded_generator(seed))
    energy.fit_envelope(data, factor=1.5)
    objective = ReplayBufferCD(300, k=1, kernel=HMC(step_size=0.15, num_steps=8))
    fit(
        energy,
        objective,
        data,
        num_steps=steps,
        batch_size=300,
        lr=5e-3,
        schedule="cosine",
        seed=seed,
        progress=progress,
    )
    return energy.requires_grad_(False)


def main(
    seeds: int = 3,
    steps: int = 800,
    hidden: int = 64,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train two energies over several seeds, multiply and evaluate them.

    Args:
        seeds: trainings of each.
        steps: of the optimizer, on batches of 300.
        hidden: units of each of the two hidden layers.
        seed: the first of the seeds.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/composition.
        progress: show progress; None shows that of what takes longer than a second.
    """
    if quick:
        seeds, steps = 1, 50
    recipe = Recipe("composition", out, seed, seeds=seeds, steps=steps, hidden=hidden, quick=quick)
    truths: dict[str, Energy] = {"ring": Ring(), "band": band()}
    truths["product"] = truths["ring"] + truths["band"]
    clamped = torch.tensor([0.0, CUT]), torch.tensor([False, True])
    for name, truth in truths.items():
        p = log_density(truth)
        recipe.add(
            f"{name}: entropy of the truth",
            -(p.exp() * p).sum() * float(AXIS[1] - AXIS[0]) ** 2,
            kind="exact",
        )
    found = defaultdict[str, list[float]](list)
    for number in range(seed, seed + seeds):
        noise = seeded_generator(number, spawned=1)
        learned: dict[str, Energy] = {
            name: train(from_grid(truths[name], 10_000, noise), hidden, steps, number, progress)
            for name in ("ring", "band")
        }
        learned["product"] = learned["ring"] + learned["band"]
        for name, truth in truths.items():
            found[f"{name}: KL(truth || learned)"].append(divergence(truth, learned[name]))
        found["product: KL(truth || ring alone)"].append(
            divergence(truths["product"], learned["ring"])
        )
        cut = [Conditioned(energies["product"], *clamped) for energies in (truths, learned)]
        found[f"product given x2 = {CUT}: KL(truth || learned)"].append(
            divergence(*cut, AXIS.unsqueeze(1))
        )
        draws, warm, chains = (20, 20, 16) if quick else (50, 200, 64)
        mcmc = MCMC(
            NUTS(),
            num_samples=draws,
            warmup_steps=warm,
            num_chains=chains,
            seed=number,
            progress=False,
        )
        mcmc.run(learned["product"])
        x = mcmc.get_samples(group_by_chain=True)["x"]
        p, model = log_density(truths["product"]).exp(), log_density(learned["product"]).exp()
        spread = {"E|x1|": GRID[:, 0].abs(), "E[x2^2]": GRID[:, 1] ** 2}
        for (key, values), drawn in zip(
            spread.items(), (x[..., 0].abs(), x[..., 1] ** 2), strict=True
        ):
            found[f"product: {key}, NUTS"].append(float(drawn.mean()))
            found[f"product: {key}, learned, exact"].append(
                float((model * values).sum() / model.sum())
            )
            found[f"product: {key}, truth"].append(float((p * values).sum() / p.sum()))
    for key, values in found.items():
        error = torch.tensor(values).std() / seeds**0.5 if seeds > 1 else None
        recipe.add(
            key,
            sum(values) / seeds,
            error,
            "estimate" if "NUTS" in key else "exact",
            f"over {seeds} seeds",
        )

    fig, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    for row, (which, energies) in enumerate({"true": truths, "learned": learned}.items()):
        for ax, (name, energy) in zip(axes[row], energies.items(), strict=False):
            ax.pcolormesh(
                AXIS.numpy(),
                AXIS.numpy(),
                log_density(energy).exp().reshape(len(AXIS), -1).mT.numpy(),
                rasterized=True,
            )
            ax.set(title=f"{name}, {which}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    axes[0, 3].plot(*x.reshape(-1, 2).mT, ".", markersize=1.5)
    axes[0, 3].set(title="draws of e1 + e2 (NUTS)", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    for energy, label in zip(cut, ("true", "learned"), strict=True):
        axes[1, 3].plot(AXIS, log_density(energy, AXIS.unsqueeze(1)).exp(), label=label)
    axes[1, 3].set(title=f"x1 given x2 = {CUT}", xlabel="x1", xlim=(-3, 3))
    axes[1, 3].legend(frameon=False)
    recipe.figure("composition", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
