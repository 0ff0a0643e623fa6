"""Targets: each line of the table inherits the property tests; then exact numbers, and mutants that
the checks must catch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import seeded
from safetensors.torch import load, save
from scipy.integrate import quad
from torch import Tensor
from torch import distributions as td

from pyroebm.core import Unconstrained, value_and_grad
from pyroebm.core.supports import base_constraint, is_discrete, is_real
from pyroebm.targets import (
    Banana,
    BernoulliProduct,
    Beta,
    CategoricalOneHot,
    Checkerboard,
    Circles,
    Dirichlet,
    DoubleWell,
    Exponential,
    Funnel,
    Gamma,
    Gaussian,
    GaussianMixture,
    HalfDisc,
    LogNormal,
    ManyWell,
    Phi4,
    Pinwheel,
    Ring,
    Rosenbrock,
    SpinProduct,
    Target,
    TwoMoons,
    TwoSpirals,
    eight_gaussians,
    scales_gaussian,
)
from pyroebm.targets.base import TabulatedDensity, rejection

COVARIANCE = [[2.0, 0.6], [0.6, 1.0]]
FAR = [[-3.0, 0.0], [2.0, 1.0], [0.0, 4.0]]


def wishart(d: int, seed: int = 3) -> Tensor:
    a = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / d


TARGETS: dict[str, Callable[..., Target]] = {
    "double_well": DoubleWell,
    "gaussian_scalar": partial(Gaussian, 1.5, scale=0.7),
    "gaussian_scalar_dense": partial(Gaussian, 1.5, covariance=[[2.0]]),
    "gaussian_dense": partial(Gaussian, [1.0, -2.0], covariance=COVARIANCE),
    "gaussian_diagonal": partial(Gaussian, [1.0, -2.0], scale=[0.5, 3.0]),
    "gaussian_image": partial(
        Gaussian, torch.linspace(-1, 1, 12).reshape(2, 2, 3), covariance=wishart(12)
    ),
    "gaussian_image_diagonal": partial(Gaussian, torch.zeros(2, 2, 3)),
    "scales": scales_gaussian,
    "mixture_scalar": partial(GaussianMixture, [-2.0, 3.0], scale=[0.5, 1.0], weights=[1.0, 3.0]),
    "mixture_isotropic": partial(
        GaussianMixture, FAR, scale=[0.3, 0.5, 0.4], weights=[0.5, 0.2, 0.3]
    ),
    "mixture_shared": partial(GaussianMixture, FAR, covariance=COVARIANCE),
    "mixture_dense": partial(
        GaussianMixture, FAR, covariance=torch.stack([wishart(2, s) for s in range(3)])
    ),
    "mixture_image": partial(GaussianMixture, torch.arange(12.0).reshape(3, 2, 2), scale=0.5),
    "grid9": GaussianMixture.grid,
    "grid25": partial(GaussianMixture.grid, side=5),
    "gmm40": GaussianMixture.gmm40,
    "banana": Banana,
    "funnel": Funnel,
    "funnel2": partial(Funnel, dim=2, variance=3.0),
    "rosenbrock": Rosenbrock,
    "many_well": partial(ManyWell, num_pairs=3),
    "many_well_pair": partial(ManyWell, num_pairs=1),
    "many_well_32": ManyWell,
    "ring": Ring,
    "half_disc": HalfDisc,
    "phi4_free": partial(Phi4, 6, 1.0, 0.0),
    "phi4_pair": partial(Phi4, 2, 0.5, 0.0),
    "two_moons": TwoMoons,
    "two_moons_wide": partial(TwoMoons, scale=2.0, shift=(-1.0, -0.2)),
    "two_spirals": partial(TwoSpirals, noise=0.2),
    "circles": Circles,
    "rings": Circles.rings,
    "checkerboard": Checkerboard,
    "pinwheel": Pinwheel,
    "eight_gaussians": eight_gaussians,
    "two_gaussians": partial(
        GaussianMixture, [[-2.0, 0.0], [2.0, 0.0]], scale=0.5, weights=[0.9, 0.1]
    ),
    "exponential": partial(Exponential, 2.5),
    "exponential_image": partial(Exponential, torch.arange(1.0, 7.0).reshape(1, 2, 3)),
    "gamma": partial(Gamma, [2.0, 0.7], [3.0, 0.5]),
    "gamma_small": partial(Gamma, 0.05, 2.0),
    "beta": partial(Beta, [2.0, 0.6], 3.0),
    "beta_small": partial(Beta, 0.05, 0.5),
    "dirichlet": partial(Dirichlet, [0.8, 2.0, 1.5]),
    "dirichlet_rows": partial(Dirichlet, [[0.8, 2.0, 1.5], [1.0, 0.5, 4.0]]),
    "log_normal": partial(LogNormal, [0.3, -1.0], [0.5, 0.25]),
    "bernoulli": partial(BernoulliProduct, [0.4, -1.2, 2.0]),
    "bernoulli_image": partial(BernoulliProduct, torch.linspace(-2, 2, 6).reshape(1, 2, 3)),
    "spin": partial(SpinProduct, [0.4, -1.2, 0.1]),
    "categorical": partial(CategoricalOneHot, [0.4, -1.2, 0.1]),
    "categorical_rows": partial(CategoricalOneHot, [[0.4, -1.2, 0.1], [1.0, 0.0, -1.0]]),
}
CONTINUOUS = [name for name, make in TARGETS.items() if not is_discrete(make().support)]
OVERLAPPING = (
    "gmm40",
    "mixture_shared",
    "mixture_dense",
    "mixture_scalar",
    "mixture_image",
    "mixture_isotropic",
)
DRAWS = 20_000


def make(name: str, dtype: torch.dtype = torch.float64) -> Target:
    return TARGETS[name](dtype=dtype)


every_target = pytest.mark.parametrize("name", TARGETS)
every_continuous = pytest.mark.parametrize("name", CONTINUOUS)


# What draws are judged by. Each raises AssertionError; the mutants below show that it does.


def check_moments(target: Target, x: Tensor) -> None:
    """Mean and variance within 5 measured standard errors; the funnel in coordinates with fourth
    moments."""
    mean, variance = target.mean, target.variance
    if isinstance(target, Funnel):
        x = target.whiten(x)
        mean, variance = torch.zeros_like(mean), torch.ones_like(mean)
    within_se(x.mean(0), mean, mean_and_se(x)[1], what="mean")
    squares = (x - mean) ** 2
    within_se(squares.mean(0), variance, mean_and_se(squares)[1], what="variance")


def check_stein(target: Target, x: Tensor) -> None:
    """E[(u - c) . grad E_u(u)] = degrees of freedom, in unconstrained coordinates, for any constant
    c: near the center here."""
    free = Unconstrained(target)
    u = free.unconstrain(x)
    products = ((u - u.mean(0)) * value_and_grad(free, u)[1]).reshape(len(u), -1).sum(1)
    within_se(
        products.mean(), math.prod(free.event_shape), mean_and_se(products)[1], what="E[u . grad E]"
    )


def check_modes(target: Target, x: Tensor) -> None:
    """Mode frequencies, or expected responsibilities where components overlap, within 5 standard
    errors of the weights."""
    weights = target.mode_weights
    seen = target.responsibilities(x) if isinstance(target, GaussianMixture) else None
    if seen is None:
        seen = torch.nn.functional.one_hot(target.mode_of(x), len(weights)).double()
    se = torch.sqrt(weights * (1 - weights) / len(x))
    within_se(seen.mean(0), weights, se, what="mode weights")


# Properties of every target


@every_target
def test_shapes_and_dtypes(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        target = make(name, dtype)
        x = target.initial(6, seeded())
        event = tuple(target.event_shape)
        assert x.shape == (6, *event)
        assert target.dtype == x.dtype == target(x).dtype == dtype
        for batch in ((6,), (2, 3), (1, 6, 1)):
            e = target(x.reshape(*batch, *event))
            assert e.shape == batch
            torch.testing.assert_close(e.flatten(), target(x))
        assert target(x[0]).shape == ()
        torch.testing.assert_close(target(x[0]), target(x)[0])
        for truth in (target.mean, target.variance):
            assert truth is not None
            assert truth.shape == event
            assert truth.dtype == dtype
        assert target.sample(1, seeded()).dtype == dtype
        if event:
            with pytest.raises(ValueError, match="x must have shape"):
                target(torch.zeros(3, *event, 7, dtype=dtype))


@every_target
def test_follows_to_and_state_dict(name: str) -> None:
    narrow, wide = make(name, torch.float32), make(name)
    moved = make(name, torch.float32).double()
    assert (
        moved.dtype
        == moved.mean.dtype
        == moved.sample(1).dtype
        == moved.initial(1).dtype
        == torch.float64
    )
    torch.testing.assert_close(moved.mean, wide.mean, rtol=1e-5, atol=1e-6)
    assert narrow.log_z == pytest.approx(wide.log_z, rel=1e-5, abs=1e-5)
    fresh = make(name)
    fresh.load_state_dict(load(save(wide.state_dict())))
    x = wide.sample(5, seeded())
    assert torch.equal(fresh(x), wide(x))
    assert fresh.log_z == wide.log_z
    assert all(not buffer.requires_grad for buffer in wide.buffers())
    assert not list(wide.parameters())


@every_target
def test_rows_are_independent(name: str) -> None:
    target = make(name)
    x = target.sample(6, seeded())
    broken = x.clone()
    broken[2] = math.nan
    keep = [0, 1, 3, 4, 5]
    assert torch.isnan(target(broken)[2])
    torch.testing.assert_close(target(broken)[keep], target(x)[keep], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target(x[keep]), target(x)[keep], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(target)(x), target(x))
    if name in CONTINUOUS:
        grad = value_and_grad(target, x)[1]
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(
            value_and_grad(target, broken)[1][keep], grad[keep], rtol=1e-12, atol=1e-12
        )


@every_continuous
def test_gradient_is_that_of_the_energy(name: str) -> None:
    target = make(name)
    x = target.sample(3, seeded(1)).requires_grad_()
    # draws as small as 1e-30, where finite differences say nothing
    if name in ("gamma_small", "beta_small"):
        x = target.mean.expand(3).clone().requires_grad_()
    assert torch.autograd.gradcheck(target, (x,), atol=1e-4, rtol=1e-3)


@every_target
def test_initial_is_legal_and_repeatable(name: str) -> None:
    target = make(name)
    x = target.initial(200, seeded())
    assert target.support.check(x).all()
    assert torch.isfinite(target(x)).all()
    assert not x.requires_grad
    assert torch.equal(x, target.initial(200, seeded()))
    assert not torch.equal(x, target.initial(200, seeded(1)))
    with pytest.raises(ValueError, match=r"num_(chains|samples) must be at least 1, got num_\1=0"):
        target.initial(0)


@every_target
def test_draws_are_legal_and_repeatable(name: str) -> None:
    target = make(name)
    assert target.has_exact_draws
    x = target.sample(500, seeded())
    assert x.shape == (500, *target.event_shape)
    assert not x.requires_grad
    assert target.support.check(x).all()
    assert torch.isfinite(target(x)).all()
    assert torch.equal(x, target.sample(500, seeded()))
    assert not torch.equal(x, target.sample(500, seeded(1)))
    narrow = make(name, torch.float32).sample(500, seeded())
    assert target.support.check(narrow).all()
    if name != "gamma_small":  # whose draws underflow in float32
        torch.testing.assert_close(narrow.double(), x, rtol=1e-4, atol=1e-4)
    before = torch.get_rng_state()
    target.sample(3, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = target.sample(3)
        torch.manual_seed(5)
        assert torch.equal(first, target.sample(3))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got num_samples=0"):
        target.sample(0)


@every_target
def test_draws_have_the_moments(name: str) -> None:
    target = make(name)
    check_moments(target, target.sample(DRAWS, seeded()))


# not 0 at the walls
@pytest.mark.parametrize(
    "name", [name for name in CONTINUOUS if name not in ("half_disc", "checkerboard")]
)
def test_draws_satisfy_stein(name: str) -> None:
    target = make(name)
    check_stein(target, target.sample(DRAWS, seeded()))


@every_target
def test_modes(name: str) -> None:
    target = make(name)
    x = target.sample(DRAWS, seeded())
    if target.mode_weights is None:
        with pytest.raises(NotImplementedError, match="mode_weights is None"):
            target.mode_of(x)
        return
    weights, modes = target.mode_weights, target.mode_of(x)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert weights.dtype == torch.float64
    assert modes.shape == (DRAWS,)
    assert modes.dtype == torch.int64
    assert 0 <= int(modes.min()) <= int(modes.max()) < len(weights)
    if len(weights) > 1000:
        return
    check_modes(target, x)
    if name not in OVERLAPPING:
        counts = torch.bincount(modes, minlength=len(weights)) / DRAWS
        within_se(
            counts, weights, torch.sqrt(weights * (1 - weights) / DRAWS), what="mode frequencies"
        )
    if target.event_shape:
        with pytest.raises(ValueError, match="x must have shape"):
            target.mode_of(torch.zeros(3, *target.event_shape, 7))


# log Z by enumeration, quadrature and sums over independent factors

# unconstrained coordinates; without an entry, the default below
BOXES: dict[str, tuple[tuple[float, float, int], ...]] = {
    "gamma_small": ((-700.0, 12.0, 400_001),),
    "beta_small": ((-700.0, 90.0, 400_001),),
    "banana": ((-80.0, 80.0, 1201), (-15.0, 200.0, 1201)),
    "rosenbrock": ((-8.0, 10.0, 1201), (-3.0, 110.0, 1401)),
    "many_well_pair": ((-4.5, 4.5, 601), (-9.0, 9.0, 301)),
    "ring": ((-6.0, 6.0, 801), (-6.0, 6.0, 801)),
    "two_moons": ((-2.0, 3.0, 201), (-1.5, 2.0, 141)),
    "two_moons_wide": ((-4.5, 4.5, 201), (-3.5, 3.5, 141)),
    "two_spirals": ((-5.4, 5.4, 109), (-5.4, 5.4, 109)),
    "checkerboard": ((-4.09, 4.11, 411), (-4.09, 4.11, 411)),  # the middles of cells of 0.02
    "gmm40": ((-55.0, 55.0, 401), (-55.0, 55.0, 401)),
    "grid25": ((-16.0, 16.0, 401), (-16.0, 16.0, 401)),
}


def grid_log_z(free: Unconstrained, box: tuple[tuple[float, float, int], ...]) -> float:
    axes = [torch.linspace(low, high, n, dtype=torch.float64) for low, high, n in box]
    u = torch.cartesian_prod(*axes)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    return float(torch.logsumexp(-free(u.reshape(-1, *free.event_shape)), 0)) + math.log(cell)


def enumerated_log_z(target: Target) -> float:
    letters = {"_Boolean": (0.0, 1.0), "_Spin": (-1.0, 1.0)}.get(
        type(base_constraint(target.support)).__name__
    )
    if letters is None:
        *rows, k = target.event_shape
        states = torch.stack(
            [torch.eye(k)[list(c)] for c in itertools.product(range(k), repeat=math.prod(rows))]
        )
    else:
        states = torch.tensor(
            list(itertools.product(letters, repeat=math.prod(target.event_shape)))
        )
    return float(torch.logsumexp(-target(states.reshape(-1, *target.event_shape).double()), 0))


INTEGRABLE = [
    name
    for name in CONTINUOUS
    if math.prod(make(name).event_shape) <= 2 and name not in ("half_disc", "funnel2", "pinwheel")
]


@pytest.mark.parametrize("name", [*INTEGRABLE, *sorted(TARGETS.keys() - set(CONTINUOUS))])
def test_log_z_by_grid_or_enumeration(name: str) -> None:
    target = make(name)
    if is_discrete(target.support):
        assert target.log_z == pytest.approx(enumerated_log_z(target), abs=1e-12)
        return
    free = Unconstrained(target)
    dims = math.prod(free.event_shape)
    box = BOXES.get(name)
    if box is None and is_real(target.support):
        spread = 12.0 * target.variance.sqrt().flatten()
        box = tuple(
            (float(m - s), float(m + s), 801)
            for m, s in zip(target.mean.flatten(), spread, strict=True)
        )
    elif box is None:
        box = ((-45.0, 45.0, 1001 if dims == 2 else 20_001),) * dims
    assert free.log_z == target.log_z
    assert target.log_z == pytest.approx(grid_log_z(free, box), abs=1e-9)


def test_log_z_of_dirichlet_by_grid() -> None:
    target = make("dirichlet")
    assert target.log_z == pytest.approx(
        grid_log_z(Unconstrained(target), ((-45.0, 45.0, 901),) * 2), abs=1e-9
    )
    assert make("dirichlet_rows").log_z == pytest.approx(
        target.log_z + Dirichlet([1.0, 0.5, 4.0]).log_z, abs=1e-12
    )


def test_log_z_of_half_disc_by_quadrature() -> None:
    target = HalfDisc(dtype=torch.float64)
    z = quad(
        lambda t: math.exp(2 * math.cos(t)) * math.cos(t), -math.pi / 2, math.pi / 2, epsrel=1e-12
    )[0]
    assert target.log_z == pytest.approx(math.log(z), abs=1e-12)
    direct = quad(
        lambda x: math.exp(-float(target(torch.tensor(x, dtype=torch.float64)))), -1, 1, epsabs=1e-9
    )[0]
    assert z == pytest.approx(direct, abs=1e-6)


@pytest.mark.parametrize(("name", "variance"), [("funnel2", 3.0), ("funnel", 9.0)])
def test_funnel_is_standard_normal_when_whitened(name: str, variance: float) -> None:
    target = make(name)
    z = torch.randn(50, *target.event_shape, generator=seeded(), dtype=torch.float64)
    theta = math.sqrt(variance) * z[:, :1]
    x = torch.cat([theta, z[:, 1:] * torch.exp(theta / 2)], -1)
    torch.testing.assert_close(target.whiten(x), z)
    log_det = 0.5 * math.log(variance) + 0.5 * theta[:, 0] * (z.shape[1] - 1)
    standard = 0.5 * z.square().sum(-1) + 0.5 * z.shape[1] * math.log(2 * math.pi)
    torch.testing.assert_close(target(x) - log_det, standard)


D = partial(torch.tensor, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("gaussian_scalar", td.Normal(D(1.5), 0.7)),
        ("gaussian_dense", td.MultivariateNormal(D([1.0, -2.0]), D(COVARIANCE))),
        ("gaussian_diagonal", td.Independent(td.Normal(D([1.0, -2.0]), D([0.5, 3.0])), 1)),
        (
            "scales",
            td.Independent(
                td.Normal(D([0.0] * 50), torch.logspace(-1, 1, 50, dtype=torch.float64)), 1
            ),
        ),
        (
            "mixture_scalar",
            td.MixtureSameFamily(
                td.Categorical(D([0.25, 0.75])), td.Normal(D([-2.0, 3.0]), D([0.5, 1.0]))
            ),
        ),
        (
            "mixture_dense",
            td.MixtureSameFamily(
                td.Categorical(D([1.0, 1.0, 1.0])),
                td.MultivariateNormal(D(FAR), torch.stack([wishart(2, s) for s in range(3)])),
            ),
        ),
        ("exponential", td.Exponential(D(2.5))),
        ("gamma", td.Independent(td.Gamma(D([2.0, 0.7]), D([3.0, 0.5])), 1)),
        ("beta", td.Independent(td.Beta(D([2.0, 0.6]), D([3.0, 3.0])), 1)),
        ("dirichlet", td.Dirichlet(D([0.8, 2.0, 1.5]))),
        ("log_normal", td.Independent(td.LogNormal(D([0.3, -1.0]), D([0.5, 0.25])), 1)),
        ("bernoulli", td.Independent(td.Bernoulli(logits=D([0.4, -1.2, 2.0])), 1)),
        ("categorical", td.OneHotCategorical(logits=D([0.4, -1.2, 0.1]))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_agrees_with_torch_distributions(name: str, distribution: td.Distribution) -> None:
    target = make(name)
    x = target.sample(20, seeded())
    torch.testing.assert_close(
        -target(x) - target.log_z, distribution.log_prob(x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(target.mean, distribution.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target.variance, distribution.variance, rtol=1e-9, atol=1e-9)


def test_normalised_targets_of_more_dimensions() -> None:
    image = make("gaussian_image")
    exact = 6 * math.log(2 * math.pi) + 0.5 * float(torch.logdet(wishart(12)))
    assert image.log_z == pytest.approx(exact, abs=1e-10)
    torch.testing.assert_close(image.covariance, wishart(12))
    torch.testing.assert_close(make("gaussian_diagonal").covariance, torch.diag(D([0.25, 9.0])))
    whole = td.MultivariateNormal(image.mean.flatten(), wishart(12))
    x = image.sample(5, seeded())
    torch.testing.assert_close(-image(x) - image.log_z, whole.log_prob(x.flatten(1)))
    parts = make("mixture_image")
    distribution = td.MixtureSameFamily(
        td.Categorical(torch.ones(3)), td.Independent(td.Normal(parts.loc.flatten(1), D(0.5)), 1)
    )
    x = parts.sample(5, seeded())
    torch.testing.assert_close(-parts(x), distribution.log_prob(x.flatten(1)), rtol=1e-6, atol=1e-6)


# Exact numbers


def table_expectation(density: TabulatedDensity, f: Callable[[float], float]) -> float:
    mass = partial(quad, epsabs=1e-13, epsrel=1e-12, points=[density.split], limit=200)
    total = mass(lambda x: f(x) * math.exp(-density.potential(x)), density.low, density.high)[0]
    return total / math.exp(density.log_z)


def test_double_well_numbers() -> None:
    e = DoubleWell(dtype=torch.float64)
    assert math.exp(e.log_z) == pytest.approx(153.2827122182, abs=1e-8)
    assert e.log_z == pytest.approx(5.0322840086, abs=1e-9)
    assert float(e.mean) == pytest.approx(-1.2272600811, abs=1e-9)
    assert float(e.variance) == pytest.approx(0.50572986, abs=1e-8)
    assert float(e.variance + e.mean**2) == pytest.approx(2.01189717, abs=1e-8)
    assert float(e.mode_weights[0]) == pytest.approx(0.93351732, abs=1e-8)
    assert e.right_mass == float(e.mode_weights[1])
    assert e.barrier == pytest.approx(0.126, abs=1e-6)
    assert 4 * e.barrier**3 - 8 * e.barrier + 1 == pytest.approx(0.0, abs=1e-14)
    u = table_expectation(e.density, e.density.potential)
    assert u == pytest.approx(-4.69423940, abs=1e-8)
    assert u + e.log_z == pytest.approx(0.33804461, abs=1e-8)  # the entropy
    for x in (-1.472998, 1.346997):
        assert abs(float(value_and_grad(e, D(x))[1])) < 1e-4


def test_ring_numbers() -> None:
    e = Ring(dtype=torch.float64)
    assert e.log_z == pytest.approx(1.877502, abs=1e-6)
    axis = torch.linspace(-6, 6, 801, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    p = torch.softmax(-e(x), 0)
    torch.testing.assert_close(e.variance, (p.unsqueeze(-1) * x**2).sum(0), rtol=1e-8, atol=1e-8)


def test_many_well_numbers() -> None:
    e = ManyWell(dtype=torch.float64)
    assert e.log_z == pytest.approx(164.69567531, abs=1e-8)
    assert e.left_mass == pytest.approx(0.155692, abs=1e-6)
    assert e.event_shape == (32,)
    assert len(e.mode_weights) == 65_536
    assert float(e.mode_weights.sum()) == pytest.approx(1.0)
    signs = e.sample(DRAWS, seeded())[:, ::2] < 0
    within_se(signs.double().mean(0), e.left_mass, math.sqrt(0.1557 * 0.8443 / DRAWS))
    assert int(e.mode_of(torch.tensor([-1.0, 0.0, 1.0, 0.0] * 8))) == 0b1010101010101010
    assert float(ManyWell(2, dtype=torch.float64).mode_weights[2]) == pytest.approx(
        e.left_mass * (1 - e.left_mass)
    )
    many = ManyWell(num_pairs=17)
    assert many.mode_weights is None
    with pytest.raises(NotImplementedError, match="mode_weights is None"):
        many.mode_of(torch.zeros(34))


@pytest.mark.parametrize(
    ("name", "mean", "squares"),
    [("banana", (0.0, 0.0), (100.0, 19.0)), ("rosenbrock", (1.0, 2.0), (2.0, 10.1))],
)
def test_bent_moments(name: str, mean: tuple[float, ...], squares: tuple[float, ...]) -> None:
    e = make(name)
    assert e.mean.tolist() == pytest.approx(mean)
    assert (e.variance + e.mean**2).tolist() == pytest.approx(squares)


def test_fourth_moments_of_draws() -> None:
    """Var[x^2]: banana's x1 4610; Rosenbrock 6, 668.02; whitened funnel 2."""
    banana = make("banana")
    valley = make("rosenbrock")
    funnel = make("funnel")
    for squares, second, truth in (
        (banana.sample(200_000, seeded())[:, 1:] ** 2, [19.0], [4610.0]),
        (valley.sample(200_000, seeded()) ** 2, [2.0, 10.1], [6.0, 668.02]),
        (funnel.whiten(funnel.sample(50_000, seeded())) ** 2, [1.0] * 10, [2.0] * 10),
    ):
        deviations = (squares - D(second)) ** 2
        within_se(deviations.mean(0), D(truth), mean_and_se(deviations)[1], what="Var[x^2]")


