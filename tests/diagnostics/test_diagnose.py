"""What `diagnose` finds in runs that went wrong, and that it finds nothing in others."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroebm import MCMC, NUTS, Energy, ModelEnergy, infer
from pyroebm.core import Unnormalized
from pyroebm.core.statistics import arviz
from pyroebm.diagnostics import (
    Diagnosis,
    Finding,
    convergence,
    diagnose,
    stein_residual,
    stein_z,
    to_arviz,
)
from pyroebm.diagnostics.energy_probes import find_edge, find_tail, flat_part
from pyroebm.kernels import WindowAdaptation
from pyroebm.targets import Exponential, Funnel, Gaussian

double = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=double, generator=torch.Generator().manual_seed(seed))


def energy_of(log_density: Any, event_shape: tuple[int, ...] = (), **options: Any) -> Energy:
    return Unnormalized(log_density, event_shape=event_shape, **options).double()


def run_of(energy: Energy, draws: int, chains: int = 4, kernel: Any = None, **options: Any) -> MCMC:
    initial = options.pop("initial", None)
    mcmc = MCMC(kernel or NUTS(), draws, draws, chains, seed=0, compile=False, **options)
    with warnings.catch_warnings():  # of chains that never moved
        warnings.simplefilter("ignore", RuntimeWarning)
        mcmc.run(energy, initial)
    return mcmc


def found(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.kind: finding for finding in diagnosis.findings}


def calm(draws: Tensor, **stats: Tensor) -> dict[str, Tensor]:
    return {"diverging": torch.zeros(draws.shape[:2], dtype=torch.bool), **stats}


# Densities that cannot be normalized


@pytest.mark.parametrize(
    ("energy", "draws", "entries"),
    [
        (energy_of(lambda x: x**2), 50, ("x",)),
        (energy_of(lambda x: -torch.nn.functional.softplus(-x)), 20, ("x",)),
        (energy_of(lambda x: -0.5 * x[..., :2].square().sum(-1) + 0 * x[..., 2], (3,)), 20, None),
        (energy_of(lambda x: 10.0 * torch.cos(x)), 200, ("x",)),
        (energy_of(lambda x: -torch.log1p(x.abs())), 50, ("x",)),
    ],
    ids=["-x^2", "softplus(-x)", "a flat coordinate", "a von Mises density on the line", "1 / x"],
)
def test_a_density_that_cannot_be_normalized_is_named_with_the_coordinate(
    energy: Energy, draws: int, entries: tuple[str, ...] | None
) -> None:
    diagnosis = run_of(energy, draws).diagnose()
    # nothing else is said: all of it follows
    assert [finding.kind for finding in diagnosis.findings] == ["unbounded"]
    assert diagnosis.findings[0].entries == (entries or ("x[2]",))
    assert "cannot be normalized along" in str(diagnosis)


def test_a_direction_that_no_coordinate_has_is_found_too() -> None:
    """Only differences matter, as of logits that may all be shifted alike."""
    x = normal(4, 100, 4)
    x[..., 1:] += 1000.0 * normal(4, 100, 1, seed=1).cumsum(1)
    energy = energy_of(lambda x: -0.5 * x[..., 0] ** 2 - x[..., 1:].var(-1), (4,))
    finding = found(diagnose(x, calm(x), energy=energy))["unbounded"]
    assert set(finding.entries) == {"x[1]", "x[2]", "x[3]"}


def test_draws_at_infinity_are_named_with_their_chains() -> None:
    """They come without a divergence: softplus(-inf) is 0."""
    x = normal(4, 100)
    x[2, 50:] = math.inf
    energy = energy_of(lambda x: -torch.nn.functional.softplus(-x))
    finding = found(diagnose(x, calm(x), energy=energy))["unbounded"]
    assert finding.entries == ("x",)
    assert "not finite in chain 2" in finding.message


@pytest.mark.parametrize(
    "log_density",
    [
        lambda x: -torch.log1p(x**2),
        lambda x: -(x**2) / 2,
        lambda x: -x.abs(),
        lambda x: torch.where(x > -8.0, 0.5 * x - x.exp(), math.inf),
        lambda x: torch.where(x.abs() < 3.0, 0 * x, -math.inf),
        lambda x: torch.where(x.abs() < 30.0, 0 * x, math.nan),
    ],
    ids=[
        "Cauchy",
        "normal",
        "Laplace",
        "log of a gamma variable, underflowed",
        "box",
        "box of NaN",
    ],
)
def test_a_proper_tail_is_none(log_density: Any) -> None:
    energy = energy_of(log_density)
    assert find_tail(energy, torch.tensor(0.3, dtype=double), torch.tensor(2.0).double()) is None


def test_equal_masses_of_all_decades_are_no_fall() -> None:
    """Energies of 1 / x in float32, with a constant that leaves them few digits."""
    energy = Unnormalized(lambda x: 1000.0 - torch.log(x.abs()))
    for distance in range(1, 20):
        assert find_tail(energy, torch.tensor(0.0), torch.tensor(float(distance))) is not None


def test_a_scale_that_overflows_is_no_proper_tail() -> None:
    energy = energy_of(lambda x: x**2)
    tail = find_tail(energy, torch.tensor(0.0, dtype=double), torch.tensor(1e153, dtype=double))
    assert tail is not None
    assert math.isfinite(tail.energies[1])


def test_the_flat_part_of_a_direction_leaves_what_is_curved() -> None:
    energy = energy_of(lambda x: -((x[..., 0] + 2 * x[..., 1]) ** 2), (3,))
    at, way = normal(3), torch.tensor([3.0, 4.0, 5.0], dtype=double)
    torch.testing.assert_close(
        flat_part(energy, at, way), torch.tensor([0.8, -0.4, 5.0], dtype=double)
    )
    torch.testing.assert_close(flat_part(energy, math.nan * at, way), torch.zeros(3, dtype=double))


# Energies that are not finite


def test_nan_is_the_cause_of_divergences_where_a_support_is_missing() -> None:
    mcmc = run_of(energy_of(lambda x: torch.log(x[..., 1]) - x.square().sum(-1), (2,)), 200)
    findings = found(mcmc.diagnose())
    assert "divergences" not in findings
    assert findings["nonfinite"].entries == ("x[1]",)
    assert "The energy is nan at x[1] = -" in findings["nonfinite"].message


def test_an_infinite_gradient_is_named_too() -> None:
    x = torch.linspace(0.1, 3.0, 50, dtype=double)
    # the root of x - x is 0, and its gradient is inf - inf
    edge = find_edge(energy_of(lambda x: torch.where(x > 0, -x, torch.sqrt(x - x))), x, x.std())
    assert edge is not None
    assert math.isfinite(edge.energy)


def test_an_energy_that_checks_its_arguments_or_has_no_gradient_is_probed_too() -> None:
    def checked(x: Tensor) -> Tensor:
        with pyro.validation_enabled(True):
            scale = x[..., 0].exp()  # 0 and inf far out
            return dist.Normal(0.0, scale, validate_args=True).log_prob(x[..., 1].detach())

    x = normal(4, 100, 2)
    x[..., 0] += 3.0 * torch.arange(4.0)[:, None]
    stats = calm(x)
    stats["diverging"][:] = True
    assert "unbounded" in found(diagnose(x, stats, energy=energy_of(checked, (2,))))
    cut = energy_of(
        lambda x: torch.log(x.detach()).sum(-1) - 0.5 * x.detach().square().sum(-1), (2,)
    )
    x = x.abs()
    assert found(diagnose(x, stats, energy=cut))["nonfinite"].entries in {("x[0]",), ("x[1]",)}


def test_a_cliff_before_the_edge_is_the_cause_instead() -> None:
    def wall(x: Tensor) -> Tensor:
        return torch.where(x > 0, -x, torch.where(x > -1.0, -1e4 + 0 * x, math.nan))

    x = torch.linspace(0.1, 2.0, 50, dtype=double)
    assert find_edge(energy_of(wall), x, torch.tensor(1.0, dtype=double)) is None


def test_divergences_of_a_finite_energy_name_the_chain_that_has_them() -> None:
    x = normal(4, 500)
    stats = calm(x)
    stats["diverging"][2, ::10] = True
    finding = found(diagnose(x, stats, energy=Gaussian(torch.zeros((), dtype=double))))
    assert finding["divergences"].chains == (2,)
    assert "50 of 2000 draws diverged (in chain 2)" in finding["divergences"].message


# Chains and entries


def test_a_chain_that_never_moves_is_named_once_with_its_energy() -> None:
    """The model of A1: its scale is far too small at the start of one chain."""

    def model(y: Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0, 1)), pyro.sample("tau", dist.HalfCauchy(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, tau), obs=y)

    y = 0.3 + normal(20)
    energy = ModelEnergy(model, y)
    initial = energy.unconstrain(
        {"mu": torch.zeros(8, dtype=double), "tau": torch.ones(8, dtype=double)}
    )
    initial[5, 1] = -9.0
    mcmc = MCMC(NUTS(0.1), 300, 0, 8, seed=0, adaptation=None, compile=False)
    with pytest.warns(RuntimeWarning, match="Chain 5 of 8 never moved"):
        mcmc.run(energy, initial)
    diagnosis = mcmc.diagnose()
    assert [finding.kind for finding in diagnosis.findings] == ["stuck"]
    assert diagnosis.findings[0].chains == (5,)
    energies = mcmc.state.energy
    assert f"(energy {energies[5]:.3g}, median of the others" in str(diagnosis)
    assert diagnosis.divergences == 300


def test_one_chain_in_a_mode_of_its_own_is_named() -> None:
    wells = energy_of(lambda x: torch.logaddexp(-0.5 * (x - 8) ** 2, -0.5 * (x + 8) ** 2))
    initial = torch.full((8,), -8.0, dtype=double)
    initial[3] = 8.0
    findings = found(run_of(wells, 300, 8, initial=initial).diagnose())
    assert set(findings) == {"disagreement"}
    assert findings["disagreement"].chains == (3,)
    assert "Chain 3 of 8 disagrees with the others in x: mean 7.99, theirs -8" in str(findings)


def test_half_the_chains_are_no_exception() -> None:
    x = normal(8, 500)
    x[::2] += 10.0
    assert set(found(diagnose(x, calm(x)))) == {"r_hat"}


def test_a_chain_is_named_where_it_alone_has_another_scale() -> None:
    x = normal(8, 500, 2)
    x[6, :, 1] *= 5.0
    finding = found(diagnose(x, calm(x)))["disagreement"]
    assert (finding.chains, finding.entries) == ((6,), ("x[1]",))


def test_chains_have_their_numbers_in_the_run() -> None:
    x = normal(8, 500)
    x[6] += 5.0
    findings = found(diagnose(x, calm(x), first_chain=16, num_chains=32))
    assert findings["disagreement"].chains == (22,)
    assert "Chain 22 of 32" in findings["disagreement"].message


def test_an_entry_that_has_not_settled_is_named_among_those_that_have() -> None:
    x = normal(4, 500, 3, 2)
    x[..., 2, 1] += torch.linspace(0.0, 3.0, 500, dtype=double)
    findings = found(diagnose(x, calm(x)))
    assert set(findings) == {"unsettled"}
    assert findings["unsettled"].entries == ("x[2, 1]",)
    assert "1 of 6 entries" in findings["unsettled"].message


def test_trees_that_are_cut_short_are_counted() -> None:
    mcmc = run_of(Funnel().double(), 200, kernel=NUTS(max_tree_depth=3))
    finding = found(mcmc.diagnose())["tree_depth"]
    shares = mcmc.get_stats()["reached_max_treedepth"].double().mean(1)
    assert finding.chains == (int(shares.argmax()),)
    assert f"{100 * float(shares.mean()):.0f} % of the trajectories" in finding.message


def test_the_chain_of_low_acceptance_and_that_of_low_bfmi_are_named() -> None:
    x = normal(4, 500)
    rates, energies = torch.full((4, 500), 0.8), normal(4, 500, seed=1)
    rates[1] = 0.05
    energies[2] = energies[2].cumsum(0)
    findings = found(diagnose(x, calm(x, acceptance_rate=rates, energy=energies)))
    assert set(findings) == {"acceptance", "bfmi"}
    assert findings["acceptance"].chains == (1,)
    assert "of chain 1 of 4 is 0.05, of the others 0.8" in findings["acceptance"].message
    assert findings["bfmi"].chains == (2,)


def test_the_entry_of_the_smallest_effective_sample_size_is_named() -> None:
    x = normal(4, 500, 3)
    x[..., 1] = x[:, :125, 1].repeat_interleave(4, 1)
    findings = found(diagnose(x, calm(x), max_r_hat=1.05, min_ess=1000.0))
    assert set(findings) == {"ess"}
    assert findings["ess"].entries == ("x[1]",)


# Names of sites


def test_coordinates_have_the_names_of_the_results() -> None:
    """A simplex has one coordinate less than entries, so that numbers alone would be wrong."""

    def model() -> None:
        pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.factor("improper", pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))[1])

    energy = ModelEnergy(model)
    x = torch.randn(4, 400, 5, generator=torch.Generator().manual_seed(0))
    x[..., 4] = 1.0  # loc[1], which energies of the model do not hold still
    findings = found(diagnose(x, calm(x), energy=energy, named=energy.constrain))
    assert findings["constant"].entries == ("loc[1]",)
    x[..., 4] = torch.linspace(0.0, 5.0, 400)
    findings = found(diagnose(x, calm(x), energy=energy, named=energy.constrain))
    assert findings["unsettled"].entries == ("loc[1]",)


def test_a_bounded_site_is_named_in_its_own_space() -> None:
    class Flat(Energy):
        """1 / x on the positive numbers, with an infinite integral at both ends."""

        support = constraints.positive

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    mcmc = run_of(Flat().double(), 25)
    finding = found(mcmc.diagnose())["unbounded"]
    assert finding.entries == ("x",)


def test_pyros_driver_names_the_sites_of_the_model() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.log(b))

    pyro.set_rng_seed(0)
    mcmc = infer.MCMC(infer.NUTS(model), 100, 100, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert found(mcmc.diagnose())["nonfinite"].entries == ("b",)


# What is not defined must not hide what is


def test_a_constant_coordinate_does_not_silence_the_stein_residual() -> None:
    x = normal(4, 1000, 3)
    x[..., 1] = 1.0
    scores = -x.clone()
    scores[..., 1] = 0.0
    assert stein_z(x, scores) < 5
    biased = 1.3 * x
    biased[..., 1] = 1.0
    assert 5 < stein_z(biased, -biased) < math.inf
    assert math.isnan(stein_z(torch.ones(4, 50, 2), torch.ones(4, 50, 2)))
    scores[0, 0, 0] = math.nan
    assert stein_z(x, scores) == math.inf
    # what all draws agree on has no error: a score of 1, and of 0 the variance of x
    assert stein_z(x, torch.ones_like(x)) == stein_z(x, torch.zeros_like(x)) == math.inf
    energy = energy_of(lambda x: -0.5 * x[..., ::2].square().sum(-1) + 0 * x[..., 1], (3,))
    assert stein_residual(energy, biased) > 5


def test_a_constant_entry_hides_no_other() -> None:
    x = normal(4, 500, 3)
    x[..., 0] = 7.0
    findings = found(diagnose(x, calm(x)))
    assert set(findings) == {"constant"}
    assert findings["constant"].entries == ("x[0]",)
    x[..., 1] += torch.tensor([0.0, 0.0, 9.0, 9.0], dtype=double)[:, None]
    diagnosis = diagnose(x, calm(x))
    assert set(found(diagnosis)) == {"constant", "r_hat"}
    assert diagnosis.r_hat > 1.5
    assert diagnosis.ess_bulk < 20


def test_a_chain_of_one_energy_does_not_hide_the_bfmi_of_the_others() -> None:
    x, energies = normal(4, 500), normal(4, 500, seed=1)
    x[0], energies[0] = 1.0, 3.0
    energies[1] = energies[1].cumsum(0)
    findings = found(diagnose(x, calm(x, energy=energies)))
    assert set(findings) == {"stuck", "bfmi"}
    assert findings["bfmi"].chains == (1,)


def test_results_that_are_constant_by_design_are_left_out() -> None:
    """The upper triangle of a Cholesky factor is 0, its first entry 1."""
    model = Exponential(2.0).double()

    def named(x: Tensor) -> Mapping[str, Tensor]:
        return {"factor": torch.stack([torch.ones_like(x), x, 0 * x], -1)}

    x = normal(4, 500)
    assert diagnose(x, calm(x), named=named).mixed
    assert model.log_z is not None


# Runs without a fault


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_found_in_runs_of_a_normal_distribution(seed: int) -> None:
    mcmc = MCMC(NUTS(), 1000, 200, 4, seed=seed, compile=False)
    mcmc.run(Gaussian(torch.zeros(3, dtype=double)))
    assert mcmc.diagnose().mixed, str(mcmc.diagnose())


def test_nothing_is_found_in_exact_draws_of_twenty_seeds() -> None:
    for seed in range(20):
        x = normal(4, 1000, 3, seed=seed)
        diagnosis = diagnose(x, calm(x), energy=Gaussian(torch.zeros(3, dtype=double)))
        assert diagnosis.mixed, f"seed {seed}: {diagnosis}"


def test_nothing_is_found_in_a_run_of_eight_schools() -> None:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=double)
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=double)

    def model() -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0, 5)), pyro.sample("tau", dist.HalfCauchy(5))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(0, 1))
            pyro.sample("y", dist.Normal(mu + tau * z, error), obs=y)

    # at the usual 0.8 a few draws of 1,000 diverge
    adaptation = WindowAdaptation(target_acceptance=0.99)
    mcmc = MCMC(NUTS(), 500, 300, 16, seed=0, adaptation=adaptation, compile=False)
    mcmc.run(ModelEnergy(model))
    assert mcmc.diagnose().mixed, str(mcmc.diagnose())


def test_the_energy_of_healthy_draws_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = Gaussian(torch.zeros(3, dtype=double))
    x = energy.sample(4000, torch.Generator().manual_seed(0)).reshape(4, 1000, 3)
    for name in ("find_tail", "find_edge"):
        monkeypatch.setattr(f"pyroebm.diagnostics.convergence.{name}", None)
    assert diagnose(x, calm(x), energy=energy).mixed


# What is printed


def test_a_diagnosis_prints_a_line_of_numbers_and_one_for_each_finding() -> None:
    findings = (Finding("ess", "Draw more & <longer>."), Finding("bfmi", "Heavy tails."))
    diagnosis = Diagnosis(1.02, 300.0, 200.0, 0.2, 1, math.nan, findings)
    assert str(diagnosis).split("\n") == [
        "Draws may be biased: R-hat 1.020, bulk ESS 300, tail ESS 200, 1 divergence.",
        "- Draw more & <longer>.",
        "- Heavy tails.",
    ]
    shown = diagnosis._repr_html_()
    assert shown.count("<li>") == 2
    assert "Draw more &amp; &lt;longer&gt;." in shown
    assert "<ul>" not in Diagnosis(1.0, 1e4, 1e4, 0.9, 0, 1.0)._repr_html_()


@pytest.mark.parametrize(
    ("kinds", "heading"),
    [
        ((), "Mixed"),
        (("divergences",), "Draws may be biased"),
        (("ess", "divergences"), "Draws may be biased"),
        (("divergences", "r_hat"), "Not mixed"),
        (("ess",), "Few effective draws"),
        (("one_chain",), "One chain"),
        (("tree_depth",), "Mixed, but slowly"),
    ],
)
def test_the_heading_of_a_diagnosis_is_its_main_finding(
    kinds: tuple[str, ...], heading: str
) -> None:
    found = tuple(Finding(kind, "It is so.") for kind in kinds)
    diagnosis = Diagnosis(1.0, 1e4, 1e4, 0.9, 3, 1.0, found)
    assert diagnosis.heading == heading
    assert str(diagnosis).startswith(f"{heading}: R-hat 1.000")
    assert diagnosis.mixed == (not kinds)


def test_every_kind_of_finding_has_a_heading() -> None:
    source = inspect.getsource(convergence)
    kinds = set(re.findall(r'Finding\(\s*"(\w+)"', source))
    assert kinds == set().union(*convergence.HEADINGS.values())


def test_draws_without_statistics_and_runs_are_told_apart() -> None:
    x = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
    assert diagnose(x).mixed
    assert str(diagnose(x.numpy())) == str(diagnose(x))
    with pytest.raises(ValueError, match=r"got MCMC; a run is diagnosed by mcmc.diagnose\(\)"):
        diagnose(MCMC(NUTS()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got shape \(500,\)"):
        diagnose(x[0, :, 0])


def test_statistics_have_the_names_of_arvizs_schema() -> None:
    """https://python.arviz.org/en/stable/schema/schema.html, sample_stats."""
    schema = {
        "lp",
        "acceptance_rate",
        "step_size",
        "tree_depth",
        "reached_max_treedepth",
        "diverging",
        "energy",
        "n_steps",
    }
    mcmc = run_of(Gaussian(torch.zeros(2, dtype=double)), 20)
    stats = mcmc.to_arviz().sample_stats
    assert set(stats.data_vars) == schema
    assert stats["reached_max_treedepth"].dtype == stats["diverging"].dtype == np.bool_
    assert arviz().bfmi(
        to_arviz(mcmc.get_samples(group_by_chain=True), mcmc.get_stats())
    ).shape == (4,)


