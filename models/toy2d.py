"""Two-dimensional toy data by every objective, evaluated with exact log Z. About 15 minutes.

On two moons the test log-likelihood is within 0.05 nats of that of the true density.

python -m models.toy2d [--only NAME ...] [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from pyro.distributions.transforms import LowerCholeskyAffine, Permute, affine_coupling
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.plane import GridLikelihood
from models.recipe import Kind, Recipe, run
from pyroebm.core import Energy
from pyroebm.diagnostics.plots import plot_mode_masses
from pyroebm.energies import MLPEnergy
from pyroebm.flows import Flow
from pyroebm.kernels import MALA, LocalGlobalMixture
from pyroebm.nn import MLPGenerator
from pyroebm.objectives import (
    VERA,
    AdversarialFlow,
    ConditionalNCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    FlowContrastive,
    NoiseContrastive,
    Objective,
    RankingNCE,
    ReplayBufferCD,
    ScoreMatching,
    SlicedScoreMatching,
    gaussian_noise,
)
from pyroebm.partition import expectation, quadrature
from pyroebm.targets import (
    Checkerboard,
    Circles,
    GaussianMixture,
    Pinwheel,
    Target,
    TwoMoons,
    TwoSpirals,
    eight_gaussians,
)
from pyroebm.training import fit


class Toy(NamedTuple):
    """A target, the side of a square around 0 that contains it, and the width of its noise.

    Step sizes and noises are multiples of the width.
    """

    make: Callable[..., Target]
    side: float
    width: float


TOYS = {
    "moons": Toy(TwoMoons, 6.0, 0.1),
    "8 Gaussians": Toy(eight_gaussians, 10.0, 0.35),
    "checkerboard": Toy(Checkerboard, 12.0, 0.3),
    "two spirals": Toy(TwoSpirals, 10.0, 0.1),
    "rings": Toy(Circles.rings, 9.0, 0.08),
    "pinwheel": Toy(Pinwheel, 11.0, 0.2),
}
PAIR = Toy(
    functools.partial(GaussianMixture, [[-3.0, 0.0], [3.0, 0.0]], scale=0.5, weights=[0.9, 0.1]),
    12.0,
    0.5,
)

TEST_SIZE = 20_000


def flow(data: Tensor, couplings: int) -> Flow:
    """Return affine couplings over a normal distribution somewhat wider than the data."""
    parts: list[Any] = []
    for _ in range(couplings):
        parts += [affine_coupling(2, hidden_dims=[64, 64]), Permute(torch.tensor([1, 0]))]
    wide = LowerCholeskyAffine(data.mean(0), 1.2 * torch.linalg.cholesky(data.mT.cov()))
    return Flow([*parts, wide], 2, 2).to(data.dtype)


def global_moves(toy: Toy, data: Tensor) -> LocalGlobalMixture:
    """Return a kernel that alternates three Langevin steps and one global proposal.

    The proposals let chains move between modes.
    """
    return LocalGlobalMixture(MALA(1.5 * toy.width), flow(data, 0), every=3)


def vera(toy: Toy, data: Tensor) -> VERA:
    """Return VERA with a multilayer perceptron as its generator."""
    return VERA(MLPGenerator((2,), latent_dim=2, sigma=0.3, dtype=data.dtype), eta=0.5)


class Entry(NamedTuple):
    """An objective for a target and its data, and the settings of its training."""

    make: Callable[[Toy, Tensor], Objective]
    steps: int
    rates: Mapping[str, float] = MappingProxyType({"energy": 1e-2})
    momentum: float = 0.9
    noise: float = 0.0  # standard deviation, in widths
    # why it does not learn the weights of separated modes, if it does not
    failure: str = ""
    costly: bool = False  # only on the moons and the weights, unless `only` names it


NO_CROSSING = "its chains do not cross between the modes"
NO_WEIGHTS = "the score does not depend on the weights of separated modes"
LOST_MODE = "as good as the flow or generator, which lost a mode"

ENTRIES = {
    "likelihood": Entry(lambda toy, data: GridLikelihood(toy.side, 48), 1500),
    "CD-10": Entry(
        lambda toy, data: ContrastiveDivergence(10, MALA(1.5 * toy.width)),
        1000,
        {"energy": 1e-3},
        failure=NO_CROSSING,
    ),
    "PCD-10": Entry(
        lambda toy, data: ReplayBufferCD(256, 10, MALA(1.5 * toy.width), restart=0.05),
        2000,
        {"energy": 2e-3},
        0.0,
        failure=NO_CROSSING,
    ),
    "PCD, global moves": Entry(
        lambda toy, data: ReplayBufferCD(256, 1, global_moves(toy, data)), 3000, {"energy": 2e-2}
    ),
    "score": Entry(lambda toy, data: ScoreMatching(), 1500, failure=NO_WEIGHTS),
    "sliced": Entry(lambda toy, data: SlicedScoreMatching(), 1500, failure=NO_WEIGHTS),
    "denoising": Entry(
        lambda toy, data: DenoisingScoreMatching(0.5 * toy.width),
        2000,
        noise=0.5,
        failure=NO_WEIGHTS,
    ),
    "NCE": Entry(lambda toy, data: NoiseContrastive(gaussian_noise(data, 1.2), nu=4.0), 1500),
    "ranking": Entry(lambda toy, data: RankingNCE(gaussian_noise(data, 1.2), 4), 1500),
    "conditional": Entry(lambda toy, data: ConditionalNCE(6.0 * toy.width, 4), 1500),
    "flow NCE": Entry(
        lambda toy, data: FlowContrastive(flow(data, 6)),
        2000,
        {"energy": 3e-3, "flow": 1e-3},
        failure=LOST_MODE,
        costly=True,
    ),
    "flow adversary": Entry(
        lambda toy, data: AdversarialFlow(flow(data, 6)),
        2500,
        {"energy": 3e-3, "generator": 3e-3},
        0.5,
        failure=LOST_MODE,
        costly=True,
    ),
    "VERA": Entry(
        vera,
        1500,
        {"energy": 3e-4, "generator": 3e-3, "posterior": 1e-2},
        0.5,
        failure=LOST_MODE,
        costly=True,
    ),
}


def train(
    entry: Entry, toy: Toy, data: Tensor, steps: int, seed: int, progress: bool | None
) -> Energy:
    """Train a 2-128-128-1 network by one objective in float32.

    Returns:
        the average of its parameters over the last steps, in float64.
    """
    torch.manual_seed(seed)  # of flows and generators
    data = data.float()
    generator = torch.Generator().manual_seed(seed)
    energy = MLPEnergy(
        (2,), hidden_sizes=(128, 128), scale=1.0, dtype=torch.float32, generator=generator
    )
    energy.fit_envelope(data)
    average = AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(1.0 - min(0.5, 20.0 / steps)))
    adam = functools.partial(torch.optim.Adam, betas=(entry.momentum, 0.999), fused=True)
    optimizers = {player: functools.partial(adam, lr=rate) for player, rate in entry.rates.items()}
    fit(
        energy,
        entry.make(toy, data),
        data,
        num_steps=steps,
        batch_size=256,
        optimizer=optimizers,
        schedule="cosine",
        max_grad_norm=10.0,
        average=average,
        seed=seed,
        progress=progress,
    )
    return copy.deepcopy(average.module).double().requires_grad_(False)


class DensityGrid:
    """The density of a target on a grid over its square."""

    def __init__(self, toy: Toy, points: int) -> None:
        step = toy.side / points
        self.axis = (torch.arange(points, dtype=torch.float64) + 0.5) * step - 0.5 * toy.side
        self.x = torch.cartesian_prod(self.axis, self.axis)
        self.density = torch.exp(-toy.make()(self.x)).reshape(points, points)
        self.area = step * step

    def blurred(self, noise: float) -> Tensor:
        """Return the density of a draw plus normal noise with standard deviation ``noise``."""
        if noise == 0.0:
            return self.density
        kernel = torch.softmax(-0.5 * ((self.axis[:, None] - self.axis) / noise) ** 2, 0)
        return kernel @ self.density @ kernel.mT

    def divergence(self, noise: float, log_model: Tensor) -> Tensor:
        """Return KL(target with noise || model), by a sum over the grid."""
        p = self.blurred(noise)
        terms = torch.where(p > 0.0, p * (p.log() - log_model.reshape(p.shape)), 0.0)
        return terms.sum() / p.sum()


def evaluate(
    recipe: Recipe,
    key: str,
    energy: Energy,
    entry: Entry,
    toy: Toy,
    grid: DensityGrid,
    test: Tensor,
    progress: bool | None,
) -> Tensor:
    """Record exact test NLL and divergences, and return the model's log-density on the grid."""
    log_z = quadrature(energy, tolerance=1e-5, progress=progress)
    log_model = -energy(grid.x) - log_z.value
    nll, truth = energy(test) + log_z.value, toy.make()(test)
    recipe.add_mean(f"{key}: test NLL", nll, log_z.kind)
    recipe.add_mean(f"{key}: above the true density", nll - truth, log_z.kind, "on the same points")
    recipe.add(f"{key}: KL", grid.divergence(0.0, log_model), kind=log_z.kind)
    if entry.noise:
        sigma = entry.noise * toy.width
        recipe.add(
            f"{key}: KL to the density it estimates",
            grid.divergence(sigma, log_model),
            kind=log_z.kind,
            note=f"noise {sigma:.3g}",
        )
    return log_model


