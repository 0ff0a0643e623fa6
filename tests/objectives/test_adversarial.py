"""Adversarial objectives: the finite game in closed form, a flow's bound by quadrature, entropies
of generators; mutants."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.reseed import fixed_problem, problem_generator
from lib.seeds import seeded
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import Energy
from pyroebm.core.rng import standard_normal
from pyroebm.energies import MLPEnergy, ProductOfExpertsEnergy
from pyroebm.flows import NICE, Flow, RedundantNICE
from pyroebm.nn import Generator, MLPGenerator, mlp
from pyroebm.objectives import VERA, Adversarial, AdversarialFlow, DeepDirected, adversarial
from pyroebm.objectives.adversarial import Negative, batch_norm_entropy
from pyroebm.objectives.vera import latent_score
from pyroebm.partition import quadrature
from pyroebm.targets import Beta, DoubleWell, Gaussian
from pyroebm.training import fit_steps

F64 = torch.float64
CPU = torch.device("cpu")


def perturbed(module: Any, scale: float = 0.3, seed: int = 0) -> Any:
    """The module away from its special start."""
    noise = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * standard_normal(p.shape, noise, p.dtype, CPU)
    return module


def numel(event: tuple[int, ...]) -> int:
    return math.prod(event)


Make = Callable[[tuple[int, ...], torch.dtype], Adversarial]

OBJECTIVES: dict[str, Make] = {
    "flow": lambda event, dtype: AdversarialFlow(
        NICE(
            numel(event),
            num_layers=2,
            hidden_sizes=(8,),
            dtype=dtype,
            generator=problem_generator(0),
        )
    ),
    "total gradient": lambda event, dtype: AdversarialFlow(
        NICE(numel(event), 2, (8,), dtype=dtype, generator=problem_generator(0)),
        16,
        gradient="total",
    ),
    "redundant": lambda event, dtype: AdversarialFlow(
        RedundantNICE(
            numel(event), numel(event) + 2, 2, (8,), dtype=dtype, generator=problem_generator(0)
        )
    ),
    "penalised": lambda event, dtype: AdversarialFlow(
        NICE(numel(event), 2, (8,), dtype=dtype, generator=problem_generator(0)),
        gradient_penalty=0.3,
    ),
    "deep directed": lambda event, dtype: DeepDirected(
        MLPGenerator(event, 3, (8, 8), batch_norm=True, dtype=dtype, generator=seeded(1)),
        num_samples=6,
    ),
    "vera": lambda event, dtype: VERA(
        MLPGenerator(event, 3, (8,), sigma=0.2, dtype=dtype, generator=seeded(1)), 5
    ),
}
EVENTS = [(), (3,), (2, 2, 2)]


def pair(
    name: str, event: tuple[int, ...], dtype: torch.dtype = F64
) -> tuple[Energy, Adversarial, Tensor]:
    energy = perturbed(MLPEnergy(event, (8,), scale=2.0, dtype=dtype, generator=seeded(2)))
    return (
        energy,
        perturbed(OBJECTIVES[name](event, dtype), 0.1),
        standard_normal((7, *event), seeded(3), dtype, CPU),
    )


def grads(loss: Tensor, parameters: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True))


def flat(found: list[Tensor | None]) -> Tensor:
    return torch.cat([g.flatten() for g in found if g is not None])


def one_step(
    energy: Energy,
    objective: Adversarial,
    optimizers: dict[str, Any],
    batch: Tensor,
    noise: torch.Generator,
) -> Any:
    """Every gradient first, then every optimizer's step."""
    losses, metrics = objective.losses(energy, batch, generator=noise)
    for name, loss in losses.items():
        parameters = objective.trained(energy)[name]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g
    for optimizer in optimizers.values():
        optimizer.step()
    return metrics


# --------------------------------------------------------------------------------------------------
# What holds for each line of the table


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_metrics(name: str, event: tuple[int, ...], dtype: torch.dtype) -> None:
    energy, objective, batch = pair(name, event, dtype)
    losses, metrics = objective.losses(energy, batch, generator=seeded(0))
    assert losses.keys() == objective.trained(energy).keys()
    assert {"energy_data", "energy_model", "energy_gap"} <= metrics.keys()
    for value in (*losses.values(), *metrics.values()):
        assert value.shape == ()
        assert value.dtype == dtype
        assert bool(torch.isfinite(value))
    assert not any(fact.requires_grad for fact in metrics.values())
    torch.testing.assert_close(metrics["energy_data"], energy(batch).mean().detach())
    torch.testing.assert_close(
        metrics["energy_gap"], metrics["energy_data"] - metrics["energy_model"]
    )
    assert ("log_likelihood_bound" in metrics) == isinstance(objective, AdversarialFlow)


