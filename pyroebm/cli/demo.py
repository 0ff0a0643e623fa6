"""The main job, end to end: sample the double well, fit flows to it, correct them, and say what the
numbers say."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from pyroebm.cli.demo_report import conclusion, draw_figures, table
from pyroebm.core.files import write_json, write_netcdf
from pyroebm.core.progress import Progress
from pyroebm.core.statistics import ess_bulk, mcse_mean, r_hat
from pyroebm.core.wrappers import PotentialFn
from pyroebm.flows import NICE, RedundantNICE, importance_sample
from pyroebm.flows.flow import Flow
from pyroebm.kernels import NUTS
from pyroebm.kernels.adaptation.windows import WindowAdaptation
from pyroebm.mcmc.sampler import MCMC
from pyroebm.objectives import ReverseKL, estimate_augmented_kl
from pyroebm.targets import DoubleWell
from pyroebm.training import fit

__all__ = ["BARRIER", "run_demo"]

#: Where the report cuts between the wells, as the example's literature does (the barrier itself is
#: at 0.12602).
BARRIER = 0.126

Facts = dict[str, Any]


@contextmanager
def _forked_seed(seed: int) -> Iterator[None]:
    """Seed Pyro's global generators and put back what they were: a demo leaves nobody's random
    numbers changed."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _facts_of_draws(x: Tensor, began: float) -> Facts:
    """Facts of draws ``(chains, draws)``; standard errors know of autocorrelation."""
    right = (x > BARRIER).double()
    return {
        "mean": float(x.mean()),
        "mean_se": float(mcse_mean(x)),
        "var": float(x.var(correction=0)),
        "right_mass": float(right.mean()),
        "right_mass_se": float(mcse_mean(right)),
        "ess_bulk": float(ess_bulk(x)),
        "r_hat": float(r_hat(x)),
        "chains": x.shape[0],
        "draws": x.shape[1],
        "seconds": time.perf_counter() - began,
    }


def sample_nuts(
    energy: DoubleWell, seed: int, chains: int, most: int, progress: bool | None
) -> tuple[MCMC, Facts]:
    """Our NUTS: first 1,000 draws of each chain, then as many as R-hat < 1.01 and a standard error
    below 0.003 need."""
    began = time.perf_counter()
    # the quartic walls: at the usual 0.8 one step in a thousand diverges
    plan = WindowAdaptation(target_acceptance=0.9)
    mcmc = MCMC(NUTS(), min(1000, most), 500, chains, seed=seed, adaptation=plan, progress=progress)
    mcmc.run(energy)
    facts = _facts_of_draws(mcmc.get_samples(group_by_chain=True)["x"], began)
    early = dict(facts)
    while facts["draws"] < most and not (facts["r_hat"] < 1.01 and facts["right_mass_se"] < 0.0029):
        mcmc.run_more(min(9000 if facts == early else 2000, most - facts["draws"]))
        facts = _facts_of_draws(mcmc.get_samples(group_by_chain=True)["x"], began)
    diagnosis = mcmc.diagnose()
    facts |= {
        "divergences": diagnosis.divergences,
        "bfmi": diagnosis.min_bfmi,
        "diagnosis": str(diagnosis),
        "at_1000_draws": early,
    }
    return mcmc, facts


def sample_pyro_nuts(
    energy: DoubleWell, seed: int, chains: int, draws: int, progress: bool | None
) -> Facts:
    """Pyro's own NUTS through the same potential, chain after chain (in one process, as it runs
    where cores are few)."""
    began = time.perf_counter()
    potential = PotentialFn(energy)
    warmup_steps = 300
    total = chains * (warmup_steps + draws)
    kept = []
    with _forked_seed(seed), Progress(total, "Pyro's NUTS", show=progress) as shown:
        for _ in range(chains):
            mcmc = PyroMCMC(
                PyroNUTS(potential_fn=potential, target_accept_prob=0.95),
                num_samples=draws,
                warmup_steps=warmup_steps,
                initial_params=potential.initial_params(),
                hook_fn=lambda *_: shown.update(),
                disable_progbar=True,
            )
            mcmc.run()
            kept.append(mcmc.get_samples()["x"])
    return _facts_of_draws(torch.stack(kept), began)


def train(flow: Flow, energy: DoubleWell, steps: int, seed: int, progress: bool | None) -> float:
    """Train a flow in place; seconds spent."""
    began = time.perf_counter()
    fit(flow, ReverseKL(energy), num_steps=steps, seed=seed, progress=progress)
    return time.perf_counter() - began


