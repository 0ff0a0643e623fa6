"""Classifiers as energies, and their hybrid objective: an exact mixture, gradients by quadrature,
mutants that must be caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import flat_grad, seeded
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyroebm import MCMC, NUTS, Energy
from pyroebm.energies import ClassifierEnergy
from pyroebm.kernels import MALA
from pyroebm.nn import convolutions, mlp
from pyroebm.objectives import (
    ContrastiveDivergence,
    Hybrid,
    Objective,
    ReplayBufferCD,
    SlicedScoreMatching,
)
from pyroebm.partition import quadrature
from pyroebm.training import fit, fit_steps

F64 = torch.float64
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)


def mixture_energy(kind: type[ClassifierEnergy] = ClassifierEnergy) -> ClassifierEnergy:
    """Logits -|x - mu_y|^2 / 2 + log pi_y, their square in the envelope: an exact mixture of normal
    distributions."""
    net = nn.Linear(2, 3, dtype=F64)
    with torch.no_grad():
        net.weight.copy_(MEANS)
        net.bias.copy_(WEIGHTS.log() - 0.5 * (MEANS**2).sum(1))
    return kind(net, (2,), 3, scale=1.0)


def deep_energy(shape: tuple[int, ...] = (2,), dtype: torch.dtype = F64) -> ClassifierEnergy:
    noise, entries = seeded(7), math.prod(shape)
    if len(shape) == 3:
        net: nn.Module = convolutions(
            shape, 3, (3, 4), zero_last=False, dtype=dtype, generator=noise
        )
    else:
        layers = mlp(entries, 3, (8,), zero_last=False, dtype=dtype, generator=noise)
        net = layers if shape else nn.Sequential(nn.Unflatten(0, (-1, 1)), layers)
    return ClassifierEnergy(net, shape, 3, scale=1.0)


def mixture_draws(n: int, seed: int) -> tuple[Tensor, Tensor]:
    y = torch.multinomial(WEIGHTS, n, replacement=True, generator=seeded(seed))
    return MEANS[y] + torch.randn(n, 2, dtype=F64, generator=seeded(seed + 1)), y


AXIS = torch.linspace(-9.0, 9.0, 181, dtype=F64)
GRID = torch.cartesian_prod(AXIS, AXIS)
CELL = float(AXIS[1] - AXIS[0]) ** 2


class ExactOnGrid(Objective):
    """Minus the mean log-likelihood, with log Z of each row's energy by the trapezoid rule."""

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        data = energy(batch)
        log_z = torch.logsumexp(-energy(GRID.expand(len(batch), *GRID.shape)), 1) + math.log(CELL)
        return (data + log_z).mean(), {"energy_data": data.mean().detach()}


