"""Run libraries that use Pyro's MCMC with the classes of `pyroebm.infer` in their place.

`python scripts/clients.py` runs each client with Pyro's HMC, NUTS and MCMC, and again with ours,
which replace the names that the client imports. It compares

- densities: Pyro's potential energy and ours, at random points near a start of the client, up to a
  constant, in the largest relative difference;
- posteriors: means and mean squares of the unconstrained latent variables, in combined Monte Carlo
  standard errors;
- seconds, and seconds of CPU, compilation included.

It prints a table, writes `build/clients.json`, and exits with 1 if a client fails or differs. `make
clients` makes the environment with the versions of `constraints-clients.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyroebm import infer
from pyroebm.core.statistics import mcse_mean
from pyroebm.infer.potential import PotentialEnergy
from pyroebm.ppl import ModelEnergy

#: Number of points at which densities are compared, and their largest relative difference.
POINTS, MAX_DIFFERENCE = 20, 1e-5

#: Largest difference of posteriors in combined standard errors.
MAX_ERRORS = 5.0


class Run:
    """One run of a client's sampler."""

    def __init__(
        self, density: float, draws: dict[str, np.ndarray], seconds: float, cpu_seconds: float
    ) -> None:
        self.density = density
        self.draws = draws
        self.seconds = seconds
        self.cpu_seconds = cpu_seconds


@contextlib.contextmanager
def recording(replace: dict[str, Any], runs: list[Run]) -> Iterator[None]:
    """Replace names of modules (``"module:NAME"``), and record the runs of their MCMC."""
    with contextlib.ExitStack() as stack:
        for place, cls in replace.items():
            module, name = place.split(":")
            made = recorded(cls, runs) if name == "MCMC" else cls
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, made))
        yield


def recorded(cls: type, runs: list[Run]) -> type:
    """A subclass of an MCMC class that records each run."""

    class Recorded(cls):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.given = kwargs

        def run(self, *args: Any, **kwargs: Any) -> None:
            energy, density = compare_densities(self, args, kwargs)
            began, cpu = time.monotonic(), cpu_seconds()
            super().run(*args, **kwargs)
            seconds = time.monotonic() - began, cpu_seconds() - cpu
            runs.append(Run(density, unconstrained(energy, self), *seconds))

    return Recorded


def compare_densities(
    mcmc: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, float]:
    """Return the energy of a run, and the largest relative difference from Pyro's potential."""
    kernel, generator = mcmc.kernel, torch.Generator().manual_seed(0)
    model = getattr(kernel, "model", None)
    if model is None:
        potential = kernel.potential_fn
        starts = mcmc.given["initial_params"]
        if mcmc.num_chains == 1:
            starts = {name: value.unsqueeze(0) for name, value in starts.items()}
        energy: Any = PotentialEnergy(potential, starts, {})
    else:
        nesting = getattr(kernel, "max_plate_nesting", getattr(kernel, "_max_plate_nesting", None))
        energy = ModelEnergy(model, *args, max_plate_nesting=nesting, **kwargs)
        start = getattr(kernel, "_init_strategy", None) or kernel.init_strategy
        starts, potential, _, _ = initialize_model(
            model, args, kwargs, max_plate_nesting=nesting, init_strategy=start
        )
        starts = {name: value.detach().unsqueeze(0) for name, value in starts.items()}
    noise = torch.rand(POINTS, *energy.event_shape, generator=generator, dtype=energy.dtype) - 0.5
    u = energy.join(starts)[:1] + 0.1 * noise
    with torch.no_grad(), pyro.validation_enabled(False):
        theirs = torch.stack([potential(energy.split(row)).reshape(()) for row in u]).double()
        ours = energy(u).double()
    finite = torch.isfinite(theirs)
    if not torch.equal(finite, torch.isfinite(ours)) or int(finite.sum()) < POINTS // 2:
        return energy, math.inf
    ours, theirs = ours[finite], theirs[finite]
    difference = (ours - ours.mean() - theirs + theirs.mean()).abs().max()
    return energy, float(difference / theirs.abs().max().clamp_min(1.0))


def unconstrained(energy: Any, mcmc: Any) -> dict[str, np.ndarray]:
    """Return draws of the latent variables, ``(chains, draws, entries)``."""
    draws = mcmc.get_samples(group_by_chain=True)
    if isinstance(energy, ModelEnergy):
        draws = energy.split(energy.unconstrain({name: draws[name] for name in energy.sites}))
    return {
        name: value.detach().double().flatten(2).numpy()
        if value.dim() > 2
        else value.detach().double().unsqueeze(2).numpy()
        for name, value in draws.items()
    }