def check_separation(objective: Adversarial, energy: Energy, batch: Tensor) -> None:
    """Each loss reaches all of its own parameters and none of the others'."""
    losses, _ = objective.losses(energy, batch, generator=seeded(0))
    trained = objective.trained(energy)
    for name, loss in losses.items():
        for owner, parameters in trained.items():
            found = grads(loss, parameters)
            if owner == name:
                assert all(g is not None for g in found), (
                    f"the loss of {name} does not reach all of its parameters"
                )
                assert float(flat(found).abs().max()) > 0.0
            else:
                assert all(g is None for g in found), (
                    f"the loss of {name} has a gradient in the parameters of {owner}"
                )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_has_its_own_parameters(name: str) -> None:
    energy, objective, batch = pair(name, (3,))
    check_separation(objective, energy, batch)
    together = [p for group in objective.trained(energy).values() for p in group]
    assert (
        len({id(p) for p in together})
        == len(together)
        == len([*energy.parameters(), *objective.parameters()])
    )
    assert all(p.grad is None and p.requires_grad for p in together)
    assert energy.training
    assert objective.training


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_sum_has_the_gradients_of_its_parts(name: str) -> None:
    energy, objective, batch = pair(name, (3,))
    total, _ = objective(energy, batch, generator=seeded(0))
    losses, _ = objective.losses(energy, batch, generator=seeded(0))
    for part, parameters in objective.trained(energy).items():
        torch.testing.assert_close(grads(total, parameters), grads(losses[part], parameters))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_seed_same_result_and_states_come_back(name: str) -> None:
    energy, objective, batch = pair(name, (3,))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    other = OBJECTIVES[name]((3,), F64)
    other.load_state_dict(objective.state_dict())
    first, second = (o.losses(energy, batch, generator=seeded(4))[0] for o in (objective, other))
    assert all(torch.equal(first[k], second[k]) for k in first)
    third = other.losses(energy, batch, generator=seeded(5))[0]
    assert all(not torch.equal(first[k], third[k]) for k in first)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_is_seen_where_it_is(name: str) -> None:
    energy, objective, batch = pair(name, (3,))
    batch[2, 1] = math.nan
    losses, metrics = objective.losses(energy, batch, generator=seeded(0))
    assert bool(losses["energy"].isnan())
    assert bool(metrics["energy_data"].isnan())
    # draws do not read data
    assert all(bool(torch.isfinite(loss)) for part, loss in losses.items() if part != "energy")
    with torch.no_grad():
        next(objective.parameters()).fill_(math.nan)
    losses, _ = objective.losses(energy, batch, generator=seeded(0))
    assert bool(losses["generator"].isnan())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_trains_both_and_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    _, _, data = pair(name, (2,))

    def run(stop: int | None, path: Path) -> list[Tensor]:
        energy, objective, _ = pair(name, (2,))
        before = [p.detach().clone() for p in [*energy.parameters(), *objective.parameters()]]
        for resume in (False,) if stop is None else (False, True):
            loop = fit_steps(
                energy, objective, data, num_steps=6, batch_size=3, checkpoint=path, resume=resume
            )
            for step in loop:
                if not resume and step.number == stop:
                    loop.close()
            if stop is not None and not resume:
                energy, objective, _ = pair(name, (2,))
        after = [p.detach().clone() for p in [*energy.parameters(), *objective.parameters()]]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        # an output bias of an energy changes nothing; a unit may be idle
        assert sum(changed) >= len(changed) - 2
        return after

    whole, parts = run(None, tmp_path / "a"), run(2, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    energy, objective, batch = pair(name, (3,))
    with pytest.raises(ValueError, match=r"n at least 1, got \(0, 3\)"):
        objective.losses(energy, batch[:0])
    with pytest.raises(ValueError, match="n at least 1"):
        objective.losses(energy, batch[0])
    with pytest.raises(ValueError, match="event_shape"):
        objective.losses(energy, batch[:, :2])
    with pytest.raises(ValueError, match="batch must have the dtype"):
        objective.losses(energy, batch.float())
    wide = MLPEnergy((5,), (4,), dtype=F64)
    with pytest.raises(ValueError, match="event"):
        objective.losses(wide, torch.zeros(2, 5, dtype=F64))
    inside = Beta(torch.full((3,), 2.0, dtype=F64), torch.full((3,), 2.0, dtype=F64))
    with pytest.raises(ValueError, match="real support"):
        objective.losses(inside, torch.full((2, 3), 0.5, dtype=F64))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: AdversarialFlow(NICE(2), num_samples=0), "num_samples must be"),
        (lambda: AdversarialFlow(NICE(2), gradient_penalty=-1.0), "gradient_penalty must be"),
        (lambda: AdversarialFlow(NICE(2), gradient="none"), "gradient must be"),
        (lambda: DeepDirected(MLPGenerator((2,), 2)), "must have batch normalization"),
        (
            lambda: DeepDirected(Generator(nn.BatchNorm1d(2, affine=False), 2, (2,))),
            "must have batch",
        ),
        (lambda: VERA(MLPGenerator((2,), 2, sigma=0.1), num_proposals=0), "num_proposals must be"),
        (lambda: VERA(MLPGenerator((2,), 2, sigma=0.1), eta=0.0), "eta must be"),
        (
            lambda: VERA(MLPGenerator((2,), 2)).losses(Gaussian(torch.zeros(2)), torch.zeros(3, 2)),
            "give the generator sigma",
        ),
        (
            lambda: VERA(MLPGenerator((2,), 2, sigma=0.1, batch_norm=True)).losses(
                Gaussian(torch.zeros(2)), torch.zeros(3, 2)
            ),
            "no batch normalization",
        ),
        (lambda: MLPGenerator((2,), 0), "latent_dim must be"),
        (lambda: MLPGenerator((2,), 2, sigma=-1.0), "sigma must be"),
        (lambda: MLPGenerator((2,), 2, ()), "hidden_sizes must"),
        (lambda: MLPGenerator((2,), 2)(torch.zeros(3, 1)), "z must have shape"),
        (lambda: MLPGenerator((2,), 2).sample(0), "num_samples must be"),
        (lambda: Generator(nn.Linear(2, 3), 2, (2,)).sample(4), "net must return events"),
        (lambda: ProductOfExpertsEnergy(nn.Tanh(), 2, (2,), 0), "num_experts must be"),
        (lambda: ProductOfExpertsEnergy(nn.Tanh(), 2, (2,), 3, sigma=0.0), "sigma must be"),
        (
            lambda: ProductOfExpertsEnergy(nn.Tanh(), 3, (2,), 3)(torch.zeros(4, 2)),
            "features must map",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# --------------------------------------------------------------------------------------------------
# A finite space: everything in closed form


class Table(Energy):
    """K states, one-hot, each with an energy of its own."""

    def __init__(self, values: Tensor) -> None:
        super().__init__((len(values),), constraints.one_hot)
        self.values = nn.Parameter(values.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.values


class Categorical(Adversarial):
    """q over all states, its expectations exact: a subclass as a user would write it."""

    exact_entropy = True

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def negative(self, energy: Energy, n: int, generator: torch.Generator | None) -> Negative:
        log_q = self.logits.log_softmax(0)
        states, q = torch.eye(len(log_q), dtype=log_q.dtype), log_q.exp()
        return Negative({"generator": (q * (energy(states) + log_q)).sum()}, states, q, {})


ENERGIES = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=F64)
LOGITS = torch.tensor([0.1, 0.9, -0.6, 0.0, 0.5], dtype=F64)
COUNTS = torch.tensor([1, 4, 2, 2, 1])
STATES = torch.eye(5, dtype=F64).repeat_interleave(COUNTS, 0)


def check_finite(make: Callable[[Tensor], Adversarial]) -> None:
    """The gaps of the bounds are KL(q || p); the gradient at q = p is that of maximum
    likelihood."""
    energy, objective = Table(ENERGIES), make(LOGITS)
    losses, metrics = objective.losses(energy, STATES)
    log_p, log_q = (-ENERGIES).log_softmax(0), LOGITS.log_softmax(0)
    kl, log_z = (log_q.exp() * (log_q - log_p)).sum(), (-ENERGIES).logsumexp(0)
    torch.testing.assert_close(log_z + losses["generator"].detach(), kl)  # log Z - (H - E_q E)
    torch.testing.assert_close(metrics["log_likelihood_bound"] - (STATES @ log_p).mean(), kl)
    torch.testing.assert_close(metrics["entropy"], -(log_q.exp() * log_q).sum())
    q = LOGITS.clone().requires_grad_()
    exact = (q.softmax(0) * (q.log_softmax(0) - log_p)).sum()
    torch.testing.assert_close(
        grads(losses["generator"], objective.parameters()), grads(exact, [q])
    )

    at_p = make(-ENERGIES).losses(energy, STATES)[0]
    likelihood = energy(STATES).mean() + (-energy.values).logsumexp(0)
    torch.testing.assert_close(
        grads(at_p["energy"], [energy.values]), grads(likelihood, [energy.values])
    )


def test_the_finite_game_is_exact() -> None:
    check_finite(Categorical)


def test_the_fixed_point_of_the_finite_game() -> None:
    """E = -log p_data + const, and q = p_data."""
    energy, objective = Table(ENERGIES), Categorical(LOGITS)
    trained = objective.trained(energy)
    rates = {"energy": 0.1, "generator": 1.0}
    optimizers = {name: torch.optim.SGD(trained[name], lr=rate) for name, rate in rates.items()}
    for _ in range(3000):
        metrics = one_step(energy, objective, optimizers, STATES, seeded(0))
    log_p = (COUNTS.to(F64) / COUNTS.sum()).log()
    level = energy.values.detach() + log_p
    torch.testing.assert_close(level, level.mean().expand(5), rtol=0, atol=1e-9)
    torch.testing.assert_close(objective.logits.detach().log_softmax(0), log_p, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        metrics["log_likelihood_bound"], (STATES @ log_p).mean(), rtol=0, atol=1e-9
    )


# --------------------------------------------------------------------------------------------------
# Flows: the bound by quadrature


def bounds_of(
    objective: Adversarial, energy: Energy, batch: Tensor, steps: int = 40
) -> tuple[Any, Any]:
    """Mean and standard error of what the bound is above the batch's mean log-likelihood."""
    exact = -float(energy(batch).mean().detach()) - quadrature(energy).value
    noise = seeded(11)
    found = [
        float(objective.losses(energy, batch, generator=noise)[1]["log_likelihood_bound"])
        for _ in range(steps)
    ]
    mean, se = mean_and_se(found)
    return mean - exact, se


def check_flow_bound(make: Callable[[Flow], Adversarial]) -> None:
    """In 2-D without latents: the bound is above the log-likelihood by KL(q || p)."""
    with fixed_problem():
        energy = perturbed(MLPEnergy((2,), (8,), scale=1.0, dtype=F64, generator=seeded(2)), 0.2)
        flow = perturbed(NICE(2, num_layers=2, hidden_sizes=(8,), dtype=F64), 0.15)
    axis = torch.linspace(-9.0, 9.0, 601, dtype=F64)
    grid, cell = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
    with torch.no_grad():
        log_q = flow.log_prob(grid)
        assert float(log_q.exp().sum()) * cell == pytest.approx(1.0, abs=1e-8)
        kl = float((log_q.exp() * (log_q + energy(grid))).sum()) * cell + quadrature(energy).value
    assert kl > 0.05
    batch = standard_normal((20, 2), seeded(5), F64, CPU)
    gap, se = bounds_of(make(flow), energy, batch)
    within_se(gap, kl, se, what="the gap of the bound")


def make_flow(flow: Flow) -> Adversarial:
    return AdversarialFlow(flow, num_samples=2000)


def test_a_flows_value_is_an_upper_bound() -> None:
    check_flow_bound(make_flow)


def test_the_redundant_bound_is_j_r() -> None:
    """In 1-D with one latent: J_R by quadrature over (x, y), above KL of the marginal, above 0."""
    energy = DoubleWell(dtype=F64)
    with fixed_problem():
        flow = perturbed(
            RedundantNICE(1, 2, num_layers=4, hidden_sizes=(8,), dtype=F64), 0.25, seed=3
        )
    axis = torch.linspace(-12.0, 12.0, 1201, dtype=F64)
    grid, step = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0])
    assert energy.log_z is not None
    with torch.no_grad():
        log_q = flow.log_prob(grid)
        assert float(log_q.exp().sum()) * step**2 == pytest.approx(1.0, abs=1e-6)
        j_r = (
            float((log_q.exp() * (log_q + flow.extend(energy)(grid))).sum()) * step**2
            + energy.log_z
        )
        log_x = flow.log_prob_x(axis.unsqueeze(1))
        kl = float((log_x.exp() * (log_x + energy(axis))).sum()) * step + energy.log_z
    assert j_r > kl + 0.01 > 0.02
    batch = torch.tensor([-1.5, -1.2, 1.3], dtype=F64)
    gap, se = bounds_of(AdversarialFlow(flow, num_samples=4000), energy, batch)
    within_se(gap, j_r, se, what="the gap of the bound")


