"""Flow contrastive estimation: noise-contrastive estimation with a trained flow as noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroebm.core.energy import Energy
from pyroebm.flows import Flow
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.base import Objective
from pyroebm.objectives.noise import Noise
from pyroebm.objectives.noise_contrastive import classify

__all__ = ["FlowContrastive"]

Metrics = dict[str, Tensor]


class FlowContrastive(Objective):
    r"""Flow contrastive estimation: an energy and a flow with opposed losses (Gao et al., 2020).

    .. math::

        \min_q \max_{E, c} V, \qquad
        V = \frac1n \sum_i \log h(x_i) + \frac1n \sum_j \log(1 - h(y_j)), \quad
        h(x) = \frac{e^{-E(x) - c}}{e^{-E(x) - c} + q(x)}, \quad y_j \sim q

    The loss of the energy, -V, is that of :class:`NoiseContrastive` at :math:`\nu = 1` with the
    flow held fixed. The loss of the flow is V, whose gradient is taken through its draws and its
    density. At the optimal E, V = 2 JS - 2 log 2 with JS the Jensen-Shannon divergence between the
    data and the flow, which the flow minimizes: the noise becomes similar to the data, which makes
    the estimate of E more efficient than with fixed noise. Start from a flow that covers the data
    (see :func:`~pyroebm.objectives.gaussian_noise` for their scale).

    Args:
        flow: q, with as many dimensions as an event has entries and no auxiliary variables.
        log_z: initial value of c.

    Attributes:
        log_z: c, a parameter, ``()``, trained with the energy.

    Raises:
        ValueError: if the flow does not fit the energy, or its density is not finite at a row of
            the data.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.flows import NICE
        >>> energy, objective = MLPEnergy((2,), (16,), scale=3.0), FlowContrastive(NICE(2))
        >>> losses, metrics = objective.losses(energy, torch.randn(100, 2))
        >>> sorted(losses), len(objective.trained(energy)["energy"])
        (['energy', 'flow'], 5)
    """

    measures_fit = False

    def __init__(self, flow: Flow, log_z: float = 0.0) -> None:
        super().__init__()
        self._noise = Noise(flow)  # for its checks only; the flow itself is trained here
        self.flow = flow
        self.log_z = nn.Parameter(torch.tensor(float(log_z), dtype=flow.dtype, device=flow.device))

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the sum of the :meth:`losses`, and the metrics.

        Its gradient in each parameter is that of the parameter's own loss.
        """
        losses, metrics = self.losses(energy, batch, generator=generator)
        return torch.stack(list(losses.values())).sum(), metrics

    def trained(self, energy: Energy) -> dict[str, Sequence[nn.Parameter]]:
        """Return the parameters that each of the losses trains."""
        both = {"energy": [*energy.parameters(), self.log_z], "flow": list(self.flow.parameters())}
        return {
            name: [p for p in parameters if p.requires_grad] for name, parameters in both.items()
        }

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Return the losses ``energy`` and ``flow``, and the metrics.

        Each loss has a gradient in its parameters of :meth:`trained` and in no others.

        Metrics: those of :meth:`NoiseContrastive.contrast`, and ``flow_log_likelihood``, the mean
        of log q over the data.
        """
        self._noise.check(energy, batch)
        x = batch.reshape(len(batch), -1)
        flat, log_q_noise = self.flow.forward_and_log_prob(
            self.flow.rsample_base(len(x), generator)
        )
        log_q_data, noise = self.flow.log_prob(x), flat.reshape(batch.shape)
        self._noise.check_mass(log_q_data.detach(), batch)

        on_data, on_noise = energy(torch.cat([batch, noise.detach()])).split(len(x))
        log_p_data, log_p_noise = (-values - self.log_z for values in (on_data, on_noise))
        loss, metrics = classify(
            log_p_data - log_q_data.detach(), log_p_noise - log_q_noise.detach(), 1.0
        )
        with frozen(energy):
            log_p_moved = -energy(noise) - self.log_z.detach()
        against, _ = classify(log_p_data.detach() - log_q_data, log_p_moved - log_q_noise, 1.0)
        return {"energy": loss, "flow": -against}, {
            "energy_data": on_data.detach().mean(),
            "energy_noise": on_noise.detach().mean(),
            "log_z": self.log_z.detach().clone(),
            "log_likelihood": log_p_data.detach().mean(),
            "flow_log_likelihood": log_q_data.detach().mean(),
            **metrics,
        }
