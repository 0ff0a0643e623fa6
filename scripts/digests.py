"""Digests of what the package computes: `python scripts/digests.py record|compare FILE.json`.

A refactoring must change no number. `record` runs every case (draws, losses, gradients, log Z,
trained weights, with fixed seeds) and writes the SHA-256 of its bytes and the mean of its numbers;
`compare` runs them again and lists cases that differ, are missing or are new. Digests are
reproducible on one machine with one set of versions. Objects are found by name in any module, so
modules may move.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

import pyroebm
from pyroebm import Energy

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = ("kernels", "flows", "objectives", "targets", "energies", "partition", "infer")
Make = Callable[[], Any]

# -------------------------------------------------------------------------------------------------
# Names


class Names:
    """Public objects by name: `ebm.fit` is the `fit` of one of `places`, or of any `__all__`."""

    def __init__(self, *places: str) -> None:
        self._places = places

    def __getattr__(self, name: str) -> Any:
        for place in self._places:
            module = importlib.import_module(place)
            if name in module.__all__:
                return getattr(module, name)
        found = {id(value): value for value in self._everywhere(name)}
        if len(found) != 1:
            raise AttributeError(f"{len(found)} public objects of pyroebm are named {name}")
        return next(iter(found.values()))

    @staticmethod
    def _everywhere(name: str) -> Iterator[Any]:
        for found in pkgutil.walk_packages(pyroebm.__path__, "pyroebm."):
            if not found.name.endswith("__main__"):
                module = importlib.import_module(found.name)
                if name in getattr(module, "__all__", ()):
                    yield getattr(module, name)


ebm = Names("pyroebm", *(f"pyroebm.{place}" for place in PUBLIC if place != "infer"))
infer = Names("pyroebm.infer")

#: Public names that no case constructs.
EXEMPT = {
    "Adversarial": "base class",
    "Base": "base class",
    "Bijection": "base class",
    "BidirectionalAIS": "returned by bidirectional_ais",
    "ContinuousKernel": "base class",
    "ExponentialFamily": "base class",
    "FlowReport": "returned by evaluate_flow",
    "GradientKernel": "base class",
    "HasLosses": "protocol",
    "ImportanceResult": "returned by importance_sample",
    "Info": "returned by steps",
    "Kernel": "base class",
    "LayeredMachine": "base class",
    "LogZ": "returned by the estimators",
    "Objective": "base class",
    "Particles": "base class",
    "Proposal": "protocol",
    "SMCResult": "returned by tempered_smc",
    "State": "returned by steps",
    "Target": "base class",
    "TemperedState": "state of ParallelTempering",
    "TemperingReport": "returned by ParallelTempering.report",
    "TotalDimSelection": "returned by select_total_dim",
    "__version__": "a text",
}


def uncovered() -> list[str]:
    """Return public names of the package and its subpackages that are in no case and not exempt."""
    source, said = Path(__file__).read_text(encoding="utf-8"), []
    for place in ("pyroebm", *(f"pyroebm.{name}" for name in PUBLIC)):
        finder = "infer" if place == "pyroebm.infer" else "ebm"
        used = {"Energy", *EXEMPT, *re.findall(rf"\b{finder}\.(\w+)", source)}
        module = importlib.import_module(place)
        said += [
            f"no case uses {place}.{name}"
            for name in module.__all__
            if name not in used and not isinstance(getattr(module, name), types.ModuleType)
        ]
    return said


# -------------------------------------------------------------------------------------------------
# Digests


def feed(value: Any, take: Callable[[bytes, Any], None]) -> None:
    """Pass the bytes of a value to `take`, its parts in order, with the numbers in it."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        take(f"{array.dtype}{array.shape}".encode() + array.tobytes(), array)
    elif isinstance(value, np.ndarray | np.generic):
        feed(torch.as_tensor(np.asarray(value)), take)
    elif value is None or isinstance(value, bool | int | float | str | torch.Size | torch.dtype):
        take(repr(value).encode(), value if isinstance(value, int | float) else ())
    elif isinstance(value, nn.Module):
        feed(dict(value.state_dict()), take)
        feed([parameter.grad for parameter in value.parameters()], take)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            feed([str(key), part], take)
    elif dataclasses.is_dataclass(value):
        feed([getattr(value, field.name) for field in dataclasses.fields(value)], take)
    elif isinstance(value, list | tuple | Iterator):
        take(b"[", ())
        for part in value:
            feed(part, take)
        take(b"]", ())
    else:
        raise TypeError(f"no digest of a {type(value).__name__}")


def digest(make: Make) -> dict[str, Any]:
    """Return the SHA-256 of a case's result and of the global generators after it, and a mean."""
    sha, numbers = hashlib.sha256(), []

    def take(data: bytes, value: Any) -> None:
        sha.update(data)
        numbers.append(np.asarray(value, dtype=np.float64).ravel())

    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    feed(make(), take)
    sha.update(torch.get_rng_state().numpy().tobytes())
    sha.update(repr((random.getstate(), np.random.get_state())).encode())  # noqa: NPY002
    values = np.concatenate(numbers)
    values = values[np.isfinite(values)]
    return {
        "sha256": sha.hexdigest(),
        "mean": float(f"{values.mean() if len(values) else 0.0:.6g}"),
    }


