"""The cases as PyMC models: those of benchmarks.suite.in_pyro.

The two time series with recursions, `arma` and `garch`, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from benchmarks.suite.cases import CONFINEMENT

__all__ = ["MODELS"]

Array = np.ndarray


def eight_schools(y: Array, sigma: Array) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    eta = pm.Normal("eta", 0.0, 1.0, shape=8)
    pm.Normal("obs", mu + tau * eta, sigma, observed=y)


def slopes(group: Array, x: Array, y: Array) -> None:
    mu = pm.Normal("mu", 0.0, 5.0, shape=2)
    # PyMC's own coordinates of the same prior: the Cholesky factor of the covariance
    factor, _, scales = pm.LKJCholeskyCov("factor", n=2, eta=2.0, sd_dist=pm.HalfNormal.dist(1.0))
    pm.Deterministic("scales", scales)
    pm.Deterministic("chol", factor / scales[:, None])
    z = pm.Normal("z", 0.0, 1.0, shape=(15, 2))
    effects = mu + z @ factor.T
    noise = pm.HalfNormal("noise", 1.0)
    pm.Normal("obs", effects[group, 0] + effects[group, 1] * x, noise, observed=y)


def logistic(x: Array, y: Array) -> None:
    beta = pm.Normal("beta", 0.0, 1.0, shape=x.shape[1])
    pm.Bernoulli("obs", logit_p=x @ beta, observed=y)


def _curve(distance: Any, amplitude: Any, noise_variance: Any, y: Array) -> None:
    kernel = amplitude**2 * pt.exp(-0.5 * distance**2) + noise_variance * pt.eye(len(y))
    pm.MvNormal("obs", np.zeros(len(y)), cov=kernel, observed=y)


def gp(x: Array, y: Array) -> None:
    length = pm.LogNormal("length", 0.0, 1.0)
    amplitude = pm.HalfNormal("amplitude", 2.0)
    noise = pm.HalfNormal("noise", 1.0)
    _curve((x[:, None] - x) / length, amplitude, noise**2 + 1e-6, y)


def funnel() -> None:
    theta = pm.Normal("theta", 0.0, 3.0)
    pm.Normal("x", 0.0, pt.exp(theta / 2.0), shape=9)


def net(*weights: Array) -> None:
    x = pm.Normal("x", 0.0, CONFINEMENT, shape=2)
    h = x
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = pt.dot(weight, h) + bias
        h = h * pt.sigmoid(h)
    weight, bias = weights[-2:]
    pm.Potential("net", -(pt.dot(weight, h) + bias)[0])


def ark(lags: Array, y: Array) -> None:
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=lags.shape[1])
    sigma = pm.HalfCauchy("sigma", 2.5)
    pm.Normal("obs", alpha + lags @ beta, sigma, observed=y)


def kidscore_iq(x: Array, y: Array) -> None:
    beta = pm.Flat("beta", shape=2)
    sigma = pm.HalfCauchy("sigma", 2.5)
    pm.Normal("obs", x @ beta, sigma, observed=y)


def flat_regression(x: Array, y: Array) -> None:
    beta = pm.Flat("beta", shape=x.shape[1])
    sigma = pm.HalfFlat("sigma")
    pm.Normal("obs", x @ beta, sigma, observed=y)


def gp_regression(x: Array, y: Array) -> None:
    rho = pm.Gamma("rho", 25.0, 4.0)
    alpha = pm.HalfNormal("alpha", 2.0)
    sigma = pm.HalfNormal("sigma", 1.0)
    _curve((x[:, None] - x) / rho, alpha, sigma, y)


def mixture(y: Array) -> None:
    mu = pm.Normal("mu", 0.0, 2.0)
    gap = pm.HalfFlat("gap")
    pm.Potential("prior_of_second_mean", pm.logp(pm.Normal.dist(0.0, 2.0), mu + gap))
    sigma = pm.HalfNormal("sigma", 2.0, shape=2)
    theta = pm.Beta("theta", 5.0, 5.0)
    weights, means = pt.stack([theta, 1.0 - theta]), pt.stack([mu, mu + gap])
    pm.NormalMixture("obs", weights, means, sigma, observed=y)


def blr(x: Array, y: Array) -> None:
    beta = pm.Normal("beta", 0.0, 10.0, shape=x.shape[1])
    sigma = pm.HalfNormal("sigma", 10.0)
    pm.Normal("obs", x @ beta, sigma, observed=y)


#: Each is called with the arguments of its case, within a `pm.Model`.
MODELS: dict[str, Callable[..., None]] = {
    "eight_schools": eight_schools,
    "slopes": slopes,
    "logistic": logistic,
    "gp": gp,
    "funnel": funnel,
    "net": net,
    "ark": ark,
    "kidscore_iq": kidscore_iq,
    "kidscore_interaction": flat_regression,
    "gp_regression": gp_regression,
    "mixture": mixture,
    "blr": blr,
    "earnings": flat_regression,
}
