"""Containers of Pyro models: sites, data, dimensions and likelihoods, for our runs and Pyro's."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.infer.mcmc import RandomWalkKernel
from torch import Tensor

from pyroebm import MCMC, NUTS, ModelEnergy, infer
from pyroebm.core.statistics import is_new_arviz
from pyroebm.diagnostics import arviz, from_pyro, summary, to_arviz
from pyroebm.diagnostics.pyro_model import ModelCall, model_groups
from pyroebm.targets import DoubleWell

X = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
Y = torch.tensor([-1.5, -0.4, 0.3, 0.2, 1.8], dtype=torch.float64)
SIGMA = 0.7


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Sites inside and outside of plates, with event dimensions, and deterministic ones."""
    zero = x.new_zeros(())
    mean = pyro.sample("mean", dist.Normal(zero, 1.0))
    with pyro.plate("group", 3):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("pair", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.deterministic("double", 2.0 * effect)
    pyro.deterministic("square", mean**2)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(effect.sum() * x, SIGMA), obs=y)


def drawn(chains: int = 3, draws: int = 20) -> dict[str, Tensor]:
    """Draws of the latent variables, which the model did not make."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"mean": (), "effect": (3,), "pair": (3, 2)}
    return {
        name: torch.randn(chains, draws, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def dims_of(group: Any) -> dict[str, tuple[str, ...]]:
    return {name: variable.dims[2:] for name, variable in group.data_vars.items()}


@pytest.fixture(scope="module")
def run() -> MCMC:
    mcmc = MCMC(NUTS(), num_samples=30, warmup_steps=30, num_chains=3, seed=0, progress=False)
    mcmc.run(ModelEnergy(regression, X, Y))
    return mcmc


def test_a_model_adds_its_sites_data_and_plates(run: MCMC) -> None:
    data = run.to_arviz(log_likelihood=True, coords={"group": ["a", "b", "c"]})
    assert dims_of(data.posterior) == {
        "mean": (),
        "effect": ("group",),
        "pair": ("group", "pair_dim_1"),
        "double": ("group",),
        "square": (),
    }
    draws = run.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(data.posterior["double"], 2.0 * draws["effect"])
    np.testing.assert_array_equal(data.posterior["square"], draws["mean"] ** 2)
    assert list(data.posterior["group"].values) == ["a", "b", "c"]
    assert data.posterior["effect"].sel(group="b").shape == (3, 30)
    assert dims_of(data.warmup_posterior)["effect"] == ("group",)
    np.testing.assert_array_equal(data.observed_data["y"], Y)
    assert data.observed_data["y"].dims == ("data",)
    np.testing.assert_array_equal(data.constant_data["x"], X)
    assert set(data.constant_data.data_vars) == {"x"}
    loc = draws["effect"].sum(-1, keepdim=True) * X
    expected = torch.distributions.Normal(loc, SIGMA).log_prob(Y)
    np.testing.assert_allclose(data.log_likelihood["y"], expected, rtol=1e-12)
    assert dims_of(data.log_likelihood) == {"y": ("data",)}
    assert "diverging" in data.sample_stats


def test_the_likelihood_is_computed_on_request_only(run: MCMC) -> None:
    data = run.to_arviz()
    assert not hasattr(data, "log_likelihood")
    assert set(run.summary().index.str.replace(r"\[.*", "", regex=True)) == {
        "mean",
        "effect",
        "pair",
    }
    energy = MCMC(NUTS(), num_samples=5, warmup_steps=5, num_chains=2, seed=0, progress=False)
    energy.run(DoubleWell())
    assert set(energy.to_arviz(coords={}).posterior.data_vars) == {"x"}
    with pytest.raises(ValueError, match="log_likelihood=True requires a Pyro model"):
        energy.to_arviz(log_likelihood=True)


def test_draws_from_the_prior_and_the_predictive_have_their_groups(run: MCMC) -> None:
    prior = infer.Predictive(regression, num_samples=7)(X)
    predictive = infer.Predictive(regression, run.get_samples(), return_sites=["y"])(X)
    data = run.to_arviz(prior=prior, posterior_predictive=predictive, dims={"pair": ["g", "side"]})
    assert set(data.prior.data_vars) == {"mean", "effect", "pair", "double", "square"}
    assert set(data.prior_predictive.data_vars) == {"y"}
    assert data.prior["mean"].shape == (1, 7)  # Predictive returns (7, 1)
    assert dims_of(data.prior) == dims_of(data.posterior)
    assert dims_of(data.posterior)["pair"] == ("g", "side")  # the user's names win
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(data.posterior_predictive["y"], predictive["y"].reshape(3, 30, 5))
    grouped = {"y": predictive["y"].reshape(3, 30, 5)}
    assert run.to_arviz(posterior_predictive=grouped).posterior_predictive["y"].shape == (3, 30, 5)
    with pytest.raises(ValueError, match=r"posterior_predictive\['y'\] must have shape \(90, "):
        run.to_arviz(posterior_predictive={"y": predictive["y"][:80]})


def test_draws_for_other_data_may_have_another_size(run: MCMC) -> None:
    predictive = infer.Predictive(regression, run.get_samples(), return_sites=["y"])(X[:2])
    data = run.to_arviz(posterior_predictive=predictive)
    assert data.posterior_predictive["y"].sizes["data"] == 2
    assert data.observed_data["y"].sizes["data"] == 5


def test_the_drop_in_has_the_same_groups() -> None:
    mcmc = infer.MCMC(
        infer.NUTS(regression), 20, num_chains=2, save_params=["mean"], disable_progbar=True
    )
    pyro.set_rng_seed(0)
    mcmc.run(X, y=Y)
    data = mcmc.to_arviz(log_likelihood=True, coords={"data": list("abcde")})
    assert set(data.posterior.data_vars) == {"mean", "double", "square"}
    assert data.log_likelihood["y"].shape == (2, 20, 5)
    assert list(data.observed_data["data"].values) == list("abcde")
    assert set(data.constant_data.data_vars) == {"x"}


def scaled(y: Tensor, mask: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)), pyro.poutine.scale(scale=0.5), pyro.poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    pyro.factor("penalty", -(loc**2))
    with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3):
        pyro.sample("table", dist.Normal(loc, 1.0), obs=y.new_ones(4, 3))
    for i in pyro.plate("times", 2):
        pyro.sample(f"z_{i}", dist.MultivariateNormal(loc.expand(2), torch.eye(2).to(y)), obs=y[:2])


def test_likelihoods_are_those_of_the_posterior() -> None:
    """Scales and masks count, an event is one observation, a factor is none."""
    mask = torch.tensor([True, False, True, True, True])
    draws = {"loc": torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()}
    groups = model_groups(ModelCall(scaled, (Y, mask)), draws, log_likelihood=True)
    likelihood = groups["log_likelihood"]
    assert {name: value.shape[2:] for name, value in likelihood.items()} == {
        "y": (5,),
        "table": (4, 3),
        "z_0": (),
        "z_1": (),
    }
    assert groups["dims"]["table"] == ["rows", "columns"]
    normal = torch.distributions.Normal(draws["loc"].unsqueeze(-1), 1.0)
    torch.testing.assert_close(likelihood["y"], 0.5 * mask * normal.log_prob(Y))
    torch.testing.assert_close(likelihood["z_1"], normal.log_prob(Y[:2]).sum(-1))
    energy = ModelEnergy(scaled, Y, mask)
    loc = draws["loc"]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(loc) - loc**2
    total = sum(value.reshape(2, 6, -1).sum(-1) for value in likelihood.values()) + prior
    torch.testing.assert_close(total, -energy(loc.unsqueeze(-1)))
    assert set(groups["observed_data"]) == {"y", "table", "z_0", "z_1"}
    assert set(groups["constant_data"]) == {"mask"}
    assert to_arviz(**groups).log_likelihood["z_0"].dims == ("chain", "draw")


def without_plates(y: Tensor) -> None:
    """Observations that broadcast, a number as an observation, and a truth value."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
    pyro.deterministic("positive", loc > 0.0)
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    with pyro.validation_enabled(False):
        pyro.sample("number", dist.Normal(loc, 1.0, validate_args=False), obs=0.5)
    with pyro.plate("same", 4):
        pyro.sample("each", dist.Normal(loc, 1.0).mask(True), obs=y[0])
        pyro.deterministic("pair", loc + y.new_zeros(2))


