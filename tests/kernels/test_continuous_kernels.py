"""Random walk, Barker, underdamped, microcanonical, ChEES and stochastic-gradient kernels: their
own tests and mutants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.kernel_cases import KERNELS, Fragile, Normal, Pair, assert_unchanged, run
from scipy import integrate
from torch import Tensor

from pyroebm import MCMC, ChEES, Energy
from pyroebm.core import MinibatchEnergy, Unconstrained, value_and_grad
from pyroebm.core.compilation import Compiled
from pyroebm.kernels import (
    BAOAB,
    MCLMC,
    AdjustedMCLMC,
    Barker,
    ChEESAdaptation,
    Dense,
    EnergyVarianceAdaptation,
    LowRank,
    RandomWalk,
    StochasticGradientLangevin,
    WindowAdaptation,
    barker,
    ensemble,
    microcanonical,
    random_walk,
    underdamped,
)
from pyroebm.kernels.hamiltonian import metropolis
from pyroebm.kernels.metric import metric_of
from pyroebm.kernels.microcanonical import isokinetic_leapfrog, turn
from pyroebm.targets import DoubleWell, Exponential, Gaussian, GaussianMixture, scales_gaussian

MINE = [
    "random-walk",
    "barker",
    "underdamped",
    "metropolis-underdamped",
    "mclmc",
    "adjusted-mclmc",
    "chees",
    "sgld",
]
EXACT = [name for name in MINE if KERNELS[name]().exact]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# All of them


@pytest.mark.parametrize("metric", ["diagonal", "dense", "low-rank"])
@pytest.mark.parametrize("name", MINE)
def test_every_metric_is_a_change_of_coordinates(name: str, metric: str) -> None:
    """On N(0, A A') with that metric a chain is the image under A of one on N(0, I) with the
    identity."""
    scale = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    vectors = torch.linalg.qr(normal(3, 1, seed=1)).Q
    inverse_mass: Any = {
        "diagonal": scale**2,
        "dense": Dense(torch.tril(normal(3, 3, seed=2)) + 2 * torch.eye(3, dtype=torch.float64)),
        "low-rank": LowRank(scale, vectors, torch.tensor([9.0], dtype=torch.float64)),
    }[metric]
    x = normal(50, 3)
    a = metric_of(inverse_mass, x)
    matrix = a.apply(torch.eye(3, dtype=torch.float64)).mT
    target = Gaussian(torch.zeros(3, dtype=torch.float64), matrix @ matrix.mT)
    plain = run(KERNELS[name](), Gaussian(torch.zeros(3, dtype=torch.float64)), x, 5)
    image = run(KERNELS[name]().replace(inverse_mass=inverse_mass), target, a.apply(x), 5)
    torch.testing.assert_close(torch.linalg.solve(matrix, image.mT).mT, plain)


@pytest.mark.parametrize("name", EXACT)
def test_chains_forget_where_they_started(name: str) -> None:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    start = torch.full((4_000, 2), 3.0, dtype=torch.float64)
    x = run(
        KERNELS[name](),
        GaussianMixture(means, scale=0.8),
        start,
        60 if name in ("adjusted-mclmc", "chees") else 300,
    )
    mean, se = mean_and_se(x)
    within_se(mean, np.zeros(2), se)
    square, se = mean_and_se(x**2)
    within_se(square, np.array([1.64, 0.64]), se)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "chees"])
def test_warm_up_reaches_its_target(name: str) -> None:
    energy = scales_gaussian(5, dtype=torch.float64)
    mcmc = MCMC(
        KERNELS[name](), num_samples=100, warmup_steps=400, num_chains=32, seed=0, progress=False
    )
    mcmc.run(energy)
    target = mcmc.kernel.target_acceptance
    assert target is not None
    assert abs(float(mcmc.get_stats()["acceptance_rate"].mean()) - target) < 0.08


@pytest.mark.parametrize("name", MINE)
def test_stopped_and_resumed_is_the_same_as_never_stopped(name: str) -> None:
    energy = Normal((2,)).double()
    counts = {"num_samples": 10, "warmup_steps": 70, "num_chains": 4}
    first, second = (MCMC(KERNELS[name](), **counts, seed=3, progress=False) for _ in range(2))
    first.run(energy)
    kept = first.state_dict()
    first.run_more(5)
    second.load_state_dict(kept, energy)
    second.run_more(5)
    assert torch.equal(first.get_samples()["x"], second.get_samples()["x"])


@pytest.mark.parametrize("name", MINE)
def test_refreshing_draws_nothing_and_takes_the_new_energy(name: str) -> None:
    kernel, x = KERNELS[name](), normal(5, 2)
    state = kernel.init(Normal((2,)).double(), x, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    fresh = kernel.refresh(3.0 * Normal((2,)).double(), state)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(fresh.x, x)
    if name != "sgld":  # whose energy is an estimate that no step reads
        torch.testing.assert_close(fresh.energy, 1.5 * (x**2).sum(1))
    if hasattr(state, "momentum"):
        assert torch.equal(fresh.momentum, state.momentum)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BAOAB(friction=0.0),
            "friction must be positive and finite, got friction=0.0",
        ),
        (
            lambda: BAOAB(temperature=math.inf),
            "temperature must be positive and finite",
        ),
        (
            lambda: MCLMC(decoherence_length=-1.0),
            "decoherence_length must be positive and finite, or None, got",
        ),
        (
            lambda: AdjustedMCLMC(trajectory_length=0.0),
            "trajectory_length must be positive and finite, or None, got",
        ),
        (
            lambda: ChEES(trajectory_length=math.nan),
            "trajectory_length must be positive and finite, got nan",
        ),
        (lambda: EnergyVarianceAdaptation(target=0.0), "target must be positive"),
        (lambda: StochasticGradientLangevin(decay=-1.0), "decay must be at least 0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Random walk and Barker


def test_a_random_walk_needs_no_gradient() -> None:
    class Steps(Energy):  # a staircase: probability e^-k on [k, k + 1), k >= 0
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x >= 0, torch.floor(x.detach()), torch.inf)

    x = run(
        RandomWalk(step_size=2.0),
        Steps().double(),
        torch.full((20_000,), 0.5, dtype=torch.float64),
        60,
    )
    for k in range(3):
        inside = ((x >= k) & (x < k + 1)).double()
        within_se(
            inside.mean(), math.exp(-k) * (1 - math.exp(-1)), inside.std() / math.sqrt(len(x))
        )


def test_barker_comes_back_from_where_gradients_are_huge() -> None:
    """At x = 30 the double well has a gradient of 1e5: it says which way, and not how far."""
    x = torch.full((200,), 30.0, dtype=torch.float64)
    assert (run(Barker(step_size=0.5), DoubleWell().double(), x, 200).abs() < 3.0).all()


# Underdamped Langevin


@pytest.mark.parametrize(
    ("step_size", "friction", "temperature"), [(0.5, 1.0, 1.0), (1.5, 0.5, 1.0), (1.0, 1.0, 3.0)]
)
def test_baoab_has_no_bias_in_the_positions_of_an_oscillator(
    step_size: float, friction: float, temperature: float
) -> None:
    """Its momenta have variance T (1 - eps^2 / 4), its positions T exactly (Leimkuhler and
    Matthews, 2013)."""
    kernel, generator = (
        BAOAB(step_size, None, friction, temperature=temperature),
        torch.Generator().manual_seed(1),
    )
    energy = Normal().double()
    state = kernel.init(energy, torch.full((40_000,), 3.0, dtype=torch.float64), generator)
    for _ in range(60):
        state, _ = kernel.step(energy, state, generator)
    for what, values, truth in (
        ("x", state.x, temperature),
        ("p", state.momentum[:, 0], temperature * (1 - step_size**2 / 4)),
    ):
        mean, se = mean_and_se(values**2)
        within_se(mean, truth, se, what=what)


class Ripples(Energy):
    """Bounded curvature, so that no step below 0.63 is unstable."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x**2 + torch.cos(3.0 * x)


def baoab_distribution(eps: float) -> float:
    """E cos 3x under BAOAB at infinite friction, by quadrature.

    With the momentum p drawn afresh at position y, the position is z = y + eps p / 2 at the end of
    a step and then y' = 2 z - y - eps^2 E'(z) / 2 where the next momentum is drawn: y is a Markov
    chain whose density is that of z at the solution of 2 z - eps^2 E'(z) / 2 = y + y', divided by
    the derivative of the left side.
    """
    y = np.linspace(-7.0, 7.0, 561)
    z = np.linspace(-9.0, 9.0, 20_001)
    left = 2 * z - 0.5 * eps**2 * (z - 3 * np.sin(3 * z))
    assert (np.diff(left) > 0).all()
    middle = np.interp(y[:, None] + y[None], left, z)
    slope = 2 - 0.5 * eps**2 * (1 - 9 * np.cos(3 * middle))
    move = lambda at: np.exp(-2 * (at - y[:, None]) ** 2 / eps**2)  # noqa: E731
    transition = move(middle) / slope
    distribution = np.exp(-0.5 * y**2 - np.cos(3 * y))
    transition /= transition.sum(1, keepdims=True)
    power = np.linalg.matrix_power(transition, 256)
    distribution = distribution @ power / (distribution @ power).sum()
    end = move(y[None])
    return float(distribution @ (end / end.sum(1, keepdims=True)) @ np.cos(3 * y))


def test_baoab_has_the_bias_that_quadrature_gives() -> None:
    weight = lambda x: math.exp(-0.5 * x**2 - math.cos(3 * x))  # noqa: E731
    whole = integrate.quad(weight, -9, 9, limit=200)[0]
    truth = integrate.quad(lambda x: math.cos(3 * x) * weight(x), -9, 9, limit=200)[0] / whole
    sizes = (0.3, 0.25, 0.2)
    order = np.polyfit(
        np.log(sizes), np.log([abs(baoab_distribution(eps) - truth) for eps in sizes]), 1
    )[0]
    assert 3.6 < order < 4.4, (
        f"the bias falls with order {order}: at infinite friction the second in eps^2"
    )
    x = run(BAOAB(step_size=0.5, friction=1e3), Ripples().double(), normal(100_000), 100)
    mean, se = mean_and_se(torch.cos(3 * x))
    assert abs(mean - truth) > 5 * se, "the bias must be seen, for the test to say something"
    within_se(mean, baoab_distribution(0.5), se)


def test_the_heat_of_the_bath_is_no_energy_error() -> None:
    kernel, generator = BAOAB(0.3, temperature=1e4), torch.Generator().manual_seed(1)
    energy, x = Normal((10,)).double(), 100.0 * normal(2000, 10)
    state, moments = kernel.init(energy, x, generator), []
    for _ in range(10):
        state, info = kernel.step(energy, state, generator)
        assert not info.diverging.any()
        moments.append((state.x**2).mean(1))
    mean, se = mean_and_se(torch.stack(moments).mean(0))
    within_se(mean, 1e4, se)


def test_baoab_beyond_its_stability_refuses_and_says_so() -> None:
    energy = DoubleWell().double()
    kernel = BAOAB(step_size=1.0)
    generator = torch.Generator().manual_seed(0)
    state, diverged = kernel.init(energy, torch.ones(64, dtype=torch.float64), generator), 0
    for _ in range(50):
        state, info = kernel.step(energy, state, generator)
        diverged += int(info.diverging.sum())
    assert diverged > 0
    assert float(state.energy.max()) < 1e4


# Microcanonical dynamics


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_a_turn_solves_its_equation_and_knows_its_jacobian(dim: int) -> None:
    u, force = (
        torch.nn.functional.normalize(normal(1, dim, seed=dim), dim=1),
        3.0 * normal(1, dim, seed=10),
    )
    time = torch.tensor([[0.7]], dtype=torch.float64)
    turned, change = turn(u, force, time)
    f = force[0].numpy()

    def rate(_: float, y: np.ndarray) -> np.ndarray:
        return np.append((f - y[:-1] * (f @ y[:-1])) / (dim - 1), f @ y[:-1])

    solved = integrate.solve_ivp(
        rate, (0.0, 0.7), np.append(u[0].numpy(), 0.0), rtol=1e-11, atol=1e-12
    ).y[:, -1]
    np.testing.assert_allclose(turned[0], solved[:-1], atol=1e-9)
    np.testing.assert_allclose(change, solved[-1:], atol=1e-9)
    jacobian = torch.func.jacrev(lambda v: turn(v[None], force, time)[0][0])(u[0])
    before, after = (torch.linalg.svd(v)[2][1:] for v in (u, turned))  # bases of the tangent spaces
    torch.testing.assert_close(
        torch.linalg.det(after @ jacobian @ before.mT).abs().log(), -change[0]
    )


def test_a_turn_under_no_force_and_under_a_huge_one() -> None:
    u = torch.tensor([[0.6, 0.8], [0.6, 0.8]], dtype=torch.float64)
    force = torch.tensor([[0.0, 0.0], [1e6, 0.0]], dtype=torch.float64)
    turned, change = turn(u, force, torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(turned, torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(
        change, torch.tensor([0.0, 1e6 + math.log(0.8)], dtype=torch.float64)
    )


def test_isokinetic_leapfrog_is_of_second_order_and_reversible() -> None:
    energy, q = (
        Pair(DoubleWell().double()),
        torch.tensor([[-1.6, 0.4], [1.2, -1.0]], dtype=torch.float64),
    )
    metric, u = (
        metric_of(torch.tensor([0.5, 2.0]), q),
        torch.nn.functional.normalize(normal(2, 2), dim=1),
    )
    start, grad = value_and_grad(energy, q)

    def flow(q: Tensor, u: Tensor, grad: Tensor, eps: float, steps: int) -> tuple[Tensor, ...]:
        return isokinetic_leapfrog(
            energy, q, u, grad, torch.full((2, 1), eps, dtype=torch.float64), metric, steps
        )

    sizes, errors = np.array([0.02, 0.01, 0.005]), []
    for eps in sizes:
        _, _, values, _, change = flow(q, u, grad, eps, round(0.4 / eps))
        errors.append(float((values - start + change).abs().max()))
    assert 1.9 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < 2.1
    q1, u1, _, grad1, change = flow(q, u, grad, 0.05, 20)
    q2, u2, _, _, back = flow(q1, -u1, grad1, 0.05, 20)
    torch.testing.assert_close(q2, q)
    torch.testing.assert_close(-u2, u)
    torch.testing.assert_close(back, -change)


def test_mclmc_is_biased_by_its_step_and_right_without() -> None:
    energy = Gaussian(torch.zeros(10, dtype=torch.float64))
    variance = {}
    for eps, steps in ((0.3, 40), (4.0, 40)):
        x = run(
            MCLMC(step_size=eps),
            energy,
            energy.sample(10_000, torch.Generator().manual_seed(0)),
            steps,
        )
        variance[eps] = mean_and_se((x**2).mean(1))
    within_se(variance[0.3][0], 1.0, variance[0.3][1])
    assert abs(variance[4.0][0] - 1.0) > 5 * variance[4.0][1]


def test_mclmc_warms_up_to_its_energy_error_and_learns_the_scales() -> None:
    energy = scales_gaussian(20, dtype=torch.float64)
    mcmc = MCMC(MCLMC(), num_samples=1, warmup_steps=500, num_chains=64, seed=0, progress=False)
    mcmc.run(energy)
    kernel: Any = mcmc.kernel
    assert ((kernel.inverse_mass / energy.variance).sqrt() - 1).abs().max() < 0.1
    generator = torch.Generator().manual_seed(1)
    state, squares = kernel.init(energy, energy.sample(20_000, generator), generator), []
    for _ in range(3):
        state, _, error = kernel.step_with_error(energy, state, generator)
        squares.append(error**2 / 20)
    assert abs(float(torch.stack(squares).mean()) / 5e-4 - 1) < 0.3
    with pytest.raises(ValueError, match=r"kernel must be MCLMC\(\).*got ChEES"):
        EnergyVarianceAdaptation().start(ChEES(), energy, state)


# ChEES


def best_length(seed: int) -> float:
    """T plus half a step (the rounding up), as learned on N(0, I) at a small step."""
    energy = Gaussian(torch.zeros(5, dtype=torch.float64))
    plan = ChEESAdaptation(WindowAdaptation(target_acceptance=0.99, metric=False))
    mcmc = MCMC(
        ChEES(),
        num_samples=1,
        warmup_steps=400,
        num_chains=64,
        seed=seed,
        adaptation=plan,
        progress=False,
    )
    mcmc.run(energy)
    kernel: Any = mcmc.kernel
    return kernel.trajectory_length + 0.5 * kernel.step_size


def assert_best_length() -> None:
    """The criterion is d sin^2 t, by hand. Its mean over t in (0, T) is largest where tan 2T = 2T,
    at T = 2.2467."""
    mean, se = mean_and_se([best_length(seed) for seed in range(12)])
    within_se(mean, 2.2467, se)
    assert float(se) < 0.1, "the length must be learned well, for the test to say something"


def test_chees_learns_the_length_that_theory_gives() -> None:
    assert_best_length()


def test_chees_samples_at_its_own_acceptance_and_needs_two_chains() -> None:
    energy = scales_gaussian(20, dtype=torch.float64)
    mcmc = MCMC(ChEES(), num_samples=200, warmup_steps=400, num_chains=64, seed=0, progress=False)
    mcmc.run(energy)
    x, kernel = mcmc.get_samples()["x"], mcmc.kernel
    assert isinstance(kernel, ChEES)
    assert abs(float(mcmc.get_stats()["acceptance_rate"].mean()) - 0.651) < 0.08
    assert (x.var(0) / energy.variance - 1).abs().max() < 0.1
    with pytest.raises(ValueError, match="requires at least 2 in a batch, got 1: increase"):
        MCMC(ChEES(), num_samples=1, num_chains=1, progress=False).run(energy)
    with pytest.raises(ValueError, match="trajectory length ChEESAdaptation learns, got MCLMC"):
        ChEESAdaptation().start(MCLMC(), energy, None)  # type: ignore[arg-type]


def test_a_nan_in_warm_up_does_not_reach_the_trajectory_length() -> None:
    energy = Fragile().double()
    mcmc = MCMC(ChEES(), num_samples=5, warmup_steps=100, num_chains=32, seed=0, progress=False)
    mcmc.run(energy, torch.linspace(-1.4, 1.4, 32, dtype=torch.float64))
    assert isinstance(mcmc.kernel, ChEES)
    assert int(mcmc.get_stats(warmup=True)["diverging"].sum()) > 0
    assert 0.05 < mcmc.kernel.trajectory_length < 50


# Minibatches


def posterior(batch_size: int, total: int = 6) -> MinibatchEnergy:
    data = normal(total, seed=4) + 1.0
    prior = Gaussian(torch.zeros(1, dtype=torch.float64))
    return MinibatchEnergy(prior, lambda x, d: 0.5 * ((d - x) ** 2).sum(-1), data, batch_size)


def assert_unbiased() -> None:
    """The mean over all 15 batches of two out of six."""
    energy, x = posterior(2), torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    batches = [
        value_and_grad(energy.on(torch.tensor(pair)), x)
        for pair in itertools.combinations(range(6), 2)
    ]
    assert len(batches) == 15
    for part, whole in zip(zip(*batches, strict=True), value_and_grad(energy, x), strict=True):
        torch.testing.assert_close(torch.stack(part).mean(0), whole)


def test_minibatch_gradients_are_unbiased_and_every_datum_is_drawn_alike() -> None:
    assert_unbiased()
    energy = posterior(2)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6, dtype=torch.float64)
    for _ in range(3000):
        counts += torch.isin(energy.data, energy.subsample(generator).data)
    within_se(counts / 3000, np.full(6, 1 / 3), math.sqrt(2 / 9 / 3000))


def test_minibatches_are_found_inside_other_views() -> None:
    energy, x = posterior(2), torch.tensor([[0.3]], dtype=torch.float64)
    part = energy.subsample(torch.Generator().manual_seed(0))(x)
    extra = Gaussian(torch.zeros(1, dtype=torch.float64))
    views = [(0.5 * energy, 0.5 * part), (energy + extra, part + extra(x))]
    for view, value in (
        *views,
        (Unconstrained(energy), part),
        (Compiled(Unconstrained(energy)), part),
    ):
        torch.testing.assert_close(view.subsample(torch.Generator().manual_seed(0))(x), value)
    with pytest.raises(
        ValueError, match="batch_size must be from 1 to the 6 rows of data, got batch_size=7"
    ):
        posterior(7)


def assert_sgld_theory() -> None:
    """With e = eps^2 / 2, precision L and gradient noise of variance V: variance (2 e + e^2 V) / (1
    - (1 - e L)^2)."""
    total = 50
    size = 5
    eps = 0.15
    energy = posterior(size, total)
    precision, spread = 1.0 + total, float(energy.data.var())
    noise = total**2 / size * spread * (1 - size / total)  # without replacement
    e = 0.5 * eps**2
    truth = (2 * e + e**2 * noise) / (1 - (1 - e * precision) ** 2)
    mean = float(energy.data.sum()) / precision
    kernel, generator = StochasticGradientLangevin(step_size=eps), torch.Generator().manual_seed(2)
    state, kept = kernel.init(energy, torch.full((16, 1), mean, dtype=torch.float64)), []
    for step in range(4200):
        state, _ = kernel.step(energy, state, generator)
        if step >= 200:
            kept.append(state.x[:, 0])
    # chains share their minibatches, so only stretches of time are independent
    draws = torch.stack(kept)
    for power, expected in ((1, 0.0), (2, truth)):
        blocks = ((draws - mean) ** power).reshape(40, -1).mean(1)
        within_se(blocks.mean(), expected, blocks.std() / math.sqrt(40), what=f"moment {power}")
    exact = 1 / precision
    assert float(((draws - mean) ** 2).mean()) > 1.5 * exact, (
        "the noise of the gradient must be felt, for the test to say something"
    )


def test_sgld_has_the_mean_and_the_variance_that_theory_gives() -> None:
    assert_sgld_theory()


def test_sgld_at_a_small_step_samples_the_posterior() -> None:
    energy = posterior(50, 50)
    draws = run(
        StochasticGradientLangevin(step_size=0.03),
        energy,
        torch.zeros(4000, 1, dtype=torch.float64),
        200,
    )[:, 0]
    square, se = mean_and_se((draws - float(energy.data.sum()) / 51) ** 2)
    within_se(square, 1 / 51 / (1 - 51 * 0.03**2 / 4), se)


def test_a_step_to_infinity_is_refused_where_the_energy_is_finite_too() -> None:
    class Cliff(Energy):  # its gradient at 0 is infinite, and its energy at minus infinity is not
        def forward(self, x: Tensor) -> Tensor:
            right = x >= 0.0
            return torch.atan(x) + torch.where(right, torch.sqrt(torch.where(right, x, 1.0)), 0.0)

    energy, kernel = Cliff().double(), StochasticGradientLangevin(step_size=0.1)
    assert value_and_grad(energy, torch.zeros(1, dtype=torch.float64))[1].tolist() == [math.inf]
    state = kernel.init(energy, torch.ones(2, dtype=torch.float64))
    state, info = kernel.step(
        energy, state._replace(x=torch.tensor([0.0, 2.0], dtype=torch.float64))
    )
    assert info.diverging.tolist() == [True, False]
    assert torch.isfinite(state.x).all()


def test_the_step_decays_by_the_schedule() -> None:
    energy, kernel = (
        Normal((2,)).double(),
        StochasticGradientLangevin(step_size=0.4, decay=0.6, delay=10.0),
    )
    state, sizes = kernel.init(energy, torch.zeros(3, 2, dtype=torch.float64)), []
    for _ in range(5):
        state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        sizes.append(float(info.step_size[0]))
    np.testing.assert_allclose(np.square(sizes), [0.16 * (1 + t / 10) ** -0.6 for t in range(5)])


def test_a_constrained_posterior_is_sampled_from_minibatches() -> None:
    data = torch.full((20,), 0.5)
    energy = MinibatchEnergy(
        Exponential(),
        lambda rate, d: (rate.unsqueeze(-1) * d - rate.unsqueeze(-1).log()).sum(-1),
        data,
        5,
    )
    mcmc = MCMC(
        StochasticGradientLangevin(step_size=0.1),
        num_samples=300,
        warmup_steps=50,
        num_chains=50,
        seed=0,
        progress=False,
    )
    mcmc.run(energy)
    # the posterior is Gamma(21, 11)
    assert abs(float(mcmc.get_samples()["x"].mean()) - 21 / 11) < 0.1


# Mutants: each is a plausible mistake, and a test above must see it


def test_mutant_barker_without_its_ratio_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barker, "logsigmoid", torch.zeros_like)
    with pytest.raises(AssertionError):
        assert_unchanged(KERNELS["barker"](), DoubleWell().double())


def test_mutant_random_walk_that_climbs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        random_walk,
        "metropolis",
        lambda old, new, error, *rest: metropolis(old, new, -error, *rest),
    )
    with pytest.raises(AssertionError):
        assert_unchanged(KERNELS["random-walk"](), DoubleWell().double())


