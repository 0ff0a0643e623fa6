"""MCMC and StreamingMCMC: hooks, other kernels of Pyro, what other packages read, our options."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from lib.checks import within_se
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.mcmc import RandomWalkKernel
from pyro.ops.streaming import StackStats, StatsOfDict
from torch import Tensor

import pyroebm
from pyroebm.core import FileError
from pyroebm.core.statistics import arviz, is_new_arviz, mcse_mean
from pyroebm.infer import HMC, MCMC, NUTS, StreamingMCMC
from pyroebm.infer.driver import ChainName

pytestmark = pytest.mark.usefixtures("float64")


def normal_normal(y: Tensor) -> None:
    """The posterior of mu is N(sum(y) / (n + 1), 1 / (n + 1))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.deterministic("double", 2.0 * scale)


Y = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
OPTIONS: dict[str, Any] = {"disable_progbar": True}


def drawn(kind: Any = MCMC, kernel: Any = None, samples: int = 10, **options: Any) -> Any:
    kernel = NUTS(normal_normal) if kernel is None else kernel
    mcmc = kind(kernel, samples, 10, **OPTIONS, **options)
    mcmc.run(Y)
    return mcmc


# Pyro's classes


def test_results_are_instances_of_pyros_classes() -> None:
    assert issubclass(MCMC, pyro.infer.MCMC)
    assert issubclass(StreamingMCMC, pyro.infer.mcmc.StreamingMCMC)


@pytest.mark.parametrize("chains", [1, 2])
def test_other_kernels_of_pyro_are_run_by_pyro(chains: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)  # chains in this process
    pyro.set_rng_seed(0)
    kernel = RandomWalkKernel(normal_normal)
    with (
        pytest.warns(UserWarning, match="available_cpu") if chains > 1 else contextlib.nullcontext()
    ):
        mcmc = MCMC(kernel, 800, 200, num_chains=chains, **OPTIONS)
    mcmc.run(Y)
    x = mcmc.get_samples(group_by_chain=True)["mu"]
    assert x.shape == (chains, 800)
    within_se(x.mean(), Y.sum() / 4, mcse_mean(x))
    assert len(mcmc.diagnostics()["acceptance rate"]) == chains
    mcmc.summary()
    with pytest.raises(ValueError, match=r"this needs draws of NUTS or HMC of pyroebm\.infer"):
        mcmc.get_stats()
    stream = StreamingMCMC(RandomWalkKernel(normal_normal), 20, 5, **OPTIONS)
    stream.run(Y)
    assert stream.get_statistics()[0, "mu"]["count"] == 20


def test_a_kernel_with_a_setup_of_its_own_is_moved_by_it() -> None:
    calls = []

    class Counted(NUTS):
        def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
            calls.append((warmup_steps, len(args)))
            super().setup(warmup_steps, *args, **kwargs)

    mcmc = drawn(kernel=Counted(normal_normal))
    assert calls == [(10, 1)]
    assert mcmc.get_samples()["mu"].shape == (10,)
    with pytest.raises(ValueError, match="seed requires a kernel that runs in this package"):
        MCMC(Counted(normal_normal), 10, seed=0)


# Models without latent variables


@pytest.mark.parametrize("kind", [MCMC, StreamingMCMC])
@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("potential", [False, True])
def test_a_model_without_latent_variables_runs(kind: Any, chains: int, potential: bool) -> None:
    calls = []

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        assert params == {}
        calls.append((stage, i))

    kernel = NUTS(potential_fn=lambda _: torch.zeros(())) if potential else NUTS(lambda y: None)
    start = {"initial_params": {}} if potential else {}
    mcmc = drawn(kind, kernel, 3, num_chains=chains, hook_fn=hook, **start)
    names = [""] if chains == 1 else [" [0]", " [1]"]
    assert calls == [
        (stage + name, i)
        for name in names
        for stage, count in (("Warmup", 10), ("Sample", 3))
        for i in range(count)
    ]
    if kind is MCMC:
        assert mcmc.get_samples() == {}
        mcmc.summary()
    assert mcmc.diagnostics()["divergences"] == {f"chain {c}": [] for c in range(chains)}
    kernel.initial_params = {}
    kernel.setup(2, Y)
    assert kernel.sample({}) == {}