def test_observations_may_broadcast() -> None:
    draws = {"loc": drawn()["mean"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = model_groups(ModelCall(without_plates, (Y,)), draws, log_likelihood=True)
    likelihood = groups["log_likelihood"]
    normal = torch.distributions.Normal(draws["loc"].unsqueeze(-1), 1.0)
    torch.testing.assert_close(likelihood["y"], normal.log_prob(Y))
    torch.testing.assert_close(likelihood["number"], normal.log_prob(Y.new_tensor([0.5]))[..., 0])
    torch.testing.assert_close(likelihood["each"], normal.log_prob(Y[:1]).expand(3, 20, 4))
    assert torch.equal(groups["posterior"]["positive"], draws["loc"] > 0.0)
    data = to_arviz(**groups)
    assert dims_of(data.posterior)["pair"] == ("pair_dim_0",)  # not the plate, of another size
    assert data.log_likelihood["y"].dims[2:] == data.observed_data["y"].dims == ("y_dim_0",)
    assert data.observed_data["number"].dims == ()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ModelCall(regression, (X, Y))
    whole = model_groups(call, drawn(), log_likelihood=True)["log_likelihood"]["y"]
    monkeypatch.setattr("pyroebm.diagnostics.pyro_model.MAX_ENTRIES", 7 * 25)
    parts = model_groups(call, drawn(), log_likelihood=True)["log_likelihood"]["y"]
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0.0)


def branching(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(y.new_zeros(()), 1.0))
    pyro.deterministic("sign", x.new_tensor(1.0 if x > 0 else -1.0))
    pyro.sample("y", dist.Normal(x if x > 0 else -2.0 * x, 1.0), obs=y)


def test_a_model_that_branches_runs_draw_by_draw_and_says_so() -> None:
    draws = {"x": torch.tensor([[1.0, -1.0], [0.5, -2.0]], dtype=torch.float64)}
    with pytest.warns(RuntimeWarning, match="'branching' cannot be vectorized"):
        groups = model_groups(ModelCall(branching, (Y[0],)), draws, log_likelihood=True)
    torch.testing.assert_close(groups["posterior"]["sign"], draws["x"].sign())
    loc = torch.where(draws["x"] > 0, draws["x"], -2.0 * draws["x"])
    torch.testing.assert_close(
        groups["log_likelihood"]["y"], torch.distributions.Normal(loc, 1.0).log_prob(Y[0])
    )


def mixture(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.deterministic("shift", z + loc)
        pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)


def test_without_draws_of_a_latent_variable_nothing_random_is_reported() -> None:
    call = ModelCall(mixture, (Y,))
    loc = drawn()["mean"]
    with pytest.warns(RuntimeWarning, match=r"sites \['shift'\] are left out, .* \['z'\] have no"):
        groups = model_groups(call, {"loc": loc})
    assert set(groups["posterior"]) == {"loc"}
    assert set(groups["observed_data"]) == {"y"}
    with pytest.raises(ValueError, match=r"draws of all latent variables, but \['z'\] have none"):
        model_groups(call, {"loc": loc}, log_likelihood=True)
    loc = loc.flatten().float()  # the type of the Bernoulli
    both = infer.Predictive(mixture, {"loc": loc}, infer_discrete=True)(Y.float())
    torch.testing.assert_close(both["shift"], both["z"] + loc[:, None])


def reserved(y: Tensor) -> None:
    with pyro.plate("draw", len(y)):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_names_that_would_hide_something_are_caught() -> None:
    draws = drawn()
    groups = model_groups(ModelCall(reserved, (Y,)), {"x": torch.zeros(3, 20, 5).double()})
    assert to_arviz(**groups).posterior["x"].dims == ("chain", "draw", "x_dim_0")
    for wrong, said in (
        ({"dims": {"effects": ["group"]}}, r"dims must name variables of .* got \['effects'\]"),
        ({"coords": {"groups": "abc"}}, r"coords must name dimensions of .* got \['groups'\]"),
        ({"dims": {"mean": ["group"]}}, r"dims\['mean'\] must have at most 0 names"),
        (
            {"dims": {"effect": ["g"], "pair": [None, "g"]}},
            r"'g' must have one size in posterior, got 3 and, in 'pair', 2",
        ),
        (
            {"dims": {"effect": ["g"]}, "coords": {"g": "ab"}},
            r"coords\['g'\] must have 3 labels for posterior, got 2",
        ),
        ({"predictions": {}}, r"groups must be of .* got \['predictions'\]"),
    ):
        with pytest.raises(ValueError, match=said):
            to_arviz(draws, **wrong)
    with pytest.raises(ValueError, match=r"name of a dimension, got \['draw'\] in posterior"):
        to_arviz({"draw": draws["mean"]})


def mean_of_normals(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, SIGMA), obs=y)