def test_no_chain_is_blamed_where_r_hat_fails_by_a_little() -> None:
    """Whatever chain is left out, the rest would pass."""
    x = torch.randn(4, 500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] += 0.3
    found = diagnose(x, {"diverging": torch.zeros(4, 500, dtype=torch.bool)})
    assert 1.01 < found.r_hat < 1.05
    assert not any(finding.kind == "disagreement" for finding in found.findings)
    x[1] += 2.0
    found = diagnose(x, {"diverging": torch.zeros(4, 500, dtype=torch.bool)})
    assert [f.chains for f in found.findings if f.kind == "disagreement"] == [(1,)]


@pytest.mark.parametrize(
    ("observables", "message"),
    [
        (lambda sites: sites["x"], "observables must be a dictionary of functions .* function"),
        ({"y": lambda sites: sites["y"]}, r"observables\['y'\] must .* \['x'\], .*KeyError\('y'\)"),
        ({"y": lambda x: x**2}, r"observables\['y'\] must be a function of the dict.*TypeError"),
        ({"y": lambda x: x.mean(-1)}, r"observables\['y'\] must be .*AttributeError"),
    ],
)
def test_observables_are_functions_of_the_sites(observables: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(torch.zeros(4, 10), observables=observables)


def test_a_diagnosis_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match=r"use diagnosis\.mixed"):
        bool(Diagnosis(1.0, 1e4, 1e4, 0.9, 0, 1.0))
