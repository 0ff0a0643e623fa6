"""The card of an entry: what it is, how it was trained, its metrics with their errors, its limits.

A card is a tree of frozen dataclasses, stored as JSON. Reading checks every field: an unknown or a
missing one, or a value of another type, raises an error that names it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from pyroebm.core.files import FileError, read_settings, reading, write_settings
from pyroebm.core.statistics import Estimate, Kind

__all__ = ["Card", "Check", "Data", "Metric", "Training", "card_markdown", "read_card"]

#: Format of the JSON file. A file of another format raises an error.
FORMAT = 1
#: Kinds of log Z that a card may state: one exact number, or a bracket of two.
LOG_Z_KINDS: tuple[tuple[str, ...], ...] = (
    ("exact",),
    ("lower", "upper"),
    ("lower", "estimate"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of a card, and how it is computed again.

    Args:
        name: what it is.
        value: the number; log Z and likelihoods in nats.
        standard_error: its Monte Carlo standard error; 0 for an exact number.
        kind: "exact", "estimate", "lower" or "upper".
        computation: the name of a function in :data:`pyroebm.zoo.COMPUTATIONS`.
        arguments: its arguments.
        data: the data that it needs, such as "digits/test"; None for none.
        over_seeds: the value for each seed of :attr:`Training.seeds`, the first one first.
        note: a remark.

    Raises:
        ValueError: if a number is not finite, or an exact one has an error.

    Example:
        >>> Metric(name="log Z", value=1.0, standard_error=0.0, kind="exact", computation="exact")
        ... # doctest: +ELLIPSIS
        Metric(name='log Z', value=1.0, standard_error=0.0, kind='exact', ...)
    """

    name: str
    value: float
    standard_error: float
    kind: Kind
    computation: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str | None = None
    over_seeds: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        numbers = (self.value, self.standard_error, *self.over_seeds)
        if not all(map(math.isfinite, numbers)) or self.standard_error < 0.0:
            raise ValueError(
                f"{self.name!r} must be finite with a standard error of at least 0, got {numbers}"
            )
        if self.kind == "exact" and self.standard_error:
            raise ValueError(
                f"{self.name!r} is exact, so standard_error must be 0, got {self.standard_error}"
            )

    @property
    def estimate(self) -> Estimate:
        """The value, its standard error and its kind."""
        return Estimate(self.value, self.standard_error, self.kind)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        n = len(self.over_seeds)
        if n < 2:
            return None
        mean = sum(self.over_seeds) / n
        return math.sqrt(sum((value - mean) ** 2 for value in self.over_seeds) / (n - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data of an entry.

    Args:
        name: of the data.
        binarization: how pixels were binarized; likelihoods of different ways are not comparable.
        license: license of the data.
        source: who made it.
        ships: whether it comes with the packages that this one needs.
    """

    name: str
    binarization: str
    license: str
    source: str
    ships: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How an entry was trained.

    Args:
        command: of the command line, in a checkout.
        recipe: module of the recipe.
        settings: arguments of the recipe.
        seeds: the seed of the entry, then those of the other trainings, for the spread.
        machine: on which it ran.
        minutes: of the first training, with its evaluation.
        versions: of Python and packages.
    """

    command: str
    recipe: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    machine: str
    minutes: float
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A criterion that was applied to an entry or to its reference draws.

    Args:
        name: what was measured.
        rule: the criterion, such as "< 1.01".
        value: what was found.
        passed: whether the criterion is met.
    """

    name: str
    rule: str
    value: float
    passed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """All that is known about an entry.

    Args:
        name: of the entry. A changed density has a new name.
        title: one line.
        description: what the entry is and what it may be used for.
        model: class of the model.
        event_shape: shape of one event.
        num_parameters: number of trained parameters.
        num_bytes: size of the files.
        data: of the training.
        training: recipe, seeds, machine.
        log_z: one exact log Z, or a bracket: a lower bound and an upper one (an estimate, where
            there are no exact draws).
        metrics: numbers that measure the entry.
        checks: criteria and their values.
        known_failures: what the entry does wrong.
        files: SHA-256 of each other file of the entry, by name.

    Raises:
        ValueError: if ``log_z`` is neither exact nor a bracket.
    """

    name: str
    title: str
    description: str
    model: str
    event_shape: tuple[int, ...]
    num_parameters: int
    num_bytes: int
    data: Data
    training: Training
    log_z: tuple[Metric, ...]
    metrics: tuple[Metric, ...]
    checks: tuple[Check, ...]
    known_failures: tuple[str, ...]
    files: dict[str, str]

    def __post_init__(self) -> None:
        kinds = tuple(metric.kind for metric in self.log_z)
        if kinds not in LOG_Z_KINDS:
            raise ValueError(
                f"log_z must be one exact number, or a lower bound and an upper bound or estimate;"
                f" got kinds {kinds}"
            )

    @property
    def exact_log_z(self) -> float | None:
        """Log Z in nats if it is exact, else None."""
        return self.log_z[0].value if self.log_z[0].kind == "exact" else None

    def to_dict(self) -> dict[str, Any]:
        """Return the card as a dictionary for JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        """Write the card as JSON, with a checksum."""
        write_settings(path, self.to_dict())


def read_card(path: Path, key: str | None = None) -> Card:
    """Read the card in a JSON file.

    Args:
        path: the file.
        key: the entry of the file that has the card; None for the whole file.

    Raises:
        FileError: if the file is missing or damaged, or if a field is unknown, missing or wrong.
    """
    with reading(path):
        content = read_settings(path)
        content = dict(content if key is None else content[key])
        if (found := content.pop("format")) != FORMAT:
            raise FileError(path, f"the card must have format {FORMAT}, got format {found}")
        card: Card = _parsed(Card, content, "card")
        return card


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to an annotated type, and check it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(value, dict) or value.keys() != names:
            got = value.keys() if isinstance(value, dict) else {value}
            raise ValueError(
                f"{where} must have the fields of {getattr(kind, '__name__', kind)}, got unknown"
                f" {sorted(map(str, got - names))} and without {sorted(names - got)}"
            )
        make: Any = kind
        return make(**{k: _parsed(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _parsed(inner, value, where)
    elif origin is tuple and isinstance(value, list):
        return tuple(_parsed(arguments[0], v, f"{where}[{k}]") for k, v in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {k: _parsed(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{where} must be of type {kind}, got {value!r}")


def shown(metric: Metric) -> str:
    """Format a metric: its value, Monte Carlo error and kind."""
    if metric.kind == "exact":
        return f"{metric.value:.5g} (exact)"
    return f"{metric.value:.5g} ± {metric.standard_error:.2g} ({metric.kind})"


def card_markdown(card: Card) -> str:
    """Return a card as a page in Markdown."""
    training, data = card.training, card.data
    rows = []
    for metric in (*card.log_z, *card.metrics):
        spread = "" if metric.spread is None else f"{metric.spread:.2g}"
        rows.append(f"| {metric.name} | {shown(metric)} | {spread} | {metric.note} |")
    checks = [
        f"| {c.name} | {c.rule} | {c.value:.4g} | {'yes' if c.passed else 'no'} |"
        for c in card.checks
    ]
    settings = ", ".join(f"{k}={v!r}" for k, v in training.settings.items()) or "defaults"
    versions = ", ".join(f"{name} {version}" for name, version in training.versions.items())
    seeds = ", ".join(map(str, training.seeds))
    lines = [
        f"# {card.name}",
        "",
        card.title,
        "",
        card.description,
        "",
        "```python",
        "from pyroebm import zoo",
        "",
        f'model = zoo.load("{card.name}")',
        "```",
        "",
        f"- Model: `{card.model}`, {card.num_parameters:,} parameters, events of shape"
        f" {card.event_shape}, {card.num_bytes / 1024:.0f} KiB",
        f"- Data: {data.name}; {data.binarization}; license: {data.license}; source: {data.source}",
        f"- Training: `{training.command}` (recipe `{training.recipe}`, {settings}); seed"
        f" {training.seeds[0]} of {seeds}; {training.minutes:.1f} minutes on {training.machine};"
        f" {versions}",
        "",
        "## Metrics",
        "",
        "An error is a Monte Carlo standard error. The spread is the standard deviation over the"
        " seeds.",
        "",
        "| metric | value | spread | remark |",
        "|---|---|---|---|",
        *rows,
        "",
        "## Checks",
        "",
        *(
            ["| check | criterion | found | passed |", "|---|---|---|---|", *checks]
            if checks
            else ["None."]
        ),
        "",
        "## Known failures",
        "",
        *(f"- {failure}" for failure in card.known_failures or ("None known.",)),
        "",
    ]
    return "\n".join(lines)
