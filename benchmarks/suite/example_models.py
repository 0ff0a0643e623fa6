"""The models of Pyro's MCMC examples and tutorials, written anew, with their data.

A model whose data Pyro downloads has data of the same form here: the batting averages of Efron and
Morris (1975), or simulated ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.hmm import _sequential_logmatmulexp
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormalizingFlow, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.special import safe_log
from torch import Tensor
from torch.nn import functional

from benchmarks.suite.cases import eight_schools_data

__all__ = ["EXAMPLES", "Example", "Problem"]

Draws = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its arguments, and the options of a run.

    Args:
        model: the model; None where ``kernel`` has a potential.
        args: its arguments.
        kernel: options of NUTS.
        mcmc: options of MCMC.
        quantities: from draws ``(chains, draws, *event)`` to those whose means are compared.
    """

    model: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kernel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mcmc: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantities: Callable[[Draws], Draws] = dict


@dataclasses.dataclass(frozen=True)
class Example:
    """An example of Pyro.

    Args:
        title: as in the docs.
        source: its file in Pyro's repository.
        num_warmup, num_samples: steps of each chain, as in that file.
        make: makes the problem, for a number of chains.
        pyro_part: Pyro draws one of so many samples.
        reduced: what the steps are in that file, where Pyro would take more than five minutes.
    """

    title: str
    source: str
    num_warmup: int
    num_samples: int
    make: Callable[[int], Problem]
    pyro_part: int = 1
    reduced: str = ""


def eight_schools(chains: int) -> Problem:
    y, sigma = (torch.tensor(values, dtype=torch.float32) for values in eight_schools_data())

    def model(sigma: Tensor, y: Tensor) -> None:
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.full((1,), 25.0)).to_event(1))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)

    return Problem(model, (sigma, y))


#: Hits of 18 players in their first 45 times at bat of 1970.
HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)


def _batting() -> tuple[Tensor, Tensor]:
    return torch.full((len(HITS),), 45.0), torch.tensor(HITS, dtype=torch.float32)


def fully_pooled(at_bats: Tensor, hits: Tensor) -> None:
    chance = pyro.sample("chance", dist.Uniform(torch.tensor(0.0), 1.0))
    with pyro.plate("players", len(hits)):
        pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)


def baseball_pooled(chains: int) -> Problem:
    """Run NUTS on a potential that Pyro's ``initialize_model`` makes."""
    data = _batting()
    starts, potential, transforms, _ = initialize_model(
        fully_pooled, model_args=data, num_chains=chains
    )
    options = {"initial_params": starts, "transforms": transforms}
    return Problem(None, data, {"potential_fn": potential}, options)


def baseball_separate(chains: int) -> Problem:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        with pyro.plate("players", len(hits)):
            chance = pyro.sample("chance", dist.Uniform(torch.tensor(0.0), 1.0))
            pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)

    return Problem(model, _batting())


def baseball_partial(chains: int) -> Problem:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        mean = pyro.sample("mean", dist.Uniform(torch.tensor(0.0), 1.0))
        size = pyro.sample("size", dist.Pareto(torch.tensor(1.0), 1.5))
        with pyro.plate("players", len(hits)):
            chance = pyro.sample("chance", dist.Beta(mean * size, (1.0 - mean) * size))
            pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)

    # the variance of the size itself is infinite
    return Problem(model, _batting(), quantities=lambda d: {**d, "size": d["size"].log()})


def baseball_logit(chains: int) -> Problem:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor(-1.0), 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(1.0)))
        with pyro.plate("players", len(hits)):
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            pyro.sample("hits", dist.Binomial(at_bats, logits=alpha), obs=hits)

    return Problem(model, _batting(), quantities=lambda d: {**d, "scale": d["scale"].log()})


def lkj(chains: int) -> Problem:
    def model(y: Tensor) -> None:
        variance = pyro.sample(
            "variance", dist.HalfCauchy(torch.ones(5, dtype=torch.float64)).to_event(1)
        )
        factor = pyro.sample("factor", dist.LKJCholesky(5, torch.ones((), dtype=torch.float64)))
        scale_tril = variance.sqrt().unsqueeze(-1) * factor
        with pyro.plate("observations", len(y)):
            normal = dist.MultivariateNormal(y.new_zeros(5), scale_tril=scale_tril)
            pyro.sample("obs", normal, obs=y)

    y = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Problem(model, (y,), {"step_size": 1e-5})


