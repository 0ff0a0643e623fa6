"""Bits over deep features: conditionals and free energies by enumeration, the likelihood's gradient
by quadrature, mutants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import flat_grad, seeded
from torch import Tensor, nn

from pyroebm import MCMC, NUTS, Energy
from pyroebm.energies import FeatureLatentEnergy, GaussianRBM
from pyroebm.kernels import MALA, BlockGibbs
from pyroebm.nn import mlp
from pyroebm.objectives import ContrastiveDivergence, Objective, ReplayBufferCD
from pyroebm.partition import quadrature
from pyroebm.training import fit

F64 = torch.float64
AXIS = torch.linspace(-7.0, 7.0, 281, dtype=F64)


class Pixels(nn.Module):
    """Features of an event of any shape: a perceptron of its entries."""

    def __init__(self, entries: int, m: int, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.net = mlp(
            entries, m, (6,), activation="tanh", zero_last=False, dtype=dtype, generator=seeded(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net(x.reshape(len(x), -1)))


def make(
    shape: tuple[int, ...] = (2,),
    dtype: torch.dtype = F64,
    kind: type[FeatureLatentEnergy] = FeatureLatentEnergy,
) -> FeatureLatentEnergy:
    noise = seeded(2)
    weight, b, c = (
        1.5 * torch.randn(size, dtype=F64, generator=noise) for size in ((3, 4), shape, (3,))
    )
    parts = {"weight": weight, "visible_bias": b, "hidden_bias": c}
    return kind(Pixels(math.prod(shape), 4, dtype), shape, 3, **parts)


def grid(shape: tuple[int, ...]) -> tuple[Tensor, float]:
    """Events on a grid, and the volume of a cell."""
    entries = math.prod(shape)
    return torch.cartesian_prod(*[AXIS] * entries).reshape(-1, *shape), float(
        AXIS[1] - AXIS[0]
    ) ** entries


BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=F64)


def written(energy: FeatureLatentEnergy, x: Tensor) -> Tensor:
    """E(x, h) as the lecture has it, of each row and each of the eight states: x'x + h'W f(x) - c'h
    - b'x."""
    flat, alpha = x.reshape(len(x), -1), energy.features(x) @ energy.weight.mT
    quadratic = (flat * flat).sum(1) - flat @ energy.visible_bias.flatten()
    return quadratic[:, None] + alpha @ BITS.mT - BITS @ energy.hidden_bias


def exact_gradient(energy: FeatureLatentEnergy, data: Tensor) -> Tensor:
    """Of the mean log-likelihood, by autograd through the sum over bits and the integral over
    events."""
    points, cell = grid(energy.event_shape)
    log_z = torch.logsumexp(-written(energy, points), (0, 1)) + math.log(cell)
    return flat_grad(energy, (torch.logsumexp(-written(energy, data), 1) - log_z).mean())


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def check_distributions(energy: FeatureLatentEnergy) -> None:
    """Joint energy, free energy and conditional against the eight states."""
    shape = energy.event_shape
    x = torch.randn(7, *shape, dtype=F64, generator=seeded(3))
    states = torch.cat([x.reshape(7, 1, -1).expand(7, 8, -1), BITS.expand(7, 8, 3)], -1)
    table = written(energy, x)
    torch.testing.assert_close(energy.joint()(states), table)
    torch.testing.assert_close(energy(x), -torch.logsumexp(-table, 1))
    p = torch.softmax(-table, 1)
    distribution = energy.hidden_given(x)
    torch.testing.assert_close(
        torch.stack([distribution.log_prob(h.expand(7, 3)).exp() for h in BITS], 1), p
    )
    torch.testing.assert_close(distribution.mean, p @ BITS)
    torch.testing.assert_close(energy.joint().conditional("hidden", states[:, 0]).mean, p @ BITS)


def check_gradient(energy: FeatureLatentEnergy) -> None:
    """E_{p(x, h)}[dE] - mean E_{p(h | x_i)}[dE], the model's term a sum over the grid, is the
    gradient of the likelihood."""
    data = torch.randn(9, *energy.event_shape, dtype=F64, generator=seeded(4))
    points, _ = grid(energy.event_shape)
    with torch.no_grad():
        p = torch.softmax(-energy(points), 0)
    gradient = flat_grad(
        energy, p @ energy.expected_energy(points) - energy.expected_energy(data).mean()
    )
    torch.testing.assert_close(gradient, exact_gradient(energy, data), rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 3)])
def test_distributions_by_enumeration(shape: tuple[int, ...]) -> None:
    check_distributions(make(shape))


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_the_gradient_of_the_likelihood(shape: tuple[int, ...]) -> None:
    check_gradient(make(shape))


