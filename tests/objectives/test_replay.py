"""Chains of neural energies: replay buffers, short runs, penalties, and the dropped term against
quadrature; mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.seeds import seeded
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Uniform

from pyroebm import Energy
from pyroebm.energies import BernoulliRBM, ConvEnergy, MLPEnergy
from pyroebm.kernels import HMC, MALA, ULA, Gibbs
from pyroebm.objectives import (
    ContrastiveDivergence,
    ImprovedCD,
    Objective,
    ReplayBufferCD,
    ShortRun,
    langevin,
)
from pyroebm.objectives import improved as improved_module
from pyroebm.objectives.contrastive import run_chains
from pyroebm.objectives.improved import langevin_step, nearest_neighbor_entropy
from pyroebm.training import fit

F64 = torch.float64


class Quartic(Energy):
    """A scalar energy of three parameters, which quadrature knows all of."""

    def __init__(self) -> None:
        super().__init__(())
        self.theta = nn.Parameter(torch.tensor([0.5, -0.8, 0.4], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.theta
        return 0.25 * a * x**4 + 0.5 * b * x**2 + c * x


class Bowl(Energy):
    """A normal distribution with mean and log precision to be learned."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.mean = nn.Parameter(torch.tensor([0.5, -1.0], dtype=F64))
        self.log_precision = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (torch.exp(self.log_precision) * (x - self.mean) ** 2).sum(-1)


def of_shape(shape: tuple[int, ...], dtype: torch.dtype = F64) -> Energy:
    if len(shape) == 3:
        return ConvEnergy(shape, (3,), scale=2.0, dtype=dtype, generator=seeded(1))
    return MLPEnergy(shape, (6,), scale=2.0, dtype=dtype, generator=seeded(1))


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cd": lambda: ContrastiveDivergence(3, MALA(0.3)),
    "pcd": lambda: ReplayBufferCD(8, 2, MALA(0.3)),
    "replay": lambda: ReplayBufferCD(
        8, 2, ULA(0.3), buffer_size=30, restart=0.3, energy_penalty=0.1
    ),
    "hmc": lambda: ReplayBufferCD(8, 2, HMC(0.2, num_steps=2), buffer_size=20),
    "short run": lambda: ShortRun(5, langevin(0.02, 0.05)),
    "improved": lambda: ImprovedCD(8, 4, ULA(0.3), buffer_size=30, restart=0.1),
}
SHAPES = [(), (3,), (1, 4, 4)]