# -------------------------------------------------------------------------------------------------
# What cases are made of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def stirred(module: Any, scale: float = 0.3, seed: int = 5) -> Any:
    """Return the module with every parameter changed at random."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def wells() -> Energy:
    return ebm.ManyWell(num_pairs=1)


def perceptron() -> Energy:
    return stirred(ebm.MLPEnergy((2,), (8,), scale=2.0, generator=seeded(1)), 0.2)


def machine() -> Energy:
    return stirred(ebm.BernoulliRBM(4, 3))


def deep_machine() -> Energy:
    return stirred(ebm.DeepBoltzmannMachine([4, 3, 2]))


def belief_network() -> nn.Module:
    return stirred(ebm.DeepBeliefNetwork([4, 3, 2]))


def classifier_energy() -> Energy:
    net = ebm.mlp(2, 3, (8,), zero_last=False, generator=seeded(2))
    return ebm.ClassifierEnergy(net, (2,), 3, scale=1.0)


def latent_energy() -> Energy:
    features = ebm.mlp(2, 4, (6,), zero_last=False, generator=seeded(1))
    return stirred(ebm.FeatureLatentEnergy(features, (2,), 3, generator=seeded(2)), 0.1)


def product_energy() -> Energy:
    features = ebm.mlp(2, 4, (6,), zero_last=False, generator=seeded(1))
    return stirred(ebm.ProductOfExpertsEnergy(features, 4, (2,), 8, generator=seeded(2)))


def small_flow() -> nn.Module:
    return stirred(ebm.NICE(2, num_layers=2, hidden_sizes=(8,)), 0.2)


class Quadratic(Energy):
    """Entries of any support with random pairwise couplings and fields."""

    def __init__(self, shape: tuple[int, ...], support: Any) -> None:
        super().__init__(shape, support)
        n = math.prod(shape)
        self.register_buffer("weight", 0.3 * normal(n, n, seed=3))
        self.register_buffer("bias", 0.5 * normal(n, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*self.batch_shape(x), -1)
        return -((x @ self.weight) * x).sum(-1) - x @ self.bias


def integers() -> Energy:
    return Quadratic((3,), constraints.integer_interval(-1, 2))


def positive() -> Energy:
    return ebm.Gamma([2.0, 0.7], [3.0, 0.5])


def sampled(kernel: Any, energy: Energy, **options: Any) -> Any:
    """Return the MCMC object after a short run."""
    settings = {"num_samples": 15, "warmup_steps": 50, "num_chains": 4, "seed": 1}
    mcmc = ebm.MCMC(kernel, **settings | {"compile": False, "progress": False} | options)
    mcmc.run(energy)
    return mcmc


def run_of(mcmc: Any) -> Any:
    warm = mcmc.get_samples(group_by_chain=True, warmup=True)
    return mcmc.get_samples(group_by_chain=True), mcmc.get_stats(), warm, mcmc.kernel, mcmc.state


def chains(kernel: Any, energy: Energy, **options: Any) -> Any:
    return run_of(sampled(kernel, energy, **options))


def untuned(kernel: Any, energy: Energy) -> Any:
    return chains(kernel, energy, adaptation=None, warmup_steps=0)


def gradient(energy: Energy, x: Tensor) -> list[Tensor | None]:
    """Return the gradient of the summed energy in its parameters."""
    parameters = list(energy.parameters())
    if not parameters:
        return []
    return list(torch.autograd.grad(energy(x).sum(), parameters, allow_unused=True))


def energy_values(energy: Energy) -> Any:
    """Values, slopes and draws."""
    x = energy.initial(6, seeded(1))
    values = [x, energy(x), energy.log_z, gradient(energy, x)]
    if x.is_floating_point() and not ebm.is_discrete(energy.support):
        values += [ebm.value_and_grad(energy, x), ebm.score(energy, x)]
    if energy.has_exact_draws:
        values.append(energy.sample(6, seeded(2)))
    return values


def target_values(target: Any) -> Any:
    values = [energy_values(target), target.mean, target.variance, target.mode_weights]
    return values if target.mode_weights is None else [*values, target.mode_of(values[0][0])]


def flow_values(flow: Any) -> Any:
    flow = stirred(flow)
    z = flow.rsample_base(6, seeded(1))
    x, log_q = flow.forward_and_log_prob(z)
    log_q.sum().backward()
    drawn = flow().sample((3,))
    return z, x, log_q, flow.log_prob(x.detach()), flow.path_log_prob(x.detach()), drawn, flow


def transform_values(transform: Any) -> Any:
    z = normal(5, transform.dim, seed=6)
    x = stirred(transform)(z)
    return x, transform.inv(x.detach().clone()), transform.log_abs_det_jacobian(z, x)


def base_values(base: Any) -> Any:
    z = stirred(base).rsample(6, seeded(1), torch.float64, torch.device("cpu"))
    return z, base.log_prob(z), base.distribution(torch.float64, torch.device("cpu")).sample((3,))


def trained(objective: Any, energy: Energy, data: Any, **options: Any) -> Any:
    """Return losses and metrics of a few steps, weights, gradients, and the objective's state."""
    settings = {"num_steps": 3, "batch_size": 8, "seed": 2, "progress": False}
    steps = list(ebm.fit_steps(energy, objective, data, **settings | options))
    return steps, energy, objective


def moons() -> Tensor:
    return ebm.TwoMoons().sample(16, seeded(3))


def bits(columns: int = 4) -> Tensor:
    return (normal(16, columns, seed=7) > 0.3).double()


def of_data(objective: Any, energy: Energy | None = None) -> Any:
    return trained(objective, perceptron() if energy is None else energy, moons())


def of_bits(objective: Any, energy: Energy | None = None) -> Any:
    return trained(objective, machine() if energy is None else energy, bits())


def by(objective: Any, **options: Any) -> Any:
    return functools.partial(objective, num_samples=32, **options)


def of_flow(objective: Any, flow: Any = None, energy: Energy | None = None) -> Any:
    flow, energy = small_flow() if flow is None else flow, wells() if energy is None else energy
    made = objective(energy)
    return list(ebm.fit_steps(flow, made, num_steps=3, seed=3, progress=False)), flow, made


def timeless(values: Any) -> Any:
    """Return metrics without wall times."""
    if not isinstance(values, Mapping):
        return values
    timed = re.compile("second|minute")
    return {key: timeless(value) for key, value in values.items() if not timed.search(key)}


