"""Fields and particles: partition functions by other ways, symmetries, and chains where there are
no exact draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lib.checks import within_se
from lib.seeds import seeded
from torch import Tensor

from pyroebm import HMC, MCMC
from pyroebm.core import value_and_grad
from pyroebm.targets import DW4, Gaussian, LennardJones, Particles, Phi4, Target

pytestmark = pytest.mark.usefixtures("float64")


#: Targets without exact draws; those with them are in tests/targets/test_targets.py.
PHYSICS: dict[str, Callable[..., Target]] = {
    "phi4": Phi4,
    "phi4_broken": partial(Phi4, 5, -1.0, 0.3),
    "phi4_single_well": partial(Phi4, 4, 1.0, 0.5),
    "dw4": DW4,
    "lj13_once": partial(LennardJones, "once"),
    "lj13_twice": partial(LennardJones, "twice"),
    "lj3": partial(LennardJones, "once", 3),
}
every = pytest.mark.parametrize("name", PHYSICS)


@every
def test_shapes_rows_and_gradients(name: str) -> None:
    target = PHYSICS[name]()
    x = target.initial(5, seeded())
    values = target(x)
    assert values.shape == (5,)
    assert torch.isfinite(values).all()
    torch.testing.assert_close(target(x.reshape(5, 1, -1)), values.reshape(5, 1))
    torch.testing.assert_close(torch.func.vmap(target)(x), values)
    broken = x.clone()
    broken[2] = math.nan
    assert target(broken)[2].isnan()
    torch.testing.assert_close(target(broken)[[0, 1, 3, 4]], values[[0, 1, 3, 4]])
    direction, step = torch.randn(x.shape, generator=seeded(1)), 1e-6
    slope = (target(x + step * direction) - target(x - step * direction)) / (2.0 * step)
    torch.testing.assert_close(
        (value_and_grad(target, x)[1] * direction).sum(1), slope, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(x, target.initial(5, seeded()))
    narrow = PHYSICS[name](dtype=torch.float32)
    assert (
        narrow.dtype
        == narrow(x.float()).dtype
        == narrow.initial(2, seeded()).dtype
        == torch.float32
    )
    torch.testing.assert_close(narrow(x.float()).double(), values, rtol=1e-3, atol=1e-3)


@every
def test_there_are_no_draws_to_be_had(name: str) -> None:
    target = PHYSICS[name]()
    assert not target.has_exact_draws
    with pytest.raises(NotImplementedError, match="no exact draws"):
        target.sample(1)


# The field


@pytest.mark.parametrize(
    ("field", "log_z"),
    [(Phi4(8), 3.81944998), (Phi4(16), 7.63835191), (Phi4(8, 1.0, 0.0), 0.72967815)],
    ids=["L=8", "L=16", "free"],
)
def test_partition_functions_of_the_field(field: Phi4, log_z: float) -> None:
    assert field.log_z == pytest.approx(log_z, abs=5e-9)


@pytest.mark.parametrize("name", ["lam", "free"])
def test_the_field_by_a_grid_in_three_dimensions(name: str) -> None:
    field = Phi4(3, -1.0, 0.3) if name == "lam" else Phi4(3, 0.8, 0.0)
    axis = torch.linspace(-6.5, 6.5, 131)
    x = torch.cartesian_prod(axis, axis, axis)
    log_weights = -field(x)
    cell = 3.0 * math.log(float(axis[1] - axis[0]))
    assert float(log_weights.logsumexp(0)) + cell == pytest.approx(field.log_z, abs=1e-9)
    second = torch.softmax(log_weights, 0) @ x.square()
    torch.testing.assert_close(second, field.variance, rtol=1e-9, atol=1e-9)


def test_a_little_coupling_is_continuous_with_none() -> None:
    """The transfer matrix and the closed form of the free field meet."""
    assert Phi4(8, 1.0, 1e-9).log_z == pytest.approx(Phi4(8, 1.0, 0.0).log_z, abs=1e-7)


def test_the_free_field_is_a_normal_distribution() -> None:
    field = Phi4(6, 0.7, 0.0)
    precision = torch.autograd.functional.hessian(lambda x: field(x), torch.zeros(6))
    normal = Gaussian(torch.zeros(6), covariance=torch.linalg.inv(precision))
    x = field.sample(4, seeded())
    torch.testing.assert_close(field(x) + field.log_z, normal(x) + normal.log_z)
    draws = field.sample(100_000, seeded(1))
    products = draws[:, :1] * draws
    within_se(
        products.mean(0), torch.linalg.inv(precision)[0], products.std(0) / math.sqrt(len(draws))
    )


def test_the_sign_of_the_field() -> None:
    field = Phi4(4)
    assert field.mode_of(torch.tensor([[1.0, 1, 1, -1], [-1, -1, 1, -1]])).tolist() == [1, 0]
    assert field.mode_weights.tolist() == [0.5, 0.5]
    assert Phi4(4, 1.0, 0.5).mode_weights is None
    with pytest.raises(NotImplementedError, match="mode_weights is None"):
        Phi4(4, 1.0, 0.5).mode_of(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Phi4(1), "length must be at least 2, got length=1"),
        (lambda: Phi4(4, -1.0, 0.0), r"m2 must be positive"),
        (lambda: Phi4(4, 1.0, -1.0), "lam finite and not negative, got m2=1.0, lam=-1.0"),
        (lambda: LennardJones("both"), 'pairs must be "once" or "twice", got pairs=\'both\''),
        (lambda: LennardJones("once", 1), "num_particles must be at least 2"),
        (lambda: LennardJones("once", epsilon=0.0), "epsilon must be positive"),
        (
            lambda: DW4().coordinates(torch.zeros(3, 2)),
            r"x must have shape \(\*batch, 4, 2\), got shape \(3, 2\)",
        ),
    ],
)
def test_refusals(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# Particles

SYSTEMS = [name for name in PHYSICS if name.startswith(("dw", "lj"))]


@pytest.mark.parametrize("name", SYSTEMS)
def test_particles_have_the_symmetries(name: str) -> None:
    target = PHYSICS[name]()
    assert isinstance(target, Particles)
    u = target.initial(4, seeded())
    x = target.positions(u)
    torch.testing.assert_close(x.mean(1), torch.zeros(4, target.space))
    torch.testing.assert_close(target.coordinates(x), u)
    torch.testing.assert_close(target.coordinates(x + 3.0), u)
    # volume and length are those of the subspace
    torch.testing.assert_close(x.square().sum((1, 2)), u.square().sum(1))
    turn = torch.linalg.qr(torch.randn(target.space, target.space, generator=seeded(1)))[0]
    order = torch.randperm(target.num_particles, generator=seeded(2))
    for moved in (x @ turn, x[:, order], -x):
        torch.testing.assert_close(target(target.coordinates(moved)), target(u))


def test_energies_pair_by_pair() -> None:
    x = torch.randn(4, 2, generator=seeded())
    x = x - x.mean(0)
    distances = [float((x[i] - x[j]).norm()) for i in range(4) for j in range(i)]
    dw4 = sum(-4.0 * (d - 4.0) ** 2 + 0.9 * (d - 4.0) ** 4 for d in distances)
    assert float(DW4()(DW4().coordinates(x))) == pytest.approx(dw4)
    x = 1.5 * torch.randn(13, 3, generator=seeded(1))
    x = x - x.mean(0)
    well = sum(float(d) ** -12 - 2.0 * float(d) ** -6 for d in torch.pdist(x))
    spring = 0.5 * float(x.square().sum())
    for convention, times in (("once", 1.0), ("twice", 2.0)):
        target = LennardJones(convention, epsilon=0.7)
        assert float(target(target.coordinates(x))) == pytest.approx(0.7 * times * well + spring)


@pytest.mark.parametrize("name", ["phi4_broken", "dw4", "lj3"])
def test_chains_satisfy_stein(name: str) -> None:
    """E[u . grad U] is the number of degrees of freedom: 3 (n - 1) of particles, not 3 n."""
    target = PHYSICS[name]()
    mcmc = MCMC(
        HMC(num_steps=12), num_samples=150, warmup_steps=150, num_chains=64, seed=1, progress=False
    )
    mcmc.run(target)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    products = (x * value_and_grad(target, x)[1]).sum(-1).mean(1)  # a mean for each chain
    within_se(
        products.mean(), target.event_shape.numel(), products.std() / math.sqrt(len(products))
    )
    if isinstance(target, Phi4):
        squares: Tensor = x.square().mean((1, 2))
        within_se(squares.mean(), target.variance[0], squares.std() / math.sqrt(len(squares)))


def test_particles_start_apart() -> None:
    target = LennardJones("twice")
    u = target.initial(200, seeded())
    nearest = target.squared_distances(target.positions(u)).amin(1).sqrt()
    assert float(nearest.min()) > 0.7
    assert float(nearest.median()) >= 0.85
