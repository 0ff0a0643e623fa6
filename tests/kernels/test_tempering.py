"""Parallel tempering: exact at every temperature, mode masses that plain chains miss, trips counted
by hand, and mutants."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from lib.checks import within_se
from lib.kernel_cases import EXACT, build
from lib.tempered import separated, state_at
from scipy import stats
from torch import Tensor

from pyroebm import HMC, MALA, MCMC, NUTS, ULA, Energy, Gibbs, ParallelTempering
from pyroebm.core import DistributionEnergy, GeometricPath, Unconstrained, spin
from pyroebm.core.compilation import Compiled
from pyroebm.energies import Ising
from pyroebm.kernels import (
    DMALA,
    GibbsWithGradients,
    GradientKernel,
    Info,
    Kernel,
    LadderAdaptation,
    hamiltonian,
    tempering,
)
from pyroebm.kernels.base import column
from pyroebm.kernels.tempering import flattened, respaced, swapped_order
from pyroebm.targets import DoubleWell, Exponential, Gaussian, GaussianMixture
from pyroebm.targets.base import TabulatedDensity

LADDER = [1.0, 0.5, 0.2]
MALA_SIZES = torch.tensor([0.8, 1.1, 1.6], dtype=torch.float64)


def mixture() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([-2.0, 2.0], dtype=torch.float64), scale=0.6, weights=[0.8, 0.2]
    )


def draws(energy: Energy, kernel: ParallelTempering, n: int, generator: torch.Generator) -> Tensor:
    """Exact draws ``(n, R)`` of a scalar variable at every temperature, by inverse CDF on a
    grid."""
    distributions = [
        TabulatedDensity(GeometricPath(energy, beta, kernel.reference), -16.0, 16.0, split=0.0)
        for beta in kernel.betas.tolist()
    ]
    return torch.stack(
        [
            distribution.quantile(torch.rand(n, generator=generator, dtype=torch.float64))
            for distribution in distributions
        ],
        1,
    )


# Stationarity at every temperature


def assert_unchanged(
    kernel: ParallelTempering, energy: Energy, chains: int = 60_000, steps: int = 6
) -> None:
    """From exact draws at all temperatures: central moments within modes and the whole
    distribution, at each, are as before."""
    generator, rungs = torch.Generator().manual_seed(3), len(kernel.betas)
    state = state_at(kernel, energy, draws(energy, kernel, chains, generator), generator)
    generator.manual_seed(4)
    for _ in range(steps):
        state, _ = kernel.step(energy, state, generator)
    fresh = draws(energy, kernel, 4 * chains, generator)
    for k in range(rungs):
        after, before = state.inner.x[:, k], fresh[:, k]
        for mode in range(2):
            a, b = (
                t[(t > 0) == bool(mode)] - before[(before > 0) == bool(mode)].mean()
                for t in (after, before)
            )
            for power in (1, 2, 4):
                f, g = a**power, b**power
                se = math.sqrt(f.var() / len(f) + g.var() / len(g))
                within_se(
                    f.mean(), g.mean(), se, what=f"moment {power} in mode {mode} at temperature {k}"
                )
        share = (before > 0).double().mean()
        within_se(
            (after > 0).double().mean(),
            share,
            math.sqrt(share * (1 - share) * 1.25 / chains),
            what=f"mass at {k}",
        )
        assert stats.ks_2samp(after.numpy(), before.numpy()).pvalue > 1e-6
    path = kernel.path(energy, chains)
    torch.testing.assert_close(
        state.inner.energy, path(flattened(state.inner).x).reshape(chains, rungs)
    )
    assert torch.equal(state.x, state.inner.x[:, 0])


@pytest.mark.parametrize(
    "inner",
    [MALA(MALA_SIZES), HMC(MALA_SIZES / 2, num_steps=3), NUTS(0.6)],
    ids=["mala", "hmc", "nuts"],
)
def test_exact_draws_at_all_temperatures_stay_exact(inner: Kernel) -> None:
    assert_unchanged(
        ParallelTempering(inner, LADDER),
        mixture(),
        chains=20_000 if isinstance(inner, NUTS) else 60_000,
    )


def test_exact_draws_stay_exact_with_a_reference() -> None:
    reference = Gaussian(torch.tensor(0.5, dtype=torch.float64), scale=2.5)
    assert_unchanged(ParallelTempering(MALA(MALA_SIZES), [1.0, 0.4, 0.0], reference), mixture())


def mala() -> ParallelTempering:
    return ParallelTempering(MALA(MALA_SIZES), LADDER)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b, s: torch.exp(b.diff(dim=1) * -s.diff(dim=1)).clamp(max=1.0),
        lambda b, s: torch.exp(-b.diff(dim=1) / -s.diff(dim=1)).clamp(max=1.0),
        lambda b, s: torch.ones_like(s.diff(dim=1)),
        lambda b, s: torch.exp(-s.diff(dim=1) * -(b * s).diff(dim=1)).clamp(max=1.0),
        lambda b, s: torch.exp(0.7 * b.diff(dim=1) * s.diff(dim=1)).clamp(max=1.0),
    ],
    ids=["sign", "quotient", "always", "tempered energies", "30 % off"],
)
def test_mutant_swap_ratios_are_caught(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempering, "swap_probability", wrong)
    with pytest.raises(AssertionError, match=r"not within|pvalue"):
        assert_unchanged(mala(), mixture())


def test_mutant_energies_of_the_old_temperature_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "refresh", lambda self, energy, state: state)
    # by the draws, before the energies themselves are looked at
    with pytest.raises(AssertionError, match=r"not within"):
        assert_unchanged(mala(), mixture())


def test_mutant_momentum_shared_by_replicas_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(q: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.randn(
            len(q) // 3, q.shape[1], generator=generator, dtype=q.dtype
        ).repeat_interleave(3, 0)

    monkeypatch.setattr(hamiltonian, "draw_momentum", shared)
    with pytest.raises(AssertionError, match=r"not within"):
        assert_unchanged(mala(), mixture())


def test_mutant_pairs_that_overlap_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs at once: a replica would be copied, and another lost."""
    swapped = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert swapped_order(swapped).tolist() == [[1, 0, 3, 2], [0, 2, 1, 3], [0, 1, 2, 3]]
    monkeypatch.setattr(
        tempering,
        "swapped_order",
        lambda swapped: swapped_order(torch.ones_like(swapped)).clamp(max=2),
    )
    with pytest.raises(AssertionError, match=r"not within"):
        assert_unchanged(mala(), mixture())


