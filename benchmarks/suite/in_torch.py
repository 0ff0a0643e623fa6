"""The cases as pyroebm energies and as Pyro models, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.suite import cases
from pyroebm import Energy
from pyroebm.targets import Funnel, scales_gaussian

__all__ = ["NetEnergy", "energy", "model"]


class NetEnergy(Energy):
    """A network's output plus a quadratic confinement, with the weights of
    :func:`benchmarks.suite.cases.net_weights`."""

    def __init__(self) -> None:
        super().__init__((2,))
        layers: list[nn.Module] = []
        for weight, bias in cases.net_weights():
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            linear.load_state_dict(
                {"weight": torch.as_tensor(weight), "bias": torch.as_tensor(bias)}
            )
            layers += [linear, nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) + 0.5 * x.square().sum(-1) / cases.CONFINEMENT**2


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1], dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ beta), obs=y)


def model(name: str) -> tuple[Callable[..., None], tuple[Tensor, ...]]:
    """A case as a Pyro model and its arguments."""
    function, data = {
        "eight_schools": (eight_schools, cases.eight_schools_data),
        "logistic": (logistic, cases.logistic_data),
    }[name]
    return function, tuple(torch.as_tensor(array) for array in data())


def energy(name: str) -> Energy:
    """A case as an energy."""
    if cases.CASES[name].is_model:
        from pyroebm import ModelEnergy

        function, arguments = model(name)
        found: Any = ModelEnergy(function, *arguments)
        return found
    return {
        "normal": lambda: scales_gaussian(50, dtype=torch.float64),
        "funnel": lambda: Funnel(10, 9.0, dtype=torch.float64),
        "net": NetEnergy,
    }[name]()
