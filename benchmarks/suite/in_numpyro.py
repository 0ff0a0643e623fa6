"""The cases as NumPyro models: those of benchmarks.suite.in_pyro, with recursions as scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from benchmarks.suite.cases import CONFINEMENT

__all__ = ["MODELS"]

Array = Any


def eight_schools(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def slopes(group: Array, x: Array, y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 5.0).to_event(1))
    scales = numpyro.sample("scales", dist.HalfNormal(jnp.ones(2)).to_event(1))
    chol = numpyro.sample("chol", dist.LKJCholesky(2, 2.0))
    with numpyro.plate("groups", 15):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    effects = mu + z @ (scales[:, None] * chol).T
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(y)):
        mean = effects[group, 0] + effects[group, 1] * x
        numpyro.sample("obs", dist.Normal(mean, noise), obs=y)


def logistic(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Bernoulli(logits=x @ beta), obs=y)


def gp(x: Array, y: Array) -> None:
    length = numpyro.sample("length", dist.LogNormal(0.0, 1.0))
    amplitude = numpyro.sample("amplitude", dist.HalfNormal(2.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / length
    kernel = amplitude**2 * jnp.exp(-0.5 * distance**2) + (noise**2 + 1e-6) * jnp.eye(len(x))
    numpyro.sample("obs", dist.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=y)


def funnel() -> None:
    theta = numpyro.sample("theta", dist.Normal(0.0, 3.0))
    with numpyro.plate("coordinates", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(theta / 2.0)))


def net(*weights: Array) -> None:
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), CONFINEMENT).to_event(1))
    h = x
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = jax.nn.silu(weight @ h + bias)
    weight, bias = weights[-2:]
    numpyro.factor("net", -(weight @ h + bias)[0])


# A distribution under mask(False) is a flat prior on its support.
def ark(lags: Array, y: Array) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def arma(y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def advance(mean: Array, last: Array) -> tuple[Array, Array]:
        mean = mu + phi * last + theta * (last - mean)
        return mean, mean

    first = mu + phi * mu
    means = jnp.append(first, jax.lax.scan(advance, first, y[:-1])[1])
    numpyro.sample("obs", dist.Normal(means, sigma).to_event(1), obs=y)


def garch(y: Array, sigma1: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    alpha0 = numpyro.sample("alpha0", dist.HalfNormal(1.0).mask(False))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    numpyro.factor("beta1_is_flat", jnp.log1p(-alpha1))
    beta1 = share * (1.0 - alpha1)

    def advance(variance: Array, last: Array) -> tuple[Array, Array]:
        variance = alpha0 + alpha1 * (last - mu) ** 2 + beta1 * variance
        return variance, variance

    first = jnp.asarray(sigma1**2)
    variances = jnp.append(first, jax.lax.scan(advance, first, y[:-1])[1])
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(mu, jnp.sqrt(variances)), obs=y)


def kidscore_iq(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 1.0).to_event(1).mask(False))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def flat_regression(x: Array, y: Array) -> None:
    prior = dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1)
    beta = numpyro.sample("beta", prior.mask(False))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0).mask(False))
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def gp_regression(x: Array, y: Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / rho
    kernel = alpha**2 * jnp.exp(-0.5 * distance**2) + sigma * jnp.eye(len(x))
    numpyro.sample("obs", dist.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=y)


def mixture(y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    gap = numpyro.sample("gap", dist.HalfNormal(1.0).mask(False))
    numpyro.factor("prior_of_second_mean", dist.Normal(0.0, 2.0).log_prob(mu + gap))
    sigma = numpyro.sample("sigma", dist.HalfNormal(jnp.array([2.0, 2.0])).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1.0 - theta]))
    components = dist.Normal(jnp.stack([mu, mu + gap]), sigma)
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.MixtureSameFamily(weights, components), obs=y)


def blr(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


#: Each is called with the arguments of its case.
MODELS: dict[str, Callable[..., None]] = {
    "eight_schools": eight_schools,
    "slopes": slopes,
    "logistic": logistic,
    "gp": gp,
    "funnel": funnel,
    "net": net,
    "ark": ark,
    "arma": arma,
    "garch": garch,
    "kidscore_iq": kidscore_iq,
    "kidscore_interaction": flat_regression,
    "gp_regression": gp_regression,
    "mixture": mixture,
    "blr": blr,
    "earnings": flat_regression,
}
