"""Flows as guides: SVI and our objectives are one fit, weighted posteriors are exact, NeuTra and
NUTS run on top; mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from lib.flow_cases import stirred
from lib.pyro_models import EFFECT, SIGMA, eight_schools, nested_support
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor, nn

from pyroebm import MCMC, NUTS, FlowGuide
from pyroebm.core import Energy
from pyroebm.core.statistics import mcse_mean
from pyroebm.flows import (
    NICE,
    Flow,
    PullbackEnergy,
    RealNVP,
    RedundantNICE,
    evaluate_flow,
    importance_sample,
)
from pyroebm.objectives import ForwardKL, ReverseKL
from pyroebm.training import fit

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([1.2, -0.4, 2.0], dtype=torch.float64)


def normal(y: Tensor) -> None:
    """N(0, 2) prior, unit noise: the posterior is N(sum(y) / (n + 1/4), 1 / (n + 1/4))."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def constrained() -> None:
    """Gamma(2, 1) with counts 3 and 5, Beta(2, 3) with 4 of 6, Dirichlet(1, 2, 3) with 2, 0, 1:
    independent."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("counts", 2):
        pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([3.0, 5.0]))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    pyro.sample("successes", dist.Binomial(6, share), obs=torch.tensor(4.0))
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("kinds", 3):
        pyro.sample("kind", dist.Categorical(p), obs=torch.tensor([0, 0, 2]))


EXACT = {  # posterior mean and second moment
    "rate": (10.0 / 3.0, 110.0 / 9.0),
    "share": (6.0 / 11.0, 6.0 * 7.0 / (11.0 * 12.0)),
    "p": (torch.tensor([3.0, 2.0, 4.0]) / 9.0, torch.tensor([12.0, 6.0, 20.0]) / 90.0),
}


def plates(y: Tensor) -> None:
    """Latents in no plate, in one, in two, of several event dimensions."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    rows = pyro.plate("rows", 2, dim=-2)
    with pyro.plate("columns", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, scale))
        with rows:
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(a + b * p[..., 0], scale), obs=y)


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], int]] = {
    "normal": (normal, (Y,), 1),
    "constrained": (constrained, (), 4),
    "plates": (plates, (torch.linspace(-1.0, 1.0, 6).reshape(2, 3).double(),), 22),
    "eight schools": (
        eight_schools,
        (torch.tensor(EFFECT).double(), torch.tensor(SIGMA).double()),
        10,
    ),
}
FLOWS: dict[str, Callable[[int], Flow]] = {
    "NICE": lambda d: NICE(d, num_layers=2, hidden_sizes=(8,), dtype=torch.float64),
    "RealNVP": lambda d: RealNVP(d, num_layers=2, hidden_sizes=(8,), dtype=torch.float64),
    "redundant": lambda d: RedundantNICE(
        d, d + 2, num_layers=2, hidden_sizes=(8,), dtype=torch.float64
    ),
}
every_case = pytest.mark.parametrize("case", CASES)
every_flow = pytest.mark.parametrize("name", FLOWS)


def made(
    case: str, name: str, stir: float = 0.1, kind: type[FlowGuide] = FlowGuide
) -> tuple[FlowGuide, tuple[Any, ...]]:
    model, args, dim = CASES[case]
    return kind(model, stirred(FLOWS[name](dim), scale=stir)), args


# --------------------------------------------------------------------------------------------------
# One fit, two ways


def losses(guide: FlowGuide, args: tuple[Any, ...], n: int = 16) -> tuple[Tensor, Tensor]:
    """Minus the ELBO by Pyro and J_R - log C by us, with the noise that Pyro drew, and the
    gradients of both."""
    energy, flow = guide.energy(*args), guide.flow
    elbo = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=2)
    torch.manual_seed(3)
    theirs = elbo.differentiable_loss(guide.augmented, guide, *args)
    torch.manual_seed(3)
    z = flow.base.distribution(flow.dtype, flow.device).expand((n, 1, 1)).sample().flatten(0, 2)
    ours, _ = ReverseKL(energy, gradient="stl" if guide.stl else "total").loss_at(flow, z)
    return theirs, ours


def check_losses_agree(guide: FlowGuide, args: tuple[Any, ...]) -> None:
    theirs, ours = losses(guide, args)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    parameters = list(guide.flow.parameters())
    for name, (a, b) in enumerate(
        zip(
            *(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (theirs, ours)),
            strict=True,
        )
    ):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=f"gradient {name}")


