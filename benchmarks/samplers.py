"""ESS per second and per gradient of pyroebm, Pyro, NumPyro and BlackJAX, on one core.

    python -m benchmarks.samplers [--quick] [--only LIBRARY] [--case CASE] [--chains N] [--out DIR]
    [--repeats N] [--budget S]

Each library runs each case in a separate process. The results replace earlier ones of the same
library and case in DIR/samplers.json. A library that is not installed, or fails, is reported and
skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite.cases import CASES
from benchmarks.suite.measure import Job, Row
from benchmarks.suite.worker import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "benchmarks"

# Library, sampler, chains, and what the library alone is told.
SAMPLERS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("pyroebm", "NUTS", 1, {"compile": True}),
    ("pyroebm", "NUTS", 256, {"compile": True}),
    ("pyroebm", "ChEES", 256, {"compile": True}),
    # Four leapfrog steps whatever the case: about half a period of a normal density at an
    # acceptance rate of 0.8.
    ("pyroebm", "HMC", 256, {"compile": True, "kernel": {"num_steps": 4}}),
    ("pyro", "NUTS", 1, {}),
    ("numpyro", "NUTS", 1, {}),
    ("numpyro", "NUTS", 256, {"chain_method": "vectorized"}),
    ("blackjax", "NUTS", 256, {}),
    ("blackjax", "ChEES", 256, {"mass_matrix_estimation": "diagonal"}),
)
CURVES = ("chains curve", "dimension curve")
LIBRARIES = tuple(dict.fromkeys(library for library, *_ in SAMPLERS))


def plan(
    quick: bool,
    only: str | None,
    case: str | None,
    repeats: int,
    budget: float,
    chains: int | None = None,
) -> list[Job]:
    """Return the requested jobs, in the order of the cases."""
    warmup, samples = (50, 50) if quick else (500, 1000)
    repeats, budget = (1, 1.0) if quick else (repeats, budget)
    jobs = [
        Job(name, library, method, chains, warmup, samples, repeats, budget, options)
        for name in CASES
        for library, method, chains, options in SAMPLERS
    ]
    jobs += [Job(name, "pyroebm", "gradient", 0, 0, 0, repeats, budget, {}) for name in CASES]
    short = (20, 20) if quick else (150, 100)
    jobs += [
        Job(name, "pyroebm", name, 0, *short, repeats, budget, {"compile": True}) for name in CURVES
    ]
    return [
        j
        for j in jobs
        if only in (None, j.library) and case in (None, j.case) and chains in (None, j.chains)
    ]


def in_process(
    module: str,
    content: Any,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> tuple[Any, str | None]:
    """Call a worker module with some content in a separate process; both exchange JSON.

    Returns:
        its answer or None, and the error message.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "content.json"), Path(folder, "answer.json")
        source.write_text(json.dumps(content), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, str(source), str(target)],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | dict(environment or {}),
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return None, f"stopped after {limit:.0f} s"
        if done.returncode:
            said = done.stderr.strip().splitlines()
            return None, (said or [f"exit status {done.returncode}"])[-1]
        return json.loads(target.read_text(encoding="utf-8")), None


def work(job: Job) -> tuple[list[Row], str | None]:
    """Run a job in its own process and return its rows, or none and the error message."""
    rows, problem = in_process("benchmarks.suite.worker", dataclasses.asdict(job))
    return rows or [], problem


def _measured(row: Row) -> tuple[str, str, str]:
    return row["case"], row["library"], row["settings"]["method"]


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Replace rows of the same library, method, number of chains and case by new ones."""
    replaced = {(*_measured(r), r["settings"]["chains"]) for r in new}
    return [r for r in old if (*_measured(r), r["settings"]["chains"]) not in replaced] + new


def write(path: Path, rows: list[Row]) -> None:
    """Merge rows into a JSON file, with one row per line."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in merge(old, rows))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.samplers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"tiny runs, once, to {QUICK_RESULTS.relative_to(ROOT)}: no timings",
    )
    parser.add_argument("--only", choices=LIBRARIES, help="this library alone")
    parser.add_argument("--case", choices=[*CASES, *CURVES], help="this case alone")
    parser.add_argument("--chains", type=int, help="samplers of this number of chains alone")
    parser.add_argument(
        "--out", type=Path, help=f"folder of samplers.json (default {RESULTS.relative_to(ROOT)})"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="most runs to take the median of (default 5)"
    )
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds of a sampler on a case (default 600)"
    )
    options = parser.parse_args()
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "samplers.json"
    missing = {name for name in LIBRARIES if importlib.util.find_spec(name) is None}
    failures = 0
    for job in plan(
        options.quick, options.only, options.case, options.repeats, options.budget, options.chains
    ):
        label = f"{job.case}: {job.library} {job.method}" + (
            f", {job.chains} chains" if job.chains else ""
        )
        if job.library in missing:
            print(
                f"{label}: missing, no row (pip install -c benchmarks/constraints.txt -e"
                " '.[bench]')",
                flush=True,
            )
            continue
        began = time.perf_counter()
        rows, problem = work(job)
        if problem is not None:
            failures += 1
            print(f"{label}: FAILED, no row: {problem}", flush=True)
            continue
        write(path, rows)
        found = {row["metric"]: row["value"] for row in rows}
        results = [
            f"{m} {found[m]:.4g}" for m in ("ess_per_second", "worst_z") if found.get(m) is not None
        ]
        print(
            f"{label}: " + ", ".join([*results, f"{time.perf_counter() - began:.0f} s in all"]),
            flush=True,
        )
    print(f"written to {path}" + (f"; {failures} failed" if failures else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
