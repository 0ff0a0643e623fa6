"""The driver: shapes, statistics, resume, interrupts, bad input, and what ArviZ gets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lib.checks import within_se
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyroebm import HMC, MALA, MCMC, NUTS, ULA, Energy, ParallelTempering, infer
from pyroebm.core.statistics import arviz, bfmi, ess_bulk, mcse_mean, r_hat
from pyroebm.diagnostics import Diagnosis, diagnose, mode_masses, to_arviz
from pyroebm.kernels import WindowAdaptation
from pyroebm.targets import (
    BernoulliProduct,
    Beta,
    Dirichlet,
    DoubleWell,
    Exponential,
    Gaussian,
    GaussianMixture,
    scales_gaussian,
)


def sampled(
    energy: Energy,
    num_samples: int = 200,
    warmup_steps: int = 100,
    num_chains: int = 8,
    **options: object,
) -> MCMC:
    mcmc = MCMC(NUTS(), num_samples, warmup_steps, num_chains, **{"seed": 0, **options})  # type: ignore[arg-type]
    mcmc.run(energy)
    return mcmc


class Stops(Energy):
    """A normal whose evaluation number ``at`` is interrupted, as by Ctrl-C, or fails."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.calls = 0
        self.at = at
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("stop")
        return 0.5 * x**2


#: Given starts are evaluated once, default ones as often as candidates are tried.
START = torch.linspace(-1.0, 1.0, 4)


@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize(
    "kernel", [ULA(0.3), MALA(), HMC(), NUTS()], ids=lambda k: type(k).__name__
)
def test_shapes_names_and_types(kernel: object, event: tuple[int, ...]) -> None:
    energy = Gaussian(torch.zeros(event, dtype=torch.float64))
    mcmc = MCMC(kernel, num_samples=12, warmup_steps=30, num_chains=5, seed=1)  # type: ignore[arg-type]
    mcmc.run(energy)
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (5, 12, *event)
    assert mcmc.get_samples()["x"].shape == (60, *event)
    assert mcmc.get_samples(7)["x"].shape == (7, *event)
    assert mcmc.get_samples()["x"].dtype == torch.float64
    data = mcmc.to_arviz()
    assert data.posterior["x"].shape == (5, 12, *event)
    assert data.warmup_posterior["x"].shape == (5, 30, *event)
    names = {"lp", "energy", "diverging", "acceptance_rate", "step_size", "n_steps"}
    names |= {"tree_depth", "reached_max_treedepth"} if isinstance(kernel, NUTS) else set()
    assert set(data.sample_stats.data_vars) == set(data.warmup_sample_stats.data_vars) == names
    lp = mcmc.get_stats()["lp"]
    torch.testing.assert_close(lp, -energy(mcmc.get_samples(group_by_chain=True)["x"]))
    if not isinstance(kernel, ULA):
        # the Hamiltonian is the energy plus the kinetic energy
        assert (mcmc.get_stats()["energy"] >= -lp).all()


@pytest.mark.parametrize("num_chains", [1, 3, 64])
def test_fifty_dimensions_with_scales_from_a_tenth_to_ten(num_chains: int) -> None:
    energy = scales_gaussian(dtype=torch.float64)
    mcmc = sampled(energy, 1500 if num_chains < 4 else 60, 200, num_chains)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    scales = energy.variance.sqrt()
    within_se(x.mean((0, 1)) / scales, torch.zeros(50), mcse_mean(x) / scales.numpy())
    squares = (x / scales) ** 2
    within_se(squares.mean((0, 1)), torch.ones(50), mcse_mean(squares))
    assert mcmc.kernel.inverse_mass is not None


def test_double_well_by_nuts() -> None:
    mcmc = sampled(DoubleWell().double(), 1000, 200, 64)
    right = (mcmc.get_samples(group_by_chain=True)["x"] > 0.126).double()
    within_se(right.mean(), 0.06648268, mcse_mean(right))