def scratch(use: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return use(Path(folder))


# -------------------------------------------------------------------------------------------------
# The cases: a line each

CONTINUOUS: dict[str, Make] = {
    "adjusted-mclmc": lambda: ebm.AdjustedMCLMC(0.3),
    "barker": lambda: ebm.Barker(0.5),
    "chees": lambda: ebm.ChEES(0.3, trajectory_length=2.0),
    "hmc": lambda: ebm.HMC(0.3, num_steps=5),
    "hmc-dense": lambda: ebm.HMC(0.3, ebm.Dense(torch.tensor([[0.7, 0.0], [0.2, 0.5]])), 5),
    "hmc-diagonal": lambda: ebm.HMC(0.3, ebm.Diagonal(torch.tensor([0.7, 1.5])), 5),
    "hmc-low-rank": lambda: ebm.HMC(
        0.3,
        ebm.LowRank(torch.ones(2), torch.tensor([[0.6], [0.8]]), torch.tensor([2.0])),
        5,
    ),
    "independence": lambda: ebm.IndependenceMetropolis(small_flow()),
    "jumps": lambda: ebm.LocalGlobalMixture(ebm.HMC(0.3, num_steps=3), small_flow(), every=2),
    "langevin": lambda: ebm.langevin(drift=0.02, noise=0.1),
    "mala": lambda: ebm.MALA(0.5),
    "mala-metric": lambda: ebm.MALA(0.5, torch.tensor([0.5, 2.0])),
    "mclmc": lambda: ebm.MCLMC(0.3),
    "metropolis-underdamped": lambda: ebm.GHMC(0.3),
    "nuts": lambda: ebm.NUTS(0.5),
    "random-walk": lambda: ebm.RandomWalk(0.5),
    "sgld": lambda: ebm.StochasticGradientLangevin(0.1, decay=0.5),
    "tempering": lambda: ebm.ParallelTempering(ebm.HMC(0.3, num_steps=3), [1.0, 0.5, 0.2]),
    "tempering-reference": lambda: ebm.ParallelTempering(
        ebm.MALA(0.3),
        [1.0, 0.5, 0.0],
        ebm.Gaussian(torch.zeros(2), scale=2.0),
    ),
    "ula": lambda: ebm.ULA(0.1),
    "underdamped": lambda: ebm.BAOAB(0.2),
}
DISCRETE: dict[str, Make] = {
    "block-gibbs": lambda: chains(ebm.BlockGibbs(), machine().joint()),
    "block-gibbs-ising": lambda: chains(ebm.BlockGibbs(), ebm.Ising((4, 4), 0.3)),
    "dmala": lambda: chains(ebm.DMALA(0.8), ebm.Ising((3, 3), 0.3)),
    "dmala-potts": lambda: chains(ebm.DMALA(0.8), ebm.Potts((3, 3), 3, 0.3)),
    "dula": lambda: chains(ebm.DULA(0.6), ebm.Ising((3, 3), 0.3)),
    "gibbs-bits": lambda: chains(ebm.Gibbs(), stirred(ebm.BoltzmannMachine(5))),
    "gibbs-integers": lambda: chains(ebm.Gibbs(), integers()),
    "gibbs-one-hot": lambda: chains(ebm.Gibbs(), ebm.Potts((3, 3), 3, 0.3)),
    "gibbs-random": lambda: chains(ebm.Gibbs(scan="random"), ebm.Ising((3, 3), 0.3)),
    "gibbs-with-gradients": lambda: chains(ebm.GibbsWithGradients(), ebm.Ising((3, 3), 0.3)),
    "gibbs-with-gradients-integers": lambda: chains(ebm.GibbsWithGradients(), integers()),
    "layer-gibbs": lambda: ebm.ais(
        machine().joint(),
        ebm.base_rates(machine().joint()),
        ebm.LayerGibbs(),
        betas=8,
        num_chains=6,
    ),
    "tempering": lambda: chains(
        ebm.ParallelTempering(ebm.Gibbs(), [1.0, 0.6, 0.3]),
        ebm.Ising((3, 3), 0.5),
    ),
}


def windows(**options: Any) -> Any:
    return ebm.WindowAdaptation(**options)


def tuned(kernel: Any, adaptation: Any, energy: Energy | None = None) -> Any:
    return chains(kernel, wells() if energy is None else energy, adaptation=adaptation)


ADAPTATION: dict[str, Make] = {
    "chees": lambda: tuned(ebm.ChEES(), ebm.ChEESAdaptation(windows())),
    "dense": lambda: tuned(ebm.HMC(), windows(metric="dense")),
    "energy-variance": lambda: tuned(ebm.MCLMC(), ebm.EnergyVarianceAdaptation()),
    "ladder": lambda: tuned(
        ebm.ParallelTempering(ebm.HMC(num_steps=3), [1.0, 0.5, 0.2]),
        ebm.LadderAdaptation(),
    ),
    "low-rank": lambda: tuned(ebm.NUTS(), windows(metric="low_rank"), ebm.scales_gaussian(6)),
    "no-metric": lambda: tuned(ebm.MALA(), windows(metric=None)),
    "per-chain": lambda: tuned(ebm.MALA(), windows(step_size="per_chain")),
    "pooled": lambda: tuned(ebm.NUTS(), windows(step_size="pooled"), ebm.Funnel(3)),
}


def two_site_model(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean.sum(-1, keepdim=True), 1.0), obs=y)


