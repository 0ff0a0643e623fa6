"""The energy, its algebra, its wrappers and its supports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lib.seeds import seeded
from scipy.integrate import quad
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm import Energy
from pyroebm.core import (
    Conditioned,
    PotentialFn,
    Sum,
    Tempered,
    Unconstrained,
    Unnormalized,
    score,
    spin,
    value_and_grad,
)
from pyroebm.core.supports import (
    base_constraint,
    event_sum,
    is_discrete,
    is_real,
    same_support,
    unconstraining,
)
from pyroebm.targets import (
    Beta,
    Dirichlet,
    DoubleWell,
    Exponential,
    Gamma,
    Gaussian,
    HalfDisc,
    LogNormal,
    SpinProduct,
)

pytestmark = pytest.mark.usefixtures("float64")


class Quadratic(Energy):
    """One parameter, any event shape and support."""

    def __init__(
        self,
        event_shape: tuple[int, ...] = (),
        support: Constraint | None = None,
        weight: float = 0.5,
    ) -> None:
        super().__init__(event_shape, support)
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * event_sum(x.square(), len(self.event_shape))


class Returns(Energy):
    """An energy whose forward is given."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        event_shape: tuple[int, ...] = (),
        support: Constraint | None = None,
    ):
        super().__init__(event_shape, support)
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(x)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


EVENTS = [(), (3,), (2, 3, 4)]


# Evaluation: shapes, types, what is said when they do not fit


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_batches_of_events(event: tuple[int, ...], batch: tuple[int, ...]) -> None:
    e, x = Quadratic(event), randn(*batch, *event)
    assert e(x).shape == batch
    torch.testing.assert_close(e(x), 0.5 * x.square().reshape(*batch, math.prod(event)).sum(-1))
    values, grad = value_and_grad(e, x)
    assert values.shape == batch
    torch.testing.assert_close(grad, x)
    torch.testing.assert_close(score(e, x), -x)


def test_a_column_of_energies_is_refused() -> None:
    e = Returns(nn.Linear(3, 1), (3,))
    for call in (e, lambda x: value_and_grad(e, x), lambda x: score(e, x)):
        with pytest.raises(
            ValueError,
            match=r"shape \(5,\), but it has shape \(5, 1\); drop the last dimension with",
        ):
            call(randn(5, 3))
    with pytest.raises(ValueError, match=r"must have shape \(5,\), but it has shape \(\)$"):
        Returns(lambda x: x.sum(), (3,))(randn(5, 3))
    with pytest.raises(ValueError, match=r"must have shape \(5,\), but it has shape \(5, 5\)$"):
        Returns(lambda x: x.sum(-1) - x.sum(-1, keepdim=True), (3,))(randn(5, 3))


