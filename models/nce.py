"""Noise-contrastive estimation in two dimensions, and neighbor objectives on spins.

Evaluated by exact divergences. With noise as wide as the data or wider, NCE is .011 to .015 nats
from the truth, ranking and conditional NCE .008 to .012; the same network by exact likelihood is
.009. With noise of half the width of the data NCE is 10 nats from the truth (seed 0). About 3
minutes.

python -m models.nce [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pyro.distributions import transforms as transforms
from torch import Tensor

from models.recipe import Recipe, run
from pyroebm import Energy
from pyroebm.core import all_bits, seeded_generator
from pyroebm.energies import BoltzmannMachine, MLPEnergy
from pyroebm.flows import Flow, FlowEnergy
from pyroebm.objectives import (
    ConditionalNCE,
    ExactLikelihood,
    FlowContrastive,
    MinimumProbabilityFlow,
    NoiseContrastive,
    Objective,
    Pseudolikelihood,
    RankingNCE,
    RatioMatching,
    gaussian_noise,
)
from pyroebm.partition import quadrature
from pyroebm.targets import GaussianMixture
from pyroebm.training import fit

#: Half the side of the square of the plots and sums.
HALF = 7.0
WIDTHS = (0.5, 0.7, 1.0, 2.0, 4.0)
NUS = (1.0, 4.0, 16.0)


def five_gaussians() -> GaussianMixture:
    """Return five normal modes on a circle of radius 2.5 with weights from 0.4 to 0.05."""
    angles = 2.0 * math.pi * torch.arange(5) / 5
    means = 2.5 * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, scale=0.5, weights=[0.4, 0.25, 0.18, 0.12, 0.05])


def grid(points: int) -> tuple[Tensor, float]:
    """Return the grid points of a square and the area of a cell."""
    axis = torch.linspace(-HALF, HALF, points)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


class Perceptron(MLPEnergy):
    """A multilayer perceptron as an energy, with log Z on a grid.

    Args:
        data: for the envelope.
        seed: of the weights.
    """

    def __init__(self, data: Tensor, seed: int) -> None:
        super().__init__((2,), (64, 64), generator=seeded_generator(seed))
        self.fit_envelope(data, factor=1.5)

    def log_partition(self) -> Tensor:
        """Return log Z by a sum over the grid."""
        nodes, area = grid(40)
        return (-self(nodes)).logsumexp(0) + math.log(area)


def real_nvp(data: Tensor) -> Flow:
    """Return six affine couplings (Dinh, Sohl-Dickstein and Bengio, 2017).

    They start at the mean and the width of the data.
    """
    parts: list[torch.distributions.Transform] = []
    for _ in range(6):
        parts += [
            transforms.affine_coupling(2, hidden_dims=[32, 32]),
            transforms.Permute(torch.tensor([1, 0])),
        ]
    return Flow(
        [*parts, transforms.AffineTransform(data.mean(0), data.std(0), event_dim=1)],
        dim=2,
        total_dim=2,
    )


def train(
    energy: Energy,
    objective: Objective,
    data: Tensor,
    steps: int,
    seed: int,
    progress: bool | None,
    rates: dict[str, float] | None = None,
) -> None:
    """Train with Adam and a learning rate that decays to 0.

    ``rates`` has a learning rate for each loss of an objective with several.
    """
    fit(
        energy,
        objective,
        data,
        num_steps=steps,
        batch_size=256,
        lr=3e-3 if rates is None else rates,
        schedule="cosine",
        seed=seed,
        progress=progress,
    )


def evaluate(
    recipe: Recipe,
    name: str,
    energy: Perceptron,
    log_z: Tensor | None,
    test: Tensor,
    seconds: float,
    progress: bool | None,
) -> tuple[Tensor, float]:
    """Record test NLL, the KL divergence from the truth, and the error of the mode weights.

    log Z is by quadrature.

    Returns:
        log p on the grid, and the divergence.
    """
    target, (nodes, area) = five_gaussians(), grid(281)
    exact = quadrature(energy, tolerance=1e-5, progress=progress)
    with torch.no_grad():
        recipe.add_mean(
            f"{name}: test NLL",
            energy(test) + exact.value,
            exact.kind,
            "standard error over the test set",
        )
        log_p, truth = -energy(nodes) - exact.value, -target(nodes)
        divergence = recipe.add(
            f"{name}: KL from the truth",
            area * (truth.exp() * (truth - log_p)).sum(),
            kind=exact.kind,
        )
        of = torch.nn.functional.one_hot(target.mode_of(nodes), 5).to(log_p)
        recipe.add(
            f"{name}: largest error of a mode's mass",
            area * ((log_p.exp() - truth.exp()) @ of).abs().max(),
            kind=exact.kind,
        )
    if log_z is not None:
        recipe.add(
            f"{name}: learned log Z less the true one", float(log_z) - exact.value, kind=exact.kind
        )
    recipe.add(f"{name}: seconds", seconds, note="wall time of the training")
    return log_p, divergence


def plane(
    recipe: Recipe, rows: int, steps: int, progress: bool | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train every objective on the five modes.

    Returns:
        log-densities on the grid, and divergences.
    """
    target, seed = five_gaussians(), recipe.seed
    data, test = (
        target.sample(rows, seeded_generator(seed, spawned=0)),
        target.sample(10_000, seeded_generator(seed, spawned=1)),
    )
    recipe.add_mean("truth: test NLL", target(test), "exact")
    densities, divergences = {"truth": -target(grid(281)[0])}, {}

    began = time.perf_counter()
    flow = real_nvp(data)
    train(FlowEnergy(flow), ExactLikelihood(), data, steps, seed, progress)
    recipe.add_mean("flow alone: test NLL", -flow.log_prob(test).detach(), "exact")
    recipe.add("flow alone: seconds", time.perf_counter() - began, note="wall time of the training")
    with torch.no_grad():
        densities["flow alone"] = flow.log_prob(grid(281)[0])

    objectives: dict[str, Objective] = {"exact likelihood": ExactLikelihood()}
    objectives |= {
        f"NCE, width {s:g}, nu 1": NoiseContrastive(gaussian_noise(data, s)) for s in WIDTHS
    }
    objectives |= {
        f"NCE, width 1, nu {nu:g}": NoiseContrastive(gaussian_noise(data), nu) for nu in NUS
    }
    objectives |= {
        "ranking, 4 negatives": RankingNCE(gaussian_noise(data), 4),
        "conditional, scale 0.3": ConditionalNCE(0.3, 4),
        "conditional, scale 2": ConditionalNCE(2.0, 4),
        "NCE, flow as noise": NoiseContrastive(flow),
    }
    for name, objective in objectives.items():
        energy, began = Perceptron(data, seed), time.perf_counter()
        train(energy, objective, data, steps, seed, progress)
        log_z = objective.log_z.detach() if isinstance(objective, NoiseContrastive) else None
        densities[name], divergences[name] = evaluate(
            recipe, name, energy, log_z, test, time.perf_counter() - began, progress
        )

    energy = Perceptron(data, seed)
    objective = FlowContrastive(flow)
    began = time.perf_counter()
    train(energy, objective, data, steps, seed, progress, {"energy": 3e-3, "flow": 3e-4})
    name, seconds = "NCE against a trained flow", time.perf_counter() - began
    densities[name], divergences[name] = evaluate(
        recipe, name, energy, objective.log_z.detach(), test, seconds, progress
    )
    recipe.add_mean("flow trained along: test NLL", -flow.log_prob(test).detach(), "exact")
    return densities, divergences