def toys(
    recipe: Recipe,
    plan: Mapping[str, Sequence[str]],
    size: int,
    share: float,
    progress: bool | None,
) -> None:
    """Train the planned objectives on every target."""
    names, labels = (
        list(plan),
        [label for label in ENTRIES if any(label in planned for planned in plan.values())],
    )
    fig, axes = plt.subplots(
        len(names),
        1 + len(labels),
        figsize=(1.7 * (1 + len(labels)), 1.8 * len(names)),
        layout="constrained",
        squeeze=False,
    )
    for row, name in enumerate(names):
        toy = TOYS[name]
        draws = toy.make().sample(size + TEST_SIZE, torch.Generator().manual_seed(recipe.seed))
        data, test = draws[:size], draws[size:]
        grid = DensityGrid(toy, 240)
        recipe.add(
            f"{name}, true density: entropy",
            -torch.xlogy(grid.density, grid.density).sum() * grid.area,
            kind="exact",
        )
        recipe.add_mean(f"{name}, true density: test NLL", toy.make()(test), "exact")
        top = float(grid.density.quantile(0.995))
        show(axes[row, 0], grid, grid.density, top, "true density" if row == 0 else "", "")
        axes[row, 0].set_ylabel(name)
        for column, label in enumerate(labels, 1):
            if label not in plan[name]:
                axes[row, column].set_visible(False)
                continue
            entry, began = ENTRIES[label], time.process_time()
            energy = train(
                entry, toy, data, max(2, round(share * entry.steps)), recipe.seed, progress
            )
            seconds = time.process_time() - began
            recipe.model(f"{name}-{label}", energy)
            log_model = evaluate(
                recipe, f"{name}, {label}", energy, entry, toy, grid, test, progress
            )
            recipe.add(
                f"{name}, {label}: seconds", seconds, kind="estimate", note="of one processor"
            )
            gap = recipe.metrics[f"{name}, {label}: above the true density"]["value"]
            show(
                axes[row, column],
                grid,
                log_model.exp(),
                top,
                label if row == 0 else "",
                f"+{gap:.3f} nats",
            )
    recipe.figure("toy2d", fig)


