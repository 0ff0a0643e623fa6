"""Log Z of lattices by block Gibbs along a path, against Kaufman's exact sum for the torus."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from lib.checks import within_se

from pyroebm.energies import Ising
from pyroebm.partition import LogZ, ais, smc, thermodynamic_integration

#: Critical coupling of the square lattice (Onsager, 1944).
CRITICAL = 0.5 * math.log(1.0 + math.sqrt(2.0))


def kaufman(side: int, coupling: float) -> float:
    """Return log Z of an Ising torus (Kaufman, 1949)."""

    def gamma(k: int) -> float:
        if k == 0:
            return 2.0 * coupling + math.log(math.tanh(coupling))
        cosine = math.cos(math.pi * k / side)
        return math.acosh(math.cosh(2 * coupling) ** 2 / math.sinh(2 * coupling) - cosine)

    def log_product(sign: float, parity: int) -> float:
        exponents = [side * abs(gamma(2 * k + parity)) / 2 for k in range(side)]
        return sum(x + math.log1p(sign * math.exp(-2 * x)) if x else -math.inf for x in exponents)

    terms = [log_product(sign, parity) for parity in (1, 0) for sign in (1.0, -1.0)]
    largest = max(terms)
    signs = [1.0, 1.0, 1.0, math.copysign(1.0, gamma(0))]
    total = sum(s * math.exp(term - largest) for s, term in zip(signs, terms, strict=True))
    prefactor = side**2 / 2 * math.log(2 * math.sinh(2 * coupling)) - math.log(2.0)
    return prefactor + largest + math.log(total)


@pytest.mark.parametrize(("side", "coupling"), [(4, 0.2), (8, CRITICAL), (6, 0.7)])
def test_kaufman_is_the_transfer_matrix(side: int, coupling: float) -> None:
    energy = Ising((side, side), coupling, dtype=torch.float64)
    assert kaufman(side, coupling) == pytest.approx(energy.log_z, abs=1e-6)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


ESTIMATORS: dict[str, Callable[[Ising], LogZ]] = {
    "ais": lambda e: ais(e, betas=3000, num_chains=50, generator=noise()),
    "smc": lambda e: smc(e, num_particles=64, num_islands=16, generator=noise()),
    "thermodynamic_integration": lambda e: thermodynamic_integration(
        e,
        num_temperatures=24,
        num_chains=16,
        num_samples=400,
        warmup_steps=200,
        generator=noise(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_critical_torus_in_a_minute(name: str) -> None:
    """A thousand spins, of which block Gibbs draws half at once."""
    began = time.process_time()
    result = ESTIMATORS[name](Ising((32, 32), CRITICAL))  # float32
    seconds = time.process_time() - began
    print(result, f"{seconds:.0f} s")
    assert seconds < 60.0
    assert abs(result.value - kaufman(32, CRITICAL)) < 0.5
    if math.isfinite(result.standard_error):
        within_se(result.value, kaufman(32, CRITICAL), result.standard_error)
