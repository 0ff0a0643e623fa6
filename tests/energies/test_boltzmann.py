"""Boltzmann machines of every kind against the sum over all of their states, and against the
numbers of a lecture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lib.checks import within_se
from lib.machines import LOG_Z, oracle_rbm
from lib.reseed import problem_generator
from torch import Tensor
from torch.distributions import constraints

from pyroebm import MCMC, Boltzmann, Energy, Gibbs
from pyroebm.core.enumeration import all_bits
from pyroebm.core.supports import same_support
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    DeepBeliefNetwork,
    DeepBoltzmannMachine,
    GaussianRBM,
    Ising,
    Layers,
    TiedRBM,
    compose,
)
from pyroebm.energies.layered import LayeredMachine
from pyroebm.kernels import BlockGibbs
from pyroebm.objectives import Objective
from pyroebm.training import (
    Batches,
    Classifier,
    impute,
    pretrain_belief_network,
    pretrain_boltzmann_machine,
)

F64 = torch.float64


def normal(*shape: int, seed: int, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(*shape, generator=problem_generator(seed), dtype=F64)


def deep(sizes: list[int], visible: str = "bits") -> DeepBoltzmannMachine:
    weights = [normal(a, b, seed=k) for k, (a, b) in enumerate(itertools.pairwise(sizes))]
    biases = [normal(n, seed=10 + k, scale=0.4) for k, n in enumerate(sizes)]
    sigma = normal(sizes[0], seed=20, scale=0.3) if visible == "gaussian" else None
    return DeepBoltzmannMachine(
        sizes, visible=visible, weights=weights, biases=biases, log_sigma=sigma, dtype=F64
    )


def gaussian(convention: str) -> GaussianRBM:
    return GaussianRBM(
        2,
        3,
        convention=convention,
        weight=normal(2, 3, seed=1),
        visible_bias=normal(2, seed=2),
        hidden_bias=normal(3, seed=3),
        log_sigma=normal(2, seed=4, scale=0.3),
        dtype=F64,
    )


def symmetric(n: int, seed: int) -> Tensor:
    w = normal(n, n, seed=seed).triu(1)
    return w + w.mT


#: One line for a machine: every test that takes ``name`` runs on it.
MACHINES: dict[str, Callable[[], LayeredMachine]] = {
    "rbm": oracle_rbm,
    "wide-rbm": lambda: BernoulliRBM(
        3, 5, weight=normal(3, 5, seed=0), hidden_bias=normal(5, seed=1), dtype=F64
    ),
    "grbm-hinton": lambda: gaussian("hinton"),
    "grbm-cho": lambda: gaussian("cho"),
    "dbm-2": lambda: deep([4, 3, 2]),
    "dbm-3": lambda: deep([3, 2, 3, 2]),
    "dbm-gaussian": lambda: deep([2, 3, 2], "gaussian"),
}


def machine_of(name: str) -> LayeredMachine:
    """Without gradients: tests that want them ask for them."""
    return MACHINES[name]().requires_grad_(False)


every_machine = pytest.mark.parametrize("name", MACHINES)


def by_hand(machine: LayeredMachine, x: Tensor) -> float:
    """The energy of one joint state, unit by unit, from the published formulas and not from natural
    parameters."""
    if isinstance(machine, BernoulliRBM):
        weights = [machine.weight]
        biases = [machine.visible_bias, machine.hidden_bias]
        sigma = None
    elif isinstance(machine, GaussianRBM):
        weights, biases = [machine.weight], [machine.visible_bias, machine.hidden_bias]
        sigma = machine.log_sigma.exp()
    elif isinstance(machine, DeepBoltzmannMachine):
        weights, biases = list(machine.weights), list(machine.biases)
        sigma = None if machine.log_sigma is None else machine.log_sigma.exp()
    parts = x.split([len(b) for b in biases])
    total = 0.0
    for layer, (bias, units) in enumerate(zip(biases, parts, strict=True)):
        for i in range(len(units)):
            if layer == 0 and sigma is not None:
                total += float((units[i] - bias[i]) ** 2 / (2 * sigma[i] ** 2))
            else:
                total -= float(bias[i] * units[i])
    power = 2 if getattr(machine, "convention", None) == "cho" else 1
    for layer, weight in enumerate(weights):
        for i, j in itertools.product(*map(range, weight.shape)):
            scale = 1.0 if layer or sigma is None else float(sigma[i]) ** power
            total -= float(parts[layer][i] / scale * weight[i, j] * parts[layer + 1][j])
    return total


@every_machine
@torch.no_grad()
def test_joint_energies_are_those_of_the_formula(name: str) -> None:
    machine = machine_of(name)
    x = machine.joint().initial(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        machine.joint()(x), torch.tensor([by_hand(machine, row) for row in x], dtype=F64)
    )


@every_machine
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_conditionals_are_those_of_the_joint_energy(name: str, beta: float) -> None:
    """Also at another temperature: the tempered machine has natural parameters times beta."""
    joint = machine_of(name).joint()
    layers = Layers(
        *(tuple(beta * t for t in ts) for ts in joint.layers()[:2]),
        *_tempered_rest(joint.layers(), beta),
    )
    # in 3 rows two bits are 0 for one seed of 64
    x = joint.initial(16, torch.Generator().manual_seed(1))
    for index, block in enumerate(joint.blocks.values()):
        size = block.stop - block.start
        conditional = layers.distribution(index, layers.field(index, layers.split(x)))
        if beta == 1.0:
            conditional = joint.conditional(list(joint.blocks)[index], x)
        values = normal(8, size, seed=5) if layers.is_gaussian(index) else all_bits(size, dtype=F64)
        filled = x.unsqueeze(1).repeat(1, len(values), 1)
        filled[:, :, block] = values
        energies, log_p = (
            beta * joint(filled),
            conditional.expand((len(values), len(x))).log_prob(values.unsqueeze(1)).mT,
        )
        if not layers.is_gaussian(index):
            torch.testing.assert_close(log_p, torch.log_softmax(-energies, 1))
        torch.testing.assert_close(log_p - log_p[:, :1], energies[:, :1] - energies)


def _tempered_rest(layers: Layers, beta: float) -> tuple[Tensor | None, Tensor | float]:
    return (None if layers.precision is None else beta * layers.precision), beta * layers.offset


@every_machine
def test_log_z_is_the_sum_over_all_states(name: str) -> None:
    machine = machine_of(name)
    layers = machine.joint().layers()
    hidden = all_bits(sum(layers.sizes[1:]), dtype=F64)
    if layers.precision is None:
        visible = all_bits(layers.sizes[0], dtype=F64)
        weight = 0.0
    # a grid far beyond the means, whose trapezoids are exact to rounding for normal densities
    else:
        axis = torch.linspace(-14.0, 14.0, 281, dtype=F64)
        visible, weight = (
            torch.cartesian_prod(*[axis] * layers.sizes[0]),
            layers.sizes[0] * math.log(0.1),
        )
    states = torch.cat(
        [visible.repeat_interleave(len(hidden), 0), hidden.repeat(len(visible), 1)], 1
    )
    truth = float(torch.logsumexp(-machine.joint()(states), 0)) + weight
    assert machine.log_z == pytest.approx(truth, abs=1e-9)
    assert machine.joint().log_z == pytest.approx(truth, abs=1e-9)
    assert float(machine.log_partition().detach()) == pytest.approx(truth, abs=1e-9)


@every_machine
def test_log_z_differentiates_to_expected_statistics(name: str) -> None:
    """d log Z / d b = E[x], by exact draws."""
    machine = MACHINES[name]()
    layers = machine.joint().layers()
    last = layers.biases[-1]
    (slope,) = torch.autograd.grad(layers.log_partition(), last)
    draws = machine.draw_layers(20_000, torch.Generator().manual_seed(2))[-1]
    within_se(draws.mean(0), slope, draws.std(0) / math.sqrt(len(draws)))


@every_machine
def test_block_gibbs_keeps_exact_draws(name: str) -> None:
    joint = machine_of(name).joint()
    start = joint.sample(4_000, torch.Generator().manual_seed(3))
    kernel, generator = BlockGibbs(), torch.Generator().manual_seed(4)
    state = kernel.init(joint, start)
    for _ in range(3):
        state, _ = kernel.step(joint, state, generator)
    for x, y in (
        (start, state.x),
        (start**2, state.x**2),
        (start[:, :1] * start, state.x[:, :1] * state.x),
    ):
        spread = (x.var(0) + y.var(0)).clamp(min=1e-12)
        within_se(y.mean(0), x.mean(0), (spread / len(x)).sqrt())


@every_machine
def test_free_energies_sum_the_other_side_out(name: str) -> None:
    layers = machine_of(name).joint().layers()
    even, odd = layers.sides()
    bits = [side for side in (even, odd) if layers.precision is None or 0 not in side]
    for side in bits:
        rest = [layer for layer in range(len(layers.sizes)) if layer not in side]
        if any(layers.is_gaussian(layer) for layer in rest):
            continue
        kept = layers.place(all_bits(sum(layers.sizes[k] for k in side), dtype=F64), side)
        others = layers.place(all_bits(sum(layers.sizes[k] for k in rest), dtype=F64), rest)
        whole = [
            (mine.unsqueeze(1) if mine is not None else other.unsqueeze(0))
            for mine, other in zip(kept, others, strict=True)
        ]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in whole))
        energies = layers.energy([part.expand(*shape, -1) for part in whole])
        torch.testing.assert_close(layers.free_energy(kept), -torch.logsumexp(-energies, 1))


def test_draws_of_bits_are_bits_and_of_nan_are_nan() -> None:
    layers, field = (
        oracle_rbm().layers(),
        torch.tensor([-math.inf, -1.0, math.nan, math.inf], dtype=F64).expand(20_000, 4),
    )
    drawn = layers.draw(0, field, torch.Generator().manual_seed(0))
    assert not bool(torch.signbit(drawn[:, :2]).any())
    assert bool((drawn[:, 0] == 0).all())
    assert bool((drawn[:, 3] == 1).all())
    assert bool(drawn[:, 2].isnan().all())
    assert set(drawn[:, 1].tolist()) == {0.0, 1.0}
    within_se(drawn[:, 1].mean(), 1 / (1 + math.e), drawn[:, 1].std() / math.sqrt(20_000))


def test_mixed_layers_are_the_geometric_path() -> None:
    a, b = gaussian("hinton").layers(), gaussian("cho").layers()
    x = gaussian("cho").joint().initial(5, torch.Generator().manual_seed(0))
    mixed = a.mix(b, 0.3)
    torch.testing.assert_close(
        mixed.energy(mixed.split(x)), 0.7 * a.energy(a.split(x)) + 0.3 * b.energy(b.split(x))
    )


def test_small_rbm_of_the_oracles() -> None:
    rbm = oracle_rbm().requires_grad_(False)
    assert rbm.log_z == pytest.approx(LOG_Z, abs=1e-11)
    state = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    assert float(rbm.log_likelihood(state)) == pytest.approx(-3.044979315380, abs=1e-11)
    states = all_bits(4, dtype=F64)
    means = (rbm.log_likelihood(states).exp().unsqueeze(1) * states).sum(0)
    torch.testing.assert_close(
        means,
        torch.tensor([0.860216, 0.151057, 0.602665, 0.127165], dtype=F64),
        atol=5e-7,
        rtol=0.0,
    )
    assert float(Boltzmann(rbm, rbm.log_partition()).log_prob(state)) == pytest.approx(
        -3.044979315380, abs=1e-11
    )


def lecture(units: str) -> BoltzmannMachine:
    w = torch.tensor([[0.0, -1.0, -1.0], [-1.0, 0.0, 2.0], [-1.0, 2.0, 0.0]], dtype=F64)
    return BoltzmannMachine(
        3, units=units, weight=w, bias=torch.tensor([0.0, 1.0, 0.0], dtype=F64), dtype=F64
    )


def test_three_spins_of_the_lecture() -> None:
    machine = lecture("spins").requires_grad_(False)
    states = 2.0 * all_bits(3, dtype=F64) - 1.0
    assert math.exp(machine.log_z) == pytest.approx(172.42019, abs=5e-6)
    p = (-machine(states) - machine.log_z).exp()
    assert float(p[states[:, 0] == 1].sum()) == pytest.approx(0.134680, abs=5e-7)
    given = states[:, 1] == -1
    assert float(p[given & (states[:, 0] == 1)].sum() / p[given].sum()) == pytest.approx(
        0.979679, abs=5e-7
    )
    means = (p.unsqueeze(1) * states).sum(0)
    torch.testing.assert_close(
        means, torch.tensor([-0.730641, 0.761594, 0.754214], dtype=F64), atol=1e-6, rtol=0.0
    )
    assert math.exp(lecture("bits").log_z) == pytest.approx(29.88998, abs=5e-6)


@pytest.mark.parametrize("units", ["bits", "spins"])
def test_single_sites_are_drawn_from_the_conditionals_of_all_states(units: str) -> None:
    machine = BoltzmannMachine(
        3, 2, units=units, weight=symmetric(5, 6), bias=normal(5, seed=7), dtype=F64
    )
    machine.requires_grad_(False)
    low, x = (
        (0.0 if units == "bits" else -1.0),
        machine.initial(6, torch.Generator().manual_seed(0)),
    )
    for site in range(5):
        pair = x.unsqueeze(1).repeat(1, 2, 1)
        pair[:, 0, site], pair[:, 1, site] = low, 1.0
        truth = torch.log_softmax(-machine(pair), 1)
        logits = machine.site_logits(x, torch.full((6,), site))
        torch.testing.assert_close(torch.log_softmax(logits, 1), truth)


@pytest.mark.parametrize("units", ["bits", "spins"])
def test_hidden_units_are_summed_out_exactly(units: str) -> None:
    machine = BoltzmannMachine(
        3, 2, units=units, weight=symmetric(5, 6), bias=normal(5, seed=7), dtype=F64
    )
    machine.requires_grad_(False)
    values = (lambda bits: bits) if units == "bits" else (lambda bits: 2.0 * bits - 1.0)
    every = values(all_bits(5, dtype=F64))
    p = torch.softmax(-machine(every), 0).reshape(8, 4).sum(1)
    visible = values(all_bits(3, dtype=F64))
    torch.testing.assert_close(machine.log_likelihood(visible).exp(), p)
    assert machine.marginal().log_z == pytest.approx(
        float(torch.logsumexp(-machine(every), 0)), abs=1e-12
    )
    draws = machine.marginal().sample(20_000, torch.Generator().manual_seed(0))
    within_se(
        draws.mean(0), (p.unsqueeze(1) * visible).sum(0), draws.std(0) / math.sqrt(len(draws))
    )


def test_the_gradient_of_a_machine_stays_symmetric() -> None:
    machine = BoltzmannMachine(4, 2, units="spins", weight=symmetric(6, 8), dtype=F64)
    (slope,) = torch.autograd.grad(machine.log_partition(), machine.weight)
    torch.testing.assert_close(slope, slope.mT)
    assert not bool(slope.diagonal().any())


@pytest.mark.parametrize("name", ["dbm-2", "dbm-3", "dbm-gaussian"])
def test_bounds_of_a_deep_machine(name: str) -> None:
    machine = machine_of(name)
    assert isinstance(machine, DeepBoltzmannMachine)
    layers = machine.layers()
    visible = machine.sample(6, torch.Generator().manual_seed(5))[:, : layers.sizes[0]]
    hidden = all_bits(sum(layers.sizes[1:]), dtype=F64)
    states = torch.cat(
        [visible.repeat_interleave(len(hidden), 0), hidden.repeat(len(visible), 1)], 1
    )
    truth = torch.logsumexp(-machine(states).reshape(6, -1), 1) - machine.log_partition()
    torch.testing.assert_close(machine.log_likelihood(visible), truth)
    bound = machine.variational_bound(visible)
    assert bool((bound < truth + 1e-9).all())
    assert bool((bound > truth - 1.0).all())
    # a fixed point of mean field is a stationary point of the bound: no other factorial
    # distribution near it is better
    means = machine.mean_field(visible, tolerance=1e-12)
    for layer in range(1, len(layers.sizes)):
        field = layers.field(layer, [visible, *means])
        torch.testing.assert_close(means[layer - 1], torch.sigmoid(field), atol=1e-9, rtol=0.0)


def test_mean_field_updates_in_turn_where_parallel_ones_oscillate() -> None:
    """Two layers that inhibit each other strongly: parallel updates flip between two states for
    ever."""
    machine = DeepBoltzmannMachine(
        [1, 3, 3],
        weights=[torch.zeros(1, 3), torch.full((3, 3), -8.0)],
        biases=[torch.zeros(1), torch.full((3,), 12.0), torch.full((3,), 12.0)],
        dtype=F64,
    ).requires_grad_(False)
    v, layers = torch.ones(1, 1, dtype=F64), machine.layers()
    means = machine.mean_field(v, max_steps=1000, tolerance=1e-10)
    parallel = [torch.full((1, 3), 0.6, dtype=F64)] * 2
    for _ in range(1000):
        parallel = [torch.sigmoid(layers.field(k, [v, *parallel])) for k in (1, 2)]
    again = [torch.sigmoid(layers.field(k, [v, *parallel])) for k in (1, 2)]
    assert float((again[0] - parallel[0]).abs().max()) > 0.5
    torch.testing.assert_close(
        means[0], torch.sigmoid(layers.field(1, [v, *means])), atol=1e-8, rtol=0.0
    )


def network(sizes: list[int], seed: int = 0) -> DeepBeliefNetwork:
    net = DeepBeliefNetwork(sizes, dtype=F64)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(normal(*p.shape, seed=seed + k))
    return net.requires_grad_(False)


@pytest.mark.parametrize("sizes", [[4, 3], [4, 3, 2], [3, 4, 2, 3]])
def test_belief_network_against_all_states(sizes: list[int]) -> None:
    net = network(sizes)
    joint, visible = net.joint(), all_bits(sizes[0], dtype=F64)
    energies = joint(all_bits(sum(sizes), dtype=F64)).reshape(len(visible), -1)
    truth = torch.logsumexp(-energies, 1) - torch.logsumexp(-energies.flatten(), 0)
    torch.testing.assert_close(net.log_likelihood(visible), truth)
    assert joint.log_z == pytest.approx(float(torch.logsumexp(-energies.flatten(), 0)), abs=1e-10)
    draws = net.sample(20_000, torch.Generator().manual_seed(1))
    within_se(
        draws.mean(0),
        (truth.exp().unsqueeze(1) * visible).sum(0),
        draws.std(0) / math.sqrt(len(draws)),
    )
    whole, p = (
        joint.sample(20_000, torch.Generator().manual_seed(3)),
        torch.softmax(-energies.flatten(), 0),
    )
    # of every pair of units
    moments = torch.einsum("s,si,sj->ij", p, *[all_bits(sum(sizes), dtype=F64)] * 2)
    within_se(
        whole.mT @ whole / len(whole), moments, (moments * (1.0 - moments) / len(whole)).sqrt()
    )
    if len(sizes) > 2:
        with pytest.raises(ValueError, match=r"event_shape \(\d,\)"):
            net.variational_bound(torch.zeros(2, 7, dtype=F64))
        with pytest.raises(ValueError, match="num_samples"):
            net.importance_log_likelihood(visible, num_samples=0)
        generator = torch.Generator().manual_seed(2)
        weights = net.log_weights(visible, 20_000, generator) - net.top.log_partition()
        ratio = (weights - truth).exp()  # p(v, h) / q(h | v) is unbiased for p(v)
        within_se(ratio.mean(0), torch.ones(len(visible)), ratio.std(0) / math.sqrt(len(ratio)))
        bound = net.variational_bound(visible, num_samples=20_000, generator=generator)
        better = net.importance_log_likelihood(visible, num_samples=2_000, generator=generator)
        assert bool((bound < truth).all())
        assert float((truth - better).abs().max()) < float((truth - bound).min())


def test_a_tied_start_leaves_the_likelihood() -> None:
    net, visible = network([4, 3]), all_bits(4, dtype=F64)
    before = net.log_likelihood(visible)
    net.grow(4)
    torch.testing.assert_close(net.log_likelihood(visible), before)
    net.rbms[1].weight.data += 0.1  # and a start that is not tied does not
    assert float((net.log_likelihood(visible) - before).detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match="num_hidden must be 3"):
        net.grow(4)
    with pytest.raises(NotImplementedError, match="joint"):
        net(visible)


def test_copies_of_layers_are_an_rbm_of_tied_weights() -> None:
    rbm = oracle_rbm().requires_grad_(False)
    v, h = all_bits(4, dtype=F64)[[3, 9]], all_bits(3, dtype=F64)[[1, 6]]
    for copies in ((1, 1), (2, 1), (1, 2), (2, 2)):
        tied = TiedRBM(rbm, copies)
        x = torch.cat([v] * copies[0] + [h] * copies[1], 1)
        torch.testing.assert_close(
            tied.joint()(x), copies[0] * copies[1] * rbm.joint()(torch.cat([v, h], 1))
        )
        torch.testing.assert_close(tied.repeat(v), x[:, : 4 * copies[0]])
    assert TiedRBM(rbm, (2, 1)).has_exact_draws
    assert TiedRBM(rbm, (2, 1)).sample(5).shape == (5, 8)


@pytest.mark.parametrize("first", [oracle_rbm, lambda: gaussian("hinton")])
def test_a_composed_machine_feels_half_of_each_neighbour(first: Callable[[], Any]) -> None:
    bottom = first().requires_grad_(False)
    top = BernoulliRBM(
        3, 2, weight=normal(3, 2, seed=8), visible_bias=normal(3, seed=9), dtype=F64
    ).requires_grad_(False)
    machine = compose([bottom, top]).requires_grad_(False)
    x = machine.initial(4, torch.Generator().manual_seed(0))
    v, h1, h2 = machine.layers().split(x)
    below, above = TiedRBM(bottom, (2, 1)), TiedRBM(top, (1, 2))
    from_below = below.layers().field(1, [below.repeat(v), None])
    from_above = above.layers().field(0, [None, torch.cat([h2, h2], 1)])
    torch.testing.assert_close(
        machine.layers().field(1, [v, h1, h2]), 0.5 * (from_below + from_above)
    )
    torch.testing.assert_close(
        machine.layers().field(0, [v, h1, h2]), below.layers().field(0, [None, h1])[:, : v.shape[1]]
    )
    with pytest.raises(ValueError, match="2 visible units"):
        compose([bottom, BernoulliRBM(2, 2)])


def test_pretraining_feeds_each_layer_what_those_below_make_of_the_data() -> None:
    """A plain gradient step of rate 1 leads to known parameters: the next layer's inputs are the
    means of the ones below, in both kinds of stack."""
    data, seen = all_bits(4, dtype=F64), list[Tensor]()
    back = Batches(torch.arange(len(data)), len(data)).numbers(0).argsort()

    class Known(Objective):
        def forward(
            self, machine: LayeredMachine, batch: Tensor, *, generator: Any = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(batch[back])
            squares = [
                (p - normal(*p.shape, seed=len(seen) + k)).square().sum()
                for k, p in enumerate(machine.parameters())
            ]
            return 0.5 * torch.stack(squares).sum(), {}

    options: dict[str, Any] = {"num_steps": 1, "optimizer": "sgd", "lr": 1.0}
    net = pretrain_belief_network([4, 3, 4, 2], data, Known(), **options).requires_grad_(False)
    one = torch.sigmoid(data @ net.rbm(0).weight + net.rbm(0).hidden_bias)
    two = torch.sigmoid(one @ net.rbm(1).weight + net.rbm(1).hidden_bias)
    for found, truth in zip(seen, (data, one, two), strict=True):
        torch.testing.assert_close(found, truth)

    seen.clear()
    machine = pretrain_boltzmann_machine([4, 3, 2, 3], data, Known(), **options)
    machine.requires_grad_(False)
    # the hidden bias is the third parameter of the first RBM
    w, first_bias = machine.weights[0], normal(3, seed=3)
    first = torch.sigmoid(2.0 * (data @ w + first_bias))
    torch.testing.assert_close(seen[0], torch.cat([data, data], 1))
    torch.testing.assert_close(seen[1], torch.cat([first, first], 1))
    second = torch.sigmoid(2.0 * (first @ machine.weights[1] + normal(2, seed=4)))
    torch.testing.assert_close(seen[2], second)


def test_supports_of_layers_are_compared_part_by_part() -> None:
    a, b = gaussian("cho").joint().support, gaussian("hinton").joint().support
    assert same_support(a, b)
    assert not same_support(
        a, constraints.cat([constraints.boolean, constraints.real], dim=-1, lengths=[2, 3])
    )
    assert not same_support(
        a, constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[3, 2])
    )


@pytest.mark.parametrize("sizes", [[4, 3, 2], [3, 4, 2, 3]])
def test_a_classifier_starts_as_its_machine(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last hidden layer is that of mean field, or of the recognition pass."""
    monkeypatch.setattr("pyroebm.training.finetuning.NUM_SWEEPS", 2000)
    machine = deep(sizes).requires_grad_(False)
    net = network(sizes)
    v = all_bits(sizes[0], dtype=F64)
    found: list[Tensor] = []
    for model in (machine, net):
        classifier = Classifier(model, 3)
        classifier.readout.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].detach())
        )
        assert classifier(v).shape == (len(v), 3)
        assert 0.0 <= classifier.error(v, torch.zeros(len(v), dtype=torch.long)) <= 1.0
    torch.testing.assert_close(
        found[0], machine.mean_field(v, 2000, 1e-12)[-1], atol=1e-5, rtol=0.0
    )
    rbm = net.top
    torch.testing.assert_close(
        found[2], torch.sigmoid(net.means_up(v) @ rbm.weight + rbm.hidden_bias)
    )
    with pytest.raises(ValueError, match="labels must have shape"):
        classifier.error(v, torch.zeros(len(v), 1, dtype=torch.long))
    with pytest.raises(ValueError, match="num_classes=1"):
        Classifier(net, 1)