def counts_model(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


COUNTS = torch.tensor([2.0, 4.0, 3.0])


def resumed_from_store(folder: Path) -> Any:
    mcmc = ebm.MCMC(ebm.MALA(0.3), 10, 20, 4, seed=2, chain_batch_size=2, progress=False)
    mcmc.run(wells(), store=folder / "run")
    mcmc.run_more(5)
    again = ebm.MCMC(ebm.MALA(0.3), 20, 20, 4, seed=2, chain_batch_size=2, progress=False)
    again.resume(wells(), folder / "run")
    posterior = ebm.open_run(folder / "run")["posterior"]
    return posterior["x"].values, again.get_samples(group_by_chain=True)


def from_state_dict() -> Any:
    mcmc = sampled(ebm.MALA(0.3), wells())
    other = ebm.MCMC(ebm.MALA(0.3), 15, 50, 4, seed=1, progress=False)
    other.load_state_dict(mcmc.state_dict(), wells())
    other.run_more(5)
    return run_of(other)


def judged() -> Any:
    mcmc = sampled(ebm.MALA(0.3), wells(), num_samples=60)
    posterior = mcmc.to_arviz()["posterior"]["x"].values
    return (
        mcmc.diagnose(),
        mcmc.diagnostics(),
        mcmc.stuck_chains(),
        posterior,
        mcmc.summary().values,
    )


def subsampled() -> Any:
    def loss(x: Tensor, row: Tensor) -> Tensor:
        return 0.5 * (row - x).square().sum(-1)

    energy = ebm.MinibatchEnergy(ebm.Gaussian(torch.zeros(1)), loss, normal(20, seed=8), 5)
    return chains(ebm.StochasticGradientLangevin(0.01), energy)


def pyro_kernel() -> Any:
    kernel = ebm.PyroKernel(ebm.NUTS(), wells())
    mcmc = pyro.infer.MCMC(kernel, num_samples=10, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()


def pyro_names(kernel: Any) -> Any:
    mcmc = infer.MCMC(kernel, 10, 60, num_chains=3, disable_progbar=True)
    mcmc.run(normal(5, seed=9) + 1.0)
    return mcmc.get_samples(group_by_chain=True), mcmc.diagnostics()


def tempered_report() -> Any:
    mcmc = sampled(ebm.ParallelTempering(ebm.HMC(0.3, num_steps=3), [1.0, 0.5, 0.2]), wells())
    return mcmc.kernel.report(mcmc.state)


SAMPLING: dict[str, Make] = {
    "blocks": lambda: chains(ebm.NUTS(), wells(), num_chains=5, chain_batch_size=2, thinning=2),
    "compiled": lambda: chains(ebm.HMC(0.3, num_steps=5), wells(), compile=True),
    "constrained": lambda: chains(ebm.NUTS(), positive()),
    "float32": lambda: chains(ebm.NUTS(), ebm.ManyWell(1, dtype=torch.float32)),
    "image": lambda: chains(ebm.HMC(), ebm.Gaussian(torch.linspace(-1, 1, 12).reshape(2, 2, 3))),
    "infer-hmc": lambda: pyro_names(infer.HMC(two_site_model, step_size=0.1, num_steps=4)),
    "infer-nuts": lambda: pyro_names(infer.NUTS(two_site_model)),
    "infer-nuts-dense": lambda: pyro_names(infer.NUTS(two_site_model, full_mass=True)),
    "judged": judged,
    "minibatch": subsampled,
    "model": lambda: chains(ebm.NUTS(), ebm.ModelEnergy(two_site_model, normal(5, seed=9))),
    "moments": lambda: sampled(ebm.MALA(0.3), wells(), keep="moments").get_moments(),
    "particles": lambda: chains(ebm.NUTS(), ebm.DW4()),
    "pyro-kernel": pyro_kernel,
    "resumed": from_state_dict,
    "scalar": lambda: chains(ebm.NUTS(), ebm.DoubleWell()),
    "smc": lambda: ebm.tempered_smc(
        wells(),
        ebm.Gaussian(torch.zeros(2), scale=3.0),
        ebm.HMC(0.3, num_steps=3),
        64,
        num_islands=4,
        num_moves=2,
    ),
    "smc-discrete": lambda: ebm.tempered_smc(
        ebm.Ising((3, 3), 0.3),
        ebm.IndependentSites(ebm.Ising((3, 3))),
        ebm.Gibbs(),
        64,
    ),
    "store": lambda: scratch(resumed_from_store),
    "tempering-report": tempered_report,
    "transported": lambda: chains(ebm.NUTS(), ebm.PullbackEnergy(small_flow(), wells())),
}

SMALL = {"hidden_sizes": (8,)}
ONE_LAYER = {"num_layers": 1, "hidden_sizes": (8,)}


def zuko_layer(flow: Any) -> nn.Module:
    return next(part for part in flow.transform.parts if isinstance(part, ebm.ZukoTransform))


def symmetrized(weights: str = "uniform") -> nn.Module:
    return ebm.Symmetrized(ebm.RealNVP(2, 2, **SMALL), ebm.sign_flips(2), weights)


def equivariant() -> nn.Module:
    return ebm.EquivariantFlow(4, 2, num_cells=6, num_steps=8)


FLOWS: dict[str, Make] = {
    "autoregressive": lambda: ebm.AutoregressiveFlow(3, 2, **SMALL),
    "autoregressive-density": lambda: ebm.AutoregressiveFlow(2, 2, fast="density", **SMALL),
    "continuous": lambda: ebm.ContinuousFlow(2, (4,), num_frequencies=1),
    "equivariant": equivariant,
    "flow-of-transforms": lambda: ebm.Flow(
        [ebm.AffineCoupling(3, generator=seeded(1), **SMALL), ebm.Permutation([2, 0, 1])],
        dim=2,
        total_dim=3,
        conditional=ebm.ConditionalGaussian(2, 1, (8,), generator=seeded(2)),
    ),
    "nice": lambda: ebm.NICE(2, **SMALL),
    "nice-scalar": lambda: ebm.NICE(1, shift=False, **SMALL),
    "realnvp": lambda: ebm.RealNVP(3, 4, **SMALL),
    "realnvp-mixture": lambda: ebm.RealNVP(
        2,
        2,
        base=ebm.MixtureBase(2, 3, learn_weights=True),
        **SMALL,
    ),
    "realnvp-redundant": lambda: ebm.RealNVP(1, 4, total_dim=3, **SMALL),
    "realnvp-student": lambda: ebm.RealNVP(2, 2, base=ebm.StudentBase(2), **SMALL),
    "redundant-nice": lambda: ebm.RedundantNICE(2, 3, 2, **SMALL),
    "spline": lambda: ebm.SplineFlow(2, 2, **SMALL),
    "spline-autoregressive": lambda: ebm.SplineFlow(3, 2, autoregressive=True, **SMALL),
    "symmetrized": symmetrized,
    "symmetrized-learned": lambda: symmetrized("learned"),
}
TRANSFORMS: dict[str, Make] = {
    "additive-coupling": lambda: ebm.AdditiveCoupling(3, generator=seeded(1), **SMALL),
    "affine-coupling": lambda: ebm.AffineCoupling(3, generator=seeded(1), **SMALL),
    "loft": lambda: ebm.Loft(3, threshold=0.5),
    "pair-field": lambda: ebm.PairField(4, 2, num_cells=6, num_steps=8),
    "permutation": lambda: ebm.Permutation([2, 0, 1]),
    "plu-linear": lambda: ebm.PLULinear(torch.linalg.qr(normal(3, 3))[0]),
    "shift": lambda: ebm.Shift(normal(3)),
    "zuko": lambda: zuko_layer(ebm.SplineFlow(3, **ONE_LAYER)),
}
BASES: dict[str, Make] = {
    "mixture": lambda: ebm.MixtureBase(2, 3, learn_weights=True),
    "standard-normal": lambda: ebm.StandardNormal(2),
    "student": lambda: ebm.StudentBase(2),
}


def reloaded(folder: Path) -> Any:
    flow = stirred(ebm.RealNVP(2, 2, base=ebm.MixtureBase(2, 3), **SMALL))
    ebm.save(flow, folder / "flow.safetensors")
    return flow_values(ebm.load(folder / "flow.safetensors"))


def extended() -> Any:
    flow = stirred(ebm.RedundantNICE(2, 3, 2, **SMALL))
    energy = ebm.AugmentedEnergy(wells(), flow.conditional, 2)
    return energy_values(energy), flow.log_prob_x(normal(4, 2)), flow.joint_entropy()


def judged_flow(flow: Any) -> Any:
    mixture = ebm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], scale=0.5, weights=[0.9, 0.1])
    draws = mixture.sample(100, seeded(4))
    return ebm.evaluate_flow(flow, mixture, 400, draws, num_distances=50)


def conditional() -> Any:
    distribution = ebm.ConditionalGaussian(2, 2, generator=seeded(1), **SMALL)
    return distribution.parts(normal(4, 2)), distribution.sample(normal(4, 2), 3, seeded(2))


