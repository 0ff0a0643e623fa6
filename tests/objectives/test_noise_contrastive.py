"""Noise-contrastive objectives against asymptotic variances, quadrature and enumerated
distributions; a flow that learns; mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.reseed import fixed_problem, problem_generator
from lib.seeds import seeded
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import Energy
from pyroebm.core.supports import event_sum
from pyroebm.energies import MLPEnergy
from pyroebm.flows import NICE, Flow, RedundantNICE
from pyroebm.objectives import (
    ConditionalNCE,
    FlowContrastive,
    NoiseContrastive,
    Objective,
    RankingNCE,
    gaussian_noise,
    noise_contrastive,
)
from pyroebm.objectives.noise import Noise
from pyroebm.targets import Gaussian, GaussianMixture
from pyroebm.training import fit

F64 = torch.float64
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def normal(
    event_shape: Sequence[int] = (), scale: float = 1.0, dtype: torch.dtype = F64
) -> dist.Distribution:
    zero = torch.zeros(tuple(event_shape), dtype=dtype)
    return dist.Normal(zero, scale * torch.ones_like(zero)).to_event(len(event_shape))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


class Bell(Energy):
    """A normal distribution of any event shape, with mean and precision to be learned."""

    def __init__(
        self,
        event_shape: Sequence[int] = (),
        mean: float = 0.0,
        precision: float = 1.0,
        dtype: Any = F64,
    ) -> None:
        super().__init__(event_shape)
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.precision = nn.Parameter(torch.tensor(precision, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return event_sum(0.5 * self.precision * (x - self.mean) ** 2, len(self.event_shape))

    def log_partition(self) -> Tensor:
        return HALF_LOG_TWO_PI - 0.5 * self.precision.log()


class Scale(Energy):
    """A centered normal density: the one-parameter energy of the asymptotic oracle."""

    def __init__(self) -> None:
        super().__init__(())
        self.precision = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.precision * x**2


class Table(Energy):
    """Any distribution on 0, ..., K - 1: a free energy for each but the first, which is 0."""

    def __init__(self, energies: Tensor) -> None:
        super().__init__((), constraints.integer_interval(0, len(energies)))
        self.free = nn.Parameter(energies.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.free.new_zeros(1), self.free])[x.long()]


class Spread(dist.Categorical):
    """Categories whose n draws are in exact proportion, so that means over them are
    expectations."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        num_samples = math.prod(sample_shape)
        counts = (self.probs * num_samples).round().long()
        return (
            torch.arange(len(counts)).repeat_interleave(counts)
            if num_samples > 1
            else super().sample(sample_shape)
        )


#: One line for each objective of an energy and a batch: made for an event shape and a dtype.
OBJECTIVES: dict[str, Callable[[Sequence[int], torch.dtype], Objective]] = {
    "binary": lambda shape, dtype: NoiseContrastive(normal(shape, 1.5, dtype), nu=2.0),
    "fractional": lambda shape, dtype: NoiseContrastive(
        normal(shape, 1.5, dtype), nu=0.5, learn_log_z=False
    ),
    "flow as noise": lambda shape, dtype: NoiseContrastive(nice(math.prod(shape), dtype)),
    "ranking": lambda shape, dtype: RankingNCE(normal(shape, 1.5, dtype), num_negatives=3),
    "conditional": lambda shape, dtype: ConditionalNCE(0.5, num_negatives=2),
}
SHAPES = [(), (3,), (1, 2, 2)]


def nice(dim: int, dtype: torch.dtype = F64, seed: int = 0) -> Flow:
    flow = NICE(
        dim, num_layers=3, hidden_sizes=(16,), dtype=dtype, generator=problem_generator(seed)
    )
    with torch.no_grad():
        for number, parameter in enumerate(flow.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=100 * seed + number, dtype=dtype))
    return flow