#: What can be completed, and the number of its visible units.
COMPLETED: dict[str, Callable[[], Energy | DeepBeliefNetwork]] = {
    "bm": lambda: BoltzmannMachine(4, 2, weight=symmetric(6, 6), bias=normal(6, seed=7), dtype=F64),
    "rbm": oracle_rbm,
    "dbm": lambda: deep([4, 3, 2]),
    "dbn": lambda: network([4, 3, 2]),
    "ising": lambda: Ising((2, 2), 0.7, normal(2, 2, seed=1), periodic=False, dtype=F64),
}


@pytest.mark.parametrize("name", COMPLETED)
def test_completions_have_the_conditional_distribution(name: str) -> None:
    model = COMPLETED[name]().requires_grad_(False)
    low = -1.0 if name == "ising" else 0.0
    values = all_bits(4, dtype=F64) * (1.0 - low) + low
    joint = model.joint() if hasattr(model, "joint") else model
    hidden = all_bits(joint.event_shape.numel() - 4, dtype=F64)
    states = torch.cat([values.repeat_interleave(len(hidden), 0), hidden.repeat(16, 1)], 1)
    p = (
        torch.softmax(-joint(states.reshape(-1, *joint.event_shape)), 0)
        .reshape(16, -1)
        .sum(1)
        .detach()
    )
    known, n = torch.tensor([True, False, True, False]), 3_000
    observed = torch.tensor(
        [[1.0, low, low, low], [low, 1.0, 1.0, 1.0]], dtype=F64
    ).repeat_interleave(n, 0)
    shape = (-1, 2, 2) if name == "ising" else (-1, 4)
    done = impute(
        model, observed.reshape(shape), known.reshape(shape[1:]), num_sweeps=30, progress=False
    ).reshape(-1, 4)
    torch.testing.assert_close(done[:, known], observed[:, known])
    for rows, first in ((done[:n], (1.0, low)), (done[n:], (low, 1.0))):
        fits = (values[:, 0] == first[0]) & (values[:, 2] == first[1])
        truth = (p[fits].unsqueeze(1) * values[fits]).sum(0)[~known] / p[fits].sum()
        within_se(rows[:, ~known].mean(0), truth, rows[:, ~known].std(0) / math.sqrt(n))