def compare_posteriors(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Return the largest difference of means and mean squares, in combined standard errors."""
    largest = 0.0
    for name, draws in first.items():
        for power in (1, 2):
            a, b = draws**power, second[name] ** power
            error = np.hypot(mcse_mean(a), mcse_mean(b))
            gap = np.abs(a.mean((0, 1)) - b.mean((0, 1))) / error
            largest = max(largest, float(np.max(gap)))
            if not np.isfinite(gap).all():
                return math.inf
    return largest


# --------------------------------------------------------------------------------------------------
# Clients: each samples once, with the names of PLACES that it imports


def saas() -> None:
    """BoTorch's fully Bayesian Gaussian process with the SAAS prior."""
    from botorch.fit import fit_fully_bayesian_model_nuts
    from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP

    x, y = gp_data(12, 3)
    model = SaasFullyBayesianSingleTaskGP(x, y)
    fit_fully_bayesian_model_nuts(
        model, warmup_steps=256, num_samples=256, thinning=16, disable_progbar=True
    )
    model.posterior(x)


def gp_data(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Inputs in the unit cube and standardized values that depend on the first two inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, dim, generator=generator, dtype=torch.float64)
    y = torch.sin(6.0 * x[:, :1]) + x[:, 1:2] ** 2
    y = y + 0.05 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return x, (y - y.mean()) / y.std()


def gpytorch_example(num_chains: int, num_samples: int) -> Callable[[], None]:
    """GPyTorch's example of a fully Bayesian regression: a spectral mixture in its notebook, here
    the same code with a radial kernel."""

    def run() -> None:
        import gpytorch
        from gpytorch.priors import UniformPrior

        x = torch.linspace(0.0, 1.0, 6)
        y = torch.sin(x * (2.0 * math.pi))

        class ExactGP(gpytorch.models.ExactGP):
            def __init__(self, likelihood: Any) -> None:
                super().__init__(x, y, likelihood)
                self.mean_module = gpytorch.means.ConstantMean()
                self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

            def forward(self, x: Tensor) -> Any:
                return gpytorch.distributions.MultivariateNormal(
                    self.mean_module(x), self.covar_module(x)
                )

        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        gp = ExactGP(likelihood)
        gp.mean_module.register_prior("mean_prior", UniformPrior(-1, 1), "constant")
        gp.covar_module.base_kernel.register_prior(
            "lengthscale_prior", UniformPrior(0.01, 0.5), "lengthscale"
        )
        gp.covar_module.register_prior("outputscale_prior", UniformPrior(1, 2), "outputscale")
        likelihood.register_prior("noise_prior", UniformPrior(0.01, 0.5), "noise")

        def model(x: Tensor, y: Tensor) -> Tensor:
            with gpytorch.settings.fast_computations(False, False, False):
                sampled = gp.pyro_sample_from_prior()
                output = sampled.likelihood(sampled(x))
                pyro.sample("obs", output, obs=y)
            return y

        import pyro.infer.mcmc as mcmc

        sampler = mcmc.MCMC(
            mcmc.NUTS(model),
            num_samples=num_samples,
            warmup_steps=100,
            num_chains=num_chains,
            disable_progbar=True,
        )
        sampler.run(x, y)
        gp.pyro_load_from_samples(sampler.get_samples())
        gp.eval()
        gp(torch.linspace(0.0, 1.0, 21).unsqueeze(-1).expand(num_samples * num_chains, 21, 1))

    return run


def sbi_posterior(method: str) -> Callable[[], None]:
    """Neural likelihood estimation of sbi, whose posterior is sampled by Pyro's kernels."""

    def run() -> None:
        from sbi.inference import NLE
        from sbi.utils import BoxUniform

        torch.manual_seed(1)
        prior = BoxUniform(-2.0 * torch.ones(2), 2.0 * torch.ones(2))
        theta = prior.sample((500,))
        x = theta + 0.5 * torch.randn(theta.shape)
        inference = NLE(prior, density_estimator="mdn", show_progress_bars=False)
        inference.append_simulations(theta, x).train(max_num_epochs=20)
        posterior = inference.build_posterior(
            mcmc_method=method,
            mcmc_parameters={"warmup_steps": 100, "thin": 1, "num_chains": 1},
        )
        posterior.sample((300,), x=torch.tensor([0.5, -0.5]), show_progress_bars=False)

    return run


def forecast() -> None:
    """Pyro's forecasting module: a local level with a seasonal regression."""
    from pyro.contrib.forecast import ForecastingModel, HMCForecaster

    class Model(ForecastingModel):
        def model(self, zero_data: Tensor, covariates: Tensor) -> None:
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0).expand([1]).to_event(1))
            with self.time_plate:
                drift = pyro.sample("drift", dist.Normal(0.0, 0.3).expand([1]).to_event(1))
            level = drift.cumsum(-2) + (weight * covariates).sum(-1, keepdim=True)
            self.predict(dist.Normal(0.0, scale), level)

    t = torch.arange(20.0)
    covariates = torch.stack([torch.sin(t), torch.cos(t)], -1)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0))
    data = (0.5 * torch.sin(t) + 0.05 * t + 0.3 * noise).unsqueeze(-1)
    forecaster = HMCForecaster(
        Model(), data[:16], covariates[:16], num_warmup=200, num_samples=200, max_tree_depth=5
    )
    forecaster(data[:16], covariates, num_samples=50)