def test_the_gradient_of_each_parameter_in_closed_form() -> None:
    """Of W, b and c at one x: p(h | x) f(x)', -x and -p(h | x)."""
    energy, x = make(), torch.tensor([[0.3, -0.8]], dtype=F64)
    p = energy.hidden_given(x).mean[0].detach()
    for value in (energy.expected_energy(x), energy(x)):
        by_weight, by_visible, by_hidden = torch.autograd.grad(
            value.sum(), [energy.weight, energy.visible_bias, energy.hidden_bias]
        )
        torch.testing.assert_close(by_weight, torch.outer(p, energy.features(x)[0].detach()))
        torch.testing.assert_close(by_visible, -x[0])
        torch.testing.assert_close(by_hidden, -p)


def test_linear_features_make_a_gaussian_machine() -> None:
    """f(x) = x: the free energy of a Gaussian RBM of variance 1/2, b / 2 its visible bias, -W / 2
    its weights."""
    weight = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=F64)
    b, c = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.2, -0.4, 0.1], dtype=F64)
    energy = FeatureLatentEnergy(
        nn.Identity().to(F64), (2,), 3, weight=weight, visible_bias=b, hidden_bias=c
    ).double()
    log_z = quadrature(energy).value
    sigma = torch.full((2,), math.log(math.sqrt(0.5)), dtype=F64)
    rbm = GaussianRBM(
        2,
        3,
        convention="cho",
        weight=-0.5 * weight.mT,
        visible_bias=0.5 * b,
        hidden_bias=c,
        log_sigma=sigma,
    )
    x = torch.randn(20, 2, dtype=F64, generator=seeded(1))
    torch.testing.assert_close(-energy(x) - log_z, rbm.double().log_likelihood(x))


def test_persistent_chains_have_the_exact_gradient() -> None:
    energy = make()
    data = torch.randn(40, 2, dtype=F64, generator=seeded(4))
    gradients = []
    for run in range(60):
        objective, noise = ReplayBufferCD(num_chains=200, k=4, kernel=MALA(0.7)), seeded(30 + run)
        for _ in range(20):
            objective(energy, data, generator=noise)
        gradients.append(flat_grad(energy, objective(energy, data, generator=noise)[0]))
    mean, se = mean_and_se(torch.stack(gradients))
    within_se(mean, -exact_gradient(energy, data), se)


def test_draws_of_events_and_bits() -> None:
    """NUTS on the free energy, then bits given events: means against the grid."""
    energy = make()
    mcmc = MCMC(NUTS(), num_samples=200, warmup_steps=300, num_chains=64, seed=0)
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    points, _ = grid((2,))
    with torch.no_grad():
        p = torch.softmax(-energy(points), 0)
        truth = torch.cat([p @ points, p @ energy.hidden_given(points).mean])
        torch.manual_seed(0)
        states = torch.cat([x, energy.hidden_given(x).sample()], -1)
    mean, se = mean_and_se(states.mean(1))
    within_se(mean, truth, se)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shapes_types_and_starts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    energy = make(shape, dtype)
    x = energy.initial(8, seeded(0)).reshape(4, 2, *shape)
    assert x.dtype == dtype
    assert energy(x).shape == energy.expected_energy(x).shape == (4, 2)
    assert energy.hidden_given(x).mean.shape == (4, 2, 3)
    torch.testing.assert_close(energy(x)[2, 1], energy(x[2, 1]))
    joint = energy.joint()
    states = joint.initial(6, seeded(1))
    assert torch.equal(states, joint.initial(6, seeded(1)))
    assert states.dtype == dtype
    assert joint(states).shape == (6,)
    assert joint.marginal() is energy
    assert set(states[:, joint.blocks["hidden"]].unique().tolist()) <= {0.0, 1.0}
    assert {id(p) for p in joint.parameters()} == {id(p) for p in energy.parameters()}
    spoiled = states.clone()
    spoiled[2, 0] = torch.nan
    clean, dirty = joint(states), joint(spoiled)
    assert bool(dirty[2].isnan())
    assert torch.equal(clean[[0, 1, 3, 4, 5]], dirty[[0, 1, 3, 4, 5]])


def test_starts_are_the_distribution_without_bits() -> None:
    energy = make()
    x = energy.initial(20_000, seeded(5))
    mean, se = mean_and_se(x)
    within_se(mean, 0.5 * energy.visible_bias, se)
    mean, se = mean_and_se((x - 0.5 * energy.visible_bias.detach()) ** 2)
    within_se(mean, 0.5, se)


def test_only_the_bits_have_a_closed_conditional() -> None:
    joint = make().joint()
    states = joint.initial(4, seeded(0))
    with pytest.raises(ValueError, match="couples the coordinates of x"):
        joint.conditional("visible", states)
    with pytest.raises(ValueError, match="block must be one of"):
        joint.conditional("middle", states)
    kernel = BlockGibbs()
    with pytest.raises(ValueError, match=r"couples|discrete"):
        kernel.step(joint, kernel.init(joint, states), seeded(0))