class Learned(Energy):
    """A normal distribution with mean and log precision to be learned."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.mean = nn.Parameter(torch.tensor([0.5, -1.0], dtype=F64))
        self.log_precision = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (torch.exp(self.log_precision) * (x - self.mean) ** 2).sum(-1)


def exact_flow(energy: Learned) -> Flow:
    scale = (-0.5 * energy.log_precision.detach()).exp()
    flow = NICE(2, num_layers=0, dtype=F64)
    with torch.no_grad():  # a fresh flow is z: S = diag(scale), shifted by the mean
        images = flow.forward_and_log_prob(torch.eye(2, dtype=F64))[0]
        torch.testing.assert_close(images, torch.eye(2, dtype=F64))
    return Flow(
        [
            *flow.transform.parts,
            dist.transforms.AffineTransform(energy.mean.detach(), scale, event_dim=1),
        ],
        2,
        2,
    )


def check_likelihood_gradient(make: Callable[[Flow], Adversarial]) -> None:
    """Where q is p the energy's gradient is that of maximum likelihood, on average over draws."""
    energy, data = Learned(), standard_normal((6, 2), seeded(2), F64, CPU)
    likelihood = energy(data).mean() - 0.5 * energy.log_precision.sum()
    objective, noise = make(exact_flow(energy)), seeded(6)
    found = [
        flat(
            grads(objective.losses(energy, data, generator=noise)[0]["energy"], energy.parameters())
        )
        for _ in range(100)
    ]
    mean, se = mean_and_se(torch.stack(found))
    within_se(
        mean, flat(grads(likelihood, energy.parameters())), se, what="the gradient of the energy"
    )