@every_flow
@every_case
def test_svi_is_our_reverse_kl_draw_by_draw(case: str, name: str) -> None:
    check_losses_agree(*made(case, name))


@pytest.mark.parametrize("name", ["NICE", "redundant"])
def test_sticking_the_landing_is_ours_too(name: str) -> None:
    model, args, dim = CASES["constrained"]
    check_losses_agree(FlowGuide(model, stirred(FLOWS[name](dim), scale=0.1), stl=True), args)


@every_flow
def test_one_particle_at_a_time_is_the_same_loss(name: str) -> None:
    guide, args = made("plates", name)
    energy, flow = guide.energy(*args), guide.flow
    torch.manual_seed(4)
    theirs = Trace_ELBO(num_particles=5).loss(guide.augmented, guide, *args)
    torch.manual_seed(4)
    z = torch.stack([flow.base.distribution(flow.dtype, flow.device).sample() for _ in range(5)])
    assert theirs == pytest.approx(float(ReverseKL(energy).loss_at(flow, z)[0].detach()), rel=1e-9)


def test_the_model_itself_is_enough_for_a_plain_flow() -> None:
    guide, args = made("eight schools", "NICE")
    values = []
    for model in (eight_schools, guide.augmented):
        torch.manual_seed(0)
        values.append(Trace_ELBO(num_particles=4).loss(model, guide, *args))
    assert values[0] == values[1]


@every_flow
def test_svi_and_our_loop_train_the_same_parameters(name: str) -> None:
    guide, args = made("constrained", name, 0.0)
    ours = dict(guide.flow.named_parameters())
    energy = guide.energy(*args)
    svi = SVI(
        guide.augmented,
        guide,
        pyro.optim.Adam({"lr": 1e-2}),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    start = {key: p.detach().clone() for key, p in ours.items()}
    first = [svi.step(*args) for _ in range(30)]
    assert sum(first[-5:]) < sum(first[:5])
    moved = [
        key
        for key, p in guide.flow.named_parameters()
        if p is ours[key] and not torch.equal(p, start[key])
    ]
    assert len(moved) == len(start)
    objective = ReverseKL(energy, 64, beta_start=1.0)
    fit(guide.flow, objective, num_steps=30, lr=1e-2)
    stored = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    assert stored == {id(p) for p in guide.flow.parameters()} == {id(p) for p in ours.values()}
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True)
    assert elbo.loss(guide.augmented, guide, *args) < sum(first[:5]) / 5


