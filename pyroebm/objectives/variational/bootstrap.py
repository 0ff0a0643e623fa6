"""Flow annealed importance sampling bootstrap: a flow trained where it is worst, on states that
annealing finds from it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.annealing_path import GeometricPath
from pyroebm.core.energy import Energy
from pyroebm.core.enumeration import draw_numbers
from pyroebm.core.wrappers import check_weighable
from pyroebm.flows.density import FlowEnergy
from pyroebm.flows.flow import Flow
from pyroebm.kernels.base import State, check_kernel, row_value_and_grad, state_of_rows
from pyroebm.kernels.hmc import HMC
from pyroebm.nn.mlp import frozen
from pyroebm.objectives.variational.base import FlowObjective

__all__ = ["AlphaBootstrap"]


class _Square(Energy):
    r""":math:`-\log(p^2 / q)`: twice the energy, less the flow's own."""

    def __init__(self, energy: Energy, base: FlowEnergy) -> None:
        super().__init__(energy.event_shape)
        self.energy, self.base = energy, base

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.energy(x) - self.base(x)


class AlphaBootstrap(FlowObjective):
    r"""The divergence of :math:`\alpha = 2` by annealing and a replay buffer (FAB; Midgley et al.,
    2023).

    .. math::

        \nabla_\theta \log \int \frac{p(x)^2}{q_\theta(x)} dx
        = -E_{x \sim p^2 / q}[\nabla_\theta \log q_\theta(x)]

    Mass that q lacks counts there more than anything else. States of the density proportional to
    :math:`p^2 / q` come from annealed importance sampling: draws of q, moved by Hamiltonian steps
    along the geometric path, with their weights. They go into a buffer, from which batches are
    drawn in proportion to the weights, each corrected for what q has become since.

    Another flow empties the buffer. With auxiliary variables :math:`N(y \mid M(x), \Sigma(x))` is
    part of the target, and is not trained.

    Metrics: ``ess_fraction`` of the buffer's weights; ``acceptance_rate``, where states were
    annealed for this loss; ``beta`` (1). The value of the loss has no meaning, only its gradient.

    Args:
        energy: U.
        num_samples: states annealed at a time, and of a batch, at least 2.
        temperatures: steps of :math:`\beta` from q to :math:`p^2 / q`; between each two the states
            are moved.
        kernel: its number of steps and metric; the step size of each temperature is tuned to accept
            65 %, from this one on.
        buffer_size: states kept; the oldest go first.
        reuse: batches taken from the buffer for each annealing.
        max_correction: largest correction of a weight for what q has become.

    Raises:
        ValueError: if a number is out of its range, the energy is compressed, or the kernel is no
            HMC; when called, if the flow does not fit the energy.
        FloatingPointError: when called, if no annealed state has a finite weight.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> flow = NICE(2)
        >>> objective = AlphaBootstrap(Gaussian([1.0, 0.0]), num_samples=64, temperatures=2)
        >>> loss, metrics = objective(flow, generator=torch.Generator().manual_seed(0))
        >>> loss.backward()
        >>> bool(flow.transform.parts[-1].offset.grad[0] < 0)  # descent moves q to its target
        True
    """

    step_sizes: Tensor
    batches: Tensor
    rows: Tensor | None
    log_weights: Tensor | None
    log_q: Tensor | None

    def __init__(
        self,
        energy: Energy,
        num_samples: int = 512,
        *,
        temperatures: int = 4,
        kernel: HMC | None = None,
        buffer_size: int = 20_000,
        reuse: int = 4,
        max_correction: float = 10.0,
    ) -> None:
        super().__init__(energy, num_samples)
        check_weighable(energy)
        check_counts(
            {"temperatures": 1, "buffer_size": 2, "reuse": 1}, temperatures, buffer_size, reuse
        )
        kernel = HMC(step_size=0.2, num_steps=5) if kernel is None else kernel
        check_kernel(kernel)
        if not isinstance(kernel, HMC):
            raise ValueError(f"kernel must be an HMC, got {kernel}")
        if not max_correction >= 1.0:
            raise ValueError(
                f"max_correction must be at least 1, got max_correction={max_correction}"
            )
        self.kernel = kernel
        self.temperatures = temperatures
        self.buffer_size = buffer_size
        self.reuse = reuse
        self.max_correction = max_correction
        self.register_buffer(
            "step_sizes",
            torch.full((max(1, temperatures - 1),), float(kernel.step_size), dtype=torch.float64),
        )
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        for name in ("rows", "log_weights", "log_q"):
            self.register_buffer(name, None)
        # whose the buffer is
        self._flow: weakref.ref[Flow] | None = None

    def loss(
        self, flow: Flow, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        target = flow.extend(self.energy)
        metrics: dict[str, Tensor] = {}
        if self._flow not in (None, weakref.ref(flow)):
            self.rows = self.log_weights = self.log_q = None
        self._flow = weakref.ref(flow)
        if self.rows is None or int(self.batches) % self.reuse == 0:
            metrics["acceptance_rate"] = self._refill(flow, target, generator)
        self.batches += 1
        rows = self.rows
        log_weights = self.log_weights
        log_q = self.log_q
        if rows is None or log_weights is None or log_q is None:
            raise FloatingPointError(
                "no annealed state has a finite weight: the flow lies where the energy is not"
                " finite"
            )
        weights = torch.softmax(log_weights, 0)
        metrics["ess_fraction"] = 1.0 / (weights.square().sum() * len(weights))
        chosen = draw_numbers(log_weights, self.num_samples, generator)
        now = flow.log_prob(rows[chosen])
        change = (log_q[chosen] - now.detach()).double()
        loss = -(change.exp().clamp(max=self.max_correction).to(now.dtype) * now).mean()
        # out of place: a batch may have a row more than once
        self.log_weights = log_weights.index_put((chosen,), log_weights[chosen] + change)
        self.log_q = log_q.index_put((chosen,), now.detach())
        return loss, metrics

    def _refill(self, flow: Flow, target: Energy, generator: torch.Generator | None) -> Tensor:
        """Anneal draws of the flow, and put those of finite weight into the buffer; the mean
        acceptance rate."""
        with frozen(flow):
            x, log_weights, rate = self._anneal(flow, target, self.num_samples, generator)
            with torch.no_grad():
                log_q = flow.log_prob(x)
        good = torch.isfinite(log_weights) & torch.isfinite(log_q)
        new = {"rows": x[good], "log_weights": log_weights[good], "log_q": log_q[good]}
        for name, values in new.items():
            if len(values):
                kept = getattr(self, name)
                setattr(
                    self,
                    name,
                    (values if kept is None else torch.cat([kept, values]))[-self.buffer_size :],
                )
        return rate

    def _anneal(
        self, flow: Flow, target: Energy, n: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        base = FlowEnergy(flow)
        end, x = _Square(target, base), base.sample(n, generator)
        log_weights, rates = torch.zeros(n, dtype=torch.float64, device=x.device), []
        betas = torch.linspace(0.0, 1.0, self.temperatures + 1).tolist()
        for k, (before, beta) in enumerate(itertools.pairwise(betas)):
            log_weights = (
                log_weights - (beta - before) * GeometricPath(end, beta, base).slope(x).double()
            )
            if k + 1 < self.temperatures:
                x, rate = self._move(GeometricPath(end, beta, base), x, k, generator)
                rates.append(rate)
        return x, log_weights, torch.stack(rates).mean() if rates else torch.ones(())

    def _move(
        self, path: GeometricPath, x: Tensor, k: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """One trajectory at a temperature. A row without a finite energy and gradient stays as it
        is, and has no weight."""
        values, grad = row_value_and_grad(path, x)
        good = torch.isfinite(values) & torch.isfinite(grad).all(1)
        state: State = state_of_rows(
            path, x, torch.where(good, values, 0.0), torch.where(good.unsqueeze(1), grad, 0.0)
        )
        state, info = self.kernel.replace(step_size=float(self.step_sizes[k])).step(
            path, state, generator
        )
        rate = (
            info.acceptance_rate[good].mean()
            if bool(good.any())
            else torch.zeros((), dtype=x.dtype)
        )
        self.step_sizes[k] *= 1.05 if float(rate) > 0.65 else 1.0 / 1.05
        return torch.where(good.unsqueeze(1), state.x, x), rate

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("rows", "log_weights", "log_q"):  # a buffer that is None takes no state
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.empty_like(state_dict[f"{prefix}{name}"]))
        super()._load_from_state_dict(state_dict, prefix, *args)
