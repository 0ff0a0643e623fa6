"""The base class of objectives that fit a flow to an energy."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.wrappers import eval_mode
from pyroebm.flows.flow import Flow
from pyroebm.objectives.base import Objective

__all__ = ["FlowObjective"]


class FlowObjective(Objective):
    r"""Fit a flow q to the density :math:`p(x) = e^{-U(x)} / C` of an energy U.

    The energy is not trained. It is no submodule: it is neither in ``parameters()`` nor in
    ``state_dict()``, and ``.to()`` does not move it. It is in eval mode while a loss is computed.

    The target of a step is :math:`\beta U`. In :func:`pyroebm.training.fit` the inverse temperature
    :math:`\beta` increases linearly from ``beta_start`` to 1 over the first ``anneal`` of the
    steps, so that fewer modes are missed; elsewhere it is 1.

    A subclass defines ``loss(flow, generator)``.

    Args:
        energy: U, or None if the loss does not depend on it.
        num_samples: number of draws for each loss.
        min_samples: smallest allowed ``num_samples``.
        beta_start: inverse temperature of the first step, in (0, 1].
        anneal: fraction of the steps in which :math:`\beta` increases, in [0, 1].

    Raises:
        ValueError: if a number is out of range, or ``energy`` is no energy.

    Example:
        >>> from pyroebm.objectives import ReverseKL
        >>> from pyroebm.targets import DoubleWell
        >>> objective = ReverseKL(DoubleWell(), beta_start=0.5, anneal=0.5)
        >>> for step in range(4):
        ...     objective.begin_step(step, 4)
        ...     print(objective.beta)
        0.5
        0.75
        1.0
        1.0
    """

    lr = 2e-3
    schedule = "cosine"

    _energy: Energy | None

    def __init__(
        self,
        energy: Energy | None,
        num_samples: int,
        *,
        min_samples: int = 2,
        beta_start: float = 1.0,
        anneal: float = 0.0,
    ) -> None:
        super().__init__()
        if energy is not None:
            check_energy(energy)
        check_counts({"num_samples": min_samples}, num_samples)
        if not (0.0 < beta_start <= 1.0 and 0.0 <= anneal <= 1.0):
            raise ValueError(
                "0 < beta_start <= 1 and 0 <= anneal <= 1 must hold, got"
                f" beta_start={beta_start}, anneal={anneal}"
            )
        # not by nn.Module.__setattr__, which would register it as a submodule
        object.__setattr__(self, "_energy", energy)
        self.num_samples = num_samples
        self.beta_start = beta_start
        self.anneal = anneal
        self._beta = 1.0

    @property
    def energy(self) -> Energy:
        """U.

        Raises:
            ValueError: if the objective has none.
        """
        if self._energy is None:
            raise ValueError(
                f"{type(self).__name__} has no energy: give energy= to its constructor"
            )
        return self._energy

    @property
    def beta(self) -> float:
        r""":math:`\beta`, the inverse temperature of the next loss."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        if not 0.0 < beta < math.inf:
            raise ValueError(f"beta must be a positive finite number, got beta={beta}")
        self._beta = float(beta)

    @property
    def target(self) -> Energy:
        r""":math:`\beta U`."""
        return self.energy if self.beta == 1.0 else self.beta * self.energy

    def begin_step(self, step: int, num_steps: int) -> None:
        r"""Set :math:`\beta` for step ``step`` of ``num_steps``, counted from 0."""
        rising = self.anneal * num_steps
        done = step / rising if step < rising else 1.0
        self.beta = self.beta_start + (1.0 - self.beta_start) * done

    def end_training(self) -> None:
        r"""Set :math:`\beta` to 1."""
        self.beta = 1.0

    def forward(
        self, flow: Flow, batch: None = None, /, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Return the loss and its metrics, ``beta`` among them.

        Args:
            flow: q, which is trained.
            batch: None; the objective makes its own draws.
            generator: source of all draws; None is torch's default generator.

        Raises:
            ValueError: if a batch is given, or the flow does not fit the energy.
        """
        if batch is not None:
            raise ValueError(
                f"batch must be None: {type(self).__name__} makes its own draws, and"
                " ForwardKL(draws) takes those of the target; call fit(flow, objective) without"
                " data"
            )
        with contextlib.nullcontext() if self._energy is None else eval_mode(self._energy):
            loss, metrics = self.loss(flow, generator)
        return loss, metrics | {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def loss(
        self, flow: Flow, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics, detached."""
        raise NotImplementedError(
            f"{type(self).__name__} must define loss(flow, generator) -> (loss, metrics)"
        )
