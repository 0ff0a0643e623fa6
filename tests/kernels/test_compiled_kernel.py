"""Compiled chains in training: the draws of eager ones, parameters as they are now, and no view of
an energy that has changed."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.kernel_cases import Fragile
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

import pyroebm.core.compilation
from pyroebm import HMC, MALA, MCMC, NUTS, ULA, ChEES, Energy, ModelEnergy
from pyroebm.core.compilation import Compiled
from pyroebm.kernels import MCLMC, CompiledKernel, Gibbs, Kernel, compiling
from pyroebm.objectives import ContrastiveDivergence, ReplayBufferCD
from pyroebm.objectives.contrastive import run_chains
from pyroebm.targets import Gaussian
from pyroebm.training import fit

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="compiled blocks need a C++ compiler, and none is here"
)

Trained = tuple[list[Tensor], Tensor]


class Net(Energy):
    """A small network with a quadratic floor; dropout shows which mode it is in."""

    def __init__(
        self, support: constraints.Constraint = constraints.real, dropout: float = 0.0
    ) -> None:
        super().__init__((3,), support)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(3, 4), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4, 1)
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) + 0.5 * (x**2).sum(-1)


def starts(energy: Energy, n: int = 8) -> Tensor:
    return energy.initial(n, torch.Generator().manual_seed(1))


def moved(energy: Energy, kernel: Kernel[Any], k: int = 6) -> tuple[Tensor, Tensor]:
    return run_chains(energy, kernel, starts(energy), k, torch.Generator().manual_seed(2))


def data() -> Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def trained(kernel: Kernel[Any], steps: int = 6) -> Trained:
    energy, objective = Net(), ReplayBufferCD(8, k=6, kernel=kernel)
    fit(energy, objective, data(), num_steps=steps, batch_size=8, progress=False)
    assert objective.chains is not None
    return [p.detach().clone() for p in energy.parameters()], objective.chains


@pytest.mark.parametrize(
    ("kernel", "support"),
    [(ULA(0.2), constraints.real), (MALA(0.2), constraints.real), (ULA(0.2), constraints.positive)],
    ids=["ula", "mala", "positive"],
)
def test_compiled_chains_draw_what_eager_ones_draw(
    kernel: Kernel[Any], support: constraints.Constraint
) -> None:
    """Six steps: a block of four and one of two; the energy is traced in eval mode, so that dropout
    is no random number."""
    energy = Net(support, dropout=0.5).train()
    torch.testing.assert_close(
        moved(energy, CompiledKernel(kernel)), moved(energy, kernel), rtol=1e-9, atol=1e-9
    )
    assert energy.training
    assert all(p.requires_grad and p.grad is None for p in energy.parameters())


def test_a_row_that_is_not_finite_in_a_block_of_steps_touches_no_other() -> None:
    energy, kernel = Fragile().double(), ULA(step_size=1.0)
    x = torch.linspace(-1.4, 1.4, 16, dtype=torch.float64)
    first = kernel.init(energy, x)
    eager, rate = kernel.steps(energy, first, 8, torch.Generator().manual_seed(0))
    state, compiled_rate = kernel.steps(
        Compiled(energy), first, 8, torch.Generator().manual_seed(0)
    )
    assert 0 < int((rate < 1).sum()) < 16
    assert torch.equal(compiled_rate, rate)
    torch.testing.assert_close(state, eager)


def test_training_with_compiled_chains_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters change at each step, in place: the graph has them as inputs, and is made once."""
    made = []
    built = pyroebm.core.compilation.compiled_call
    monkeypatch.setattr(pyroebm.core.compilation, "_graphs", {})
    monkeypatch.setattr(
        pyroebm.core.compilation, "compiled_call", lambda *args: made.append(1) or built(*args)
    )
    kernel = CompiledKernel(ULA(0.2))
    torch.testing.assert_close(trained(kernel), trained(ULA(0.2)), rtol=1e-7, atol=1e-7)
    assert len(made) == 3  # the probe, four steps and two


