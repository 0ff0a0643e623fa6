"""Test the installed wheel in several environments.

`python scripts/matrix.py [--only NAME ...]`. Each environment is in build/matrix/NAME: a virtual
environment, a log of each stage, and the files of the checkout with the installed package in place
of its sources. build/matrix/results.json and results.md keep the latest result of each environment.
Constraints in the settings of pip are ignored: "newest" is what the index has. Needs `build` and
`hatchling`.
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
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wheel_check import ROOT, build, check_installed, install, run, run_example

FOLDER = ROOT / "build" / "matrix"
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
# the versions in the table; results.json has all
SHOWN = ("python", "torch", "arviz", "numpy", "numba")
VERSIONS = """
import importlib.metadata, json, platform
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version()} | dict(sorted(found.items()))))
"""
Result = dict[str, Any]


def lower_bounds(project: dict[str, Any]) -> str:
    """Return constraints to the lower bounds of the direct dependencies in pyproject.toml."""
    found = [
        re.match(r"([\w.-]+)>=([\w.]+)", r)
        for r in project["dependencies"] + project["optional-dependencies"]["flows"]
    ]
    return "".join(f"{bound[1]}=={bound[2]}\n" for bound in found if bound)


@dataclasses.dataclass(frozen=True)
class Environment:
    """A version of Python, constraints, and packages that are removed after installation."""

    name: str
    python: str
    constraints: str = ""
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the environment."""
        return FOLDER / self.name

    @property
    def venv(self) -> Path:
        """Its virtual environment."""
        return self.folder / "venv"

    @property
    def interpreter(self) -> Path:
        """Its Python interpreter."""
        return self.venv / "bin" / "python"


ENVIRONMENTS = (
    Environment("pinned", "3.11", PINS),
    Environment("without-numba", "3.11", PINS, without=("numba", "llvmlite")),
    Environment("newest-3.12", "3.12"),
    Environment("newest-3.13", "3.13"),
    Environment(
        "lowest-3.11",
        "3.11",
        lower_bounds(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]),
    ),
)


def interpreters(version: str) -> Iterator[str]:
    """Yield interpreters of a version that can create environments.

    They are this one, the one on PATH, and pyenv's; a shim may not run.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (
        sys.executable,
        shutil.which(f"python{version}"),
        *sorted(map(str, pyenv.glob(f"{version}.*/bin/python"))),
    ):
        if found is not None:
            asked = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
            if (
                subprocess.run([found, "-c", asked], text=True, capture_output=True).stdout.strip()
                == version
            ):
                yield found


def copy_files(folder: Path) -> None:
    """Copy the files of the checkout except the package, when its wheel is built.

    The tests may run hours later.
    """
    for name in filter(
        None,
        run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split(
            "\0"
        ),
    ):
        if not name.startswith("pyroebm/") and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def stage_install(environment: Environment, wheel: Path) -> str:
    """Create a virtual environment and install the wheel by its own pip."""
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.folder.mkdir(parents=True)
    run(
        next(interpreters(environment.python)),
        "-m",
        "venv",
        environment.venv,
        cwd=environment.folder,
    )
    constraints = environment.folder / "constraints.txt"
    constraints.write_text(environment.constraints, encoding="utf-8")
    # PIP_CONSTRAINT takes the place of the constraints in pip's settings; the index, certificates
    # and wheels named there stay
    lifted = {"PIP_CONSTRAINT": os.devnull}
    install(environment.venv, "-c", constraints, f"{wheel}[dev,flows]", more=lifted)
    if environment.without:
        pip = (environment.interpreter, "-m", "pip", "uninstall", "-q", "-y")
        run(*pip, *environment.without, cwd=environment.folder)
    return run(environment.interpreter, "-m", "pip", "freeze", cwd=environment.folder)


def stage_example(environment: Environment, wheel: Path) -> str:
    """Run the checks of `make wheel-check`.

    They are a consistent environment, the command, and the README's first example in an empty
    folder.
    """
    empty = environment.folder / "empty"
    empty.mkdir()
    check_installed(environment.venv, empty)
    return run_example(environment.venv, ROOT / "README.md", empty)


def stage_store(environment: Environment, wheel: Path) -> str:
    """Check a run that streams to a folder and is killed, resumed and read, and a netCDF file."""
    return run(
        environment.interpreter, ROOT / "scripts" / "store_check.py", ".", cwd=environment.folder
    )


def stage_suite(environment: Environment, wheel: Path, *pytest_args: str) -> str:
    """Run the tests on the installed package, in a copy of the checkout's files."""
    tree = shutil.copytree(FOLDER / "files", environment.folder / "tree")
    (package,) = environment.venv.glob("lib/python*/site-packages/pyroebm")
    (tree / "pyroebm").symlink_to(package)
    report = f"--junitxml={environment.folder / 'junit.xml'}"
    return run(
        environment.interpreter,
        "-m",
        "pytest",
        report,
        *pytest_args,
        cwd=tree,
        more={"OMP_NUM_THREADS": "1"},
    )


