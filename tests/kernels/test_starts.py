"""No chain is left behind: default starts and the default warm-up on models with steep regions, and
chains that never move."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from benchmarks import starts
from benchmarks.suite.cases import CASES as SAMPLER_CASES
from pyroebm import HMC, MALA, MCMC, NUTS, Energy, infer
from pyroebm.diagnostics import describe_stuck, diagnose, stuck_chains
from pyroebm.kernels import RandomWalk, WindowAdaptation
from pyroebm.kernels.adaptation import draw_starts
from pyroebm.targets import DoubleWell, Exponential

double = torch.float64


# Default runs: a few seeds of benchmarks/starts.py


COSTLY = ("location_scale_48", "eight_schools", "gaussian_process", "two_components", "funnel")


@pytest.mark.parametrize(
    ("name", "seeds"),
    [("location_scale_8", 8), ("muller_brown", 8), ("double_well", 8)]
    + [pytest.param(name, 8, marks=pytest.mark.slow) for name in COSTLY],
)
def test_no_chain_is_left_behind(name: str, seeds: int) -> None:
    case = starts.CASES[name]
    found = starts.judged(case, starts.sampled(case.build(), case.chains, seeds, "grouped"), seeds)
    assert found["chains_left_behind"] == [0] * seeds
    # a chain that is in the neck when warm-up ends keeps a step size for the neck
    if name != "funnel":
        assert min(found["min_acceptance"]) > 0.4
        assert max(found["max_acceptance"]) < 0.98
    if case.one_mode:
        assert max(found["r_hat"]) < 1.05
        assert max(found["worst_z"]) < 5.0


def test_mutant_the_mean_of_all_rates_leaves_chains_behind() -> None:
    """The rule of before, from starts that nobody tried: the check above must see it."""
    seeds, case = 6, starts.CASES["location_scale_16"]
    energy = case.build()
    each = starts.EachSeed(starts.RULES["mean"](), case.chains)
    x = torch.cat(
        [energy.initial(case.chains, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    )
    mcmc = MCMC(
        NUTS(), 100, 200, len(x), seed=0, adaptation=each, chain_batch_size=len(x), compile=False
    )
    with pytest.warns(RuntimeWarning, match="never moved after warm-up"):
        mcmc.run(energy, x)
    assert sum(starts.judged(case, mcmc, seeds)["chains_left_behind"]) > 0


def test_seeds_in_one_batch_are_seeds_alone() -> None:
    """Each seed adapts by itself: what one learns does not depend on the others' draws."""
    plan, energy = starts.EachSeed(WindowAdaptation(), 2), DoubleWell(dtype=double)

    def adapted(x: Tensor) -> Any:
        _, memory = plan.start(
            MALA(), energy, MALA().init(energy, x), torch.Generator().manual_seed(0)
        )
        return memory.kernels

    one, two = (
        adapted(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=double)),
        adapted(torch.tensor([1.0, -1.0, 40.0, -40.0], dtype=double)),
    )
    assert torch.equal(one[0].step_size, two[0].step_size)
    assert not torch.equal(one[1].step_size, two[1].step_size)


def test_pyros_arguments_get_the_same_warm_up() -> None:
    """The model of the report: eight chains through pyroebm.infer, of which one used to stay at its
    start."""
    pyro.set_rng_seed(0)
    mcmc = infer.MCMC(
        infer.NUTS(starts.location_scale),
        num_samples=200,
        warmup_steps=200,
        num_chains=8,
        disable_progbar=True,
    )
    mcmc.run(starts.normal_data())
    assert float(mcmc.get_stats()["acceptance_rate"].mean(1).min()) > 0.4


def test_truths_of_the_cases() -> None:
    """Quadratures are checked at another resolution or by what they must fulfil."""
    coarse, fine = (starts.gaussian_process_truth(points) for points in (31, 41))
    assert abs(coarse - fine).max() < 0.02
    assert abs(starts.muller_brown_truth(1601) - starts.muller_brown_truth()) < 1e-4
    mu, tau = starts.location_scale_truth()
    data = starts.normal_data()
    assert abs(mu) < abs(float(data.mean()))  # the prior draws it to 0
    assert abs(tau - float(data.std())) < 0.2
    assert "eight_schools" in SAMPLER_CASES


# Starting states


