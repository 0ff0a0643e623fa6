"""Every kernel against one contract; the exact ones must leave exact draws unchanged, and broken
ones must be caught."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lib.checks import within_se
from lib.kernel_cases import EXACT, KERNELS, Fragile, Normal, Pair, assert_unchanged, build, run
from scipy import stats
from torch import Tensor

from pyroebm import HMC, MALA, NUTS, ULA, Energy
from pyroebm.core.serialization import pack
from pyroebm.kernels import Diagonal, Kernel, LockstepNUTS, hamiltonian, langevin
from pyroebm.kernels.base import rows
from pyroebm.kernels.hamiltonian import draw_momentum, kinetic, leapfrog
from pyroebm.kernels.metric import Identity
from pyroebm.kernels.nuts import lockstep
from pyroebm.kernels.nuts.lockstep import _slots
from pyroebm.targets import DoubleWell, Exponential, Gaussian, GaussianMixture, HalfDisc

EVENTS = [(), (3,), (2, 3, 4)]


def fitted(name: str, energy: Energy) -> Energy:
    """A scalar energy, as a pair for the kernels that refuse events of one entry."""
    return energy if KERNELS[name]().min_dim == 1 else Pair(energy)


def events(energy: Energy, x: Tensor) -> Tensor:
    """Rows of one number as rows of events that repeat it."""
    return x.reshape(-1, *[1] * len(energy.event_shape)).expand(-1, *energy.event_shape)


# The contract of every kernel


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KERNELS)
def test_step_keeps_shapes_and_types(name: str, dtype: torch.dtype, event: tuple[int, ...]) -> None:
    energy = Normal(event).to(dtype)
    kernel, generator = build(name, event, dtype), torch.Generator().manual_seed(0)
    if math.prod(event) < kernel.min_dim:
        with pytest.raises(
            ValueError,
            match=r"requires events of at least 2 entries, but Normal has event_shape \(\)",
        ):
            kernel.init(energy, energy.initial(6, generator), generator)
        return
    state = kernel.init(energy, energy.initial(6, generator), generator)
    new, info = kernel.step(energy, state, generator)
    assert new.x.shape == (6, *event)
    assert new.x.dtype == dtype
    for field, value in info._asdict().items():
        assert value is None or value.shape == (6,), field
    torch.testing.assert_close(new.energy, energy(new.x))
    if hasattr(new, "grad"):
        assert new.grad.shape == new.x.shape
        torch.testing.assert_close(new.grad, new.x)
    assert info.accepted.dtype == info.diverging.dtype == torch.bool
    assert not new.x.requires_grad


@pytest.mark.parametrize("name", KERNELS)
def test_same_seed_same_step_and_no_global_randomness(name: str) -> None:
    energy = fitted(name, DoubleWell().double())
    x = energy.initial(16, torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    a, b, c = (run(build(name, energy.event_shape), energy, x, 5, seed) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_independent(name: str) -> None:
    """Changing where one chain starts changes no other chain, however long its trajectories get."""
    energy = Gaussian(
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64),
    )
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[3] = torch.tensor([30.0, -40.0])
    kernel = build(name, (2,))
    a, b = run(kernel, energy, x, 6), run(kernel, energy, moved, 6)
    others = torch.arange(8) != 3
    torch.testing.assert_close(a[others], b[others], rtol=0, atol=1e-12)
    if not hasattr(kernel, "proposal"):  # a jump forgets where it came from
        assert not torch.allclose(a[3], b[3])


@pytest.mark.parametrize("name", KERNELS)
def test_a_nan_rejects_its_row_counts_it_and_touches_no_other(name: str) -> None:
    fragile = fitted(name, Fragile().double())
    kernel = build(name, fragile.event_shape)
    kernel = kernel.replace(step_size=1.0) if kernel.learned else kernel
    x = events(fragile, torch.linspace(-1.4, 1.4, 64, dtype=torch.float64))

    def step(energy: Energy) -> tuple:
        generator = torch.Generator().manual_seed(0)
        return kernel.step(energy, kernel.init(energy, x, generator), generator)

    state, info = step(fragile)
    tensors: dict[str, Tensor] = {}
    pack(state, "state", tensors)
    assert all(torch.isfinite(part).all() for part in tensors.values())
    assert torch.isfinite(info.acceptance_rate).all()
    assert info.diverging.any()
    clean, _ = step(Normal(fragile.event_shape).double())
    untouched = ~info.diverging
    torch.testing.assert_close(state.x[untouched], clean.x[untouched])


@pytest.mark.parametrize("name", KERNELS)
def test_bad_starts_are_refused_at_the_front_door(name: str) -> None:
    kernel, energy = KERNELS[name](), fitted(name, DoubleWell().double())
    with pytest.raises(ValueError, match=r"1 of 3 rows of x are not, the first is row 1"):
        kernel.init(
            energy, events(energy, torch.tensor([0.0, torch.nan, 1.0], dtype=torch.float64))
        )
    with pytest.raises(ValueError, match=r"float64.*float32"):
        kernel.init(energy, torch.zeros(3, *energy.event_shape))
    with pytest.raises(ValueError, match=r"\(chains, \*event_shape\)"):
        kernel.init(energy, torch.zeros(2, 3, *energy.event_shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="unconstrained coordinates"):
        kernel.init(Exponential(), torch.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ULA(step_size=0.0), "step_size must be positive and finite, got step_size=0.0"),
        (lambda: MALA(step_size=math.nan), "step_size must be positive"),
        (lambda: HMC(inverse_mass=torch.tensor([1.0, -1.0])), "inverse_mass must be positive"),
        (
            lambda: ULA(temperature=0.0),
            "temperature must be positive and finite, got temperature=0.0",
        ),
        (lambda: HMC(num_steps=0), "num_steps must be at least 1, got num_steps=0"),
        (lambda: HMC(jitter=1.0), r"jitter must be in \[0, 1\), got jitter=1.0"),
        (
            lambda: NUTS(max_tree_depth=0),
            "max_tree_depth must be from 1 to 20, got max_tree_depth=0",
        ),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Kernel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_step_sizes_can_differ_by_chain_and_wrong_counts_are_refused() -> None:
    energy, x = Normal().double(), torch.zeros(3, dtype=torch.float64)
    _, info = ULA(step_size=torch.tensor([0.1, 0.2, 0.3])).step(energy, ULA().init(energy, x))
    torch.testing.assert_close(
        info.step_size, torch.tensor([0.1, 0.2, 0.3]).double(), atol=1e-7, rtol=0
    )
    with pytest.raises(ValueError, match="one for each of 3 chains"):
        ULA(step_size=torch.tensor([0.1, 0.2])).step(energy, ULA().init(energy, x))
    with pytest.raises(ValueError, match="inverse_mass must have 1 entries"):
        MALA(inverse_mass=torch.ones(2)).step(energy, MALA().init(energy, x))


# The integrator


def test_leapfrog_is_of_second_order_reversible_and_volume_preserving() -> None:
    energy = DoubleWell().double()
    q = torch.tensor([[-1.6], [0.4], [1.2]], dtype=torch.float64)
    p = torch.tensor([[0.7], [-1.1], [0.3]], dtype=torch.float64)
    scale = torch.tensor([0.7], dtype=torch.float64)
    metric = Diagonal(scale)

    def flow(q: Tensor, p: Tensor, eps: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        grad = rows(torch.func.grad(lambda x: energy(x).sum())(q.squeeze(1)))
        q, p, values, _ = leapfrog(
            energy, q, p, grad, torch.full((3, 1), eps, dtype=torch.float64), metric, steps
        )
        return q, p, values

    h0 = energy(q.squeeze(1)) + kinetic(p)
    sizes = np.array([0.04, 0.02, 0.01, 0.005])
    errors = []
    for eps in sizes:
        q1, p1, values = flow(q, p, eps, round(0.4 / eps))
        errors.append(float((values + kinetic(p1) - h0).abs().max()))
    order = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert 1.9 < order < 2.1, f"energy error falls with order {order}"

    q1, p1, _ = flow(q, p, 0.05, 20)
    q2, p2, _ = flow(q1, -p1, 0.05, 20)
    torch.testing.assert_close(q2, q)
    torch.testing.assert_close(-p2, p)

    def one(z: Tensor) -> Tensor:  # differentiable copy of the map, for its Jacobian
        q = z[:1]
        p = z[1:]
        eps = 0.05
        grad = lambda x: 4 * x**3 - 8 * x + 1  # noqa: E731
        p = p - 0.5 * eps * scale * grad(q)
        q = q + eps * scale * p
        return torch.cat([q, p - 0.5 * eps * scale * grad(q)])

    z = torch.cat([q[0], p[0]])
    torch.testing.assert_close(one(z), torch.cat([t[0] for t in flow(q, p, 0.05, 1)[:2]]))
    torch.testing.assert_close(
        torch.linalg.det(torch.func.jacrev(one)(z)), torch.tensor(1.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_stay_exact(name: str) -> None:
    energy = fitted(name, DoubleWell().double())
    assert_unchanged(build(name, energy.event_shape), energy)


@pytest.mark.parametrize("name", EXACT)
def test_a_bounded_domain_is_sampled_without_a_trace_of_its_edge(name: str) -> None:
    """The half-disc: elsewhere 3.6 to 10 % of the draws come out exactly 0 where NaN states are
    replaced."""
    energy, chains = fitted(name, HalfDisc().double()), 20_000
    x = energy.sample(chains, torch.Generator().manual_seed(0))
    after = run(build(name, energy.event_shape), energy, x, 6).flatten()
    assert (after.abs() <= 1).all()
    assert int((after == 0).sum()) == 0
    fresh = energy.sample(4 * chains, torch.Generator().manual_seed(1)).flatten()
    assert stats.ks_2samp(after.numpy(), fresh.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_an_anisotropic_gaussian_is_left_unchanged(name: str) -> None:
    cov = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    energy = Gaussian(torch.zeros(2, dtype=torch.float64), cov)
    after = run(
        build(name, (2,)), energy, energy.sample(40_000, torch.Generator().manual_seed(0)), 5
    )
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product = after[:, i] * after[:, j]
        within_se(
            product.mean(), cov[i, j], product.std() / math.sqrt(len(product)), what=f"cov[{i},{j}]"
        )
        fourth = cov[i, i] * cov[j, j] + 2 * cov[i, j] ** 2
        within_se(
            (product**2).mean(),
            fourth,
            (product**2).std() / math.sqrt(len(product)),
            what=f"fourth[{i},{j}]",
        )


@pytest.mark.parametrize("step_size", [math.sqrt(0.2), 1.0])
def test_ula_has_the_bias_that_theory_gives(step_size: float) -> None:
    """x - eps x + sqrt(2 eps) n with eps = step_size^2 / 2: variance 1 / (1 - eps / 2); 1.052632 at
    eps = .1, 1.333 at .5."""
    truth = 1.0 / (1.0 - step_size**2 / 4.0)
    x = torch.randn(
        100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ) * math.sqrt(truth)
    after = run(ULA(step_size=step_size), Normal().double(), x, 10)
    within_se((after**2).mean(), truth, (after**2).std() / math.sqrt(len(after)))


def test_ula_samples_at_its_temperature() -> None:
    truth = 3.0 / (1.0 - 0.2**2 / 4.0)
    x = torch.randn(
        50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ) * math.sqrt(truth)
    after = run(ULA(step_size=0.2, temperature=3.0), Normal().double(), x, 10)
    within_se((after**2).mean(), truth, (after**2).std() / math.sqrt(len(after)))


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts", "lockstep"])
def test_chains_forget_where_they_started(name: str) -> None:
    """Stationarity alone would pass a kernel that never moves."""
    energy = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), scale=0.8)
    after = run(KERNELS[name](), energy, torch.full((4_000, 1), 4.0, dtype=torch.float64), 60)
    within_se(after.mean(), 0.0, after.std() / math.sqrt(len(after)))
    within_se((after**2).mean(), 1.64, (after**2).std() / math.sqrt(len(after)))


# Mutants: each is a plausible mistake, and the stationarity test must see it


@dataclasses.dataclass(frozen=True, eq=False)
class NoMetropolis(MALA):
    def step(self, energy, state, generator=None):  # type: ignore[no-untyped-def]
        return ULA(step_size=self.step_size).step(energy, state, generator)


class Hot(Energy):
    """Temperature 3 % off."""

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy.event_shape)
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x) / 1.03

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return self.energy.sample(num_samples, generator)


def test_mutants_no_metropolis_and_wrong_temperature_are_caught() -> None:
    with pytest.raises(AssertionError):
        assert_unchanged(NoMetropolis(step_size=0.6), DoubleWell().double())
    with pytest.raises(AssertionError):
        assert_unchanged(NUTS(step_size=0.5), Hot(DoubleWell().double()), chains=300_000)


@pytest.mark.parametrize("name", ["mala", "hmc", "lockstep"])
def test_mutant_wrong_noise_scale_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(q: Tensor, generator: torch.Generator | None) -> Tensor:
        return 1.1 * draw_momentum(q, generator)

    monkeypatch.setattr(lockstep, "draw_momentum", loud)
    monkeypatch.setattr(hamiltonian, "draw_momentum", loud)
    with pytest.raises(AssertionError):
        assert_unchanged(KERNELS[name](), DoubleWell().double())


@pytest.mark.parametrize("name", KERNELS)
def test_steps_are_as_many_calls_of_step(name: str) -> None:
    kernel, energy = build(name, (2, 3)), Gaussian(torch.zeros(2, 3, dtype=torch.float64))
    first = kernel.init(
        energy, energy.sample(6, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    )
    state = first
    rates = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        state, info = kernel.step(energy, state, generator)
        rates.append(info.acceptance_rate)
    reached, rate = kernel.steps(energy, first, 5, torch.Generator().manual_seed(2))
    torch.testing.assert_close(reached, state, rtol=0.0, atol=0.0)
    torch.testing.assert_close(rate, torch.stack(rates).mean(0))


def test_langevin_steps_refuse_a_row_that_is_not_finite_and_no_other() -> None:
    """A row that leaves the finite part stays where it was at that step, and goes on; one step at a
    time or eight at once."""
    energy, kernel = Fragile().double(), ULA(step_size=0.5)
    x = torch.linspace(-1.4, 1.4, 64, dtype=torch.float64)
    state, rate = kernel.steps(energy, kernel.init(energy, x), 8, torch.Generator().manual_seed(0))
    one = kernel.init(energy, x)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(8):
        one, info = kernel.step(energy, one, generator)
        taken.append(info.accepted)
    assert 0 < int((rate < 1).sum()) < 64
    assert bool(torch.isfinite(state.energy).all() & torch.isfinite(state.x).all())
    torch.testing.assert_close(state, one, rtol=0.0, atol=0.0)
    assert torch.equal(rate, torch.stack(taken).double().mean(0))


def test_mutant_glance_that_sees_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = types.SimpleNamespace(sqrt=math.sqrt, inf=math.inf, isfinite=lambda value: True)
    monkeypatch.setattr(langevin, "math", blind)
    with pytest.raises(AssertionError):
        test_langevin_steps_refuse_a_row_that_is_not_finite_and_no_other()


def test_mutant_ula_with_half_the_drift_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Identity, "transpose", lambda self, g: 0.9 * g)
    with pytest.raises(AssertionError):
        test_ula_has_the_bias_that_theory_gives(1.0)


def test_mutant_metric_that_forgets_its_transpose_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Diagonal, "transpose", lambda self, g: g)
    with pytest.raises(AssertionError):
        test_the_metric_is_a_change_of_scale("lockstep")


def test_mutant_nuts_that_always_takes_the_newer_half_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lockstep, "uniform_like", lambda x, generator: torch.zeros_like(x))
    with pytest.raises(AssertionError):
        assert_unchanged(LockstepNUTS(step_size=0.5), DoubleWell().double())


# NUTS and its bookkeeping


def test_slots_close_every_balanced_subtree_once() -> None:
    """By brute force: at leaf i, the balanced subtrees that end there begin at i + 1 - 2^k wherever
    2^k divides i + 1."""
    stored: dict[int, int] = {}
    for leaf in range(256):
        low, high = _slots(leaf)
        if leaf % 2 == 0:
            stored[high] = leaf
            continue
        begins = [
            leaf + 1 - 2**k for k in range(1, 9) if (leaf + 1) % 2**k == 0 and leaf + 1 - 2**k >= 0
        ]
        assert [stored[slot] for slot in range(high, low - 1, -1)] == begins


def test_a_turn_is_seen_by_the_way_between_the_ends() -> None:
    """By numbers: momenta (1, 0), (-.6, 0), (.1, 1) add up to (.5, 1), but the ends are (-.05, .5)
    apart: a turn."""
    a, middle, b = (
        torch.tensor([v], dtype=torch.float64) for v in ([1.0, 0.0], [-0.6, 0.0], [0.1, 1.0])
    )
    assert lockstep._is_turning(a, b, a + middle + b).tolist() == [True]
    assert lockstep._is_turning(b, a, a + middle + b).tolist() == [True]
    assert lockstep._is_turning(a, b, a + 0.5 * middle + b).tolist() == [False]


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts", "lockstep"])
def test_the_metric_is_a_change_of_scale(name: str) -> None:
    """Coordinates of scale s with inverse mass s^2 move exactly as those of scale 1 with the
    identity."""
    scale = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    narrow = Gaussian(torch.zeros(3, dtype=torch.float64), torch.diag(scale**2))
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = run(KERNELS[name](), Gaussian(torch.zeros(3, dtype=torch.float64)), x, 5)
    scaled = run(KERNELS[name]().replace(inverse_mass=scale**2), narrow, x * scale, 5)
    torch.testing.assert_close(scaled / scale, plain)


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts", "lockstep"])
def test_the_reported_hamiltonian_is_that_of_the_state_kept(name: str) -> None:
    """In equilibrium the momentum that comes with the kept state is normal too: kinetic energy d /
    2 on average."""
    energy = Gaussian(torch.zeros(3, dtype=torch.float64))
    kernel, generator = KERNELS[name]().replace(step_size=1.3), torch.Generator().manual_seed(5)
    state = kernel.init(energy, energy.sample(50_000, generator))
    new, info = kernel.step(energy, state, generator)
    assert float((~info.accepted).double().mean()) > 0.05, "some rejections are needed to tell"
    kinetic_energy = info.energy - new.energy
    assert (kinetic_energy >= 0).all()
    within_se(kinetic_energy.mean(), 1.5, kinetic_energy.std() / math.sqrt(len(kinetic_energy)))


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts", "lockstep"])
def test_an_error_above_a_thousand_nats_diverges_and_a_smaller_one_does_not(name: str) -> None:
    class Stiff(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * self.stiffness * x**2

    energy = Stiff().double()
    kernel: Kernel = {
        "mala": MALA(step_size=1.0),
        "hmc": HMC(step_size=1.0, num_steps=1, jitter=0.0),
        "nuts": NUTS(step_size=1.0, max_tree_depth=1),
        "lockstep": LockstepNUTS(step_size=1.0, max_tree_depth=1),
    }[name]
    for stiffness, expected in ((12.0, False), (1e4, True)):
        energy.stiffness = stiffness
        _, info = kernel.step(
            energy,
            kernel.init(energy, torch.ones(64, dtype=torch.float64)),
            torch.Generator().manual_seed(0),
        )
        # errors of 10 to 1,000 nats are refused, and that is all
        assert float(info.acceptance_rate.median()) < 1e-4
        assert bool(info.diverging.double().mean() > 0.9) == expected


def test_nuts_reports_its_tree_and_stops_at_its_depth() -> None:
    energy = Normal((2,)).double()
    kernel = NUTS(step_size=0.01, max_tree_depth=4)
    _, info = kernel.step(energy, kernel.init(energy, torch.ones(5, 2, dtype=torch.float64)))
    assert info.tree_depth is not None
    assert (info.tree_depth == 4).all()
    assert (info.n_steps == 15).all()


def test_jitter_breaks_the_resonance_of_a_fixed_length() -> None:
    """On N(0, 1) a trajectory of length 2 pi comes back to where it began."""
    x = torch.full((2000,), 2.0, dtype=torch.float64)
    period = 2 * math.pi
    stuck = run(HMC(step_size=period / 200, num_steps=200, jitter=0.0), Normal().double(), x, 3)
    free = run(HMC(step_size=period / 200, num_steps=200, jitter=0.9), Normal().double(), x, 6)
    assert float(stuck.std()) < 0.01
    within_se(free.mean(), 0.0, free.std() / math.sqrt(len(free)))
