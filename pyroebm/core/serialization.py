"""Settings, kernel states and adaptation states as tensors and JSON, without pickle."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_text", "pack", "to_text", "unpack"]


def to_text(value: Any) -> Tensor:
    """Encode a value as JSON, as bytes in a tensor, for files that hold tensors only."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def from_text(text: Tensor) -> Any:
    """Decode the value of :func:`to_text`."""
    return json.loads(bytes(text.tolist()))


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe a value in JSON, and add its tensors to ``tensors`` under dotted names.

    NamedTuples and dataclasses (kernels) are described field by field. A value that is not one of
    these, a number, text, tuple, list or dict (for example an energy or a function) is recorded as
    a setting, which :func:`unpack` takes from its argument ``like``.

    Example:
        >>> tensors = {}
        >>> pack((1.5, torch.zeros(2)), "pair", tensors)
        {'tuple': [1.5, {'tensor': 'pair.1'}]}
        >>> tensors
        {'pair.1': tensor([0., 0.])}
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if (fields := _fields(value)) is not None:
        return {
            "type": type(value).__name__,
            "fields": {k: pack(v, f"{name}.{k}", tensors) for k, v in fields.items()},
        }
    if isinstance(value, tuple | list):
        return {
            type(value).__name__: [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        }
    if isinstance(value, dict):
        return {"dict": {k: pack(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    return {"setting": name}


def unpack(described: Any, like: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the value of :func:`pack`.

    Args:
        described: the result of :func:`pack`.
        like: a value of the same structure, which provides the settings and the types.
        tensors: the tensors of :func:`pack`.

    Raises:
        ValueError: if a tensor is missing, or a type does not occur in ``like`` or in its
            annotations.
    """
    return _unpack(described, like, tensors, _types_of(like, {}))


def _unpack(described: Any, like: Any, tensors: dict[str, Tensor], known: dict[str, type]) -> Any:
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        if described["tensor"] not in tensors:
            raise ValueError(f"the state must hold {described['tensor']}, got {sorted(tensors)}")
        return tensors[described["tensor"]].clone()
    if "type" in described:
        if described["type"] not in known:
            raise ValueError(
                f"the state holds a {described['type']}, but a {type(like).__name__} is made of"
                f" {sorted(known)}"
            )
        own = (_fields(like) or {}) if type(like).__name__ == described["type"] else {}
        return known[described["type"]](
            **{k: _unpack(v, own.get(k), tensors, known) for k, v in described["fields"].items()}
        )
    if "dict" in described:
        own = like if isinstance(like, dict) else {}
        return {k: _unpack(v, own.get(k), tensors, known) for k, v in described["dict"].items()}
    if "setting" in described:
        return like
    kind, parts = next(iter(described.items()))
    likes = (
        like if isinstance(like, tuple | list) and len(like) == len(parts) else [None] * len(parts)
    )
    return {"tuple": tuple, "list": list}[kind](
        _unpack(v, o, tensors, known) for v, o in zip(parts, likes, strict=True)
    )


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return None


def _types_of(value: Any, known: dict[str, type]) -> dict[str, type]:
    """Collect the types with fields in a value and in the annotations of its fields.

    The annotations are needed because a field that is None now may hold a value when it is saved.
    """
    fields = _fields(value)
    parts = (
        fields.values() if fields is not None else value if isinstance(value, tuple | list) else ()
    )
    if fields is not None:
        _types_in(type(value), known)
    for part in value.values() if isinstance(value, dict) else parts:
        _types_of(part, known)
    return known


def _types_in(annotation: Any, known: dict[str, type]) -> None:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for part in typing.get_args(annotation):
            _types_in(part, known)
    elif isinstance(annotation, type) and (
        hasattr(annotation, "_fields") or dataclasses.is_dataclass(annotation)
    ):
        if annotation.__name__ in known:
            return
        known[annotation.__name__] = annotation
        for part in typing.get_type_hints(annotation).values():
            _types_in(part, known)
