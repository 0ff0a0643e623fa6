"""NumPyro's NUTS at its defaults: one chain, or a batch (chain method `vectorized`).

The kernel is called as in NumPyro's `MCMC`, from a compiled loop: `MCMC.run` compiles again at each
call, so repeated runs would include compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpyro.infer import NUTS
from numpyro.infer.util import initialize_model

from benchmarks.suite.cases import Case
from benchmarks.suite.in_jax import log_density
from benchmarks.suite.in_numpyro import MODELS
from benchmarks.suite.measure import Job, Run

COMPILES = True


def sampler(job: Job, case: Case) -> Callable[[int], Run]:
    """Return a function from a seed to a run.

    A model is traced once, so later runs do not include tracing.
    """
    constrain: Callable[[Any], Any] = lambda z: z  # noqa: E731
    if case.arguments is not None:
        info = initialize_model(
            jax.random.key(0),
            MODELS[case.name],
            model_args=case.arguments(),
            dynamic_args=False,
        )
        potential, constrain = info.potential_fn, jax.jit(jax.vmap(jax.vmap(info.postprocess_fn)))
    else:
        density = log_density(case.name)

        def potential(z: dict[str, Any]) -> Any:
            return -density(z["x"])

    kernel = NUTS(potential_fn=potential)

    def warm_up(key: Any, starts: dict[str, Any]) -> Any:
        # a batch of keys makes the kernel a batch of chains
        keys = jax.random.split(key, job.chains) if job.chains > 1 else key
        state = kernel.init(keys, job.num_warmup, starts)
        return jax.lax.fori_loop(
            0, job.num_warmup, lambda _, state: kernel.sample(state, (), {}), state
        )

    def draw(state: Any) -> Any:
        def body(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        return jax.lax.scan(body, state, length=job.num_samples)[1]

    warm_up, draw = jax.jit(warm_up), jax.jit(draw)

    def run(seed: int) -> Run:
        starts = case.split(case.starts(job.chains, seed))
        starts = jax.device_put(starts if job.chains > 1 else {n: v[0] for n, v in starts.items()})
        jax.block_until_ready(starts)
        begin = time.perf_counter()
        state = jax.block_until_ready(warm_up(jax.random.PRNGKey(seed), starts))
        warm = time.perf_counter()
        z, steps = jax.block_until_ready(draw(state))
        end = time.perf_counter()
        samples = constrain(
            {n: v[None] if job.chains == 1 else v.swapaxes(0, 1) for n, v in z.items()}
        )
        return Run(case.join(samples), warm - begin, end - warm, int(np.asarray(steps).sum()))

    return run