def exact_grads(energy: ClassifierEnergy, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of minus the mean log-likelihoods, from the logits and the envelope alone."""
    logits, grid = energy.net(x), energy.net(GRID) - 0.5 * (GRID**2).sum(1, keepdim=True)
    log_z = torch.logsumexp(grid, 0) + math.log(CELL)  # of each class
    own = logits.gather(1, y[:, None])[:, 0] - 0.5 * (x**2).sum(1)
    joint = (torch.logsumexp(log_z, 0) - own).mean()
    classes = nn.functional.cross_entropy(logits, y)
    found = {
        "joint": joint,
        "marginal": joint - classes,
        "classes": classes,
    }
    return {name: flat_grad(energy, loss) for name, loss in found.items()}


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def check_mixture(energy: ClassifierEnergy) -> None:
    """Every distribution of the energy against the mixture's own."""
    x = 2.0 * torch.randn(20, 2, dtype=F64, generator=seeded(0))
    parts = MultivariateNormal(MEANS, torch.eye(2, dtype=F64))
    mixture, each = MixtureSameFamily(Categorical(WEIGHTS), parts), parts.log_prob(x[:, None])
    log_z = math.log(2.0 * math.pi)
    torch.testing.assert_close(-energy(x) - log_z, mixture.log_prob(x))
    torch.testing.assert_close(energy.class_log_prob(x), torch.log_softmax(each + WEIGHTS.log(), 1))
    assert quadrature(energy).value == pytest.approx(log_z, abs=1e-8)
    for y in range(3):
        label = torch.full((20,), y)
        torch.testing.assert_close(-energy.given(y)(x) - WEIGHTS[y].log() - log_z, each[:, y])
        torch.testing.assert_close(energy.joint_energy(x, label), energy.given(label)(x))
        torch.testing.assert_close(
            -energy.joint_energy(x, label), energy.class_log_prob(x)[:, y] - energy(x)
        )


def check_gradient(kind: type[Hybrid]) -> None:
    """With an exact generative term the gradient is that of the likelihood of pairs, by
    quadrature."""
    energy = deep_energy()
    x, y = mixture_draws(12, 3)
    loss, _ = kind(ExactOnGrid())(energy, (x, y))
    torch.testing.assert_close(
        flat_grad(energy, loss), exact_grads(energy, x, y)["joint"], rtol=1e-9, atol=1e-9
    )


def check_sampled(make: Callable[[], Hybrid], burn: int) -> None:
    """With chains that have converged the mean gradient is the exact one."""
    energy = mixture_energy()
    with torch.no_grad():
        energy.net.bias.add_(torch.tensor([0.3, 0.0, -0.3], dtype=F64))
    x, y = mixture_draws(40, 9)
    truth, gradients = exact_grads(energy, x, y)["joint"], []
    rows = (x.repeat(10, 1), y.repeat(10))
    for run in range(30):
        objective, noise = make(), seeded(50 + run)
        for _ in range(burn):
            objective(energy, rows, generator=noise)
        gradients.append(flat_grad(energy, objective(energy, rows, generator=noise)[0]))
    mean, se = mean_and_se(torch.stack(gradients))
    within_se(mean, truth, se, what="the gradient of the pairs")


# --------------------------------------------------------------------------------------------------
# The energy


def test_the_logits_of_a_mixture_are_its_energy() -> None:
    check_mixture(mixture_energy())


def test_the_classes_share_the_integral() -> None:
    energy = deep_energy()
    parts = torch.tensor([quadrature(energy.given(y)).value for y in range(3)], dtype=F64)
    assert float(torch.logsumexp(parts, 0)) == pytest.approx(quadrature(energy).value, abs=1e-7)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shapes_and_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    energy = deep_energy(shape, dtype)
    x = torch.randn(4, 5, *shape, dtype=dtype, generator=seeded(1))
    y = torch.randint(3, (4, 5), generator=seeded(2))
    assert energy(x).shape == energy.joint_energy(x, y).shape == (4, 5)
    assert energy(x).dtype == energy.class_log_prob(x).dtype == dtype
    assert energy.class_log_prob(x).shape == (4, 5, 3)
    torch.testing.assert_close(
        energy.given(y[:, 0])(x)[:, 0], energy.joint_energy(x[:, 0], y[:, 0])
    )
    torch.testing.assert_close(energy(x)[2, 3], energy(x[2, 3]))
    assert energy.given(1).initial(6, seeded(0)).shape == (6, *shape)


def test_draws_of_a_class() -> None:
    """NUTS on given(y) draws the class's normal distribution."""
    mcmc = MCMC(NUTS(), num_samples=200, warmup_steps=200, num_chains=32, seed=1)
    mcmc.run(mixture_energy().given(1))
    means = mcmc.get_samples(group_by_chain=True)["x"].mean(1)
    mean, se = mean_and_se(means)
    within_se(mean, MEANS[1], se)


def test_rows_keep_to_themselves() -> None:
    energy, x = deep_energy(), torch.randn(6, 2, dtype=F64, generator=seeded(4))
    spoiled = x.clone()
    spoiled[2] = torch.nan
    for distribution in (
        energy,
        energy.given(torch.tensor([0, 1, 2, 0, 1, 2])),
        energy.class_log_prob,
    ):
        clean, dirty = distribution(x), distribution(spoiled)
        assert bool(dirty[2].isnan().all())
        keep = [0, 1, 3, 4, 5]
        assert torch.equal(clean[keep], dirty[keep])


def test_a_classifier_that_is_no_density_says_so() -> None:
    with pytest.warns(UserWarning, match="give scale"):
        ClassifierEnergy(nn.Linear(2, 3), (2,), 3)
    with pytest.warns(UserWarning, match="batch normalization"):
        ClassifierEnergy(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), (2,), 3, scale=1.0)
    with pytest.warns(UserWarning, match="piecewise linear"):
        ClassifierEnergy(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (2,), 3, scale=1.0)


