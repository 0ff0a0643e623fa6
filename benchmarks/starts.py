"""Stuck chains after warm-up: step-size rules of NUTS on models with steep regions, 100 seeds.

    python -m benchmarks.starts [--quick] [--seeds N] [--rule RULE] [--case CASE] [--out DIR]

Each seed is a run with default starts, 500 steps of warm-up and 500 draws. Rules:

- `grouped`, `per_chain`, `pooled`: those of `pyroebm.kernels.WindowAdaptation`;
- `harmonic`: one step size for all chains, adapted by the harmonic mean of the acceptance rates;
- `harmonic, then mean`: one step size for all chains, adapted by the harmonic mean of the
  acceptance rates in the first half of warm-up and by their arithmetic mean after it;
- `mean`: one step size for all chains, adapted by the arithmetic mean of the acceptance rates.

The runs of all seeds are one batch of chains. A step of one chain does not depend on the others, so
the results are those of separate runs; starts and adaptation are computed for each seed by the code
of `pyroebm.MCMC`. `efficiency` is ESS per gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.samplers import QUICK_RESULTS, RESULTS, write
from benchmarks.suite import in_torch
from benchmarks.suite.cases import CASES as SAMPLER_CASES
from benchmarks.suite.cases import eight_schools_truth
from benchmarks.suite.measure import Row, row
from pyroebm import MCMC, NUTS, Energy, ModelEnergy, __version__
from pyroebm.core import Unconstrained, seeded_generator
from pyroebm.diagnostics import ess_bulk, mcse_mean, r_hat
from pyroebm.kernels import Diagonal, Info, State, WindowAdaptation
from pyroebm.kernels.adaptation import draw_starts
from pyroebm.targets import DoubleWell

F64 = torch.float64
WARMUP = DRAWS = 500


class _Mean(WindowAdaptation):
    """One step size for all chains, adapted by the arithmetic mean of their acceptance rates."""

    def _rates(self, rates: Tensor, together: Tensor, overdue: Tensor) -> float | Tensor:
        return float(rates.mean())


class _Harmonic(WindowAdaptation):
    """One step size for all chains, adapted by the harmonic mean of their acceptance rates.

    The method is that of Hoffman, Radul and Sountsov (2021).
    """

    def _rates(self, rates: Tensor, together: Tensor, overdue: Tensor) -> float | Tensor:
        return float(1.0 / (1.0 / rates).mean())


class _HarmonicThenMean(_Harmonic):
    """The harmonic mean in the first half of the warm-up, the arithmetic mean after it."""

    def update(
        self,
        kernel: Any,
        energy: Any,
        state: Any,
        info: Any,
        warmup: Any,
        steps: int,
        generator: Any = None,
    ) -> Any:
        plan: WindowAdaptation = self if 2 * warmup.step < steps else _Mean(step_size="pooled")
        return WindowAdaptation.update(plan, kernel, energy, state, info, warmup, steps, generator)


RULES: dict[str, Callable[[], WindowAdaptation]] = {
    "grouped": WindowAdaptation,
    "per_chain": lambda: WindowAdaptation(step_size="per_chain"),
    "pooled": lambda: WindowAdaptation(step_size="pooled"),
    "harmonic": lambda: _Harmonic(step_size="pooled"),
    "harmonic, then mean": lambda: _HarmonicThenMean(step_size="pooled"),
    "mean": lambda: _Mean(step_size="pooled"),
}


# Models


def normal_data() -> Tensor:
    """Twenty standard normal numbers."""
    return torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)


def location_scale(y: Tensor) -> None:
    """Define a normal model with unknown location and scale."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau), obs=y)


def location_scale_truth() -> np.ndarray:
    """Posterior means of mu and tau by quadrature over (mu, log tau)."""
    mu, log_tau = np.meshgrid(
        np.linspace(-4.0, 4.0, 1601), np.linspace(-3.0, 4.0, 1401), indexing="ij"
    )
    y, tau = normal_data().numpy(), np.exp(log_tau)
    log_p = -0.5 * mu**2 - np.log1p(tau**2) + log_tau
    log_p -= (
        len(y) * log_tau
        + 0.5 * (((y - y.mean()) ** 2).sum() + len(y) * (mu - y.mean()) ** 2) / tau**2
    )
    weight = np.exp(log_p - log_p.max())
    return np.array([np.average(value, weights=weight) for value in (mu, tau)])


