"""Asynchronous no-U-turn chains: the draws of one step at a time, whatever the other chains do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
import torch
from lib.checks import within_se
from lib.kernel_cases import assert_unchanged
from scipy import stats
from torch import Tensor

from pyroebm import MCMC, NUTS, Energy
from pyroebm.kernels import Dense, LowRank
from pyroebm.kernels.adaptation import DualAveraging
from pyroebm.kernels.metric import Metric
from pyroebm.kernels.nuts import driver
from pyroebm.kernels.nuts.driver import Chains
from pyroebm.targets import DoubleWell, Gaussian

_PHILOX = driver._philox
_DRAW = driver._draw_momenta


@numba.njit
def _philox(key: Any, counter: Any, row: Any, domain: Any) -> Any:
    return _PHILOX(key, counter, row, domain)


@numba.njit
def _draw_momenta(vectors: Any, row: Any, key: Any) -> Any:
    _DRAW(vectors, row, 0, key)


DIM = 3
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 2.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)
METRICS: dict[str, Tensor | Metric | None] = {
    "identity": None,
    "diagonal": torch.tensor([0.5, 1.5, 0.7], dtype=torch.float64),
    "dense": Dense.of_covariance(COVARIANCE),
    "low rank": LowRank(
        torch.tensor([0.7, 1.2, 0.9], dtype=torch.float64),
        torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64),
        torch.tensor([4.0], dtype=torch.float64),
    ),
}


class Uneven(Energy):
    """A wall beside a slope: trees of very different depths, and infinite energies."""

    def __init__(self) -> None:
        super().__init__((DIM,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 2.5, torch.inf, (x**4 / 8 + 0.1 * x).sum(-1))


def starts(chains: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(chains, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def one_by_one(kernel: NUTS, energy: Energy, x: Tensor, draws: int) -> list[Tensor]:
    """Positions, reports and the generator after as many calls of ``step``."""
    generator, state = torch.Generator().manual_seed(0), kernel.init(energy, x)
    found = []
    for _ in range(draws):
        state, info = kernel.step(energy, state, generator)
        found.append(torch.stack([state.x.sum(-1), info.energy, info.n_steps, info.tree_depth]))
    return [torch.stack(found), state.x, state.grad, generator.get_state()]


def together(
    kernel: NUTS, energy: Energy, x: Tensor, draws: int, ahead: int, most: int
) -> list[Tensor]:
    """The same from chains that run ahead of each other."""
    generator = torch.Generator().manual_seed(0)
    chains = Chains(energy, kernel.init(energy, x), generator, kernel.max_tree_depth, ahead=ahead)
    chains.set(kernel.step_size, kernel.inverse_mass)
    found = []
    while chains.taken < draws:
        chains.run(chains.taken + most, draws)
        steps = chains.take(most)
        info = steps.info
        assert info.tree_depth is not None
        parts = [steps.x.sum(-1), info.energy, info.n_steps, info.tree_depth]
        found.append(torch.stack(parts, 1))
        last = steps.last
    return [torch.cat(found), last.x, last.grad, generator.get_state()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_chains_that_run_ahead_draw_what_single_steps_draw(metric: str, dtype: torch.dtype) -> None:
    """Bit for bit, however far they may run ahead and however many draws are taken at once."""
    energy: Energy = Uneven().to(dtype)
    kernel, x = NUTS(0.3, METRICS[metric], max_tree_depth=6), starts(5, dtype)
    expected = one_by_one(kernel, energy, x, 30)
    assert len(set(expected[0][:, 3].flatten().tolist())) > 2, "trees of several depths"
    for ahead, most in ((1, 1), (4, 3), (64, 30)):
        found = together(kernel, energy, x, 30, ahead, most)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_a_chain_does_not_depend_on_the_others() -> None:
    kernel, energy = NUTS(0.4), Uneven().double()
    x = starts(6)
    other = torch.cat([x[:2], starts(4) + 1.0])
    (a, *_), (b, *_) = (together(kernel, energy, start, 25, 64, 25) for start in (x, other))
    assert torch.equal(a[..., :2], b[..., :2])
    assert not torch.equal(a[..., 2:], b[..., 2:])


def test_thinning_keeps_every_other_state_and_counts_all_gradients() -> None:
    kernel, energy = NUTS(0.4), DoubleWell().double()
    x = torch.linspace(-2, 2, 4).double()
    steps = []
    for thinning, draws in ((1, 20), (2, 10)):
        generator = torch.Generator().manual_seed(0)
        chains = Chains(energy, kernel.init(energy, x), generator, 10, thinning, 32)
        chains.set(kernel.step_size, None)
        while chains.finished < draws:
            chains.run(draws, draws)
        steps.append(chains.take(draws))
    every, other = steps
    assert torch.equal(every.x[1::2], other.x)
    pairs = every.info.n_steps.reshape(10, 2, 4)
    assert torch.equal(pairs.sum(1), other.info.n_steps)
    rates = every.info.acceptance_rate.reshape(10, 2, 4).mean(1)
    torch.testing.assert_close(rates, other.info.acceptance_rate)


def test_step_sizes_are_tuned_as_by_dual_averaging() -> None:
    kernel, energy = NUTS(0.1), DoubleWell().double()
    x = torch.linspace(-2, 2, 4).double()
    tuning = DualAveraging.start(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    chains = Chains(energy, kernel.init(energy, x), None, 10, ahead=64)
    chains.set(tuning.step_size, None, tuning, 0.8)
    while chains.finished < 40:
        chains.run(40, 40)
    for count in (1, 24, 15):
        steps = chains.take(count)
        assert steps.info.step_size is not None
        for rate, size in zip(steps.info.acceptance_rate, steps.info.step_size, strict=True):
            torch.testing.assert_close(size, torch.as_tensor(tuning.step_size))
            tuning = tuning.update(rate, 0.8)
        for a, b in zip(steps.tuning, tuning, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_random_numbers_are_those_of_philox() -> None:
    """Against the known answers of the authors' own tests."""
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in known:
        c0, c1, c2, c3 = (np.uint64(word) for word in counter)
        shift = np.uint64(32)
        found = _philox(np.uint64(key[0]) | np.uint64(key[1]) << shift, c0 | c1 << shift, c2, c3)
        parts = [int(part) for pair in found for part in (int(pair) >> 32, int(pair) & 0xFFFFFFFF)]
        assert " ".join(f"{part:08x}" for part in parts) == words


