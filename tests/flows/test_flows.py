"""Flows: each line of the two tables inherits the property tests; then closed forms, messages, and
mutants to be caught."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.flow_cases import noise, stirred
from lib.reseed import fixed_problem
from lib.seeds import seeded
from pyro.distributions.transforms import affine_coupling
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import AffineTransform, IndependentTransform

from pyroebm import Energy, load, save
from pyroebm.core.rng import seeded_generator
from pyroebm.flows import (
    NICE,
    AdditiveCoupling,
    AffineCoupling,
    AugmentedEnergy,
    AutoregressiveFlow,
    ConditionalGaussian,
    ContinuousFlow,
    EquivariantFlow,
    Flow,
    Loft,
    MixtureBase,
    Permutation,
    PLULinear,
    RealNVP,
    RedundantNICE,
    Shift,
    SplineFlow,
    StudentBase,
    Symmetrized,
    ZukoTransform,
    sign_flips,
)
from pyroebm.flows.flow import _log_integral
from pyroebm.nn import mlp
from pyroebm.objectives import ReverseKL, SymmetrizedKL
from pyroebm.targets import DoubleWell, Exponential, Gaussian

F64 = torch.float64
M = TypeVar("M", bound=nn.Module)


def affine_flow(dtype: torch.dtype = F64) -> Flow:
    """Pyro's own transforms, which cache, with our Gaussian for the third entry."""
    transforms = [affine_coupling(3, hidden_dims=[8]), affine_coupling(3, hidden_dims=[8])]
    return Flow(transforms, dim=2, total_dim=3, conditional=ConditionalGaussian(2, 1, (8,))).to(
        dtype
    )


Generator = torch.Generator | None


def continuous_flow(
    dim: int = 2, dtype: torch.dtype = F64, generator: Generator = None
) -> ContinuousFlow:
    """About as exact as the dtype lets the solver be."""
    tolerance = 1e-6 if dtype == F64 else 1e-4
    return ContinuousFlow(
        dim,
        (4,),
        num_frequencies=1,
        atol=tolerance,
        rtol=tolerance,
        dtype=dtype,
        generator=generator,
    )


def equivariant_flow(
    particles: int, space: int = 2, dtype: torch.dtype = F64, generator: Generator = None
) -> EquivariantFlow:
    """No number of it is random: ``generator`` is for the table alone."""
    return EquivariantFlow(particles, space, num_cells=6, num_steps=16, dtype=dtype)


def symmetrized(
    weights: str = "uniform", dtype: torch.dtype = F64, generator: Generator = None
) -> Symmetrized:
    return Symmetrized(
        RealNVP(2, 2, (8,), dtype=dtype, generator=generator),
        sign_flips(2),
        weights,
    )


def mixed(
    make: Callable[..., Flow],
    dtype: torch.dtype = F64,
    generator: Generator = None,
    learn_weights: bool = True,
) -> Flow:
    return make(
        base=MixtureBase(
            2,
            3,
            learn_weights=learn_weights,
            dtype=dtype,
            generator=generator,
        ),
        dtype=dtype,
        generator=generator,
    )


def heavy(dtype: torch.dtype = F64, generator: Generator = None) -> Flow:
    return RealNVP(
        2,
        2,
        (8,),
        base=StudentBase(2, dtype=dtype),
        dtype=dtype,
        generator=generator,
    )


def loft_flow(dtype: torch.dtype = F64, generator: Generator = None) -> Flow:
    parts = RealNVP(5, 4, (8,), dtype=dtype, generator=generator).transform.parts
    return Flow([*parts, Loft(5, 3.0)], 5, 5)


