"""log Z by every estimator against exact values; its kinds, its biases over many runs, and mutants
that must be caught."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.machines import LOG_Z
from lib.machines import oracle_rbm as oracle
from lib.reseed import problem_generator
from torch import Tensor

from pyroebm import HMC, MALA, MCMC, ULA, Energy, Gibbs, partition
from pyroebm.core import GeometricPath, Unnormalized, spin
from pyroebm.core.enumeration import all_bits
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    DeepBeliefNetwork,
    DeepBoltzmannMachine,
    GaussianRBM,
    Ising,
    Layers,
    Potts,
)
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.flows import importance_sample
from pyroebm.kernels import BlockGibbs
from pyroebm.partition import (
    BidirectionalAIS,
    IndependentLayers,
    LayeredPath,
    LayerGibbs,
    LogZ,
    annealing,
    bridging,
    estimators,
    kernel_path,
    layered,
)
from pyroebm.partition.result import from_weights
from pyroebm.targets import (
    Checkerboard,
    DoubleWell,
    Exponential,
    Gaussian,
    GaussianMixture,
    HalfDisc,
)

F64 = torch.float64


def grbm() -> GaussianRBM:
    weight = torch.tensor([[1.5, -0.7, 0.4], [0.3, 0.9, -1.2]], dtype=F64)
    log_sigma, bias = torch.tensor([-0.3, 0.2], dtype=F64), torch.tensor([0.5, -0.4], dtype=F64)
    return GaussianRBM(
        2,
        3,
        weight=weight,
        visible_bias=bias,
        hidden_bias=bias.new_tensor([0.1, -0.2, 0.3]),
        log_sigma=log_sigma,
        dtype=F64,
    )


class Deep(LayeredEnergy):
    """Three layers, as a deep Boltzmann machine has them; the first real where there is a
    precision."""

    def __init__(self, sizes: tuple[int, int, int], gaussian: bool, seed: int) -> None:
        super().__init__(sizes, gaussian)
        generator = problem_generator(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        weights, biases = (
            (normal(sizes[0], sizes[1]), normal(sizes[1], sizes[2])),
            tuple(normal(n) for n in sizes),
        )
        self.parts = Layers(
            weights, biases, normal(sizes[0]).exp() if gaussian else None, normal(1).squeeze()
        )
        self.double()

    def layers(self) -> Layers:
        return self.parts


def deep(gaussian: bool = False) -> Deep:
    return Deep((2, 3, 2), True, 3) if gaussian else Deep((4, 3, 3), False, 2)


def data_of(energy: Energy) -> Tensor:
    generator = problem_generator(99)
    if isinstance(energy, GaussianRBM):
        return 1.5 * torch.randn(200, 2, generator=generator, dtype=F64) + 1.0
    return (torch.rand(200, 4, generator=generator) < torch.tensor([0.8, 0.2, 0.6, 0.2])).double()


def randomised(machine: Any, seed: int = 11) -> Any:
    """The machine with normal numbers for parameters."""
    generator = problem_generator(seed)
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter.copy_(0.8 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return machine


def boltzmann() -> BoltzmannMachine:
    """Nine spins, three of them hidden, each tied to each."""
    weight = 0.5 * torch.randn(9, 9, generator=problem_generator(12), dtype=F64).triu(1)
    return BoltzmannMachine(6, 3, units="spins", weight=weight + weight.mT, dtype=F64)


class Spins(Energy):
    """Three spins of a lecture: w12 = w13 = -1, w23 = 2, b2 = 1."""

    event_shape = torch.Size([3])
    support = spin

    def forward(self, x: Tensor) -> Tensor:
        return (
            x[..., 0] * x[..., 1] + x[..., 0] * x[..., 2] - 2.0 * x[..., 1] * x[..., 2] - x[..., 1]
        )


# Exact


@pytest.mark.parametrize(
    ("energy", "truth", "method"),
    [
        (oracle(), LOG_Z, "of one side"),
        (oracle().joint(), LOG_Z, "of one side"),
        (oracle() * 1.0, LOG_Z, "sum over 2^4 states"),
        (oracle().joint() * 1.0, LOG_Z, "sum over 2^7 states"),
        (Spins().double(), math.log(172.42019), "sum over 2^3 states"),
        (Ising((3, 3), 0.2, dtype=F64), 6.669745, "known"),
        (Ising((3, 3), 0.6, dtype=F64) * 1.0, 11.587695, "sum over 2^9 states"),
        (Ising((4, 4), 0.4406868, dtype=F64) * 1.0, 15.521916, "sum over 2^16 states"),
        (
            Potts((2, 3), 3, 0.5, periodic=False, dtype=F64) * 1.0,
            Potts((2, 3), 3, 0.5, periodic=False, dtype=F64).log_z,
            "9.51",
        ),
    ],
)
def test_exact_values(energy: Energy, truth: float, method: str) -> None:
    result = partition.exact(energy)
    assert math.isclose(result.value, truth, abs_tol=2e-6 if truth != LOG_Z else 1e-11)
    assert (result.kind, result.standard_error, result.ess) == ("exact", 0.0, None)
    assert method in result.method


def test_exact_layers_are_summed_over_all_states() -> None:
    energy = deep()
    brute = torch.logsumexp(-energy(all_bits(10, dtype=F64)), 0)
    assert math.isclose(partition.exact(energy).value, float(brute), abs_tol=1e-12)


def test_exact_is_in_float64_whatever_the_energy_is() -> None:
    """The parameters are rounded, the sum over their states is not: that of the same parameters in
    float64 is the same number."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).triu(1)
    dense = BoltzmannMachine(
        16,
        weight=weight + weight.mT,
        bias=3.0 * torch.randn(16, generator=torch.Generator().manual_seed(1)),
    )
    for machine in (oracle(dtype=torch.float32), dense):
        double = copy.deepcopy(machine).double()
        truth = float(
            torch.logsumexp(-double(all_bits(double.event_shape[0], dtype=F64)), 0).detach()
        )
        for found in (partition.exact(machine).value, machine.log_z):
            assert math.isclose(found, truth, rel_tol=1e-13)
    assert math.isclose(partition.exact(oracle(dtype=torch.float32)).value, LOG_Z, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("energy", "bounds", "truth"),
    [
        (DoubleWell(dtype=F64), None, 5.0322840086),
        (
            Gaussian(torch.tensor([3.0, 1e3], dtype=F64), covariance=[[2.0, 0.6], [0.6, 1.0]]),
            None,
            2.0852,
        ),
        (
            Gaussian(torch.tensor(-40.0, dtype=F64), scale=1e-3),
            None,
            0.5 * math.log(2 * math.pi) + math.log(1e-3),
        ),
        (Gaussian(torch.tensor(0.0, dtype=F64)), [(0.0, 20.0)], 0.5 * math.log(math.pi / 2)),
        (Exponential(dtype=F64), None, 0.0),
        (grbm(), None, partition.exact(grbm()).value),
    ],
    ids=["double well", "far away", "narrow", "half a normal", "positive", "GRBM"],
)
def test_quadrature(energy: Energy, bounds: list[tuple[float, float]] | None, truth: float) -> None:
    result = partition.quadrature(energy, bounds)
    assert math.isclose(result.value, truth, abs_tol=1e-4 if truth == 2.0852 else 1e-8)
    assert result.kind == "exact"
    assert result.standard_error <= 1e-8


