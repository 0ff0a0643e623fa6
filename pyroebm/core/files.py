"""Reading and writing of files; no other module of the package does it.

Files are written atomically: to a temporary file of this process, which is flushed to the disk and
renamed. Only :func:`append_line` writes in place. Files that the library reads again have a
checksum of their content. No pickle is loaded, and what a file asks for is compared with its size
before memory is allocated: 64 MiB, or 100 times the size of the file if that is more.

Every error of reading or writing is a :class:`FileError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
import time
import warnings
import weakref
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyroebm.core._checks import stacklevel_of_user

if TYPE_CHECKING:  # importing it takes half a second, so only functions that need it do
    import xarray

__all__ = [
    "FileError",
    "Lock",
    "append_line",
    "atomic_write",
    "check_writable",
    "checksum",
    "copy_file",
    "file_checksum",
    "from_bytes",
    "read_arrays",
    "read_bytes",
    "read_groups",
    "read_settings",
    "read_tensors",
    "read_text",
    "reading",
    "remove",
    "to_bytes",
    "write_arrays",
    "write_figure",
    "write_groups",
    "write_json",
    "write_netcdf",
    "write_settings",
    "write_tensors",
    "write_text",
]

#: Maximum length of a header, as in safetensors.
MAX_HEADER = 100_000_000
#: Maximum size of a file of settings.
MAX_SETTINGS = 2**20
#: Bytes that any compressed file may take in memory.
FREE_BYTES = 2**26
#: Maximum ratio of the bytes in memory to those of a compressed file, above FREE_BYTES.
MAX_RATIO = 100
#: The checksum in the header of a file of tensors: JSON within JSON, so its quotes are escaped.
CHECKSUM = re.compile(rb'(?<=\\"checksum\\": \\")[0-9a-f]{64}(?=\\")')
#: Begin of the checksum after the content of a netCDF file, which HDF5 ignores.
SEAL = b"pyroebm sha256 "
CHUNK = 2**20

_TEMPORARY = itertools.count()


class FileError(OSError, ValueError):
    """A file that cannot be read or written.

    It is missing, damaged, of another kind, not writable, or in use by another process.

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
def reading(path: str | Path) -> Iterator[None]:
    """Raise FileError for any error in this context, which reads a file.

    Parsers raise errors of many types for damaged files.

    Example:
        >>> with reading("run.json"):
        ...     {}["seed"]
        Traceback (most recent call last):
        pyroebm.core.files.FileError: run.json: the file cannot be read: KeyError('seed')
    """
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError as error:
        raise FileError(path, "there is no such file") from error
    except Exception as error:
        said = repr(error) if isinstance(error, LookupError) or not str(error) else str(error)
        raise FileError(path, f"the file cannot be read: {said}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        raise FileError(path, f"the file cannot be written: {error}") from error


def _temporary(path: Path) -> Path:
    """Return the name of a temporary file of this process and call."""
    return path.with_name(f"{path.name}.{os.getpid()}-{next(_TEMPORARY)}.part")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` at the end.

    A process that is killed leaves the old file or the new one, never a part of one. So does a
    machine that goes down, since the content is flushed to the disk before the file is renamed.

    Raises:
        FileError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder, "a")) as temporary:
        ...         size = temporary.write_text("draws")
        ...     read_text(Path(folder, "a"))
        'draws'
    """
    temporary = _temporary(path)
    try:
        with _writing(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            with contextlib.suppress(OSError):  # not every file system has it for folders
                _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | Path) -> None:
    """Create the folder of a file and a temporary file in it, which is removed.

    It is called before the work whose result the file will hold.

    Raises:
        FileError: if the file could not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_writable(f"{folder}/runs/net.safetensors")
        ...     check_writable(f"{folder}/runs")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        pyroebm.core.files.FileError: ...runs: the file cannot be written: it is a folder
    """
    path = Path(path)
    with _writing(path):
        if path.is_dir():
            raise FileError(path, "the file cannot be written: it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        namespace: of its process numbers, which differs between containers.
        pid: its process number.
        started: when it started; process numbers are used again.
        time: when it took the lock.
    """

    host: str
    namespace: str
    pid: int
    started: str
    time: float

    @classmethod
    def current(cls) -> _Holder:
        pid = os.getpid()
        return cls(socket.gethostname(), _namespace(), pid, _started(pid), time.time())

    def is_dead(self) -> bool:
        """Whether the process has certainly ended."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # the process of another user
            pass
        return _started(self.pid) != self.started


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str:
    """Return the start time of a process since the boot, empty if it is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    return stat.rpartition(b")")[2].split()[19].decode()


#: Lock files that are held, each with the process: a fork inherits those of its parent.
_HELD: dict[Path, int] = {}


class Lock:
    """Exclusive use of a file or of a part of a folder by one object of one process.

    The lock is a file that names its holder. The lock of a process that has ended without
    releasing it is taken over with a RuntimeWarning, if that process ran on this machine; the lock
    of another machine is not. It is released by :meth:`release`, at the end of the context, when
    the object is deleted, and when the process ends normally.

    Args:
        path: the lock file.
        locked: what is locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.lock")
        ...     with Lock(path, path), Lock(path, path):  # doctest: +ELLIPSIS
        ...         pass
        Traceback (most recent call last):
        pyroebm.core.files.FileError: ...run.lock: it is in use by another object...
    """

    def __init__(self, path: Path, locked: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.locked = locked
        self._release: weakref.finalize[Any, Any] | None = None

    def acquire(self) -> None:
        """Create the lock file, and its folder.

        Raises:
            FileError: if the lock is held, with host, process and age; or if the file cannot be
                written.
        """
        with _writing(self.locked):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                    break
                except FileExistsError:
                    self._remove_stale()
            holder = _Holder.current()
            content = json.dumps(dataclasses.asdict(holder)).encode()
            _HELD[self.path] = holder.pid
            self._release = weakref.finalize(self, _release, self.path, holder.pid, content)
            try:
                with open(handle, "wb") as file:
                    file.write(content)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise

    def release(self) -> None:
        """Remove the lock file, if this object holds it.

        If somebody has deleted the file, that of the next holder stays.
        """
        if self._release is not None:
            self._release()

    @property
    def held_elsewhere(self) -> bool:
        """Whether another process may hold the lock."""
        if _HELD.get(self.path) == os.getpid() or not self.path.exists():
            return False
        holder = self._holder()
        return holder is None or not holder.is_dead()

    def _holder(self) -> _Holder | None:
        """Return the holder; None if the lock file does not name it."""
        try:
            return _Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _remove_stale(self) -> None:
        """Remove the lock file of a process that has ended, else raise FileError."""
        if _HELD.get(self.path) == os.getpid():
            raise FileError(
                self.locked,
                "it is in use by another object of this process: end it first (a trainer by"
                " close())",
            )
        holder = self._holder()
        if holder is not None and holder.is_dead():
            # Only one process renames it; another one would rename the lock of the first.
            taken = _temporary(self.path)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, taken)
                if taken.read_text(encoding="utf-8") != json.dumps(dataclasses.asdict(holder)):
                    os.rename(taken, self.path)
                    return
                taken.unlink()
                warnings.warn(
                    f"{self.locked} was in use by process {holder.pid} on this machine, which took"
                    f" it {_age(holder.time)} ago and has ended without releasing it: it is taken"
                    " over",
                    RuntimeWarning,
                    stacklevel=stacklevel_of_user(),
                )
            return
        try:
            age = _age(self.path.stat().st_mtime if holder is None else holder.time)
        except FileNotFoundError:
            return
        who = "a process" if holder is None else f"process {holder.pid} on {holder.host}"
        raise FileError(
            self.locked,
            f"it is in use by {who}, since {age}: wait until that ends; if it has ended already,"
            f" delete {self.path}",
        )

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _release(path: Path, pid: int, content: bytes) -> None:
    if pid == os.getpid():  # not in a fork of the holder
        _HELD.pop(path, None)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == content:
                path.unlink()


def _age(begin: float) -> str:
    seconds = max(0.0, time.time() - begin)
    if seconds < 120.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 7200.0 else f"{seconds / 3600.0:.0f} h"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        FileError: if there is no such file, or it is not UTF-8.
    """
    with reading(path):
        return Path(path).read_text(encoding="utf-8")


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a text file. The line is in the file when this returns."""
    with _writing(Path(path)), Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON, for other programs."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write settings as JSON with a checksum.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_settings(f"{folder}/run.json", {"seed": 0})
        ...     read_settings(f"{folder}/run.json")
        {'seed': 0}
    """
    write_json(path, {**settings, "checksum": _checksum_of(settings)}, indent=1)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings that :func:`write_settings` wrote.

    Raises:
        FileError: if there is no such file, if it is damaged, or if another program wrote it.
    """
    with reading(path), open(path, "rb") as file:
        settings = json.loads(file.read(MAX_SETTINGS))
        stored = settings.pop("checksum")
        if stored != _checksum_of(settings):
            raise FileError(path, "the file is damaged: its checksum does not match its content")
        return dict(settings)


def _checksum_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
    with reading(path):
        stored, computed, _ = _checksums(Path(path))
        if stored != computed:
            raise FileError(path, "the file is damaged: its checksum does not match its content")
        with safe_open(path, "pt", device=device) as file:
            metadata = json.loads(file.metadata()["pyroebm"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            del metadata["checksum"]
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
        while chunk := file.read(CHUNK):
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


def read_bytes(path: Path, measure: Callable[[bytes], int]) -> bytearray:
    """Read a file whose beginning gives its size, decompressed if its name ends in ``.gz``.

    Args:
        path: the file.
        measure: function from the first 1,024 bytes of the content, or fewer if it has fewer, to
            the number of bytes of the content.

    Raises:
        FileError: if there is no such file, if it is damaged, or if its content has another size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "a").write_bytes(bytes([2, 7, 8]))
        ...     read_bytes(Path(folder, "a"), lambda start: 1 + start[0]).hex()
        '020708'
    """
    with reading(path):
        stored = path.stat().st_size
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            content = bytearray(file.read(1024))
            size = measure(bytes(content))
            if path.suffix == ".gz":
                _check_size(path, size, stored)
            while len(content) <= size and (chunk := file.read(CHUNK)):
                content += chunk
        if len(content) != size:
            more = "more" if len(content) > size else len(content)
            raise FileError(
                path,
                f"it must have {size} bytes by its header, got {more}: it is damaged or incomplete",
            )
        return content


def _check_size(path: Path, size: int, stored: int) -> None:
    """Raise FileError if a compressed file of ``stored`` bytes may not take ``size`` in memory."""
    limit = max(FREE_BYTES, MAX_RATIO * stored)
    if size > limit:
        raise FileError(
            path,
            f"it must have at most {limit} bytes when decompressed ({MAX_RATIO} times its size, or"
            f" {FREE_BYTES} if that is more), got {size}: decompress it first if that is right",
        )


def read_arrays(path: Path, names: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the named arrays of an ``.npz`` file without loading any pickle.

    Args:
        path: the file.
        names: the arrays to read; those that the file lacks are skipped.

    Returns:
        the arrays by name, and the names of all arrays in the file.

    Raises:
        FileError: if there is no such file, or if it is damaged or of another kind.
    """
    with reading(path):
        with open(path, "rb") as begin:
            if begin.read(6) == np.lib.format.MAGIC_PREFIX:
                raise FileError(path, "it is a .npy file with one array, not an .npz file")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {name: info for name, info in members.items() if name in names}
            size = sum(info.file_size for info in wanted.values())
            _check_size(path, size, path.stat().st_size)
            return {name: _array_of(archive.read(info)) for name, info in wanted.items()}, list(
                members
            )


def _array_of(content: bytes) -> np.ndarray:
    """Parse the content of an ``.npy`` file."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, transposed, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("it has an array of Python objects (allow_pickle=False)")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"it has an array of shape {shape} and {dtype} with other bytes")
    # a copy, since torch needs memory that is writable
    flat = np.frombuffer(content, dtype, offset=file.tell()).copy()
    return flat.reshape(shape, order="F" if transposed else "C")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as a compressed ``.npz`` file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_arrays(Path(folder, "x.npz"), {"x": np.ones(2)})
        ...     read_arrays(Path(folder, "x.npz"), ("x",))
        ({'x': array([1., 1.])}, ['x'])
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file."""
    with atomic_write(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        FileError: if it cannot be read.
    """
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def write_groups(
    path: Path, groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, Any]
) -> None:
    """Write xarray Datasets as the groups of a netCDF file, with ``attrs`` at its root.

    A checksum follows the content; other programs ignore it.
    """
    import xarray

    with atomic_write(path) as temporary:
        xarray.Dataset(attrs=dict(attrs)).to_netcdf(temporary, engine="h5netcdf")
        for name, dataset in groups.items():
            dataset.to_netcdf(temporary, mode="a", group=name, engine="h5netcdf")
        checksum = _checksum_of_begin(temporary, temporary.stat().st_size)
        with temporary.open("ab") as file:
            file.write(SEAL + checksum)


def read_groups(
    path: Path, names: Collection[str], draws: slice = slice(None)
) -> tuple[dict[str, Any], dict[str, xarray.Dataset]]:
    """Read the attributes and a slice of the draws of named groups of a :func:`write_groups` file.

    The other draws are never in memory. Groups that the file lacks are skipped.

    Raises:
        FileError: if there is no such file, if it is damaged, or if another program wrote it.
    """
    import h5netcdf
    import xarray

    with reading(path):
        size = path.stat().st_size - len(SEAL) - 64
        with path.open("rb") as file:
            file.seek(max(size, 0))
            seal = file.read()
        if size < 0 or not seal.startswith(SEAL):
            raise FileError(path, "the file must be a complete file written by pyroebm")
        if seal.removeprefix(SEAL) != _checksum_of_begin(path, size):
            raise FileError(path, "the file is damaged: its checksum does not match its content")
        with h5netcdf.File(path, "r") as root:
            attrs, found = dict(root.attrs), [name for name in names if name in root.groups]
        groups = {}
        for name in found:
            with xarray.open_dataset(path, group=name, engine="h5netcdf") as data:
                groups[name] = data.isel(draw=draws).load()
        return attrs, groups


def _checksum_of_begin(path: Path, size: int) -> bytes:
    """Return the checksum of the first ``size`` bytes of a file."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(CHUNK, size))):
            content.update(chunk)
            size -= len(chunk)
    return content.hexdigest().encode()


def write_netcdf(path: Path, data: Any) -> None:
    """Write an InferenceData or DataTree of ArviZ as a netCDF file."""
    with atomic_write(path) as temporary:
        data.to_netcdf(str(temporary))


def remove(path: Path) -> None:
    """Remove a file."""
    with _writing(path):
        path.unlink()


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure in the format given by the file's suffix."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