# What the swaps say


def exact_rates(betas: Tensor) -> Tensor:
    r"""On a normal distribution in two dimensions U is exponential with rate beta, and the mean
    swap probability 2 b_l / (b_k + b_l)."""
    return 2 * betas[1:] / (betas[:-1] + betas[1:])


def test_swap_rates_barrier_and_mean_energies_are_those_of_theory() -> None:
    energy = Gaussian(torch.zeros(2, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    chains = 2_000
    betas = torch.tensor([1.0, 0.6, 0.2, 0.1], dtype=torch.float64)
    kernel = ParallelTempering(HMC(0.5 / betas.sqrt(), num_steps=4), betas)
    x = torch.randn(chains, 4, 2, generator=generator, dtype=torch.float64) / betas.sqrt().reshape(
        1, 4, 1
    )
    state = state_at(kernel, energy, x, generator)
    for _ in range(40):
        state, _ = kernel.step(energy, state, generator)
    report = kernel.report(state)
    rates = state.swaps / 40
    within_se(
        report.swap_rates, exact_rates(betas), rates.std(0) / math.sqrt(chains), what="swap rate"
    )
    within_se(
        report.barrier,
        (1 - exact_rates(betas)).sum(),
        (1 - rates).sum(1).std() / math.sqrt(chains),
        what="barrier",
    )
    means = report.mean_slopes
    within_se(means.mean(0), 1 / betas, means.std(0) / math.sqrt(chains), what="mean energy")


def test_warm_up_finds_the_ladder_of_equal_rates_and_a_step_size_for_each() -> None:
    """Here it is the geometric one, and the step size goes with the width of each distribution."""
    energy, generator = (
        Gaussian(torch.zeros(2, dtype=torch.float64)),
        torch.Generator().manual_seed(0),
    )
    kernel = ParallelTempering(HMC(num_steps=3), [1.0, 0.98, 0.95, 0.9, 0.02])
    plan = kernel.own_adaptation()
    state = kernel.init(energy, energy.sample(100, generator), generator)
    kernel, memory = plan.start(kernel, energy, state, generator)
    for _ in range(500):
        kernel, state, _, memory = plan.step(kernel, energy, state, memory, 500, generator)
    assert int(state.steps.sum()) == 0, "what the warm-up counted is forgotten"
    geometric = torch.logspace(0, math.log10(0.02), 5, dtype=torch.float64)
    assert (kernel.betas / geometric - 1).abs().max() < 0.08, kernel.betas
    rates, acceptance = [], []
    for _ in range(150):
        state, _, inner = kernel.transition(energy, state, generator)
        acceptance.append(inner.acceptance_rate.mean(0))
    rates = kernel.report(state).swap_rates
    assert rates.max() - rates.min() < 0.04, rates
    assert (torch.stack(acceptance).mean(0) - 0.8).abs().max() < 0.06, (
        "every temperature at its target"
    )
    width = kernel.step_size * kernel.betas.sqrt()
    assert (width / width.mean() - 1).abs().max() < 0.2, kernel.step_size


def test_respacing_divides_a_known_barrier() -> None:
    """With r_k proportional to the distance in f(beta), the new ladder is even in f."""
    betas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
    new, place = respaced(betas, 0.3 * (betas[:-1] - betas[1:]))
    torch.testing.assert_close(new, torch.linspace(1, 0, 7, dtype=torch.float64))
    np.testing.assert_allclose(np.interp(place, np.arange(7), betas.numpy()), new.numpy())
    new, _ = respaced(torch.tensor([1.0, 0.3, 0.1, 0.05]), torch.zeros(3))
    assert bool((new.diff() < 0).all()), "a ladder without rejections stays one"


def test_round_trips_are_those_that_one_counts_on_the_recorded_replicas() -> None:
    energy, generator = mixture(), torch.Generator().manual_seed(0)
    kernel = ParallelTempering(MALA(MALA_SIZES), LADDER)
    state = kernel.init(energy, energy.sample(20, generator), generator)
    history = [state.replica]
    for _ in range(300):
        state, _ = kernel.step(energy, state, generator)
        history.append(state.replica)
        assert torch.equal(state.replica.sort(1).values, torch.arange(3).expand(20, 3))
    record = torch.stack(history, 1).tolist()  # (chains, steps, R)
    for chain in range(20):
        trips = 0
        for replica in range(3):
            ends = [at for at in (row.index(replica) for row in record[chain]) if at in (0, 2)]
            turns = [a for a, b in zip(ends, [None, *ends], strict=False) if a != b]
            turns = turns[turns.index(0) :] if 0 in turns else []
            trips += (len(turns) - 1) // 2 if turns else 0
        assert int(state.round_trips[chain]) == trips > 0
    # (steps, R): even pairs swap first, then odd ones
    changed = (torch.stack(history, 1).diff(dim=1) != 0).any(0)
    assert not changed[::2, 2].any()
    assert not changed[1::2, 0].any()


# Modes that plain chains do not find


def mass_of(mcmc: MCMC, energy: Energy, inside: Tensor | None = None) -> tuple[float, float]:
    x = mcmc.get_samples(group_by_chain=True)["x"]
    share = (energy.mode_of(x) == 1).double().mean(1)
    return float(share.mean()), float(share.std() / math.sqrt(len(share)))


def test_separated_modes_get_their_weights_where_plain_chains_keep_where_they_started() -> None:
    energy = separated()
    start = energy.loc.repeat(32, 1)  # half of the chains in each mode
    plain = MCMC(HMC(step_size=0.5, num_steps=5), 100, 0, 64, seed=0)
    plain.run(energy, start)
    assert abs(mass_of(plain, energy)[0] - 0.5) < 0.05
    mcmc = MCMC(
        ParallelTempering(HMC(num_steps=5), torch.logspace(0, -1.7, 5)),
        500,
        250,
        64,
        seed=0,
        save_warmup=False,
    )
    mcmc.run(energy, start)
    mass, se = mass_of(mcmc, energy)
    assert se < 0.015
    within_se(mass, 0.2, se, what="mass of the smaller mode")
    report = mcmc.kernel.report(mcmc.state)
    assert report.swap_rates.max() - report.swap_rates.min() < 0.06
    assert 0.3 / (2 + 2 * report.barrier) < report.round_trip_rate < 1 / (2 + 2 * report.barrier)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    y = x[..., 1].square().mean(1)
    within_se(y.mean(), 1.0, y.std() / 8, what="variance across")


@pytest.mark.parametrize(
    "name", [n for n in EXACT if "-" not in n or n.endswith(("walk", "underdamped", "mclmc"))]
)
def test_any_exact_kernel_can_be_tempered(name: str) -> None:
    energy = GaussianMixture(
        torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64), weights=[0.8, 0.2]
    )
    mcmc = MCMC(
        ParallelTempering(build(name, (2,)), [1.0, 0.4, 0.15]),
        300,
        100,
        32,
        seed=0,
        save_warmup=False,
    )
    mcmc.run(energy, energy.loc.repeat(16, 1))
    mass, se = mass_of(mcmc, energy)
    assert se < 0.03
    within_se(mass, 0.2, se)


@pytest.mark.parametrize(
    "reference", [None, Gaussian(torch.tensor(0.0, dtype=torch.float64), scale=1.5)]
)
def test_the_double_well_gets_its_mass(reference: Energy | None) -> None:
    energy = DoubleWell(dtype=torch.float64)
    betas = [1.0, 0.5, 0.2, 0.1 if reference is None else 0.0]
    mcmc = MCMC(
        ParallelTempering(HMC(num_steps=5), betas, reference),
        400,
        200,
        64,
        seed=0,
        save_warmup=False,
    )
    mcmc.run(energy)
    mass, se = mass_of(mcmc, energy)
    assert se < 0.005
    within_se(mass, energy.right_mass, se)


def test_a_reference_for_a_positive_variable_is_on_its_own_space() -> None:
    import pyro.distributions as dist

    gamma = DistributionEnergy(
        dist.Gamma(torch.tensor(2.0).double(), torch.tensor(0.7).double()), dtype=torch.float64
    )
    mcmc = MCMC(
        ParallelTempering(MALA(), [1.0, 0.5, 0.0], gamma), 200, 100, 64, seed=0, save_warmup=False
    )
    mcmc.run(Exponential(dtype=torch.float64))
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert (x > 0).all()
    for f, truth in ((x, 1.0), (x.square(), 2.0)):
        within_se(f.mean(), truth, f.mean(1).std() / 8)


# Any inner kernel


class FlipState(NamedTuple):
    x: Tensor
    energy: Tensor
    age: Tensor  # what a replica takes along


@dataclasses.dataclass(frozen=True, eq=False)
class Flip(Kernel[FlipState]):
    """Metropolis on one random spin."""

    target_acceptance: ClassVar[float | None] = None
    discrete: ClassVar[bool] = True

    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> FlipState:
        self.check_start(energy, x)
        return FlipState(x, energy(x), torch.arange(len(x)))

    def step(
        self, energy: Energy, state: FlipState, generator: torch.Generator | None = None
    ) -> tuple[FlipState, Info]:
        n, dim = state.x.shape
        site = torch.randint(dim, (n, 1), generator=generator)
        x = state.x.scatter(1, site, -state.x.gather(1, site))
        values = energy(x)
        accept = torch.exp(state.energy - values).clamp(max=1.0)
        took = torch.rand(n, generator=generator, dtype=x.dtype) < accept
        new = FlipState(
            torch.where(took.unsqueeze(1), x, state.x),
            torch.where(took, values, state.energy),
            state.age,
        )
        return new, Info(
            accept, took, torch.zeros_like(took), new.energy, torch.ones_like(site[:, 0]), accept
        )


class Chain(Energy):
    """Ferromagnetic spins on a line with a field: two deep wells."""

    support = spin

    def forward(self, x: Tensor) -> Tensor:
        return -1.8 * (x[..., 1:] * x[..., :-1]).sum(-1) - 0.1 * x.sum(-1)


def test_discrete_kernels_and_states_of_their_own_kind() -> None:
    energy = Chain((4,)).double()
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    truth = torch.softmax(-energy(states), 0)
    kernel = ParallelTempering(Flip(), [1.0, 0.5, 0.2])
    assert kernel.discrete
    mcmc = MCMC(kernel, 1000, 100, 200, seed=0, save_warmup=False, chain_batch_size=200)
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    seen = (x.unsqueeze(2) == states).all(-1).double().mean(1)  # (chains, 16)
    common = truth > 1e-3
    within_se(seen.mean(0)[common], truth[common], seen.std(0)[common] / math.sqrt(200))
    state = mcmc.state
    first = torch.arange(200).unsqueeze(1) * 3
    assert torch.equal(state.inner.age, first + state.replica), (
        "every field of the inner state moves with its replica"
    )


@pytest.mark.parametrize(
    "inner", [Gibbs(), GibbsWithGradients(), DMALA(1.0)], ids=lambda k: type(k).__name__
)
def test_the_discrete_kernels_of_the_library_inside(inner: Kernel[Any]) -> None:
    """Two wells of an Ising ring that one chain leaves once in thousands of sweeps: its
    distribution by all states."""
    energy = Ising((6,), coupling=1.5, field=0.02)
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    # single states between the wells are too rare to be counted
    totals = torch.arange(-6.0, 7.0, 2.0, dtype=torch.float64)
    truth = (states.sum(1, keepdim=True) == totals).double().mT @ torch.softmax(
        -energy(states).double(), 0
    )
    mcmc = MCMC(
        ParallelTempering(inner, [1.0, 0.6, 0.3]),
        300,
        100,
        200,
        seed=0,
        save_warmup=False,
        progress=False,
    )
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    seen = (x.sum(-1, keepdim=True) == totals).double().mean(1)
    within_se(seen.mean(0), truth, seen.std(0) / math.sqrt(200))


def test_an_inexact_kernel_inside_is_said() -> None:
    assert not ParallelTempering(ULA(), LADDER).exact
    assert ParallelTempering(NUTS(), LADDER).exact


# Rows


class Torn(Energy):
    """A standard normal that is NaN beyond 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x**2 + 0.0 * torch.sqrt(3.0 - x.abs())


def test_a_nan_in_one_replica_touches_no_other_chain() -> None:
    kernel, x = ParallelTempering(MALA(1.2), LADDER), torch.zeros(40, dtype=torch.float64)
    states, touched = [], torch.zeros(40, dtype=torch.bool)
    for energy in (Torn(()).double(), Gaussian(torch.tensor(0.0, dtype=torch.float64))):
        generator = torch.Generator().manual_seed(0)
        state = kernel.init(energy, x, generator)
        for _ in range(6):
            state, info = kernel.step(energy, state, generator)
            touched |= info.diverging
        states.append(state)
    assert 5 < int(touched.sum()) < 35
    assert torch.isfinite(states[0].inner.energy).all()
    assert torch.isfinite(states[0].swaps).all()
    torch.testing.assert_close(states[0].inner.x[~touched], states[1].inner.x[~touched])
    assert not torch.allclose(states[0].inner.x[touched], states[1].inner.x[touched])


def test_reference_draws_where_the_gradient_is_not_finite_are_not_taken() -> None:
    class Torn(Energy):
        def forward(self, x: Tensor) -> Tensor:  # finite below -1, and its gradient a NaN there
            return 0.5 * x**2 + torch.where(x > -1.0, 0.0 * torch.sqrt(x + 1.0), 0.0)

    energy, generator = Torn().double(), torch.Generator().manual_seed(0)
    kernel = ParallelTempering(
        MALA(0.5), [1.0, 0.5, 0.0], Gaussian(torch.tensor(0.0, dtype=torch.float64), scale=2.0)
    )
    state = kernel.init(energy, torch.zeros(200, dtype=torch.float64), generator)
    for _ in range(3):
        state, _ = kernel.step(energy, state, generator)
    assert float(state.inner.x.min()) > -1.0
    assert float(state.inner.x[:, -1].std()) > 1.0


def test_a_reference_finds_its_coordinates_behind_a_compiled_view() -> None:
    energy = Unconstrained(Exponential(dtype=torch.float64))
    kernel = ParallelTempering(MALA(), [1.0, 0.0], Exponential(0.5, dtype=torch.float64))
    x = energy.initial(4)
    torch.testing.assert_close(kernel.path(Compiled(energy), 2)(x), kernel.path(energy, 2)(x))


def test_reference_draws_where_the_energy_is_infinite_are_not_taken() -> None:
    from pyroebm.targets import HalfDisc

    energy = HalfDisc(dtype=torch.float64)
    reference = Gaussian(torch.tensor(0.0, dtype=torch.float64), scale=2.0)
    mcmc = MCMC(
        ParallelTempering(MALA(), [1.0, 0.5, 0.0], reference),
        300,
        150,
        64,
        seed=0,
        save_warmup=False,
    )
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"].square()
    within_se(x.mean(), energy.variance, x.mean(1).std() / 8)


def test_step_sizes_are_of_temperatures_and_go_to_their_rows() -> None:
    kernel, energy = mala(), mixture()
    state = kernel.init(energy, torch.zeros(5, dtype=torch.float64))
    _, info, inner = kernel.transition(energy, state)
    assert torch.equal(inner.step_size, MALA_SIZES.expand(5, 3))
    assert torch.equal(info.step_size, MALA_SIZES[0].expand(5))
    assert isinstance(
        kernel.replace(step_size=0.5, inverse_mass=torch.tensor(2.0)).kernel, GradientKernel
    )
    assert column(kernel.replace(step_size=0.5).step_size, torch.zeros(1, 1)).item() == 0.5


# Checkpoints and the front door


@pytest.mark.parametrize(
    "reference", [None, Gaussian(torch.tensor(0.0, dtype=torch.float64), scale=1.5)]
)
def test_a_run_that_was_saved_goes_on_bit_for_bit(reference: Energy | None) -> None:
    energy = DoubleWell(dtype=torch.float64)
    betas = [1.0, 0.5, 0.1] if reference is None else [1.0, 0.5, 0.0]

    def sampler(num_samples: int) -> MCMC:
        return MCMC(ParallelTempering(MALA(), betas, reference), num_samples, 100, 6, seed=5)

    whole = sampler(50)
    part = sampler(30)
    loaded = sampler(30)
    whole.run(energy)
    part.run(energy)
    loaded.load_state_dict(part.state_dict(), energy)
    assert torch.equal(loaded.kernel.betas, part.kernel.betas)
    assert not torch.equal(loaded.kernel.betas, torch.tensor(betas, dtype=torch.float64))
    part.run_more(20)
    loaded.run_more(20)
    for mcmc in (part, loaded):
        assert torch.equal(mcmc.get_samples()["x"], whole.get_samples()["x"])
        assert torch.equal(mcmc.state.round_trips, whole.state.round_trips)
        assert torch.equal(mcmc.state.swaps, whole.state.swaps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParallelTempering(NUTS, [1.0, 0.5]), "write NUTS()"),
        (
            lambda: ParallelTempering(NUTS(), [1.0]),
            r"betas must decrease from 1.*got betas=\[1.0\]",
        ),
        (lambda: ParallelTempering(NUTS(), [0.9, 0.5]), "betas must decrease from 1"),
        (lambda: ParallelTempering(NUTS(), [1.0, 0.5, 0.5]), "betas must decrease from 1"),
        (lambda: ParallelTempering(NUTS(), [1.0, 0.0]), "betas must end above 0"),
        (lambda: ParallelTempering(NUTS(), [1.0, 0.1], Gaussian(0.0)), "betas must end at 0"),
        (
            lambda: ParallelTempering(NUTS(), [1.0, 0.0], 1.0 * Gaussian(0.0)),
            "reference must have exact draws, but Tempered",
        ),
        (lambda: LadderAdaptation(target_acceptance=1.0), r"target_acceptance must be in \(0, 1\)"),
        (lambda: GeometricPath(DoubleWell(), 1.5), r"betas must be one number in \[0, 1\]"),
        (
            lambda: GeometricPath(DoubleWell(), 0.5, Gaussian(torch.zeros(2))),
            "reference must have the event_shape",
        ),
        (
            lambda: GeometricPath(DoubleWell(), 0.5, Exponential()),
            "reference must have the event_shape, support",
        ),
        (
            lambda: GeometricPath(DoubleWell(), [0.5, 1.0])(torch.zeros(3)),
            "one chain for each of 2 betas",
        ),
        (
            lambda: LadderAdaptation().start(NUTS(), DoubleWell(), None),
            r"kernel must be ParallelTempering\(\).*got NUTS",
        ),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_report_needs_a_step() -> None:
    kernel = mala()
    with pytest.raises(ValueError, match="at least one step"):
        kernel.report(kernel.init(mixture(), torch.zeros(2, dtype=torch.float64)))
