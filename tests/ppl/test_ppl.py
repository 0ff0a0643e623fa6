"""The bridge: Pyro's NUTS and HMC on our energies, an energy inside a Pyro model, our kernels
inside Pyro's MCMC."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.checks import within_se
from pyro.infer import HMC as PyroHMC
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor, nn

from pyroebm import HMC, MALA, NUTS, Boltzmann, Energy
from pyroebm.core import PotentialFn, Unnormalized
from pyroebm.core.statistics import mcse_mean
from pyroebm.ppl import PyroKernel, initial_states
from pyroebm.targets import Dirichlet, DoubleWell, Exponential, Gaussian


def through_pyro(kernel: object, energy: Energy, num_samples: int, warmup_steps: int) -> Tensor:
    potential = PotentialFn(energy)
    mcmc = PyroMCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        initial_params=potential.initial_params(),
        transforms=potential.transforms,
        disable_progbar=True,
    )
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)["x"]


@pytest.mark.parametrize("kernel", [PyroNUTS, PyroHMC])
@pytest.mark.parametrize(
    "energy",
    [
        Gaussian(torch.tensor([1.0, -2.0])).double(),
        Exponential(2.0).double(),
        Dirichlet(torch.tensor([2.0, 3.0, 4.0])).double(),
    ],
)
def test_pyros_kernels_sample_our_energies(kernel: type, energy: Energy) -> None:
    """Constrained supports too: a Jacobian that was missing, or there twice, would move the mean by
    many standard errors."""
    pyro.set_rng_seed(0)
    x = through_pyro(kernel(potential_fn=PotentialFn(energy)), energy, 500, 200)
    assert energy.support.check(x).all()
    within_se(x.mean((0, 1)), energy.mean, mcse_mean(x))


def test_a_potential_takes_one_site_of_one_event() -> None:
    potential = PotentialFn(DoubleWell(), "z")
    assert potential({"z": torch.tensor(1.0)}).shape == ()
    with pytest.raises(ValueError, match="one site named 'z'"):
        potential({"x": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"shape \(\), got shape \(3,\)"):
        potential({"z": torch.zeros(3)})
    assert potential.initial_params(4)["z"].shape == (4,)


# Boltzmann


def test_log_prob_is_normalised_where_log_z_is_known_or_given() -> None:
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    known = Boltzmann(DoubleWell().double())
    assert known.normalized
    assert abs(float(torch.trapezoid(known.log_prob(x).exp(), x)) - 1) < 1e-9
    free = Boltzmann(Unnormalized(lambda x: -(x**4)))
    assert not free.normalized
    torch.testing.assert_close(free.log_prob(x[::500].float()), -(x[::500].float() ** 4))
    given = Boltzmann(Unnormalized(lambda x: -(x**4)), log_z=math.log(2 * math.gamma(1.25)))
    assert given.normalized
    assert abs(float(torch.trapezoid(given.log_prob(x.float()).exp(), x.float())) - 1) < 1e-5


def test_sample_is_exact_or_raises() -> None:
    pyro.set_rng_seed(0)
    x = Boltzmann(DoubleWell().double()).sample((50_000,))
    within_se(x.mean(), -1.2272600811, x.std() / math.sqrt(len(x)))
    with pytest.raises(NotImplementedError, match="no exact draws"):
        Boltzmann(Unnormalized(lambda x: -(x**4))).sample()


@pytest.mark.parametrize(
    "energy",
    [DoubleWell(), Gaussian(torch.zeros(3)), Dirichlet(torch.ones(3)), Gaussian(torch.zeros(2, 3))],
)
def test_shapes_and_support_as_a_distribution(energy: Energy) -> None:
    p = Boltzmann(energy)
    assert p.event_shape == energy.event_shape
    wide = p.expand((5,)).expand((2, 5))
    x = wide.sample((4,))
    assert x.shape == (4, 2, 5, *energy.event_shape)
    assert wide.log_prob(x).shape == (4, 2, 5)
    assert p.support.event_dim == len(energy.event_shape)
    assert p.support.check(x).shape == (4, 2, 5)
    assert p.expand((7,)).log_prob(x[0, 0, 0]).shape == (7,)


def test_bad_distributions_and_kernels_are_refused() -> None:
    for log_z in (torch.zeros(3), math.nan):
        with pytest.raises(ValueError, match="log_z must be a finite scalar"):
            Boltzmann(DoubleWell(), log_z)
    with pytest.raises(ValueError, match=r"energy must be a pyroebm\.Energy, got function"):
        Boltzmann(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"energy must be a pyroebm\.Energy"):
        PyroKernel(NUTS(), lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"write NUTS\(\)"):
        PyroKernel(NUTS, DoubleWell())  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="initial_states"):
        Boltzmann(Unnormalized(lambda x: -(x**4))).sample()


def test_starting_states_pass_through_plates_and_masks_but_not_through_transforms() -> None:
    quartic = Boltzmann(Unnormalized(lambda x: -(x**4)))
    wrapped = [quartic.expand((2, 3)).to_event(2), quartic.mask(True), quartic.expand((4,))]
    for p in wrapped:
        assert initial_states(lambda p=p: pyro.sample("x", p))().shape == p.shape()
    pushed = dist.TransformedDistribution(quartic, [dist.transforms.ExpTransform()])
    with pytest.raises(NotImplementedError):
        initial_states(lambda: pyro.sample("x", pushed))()


def quartic_model(y: Tensor) -> None:
    """A latent with a quartic energy, seen through noise."""
    x = pyro.sample("x", Boltzmann(Unnormalized(lambda x: -(x**4))))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_an_energy_stands_in_a_pyro_model() -> None:
    y = torch.tensor(0.8)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    weight = torch.exp(-(grid**4) - 2 * (0.8 - grid) ** 2)
    truth = float((weight * grid).sum() / weight.sum())
    pyro.set_rng_seed(0)
    mcmc = PyroMCMC(
        PyroNUTS(initial_states(quartic_model)),
        num_samples=800,
        warmup_steps=200,
        disable_progbar=True,
    )
    mcmc.run(y)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    within_se(x.mean(), truth, mcse_mean(x))


def test_a_model_runs_in_a_plate_and_with_svi() -> None:
    """The rows of the plate are replicates of one fit: their spread is the error of their mean."""
    truth = torch.tensor([2.0, -1.0])

    def model() -> None:
        with pyro.plate("rows", 64):
            pyro.sample("x", Boltzmann(Gaussian(truth)))

    pyro.set_rng_seed(0)
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = pyro.infer.SVI(
        model,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.985}),
        pyro.infer.Trace_ELBO(num_particles=8),
    )
    for _ in range(300):
        svi.step()
    loc = guide.median()["x"]
    within_se(loc.mean(0), truth, loc.std(0) / math.sqrt(64))
    # Normalised: the loss is KL(guide || target), whose closed form for this guide is known.
    low, high = guide.quantiles([0.25, 0.75])["x"]
    scale = (high - low) / (2 * 0.6744897501960817)
    kl = float((0.5 * (scale**2 + (loc - truth) ** 2 - 1) - scale.log()).sum())
    losses = torch.tensor([svi.evaluate_loss() for _ in range(50)])
    within_se(losses.mean(), kl, losses.std() / math.sqrt(50))


def test_a_doubly_intractable_model_is_refused() -> None:
    class Learned(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x**4

    energy = Learned()
    with pytest.raises(ValueError, match=r"log_z must depend on.*Give log_z as a tensor"):
        Boltzmann(energy)
    with pytest.raises(ValueError, match="log_z must depend on"):
        Boltzmann(energy, log_z=0.3)  # a constant is not log Z(weight)
    log_z = math.log(2 * math.gamma(1.25)) - 0.25 * torch.log(energy.weight)
    torch.testing.assert_close(Boltzmann(energy, log_z).log_prob(torch.tensor(1.0)), -1 - log_z)
    assert Boltzmann(energy.requires_grad_(False)).log_prob(torch.zeros(2)).shape == (2,)

    def latent() -> None:
        beta = pyro.sample("beta", dist.Gamma(2.0, 2.0))
        pyro.sample("x", Boltzmann(Unnormalized(lambda x: -beta * x**4)), obs=torch.tensor(0.3))

    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="log_z must depend on"):
        PyroMCMC(PyroNUTS(latent), num_samples=2, warmup_steps=2, disable_progbar=True).run()


# PyroKernel


@pytest.mark.parametrize("kernel", [MALA(), HMC(), NUTS()], ids=lambda k: type(k).__name__)
def test_our_kernels_run_inside_pyros_mcmc(kernel: object) -> None:
    pyro.set_rng_seed(0)
    energy = Exponential(2.0).double()
    mcmc = PyroMCMC(
        PyroKernel(kernel, energy, site="rate"),
        num_samples=800,
        warmup_steps=200,
        disable_progbar=True,
    )  # type: ignore[arg-type]
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["rate"]
    assert x.shape == (1, 800)
    assert (x > 0).all()
    within_se(x.mean(), 0.5, mcse_mean(x))
    assert set(mcmc.diagnostics()) == {"rate", "divergences", "acceptance rate"}


def test_pyro_kernel_uses_the_energy_in_eval_mode_throughout() -> None:
    class Watched(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[bool] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add(self.training)
            return 0.5 * x**2

    energy = Watched().train()
    pyro.set_rng_seed(0)
    kernel = PyroKernel(MALA(), energy)
    kernel.setup(80)  # long enough for a metric window, whose end looks for a step size
    params = kernel.initial_params
    for _ in range(85):
        params = kernel.sample(params)
    kernel.sample({"x": torch.tensor(0.5)})
    assert energy.seen == {False}
    assert energy.training


def test_pyro_kernel_contract() -> None:
    kernel = PyroKernel(NUTS(), Gaussian(torch.zeros(2, 3)))
    pyro.set_rng_seed(1)
    kernel.setup(5)
    params = kernel.initial_params
    assert params["x"].shape == (2, 3)
    for _ in range(8):
        params = kernel.sample(params)
        json.dumps(kernel.logging())
    assert kernel.diagnostics()["divergences"] == []
    far = torch.full((2, 3), 50.0)  # the caller's position is where the next step starts
    twin = torch.Generator()
    twin.set_state(kernel._generator.get_state())
    expected, _ = kernel.kernel.step(
        kernel.target, kernel.kernel.init(kernel.target, far.unsqueeze(0)), twin
    )
    assert torch.equal(kernel.sample({"x": far})["x"], expected.x[0])

    draws = []
    for seed in (2, 2, 3):
        pyro.set_rng_seed(seed)
        mcmc = PyroMCMC(
            PyroKernel(NUTS(), DoubleWell()), num_samples=10, warmup_steps=10, disable_progbar=True
        )
        mcmc.run()
        draws.append(mcmc.get_samples()["x"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.filterwarnings("ignore:num_chains=3 is more than available_cpu:UserWarning")
def test_chains_of_pyros_driver_differ_and_start_where_told() -> None:
    pyro.set_rng_seed(0)
    energy = DoubleWell()
    start = {"x": torch.tensor([-1.5, 0.0, 1.4])}
    mcmc = PyroMCMC(
        PyroKernel(MALA(1e-4), energy, adaptation=None),
        3,
        warmup_steps=0,
        num_chains=3,
        initial_params=start,
        disable_progbar=True,
    )
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (3, 3)
    torch.testing.assert_close(x[:, 0], start["x"], atol=1e-3, rtol=0)
    assert len(x.unique()) == 9
