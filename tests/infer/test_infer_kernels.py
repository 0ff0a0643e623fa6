"""HMC and NUTS as kernels of Pyro: moved step by step by a caller, or by Pyro's own MCMC."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from lib.checks import within_se
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc import ArrowheadMassMatrix
from torch import Tensor

import pyroebm
import pyroebm.targets
from pyroebm.core.statistics import mcse_mean
from pyroebm.infer import HMC, MCMC, NUTS
from pyroebm.infer.mass_matrix import Blocks

pytestmark = pytest.mark.usefixtures("float64")

KERNELS = {"hmc": (HMC, {"trajectory_length": 2.0}), "nuts": (NUTS, {})}


def gamma_poisson(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


Y = [2.0, 4.0, 3.0]
MEAN, SECOND = 11 / 4, 11 * 12 / 16  # the posterior is Gamma(11, 4)


def density(u: Tensor) -> Tensor:
    """Energy of u = log(rate), up to a constant."""
    return 4.0 * u.exp() - 11.0 * u


@pytest.mark.parametrize("name", KERNELS)
def test_a_caller_moves_a_chain(name: str) -> None:
    kind, settings = KERNELS[name]
    kernel = kind(gamma_poisson, **settings)
    assert isinstance(kernel, pyro.infer.HMC)
    assert isinstance(kernel, pyro.infer.NUTS) == (kind is NUTS)
    pyro.set_rng_seed(0)
    kernel.setup(100, torch.tensor(Y))
    params, draws = kernel.initial_params, []
    for i in range(500):
        params = kernel.sample(params)
        if i >= 100:
            draws.append(params["rate"].exp())
    x = torch.stack(draws)[None]
    for f, truth in ((x, MEAN), (x**2, SECOND)):
        within_se(f.mean(), truth, mcse_mean(f))
    # what Pyro's kernels have
    assert list(kernel.logging()) == ["step size", "acc. prob"]
    found = kernel.diagnostics()
    assert found["divergences"] == []
    assert 0.5 < found["acceptance rate"] <= 1.0
    assert kernel.step_size != 1.0
    assert kernel.inverse_mass_matrix[("rate",)].shape == (1,)
    torch.testing.assert_close(kernel.transforms["rate"].inv(params["rate"]), x[0, -1])
    u = torch.tensor([0.3, 0.9])
    found = [kernel.potential_fn({"rate": v}) for v in u]
    torch.testing.assert_close(found[0] - found[1], density(u[0]) - density(u[1]))
    torch.testing.assert_close(kernel._potential_energy_last, kernel.potential_fn(params))
    kernel.cleanup()
    assert kernel.initial_params is None
    assert kernel.potential_fn is None
    assert kernel.step_size != 1.0


@pytest.mark.parametrize("name", KERNELS)
def test_pyros_own_driver_runs_our_kernels(name: str) -> None:
    kind, settings = KERNELS[name]
    kernel = kind(gamma_poisson, **settings)
    pyro.set_rng_seed(0)
    mcmc = pyro.infer.MCMC(kernel, num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(torch.tensor(Y))
    x = mcmc.get_samples(group_by_chain=True)["rate"]
    within_se(x.mean(), MEAN, mcse_mean(x))
    assert set(mcmc.diagnostics()) == {"rate", "divergences", "acceptance rate"}
    # with Pyro's classes, the second MCMC of one kernel takes the potential of the first for given
    pyro.infer.MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True).run(
        torch.tensor(Y)
    )


def test_a_chain_starts_where_it_is_told() -> None:
    kernel = NUTS(gamma_poisson)
    kernel.initial_params = {"rate": torch.tensor(0.4)}
    kernel.setup(5, torch.tensor(Y))
    assert kernel.initial_params == {"rate": torch.tensor(0.4)}
    kernel.cleanup()
    kernel.setup(5, torch.tensor(Y))
    assert kernel.initial_params["rate"] != 0.4
    value = torch.tensor(3.0)
    kernel = NUTS(gamma_poisson, init_strategy=init_to_value(values={"rate": value}))
    kernel.setup(5, torch.tensor(Y))
    torch.testing.assert_close(kernel.initial_params["rate"].exp(), value)
    kernel = HMC(potential_fn=lambda params: params["x"] ** 2)
    with pytest.raises(ValueError, match="potential_fn requires initial_params"):
        kernel.setup(0)
    with pytest.raises(ValueError, match=r"there is no chain: call setup"):
        kernel.sample({"x": torch.zeros(())})


@pytest.mark.parametrize("in_place", [False, True])
def test_a_changed_value_is_where_the_chain_continues(in_place: bool) -> None:
    """Without the comparison, the step starts from the old value, or with its energy."""
    kernel = HMC(
        potential_fn=lambda params: density(params["u"]),
        step_size=1e-6,
        num_steps=1,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    kernel.initial_params = {"u": torch.tensor(0.5)}
    kernel.setup(0)
    params = kernel.sample(kernel.initial_params)
    if in_place:
        params["u"].add_(1.0)
    else:
        params = {"u": params["u"] + 1.0}
    params = kernel.sample(params)
    torch.testing.assert_close(params["u"], torch.tensor(1.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(kernel._potential_energy_last, density(params["u"]))
    assert kernel.diagnostics()["acceptance rate"] > 0.99


def test_a_potential_that_changed_is_evaluated_again_without_the_cache() -> None:
    scale = torch.ones(())
    kernel = NUTS(potential_fn=lambda params: density(params["u"]) * scale)
    kernel.initial_params = {"u": torch.tensor(0.5)}
    kernel.setup(0)
    energy = float(kernel._potential_energy_last)
    kernel.clear_cache()
    assert float(kernel._potential_energy_last) == energy


def test_a_potential_is_a_tensor_of_one_element() -> None:
    start = {"x": torch.zeros(8, 1, 2)}
    kernel = NUTS(potential_fn=lambda params: params["x"].square().sum()[None, None])
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, 5, 5, start, num_chains=8, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (40, 1, 2)
    kernel = NUTS(potential_fn=lambda params: params["x"].square())
    with pytest.raises(ValueError, match=r"potential_fn must return a tensor of one element.*1, 2"):
        MCMC(kernel, 5, 5, start, num_chains=8, disable_progbar=True).run()


# Mass matrices

COV = torch.eye(4, dtype=torch.float64)
COV[0, 1] = COV[1, 0] = 0.8
COV[1, 2] = COV[2, 1] = 0.4
SHAPES = {"b": torch.Size([2]), "a": torch.Size([]), "c": torch.Size([1])}


def correlated() -> None:
    """Four coordinates, in the order b, a, c, with the covariance COV."""
    flat = [
        pyro.sample(name, dist.Normal(torch.zeros(shape), 1e3).to_event(len(shape)))
        for name, shape in SHAPES.items()
    ]
    joint = dist.MultivariateNormal(torch.zeros(4), COV)
    x = torch.cat([part.reshape(-1) for part in flat])
    pyro.factor("joint", joint.log_prob(x))


@pytest.mark.parametrize(
    ("full_mass", "order"),
    [
        (False, {("a", "b", "c"): [2, 0, 1, 3]}),
        (True, {("a", "b", "c"): [2, 0, 1, 3]}),
        ([("b",)], {("b",): [0, 1], ("a", "c"): [2, 3]}),
        ([("b", "a"), ("c",)], {("b", "a"): [0, 1, 2], ("c",): [3]}),
        ([], {("a", "b", "c"): [2, 0, 1, 3]}),
    ],
)
def test_mass_matrices_have_the_blocks_asked_for(
    full_mass: Any, order: dict[tuple[str, ...], list[int]]
) -> None:
    kernel = NUTS(correlated, full_mass=full_mass)
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, 20, 300, num_chains=32, disable_progbar=True)
    mcmc.run()
    found = kernel.inverse_mass_matrix
    assert list(found) == list(order)
    dense = [("a", "b", "c")] if full_mass is True else list(full_mass or [])
    for block, entries in order.items():
        truth = COV[entries][:, entries]
        truth = truth if block in dense else truth.diagonal()
        # 32 chains x 175 draws of the last window; the least ESS of a square is a fifth of them
        within_se(found[block], truth, torch.full_like(truth, (2 / 1000) ** 0.5))
    inverse = mcmc._run.kernel.inverse_mass
    assert isinstance(inverse, Tensor) != bool(dense)
    if dense:
        whole = inverse.factor @ inverse.factor.mT
        block_of = {entry: i for i, entries in enumerate(order.values()) for entry in entries}
        for i in range(4):
            for j in range(4):
                together = block_of[i] == block_of[j] and list(order)[block_of[i]] in dense
                assert (whole[i, j] != 0.0) == (i == j or (together and bool(whole[i, j])))
    x = mcmc.get_samples(group_by_chain=True)["b"]
    within_se(x.mean((0, 1)), torch.zeros(2), mcse_mean(x))


def test_blocks_and_kernels_have_the_same_inverse_mass() -> None:
    for full_mass in (False, True, [("b",)], [("c", "b")]):
        blocks = Blocks(full_mass, SHAPES)
        matrices = {
            block: torch.eye(len(entries)) * 2.0 + 0.5
            if block in blocks.dense
            else torch.arange(1.0, 1.0 + len(entries))
            for block, entries in blocks.entries.items()
        }
        again = blocks.matrices(blocks.inverse_mass(matrices), torch.zeros(4))
        for block, matrix in matrices.items():
            torch.testing.assert_close(again[block], matrix)


def test_the_mass_matrix_can_be_set_between_two_steps() -> None:
    kernel = HMC(correlated, step_size=0.1, num_steps=1, adapt_step_size=False)
    pyro.set_rng_seed(0)
    kernel.setup(0)
    adapter = kernel.mass_matrix_adapter
    assert adapter.mass_matrix_size == {("a", "b", "c"): 4}
    # the inverse mass is the square of the step of each coordinate, in the order a, b, c
    adapter.inverse_mass_matrix = {("a", "b", "c"): torch.tensor([1.0, 1e-20, 1e-20, 1.0])}
    torch.testing.assert_close(
        kernel.inverse_mass_matrix[("a", "b", "c")], torch.tensor([1.0, 1e-20, 1e-20, 1.0])
    )
    before = kernel.initial_params
    after = kernel.sample(before)
    assert (after["b"] - before["b"]).abs().max() < 1e-9
    assert abs(float(after["a"] - before["a"])) > 1e-6
    velocity = adapter.kinetic_grad({"a": torch.ones(()), "b": torch.ones(2), "c": torch.ones(1)})
    torch.testing.assert_close(velocity["a"], torch.tensor(1.0))
    torch.testing.assert_close(velocity["b"], torch.tensor([1e-20, 1e-20]))


def test_an_arrowhead_mass_matrix_is_a_dense_one() -> None:
    kernel = NUTS(correlated)
    with pytest.warns(RuntimeWarning, match=r"an arrowhead mass matrix is not available: a dense"):
        kernel.mass_matrix_adapter = ArrowheadMassMatrix()
    kernel.setup(0)
    assert kernel.inverse_mass_matrix[("a", "b", "c")].shape == (4, 4)


# What is refused or ignored


def test_slice_sampling_is_said_to_be_multinomial() -> None:
    with pytest.warns(RuntimeWarning, match="use_multinomial_sampling=False is ignored"):
        NUTS(correlated, use_multinomial_sampling=False)


def test_none_is_pyros_step_size() -> None:
    assert NUTS(correlated, step_size=None).step_size == 1.0
    kernel = HMC(correlated, step_size=None, trajectory_length=1.0)
    assert kernel.num_steps == 1
    assert HMC(correlated, step_size=0.1).num_steps == int(2 * math.pi / 0.1)
    assert HMC(correlated, step_size=0.1, num_steps=3).num_steps == 3
    assert HMC(correlated, step_size=0.1, trajectory_length=0.45, num_steps=3).num_steps == 4


@pytest.mark.parametrize(
    ("full_mass", "said"),
    [
        ("b", r"full_mass must be True, False, or a list of tuples"),
        ([("b",), ("b",)], r"each site at most once"),
        (["b"], r"a list of tuples of names"),
        ([()], r"a list of tuples of names"),
        ([("bb",)], r"full_mass must name latent sites, \['a', 'b', 'c'\], got \['bb'\]; did you"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(full_mass: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NUTS(correlated, full_mass=full_mass).setup(10)


@pytest.mark.parametrize("kind", [NUTS, HMC])
def test_an_energy_is_no_model(kind: Any) -> None:
    said = rf"got the energy DoubleWell: sample it by pyroebm\.{kind.__name__}, in pyroebm\.MCMC"
    assert hasattr(pyroebm, kind.__name__)
    with pytest.raises(ValueError, match=said):
        kind(pyroebm.targets.DoubleWell())


def test_a_mass_matrix_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the structure of a mass matrix is given by full_mass"):
        NUTS(correlated).mass_matrix_adapter = object()
    with pytest.raises(ValueError, match="can be set after setup"):
        NUTS(correlated).mass_matrix_adapter.inverse_mass_matrix = {}


def test_supports_that_depend_on_a_latent_variable_have_no_transforms() -> None:
    def nested() -> None:
        x = pyro.sample("x", dist.Uniform(1.0, 2.0))
        pyro.sample("y", dist.Uniform(0.0, x))

    kernel = NUTS(nested)
    kernel.setup(0)
    with pytest.raises(ValueError, match=r"run the kernel in pyroebm\.infer\.MCMC"):
        kernel.transforms  # noqa: B018