def test_gmm40_is_pytorchs() -> None:
    before = torch.get_rng_state()
    e = GaussianMixture.gmm40(dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = (torch.rand(40, 2) - 0.5) * 80
    assert torch.equal(e.loc, means.double())
    assert float(1 / e.whitening[0, 0]) == pytest.approx(
        float(torch.nn.functional.softplus(D(1.0)))
    )
    assert torch.allclose(e.mode_weights, D(1 / 40))


@pytest.mark.parametrize(("side", "modes"), [(3, 9), (5, 25)])
def test_grids(side: int, modes: int) -> None:
    e = GaussianMixture.grid(side, dtype=torch.float64)
    ticks = [5.0 * (i - side // 2) for i in range(side)]
    assert sorted(e.loc.tolist()) == sorted(map(list, itertools.product(ticks, ticks)))
    assert len(e.mode_weights) == modes
    torch.testing.assert_close(e.variance, D([np.var(ticks) + 0.3] * 2))
    assert e.mode_of(e.loc).tolist() == list(range(modes))


def test_half_disc_at_the_wall() -> None:
    for dtype in (torch.float32, torch.float64):
        e = HalfDisc(dtype=dtype)
        edge = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
        x = torch.tensor([0.0, 0.6, 1.0, -1.0, 3.0, -math.inf, math.nan], dtype=dtype)
        energy, grad = value_and_grad(e, torch.cat([x, edge.reshape(1)]))
        assert energy[:2].tolist() == pytest.approx([-2.0, -1.6])
        assert (energy[2:6] == math.inf).all()
        assert energy[6].isnan()
        assert grad[:2].tolist() == pytest.approx([0.0, 1.5])
        assert torch.isfinite(grad[:6]).all()
        assert torch.isfinite(energy[7])
        assert torch.isfinite(grad[7])
    assert (HalfDisc().initial(1000, seeded()).abs() < 1).all()


# Truth follows what is loaded, inputs are checked


def test_truth_follows_loaded_parameters() -> None:
    other = Gaussian(D([3.0, 4.0]), covariance=D([[5.0, 1.0], [1.0, 2.0]]))
    e = Gaussian(torch.zeros(2, dtype=torch.float64), covariance=torch.eye(2, dtype=torch.float64))
    e.load_state_dict(other.state_dict())
    assert e.log_z == other.log_z != pytest.approx(math.log(2 * math.pi))
    torch.testing.assert_close(e.mean, D([3.0, 4.0]))
    torch.testing.assert_close(e.covariance, D([[5.0, 1.0], [1.0, 2.0]]))
    rate = Exponential(1.0)
    rate.load_state_dict(Exponential(2.0).state_dict())
    assert rate.log_z == pytest.approx(-math.log(2))


def test_dtype_is_asked_for_or_given_or_default(float64: torch.dtype) -> None:
    assert (
        Gaussian([0.0, 1.0]).dtype == DoubleWell().dtype == GaussianMixture.gmm40().dtype == float64
    )
    assert Gaussian(torch.zeros(2, dtype=torch.float32)).dtype == torch.float32
    assert Gaussian(torch.zeros(2, dtype=torch.float32), dtype=float64).dtype == float64
    assert Gamma(torch.ones(2, dtype=torch.float32), 1.0).dtype == torch.float32
    assert Gaussian(torch.zeros(2, dtype=torch.int64)).dtype == float64


def test_given_tensors_are_copied() -> None:
    mean, rate = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3).T
    gaussian, exponential = Gaussian(mean), Exponential(rate)
    with torch.no_grad():
        mean += 1
        rate += 1
    assert not gaussian.mean.any()
    assert (exponential.rate == 1).all()
    assert not gaussian.loc.requires_grad
    save(exponential.state_dict())  # contiguous


def test_a_target_without_truth_says_none() -> None:
    class Unknown(Target):
        def forward(self, x: Tensor) -> Tensor:
            return x**2

    e = Unknown()
    assert (e.log_z, e.mean, e.variance, e.mode_weights) == (None, None, None, None)
    assert not e.has_exact_draws
    with pytest.raises(NotImplementedError, match="Unknown has no exact draws: run an MCMC kernel"):
        e.sample(1)
    with pytest.raises(NotImplementedError, match="Unknown has no known modes"):
        e.mode_of(torch.zeros(1))
    assert e.initial(3).shape == (3,)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda: Gaussian(torch.zeros(2), covariance=[[1.0, 0.5], [0.0, 1.0]]),
            "covariance must be symmetric.* 0.5",
        ),
        (
            lambda: Gaussian(torch.zeros(2), covariance=[[1.0, 2.0], [2.0, 1.0]]),
            "positive definite, got smallest eigenvalue -1",
        ),
        (
            lambda: Gaussian(torch.zeros(2), covariance=[[1.0]]),
            r"covariance must have shape \(2, 2\).*got \(1, 1\)",
        ),
        (lambda: Gaussian(torch.zeros(2), scale=[1.0, -3.0]), r"scale must be positive.*\[-3.0\]"),
        (
            lambda: Gaussian(torch.zeros(2), scale=[1.0, 1.0, 1.0]),
            r"scale must be .*\(2,\), got shape \(3,\)",
        ),
        (
            lambda: Gaussian(torch.zeros(2), scale=1.0, covariance=[[1.0]]),
            "give scale or covariance, not both",
        ),
        (lambda: Gaussian([0.0, math.nan]), r"mean must be finite.*nan"),
        (lambda: Gaussian(torch.zeros(0)), r"mean must have .* got shape \(0,\)"),
        (lambda: Gaussian([0.0], dtype=torch.int64), "dtype must be a floating-point type"),
        (lambda: DoubleWell(dtype=torch.int64), "dtype must be a floating-point type"),
        (lambda: scales_gaussian(3, 2.0, 1.0), "low=2.0, high=1.0"),
        (lambda: scales_gaussian(0), "dim=0"),
        (lambda: GaussianMixture(0.0), "means must have at least 1 dimensions"),
        (
            lambda: GaussianMixture(FAR, weights=[1.0, 2.0]),
            r"weights must have shape \(3,\).*got \(2,\)",
        ),
        (
            lambda: GaussianMixture(FAR, weights=[1.0, 2.0, 0.0]),
            r"weights must be positive.*\[0.0\]",
        ),
        (
            lambda: GaussianMixture(FAR, scale=[1.0, 2.0]),
            r"one for each component or broadcast to \(3, 2\), got shape",
        ),
        (lambda: GaussianMixture(FAR, covariance=torch.eye(3)), r"shape \(2, 2\) or \(3, 2, 2\)"),
        (lambda: GaussianMixture.grid(0), "side must be at least 1, got side=0"),
        (lambda: GaussianMixture.grid(3, spacing=-1.0), r"spacing must be positive.*\[-1.0\]"),
        (lambda: Banana(variance=-1.0), "variance must be positive"),
        (lambda: Banana(bend=math.inf), "bend must be finite"),
        (lambda: Rosenbrock(noise=0.0), "noise must be positive"),
        (lambda: Funnel(dim=1), "dim must be at least 2, got dim=1"),
        (lambda: Funnel(variance=0.0), "variance must be positive"),
        (lambda: ManyWell(0), "num_pairs must be at least 1, got num_pairs=0"),
        (lambda: Exponential(0.0), "rate must be positive"),
        (lambda: Gamma(1.0, -1.0), "rate must be positive"),
        (lambda: Gamma(torch.ones(2), torch.ones(3)), r"shape \(2,\), rate \(3,\)"),
        (lambda: Beta(-1.0, 1.0), "a must be positive"),
        (lambda: Dirichlet(1.0), r"concentration must have shape \(\*sites, k\) with k >= 2"),
        (lambda: CategoricalOneHot([1.0]), r"logits must have shape .* got shape \(1,\)"),
        (lambda: BernoulliProduct([math.nan]), "logits must be finite"),
        (lambda: LogNormal(0.0, 0.0), "scale must be positive"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], Target], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


