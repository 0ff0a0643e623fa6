"""A model and a guide for ``pyro.infer.SVI`` that fit a flow to an energy."""

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
    r"""Make the Pyro model :math:`p(x) N(y \mid M(x), \Sigma(x))`, without the constant log C.

    Its sites are ``x``, of the energy's event shape, and ``y`` if the flow has auxiliary variables.
    With :func:`flow_guide` the negative ELBO is :math:`J_R - \log C` of
    :class:`pyroebm.objectives.ReverseKL` at the same draws. M and :math:`\Sigma` are in the model,
    S and F in the guide; both register the flow with Pyro, so one optimizer trains all parameters.
    The energy is constant.

    Args:
        flow: q, for M and :math:`\Sigma`.
        energy: U.

    Returns:
        The model, a function without arguments.

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
    r"""Make the guide of a flow for :func:`flow_model`, or any model with the same sites.

    It samples an auxiliary site ``xy``, whose parts are the sites ``x`` and, for D > d, ``y``. Draw
    from it by ``pyro.infer.Predictive(guide, num_samples=n)()``.

    Args:
        flow: q.
        energy: U, for the shape of x.
        stl: whether to omit the score from the gradient ("sticking the landing", Roeder, Wu and
            Duvenaud, 2017).

    Returns:
        The guide, a function without arguments that returns x and y; y is empty for D = d.

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
