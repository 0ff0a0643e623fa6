"""Tilted distributions: a discriminator's logit in closed form, log Z by quadrature and from draws,
a generator's latents, mutants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import seeded
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import MCMC, NUTS, Energy
from pyroebm.energies import MLPEnergy, Tilted
from pyroebm.kernels import HMC, MALA, Kernel
from pyroebm.nn import convolutions, mlp
from pyroebm.objectives import ReplayBufferCD
from pyroebm.partition import quadrature
from pyroebm.targets import DoubleWell, Gaussian
from pyroebm.training import fit_steps

F64 = torch.float64
SHIFT = 1.5


def logit(z: Tensor) -> Tensor:
    """Of N(m, 1) against N(0, 1), the optimal discriminator's: m z - m^2 / 2."""
    return SHIFT * z - 0.5 * SHIFT**2


def normal(*shape: int, dtype: torch.dtype = F64) -> dist.Distribution:
    zeros = torch.zeros(shape, dtype=dtype)
    return dist.Normal(zeros, 1.0).to_event(len(shape))


def discriminated(kind: type[Tilted] = Tilted) -> Tilted:
    return kind(normal(), lambda z: -logit(z), dtype=F64)


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def check_density(tilted: Tilted) -> None:
    """It is N(m, 1), normalised: Z = 1."""
    z = torch.linspace(-3.0, 5.0, 30, dtype=F64)
    torch.testing.assert_close(
        -tilted(z), dist.Normal(torch.tensor(SHIFT, dtype=F64), 1.0).log_prob(z)
    )
    log_z = quadrature(tilted)
    assert log_z.kind == "exact"
    assert abs(log_z.value) < 1e-8


def check_draws(tilted: Tilted, kernel: Kernel) -> None:  # type: ignore[type-arg]
    mcmc = MCMC(kernel, num_samples=300, warmup_steps=200, num_chains=64, seed=0)
    mcmc.run(tilted)
    z = mcmc.get_samples(group_by_chain=True)["x"]
    for values, truth in ((z, SHIFT), ((z - SHIFT) ** 2, 1.0)):
        mean, se = mean_and_se(values.mean(1))
        within_se(mean, truth, se)


# --------------------------------------------------------------------------------------------------


def test_an_optimal_discriminator_gives_the_data_distribution() -> None:
    check_density(discriminated())


@pytest.mark.parametrize("kernel", [MALA(0.9), NUTS()])
def test_it_is_sampled_by_any_kernel(kernel: Kernel) -> None:  # type: ignore[type-arg]
    check_draws(discriminated(), kernel)


def test_log_z_from_draws_of_the_base() -> None:
    """Z / Z0 = E_p0[exp(-f)], for a tilt that is no density ratio."""
    tilted = Tilted(normal(2), lambda z: 0.3 * (z**4).sum(1), dtype=F64)
    z = tilted.base.sample(200_000, seeded(1))
    mean, se = mean_and_se(torch.exp(-tilted.f(z)))
    within_se(mean, math.exp(quadrature(tilted).value), se)


