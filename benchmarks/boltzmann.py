"""Training and AIS of a 784-500 RBM, compared with scikit-learn, rbms and matrix products.

    python -m benchmarks.boltzmann [--quick] [--threads N] [--out DIR]

All libraries run alternately in one process, by default on one core. The results are milliseconds
for a step of PCD-1 (batches of 100, 100 chains) and for a temperature of AIS (100 chains), medians
of five rounds. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.samplers import QUICK_RESULTS, RESULTS, write
from benchmarks.suite.measure import Row, row
from pyroebm.energies import BernoulliRBM
from pyroebm.objectives import Centering, PersistentCD
from pyroebm.partition import ais, base_rates
from pyroebm.training import fit

VISIBLE = 784
HIDDEN = 500
BATCH = 100
Timed = Callable[[int], Any]


def data(n: int = 2000) -> torch.Tensor:
    """Return binary images as sparse as MNIST's.

    The time of a step does not depend on their content.
    """
    return (torch.rand(n, VISIBLE, generator=torch.Generator().manual_seed(0)) < 0.13).float()


def machine(dtype: torch.dtype = torch.float32) -> BernoulliRBM:
    """Return a machine with weights as small as after some training."""
    weight = 0.1 * torch.randn(
        VISIBLE, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype
    )
    return BernoulliRBM(VISIBLE, HIDDEN, weight=weight, dtype=dtype)


def ours(centered: bool) -> Timed:
    """Train by the public loop, with all of its checks."""
    x, rbm = data(), machine()
    transform = Centering() if centered else None
    objective = PersistentCD(num_chains=BATCH)

    def steps(n: int) -> None:
        fit(
            rbm,
            objective,
            x,
            num_steps=n,
            optimizer="sgd",
            lr=0.01,
            transform=transform,
            progress=False,
        )

    return steps


def products(dtype: torch.dtype = torch.float32) -> Timed:
    """Compute the matrix products of PCD-1 alone.

    They are the fields of data and chains, both products of the gradient, and one downward pass.
    """
    rbm, x = machine(dtype), data(BATCH).to(dtype)
    w = rbm.weight.detach()
    h = torch.rand(BATCH, HIDDEN, dtype=dtype)
    both = torch.rand(2 * BATCH, HIDDEN, dtype=dtype)
    pair = torch.cat([x, x])

    def steps(n: int) -> None:
        for _ in range(n):
            h @ w.mT
            pair @ w
            pair.mT @ both

    return steps


def scikit_learn(dtype: type) -> Timed:
    """Train by scikit-learn's ``partial_fit``."""
    from sklearn.neural_network import BernoulliRBM as Peer

    x = data().numpy().astype(dtype)
    peer = Peer(n_components=HIDDEN, learning_rate=0.01, batch_size=BATCH, random_state=0)
    peer.partial_fit(x[:BATCH])

    def steps(n: int) -> None:
        for step in range(n):
            begin = step * BATCH % len(x)
            peer.partial_fit(x[begin : begin + BATCH])

    return steps


def rbms_machine() -> Any:
    """Return the same machine of the package rbms."""
    from rbms.bernoulli_bernoulli.classes import BBRBM

    rbm = machine()
    return BBRBM(
        weight_matrix=rbm.weight.detach().clone(),
        vbias=rbm.visible_bias.detach().clone(),
        hbias=rbm.hidden_bias.detach().clone(),
    )


def rbms_pcd(centered: bool) -> Timed:
    """Train by PCD of the package rbms."""
    from rbms.training.pcd import fit_batch_pcd

    x, params = data(), rbms_machine()
    optimizer = torch.optim.SGD(params.parameters(), lr=0.01, maximize=True)
    for parameter in params.parameters():
        parameter.grad = torch.zeros_like(parameter)
    chains, weights = params.init_chains(BATCH), torch.ones(BATCH)

    def steps(n: int) -> None:
        nonlocal chains
        for step in range(n):
            begin = step * BATCH % len(x)
            optimizer.zero_grad(set_to_none=False)
            chains, _ = fit_batch_pcd(
                (x[begin : begin + BATCH], weights), chains, params, 1, 1.0, centered
            )
            optimizer.step()

    return steps


