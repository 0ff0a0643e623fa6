"""What `scripts/matrix.py` says of environments; the environments themselves are `make matrix`."""

from __future__ import annotations

import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from lib.scripts import ROOT, load_script

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # where it finds its neighbors
    return load_script("matrix")


def test_every_dependency_has_a_lower_bound(matrix: types.ModuleType) -> None:
    held = [line.split("==")[0] for line in matrix.lower_bounds(PROJECT).splitlines()]
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flows"]
    assert held == [requirement.split(">=")[0] for requirement in wanted]
    assert "numpy==1.5\n" in matrix.lower_bounds(
        {"dependencies": ["numpy>=1.5,<3"], "optional-dependencies": {"flows": []}}
    )


def test_interpreters_are_of_the_version_asked_for(
    matrix: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert next(matrix.interpreters(THIS)) == sys.executable
    pyenv = tmp_path / "versions" / "2.0.1" / "bin"
    pyenv.mkdir(parents=True)
    (pyenv / "python").write_text("#!/bin/sh\nexit 127\n")  # a shim of a version that is not active
    (pyenv / "python").chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert list(matrix.interpreters("2.0")) == []
    (pyenv / "python").write_text("#!/bin/sh\necho 2.0\n")
    assert list(matrix.interpreters("2.0")) == [str(pyenv / "python")]


JUNIT = """<testsuites><testsuite><testcase/><testcase><failure/></testcase>
<testcase><error/></testcase><testcase/><testcase/>
<testcase><skipped/></testcase></testsuite></testsuites>"""


def test_results_are_counted_and_tabulated(matrix: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    tests = matrix.counts(tmp_path / "junit.xml")
    assert tests == {"passed": 3, "failed": 2, "skipped": 1}
    stages = {name: {"fate": "passed", "seconds": 30} for name in matrix.STAGES}
    whole = {
        "name": "a",
        "commit": "c0ffee",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "stages": stages,
        "tests": tests,
    }
    broken = {
        "name": "b",
        "commit": "c0ffee",
        "stages": {"install": {"fate": "FAILED", "seconds": 1}},
    }
    *_, first, second = matrix.table([whole, broken]).splitlines()
    assert (
        first
        == "| a | 3.11.7 | 2.13.0 |  |  |  | passed | passed | passed | 3 | 2 | 1 | 2 | c0ffee |"
    )
    assert (
        second
        == "| b |  |  |  |  |  | FAILED | not run | not run | not run | not run | not run | 0 |"
        " c0ffee |"
    )


@pytest.fixture
def offline(
    matrix: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> types.ModuleType:
    """The script without a wheel, an index or interpreters: one stage passes, one fails."""

    def fails(environment: Any, wheel: Path) -> str:
        raise RuntimeError("no store")

    def installs(environment: Any, wheel: Path) -> str:
        environment.folder.mkdir(parents=True, exist_ok=True)
        return "what was installed"

    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "build", lambda folder: folder / "a.whl")
    monkeypatch.setattr(matrix, "copy_files", lambda folder: None)
    monkeypatch.setattr(matrix, "run", lambda *command, cwd: "{}")
    monkeypatch.setattr(
        matrix, "interpreters", lambda version: iter([] if version == "3.13" else ["python"])
    )
    monkeypatch.setattr(matrix, "STAGES", {"install": installs, "store": fails})
    return matrix


def test_failures_and_missing_interpreters_are_said(
    offline: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offline.main("--only", "newest-3.13") == 1  # asked for by name, and it did not run
    assert (
        capsys.readouterr().out
        == "newest-3.13: no Python 3.13 on PATH or among pyenv's versions: not run\n"
    )
    assert offline.main("--only", "newest-3.12", "pinned") == 1
    said = capsys.readouterr().out
    assert [line.rpartition(" in ")[0] for line in said.splitlines()] == [
        f"{name}: {what}"
        for name in ("pinned", "newest-3.12")
        for what in ("install passed", "store FAILED")
    ]
    assert (tmp_path / "pinned" / "install.log").read_text() == "what was installed"
    assert (tmp_path / "pinned" / "store.log").read_text() == "no store"
    assert offline.main("--only", "pinned") == 1
    assert [
        row.split(" | ")[0] for row in (tmp_path / "results.md").read_text().splitlines()[2:]
    ] == [
        "| pinned",
        "| newest-3.12",
    ]
