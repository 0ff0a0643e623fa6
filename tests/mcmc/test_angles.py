"""Angles modulo 2 pi: von Mises sites of Pyro models, and energies on the circle."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from torch import Tensor
from torch.distributions import biject_to

from pyroebm import HMC, MCMC, NUTS, Energy, ModelEnergy, load, save
from pyroebm.core import circular
from pyroebm.core.statistics import mcse_mean
from pyroebm.core.supports import inside
from pyroebm.core.wrappers import unconstrain
from pyroebm.partition import ais, smc

F64 = torch.float64


class Ring(Energy):
    """XY model of n angles on a ring, E = -J sum cos(x_i - x_(i+1)) - h cos(x_0)."""

    support = circular

    def __init__(self, size: int, coupling: float, field: float = 0.0) -> None:
        super().__init__((size,))
        self.coupling, self.field = coupling, field

    def forward(self, x: Tensor) -> Tensor:
        bonds = torch.cos(x - x.roll(1, -1)).sum(-1)
        return -self.coupling * bonds - self.field * torch.cos(x[..., 0])


def log_z(size: int, coupling: float) -> float:
    """By the transfer matrix, whose eigenvalues are 2 pi I_k(J)."""
    grid = torch.arange(256, dtype=F64) * 2 * math.pi / 256
    kernel = torch.exp(coupling * torch.cos(grid))
    eigenvalues = torch.fft.fft(kernel).real * 2 * math.pi / 256
    return float((eigenvalues**size).sum().log())


def test_the_circle() -> None:
    wrap = biject_to(circular)
    for dtype in (torch.float32, F64):
        far = torch.linspace(-1e4, 1e4, 10_001, dtype=dtype)
        x = wrap(far)
        assert bool(inside(circular, x, 0).all())
        torch.testing.assert_close(x.cos(), far.cos(), rtol=0.0, atol=2e-3)
        assert torch.equal(wrap(x), x)
    edge = torch.tensor([math.pi, -3.0, 3.0, 0.0], dtype=F64)
    assert torch.equal(wrap(edge), edge)
    assert not bool(inside(circular, torch.tensor([0.0, 4.0]), 1))


def test_an_energy_of_angles_has_the_options_of_others(tmp_path: Any) -> None:
    energy = Ring(3, 1.0).double()
    assert energy.angles() == unconstrain(0.5 * energy).angles() == ("x",)
    periodic = unconstrain(energy).angle_mask
    assert periodic is not None
    assert bool(periodic.all())
    start = energy.initial(2000, torch.Generator().manual_seed(0))
    within_se(start.cos().mean((0, 1)), 0.0, float(start.cos().std()) / math.sqrt(6000))
    path = tmp_path / "ring.safetensors"
    save(energy, path)
    assert load(path, classes={"Ring": Ring}).support is circular


@pytest.mark.parametrize("coupling", [0.5, 2.0])
def test_log_z_of_a_ring(coupling: float) -> None:
    energy = Ring(4, coupling).double()
    base = Ring(4, 0.0).double()
    # independent angles: log Z and exact draws
    base.__class__ = Free
    generator = torch.Generator().manual_seed(0)
    for result in (
        ais(energy, base, betas=40, num_chains=200, generator=generator),
        smc(energy, base, num_particles=256, generator=generator),
    ):
        within_se(result.value, log_z(4, coupling), result.standard_error)


class Free(Ring):
    has_exact_draws = True

    @property
    def log_z(self) -> float:
        return self.event_shape.numel() * math.log(2 * math.pi)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        draws = torch.rand(num_samples, *self.event_shape, generator=generator, dtype=self.dtype)
        return (2 * draws - 1) * math.pi


@pytest.mark.parametrize(
    # a trajectory that turns round and round has no U-turn
    "kernel",
    [NUTS(max_tree_depth=4), HMC(num_steps=5)],
    ids=["NUTS", "HMC"],
)
def test_draws_are_on_the_circle_and_their_moments_exact(kernel: Any) -> None:
    """Weak fields let angles turn round many times: they must not drift."""
    mcmc = MCMC(kernel, 1000, 500, 8, seed=1, progress=False)
    mcmc.run(Ring(2, 0.0, field=0.7).double())
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert float(x.abs().max()) <= math.pi
    size = torch.as_tensor(0.7, dtype=F64)
    truth = torch.special.i1(size) / torch.special.i0(size)
    cosines = x.cos()
    within_se(
        cosines.mean((0, 1)),
        torch.stack([truth, torch.zeros((), dtype=F64)]),
        torch.as_tensor(mcse_mean(cosines)),
    )
    found = mcmc.diagnose(max_r_hat=1.05, min_ess=100)
    assert {finding.kind for finding in found.findings} <= {"tree_depth"}, found
    assert found.r_hat < 1.05


def test_von_mises_sites_of_a_model() -> None:
    def model() -> None:
        pyro.sample("t", dist.VonMises(math.pi, 4.0))  # its mean is where angles jump
        with pyro.plate("n", 2):
            pyro.sample("many", dist.VonMises(0.0, torch.tensor([0.3, 2.0])))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    energy = ModelEnergy(model)
    assert energy.angles() == ("t", "many")
    assert energy.angle_mask is not None
    assert energy.angle_mask.tolist() == [True, True, True, False]
    mcmc = MCMC(NUTS(max_tree_depth=6), 1000, 500, 4, seed=0, progress=False)
    mcmc.run(energy)
    samples = mcmc.get_samples(group_by_chain=True)
    for name in ("t", "many"):
        angles = samples[name]
        assert angles.abs().max() <= torch.tensor(math.pi, dtype=angles.dtype)  # as it rounds pi
    many = samples["many"].cos()
    size = torch.tensor([0.3, 2.0])
    truth = torch.special.i1(size) / torch.special.i0(size)
    within_se(many.mean((0, 1)), truth, torch.as_tensor(mcse_mean(many)))
    found = mcmc.diagnose(max_r_hat=1.05, min_ess=100)
    assert {finding.kind for finding in found.findings} <= {"tree_depth"}, found


def test_observables_are_diagnosed_in_place_of_sites() -> None:
    """Without a field all angles turn together, slowly. What does not depend on it has mixed."""
    mcmc = MCMC(HMC(0.1, num_steps=2), 1500, 0, 8, seed=0, progress=False, adaptation=None)
    energy = Ring(8, 6.0).double()
    ordered = torch.linspace(-2.0, 2.0, 8, dtype=F64).unsqueeze(1).expand(8, 8)
    mcmc.run(energy, initial=ordered + 0.1 * torch.randn(8, 8, dtype=F64))

    def bonds(samples: Any) -> Tensor:
        return torch.cos(samples["x"] - samples["x"].roll(1, -1)).mean(-1)

    turned = mcmc.diagnose(max_r_hat=1.05, min_ess=100)
    assert not turned.mixed
    assert "cos(x)" in str(turned) or "sin(x)" in str(turned)
    found = mcmc.diagnose(max_r_hat=1.05, min_ess=100, observables={"bonds": bonds})
    assert found.mixed, found
    size = torch.tensor(6.0, dtype=F64)
    value = bonds(mcmc.get_samples(group_by_chain=True))
    step = 1e-4
    truth = (log_z(8, 6.0 + step) - log_z(8, 6.0 - step)) / (2 * step) / 8
    assert float(size) == 6.0
    within_se(value.mean(), truth, float(mcse_mean(value)))
    with pytest.raises(ValueError, match=r"observables\['mean'\] must map sites"):
        mcmc.diagnose(observables={"mean": lambda samples: samples["x"].mean()})


def test_moments_of_angles_are_those_of_sine_and_cosine() -> None:
    """The angles are around pi, where they jump from pi to -pi."""
    settings = {"num_samples": 50, "warmup_steps": 50, "num_chains": 4, "seed": 1}
    kept, lean = MCMC(NUTS(), **settings), MCMC(NUTS(), keep="moments", **settings)  # type: ignore[arg-type]
    for mcmc in (kept, lean):
        mcmc.run(Ring(2, 0.0, field=-8.0).double())
    x, moments = kept.get_samples(group_by_chain=True)["x"], lean.get_moments()
    assert "x" not in moments
    for name, values in (("cos(x)", x.cos()), ("sin(x)", x.sin())):
        torch.testing.assert_close(moments[name].mean, values.mean(1))
