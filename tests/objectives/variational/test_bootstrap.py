"""Flow annealed importance sampling bootstrap: its gradient against quadrature, weights, buffer, a
mode to be found."""

from __future__ import annotations

import math

import pytest
import torch
from lib.checks import within_se
from lib.flow_cases import normal_flow
from lib.seeds import seeded
from torch import Tensor

from pyroebm import HMC, MALA, Energy
from pyroebm.flows import NICE, FlowEnergy, importance_sample
from pyroebm.objectives import AlphaBootstrap, ReverseKL
from pyroebm.partition import ais
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture
from pyroebm.training import fit

pytestmark = pytest.mark.usefixtures("float64")


def exact_gradient(flow: NICE, energy: Energy) -> Tensor:
    """Of log of the integral of p^2 / q, by quadrature: in log s and the mean."""
    grid = torch.linspace(-8.0, 8.0, 4001)
    log_ratio = -2.0 * energy(grid) - flow.log_prob(grid.unsqueeze(1))
    log_integral = torch.logsumexp(log_ratio, 0)
    parts = torch.autograd.grad(
        log_integral, [flow.linear.log_diagonal, flow.transform.parts[-1].offset]
    )
    return torch.cat(parts)


@pytest.mark.parametrize("temperatures", [1, 3])
@pytest.mark.parametrize(
    "energy", [Gaussian(0.5, scale=0.8, dtype=torch.float64), DoubleWell(dtype=torch.float64)]
)
def test_its_gradient_is_that_of_the_divergence(energy: Energy, temperatures: int) -> None:
    flow, found = normal_flow(), []
    generator = seeded(1)
    for _ in range(40):
        objective = AlphaBootstrap(
            energy, 4000, num_temperatures=temperatures, kernel=HMC(0.3, num_steps=4), reuse=1
        )
        loss, _ = objective(flow, generator=generator)
        grads = torch.autograd.grad(
            loss, [flow.linear.log_diagonal, flow.transform.parts[-1].offset]
        )
        found.append(torch.cat(grads))
    gradients = torch.stack(found)
    within_se(gradients.mean(0), exact_gradient(flow, energy), gradients.std(0) / math.sqrt(40))


class _Plain(AlphaBootstrap):
    """Mutant: anneals to p in place of p^2 / q."""

    def _anneal(
        self, flow: NICE, target: Energy, n: int, generator: torch.Generator | None
    ) -> tuple:
        x, log_weights, rate = super()._anneal(flow, target, n, generator)
        return x, 0.5 * log_weights, rate


def test_a_mutant_that_anneals_to_the_target_itself_is_caught() -> None:
    flow = normal_flow()
    energy = Gaussian(0.5, scale=0.8)
    found = []
    for seed in range(40):
        loss, _ = _Plain(energy, 4000, num_temperatures=1, reuse=1)(flow, generator=seeded(seed))
        found.append(
            torch.cat(
                torch.autograd.grad(
                    loss, [flow.linear.log_diagonal, flow.transform.parts[-1].offset]
                )
            )
        )
    gradients = torch.stack(found)
    with pytest.raises(AssertionError, match="standard errors"):
        within_se(gradients.mean(0), exact_gradient(flow, energy), gradients.std(0) / math.sqrt(40))


def test_weights_follow_the_flow() -> None:
    """After the flow has moved, drawing and correcting gives each row of the buffer its weight
    under the new flow."""
    flow, energy = normal_flow(), Gaussian(0.5, scale=1.4)
    objective = AlphaBootstrap(energy, 200, num_temperatures=1, reuse=1000)
    objective(flow, generator=seeded())
    objective.num_samples = 2000
    with torch.no_grad():
        flow.transform.parts[-1].offset.add_(0.1)
    for seed in range(60):  # until every row was drawn: none has a weight near 0
        objective(flow, generator=seeded(seed))
    rows = objective.rows
    drawn = (objective.log_q - flow.log_prob(rows).detach()).abs() < 1e-9
    assert bool(drawn.all())
    # without annealing the weight of a row is p^2 / q / (what it was drawn from), the flow before
    # it moved
    before = normal_flow().log_prob(rows).detach()
    expected = -2.0 * energy(rows.squeeze(1)) - flow.log_prob(rows).detach() - before
    torch.testing.assert_close(objective.log_weights, expected, rtol=1e-9, atol=1e-9)