def test_momenta_are_standard_normal_and_differ_by_row_and_key() -> None:
    vectors = np.zeros((400, 1, 51))
    for row in range(len(vectors)):
        _draw_momenta(vectors, row, np.uint64(7 + row // 200))
    draws = vectors[:, 0]
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-4
    assert len(np.unique(draws)) == draws.size
    correlation = np.corrcoef(draws.T)[np.triu_indices(51, 1)]
    within_se(correlation.mean(), 0.0, 1.0 / math.sqrt(400 * len(correlation)))


def test_draws_do_not_depend_on_the_compiler() -> None:
    """The driver in plain Python: the same draws, up to rounding."""
    script = """
import torch
from pyroebm import NUTS
from pyroebm.targets import DoubleWell
x = torch.linspace(-2.0, 2.0, 3).double()
kernel, energy, generator = NUTS(0.2), DoubleWell().double(), torch.Generator().manual_seed(0)
state = kernel.init(energy, x)
for _ in range(3):
    state, info = kernel.step(energy, state, generator)
print([*state.x.tolist(), *info.n_steps.tolist()])
"""
    found = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=os.environ | {"NUMBA_DISABLE_JIT": off},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for off in ("0", "1")
    ]
    a, b = (np.array(eval(text)) for text in found)
    np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_energy_that_is_not_finite_diverges(bad: float) -> None:
    """Also where the compiler may reorder sums: `x - x` is 0 to it."""

    class Half(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, bad)

    energy = Half().double()
    state = NUTS(100.0).init(energy, torch.ones(64, dtype=torch.float64))
    state, info = NUTS(100.0).step(energy, state, torch.Generator().manual_seed(0))
    assert info.diverging.any()
    assert bool((state.x > 0).all())
    assert bool((info.acceptance_rate[info.n_steps == 1] <= 0.5).any())


def test_no_energy_is_asked_about_an_infinity() -> None:
    class Strict(Energy):
        def forward(self, x: Tensor) -> Tensor:
            assert bool(torch.isfinite(x).all())
            return 0.5 * x**2

    energy = Strict().double()
    kernel = NUTS(step_size=1e37, inverse_mass=torch.tensor(1e300, dtype=torch.float64))
    state = kernel.init(energy, torch.linspace(-2.0, 2.0, 8).double())
    after, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
    assert torch.equal(after.x, state.x)
    assert bool(info.diverging.all())
    assert info.n_steps.tolist() == [1] * 8
    assert info.acceptance_rate.tolist() == [0.0] * 8


def test_the_largest_depth_is_reported_where_a_trajectory_ends_by_it() -> None:
    energy = Gaussian(torch.zeros(2, dtype=torch.float64))
    state = NUTS().init(energy, energy.sample(64, torch.Generator().manual_seed(0)))
    for step_size, reached in ((1e-3, True), (0.5, False)):
        _, info = NUTS(step_size, max_tree_depth=4).step(
            energy, state, torch.Generator().manual_seed(0)
        )
        assert info.reached_max_treedepth is not None
        assert bool(info.reached_max_treedepth.all()) == reached
        assert bool(info.reached_max_treedepth.any()) == reached
        assert torch.equal(info.reached_max_treedepth, info.n_steps == 15) or not reached


@pytest.mark.parametrize("metric", METRICS)
def test_exact_draws_stay_exact_under_each_metric(metric: str) -> None:
    energy = Gaussian(torch.zeros(DIM, dtype=torch.float64), COVARIANCE)
    kernel = NUTS(0.6, METRICS[metric])
    generator = torch.Generator().manual_seed(3)
    state = kernel.init(energy, energy.sample(40_000, generator))
    for _ in range(4):
        state, _ = kernel.step(energy, state, generator)
    whitened = state.x @ torch.linalg.inv(torch.linalg.cholesky(COVARIANCE)).T
    square = whitened**2
    within_se(square.mean(), 1.0, square.std() / math.sqrt(square.numel()))
    cross = whitened[:, 0] * whitened[:, 1]
    within_se(cross.mean(), 0.0, cross.std() / math.sqrt(len(cross)))


def test_exact_draws_stay_exact() -> None:
    """What the mutants of the driver in tests/test_mutants.py must fail."""
    assert_unchanged(NUTS(step_size=0.5), DoubleWell().double())


@pytest.mark.parametrize("chains", [1, 64])
def test_chains_of_a_batch_take_no_more_ticks_than_the_longest(chains: int) -> None:
    """No chain waits for another: as many gradients of the batch as the chain with most of them."""
    energy, kernel = DoubleWell().double(), NUTS(0.2)
    calls: list[Tensor] = []

    class Counted(DoubleWell):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return super().forward(x)

    counted = Counted().double()
    state = kernel.init(energy, energy.sample(chains, torch.Generator().manual_seed(0)))
    batch = Chains(counted, state, None, 10, ahead=128)
    batch.set(0.2, None)
    while batch.finished < 100:
        batch.run(100, 100)
    assert len(calls) == int(batch.take(100).info.n_steps.sum(0).max())


def test_warm_up_learns_the_same_however_many_steps_come_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chain far from the others moves late: it is left out of the metric until then."""
    energy = Gaussian(torch.zeros(DIM, dtype=torch.float64), COVARIANCE)
    x = torch.cat([starts(3), torch.full((1, DIM), 1e4, dtype=torch.float64)])
    found = []
    for single_steps in (False, True):
        monkeypatch.setattr(MCMC, "_single_steps", single_steps)
        mcmc = MCMC(NUTS(), num_samples=20, warmup_steps=90, num_chains=4, seed=0)
        mcmc.run(energy, x)
        found.append(mcmc.get_samples(group_by_chain=True)["x"])
    assert torch.equal(*found)


def test_short_warm_ups_learn_a_metric() -> None:
    """Scales of .01, 1 and 100 within 50 steps: with the identity, 198 leapfrog steps a draw."""
    scale = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    mcmc = MCMC(NUTS(), num_samples=100, warmup_steps=50, num_chains=4, seed=0)
    mcmc.run(Gaussian(torch.zeros(3, dtype=torch.float64), scale=scale))
    assert float(mcmc.get_stats()["n_steps"].double().mean()) < 30


@pytest.mark.parametrize("metric", [None, Dense.of_covariance(COVARIANCE), METRICS["low rank"]])
def test_a_row_that_ended_at_an_infinity_is_asked_about_no_more(metric: Any) -> None:
    """The first chain ends at once and rests, while the second goes on."""
    asked: list[Tensor] = []

    class Noted(Energy):
        def __init__(self) -> None:
            super().__init__((DIM,))

        def forward(self, x: Tensor) -> Tensor:
            asked.append(x.detach().clone())
            return 0.5 * (x**2).sum(-1)

    energy, x = Noted().double(), starts(2)
    kernel = NUTS(torch.tensor([1e200, 0.1], dtype=torch.float64), metric)
    state = kernel.init(energy, x)
    for _ in range(3):
        state, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
    assert info.diverging.tolist() == [True, False]
    assert all(bool(torch.isfinite(points).all()) for points in asked)


def test_what_counts_as_a_divergence_is_not_kept_in_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy = DoubleWell().double()
    state = NUTS().init(energy, torch.full((64,), 3.0, dtype=torch.float64))
    kernel = NUTS(0.25, max_tree_depth=1)
    rates = []
    for threshold in (1000.0, 1e-6):
        monkeypatch.setattr(driver, "MAX_ENERGY_ERROR", threshold)
        _, info = kernel.step(energy, state, torch.Generator().manual_seed(0))
        rates.append(float(info.diverging.double().mean()))
    assert rates[0] < 0.2 < rates[1]


def test_numba_that_cannot_be_imported_is_named_and_left_out(tmp_path: Any) -> None:
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.3 or less")')
    script = """
import torch
from pyroebm import MCMC, NUTS
from pyroebm.targets import DoubleWell
mcmc = MCMC(NUTS(), 5, 5, 4, seed=0)
mcmc.run(DoubleWell())
print(mcmc.get_samples()["x"].shape)
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "torch.Size([20])"
    assert "numba cannot be imported (Numba needs NumPy 2.3 or less)" in done.stderr
