"""Objectives of machines that can be enumerated: every gradient against the exact one; chains,
ladders and centering; mutants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lib.checks import mean_and_se, within_se
from lib.machines import LOG_Z, oracle_rbm
from lib.reseed import problem_generator
from lib.seeds import flat_grad, seeded
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import Energy
from pyroebm.core import spin
from pyroebm.core.enumeration import all_bits
from pyroebm.core.rng import uniform
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    GaussianRBM,
    Layers,
)
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.kernels import MALA, Gibbs, Info
from pyroebm.kernels.base import PointState
from pyroebm.kernels.gibbs import point_state
from pyroebm.kernels.sites import DiscreteKernel
from pyroebm.objectives import (
    Centering,
    ContrastiveDivergence,
    ExactLikelihood,
    MeanFieldLikelihood,
    PersistentCD,
    Pseudolikelihood,
    ReplayBufferCD,
    Sparsity,
)
from pyroebm.objectives import contrastive as contrastive_module
from pyroebm.objectives.layered import TemperatureLadder, mean_field
from pyroebm.targets import Gaussian

F64 = torch.float64


def gaussian_rbm() -> GaussianRBM:
    weight = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=F64)
    biases = {
        "visible_bias": torch.tensor([0.3, -0.2, 0.1]),
        "hidden_bias": torch.tensor([0.2, -0.4]),
    }
    return GaussianRBM(
        3, 2, weight=weight, **biases, log_sigma=torch.tensor([0.1, -0.3, 0.2]), dtype=F64
    )


class Deep(LayeredEnergy):
    """A deep machine of four layers."""

    def __init__(self, sizes: Sequence[int] = (3, 2, 3, 2), scale: float = 0.7) -> None:
        super().__init__(sizes, gaussian=False)
        noise = seeded(3)
        pairs = itertools.pairwise(sizes)
        self.weight = nn.ParameterList(
            scale * torch.randn(a, b, dtype=F64, generator=noise) for a, b in pairs
        )
        self.bias = nn.ParameterList(
            0.3 * torch.randn(n, dtype=F64, generator=noise) for n in sizes
        )

    def layers(self) -> Layers:
        return Layers(tuple(self.weight), tuple(self.bias))


class Spins(Energy):
    """A small fully visible machine of spins, with couplings and fields to be learned."""

    def __init__(self, n: int = 4) -> None:
        super().__init__((n,), spin)
        self.coupling = nn.Parameter(0.4 * torch.randn(n, n, dtype=F64, generator=seeded(4)))
        self.field = nn.Parameter(0.3 * torch.randn(n, dtype=F64, generator=seeded(5)))

    def forward(self, x: Tensor) -> Tensor:
        return -((x @ torch.triu(self.coupling, 1)) * x).sum(-1) - x @ self.field


class Colors(Energy):
    """Two one-hot sites of three colors each."""

    def __init__(self) -> None:
        super().__init__((2, 3), constraints.one_hot)
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=F64, generator=seeded(6)))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2)
        return -((flat @ self.weight) * flat).sum(-1)


class Learned(Energy):
    """A Gaussian with mean and log precision to be learned."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.mean = nn.Parameter(torch.tensor([0.5, -1.0], dtype=F64))
        self.log_precision = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (torch.exp(self.log_precision) * (x - self.mean) ** 2).sum(-1)

    def log_partition(self) -> Tensor:
        return -0.5 * self.log_precision.sum()


def states(values: Sequence[Any], n: int) -> Tensor:
    return torch.tensor(list(itertools.product(values, repeat=n)), dtype=F64)


BITS = states([0.0, 1.0], 4)
DATA = BITS[[11, 13, 2, 11, 15, 7, 8, 11]]


def rbm_energies(rbm: BernoulliRBM, v: Tensor) -> Tensor:
    """Minus the log of the sum over hidden states, one by one, of the written joint energy."""
    h = states([0.0, 1.0], 3)
    joint = -(v @ rbm.weight @ h.mT) - (v @ rbm.visible_bias)[:, None] - h @ rbm.hidden_bias
    return -torch.logsumexp(-joint, 1)


def exact_rbm(rbm: BernoulliRBM, data: Tensor) -> Tensor:
    """Gradient of minus the mean log-likelihood, by enumeration."""
    return flat_grad(
        rbm, rbm_energies(rbm, data).mean() + torch.logsumexp(-rbm_energies(rbm, BITS), 0)
    )