def test_the_buffer_is_filled_kept_saved_and_emptied() -> None:
    flow, energy = normal_flow(), Gaussian(0.5, scale=0.8)
    objective = AlphaBootstrap(energy, 50, num_temperatures=2, buffer_size=150, reuse=2)
    lengths = []
    for seed in range(5):
        _, metrics = objective(flow, generator=seeded(seed))
        lengths.append(len(objective.rows))
        assert ("acceptance_rate" in metrics) == (seed % 2 == 0)
    assert lengths == [50, 50, 100, 100, 150]
    copy = AlphaBootstrap(energy, 50, num_temperatures=2, buffer_size=150, reuse=2)
    copy.load_state_dict(objective.state_dict())
    one, two = (o(flow, generator=seeded(9))[0] for o in (objective, copy))
    assert torch.equal(one, two)
    objective(normal_flow(), generator=seeded(1))  # another flow
    assert len(objective.rows) == 50


def test_a_nan_row_of_the_energy_stays_out() -> None:
    class Walled(Energy):
        event_shape = (1,)

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.squeeze(-1) ** 2 + 0.0 * torch.sqrt(1.5 - x.squeeze(-1))

    objective = AlphaBootstrap(Walled(), 500, num_temperatures=3, reuse=1)
    loss, _ = objective(normal_flow(1.0), generator=seeded())
    assert torch.isfinite(loss)
    assert torch.isfinite(objective.log_weights).all()
    assert float(objective.rows.max()) < 1.5
    assert len(objective.rows) < 500


def test_no_finite_weight_is_said() -> None:
    class Nowhere(Energy):
        event_shape = (1,)

        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze(-1) * math.nan

    with pytest.raises(FloatingPointError, match="no annealed state has a finite weight"):
        AlphaBootstrap(Nowhere(), 20)(normal_flow(), generator=seeded())


def test_it_finds_the_mode_that_the_reverse_divergence_leaves_out() -> None:
    energy = GaussianMixture([[-2.4, 0.0], [2.4, 0.0]], scale=0.7, weights=[0.75, 0.25])
    missing = {}
    for name, objective in (
        ("reverse", ReverseKL(energy, 128, beta_start=1.0)),
        ("alpha", AlphaBootstrap(energy, 128, kernel=HMC(0.5, num_steps=5))),
    ):
        flow = NICE(2, num_layers=6, hidden_sizes=(16,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            flow.transform.parts[-1].offset.copy_(torch.tensor([-2.4, 0.0]))
            flow.linear.log_diagonal.fill_(-0.35)
        fit(flow, objective, num_steps=250, lr=5e-3, seed=2)
        x = flow.forward_and_log_prob(flow.rsample_base(5000, seeded(3)))[0].detach()
        missing[name] = float((energy.mode_of(x) == 1).double().mean())
    assert missing["reverse"] < 0.01
    assert missing["alpha"] > 0.1


def test_annealing_from_a_flow_to_its_target() -> None:
    energy, flow = DoubleWell(), normal_flow(0.0, 1.5)
    result = ais(
        flow.extend(energy),
        FlowEnergy(flow),
        HMC(0.2, num_steps=5),
        betas=30,
        num_chains=400,
        generator=torch.Generator().manual_seed(1),
    )
    within_se(result.value, energy.log_z, result.standard_error)
    plain = importance_sample(flow, energy, 400, generator=torch.Generator().manual_seed(1))
    assert result.standard_error < plain.log_z.standard_error


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: AlphaBootstrap(DoubleWell(), num_temperatures=0),
            "num_temperatures must be an integer of at least 1, got num_temperatures=0",
        ),
        (lambda: AlphaBootstrap(DoubleWell(), kernel=MALA()), "kernel must be an HMC, got MALA"),
    ],
)
def test_refusals(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