def curve_data() -> tuple[Tensor, Tensor]:
    """A noisy sine at 20 points."""
    x = torch.linspace(-2.0, 2.0, 20, dtype=F64)
    return x, torch.sin(2.0 * x) + 0.2 * torch.randn(
        20, generator=torch.Generator().manual_seed(1), dtype=F64
    )


def covariance(x: Tensor, amplitude: Tensor, length: Tensor, noise: Tensor) -> Tensor:
    """Squared exponential covariance plus noise, of settings ``(*batch,)``."""
    amplitude, length, noise = (t[..., None, None] for t in (amplitude, length, noise))
    distance = (x[:, None] - x) ** 2
    return amplitude**2 * torch.exp(-0.5 * distance / length**2) + (noise**2 + 1e-6) * torch.eye(
        len(x), dtype=x.dtype
    )


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """Define a Gaussian process regression."""
    amplitude = pyro.sample("amplitude", dist.HalfCauchy(1.0))
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    factor = torch.linalg.cholesky(covariance(x, amplitude, length, noise))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=factor), obs=y)


def gaussian_process_truth(points: int = 61) -> np.ndarray:
    """Posterior means of the logarithms of amplitude, length and noise by quadrature over them."""
    x, y = curve_data()
    axes = [
        torch.linspace(low, high, points, dtype=F64)
        for low, high in ((-3.0, 6.0), (-4.0, 3.0), (-5.0, 1.5))
    ]
    logs, log_p = torch.cartesian_prod(*axes), []
    for part in logs.split(20_000):
        a, length, s = part.exp().unbind(1)
        factor = torch.linalg.cholesky(covariance(x, a, length, s))
        white = torch.linalg.solve_triangular(
            factor, y[:, None].expand(len(part), -1, 1), upper=False
        )
        evidence = -factor.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * white.square().sum((1, 2))
        prior = (
            -torch.log1p(a**2) - 0.5 * part[:, 1] ** 2 - torch.log1p(s**2) + part[:, 0] + part[:, 2]
        )
        log_p.append(evidence + prior)
    weight = torch.softmax(torch.cat(log_p), 0)
    return (weight @ logs).numpy()


def two_component_data() -> Tensor:
    """Fifty numbers of a mixture of N(-2, 1) and N(2, 1)."""
    generator = torch.Generator().manual_seed(2)
    side = torch.where(torch.rand(50, generator=generator, dtype=F64) < 0.4, -2.0, 2.0)
    return side + torch.randn(50, generator=generator, dtype=F64)


def two_components(y: Tensor) -> None:
    """Define a normal mixture of two components."""
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    parts = torch.stack([dist.Normal(mu[k], sigma[k]).log_prob(y) for k in range(2)], -1)
    log_weights = torch.stack([weight.log(), torch.log1p(-weight)])
    pyro.factor("y", torch.logsumexp(parts + log_weights, -1).sum())