def expected_cd(rbm: BernoulliRBM, data: Tensor, k: int) -> Tensor:
    """The expectation of CD-k's gradient, through the transition matrix of block Gibbs sampling
    over all visible states."""
    h = states([0.0, 1.0], 3)
    with torch.no_grad():
        up, down = (
            torch.sigmoid(BITS @ rbm.weight + rbm.hidden_bias),
            torch.sigmoid(h @ rbm.weight.mT + rbm.visible_bias),
        )
        p_h = torch.stack([(u**h * (1 - u) ** (1 - h)).prod(1) for u in up])
        p_v = torch.stack([(d**BITS * (1 - d) ** (1 - BITS)).prod(1) for d in down])
        step = torch.linalg.matrix_power(p_h @ p_v, k)
        where = (data[:, None] == BITS).all(2).to(F64)
        reached = (where @ step).mean(0)
    return flat_grad(rbm, rbm_energies(rbm, data).mean() - reached @ rbm_energies(rbm, BITS))


# --------------------------------------------------------------------------------------------------
# The checks. Each raises AssertionError; the mutants below show that it does.


def check_cd(objective: nn.Module, k: int) -> None:
    rbm, noise = oracle_rbm(), seeded(17 + k)
    rows = DATA.repeat(50, 1)
    draws = torch.stack(
        [flat_grad(rbm, objective(rbm, rows, generator=noise)[0]) for _ in range(200)]
    )
    within_se(
        *(mean_and_se(draws)[0], expected_cd(rbm, DATA, k)),
        mean_and_se(draws)[1],
        what=f"the gradient of CD-{k}",
    )


def check_pcd(
    make: Callable[[], nn.Module],
    energy: Energy,
    data: Tensor,
    truth: Tensor,
    burn: int = 60,
    steps: int = 25,
) -> None:
    """With the energy frozen, the mean gradient of persistent chains is the exact one."""
    means = []
    for run in range(40):
        objective, noise = make(), seeded(100 + run)
        for _ in range(burn):
            objective(energy, data, generator=noise)
        draws = [
            flat_grad(energy, objective(energy, data, generator=noise)[0]) for _ in range(steps)
        ]
        means.append(torch.stack(draws).mean(0))
    mean, se = mean_and_se(torch.stack(means))
    varies = torch.from_numpy(se) > 1e-12  # the offset and the like have none
    torch.testing.assert_close(torch.from_numpy(mean)[~varies], truth[~varies])
    within_se(
        mean[varies.numpy()], truth[varies].numpy(), se[varies.numpy()], what="the gradient of PCD"
    )


def check_identity_keeps_chains(objective: ReplayBufferCD) -> None:
    rbm, noise = oracle_rbm(), seeded(0)
    objective(rbm, DATA, generator=noise)
    assert objective.chains is not None
    before = objective.chains.clone()
    for _ in range(5):
        objective(rbm, DATA, generator=noise)
    assert torch.equal(objective.chains, before), "an identity kernel changed the chains"


def check_swaps(ladder: TemperatureLadder) -> None:
    """Pairs drawn exactly, each at its own temperature, keep their distributions under swaps:
    counts of two states."""
    energies = torch.tensor([0.0, 2.0], dtype=F64)
    n, noise = 200_000, seeded(5)
    ladder.num_chains = n
    p = [
        torch.exp(-beta * energies)[1] / torch.exp(-beta * energies).sum() for beta in ladder.betas
    ]
    state = torch.cat([uniform((n,), noise, F64, torch.device("cpu")) < q for q in p]).long()
    order, _ = ladder.swaps(energies[state], noise)
    swapped = state[order].reshape(len(p), n).to(F64)
    assert not torch.equal(order, torch.arange(len(order))), "nothing was swapped"
    for row, q in zip(swapped, p, strict=True):
        mean, se = mean_and_se(row)
        within_se(mean, q, se, what="the share of the upper state")


def check_centering(centering: Centering, energy: LayeredMachine, data: Tensor) -> None:
    """A step along centered gradients is a plain step in the coordinates in which units are counted
    from their offsets."""
    rate = 0.05
    loss, metrics = ContrastiveDivergence(k=2)(energy, data, generator=seeded(1))
    loss.backward()
    plain = [
        p.grad.clone()
        for p in (*energy.layers().weights, *energy.layers().biases)
        if p.grad is not None
    ]
    centering(energy, data, metrics)
    layers = energy.layers()
    own = [*layers.weights, *layers.biases]
    m, count = centering.offsets, len(layers.weights)

    def from_centered(tensors: Sequence[Tensor]) -> list[Tensor]:
        weights, biases = list(tensors[:count]), list(tensors[count:])
        for k, weight in enumerate(weights):
            biases[k] = biases[k] - weight @ m[k + 1]
            biases[k + 1] = biases[k + 1] - m[k] @ weight
        return [*weights, *biases]

    centered = [p.detach().clone() for p in own]
    for k in range(count):  # the inverse: plain biases to centered ones
        centered[count + k] += centered[k] @ m[k + 1]
        centered[count + k + 1] += m[k] @ centered[k]
    centered = [c.requires_grad_() for c in centered]
    torch.testing.assert_close(from_centered(centered), [p.detach() for p in own])
    grads = torch.autograd.grad(from_centered(centered), centered, grad_outputs=plain)
    stepped = from_centered([c.detach() - rate * g for c, g in zip(centered, grads, strict=True)])
    torch.testing.assert_close(
        [p.detach() - rate * p.grad for p in own if p.grad is not None], stepped
    )