# The parts that draw


def test_quantile_is_the_inverse_of_the_distribution_function() -> None:
    distribution = TabulatedDensity(lambda x: 0.5 * x * x, -12.0, 12.0, split=0.0)
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    torch.testing.assert_close(
        distribution.quantile(u), td.Normal(D(0.0), 1.0).icdf(u), rtol=1e-6, atol=1e-6
    )
    assert distribution.quantile(D([0.0])).item() >= -12.0
    assert distribution.quantile(D([1.0 - 2**-53])).item() < 9.0
    well = DoubleWell.density
    assert float(well.quantile(D(1 - well.right_mass))) == pytest.approx(well.split, abs=1e-7)


def test_rejection_is_exact() -> None:
    """Proposals on [0, 1), accepted with probability x: the distribution 2x."""
    g = seeded()
    uniform = partial(torch.rand, generator=g, dtype=torch.float64)
    x = rejection(50_000, lambda k: ((x := uniform((k,))), x.log()), uniform)
    assert x.shape == (50_000,)
    for power in (1, 2):
        mean, se = mean_and_se(x**power)
        within_se(mean, 2 / (power + 2), se)


# Mutants: a check that a broken draw passes is no check

HOT = math.sqrt(1.03)  # 3 % above the temperature that is asked for
MANY = 200_000


