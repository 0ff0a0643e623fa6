"""Discrete kernels, supports and their exact distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import OneHotCategorical
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, constraints
from torch.distributions.constraints import Constraint

from lib.reseed import problem_generator
from pyroebm import Energy, Gibbs
from pyroebm.core import spin
from pyroebm.core.spins import SpinBernoulli
from pyroebm.kernels import DMALA, DULA, BlockGibbs, GibbsWithGradients, Kernel

#: One line for a kernel: every test that takes ``name`` runs on it.
DISCRETE: dict[str, Callable[[], Kernel[Any]]] = {
    "gibbs": Gibbs,
    "gibbs-random": lambda: Gibbs(scan="random"),
    "block-gibbs": BlockGibbs,
    "gibbs-with-gradients": GibbsWithGradients,
    "dula": lambda: DULA(step_size=0.6),
    "dmala": lambda: DMALA(step_size=1.0),
}


EXACT = [name for name in DISCRETE if name != "dula"]


#: Support, event shape, and the values of one site.
SPACES: dict[str, tuple[Constraint, tuple[int, ...], list[list[float]]]] = {
    "bits": (constraints.boolean, (6,), [[0.0], [1.0]]),
    "spins": (spin, (6,), [[-1.0], [1.0]]),
    "spin-grid": (constraints.independent(spin, 2), (2, 3), [[-1.0], [1.0]]),
    "one-hot": (constraints.one_hot, (4, 3), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "integers": (constraints.integer_interval(-1, 2), (3,), [[-1.0], [0.0], [1.0], [2.0]]),
}


class Pairwise(Energy):
    """Random couplings of all entries, and fields.

    No two sites are alike, so no symmetry hides an error.
    """

    def __init__(self, space: str, scale: float = 0.5) -> None:
        support, shape, self.values = SPACES[space]
        super().__init__(shape, support)
        dim, generator = math.prod(shape), problem_generator(0)
        w = scale * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.register_buffer("w", 0.5 * (w + w.T))
        self.register_buffer(
            "b", scale * torch.randn(dim, generator=generator, dtype=torch.float64)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*self.batch_shape(x), -1)
        return -0.5 * ((x @ self.w) * x).sum(-1) - x @ self.b

    def states(self) -> Tensor:
        width = len(self.values[0])
        sites = self.event_shape.numel() // width
        return torch.tensor(
            list(itertools.product(self.values, repeat=sites)), dtype=self.dtype
        ).reshape(-1, *self.event_shape)


class Bipartite(Pairwise):
    """The same with couplings between two halves only.

    This is a restricted Boltzmann machine on any support.
    """

    def __init__(self, space: str, scale: float = 0.5) -> None:
        super().__init__(space, scale)
        dim, width = len(self.w), len(self.values[0])
        half = dim // width // 2 * width
        self.blocks = {"first": slice(0, half), "second": torch.arange(dim) >= half}
        self.w[:half, :half] = 0.0
        self.w[half:, half:] = 0.0

    def conditional(self, block: str, x: Tensor) -> Distribution:
        logits = (x.flatten(1) @ self.w + self.b)[:, self.blocks[block]]
        if len(self.values[0]) > 1:
            return OneHotCategorical(logits=logits.unflatten(1, (-1, len(self.values)))).to_event(1)
        return Independent(
            Bernoulli(logits=logits) if self.values[0] == [0.0] else SpinBernoulli(logits), 1
        )


def build(name: str, space: str) -> Pairwise:
    return Bipartite(space) if name == "block-gibbs" else Pairwise(space)


def run(kernel: Kernel[Any], energy: Energy, x: Tensor, steps: int, seed: int = 12345) -> Tensor:
    generator, state = torch.Generator().manual_seed(seed), kernel.init(energy, x)
    for _ in range(steps):
        state, _ = kernel.step(energy, state, generator)
    return state.x


def state_probabilities(energy: Pairwise) -> Tensor:
    return torch.softmax(-energy(energy.states()), 0)


def draws(energy: Pairwise, probabilities: Tensor, n: int, seed: int) -> Tensor:
    return energy.states()[
        torch.multinomial(probabilities, n, True, generator=torch.Generator().manual_seed(seed))
    ]


def assert_frequencies(energy: Pairwise, x: Tensor, probabilities: Tensor) -> None:
    """Test the frequencies of all states by Pearson's chi-square.

    Cells with small expectation are combined; the level 6e-7 is that of 5 standard errors.
    """
    found = torch.cdist(x.flatten(1), energy.states().flatten(1)).argmin(1)
    counts = torch.bincount(found, minlength=len(probabilities)).double()
    expected = probabilities * len(x)
    small = expected < 10.0
    counts, expected = (
        torch.cat([t[~small], t[small].sum(0, keepdim=True)]) for t in (counts, expected)
    )
    keep = expected > 0
    assert float(counts[~keep].sum()) == 0.0, "an impossible state was reached"
    chi2 = float(((counts - expected) ** 2 / expected.clamp(min=1e-300))[keep].sum())
    p_value = float(stats.chi2.sf(chi2, int(keep.sum()) - 1))
    assert p_value > 6e-7, f"chi-square {chi2:.1f} over {int(keep.sum())} cells, p = {p_value:.2g}"


# Stationarity, by enumeration


def assert_stationary(
    kernel: Kernel[Any], energy: Pairwise, steps: int = 3, chains: int = 50_000
) -> None:
    p = state_probabilities(energy)
    assert_frequencies(energy, run(kernel, energy, draws(energy, p, chains, 7), steps), p)


def assert_forgets(kernel: Kernel[Any], energy: Pairwise, steps: int, chains: int = 4_000) -> None:
    start = energy.states()[-1].expand(chains, *energy.event_shape)
    assert_frequencies(energy, run(kernel, energy, start, steps), state_probabilities(energy))
