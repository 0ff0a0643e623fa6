"""Conversion of NumPy arrays to tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_tensor", "is_number", "tensor_of_numbers"]


def as_tensor(x: object, dtype: torch.dtype, device: torch.device, name: str = "x") -> Tensor:
    """Return a tensor unchanged; convert a NumPy array to a dtype and a device.

    An array is usually float64 whatever the model is, so its dtype is converted; that of a tensor
    was chosen, so it is left to the checks of the caller.

    Args:
        x: a tensor or a NumPy array of numbers.
        dtype: dtype of a converted array.
        device: device of a converted array.
        name: name of the argument in error messages.

    Raises:
        ValueError: if ``x`` is neither, or an array of something else than numbers.

    Example:
        >>> as_tensor(np.array([1, 2]), torch.float32, torch.device("cpu"))
        tensor([1., 2.])
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return tensor_of_numbers(np.asanyarray(x), name).to(device, dtype)
    raise ValueError(
        f"{name} must be a tensor or a NumPy array, got {type(x).__name__}: convert it by"
        f" torch.as_tensor({name})"
    )


def tensor_of_numbers(values: np.ndarray, name: str, what: str = "an array") -> Tensor:
    """Convert an array of numbers to a tensor of a type that torch supports.

    Masked entries and None become NaN.

    Args:
        values: the array, of any shape.
        name: name of the argument in error messages.
        what: description of the array in error messages.

    Raises:
        ValueError: if an entry is not a real number.

    Example:
        >>> tensor_of_numbers(np.ma.masked_equal([1, 2], 2), "data")
        tensor([1., nan], dtype=torch.float64)
    """
    if isinstance(values, np.ma.MaskedArray):
        masked, values = np.ma.getmaskarray(values), values.data
        if masked.any() and values.dtype.kind in "biufO":
            values = np.where(masked, np.nan, values)
    if values.dtype == object and all(v is None or is_number(v) for v in values.flat):
        values = np.array([np.nan if v is None else float(v) for v in values.flat]).reshape(
            values.shape
        )
    if values.dtype.kind not in "biuf":
        bad = next(((k, v) for k, v in enumerate(values.flat) if not is_number(v)), None)
        found = "" if bad is None else f" with {str(bad[1])!r}"
        where = f" in row {bad[0]}" if bad is not None and values.ndim == 1 else ""
        fix = {
            "c": "its .real and .imag are real numbers",
            "m": "divide it by a unit, numpy.timedelta64(1, 's')",
        }.get(values.dtype.kind, "drop it, or encode it by integers (pandas.factorize)")
        raise ValueError(
            f"{name} must be numbers, got {what} of {values.dtype}{found}{where}: {fix}"
        )
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        # int64, which labels keep, unless it would wrap around
        fits = values.max(initial=0) <= np.iinfo(np.int64).max
        values = values.astype(np.int64 if fits else np.float64)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    # ascontiguousarray would give a number one dimension; torch warns about arrays that are not
    # writable
    values = np.ascontiguousarray(values).reshape(values.shape)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy."""
    # NumPy's timedelta64 is a subclass of its integers
    numbers = int | float | np.integer | np.floating | np.bool_
    return isinstance(value, numbers) and not isinstance(value, np.timedelta64)
