"""Flows of pyroebm, normflows, zuko and Pyro: speed, and error at equal time.

    python -m benchmarks.flows [--quick] [--case CASE] [--seconds S] [--seeds N] [--out DIR]

All run alternately in one process, on one core, in float32. The case `nice` measures milliseconds
for a training step of the same additive couplings, as medians of rounds. In every other case a flow
of each library is trained for the same time, and then all are evaluated alike. Seconds are CPU
time. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.samplers import QUICK_RESULTS, RESULTS, write
from benchmarks.suite import additive
from benchmarks.suite.fitters import BATCH, FITTERS, Fitter
from benchmarks.suite.flow_cases import FLOW_CASES, Counted, FlowCase, judge
from benchmarks.suite.measure import Row, row
from pyroebm.targets import ManyWell

#: Dimensions of the case `nice`, and draws of a step.
DIMS, DRAWS = (2, 32), 512


def available(case: str, library: str, method: str) -> bool:
    """Return whether a library is installed; print a message if not."""
    found = importlib.util.find_spec(library) is not None
    if not found:
        print(
            f"{case}: {library} {method}: missing, no row (pip install -c"
            " benchmarks/constraints.txt -e '.[bench]')"
        )
    return found


def version(library: str) -> str:
    """Return the version of a library."""
    try:
        return importlib.metadata.version("pyro-ppl" if library == "pyro" else library)
    except importlib.metadata.PackageNotFoundError:  # run from the tree
        return str(importlib.import_module(library).__version__)


def measure_steps(calls: int, rounds: int, compiled: bool) -> list[Row]:
    """Run all entries alternately, round by round.

    The first calls, which may compile, are reported separately.
    """
    rows = []
    for dim in DIMS:
        ready, first = [], []
        for library, method, make in additive.CONTESTANTS:
            if (compiled or "compiled" not in method) and available("nice", library, method):
                step = make(ManyWell(num_pairs=dim // 2), DRAWS)
                begin = time.perf_counter()
                step()
                step()
                first.append(time.perf_counter() - begin)
                ready.append((library, method, step))
        found: list[list[float]] = [[] for _ in ready]
        for _ in range(rounds):
            for (_, _, step), values in zip(ready, found, strict=True):
                begin = time.process_time()
                for _ in range(calls):
                    step()
                values.append((time.process_time() - begin) / calls)
        limit = statistics.median(found[0])
        for (library, method, _), values, once in zip(ready, found, first, strict=True):
            settings = {
                "method": method,
                "chains": DRAWS,
                "dim": dim,
                "threads": 1,
                "dtype": "float32",
                "repeats": rounds,
            }
            settings |= {
                "calls": calls,
                "statistic": "median, [min, max]",
                "couplings": additive.COUPLINGS,
            }
            rows.append(
                row(f"nice {dim}", library, "milliseconds", [1e3 * s for s in values], settings)
            )
            if "compiled" in method:
                rows.append(
                    row(
                        f"nice {dim}", library, "compile_seconds", [once], settings | {"repeats": 1}
                    )
                )
            middle = statistics.median(values)
            print(
                f"nice {dim}: {library} {method}: {1e3 * middle:.2f} ms, {limit / middle:.0%} of"
                " the limit's speed",
                flush=True,
            )
    return [made | {"version": version(made["library"])} for made in rows]


def fit(
    case: FlowCase, make: Fitter, seconds: float, seed: int, draws: int, warmup: int
) -> dict[str, float]:
    """Train for about ``seconds``, and evaluate.

    The number of steps is chosen by the speed of another flow, and is at least ``warmup``.
    """
    target = case.make()
    torch.manual_seed(seed)
    probe = make(Counted(target), case.scale, 10**6)
    probe.step()
    begin = time.process_time()
    tried = 0
    while tried < warmup or time.process_time() - begin < 0.1 * seconds:
        probe.step()
        tried += 1
    steps = max(warmup, round(seconds / (time.process_time() - begin) * tried))
    torch.manual_seed(seed)
    energy = Counted(target)
    training = make(energy, case.scale, steps)
    begin = time.process_time()
    for _ in range(steps):
        training.step()
    spent = {
        "seconds": time.process_time() - begin,
        "steps": float(steps),
        "evaluations": float(energy.evaluations),
    }
    return spent | judge(target, training.draw, training.log_weights, draws)


def measure_fits(name: str, seconds: float, seeds: int, draws: int, warmup: int) -> list[Row]:
    """Fit each library to a case, seed by seed.

    A seed that raises an error is reported and left out; if all do, the error is null.
    """
    rows = []
    for (library, method), make in FITTERS[name].items():
        if not available(name, library, method):
            continue
        settings = {
            "method": method,
            "chains": BATCH,
            "repeats": seeds,
            "seconds": seconds,
            "dtype": "float32",
            "threads": 1,
        }
        found = []
        for seed in range(seeds):
            try:
                found.append(fit(FLOW_CASES[name], make, seconds, seed, draws, warmup))
            except (ValueError, ArithmeticError, RuntimeError) as error:
                settings["failure"] = f"seed {seed}: {type(error).__name__}: {error}"[:200]
        found = found or [{"log_z_error": float("nan")}]
        made = [
            row(name, library, metric, [one[metric] for one in found], settings)
            for metric in found[0]
        ]
        told = ", ".join(
            f"{one['metric']} {one['value']:.4g}" for one in made if one["value"] is not None
        )
        print(f"{name}: {library} {method}: {told or settings.get('failure')}", flush=True)
        rows += made
    return [made | {"version": version(made["library"])} for made in rows]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flows", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a few steps, nothing compiled, to {QUICK_RESULTS}: no numbers to quote",
    )
    parser.add_argument("--case", choices=["nice", *FLOW_CASES], help="this case alone")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="processor seconds of a training"
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each flow")
    parser.add_argument("--out", type=Path, help=f"folder of flows.json (default {RESULTS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' deprecations
    logging.disable(logging.INFO)  # Pyro's guesses
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "flows.json"
    if options.case in (None, "nice"):
        write(path, measure_steps(*((1, 1, False) if options.quick else (20, 15, True))))
    for name in FLOW_CASES:
        if options.case in (None, name):
            found = measure_fits(
                name,
                *(
                    (0.0, 1, 500, 2)
                    if options.quick
                    else (options.seconds, options.seeds, 50_000, 24)
                ),
            )
            write(path, found)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