def test_the_energys_gradient_is_that_of_maximum_likelihood() -> None:
    check_likelihood_gradient(make_flow)


def test_a_flow_that_is_the_model_has_no_gradient() -> None:
    """The path derivative is 0 in each draw, and the bound is the log-likelihood in each draw."""
    energy, objective = Gaussian(torch.zeros(2, dtype=F64)), AdversarialFlow(NICE(2, dtype=F64))
    batch = standard_normal((6, 2), seeded(2), F64, CPU)
    losses, metrics = objective.losses(energy, batch, generator=seeded(0))
    found = grads(losses["generator"], objective.parameters())
    assert float(flat(found).abs().max()) < 1e-14
    torch.testing.assert_close(
        metrics["log_likelihood_bound"], -energy(batch).mean() - math.log(2.0 * math.pi)
    )


def test_the_gradient_penalty_is_the_written_one() -> None:
    energy = Learned()
    flow = NICE(2, dtype=F64)
    data = standard_normal((6, 2), seeded(2), F64, CPU)
    plain, with_it = (
        AdversarialFlow(flow, gradient_penalty=gamma).losses(energy, data, generator=seeded(0))
        for gamma in (0.0, 0.7)
    )
    slopes = energy.log_precision.exp() * (data - energy.mean)
    penalty = 0.35 * slopes.square().sum(1).mean()
    assert "gradient_penalty" not in plain[1]
    torch.testing.assert_close(with_it[1]["gradient_penalty"], penalty.detach())
    torch.testing.assert_close(with_it[0]["energy"] - plain[0]["energy"], penalty)
    torch.testing.assert_close(
        flat(grads(with_it[0]["energy"] - plain[0]["energy"], energy.parameters())),
        flat(grads(penalty, energy.parameters())),
    )


