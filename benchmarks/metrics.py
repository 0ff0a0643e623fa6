"""Diagonal metrics for warm-up: NUTS on 15 models with two ways to estimate the metric.

    python -m benchmarks.metrics [--quick] [--seeds N] [--case CASE] [--posteriordb FILE]
    [--out DIR]

- `draws`: the variances of the draws, as in Stan;
- `draws and gradients`: the square root of the variances of the draws over those of the gradients
  (Seyboldt, Carlson and Carpenter, 2024).

A run has 4 chains of 1,000 warm-up steps and 1,000 draws from default starts, one run for each of
the seeds 0, 1, .... Gradients are counted, so other programs on the machine do not affect the
results. They replace earlier ones in DIR/metrics.json after each case and metric. The cases of
posteriordb need a file of the user (its format is in benchmarks/suite/posteriordb.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from benchmarks.samplers import QUICK_RESULTS, RESULTS, ROOT, write
from benchmarks.stopwatch import CASES
from benchmarks.suite.answers import judged
from benchmarks.suite.cases import MODEL_CASES, Case
from benchmarks.suite.in_pyro import MODELS, tensors
from benchmarks.suite.measure import Row, row
from benchmarks.suite.posteriordb import posteriordb_cases
from pyroebm import MCMC, NUTS, ModelEnergy, __version__
from pyroebm.kernels import Kernel, WindowAdaptation
from pyroebm.kernels.adaptation.covariance import PooledVariance, shrunk
from pyroebm.kernels.base import AnyState, rows

CHAINS = 4


class PooledDiagonal(NamedTuple):
    r"""Variances of draws and gradients of all chains, and the diagonal metric from both.

    .. math:: v_i = \sqrt{\operatorname{Var}(x_i) / \operatorname{Var}(\partial_i E)}

    It minimizes the Fisher divergence between the target and normal densities with independent
    entries (Seyboldt, Carlson and Carpenter, 2024). If the target is such a density, any two draws
    determine it, since the gradients are linear in the draws.

    Args:
        both: moments of rows that contain a draw and its gradient.
    """

    both: PooledVariance

    @classmethod
    def start(cls, like: Tensor) -> PooledDiagonal:
        """Return an empty state for rows shaped as ``like``, ``(chains, dim)``."""
        return cls(PooledVariance.start(torch.cat([like, like], 1)))

    def update(self, q: Tensor, grad: Tensor, moved: Tensor | None = None) -> PooledDiagonal:
        """Add rows ``(chains, dim)`` of the chains that ``moved`` (None: of all)."""
        return PooledDiagonal(self.both.update(torch.cat([q, grad], 1), moved=moved))

    def metric(self, before: Tensor | None = None) -> Tensor | None:
        """Return the diagonal, shrunk towards the metric ``before``.

        Shrinkage is that of :meth:`PooledVariance.metric`. An entry whose draws or gradients have
        variance 0 keeps its previous value.
        """
        draws, grads = self.both.variance().chunk(2)
        return shrunk((draws / grads).sqrt(), self.both.draws, before)


class DrawsAndGradients(WindowAdaptation):
    """Window adaptation with this diagonal metric."""

    def _empty(self, kernel: Kernel[Any], state: AnyState) -> Any:
        return PooledDiagonal.start(rows(state.x))


METRICS = {"draws": WindowAdaptation, "draws and gradients": DrawsAndGradients}

#: What rows call NUTS, before the name of the metric.
METHOD = "NUTS, metric from "


def case_rows(case: Case, metric: str, seeds: int, steps: int, compile: bool = True) -> list[Row]:
    """Run a case with a metric and return medians over the seeds, and ranges."""
    began = time.perf_counter()
    energy = ModelEnergy(MODELS[case.name], *tensors(case.arguments()))
    columns: dict[str, list[Any]] = {}
    for seed in range(seeds):
        mcmc = MCMC(
            NUTS(),
            num_samples=steps,
            warmup_steps=steps,
            num_chains=CHAINS,
            seed=seed,
            adaptation=METRICS[metric](),
            compile=compile,
            progress=False,
        )
        mcmc.run(energy)
        stats = mcmc.get_stats()
        found = judged(case, mcmc.get_samples(group_by_chain=True))
        ess, gradients = found["min_ess"], int(stats["n_steps"].sum())
        found |= {
            "ess_per_gradient": None if ess is None else ess / gradients,
            "gradients": gradients,
            "warmup_gradients": int(mcmc.get_stats(warmup=True)["n_steps"].sum()),
            "divergences": int(stats["diverging"].sum()),
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    settings = {
        "method": METHOD + metric,
        "chains": CHAINS,
        "repeats": seeds,
        "warmup": steps,
        "draws": steps,
    }
    numbers = [
        f"{name} {statistics.median(columns[name]):.4g}"
        for name in ("ess_per_gradient", "warmup_gradients", "divergences", "worst_r_hat")
        if None not in columns[name]
    ]
    print(
        f"{case.name:20} {metric:20} {', '.join(numbers)}, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return [
        row(f"metrics {case.name}", "pyroebm", name, values, settings) | {"version": __version__}
        for name, values in columns.items()
        if None not in values
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one seed of 100 + 100 steps, to {QUICK_RESULTS.relative_to(ROOT)}",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument(
        "--case", choices=CASES, action="append", help="one case alone (may be repeated)"
    )
    parser.add_argument("--posteriordb", type=Path, help="the user's file of posteriordb")
    parser.add_argument(
        "--out", type=Path, help=f"folder of metrics.json (default {RESULTS.relative_to(ROOT)})"
    )
    options = parser.parse_args()
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "metrics.json"
    seeds, steps = (1, 100) if options.quick else (options.seeds, 1000)
    cases = dict(MODEL_CASES)
    if options.posteriordb is not None:
        cases |= posteriordb_cases(options.posteriordb)
    asked = options.case or CASES
    if skipped := [name for name in asked if name not in cases]:
        print(f"skipped, since they need --posteriordb FILE: {', '.join(skipped)}", flush=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name in asked:
        if name in cases:
            for metric in METRICS:
                write(path, case_rows(cases[name], metric, seeds, steps))


if __name__ == "__main__":
    main()
