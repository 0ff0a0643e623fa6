"""Code for one row runs on all rows: as a captured graph with the values and gradients of a loop,
or with a reason why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lib.graphs import data_dependent
from pyro.distributions import Beta
from pyro.ops.special import safe_log
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from pyroebm.core import value_and_grad
from pyroebm.core._torch_private import FixedShapes, PerturbedRounding
from pyroebm.core.rowwise import RowsInABatch, RowwiseEnergy, map_rows

pytestmark = pytest.mark.usefixtures("float64")

Row = Callable[[Tensor], Tensor]


class Rows(RowwiseEnergy):
    """A function of three numbers."""

    def __init__(self, row: Row, dtype: torch.dtype | None = None) -> None:
        super().__init__({"u": torch.Size([3])}, torch.zeros(1, dtype=dtype))
        self.row = row
        self.batch_by(torch.tensor([[0.3, -0.7, 1.1], [0.9, 0.2, -0.4]], dtype=dtype))

    def row_energy(self, u: Tensor) -> Tensor:
        return self.row(u)


DATA = torch.tensor([-1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
MASK = DATA > 0.0
PLACES = torch.tensor([0, 2, 3])


def written(write: Callable[[Tensor, Tensor], Any], *shape: int) -> Row:
    """A number that depends on every entry of a constant after something was written into it, or
    of what ``write`` returns."""

    def row(u: Tensor) -> Tensor:
        v = torch.full(shape or (4,), 0.5)
        result = write(v, u)
        v = v if result is None else result
        return (v * torch.arange(1.0, 1 + v.numel()).reshape(v.shape)).sin().sum() + (u**2).sum()

    return row


def items(v: Tensor, u: Tensor) -> None:
    v[0] = u[0]
    v[1:3] = u[1:]
    v[3] += u[0]
    v[-1] *= 2.0


def recursion(v: Tensor, u: Tensor) -> None:
    for i in range(3):
        v[i + 1] = 0.5 * v[i] + u[i]


def view_of_before(v: Tensor, u: Tensor) -> None:
    tail = v.view(2, 2)[1]
    tail[0] = u[0]


def base_of_before(v: Tensor, u: Tensor) -> Tensor:
    column = v.T[1]
    v[0] = u
    return column


def sums(v: Tensor, u: Tensor) -> Tensor:
    total = torch.zeros(())
    for x in u:
        total += x**2
    v += total
    v -= u[0]
    v /= 1.0 + u[1] ** 2
    v **= 2.0
    return v.add_(u.sum(), alpha=2.0).mul_(u[2])


def masks_of_rows(v: Tensor, u: Tensor) -> None:
    v[:3] = u
    v[v > 0.4] = 0.1
    v[v < 0.0] = u[0]
    v.masked_fill_(v == 0.5, u[1])


def constants_change(v: Tensor, u: Tensor) -> Tensor:
    scale = torch.ones(4)
    before = scale * 2.0
    scale += 1.0
    mask = torch.ones(4, dtype=torch.bool)
    mask[0] = False
    v[mask] = u
    return v * before + scale * u.sum()


def branches_on_data(u: Tensor) -> Tensor:
    if torch.equal(DATA, DATA.clone()) and bool((DATA > 0).any()) and DATA.max() > 1:
        return (u**2).sum() * float(DATA.sum())
    return u.sum()


def triangle(v: Tensor, u: Tensor) -> Tensor:
    low = torch.ones(3, 3, dtype=torch.bool).tril(-1)
    v[low] = u
    v[..., low[1]] += u[:1]
    v[torch.arange(3), torch.arange(3)] = u.exp()
    v.T[0] -= u
    torch.diagonal(v).mul_(u)
    return v @ v.T


#: What is captured.
ROWS: dict[str, Row] = {
    "items": written(items),
    "recursion": written(recursion),
    "sums": written(sums),
    "a view that was made before": written(view_of_before),
    "the base of a view that was made before": written(base_of_before, 3, 3),
    "triangle": written(triangle, 3, 3),
    "copy": written(lambda v, u: v[1:].copy_(u)),
    "fill": written(lambda v, u: v.fill_(u[0])),
    "data": written(lambda v, u: DATA.clone().masked_scatter_(MASK, u)),
    "zeros like data": written(lambda v, u: torch.zeros_like(DATA).index_add_(0, PLACES, u)),
    "scatter": written(lambda v, u: v.scatter_(0, PLACES, u)),
    "scatter_add": written(lambda v, u: v.scatter_add_(0, PLACES, u)),
    "index_copy": written(lambda v, u: v.index_copy_(0, PLACES, u)),
    "index_fill": written(lambda v, u: v.index_fill_(0, PLACES, u[0])),
    "index_put": written(lambda v, u: v.index_put_((MASK,), u)),
    "addcmul": written(lambda v, u: v[1:].addcmul_(u, u)),
    "lerp": written(lambda v, u: v.lerp_(u[0].expand(4), 0.3)),
    "a row's place": written(lambda v, u: v.__setitem__(u.argmax(), 3.0)),
    "masks of rows": written(masks_of_rows),
    "constants that change": written(constants_change),
    "mask": lambda u: (u[DATA[1:] > 0.4] ** 2).sum(),
    "masked_select": lambda u: torch.masked_select(u.expand(2, 3), DATA[1:] > 0.4).sin().sum(),
    "masked_scatter": lambda u: torch.zeros(2, 4).masked_scatter(MASK, u.repeat(2)).cos().sum(),
    "branches on data": branches_on_data,
    "x.data": lambda u: (u.data * u).sum(),
    "a draw that does not enter": lambda u: (u**2).sum() + 0.0 * len(torch.normal(u, 1.0)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_captured_with_the_values_of_a_loop(name: str) -> None:
    energy, u = Rows(ROWS[name]), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert energy.batching == "graph"
    assert not data_dependent(energy, u)
    found = value_and_grad(energy, u)
    energy.batching = "loop"
    torch.testing.assert_close(found, value_and_grad(energy, u), rtol=1e-10, atol=1e-10)


def test_draws_that_do_not_enter_leave_the_generator_alone() -> None:
    energy, u = Rows(ROWS["a draw that does not enter"]), torch.zeros(5, 3)
    value_and_grad(energy, u)
    state = torch.get_rng_state()
    value_and_grad(energy, u)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_operations_are_recorded_once() -> None:
    energy, u = Rows(lambda u: sum((u.exp() * t).sum() for t in (1.0, 2.0, 2.0))), torch.zeros(5, 3)
    energy(u)
    (graph, _) = energy._graphs[list(energy._graphs)[-1]]
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.exp.default) == 1
    assert targets.count(torch.ops.aten.mul.Tensor) == 2


def test_numbers_of_other_types_make_other_operations() -> None:
    def row(u: Tensor) -> Tensor:
        positive = (u > 0).long()
        return (positive * 1.0).sqrt().sum() * (positive * 1).bitwise_not().sum() + u.sum()

    energy, u = Rows(row), torch.tensor([[0.3, -0.7, 1.1], [0.9, 0.2, -0.4]])
    assert energy.batching == "graph"
    torch.testing.assert_close(energy(u), torch.stack([row(each) for each in u]))


def test_data_are_not_written_to() -> None:
    data = DATA.clone()

    def row(u: Tensor) -> Tensor:
        data[:3] = u.detach()
        return (data[:3].clone() * u).sum()

    energy = Rows(row)
    assert energy.batching == "graph"
    before = data.clone()
    torch.testing.assert_close(energy(torch.ones(2, 3)), torch.full((2,), 3.0))
    assert torch.equal(data, before)


# What breaks a capture is seen


def forgets_views(self: RowsInABatch, tensor: Tensor) -> Tensor:
    for copy, old in self.copies.values():
        if tensor is old:
            return copy.view(tensor.shape)
    return tensor


@pytest.mark.filterwarnings("ignore:Rows cannot be:RuntimeWarning")
@pytest.mark.parametrize(
    "name", ["a view that was made before", "the base of a view that was made before"]
)
def test_mutant_views_of_a_written_tensor_are_forgotten(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowsInABatch, "_current", forgets_views)
    assert Rows(ROWS[name]).batching == "loop"


@pytest.mark.parametrize("name", ["mask", "triangle", "index_put", "masked_select"])
def test_mutant_masks_that_stay_masks_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FixedShapes, "INDEXING", set())
    assert data_dependent(Rows(ROWS[name]), torch.ones(5, 3))


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return 2.0 * grad[0]


class NewStyle(OldStyle):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:  # type: ignore[override]
        return u.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


def without_gradient(u: Tensor) -> Tensor:
    with torch.no_grad():
        scale = u.max()
    return (scale * u**2).sum()


@pytest.mark.parametrize(
    ("row", "way", "said"),
    [
        (lambda u: (u[u > 0] ** 2).sum(), "loop", "dynamic shape.*boolean mask"),
        (lambda u: u.sum() * float(torch.equal(u, DATA[1:])), "loop", "aten::equal"),
        (lambda u: u.sum() if u[0] > 0 else u.prod(), "loop", "data-dependent control flow"),
        (lambda u: OldStyle.apply(u).sum(), "loop", "override the setup_context"),
        (lambda u: NewStyle.apply(u).sum(), "vmap", "custom_function_call.*autograd.Function"),
        (without_gradient, "vmap", r"its gradients differ from those of a loop by .*no_grad\(\)"),
    ],
)
def test_what_is_not_captured_says_why_in_one_line(row: Row, way: str, said: str) -> None:
    told = {"loop": "runs chain by chain", "vmap": "runs in Python at each step"}[way]
    with pytest.warns(
        RuntimeWarning, match=f"^Rows cannot be .*{told}, which is slow: .*{said}.*$"
    ):
        energy = Rows(row)
    assert energy.batching == way
    u = torch.tensor([[0.3, 0.2, -0.7], [-0.3, 0.1, 0.5]])
    found = value_and_grad(energy, u)
    energy.batching = "loop"
    torch.testing.assert_close(found, value_and_grad(energy, u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "change", "deterministic"),
    [
        (torch.float64, 1e-13, True),
        (torch.float64, 1e-6, False),
        (torch.float32, 1e-6, True),
        (torch.float32, 1e-2, False),
    ],
)
def test_a_last_digit_is_no_random_number(
    dtype: torch.dtype, change: float, deterministic: bool
) -> None:
    """Sums in another order, by threads or alignment, change last digits."""
    factors = itertools.cycle([1.0, 1.0, 1.0 + change, 1.0 + change])

    def row(u: Tensor) -> Tensor:
        return 35.0 + (u**2).sum() * next(factors)

    if deterministic:
        assert Rows(row, dtype).batching == "graph"
    else:
        with pytest.raises(ValueError, match="a random number that is not a sample site"):
            Rows(row, dtype)


def bounded_log(u: Tensor) -> Tensor:
    """Its gradient at 0 is 1 / eps, where that of the logarithm is infinite."""
    return (u**2).sum() - 1e-15 * safe_log((u - 0.3).clamp(min=0.0)).clamp(min=-1.0).sum()


def test_the_logarithm_of_pyro_is_captured_with_its_gradient() -> None:
    rows = Rows(bounded_log)
    assert rows.batching == "graph"
    u = torch.tensor([[0.3, 0.5, 0.9], [0.31, 0.3, 0.30001]])
    energies, gradient = value_and_grad(rows, u)
    again = u.clone().requires_grad_()
    expected = torch.stack([bounded_log(row) for row in again])
    torch.testing.assert_close(energies, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), again)[0])


def test_functions_outside_of_vmap_stay_those_of_pyro_and_torch() -> None:
    def row(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": Beta(2.0, 3.0).sample() + safe_log(values["u"])}

    found = map_rows(row, {"u": torch.ones(5)}, 5, name="it", random_values=True)
    assert len(found["x"].unique()) == 5
    x = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(safe_log(x).sum(), x)
    assert float(gradient) == 1.0 / torch.finfo(torch.float64).eps
    a = torch.tensor(2.0, requires_grad=True)
    assert Beta(a, 3.0).rsample().requires_grad


def seeded_features(u: Tensor) -> Tensor:
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    return (features @ u).cos().sum() + (u**2).sum()


@pytest.mark.filterwarnings("ignore:Rows cannot be:RuntimeWarning")
def test_random_numbers_of_a_fixed_seed_are_constants() -> None:
    u = torch.tensor([[0.3, 0.2, -0.7], [-0.3, 0.1, 0.5]])
    expected = torch.stack([seeded_features(row) for row in u])
    torch.testing.assert_close(Rows(seeded_features)(u), expected)


def read_as_a_number(u: Tensor) -> Tensor:
    return u.sum() * float(torch.rand(()))


def one_unit(u: Tensor) -> Tensor:
    """Dropout of one unit, of which half of the draws are equal."""
    return (u * functional.dropout(torch.ones(()), 0.5)).sum()


def written_in_place(u: Tensor) -> Tensor:
    noise = torch.zeros(3)
    noise[1:].normal_()
    return (noise + u).sum()


@pytest.mark.parametrize(
    ("row", "operation"),
    [
        (lambda u: (u * torch.randn(3)).sum(), "aten.randn.default"),
        (lambda u: (u * torch.rand_like(u)).sum(), "aten.rand_like.default"),
        (lambda u: functional.dropout(u, 0.5).sum(), r"aten.\w*(dropout|bernoulli)"),
        (lambda u: torch.bernoulli(u.sigmoid()).sum() + u.sum(), "aten.bernoulli"),
        (lambda u: Normal(u, 1.0).sample().sum() + u.sum(), "aten.normal"),
        (lambda u: (u[torch.randperm(3)] * DATA[:3]).sum(), "aten.randperm"),
        (lambda u: u[torch.multinomial(u.softmax(0), 2)].sum(), "aten.multinomial"),
        (read_as_a_number, "aten.rand.default"),
        (one_unit, r"aten.\w*(dropout|bernoulli)"),
        (written_in_place, "aten.normal_"),
    ],
)
def test_random_operations_are_named(row: Row, operation: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"not a sample site, drawn by {operation}.*draw it once"):
        Rows(row)


def test_random_numbers_of_others_are_seen() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"not a sample site: draw it once.*It gave \[.*and then"):
        Rows(lambda u: u.sum() * rng.random())


def checks_its_numbers(x: Tensor) -> Tensor:
    doubled = x + x
    if not torch.equal(doubled * 0.5, x):
        raise ArithmeticError("the double of x is not exact")
    return doubled.square().sum() + torch.randn(())


def rarely_finite(x: Tensor) -> Tensor:
    return torch.where(torch.rand(()) < 0.5, 0.0, torch.nan) + 0.0 * x.sum()


@pytest.mark.filterwarnings("ignore:Rows cannot be:RuntimeWarning")
@pytest.mark.parametrize("row", [checks_its_numbers, rarely_finite])
def test_random_numbers_are_seen_in_code_that_fails_when_rounded(row: Row) -> None:
    """Where rounding cannot be measured, and where values are NaN."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="depends on a random number"):
        Rows(row)