def test_quadrature_says_where_it_is_not_exact() -> None:
    """At an edge two rules may agree by chance: the error holds wherever the edges lie between the
    nodes."""
    energy, noise = HalfDisc(dtype=F64), torch.Generator().manual_seed(0)
    for low, high in (1.0 + 0.002 * torch.rand(60, 2, generator=noise, dtype=F64)).tolist():
        result = partition.quadrature(energy, [(-low, high)])
        assert result.kind == "estimate"
        within_se(result.value, energy.log_z, result.standard_error)


def test_expectations_by_quadrature() -> None:
    """Moments, probabilities of regions and a divergence, against closed forms."""
    distribution = Gaussian(
        torch.tensor([1.0, -2.0], dtype=F64), covariance=[[2.0, 0.6], [0.6, 1.0]]
    )
    moments, change = partition.expectation(
        distribution, lambda x: torch.cat([x, (x - distribution.mean) ** 2], 1)
    )
    torch.testing.assert_close(
        moments, torch.tensor([1.0, -2.0, 2.0, 1.0], dtype=F64), rtol=0.0, atol=1e-6
    )
    assert change <= 1e-6
    other = Gaussian(torch.zeros(2, dtype=F64))
    kl, _ = partition.expectation(
        distribution, lambda x: other(x) + other.log_z - distribution(x) - distribution.log_z
    )
    distributions = [dist.MultivariateNormal(e.mean, e.covariance) for e in (distribution, other)]
    assert float(kl) == pytest.approx(
        float(torch.distributions.kl_divergence(*distributions)), abs=1e-8
    )
    well = DoubleWell(dtype=F64)
    right, change = partition.expectation(well, lambda x: (x > well.barrier).double())
    assert change <= 1e-6
    assert float(right) == pytest.approx(well.right_mass, abs=1e-5)
    # in the energy's own coordinates
    rate, _ = partition.expectation(Exponential(2.5, dtype=F64), lambda x: x)
    assert float(rate) == pytest.approx(0.4, abs=1e-8)


