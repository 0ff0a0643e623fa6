"""BlackJAX: NUTS with window adaptation for each chain, and ChEES with its diagonal metric.

All chains run in one `scan`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import numpy as np
import optax

from benchmarks.suite.cases import Case
from benchmarks.suite.in_jax import constrain, log_density
from benchmarks.suite.measure import Job, Run

COMPILES = True
Array = Any


def _discard(*_: Any) -> None:
    """Drop the record of the warm-up."""


def _nuts(job: Job, density: Callable[[Array], Array]) -> tuple[Callable, Callable]:
    adaptation = blackjax.window_adaptation(blackjax.nuts, density, adaptation_info_fn=_discard)

    def warm_up(key: Array, starts: Array) -> tuple[Any, Any]:
        def one(key: Array, start: Array) -> tuple[Any, Any]:
            (state, parameters), _ = adaptation.run(key, start, num_steps=job.num_warmup)
            return state, parameters

        return jax.vmap(one)(jax.random.split(key, job.chains), starts)

    def step(keys: Array, states: Any, parameters: Any) -> tuple[Any, Any]:
        return jax.vmap(lambda k, s, p: blackjax.nuts(density, **p).step(k, s))(
            keys, states, parameters
        )

    return warm_up, step


def _chees(job: Job, density: Callable[[Array], Array]) -> tuple[Callable, Callable]:
    adaptation = blackjax.chees_adaptation(
        density, job.chains, adaptation_info_fn=_discard, mass_matrix_estimation="diagonal"
    )
    # parameters that are functions cannot leave a compiled block; they depend on no data
    functions: dict[str, Callable] = {}

    def warm_up(key: Array, starts: Array) -> tuple[Any, Any]:
        # The step size and Adam's rate of BlackJAX's own examples.
        (states, parameters), _ = adaptation.run(
            key, starts, 0.1, optax.adam(0.02), job.num_warmup, max_sampling_steps=job.num_samples
        )
        functions.update({k: v for k, v in parameters.items() if callable(v)})
        return states, {k: v for k, v in parameters.items() if not callable(v)}

    def step(keys: Array, states: Any, parameters: Any) -> tuple[Any, Any]:
        return jax.vmap(blackjax.dhmc(density, **functions, **parameters).step)(keys, states)

    return warm_up, step


def phases(job: Job, density: Callable[[Any], Array]) -> tuple[Callable, Callable]:
    """Return the compiled functions of warm-up and sampling.

    Warm-up takes a key and starts ``(chains, ...)``. Sampling takes a key and the result of
    warm-up, and returns draws ``(draws, chains, ...)`` with their numbers of gradients and
    divergences.
    """
    warm_up, step = {"NUTS": _nuts, "ChEES": _chees}[job.method](job, density)

    def draw(key: Array, states: Any, parameters: Any) -> tuple[Any, Array, Array]:
        def body(states: Any, key: Array) -> tuple[Any, tuple[Any, Array, Array]]:
            states, info = step(jax.random.split(key, job.chains), states, parameters)
            return states, (states.position, info.num_integration_steps, info.is_divergent)

        return jax.lax.scan(body, states, jax.random.split(key, job.num_samples))[1]

    return jax.jit(warm_up), jax.jit(draw)


def sampler(job: Job, case: Case) -> Callable[[int], Run]:
    """Return a function from a seed to a run."""
    warm_up, draw = phases(job, log_density(case.name))

    def run(seed: int) -> Run:
        warm_key, key = jax.random.split(jax.random.key(seed))
        starts = jax.block_until_ready(jax.device_put(case.starts(job.chains, seed)))
        begin = time.perf_counter()
        states, parameters = jax.block_until_ready(warm_up(warm_key, starts))
        warm = time.perf_counter()
        positions, steps, _ = jax.block_until_ready(draw(key, states, parameters))
        end = time.perf_counter()
        draws = constrain(case.name, np.asarray(positions).swapaxes(0, 1))
        return Run(draws, warm - begin, end - warm, int(np.asarray(steps).sum()))

    return run