def spins(recipe: Recipe, sets: int, rows: int) -> dict[str, list[float]]:
    """Fit Boltzmann machines of eight spins to draws of another one, over several data sets.

    Returns:
        KL divergences from the truth.
    """
    generator = seeded_generator(recipe.seed, spawned=2)
    weight = 0.5 * torch.randn(8, 8, generator=generator).triu(1)
    truth = BoltzmannMachine(
        8, units="spins", weight=weight + weight.mT, bias=0.3 * torch.randn(8, generator=generator)
    )
    states = 2.0 * all_bits(8) - 1.0
    log_p = (-truth(states)).log_softmax(0).detach()
    objectives: dict[str, Callable[[], Objective]] = {
        "exact likelihood": ExactLikelihood,
        "pseudo-likelihood": Pseudolikelihood,
        "ratio matching": RatioMatching,
        "probability flow": MinimumProbabilityFlow,
    }
    found: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(sets):
        data = truth.sample(rows, generator)
        for name, objective in objectives.items():
            machine = BoltzmannMachine(8, units="spins", weight=torch.zeros(8, 8))
            solve(machine, objective(), data)
            with torch.no_grad():
                found[name].append(float(log_p.exp() @ (log_p - (-machine(states)).log_softmax(0))))
    for name, values in found.items():
        recipe.add_mean(
            f"spins, {name}: KL from the truth",
            torch.tensor(values),
            "exact",
            f"mean of {sets} sets of {rows} rows",
        )
    recipe.add(
        "spins: KL of maximum likelihood in theory",
        36 / (2 * rows),
        note="parameters / (2 rows), asymptotically",
    )
    return found