@pytest.mark.parametrize(
    "energy",
    [Exponential(2.0).double(), Dirichlet(torch.tensor([0.7, 1.5, 3.0], dtype=torch.float64))],
    ids=["positive", "simplex"],
)
def test_constrained_supports_come_back_constrained(energy: Energy) -> None:
    mcmc = sampled(energy, 500, 200, 32)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert energy.support.check(x).all()
    within_se(x.mean((0, 1)), energy.mean, mcse_mean(x))
    squares = (x - energy.mean) ** 2
    within_se(squares.mean((0, 1)), energy.variance, mcse_mean(squares))
    data = mcmc.to_arviz()
    assert data.posterior["x"].shape == (32, 500, *energy.event_shape)


def test_by_default_there_are_draws_enough_for_a_diagnosis() -> None:
    mcmc = MCMC(NUTS(), seed=0)
    mcmc.run(Gaussian(torch.zeros(2, dtype=torch.float64)))
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (4, 1000, 2)
    assert not mcmc.diagnose().findings


def test_same_seed_same_draws_and_fresh_seeds_are_kept() -> None:
    a, b, c = (sampled(DoubleWell(), 20, 20, seed=s).get_samples()["x"] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    fresh = sampled(DoubleWell(), 5, 20, seed=None)
    again = sampled(DoubleWell(), 5, 20, seed=fresh.seed)
    assert torch.equal(fresh.get_samples()["x"], again.get_samples()["x"])


def test_no_global_generator_is_touched() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sampled(DoubleWell(), 10, 20)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_run_more_equals_one_longer_run_and_a_saved_run_goes_on_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    energy = DoubleWell().double()
    long = sampled(energy, 60, 50).get_samples(group_by_chain=True)["x"]
    short = sampled(energy, 40, 50)
    save_file(short.state_dict(), tmp_path / "chains.safetensors")
    short.run_more(20)
    assert torch.equal(short.get_samples(group_by_chain=True)["x"], long)
    other = MCMC(NUTS(), 40, 50, 8, seed=99)
    other.load_state_dict(load_file(tmp_path / "chains.safetensors"), energy)
    other.run_more(20)
    assert torch.equal(other.get_samples(group_by_chain=True)["x"], long)
    assert other.to_arviz().posterior["x"].shape == (8, 60)
    assert other.seed == short.seed
    state = short.state_dict()
    for stranger, message in (
        (MCMC(NUTS(), 1, num_chains=3), "^num_chains differs: 8 in the state, 3 here; chain_batch"),
        (MCMC(MALA(), 1, num_chains=8), "^kernel differs: NUTS in the state, MALA here; "),
        (MCMC(NUTS(), 1, num_chains=8, thinning=2), "^thinning differs: 1 in the state, 2 here; "),
    ):
        with pytest.raises(ValueError, match=message):
            stranger.load_state_dict(state, energy)
    with pytest.raises(ValueError, match="must be of the energy given"):
        MCMC(NUTS(), 1, num_chains=8).load_state_dict(state, 2.0 * energy)
    with pytest.raises(ValueError, match=r"must come from MCMC\.state_dict\(\)"):
        MCMC(NUTS(), 1, num_chains=8).load_state_dict({}, energy)


@pytest.mark.parametrize("kernel", [NUTS(), HMC(num_steps=4)], ids=["nuts", "hmc"])
def test_thinning_keeps_every_kth_draw_and_the_counts_of_the_rest(kernel: NUTS | HMC) -> None:
    energy = DoubleWell().double()
    full, thin = (
        MCMC(kernel, draws, 50, 8, seed=0, thinning=thinning)
        for draws, thinning in ((60, 1), (20, 3))
    )
    full.run(energy)
    thin.run(energy)
    assert torch.equal(
        thin.get_samples(group_by_chain=True)["x"],
        full.get_samples(group_by_chain=True)["x"][:, 2::3],
    )
    a, b = full.get_stats(), thin.get_stats()
    assert torch.equal(b["n_steps"], a["n_steps"].reshape(8, 20, 3).sum(-1))
    assert torch.equal(b["diverging"], a["diverging"].reshape(8, 20, 3).any(-1))
    assert torch.equal(b["lp"], a["lp"][:, 2::3])
    torch.testing.assert_close(
        b["acceptance_rate"], a["acceptance_rate"].reshape(8, 20, 3).mean(-1)
    )


def test_ctrl_c_keeps_what_was_drawn() -> None:
    mcmc = MCMC(MALA(0.5), num_samples=100, warmup_steps=0, num_chains=4, seed=0)
    energy = Stops(at=40)
    with pytest.warns(
        RuntimeWarning, match="interrupted during sampling: 38 draws of each chain were kept"
    ):
        mcmc.run(energy, START)
    assert mcmc.interrupted
    whole = MCMC(MALA(0.5), num_samples=38, warmup_steps=0, num_chains=4, seed=0)
    whole.run(Stops(at=-1), START)
    assert torch.equal(mcmc.get_samples()["x"], whole.get_samples()["x"])
    mcmc.run_more(5)
    assert not mcmc.interrupted
    assert mcmc.to_arviz().posterior["x"].shape == (4, 43)


def test_ctrl_c_in_warm_up_keeps_the_warm_up() -> None:
    mcmc = MCMC(MALA(0.5), num_samples=100, warmup_steps=50, num_chains=4, seed=0, adaptation=None)
    with pytest.warns(RuntimeWarning, match="interrupted during warm-up: 0 draws"):
        mcmc.run(Stops(at=20), START)
    assert mcmc.get_samples(group_by_chain=True, warmup=True)["x"].shape == (4, 18)
    with pytest.raises(ValueError, match="before its first draw"):
        mcmc.get_samples()
    with pytest.raises(ValueError, match="finished its warm-up"):
        mcmc.run_more(5)


def test_a_failing_energy_loses_no_draw() -> None:
    mcmc = MCMC(MALA(0.5), num_samples=100, warmup_steps=0, num_chains=4, seed=0)
    with pytest.raises(ArithmeticError):
        mcmc.run(Stops(at=40, error=ArithmeticError), START)
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (4, 38)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_chains": 0}, "num_chains must be an integer of at least 1, got num_chains=0"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got num_samples=0"),
        (
            {"warmup_steps": -1},
            "warmup_steps must be an integer of at least 0, got warmup_steps=-1",
        ),
        ({"thinning": 1.5}, "thinning must be an integer of at least 1, got thinning=1.5"),
        ({"kernel": "NUTS"}, "kernel must be one of pyroebm.kernels, got str"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCMC(**{"kernel": NUTS(), "num_samples": 10, **arguments})  # type: ignore[arg-type]


def test_bad_energies_and_starts() -> None:
    mcmc = MCMC(NUTS(), 10, 10, 4)
    with pytest.raises(ValueError, match=r"energy must be a pyroebm\.Energy, got function"):
        mcmc.run(lambda x: x**2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it is discrete and has no gradient in x"):
        mcmc.run(BernoulliProduct(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"one state for each of num_chains=4, got shape \(3,\)"):
        mcmc.run(DoubleWell(), torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"initial must have the dtype of the energy: .*float32.*float64"
    ):
        mcmc.run(DoubleWell(), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(
        ValueError,
        match=r"initial must lie in support=Real\(\): 2 of 4 rows do not, the first is row 2",
    ):
        mcmc.run(DoubleWell(), torch.tensor([0.0, 1.0, math.nan, math.inf]))
    with pytest.raises(ValueError, match="there are no draws"):
        MCMC(NUTS(), 10).get_samples()
    with pytest.raises(ValueError, match="call run"):
        MCMC(NUTS(), 10).run_more(3)


def test_illegal_starts_are_refused_and_not_moved() -> None:
    with pytest.raises(
        ValueError,
        match=r"initial must lie in support=.*1 of 2 rows do not, the first is row 0 with 5\.0",
    ):
        MCMC(NUTS(), 10, 10, 2).run(Beta(2.0, 2.0), torch.tensor([5.0, 0.5]))
    with pytest.raises(ValueError, match="the first is row 1"):
        MCMC(NUTS(), 10, 10, 2).run(
            Dirichlet(torch.ones(3)), torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0]])
        )


def test_a_refused_run_leaves_the_one_before_as_it_was() -> None:
    mcmc = sampled(Exponential(), 20, 20)
    before = mcmc.get_samples()["x"].clone()
    with pytest.raises(ValueError, match="must lie in"):
        mcmc.run(DoubleWell(), torch.full((8,), math.nan))
    assert torch.equal(mcmc.get_samples()["x"], before)
    mcmc.run_more(5)
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (8, 25)
    again = sampled(Exponential(), 25, 20)
    assert torch.equal(mcmc.get_samples()["x"], again.get_samples()["x"])


def test_run_more_samples_the_energy_as_it_now_is() -> None:
    class Lifted(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.height = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x**2 + self.height

    energy = Lifted()
    mcmc = MCMC(MALA(), 20, 50, 8, seed=0)
    mcmc.run(energy)
    with torch.no_grad():
        # the same density: a state that remembered its old energy would never move again
        energy.height += 30.0
    mcmc.run_more(20)
    assert float(mcmc.get_stats()["acceptance_rate"][:, 20:].mean()) > 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MCMC(infer.NUTS(lambda: None), 5),  # type: ignore[arg-type]
            r"got pyroebm.infer.NUTS, .* import both from one place, pyroebm.infer.MCMC with",
        ),
        (lambda: MCMC(NUTS, 5), r"write NUTS\(\) in place of NUTS"),
        (lambda: MCMC(NUTS(DoubleWell()), 5), r"NUTS: step_size must be .* MCMC\(NUTS\(\)\)"),
        (lambda: MCMC(NUTS(), 5).run(lambda: None), r"a Pyro model with pyroebm.ModelEnergy"),
        (
            lambda: MCMC(ULA(), 5, adaptation=WindowAdaptation(0.6)),
            "target acceptance rate, and ULA has none: leave adaptation out",
        ),
        (
            lambda: MCMC(ParallelTempering(MALA(), [1.0, 0.5]), 5, adaptation=WindowAdaptation()),
            'ParallelTempering has none: use adaptation="default", its own LadderAdaptation',
        ),
        (
            lambda: MCMC(NUTS(), 5, adaptation=True),
            r"such as WindowAdaptation\(\), got"
            r" adaptation=True",
        ),
        (
            lambda: sampled(DoubleWell(), 5, 5).run_more(2.5),
            "num_samples must be an integer of at least 1, got num_samples=2.5",
        ),
        (lambda: MCMC(NUTS(), True), "num_samples must be an integer"),
        (
            lambda: MCMC(NUTS(), 5, num_chains=2).run(DoubleWell(), [0.0, 1.0]),
            "initial must be a tensor or a NumPy array, got list: convert it by",
        ),
        (
            lambda: MCMC(NUTS(), 5, num_chains=2).run(DoubleWell(), torch.tensor(0.0)),
            r"got shape \(\)",
        ),
    ],
)
def test_slips_of_a_first_hour_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numpy_integers_are_integers() -> None:
    assert sampled(DoubleWell(), np.int64(5), np.int64(5)).get_samples()["x"].shape == (40,)  # type: ignore[arg-type]


