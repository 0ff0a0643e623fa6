"""Pyro's names and arguments over our core: exact posteriors, and Pyro's documented behaviour where
its code has another."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions.transforms import ExpTransform

import pyroebm
from pyroebm.core.statistics import mcse_mean
from pyroebm.infer import HMC, MCMC, NUTS

pytestmark = pytest.mark.usefixtures("float64")


def draws_of(
    kernel: NUTS | HMC,
    *args: Any,
    chains: int = 96,
    warmup: int = 60,
    samples: int = 40,
    seed: int = 0,
    **options: Any,
):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def check_moments(mcmc: MCMC, truth: dict[str, tuple[Any, Any]]) -> None:
    """Means and second moments of every site, within five standard errors."""
    for site, (mean, second) in truth.items():
        x = mcmc.get_samples(group_by_chain=True)[site]
        for draws, moment in ((x, mean), (x**2, second)):
            means = draws.mean(1)  # of chains, which are independent
            within_se(means.mean(0), moment, means.std(0) / len(means) ** 0.5, what=site)


# A chain of normals z1 -> z2 -> ... -> zN -> data, with unit variances: Pyro's yardstick, all of
# its sizes


def gaussian_chain(data: Tensor, length: int, weight: float) -> None:
    z = torch.zeros(data.shape[1])
    for i in range(1, length + 1):
        z = pyro.sample(f"z{i}", dist.Normal(z, 1.0).to_event(1))
    # equal data are few, counted often
    with pyro.plate("data", len(data)), poutine.scale(scale=weight):
        pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=data)


def chain_posterior(length: int, num_obs: int) -> tuple[Tensor, Tensor]:
    """Means and variances: the precision is tridiagonal, and all data are 1."""
    precision = (
        2.0 * torch.eye(length)
        - torch.diag(torch.ones(length - 1), 1)
        - torch.diag(torch.ones(length - 1), -1)
    )
    precision[-1, -1] = 1.0 + num_obs
    covariance = torch.linalg.inv(precision)
    return num_obs * covariance[:, -1], covariance.diagonal()


@pytest.mark.parametrize(
    ("dim", "length", "num_obs", "tabulated"),
    [
        (10, 3, 1, ([0.25, 0.50, 0.75], [1.33, 1.0, 1.33])),
        (10, 4, 1, ([0.20, 0.40, 0.60, 0.80], [1.25, 0.83, 0.83, 1.25])),
        (5, 2, 10_000, ([0.5, 1.0], [2.0, 10_000.0])),
        (
            5,
            9,
            1,
            (
                [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
                [1.11, 0.63, 0.48, 0.42, 0.4, 0.42, 0.48, 0.63, 1.11],
            ),
        ),
    ],
)
@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_gaussian_chains(
    kernel: type[NUTS | HMC], dim: int, length: int, num_obs: int, tabulated: tuple[list, list]
) -> None:
    mean, variance = chain_posterior(length, num_obs)
    torch.testing.assert_close(mean, torch.tensor(tabulated[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(1 / variance, torch.tensor(tabulated[1]), atol=0.006, rtol=1e-3)
    settings = {"trajectory_length": 2.0} if kernel is HMC else {}
    data = torch.ones(min(num_obs, 10), dim)
    mcmc = draws_of(kernel(gaussian_chain, **settings), data, length, num_obs / len(data))
    samples = mcmc.get_samples(group_by_chain=True)
    for i in range(length):
        x = samples[f"z{i + 1}"]
        within_se(x.mean((0, 1)), mean[i].expand(dim), mcse_mean(x), what=f"mean of z{i + 1}")
        squares = (x - mean[i]) ** 2
        within_se(
            squares.mean((0, 1)),
            variance[i].expand(dim),
            mcse_mean(squares),
            what=f"variance of z{i + 1}",
        )


# Posteriors known in closed form, or by quadrature


def beta_bernoulli(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(torch.tensor([1.1, 2.0]), torch.tensor([1.1, 1.0])).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p).to_event(1), obs=y)


def beta_binomial(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    pyro.sample("y", dist.Binomial(10, p), obs=y)


def normal_gamma(y: Tensor) -> None:
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, (2.0 * precision).rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)


def gamma_poisson(y: Tensor) -> None:
    with pyro.plate("rates", 2):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def dirichlet_categorical(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 1.0, 2.0])))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


RATES = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)


def simplex_bernoulli(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 1.0, 1.5])))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(weights @ RATES), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    offset, slope = (
        pyro.sample("offset", dist.Normal(0.0, 2.0)),
        pyro.sample("slope", dist.Normal(0.0, 1.0)),
    )
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=offset + slope * x), obs=y)


def of_beta(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    mean = a / (a + b)
    return mean, mean * (a + 1) / (a + b + 1)


def by_grid(
    log_density: Tensor, coordinates: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments by summing over a fine grid."""
    weight = torch.softmax(log_density.flatten(), 0)
    moments = {}
    for name, x in coordinates.items():
        x = x.reshape(len(weight), -1).squeeze(-1)
        w = weight if x.dim() == 1 else weight[:, None]
        moments[name] = ((w * x).sum(0), (w * x**2).sum(0))
    return moments


