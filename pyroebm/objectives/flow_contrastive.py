"""Flow contrastive estimation: the noise of NCE is a flow that learns to look like the data."""

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

Facts = dict[str, Tensor]


class FlowContrastive(Objective):
    r"""Flow contrastive estimation (Gao et al., 2020): energy and flow play for one value,

    .. math::

        \min_q \max_{E, c} V, \qquad
        V = \frac1n \sum_i \log h(x_i) + \frac1n \sum_j \log(1 - h(y_j)), \quad
        h(x) = \frac{e^{-E(x) - c}}{e^{-E(x) - c} + q(x)}, \quad y_j \sim q

    The energy's part is :class:`NoiseContrastive` at :math:`\nu = 1` with the flow as it stands;
    the flow's is the same value with the other sign, through its draws and its density. At the best
    E, V is the Jensen-Shannon divergence of the data and the flow (2 JS - 2 log 2), which the flow
    brings down: so the noise comes near the data where a fixed one would teach too little. Start
    from a flow that covers the data (:func:`~pyroebm.objectives.gaussian_noise` shows how wide they
    are).

    Args:
        flow: q, of as many dimensions as an event has entries, none redundant.
        log_z: c at the start.

    Attributes:
        log_z: c, a parameter, ``()``, trained with the energy.

    Raises:
        ValueError: if the flow does not fit the energy, or its density is not finite where there
            are data.

    Example:
        >>> from pyroebm.energies import MLPEnergy
        >>> from pyroebm.flows import NICE
        >>> energy, objective = MLPEnergy((2,), (16,), scale=3.0), FlowContrastive(NICE(2))
        >>> losses, facts = objective.losses(energy, torch.randn(100, 2))
        >>> sorted(losses), len(objective.trained(energy)["energy"])
        (['energy', 'flow'], 5)
    """

    def __init__(self, flow: Flow, log_z: float = 0.0) -> None:
        super().__init__()
        self._noise = Noise(flow)  # the front door; the flow itself is trained here
        self.flow = flow
        self.log_z = nn.Parameter(torch.tensor(float(log_z), dtype=flow.dtype, device=flow.device))

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Facts]:
        """The sum of the :meth:`losses`, whose gradient in each parameter is that of its own loss,
        and the facts."""
        losses, facts = self.losses(energy, batch, generator=generator)
        return torch.stack(list(losses.values())).sum(), facts

    def trained(self, energy: Energy) -> dict[str, Sequence[nn.Parameter]]:
        """The parameters that each of the losses is for."""
        both = {"energy": [*energy.parameters(), self.log_z], "flow": list(self.flow.parameters())}
        return {
            name: [p for p in parameters if p.requires_grad] for name, parameters in both.items()
        }

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Facts]:
        """``energy`` and ``flow``: each has a gradient in the parameters of :meth:`trained` under
        its name, and in no other.

        Facts: those of :meth:`NoiseContrastive.contrast`, and ``flow_log_likelihood``, the mean of
        log q over the data.
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
        loss, facts = classify(
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
            **facts,
        }
