"""Two-dimensional toys by every objective, judged by exact log Z: two moons within 0.05 nats of the
truth. About 15 minutes.

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


class Law(NamedTuple):
    """A law, the side of the square about 0 that holds it, and the width of its noise, by which
    steps and noises are scaled."""

    make: Callable[..., Target]
    side: float
    width: float


LAWS = {
    "moons": Law(TwoMoons, 6.0, 0.1),
    "8 Gaussians": Law(eight_gaussians, 10.0, 0.35),
    "checkerboard": Law(Checkerboard, 12.0, 0.3),
    "two spirals": Law(TwoSpirals, 10.0, 0.1),
    "rings": Law(Circles.rings, 9.0, 0.08),
    "pinwheel": Law(Pinwheel, 11.0, 0.2),
}
PAIR = Law(
    functools.partial(GaussianMixture, [[-3.0, 0.0], [3.0, 0.0]], scale=0.5, weights=[0.9, 0.1]),
    12.0,
    0.5,
)

TEST_SIZE = 20_000


def flow(data: Tensor, couplings: int) -> Flow:
    """Affine couplings that take turns, from a normal law somewhat wider than the data; of the
    data's dtype."""
    parts: list[Any] = []
    for _ in range(couplings):
        parts += [affine_coupling(2, hidden_dims=[64, 64]), Permute(torch.tensor([1, 0]))]
    wide = LowerCholeskyAffine(data.mean(0), 1.2 * torch.linalg.cholesky(data.mT.cov()))
    return Flow([*parts, wide], 2, 2).to(data.dtype)


def jumps(law: Law, data: Tensor) -> LocalGlobalMixture:
    """Three Langevin steps within a mode, then a proposal from anywhere: chains see whatever mass
    the energy has, and where."""
    return LocalGlobalMixture(MALA(1.5 * law.width), flow(data, 0), every=3)


def vera(law: Law, data: Tensor) -> VERA:
    """Against a perceptron with noise."""
    return VERA(MLPGenerator((2,), latent_dim=2, sigma=0.3, dtype=data.dtype), eta=0.5)


class Line(NamedTuple):
    """An objective of a law and its data, how long each of its players is trained, and the noise in
    the law that it fits."""

    make: Callable[[Law, Tensor], Objective]
    steps: int
    rates: Mapping[str, float] = MappingProxyType({"energy": 1e-2})
    momentum: float = 0.9
    noise: float = 0.0  # in widths
    # why it does not learn the weights of modes far apart, as measured; else it does
    blind: str = ""
    costly: bool = False  # left out, unless it is asked for, on all but moons and the weights


STAY = "its chains do not cross between the modes"
SCORE = "the score does not see weights across emptiness"
LOST = "as good as the law it plays against, which lost a mode"

LINES = {
    "likelihood": Line(lambda law, data: GridLikelihood(law.side, 48), 1500),
    "CD-10": Line(
        lambda law, data: ContrastiveDivergence(10, MALA(1.5 * law.width)),
        1000,
        {"energy": 1e-3},
        blind=STAY,
    ),
    "PCD-10": Line(
        lambda law, data: ReplayBufferCD(256, 10, MALA(1.5 * law.width), restart=0.05),
        2000,
        {"energy": 2e-3},
        0.0,
        blind=STAY,
    ),
    "PCD, jumps": Line(
        lambda law, data: ReplayBufferCD(256, 1, jumps(law, data)), 3000, {"energy": 2e-2}
    ),
    "score": Line(lambda law, data: ScoreMatching(), 1500, blind=SCORE),
    "sliced": Line(lambda law, data: SlicedScoreMatching(), 1500, blind=SCORE),
    "denoising": Line(
        lambda law, data: DenoisingScoreMatching(0.5 * law.width), 2000, noise=0.5, blind=SCORE
    ),
    "NCE": Line(lambda law, data: NoiseContrastive(gaussian_noise(data, 1.2), nu=4.0), 1500),
    "ranking": Line(lambda law, data: RankingNCE(gaussian_noise(data, 1.2), 4), 1500),
    "conditional": Line(lambda law, data: ConditionalNCE(6.0 * law.width, 4), 1500),
    "flow NCE": Line(
        lambda law, data: FlowContrastive(flow(data, 6)),
        2000,
        {"energy": 3e-3, "flow": 1e-3},
        blind=LOST,
        costly=True,
    ),
    "flow adversary": Line(
        lambda law, data: AdversarialFlow(flow(data, 6)),
        2500,
        {"energy": 3e-3, "generator": 3e-3},
        0.5,
        blind=LOST,
        costly=True,
    ),
    "VERA": Line(
        vera,
        1500,
        {"energy": 3e-4, "generator": 3e-3, "posterior": 1e-2},
        0.5,
        blind=LOST,
        costly=True,
    ),
}