def hot_double_well(n: int, g: torch.Generator) -> Tensor:
    distribution = TabulatedDensity(
        lambda x: DoubleWell.density.potential(x) / 1.03, -4.0, 4.0, split=DoubleWell.barrier
    )
    return distribution.quantile(torch.rand(n, generator=g, dtype=torch.float64))


def swapped_wells(n: int, g: torch.Generator) -> Tensor:
    e = make("mixture_isotropic")
    e.weights = e.weights.flip(0)
    return e.sample(n, g)


def unrotated(n: int, g: torch.Generator) -> Tensor:
    e = make("gaussian_dense")
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return e.mean + z @ torch.linalg.cholesky(D(COVARIANCE))  # the transpose is forgotten


def hot_funnel(n: int, g: torch.Generator) -> Tensor:
    z = torch.randn(n, 10, generator=g, dtype=torch.float64)
    return torch.cat([3 * z[:, :1], HOT * torch.exp(1.5 * z[:, :1]) * z[:, 1:]], -1)


def ring_without_jacobian(n: int, g: torch.Generator) -> Tensor:
    x = make("ring").sample(n, g)
    r = torch.linalg.vector_norm(x, dim=-1)
    return x[torch.rand(n, generator=g, dtype=torch.float64) < r.min() / r]


MUTANTS: dict[
    str, tuple[str, Callable[[int, torch.Generator], Tensor], Callable[[Target, Tensor], None]]
] = {
    "hot gaussian, moments": (
        "gaussian_scalar",
        lambda n, g: Gaussian(D(1.5), scale=0.7 * HOT).sample(n, g),
        check_moments,
    ),
    "hot gaussian, Stein": (
        "gaussian_scalar",
        lambda n, g: Gaussian(D(1.5), scale=0.7 * HOT).sample(n, g),
        check_stein,
    ),
    "hot double well, moments": ("double_well", hot_double_well, check_moments),
    "hot double well, modes": ("double_well", hot_double_well, check_modes),
    "mirrored double well": (
        "double_well",
        lambda n, g: -make("double_well").sample(n, g),
        check_modes,
    ),
    "swapped weights, modes": ("mixture_isotropic", swapped_wells, check_modes),
    "swapped weights, moments": ("mixture_isotropic", swapped_wells, check_moments),
    "transposed factor": ("gaussian_dense", unrotated, check_moments),
    "hot funnel, moments": ("funnel", hot_funnel, check_moments),
    "hot funnel, Stein": ("funnel", hot_funnel, check_stein),
    "ring without its Jacobian": ("ring", ring_without_jacobian, check_moments),
    "many wells of equal weight": (
        "many_well",
        lambda n, g: (
            make("many_well").sample(n, g)
            * torch.where(torch.rand(n, 6, generator=g) < 0.5, -1.0, 1.0)
        ),
        check_modes,
    ),
    "uniform half-disc": (
        "half_disc",
        lambda n, g: 2 * torch.rand(n, generator=g, dtype=torch.float64) - 1,
        check_moments,
    ),
    "rate for scale": (
        "exponential",
        lambda n, g: Exponential(D(1 / 2.5)).sample(n, g),
        check_moments,
    ),
    "hot gamma": (
        "gamma",
        lambda n, g: Gamma(D([2.0, 0.7]), D([3.0, 0.5]) / 1.03).sample(n, g),
        check_moments,
    ),
    "spin with half its field": (
        "spin",
        lambda n, g: SpinProduct(D([0.4, -1.2, 0.1]) / 2).sample(n, g),
        check_moments,
    ),
    "reversed categories": (
        "categorical",
        lambda n, g: make("categorical").sample(n, g).flip(-1),
        check_modes,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    name, draw, check = MUTANTS[mutant]
    target = make(name)
    check(target, target.sample(MANY, seeded(2)))
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, draw(MANY, seeded(2)))


@pytest.mark.gpu
@every_target
def test_on_a_gpu(name: str) -> None:
    here, there = make(name), make(name).to("cuda")
    x = here.sample(50, seeded())
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x))
    # a generator on the CPU serves, with the same numbers
    torch.testing.assert_close(there.sample(50, seeded()).cpu(), x)
    g = torch.Generator("cuda").manual_seed(0)
    y = there.sample(DRAWS, g)
    assert y.device.type == there.mean.device.type == there.initial(3, g).device.type == "cuda"
    check_moments(there, y)
    assert there.log_z == pytest.approx(here.log_z)