class Banana(dist.TorchDistribution):
    """The density of (a u, v / a + b (u^2 + a^2)) for correlated standard normal u and v."""

    arg_constraints: Mapping[str, Any] = {}
    support = dist.constraints.real_vector

    def __init__(self, a: float, b: float, correlation: float = 0.9) -> None:
        self.a, self.b = a, b
        covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
        self.normal = dist.MultivariateNormal(torch.zeros(2), covariance)
        super().__init__(event_shape=torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        u, v = self.normal.sample(sample_shape).unbind(-1)
        return torch.stack([self.a * u, v / self.a + self.b * (u**2 + self.a**2)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        u = value[..., 0] / self.a
        v = self.a * (value[..., 1] - self.b * (u**2 + self.a**2))
        return self.normal.log_prob(torch.stack([u, v], -1))


def banana() -> None:
    pyro.sample("x", Banana(1.15, 1.0))


def banana_plain(chains: int) -> Problem:
    return Problem(banana)


def neutra(chains: int) -> Problem:
    """Run NUTS in the coordinates of a flow that is trained before the clock starts."""
    flow = functools.partial(dist.transforms.iterated, 1, dist.transforms.block_autoregressive)
    guide = AutoNormalizingFlow(banana, flow)
    pyro.clear_param_store()
    svi = SVI(banana, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=1))
    for _ in range(2000):
        svi.step()
    reparam = NeuTraReparam(guide.requires_grad_(False))

    def quantities(draws: Draws) -> Draws:
        with torch.no_grad():
            return reparam.transform_sample(draws["x_shared_latent"])

    return Problem(poutine.reparam(banana, config=lambda _: reparam), quantities=quantities)


#: Numbers of people and days, days to recovery, and the parameters of the simulation.
POPULATION = DAYS = 10
RECOVERY = 7.0
R0, RESPONSE = 1.5, 0.5


def _epidemic() -> Tensor:
    """Simulate reported cases, until there are 3."""
    generator = np.random.default_rng(0)
    while True:
        susceptible, infected = POPULATION - 1, 1
        reports: list[int] = []
        for _ in range(DAYS):
            rate = R0 * infected / (RECOVERY * POPULATION)
            new = generator.binomial(susceptible, -math.expm1(-rate))
            recovered = generator.binomial(infected, 1.0 / (1.0 + RECOVERY))
            susceptible, infected = susceptible - new, infected + new - recovered
            reports.append(generator.binomial(new, RESPONSE))
        if sum(reports) >= 3:
            return torch.tensor(reports, dtype=torch.float32)


def _nearest_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return four integers near x, in their range, and their weights by a cubic spline."""
    low = x.detach().floor()
    s = x - low
    t = 1.0 - s
    weights = torch.stack(
        [t**3, 4.0 + s * s * (3.0 * s - 6.0), 4.0 + t * t * (3.0 * t - 6.0), s**3], -1
    )
    near = low.unsqueeze(-1) + torch.arange(-1.0, 3.0)
    near = torch.max(near, -1.0 - near)
    return torch.min(near, 2.0 * POPULATION + 1.0 - near), safe_log(weights / 6.0)


def sir(reports: Tensor) -> None:
    """An SIR epidemic whose discrete states are summed out by hand."""
    r0 = pyro.sample("r0", dist.LogNormal(0.0, 1.0))
    response = pyro.sample("response", dist.Uniform(0.0, 1.0))
    flat = dist.Uniform(-0.5, POPULATION + 0.5).mask(False).expand(reports.shape).to_event(1)
    s_now, s_weight = _nearest_integers(pyro.sample("s", flat))
    i_now, i_weight = _nearest_integers(pyro.sample("i", flat))
    s_last = functional.pad(s_now[:-1], (0, 0, 1, 0), value=POPULATION - 1.0)
    i_last = functional.pad(i_now[:-1], (0, 0, 1, 0), value=1.0)
    # dimensions: day, s and i of the day before, s and i of the day
    s_last, i_last = s_last[:, :, None, None, None], i_last[:, None, :, None, None]
    s_now, s_weight = (part[:, None, None, :, None] for part in (s_now, s_weight))
    i_now, i_weight = (part[:, None, None, None, :] for part in (i_now, i_weight))
    new = s_last - s_now
    risk = -torch.expm1(-r0 * i_last / (RECOVERY * POPULATION))
    log_prob = (
        s_weight
        + i_weight
        + dist.ExtendedBinomial(s_last, risk).log_prob(new)
        + dist.ExtendedBinomial(i_last, 1.0 / (1.0 + RECOVERY)).log_prob(i_last - i_now + new)
        + dist.ExtendedBinomial(new, response).log_prob(reports[:, None, None, None, None])
    )
    steps = _sequential_logmatmulexp(log_prob.reshape(-1, 16, 16))
    pyro.factor("reports", steps.reshape(-1).logsumexp(0) - math.log(4.0))


def sir_hmc(chains: int) -> Problem:
    reports = _epidemic()
    left = POPULATION - 1.0
    new = reports * min(2.0, math.sqrt(left / float(reports.sum())))
    susceptible = (left - new.cumsum(0)).clamp(min=0.5)
    new[0] += 1.0
    days = torch.arange(DAYS)
    infectious = torch.exp(-(days[:, None] - days) / RECOVERY).tril() @ new
    starts = {
        "r0": torch.tensor(2.0),
        "response": torch.tensor(0.5),
        "s": susceptible,
        "i": infectious.clamp(0.5, POPULATION),
    }
    options = {
        "full_mass": [("r0", "response")],
        "max_tree_depth": 5,
        "init_strategy": init_to_value(values=starts),
    }
    return Problem(
        sir,
        (reports,),
        options,
        quantities=lambda d: {"r0": d["r0"].log(), "response": d["response"]},
    )


@config_enumerate
def mixture(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[label], scale), obs=data)


def gmm(chains: int) -> Problem:
    # invariant under an exchange of the components
    return Problem(
        mixture,
        (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),),
        quantities=lambda d: {"locs": d["locs"].sort(-1).values, "scale": d["scale"].log()},
    )


def regression(chains: int) -> Problem:
    """Log GDP of 170 nations, given ruggedness and continent: simulated."""

    def model(africa: Tensor, rugged: Tensor, log_gdp: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("b_a", "b_r", "b_ar")]
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = a + b[0] * africa + b[1] * rugged + b[2] * africa * rugged
        with pyro.plate("data", len(log_gdp)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)

    generator = torch.Generator().manual_seed(0)
    africa = (torch.rand(170, generator=generator) < 0.29).float()
    rugged = torch.rand(170, generator=generator).log().neg() * 1.3
    noise = 0.95 * torch.randn(170, generator=generator)
    log_gdp = 9.2 - 1.9 * africa - 0.2 * rugged + 0.35 * africa * rugged + noise
    return Problem(model, (africa, rugged, log_gdp))


def counts(chains: int) -> Problem:
    """Counts that grow with a feature, simulated; the rate is a deterministic site."""

    def model(features: Tensor, counts: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        coef = pyro.sample("coef", dist.Normal(0.0, scale).expand([features.shape[1]]).to_event(1))
        rate = pyro.deterministic("rate", functional.softplus(coef @ features.T))
        concentration = pyro.sample("concentration", dist.LogNormal(0.0, 1.0))
        with pyro.plate("bins", len(features)):
            pyro.sample("counts", dist.GammaPoisson(concentration, rate), obs=counts)

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 1, generator=generator)
    y = 150.0 + 35.0 * features[:, 0] + 5.0 * torch.randn(100, generator=generator)
    return Problem(model, (features, (y**3 / 1e5 + 10.0).round().clamp(min=0.0)))


#: How often each face of a die was thrown, of 30 throws.
THROWS = (2, 1, 9, 1, 14, 3)


def die_counts(chains: int) -> Problem:
    def model(counts: Tensor) -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(6)))
        pyro.sample("counts", dist.Multinomial(int(counts.sum()), theta), obs=counts)

    return Problem(model, (torch.tensor(THROWS, dtype=torch.float32),))


def die_throws(chains: int) -> Problem:
    def model(throws: Tensor) -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(6)))
        with pyro.plate("throws", len(throws)):
            pyro.sample("face", dist.Categorical(theta), obs=throws)

    return Problem(model, (torch.arange(6).repeat_interleave(torch.tensor(THROWS)),))


EXAMPLES: dict[str, Example] = {
    "eight_schools": Example(
        "eight schools", "examples/eight_schools/mcmc.py", 1000, 1000, eight_schools, pyro_part=4
    ),
    "baseball_pooled": Example(
        "baseball, pooled (a potential)", "examples/baseball.py", 100, 200, baseball_pooled
    ),
    "baseball_separate": Example(
        "baseball, not pooled", "examples/baseball.py", 100, 200, baseball_separate
    ),
    "baseball_partial": Example(
        "baseball, partially pooled", "examples/baseball.py", 100, 200, baseball_partial
    ),
    "baseball_logit": Example(
        "baseball, pooled logits", "examples/baseball.py", 100, 200, baseball_logit
    ),
    "lkj": Example("LKJ prior, 500 x 5 data", "examples/lkj.py", 100, 200, lkj),
    "banana": Example(
        "NeuTra: the plain model", "examples/neutra.py", 500, 1000, banana_plain, pyro_part=4
    ),
    "neutra": Example("NeuTra: a BNAF guide", "examples/neutra.py", 500, 1000, neutra, pyro_part=4),
    "sir_hmc": Example("SIR, summed out by hand", "examples/sir_hmc.py", 100, 200, sir_hmc),
    "gmm": Example("Gaussian mixture, enumerated", "tutorial/source/gmm.ipynb", 50, 250, gmm),
    "regression": Example(
        "Bayesian regression",
        "tutorial/source/bayesian_regression_ii.ipynb",
        200,
        1000,
        regression,
        pyro_part=4,
    ),
    "counts": Example(
        "GammaPoisson regression",
        "tutorial/source/predictive_deterministic.ipynb",
        100,
        100,
        counts,
        reduced="500 + 500",
    ),
    "die_counts": Example(
        "die, multinomial", "tutorial/source/prodlda.ipynb", 200, 1000, die_counts, pyro_part=4
    ),
    "die_throws": Example(
        "die, categorical", "tutorial/source/prodlda.ipynb", 200, 1000, die_throws, pyro_part=4
    ),
}