@pytest.mark.parametrize("low", [0.1, 0.3, -0.05])
def test_a_small_region_is_not_overlooked(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The few nodes of the coarsest panels all miss it, twice: that is no convergence."""
    # the error at the edges of the region decreases with the number of panels alone
    monkeypatch.setitem(partition.numeric.MAX_PANELS, 1, 2**15)
    distribution = Gaussian(torch.zeros(1, dtype=F64))
    found, error = partition.expectation(
        distribution,
        lambda x: ((x > low) & (x < low + 0.1)).double().squeeze(1),
        tolerance=1e-4,
    )
    truth = 0.5 * (math.erf((low + 0.1) / math.sqrt(2.0)) - math.erf(low / math.sqrt(2.0)))
    assert error <= 1e-4
    assert float(found) == pytest.approx(truth, abs=1e-4)
    plane = Gaussian(torch.zeros(2, dtype=F64))
    found, _ = partition.expectation(
        plane, lambda x: ((x > low) & (x < low + 0.5)).all(1).double(), tolerance=1e-4
    )
    side = 0.5 * (math.erf((low + 0.5) / math.sqrt(2.0)) - math.erf(low / math.sqrt(2.0)))
    assert float(found) == pytest.approx(side**2, abs=3e-3)


def test_weights_of_modes_by_quadrature() -> None:
    distribution = GaussianMixture(
        [[-2.0, 0.0], [2.0, 0.0]], scale=0.5, weights=[0.9, 0.1], dtype=F64
    )
    found, change = partition.expectation(
        distribution,
        lambda x: torch.nn.functional.one_hot(distribution.mode_of(x), 2),
        tolerance=1e-4,
    )
    border = math.log(9.0) / 16.0
    left, right = (0.5 * math.erfc(-(border + side) / math.sqrt(0.5)) for side in (2.0, -2.0))
    assert change <= 1e-4
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(found[0]) == pytest.approx(0.9 * left + 0.1 * right, abs=1e-4)


def test_expectations_refuse_what_is_no_function() -> None:
    distribution = Gaussian(torch.zeros(2, dtype=F64))
    with pytest.raises(ValueError, match=r"function must map .* got shape \(\)"):
        partition.expectation(distribution, lambda x: x.sum())
    with pytest.raises(FloatingPointError, match="function is NaN"):
        partition.expectation(distribution, lambda x: x[:, 0].log())
    board = Checkerboard(dtype=F64)  # where the density is 0 the function is not asked
    area, _ = partition.expectation(
        board, lambda x: torch.where(board(x) < math.inf, 1.0, math.nan), [(-4.0, 4.0)] * 2
    )
    assert float(area) == pytest.approx(1.0, abs=1e-12)


# Every estimator, within its standard errors


ISING = Ising((3, 3), 0.4406868, dtype=F64)
RUNS: dict[str, tuple[Energy, Callable[[Energy], LogZ], float]] = {}


def run(name: str, energy: Energy, estimate: Callable[[Energy], LogZ], most: float = 0.1) -> None:
    RUNS[name] = (energy, estimate, most)


def base(energy: Energy) -> Energy | Layers:
    return partition.base_rates(energy, data_of(energy))


run("AIS RBM", oracle(), lambda e: partition.ais(e, base(e), betas=100))
run("AIS RBM, uniform", oracle(), lambda e: partition.ais(e, betas=100))
run("AIS joint", oracle().joint(), lambda e: partition.ais(e, base(e), betas=100))
run("AIS RBM by sites", oracle(), lambda e: partition.ais(e, base(e), Gibbs(), betas=50))
run("AIS GRBM", grbm(), lambda e: partition.ais(e, base(e), betas=100))
run("AIS GRBM, own variances", grbm(), lambda e: partition.ais(e, betas=100))
run(
    "AIS GRBM by HMC",
    grbm(),
    lambda e: partition.ais(e, Gaussian(torch.zeros(2, dtype=F64), scale=2.0), betas=50),
)
run("AIS deep", deep(), lambda e: partition.ais(e, betas=200))
run("AIS deep Gaussian", deep(True), lambda e: partition.ais(e, betas=200))
run("AIS Ising", ISING, lambda e: partition.ais(e, betas=60), 0.2)
for side, coupling, steps in ((4, 0.2, 30), (4, 0.4406868, 100), (8, 0.2, 40), (8, 0.4406868, 160)):
    run(
        f"AIS Ising {side}, {coupling}",
        Ising((side, side), coupling, dtype=F64),
        lambda e, n=steps: partition.ais(e, betas=n),
        0.4,
    )
run("AIS Ising in order", Ising((3, 3), 0.6, dtype=F64), lambda e: partition.ais(e, betas=60), 0.4)
run(
    "AIS double well",
    DoubleWell(dtype=F64),
    lambda e: partition.ais(e, dist.Normal(torch.tensor(0.0, dtype=F64), 2.0), betas=60),
)
run(
    "AIS half-disc",
    HalfDisc(dtype=F64),
    lambda e: partition.ais(e, Gaussian(torch.tensor(0.0, dtype=F64)), MALA(0.5), betas=50),
    0.2,
)
run(
    "AIS positive",
    Exponential(dtype=F64),
    lambda e: partition.ais(e, dist.Gamma(torch.tensor(2.0, dtype=F64), 2.0), betas=60),
)
run("reverse RBM", oracle(), lambda e: partition.reverse_ais(e, base(e), betas=100))
run("reverse GRBM", grbm(), lambda e: partition.reverse_ais(e, base(e), betas=100))
run("reverse deep", deep(), lambda e: partition.reverse_ais(e, betas=200))
run("reverse deep Gaussian", deep(True), lambda e: partition.reverse_ais(e, betas=200))
run(
    "reverse double well",
    DoubleWell(dtype=F64),
    lambda e: partition.reverse_ais(
        e, base=Gaussian(torch.tensor(0.0, dtype=F64)), betas=300, num_chains=400
    ),
)
run("both ways RBM", oracle(), lambda e: partition.bidirectional_ais(e, betas=30).combined)
run("both ways deep", deep(), lambda e: partition.bidirectional_ais(e, betas=30).combined)
run("SMC RBM", oracle(), lambda e: partition.smc(e, base(e), num_particles=256))
run("SMC GRBM", grbm(), lambda e: partition.smc(e, num_particles=256))
run("SMC deep", deep(), lambda e: partition.smc(e, num_particles=256))
run("SMC Ising", ISING, lambda e: partition.smc(e, num_particles=128))
run(
    "SMC double well",
    DoubleWell(dtype=F64),
    lambda e: partition.smc(
        e, Gaussian(torch.tensor(0.0, dtype=F64), scale=2.0), num_particles=256
    ),
)
run("bridge RBM", oracle(), lambda e: partition.bridge(e, base=base(e)))
run("bridge GRBM", grbm(), lambda e: partition.bridge(e, base=base(e)))
run(
    "bridge double well",
    DoubleWell(dtype=F64),
    lambda e: partition.bridge(e, base=Gaussian(torch.tensor(0.0, dtype=F64), scale=2.0)),
)
run(
    "TI RBM",
    oracle(),
    lambda e: partition.thermodynamic_integration(e, base(e), num_temperatures=8, num_samples=150),
)
run(
    "TI GRBM",
    grbm(),
    lambda e: partition.thermodynamic_integration(e, base(e), num_temperatures=16, num_samples=150),
)
run(
    "TI deep",
    deep(),
    lambda e: partition.thermodynamic_integration(e, num_temperatures=16, num_samples=150),
)
run(
    "TI Ising",
    ISING,
    lambda e: partition.thermodynamic_integration(
        e, num_temperatures=10, num_samples=100, warmup_steps=60
    ),
)
run(
    "TI double well",
    DoubleWell(dtype=F64),
    lambda e: partition.thermodynamic_integration(
        e,
        Gaussian(torch.tensor(0.0, dtype=F64), scale=1.5),
        None,
        num_temperatures=32,
        num_samples=100,
        warmup_steps=100,
    ),
)
run(
    "importance RBM",
    oracle(),
    lambda e: (
        importance_sample(
            dist.Bernoulli(torch.full((4,), 0.5, dtype=F64)).to_event(1), e, 5_000
        ).log_z
    ),
)
run("AIS Boltzmann machine", boltzmann(), lambda e: partition.ais(e, betas=60), 0.3)
run(
    "AIS DBM",
    randomised(DeepBoltzmannMachine((4, 3, 2), dtype=F64)),
    lambda e: partition.ais(e, betas=100),
)
run(
    "AIS DBM of four layers",
    randomised(DeepBoltzmannMachine((3, 4, 3, 2), dtype=F64)),
    lambda e: partition.ais(e, betas=100),
)
run(
    "AIS Gaussian DBM",
    randomised(DeepBoltzmannMachine((2, 3, 2), visible="gaussian", dtype=F64)),
    lambda e: partition.ais(e, betas=100),
)
run(
    "reverse DBM",
    randomised(DeepBoltzmannMachine((4, 3, 2), dtype=F64)),
    lambda e: partition.reverse_ais(e, betas=100),
)
run(
    "AIS DBN",
    randomised(DeepBeliefNetwork((3, 3, 2), dtype=F64)).joint(),
    lambda e: partition.ais(e, betas=60),
    0.3,
)
run(
    "importance",
    DoubleWell(dtype=F64),
    lambda e: importance_sample(dist.Normal(torch.tensor(-1.0, dtype=F64), 1.2), e, 20_000).log_z,
)


@pytest.mark.parametrize("name", RUNS)
def test_all_agree_with_the_exact_value(name: str) -> None:
    energy, estimate, most = RUNS[name]
    result = estimate(energy)
    assert result.standard_error < most
    within_se(
        result.value, partition.exact(energy).value, result.standard_error, what=f"log Z ({result})"
    )


def test_bridge_counts_what_the_draws_of_a_chain_are_worth() -> None:
    joint = oracle().joint()
    mcmc = MCMC(BlockGibbs(), num_samples=500, warmup_steps=50, num_chains=8, seed=7)
    mcmc.run(joint)
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    chains, alone = (
        partition.bridge(joint, draws=draws),
        partition.bridge(joint, draws=draws.flatten(0, 1)),
    )
    within_se(chains.value, LOG_Z, chains.standard_error)
    assert chains.standard_error > alone.standard_error


# Kinds


def test_kinds() -> None:
    energy, wide = DoubleWell(dtype=F64), Gaussian(torch.tensor(0.0, dtype=F64), scale=2.0)
    machine, states = oracle(), oracle().initial(20, torch.Generator().manual_seed(1))
    assert partition.ais(machine, betas=5).kind == "lower"
    assert partition.ais(energy, wide, MALA(), betas=5).kind == "lower"
    assert partition.ais(energy, wide, ULA(), betas=5).kind == "estimate"
    assert partition.reverse_ais(machine, betas=5).kind == "upper"
    assert partition.reverse_ais(machine, draws=states, betas=5).kind == "estimate"
    assert (
        partition.reverse_ais(machine.joint(), draws=machine.joint().initial(20), betas=5).kind
        == "estimate"
    )
    assert (
        partition.reverse_ais(machine, draws=machine.joint().initial(20), betas=5).kind
        == "estimate"
    )
    assert partition.reverse_ais(energy, wide, ULA(), betas=5).kind == "estimate"
    assert (
        partition.reverse_ais(energy, wide, MALA(), draws=energy.sample(20), betas=5).kind
        == "estimate"
    )
    assert partition.smc(energy, wide, MALA(), num_particles=64).kind == "estimate"
    pilot = partition.estimators.tempered_smc(energy, wide, MALA(), num_particles=64)
    assert (
        partition.smc(
            energy,
            wide,
            MALA(),
            num_particles=64,
            pilot=pilot,
            generator=torch.Generator().manual_seed(1),
        ).kind
        == "lower"
    )
    assert partition.bridge(energy, base=wide, num_samples=100).kind == "estimate"
    assert (
        importance_sample(dist.Normal(torch.tensor(-1.0, dtype=F64), 1.2), energy, 100).log_z.kind
        == "lower"
    )


def test_a_result_says_what_it_is() -> None:
    both = partition.bidirectional_ais(oracle(), betas=10, num_chains=20)
    assert isinstance(both, BidirectionalAIS)
    assert [line.split("(")[1].split(":")[0] for line in str(both).splitlines()] == [
        "AIS; lower",
        "reverse AIS; upper",
        "AIS both ways; estimate",
    ]
    assert both.width == both.reverse.value - both.forward.value
    assert both.forward.log_weights is not None
    assert both.forward.log_weights.dtype == F64
    assert both.forward.log_weights.shape == (20,)
    assert f"ESS {both.forward.ess:.4g} of 20" in str(both.forward)
    assert "high on average" in both.reverse.bias
    one = partition.bidirectional_ais(oracle(), betas=10, num_chains=1)
    assert all(
        math.isnan(result.standard_error) for result in (one.forward, one.reverse, one.combined)
    )
    with pytest.raises(ValueError, match=r"kind must be one of .* got kind='bound'"):
        LogZ(0.0, 0.0, "bound", "a guess")  # type: ignore[arg-type]


# Unbiased in Z, on its side in log Z: short schedules, where bias is large

SHORT = 4
MANY = 20_000


def ratio(result: LogZ, truth: float) -> Tensor:
    """Z over its truth by each chain, or Z_0 / Z over its truth for a reverse run: of mean 1."""
    if result.log_weights is None:
        raise AssertionError("no weights")
    total = result.log_weights.logsumexp(0) - math.log(len(result.log_weights))
    sign = -1.0 if "reverse" in result.method else 1.0
    return (result.log_weights - total + sign * (result.value - truth)).exp()


BIASED: dict[str, tuple[Energy, Callable[[Energy], LogZ]]] = {
    "RBM": (oracle(), lambda e: partition.ais(e, base(e), betas=SHORT, num_chains=MANY)),
    "RBM by sites": (
        oracle(),
        lambda e: partition.ais(e, base(e), Gibbs(), betas=SHORT, num_chains=MANY),
    ),
    "RBM by layers": (
        oracle().joint(),
        lambda e: partition.ais(e, base(e), LayerGibbs(), betas=SHORT, num_chains=MANY),
    ),
    "GRBM": (grbm(), lambda e: partition.ais(e, base(e), betas=SHORT, num_chains=MANY)),
    "GRBM by HMC": (
        grbm(),
        lambda e: partition.ais(
            e,
            Gaussian(torch.zeros(2, dtype=F64), scale=3.0),
            HMC(0.5),
            betas=SHORT,
            num_chains=MANY,
        ),
    ),
    "deep": (deep(), lambda e: partition.ais(e, betas=SHORT, num_chains=MANY)),
    "deep Gaussian": (deep(True), lambda e: partition.ais(e, betas=SHORT, num_chains=MANY)),
    "reverse RBM": (
        oracle(),
        lambda e: partition.reverse_ais(e, base(e), betas=SHORT, num_chains=MANY),
    ),
    "reverse RBM by sites": (
        oracle(),
        lambda e: partition.reverse_ais(e, base(e), Gibbs(), betas=SHORT, num_chains=MANY),
    ),
    "reverse GRBM": (
        grbm(),
        lambda e: partition.reverse_ais(e, base(e), betas=SHORT, num_chains=MANY),
    ),
    "reverse double well": (
        DoubleWell(dtype=F64),
        lambda e: partition.reverse_ais(
            e,
            Gaussian(torch.tensor(0.0, dtype=F64), scale=1.5),
            HMC(0.1, num_steps=5),
            betas=SHORT,
            num_chains=MANY,
        ),
    ),
    "reverse deep": (deep(), lambda e: partition.reverse_ais(e, betas=SHORT, num_chains=MANY)),
    "reverse deep Gaussian": (
        deep(True),
        lambda e: partition.reverse_ais(e, betas=SHORT, num_chains=MANY),
    ),
}


def unbiased(name: str) -> Tensor:
    energy, estimate = BIASED[name]
    found = ratio(estimate(energy), partition.exact(energy).value)
    mean, se = mean_and_se(found)
    within_se(mean, 1.0, se, what=f"Z over its truth ({name})")
    return found


@pytest.mark.parametrize("name", BIASED)
def test_weights_are_unbiased_and_logs_on_their_side(name: str) -> None:
    side = 1.0 if "reverse" in name else -1.0
    mean, se = mean_and_se(-side * unbiased(name).log())  # log Z by each chain, less its truth
    assert side * mean > 5 * se, f"Jensen's gap must be seen on its side: {mean} +- {se}"


def test_standard_errors_are_the_spread_of_repeated_runs() -> None:
    repeats, strong = 120, randomised(BernoulliRBM(5, 4, dtype=F64))
    brackets = [
        partition.bidirectional_ais(
            strong, betas=6, num_chains=200, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(repeats)
    ]
    for part in ("forward", "reverse", "combined"):
        found = torch.tensor(
            [[getattr(b, part).value, getattr(b, part).standard_error] for b in brackets], dtype=F64
        )
        said, spread = found[:, 1].square().mean().sqrt(), found[:, 0].std()
        within_se(
            said / spread,
            1.0,
            1.0 / math.sqrt(2 * (repeats - 1)),
            what=f"standard error of {part} over its truth",
        )
    truth = partition.exact(strong).value
    within_se(
        found[:, 0].mean(), truth, spread / math.sqrt(repeats), what="the acceptance ratio's mean"
    )


def test_draws_may_be_visible_or_of_all_units() -> None:
    """From exact draws given by hand the weights are unbiased whichever units they have."""
    machine, generator = oracle(), torch.Generator().manual_seed(5)
    joint = torch.cat(machine.draw_layers(MANY, generator), 1)
    for start in (joint, joint[:, :4]):
        mean, se = mean_and_se(
            ratio(partition.reverse_ais(machine, draws=start, betas=SHORT), LOG_Z)
        )
        within_se(mean, 1.0, se)


# Mutants


def caught(name: str) -> None:
    with pytest.raises(AssertionError, match="not within"):
        unbiased(name)


def test_mutant_weights_after_the_move_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(path, state, betas, generator, progress):  # type: ignore[no-untyped-def]
        for beta, then in itertools.pairwise(betas):
            state = path.move(state, then, generator)
            yield path.log_weight(state, beta, then)

    monkeypatch.setattr(kernel_path, "increments", late)
    for name in ("RBM", "RBM by sites", "GRBM", "deep", "reverse RBM"):
        caught(name)


def test_mutant_moves_at_the_temperature_left_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def behind(path, state, betas, generator, progress):  # type: ignore[no-untyped-def]
        for beta, then in itertools.pairwise(betas):
            yield path.log_weight(state, beta, then)
            state = path.move(state, beta, generator)

    monkeypatch.setattr(kernel_path, "increments", behind)
    for name in ("RBM", "GRBM", "reverse deep"):
        caught(name)


def test_mutant_normaliser_of_the_base_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layered, "log_z_of_independent", lambda layers: 0.0)
    caught("RBM")
    caught("reverse GRBM")


def test_mutant_ladder_not_reversed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    door = annealing._check_arguments
    monkeypatch.setattr(annealing, "_check_arguments", lambda *arguments: door(*arguments)[::-1])
    caught("reverse RBM")


def test_mutant_moves_of_another_density_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    move = LayeredPath.move
    monkeypatch.setattr(
        LayeredPath,
        "move",
        lambda self, state, beta, generator=None: move(self, state, 1.0, generator),
    )
    for name in ("RBM", "GRBM", "deep"):
        caught(name)


def test_mutant_one_sides_weights_with_the_other_sides_states_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the layers that are to be summed out, one is left as it was."""
    enter = LayeredPath.enter

    def partly(self, x):  # type: ignore[no-untyped-def]
        state = enter(self, x)
        return state._replace(
            fields=state.fields | {0: self.base.biases[0].expand_as(state.fields[0])}
        )

    monkeypatch.setattr(LayeredPath, "enter", partly)
    for name in ("RBM", "deep", "reverse deep"):
        caught(name)


def test_mutant_own_terms_of_the_kept_side_forgotten_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = LayeredPath.log_weight
    monkeypatch.setattr(
        LayeredPath,
        "log_weight",
        lambda self, w, b, t: weight(
            self, w._replace(x=[0 * x if x is not None else None for x in w.x]), b, t
        ),
    )
    for name in ("RBM", "GRBM", "deep Gaussian"):
        caught(name)


def test_mutant_precision_of_the_target_all_along_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Layers,
        "at",
        lambda target, beta, base: target._replace(
            weights=(), biases=(), offset=beta * target.offset
        ),
    )
    caught("GRBM")