def test_an_energy_that_moved_or_another_one_is_not_taken_for_the_one_before() -> None:
    kernel, energy = CompiledKernel(ULA(0.2)), Net()
    moved(energy, kernel)
    with torch.no_grad():
        for module in (m for m in energy.modules() if isinstance(m, nn.Linear)):
            module.weight = nn.Parameter(-module.weight)
    torch.testing.assert_close(moved(energy, kernel), moved(energy, ULA(0.2)))
    other = Net()
    torch.testing.assert_close(moved(other, kernel), moved(other, ULA(0.2)))


def test_auto_depends_on_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few planned steps are not worth it, many are; two trainings of one plan are equal bit for
    bit."""
    seen = []
    choose = compiling.choose_compiled

    def noted(*args: Any) -> Energy:
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(compiling, "choose_compiled", noted)
    trained(CompiledKernel(ULA(0.2), num_planned_steps=36), steps=2)
    assert not isinstance(seen[-1], Compiled)
    once = trained(CompiledKernel(ULA(0.2), num_planned_steps=10**7), steps=2)
    assert isinstance(seen[-1], Compiled)
    again = trained(CompiledKernel(ULA(0.2), num_planned_steps=10**7), steps=2)
    torch.testing.assert_close(again, once, rtol=0.0, atol=0.0)
    assert len(seen) == 3  # chosen once for each training


def test_it_is_the_kernel_inside_to_whoever_asks() -> None:
    kernel = CompiledKernel(ULA(0.2, temperature=0.5))
    assert (kernel.exact, kernel.discrete, kernel.expected_gradients) == (False, False, 1.0)
    assert (kernel.temperature, kernel.step_size) == (0.5, 0.2)
    assert CompiledKernel(Gibbs()).discrete
    objective = ContrastiveDivergence(k=2, kernel=kernel)
    objective(Net(), data())
    assert copy.deepcopy(objective).kernel.step_size == 0.2
    assert list(objective.parameters()) == []
    with pytest.raises(AttributeError, match="nothing"):
        kernel.nothing  # noqa: B018
    with pytest.raises(
        ValueError,
        match="num_planned_steps must be an integer of at least 1, got num_planned_steps=0",
    ):
        CompiledKernel(ULA(0.2), num_planned_steps=0)
    with pytest.raises(ValueError, match=r"kernel must be one of pyroebm\.kernels, got float"):
        CompiledKernel(0.2)  # type: ignore[arg-type]


# Mutants


def test_mutant_view_that_is_never_made_anew_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_held", lambda energy: [])
    with pytest.raises(AssertionError):
        test_an_energy_that_moved_or_another_one_is_not_taken_for_the_one_before()


class Learned(PyroModule[nn.Module]):
    """A model whose scale is derived from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self) -> None:
        pyro.sample("x", dist.Normal(self.w.exp(), 1.0))


@pytest.mark.parametrize("kernel", [NUTS(0.3), HMC(0.3, num_steps=2)], ids=["nuts", "hmc"])
def test_a_model_trained_between_steps_is_seen(kernel: Kernel[Any]) -> None:
    model = Learned()
    energy = ModelEnergy(model)
    chains: Kernel[Any] = CompiledKernel(kernel)
    state = chains.init(energy, torch.zeros(4, 1, dtype=torch.float64))
    for value in (0.0, 2.0):
        with torch.no_grad():
            model.w.fill_(value)
        state = chains.refresh(energy, state)
        state, _ = chains.step(energy, state, torch.Generator().manual_seed(0))
        torch.testing.assert_close(state.energy, energy(state.x).detach())


@pytest.mark.parametrize("kernel", [MCLMC(), ChEES()], ids=["mclmc", "chees"])
def test_an_adaptation_of_the_inner_kernel_is_not_replaced_in_silence(kernel: Any) -> None:
    mcmc = MCMC(CompiledKernel(kernel), 10, 10, 4, seed=0)
    with pytest.raises(ValueError, match=f"kernel must be {type(kernel).__name__}"):
        mcmc.run(Gaussian(torch.zeros(3)))