def beta_bernoulli_case() -> tuple[tuple[Tensor, ...], dict]:
    y = torch.tensor([[1.0, 0.0]] * 7 + [[0.0, 1.0]] * 3 + [[1.0, 1.0]] * 4)
    return (y,), {
        "p": of_beta(torch.tensor([1.1, 2.0]) + y.sum(0), torch.tensor([1.1, 1.0]) + (1 - y).sum(0))
    }


def beta_binomial_case() -> tuple[tuple[Tensor, ...], dict]:
    return (torch.tensor(7.0),), {"p": of_beta(torch.tensor(9.0), torch.tensor(6.0))}


def normal_gamma_case() -> tuple[tuple[Tensor, ...], dict]:
    y = torch.tensor([0.5, 1.5, 2.0, -0.5, 1.0])
    n = len(y)
    k = 2.0 + len(y)
    shape = torch.tensor(2.0 + len(y) / 2)
    rate = 1.0 + ((y - y.mean()) ** 2).sum() / 2 + 2.0 * n * y.mean() ** 2 / (2 * k)
    mean = n * y.mean() / k
    return (y,), {
        "precision": (shape / rate, shape * (shape + 1) / rate**2),
        "mean": (mean, mean**2 + rate / (k * (shape - 1))),
    }


def gamma_poisson_case() -> tuple[tuple[Tensor, ...], dict]:
    y = torch.tensor([[1.0, 4.0], [0.0, 7.0], [3.0, 5.0]])
    shape, rate = 1.0 + y.sum(0), 1.0 + len(y)
    return (y,), {"rate": (shape / rate, shape * (shape + 1) / rate**2)}


def dirichlet_categorical_case() -> tuple[tuple[Tensor, ...], dict]:
    y = torch.tensor([0, 0, 1, 2, 2, 2, 2, 1, 0, 2])
    a = torch.tensor([1.0, 1.0, 2.0]) + torch.bincount(y, minlength=3)
    return (y,), {"p": of_beta(a, a.sum() - a)}


def simplex_bernoulli_case() -> tuple[tuple[Tensor, ...], dict]:
    y = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    middle = (torch.arange(800) + 0.5) / 800
    a, b = torch.meshgrid(middle, middle, indexing="ij")
    weights = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1)
    log_density = dist.Dirichlet(torch.tensor([2.0, 1.0, 1.5])).log_prob(weights) + torch.log(1 - a)
    p = weights @ RATES
    return (y,), by_grid(
        log_density + y.sum() * p.log() + (1 - y).sum() * (1 - p).log(), {"weights": weights}
    )


def logistic_case() -> tuple[tuple[Tensor, ...], dict]:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.3, 0.8, 1.5, 2.0])
    y = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    offset, slope = torch.meshgrid(
        torch.linspace(-8, 8, 401), torch.linspace(-4, 7, 401), indexing="ij"
    )
    log_density = (
        -(offset**2) / 8
        - slope**2 / 2
        + dist.Bernoulli(logits=offset[..., None] + slope[..., None] * x).log_prob(y).sum(-1)
    )
    return (x, y), by_grid(log_density, {"offset": offset, "slope": slope})


