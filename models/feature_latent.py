"""Bits over deep features, E(x, h) = x'x + h'W f(x) - c'h - b'x: exact on two moons in 2-D, then on digits. About 4 minutes.

On the moons the likelihood is exact by quadrature, and so is its gradient: it is held to the two expectations that training uses,
by a sum over a grid and from NUTS draws. On digits log Z is bracketed by annealing, and the bits are judged as a code.

python -m models.feature_latent [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.recipe import Kind, Recipe, run
from pyroebm import HMC, MALA, MCMC, NUTS
from pyroebm.datasets import digits
from pyroebm.energies import FeatureLatentEnergy
from pyroebm.networks import mlp
from pyroebm.objectives import PersistentCD
from pyroebm.partition import bracket, quadrature
from pyroebm.plotting import plot_images
from pyroebm.randomness import seeded_generator
from pyroebm.targets import Gaussian
from pyroebm.training import fit

AXIS = torch.linspace(-4.0, 4.0, 201, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)
#: Standard deviation of the noise on pixels between 0 and 1, and what stands for one of them in the units of the energy.
NOISE, PIXEL = 0.1, 2.0


def moons(n: int, seed: int) -> Tensor:
    """Scikit-learn's two moons, centred and scaled to a largest variance of 1."""
    x = torch.from_numpy(make_moons(n, noise=0.1, random_state=seed)[0])
    return ((x - torch.tensor([0.5, 0.25])) / 0.87).to(torch.get_default_dtype())


def train(
    data: Tensor, objective: PersistentCD, num_hidden: int, width: int, steps: int, rate: float, seed: int, progress: bool | None
) -> FeatureLatentEnergy:
    """Adam with a rate that falls to 0; the chains start at data."""
    d, noise = data.shape[1], seeded_generator(seed)
    features = mlp(d, width, (width,), activation="tanh", zero_last=False, dtype=data.dtype, generator=noise)
    energy = FeatureLatentEnergy(features, (d,), num_hidden, generator=noise)
    objective.chains = data[torch.randperm(len(data), generator=noise)[: objective.num_chains]].clone()
    optimizer, schedule = functools.partial(torch.optim.Adam, lr=rate), functools.partial(CosineAnnealingLR, T_max=steps)
    loop = fit(
        energy, objective, data, steps=steps, batch_size=200, optimizer=optimizer, schedule=schedule, max_grad_norm=10.0,
        seed=seed, progress=progress,
    )  # fmt: skip
    for _ in loop:
        pass
    return energy


def flat_grad(energy: FeatureLatentEnergy, value: Tensor) -> Tensor:
    """Of all parameters: theta, W, b and c."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(energy.parameters()))])


def gradients(energy: FeatureLatentEnergy, data: Tensor, draws: Tensor) -> dict[str, float]:
    """E_{p(x, h)}[dE] - mean E_{p(h | x_i)}[dE], with the model's x summed over a grid and drawn, against autograd."""
    cell = 2.0 * math.log(float(AXIS[1] - AXIS[0]))
    exact = flat_grad(energy, -energy(data).mean() - torch.logsumexp(-energy(GRID), 0) - cell)
    with torch.no_grad():
        p = torch.softmax(-energy(GRID), 0)
    summed = flat_grad(energy, p @ energy.expected_energy(GRID) - energy.expected_energy(data).mean())
    drawn = flat_grad(energy, energy.expected_energy(draws).mean() - energy.expected_energy(data).mean())
    return {
        "gradient, by a sum: relative error": float((summed - exact).norm() / exact.norm()),
        "gradient, by NUTS: cosine": float(torch.cosine_similarity(drawn, exact, dim=0)),
    }


