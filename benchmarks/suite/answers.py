"""From a model to a table of R-hat, as a user of each library writes it.

Every library is imported by its own function, within the measured time. A function prints the
library's table and returns a function that collects draws and statistics after the measurement.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.cases import MODEL_CASES, Case
from benchmarks.suite.measure import Job, worst_z
from benchmarks.suite.posteriordb import posteriordb_cases

__all__ = ["ANSWERS", "Answer", "measured"]

#: Where a library is installed under another name.
DISTRIBUTIONS = {"pyro": "pyro-ppl"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a run.

    Args:
        samples: draws of each site, arrays ``(chains, draws, *shape)``.
        gradients: gradient evaluations during sampling, summed over chains; None where the library
            does not count them.
        divergences: number of divergent draws.
        sampling_seconds: warm-up and draws without imports and compilation; None where the library
            does not separate them.
    """

    samples: Mapping[str, Any]
    gradients: int | None
    divergences: int
    sampling_seconds: float | None


Collect = Callable[[], Answer]


def _pyro_or_ours(case: Case, job: Job, seed: int, infer: Any) -> tuple[Any, float]:
    """Run the script of both; only the import of ``infer`` differs."""
    import pyro
    import torch

    from benchmarks.suite.in_pyro import MODELS, tensors

    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(seed)
    mcmc = infer.MCMC(
        infer.NUTS(MODELS[case.name]),
        num_samples=job.num_samples,
        warmup_steps=job.num_warmup,
        num_chains=job.chains,
        disable_progbar=True,
    )
    began = time.perf_counter()
    mcmc.run(*tensors(case.arguments()))
    seconds = time.perf_counter() - began
    mcmc.summary()
    return mcmc, seconds


def with_pyroebm(case: Case, job: Job, seed: int) -> Collect:
    import pyroebm.infer

    mcmc, _ = _pyro_or_ours(case, job, seed, pyroebm.infer)

    def collect() -> Answer:
        stats = mcmc.get_stats()
        return Answer(
            mcmc.get_samples(group_by_chain=True),
            int(stats["n_steps"].sum()),
            int(stats["diverging"].sum()),
            None,
        )

    return collect


def with_pyro(case: Case, job: Job, seed: int) -> Collect:
    import pyro.infer

    mcmc, seconds = _pyro_or_ours(case, job, seed, pyro.infer)

    def collect() -> Answer:
        divergences = mcmc.diagnostics()["divergences"]
        return Answer(
            mcmc.get_samples(group_by_chain=True),
            None,
            sum(len(draws) for draws in divergences.values()),
            seconds,
        )

    return collect


def with_numpyro(case: Case, job: Job, seed: int) -> Collect:
    import jax
    from numpyro.infer import MCMC, NUTS

    from benchmarks.suite.in_numpyro import MODELS

    mcmc = MCMC(
        NUTS(MODELS[case.name]),
        num_warmup=job.num_warmup,
        num_samples=job.num_samples,
        num_chains=job.chains,
        progress_bar=False,
        chain_method=job.options["chain_method"],
    )
    mcmc.run(jax.random.PRNGKey(seed), *case.arguments(), extra_fields=("num_steps", "diverging"))
    mcmc.print_summary()

    def collect() -> Answer:
        told = mcmc.get_extra_fields()
        return Answer(
            mcmc.get_samples(group_by_chain=True),
            int(told["num_steps"].sum()),
            int(told["diverging"].sum()),
            None,
        )

    return collect


def with_blackjax(case: Case, job: Job, seed: int) -> Collect:
    """Run BlackJAX with NumPyro's density, starts and table."""
    import jax
    from numpyro.diagnostics import print_summary
    from numpyro.infer.util import initialize_model

    from benchmarks.suite.in_numpyro import MODELS
    from benchmarks.suite.with_blackjax import phases

    start_key, warm_key, draw_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    info = initialize_model(
        jax.random.split(start_key, job.chains),
        MODELS[case.name],
        model_args=case.arguments(),
        dynamic_args=False,
    )
    warm_up, draw = phases(job, lambda z: -info.potential_fn(z))
    states, parameters = warm_up(warm_key, info.param_info.z)
    z, steps, diverging = draw(draw_key, states, parameters)
    by_chain = {name: draws.swapaxes(0, 1) for name, draws in z.items()}
    samples = jax.jit(jax.vmap(jax.vmap(info.postprocess_fn)))(by_chain)
    print_summary(samples)
    return lambda: Answer(samples, int(steps.sum()), int(diverging.sum()), None)