@pytest.mark.parametrize("name", COMPLETED)
def test_completions_of_misshapen_examples_are_refused(name: str) -> None:
    """A machine whose events have more units than are seen must not take some hidden ones for
    visible, or the other way round."""
    model, shape = COMPLETED[name]().requires_grad_(False), (2, 2) if name == "ising" else (4,)
    for wrong in ((2, *shape[1:], 3), (0, *shape), (4,), ()):
        observed = torch.zeros(wrong, dtype=F64)
        with pytest.raises(ValueError, match="observed must have shape"):
            impute(
                model, observed, torch.zeros(wrong, dtype=torch.bool), num_sweeps=2, progress=False
            )
    given = torch.full((2, *shape), math.nan, dtype=F64)  # of what is not known anything will do
    done = impute(model, given, torch.zeros(shape, dtype=torch.bool), num_sweeps=2, progress=False)
    assert bool(done.isfinite().all())


def test_a_gaussian_machine_is_completed_too() -> None:
    """One coordinate of a mixture of normals given the other: its mean by quadrature."""
    rbm, n = gaussian("cho").requires_grad_(False), 4_000
    observed = torch.tensor([[0.8, 0.0]], dtype=F64).repeat(n, 1)
    done = impute(rbm, observed, torch.tensor([True, False]), num_sweeps=40, progress=False)
    axis = torch.linspace(-12.0, 12.0, 4001, dtype=F64)
    p = torch.softmax(-rbm(torch.stack([torch.full_like(axis, 0.8), axis], 1)), 0).detach()
    within_se(done[:, 1].mean(), (p * axis).sum(), done[:, 1].std() / math.sqrt(n))
    # the same from the marginal energy, by NUTS on clamped real numbers
    few = impute(
        _Plain(rbm), observed[:400], torch.tensor([True, False]), num_sweeps=150, progress=False
    )
    within_se(few[:, 1].mean(), (p * axis).sum(), few[:, 1].std() / math.sqrt(400))