def test_a_flow_may_be_made_at_the_first_call_and_a_model_may_be_a_module() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, y: Tensor) -> Tensor:
            pyro.module("regression", self)
            mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean.sum(-1, keepdim=True), self.scale.abs()), obs=y)
            return mean

    model = Regression()
    guide = FlowGuide(model, FLOWS["redundant"])
    assert not hasattr(guide, "flow")
    with pytest.raises(ValueError, match="must have run once to know the sites"):
        guide.sample(2)
    svi = SVI(guide.augmented, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(Y)
    assert (guide.flow.dim, guide.flow.total_dim) == (2, 4)
    assert not any(
        key.startswith("_plain") or "scale" in key or "make" in key
        for key, _ in guide.named_parameters()
    )
    # a parameter of the model is learned beside the guide
    assert float(model.scale.detach()) != 1.0
    assert guide.augmented(Y).shape == (2,)


# --------------------------------------------------------------------------------------------------
# The sites


@every_flow
@every_case
def test_sites_are_those_of_the_energy(case: str, name: str) -> None:
    guide, args = made(case, name)
    energy = guide.energy(*args)
    draws, generator = (
        guide.sample(6, torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(1),
    )
    x = guide.flow.forward_and_log_prob(guide.flow.rsample_base(6, generator))[0][
        :, : guide.flow.dim
    ]
    again = energy.constrain(x.detach())
    assert {key: value.shape[1:] for key, value in draws.items()} == energy.sites
    for key, value in draws.items():
        torch.testing.assert_close(value, again[key], rtol=0.0, atol=0.0)
    one = guide(*args)
    assert {key: value.shape for key, value in one.items()} == energy.sites
    quantiles, median = guide.quantiles([0.1, 0.5]), guide.median()
    for key, shape in energy.sites.items():
        assert quantiles[key].shape == (2, *shape)
        assert torch.equal(median[key], quantiles[key][1])
        assert bool((quantiles[key][0] <= quantiles[key][1]).all())


@every_flow
def test_predictive_draws_the_guide(name: str) -> None:
    guide, args = made("normal", name)
    draws = Predictive(guide, num_samples=7, parallel=False)(*args)
    assert draws["mean"].shape == (7,)
    replicated = Predictive(guide.augmented, guide=guide, num_samples=5, return_sites=("mean",))(
        *args
    )
    # as of any guide, with the model's plate at the right
    assert replicated["mean"].shape == (5, 1)


def test_set_up_leaves_the_random_stream_alone() -> None:
    guide, args = made("eight schools", "NICE")
    before = torch.get_rng_state()
    guide.energy(*args)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------
# What a fit reaches


def trained(
    guide: FlowGuide,
    args: tuple[Any, ...],
    num_steps: int = 400,
    lr: float = 1e-2,
    **options: Any,
) -> Energy:
    energy = guide.energy(*args)
    objective = ReverseKL(energy, **{"num_samples": 128, **options})
    fit(guide.flow, objective, num_steps=num_steps, lr=lr)
    return energy


def test_the_conjugate_normal_posterior_is_reached_by_svi() -> None:
    pyro.set_rng_seed(0)
    guide, args = made("normal", "NICE", 0.0)
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-2, "lrd": 0.99})
    svi = SVI(normal, guide, optimizer, Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(400):
        svi.step(*args)
    precision = len(Y) + 0.25
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4.0).log_prob(Y)
    loss = Trace_ELBO(num_particles=1000, vectorize_particles=True).loss(normal, guide, *args)
    assert loss == pytest.approx(-float(evidence), abs=1e-3)  # J = 0: the flow is the posterior
    draws = guide.sample(20_000, torch.Generator().manual_seed(0))["mean"]
    within_se(
        draws.mean(), float(Y.sum()) / precision, math.sqrt(1.0 / precision / 20_000) + 1e-2 / 5
    )
    assert float(draws.var()) == pytest.approx(1.0 / precision, rel=0.06)


@pytest.mark.parametrize("name", ["RealNVP", "redundant"])
def test_constrained_conjugate_posteriors_are_exact_after_weighting(name: str) -> None:
    guide, args = made("constrained", name, 0.0)
    energy = trained(guide, args, num_steps=250)
    # however well the flow fits: with too few weights there is no error
    result = importance_sample(guide.flow, energy, 20_000)
    assert result.pareto_k < 0.7
    evidence = (
        # Gamma-Poisson, of 3 and 5
        math.lgamma(10)
        - 10 * math.log(3)
        - math.lgamma(2)
        - math.log(6 * 120)
        + math.log(15)
        + math.lgamma(6)
        + math.lgamma(5)
        + math.lgamma(5)
        - math.lgamma(11)
        - math.lgamma(2)
        - math.lgamma(3)
        + math.lgamma(6)
        - math.lgamma(9)
        + math.lgamma(3)
        - math.lgamma(1)
        + math.lgamma(4)
        - math.lgamma(3)
    )
    within_se(result.log_z.value, evidence, result.log_z.standard_error, what="log evidence")
    for site, truths in EXACT.items():
        for power, truth in enumerate(truths, start=1):
            value, se = result.expectation(lambda x, s=site, k=power: energy.constrain(x)[s] ** k)  # type: ignore[misc]
            within_se(value, truth, se, what=f"E[{site}^{power}]")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RealNVP", "redundant"])
def test_eight_schools_agrees_with_the_reference_after_weighting(name: str) -> None:
    """Against posteriordb's reference draws of eight_schools_noncentered, ten thousand of them."""
    flow = (
        RealNVP(10, num_layers=4, hidden_sizes=(32,))
        if name == "RealNVP"
        else RedundantNICE(10, 12, num_layers=4, hidden_sizes=(32,))
    )
    guide = FlowGuide(eight_schools, flow)
    energy = trained(
        guide, CASES["eight schools"][1], steps=1000, num_samples=256, lr=5e-3, beta_start=1.0
    )
    result = importance_sample(flow, energy, 50_000)
    assert result.pareto_k < 0.7
    assert result.ess_fraction > 0.7

    def interesting(x: Tensor) -> Tensor:
        sites = guide.constrain(x)
        theta = sites["mu"][:, None] + sites["tau"][:, None] * sites["z"]
        return torch.stack((sites["mu"], sites["tau"], theta[:, 0], theta[:, 7]), 1)

    for power, truth in (
        (1, [4.4105, 3.6021, 6.1505, 4.8840]),
        (2, [30.403, 23.204, 69.363, 52.128]),
    ):
        mean, se = result.expectation(lambda x, k=power: interesting(x) ** k)  # type: ignore[misc]
        square, _ = result.expectation(lambda x, k=power: interesting(x) ** (2 * k))  # type: ignore[misc]
        theirs = ((square - mean**2) / 10_000).sqrt()
        within_se(
            mean, torch.tensor(truth), (se**2 + theirs**2).sqrt(), what=f"moments of power {power}"
        )


