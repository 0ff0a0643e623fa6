"""Progress in terminals, notebooks and log files, by a clock that the tests move."""

from __future__ import annotations

import fcntl
import io
import os
import re
import select
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from pyroebm.core import progress as module
from pyroebm.core.progress import Progress, _duration

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that stands still unless it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """A stderr that counts what is written, and may be a terminal."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal
        self.writes = 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


class Publisher:
    """What a notebook's front end would show: one text for each display."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}
        self.updates = 0

    def publish(self, data: dict[str, str], *, transient: dict[str, str], update: bool) -> None:
        assert update == (transient["display_id"] in self.shown)
        self.shown[transient["display_id"]] = data["text/plain"]
        self.updates += update


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def log_file(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return _stderr(monkeypatch, terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.setenv("COLUMNS", "200")
    return _stderr(monkeypatch, terminal=True)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch, log_file: Stream) -> Publisher:
    publisher = Publisher()
    _notebook_shell(monkeypatch, kernel=object(), display_pub=publisher)
    return publisher


def _stderr(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Stream:
    """A stderr for the module alone: pytest exchanges that of ``sys`` between a test's phases."""
    stream = Stream(terminal)
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream, modules={}))
    monkeypatch.delenv("RANK", raising=False)
    return stream


def _notebook_shell(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    shell = types.SimpleNamespace(**attributes)
    stub = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(module.sys.modules, "IPython", stub)


def _run(
    clock: Clock, steps: int, seconds: float, show: bool | None = None, **options: Any
) -> Progress:
    """A computation of ``steps`` draws that take ``seconds`` each."""
    with Progress(steps, "sampling, 4 chains", "draw", show, **options) as progress:
        for _ in range(steps):
            clock.now += seconds
            progress.update()
    return progress


# A log file


def test_a_log_file_has_a_line_every_few_seconds(clock: Clock, log_file: Stream) -> None:
    lines: list[tuple[float, str]] = []
    with Progress(4000, "sampling, 4 chains", "draw") as progress:
        for k in range(1, 4001):
            clock.now = 100.0 + k / 320.0
            progress.note(divergences=k // 1000, acceptance=0.81)
            before = log_file.tell()
            progress.update()
            if log_file.tell() > before:
                lines.append((clock.now - 100.0, log_file.getvalue()[before:]))
    assert lines == [
        (
            2.0,
            "sampling, 4 chains: 640/4000 draws, 320 draws/s, 0 divergences, acceptance 0.81,"
            " 10 s left\n",
        ),
        (
            7.0,
            "sampling, 4 chains: 2240/4000 draws, 320 draws/s, 2 divergences, acceptance 0.81,"
            " 6 s left\n",
        ),
        (
            12.0,
            "sampling, 4 chains: 3840/4000 draws, 320 draws/s, 3 divergences, acceptance 0.81,"
            " 0 s left\n",
        ),
    ]
    assert log_file.getvalue().splitlines()[3:] == [
        "sampling, 4 chains: 4000/4000 draws in 12 s, 320 draws/s, 4 divergences, acceptance 0.81"
    ]


def test_a_short_run_writes_nothing(clock: Clock, log_file: Stream) -> None:
    _run(clock, 199, 0.01)
    assert log_file.writes == 0


def test_nothing_follows_the_last_line(clock: Clock, log_file: Stream) -> None:
    progress = _run(clock, 10, 1.0)
    written = log_file.getvalue()
    for _ in range(10):
        clock.now += 10.0
        progress.update()
    assert log_file.getvalue() == written


def test_from_the_start_on_where_it_is_asked_for(clock: Clock, log_file: Stream) -> None:
    _run(clock, 10, 0.01, show=True)
    first, last = log_file.getvalue().splitlines()
    assert first == "sampling, 4 chains: 0/10 draws"
    assert last == "sampling, 4 chains: 10/10 draws in 0 s, 100 draws/s"


def test_a_total_that_is_not_known(clock: Clock, log_file: Stream) -> None:
    with Progress(None, "SMC", "temperature") as progress:
        for k in range(1, 4):
            clock.now += 1.0
            progress.note(beta=0.25 * k)
            progress.update()
    assert log_file.getvalue().splitlines() == [
        "SMC: 2 temperatures, 1 temperatures/s, beta 0.5",
        "SMC: 3 temperatures in 3 s, 1 temperatures/s, beta 0.75",
    ]


def test_what_was_done_before_does_not_count_for_the_rate(clock: Clock, log_file: Stream) -> None:
    with Progress(1000, "fit", done=904) as progress:
        for _ in range(40):
            clock.now += 0.125
            progress.update()
    first, last = log_file.getvalue().splitlines()
    assert first == "fit: 920/1000 steps, 8 steps/s, 10 s left"
    assert last == "fit: 944/1000 steps in 5 s, 8 steps/s"


def test_the_rate_follows_a_change_of_speed(clock: Clock, log_file: Stream) -> None:
    with Progress(100_000, "fit") as progress:
        clock.now += 30.0  # compiling
        progress.update()
        for _ in range(60 * 50):
            clock.now += 0.02
            progress.update()
    rates = [float(rate) for rate in re.findall(r", ([\d.]+) steps/s, ", log_file.getvalue())]
    assert rates == sorted(rates)
    assert rates[0] < 0.1
    assert 49.0 <= rates[-1] <= 50.0
    assert rates[2] > 20.0  # 10 s after the change; the mean over all 40 s is 12.5
    last = log_file.getvalue().splitlines()[-1]
    assert last == f"fit: 3001/100000 steps in 90 s, {3001 / 90.0:.0f} steps/s"  # of the whole


def test_counts_and_values_are_named(clock: Clock, log_file: Stream) -> None:
    with Progress(10, "fit") as progress:
        progress.note(divergences=1, rollbacks=0, loss=-1234.5678, tail=float("nan"))
        clock.now += 2.0
        progress.update()
    assert ", 1 divergence, 0 rollbacks, loss -1.23e+03, tail nan, " in log_file.getvalue()


def test_a_note_is_computed_when_a_line_is_due_only(clock: Clock, log_file: Stream) -> None:
    asked: list[float] = []

    def divergences() -> int:
        asked.append(clock.now)
        return 7

    with Progress(1000, "sampling", "draw") as progress:
        progress.note(divergences=divergences)
        for _ in range(1000):
            clock.now += 0.01
            progress.update()
    assert asked == pytest.approx([102.0, 107.0, 110.0], abs=0.02)
    assert log_file.getvalue().count("7 divergences") == 3


def test_an_update_that_is_not_due_looks_at_the_clock_alone(
    clock: Clock, log_file: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Progress, *_: object) -> None:
        raise AssertionError("not due")

    with Progress(1000, "sampling", "draw") as progress:
        monkeypatch.setattr(Progress, "_state", fail)
        monkeypatch.setattr(Progress, "_draw", fail)
        for _ in range(1000):
            progress.update()
    assert progress.count == 1000


def test_a_slow_rate_keeps_its_digits(clock: Clock, log_file: Stream) -> None:
    with Progress(10, "training", "epoch") as progress:
        clock.now += 400.0
        progress.update()
    assert log_file.getvalue().startswith("training: 1/10 epochs, 0.0025 epochs/s, 60 min left\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (9.0, "9 s"),
        (99.0, "99 s"),
        (100.0, "2 min"),
        (5940.0, "99 min"),
        (7200.0, "2.0 h"),
    ],
)
def test_durations_have_a_unit_of_their_size(seconds: float, said: str) -> None:
    assert _duration(seconds) == said


# Hidden


def test_hidden(clock: Clock, log_file: Stream) -> None:
    progress = _run(clock, 100, 1.0, show=False)
    progress.print("compiling")
    assert log_file.writes == 0
    assert progress.count == 100


@pytest.mark.parametrize("show", [None, True])
def test_of_several_processes_the_first_shows_it(
    clock: Clock, log_file: Stream, monkeypatch: pytest.MonkeyPatch, show: bool | None
) -> None:
    monkeypatch.setenv("RANK", "1")
    _run(clock, 100, 1.0, show=show)
    assert log_file.writes == 0
    monkeypatch.setenv("RANK", "0")
    _run(clock, 100, 1.0, show=show)
    assert log_file.writes > 0


def test_without_a_stderr(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=None, modules={}))
    assert _run(clock, 100, 1.0, show=True).count == 100


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("closed file")])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stream_that_fails_does_not_end_the_computation(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception, is_terminal: bool
) -> None:
    stream, asked = _stderr(monkeypatch, is_terminal), list[float]()

    def loss() -> float:
        asked.append(clock.now)
        return 0.5

    with Progress(100, "fit", show=True) as progress:
        progress.update()

        def fail(text: str) -> int:
            raise error

        progress.note(loss=loss)
        monkeypatch.setattr(stream, "write", fail)
        for _ in range(50):
            clock.now += 1.0
            progress.update()
    assert progress.count == 51
    if not is_terminal:  # tqdm keeps such errors to itself
        assert len(asked) == 1