# --------------------------------------------------------------------------------------------------
# Batch normalisation


def check_batch_norm_entropy(entropy: Callable[[nn.Module], Tensor]) -> None:
    """The entropy of normal and independent units, whose scales are the deviations of the rows that
    come out."""
    layers = nn.Sequential(
        nn.BatchNorm1d(3, eps=1e-12, dtype=F64), nn.BatchNorm1d(3, eps=1e-12, dtype=F64)
    )
    first, last = (layer.weight for layer in layers)
    with torch.no_grad():
        first.copy_(torch.tensor([1.0, 2.0, 0.3]))
        last.copy_(torch.tensor([0.5, -1.5, 2.0]))
        rows = layers(standard_normal((4000, 3), seeded(0), F64, CPU))
    torch.testing.assert_close(rows.std(0, correction=0), last.detach().abs())
    distribution = torch.distributions.Independent(
        torch.distributions.Normal(rows.mean(0), rows.std(0, correction=0)), 1
    )
    found = entropy(layers)
    torch.testing.assert_close(found - entropy(layers[0]), distribution.entropy())
    torch.testing.assert_close(
        grads(found, [first, last]), [1.0 / first.detach(), 1.0 / last.detach()]
    )


def test_the_batch_norm_entropy() -> None:
    check_batch_norm_entropy(batch_norm_entropy)


def test_deep_directed_is_exact_for_one_normal_layer() -> None:
    """x = a z + b, z normalised over the batch: E_q[E] - H(q) in closed form; its best scale is the
    target's."""
    scale = torch.tensor([0.7, 1.6], dtype=F64)
    energy, layer = (
        Gaussian(torch.zeros(2, dtype=F64), scale=scale),
        nn.BatchNorm1d(2, eps=1e-12, dtype=F64),
    )
    objective = DeepDirected(Generator(layer, 2, (2,)), num_samples=100)
    for _ in range(2):
        losses, metrics = objective.losses(
            energy, torch.zeros(3, 2, dtype=F64), generator=seeded(0)
        )
        a, b = layer.weight, layer.bias
        entropy = (0.5 * math.log(2.0 * math.pi * math.e) + a.abs().log()).sum()
        exact = (0.5 * (a**2 + b**2) / scale**2).sum() - entropy
        constant = losses["generator"] - exact
        torch.testing.assert_close(metrics["entropy_surrogate"], entropy.detach())
        torch.testing.assert_close(flat(grads(constant, [a, b])), torch.zeros(4, dtype=F64))
        slope = float(flat(grads(losses["generator"], [a, b])).abs().max())
        with torch.no_grad():
            a.copy_(scale)
    assert slope < 1e-9  # at the target's scale
    assert "log_likelihood_bound" not in metrics


