"""Code for one row runs on all rows: as a captured graph with the values and gradients of a loop,
or with a reason why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lib.graphs import data_dependent
from pyro.distributions import Beta
from pyro.ops.special import safe_log
from torch import Tensor

from pyroebm.core import value_and_grad
from pyroebm.core._torch_private import FixedShapes
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
