"""The training loop as an object with ``step``, ``save`` and ``restore``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pyroebm.core._checks import check_counts
from pyroebm.core._torch_private import norm_of_each
from pyroebm.core.files import Lock, check_writable, checksum
from pyroebm.core.progress import Progress
from pyroebm.core.rng import fresh_seed, seeded_generator
from pyroebm.objectives.base import HasLosses, Objective, module_dtype
from pyroebm.training.checkpoint import Checkpoint, TrainingState, saved_seed, settings_of
from pyroebm.training.data import Batches, Data, Passes, RowError, batches_of
from pyroebm.training.distributed import (
    ProcessError,
    agree,
    average_gradients,
    connected_ranks,
    gather_bytes,
    reason_of_end,
    same_start,
)
from pyroebm.training.guards import Guard, Rollback, StepError
from pyroebm.training.history import History
from pyroebm.training.log import TrainingLog
from pyroebm.training.optimizers import AnyOptimizer, AnySchedule, make_players
from pyroebm.training.validation import AnyObjective, Validation, rows_of

__all__ = ["Step", "Trainer"]

#: What processes exchange at each step: whether they take it.
GOES_ON, FAILED, LEFT = range(3)
#: Seconds between checkpoints.
CHECKPOINT_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a training.

    Attributes:
        number: counted from 0.
        loss: before the update.
        metrics: numbers by name; see :class:`Trainer`.

    Example:
        >>> Step(3, 0.5, {"grad_norm": 1.0}).metrics["grad_norm"]
        1.0
    """

    number: int
    loss: float
    metrics: dict[str, float]


