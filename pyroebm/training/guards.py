"""What a training does about numbers that are not finite, or run away: it stops, or goes back to
where it was well."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.training.checkpoint import TrainingState

__all__ = ["Guard", "Rollback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    r"""When a step of :func:`pyroebm.training.fit` has failed, and what follows.

    It has failed where the loss or the gradient is not finite, and where the mean energies of data
    and model are further apart than a bound: :math:`|E_{data} - E_{model}| > g`, the sign of chains
    that have left. A failed step trains nothing. Either it is an error, or what is learned
    (parameters, the optimizers' momenta, chains) goes back to where it was some steps before. The
    order of the data, the random numbers and the schedule go on from where they are, so that
    nothing is met twice.

    Args:
        rollback: go back; False raises.
        max_energy_gap: g, in nats, for objectives with the metric ``energy_gap``; None is no bound.
        every: steps after which what is learned is kept, from the first good one on.
        max_rollbacks: how often; a failure after so many is an error.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> Guard(rollback=True, max_energy_gap=50.0).complaint({"loss": 1.0, "energy_gap": -80.0})
        'energy_gap is -80, beyond max_energy_gap=50'
    """

    rollback: bool = False
    max_energy_gap: float | None = None
    every: int = 100
    max_rollbacks: int = 10

    def __post_init__(self) -> None:
        check_counts({"every": 1, "max_rollbacks": 1}, self.every, self.max_rollbacks)
        if self.max_energy_gap is not None and not 0.0 < self.max_energy_gap < math.inf:
            raise ValueError(
                "max_energy_gap must be positive and finite, got"
                f" max_energy_gap={self.max_energy_gap}"
            )

    def complaint(self, numbers: Mapping[str, float]) -> str | None:
        """What is wrong with a step's losses, norms of gradients and energy gap, by name; None if
        nothing is.

        Raises:
            ValueError: if there is a bound on ``energy_gap``, and no such number.
        """
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            return " and ".join(bad)
        if self.max_energy_gap is None:
            return None
        if "energy_gap" not in numbers:
            raise ValueError(
                "max_energy_gap needs an objective that says its energy_gap, got none among its"
                " metrics"
            )
        gap = numbers["energy_gap"]
        return (
            f"energy_gap is {gap:g}, beyond max_energy_gap={self.max_energy_gap:g}"
            if abs(gap) > self.max_energy_gap
            else None
        )


class Rollback:
    """A :class:`Guard` at work on a training: it keeps a copy of what is learned, and puts it back.

    Args:
        guard: what counts as a failure.
        state: of the training.
    """

    def __init__(self, guard: Guard, state: TrainingState) -> None:
        self.guard, self.state = guard, state
        self.count, self.kept_at = 0, -1
        self.kept: dict[str, Tensor] = {}

    def passed(self, step: int) -> None:
        """A step went well: keep where it led, from time to time."""
        if self.guard.rollback and (not self.kept or (step + 1) % self.guard.every == 0):
            self.kept, self.kept_at = self.state.tensors(), step

    def failed(self, step: int, complaint: str, metrics: Mapping[str, float]) -> None:
        """A step went wrong: go back with a warning, or raise.

        Raises:
            FloatingPointError: if the guard does not roll back, has done so too often, or no step
                went well so far.
        """
        if not self.kept or self.count >= self.guard.max_rollbacks:
            after = f" after {self.count} rollbacks" if self.count else ""
            raise FloatingPointError(
                f"fit: at step {step}{after} {complaint}; parameters and optimizer are as the step"
                " before left them. Metrics:"
                f" {metrics}"
            )
        self.state.restore(self.kept, learned_only=True)
        self.count += 1
        warnings.warn(
            f"fit: at step {step} {complaint}; what is learned is again as step {self.kept_at}"
            f" left it (rollback {self.count} of"
            f" at most {self.guard.max_rollbacks})",
            RuntimeWarning,
            stacklevel=5,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {
            "rollback": torch.tensor([self.count, self.kept_at]),
            **{f"kept.{k}": v for k, v in self.kept.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        self.count, self.kept_at = map(int, tensors["rollback"])
        self.kept = {
            k.removeprefix("kept."): v for k, v in tensors.items() if k.startswith("kept.")
        }