# Hooks


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_a_hook_sees_each_chain_as_a_chain_of_pyros(kernel: Any, chains: int) -> None:
    calls: list[tuple[str, int]] = []
    values: dict[int, list[Tensor]] = {c: [] for c in range(chains)}

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        assert params["mu"].shape == ()
        torch.testing.assert_close(kernel._potential_energy_last, kernel.potential_fn(params))
        assert set(kernel.logging()) == {"step size", "acc. prob"}
        assert kernel.step_size > 0
        assert list(kernel.inverse_mass_matrix) == [("mu", "scale")]
        calls.append((stage, i))
        if stage.startswith("Sample"):
            values[(len(calls) - 1) % chains].append(params["mu"])

    mcmc = drawn(kernel=kernel(normal_normal), samples=4, num_chains=chains, hook_fn=hook)
    names = [""] if chains == 1 else [f" [{c}]" for c in range(chains)]
    assert calls == [
        (stage + name, i)
        for stage, count in (("Warmup", 10), ("Sample", 4))
        for i in range(count)
        for name in names
    ]
    x = mcmc.get_samples(group_by_chain=True)["mu"]
    torch.testing.assert_close(x, torch.stack([torch.stack(values[c]) for c in range(chains)]))


@pytest.mark.parametrize("chains", [1, 2])
def test_a_value_that_a_hook_changes_is_used(chains: int) -> None:
    """The chain, which hardly moves by itself, is moved by 1 at each draw."""
    kernel = HMC(
        normal_normal,
        step_size=1e-9,
        num_steps=1,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        if not stage.endswith("[0]"):  # the only chain, or the second one
            params["mu"] += 1.0

    start = {name: torch.zeros(chains).squeeze() for name in ("mu", "scale")}
    mcmc = MCMC(kernel, 4, 0, start, chains, hook_fn=hook, **OPTIONS)
    mcmc.run(Y)
    x = mcmc.get_samples(group_by_chain=True)["mu"]
    steps = torch.arange(1.0, 5.0)
    expected = steps[None] if chains == 1 else torch.stack([0.0 * steps, steps])
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    # the energies are those of the changed values: N(0, 1) and three data, up to a constant
    lp = mcmc.get_stats()["lp"]
    truth = -(x**2) / 2 - ((Y - x[..., None]) ** 2).sum(-1) / 2
    torch.testing.assert_close(lp - lp[:, :1], truth - truth[:, :1], atol=1e-6, rtol=0)
    assert float(mcmc.get_stats()["acceptance_rate"].min()) > 0.99


@pytest.mark.parametrize("chains", [1, 2])
def test_a_hook_can_evaluate_a_changed_density_again(chains: int) -> None:
    """Without it, the first step compares energies of two densities."""
    still = {"adapt_step_size": False, "adapt_mass_matrix": False}
    scale = torch.tensor(1.0)

    def model(scale: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, scale))

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        if i == 1 and stage in {"Sample", "Sample [0]"}:
            scale.fill_(0.1)
        kernel.clear_cache()

    kernel = HMC(model, step_size=1e-6, num_steps=1, **still)
    start = {"x": torch.ones(chains).squeeze()}
    mcmc = MCMC(kernel, 4, 0, start, chains, hook_fn=hook, **OPTIONS)
    mcmc.run(scale)
    lp, rates = (mcmc.get_stats()[name] for name in ("lp", "acceptance_rate"))
    old, new = (dist.Normal(0.0, s).log_prob(torch.tensor(1.0)) for s in (1.0, 0.1))
    expected = torch.stack([old, new, new, new]).expand(chains, 4)
    torch.testing.assert_close(lp, expected, atol=1e-2, rtol=0)
    assert float(rates.min()) > 0.99


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("kind", [NUTS, HMC])
def test_a_hook_can_set_the_mass_matrix(kind: Any, chains: int) -> None:
    """With an inverse mass of 0 for one site, only the other one moves."""
    still = {"adapt_step_size": False, "adapt_mass_matrix": False}
    steps = {"num_steps": 1} if kind is HMC else {}
    kernel = kind(normal_normal, step_size=0.1, **still, **steps)
    block = ("mu", "scale")

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        if i == 4 and stage in {"Sample", "Sample [0]"}:
            kernel.mass_matrix_adapter.inverse_mass_matrix = {block: torch.tensor([1e-20, 0.1])}
            assert float(kernel.inverse_mass_matrix[block][0]) == 1e-20

    mcmc = drawn(kernel=kernel, num_chains=chains, hook_fn=hook, seed=0)
    moves = {n: x.diff(dim=1).abs() for n, x in mcmc.get_samples(group_by_chain=True).items()}
    assert float(moves["mu"][:, 4:].max()) < 1e-6
    assert float(moves["mu"][:, :4].amax(1).min()) > 1e-3
    assert float(moves["scale"][:, 4:].amax(1).min()) > 1e-3
    assert float(kernel.inverse_mass_matrix[block][0]) == 1e-20


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.filterwarnings("ignore:interrupted during")
def test_what_a_hook_raises_is_passed_on_and_draws_are_kept(error: Any, chains: int) -> None:
    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.startswith("Sample") and i == 3:
            raise error

    mcmc = MCMC(NUTS(normal_normal), 9, 5, num_chains=chains, hook_fn=hook, **OPTIONS)
    with pytest.raises(error):
        mcmc.run(Y)
    assert mcmc.get_samples(group_by_chain=True)["mu"].shape == (chains, 4)
    assert mcmc.num_samples == 4
    assert mcmc.diagnostics()["mu"]["n_eff"] is not None

    def early(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        raise error

    mcmc = MCMC(NUTS(normal_normal), 9, 5, num_chains=chains, hook_fn=early, **OPTIONS)
    with pytest.raises(error):
        mcmc.run(Y)
    with pytest.raises(ValueError, match="there are no draws"):
        mcmc.get_samples()


# What other packages read


@pytest.mark.skipif(is_new_arviz(), reason="ArviZ 1 has no from_pyro")
def test_a_run_that_fails_leaves_no_draws_of_other_arguments() -> None:
    def fails(y: Tensor, fail: bool = False) -> None:
        if fail:
            raise StopError
        normal_normal(y)

    mcmc = drawn(kernel=NUTS(fails))
    with pytest.raises(StopError):
        mcmc.run(2.0 * Y, fail=True)
    for read in (mcmc.get_samples, mcmc.diagnostics, mcmc.get_stats, mcmc.to_arviz):
        with pytest.raises(ValueError, match=r"there are no draws: call run"):
            read()
    mcmc.run(Y)
    assert len(mcmc.get_samples()["mu"]) == 10


@pytest.mark.parametrize("name", ["model", "max_plate_nesting"])
def test_arguments_of_a_model_may_have_names_of_ours(name: str) -> None:
    def named(**given: Tensor) -> None:
        assert list(given) == [name]
        normal_normal(given[name])

    mcmc = MCMC(NUTS(named, max_plate_nesting=1), 10, 10, seed=0, **OPTIONS)
    mcmc.run(**{name: Y})
    assert torch.equal(mcmc.get_samples()["mu"], drawn(seed=0).get_samples()["mu"])


@pytest.mark.parametrize("hook", [None, lambda *_: None])
def test_the_kernel_shows_the_statistics_of_the_first_chain(hook: Any) -> None:
    kernel = HMC(normal_normal, step_size=0.2, num_steps=1, adapt_step_size=False)
    mcmc = drawn(kernel=kernel, num_chains=2, hook_fn=hook, seed=0)
    for _ in range(2):
        found, shown = mcmc.diagnostics(), kernel.diagnostics()
        assert shown["divergences"] == found["divergences"]["chain 0"]
        assert shown["acceptance rate"] == pytest.approx(found["acceptance rate"]["chain 0"])
        assert kernel.logging()["acc. prob"] == f"{shown['acceptance rate']:.3f}"
        assert 0.0 < shown["acceptance rate"] < 1.0
        mcmc.run_more(5)


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("on_kernel", [False, True])
def test_starting_values_may_be_numbers_and_arrays(on_kernel: bool, chains: int) -> None:
    still = {"adapt_step_size": False, "adapt_mass_matrix": False}
    kernel = HMC(normal_normal, step_size=1e-9, num_steps=1, **still)
    start: dict[str, Any] = {"mu": 1.0, "scale": np.zeros(())}
    if on_kernel:
        kernel.initial_params, start = start, {}
    elif chains > 1:
        start = {"mu": [1.0, 2.0], "scale": np.zeros(2)}
    mcmc = MCMC(kernel, 1, 0, start or None, chains, **OPTIONS)
    mcmc.run(Y)
    expected = torch.tensor([1.0, 1.0 if on_kernel else 2.0][:chains])
    torch.testing.assert_close(mcmc.get_samples()["mu"], expected, atol=1e-6, rtol=0)


def test_arviz_reads_the_chains_of_pyro() -> None:
    """Twelve chains, of which chain 2 alone diverges: as strings, "chain 10" comes before it."""
    start = torch.zeros(12)
    start[2] = 30.0

    def potential(params: dict[str, Tensor]) -> Tensor:  # a wall at 10, beyond it a steep slope
        x = params["x"]
        return x**2 / 2 + torch.where(x > 10.0, 1e9 * (x - 10.0) ** 2, 0.0)

    kernel = HMC(
        potential_fn=potential,
        step_size=0.1,
        num_steps=2,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    mcmc = MCMC(kernel, 12, 0, {"x": start}, 12, **OPTIONS)
    mcmc.run()
    divergences = mcmc.diagnostics()["divergences"]
    assert divergences["chain 2"] == list(range(12))
    assert sorted(divergences) == [f"chain {c}" for c in range(12)]
    diverging = arviz().from_pyro(mcmc).sample_stats["diverging"].values
    assert diverging[2].all()
    assert diverging.sum() == 12


@pytest.mark.skipif(is_new_arviz(), reason="ArviZ 1 has no from_pyro")
def test_arviz_reads_model_arguments_and_data() -> None:
    mcmc = drawn(num_chains=3)
    data = arviz().from_pyro(mcmc, log_likelihood=True)
    x = mcmc.get_samples(group_by_chain=True)["mu"]
    assert data.posterior["mu"].shape == (3, 10)
    torch.testing.assert_close(torch.as_tensor(data.posterior["mu"].values), x)
    assert (data.observed_data["y"].values == Y.numpy()).all()
    torch.testing.assert_close(
        torch.as_tensor(data.log_likelihood["y"].values),
        dist.Normal(x[..., None], 1.0).log_prob(Y),
    )
    assert mcmc._args == (Y,)
    assert mcmc._kwargs == {}
    assert mcmc.kernel.model is normal_normal
    scale = mcmc.get_samples()["scale"]
    torch.testing.assert_close(mcmc.transforms["scale"](scale), scale.log())
    assert (mcmc.num_chains, mcmc.num_samples, mcmc.warmup_steps) == (3, 10, 10)


def test_names_of_chains_sort_by_number() -> None:
    names = [ChainName(n) for n in (10, 2, 0)]
    assert sorted(names) == ["chain 0", "chain 2", "chain 10"]
    assert {ChainName(3): 1}["chain 3"] == 1
    assert ChainName(1) < "chain 2"


# Our options


def test_a_seed_makes_a_run_of_its_own() -> None:
    before = torch.get_rng_state()
    one, two = (drawn(seed=3, num_chains=2).get_samples()["mu"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, drawn(seed=4, num_chains=2).get_samples()["mu"])


@pytest.mark.parametrize("transforms", [None, {"scale": dist.transforms.ExpTransform().inv}])
def test_a_seed_decides_the_starts_too(transforms: Any) -> None:
    kernel = NUTS(
        normal_normal,
        transforms=transforms,
        init_strategy=pyro.infer.autoguide.initialization.init_to_sample,
    )
    runs = []
    for seed in (0, 1):
        pyro.set_rng_seed(seed)
        runs.append(drawn(kernel=kernel, seed=3, num_chains=2).get_samples()["mu"])
    assert torch.equal(*runs)


def test_runs_in_threads_are_those_of_one_thread() -> None:
    """Pyro's stack of handlers and torch's default generator are shared by all threads."""
    kernel_of = partial(NUTS, normal_normal, init_strategy=init_to_sample)

    def run(seed: int) -> Tensor:
        mcmc = drawn(kernel=kernel_of(), samples=5, seed=seed, num_chains=4, compile=False)
        draws: Tensor = mcmc.get_samples()["mu"]
        return draws

    seeds = range(4)
    expected = [run(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, seeds))
    assert all(map(torch.equal, found, expected))


def test_more_draws_are_those_of_one_longer_run() -> None:
    mcmc = drawn(seed=0, num_chains=2, samples=4)
    mcmc.run_more(6)
    assert mcmc.num_samples == 10
    long = drawn(seed=0, num_chains=2, samples=10)
    assert torch.equal(mcmc.get_samples()["mu"], long.get_samples()["mu"])
    assert mcmc.diagnostics()["acceptance rate"] == long.diagnostics()["acceptance rate"]
    mcmc.run(Y)
    assert mcmc.num_samples == 4


def test_draws_are_streamed_to_a_folder(tmp_path: Path) -> None:
    mcmc = drawn(seed=0, num_chains=2, store=tmp_path / "run")
    data = pyroebm.open_run(tmp_path / "run")
    torch.testing.assert_close(
        torch.as_tensor(data.posterior["mu"].values), mcmc.get_samples(group_by_chain=True)["mu"]
    )


@pytest.mark.filterwarnings("ignore:interrupted during")
@pytest.mark.parametrize("stage", ["Warmup", "Sample"])
def test_an_interrupted_run_is_resumed_from_its_folder(stage: str, tmp_path: Path) -> None:
    def stop(kernel: Any, params: dict[str, Tensor], at: str, i: int) -> None:
        if at == f"{stage} [1]" and i == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"num_chains": 2, "compile": False}
    with pytest.raises(KeyboardInterrupt):
        drawn(seed=0, hook_fn=stop, store=tmp_path / "run", **options)
    with pytest.raises(FileError, match=r"pyroebm.infer.MCMC with resume\(...\)"):
        drawn(store=tmp_path / "run", **options)
    mcmc = MCMC(NUTS(normal_normal), 10, 10, store=tmp_path / "run", **options, **OPTIONS)
    with pytest.raises(ValueError, match="its energies differ from those saved"):
        mcmc.resume(2.0 * Y)
    mcmc.resume(Y)
    whole = drawn(seed=0, **options)
    assert torch.equal(mcmc.get_samples()["mu"], whole.get_samples()["mu"])
    assert mcmc.diagnostics()["acceptance rate"] == whole.diagnostics()["acceptance rate"]
    assert pyroebm.open_run(tmp_path / "run").posterior["mu"].shape == (2, 10)
    with pytest.raises(ValueError, match="resume requires the folder of a run, got store=None"):
        whole.resume(Y)


def test_a_run_is_compiled_on_request() -> None:
    assert drawn(compile=False)._run.compiled is False


def test_unknown_sites_are_refused_before_anything_is_drawn() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    for kind in (MCMC, StreamingMCMC):
        with pytest.raises(ValueError, match=r"save_params must name sites of \['mu', 'scale'\]"):
            drawn(kind, save_params=["nu"], hook_fn=never)


# Streaming


@pytest.mark.parametrize("chains", [1, 3])
def test_statistics_are_those_of_the_draws(chains: int) -> None:
    kept = drawn(seed=0, num_chains=chains).get_samples(group_by_chain=True)
    stream = drawn(
        StreamingMCMC, seed=0, num_chains=chains, statistics=StatsOfDict(default=StackStats)
    )
    found = stream.get_statistics()
    assert set(found) == {(c, name) for c in range(chains) for name in ("mu", "scale")}
    for (chain, name), stats in found.items():
        torch.testing.assert_close(stats["samples"], kept[name][chain])
    assert stream._samples is None
    # Pyro's default: count, mean and variance
    stream = drawn(StreamingMCMC, seed=0, num_chains=chains, save_params=["mu"])
    found = stream.get_statistics()
    assert set(found) == {(c, "mu") for c in range(chains)}
    for chain in range(chains):
        assert found[chain, "mu"]["count"] == 10
        torch.testing.assert_close(found[chain, "mu"]["mean"], kept["mu"][chain].mean())
        torch.testing.assert_close(found[chain, "mu"]["variance"], kept["mu"][chain].var())
    found = stream.diagnostics()
    assert set(found["mu"]) == {"r_hat"}
    stats = drawn(seed=0, num_chains=chains).get_stats()["acceptance_rate"].mean(1)
    for chain in range(chains):
        assert found["acceptance rate"][f"chain {chain}"] == pytest.approx(float(stats[chain]))


def test_statistics_are_of_values_that_a_hook_changed() -> None:
    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        params["mu"].fill_(float(i))

    stream = drawn(
        StreamingMCMC, samples=4, hook_fn=hook, statistics=StatsOfDict(default=StackStats)
    )
    assert stream.get_statistics()[0, "mu"]["samples"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_streaming_before_a_run_says_so() -> None:
    with pytest.raises(ValueError, match="there are no draws"):
        StreamingMCMC(NUTS(normal_normal), 5).diagnostics()
