"""Which generator decides: the one given, or torch's default one, which nothing else touches."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from lib.seeds import seeded
from torch import Tensor

from pyroebm.core import DistributionEnergy
from pyroebm.core.rng import draw_from, drawing_from
from pyroebm.energies import BernoulliRBM, DeepBeliefNetwork
from pyroebm.flows import NICE
from pyroebm.nn import mlp

Draw = Callable[[torch.Generator | None], Tensor]


def swapped(generator: torch.Generator | None) -> Tensor:
    with drawing_from(generator):
        return torch.rand(50)


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


#: What draws, each in its own way.
DRAWS: dict[str, Draw] = {
    "distribution": lambda g: draw_from(dist.Gamma(2.0, 1.0), 50, g),
    "energy of a distribution": lambda g: DistributionEnergy(dist.Gamma(2.0, 1.0)).sample(50, g),
    "code without a generator": swapped,
    "weights": lambda g: weights(BernoulliRBM(4, 3, generator=g)),
    "weights of layers": lambda g: weights(DeepBeliefNetwork([4, 3, 2], generator=g)),
    "weights of a flow": lambda g: weights(NICE(2, hidden_sizes=(4,), generator=g)),
    "spectral norms": lambda g: weights(mlp(2, 1, (8,), spectral_norm=True, generator=g)),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@draws
def test_a_generator_decides_alone(draw: Draw) -> None:
    before = torch.get_rng_state()
    one, two = draw(seeded(3)), draw(seeded(3))
    other = draw(seeded(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@draws
def test_without_one_the_default_generator_decides(draw: Draw) -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(draw(None))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["distribution", "code without a generator"])
def test_threads_with_generators_of_their_own_do_not_meet(name: str) -> None:
    draw, found = DRAWS[name], dict[int, list[Tensor]]()

    def run(seed: int) -> None:
        generator = seeded(seed)
        found[seed] = [draw(generator) for _ in range(200)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        generator = seeded(seed)
        for drawn in found[seed]:
            assert torch.equal(drawn, draw(generator))
