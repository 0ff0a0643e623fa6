"""Reverse KL: against quadrature, closed forms and Pyro's ELBO; its gradients; the loop's guards;
what a fit reaches; mutants."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.flow_cases import F64, noise, stirred
from pyro.distributions.transforms import affine_coupling
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy.optimize import minimize
from torch import Tensor, nn

from pyroebm import Boltzmann, Energy
from pyroebm.core import Unnormalized
from pyroebm.flows import (
    NICE,
    AdditiveCoupling,
    ConditionalGaussian,
    Flow,
    PLULinear,
    RedundantNICE,
    importance_sample,
)
from pyroebm.nn.mlp import frozen
from pyroebm.objectives import ReverseKL, evaluate_j, fit_flow, select_total_dim
from pyroebm.ppl import flow_guide, flow_model
from pyroebm.targets import DoubleWell, Gaussian


def redundant(
    dim: int = 1, total_dim: int = 2, hidden: int = 8, scale: float = 0.15
) -> RedundantNICE:
    flow = RedundantNICE(dim, total_dim, num_layers=2, hidden_sizes=(hidden,), dtype=F64)
    stirred(flow, scale=scale)
    return flow


class Known(Energy):
    """The density of a flow, copied, as an energy: the optimum of fitting that flow."""

    log_z = 0.0

    def __init__(self, flow: Flow) -> None:
        super().__init__((flow.dim,))
        self.flow = copy.deepcopy(flow).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def j_r_by_quadrature(flow: RedundantNICE, energy: Energy) -> float:
    """The written formula of J_R, term by term, integrated over z on a grid; determinants by torch,
    nothing from log_prob."""
    axis = torch.linspace(-8.0, 8.0, 321, dtype=F64)
    z = torch.cartesian_prod(*[axis] * flow.total_dim).reshape(-1, flow.total_dim)
    weight = (
        torch.exp(-0.5 * z.square().sum(-1))
        * (float(axis[1] - axis[0]) / math.sqrt(2 * math.pi)) ** flow.total_dim
    )
    d, extra = flow.dim, flow.total_dim - flow.dim
    with torch.no_grad():
        xy = flow.push(z)[0]
        terms = (
            energy(xy[:, :d].reshape(-1, *energy.event_shape))
            - torch.linalg.slogdet(flow.linear.matrix()).logabsdet
        )
        if flow.conditional is not None:
            law, y = flow.conditional(xy[:, :d]), xy[:, d:]
            deviation = (y - law.mean).unsqueeze(-1)
            quadratic = (
                deviation.mT @ torch.linalg.solve(law.covariance_matrix, deviation)
            ).reshape(-1)
            terms = (
                terms
                + 0.5 * torch.logdet(law.covariance_matrix)
                + 0.5 * quadratic
                + 0.5 * extra * math.log(2 * math.pi)
            )
    assert energy.log_z is not None
    h_z = 0.5 * flow.total_dim * (1 + math.log(2 * math.pi))
    return float((weight * terms).sum()) - h_z + energy.log_z


def check_j_r(flow: RedundantNICE, energy: Energy) -> None:
    truth = j_r_by_quadrature(flow, energy)
    for entropy in ("sampled", "exact"):
        value, se = evaluate_j(flow, energy, 40_000, entropy=entropy)
        within_se(value, truth, se, what=f"J_R with the {entropy} entropy")


def gradient(flow: Flow, energy: Energy, objective: ReverseKL, z: Tensor) -> Tensor:
    loss, _ = objective(flow, energy, z=z)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=F64) if g is None else g.flatten()
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


def check_stl_has_no_noise_at_the_optimum(flow: Flow) -> Energy:
    energy = Known(flow)
    stl = gradient(flow, energy, ReverseKL(gradient="stl"), noise(64, flow.total_dim))
    assert float(stl.abs().max()) < 1e-10, (
        "the path derivative is not 0 where the flow is the target"
    )
    return energy


# --------------------------------------------------------------------------------------------------
# The value


@pytest.mark.parametrize("total_dim", [1, 2])
@pytest.mark.parametrize(
    "energy",
    [DoubleWell(dtype=F64), Gaussian([0.5], scale=0.7, dtype=F64)],
    ids=["wells", "gaussian"],
)
def test_j_r_is_the_written_formula(total_dim: int, energy: Energy) -> None:
    check_j_r(redundant(1, total_dim), energy)


def test_j_of_two_dimensions_is_the_written_formula() -> None:
    check_j_r(redundant(2, 2), Gaussian([0.5, -1.0], scale=0.7, dtype=F64))


@pytest.mark.parametrize("dim", [1, 3])
def test_j_of_a_gaussian_target_is_the_analytic_divergence(dim: int) -> None:
    flow = NICE(dim, num_layers=0, dtype=F64)
    stirred(flow, scale=0.5)
    s, c = flow.linear.matrix().detach(), flow.transform.parts[-1].offset.detach()
    covariance = torch.eye(dim, dtype=F64) + 0.3
    q, p = (
        dist.MultivariateNormal(c, s @ s.T),
        dist.MultivariateNormal(torch.ones(dim, dtype=F64), covariance),
    )
    truth = torch.distributions.kl_divergence(q, p)
    energy = Gaussian(torch.ones(dim), covariance=covariance, dtype=F64)
    for entropy in ("sampled", "exact"):
        value, se = evaluate_j(flow, energy, 40_000, entropy=entropy)
        within_se(value, truth, se)


def test_j_r_bounds_the_divergence_of_the_marginal() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    x = torch.linspace(-8.0, 8.0, 801, dtype=F64)
    log_q = flow.log_prob_x(x.unsqueeze(-1))
    kl = float((log_q.exp() * (log_q + energy(x) + energy.log_z)).sum() * (x[1] - x[0]))
    value, se = evaluate_j(flow, energy, 40_000)
    assert kl > 0.0
    assert value > kl - 5 * se
    assert j_r_by_quadrature(flow, energy) > kl + 1e-3  # strictly: M and Sigma are not those of q


def test_sampled_entropy_has_the_smaller_error_near_the_optimum() -> None:
    flow = redundant(2, 2)
    errors = [
        evaluate_j(flow, Known(flow), 2000, entropy=entropy)[1] for entropy in ("sampled", "exact")
    ]
    assert errors[0] < 1e-12 < 0.01 < errors[1]
    assert abs(evaluate_j(flow, Known(flow), 2000)[0]) < 1e-12  # J >= 0, and 0 here


def test_facts_and_what_is_not_guessed() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    z = noise(100, 2)
    loss, facts = ReverseKL()(flow, energy, z=z)
    assert not any(fact.requires_grad for fact in facts.values())
    assert facts["j_r"] == loss.detach() + energy.log_z
    assert facts["j_r_minus_log_z"] == loss.detach()
    xy, log_q = flow.push(z)
    terms = flow.extend(energy)(xy) + log_q
    torch.testing.assert_close(facts["standard_error"], terms.detach().std() / 10.0)
    cold, facts = ReverseKL()(flow, energy, z=z, beta=0.5)
    torch.testing.assert_close(loss - cold, 0.5 * energy(xy[:, 0]).mean())
    assert "j_r" not in facts  # log C of a tempered energy is not known
    assert ReverseKL()(flow, energy, z=z, beta=0.5, log_z=1.5)[1]["j_r"] == cold.detach() + 1.5
    unknown = Unnormalized(lambda x: -(x**2), event_shape=()).double()
    assert "j_r" not in ReverseKL()(flow, unknown, z=z)[1]
    with pytest.raises(
        ValueError, match=r"log C of Unnormalized is not known.*log_z=0.0 for J_R - log C"
    ):
        evaluate_j(flow, unknown)
    assert math.isfinite(evaluate_j(flow, unknown, 100, log_z=0.0)[0])


def test_objective_refuses() -> None:
    flow, energy = redundant(), DoubleWell(dtype=F64)
    with pytest.raises(
        ValueError, match=r"entropy must be one of \('sampled', 'exact'\), got entropy='closed'"
    ):
        ReverseKL(entropy="closed")
    with pytest.raises(ValueError, match=r"gradient must be one of .* got gradient='path'"):
        ReverseKL(gradient="path")
    with pytest.raises(
        ValueError, match="num_samples must be at least 2, for a standard error, got num_samples=1"
    ):
        ReverseKL()(flow, energy, 1)
    with pytest.raises(
        ValueError, match="num_samples and batch_size must be at least 2, got 1 and"
    ):
        evaluate_j(flow, energy, 1)
    with pytest.raises(ValueError, match="dim=1 entries"):
        ReverseKL()(flow, Gaussian([0.0, 0.0], dtype=F64))
    with pytest.raises(ValueError, match="beta must be a positive finite number"):
        ReverseKL()(flow, energy, beta=0.0)


# --------------------------------------------------------------------------------------------------
# The gradients


def cached_affine() -> Flow:
    """Pyro's transforms keep the last (z, x): the trap that makes frozen parameters have no
    effect."""
    flow = Flow(
        [affine_coupling(2, hidden_dims=[4]), affine_coupling(2, hidden_dims=[4])], 2, 2
    ).double()
    return stirred(flow)


AT_OPTIMUM: dict[str, Callable[[], Flow]] = {
    "nice1": lambda: stirred(NICE(1, dtype=F64), scale=0.15),
    "nice2": lambda: redundant(2, 2),
    "nice3": lambda: redundant(3, 3),
    "pyro_affine": cached_affine,
}


@pytest.mark.parametrize("name", AT_OPTIMUM)
def test_stl_has_no_noise_at_the_optimum_and_the_total_gradient_has(name: str) -> None:
    flow = AT_OPTIMUM[name]()
    energy = check_stl_has_no_noise_at_the_optimum(flow)
    total = gradient(flow, energy, ReverseKL(gradient="total"), noise(64, flow.total_dim))
    assert float(total.abs().max()) > 1e-2


@pytest.mark.parametrize(("dim", "total_dim"), [(2, 2), (1, 2), (1, 3)])
def test_stl_and_total_gradients_agree_in_mean(dim: int, total_dim: int) -> None:
    flow, energy = (
        redundant(dim, total_dim, hidden=3),
        Gaussian([0.5, -1.0][:dim], scale=0.7, dtype=F64),
    )
    differences = []
    for seed in range(300):
        z = noise(32, total_dim, seed=seed)
        total, stl = (gradient(flow, energy, ReverseKL(gradient=g), z) for g in ("total", "stl"))
        differences.append(total - stl)
    stacked = torch.stack(differences)
    # M and Sigma have one gradient in both, and unused triangles have none
    varies = stacked.abs().amax(0) > 1e-12
    assert int(varies.sum()) > 10
    mean, se = mean_and_se(stacked[:, varies])
    within_se(mean, np.zeros_like(mean), se)


def test_entropy_form_does_not_change_the_gradient() -> None:
    flow = redundant(1, 3)
    energy = DoubleWell(dtype=F64)
    z = noise(64, 3)
    for kind in ("total", "stl"):
        sampled, exact = (
            gradient(flow, energy, ReverseKL(entropy, kind), z) for entropy in ("sampled", "exact")
        )
        torch.testing.assert_close(sampled, exact, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Pyro's SVI


SYSTEMS: dict[str, Callable[[], tuple[Flow, Energy]]] = {
    "scalar_redundant": lambda: (redundant(1, 3), DoubleWell(dtype=F64)),
    "scalar": lambda: (stirred(NICE(1, dtype=F64), scale=0.15), DoubleWell(dtype=F64)),
    "vector_redundant": lambda: (redundant(2, 3), Gaussian([0.5, -1.0], scale=0.7, dtype=F64)),
    "image": lambda: (redundant(4, 4), Gaussian(torch.zeros(1, 2, 2), dtype=F64)),
    "pyro_affine": lambda: (cached_affine(), Gaussian([0.5, -1.0], dtype=F64)),
}


@pytest.mark.parametrize("gradient_kind", ["total", "stl"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_j_r_is_minus_the_elbo_draw_by_draw(name: str, gradient_kind: str) -> None:
    flow, energy = SYSTEMS[name]()
    model, guide = flow_model(flow, energy), flow_guide(flow, energy, stl=gradient_kind == "stl")
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    torch.manual_seed(3)
    z = flow().base_dist.sample((50,))
    loss, _ = ReverseKL(gradient=gradient_kind)(flow, energy, z=z)
    torch.manual_seed(3)
    assert elbo.loss(model, guide) == pytest.approx(float(loss.detach()), abs=1e-9)
    ours = gradient(flow, energy, ReverseKL(gradient=gradient_kind), z)
    torch.manual_seed(3)
    elbo.loss_and_grads(model, guide)
    theirs = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in flow.parameters()
        ]
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-8)
    torch.manual_seed(3)
    single = Trace_ELBO().loss(model, guide)  # one particle, without a plate
    assert single == pytest.approx(
        float(ReverseKL().terms(flow, energy, _first(flow))[0].detach()), abs=1e-9
    )


def _first(flow: Flow) -> Tensor:
    torch.manual_seed(3)
    return flow().base_dist.sample((1,))


def test_svi_trains_every_parameter_and_leaves_the_energy_alone() -> None:
    flow = redundant(1, 3)
    energy = Known(stirred(NICE(1, dtype=F64), scale=0.15))
    energy.flow.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(
        flow_model(flow, energy), flow_guide(flow, energy), pyro.optim.Adam({"lr": 1e-3}), elbo
    )
    svi.step()
    for name, parameter in flow.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert all(p.grad is None for p in energy.parameters())


def test_users_read_x_and_y_and_may_bring_their_own_model() -> None:
    flow, energy = redundant(1, 3), DoubleWell(dtype=F64)
    model, guide = flow_model(flow, energy), flow_guide(flow, energy)
    draws = Predictive(guide, num_samples=7, parallel=True, return_sites=("x", "y"))()
    assert {name: tuple(draw.shape) for name, draw in draws.items()} == {"x": (7,), "y": (7, 2)}

    def own_model() -> None:
        x = pyro.sample("x", Boltzmann(energy))
        assert flow.conditional is not None
        pyro.sample("y", flow.conditional(x.unsqueeze(-1)))

    losses = []
    for candidate in (model, own_model):
        torch.manual_seed(0)
        losses.append(
            Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0).loss(
                candidate, guide
            )
        )
    # Boltzmann knows log C: this is J_R itself
    assert losses[1] - losses[0] == pytest.approx(energy.log_z)


# --------------------------------------------------------------------------------------------------
# The loop


def run(flow: Flow, energy: Energy, **options: object) -> list[tuple[int, float, dict[str, float]]]:
    return list(fit_flow(flow, energy, **options))  # type: ignore[arg-type]


def test_loop_yields_its_schedule_and_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    flows = [RedundantNICE(1, 2, hidden_sizes=(8,), dtype=F64) for _ in range(3)]
    trails = [
        run(f, DoubleWell(dtype=F64), steps=10, num_samples=16, lr=0.01, seed=s)
        for f, s in zip(flows, (0, 0, 1), strict=True)
    ]
    assert trails[0] == trails[1]
    assert trails[0] != trails[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert [step for step, _, _ in trails[0]] == list(range(10))
    facts = [f for _, _, f in trails[0]]
    assert [f["beta"] for f in facts] == pytest.approx([0.1, 0.325, 0.55, 0.775] + [1.0] * 6)
    assert [f["lr"] for f in facts] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    )
    assert all("j_r" in f for f in facts[4:])
    assert not any("j_r" in f for f in facts[:4])
    assert all(f["grad_norm"] > 0 and f["skipped"] == 0 for f in facts)
    assert capsys.readouterr().err == ""  # no bar where there is no terminal
    run(flows[0], DoubleWell(dtype=F64), steps=2, num_samples=4, progress=True)
    assert "fit_flow" in capsys.readouterr().err


def test_loop_may_be_left_and_options_are_heard() -> None:
    flow, energy = redundant(), Known(stirred(NICE(1, dtype=F64), scale=0.15))
    energy.flow.requires_grad_(True)
    seen: list[dict[str, object]] = []

    def objective(*args: object, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(options)
        return ReverseKL(gradient="total")(*args, **options)  # type: ignore[arg-type]

    generator = torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in flow.parameters()]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    loop = fit_flow(
        flow,
        energy,
        objective,
        steps=8,
        num_samples=4,
        beta_start=1.0,
        max_grad_norm=1e-3,
        optimizer=sgd,
        generator=generator,
    )
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert (seen[0]["num_samples"], seen[0]["beta"], seen[0]["generator"]) == (4, 1.0, generator)
    moved = math.sqrt(
        sum(
            float((p.detach() - b).square().sum())
            for p, b in zip(flow.parameters(), before, strict=True)
        )
    )
    assert moved == pytest.approx(0.5e-3, rel=1e-3)  # one step of SGD along a clipped gradient
    assert all(p.grad is None for p in energy.parameters())


class Cliff(Energy):
    """Becomes NaN, or keeps its value while its gradient does, from a given evaluation on."""

    def __init__(self, at: int, gradient_only: bool = False, times: int = 1000) -> None:
        super().__init__(())
        self.at = at
        self.gradient_only = gradient_only
        self.times = times
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        value = 0.5 * x**2
        if not self.at <= self.calls - 1 < self.at + self.times:
            return value
        return value + 0.0 * (0.0 * x).sqrt() if self.gradient_only else math.nan * value


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_loss_that_is_not_finite_raises_and_parameters_go_back(gradient_only: bool) -> None:
    flow, energy = redundant(), Cliff(3, gradient_only).double()
    loop = fit_flow(flow, energy, steps=10, num_samples=8, beta_start=1.0)
    states = [[p.detach().clone() for p in flow.parameters()] for _ in itertools.islice(loop, 3)]
    with pytest.raises(FloatingPointError, match=r"at step 3 the loss is .*put back.*'beta': 1.0"):
        next(loop)
    # step 2 was the last to give a finite loss, with the parameters that step 1 left
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), states[1], strict=True))


def test_a_loss_that_is_not_finite_can_be_skipped_and_counted() -> None:
    flow = redundant()
    trail = run(
        flow,
        Cliff(3, times=2).double(),
        steps=8,
        num_samples=8,
        beta_start=1.0,
        on_nonfinite="skip",
    )
    assert [f["skipped"] for _, _, f in trail] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [math.isnan(loss) for _, loss, _ in trail] == [False] * 3 + [True] * 2 + [False] * 3
    assert all(bool(torch.isfinite(p).all()) for p in flow.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got steps=0"),
        ({"num_samples": 0}, "num_samples=0"),
        (
            {"beta_start": 0.0},
            r"0 < beta_start <= 1 and 0 <= warmup <= 1 must hold, got beta_start=0.0",
        ),
        ({"warmup": 1.5}, r"warmup=1.5"),
        (
            {"max_grad_norm": -1.0},
            "max_grad_norm must be positive, or None, got max_grad_norm=-1.0",
        ),
        (
            {"on_nonfinite": "ignore"},
            "on_nonfinite must be 'raise' or 'skip', got on_nonfinite='ignore'",
        ),
    ],
)
def test_loop_refuses_at_the_call(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_flow(redundant(), DoubleWell(dtype=F64), **options)  # type: ignore[arg-type]


def test_loop_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        fit_flow(redundant(), DoubleWell())
    with pytest.raises(ValueError, match="nothing to train"):
        fit_flow(redundant().requires_grad_(False), DoubleWell(dtype=F64))


class _Elsewhere(nn.Module):
    """A loss of the objective's own parameter, or of nothing at all."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones((), dtype=F64), requires_grad=learned)

    def forward(
        self, flow: Flow, energy: Energy, **options: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.c.square(), {}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("most", [None, 1.0])
def test_loop_refuses_a_loss_that_does_not_reach_the_flow(
    learned: bool, most: float | None
) -> None:
    loop = fit_flow(
        redundant(), DoubleWell(dtype=F64), _Elsewhere(learned), max_grad_norm=most, progress=False
    )
    with pytest.raises(ValueError, match="reaches no parameter of the flow"):
        next(loop)


def test_frozen_parameters_stay() -> None:
    flow = redundant()
    flow.linear.requires_grad_(False)
    before = flow.linear.matrix()
    run(flow, DoubleWell(dtype=F64), steps=2, num_samples=8)
    assert torch.equal(flow.linear.matrix(), before)


# --------------------------------------------------------------------------------------------------
# What a fit reaches


def test_fit_of_a_gaussian_finds_it() -> None:
    energy = Gaussian([0.5, -0.5], covariance=[[1.0, 0.6], [0.6, 0.8]], dtype=F64)
    flow = NICE(2, num_layers=2, hidden_sizes=(8,), dtype=F64)
    start = evaluate_j(flow, energy, 5000)[0]
    run(flow, energy, objective=ReverseKL(), steps=400, num_samples=64, lr=0.02)
    value, se = evaluate_j(flow, energy, 5000)
    assert start > 0.3
    assert -5 * se <= value < 1e-3


@pytest.mark.parametrize(("shift", "published"), [(True, 0.0966), (False, 2.4427)])
def test_in_one_dimension_nice_is_a_gaussian_and_reaches_the_best_one(
    shift: bool, published: float
) -> None:
    energy = DoubleWell(dtype=F64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def j(parameters: np.ndarray) -> float:
        x = (parameters[1] if shift else 0.0) + math.exp(parameters[0]) * nodes
        mean = float(weights @ (x**4 - 4 * x**2 + x)) / math.sqrt(2 * math.pi)
        return mean - parameters[0] - 0.5 * (1 + math.log(2 * math.pi)) + energy.log_z

    best = minimize(
        j, [-1.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}
    ).fun
    assert best == pytest.approx(published, abs=1e-4)
    flow = NICE(1, shift=shift, dtype=F64)
    run(flow, energy, steps=700, num_samples=256, lr=0.02)
    assert j_r_by_quadrature(flow, energy) == pytest.approx(best, abs=1e-3)


def test_redundant_latents_find_both_wells_in_a_short_run() -> None:
    """A sixth of the default steps: J_R is below the divergence of any density without the right
    well, and of any Gaussian; weighted, the right well has its mass."""
    energy, flow = DoubleWell(), RedundantNICE(1, 2)
    run(flow, energy, steps=500, lr=5e-3)
    j_r, se = evaluate_j(flow, energy)
    assert -5 * se <= j_r < -math.log1p(-energy.right_mass) - 5 * se < 0.0966
    result = importance_sample(flow, energy, 100_000)
    within_se(result.log_z.value, energy.log_z, result.log_z.standard_error)
    right, right_se = result.expectation(lambda x: (x > energy.barrier).double())
    within_se(right, energy.right_mass, right_se)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total_dim", [2, 3])
def test_defaults_fit_the_double_well(total_dim: int, seed: int) -> None:
    energy, flow = (
        DoubleWell(),
        RedundantNICE(1, total_dim, generator=torch.Generator().manual_seed(seed)),
    )
    run(flow, energy, seed=seed)
    result = importance_sample(flow, energy, 500_000, generator=torch.Generator().manual_seed(seed))
    right, _ = result.expectation(lambda x: (x > energy.barrier).double())
    assert result.ess_fraction > 0.97
    assert abs(result.log_z.value - energy.log_z) < 0.003
    assert abs(float(right) - energy.right_mass) < 0.002
    assert evaluate_j(flow, energy)[0] < 0.015


@pytest.mark.slow
def test_defaults_give_plain_nice_its_best_gaussian() -> None:
    energy, flow = DoubleWell(), NICE(1)
    run(flow, energy)
    value, se = evaluate_j(flow, energy, 400_000)
    within_se(value, 0.0966, np.hypot(se, 5e-4))


def test_the_smallest_j_r_chooses_redundant_latents() -> None:
    energy = DoubleWell()
    found = select_total_dim(
        energy, (1, 2), steps=300, lr=5e-3, num_samples=256, evaluation_samples=20_000
    )
    assert found.total_dim == 2
    assert found.flow is found.flows[2]
    assert found.values[1] - found.values[2] > 5 * math.hypot(*found.standard_errors.values())
    value, _ = evaluate_j(found.flows[1], energy, 20_000, seed=1)
    # values leave out log C, which all share
    assert value - found.values[1] == pytest.approx(energy.log_z)


def test_choice_of_total_dim_takes_makers_and_refuses() -> None:
    energy = Gaussian([0.0, 0.0], dtype=F64)
    made: list[tuple[int, int]] = []

    def make(dim: int, total_dim: int) -> Flow:
        made.append((dim, total_dim))
        return RedundantNICE(dim, total_dim, num_layers=1, hidden_sizes=(4,), dtype=F64)

    found = select_total_dim(energy, make_flow=make, steps=1, num_samples=4, evaluation_samples=10)
    assert made == [(2, 2), (2, 3), (2, 4)]
    assert set(found.flows) == {2, 3, 4}
    with pytest.raises(ValueError, match=r"at least d=2, got candidates=\(1, 2\)"):
        select_total_dim(energy, (1, 2))
    with pytest.raises(ValueError, match=r"got candidates=\(\)"):
        select_total_dim(energy, ())


# --------------------------------------------------------------------------------------------------
# Mutants: a check that a broken flow passes is no check


class _NoLogDetSigma(ConditionalGaussian):
    def log_prob(self, y: Tensor, x: Tensor) -> Tensor:
        return super().log_prob(y, x) - self.parts(x)[1].sum(-1)


class _FlippedS(PLULinear):
    def log_abs_det(self) -> Tensor:
        return -super().log_abs_det()


class _HalvedS(PLULinear):
    def log_abs_det(self) -> Tensor:
        return 0.5 * super().log_abs_det()


@pytest.mark.parametrize("mutant", [_NoLogDetSigma, _FlippedS, _HalvedS])
def test_mutants_of_j_r_are_caught(mutant: type[nn.Module]) -> None:
    flow, energy = redundant(scale=0.1), Gaussian(0.5, scale=1.5, dtype=F64)
    with torch.no_grad():  # determinants far from 1
        flow.linear.log_diagonal.fill_(-0.6)
        flow.conditional.net[-1].bias[1] += 0.5  # type: ignore[union-attr, index, operator]
    check_j_r(flow, energy)
    (flow.conditional if mutant is _NoLogDetSigma else flow.linear).__class__ = mutant  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="J_R with the sampled entropy"):
        check_j_r(flow, energy)


class _NotDetached(NICE):
    def push_path(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xy, log_q = self.push(z)
        return xy, log_q, self.log_prob(xy)


class _Uncarried(AdditiveCoupling):
    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.with_log_det(z), score


def test_mutant_stl_that_does_not_carry_the_score_is_caught() -> None:
    flow = stirred(NICE(2, num_layers=2, hidden_sizes=(8,), dtype=F64), scale=0.15)
    check_stl_has_no_noise_at_the_optimum(flow)
    flow.transform.parts[0].__class__ = _Uncarried
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)


def test_mutant_stl_without_detached_parameters_is_caught() -> None:
    flow = stirred(_NotDetached(2, num_layers=2, hidden_sizes=(8,), dtype=F64), scale=0.15)
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)


class _NotCopied(Flow):
    def path_log_prob(self, xy: Tensor) -> Tensor:
        with frozen(self):
            return self.log_prob(xy)


def test_mutant_stl_through_a_cached_inverse_is_caught() -> None:
    flow = cached_affine()
    flow.__class__ = _NotCopied
    with pytest.raises(AssertionError, match="the path derivative is not 0"):
        check_stl_has_no_noise_at_the_optimum(flow)
