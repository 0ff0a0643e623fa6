"""The number of auxiliary variables of a flow, chosen by the smallest J_R."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pyroebm.core.rng import seeded_generator
from pyroebm.flows import Flow, RedundantNICE
from pyroebm.objectives import ReverseKL, estimate_augmented_kl
from pyroebm.targets import DoubleWell, Gaussian
from pyroebm.training import select_total_dim

F64 = torch.float64


def test_the_smallest_j_r_chooses_an_auxiliary_variable() -> None:
    energy = DoubleWell()
    found = select_total_dim(
        energy,
        (1, 2),
        make_objective=partial(ReverseKL, num_samples=256),
        num_steps=300,
        lr=5e-3,
        num_evaluation_samples=20_000,
    )
    assert found.total_dim == 2
    assert found.flow is found.flows[2]
    assert found.values[1] - found.values[2] > 5 * math.hypot(*found.standard_errors.values())
    value, _ = estimate_augmented_kl(found.flows[1], energy, 20_000, generator=seeded_generator(1))
    # values leave out log C, which all share
    assert value - found.values[1] == pytest.approx(energy.log_z)


def test_choice_of_total_dim_takes_makers_and_refuses() -> None:
    energy = Gaussian([0.0, 0.0], dtype=F64)
    made: list[tuple[int, int]] = []

    def make(dim: int, total_dim: int) -> Flow:
        made.append((dim, total_dim))
        return RedundantNICE(dim, total_dim, num_layers=1, hidden_sizes=(4,), dtype=F64)

    found = select_total_dim(
        energy,
        make_flow=make,
        make_objective=partial(ReverseKL, num_samples=4),
        num_steps=1,
        num_evaluation_samples=10,
    )
    assert made == [(2, 2), (2, 3), (2, 4)]
    assert set(found.flows) == {2, 3, 4}
    with pytest.raises(ValueError, match=r"at least d=2, got candidates=\(1, 2\)"):
        select_total_dim(energy, (1, 2))
    with pytest.raises(ValueError, match=r"got candidates=\(\)"):
        select_total_dim(energy, ())