def test_other_objectives_and_the_report_take_the_same_flow() -> None:
    guide, args = made("normal", "redundant", 0.0)
    energy = guide.energy(*args)
    mean, deviation = float(Y.sum()) / 3.25, 3.25**-0.5
    draws = mean + deviation * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    history = fit(guide.flow, ForwardKL(draws, num_samples=128), num_steps=150, lr=2e-2)
    assert history["loss"][-1] < history["loss"][0]
    assert float(guide.median()["mean"]) == pytest.approx(mean, abs=4.0 * deviation / 500**0.5)
    report = evaluate_flow(guide.flow, energy, 2000, draws=draws, num_distances=200)
    assert report.weighted.ess_fraction > 0.5
    assert report.forward_ess is not None


# --------------------------------------------------------------------------------------------------
# Samplers on top


def test_neutra_reparam_is_pyros_and_its_potential_is_ours() -> None:
    guide, args = made("eight schools", "RealNVP")
    guide(*args)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    starts, potential, *_ = initialize_model(
        poutine.reparam(eight_schools, config=lambda _: neutra), args
    )
    (site,) = starts
    z = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    ours = PullbackEnergy(guide.flow, guide.energy(*args))
    theirs = torch.stack([potential({site: row}) for row in z])
    torch.testing.assert_close(theirs, ours(z), rtol=1e-9, atol=1e-9)
    sites = neutra.transform_sample(z.unsqueeze(1))  # Pyro's plates take the last batch dimension
    for key, value in ours.named(z).items():
        torch.testing.assert_close(sites[key].reshape(value.shape), value)


def test_neutra_reparam_refuses_redundant_latents_and_says_what_to_do() -> None:
    guide, args = made("normal", "redundant")
    guide(*args)
    with pytest.raises(ValueError, match="get_transform") as caught:
        initialize_model(poutine.reparam(normal, config=lambda _: NeuTraReparam(guide)), args)
    reasons, error = "", caught.value
    while error := error.__cause__:
        reasons += str(error)
    assert "kernels of this package on pyroebm.flows.PullbackEnergy" in reasons


def check_transported(energy: Energy, flow: Flow) -> None:
    """Its value against autograd's determinant."""
    transported = PullbackEnergy(flow, energy)
    z = torch.randn(4, flow.total_dim, generator=torch.Generator().manual_seed(2))
    for row in z:
        jacobian = torch.autograd.functional.jacobian(
            lambda r: flow.forward_and_log_prob(r)[0], row
        )
        expected = (
            flow.extend(energy)(flow.forward_and_log_prob(row)[0])
            - torch.linalg.slogdet(jacobian).logabsdet
        )
        torch.testing.assert_close(transported(row), expected)


@every_flow
def test_transported_is_the_energy_less_the_log_determinant(name: str) -> None:
    guide, args = made("plates", name)
    check_transported(guide.energy(*args), guide.flow)


@pytest.mark.parametrize("name", [pytest.param("RealNVP", marks=pytest.mark.slow), "redundant"])
def test_our_nuts_is_exact_through_a_flow_that_is_not(name: str) -> None:
    guide, args = made("constrained", name, 0.15)
    mcmc = MCMC(NUTS(), num_samples=40, warmup_steps=50, num_chains=64, seed=1, compile=False)
    mcmc.run(PullbackEnergy(guide.flow, guide.energy(*args)))
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == set(EXACT)
    for site, truths in EXACT.items():
        for power, truth in enumerate(truths, start=1):
            x, exact = draws[site] ** power, torch.as_tensor(truth).reshape(-1)
            for k, column in enumerate(x.reshape(*x.shape[:2], -1).unbind(-1)):
                within_se(column.mean(), exact[k], mcse_mean(column), what=f"E[{site}^{power}]")


# --------------------------------------------------------------------------------------------------
# Front door


