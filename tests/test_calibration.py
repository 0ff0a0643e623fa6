"""Simulation-based calibration: right models and samplers pass, wrong ones fail, and the test of
uniformity has its exact level."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from torch import Tensor

from pyroebm import MCMC
from pyroebm.calibration import SBCResult, _band, _exceeding, _p_value, sbc
from pyroebm.core import Energy
from pyroebm.kernels import LockstepNUTS

pytestmark = pytest.mark.usefixtures("float64")

#: p-value that separates right from wrong: a right one is below it once in a hundred thousand runs.
LEVEL = 1e-5


def normal(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def logistic(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def eight_schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def gamma_poisson(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Poisson(rate).expand([4]).to_event(1), obs=y)


class LKJ(dist.LKJCholesky):
    """torch's distribution with right draws. Those of torch 2.13 are biased from dimension 3 on:
    the squared norm of row i is Beta-distributed with parameter i / 2, and torch takes i - 1/2."""

    power = 0.5

    def __init__(self, dim: int, concentration: float) -> None:
        super().__init__(dim, concentration)
        row = torch.arange(dim - 1.0)
        row = torch.cat([row.new_zeros(1), row])
        first = self.power * row + 0.5
        self._beta = dist.Beta(first, concentration + 0.5 * (dim - 2) - 0.5 * row)


class TorchLKJ(LKJ):
    power = 1.0


def correlated(y: Tensor, prior: type[LKJ] = LKJ) -> None:
    cholesky = pyro.sample("cholesky", prior(3, 2.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    pyro.sample("count", dist.Multinomial(10, shares), obs=torch.zeros(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=cholesky), obs=y)


def mixture(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(2.0 * which, 1.0), obs=y)


def features() -> Tensor:
    return torch.randn(15, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


MODELS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]], tuple[str, ...]]] = {
    "normal": (normal, lambda: (torch.zeros(6),), ()),
    "logistic": (logistic, lambda: (features(),), ("y",)),
    "eight schools": (eight_schools, lambda: (torch.zeros(8),), ()),
    "gamma-Poisson": (gamma_poisson, lambda: (torch.zeros(4),), ()),
    "LKJ and Dirichlet": (correlated, lambda: (torch.zeros(6, 3),), ()),
    "mixture, summed out": (mixture, lambda: (torch.zeros(8),), ()),
}


def small(model: Callable[..., Any], *args: Any, **options: Any) -> SBCResult:
    sizes: dict[str, Any] = {"num_simulations": 200, "num_draws": 19, "warmup_steps": 150}
    return sbc(model, *args, **sizes | {"seed": 0} | options)


@pytest.mark.parametrize("name", MODELS)
def test_right_models_pass(name: str) -> None:
    model, args, observed = MODELS[name]
    result = small(model, *args(), observed=observed)
    assert result.test().p_value > LEVEL, result.test()
    for site, ranks in result.ranks.items():
        assert ranks.shape == result.values[site].shape
        assert ranks.shape[0] == 200
        assert 0 <= ranks.min() <= ranks.max() <= 19
    assert min(result.ess.values()) >= 0.9 * 19


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_right_models_pass_in_a_thousand_simulations(name: str) -> None:
    model, args, observed = MODELS[name]
    began = time.monotonic()
    result = sbc(model, *args(), observed=observed, seed=1)
    print(f"{name}: {time.monotonic() - began:.0f} s, {result}, {result.test()}")
    assert result.test().p_value > LEVEL, result.test()


def without_jacobian(y: Tensor) -> None:
    """A log-normal prior of the scale in the coordinate of its logarithm, without the Jacobian."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    prior = dist.LogNormal(0.0, 1.0).log_prob(log_scale.exp())
    pyro.factor("prior", prior - dist.Normal(0.0, 1.0).log_prob(log_scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, log_scale.exp()), obs=y)


def with_jacobian(y: Tensor) -> None:
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    pyro.factor("jacobian", log_scale)
    prior = dist.LogNormal(0.0, 1.0).log_prob(log_scale.exp())
    pyro.factor("prior", prior - dist.Normal(0.0, 1.0).log_prob(log_scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, log_scale.exp()), obs=y)


def test_a_model_without_its_jacobian_fails() -> None:
    assert small(without_jacobian, torch.zeros(2), num_simulations=500).test().p_value < LEVEL
    assert small(with_jacobian, torch.zeros(2), num_simulations=500).test().p_value > LEVEL


