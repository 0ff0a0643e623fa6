"""Every exact kernel on the targets of the field whose answers are known: one table of kernels, one
of targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.discrete_cases import (
    DISCRETE,
    Bipartite,
    assert_forgets,
    assert_stationary,
    state_probabilities,
)
from lib.discrete_cases import EXACT as DISCRETE_EXACT
from lib.kernel_cases import EXACT, KERNELS, build, run
from lib.pyro_models import EFFECT, SIGMA, eight_schools
from lib.tempered import state_at
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm import HMC, MCMC, ULA, Energy, ModelEnergy, ParallelTempering
from pyroebm.core import spin
from pyroebm.kernels import Kernel, WindowAdaptation, hamiltonian
from pyroebm.targets import Banana, Funnel, GaussianMixture, Rosenbrock
from pyroebm.targets.curved import _Bent

Statistic = tuple[str, Tensor, Any]


def standard(z: Tensor) -> list[Statistic]:
    """What is known of standard normal numbers; a share, as a few that went astray would hide in
    the error of a moment."""
    ones = np.ones(z.shape[1:])
    powers = [
        (f"moment {power}", z**power, truth * ones)
        for power, truth in ((1, 0.0), (2, 1.0), (4, 3.0))
    ]
    return [
        *powers,
        ("share within a deviation", (z.abs() < 1.0).double(), math.erf(math.sqrt(0.5)) * ones),
    ]


def moments(energy: Any, x: Tensor) -> list[Statistic]:
    return [("mean", x, energy.mean), ("variance", (x - energy.mean) ** 2, energy.variance)]


def bent(energy: _Bent, x: Tensor) -> list[Statistic]:
    """With them, moments of the distance to the bend: a bias across it hardly shows in the variance
    along it."""
    bend, shift = energy.curve
    z = (x[:, 1] - bend * x[:, 0] ** 2 - shift) / math.sqrt(energy.noise)
    return [*moments(energy, x), *standard(z)]


def normal_moments(energy: Funnel, x: Tensor) -> list[Statistic]:
    return standard(energy.whiten(x))


def masses(energy: GaussianMixture, x: Tensor) -> list[Statistic]:
    return [*moments(energy, x), ("mass", energy.responsibilities(x), energy.mode_weights)]


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]], dtype=torch.float64)
    return GaussianMixture(means, scale=0.7, weights=[0.6, 0.3, 0.1])


#: One line for a target: what makes it, and statistics of draws with their exact expectations.
TARGETS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], list[Statistic]]]] = {
    "banana": (lambda: Banana(dtype=torch.float64), bent),
    "rosenbrock": (lambda: Rosenbrock(dtype=torch.float64), bent),
    "funnel": (lambda: Funnel(dim=4, dtype=torch.float64), normal_moments),
    "mixture": (mixture, masses),
}


def assert_kept(kernel: Kernel[Any], target: str, chains: int = 10_000, steps: int = 6) -> None:
    """From exact draws, every statistic is as before."""
    make, statistics = TARGETS[target]
    energy = make()
    x = run(kernel, energy, energy.sample(chains, torch.Generator().manual_seed(0)), steps)
    for what, values, truth in statistics(energy, x):
        mean, se = mean_and_se(values)
        within_se(mean, np.asarray(truth), se, what=what)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_keep_their_moments(name: str, target: str) -> None:
    kernel = build(name, tuple(TARGETS[target][0]().event_shape))
    # Where the funnel is wide a tree has 1,000 leaves; one that is cut off early is exact as well.
    assert_kept(
        kernel.replace(max_tree_depth=4) if hasattr(kernel, "max_tree_depth") else kernel, target
    )


@pytest.mark.parametrize("target", TARGETS)
def test_mutant_without_metropolis_is_caught_on_every_target(target: str) -> None:
    # in a steep valley it goes to where squares overflow
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        assert_kept(ULA(step_size=0.8), target)


@pytest.mark.parametrize("target", TARGETS)
def test_mutant_with_loud_momenta_is_caught_on_every_target(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = hamiltonian.draw_momentum
    monkeypatch.setattr(hamiltonian, "draw_momentum", lambda q, generator: 1.2 * draw(q, generator))
    with pytest.raises(AssertionError):
        assert_kept(KERNELS["hmc"](), target, 20_000)


# Tempering, from exact draws at all temperatures


def tempered(target: str, beta: float) -> Callable[[int, torch.Generator], Tensor]:
    """Exact draws at an inverse temperature: the bent normals of larger variances, and a funnel
    that opens further up."""
    energy = TARGETS[target][0]()
    if isinstance(energy, _Bent):
        (location, variance), (bend, shift) = energy.first, energy.curve
        return _Bent(
            location, variance / beta, bend, shift, energy.noise / beta, torch.float64
        ).sample
    n, v = energy.event_shape[0] - 1, energy.theta_variance

    def funnel(count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, n + 1, generator=generator, dtype=torch.float64)
        theta = n * (1 - beta) * v / (2 * beta) + math.sqrt(v / beta) * noise[:, :1]
        return torch.cat([theta, torch.exp(theta / 2) * noise[:, 1:] / math.sqrt(beta)], 1)

    return funnel


@pytest.mark.parametrize("target", ["banana", "rosenbrock", "funnel"])
def test_tempering_keeps_their_moments(target: str) -> None:
    make, statistics = TARGETS[target]
    energy, generator = make(), torch.Generator().manual_seed(0)
    kernel = ParallelTempering(HMC(step_size=0.3, num_steps=3), [1.0, 0.9, 0.8])
    x = torch.stack(
        [tempered(target, beta)(10_000, generator) for beta in kernel.betas.tolist()], 1
    )
    state = state_at(kernel, energy, x, generator)
    generator.manual_seed(1)
    for _ in range(6):
        state, _ = kernel.step(energy, state, generator)
    assert float(kernel.report(state).swap_rates.min()) > 0.3, (
        "replicas must swap, for the test to say something"
    )
    for what, values, truth in statistics(energy, state.x):
        mean, se = mean_and_se(values)
        within_se(mean, np.asarray(truth), se, what=what)


# Eight schools: warmed up and drawn as a user would


class EightSchools(Energy):
    """The non-centered posterior of ``test_model_energy.eight_schools`` by hand: mu, log tau and z
    in one vector."""

    def __init__(self) -> None:
        super().__init__((10,))
        self.register_buffer("y", torch.tensor(EFFECT, dtype=torch.float64))
        self.register_buffer("sigma", torch.tensor(SIGMA, dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        mu = u[..., 0]
        log_tau = u[..., 1]
        z = u[..., 2:]
        residual = (self.y - self.effects(u)) / self.sigma
        prior = (
            mu**2 / 50 + torch.log1p(torch.exp(2 * log_tau) / 25) - log_tau + 0.5 * (z**2).sum(-1)
        )
        return prior + 0.5 * (residual**2).sum(-1)

    def effects(self, u: Tensor) -> Tensor:
        return u[..., :1] + torch.exp(u[..., 1:2]) * u[..., 2:]


@functools.cache
def eight_schools_truth() -> tuple[np.ndarray, np.ndarray]:
    """E[x] and E[x^2] of mu, tau, the effects and log tau: given tau all is normal, and one
    quadrature is left."""
    y, sigma = np.array(EFFECT), np.array(SIGMA)
    log_tau = np.linspace(-15.0, 12.0, 20_001)
    tau = np.exp(log_tau)[:, None]
    variance = sigma**2 + tau**2
    precision = 1 / 25 + (1 / variance).sum(1)
    mu = (y / variance).sum(1) / precision
    log_weight = -0.5 * (
        np.log(variance).sum(1) + np.log(precision) + (y**2 / variance).sum(1) - precision * mu**2
    )
    log_weight += log_tau - np.log1p((tau[:, 0] / 5) ** 2)
    weights = np.exp(log_weight - log_weight.max())
    share = sigma**2 / variance  # of mu in an effect
    theta = share * mu[:, None] + (1 - share) * y
    spread = share * tau**2 + share**2 / precision[:, None]
    first = np.column_stack([mu, tau[:, 0], theta, np.log(tau[:, 0])])
    second = np.column_stack(
        [mu**2 + 1 / precision, tau[:, 0] ** 2, theta**2 + spread, np.log(tau[:, 0]) ** 2]
    )
    return np.average(first, axis=0, weights=weights), np.average(second, axis=0, weights=weights)


@pytest.mark.usefixtures("float64")
def test_the_quadrature_is_what_was_published_and_the_energy_is_the_models() -> None:
    """posteriordb's 10,000 reference draws: standard errors of its means, and of its second moments
    about 2 % at most."""
    first, second = (moment[[0, 1, 2, 9]] for moment in eight_schools_truth())
    within_se(first, [4.4105, 3.6021, 6.1505, 4.8840], np.array([0.033, 0.032, 0.056, 0.05]))
    np.testing.assert_allclose(second, [30.403, 23.204, 69.363, 52.128], rtol=0.03)
    u = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = ModelEnergy(
        eight_schools,
        torch.tensor(EFFECT, dtype=torch.float64),
        torch.tensor(SIGMA, dtype=torch.float64),
    )
    torch.testing.assert_close(
        (model(u) - EightSchools()(u)).diff(),
        torch.zeros(5, dtype=torch.float64),
        atol=1e-10,
        rtol=0,
    )


#: One line for a kernel: warm-up and draws that it needs.
SCHOOLS: dict[str, tuple[int, int]] = {
    "mala": (300, 4000),
    "hmc": (200, 300),
    "nuts": (150, 150),
    "lockstep": (150, 150),
    "random-walk": (1600, 4000),
    "barker": (400, 2000),
    "metropolis-underdamped": (400, 1500),
    "adjusted-mclmc": (200, 400),
    "chees": (200, 300),
    "tempering": (200, 400),
}


def test_every_exact_kernel_is_in_the_table() -> None:
    kernels = [make() for make in KERNELS.values()]
    # those that take a proposal are held to modes far apart in test_independence.py
    assert {type(KERNELS[name]()) for name in SCHOOLS} == {
        type(k) for k in kernels if k.exact and not hasattr(k, "proposal")
    }


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools(name: str) -> None:
    energy, (warmup, count) = EightSchools(), SCHOOLS[name]
    options: dict[str, Any] = {"save_warmup": False, "compile": False, "progress": False}
    # with the steps of its own .574 a chain may stay for long where tau is large
    if name == "mala":
        options["adaptation"] = WindowAdaptation(target_acceptance=0.8)
    mcmc = MCMC(KERNELS[name](), count, warmup, 64, seed=1, **options)
    mcmc.run(energy)
    u = mcmc.get_samples(group_by_chain=True)["x"]
    # log tau, since the tail of tau^2 is heavy
    x = torch.cat([u[..., :1], energy.effects(u), u[..., 1:2]], -1)
    for power, moments in zip((1, 2), eight_schools_truth(), strict=True):
        truth = np.delete(moments, 1)
        mean, se = mean_and_se((x**power).mean(1))  # of chains, which are independent
        assert (se < 0.08 * truth).all(), "the error must be small, for the test to say something"
        within_se(mean, truth, se, what=f"moment {power}")


# Boltzmann machines, enumerated


class Machine(Bipartite):
    r"""A Boltzmann machine :math:`E = -\frac12 x^\top W x - b^\top x` of given weights, its blocks
    without inner couplings."""

    def __init__(
        self,
        support: Constraint,
        values: list[list[float]],
        w: Tensor,
        b: Tensor,
        blocks: dict[str, slice],
    ) -> None:
        Energy.__init__(self, (len(b),), support)
        self.values, self.blocks = values, blocks
        self.register_buffer("w", w.double())
        self.register_buffer("b", b.double())


def three_spins() -> Machine:
    """A lecture's table: w12 = w13 = -1, w23 = 2, b2 = 1."""
    w = torch.tensor([[0.0, -1.0, -1.0], [-1.0, 0.0, 2.0], [-1.0, 2.0, 0.0]])
    blocks = {f"spin {i}": slice(i, i + 1) for i in range(3)}
    return Machine(spin, [[-1.0], [1.0]], w, torch.tensor([0.0, 1.0, 0.0]), blocks)


