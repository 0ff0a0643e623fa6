"""The cost of a gradient, and of a leapfrog step by number of chains and of dimensions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.suite.cases import CASES
from benchmarks.suite.in_torch import energy
from benchmarks.suite.measure import Job, Row, row
from benchmarks.suite.with_pyroebm import clocked_run
from pyroebm.core.compilation import CompiledGradient
from pyroebm.core.energy import unchecked_value_and_grad
from pyroebm.targets import scales_gaussian

__all__ = ["chains_curve", "dimension_curve", "gradient_rows"]


def _microseconds(call: Callable[[], Any], repeats: int, seconds: float) -> list[float]:
    """Return the time of one call, from ``repeats`` groups of calls of about ``seconds`` each.

    The first calls compile and are not timed.
    """
    for _ in range(3):
        call()
    begin = time.perf_counter()
    call()
    count = max(1, math.ceil(seconds / (time.perf_counter() - begin)))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - begin) / count * 1e6)
    return found


def gradient_rows(job: Job) -> list[Row]:
    """Return microseconds for the energies and gradients of a batch.

    This is the limit of every sampler on this energy.
    """
    target, rows = energy(job.case), []
    for chains in (1, 256):
        x = torch.as_tensor(CASES[job.case].starts(chains, 0))
        compiled = CompiledGradient(target)
        compiled.prepare(x.shape)
        for mode, view in (("eager", target), ("compiled", compiled)):
            torch.testing.assert_close(
                unchecked_value_and_grad(view, x), unchecked_value_and_grad(target, x)
            )
            values = _microseconds(
                lambda view=view, x=x: unchecked_value_and_grad(view, x),
                job.repeats,
                job.budget / 1000,
            )
            settings = job.settings(job.repeats) | {"chains": chains, "mode": mode}
            rows.append(row(job.case, job.library, "gradient_us", values, settings))
    return rows


def _leapfrog_row(job: Job, dim: int, chains: int) -> Row:
    target, values = scales_gaussian(dim, dtype=torch.float64), []
    for seed in range(job.repeats + 1):
        starts = target.sample(chains, torch.Generator().manual_seed(1000 + seed))
        _, _, seconds, gradients = clocked_run(job, target, chains, starts, seed)
        values.append(seconds / gradients * 1e6)
    # The first may have compiled what its warm-up did not need.
    return row(
        job.case,
        job.library,
        "leapfrog_us",
        values[1:],
        job.settings(job.repeats) | {"chains": chains, "dim": dim},
    )


def chains_curve(job: Job) -> list[Row]:
    """Return microseconds per leapfrog step of one chain of NUTS, for 1 to 4,096 chains."""
    return [_leapfrog_row(job, 50, 4**k) for k in range(7)]


def dimension_curve(job: Job) -> list[Row]:
    """Return the same for 64 chains, in 10 to 1,000 dimensions."""
    return [_leapfrog_row(job, dim, 64) for dim in (10, 32, 100, 316, 1000)]
