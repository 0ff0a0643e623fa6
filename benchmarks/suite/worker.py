"""Run one job in its own process, on one core.

`python -m benchmarks.suite.worker JOB.json ROWS.json`
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.suite.cases import CASES
from benchmarks.suite.measure import Job, Row, sampler_rows, time_runs

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_ENABLE_X64": "1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def pin() -> bool:
    """Pin the process to one core, where the system allows it."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def rows_of(job: Job) -> list[Row]:
    """Run the job and return its results."""
    if job.library in ("pyro", "pyroebm"):
        import torch

        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
    if job.method in ("gradient", "chains curve", "dimension curve"):
        from benchmarks.suite import limits

        measure = {
            "gradient": limits.gradient_rows,
            "chains curve": limits.chains_curve,
            "dimension curve": limits.dimension_curve,
        }
        return measure[job.method](job)
    case, adapter = CASES[job.case], importlib.import_module(f"benchmarks.suite.with_{job.library}")
    runs, compile_seconds = time_runs(
        adapter.sampler(job, case), job.repeats, job.budget, adapter.COMPILES
    )
    return sampler_rows(job, case, runs, compile_seconds)


def main() -> None:
    """Run the job and write its results."""
    source, target = (Path(argument) for argument in sys.argv[1:])
    pinned = pin()
    job = Job(**json.loads(source.read_text(encoding="utf-8")))
    rows = rows_of(job)
    version = importlib.import_module(job.library).__version__
    finished = [
        r | {"version": version, "settings": r["settings"] | {"pinned": pinned}} for r in rows
    ]
    target.write_text(json.dumps(finished, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