class _Plain(Energy):
    """An energy without layers."""

    def __init__(self, rbm: GaussianRBM) -> None:
        super().__init__((2,), constraints.real)
        self.rbm = rbm

    def forward(self, x: Tensor) -> Tensor:
        return self.rbm(x)


def test_machines_are_sampled_like_any_energy() -> None:
    rbm = oracle_rbm().requires_grad_(False)
    truth = (
        rbm.log_likelihood(all_bits(4, dtype=F64)).exp().unsqueeze(1) * all_bits(4, dtype=F64)
    ).sum(0)
    for energy, kernel in ((rbm, Gibbs()), (rbm.joint(), BlockGibbs())):
        mcmc = MCMC(kernel, num_samples=50, warmup_steps=20, num_chains=200, seed=1, progress=False)
        mcmc.run(energy)
        means = mcmc.get_samples(group_by_chain=True)["x"][..., :4].mean(1)
        within_se(means.mean(0), truth, means.std(0) / math.sqrt(200))


def test_visible_parameters_fit_the_data() -> None:
    data = (
        torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
        < torch.tensor([0.1, 0.5, 0.9, 0.0])
    ).to(F64)
    rbm = BernoulliRBM(4, 2, dtype=F64)
    rbm.fit_visible(data)
    torch.testing.assert_close(torch.sigmoid(rbm.visible_bias), (data.sum(0) + 1) / 502)
    grbm, points = GaussianRBM(2, 1, dtype=F64), normal(300, 2, seed=1)
    grbm.fit_visible(points)
    torch.testing.assert_close(grbm.log_sigma.exp(), points.std(0))
    with pytest.raises(ValueError, match=r"columns \[1\]"):
        grbm.fit_visible(torch.stack([points[:, 0], torch.ones(300)], 1))