CASES: dict[str, tuple[Callable[..., None], Callable[[], tuple[tuple[Tensor, ...], dict]]]] = {
    "beta_bernoulli": (beta_bernoulli, beta_bernoulli_case),
    "beta_binomial": (beta_binomial, beta_binomial_case),
    "normal_gamma": (normal_gamma, normal_gamma_case),
    "gamma_poisson": (gamma_poisson, gamma_poisson_case),
    "dirichlet_categorical": (dirichlet_categorical, dirichlet_categorical_case),
    "simplex_bernoulli": (simplex_bernoulli, simplex_bernoulli_case),
    "logistic": (logistic, logistic_case),
}


@pytest.mark.parametrize("name", CASES)
def test_posteriors(name: str) -> None:
    model, case = CASES[name]
    args, truth = case()
    check_moments(draws_of(NUTS(model), *args), truth)


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 0.4, "num_steps": 5},
        {"step_size": 0.3, "num_steps": 4, "adapt_step_size": False},
        {"step_size": 0.3, "num_steps": 4, "adapt_step_size": False, "adapt_mass_matrix": False},
        {"trajectory_length": 1.5},
        {},
    ],
)
def test_hmc_has_the_steps_that_were_asked_for(settings: dict[str, Any]) -> None:
    args, truth = normal_gamma_case()
    kernel = HMC(normal_gamma, **settings)
    mcmc = draws_of(kernel, *args)
    check_moments(mcmc, truth)
    steps = mcmc.get_stats()["n_steps"]
    expected = settings.get(
        "num_steps", max(1, int(settings.get("trajectory_length", 2 * math.pi) / kernel.step_size))
    )
    assert (steps == expected).all()
    if settings.get("adapt_step_size", True):
        assert kernel.step_size != kernel.start_step_size
    else:
        assert (mcmc.get_stats()["step_size"] == 0.3).all()


@pytest.mark.parametrize("full_mass", [False, True])
def test_a_dense_mass_matrix_shortens_the_way_along_a_ridge(full_mass: bool) -> None:
    """Correlation .99: the dense metric is learned, the draws are right either way, and trees are
    short with it alone."""
    cov = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)

    def ridge() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), cov))

    pyro.set_rng_seed(0)
    mcmc = MCMC(
        NUTS(ridge, full_mass=full_mass),
        num_samples=200,
        warmup_steps=200,
        num_chains=16,
        disable_progbar=True,
    )
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    for f, truth in (
        (x, torch.zeros(2)),
        (x[..., 0] * x[..., 1], cov[0, 1]),
        (x**2, torch.ones(2)),
    ):
        within_se(f.mean((0, 1)), truth, mcse_mean(f))
    assert (float(mcmc.get_stats()["n_steps"].double().mean()) < 6) == full_mass


def gamma_potential(jacobian: float) -> Callable[[dict[str, Tensor]], Tensor]:
    """x ~ Gamma(8, 4) and y ~ N(x, 1), in u = log x and y."""
    return lambda params: (
        4.0 * params["u"].exp()
        - (7.0 + jacobian) * params["u"]
        + 0.5 * ((params["y"] - params["u"].exp()) ** 2).sum()
    )


@pytest.mark.parametrize("jacobian", [1.0, 0.0, 2.0])
def test_a_potential_is_sampled_and_transforms_map_its_draws_back(jacobian: float) -> None:
    start = {"y": torch.zeros(96, 2), "u": torch.zeros(96)}
    kernel = NUTS(potential_fn=gamma_potential(jacobian), transforms={"u": ExpTransform().inv})
    mcmc = draws_of(kernel, initial_params=start, warmup=100, samples=100)
    truth = {"u": (2.0, 4.5), "y": (torch.full((2,), 2.0), torch.full((2,), 5.5))}
    assert list(mcmc.get_samples()) == ["u", "y"]
    if jacobian == 1.0:
        check_moments(mcmc, truth)
    else:  # the transforms bring no Jacobian of their own: what the potential lacks is seen
        with pytest.raises(AssertionError, match="standard errors"):
            check_moments(mcmc, truth)


def test_a_potential_of_pyros_own_is_sampled() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    pyro.set_rng_seed(0)
    y = torch.tensor([2.0, 4.0, 3.0])
    start, potential, transforms, _ = initialize_model(model, (y,), num_chains=96)
    kernel = NUTS(potential_fn=potential, transforms=transforms)
    mcmc = draws_of(kernel, initial_params=start)
    check_moments(mcmc, {"rate": (11 / 4, 11 * 12 / 16)})  # Gamma(11, 4)


