"""The flow of particles: symmetry, divergence in the mean-free subspace, integration, flow
matching; and mutants of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.flow_cases import noise
from lib.reseed import problem_generator
from torch import Tensor

from models import particles
from models.recipe import counted
from pyroebm import load, save
from pyroebm.core.rng import seeded_generator, standard_normal, uniform
from pyroebm.core.supports import mean_free_basis
from pyroebm.flows import EquivariantFlow, PairField, importance_sample
from pyroebm.objectives import ForwardKL, ReverseKL, match_flow
from pyroebm.targets import DW4, Gaussian, LennardJones, Particles
from pyroebm.training import fit

F64 = torch.float64
CPU = torch.device("cpu")
SHAPES = [(2, 1), (3, 2), (4, 2), (5, 3)]
shapes = pytest.mark.parametrize(("particles", "space"), SHAPES)


def stirred(flow: EquivariantFlow, seed: int = 5) -> EquivariantFlow:
    with torch.no_grad():
        flow.field.weights += 0.5 * torch.randn(
            flow.field.weights.shape, dtype=F64, generator=problem_generator(seed)
        )
    return flow


def random_flow(
    num_particles: int = 4, space: int = 2, num_steps: int = 60, **options: Any
) -> EquivariantFlow:
    return stirred(
        EquivariantFlow(
            num_particles,
            space,
            num_cells=10,
            num_steps=num_steps,
            dtype=F64,
            **options,
        )
    )


class Frame(Particles):
    """Positions and coordinates, and no energy."""


def moved(frame: Particles, u: Tensor) -> dict[str, Tensor]:
    """The same configurations turned, reflected, renumbered, each row in its own way."""
    x = frame.positions(u)
    turn = torch.linalg.qr(noise(len(x), frame.space, frame.space, seed=1))[0]
    turn = turn * torch.linalg.det(turn).sign()[:, None, None] if frame.space % 2 else turn
    order = noise(len(x), frame.num_particles, seed=2).argsort(1)
    flip = torch.ones(frame.space, dtype=F64)
    flip[0] = -1.0
    return {
        "turned": frame.coordinates(x @ turn),
        "reflected": frame.coordinates(x * flip),
        "renumbered": frame.coordinates(x.gather(1, order.unsqueeze(-1).expand_as(x))),
    }


# --------------------------------------------------------------------------------------------------
# The checks, which the mutants at the end fail


def check_symmetry(flow: EquivariantFlow) -> None:
    frame = Frame(flow.field.num_particles, flow.field.space, dtype=F64)
    u = 1.5 * noise(6, flow.dim)
    images, pushed = moved(frame, u), moved(frame, flow.forward_and_log_prob(u)[0])
    for name, image in images.items():
        torch.testing.assert_close(flow.log_prob(image), flow.log_prob(u), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            flow.forward_and_log_prob(image)[0], pushed[name], rtol=1e-9, atol=1e-9
        )


def check_divergence(field: PairField) -> None:
    """At each half step against the trace of autograd's Jacobian of the velocity in the coordinates
    u."""
    u = 1.5 * noise(4, field.dim)
    for fields in field._in_time():
        moving = field._by_axis(u)

        def velocity(row: Tensor, fields: tuple[Tensor, Tensor] = fields) -> Tensor:
            return field._velocity(row.unsqueeze(0), *fields)[0].flatten()

        jacobian = torch.stack(
            [
                torch.autograd.functional.jacobian(velocity, row).reshape(field.dim, -1)
                for row in moving
            ]
        )
        torch.testing.assert_close(
            field._velocity(moving, *fields)[1], jacobian.diagonal(dim1=1, dim2=2).sum(1)
        )


def check_log_det(flow: EquivariantFlow) -> None:
    """Of the whole flow, integrated finely, against autograd."""
    z = noise(3, flow.dim)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row: flow.forward_and_log_prob(row)[0], row)
            for row in z
        ]
    )
    expected = flow.base.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.forward_and_log_prob(z)[1], expected, rtol=0.0, atol=1e-5)


def integral(flow: EquivariantFlow) -> float:
    """Of two particles on a line: one coordinate."""
    axis = torch.linspace(-20.0, 20.0, 4001, dtype=F64)
    with torch.no_grad():
        return float(flow.log_prob(axis.unsqueeze(1)).exp().sum() * (axis[1] - axis[0]))


def check_features(field: PairField) -> None:
    """The linear map against the velocity that is integrated, at all times that it is integrated
    at, and beyond the reach."""
    u = torch.cat([1.5 * noise(5, field.dim), 30.0 * noise(1, field.dim)])
    for step, fields in enumerate(field._in_time()):
        t = torch.full((len(u),), step / (2 * field.num_steps), dtype=F64)
        linear = (field.features(u, t) * field.weights).sum((-2, -1))
        torch.testing.assert_close(
            linear, field._velocity(field._by_axis(u), *fields)[0].mT.flatten(1)
        )


# --------------------------------------------------------------------------------------------------


@shapes
def test_density_moves_with_turns_reflections_and_renumbering(particles: int, space: int) -> None:
    check_symmetry(random_flow(particles, space, num_steps=6))


@shapes
def test_divergence_is_the_trace_in_the_mean_free_subspace(particles: int, space: int) -> None:
    check_divergence(random_flow(particles, space, num_steps=3).field)


@shapes
def test_log_determinant_is_autograd_s(particles: int, space: int) -> None:
    check_log_det(random_flow(particles, space))


@shapes
def test_velocity_is_linear_in_the_weights(particles: int, space: int) -> None:
    check_features(random_flow(particles, space, num_steps=3).field)


def test_two_particles_on_a_line_integrate_to_one() -> None:
    assert abs(integral(random_flow(2, 1)) - 1.0) < 1e-5


@shapes
def test_doubling_the_steps_shrinks_the_error_of_points_densities_and_the_way_back(
    particles: int, space: int
) -> None:
    """By nearly 16, the splines' kinks apart; and to the stated bounds at 60 steps."""
    flow = random_flow(particles, space)
    z = noise(20, flow.dim)
    flow.num_steps = 480
    with torch.no_grad():
        x, log_q = flow.forward_and_log_prob(z)
        wrong = {}
        for steps in (30, 60):
            flow.num_steps = steps
            there, density = flow.forward_and_log_prob(z)
            back = flow.transform.inv(there)
            wrong[steps] = [
                (a - b).abs().reshape(len(z), -1).amax(1)
                for a, b in ((there, x), (density, log_q), (back, z))
            ]
    for coarse, fine, bound in zip(wrong[30], wrong[60], (1e-5, 1e-4, 1e-5), strict=True):
        assert float(fine.max()) < bound
        # a row that meets a kink gains less
        assert float(fine.median()) < float(coarse.median()) / 4.0


