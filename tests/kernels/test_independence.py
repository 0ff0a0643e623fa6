"""Independent proposals and jumps: modes far apart, redundant latents, warm-up, mutants; the
contract is in test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from lib.checks import within_se
from lib.kernel_cases import Wide
from lib.reseed import problem_generator
from lib.seeds import seeded
from torch import Tensor

from pyroebm import HMC, MALA, MCMC, ChEES, Energy
from pyroebm.flows import NICE, RedundantNICE
from pyroebm.kernels import Gibbs, IndependenceMetropolis, Kernel, LocalGlobalMixture
from pyroebm.kernels.independence import IndependenceState
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture

pytestmark = pytest.mark.usefixtures("float64")


def broad(dim: int, scale: float, shift: float = 0.0) -> NICE:
    """A normal distribution of that deviation as a flow."""
    flow = NICE(dim, num_layers=0)
    with torch.no_grad():
        flow.linear.log_diagonal.fill_(torch.tensor(scale).log())
        flow.transform.parts[-1].offset.fill_(shift)
    return flow.requires_grad_(False)


def left_mass(kernel: Kernel, energy: Energy, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Mean over chains, and its error, of the share of the first mode, from exact draws."""
    state = kernel.init(energy, energy.sample(512, seeded(1)))
    generator, seen = seeded(2), []
    for _ in range(steps):
        state, _ = kernel.step(energy, state, generator)
        seen.append((energy.mode_of(state.x) == 0).double())
    share = torch.stack(seen).mean(0)
    return share.mean(), share.std() / 512**0.5


MIXTURE = GaussianMixture(
    [[-5.0, 0.0], [5.0, 0.0]], scale=[1.0, 0.7], weights=[0.7, 0.3], dtype=torch.float64
)
KERNELS = {
    "independence": lambda: IndependenceMetropolis(broad(2, 5.0)),
    "jumps": lambda: LocalGlobalMixture(HMC(0.4, num_steps=3), broad(2, 5.0), every=3),
    "jumps of an off-center proposal": lambda: LocalGlobalMixture(
        MALA(0.7), broad(2, 6.0, shift=2.0), every=1
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_modes_far_apart_keep_their_weights(name: str) -> None:
    within_se(*_with_truth(left_mass(KERNELS[name](), MIXTURE)))


def _with_truth(found: tuple[Tensor, Tensor]) -> tuple[Tensor, float, Tensor]:
    return found[0], 0.7, found[1]


class _NoDensity(IndependenceMetropolis):
    """Forgets q: accepts by energies alone."""

    def step(
        self, energy: Energy, state: IndependenceState, generator: torch.Generator | None = None
    ) -> tuple:
        flat = state._replace(log_q=torch.zeros_like(state.log_q))
        proposal, push = self.proposal, self.proposal.forward_and_log_prob
        blind = type(
            "Blind", (), {"rsample_base": proposal.rsample_base, "log_prob": proposal.log_prob}
        )()
        blind.forward_and_log_prob = lambda z: (push(z)[0], torch.zeros(len(z)))
        return IndependenceMetropolis(blind).step(energy, flat, generator)


class _NoRatio(IndependenceMetropolis):
    """Takes whatever is proposed."""

    def step(
        self, energy: Energy, state: IndependenceState, generator: torch.Generator | None = None
    ) -> tuple:
        new, info = super().step(
            energy, state._replace(energy=torch.full_like(state.energy, 1e3)), generator
        )
        return new, info


@pytest.mark.parametrize("name", ["independence", "jumps"])
def test_proposals_of_another_dtype_are_refused(name: str) -> None:
    """Silently, they would be rounded."""
    energy, kernel = Gaussian(torch.zeros(2)), KERNELS[name]()
    state = kernel.init(energy, energy.initial(4, seeded(1)))
    coarse = kernel.replace(proposal=Wide(2, torch.float32))
    with pytest.raises(
        ValueError,
        match=r"the proposal's draw must have the dtype of the energy: Gaussian has dtype"
        r" torch\.float64, the proposal's draw has torch\.float32",
    ):
        coarse.step(energy, state, seeded(2))


@pytest.mark.parametrize("mutant", [_NoDensity, _NoRatio])
def test_mutants_are_caught(mutant: type[IndependenceMetropolis]) -> None:
    with pytest.raises(AssertionError, match="standard errors"):
        within_se(*_with_truth(left_mass(mutant(broad(2, 5.0, shift=2.0)), MIXTURE)))


def test_redundant_latents_move_on_the_extended_energy() -> None:
    energy = DoubleWell()
    flow = RedundantNICE(1, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=problem_generator(4))
    flow.requires_grad_(False)
    extended = flow.extend(energy)
    # A chain that no jump reaches keeps its well, so the means of chains are skewed: many chains,
    # of few steps each
    state = (kernel := LocalGlobalMixture(HMC(0.2, num_steps=4), flow, every=2)).init(
        extended, extended.sample(4096, seeded(5))
    )
    generator, seen = seeded(6), []
    for _ in range(20):
        state, _ = kernel.step(extended, state, generator)
        seen.append(state.x[:, 0])
    x = torch.stack(seen)
    for power, truth in ((1, energy.mean), (2, energy.variance + energy.mean**2)):
        moments = (x**power).mean(0)
        within_se(moments.mean(), truth, moments.std() / 4096**0.5)


def test_warm_up_tunes_the_local_kernel() -> None:
    kernel = LocalGlobalMixture(HMC(1e-3, num_steps=3), broad(2, 3.0), every=2)
    mcmc = MCMC(kernel, num_samples=100, warmup_steps=200, num_chains=32, seed=0, progress=False)
    mcmc.run(Gaussian(torch.zeros(2), scale=[0.5, 2.0]))
    assert float(torch.as_tensor(mcmc.kernel.step_size)) > 0.1
    x = mcmc.get_samples(group_by_chain=True)["x"]
    variances = x.square().mean(1)
    within_se(variances.mean(0), torch.tensor([0.25, 4.0]), variances.std(0) / 32**0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: IndependenceMetropolis(torch.nn.Identity()),
            "proposal must have rsample_base, forward_and_log_prob and log_prob",
        ),
        (
            lambda: LocalGlobalMixture(HMC(), broad(2, 1.0), every=0),
            "every must be an integer of at least 1, got every=0",
        ),
        (lambda: LocalGlobalMixture(ChEES(), broad(2, 1.0)), "adapted by its step size"),
        (lambda: LocalGlobalMixture(Gibbs(), broad(2, 1.0)), "adapted by its step size"),
    ],
)
def test_refusals(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