def exact_leave_one_out(y: np.ndarray) -> np.ndarray:
    """log p(y_i | the others) of normal data of known variance and a N(0, 2^2) prior."""
    total, found = y.sum(), []
    for value in y:
        precision = 1 / 4 + (len(y) - 1) / SIGMA**2
        mean = (total - value) / SIGMA**2 / precision
        variance = 1 / precision + SIGMA**2
        found.append(-0.5 * math.log(2 * math.pi * variance) - (value - mean) ** 2 / 2 / variance)
    return np.array(found)


def leave_one_out(data: Any) -> np.ndarray:
    found = arviz().loo(data, pointwise=True)
    return np.asarray(found.elpd_i if is_new_arviz() else found.loo_i)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_against_the_closed_form() -> None:
    y = torch.tensor([0.3, -0.6, 1.1, 0.9, 2.6, -0.2, 0.5, 0.1], dtype=torch.float64)
    mcmc = MCMC(NUTS(), num_samples=400, warmup_steps=200, num_chains=64, seed=3, progress=False)
    mcmc.run(ModelEnergy(mean_of_normals, y))
    data = mcmc.to_arviz(log_likelihood=True)
    assert leave_one_out(data).shape == (8,)
    draws = mcmc.get_samples(group_by_chain=True)["mean"]
    groups = [
        leave_one_out(
            to_arviz(
                **model_groups(
                    ModelCall(mean_of_normals, (y,)), {"mean": part}, log_likelihood=True
                )
            )
        )
        for part in draws.split(2)
    ]
    estimates = np.stack(groups)
    exact = exact_leave_one_out(y.numpy())
    within_se(estimates.mean(0), exact, estimates.std(0, ddof=1) / math.sqrt(len(estimates)))
    total = estimates.sum(1)
    within_se(total.mean(), exact.sum(), total.std(ddof=1) / math.sqrt(len(estimates)))
    # what a likelihood of the draws themselves would give is far off
    inside = torch.distributions.Normal(draws.unsqueeze(-1), SIGMA).log_prob(y).exp().mean((0, 1))
    assert abs(float(inside.log().sum()) - exact.sum()) > 5 * total.std() / 4