def zuko_layer(flow: Flow) -> Transform:
    return next(part for part in flow.transform.parts if isinstance(part, ZukoTransform))


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "coupling2": partial(AdditiveCoupling, 2, hidden_sizes=(8,), dtype=F64),
    "coupling2_flip": partial(AdditiveCoupling, 2, hidden_sizes=(8, 8), flip=True, dtype=F64),
    "coupling5": partial(AdditiveCoupling, 5, hidden_sizes=(8,), activation="tanh", dtype=F64),
    "coupling5_flip": partial(AdditiveCoupling, 5, hidden_sizes=(8,), flip=True, dtype=F64),
    "coupling_own_net": lambda: AdditiveCoupling(
        4, nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    ),
    "plu1": lambda: PLULinear(torch.tensor([[-2.0]], dtype=F64)),
    "plu4": lambda: PLULinear(noise(4, 4)),
    "plu4_rotation": lambda: PLULinear(torch.linalg.qr(noise(4, 4))[0]),
    "shift": lambda: Shift(noise(3)),
    "permutation": lambda: Permutation([2, 0, 3, 1]),
    "affine2": partial(AffineCoupling, 2, hidden_sizes=(8,), dtype=F64),
    "affine5": partial(AffineCoupling, 5, hidden_sizes=(8,), dtype=F64),
    "affine4_own_mask": partial(
        AffineCoupling, 4, mask=[True, False, True, True], hidden_sizes=(8,), dtype=F64
    ),
    "loft": partial(Loft, 3, threshold=0.5),
    "spline1": lambda: zuko_layer(SplineFlow(1, 1, dtype=F64)),
    "spline3": lambda: zuko_layer(SplineFlow(3, 1, (8,), dtype=F64)),
    "spline3_autoregressive": lambda: zuko_layer(
        SplineFlow(3, 1, (8,), autoregressive=True, dtype=F64)
    ),
    "autoregressive3": lambda: zuko_layer(AutoregressiveFlow(3, 1, (8,), dtype=F64)),
    "autoregressive3_density": lambda: zuko_layer(
        AutoregressiveFlow(3, 1, (8,), fast="density", dtype=F64)
    ),
    "continuous2": lambda: zuko_layer(continuous_flow()),
    "continuous1": lambda: zuko_layer(continuous_flow(1)),
    "equivariant6": lambda: equivariant_flow(4).field,
}

FLOWS: dict[str, Callable[..., Flow]] = {
    "nice1": partial(NICE, 1),
    "nice1_centered": partial(NICE, 1, shift=False),
    "nice2": partial(NICE, 2, hidden_sizes=(16,)),
    "nice2_tanh": partial(NICE, 2, num_layers=2, hidden_sizes=(16, 16), activation="tanh"),
    "nice5": partial(NICE, 5, num_layers=3, hidden_sizes=(8,)),
    "redundant_equal": partial(RedundantNICE, 2, 2, hidden_sizes=(8,)),
    "redundant_1_2": partial(RedundantNICE, 1, 2, hidden_sizes=(16,)),
    "redundant_1_3": partial(RedundantNICE, 1, 3, hidden_sizes=(8, 8)),
    "redundant_3_4": partial(RedundantNICE, 3, 4, num_layers=2, hidden_sizes=(8,)),
    "redundant_2_5": partial(RedundantNICE, 2, 5, hidden_sizes=(8,), shift=False),
    "pyro_affine": affine_flow,
    "realnvp1": partial(RealNVP, 1),
    "realnvp2": partial(RealNVP, 2, 4, (8,)),
    "realnvp5": partial(RealNVP, 5, 4, (8,)),
    "loft": loft_flow,
    "realnvp_1_3": partial(RealNVP, 1, 4, (8,), total_dim=3),
    "realnvp_mixture": partial(mixed, partial(RealNVP, 2, 2, (8,))),
    "realnvp_student": heavy,
    "nice_mixture": partial(mixed, partial(NICE, 2, 2, (8,)), learn_weights=False),
    "redundant_mixture": partial(mixed, partial(RedundantNICE, 1, 2, 2, (8,))),
    "spline1": partial(SplineFlow, 1, 2),
    "spline2": partial(SplineFlow, 2, 2, (8,)),
    "spline5": partial(SplineFlow, 5, 4, (8,)),
    "spline3_autoregressive": partial(SplineFlow, 3, 3, (8,), autoregressive=True),
    "autoregressive3": partial(AutoregressiveFlow, 3, 2, (8,)),
    "autoregressive2_density": partial(AutoregressiveFlow, 2, 2, (8,), fast="density"),
    "continuous2": continuous_flow,
    "equivariant1": partial(equivariant_flow, 2, 1),
    "equivariant6": partial(equivariant_flow, 4),
    "symmetrized": symmetrized,
    "symmetrized_learned": partial(symmetrized, "learned"),
}
NICES = [name for name in FLOWS if name.startswith(("nice", "redundant")) and "mixture" not in name]
SAVED = [name for name in FLOWS if name != "pyro_affine"]

flows = pytest.mark.parametrize("name", FLOWS)
nices = pytest.mark.parametrize("name", NICES)
saved = pytest.mark.parametrize("name", SAVED)
transforms = pytest.mark.parametrize("name", TRANSFORMS)


def build(name: str, scale: float = 0.3) -> Flow:
    return stirred(FLOWS[name](dtype=F64), scale=scale)


def base_noise(flow: Flow, n: int) -> Tensor:
    """Draws of z, without a graph."""
    return flow.rsample_base(n, seeded_generator(7)).detach()


