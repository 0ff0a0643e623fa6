"""Damaged files of every kind: a FileError, or the same content; little memory and little time.

The short form damages each file 60 times, the slow one 1,000 times.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyroebm import MALA, MCMC, load, open_run, save
from pyroebm.core import FileError
from pyroebm.core.files import MAX_HEADER, write_settings
from pyroebm.data import load_binary, read_idx
from pyroebm.energies import BernoulliRBM
from pyroebm.flows import RealNVP
from pyroebm.mcmc import sampler as driver
from pyroebm.objectives import PersistentCD
from pyroebm.targets import DoubleWell
from pyroebm.training import Trainer, read_log

BITS = torch.eye(8)
#: Bytes of memory above the start, and seconds of the processor, for reading a damaged file.
MEMORY, SECONDS = 200 * 2**20, 2.0


def digest(*arrays: Any) -> str:
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes() + str(np.shape(array)).encode())
    return content.hexdigest()


def trained(folder: Path, resume: bool) -> str:
    options: dict[str, Any] = {"checkpoint": folder / "run.safetensors", "log": folder / "log"}
    rbm = BernoulliRBM(8, 4, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(rbm, PersistentCD(6), BITS, num_steps=4, resume=resume, **options)
    try:
        for _ in trainer.steps():
            pass
        return digest(*(value.numpy() for value in rbm.state_dict().values()))
    finally:
        trainer.close()


def sampler() -> MCMC:
    settings: dict[str, Any] = {"num_chains": 4, "chain_batch_size": 2, "progress": False}
    return MCMC(MALA(0.5), 6, 0, seed=0, adaptation=None, **settings)


def sampled(folder: Path) -> str:
    data = open_run(folder)
    assert data.posterior.attrs is not None
    return digest(data.posterior["x"].values, data.sample_stats["lp"].values)


def resumed(folder: Path) -> str:
    mcmc = sampler()
    mcmc.resume(DoubleWell(), folder)
    return digest(mcmc.get_samples()["x"].numpy())


def images(folder: Path) -> str:
    data = load_binary(folder / "images.npz", None)
    return digest(*(part.numpy() for part in data[:4]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One intact file of each kind."""
    folder = tmp_path_factory.mktemp("intact")
    save(RealNVP(2, 2, (4,), generator=torch.Generator().manual_seed(0)), folder / "net")
    trained(folder, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
        sampler().run(DoubleWell(), store=folder / "store")
    generator = np.random.default_rng(0)
    gray = generator.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 3
    arrays = {"x_train": gray, "x_test": gray, "y_train": labels, "y_test": labels}
    np.savez_compressed(folder / "images.npz", **arrays)
    content = bytes([0, 0, 8, 3, 0, 0, 0, 40, 0, 0, 0, 8, 0, 0, 0, 8]) + gray.tobytes()
    (folder / "idx.gz").write_bytes(gzip.compress(content))
    (folder / "idx").write_bytes(content)
    return folder


#: The file of each kind, and a function that reads it.
KINDS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "saved model": ("net", lambda f: digest(*load(f / "net").state_dict().values())),
    "checkpoint": ("run.safetensors", lambda f: trained(f, True)),
    "run.json": ("store/run.json", lambda f: sampled(f / "store")),
    "state": ("store/batch00001.safetensors", lambda f: resumed(f / "store")),
    "state in open_run": ("store/batch00001.safetensors", lambda f: sampled(f / "store")),
    "part": ("store/batch00001-draws-000000002.nc", lambda f: sampled(f / "store")),
    "npz": ("images.npz", images),
    "idx.gz": ("idx.gz", lambda f: digest(read_idx(f / "idx.gz"))),
}
#: Files of others without a checksum: an error, or any content.
UNCHECKED: dict[str, tuple[str, Callable[[Path], str]]] = {
    "idx": ("idx", lambda f: digest(read_idx(f / "idx"))),
    "log": ("log", lambda f: json.dumps(read_log(f / "log"))),
}


def damages(content: bytes, others: list[bytes], number: int) -> Iterator[bytes]:
    """Files cut, with flipped bits, huge numbers, other bytes; and files of other kinds."""
    generator = np.random.default_rng(1)
    for k in range(number):
        way, place = k % 6, int(generator.integers(len(content)))
        if way == 0:
            yield content[:place]
            continue
        if way == 5:
            other = others[int(generator.integers(len(others)))]
            yield other if k % 4 else other[:place] + content[place:]
            continue
        wrong = bytearray(content)
        if way in (1, 2):
            for at in generator.integers(len(content), size=1 if way == 1 else 8):
                wrong[at] ^= 1 << int(generator.integers(8))
        elif way == 3:  # a number in the header, of 4 or 8 bytes
            at = int(generator.integers(min(len(content), 512)))
            huge = [b"\xff" * 4, b"\xff" * 8, (10**12).to_bytes(8, "little"), b"\x7f" + b"\xff" * 7]
            value = huge[int(generator.integers(4))]
            wrong[at : at + len(value)] = value
        else:
            length = int(generator.integers(1, 64))
            wrong[place : place + length] = generator.bytes(length)
        yield bytes(wrong)


def memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def check_damages(kind: str, folder: Path, number: int) -> None:
    name, read = (KINDS | UNCHECKED)[kind]
    files = {f: (folder / f).read_bytes() for f, _ in (KINDS | UNCHECKED).values()}
    path, content = folder / name, files.pop(name)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    truth, refused = read(folder), 0
    for damaged in damages(content, list(files.values()), number):
        path.write_bytes(damaged)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        begin, start = time.process_time(), memory("VmRSS")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = read(folder)
        except FileError as error:
            found = "" if error.path.is_relative_to(folder) and error.reason else "unnamed"
            refused += 1
        assert kind in UNCHECKED or found in ("", truth)
        assert time.process_time() - begin < SECONDS
        assert memory("VmHWM") - start < MEMORY
        for changed, kept in before.items():  # what reading a state that is intact removes
            if changed != path and (not changed.exists() or changed.read_bytes() != kept):
                changed.write_bytes(kept)
    path.write_bytes(content)
    assert read(folder) == truth
    assert refused >= number // 3


@pytest.mark.parametrize("kind", [*KINDS, *UNCHECKED])
def test_a_damaged_file_is_refused_or_read_as_it_was(kind: str, folder: Path) -> None:
    check_damages(kind, folder, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *UNCHECKED])
def test_a_thousand_damaged_files(kind: str, folder: Path) -> None:
    check_damages(kind, folder, 1000)


def huge_npz(shape: str, dtype: str = "<f8") -> bytes:
    """An archive whose only array says that it has another shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (117 - len(header)) + "\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "x_test", "y_train", "y_test"):
            archive.writestr(f"{name}.npy", npy)
    return file.getvalue()


def bomb() -> bytes:
    """An IDX file that says, truly, that it has 3 GB of zeros; the first 64 MiB are there."""
    start = bytes([0, 0, 8, 1]) + (3 * 10**9).to_bytes(4, "big")
    return gzip.compress(start + bytes(2**26))


CRAFTED: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "npz of 8e12 bytes": ("a.npz", huge_npz("(1000000000000,)"), load_binary),
    "npz of huge rows": ("a.npz", huge_npz("(2,)", "|S1000000000"), load_binary),
    "npz of nothing": ("a.npz", huge_npz("(10000000000, 0)"), load_binary),
    "npz of a negative shape": ("a.npz", huge_npz("(-2, -1)"), load_binary),
    "bomb": ("a.gz", bomb(), read_idx),
    "many dimensions": ("a", bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"a", read_idx),
    "header": ("a", (MAX_HEADER - 1).to_bytes(8, "little") + b"{}", load),
    "deep JSON": ("run.json", b"[" * 10**6, lambda path: open_run(path.parent)),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_what_a_file_may_ask_for_is_bounded(name: str, tmp_path: Path) -> None:
    file, content, read = CRAFTED[name]
    (tmp_path / file).write_bytes(content)
    said = "at most 67108864 bytes when decompressed" if name == "bomb" else "."
    check_bounded(lambda: read(tmp_path / file), said)


def check_bounded(read: Callable[[], Any], said: str = ".") -> None:
    Path("/proc/self/clear_refs").write_text("5")
    begin, start = time.process_time(), memory("VmRSS")
    with pytest.raises(FileError, match=said):
        read()
    assert time.process_time() - begin < SECONDS
    assert memory("VmHWM") - start < MEMORY


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_chains", 10**12),
        ("num_chains", 10**400),
        ("num_chains", -3),
        ("num_chains", 1e308),
        ("num_chains", "many"),
        ("num_chains", None),
        ("chain_batch_size", 0),
        ("chain_batch_size", 1),
    ],
)
def test_numbers_of_chains_in_a_file_are_bounded(key: str, value: Any, tmp_path: Path) -> None:
    sampler().run(DoubleWell(), store=tmp_path)
    settings = {"kernel": "MALA", "seed": "0", "num_chains": 4, "chain_batch_size": 2}
    write_settings(tmp_path / "run.json", settings | {key: value})
    check_bounded(lambda: open_run(tmp_path))
