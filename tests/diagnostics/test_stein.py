"""Stein residuals: exact draws pass, biased ones and those at a wrong temperature do not."""

from __future__ import annotations

import math

import pytest
import torch
from lib.checks import mean_and_se, within_se
from torch import Tensor

from pyroebm import MCMC, NUTS, ULA, Energy
from pyroebm.core import Unconstrained
from pyroebm.diagnostics import stein_residual, stein_z
from pyroebm.targets import DoubleWell, Exponential, Funnel, Gaussian, HalfDisc


def grouped(energy: Energy, chains: int = 16, draws: int = 2000) -> Tensor:
    x = energy.sample(chains * draws, torch.Generator().manual_seed(3))
    return x.reshape(chains, draws, *energy.event_shape)


def ten_dimensions() -> Energy:
    scales = torch.logspace(-1, 1, 10, dtype=torch.float64)
    return Gaussian(50.0 * scales, torch.diag(scales**2))


@pytest.mark.parametrize(
    "energy",
    [
        DoubleWell().double(),
        ten_dimensions(),
        Unconstrained(Exponential(2.0).double()),
        Funnel().double(),
    ],
    ids=["double well", "normal far from 0", "exponential", "funnel"],
)
def test_exact_draws_pass(energy: Energy) -> None:
    assert stein_residual(energy, grouped(energy)) < 4


def test_it_is_the_worst_z_of_the_three_identities() -> None:
    """Draws are independent, so that the error is the plain one."""
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(30, 4, 500, 1, dtype=torch.float64, generator=generator)

    def ratio(x: Tensor, s: Tensor, f: Tensor) -> float:
        return stein_z(x, s) / float(f.mean().abs() / (f.std() / math.sqrt(f.numel())))

    shifted = [ratio(x, -x + 0.7, -x + 0.7) for x in sets]
    steep = [ratio(x, -1.4 * x, 1 - 1.4 * (x - x.mean()) * x) for x in sets]
    for ratios in (shifted, steep):
        mean, se = mean_and_se(ratios)
        within_se(mean, 1.0, se, what="z in plain standard errors")


def test_a_temperature_3_percent_off_fails() -> None:
    """No entry alone shows it with so many draws; all together do."""
    energy = ten_dimensions()
    x = grouped(energy)
    mean = 50.0 * energy.variance.sqrt()
    assert stein_residual(energy, mean + math.sqrt(1.03) * (x - mean)) > 5
    assert stein_residual(energy, mean + math.sqrt(0.97) * (x - mean)) > 5


def test_a_shift_of_a_tenth_of_a_deviation_fails() -> None:
    energy = ten_dimensions()
    shift = torch.zeros(10, dtype=torch.float64)
    shift[4] = 0.1 * energy.variance[4].sqrt()
    assert stein_residual(energy, grouped(energy) + shift) > 5


def test_the_diagnosis_names_the_bias_of_langevin_at_a_large_step_and_clears_nuts() -> None:
    energy = Gaussian(torch.zeros(2, dtype=torch.float64))
    for kernel, biased in ((ULA(1.0), True), (NUTS(), False)):
        mcmc = MCMC(kernel, 1000, 200, 16, seed=0)
        mcmc.run(energy)
        judged = mcmc.diagnose()
        assert (judged.stein_z > 5) == biased
        assert ("do not fit the gradient" in str(judged)) == biased
        assert judged.mixed != biased


def test_an_edge_or_a_missing_gradient_is_said_by_nan() -> None:
    class Cut(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.detach() ** 2

    assert math.isnan(stein_residual(HalfDisc().double(), grouped(HalfDisc().double())))
    assert math.isnan(
        stein_residual(Cut(), torch.randn(2, 50, generator=torch.Generator().manual_seed(0)))
    )


def test_gradients_are_taken_at_a_part_of_many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroebm.diagnostics.stein.MAX_GRADIENTS", 1000)

    class Counts(Energy):
        rows = 0

        def forward(self, x: Tensor) -> Tensor:
            self.rows += len(x) * x.requires_grad
            return 0.5 * x**2

    energy = Counts()
    draws = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert stein_residual(energy, draws) < 5
    assert energy.rows == 4 * 250 + 1