def restricted() -> Machine:
    """Four visible and three hidden bits, W_ij = sin(3 i + j + 1)."""
    i, j = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(3.0, dtype=torch.float64)
    w = torch.zeros(7, 7, dtype=torch.float64)
    w[:4, 4:] = torch.sin(3 * i + j + 1)
    b = torch.cat([torch.cos(i[:, 0] + 1), torch.sin(2 * j + 1) / 2])
    return Machine(
        constraints.boolean,
        [[0.0], [1.0]],
        w + w.T,
        b,
        {"visible": slice(0, 4), "hidden": slice(4, 7)},
    )


#: The machine, its log Z and the means of its first units, from other people's enumerations.
MACHINES: dict[str, tuple[Callable[[], Machine], float, list[float]]] = {
    "three spins": (three_spins, math.log(172.42019), [-0.730641, 0.761594, 0.754214]),
    "restricted": (restricted, 5.321338579890, [0.860216, 0.151057, 0.602665, 0.127165]),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_machines_are_those_of_the_tables(machine: str) -> None:
    make, log_z, means = MACHINES[machine]
    energy = make()
    states = energy.states()
    np.testing.assert_allclose(float(torch.logsumexp(-energy(states), 0)), log_z, atol=1e-8)
    np.testing.assert_allclose(
        (state_probabilities(energy) @ states)[: len(means)], means, atol=1e-6
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", DISCRETE_EXACT)
def test_boltzmann_machines_are_sampled_exactly(name: str, machine: str) -> None:
    energy = MACHINES[machine][0]()
    assert_stationary(DISCRETE[name](), energy, chains=20_000)
    # the three spins have two modes, between which a single flip hardly leads
    if machine == "restricted":
        assert_forgets(
            DISCRETE[name](), energy, 100 if name in ("gibbs-with-gradients", "dmala") else 40
        )
