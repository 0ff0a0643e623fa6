"""Files: what is written is there whole or not at all, and comes back as it was."""

from __future__ import annotations

import gzip
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xarray

from pyroebm.core import files
from pyroebm.core.files import FileError


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.atomic_write(path) as temporary:
            temporary.write_text("half")
            assert files.read_text(path) == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files.read_text(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_have_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with files.atomic_write(path, ".0") as mine, files.atomic_write(path, ".1") as theirs:
        assert mine != theirs
        mine.write_text("mine")
        theirs.write_text("theirs")
    assert files.read_text(path) == "mine"


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "é"]}, [], math.inf])
def test_json_comes_back(value: object, tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


def test_tensors_come_back_with_their_text(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).mT,
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, dtype=torch.float64),
    }
    files.write_tensors(tmp_path / "a", tensors, {"class": "é"})
    for found, text in (
        files.read_tensors(tmp_path / "a"),
        (files.from_bytes(files.to_bytes(tensors)), {"class": "é"}),
    ):
        assert text == {"class": "é"}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].dtype == tensors[name].dtype for name in tensors)


def check_refused(path: Path, content: bytes, said: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(FileError, match=said) as caught:
        files.read_tensors(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_a_flipped_bit_anywhere_and_a_cut_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_tensors(path, {"x": torch.ones(3), "y": torch.zeros(2, dtype=torch.int8)})
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        check_refused(path, bytes(flipped))
    for length in range(0, len(content), 7):
        check_refused(path, content[:length])
    check_refused(path, content + b"\0", "damaged")


def test_what_is_no_file_of_tensors_raises_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    # a header of 2^60 bytes, and of more than the file has
    check_refused(path, (2**60).to_bytes(8, "little") + b"{}", "a complete file written by pyroebm")
    check_refused(
        path, (90_000_000).to_bytes(8, "little") + b"{}", "a complete file written by pyroebm"
    )
    check_refused(
        path, safetensors.torch.save({"x": torch.ones(2)}), "a complete file written by pyroebm"
    )
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileError, match=r"no such file|cannot be read"):
            files.read_tensors(missing)


def test_the_error_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(FileError("a", "it is damaged")))
    assert isinstance(error, OSError | ValueError)
    assert (str(error), error.path, error.reason) == (
        "a: it is damaged",
        Path("a"),
        "it is damaged",
    )


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2) for name in "abcdef"}
    for name in ("one", "two"):
        files.write_tensors(tmp_path / name, tensors, {"class": "NICE", "more": [1, {"a": None}]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_arrays_are_those_asked_for_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.ones(2), z=np.array([{}], dtype=object))
    found, names = files.read_arrays(tmp_path / "a.npz", {"x", "none"})
    assert found.keys() == {"x"}
    assert found["x"].tolist() == [0, 1, 2]
    assert sorted(names) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="allow_pickle"):
        files.read_arrays(tmp_path / "a.npz", {"z"})
    np.save(tmp_path / "b.npy", np.arange(3))
    with pytest.raises(ValueError, match="one array"):
        files.read_arrays(tmp_path / "b.npy", {"x"})


def test_bytes_are_unzipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"draws"))
    (tmp_path / "a").write_bytes(b"draws")
    assert files.read_bytes(tmp_path / "a.gz") == files.read_bytes(tmp_path / "a") == b"draws"


def test_groups_come_back_thinned(tmp_path: Path) -> None:
    draws = xarray.Dataset({"x": (("chain", "draw"), np.arange(12.0).reshape(2, 6))})
    files.write_groups(tmp_path / "a.nc", {"posterior": draws}, {"seed": 3})
    found = files.read_group(tmp_path / "a.nc", "posterior", slice(1, None, 2))
    assert found["x"].values.tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]
    with pytest.raises(OSError, match="warmup"):
        files.read_group(tmp_path / "a.nc", "warmup")


def test_lines_are_added(tmp_path: Path) -> None:
    for line in ("1", "2"):
        files.append_line(tmp_path / "log", line)
    assert files.read_text(tmp_path / "log") == "1\n2\n"


def test_a_figure_is_written_in_the_format_of_its_name(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    files.write_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1