class WithoutDivergences(RandomWalkKernel):
    def diagnostics(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("kernel", [RandomWalkKernel, WithoutDivergences])
def test_a_kernel_of_pyro_without_divergences(kernel: Any) -> None:
    mcmc = PyroMCMC(kernel(regression), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(X, Y)
    data = from_pyro(mcmc, log_likelihood=True)
    assert data.posterior["effect"].dims == ("chain", "draw", "group")
    assert data.log_likelihood["y"].shape == (1, 5, 5)
    assert data.attrs["inference_library"] == "pyro"
    stats = data.sample_stats.data_vars if hasattr(data, "sample_stats") else {}
    assert "diverging" not in stats


@pytest.mark.filterwarnings("ignore:num_chains=12 is more than available_cpu")
def test_statistics_of_pyro_belong_to_their_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted as text, chain 10 comes before chain 2."""
    mcmc = PyroMCMC(
        pyro.infer.NUTS(potential_fn=lambda z: 0.5 * z["x"] ** 2),
        num_samples=4,
        warmup_steps=2,
        num_chains=12,
        initial_params={"x": torch.zeros(12)},
        disable_progbar=True,
    )
    draws = {"x": torch.arange(48.0).reshape(12, 4)}
    monkeypatch.setattr(mcmc, "get_samples", lambda group_by_chain: draws)
    found = {
        "divergences": {f"chain {c}": [3] if c == 10 else [] for c in range(12)},
        "acceptance rate": {f"chain {c}": c / 12 for c in range(12)},
        "x": {"n_eff": torch.tensor(1.0)},
    }
    monkeypatch.setattr(mcmc, "diagnostics", lambda: found)
    data = from_pyro(mcmc)
    np.testing.assert_array_equal(data.posterior["x"], draws["x"])
    assert bool(data.sample_stats["diverging"].sel(chain=10, draw=3))
    assert int(data.sample_stats["diverging"].sum()) == 1
    np.testing.assert_allclose(data.sample_stats["acceptance_rate"][:, 0], np.arange(12) / 12)
    with pytest.raises(ValueError, match="log_likelihood=True requires a Pyro model"):
        from_pyro(mcmc, log_likelihood=True)


def test_a_run_of_pyro_is_the_same_as_one_of_ours() -> None:
    mcmc = PyroMCMC(pyro.infer.NUTS(regression), 10, 10, disable_progbar=True)
    mcmc.run(X, y=Y)
    prior = pyro.infer.Predictive(regression, num_samples=6)(X)
    predictive = pyro.infer.Predictive(regression, mcmc.get_samples())(X)
    data = from_pyro(mcmc, log_likelihood=True, prior=prior, posterior_predictive=predictive)
    assert dims_of(data.posterior) == {
        "mean": (),
        "effect": ("group",),
        "pair": ("group", "pair_dim_1"),
        "double": ("group",),
        "square": (),
    }
    assert data.sample_stats["diverging"].shape == (1, 10)
    rate = mcmc.diagnostics()["acceptance rate"]["chain 0"]
    np.testing.assert_allclose(data.sample_stats["acceptance_rate"], rate)
    assert data.prior["mean"].shape == (1, 6)
    assert data.posterior_predictive["y"].shape == (1, 10, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(summary(data)) == 14


def test_containers_can_be_written_and_read(run: MCMC, tmp_path: Any) -> None:
    data = run.to_arviz(log_likelihood=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.to_netcdf(str(tmp_path / "run.nc"))
        again = arviz().from_netcdf(str(tmp_path / "run.nc"))
    np.testing.assert_array_equal(again.log_likelihood["y"], data.log_likelihood["y"])
