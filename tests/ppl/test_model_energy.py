"""A Pyro model as an energy: its density is the trace's, whatever is in the model, and our kernels
sample it."""

from __future__ import annotations

import functools
import math
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from lib.graphs import data_dependent
from lib.pyro_models import EFFECT, SIGMA, eight_schools, nested_support
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median, init_to_sample, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.fx.experimental.proxy_tensor import make_fx

import pyroebm.infer
from pyroebm import MCMC, NUTS, Boltzmann, ModelEnergy
from pyroebm.core import Energy, PotentialFn, Unnormalized, value_and_grad
from pyroebm.core._torch_private import PerturbedRounding
from pyroebm.core.compilation import Compiled, choose_compiled, fused
from pyroebm.core.energy import unchecked_value_and_grad
from pyroebm.core.rowwise import MAX_GRAPHS
from pyroebm.core.statistics import mcse_mean
from pyroebm.infer.potential import PotentialEnergy
from pyroebm.targets import BernoulliProduct, DoubleWell

pytestmark = pytest.mark.usefixtures("float64")


def test_a_typing_error_in_the_sites_of_initial_values_is_named() -> None:
    energy = ModelEnergy(eight_schools, torch.tensor(EFFECT), torch.tensor(SIGMA))
    right = init_to_value(values={"mu": torch.tensor(6.0)})
    assert energy.initial(2, init_strategy=right).shape[0] == 2
    wrong = init_to_value(values={"mv": torch.tensor(6.0)})
    with pytest.raises(ValueError, match=r"got 'mv'; near ones: \['mu'"):
        energy.initial(2, init_strategy=wrong)


