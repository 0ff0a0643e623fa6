"""Data that an objective cannot take are named: at the call of `fit`, whatever the objective, and
batches without rows by the objectives themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyroebm.energies import BernoulliRBM, BoltzmannMachine, DeepBoltzmannMachine, Ising
from pyroebm.objectives import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ExactLikelihood,
    MeanFieldLikelihood,
    MinimumProbabilityFlow,
    NonNegativeScoreMatching,
    PersistentCD,
    Pseudolikelihood,
    RatioMatching,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyroebm.targets import Exponential, Gaussian
from pyroebm.training import fit, pretrain_belief_network, pretrain_boltzmann_machine

BITS: dict[str, Callable[[], Any]] = {
    "CD": ContrastiveDivergence,
    "PCD": lambda: PersistentCD(8),
    "exact likelihood": ExactLikelihood,
    "mean field": MeanFieldLikelihood,
    "pseudo-likelihood": Pseudolikelihood,
    "ratio matching": RatioMatching,
    "minimum probability flow": MinimumProbabilityFlow,
}
MACHINES: dict[str, Callable[[], Any]] = {
    "RBM": lambda: BernoulliRBM(4, 3),
    "Boltzmann machine": lambda: BoltzmannMachine(4),
    "deep": lambda: DeepBoltzmannMachine((4, 3, 2)),
}
DATA: dict[str, tuple[Callable[[], Tensor], str]] = {
    "grey levels": (
        lambda: torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 255.0, 0.0]]),
        r"got 255 in row 1, column 2 .*> 127.5\) \* 1.0 maps",
    ),
    "spins": (
        lambda: torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]]),
        r"got -1 in row 1, column 3 .*\(data \+ 1\) / 2 maps",
    ),
    "NaN": (
        lambda: torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 0.0]]),
        r"must be finite, got nan in row 1, column 1",
    ),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("objective", BITS)
def test_data_outside_the_support_are_refused_by_fit(
    objective: str, machine: str, data: str
) -> None:
    rows, message = DATA[data]
    with pytest.raises(ValueError, match=message):
        fit(MACHINES[machine](), BITS[objective](), rows(), num_steps=1, progress=False)


def test_pretraining_and_spins_check_their_data() -> None:
    rows, message = DATA["spins"]
    for pretrain in (pretrain_belief_network, pretrain_boltzmann_machine):
        with pytest.raises(ValueError, match=message):
            pretrain((4, 3, 2), rows(), ContrastiveDivergence(), num_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"got 0 in row 0, column 0 .*2.0 \* data - 1 maps"):
        fit(Ising((3,)), Pseudolikelihood(), torch.zeros(2, 3), num_steps=1, progress=False)


EMPTY: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, ...]]] = {
    "score matching": (ScoreMatching, lambda: Gaussian(torch.zeros(2)), (0, 2)),
    "sliced": (SlicedScoreMatching, lambda: Gaussian(torch.zeros(2)), (0, 2)),
    "denoising": (lambda: DenoisingScoreMatching(0.1), lambda: Gaussian(torch.zeros(2)), (0, 2)),
    "nonnegative": (NonNegativeScoreMatching, lambda: Exponential(1.0), (0,)),
    "CD": (ContrastiveDivergence, lambda: Gaussian(torch.zeros(2)), (0, 2)),
    "CD of layers": (ContrastiveDivergence, lambda: BernoulliRBM(4, 3), (0, 4)),
    "PCD": (lambda: PersistentCD(8), lambda: BernoulliRBM(4, 3), (0, 4)),
    "exact likelihood": (ExactLikelihood, lambda: BernoulliRBM(4, 3), (0, 4)),
    "mean field": (MeanFieldLikelihood, lambda: BernoulliRBM(4, 3), (0, 4)),
    "pseudo-likelihood": (Pseudolikelihood, lambda: BernoulliRBM(4, 3), (0, 4)),
    "ratio matching": (RatioMatching, lambda: BernoulliRBM(4, 3), (0, 4)),
    "minimum probability flow": (MinimumProbabilityFlow, lambda: BernoulliRBM(4, 3), (0, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_without_rows_is_refused_without_a_warning(name: str) -> None:
    objective, energy, shape = EMPTY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"(at least one row|n at least 1).*got"):
            objective()(energy(), torch.zeros(shape))