def test_a_potential_with_a_branch_runs_chain_by_chain() -> None:
    def halves(params: dict[str, Tensor]) -> Tensor:
        x = params["x"]
        return x**2 / 2 if x > 0 else x**2 / 8

    with pytest.warns(RuntimeWarning, match="chain by chain"):
        mcmc = draws_of(
            NUTS(potential_fn=halves),
            initial_params={"x": torch.tensor(0.1)},
            chains=1,
            samples=20,
            warmup=10,
        )
    assert mcmc.get_samples()["x"].shape == (20,)


# Pyro's behaviour


def two_sites() -> None:
    pyro.sample("b", dist.Normal(3.0, 1.0))
    pyro.sample("a", dist.Normal(-1.0, 0.1).expand([2]).to_event(1))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def test_sites_to_save_may_come_in_any_order() -> None:
    mcmc = draws_of(NUTS(two_sites), save_params=["b", "a"], chains=10, samples=20)
    samples = mcmc.get_samples()
    assert list(samples) == ["b", "a"]
    assert samples["a"].shape == (200, 2)
    assert abs(float(samples["b"].mean()) - 3.0) < 1.0
    assert abs(float(samples["a"].mean()) + 1.0) < 0.1
    assert set(mcmc.to_arviz().posterior.data_vars) == {"a", "b"}
    with pytest.raises(
        ValueError, match=r"save_params must name sites of \['a', 'b', 'scale'\], got \['c'\]"
    ):
        draws_of(NUTS(two_sites), save_params=["c"], samples=2, warmup=2)


def standing(model: Callable[..., None], **settings: Any) -> HMC:
    """A kernel that stays where it starts."""
    return HMC(
        model,
        step_size=1e-9,
        num_steps=1,
        adapt_step_size=False,
        adapt_mass_matrix=False,
        **settings,
    )


@pytest.mark.parametrize("chains", [1, 3])
def test_chains_start_where_they_are_told(chains: int) -> None:
    shape = (chains,) if chains > 1 else ()
    start = {
        "a": torch.full((*shape, 2), -49.0),
        "b": torch.full(shape, 101.0),
        "scale": torch.full(shape, -1.0),
    }
    mcmc = draws_of(standing(two_sites), initial_params=start, chains=chains, samples=1, warmup=0)
    samples = mcmc.get_samples()
    torch.testing.assert_close(samples["a"], torch.full((chains, 2), -49.0))
    torch.testing.assert_close(samples["scale"], torch.full((chains,), math.exp(-1.0)))
    halved = {"b": dist.transforms.AffineTransform(0.0, 0.5)}  # the coordinate of b is b / 2 here
    mcmc = draws_of(
        standing(two_sites, transforms=halved),
        initial_params=start,
        chains=chains,
        samples=1,
        warmup=0,
    )
    torch.testing.assert_close(mcmc.get_samples()["b"], torch.full((chains,), 202.0))
    torch.testing.assert_close(mcmc.get_samples()["scale"], samples["scale"])


def test_chains_start_by_a_strategy() -> None:
    values = {
        "b": torch.tensor(99.0),
        "a": torch.tensor([-50.0, -51.0]),
        "scale": torch.tensor(2.0),
    }
    kernel = standing(two_sites, init_strategy=init_to_value(values=values))
    samples = draws_of(kernel, chains=3, samples=1, warmup=0).get_samples()
    for name, value in values.items():
        torch.testing.assert_close(samples[name], value.expand(3, *value.shape))
    medians = draws_of(
        standing(two_sites, init_strategy=init_to_median), chains=3, samples=1, warmup=0
    ).get_samples()
    assert (abs(medians["b"] - 3) < 3).all()
    assert len(set(medians["b"].tolist())) == 3


