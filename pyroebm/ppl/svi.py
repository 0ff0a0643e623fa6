"""The same fit in Pyro's own words: a model and a guide for ``pyro.infer.SVI``."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow
from pyroebm.nn.mlp import frozen

__all__ = ["flow_guide", "flow_model"]


def flow_model(flow: Flow, energy: Energy) -> Callable[[], None]:
    r"""The Pyro model :math:`p(x) N(y \mid M(x), \Sigma(x))`, unnormalised: log C is left out.

    Its sites are ``x``, of the energy's event shape, and ``y`` where the flow has redundant
    latents. With :func:`flow_guide`, minus the ELBO is :math:`J_R - \log C` draw by draw
    (:class:`pyroebm.objectives.ReverseKL`). M and :math:`\Sigma` stand in the model and S and F in
    the guide; both register the flow with Pyro, so one optimizer trains all. The energy is
    constant.

    Args:
        flow: q, for M and :math:`\Sigma`.
        energy: U.

    Raises:
        ValueError: if the flow does not fit the energy.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyroebm.flows import RedundantNICE
        >>> from pyroebm.targets import DoubleWell
        >>> flow, energy = RedundantNICE(dim=1, total_dim=2), DoubleWell()
        >>> elbo = Trace_ELBO(num_particles=64, vectorize_particles=True)
        >>> svi = SVI(
        ...     flow_model(flow, energy),
        ...     flow_guide(flow, energy),
        ...     pyro.optim.Adam({"lr": 2e-3}),
        ...     elbo,
        ... )
        >>> svi.step() < 100.0
        True
    """
    target = flow.extend(energy)
    support = constraints.independent(constraints.real, len(energy.event_shape))

    def model() -> None:
        pyro.module("flow", flow)
        x = pyro.sample("x", dist.ImproperUniform(support, (), energy.event_shape))
        with frozen(energy):
            pyro.factor("energy", -energy(x))
        if flow.conditional is not None:
            pyro.sample("y", flow.conditional(target.vectors(x)))

    return model


def flow_guide(
    flow: Flow, energy: Energy, stl: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    r"""The flow as a Pyro guide for :func:`flow_model`, or for any model of the same sites.

    It draws an auxiliary site ``xy`` and hands its parts to the sites ``x`` and ``y`` (the latter
    where D > d), which it returns too; y is empty where D = d. ``pyro.infer.Predictive(guide,
    num_samples=n)()`` draws them.

    Args:
        flow: q.
        energy: U, for the shape of x.
        stl: leave the score out of the gradient ("sticking the landing", Roeder, Wu and Duvenaud,
            2017).

    Raises:
        ValueError: if the flow does not fit the energy.

    Example:
        >>> import torch
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> x, y = flow_guide(NICE(2), Gaussian(torch.zeros(2)))()
        >>> x.shape, y.shape
        (torch.Size([2]), torch.Size([0]))
    """
    target = flow.extend(energy)

    def guide() -> tuple[Tensor, Tensor]:
        pyro.module("flow", flow)
        x, y = target.split(pyro.sample("xy", flow(stl), infer={"is_auxiliary": True}))
        pyro.sample("x", dist.Delta(x, event_dim=len(energy.event_shape)))
        if flow.conditional is not None:
            pyro.sample("y", dist.Delta(y, event_dim=1))
        return x, y

    return guide