def test_mutant_rejection_that_goes_straight_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def straight(old: Any, *rest: Any) -> Any:
        return metropolis(old._replace(momentum=-old.momentum), *rest)

    monkeypatch.setattr(underdamped, "metropolis", straight)
    with pytest.raises(AssertionError):
        assert_unchanged(KERNELS["metropolis-underdamped"](), DoubleWell().double())


@pytest.mark.parametrize(
    "check",
    [
        lambda: assert_unchanged(KERNELS["metropolis-underdamped"](), DoubleWell().double()),
        lambda: test_baoab_has_no_bias_in_the_positions_of_an_oscillator(0.5, 1.0, 1.0),
    ],
)
def test_mutant_refreshment_with_the_wrong_noise_is_caught(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(
        p: Tensor, time: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        keep = torch.exp(-time)
        return keep * p + torch.sqrt(temperature * (1 - keep)) * torch.randn(
            p.shape, generator=generator, dtype=p.dtype
        )

    monkeypatch.setattr(underdamped, "partial_refreshment", wrong)
    with pytest.raises(AssertionError):
        check()


def test_mutant_microcanonical_step_without_its_jacobian_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(*args: Any) -> tuple[Tensor, ...]:
        *rest, change = isokinetic_leapfrog(*args)
        return *rest, 0.0 * change

    monkeypatch.setattr(microcanonical, "isokinetic_leapfrog", forgetful)
    with pytest.raises(AssertionError):
        assert_unchanged(KERNELS["adjusted-mclmc"](), Pair(DoubleWell().double()))


def test_mutant_chees_that_descends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = ensemble._slope
    monkeypatch.setattr(ensemble, "_slope", lambda *args: -slope(*args))
    with pytest.raises(AssertionError):
        assert_best_length()


def test_mutant_minibatch_of_the_wrong_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MinibatchEnergy, "forward", lambda self, x: self.prior(x) + self.loss(x, self.data)
    )
    for check in (assert_unbiased, assert_sgld_theory):
        with pytest.raises(AssertionError):
            check()