def test_bad_input_is_named() -> None:
    energy, x = mixture_energy(), torch.zeros(4, 2, dtype=F64)
    with pytest.raises(
        ValueError, match="num_classes must be an integer of at least 1, got num_classes=0"
    ):
        ClassifierEnergy(nn.Linear(2, 3), (2,), 0, scale=1.0)
    with pytest.raises(
        ValueError, match=r"net must map .* to \(n, num_classes\), got shape \(4, 3\)"
    ):
        ClassifierEnergy(energy.net, (2,), 4, scale=1.0)(x)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\), got 0 to 3"):
        energy.joint_energy(x, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="y must be int64 classes"):
        energy.joint_energy(x, torch.zeros(4))
    with pytest.raises(ValueError, match="one class or one for each chain"):
        energy.given(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one chain for each of 3 classes"):
        energy.given(torch.tensor([0, 1, 2]))(x)


# --------------------------------------------------------------------------------------------------
# The objective


def test_the_gradient_is_that_of_the_likelihood() -> None:
    check_gradient(Hybrid)


def test_persistent_chains_have_the_exact_gradient() -> None:
    check_sampled(lambda: Hybrid(ReplayBufferCD(400, k=4, kernel=MALA(1.2))), burn=15)


def test_differences_of_energies_keep_each_row_s_class() -> None:
    energy, (x, y) = deep_energy(), mixture_draws(6, 0)
    exact, near = (
        SlicedScoreMatching(3, finite_difference=step)(energy.given(y), x, generator=seeded(0))[0]
        for step in (None, 1e-4)
    )
    torch.testing.assert_close(near, exact, rtol=0.0, atol=1e-5)


def test_without_a_generative_term_it_is_the_cross_entropy() -> None:
    energy, (x, y) = deep_energy(), mixture_draws(12, 3)
    loss, metrics = Hybrid()(energy, (x, y))
    torch.testing.assert_close(flat_grad(energy, loss), exact_grads(energy, x, y)["classes"])
    assert set(metrics) == {"class_nll", "accuracy", "energy_data"}
    assert float(metrics["accuracy"]) == float((energy.net(x).argmax(1) == y).double().mean())


def test_the_weight_is_of_the_generative_term() -> None:
    energy, (x, y) = deep_energy(), mixture_draws(12, 3)
    grads = exact_grads(energy, x, y)
    loss, _ = Hybrid(ExactOnGrid(), weight=0.1)(energy, (x, y))
    torch.testing.assert_close(
        flat_grad(energy, loss), grads["classes"] + 0.1 * grads["marginal"], rtol=1e-9, atol=1e-9
    )


OBJECTIVES: dict[str, Callable[[], Hybrid]] = {
    "classifier": lambda: Hybrid(),
    "joint": lambda: Hybrid(ReplayBufferCD(8, k=2)),
    "short chains": lambda: Hybrid(ContrastiveDivergence(2), weight=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    energy = deep_energy(shape, dtype)
    batch = (
        torch.randn(6, *shape, dtype=dtype, generator=seeded(1)),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    losses = [OBJECTIVES[name]()(energy, batch, generator=seeded(5)) for _ in range(2)]
    assert torch.equal(losses[0][0], losses[1][0])
    assert losses[0][0].dtype == dtype
    assert losses[0][0].shape == ()
    assert all(p.grad is None for p in energy.parameters())
    assert "energy_data" in losses[0][1]
    assert not any(fact.requires_grad for fact in losses[0][1].values())
    losses[0][0].backward()
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in energy.parameters()
    )
    spoiled = batch[0].clone()
    spoiled[1] = torch.nan
    with pytest.raises((ValueError, FloatingPointError), match=r"nan|finite"):
        fit(
            energy,
            OBJECTIVES[name](),
            (spoiled, batch[1]),
            num_steps=1,
            batch_size=6,
            progress=False,
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    data, file = mixture_draws(60, 1), tmp_path / "training"

    def train(until: int, **options: object) -> ClassifierEnergy:
        energy = deep_energy()
        loop = fit_steps(
            energy,
            OBJECTIVES[name](),
            data,
            num_steps=12,
            batch_size=20,
            seed=3,
            progress=False,
            **options,
        )  # type: ignore[arg-type]
        for step in loop:
            if step.number == until:
                break
        loop.close()  # type: ignore[attr-defined]
        return energy

    whole = train(11)
    train(5, checkpoint=file)
    resumed = train(11, checkpoint=file, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    objective, other = OBJECTIVES[name](), OBJECTIVES[name]()
    objective(whole, data, generator=seeded(0))
    other.load_state_dict(objective.state_dict())
    losses = [one(whole, data, generator=seeded(1))[0] for one in (objective, other)]
    assert torch.equal(*losses)


def test_a_mixture_is_learned() -> None:
    """From zero logits to within 5 standard errors of the best likelihood of a pair, log p(x,
    y)."""
    energy = mixture_energy()
    nn.init.zeros_(energy.net.weight)
    nn.init.zeros_(energy.net.bias)
    objective = Hybrid(ReplayBufferCD(500, k=5, kernel=MALA(1.2)))
    data = mixture_draws(3000, 20)
    fit(energy, objective, data, num_steps=400, batch_size=300, lr=0.03, progress=False)
    x, y = mixture_draws(4000, 30)
    truth = WEIGHTS.log()[y] + MultivariateNormal(MEANS[y], torch.eye(2, dtype=F64)).log_prob(x)
    found = -energy.joint_energy(x, y).detach() - quadrature(energy).value
    mean, se = mean_and_se(truth - found)
    within_se(mean, 0.0, se, what="nats below the truth")


def test_what_does_not_fit_is_refused() -> None:
    energy, (x, y) = mixture_energy(), mixture_draws(4, 0)
    for arguments, message in (
        ({"weight": 0.0}, "weight must be positive and finite, got weight=0.0"),
        ({"generative": 3}, "generative must be an Objective or None, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            Hybrid(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a pair of events and classes"):
        Hybrid()(energy, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a ClassifierEnergy"):
        Hybrid()(energy.given(0), (x, y))
    with pytest.raises(ValueError, match="y must be int64"):
        Hybrid()(energy, (x, y.double()))
    with pytest.raises(ValueError, match="dtype"):
        Hybrid()(energy, (x.float(), y))


# --------------------------------------------------------------------------------------------------
# Mutants


class NoEnvelope(ClassifierEnergy):
    def unchecked_joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        return super().unchecked_joint_energy(x, y) - self.envelope(x)


class BestClass(ClassifierEnergy):
    def forward(self, x: Tensor) -> Tensor:
        return self.envelope(x) - self.logits(x).amax(-1)


class WrongSign(ClassifierEnergy):
    def forward(self, x: Tensor) -> Tensor:
        return self.envelope(x) + torch.logsumexp(self.logits(x), -1)


class EnvelopeInClasses(ClassifierEnergy):
    def class_log_prob(self, x: Tensor) -> Tensor:
        return self.logits(x) + self(x).unsqueeze(-1)


@pytest.mark.parametrize("mutant", [NoEnvelope, BestClass, WrongSign, EnvelopeInClasses])
def test_broken_energies_are_caught(mutant: type[ClassifierEnergy]) -> None:
    with pytest.raises(AssertionError):
        check_mixture(mixture_energy(mutant))


class Wrapped(Hybrid):
    """A mutant differs in what it makes of the two terms."""

    def generative_loss(self, energy: Energy, x: Tensor, y: Tensor) -> Tensor:
        assert self.generative is not None
        return self.generative(energy, x)[0]

    def combine(self, classes: Tensor, generative: Tensor) -> Tensor:
        return classes + generative

    def forward(
        self,
        energy: Energy,
        batch: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(energy, ClassifierEnergy)
        x, y = batch
        classes = -energy.class_log_prob(x).gather(1, y[:, None]).mean()
        return self.combine(classes, self.generative_loss(energy, x, y)), {}


class ClassesTwice(Wrapped):
    def combine(self, classes: Tensor, generative: Tensor) -> Tensor:
        return 2.0 * classes + generative


class OfEachClass(Wrapped):
    def generative_loss(self, energy: Energy, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(energy, ClassifierEnergy)
        return super().generative_loss(energy.given(y), x, y)


class Descending(Wrapped):
    def combine(self, classes: Tensor, generative: Tensor) -> Tensor:
        return classes - generative


def test_broken_objectives_are_caught() -> None:
    check_gradient(Wrapped)  # unbroken
    for mutant in (ClassesTwice, OfEachClass, Descending):
        with pytest.raises(AssertionError):
            check_gradient(mutant)