QUARTER_TURN, REFLECTION = [[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]
FLOW_USES: dict[str, Make] = {
    "conditional": conditional,
    "energy": lambda: energy_values(ebm.FlowEnergy(small_flow())),
    "extended": extended,
    "group-generated": lambda: ebm.generated_group(torch.tensor([QUARTER_TURN, REFLECTION])),
    "group-permutations": lambda: ebm.permutations(3, num_coordinates=2),
    "importance": lambda: ebm.importance_sample(small_flow(), wells(), 500),
    "importance-distribution": lambda: ebm.importance_sample(
        dist.StudentT(5.0, torch.zeros(2), 2.0).to_event(1),
        wells(),
        500,
    ),
    "judge": lambda: judged_flow(small_flow()),
    "judge-redundant": lambda: judged_flow(stirred(ebm.RedundantNICE(2, 3, 2, **SMALL), 0.2)),
    "saved": lambda: scratch(reloaded),
    "transported": lambda: energy_values(ebm.PullbackEnergy(small_flow(), wells())),
}


def generator_net(**options: Any) -> nn.Module:
    return ebm.MLPGenerator((2,), 3, (8,), generator=seeded(1), **options)


def fisher() -> Any:
    one, two = ebm.Gaussian(torch.zeros(2), scale=2.0), ebm.Gaussian(torch.ones(2), scale=1.5)
    x = two.sample(50, seeded(1))
    plain = ebm.fisher_divergence(one, two, x)
    return plain, ebm.sliced_fisher_divergence(one, two, x, 2, generator=seeded(2))


def labeled() -> tuple[Tensor, Tensor]:
    return moons(), torch.arange(16) % 3


def short_chains() -> Any:
    return ebm.ContrastiveDivergence(3, ebm.MALA(0.3))


def noise_distribution() -> Any:
    return ebm.gaussian_noise(moons(), 1.5)


def centered(energy: Energy) -> Any:
    options = {"transform": ebm.Centering(0.2), "penalties": [ebm.Sparsity(0.1, 1.0)]}
    return trained(ebm.PersistentCD(8), energy, bits(), **options), options["transform"]


OBJECTIVES: dict[str, Make] = {
    "adversarial-flow": lambda: of_data(ebm.AdversarialFlow(small_flow(), gradient_penalty=0.1)),
    "centering-and-sparsity": lambda: centered(machine()),
    "centering-deep": lambda: centered(deep_machine()),
    "conditional-nce": lambda: of_data(ebm.ConditionalNCE(0.5, 2)),
    "contrastive-divergence": lambda: of_data(short_chains()),
    "contrastive-divergence-bits": lambda: of_bits(ebm.ContrastiveDivergence(2)),
    "contrastive-divergence-boltzmann": lambda: of_bits(
        ebm.ContrastiveDivergence(2),
        stirred(ebm.BoltzmannMachine(4)),
    ),
    "contrastive-divergence-latent": lambda: of_data(ebm.ContrastiveDivergence(2), latent_energy()),
    "deep-directed": lambda: of_data(ebm.DeepDirected(generator_net(batch_norm=True))),
    "denoising": lambda: of_data(ebm.DenoisingScoreMatching([0.1, 0.5], control_variate=True)),
    "exact-likelihood": lambda: of_bits(ebm.ExactLikelihood()),
    "fisher": fisher,
    "flow-contrastive": lambda: of_data(ebm.FlowContrastive(small_flow())),
    "hybrid-classifier": lambda: trained(ebm.Hybrid(), classifier_energy(), labeled()),
    "hybrid-joint": lambda: trained(ebm.Hybrid(short_chains()), classifier_energy(), labeled()),
    "improved-cd": lambda: of_data(ebm.ImprovedCD(8, 4, ebm.ULA(0.1), buffer_size=30)),
    "mean-field-likelihood": lambda: of_bits(ebm.MeanFieldLikelihood(), deep_machine()),
    "minimum-probability-flow": lambda: of_bits(ebm.MinimumProbabilityFlow(2)),
    "noise-contrastive": lambda: of_data(ebm.NoiseContrastive(noise_distribution(), nu=2.0)),
    "noise-contrastive-flow": lambda: of_data(ebm.NoiseContrastive(small_flow())),
    "non-negative-score-matching": lambda: trained(
        ebm.NonNegativeScoreMatching(),
        stirred(ebm.MLPEnergy((2,), (8,), support=constraints.positive, scale=2.0), 0.2),
        moons().abs() + 0.1,
    ),
    "persistent-cd": lambda: of_bits(ebm.PersistentCD(8, 2)),
    "persistent-cd-compiled": lambda: of_data(
        ebm.ReplayBufferCD(8, 2, ebm.CompiledKernel(ebm.ULA(0.1))),
    ),
    "persistent-cd-deep": lambda: of_bits(ebm.PersistentCD(8, 2), deep_machine()),
    "persistent-cd-replay": lambda: of_data(
        ebm.ReplayBufferCD(8, 2, ebm.ULA(0.1), buffer_size=30, restart=0.3),
    ),
    "persistent-cd-tempered": lambda: of_bits(ebm.PersistentCD(6, betas=[1.0, 0.5])),
    "pseudolikelihood": lambda: of_bits(ebm.Pseudolikelihood(2), stirred(ebm.BoltzmannMachine(4))),
    "ranking-nce": lambda: of_data(ebm.RankingNCE(noise_distribution(), 3)),
    "ratio-matching": lambda: of_bits(ebm.RatioMatching()),
    "score-matching": lambda: of_data(ebm.ScoreMatching(0.05)),
    "short-run": lambda: of_data(ebm.ShortRun(5, ebm.langevin(0.02, 0.05))),
    "sliced-score-matching": lambda: of_data(ebm.SlicedScoreMatching(2, distribution="rademacher")),
    "sliced-score-matching-finite": lambda: of_data(
        ebm.SlicedScoreMatching(2, finite_difference=0.1),
    ),
    "vera": lambda: of_data(ebm.VERA(generator_net(sigma=0.2), 5)),
}


def svi(stl: bool) -> Any:
    flow, energy = stirred(ebm.RedundantNICE(2, 3, 2, **SMALL), 0.2), wells()
    model, guide = ebm.flow_model(flow, energy), ebm.flow_guide(flow, energy, stl=stl)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    steps = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    losses = [steps.step() for _ in range(3)]
    return losses, flow, Predictive(guide, num_samples=5, parallel=True, return_sites=("x", "y"))()


def guided() -> Any:
    guide = ebm.FlowGuide(counts_model, ebm.NICE(1, **SMALL))
    steps = SVI(counts_model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [steps.step(COUNTS) for _ in range(3)]
    fitted = of_flow(by(ebm.ReverseKL), guide.flow, guide.energy(COUNTS))
    return losses, fitted, guide.sample(4, seeded(1)), guide.median(COUNTS)


def matched() -> Any:
    flow = equivariant()
    return ebm.match_flow(flow, ebm.DW4().initial(50, seeded(1)), num_pairs=300), flow


def selected() -> Any:
    options = {"num_steps": 2, "num_evaluation_samples": 50, "progress": False}
    make = functools.partial(ebm.ReverseKL, num_samples=16)
    found = ebm.select_total_dim(ebm.DoubleWell(), (1, 2), make_objective=make, **options)
    return found.values, found.standard_errors, found.flow


def flow_draws() -> Tensor:
    return wells().sample(50, seeded(1))


VARIATIONAL: dict[str, Make] = {
    "alpha-bootstrap": lambda: of_flow(
        by(ebm.AlphaBootstrap, num_temperatures=2, kernel=ebm.HMC(0.2, num_steps=2), reuse=2)
    ),
    "annealed-reweighting": lambda: of_flow(by(ebm.AnnealedReweighting, buffer_size=200, reuse=2)),
    "compiled-kl": lambda: of_flow(by(ebm.CompiledKL)),
    "default": lambda: of_flow(by(ebm.ReverseKL), ebm.RealNVP(2, 2, **SMALL)),
    "estimate-augmented-kl": lambda: ebm.estimate_augmented_kl(small_flow(), wells(), 300),
    "flow-guide": guided,
    "forward-kl": lambda: of_flow(lambda _: ebm.ForwardKL(flow_draws(), num_samples=32)),
    "forward-kl-path": lambda: of_flow(
        lambda energy: ebm.ForwardKL(flow_draws(), energy=energy, num_samples=32, gradient="path")
    ),
    "log-variance": lambda: of_flow(by(ebm.LogVariance)),
    "match-flow": matched,
    "reverse-kl": lambda: of_flow(by(ebm.ReverseKL)),
    "reverse-kl-total": lambda: of_flow(by(ebm.ReverseKL, gradient="total")),
    "reverse-kl-redundant": lambda: of_flow(by(ebm.ReverseKL), ebm.RedundantNICE(2, 4, 2, **SMALL)),
    "select-total-dim": selected,
    "svi": lambda: svi(False),
    "svi-stl": lambda: svi(True),
    "symmetrized-kl": lambda: of_flow(by(ebm.SymmetrizedKL), symmetrized("learned")),
}


def line(u: Tensor) -> Tensor:
    return torch.stack([4 * u, 0 * u], -1).unsqueeze(0)


TARGETS: dict[str, Make] = {
    "banana": lambda: ebm.Banana(),
    "bernoulli": lambda: ebm.BernoulliProduct([0.4, -1.2, 2.0]),
    "beta": lambda: ebm.Beta([2.0, 0.6], 3.0),
    "categorical": lambda: ebm.CategoricalOneHot([[0.4, -1.2, 0.1], [1.0, 0.0, -1.0]]),
    "checkerboard": lambda: ebm.Checkerboard(),
    "circles": lambda: ebm.Circles(),
    "dirichlet": lambda: ebm.Dirichlet([0.8, 2.0, 1.5]),
    "double-well": lambda: ebm.DoubleWell(),
    "dw4": lambda: ebm.DW4(),
    "eight-gaussians": lambda: ebm.eight_gaussians(),
    "exponential": lambda: ebm.Exponential([2.5, 1.0]),
    "funnel": lambda: ebm.Funnel(),
    "gamma": positive,
    "gaussian": lambda: ebm.Gaussian([1.0, -2.0], covariance=[[2.0, 0.6], [0.6, 1.0]]),
    "gaussian-mixture": lambda: ebm.GaussianMixture.gmm40(),
    "half-disc": lambda: ebm.HalfDisc(),
    "lennard-jones": lambda: ebm.LennardJones("once", 5),
    "log-normal": lambda: ebm.LogNormal([0.3, -1.0], [0.5, 0.25]),
    "many-well": lambda: ebm.ManyWell(2),
    "noisy-curves": lambda: ebm.NoisyCurves(line, noise=0.5, num_nodes=40),
    "phi4": lambda: ebm.Phi4(6),
    "phi4-free": lambda: ebm.Phi4(6, 1.0, 0.0),
    "pinwheel": lambda: ebm.Pinwheel(),
    "ring": lambda: ebm.Ring(),
    "rosenbrock": lambda: ebm.Rosenbrock(),
    "scales-gaussian": lambda: ebm.scales_gaussian(5),
    "spin": lambda: ebm.SpinProduct([0.4, -1.2, 0.1]),
    "two-moons": lambda: ebm.TwoMoons(),
    "two-spirals": lambda: ebm.TwoSpirals(),
}


def tilt(z: Tensor) -> Tensor:
    return 0.3 * z.square().square().sum(-1)


def rbm_values(rbm: Any) -> Any:
    v = rbm.initial(6, seeded(1))
    hidden = rbm.hidden_given(v).mean
    found = [energy_values(rbm), rbm.log_likelihood(v), hidden, rbm.visible_given(hidden).mean]
    return found, chains(ebm.BlockGibbs(), rbm.joint(), warmup_steps=5, adaptation=None)


def boltzmann_values(units: str) -> Any:
    found = stirred(ebm.BoltzmannMachine(4, 2, units=units))
    v = found.marginal().initial(6, seeded(1))
    values = [energy_values(found), energy_values(found.marginal()), found.mean_field(v)]
    return values, found.variational_bound(v), found.log_likelihood(v)


def deep_values(visible: str) -> Any:
    found = stirred(ebm.DeepBoltzmannMachine([4, 3, 2], visible=visible))
    v = found.initial(6, seeded(1))[:, :4]
    values = [energy_values(found), found.mean_field(v), found.variational_bound(v)]
    return values, found.log_likelihood(v), chains(ebm.BlockGibbs(), found, warmup_steps=5)


def belief_values() -> Any:
    network, v = belief_network(), bits()
    drawn = network.sample(4, seeded(1), num_steps=5)
    bounds = network.variational_bound(v), network.log_weights(v, 3, seeded(2))
    return drawn, bounds, network.log_likelihood(v), energy_values(network.joint())


def layers_values() -> Any:
    layers = ebm.Layers((normal(3, 2), normal(2, 2, seed=1)), (normal(3), normal(2), normal(2)))
    means = layers.mean_field(layers.pass_up(bits(3)))
    return layers.log_partition(), layers.sample(4, seeded(1)), layers.mix(layers, 0.5), means


def of_classes(energy: Any) -> Any:
    x, y = labeled()
    given = energy_values(energy.given(1))
    return energy_values(energy), energy.class_log_prob(x), energy.joint_energy(x, y), given


def on_a_path() -> Any:
    path = ebm.GeometricPath(wells(), torch.tensor([1.0, 0.5, 0.0]), ebm.Gaussian(torch.zeros(2)))
    return path(normal(3, 2)), path.slope(normal(3, 2))


def lattice_values(lattice: Energy) -> Any:
    return energy_values(lattice), chains(ebm.BlockGibbs(), lattice, warmup_steps=5)


ENERGIES: dict[str, Make] = {
    "bernoulli-rbm": lambda: rbm_values(machine()),
    "boltzmann-bits": lambda: boltzmann_values("bits"),
    "boltzmann-spins": lambda: boltzmann_values("spins"),
    "classifier": lambda: of_classes(classifier_energy()),
    "compose": lambda: energy_values(
        ebm.compose([machine(), stirred(ebm.BernoulliRBM(3, 2), seed=6)]),
    ),
    "compressed": lambda: energy_values(ebm.LogRegularized(ebm.LennardJones("once", 4), 5.0)),
    "conditioned": lambda: energy_values(
        ebm.Conditioned(ebm.Phi4(6), torch.zeros(6), torch.arange(6) < 2),
    ),
    "conv": lambda: energy_values(
        stirred(ebm.ConvEnergy((2, 5, 4), (4, 6), scale=2.0, generator=seeded(1))),
    ),
    "deep-belief": belief_values,
    "deep-boltzmann": lambda: deep_values("bits"),
    "deep-boltzmann-gaussian": lambda: deep_values("gaussian"),
    "distribution": lambda: energy_values(ebm.DistributionEnergy(dist.Gamma(2.0, torch.ones(())))),
    "feature-latent": lambda: energy_values(latent_energy()),
    "feature-latent-joint": lambda: energy_values(latent_energy().joint()),
    "gaussian-rbm-cho": lambda: rbm_values(stirred(ebm.GaussianRBM(2, 3, convention="cho"))),
    "gaussian-rbm-hinton": lambda: rbm_values(stirred(ebm.GaussianRBM(2, 3))),
    "ising": lambda: lattice_values(ebm.Ising((4, 4), 0.3, 0.1)),
    "ising-open": lambda: energy_values(ebm.Ising((5,), 0.3, 0.1, periodic=False)),
    "layers": layers_values,
    "mlp": lambda: energy_values(perceptron()),
    "mlp-spectral": lambda: energy_values(
        stirred(ebm.MLPEnergy((3,), (8, 8), spectral_norm=True, generator=seeded(1))),
    ),
    "mlp-spins": lambda: energy_values(
        stirred(ebm.MLPEnergy((3,), (8,), support=ebm.spin, scale=None, generator=seeded(1))),
    ),
    "model": lambda: energy_values(ebm.ModelEnergy(two_site_model, normal(5, seed=9))),
    "neural": lambda: energy_values(
        ebm.NeuralEnergy(ebm.mlp(3, 1, (8,), generator=seeded(1)), (3,), scale=2.0),
    ),
    "path": on_a_path,
    "potts": lambda: lattice_values(ebm.Potts((4, 4), 3, 0.3)),
    "product-of-experts": lambda: energy_values(product_energy()),
    "relaxed": lambda: energy_values(ebm.Relaxed(ebm.Ising((3, 3), 0.3))),
    "sum": lambda: energy_values(ebm.Sum(wells(), ebm.Gaussian(torch.zeros(2)))),
    "tempered": lambda: energy_values(ebm.Tempered(wells(), 0.5)),
    "tied-rbm": lambda: energy_values(ebm.TiedRBM(machine(), (2, 1))),
    "tilted": lambda: energy_values(ebm.Tilted(ebm.Gaussian(torch.zeros(2)), tilt)),
    "unconstrained": lambda: energy_values(ebm.Unconstrained(ebm.Dirichlet([0.8, 2.0, 1.5]))),
    "unnormalized": lambda: energy_values(ebm.Unnormalized(lambda x: -(x**4))),
}


def both_ways() -> Any:
    both = ebm.bidirectional_ais(machine(), betas=10, num_chains=8)
    return both, ebm.bennett_acceptance_ratio(both.forward, both.reverse)


def layered_path() -> Any:
    path = ebm.LayeredPath(ebm.base_rates(machine()), machine().layers())
    state = path.move(path.draw_base(5, seeded(1)), 0.5, seeded(2))
    return path.log_weight(state, 0.5, 0.6), path.log_z, state


SHORT = {"betas": 8, "num_chains": 6}
PARTITION: dict[str, Make] = {
    "ais": lambda: ebm.ais(machine(), ebm.base_rates(machine(), bits()), **SHORT),
    "ais-continuous": lambda: ebm.ais(wells(), ebm.Gaussian(torch.zeros(2), scale=2.0), **SHORT),
    "ais-ising": lambda: ebm.ais(ebm.Ising((3, 3), 0.3), **SHORT),
    "bidirectional_ais": both_ways,
    "bridge": lambda: ebm.bridge(wells(), ebm.Gaussian(torch.zeros(2)), num_samples=100),
    "exact": lambda: ebm.exact(ebm.Ising((3, 3), 0.3) * 1.0),
    "exact-deep": lambda: ebm.exact(deep_machine()),
    "expectation": lambda: ebm.expectation(ebm.DoubleWell(), lambda x: torch.stack([x, x * x], -1)),
    "importance": lambda: (
        ebm.importance_sample(dist.StudentT(5.0, 0.0, 1.0), ebm.Gaussian(0.0), 300).log_z
    ),
    "independent-layers": lambda: energy_values(
        ebm.IndependentLayers(ebm.base_rates(machine(), bits()), machine()),
    ),
    "independent-sites": lambda: energy_values(ebm.IndependentSites(ebm.Potts((3, 3), 3))),
    "layered-path": layered_path,
    "quadrature": lambda: ebm.quadrature(wells()),
    "reverse-ais": lambda: ebm.reverse_ais(machine(), **SHORT),
    "schedule": lambda: ebm.schedule(machine(), num_temperatures=4),
    "smc": lambda: ebm.smc(machine(), num_particles=32),
    "smc-continuous": lambda: ebm.smc(
        wells(),
        ebm.Gaussian(torch.zeros(2), scale=2.0),
        num_particles=32,
    ),
    "thermodynamic-integration": lambda: ebm.thermodynamic_integration(
        machine(),
        num_temperatures=4,
        num_samples=20,
        warmup_steps=20,
        num_chains=4,
    ),
}


def resumed_training(folder: Path) -> Any:
    """Interrupt a training after a few steps and continue it from the checkpoint.

    A new module is loaded from the checkpoint.
    """

    def run(energy: Energy, resume: bool, stop: int) -> Any:
        objective, transform = ebm.PersistentCD(6, betas=(1.0, 0.5)), ebm.Centering(0.1)
        settings = {"num_steps": 7, "batch_size": 6, "seed": 5, "progress": False, "resume": resume}
        files = {"checkpoint": folder / "run.safetensors", "log": folder / "log.jsonl"}
        steps = ebm.fit_steps(energy, objective, bits(), transform=transform, **files, **settings)
        seen = list(itertools.islice(steps, stop))
        steps.close()
        return seen, energy, objective, transform

    runs = [run(machine(), False, 3), run(ebm.BernoulliRBM(4, 3), True, 7)]
    return runs, [timeless(row) for row in ebm.read_log(folder / "log.jsonl")]


def fine_tuned(model: Any) -> Any:
    classifier, labels = ebm.Classifier(model, 3), torch.arange(16) % 3
    options = {"num_epochs": 2, "batch_size": 8, "progress": False}
    history = ebm.fit(classifier, ebm.CrossEntropy(), (bits(), labels), **options)
    return history["loss"], classifier, classifier.error(bits(), labels)


def completed(model: Any, observed: Tensor) -> Tensor:
    known = torch.arange(observed.shape[1]) < 2
    return ebm.impute(model, observed, known, num_sweeps=10, generator=seeded(0), progress=False)


def rolled_back() -> Any:
    guard = ebm.Guard(rollback=True, max_rollbacks=50, max_energy_gap=0.6)
    objective, options = ebm.PersistentCD(8), {"guard": guard, "num_steps": 8}
    return trained(objective, stirred(ebm.BernoulliRBM(4, 3), 1.0), bits(), **options)


def optimized() -> Any:
    options = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.5),
        "schedule": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
    }
    return trained(short_chains(), perceptron(), moons(), **options)


