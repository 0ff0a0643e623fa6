"""BoTorch's fully Bayesian models: hyperparameters are sampled and loaded. A stand-in has what the
function uses of a model; `scripts/botorch_saas.py` compares with BoTorch itself."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from torch import Tensor

from pyroebm.core.statistics import mcse_mean
from pyroebm.ppl import ModelEnergy
from pyroebm.ppl.botorch import _pyro_model, fit_fully_bayesian_model

pytestmark = pytest.mark.usefixtures("float64")

MIN_NOISE = 1e-4


class MaternPyroModel:
    """The attributes of a prior of BoTorch 0.18, whose ``sample`` is written in JAX."""

    train_X_jax = None  # noqa: N815
    use_input_warping = False
    indices = None
    _eps = 1e-7
    _outputscale_prior_concentration: float | None = None
    _outputscale_prior_rate: float | None = None

    def __init__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> None:
        self.train_X = x
        self.train_Y = y
        self.train_Yvar = noise


class SaasPyroModel(MaternPyroModel):
    _outputscale_prior_concentration = 2.0
    _outputscale_prior_rate = 0.15


class LinearPyroModel(MaternPyroModel):
    pass


class OtherPyroModel(MaternPyroModel):
    pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `botorch.models.fully_bayesian` with these classes."""
    module = types.ModuleType("botorch.models.fully_bayesian")
    for cls in (MaternPyroModel, SaasPyroModel, LinearPyroModel):
        setattr(module, cls.__name__, cls)
    module.MIN_INFERRED_NOISE_LEVEL = MIN_NOISE  # type: ignore[attr-defined]
    models = types.ModuleType("botorch.models")
    models.fully_bayesian = module  # type: ignore[attr-defined]
    for name, entry in (("botorch", types.ModuleType("botorch")), ("botorch.models", models)):
        monkeypatch.setitem(sys.modules, name, entry)
    monkeypatch.setitem(sys.modules, "botorch.models.fully_bayesian", module)
    return


class Model:
    """What the function uses of a BoTorch model."""

    def __init__(self, prior: Any) -> None:
        self.pyro_model = prior
        self.calls: list[str] = []

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")

    def load_mcmc_samples(self, draws: dict[str, Tensor]) -> None:
        self.calls.append("load")
        self.draws = draws


def data(count: int = 6, dim: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, dim, generator=generator)
    return x, torch.sin(6.0 * x[:, :1])


def matern(x: Tensor, lengthscale: Tensor) -> Tensor:
    distance = torch.cdist(x / lengthscale, x / lengthscale)
    return (1 + math.sqrt(5) * distance + 5 / 3 * distance**2) * torch.exp(-math.sqrt(5) * distance)


def warp(x: Tensor, a: Tensor, b: Tensor, indices: list[int]) -> Tensor:
    x = x.clone()
    x[:, indices] = 1 - (1 - x[:, indices] ** a) ** b
    return x


def log_normal(x: Tensor, loc: float, scale: float) -> Tensor:
    return dist.LogNormal(loc, scale).log_prob(x).sum()


def expected(
    kind: str, p: dict[str, Tensor], x: Tensor, y: Tensor, noise: Any, indices: Any
) -> Any:
    """The log density as Eriksson and Jankowiak (2021) and BoTorch's documentation have it."""
    total = dist.Normal(0.0, 1.0).log_prob(p["mean"])
    inputs = x
    if indices is not None:
        inputs = warp(x, p["c0"], p["c1"], indices)
        total += log_normal(p["c0"], 0.0, math.sqrt(0.1)) + log_normal(p["c1"], 0.0, math.sqrt(0.1))
    if kind == "linear":
        total += dist.HalfCauchy(0.1).log_prob(p["tau_sq"])
        total += dist.HalfCauchy(1.0).log_prob(p["_weight_variance_sq"]).sum()
        weights = (p["tau_sq"] * p["_weight_variance_sq"]).sqrt()
        kernel = (inputs - 0.5) @ weights.diag() @ (inputs - 0.5).T
    elif kind == "matern":
        total += log_normal(p["lengthscale"], math.sqrt(2) + math.log(3) / 2, math.sqrt(3))
        kernel = matern(inputs, p["lengthscale"])
    else:
        total += dist.HalfCauchy(0.1).log_prob(p["kernel_tausq"])
        total += dist.HalfCauchy(1.0).log_prob(p["_kernel_inv_length_sq"]).sum()
        total += dist.Gamma(2.0, 0.15).log_prob(p["outputscale"])
        lengthscale = (p["kernel_tausq"] * p["_kernel_inv_length_sq"]).rsqrt()
        kernel = p["outputscale"] * matern(inputs, lengthscale)
    if noise is None:
        total += dist.Gamma(0.9, 10.0).log_prob(p["noise"])
        noise = (MIN_NOISE + p["noise"]) * torch.ones(len(x), 1)
    covariance = kernel + noise.squeeze(-1).diag()
    normal = dist.MultivariateNormal(p["mean"] * torch.ones(len(x)), covariance)
    return total + normal.log_prob(y.squeeze(-1))


