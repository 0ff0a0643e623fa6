"""Saving: every energy, machine, classifier, flow and layer of the tables comes back as it was."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from lib.flow_cases import noise, stirred
from lib.scripts import ROOT
from torch import Tensor, nn
from torch.distributions import constraints

import pyroebm
from pyroebm import Energy, load, save
from pyroebm.core import Conditioned, DistributionEnergy, Path as GeometricPath, Relaxed
from pyroebm.core import Compressed, Unconstrained, Unnormalized
from pyroebm.core.files import FileError
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    ClassifierEnergy,
    ConvEnergy,
    DeepBeliefNetwork,
    FeatureLatentEnergy,
    MLPEnergy,
    NeuralEnergy,
    ProductOfExpertsEnergy,
    Tilted,
    TiedRBM,
)
from pyroebm.flows import (
    NICE,
    Flow,
    FlowEnergy,
    Loft,
    MixtureBase,
    RealNVP,
    RedundantNICE,
    Shift,
    Transported,
    ZukoTransform,
)
from pyroebm.nn import MLPGenerator, mlp
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture
from pyroebm.training import Classifier

F64 = torch.float64
Make = Callable[[], nn.Module]


def table(path: str, name: str) -> dict[str, Callable[..., Any]]:
    """A table of constructors of another test."""
    return runpy.run_path(str(ROOT / "tests" / path))[name]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*widths: int) -> nn.Sequential:
    layers = (nn.Linear(a, b, dtype=F64) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])


def prior(base: Any) -> Tilted:
    """A learned correction of a known density."""
    return Tilted(base, net(2, 4, 1), dtype=F64)


def wells() -> GaussianMixture:
    return GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], scale=0.5, dtype=F64)


def flow() -> RealNVP:
    return RealNVP(2, 2, (4,), dtype=F64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def deep() -> DeepBeliefNetwork:
    return DeepBeliefNetwork([4, 3, 2], dtype=F64)


def classifier() -> ClassifierEnergy:
    return ClassifierEnergy(net(2, 4, 3), (2,), 3, scale=2.0)


COMPOSED: dict[str, Make] = {
    "sum": lambda: wells() + MLPEnergy((2,), (4,), dtype=F64),
    "sum-with-itself": lambda: (e := MLPEnergy((2,), (4,), dtype=F64)) + 0.5 * e,
    "tempered": lambda: 0.5 * wells(),
    "conditioned": lambda: Conditioned(wells(), vector(0.0, 1.0), torch.tensor([False, True])),
    "path": lambda: GeometricPath(wells(), 0.3, Gaussian(vector(0.0, 0.0))),
    "unconstrained": lambda: Unconstrained(table("targets/test_targets.py", "TARGETS")["gamma"]()),
    "relaxed": lambda: Relaxed(BernoulliRBM(3, 2)),
    "compressed": lambda: Compressed(wells(), 10.0),
    "unnormalized": lambda: Unnormalized(net(2, 4, 1).append(nn.Flatten(0)), "softplus", (2,)),
    "interval": lambda: NeuralEnergy(net(2, 4, 1), (2,), support=constraints.interval(-1.0, 2.0)),
    "simplex": lambda: NeuralEnergy(net(3, 4, 1), (3,), support=constraints.simplex),
    "tensor-scale": lambda: NeuralEnergy(net(2, 4, 1), (2,), scale=vector(1.0, 2.0)),
    "mlp-image": lambda: MLPEnergy((1, 2, 3), (4,), generator=seeded()),
    "convolutions": lambda: ConvEnergy((1, 8, 8), (2, 3), spectral_norm=True),
    "spectral-norm": lambda: NeuralEnergy(mlp(2, 1, (4,), spectral_norm=True), (2,), scale=2.0),
    "features": lambda: FeatureLatentEnergy(net(2, 4, 3), (2,), 3, weight=noise(3, 3)),
    "experts": lambda: ProductOfExpertsEnergy(net(2, 4, 3), 3, (2,), 5),
    "tilted-energy": lambda: prior(wells()),
    "tilted-flow": lambda: prior(FlowEnergy(flow())),
    "tilted-normal": lambda: prior(dist.Normal(vector(0.0, 1.0), 2.0).to_event(1)),
    "tilted-dense": lambda: prior(
        dist.MultivariateNormal(vector(0.0, 1.0), vector(2.0, 0.5, 0.5, 1.0).reshape(2, 2))
    ),
    "mixture": lambda: DistributionEnergy(
        dist.MixtureSameFamily(
            dist.Categorical(vector(0.3, 0.7)), dist.Normal(vector(-1.0, 1.0), 0.5)
        ),
        F64,
    ),
    "log-normal": lambda: DistributionEnergy(
        dist.LogNormal(vector(1.0, 2.0), 1.0).to_event(1), F64
    ),
    "gamma-of-torch": lambda: DistributionEnergy(
        torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(3.0))
    ),
    "flow-energy": lambda: FlowEnergy(flow()),
    "transported": lambda: Transported(flow(), wells()),
    "extended": lambda: RedundantNICE(2, 3, 2, (4,), dtype=F64).extend(wells()),
    "flow-of-layers": lambda: Flow([Shift(vector(1.0, 2.0)), Loft(2)], 2, 2, base=MixtureBase(2, 3, dtype=F64)),
    "boltzmann": lambda: BoltzmannMachine(3, 2, dtype=F64),
    "boltzmann-spins": lambda: BoltzmannMachine(3, units="spins", bias=vector(1.0, 0.0, -1.0)),
    "marginal": lambda: BoltzmannMachine(3, 2, dtype=F64).marginal(),
    "tied": lambda: TiedRBM(BernoulliRBM(3, 2), (2, 1)),
    "joint": lambda: BernoulliRBM(3, 2).joint(),
    "belief": deep,
    "belief-joint": lambda: deep().joint(),
    "classifier": classifier,
    "given-class": lambda: classifier().given(1),
    "fine-tuned": lambda: Classifier(deep(), 3),
    "generator": lambda: MLPGenerator((2,), 3, (4,), batch_norm=True, sigma=0.1),
}
TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "target": table("targets/test_targets.py", "TARGETS"),
    "machine": table("energies/test_boltzmann.py", "MACHINES"),
    "lattice": table("energies/test_lattice.py", "LATTICES"),
    "flow": table("flows/test_flows.py", "FLOWS"),
    "layer": table("flows/test_flows.py", "TRANSFORMS"),
    "composed": COMPOSED,
}
CASES: dict[str, Callable[..., Any]] = {
    f"{kind} {name}": make for kind, cases in TABLES.items() for name, make in cases.items()
}
#: Made of parts of other libraries, which a file cannot hold.
FOREIGN = ["flow pyro_affine"] + [
    f"layer {name}"
    for name, make in TABLES["layer"].items()
    if isinstance(make(), ZukoTransform)
]
every_case = pytest.mark.parametrize("name", [name for name in CASES if name not in FOREIGN])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(
        itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
    )


@torch.no_grad()
def values(module: Any) -> Iterator[Any]:
    """Energies, densities and draws."""
    if isinstance(module, Energy):
        draw = module.sample if module.has_exact_draws else module.initial
        x = draw(5, seeded(1))
        yield from (x, module(x), module.log_z, module.event_shape, str(module.support))
    elif isinstance(module, Flow):
        yield from module.push(module.draw_noise(4, seeded(3)))
    elif isinstance(module, dist.Distribution | torch.distributions.Transform):
        yield from module.with_log_det(noise(4, module.dim))
    elif isinstance(module, Classifier):
        yield module(torch.ones(2, 4, dtype=F64))
    elif isinstance(module, MLPGenerator):
        yield module.sample(3, seeded(4))


def check_same(module: nn.Module, again: nn.Module) -> None:
    ours, theirs = tensors(module), tensors(again)
    assert ours.keys() == theirs.keys()
    assert type(module) is type(again)
    for name, tensor in ours.items():
        other = theirs[name]
        assert type(tensor) is type(other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
        assert torch.equal(tensor, other), name
    shared = [(a, b) for a, b in itertools.combinations(ours, 2) if ours[a] is ours[b]]
    assert shared == [(a, b) for a, b in itertools.combinations(theirs, 2) if theirs[a] is theirs[b]]
    assert [m.training for m in module.modules()] == [m.training for m in again.modules()]
    for a, b in zip(values(copy.deepcopy(module)), values(again), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@every_case
def test_it_comes_back_and_a_second_file_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    module = CASES[name]()
    if not name.startswith("target"):
        stirred(module).eval()
    before = torch.get_rng_state()
    save(module, tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    save(again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    check_same(module, again)
    save(copy.deepcopy(module), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
