"""Saving without pickle: a safetensors file of the state, with the class and the constructor's
arguments as JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from pyroebm.core.files import read_tensors, write_tensors

__all__ = ["Saved", "load_flow"]

_CLASSES: dict[str, type[Saved]] = {}


class Saved(nn.Module):
    """A module that its constructor's arguments and its state_dict describe wholly.

    A subclass sets ``_config`` to the arguments: numbers, strings, lists, None, dtypes, or other
    such modules.
    """

    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return next(
            tensor.dtype for tensor in self.state_dict().values() if tensor.is_floating_point()
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON can hold them; with the state_dict it is the whole
        module.

        Raises:
            NotImplementedError: for a module built of parts that have no such description.
        """
        if "_config" not in self.__dict__:
            raise NotImplementedError(
                f"{type(self).__name__} is built of parts that JSON cannot hold: keep its"
                " state_dict() and the code that built it"
            )
        written = {name: _described(value) for name, value in self._config.items()}
        return {**written, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A fresh module from what :meth:`config` gave."""
        read = {name: _built(value) for name, value in config.items()}
        read["dtype"] = getattr(torch, config["dtype"])
        if "generator" in inspect.signature(cls).parameters:
            # what it draws is overwritten: torch's default generator stays as it is
            read["generator"] = torch.Generator()
        return cls(**read)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of the state_dict, with the class and :meth:`config` in its
        metadata.

        Args:
            path: the file, usually ``*.safetensors``; overwritten.
        """
        metadata = {"class": type(self).__name__, "config": json.dumps(self.config())}
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """The module that :meth:`save` wrote; no pickle is read. :func:`load_flow` reads a flow of
        any class.

        Args:
            path: the file.
            device: where to.

        Raises:
            ValueError: if the file holds no flow, or one of another class.
        """
        return cast(Self, _load(path, device, cls.__name__))


def load_flow(path: str | Path, *, device: torch.device | str = "cpu") -> Saved:
    """The flow that its ``save`` wrote, whichever class the file names.

    Args:
        path: the file.
        device: where to.

    Raises:
        ValueError: if the file names no class of flows that is known (imported) here.
    """
    return _load(path, device, None)


def _load(path: str | Path, device: torch.device | str, expected: str | None) -> Saved:
    state, metadata = read_tensors(path, str(device))
    named = metadata.get("class")
    wanted = sorted(_CLASSES) if expected is None else [expected]
    if named not in wanted or "config" not in metadata:
        raise ValueError(
            f"{path} must hold a flow of class {' or '.join(wanted)}, its metadata name {named!r}"
        )
    module = _CLASSES[named].from_config(json.loads(metadata["config"])).to(device)
    module.load_state_dict(state)
    return module


def _described(value: Any) -> Any:
    return (
        {"class": type(value).__name__, "config": value.config()}
        if isinstance(value, Saved)
        else value
    )


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _CLASSES[value["class"]].from_config(value["config"])
    return value
