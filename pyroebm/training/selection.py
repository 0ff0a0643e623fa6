"""Selection of the number of auxiliary variables by the smallest bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyroebm.core.energy import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.core.supports import event_numel
from pyroebm.flows.flow import Flow
from pyroebm.flows.nice import RedundantNICE
from pyroebm.objectives.variational.base import FlowObjective
from pyroebm.objectives.variational.reverse_kl import ReverseKL, estimate_augmented_kl
from pyroebm.training.fit import fit

__all__ = ["TotalDimSelection", "select_total_dim"]


@dataclasses.dataclass(frozen=True, eq=False)
class TotalDimSelection:
    r"""Result of :func:`select_total_dim`.

    Attributes:
        total_dim: D with the smallest :math:`J_R`.
        values: :math:`J_R - \log C` for each D, in nats; log C, usually unknown, is a common
            constant.
        standard_errors: standard errors of ``values``.
        flows: the fitted flow for each D.
    """

    total_dim: int
    values: dict[int, float]
    standard_errors: dict[int, float]
    flows: dict[int, Flow]

    @property
    def flow(self) -> Flow:
        """The fitted flow with the smallest :math:`J_R`."""
        return self.flows[self.total_dim]


def select_total_dim(
    energy: Energy,
    candidates: Sequence[int] | None = None,
    *,
    make_flow: Callable[[int, int], Flow] | None = None,
    make_objective: Callable[[Energy], FlowObjective] = ReverseKL,
    num_steps: int = 3000,
    num_evaluation_samples: int = 100_000,
    seed: int = 0,
    progress: bool | None = None,
    **fit_options: Any,
) -> TotalDimSelection:
    r"""Select the total dimension D of a flow by the smallest :math:`J_R`.

    A flow is fitted for each candidate.

    Args:
        energy: U, with d entries.
        candidates: values of D, each at least d; None is ``(d, d + 1, d + 2)``.
        make_flow: a function from (d, D) to a new flow; None is
            :class:`~pyroebm.flows.RedundantNICE`.
        make_objective: a function from the energy to the objective of a fit, such as
            ``functools.partial(ReverseKL, num_samples=64)``.
        num_steps: number of steps of each fit.
        num_evaluation_samples: number of draws for the comparison, with the same seed for each D.
        seed: seed of the initial weights, of each fit, and of the comparison.
        progress: True shows progress, False hides it, None shows it after one second.
        fit_options: further options of :func:`pyroebm.training.fit`.

    Raises:
        ValueError: if there are no candidates, or if a candidate is below d.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> found = select_total_dim(DoubleWell(), (1, 2), num_steps=2, num_evaluation_samples=100)
        >>> sorted(found.values), found.flow.total_dim == found.total_dim
        ([1, 2], True)
    """
    dim = event_numel(energy.event_shape)
    candidates = (dim, dim + 1, dim + 2) if candidates is None else candidates
    if not candidates or min(candidates) < dim:
        raise ValueError(
            f"candidates must have values of D of at least d={dim}, got"
            f" candidates={tuple(candidates)}"
        )

    def nice(d: int, total: int) -> Flow:
        return RedundantNICE(
            d, total, dtype=energy.dtype, generator=torch.Generator().manual_seed(seed)
        ).to(energy.device)

    flows = {}
    values = {}
    errors = {}
    for total_dim in candidates:
        flow = (nice if make_flow is None else make_flow)(dim, total_dim)
        fit(
            flow,
            make_objective(energy),
            num_steps=num_steps,
            seed=seed,
            progress=progress,
            **fit_options,
        )
        flows[total_dim] = flow
        values[total_dim], errors[total_dim] = estimate_augmented_kl(
            flow,
            energy,
            num_evaluation_samples,
            log_z=0.0,
            generator=seeded_generator(seed + 1, flow.device),
            progress=progress,
        )
    return TotalDimSelection(min(values, key=values.__getitem__), values, errors, flows)