def test_an_energy_of_vectors_without_event_shape_is_named() -> None:
    class Vectors(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(-1)

    for x in (randn(5, 2), randn(2)):
        with pytest.raises(ValueError, match=r"a class that sets none: if Vectors .* = \(2,\)"):
            Vectors()(x)


@pytest.mark.parametrize("shape", [(3, 4), (4,), ()])
def test_wrong_events_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Quadratic((3,))(randn(*shape))
    assert "event_shape (3,)" in str(caught.value)
    assert f"got shape {shape}" in str(caught.value)


def test_dtype_and_device_mismatch_name_both() -> None:
    e = Quadratic((3,))
    for differentiate in (value_and_grad, score):
        with pytest.raises(
            ValueError,
            match=r"Quadratic has dtype torch.float64, x has torch.float32;"
            r" .*\.to\(torch.float64\)",
        ):
            differentiate(e, randn(2, 3).float())
        with pytest.raises(
            ValueError, match=r"Quadratic has device cpu, x has meta; .*\.to\('cpu'\)"
        ):
            differentiate(e, torch.empty(2, 3, device="meta"))
    with pytest.raises(ValueError, match="start must have the dtype"):
        e.check_states(randn(2, 3).float(), "start")


def test_an_energy_without_tensors_has_a_dtype_that_to_moves() -> None:
    e = DoubleWell()
    assert e.dtype == torch.float64
    assert e.float().dtype == torch.float32
    assert e.device == torch.device("cpu")
    assert e.to("meta").device.type == "meta"
    assert e.state_dict() == {}
    for view in (2 * DoubleWell(), DoubleWell() + DoubleWell(), Unconstrained(DoubleWell())):
        assert view.float().dtype == torch.float32
    assert (
        Unconstrained(DoubleWell().float()).dtype
        == (0.5 * DoubleWell().float()).dtype
        == torch.float32
    )


def test_forward_must_be_written() -> None:
    with pytest.raises(NotImplementedError, match="Energy must define forward"):
        Energy()(randn(2))
    assert Energy().log_z is None
    assert not Energy().has_exact_draws
    with pytest.raises(NotImplementedError, match="Energy has no exact draws"):
        Energy().sample(1)


def test_event_shape_and_support_by_class_or_argument() -> None:
    class Positive(Energy):
        event_shape = (2,)  # a tuple serves
        support = constraints.positive

    assert Positive().event_shape == torch.Size([2])
    assert Positive().support is constraints.positive
    assert Positive((3,), constraints.real).event_shape == torch.Size([3])
    assert Positive((3,), constraints.real).support is constraints.real
    assert Positive.event_shape == (2,)


# Derivatives in x


def test_value_and_grad_is_detached_and_leaves_no_trace() -> None:
    e, x = Quadratic((3,)), randn(4, 3).requires_grad_()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            values, grad = value_and_grad(e, x)
        assert not values.requires_grad
        assert not grad.requires_grad
        assert e.weight.grad is None
        assert x.grad is None
    plain = randn(4, 3)
    value_and_grad(e, plain)
    assert not plain.requires_grad


def test_score_keeps_its_graph() -> None:
    e, x = DoubleWell(), randn(7).requires_grad_()
    s = score(e, x)
    torch.testing.assert_close(s, -(4 * x**3 - 8 * x + 1))
    (second,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    torch.testing.assert_close(second, -(12 * x**2 - 8))
    (third,) = torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(third, -24 * x)
    q, plain = Quadratic((3,)), randn(4, 3)
    score(q, plain).sum().backward()  # trains the parameters
    torch.testing.assert_close(q.weight.grad, -2 * plain.sum())
    assert not plain.requires_grad
    y = (2 * x).exp()  # not a leaf
    torch.testing.assert_close(torch.autograd.grad(score(Gaussian(0.0), y).sum(), x)[0], -2 * y)


def test_no_gradient_without_a_path_to_x() -> None:
    for differentiate in (value_and_grad, score):
        with pytest.raises(
            ValueError, match=r"Returns.forward.* does not depend on x through autograd"
        ):
            differentiate(Returns(lambda x: x.detach() ** 2), randn(3))
        with pytest.raises(
            ValueError, match=r"SpinProduct has the discrete support .* no gradient in x"
        ):
            differentiate(SpinProduct([0.0]), torch.ones(2, 1))
    assert value_and_grad(Returns(lambda x: 0 * x), randn(3))[1].tolist() == [0.0, 0.0, 0.0]


def test_a_broken_row_touches_no_other() -> None:
    x = torch.tensor([0.5, math.nan, 1.5, -0.5])
    values, grad = value_and_grad(HalfDisc(), x)
    torch.testing.assert_close(
        values[[0, 2, 3]], torch.tensor([-math.sqrt(3), math.inf, -math.sqrt(3)])
    )
    assert values[1].isnan()
    torch.testing.assert_close(grad[[0, 3]], torch.tensor([2 / math.sqrt(3), -2 / math.sqrt(3)]))


# Algebra


def test_sum_is_a_product_of_experts() -> None:
    a = Gaussian([0.0, 1.0])
    b = Gaussian([1.0, 0.0], scale=2.0)
    c = Quadratic((2,))
    x = randn(5, 2)
    torch.testing.assert_close((a + b + c)(x), a(x) + b(x) + c(x))
    torch.testing.assert_close(Sum(a, b, c)(x), (a + b + c)(x))
    assert (a + b).event_shape == (2,)
    assert (a + b).log_z is None
    assert [p is c.weight for p in (a + c).parameters()] == [True]
    assert a.__add__(1) is NotImplemented
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(ValueError, match="at least one Energy"):
        Sum()
    with pytest.raises(
        ValueError, match=r"share one event_shape and one support, got \[\(\(2,\), .*\(\(3,\)"
    ):
        a + Gaussian(torch.zeros(3))
    with pytest.raises(ValueError, match="share one event_shape and one support"):
        Exponential(1.0) + Gaussian(0.0)
    assert (Exponential(1.0) + Gamma(2.0)).support is constraints.positive


def test_sum_starts_where_all_parts_are_finite() -> None:
    x = (Gaussian(0.0) + HalfDisc()).initial(100, seeded())
    assert (x.abs() < 1).all()
    assert ((HalfDisc() + Gaussian(0.0)).initial(100, seeded()).abs() < 1).all()


def test_tempering() -> None:
    e, x = DoubleWell(), randn(5)
    for tempered in (0.5 * e, e * 0.5, e / 2, torch.tensor(0.5) * e, Tempered(e, 0.5)):
        assert isinstance(tempered, Tempered)
        torch.testing.assert_close(tempered(x), 0.5 * e(x))
    assert (0.5 * e).log_z is None
    assert repr(0.5 * e).startswith("Tempered(\n  beta=0.5")
    assert (2 * Exponential(1.0)).support is constraints.positive
    assert ((2 * HalfDisc()).initial(50, seeded()).abs() < 1).all()
    torch.testing.assert_close((0.5 * (e + 2 * e))(x), 1.5 * e(x))
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match="beta must be a positive finite number without gradient, got beta="
        ):
            beta * e


def test_log_ratio_needs_no_z() -> None:
    e = DoubleWell()
    a = randn(4)
    b = randn(4, seed=1)
    torch.testing.assert_close(e.log_ratio(a, b), e(b) - e(a))
    assert e.log_ratio(a, b[0]).shape == (4,)
    mode, hill = torch.tensor(-1.473), torch.tensor(0.126)
    assert e.log_ratio(mode, hill) > 0  # the first is the likelier


# Unnormalised densities


@pytest.mark.parametrize(
    ("link", "h"),
    [
        ("exp", torch.exp),
        ("square", torch.square),
        ("abs", torch.abs),
        ("softplus", lambda g: torch.log1p(torch.exp(g))),
    ],
)
def test_links(link: str, h: Callable[[Tensor], Tensor]) -> None:
    net = nn.Linear(3, 1)
    e = Unnormalized(lambda x: net(x).squeeze(-1), link, event_shape=(3,))
    x = randn(20, 3)
    torch.testing.assert_close(torch.exp(-e(x)), h(net(x).squeeze(-1)))
    assert torch.isfinite(value_and_grad(e, x)[1]).all()
    assert e.event_shape == (3,)
    assert f"link='{link}'" in repr(e)


def test_modules_in_links_are_registered() -> None:
    net = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    e = Unnormalized(net, "softplus", (3,), constraints.positive)
    assert len(list(e.parameters())) == 2
    assert e.support is constraints.positive
    with pytest.raises(
        ValueError,
        match=r"link must be one of \['abs', 'exp', 'softplus', 'square'\], got link='tanh'",
    ):
        Unnormalized(net, "tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_accurate_far_out(dtype: torch.dtype) -> None:
    g = torch.tensor(
        [-1e4, -700, -100, -40, -16, -15.000001, -15, -14.9, -5, 0, 5, 15, 40, 100, 1e4, 1e30],
        dtype=dtype,
    )
    e = Unnormalized(lambda x: x, "softplus").to(dtype)
    values, grad = value_and_grad(e, g)

    def log_softplus(v: float) -> float:
        return math.log(math.log1p(math.exp(v))) if abs(v) <= 700 else v if v < 0 else math.log(v)

    def slope(v: float) -> float:  # of log softplus: sigmoid(v) / softplus(v)
        return (
            1 / (1 + math.exp(-v)) / math.log1p(math.exp(v))
            if abs(v) <= 700
            else 1.0
            if v < 0
            else 1 / v
        )

    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    exact, slopes = (
        torch.tensor([f(v) for v in g.tolist()], dtype=dtype) for f in (log_softplus, slope)
    )
    torch.testing.assert_close(values, -exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, -slopes, rtol=2 * tolerance, atol=0.3 * tolerance)


def test_zero_density_is_infinite_energy() -> None:
    for link in ("square", "abs"):
        assert Unnormalized(lambda x: x, link)(torch.zeros(2)).tolist() == [math.inf, math.inf]


# Conditioning


@pytest.mark.parametrize(("event", "clamped"), [((4,), (0, 2)), ((4,), ()), ((2, 2, 2), (1, 2, 7))])
def test_conditioned_gaussian_is_the_conditional(
    event: tuple[int, ...], clamped: tuple[int, ...]
) -> None:
    d = math.prod(event)
    a = randn(d, 2 * d)
    mean = randn(*event, seed=1)
    covariance = a @ a.T / d
    seen = randn(*event, seed=2)
    mask = torch.zeros(d, dtype=torch.bool)
    mask[list(clamped)] = True
    e = Conditioned(Gaussian(mean, covariance=covariance), seen, mask.reshape(event))
    free, x = ~mask, randn(6, d - len(clamped), seed=3)
    assert e.event_shape == (d - len(clamped),)
    cross = covariance[free][:, mask] @ torch.linalg.inv(covariance[mask][:, mask])
    center = mean.flatten()[free] + cross @ (seen - mean).flatten()[mask]
    spread = covariance[free][:, free] - cross @ covariance[mask][:, free]
    exact = Gaussian(center, covariance=spread)
    torch.testing.assert_close(e.log_ratio(x[:3], x[3:]), exact.log_ratio(x[:3], x[3:]))
    torch.testing.assert_close(value_and_grad(e, x)[1], value_and_grad(exact, x)[1])
    whole = e.complete(x)
    assert whole.shape == (6, *event)
    assert torch.equal(whole[:, ~mask.reshape(event)], x)
    assert torch.equal(whole[:, mask.reshape(event)], seen[mask.reshape(event)].expand(6, -1))
    assert e(x.reshape(2, 3, -1)).shape == (2, 3)
    assert torch.isfinite(e(e.initial(5, seeded()))).all()


def test_conditioning_is_checked() -> None:
    e, mask = Gaussian(torch.zeros(2)), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"must have shape \(2,\).*got shapes \(3,\) and \(2,\)"):
        Conditioned(e, torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"mask of dtype torch.int64"):
        Conditioned(e, torch.zeros(2), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="at least one entry free, got all 2 clamped"):
        Conditioned(e, torch.zeros(2), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="couples the entries"):
        Conditioned(Dirichlet([1.0, 1.0]), torch.zeros(2), mask)
    spins = Conditioned(SpinProduct([1.0, 2.0]), torch.tensor([-1.0, 0.0]), mask)
    assert same_support(spins.support, spin)
    assert spins(torch.tensor([[1.0], [-1.0]])).tolist() == [-1.0, 3.0]


# Unconstrained coordinates


@pytest.mark.parametrize(
    "e",
    [
        Exponential(0.7, dtype=torch.float64),
        Gamma(2.5, 0.5, dtype=torch.float64),
        LogNormal(0.4, 0.6, dtype=torch.float64),
        Beta(2.0, 0.7, dtype=torch.float64),
        DoubleWell(dtype=torch.float64),
        Dirichlet([1.5, 2.0], dtype=torch.float64),
    ],
    ids=lambda e: type(e).__name__,
)
def test_unconstrained_has_the_same_z(e: Energy) -> None:
    free = Unconstrained(e)
    density = lambda v: math.exp(-float(free(torch.tensor(v).reshape(free.event_shape))))  # noqa: E731
    z = sum(
        quad(density, low, high, epsabs=1e-11, limit=200)[0]
        for low, high in ((-60, -5), (-5, 5), (5, 40))
    )
    assert math.log(z) == pytest.approx(e.log_z, abs=1e-9)
    assert free.log_z == e.log_z


@pytest.mark.parametrize(
    ("support", "exact"),
    [
        (constraints.interval(2.0, 5.0), math.log(3.0)),
        (constraints.unit_interval, 0.0),
        (constraints.independent(constraints.interval(-1.0, 1.0), 0), math.log(2.0)),
    ],
)
def test_flat_laws_have_the_volume_for_z(support: Constraint, exact: float) -> None:
    free = Unconstrained(Returns(lambda x: 0 * x, (), support))
    z = quad(
        lambda v: math.exp(-float(free(torch.tensor(v)))),
        -50,
        50,
        epsabs=1e-12,
        points=[-5, 0, 5],
        limit=200,
    )[0]
    assert math.log(z) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("support", "event"),
    [
        (constraints.positive, (3,)),
        (constraints.positive, (2, 2)),
        (constraints.independent(constraints.positive, 1), (3,)),
        (constraints.greater_than(2.0), (3,)),
        (constraints.less_than(-1.0), ()),
        (constraints.interval(-1.0, 4.0), (2, 3)),
        (constraints.unit_interval, ()),
        (constraints.real, (3,)),
        (constraints.real_vector, (3,)),
        (constraints.simplex, (4,)),
    ],
)
def test_jacobian_enters_once(support: Constraint, event: tuple[int, ...]) -> None:
    e = Quadratic(event, support)
    free = Unconstrained(e)
    u = randn(*free.event_shape)
    simplex = isinstance(base_constraint(support), type(constraints.simplex))
    flat = lambda v: free.constrain(v).flatten()[: -1 if simplex else None]  # noqa: E731
    d = math.prod(free.event_shape)
    jacobian = torch.autograd.functional.jacobian(flat, u).reshape(d, d)
    x = free.constrain(u)
    assert support.check(x).all()
    torch.testing.assert_close(free(u), e(x) - torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(free.unconstrain(x), u)
    batch = randn(2, 5, *free.event_shape, seed=1)
    assert free(batch).shape == (2, 5)
    torch.testing.assert_close(free(batch)[1, 3], free(batch[1, 3]))
    assert free.initial(7, seeded()).shape == (7, *free.event_shape)
    torch.testing.assert_close(free.constrain(free.initial(7, seeded())), e.initial(7, seeded()))
    assert [p is e.weight for p in free.parameters()] == [True]


def test_rows_of_simplices_are_summed() -> None:
    e = Dirichlet([[1.5, 2.0, 0.7], [1.0, 3.0, 0.5]])
    free, parts = Unconstrained(e), [Unconstrained(Dirichlet(row)) for row in e.concentration]
    u = randn(4, 2, 2)
    torch.testing.assert_close(free(u), parts[0](u[:, 0]) + parts[1](u[:, 1]))


# Pyro's potential


def test_potential_is_the_unconstrained_energy() -> None:
    for e in (
        DoubleWell(),
        Gaussian(torch.zeros(2, 3)),
        Exponential([1.0, 2.0]),
        Dirichlet([1.0, 2.0, 3.0]),
    ):
        potential = PotentialFn(e)
        assert isinstance(potential, PotentialFn)
        u = potential.initial_params(1, seeded())["x"]
        assert potential({"x": u}).shape == ()
        torch.testing.assert_close(potential({"x": u}), Unconstrained(e)(u))
        many = potential.initial_params(5, seeded())["x"]
        assert many.shape == (5, *u.shape)
        torch.testing.assert_close(many[0], potential.initial_params(5, seeded())["x"][0])
    assert PotentialFn(DoubleWell(), "theta").initial_params().keys() == {"theta"}
    assert PotentialFn(DoubleWell()).transforms == {}
    to_free = PotentialFn(Exponential(1.0), "r").transforms["r"]
    torch.testing.assert_close(to_free(torch.tensor(2.0)), torch.tensor(2.0).log())
    torch.testing.assert_close(to_free.inv(torch.tensor(0.0)), torch.tensor(1.0))


def test_potential_refuses_other_dicts() -> None:
    potential = PotentialFn(Exponential([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"one site named 'x', got sites \['y'\]"):
        potential({"y": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"one site named 'x', got sites \['x', 'y'\]"):
        potential({"x": torch.zeros(2), "y": torch.zeros(2)})
    with pytest.raises(
        ValueError,
        match=r"one event in unconstrained coordinates, shape \(2,\), got shape \(3, 2\)",
    ):
        potential({"x": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="is discrete: it has no unconstrained coordinates"):
        PotentialFn(SpinProduct([0.0]))


# Supports and starts


@pytest.mark.parametrize(
    ("support", "event"),
    [
        (constraints.real, ()),
        (constraints.real, (2, 3)),
        (constraints.real_vector, (4,)),
        (constraints.positive, (3,)),
        (constraints.nonnegative, ()),
        (constraints.greater_than(2.0), (3,)),
        (constraints.less_than(-2.0), (3,)),
        (constraints.unit_interval, (3,)),
        (constraints.interval(-3.0, -1.0), (2, 2)),
        (constraints.half_open_interval(0.0, 2.0), (2,)),
        (constraints.simplex, (4,)),
        (constraints.simplex, (2, 4)),
        (constraints.boolean, (3,)),
        (constraints.independent(constraints.boolean, 1), (3,)),
        (spin, (2, 3)),
        (constraints.one_hot, (5,)),
        (constraints.one_hot, (2, 5)),
        (constraints.integer_interval(2, 6), (3,)),
        (constraints.corr_cholesky, (3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_legal(support: Constraint, event: tuple[int, ...], dtype: torch.dtype) -> None:
    e = Quadratic(event, support).to(dtype)
    x = e.initial(400, seeded())
    assert x.shape == (400, *event)
    assert x.dtype == dtype
    assert support.check(x).all()
    assert torch.equal(x, e.initial(400, seeded()))
    if is_real(support):
        assert x.abs().max() <= 2
        assert x.abs().max() > 1.9
    if isinstance(base_constraint(support), constraints.integer_interval):
        assert x.unique().tolist() == [2, 3, 4, 5, 6]
    elif is_discrete(support) and not isinstance(
        base_constraint(support), type(constraints.one_hot)
    ):
        assert len(x.unique()) == 2
        assert abs(float((x > 0).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(x.numel())
    elif is_discrete(support):
        counts = x.reshape(-1, event[-1]).mean(0)
        assert (counts - 1 / event[-1]).abs().max() < 5 * 0.4 / math.sqrt(400)


def test_starts_avoid_infinite_energy_or_say_so() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert (HalfDisc().initial(200).abs() < 1).all()
    with pytest.raises(
        ValueError,
        match="for 3 of num_chains=3 chains in 100 tries; override initial",
    ):
        Returns(lambda x: 0 * x + math.inf).initial(3)
    with pytest.raises(ValueError, match="num_chains must be at least 1, got num_chains=0"):
        DoubleWell().initial(0)


def test_supports_without_a_default_say_so() -> None:
    with pytest.raises(ValueError, match="no default starting states; override initial"):
        Quadratic((), constraints.nonnegative_integer).initial(2)

    class Odd(Constraint):
        def check(self, value: Tensor) -> Tensor:
            return value > 0

    with pytest.raises(
        ValueError, match=r"no bijection from R\^d registered with torch.distributions.biject_to"
    ):
        Quadratic((), Odd()).initial(2)
    with pytest.raises(ValueError, match="no bijection"):
        Unconstrained(Quadratic((), Odd()))


def test_supports_are_compared_as_sets() -> None:
    assert same_support(constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0))
    assert not same_support(constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0))
    assert same_support(constraints.real, constraints.real_vector)
    assert not same_support(constraints.real, constraints.positive)
    assert not same_support(constraints.boolean, spin)
    assert same_support(
        constraints.interval(torch.zeros(2), torch.ones(2)),
        constraints.interval(torch.zeros(2), torch.ones(2)),
    )
    assert base_constraint(constraints.independent(constraints.independent(spin, 1), 1)) is spin
    assert is_discrete(constraints.independent(spin, 2))
    assert not is_discrete(constraints.simplex)
    assert is_real(constraints.real_vector)
    assert not is_real(constraints.positive)
    assert spin.check(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="use a sampler for discrete states"):
        unconstraining(spin)


# Importing


SNAPSHOT = """
import json, random, sys
import numpy, torch
def look():
    return {
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "rng": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "device": str(torch.get_default_device()),
        "validate": torch.distributions.Distribution._validate_args,
        "python": str(random.getstate()), "numpy": str(numpy.random.get_state()),
    }
import pyro, scipy, arviz
before = look()
import pyroebm, pyroebm.targets
after = look()
json.dump([key for key in before if before[key] != after[key]], sys.stdout)
"""


def test_importing_changes_no_global() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == []


def test_score_keeps_its_graph_under_no_grad() -> None:
    with torch.no_grad():
        assert score(DoubleWell(), randn(3)).requires_grad


def test_an_energy_that_ignores_x_is_named() -> None:
    weight = nn.Parameter(torch.ones(()))
    for differentiate in (value_and_grad, score):
        with pytest.raises(ValueError, match="does not depend on x through autograd"):
            differentiate(Returns(lambda x: weight * torch.ones(x.shape)), randn(3))


def test_gradients_within_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
        assert value_and_grad(DoubleWell(), x)[1].tolist() == [1.0, 1.0]
    assert value_and_grad(DoubleWell(), x)[1].tolist() == [1.0, 1.0]


def test_zero_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="positive finite"):
        DoubleWell() / 0


def test_supports_with_bounds_of_other_shapes_differ() -> None:
    two, three = (constraints.interval(torch.zeros(n), torch.ones(n)) for n in (2, 3))
    assert not same_support(two, three)


def test_starts_have_the_energys_dtype() -> None:
    support = constraints.interval(
        torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    )
    assert Quadratic((2,), support).float().initial(3).dtype == torch.float32


def test_wrapped_couplings_cannot_be_clamped() -> None:
    e = Quadratic((2, 2), constraints.independent(constraints.simplex, 1))
    with pytest.raises(ValueError, match="couples the entries"):
        Conditioned(e, torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


def test_conditioning_refuses_bounds_that_differ_by_entry() -> None:
    e = Quadratic((2,), constraints.interval(torch.zeros(2), torch.tensor([1.0, 5.0])))
    with pytest.raises(ValueError, match="bounds each differently"):
        Conditioned(e, torch.zeros(2), torch.tensor([True, False]))


def test_conditioning_follows_the_energys_device() -> None:
    e = Conditioned(
        Gaussian(torch.zeros(2)).to("meta"), torch.zeros(2), torch.tensor([True, False])
    )
    assert e.observed.device.type == e.mask.device.type == "meta"


def test_conditioned_starts_are_those_of_the_energy() -> None:
    e = Conditioned(
        Gaussian([100.0, 100.0]), torch.tensor([100.0, 0.0]), torch.tensor([True, False])
    )
    assert (e.initial(50, seeded()) > 90).all()


def test_log_z_of_a_view_follows_its_energy() -> None:
    e = Exponential(1.0)
    free = Unconstrained(e)
    e.load_state_dict(Exponential(2.0).state_dict())
    assert free.log_z == e.log_z == pytest.approx(-math.log(2))


def test_unconstrained_draws_exactly_where_its_energy_does() -> None:
    free = Unconstrained(Exponential(1.0))
    assert free.has_exact_draws
    torch.testing.assert_close(free.sample(5, seeded()), Exponential(1.0).sample(5, seeded()).log())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratic(2), r"event_shape must be a tuple of sizes.*got event_shape=2"),
        (
            lambda: Quadratic((), "positive"),
            "support must be a torch.distributions constraint, got support='positive'",
        ),
        (lambda: Yields(1.5)(torch.zeros(3)), "must return a tensor of energies, got float"),
        (
            lambda: Yields(np.zeros(3))(torch.zeros(3)),
            "must return a tensor of energies, got ndarray",
        ),
        (lambda: Forgetful().device, r"Forgetful.__init__ must call super\(\).__init__\(\)"),
        (
            lambda: value_and_grad(Wide().float(), torch.zeros(3).float()),
            "Wide.forward must return the dtype of x, torch.float32, got torch.float64",
        ),
        (
            lambda: Gaussian(torch.zeros(2)).float() + Gaussian(torch.zeros(2)).double(),
            "parts of a Sum must share one dtype",
        ),
        (
            lambda: Conditioned(
                Gaussian(torch.zeros(2)), torch.tensor([math.nan, 0.0]), torch.tensor([True, False])
            ),
            r"observed must lie in support=.* got \[nan\]",
        ),
    ],
)
def test_slips_at_the_front_door_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Yields(Energy):
    def __init__(self, what: object) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what  # type: ignore[return-value]


class Forgetful(Energy):
    def __init__(self) -> None:
        pass


class Wide(Energy):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.ones((), dtype=torch.float64)).double() ** 2


def test_numpy_temperatures_are_numbers() -> None:
    torch.testing.assert_close(
        (Gaussian(torch.zeros(2)) / np.float32(2))(torch.ones(1, 2)), torch.tensor([0.5])
    )
