"""Pyro's NUTS at its defaults, one chain after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc import hmc, nuts

from benchmarks.suite.cases import Case
from benchmarks.suite.in_pyro import MODELS, tensors
from benchmarks.suite.in_torch import energy
from benchmarks.suite.measure import Job, Run
from pyroebm.core import PotentialFn

COMPILES = False


class _Counter:
    """Count Pyro's leapfrog steps: NUTS calls it for one step, which is one gradient."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return hmc.velocity_verlet(*args, **kwargs)


def sampler(job: Job, case: Case) -> Callable[[int], Run]:
    """Return a function from a seed to a run of one chain."""
    counter = _Counter()
    nuts.velocity_verlet = counter
    arguments = () if case.arguments is None else tensors(case.arguments())
    given = (
        {"potential_fn": PotentialFn(energy(case.name), "x")}
        if case.arguments is None
        else {"model": MODELS[case.name]}
    )

    def run(seed: int) -> Run:
        pyro.set_rng_seed(seed)
        kernel = NUTS(**given)
        starts = {n: torch.as_tensor(v) for n, v in case.split(case.starts(1, seed)[0]).items()}
        warm: list[tuple[float, int]] = []

        def hook(kernel: NUTS, samples: dict, stage: str, i: int) -> None:
            if stage == "Warmup":
                warm[:] = [(time.perf_counter(), counter.calls)]

        mcmc = MCMC(
            kernel,
            num_samples=job.num_samples,
            warmup_steps=job.num_warmup,
            initial_params=starts,
            hook_fn=hook,
            disable_progbar=True,
        )
        begin = time.perf_counter()
        mcmc.run(*arguments)
        end = time.perf_counter()
        (middle, before), after = warm[0], counter.calls
        samples = {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}
        return Run(case.join(samples), middle - begin, end - middle, after - before)

    return run
