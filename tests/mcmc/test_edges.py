"""Densities with mass close to the edges of their supports, in float32 and float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from torch import Tensor
from torch.distributions import constraints

from pyroebm import MCMC, NUTS, Energy, ModelEnergy
from pyroebm.core import Unnormalized
from pyroebm.core.statistics import mcse_mean
from pyroebm.core.wrappers import unconstrain
from pyroebm.diagnostics.energy_probes import find_lost_mass

F32, F64 = torch.float32, torch.float64


def mean_of(distribution: Any) -> Tensor:
    return distribution.mean


def energy_of(distribution: Any, dtype: torch.dtype) -> Energy:
    """The density as an energy on the support of the distribution."""
    return Unnormalized(
        distribution.log_prob,
        event_shape=tuple(distribution.event_shape),
        support=distribution.support,
    ).to(dtype)


def beta(a: float, dtype: torch.dtype) -> Any:
    return dist.Beta(torch.tensor(a, dtype=dtype), torch.tensor(a, dtype=dtype))


def gamma(a: float, dtype: torch.dtype) -> Any:
    return dist.Gamma(torch.tensor(a, dtype=dtype), torch.tensor(1.0, dtype=dtype))


def dirichlet(a: float, dtype: torch.dtype) -> Any:
    return dist.Dirichlet(torch.full((2,), a, dtype=dtype))


#: Mass beyond the smallest and the largest numbers: P(x < e^-L), P(1 - x < eps).
EDGES = {F32: (-103.0, math.log(1.2e-7)), F64: (-744.0, math.log(2.2e-16))}


def lost_by_beta(a: float, dtype: torch.dtype) -> float:
    """Of a density of two edges, x^(a - 1) near each: the integral of its leading term."""
    constant = -math.log(a) - 2 * math.lgamma(a) + math.lgamma(2 * a)
    low = -87.3 if dtype == F32 else -708.4  # torch clips at the smallest normal number
    return math.exp(constant + a * low) + math.exp(constant + a * EDGES[dtype][1])


def lost_by_gamma(a: float, dtype: torch.dtype) -> float:
    return math.exp(a * EDGES[dtype][0] - math.lgamma(a + 1.0))


CASES: dict[str, tuple[Callable[[float, torch.dtype], Any], Callable[[float, torch.dtype], float]]]
CASES = {
    "beta": (beta, lost_by_beta),
    "gamma": (gamma, lost_by_gamma),
    "dirichlet": (dirichlet, lost_by_beta),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("concentration", [0.02, 0.05, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_mass_that_numbers_cannot_hold_is_found(
    name: str, concentration: float, dtype: torch.dtype
) -> None:
    make, mass = CASES[name]
    energy = unconstrain(energy_of(make(concentration, dtype), dtype))
    states = torch.linspace(-1.0, 1.0, 3, dtype=dtype).reshape(3, *energy.event_shape)
    found, truth = find_lost_mass(energy, states), mass(concentration, dtype)
    if truth < 5e-4:
        assert found is None
    elif truth > 2e-3:
        assert found is not None
        assert found.share == pytest.approx(truth, rel=0.12)
        assert found.concentration == pytest.approx(concentration, rel=0.35)


UNBIASED: dict[str, Any] = {
    "positive": lambda t: dist.Gamma(torch.tensor(0.5, dtype=t), torch.tensor(2.0, dtype=t)),
    "unit interval": lambda t: beta(1.0, t),
    "interval": lambda t: dist.Uniform(torch.tensor(-3.0, dtype=t), torch.tensor(2.0, dtype=t)),
    "above": lambda t: dist.Pareto(torch.tensor(2.0, dtype=t), torch.tensor(3.0, dtype=t)),
    "simplex": lambda t: dirichlet(0.7, t),
}
SUPPORTS = {
    "half-open": constraints.half_open_interval(-1.0, 1.0),
    "greater": constraints.greater_than(1.0),
    "less": constraints.less_than(-1.0),
    "nonnegative": constraints.nonnegative,
}


def mass_on_a_line(energy: Energy, dtype: torch.dtype, step: float) -> float:
    limit = 100.0 if dtype == F32 else 700.0
    u = torch.arange(-limit, limit, step, dtype=dtype).reshape(-1, *energy.event_shape)
    values = -energy(u).double()
    return float(torch.where(values.isfinite(), values, -math.inf).exp().sum() * step)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", UNBIASED)
def test_masses_in_unconstrained_space_are_1(name: str, dtype: torch.dtype) -> None:
    energy = unconstrain(energy_of(UNBIASED[name](dtype), dtype))
    assert mass_on_a_line(energy, dtype, 0.02) == pytest.approx(1.0, abs=2e-3)
    assert find_lost_mass(energy, torch.zeros(2, *energy.event_shape, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_half_open_supports_have_their_mass(name: str, dtype: torch.dtype) -> None:
    """e^-|x - edge| from the edge on, or 1 / 2 on (-1, 1)."""
    edge = {"half-open": 0.0, "greater": 1.0, "less": -1.0, "nonnegative": 0.0}[name]
    density = Unnormalized(
        (lambda x: torch.full_like(x, math.log(0.5)))
        if name == "half-open"
        else (lambda x: -(x - edge).abs()),
        support=SUPPORTS[name],
    ).to(dtype)
    energy = unconstrain(density)
    assert mass_on_a_line(energy, dtype, 0.02) == pytest.approx(1.0, abs=2e-3)


# Runs


def sampled(make: Callable[[], Any], num_chains: int = 8) -> tuple[Tensor, Tensor]:
    def model() -> None:
        pyro.sample("p", make())

    mcmc = MCMC(NUTS(), num_chains=num_chains, seed=3, progress=False)
    mcmc.run(ModelEnergy(model))
    draws = mcmc.get_samples(group_by_chain=True)["p"]
    return draws.double().mean((0, 1)), torch.as_tensor(mcse_mean(draws))


@pytest.mark.parametrize(
    "make",
    [
        lambda: beta(0.2, F64),
        lambda: gamma(0.02, F64),
        lambda: gamma(0.2, F32),
        lambda: dist.Dirichlet(torch.full((3,), 0.2, dtype=F64)),
        lambda: dist.Uniform(torch.tensor(2.0), torch.tensor(5.0)),
    ],
    ids=["beta", "gamma", "gamma in float32", "dirichlet", "uniform in float32"],
)
def test_means_of_nuts_without_a_warning(make: Callable[[], Any]) -> None:
    mean, error = sampled(make)
    within_se(mean, mean_of(make()).double(), error)


def test_a_run_warns_of_mass_that_its_numbers_cannot_hold() -> None:
    def run(model: Callable[[], object]) -> None:
        mcmc = MCMC(NUTS(), 5, 5, 2, seed=0, progress=False)
        mcmc.run(ModelEnergy(model))

    def narrow() -> None:
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("p", beta(0.05, F32))

    message = (
        r"site 'p': 2\d % of the mass .* in float32 can be, .* concentration of 0\.05\d?; .*float64"
    )
    with pytest.warns(UserWarning, match=message):
        run(narrow)
    with pytest.warns(UserWarning, match=r"in float64 can be.*sample the logarithm or logit"):
        run(lambda: pyro.sample("p", beta(0.02, F64)))

    def informed() -> None:
        p = pyro.sample("p", beta(0.05, F32))
        pyro.sample("y", dist.Binomial(10, p), obs=torch.tensor(4.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(informed)  # data move the mass away from the edges
