"""The benchmarks' own machinery: cases that say the truth, rows of one schema, tables made from
them. No peer is needed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from lib.checks import within_se
from scipy import stats
from torch import Tensor

from benchmarks import (
    boltzmann,
    flows,
    metrics,
    pyro_examples,
    samplers,
    starts,
    stopwatch,
    tables,
    training,
    truth,
)
from benchmarks.suite import additive, answers, cases, fitters, in_pyro
from benchmarks.suite.cases import Array
from benchmarks.suite.example_models import EXAMPLES
from benchmarks.suite.example_worker import run_example
from benchmarks.suite.flow_cases import FLOW_CASES, Counted, judge
from benchmarks.suite.measure import Job, Row, Run, sampler_rows, time_runs, worst_z
from benchmarks.suite.posteriordb import DENSITIES, posteriordb_cases
from pyroebm import Energy
from pyroebm.core.statistics import mcse_mean
from pyroebm.kernels.adaptation.covariance import PooledVariance, shrunk
from pyroebm.targets import Gaussian

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = ["case", "library", "version", "metric", "value", "spread", "settings"]
METRICS = {
    "ess_per_second",
    "ess_per_second_with_warmup",
    "ess_per_second_with_compile",
    "ess_per_gradient",
    "worst_z",
}
JOB = Job("net", "numpyro", "NUTS", 4, 50, 200, 3, 10.0, {})


def exact_run(seed: int, shift: float = 0.0) -> Run:
    """A run whose draws are independent ones of the 50-d normal, and whose clock is made up."""
    draws = np.random.default_rng(seed).standard_normal((4, 200, 50)) * cases.SCALES
    return Run(
        draws + shift * cases.SCALES, warmup_seconds=1.0, sampling_seconds=2.0, gradients=8000
    )


def check_rows(rows: list[Row]) -> None:
    for row in rows:
        assert list(row) == KEYS
        assert isinstance(row["settings"]["chains"], int)
        assert row["settings"]["repeats"] >= 1
        if row["value"] is not None:
            low, high = row["spread"]
            assert low <= row["value"] <= high
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_modules_import_without_peers() -> None:
    """In a process that cannot import a peer, all that the command line needs is there."""
    code = (
        "import sys\n"
        "peers = ['jax', 'numpyro', 'blackjax', 'optax', 'pymc', 'nutpie', 'owalnuts']\n"
        "sys.modules.update(dict.fromkeys(peers))\n"
        "import benchmarks.samplers, benchmarks.stopwatch, benchmarks.tables\n"
        "import benchmarks.suite.worker, benchmarks.suite.answers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_peer_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["samplers", "--quick", "--only", "numpyro", "--out", str(tmp_path)]
    )
    assert samplers.main() == 0
    assert "missing, no row" in capsys.readouterr().out
    assert not (tmp_path / "samplers.json").exists()


def test_rows_of_a_run() -> None:
    rows = sampler_rows(JOB, cases.CASES["normal"], [exact_run(1), exact_run(2), exact_run(3)], 4.0)
    check_rows(rows)
    found = {row["metric"]: row["value"] for row in rows}
    assert set(found) >= METRICS
    assert found["ess_per_second"] == pytest.approx(3 * found["ess_per_second_with_warmup"] / 2)
    assert found["ess_per_second"] == pytest.approx(7 * found["ess_per_second_with_compile"] / 2)
    assert found["ess_per_gradient"] == pytest.approx(found["min_ess"] / 8000)
    assert found["gradients_per_draw"] == 10.0
    assert found["compile_seconds"] == 4.0


def test_worst_z_tells_right_from_wrong() -> None:
    """Exact draws pass; a mean that is off by a quarter of a standard deviation does not."""

    def worst(shift: float) -> float:
        rows = sampler_rows(JOB, cases.CASES["normal"], [exact_run(1, shift)], None)
        return next(row["value"] for row in rows if row["metric"] == "worst_z")

    assert worst(0.0) < 5.0
    assert worst(0.25) > 5.0


def test_first_call_is_compiling_and_budget_ends_runs() -> None:
    seeds = []

    def run(seed: int) -> Run:
        seeds.append(seed)
        return exact_run(seed) if seed else Run(np.zeros((1, 1, 1)), 10.0, 2.0, 1)

    runs, compiling = time_runs(run, repeats=3, budget=100.0, compiles=True)
    assert (seeds, len(runs), compiling) == ([0, 1, 2, 3], 3, 9.0)
    assert len(time_runs(run, repeats=3, budget=0.0, compiles=True)[0]) == 1
    assert time_runs(run, repeats=1, budget=0.0, compiles=False)[1] is None


@pytest.mark.parametrize(("options", "blocks"), [({}, 1), ({"chain_batch_size": 2}, 3)])
def test_our_two_phases_are_told_apart(
    options: dict[str, int], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that counts evaluations: MALA takes one for each step of a block, and its starts
    some beforehand."""
    from benchmarks.suite import with_pyroebm

    class Counts(Energy):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return 0.5 * x**2

    energy = Counts()
    monkeypatch.setattr(with_pyroebm.time, "perf_counter", lambda: energy.calls)
    job = Job("normal", "pyroebm", "MALA", 6, 20, 30, 1, 10.0, options)
    mcmc, warmup, sampling, gradients = with_pyroebm.clocked_run(
        job, energy, 6, torch.linspace(-1, 1, 6), seed=1
    )
    assert len(mcmc.kernels) == blocks
    assert sampling == 30 * blocks
    assert warmup + sampling == energy.calls
    assert warmup > 20 * blocks
    assert gradients == 6 * 30