def show(
    ax: plt.Axes, grid: DensityGrid, density: Tensor, top: float, title: str, label: str
) -> None:
    """Plot a density as an image."""
    half = float(-grid.axis[0])
    picture = density.reshape(len(grid.axis), -1).mT.numpy()
    ax.imshow(
        picture, origin="lower", extent=(-half, half, -half, half), vmin=0.0, vmax=top, cmap="magma"
    )
    ax.set(xticks=[], yticks=[], xlabel=label)
    ax.set_title(title, fontsize=10)


def weights(
    recipe: Recipe, labels: Sequence[str], size: int, share: float, progress: bool | None
) -> None:
    """Record the mass that each objective gives to the lighter of two normal modes.

    Their weights are 0.9 and 0.1.
    """
    data = PAIR.make().sample(size, torch.Generator().manual_seed(recipe.seed))
    seen = (data[:, 0] > 0).double()
    recipe.add_mean("weights, data: the lighter", seen, "estimate", "the truth is 0.1")
    masses = {}
    for label in labels:
        entry = ENTRIES[label]
        energy = train(entry, PAIR, data, max(2, round(share * entry.steps)), recipe.seed, progress)
        mass, change = expectation(
            energy,
            lambda x: (x[:, 0] > 0).double(),
            [(-10.0, 10.0)] * 2,
            tolerance=1e-5,
            progress=progress,
        )
        kind: Kind = "exact" if change <= 1e-4 else "estimate"
        masses[label] = (
            recipe.add(f"weights, {label}: the lighter", mass, change, kind, entry.failure),
            float("nan"),
        )
    ax = plot_mode_masses(masses, truth=0.1, label="mass of the lighter of two Gaussians")
    recipe.figure("weights", ax.get_figure())