def close(name: str, exact: float) -> dict[str, float]:
    """Tolerances: what is exact to rounding elsewhere is exact to the solver's tolerance in a
    continuous flow."""
    value = 1e-4 if name.startswith(("continuous", "equivariant")) else exact
    return {"rtol": value, "atol": value}


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants at the end show that it does.


def check_log_det(
    transform: Callable[[Tensor], Tensor],
    log_det: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    tolerance: float = 1e-9,
) -> None:
    """A reported log-determinant against autograd's Jacobian, row by row."""
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in z])
    torch.testing.assert_close(
        log_det(z, transform(z)),
        torch.linalg.slogdet(jacobian).logabsdet,
        rtol=tolerance,
        atol=tolerance,
    )


def grid_1d(half: float = 14.0, points: int = 2001) -> tuple[Tensor, float]:
    axis = torch.linspace(-half, half, points, dtype=F64)
    return axis, float(axis[1] - axis[0])


def grid_2d(half: float = 14.0, points: int = 701) -> tuple[Tensor, float]:
    axis, step = grid_1d(half, points)
    return torch.cartesian_prod(axis, axis), step**2


# --------------------------------------------------------------------------------------------------
# Transforms


@transforms
def test_transform_round_trip(name: str) -> None:
    transform = stirred(TRANSFORMS[name]())
    z = noise(3, 6, getattr(transform, "dim", 3))
    x = transform(z)
    assert x.shape == z.shape
    assert not torch.allclose(x, z)
    torch.testing.assert_close(transform.inv(x.clone()), z, **close(name, 1e-10))
    torch.testing.assert_close(transform(transform.inv(x.clone())), x, **close(name, 1e-10))


@transforms
def test_transform_log_det_is_autograd_s(name: str) -> None:
    transform = stirred(TRANSFORMS[name]())
    z = noise(5, getattr(transform, "dim", 3))
    check_log_det(transform, transform.log_abs_det_jacobian, z, close(name, 1e-9)["rtol"])
    assert transform.log_abs_det_jacobian(z, z).shape == (5,)


@transforms
def test_transform_refuses_other_sizes(name: str) -> None:
    transform = TRANSFORMS[name]()
    dim = getattr(transform, "dim", 3)
    for shape in ((4, dim + 1), (4, 0), ()):
        with pytest.raises(ValueError, match=rf"\(\*batch, dim\) with dim={dim}, got shape"):
            transform(torch.zeros(shape, dtype=F64))
        with pytest.raises(ValueError, match=r"\(\*batch, dim\)"):
            transform._inverse(torch.zeros(shape, dtype=F64))


@pytest.mark.parametrize("flip", [False, True])
def test_coupling_moves_one_part_by_a_function_of_the_other(flip: bool) -> None:
    layer = stirred(AdditiveCoupling(5, flip=flip, hidden_sizes=(8,), dtype=F64))
    z = noise(6, 5)
    passing = torch.arange(5) >= 2 if flip else torch.arange(5) < 2
    moved = layer(z) - z
    assert bool((moved[:, passing] == 0).all())
    torch.testing.assert_close(moved[:, ~passing], layer.net(z[:, passing]))
    # the last layer of a fresh one is zero
    assert bool((AdditiveCoupling(5, flip=flip, dtype=F64)(z) == z).all())


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Linear(2, 1), r"to the shape and dtype .* \(4, 3\).* but it gave \(4, 1\)"),
        (nn.Linear(2, 3).float(), "torch.float64, but it gave .* torch.float32"),
        (lambda a: torch.zeros(3, dtype=F64), r"but it gave \(3,\)"),
    ],
)
def test_coupling_refuses_a_net_that_would_broadcast(
    net: Callable[[Tensor], Tensor], said: str
) -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return net(a.float() if "float32" in said else a)

    if isinstance(net, nn.Linear) and "float32" not in said:
        net.double()
    with pytest.raises(ValueError, match=said):
        AdditiveCoupling(5, Net())(noise(4, 5))