@pytest.mark.parametrize("indices", [None, [0, 1, 2], [2]], ids=["plain", "warped", "one warped"])
@pytest.mark.parametrize("given_noise", [False, True], ids=["inferred", "given"])
@pytest.mark.parametrize("kind", ["saas", "matern", "linear"])
def test_the_density_is_that_of_the_prior(kind: str, given_noise: bool, indices: Any) -> None:
    x, y = data()
    noise = torch.linspace(0.01, 0.1, len(x)).unsqueeze(1) if given_noise else None
    classes = {"saas": SaasPyroModel, "matern": MaternPyroModel, "linear": LinearPyroModel}
    prior = classes[kind](x, y, noise)
    prior.use_input_warping = indices is not None
    prior.indices = indices if indices is not None and len(indices) < 3 else None  # type: ignore[assignment]
    energy = ModelEnergy(_pyro_model(prior)[0])
    assert energy.batching == "graph"
    u = torch.randn(4, *energy.event_shape, generator=torch.Generator().manual_seed(1))
    values = energy.constrain(u)
    log_det = sum(
        transform.log_abs_det_jacobian(energy.split(u)[name], values[name]).reshape(4, -1).sum(1)
        for name, transform in (energy.transforms or {}).items()
    )
    for row in range(4):
        point = {name: value[row] for name, value in values.items()}
        truth = expected(kind, point, x, y, noise, indices)
        assert float(-energy(u)[row] - log_det[row]) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (SaasPyroModel, {"mean": (), "noise": (), "outputscale": (), "lengthscale": (3,)}),
        (MaternPyroModel, {"mean": (), "noise": (), "lengthscale": (3,)}),
        (LinearPyroModel, {"mean": (), "noise": (), "weight_variance": (3,)}),
    ],
    ids=["saas", "matern", "linear"],
)
def test_draws_are_thinned_and_loaded(cls: Any, names: dict[str, tuple[int, ...]]) -> None:
    model = Model(cls(*data()))
    run = fit_fully_bayesian_model(model, 5, 40, 40, thinning=5, num_chains=4, seed=0)
    assert model.calls == ["train", "load", "eval"]
    assert {name: tuple(value.shape) for name, value in model.draws.items()} == {
        name: (8, *shape) for name, shape in names.items()
    }
    samples = run.get_samples(group_by_chain=True)
    assert samples["mean"].shape == (4, 10)
    assert torch.equal(model.draws["mean"], samples["mean"][:, [4, 9]].flatten())
    if cls is SaasPyroModel:
        squares = samples["kernel_tausq"].unsqueeze(-1) * samples["_kernel_inv_length_sq"]
        assert torch.allclose(model.draws["lengthscale"], squares[:, [4, 9]].flatten(0, 1).rsqrt())


def test_a_model_written_in_pyro_is_sampled_as_it_is() -> None:
    class Prior:
        """As those before BoTorch 0.18."""

        def sample(self) -> None:
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample("Y", dist.Normal(mean, 1.0), obs=torch.tensor(2.0))

        def postprocess_mcmc_samples(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"mean": draws["mean"], "loaded": draws["mean"] + 1.0}

    model = Model(Prior())
    run = fit_fully_bayesian_model(model, 6, 200, 4000, thinning=1, seed=0)
    assert torch.equal(model.draws["loaded"], model.draws["mean"] + 1.0)
    draws = run.get_samples(group_by_chain=True)["mean"].numpy()
    within_se(draws.mean(), 1.0, float(mcse_mean(draws)))
    square = (draws - 1.0) ** 2
    within_se(square.mean(), 0.5, float(mcse_mean(square)))
    assert np.isfinite(draws).all()


def test_a_prior_in_jax_that_is_not_known_raises() -> None:
    with pytest.raises(ValueError, match=r"got OtherPyroModel, whose prior is written in JAX"):
        fit_fully_bayesian_model(Model(OtherPyroModel(*data())))


def test_draws_that_the_chains_cannot_share_raise() -> None:
    with pytest.raises(
        ValueError, match=r"multiple of num_chains \* thinning, got num_samples=100"
    ):
        fit_fully_bayesian_model(Model(SaasPyroModel(*data())), num_samples=100)