# --------------------------------------------------------------------------------------------------
# The latent-variable generator, against a linear one, whose distribution is normal


def linear(sigma: float = 0.4) -> Generator:
    net = nn.Linear(2, 3, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.2], [-0.3, 0.7], [0.5, -0.6]]))
        net.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return Generator(net, 2, (3,), sigma=sigma)


def distribution_of(model: Generator) -> torch.distributions.MultivariateNormal:
    a, b = model.net.weight, model.net.bias
    cov = a @ a.mT + model.sigma**2 * torch.eye(3, dtype=F64)
    return torch.distributions.MultivariateNormal(b, covariance_matrix=cov)  # type: ignore[arg-type]


LOG_ETA = torch.tensor(0.7, dtype=F64).log()


def test_the_latent_score_is_that_of_the_normal_distribution() -> None:
    """The mean over many proposals at each of a few points; the unnormalised weights have the mean
    q(x)."""
    model = linear()
    rows = 4
    copies = 400
    k = 2000
    z = model.sample_latent(rows, seeded(1))
    x = model.emit(z, seeded(2)).detach()
    distribution = distribution_of(model)
    exact = -(x - distribution.mean) @ distribution.precision_matrix
    many_x, many_z = x.repeat_interleave(copies, 0), z.repeat_interleave(copies, 0)
    found = latent_score(model, many_x, many_z, LOG_ETA, k, seeded(3))
    mean, se = mean_and_se(found.score.reshape(rows, copies, 3), axis=1)
    within_se(mean, exact, se, what="the score")
    few = latent_score(model, many_x, many_z, LOG_ETA, 5, seeded(4))
    ratio = (few.log_q.reshape(rows, copies) - distribution.log_prob(x).unsqueeze(1)).exp()
    mean, se = mean_and_se(ratio, axis=1)
    within_se(mean, torch.ones(rows, dtype=F64), se, what="the weights")
    assert bool((few.log_q.reshape(rows, copies).mean(1) < distribution.log_prob(x)).all())
    assert bool(((few.effective >= 1.0) & (few.effective <= 5.0)).all())


def test_the_error_of_the_latent_score_falls_as_1_over_k() -> None:
    model = linear()
    z = model.sample_latent(3000, seeded(1))
    x = model.emit(z, seeded(2)).detach()
    distribution = distribution_of(model)
    exact = -(x - distribution.mean) @ distribution.precision_matrix
    errors = [
        float(
            (latent_score(model, x, z, LOG_ETA, k, seeded(k)).score - exact)
            .square()
            .mean()
            .detach()
        )
        for k in (20, 80, 320)
    ]
    for before, after in itertools.pairwise(errors):
        assert 2.5 < before / after < 6.0, errors  # 4 in the limit


def test_a_row_of_the_latent_score_is_its_own() -> None:
    model = perturbed(MLPGenerator((2, 1, 2), 3, (6,), sigma=0.3, dtype=F64, generator=seeded(0)))
    z = model.sample_latent(4, seeded(1))
    x = model.emit(z, seeded(2)).detach()
    whole = latent_score(model, x, z, LOG_ETA, 6, seeded(3))
    x[2, 0, 0, 0] = math.nan
    broken = latent_score(model, x, z, LOG_ETA, 6, seeded(3))
    rest = [0, 1, 3]
    for ours, theirs in zip(whole, broken, strict=True):
        assert torch.equal(ours[rest], theirs[rest])
        assert bool(theirs[2].isnan().any())


def exact_free_energy(model: Generator, precision: Tensor) -> Tensor:
    """E_q[x'Px / 2] - H(q) of the normal distribution."""
    distribution = distribution_of(model)
    return (
        0.5
        * (
            (precision * distribution.covariance_matrix).sum()
            + distribution.mean @ precision @ distribution.mean
        )
        - distribution.entropy()
    )