class Trainer:
    r"""Train a module by an objective, in place.

    :func:`fit` runs a trainer to its end, and :func:`fit_steps` step by step.

    A step is: a batch, the loss of the objective and the penalties, ``backward()``, the transform
    of the gradients, the step of the optimizer, the step of the schedule. An objective with several
    losses (:class:`~pyroebm.objectives.HasLosses`) has an optimizer for each; all gradients are
    computed before any of them takes a step. Penalties are added to the loss ``"energy"``, which is
    the reported loss.

    The metrics of a step are those of the objective, ``penalty`` with penalties, ``grad_norm`` and
    ``lr``; with several losses ``loss_NAME`` and ``grad_norm_NAME``; ``rollbacks``, their number so
    far, if the guard rolls back; ``validation_NAME`` after an evaluation.

    Within :func:`pyroebm.training.process_group` all processes of ``torchrun`` train together: each
    has a share of every batch and its own chains and random numbers, gradients and metrics are
    averaged, and the first process writes the files.

    Args:
        module: an energy, a flow or a classifier, whose parameters are trained with those of the
            objective.
        objective: one of :mod:`pyroebm.objectives`, or a function that is called as
            ``objective(module, batch, generator=...)``.
        data: rows ``(N, *event)``: a tensor, a NumPy array, a data frame, or a tuple of these; or a
            ``torch.utils.data.Dataset`` or ``DataLoader``. Dtype, device, uint8 images and image
            shapes are converted (see :class:`~pyroebm.training.data.Conversion`), and rows are
            checked against the support of the energy. None if the objective takes no data.
        num_steps: number of steps; give either this or ``num_epochs``.
        num_epochs: number of passes over the data.
        batch_size: number of rows of a batch, drawn without replacement. A ``DataLoader`` has its
            own batch size and order.
        optimizer: name of a class of ``torch.optim``; or a function from parameter groups to an
            optimizer; or an optimizer, which must have all trained parameters. For several losses
            it may be a dict by their names.
        lr: learning rate of a named optimizer, or a dict; None is the objective's ``lr``.
        schedule: learning rate schedule: "constant", "cosine" (to 0 along a half cosine), or a
            function from the optimizer to a schedule of ``torch.optim.lr_scheduler``, or a dict. It
            takes a step after each training step. None is the objective's ``schedule``.
        weight_decay: weight decay of tensors with two or more dimensions, as defined by the
            optimizer; biases do not decay. 0 is the default of the optimizer.
        max_grad_norm: largest norm of the gradient, to which it is clipped; None does not clip.
        penalties: functions ``penalty(module, batch)`` that are added to the loss, such as
            :class:`~pyroebm.objectives.Sparsity`.
        transform: a function ``transform(module, batch, metrics)`` that changes the gradients in
            place, such as :class:`~pyroebm.objectives.Centering`.
        average: a running mean of parameters, updated after each step, such as
            ``AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(0.999))`` of
            ``torch.optim.swa_utils``; ``average.module`` is the averaged module.
        guard: criterion for failed steps, and whether to raise or roll back; see
            :class:`~pyroebm.training.Guard`.
        validation: validation data, of the same kind as ``data``. The columns of a data frame are
            put in the order of those of ``data``.
        validation_objective: objective for the validation data; None is ``objective``. Contrastive
            losses do not measure the fit, so ``patience`` and ``keep_best`` need another objective,
            for example :class:`~pyroebm.objectives.Pseudolikelihood`.
        validate_every: number of steps between evaluations; None is an epoch if ``num_epochs`` is
            given, else a twentieth of ``num_steps``. The last step is always evaluated.
        patience: number of consecutive evaluations without a new lowest validation loss, after
            which the training stops; None does not stop.
        keep_best: whether to restore the weights with the lowest validation loss at the end.
        checkpoint: a file for the complete state of the training: parameters, states of optimizers
            and schedules, buffers of the objective (its chains), the average, the offsets of
            ``transform``, the generator, the history, the best weights. It is written every minute,
            at the end, and when the training is stopped.
        resume: whether to continue from ``checkpoint`` if it exists, bit for bit as an
            uninterrupted training (on one machine). Settings of the optimizer and the schedule,
            such as the learning rate, are then those of the checkpoint. Not supported with a
            ``DataLoader``, whose order is unknown. A checkpoint of other data, another structure of
            the module, or other settings of the objective or of its target raises an error that
            lists the differences. The items of a ``Dataset`` are not compared, since they may be
            random.
        log: a file of JSON lines with step, loss, metrics and seconds. After ``resume`` it is equal
            to that of an uninterrupted training, except for the seconds.
        log_every: number of steps between recorded steps, in the log and in the history.
        tensorboard: a folder for TensorBoard, which must be installed.
        seed: seed of the order of the data and of the objective's generator; None draws a seed,
            which is stored in ``history.seed`` and in the checkpoint. torch's default generator is
            not used. The initial weights were drawn when the module was constructed: give it a
            ``generator`` for a training that can be repeated.
        progress: True shows progress, False hides it, None shows it after one second.

    Attributes:
        history: the :class:`~pyroebm.training.History` so far.
        num_steps: number of steps of the whole training.
        steps_done: number of steps so far.

    Raises:
        ValueError: if an argument is out of range, the data do not fit the module, ``checkpoint``
            or ``log`` exists and ``resume`` is False, or the checkpoint has other settings.
        FileError: if a file cannot be written, is damaged, or is in use by another process.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import PersistentCD
        >>> trainer = Trainer(BernoulliRBM(4, 3), PersistentCD(10), torch.eye(4), num_epochs=2)
        >>> while not trainer.finished:
        ...     step = trainer.step()
        ...     print(step.number, "energy_gap" in step.metrics)
        0 True
        1 True
    """

    def __init__(
        self,
        module: nn.Module,
        objective: AnyObjective,
        data: Data = None,
        *,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        batch_size: int = 100,
        optimizer: AnyOptimizer | Mapping[str, AnyOptimizer] = "adam",
        lr: float | Mapping[str, float] | None = None,
        schedule: AnySchedule | Mapping[str, AnySchedule] | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        penalties: Sequence[Callable[[Any, Any], Tensor]] = (),
        transform: Callable[[Any, Any, Mapping[str, Tensor]], None] | None = None,
        average: AveragedModel | None = None,
        guard: Guard = Guard(),  # noqa: B008 - frozen
        validation: Data = None,
        validation_objective: AnyObjective | None = None,
        validate_every: int | None = None,
        patience: int | None = None,
        keep_best: bool = False,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        log: str | Path | None = None,
        log_every: int = 1,
        tensorboard: str | Path | None = None,
        seed: int | None = 0,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"module must be a torch.nn.Module, such as an energy or a flow, got"
                f" {type(module).__name__}"
            )
        if isinstance(objective, type) or not (
            callable(objective) or isinstance(objective, HasLosses)
        ):
            name = objective.__name__ if isinstance(objective, type) else type(objective).__name__
            some = f"{name}()" if isinstance(objective, type) else "PersistentCD(100)"
            raise ValueError(
                f"objective must be an instance of an objective, such as {some}, got {name}"
            )
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(
                f"max_grad_norm must be positive, or None, got max_grad_norm={max_grad_norm}"
            )
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must be nonnegative and finite, got weight_decay={weight_decay}"
            )
        if resume and checkpoint is None:
            raise ValueError("resume=True continues from a checkpoint: give checkpoint")
        exists = checkpoint is not None and Path(checkpoint).exists()
        self._ranks = connected_ranks()
        seed = self._common_seed(checkpoint if resume and exists else None, seed)
        self.module = module
        self.objective = objective
        self._batches = (
            None
            if data is None
            else batches_of(
                data,
                module,
                batch_size,
                seed=seed,
                ranks=self._ranks,
                events_for=_takes_events_alone(objective),
            )
        )
        if resume and isinstance(self._batches, Passes):
            raise ValueError(
                "data must not be a DataLoader with resume=True, since its order is unknown: give"
                " the rows or the Dataset itself"
            )
        self.num_steps = self._count_steps(num_steps, num_epochs)
        self._max_grad_norm = max_grad_norm
        self._penalties = tuple(penalties)
        self._transform = transform
        self._average = average
        self._guard = guard
        self._log_every = log_every
        self._progress = progress
        self._players = make_players(
            module, objective, optimizer, lr, schedule, weight_decay, self.num_steps
        )
        self._parameters = list(
            itertools.chain.from_iterable(p.parameters for p in self._players.values())
        )
        self._optimizers = {key: player.optimizer for key, player in self._players.items()}
        self._plans = {
            key: player.schedule
            for key, player in self._players.items()
            if player.schedule is not None
        }
        parts: dict[str, Any] = {
            "module": module,
            "objective": objective,
            "transform": transform,
            "average": average,
            **{f"penalty{k}": penalty for k, penalty in enumerate(penalties)},
        }
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        dtype, device = module_dtype(module)
        rank = self._ranks[0]
        self._generator = seeded_generator(seed, device, spawned=(0, rank) if rank else None)
        state = TrainingState(modules, self._optimizers, self._plans, self._generator)
        self._rollback = Rollback(guard, state)
        self._validate_every = validate_every
        self._validation = self._validator(
            validation, validation_objective, batch_size, seed, patience, keep_best, modules
        )
        if validate_every is None:
            per_epoch = num_epochs is not None and self._batches is not None
            self._validate_every = (
                len(self._batches) if per_epoch else max(1, self.num_steps // 20)  # type: ignore[arg-type]
            )
        self.history = History(seed)
        self.steps_done = 0
        self._stop_requested = self._stopped = False
        #: Of the last step.
        self._metrics: dict[str, float] = {}
        self._lock: Lock | None = None
        self._checkpoint: Checkpoint | None = None
        if checkpoint is not None:
            settings: dict[str, Any] = {name: type(part).__name__ for name, part in parts.items()}
            settings |= {
                f"{key}.{name}": type(part).__name__
                for key, player in self._players.items()
                for name, part in (("optimizer", player.optimizer), ("schedule", player.schedule))
            }
            trained = frozenset(map(id, self._parameters))
            seen: set[int] = set()
            settings |= {
                "data": _fingerprint(self._batches),
                "validation": None
                if self._validation is None
                else _fingerprint(self._validation.batches),
                "batch_size": batch_size,
                "seed": seed,
                "dtype": str(dtype),
                "ranks": self._ranks[1],
                **settings_of("module", module, trained, seen),
                **settings_of("objective", objective, trained, seen),
            }
            self._checkpoint = Checkpoint(checkpoint, state, settings)
            if rank == 0:
                check_writable(checkpoint)
                self._lock = Lock(Path(f"{checkpoint}.lock"), Path(checkpoint))
                self._lock.acquire()
        try:
            if checkpoint is not None and Path(checkpoint).exists():
                if not resume:
                    raise ValueError(
                        f"checkpoint={str(checkpoint)!r} must be a new file, but exists: continue"
                        " with resume=True, or give another name"
                    )
                self.restore()
            self._log = (
                TrainingLog(log, tensorboard, every=log_every, done=self.steps_done, resume=resume)
                if rank == 0
                else None
            )
            if self._ranks[1] > 1:
                same_start(self._parameters)
        except BaseException:
            self._unlock()
            raise
        self._saved = time.monotonic()

    def _common_seed(self, checkpoint: str | Path | None, seed: int | None) -> int:
        """Return the seed of all processes: as given, else of the checkpoint, else a new one."""
        if seed is not None:
            return fresh_seed(seed)
        if checkpoint is not None:
            return saved_seed(checkpoint)
        return int(gather_bytes(str(fresh_seed(None)).encode())[0])

    def _count_steps(self, num_steps: int | None, num_epochs: int | None) -> int:
        if (num_steps is None) == (num_epochs is None):
            raise ValueError(
                f"give either num_steps or num_epochs, got num_steps={num_steps},"
                f" num_epochs={num_epochs}"
            )
        if num_steps is not None:
            check_counts({"num_steps": 1}, num_steps)
            return num_steps
        check_counts({"num_epochs": 1}, num_epochs)
        if self._batches is None:
            raise ValueError(
                f"num_epochs must be None without data, got num_epochs={num_epochs}: give num_steps"
            )
        return (num_epochs or 0) * len(self._batches)

    def _validator(
        self,
        validation: Data,
        objective: AnyObjective | None,
        batch_size: int,
        seed: int,
        patience: int | None,
        keep_best: bool,
        modules: Mapping[str, nn.Module],
    ) -> Validation | None:
        if validation is None:
            given = {
                "validation_objective": objective,
                "validate_every": self._validate_every,
                "patience": patience,
                "keep_best": keep_best or None,
            }
            if named := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{' and '.join(named)} needs validation data: give validation")
            return None
        for name, count in (("patience", patience), ("validate_every", self._validate_every)):
            if count is not None:
                check_counts({name: 1}, count)
        chosen = self.objective if objective is None else objective
        if isinstance(chosen, Objective) and not chosen.measures_fit and (patience or keep_best):
            option = "patience" if patience else "keep_best"
            raise ValueError(
                f"{option} needs a validation_objective whose losses of different steps can be"
                " compared, such as Pseudolikelihood() for discrete and"
                " DenoisingScoreMatching(sigma) for continuous data, got"
                f" {type(chosen).__name__}, whose loss does not measure the fit"
            )
        batches = batches_of(
            validation,
            self.module,
            batch_size,
            seed=seed,
            ranks=self._ranks,
            argument="validation",
            columns=None if self._batches is None else self._batches.columns,
            events_for=_takes_events_alone(chosen),
        )
        best = {name: modules[name] for name in ("module", "objective") if name in modules}
        return Validation(
            chosen, batches, seed=seed, patience=patience, modules=best if keep_best else None
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the training was stopped."""
        return self.steps_done >= self.num_steps or self._stopped

    def step(self) -> Step:
        """Take a step.

        Raises:
            ValueError: if the training is finished.
            StepError: at a failed step, with its number, the metrics and the row of the data that
                is at fault, unless the guard rolls back. Parameters and optimizer are those after
                the previous step, unless the optimizer itself failed. Also if the validation after
                the step raises an exception.
        """
        if self.finished:
            raise ValueError(f"the training is finished after {self.steps_done} steps")
        number = self.steps_done
        due = time.monotonic() - self._saved >= CHECKPOINT_EVERY
        loss, metrics, due = self._update(number, due)
        self.steps_done += 1
        if number % self._log_every == 0:
            self.history.record(number, {"loss": loss, **metrics})
        metrics = metrics | self._validate(number, metrics)
        if self._ranks[1] == 1 and self._stop_requested:
            self._stopped = True
        left = self.steps_done < self.num_steps
        self.history.interrupted = left and self._stopped and not self.history.stopped_early
        # before the checkpoint, so that the log has every step of the checkpoint
        if self._log is not None:
            self._log.write(number, loss, metrics)
        if self._checkpoint is not None and (due or self.finished):
            self.save()
        return Step(number, loss, metrics)

    def steps(self) -> Iterator[Step]:
        """Iterate over the remaining steps, with progress.

        If the loop ends early, the checkpoint is written. The training is closed at its end, and
        after an exception: see :meth:`close`.
        """
        show = self._progress if self._ranks[0] == 0 else False
        try:
            with Progress(self.num_steps, "fit", show=show, done=self.steps_done) as shown:
                while not self.finished:
                    step = self.step()
                    shown.note(loss=step.loss)
                    shown.update()
                    try:
                        yield step
                    # not after an exception within a step, which leaves an inconsistent state
                    except GeneratorExit:
                        self._leave()
                        raise
        finally:
            self.close()

    def _leave(self) -> None:
        """End the training early, and write the checkpoint if all processes end it here."""
        if self.finished:
            return
        together = self._ranks[1] == 1 or set(agree(LEFT)) == {LEFT}
        if together and self._checkpoint is not None:
            self.save()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def stop(self) -> None:
        """Stop after the next step, in all processes."""
        self._stop_requested = True

    def close(self) -> None:
        """Restore the best weights, if they are kept; end the objective, the log and the lock."""
        if isinstance(self.objective, Objective):
            self.objective.end_training()
        if self._validation is not None:
            self._validation.restore_best()
        if self._log is not None:
            self._log.close()
        self._unlock()

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            ValueError: if the training has no checkpoint.
        """
        parts: dict[str, Mapping[str, Tensor]] = {
            "rollback": self._rollback.tensors(),
            "history": self.history.tensors(),
            "validated": self.history.validation.tensors(),
            "validation": {} if self._validation is None else self._validation.tensors(),
        }
        self._file().save(
            self.steps_done,
            {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()},
        )
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Restore what :meth:`save` wrote, in this process or another.

        Raises:
            ValueError: if the training has no checkpoint, or the file is that of another training.
        """
        self.steps_done, more = self._file().load()

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {k.removeprefix(start): v for k, v in more.items() if k.startswith(start)}

        self._rollback.restore(part("rollback"))
        self.history.restore(part("history"))
        self.history.validation.restore(part("validated"))
        if self._validation is not None and (kept := part("validation")):
            self._validation.restore(kept)
            self._note_validation()

    def _file(self) -> Checkpoint:
        if self._checkpoint is None:
            raise ValueError("checkpoint must be given to save and restore, got checkpoint=None")
        return self._checkpoint

    def _validate(self, number: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics on the validation data, if an evaluation is due.

        Raises:
            StepError: if it raises an exception, with the metrics of the step.
        """
        every = self._validate_every
        if self._validation is None or every is None:
            return {}
        if (number + 1) % every and number + 1 != self.num_steps:
            return {}
        try:
            values = self._validation.evaluate(self.module, number)
        except ProcessError:  # of another process
            raise
        except Exception as error:
            raise StepError(
                f"fit: at step {number} {type(error).__name__} was raised in the validation:"
                f" {error}; parameters and optimizer are those after the step. Metrics:"
                f" {dict(metrics)}",
                number,
                metrics,
            ) from error
        self.history.validation.record(number, values)
        self._note_validation()
        return {f"validation_{name}": value for name, value in values.items()}

    def _note_validation(self) -> None:
        if self._validation is not None:
            self.history.best_step = self._validation.best_step
            if self._validation.exhausted and self.steps_done < self.num_steps:
                self.history.stopped_early = self._stopped = True

    def _differentiate(self, batch: Any) -> dict[str, Tensor]:
        """Compute the gradients of all losses, and return the losses and metrics."""
        if isinstance(self.objective, HasLosses):
            named, metrics = self.objective.losses(
                self.module,  # type: ignore[arg-type]
                batch,
                generator=self._generator,
            )
            losses = dict(named)
            if set(losses) != set(self._players):
                raise ValueError(
                    f"losses() must have the names of trained(), {sorted(self._players)}, got"
                    f" {sorted(losses)}"
                )
        else:
            loss, metrics = self.objective(self.module, batch, generator=self._generator)
            losses = {"energy": loss}
        if self._penalties:
            penalty = torch.stack([term(self.module, batch) for term in self._penalties]).sum()
            losses["energy"] = losses["energy"] + penalty
            metrics = metrics | {"penalty": penalty.detach()}
        for number, (key, player) in enumerate(self._players.items(), 1):
            player.optimizer.zero_grad()
            losses[key].backward(inputs=player.parameters, retain_graph=number < len(self._players))
        return metrics | {f"loss_{key}": loss.detach() for key, loss in losses.items()}

    def _update(self, number: int, due: bool) -> tuple[float, dict[str, float], bool]:
        """Take a step of all optimizers.

        Returns:
            The loss, the metrics, and whether a checkpoint is due in the first process.
        """
        together = self._ranks[1] > 1
        batch: Any = None

        def differentiate() -> dict[str, Tensor]:
            nonlocal batch
            if isinstance(self.objective, Objective):
                self.objective.begin_step(number, self.num_steps)
            if self._batches is not None:
                batch = self._batches(number)
            return self._differentiate(batch)

        seen, failure = self._attempt(number, differentiate)
        if failure is None and together:
            # metrics too: what depends on them happens in all processes or in none
            seen["due"] = torch.tensor(float(due and self._ranks[0] == 0))
            seen["stop"] = torch.tensor(float(self._stop_requested))
            seen = average_gradients(self._parameters, seen, rows_of(batch))
            due = bool(seen.pop("due") > 0)
            self._stopped = bool(seen.pop("stop") > 0)
        if failure is None and self._transform is not None:
            transform = functools.partial(self._transform, self.module, batch, seen)
            _, failure = self._attempt(number, transform)
            if failure is None and together:  # it may depend on the batch of this process
                average_gradients(self._parameters, {}, 1.0)
        loss = math.nan
        complaint: str | None = None
        updated = False
        if failure is None:
            try:
                loss = float(seen["loss_energy"])
                self._metrics, numbers = self._numbers(seen)
                complaint = self._guard.complaint(numbers)
                if complaint is None:
                    self._rollback.keep(number)
                    updated = True
                    complaint = self._optimize()
            except Exception as error:
                failure = error
        if complaint is not None or failure is not None:
            row, where = self._row_at_fault(number, batch)
            if isinstance(failure, RowError):
                row, complaint = failure.row, str(failure)
            elif failure is not None:
                complaint = f"{type(failure).__name__} was raised: {failure}"
            complaint = f"{complaint}{where}"
            rollback = self._rollback
            if together and updated and failure is not None:
                # the other processes may have completed the update
                rollback = Rollback(Guard(), rollback.state)
            rollback.failed(
                number, complaint, self._metrics, row=row, cause=failure, updated=updated
            )
        for plan in self._plans.values():
            plan.step()
        # those of a failed step are not known, if it raised an exception
        metrics = {} if failure is not None else self._metrics
        if self._guard.rollback:
            metrics = metrics | {"rollbacks": float(self._rollback.count)}
        return loss, metrics, due

    def _attempt(
        self, number: int, call: Callable[[], dict[str, Tensor] | None]
    ) -> tuple[dict[str, Tensor], Exception | None]:
        """Return the result of a call, and the exception that it raised in any process."""
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        if self._ranks[1] > 1:
            codes = agree(GOES_ON if failure is None else FAILED)
            if LEFT in codes:
                raise ProcessError(
                    reason_of_end()
                    or f"process {codes.index(LEFT)} left the training before step {number}, and"
                    " this one goes on"
                )
            if FAILED in codes:
                own = "" if failure is None else f"{type(failure).__name__}: {failure}"
                reasons = [reason.decode() for reason in gather_bytes(own.encode() + b" ")]
                first = codes.index(FAILED)
                failure = failure or RuntimeError(f"process {first}: {reasons[first].strip()}")
        return result or {}, failure

    def _numbers(self, seen: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Clip the gradients, and return the metrics and the numbers that must be finite."""
        metrics = {name: float(value) for name, value in seen.items() if value.dim() == 0}
        players = self._players
        norms = {
            f"grad_norm_{key}": float(player.norm(self._max_grad_norm))
            for key, player in players.items()
        }
        losses = {f"loss_{key}": metrics.pop(f"loss_{key}") for key in players}
        metrics |= {
            "grad_norm": norms["grad_norm_energy"],
            "lr": float(self._optimizers["energy"].param_groups[0]["lr"]),
        }
        numbers = {"loss": losses["loss_energy"], "grad_norm": metrics["grad_norm"]}
        if len(players) > 1:
            metrics |= losses | norms
            numbers = losses | norms
        if self._guard.max_energy_gap is not None and "energy_gap" in metrics:
            numbers["energy_gap"] = metrics["energy_gap"]
        return metrics, numbers

    def _optimize(self) -> str | None:
        """Update the parameters, and return what is wrong with them, or None."""
        for optimizer in self._optimizers.values():
            optimizer.step()
        largest = norm_of_each([p.detach() for p in self._parameters if p.numel()], math.inf)
        if not bool(torch.stack([each.to(largest[0]) for each in largest]).isfinite().all()):
            return "the updated parameters are not finite"
        if self._average is not None:
            self._average.update_parameters(self.module)
        return None

    def _row_at_fault(self, number: int, batch: Any) -> tuple[int | None, str]:
        """Return the first row of a batch whose density is not finite, where others are."""
        events = batch[0] if isinstance(batch, tuple | list) else batch
        try:
            with torch.no_grad():
                finite = self.module.score_samples(events).isfinite()  # type: ignore[operator]
            bad = (~finite).nonzero().flatten().tolist()
        except Exception:  # the module has none, or fails itself
            return None, ""
        if not bad or len(bad) == len(finite):
            return None, ""
        if isinstance(self._batches, Batches):
            row = int(self._batches.numbers(number)[bad[0]])
            return row, f" (the energy is not finite at row {row} of the data)"
        return bad[0], f" (the energy is not finite at row {bad[0]} of the batch)"


def _fingerprint(batches: Batches | Passes | None) -> str | None:
    """Describe data by the number of rows and a checksum of some of them, as converted."""
    sample = batches.sample() if isinstance(batches, Batches) else None
    if batches is None or sample is None:
        return None if batches is None else f"{batches.rows} rows"
    parts = sample if isinstance(sample, tuple) else (sample,)
    shapes = ", ".join(str((batches.rows, *part.shape[1:])) for part in parts)
    return f"{shapes}, checksum {checksum(parts)}"


def _takes_events_alone(objective: AnyObjective) -> str | None:
    """Return the name of an objective that takes no labels; None for functions, which may."""
    alone = isinstance(objective, Objective) and not objective.takes_labels
    return type(objective).__name__ if alone else None