# --------------------------------------------------------------------------------------------------
# Properties of the table


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_objective_takes_every_event(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if name == "flow as noise" and shape == ():
        shape = (1,) if dtype == F64 else (2,)
    energy, objective = Bell(shape, dtype=dtype), OBJECTIVES[name](shape, dtype)
    batch = randn(7, *shape, dtype=dtype)
    (loss, metrics), (again, _) = (objective(energy, batch, generator=seeded(3)) for _ in range(2))
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert torch.equal(loss, again)
    torch.testing.assert_close(metrics["energy_data"], energy(batch).mean().detach())
    assert {"energy_data", "energy_noise", "accuracy"} <= set(metrics)
    assert all(
        fact.shape == () and not fact.requires_grad and fact.dtype == dtype
        for fact in metrics.values()
    )
    loss.backward()
    trained = [p for p in (*energy.parameters(), *objective.parameters()) if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad != 0) for p in trained)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_nan_is_seen(name: str) -> None:
    objective, batch = OBJECTIVES[name]((2,), F64), randn(5, 2)
    batch[1, 0] = math.nan
    if name == "conditional":  # no density of the noise to look at: the loss itself is not finite
        assert bool(objective(Bell((2,)), batch)[0].isnan())
        return
    with pytest.raises(ValueError, match="1 of 5 rows, the first is row 1"):
        objective(Bell((2,)), batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_global_randomness_is_left_alone(name: str) -> None:
    objective, batch = OBJECTIVES[name]((2,), F64), randn(5, 2)
    before = torch.get_rng_state()
    OBJECTIVES[name]((2,), F64)(Bell((2,)), batch, generator=seeded(0))
    objective(Bell((2,)), batch, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_resumes_where_it_was(name: str, tmp_path: Any) -> None:
    data, ends = randn(40, 2), []
    for cut in (12, 5):
        energy, objective = Bell((2,), 0.5), OBJECTIVES[name]((2,), F64)
        options = {
            "batch_size": 8,
            "checkpoint": tmp_path / f"{cut}.safetensors",
            "progress": False,
        }
        fit(energy, objective, data, num_steps=cut, **options)
        if cut < 12:
            energy, objective = Bell((2,), 0.5), OBJECTIVES[name]((2,), F64)
            fit(energy, objective, data, num_steps=12, resume=True, **options)
        ends.append([*energy.parameters(), *objective.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], torch.tensor(0.5, dtype=F64))


def test_log_z_is_state_and_a_fixed_one_is_not_trained() -> None:
    nce, other = NoiseContrastive(normal(), log_z=1.25), NoiseContrastive(normal())
    other.load_state_dict(nce.state_dict())
    assert float(other.log_z.detach()) == 1.25
    assert not NoiseContrastive(normal(), learn_log_z=False).log_z.requires_grad
    flow = nice(2)
    assert [name for name, _ in NoiseContrastive(flow).named_parameters()] == ["log_z"]
    NoiseContrastive(flow)(Bell((2,)), randn(5, 2))[0].backward()
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def newton(objective: Any, energy: Energy, draws: Sequence[Tensor], steps: int = 9) -> Tensor:
    """Fits of energy and objective to replicated draws ``(R, ...)`` at once, solved to the optimum:
    ``(R, parameters)``."""
    modules = nn.ModuleDict({"energy": energy, "objective": objective})
    names = [name for name, p in modules.named_parameters() if p.requires_grad]
    start = torch.stack([dict(modules.named_parameters())[name].detach() for name in names])

    def loss(theta: Tensor, *parts: Tensor) -> Tensor:
        def contrast(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(
                Call(modules), {f"modules_.{k}": v for k, v in parameters.items()}, parts
            )

        return contrast(dict(zip(names, theta, strict=True)))

    slope = torch.func.grad(loss)
    gradient, hessian = torch.func.vmap(slope), torch.func.vmap(torch.func.jacrev(slope))
    theta = start.expand(len(draws[0]), -1).clone()
    for _ in range(steps):
        step = torch.linalg.solve(hessian(theta, *draws), gradient(theta, *draws))
        theta = theta - step.detach()
    assert float(step.abs().max()) < 1e-9, "Newton's method did not settle"
    return theta


class Call(nn.Module):
    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__()
        self.modules_ = modules

    def forward(self, *parts: Tensor) -> Tensor:
        loss: Tensor = self.modules_["objective"].contrast(self.modules_["energy"], *parts)[0]
        return loss


def check_asymptotics(
    make: Callable[..., NoiseContrastive], nu: float, n: int = 400, fits: int = 300
) -> None:
    """Noise = data = N(0, 1), log p = -lam x^2 / 2 + c: n var(lam) = 2 (1 + 1/nu), n var(c) = (1 +
    1/nu) / 2."""
    m = round(nu * n)
    x, y = randn(fits, n, seed=1), randn(fits, m, seed=2)
    log_q = [-0.5 * z**2 - HALF_LOG_TWO_PI for z in (x, y)]
    found = newton(
        make(normal(), nu=nu, log_z=HALF_LOG_TWO_PI), Scale(), (x, log_q[0], y, log_q[1])
    )
    for k, (truth, variance) in enumerate(
        [(1.0, 2.0 * (1 + 1 / nu)), (HALF_LOG_TWO_PI, 0.5 * (1 + 1 / nu))]
    ):
        values = found[:, k]
        # mean squared error: variance and bias (of order 1/n) in one
        squares = n * (values - truth) ** 2
        mean, se = mean_and_se(squares)
        within_se(
            mean, variance, se, what=f"n times the squared error of parameter {k} at nu={nu:g}"
        )
        mean, se = mean_and_se(values)
        bias = 6.0 * variance / n  # of second order
        assert abs(mean - truth) < 5 * se + bias, (mean, truth, se)


def grid(half: float = 12.0, points: int = 4001) -> tuple[Tensor, float]:
    x = torch.linspace(-half, half, points, dtype=F64)
    return x, float(x[1] - x[0])


def expected_binary(energy: Bell, log_z: Tensor, data: Tensor, nu: float, scale: float) -> Tensor:
    """The loss for these data with its noise integrated out, from the published formula."""
    y, dx = grid()

    def q(x: Tensor) -> Tensor:
        return torch.exp(-0.5 * (x / scale) ** 2) / (scale * math.sqrt(2 * math.pi))

    def p(x: Tensor) -> Tensor:
        return torch.exp(-0.5 * energy.precision * (x - energy.mean) ** 2 - log_z)

    on_data = torch.log(p(data) / (p(data) + nu * q(data))).mean()
    return -on_data - nu * dx * (q(y) * torch.log(nu * q(y) / (p(y) + nu * q(y)))).sum()


def check_gradient(make: Callable[..., NoiseContrastive], nu: float, repeats: int = 400) -> None:
    energy = Bell((), 0.3, 1.4)
    data = randn(8, seed=4)
    noise = seeded(5)
    objective = make(normal(scale=1.5), nu=nu, log_z=0.9)
    parameters = [*energy.parameters(), objective.log_z]
    truth = torch.stack(
        torch.autograd.grad(expected_binary(energy, objective.log_z, data, nu, 1.5), parameters)
    )
    draws = [
        torch.autograd.grad(objective(energy, data, generator=noise)[0], parameters)
        for _ in range(repeats)
    ]
    mean, se = mean_and_se(torch.stack([torch.stack(d) for d in draws]))
    within_se(mean, truth, se, what=f"the gradient at nu={nu:g}")


def check_finite_space(make: Callable[..., NoiseContrastive], nu: float) -> None:
    """Distributions of data and noise in exact proportion: the minimum is at E = -log p + const and
    c = log Z."""
    counts, q = torch.tensor([1, 4, 2, 9]), torch.tensor([0.125, 0.25, 0.5, 0.125], dtype=F64)
    batch = torch.arange(4, dtype=F64).repeat_interleave(counts)
    energy, objective = (
        Table(torch.zeros(3, dtype=F64)),
        make(Spread(q, validate_args=False), nu=nu),
    )
    minimise(energy, objective, batch)
    log_p = (counts / counts.sum()).to(F64).log()
    torch.testing.assert_close(energy.free.detach(), log_p[0] - log_p[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(objective.log_z.detach(), -log_p[0], atol=1e-6, rtol=0)


def minimise(energy: nn.Module, objective: nn.Module, batch: Tensor) -> None:
    parameters = [*energy.parameters(), *objective.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(energy, batch)[0]
        loss.backward()
        return loss

    optimizer.step(closure)


def check_stationary(objective: Objective, repeats: int = 300) -> None:
    """At the truth the expected gradient is zero, with noise that is another distribution than the
    data's."""
    energy = Bell((), 0.4, 1.6)
    noise = seeded(6)
    draws = []
    for _ in range(repeats):
        data = 0.4 + torch.randn(400, generator=noise, dtype=F64) / math.sqrt(1.6)
        loss = objective(energy, data, generator=noise)[0]
        draws.append(torch.stack(torch.autograd.grad(loss, list(energy.parameters()))))
    mean, se = mean_and_se(torch.stack(draws))
    within_se(mean, np.zeros(2), se, what="the gradient at the truth")


def check_consistent(objective: Any, n: int = 500, fits: int = 100) -> None:
    """Replicated fits, each solved to the optimum, are centered on the truth."""
    x = 0.4 + randn(fits, n, seed=7) / math.sqrt(1.6)
    if isinstance(objective, ConditionalNCE):
        start = x.repeat(1, objective.num_negatives)
        parts = (x, start + float(objective.noise_scale) * randn(*start.shape, seed=8))
    else:
        y = 1.5 * randn(fits, objective.num_negatives * n, seed=8)
        parts = (x, noise_log_prob(x), y, noise_log_prob(y))
    found = newton(objective, Bell((), 0.4, 1.6), parts)
    mean, se = mean_and_se(found)
    spread = se * math.sqrt(fits)
    # a bias of second order is 1/sqrt(n) of a standard deviation
    for k, truth in enumerate((0.4, 1.6)):
        assert abs(mean[k] - truth) < 5 * se[k] + 3 * spread[k] / math.sqrt(n), (k, mean, se)


def noise_log_prob(x: Tensor, scale: float = 1.5) -> Tensor:
    return -0.5 * (x / scale) ** 2 - HALF_LOG_TWO_PI - math.log(scale)


# --------------------------------------------------------------------------------------------------
# Binary


@pytest.mark.parametrize("nu", [0.5, 1.0, 4.0])
def test_asymptotic_variances(nu: float) -> None:
    check_asymptotics(NoiseContrastive, nu)


@pytest.mark.parametrize("nu", [0.25, 1.0, 3.0])
def test_the_gradient_is_the_integrated_one(nu: float) -> None:
    check_gradient(NoiseContrastive, nu)


def test_much_noise_is_maximum_likelihood() -> None:
    """At c = log Z the integrated gradient comes to that of the likelihood as 1 / nu, and ours is
    that one by the test above."""
    energy, data = Bell((), 0.3, 1.4), torch.randn(8, generator=problem_generator(4), dtype=F64)
    truth = torch.stack(
        torch.autograd.grad(energy(data).mean() + energy.log_partition(), list(energy.parameters()))
    )
    log_z, off = energy.log_partition().detach(), []
    for nu in (10.0, 100.0, 1000.0):
        loss = expected_binary(energy, log_z, data, nu, 1.5)
        off.append(
            float(
                (torch.stack(torch.autograd.grad(loss, list(energy.parameters()))) - truth).norm()
            )
        )
    assert off[1] / off[0] == pytest.approx(0.1, rel=0.2), off
    assert off[2] / off[1] == pytest.approx(0.1, rel=0.02), off
    objective, noise = NoiseContrastive(normal(scale=1.5), nu=2000.0, log_z=float(log_z)), seeded(9)
    draws = [
        torch.stack(
            torch.autograd.grad(
                objective(energy, data, generator=noise)[0], list(energy.parameters())
            )
        )
        for _ in range(30)
    ]
    mean, se = mean_and_se(torch.stack(draws))
    assert off[2] < 2 * se.min()
    within_se(mean, truth, se, what="the gradient at nu=2000")


@pytest.mark.parametrize("nu", [0.5, 1.0, 8.0])
def test_the_optimum_on_a_finite_space(nu: float) -> None:
    check_finite_space(NoiseContrastive, nu)


def asymptotic_variance(width: float, nu: float = 1.0) -> float:
    """n var(lam) for noise N(0, width^2) and data N(0, 1), by quadrature of Gutmann and Hyvarinen's
    (2012) theorem 3."""
    x, dx = grid()
    p, q = torch.exp(-0.5 * x**2 - HALF_LOG_TWO_PI), torch.exp(noise_log_prob(x, width))
    weight = dx * p * nu * q / (p + nu * q)
    g = torch.stack([-0.5 * x**2, -torch.ones_like(x)])  # the gradient of log p in lam and c
    information, mean = (g * weight) @ g.mT, (g * weight).sum(1)
    inverse = torch.linalg.inv(information)
    return float((inverse - (1 + 1 / nu) * torch.outer(inverse @ mean, inverse @ mean))[0, 0])


def test_what_the_width_of_the_noise_does() -> None:
    """The error of the fits is that of theory: least a little beyond the data's width, growing
    slowly with wider noise and fast with narrower."""
    n = 1000
    fits = 150
    widths = (0.75, 1.0, 1.5, 5.0)
    truths = {width: asymptotic_variance(width) for width in widths}
    assert truths[1.0] == pytest.approx(4.0)
    assert truths[1.5] < truths[1.0] < truths[0.75], truths
    assert truths[1.5] < truths[5.0] < asymptotic_variance(0.5), truths
    for width, truth in truths.items():
        x, y = randn(fits, n, seed=1), width * randn(fits, n, seed=2)
        parts = (x, noise_log_prob(x, width), y, noise_log_prob(y, width))
        found = newton(NoiseContrastive(normal(scale=width), log_z=HALF_LOG_TWO_PI), Scale(), parts)
        mean, se = mean_and_se(n * (found[:, 0] - 1.0) ** 2)
        within_se(mean, truth, se, what=f"n times the squared error with noise of width {width:g}")


def test_metrics_of_a_classifier_that_cannot_tell() -> None:
    energy, noise = Bell((), 0.0, 1.0), normal()
    _, metrics = NoiseContrastive(noise, nu=3.0, log_z=HALF_LOG_TWO_PI)(
        energy, randn(50), generator=seeded(0)
    )
    assert float(metrics["posterior_data"]) == pytest.approx(0.25)
    assert float(metrics["posterior_noise"]) == pytest.approx(0.25)
    assert float(metrics["accuracy"]) == pytest.approx(0.75)  # always "noise"
    assert float(metrics["log_likelihood"]) == pytest.approx(
        float(-metrics["energy_data"]) - HALF_LOG_TWO_PI
    )


def test_an_energy_that_knows_itself_is_noise() -> None:
    target = GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], dtype=F64)
    shifted = Gaussian(torch.ones(2, dtype=F64), scale=2.0)
    for distribution in (target, shifted):
        x, log_q = Noise(distribution).draw(50, Bell((2,)), seeded(0))
        assert distribution.log_z is not None
        torch.testing.assert_close(log_q, -distribution(x) - distribution.log_z)
        torch.testing.assert_close(Noise(distribution).log_prob(x, Bell((2,))), log_q)


def test_a_flow_is_noise_with_its_density() -> None:
    flow, energy = nice(4), Bell((1, 2, 2))
    x, log_q = Noise(flow).draw(50, energy, seeded(0))
    assert x.shape == (50, 1, 2, 2)
    torch.testing.assert_close(flow().log_prob(x.flatten(1).clone()), log_q)
    torch.testing.assert_close(Noise(flow).log_prob(x, energy), log_q)


# --------------------------------------------------------------------------------------------------
# Ranking and conditional


NOISE = normal(scale=1.5)
CHAINLESS = [
    RankingNCE(NOISE, 1),
    RankingNCE(NOISE, 5),
    ConditionalNCE(0.7, 1),
    ConditionalNCE(0.3, 3),
]
IDS = ["ranking 1", "ranking 5", "conditional .7", "conditional .3"]


@pytest.mark.parametrize("objective", CHAINLESS, ids=IDS)
def test_the_truth_is_stationary(objective: Objective) -> None:
    check_stationary(objective)


@pytest.mark.parametrize("objective", CHAINLESS, ids=IDS)
def test_fits_are_centered_on_the_truth(objective: Objective) -> None:
    check_consistent(objective)


def test_ranking_by_hand() -> None:
    """Each row among its own draws: the softmax of energies less log q, row by row; an importance
    sample of Z."""
    energy = Bell((2,), 0.2, 0.7)
    x = randn(3, 2)
    y = 1.5 * randn(12, 2, seed=1)
    noise = normal((2,), 1.5)
    loss, metrics = RankingNCE(noise, 4).contrast(
        energy, x, noise.log_prob(x), y, noise.log_prob(y)
    )
    total = 0.0
    for row in range(3):
        weights = [
            float(torch.exp(-energy(z) - noise.log_prob(z)).detach())
            for z in (x[row], *y[4 * row : 4 * row + 4])
        ]
        total -= math.log(weights[0] / sum(weights)) / 3
    assert float(loss.detach()) == pytest.approx(total, abs=1e-12)
    sampled = torch.exp(-energy(y) - noise.log_prob(y)).detach().mean()
    assert float(metrics["log_z"]) == pytest.approx(math.log(float(sampled)), abs=1e-12)


def test_conditional_by_hand() -> None:
    energy = Bell((2,), 0.2, 0.7)
    x = randn(3, 2)
    y = randn(6, 2, seed=1)
    loss, metrics = ConditionalNCE(1.0, 2).contrast(energy, x, y)
    rises = [
        float((energy(y[3 * k + i]) - energy(x[i])).detach()) for k in range(2) for i in range(3)
    ]
    assert float(loss.detach()) == pytest.approx(
        2 * sum(math.log1p(math.exp(-r)) for r in rises) / 6, abs=1e-12
    )
    assert float(metrics["accuracy"]) == pytest.approx(sum(r > 0 for r in rises) / 6)


def test_perturbations_have_their_scale() -> None:
    seen: list[Tensor] = []

    class Seen(Bell):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    scale = torch.tensor([0.1, 2.0], dtype=F64)
    x = randn(4000, 2)
    ConditionalNCE(scale, 2)(Seen((2,)), x, generator=seeded(1))
    moved = seen[0][len(x) :] - x.repeat(2, 1)
    squares = moved**2
    within_se(*(squares.mean(0), scale**2, squares.std(0) / math.sqrt(len(squares))))


# --------------------------------------------------------------------------------------------------
# A flow that learns


def check_losses_are_apart(objective: FlowContrastive) -> None:
    """Each loss reaches all of its own parameters and none of the other's; the flow's gradient is
    that of minus the energy's loss in the flow's parameters, draws and densities included."""
    energy, batch = MLPEnergy((2,), (8,), scale=3.0, dtype=F64, generator=seeded(1)), randn(20, 2)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(0.3 * randn(*parameter.shape, seed=2))
    losses, metrics = objective.losses(energy, batch, generator=seeded(3))
    trained = objective.trained(energy)
    assert set(losses) == set(trained)
    for name, loss in losses.items():
        for owner, parameters in trained.items():
            grads = torch.autograd.grad(
                loss, list(parameters), allow_unused=True, retain_graph=True
            )
            if name == owner:
                assert all(g is not None for g in grads), (
                    f"{name}: a parameter of its own has no gradient"
                )
            else:
                assert all(g is None for g in grads), f"{name}: its gradient leaks into the {owner}"
    # the value by hand, all of its graph kept
    flow = objective.flow
    y, log_q_y = flow.forward_and_log_prob(flow.rsample_base(20, seeded(3)))
    logits = [
        -energy(x) - objective.log_z - q for x, q in ((batch, flow.log_prob(batch)), (y, log_q_y))
    ]
    value = torch.sigmoid(logits[0]).log().mean() + torch.sigmoid(-logits[1]).log().mean()
    torch.testing.assert_close([losses["energy"], losses["flow"]], [-value, value])
    for name, sign in (("energy", -1.0), ("flow", 1.0)):
        ours, truth = (
            torch.autograd.grad(v, list(trained[name]), retain_graph=True)
            for v in (losses[name], value)
        )
        torch.testing.assert_close(list(ours), [sign * g for g in truth])
    assert float(metrics["energy_noise"]) == pytest.approx(float(energy(y).mean().detach()))


def test_losses_of_energy_and_flow_are_apart() -> None:
    check_losses_are_apart(FlowContrastive(nice(2), log_z=0.3))


def test_the_sum_of_the_losses_has_each_one_s_gradients() -> None:
    objective = FlowContrastive(nice(2), log_z=0.3)
    energy = Bell((2,))
    batch = randn(20, 2)
    losses, _ = objective.losses(energy, batch, generator=seeded(3))
    total, metrics = objective(energy, batch, generator=seeded(3))
    torch.testing.assert_close(total, losses["energy"] + losses["flow"])
    assert "flow_log_likelihood" in metrics
    for name, parameters in objective.trained(energy).items():
        own = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(total, parameters, retain_graph=True), own)


def test_a_flow_trained_along_comes_to_the_data() -> None:
    """Noise far off at first: in the end the flow is near the data, and E + c near -log p."""
    data = 2.0 + 0.5 * randn(2000, 2)
    energy = Bell((2,), 1.0, 1.0)
    with fixed_problem():  # a flow that begins far off
        objective = FlowContrastive(nice(2), log_z=1.0)
    noise = seeded(0)
    optimizers = {
        name: torch.optim.Adam(p, lr=0.02) for name, p in objective.trained(energy).items()
    }
    with torch.no_grad():
        before = float(objective.flow.log_prob(data).mean())
    for _ in range(1000):
        rows = data[torch.randint(len(data), (200,), generator=noise)]
        losses, metrics = objective.losses(energy, rows, generator=noise)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        for name, parameters in objective.trained(energy).items():
            losses[name].backward(inputs=list(parameters))
        for optimizer in optimizers.values():
            optimizer.step()
    truth = float(-(0.5 * (data - 2.0) ** 2 / 0.25).sum(1).mean()) - math.log(2 * math.pi * 0.25)
    with torch.no_grad():
        after = float(objective.flow.log_prob(data).mean())
    assert before < truth - 3.0, before
    assert truth - 0.15 < after < truth + 0.02, (after, truth)
    assert float(metrics["log_z"]) == pytest.approx(
        2 * float(energy.log_partition().detach()), abs=0.1
    )
    assert float(energy.mean.detach()) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_learning_flow_takes_every_event(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    energy = Bell(shape, dtype=dtype)
    objective = FlowContrastive(nice(2, dtype))
    batch = randn(6, *shape, dtype=dtype)
    (losses, metrics), (again, _) = (
        objective.losses(energy, batch, generator=seeded(1)) for _ in range(2)
    )
    assert all(
        torch.equal(losses[name], again[name]) and losses[name].dtype == dtype for name in losses
    )
    assert all(not fact.requires_grad for fact in metrics.values())
    other = FlowContrastive(nice(2, dtype, seed=5))
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.losses(energy, batch, generator=seeded(1))[0]["flow"], losses["flow"])


# --------------------------------------------------------------------------------------------------
# Noise fitted to data; the front door


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_noise_has_the_moments_of_data(shape: tuple[int, ...]) -> None:
    data = (
        1.0 + randn(500, *shape) @ torch.eye(*shape[-1:] * 2, dtype=F64)
        if shape
        else 1.0 + randn(500)
    )
    distribution = gaussian_noise(data, scale=2.0)
    assert distribution.event_shape == shape
    assert distribution.batch_shape == ()
    reference = torch.distributions.MultivariateNormal(
        data.reshape(500, -1).mean(0),
        4.0 * torch.cov(data.reshape(500, -1).mT, correction=0).reshape(2 * [math.prod(shape)]),
    )
    torch.testing.assert_close(
        distribution.log_prob(data), reference.log_prob(data.reshape(500, -1))
    )
    assert Noise(distribution).draw(3, Bell(shape))[0].shape == (3, *shape)


class Positive(Bell):
    def __init__(self) -> None:
        super().__init__()
        self.support = constraints.positive


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: NoiseContrastive(normal(), nu=0.0), "nu must be"),
        (lambda: NoiseContrastive(normal(), nu=math.inf), "nu must be"),
        (lambda: NoiseContrastive(Bell()), "Energy with a known log_z"),
        (lambda: NoiseContrastive(dist.Normal(torch.zeros(2), 1.0)), "to_event"),
        (lambda: NoiseContrastive(RedundantNICE(1, 2)), "auxiliary variables: dim=1"),
        (
            lambda: NoiseContrastive(normal((3,)))(Bell((2,)), randn(5, 2)),
            r"event shape .* Bell has \(2,\), .* has \(3,\)",
        ),
        (
            lambda: NoiseContrastive(normal((2,), dtype=torch.float32))(Bell((2,)), randn(5, 2)),
            "dtype of the energy",
        ),
        (lambda: NoiseContrastive(nice(3))(Bell((2,)), randn(5, 2)), "dim=3"),
        (lambda: NoiseContrastive(normal())(Bell(), randn(5).float()), "dtype"),
        (lambda: NoiseContrastive(normal())(Bell(), randn(0)), "at least one row"),
        (lambda: NoiseContrastive(normal())(Positive(), randn(5).abs()), "draws outside"),
        (
            lambda: NoiseContrastive(dist.Uniform(*torch.tensor([0.0, 1.0], dtype=F64)))(
                Bell(), torch.arange(4.0, dtype=F64) / 2
            ),
            "outside the support",
        ),
        (lambda: RankingNCE(normal(), 0), "num_negatives must be"),
        (lambda: ConditionalNCE(0.0), "noise_scale must be"),
        (lambda: ConditionalNCE(torch.ones(3))(Bell((2,)), randn(5, 2)), "must broadcast"),
        (lambda: ConditionalNCE(torch.ones(4, 2))(Bell((2,)), randn(5, 2)), "must broadcast"),
        (
            lambda: ConditionalNCE(1.0)(
                Table(torch.zeros(2, dtype=F64)), torch.zeros(5, dtype=F64)
            ),
            "must have real support",
        ),
        (lambda: FlowContrastive(RedundantNICE(1, 2)), "auxiliary variables"),
        (lambda: FlowContrastive(nice(3)).losses(Bell((2,)), randn(5, 2)), "dim=3"),
        (lambda: gaussian_noise(randn(1, 2)), "at least two rows"),
        (lambda: gaussian_noise(randn(5, 2), 0.0), "scale must be"),
        (lambda: gaussian_noise(torch.ones(5, 2)), "vary in every direction"),
        (lambda: gaussian_noise(math.nan * randn(5, 2)), "must be finite"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# --------------------------------------------------------------------------------------------------
# Mutants


class ForgetsLogNu(NoiseContrastive):
    """The logit without log nu, the noise counted nu times."""

    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        shift = math.log(self.nu)
        return super().contrast(energy, data, log_q_data - shift, noise, log_q_noise - shift)


class CountsNoiseOnce(NoiseContrastive):
    """log nu in the logit, but the mean over the noise not times nu."""

    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        whole = super().contrast(energy, data, log_q_data, noise, log_q_noise)[0]
        logits = -energy(noise) - self.log_z - log_q_noise - math.log(self.nu)
        return whole - (self.nu - 1) * nn.functional.softplus(logits).mean(), {}


class ForgetsLogQ(NoiseContrastive):
    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        return super().contrast(energy, data, 0 * log_q_data, noise, 0 * log_q_noise)


class OtherLabels(NoiseContrastive):
    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        return super().contrast(energy, noise, log_q_noise, data, log_q_data)


class NormalisedAgain(NoiseContrastive):
    """c enters with the other sign."""

    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        shift = 2 * self.log_z
        return super().contrast(energy, data, log_q_data - shift, noise, log_q_noise - shift)


BINARY = [ForgetsLogNu, CountsNoiseOnce, ForgetsLogQ, OtherLabels, NormalisedAgain]


@pytest.mark.parametrize("mutant", BINARY)
def test_mutants_of_the_gradient_are_caught(mutant: type[NoiseContrastive]) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_gradient(mutant, 3.0)


@pytest.mark.parametrize("mutant", BINARY)
def test_mutants_of_the_optimum_are_caught(mutant: type[NoiseContrastive]) -> None:
    with pytest.raises(AssertionError):
        check_finite_space(mutant, 2.0)


@pytest.mark.parametrize("mutant", [ForgetsLogNu, CountsNoiseOnce])
def test_mutants_of_the_asymptotics_are_caught(mutant: type[NoiseContrastive]) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_asymptotics(mutant, 4.0, fits=100)


class RanksByEnergyAlone(RankingNCE):
    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        return super().contrast(energy, data, 0 * log_q_data, noise, 0 * log_q_noise)


class LeavesTheDataOut(RankingNCE):
    """The sum below the fraction is over the noise alone: that is an importance sampled likelihood,
    and biased."""

    def contrast(
        self, energy: Any, data: Any, log_q_data: Any, noise: Any, log_q_noise: Any
    ) -> Any:
        log_w = (-energy(noise) - log_q_noise).reshape(len(data), -1)
        return (log_w.logsumexp(1) + energy(data)).mean(), {}


class Drifts(ConditionalNCE):
    """A perturbation that is not symmetric."""

    def contrast(self, energy: Any, data: Any, noise: Any) -> Any:
        return super().contrast(energy, data, noise + 0.1)


class TiedToOthers(ConditionalNCE):
    """Perturbations put in another order than the data."""

    def contrast(self, energy: Any, data: Any, noise: Any) -> Any:
        return super().contrast(energy, data, noise[: len(data)].roll(1, 0) * 1.2)


@pytest.mark.parametrize(
    "mutant",
    [RanksByEnergyAlone(NOISE, 3), LeavesTheDataOut(NOISE, 3), Drifts(0.7), TiedToOthers(0.7)],
    ids=lambda m: type(m).__name__,
)
def test_mutants_of_ranking_and_conditional_are_caught(mutant: Objective) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_stationary(mutant)


class ThroughTheDensityAlone(FlowContrastive):
    """The draws that the energy sees are constants to the flow."""

    def losses(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        losses, metrics = super().losses(energy, batch, generator=generator)
        y, log_q = self.flow.forward_and_log_prob(
            self.flow.rsample_base(
                len(batch), None if generator is None else generator.manual_seed(3)
            )
        )
        kept = -energy(y.detach()).detach() - self.log_z.detach()
        at_data = -energy(batch).detach() - self.log_z.detach() - self.flow.log_prob(batch)
        against, _ = noise_contrastive.classify(at_data, kept - log_q, 1.0)
        return losses | {"flow": -against}, metrics


class SameSign(FlowContrastive):
    def losses(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        losses, metrics = super().losses(energy, batch, generator=generator)
        return losses | {"flow": -losses["flow"]}, metrics


class Leaks(FlowContrastive):
    def losses(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        losses, metrics = super().losses(energy, batch, generator=generator)
        return losses | {
            "energy": losses["energy"] + 0.0 * self.flow.log_prob(batch).mean()
        }, metrics


@pytest.mark.parametrize("mutant", [ThroughTheDensityAlone, SameSign, Leaks])
def test_mutants_of_the_learning_flow_are_caught(mutant: type[FlowContrastive]) -> None:
    with pytest.raises(AssertionError):
        check_losses_are_apart(mutant(nice(2), log_z=0.3))