def test_mutant_sweep_that_forgets_its_temperature_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw_side = Layers.draw_side

    def hot(self: Layers, *args: Any, beta: Any = None, base: Any = None, **options: Any) -> Any:
        return draw_side(self, *args, **options)

    monkeypatch.setattr(Layers, "draw_side", hot)
    caught("RBM")


def test_mutant_sign_of_the_correction_is_caught() -> None:
    """With its correction the rule is exact where the mean is a cubic of beta."""
    betas = torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=F64)
    mean, variance = (
        -5.0 * betas**3 + 2.0 * betas**2 - 3.0 * betas,
        15.0 * betas**2 - 4.0 * betas + 3.0,
    )
    noise = torch.tensor([1.0, -1.0], dtype=F64).reshape(2, 1, 1)
    slopes = mean + noise * variance.sqrt()
    truth = 5.0 / 4.0 - 2.0 / 3.0 + 3.0 / 2.0
    within_se(estimators._integral(slopes, betas), [truth], 1e-9)
    mutant = estimators._integral(mean + 0 * noise, betas)  # no correction
    with pytest.raises(AssertionError, match="not within"):
        within_se(mutant, [truth], 1e-3)


def test_mutant_numbers_of_draws_forgotten_in_the_bridge_is_caught() -> None:
    """Normal distributions whose log ratio is known; four times as many draws of one as of the
    other."""
    generator = torch.Generator().manual_seed(4)
    first, second = (
        torch.randn(40_000, generator=generator, dtype=F64),
        1.0 + torch.randn(10_000, generator=generator, dtype=F64),
    )

    def log_ratio(x: Tensor) -> Tensor:
        return 0.5 * x**2 - 0.5 * (x - 1.0) ** 2 + 3.0

    ahead, back = log_ratio(first).numpy(), log_ratio(second).numpy()
    root, se, _ = bridging._bennett(ahead, back, len(back))
    within_se(root, 3.0, se)
    again = [
        bridging._bennett(
            log_ratio(torch.randn(400, generator=generator, dtype=F64)).numpy(),
            log_ratio(1.0 + torch.randn(100, generator=generator, dtype=F64)).numpy(),
            100,
        )[:2]
        for _ in range(400)
    ]
    roots, errors = torch.tensor(again, dtype=F64).unbind(1)
    within_se(
        errors.square().mean().sqrt() / roots.std(),
        1.0,
        1 / math.sqrt(2 * 399),
        what="standard error over its truth",
    )


