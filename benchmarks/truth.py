"""Accuracy of default runs on densities with known moments, with 4 and with 64 chains.

    python -m benchmarks.truth --posteriordb FILE [--case CASE] [--seeds N] [--quick] [--out DIR]

Each run is `pyroebm.infer`'s NUTS at its defaults, with 1,000 steps of warm-up and 1,000 draws of
each chain. Eight schools are run again at the target acceptance rate .95, with which posteriordb
made its reference draws. Results go to DIR/truth.json: the largest error of a mean or mean square,
in combined standard errors of the draws and the reference, the number of divergences, and the
largest R-hat.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import torch

from benchmarks.samplers import QUICK_RESULTS, RESULTS, write
from benchmarks.suite.cases import MODEL_CASES, Case
from benchmarks.suite.in_pyro import MODELS, tensors
from benchmarks.suite.measure import Row, row, worst_z
from benchmarks.suite.posteriordb import DENSITIES, posteriordb_cases
from pyroebm import __version__
from pyroebm.diagnostics import r_hat
from pyroebm.infer import MCMC, NUTS

CHAINS = (4, 64)
#: Target acceptance rates: the default, and that of a reference which needed another one.
DEFAULT = 0.8
TARGETS = {"eight_schools": (DEFAULT, 0.95)}


def measure(case: Case, chains: int, steps: int, seeds: int, target: float) -> list[Row]:
    """Return the results of one case with a number of chains."""
    found: dict[str, list[float]] = {"worst_z": [], "divergences": [], "worst_r_hat": []}
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(
            NUTS(MODELS[case.name], target_accept_prob=target), steps, steps, num_chains=chains
        )
        mcmc.run(*tensors(case.arguments()))
        samples = mcmc.get_samples(group_by_chain=True)
        draws = case.join({site: np.asarray(value) for site, value in samples.items()})
        z = worst_z(case, draws)
        found["worst_z"].append(math.nan if z is None else z)
        found["divergences"].append(int(mcmc.get_stats()["diverging"].sum()))
        found["worst_r_hat"].append(float(np.max(r_hat(torch.as_tensor(draws)))))
    method = "NUTS" if target == DEFAULT else f"NUTS, acceptance {target}"
    settings = {"method": method, "chains": chains, "num_warmup": steps, "num_samples": steps}
    settings["repeats"] = seeds
    return [
        row(f"truth {case.name}", "pyroebm", metric, values, settings) | {"version": __version__}
        for metric, values in found.items()
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.truth", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--posteriordb", type=Path, help="the user's file of posteriordb")
    parser.add_argument("--case", choices=[*MODEL_CASES, *DENSITIES], help="this case alone")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--quick", action="store_true", help="4 x (100 + 100), once")
    parser.add_argument("--out", type=Path, default=None, help="folder of truth.json")
    asked = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    cases = {name: case for name, case in MODEL_CASES.items() if case.truth is not None}
    if asked.posteriordb is None:
        print("the cases of posteriordb are left out: --posteriordb FILE names the user's file")
    else:
        cases |= posteriordb_cases(asked.posteriordb)
    out = asked.out or (QUICK_RESULTS if asked.quick else RESULTS)
    for name, case in cases.items():
        if asked.case not in (None, name):
            continue
        steps, seeds = (100, 1) if asked.quick else (1000, asked.seeds)
        for target, chains in itertools.product(
            TARGETS.get(name, (DEFAULT,)), CHAINS[:1] if asked.quick else CHAINS
        ):
            rows = measure(case, chains, steps, seeds, target)
            write(out / "truth.json", rows)
            said = ", ".join(f"{r['metric']} {r['value']} {r['spread']}" for r in rows)
            print(f"{name}, {chains} chains, acceptance {target}: {said}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