def test_biased_draws_of_a_prior_fail() -> None:
    found = small(correlated, torch.zeros(1, 3), TorchLKJ, num_simulations=600).test()
    assert found.p_value < LEVEL
    assert found.worst == "cholesky[2, 2]"


class Cold(LockstepNUTS):
    """NUTS at a wrong temperature."""

    def init(self, energy: Energy, x: Tensor, generator: torch.Generator | None = None) -> Any:
        return super().init(1.3 * energy, x, generator)

    def step(self, energy: Energy, state: Any, generator: torch.Generator | None = None) -> Any:
        return super().step(1.3 * energy, state, generator)


def test_a_sampler_at_a_wrong_temperature_fails() -> None:
    found = small(eight_schools, torch.zeros(8), kernel=Cold()).test()
    assert found.p_value < LEVEL, found


class Prior(LockstepNUTS):
    """Draws from a standard normal prior, whatever the data are."""

    def step(self, energy: Energy, state: Any, generator: torch.Generator | None = None) -> Any:
        _, info = super().step(energy, state, generator)
        return self.init(energy, torch.randn(state.x.shape, generator=generator)), info


def test_draws_that_ignore_the_data_fail_by_their_log_density() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    found = small(model, torch.zeros(3), kernel=Prior(), warmup_steps=50).test()
    assert found.worst == "lp"
    assert found.p_values["lp"] < LEVEL < found.p_values["mean"]


def test_ranks_of_exact_draws_are_those_of_the_closed_form() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    result = small(model, torch.zeros(3), num_simulations=400, num_draws=99)
    # given the data, the rank is binomial with the probability of the posterior below the value
    assert result.thinning >= 2
    u = (result.ranks["mean"] + 0.5) / 100
    within_se(u.mean(), 0.5, math.sqrt(1 / 12 / 400))
    within_se(u.var(), 1 / 12, math.sqrt(1 / 180 / 400))


# --------------------------------------------------------------------------------------------------
# The test of uniformity


def enumerated(total: int, num_draws: int, gamma: float) -> float:
    """The probability that :func:`_p_value`'s statistic is at most gamma, over all ranks."""
    from pyroebm.calibration import _counts, _two_sided

    hits = 0
    every = itertools.product(range(num_draws + 1), repeat=total)
    for ranks in every:
        counts = _counts(np.array(ranks), num_draws)
        smallest = _two_sided(total, num_draws)[np.arange(num_draws), counts].min()
        hits += bool(smallest <= gamma * (1 + 1e-9))
    return hits / (num_draws + 1) ** total


@pytest.mark.parametrize("gamma", [0.001, 0.05, 0.3, 1.0])
def test_the_p_value_is_that_of_enumeration(gamma: float) -> None:
    assert _exceeding(5, 3, gamma) == pytest.approx(enumerated(5, 3, gamma), abs=1e-12)


def test_p_values_of_uniform_ranks_are_below_every_level_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    p = np.array([_p_value(rng.integers(0, 20, 100), 19) for _ in range(2000)])
    for level in (0.05, 0.2, 0.5):
        # the statistic is discrete: a level is reached up to its next value
        reached = max(value for value in np.unique(p) if value <= level)
        within_se((p <= level).mean(), reached, math.sqrt(reached * (1 - reached) / len(p)))


def test_the_band_contains_uniform_ranks_at_its_level() -> None:
    low, high = _band(100, 19, 0.1)
    rng = np.random.default_rng(1)
    ranks = rng.integers(0, 20, (4000, 100))
    counts = (ranks[:, :, None] <= np.arange(19)).sum(1)
    inside = ((low <= counts) & (counts <= high)).all(1).mean()
    assert inside >= 0.9 - 5 * math.sqrt(0.09 / 4000)
    assert inside <= 0.93  # the largest level below it, of a discrete statistic


# --------------------------------------------------------------------------------------------------
# The result


def made(**changes: Any) -> SBCResult:
    rng = np.random.default_rng(0)
    ranks = {"x": rng.integers(0, 20, (300, 2)), "tau": rng.integers(0, 20, 300)}
    values = {name: rng.normal(size=array.shape) for name, array in ranks.items()}
    given = {"ranks": ranks, "values": values, "num_draws": 19, "thinning": 2, "seed": 7}
    given |= {"ess": {"x": 19.0, "tau": 19.0}, "divergences": np.zeros(300, int)}
    return SBCResult(**given | changes)