# How it is done


def test_an_rbm_costs_two_products_a_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    field, calls = Layers.field, []
    monkeypatch.setattr(
        Layers, "field", lambda self, layer, x: calls.append(layer) or field(self, layer, x)
    )
    partition.ais(oracle(), betas=50)
    assert len(calls) == 1 + 2 * 49


def test_the_side_with_fewer_units_is_kept() -> None:
    assert LayeredPath(partition.base_rates(oracle()), oracle().layers()).kept == [1]
    wide = BernoulliRBM(2, 5)
    assert LayeredPath(partition.base_rates(wide), wide.layers()).kept == [0]
    assert LayeredPath(partition.base_rates(deep()), deep().layers()).kept == [1]


def test_a_schedule_evens_out_the_increments() -> None:
    strong = BernoulliRBM(
        12,
        8,
        weight=torch.full((12, 8), 1.5),
        visible_bias=torch.full((12,), -6.0),
        hidden_bias=torch.full((8,), -9.0),
        dtype=F64,
    )
    betas = partition.schedule(strong, num_temperatures=60)
    assert betas.shape == (61,)
    assert float(betas[0]) == 0.0
    assert float(betas[-1]) == 1.0
    assert bool((betas.diff() > 0).all())
    spread = {}
    for name, steps in (("even", 60), ("tuned", betas)):
        path = LayeredPath(partition.base_rates(strong), strong.layers())
        start = path.draw_base(500, torch.Generator().manual_seed(3))
        speed = torch.stack(
            [
                term.std()
                for term in kernel_path.increments(
                    path,
                    start,
                    kernel_path.as_betas(steps),
                    torch.Generator().manual_seed(4),
                    False,
                )
            ]
        )
        spread[name] = float(speed.std() / speed.mean())
    assert spread["tuned"] < 0.7 * spread["even"], spread
    halves = partition.schedule(
        HalfDisc(dtype=F64),
        Gaussian(torch.tensor(0.0, dtype=F64)),
        MALA(0.5),
        num_temperatures=5,
    )
    assert len(halves) == 6  # draws outside of the disc are left out
    result = partition.ais(strong, betas=betas)
    within_se(result.value, partition.exact(strong).value, result.standard_error)