BRIEFLY: dict[str, Any] = {"num_steps": 3, "batch_size": 8, "progress": False}

TRAINING: dict[str, Make] = {
    "checkpoint": lambda: scratch(resumed_training),
    "complete-deep": lambda: completed(deep_machine(), bits()),
    "complete-belief": lambda: completed(belief_network(), bits()),
    "complete-ising": lambda: completed(stirred(ebm.BoltzmannMachine(5)), bits(5)),
    "complete-rbm": lambda: completed(machine(), bits()),
    "complete-real": lambda: completed(ebm.Phi4(4), normal(3, 4)),
    "fine-tune-belief": lambda: fine_tuned(belief_network()),
    "fine-tune-deep": lambda: fine_tuned(deep_machine()),
    "guard": rolled_back,
    "optimizer": optimized,
    "pretrain-belief": lambda: ebm.pretrain_belief_network(
        [4, 3, 4], bits(), ebm.ContrastiveDivergence(), **BRIEFLY
    ),
    "pretrain-boltzmann": lambda: ebm.pretrain_boltzmann_machine(
        [4, 3, 2], bits(), ebm.ContrastiveDivergence(), **BRIEFLY
    ),
    "pretrain-gaussian": lambda: ebm.pretrain_boltzmann_machine(
        [4, 3, 2], normal(16, 4), ebm.ContrastiveDivergence(), visible="gaussian", **BRIEFLY
    ),
}