def test_coordinates_are_those_of_the_targets_and_the_mean_stays() -> None:
    for target in (DW4(dtype=F64), LennardJones("once", num_particles=5, dtype=F64)):
        basis = mean_free_basis(target.num_particles, F64)
        assert torch.equal(target.basis, basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(target.num_particles - 1, dtype=F64))
        flow = random_flow(target.num_particles, target.space, num_steps=4)
        u = noise(3, flow.dim)
        x = target.positions(u)
        r = target.positions(u)[:, 0] - x[:, -1]
        torch.testing.assert_close(
            (u.reshape(3, -1, target.space).mT @ flow.field.incidence[target.num_particles - 2]), r
        )


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_fresh_flow_is_the_base_scaled(scale: float) -> None:
    flow = EquivariantFlow(3, 2, scale=scale, dtype=F64)
    z = noise(5, 4)
    x, log_q = flow.forward_and_log_prob(z)
    torch.testing.assert_close(x, scale * z, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        log_q, flow.base.log_prob(z) - 4.0 * math.log(scale), rtol=1e-6, atol=1e-9
    )


def test_beyond_the_reach_nothing_moves_but_by_the_pull_and_particles_may_meet() -> None:
    flow = random_flow(3, 2, num_steps=4, reach=2.0)
    with torch.no_grad():
        flow.field.weights[:, 0] = 0.0
    far = 50.0 * torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=F64)
    assert torch.equal(flow.forward_and_log_prob(far)[0], far)
    met = torch.zeros(1, 4, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(flow.log_prob(met).sum(), met)
    assert bool((grad == 0.0).all())


def test_gradients_reach_the_weights_from_both_sides_and_the_path() -> None:
    flow = random_flow(3, 2, num_steps=6)
    energy = Gaussian(torch.zeros(4, dtype=F64), dtype=F64)
    for objective in (
        ReverseKL(energy, 64),
        ReverseKL(energy, 64, gradient="total"),
        ForwardKL(noise(50, 4), num_samples=64),
        ForwardKL(noise(50, 4), energy=energy, num_samples=64, gradient="path"),
    ):
        flow.zero_grad()
        objective(flow, generator=seeded_generator(1))[0].backward()
        grad = flow.field.weights.grad
        assert grad is not None
        assert bool(torch.isfinite(grad).all())
        assert bool((grad.abs().sum(1) > 0).all())  # at all times


def test_gradient_of_the_likelihood_is_that_of_differences() -> None:
    flow, x = random_flow(3, 2, num_steps=6), noise(4, 4)
    (grad,) = torch.autograd.grad(flow.log_prob(x).sum(), flow.field.weights)
    direction, h = noise(*flow.field.weights.shape, seed=3), 1e-5
    values = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            flow.field.weights += sign * h * direction
            values.append(flow.log_prob(x).sum())
            flow.field.weights -= sign * h * direction
    torch.testing.assert_close(
        (grad * direction).sum(), (values[0] - values[1]) / (2.0 * h), rtol=1e-6, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------
# Flow matching


def matched(scale: float = 2.0, match: Callable[..., float] = match_flow) -> EquivariantFlow:
    """Fitted to a normal distribution of another scale, which the pull alone can reach: a(t) of the
    path is known."""
    flow = EquivariantFlow(3, 2, num_cells=6, dtype=F64)
    match(flow, scale * noise(20_000, 4), num_pairs=40_000, ridge=1e-8)
    return flow


def check_matched(flow: EquivariantFlow, scale: float = 2.0) -> None:
    r"""From N(0, 1) to N(0, scale^2) paired at random, :math:`\dot u = u (t s^2 - 1 + t) / (t^2 s^2
    + (1 - t)^2)`."""
    u, t = noise(400, 4, seed=9), torch.linspace(0.05, 0.95, 400, dtype=F64)
    spread = (t * scale) ** 2 + (1.0 - t) ** 2
    u = u * spread.sqrt().unsqueeze(1)
    velocity = (flow.field.features(u, t) * flow.field.weights).sum((-2, -1)).detach()
    expected = u * ((t * scale**2 - (1.0 - t)) / spread).unsqueeze(1)
    assert float((velocity - expected).square().mean()) < 0.005 * float(expected.square().mean())
    result = importance_sample(
        flow, Gaussian(torch.zeros(4, dtype=F64), scale=scale, dtype=F64), 4000
    )
    assert result.ess_fraction > 0.95
    within_se(
        result.log_z.value, 2.0 * math.log(2.0 * math.pi * scale**2), result.log_z.standard_error
    )


def test_matching_finds_the_known_velocity_and_distribution() -> None:
    check_matched(matched())


def test_matching_solves_the_normal_equations_and_says_what_it_explains() -> None:
    flow, draws = (
        EquivariantFlow(4, 2, reach=12.0, length=2.0, num_cells=8, dtype=F64),
        2.0 * noise(300, 6),
    )
    explained = match_flow(
        flow,
        draws,
        num_pairs=1100,
        ridge=1e-9,
        generator=seeded_generator(3),
    )
    generator = seeded_generator(3)
    residuals = []
    targets = []
    gradients = []
    for n in (500, 500, 100):  # the same numbers, in the same order
        chosen = (uniform((n,), generator, F64, CPU) * len(draws)).long()
        u, z = draws[chosen], standard_normal((n, 6), generator, F64, CPU)
        t = uniform((n,), generator, F64, CPU)
        features = flow.field.features((1.0 - t[:, None]) * z + t[:, None] * u, t)
        residual = (features * flow.field.weights.detach()).sum((-2, -1)) - (u - z)
        residuals.append(residual.square().sum())
        targets.append((u - z).square().sum())
        gradients.append(torch.einsum("rd,rdqm->qm", residual, features))
    assert float(sum(gradients).abs().max()) < 1e-4 * float(sum(targets))  # type: ignore[union-attr, arg-type]
    assert abs(explained - 1.0 + float(sum(residuals) / sum(targets))) < 1e-6
    again = EquivariantFlow(4, 2, reach=12.0, length=2.0, num_cells=8, dtype=F64)
    match_flow(again, draws, num_pairs=1100, ridge=1e-9, generator=seeded_generator(3))
    assert torch.equal(again.field.weights, flow.field.weights)
    assert again.field.weights.requires_grad


def test_two_particles_in_a_well_are_matched_refined_and_weighed() -> None:
    """A pair has one distance, which the flow can match; log Z by quadrature over it."""
    energy = LennardJones("once", num_particles=2, dtype=F64)
    r = torch.linspace(1e-3, 12.0, 200_001, dtype=F64)[1:]
    exact = math.log(
        float(
            (4.0 * math.pi * r**2 * torch.exp(-(r**-12 - 2.0 * r**-6) - 0.5 * r**2)).sum()
            * (r[1] - r[0])
        )
    )
    # u has the length of the difference over sqrt 2, in k = 3 dimensions, and the springs are 0.5
    # |u|^2 = 0.25 r^2
    weight = torch.exp(-(r**-12 - 2.0 * r**-6) - 0.25 * r**2) * r**2
    exact = math.log(float(4.0 * math.pi * weight.sum() * (r[1] - r[0]) * 2.0**-1.5))
    generator = seeded_generator(0)
    chosen = torch.multinomial(weight[::20], 4000, replacement=True, generator=generator)
    direction = torch.nn.functional.normalize(noise(4000, 3), dim=1)
    draws = r[::20][chosen].unsqueeze(1) * direction / math.sqrt(2.0)
    flow = EquivariantFlow(2, 3, num_cells=24, num_steps=20, dtype=F64)
    match_flow(flow, draws)
    before = importance_sample(flow, energy, 4000)
    fit(flow, ForwardKL(draws, num_samples=128), num_steps=40, lr=1e-2)
    after = importance_sample(flow, energy, 4000)
    assert after.ess_fraction > max(before.ess_fraction, 0.9)
    for result in (before, after):
        within_se(result.log_z.value, exact, result.log_z.standard_error)


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_particles": 1},
            "num_particles must be an integer of at least 2, got num_particles=1",
        ),
        ({"space": 0}, "space=0"),
        ({"num_cells": 0}, "num_cells=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"reach": 0.0}, r"reach must be positive and finite, got reach=0\.0"),
        ({"length": math.inf}, "length=inf"),
        ({"scale": -1.0}, r"scale=-1\.0"),
    ],
)
def test_flow_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EquivariantFlow(**{"num_particles": 3, "space": 2} | options)


