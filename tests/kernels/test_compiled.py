"""Compiled loops and gradients: the same draws as without them, nothing stale, and what cannot be
compiled is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lib.kernel_cases import Fragile, build, run
from torch import Tensor, nn

import pyroebm.core.compilation
from pyroebm import HMC, MALA, MCMC, NUTS, Energy
from pyroebm.core.compilation import (
    Compiled,
    CompiledGradient,
    choose_compiled,
    fused,
    is_compiled,
)
from pyroebm.core.energy import unchecked_value_and_grad, value_and_grad
from pyroebm.kernels import Kernel, State
from pyroebm.kernels.metric import Diagonal, Identity, Metric
from pyroebm.targets import DoubleWell, Gaussian, scales_gaussian

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="compiled blocks need a C++ compiler, and none is here"
)


class Net(Energy):
    """A small network with a quadratic floor: parameters that are trained between runs."""

    def __init__(self) -> None:
        super().__init__((3,))
        self.net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) + 0.5 * (x**2).sum(-1)


class Branching(Energy):
    def forward(self, x: Tensor) -> Tensor:
        return x**2 if bool((x > 0).any()) else 2 * x**2


class Scaled(Energy):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__((1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x**2).sum(-1)


class Masked(Energy):
    """Constant masks as indices: of what comes in, of what is written to, of a parameter."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__((3,))
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.zeros_like(x)
        shifted[..., self.mask] = x[..., self.mask] + self.weights[self.mask]
        late = torch.ones(3, dtype=torch.bool)
        late[0] = False
        kept = torch.masked_select(self.weights, late)
        return (shifted**2).sum(-1) + (kept * x[..., late] ** 2).sum(-1)


class Noisy(Energy):
    def forward(self, x: Tensor) -> Tensor:
        return x**2 + 0.0 * torch.rand_like(x)


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroebm.core.compilation, "_graphs", {})


def compiled_for(kernel: Kernel[Any], energy: Energy, shape: torch.Size) -> Energy:
    """What the kernel asks to be compiled."""
    if kernel.compiles == "loops":
        return Compiled(energy)
    view = CompiledGradient(energy)
    view.prepare(shape)
    return view


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts-metric", "lockstep"])
def test_compiled_kernels_draw_what_eager_ones_draw(name: str) -> None:
    energy = DoubleWell().double()
    x = energy.sample(40, torch.Generator().manual_seed(0))
    kernel = build(name).replace(step_size=0.15)  # trees of several levels
    view = compiled_for(kernel, energy, x.shape)
    torch.testing.assert_close(
        run(kernel, view, x, 6), run(kernel, energy, x, 6), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "kernel",
    [HMC(step_size=1.0, num_steps=1), NUTS(step_size=1.0, max_tree_depth=2)],
    ids=["hmc", "nuts"],
)
def test_a_nan_row_in_a_compiled_block_touches_no_other(kernel: Kernel[Any]) -> None:
    x = torch.linspace(-1.4, 1.4, 16, dtype=torch.float64)
    energy = Fragile().double()
    view = compiled_for(kernel, energy, x.shape)
    state, info = kernel.step(view, kernel.init(energy, x), torch.Generator().manual_seed(0))
    eager, expected = kernel.step(energy, kernel.init(energy, x), torch.Generator().manual_seed(0))
    assert info.diverging.any()
    assert torch.equal(info.diverging, expected.diverging)
    assert torch.equal(info.n_steps, expected.n_steps)
    torch.testing.assert_close(state.x, eager.x)


def test_a_new_view_sees_what_changed_in_python() -> None:
    energy = Scaled().double()
    x, kernel = torch.ones(4, 1, dtype=torch.float64), MALA(step_size=0.3)
    before = run(kernel, Compiled(energy), x, 2)
    energy.scale = 9.0
    after = run(kernel, Compiled(energy), x, 2)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, run(kernel, energy, x, 2))


def test_parameters_are_inputs_so_that_training_in_place_is_seen() -> None:
    torch.manual_seed(0)
    energy = Net().double()
    view, kernel = Compiled(energy), MALA(step_size=0.3)
    x = energy.initial(8, torch.Generator().manual_seed(1))
    before = run(kernel, view, x, 3)
    torch.testing.assert_close(before, run(kernel, energy, x, 3))
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(3.0)
    after = run(kernel, view, x, 3)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, run(kernel, energy, x, 3))
    assert all(parameter.grad is None for parameter in energy.parameters())


def gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    return unchecked_value_and_grad(energy, x)


def test_constant_masks_are_compiled() -> None:
    energy = Masked()
    view, x = Compiled(energy), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused(gradient, view, x), gradient(energy, x))
    with torch.no_grad():
        energy.weights.mul_(2.0)
    torch.testing.assert_close(fused(gradient, view, x), gradient(energy, x))


def test_two_energies_of_equal_code_share_a_graph_and_keep_their_own_numbers() -> None:
    one, two = (Gaussian(torch.full((2,), mean, dtype=torch.float64)) for mean in (0.0, 5.0))
    x = torch.zeros(4, 2, dtype=torch.float64)
    a, b = (run(MALA(step_size=0.5), Compiled(energy), x, 2) for energy in (one, two))
    assert len(pyroebm.core.compilation._graphs) == 1
    assert not torch.allclose(a, b)
    torch.testing.assert_close(b, run(MALA(step_size=0.5), two, x, 2))


class Strided(Energy):
    """Holds tensors of any strides, one of them twice."""

    def __init__(self, matrix: Tensor, vector: Tensor) -> None:
        super().__init__((3,))
        self.matrix = matrix
        self.vector = self.again = vector

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.matrix - self.vector) ** 2).sum(-1) + (x * self.again).sum(-1)


@pytest.mark.parametrize("compiled", ["loops", "gradient"])
def test_tensors_of_any_strides_are_held(compiled: str) -> None:
    """Energies of equal code, whose tensors differ in strides alone, or come twice and once."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    square = torch.arange(9.0).reshape(3, 3)
    for matrix in (square, square.mT, torch.arange(3.0).expand(3, 3), torch.ones(6, 3)[::2]):
        energy = Strided(matrix, torch.arange(6.0)[::2])
        for again in (energy.vector, torch.ones(6)[::2]):
            energy.again = again
            view: Energy = Compiled(energy)
            if compiled == "gradient":
                view = CompiledGradient(energy)
                view.prepare(x.shape)
                found = unchecked_value_and_grad(view, x)
            else:
                found = fused(gradient, view, x)
            torch.testing.assert_close(found, gradient(energy, x))


def double(energy: Energy, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + energy(y), y


def test_an_input_that_comes_twice_is_not_taken_for_one() -> None:
    view, x = Compiled(DoubleWell().double()), torch.tensor([1.0], dtype=torch.float64)
    assert fused(double, view, x, x)[0].tolist() == [-1.0]
    assert fused(double, view, 2 * x, x)[0].tolist() == [0.0]


class Pushed(NamedTuple):
    state: State
    by: Tensor


def pushed(energy: Energy, state: State, sizes: tuple[Tensor, Tensor], metric: Metric) -> Pushed:
    by = sizes[0] * metric.apply(state.grad) - sizes[1]
    return Pushed(State(state.x + by, *unchecked_value_and_grad(energy, state.x + by)), by)


@pytest.mark.parametrize("metric", [Identity(), Diagonal(torch.tensor([2.0]).double())])
def test_named_structures_go_in_and_out_of_compiled_functions(metric: Metric) -> None:
    """Each field by its name, whatever the order in which they were made; metrics of another kind,
    also one without tensors, are another graph."""
    energy = Scaled().double()
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = State(grad=4.0 * x, energy=3.0 * x[:, 0], x=x)
    inputs = state, (torch.tensor(0.5).double(), torch.tensor(0.25).double()), metric
    view = Compiled(energy)
    for _ in range(2):
        found = fused(pushed, view, *inputs)
        assert isinstance(found, Pushed)
        assert isinstance(found.state, State)
        torch.testing.assert_close(found, pushed(energy, *inputs))
    assert len(view._calls) == 1


@pytest.mark.parametrize(
    ("energy", "reason"),
    [(Branching().double(), "data"), (Noisy().double(), "no random numbers, got aten.rand")],
)
def test_what_cannot_be_compiled_says_so_and_runs_as_it_is(
    energy: Energy, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyroebm.core.compilation, "_COMPILE_SECONDS", 0.0)
    for kernel in (NUTS(), HMC()):
        with pytest.raises(
            RuntimeError, match=f"{type(energy).__name__} cannot be compiled .*{reason}"
        ):
            choose_compiled(energy, True, kernel, 4, 10)
        with pytest.warns(
            RuntimeWarning, match=r"cannot be compiled \(.*\) and runs without compilation"
        ):
            assert choose_compiled(energy, "auto", kernel, 4, 10**6) is energy


class Infeasible(Net):
    """An energy of which no state of finite energy is found, as with a user's own starts."""

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        raise ValueError("no initial state of finite energy was found")


