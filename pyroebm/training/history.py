"""The recorded metrics of a training."""

from __future__ import annotations

import html
from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.serialization import from_text, to_text

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["History", "Metrics"]


class Metrics(Mapping[str, np.ndarray]):
    """A table of metrics, with a column for each metric and a row for each recorded step.

    Example:
        >>> metrics = Metrics()
        >>> metrics.record(0, {"loss": 2.0})
        >>> metrics.record(1, {"loss": 1.0, "penalty": 0.5})
        >>> metrics["penalty"]
        array([nan, 0.5])
    """

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}

    @property
    def steps(self) -> np.ndarray:
        """Numbers of the recorded steps."""
        return np.array(self._steps, dtype=np.int64)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row; metrics without a value in a row are NaN."""
        for name in metrics:
            if name not in self._columns:
                self._columns[name] = array("d", [np.nan]) * len(self._steps)
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(metrics.get(name, np.nan))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise KeyError(f"{name!r}: the recorded metrics are {list(self._columns)}")
        return np.array(self._columns[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def _rows(self) -> list[tuple[str, float, float, float]]:
        """Return name, first value, last value and mean of the last tenth of each metric."""
        rows = []
        for name, column in self.items():
            known = column[~np.isnan(column)]
            tail = known[-max(1, len(known) // 10) :]
            if len(known):
                rows.append((name, known[0], known[-1], float(tail.mean())))
        return rows

    def _summary(self) -> str:
        recorded = len(self._steps)
        return f"{recorded} recorded step{'s' * (recorded != 1)}"

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {self._summary()}"]
        lines += [
            f"  {name}: {first:.4g} to {last:.4g}" for name, first, last, _ in self._rows()[:6]
        ]
        return "\n".join(lines)

    def tensors(self) -> dict[str, Tensor]:
        """Return the table as tensors, for a checkpoint."""
        values = [torch.from_numpy(column) for column in self.values()]
        return {
            "steps": torch.from_numpy(self.steps),
            "names": to_text(list(self)),
            "values": torch.stack(values) if values else torch.empty(0, 0),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        self._steps = array("q", tensors["steps"].tolist())
        self._columns = {
            name: array("d", column)
            for name, column in zip(
                from_text(tensors["names"]), tensors["values"].tolist(), strict=True
            )
        }


class History(Metrics):
    """The metrics of a training by name, as arrays: ``history["loss"]``.

    Attributes:
        steps: number of the step of each entry, from 0.
        validation: metrics on the validation data, a table with its own ``steps``.
        seed: seed of the order of the data and of all random numbers.
        interrupted: whether Ctrl-C ended the training.
        stopped_early: whether early stopping ended the training.
        best_step: step of the lowest validation loss, or None.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.objectives import ExactLikelihood
        >>> from pyroebm.training import fit
        >>> history = fit(BernoulliRBM(4, 3), ExactLikelihood(), torch.eye(4), num_steps=5)
        >>> history["loss"].shape, history.steps.tolist()
        ((5,), [0, 1, 2, 3, 4])
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.validation = Metrics()
        self.seed = seed
        self.interrupted = False
        self.stopped_early = False
        self.best_step: int | None = None

    def plot(self, *names: str) -> np.ndarray:
        """Plot metrics over steps, also those on the validation data.

        Args:
            names: names of the metrics, one for each subplot; ``"loss"`` by default.
                ``"validation_loss"`` is the loss on the validation data alone.

        Returns:
            The axes, shape ``(len(names),)``.

        Raises:
            KeyError: if a metric was not recorded.

        Example:
            >>> history = History(seed=0)
            >>> history.record(0, {"loss": 1.0})
            >>> [ax.get_ylabel() for ax in history.plot()]
            ['loss']
        """
        import matplotlib.pyplot as plt

        names = names or ("loss",)
        known = [*self, *(f"validation_{name}" for name in self.validation)]
        if unknown := [name for name in names if name not in known]:
            raise KeyError(f"{unknown[0]!r}: the recorded metrics are {known}")
        _, grid = plt.subplots(
            len(names),
            squeeze=False,
            sharex=True,
            figsize=(6, 1.0 + 2.4 * len(names)),
            layout="constrained",
        )
        axes: np.ndarray = grid[:, 0]
        for ax, name in zip(axes, names, strict=True):
            self._draw(ax, name)
        axes[-1].set_xlabel("step")
        return axes

    def _draw(self, ax: Axes, name: str) -> None:
        ax.set_ylabel(name)
        held = name if name in self else name.removeprefix("validation_")
        if name in self:
            ax.plot(self.steps, self[name], lw=1, label="training")
        if held in self.validation:
            ax.plot(self.validation.steps, self.validation[held], marker=".", label="validation")
            ax.legend()

    def to_dataset(self) -> xarray.Dataset:
        """Convert to an xarray ``Dataset`` over ``step``.

        Metrics on the validation data are ``validation_NAME`` over ``validation_step``.

        Example:
            >>> history = History(seed=0)
            >>> history.record(0, {"loss": 1.0})
            >>> history.to_dataset()["loss"].dims
            ('step',)
        """
        import xarray

        variables = {name: ("step", self[name]) for name in self}
        variables |= {
            f"validation_{name}": ("validation_step", self.validation[name])
            for name in self.validation
        }
        coords = {"step": self.steps}
        if self.validation:
            coords["validation_step"] = self.validation.steps
        return xarray.Dataset(variables, coords, {"seed": str(self.seed)})

    def _summary(self) -> str:
        end = (
            ", interrupted" if self.interrupted else ", stopped early" if self.stopped_early else ""
        )
        best = "" if self.best_step is None else f", best validation at step {self.best_step}"
        return f"{super()._summary()}{end}{best}, seed {self.seed}"

    def _rows(self) -> list[tuple[str, float, float, float]]:
        held = self.validation._rows()
        return super()._rows() + [(f"validation {row[0]}", *row[1:]) for row in held]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("", "first", "last", "mean of last 10 %"))
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td>{value:.5g}</td>" for value in values)
            + "</tr>"
            for name, *values in self._rows()
        )
        summary = html.escape(self._summary())
        return f"<table><caption>{summary}</caption><tr>{head}</tr>{body}</table>"
