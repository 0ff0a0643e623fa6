"""Discriminator-driven latent sampling of a GAN (Che et al., 2020): N(0, I) exp(d(G(z))).

The data are eight normal modes on a ring with unequal weights, so that exact answers are known. The
recipe measures the mode weights, the energy distance to new data, and the fraction of draws within
three standard deviations of a mode, before and after. The error of the mode weights decreases to a
third. About 9 minutes.

python -m models.tilting [--seed N] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.recipe import Recipe, run
from pyroebm import HMC, MALA, MCMC, NUTS
from pyroebm.core import Progress, seeded_generator
from pyroebm.diagnostics import energy_distance
from pyroebm.energies import Tilted
from pyroebm.flows import NICE
from pyroebm.kernels import Kernel, LocalGlobalMixture
from pyroebm.nn import mlp
from pyroebm.targets import Gaussian

SIGMA = 0.15
ANGLES = 2.0 * math.pi * torch.arange(8) / 8
CENTERS = 2.0 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WEIGHTS = torch.tensor([0.2, 0.05, 0.2, 0.05, 0.2, 0.05, 0.2, 0.05])
#: With local moves most chains stay in their first mode. Independent proposals from N(0, I) with a
#: Metropolis correction move them between modes.
KERNELS: dict[str, Kernel[Any]] = {
    "MALA": MALA(),
    "HMC": HMC(num_steps=8),
    "NUTS": NUTS(),
    "HMC with global moves": LocalGlobalMixture(
        HMC(num_steps=8), NICE(2, num_layers=0, shift=False, dtype=torch.float64), every=5
    ),
}


def data(n: int, generator: torch.Generator) -> Tensor:
    """Draw from the eight normal modes."""
    modes = torch.multinomial(WEIGHTS.float(), n, replacement=True, generator=generator)
    return (CENTERS[modes] + SIGMA * torch.randn(n, 2, generator=generator)).to(
        torch.get_default_dtype()
    )


class GAN:
    """A generator with two latent variables and its discriminator.

    They are trained by the non-saturating losses (Goodfellow et al., 2014).

    Args:
        seed: of weights and training.
        batch: size of the batches.
    """

    def __init__(self, seed: int, batch: int = 256) -> None:
        self.noise, self.batch = seeded_generator(seed), batch
        self.generate = mlp(2, 2, (64, 64), zero_last=False, generator=self.noise)
        self.discriminator = mlp(2, 1, (128, 128), zero_last=False, generator=self.noise)

    def train(self, steps: int, finish: int, progress: bool | None) -> None:
        """Train both for ``steps``, then the discriminator alone for ``finish`` steps.

        At the end the discriminator estimates the log-ratio of the two densities.
        """
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.9))
            for net in (self.discriminator, self.generate)
        ]
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], steps + finish)
        with Progress(steps + finish, "GAN", show=progress) as shown:
            for step in range(steps + finish):
                with torch.no_grad():
                    fake = self.generate(self.latents(self.batch))
                self._step(
                    optimizers[0],
                    (
                        softplus(-self.discriminator(data(self.batch, self.noise)))
                        + softplus(self.discriminator(fake))
                    ).mean(),
                )
                if step < steps:
                    self._step(
                        optimizers[1],
                        softplus(
                            -self.discriminator(self.generate(self.latents(self.batch)))
                        ).mean(),
                    )
                slower.step()
                shown.update()
        for net in (self.discriminator, self.generate):
            net.requires_grad_(False)

    def latents(self, n: int) -> Tensor:
        """Draw latent variables from N(0, I)."""
        return torch.randn(n, 2, generator=self.noise)

    def tilted(self) -> Tilted:
        """Return N(0, I) tilted by the discriminator, as an energy of the latent variables."""
        return Tilted(
            Gaussian(torch.zeros(2)), Minus(nn.Sequential(self.generate, self.discriminator))
        )

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Minus(nn.Module):
    """The output of a network with its sign changed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative output."""
        return -self.net(x)


def sample_quality(x: Tensor, weight: Tensor | None = None) -> dict[str, float]:
    """Return the error of the mode weights and the fraction of points near a mode.

    Args:
        x: points.
        weight: of the points; None is equal weights.
    """
    weight = torch.full((len(x),), 1.0 / len(x)) if weight is None else weight
    away, nearest = torch.cdist(x, CENTERS.to(x)).min(1)
    near = away < 3.0 * SIGMA
    masses = torch.zeros(8).index_add(0, nearest[near], weight[near])
    return {
        "total variation of mode weights": float(
            0.5 * (masses / masses.sum() - WEIGHTS).abs().sum()
        ),
        "share within 3 sigma": float(weight[near].sum()),
    }


def on_a_grid(gan: GAN, tilted: Tilted | None, points: int = 601) -> dict[str, float]:
    """Compute the same by a sum over latent variables, as a perfect sampler would give.

    Args:
        gan: the GAN.
        tilted: the tilted density; None is N(0, I).
        points: grid points on an axis.
    """
    axis = torch.linspace(-5.0, 5.0, points)
    z = torch.cartesian_prod(axis, axis)
    energy = 0.5 * (z**2).sum(1) if tilted is None else tilted(z)
    return sample_quality(gan.generate(z), torch.softmax(-energy, 0))


def main(
    seeds: int = 3,
    steps: int = 2000,
    finish: int = 2000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Train, tilt, sample, over several seeds.

    Args:
        seeds: GANs trained.
        steps: of generator and discriminator, on batches of 256.
        finish: further steps of the discriminator alone.
        seed: the first of the seeds.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json and the figure; None is runs/tilting.
        progress: show progress; None shows that of what takes longer than a second.
    """
    if quick:
        seeds = 1
        steps = 60
        finish = 30
    recipe = Recipe("tilting", out, seed, seeds=seeds, steps=steps, finish=finish, quick=quick)
    n, chains = (500, 50) if quick else (4000, 400)
    found = defaultdict[str, list[float]](list)
    for number in range(seed, seed + seeds):
        gan = GAN(number)
        gan.train(steps, finish, progress)
        tilted, fresh = gan.tilted(), data(n, gan.noise)
        draws = {"data": data(n, gan.noise), "GAN": gan.generate(gan.latents(n))}
        for name, kernel in KERNELS.items():
            mcmc = MCMC(
                kernel,
                num_samples=n // chains,
                warmup_steps=20 if quick else 200,
                num_chains=chains,
                seed=number,
                progress=False,
            )
            mcmc.run(tilted)
            draws[f"tilted, {name}"] = gan.generate(
                mcmc.get_samples(group_by_chain=True)["x"].reshape(-1, 2)
            )
        for name, x in draws.items():
            for key, value in (
                sample_quality(x) | {"energy distance": energy_distance(x, fresh).value}
            ).items():
                found[f"{name}: {key}"].append(value)
        for name, energy in (("GAN", None), ("tilted", tilted)):
            for key, value in on_a_grid(gan, energy).items():
                found[f"{name}, by a sum over latents: {key}"].append(value)
    for key, values in found.items():
        spread = torch.tensor(values).std() / seeds**0.5 if seeds > 1 else None
        recipe.add(key, sum(values) / seeds, spread, "estimate", f"over {seeds} seeds")

    fig, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    shown = {
        "data": fresh,
        "GAN": draws["GAN"],
        "tilted by its discriminator": draws["tilted, HMC with global moves"],
    }
    for ax, (title, x) in zip(axes, shown.items(), strict=False):
        ax.plot(*x[:2000].mT.numpy(), ".", markersize=1.5)
        ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    axis = torch.linspace(-3.0, 3.0, 201)
    log_density = -tilted(torch.cartesian_prod(axis, axis)).reshape(201, 201).mT
    axes[3].pcolormesh(
        axis.numpy(),
        axis.numpy(),
        (log_density - log_density.max()).clamp(min=-8.0).numpy(),
        rasterized=True,
    )
    axes[3].set(title="log-density of the latent variables (8 nats)", aspect="equal")
    recipe.figure("tilting", fig)
    recipe.write()


if __name__ == "__main__":
    run(main)
