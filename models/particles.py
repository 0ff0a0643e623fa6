"""Systems of particles: long tempered chains, and a flow fitted to one half of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.recipe import counted
from pyroebm import HMC, MCMC
from pyroebm.core import Estimate, value_and_grad
from pyroebm.core.rng import seeded_generator, standard_normal, uniform
from pyroebm.diagnostics import energy_distance, ess_bulk, r_hat
from pyroebm.flows import EquivariantFlow, FlowEnergy, FlowReport, evaluate_flow
from pyroebm.kernels import ParallelTempering
from pyroebm.objectives import ForwardKL, match_flow
from pyroebm.partition import LogZ, bridge, smc
from pyroebm.targets import DW4, Gaussian, LennardJones, Particles
from pyroebm.training import Guard, fit

__all__ = [
    "SYSTEMS",
    "Case",
    "Evaluation",
    "Reference",
    "System",
    "case",
    "evaluate",
    "moved",
    "reference",
    "trained",
]

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class System:
    """A target with the settings of its chains and of its flow."""

    make: Callable[[], Particles]
    min_beta: float  #: lowest inverse temperature of the chains
    rungs: int  #: temperatures
    thinning: int  #: steps of the chains from one draw to the next
    flow: dict[str, Any]  #: of :class:`EquivariantFlow`
    lr: float
    batch: int
    steps: int  #: of likelihood, after flow matching
    spread: float  #: scale of the normal distribution from which SMC starts


SYSTEMS: dict[str, System] = {
    "DW4": System(
        lambda: DW4(dtype=F64),
        0.1,
        5,
        5,
        {"reach": 12.0, "length": 2.0, "num_steps": 32},
        1e-2,
        256,
        600,
        2.5,
    ),
    "LJ13 once": System(
        lambda: LennardJones("once", dtype=F64),
        0.4,
        5,
        10,
        {"reach": 8.0, "num_cells": 40},
        4e-3,
        128,
        400,
        1.0,
    ),
    "LJ13 twice": System(
        lambda: LennardJones("twice", dtype=F64),
        0.3,
        7,
        10,
        {"reach": 8.0, "num_cells": 40},
        6e-3,
        128,
        400,
        0.7,
    ),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    r"""Draws of long tempered chains, and their convergence diagnostics.

    Stein's identity, :math:`E[u \cdot \nabla U] = (n - 1) k`, holds for every density :math:`e^{-U}
    / Z`.
    """

    #: ``(chains, n, d)``; of the first half of the chains and of the second nothing is shared
    draws: Tensor
    r_hat: dict[str, float]  #: of the energy and of distances
    ess: dict[str, float]  #: of the same, all chains together
    stein: Estimate  #: of :math:`u \cdot \nabla U`, to be d
    swap_rate: float  #: minimum over neighboring temperatures
    evaluations: int
    seconds: float  #: CPU time of one core

    def half(self, which: int) -> Tensor:
        """Return draws of the first (0) or second (1) half of chains, ``(chains / 2, n, d)``."""
        return self.draws.chunk(2)[which]


@dataclasses.dataclass(frozen=True)
class Case:
    """A flow fitted to a system, in float64, and its cost.

    Its integrator has the number of steps of the evaluation.
    """

    name: str
    seed: int
    energy: Particles
    reference: Reference
    flow: EquivariantFlow
    matched: EquivariantFlow  #: the flow after flow matching
    losses: list[float]  #: minus the mean log density of the batches, one for each step after that
    evaluations: int  #: of the target, all by the chains
    seconds: float  #: CPU time of one core: chains and training


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of a flow.

    Distances are between draws of the flow and those of chains that it was not fitted to.
    """

    report: FlowReport  #: its distances are of the coordinates u
    #: energy distance of sorted pair distances, which are invariant under the symmetries
    distances: Estimate
    weighted_distances: Estimate  #: the same of draws resampled by weight
    noise: Estimate  #: the same between the two halves of the chains: the sampling noise
    bridge: LogZ  #: between the flow and chains that it was not fitted to
    smc: LogZ  #: from a normal distribution, without the flow or the chains
    #: largest change of log q at the chains' draws if the integrator takes half of its steps
    integration: float
    inversion: float  #: largest of |z - flow^-1(flow(z))|
    evaluations: int
    seconds: float


def distances(energy: Particles, u: Tensor) -> Tensor:
    """Return sorted pair distances: ``(*batch, d) -> (*batch, n (n - 1) / 2)``."""
    return energy.squared_distances(energy.positions(u)).sqrt().sort(-1).values


def moved(energy: Particles, u: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate or reflect each row and permute its particles: ``(rows, d) -> (rows, d)``."""
    x = energy.positions(u)
    order = uniform(x.shape[:2], generator, u.dtype, u.device).argsort(1)
    turn = torch.linalg.qr(
        standard_normal((len(x), energy.space, energy.space), generator, u.dtype, u.device)
    )
    # without these signs the distribution of Q is not uniform
    signs = turn.R.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return energy.coordinates(x.gather(1, order.unsqueeze(-1).expand_as(x)) @ (turn.Q * signs))


def reference(
    system: System,
    seed: int = 0,
    num_chains: int = 128,
    num_samples: int = 50,
    warmup_steps: int = 250,
) -> Reference:
    """Draw from a system by many long chains with parallel tempering.

    Args:
        system: the system.
        seed: of all random numbers.
        num_chains: an even number; each half has its own warm-up and random numbers.
        num_samples: draws of each chain.
        warmup_steps: warm-up steps of each chain.
    """
    energy, began = system.make(), time.process_time()
    kernel = ParallelTempering(
        HMC(num_steps=10), torch.logspace(0.0, math.log10(system.min_beta), system.rungs)
    )
    mcmc = MCMC(
        kernel,
        num_samples,
        warmup_steps,
        num_chains,
        seed=seed,
        thinning=system.thinning,
        save_warmup=False,
        progress=False,
        compile=False,
        chain_batch_size=num_chains // 2,
    )
    with counted(energy) as rows:
        mcmc.run(energy)
    u = mcmc.get_samples(group_by_chain=True)["x"]
    values, grad = value_and_grad(energy, u.flatten(0, 1))
    far = distances(energy, u)
    seen = {
        "energy": values.reshape(u.shape[:2]),
        "mean distance": far.mean(-1),
        "smallest distance": far[..., 0],
        "largest distance": far[..., -1],
    }
    each = (u.flatten(0, 1) * grad).sum(-1).reshape(u.shape[:2])
    return Reference(
        draws=u,
        r_hat={name: float(r_hat(value)) for name, value in seen.items()},
        ess={name: float(ess_bulk(value)) for name, value in seen.items()},
        stein=Estimate.of(each.mean(1)),  # chains are independent
        swap_rate=float(mcmc.kernel.report(mcmc.state).swap_rates.min()),  # type: ignore[attr-defined]
        evaluations=rows[0],
        seconds=time.process_time() - began,
    )


def trained(
    system: System, draws: Tensor, seed: int = 0, quick: bool = False
) -> tuple[EquivariantFlow, EquivariantFlow, list[float]]:
    """Fit a flow by flow matching, then by maximum likelihood in float32.

    Args:
        system: the system.
        draws: ``(n, d)``.
        seed: of the order of the draws.
        quick: a few steps only.

    Returns:
        the flow after flow matching, the final one, and the losses of its training.
    """
    energy = system.make().float()
    flow = EquivariantFlow(energy.num_particles, energy.space, dtype=F64, **system.flow)
    match_flow(
        flow,
        draws,
        500 if quick else 20_000,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    first = copy.deepcopy(flow)
    flow.float()
    steps, batch = (10, 64) if quick else (system.steps, system.batch)
    history = fit(
        flow,
        ForwardKL(draws.float(), num_samples=batch),
        num_steps=steps,
        lr=system.lr,
        max_grad_norm=10.0,
        guard=Guard(rollback=True, max_rollbacks=steps),
        seed=seed,
        progress=False,
    )
    return first, flow.double(), history["loss"].tolist()


def case(name: str, seed: int = 0, quick: bool = False) -> Case:
    """Run chains of a system and fit a flow to the first half of them.

    Args:
        name: of :data:`SYSTEMS`.
        seed: of all random numbers.
        quick: a few steps only.
    """
    system, began = SYSTEMS[name], time.process_time()
    found = reference(system, seed, 8, 12, 8) if quick else reference(system, seed)
    first, flow, losses = trained(system, found.half(0).flatten(0, 1), seed, quick)
    first.num_steps = flow.num_steps = 10 if quick else 60
    return Case(
        name,
        seed,
        system.make(),
        found,
        flow,
        first,
        losses,
        found.evaluations,
        time.process_time() - began,
    )


@torch.no_grad()
def evaluate(done: Case, *, quick: bool = False, matched: bool = False) -> Evaluation:
    """Evaluate a flow by its own draws and by the second half of the chains.

    Args:
        done: a case, whose seed determines that of the draws.
        quick: a few draws only.
        matched: evaluate the flow after flow matching.
    """
    began = time.process_time()
    energy = done.energy
    seed = 1000 + done.seed
    generator = seeded_generator(seed)
    flow = done.matched if matched else done.flow
    n, some = (200, 100) if quick else (10_000, 2000)
    other, held = (done.reference.half(which) for which in (0, 1))
    last = min(held.shape[1], -(-some // len(held)))  # draws of each chain
    fresh = moved(energy, held[:, -last:].flatten(0, 1), generator)
    with counted(energy) as rows:
        report = evaluate_flow(
            flow,
            energy,
            n,
            fresh.reshape(len(held), last, -1),
            num_distances=some,
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
        between = bridge(
            energy,
            FlowEnergy(flow),
            draws=held[:, :: 2 if quick else 5],
            generator=generator,
        )
        start = Gaussian(
            torch.zeros(flow.dim, dtype=F64), scale=SYSTEMS[done.name].spread, dtype=F64
        )
        tempered = smc(
            energy,
            start,
            HMC(num_steps=8),
            num_particles=16 if quick else 256,
            num_islands=8,
            generator=generator,
            progress=False,
        )
    far, near = distances(energy, fresh), distances(energy, report.weighted.x[:some])
    z = flow.rsample_base(200, generator)
    back = flow.transform.inv(flow.forward_and_log_prob(z)[0])
    log_q, fine = flow.log_prob(fresh[:200]), flow.num_steps
    flow.num_steps = fine // 2
    rough = flow.log_prob(fresh[:200])
    flow.num_steps = fine
    return Evaluation(
        report=report,
        distances=energy_distance(near, far),
        weighted_distances=energy_distance(
            distances(energy, report.weighted.resample(some, generator)), far
        ),
        noise=energy_distance(distances(energy, other[:, -last:].flatten(0, 1)), far),
        bridge=between,
        smc=tempered,
        integration=float((log_q - rough).abs().max()),
        inversion=float((back - z).abs().max()),
        evaluations=rows[0],
        seconds=time.process_time() - began,
    )
