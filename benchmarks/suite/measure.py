"""From runs to rows: how a sampler is timed, what its draws are worth, and whether they are
right.

The diagnostics are imported by the functions that use them: benchmarks/stopwatch.py measures how
long the first import of a library takes, and must not import another one before.
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
        repeats: most runs to take the median of.
        budget: seconds after which no further run begins; for benchmarks/stopwatch.py, those after
            which a process is stopped.
        options: what only this library is told.
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
        """What a row says of how it was measured."""
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
        """Both phases."""
        return self.warmup_seconds + self.sampling_seconds


def time_runs(
    run: Callable[[int], Run], repeats: int, budget: float, compiles: bool
) -> tuple[list[Run], float | None]:
    """Runs of seeds 1, 2, ..., and what the first call of seed 0 took beyond their median: the time
    to compile.

    The next run begins only while the budget lasts for one more like the last one; at least one is
    made.

    Args:
        run: from a seed to a run.
        repeats: most runs.
        budget: seconds for all of them.
        compiles: whether a first call is to be thrown away; None stands for its compile time
            otherwise.
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
    """Largest error of a mean in standard errors, those of the draws (Vehtari et al., 2021) and of
    the truth combined; None where the case knows no truth."""
    from pyroebm.diagnostics import convergence as diagnostics

    if case.truth is None:
        return None
    quantities = case.quantities(draws)
    error = np.hypot(diagnostics.mcse_mean(quantities), case.truth_error())
    return float(np.max(np.abs(quantities.mean((0, 1)) - case.truth()) / error))


def row(case: str, library: str, metric: str, values: list[float], settings: dict[str, Any]) -> Row:
    """One row; a number that is not finite becomes null, which JSON can hold."""
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
    """All rows of a sampler on a case; what is compiled never counts as less than nothing."""
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