def test_eight_schools_truth_is_the_published_one() -> None:
    """Reference draws of posteriordb: means of mu, tau, theta_1 and theta_8, and their Monte Carlo
    standard errors."""
    truth = cases.eight_schools_truth()[[0, 1, 2, 9]]
    assert np.all(
        np.abs(truth - [4.4105, 3.6021, 6.1505, 4.8840]) < 5 * np.array([0.033, 0.032, 0.056, 0.05])
    )


def test_net_energy_in_numpy_is_the_one_in_torch() -> None:
    from benchmarks.suite.in_torch import energy

    x = cases.CASES["net"].starts(16, seed=5)
    np.testing.assert_allclose(
        energy("net")(torch.as_tensor(x)).numpy(), cases.net_energy(x), rtol=1e-12
    )


def test_densities_in_jax_are_those_in_torch() -> None:
    """Up to a constant: differences of energies between states agree."""
    jax = pytest.importorskip(
        "jax",
        reason="JAX comes with the peers alone: pip install -c benchmarks/constraints.txt -e"
        " .[bench]",
    )
    from benchmarks.suite import in_jax
    from benchmarks.suite.in_torch import energy

    jax.config.update("jax_enable_x64", True)
    for name in ("normal", "funnel", "net"):
        x = cases.CASES[name].starts(8, seed=6)
        ours, theirs = (
            energy(name)(torch.as_tensor(x)).numpy(),
            -np.asarray(jax.vmap(in_jax.log_density(name))(x)),
        )
        np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", cases.CASES)
def test_coordinates_go_to_sites_and_back(name: str) -> None:
    case = cases.CASES[name]
    draws = np.random.default_rng(0).uniform(0.1, 1.0, (2, 3, case.dim))
    np.testing.assert_array_equal(case.join(case.split(draws)), draws)
    assert case.quantities(draws).shape == (2, 3, len(case.truth()))


def test_later_rows_replace_earlier_ones(tmp_path: Path) -> None:
    def rows(chains: int, value: float, metric: str = "min_ess") -> list[Row]:
        settings = {"method": "NUTS", "chains": chains, "repeats": 1}
        return [
            dict(
                zip(
                    KEYS,
                    ("net", "numpyro", "1", metric, value, [value, value], settings),
                    strict=True,
                )
            )
        ]

    path = tmp_path / "new" / "samplers.json"
    samplers.write(path, rows(1, 1.0) + rows(256, 2.0) + rows(256, 3.0, "worst_z"))
    samplers.write(path, rows(256, 4.0))
    assert json.loads(path.read_text()) == rows(1, 1.0) + rows(256, 4.0)


def test_quick_asks_for_everything_once_and_little() -> None:
    jobs = samplers.plan(True, None, None, 5, 600.0)
    assert {job.case for job in jobs} == {*cases.CASES, *samplers.CURVES}
    assert all(job.repeats == 1 and job.num_samples <= 50 for job in jobs)
    assert {job.library for job in samplers.plan(False, "pyro", "net", 5, 600.0)} == {"pyro"}


def gradient_row(chains: int, mode: str, value: float) -> Row:
    settings = {"method": "gradient", "chains": chains, "mode": mode, "repeats": 1}
    return dict(
        zip(
            KEYS,
            ("normal", "pyroebm", "1", "gradient_us", value, [value, value], settings),
            strict=True,
        )
    )


def test_tables_are_filled_from_rows() -> None:
    fast = Job("normal", "pyroebm", "NUTS", 4, 50, 200, 1, 10.0, {})
    slow = Run(exact_run(1).draws, 1.0, 20.0, 8000)
    rows = sampler_rows(JOB, cases.CASES["normal"], [slow], 1.0) + sampler_rows(
        fast, cases.CASES["normal"], [exact_run(1)], None
    )
    rows = [row | {"case": "normal", "version": "1.2"} for row in rows] + [
        gradient_row(256, "eager", 123456.0)
    ]
    names = ["normal", "net", "gradients", "chains curve"]
    page = "Words.\n" + "".join(
        f"<!-- table: {name} -->\nold\n<!-- end -->\nBetween.\n" for name in names
    )
    filled = tables.fill(page, rows)
    assert "old" not in filled
    assert filled.count("Between.") == len(names)
    assert filled.count("Not measured yet.") == 2  # the net and the curve
    ours = next(line for line in filled.splitlines() if line.startswith("| pyroebm 1.2 NUTS"))
    # chains, and ten times NumPyro
    assert [cell.strip() for cell in ours.split("|")][2:5:2] == ["4", "10.0"]
    assert "123,000" in filled
    assert tables.fill(filled, rows) == filled
    with pytest.raises(ValueError, match="`nothing`"):
        tables.fill("<!-- table: nothing -->\n<!-- end -->\n", rows)