def train(
    line: Line, law: Law, data: Tensor, steps: int, seed: int, progress: bool | None
) -> Energy:
    """A perceptron of 2-128-128-1 by one objective, in float32: its running mean over the last
    steps, in float64."""
    torch.manual_seed(seed)  # of flows and generators
    data = data.float()
    generator = torch.Generator().manual_seed(seed)
    energy = MLPEnergy(
        (2,), hidden_sizes=(128, 128), scale=1.0, dtype=torch.float32, generator=generator
    )
    energy.fit_envelope(data)
    average = AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(1.0 - min(0.5, 20.0 / steps)))
    adam = functools.partial(torch.optim.Adam, betas=(line.momentum, 0.999), fused=True)
    optimizers = {player: functools.partial(adam, lr=rate) for player, rate in line.rates.items()}
    fit(
        energy,
        line.make(law, data),
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


class Sight:
    """A law on a grid over its square: its density, also with noise, and what is to be compared
    with it."""

    def __init__(self, law: Law, points: int) -> None:
        step = law.side / points
        self.axis = (torch.arange(points, dtype=torch.float64) + 0.5) * step - 0.5 * law.side
        self.x = torch.cartesian_prod(self.axis, self.axis)
        self.density = torch.exp(-law.make()(self.x)).reshape(points, points)
        self.area = step * step

    def blurred(self, noise: float) -> Tensor:
        """The density of a draw with normal noise of that deviation."""
        if noise == 0.0:
            return self.density
        kernel = torch.softmax(-0.5 * ((self.axis[:, None] - self.axis) / noise) ** 2, 0)
        return kernel @ self.density @ kernel.mT

    def divergence(self, noise: float, log_model: Tensor) -> Tensor:
        """KL(law with noise || model), by a sum over the grid."""
        p = self.blurred(noise)
        terms = torch.where(p > 0.0, p * (p.log() - log_model.reshape(p.shape)), 0.0)
        return terms.sum() / p.sum()


def judge(
    recipe: Recipe,
    key: str,
    energy: Energy,
    line: Line,
    law: Law,
    sight: Sight,
    test: Tensor,
    progress: bool | None,
) -> Tensor:
    """Exact test NLL and divergences; the model's log density on the grid."""
    log_z = quadrature(energy, tolerance=1e-5, progress=progress)
    log_model = -energy(sight.x) - log_z.value
    nll, oracle = energy(test) + log_z.value, law.make()(test)
    recipe.add_mean(f"{key}: test NLL", nll, log_z.kind)
    recipe.add_mean(f"{key}: above the oracle", nll - oracle, log_z.kind, "on the same points")
    recipe.add(f"{key}: KL", sight.divergence(0.0, log_model), kind=log_z.kind)
    if line.noise:
        sigma = line.noise * law.width
        recipe.add(
            f"{key}: KL to the law it fits",
            sight.divergence(sigma, log_model),
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
    """Every law by the objectives that are planned for it."""
    laws, lines = (
        list(plan),
        [label for label in LINES if any(label in planned for planned in plan.values())],
    )
    fig, axes = plt.subplots(
        len(laws),
        1 + len(lines),
        figsize=(1.7 * (1 + len(lines)), 1.8 * len(laws)),
        layout="constrained",
        squeeze=False,
    )
    for row, name in enumerate(laws):
        law = LAWS[name]
        draws = law.make().sample(size + TEST_SIZE, torch.Generator().manual_seed(recipe.seed))
        data, test = draws[:size], draws[size:]
        sight = Sight(law, 240)
        recipe.add(
            f"{name}, oracle: entropy",
            -torch.xlogy(sight.density, sight.density).sum() * sight.area,
            kind="exact",
        )
        recipe.add_mean(f"{name}, oracle: test NLL", law.make()(test), "exact")
        top = float(sight.density.quantile(0.995))
        show(axes[row, 0], sight, sight.density, top, "oracle" if row == 0 else "", "")
        axes[row, 0].set_ylabel(name)
        for column, label in enumerate(lines, 1):
            if label not in plan[name]:
                axes[row, column].set_visible(False)
                continue
            line, began = LINES[label], time.process_time()
            energy = train(
                line, law, data, max(2, round(share * line.steps)), recipe.seed, progress
            )
            seconds = time.process_time() - began
            log_model = judge(recipe, f"{name}, {label}", energy, line, law, sight, test, progress)
            recipe.add(
                f"{name}, {label}: seconds", seconds, kind="estimate", note="of one processor"
            )
            gap = recipe.metrics[f"{name}, {label}: above the oracle"]["value"]
            show(
                axes[row, column],
                sight,
                log_model.exp(),
                top,
                label if row == 0 else "",
                f"+{gap:.3f} nats",
            )
    recipe.figure("toy2d", fig)


def show(ax: plt.Axes, sight: Sight, density: Tensor, top: float, title: str, label: str) -> None:
    """A density as a picture."""
    half = float(-sight.axis[0])
    picture = density.reshape(len(sight.axis), -1).mT.numpy()
    ax.imshow(
        picture, origin="lower", extent=(-half, half, -half, half), vmin=0.0, vmax=top, cmap="magma"
    )
    ax.set(xticks=[], yticks=[], xlabel=label)
    ax.set_title(title, fontsize=10)


def weights(
    recipe: Recipe, lines: Sequence[str], size: int, share: float, progress: bool | None
) -> None:
    """Two Gaussians of weights 0.9 and 0.1: the mass that each objective gives to the lighter."""
    data = PAIR.make().sample(size, torch.Generator().manual_seed(recipe.seed))
    seen = (data[:, 0] > 0).double()
    recipe.add_mean("weights, data: the lighter", seen, "estimate", "the truth is 0.1")
    masses = {}
    for label in lines:
        line = LINES[label]
        energy = train(line, PAIR, data, max(2, round(share * line.steps)), recipe.seed, progress)
        mass, change = expectation(
            energy,
            lambda x: (x[:, 0] > 0).double(),
            [(-10.0, 10.0)] * 2,
            tolerance=1e-5,
            progress=progress,
        )
        kind: Kind = "exact" if change <= 1e-4 else "estimate"
        masses[label] = (
            recipe.add(f"weights, {label}: the lighter", mass, change, kind, line.blind),
            float("nan"),
        )
    ax = plot_mode_masses(masses, truth=0.1, label="mass of the lighter of two Gaussians")
    recipe.figure("weights", ax.get_figure())


def table(recipe: Recipe) -> None:
    """All of it in one table, ``toy2d.md``: nats of test NLL above the oracle, seconds in brackets;
    NOT RUN is said."""

    def cell(label: str, name: str) -> str:
        if name == "weights":
            found = recipe.metrics.get(f"weights, {label}: the lighter")
            return "not run" if found is None else f"{found['value']:.3f}"
        found, blurred = (
            recipe.metrics.get(f"{name}, {label}: {what}")
            for what in ("above the oracle", "KL to the law it fits")
        )
        if found is None:
            return "not run"
        seconds = recipe.metrics[f"{name}, {label}: seconds"]["value"]
        more = "" if blurred is None else f"; {blurred['value']:.3f} to the noised law"
        return (
            f"{found['value']:.3f} +- {found['error']:.3f}{more} ({found['kind']}, {seconds:.0f} s)"
        )

    oracles = {name: recipe.metrics.get(f"{name}, oracle: test NLL") for name in LAWS}
    names = [*(name for name, oracle in oracles.items() if oracle), "weights"]
    truths = [
        f"{oracle['value']:.3f} +- {oracle['error']:.3f} (exact)"
        for oracle in oracles.values()
        if oracle
    ]
    rows = [["objective", *names], ["---"] * (len(names) + 1), ["oracle", *truths, "0.100"]]
    rows += [[label, *(cell(label, name) for name in names)] for label in LINES]
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
        only: names of data sets ("weights" among them) and of objectives; none of a kind means all
            of it.
        size: draws to train on; 20,000 others are for the test.
        seed: of data, weights and noise.
        quick: a few steps of a few objectives on two laws.
        out: folder of metrics.json and the figure; runs/toy2d without.
        progress: show progress; by default of what takes longer than a second.
    """
    if unknown := [name for name in only if name not in (*LAWS, *LINES, "weights")]:
        raise ValueError(f"only takes {', '.join([*LAWS, 'weights', *LINES])}, got {unknown}")
    recipe = Recipe("toy2d", out, seed, only=only, size=size, quick=quick)
    sets, lines = (
        [name for name in (*LAWS, "weights") if name in only],
        [name for name in LINES if name in only],
    )
    sets = sets or (["moons", "weights"] if quick else [*LAWS, "weights"])
    lines = lines or (["likelihood", "denoising", "NCE"] if quick else [*LINES])
    share = 0.01 if quick else 1.0
    everywhere = [label for label in lines if label in only or not LINES[label].costly]
    if plan := {
        name: lines if name == "moons" else everywhere for name in sets if name != "weights"
    }:
        toys(recipe, plan, size, share, progress)
    if "weights" in sets:
        weights(recipe, lines, size, share, progress)
    table(recipe)
    recipe.write()


if __name__ == "__main__":
    run(main)
