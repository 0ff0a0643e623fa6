"""Energies made of networks: one table, what each line inherits, and what is warned of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.seeds import seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import MCMC, NUTS
from pyroebm.core import spin, value_and_grad
from pyroebm.energies import ConvEnergy, MLPEnergy, NeuralEnergy
from pyroebm.nn import ACTIVATIONS, convolutions, mlp
from pyroebm.partition import quadrature

pytestmark = pytest.mark.usefixtures("float64")


def net_of(*widths: int) -> nn.Sequential:
    return mlp(widths[0], widths[-1], widths[1:-1], zero_last=False, generator=seeded())


#: One line for each energy; a seed gives its weights.
NEURAL: dict[str, Callable[[int], NeuralEnergy]] = {
    "scalar": lambda seed: MLPEnergy((), (8, 8), scale=2.0, generator=seeded(seed)),
    "flat": lambda seed: MLPEnergy(
        (3,), (8, 8), scale=2.0, center=torch.arange(3.0), generator=seeded(seed)
    ),
    "tanh": lambda seed: MLPEnergy(
        (3,), (8,), activation="tanh", scale=torch.tensor([1.0, 2.0, 3.0]), generator=seeded(seed)
    ),
    "image": lambda seed: MLPEnergy((2, 3, 4), (8,), scale=2.0, generator=seeded(seed)),
    "convolutional": lambda seed: ConvEnergy((2, 5, 4), (4, 6), scale=2.0, generator=seeded(seed)),
    "bounded": lambda seed: MLPEnergy(
        (3,), (8,), support=constraints.interval(-1.0, 1.0), scale=None, generator=seeded(seed)
    ),
    "spins": lambda seed: MLPEnergy((3,), (8,), support=spin, scale=None, generator=seeded(seed)),
    "spectral": lambda seed: MLPEnergy(
        (3,), (8, 8), spectral_norm=True, scale=2.0, generator=seeded(seed)
    ),
    "given": lambda seed: NeuralEnergy(net_of(3, 8, 1), (3,), scale=2.0),
}


def trained(name: str, seed: int = 0) -> NeuralEnergy:
    """With a last layer that is not zero."""
    energy = NEURAL[name](seed).eval()
    with torch.no_grad():
        last = [m for m in energy.net.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.normal_(generator=seeded(seed + 1))
    return energy


@pytest.mark.parametrize("name", NEURAL)
def test_shapes_types_and_independent_rows(name: str) -> None:
    energy = trained(name)
    x = energy.initial(6, seeded(2))
    values = energy(x)
    assert values.shape == (6,)
    assert torch.equal(energy(x.reshape(2, 3, *energy.event_shape)), values.reshape(2, 3))
    assert energy(x[0]).shape == ()
    torch.testing.assert_close(energy(x[:1]), values[:1])
    single = copy.deepcopy(energy).float()
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), values, rtol=1e-5, atol=1e-5)
    hurt = x.clone()
    hurt[2] = torch.nan
    seen = energy(hurt)
    assert seen[2].isnan()
    torch.testing.assert_close(seen[[0, 1, 3, 4, 5]], values[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("name", [name for name in NEURAL if name != "spins"])
def test_gradients_in_x_are_those_of_differences(name: str) -> None:
    energy, step = trained(name), 1e-6
    x = 0.3 * energy.initial(4, seeded(2))
    direction = torch.randn(x.shape, generator=seeded(3))
    _, grad = value_and_grad(energy, x)
    slope = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    torch.testing.assert_close(
        (grad * direction).flatten(1).sum(1) if x.dim() > 1 else grad * direction,
        slope.detach(),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", [name for name in NEURAL if name != "given"])
def test_weights_come_from_the_generator_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    one = NEURAL[name](0)
    two = NEURAL[name](0)
    other = NEURAL[name](1)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(
        one.state_dict().items(),
        two.state_dict().values(),
        other.state_dict().values(),
        strict=True,
    )
    different = False
    for (key, a), b, c in pairs:
        assert torch.equal(a, b), key
        different |= not torch.equal(a, c)
    assert different


@pytest.mark.parametrize("name", NEURAL)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    energy, other = trained(name), NEURAL[name](5).eval()
    save_file(energy.state_dict(), tmp_path / "energy.safetensors")
    other.load_state_dict(load_file(tmp_path / "energy.safetensors"))
    x = energy.initial(4, seeded(2))
    torch.testing.assert_close(other(x), energy(x), rtol=0, atol=0)


def test_a_fresh_energy_is_its_envelope() -> None:
    energy = MLPEnergy((2,), scale=torch.tensor([1.0, 3.0]), center=torch.tensor([1.0, -2.0]))
    x = torch.randn(50, 2, generator=seeded())
    normal = torch.distributions.Normal(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0]))
    log_z = math.log(2 * math.pi * 3.0)
    torch.testing.assert_close(-energy(x).detach() - log_z, normal.log_prob(x).sum(1))


def test_an_envelope_makes_it_normalisable() -> None:
    """The network falls without end to one side; the integral is that of a normal distribution
    about a shifted center."""
    energy = MLPEnergy((), (1,), activation="softplus", scale=2.0)
    first, _, last = energy.net[1:]
    with torch.no_grad():
        for layer, weight in ((first, 1.0), (last, -3.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    # softplus(x) = x + log(1 + exp(-x)), so exp(-E) = (1 + e^x)^3 exp(-x^2 / 8): four normal
    # integrals
    exact = math.log(
        sum(math.comb(3, k) * math.exp(2.0 * k**2) for k in range(4)) * math.sqrt(8.0 * math.pi)
    )
    grid = torch.linspace(-40.0, 60.0, 200_001)
    value = torch.logsumexp(-energy(grid).detach(), 0) + math.log(float(grid[1] - grid[0]))
    assert float(value) == pytest.approx(exact, abs=1e-9)
    assert quadrature(energy, [(-40.0, 60.0)]).value == pytest.approx(exact, abs=1e-6)


def test_the_envelope_fits_data() -> None:
    energy = MLPEnergy((2,), scale=1.0)
    data = torch.randn(400, 2, generator=seeded()) * torch.tensor([1.0, 3.0]) + torch.tensor(
        [5.0, 0.0]
    )
    energy.fit_envelope(data, factor=2.5)
    torch.testing.assert_close(energy.center, data.mean(0))
    torch.testing.assert_close(energy.scale, 2.5 * data.std(0, correction=0).max().expand(2))
    with pytest.raises(ValueError, match=r"factor must be positive .* factor=0"):
        energy.fit_envelope(data, factor=0.0)
    with pytest.raises(ValueError, match="data must vary"):
        energy.fit_envelope(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="event_shape"):
        energy.fit_envelope(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="needs an envelope"):
        MLPEnergy((2,), support=constraints.unit_interval, scale=None).fit_envelope(data)


def test_spectral_norms_seed_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("the streams of all GPUs are seeded anew")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    MLPEnergy((3,), (8, 8), spectral_norm=True, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_spectral_norms_bound_the_layers() -> None:
    energy = MLPEnergy((3,), (16, 16), spectral_norm=True, generator=seeded()).train()
    x = torch.randn(4, 3, generator=seeded(1))
    for _ in range(200):  # one step of power iteration each
        energy(x)
    energy.eval()
    layers = [m for m in energy.net.modules() if isinstance(m, nn.Linear)]
    for layer in layers[:-1]:
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(
            1.0, abs=1e-6
        )
    assert torch.equal(energy(x), energy(x))


def test_sampled_by_nuts() -> None:
    energy = trained("flat").requires_grad_(False)
    mcmc = MCMC(NUTS(), num_samples=50, warmup_steps=50, num_chains=4, seed=0, progress=False)
    mcmc.run(energy)
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (4, 50, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MLPEnergy((2,), scale=None), "no finite integral over Real"),
        (
            lambda: MLPEnergy((2,), support=constraints.positive, scale=None),
            "no finite integral over GreaterThan",
        ),
        (lambda: MLPEnergy((2,), activation="relu", scale=1.0), "no second derivative"),
        (lambda: ConvEnergy((1, 4, 4), (2,), activation="relu", scale=1.0), "no second derivative"),
        (
            lambda: NeuralEnergy(
                nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), (2,), scale=1.0
            ),
            "depend on the others",
        ),
    ],
)
def test_what_is_no_good_density_is_warned_of(make: Callable[[], Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said) as seen:
        make()
    assert len(seen) == 1
    assert seen[0].filename == __file__  # the warning points at who made the energy


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MLPEnergy((2,), scale=0.0), "scale must be positive and finite, got scale=0.0"),
        (
            lambda: MLPEnergy((2,), scale=torch.ones(3)),
            r"scale must be a number or of the event_shape \(2,\), got shape \(3,\)",
        ),
        (lambda: MLPEnergy((2,), center=torch.ones(3)), "center must be a number"),
        (
            lambda: MLPEnergy((2,), hidden_sizes=()),
            r"hidden_sizes must hold .* got hidden_sizes=\(\)",
        ),
        (
            lambda: ConvEnergy((1, 4, 4), channels=(0,)),
            r"channels must hold .* got channels=\(0,\)",
        ),
        (lambda: ConvEnergy((4, 4)), r"event_shape must be \(colors, height, width\)"),
        (lambda: MLPEnergy((2,), activation="sine"), "activation must be one of"),
        (
            lambda: NeuralEnergy(net_of(2, 4, 3), (2,), scale=1.0)(torch.zeros(5, 2)),
            r"net must map .* got shape \(5, 3\)",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_start_with_the_variance_asked_for(activation: str) -> None:
    net = mlp(400, 2, (300,), activation=activation, generator=seeded())
    # the variance of n uniform numbers has the relative error (0.8 / n)^(1/2)
    assert float(net[0].weight.detach().var()) == pytest.approx(
        1 / 400, rel=5.0 * math.sqrt(0.8 / 120_000)
    )
    assert not net[-1].weight.any()
    convs = convolutions((3, 9, 7), 2, (16, 32), zero_last=False, generator=seeded())
    assert float(convs[0].weight.detach().var()) == pytest.approx(
        1 / 27, rel=4.5 * math.sqrt(0.8 / 432)
    )
    assert convs(torch.zeros(2, 3, 9, 7)).shape == (2, 2)


def test_a_copy_of_an_energy_trains_alone() -> None:
    energy = trained("spectral")
    average = torch.optim.swa_utils.AveragedModel(energy)
    x: Tensor = energy.initial(3, seeded())
    with torch.no_grad():
        before = average.module(x)
        for parameter in energy.parameters():
            parameter.add_(1.0)
        assert torch.equal(average.module(x), before)
        assert not torch.equal(energy(x), before)
