"""Objectives of one-site neighbours against enumerated distributions: gradients, optima, errors
beside maximum likelihood; mutants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.reseed import problem_generator
from lib.seeds import flat_grad, seeded
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import Energy
from pyroebm.core import spin
from pyroebm.core.enumeration import all_bits
from pyroebm.energies import BernoulliRBM, BoltzmannMachine
from pyroebm.objectives import (
    ExactLikelihood,
    MinimumProbabilityFlow,
    Objective,
    Pseudolikelihood,
    RatioMatching,
)
from pyroebm.objectives.discrete import SiteObjective
from pyroebm.targets import Gaussian
from pyroebm.training import fit

F64 = torch.float64

#: One line for each objective of sites: the term of one site by hand, from log-probabilities of a
#: state and its neighbours.
OBJECTIVES: dict[str, tuple[type[SiteObjective], Callable[[float, list[float]], float]]] = {
    "pseudo-likelihood": (
        Pseudolikelihood,
        lambda own, others: -own + math.log(sum(map(math.exp, [own, *others]))),
    ),
    "ratio matching": (RatioMatching, lambda own, others: quadratic_score(own, others)),
    "probability flow": (
        MinimumProbabilityFlow,
        lambda own, others: sum(math.exp((o - own) / 2) for o in others),
    ),
}


def quadratic_score(own: float, others: list[float]) -> float:
    total = sum(map(math.exp, [own, *others]))
    shares = [math.exp(value) / total for value in (own, *others)]
    return 0.5 * ((1 - shares[0]) ** 2 + sum(share**2 for share in shares[1:]))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


class Pairs(Energy):
    """Any support: couplings and fields of the flat event, linear in the parameters, so that the
    model is identified on bits and spins."""

    def __init__(self, event_shape: Sequence[int], support: Any, scale: float = 0.5) -> None:
        super().__init__(event_shape, support)
        n = math.prod(event_shape)
        self.coupling = nn.Parameter(
            scale * torch.randn(n * (n - 1) // 2, generator=problem_generator(4), dtype=F64)
        )
        self.field = nn.Parameter(scale * torch.randn(n, generator=problem_generator(5), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*self.batch_shape(x), -1)
        i, j = torch.triu_indices(flat.shape[-1], flat.shape[-1], 1)
        return -(flat[..., i] * flat[..., j]) @ self.coupling - flat @ self.field


def every_state(values: Sequence[Any], shape: Sequence[int]) -> Tensor:
    sites = list(itertools.product(values, repeat=math.prod(shape)))
    return torch.tensor(sites, dtype=F64).reshape(len(sites), *shape)


def colors(sites: int) -> Tensor:
    return torch.eye(3, dtype=F64)[torch.tensor(list(itertools.product(range(3), repeat=sites)))]


#: Models on each kind of support with all of their states and the entries of a site.
MODELS: dict[str, tuple[Energy, Tensor, int]] = {
    "bits": (Pairs((4,), constraints.boolean), every_state([0.0, 1.0], (4,)), 1),
    "spins": (Pairs((2, 2), spin), every_state([-1.0, 1.0], (2, 2)), 1),
    "one scalar bit": (Pairs((), constraints.boolean), every_state([0.0, 1.0], ()), 1),
    "one-hot": (Pairs((2, 3), constraints.one_hot), colors(2), 3),
    "integers": (
        Pairs((2,), constraints.integer_interval(-1, 2)),
        every_state([-1.0, 0.0, 1.0, 2.0], (2,)),
        1,
    ),
    "RBM": (
        BernoulliRBM(4, 3, weight=randn(4, 3), visible_bias=randn(4, seed=1), dtype=F64),
        all_bits(4, dtype=F64),
        1,
    ),
}


def distribution(energy: Energy, states: Tensor) -> Tensor:
    return torch.softmax(-energy(states), 0).detach()


def expected(objective: Objective, energy: Energy, states: Tensor, p: Tensor) -> Tensor:
    """The loss under a distribution of all states, row by row."""
    return torch.stack([objective(energy, x[None])[0] for x in states]) @ p


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def check_by_hand(
    objective: Objective, by_hand: Callable[[float, list[float]], float], model: str
) -> None:
    """Neighbours found by comparing whole states, their energies one by one."""
    energy, states, width = MODELS[model]
    flat, minus = states.reshape(len(states), -1), (-energy(states)).tolist()
    total, rows = 0.0, [k % len(states) for k in (1, 5, 7, 5)]
    for row in rows:
        for site in range(0, flat.shape[1], width):
            rest = [c for c in range(flat.shape[1]) if not site <= c < site + width]
            same = (flat[:, rest] == flat[row, rest]).all(1).nonzero().flatten().tolist()
            total += by_hand(minus[row], [minus[k] for k in same if k != row])
    loss = float(objective(energy, states[rows])[0].detach())
    if not math.isclose(loss, total / len(rows), rel_tol=1e-12):
        raise AssertionError(f"the loss is {loss}, by hand {total / len(rows)}")


def check_gradient(objective: Objective, model: str) -> None:
    """Against differences of the loss, entry by entry."""
    energy, states, _ = MODELS[model]
    batch, step = states[[k % len(states) for k in (1, 5, 7, 5)]], 1e-5
    gradient, found = flat_grad(energy, objective(energy, batch)[0]), []
    with torch.no_grad():
        for parameter in energy.parameters():
            for k in range(parameter.numel()):
                ends = []
                for sign in (1.0, -1.0):
                    parameter.view(-1)[k] += sign * step
                    ends.append(objective(energy, batch)[0])
                    parameter.view(-1)[k] -= sign * step
                found.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(gradient, torch.stack(found), atol=1e-8, rtol=1e-6)


def check_stationary(objective: Objective, model: str) -> None:
    """Under the distribution of the energy itself the gradient is zero."""
    energy, states, _ = MODELS[model]
    loss = expected(objective, energy, states, distribution(energy, states))
    off = float(flat_grad(energy, loss).norm())
    if off > 1e-12:
        raise AssertionError(f"under its own distribution the gradient is {off}")


def check_optimum(objective: Objective, model: str) -> None:
    """From zero the minimum of the expected loss is where the data's distribution comes from."""
    truth, states, _ = MODELS[model]
    p, energy = distribution(truth, states), Pairs(truth.event_shape, truth.support, scale=0.0)
    optimizer = torch.optim.LBFGS(
        energy.parameters(), max_iter=300, tolerance_grad=1e-11, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected(objective, energy, states, p)
        loss.backward()
        return loss

    optimizer.step(closure)
    divergence = float(p @ (p.log() - distribution(energy, states).log()))
    if not abs(divergence) < 1e-8:
        raise AssertionError(f"the fit is {divergence} nats from the distribution of the data")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_the_enumerated_neighbours(name: str, model: str) -> None:
    kind, by_hand = OBJECTIVES[name]
    check_by_hand(kind(), by_hand, model)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_that_of_the_loss(name: str, model: str) -> None:
    check_gradient(OBJECTIVES[name][0](), model)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
def test_the_truth_is_stationary(name: str, model: str) -> None:
    check_stationary(OBJECTIVES[name][0](), model)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("model", ["bits", "spins", "one-hot", "integers"])
def test_the_optimum_is_the_truth(name: str, model: str) -> None:
    check_optimum(OBJECTIVES[name][0](), model)


def test_ratio_matching_as_published() -> None:
    """Of two values: one over one plus the ratio of probabilities, squared."""
    energy, states, _ = MODELS["bits"]
    x, p = states[6], distribution(energy, states)
    terms = []
    for site in range(4):
        flipped = x.clone()
        flipped[site] = 1.0 - flipped[site]
        ratio = p[6] / p[int((flipped @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)).item())]
        terms.append(float((1 + ratio) ** -2))
    assert float(RatioMatching()(energy, x[None])[0].detach()) == pytest.approx(
        sum(terms), rel=1e-12
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_few_sites_are_unbiased(name: str) -> None:
    kind, _ = OBJECTIVES[name]
    energy, states, _ = MODELS["RBM"]
    data, noise = states[[1, 5, 7, 5]], seeded(3)
    truth = flat_grad(energy, kind()(energy, data)[0])
    draws = torch.stack(
        [
            flat_grad(energy, kind(2)(energy, data.repeat(25, 1), generator=noise)[0])
            for _ in range(200)
        ]
    )
    mean, se = mean_and_se(draws)
    within_se(mean, truth, se)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_and_dtypes(name: str) -> None:
    objective = OBJECTIVES[name][0](3)
    for dtype in (torch.float32, F64):
        rbm, batch = (
            BernoulliRBM(4, 3, weight=randn(4, 3), dtype=dtype),
            all_bits(4, dtype=dtype)[[1, 5, 9]],
        )
        (loss, metrics), (again, _) = (objective(rbm, batch, generator=seeded(1)) for _ in range(2))
        assert loss.dtype == dtype
        assert torch.equal(loss, again)
        assert set(metrics) == {"energy_data", "pseudo_log_likelihood"}
        assert not any(fact.requires_grad for fact in metrics.values())
    energy, states, _ = MODELS["spins"]
    ours, theirs = (
        kind()(energy, states)[1]["pseudo_log_likelihood"]
        for kind in (OBJECTIVES[name][0], Pseudolikelihood)
    )
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(-Pseudolikelihood()(energy, states)[0].detach(), theirs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_do_not_meet(name: str) -> None:
    kind, _ = OBJECTIVES[name]
    energy, states, _ = MODELS["bits"]
    apart = torch.stack([kind()(energy, x[None])[0] for x in states]).mean()
    torch.testing.assert_close(kind()(energy, states)[0], apart)
    with pytest.raises(ValueError, match="batch must hold states"):
        kind()(energy, torch.cat([states[:2], math.nan * states[:1]]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_by_fit(name: str) -> None:
    truth, states, _ = MODELS["bits"]
    p = distribution(truth, states)
    data = states[torch.multinomial(p, 500, replacement=True, generator=seeded(2))]
    energy = Pairs((4,), constraints.boolean, scale=0.0)
    before = float(p @ (p.log() - distribution(energy, states).log()))
    objective = OBJECTIVES[name][0]()
    fit(energy, objective, data, num_steps=150, batch_size=100, lr=0.03, progress=False)
    assert float(p @ (p.log() - distribution(energy, states).log())) < 0.2 * before


def newton(
    energy: Energy,
    loss: Callable[[dict[str, Tensor], Tensor], Tensor],
    shares: Tensor,
    steps: int = 8,
) -> Tensor:
    """Minima for many empirical distributions ``(R, states)`` at once, from the energy's own
    parameters."""
    start = torch.cat([p.detach().flatten() for p in energy.parameters()])

    def at(theta: Tensor, share: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in energy.parameters()])
        named = {
            name: part.view_as(p)
            for (name, p), part in zip(energy.named_parameters(), parts, strict=True)
        }
        return loss(named, share)

    slope = torch.func.grad(at)
    gradient, hessian = torch.func.vmap(slope), torch.func.vmap(torch.func.jacrev(slope))
    theta = start.expand(len(shares), -1).clone()
    for _ in range(steps):
        step = torch.linalg.solve(hessian(theta, shares), gradient(theta, shares))
        theta = theta - step
    assert float(step.abs().max()) < 1e-8, "Newton's method did not settle"
    return theta


def test_errors_beside_maximum_likelihood() -> None:
    """Replicated fits to 2,000 draws of three spins: all are centered on the truth, and none beats
    maximum likelihood, whose covariance is the inverse Fisher information."""
    truth, states = Pairs((3,), spin), every_state([-1.0, 1.0], (3,))
    p = distribution(truth, states)
    n = 2000
    fits = 400
    draws = torch.multinomial(p.expand(fits, -1), n, replacement=True, generator=seeded(0))
    shares = torch.stack([(draws == k).sum(1) for k in range(len(states))], 1).to(F64) / n
    flips = torch.stack([states * (1 - 2 * torch.eye(3, dtype=F64)[s]) for s in range(3)], 1)

    def energies(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(truth, named, (x,))

    def likelihood(named: dict[str, Tensor], share: Tensor) -> Tensor:
        return share @ energies(named, states) + (-energies(named, states)).logsumexp(0)

    def sites(objective: SiteObjective) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        def loss(named: dict[str, Tensor], share: Tensor) -> Tensor:
            log_ratios = (energies(named, states)[:, None] - energies(named, flips)).unsqueeze(2)
            return share @ objective.score(log_ratios).sum(1)

        return loss

    start = torch.cat([q.detach() for q in truth.parameters()])
    found = {name: newton(truth, sites(kind()), shares) for name, (kind, _) in OBJECTIVES.items()}
    found["likelihood"] = newton(truth, likelihood, shares)
    statistics = -torch.func.jacrev(lambda named: energies(named, states))(
        dict(truth.named_parameters())
    )["coupling"]
    statistics = torch.cat([statistics, states], 1).detach()
    centered = statistics - p @ statistics
    fisher = (centered * p[:, None]).mT @ centered
    bound = float(torch.linalg.inv(fisher).trace())
    errors = {name: n * ((theta - start) ** 2).sum(1) for name, theta in found.items()}
    for name, theta in found.items():
        mean, se = mean_and_se(theta)
        bias = 3.0 * se * math.sqrt(fits) / math.sqrt(n)  # of second order
        assert (abs(mean - start.numpy()) < 5 * se + bias).all(), (name, mean, start, se)
    mean, se = mean_and_se(errors["likelihood"])
    within_se(mean, bound, se, what="the squared error of maximum likelihood")
    for name in OBJECTIVES:
        worse, se = mean_and_se(errors[name] - errors["likelihood"])
        assert worse > -5 * se, (name, worse, se)
        assert float(errors[name].mean()) < 3 * bound, (name, errors[name].mean(), bound)


def test_a_machine_near_its_maximum_likelihood() -> None:
    """A Boltzmann machine of 5 units on 4,000 draws: each fit is within a few times the error of
    maximum likelihood."""
    weight = randn(5, 5, seed=8).triu(1)
    machine = BoltzmannMachine(5, weight=weight + weight.mT, bias=0.3 * randn(5, seed=9), dtype=F64)
    states = all_bits(5, dtype=F64)
    p = distribution(machine, states)
    data = states[torch.multinomial(p, 4000, replacement=True, generator=seeded(1))]
    rows, counts = data.unique(dim=0, return_counts=True)
    divergences = {}
    for name, objective in {
        "likelihood": ExactLikelihood(),
        **{k: v[0]() for k, v in OBJECTIVES.items()},
    }.items():
        fitted = BoltzmannMachine(5, weight=torch.zeros(5, 5), dtype=F64)
        optimizer = torch.optim.LBFGS(
            fitted.parameters(), max_iter=100, line_search_fn="strong_wolfe"
        )

        def closure(
            fitted: Any = fitted, objective: Any = objective, optimizer: Any = optimizer
        ) -> Tensor:  # bound now, not when called
            optimizer.zero_grad()
            loss = expected(objective, fitted, rows, counts.to(F64) / len(data))
            loss.backward()
            return loss

        optimizer.step(closure)
        divergences[name] = float(p @ (p.log() - distribution(fitted, states).log()))
    # 15 parameters: twice n times the divergence of maximum likelihood is chi-squared
    typical = 15 / (2 * len(data))
    assert divergences["likelihood"] < typical * (1 + 5 * math.sqrt(2 / 15)), divergences
    assert all(value < 4 * typical for value in divergences.values()), divergences


@pytest.mark.parametrize("kind", [RatioMatching, MinimumProbabilityFlow])
def test_bad_input_is_refused(kind: type[SiteObjective]) -> None:
    energy, states, _ = MODELS["bits"]
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: kind(0), "num_sites must be"),
        (lambda: kind(5)(energy, states), "at most the 4 sites"),
        (
            lambda: kind()(Gaussian(torch.zeros(2, dtype=F64)), states[:, :2]),
            f"{kind.__name__} is for discrete",
        ),
        (lambda: kind()(energy, 0.5 * states), "batch must hold states"),
        (lambda: kind()(energy, states.float()), "dtype"),
    ]
    for call, said in calls:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(NotImplementedError, match="must define score"):
        SiteObjective()(energy, states)


# --------------------------------------------------------------------------------------------------
# Mutants


class Unsquared(RatioMatching):
    """The chance of the other value, not squared: no proper score."""

    def score(self, log_ratios: Tensor) -> Tensor:
        return torch.sigmoid(log_ratios).sum(2)


class TurnedRatio(RatioMatching):
    def score(self, log_ratios: Tensor) -> Tensor:
        return super().score(-log_ratios)


class OwnAlone(RatioMatching):
    """The square of one minus the own probability, also where a site has more values than two."""

    def score(self, log_ratios: Tensor) -> Tensor:
        p = torch.cat([torch.zeros_like(log_ratios[..., :1]), log_ratios], 2).softmax(2)
        return (1 - p[..., 0]) ** 2


class WholeExponent(MinimumProbabilityFlow):
    """The difference of energies not halved."""

    def score(self, log_ratios: Tensor) -> Tensor:
        return torch.exp(log_ratios).sum(2)


class Backwards(MinimumProbabilityFlow):
    def score(self, log_ratios: Tensor) -> Tensor:
        return super().score(-log_ratios)


class OneSite(MinimumProbabilityFlow):
    """The same one bit of every row."""

    def score(self, log_ratios: Tensor) -> Tensor:
        return super().score(log_ratios) * (torch.arange(log_ratios.shape[1]) == 0)


MUTANTS: list[tuple[type[SiteObjective], str, str]] = [
    (Unsquared, "ratio matching", "bits"),
    (TurnedRatio, "ratio matching", "bits"),
    (OwnAlone, "ratio matching", "one-hot"),
    (WholeExponent, "probability flow", "bits"),
    (Backwards, "probability flow", "spins"),
    (OneSite, "probability flow", "bits"),
]


@pytest.mark.parametrize(("mutant", "name", "model"), MUTANTS)
def test_mutants_are_caught(mutant: type[SiteObjective], name: str, model: str) -> None:
    with pytest.raises(AssertionError, match="by hand"):
        check_by_hand(mutant(), OBJECTIVES[name][1], model)
    with pytest.raises(AssertionError):
        check_optimum(mutant(), model)


def test_a_detached_neighbour_is_caught() -> None:
    class Detached(MinimumProbabilityFlow):
        def _neighbors(self, energy: Energy, batch: Tensor, generator: Any) -> Any:
            data, log_ratios, scale = super()._neighbors(energy, batch, generator)
            return data, data[:, None, None] + (log_ratios - data[:, None, None]).detach(), scale

    with pytest.raises(AssertionError):
        check_gradient(Detached(), "bits")
    with pytest.raises(AssertionError, match="under its own distribution"):
        check_stationary(Detached(), "bits")
