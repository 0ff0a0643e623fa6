"""The cases as pyroebm energies, float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.suite import cases
from benchmarks.suite.in_pyro import MODELS, tensors
from pyroebm import Energy, ModelEnergy
from pyroebm.targets import Funnel, scales_gaussian

__all__ = ["NetEnergy", "energy"]


class NetEnergy(Energy):
    """The output of a network plus a quadratic term.

    The weights are those of :func:`benchmarks.suite.cases.net_weights`.
    """

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
        """Return energies ``(*batch)``."""
        return self.net(x).squeeze(-1) + 0.5 * x.square().sum(-1) / cases.CONFINEMENT**2


def energy(name: str) -> Energy:
    """Return a case as an energy."""
    case = cases.CASES[name]
    if case.arguments is not None:
        return ModelEnergy(MODELS[name], *tensors(case.arguments()))
    return {
        "normal": lambda: scales_gaussian(50, dtype=torch.float64),
        "funnel": lambda: Funnel(10, 9.0, dtype=torch.float64),
        "net": NetEnergy,
    }[name]()
