"""Kernels, energies and tests of stationarity that several tests of kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

from lib.checks import within_se
from pyroebm import HMC, MALA, NUTS, ULA, ChEES, Energy, ParallelTempering
from pyroebm.kernels import (
    BAOAB,
    GHMC,
    MCLMC,
    AdjustedMCLMC,
    Barker,
    Dense,
    IndependenceMetropolis,
    Kernel,
    LocalGlobalMixture,
    LockstepNUTS,
    LowRank,
    RandomWalk,
    StochasticGradientLangevin,
)
from pyroebm.kernels.metric import Metric

#: For an event of one entry: inverse mass 0.5.
NARROW = LowRank(torch.tensor([0.5]), torch.tensor([[1.0]]), torch.tensor([2.0]))


class Wide:
    """A proposal: independent normal entries with mean .3 and standard deviation 1.5."""

    def __init__(self, dim: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.dim = dim
        self.dtype = dtype

    def rsample_base(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, self.dim, dtype=self.dtype, generator=generator)

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = 0.3 + 1.5 * z
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(0.3, 1.5, validate_args=False).log_prob(x).sum(-1)


#: One line for a kernel: every test that takes ``kernel`` runs on it.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "ula": lambda: ULA(step_size=0.2),
    "mala": lambda: MALA(step_size=0.6),
    "hmc": lambda: HMC(step_size=0.3, num_steps=5),
    "nuts": lambda: NUTS(step_size=0.5),
    "lockstep": lambda: LockstepNUTS(step_size=0.5),
    "mala-metric": lambda: MALA(step_size=0.8, inverse_mass=torch.tensor(0.5)),
    "hmc-metric": lambda: HMC(step_size=0.4, num_steps=4, inverse_mass=torch.tensor(0.5)),
    "tempering": lambda: ParallelTempering(HMC(step_size=0.3, num_steps=3), betas=[1.0, 0.5, 0.2]),
    "nuts-metric": lambda: NUTS(step_size=0.6, inverse_mass=torch.tensor(0.5)),
    "nuts-low-rank": lambda: NUTS(step_size=0.6, inverse_mass=NARROW),
    "lockstep-dense": lambda: LockstepNUTS(
        step_size=0.6, inverse_mass=Dense(torch.tensor([[0.7]]))
    ),
    "nuts-dense": lambda: NUTS(step_size=0.6, inverse_mass=Dense(torch.tensor([[0.7]]))),
    "hmc-low-rank": lambda: HMC(step_size=0.4, num_steps=4, inverse_mass=NARROW),
    "random-walk": lambda: RandomWalk(step_size=0.5),
    "barker": lambda: Barker(step_size=0.5),
    "barker-metric": lambda: Barker(step_size=0.7, inverse_mass=torch.tensor(0.5)),
    "underdamped": lambda: BAOAB(step_size=0.2),
    "metropolis-underdamped": lambda: GHMC(step_size=0.3),
    "sgld": lambda: StochasticGradientLangevin(step_size=0.2, decay=0.5),
    "mclmc": lambda: MCLMC(step_size=0.3),
    "adjusted-mclmc": lambda: AdjustedMCLMC(step_size=0.3),
    "adjusted-mclmc-metric": lambda: AdjustedMCLMC(step_size=0.4, inverse_mass=torch.tensor(0.5)),
    "chees": lambda: ChEES(step_size=0.3, trajectory_length=2.0),
    "chees-metric": lambda: ChEES(
        step_size=0.4, trajectory_length=2.0, inverse_mass=torch.tensor(0.5)
    ),
    "independence": lambda: IndependenceMetropolis(Wide()),
    "jumps": lambda: LocalGlobalMixture(HMC(step_size=0.3, num_steps=3), Wide(), every=2),
    "metropolis-underdamped-metric": lambda: GHMC(step_size=0.4, inverse_mass=torch.tensor(0.5)),
}


#: Tempering starts from draws at all temperatures: see test_tempering.py.
EXACT = [name for name in KERNELS if KERNELS[name]().exact and name != "tempering"]


def widened(metric: Tensor | Metric | None, event: tuple[int, ...]) -> Tensor | Metric | None:
    """Extend a metric for one entry to an event of many entries; dense ones correlate them."""
    dim = math.prod(event)
    match metric:
        case Tensor():
            return metric.expand(event).clone()
        case Dense(factor):
            return Dense(factor * (torch.eye(dim) + 0.3 * torch.ones(dim, dim).tril(-1)))
        case LowRank(scale, vectors, values):
            return LowRank(scale.expand(dim), vectors.expand(dim, 1) / math.sqrt(dim), values)
    return metric


def build(name: str, event: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Kernel:
    kernel = KERNELS[name]()
    if hasattr(kernel, "proposal"):
        kernel = kernel.replace(proposal=Wide(math.prod(event), dtype))
    if isinstance(kernel, IndependenceMetropolis):
        return kernel
    return kernel.replace(inverse_mass=widened(kernel.inverse_mass, event))


class Normal(Energy):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x**2).reshape(*self.batch_shape(x), -1).sum(-1)


class Pair(Energy):
    """Two independent copies of a scalar variable as one event."""

    def __init__(self, energy: Energy) -> None:
        super().__init__((2,))
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x).sum(-1)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return self.energy.sample(2 * num_samples, generator).reshape(num_samples, 2)


class Fragile(Energy):
    """A standard normal that is NaN beyond 1.5.

    If steps to NaN are rejected, its samples have a truncated normal distribution.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x**2 + 0.0 * torch.sqrt(1.5 - x.abs())


def run(kernel: Kernel, energy: Energy, x: Tensor, steps: int, seed: int = 12345) -> Tensor:
    """Return positions after ``steps`` steps from ``x``.

    The seed must differ from the one that ``x`` was drawn with.
    """
    generator = torch.Generator().manual_seed(seed)
    state = kernel.init(energy, x, generator)
    for _ in range(steps):
        state, _ = kernel.step(energy, state, generator)
    return state.x


# Stationarity: exact kernels leave exact draws as they are


def assert_unchanged(
    kernel: Kernel, energy: Energy, chains: int = 100_000, steps: int = 6, seed: int = 7
) -> None:
    """Test that a few steps from exact draws leave their distribution unchanged.

    Moments within modes and the whole distribution are compared with new exact draws.
    """
    generator = torch.Generator().manual_seed(seed)
    chains //= energy.event_shape.numel()
    x = energy.sample(chains, generator)
    after = run(kernel, energy, x, steps, seed + 1).flatten()
    fresh = energy.sample(4 * chains, generator).flatten()
    for mode in range(2):  # central moments: those about 0 hardly feel the width of a well
        a, b = (
            t[(t > 0.126) == bool(mode)] - fresh[(fresh > 0.126) == bool(mode)].mean()
            for t in (after, fresh)
        )
        for power in (1, 2, 4):
            f, g = a**power, b**power
            within_se(
                f.mean(),
                g.mean(),
                math.sqrt(f.var() / len(f) + g.var() / len(g)),
                what=f"moment {power} in mode {mode}",
            )
    share = (fresh > 0.126).double().mean()
    within_se(
        (after > 0.126).double().mean(),
        share,
        math.sqrt(share * (1 - share) * (1 / len(after) + 1 / len(fresh))),
        what="mass",
    )
    assert stats.ks_2samp(after.numpy(), fresh.numpy()).pvalue > 1e-6