def solve(machine: BoltzmannMachine, objective: Objective, data: Tensor) -> None:
    """Minimize an objective by L-BFGS."""
    optimizer = torch.optim.LBFGS(machine.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = objective(machine, data)
        loss.backward()
        return loss

    optimizer.step(closure)


def figure(
    densities: dict[str, Tensor], divergences: dict[str, float], found: dict[str, list[float]]
) -> plt.Figure:
    """Plot densities, and divergences by the width of the noise, by nu, and of the spins."""
    fig, axes = plt.subplots(3, 4, figsize=(13, 9.6), layout="constrained")
    narrow, wide = (f"NCE, width {s:g}, nu 1" for s in (WIDTHS[0], WIDTHS[-1]))
    shown = [
        "truth",
        narrow,
        "NCE, width 1, nu 1",
        wide,
        "ranking, 4 negatives",
        "conditional, scale 0.3",
        "conditional, scale 2",
        "flow alone",
        "NCE against a trained flow",
    ]
    for ax, name in zip(axes.flat, shown, strict=False):
        ax.imshow(
            densities[name].exp().reshape(281, 281).mT.numpy(),
            origin="lower",
            extent=(-HALF, HALF) * 2,
            vmax=0.25,
            cmap="magma",
        )
        ax.set(title=name, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xticks=[], yticks=[])
    floor = divergences["exact likelihood"]
    sweeps = [
        (axes[2, 1], "width of the noise", WIDTHS, "NCE, width {:g}, nu 1"),
        (axes[2, 2], "nu", NUS, "NCE, width 1, nu {:g}"),
    ]
    for ax, label, values, key in sweeps:
        ax.loglog(values, [divergences[key.format(value)] for value in values], "o-")
        ax.axhline(floor, color="black", linewidth=0.8, linestyle=":", label="exact likelihood")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.set(xlabel=label, ylabel="KL from the truth, nats", title=f"NCE against {label}")
        ax.legend(fontsize=7)
    axes[2, 2].set(
        yscale="linear", ylim=(0.0, 1.2 * max(divergences[sweeps[1][3].format(nu)] for nu in NUS))
    )
    ax = axes[2, 3]
    for row, values in enumerate(found.values()):
        ax.plot(values, [row] * len(values), "o", color="tab:gray", markersize=3)
        ax.plot(sum(values) / len(values), row, "|", color="tab:red", markersize=16)
    ax.set_yticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize=7)
    ax.set(xlabel="KL from the truth, nats", title="eight spins, one point per data set")
    ax.set_xlim(left=0.0)
    return fig


def main(
    rows: int = 20_000,
    steps: int = 1500,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train by every objective and evaluate.

    Args:
        rows: number of training points in two dimensions.
        steps: of each training in two dimensions.
        seed: of data, weights and noise.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/nce.
        progress: show progress; None shows that of what takes longer than a second.
    """
    recipe = Recipe("nce", out, seed, rows=rows, steps=steps, quick=quick)
    densities, divergences = plane(recipe, 500 if quick else rows, 10 if quick else steps, progress)
    found = spins(recipe, 2 if quick else 10, 200 if quick else 2000)
    recipe.figure("nce", figure(densities, divergences, found))
    recipe.write()


if __name__ == "__main__":
    run(main)
