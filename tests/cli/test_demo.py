"""The main job: the quick demo writes everything and hides nothing; the full one (slow) reaches its
numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from pyroebm.cli import main
from pyroebm.cli.demo import _forked_seed, run_demo
from pyroebm.cli.demo_report import conclusion, table
from pyroebm.core.statistics import arviz

METHODS = ["truth", "nuts", "pyro_nuts", "nice", "redundant_nice", "redundant_nice_weighted"]
RIGHT_MASS, LOG_Z = 0.06648268, 5.0322840086  # quadrature


def test_the_quick_demo_writes_all_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["pyroebm", "demo", "--quick", "--out", str(out)])
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    main()
    torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state())

    report = json.loads((out / "report.json").read_text())
    assert list(report) == METHODS
    for metrics in report.values():
        assert {"mean", "var", "right_mass", "right_mass_se"} <= set(metrics)
    assert {"ess_bulk", "r_hat", "seconds", "at_1000_draws"} <= set(report["nuts"])
    assert {"ess_bulk", "r_hat", "seconds"} <= set(report["pyro_nuts"])
    assert {"log_z", "log_z_se", "ess_fraction", "pareto_k", "seconds"} <= set(
        report["redundant_nice_weighted"]
    )
    assert all("missed_modes" in metrics for metrics in report.values())
    assert all("missed_modes" in report[name]["d_3"] for name in METHODS[4:])
    assert "j" in report["nice"]
    assert "j_r" in report["redundant_nice"]
    assert math.isclose(report["truth"]["right_mass"], RIGHT_MASS, abs_tol=1e-8)
    assert math.isclose(report["truth"]["log_z"], LOG_Z, abs_tol=1e-9)

    for name in ("double_well.png", "trace.png", "rank.png", "energy.png"):
        picture = image.imread(out / name)
        assert picture.shape[0] > 400
        assert float(picture.std()) > 0.05  # not a blank sheet
    data = arviz().from_netcdf(str(out / "chains.nc"))
    assert data.posterior["x"].shape == (report["nuts"]["chains"], report["nuts"]["draws"])
    assert {"energy", "diverging", "lp"} <= set(data.sample_stats.data_vars)
    printed = capsys.readouterr().out
    assert table(report) in printed
    assert conclusion(report) in printed


def test_a_forked_seed_is_obeyed_and_leaves_every_generator_as_it_was() -> None:
    def states() -> tuple[bytes, object, bytes]:
        return (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            np.random.get_state()[1].tobytes(),  # noqa: NPY002
        )

    before, drawn = states(), []
    for seed in (1, 1, 2):
        with _forked_seed(seed):
            drawn.append((float(torch.rand(())), random.random(), np.random.rand()))  # noqa: NPY002
    assert drawn[0] == drawn[1] != drawn[2]
    assert states() == before


def test_a_missed_mode_is_said_in_the_sentence() -> None:
    chain = {
        "right_mass": 0.0665,
        "right_mass_se": 0.003,
        "r_hat": 1.0,
        "draws": 9,
        "chains": 2,
        "missed_modes": [],
    }
    report = {
        "truth": {"right_mass": 0.0665, "log_z": 5.03, "missed_modes": []},
        "nuts": chain | {"at_1000_draws": chain},
        "nice": {"right_mass": 0.0, "right_mass_se": 0.0, "j": 0.0966, "missed_modes": ["right"]},
        "redundant_nice_weighted": chain
        | {"log_z": 5.03, "log_z_se": 0.001, "missed_modes": ["right"]},
    }
    assert "missed by NICE, D = 1 and redundant NICE, D = 2, weighted" in conclusion(report)


@pytest.mark.slow
def test_the_full_demo_reaches_its_numbers(tmp_path: Path) -> None:
    report = run_demo(tmp_path, progress=False)
    nuts, pyro_nuts, nice, flow, weighted = (report[name] for name in METHODS[1:])
    assert abs(nuts["right_mass"] - RIGHT_MASS) <= 5 * nuts["right_mass_se"]
    assert nuts["right_mass_se"] <= 0.003
    assert nuts["r_hat"] < 1.01
    assert nuts["at_1000_draws"]["r_hat"] > 1.01
    assert abs(pyro_nuts["right_mass"] - RIGHT_MASS) <= 5 * pyro_nuts["right_mass_se"]
    assert weighted["ess_fraction"] >= 0.97
    assert abs(weighted["log_z"] - LOG_Z) <= 0.003
    assert abs(weighted["right_mass"] - RIGHT_MASS) <= 5 * weighted["right_mass_se"]
    assert abs(nice["j"] - 0.0966) <= 5 * nice["j_se"]  # the best that a Gaussian can do
    assert nice["missed_modes"] == ["right"]
    for bound in (flow, flow["d_3"]):
        assert bound["j_r"] > -5 * bound["j_r_se"]
        assert bound["j_r"] < 0.5 * nice["j"]
        assert bound["missed_modes"] == []
