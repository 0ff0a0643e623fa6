"""Tempered SMC against exact log Z, its unbiasedness over many islands, its mode masses, and
mutants that must be caught."""

from __future__ import annotations

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from lib.tempered import separated
from torch import Tensor

from pyroebm import HMC, MALA, ULA, Energy, smc
from pyroebm.core import DistributionEnergy
from pyroebm.smc import SMCResult, systematic, tempered_smc
from pyroebm.targets import DoubleWell, Exponential, Gaussian, GaussianMixture, HalfDisc, ManyWell


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def wide(dim: int | None = None, scale: float = 2.0) -> Gaussian:
    return Gaussian(
        number(0.0) if dim is None else torch.zeros(dim, dtype=torch.float64), scale=scale
    )


@pytest.mark.parametrize(
    ("energy", "base", "particles"),
    [
        (DoubleWell(dtype=torch.float64), wide(), 256),
        (
            DoubleWell(dtype=torch.float64),
            dist.StudentT(number(5.0), number(0.0), number(1.5)),
            256,
        ),
        (separated(), wide(2, 5.0), 256),
        (GaussianMixture.grid(3, dtype=torch.float64), wide(2, 5.0), 512),
        (HalfDisc(dtype=torch.float64), wide(), 256),
        (Exponential(dtype=torch.float64), dist.Gamma(number(2.0), number(0.7)), 256),
        (ManyWell(4, dtype=torch.float64), wide(8), 256),
    ],
    ids=[
        "double well",
        "from a Student distribution",
        "separated modes",
        "nine modes",
        "half-disc",
        "positive",
        "many wells",
    ],
)
def test_log_z_is_the_exact_one(energy: Energy, base: Energy, particles: int) -> None:
    result = tempered_smc(
        energy,
        base,
        HMC(num_steps=4),
        particles,
        num_islands=24,
        generator=torch.Generator().manual_seed(1),
    )
    within_se(result.log_z.value, energy.log_z, result.log_z.standard_error, what="log Z")
    assert result.log_z.standard_error < 0.06
    assert result.log_z.kind == "estimate"
    assert result.betas[0] == 0.0
    assert result.betas[-1] == 1.0
    assert bool((result.betas.diff() > 0).all())
    assert bool((result.ess > 0.4 * particles).all())
    assert float(result.acceptance[-1]) > 0.5
    assert math.isclose(
        float(result.log_weights.logsumexp(0)) - math.log(24 * particles), result.log_z.value
    )
    mean, se = result.expectation(lambda x: x)
    within_se(mean, energy.mean, se, what="mean")


def test_separated_modes_get_their_weights() -> None:
    energy = separated()
    result = tempered_smc(
        energy,
        wide(2, 5.0),
        HMC(num_steps=4),
        512,
        num_islands=32,
        generator=torch.Generator().manual_seed(2),
    )
    mass, se = result.expectation(lambda x: energy.mode_of(x) == 1)
    assert se < 0.01
    within_se(mass, 0.2, se)
    variance, se = result.expectation(lambda x: x[:, 1].square())
    within_se(variance, 1.0, se)


def unbiased(seed: int = 3) -> SMCResult:
    """Islands of eight particles, where log Z is off by .1: their mean Z is not."""
    energy = DoubleWell(dtype=torch.float64)
    pilot = tempered_smc(
        energy,
        wide(),
        MALA(),
        64,
        num_islands=16,
        num_moves=2,
        generator=torch.Generator().manual_seed(seed),
    )
    return tempered_smc(
        energy,
        wide(),
        MALA(),
        8,
        num_islands=8_000,
        num_moves=2,
        pilot=pilot,
        generator=torch.Generator().manual_seed(seed + 1),
    )


def test_z_is_unbiased_along_the_temperatures_of_a_pilot_and_log_z_low() -> None:
    result, truth = unbiased(), DoubleWell().log_z
    assert result.log_z.kind == "lower"
    ratio = (result.island_log_z - truth).exp()
    within_se(ratio.mean(), 1.0, ratio.std() / math.sqrt(len(ratio)), what="Z over its truth")
    within_se(result.log_z.standard_error, ratio.std() / ratio.mean() / math.sqrt(len(ratio)), 1e-6)
    logs = result.island_log_z
    assert logs.mean() + 5 * logs.std() / math.sqrt(len(logs)) < truth, "Jensen's gap must be seen"


def test_the_standard_error_is_the_spread_of_repeated_runs() -> None:
    energy = DoubleWell(dtype=torch.float64)
    runs = [
        tempered_smc(
            energy,
            wide(),
            MALA(),
            64,
            num_islands=8,
            num_moves=2,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(40)
    ]
    spread = torch.tensor([run.log_z.value for run in runs]).std()
    said = torch.tensor([run.log_z.standard_error for run in runs]).square().mean().sqrt()
    within_se(said / spread, 1.0, math.sqrt(1 / (2 * 39) + 1 / (2 * 7 * 40)))


# Mutants


def assert_caught() -> None:
    truth = DoubleWell().log_z
    ratio = (unbiased().island_log_z - truth).exp()
    with pytest.raises(AssertionError, match="not within"):
        within_se(ratio.mean(), 1.0, ratio.std() / math.sqrt(len(ratio)))


def test_mutant_resampling_by_the_same_number_of_each_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        smc,
        "systematic",
        lambda weights, offset: torch.arange(weights.shape[1]).expand(weights.shape),
    )
    assert_caught()