class MullerBrown(Energy):
    """The potential of Müller and Brown (1979) at kT = 15.

    It has two deep wells and a shallow one between them.
    """

    event_shape = torch.Size((2,))
    A = (-200.0, -100.0, -170.0, 15.0)
    a = (-1.0, -1.0, -6.5, 0.7)
    b = (0.0, 0.0, 11.0, 0.6)
    c = (-10.0, -10.0, -6.5, 0.7)
    x0 = (1.0, 0.0, -0.5, -1.0)
    y0 = (0.0, 0.5, 1.5, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return energies of points ``(*batch, 2)``."""
        terms = zip(self.A, self.a, self.b, self.c, self.x0, self.y0, strict=True)
        u, v = x[..., 0], x[..., 1]
        parts = [
            A * torch.exp(a * (u - p) ** 2 + b * (u - p) * (v - q) + c * (v - q) ** 2)
            for A, a, b, c, p, q in terms
        ]
        return torch.stack(parts).sum(0) / 15.0


def muller_brown_truth(points: int = 801) -> np.ndarray:
    """Return the mass at x > 0 by quadrature."""
    axes = (
        torch.linspace(-2.5, 2.0, points, dtype=F64),
        torch.linspace(-1.5, 3.0, points, dtype=F64),
    )
    x = torch.cartesian_prod(*axes)
    weight = torch.softmax(-MullerBrown()(x), 0)
    return np.array([float(weight[x[:, 0] > 0].sum())])


@dataclasses.dataclass(frozen=True)
class Case:
    """A density and its known expectations.

    Args:
        title: as in the docs.
        build: makes the energy.
        chains: chains of one run.
        quantities: from named draws ``(chains, draws, ...)`` to functions of them, ``(chains,
            draws, k)``; None: no quantities.
        truth: their exact means, ``(k,)``; None where they are unknown, or not reachable with 500
            draws.
        one_mode: whether all chains must agree.
    """

    title: str
    build: Callable[[], Energy]
    chains: int
    quantities: Callable[[dict[str, Tensor]], Tensor] | None = None
    truth: Callable[[], np.ndarray] | None = None
    one_mode: bool = False


def _of_sites(*sites: str, log: bool = False) -> Callable[[dict[str, Tensor]], Tensor]:
    def quantities(draws: dict[str, Tensor]) -> Tensor:
        values = torch.stack([draws[site] for site in sites], -1)
        return values.log() if log else values

    return quantities


def _schools(draws: dict[str, Tensor]) -> Tensor:
    mu, tau = draws["mu"].unsqueeze(-1), draws["tau"].unsqueeze(-1)
    return torch.cat([mu, tau, mu + tau * draws["eta"]], -1)


def _location_scale(chains: int) -> Case:
    return Case(
        f"normal data, half-Cauchy scale, {chains} chains",
        lambda: ModelEnergy(location_scale, normal_data()),
        chains,
        _of_sites("mu", "tau"),
        location_scale_truth,
        True,
    )


CASES: dict[str, Case] = {
    **{f"location_scale_{chains}": _location_scale(chains) for chains in (4, 8, 16, 48)},
    "eight_schools": Case(
        "eight schools, non-centered, 8 chains",
        lambda: in_torch.energy("eight_schools"),
        8,
        _schools,
        eight_schools_truth,
        True,
    ),
    "gaussian_process": Case(
        "Gaussian-process regression, 16 chains",
        lambda: ModelEnergy(gaussian_process, *curve_data()),
        16,
        _of_sites("amplitude", "length", "noise", log=True),
        gaussian_process_truth,
        True,
    ),
    "two_components": Case(
        "two-component normal mixture, 16 chains",
        lambda: ModelEnergy(two_components, two_component_data()),
        16,
    ),
    "muller_brown": Case(
        "Müller-Brown at kT 15, 16 chains",
        lambda: MullerBrown().double(),
        16,
        lambda draws: (draws["x"][..., :1] > 0).double(),
        muller_brown_truth,
    ),
    "double_well": Case(
        "double well, 16 chains",
        lambda: DoubleWell(dtype=F64),
        16,
        lambda draws: (draws["x"] > DoubleWell.barrier).double().unsqueeze(-1),
        lambda: np.array([float(DoubleWell().mode_weights[1])]),
    ),
    "funnel": Case(
        "funnel, 10 dimensions, variance 9, 16 chains", lambda: in_torch.energy("funnel"), 16
    ),
}

#: Cases of benchmarks/samplers.py on which effective draws a gradient are compared, 64 chains each.
EFFICIENCY = ("eight_schools", "logistic", "normal")

NAMES = (*CASES, *(f"efficiency {name}" for name in EFFICIENCY))


# All seeds in one batch


class _Memory(NamedTuple):
    kernels: tuple[Any, ...]
    memories: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class EachSeed:
    """A separate adaptation ``plan`` for each run of ``chains`` chains in one batch."""

    plan: WindowAdaptation
    chains: int

    def start(
        self, kernel: Any, energy: Energy, state: State, generator: Any = None
    ) -> tuple[Any, _Memory]:
        """Return the initial adaptation states."""
        pairs = [self.plan.start(kernel, energy, part, generator) for part in self._parts(state)]
        kernels, memories = zip(*pairs, strict=True)
        return self._joined(kernel, kernels), _Memory(kernels, memories)

    def step(
        self,
        kernel: Any,
        energy: Energy,
        state: State,
        memory: _Memory,
        steps: int,
        generator: Any = None,
    ) -> tuple[Any, State, Info, _Memory]:
        """Adapt each run after a step."""
        state, info = kernel.step(energy, state, generator)
        each = zip(*memory, self._parts(state), self._parts(info), strict=True)
        pairs = [self.plan.update(k, energy, s, i, m, steps, generator) for k, m, s, i in each]
        kernels, memories = zip(*pairs, strict=True)
        return self._joined(kernel, kernels), state, info, _Memory(kernels, memories)

    def _parts(self, value: Any) -> list[Any]:
        count = len(value.energy) // self.chains
        fields = [[None] * count if field is None else field.split(self.chains) for field in value]
        return [type(value)(*parts) for parts in zip(*fields, strict=True)]

    def _joined(self, kernel: Any, kernels: tuple[Any, ...]) -> Any:
        sizes = torch.cat(
            [torch.as_tensor(k.step_size, dtype=F64).expand(self.chains) for k in kernels]
        )
        metrics = [k.inverse_mass for k in kernels]
        if metrics[0] is None:
            return kernel.replace(step_size=sizes)
        scales = torch.stack(metrics).sqrt().repeat_interleave(self.chains, 0)
        return kernel.replace(step_size=sizes, inverse_mass=Diagonal(scales))


def sampled(energy: Energy, chains: int, seeds: int, rule: str, draws: int = DRAWS) -> MCMC:
    """Run the seeds 0, 1, ... with default starts, concatenated along the chains."""
    plan, target = RULES[rule](), Unconstrained(energy)
    starts = []
    for seed in range(seeds):
        generator = seeded_generator(seed)
        starts.append(target.constrain(draw_starts(NUTS(), target, chains, generator)))
    each = EachSeed(plan, chains)
    mcmc = MCMC(
        NUTS(),
        draws,
        WARMUP,
        seeds * chains,
        seed=0,
        adaptation=each,
        save_warmup=False,
        chain_batch_size=seeds * chains,
        compile=False,
        progress=False,
    )
    mcmc.run(energy, torch.cat(starts))
    return mcmc


def judged(case: Case, mcmc: MCMC, seeds: int) -> dict[str, list[float]]:
    """Return the results of a run, one number for each seed."""
    stats = {k: v.reshape(seeds, case.chains, -1) for k, v in mcmc.get_stats().items()}
    draws = {
        k: v.reshape(seeds, case.chains, *v.shape[1:])
        for k, v in mcmc.get_samples(group_by_chain=True).items()
    }
    rates = stats["acceptance_rate"].mean(2)
    still = torch.stack([(v == v[:, :, :1]).flatten(2).all(2) for v in draws.values()]).all(0)
    found: dict[str, list[float]] = {
        "chains_left_behind": still.sum(1).tolist(),
        "min_acceptance": rates.amin(1).tolist(),
        "max_acceptance": rates.amax(1).tolist(),
        "gradients_per_draw": stats["n_steps"].double().mean((1, 2)).tolist(),
    }
    if case.one_mode:
        found["r_hat"] = [
            max(float(np.max(r_hat(v[seed]))) for v in draws.values()) for seed in range(seeds)
        ]
    if case.quantities is not None and case.truth is not None:
        truth = case.truth()
        values = [
            case.quantities({k: v[seed] for k, v in draws.items()}).numpy() for seed in range(seeds)
        ]
        means = np.stack([q.mean((0, 1)) for q in values])
        # over the seeds, which are independent: no estimate of autocorrelation is in the standard
        # error
        found["z_of_all_seeds"] = [
            float(np.max(np.abs(means.mean(0) - truth) / (means.std(0, ddof=1) / math.sqrt(seeds))))
        ]
        if case.one_mode:
            found["worst_z"] = [
                float(np.max(np.abs(m - truth) / mcse_mean(q)))
                for m, q in zip(means, values, strict=True)
            ]
    return found


def case_rows(name: str, rule: str, seeds: int) -> list[Row]:
    """Return the results of a case under a rule: the median over seeds, and the range."""
    case, began = CASES[name], time.perf_counter()
    found = judged(case, sampled(case.build(), case.chains, seeds, rule), seeds)
    settings = {
        "method": f"NUTS, {rule}",
        "chains": case.chains,
        "repeats": seeds,
        "warmup": WARMUP,
        "draws": DRAWS,
    }
    rows = [
        row(f"starts {name}", "pyroebm", metric, values, settings)
        for metric, values in found.items()
    ]
    outside = sum(
        low < 0.4 or high > 0.98
        for low, high in zip(found["min_acceptance"], found["max_acceptance"], strict=True)
    )
    rows.append(row(f"starts {name}", "pyroebm", "seeds_outside", [float(outside)], settings))
    behind = sum(count > 0 for count in found["chains_left_behind"])
    rows.append(row(f"starts {name}", "pyroebm", "seeds_left_behind", [float(behind)], settings))
    extremes = (
        f"acceptance {min(found['min_acceptance']):.3f} to {max(found['max_acceptance']):.3f}"
    )
    told = "".join(
        f", {metric} up to {max(found[metric]):.4g}"
        for metric in ("r_hat", "worst_z", "z_of_all_seeds")
        if metric in found
    )
    print(
        f"{name:20} {rule:20} {behind:3d} of {seeds} seeds leave a chain behind, {outside:3d}"
        f" outside, {extremes}{told},"
        f" {np.median(found['gradients_per_draw']):.1f} gradients a draw,"
        f" {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return rows


def efficiency_rows(name: str, rule: str, seeds: int, chains: int = 64) -> list[Row]:
    """Return minimum bulk ESS over gradients of the draws: median and range over seeds."""
    case, began = SAMPLER_CASES[name], time.perf_counter()
    mcmc = sampled(in_torch.energy(name), chains, seeds, rule)
    draws = {
        site: np.asarray(value) for site, value in mcmc.get_samples(group_by_chain=True).items()
    }
    ess = [float(np.min(ess_bulk(part))) for part in np.split(case.join(draws), seeds)]
    gradients = mcmc.get_stats()["n_steps"].reshape(seeds, -1).sum(1).tolist()
    values = [e / g for e, g in zip(ess, gradients, strict=True)]
    error = float(np.std(values) / math.sqrt(max(seeds - 1, 1)))
    print(
        f"{name:20} {rule:20} ESS/gradient {np.mean(values):.4f} +- {error:.4f},"
        f" {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    settings = {
        "method": f"NUTS, {rule}",
        "chains": chains,
        "repeats": seeds,
        "warmup": WARMUP,
        "draws": DRAWS,
    }
    mean = row(f"efficiency {name}", "pyroebm", "ess_per_gradient", values, settings) | {
        "value": float(np.mean(values))
    }
    return [mean, row(f"efficiency {name}", "pyroebm", "standard_error", [error], settings)]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.starts", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="5 seeds, written to another folder")
    parser.add_argument("--seeds", type=int, default=100, help="runs of each case")
    parser.add_argument(
        "--rule", choices=RULES, action="append", help="one rule alone (may be repeated)"
    )
    parser.add_argument(
        "--case", choices=NAMES, action="append", help="one case alone (may be repeated)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    seeds = 5 if options.quick else options.seeds
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "starts.json"
    torch.set_num_threads(1)
    for rule in options.rule or RULES:
        for name in options.case or NAMES:
            known = name.removeprefix("efficiency ")
            rows = (
                case_rows(name, rule, seeds)
                if name in CASES
                else efficiency_rows(known, rule, min(seeds, 10))
            )
            for each in rows:
                each["version"] = __version__
            write(path, rows)


if __name__ == "__main__":
    main()