def test_plu_reproduces_its_matrix_and_stays_invertible() -> None:
    matrix = noise(6, 6)
    layer = PLULinear(matrix)
    torch.testing.assert_close(layer.matrix(), matrix)
    torch.testing.assert_close(layer(torch.eye(6, dtype=F64)).T, matrix)
    torch.testing.assert_close(layer.log_abs_det(), torch.linalg.slogdet(matrix).logabsdet)
    stirred(layer, scale=1.0)
    torch.testing.assert_close(
        torch.linalg.slogdet(layer.matrix().detach()).sign, torch.linalg.slogdet(matrix).sign
    )


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.ones(2, 3), r"square .* got shape \(2, 3\)"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.ones(2, 2), "invertible"),
        (torch.full((2, 2), math.nan), "invertible"),
    ],
)
def test_plu_refuses(matrix: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PLULinear(matrix)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"dim must be at least 2.*dim=1"):
        AdditiveCoupling(1)
    with pytest.raises(ValueError, match="offset must be a vector"):
        Shift(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"hidden_sizes must hold .* got hidden_sizes=\(\)"):
        mlp(1, 1, ())
    with pytest.raises(ValueError, match=r"activation must be one of .* got activation='sine'"):
        NICE(2, activation="sine")
    with pytest.raises(ValueError, match="dim=0"):
        ConditionalGaussian(0, 1)
    with pytest.raises(ValueError, match="1 <= dim <= total_dim, got dim=3, total_dim=2"):
        RedundantNICE(3, 2)
    with pytest.raises(ValueError, match="num_layers=-1"):
        NICE(2, num_layers=-1)
    with pytest.raises(ValueError, match=r"1 <= dim <= total_dim, got dim=0"):
        Flow([], 0, 0)
    with pytest.raises(ValueError, match=r"conditional must be of dim=1 and extra=1 .* got None"):
        Flow([], 1, 2)
    with pytest.raises(
        ValueError, match=r"conditional must be of dim=2 and extra=0 .* got \(1, 1\)"
    ):
        Flow([], 2, 2, ConditionalGaussian(1, 1))
    with pytest.raises(ValueError, match=r"event dimension 1 .* got AffineTransform"):
        Flow([AffineTransform(0.0, 2.0)], 2, 2)


# --------------------------------------------------------------------------------------------------
# Flows


@flows
def test_density_is_that_of_the_pyro_distribution_and_of_its_draws(name: str) -> None:
    flow = build(name)
    xy, log_q = flow.forward_and_log_prob(base_noise(flow, 50))
    assert xy.shape == (50, flow.total_dim)
    assert flow().event_shape == (flow.total_dim,)
    torch.testing.assert_close(flow.log_prob(xy.clone()), log_q, **close(name, 1e-9))
    torch.testing.assert_close(
        flow().log_prob(xy.reshape(5, 10, -1)), log_q.reshape(5, 10), **close(name, 1e-9)
    )
    drawn = flow(stl=True).expand((4,)).rsample((3,))
    assert drawn.shape == (3, 4, flow.total_dim)
    assert drawn.requires_grad
    assert not flow().sample((2,)).requires_grad


@pytest.mark.parametrize("name", [name for name in FLOWS if not name.startswith("symmetrized")])
def test_density_of_the_flow_is_autograd_s(name: str) -> None:
    flow = build(name)
    at = base_noise(flow, 4)
    check_log_det(
        lambda z: flow.forward_and_log_prob(z)[0],
        lambda z, _: flow.base.log_prob(z) - flow.forward_and_log_prob(z)[1],
        at,
        close(name, 1e-9)["rtol"],
    )


@pytest.mark.parametrize("name", [name for name in FLOWS if FLOWS[name](dtype=F64).total_dim < 3])
def test_density_integrates_to_one(name: str) -> None:
    flow, n = build(name, scale=0.15), 100_000
    slow = {"continuous2": (8.0, 81), "spline2": (9.0, 301)}
    points, cell = grid_1d() if flow.total_dim == 1 else grid_2d(*slow.get(name, ()))
    with torch.no_grad():
        total = flow.log_prob(points.reshape(-1, flow.total_dim)).exp().sum() * cell
        drawn = flow.forward_and_log_prob(base_noise(flow, n))[0]
    # heavy tails, and those that networks stretch, reach beyond the grid: so do as many draws
    outside = float((drawn.abs() > points.max()).any(1).double().mean())
    # of a share; where none was seen, one in n is not excluded
    error = math.sqrt(max(outside, 1.0 / n) / n)
    kinks = 1e-4 if name.startswith("spline") else 0.0  # which a grid sees to second order only
    assert abs(float(total) + outside - 1.0) < kinks + 5 * error


@flows
def test_every_parameter_gets_a_gradient(name: str) -> None:
    flow = build(name)
    objective = SymmetrizedKL if isinstance(flow, Symmetrized) else ReverseKL
    energy = Gaussian(torch.ones(flow.dim), dtype=F64)
    loss, _ = objective(energy, 64)(flow, generator=seeded_generator(1))
    loss.backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None, parameter_name
        useful = parameter.grad
        if parameter_name.endswith("below"):  # the upper half of an unused triangle has none
            useful = parameter.grad[torch.ones_like(parameter).tril(-1).bool()]
        if parameter_name.endswith("above"):
            useful = parameter.grad[torch.ones_like(parameter).triu(1).bool()]
        assert bool((useful != 0).any()) or useful.numel() == 0, parameter_name