# --------------------------------------------------------------------------------------------------
# Contrastive divergence


@pytest.mark.parametrize("k", [1, 2, 5])
def test_cd_has_its_enumerated_gradient(k: int) -> None:
    check_cd(ContrastiveDivergence(k), k)


def test_cd_tends_to_the_exact_gradient() -> None:
    rbm = oracle_rbm(scale=3.0)
    truth = exact_rbm(rbm, DATA)
    distances = [float((expected_cd(rbm, DATA, k) - truth).norm()) for k in (1, 2, 5, 20, 80)]
    assert distances == sorted(distances, reverse=True), distances
    assert distances[-1] < 1e-6, distances


def test_cd_by_a_kernel_is_the_same_where_the_kernel_mixes() -> None:
    rbm = oracle_rbm()
    noise = seeded(8)
    rows = DATA.repeat(40, 1)
    objective = ContrastiveDivergence(k=15, kernel=Gibbs())
    draws = torch.stack(
        [flat_grad(rbm, objective(rbm, rows, generator=noise)[0]) for _ in range(40)]
    )
    mean, se = mean_and_se(draws)
    within_se(mean, exact_rbm(rbm, DATA), se)


def test_sampling_leaves_gradients_and_modes_alone() -> None:
    energy = Learned()
    energy.train()
    loss, metrics = ContrastiveDivergence(k=3)(
        energy, torch.randn(5, 2, dtype=F64, generator=seeded(0))
    )
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())
    assert energy.training
    assert set(metrics) == {"energy_data", "energy_model", "energy_gap", "acceptance_rate"}
    assert not any(fact.requires_grad for fact in metrics.values())
    torch.testing.assert_close(loss.detach(), metrics["energy_gap"])


# --------------------------------------------------------------------------------------------------
# Persistent chains


@pytest.mark.parametrize("k", [1, 3])
def test_pcd_of_a_frozen_rbm_is_exact(k: int) -> None:
    rbm = oracle_rbm()
    check_pcd(lambda: PersistentCD(num_chains=100, k=k), rbm, DATA, exact_rbm(rbm, DATA))


def test_pcd_at_several_temperatures_is_exact() -> None:
    rbm = oracle_rbm(scale=2.0)
    check_pcd(
        lambda: PersistentCD(num_chains=100, betas=(1.0, 0.7, 0.4)), rbm, DATA, exact_rbm(rbm, DATA)
    )


@pytest.mark.parametrize("betas", [None, (1.0, 0.6, 0.3)])
def test_pcd_of_a_gaussian_rbm_is_exact(betas: tuple[float, ...] | None) -> None:
    rbm, data = gaussian_rbm(), torch.randn(6, 3, dtype=F64, generator=seeded(2))
    truth = flat_grad(rbm, rbm(data).mean() + rbm.log_partition())
    check_pcd(lambda: PersistentCD(num_chains=100, betas=betas), rbm, data, truth)


@pytest.mark.parametrize("betas", [None, (1.0, 0.5)])
def test_pcd_of_a_deep_machine(betas: tuple[float, ...] | None) -> None:
    """The negative phase is exact, the positive one the mean field given the data."""
    deep = Deep()
    data = states([0.0, 1.0], 3)[[1, 4, 6, 6]]
    layers = deep.layers()
    with torch.no_grad():
        second = torch.full((4, 3), 0.5, dtype=F64)
        for _ in range(500):
            first = torch.sigmoid(
                data @ layers.weights[0] + second @ layers.weights[1].mT + layers.biases[1]
            )
            third = torch.sigmoid(second @ layers.weights[2] + layers.biases[3])
            second = torch.sigmoid(
                first @ layers.weights[1] + third @ layers.weights[2].mT + layers.biases[2]
            )
    # linear in the parameters: its gradient is the statistics'
    positive = layers.energy([data, first, second, third]).mean()
    truth = flat_grad(deep, positive + deep.log_partition())
    check_pcd(lambda: PersistentCD(num_chains=100, betas=betas), deep, data, truth)