def check_vera(make: Callable[[Generator], Adversarial]) -> None:
    """The gradient of the generator's loss is that of E_q[E] - H(q); its value is below."""
    model = linear()
    precision = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, -0.2], [0.0, -0.2, 1.5]], dtype=F64)
    energy = Gaussian(torch.zeros(3, dtype=F64), covariance=torch.linalg.inv(precision))
    exact = exact_free_energy(model, precision)
    objective, noise = make(model), seeded(9)
    found, values = [], []
    for _ in range(60):
        losses, _ = objective.losses(energy, torch.zeros(1, 3, dtype=F64), generator=noise)
        found.append(flat(grads(losses["generator"], model.parameters())))
        values.append(float(losses["generator"].detach()))
    mean, se = mean_and_se(torch.stack(found))
    within_se(
        mean, flat(grads(exact, model.parameters())), se, what="the gradient of the generator"
    )
    mean, se = mean_and_se(values)
    assert mean < float(exact.detach()) + 5.0 * float(se)
    assert mean > float(exact.detach()) - 0.1


def make_vera(model: Generator) -> Adversarial:
    return VERA(model, num_proposals=300, eta=0.7, num_samples=200)


def test_vera_has_the_gradient_of_the_exact_objective() -> None:
    check_vera(make_vera)


def test_the_width_of_proposals_is_trained() -> None:
    """The mean of log q rises to its maximum over widths, where the score is better than at that of
    the ELBO."""
    objective = VERA(linear(), num_samples=400, eta=0.2)
    energy = Gaussian(torch.zeros(3, dtype=F64))
    noise = seeded(0)
    optimizer = torch.optim.Adam([objective.log_eta], lr=0.05)
    for _ in range(120):
        losses, metrics = objective.losses(energy, torch.zeros(1, 3, dtype=F64), generator=noise)
        torch.testing.assert_close(losses["posterior"].detach(), metrics["entropy"])
        (objective.log_eta.grad,) = torch.autograd.grad(losses["posterior"], [objective.log_eta])
        optimizer.step()
    model = linear()
    z = model.sample_latent(4000, seeded(1))
    x = model.emit(z, seeded(2)).detach()
    distribution = distribution_of(model)
    exact = -(x - distribution.mean) @ distribution.precision_matrix
    elbo = -0.5 * torch.log1p(model.net.weight.detach().square().sum(0) / 0.4**2)  # type: ignore[operator]
    trained, narrow = (
        latent_score(model, x, z, w, 20, seeded(3)) for w in (objective.log_eta.detach(), elbo)
    )
    error = [float((found.score - exact).square().mean().detach()) for found in (trained, narrow)]
    assert error[0] < 0.6 * error[1], error
    for step in (-0.3, 0.3):
        assert bool(
            trained.log_q.mean()
            > latent_score(model, x, z, objective.log_eta + step, 20, seeded(3)).log_q.mean()
        )


# --------------------------------------------------------------------------------------------------
# Generators and the product of experts


@pytest.mark.parametrize("event", EVENTS)
def test_generators_draw_rows(event: tuple[int, ...]) -> None:
    model = MLPGenerator(
        event, 3, (8, 8), batch_norm=True, sigma=0.1, dtype=F64, generator=seeded(0)
    )
    model.emit(model.sample_latent(50, seeded(0)))  # running statistics move
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = model.sample(6, seeded(1))
    assert drawn.shape == (6, *event)
    assert not drawn.requires_grad
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(drawn, model.sample(6, seeded(1)))
    model.eval()
    z = model.sample_latent(6, seeded(2))
    torch.testing.assert_close(model(z)[:2], model(z[:2]))


def test_a_generator_follows_its_net() -> None:
    model = MLPGenerator((2,), 2, sigma=0.5).to(F64)
    assert model.sample(3).dtype == F64
    assert float(Generator(nn.Identity(), 2, (2,)).sigma) == 0.0
    n, s = 40_000, 0.5
    model = Generator(nn.Identity(), 2, (2,), sigma=s)
    mean, se = mean_and_se(model.sample(n, seeded(0)).double().square())
    within_se(mean, [1.0 + s**2] * 2, se)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_experts_are_hidden_bits_summed_out(event: tuple[int, ...], dtype: torch.dtype) -> None:
    features = nn.Sequential(
        nn.Flatten() if event else nn.Unflatten(0, (-1, 1)),
        mlp(numel(event), 5, (6,), zero_last=False),
    )
    energy = perturbed(
        ProductOfExpertsEnergy(features, 5, event, 3, sigma=1.5, generator=seeded(0)).to(dtype)
    )
    x = standard_normal((4, *event), seeded(1), dtype, CPU)
    h = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=dtype)
    with torch.no_grad():
        fields = energy.features(x) @ energy.weight.mT + energy.expert_bias
        rows, bias = x.reshape(4, -1), energy.bias.reshape(-1)
        joint = (rows.square().sum(1) / 1.5**2 - rows @ bias).unsqueeze(1) - fields @ h.mT
        torch.testing.assert_close(energy(x), -torch.logsumexp(-joint, 1))
        torch.testing.assert_close(energy(x.unsqueeze(1)), energy(x).unsqueeze(1))
        alone = energy(x[:1])
        x[1:] = math.nan
        torch.testing.assert_close(energy(x)[:1], alone)


