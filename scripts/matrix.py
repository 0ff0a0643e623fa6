"""The suite against the installed wheel, in environments that people have: `python scripts/matrix.py [--only NAME ...]`.

Each environment lies in build/matrix/NAME: what is installed, a log for each stage, and the files of the checkout with the
installed package in the place of its sources. build/matrix/results.json and results.md keep the latest result of each. The
system's constraints on pip are lifted, for else "newest" would mean something else on each machine. Needs `build` and `hatchling`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

from wheel_check import ROOT, build, check_installed, install, run, run_example

FOLDER = ROOT / "build" / "matrix"
SHOWN = ("torch", "arviz", "numpy", "numba")
VERSIONS = """
import importlib.metadata, json, platform
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version(), **found}))
"""


def lowest() -> str:
    """A constraints file that holds each direct dependency to the lower bound of its range in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [re.match(r"([\w.-]+)>=([\w.]+)", r) for r in project["dependencies"] + project["optional-dependencies"]["flows"]]
    return "".join(f"{found[1]}=={found[2]}\n" for found in ranges if found)


@dataclasses.dataclass(frozen=True)
class Environment:
    """Which interpreter, what is held to which version (text of a constraints file), and what is installed beside pyroebm."""

    name: str
    python: str
    constraints: Callable[[], str] = str
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def interpreter(self) -> Path:
        return self.folder / "venv" / "bin" / "python"


def pins() -> str:
    """The known-good versions."""
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


ENVIRONMENTS = (
    Environment("pinned", "3.11", pins),
    Environment("pinned-numba", "3.11", pins, ("numba",)),
    Environment("newest-3.12", "3.12"),
    Environment("newest-3.13", "3.13"),
    Environment("lowest-3.11", "3.11", lowest),
)


def interpreters(version: str) -> Iterator[Path]:
    """Interpreters of a version: this one, those on PATH, pyenv's. A shim that does not run is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    for found in (sys.executable, on_path, *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)):
        if found is not None:
            asked = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([found, "-c", asked], text=True, capture_output=True)
            if done.stdout.strip() == version:
                yield Path(found)


def make_tree(environment: Environment) -> Path:
    """The files of the checkout, with the installed package where its sources were: tests see what the wheel installs."""
    tree = environment.folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if not name.startswith("pyroebm/") and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    (package,) = (environment.folder / "venv" / "lib").glob("python*/site-packages/pyroebm")
    (tree / "pyroebm").symlink_to(package)
    return tree


def counts(junit: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, by a JUnit file of pytest's."""
    fates = [
        next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        for case in ET.parse(junit).getroot().iter("testcase")
    ]
    return {
        "passed": fates.count("passed"),
        "failed": fates.count("failure") + fates.count("error"),
        "skipped": fates.count("skipped"),
    }


class Stages:
    """What is done in one environment. Each stage returns what there is to say of it, or raises RuntimeError."""

    def __init__(self, environment: Environment, python: Path, wheel: Path, pytest_args: list[str]) -> None:
        self.environment, self.python, self.wheel, self.pytest_args = environment, python, wheel, pytest_args

    def install(self) -> str:
        """The wheel with what the suite needs, by plain pip."""
        folder = self.environment.folder
        venv_folder = folder / "venv"
        shutil.rmtree(venv_folder, ignore_errors=True)
        run(self.python, "-m", "venv", venv_folder, cwd=folder)
        (folder / "constraints.txt").write_text(self.environment.constraints(), encoding="utf-8")
        wanted = (f"{self.wheel}[dev,flows]", *self.environment.beside)
        install(venv_folder, "-c", folder / "constraints.txt", *wanted, more={"PIP_CONSTRAINT": os.devnull})
        return ""

    def wheel_check(self) -> str:
        """What `make wheel-check` asks of an installed wheel."""
        empty = self._empty()
        check_installed(self.environment.folder / "venv", empty)
        return ""
