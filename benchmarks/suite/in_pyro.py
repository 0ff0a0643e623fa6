"""The cases as Pyro models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.suite.cases import CONFINEMENT

__all__ = ["MODELS", "tensors"]


def tensors(arguments: tuple[np.ndarray, ...]) -> tuple[Tensor, ...]:
    """Convert a case's arguments to tensors."""
    return tuple(torch.as_tensor(argument) for argument in arguments)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def slopes(group: Tensor, x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
    chol = pyro.sample("chol", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", 15):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    effects = mu + z @ (scales.unsqueeze(-1) * chol).mT
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        mean = effects[group, 0] + effects[group, 1] * x
        pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1], dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ beta), obs=y)


def gp(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    distance = (x.unsqueeze(-1) - x) / length
    kernel = amplitude**2 * torch.exp(-0.5 * distance**2) + (noise**2 + 1e-6) * torch.eye(len(x))
    pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def funnel() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    with pyro.plate("coordinates", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(theta / 2.0)))


def net(*weights: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), CONFINEMENT).to_event(1))
    h = x
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = functional.silu(functional.linear(h, weight, bias))
    pyro.factor("net", -functional.linear(h, *weights[-2:]).squeeze(-1))


# A distribution under mask(False) is Pyro's idiom for a flat prior on its support.
def ark(lags: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def arma(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    means = [mu + phi * mu]
    for last in y[:-1]:
        means.append(mu + phi * last + theta * (last - means[-1]))
    pyro.sample("obs", dist.Normal(torch.stack(means), sigma).to_event(1), obs=y)


def garch(y: Tensor, sigma1: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(1.0).mask(False))
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    pyro.factor("beta1_is_flat", torch.log1p(-alpha1))
    beta1 = share * (1.0 - alpha1)
    variances = [sigma1**2]
    for last in y[:-1]:
        variances.append(alpha0 + alpha1 * (last - mu) ** 2 + beta1 * variances[-1])
    scales = torch.stack(variances).sqrt()
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, scales), obs=y)


def kidscore_iq(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1).mask(False))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def gp_regression(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x.unsqueeze(-1) - x) / rho
    kernel = alpha**2 * torch.exp(-0.5 * distance**2) + sigma * torch.eye(len(x))
    pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def mixture(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.HalfNormal(1.0).mask(False))
    pyro.factor("prior_of_second_mean", dist.Normal(0.0, 2.0).log_prob(mu + gap))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor([2.0, 2.0])).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1.0 - theta]))
    components = dist.Normal(torch.stack([mu, mu + gap]), sigma)
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.MixtureSameFamily(weights, components), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


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