def test_mutant_weights_of_the_next_temperature_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing after the move and not before."""
    advance, move = smc._Run.advance, smc._Run.move

    def late(run: smc._Run, beta: float) -> None:
        before, run.beta = run.beta, beta
        move(run, 2, 0.5)
        run.step_sizes.pop(), run.acceptance.pop()
        run.beta = before
        advance(run, beta)

    monkeypatch.setattr(smc._Run, "advance", late)
    assert_caught()


def test_mutant_normaliser_of_the_base_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "_log_z", lambda self: 0.0)
    assert_caught()


# Parts


def test_systematic_resampling_keeps_the_whole_part_of_each_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 50, generator=generator, dtype=torch.float64) ** 4
    weights[:, ::7] = 0.0
    weights[:, -1] = 0.0
    weights /= weights.sum(1, keepdim=True)
    offset = torch.rand(200, generator=generator, dtype=torch.float64)
    offset[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    index = systematic(weights, offset)
    counts = torch.stack([torch.bincount(row, minlength=50) for row in index])
    assert counts.shape == (200, 50)
    assert (counts >= (50 * weights - 1e-9).floor()).all()
    assert (counts <= (50 * weights + 1e-9).floor() + 1).all()
    assert (counts[weights == 0] == 0).all()
    many = systematic(
        weights[:1].expand(20_000, 50), torch.rand(20_000, generator=generator, dtype=torch.float64)
    )
    counts = torch.stack([(many == j).sum(1) for j in range(50)], 1).double()
    kept = weights[0] > 1e-4
    within_se(
        counts.mean(0)[kept],
        50 * weights[0][kept],
        counts.std(0)[kept] / math.sqrt(20_000),
        what="mean count",
    )


def test_a_distribution_as_an_energy() -> None:
    energy = DistributionEnergy(dist.Gamma(number(2.0), number(1.0)), dtype=torch.float64)
    x = torch.tensor([0.5, -1.0, math.nan], dtype=torch.float64)
    assert energy(x)[1:].tolist() == [math.inf, math.inf]
    assert math.isclose(float(energy(x)[0]), 0.5 - math.log(0.5))
    before = torch.get_rng_state()
    a, b = (energy.sample(4000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    within_se(a.mean(), 2.0, a.std() / math.sqrt(4000))
    with pytest.raises(ValueError, match=r"batch_shape \(3,\).*to_event"):
        DistributionEnergy(dist.Normal(torch.zeros(3), 1.0))


def test_same_seed_same_particles() -> None:
    a, b, c = (
        tempered_smc(
            DoubleWell(dtype=torch.float64),
            wide(),
            MALA(),
            16,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.log_weights, b.log_weights)
    assert a.log_z != c.log_z


def test_one_island_has_no_standard_error() -> None:
    result = tempered_smc(DoubleWell(dtype=torch.float64), wide(), MALA(), 64, num_islands=1)
    assert math.isnan(result.log_z.standard_error)
    assert math.isnan(float(result.expectation(lambda x: x)[1]))


def test_islands_of_which_one_decides_have_no_standard_error() -> None:
    result = tempered_smc(DoubleWell(dtype=torch.float64), wide(), MALA(), 64, num_islands=16)
    uneven = torch.linspace(0.0, 40.0, 16, dtype=torch.float64)
    one = dataclasses.replace(
        result, island_log_z=uneven, log_weights=result.log_weights + uneven.repeat_interleave(64)
    )
    assert math.isfinite(float(result.expectation(lambda x: x)[1]))
    assert float(one.expectation(lambda x: x)[1]) == math.inf


class Broken(Energy):
    def __init__(self, value: float) -> None:
        super().__init__(())
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 6.0, x**2, self.value)


def test_energies_that_are_no_density_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="NaN or -inf at 128 of 128 draws"):
        tempered_smc(Broken(math.nan).double(), wide(scale=0.1), MALA(), 16)
    with pytest.raises(FloatingPointError, match="all particles of 8 of 8 islands have weight 0"):
        tempered_smc(Broken(math.inf).double(), wide(scale=0.1), MALA(), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_particles": 1}, "num_particles must be at least 2, got num_particles=1"),
        ({"num_islands": 0}, "num_islands must be at least 1"),
        ({"num_moves": 0}, "num_moves must be at least 1"),
        ({"kernel": ULA()}, "ULA is not exact"),
        (
            {"base": DoubleWell(dtype=torch.float64) * 0.5},
            "base must be a distribution, or an Energy with exact draws",
        ),
        (
            {"base": Gaussian(torch.zeros(2, dtype=torch.float64))},
            "reference must have the event_shape",
        ),
        ({"energy": 3.0}, "energy must be a pyroebm.Energy"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    settings = {
        "energy": DoubleWell(dtype=torch.float64),
        "base": wide(),
        "kernel": MALA(),
        "num_particles": 16,
    }
    with pytest.raises(ValueError, match=message):
        tempered_smc(**(settings | change))
