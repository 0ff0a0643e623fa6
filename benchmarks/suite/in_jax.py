"""The cases as log densities in JAX, float64 (JAX_ENABLE_X64=1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite import cases

__all__ = ["constrain", "log_density"]

Array = Any


def _normal(x: Array) -> Array:
    return -0.5 * jnp.sum((x / cases.SCALES) ** 2)


def _funnel(x: Array) -> Array:
    theta, rest = x[0], x[1:]
    return -0.5 * (theta**2 / 9.0 + jnp.sum(rest**2) * jnp.exp(-theta) + rest.shape[0] * theta)


def _net(x: Array) -> Array:
    h, layers = x, cases.net_weights()
    for k, (weight, bias) in enumerate(layers):
        h = weight @ h + bias
        h = jax.nn.silu(h) if k + 1 < len(layers) else h
    return -(h[0] + 0.5 * jnp.sum(x**2) / cases.CONFINEMENT**2)


def _eight_schools(x: Array) -> Array:
    y, sigma = cases.eight_schools_data()
    mu = x[0]
    log_tau = x[1]
    eta = x[2:]
    tau = jnp.exp(log_tau)
    prior = -0.5 * (mu / 5.0) ** 2 - jnp.log1p((tau / 5.0) ** 2) + log_tau - 0.5 * jnp.sum(eta**2)
    return prior - 0.5 * jnp.sum(((y - mu - tau * eta) / sigma) ** 2)


def _logistic(beta: Array) -> Array:
    x, y = cases.logistic_data()
    logits = x @ beta
    return jnp.sum(y * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(beta**2)


def log_density(name: str) -> Callable[[Array], Array]:
    """Return a case's unnormalized log density of unconstrained states, ``(dim,) -> ()``."""
    return {
        "normal": _normal,
        "funnel": _funnel,
        "net": _net,
        "eight_schools": _eight_schools,
        "logistic": _logistic,
    }[name]


def constrain(name: str, draws: np.ndarray) -> np.ndarray:
    """Map draws of :func:`log_density` to the coordinates of the case."""
    if name != "eight_schools":
        return draws
    return np.concatenate([draws[..., :1], np.exp(draws[..., 1:2]), draws[..., 2:]], axis=-1)