def flow_facts(
    flow: Flow,
    energy: DoubleWell,
    n: int,
    seed: int,
    seconds: float,
    name: str,
    progress: bool | None,
) -> tuple[Tensor, Facts]:
    """Direct draws of a flow, uncorrected, and J or J_R with log C in it."""
    with torch.no_grad():
        x = flow.forward_and_log_prob(flow.rsample_base(n, torch.Generator().manual_seed(seed)))[0][
            :, 0
        ]
    value, error = estimate_augmented_kl(flow, energy, n, seed=seed + 1, progress=progress)
    mass = float((x > BARRIER).double().mean())
    return x, {
        "mean": float(x.mean()),
        "var": float(x.var()),
        "right_mass": mass,
        # none seen in n: a mass of 1 / n is not excluded
        "right_mass_se": math.sqrt(max(mass * (1.0 - mass), 1.0 / n) / n),
        name: value,
        f"{name}_se": error,
        "seconds": seconds,
    }


def _weighted_facts(result: Any, seconds: float) -> Facts:
    mean, mean_se = result.expectation(lambda x: x)
    square, _ = result.expectation(lambda x: x**2)
    mass, mass_se = result.expectation(lambda x: (x > BARRIER).double())
    return {
        "mean": float(mean),
        "mean_se": float(mean_se),
        "var": float(square - mean**2),
        "right_mass": float(mass),
        "right_mass_se": float(mass_se),
        "log_z": result.log_z.value,
        "log_z_se": result.log_z.standard_error,
        "ess_fraction": result.ess_fraction,
        "pareto_k": result.pareto_k,
        "seconds": seconds,
    }


def run_demo(out: Path, seed: int = 0, quick: bool = False, progress: bool | None = None) -> Facts:
    """Run the demo and write ``report.json``, ``double_well.png``, ``trace.png``, ``rank.png``,
    ``energy.png`` and ``chains.nc`` into ``out``.

    Args:
        out: folder, made if absent.
        seed: seed of everything.
        quick: a few seconds in place of a minute or two: numbers are then rough.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Returns:
        the report.
    """
    out.mkdir(parents=True, exist_ok=True)
    energy = DoubleWell().double()
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(5)]
    chains, most, pyro_draws, steps, n = (
        (16, 300, 100, 300, 5_000) if quick else (64, 30_000, 2_500, 2_000, 100_000)
    )
    truth: Facts = {
        "mean": float(energy.mean),
        "var": float(energy.variance),
        "right_mass": energy.right_mass,
        "right_mass_se": 0.0,
        "log_z": energy.log_z,
    }
    report: Facts = {"truth": truth}
    print(f"NUTS, {chains} chains ...")
    mcmc, report["nuts"] = sample_nuts(energy, seeds[0], chains, most, progress)
    print("Pyro's NUTS through the same potential, 4 chains ...")
    report["pyro_nuts"] = sample_pyro_nuts(energy, seeds[1], 4, pyro_draws, progress)

    print(
        "NICE with D = 1: one dimension leaves nothing to couple, so this is a Gaussian with a"
        " learned shift ..."
    )
    nice = NICE(dim=1, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[2]))
    seconds = train(nice, energy, 2 * steps, seeds[2], progress)
    _, report["nice"] = flow_facts(nice, energy, n, seeds[3], seconds, "j", progress)

    draws, by_dim = {}, {}
    for total_dim in (2, 3):
        print(f"Redundant NICE with D = {total_dim} ...")
        flow = RedundantNICE(
            dim=1,
            total_dim=total_dim,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seeds[2]),
        )
        seconds = train(flow, energy, steps, seeds[2], progress)
        x, facts = flow_facts(flow, energy, n, seeds[3], seconds, "j_r", progress)
        began = time.perf_counter()
        result = importance_sample(
            flow, energy, n, generator=torch.Generator().manual_seed(seeds[4]), progress=progress
        )
        draws[total_dim] = (x, result)
        by_dim[total_dim] = (facts, _weighted_facts(result, seconds + time.perf_counter() - began))
    bounds = {1: report["nice"]["j"]} | {d: facts["j_r"] for d, (facts, _) in by_dim.items()}
    best = min(bounds, key=bounds.__getitem__)
    report["redundant_nice"] = by_dim[2][0] | {
        "total_dim": 2,
        "d_3": by_dim[3][0],
        "total_dim_of_smallest_j_r": best,
    }
    report["redundant_nice_weighted"] = by_dim[2][1] | {"total_dim": 2, "d_3": by_dim[3][1]}
    for facts in [*report.values(), *(part for pair in by_dim.values() for part in pair)]:
        # A missed mode is said, whatever a method's own figures of merit are: far too little mass,
        # and not by chance.
        short = truth["right_mass"] - facts["right_mass"]
        facts["missed_modes"] = (
            ["right"]
            if short > 0.5 * truth["right_mass"] and short > 5 * facts["right_mass_se"]
            else []
        )

    write_json(out / "report.json", report, indent=2)
    write_netcdf(out / "chains.nc", mcmc.to_arviz())
    draw_figures(out, energy, report, mcmc, *draws[2])
    print(f"\n{table(report)}\n\n{conclusion(report)}\n\nFigures, chains and report: {out}/")
    return report