def in_two_dimensions(recipe: Recipe, seeds: int, steps: int, quick: bool, progress: bool | None) -> tuple[Tensor, Tensor]:
    """Two moons over several seeds: exact likelihoods and gradients. The last one's density on the grid, and its draws."""
    found = defaultdict[str, list[float]](list)
    for number in range(recipe.seed, recipe.seed + seeds):
        data, test = moons(4000, number).double(), moons(4000, number + 1000).double()
        normal = torch.distributions.MultivariateNormal(data.mean(0), torch.cov(data.mT))
        chains = PersistentCD(400, k=1, kernel=HMC(step_size=0.15, num_steps=8))
        energy = train(data, chains, 16, 64, steps, 5e-3, number, progress)
        log_z = quadrature(energy, tolerance=1e-6).value
        samples, warm, num_chains = (10, 20, 16) if quick else (50, 200, 64)
        mcmc = MCMC(NUTS(), num_samples=samples, warmup_steps=warm, num_chains=num_chains, seed=number, progress=False)
        mcmc.run(energy)
        draws = mcmc.get_samples(group_by_chain=True)["x"].reshape(-1, 2)
        early = train(data, PersistentCD(400, kernel=chains.kernel), 16, 64, steps // 20, 5e-3, number, progress)
        mcmc.run(early)  # a gradient that is not yet almost 0
        numbers = gradients(early, data, mcmc.get_samples(group_by_chain=True)["x"].reshape(-1, 2))
        numbers["test NLL"] = float(energy(test).mean().detach()) + log_z
        numbers["test NLL of a normal law"] = -float(normal.log_prob(test).mean())
        for key, value in numbers.items():
            found[key].append(value)
    for key, values in found.items():
        error = torch.tensor(values).std() / seeds**0.5 if seeds > 1 else None
        recipe.add(f"moons: {key}", sum(values) / seeds, error, "estimate" if "NUTS" in key else "exact", f"over {seeds} seeds")
    with torch.no_grad():
        return (-energy(GRID) - log_z).exp().reshape(len(AXIS), -1).mT, draws


def on_digits(recipe: Recipe, steps: int, num_hidden: int, quick: bool, progress: bool | None) -> tuple[Tensor, Tensor]:
    """Digits with noise: a bracket of the likelihood, the bits as a code. Images of the chains, mean bits of test images."""
    split, noise = digits(threshold=None, dtype=torch.float32), seeded_generator(recipe.seed, spawned=1)
    centre = split.train.mean(0)

    def scaled(x: Tensor) -> Tensor:
        return PIXEL * (x + NOISE * torch.randn(x.shape, generator=noise, dtype=x.dtype) - centre)

    data, test = scaled(split.train.repeat(20, 1)), scaled(split.test)
    chains = PersistentCD(100, k=5 if quick else 20, kernel=MALA(0.8 * NOISE * PIXEL))
    energy = train(data, chains, num_hidden, 128, steps, 2e-3, recipe.seed, progress).requires_grad_(False)
    base = Gaussian(data.mean(0), covariance=torch.cov(data.mT))
    found = bracket(energy, chains.chains, base, betas=20 if quick else 500, num_chains=100, seed=recipe.seed, progress=False)
    units = 64 * math.log(PIXEL)  # of density per pixel, not per scaled one
    normal = torch.distributions.MultivariateNormal(data.mean(0), torch.cov(data.mT))
    recipe.add_mean("digits: log-likelihood of a normal law, test", normal.log_prob(test) + units, "exact")
    # a log Z that is low on average makes the likelihood high, and the other way around
    for name, log_z in (("AIS", found.forward), ("reverse AIS", found.reverse)):
        value = units - float(energy(test).mean()) - log_z.value
        kind: Kind = "upper" if log_z.kind == "lower" else "estimate"
        recipe.add(f"digits: log-likelihood, test, {name}", value, log_z.standard_error, kind)
    pixels = scaled(split.train), test
    bits = energy.hidden_given(pixels[0]).mean, energy.hidden_given(test).mean
    for name, codes in {"bits": bits, "pixels": pixels}.items():
        probe = LogisticRegression(max_iter=2000).fit(codes[0].numpy(), split.train_labels.numpy())
        recipe.add(f"digits: test accuracy of a linear probe, {name}", probe.score(codes[1].numpy(), split.test_labels.numpy()))
    return chains.chains / PIXEL + centre, bits[1]


def main(
    seeds: int = 3, steps: int = 1500, num_hidden: int = 64, digit_steps: int = 1000, seed: int = 0, quick: bool = False,
    out: Path | None = None, progress: bool | None = None,
) -> None:  # fmt: skip
    """Train and judge on both data sets.

    Args:
        seeds: trainings on the moons.
        steps: of the optimizer on the moons, on batches of 200.
        num_hidden: bits on digits.
        digit_steps: of the optimizer on digits.
        seed: the first of the seeds.
        quick: a few steps only, to see that everything runs.
        out: folder of metrics.json and the figure; runs/feature_latent without.
        progress: show bars; on a terminal without.
    """
    if quick:
        seeds, steps, digit_steps = 1, 40, 20
    recipe = Recipe(
        "feature_latent", out, seed, seeds=seeds, steps=steps, num_hidden=num_hidden, digit_steps=digit_steps, quick=quick
    )
    density, draws = in_two_dimensions(recipe, seeds, steps, quick, progress)
    images, bits = on_digits(recipe, digit_steps, num_hidden, quick, progress)

    fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    axes[0].pcolormesh(AXIS, AXIS, density, rasterized=True)
    axes[0].set(title="exp(-F(x)) / Z", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    axes[1].plot(*draws[:3000].mT, ".", markersize=1.5)
    axes[1].set(title="draws (NUTS)", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    plot_images(images[:64], (8, 8), ax=axes[2]).set_title("digits: persistent chains")
    axes[3].hist(bits.flatten().numpy(), bins=50)
    axes[3].set(title="digits: p(h = 1 | x) on test images", xlabel="p", yscale="log")
    recipe.figure("feature_latent", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
