"""Draws and statistics of all chains, preallocated."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from pyroebm.kernels.base import AnyState, Info

__all__ = ["Record", "flatten", "merged", "unflatten"]

T = TypeVar("T", bound=tuple[Any, ...])


class Record:
    """Preallocated draws and statistics of all chains; only the first ``count`` draws are filled.

    Args:
        size: draws to make room for.
        state: a state, for shapes and types.
    """

    def __init__(self, size: int, state: AnyState) -> None:
        self.count = 0
        self.x = state.x.new_empty((len(state.x), size, *state.x.shape[1:]))
        self._stats: dict[str, Tensor] = {}

    def append(self, state: AnyState, info: Info) -> None:
        """Keep one draw of every chain."""
        facts = {"lp": -state.energy} | {k: v for k, v in info._asdict().items() if v is not None and k != "accepted"}
        for name, value in facts.items():
            if name not in self._stats:
                self._stats[name] = value.new_empty((self.x.shape[0], self.x.shape[1]))
            self._stats[name][:, self.count] = value
        self.x[:, self.count] = state.x
        self.count += 1  # last: an interrupt before this line loses the draw in hand and no other

    def draws(self) -> Tensor:
        """Unconstrained draws, ``(chains, count, *event)``."""
        return self.x[:, : self.count]

    def stats(self) -> dict[str, Tensor]:
        """Statistics, each ``(chains, count)``."""
        return {name: value[:, : self.count] for name, value in self._stats.items()}

    def grow(self, size: int) -> None:
        """Make room for ``size`` more draws after those kept."""
        extend = lambda t: torch.cat([t[:, : self.count], t.new_empty((t.shape[0], size, *t.shape[2:]))], 1)  # noqa: E731
        self.x, self._stats = extend(self.x), {name: extend(value) for name, value in self._stats.items()}

    def load(self, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Take over draws kept elsewhere."""
        self.x, self._stats, self.count = x.clone(), {k: v.clone() for k, v in stats.items()}, x.shape[1]


def merged(infos: list[Info]) -> Info:
    """One report for the steps between two kept draws: counts add up, rates are averaged, the rest is the last one's."""
    last = infos[-1]
    if len(infos) == 1:
        return last
    return last._replace(
        acceptance_rate=torch.stack([i.acceptance_rate for i in infos]).mean(0),
        diverging=torch.stack([i.diverging for i in infos]).any(0),
        n_steps=torch.stack([i.n_steps for i in infos]).sum(0),
    )


def flatten(state: Any) -> dict[str, Tensor]:
    """A NamedTuple of tensors, or of such NamedTuples, as one dict: ``inner.x`` is the ``x`` of the field ``inner``."""
    found: dict[str, Tensor] = {}
    for name, value in state._asdict().items():
        found |= {f"{name}.{k}": v for k, v in flatten(value).items()} if isinstance(value, tuple) else {name: value}
    return found


def unflatten(like: T, parts: dict[str, Tensor]) -> T:
    """The inverse of :func:`flatten`, with the structure of ``like``; ValueError if a part is missing."""
    if missing := set(flatten(like)) - set(parts):
        raise ValueError(f"the state must hold {sorted(flatten(like))}, got none of {sorted(missing)}")
    inner = lambda name: {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}  # noqa: E731
    fields = like._asdict().items()  # type: ignore[attr-defined]
    new = {name: unflatten(value, inner(name)) if isinstance(value, tuple) else parts[name] for name, value in fields}
    return type(like)(**new)
