"""Metrics as JSON, figures and trained models: what all recipes share."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # recipes run without a display

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyroebm import save
from pyroebm.core import Energy
from pyroebm.core.files import check_writable
from pyroebm.partition import LogZ
from pyroebm.training import connected_ranks, process_group

__all__ = ["Kind", "Recipe", "counted", "run"]

#: Exact to rounding; an estimate; or in expectation a lower or an upper bound.
Kind = Literal["exact", "estimate", "lower", "upper"]


class Recipe:
    """The record of one run, written to ``metrics.json``, with figures and models beside it.

    In a process group only the first process writes.

    Args:
        name: of the recipe.
        out: folder to write to; None is ``runs/NAME``.
        seed: of the run.
        config: all other settings.
    """

    def __init__(self, name: str, out: Path | None, seed: int, **config: Any) -> None:
        self.name = name
        self.seed = seed
        self.config = config
        self.out = Path("runs", name) if out is None else out
        check_writable(self.out / "metrics.json")
        self.metrics: dict[str, dict[str, Any]] = {}
        self._began = time.perf_counter()
        torch.manual_seed(seed)

    def add(
        self,
        key: str,
        value: float | Tensor,
        error: float | Tensor | None = None,
        kind: Kind = "estimate",
        note: str = "",
    ) -> float:
        """Record and print a number with its standard error and kind.

        Args:
            key: name of the metric.
            value: the number.
            error: its standard error; None, or one that is not finite, is recorded as null.
            kind: "exact", "estimate", "lower" or "upper".
            note: a remark.

        Raises:
            FloatingPointError: if ``value`` is not finite.
        """
        number = float(torch.as_tensor(value).detach())
        spread = (
            None
            if error is None or not math.isfinite(error)
            else float(torch.as_tensor(error).detach())
        )
        if not math.isfinite(number):
            raise FloatingPointError(f"{self.name}: {key} is {number}")
        self.metrics[key] = {"value": number, "error": spread, "kind": kind} | (
            {"note": note} if note else {}
        )
        error_text = "" if spread is None else f" +- {spread:.2g}"
        print(
            f"{key:<44} {number:.5g}{error_text}  ({kind})" + (f"  {note}" if note else ""),
            flush=True,
        )
        return number

    def add_mean(self, key: str, values: Tensor, kind: Kind = "estimate", note: str = "") -> float:
        """Record the mean of independent values, with its standard error."""
        return self.add(
            key, values.double().mean(), values.double().std() / math.sqrt(len(values)), kind, note
        )

    def add_log_z(self, key: str, estimate: LogZ) -> float:
        """Record an estimate of log Z with its standard error and kind."""
        return self.add(key, estimate.value, estimate.standard_error, estimate.kind)

    def figure(self, name: str, fig: Figure) -> None:
        """Save a figure as ``NAME.png``.

        Raises:
            ValueError: if some of its visible axes are empty.
        """
        empty = [k for k, ax in enumerate(fig.axes) if ax.get_visible() and not ax.has_data()]
        if empty:
            raise ValueError(f"axes {', '.join(map(str, empty))} of figure {name!r} show nothing")
        if connected_ranks()[0] == 0:
            fig.savefig(self.out / f"{name}.png", dpi=120)
        plt.close(fig)

    def text(self, name: str, content: str) -> None:
        """Save a text as the file ``name``."""
        if connected_ranks()[0] == 0:
            (self.out / name).write_text(content, encoding="utf-8")

    def model(self, name: str, module: nn.Module) -> None:
        """Save a trained energy, machine or flow as ``NAME.safetensors``."""
        if connected_ranks()[0] == 0:
            save(module, self.out / f"{name}.safetensors")

    def write(self) -> None:
        """Write ``metrics.json``."""
        if connected_ranks()[0] > 0:
            return
        seconds = round(time.perf_counter() - self._began, 2)
        content = {
            "name": self.name,
            "seed": self.seed,
            "seconds": seconds,
            "config": self.config,
            "metrics": self.metrics,
        }
        self.text(
            "metrics.json", json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
        )
        print(f"{self.name}: {seconds:.0f} s, written to {self.out}/metrics.json")


@contextlib.contextmanager
def counted(energy: Energy) -> Iterator[list[int]]:
    """Count the evaluations of an energy.

    Within ``with counted(energy) as rows: ...`` the count is ``rows[0]``. One evaluation is the
    energy of one state, with or without its gradient. Evaluations within a compiled graph are not
    counted.
    """
    rows = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows[0] += output.numel()

    hook = energy.register_forward_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


def run(main: Callable[..., None]) -> None:
    """Run the ``main`` of a recipe with the arguments of the command line.

    Under ``torchrun`` all processes train together, and only the first one prints.
    """
    torch.set_default_dtype(torch.float64)
    with process_group() as (rank, _), contextlib.ExitStack() as silent:
        if rank > 0:
            silent.enter_context(
                contextlib.redirect_stdout(silent.enter_context(open(os.devnull, "w")))
            )
        tyro.cli(main)