def table(recipe: Recipe) -> None:
    """Write all results as a table to ``toy2d.md``.

    The numbers are nats of test NLL above that of the true density, with the seconds in brackets.
    """

    def cell(label: str, name: str) -> str:
        if name == "weights":
            found = recipe.metrics.get(f"weights, {label}: the lighter")
            return "not run" if found is None else f"{found['value']:.3f}"
        found, blurred = (
            recipe.metrics.get(f"{name}, {label}: {what}")
            for what in ("above the true density", "KL to the density it estimates")
        )
        if found is None:
            return "not run"
        seconds = recipe.metrics[f"{name}, {label}: seconds"]["value"]
        more = "" if blurred is None else f"; {blurred['value']:.3f} to the density with noise"
        return (
            f"{found['value']:.3f} +- {found['error']:.3f}{more} ({found['kind']}, {seconds:.0f} s)"
        )

    truths_ = {name: recipe.metrics.get(f"{name}, true density: test NLL") for name in TOYS}
    names = [*(name for name, truth in truths_.items() if truth), "weights"]
    truths = [
        f"{truth['value']:.3f} +- {truth['error']:.3f} (exact)"
        for truth in truths_.values()
        if truth
    ]
    rows = [["objective", *names], ["---"] * (len(names) + 1), ["true density", *truths, "0.100"]]
    rows += [[label, *(cell(label, name) for name in names)] for label in ENTRIES]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    recipe.text("toy2d.md", text)


def main(
    only: tuple[str, ...] = (),
    size: int = 8192,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train and judge.

    Args:
        only: names of data sets (including "weights") and of objectives; without a name of a kind,
            all of that kind.
        size: training points; 20,000 others are test points.
        seed: of data, weights and noise.
        quick: a few steps of a few objectives on two data sets.
        out: folder of metrics.json and the figure; None is runs/toy2d.
        progress: show progress; None shows that of what takes longer than a second.
    """
    if unknown := [name for name in only if name not in (*TOYS, *ENTRIES, "weights")]:
        raise ValueError(f"only takes {', '.join([*TOYS, 'weights', *ENTRIES])}, got {unknown}")
    recipe = Recipe("toy2d", out, seed, only=only, size=size, quick=quick)
    sets, labels = (
        [name for name in (*TOYS, "weights") if name in only],
        [name for name in ENTRIES if name in only],
    )
    sets = sets or (["moons", "weights"] if quick else [*TOYS, "weights"])
    labels = labels or (["likelihood", "denoising", "NCE"] if quick else [*ENTRIES])
    share = 0.01 if quick else 1.0
    everywhere = [label for label in labels if label in only or not ENTRIES[label].costly]
    if plan := {
        name: labels if name == "moons" else everywhere for name in sets if name != "weights"
    }:
        toys(recipe, plan, size, share, progress)
    if "weights" in sets:
        weights(recipe, labels, size, share, progress)
    table(recipe)
    recipe.write()


if __name__ == "__main__":
    run(main)
