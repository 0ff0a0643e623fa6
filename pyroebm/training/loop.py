"""Training an energy on data by any objective: the loop, one step for each turn of yours, over
pieces that work by hand."""

from __future__ import annotations

import dataclasses
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

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import seeded_generator
from pyroebm.objectives.base import HasLosses
from pyroebm.training.batches import Batches, Data
from pyroebm.training.checkpoint import Checkpoint, TrainingState, settings_of
from pyroebm.training.distributed import average_gradients, connected_ranks, same_start
from pyroebm.training.guards import Guard, Rollback
from pyroebm.training.log import TrainingLog

__all__ = ["Batches", "Guard", "fit", "parameter_groups"]

Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]] | HasLosses
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """What is to be trained, in two groups: weights, which decay, and biases and scales (of one
    dimension or none), which do not.

    Without decay it is one group, and what the optimizer does about it is its own affair.

    Example:
        >>> [
        ...     len(group["params"])
        ...     for group in parameter_groups([nn.Linear(2, 3)], weight_decay=1e-4)
        ... ]
        [1, 1]
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trained}] if trained else []
    weights, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adam(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.Adam(groups, lr=1e-3, fused=True)


@dataclasses.dataclass(frozen=True)
class _Player:
    """A loss's own parameters, and what steps them."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler | None

    def norm(self, most: float | None) -> Tensor:
        """The norm of the gradient, which is then clipped to ``most``; 0 where no parameter has
        one."""
        if most is not None:
            return nn.utils.clip_grad_norm_(self.parameters, most)
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters if p.grad is not None]
        return torch.stack(norms).norm() if norms else torch.zeros(())


def _players(
    energy: Energy,
    objective: Objective,
    optimizer: MakeOptimizer | Mapping[str, MakeOptimizer] | None,
    schedule: MakeSchedule | Mapping[str, MakeSchedule] | None,
    weight_decay: float,
) -> dict[str, _Player]:
    """Who is trained: the energy, with the objective's own parameters, or all players of an
    objective of several losses."""
    if isinstance(objective, HasLosses):
        parts: dict[str, list[nn.Module]] = {
            k: [nn.ParameterList(own)] for k, own in objective.trained(energy).items()
        }
    else:
        parts = {
            "energy": [module for module in (energy, objective) if isinstance(module, nn.Module)]
        }
    for name, given in (("optimizer", optimizer), ("schedule", schedule)):
        if isinstance(given, Mapping) and not (
            set(given) <= set(parts) and (name == "schedule" or set(given) == set(parts))
        ):
            raise ValueError(
                f"{name} must be one for all, or one for each of {sorted(parts)}, got"
                f" {sorted(given)}"
            )
    players = {}
    for key, modules in parts.items():
        groups = parameter_groups(modules, weight_decay)
        if not groups:
            raise ValueError(
                f"{type(energy).__name__} has no parameter that requires a gradient: there is"
                " nothing to train"
            )
        make = optimizer[key] if isinstance(optimizer, Mapping) else optimizer
        chosen = _adam(groups) if make is None else make(groups)
        make_schedule = schedule.get(key) if isinstance(schedule, Mapping) else schedule
        plan = None if make_schedule is None else make_schedule(chosen)
        if isinstance(chosen, torch.optim.LBFGS) or isinstance(plan, ReduceLROnPlateau):
            raise ValueError(
                f"a step of {type(chosen).__name__} with {type(plan).__name__} needs the loss"
                " again: take an optimizer that steps"
                " on gradients alone, and a schedule that counts steps"
            )
        players[key] = _Player([p for group in groups for p in group["params"]], chosen, plan)
    every = [id(p) for player in players.values() for p in player.parameters]
    if "energy" not in players or len(set(every)) < len(every):
        raise ValueError(
            "trained() must name the parameters of 'energy' and of others, none of them twice,"
            f" got {len(every)} of which"
            f" {len(set(every))} differ, for {list(players)}"
        )
    return players