def test_steps_and_matching_refuse(tmp_path: Path) -> None:
    flow = EquivariantFlow(3, 2, dtype=F64)
    with pytest.raises(ValueError, match="num_steps=0"):
        flow.num_steps = 0
    flow.num_steps = 7
    save(flow, tmp_path / "flow")
    assert load(tmp_path / "flow").num_steps == flow.field.num_steps == 7
    for draws, said in (
        (noise(5, 3), r"shape \(n, 4\) .* got shape \(5, 3\)"),
        (noise(5, 4).float(), "torch.float32"),
        (noise(0, 4), r"got shape \(0, 4\)"),
        (noise(5, 4) * math.nan, "draws must be finite, got 20 entries"),
    ):
        with pytest.raises(ValueError, match=said):
            match_flow(flow, draws)
    with pytest.raises(ValueError, match=r"ridge must be positive and finite, got ridge=0\.0"):
        match_flow(flow, noise(5, 4), ridge=0.0)
    with pytest.raises(ValueError, match="num_pairs=0"):
        match_flow(flow, noise(5, 4), num_pairs=0)


# --------------------------------------------------------------------------------------------------
# Mutants


class _NoSlope(PairField):
    """Forgets how phi changes along the pair."""

    def _velocity(self, u: Tensor, pull: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        velocity, _ = super()._velocity(u, pull, table)
        at = self._pairs(u)[2]
        cell = at.detach().long().clamp(0, len(table) - 1)
        phi = (table[cell] * (at - cell).unsqueeze(-1) ** torch.arange(4)).sum(-1)
        return velocity, self.dim * pull + 2.0 * self.space * phi.sum(-1)


class _WholeSpace(PairField):
    """The trace over all n k directions."""

    def _velocity(self, u: Tensor, pull: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        velocity, divergence = super()._velocity(u, pull, table)
        return velocity, divergence + self.space * pull


class _EachPairOnce(PairField):
    """Half of the sum over pairs."""

    def _velocity(self, u: Tensor, pull: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        velocity, divergence = super()._velocity(u, pull, table)
        return velocity, 0.5 * (divergence + self.dim * pull)


class _Numbered(PairField):
    """The first particle is special."""

    def _pairs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, squared, at = super()._pairs(u)
        return r, squared, at * torch.linspace(1.0, 0.8, at.shape[-1], dtype=at.dtype)


class _Tilted(PairField):
    """One axis counts for less in the distance."""

    def _pairs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, _, _ = super()._pairs(u)
        squared = (r * torch.tensor([1.0, 0.8], dtype=r.dtype).view(2, 1)).square().sum(1)
        return r, squared, torch.log1p(squared / self.length**2) / self.width


def mutated(
    mutant: type[PairField], num_particles: int = 4, space: int = 2, num_steps: int = 60
) -> EquivariantFlow:
    flow = random_flow(num_particles, space, num_steps)
    flow.field.__class__ = mutant
    return flow


@pytest.mark.parametrize("mutant", [_NoSlope, _WholeSpace, _EachPairOnce])
def test_mutants_of_the_divergence_are_caught(mutant: type[PairField]) -> None:
    for check in (
        lambda: check_divergence(mutated(mutant, num_steps=3).field),
        lambda: check_log_det(mutated(mutant)),
    ):
        with pytest.raises(AssertionError, match="not close"):
            check()
    assert abs(integral(mutated(mutant, 2, 1)) - 1.0) > 1e-3


@pytest.mark.parametrize("mutant", [_Numbered, _Tilted])
def test_mutants_of_the_symmetry_are_caught(mutant: type[PairField]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_symmetry(mutated(mutant, num_steps=4))


def test_mutants_of_the_linear_map_and_of_matching_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unscaled(field: PairField, u: Tensor, t: Tensor) -> Tensor:
        features = PairField.features(field, u, t).clone()
        features[..., 1:] *= field.num_particles
        return features

    field = random_flow(num_steps=3).field
    field.features = unscaled.__get__(field)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not close"):
        check_features(field)
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda a, b, t: lerp(b, a, t))  # time runs the wrong way
    flow = matched()
    with pytest.raises(AssertionError):
        check_matched(flow)


# --------------------------------------------------------------------------------------------------
# What the recipe of particles is made of


def test_moved_rows_keep_their_energy_and_have_the_uniform_distribution_of_turns() -> None:
    energy = DW4(dtype=F64)
    u = energy.initial(1, seeded_generator(0)).expand(20_000, -1)
    images = particles.moved(energy, u, seeded_generator(1))
    torch.testing.assert_close(energy(images), energy(u), rtol=1e-9, atol=1e-9)
    x = energy.positions(images)
    within_se(*_with_mean(x[:, 0], torch.zeros(2, dtype=F64)))  # any particle, any direction
    second = x[:, 0].unsqueeze(2) * x[:, 0].unsqueeze(1)
    expected = energy.positions(u[0]).square().sum() / 8.0 * torch.eye(2, dtype=F64)
    within_se(*_with_mean(second, expected))
    fourth = x[:, 0, 0] ** 4 - 3.0 * (x[:, 0, 0] * x[:, 0, 1]) ** 2  # of a direction: 3/8 and 1/8
    within_se(*_with_mean(fourth, torch.zeros((), dtype=F64)))


def _with_mean(values: Tensor, truth: Tensor) -> tuple[Any, Tensor, Any]:
    mean, se = mean_and_se(values)
    return mean, truth, se


def test_rows_asked_of_an_energy_are_counted() -> None:
    energy = DW4(dtype=F64)
    with counted(energy) as rows:
        energy(noise(3, 5, 6))
        (2.0 * energy)(noise(7, 6))
    energy(noise(2, 6))
    assert rows[0] == 22


def test_a_case_is_judged_by_chains_that_it_has_not_seen() -> None:
    done = particles.case("DW4", seed=1, quick=True)
    found = done.reference
    assert found.draws.shape == (8, 12, 6)
    # chains, temperatures, gradients of a step, steps
    assert done.evaluations > 8 * 5 * 11 * (8 + 12 * 5)
    assert set(done.flow.state_dict()) == set(done.matched.state_dict())
    assert not torch.equal(done.flow.field.weights, done.matched.field.weights)
    judgement = particles.evaluate(done, quick=True)
    assert judgement.report.forward_ess is not None
    assert done.flow.num_steps == 10
    for which in (0, 1):
        half = [found.half(0), found.half(1)]
        half[which] = half[which].flip(-1)
        other = particles.evaluate(
            dataclasses.replace(done, reference=dataclasses.replace(found, draws=torch.cat(half))),
            quick=True,
        )
        assert (other.report.eubo == judgement.report.eubo) is (which == 0)
        assert (other.bridge.value == judgement.bridge.value) is (which == 0)
    with pytest.raises(KeyError, match="LJ55"):
        particles.case("LJ55")


def test_chains_obey_steins_identity_and_ways_to_log_z_agree() -> None:
    """Of chains long enough to have mixed, and of a flow whose integrator is near its limit: errors
    see neither."""
    system = particles.SYSTEMS["DW4"]
    found = particles.reference(system, 1, num_chains=64, num_samples=20, warmup_steps=60)
    within_se(found.stein.value, 6.0, found.stein.standard_error)
    assert max(found.r_hat.values()) < 1.2
    flow = EquivariantFlow(4, 2, dtype=F64, **system.flow)
    match_flow(flow, found.half(0).flatten(0, 1), 8000, generator=torch.Generator().manual_seed(1))
    flow.num_steps = 120
    judgement = particles.evaluate(
        particles.Case("DW4", 1, system.make(), found, flow, flow, [], 0, 0.0)
    )
    assert judgement.integration < 0.5
    error = math.hypot(judgement.bridge.standard_error, judgement.smc.standard_error)
    within_se(judgement.bridge.value, judgement.smc.value, error)
