"""Logs of a training: JSON lines in a file, and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyroebm.core._checks import check_counts
from pyroebm.core.files import append_line, check_writable, read_text, reading, write_text

__all__ = ["TrainingLog", "read_log"]


class TrainingLog:
    """A log with a JSON line ``{"step", "loss", "seconds", ...metrics}`` for each recorded step.

    Args:
        path: the file, or None.
        tensorboard: a folder for ``torch.utils.tensorboard``, or None.
        every: number of steps between recorded steps.
        done: number of steps that are done; lines of later steps are removed from the file.
        resume: whether to append to an existing file.

    Raises:
        ValueError: if ``every`` < 1, or the file exists and ``resume`` is False.
        FileError: if the file cannot be written, or is damaged where it is resumed.
        ModuleNotFoundError: if ``tensorboard`` is given and not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = TrainingLog(f"{folder}/run.jsonl")
        ...     log.write(0, 1.5, {"grad_norm": 0.5})
        ...     [line["loss"] for line in read_log(f"{folder}/run.jsonl")]
        [1.5]
    """

    def __init__(
        self,
        path: str | Path | None,
        tensorboard: str | Path | None = None,
        *,
        every: int = 1,
        done: int = 0,
        resume: bool = False,
    ) -> None:
        check_counts({"log_every": 1}, every)
        self.path = None if path is None else Path(path)
        self.every = every
        self.began = time.perf_counter()
        if self.path is not None:
            if self.path.exists():
                if not resume:
                    raise ValueError(
                        f"log={str(path)!r} must be a new file, but exists: continue with"
                        " resume=True, or give another name"
                    )
                with reading(self.path):
                    lines = [line for line in read_log(self.path) if line["step"] < done]
                write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            check_writable(self.path)
        self.writer: Any = None if tensorboard is None else _writer(tensorboard, done)

    def write(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Write the numbers of a step; non-finite ones are NaN, Infinity or -Infinity.

        The line is flushed to the file.
        """
        if step % self.every:
            return
        if self.path is not None:
            line = {
                "step": step,
                "loss": loss,
                "seconds": round(time.perf_counter() - self.began, 4),
                **metrics,
            }
            append_line(self.path, json.dumps(line))
        if self.writer is not None:
            for name, value in {"loss": loss, **metrics}.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close TensorBoard's writer, which flushes it."""
        if self.writer is not None:
            self.writer.close()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Read the lines of a log; an incomplete last line of a killed process is dropped.

    Raises:
        FileError: if there is no such file, or another line is not JSON.
    """
    lines = read_text(path).split("\n")
    with reading(path):
        return [json.loads(line) for line in lines[:-1]]


def _writer(folder: str | Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tensorboard={str(folder)!r} needs the package tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=done)