def _field_from_below_only(self: Layers, layer: int, x: list[Tensor]) -> Tensor:
    return self.biases[layer] + (
        x[layer - 1] @ self.weights[layer - 1] if layer else x[1] @ self.weights[0].mT
    )


def _cut_softplus(self: Layers, layer: int, field: Tensor) -> Tensor:
    return torch.nn.functional.softplus(field).clamp(max=0.7).sum(-1)


def _gaussian_without_its_constant(self: Layers, layer: int, field: Tensor) -> Tensor:
    if self.is_gaussian(layer):
        return 0.5 * (field**2 / self.precision).sum(-1)
    return torch.nn.functional.softplus(field).sum(-1)


def _noise_of_unit_scale(
    self: Layers, layer: int, field: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    if self.is_gaussian(layer):
        return self.mean(layer, field) + torch.randn(field.shape, generator=generator, dtype=F64)
    return (torch.rand(field.shape, generator=generator, dtype=F64) < torch.sigmoid(field)).to(F64)


#: What breaks, how, and the tests that must see it.
MUTANTS: dict[str, tuple[str, Callable[..., Tensor], Callable[[str], None], str]] = {
    "a middle layer feels one neighbour": (
        "field",
        _field_from_below_only,
        lambda name: test_conditionals_are_those_of_the_joint_energy(name, 1.0),
        "dbm-2",
    ),
    "softplus is cut": (
        "log_normalizer",
        _cut_softplus,
        test_free_energies_sum_the_other_side_out,
        "rbm",
    ),
    "2 pi is forgotten": (
        "log_normalizer",
        _gaussian_without_its_constant,
        test_log_z_is_the_sum_over_all_states,
        "grbm-cho",
    ),
    "noise of the wrong scale": (
        "draw",
        _noise_of_unit_scale,
        test_block_gibbs_keeps_exact_draws,
        "grbm-cho",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_layers_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, broken, test, name = MUTANTS[mutant]
    test(name)
    monkeypatch.setattr(Layers, method, broken)
    with pytest.raises(AssertionError):
        test(name)


def test_a_spin_that_forgets_its_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: BoltzmannMachine, x: Tensor, site: Tensor) -> Tensor:
        field = (x * self.weight[site]).sum(-1) + self.bias[site]
        return torch.stack([torch.zeros_like(field), field], 1)

    monkeypatch.setattr(BoltzmannMachine, "site_logits", broken)
    with pytest.raises(AssertionError):
        test_single_sites_are_drawn_from_the_conditionals_of_all_states("spins")


def test_bad_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden=0"):
        BernoulliRBM(4, 0)
    with pytest.raises(ValueError, match=r"weight must be finite and have shape \(4, 3\)"):
        BernoulliRBM(4, 3, weight=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="weight must be finite"):
        BernoulliRBM(1, 1, weight=torch.tensor([[math.nan]]))
    for data in (
        torch.full((3, 4), math.nan),
        torch.full((3, 4), 2.0),
        torch.zeros(0, 4),
        torch.zeros(3, 5),
    ):
        with pytest.raises(ValueError, match="data must"):
            BernoulliRBM(4, 3).fit_visible(data)
    with pytest.raises(ValueError, match="n at least 2"):
        GaussianRBM(4, 3).fit_visible(torch.zeros(1, 4))
    assert DeepBoltzmannMachine(list(np.array([4, 3, 2]))).event_shape == (9,)
    with pytest.raises(ValueError, match="convention='other'"):
        GaussianRBM(2, 2, convention="other")
    with pytest.raises(ValueError, match="symmetric"):
        BoltzmannMachine(2, weight=torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    with pytest.raises(ValueError, match="units='ternary'"):
        BoltzmannMachine(2, units="ternary")
    with pytest.raises(ValueError, match=r"2\^13"):
        BoltzmannMachine(2, 13).marginal()
    with pytest.raises(ValueError, match="three layers"):
        DeepBoltzmannMachine([4, 2])
    with pytest.raises(ValueError, match="no closed form"):
        deep([4, 3, 2]).marginal()
    with pytest.raises(ValueError, match=r"2\^30 states"):
        BernoulliRBM(40, 30).log_partition()
    with pytest.raises(NotImplementedError, match="BlockGibbs"):
        BernoulliRBM(40, 30).sample(1)
    assert BernoulliRBM(40, 30).log_z is None
    with pytest.raises(ValueError, match="known must be boolean"):
        impute(oracle_rbm(), torch.zeros(2, 4, dtype=F64), torch.zeros(4))
    with pytest.raises(ValueError, match="must lie in the support"):
        impute(oracle_rbm(), torch.full((2, 4), 0.5, dtype=F64), torch.ones(4, dtype=torch.bool))
