"""The benchmarks' own machinery: cases that say the truth, rows of one schema, tables made from
them. No peer is needed."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import boltzmann, flows, samplers, starts, tables, training
from benchmarks.suite import additive, cases, fitters
from benchmarks.suite.flow_cases import FLOW_CASES, Counted, judge
from benchmarks.suite.measure import Job, Row, Run, sampler_rows, time_runs
from pyroebm import Energy

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
        "sys.modules.update(dict.fromkeys(['jax', 'numpyro', 'blackjax', 'optax']))\n"
        "import benchmarks.samplers, benchmarks.tables, benchmarks.suite.worker\n"
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
        "efficiency",
        *FLOW_CASES,
    }


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
        widths = {line.count("|") for line in text.splitlines()}
        assert len(widths) == 1
        assert "NUTS, " in text
    assert tables.starts_table([]) == tables.efficiency_table([]) == tables.NOTHING
