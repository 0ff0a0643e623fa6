"""Predictive draws: the distribution and shapes of Pyro's, vectorized over the draws."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyroebm.core import rowwise
from pyroebm.infer import Predictive
from pyroebm.infer.predictive import Predictive as SamePredictive

DRAWS = 20_000


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(1.0), 0.5))
    noise = pyro.sample("noise", dist.Gamma(x.new_tensor(3.0), 2.0))
    pyro.deterministic("loc", slope * x)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


X = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)


def test_prior_draws_have_the_exact_moments() -> None:
    pyro.set_rng_seed(0)
    found = Predictive(line, num_samples=DRAWS)(X)
    assert set(found) == {"slope", "noise", "loc", "y"}
    y = found["y"]
    within_se(y.mean(0), X, mean_and_se(y)[1])
    squares = (y - X) ** 2  # Var(slope) x^2 + E noise^2
    within_se(squares.mean(0), 0.25 * X**2 + 3.0, mean_and_se(squares)[1])
    products = (y[:, 1] - 1.0) * (y[:, 2] + 2.0)  # one slope for all data of a draw
    within_se(products.mean(), -0.5, mean_and_se(products)[1])
    torch.testing.assert_close(found["loc"].squeeze(1), found["slope"] * X)


def test_posterior_draws_keep_their_values() -> None:
    slopes = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).repeat(DRAWS // 8)
    draws = {"slope": slopes, "noise": torch.full_like(slopes, 0.1)}
    pyro.set_rng_seed(0)
    found = Predictive(line, draws)(X)
    assert set(found) == {"y", "loc"}
    residuals = (found["y"] - slopes[:, None] * X) / 0.1
    within_se(residuals.mean(0), torch.zeros(3), mean_and_se(residuals)[1])
    within_se((residuals**2).mean(0), torch.ones(3), mean_and_se(residuals**2)[1])
    data = torch.ones(3, dtype=torch.float64)
    observed = Predictive(line, draws)(X, data)["y"]
    assert torch.equal(observed, data.expand(len(slopes), 3))


def model_of_all_kinds(x: Tensor) -> Tensor:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, dim=-2):
        row = pyro.sample("row", dist.Normal(top, 1.0))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample(
                "cell", dist.MultivariateNormal(row.unsqueeze(-1).expand(4, 1, 2), torch.eye(2))
            )
    for i in pyro.plate("times", 2):
        pyro.sample(f"step_{i}", dist.Poisson(top.exp()))
    pyro.factor("factor", top)
    return x + top


@pytest.mark.parametrize("sites", [(), None, ["cell", "top", "unknown"], ("_RETURN", "row")])
def test_names_and_shapes_are_those_of_pyro(sites: Any) -> None:
    x = torch.zeros(5)
    for draws in (None, {"top": torch.zeros(6), "row": torch.zeros(6, 4, 1)}):
        number = None if draws else 6
        theirs = pyro.infer.Predictive(model_of_all_kinds, draws, None, number, sites)(x)
        ours = Predictive(model_of_all_kinds, draws, None, number, sites)(x)
        assert {name: value.shape for name, value in ours.items()} == {
            name: value.shape for name, value in theirs.items()
        }


DISTRIBUTIONS: dict[str, Callable[[], dist.Distribution]] = {
    "asymmetric Laplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "BetaBinomial": lambda: dist.BetaBinomial(2.0, 3.0, 10),
    "Binomial": lambda: dist.Binomial(10, torch.tensor(0.3)),
    "Categorical": lambda: dist.Categorical(torch.tensor([0.2, 0.3, 0.5])),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "Exponential": lambda: dist.Exponential(torch.tensor(2.0)),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "GammaPoisson": lambda: dist.GammaPoisson(2.0, 3.0),
    "Geometric": lambda: dist.Geometric(0.3),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 0.5),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-1.0, 1.0]), 0.3)
    ),
    "Multinomial": lambda: dist.Multinomial(10, torch.tensor([0.2, 0.3, 0.5])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(
        torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    ),
    "NegativeBinomial": lambda: dist.NegativeBinomial(3.0, torch.tensor(0.5)),
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "OneHotCategorical": lambda: dist.OneHotCategorical(torch.tensor([0.2, 0.8])),
    "Poisson": lambda: dist.Poisson(3.0),
    "StudentT": lambda: dist.StudentT(9.0, 0.0, 1.0),
    "Uniform": lambda: dist.Uniform(0.0, 1.0),
    "Weibull": lambda: dist.Weibull(1.0, 2.0),
    "zero-inflated Poisson": lambda: dist.ZeroInflatedPoisson(
        torch.tensor(3.0), gate=torch.tensor(0.3)
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_is_vectorized_and_drawn_independently(name: str) -> None:
    """Constant parameters do not depend on the draw: one value for all draws is the fault."""
    make = DISTRIBUTIONS[name]
    pyro.set_rng_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Predictive(lambda: pyro.sample("x", make().expand([2])), num_samples=4000)()["x"]
    theirs = make().sample(torch.Size([8000])).unflatten(0, (4000, 2))
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    for power in (1, 2):
        a, b = mean_and_se(ours**power), mean_and_se(theirs**power)
        error = np.hypot(a[1], b[1])
        varies = error > 0  # some entries of a Cholesky factor are constant
        within_se(a[0][varies], b[0][varies], error[varies])
    # neighboring draws, and the two entries of one draw, are independent
    entry = ours.reshape(4000, 2, -1)[..., -1]
    z = (entry - entry.mean(0)) / entry.std(0)
    for products in (z[1:, 0] * z[:-1, 0], z[:, 0] * z[:, 1]):
        within_se(products.mean(), 0.0, mean_and_se(products)[1])


@pytest.mark.parametrize("shape", [(), (2,)])
def test_several_sites_are_drawn_in_place(shape: tuple[int, ...]) -> None:
    """torch draws these distributions by a write into an empty tensor of the right shape."""

    def model() -> None:
        for name in ("Exponential", "Laplace", "Geometric", "Normal", "Beta"):
            pyro.sample(name, DISTRIBUTIONS[name]().expand(shape))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Predictive(model, num_samples=6)()
    assert {value.shape for value in found.values()} == {(6, *shape)}
    assert len(found["Laplace"].unique()) == 6 * max(1, *shape, 1)


def test_the_seed_decides_and_no_other_generator_is_used() -> None:
    def draw(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        return Predictive(line, num_samples=10)(X)["y"]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_chunks_differ_in_their_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroebm.diagnostics.pyro_model.MAX_ENTRIES", 8 * 4)
    pyro.set_rng_seed(0)
    y = Predictive(line, num_samples=40)(X)["y"]
    assert y.shape == (40, 3)
    assert len(y.unique(dim=0)) == 40


def branching() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.sample("y", dist.Normal(10.0, 1.0))
    else:
        pyro.sample("y", dist.Normal(-10.0, 1.0))


def test_a_model_that_branches_runs_draw_by_draw_and_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="'branching' cannot be vectorized.*draw by draw"):
        found = Predictive(branching, num_samples=50)()
    assert torch.equal(found["y"] > 0, found["x"] > 0)


def with_numpy() -> None:
    pyro.deterministic("x", torch.tensor(np.random.standard_normal()))  # noqa: NPY002


def with_python() -> None:
    pyro.deterministic("x", torch.tensor(random.random()))


@pytest.mark.parametrize("model", [with_numpy, with_python])
def test_draws_of_other_generators_are_not_shared(model: Callable[[], None]) -> None:
    with pytest.warns(RuntimeWarning, match="generators of Python or NumPy"):
        assert len(Predictive(model, num_samples=50)()["x"].unique()) == 50


def test_a_guide_gives_the_draws() -> None:
    guide = AutoNormal(line, init_scale=0.01)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y = torch.tensor([0.0, 2.0, -4.0], dtype=torch.float64)
    predictive = Predictive(line, guide=guide, num_samples=3000)
    found = predictive(X, y)
    assert set(found) == {"slope", "noise", "loc", "y"}
    slope = found["slope"].flatten()
    median = guide.median(X)["slope"].detach()
    within_se(slope.mean(), median, mean_and_se(slope)[1])
    within_se((slope - median).std(), 0.01, 0.01 / math.sqrt(2 * 3000))
    torch.testing.assert_close(found["loc"].squeeze(1), slope[:, None] * X)
    theirs = pyro.infer.Predictive(line, guide=guide, num_samples=3)(X, y)
    assert {k: v.shape[1:] for k, v in theirs.items()} == {k: v.shape[1:] for k, v in found.items()}


def subsampling(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(x[rows], 1e-3))


def test_subsamples_differ_between_draws() -> None:
    y = Predictive(subsampling, num_samples=2000)(torch.arange(4.0))["y"].round().long()
    assert y.shape == (2000, 2)
    assert (y[:, 0] != y[:, 1]).all()
    counts = torch.bincount(y.flatten(), minlength=4) / 2000
    within_se(counts, torch.full((4,), 0.5), math.sqrt(0.25 / 2000))


class Network(pyro.nn.PyroModule):
    """A Bayesian linear layer, written for one set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = pyro.nn.PyroModule[torch.nn.Linear](3, 1)
        self.layer.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x: Tensor) -> Tensor:
        return pyro.sample("y", dist.Normal(self.layer(x).squeeze(-1), 1e-3).to_event(1))


