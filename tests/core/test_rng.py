"""Which generator decides: the one given, or torch's default one, which nothing else touches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from lib.seeds import seeded
from torch import Tensor

from pyroebm.core import DistributionEnergy
from pyroebm.core.rng import draw_from, drawing_from
from pyroebm.energies import BernoulliRBM, DeepBeliefNetwork
from pyroebm.flows import NICE, MixtureBase, SplineFlow, StudentBase
from pyroebm.kernels import BlockGibbs
from pyroebm.nn import mlp
from pyroebm.objectives import ReplayBufferCD

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


def sweeps(generator: torch.Generator | None) -> Tensor:
    kernel = BlockGibbs()
    state = kernel.init(JOINT, torch.zeros(3, 7), generator)
    for _ in range(3):
        state, _ = kernel.step(JOINT, state, generator)
    return state.x


def contrastive(initial: Any) -> Draw:
    """The loss of contrastive divergence."""

    def draw(generator: torch.Generator | None) -> Tensor:
        objective = ReplayBufferCD(5, 2, BlockGibbs(), initial=initial)
        return objective(JOINT, torch.eye(7), generator=generator)[0].detach()

    return draw


JOINT = BernoulliRBM(4, 3, generator=seeded(0)).joint()
MIXTURE = MixtureBase(2, 3, generator=seeded(0))
STUDENT = StudentBase(2)
CPU = torch.device("cpu")
#: What draws in threads: all of the above, and what uses foreign distributions.
IN_THREADS: dict[str, Draw] = DRAWS | {
    "block Gibbs": sweeps,
    "mixture": lambda g: MIXTURE.rsample(20, torch.float32, CPU, g).detach(),
    "Student": lambda g: STUDENT.rsample(20, torch.float32, CPU, g).detach(),
    "zuko": lambda g: weights(SplineFlow(2, num_layers=1, hidden_sizes=(4,), generator=g)),
    "contrastive divergence": contrastive(None),
    "chains from a distribution": contrastive(dist.Bernoulli(0.3).expand([7]).to_event(1)),
}


def test_threads_with_generators_of_their_own_do_not_meet() -> None:
    """16 threads, each of which draws in all ways in another order."""
    found = dict[int, list[Tensor]]()

    def drawn(seed: int) -> list[Tensor]:
        ways, generator = list(IN_THREADS.values()), seeded(seed)
        order = [(k * (1 + seed % 4) + seed) % len(ways) for k in range(3 * len(ways))]
        return [ways[k](generator) for k in order]

    def run(seed: int) -> None:
        found[seed] = drawn(seed)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    for seed in range(16):
        for one, other in zip(found[seed], drawn(seed), strict=True):
            assert torch.equal(one, other)
