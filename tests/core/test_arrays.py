"""NumPy arrays where a tensor of states or data enters, and log-densities outside a support."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

from pyroebm import MCMC, NUTS, Energy
from pyroebm.core import spin
from pyroebm.core.arrays import as_tensor
from pyroebm.energies import BernoulliRBM, GaussianRBM, MLPEnergy
from pyroebm.flows import NICE, RedundantNICE, evaluate_flow
from pyroebm.objectives import (
    ExactLikelihood,
    ForwardKL,
    LogVariance,
    PersistentCD,
)
from pyroebm.partition import base_rates, exact
from pyroebm.targets import BernoulliProduct, Beta, Dirichlet, DoubleWell, Exponential, Gaussian
from pyroebm.training import impute

F64 = torch.float64
ROWS = np.random.default_rng(0).normal(size=(6, 2))
BITS = (ROWS > 0) * 1.0


class Rows(Energy):
    """An energy with a parameter for each row, which is undefined outside the positive numbers."""

    event_shape = torch.Size([2])
    support = constraints.positive

    def forward(self, x: Tensor) -> Tensor:
        if not bool((x > 0).all()):
            raise AssertionError("evaluated outside the support")
        return torch.arange(1.0, 1.0 + len(x), dtype=x.dtype) * x.sum(-1)


@pytest.mark.parametrize(
    ("energy", "rows", "truth"),
    [
        (Exponential(2.0, dtype=F64), [1.0, 0.5, -1.0], lambda x: stats.expon.logpdf(x, scale=0.5)),
        (
            Beta(2.0, 3.0, dtype=F64),
            [0.5, -0.1, 1.1, math.nan],
            lambda x: stats.beta.logpdf(x, 2.0, 3.0),
        ),
        (Gaussian(torch.tensor(0.0, dtype=F64)), [0.0, -math.inf, math.nan], stats.norm.logpdf),
        (
            Dirichlet([1.0, 2.0, 3.0], dtype=F64),
            [[0.2, 0.3, 0.5], [0.5, 0.5, 0.5], [-0.2, 0.7, 0.5]],
            lambda x: [stats.dirichlet.logpdf(x[0], [1.0, 2.0, 3.0]), -math.inf, -math.inf],
        ),
        (
            BernoulliProduct([0.7], dtype=F64),
            [[1.0], [0.0], [0.5], [2.0]],
            lambda x: stats.bernoulli.logpmf(x[:, 0], 1.0 / (1.0 + math.exp(-0.7))),
        ),
    ],
    ids=["positive", "interval", "real", "simplex", "binary"],
)
def test_log_densities_are_scipys_inside_and_outside_of_a_support(
    energy: Energy, rows: Any, truth: Callable[[np.ndarray], Any]
) -> None:
    x = np.array(rows)
    expected = np.asarray(truth(x))
    np.testing.assert_allclose(energy.score_samples(x).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(energy.score_samples(torch.tensor(rows, dtype=F64)), expected)


def test_a_given_log_z_replaces_that_of_the_energy() -> None:
    machine = BernoulliRBM(3, 2, dtype=F64)  # knows its log Z
    x = torch.eye(3, dtype=F64)
    result = exact(machine)
    torch.testing.assert_close(machine.score_samples(x, log_z=result), -machine(x) - result.value)
    torch.testing.assert_close(machine.score_samples(x, log_z=1.0), -machine(x) - 1.0)
    torch.testing.assert_close(machine.score_samples(x, log_z=0.0), -machine(x))


def test_the_energy_is_evaluated_inside_its_support_alone() -> None:
    x = torch.tensor([[-1.0, 1.0], [1.0, 2.0], [0.0, math.nan], [1.0, 1.0]])
    expected = torch.tensor([-math.inf, -6.0, math.nan, -8.0])
    torch.testing.assert_close(Rows().score_samples(x), expected, equal_nan=True)
    assert Rows().score_samples(-x[:1]).tolist() == [-math.inf]
    x = torch.tensor([[-1.0, 1.0], [1.0, 2.0]], requires_grad=True)
    Rows().score_samples(x)[1].backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [-2.0, -2.0]]


def test_score_samples_checks_shape_and_dtype() -> None:
    energy = Gaussian(torch.zeros(2))
    with pytest.raises(ValueError, match=r"event_shape \(2,\) \(Gaussian\), got shape \(3,\)"):
        energy.score_samples(torch.zeros(3))
    with pytest.raises(ValueError, match=r"x has torch.float64; convert one of"):
        energy.score_samples(torch.zeros(3, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"got list: convert it by torch.as_tensor\(x\)"):
        energy.score_samples([[0.0, 0.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be numbers, got an array of complex128"):
        energy.score_samples(np.zeros((1, 2), dtype=complex))


def test_an_energy_takes_tensors_and_its_error_says_what_takes_arrays() -> None:
    with pytest.raises(ValueError, match=r"got ndarray: convert it by torch.as_tensor\(x, dtype="):
        DoubleWell()(np.zeros(3))  # type: ignore[arg-type]


def test_a_number_of_numpy_is_an_array_without_dimensions() -> None:
    for value in (np.float64(2.0), np.array(2.0)):
        assert as_tensor(value, torch.float32, torch.device("cpu")).shape == ()
    assert DoubleWell().score_samples(np.float64(0.0)).shape == ()


def chains(start: Any) -> Any:
    mcmc = MCMC(NUTS(), num_samples=3, warmup_steps=2, num_chains=6, seed=0, compile=False)
    mcmc.run(Gaussian(torch.zeros(2)), start)
    return mcmc.get_samples()["x"]


def fitted(machine: Any, data: Any) -> Any:
    with torch.no_grad():
        machine.fit_visible(data)
    return machine.visible_bias


def enveloped(data: Any) -> Any:
    net = MLPEnergy((2,), scale=1.0)
    net.fit_envelope(data)
    return net.center


def report(draws: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    found = evaluate_flow(
        NICE(2), Gaussian(torch.zeros(2)), 40, draws, num_distances=40, generator=g
    )
    assert found.eubo is not None
    return torch.tensor(found.eubo.value)


def weights(objective: Any) -> Any:
    return objective(NICE(2), generator=torch.Generator().manual_seed(0))[0]


WIDE = np.random.default_rng(1).normal(size=(50, 2))
#: Functions of data, given as arrays and as tensors of the model's dtype.
DOORS: dict[str, tuple[Callable[[Any], Any], np.ndarray]] = {
    "initial states": (chains, ROWS),
    "log_ratio": (lambda x: DoubleWell().log_ratio(x, x[::1] * 0.5), ROWS),
    "score_samples of a flow": (NICE(2).score_samples, ROWS),
    "log_prob_x": (RedundantNICE(2, 3).log_prob_x, ROWS),
    "base_rates": (lambda x: base_rates(BernoulliRBM(2, 3), x).biases[0], BITS),
    "fit_visible, binary": (lambda x: fitted(BernoulliRBM(2, 3), x), BITS),
    "fit_visible, Gaussian": (lambda x: fitted(GaussianRBM(2, 3), x), ROWS),
    "fit_envelope": (enveloped, ROWS),
    "evaluate_flow": (report, WIDE),
    "ForwardKL": (lambda x: weights(ForwardKL(x, num_samples=8)), ROWS),
    "LogVariance": (
        lambda x: weights(LogVariance(Gaussian(torch.zeros(2)), x, num_samples=8)),
        ROWS,
    ),
    "impute": (
        lambda x: impute(
            BernoulliRBM(2, 3, weight=torch.ones(2, 3)),
            x,
            np.array([True, False]),
            num_sweeps=2,
            generator=torch.Generator().manual_seed(0),
        ),
        BITS,
    ),
    "an objective": (
        lambda x: ExactLikelihood()(BernoulliRBM(2, 3, weight=torch.ones(2, 3)), x)[0],
        BITS,
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_arrays_are_taken_where_tensors_are(name: str) -> None:
    door, data = DOORS[name]
    torch.manual_seed(0)
    expected = door(torch.as_tensor(data, dtype=torch.float32))
    torch.manual_seed(0)
    torch.testing.assert_close(door(data), expected)


def test_labels_of_an_array_stay_integers() -> None:
    seen: list[Any] = []

    class Seen(PersistentCD):
        takes_labels = True

        def forward(self, module: Any, batch: Any, /, *, generator: Any = None) -> Any:
            seen.extend(batch)
            return torch.zeros(()), {}

    Seen(3)(BernoulliRBM(2, 3), (BITS, np.arange(6)))
    assert [part.dtype for part in seen] == [torch.float32, torch.int64]


def test_spins_outside_have_no_density() -> None:
    class Field(Energy):
        event_shape = torch.Size([1])
        support = spin

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1)

    values = Field().score_samples(np.array([[1.0], [-1.0], [0.0]]))
    assert values.tolist() == [-1.0, 1.0, -math.inf]