# --------------------------------------------------------------------------------------------------
# What they share


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract(name: str, shape: tuple[int, ...]) -> None:
    """A scalar loss with a graph to all parameters, detached metrics, nothing left behind, the same
    again by the same seed; saved and loaded it goes on alike."""
    energy, batch = of_shape(shape), torch.randn(5, *shape, dtype=F64, generator=seeded(2))
    with torch.no_grad():
        for parameter in energy.parameters():  # the last layer starts at 0
            parameter += 0.1 * torch.randn(parameter.shape, dtype=F64, generator=seeded(3))
    one, two, third = (OBJECTIVES[name]() for _ in range(3))
    before = torch.get_rng_state()
    losses = []
    for objective in (one, two):
        noise = seeded(4)
        losses.append([objective(energy, batch, generator=noise) for _ in range(3)])
    assert torch.equal(before, torch.get_rng_state())
    for (a, metrics), (b, _) in zip(*losses, strict=True):
        assert a.shape == ()
        assert torch.equal(a, b)
        assert {"energy_data", "energy_model", "energy_gap", "acceptance_rate"} <= set(metrics)
        assert not any(fact.requires_grad for fact in metrics.values())
    assert energy.training
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())
    grads = torch.autograd.grad(losses[0][-1][0], list(energy.parameters()), allow_unused=True)
    moved = [g is not None and bool((g != 0).any()) for g in grads]
    assert moved.count(False) <= 1, "all but the additive constant are trained"
    third.load_state_dict(one.state_dict())
    assert torch.equal(*(o(energy, batch, generator=seeded(5))[0] for o in (one, third)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_and_training(name: str) -> None:
    data = torch.randn(40, 2, generator=seeded(6)) * 0.5 + 1.0
    energy = of_shape((2,), torch.float32)
    far = data - 2.5
    history = fit(energy, OBJECTIVES[name](), data, num_steps=60, batch_size=20)
    assert all(map(math.isfinite, history["loss"]))
    assert float((energy(data).mean() - energy(far).mean()).detach()) < -0.05, (
        "data has less energy than what is far from it"
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_that_is_no_number_is_seen(name: str) -> None:
    energy, batch = of_shape((3,)), torch.randn(5, 3, dtype=F64, generator=seeded(2))
    batch[2] = math.nan
    if name == "cd":
        with pytest.raises(ValueError, match="row 2"):
            OBJECTIVES[name]()(energy, batch)
    else:
        assert math.isnan(float(OBJECTIVES[name]()(energy, batch, generator=seeded(0))[0].detach()))


def test_sampling_is_in_eval_mode() -> None:
    seen = []

    class Watched(Quartic):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.theta.requires_grad))
            return super().forward(x)

    energy = Watched()
    for objective in (ReplayBufferCD(4, 2, ULA(0.1)), ShortRun(2, ULA(0.1))):
        seen.clear()
        objective(energy, torch.zeros(3, dtype=F64), generator=seeded(0))
        assert seen[-2:] == [(True, True), (True, True)], "data and model"
        assert (False, False) in seen
        assert set(seen[:-2]) <= {(False, False), (True, True)}
    seen.clear()
    ImprovedCD(4, 2, ULA(0.1))(energy, torch.zeros(3, dtype=F64), generator=seeded(0))
    assert (False, True) in seen, "the last step has a graph to the parameters, in eval mode"


# --------------------------------------------------------------------------------------------------
# The buffer


class Still(ULA):
    """A kernel that stays where it is."""

    def step(self, energy: Energy, state: Any, generator: Any = None) -> Any:
        _, info = super().step(energy, state, generator)
        return state, info


class Shift(ULA):
    """A kernel that adds one to each chain, so that it counts how often it went on."""

    def step(self, energy: Energy, state: Any, generator: Any = None) -> Any:
        _, info = super().step(energy, state, generator)
        return state._replace(x=state.x + 1.0), info


def test_a_subclass_moves_by_its_own_step() -> None:
    kernel, start = Shift(0.1), torch.zeros(4, 2, dtype=F64)
    state, _ = kernel.steps(Bowl(), kernel.init(Bowl(), start), 3, seeded(0))
    assert torch.equal(state.x, start + 3.0)


def check_buffer(make: Callable[..., ReplayBufferCD]) -> None:
    """Frozen dynamics keep every chain; those that are moved are distinct, and written to where
    they came from."""
    energy, batch = Bowl(), torch.zeros(3, 2, dtype=F64)
    still = make(10, 1, Still(0.1), buffer_size=100)
    still(energy, batch, generator=seeded(0))
    assert still.chains is not None
    first = still.chains.clone()
    noise = seeded(1)
    for _ in range(50):
        still(energy, batch, generator=noise)
    assert torch.equal(still.chains, first), "an identity kernel changed the chains"
    counting = make(
        10, 1, Shift(0.1), buffer_size=100, initial=lambda n, _: torch.zeros(n, 2, dtype=F64)
    )
    noise = seeded(2)
    for _ in range(60):
        counting(energy, batch, generator=noise)
    assert counting.chains is not None
    counts = counting.chains[:, 0]
    assert float(counts.sum()) == 600.0, "10 different chains go on at each batch"
    mean, se = mean_and_se(counts)
    # each chain goes on with probability 1/10: counts are binomial (60, 1/10)
    within_se(
        counts.var(),
        60 * 0.1 * 0.9,
        60 * 0.1 * 0.9 * math.sqrt(2.0 / 99.0),
        what="the spread of the counts",
    )
    assert mean == 6.0
    assert se > 0.0


def test_a_buffer_keeps_its_chains() -> None:
    check_buffer(ReplayBufferCD)


class Repeating(ReplayBufferCD):
    """Rows drawn with replacement: measured elsewhere, 1,000 chains fell to 89."""

    def take(self, energy: Energy, noise: Any) -> Any:
        super().take(energy, noise)
        assert self.chains is not None
        rows = torch.randint(self.buffer_size, (self.num_chains,), generator=noise)
        return rows, self.chains[rows]


class Misplaced(ReplayBufferCD):
    """Written back one row further on."""

    def put(self, rows: Any, x: Tensor) -> None:
        super().put((rows + 1) % self.buffer_size, x)


class Head(ReplayBufferCD):
    """Always the first rows."""

    def take(self, energy: Energy, noise: Any) -> Any:
        rows, _ = super().take(energy, noise)
        assert self.chains is not None
        return torch.arange(len(rows)), self.chains[: len(rows)].clone()


@pytest.mark.parametrize("mutant", [Repeating, Misplaced, Head])
def test_mutants_of_the_buffer_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check_buffer(mutant)


def check_restarts(objective: Callable[..., ReplayBufferCD]) -> None:
    """With still chains and a distribution of starts that counts them, a share of rows is new at
    each batch."""
    drawn: list[int] = []

    def distribution(n: int, _: Any) -> Tensor:
        drawn.append(n)
        return torch.full((n, 2), float(len(drawn)), dtype=F64)

    still = objective(50, 1, Still(0.1), buffer_size=80, restart=0.2, initial=distribution)
    noise = seeded(3)
    for _ in range(200):
        still(Bowl(), torch.zeros(3, 2, dtype=F64), generator=noise)
    assert drawn[0] == 80
    shares = torch.tensor(drawn[1:], dtype=F64) / 50
    within_se(*(lambda m, s: (m, 0.2, s))(*mean_and_se(shares)), what="the share of new chains")
    assert still.chains is not None
    assert still.chains.unique().numel() > 5, "old chains stay"


def test_restarts_have_their_share_and_distribution() -> None:
    check_restarts(ReplayBufferCD)
    with pytest.raises(AssertionError, match="share of new chains"):
        check_restarts(
            lambda *args, **options: ReplayBufferCD(*args, **(options | {"restart": 0.1}))
        )


@pytest.mark.parametrize(
    "distribution",
    [
        Uniform(torch.tensor([2.0, 2.0]), torch.tensor([3.0, 3.0])),
        lambda n, g: torch.full((n, 2), 2.5, dtype=F64),
    ],
)
def test_starts_from_a_stated_distribution(distribution: Any) -> None:
    for objective in (
        ReplayBufferCD(20, 1, Still(0.1), initial=distribution),
        ShortRun(1, Still(0.1), initial=distribution),
    ):
        _, metrics = objective(Bowl(), torch.zeros(3, 2, dtype=F64), generator=seeded(0))
        low, high = (Bowl()(torch.full((1, 2), value, dtype=F64)).item() for value in (2.0, 3.0))
        assert low < float(metrics["energy_model"]) < high


def frozen_gradient(make: Callable[[], Objective], burn: int, steps: int) -> None:
    """With the energy frozen, the mean gradient is the exact one of a normal distribution."""
    energy, data = Bowl(), torch.randn(6, 2, dtype=F64, generator=seeded(2))
    with torch.no_grad():
        x = data - energy.mean
        precision = energy.log_precision.exp()
        truth = torch.cat([-(precision * x).mean(0), 0.5 * (precision * x**2).mean(0) - 0.5])
    means = []
    for run in range(40):
        objective, noise = make(), seeded(100 + run)
        for _ in range(burn):
            objective(energy, data, generator=noise)
        draws = [
            torch.cat(
                torch.autograd.grad(
                    objective(energy, data, generator=noise)[0], list(energy.parameters())
                )
            )
            for _ in range(steps)
        ]
        means.append(torch.stack(draws).mean(0))
    mean, se = mean_and_se(torch.stack(means))
    within_se(mean, truth, se, what="the gradient")


def test_replayed_chains_of_a_frozen_energy_are_exact() -> None:
    frozen_gradient(lambda: ReplayBufferCD(60, 5, MALA(1.2), buffer_size=120), burn=12, steps=5)
    exact = MultivariateNormal(
        Bowl().mean.detach(), torch.diag(torch.exp(-Bowl().log_precision.detach()))
    )
    frozen_gradient(
        lambda: ReplayBufferCD(60, 2, MALA(1.2), buffer_size=120, restart=0.5, initial=exact),
        burn=0,
        steps=5,
    )


# --------------------------------------------------------------------------------------------------
# Short runs


def test_a_short_run_is_its_closed_form() -> None:
    """k steps of ULA on a normal distribution from a point: mean and variance by recursion, at a
    temperature of its own."""
    energy = Bowl()
    eps = 0.5
    temperature = 0.3
    k = 6
    n = 20_000
    kernel = ULA(eps, temperature=temperature)
    objective = ShortRun(k, kernel, initial=lambda m, _: torch.zeros(m, 2, dtype=F64))
    x = objective.sample(energy, n, seeded(0))
    with torch.no_grad():
        keep = 1.0 - 0.5 * eps**2 * energy.log_precision.exp()
        mean = energy.mean * (1.0 - keep**k)
        variance = eps**2 * temperature * (1.0 - keep ** (2 * k)) / (1.0 - keep**2)
    for power, truth in ((1, mean), (2, variance)):
        values = x if power == 1 else (x - mean) ** 2
        within_se(*(lambda m, s, truth=truth: (m, truth, s))(*mean_and_se(values)))
    _, metrics = objective(energy, torch.zeros(3, 2, dtype=F64), generator=seeded(1))
    assert float(metrics["temperature"]) == pytest.approx(temperature)
    assert not objective.state_dict(), "no chain is kept"


def test_the_field_s_numbers_as_a_kernel() -> None:
    """One step of drift a and noise b is x - a grad E(x) + b n."""
    energy, x = Bowl(), torch.randn(5, 2, dtype=F64, generator=seeded(0))
    moved, _ = run_chains(energy, langevin(0.7, 0.03), x, 1, seeded(1))
    n = torch.randn(5, 2, dtype=F64, generator=seeded(1))
    slope = energy.log_precision.exp() * (x - energy.mean)
    torch.testing.assert_close(moved, (x - 0.7 * slope + 0.03 * n).detach())
    assert langevin(1.0, 0.01).temperature == pytest.approx(5e-5)


# --------------------------------------------------------------------------------------------------
# Penalty


def test_the_penalty_is_the_written_one() -> None:
    def make(penalty: float) -> ReplayBufferCD:
        return ReplayBufferCD(9, 2, ULA(0.2), energy_penalty=penalty)

    energy, batch = of_shape((2,)), torch.randn(5, 2, dtype=F64, generator=seeded(2))
    plain, metrics = make(0.0)(energy, batch, generator=seeded(3))
    penalised, more = make(0.3)(energy, batch, generator=seeded(3))
    torch.testing.assert_close(penalised - plain, more["energy_penalty"])
    assert torch.equal(more["energy_gap"], metrics["energy_gap"])
    start = energy.initial(9, noise := seeded(3))
    end, _ = run_chains(energy, ULA(0.2), start, 2, noise)
    written = 0.3 * (energy(batch).square().mean() + energy(end).square().mean())
    torch.testing.assert_close(more["energy_penalty"], written.detach())
    (slope,) = torch.autograd.grad(penalised - plain, energy.net[-1].bias)
    (truth,) = torch.autograd.grad(written, energy.net[-1].bias)
    torch.testing.assert_close(slope, truth)


# --------------------------------------------------------------------------------------------------
# The dropped term


def quadrature_terms(
    points: Tensor, eps: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By quadrature over a Langevin step from points: gradients of E_q[E at fixed theta], of -H(q),
    and of KL(p_D || p) - KL(q || p) with data at 0.5 and -1."""
    energy, grid = Quartic(), torch.linspace(-9.0, 9.0, 6001, dtype=F64)
    h = grid[1] - grid[0]
    a, b, c = energy.theta
    center = points - 0.5 * eps**2 * (a * points**3 + b * points + c)
    log_q = -0.5 * (grid - center[:, None]) ** 2 / (eps**2 * temperature)
    log_q = torch.logsumexp(log_q, 0) - math.log(
        len(points) * eps * math.sqrt(2.0 * math.pi * temperature)
    )
    q, values = log_q.exp(), energy(grid)
    log_z = torch.logsumexp(-values, 0) + h.log()
    through, entropy = h * (q * values.detach()).sum(), h * (q * log_q).sum()
    total = (
        energy(torch.tensor([0.5, -1.0], dtype=F64)).mean()
        + log_z
        - (h * (q * (log_q + values)).sum() + log_z)
    )
    return tuple(
        torch.autograd.grad(value, energy.theta, retain_graph=True)[0]
        for value in (through, entropy, total)
    )  # type: ignore[return-value]


def improved_gradients(
    make: Callable[[int], ReplayBufferCD], points: Tensor, copies: int, repeats: int
) -> Tensor:
    energy = Quartic()
    data = torch.tensor([0.5, -1.0], dtype=F64)
    noise = seeded(7)
    draws = []
    for _ in range(repeats):
        objective = make(copies * len(points))
        objective.chains = points.repeat(copies)
        loss, _ = objective(energy, data, generator=noise)
        draws.append(torch.autograd.grad(loss, energy.theta)[0])
    return torch.stack(draws)


POINTS = torch.tensor([1.5, -0.5, 0.3, -2.0], dtype=F64)


@pytest.fixture
def no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the mean energy of q alone in the term through the sampler."""
    monkeypatch.setattr(improved_module, "nearest_neighbor_entropy", lambda x: x.new_zeros(()))


def check_through() -> None:
    """The gradient through the sampler alone: the difference from ReplayBufferCD on the same
    noise."""
    truth, _, _ = quadrature_terms(POINTS, 0.6, 0.5)
    kernel = ULA(0.6, temperature=0.5)
    with_it, without = (
        improved_gradients(lambda n, make=make: make(n, 1, kernel), POINTS, 200, 60)
        for make in (ImprovedCD, ReplayBufferCD)
    )
    mean, se = mean_and_se(with_it - without)
    within_se(mean, truth, se, what="the term through the sampler")


def test_the_dropped_term_is_that_of_quadrature(no_entropy: None) -> None:
    check_through()


def test_with_the_opposite_sign_it_is_the_exact_gradient_of_the_difference(
    no_entropy: None,
) -> None:
    """From one point the entropy of q does not depend on the parameters, and nothing is left out:
    KL(p_D || p) - KL(q || p)."""
    point, kernel = POINTS[:1], ULA(0.6)
    _, entropy, truth = quadrature_terms(point, 0.6, 1.0)
    torch.testing.assert_close(entropy, torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    with_it, without = (
        improved_gradients(lambda n, make=make: make(n, 1, kernel), point, 800, 60)
        for make in (ImprovedCD, ReplayBufferCD)
    )
    mean, se = mean_and_se(without - (with_it - without))
    within_se(mean, truth, se, what="the gradient of the difference")
    for other in (without, with_it):
        assert float((other.mean(0) - truth).norm()) > 20.0 * float(torch.from_numpy(se).norm())


def test_the_entropy_s_gradient_is_that_of_a_normal_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chains drawn from N(0, s^2) and one step on a normal distribution: q is normal with a
    variance that the precision sets."""
    eps = 0.8
    spread = 2.0
    precision = torch.tensor([0.5, 1.0, 1.5, 0.8], dtype=F64)

    class Precise(Energy):
        def __init__(self) -> None:
            super().__init__((4,))
            self.log_precision = nn.Parameter(precision.log())

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * (self.log_precision.exp() * x**2).sum(-1)

    energy, draws = Precise(), []
    for number in range(60):
        terms = []
        for entropy in (nearest_neighbor_entropy, lambda x: x.new_zeros(())):
            monkeypatch.setattr(improved_module, "nearest_neighbor_entropy", entropy)
            objective = ImprovedCD(500, 1, ULA(eps))
            objective.chains = spread * torch.randn(500, 4, dtype=F64, generator=seeded(number))
            loss, _ = objective(
                energy, torch.zeros(3, 4, dtype=F64), generator=seeded(1000 + number)
            )
            terms.append(torch.autograd.grad(loss, energy.log_precision)[0])
        draws.append(terms[0] - terms[1])
    keep = 1.0 - 0.5 * eps**2 * precision
    # of minus half the log variance
    truth = keep * spread**2 * 0.5 * eps**2 * precision / (keep**2 * spread**2 + eps**2)
    mean, se = mean_and_se(torch.stack(draws))
    within_se(mean, truth, se, what="the entropy's gradient")
    assert float(truth.norm()) > 10.0 * float(torch.from_numpy(se).norm()), (
        "or it would say nothing"
    )


def test_entropy_by_neighbours() -> None:
    for d, spread in ((1, 0.3), (2, 2.0), (3, 1.0)):
        truth = 0.5 * d * math.log(2.0 * math.pi * math.e) + d * math.log(spread)
        found = torch.stack(
            [
                nearest_neighbor_entropy(
                    spread * torch.randn(1500, d, dtype=F64, generator=seeded(k))
                )
                for k in range(20)
            ]
        )
        mean, se = mean_and_se(found)
        within_se(mean, truth, math.hypot(float(se), 0.004 * d), what=f"entropy in {d} dimensions")


def test_a_step_with_a_graph_is_the_kernel_s() -> None:
    energy, x = Bowl(), torch.randn(6, 2, dtype=F64, generator=seeded(0))
    kernel = ULA(0.4, temperature=0.7)
    ours, theirs = (
        langevin_step(energy, x, kernel, seeded(1)),
        run_chains(energy, kernel, x, 1, seeded(1))[0],
    )
    torch.testing.assert_close(ours.detach(), theirs)


def detached(energy: Energy, x: Tensor, kernel: ULA, noise: Any) -> Tensor:
    return langevin_step(energy, x, kernel, noise).detach()


def half(energy: Energy, x: Tensor, kernel: ULA, noise: Any) -> Tensor:
    y = langevin_step(energy, x, kernel, noise)
    return y.detach() + 0.5 * (y - y.detach())


@pytest.mark.parametrize("mutant", [detached, half])
def test_mutants_of_the_dropped_term_are_caught(
    mutant: Any, no_entropy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(improved_module, "langevin_step", mutant)
    with pytest.raises(AssertionError):
        check_through()


def test_an_energy_that_is_not_frozen_is_caught(
    no_entropy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    monkeypatch.setattr(improved_module, "frozen", lambda energy: contextlib.nullcontext())
    with pytest.raises(AssertionError, match="standard errors"):
        check_through()


def test_chains_are_not_written_into_what_they_start_from() -> None:
    kept = torch.randn(20, 2, dtype=F64, generator=seeded(0))
    before, objective = (
        kept.clone(),
        ReplayBufferCD(5, 1, ULA(0.3), buffer_size=20, initial=lambda n, _: kept[:n]),
    )
    objective(Bowl(), torch.zeros(3, 2, dtype=F64), generator=seeded(1))
    assert torch.equal(kept, before)
    assert objective.chains is not None
    assert not torch.equal(objective.chains, kept)


# --------------------------------------------------------------------------------------------------
# Front door


@pytest.mark.parametrize(
    "objective",
    [
        ContrastiveDivergence(1, ULA(0.1)),
        ReplayBufferCD(10, 1, ULA(0.1)),
        ShortRun(1, ULA(0.1)),
        ImprovedCD(10, 1),
    ],
)
def test_batches_are_looked_at_before_chains_move(objective: Objective) -> None:
    for batch in (
        torch.zeros(3, 2),
        torch.zeros(3, 3, dtype=F64),
        torch.zeros(0, 2, dtype=F64),
        torch.zeros(3, 1, 2, dtype=F64),
    ):
        with pytest.raises(ValueError, match=r"batch must have|event_shape \(2,\)"):
            objective(Bowl(), batch)
    assert getattr(objective, "chains", None) is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ReplayBufferCD(10, buffer_size=9), "buffer_size must be"),
        (lambda: ReplayBufferCD(10, restart=1.5), "restart must be"),
        (lambda: ReplayBufferCD(10, energy_penalty=-1.0), "energy_penalty must be"),
        (lambda: ReplayBufferCD(10, energy_penalty=math.inf), "energy_penalty must be"),
        (
            lambda: ReplayBufferCD(buffer_size=200)(BernoulliRBM(2, 2), torch.ones(3, 2)),
            "kernel must not be None for the layered machine BernoulliRBM",
        ),
        (lambda: ShortRun(0), "k must be"),
        (
            lambda: ShortRun(initial=lambda n, _: torch.zeros(n, 3))(
                Bowl(), torch.zeros(3, 2, dtype=F64)
            ),
            "event_shape",
        ),
        (
            lambda: ShortRun(initial=lambda n, _: torch.zeros(n + 1, 2, dtype=F64))(
                Bowl(), torch.zeros(3, 2, dtype=F64)
            ),
            "initial must give 3",
        ),
        (lambda: langevin(0.0, 1.0), "drift and noise"),
        (lambda: ImprovedCD(kernel=MALA(0.1)), "must be a ULA"),  # type: ignore[arg-type]
        (lambda: ImprovedCD(kernel=ULA(0.1, torch.ones(2))), "must be a ULA"),
        (lambda: ImprovedCD(1), "num_chains must be at least 2"),
        (lambda: ImprovedCD()(BernoulliRBM(2, 2), torch.ones(3, 2)), "must have real support"),
        (lambda: ShortRun(kernel=Gibbs()).sample(Bowl(), 3), "discrete supports"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