def dense(units: str, hidden: int = 3) -> BoltzmannMachine:
    n = 3 + hidden
    scale = 0.8 if units == "bits" else 0.2  # four times as much means the same to spins
    weight = scale * torch.randn(n, n, generator=problem_generator(5), dtype=F64).triu(1)
    bias = 0.5 * torch.randn(n, generator=problem_generator(6), dtype=F64)
    return BoltzmannMachine(3, hidden, units=units, weight=weight + weight.mT, bias=bias, dtype=F64)  # type: ignore[arg-type]


@pytest.mark.parametrize("units", ["bits", "spins"])
def test_pcd_of_hidden_units_tied_to_each_other(units: str) -> None:
    """The positive phase in mean field, the negative one drawn: the gradient of the bound, by
    enumeration."""
    machine, low = dense(units), 0.0 if units == "bits" else -1.0
    seen, hidden = (all_bits(3, dtype=F64) * (1.0 - low) + low for _ in range(2))
    means = machine.mean_field(seen)
    assert bool((machine.variational_bound(seen) < machine.log_likelihood(seen)).all())

    # E_q[E] - H(q) of the written q, state by state; and no factorial q nearby is better
    def bound(mu: Tensor) -> Tensor:
        q = (mu - low) / (1.0 - low)
        p = torch.where(hidden > 0.5, q.unsqueeze(1), 1.0 - q.unsqueeze(1)).prod(-1)
        energies = (
            machine(torch.cat([seen.repeat_interleave(8, 0), hidden.repeat(8, 1)], 1))
            .reshape(8, 8)
            .detach()
        )
        return (p * (energies + p.log())).sum(1)

    torch.testing.assert_close(machine.variational_free_energy(seen).detach(), bound(means))
    for step in 1e-3 * torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]):
        nearby = means + step * (means - low) * (1.0 - means)  # within the units' range
        assert bool((bound(nearby) > bound(means)).all())

    truth = flat_grad(
        machine, machine.variational_free_energy(seen).mean() + machine.log_partition()
    )
    grads = []
    for run in range(40):
        objective, noise = ReplayBufferCD(num_chains=50), seeded(100 + run)
        for _ in range(10):
            loss, metrics = objective(machine, seen, generator=noise)
        grads.append(flat_grad(machine, loss))
    assert objective.chains is not None
    assert objective.chains.shape == (50, 6)
    mean, se = mean_and_se(torch.stack(grads))
    within_se(mean[se > 0], truth[se > 0], se[se > 0])
    assert float(metrics["energy_data"]) == pytest.approx(
        float(machine.variational_free_energy(seen).mean().detach())
    )
    with pytest.raises(ValueError, match=r"event_shape \(3,\)"):
        objective(machine, seen[:, :2])


def test_exact_likelihood_of_visible_units() -> None:
    """Of machines that are energies over all units: the free energy of what is seen is summed out
    of them."""
    for machine in (dense("spins"), DeepBoltzmannMachine([3, 2, 2], dtype=F64)):
        seen = 2.0 * BITS[:5, :3] - 1.0 if isinstance(machine, BoltzmannMachine) else BITS[:5, :3]
        loss, metrics = ExactLikelihood()(machine, seen)
        torch.testing.assert_close(loss, -machine.log_likelihood(seen).mean())
        assert bool((flat_grad(machine, loss).abs() > 0).any())
        assert float(metrics["log_z"]) == pytest.approx(machine.log_z)


def test_pcd_of_spins_by_the_default_kernel() -> None:
    energy, every = Spins(), states([-1.0, 1.0], 4)
    data = every[[0, 3, 9, 15]]
    truth = flat_grad(energy, energy(data).mean() + torch.logsumexp(-energy(every), 0))
    check_pcd(lambda: ReplayBufferCD(num_chains=60), energy, data, truth, burn=8, steps=3)


def test_pcd_of_real_numbers_by_a_kernel() -> None:
    energy, data = Learned(), torch.randn(6, 2, dtype=F64, generator=seeded(2))
    truth = flat_grad(energy, energy(data).mean() + energy.log_partition())
    check_pcd(
        lambda: ReplayBufferCD(num_chains=60, k=5, kernel=MALA(1.2)),
        energy,
        data,
        truth,
        burn=6,
        steps=4,
    )