def test_docs_page_is_what_the_results_make() -> None:
    page, rows = (
        (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"),
        tables.read_rows(RESULTS),
    )
    check_rows(rows)
    assert tables.fill(page, rows) == page, "run: python -m benchmarks.tables"
    slots = {match["name"] for match in tables.SLOT.finditer(page)}
    assert slots == {
        *cases.CASES,
        "gradients",
        *samplers.CURVES,
        *tables.MACHINE_CASES,
        "training",
        "nice",
        "starts",
        "stopwatch",
        "examples",
        "metrics",
        "truth",
        "efficiency",
        *FLOW_CASES,
    }


def test_truth_holds_draws_against_known_moments() -> None:
    rows = truth.measure(
        cases.MODEL_CASES["eight_schools"], chains=4, steps=60, seeds=2, target=0.8
    )
    check_rows(rows)
    assert {row["metric"] for row in rows} == {"worst_z", "divergences", "worst_r_hat"}
    assert all(row["settings"]["repeats"] == 2 and row["version"] for row in rows)
    made = tables.truth_table(rows)
    assert "| Eight schools, non-centered | 4 |" in made
    assert tables.truth_table([]) == tables.NOTHING


def test_machines_take_turns() -> None:
    """Rows of one schema for what is installed: the bare products come first, and ours are
    there."""
    rows = boltzmann.measure(steps=2, rounds=1, threads=torch.get_num_threads())
    check_rows(rows)
    for case in tables.MACHINE_CASES:
        libraries = [row["library"] for row in rows if row["case"] == case]
        assert libraries[0] == "torch"
        assert "pyroebm" in libraries
        assert "100%" in tables.milliseconds_table(case, rows)


def test_training_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one schema for what is installed, the limit first in each case; compiling has a row
    of its own."""
    # what compiles is tested elsewhere
    monkeypatch.setattr(training, "CompiledKernel", lambda kernel: kernel)
    rows = training.measure(calls=1, rounds=1, threads=torch.get_num_threads())
    check_rows(rows)
    for case in tables.TRAINING_CASES:
        found = [row for row in rows if row["case"] == case]
        assert [(row["library"], row["metric"]) for row in found][:4] == [
            ("torch", "milliseconds"),
            ("pyroebm", "milliseconds"),
            ("pyroebm", "compile_seconds"),
            ("pyroebm", "milliseconds"),
        ]
    filled = tables.training_table(rows)
    assert filled.count("100%") >= len(tables.TRAINING_CASES)
    assert filled.count("\n") == 2 + sum(row["metric"] == "milliseconds" for row in rows)
    assert tables.training_table([]) == tables.NOTHING


def test_limit_of_training_is_the_gradient() -> None:
    layers, x = training.net(), training.starts(8).requires_grad_()
    (expected,) = torch.autograd.grad(layers(x).sum(), x)
    torch.testing.assert_close(training.bare(x.detach(), layers).detach(), expected)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the flows ours alone, and the limit."""
    monkeypatch.setattr(
        flows.importlib.util, "find_spec", lambda name: name in ("torch", "pyroebm") or None
    )


def test_couplings_take_turns(no_peers: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of one schema for what is installed, the limit first in each size; a peer that is
    missing is named."""
    rows = flows.measure_steps(calls=1, rounds=1, compiled=False)
    check_rows(rows)
    for case in tables.NICE_CASES:
        assert [row["library"] for row in rows if row["case"] == case] == [
            "torch",
            "pyroebm",
            "pyroebm",
        ]
    assert "normflows AffineCouplingBlock, reverse_kld: missing, no row" in capsys.readouterr().out
    assert tables.nice_table(rows).count("100%") >= len(tables.NICE_CASES)
    assert tables.nice_table([]) == tables.NOTHING


def test_limit_of_couplings_is_the_gradient() -> None:
    net, x = (
        additive._net(3, 2),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(),
    )
    layers = [(layer.weight, layer.bias) for layer in net if isinstance(layer, torch.nn.Linear)]
    grad = torch.ones(5, 2)
    expected = torch.autograd.grad(
        net(x).sum(), [x, *(p for pair in reversed(layers) for p in pair)]
    )
    with torch.no_grad():
        at_x, at_weights = additive.bare(x, layers, grad)
    torch.testing.assert_close([at_x, *at_weights], list(expected))


@pytest.mark.parametrize("case", ["double well", "phi4"])
def test_flows_are_fitted_and_judged(case: str, no_peers: None) -> None:
    rows = flows.measure_fits(case, seconds=0.0, seeds=2, draws=100, warmup=2)
    check_rows(rows)
    assert {row["settings"]["method"] for row in rows} == {
        m for lib, m in fitters.FITTERS[case] if lib == "pyroebm"
    }
    found = {row["metric"]: row["value"] for row in rows}
    assert (found["steps"], found["evaluations"] % fitters.BATCH) == (2, 0)
    assert tables.flow_table(case, rows).count("pyroebm") == len(rows) // len(found)
    assert tables.flow_table(case, []) == tables.NOTHING


def test_failure_of_a_flow_is_told(no_peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(fitters.FITTERS, "grid", {("pyroebm", "broken"): fails})
    (row,) = flows.measure_fits("grid", seconds=0.0, seeds=1, draws=100, warmup=1)
    assert (row["value"], row["settings"]["failure"]) == (
        None,
        "seed 0: RuntimeError: no such thing",
    )


@pytest.mark.parametrize(
    "case", [name for name, case in FLOW_CASES.items() if case.make().has_exact_draws]
)
def test_judge_knows_right_from_wrong(case: str) -> None:
    """Draws of the target itself, weighed by its density, have no error; with half of the weights
    too large it is known; what is no number is none."""
    energy = FLOW_CASES[case].make()

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return energy.sample(n, torch.Generator().manual_seed(1)).reshape(n, -1), torch.full(
            (n,), energy.log_z
        )

    found = judge(energy, draw, lambda x: torch.full((len(x),), energy.log_z), 2000)
    assert found["log_z_error"] < 1e-5
    assert (found["ess"], found["forward_ess"]) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert found["eubo_gap"] == pytest.approx(0.0, abs=1e-5)
    half = math.log(2.0) * (torch.arange(2000) % 2)
    wrong = judge(
        energy,
        lambda n: (draw(n)[0], energy.log_z + half),
        lambda x: energy.log_z + half,
        2000,
        batch=2000,
    )
    # of weights 1 and 2: the mean 1.5, (1.5)^2 / 2.5, 1 / (1.5 x .75), and half of log 2
    assert wrong["log_z_error"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert (wrong["ess"], wrong["forward_ess"]) == pytest.approx((0.9, 1.0 / 1.125), abs=1e-5)
    assert wrong["eubo_gap"] == pytest.approx(0.5 * math.log(2.0), abs=1e-5)
    lost = judge(
        energy,
        lambda n: (draw(n)[0], torch.full((n,), torch.nan)),
        lambda x: torch.full((len(x),), 1.0),
        2000,
    )
    assert lost["log_z_error"] != lost["log_z_error"]


def test_evaluations_are_counted() -> None:
    counted = Counted(FLOW_CASES["double well"].make())
    assert counted(torch.zeros(3, 5, 1)).shape == (3, 5)
    assert counted.evaluations == 15


def test_constraints_pin_the_peers() -> None:
    pins = (ROOT / "benchmarks" / "constraints.txt").read_text(encoding="utf-8")
    for library in (
        "jax",
        "numpyro",
        "blackjax",
        "pyro-ppl",
        "torch",
        "rbms",
        "scikit-learn",
        "torchebm",
        "ebmkit",
        "normflows",
        "zuko",
        "nutpie",
        "owalnuts",
        "pymc",
        "numba",
    ):
        assert re.search(rf"^{library}==[\w.]+$", pins, flags=re.M), library


def test_every_sampler_has_an_adapter() -> None:
    for library in samplers.LIBRARIES:
        assert importlib.util.find_spec(f"benchmarks.suite.with_{library}") is not None


def test_starts_are_counted_and_make_tables() -> None:
    rows = starts.case_rows("double_well", "grouped", 2) + starts.efficiency_rows(
        "normal", "mean", 2, chains=2
    )
    for row in rows:
        row["version"] = "1"
    check_rows(rows)
    for text in (tables.starts_table(rows), tables.efficiency_table(rows)):
        widths = {line.replace("\\|", "").count("|") for line in text.splitlines()}
        assert len(widths) == 1
        assert "NUTS, " in text
    assert tables.starts_table([]) == tables.efficiency_table([]) == tables.NOTHING


VARIANCES = torch.tensor([1e-14, 1e-2, 1.0, 1e6], dtype=torch.float64)


def normal_rows(covariance: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Draws of N(1, covariance) and the energy's gradients there."""
    energy = Gaussian(torch.ones(len(covariance), dtype=torch.float64), covariance)
    x = energy.sample(n, torch.Generator().manual_seed(2))
    return x, (x - 1) @ torch.linalg.inv(covariance)


def check_diagonal() -> None:
    """Three draws of a normal with independent entries determine its variances, but for what those
    before count; many draws of a correlated one the roots of variances over precisions."""
    x, g = normal_rows(VARIANCES.diag(), 3)
    before = torch.tensor([1.0, 1.0, 4.0, 0.5], dtype=torch.float64)
    exact = torch.exp((3 * VARIANCES.log() + 5 * before.log()) / 8)
    found = metrics.PooledDiagonal.start(x).update(x, g).metric(before)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0.0)
    n, covariance = 20_000, torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    x, g = normal_rows(covariance, n)
    found = metrics.PooledDiagonal.start(x).update(x, g).metric()
    variance, precision = covariance.diagonal(), torch.linalg.inv(covariance).diagonal()
    # The logarithm of a variance has error sqrt(2 / n). The covariance of a draw and its gradient
    # is 1, and the errors of their variances correlate by the square of their correlation.
    error = ((1.0 - 1.0 / (variance * precision)) / n).sqrt()
    within_se(found.log() * (n + 5) / n, 0.5 * (variance / precision).log(), error)


def test_diagonal_fits_draws_and_gradients() -> None:
    check_diagonal()


def test_diagonals_agree_where_variances_of_draws_and_gradients_are_inverse() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = metrics.PooledDiagonal.start(x).update(x, x.flip(0) / x.var(0))
    torch.testing.assert_close(both.metric(), PooledVariance.start(x).update(x).metric())


def test_diagonal_has_no_unit_and_leaves_out_chains_that_stand_still() -> None:
    """Coordinates in other units; the second of four chains never moves, far from the others."""
    x, g = torch.randn(2, 50, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 1e6
    moved = torch.tensor([True, False, True, True])
    units = torch.tensor([1e-7, 1e3], dtype=torch.float64)
    before = torch.tensor([0.5, 2.0], dtype=torch.float64)
    three = metrics.PooledDiagonal.start(x[0, moved])
    scaled = metrics.PooledDiagonal.start(x[0])
    for q, grad in zip(x, g, strict=True):
        three = three.update(q[moved], grad[moved])
        scaled = scaled.update(q * units, grad / units, moved)
    expected = three.metric(before) * units**2
    torch.testing.assert_close(scaled.metric(before * units**2), expected, rtol=1e-9, atol=0.0)


def test_diagonal_keeps_entries_that_tell_nothing() -> None:
    """Draws, then gradients, that are constant; those that overflow; one entry is learned."""
    x = torch.randn(150, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = x.clone()
    x[:, 0], g[:, 1] = 0.1, 0.1
    x[:, 2], g[:, 3] = 1e200 * x[:, 2], 1e200 * g[:, 3]
    before = torch.tensor([6.0, 7.0, 8.0, 9.0, 10.0], dtype=torch.float64)
    both = metrics.PooledDiagonal.start(x)
    for q, grad in zip(x.split(3), g.split(3), strict=True):
        both = both.update(q, grad)
    assert (both.metric(before) == before).tolist() == [True] * 4 + [False]
    assert metrics.PooledDiagonal.start(x).metric(before) is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda draws, grads: draws,
        lambda draws, grads: 1.0 / grads,
        lambda draws, grads: draws / grads,
        lambda draws, grads: (draws * grads).sqrt(),
    ],
    ids=["draws alone", "gradients alone", "no root", "not inverted"],
)
def test_mutant_diagonals_are_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(self: metrics.PooledDiagonal, before: Tensor | None = None) -> Tensor | None:
        return shrunk(broken(*self.both.variance().chunk(2)), self.both.draws, before)

    monkeypatch.setattr(metrics.PooledDiagonal, "metric", metric)
    with pytest.raises(AssertionError):
        check_diagonal()


def test_metrics_are_compared_and_make_a_table() -> None:
    """A line for each metric, and the median of one ratio."""
    case = cases.MODEL_CASES["eight_schools"]
    rows = [
        row
        for metric in metrics.METRICS
        for row in metrics.case_rows(case, metric, seeds=2, steps=30, compile=False)
    ]
    check_rows(rows)
    value = {(row["settings"]["method"], row["metric"]): row["value"] for row in rows}
    old, new = (value[metrics.METHOD + metric, "ess_per_gradient"] for metric in metrics.METRICS)
    assert old != new  # the two learn different metrics
    text = tables.metrics_table(rows)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert f"draws and gradients to draws: {new / old:.3f} (" in text
    assert tables.metrics_table([]) == tables.NOTHING


def answer(seconds: float, r_hat: float = 1.01) -> dict[str, Any]:
    """What the stopwatch's worker says of a run."""
    metrics = {
        "seconds": seconds,
        "cpu_share": 1.0,
        "sampling_seconds": None,
        "gradients": 28_000,
        "divergences": 0,
        "min_ess": 900.0,
        "worst_r_hat": r_hat,
        "worst_z": None,
    }
    return {"metrics": metrics, "version": "1.2", "pinned": True}


def run_stopwatch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, tuple[float, float]],
    *arguments: str,
) -> list[str]:
    """The turns that a command line takes, with made-up clocks: seconds of the two processes for
    each library and method, none for one that fails."""
    turns: list[str] = []

    def take_turn(job: Job, seed: int, database: Path | None) -> tuple[list[dict[str, Any]], str]:
        name = f"{job.library} {job.method}"
        turns.append(f"{seed} {name}")
        return ([answer(s) for s in seconds[name]], "") if name in seconds else ([], "no luck")

    monkeypatch.setattr(stopwatch, "take_turn", take_turn)
    monkeypatch.setattr(
        stopwatch.importlib.util, "find_spec", lambda name: name != "nutpie" or None
    )
    monkeypatch.setattr(sys, "argv", ["stopwatch", "--out", str(folder), *arguments])
    stopwatch.main()
    return turns