def our_ais() -> Timed:
    """Run AIS of this library."""
    rbm = machine()
    base = base_rates(rbm, data())
    return lambda n: ais(rbm, base, betas=n, num_chains=BATCH, progress=False)


def ais_products() -> Timed:
    """Compute the matrix products of AIS alone, two for each temperature."""
    w = machine().weight.detach()
    v = data(BATCH)
    h = torch.rand(BATCH, HIDDEN)

    def steps(n: int) -> None:
        for _ in range(n):
            v @ w
            h @ w.mT

    return steps


def rbms_ais() -> Timed:
    """Run AIS of the package rbms."""
    from rbms.partition_function.ais import compute_partition_function_ais

    params = rbms_machine()
    return lambda n: compute_partition_function_ais(BATCH, n, params)


#: Case, library, what of it, how to make it, and what is told of it.
CONTESTANTS: tuple[tuple[str, str, str, Callable[[], Timed], dict[str, Any]], ...] = (
    ("pcd", "torch", "products alone", products, {"dtype": "float32"}),
    (
        "pcd",
        "pyroebm",
        "fit",
        functools.partial(ours, False),
        {"dtype": "float32", "centered": False},
    ),
    (
        "pcd",
        "pyroebm",
        "fit, centered",
        functools.partial(ours, True),
        {"dtype": "float32", "centered": True},
    ),
    (
        "pcd",
        "rbms",
        "fit_batch_pcd",
        functools.partial(rbms_pcd, False),
        {"dtype": "float32", "centered": False},
    ),
    (
        "pcd",
        "rbms",
        "fit_batch_pcd, centered",
        functools.partial(rbms_pcd, True),
        {"dtype": "float32", "centered": True},
    ),
    (
        "pcd",
        "sklearn",
        "partial_fit, float32",
        functools.partial(scikit_learn, np.float32),
        {"dtype": "float32"},
    ),
    (
        "pcd",
        "sklearn",
        "partial_fit, float64",
        functools.partial(scikit_learn, np.float64),
        {"dtype": "float64"},
    ),
    ("ais", "torch", "products alone", ais_products, {"dtype": "float32"}),
    ("ais", "pyroebm", "ais", our_ais, {"dtype": "float32"}),
    ("ais", "rbms", "compute_partition_function_ais", rbms_ais, {"dtype": "float32"}),
)


def measure(steps: int, rounds: int, threads: int) -> list[Row]:
    """Run all entries alternately, round by round; the first round is a warm-up and is dropped."""
    torch.set_num_threads(threads)
    ready, milliseconds = {}, dict[int, list[float]]()
    for number, (case, library, what, make, _) in enumerate(CONTESTANTS):
        if importlib.util.find_spec(library) is None:
            print(
                f"{case}: {library} {what}: missing, no row (pip install -c"
                " benchmarks/constraints.txt -e '.[bench]')"
            )
            continue
        ready[number] = make()
    for _ in range(rounds + 1):
        for number, run in ready.items():
            begin = time.perf_counter()
            run(steps)
            milliseconds.setdefault(number, []).append((time.perf_counter() - begin) / steps * 1e3)
    rows = []
    for number, found in milliseconds.items():
        case, library, what, _, told = CONTESTANTS[number]
        settings = {
            "method": what,
            "chains": BATCH,
            "threads": threads,
            "statistic": "median, [min, max]",
            "repeats": rounds,
            **told,
        }
        settings |= {"units": [VISIBLE, HIDDEN], "steps": steps}
        made = row(case, library, "milliseconds", found[1:], settings)
        rows.append(
            made
            | {
                "version": importlib.import_module(library).__version__
                if library != "rbms"
                else importlib.metadata.version(library)
            }
        )
        limit = statistics.median(milliseconds[0 if case == "pcd" else 7][1:])
        print(
            f"{case}: {library} {what}: {made['value']:.2f} ms, {limit / made['value']:.0%} of the"
            " products' speed"
        )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.boltzmann", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"a few steps, to {QUICK_RESULTS}: no timings"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; set OMP_NUM_THREADS to the same for the peers",
    )
    parser.add_argument("--out", type=Path, help=f"folder of boltzmann.json (default {RESULTS})")
    options = parser.parse_args()
    rows = measure(*((5, 1) if options.quick else (200, 5)), options.threads)
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "boltzmann.json"
    write(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