def fit(
    energy: Energy,
    objective: Objective,
    data: Data,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 100,
    optimizer: MakeOptimizer | Mapping[str, MakeOptimizer] | None = None,
    schedule: MakeSchedule | Mapping[str, MakeSchedule] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    penalties: Sequence[Callable[[Energy, Any], Tensor]] = (),
    transform: Callable[[Energy, Any, Mapping[str, Tensor]], None] | None = None,
    average: AveragedModel | None = None,
    guard: Guard = Guard(),  # noqa: B008 - frozen
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    log: str | Path | None = None,
    log_every: int = 1,
    tensorboard: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[tuple[int, float, dict[str, float]]]:
    r"""Train an energy on data, in place, one step for each turn of your loop: look, stop or change
    what you like in between.

    A step is: a batch, the objective's loss and the penalties, ``backward()``, the transform of the
    gradients, the optimizer's step, the schedule's. An objective of several losses
    (:class:`~pyroebm.objectives.HasLosses`) has an optimizer for each, all stepped from the
    gradients at one point; penalties belong to the energy's, which is the loss that is yielded.

    Within :func:`pyroebm.training.process_group` all processes of ``torchrun`` train together: each
    takes its share of every batch and has chains and random numbers of its own, gradients and facts
    are averaged, and the first writes the files.

    Args:
        energy: its parameters are trained, and the objective's with them.
        objective: called as ``objective(energy, batch, generator=...)``: one of
            :mod:`pyroebm.objectives`.
        data: rows ``(N, *event)``, or a tuple of such where the objective takes one; on the
            energy's device.
        steps: number of steps, or
        epochs: number of passes over the data.
        batch_size: rows of a batch, drawn without replacement.
        optimizer: from groups of parameters to an optimizer, such as
            ``functools.partial(torch.optim.SGD, lr=0.01, momentum=0.5)``; None is
            ``Adam(lr=1e-3)``. With ``fused=True`` a step is a good deal faster. Of several losses
            it may be a dict, with one for each.
        schedule: from the optimizer to one of ``torch.optim.lr_scheduler``, which takes a step
            after each of ours; or a dict.
        weight_decay: of tensors of two or more dimensions, as the optimizer understands it; biases
            do not decay. 0 leaves the matter to the optimizer.
        max_grad_norm: clip the gradient's norm to this; None does not.
        penalties: each called as ``penalty(energy, batch)`` and added to the loss, for example
            :class:`~pyroebm.objectives.Sparsity`.
        transform: called as ``transform(energy, batch, facts)`` when the gradients are there, to
            change them in place, for example :class:`~pyroebm.objectives.Centering`.
        average: a running mean of parameters, updated after each step, such as
            ``AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(0.999))`` of
            ``torch.optim.swa_utils``; ``average.module`` is the energy to use.
        guard: what is a failed step, and whether it is an error or goes back; see
            :class:`~pyroebm.training.Guard`.
        checkpoint: a file to keep everything in that a training needs to go on: parameters, the
            optimizer's and the schedule's state, the objective's buffers (its chains), the average,
            the offsets of ``transform``, the generator.
        checkpoint_every: seconds after which it is written again; also at the end, and where your
            loop breaks off.
        resume: go on from ``checkpoint`` where there is one, bit for bit as if it had not been
            interrupted (on one machine). The optimizer's and the schedule's settings, such as the
            learning rate, are then those of the checkpoint.
        log: a file of JSON lines, a step each: step, loss, facts and seconds. After ``resume`` it
            is, seconds apart, that of an uninterrupted run.
        log_every: steps from one line to the next.
        tensorboard: a folder of curves, where the package tensorboard is installed.
        seed: of the order of the data and of the generator that the objective draws from; torch's
            global one is not used.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Yields:
        step, loss and facts: the objective's numbers, ``penalty`` where there are any,
        ``grad_norm`` and ``lr``; of several losses ``loss_NAME`` and ``grad_norm_NAME`` of each;
        ``rollbacks`` so far, where the guard goes back.

    Raises:
        ValueError: if an argument is out of range, ``checkpoint`` or ``log`` holds a training and
            ``resume`` is False, or it is one of other settings; at the call, not in the loop.
        FloatingPointError: at a failed step, with its number and the facts, unless the guard goes
            back. Parameters and optimizer are as the step before left them.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import PersistentCD
        >>> rbm, data = BernoulliRBM(4, 3), torch.eye(4)
        >>> for step, loss, facts in fit(
        ...     rbm, PersistentCD(num_chains=10), data, epochs=2, batch_size=2
        ... ):
        ...     print(step, "energy_gap" in facts)
        0 True
        1 True
        2 True
        3 True
    """
    check_energy(energy)
    ranks = connected_ranks()
    batches = Batches(data, batch_size, seed, ranks)
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps={steps}, epochs={epochs}")
    check_counts(
        {"steps" if epochs is None else "epochs": 1}, *(n for n in (steps, epochs) if n is not None)
    )
    total = steps if steps is not None else (epochs or 0) * len(batches)
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(
            f"max_grad_norm must be positive, or None, got max_grad_norm={max_grad_norm}"
        )
    if not (0.0 <= weight_decay < math.inf and checkpoint_every >= 0.0):
        raise ValueError(
            "weight_decay and checkpoint_every must not be negative, got"
            f" weight_decay={weight_decay},"
            f" checkpoint_every={checkpoint_every}"
        )
    if resume and checkpoint is None:
        raise ValueError("resume=True goes on from a checkpoint: give checkpoint")
    given: dict[str, Any] = {
        "energy": energy,
        "objective": objective,
        "transform": transform,
        "average": average,
    }
    given |= {f"penalty{k}": penalty for k, penalty in enumerate(penalties)}
    modules = {name: module for name, module in given.items() if isinstance(module, nn.Module)}
    players = _players(energy, objective, optimizer, schedule, weight_decay)
    parameters = list(
        itertools.chain.from_iterable(player.parameters for player in players.values())
    )
    plans = {key: player.schedule for key, player in players.items() if player.schedule is not None}
    optimizers = {key: player.optimizer for key, player in players.items()}
    generator = seeded_generator(seed, energy.device, spawned=(0, ranks[0]) if ranks[0] else None)
    state = TrainingState(modules, optimizers, plans, generator)
    rollback = Rollback(guard, state)
    names = {name: type(part).__name__ for name, part in given.items()}
    names |= {
        f"{key}.{k}": type(part).__name__
        for key in players
        for k, part in vars(players[key]).items()
        if k != "parameters"
    }
    settings = names | {
        "rows": batches.rows,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": str(energy.dtype),
    }
    settings |= settings_of("objective", objective)
    kept = (
        None
        if checkpoint is None
        else Checkpoint(checkpoint, state, settings | {"ranks": ranks[1]})
    )
    done = 0
    if kept is not None and kept.exists:
        if not resume:
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} holds a training: go on with resume=True, or name"
                " a new file"
            )
        done, more = kept.load()
        rollback.restore(more)
    lines = TrainingLog(log, tensorboard, log_every, done, resume) if ranks[0] == 0 else None

    def save(step: int) -> None:
        if kept is not None:
            kept.save(step + 1, rollback.tensors())

    def differentiate(batch: Any) -> dict[str, Tensor]:
        if isinstance(objective, HasLosses):
            given_losses, seen = objective.losses(energy, batch, generator=generator)
            losses = dict(given_losses)
            if set(losses) != set(players):
                raise ValueError(
                    f"losses() must give one for each of {sorted(players)}, which trained() names,"
                    f" got {sorted(losses)}"
                )
        else:
            loss, seen = objective(energy, batch, generator=generator)
            losses = {"energy": loss}
        if penalties:
            penalty = torch.stack([term(energy, batch) for term in penalties]).sum()
            losses["energy"], seen = (
                losses["energy"] + penalty,
                seen | {"penalty": penalty.detach()},
            )
        for number, (key, player) in enumerate(players.items(), 1):
            player.optimizer.zero_grad()
            losses[key].backward(inputs=player.parameters, retain_graph=number < len(players))
        return seen | {f"loss_{key}": loss.detach() for key, loss in losses.items()}

    def one(step: int, due: bool) -> tuple[float, dict[str, float], bool]:
        batch = batches(step)
        seen = differentiate(batch)
        if ranks[1] > 1:  # facts too: what depends on them happens in all processes or in none
            seen["due"] = torch.tensor(float(due and ranks[0] == 0))
            seen = average_gradients(parameters, seen, len(batches.numbers(step)))
            due = bool(seen.pop("due") > 0)
        if transform is not None:
            transform(energy, batch, seen)
            if ranks[1] > 1:  # it may have looked at the batch
                average_gradients(parameters, {}, 1.0)
        facts = {name: float(fact) for name, fact in seen.items() if fact.dim() == 0}
        norms = {
            f"grad_norm_{key}": float(player.norm(max_grad_norm)) for key, player in players.items()
        }
        losses = {f"loss_{key}": facts.pop(f"loss_{key}") for key in players}
        facts |= {
            "grad_norm": norms["grad_norm_energy"],
            "lr": float(optimizers["energy"].param_groups[0]["lr"]),
        }
        facts |= losses | norms if len(players) > 1 else {}
        gap = {
            name: facts[name]
            for name in ("energy_gap",)
            if name in facts and guard.max_energy_gap is not None
        }
        numbers = (
            losses | norms
            if len(players) > 1
            else {"loss": losses["loss_energy"], "grad_norm": facts["grad_norm"]}
        )
        complaint = guard.complaint(numbers | gap)
        if complaint is None:
            for player in players.values():
                player.optimizer.step()
            if average is not None:
                average.update_parameters(energy)
        else:
            rollback.failed(step, complaint, facts)
        for plan in plans.values():
            plan.step()
        if complaint is None:
            rollback.passed(step)
        return (
            losses["loss_energy"],
            facts | ({"rollbacks": float(rollback.count)} if guard.rollback else {}),
            due,
        )

    def loop() -> Iterator[tuple[int, float, dict[str, float]]]:
        if ranks[1] > 1:
            same_start(parameters)
        saved = time.monotonic()
        show = progress if ranks[0] == 0 else False
        with Progress(total, "fit", show=show, done=done) as shown:
            for step in range(done, total):
                value, facts, due = one(step, time.monotonic() - saved >= checkpoint_every)
                # before the checkpoint, which so never knows of a step that the log does not
                if lines is not None:
                    lines.write(step, value, facts)
                if due or step + 1 == total:
                    save(step)
                    saved = time.monotonic()
                shown.note(loss=value)
                shown.update()
                try:
                    yield step, value, facts
                # the loop was left; what an exception within a step leaves is never saved
                except GeneratorExit:
                    save(step)
                    raise
        if lines is not None:
            lines.close()

    return loop()