CLOCKS = {
    "pyroebm NUTS": (9.0, 6.0),
    "numpyro NUTS, vectorized": (12.0, 5.0),
    "numpyro NUTS, sequential": (10.0, 8.0),
    "blackjax NUTS": (20.0, 20.0),
    "owalnuts WALNUTS": (7.0, 7.0),
}


def test_stopwatch_takes_turns_and_tells_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = run_stopwatch(tmp_path, monkeypatch, CLOCKS, "--case", "gp", "--repeats", "2")
    assert turns == [f"1 {name}" for name in [*CLOCKS, "pyro NUTS"]] + [f"2 {n}" for n in CLOCKS]
    said = capsys.readouterr().out
    assert "nutpie: missing, no rows" in said
    assert "gp, round 1 of 2: pyro NUTS: FAILED: no luck" in said
    rows = tables.read_rows(tmp_path)
    check_rows(rows)
    assert {(row["library"], row["settings"]["repeats"]) for row in rows} == {
        (name.split()[0], 2) for name in CLOCKS
    }
    text = tables.stopwatch_table(rows)
    # cold against the sequential mode, warm against the vectorized one
    ours = next(line for line in text.splitlines() if "pyroebm 1.2" in line)
    assert [cell.strip() for cell in ours.split("|")][3:7] == ["9.00", "0.900", "6.00", "1.20"]
    assert "faster mode in 1 of 2; Gaussian process, 50 points (second process: 1.20)." in text
    assert "(empty caches" not in text
    assert tables.stopwatch_table([]) == tables.NOTHING
    # rows of the same case and library as in benchmarks/samplers.py are another table's
    assert tables.case_table("gp", rows) == tables.NOTHING