@flows
def test_rows_do_not_see_each_other(name: str) -> None:
    flow = build(name)
    z = base_noise(flow, 8)
    other = z.clone()
    for wild in (100.0, math.nan):
        if name.startswith("continuous") and math.isnan(wild):
            continue  # the rows share the steps of the solver, which a NaN would stop
        other[3] = wild
        for before, after in zip(
            flow.forward_and_log_prob(z), flow.forward_and_log_prob(other), strict=True
        ):
            keep = torch.arange(8) != 3
            torch.testing.assert_close(before[keep], after[keep], **close(name, 1e-12))
    assert name.startswith("continuous") or bool(flow.forward_and_log_prob(other)[1][3].isnan())


@saved
def test_dtypes(name: str) -> None:
    flow = FLOWS[name](dtype=torch.float32)
    single = flow.forward_and_log_prob(base_noise(flow, 6).float())
    assert [t.dtype for t in single] == [torch.float32] * 2
    double = stirred(flow).double().forward_and_log_prob(z := base_noise(flow.double(), 6))
    assert [t.dtype for t in double] == [F64] * 2
    assert flow.dtype == F64
    assert flow().rsample((2,)).dtype == F64
    rounded = flow.float().forward_and_log_prob(z.float())
    torch.testing.assert_close(rounded[0].double(), double[0], rtol=1e-3, atol=1e-3)
    assert NICE(2).dtype == torch.get_default_dtype()


@saved
def test_a_copy_shares_nothing(name: str) -> None:
    flow = build(name)
    copied = copy.deepcopy(flow)
    z = base_noise(flow, 9)
    before = flow.forward_and_log_prob(z)[0]
    stirred(flow)
    assert torch.equal(copied.forward_and_log_prob(z)[0], before)


