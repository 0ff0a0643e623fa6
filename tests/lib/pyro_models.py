"""Pyro models with known posteriors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor


def nested_support() -> None:
    """Define a model in which the support of one latent variable depends on another one.

    Pyro's potential takes the support from one trace, and is wrong elsewhere.
    """
    top = pyro.sample("top", dist.Gamma(2.0, 1.0))
    pyro.sample("below", dist.Uniform(0.0, top))


SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


EFFECT = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)
