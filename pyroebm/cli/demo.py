"""The demo: sample the double well, fit flows to it, weight their draws, and report the results."""

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
from pyroebm.core.files import check_writable, write_json, write_netcdf
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

#: Boundary between the wells, as in the literature on this example (the maximum is at 0.12602).
BARRIER = 0.126

Metrics = dict[str, Any]


@contextmanager
def _forked_seed(seed: int) -> Iterator[None]:
    """Seed Pyro's global generators, and restore their states afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _metrics_of_draws(x: Tensor, began: float) -> Metrics:
    """Compute metrics of draws ``(chains, draws)``, with standard errors by the effective size."""
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
    energy: DoubleWell, seed: int, chains: int, max_draws: int, progress: bool | None
) -> tuple[MCMC, Metrics]:
    """Sample with NUTS: 1,000 draws of each chain, then more until it has converged.

    The criterion is R-hat < 1.01 and a standard error of the mass below 0.003.
    """
    began = time.perf_counter()
    # at the default of 0.8 one step in a thousand diverges in the quartic tails
    adaptation = WindowAdaptation(target_acceptance=0.9)
    mcmc = MCMC(
        NUTS(),
        min(1000, max_draws),
        500,
        chains,
        seed=seed,
        adaptation=adaptation,
        progress=progress,
    )
    mcmc.run(energy)
    metrics = _metrics_of_draws(mcmc.get_samples(group_by_chain=True)["x"], began)
    early = dict(metrics)
    while metrics["draws"] < max_draws and not (
        metrics["r_hat"] < 1.01 and metrics["right_mass_se"] < 0.0029
    ):
        mcmc.run_more(min(9000 if metrics == early else 2000, max_draws - metrics["draws"]))
        metrics = _metrics_of_draws(mcmc.get_samples(group_by_chain=True)["x"], began)
    diagnosis = mcmc.diagnose()
    metrics |= {
        "divergences": diagnosis.divergences,
        "bfmi": diagnosis.min_bfmi,
        "diagnosis": str(diagnosis),
        "at_1000_draws": early,
    }
    return mcmc, metrics


def sample_pyro_nuts(
    energy: DoubleWell, seed: int, chains: int, draws: int, progress: bool | None
) -> Metrics:
    """Sample the same potential with Pyro's NUTS, one chain after another in this process."""
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
    return _metrics_of_draws(torch.stack(kept), began)


def train(flow: Flow, energy: DoubleWell, steps: int, seed: int, progress: bool | None) -> float:
    """Train a flow in place, and return the seconds spent."""
    began = time.perf_counter()
    fit(flow, ReverseKL(energy), num_steps=steps, seed=seed, progress=progress)
    return time.perf_counter() - began


def flow_metrics(
    flow: Flow,
    energy: DoubleWell,
    n: int,
    seed: int,
    seconds: float,
    name: str,
    progress: bool | None,
) -> tuple[Tensor, Metrics]:
    """Draw from a flow without weights, and estimate J or J_R."""
    with torch.no_grad():
        x = flow.forward_and_log_prob(flow.rsample_base(n, torch.Generator().manual_seed(seed)))[0][
            :, 0
        ]
    value, error = estimate_augmented_kl(
        flow, energy, n, generator=torch.Generator().manual_seed(seed + 1), progress=progress
    )
    mass = float((x > BARRIER).double().mean())
    return x, {
        "mean": float(x.mean()),
        "var": float(x.var()),
        "right_mass": mass,
        # without a draw in the well, a mass of 1 / n cannot be excluded
        "right_mass_se": math.sqrt(max(mass * (1.0 - mass), 1.0 / n) / n),
        name: value,
        f"{name}_se": error,
        "seconds": seconds,
    }


def _weighted_metrics(result: Any, seconds: float) -> Metrics:
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


def run_demo(
    out: Path, seed: int = 0, quick: bool = False, progress: bool | None = None
) -> Metrics:
    """Run the demo and write its report, figures and chains to a folder.

    The files are ``report.json``, ``double_well.png``, ``trace.png``, ``rank.png``, ``energy.png``
    and ``chains.nc``.

    Args:
        out: folder, which is created if it does not exist.
        seed: seed of all random numbers.
        quick: a few seconds instead of a minute or two; the numbers are then inaccurate.
        progress: True shows progress, False hides it, None shows it after one second.

    Returns:
        The report, as in ``report.json``.
    """
    check_writable(out / "report.json")
    energy = DoubleWell().double()
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(5)]
    chains, max_draws, pyro_draws, steps, n = (
        (16, 300, 100, 300, 5_000) if quick else (64, 30_000, 2_500, 2_000, 100_000)
    )
    truth: Metrics = {
        "mean": float(energy.mean),
        "var": float(energy.variance),
        "right_mass": energy.right_mass,
        "right_mass_se": 0.0,
        "log_z": energy.log_z,
    }
    report: Metrics = {"truth": truth}
    print(f"NUTS, {chains} chains ...")
    mcmc, report["nuts"] = sample_nuts(energy, seeds[0], chains, max_draws, progress)
    print("Pyro's NUTS through the same potential, 4 chains ...")
    report["pyro_nuts"] = sample_pyro_nuts(energy, seeds[1], 4, pyro_draws, progress)

    print(
        "NICE with D = 1: in one dimension there is nothing to couple, so this is a Gaussian with a"
        " learned mean and scale ..."
    )
    nice = NICE(dim=1, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[2]))
    seconds = train(nice, energy, 2 * steps, seeds[2], progress)
    _, report["nice"] = flow_metrics(nice, energy, n, seeds[3], seconds, "j", progress)

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
        x, metrics = flow_metrics(flow, energy, n, seeds[3], seconds, "j_r", progress)
        began = time.perf_counter()
        result = importance_sample(
            flow, energy, n, generator=torch.Generator().manual_seed(seeds[4]), progress=progress
        )
        draws[total_dim] = (x, result)
        by_dim[total_dim] = (
            metrics,
            _weighted_metrics(result, seconds + time.perf_counter() - began),
        )
    bounds = {1: report["nice"]["j"]} | {d: metrics["j_r"] for d, (metrics, _) in by_dim.items()}
    best = min(bounds, key=bounds.__getitem__)
    report["redundant_nice"] = by_dim[2][0] | {
        "total_dim": 2,
        "d_3": by_dim[3][0],
        "total_dim_of_smallest_j_r": best,
    }
    report["redundant_nice_weighted"] = by_dim[2][1] | {"total_dim": 2, "d_3": by_dim[3][1]}
    for metrics in [*report.values(), *(part for pair in by_dim.values() for part in pair)]:
        # A mode is missed if its mass is much too small, and significantly so, whatever the other
        # metrics of the method are.
        short = truth["right_mass"] - metrics["right_mass"]
        metrics["missed_modes"] = (
            ["right"]
            if short > 0.5 * truth["right_mass"] and short > 5 * metrics["right_mass_se"]
            else []
        )

    write_json(out / "report.json", report, indent=2)
    write_netcdf(out / "chains.nc", mcmc.to_arviz())
    draw_figures(out, energy, report, mcmc, *draws[2])
    print(f"\n{table(report)}\n\n{conclusion(report)}\n\nFigures, chains and report: {out}/")
    return report