def test_the_diagnosis_says_that_an_inexact_kernel_is_inexact() -> None:
    mcmc = MCMC(ULA(1.8), 1000, 100, 16, seed=0)
    mcmc.run(Gaussian(torch.zeros(2)))
    assert float(mcmc.get_samples()["x"].var()) > 4  # the truth is 1, and all chains agree on it
    assert not mcmc.diagnose().mixed
    assert "not exact" in str(mcmc.diagnose())
    assert "BFMI" not in str(mcmc.diagnose())


def test_the_broadcast_mistake_names_both_shapes() -> None:
    class Wrong(Energy):
        event_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(
        ValueError, match=r"must have shape \(4,\), but it has shape \(4, 1\).*squeeze"
    ):
        MCMC(NUTS(), 10, num_chains=4).run(Wrong())


def test_sampling_is_in_eval_mode_and_leaves_no_gradient() -> None:
    class Dropped(Energy):
        event_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.drop, self.net = nn.Dropout(0.5), nn.Linear(2, 2)
            self.drop.eval()
            self.seen: set[bool] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add(self.training)
            return 0.5 * (x**2).sum(-1) + self.drop(self.net(x)).sum(-1) * 0.1

    energy = Dropped().train()
    energy.drop.eval()
    sampled(energy, 5, 5)
    assert energy.seen == {False}
    assert energy.training
    assert not energy.drop.training
    assert all(p.grad is None for p in energy.parameters())