class Cliff(Energy):
    """A normal with a steep side: from x > 1 no leapfrog step is accepted that others take."""

    event_shape = torch.Size((1,))

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x**2 + torch.where(x > 1.0, 1e6 * (x - 1.0) ** 2, 0.0)).sum(-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        self.asked.append(num_chains)
        return super().initial(num_chains, generator)


def test_a_start_is_a_candidate_from_which_a_step_is_accepted() -> None:
    energy, generator = Cliff().double(), torch.Generator().manual_seed(0)
    x = draw_starts(NUTS(), energy, 64, generator)
    assert energy.asked[0] == 64
    assert len(energy.asked) > 1
    assert float(x.max()) < 1.1
    assert float(x.min()) < -1.5  # nothing else is chosen: starts are as spread as the candidates
    inside = (x < 0).double().mean()
    assert abs(float(inside) - 2 / 3) < 5 * math.sqrt(2 / 9 / 64)


@pytest.mark.parametrize("adapts", [True, False])
def test_the_trial_takes_the_step_size_that_the_chains_will_have(adapts: bool) -> None:
    """A step of 1e-6 leaves the cliff, and is what the chains take where nothing adapts."""
    energy = Cliff().double()
    mcmc = MCMC(NUTS(1e-6), 1, 20 if adapts else 0, 64, seed=0)
    mcmc.run(energy)
    assert (len(energy.asked) > 1) == adapts
    fixed = infer.kernels.NUTS(
        potential_fn=lambda params: params["x"].sum(), step_size=1e-6, adapt_step_size=False
    )
    energy, _ = fixed.target((), {}, {"x": torch.zeros(1, 2)})
    assert fixed.adaptation(energy).step_size is None


class Centered(Energy):
    """Each row holds its own center; the gradient does not see the wall at 0."""

    event_shape = torch.Size((1,))

    def forward(self, x: Tensor) -> Tensor:
        own = torch.arange(8.0, dtype=double).unsqueeze(1)
        return 0.5 * ((x - own) ** 2).sum(-1) + torch.where(x[:, 0] > 0, 0.0, torch.inf)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(num_chains, 1, dtype=double, generator=generator)


def test_energies_may_hold_something_for_each_row() -> None:
    x = draw_starts(NUTS(), Centered().double(), 8, torch.Generator().manual_seed(0))
    assert float(x.min()) > 0.0


class Slopes(Energy):
    """A normal of scale .01 about 0, one of scale 1,000 about 5,000, and no density below -1."""

    def __init__(self) -> None:
        super().__init__(())
        self.rounds = 0

    def forward(self, x: Tensor) -> Tensor:
        near = torch.where(x > 1000.0, ((x - 5000.0) / 1000.0).square(), (x / 0.01).square())
        return torch.where(x < -1.0, torch.inf, 0.5 * near)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        self.rounds += 1
        x = 0.01 * torch.randn(num_chains, dtype=torch.float64, generator=generator)
        x = torch.full_like(x, -2.0) if self.rounds == 1 else x
        return torch.where(torch.arange(num_chains) == 0, 5000.0, x)


@pytest.mark.parametrize("seed", range(5))
def test_one_finite_candidate_does_not_set_the_step_size_of_all(seed: int) -> None:
    """Its step size, of hundreds, would have each candidate of the seven others refused."""
    energy = Slopes().double()
    x = draw_starts(NUTS(), energy, 8, torch.Generator().manual_seed(seed))
    assert torch.isfinite(energy(x)).all()
    assert energy.rounds < 20


def test_where_no_step_is_accepted_the_last_finite_candidate_is_taken() -> None:
    class Dots(Energy):
        """Any candidate is finite in half of the cases, any other place never."""

        event_shape = torch.Size((1,))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x == 1.0).all(-1), 0.0 * x.sum(-1), torch.inf)

        def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.randint(2, (num_chains, 1), generator=generator).double()

    x = draw_starts(NUTS(), Dots().double(), 64, torch.Generator().manual_seed(0), adapts=False)
    assert torch.equal(x, torch.ones(64, 1, dtype=double))


def test_starts_are_rows_of_finite_energy_and_gradient() -> None:
    class Half(Energy):
        event_shape = torch.Size((1,))

        def forward(self, x: Tensor) -> Tensor:
            # the gradient at x < 0 is NaN
            return (0.5 * x**2 + torch.where(x > 0.0, 0.0 * x.sqrt(), 0.0)).sum(-1)

    energy, generator = Half().double(), torch.Generator().manual_seed(0)
    x = draw_starts(NUTS(), energy, 32, generator)
    assert float(x.min()) > 0.0


def test_given_starts_are_obeyed_and_kernels_without_gradients_try_none() -> None:
    x = torch.full((4,), 3.0, dtype=double)
    mcmc = MCMC(MALA(1e-9), 5, 0, 4, seed=0, adaptation=None)
    mcmc.run(DoubleWell(dtype=double), x)
    torch.testing.assert_close(
        mcmc.get_samples(group_by_chain=True)["x"][:, 0], x, atol=1e-6, rtol=0
    )
    energy = Cliff().double()
    draw_starts(RandomWalk(), energy, 8)
    assert energy.asked == [8]


def test_a_constrained_support_starts_inside() -> None:
    mcmc = MCMC(HMC(), 5, 5, 8, seed=0)
    mcmc.run(Exponential(dtype=double))
    assert float(mcmc.get_samples(warmup=True)["x"].min()) > 0.0