def discrete() -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(k, 1.0))


def minibatch(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


def local(y: Tensor) -> None:
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y[rows])


def sequential() -> None:
    for i in pyro.plate("steps", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "args", "dim", "said"),
    [
        (discrete, (), 2, "cannot handle discrete sample site 'k'.*enumerating"),
        (
            local,
            (Y,),
            2,
            "latent 'z' must not be in a plate .* 'data' draws 2 of 3 rows.*subsample data only",
        ),
        (nested_support, (), 2, "support of latent 'below' must not depend on other latent"),
        (normal, (Y,), 3, r"flow must have dim=1.*latent variables \{'mean': 1\}, got dim=3"),
    ],
)
def test_what_a_guide_cannot_do_is_refused_with_the_reason(
    model: Callable[..., None], args: tuple[Any, ...], dim: int, said: str
) -> None:
    guide = FlowGuide(model, NICE(dim))
    for _ in range(2):  # refused once is refused again
        with pytest.raises(ValueError, match=said):
            guide(*args)


def test_sequential_plates_are_refused_by_pyro() -> None:
    with pytest.raises(NotImplementedError, match="sequential"):
        FlowGuide(sequential, NICE(2))()


def test_an_energy_of_another_dtype_or_without_fixed_density_is_refused() -> None:
    guide = FlowGuide(normal, NICE(1, dtype=torch.float32))
    with pytest.raises(
        ValueError, match=r"the same dtype: NICE has torch\.float32, ModelEnergy has torch\.float64"
    ):
        guide.energy(Y)
    with pytest.raises(ValueError, match=r"plate 'data' must not subsample.* 2 of 3 rows"):
        FlowGuide(minibatch, NICE(1)).energy(Y)


def test_svi_takes_minibatches_of_data() -> None:
    """The ELBO of a minibatch has the full one as its mean."""
    guide = FlowGuide(minibatch, stirred(FLOWS["redundant"](1), scale=0.15))
    full = FlowGuide(normal, guide.flow)
    full(Y)
    pyro.set_rng_seed(0)
    values = [
        torch.tensor([Trace_ELBO(num_particles=1).loss(g.augmented, g, Y) for _ in range(200)])
        for g in (guide, full)
    ]
    se = math.sqrt(sum(float(v.var()) / len(v) for v in values))
    within_se(values[0].mean(), values[1].mean(), se)


# --------------------------------------------------------------------------------------------------
# Mutants


class WithoutJacobian(FlowGuide):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        latent = self.sample_latent(*args, **kwargs)
        return {
            name: pyro.sample(name, dist.Delta(x, event_dim=x.dim()))
            for name, x in self.constrain(latent).items()
        }


class WithoutLatents(FlowGuide):
    """The factor of y is missing in the model."""

    def augmented(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide=[self._y]):
            return super().augmented(*args, **kwargs)


class Shuffled(FlowGuide):
    """x is packed in another order than it was unpacked."""

    def _pack_latent(self, trace: poutine.Trace) -> Tensor:
        return super()._pack_latent(trace).flip(-1)


# Pyro sees one of them too
@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide but not model")
@pytest.mark.parametrize("mutant", [WithoutJacobian, WithoutLatents, Shuffled])
def test_losses_catch(mutant: type[FlowGuide]) -> None:
    guide, args = made("constrained", "redundant", 0.3, mutant)
    energy, flow = guide.energy(*args), guide.flow
    guide(*args)
    torch.manual_seed(4)
    theirs = Trace_ELBO(num_particles=3).loss(guide.augmented, guide, *args)
    torch.manual_seed(4)
    z = torch.stack([flow.base.distribution(flow.dtype, flow.device).sample() for _ in range(3)])
    assert theirs != pytest.approx(float(ReverseKL(energy).loss_at(flow, z)[0].detach()), rel=1e-3)


class WithoutDeterminant(PullbackEnergy):
    def forward(self, z: Tensor) -> Tensor:
        return self.augmented(self.flow.forward_and_log_prob(z)[0])


def test_transported_catches_a_missing_determinant(monkeypatch: pytest.MonkeyPatch) -> None:
    guide, args = made("normal", "NICE", 0.3)
    energy = guide.energy(*args)
    check_transported(energy, guide.flow)
    monkeypatch.setattr(PullbackEnergy, "forward", WithoutDeterminant.forward)
    with pytest.raises(AssertionError):
        check_transported(energy, guide.flow)
