"""pyroebm: the kernel's defaults, all chains in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

import pyroebm
from benchmarks.suite.cases import Case
from benchmarks.suite.in_torch import energy
from benchmarks.suite.measure import Job, Run

COMPILES = True


def sampler(job: Job, case: Case) -> Callable[[int], Run]:
    """From a seed to a run; ``job.options`` go to :class:`pyroebm.MCMC`."""
    target, kernel = energy(case.name), getattr(pyroebm, job.method)

    def run(seed: int) -> Run:
        # run_more draws from where run ended: one draw goes to the warm-up's time, and the clock can stop in between.
        mcmc = pyroebm.MCMC(kernel(), 1, job.num_warmup, job.chains, seed=seed, save_warmup=False, progress=False, **job.options)
        starts = torch.as_tensor(case.starts(job.chains, seed))
        begin = time.perf_counter()
        mcmc.run(target, starts)
        warm = time.perf_counter()
        mcmc.run_more(job.num_samples)
        end = time.perf_counter()
        samples = mcmc.get_samples(group_by_chain=True)
        draws = case.join({site: np.asarray(draws)[:, 1:] for site, draws in samples.items()})
        return Run(draws, warm - begin, end - warm, int(mcmc.get_stats()["n_steps"][:, 1:].sum()))

    return run
