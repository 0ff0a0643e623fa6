"""Discrete latent variables are summed out of a model's energy: as by brute force, as in Pyro."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from pyro import poutine
from pyro.infer import Predictive, config_enumerate, infer_discrete
from pyro.infer.autoguide.initialization import init_to_median, init_to_sample, init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import biject_to

import pyroebm.infer
from pyroebm import MCMC, NUTS, ModelEnergy
from pyroebm.core import Energy, value_and_grad
from pyroebm.core.statistics import mcse_mean
from pyroebm.ppl import sum_product

pytestmark = pytest.mark.usefixtures("float64")


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[z], scales[z]), obs=y)


@config_enumerate(default="parallel", expand=True)
def annotated(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 2.0))
    a = pyro.sample("a", dist.Bernoulli(p))
    b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(a - 2 * b, 1 + p), obs=y)


def hidden_markov(y: Tensor, history: int = 1) -> None:
    rows = torch.ones(2, 3) + torch.eye(2, 3)
    probs = pyro.sample("probs", dist.Dirichlet(rows @ torch.ones(3, 2)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    before = z = torch.tensor(0)
    for t in pyro.markov(range(len(y)), history=history):
        p = probs[z] if history == 1 else 0.5 * (probs[z] + probs[before])
        before, z = z, pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=y[t])


def second_order(y: Tensor) -> None:
    hidden_markov(y, history=2)


def sequences(y: Tensor) -> None:
    """Hidden Markov models in a plate, of different lengths."""
    stay = pyro.sample("stay", dist.Beta(2.0, 1.0))
    lengths = torch.tensor([2, 3])
    with pyro.plate("sequences", 2, dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z == 0, 1 - stay, stay)))
                z = z.long()
                pyro.sample(f"y_{t}", dist.Normal(2.0 * z, 1.0), obs=y[t])


def crossed(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    b = pyro.sample("b", dist.Categorical(torch.tensor([0.6, 0.4])))
    pyro.factor("both", -loc[0] * a * b)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc[a] * (1 + b), 1.0), obs=y)


def binomial(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        n = pyro.sample("n", dist.Binomial(3, p))
        pyro.sample("y", dist.Normal(n, 1.0 + p), obs=y)


def one_hot(y: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal((z * locs).sum(-1), 1.0), obs=y)


def nested_plates(y: Tensor) -> None:
    """A class of each group decides the classes of its rows."""
    p = pyro.sample("p", dist.Beta(torch.ones(2), 2.0).to_event(1))
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 2, dim=-2):
        c = pyro.sample("c", dist.Bernoulli(0.3))
        with pyro.plate("rows", 3, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(Vindex(p)[c.long()]))
            pyro.sample("y", dist.Normal(shift * z + c, 1.0), obs=y)


def sequential_plate(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    for i in pyro.plate("data", 3):
        z = pyro.sample(f"z_{i}", dist.Bernoulli(p))
        pyro.sample(f"y_{i}", dist.Normal(2 * z, 1.0), obs=y[i])


def scaled_and_masked(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.scale(scale=0.5):
        with poutine.mask(mask=y > 0):
            z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(loc * z, 1.0).mask(y < 1), obs=y)


def half_observed(y: Tensor) -> None:
    """The first two classes are known."""
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    known = torch.arange(len(y)) < 2
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(p), obs=torch.ones(len(y)), obs_mask=known)
        pyro.sample("y", dist.Normal(3 * z, 1.0), obs=y)


def selected(y: Tensor) -> None:
    """Continuous latent variables in the plate of the data, of which discrete ones select."""
    with pyro.plate("components", 2, dim=-2), pyro.plate("data", len(y), dim=-1):
        x = pyro.sample("x", dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0))
    with pyro.plate("rows", len(y), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.3)).long()
        pyro.sample("y", dist.Normal(Vindex(x)[z, torch.arange(len(y))], 0.5), obs=y)


def forbidden(y: Tensor) -> None:
    """State 2 cannot be reached, and state 1 cannot be left."""
    logits = pyro.sample("logits", dist.Normal(0.0, 1.0))
    table = torch.full((3, 3), -torch.inf)
    table = torch.where(
        torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]) > 0, logits.sigmoid(), table
    )
    z = torch.tensor(0)
    for t in pyro.markov(range(3)):
        before, z = z, pyro.sample(f"z_{t}", dist.Categorical(torch.ones(3)))
        pyro.factor(f"step_{t}", table[before, z])
        pyro.sample(f"y_{t}", dist.Normal(logits * z, 1.0), obs=y[t])


def below(y: Tensor) -> None:
    """The prior of a continuous latent variable depends on a discrete one."""
    z = pyro.sample("z", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(3 * z, 1.0 + z))
    with pyro.plate("data", len(y)):
        w = pyro.sample("w", dist.LogNormal(z, 1.0))
        pyro.sample("y", dist.Normal(x * w, 1.0), obs=y)


def asks_for_sequential(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
    b = pyro.sample("b", dist.Bernoulli(0.6), infer={"enumerate": "parallel", "num_samples": 5})
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * z + b, 1.0), obs=y)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) + 0.5


MODELS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "mixture": (mixture, data(4)),
    "annotated": (annotated, data()),
    "hidden_markov": (hidden_markov, data(3)),
    "second_order": (second_order, data(4)),
    "sequences": (sequences, data(3, 2)),
    "crossed": (crossed, data(3)),
    "binomial": (binomial, data(3)),
    "one_hot": (one_hot, data(3)),
    "nested_plates": (nested_plates, data(2, 3)),
    "sequential_plate": (sequential_plate, data(3)),
    "scaled_and_masked": (scaled_and_masked, data(4)),
    "half_observed": (half_observed, data(4)),
    "selected": (selected, data(3)),
    "forbidden": (forbidden, data(3)),
    "below": (below, data(2)),
    "asks_for_sequential": (asks_for_sequential, data()),
}

#: Pyro gives a continuous variable below a discrete one as many values as the discrete one has, of
#: which all but one have no prior; and it draws sites that ask for sequential enumeration.
NOT_PYROS = {"below", "asks_for_sequential"}


def points(energy: Energy, *batch: int, seed: int = 3) -> Tensor:
    return torch.randn(*batch, *energy.event_shape, generator=torch.Generator().manual_seed(seed))


def assignments(model: Callable[..., Any], y: Tensor) -> list[dict[str, Tensor]]:
    """All values of all discrete latent variables, each entry of a plate apart."""
    sites = [
        site
        for site in poutine.trace(model).get_trace(y).nodes.values()
        if site["type"] == "sample"
        and not site["is_observed"]
        and getattr(site["fn"], "has_enumerate_support", False)
    ]
    each = []
    for site in sites:
        fn = site["fn"]
        support = fn.enumerate_support(expand=False)
        rows = support.reshape(len(support), *fn.event_shape)
        values = itertools.product(rows, repeat=fn.batch_shape.numel())
        each.append([torch.stack(v).reshape(fn.batch_shape + fn.event_shape) for v in values])
    names = [site["name"] for site in sites]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*each)]


def by_brute_force(energy: ModelEnergy, model: Callable[..., Any], y: Tensor, u: Tensor) -> Tensor:
    """The energy of one row: a sum over all assignments, each a trace without enumeration."""
    supports = poutine.trace(model).get_trace(y).nodes
    values, log_det = {}, torch.tensor(0.0)
    for name, part in energy.split(u).items():
        transform = biject_to(supports[name]["fn"].support)
        values[name] = transform(part)
        log_det = log_det + transform.log_abs_det_jacobian(part, values[name]).sum()
    terms = [
        poutine.trace(poutine.condition(model, values | assigned)).get_trace(y).log_prob_sum()
        for assigned in assignments(model, y)
    ]
    return -(torch.logsumexp(torch.stack(terms), 0) + log_det)


def check_density(energy: ModelEnergy, model: Callable[..., Any], y: Tensor) -> None:
    u = points(energy, 3)
    with pyro.validation_enabled(False):
        expected = torch.stack([by_brute_force(energy, model, y, row) for row in u])
    torch.testing.assert_close(energy(u).detach(), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_energy_is_the_sum_over_all_values(name: str) -> None:
    model, y = MODELS[name]
    energy = ModelEnergy(model, y)
    assert energy.batching == "graph"
    assert set(energy.enumerated) == set(assignments(model, y)[0])
    check_density(energy, model, y)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    model, y = MODELS[name]
    energy = ModelEnergy(model, y)
    u = points(energy, 2)
    _, grad = value_and_grad(energy, u)
    steps = 1e-5 * torch.eye(u.shape[-1])
    ahead, behind = energy(u[:, None] + steps), energy(u[:, None] - steps)
    torch.testing.assert_close(grad, ((ahead - behind) / 2e-5).detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(MODELS) - NOT_PYROS))
def test_the_energy_is_pyros_potential(name: str) -> None:
    model, y = MODELS[name]
    energy = ModelEnergy(model, y)
    u = points(energy, 3, seed=5)
    with pyro.validation_enabled(False):  # as pyro.infer.MCMC does
        potential = initialize_model(model, (y,))[1]
        theirs = torch.stack([potential(energy.split(row)).detach() for row in u])
    torch.testing.assert_close(energy(u).detach(), theirs, rtol=1e-9, atol=1e-9)


def test_far_from_the_data_no_term_underflows() -> None:
    """Pyro multiplies exp(-200**2 / 2) by exp(0), and takes the log of 0."""
    terms = torch.tensor([[0.0, -800.0], [-800.0, 0.0]], requires_grad=True)
    value = sum_product.einsum("a,a->", *terms)
    torch.testing.assert_close(value, torch.tensor(-800.0 + math.log(2.0)))
    (grad,) = torch.autograd.grad(value, terms)
    torch.testing.assert_close(grad, torch.full((2, 2), 0.5))


# What breaks the sum is seen


def maximum(x: Tensor, dims: list[int]) -> Tensor:
    return x.amax(dims)


def mean(x: Tensor, dims: list[int]) -> Tensor:
    sizes = torch.tensor([x.shape[d] for d in dims])
    return x.logsumexp(dims) - sizes.prod().log()


@pytest.mark.parametrize("name", ["mixture", "hidden_markov", "nested_plates"])
@pytest.mark.parametrize("mutant", [maximum, mean])
def test_mutants_are_caught(
    name: str, mutant: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sum_product, "log_sum_exp", mutant)
    model, y = MODELS[name]
    with pytest.raises(AssertionError, match="not close"):
        check_density(ModelEnergy(model, y), model, y)


def test_mutant_gradients_of_impossible_states_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_product, "log_sum_exp", lambda x, dims: x.logsumexp(dims))
    energy = ModelEnergy(*MODELS["forbidden"])
    _, grad = value_and_grad(energy, points(energy, 2))
    assert grad.isnan().any()


# What cannot be summed out is refused


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    n = pyro.sample("n", dist.Poisson(rate))
    pyro.sample("y", dist.Normal(n, 1.0), obs=y)


def bits(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    z = pyro.sample("bits", dist.Bernoulli(p).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


def large(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    total = x
    for i in range(8):
        total = total + pyro.sample(f"z_{i}", dist.Categorical(torch.ones(1000)))
    pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def no_plate(y: Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + z, 1.0).expand([3]), obs=y)


def bounded(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Uniform(0.0, 1.0 + z))


def only_discrete(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def crossing_plates(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(0.3))
    with columns:
        b = pyro.sample("b", dist.Bernoulli(0.3))
    with rows, columns:
        pyro.sample("y", dist.Normal(x * a * b, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "y", "said"),
    [
        (counts, data(), r"site 'n' must be continuous or have a finite support .*Poisson has"
         r" support .*truncate it to a Categorical.*GammaPoisson"),
        (bits, data(), r"site 'bits' must be .*Bernoulli.*pyro\.plate instead of.*to_event"),
        (large, data(), r"shape \(1000, 1000, 1000\), 1,000,000,000 entries, .*'z_0' \(1000"
         r" values\).* and 2 more.*pyro\.markov"),
        (no_plate, data(3), r"site 'y' has batch shape \(3,\) in 0 plates: enclose it in"),
        (bounded, data(), r"support of site 'x' must not depend on a discrete site"),
        (crossing_plates, data(2, 2), r"plates \['columns', 'rows'\] some .*cross.*sequential"),
        (only_discrete, data(), r"continuous latent sample site, but has only .*\['z'\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_summed_out_is_refused(
    model: Callable[..., Any], y: Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ModelEnergy(model, y)


def test_plates_may_be_left_room_for() -> None:
    energy = ModelEnergy(mixture, data(4), max_plate_nesting=3)
    assert energy.max_plate_nesting == 3
    check_density(energy, mixture, data(4))
    with pytest.raises(ValueError, match=r"max_plate_nesting must be at least 1, .*got.*=0"):
        ModelEnergy(mixture, data(4), max_plate_nesting=0)


def test_a_support_may_depend_on_a_continuous_site() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        below = pyro.sample("below", dist.Uniform(0.0, top))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z * below, 1.0), obs=y)

    energy = ModelEnergy(model, data())
    u = points(energy, 4)
    values = energy.constrain(u)
    assert (values["below"] < values["top"]).all()
    torch.testing.assert_close(energy.unconstrain(values), u)


@pytest.mark.parametrize("strategy", [init_to_median, init_to_uniform, init_to_sample])
def test_starts_by_a_strategy_have_the_shapes_of_draws(strategy: Callable[..., Any]) -> None:
    for model in (mixture, below):
        energy = ModelEnergy(model, data(4))
        start = energy.initial(3, torch.Generator().manual_seed(0), strategy)
        assert torch.isfinite(energy(start)).all()


def test_an_impossible_start_is_blamed_on_its_site() -> None:
    def wall(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.factor("some", torch.where(z == 0, -torch.inf, 0.0))
        pyro.factor("wall", torch.where(x + z > 50.0, 0.0, -torch.inf))

    energy = ModelEnergy(wall, data())
    with pytest.raises(ValueError, match="log-density of site 'wall' was -inf"):
        energy.initial(2, torch.Generator().manual_seed(0))


# Our kernels on such models


def two_normals(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc * z, 1.0), obs=y)


Y = torch.tensor([-0.5, 0.3, 2.1, 2.9, 0.1, 3.3], dtype=torch.float64)


def test_nuts_draws_the_posterior_of_a_mixture() -> None:
    grid = torch.linspace(-15.0, 15.0, 20001)
    likelihood = 0.7 * torch.exp(-(Y**2) / 2) + 0.3 * torch.exp(-((Y - grid[:, None]) ** 2) / 2)
    density = likelihood.prod(-1) * torch.exp(-(grid**2) / 18)
    density = density / density.sum()
    mcmc = MCMC(NUTS(), num_samples=200, warmup_steps=200, num_chains=32, seed=2)
    mcmc.run(ModelEnergy(two_normals, Y))
    loc = mcmc.get_samples(group_by_chain=True)["loc"]
    for draws, value in ((loc, grid), (loc**2, grid**2), ((loc > 2).double(), grid > 2)):
        within_se(draws.mean(), float((density * value).sum()), mcse_mean(draws))


def test_discrete_variables_are_inferred_from_the_draws() -> None:
    pyro.set_rng_seed(0)
    mcmc = pyroebm.infer.MCMC(
        pyroebm.infer.NUTS(two_normals), 50, 50, num_chains=8, disable_progbar=True
    )
    mcmc.run(Y)
    draws = mcmc.get_samples()
    assert set(draws) == {"loc"}

    def for_each_draw(y: Tensor) -> None:
        with pyro.plate("draws", len(draws["loc"]), dim=-2):
            two_normals(y)

    given = poutine.condition(config_enumerate(for_each_draw), {"loc": draws["loc"][:, None]})
    posterior = infer_discrete(given, first_available_dim=-3)
    z = poutine.trace(posterior).get_trace(Y).nodes["z"]["value"]
    one = 0.3 * torch.exp(-((Y - draws["loc"][:, None]) ** 2) / 2)
    p = one / (one + 0.7 * torch.exp(-(Y**2) / 2))
    assert z.shape == p.shape
    within_se(z.mean(0), p.mean(0), (p * (1 - p)).mean(0).sqrt() / len(p) ** 0.5)

    best = infer_discrete(
        poutine.condition(config_enumerate(two_normals), {"loc": draws["loc"][0]}),
        first_available_dim=-2,
        temperature=0,
    )
    found = poutine.trace(best).get_trace(Y).nodes["z"]["value"]
    assert torch.equal(found, (p[0] > 0.5).double())
    prior = Predictive(two_normals, draws, return_sites=["z", "y"])(Y)
    assert prior["z"].shape == (400, 6)
    within_se(prior["z"].mean(), 0.3, (0.21 / 2400) ** 0.5)


def long_chain(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0))
    locs = pyro.sample("locs", dist.Normal(torch.arange(4.0), 0.5).to_event(1))
    table = (1 - stay) / 3 * torch.ones(4, 4) + (stay - (1 - stay) / 3) * torch.eye(4)
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(table[z]))
        pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=y[t])


def test_a_hidden_markov_model_of_a_hundred_steps() -> None:
    y = data(100) + 1.5
    energy = ModelEnergy(long_chain, y)
    assert energy.batching == "graph"
    u = points(energy, 4)
    values = energy.constrain(u)
    for i, value in enumerate(energy(u).tolist()):  # the forward algorithm
        stay, locs = values["stay"][i], values["locs"][i]
        table = torch.full((4, 4), float(1 - stay) / 3)
        table.fill_diagonal_(float(stay))
        state, total = torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.0
        for x in y:
            state = (state @ table) * torch.exp(dist.Normal(locs, 1.0).log_prob(x))
            total += math.log(state.sum())
            state = state / state.sum()
        prior = dist.Beta(4.0, 1.0).log_prob(stay) + torch.log(stay * (1 - stay))
        prior = prior + dist.Normal(torch.arange(4.0), 0.5).log_prob(locs).sum()
        assert value == pytest.approx(-float(prior) - total, rel=1e-10)
    mcmc = MCMC(NUTS(max_tree_depth=3), num_samples=3, warmup_steps=3, num_chains=4, seed=0)
    mcmc.run(energy)
    assert torch.isfinite(mcmc.get_samples()["locs"]).all()