def test_pyros_seed_decides_the_run() -> None:
    kernel = NUTS(two_sites)  # what a run adapts is not where the next one starts
    runs = [
        draws_of(kernel, chains=2, samples=5, warmup=5, seed=seed).get_samples()["b"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    again = MCMC(NUTS(two_sites), 5, 5, num_chains=2, disable_progbar=True)
    again.run()
    assert not torch.equal(again.get_samples()["b"], runs[2])


def test_results_are_read_as_in_pyro(capsys: pytest.CaptureFixture[str]) -> None:
    mcmc = draws_of(NUTS(normal_gamma), normal_gamma_case()[0][0], chains=4)
    assert mcmc.get_samples(group_by_chain=True)["mean"].shape == (4, 40)
    assert mcmc.get_samples(7)["mean"].shape == (7,)
    mcmc.summary(prob=0.8)
    printed = capsys.readouterr().out
    for word in (
        "precision",
        "mean",
        "10.0%",
        "90.0%",
        "n_eff",
        "r_hat",
        "Number of divergences: 0",
    ):
        assert word in printed
    found = mcmc.diagnostics()
    assert set(found) == {"precision", "mean", "divergences", "acceptance rate"}
    assert set(found["mean"]) == {"n_eff", "r_hat"}
    assert list(found["acceptance rate"]) == [f"chain {c}" for c in range(4)]
    assert 0.5 < found["acceptance rate"]["chain 0"] <= 1.0
    data = mcmc.to_arviz()
    assert data.posterior["precision"].shape == (4, 40)
    assert {"lp", "energy", "diverging", "acceptance_rate", "n_steps", "tree_depth"} <= set(
        data.sample_stats.data_vars
    )
    assert mcmc.diagnose(max_r_hat=2.0, min_ess=1.0).mixed
    predicted = Predictive(normal_gamma, mcmc.get_samples(), return_sites=["y", "mean"])(
        torch.zeros(5)
    )
    assert predicted["y"].shape == (160, 5)
    torch.testing.assert_close(predicted["mean"].flatten(), mcmc.get_samples()["mean"])


def test_one_chain_without_warm_up_given_has_as_many_steps_as_samples() -> None:
    mcmc = MCMC(NUTS(two_sites), 6, disable_progbar=True)
    mcmc.run()
    assert mcmc.warmup_steps == 6
    assert mcmc.get_samples()["b"].shape == (6,)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NUTS(), "one of model and potential_fn"),
        (lambda: HMC(two_sites, potential_fn=lambda p: p["x"]), "one of model and potential_fn"),
        (lambda: NUTS(two_sites, step_size=-1.0), "step_size must be positive"),
        (lambda: NUTS(two_sites, target_accept_prob=1.5), r"target_acceptance must be in \(0, 1\)"),
        (lambda: NUTS(two_sites, max_tree_depth=0), "max_tree_depth must be from 1"),
        (lambda: HMC(two_sites, num_steps=0), "num_steps must be at least 1"),
        (lambda: HMC(two_sites, trajectory_length=-1.0), "trajectory_length must be positive"),
        (lambda: MCMC(pyroebm.NUTS(), 5), r"kernel must be a kernel of Pyro.*got pyroebm\.kernels"),
        (lambda: MCMC(NUTS(two_sites), 0), "num_samples must be an integer of at least 1"),
        (lambda: MCMC(NUTS(potential_fn=lambda p: p["x"]), 5), "requires initial_params"),
        (
            lambda: MCMC(NUTS(two_sites), 5, num_chains=3, initial_params={"b": torch.zeros(2)}),
            r"leading axis of num_chains=3",
        ),
        (lambda: MCMC(NUTS(two_sites), 5).get_samples(), "there are no draws"),
        (
            lambda: MCMC(NUTS(two_sites), 5, 5, {"b": torch.zeros(())}, disable_progbar=True).run(),
            "variables must be",
        ),
        (
            lambda: MCMC(
                NUTS(beta_binomial), 5, disable_progbar=True, disable_validation=False
            ).run(torch.tensor(11.0)),
            "site 'y'",
        ),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


SLOW = """
import time

import pyro
import pyro.distributions as dist
import torch

from pyroebm.infer import MCMC, NUTS


def model():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def wait(*_):
    time.sleep(0.05)


pyro.set_rng_seed(0)
MCMC(NUTS(model), 60, 60, num_chains=4, hook_fn=wait{option}).run()
"""


@pytest.mark.parametrize("option", ["", ", disable_progbar=False", ", disable_progbar=True"])
def test_a_log_file_has_lines_unless_they_are_disabled(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SLOW.format(option=option)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    if "True" in option:
        assert lines == []
    else:
        for label in ("warm-up", "sample"):
            assert re.fullmatch(
                rf"{label}, 4 chains: 240/240 draws in \d+ s, [\d.]+ draws/s.*",
                [line for line in lines if line.startswith(label)][-1],
            )
