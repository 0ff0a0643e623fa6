"""The compiled reverse KL divergence: the numbers of the eager one, while parameters, temperature
and batches change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyroebm import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.flows import (
    NICE,
    Flow,
    MixtureBase,
    RealNVP,
    RedundantNICE,
    SplineFlow,
    Symmetrized,
    sign_flips,
)
from pyroebm.objectives import CompiledKL, ReverseKL
from pyroebm.objectives.variational import compiled_kl as module
from pyroebm.targets import DoubleWell, Gaussian
from pyroebm.training import fit

F64 = torch.float64
SMALL: dict[str, Any] = {"hidden_sizes": (8,), "dtype": F64}
FLOWS: dict[str, Callable[[], tuple[Flow, Energy]]] = {
    "nice": lambda: (NICE(2, num_layers=2, **SMALL), Gaussian([0.5, -1.0], scale=0.7, dtype=F64)),
    "redundant": lambda: (RedundantNICE(1, 2, num_layers=2, **SMALL), DoubleWell(dtype=F64)),
    "realnvp of a mixture": lambda: (
        RealNVP(2, num_layers=2, base=MixtureBase(2, 3, dtype=F64), **SMALL),
        Gaussian([0.5, -1.0], scale=0.7, dtype=F64),
    ),
    "learned weights": lambda: (
        RealNVP(2, num_layers=2, base=MixtureBase(2, 3, learn_weights=True, dtype=F64), **SMALL),
        Gaussian([0.5, -1.0], scale=0.7, dtype=F64),
    ),
    "spline": lambda: (
        SplineFlow(2, 1, num_bins=4, **SMALL),
        Gaussian([0.5, -1.0], scale=0.7, dtype=F64),
    ),
    "symmetrized": lambda: (
        Symmetrized(RealNVP(2, num_layers=2, **SMALL), sign_flips(2)),
        Gaussian([0.5, -1.0], scale=0.7, dtype=F64),
    ),
}


def traced(
    function: Callable[..., tuple[Tensor, ...]],
    examples: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Any:
    return make_fx(function)(*examples)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it was traced: what TorchInductor makes of graphs is tested in
    test_compiled.py."""
    monkeypatch.setattr(module, "compiled_call", traced)


def gradients(
    objective: ReverseKL, flow: Flow, beta: float, seed: int
) -> tuple[Tensor, list[Tensor]]:
    flow.zero_grad()
    objective.beta = beta
    loss, metrics = objective(flow, generator=seeded_generator(seed))
    loss.backward()
    return torch.stack([loss.detach(), *metrics.values()]), [
        p.grad.clone() for p in flow.parameters() if p.grad is not None
    ]


def check_same_numbers(objective: CompiledKL, flow: Flow) -> None:
    eager = ReverseKL(objective.energy, 32, gradient=objective.gradient)
    for seed, beta in ((1, 1.0), (2, 0.3)):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, dtype=F64, generator=seeded_generator(seed))
                )
        ours, theirs = (gradients(one, flow, beta, seed) for one in (objective, eager))
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda found: f"other numbers: {found}"
        )


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("gradient", ["stl", "total"])
def test_numbers_are_those_of_the_eager_one(name: str, gradient: str, no_compiler: None) -> None:
    flow, energy = FLOWS[name]()
    check_same_numbers(CompiledKL(energy, 32, gradient=gradient), flow)


def test_one_graph_serves_a_fit_and_another_flow_gets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        module, "compiled_call", lambda *given, **told: made.append(1) or traced(*given, **told)
    )
    start, energy = FLOWS["nice"]()
    objective = CompiledKL(energy, 16)
    for count in (1, 2):
        losses, eager = (
            fit(copy.deepcopy(start), one, num_steps=5, progress=False)["loss"]
            for one in (objective, ReverseKL(energy, 16))
        )
        torch.testing.assert_close(losses, eager)
        assert len(made) == count


class _Doubled(nn.Module):
    """A conditioner that gives twice as much in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return (2.0 if self.training else 1.0) * self.linear(z)


CHANGES: dict[str, Callable[[NICE, Gaussian], Any]] = {
    "freezing": lambda flow, energy: flow.linear.requires_grad_(False),
    "unfreezing": lambda flow, energy: flow.requires_grad_(True),
    "another parameter": lambda flow, energy: setattr(
        flow.linear, "below", nn.Parameter(torch.ones(2, 2, dtype=F64))
    ),
    "another buffer": lambda flow, energy: setattr(energy, "loc", torch.ones(2, dtype=F64)),
    "another layer": lambda flow, energy: setattr(
        flow.transform.parts[1], "net", nn.Linear(1, 1, dtype=F64)
    ),
    "evaluation": lambda flow, energy: flow.eval(),
}


def changing() -> tuple[NICE, Gaussian]:
    flow = NICE(2, num_layers=2, **SMALL)
    flow.transform.parts[0].net = _Doubled()
    flow.transform.parts[1].requires_grad_(False)
    return flow, Gaussian([0.5, -1.0], scale=0.7, dtype=F64)


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_what_was_traced_is_seen(name: str, no_compiler: None) -> None:
    flow, energy = changing()
    objective = CompiledKL(energy, 32)
    check_same_numbers(objective, flow)
    CHANGES[name](flow, energy)
    check_same_numbers(objective, flow)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradients(context: Callable[[], Any], no_compiler: None) -> None:
    flow, energy = FLOWS["nice"]()
    with context():
        ours, theirs = (
            one(energy, 32)(flow, generator=seeded_generator(1))[0]
            for one in (CompiledKL, ReverseKL)
        )
    torch.testing.assert_close(ours, theirs)
    assert not ours.requires_grad
    objective = CompiledKL(energy, 32)
    with context():
        objective(flow)
    check_same_numbers(objective, flow)


class _Branching(Energy):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(-1) if float(x.detach().mean()) > 0.0 else x.abs().sum(-1)


def test_what_cannot_be_traced_is_named(no_compiler: None) -> None:
    flow = NICE(2, **SMALL)
    with pytest.raises(
        RuntimeError, match=r"NICE with _Branching cannot be compiled; use ReverseKL"
    ):
        CompiledKL(_Branching((2,)).double())(flow)
    with pytest.raises(ValueError, match="the same dtype"):
        CompiledKL(Gaussian([0.5, -1.0]))(flow)


def test_mutant_with_a_temperature_of_its_own_is_caught(
    monkeypatch: pytest.MonkeyPatch, no_compiler: None
) -> None:
    scaled = module._Scaled
    monkeypatch.setattr(
        module, "_Scaled", lambda energy, beta: scaled(energy, torch.ones_like(beta))
    )
    flow, energy = FLOWS["nice"]()
    with pytest.raises(AssertionError, match="other numbers"):
        check_same_numbers(CompiledKL(energy, 32), flow)


@pytest.mark.slow
def test_compiled_numbers_are_those_of_the_eager_one() -> None:
    flow, energy = FLOWS["nice"]()
    check_same_numbers(CompiledKL(energy, 32), flow)
