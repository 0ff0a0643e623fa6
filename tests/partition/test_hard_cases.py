"""Every estimator of log Z on cases where one could be wrong in silence.

Each gives the right value with an error that covers it, or no standard error and the reason, or an
error message.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyroebm import HMC, MALA, Energy, Gibbs
from pyroebm.core import Unnormalized
from pyroebm.energies import BernoulliRBM
from pyroebm.flows import importance_sample
from pyroebm.partition import (
    LogZ,
    ais,
    bidirectional_ais,
    bridge,
    reverse_ais,
    smc,
    thermodynamic_integration,
)
from pyroebm.partition.result import from_weights
from pyroebm.targets import Gaussian, HalfDisc

F64 = torch.float64


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class HalfNormal(Energy):
    """x^2 / 2 for x > 0, else infinite; with exact draws, and without log Z."""

    has_exact_draws = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x**2 / 2, math.inf)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(num_samples, generator=generator, dtype=self.dtype).abs()


class Corner(HalfNormal):
    """The same in each of two coordinates: a quarter of a base that is centered."""

    event_shape = torch.Size([2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x > 0).all(-1), x.square().sum(-1) / 2, math.inf)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(num_samples, 2, generator=generator, dtype=self.dtype).abs()


class HardCore(Energy):
    """Three sites on a line of which no two neighbors are occupied: 5 of 8 states."""

    event_shape = torch.Size([3])
    support = constraints.boolean
    has_exact_draws = True

    def forward(self, x: Tensor) -> Tensor:
        touch = x[..., :-1] * x[..., 1:]
        return torch.where(touch.sum(-1) > 0, math.inf, 0.0).to(x.dtype)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        states = torch.tensor(
            [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], dtype=self.dtype
        )
        return states[torch.randint(5, (num_samples,), generator=generator)]


def normal(dim: int = 0) -> Distribution:
    """A base that crosses the walls."""
    wide = dist.Normal(torch.tensor(0.0, dtype=F64), 2.0)
    return wide.expand([dim]).to_event(1) if dim else wide


HALF = 0.5 * math.log(math.pi / 2)
#: Energy, base, log Z.
WALLS: dict[str, tuple[Energy, Any, float]] = {
    "half a normal": (HalfNormal().double(), normal(), HALF),
    "a corner": (Corner().double(), normal(2), 2 * HALF),
    "half-disc": (
        HalfDisc(dtype=F64),
        Gaussian(torch.tensor(0.0, dtype=F64)),
        HalfDisc(dtype=F64).log_z,
    ),
    "hard core": (HardCore().double(), None, math.log(5.0)),
}
#: Each estimator of an energy and a base.
ESTIMATORS: dict[str, Callable[[Energy, Any], Any]] = {
    "ais": lambda e, b: ais(e, b, betas=60, num_chains=2000, generator=noise()),
    "reverse_ais": lambda e, b: reverse_ais(e, base=b, betas=60, num_chains=400, generator=noise()),
    "bidirectional_ais": lambda e, b: (
        bidirectional_ais(e, base=b, betas=60, num_chains=400, generator=noise()).combined
    ),
    "smc": lambda e, b: smc(e, b, num_particles=512, generator=noise()),
    "bridge": lambda e, b: bridge(e, base=b, num_samples=4000, generator=noise()),
    "thermodynamic_integration": lambda e, b: thermodynamic_integration(
        e, b, num_temperatures=12, num_samples=150, warmup_steps=100, generator=noise()
    ),
    "importance_sample": lambda e, b: importance_sample(
        _uniform_bits() if b is None else b, e, 20_000, generator=noise()
    ),
}


def _uniform_bits() -> Distribution:
    return dist.Bernoulli(torch.full((3,), 0.5, dtype=F64)).to_event(1)


def estimate_of(found: Any) -> tuple[float, float, str]:
    result = found if isinstance(found, LogZ) else found.log_z
    return result.value, result.standard_error, result.kind


@pytest.mark.parametrize("case", WALLS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_hard_walls(name: str, case: str) -> None:
    energy, base, truth = WALLS[case]
    if case == "half-disc" and name == "importance_sample":
        base = dist.Normal(torch.tensor(0.0, dtype=F64), 1.0)
    value, error, kind = estimate_of(ESTIMATORS[name](energy, base))
    assert error < 0.15
    within_se(value, truth, error, what=f"log Z of {case} by {name}")
    # with an estimated mass of the domain there is no bound
    assert kind != "upper"


IMPROPER: dict[str, Energy] = {
    "constant": Unnormalized(lambda x: 0.0 * x),
    "unbounded below": Unnormalized(lambda x: x**2),
    "flat in one direction": Unnormalized(
        lambda x: -((x[..., 0] - 1.0) ** 2) + 0.0 * x[..., 1], event_shape=(2,)
    ),
    "1 / x": Unnormalized(lambda x: -torch.log(x), support=constraints.positive),
}


@pytest.mark.parametrize("case", IMPROPER)
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "importance_sample"])
def test_energies_that_are_no_density_are_named(name: str, case: str) -> None:
    energy = IMPROPER[case].double()
    base: Any = normal(2) if energy.event_shape else normal()
    if case == "1 / x":
        base = dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0)
    draws = base.sample((100,))
    calls: dict[str, Callable[[], object]] = {
        "bridge": lambda: bridge(energy, draws=draws, base=base),
        "reverse_ais": lambda: reverse_ais(energy, base, MALA(0.3), draws=draws, betas=20),
        "bidirectional_ais": lambda: bidirectional_ais(energy, base, draws=draws, betas=20),
    }
    call = calls.get(name, lambda: ESTIMATORS[name](energy, base))
    with pytest.raises(ValueError, match="must have a finite normalizing constant"):
        call()


@pytest.mark.parametrize("case", ["constant", "unbounded below"])
def test_importance_weights_of_no_density_have_no_standard_error(case: str) -> None:
    result = importance_sample(normal(), IMPROPER[case].double(), 10_000, generator=noise())
    assert math.isinf(result.log_z.standard_error)
    assert "no standard error" in str(result)
    assert result.problem is not None


def test_a_target_far_wider_than_the_base_is_a_density() -> None:
    """Over the first decades its mass increases."""
    wide = Unnormalized(lambda x: -((x / 1e5) ** 2) / 2).double()
    result = smc(wide, normal(), MALA(), num_particles=1024, generator=noise())
    within_se(result.value, 0.5 * math.log(2 * math.pi) + math.log(1e5), result.standard_error)


def test_few_weights_are_said() -> None:
    far = Gaussian(torch.full((4,), 6.0, dtype=F64), scale=0.2)
    result = ais(
        Unnormalized(lambda x: -far(x), event_shape=(4,)).double(),
        normal(4),
        MALA(0.05),
        betas=3,
        generator=noise(),
    )
    assert result.ess is not None
    assert result.ess < 10
    assert math.isinf(result.standard_error)
    assert f"no standard error: the ESS of the weights is {result.ess:.3g} of 100" in str(result)
    assert "+-" not in str(result)


def test_a_heavy_tail_is_said() -> None:
    """A base narrower than the target: k is 1 - (scale of base / scale of target)^2 = .91."""
    target = Gaussian(torch.tensor(0.0, dtype=F64))
    result = importance_sample(
        dist.Normal(torch.tensor(0.0, dtype=F64), 0.3), target, 50_000, generator=noise()
    )
    assert result.pareto_k > 0.7
    assert math.isinf(result.log_z.standard_error)
    assert bool(torch.isinf(result.expectation(lambda x: x)[1]))
    assert "the Pareto k of the weights is" in str(result)
    pareto = torch.rand(100_000, generator=noise(1), dtype=F64).log() * -0.8
    tail = from_weights(pareto, 0.0, "lower", "AIS")
    assert "above 0.7" in str(tail)
    assert math.isinf(tail.standard_error)
    # bounded weights have no tail, however many of them are 0
    bits = torch.where(torch.arange(2000) % 2 == 0, 0.0, -math.inf).double()
    assert from_weights(bits, 0.0, "lower", "AIS").problem is None


# Chains


def test_chains_that_say_nothing_are_refused_by_the_bridge() -> None:
    energy, base = HalfNormal().double(), normal()
    chains = energy.sample(200, noise()).reshape(20, 10)
    constant = chains[:, :1].expand(20, 10)
    mixed = torch.cat([chains[:19], constant[19:]])
    short = energy.sample(60, noise()).reshape(20, 3)
    for draws, message in (
        (short, "at least 4 draws in each chain"),
        (constant, r"20 of 20 never did \(numbers 0, 1, 2, 3, 4, ...\)"),
        (mixed, r"1 of 20 never did \(numbers 19\)"),
        (torch.ones(20, 10, dtype=F64), "20 of 20 never did"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge(energy, draws=draws, base=base)
    result = bridge(energy, draws=short.flatten(), base=base, generator=noise(1))
    within_se(result.value, HALF, result.standard_error)


def test_discrete_chains_may_be_constant_by_chance() -> None:
    machine = BernoulliRBM(2, 1).double()
    with torch.no_grad():
        machine.weight.zero_()
        machine.visible_bias.fill_(-4.0)
    draws = machine.sample(1000, noise()).reshape(50, 20, 2)
    assert bool((draws == draws[:, :1]).flatten(1).all(1).any())
    result = bridge(machine, draws=draws, generator=noise(1))
    within_se(result.value, math.log(2) + 2 * math.log1p(math.exp(-4)), result.standard_error)
    at_rare = torch.cat([draws[:49], torch.ones_like(draws[49:])])
    for given, message in ((at_rare, r"1 of 50 never did \(numbers 49\)"), (0 * draws, "50 of 50")):
        with pytest.raises(ValueError, match=message):
            bridge(machine, draws=given, generator=noise(1))


def test_densities_that_hardly_overlap_have_no_standard_error() -> None:
    target, far = Gaussian(torch.zeros(1, dtype=F64)), Gaussian(torch.full((1,), 8.0, dtype=F64))
    result = bridge(target, base=far, num_samples=300, generator=noise())
    assert math.isinf(result.standard_error)
    assert "no standard error: the two densities overlap at" in str(result)


def test_a_kernel_that_never_moves_is_said() -> None:
    result = thermodynamic_integration(
        Gaussian(torch.full((4,), 30.0, dtype=F64)),
        normal(4),
        HMC(1e3),
        num_temperatures=4,
        num_samples=30,
        warmup_steps=0,
        num_chains=8,
        generator=noise(),
    )
    assert math.isinf(result.standard_error)
    assert "never moved" in str(result)


def test_one_chain_has_no_standard_error() -> None:
    energy, base = HalfNormal().double(), normal()
    one = dict[str, Any](betas=10, num_chains=1, generator=noise(2))
    for result in (ais(energy, base, MALA(0.3), **one), reverse_ais(energy, base=base, **one)):
        assert math.isnan(result.standard_error)
        assert "no standard error: there is one weight" in str(result)
    ti = thermodynamic_integration(
        energy, base, num_temperatures=4, num_samples=20, warmup_steps=10, num_chains=1
    )
    assert math.isnan(ti.standard_error)
    assert "+-" not in str(ti)


def test_kernels_of_sites_need_no_check_of_tails() -> None:
    result = ais(HardCore().double(), None, Gibbs(), betas=10, num_chains=50, generator=noise())
    within_se(result.value, math.log(5.0), max(result.standard_error, 1e-9))