def test_the_smallest_p_value_is_multiplied_by_the_number_of_entries_that_vary() -> None:
    result = made()
    found = result.test()
    smallest = min(float(p.min()) for p in found.p_values.values())
    assert found.p_value == pytest.approx(min(1.0, 3 * smallest))
    result.values["x"][:, 1] = 2.0
    assert np.isnan(result.test().p_values["x"][1])
    result.ranks["tau"] = result.ranks["tau"] // 2
    found = result.test()
    assert found.worst == "tau"
    assert found.p_value == pytest.approx(2 * float(found.p_values["tau"]))


def test_a_dataset_has_ranks_values_and_settings() -> None:
    data = made().to_dataset()
    assert data["x"].dims == ("simulation", "x_dim_0")
    assert data["tau_value"].shape == (300,)
    assert data.attrs == {"num_draws": "19", "thinning": "2", "seed": "7"}


@pytest.mark.parametrize("kind", ["ecdf", "histogram"])
def test_a_plot_has_one_panel_for_each_site_and_one_line_for_each_entry(kind: Any) -> None:
    figure = made().plot(kind)
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == ["x", "tau"]
    count = len(figure.axes[0].lines) if kind == "ecdf" else len(figure.axes[0].patches) - 1
    assert count == 2


def test_ties_are_broken_at_random() -> None:
    from pyroebm.calibration import _ranks

    ranks = _ranks(torch.zeros(2000, 3), torch.zeros(2000), np.random.default_rng(0))
    share = np.bincount(ranks, minlength=4) / 2000
    within_se(share, np.full(4, 0.25), np.full(4, math.sqrt(0.25 * 0.75 / 2000)))


def test_an_interrupt_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MCMC, "run", lambda self, energy: setattr(self, "interrupted", True))
    with pytest.raises(KeyboardInterrupt):  # MCMC keeps its draws and only warns
        small(gamma_poisson, torch.zeros(4))


def test_a_run_is_repeated_by_its_seed() -> None:
    first, again, other = (
        small(gamma_poisson, torch.zeros(4), num_simulations=20, warmup_steps=50, seed=seed)
        for seed in (3, 3, 4)
    )
    assert all((first.ranks[name] == again.ranks[name]).all() for name in first.ranks)
    assert not all((first.ranks[name] == other.ranks[name]).all() for name in first.ranks)
    before = torch.get_rng_state()
    small(gamma_poisson, torch.zeros(4), num_simulations=20, warmup_steps=50)
    assert (torch.get_rng_state() == before).all()


# --------------------------------------------------------------------------------------------------
# Errors


def test_a_model_without_data_raises() -> None:
    with pytest.raises(ValueError, match="no site has obs="):
        small(logistic, features())


def test_a_site_with_the_name_of_the_log_density_raises() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("lp", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match="no site named 'lp'"):
        small(model, torch.tensor(0.0))


def test_an_unknown_name_of_data_raises() -> None:
    with pytest.raises(ValueError, match=r"observed must be names of sample sites.*\['z'\]"):
        small(logistic, features(), observed=["z"])


def test_data_whose_shape_changes_raise() -> None:
    def model(y: Tensor) -> None:
        count = 2 + int(pyro.sample("n", dist.Bernoulli(0.5), obs=torch.tensor(1.0)))
        pyro.sample("y", dist.Normal(torch.zeros(count), 1.0).to_event(1), obs=torch.zeros(count))

    with pytest.raises(ValueError, match="must have the same sites and shapes"):
        small(model, torch.zeros(3))


def test_a_prior_that_cannot_be_drawn_raises() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample(
            "mean", dist.ImproperUniform(dist.constraints.real, torch.Size(), torch.Size())
        )
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match="proper distribution"):
        small(model, torch.tensor(0.0))


def test_a_density_that_excludes_its_simulations_raises() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(mean > 0, 0.0, -math.inf))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match="must be finite where the model was simulated"):
        small(model, torch.tensor(0.0))


def test_dependent_draws_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyroebm import calibration

    monkeypatch.setattr(calibration, "MAX_THINNING", 2)
    monkeypatch.setattr(calibration, "INDEPENDENT", 10.0)
    with pytest.warns(RuntimeWarning, match="are dependent after thinning by 2"):
        small(gamma_poisson, torch.zeros(4), num_simulations=20, warmup_steps=50)


def test_an_unknown_kind_of_plot_raises() -> None:
    with pytest.raises(ValueError, match='kind must be "ecdf" or "histogram"'):
        made().plot("bars")  # type: ignore[arg-type]
