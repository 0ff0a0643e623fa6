"""Reading and writing of files; no other module of the package does it.

Files are written atomically: to a temporary file, which is then renamed. Only :func:`append_line`
writes in place. No pickle is loaded.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:  # importing it takes half a second, so only functions that need it do
    import xarray

__all__ = [
    "FileError",
    "SafetensorError",
    "append_line",
    "checksum",
    "from_bytes",
    "read_arrays",
    "read_bytes",
    "read_group",
    "read_json",
    "read_tensors",
    "read_text",
    "remove",
    "to_bytes",
    "write_figure",
    "write_groups",
    "write_json",
    "write_netcdf",
    "write_tensors",
    "write_text",
    "atomic_write",
]

#: Maximum length of a header, as in safetensors.
MAX_HEADER = 100_000_000
#: The checksum in the header of a file of tensors: JSON within JSON, so its quotes are escaped.
CHECKSUM = re.compile(rb'(?<=\\"checksum\\": \\")[0-9a-f]{64}(?=\\")')


class FileError(OSError, ValueError):
    """A file that cannot be read: missing, damaged, or of another kind.

    Args:
        path: the file.
        reason: what is wrong with it.

    Example:
        >>> raise FileError("net.safetensors", "it is damaged")
        Traceback (most recent call last):
        pyroebm.core.files.FileError: net.safetensors: it is damaged
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[FileError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


@contextlib.contextmanager
def atomic_write(path: Path, by: str = "") -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` at the end.

    A process that is killed leaves the old file or the new one, never a part of one.

    Args:
        path: the file.
        by: suffix of the temporary name, for processes that write the same file at the same time.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder, "a")) as temporary:
        ...         size = temporary.write_text("draws")
        ...     read_text(Path(folder, "a"))
        'draws'
    """
    temporary = path.with_name(f"{path.name}{by}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, by: str = "") -> None:
    """Write a text file in UTF-8."""
    with atomic_write(Path(path), by) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8."""
    return Path(path).read_text(encoding="utf-8")


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a text file. The line is in the file when this returns."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_json(path: str | Path, value: Any, by: str = "", indent: int | None = None) -> None:
    """Write a value as JSON."""
    write_text(path, json.dumps(value, indent=indent) + "\n", by)


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(read_text(path))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and JSON metadata as a safetensors file with a checksum of every byte.

    The same tensors and metadata give the same bytes.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(f"{folder}/x.safetensors", {"x": torch.ones(2)}, {"class": "NICE"})
        ...     read_tensors(f"{folder}/x.safetensors")
        ({'x': tensor([1., 1.])}, {'class': 'NICE'})
    """
    # a single entry, since safetensors writes several entries in random order
    text = json.dumps({"checksum": "0" * 64, **(metadata or {})})
    with atomic_write(Path(path)) as temporary:
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"pyroebm": text},
        )
        _, checksum, place = _checksums(temporary)
        with temporary.open("r+b") as file:
            file.seek(place)
            file.write(checksum)


def read_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and metadata of a file that :func:`write_tensors` wrote.

    Raises:
        FileError: if there is no such file, if it is damaged, or if another program wrote it.
    """
    try:
        stored, computed, _ = _checksums(Path(path))
        if stored != computed:
            raise FileError(path, "the file is damaged: its checksum does not match its content")
        with safe_open(path, "pt", device=device) as file:
            metadata = json.loads(file.metadata()["pyroebm"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            del metadata["checksum"]
    except FileError:
        raise
    except FileNotFoundError as error:
        raise FileError(path, "there is no such file") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(path, f"the file cannot be read: {error}") from error
    return tensors, metadata


def _checksums(path: Path) -> tuple[bytes, bytes, int]:
    """Return the checksum stored in a file of tensors, that of its content, and where it is stored.

    The content is every byte of the file, with zeros in place of the checksum.
    """
    foreign = "the file must be a complete file written by pyroebm"
    with path.open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > min(MAX_HEADER, path.stat().st_size - 8):
            raise FileError(path, foreign)
        header = file.read(length)
        stored = CHECKSUM.search(header)
        if stored is None:
            raise FileError(path, foreign)
        content = hashlib.sha256(begin)
        content.update(header[: stored.start()] + b"0" * 64 + header[stored.end() :])
        while chunk := file.read(2**20):
            content.update(chunk)
    return stored[0], content.hexdigest().encode(), 8 + stored.start()


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of the shapes, dtypes and entries of tensors, 16 hexadecimal digits.

    Example:
        >>> checksum([torch.zeros(2)]) == checksum([torch.zeros(1), torch.zeros(1)])
        False
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        entries = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(entries.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the safetensors file of tensors as bytes, to send to another process."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read the tensors that :func:`to_bytes` wrote."""
    return safetensors.torch.load(data)


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if its name ends in ``.gz``.

    Raises:
        OSError, EOFError, zlib.error: if there is no such file, or it is damaged.
    """
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        return file.read()


def read_arrays(path: Path, names: Container[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the named arrays of an ``.npz`` file without loading any pickle.

    Args:
        path: the file.
        names: the arrays to read; those that the file lacks are skipped.

    Returns:
        the arrays by name, and the names of all arrays in the file.

    Raises:
        OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error: if there is no such file, or
            if it is damaged.
    """
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a .npy file with one array, not an .npz file")
    with file:
        return {name: file[name] for name in file.files if name in names}, list(file.files)


def write_groups(
    path: Path, groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, Any]
) -> None:
    """Write xarray Datasets as the groups of a netCDF file, with ``attrs`` at its root."""
    import xarray

    with atomic_write(path) as temporary:
        xarray.Dataset(attrs=dict(attrs)).to_netcdf(temporary, engine="h5netcdf")
        for name, dataset in groups.items():
            dataset.to_netcdf(temporary, mode="a", group=name, engine="h5netcdf")


def read_group(path: Path, group: str, draws: slice = slice(None)) -> xarray.Dataset:
    """Read a slice of the draws of one group of a netCDF file.

    The other draws are never in memory.

    Raises:
        OSError: if there is no such file or group.
    """
    import xarray

    with xarray.open_dataset(path, group=group, engine="h5netcdf") as data:
        return data.isel(draw=draws).load()


def write_netcdf(path: Path, data: Any) -> None:
    """Write an InferenceData or DataTree of ArviZ as a netCDF file."""
    with atomic_write(path) as temporary:
        data.to_netcdf(str(temporary))


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure in the format given by the file's suffix."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