def test_stopwatch_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has all its rounds is left out; what failed, or has fewer, has all its turns again."""
    some = ("--case", "net", "--repeats", "2")
    run_stopwatch(tmp_path, monkeypatch, CLOCKS, *some)
    run_stopwatch(tmp_path, monkeypatch, CLOCKS, *some[:3], "1", "--only", "blackjax")
    turns = run_stopwatch(tmp_path, monkeypatch, CLOCKS, *some, "--resume")
    assert turns == ["1 blackjax NUTS", "1 pyro NUTS", "2 blackjax NUTS"]


def test_stopwatch_needs_a_file_for_posteriordb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stopwatch(tmp_path, monkeypatch, CLOCKS, "--case", "garch") == []
    assert "skipped, since they need --posteriordb FILE: garch" in capsys.readouterr().out


def test_clock_starts_before_any_library() -> None:
    """What the stopwatch's worker imports itself brings none of the libraries with it."""
    code = (
        "import sys, benchmarks.suite.stopwatch_worker, benchmarks.suite.answers\n"
        "slow = {'torch', 'pyro', 'pyroebm', 'jax', 'numpyro', 'arviz', 'scipy', 'numba', 'pymc'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stopwatch_measures_us() -> None:
    """The worker's numbers of a short run of ours."""
    ((job, *_),) = stopwatch.plan(True, "pyroebm", ["eight_schools"], 1, 100.0)
    content = {"job": dataclasses.asdict(job), "seed": 1, "posteriordb": None}
    found, problem = samplers.in_process("benchmarks.suite.stopwatch_worker", content)
    assert problem is None
    metrics = found["metrics"]
    assert metrics["seconds"] > 0.0
    assert 0.0 < metrics["min_ess"] <= 4 * 100 * math.log10(4 * 100)
    assert metrics["worst_r_hat"] < 1.2
    assert metrics["worst_z"] < 5.0
    assert metrics["gradients"] >= 4 * 100


def test_entries_that_never_change_are_not_judged() -> None:
    """A Cholesky factor of a correlation matrix has two of them: R-hat would be no number."""
    case = cases.MODEL_CASES["slopes"]
    draws = np.random.default_rng(0).standard_normal((4, 100, case.dim))
    samples = case.split(draws)
    samples["chol"][..., 0, :] = [1.0, 0.0]
    found = answers.judged(case, samples)
    assert found["worst_z"] is None
    assert found["worst_r_hat"] < 1.1
    # the worst of many entries counts
    samples["z"][0] += 10.0
    assert answers.judged(case, samples)["worst_r_hat"] > 1.5


def test_process_that_takes_too_long_is_stopped() -> None:
    _, problem = samplers.in_process("benchmarks.suite.stopwatch_worker", {}, limit=0.01)
    assert problem == "stopped after 0 s"


# The densities of posteriordb as their Stan programs define them, up to a constant: from the data
# of the program and the parameters in the order of the reference.
def _stan_lags(d: dict[str, Any], p: Array) -> float:
    y, order = np.array(d["y"]), d["K"]
    mean = [p[0] + sum(p[k] * y[t - k] for k in range(1, order + 1)) for t in range(order, len(y))]
    prior = stats.norm.logpdf(p[: order + 1], 0, 10).sum() + stats.halfcauchy.logpdf(p[-1], 0, 2.5)
    return prior + stats.norm.logpdf(y[order:], mean, p[-1]).sum()


def _stan_arma(d: dict[str, Any], p: Array) -> float:
    (mu, phi, theta, sigma), y = p, d["y"]
    errors = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        errors.append(y[t] - (mu + phi * y[t - 1] + theta * errors[t - 1]))
    prior = stats.norm.logpdf(p[:3], 0, [10, 2, 2]).sum() + stats.halfcauchy.logpdf(sigma, 0, 2.5)
    return prior + stats.norm.logpdf(errors, 0, sigma).sum()


def _stan_garch(d: dict[str, Any], p: Array) -> float:
    mu, alpha0, alpha1, beta1 = p
    y = d["y"]
    sigma = [d["sigma1"]]
    for t in range(1, len(y)):
        sigma.append(np.sqrt(alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * sigma[t - 1] ** 2))
    return stats.norm.logpdf(y, mu, sigma).sum()


def _stan_iq(d: dict[str, Any], p: Array) -> float:
    mean = p[0] + p[1] * np.array(d["mom_iq"])
    return (
        stats.halfcauchy.logpdf(p[2], 0, 2.5) + stats.norm.logpdf(d["kid_score"], mean, p[2]).sum()
    )


def _stan_interaction(d: dict[str, Any], p: Array) -> float:
    school, iq = (np.array(d[name]) - np.mean(d[name]) for name in ("mom_hs", "mom_iq"))
    mean = p[0] + p[1] * school + p[2] * iq + p[3] * school * iq
    return stats.norm.logpdf(d["kid_score"], mean, p[4]).sum()


def _stan_gp(d: dict[str, Any], p: Array) -> float:
    (rho, alpha, sigma), x = p, np.array(d["x"])
    cov = alpha**2 * np.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * np.eye(len(x))
    prior = (
        stats.gamma.logpdf(rho, 25, scale=0.25) + stats.norm.logpdf([alpha, sigma], 0, [2, 1]).sum()
    )
    return prior + stats.multivariate_normal.logpdf(d["y"], np.zeros(len(x)), cov)


def _stan_mixture(d: dict[str, Any], p: Array) -> float:
    prior = stats.norm.logpdf(p[:4], 0, 2).sum() + stats.beta.logpdf(p[4], 5, 5)
    parts = [
        w * stats.norm.pdf(d["y"], m, s)
        for w, m, s in zip((p[4], 1 - p[4]), p[:2], p[2:4], strict=True)
    ]
    return prior + np.log(np.add(*parts)).sum()


def _stan_blr(d: dict[str, Any], p: Array) -> float:
    return (
        stats.norm.logpdf(p, 0, 10).sum()
        + stats.norm.logpdf(d["y"], np.array(d["X"]) @ p[:5], p[5]).sum()
    )


def _stan_earnings(d: dict[str, Any], p: Array) -> float:
    height, male = np.array(d["height"]), np.array(d["male"])
    mean = p[0] + p[1] * height + p[2] * male + p[3] * height * male
    return stats.norm.logpdf(np.log(d["earn"]), mean, p[4]).sum()


STAN = {
    "ark": _stan_lags,
    "arma": _stan_arma,
    "garch": _stan_garch,
    "kidscore_iq": _stan_iq,
    "kidscore_interaction": _stan_interaction,
    "gp_regression": _stan_gp,
    "mixture": _stan_mixture,
    "blr": _stan_blr,
    "earnings": _stan_earnings,
}


def made_up_posteriordb(path: Path) -> dict[str, Any]:
    """A file in the format of the user's, of random data."""
    rng = np.random.default_rng(0)
    y, x = rng.standard_normal(12).tolist(), np.linspace(-2.0, 2.0, 12).tolist()
    iq, school = rng.normal(100.0, 15.0, 12).tolist(), rng.integers(0, 2, 12).tolist()
    data = {
        "ark": {"K": 5, "T": 12, "y": y},
        "arma": {"T": 12, "y": y},
        "garch": {"T": 12, "y": y, "sigma1": 0.5},
        "kidscore_iq": {"kid_score": x, "mom_iq": iq},
        "kidscore_interaction": {"kid_score": y, "mom_iq": iq, "mom_hs": school},
        "gp_regression": {"x": x, "y": y},
        "mixture": {"y": y},
        "blr": {"X": rng.standard_normal((12, 5)).tolist(), "y": y},
        "earnings": {"earn": iq, "height": x, "male": school},
    }
    numbers = {"mean": 1.0, "mean_square": 2.0, "mcse_mean": 0.1, "mcse_mean_square": 0.2}
    content = {
        density.posterior: {
            "data": data[name],
            "reference": {
                str(i): numbers for i in range(sum(math.prod(s) for s in density.sites.values()))
            },
        }
        for name, density in DENSITIES.items()
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return data


@pytest.mark.parametrize("name", DENSITIES)
def test_models_are_the_stan_programs(name: str, tmp_path: Path, float64: None) -> None:
    """Differences of log densities between states, in the coordinates of the model, whose volume
    element the flat prior of GARCH's last coordinate brings."""
    data = made_up_posteriordb(tmp_path / "posteriordb.json")[name]
    case = posteriordb_cases(tmp_path / "posteriordb.json")[name]
    draws = np.random.default_rng(1).uniform(0.2, 0.9, (1, 6, case.dim))
    parameters = case.quantities(draws)[0, :, : len(case.truth()) // 2]
    expected = np.array([STAN[name](data, p) for p in parameters])
    if name == "garch":
        expected += np.log1p(-parameters[:, 2])
    found = []
    for draw in draws[0]:
        given = {site: torch.as_tensor(value) for site, value in case.split(draw).items()}
        model = pyro.poutine.condition(in_pyro.MODELS[name], data=given)
        trace = pyro.poutine.trace(model).get_trace(*in_pyro.tensors(case.arguments()))
        found.append(float(trace.log_prob_sum()))
    np.testing.assert_allclose(np.array(found) - found[0], expected - expected[0], rtol=1e-9)


def test_truth_that_is_an_estimate_has_an_error() -> None:
    """A reference three of its own standard errors away from the means of the draws: z is 3 less
    what the errors of the draws add."""
    case, draws = cases.CASES["normal"], exact_run(1).draws
    quantities = case.quantities(draws)
    off = dataclasses.replace(
        case,
        truth=lambda: quantities.mean((0, 1)) + 300.0,
        truth_error=lambda: np.full(100, 100.0),
    )
    expected = float((300.0 / np.hypot(mcse_mean(quantities), 100.0)).max())
    assert worst_z(off, draws) == pytest.approx(expected)
    assert 2.9 < expected < 3.0
    assert worst_z(dataclasses.replace(case, truth=None), exact_run(1).draws) is None


def example_answer(seconds: float, means: list[float]) -> dict[str, Any]:
    """What the worker says of a run of an example."""
    return {
        "seconds": seconds,
        "cpu_share": 1.0,
        "labels": ["a[0]", "a[1]"],
        "means": means,
        "errors": [0.3, 0.4],
        "min_ess": 500.0,
        "worst_r_hat": 1.01,
        "pinned": True,
        "version": "1.2",
    }


def test_examples_are_compared_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clocks = {"pyro": [90.0], "pyroebm": [20.0, 10.0]}
    means = {"pyro": [1.0, 2.0], "pyroebm": [1.5, 2.0]}
    asked: list[dict[str, Any]] = []

    def in_process(module: str, content: Any, environment: Any, limit: float) -> Any:
        asked.append(content)
        library = content["library"]
        if content["name"] == "lkj":
            return None, "no luck"
        return example_answer(clocks[library].pop(0), means[library]), None

    monkeypatch.setattr(pyro_examples, "in_process", in_process)
    arguments = ["--out", str(tmp_path), "--case", "eight_schools", "--case", "lkj"]
    monkeypatch.setattr(sys, "argv", ["pyro_examples", *arguments])
    assert pyro_examples.main() == 1
    said = capsys.readouterr().out
    assert "FAILED: pyroebm: no luck" in said
    assert "4.50 and 9.00 times Pyro's speed, means within 1.18 standard errors" in said
    assert [(a["library"], a["num_samples"], a["scale"]) for a in asked[:3]] == [
        ("pyroebm", 1000, 1),
        ("pyroebm", 1000, 1),
        ("pyro", 250, 4),
    ]
    rows = tables.read_rows(tmp_path)
    check_rows(rows)
    text = tables.examples_table(rows)
    line = next(line for line in text.splitlines() if "eight schools" in line)
    cells = [cell.strip() for cell in line.split("|")][2:8]
    assert cells == ["4 x (1000 + 1000), Pyro draws 1/4", "90.0", "20.0", "4.50", "10.0", "9.00"]
    assert "more than a minute on 1 of 1 examples" in text
    assert "on 1 of these" in text
    assert tables.examples_table([]) == tables.NOTHING
    monkeypatch.setattr(sys, "argv", ["pyro_examples", *arguments, "--resume"])
    asked.clear()
    pyro_examples.main()
    assert [a["name"] for a in asked] == ["lkj"]


def test_examples_of_different_entries_are_not_compared() -> None:
    ours = example_answer(1.0, [0.0, 1.0])
    with pytest.raises(ValueError, match="must have the same entries"):
        pyro_examples.largest_difference(ours, ours | {"labels": ["b[0]", "b[1]"]})


def test_an_example_has_known_means_with_both_libraries() -> None:
    """The posterior of the die is Dirichlet(1 + throws)."""
    throws = np.array([2, 1, 9, 1, 14, 3])
    exact = (1 + throws) / (6 + throws.sum())
    for library in ("pyro", "pyroebm"):
        found = run_example("die_counts", library, 2, 100, 100, seed=1, scale=2)
        within_se(found["means"], exact, found["errors"], what=library)
        assert found["seconds"] > 0.0
        assert found["worst_r_hat"] < 1.2


def test_densities_of_the_examples_are_finite_where_they_start() -> None:
    """Each model is built; the model of an epidemic starts where its density is not 0."""
    pyro.set_rng_seed(0)
    for name, example in EXAMPLES.items():
        if name == "neutra":  # trains a flow first
            continue
        problem = example.make(2)
        if problem.model is None:
            continue
        start = problem.kernel.get("init_strategy", pyro.infer.autoguide.init_to_median)
        model = pyro.infer.autoguide.initialization.InitMessenger(start)(problem.model)
        trace = pyro.poutine.trace(model).get_trace(*problem.args)
        assert math.isfinite(float(trace.log_prob_sum())), name