def test_the_product_of_experts_is_normalisable() -> None:
    energy = perturbed(
        ProductOfExpertsEnergy(
            mlp(1, 4, (6,), dtype=F64), 4, (1,), 8, sigma=1.0, generator=seeded(0)
        ),
        1.0,
    )
    assert quadrature(energy).kind == "exact"
    with pytest.warns(UserWarning, match="batch normalization"):
        ProductOfExpertsEnergy(nn.BatchNorm1d(2), 2, (2,))


# --------------------------------------------------------------------------------------------------
# Mutants


class Upside(AdversarialFlow):
    """The energy is raised where the data are."""

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        losses, metrics = super().losses(energy, batch, generator=generator)
        return losses | {"energy": -losses["energy"]}, metrics


class NoEntropy(AdversarialFlow):
    def negative(self, energy: Energy, n: int, generator: torch.Generator | None) -> Negative:
        found = super().negative(energy, n, generator)
        return found._replace(losses={"generator": energy(found.x).mean()})


class FlippedEntropy(Categorical):
    def negative(self, energy: Energy, n: int, generator: torch.Generator | None) -> Negative:
        found, log_q = super().negative(energy, n, generator), self.logits.log_softmax(0)
        return found._replace(
            losses={"generator": found.losses["generator"] - 2.0 * (log_q.exp() * log_q).sum()}
        )


class Unweighted(Categorical):
    def negative(self, energy: Energy, n: int, generator: torch.Generator | None) -> Negative:
        return super().negative(energy, n, generator)._replace(weights=None)


class Attached(AdversarialFlow):
    """The energy's loss moves the flow as well, up the energy."""

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        losses, metrics = super().losses(energy, batch, generator=generator)
        x = self.flow.forward_and_log_prob(self.flow.rsample_base(len(batch), generator))[0]
        return losses | {"energy": energy(batch).mean() - energy(x).mean()}, metrics


def test_a_flipped_sign_is_caught() -> None:
    with pytest.raises(AssertionError, match="the gradient of the energy"):
        check_likelihood_gradient(lambda flow: Upside(flow, num_samples=2000))


def test_a_dropped_entropy_is_caught() -> None:
    with pytest.raises(AssertionError, match="the gap of the bound"):
        check_flow_bound(lambda flow: NoEntropy(flow, num_samples=2000))


@pytest.mark.parametrize("mutant", [FlippedEntropy, Unweighted])
def test_mutants_of_the_finite_game_are_caught(mutant: type[Categorical]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_finite(mutant)


def test_leaks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    energy, objective, batch = pair("flow", (2,))
    assert isinstance(objective, AdversarialFlow)
    with pytest.raises(
        AssertionError, match="the loss of energy has a gradient in the parameters of generator"
    ):
        check_separation(Attached(objective.flow), energy, batch)
    monkeypatch.setattr(adversarial, "frozen", lambda module: contextlib.nullcontext())
    with pytest.raises(
        AssertionError, match="the loss of generator has a gradient in the parameters of energy"
    ):
        check_separation(objective, energy, batch)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda module: 2.0 * batch_norm_entropy(module),  # log of the variances without the half
        # no constants
        lambda module: batch_norm_entropy(module) - batch_norm_entropy(module).detach(),
        lambda module: (
            batch_norm_entropy(module).detach() + 0.0 * sum(p.sum() for p in module.parameters())
        ),
    ],
)
def test_mutants_of_the_batch_norm_entropy_are_caught(
    mutant: Callable[[nn.Module], Tensor],
) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_batch_norm_entropy(mutant)


def wrong_score(kind: str) -> Callable[..., Any]:
    def mutant(model: Generator, x: Tensor, z: Tensor, *args: Any) -> Any:
        found = latent_score(model, x, z, *args)
        if kind == "sign":
            return found._replace(score=-found.score)
        if kind == "dropped":
            return found._replace(score=torch.zeros_like(found.score))
        if kind == "conditional":  # of q(x | z): the entropy of the noise alone
            return found._replace(score=((model(z) - x) / model.sigma**2).detach())
        return found._replace(score=found.score * model.sigma.detach())  # "scale": one power of s

    return mutant


@pytest.mark.parametrize("kind", ["sign", "dropped", "conditional", "scale"])
def test_mutants_of_vera_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroebm.objectives.vera.latent_score", wrong_score(kind))
    with pytest.raises(AssertionError, match="the gradient of the generator"):
        check_vera(make_vera)
