"""Detection of failed steps, with an error or a rollback."""

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

#: Number of steps between copies of the state.
COPY_EVERY = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    r"""The criterion for a failed step of :func:`pyroebm.training.fit`, and what follows it.

    A step fails if the loss or the gradient is not finite, or if the mean energies of data and
    model differ by more than a bound, :math:`|E_{data} - E_{model}| > g`, which indicates diverged
    chains. A failed step does not change the parameters. It raises an error, or parameters, states
    of the optimizers and chains are restored to a copy, which is made after the first good step
    and then every 100 steps. The order of the
    data, the random numbers and the schedule are not restored, so that the same batches and random
    numbers do not occur again.

    Args:
        rollback: whether to restore a copy; False raises.
        max_energy_gap: g, in nats, for objectives with the metric ``energy_gap``; None is no bound.
        max_rollbacks: largest number of rollbacks; the next failed step raises.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> Guard(rollback=True, max_energy_gap=50.0).complaint({"loss": 1.0, "energy_gap": -80.0})
        'energy_gap is -80, beyond max_energy_gap=50'
    """

    rollback: bool = False
    max_energy_gap: float | None = None
    max_rollbacks: int = 10

    def __post_init__(self) -> None:
        check_counts({"max_rollbacks": 1}, self.max_rollbacks)
        if self.max_energy_gap is not None and not 0.0 < self.max_energy_gap < math.inf:
            raise ValueError(
                "max_energy_gap must be positive and finite, got"
                f" max_energy_gap={self.max_energy_gap}"
            )

    def complaint(self, numbers: Mapping[str, float]) -> str | None:
        """Describe why a step has failed, or return None.

        Args:
            numbers: losses, gradient norms and energy gap, by name.

        Raises:
            ValueError: if there is a bound on ``energy_gap``, but no such number.
        """
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            return " and ".join(bad)
        if self.max_energy_gap is None:
            return None
        if "energy_gap" not in numbers:
            raise ValueError(
                "max_energy_gap must be None for an objective without the metric energy_gap, got"
                f" max_energy_gap={self.max_energy_gap}"
            )
        gap = numbers["energy_gap"]
        return (
            f"energy_gap is {gap:g}, beyond max_energy_gap={self.max_energy_gap:g}"
            if abs(gap) > self.max_energy_gap
            else None
        )


class Rollback:
    """Copies of the state of a training, restored at failed steps.

    Args:
        guard: the criterion for failed steps.
        state: the state of the training.
    """

    def __init__(self, guard: Guard, state: TrainingState) -> None:
        self.guard, self.state = guard, state
        self.count, self.kept_at = 0, -1
        self.kept: dict[str, Tensor] = {}

    def passed(self, step: int) -> None:
        """Record a good step, and copy the state if it is due."""
        if self.guard.rollback and (not self.kept or (step + 1) % COPY_EVERY == 0):
            self.kept, self.kept_at = self.state.tensors(), step

    def failed(self, step: int, complaint: str, metrics: Mapping[str, float]) -> None:
        """Restore the last copy with a warning, or raise.

        Raises:
            FloatingPointError: if the guard does not roll back, ``max_rollbacks`` is reached, or
                there was no good step before.
        """
        if not self.kept or self.count >= self.guard.max_rollbacks:
            after = f" after {self.count} rollbacks" if self.count else ""
            raise FloatingPointError(
                f"fit: at step {step}{after} {complaint}; parameters and optimizer are those after"
                f" the previous step. Metrics: {metrics}"
            )
        self.state.restore(self.kept, learned_only=True)
        self.count += 1
        warnings.warn(
            f"fit: at step {step} {complaint}; restored the parameters after step"
            f" {self.kept_at} (rollback {self.count} of at most {self.guard.max_rollbacks})",
            RuntimeWarning,
            stacklevel=5,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {
            "rollback": torch.tensor([self.count, self.kept_at]),
            **{f"kept.{k}": v for k, v in self.kept.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        self.count, self.kept_at = map(int, tensors["rollback"])
        self.kept = {
            k.removeprefix("kept."): v for k, v in tensors.items() if k.startswith("kept.")
        }