def _pymc_model(case: Case) -> Any:
    import pymc as pm

    from benchmarks.suite.in_pymc import MODELS

    with pm.Model() as model:
        MODELS[case.name](*case.arguments())
    return model


def with_nutpie(case: Case, job: Job, seed: int) -> Collect:
    import arviz as az
    import nutpie

    compiled = nutpie.compile_pymc_model(_pymc_model(case), backend="numba")
    began = time.perf_counter()
    trace = nutpie.sample(
        compiled,
        draws=job.num_samples,
        tune=job.num_warmup,
        chains=job.chains,
        seed=seed,
        progress_bar=False,
    )
    seconds = time.perf_counter() - began
    print(az.summary(trace))

    def collect() -> Answer:
        stats = trace.sample_stats
        return Answer(
            {name: trace.posterior[name].to_numpy() for name in case.sites},
            int(stats["n_steps"].sum()),
            int(stats["diverging"].sum()),
            seconds,
        )

    return collect


def with_owalnuts(case: Case, job: Job, seed: int) -> Collect:
    """Run owalnuts on the PyMC models, by the transport recommended for speed."""
    import owalnuts

    model = _pymc_model(case)
    target, dim, _, _, unravel = owalnuts.from_pymc(model, gil_free=True)
    result = owalnuts.sample(
        target, dim, chains=job.chains, warmup=job.num_warmup, draws=job.num_samples, seed=seed
    )
    print(result)

    def collect() -> Answer:
        function = model.compile_fn(
            model.unobserved_value_vars, inputs=model.value_vars, point_fn=False
        )
        names = [variable.name for variable in model.unobserved_value_vars]
        shapes = [model.initial_point()[variable.name].shape for variable in model.value_vars]
        chains = []
        for chain in result.samples:
            parts = list(unravel(chain).values())
            found = [
                function(*(p[i].reshape(s) for p, s in zip(parts, shapes, strict=True)))
                for i in range(len(chain))
            ]
            chains.append([np.stack(values) for values in zip(*found, strict=True)])
        draws = dict(zip(names, map(np.stack, zip(*chains, strict=True)), strict=True))
        return Answer(
            {name: draws[name] for name in case.sites},
            result.retained_target_calls,
            result.health()["divergences"],
            result.wall_seconds,
        )

    return collect


#: From a case, a job and a seed.
ANSWERS: dict[str, Callable[[Case, Job, int], Collect]] = {
    "pyroebm": with_pyroebm,
    "numpyro": with_numpyro,
    "blackjax": with_blackjax,
    "nutpie": with_nutpie,
    "owalnuts": with_owalnuts,
    "pyro": with_pyro,
}


def judged(case: Case, samples: Mapping[str, Any]) -> dict[str, float | None]:
    """Return minimum bulk ESS, maximum R-hat, and the largest error of a known mean.

    ESS and R-hat are over all entries that are not constant.
    """
    from pyroebm.diagnostics import ess_bulk, r_hat

    draws = case.join(samples)
    varying = draws[..., np.ptp(draws, axis=(0, 1)) > 0.0]
    found = {
        "min_ess": float(np.min(ess_bulk(varying))),
        "worst_r_hat": float(np.max(r_hat(varying))),
        "worst_z": worst_z(case, draws),
    }
    return {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}


def measured(
    job: dict[str, Any], seed: int, posteriordb: str | None, began: float
) -> dict[str, Any]:
    """Return the results of a run and the library's version.

    Seconds are from ``began`` to the printed table. The share of CPU time in them shows whether
    other programs were running.
    """
    own = Job(**job)
    cases = MODEL_CASES | (posteriordb_cases(Path(posteriordb)) if posteriordb else {})
    case = cases[own.case]
    collect = ANSWERS[own.library](case, own, seed)
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    cpu_share = sum(os.times()[:4]) / seconds
    answer = collect()
    if scale := own.options.get("sampling_scaled_by"):
        seconds += (scale - 1) * answer.sampling_seconds
    metrics = {
        "seconds": seconds,
        "cpu_share": cpu_share,
        "sampling_seconds": answer.sampling_seconds,
        "gradients": answer.gradients,
        "divergences": answer.divergences,
        **judged(case, answer.samples),
    }
    version = importlib.metadata.version(DISTRIBUTIONS.get(own.library, own.library))
    return {"metrics": metrics, "version": version}