def logistic(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    offset = pyro.sample("offset", dist.StudentT(3.0, 0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope + offset), obs=y)


def dirichlet_categorical(c: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", len(c)):
        pyro.sample("c", dist.Categorical(p), obs=c)


def correlated(x: Tensor) -> None:
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    with pyro.plate("columns", 3):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample(
            "x",
            dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[..., None] * cholesky),
            obs=x,
        )


def gaussian_process(t: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.InverseGamma(3.0, 3.0))
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    kernel = variance * torch.exp(-((t[:, None] - t) ** 2) / (2 * length**2)) + (
        noise + 1e-3
    ) * torch.eye(len(t))
    pyro.sample(
        "y",
        dist.MultivariateNormal(torch.zeros(len(t)), scale_tril=torch.linalg.cholesky(kernel)),
        obs=y,
    )


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("bend", -((x[0] ** 2 - x[1]) ** 2))


def hierarchy(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.StudentT(freedom + 1, 0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def directions(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    mean = pyro.sample("mean", dist.VonMises(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.VonMises(mean, 1 + 10 * share), obs=y)


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample(
            "y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, 1.0)), obs=y
        )


def weighted(y: Tensor) -> None:
    """Scale, mask, parameter, sequential and nested plates."""
    spread = pyro.param("spread", torch.tensor(1.5), constraint=constraints.positive)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    rows, copies = pyro.plate("data", len(y), dim=-2), pyro.plate("copies", 2, dim=-1)
    with rows, copies, poutine.scale(scale=3.0), poutine.mask(mask=(y > 0)[:, None]):
        z = pyro.sample("z", dist.LogNormal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, spread), obs=y[:, None].expand(-1, 2))
    for i in pyro.plate("steps", 2):
        pyro.sample(f"step_{i}", dist.Exponential(1.0 + i))


def reparametrised(y: Tensor) -> None:
    with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mean, 2.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def varying_slopes(x: Tensor, y: Tensor, group: Tensor) -> None:
    """Correlated offsets and slopes of groups."""
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(2, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with pyro.plate("groups", 4):
        effects = pyro.sample(
            "effects",
            dist.MultivariateNormal(torch.zeros(2), scale_tril=scale[:, None] * cholesky),
        )
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effects[group, 0] + effects[group, 1] * x, 1.0), obs=y)


def correlations() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Pyro's older name of LKJCholesky
        cholesky = pyro.sample("cholesky", dist.LKJCorrCholesky(4, torch.tensor(3.0)))
    matrix = pyro.sample("matrix", dist.LKJ(3, 2.0))
    pyro.factor("f", -(cholesky.sum() ** 2) - (matrix @ matrix).sum())


def counts(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    logits = pyro.sample("logits", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("total", dist.Multinomial(10, p), obs=y[0])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Multinomial(10, logits=logits), obs=y)


def mixed_counts(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Multinomial(10, p))
        pyro.sample("y", parts, obs=y)


def imputed(y: Tensor) -> None:
    """Values of y below 0 are missing; each depends on the one before."""
    missing = y < 0
    known = bool(missing.any()) and not torch.equal(y, -y)
    filled = y.clone()
    if known:
        gaps = dist.Normal(0.0, 2.0).expand([int(missing.sum())]).to_event(1)
        filled[missing] = pyro.sample("gaps", gaps)
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    level = torch.zeros(len(y))
    level[0] = drift
    for t in range(1, len(y)):
        level[t] += 0.9 * filled[t - 1]
    level += drift
    pyro.sample("filled", dist.Normal(level, 1.0).to_event(1), obs=filled)
    pyro.sample("known", dist.Normal(drift, 1.0).expand([len(y)]).mask(~missing), obs=y)


def sparse_counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(torch.ones(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Poisson(rate, is_sparse=True).to_event(1), obs=y)


def branching() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x if x > 0 else 2 * x, 1.0), obs=torch.tensor(0.3))


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


COUNTS = torch.tensor([[3.0, 0.0, 7.0], [1.0, 2.0, 7.0]], dtype=torch.float64)


MODELS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "logistic": (logistic, lambda: (data(50, 3), (data(50) > 0).double())),
    "dirichlet_categorical": (
        dirichlet_categorical,
        lambda: (data(30).abs().floor().long().clamp(max=2),),
    ),
    "correlated": (correlated, lambda: (data(20, 3),)),
    "gaussian_process": (gaussian_process, lambda: (torch.linspace(0, 3, 10), data(10))),
    "banana": (banana, tuple),
    "hierarchy": (hierarchy, lambda: (data(12),)),
    "directions": (directions, lambda: (data(20),)),
    "mixture": (mixture, lambda: (data(20),)),
    "weighted": (weighted, lambda: (data(6),)),
    "reparametrised": (reparametrised, lambda: (data(5),)),
    "varying_slopes": (varying_slopes, lambda: (data(12), data(12) + 1.0, torch.arange(12) % 4)),
    "correlations": (correlations, tuple),
    "counts": (counts, lambda: (COUNTS,)),
    "mixed_counts": (mixed_counts, lambda: (COUNTS,)),
    "imputed": (imputed, lambda: (data(8),)),
    "sparse_counts": (sparse_counts, lambda: (COUNTS[0],)),
}


def points(energy: Energy, *batch: int, seed: int = 3) -> Tensor:
    return torch.randn(*batch, *energy.event_shape, generator=torch.Generator().manual_seed(seed))


def plain_density(
    model: Callable[..., Any], args: tuple[Any, ...], energy: ModelEnergy, u: Tensor
) -> Tensor:
    """One row by Pyro alone: the supports of a trace, condition, trace, the Jacobian written
    out."""
    supports = poutine.trace(model).get_trace(*args).nodes
    u = u.detach().requires_grad_(True)
    values, log_det = {}, torch.tensor(0.0)
    for name, part in energy.split(u).items():
        transform = biject_to(supports[name]["fn"].support)
        values[name] = transform(part)
        log_det = log_det + transform.log_abs_det_jacobian(part, values[name]).sum()
    with pyro.validation_enabled(False):
        total = (
            poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()
            + log_det
        )
    return torch.stack([-total.detach(), *torch.autograd.grad(-total, u)[0]])


def check_density(energy: ModelEnergy, model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    u = points(energy, 5)
    with pyro.validation_enabled(False):
        expected = torch.stack([plain_density(model, args, energy, row) for row in u])
    values, grad = value_and_grad(energy, u)
    torch.testing.assert_close(
        torch.cat([values[:, None], grad], 1), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", MODELS)
def test_density_is_that_of_the_trace(name: str) -> None:
    model, make = MODELS[name]
    args = make()
    energy = ModelEnergy(model, *args)
    assert energy.batching == "graph"
    check_density(energy, model, args)
    with pyro.validation_enabled(False):  # as pyro.infer.MCMC does
        potential = initialize_model(model, args)[1]
        u = points(energy, 4, seed=5)
        theirs = torch.stack([potential(energy.split(row)).detach() for row in u])
    torch.testing.assert_close(energy(u).detach(), theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        energy(u.reshape(2, 2, -1)).detach().flatten(), theirs, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(energy(u[0]).detach(), theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        PotentialFn(energy)({"x": u[0]}).detach(), theirs[0], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_those_of_a_loop_and_can_be_compiled(name: str) -> None:
    model, make = MODELS[name]
    with pyro.validation_enabled(False):  # as pyro.infer.MCMC does
        start, potential, transforms, _ = initialize_model(model, make(), num_chains=2)
    for energy in (ModelEnergy(model, *make()), PotentialEnergy(potential, start, transforms)):
        u = points(energy, 5)
        assert energy.batching == "graph"
        assert not data_dependent(energy, u)
        found = value_and_grad(energy, u)
        energy.batching = "loop"
        torch.testing.assert_close(found, value_and_grad(energy, u), rtol=1e-10, atol=1e-10)


def gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    return unchecked_value_and_grad(energy, x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("name", ["varying_slopes", "counts"])
def test_gradients_of_models_with_masks_are_compiled(name: str) -> None:
    model, make = MODELS[name]
    energy = ModelEnergy(model, *make())
    u = points(energy, 4)
    torch.testing.assert_close(
        fused(gradient, Compiled(energy), u), value_and_grad(energy, u), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", MODELS)
def test_latents_come_and_go(name: str) -> None:
    model, make = MODELS[name]
    energy = ModelEnergy(model, *make())
    u = points(energy, 2, 3)
    values = energy.constrain(u)
    assert {site: value.shape[2:] for site, value in values.items()} == energy.sites
    assert {site: value.shape for site, value in energy.split(u).items()} == {
        k: (2, 3, *v) for k, v in energy.shapes.items()
    }
    torch.testing.assert_close(energy.unconstrain(values), u)
    torch.testing.assert_close(energy.join(energy.split(u)), u)
    assert torch.isfinite(energy(energy.initial(16, torch.Generator().manual_seed(0)))).all()


@pytest.mark.parametrize("name", ["logistic", "weighted"])
def test_an_energy_can_be_traced_and_transformed_from_outside(name: str) -> None:
    model, make = MODELS[name]
    energy = ModelEnergy(model, *make())
    u, fresh = points(energy, 4), points(energy, 4, seed=9)

    def by_autograd(x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_grad(energy, x)

    def by_functorch(x: Tensor) -> tuple[Tensor, Tensor]:
        grad, _ = torch.func.grad_and_value(lambda x: energy(x).sum())(x)
        return energy(x), grad

    def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.vmap(lambda r: torch.func.grad_and_value(energy)(r)[::-1])(x)

    expected = value_and_grad(energy, fresh)
    for function in (by_autograd, by_functorch, by_rows):
        torch.testing.assert_close(function(fresh), expected)
        torch.testing.assert_close(make_fx(function)(u)(fresh), expected)


# What breaks the density is seen


class WithoutJacobian(ModelEnergy):
    jacobians = 0.0

    def row_energy(self, u: Tensor) -> Tensor:
        _, places = self._run(self.split(u))
        return super().row_energy(u) + (1.0 - self.jacobians) * places.log_det


class JacobianTwice(WithoutJacobian):
    jacobians = 2.0


class SiteBySite(ModelEnergy):
    """A sum over sites that leaves scales out, or a site."""

    dropped = ""

    def row_energy(self, u: Tensor) -> Tensor:
        trace, places = self._run(self.split(u))
        with pyro.validation_enabled(False):
            sites = [
                s
                for s in trace.nodes.values()
                if s["type"] == "sample" and s["name"] != self.dropped
            ]
            return -(sum(s["fn"].log_prob(s["value"]).sum() for s in sites) + places.log_det)


class DroppedSite(SiteBySite):
    dropped = "y"


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (WithoutJacobian, "hierarchy"),
        (JacobianTwice, "hierarchy"),
        (SiteBySite, "weighted"),
        (DroppedSite, "hierarchy"),
    ],
)
def test_mutants_are_caught(mutant: type[ModelEnergy], name: str) -> None:
    model, make = MODELS[name]
    args = make()
    with pytest.raises(AssertionError, match="not close"):
        check_density(mutant(model, *args), model, args)


def clamped_support() -> None:
    n = pyro.sample("n", dist.LogNormal(3.0, 1.0))
    pyro.sample("b", dist.Uniform(torch.zeros_like(n), n.clamp(min=5.0)))


def clamped_by_python() -> None:
    n = pyro.sample("n", dist.LogNormal(3.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, n if n > 5.0 else torch.tensor(5.0)))


@pytest.mark.filterwarnings("ignore:the model 'clamped_by_python':RuntimeWarning")
@pytest.mark.parametrize("model", [clamped_support, clamped_by_python])
def test_a_support_that_varies_far_from_the_origin_is_followed(model: Any) -> None:
    """At the states near 0 with which the model is tried, the support is constant."""
    energy = ModelEnergy(model)
    assert energy.transforms is None
    found = energy.constrain(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    expected = torch.tensor([2.5, math.exp(4.0) / 2.0])
    torch.testing.assert_close(found["b"], expected)


def test_a_support_that_has_the_shape_of_a_latent_is_fixed() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        high = torch.ones_like(x) + x.new_ones(2)
        pyro.sample("b", dist.Uniform(torch.zeros_like(x), high).to_event(1))

    energy = ModelEnergy(model)
    assert energy.transforms is not None
    torch.testing.assert_close(energy.constrain(torch.zeros(4))["b"], torch.ones(2))


# Constants


def test_parameters_arguments_and_modules_are_read_again_when_they_change() -> None:
    y = torch.tensor([1.0, 2.0])
    layer = nn.Linear(1, 1, bias=False)

    def model(y: Tensor, scales: dict[str, Tensor]) -> None:
        spread = pyro.param("spread", torch.tensor(1.5), constraint=constraints.positive)
        pyro.module("layer", layer)
        x = pyro.sample("x", dist.Normal(0.0, scales["prior"]))
        pyro.sample("y", dist.Normal(layer(x[None]), spread).expand([2]).to_event(1), obs=y)

    scales = {"prior": torch.tensor(2.0)}
    energy = ModelEnergy(model, y, scales)
    u = points(energy, 3)

    def expected() -> Tensor:
        likelihood = dist.Normal(layer.weight * u, pyro.param("spread")).log_prob(y).sum(-1)
        return -(likelihood + dist.Normal(0.0, scales["prior"]).log_prob(u[:, 0])).detach()

    before = expected()
    torch.testing.assert_close(energy(u).detach(), before)
    seen = [before]
    with torch.no_grad():
        for change in (
            lambda: layer.weight.mul_(2.0),
            lambda: y.add_(1.0),
            lambda: scales["prior"].fill_(0.5),
            lambda: pyro.get_param_store().__setitem__("spread", torch.tensor(0.7)),
        ):
            change()
            assert not torch.allclose(expected(), seen[-1])
            seen.append(expected())
            torch.testing.assert_close(energy(u).detach(), seen[-1])
    values, _ = value_and_grad(energy, u)
    assert not values.requires_grad
    assert layer.weight.grad is None


class Scaled(nn.Module):
    """A module with a model as a method, of parameters and a buffer of a given size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))

    def model(self) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (self.weight * x + self.shift).sum())


def model_of(module: Scaled) -> None:
    module.model()


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("way", ["argument", "method", "handled", "partial"])
def test_parameters_of_modules_that_are_given_are_read_again(way: str, size: int) -> None:
    module = Scaled(size)
    if way == "argument":
        energy = ModelEnergy(model_of, module)
    elif way == "partial":
        energy = ModelEnergy(functools.partial(model_of, module))
    else:
        handled = poutine.scale(module.model, scale=1.0)
        energy = ModelEnergy(module.model if way == "method" else handled)
    u = torch.ones(2, 1)
    prior = -float(dist.Normal(0.0, 1.0).log_prob(torch.ones(())))
    with torch.no_grad():
        assert float(energy(u)[0]) == pytest.approx(prior - size)
        module.weight.add_(1.0)
        assert float(energy(u)[0]) == pytest.approx(prior - 2 * size)
        module.shift.add_(1.0)
        assert float(energy(u)[0]) == pytest.approx(prior - 3 * size)


@pytest.mark.parametrize("size", [2, 100])
def test_globals_are_read_once(size: int) -> None:
    """Constants that are used as they are, and those computed before, stay of one time."""
    data = torch.ones(size)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (data * x).sum() + data.exp().sum())

    energy, u = ModelEnergy(model), torch.ones(2, 1)
    before = energy(u)
    data.add_(1.0)
    torch.testing.assert_close(energy(u), before)


def test_few_graphs_are_kept() -> None:
    energy = ModelEnergy(banana)
    for n in range(1, 2 * MAX_GRAPHS):
        assert energy(points(energy, n)).shape == (n,)
    assert len(energy._graphs) == MAX_GRAPHS


def test_states_take_the_type_of_the_density(float64: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    single = ModelEnergy(hierarchy, data(4))
    assert single.dtype == torch.float32
    assert single.initial(2).dtype == torch.float32
    double = ModelEnergy(hierarchy, data(4).double())
    torch.set_default_dtype(torch.float64)
    assert double.dtype == torch.float64
    assert value_and_grad(double, double.initial(2))[1].dtype == torch.float64


def test_globals_stay_as_they_were() -> None:
    state, validating = torch.get_rng_state(), dist.Normal._validate_args
    generator = torch.Generator().manual_seed(0)
    energy = ModelEnergy(hierarchy, data(4))
    for strategy in (None, init_to_median, init_to_sample):
        first = energy.initial(3, torch.Generator().manual_seed(1), strategy)
        torch.testing.assert_close(
            energy.initial(3, torch.Generator().manual_seed(1), strategy), first
        )
        assert not torch.equal(energy.initial(3, generator, strategy), first)
    value_and_grad(energy, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert dist.Normal._validate_args == validating
    # without a generator it is torch's global one
    assert not torch.equal(energy.initial(3), energy.initial(3))
    with poutine.trace() as outer:
        energy(first)
    assert not outer.trace.nodes


# Models that vmap cannot run


def test_a_branch_on_a_latent_runs_chain_by_chain_and_says_so() -> None:
    with pytest.warns(
        RuntimeWarning, match=r"model 'branching'.*chain by chain.*data-dependent control"
    ) as caught:
        energy = ModelEnergy(branching)
    assert len(caught) == 1
    assert energy.batching == "loop"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_density(energy, branching, ())


@pytest.mark.filterwarnings("ignore:the model 'branch_below':RuntimeWarning")
@pytest.mark.parametrize("branch", [False, True])
def test_a_support_that_depends_on_a_latent_is_followed(branch: bool) -> None:
    def branch_below() -> None:
        nested_support()
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x if x > 0 else 2 * x, 1.0), obs=torch.tensor(0.3))

    energy = ModelEnergy(branch_below if branch else nested_support)
    assert energy.batching == ("loop" if branch else "graph")
    u = points(energy, 3, 2)
    x = energy.constrain(u)
    assert x["below"].shape == (3, 2)
    assert (x["below"] < x["top"]).all()
    torch.testing.assert_close(energy.unconstrain(x), u)
    if not branch:
        top, share = u[..., 0].exp(), torch.sigmoid(u[..., 1])
        # -log Gamma(top; 2, 1) + log top, and the two Jacobians: top, and top * share * (1 - share)
        expected = top - top.log() + top.log() - top.log() - (top * share * (1 - share)).log()
        torch.testing.assert_close(energy(u).detach(), expected)


# What cannot be an energy is refused


def discrete_energy() -> None:
    pyro.sample("bits", Boltzmann(BernoulliProduct(torch.zeros(3))))


def subsampled(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def noisy() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("noise", x * torch.randn(()))


def observed_only() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


class OtherRounding(ModelEnergy):
    """The second evaluation of two rows rounds all its operations in another way."""

    calls = 0

    def row_energy(self, u: Tensor) -> Tensor:
        self.calls += 1
        if self.calls not in {3, 4}:
            return super().row_energy(u)
        with PerturbedRounding(self.calls):
            return super().row_energy(u)

    def _why_not(self, way: str, rows: Tensor, expected: tuple[Tensor, Tensor]) -> str | None:
        return None  # nothing is captured


def saas(x: Tensor, y: Tensor) -> None:
    """A Gaussian process whose inverse length scales are sparse."""
    noise = pyro.sample("noise", dist.Gamma(0.9, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(0.1))
    scales = pyro.sample("scales", dist.HalfCauchy(torch.ones(x.shape[1]).to(x)).to_event(1))
    scaled = x * (tau * scales).sqrt()
    kernel = torch.exp(-0.5 * torch.cdist(scaled, scaled) ** 2)
    covariance = kernel @ kernel / len(x) + (1e-6 + noise) * torch.eye(len(x)).to(x)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_deterministic_model_is_not_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(seed: int) -> OtherRounding:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(12, 3, generator=generator).to(dtype)
        return OtherRounding(saas, x, torch.randn(12, generator=generator).to(dtype))

    torch.set_default_dtype(dtype)
    # 4, and 16 more that estimate the rounding unless the sums are equal by chance
    assert 20 in {fit(seed).calls for seed in range(30)}
    monkeypatch.setattr(OtherRounding, "_rounding", lambda *_: torch.zeros(2))
    with pytest.raises(ValueError, match="a random number that is not a sample site"):
        fit(0)


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        (
            discrete_energy,
            (),
            r"site 'bits' must be continuous or .*but Boltzmann has support .*Boolean",
        ),
        (
            subsampled,
            (torch.zeros(5),),
            r"plate 'rows' must not subsample.* 2 of 5 rows.*drop subsample_size",
        ),
        (observed_only, (), "must have a latent sample site"),
        (noisy, (), "a random number that is not a sample site, drawn by aten.randn"),
        (3, (), "model must be a Pyro model, a callable"),
    ],
)
def test_what_is_no_energy_is_refused(model: Any, args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelEnergy(model, *args)


def test_bad_data_and_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="site 'y'"):
        ModelEnergy(logistic, data(4, 3), torch.full((4,), 2.0))
    energy = ModelEnergy(hierarchy, data(4))
    good = energy.constrain(points(energy, 2))
    with pytest.raises(ValueError, match=r"the sites \['freedom', 'scale', 'z'\], got \['z'\]"):
        energy.unconstrain({"z": good["z"]})
    with pytest.raises(
        ValueError, match=r"site 'z' must have shape \(\*batch, \*\(4,\)\), got \(2, 3\)"
    ):
        energy.unconstrain(good | {"z": good["z"][:, :3]})
    with pytest.raises(ValueError, match=r"variables must be"):
        energy.join({"z": good["z"]})
    with pytest.raises(ValueError, match=r"'z' must have shape"):
        energy.join(energy.split(points(energy, 2)) | {"z": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        energy.initial(0)


def test_starts_that_cannot_be_name_the_site_and_the_value() -> None:
    def far(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 5.0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    energy = ModelEnergy(far, torch.tensor(6.0))
    with pytest.raises(
        ValueError,
        match=r"2 of num_chains=2 chains in 100 attempts.*site 'wall' was -inf where the latents"
        r" were \{'x':",
    ):
        energy.initial(2, torch.Generator().manual_seed(0))
    start = energy.initial(
        2, torch.Generator().manual_seed(0), init_to_value(values={"x": torch.tensor(6.0)})
    )
    torch.testing.assert_close(start, torch.full((2, 1), 6.0))

    def steep() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("root", torch.sqrt(x - x))

    with pytest.raises(ValueError, match=r"gradient in site 'x' nan where the latents were \{'x':"):
        ModelEnergy(steep).initial(1)


# Our kernels on models


def test_mcmc_gives_the_models_own_sites() -> None:
    mcmc = MCMC(NUTS(), num_samples=20, warmup_steps=20, num_chains=4, seed=0)
    energy = ModelEnergy(correlated, data(10, 3))
    mcmc.run(energy)
    samples = mcmc.get_samples(group_by_chain=True)
    assert {name: value.shape for name, value in samples.items()} == {
        "cholesky": (4, 20, 3, 3),
        "scale": (4, 20, 3),
    }
    assert (samples["scale"] > 0).all()
    assert mcmc.get_samples(7)["scale"].shape == (7, 3)
    assert mcmc.diagnostics()["cholesky"]["n_eff"].shape == (3, 3)
    assert mcmc.to_arviz().posterior["scale"].shape == (4, 20, 3)
    state = mcmc.state_dict()
    mcmc.run_more(5)
    resumed = MCMC(NUTS(), num_samples=20, warmup_steps=20, num_chains=4, seed=1)
    resumed.load_state_dict(state, energy)
    resumed.run_more(5)
    torch.testing.assert_close(resumed.get_samples(), mcmc.get_samples(), rtol=0.0, atol=0.0)
    predictive = pyro.infer.Predictive(correlated, mcmc.get_samples(), return_sites=["x"])
    assert predictive(data(10, 3))["x"].shape == (100, 10, 3)


def test_an_energy_inside_a_model_is_sampled_too() -> None:
    """A site that Pyro cannot draw from (see initial_states) is only asked for its density."""
    energy = ModelEnergy(
        lambda: pyro.sample("x", Boltzmann(Unnormalized(lambda x: -(x**4) + 4 * x**2 - x)))
    )
    u = points(energy, 5)
    torch.testing.assert_close(energy(u), DoubleWell().double()(u[:, 0]))


def test_a_latent_below_a_latent_has_its_moments() -> None:
    """top ~ Gamma(2, 1) and below ~ Uniform(0, top): below is Exponential(1)."""
    mcmc = MCMC(NUTS(), num_samples=100, warmup_steps=60, num_chains=64, seed=11)
    mcmc.run(ModelEnergy(nested_support))
    below = mcmc.get_samples(group_by_chain=True)["below"]
    for draws, truth in ((below, 1.0), (below**2, 2.0), ((below < 1.0).double(), 0.6321205588)):
        within_se(draws.mean(), truth, mcse_mean(draws))


def test_compiled_blocks_draw_the_posterior_that_eager_ones_draw() -> None:
    energy = ModelEnergy(eight_schools, torch.tensor(EFFECT), torch.tensor(SIGMA))
    runs = [
        MCMC(NUTS(0.3, max_tree_depth=1), 3, 0, 4, seed=0, compile=compile)
        for compile in (False, True)
    ]
    for mcmc in runs:
        mcmc.run(energy)
    assert [mcmc.compiled for mcmc in runs] == [False, True]
    for site, draws in runs[0].get_samples().items():
        torch.testing.assert_close(runs[1].get_samples()[site], draws, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the model 'branching':RuntimeWarning")
def test_a_model_that_cannot_be_compiled_says_why_and_runs_as_it_is() -> None:
    energy = ModelEnergy(branching)
    with pytest.raises(
        RuntimeError,
        match=r"cannot be compiled \(RuntimeError: .*control flow.*; use compile=False",
    ):
        MCMC(NUTS(), 5, 5, 4, compile=True).run(energy)
    with pytest.warns(
        RuntimeWarning,
        match=r"ModelEnergy cannot be compiled \(RuntimeError: .*control flow.* runs without",
    ):
        assert choose_compiled(energy, "auto", NUTS(), 64, 10**7) is energy


def checked(y: Tensor, validate: bool | None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0, validate_args=validate))
    pyro.sample("y", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=y)


def test_pyros_validation_is_of_the_first_run_and_stops_no_chain() -> None:
    with pyro.validation_enabled(True):
        energy = ModelEnergy(checked, torch.ones(3), None)
        assert energy.batching == "graph"
        # a scale of 0 is one row's affair
        assert energy(torch.tensor([[0.0], [-800.0]])).isfinite().tolist() == [True, False]
        mcmc = MCMC(NUTS(), 20, 20, 4, seed=0)
        mcmc.run(energy, torch.full((4, 1), -3.0))
        ours = pyroebm.infer.MCMC(
            pyroebm.infer.NUTS(checked),
            5,
            5,
            num_chains=2,
            disable_progbar=True,
            disable_validation=False,
        )
        ours.run(torch.ones(3), None)
        with pytest.raises(
            ValueError, match=r"at site 'y':\nExpected value argument .* to be within the support"
        ):
            ModelEnergy(
                lambda y: pyro.sample(
                    "y", dist.Bernoulli(pyro.sample("p", dist.Beta(1.0, 1.0))), obs=y
                ),
                torch.tensor(2.0),
            )
    told = ModelEnergy(checked, torch.ones(3), True)
    assert told.batching == "graph"
    torch.testing.assert_close(told(torch.zeros(2, 1)), energy(torch.zeros(2, 1)))
    assert told(torch.tensor([[0.0], [-800.0]])).isfinite().tolist() == [True, False]


def matrix() -> Tensor:
    return torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def singular(solver: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A matrix that is positive definite above -2, and 0 below."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", solver(matrix() * (x + 2.0).clamp(min=0.0), torch.ones(2)).sum())


#: What is taken of a matrix, and its sum where the matrix is ``scale`` times ``matrix()``.
SOLVERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], float]]] = {
    "cholesky": (
        lambda a, b: torch.linalg.cholesky(a),
        lambda s: s**0.5 * float(torch.linalg.cholesky(matrix()).sum()),
    ),
    "inverse": (lambda a, b: torch.inverse(a), lambda s: 2 / (3 * s)),
    "solve a vector": (torch.linalg.solve, lambda s: 2 / (3 * s)),
    "solve a matrix": (lambda a, b: torch.linalg.solve(a, b[:, None]), lambda s: 2 / (3 * s)),
    "normal": (
        lambda a, b: dist.MultivariateNormal(torch.zeros(2), a).log_prob(b),
        lambda s: float(
            dist.MultivariateNormal(torch.zeros(2), s * matrix()).log_prob(torch.ones(2))
        ),
    ),
}


@pytest.mark.parametrize("way", ["graph", "vmap", "loop"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_matrix_that_is_singular_in_one_row_is_that_rows_affair(name: str, way: str) -> None:
    solver, truth = SOLVERS[name]
    energy = ModelEnergy(singular, solver)
    assert energy.batching == "graph"
    energy.batching = way
    values, grad = value_and_grad(energy, torch.tensor([[-1.0], [-3.0], [-1.5]]))
    assert values.isfinite().tolist() == [True, False, True]
    assert grad[[0, 2]].isfinite().all()
    for value, scale in ((values[0], 1.0), (values[2], 0.5)):
        torch.testing.assert_close(
            value, -dist.Normal(0.0, 1.0).log_prob(torch.tensor(scale - 2.0)) - truth(scale)
        )


def test_a_gaussian_process_survives_a_covariance_without_a_factor() -> None:
    energy = ModelEnergy(gaussian_process, torch.linspace(0, 3, 10), data(10))
    mcmc = MCMC(NUTS(), 30, 50, 16, seed=0)
    mcmc.run(energy)
    assert int(mcmc.get_stats(warmup=True)["diverging"].sum()) > 0
    assert torch.isfinite(mcmc.get_stats()["energy"]).all()


def test_a_tempered_model_keeps_its_sites() -> None:
    energy = 0.5 * ModelEnergy(checked, torch.ones(3), None)
    mcmc = MCMC(NUTS(), 5, 5, 2, seed=0)
    mcmc.run(energy)
    assert set(mcmc.get_samples()) == {"scale"}
    assert (mcmc.get_samples()["scale"] > 0).all()


def test_eight_schools_agrees_with_the_reference() -> None:
    """posteriordb's reference draws of eight_schools_noncentered; its standard errors are at most
    0.056."""
    mcmc = MCMC(NUTS(), num_samples=200, warmup_steps=120, num_chains=64, seed=4)
    mcmc.run(ModelEnergy(eight_schools, torch.tensor(EFFECT), torch.tensor(SIGMA)))
    draws = mcmc.get_samples(group_by_chain=True)
    theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["z"]
    for what, x, truth in (
        ("mu", draws["mu"], 4.4105),
        ("tau", draws["tau"], 3.6021),
        ("theta_1", theta[..., 0], 6.1505),
        ("theta_8", theta[..., 7], 4.8840),
    ):
        se = (float(mcse_mean(x)) ** 2 + 0.056**2) ** 0.5
        assert se < 0.1
        within_se(x.mean(), truth, se, what=what)
