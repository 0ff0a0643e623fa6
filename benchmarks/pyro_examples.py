"""Pyro's MCMC examples and tutorials with Pyro and with pyroebm.infer: seconds and means.

    python -m benchmarks.pyro_examples [--quick] [--case CASE] [--limit S] [--resume] [--out DIR]

Each example runs with both libraries in separate processes, with 4 chains of the lengths of Pyro's
file (``Example.reduced`` states exceptions). pyroebm runs with empty caches of compiled code, and
again in a second process that uses the caches of the first one. Where Pyro would take long it draws
a part of the samples, and the seconds of sampling are multiplied accordingly. Seconds are CPU time,
of compilers too: on one idle core they are those that a user waits.

The means of all variables are compared, in combined standard errors. The results replace earlier
ones of the same example in DIR/pyro_examples.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.samplers import QUICK_RESULTS, RESULTS, ROOT, in_process, write
from benchmarks.stopwatch import SECONDS, caches
from benchmarks.suite.example_models import EXAMPLES, Example
from benchmarks.suite.measure import Row, row

__all__ = ["example_rows", "largest_difference"]

CHAINS = 4
WORKER = "benchmarks.suite.example_worker"


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest difference of two means, in their combined standard errors.

    Raises:
        ValueError: if the two runs have different entries.
    """
    if ours["labels"] != theirs["labels"]:
        raise ValueError(
            f"both runs must have the same entries, got {ours['labels']} and {theirs['labels']}"
        )
    difference = np.abs(np.subtract(ours["means"], theirs["means"]))
    return float(np.max(difference / np.hypot(ours["errors"], theirs["errors"])))


def example_rows(
    name: str, settings: dict[str, Any], theirs: dict[str, Any], ours: list[dict[str, Any]]
) -> list[Row]:
    """Return the results of an example, from one run of Pyro and two processes of pyroebm."""
    scale = settings.pop("sampling_scaled_by")
    columns = {
        "pyro": {"seconds_empty_caches": [theirs["seconds"]]},
        "pyroebm": {
            **{metric: [run["seconds"]] for metric, run in zip(SECONDS, ours, strict=True)},
            "largest_difference": [largest_difference(ours[0], theirs)],
        },
    }
    rows = []
    for library, runs in (("pyro", [theirs]), ("pyroebm", ours)):
        own = settings | ({"sampling_scaled_by": scale} if library == "pyro" and scale > 1 else {})
        shared = ("min_ess", "worst_r_hat", "cpu_share")
        for metric, values in {
            **columns[library],
            **{metric: [run[metric] for run in runs[:1]] for metric in shared},
        }.items():
            made = row(f"example {name}", library, metric, values, own)
            rows.append(made | {"version": runs[0]["version"]})
    return rows


def run_both(name: str, example: Example, quick: bool, limit: float) -> list[Row]:
    """Run an example with both libraries.

    Raises:
        RuntimeError: if a process fails or exceeds the limit.
    """
    warmup, samples = (20, 20) if quick else (example.num_warmup, example.num_samples)
    scale = 1 if quick else example.pyro_part
    content = {"name": name, "num_chains": CHAINS, "num_warmup": warmup, "seed": 1}

    def run(library: str, environment: dict[str, str], part: int) -> dict[str, Any]:
        told = content | {"library": library, "num_samples": samples // part, "scale": part}
        answer, problem = in_process(WORKER, told, environment, limit)
        if problem is not None:
            raise RuntimeError(f"{library}: {problem}")
        print(
            f"{name:18} {library:8} {answer['seconds']:7.1f} s, ESS {answer['min_ess']:.0f}, R-hat"
            f" {answer['worst_r_hat']:.3f}, {answer['cpu_share']:.0%} of a core",
            flush=True,
        )
        return dict(answer)

    with tempfile.TemporaryDirectory() as folder:
        ours = [run("pyroebm", caches(folder), 1) for _ in SECONDS]
    theirs = run("pyro", {}, scale)
    settings = {
        "method": "NUTS",
        "chains": CHAINS,
        "num_warmup": warmup,
        "num_samples": samples,
        "repeats": 1,
        "threads": 1,
        "pinned": theirs["pinned"],
        "sampling_scaled_by": scale,
    }
    rows = example_rows(name, settings, theirs, ours)
    found = {r["metric"]: r["value"] for r in rows if r["library"] == "pyroebm"}
    ratios = [theirs["seconds"] / run["seconds"] for run in ours]
    print(
        f"{name:18} {ratios[0]:.2f} and {ratios[1]:.2f} times Pyro's speed, means within"
        f" {found['largest_difference']:.2f} standard errors",
        flush=True,
    )
    return rows


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pyro_examples", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"4 x (20 + 20), to {QUICK_RESULTS.relative_to(ROOT)}: no timings",
    )
    parser.add_argument(
        "--case", choices=EXAMPLES, action="append", help="one example alone (may be repeated)"
    )
    parser.add_argument(
        "--limit", type=float, default=1800.0, help="most seconds of a process (default 1800)"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is finished")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of pyro_examples.json (default {RESULTS.relative_to(ROOT)})",
    )
    options = parser.parse_args()
    folder = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    path = folder / "pyro_examples.json"
    finished = set()
    if options.resume and path.exists():
        finished = {r["case"] for r in json.loads(path.read_text(encoding="utf-8"))}
    failures = 0
    for name in options.case or EXAMPLES:
        if f"example {name}" in finished:
            continue
        try:
            rows = run_both(name, EXAMPLES[name], options.quick, options.limit)
        except (RuntimeError, ValueError) as error:
            failures += 1
            print(f"{name:18} FAILED: {error}", flush=True)
            continue
        write(path, rows)
    print(f"written to {path}" + (f"; {failures} failed" if failures else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