def test_save_warmup_and_adaptation_can_be_off() -> None:
    mcmc = sampled(DoubleWell(), 5, 20, save_warmup=False, adaptation=None)
    assert mcmc.kernel.step_size == NUTS().step_size
    assert not hasattr(mcmc.to_arviz(), "warmup_posterior")
    assert hasattr(sampled(DoubleWell(), 5, 20, adaptation=None).to_arviz(), "warmup_posterior")
    tuned = sampled(
        DoubleWell().double(), 400, 300, 32, adaptation=WindowAdaptation(target_acceptance=0.95)
    )
    assert abs(float(tuned.get_stats()["acceptance_rate"].mean()) - 0.95) < 0.03


def test_summary_and_pyro_style_diagnostics() -> None:
    mcmc = sampled(GaussianMixture(torch.zeros(1, 2), scale=1.0), 300, 100, 4)
    table = mcmc.summary()
    assert list(table.index) == ["x[0]", "x[1]"]
    assert float(table["r_hat"].max()) < 1.05
    summary = mcmc.diagnostics()
    assert summary["x"]["n_eff"].shape == (2,)
    assert set(summary["divergences"]) == {f"chain {c}" for c in range(4)}
    assert all(0.5 < rate <= 1 for rate in summary["acceptance rate"].values())