class ExactOnGrid(Objective):
    """Minus the mean log-likelihood by the sum over a coarse grid."""

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        axis = AXIS[90:-90:2]
        log_z = torch.logsumexp(-energy(torch.cartesian_prod(axis, axis)), 0) + 2.0 * math.log(
            float(axis[1] - axis[0])
        )
        data = energy(batch).mean()
        return data + log_z, {"energy_data": data.detach()}


def test_it_learns_a_ring() -> None:
    """What no normal distribution and no Gaussian machine of few bits can: the exact likelihood
    rises by half a nat over theirs."""
    angle = 2.0 * math.pi * torch.rand(900, dtype=F64, generator=seeded(7))
    radius = 1.0 + 0.1 * torch.randn(900, dtype=F64, generator=seeded(8))
    data = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    normal = -math.log(2.0 * math.pi * math.e) - 0.5 * float(
        torch.linalg.slogdet(torch.cov(data.mT, correction=0))[1]
    )
    features = mlp(2, 16, (32,), activation="tanh", zero_last=False, dtype=F64, generator=seeded(0))
    energy = FeatureLatentEnergy(features, (2,), 8, generator=seeded(1))
    fit(energy, ExactOnGrid(), data, num_steps=200, batch_size=900, lr=0.02, progress=False)
    reached = -float(energy(data).mean().detach()) - quadrature(energy, tolerance=1e-4).value
    assert reached > normal + 0.5, (reached, normal)


def test_contrastive_gradients_reach_the_features() -> None:
    energy = make((1, 2, 2))
    x = torch.randn(5, 1, 2, 2, dtype=F64, generator=seeded(0))
    ContrastiveDivergence(2)(energy, x, generator=seeded(0))[0].backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in energy.parameters())


def test_bad_input_is_named() -> None:
    features = Pixels(2, 4)
    for arguments, message in (
        ({"num_hidden": 0}, "num_hidden must be an integer of at least 1"),
        (
            {"num_hidden": 3, "weight": torch.zeros(4, 3)},
            r"weight must have shape \(3, 4\), got shape \(4, 3\)",
        ),
        ({"num_hidden": 3, "visible_bias": torch.zeros(3)}, r"visible_bias must have shape \(2,\)"),
        ({"num_hidden": 3, "hidden_bias": torch.zeros(2)}, r"hidden_bias must have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureLatentEnergy(features, (2,), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features must map \(n, \*event_shape\) to \(n, m\)"):
        FeatureLatentEnergy(nn.Identity(), (1, 2, 2), 3)
    with pytest.warns(UserWarning, match="batch normalization"):
        FeatureLatentEnergy(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), (2,), 3)
    with pytest.warns(UserWarning, match="piecewise linear"):
        FeatureLatentEnergy(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), (2,), 3)


# --------------------------------------------------------------------------------------------------
# Mutants: the misprints of the lecture among them


class SignInBits(FeatureLatentEnergy):
    def hidden_logits(self, x: Tensor) -> Tensor:
        return -super().hidden_logits(x)


class HalfQuadratic(FeatureLatentEnergy):
    def quadratic(self, x: Tensor) -> Tensor:
        return super().quadratic(x) - 0.5 * (x * x).flatten(x.dim() - len(self.event_shape)).sum(-1)


class FreeEnergyWithoutBits(FeatureLatentEnergy):
    def forward(self, x: Tensor) -> Tensor:
        return self.expected_energy(x)


class Softmax(FeatureLatentEnergy):
    def hidden_given(self, x: Tensor) -> torch.distributions.Distribution:
        p = torch.softmax(self.hidden_logits(x), -1)
        return torch.distributions.Independent(torch.distributions.Bernoulli(p), 1)


class LiveProbabilities(FeatureLatentEnergy):
    def expected_energy(self, x: Tensor) -> Tensor:
        logits = self.hidden_logits(x)
        return self.quadratic(x) - (torch.sigmoid(logits) * logits).sum(-1)


class NoFeatures(FeatureLatentEnergy):
    def expected_energy(self, x: Tensor) -> Tensor:
        logits = self.hidden_logits(x)
        detached = (self.features(x).detach() @ self.weight.mT - self.hidden_bias) * torch.sigmoid(
            logits
        ).detach()
        return (
            self.quadratic(x)
            + detached.sum(-1)
            + 0.0 * sum(p.sum() for p in self.features.parameters())
        )


@pytest.mark.parametrize("mutant", [SignInBits, HalfQuadratic, FreeEnergyWithoutBits, Softmax])
def test_broken_distributions_are_caught(mutant: type[FeatureLatentEnergy]) -> None:
    with pytest.raises(AssertionError):
        check_distributions(make(kind=mutant))


@pytest.mark.parametrize(
    "mutant", [SignInBits, HalfQuadratic, FreeEnergyWithoutBits, LiveProbabilities, NoFeatures]
)
def test_broken_gradients_are_caught(mutant: Callable[..., FeatureLatentEnergy]) -> None:
    with pytest.raises(AssertionError):
        check_gradient(make(kind=mutant))  # type: ignore[arg-type]
