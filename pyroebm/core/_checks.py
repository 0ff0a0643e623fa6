"""Checks of an energy's arguments; each error states the rule and the values seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

__all__ = [
    "check_counts",
    "check_declaration",
    "check_kind",
    "check_same",
    "check_shape",
    "check_values",
    "no_gradient",
    "stacklevel_of_user",
]


def check_declaration(event_shape: object, support: object) -> None:
    """Check that ``event_shape`` is a sequence of sizes and ``support`` a constraint.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(event_shape, Sequence) or isinstance(event_shape, str):
        raise ValueError(
            "event_shape must be a tuple of sizes, () for a scalar variable, got"
            f" event_shape={event_shape!r}"
        )
    if not isinstance(support, Constraint):
        raise ValueError(
            f"support must be a torch.distributions constraint, got support={support!r}"
        )


def check_shape(name: str, x: Tensor, event_shape: torch.Size) -> torch.Size:
    """Return the batch shape of ``x``.

    Raises:
        ValueError: unless ``x`` is a tensor whose last dimensions are ``event_shape``.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x must be a tensor of states ({name}), got {type(x).__name__}: convert it by"
            " torch.as_tensor(x, dtype=energy.dtype), or call energy.score_samples(x), which takes"
            " NumPy arrays"
        )
    cut = x.dim() - len(event_shape)
    if cut < 0 or tuple(x.shape[cut:]) != tuple(event_shape):
        raise ValueError(
            f"x must have shape (*batch, *event_shape) with event_shape {tuple(event_shape)}"
            f" ({name}), got shape {tuple(x.shape)}"
        )
    return x.shape[:cut]


def check_values(
    name: str, values: object, x: Tensor, event_shape: Sequence[int], batch: torch.Size
) -> None:
    """Check that ``values`` holds one energy for each event of ``x``.

    Raises:
        ValueError: otherwise, with both shapes.
    """
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{name}.forward must return a tensor of energies, got {type(values).__name__}"
        )
    if values.shape != batch:
        hint = ""
        if values.shape == (*batch, 1):
            hint = "; drop the last dimension with .squeeze(-1)"
        elif not event_shape and values.dim() < len(batch):
            hint = (
                f"; () is the event_shape of a class that sets none: if {name} is of vectors, write"
                " event_shape = (2,) in it, with their length"
            )
        raise ValueError(
            f"{name}.forward must return one energy per event: for x of shape {tuple(x.shape)}"
            " with event_shape"
            f" {tuple(event_shape)} the result must have shape {tuple(batch)}, but it has shape"
            f" {tuple(values.shape)}{hint}"
        )


def no_gradient(name: str, values: Tensor, x: Tensor) -> str:
    """Explain why the energies ``values`` have no gradient in ``x``."""
    if values.dtype != x.dtype:
        return (
            f"{name}.forward must return the dtype of x, {x.dtype}, got {values.dtype}: convert"
            " with energy.to()"
        )
    return (
        f"{name}.forward(x) does not depend on x through autograd (is there a .detach(), .item()"
        " or NumPy call in it?); write a constant energy as 0 * x"
    )


def check_same(name: str, what: str, ours: object, argument: str, theirs: object) -> None:
    """Check that an argument has the dtype or device of the energy.

    Raises:
        ValueError: otherwise, with both.
    """
    if theirs != ours:
        raise ValueError(
            f"{argument} must have the {what} of the energy: {name} has {what} {ours}, {argument}"
            f" has {theirs}; convert one of"
            f" them with .to({ours if what == 'dtype' else repr(str(ours))})"
        )


def check_kind(energy: object, kind: type) -> None:
    """Check that ``energy`` is an instance of ``kind``, the Energy class.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(energy, kind):
        raise ValueError(
            f"energy must be a pyroebm.Energy, got {type(energy).__name__}; wrap a log-density with"
            " pyroebm.core.Unnormalized(log_density, event_shape=...), a Pyro model with"
            " pyroebm.ModelEnergy(model, *args)"
        )


def check_counts(bounds: dict[str, int], *values: object) -> None:
    """Check that each value is an integer not below its bound.

    Args:
        bounds: the lower bound of each value, by the name of the argument.
        values: the values, in the order of ``bounds``.

    Raises:
        ValueError: otherwise, with the name and the value.
    """
    for (name, bound), value in zip(bounds.items(), values, strict=True):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < bound:
            raise ValueError(f"{name} must be an integer of at least {bound}, got {name}={value!r}")


def stacklevel_of_user() -> int:
    """Return the ``stacklevel`` of the first caller outside this package.

    A warning that is issued with it shows the user's line (Python 3.12 has ``skip_file_prefixes``).
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("pyroebm."):
        frame = frame.f_back
        level += 1
    return level