@saved
def test_generator_decides_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = (FLOWS[name](dtype=F64, generator=seeded(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    hidden = any(word in key for key in a for word in ("net.0", "hyper.0", "ode.0"))
    assert all(torch.equal(a[key], c[key]) for key in a) == (not hidden)


@nices
def test_fresh_flow_is_the_standard_normal(name: str) -> None:
    flow = FLOWS[name](dtype=F64)
    z = noise(5, flow.total_dim)
    assert torch.equal(flow.forward_and_log_prob(z)[0], z)
    assert float(flow.log_abs_det().detach()) == 0.0  # type: ignore[attr-defined]


@flows
def test_path_in_one_pass_is_that_through_the_inverse(name: str) -> None:
    flow = build(name, scale=0.1)
    z, weights = base_noise(flow, 6), noise(6)
    xy, log_q, path = flow.forward_and_path_log_prob(z)
    expected = flow.path_log_prob(xy)
    torch.testing.assert_close(path, log_q)
    trained = list(flow.parameters())
    found = torch.autograd.grad(
        (weights * path).sum(), trained, retain_graph=True, materialize_grads=True
    )
    there = torch.autograd.grad((weights * expected).sum(), trained, materialize_grads=True)
    torch.testing.assert_close(found, there, **close(name, 1e-8))
    in_two = flow.forward_and_path_log_prob(z.reshape(2, 3, -1))[2]
    by_row = torch.stack([flow.forward_and_path_log_prob(row)[2] for row in z])
    for other in (in_two.flatten(), by_row):
        torch.testing.assert_close(other, path, **close(name, 1e-9))
        again = torch.autograd.grad((weights * other).sum(), trained, materialize_grads=True)
        torch.testing.assert_close(again, found, **close(name, 1e-8))


class _Scaled(Flow):
    """A flow with layers and, after them, a factor of its own."""

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        xy, log_q = super().forward_and_log_prob(z)
        return 2.0 * xy, log_q - self.dim * math.log(2.0)

    def log_prob(self, xy: Tensor) -> Tensor:
        return super().log_prob(xy / 2.0) - self.dim * math.log(2.0)


def test_path_of_a_flow_with_a_push_of_its_own_is_of_that_push() -> None:
    flow, z = (
        stirred(_Scaled([AdditiveCoupling(2, hidden_sizes=(8,), dtype=F64)], 2, 2)),
        noise(4, 2),
    )
    xy, log_q, path = flow.forward_and_path_log_prob(z)
    torch.testing.assert_close(
        (xy, log_q, path), (*flow.forward_and_log_prob(z), flow.log_prob(xy))
    )


class _Constant(nn.Module):
    """A conditioner that looks at nothing and learns nothing."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, z: Tensor) -> Tensor:
        return self.get_buffer("value").expand(*z.shape[:-1], -1)


def test_path_through_constant_couplings() -> None:
    layers = [
        Shift(noise(2)),
        AdditiveCoupling(2, _Constant(noise(1))),
        AffineCoupling(2, _Constant(noise(2))),
    ]
    flow = Flow(layers, 2, 2)
    xy, _, path = flow.forward_and_path_log_prob(noise(4, 2))
    found, expected = (
        torch.autograd.grad(p.sum(), list(flow.parameters()), retain_graph=True)
        for p in (path, flow.path_log_prob(xy))
    )
    torch.testing.assert_close(found, expected)


@flows
def test_checks_of_arguments(name: str) -> None:
    flow = build(name)
    for call in (flow.forward_and_log_prob, flow.log_prob, flow.path_log_prob):
        size = (
            base_noise(flow, 1).shape[-1] if call == flow.forward_and_log_prob else flow.total_dim
        )
        with pytest.raises(ValueError, match=rf"must have shape \(\*batch, {size}\), got shape"):
            call(noise(4, size + 1))
        with pytest.raises(ValueError, match=r"torch.float64 and cpu, got torch.float32"):
            call(noise(4, size).float())
    with pytest.raises(ValueError, match="x must have shape"):
        flow.log_prob_x(noise(4))


def test_nice_is_redundant_nice_without_latents() -> None:
    a = stirred(NICE(2, hidden_sizes=(8,), dtype=F64, generator=seeded()))
    b = stirred(RedundantNICE(2, 2, hidden_sizes=(8,), dtype=F64, generator=seeded()))
    z = noise(4, 2)
    assert torch.equal(a.forward_and_log_prob(z)[0], b.forward_and_log_prob(z)[0])
    assert torch.equal(a.log_prob_x(z), b.log_prob_x(z))
    assert a.conditional is None
    assert b.conditional is None


# --------------------------------------------------------------------------------------------------
# The Gaussian of y given x, and the extended energy


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_conditional_gaussian_is_pyro_s(extra: int) -> None:
    conditional = stirred(ConditionalGaussian(2, extra, (8,), dtype=F64))
    x, y = noise(5, 3, 2), noise(5, 3, extra, seed=8)
    distribution = conditional(x)
    assert (distribution.batch_shape, distribution.event_shape) == ((5, 3), (extra,))
    torch.testing.assert_close(
        conditional.log_prob(y, x), distribution.log_prob(y), rtol=1e-10, atol=1e-10
    )
    if extra > 1:
        assert bool((distribution.covariance_matrix[..., 0, 1] != 0.0).all())  # full, not diagonal
    draws = conditional.sample(x[0, :1], 40_000, seeded_generator(1))[:, 0]
    within_se(*_pairs(draws, distribution.mean[0, 0]))
    centered = draws - distribution.mean[0, 0]
    products = centered.unsqueeze(-1) * centered.unsqueeze(-2)
    within_se(*_pairs(products, distribution.covariance_matrix[0, 0]))


def _pairs(draws: Tensor, truth: Tensor) -> tuple[object, Tensor, object]:
    mean, se = mean_and_se(draws)
    return mean, truth, se


def test_conditional_gaussian_refuses() -> None:
    conditional = ConditionalGaussian(2, 1, dtype=F64)
    with pytest.raises(ValueError, match=r"y must have shape \(4, 1\) .* got \(4, 2\)"):
        conditional.log_prob(noise(4, 2), noise(4, 2))
    with pytest.raises(ValueError, match=r"y must have shape \(4, 1\)"):
        conditional.log_prob(noise(1, 1), noise(4, 2))
    with pytest.raises(ValueError, match=r"\(\*batch, dim\) with dim=2"):
        conditional(noise(4, 3))


class Quartic(Energy):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*self.batch_shape(x), -1)
        return 0.25 * (flat**4).sum(-1) + flat[..., 0] * flat[..., -1]


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 2, 3)])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_extended_energy_for_any_event_shape(shape: tuple[int, ...], extra: int) -> None:
    energy, d = Quartic(shape).double(), math.prod(shape)
    flow = stirred(RedundantNICE(d, d + extra, num_layers=1, hidden_sizes=(8,), dtype=F64))
    extended = flow.extend(energy)
    assert extended.event_shape == (d + extra,)
    xy = noise(4, 3, d + extra)
    x, y = extended.split(xy)
    assert (x.shape, y.shape) == ((4, 3, *shape), (4, 3, extra))
    value = energy(x) - (
        flow.conditional.log_prob(y, xy[..., :d]) if flow.conditional is not None else 0.0
    )
    torch.testing.assert_close(extended(xy), value)
    assert extended.split(extended.initial(5, seeded_generator(0)))[0].shape == (5, *shape)
    assert extended.dtype == F64


def test_extended_energy_keeps_the_partition_function_and_the_draws() -> None:
    energy = DoubleWell(dtype=F64)
    extended = build("redundant_1_2", scale=0.1).extend(energy)  # which the grid holds
    points, cell = grid_2d(half=24.0, points=1201)
    with torch.no_grad():
        log_z = (-extended(points)).logsumexp(0) + math.log(cell)
    assert extended.log_z == energy.log_z
    assert abs(float(log_z) - energy.log_z) < 1e-6
    assert extended.has_exact_draws
    xy = extended.sample(20_000, seeded_generator(2))
    within_se(*_pairs(xy[:, 0], energy.mean))
    assert extended.conditional is not None
    within_se(
        *_pairs(
            xy[:, 1] - extended.conditional(xy[:, :1]).mean.detach()[:, 0],
            torch.tensor(0.0, dtype=F64),
        )
    )


def test_extend_refuses() -> None:
    flow = NICE(2, dtype=F64)
    with pytest.raises(
        ValueError, match=r"dim=2 entries.*got event_shape \(\) of 1 \(DoubleWell\)"
    ):
        flow.extend(DoubleWell(dtype=F64))
    with pytest.raises(
        ValueError, match=r"Exponential has support=.*wrap it: Unconstrained\(energy\)"
    ):
        NICE(1, dtype=F64).extend(Exponential(1.0, dtype=F64))
    with pytest.raises(
        ValueError, match=r"the same dtype: NICE has torch.float64, Gaussian has torch.float32"
    ):
        flow.extend(Gaussian(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"must be a pyroebm.Energy, got function"):
        AugmentedEnergy(lambda x: x, None, 1)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Marginals and entropies


def linear_gaussian(
    dim: int, total_dim: int, scale: float = 0.5
) -> tuple[RedundantNICE, dist.MultivariateNormal]:
    """A flow without couplings is a Gaussian, and so is its x."""
    flow = stirred(
        RedundantNICE(dim, total_dim, num_layers=0, hidden_sizes=(8,), dtype=F64), scale=scale
    )
    s, c = flow.linear.matrix().detach(), flow.transform.parts[-1].offset.detach()
    return flow, dist.MultivariateNormal(c[:dim], (s @ s.T)[:dim, :dim])


@pytest.mark.parametrize(("dim", "total_dim"), [(1, 1), (2, 2), (1, 2), (3, 4)])
def test_marginal_of_a_gaussian_flow_is_exact(dim: int, total_dim: int) -> None:
    flow, distribution = linear_gaussian(dim, total_dim)
    x = 3.0 * noise(4, 5, dim)  # tails too
    torch.testing.assert_close(
        flow.log_prob_x(x).detach(), distribution.log_prob(x), rtol=1e-6, atol=1e-6
    )


def test_marginal_by_grid_integrates_to_one_and_bounds_are_below_it() -> None:
    with fixed_problem():
        flow = build("redundant_1_2", scale=0.05)
    x, step = grid_1d(points=401)
    log_q = flow.log_prob_x(x.unsqueeze(-1))
    assert flow.log_prob_x(x[:0].unsqueeze(-1)).shape == (0,)
    assert abs(float(log_q.exp().sum() * step) - 1.0) < 1e-6
    # where the ratios have a moderate variance
    few = torch.linspace(-1.0, 0.0, 5, dtype=F64).unsqueeze(-1)
    truth, repeats = flow.log_prob_x(few), few.expand(5_000, 5, 1)
    generator, gaps = seeded_generator(3), []
    for k in (1, 32):
        with torch.no_grad():
            log_ratio = flow.log_prob_x(repeats, k, "bound", generator) - truth
        mean, se = mean_and_se(log_ratio.exp())
        within_se(mean, np.ones(5), se, what=f"mean ratio for K = {k}")
        # E[log q(x) - bound], with the error of the mean ratio taken out, since that is 1
        gaps.append(mean_and_se(log_ratio.expm1() - log_ratio))
    (one, one_se), (many, many_se) = gaps
    assert (many > 5 * many_se).all()
    assert (one - many > 5 * np.hypot(one_se, many_se)).all()


def test_marginal_bound_where_two_latents_are_redundant() -> None:
    flow, distribution = linear_gaussian(1, 3, scale=0.15)  # the weights of y have a variance
    x = torch.tensor([[0.0], [1.0]], dtype=F64).expand(4000, 2, 1)
    with torch.no_grad():
        mean, se = mean_and_se(flow.log_prob_x(x, 8, generator=seeded_generator(1)).exp())
    within_se(mean, distribution.log_prob(x[0]).exp(), se)


def test_marginal_refuses() -> None:
    flow = build("redundant_1_3")
    with pytest.raises(
        ValueError, match="method must be 'auto', 'grid' or 'bound', got method='exact'"
    ):
        flow.log_prob_x(noise(2, 1), method="exact")
    with pytest.raises(ValueError, match="total_dim - dim = 2; use 'bound'"):
        flow.log_prob_x(noise(2, 1), method="grid")
    with pytest.raises(ValueError, match="num_samples=0"):
        flow.log_prob_x(noise(2, 1), 0)
    with pytest.raises(ArithmeticError, match="did not converge"):
        _log_integral(
            lambda y: torch.rand(len(y), 1, generator=seeded_generator(0), dtype=F64),
            *torch.eye(2, dtype=F64)[0],
        )


def test_quadrature_widens_and_refines() -> None:
    normal = dist.Normal(torch.tensor([5.0, 0.0], dtype=F64), torch.tensor([0.02, 30.0], dtype=F64))
    one = torch.tensor(1.0, dtype=F64)
    value = _log_integral(lambda y: normal.log_prob(y.unsqueeze(-1)), -one, one)
    torch.testing.assert_close(value, torch.zeros(2, dtype=F64), rtol=0.0, atol=1e-7)


def test_entropy_is_that_of_the_density() -> None:
    flow = build("nice2", scale=0.05)  # so that the grid has all of it
    points, cell = grid_2d()
    with torch.no_grad():
        log_q = flow.log_prob(points)
        by_grid = -(log_q.exp() * log_q).sum() * cell
        assert abs(float(by_grid - flow.entropy())) < 1e-6  # type: ignore[attr-defined]
        joint = build("redundant_2_5")
        mean, se = mean_and_se(-joint.forward_and_log_prob(noise(20_000, 5))[1])
    within_se(mean, joint.joint_entropy(), se)
    with pytest.raises(NotImplementedError, match=r"dim=2, total_dim=5.*joint_entropy\(\)"):
        joint.entropy()  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="Flow has no closed form"):
        affine_flow().joint_entropy()


# --------------------------------------------------------------------------------------------------
# Mutants: a check that a broken layer passes is no check


class _HalvedPLU(PLULinear):
    def log_abs_det(self) -> Tensor:
        return 0.5 * super().log_abs_det()


class _FlippedPLU(PLULinear):
    def log_abs_det(self) -> Tensor:
        return -super().log_abs_det()


class _ScalingCoupling(AdditiveCoupling):
    def _call(self, z: Tensor) -> Tensor:
        return torch.cat((super()._call(z)[..., :-1], 1.05 * super()._call(z)[..., -1:]), dim=-1)


# what a coupling whose scale net broadcasts would report
class _HalvedAffine(IndependentTransform):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * super().log_abs_det_jacobian(x, y)


MUTANTS: dict[str, Callable[[], Transform]] = {
    "halved S": lambda: _HalvedPLU(noise(4, 4)),
    "flipped S": lambda: _FlippedPLU(noise(4, 4)),
    "coupling that scales": lambda: stirred(_ScalingCoupling(4, hidden_sizes=(8,), dtype=F64)),
    "halved coupling": lambda: _HalvedAffine(AffineTransform(0.0, noise(4).exp()), 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_log_det_are_caught(name: str) -> None:
    transform = MUTANTS[name]()
    with pytest.raises(AssertionError, match="not close"):
        check_log_det(transform, transform.log_abs_det_jacobian, noise(3, 4))


def test_domain_is_that_of_vectors() -> None:
    for make in TRANSFORMS.values():
        transform = make()
        assert transform.domain is constraints.real_vector
        assert transform.codomain is constraints.real_vector
        assert transform.bijective


@pytest.mark.gpu
def test_device_moves(tmp_path: Path) -> None:
    flow = stirred(RedundantNICE(1, 2, hidden_sizes=(8,), dtype=F64)).to("cuda")
    assert flow.device.type == "cuda"
    assert flow().sample((3,)).is_cuda
    save(flow, tmp_path / "flow.safetensors")
    z = noise(4, 2)
    torch.testing.assert_close(
        load(tmp_path / "flow.safetensors").forward_and_log_prob(z)[0],
        flow.forward_and_log_prob(z.cuda())[0].cpu(),
    )