def test_modules_that_pyro_cannot_vectorize_by_a_plate() -> None:
    weights = torch.randn(100, 1, 3, generator=torch.Generator().manual_seed(0))
    x, network = torch.randn(7, 3), Network()
    network.layer.bias.requires_grad_(False).zero_()
    found = Predictive(network, {"layer.weight": weights}, return_sites=("y", "_RETURN"))(x)
    assert (found["y"] - weights[:, 0] @ x.T).abs().max() < 0.01
    assert torch.equal(found["y"], found["_RETURN"])


def discrete(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc + 4.0 * z, 0.5), obs=y)


def test_discrete_variables_are_inferred_given_the_data() -> None:
    """Around infer_discrete the values of the draws would be ignored (Pyro blocks them)."""
    y, loc = torch.tensor([0.0, 4.0, 2.0]), torch.zeros(400)
    pyro.set_rng_seed(0)
    found = Predictive(discrete, {"loc": loc}, infer_discrete=True)(y)["z"]  # vectorized
    assert found[:, 0].sum() == 0
    assert found[:, 1].sum() == 400
    within_se(found[:, 2].mean(), 0.5, 0.5 / math.sqrt(400))
    prior = Predictive(discrete, {"loc": loc}, return_sites=["z"])(y)["z"]
    within_se(prior.mean(0), torch.full((3,), 0.5), 0.5 / math.sqrt(400))