def test_an_energy_that_finds_no_start_is_compiled() -> None:
    energy = Infeasible().double().requires_grad_(False)
    view = choose_compiled(energy, True, NUTS(), 4, 10)
    assert is_compiled(view)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(value_and_grad(view, x), value_and_grad(energy, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_later_block_that_fails_stops_no_run_that_was_not_told_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy, kernel = DoubleWell().double(), MALA(step_size=0.2)
    monkeypatch.setattr(pyroebm.core.compilation, "_COMPILE_SECONDS", 0.0)
    view = choose_compiled(energy, "auto", kernel, 4, 10)
    assert isinstance(view, Compiled)

    def broken(*arguments: Any, **settings: Any) -> None:
        raise ImportError("file too short")

    monkeypatch.setattr(pyroebm.core.compilation, "compiled_call", broken)
    x = energy.initial(4, torch.Generator().manual_seed(0))
    with pytest.warns(
        RuntimeWarning,
        match="DoubleWell cannot be compiled .ImportError: file too short. and runs without",
    ):
        draws = run(kernel, view, x, 3)
    torch.testing.assert_close(draws, run(kernel, energy, x, 3))
    with pytest.raises(RuntimeError, match="file too short"):
        run(kernel, Compiled(energy), x, 3)


def test_without_a_compiler_it_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        choose_compiled(DoubleWell(), True, NUTS(), 4, 10)
    with pytest.raises(
        ValueError, match="compile must be True, False or \"auto\", got compile='yes'"
    ):
        choose_compiled(DoubleWell(), "yes", NUTS(), 4, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "chains", "steps", "compiled"),
    [
        (NUTS(), 64, 1_500, False),  # the default on a small problem never pays for compiling
        (NUTS(), 64, 100_000, True),
        (MALA(), 64, 100_000, False),
        (HMC(), 100_000, 10_000, True),
    ],
)
def test_auto_decides_from_shapes_and_planned_steps(
    kernel: Kernel, chains: int, steps: int, compiled: bool
) -> None:
    energy = scales_gaussian()
    said: list[str] = []
    view = choose_compiled(energy, "auto", kernel, chains, steps, said.append)
    assert is_compiled(view) == compiled == bool(said)


class Long(Energy):
    """A recurrence: many small operations, as in a time series."""

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(60):
            state = 0.9 * state + 0.1 * torch.tanh(state)
        return 0.5 * state**2


def test_a_gradient_of_many_operations_is_compiled_for_fewer_steps() -> None:
    """What decides is what the gradient costs, and not the number of steps alone."""
    short, long = DoubleWell().double(), Long().double()
    assert is_compiled(choose_compiled(long, "auto", NUTS(), 4, 2_000))
    assert not is_compiled(choose_compiled(short, "auto", NUTS(), 4, 2_000))


def test_a_compiled_gradient_sees_parameters_trained_in_place_and_other_shapes() -> None:
    torch.manual_seed(0)
    energy = Net().double()
    x = energy.initial(8, torch.Generator().manual_seed(1))
    view = CompiledGradient(energy)
    view.prepare(x.shape)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.mul_(factor)
        # a batch of another size runs as it is, and one of other strides is read by them
        for part in (x, x[:3], x.mT.contiguous().mT, x[:1].expand(8, 3)):
            found, expected = value_and_grad(view, part), value_and_grad(energy, part)
            torch.testing.assert_close(found, expected)


INTERRUPTED = """
import os, signal, sys, threading, torch
from pyroebm import MCMC, NUTS
from pyroebm.core import _torch_private, compilation
from pyroebm.targets import DoubleWell
compile_graph = compilation.compile_graph
def noticed(*arguments):
    # as a terminal does: the signal goes to the whole group of processes
    threading.Timer(float(sys.argv[1]), os.killpg, (os.getpgrp(), signal.SIGINT)).start()
    return compile_graph(*arguments)
compilation.compile_graph = noticed
mcmc = MCMC(NUTS(), 50, 50, 4, seed=0, compile=True, progress=False)
mcmc.run(DoubleWell().double())
assert mcmc.interrupted
compilation.compile_graph = compile_graph
mcmc.resume()
print(mcmc.get_samples(group_by_chain=True)["x"].shape, mcmc.compiled)
"""


@pytest.mark.parametrize("delay", [0.3, 1.5])
def test_ctrl_c_while_compiling_ends_as_cleanly_as_anywhere(delay: float, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(delay)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert done.stdout.strip() == "torch.Size([4, 50]) True", done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted during compilation: 0 draws of each chain were kept" in done.stderr


def test_a_second_process_finds_the_compiled_gradient(tmp_path: Path) -> None:
    script = """
from torch._dynamo.utils import counters
import torch
from pyroebm.core.compilation import CompiledGradient
from pyroebm.targets import DoubleWell
view = CompiledGradient(DoubleWell().double())
view.prepare(torch.Size([4]))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert found == [["0", "1"], ["1", "0"]]


def test_mcmc_compiled_draws_what_it_draws_without_and_tells_the_choice() -> None:
    draws = {}
    for choice in (True, False):
        # MALA has one block; those of HMC are compared above
        mcmc = MCMC(MALA(), 10, 5, 8, seed=0, compile=choice, progress=False)
        assert mcmc.compiled is None
        mcmc.run(DoubleWell().double())
        assert mcmc.compiled is choice
        mcmc.run_more(5)
        draws[choice] = mcmc.get_samples()["x"]
    torch.testing.assert_close(draws[True], draws[False], rtol=1e-7, atol=1e-7)


# Mutants


def test_mutant_constants_baked_into_the_graph_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroebm.core.compilation, "_lift_constants", lambda graph: ())
    with pytest.raises(AssertionError):
        test_two_energies_of_equal_code_share_a_graph_and_keep_their_own_numbers()


def test_mutant_inputs_traced_as_they_come_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroebm.core.compilation, "_copies", lambda tensors: tensors)
    with pytest.raises(AssertionError):
        test_an_input_that_comes_twice_is_not_taken_for_one()


class Correlated(Energy):
    """A density whose graph has an operation that TorchInductor leaves to ATen."""

    def __init__(self) -> None:
        super().__init__((2,))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.eye(2, dtype=x.dtype)
        covariance = one + 0.5 * torch.exp(-(x[..., :1, None] ** 2)) * (1.0 - one)
        return (torch.linalg.cholesky(covariance) * x[..., None, :]).square().sum((-1, -2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [DoubleWell, scales_gaussian, Net])
def test_a_bound_gradient_is_computed_in_place(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    energy = make().to(dtype)
    x = torch.randn(5, *energy.event_shape, dtype=dtype)
    view = CompiledGradient(energy)
    assert view.bound_to(x) is None  # nothing was prepared
    view.prepare(x.shape)
    bound = view.bound_to(x)
    assert bound is not None
    values, grad, compute = bound
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.add_(0.1)
        compute()
        expected, slope = unchecked_value_and_grad(view, x)
        assert torch.equal(values, expected)
        assert torch.equal(grad, slope)


def test_a_graph_that_allocates_on_its_own_is_not_bound() -> None:
    energy, x = Correlated().double(), torch.ones(4, 2, dtype=torch.float64)
    view = CompiledGradient(energy)
    view.prepare(x.shape)
    assert view.bound_to(x) is None
    mcmc = MCMC(NUTS(), 20, 20, num_chains=4, seed=0, progress=False, compile=True)
    mcmc.run(energy)
    assert mcmc.get_samples()["x"].isfinite().all()


class Transposed(Energy):
    """An energy whose compiled gradient is not contiguous."""

    def __init__(self) -> None:
        super().__init__((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=x.dtype)
        return 0.5 * (x.mT @ scale).square().sum((-1, -2))


@pytest.mark.parametrize("make", [Net, Transposed])
def test_a_run_calls_no_more_than_the_recorded_kernels(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws as from the graph as it is called, and the graph is called at most where
    starts are tried and where chains take single steps."""
    calls = []
    plain = CompiledGradient._value_and_grad
    monkeypatch.setattr(
        CompiledGradient, "_value_and_grad", lambda self, x: calls.append(1) or plain(self, x)
    )

    def draws() -> Tensor:
        calls.clear()
        mcmc = MCMC(NUTS(), 200, 20, num_chains=4, seed=0, progress=False, compile=True)
        mcmc.run(make().double())
        return mcmc.get_samples()["x"]

    torch.manual_seed(0)
    recorded, few = draws(), len(calls)
    monkeypatch.setattr(pyroebm.core.compilation, "record_calls", lambda call, inputs: None)
    torch.manual_seed(0)
    assert torch.equal(draws(), recorded)
    assert 2 * few < len(calls)