class DropoutInTraining(Rows):
    """The evaluation mode, in which MCMC runs, has no dropout."""

    def __init__(self) -> None:
        super().__init__(lambda u: (u**2).sum())
        self.dropout = nn.Dropout(0.5)
        self.row = lambda u: self.dropout(u).sum()


def test_a_graph_with_random_numbers_is_refused() -> None:
    energy = DropoutInTraining()
    torch.testing.assert_close(energy.eval()(torch.ones(1, 3)), torch.tensor([3.0]))
    with pytest.raises(ValueError, match=r"drawn by aten\..*call \.eval\(\)"):
        energy.train()(torch.ones(1, 3))


def ill_conditioned(dtype: torch.dtype, size: int) -> Row:
    """A determinant and a solution that amplify rounding a million times or more."""
    x = torch.linspace(0.0, 1.0, size, dtype=dtype)

    def row(u: Tensor) -> Tensor:
        kernel = torch.exp(-((x[:, None] - x) ** 2) / (0.5 + u[0] ** 2))
        kernel = kernel + 1e-4 * torch.eye(size, dtype=dtype)
        solution = torch.linalg.solve(kernel, x.sin())
        return torch.logdet(kernel) + solution.sum() + (x @ kernel @ kernel).sum() + (u**2).sum()

    return row


class OtherRounding(Rows):
    """The second evaluation of two events rounds all its operations in another way."""

    calls = 0

    def row_energy(self, u: Tensor) -> Tensor:
        self.calls += 1
        again = PerturbedRounding(self.calls) if self.calls in (3, 4) else nullcontext()
        with again:
            return super().row_energy(u)


@pytest.mark.filterwarnings("ignore:OtherRounding cannot be:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [5, 20, 60])
def test_rounding_is_no_random_number(dtype: torch.dtype, size: int) -> None:
    row = ill_conditioned(dtype, size)
    assert OtherRounding(row, dtype).calls > 4

    def seeded(u: Tensor) -> Tensor:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(0)).to(dtype)
        return row(u) + (noise * u).sum()

    assert OtherRounding(seeded, dtype).calls > 4


def test_mutant_no_rounding_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "_rounding", lambda *_: torch.zeros(2))
    with pytest.raises(ValueError, match="a random number that is not a sample site"):
        OtherRounding(ill_conditioned(torch.float64, 20))