STAGES = {
    "install": stage_install,
    "example": stage_example,
    "store": stage_store,
    "suite": stage_suite,
}


def counts(junit: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's JUnit file."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    fates = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    for case in ET.parse(junit).getroot().iter("testcase"):
        found[
            next((fate for tag, fate in fates.items() if case.find(tag) is not None), "passed")
        ] += 1
    return found


def examine(environment: Environment, wheel: Path, pytest_args: list[str]) -> Result:
    """Run the stages in one environment and return their results.

    The others are skipped if the installation fails.
    """
    result: Result = {"name": environment.name, "stages": {}}
    for name, stage in STAGES.items():
        began = time.monotonic()
        try:
            said = stage(environment, wheel, *(pytest_args if name == "suite" else ()))
            fate = "passed"
        except RuntimeError as error:
            said, fate = str(error), "FAILED"
        (environment.folder / f"{name}.log").write_text(said, encoding="utf-8")
        seconds = round(time.monotonic() - began)
        result["stages"][name] = {"fate": fate, "seconds": seconds}
        if name == "suite" and (junit := environment.folder / "junit.xml").exists():
            result["tests"] = counts(junit)
        more = "".join(f", {n} {kind}" for kind, n in result.get("tests", {}).items())
        print(f"{environment.name}: {name} {fate} in {seconds} s{more}", flush=True)
        if name == "install" and fate == "passed":
            result["versions"] = json.loads(
                run(environment.interpreter, "-c", VERSIONS, cwd=environment.folder)
            )
        if name == "install" and fate == "FAILED":
            break
    return result


def table(results: list[Result]) -> str:
    """Return the results as a table in Markdown."""
    rows = [
        [
            "environment",
            *SHOWN,
            *list(STAGES)[:-1],
            "passed",
            "failed",
            "skipped",
            "minutes",
            "commit",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for r in results:
        versions = [r.get("versions", {}).get(name, "") for name in SHOWN]
        fates = [r["stages"].get(name, {}).get("fate", "not run") for name in list(STAGES)[:-1]]
        tests = [
            str(r.get("tests", {}).get(kind, "not run")) for kind in ("passed", "failed", "skipped")
        ]
        minutes = round(sum(stage["seconds"] for stage in r["stages"].values()) / 60)
        rows.append([r["name"], *versions, *fates, *tests, str(minutes), r["commit"]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(*arguments: str) -> int:
    """Test the environments and write the results; return 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=None,
        metavar="NAME",
        help=f"which of {', '.join(names)}",
    )
    parser.add_argument(
        "--pytest-args", default="", help="handed to pytest, for example '-n 2 --dist worksteal'"
    )
    chosen = parser.parse_args(arguments)
    for name in ("dist", "files"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        (FOLDER / name).mkdir(parents=True)
    wheel = build(FOLDER / "dist")
    copy_files(FOLDER / "files")
    commit = run("git", "describe", "--always", "--dirty", cwd=ROOT).strip()
    kept = FOLDER / "results.json"
    results: dict[str, Result] = (
        json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    )
    failed = False
    for environment in ENVIRONMENTS:
        if environment.name not in (chosen.only or names):
            continue
        if next(interpreters(environment.python), None) is None:
            print(
                f"{environment.name}: no Python {environment.python} on PATH or among pyenv's"
                " versions: not run",
                flush=True,
            )
            failed |= chosen.only is not None  # what was asked for by name has to run
            continue
        result = examine(environment, wheel, chosen.pytest_args.split()) | {"commit": commit}
        failed |= any(stage["fate"] != "passed" for stage in result["stages"].values())
        results[environment.name] = result
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (FOLDER / "results.md").write_text(
            table([results[name] for name in names if name in results]), encoding="utf-8"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