def test_base_rates_are_those_of_the_data() -> None:
    bits = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]], dtype=F64)
    layers = partition.base_rates(oracle(), bits)
    assert isinstance(layers, Layers)
    torch.testing.assert_close(torch.sigmoid(layers.biases[0]), (bits.sum(0) + 1) / 4)
    sites = partition.base_rates(Ising((3, 3), dtype=F64), torch.ones(6, 3, 3, dtype=F64))
    torch.testing.assert_close(
        sites(torch.ones(1, 3, 3, dtype=F64)), torch.tensor([-9 * math.log(7 / 8)], dtype=F64)
    )
    colors = partition.base_rates(Potts((3,), 3, dtype=F64))
    draws = colors.sample(3000, torch.Generator().manual_seed(0))
    mean, se = mean_and_se(draws[:, 0, 0])
    within_se(mean, 1 / 3, se)
    assert math.isclose(partition.exact(colors * 1.0).value, 0.0, abs_tol=1e-12)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 3.0 + 1.0
    normal = partition.base_rates(grbm(), x)
    assert isinstance(normal, Layers)
    assert normal.precision is not None
    torch.testing.assert_close(normal.precision, x.std(0) ** -2)
    torch.testing.assert_close(normal.biases[0] / normal.precision, x.mean(0))


@pytest.mark.parametrize(
    "machine", [oracle(), oracle().joint(), grbm(), grbm().joint(), deep(), deep(True)]
)
def test_independent_layers_are_a_density_with_its_draws(machine: LayeredMachine) -> None:
    energy = IndependentLayers(partition.base_rates(machine), machine)  # type: ignore[arg-type]
    assert energy.sample(7, torch.Generator().manual_seed(1)).shape == (7, *machine.event_shape)
    result = partition.bridge(machine, base=energy)
    within_se(result.value, partition.exact(machine).value, result.standard_error)


ESTIMATORS = ("ais", "reverse_ais", "bidirectional_ais", "schedule", "smc", "bridge")


@pytest.mark.parametrize("name", [*ESTIMATORS, "thermodynamic_integration"])
def test_estimators_share_their_arguments(name: str) -> None:
    """The energy, the base and the kernel by position; all others by name, with one default."""
    known = {
        "draws": None,
        "betas": 1000,
        "num_chains": 32 if name == "thermodynamic_integration" else 100,
        "generator": None,
        "progress": None,
    }
    parameters = inspect.signature(getattr(partition, name)).parameters
    named = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    first = [key for key in parameters if key not in named]
    assert first == (["energy", "base"] if name == "bridge" else ["energy", "base", "kernel"])
    assert named[-1 if name == "bridge" else -2] == "generator"
    for key in known.keys() & set(named):
        assert parameters[key].default == known[key], key
    takes_draws = name in ("reverse_ais", "bidirectional_ais", "bridge")
    assert (named[0] == "draws") == ("draws" in named) == takes_draws