def with_a_future(y: Tensor, future: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z + 0.0 * level, 1.0), obs=y)
        next_ = dist.Normal(3.0 * z, torch.where(z == 1, 0.01, 1.0))
        pyro.sample("next", next_, obs=future)


def test_values_drawn_for_a_prediction_are_no_data() -> None:
    """The density of a value that is drawn for each label counted as evidence for the label."""
    pyro.set_rng_seed(0)
    found = Predictive(with_a_future, {"level": torch.zeros(4000)}, infer_discrete=True)(
        torch.tensor([0.5, 1.5])
    )
    exact = torch.tensor([0.5, 1.0 / (1.0 + math.exp(-1.0))])
    within_se(found["z"].mean(0), exact, (exact * (1.0 - exact) / 4000).sqrt())
    assert found["next"].shape == found["z"].shape
    one = found["z"] == 1.0
    within_se(found["next"][one].mean(), 3.0, 0.01 / math.sqrt(int(one.sum())))
    within_se(found["next"][~one].mean(), 0.0, 1.0 / math.sqrt(int((~one).sum())))


def above_a_label() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    z = pyro.sample("z", dist.Bernoulli(logits=100.0 * x))
    pyro.sample("w", dist.Normal(z, 1e-3))


def test_a_label_keeps_the_value_it_was_drawn_from() -> None:
    pyro.set_rng_seed(0)
    found = Predictive(above_a_label, num_samples=200, infer_discrete=True)()
    far = found["x"].abs() > 0.1
    assert torch.equal((found["x"] > 0)[far], (found["z"] == 1.0)[far])
    assert (found["w"] - found["z"]).abs().max() < 0.01


def test_data_of_a_variable_without_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="site 'y' depends on 'level', which has none"):
        Predictive(with_a_future, num_samples=3, infer_discrete=True)(torch.zeros(2))


def test_wrong_arguments() -> None:
    assert issubclass(SamePredictive, pyro.infer.Predictive)
    with pytest.raises(ValueError, match=r"one number of draws, got {'slope': 3, 'noise': 4}"):
        Predictive(line, {"slope": torch.zeros(3), "noise": torch.zeros(4)})
    with pytest.raises(ValueError, match="num_samples"):
        Predictive(line)
    with pytest.raises(ValueError, match=r"must return a tensor .* got NoneType"):
        Predictive(branching, num_samples=2, return_sites=["_RETURN"])()


def failing() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    raise KeyError("the fault of the model")


def test_an_error_of_the_model_is_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="the fault of the model"):
            Predictive(failing, num_samples=3)()


def test_values_that_vmap_gets_wrong_are_computed_draw_by_draw() -> None:
    """A value that was computed outside of the call for the first row."""
    seen: list[Tensor] = []

    def remembers(row: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(row["x"])
        return {"y": row["x"] * float(len(seen) > 1)}

    with pytest.warns(RuntimeWarning, match="its value 'y' differs from that of a plain call"):
        rowwise.map_rows(remembers, {"x": torch.ones(3)}, 3, name="it")