# Chains that never move


class Wall(Energy):
    """A normal, and far out a region that no step of the others' size leaves."""

    event_shape = torch.Size((2,))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x**2).sum(-1) + torch.where(
            x[..., 0] > 50.0, 1e8 * (x[..., 0] - 50.0) ** 2, 0.0
        )


def stuck_run(**options: Any) -> MCMC:
    x = torch.zeros(4, 2, dtype=double)
    x[1, 0] = 100.0
    mcmc = MCMC(NUTS(0.5), 200, 0, 4, seed=0, adaptation=None, **options)
    with pytest.warns(
        RuntimeWarning,
        match=r"Chain 1 of 4 never moved after warm-up \(energy 2.5e\+11, median of the others"
        r" .*\)\. Start it",
    ):
        mcmc.run(Wall().double(), x)
    return mcmc


def test_a_chain_that_never_moves_is_named_everywhere(tmp_path: Any) -> None:
    mcmc = stuck_run()
    assert mcmc.stuck_chains() == [1]
    with pytest.warns(RuntimeWarning, match="Chain 1 of 4 never moved"):
        mcmc.summary()
    found = mcmc.diagnose()
    assert found.findings[0].message.startswith(
        "Chain 1 of 4 never moved after warm-up (energy 2.5e+11, median of the others"
    )
    assert found.findings[0].chains == (1,)
    # the divergences and the acceptance rate of 0 are that chain's
    assert {finding.kind for finding in found.findings} <= {"stuck", "r_hat"}
    with pytest.warns(RuntimeWarning, match="Chain 1 of 4 never moved"):
        mcmc.run_more(10)
    other = MCMC(NUTS(0.5), 200, 0, 4, adaptation=None)
    other.load_state_dict(mcmc.state_dict(), Wall().double())
    assert other.stuck_chains() == [1]
    assert stuck_run(keep="moments").stuck_chains() == [1]
    assert stuck_run(chain_batch_size=2, thinning=2).stuck_chains() == [1]


def test_a_rank_names_its_chains_by_their_numbers_in_the_run() -> None:
    x = torch.zeros(8, 2, dtype=double)
    x[5, 0] = 100.0
    mcmc = MCMC(NUTS(0.5), 100, 0, 8, seed=0, adaptation=None, chain_batch_size=4, ranks=(1, 2))
    with pytest.warns(RuntimeWarning, match="Chain 5 of 8 never moved"):
        mcmc.run(Wall().double(), x)
    assert mcmc.stuck_chains() == [5]


def test_divergences_of_chains_that_are_not_called_stuck_are_reported() -> None:
    mcmc = MCMC(NUTS(50.0), 20, 0, 4, seed=0, adaptation=None)
    mcmc.run(Wall().double() * 1e6)
    assert "80 of 80 draws diverged" in str(mcmc.diagnose())


def test_pyros_summary_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    def potential(params: dict[str, Tensor]) -> Tensor:
        return Wall().double()(params["x"])

    x = torch.zeros(3, 2, dtype=double)
    x[2, 0] = 100.0
    kernel = infer.NUTS(
        potential_fn=potential, step_size=0.5, adapt_step_size=False, adapt_mass_matrix=False
    )
    mcmc = infer.MCMC(kernel, 100, 0, initial_params={"x": x}, num_chains=3, disable_progbar=True)
    with pytest.warns(RuntimeWarning, match="Chain 2 of 3 never moved"):
        mcmc.run()
    mcmc.summary()
    assert "Chain 2 of 3 never moved after warm-up" in capsys.readouterr().out


def test_few_steps_and_low_acceptance_are_no_proof() -> None:
    assert stuck_chains(torch.tensor([0, 30, 20, 40]), 56) == []
    assert stuck_chains(torch.tensor([0, 30, 20, 40]), 57) == [0]
    assert stuck_chains(torch.zeros(4), 200) == [0, 1, 2, 3]
    assert stuck_chains(torch.tensor([10, 10]), 10) == []


def test_what_is_said_fits_one_several_and_all() -> None:
    energies = torch.arange(30.0)
    assert (
        "Chains 0, 3 of 30 never moved after warm-up (energy 0 to 3, median of the others 15)"
        in describe_stuck([0, 3], 30, energies)
    )
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more of 30" in describe_stuck(
        list(range(20)), 30, energies
    )
    assert describe_stuck([0, 1], 2, torch.ones(2)).startswith(
        "None of 2 chains moved after warm-up (energy 1)."
    )
    assert describe_stuck([], 3, torch.ones(3)) == ""


def test_a_diagnosis_of_draws_alone_names_it_too() -> None:
    draws = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    draws[2] = 1.0
    found = diagnose(draws, {"diverging": torch.zeros(4, 300, dtype=torch.bool)})
    assert found.findings[0].message.startswith(
        "Chain 2 of 4 never moved after warm-up. Start it elsewhere"
    )