class Identity(DiscreteKernel[PointState]):
    def init(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None = None
    ) -> PointState:
        return point_state(energy, x)

    def step(
        self, energy: Energy, state: PointState, generator: torch.Generator | None = None
    ) -> tuple[PointState, Info]:
        ones = torch.ones_like(state.energy)
        return state, Info(ones, ones > 0, ones < 0, state.energy, ones)


def test_an_identity_kernel_keeps_the_chains() -> None:
    check_identity_keeps_chains(ReplayBufferCD(num_chains=len(DATA), kernel=Identity()))


def test_chains_are_part_of_the_state() -> None:
    for options in ({}, {"betas": (1.0, 0.5)}):
        rbm, objective = oracle_rbm(), PersistentCD(num_chains=7, **options)
        assert not objective.state_dict()
        objective(rbm, DATA, generator=seeded(0))
        other = PersistentCD(num_chains=7, **options)
        other.load_state_dict(objective.state_dict())
        ours, theirs = (o(rbm, DATA, generator=seeded(1))[0] for o in (objective, other))
        assert torch.equal(ours, theirs)
        assert objective.chains is not None
        assert other.chains is not None
        assert torch.equal(objective.chains, other.chains)


@pytest.mark.parametrize(
    "make",
    [
        PersistentCD,
        partial(PersistentCD, betas=(1.0, 0.5)),
        partial(ReplayBufferCD, kernel=Gibbs()),
    ],
    ids=["layers", "betas", "kernel"],
)
def test_chains_of_another_machine_or_number_are_refused(make: Callable[[int], Any]) -> None:
    objective, other = make(7), make(9)
    objective(oracle_rbm(), DATA, generator=seeded(0))
    other.load_state_dict(objective.state_dict())
    wide = BernoulliRBM(5, 4, dtype=F64)
    for chains, machine, batch in (
        (other, oracle_rbm(), DATA),
        (objective, wide, torch.ones(3, 5, dtype=F64)),
        (objective, oracle_rbm().float(), DATA.float()),
    ):
        with pytest.raises(ValueError, match="chains must have shape"):
            chains(machine, batch)


def test_a_mean_field_row_does_not_depend_on_the_others() -> None:
    layers, rows = Deep(scale=3.0).layers(), torch.eye(3, dtype=F64)
    broken = torch.cat([torch.full((1, 3), math.nan, dtype=F64), rows])
    alone, beside = (mean_field(layers, seen)[2] for seen in (rows, broken))
    assert alone is not None
    assert beside is not None
    torch.testing.assert_close(beside[1:], alone)
    assert bool(beside[0].isnan().all())


def test_tempering_swaps() -> None:
    check_swaps(TemperatureLadder((1.0, 0.6, 0.2, 0.1), 1))
    _, metrics = PersistentCD(num_chains=5, betas=(1.0, 0.5))(oracle_rbm(), DATA)
    assert 0.0 < metrics["swap_rate"] <= 1.0


# --------------------------------------------------------------------------------------------------
# Without a chain


def test_exact_likelihood() -> None:
    rbm = oracle_rbm()
    loss, metrics = ExactLikelihood()(rbm, DATA)
    torch.testing.assert_close(flat_grad(rbm, loss), exact_rbm(rbm, DATA))
    assert float(metrics["log_z"]) == pytest.approx(LOG_Z, abs=1e-11)
    one = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=F64)
    assert float(ExactLikelihood()(rbm, one)[1]["log_likelihood"]) == pytest.approx(
        -3.044979315380, abs=1e-11
    )


def test_pseudolikelihood_of_the_oracle() -> None:
    one = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=F64)
    _, metrics = Pseudolikelihood()(oracle_rbm(), one)
    assert float(metrics["pseudo_log_likelihood"]) == pytest.approx(-3.181107879735, abs=1e-11)


def enumerated_pseudolikelihood(energy: Energy, data: Tensor, every: Tensor, width: int) -> Tensor:
    """Conditionals as ratios of sums of the enumerated joint distribution: neighbours of a row are
    found by comparing whole states."""
    p = torch.softmax(-energy(every), 0)
    flat, total = every.flatten(1), torch.zeros((), dtype=F64)
    for row in data.flatten(1):
        own = p[(flat == row).all(1)].sum()
        for site in range(0, flat.shape[1], width):
            rest = [c for c in range(flat.shape[1]) if not site <= c < site + width]
            total = total - (own / p[(flat[:, rest] == row[rest]).all(1)].sum()).log()
    return total / len(data)