def test_the_text_of_an_estimate_says_what_its_error_leaves_out() -> None:
    weights = torch.zeros(10)
    known = str(partition.LogZ(5.0, 5e-6, "lower", "AIS", 10.0, weights))
    assert known == (
        "log Z = 5.0000 +- 5e-06 (AIS; lower: low on average; ESS 10 of 10; modes without draws"
        " are not included)"
    )
    few = str(partition.LogZ(5.0, math.inf, "lower", "AIS", 1.0, weights))
    assert few.startswith("log Z = 5.0000, no standard error (AIS")
    assert "modes" not in str(partition.exact(ISING))


def test_arrays_are_draws_too() -> None:
    machine = oracle()
    draws = machine.sample(20, torch.Generator().manual_seed(0))
    for given in (draws, draws.float()):
        reverse = partition.reverse_ais(
            machine, draws=given.numpy(), betas=5, generator=torch.Generator().manual_seed(1)
        )
        assert reverse.kind == "estimate"
    assert partition.bridge(machine, draws=draws.numpy()).kind == "estimate"


def test_a_path_by_sites_has_the_logits_of_its_energies() -> None:
    """The path combines the conditionals of both ends; they are those of its energies."""
    start = partition.base_rates(ISING, ISING.initial(50, torch.Generator().manual_seed(1)))
    path = GeometricPath(ISING, torch.tensor([0.0, 0.3, 1.0]), start)
    x, site = ISING.initial(3, torch.Generator().manual_seed(2)), torch.tensor([0, 4, 8])
    for ends in (path, GeometricPath(ISING, 0.5, ISING * 0.5), GeometricPath(ISING, 0.5)):
        torch.testing.assert_close(
            ends.site_logits(x, site).log_softmax(1),
            Energy.site_logits(ends, x, site).log_softmax(1),
        )


def _enumerable() -> Energy:
    return Ising((3, 3), coupling=0.2, dtype=F64) * 1.0


