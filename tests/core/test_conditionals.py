"""Conditionals of sites and blocks, through every energy that is made of others: they are those of
its energies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lib.checks import within_se
from lib.discrete_cases import Bipartite
from torch import Tensor

import pyroebm.core.annealing_path
import pyroebm.core.energy
from pyroebm import Energy, Gibbs, ParallelTempering, partition
from pyroebm.core import Conditioned, GeometricPath
from pyroebm.core.conditionals import blocks_of, conditional_of
from pyroebm.core.supports import to_support
from pyroebm.core.wrappers import Unconstrained, unconstrain
from pyroebm.energies import BernoulliRBM, Ising, Potts
from pyroebm.kernels import BlockGibbs
from pyroebm.partition.kernel_path import default_kernel
from pyroebm.targets import BernoulliProduct, DoubleWell, Exponential
from pyroebm.training.imputation import Clamped

F64 = torch.float64
ROWS = 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ising(coupling: float = 0.3) -> Ising:
    return Ising((4, 4), coupling, torch.linspace(-1, 1, 16).reshape(4, 4), dtype=F64)


def potts() -> Potts:
    return Potts((4,), 3, 0.8, torch.tensor([0.1, 0.2, -0.4]), dtype=F64)


def joint() -> Energy:
    weight = torch.randn(4, 3, generator=seeded(1), dtype=F64)
    return BernoulliRBM(4, 3, weight=weight, dtype=F64).joint().requires_grad_(False)


def base(energy: Energy) -> Energy:
    """Sites of unlike probabilities."""
    found = partition.base_rates(energy, energy.initial(30, seeded(2)))
    assert isinstance(found, Energy)
    return found


def some_rows(energy: Energy) -> Tensor:
    return energy.initial(ROWS, seeded(3))


BETAS = torch.linspace(0.0, 1.0, ROWS, dtype=F64)
MADE: dict[str, Callable[[], Energy]] = {
    "tempered": lambda: 0.3 * ising(),
    "tempered twice": lambda: 0.5 * (0.5 * potts()),
    "tempered layers": lambda: 0.4 * joint(),
    "sum": lambda: ising() + 2 * ising(-0.1),
    "path": lambda: GeometricPath(ising(), 0.3, base(ising())),
    "path of rows": lambda: GeometricPath(potts(), BETAS, base(potts())),
    "path without a reference": lambda: GeometricPath(potts(), BETAS),
    "path of two": lambda: GeometricPath(joint(), 0.7, 0.1 * joint()),
    "path of a tempered energy": lambda: GeometricPath(0.5 * ising(), BETAS, base(ising())),
    "path of layers": lambda: GeometricPath(
        joint(), BETAS, partition.bases.IndependentLayers(partition.base_rates(joint()), joint())
    ),
    "conditioned": lambda: Conditioned(
        ising(), ising().initial(1, seeded(4))[0], torch.arange(16).reshape(4, 4) % 5 == 0
    ),
    "conditioned layers": lambda: Conditioned(
        0.5 * joint(), torch.ones(7, dtype=F64), torch.arange(7) < 4
    ),
    "clamped": lambda: Clamped(
        ising(), some_rows(ising()), (torch.arange(16).reshape(4, 4) % 5 == 0).expand(ROWS, 4, 4)
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_conditionals_of_sites_are_those_of_the_energy(name: str) -> None:
    energy = MADE[name]()
    x = some_rows(energy)
    width = 3 if "potts" in repr(energy).lower() else 1
    for site in range(x[0].numel() // width):
        at = torch.full((ROWS,), site)
        torch.testing.assert_close(
            energy.site_logits(x, at).log_softmax(1),
            Energy.site_logits(energy, x, at).log_softmax(1),
        )


# the density over known entries of a clamped energy is not that of its draws
@pytest.mark.parametrize("name", [name for name in MADE if name != "clamped"])
def test_conditionals_of_blocks_are_those_of_the_energy(name: str) -> None:
    energy = MADE[name]()
    x, blocks = some_rows(energy), blocks_of(energy)
    assert blocks
    for block, index in blocks.items():
        given = conditional_of(energy, block, x)
        new = given.sample()
        old = x.flatten(1)[:, index].reshape(new.shape)
        moved = x.flatten(1).clone()
        moved[:, index] = new.flatten(1)
        gained = energy(x) - energy(moved.reshape(x.shape))
        torch.testing.assert_close(given.log_prob(new) - given.log_prob(old), gained)


def test_blocks_that_differ_are_none_in_common() -> None:
    lines = Bipartite("spins")
    lines.blocks = {"first": slice(0, 2), "second": slice(2, 6)}
    for both in (lines + Bipartite("spins"), GeometricPath(lines, 0.5, Bipartite("spins"))):
        assert not blocks_of(both)
    assert not blocks_of(BernoulliProduct([1.0, 2.0]) * 0.5)
    assert not blocks_of(0.5 * Ising((3, 3)))  # two colors do not suffice
    with pytest.raises(
        ValueError, match=r"block must be one of \['even', 'odd'\], got block='red'"
    ):
        conditional_of(0.5 * ising(), "red", some_rows(ising()))
    triangles = 0.5 * Ising((3, 3))
    x = triangles.initial(2)
    with pytest.raises(ValueError, match="BlockGibbs requires an energy with an attribute blocks"):
        BlockGibbs().init(triangles, x)


def test_blocks_of_entries_that_depend_on_each_other_are_not_tempered() -> None:
    class Together(Bipartite):
        def conditional(self, block: str, x: Tensor) -> Any:
            given: Any = super().conditional(block, x)
            return torch.distributions.TransformedDistribution(given, [])

    energy = 0.5 * Together("bits")
    state = BlockGibbs().init(energy, energy.initial(2))
    with pytest.raises(ValueError, match=r"must be of independent entries .* to be combined"):
        BlockGibbs().step(energy, state)


def assert_ais(energy: Energy) -> None:
    assert isinstance(default_kernel(energy), BlockGibbs)
    found = partition.ais(energy, betas=100, num_chains=400, progress=False)
    within_se(found.value, partition.exact(energy).value, found.standard_error)


def test_ais_on_lattices_moves_by_blocks() -> None:
    assert_ais(ising())
    assert_ais(0.5 * potts())
    assert isinstance(default_kernel(Ising((3, 3))), Gibbs)


def test_mutant_conditionals_of_the_end_all_along_the_path_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        pyroebm.core.annealing_path, "product_of_powers", lambda *terms: terms[0][0]
    )
    with pytest.raises(AssertionError):
        assert_ais(ising())


def test_mutant_tempering_that_forgets_its_power_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pyroebm.core.energy, "product_of_powers", lambda *terms: terms[0][0])
    with pytest.raises(AssertionError):
        test_conditionals_of_blocks_are_those_of_the_energy("tempered")


def test_replicas_move_by_blocks() -> None:
    """From exact draws, which each temperature leaves unchanged."""
    energy = Ising((4,), 0.6, 0.3, dtype=F64)
    kernel = ParallelTempering(BlockGibbs(), betas=[1.0, 0.5, 0.0], reference=base(energy))  # type: ignore[arg-type]
    generator = seeded(5)
    state = kernel.init(energy, energy.initial(4000, generator), generator)
    for _ in range(30):
        state, _ = kernel.step(energy, state, generator)
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 4)
    p = torch.softmax(-energy(states), 0)
    magnetization = state.x.mean(1)
    truth = float((p * states.mean(1)).sum())
    within_se(float(magnetization.mean()), truth, float(magnetization.std()) / 4000**0.5)


def test_unconstrain_is_the_energy_itself_where_nothing_changes() -> None:
    positive = Exponential(dtype=F64)
    for energy in (ising(), joint(), DoubleWell(), unconstrain(positive)):
        assert unconstrain(energy) is energy
    free = unconstrain(positive)
    assert isinstance(free, Unconstrained)
    assert (free.log_z, free.has_exact_draws) == (positive.log_z, True)
    x = positive.sample(3, seeded())
    torch.testing.assert_close(to_support(positive.support).inv(x), free.sample(3, seeded()))
    assert torch.equal(to_support(ising().support).inv(some_rows(ising())), some_rows(ising()))
