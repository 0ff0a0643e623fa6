"""Seconds from the first import to a table of R-hat, for pyroebm and other libraries.

    python -m benchmarks.stopwatch [--quick] [--only LIBRARY] [--case CASE] [--posteriordb FILE]
    [--repeats N] [--limit S] [--resume] [--out DIR]

The others are NumPyro, BlackJAX, nutpie, owalnuts and Pyro, each at its defaults, on one core. A
run has 4 chains of 1,000 warm-up steps and 1,000 draws, in a process whose caches of compiled code
are empty, and again in a second process that uses the caches of the first one. The libraries run
alternately; numbers are medians over the rounds. Pyro runs 4 x (100 + 100), and its sampling time
is multiplied by ten.

The results replace earlier ones of the same library and case in DIR/stopwatch.json after each run.
`--resume` skips cases and libraries with results of all rounds. The cases of posteriordb need a
file of the user (its format is in benchmarks/suite/posteriordb.py). A library that is not
installed, or fails, is reported and skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.samplers import QUICK_RESULTS, RESULTS, ROOT, in_process, write
from benchmarks.suite.cases import MODEL_CASES
from benchmarks.suite.measure import Job, Row, row
from benchmarks.suite.posteriordb import DENSITIES

# Library, method, and what the library alone is told.
CONTESTANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("pyroebm", "NUTS", {}),
    ("numpyro", "NUTS, vectorized", {"chain_method": "vectorized"}),
    ("numpyro", "NUTS, sequential", {"chain_method": "sequential"}),
    ("blackjax", "NUTS", {}),
    ("nutpie", "NUTS", {}),
    ("owalnuts", "WALNUTS", {}),
    ("pyro", "NUTS", {"sampling_scaled_by": 10}),
)
LIBRARIES = tuple(dict.fromkeys(library for library, *_ in CONTESTANTS))
CASES = (*MODEL_CASES, *DENSITIES)
#: What has no PyMC model: recursions over time.
WITHOUT = dict.fromkeys(("nutpie", "owalnuts"), ("arma", "garch"))
#: Metrics of the first process and of the second one.
SECONDS = ("seconds_empty_caches", "seconds_second_process")


def plan(
    quick: bool, only: str | None, cases: Iterable[str], repeats: int, limit: float
) -> list[list[Job]]:
    """Return the requested jobs: a list for each case, in the order in which they run."""

    def job(case: str, library: str, method: str, options: dict[str, Any]) -> Job:
        steps = 100 if quick or library == "pyro" else 1000
        rounds = 1 if quick else repeats
        return Job(case, library, method, 4, steps, steps, rounds, limit, options)

    return [
        [
            job(case, library, method, options)
            for library, method, options in CONTESTANTS
            if only in (None, library) and case not in WITHOUT.get(library, ())
        ]
        for case in cases
    ]


def caches(folder: str) -> dict[str, str]:
    """Return environment variables that place all caches of compiled code in ``folder``.

    JAX keeps none by default.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "NUMBA_CACHE_DIR": f"{folder}/numba",
        "PYTENSOR_FLAGS": f"base_compiledir={folder}/pytensor",
    }


def take_turn(job: Job, seed: int, database: Path | None) -> tuple[list[dict[str, Any]], str]:
    """Run the worker in a first and in a second process.

    Returns:
        the answers, and the error message, if any.
    """
    content = {
        "job": dataclasses.asdict(job),
        "seed": seed,
        "posteriordb": None if database is None else str(database.resolve()),
    }
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in SECONDS:
            answer, problem = in_process(
                "benchmarks.suite.stopwatch_worker", content, caches(folder), job.budget
            )
            if problem is not None:
                return [], problem
            answers.append(answer)
    return answers, ""


def stopwatch_rows(job: Job, turns: Sequence[Sequence[dict[str, Any]]]) -> list[Row]:
    """Return the results of a library on a case, from two processes in each round."""
    settings = job.settings(len(turns)) | {"pinned": turns[0][0]["pinned"]}
    columns: dict[str, list[Any]] = {
        metric: [answers[process]["metrics"]["seconds"] for answers in turns]
        for process, metric in enumerate(SECONDS)
    }
    for metric in turns[0][0]["metrics"]:
        if metric != "seconds":
            columns[metric] = [answer["metrics"][metric] for answers in turns for answer in answers]
    return [
        row(f"stopwatch {job.case}", job.library, metric, values, settings)
        | {"version": turns[0][0]["version"]}
        for metric, values in columns.items()
        if None not in values
    ]


def told(answers: Sequence[dict[str, Any]]) -> str:
    """Format a run in one line."""
    first, second = (answer["metrics"] for answer in answers)
    numbers = [
        f"{first['seconds']:.1f} s and {second['seconds']:.1f} s in a second process",
        f"{first['cpu_share']:.0%} and {second['cpu_share']:.0%} of a core",
    ]
    for name in ("min_ess", "worst_r_hat", "worst_z", "gradients", "divergences"):
        numbers += [] if first[name] is None else [f"{name} {first[name]:.4g}"]
    return ", ".join(numbers)


def finished(path: Path, job: Job) -> bool:
    """Return whether a file has results of all rounds of a job."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return any(
        (r["case"], r["library"]) == (f"stopwatch {job.case}", job.library)
        and all(r["settings"][key] == getattr(job, key) for key in ("method", "repeats"))
        for r in rows
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stopwatch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"4 x (100 + 100), once, to {QUICK_RESULTS.relative_to(ROOT)}: no timings",
    )
    parser.add_argument("--only", choices=LIBRARIES, help="this library alone")
    parser.add_argument("--case", choices=CASES, help="this case alone")
    parser.add_argument("--posteriordb", type=Path, help="the user's file of posteriordb")
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds to take the median of (default 3)"
    )
    parser.add_argument(
        "--limit", type=float, default=1800.0, help="most seconds of a process (default 1800)"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is finished")
    parser.add_argument(
        "--out", type=Path, help=f"folder of stopwatch.json (default {RESULTS.relative_to(ROOT)})"
    )
    options = parser.parse_args()
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "stopwatch.json"
    cases = [case for case in CASES if options.case in (None, case)]
    if options.posteriordb is None and (skipped := [case for case in cases if case in DENSITIES]):
        print(f"skipped, since they need --posteriordb FILE: {', '.join(skipped)}", flush=True)
        cases = [case for case in cases if case not in skipped]
    missing = {name for name in LIBRARIES if importlib.util.find_spec(name) is None}
    for name in sorted(missing):
        print(
            f"{name}: missing, no rows (pip install -c benchmarks/constraints.txt -e '.[bench]')",
            flush=True,
        )
    failures = 0
    for jobs in plan(options.quick, options.only, cases, options.repeats, options.limit):
        waiting = [
            job
            for job in jobs
            if job.library not in missing and not (options.resume and finished(path, job))
        ]
        turns: dict[str, list[list[dict[str, Any]]]] = {}
        for seed in range(1, 1 + max((job.repeats for job in waiting), default=0)):
            for job in list(waiting):
                label = f"{job.case}, round {seed} of {job.repeats}: {job.library} {job.method}"
                answers, problem = take_turn(job, seed, options.posteriordb)
                if problem:
                    failures += 1
                    waiting.remove(job)
                    print(f"{label}: FAILED: {problem}", flush=True)
                    continue
                own = turns.setdefault(f"{job.library} {job.method}", [])
                own.append(answers)
                write(path, stopwatch_rows(job, own))
                print(f"{label}: {told(answers)}", flush=True)
    print(f"written to {path}" + (f"; {failures} failed" if failures else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