SHOWN: dict[str, tuple[Callable[[bool | None], object], str]] = {
    "ais": (lambda show: partition.ais(oracle(), betas=5, progress=show), "annealing: 5/5 "),
    "ais with a pilot": (
        lambda show: partition.ais(
            Gaussian(0.0), Gaussian(0.0, scale=2.0), betas=2, num_chains=4, progress=show
        ),
        "SMC: ",
    ),
    "reverse_ais": (
        lambda show: partition.reverse_ais(oracle(), betas=5, progress=show),
        "annealing: 5/5 ",
    ),
    "schedule": (
        lambda show: partition.schedule(oracle(), num_temperatures=2, progress=show),
        "annealing: 200/200 ",
    ),
    "smc": (lambda show: partition.smc(oracle(), num_particles=8, progress=show), "SMC: "),
    "thermodynamic_integration": (
        lambda show: partition.thermodynamic_integration(
            oracle(), num_samples=3, warmup_steps=2, num_chains=2, progress=show
        ),
        "tempering: 5/5 ",
    ),
    "exact": (lambda show: partition.exact(_enumerable(), progress=show), "enumeration: 512/512 "),
    "exact of layers": (lambda show: partition.exact(oracle(), progress=show), "enumeration: "),
    "quadrature": (lambda show: partition.quadrature(Gaussian(0.0), progress=show), "quadrature: "),
    "expectation": (
        lambda show: partition.expectation(Gaussian(0.0), lambda x: x, progress=show),
        "quadrature: ",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_estimators_show_progress(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    estimate, said = SHOWN[name]
    estimate(False)
    estimate(None)  # shorter than a second or two
    assert capsys.readouterr().err == ""
    estimate(True)
    assert said in capsys.readouterr().err.splitlines()[-1 if name != "ais with a pilot" else 1]


def test_same_seed_same_weights() -> None:
    one, two, other = (
        partition.ais(oracle(), betas=10, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.log_weights, two.log_weights)  # type: ignore[arg-type]
    assert one.value != other.value
    state = torch.get_rng_state()
    both = [
        partition.bidirectional_ais(oracle(), betas=10, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert str(both[0]) == str(both[1])
    assert torch.equal(state, torch.get_rng_state())


def test_float32_agrees_and_sums_its_weights_in_float64() -> None:
    machine = oracle(dtype=torch.float32)
    for result in (
        partition.ais(machine, betas=100),
        partition.reverse_ais(machine, betas=100),
        partition.smc(machine, num_particles=256),
    ):
        within_se(result.value, LOG_Z, result.standard_error)
        assert result.log_weights is not None
        assert result.log_weights.dtype == F64


def test_no_gradient_is_left_behind() -> None:
    machine = oracle()
    result = partition.bidirectional_ais(machine, betas=5).forward
    assert result.log_weights is not None
    assert not result.log_weights.requires_grad
    assert all(parameter.grad is None for parameter in machine.parameters())


# What goes wrong


class Broken(Energy):
    def __init__(self, value: float) -> None:
        super().__init__(())
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 6.0, x**2, self.value)


def test_weights_that_are_no_numbers_are_reported() -> None:
    wide = Gaussian(torch.tensor(0.0), scale=2.0)
    with pytest.raises(FloatingPointError, match="NaN or -inf at 10 of 10 draws"):
        partition.ais(Broken(math.nan), wide, MALA(), betas=5, num_chains=10)
    with pytest.raises(FloatingPointError, match="all 10 weights are 0"):
        partition.ais(Broken(math.inf), wide, MALA(), betas=5, num_chains=10)
    with pytest.raises(FloatingPointError, match="of 3 log weights 1 are NaN and 1 are"):
        from_weights(torch.tensor([0.0, math.nan, math.inf]), 0.0, "lower", "AIS")
    nan = BernoulliRBM(2, 1)
    nan.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        partition.ais(nan, betas=3)
    with pytest.raises(FloatingPointError, match="NaN or -inf at 1 of 4 states"):
        partition.exact(HalfNan())
    with pytest.raises(ValueError, match="no box contains the density"):
        partition.quadrature(Unnormalized(lambda x: 0.0 * x))
    with pytest.raises(FloatingPointError, match="0 everywhere in the box"):
        partition.quadrature(
            Unnormalized(lambda x: torch.where(x.abs() < 9.0, -torch.inf, -(x**2))), [(-1.0, 1.0)]
        )


class HalfNan(Energy):
    event_shape = torch.Size([2])
    support = torch.distributions.constraints.boolean

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum(-1) == 2, math.nan, x.sum(-1))


WELL = DoubleWell(dtype=F64)
OTHER = BernoulliRBM(5, 3, dtype=F64)
LARGE = BernoulliRBM(40, 30, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.ais(3.0), "energy must be a pyroebm.Energy"),
        (lambda: partition.ais(oracle(), betas=0), "betas must be at least 1, got betas=0"),
        (
            lambda: partition.ais(oracle(), betas=torch.tensor([0.0, 0.7, 0.5, 1.0])),
            "rises from 0 to 1",
        ),
        (lambda: partition.ais(oracle(), betas=torch.tensor([0.1, 1.0])), "rises from 0 to 1"),
        (
            lambda: partition.ais(oracle(), num_chains=0),
            "num_chains must be an integer of at least 1",
        ),
        (lambda: partition.ais(oracle(), kernel=Gibbs), r"write Gibbs\(\)"),
        (
            lambda: partition.ais(oracle(), partition.base_rates(OTHER)),
            r"sizes \[4, 3\] with visible bits, got sizes \[5, 3\]",
        ),
        (
            lambda: partition.ais(oracle(), oracle().layers()),
            "base must have weights of zero",
        ),
        (
            lambda: partition.ais(oracle(dtype=torch.float32), partition.base_rates(oracle())),
            "dtype and device of the energy",
        ),
        (lambda: partition.ais(WELL), "base must be given for DoubleWell"),
        (
            lambda: partition.ais(WELL, WELL * 0.5),
            "base must be Layers, a distribution, or an Energy with exact draws",
        ),
        (
            lambda: partition.ais(WELL, partition.base_rates(oracle())),
            "base may be Layers for an energy with layers",
        ),
        (
            lambda: partition.reverse_ais(LARGE),
            "draws must be given, because BernoulliRBM has no exact draws",
        ),
        (
            lambda: partition.reverse_ais(oracle(), draws=torch.zeros(3, 5, dtype=F64)),
            r"draws must have shape \(n, 4\) or \(n, 7\)",
        ),
        (
            lambda: partition.reverse_ais(deep(), draws=torch.zeros(3, 4, dtype=F64)),
            r"draws must have shape \(n, 10\)",
        ),
        (
            lambda: partition.reverse_ais(oracle(), draws=torch.zeros(3, 4)),
            "draws must be torch.float64",
        ),
        (
            lambda: partition.reverse_ais(oracle(), draws=torch.full((3, 4), math.nan, dtype=F64)),
            "draws must hold states",
        ),
        (
            lambda: partition.reverse_ais(oracle(), draws=torch.full((3, 7), 0.5, dtype=F64)),
            "draws must hold states",
        ),
        (
            lambda: partition.reverse_ais(grbm(), draws=torch.full((3, 5), 0.5, dtype=F64)),
            "draws must hold states",
        ),
        (lambda: partition.exact(LARGE), r"sum over 2\^30 states, more than max_units=24"),
        (lambda: partition.exact(Ising((5, 5)) * 1.0), r"sum over 2\^25 states"),
        (lambda: partition.exact(WELL * 0.5), "energy must be discrete or have a log_z"),
        (lambda: partition.quadrature(oracle()), "discrete"),
        (
            lambda: partition.quadrature(Gaussian(torch.zeros(3))),
            "one or two unconstrained entries, but Gaussian has 3",
        ),
        (lambda: partition.quadrature(WELL, [(1.0, 0.0)]), "bounds must be 1 finite pairs"),
        (lambda: partition.bridge(LARGE), "draws must be given"),
        (
            lambda: partition.bridge(oracle(), draws=torch.zeros(4, dtype=F64)),
            r"draws must have shape \(n, \*event\)",
        ),
        (
            lambda: partition.bridge(oracle(), num_samples=1),
            "num_samples must be an integer of at least 2",
        ),
        (
            lambda: partition.thermodynamic_integration(oracle(), num_temperatures=1),
            "num_temperatures must be an integer",
        ),
        (
            lambda: partition.smc(WELL, Gaussian(torch.tensor(0.0, dtype=F64)), ULA()),
            "ULA is not exact",
        ),
        (
            lambda: partition.base_rates(oracle(), torch.zeros(3, 5)),
            r"visible units of shape \(n, 4\)",
        ),
        (
            lambda: partition.base_rates(Ising((3, 3)), torch.zeros(3, 5)),
            r"data must have shape \(n, \*\(3, 3\)\)",
        ),
        (lambda: partition.base_rates(oracle(), torch.full((3, 4), 2.0)), "from 0 to 1"),
        (lambda: partition.base_rates(boltzmann(), torch.zeros(3, 9)), "data must lie in support"),
        (lambda: partition.base_rates(grbm(), torch.ones(3, 2)), "vary in every column"),
        (
            lambda: LayerGibbs().step(
                oracle().joint(),
                LayerGibbs().init(oracle().joint(), oracle().joint().initial(1)),
            ),
            "requires the GeometricPath",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [oracle, boltzmann, lambda: DeepBoltzmannMachine([4, 3, 2])])
def test_a_machine_that_is_no_distribution_has_no_value_and_no_draws(
    make: Callable[[], Any],
) -> None:
    machine = make()
    with torch.no_grad():
        next(iter(machine.parameters())).fill_(math.nan)
    for call in (lambda: partition.exact(machine), lambda: machine.sample(3)):
        with pytest.raises(FloatingPointError, match="not finite"):
            call()


def test_a_quadrature_states_the_tolerance_that_it_did_not_reach() -> None:
    text = str(partition.quadrature(DoubleWell(), tolerance=1e-12))
    assert "tolerance 1e-12 not reached in float32; use float64)" in text
    assert "draws" not in text
    jump = Unnormalized(lambda x: -x.square() - (x > 0.1234).to(x.dtype)).double()
    text = str(partition.quadrature(jump, tolerance=1e-12))
    assert "tolerance 1e-12 not reached by the finest rule)" in text
