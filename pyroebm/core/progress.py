"""Progress displays of long computations, in terminals, notebooks and log files."""

from __future__ import annotations

import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TextIO

from tqdm import tqdm

__all__ = ["Progress"]

#: Time constant of the exponential moving average of the rate, in seconds.
RATE_SECONDS = 10.0

#: A number to show, or a function that computes it when a line is due.
Note = float | Callable[[], float]


class Progress:
    """Progress of a computation on stderr: the count, the rate, the time left, and named numbers.

    In a terminal it is a bar and in a notebook one line that is updated, both after 1 s. Any other
    stderr (a log file, a pipe) gets a line after 2 s, one every 5 s after that, and a last one. A
    computation that ends earlier shows nothing. Of several processes only the first shows progress.
    If stderr cannot be written to, the computation continues without it.

    Args:
        total: number of units of the whole computation; None if it is not known.
        label: name of the computation.
        unit: name of one unit, in the singular.
        show: True shows progress from the start, False never, None as described above.
        done: units that were done before; the rate does not count them.

    Example:
        >>> with Progress(3, "sampling", "draw") as progress:
        ...     for _ in range(3):
        ...         progress.note(divergences=0, acceptance=0.81)
        ...         progress.update()
        >>> progress.count
        3
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "step",
        show: bool | None = None,
        *,
        done: int = 0,
    ) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.show = show
        #: Units done so far.
        self.count = done
        self._done = done
        self._notes: dict[str, Note] = {}
        self._display: _Display | None = None
        self._shown = False
        self._due = math.inf

    def __enter__(self) -> Progress:
        self._began = self._last_time = time.monotonic()
        self._last_count = self.count
        self._recent_count = self._recent_seconds = 0.0
        first_process = os.environ.get("RANK", "0") == "0"  # as torchrun sets it
        if self.show is not False and first_process and sys.stderr is not None:
            self._display = _display(sys.stderr, self.total)
            self._due = self._began + (0.0 if self.show else self._display.delay)
            if self.show:
                self._draw(self._state())
        return self

    def update(self, num_done: int = 1) -> None:
        """Count ``num_done`` more units."""
        self.count += num_done
        if time.monotonic() >= self._due:
            self._draw(self._state())

    def note(self, **numbers: Note) -> None:
        """Set numbers to show after the rate.

        ``divergences=3`` is shown as "3 divergences", and ``acceptance=0.81`` as "acceptance 0.81".

        Args:
            numbers: integers are counts, named in the plural; other numbers are values. A function
                is called when a line is due.
        """
        self._notes.update(numbers)

    def print(self, text: str) -> None:
        """Print a separate line on stderr, above the bar."""
        if self._display is not None:
            self._attempt(lambda: tqdm.write(text, file=sys.stderr))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        display = self._display
        if display is not None:
            if self._shown:
                seconds = time.monotonic() - self._began
                rate = (self.count - self._done) / seconds if seconds > 0.0 else 0.0
                self._draw([f"{self._counted()} in {_duration(seconds)}", *self._numbers(rate)])
            self._attempt(display.close)
        self._due = math.inf

    def _state(self) -> list[str]:
        """Return the parts of a line: the count, the recent rate, the numbers, the time left."""
        now = time.monotonic()
        seconds, count = now - self._last_time, self.count - self._last_count
        kept = math.exp(-seconds / RATE_SECONDS)
        self._recent_seconds = kept * self._recent_seconds + seconds
        self._recent_count = kept * self._recent_count + count
        self._last_time, self._last_count = now, self.count
        rate = self._recent_count / self._recent_seconds if self._recent_seconds > 0.0 else 0.0
        parts = [self._counted(), *self._numbers(rate)]
        if self.total is not None and rate > 0.0:
            parts.append(f"{_duration(max(self.total - self.count, 0) / rate)} left")
        return parts

    def _counted(self) -> str:
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.count}{of} {self.unit}s"

    def _numbers(self, rate: float) -> list[str]:
        digits = ".0f" if rate >= 10.0 else ".2g"
        speed = [f"{rate:{digits}} {self.unit}s/s"] if rate > 0.0 else []
        return speed + [_named(name, note) for name, note in self._notes.items()]

    def _draw(self, parts: list[str]) -> None:
        display = self._display
        if display is not None:
            self._shown = True
            # measured from now, since computing the numbers may have taken time
            self._due = time.monotonic() + display.interval
            self._attempt(lambda: display.draw(self.label, ", ".join(parts), self.count))

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError):  # a closed terminal, a full disk, a closed file
            self._display = None
            self._due = math.inf


class _Display(Protocol):
    """Where lines are shown.

    ``delay`` is the time before the first line, ``interval`` that between two lines, in seconds.
    """

    delay: float
    interval: float

    def draw(self, label: str, text: str, count: int) -> None: ...
    def close(self) -> None: ...


class _Terminal:
    delay, interval = 1.0, 0.1

    def __init__(self, stream: TextIO, total: int | None) -> None:
        self.stream = stream
        self.total = total
        self.bar: Any = None

    def draw(self, label: str, text: str, count: int) -> None:
        form = (
            f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {text}" if self.total else f"{{desc}}: {text}"
        )
        if self.bar is None:
            self.bar = tqdm(
                desc=label,
                total=self.total,
                initial=count,
                bar_format=form,
                file=self.stream,
                dynamic_ncols=True,
            )
        else:
            self.bar.n, self.bar.bar_format = count, form
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Notebook:
    """A line of text that the notebook replaces in place.

    It needs no widgets, and a saved notebook keeps only the last line.
    """

    delay, interval = 1.0, 0.5

    def __init__(self, publisher: Any) -> None:
        self.publisher = publisher
        self.display_id = f"pyroebm-{uuid.uuid4().hex}"
        self.exists = False

    def draw(self, label: str, text: str, count: int) -> None:
        self.publisher.publish(
            {"text/plain": f"{label}: {text}"},
            transient={"display_id": self.display_id},
            update=self.exists,
        )
        self.exists = True

    def close(self) -> None:
        pass


class _LogFile:
    delay, interval = 2.0, 5.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def draw(self, label: str, text: str, count: int) -> None:
        print(f"{label}: {text}", file=self.stream, flush=True)

    def close(self) -> None:
        pass


def _display(stream: TextIO, total: int | None) -> _Display:
    publisher = _notebook_publisher()
    if publisher is not None:
        return _Notebook(publisher)
    return _Terminal(stream, total) if _is_terminal(stream) else _LogFile(stream)


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be shown; a pseudo-terminal of unknown size cannot show one."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):  # a console without a file descriptor
        return True


def _notebook_publisher() -> Any:
    """Return IPython's display publisher of the running cell, or None outside notebooks.

    IPython is not imported, since a notebook has imported it already.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    return None if getattr(shell, "kernel", None) is None else shell.display_pub


def _named(name: str, note: Note) -> str:
    value = note() if callable(note) else note
    if isinstance(value, int):
        return f"{value} {name.removesuffix('s') if value == 1 else name}"
    return f"{name} {value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5970.0 else f"{seconds / 3600.0:.1f} h"
