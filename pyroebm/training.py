"""Training an energy on data by any objective: the loop, one step for each turn of yours, over pieces that work by hand."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pyroebm.checkpoint import Checkpoint
from pyroebm.energy import Energy, check_energy
from pyroebm.front_door import check_counts
from pyroebm.randomness import seeded_generator

__all__ = ["Batches", "fit", "parameter_groups"]

Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Data = Tensor | tuple[Tensor, ...]


class Batches:
    """Data in random batches: each row once in an epoch, the last batch smaller where it must be.

    The order of an epoch depends on the seed and on its number alone, so that any step's batch can be had at once.

    Args:
        data: N rows, or a tuple of such (images and labels), each ``(N, ...)``.
        batch_size: rows of a batch.
        seed: of the orders.

    Raises:
        ValueError: if there are no rows, the tensors have different numbers of them, or ``batch_size`` < 1.

    Example:
        >>> batches = Batches(torch.arange(5), batch_size=2)
        >>> len(batches), sorted(torch.cat([batches(step) for step in range(3)]).tolist())
        (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, data: Data, batch_size: int, seed: int = 0) -> None:
        parts = data if isinstance(data, tuple) else (data,)
        if not parts or not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
            raise ValueError(f"data must be a tensor of rows, or a tuple of such, got {type(data).__name__}")
        rows = {len(part) for part in parts}
        if len(rows) > 1 or 0 in rows:
            raise ValueError(f"data must have rows, as many in each tensor, got {[len(part) for part in parts]}")
        check_counts({"batch_size": 1}, batch_size)
        self.data, self.rows, self.batch_size, self.seed = data, len(parts[0]), batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.rows / self.batch_size)

    def __call__(self, step: int) -> Data:
        """The batch of a step, counted from 0 through all epochs."""
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            order = torch.randperm(self.rows, generator=seeded_generator(self.seed, spawned=epoch))
            self._epoch, self._order = epoch, order
        chosen = self._order[number * self.batch_size : (number + 1) * self.batch_size]
        if isinstance(self.data, tuple):
            return tuple(part.index_select(0, chosen.to(part.device)) for part in self.data)
        return self.data.index_select(0, chosen.to(self.data.device))


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """What is to be trained, in two groups: weights, which decay, and biases and scales (of one dimension or none), which do not.

    Without decay it is one group, and what the optimizer does about it is its own affair.

    Example:
        >>> [len(group["params"]) for group in parameter_groups([nn.Linear(2, 3)], weight_decay=1e-4)]
        [1, 1]
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trained}] if trained else []
    weights, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adam(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.Adam(groups, lr=1e-3, fused=True)


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]).norm()


def fit(
    energy: Energy,
    objective: Objective,
    data: Data,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 100,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    penalties: Sequence[Callable[[Energy, Any], Tensor]] = (),
    transform: Callable[[Energy, Any, Mapping[str, Tensor]], None] | None = None,
    average: AveragedModel | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[tuple[int, float, dict[str, float]]]:
    r"""Train an energy on data, in place, one step for each turn of your loop: look, stop or change what you like in between.

    A step is: a batch, the objective's loss and the penalties, ``backward()``, the transform of the gradients, the optimizer's
    step, the schedule's.

    Args:
        energy: its parameters are trained, and the objective's with them.
        objective: called as ``objective(energy, batch, generator=...)``: one of :mod:`pyroebm.objectives`.
        data: rows ``(N, *event)``, or a tuple of such where the objective takes one; on the energy's device.
        steps: number of steps, or
        epochs: number of passes over the data.
        batch_size: rows of a batch, drawn without replacement.
        optimizer: from groups of parameters to an optimizer, such as ``functools.partial(torch.optim.SGD, lr=0.01,
            momentum=0.5)``; None is ``Adam(lr=1e-3)``. With ``fused=True`` a step is a good deal faster.
        schedule: from the optimizer to one of ``torch.optim.lr_scheduler``, which takes a step after each of ours.
        weight_decay: of tensors of two or more dimensions, as the optimizer understands it; biases do not decay. 0 leaves the
            matter to the optimizer.
        max_grad_norm: clip the gradient's norm to this; None does not.
        penalties: each called as ``penalty(energy, batch)`` and added to the loss, for example
            :class:`~pyroebm.objectives.Sparsity`.
        transform: called as ``transform(energy, batch, facts)`` when the gradients are there, to change them in place, for
            example :class:`~pyroebm.objectives.Centring`.
        average: ``torch.optim.swa_utils.AveragedModel(energy, ...)``, updated after each step: a running mean of parameters.
        checkpoint: a file to keep everything in that a training needs to go on: parameters, the optimizer's and the schedule's
            state, the objective's buffers (its chains), the average, the offsets of ``transform``, the generator.
        checkpoint_every: seconds after which it is written again; also at the end, and where your loop breaks off.
        resume: go on from ``checkpoint`` where there is one, bit for bit as if it had not been interrupted (on one machine).
            The optimizer's and the schedule's settings, such as the learning rate, are then those of the checkpoint.
        seed: of the order of the data and of the generator that the objective draws from; torch's global one is not used.
        progress: True, False, or None: a bar on terminals only.

    Yields:
        step, loss and facts: the objective's numbers, ``penalty`` where there are any, ``grad_norm`` and ``lr``.

    Raises:
        ValueError: if an argument is out of range, ``checkpoint`` holds a training and ``resume`` is False, or it is one of other
            settings; at the call, not in the loop.
        FloatingPointError: at a loss or gradient that is not finite, with the step and the facts. Parameters and optimizer
            are as the step before left them.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import PersistentCD
        >>> rbm, data = BernoulliRBM(4, 3), torch.eye(4)
        >>> for step, loss, facts in fit(rbm, PersistentCD(num_chains=10), data, epochs=2, batch_size=2):
        ...     print(step, "energy_gap" in facts)
        0 True
        1 True
        2 True
        3 True
    """
    check_energy(energy)
    batches = Batches(data, batch_size, seed)
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps={steps}, epochs={epochs}")
    check_counts({"steps" if epochs is None else "epochs": 1}, *(n for n in (steps, epochs) if n is not None))
    total = steps if steps is not None else (epochs or 0) * len(batches)
    if resume and checkpoint is None:
        raise ValueError("resume=True goes on from a checkpoint: give checkpoint")
    given = {"energy": energy, "objective": objective, "transform": transform, "average": average}
    given |= {f"penalty{k}": penalty for k, penalty in enumerate(penalties)}
    modules = {name: module for name, module in given.items() if isinstance(module, nn.Module)}
    groups = parameter_groups([modules[name] for name in ("energy", "objective") if name in modules], weight_decay)
    if not groups:
        raise ValueError(f"{type(energy).__name__} has no parameter that requires a gradient: there is nothing to train")
    parameters = list(itertools.chain.from_iterable(group["params"] for group in groups))
    chosen = _adam(groups) if optimizer is None else optimizer(groups)
    plan = None if schedule is None else schedule(chosen)
    if isinstance(chosen, torch.optim.LBFGS) or isinstance(plan, ReduceLROnPlateau):
        raise ValueError(
            f"a step of {type(chosen).__name__} with {type(plan).__name__} needs the loss again: take an optimizer that steps on"
            " gradients alone, and a schedule that counts steps"
        )
    generator = seeded_generator(seed, energy.device)
    names = {name: type(part).__name__ for name, part in (given | {"optimizer": chosen, "schedule": plan}).items()}
    settings = names | {"rows": batches.rows, "batch_size": batch_size, "seed": seed, "dtype": str(energy.dtype)}
    settings |= {f"objective.{k}": v for k, v in vars(objective).items() if k[0] != "_" and type(v) in (int, float, str)}
    kept = None if checkpoint is None else Checkpoint(checkpoint, modules, chosen, plan, generator, settings)
    done = 0
    if kept is not None and kept.exists:
        if not resume:
            raise ValueError(f"checkpoint={str(checkpoint)!r} holds a training: go on with resume=True, or name a new file")
        done = kept.load()

    def one(step: int) -> tuple[float, dict[str, float]]:
        batch = batches(step)
        chosen.zero_grad()
        loss, seen = objective(energy, batch, generator=generator)
        if penalties:
            penalty = torch.stack([term(energy, batch) for term in penalties]).sum()
            loss, seen = loss + penalty, seen | {"penalty": penalty.detach()}
        loss.backward(inputs=parameters)
        if transform is not None:
            transform(energy, batch, seen)
        norm = float(_norm(parameters) if max_grad_norm is None else nn.utils.clip_grad_norm_(parameters, max_grad_norm))
        value, facts = float(loss.detach()), {name: float(fact) for name, fact in seen.items() if fact.dim() == 0}
        facts |= {"grad_norm": norm, "lr": float(chosen.param_groups[0]["lr"])}
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError(
                f"fit: at step {step} the loss is {value} and the gradient's norm {norm}; parameters and optimizer are as the"
                f" step before left them. Facts: {facts}"
            )
        chosen.step()
        if plan is not None:
            plan.step()
        if average is not None:
            average.update_parameters(energy)
        return value, facts

    def loop() -> Iterator[tuple[int, float, dict[str, float]]]:
        saved = time.monotonic()
        bar = tqdm(range(done, total), "fit", initial=done, total=total, disable=None if progress is None else not progress)
        for step in bar:
            value, facts = one(step)
            if kept is not None and (step + 1 == total or time.monotonic() - saved >= checkpoint_every):
                kept.save(step + 1)
                saved = time.monotonic()
            try:
                yield step, value, facts
            except GeneratorExit:  # the loop was left; what an exception within a step leaves is never saved
                if kept is not None:
                    kept.save(step + 1)
                raise

    return loop()
