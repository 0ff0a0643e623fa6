"""Pyro's reparametrizations and guides around a model whose energy is sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoLaplaceApproximation, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import (
    AutoReparam,
    HaarReparam,
    LocScaleReparam,
    MinimalReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    SplitReparam,
    TransformReparam,
)
from torch import Tensor
from torch.distributions.transforms import AffineTransform

from pyroebm import MCMC, NUTS, ModelEnergy
from pyroebm.core import Energy, value_and_grad

pytestmark = pytest.mark.usefixtures("float64")


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def growth(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.LogNormal(0.0, 2.0))
    base = dist.Normal(0.0, 1.0)
    with pyro.plate("steps", len(y)):
        x = pyro.sample("x", dist.TransformedDistribution(base, AffineTransform(1.0, rate)))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def directions(y: Tensor) -> None:
    x = pyro.sample("x", dist.ProjectedNormal(torch.tensor([1.0, 0.5, -0.3])))
    pyro.sample("y", dist.Normal(x.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)


def walk(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.cumsum(-1), 1.0).to_event(1), obs=y)


def heavy_tails(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Stable(1.5, 0.0, scale), obs=y)


def latent_tails(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Stable(1.5, 0.2, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


#: A model, its reparametrization, and how batches are evaluated: Pyro's code writes into
#: ``x.data``, or has an ``assert`` on a latent variable.
MODELS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "LocScale": (schools, {"theta": LocScaleReparam(0.0)}, "graph"),
    "LocScale learned": (schools, {"theta": LocScaleReparam()}, "graph"),
    "Transform": (growth, {"rate": TransformReparam(), "x": TransformReparam()}, "graph"),
    "function": (
        schools,
        lambda site: LocScaleReparam(0.3) if site["name"] == "theta" else None,
        "graph",
    ),
    "Auto, normal": (schools, AutoReparam(), "graph"),
    "Auto, transformed": (growth, AutoReparam(), "graph"),
    "ProjectedNormal": (directions, {"x": ProjectedNormalReparam()}, "vmap"),
    "Haar": (walk, {"x": HaarReparam(dim=-1)}, "graph"),
    "Split": (walk, {"x": SplitReparam([1, 3], -1)}, "graph"),
    "Minimal, observed": (heavy_tails, MinimalReparam(), "loop"),
    "Minimal, latent": (latent_tails, MinimalReparam(), "vmap"),
}

Y = torch.tensor([0.3, -0.8, 1.9, 0.2], dtype=torch.float64)


def points(energy: Energy, *batch: int, seed: int = 3) -> Tensor:
    return torch.randn(*batch, *energy.event_shape, generator=torch.Generator().manual_seed(seed))


def check_against_pyro(model: Callable[..., Any]) -> ModelEnergy:
    energy = ModelEnergy(model, Y)
    u = points(energy, 3)
    with pyro.validation_enabled(False):  # as pyro.infer.MCMC does
        potential = initialize_model(model, (Y,), max_plate_nesting=1)[1]
        theirs = torch.stack([potential(energy.split(row)).detach() for row in u])
    torch.testing.assert_close(energy(u).detach(), theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(energy.unconstrain(energy.constrain(u)), u)
    return energy


@pytest.mark.filterwarnings("ignore:the model:RuntimeWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_reparametrized_model_has_pyros_potential(name: str) -> None:
    model, config, way = MODELS[name]
    energy = check_against_pyro(poutine.reparam(model, config=config))
    assert energy.batching == way
    start = energy.initial(4, torch.Generator().manual_seed(0))
    assert torch.isfinite(value_and_grad(energy, start)[1]).all()


def fitted(model: Callable[..., Any], guide: Any, num_steps: int) -> Any:
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(Y)
    return guide


def test_neutra_is_sampled() -> None:
    neutra = NeuTraReparam(fitted(schools, AutoIAFNormal(schools, hidden_dim=[8]), 50))
    energy = check_against_pyro(neutra.reparam(schools))
    mcmc = MCMC(NUTS(), num_samples=5, warmup_steps=20, num_chains=4, seed=0)
    mcmc.run(energy)
    (latent,) = mcmc.get_samples().values()
    assert {k: v.shape for k, v in neutra.transform_sample(latent[0]).items()} == {
        "mu": (),
        "tau": (),
        "theta": (4,),
    }


def normal(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc.sum(), scale), obs=y)


@pytest.mark.parametrize("kind", [AutoNormal, AutoLaplaceApproximation])
def test_chains_start_from_a_guide(kind: Any) -> None:
    guide = fitted(normal, kind(normal), 200)
    if kind is AutoLaplaceApproximation:
        guide = guide.laplace_approximation(Y)
    energy = ModelEnergy(normal, Y)
    median = guide.median(Y)
    u = energy.initial(2, torch.Generator().manual_seed(0), init_to_value(values=median))
    for name, value in energy.constrain(u).items():
        torch.testing.assert_close(value, median[name].expand(value.shape).detach())
    draws = [guide(Y) for _ in range(8)]
    start = energy.unconstrain(
        {name: torch.stack([draw[name] for draw in draws]).detach() for name in energy.sites}
    )
    mcmc = MCMC(NUTS(), num_samples=5, warmup_steps=10, num_chains=8, seed=0)
    mcmc.run(energy, start)
    assert torch.isfinite(mcmc.get_samples()["loc"]).all()
