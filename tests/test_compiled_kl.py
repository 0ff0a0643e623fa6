"""The compiled reverse KL divergence: the numbers of the eager one, while parameters, temperature and batches change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyroebm.objectives.compiled_kl as module
from pyroebm import Energy
from pyroebm.flows import NICE, Flow, MixtureBase, RealNVP, RedundantNICE
from pyroebm.objectives import CompiledKL, ReverseKL, fit_flow
from pyroebm.randomness import seeded_generator
from pyroebm.targets import DoubleWell, Gaussian

F64 = torch.float64
SMALL: dict[str, Any] = {"hidden": (8,), "dtype": F64}
FLOWS: dict[str, Callable[[], tuple[Flow, Energy]]] = {
    "nice": lambda: (NICE(2, couplings=2, **SMALL), Gaussian([0.5, -1.0], scale=0.7, dtype=F64)),
    "redundant": lambda: (RedundantNICE(1, 2, couplings=2, **SMALL), DoubleWell(dtype=F64)),
    "realnvp of a mixture": lambda: (
        RealNVP(2, layers=2, base=MixtureBase(2, 3, dtype=F64), **SMALL),
        Gaussian([0.5, -1.0], scale=0.7, dtype=F64),
    ),
}


def traced(function: Callable[..., tuple[Tensor, ...]], examples: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    return make_fx(function)(*examples)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it was traced: what TorchInductor makes of graphs is tested in test_compiled.py."""
    monkeypatch.setattr(module, "compiled_call", traced)


def gradients(objective: ReverseKL, flow: Flow, energy: Energy, beta: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    flow.zero_grad()
    loss, facts = objective(flow, energy, 32, beta=beta, generator=seeded_generator(seed))
    loss.backward()
    return torch.stack([loss.detach(), *facts.values()]), [p.grad.clone() for p in flow.parameters() if p.grad is not None]


def check_same_numbers(objective: CompiledKL, flow: Flow, energy: Energy) -> None:
    eager = ReverseKL(objective.entropy, objective.gradient)
    for seed, beta in ((1, 1.0), (2, 0.3)):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=F64, generator=seeded_generator(seed)))
        ours, theirs = (gradients(one, flow, energy, beta, seed) for one in (objective, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda found: f"other numbers: {found}")


@pytest.mark.parametrize("options", [("sampled", "stl"), ("exact", "total")])
@pytest.mark.parametrize("name", FLOWS)
def test_numbers_are_those_of_the_eager_one(name: str, options: tuple[str, str], no_compiler: None) -> None:
    flow, energy = FLOWS[name]()
    if options[0] == "exact" and not isinstance(flow, RedundantNICE):
        pytest.skip("no closed form of the entropy")
    check_same_numbers(CompiledKL(*options), flow, energy)


def test_one_graph_serves_a_fit_and_another_flow_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(module, "compiled_call", lambda *given, **told: made.append(1) or traced(*given, **told))
    objective = CompiledKL()
    for count in (1, 2):
        flow, energy = FLOWS["nice"]()
        losses = [loss for _, loss, _ in fit_flow(flow, energy, objective, steps=5, num_samples=16, progress=False)]
        flow, energy = FLOWS["nice"]()
        eager = [loss for _, loss, _ in fit_flow(flow, energy, steps=5, num_samples=16, progress=False)]
        torch.testing.assert_close(losses, eager)
        assert len(made) == count


def test_mutant_with_a_temperature_of_its_own_is_caught(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    scaled = module._Scaled
    monkeypatch.setattr(module, "_Scaled", lambda energy, beta: scaled(energy, torch.ones_like(beta)))
    with pytest.raises(AssertionError, match="other numbers"):
        check_same_numbers(CompiledKL(), *FLOWS["nice"]())


@pytest.mark.slow
def test_compiled_numbers_are_those_of_the_eager_one() -> None:
    check_same_numbers(CompiledKL(), *FLOWS["nice"]())