# Interrupted


def _interrupt(clock: Clock) -> None:
    def run() -> None:
        with Progress(4000, "sampling", "draw") as progress:
            for _ in range(300):
                clock.now += 0.01
                progress.update(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_an_interrupt_leaves_a_last_line(clock: Clock, log_file: Stream) -> None:
    _interrupt(clock)
    assert log_file.getvalue().endswith("\nsampling: 1200/4000 draws in 3 s, 400 draws/s\n")


def test_an_interrupt_in_a_terminal_leaves_a_clean_line(clock: Clock, terminal: Stream) -> None:
    _interrupt(clock)
    *_, last = terminal.getvalue().removesuffix("\n").split("\r")
    assert terminal.getvalue().endswith("\n")
    assert re.fullmatch(
        r"sampling:  30%\|\S* *\| 1200/4000 draws in 3 s, 400 draws/s", last.strip()
    )


# A terminal


def _bars(stream: Stream) -> list[str]:
    """What a terminal shows, one frame after the other."""
    return [frame.strip() for frame in re.split(r"[\r\n]", stream.getvalue()) if frame.strip()]


def test_a_terminal_has_a_bar(clock: Clock, terminal: Stream) -> None:
    with Progress(4000, "sampling, 4 chains", "draw") as progress:
        progress.note(divergences=2)
        for _ in range(99):
            clock.now += 0.01
            progress.update(10)
        assert terminal.writes == 0  # short runs show nothing
        for _ in range(301):
            clock.now += 0.01
            progress.update(10)
    frames = _bars(terminal)
    pattern = r"sampling, 4 chains: +(\d+)%\|(.*)\| (\d+)/4000 draws(.*)"
    found = [re.fullmatch(pattern, frame) for frame in frames]
    shown = [match for match in found if match is not None]
    assert len(shown) == len(frames)
    assert 30 <= len(frames) <= 33  # ten a second, from the first second on
    counts = [int(match[3]) for match in shown]
    assert counts == sorted(counts)
    for match in shown:
        assert abs(int(match[1]) - int(match[3]) / 40) < 0.51
        filled = len(match[2].rstrip()) / len(match[2])
        assert abs(filled - int(match[3]) / 4000) <= 1.0 / len(match[2])
    assert shown[0][4] == ", 1000 draws/s, 2 divergences, 3 s left"
    assert shown[-1][4] == " in 4 s, 1000 draws/s, 2 divergences"
    assert terminal.getvalue().count("\n") == 1  # what remains of it is one line


@pytest.mark.parametrize("rows", [0, 40])
def test_a_terminal_of_unknown_size_has_lines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    theirs, ours = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
    try:
        with open(ours, "w", closefd=False) as stream:
            monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream, modules={}))
            _run(clock, 4, 1.0)
        shown = ""
        while select.select([theirs], [], [], 1.0)[0]:  # the kernel hands output on in pieces
            shown += os.read(theirs, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "4/4 draws in 4 s, 1 draws/s" in shown
    assert ("100%|" in shown) == (rows > 0)
    assert ("sampling, 4 chains: 4/4" in shown) == (rows == 0)


def test_a_terminal_without_a_total(clock: Clock, terminal: Stream) -> None:
    with Progress(None, "SMC", "temperature") as progress:
        for _ in range(4):
            clock.now += 1.0
            progress.update()
    frames = _bars(terminal)
    assert frames[0] == "SMC: 1 temperatures, 1 temperatures/s"
    assert frames[-1] == "SMC: 4 temperatures in 4 s, 1 temperatures/s"


def test_a_message_is_a_line_above_the_bar(clock: Clock, terminal: Stream) -> None:
    with Progress(10, "fit", show=True) as progress:
        progress.print("compiling the gradient")
        clock.now += 1.0
        progress.update()
    assert "\rcompiling the gradient\n" in terminal.getvalue()
    assert _bars(terminal)[-1].endswith("1/10 steps in 1 s, 1 steps/s")


def test_a_message_is_a_line_of_a_log_file(clock: Clock, log_file: Stream) -> None:
    with Progress(10, "fit") as progress:
        progress.print("compiling the gradient")
    assert log_file.getvalue() == "compiling the gradient\n"


# A notebook


def test_a_notebook_has_one_line_that_is_updated(
    clock: Clock, notebook: Publisher, log_file: Stream
) -> None:
    for _ in range(2):
        with Progress(100, "sampling", "draw") as progress:
            for _ in range(100):
                clock.now += 0.1
                progress.update()
    assert list(notebook.shown.values()) == 2 * ["sampling: 100/100 draws in 10 s, 10 draws/s"]
    assert 30 <= notebook.updates <= 40
    assert log_file.writes == 0


def test_a_short_run_leaves_no_output_in_a_notebook(clock: Clock, notebook: Publisher) -> None:
    _run(clock, 99, 0.01)
    assert not notebook.shown


@pytest.mark.parametrize("attributes", [{}, {"kernel": None}])
def test_ipython_in_a_terminal_is_a_terminal(
    clock: Clock,
    terminal: Stream,
    monkeypatch: pytest.MonkeyPatch,
    attributes: dict[str, None],
) -> None:
    _notebook_shell(monkeypatch, **attributes)
    _run(clock, 100, 0.1)
    assert "100%|" in terminal.getvalue()


CELL = """
import types

from pyroebm.core import progress as progress_module
from pyroebm.core.progress import Progress

now = [0.0]
progress_module.time = types.SimpleNamespace(monotonic=lambda: now[0])
with Progress(100, "sampling", "draw") as progress:
    for _ in range(100):
        now[0] += 0.1
        progress.update()
"""


def test_an_executed_notebook_keeps_the_last_line_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", extra_arguments=["--log-level=ERROR"]
    ).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data == {"text/plain": "sampling: 100/100 draws in 10 s, 10 draws/s"}


# What shows progress

FIT = """
import time

import torch

from pyroebm.energies import BernoulliRBM
from pyroebm.objectives import ContrastiveDivergence
from pyroebm.training import fit_steps

data = torch.eye(4)
for _ in fit_steps(BernoulliRBM(4, 3), ContrastiveDivergence(), data, num_steps=60, batch_size=4):
    time.sleep(0.1)
print("done")
"""


def test_fit_writes_lines_to_a_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-c", FIT],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            check=True,
        )
    assert done.stdout == "done\n"
    first, *_, last = errors.read_text().splitlines()
    number = r"-?[\d.e+-]+"
    assert re.fullmatch(rf"fit: \d+/60 steps, {number} steps/s, loss {number}, \d+ s left", first)
    assert re.fullmatch(rf"fit: 60/60 steps in \d+ s, {number} steps/s, loss {number}", last)
