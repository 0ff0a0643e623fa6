"""One run of benchmarks/pyro_examples.py in its own process, on one core.

`python -m benchmarks.suite.example_worker CONTENT.json ANSWER.json`
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks.suite.example_models import EXAMPLES
from benchmarks.suite.worker import pin

__all__ = ["run_example"]

#: The module whose MCMC and NUTS a script imports.
MODULES = {"pyro": "pyro.infer", "pyroebm": "pyroebm.infer"}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the compilers that it has called."""
    return sum(os.times()[:4])


class _Clock:
    """A hook that adds up the seconds of the steps after the warm-up."""

    def __init__(self) -> None:
        self.last = cpu_seconds()
        self.sampling = 0.0

    def __call__(self, kernel: object, params: object, stage: str, i: int) -> None:
        now = cpu_seconds()
        if stage.startswith("Sample"):
            self.sampling += now - self.last
        self.last = now


def run_example(
    name: str,
    library: str,
    num_chains: int,
    num_warmup: int,
    num_samples: int,
    seed: int,
    scale: int = 1,
) -> dict[str, Any]:
    """Run an example, and return seconds, means with standard errors, and diagnostics.

    Seconds are CPU time, from the construction of the kernel to the draws, without imports. Those
    of sampling are multiplied by ``scale``.
    """
    infer = importlib.import_module(MODULES[library])
    pyro.set_rng_seed(0)  # the same data and, in `neutra`, the same flow for all libraries
    problem = EXAMPLES[name].make(num_chains)
    pyro.set_rng_seed(seed)
    given = dict(problem.kernel)
    if problem.model is not None:
        given["model"] = problem.model
    clock = _Clock() if scale > 1 else None
    began, wall = cpu_seconds(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_chains=.* is more than available_cpu")
        mcmc = infer.MCMC(
            infer.NUTS(**given),
            num_samples=num_samples,
            warmup_steps=num_warmup,
            num_chains=num_chains,
            hook_fn=clock,
            disable_progbar=True,
            **problem.mcmc,
        )
        mcmc.run(*problem.args)
        samples = mcmc.get_samples(group_by_chain=True)
    seconds = cpu_seconds() - began
    found = {
        "cpu_share": seconds / (time.perf_counter() - wall),
        "seconds": seconds + (scale - 1) * clock.sampling if clock else seconds,
    }
    return found | summary(problem.quantities(samples))


def summary(draws: Any) -> dict[str, Any]:
    """Return means and standard errors of all entries that vary, minimum ESS and maximum R-hat."""
    from pyroebm.diagnostics import ess_bulk, mcse_mean, r_hat

    flat = torch.cat([x.reshape(*x.shape[:2], -1).double() for x in draws.values()], -1)
    labels = [f"{name}[{k}]" for name, x in draws.items() for k in range(x[0, 0].numel())]
    varies = (flat.amax((0, 1)) - flat.amin((0, 1))) > 1e-6
    flat = flat[..., varies]
    return {
        "labels": [label for label, kept in zip(labels, varies.tolist(), strict=True) if kept],
        "means": flat.mean((0, 1)).tolist(),
        "errors": mcse_mean(flat).tolist(),
        "min_ess": float(ess_bulk(flat).min()),
        "worst_r_hat": float(r_hat(flat).max()),
    }


def main() -> None:
    """Run the example and write the answer."""
    source, target = (Path(argument) for argument in sys.argv[1:])
    pinned = pin()
    torch.set_num_threads(1)
    content = json.loads(source.read_text(encoding="utf-8"))
    version = importlib.import_module(content["library"]).__version__
    answer = run_example(**content) | {"pinned": pinned, "version": version}
    target.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