def test_latents_of_a_generator() -> None:
    """z ~ N(0, I) exp(d(G(z))) with a curved G: G(z) has the distribution of G(N(0, I)) times
    exp(d), here by quadrature over z."""

    def generate(z: Tensor) -> Tensor:
        return torch.stack(
            [z[:, 0] + 0.5 * torch.sin(2.0 * z[:, 1]), z[:, 1] + 0.3 * z[:, 0] ** 2], 1
        )

    def judge(x: Tensor) -> Tensor:
        return 1.2 * x[:, :1] - 0.4 * x[:, 1:] ** 2

    tilted = Tilted(normal(2), lambda z: -judge(generate(z)), dtype=F64)
    axis = torch.linspace(-7.0, 7.0, 301, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    weight = torch.softmax(judge(generate(grid)).squeeze(1) - 0.5 * (grid**2).sum(1), 0)
    mcmc = MCMC(HMC(num_steps=6), num_samples=200, warmup_steps=200, num_chains=64, seed=2)
    mcmc.run(tilted)
    z = mcmc.get_samples(group_by_chain=True)["x"]
    x = generate(z.reshape(-1, 2)).reshape(z.shape)
    mean, se = mean_and_se(x.mean(1))
    within_se(mean, weight @ generate(grid), se)


BASES: dict[str, Callable[[torch.dtype], tuple[Tilted, tuple[int, ...]]]] = {
    "scalar": lambda dtype: (Tilted(dist.Normal(0.0, 1.0), torch.sin, dtype=dtype), ()),
    "energy": lambda dtype: (Tilted(DoubleWell(dtype=dtype), lambda z: z), ()),
    "vector": lambda dtype: (
        Tilted(Gaussian(torch.zeros(3, dtype=dtype)), mlp(3, 1, (4,), dtype=dtype)),
        (3,),
    ),
    "image": lambda dtype: (
        Tilted(
            normal(1, 4, 4, dtype=dtype),
            convolutions((1, 4, 4), 1, (2,), zero_last=False, dtype=dtype),
            dtype=dtype,
        ),
        (1, 4, 4),
    ),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_base(name: str, dtype: torch.dtype) -> None:
    tilted, shape = BASES[name](dtype)
    z = tilted.initial(6, seeded(0))
    assert z.dtype == tilted.dtype == dtype
    assert torch.equal(z, tilted.initial(6, seeded(0)))
    values = tilted(z.reshape(2, 3, *shape))
    assert values.shape == (2, 3)
    assert values.dtype == dtype
    torch.testing.assert_close(values.flatten(), tilted.base(z) + tilted.f(z).reshape(6))
    spoiled = z.clone()
    spoiled[2] = torch.nan
    dirty = tilted(spoiled)
    assert not bool(torch.isfinite(dirty[2]))
    assert torch.equal(dirty[[0, 1, 3, 4, 5]], tilted(z)[[0, 1, 3, 4, 5]])


def test_a_constrained_base_keeps_its_support() -> None:
    """Exponential(1) tilted by z is Exponential(2): log Z = -log 2, nothing outside."""
    tilted = Tilted(dist.Exponential(torch.tensor(1.0, dtype=F64)), lambda z: z, dtype=F64)
    assert float(tilted(torch.tensor(-1.0, dtype=F64))) == math.inf
    assert quadrature(tilted).value == pytest.approx(-math.log(2.0), abs=1e-7)
    assert isinstance(tilted.support, type(constraints.nonnegative))


def test_starts_avoid_what_the_tilt_forbids() -> None:
    tilted = Tilted(normal(), lambda z: torch.where(z > 0, 0.0, torch.inf), dtype=F64)
    assert bool((tilted.initial(50, seeded(0)) > 0).all())


def test_a_tilt_is_learned_on_a_frozen_base() -> None:
    """Persistent chains teach a linear tilt of N(0, 1) the mean of the data: f(z) = -m z."""
    tilted = Tilted(normal(1), nn.Linear(1, 1, dtype=F64), dtype=F64)
    data = SHIFT + torch.randn(2000, 1, dtype=F64, generator=seeded(3))
    means = []
    loop = fit_steps(
        tilted,
        ReplayBufferCD(400, k=3, kernel=MALA(1.2)),
        data,
        num_steps=300,
        batch_size=500,
        progress=False,
        optimizer="sgd",
        lr=0.2,
    )
    for step in loop:
        if step.number >= 150:
            means.append(-float(tilted.f.weight.detach()))
    within_se(sum(means) / len(means), data.mean(), 1.0 / math.sqrt(2000), what="the tilt")
    assert {name for name, _ in tilted.named_parameters()} == {"f.weight", "f.bias"}


def test_base_and_tilt_are_both_parts() -> None:
    inner = MLPEnergy((2,), (4,), scale=1.0)
    tilted = Tilted(inner, mlp(2, 1, (4,)))
    assert len(list(tilted.parameters())) == 8
    assert {name.split(".")[0] for name in tilted.state_dict()} == {"base", "f"}


def test_bad_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"Tilted takes an Energy or a distribution, .* got int and Linear"
    ):
        Tilted(3, nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got Gaussian and int"):
        Tilted(Gaussian(torch.zeros(2)), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_shape \(\)"):
        Tilted(dist.Normal(torch.zeros(3), 1.0), torch.sin)
    with pytest.raises(ValueError, match=r"to \(n,\) or \(n, 1\), got shape \(4, 2\)"):
        Tilted(Gaussian(torch.zeros(2)), lambda z: z)(torch.zeros(4, 2))


# --------------------------------------------------------------------------------------------------
# Mutants


class WrongSign(Tilted):
    def forward(self, z: Tensor) -> Tensor:
        return self.base(z) - self.f(z)


class NoBase(Tilted):
    def forward(self, z: Tensor) -> Tensor:
        return self.f(z) + 0.0 * self.base(z)


class TiltedTwice(Tilted):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + self.f(z)


@pytest.mark.parametrize("mutant", [WrongSign, NoBase, TiltedTwice])
def test_broken_tilts_are_caught(mutant: type[Tilted]) -> None:
    # without its base it has no integral, and quadrature says so
    with pytest.raises((AssertionError, ValueError)):
        check_density(discriminated(mutant))
    if mutant is not NoBase:
        with pytest.raises(AssertionError):
            check_draws(discriminated(mutant), MALA(0.9))


def test_tilted_is_an_energy() -> None:
    assert isinstance(discriminated() + Gaussian(torch.tensor(0.0, dtype=F64)), Energy)
