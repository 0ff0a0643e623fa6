"""pyroebm: the kernel's defaults, except for `job.options["kernel"]`, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyroebm
from benchmarks.suite.cases import Case
from benchmarks.suite.in_torch import energy
from benchmarks.suite.measure import Job, Run
from pyroebm import MCMC, Energy

COMPILES = True


class _Clocked(MCMC):
    """An MCMC that records the time when a phase begins.

    All chain batches finish the warm-up before the first of them draws.
    """

    def _take_turns(self, *arguments: Any) -> None:
        self.last_phase_began = time.perf_counter()
        super()._take_turns(*arguments)


def clocked_run(
    job: Job, energy: Energy, chains: int, starts: Tensor, seed: int
) -> tuple[MCMC, float, float, int]:
    """Run ``job``, by default in one chain batch, and return times and gradients.

    The times are those of the two phases; the gradients are those of the draws.
    """
    asked = dict(job.options)
    kernel = getattr(pyroebm, job.method if job.chains else "NUTS")(**asked.pop("kernel", {}))
    options = {
        "seed": seed,
        "chain_batch_size": chains,
        "save_warmup": False,
        "progress": False,
        **asked,
    }
    mcmc = _Clocked(kernel, job.num_samples, job.num_warmup, chains, **options)
    begin = time.perf_counter()
    mcmc.run(energy, starts)
    end = time.perf_counter()
    warm = mcmc.last_phase_began
    return mcmc, warm - begin, end - warm, int(mcmc.get_stats()["n_steps"].sum())


def sampler(job: Job, case: Case) -> Callable[[int], Run]:
    """Return a function from a seed to a run.

    ``job.options`` are arguments of :class:`pyroebm.MCMC`; "kernel" has those of the kernel.
    """
    target = energy(case.name)

    def run(seed: int) -> Run:
        starts = torch.as_tensor(case.starts(job.chains, seed))
        mcmc, warmup, sampling, gradients = clocked_run(job, target, job.chains, starts, seed)
        samples = {
            site: np.asarray(draws) for site, draws in mcmc.get_samples(group_by_chain=True).items()
        }
        return Run(case.join(samples), warmup, sampling, gradients)

    return run
