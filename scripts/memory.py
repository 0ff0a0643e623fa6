"""Measure whether long runs need more memory or open files with time.

Each case runs in a process of its own for some minutes, and prints the slope of its resident memory
in MB per minute, after a fifth of the time, and the number of its open files then and at the end.

    python scripts/memory.py --seconds 180
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pyroebm import MCMC, NUTS, fit_steps
from pyroebm.energies import BernoulliRBM
from pyroebm.flows import RealNVP
from pyroebm.mcmc import sampler
from pyroebm.objectives import PersistentCD, ReverseKL
from pyroebm.targets import Banana, DoubleWell
from pyroebm.training import trainer


def nuts_with_a_store(end: float) -> None:
    """Draws that are written ten times a second."""
    mcmc = MCMC(NUTS(), 1000, 500, num_chains=8, seed=0, compile=False, progress=False)
    folder = Path(tempfile.mkdtemp())
    mcmc.run(DoubleWell(), store=folder)
    while time.monotonic() < end:
        mcmc.run_more(2000)
    shutil.rmtree(folder)


def moments(end: float) -> None:
    """Means and variances instead of draws."""
    options = {"seed": 0, "compile": False, "keep": "moments", "progress": False}
    mcmc = MCMC(NUTS(), 1000, 500, num_chains=8, **options)
    mcmc.run(DoubleWell())
    while time.monotonic() < end:
        mcmc.run_more(2000)


def persistent_chains(end: float) -> None:
    """Contrastive divergence with persistent chains and checkpoints."""
    data = (torch.rand(1000, 30, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    with tempfile.TemporaryDirectory() as folder:
        run = fit_steps(
            BernoulliRBM(30, 20),
            PersistentCD(100),
            data,
            num_steps=10**9,
            log_every=10**9,
            checkpoint=Path(folder, "run"),
            progress=False,
        )
        for _ in run:
            if time.monotonic() > end:
                break


def flow(end: float) -> None:
    """A flow fitted to an energy."""
    run = fit_steps(
        RealNVP(2, 3, (32,)),
        ReverseKL(Banana(), num_samples=64),
        num_steps=10**9,
        log_every=10**9,
        progress=False,
    )
    for _ in run:
        if time.monotonic() > end:
            break


CASES: dict[str, Callable[[float], None]] = {
    "NUTS with a store": nuts_with_a_store,
    "moments": moments,
    "PCD": persistent_chains,
    "flow": flow,
}


def measure(name: str, seconds: float) -> None:
    """Run a case, and print what it needed."""
    torch.set_num_threads(1)
    sampler.CHECKPOINT_EVERY = trainer.CHECKPOINT_EVERY = 0.1
    begin, seen = time.monotonic(), list[tuple[float, float, int]]()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            size = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((time.monotonic() - begin, size, len(os.listdir("/proc/self/fd"))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        CASES[name](begin + seconds)
    finally:
        done.set()
        thread.join()
    times, sizes, files = np.array([each for each in seen if each[0] > 0.2 * seconds]).T
    slope = 60.0 * np.polyfit(times, sizes, 1)[0]
    print(
        f"{name}: {slope:+.3f} MB/min over {times[-1] - times[0]:.0f} s, {sizes[0]:.1f} to"
        f" {sizes[-1]:.1f} MB, {files[0]:.0f} to {files[-1]:.0f} open files",
        flush=True,
    )


def main() -> None:
    """Measure the named cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=1200.0)
    options = parser.parse_args()
    for name in options.cases:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.seconds)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