def boltzmann_distribution() -> Any:
    distribution = ebm.Boltzmann(ebm.DoubleWell())
    start = ebm.initial_states(lambda: pyro.sample("x", distribution))
    return distribution.sample((5,)), distribution.log_prob(normal(5)), start()


def potential() -> Any:
    potential_fn = ebm.PotentialFn(wells())
    return potential_fn({"x": normal(2)}), potential_fn.initial_params(3, seeded(1))


def streaming() -> Any:
    moments = ebm.StreamingMoments.start(normal(4, 3))
    for draw in normal(10, 4, 3, seed=1):
        moments = moments.update(draw)
    return moments, moments.r_hat(), moments.nested_r_hat(2)


def chain_statistics() -> Any:
    draws, weights = normal(4, 50, 2), normal(200)
    values = [ebm.r_hat(draws), ebm.ess_bulk(draws), ebm.ess_tail(draws), ebm.mcse_mean(draws)]
    return values, ebm.bfmi(draws[..., 0]), ebm.pareto_k(weights)


def distances() -> Any:
    x, y = normal(50, 2), 1.1 * normal(60, 2, seed=1)
    modes = ebm.mode_coverage_entropy((x[:, 0] > 0).long(), torch.tensor([0.7, 0.3]))
    stein = ebm.stein_z(normal(4, 50, 2), -normal(4, 50, 2))
    discrepancy = ebm.maximum_mean_discrepancy(x, y)
    return ebm.energy_distance(x, y), discrepancy, ebm.median_distance(x), modes, stein


