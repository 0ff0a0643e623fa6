"""Timing of a sampler, the quality of its draws, and their errors.

The diagnostics are imported by the functions that use them: benchmarks/stopwatch.py measures the
first import of a library, and must not import another one before.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.suite.cases import Case

__all__ = ["Job", "Run", "Row", "row", "sampler_rows", "time_runs", "worst_z"]

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One library on one case.

    Args:
        case: name of the case.
        library: its name as imported.
        method: the sampler, or what else is measured.
        chains: number of chains; 0 where the method sets it itself.
        num_warmup, num_samples: steps of each chain.
        repeats: maximum number of runs, of which the median is taken.
        budget: seconds after which no further run begins; for benchmarks/stopwatch.py, those after
            which a process is stopped.
        options: further options of this library.
    """

    case: str
    library: str
    method: str
    chains: int
    num_warmup: int
    num_samples: int
    repeats: int
    budget: float
    options: dict[str, Any]

    def settings(self, repeats: int) -> dict[str, Any]:
        """Return the settings that are stored with a result."""
        own = {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in ("case", "library", "budget", "options")
        }
        return own | {
            "repeats": repeats,
            "dtype": "float64",
            "threads": 1,
            "statistic": "median, [min, max]",
            **self.options,
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sampler.

    Args:
        draws: in the coordinates of the case, ``(chains, draws, dim)``.
        warmup_seconds, sampling_seconds: wall time of the two phases.
        gradients: gradient evaluations while sampling, summed over chains; a chain that waits for
            others has none.
    """

    draws: np.ndarray
    warmup_seconds: float
    sampling_seconds: float
    gradients: int

    @property
    def seconds(self) -> float:
        """Both phases together."""
        return self.warmup_seconds + self.sampling_seconds


def time_runs(
    run: Callable[[int], Run], repeats: int, budget: float, compiles: bool
) -> tuple[list[Run], float | None]:
    """Time runs of seeds 1, 2, ..., and the compilation by the first call of seed 0.

    The compile time is that of the first call minus the median of the others. A run begins only
    while the budget lasts for one more like the last one; at least one is made.

    Args:
        run: from a seed to a run.
        repeats: maximum number of runs.
        budget: seconds for all of them.
        compiles: whether to make a first call that is dropped; otherwise its compile time is None.
    """
    began = time.perf_counter()
    first = run(0).seconds if compiles else None
    runs: list[Run] = []
    while len(runs) < repeats and (
        not runs or time.perf_counter() - began + runs[-1].seconds < budget
    ):
        runs.append(run(len(runs) + 1))
    return runs, None if first is None else first - float(np.median([r.seconds for r in runs]))


def worst_z(case: Case, draws: np.ndarray) -> float | None:
    """Return the largest error of a mean, in combined standard errors.

    They are those of the draws (Vehtari et al., 2021) and of the true value; None if it is unknown.
    """
    from pyroebm.diagnostics import convergence as diagnostics

    if case.truth is None:
        return None
    quantities = case.quantities(draws)
    error = np.hypot(diagnostics.mcse_mean(quantities), case.truth_error())
    return float(np.max(np.abs(quantities.mean((0, 1)) - case.truth()) / error))


def row(case: str, library: str, metric: str, values: list[float], settings: dict[str, Any]) -> Row:
    """Return one result; a number that is not finite becomes null, for JSON."""
    value, low, high = (float(f(values)) for f in (np.median, np.min, np.max))
    finite = all(math.isfinite(v) for v in (value, low, high))
    return {
        "case": case,
        "library": library,
        "version": "",
        "metric": metric,
        "value": value if finite else None,
        "spread": [low, high] if finite else None,
        "settings": settings,
    }


def sampler_rows(job: Job, case: Case, runs: list[Run], compile_seconds: float | None) -> list[Row]:
    """Return all results of a sampler on a case, with compile times of at least 0."""
    from pyroebm.diagnostics import convergence as diagnostics

    ess = [float(np.min(diagnostics.ess_bulk(r.draws))) for r in runs]
    compiling = max(compile_seconds or 0.0, 0.0)
    columns = {
        "ess_per_second": [e / r.sampling_seconds for e, r in zip(ess, runs, strict=True)],
        "ess_per_second_with_warmup": [e / r.seconds for e, r in zip(ess, runs, strict=True)],
        "ess_per_second_with_compile": [
            e / (r.seconds + compiling) for e, r in zip(ess, runs, strict=True)
        ],
        "ess_per_gradient": [e / r.gradients for e, r in zip(ess, runs, strict=True)],
        "worst_z": [worst_z(case, r.draws) for r in runs],
        "min_ess": ess,
        "sampling_seconds": [r.sampling_seconds for r in runs],
        "warmup_seconds": [r.warmup_seconds for r in runs],
        "gradients_per_draw": [r.gradients / (r.draws.shape[0] * r.draws.shape[1]) for r in runs],
    }
    if compile_seconds is not None:
        columns["compile_seconds"] = [compile_seconds]
    settings = job.settings(len(runs))
    return [
        row(job.case, job.library, metric, values, settings) for metric, values in columns.items()
    ]