def epidemiology(num_samples: int, **options: Any) -> Callable[[], None]:
    """Pyro's compartmental models: a susceptible-infectious-recovered model."""

    def run() -> None:
        from pyro.contrib.epidemiology.models import SimpleSIRModel

        data = torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 4.0, 3.0, 2.0])
        model = SimpleSIRModel(100, 5.0, data.to(torch.float64))
        model.fit_mcmc(
            warmup_steps=num_samples,
            num_samples=num_samples,
            max_tree_depth=5,
            heuristic_num_particles=64,
            disable_progbar=True,
            **options,
        )
        model.predict(forecast=3)

    return run


#: Name, function, dtype, and the modules whose names are replaced.
CLIENTS: dict[str, tuple[Callable[[], None], torch.dtype, tuple[str, ...]]] = {
    "botorch SAAS 12 x 3": (saas, torch.float64, ("botorch.fit",)),
    "gpytorch, 1 chain": (gpytorch_example(1, 100), torch.float64, ("pyro.infer.mcmc",)),
    "gpytorch, 4 chains": (gpytorch_example(4, 50), torch.float64, ("pyro.infer.mcmc",)),
    "sbi nuts_pyro": (
        sbi_posterior("nuts_pyro"),
        torch.float32,
        ("pyro.infer.mcmc", "pyro.infer.mcmc.api"),
    ),
    "sbi hmc_pyro": (
        sbi_posterior("hmc_pyro"),
        torch.float32,
        ("pyro.infer.mcmc", "pyro.infer.mcmc.api"),
    ),
    "pyro.contrib.forecast": (forecast, torch.float64, ("pyro.contrib.forecast.forecaster",)),
    "pyro.contrib.epidemiology": (
        epidemiology(200),
        torch.float64,
        ("pyro.contrib.epidemiology.compartmental",),
    ),
    "the same, enumerated": (
        epidemiology(100, num_quant_bins=2),
        torch.float64,
        ("pyro.contrib.epidemiology.compartmental",),
    ),
}


def names_in(modules: tuple[str, ...], source: Any) -> dict[str, Any]:
    """Return the classes of ``source`` for the names that some modules have."""
    return {
        f"{module}:{name}": getattr(source, name)
        for module in modules
        for name in ("HMC", "NUTS", "MCMC")
        if hasattr(importlib.import_module(module), name)
    }


def measure(name: str, seed: int) -> dict[str, Any]:
    """Run a client with Pyro's classes and with ours, and compare."""
    client, dtype, modules = CLIENTS[name]
    found: dict[str, Any] = {"client": name}
    runs: list[Run] = []
    for source, key in ((pyro.infer, "pyro"), (infer, "pyroebm")):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        try:
            with (
                recording(names_in(modules, source), runs),
                warnings.catch_warnings(record=True) as w,
            ):
                warnings.simplefilter("always")
                client()
        except Exception as error:
            traceback.print_exc()
            return found | {"passed": False, "error": f"{key}: {type(error).__name__}: {error}"}
        finally:
            torch.set_default_dtype(before)
        found[f"{key}_seconds"] = round(runs[-1].seconds, 1)
        found[f"{key}_cpu_seconds"] = round(runs[-1].cpu_seconds, 1)
        if key == "pyroebm":
            texts = [str(each.message) for each in w]
            found["slow"] = next((text for text in texts if "which is slow" in text), "")
    theirs, ours = runs
    found["density_difference"] = max(theirs.density, ours.density)
    found["errors"] = round(compare_posteriors(theirs.draws, ours.draws), 2)
    found["passed"] = (
        found["density_difference"] <= MAX_DIFFERENCE and found["errors"] <= MAX_ERRORS
    )
    return found


def cpu_seconds() -> float:
    """Return the seconds of CPU of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def main() -> int:
    """Run the clients that the command line names, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of clients; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/clients.json"))
    options = parser.parse_args()
    names = [n for n in CLIENTS if not options.names or any(part in n for part in options.names)]
    results, out = [], options.out.resolve()
    print("| client | Pyro, s (CPU) | pyroebm, s (CPU) | densities | posteriors | |")
    print("|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # for logs of sbi
            found = measure(name, options.seed)
        results.append(found)
        print(row(found), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if results and all(found["passed"] for found in results) else 1


def row(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "error" in found:
        return f"| {found['client']} | | | | | {found['error']} |"
    said = "chain by chain" if "chain by chain" in found["slow"] else ""
    pyro_s, ours_s = (
        f"{found[f'{key}_seconds']} ({found[f'{key}_cpu_seconds']})" for key in ("pyro", "pyroebm")
    )
    return (
        f"| {found['client']} | {pyro_s} | {ours_s}"
        f" | {found['density_difference']:.1g} | {found['errors']} | {said}"
        f"{'' if found['passed'] else ' differs'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