def images() -> Any:
    quantized = ebm.quantized(ebm.dequantized(bits(), 2, seeded(1)), 2)
    return ebm.digits(), ebm.image_patches(20, 4), quantized


def generated() -> Any:
    net = ebm.Generator(ebm.mlp(3, 2, (8,), zero_last=False, generator=seeded(1)), 3, (2,), 0.2)
    return net.sample(4, seeded(2)), generator_net(batch_norm=True).eval().sample(4, seeded(2))


def curved() -> Any:
    x = normal(4, 2)
    return ebm.curvatures(perceptron(), x, ebm.unit_directions(x, 1))


OTHER: dict[str, Make] = {
    "boltzmann-distribution": boltzmann_distribution,
    "chain-statistics": chain_statistics,
    "curvatures": curved,
    "data": lambda: (ebm.bars_and_stripes(3), ebm.parity(4), ebm.laplace_mixture(20)),
    "distances": distances,
    "generators": generated,
    "images": images,
    "potential-fn": potential,
    "streaming-moments": streaming,
}


def recipe(name: str) -> Any:
    """Return the metrics of a quick run of a recipe."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", f"models.{name}", "--quick", "--out", out]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        more = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        ran = subprocess.run(command, cwd=ROOT, env=more, text=True, capture_output=True)
        if ran.returncode:
            raise RuntimeError("\n".join(ran.stderr.splitlines()[-3:]))
        values = json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))
    return timeless(values["metrics"]), json.dumps(values["config"], sort_keys=True)


def demo(out: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return timeless(ebm.run_demo(out, 0, quick=True))


RECIPES: dict[str, Make] = {
    path.stem: functools.partial(recipe, path.stem)
    for path in sorted((ROOT / "models").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
}
RECIPES["demo"] = lambda: scratch(demo)


def each(noun: str, table: Mapping[str, Make], use: Callable[[Any], Any]) -> dict[str, Make]:
    """Return the cases NOUN/NAME of a table: the results of `use` on its entries."""

    def case(make: Make) -> Any:
        return use(make())

    return {f"{noun}/{name}": functools.partial(case, make) for name, make in table.items()}


def as_it_is(found: Any) -> Any:
    return found


CASES: dict[str, Make] = {
    **each("adaptation", ADAPTATION, as_it_is),
    **each("base", BASES, base_values),
    **each("discrete", DISCRETE, as_it_is),
    **each("energy", ENERGIES, as_it_is),
    **each("flow", FLOWS, flow_values),
    **each("flow-use", FLOW_USES, as_it_is),
    **each("kernel", CONTINUOUS, lambda kernel: chains(kernel, wells())),
    **each("kernel-untuned", CONTINUOUS, lambda kernel: untuned(kernel, wells())),
    **each("objective", OBJECTIVES, as_it_is),
    **each("other", OTHER, as_it_is),
    **each("partition", PARTITION, as_it_is),
    **each("sampling", SAMPLING, as_it_is),
    **each("target", TARGETS, target_values),
    **each("training", TRAINING, as_it_is),
    **each("transform", TRANSFORMS, transform_values),
    **each("variational", VARIATIONAL, as_it_is),
    **each("recipe", RECIPES, as_it_is),
}

# -------------------------------------------------------------------------------------------------
# The command


def run(chosen: Mapping[str, Make], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return digests of the cases; for a case that fails, the error message."""
    found: dict[str, Any] = {}
    for number, (name, make) in enumerate(chosen.items(), 1):
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = digest(make)
        except Exception as error:  # the others are to run
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        said = f"{number}/{len(chosen)} {name} {time.monotonic() - began:.1f} s"
        print(said, found[name].get("failed", ""), file=sys.stderr, flush=True)
        keep(found)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each case that is in one record only, failed, or differs."""
    said = [f"missing: {name}" for name in before if name not in now]
    said += [f"new: {name}" for name in now if name not in before]
    for name, found in now.items():
        if "failed" in found:
            said.append(f"failed: {name}: {found['failed']}")
        elif before.get(name, found) != found:
            mean = before[name].get("mean")
            said.append(f"differs: {name}: its mean was {mean} and is {found['mean']}")
    return said


def main(*arguments: str) -> int:
    """Record or compare.

    Returns 1 if a case differs or failed, or a public name has no case.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names hold it")
    parser.add_argument("--no-recipes", action="store_true", help="without models/ and the demo")
    asked = parser.parse_args(arguments)

    def wanted(table: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name in table if asked.only in name]
        return {n: table[n] for n in names if not (asked.no_recipes and n.startswith("recipe/"))}

    def write(found: dict[str, Any]) -> None:
        asked.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    torch.set_num_threads(1)
    began = time.monotonic()
    if asked.command == "record":
        now = run(wanted(CASES), write)
        said = differences(now, now)
    else:
        before = wanted(json.loads(asked.file.read_text(encoding="utf-8")))
        now = run(wanted(CASES), lambda found: None)
        said = differences(before, now)
    said += uncovered()
    summary = f"{len(now)} cases in {time.monotonic() - began:.0f} s, {len(said)} complaints"
    print(*said, summary, sep="\n")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
