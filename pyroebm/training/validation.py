"""Validation during training, early stopping, and the best weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm.core.rng import seeded_generator
from pyroebm.core.wrappers import eval_mode
from pyroebm.objectives.base import HasLosses, module_dtype
from pyroebm.training.data import Batches, Passes
from pyroebm.training.distributed import average_gradients, connected_ranks

__all__ = ["AnyObjective", "Validation", "rows_of"]

AnyObjective = Callable[..., tuple[Tensor, dict[str, Tensor]]] | HasLosses


def rows_of(batch: Any) -> int:
    """Return the number of rows of a batch; 1 if it is None."""
    first = batch[0] if isinstance(batch, tuple) else batch
    return 1 if first is None else len(first)


class Validation:
    """Evaluation of an objective on validation data, with early stopping.

    The module is in eval mode. The objective is copied at each evaluation, so the chains of the
    training do not change. The random numbers are the same at each evaluation.

    Args:
        objective: the objective.
        batches: the validation data.
        seed: seed of the random numbers.
        patience: number of consecutive evaluations without a new lowest loss, after which
            ``exhausted`` is True; None is no limit.
        modules: modules whose weights at the lowest loss are kept; None keeps no weights.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import Pseudolikelihood
        >>> rbm = BernoulliRBM(4, 3, weight=torch.zeros(4, 3))
        >>> validation = Validation(Pseudolikelihood(), Batches(torch.eye(4), batch_size=2))
        >>> round(validation.evaluate(rbm, 0)["loss"], 4)  # 4 log 2
        2.7726
    """

    def __init__(
        self,
        objective: AnyObjective,
        batches: Batches | Passes,
        *,
        seed: int = 0,
        patience: int | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.objective = objective
        self.batches = batches
        self.seed = seed
        self.patience = patience
        self.modules = {} if modules is None else modules
        self.lowest = math.inf
        self.best_step: int | None = None
        self.best: dict[str, Tensor] = {}
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` evaluations had no new lowest loss."""
        return self.patience is not None and self.waited >= self.patience

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """Return the means of loss and metrics over the validation data of all processes."""
        rank, world = connected_ranks()
        objective = copy.deepcopy(self.objective, {id(module): module})
        generator = seeded_generator(self.seed, module_dtype(module)[1], spawned=(1, rank))
        totals, rows = dict[str, Tensor](), 0
        with eval_mode(module):
            for batch in self.batches.one_epoch():
                if isinstance(objective, HasLosses):
                    losses, metrics = objective.losses(module, batch, generator=generator)  # type: ignore[arg-type]
                    loss = losses["energy"]
                else:
                    loss, metrics = objective(module, batch, generator=generator)
                number = rows_of(batch)
                rows += number
                for name, value in {"loss": loss, **metrics}.items():
                    if value.dim() == 0:
                        total = totals.get(name, 0.0) + number * value.detach().double()
                        totals[name] = torch.as_tensor(total)
        means = {name: total / rows for name, total in totals.items()}
        if world > 1:
            means = average_gradients((), means, rows)
        values = {name: float(mean) for name, mean in means.items()}
        self._compare_with_lowest(values["loss"], step)
        return values

    def _compare_with_lowest(self, loss: float, step: int) -> None:
        if loss < self.lowest:
            self.lowest, self.best_step = loss, step
            self.waited = 0
            self.best = {
                f"{name}.{key}": value.detach().clone()
                for name, module in self.modules.items()
                for key, value in module.state_dict().items()
            }
        else:
            self.waited += 1

    def restore_best(self) -> None:
        """Restore the weights with the lowest loss, if they were kept."""
        for name, module in self.modules.items() if self.best else ():
            prefix = f"{name}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in self.best.items() if k.startswith(prefix)}
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        step = -1 if self.best_step is None else self.best_step
        return {
            "lowest": torch.tensor(self.lowest, dtype=torch.float64),
            "counts": torch.tensor([step, self.waited]),
            **{f"best.{k}": v for k, v in self.best.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        self.lowest = float(tensors["lowest"])
        step, self.waited = map(int, tensors["counts"])
        self.best_step = None if step < 0 else step
        self.best = {
            k.removeprefix("best."): v for k, v in tensors.items() if k.startswith("best.")
        }
