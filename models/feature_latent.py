"""Bits over deep features: two moons .04 nats from their law by PCD, digits 5 nats above a normal
law. 1.5 minutes.

E(x, h) = x'x + h'W f(x) - c'h - b'x. Data are whitened so that e^{-x'x} is their normal law, and
the features start at 0: training starts from that law. On the moons the likelihood is exact by
quadrature, and so is its gradient: it is held to the two expectations that training uses, by a sum
over a grid and from NUTS draws. On digits log Z is bracketed by annealing, and the bits are judged
as a code.

python -m models.feature_latent [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.plane import GridLikelihood
from models.recipe import Kind, Recipe, run
from pyroebm import HMC, MCMC, NUTS
from pyroebm.core import seeded_generator
from pyroebm.data import digits
from pyroebm.diagnostics import energy_distance
from pyroebm.diagnostics.plots import plot_images
from pyroebm.energies import FeatureLatentEnergy
from pyroebm.nn import mlp
from pyroebm.objectives import Objective, PersistentCD, ReplayBufferCD
from pyroebm.partition import bidirectional_ais, quadrature
from pyroebm.targets import Gaussian, TwoMoons
from pyroebm.training import fit

AXIS = torch.linspace(-3.0, 3.0, 201, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)
#: Standard deviation of the noise on pixels between 0 and 1.
NOISE = 0.1


class Whitening:
    """The affine map from data to what the energy sees: mean 0, covariance 1/2, for which e^{-x'x}
    is the normal law of the data.

    Without bits the energy is then that law, and with bits it can only do better.
    """

    def __init__(self, data: Tensor) -> None:
        self.mean, self.factor = data.mean(0), torch.linalg.cholesky(2.0 * torch.cov(data.mT))
        #: log |dz / dx|, by which densities of z become densities of x.
        self.log_det = -float(self.factor.diagonal().log().sum())
        self.normal = 0.5 * len(self.mean) * math.log(math.pi)  #: log Z of e^{-z'z}

    def __call__(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, (x - self.mean).mT, upper=False).mT

    def back(self, z: Tensor) -> Tensor:
        return z @ self.factor.mT + self.mean

    def log_likelihood(self, energy: FeatureLatentEnergy | None, x: Tensor, log_z: float) -> Tensor:
        """Of rows x, in their own units; of the normal law without an energy."""
        z = self(x)
        return self.log_det - log_z - ((z * z).sum(1) if energy is None else energy(z).detach())


def features(
    d: int, width: int, scale: float, dtype: torch.dtype, generator: torch.Generator
) -> nn.Sequential:
    """A perceptron that is 0 at first; the slopes of its first layer are ``scale`` times the usual,
    with thresholds all over."""
    net = mlp(d, width, (width, width), dtype=dtype, generator=generator)
    with torch.no_grad():
        net[0].weight *= scale
        net[0].bias.copy_(
            scale * math.sqrt(0.5) * torch.randn(width, dtype=dtype, generator=generator)
        )
    return net


def train(
    data: Tensor,
    objective: Objective,
    net: nn.Module,
    num_hidden: int,
    steps: int,
    rate: float,
    seed: int,
    progress: bool | None,
) -> FeatureLatentEnergy:
    """Adam with a rate that falls to 0, from the normal law on: the running mean over the last
    steps. Chains start at data."""
    noise = seeded_generator(seed)
    energy = FeatureLatentEnergy(net, data.shape[1:], num_hidden, generator=noise)
    if isinstance(objective, PersistentCD):
        objective.chains = data[
            torch.randperm(len(data), generator=noise)[: objective.num_chains]
        ].clone()
    average = AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    fit(
        energy,
        objective,
        data,
        num_steps=steps,
        batch_size=256,
        lr=rate,
        schedule="cosine",
        max_grad_norm=10.0,
        average=average,
        seed=seed,
        progress=progress,
    )
    return copy.deepcopy(average.module)


def flat_grad(energy: FeatureLatentEnergy, value: Tensor) -> Tensor:
    """Of all parameters: theta, W, b and c."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(energy.parameters()))])


def gradients(energy: FeatureLatentEnergy, data: Tensor, draws: Tensor) -> dict[str, float]:
    """E_{p(x, h)}[dE] - mean E_{p(h | x_i)}[dE], with the model's x summed over a grid and drawn,
    against autograd."""
    cell = 2.0 * math.log(float(AXIS[1] - AXIS[0]))
    exact = flat_grad(energy, -energy(data).mean() - torch.logsumexp(-energy(GRID), 0) - cell)
    with torch.no_grad():
        p = torch.softmax(-energy(GRID), 0)
    summed = flat_grad(
        energy, p @ energy.expected_energy(GRID) - energy.expected_energy(data).mean()
    )
    drawn = flat_grad(
        energy, energy.expected_energy(draws).mean() - energy.expected_energy(data).mean()
    )
    return {
        "gradient, by a sum: relative error": float((summed - exact).norm() / exact.norm()),
        "gradient, by NUTS: cosine": float(torch.cosine_similarity(drawn, exact, dim=0)),
    }


def in_two_dimensions(
    recipe: Recipe, seeds: int, steps: int, quick: bool, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """Two moons over several seeds: exact likelihoods and gradients. The last one's density on the
    grid, and its draws."""
    law, found = TwoMoons(), defaultdict[str, list[float]](list)
    for number in range(recipe.seed, recipe.seed + seeds):
        x = law.sample(12_000, seeded_generator(number, spawned=1))
        data, test = x[:8000], x[8000:]
        white, oracle = Whitening(data), float(law(test).mean())
        numbers = {
            "normal law: test NLL": -float(white.log_likelihood(None, test, white.normal).mean()),
            "oracle: test NLL": oracle,
        }

        def trained(objective: Objective, steps: int, rate: float) -> FeatureLatentEnergy:
            net = features(2, 64, 3.0, torch.float32, seeded_generator(number, spawned=2))
            x = white(data).float()
            return train(x, objective, net, 32, steps, rate, number, progress).double()

        lines = {
            "likelihood": (GridLikelihood(6.0, 40), steps // 2),
            "PCD": (ReplayBufferCD(256, kernel=HMC(0.08, num_steps=8)), steps),
        }
        for name, (objective, length) in lines.items():
            energy = trained(objective, length, 1e-2 if name == "likelihood" else 5e-3)
            log_z = quadrature(energy, tolerance=1e-5, progress=progress).value
            numbers[f"{name}: test NLL"] = -float(white.log_likelihood(energy, test, log_z).mean())
            numbers[f"{name}: above the oracle"] = numbers[f"{name}: test NLL"] - oracle
        samples, warm, num_chains = (10, 20, 16) if quick else (50, 200, 64)
        mcmc = MCMC(
            NUTS(),
            num_samples=samples,
            warmup_steps=warm,
            num_chains=num_chains,
            seed=number,
            progress=False,
        )
        mcmc.run(energy)
        draws = white.back(mcmc.get_samples(group_by_chain=True)["x"].reshape(-1, 2))
        numbers["PCD: energy distance, NUTS draws to test"] = energy_distance(draws, test).value
        # a gradient that is not yet almost 0
        early = trained(GridLikelihood(6.0, 40), max(2, steps // 40), 1e-2)
        mcmc.run(early)
        numbers |= gradients(
            early, white(data), mcmc.get_samples(group_by_chain=True)["x"].reshape(-1, 2)
        )
        for key, value in numbers.items():
            found[key].append(value)
    for key, values in found.items():
        error = torch.tensor(values).std() / seeds**0.5 if seeds > 1 else None
        recipe.add(
            f"moons, {key}",
            sum(values) / seeds,
            error,
            "estimate" if "NUTS" in key else "exact",
            f"over {seeds} seeds",
        )
    with torch.no_grad():
        return (-energy(GRID) - log_z).exp().reshape(len(AXIS), -1).mT, white(draws)


def on_digits(
    recipe: Recipe, steps: int, num_hidden: int, quick: bool, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """Digits with noise: a bracket of the likelihood, the bits as a code. Images of the chains,
    mean bits of test images."""
    split, noise = (
        digits(threshold=None, dtype=torch.float32),
        seeded_generator(recipe.seed, spawned=1),
    )

    def noised(x: Tensor) -> Tensor:
        return x + NOISE * torch.randn(x.shape, generator=noise, dtype=x.dtype)

    data = noised(split.train.repeat(20, 1))
    train_once = noised(split.train)
    test = noised(split.test)
    white = Whitening(data)
    chains = ReplayBufferCD(100, k=1 if quick else 2, kernel=HMC(0.15, num_steps=10))
    net = features(64, 128, 1.0, data.dtype, noise)
    energy = train(
        white(data), chains, net, num_hidden, steps, 3e-3, recipe.seed, progress
    ).requires_grad_(False)
    base = Gaussian(torch.zeros_like(white.mean), covariance=0.5 * torch.eye(64, dtype=data.dtype))
    found = bidirectional_ais(
        energy,
        chains.chains,
        base,
        betas=20 if quick else 300,
        num_chains=100,
        generator=torch.Generator().manual_seed(recipe.seed),
        progress=False,
    )
    recipe.add_mean(
        "digits: log-likelihood of the normal law, test",
        white.log_likelihood(None, test, white.normal),
        "exact",
    )
    # a log Z that is low on average makes the likelihood high, and the other way around
    for name, log_z in (("AIS", found.forward), ("reverse AIS", found.reverse)):
        kind: Kind = "upper" if log_z.kind == "lower" else "estimate"
        for part, x in (("test", test), ("train", train_once)):
            value = float(white.log_likelihood(energy, x, log_z.value).mean())
            recipe.add(f"digits: log-likelihood, {part}, {name}", value, log_z.standard_error, kind)
    bits = energy.hidden_given(white(train_once)).mean, energy.hidden_given(white(test)).mean
    for name, codes in {"bits": bits, "pixels": (train_once, test)}.items():
        probe = LogisticRegression(max_iter=2000).fit(codes[0].numpy(), split.train_labels.numpy())
        recipe.add(
            f"digits: test accuracy of a linear probe, {name}",
            probe.score(codes[1].numpy(), split.test_labels.numpy()),
        )
    return white.back(chains.chains), bits[1]


def main(
    seeds: int = 3,
    steps: int = 1000,
    num_hidden: int = 64,
    digit_steps: int = 800,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train and judge on both data sets.

    Args:
        seeds: trainings on the moons.
        steps: of the optimizer on the moons by PCD, on batches of 256; half of them by the exact
            likelihood.
        num_hidden: bits on digits.
        digit_steps: of the optimizer on digits.
        seed: the first of the seeds.
        quick: a few steps only, to see that everything runs.
        out: folder of metrics.json and the figure; runs/feature_latent without.
        progress: show progress; by default of what takes longer than a second.
    """
    if quick:
        seeds = 1
        steps = 40
        digit_steps = 20
    recipe = Recipe(
        "feature_latent",
        out,
        seed,
        seeds=seeds,
        steps=steps,
        num_hidden=num_hidden,
        digit_steps=digit_steps,
        quick=quick,
    )
    density, draws = in_two_dimensions(recipe, seeds, steps, quick, progress)
    images, bits = on_digits(recipe, digit_steps, num_hidden, quick, progress)

    fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    axes[0].pcolormesh(AXIS.numpy(), AXIS.numpy(), density.numpy(), rasterized=True)
    axes[0].set(title="exp(-F(x)) / Z, whitened moons", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    axes[1].plot(*draws[:3000].mT.numpy(), ".", markersize=1.5)
    axes[1].set(title="draws (NUTS)", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    plot_images(images[:64], (8, 8), ax=axes[2]).set_title("digits: persistent chains")
    axes[3].hist(bits.flatten().numpy(), bins=50)
    axes[3].set(title="digits: p(h = 1 | x) on test images", xlabel="p", yscale="log")
    recipe.figure("feature_latent", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
