"""Lattices: bonds counted by hand, log Z against published tori and against all states, the
distribution of independent spins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from lib.checks import within_se
from torch import Tensor

from pyroebm import Boltzmann, Energy
from pyroebm.core.spins import SpinBernoulli
from pyroebm.core.supports import site_values
from pyroebm.energies import Ising, Potts, lattice

FIELD = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COLOURS = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LATTICES: dict[str, Callable[[], Ising | Potts]] = {
    "torus": lambda: Ising((3, 4), 0.3, FIELD, dtype=torch.float64),
    "tall-torus": lambda: Ising((4, 3), 0.3, FIELD.T, dtype=torch.float64),
    "open": lambda: Ising((3, 4), -0.3, FIELD, periodic=False, dtype=torch.float64),
    "strip": lambda: Ising((1, 5), 0.4, 0.2, periodic=False, dtype=torch.float64),
    "ring": lambda: Ising((7,), 0.4, 0.2, dtype=torch.float64),
    "one-site": lambda: Ising((1,), 0.4, 0.2, periodic=False, dtype=torch.float64),
    "potts-ring": lambda: Potts((5,), 3, 0.4, torch.tensor([0.3, -0.2, 0.0]), dtype=torch.float64),
    "potts-open": lambda: Potts((2, 3), 3, 0.4, COLOURS, periodic=False, dtype=torch.float64),
    "potts-torus": lambda: Potts((3, 3), 2, -0.4, dtype=torch.float64),
}


def states(energy: Energy) -> Tensor:
    values = site_values(energy.support, energy.event_shape, torch.float64, torch.device("cpu"))
    sites = energy.event_shape.numel() // values.shape[1]
    index = torch.tensor(list(itertools.product(range(len(values)), repeat=sites)))
    return values[index].reshape(-1, *energy.event_shape)


def by_hand(energy: Ising | Potts, x: Tensor) -> float:
    """One state, bond by bond."""
    sites = x.unsqueeze(-1) if isinstance(energy, Ising) else x
    total = -float((energy.field * x).sum())
    for place in itertools.product(*map(range, energy.shape)):
        for axis, side in enumerate(energy.shape):
            if place[axis] + 1 < side or energy.periodic:
                other = tuple(
                    (p + (a == axis)) % s
                    for a, (p, s) in enumerate(zip(place, energy.shape, strict=True))
                )
                total -= float(energy.coupling) * float(sites[place] @ sites[other])
    return total


@pytest.mark.parametrize("name", LATTICES)
def test_energies_are_those_of_the_bonds(name: str) -> None:
    energy = LATTICES[name]()
    x = energy.initial(5, torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        energy(x), torch.tensor([by_hand(energy, s) for s in x], dtype=torch.float64)
    )
    torch.testing.assert_close(energy(x.expand(2, 5, *energy.event_shape)), energy(x).expand(2, 5))


@pytest.mark.parametrize("name", LATTICES)
def test_log_z_is_the_sum_over_all_states(name: str) -> None:
    energy = LATTICES[name]()
    assert energy.log_z is not None
    assert math.isclose(
        energy.log_z, float(torch.logsumexp(-energy(states(energy)), 0)), rel_tol=1e-12
    )
    assert math.isclose(energy.float().log_z or 0.0, energy.log_z, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("side", "published"),
    [
        (3, (6.669745, 9.020213, 11.587695)),
        (4, (11.771470, 15.521916, 20.056533)),
        (8, (47.010147, 60.141781, 78.141649)),
    ],
)
def test_log_z_of_tori_and_of_a_ring(side: int, published: tuple[float, ...]) -> None:
    for coupling, truth in zip((0.2, 0.4406868, 0.6), published, strict=True):
        assert Ising((side, side), coupling, dtype=torch.float64).log_z == pytest.approx(
            truth, abs=1e-6
        )
    assert Ising((10,), 0.7, 0.3, dtype=torch.float64).log_z == pytest.approx(10.627232, abs=1e-6)


def test_log_z_is_none_where_it_is_not_computed() -> None:
    assert Ising((11, 11), 0.2).log_z is None
    assert Ising((11, 3), 0.2).log_z is not None
    assert Potts((5, 7), 5, 0.2).log_z is None
    assert Ising((3, 3), 200.0).log_z is None  # the weights of a row leave the range of float64
    assert Ising((3, 3), 20.0, dtype=torch.float64).log_z == pytest.approx(18 * 20.0 + math.log(2))


def test_two_colors_are_an_ising_model_of_half_the_coupling() -> None:
    ising, potts = (
        Ising((3, 4), 0.35, dtype=torch.float64),
        Potts((3, 4), 2, 0.7, dtype=torch.float64),
    )
    x = potts.initial(10, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        potts(x) - ising(2 * x[..., 1] - 1), torch.full((10,), -0.35 * 24, dtype=torch.float64)
    )


def test_a_lattice_is_a_normalised_pyro_distribution() -> None:
    energy = Potts((3,), 3, 0.5, dtype=torch.float64)
    assert float(Boltzmann(energy).log_prob(states(energy)).exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ising((2, 3)),
            r"one or two sides, each at least 3 on a torus, got shape=\(2, 3\)",
        ),
        (
            lambda: Ising((0,), periodic=False),
            r"each at least 1 with open borders, got shape=\(0,\)",
        ),
        (lambda: Potts((3, 3, 3), 2), "one or two sides"),
        (lambda: Potts((3, 3), 1), "num_colors must be at least 2, got num_colors=1"),
        (
            lambda: Ising((3, 3), math.nan),
            "coupling must be one finite number and field finite, got coupling=nan",
        ),
        (lambda: Ising((3, 3), field=math.inf), "field finite"),
        (
            lambda: Ising((3, 3), field=torch.zeros(4)),
            r"field must broadcast to the event shape \(3, 3\), got shape \(4,\)",
        ),
        (
            lambda: Ising((4, 4)).conditional("black", torch.ones(1, 4, 4)),
            r"block must be one of \['even', 'odd'\], got block='black'",
        ),
        (
            lambda: Ising((3, 3)).conditional("even", torch.ones(1, 3, 3)),
            r"block must be one of \[\], got block='even'",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_distribution_of_spins() -> None:
    field = torch.tensor([-1.2, 0.0, 0.7], dtype=torch.float64)
    distribution, both = SpinBernoulli(field), torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    p = distribution.log_prob(both.expand(2, 3)).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((p * both).sum(0), distribution.mean)
    torch.testing.assert_close((p * both**2).sum(0) - distribution.mean**2, distribution.variance)
    torch.manual_seed(0)
    x = distribution.expand((2, 3)).sample((20_000,))
    assert x.shape == (20_000, 2, 3)
    within_se(x.mean(0), distribution.mean.expand(2, 3), x.std(0) / math.sqrt(20_000))
    with pytest.raises(ValueError, match="support"):
        SpinBernoulli(field, validate_args=True).log_prob(torch.zeros(3).double())
    with pytest.raises(ValueError, match="constraint"):
        SpinBernoulli(torch.tensor([math.nan]), validate_args=True)


def test_mutant_open_lattice_with_the_bonds_of_a_torus_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = lattice._neighbors
    monkeypatch.setattr(lattice, "_neighbors", lambda shape, periodic: true(shape, True))
    energy = LATTICES["open"]()
    x = energy.initial(4, torch.Generator().manual_seed(0))
    flipped = x.clone()
    flipped[:, 0, 0] *= -1
    logits = energy.site_logits(x, torch.zeros(4, dtype=torch.long))
    gain = (logits[:, 1] - logits[:, 0]) * x[:, 0, 0]  # log p(own value) - log p(other)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gain, energy(flipped) - energy(x))