def table() -> list[tuple[Energy, Tensor, int]]:
    colors = torch.eye(3, dtype=F64)[torch.tensor(list(itertools.product(range(3), repeat=2)))]
    return [(oracle_rbm(), BITS, 1), (Spins(), states([-1.0, 1.0], 4), 1), (Colors(), colors, 3)]


@pytest.mark.parametrize(("energy", "every", "width"), table(), ids=["bits", "spins", "one-hot"])
def test_pseudolikelihood_is_that_of_the_conditionals(
    energy: Energy, every: Tensor, width: int
) -> None:
    data = every[[1, 5, 7, 5]]
    truth = enumerated_pseudolikelihood(energy, data, every, width)
    loss, _ = Pseudolikelihood()(energy, data)
    torch.testing.assert_close(loss, truth)
    gradient = flat_grad(energy, truth)
    torch.testing.assert_close(flat_grad(energy, loss), gradient)
    noise, rows = seeded(3), data.repeat(25, *[1] * (data.dim() - 1))
    sites = max(1, every[0].numel() // width - 2)
    draws = torch.stack(
        [
            flat_grad(energy, Pseudolikelihood(sites)(energy, rows, generator=noise)[0])
            for _ in range(200)
        ]
    )
    mean, se = mean_and_se(draws)
    moving = se > 1e-12
    within_se(mean[moving], gradient.numpy()[moving], se[moving])


@pytest.mark.parametrize("make", [oracle_rbm, gaussian_rbm, Deep])
def test_mean_field_is_near_for_small_weights(make: Callable[[], LayeredMachine]) -> None:
    """Gap and error of the gradient are of second order in the weights; the bound is on the side
    that is said."""
    gaps, errors = [], []
    for scale in (0.2, 0.02):
        machine = make()
        with torch.no_grad():
            for parameter in machine.parameters():
                if parameter.dim() > 1:
                    parameter *= scale
        data = machine.sample(6, seeded(1))[:, : machine.layers().sizes[0]]
        loss, metrics = MeanFieldLikelihood()(machine, data)
        log_z = machine.log_partition()
        gaps.append(float(log_z.detach() - metrics["log_z_bound"]))
        if not isinstance(machine, Deep):
            errors.append(
                float(
                    (
                        flat_grad(machine, loss) - flat_grad(machine, machine(data).mean() + log_z)
                    ).norm()
                )
            )
    assert 0.0 < gaps[1] < gaps[0] / 50.0, gaps
    assert not errors or errors[1] < errors[0] / 8.0, errors


def test_mean_field_is_stationary() -> None:
    """The bound on log Z is the largest over all factorised distributions near the one that was
    found."""
    rbm = oracle_rbm()
    bound = float(MeanFieldLikelihood()(rbm, DATA)[1]["log_z_bound"])
    h = states([0.0, 1.0], 3)
    joint = rbm.layers().energy([BITS[:, None].expand(16, 8, 4), h.expand(16, 8, 3)]).detach()
    logits = torch.randn(64, 7, dtype=F64, generator=seeded(0)).requires_grad_()
    optimiser = torch.optim.LBFGS([logits], lr=1.0, max_iter=300, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        p = torch.sigmoid(logits)
        q_v = (p[:, None, :4] ** BITS * (1 - p[:, None, :4]) ** (1 - BITS)).prod(2)
        q_h = (p[:, None, 4:] ** h * (1 - p[:, None, 4:]) ** (1 - h)).prod(2)
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(1)
        return entropy - torch.einsum("cv,ch,vh->c", q_v, q_h, joint)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -value().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    best = float(value().detach().max())
    assert bound == pytest.approx(best, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Centering and sparsity


@pytest.mark.parametrize("make", [oracle_rbm, Deep])
def test_centering_is_a_plain_step_in_centered_coordinates(
    make: Callable[[], LayeredMachine],
) -> None:
    machine = make()
    data = BITS[[3, 9, 14]][:, : machine.layers().sizes[0]]
    check_centering(Centering(), machine, data)


def test_centering_is_the_enhanced_gradient() -> None:
    """From the statistics of Melchior, Fischer and Wiskott (2016): <(v - mu)(h - lambda)> of data
    less that of the model."""
    rbm = oracle_rbm()
    ExactLikelihood()(rbm, DATA)[0].backward()
    centering = Centering()
    centering(rbm, DATA, {})
    with torch.no_grad():
        p = torch.softmax(-rbm_energies(rbm, BITS), 0)
        h_data, h_model = (torch.sigmoid(v @ rbm.weight + rbm.hidden_bias) for v in (DATA, BITS))
        mu, lam = DATA.mean(0), h_data.mean(0)
        torch.testing.assert_close(centering.offsets, [mu, lam])
        d_weight = (DATA - mu).mT @ (h_data - lam) / len(DATA) - (BITS - mu).mT @ (
            p[:, None] * (h_model - lam)
        )
        d_visible = DATA.mean(0) - p @ BITS - d_weight @ lam
        d_hidden = h_data.mean(0) - p @ h_model - d_weight.mT @ mu
    torch.testing.assert_close(
        [q.grad for q in rbm.parameters()], [-d_weight, -d_visible, -d_hidden]
    )


def test_offsets_slide_and_are_kept() -> None:
    rbm, centering = oracle_rbm(), Centering(rate=0.25)
    for data in (DATA, BITS):
        loss, metrics = ContrastiveDivergence()(rbm, data, generator=seeded(0))
        loss.backward()
        centering(rbm, data, metrics)
    torch.testing.assert_close(centering.offsets[0], 0.75 * DATA.mean(0) + 0.25 * BITS.mean(0))
    other = Centering()
    other.load_state_dict(centering.state_dict())
    torch.testing.assert_close(other.offsets, centering.offsets)


def test_sparsity_is_the_written_penalty() -> None:
    rbm = oracle_rbm()
    active = torch.sigmoid(DATA @ rbm.weight + rbm.hidden_bias).mean(0)
    torch.testing.assert_close(Sparsity(0.1, 2.0)(rbm, DATA), 2.0 * ((0.1 - active) ** 2).sum())
    assert float(Sparsity(0.1, 2.0)(Deep(), states([0.0, 1.0], 3)).detach()) > 0.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ContrastiveDivergence(0), "k must be"),
        (lambda: ContrastiveDivergence(kernel=Gibbs), "an instance"),  # type: ignore[arg-type]
        (lambda: PersistentCD(0), "num_chains must be"),
        (lambda: PersistentCD(betas=(0.5, 1.0)), "decrease from 1"),
        (lambda: PersistentCD(betas=(1.0, 0.5))(Spins(), BITS), "got Spins: use ReplayBufferCD"),
        (lambda: ReplayBufferCD()(oracle_rbm(), DATA), "give kernel, or use PersistentCD"),
        (lambda: ContrastiveDivergence()(oracle_rbm(), DATA[:, :3]), "visible units"),
        (lambda: ContrastiveDivergence()(oracle_rbm(), DATA.float()), "visible units"),
        (lambda: ContrastiveDivergence()(oracle_rbm(), DATA[:0]), "n at least 1"),
        (lambda: PersistentCD()(oracle_rbm(), DATA[:0]), "n at least 1"),
        (lambda: ExactLikelihood()(Spins(), BITS), "has none"),
        (lambda: Pseudolikelihood(0), "num_sites must be"),
        (lambda: Pseudolikelihood(5)(oracle_rbm(), DATA), "at most the 4 sites"),
        (lambda: Pseudolikelihood()(Gaussian(torch.zeros(2, dtype=F64)), DATA[:, :2]), "discrete"),
        (lambda: Pseudolikelihood()(oracle_rbm(), 0.5 * DATA), "batch must hold states"),
        (lambda: Pseudolikelihood()(oracle_rbm(), math.nan * DATA), "batch must hold states"),
        (lambda: MeanFieldLikelihood()(Spins(), BITS), "must be a layered machine"),
        (lambda: Centering(2.0), "rate must be"),
        (lambda: Centering()(Spins(), BITS, {}), "must be a layered machine"),
        (lambda: Centering()(gaussian_rbm(), DATA[:, :3], {}), "functions of other parameters"),
        (lambda: Centering()(oracle_rbm(), DATA, {}), "after backward"),
        (lambda: Sparsity(1.5, 1.0), "target must be"),
        (lambda: Sparsity(0.1, 1.0)(Spins(), BITS), "must be a layered machine"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# --------------------------------------------------------------------------------------------------
# Mutants


class FromNoise(ContrastiveDivergence):
    def forward(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        noise = (uniform(batch.shape, generator, batch.dtype, batch.device) < 0.5).to(batch.dtype)
        data, model = (
            super().forward(energy, batch, generator=generator),
            super().forward(energy, noise, generator=generator),
        )
        return energy(batch).mean() + model[0] - energy(noise).mean(), data[1]


class Upside(ContrastiveDivergence):
    def forward(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        loss, metrics = super().forward(energy, batch, generator=generator)
        return -loss, metrics


@pytest.mark.parametrize(
    "mutant", [FromNoise(1), Upside(1), ContrastiveDivergence(2)], ids=["noise", "sign", "k"]
)
def test_mutants_of_cd_are_caught(mutant: nn.Module) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_cd(mutant, 1)


class Overwritten(ReplayBufferCD):
    def forward(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        if self.chains is not None:
            self.chains = batch[: self.num_chains].clone()
        return super().forward(energy, batch, generator=generator)


def test_a_buffer_overwritten_by_data_is_caught() -> None:
    with pytest.raises(AssertionError, match="changed the chains"):
        check_identity_keeps_chains(Overwritten(num_chains=len(DATA), kernel=Identity()))


class Restarted(PersistentCD):
    def forward(
        self, energy: Any, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> Any:
        self.chains = None
        return super().forward(energy, batch, generator=generator)


def test_chains_that_do_not_persist_are_caught() -> None:
    rbm = oracle_rbm(scale=2.0)
    with pytest.raises(AssertionError, match="standard errors"):
        check_pcd(lambda: Restarted(num_chains=100), rbm, DATA, exact_rbm(rbm, DATA))


class Inverted(TemperatureLadder):
    def swaps(self, energies: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return super().swaps(-energies, generator)


class AlwaysSwaps(TemperatureLadder):
    def swaps(self, energies: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return super().swaps(torch.zeros_like(energies), generator)


@pytest.mark.parametrize("mutant", [Inverted, AlwaysSwaps])
def test_wrong_swap_ratios_are_caught(mutant: type[TemperatureLadder]) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        check_swaps(mutant((1.0, 0.6, 0.2, 0.1), 1))
    rbm = oracle_rbm(scale=2.0)

    def make() -> PersistentCD:
        objective = PersistentCD(num_chains=100, betas=(1.0, 0.7, 0.4))
        objective.ladder = mutant((1.0, 0.7, 0.4), 100)
        return objective

    with pytest.raises(AssertionError, match="standard errors"):
        check_pcd(make, rbm, DATA, exact_rbm(rbm, DATA))


class Swapped(Centering):
    """The offsets of the two layers change places in what is taken from the biases."""

    def forward(self, energy: Any, batch: Tensor, metrics: Any) -> None:
        plain = {p: p.grad.clone() for p in energy.parameters()}
        super().forward(energy, batch, metrics)
        for p, gradient in plain.items():
            if p.dim() == 1:
                p.grad = 2.0 * gradient - p.grad


class Uncorrected(Centering):
    """Weights are centered, and the biases left as they were."""

    def forward(self, energy: Any, batch: Tensor, metrics: Any) -> None:
        plain = {p: p.grad.clone() for p in energy.parameters() if p.dim() == 1}
        super().forward(energy, batch, metrics)
        for p, gradient in plain.items():
            p.grad = gradient


@pytest.mark.parametrize("mutant", [Swapped, Uncorrected])
def test_mutants_of_centering_are_caught(mutant: type[Centering]) -> None:
    with pytest.raises(AssertionError):
        check_centering(mutant(), oracle_rbm(), BITS[[3, 9, 14]])


def test_statistics_of_mismatched_layers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The visible units of one chain with the hidden ones of another."""
    right = contrastive_module.contrast

    def wrong(layers: Layers, even: Any, fields: dict[int, Tensor], n: int) -> Any:
        return right(
            layers, even, {k: torch.cat([f[:n], f[n:].roll(1, 0)]) for k, f in fields.items()}, n
        )

    monkeypatch.setattr(contrastive_module, "contrast", wrong)
    with pytest.raises(AssertionError, match="standard errors"):
        check_cd(ContrastiveDivergence(1), 1)


def _half_fields(
    self: BoltzmannMachine, visible: Tensor, max_steps: int = 100, tolerance: float = 1e-6
) -> Tensor:
    means = visible.new_zeros((len(visible), self.num_hidden))
    for _ in range(max_steps):
        means = 0.5 * (
            means
            + torch.tanh(0.5 * self.field(torch.cat([visible, means], 1))[:, self.num_visible :])
        )
    return means


def test_a_mean_field_of_the_wrong_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoltzmannMachine, "mean_field", _half_fields)
    with pytest.raises(AssertionError):
        test_pcd_of_hidden_units_tied_to_each_other("spins")


def test_a_positive_phase_of_units_at_rest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_rest(self: BoltzmannMachine, visible: Tensor) -> Tensor:
        return self(torch.cat([visible, visible.new_zeros((len(visible), self.num_hidden))], 1))

    monkeypatch.setattr(BoltzmannMachine, "variational_free_energy", at_rest)
    with pytest.raises(AssertionError):
        test_pcd_of_hidden_units_tied_to_each_other("bits")
