"""Training in one call, or step by step."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from pyroebm.training.history import History
from pyroebm.training.trainer import Step, Trainer

__all__ = ["fit", "fit_steps"]

P = ParamSpec("P")
R = TypeVar("R")


def _arguments_of(source: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Declare that a function takes the arguments of another, to type checkers and to ``help``."""

    def declare(function: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(source).replace(return_annotation=returned)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return declare


@_arguments_of(Trainer)
def fit(*arguments: Any, **options: Any) -> History:
    """Train a module by an objective, in place.

    Ctrl-C ends the training after the current step: the checkpoint is written, the history is
    returned with ``interrupted`` set, and a RuntimeWarning is issued. A second Ctrl-C raises
    KeyboardInterrupt immediately, without writing the checkpoint.

    Args:
        arguments: those of :class:`~pyroebm.training.Trainer`: ``module``, ``objective`` and
            ``data``.
        options: the other arguments of :class:`~pyroebm.training.Trainer`.

    Returns:
        The recorded metrics.

    Raises:
        ValueError: as :class:`~pyroebm.training.Trainer`.
        FloatingPointError: at a failed step, unless the guard rolls back.

    Example:
        >>> import torch
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import PersistentCD
        >>> rbm = BernoulliRBM(4, 3, generator=torch.Generator().manual_seed(0))  # initial weights
        >>> history = fit(rbm, PersistentCD(10), torch.eye(4), num_epochs=2, seed=0)
        >>> history["energy_gap"].shape
        (2,)
    """
    _check_call("fit", arguments, options)
    trainer = Trainer(*arguments, **options)
    with _interrupting(trainer):
        for _ in trainer.steps():
            pass
    if trainer.history.interrupted:
        warnings.warn(
            f"interrupted after {trainer.steps_done} of {trainer.num_steps} steps: the trained"
            " parameters are kept",
            RuntimeWarning,
            stacklevel=2,
        )
    return trainer.history


@_arguments_of(Trainer)
def fit_steps(*arguments: Any, **options: Any) -> Iterator[Step]:
    """Train a module by an objective, in place; yields after every optimizer step.

    If the loop ends early, the checkpoint is written.

    Args:
        arguments: those of :class:`~pyroebm.training.Trainer`: ``module``, ``objective`` and
            ``data``.
        options: the other arguments of :class:`~pyroebm.training.Trainer`.

    Yields:
        Number, loss and metrics of each step.

    Raises:
        ValueError: as :class:`~pyroebm.training.Trainer`, at the call and not in the loop.
        FloatingPointError: in the loop, at a failed step, unless the guard rolls back.

    Example:
        >>> import torch
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import PersistentCD
        >>> rbm, data = BernoulliRBM(4, 3), torch.eye(4)
        >>> for step in fit_steps(rbm, PersistentCD(10), data, num_epochs=2, batch_size=2):
        ...     print(step.number, "energy_gap" in step.metrics)
        0 True
        1 True
        2 True
        3 True
    """
    _check_call("fit_steps", arguments, options)
    return Trainer(*arguments, **options).steps()


def _check_call(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Check arguments by the signature of :class:`Trainer`.

    Raises:
        TypeError: with the name of the function that was called, and near names.
    """
    signature = inspect.signature(Trainer)
    for unknown in options.keys() - signature.parameters.keys():
        near = difflib.get_close_matches(unknown, signature.parameters)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise TypeError(f"{name}() takes no argument {unknown!r}{hint}")
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None


@contextlib.contextmanager
def _interrupting(trainer: Trainer) -> Iterator[None]:
    """Stop the trainer after the current step on Ctrl-C; a second one raises immediately.

    This has no effect outside the main thread, which alone receives signals, or if the program has
    its own signal handler.
    """
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, usual)
        trainer.stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