# Diagnostics


def test_a_diagnosis_sees_chains_that_disagree_short_runs_and_divergences() -> None:
    noise = torch.randn(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calm = {"diverging": torch.zeros(4, 1000, dtype=torch.bool), "energy": noise.clone()}
    assert diagnose(noise, calm).mixed
    apart = diagnose(noise + torch.arange(4.0).unsqueeze(1), calm)
    assert not apart.mixed
    assert "R-hat should be below" in str(apart)
    assert "effective sample size" in str(
        diagnose(noise[:, :50], {k: v[:, :50] for k, v in calm.items()})
    )
    assert "One chain cannot show" in str(diagnose(noise[:1], {k: v[:1] for k, v in calm.items()}))
    wild = {**calm, "diverging": calm["diverging"].clone()}
    wild["diverging"][2, 5] = True
    assert diagnose(noise, wild).divergences == 1
    slow = {**calm, "energy": noise.cumsum(1)}
    assert "BFMI" in str(diagnose(noise, slow))
    assert isinstance(diagnose(noise, calm), Diagnosis)


def test_the_diagnosis_is_of_the_worst_entry_and_its_thresholds_are_the_fields() -> None:
    x = torch.randn(4, 1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calm = {"diverging": torch.zeros(4, 1000, dtype=torch.bool)}
    assert diagnose(x, calm).mixed
    sticky = x.clone()
    sticky[..., 1] = x[:, :50, 1].repeat_interleave(20, 1)
    judged = diagnose(sticky, calm)
    assert judged.ess_bulk == float(ess_bulk(sticky).min()) < 400
    assert judged.r_hat == float(r_hat(sticky).max())
    # R-hat between 1.01 and 1.1
    slightly = x + 0.22 * torch.arange(4.0).reshape(4, 1, 1) * torch.tensor([0.0, 1.0])
    assert 1.02 < float(r_hat(slightly).max()) < 1.09
    assert "R-hat should be below 1.01" in str(diagnose(slightly, calm))
    assert "not defined" in str(diagnose(x[:, :3], {k: v[:, :3] for k, v in calm.items()}))
    for rate, expected in ((0.1, True), (0.5, False)):
        seen = {**calm, "acceptance_rate": torch.full((4, 1000), rate)}
        assert (
            "acceptance rate is 0.1. The kernel has no step size to lower" in str(diagnose(x, seen))
        ) == expected
        seen["step_size"] = torch.ones(4, 1000)
        assert (
            "acceptance rate is 0.1. The step size is too large" in str(diagnose(x, seen))
        ) == expected
    # energies of a first-order autoregression have BFMI 2 (1 - phi)
    for phi, expected in ((0.93, False), (0.7, True)):
        energy, noise = torch.zeros(4, 1000, dtype=torch.float64), x[..., 0]
        for t in range(1, 1000):
            energy[:, t] = phi * energy[:, t - 1] + noise[:, t]
        assert ("BFMI" not in str(diagnose(x, {**calm, "energy": energy}))) == expected


def test_statistics_keep_the_event_shape_and_know_autocorrelation() -> None:
    x = torch.randn(4, 500, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert r_hat(x).shape == ess_bulk(x).shape == (2, 3)
    assert bfmi(x[..., 0, 0]).shape == (4,)
    sticky = x[:, :, 0, 0].repeat_interleave(10, 1)
    assert ess_bulk(sticky) < 0.2 * 20_000
    with pytest.raises(ValueError, match=r"\(chains, draws, \*event\), got shape \(5,\)"):
        r_hat(torch.zeros(5))


def test_mode_masses_report_a_mode_nobody_visited() -> None:
    modes = (torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    masses, errors = mode_masses(modes, 3)
    within_se(masses[1], 0.3, errors[1])
    assert masses[2] == 0
    assert math.isnan(errors[2])


def test_numbers_in_arrays_of_one_entry_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ArviZ 0.23 gives where numba is installed; more than one entry is no number."""
    x = torch.randn(4, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = {"rhat": r_hat, "ess": ess_bulk, "mcse": mcse_mean}
    plain = {name: call(x) for name, call in calls.items()}
    masses = mode_masses((x[..., 0] > 0).long(), 2)
    for name in calls:
        theirs = getattr(arviz(), name)
        monkeypatch.setattr(
            arviz(), name, lambda *a, theirs=theirs, **k: np.atleast_1d(theirs(*a, **k))
        )
    for name, call in calls.items():
        np.testing.assert_array_equal(call(x), plain[name])
    np.testing.assert_array_equal(mode_masses((x[..., 0] > 0).long(), 2), masses)
    assert diagnose(x, {"diverging": torch.zeros(4, 50)}).r_hat == plain["rhat"].max()
    monkeypatch.setattr(arviz(), "mcse", lambda *a, **k: np.zeros(2))
    with pytest.raises(ValueError, match="size 1"):
        mcse_mean(x)


def test_many_chains_keep_their_divergences_in_order() -> None:
    """From 11 chains on, sorting names as text would put chain 10 before chain 2."""
    diverging = torch.zeros(12, 5, dtype=torch.bool)
    diverging[10, 3] = True
    data = to_arviz({"x": torch.zeros(12, 5)}, {"diverging": diverging})
    assert bool(data.sample_stats["diverging"].sel(chain=10, draw=3))
    assert int(data.sample_stats["diverging"].sum()) == 1


def test_the_file_can_be_read_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mcmc = sampled(DoubleWell(), 10, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.to_arviz().to_netcdf(str(tmp_path / "chains.nc"))
        data = arviz().from_netcdf(str(tmp_path / "chains.nc"))
    np.testing.assert_array_equal(
        data.posterior["x"].values, mcmc.get_samples(group_by_chain=True)["x"].numpy()
    )
    assert data.attrs["inference_library"] == "pyroebm"
