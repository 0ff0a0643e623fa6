"""Distances of samples against closed forms; modes that were found."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lib.checks import within_se
from torch import Tensor

from pyroebm.core import Estimate
from pyroebm.core.statistics import (
    energy_distance,
    maximum_mean_discrepancy,
    median_distance,
    mode_coverage_entropy,
)

pytestmark = pytest.mark.usefixtures("float64")


def normal(n: int, seed: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed))


def folded(mean: float, variance: float) -> float:
    """E|N(mean, variance)|."""
    s = math.sqrt(variance)
    return s * math.sqrt(2.0 / math.pi) * math.exp(-0.5 * (mean / s) ** 2) + mean * math.erf(
        mean / (s * math.sqrt(2.0))
    )


def true_energy_distance(mean: float) -> float:
    return 2.0 * folded(mean, 2.0) - 2.0 * folded(0.0, 2.0)


def true_discrepancy(mean: float, h: float) -> float:
    scale = h / math.sqrt(h * h + 2.0)
    return 2.0 * scale * (1.0 - math.exp(-0.5 * mean**2 / (h * h + 2.0)))


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Estimate], Callable[[float], float]]] = {
    "energy distance": (energy_distance, true_energy_distance),
    "discrepancy": (
        lambda x, y: maximum_mean_discrepancy(x, y, 1.0),
        lambda mean: true_discrepancy(mean, 1.0),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
@pytest.mark.parametrize("mean", [0.5, 2.0])
def test_between_normal_distributions(name: str, mean: float) -> None:
    estimate, truth = CASES[name]
    found = estimate(normal(1500, 1), normal(1000, 2, mean))
    within_se(found.value, truth(mean), found.standard_error)


@cases
def test_unbiased_for_equal_distributions_and_errors_are_true(name: str) -> None:
    """Of many repetitions the mean is the truth and the spread the standard error that each of them
    claims. Under equal distributions the estimates are a weighted sum of squares, the less skewed
    the more dimensions there are; the truth is 0 in all."""
    estimate, truth = CASES[name]
    for mean, dim in ((0.0, 8), (1.0, 1)):
        found = [
            estimate(*(normal(60 * dim, 2 * k + i, i * mean).reshape(60, dim) for i in (0, 1)))
            for k in range(100)
        ]
        values = torch.tensor([f.value for f in found])
        within_se(values.mean(), truth(mean), values.std() / math.sqrt(len(values)))
        if mean:  # under equal distributions the first-order term of the error is 0
            claimed = torch.tensor([f.standard_error for f in found]).mean()
            assert float(claimed / values.std()) == pytest.approx(
                1.0, abs=5.0 / math.sqrt(2.0 * len(values))
            )


@cases
def test_rows_in_any_order_of_any_shape(name: str) -> None:
    estimate, _ = CASES[name]
    x, y = normal(600, 1).reshape(100, 2, 3), normal(480, 2, 0.3).reshape(80, 2, 3)
    value = estimate(x, y).value
    assert value == pytest.approx(estimate(x.flip(0), y).value, abs=1e-12)
    assert value == pytest.approx(estimate(y, x).value, abs=1e-12)
    assert value == pytest.approx(estimate(x.flatten(1), y.flatten(1)).value, abs=1e-12)
    pairs = [
        (x.flatten(1), x.flatten(1)),
        (y.flatten(1), y.flatten(1)),
        (x.flatten(1), y.flatten(1)),
    ]
    d = [torch.cdist(a, b) for a, b in pairs]
    k = d if name == "energy distance" else [torch.exp(-0.5 * v.square()) for v in d]
    mean = [(k[0].sum() - k[0].trace()) / 9900, (k[1].sum() - k[1].trace()) / 6320, k[2].mean()]
    brute = mean[0] + mean[1] - 2.0 * mean[2]
    assert value == pytest.approx(float(-brute if name == "energy distance" else brute), abs=1e-12)


def test_the_bandwidth() -> None:
    x, y = normal(200, 1), normal(200, 2, 1.0)
    h = median_distance(torch.cat([x, y]))
    assert maximum_mean_discrepancy(x, y) == maximum_mean_discrepancy(x, y, h)
    assert h == pytest.approx(float(torch.pdist(torch.cat([x, y])[:, None]).median()))


def test_modes_found() -> None:
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert mode_coverage_entropy(torch.tensor([0, 1, 2, 3]), weights) == pytest.approx(1.0)
    assert mode_coverage_entropy(torch.tensor([2, 2]), weights) == 0.0
    assert mode_coverage_entropy(torch.tensor([0, 1]), weights) == pytest.approx(0.5)
    assert mode_coverage_entropy(torch.tensor([0, 1]), torch.tensor([0.9, 0.1])) > 1.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: energy_distance(torch.zeros(50, 2), torch.zeros(50, 3)),
            r"one event shape .* got \(50, 2\), \(50, 3\)",
        ),
        (lambda: energy_distance(torch.zeros(39), torch.zeros(50)), "at least 40 draws"),
        (
            lambda: energy_distance(torch.zeros(50), torch.full((50,), math.nan)),
            "y must be finite, got 50 entries",
        ),
        (
            lambda: maximum_mean_discrepancy(torch.zeros(50), torch.zeros(50)),
            "bandwidth must be positive .* bandwidth=0.0",
        ),
        (
            lambda: mode_coverage_entropy(torch.tensor([0, 3]), torch.ones(3)),
            "modes must be .* from 0 to 2",
        ),
        (lambda: mode_coverage_entropy(torch.tensor([0.0]), torch.ones(3)), "modes must be"),
        (lambda: mode_coverage_entropy(torch.tensor([0]), torch.ones(1)), "at least two positive"),
    ],
)
def test_refusals(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
