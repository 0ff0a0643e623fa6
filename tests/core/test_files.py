"""Files: what is written is there whole or not at all, and comes back as it was."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xarray
from lib.scripts import ROOT

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
    with files.atomic_write(path) as mine, files.atomic_write(path) as theirs:
        assert mine != theirs
        mine.write_text("mine")
        theirs.write_text("theirs")
    assert files.read_text(path) == "mine"


def test_settings_come_back(tmp_path: Path) -> None:
    settings = {"a": [1, 2.5, None, "é"], "b": math.inf}
    files.write_settings(tmp_path / "a.json", settings)
    assert files.read_settings(tmp_path / "a.json") == settings


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
    for name in ("a", "a.gz"):
        assert files.read_bytes(tmp_path / name, lambda start: 5) == b"draws"
        for size, said in ((4, "got more"), (6, "got 5")):
            with pytest.raises(FileError, match=said):
                files.read_bytes(tmp_path / name, lambda start, size=size: size)


def test_groups_come_back_thinned(tmp_path: Path) -> None:
    draws = xarray.Dataset({"x": (("chain", "draw"), np.arange(12.0).reshape(2, 6))})
    files.write_groups(tmp_path / "a.nc", {"posterior": draws}, {"seed": 3})
    attrs, found = files.read_groups(tmp_path / "a.nc", ("posterior", "warmup"), slice(1, None, 2))
    assert found.keys() == {"posterior"}
    assert found["posterior"]["x"].values.tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]
    assert attrs == {"seed": 3}
    with xarray.open_dataset(tmp_path / "a.nc", group="posterior", engine="h5netcdf") as theirs:
        assert theirs.equals(draws)


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


# --------------------------------------------------------------------------------------------------
# Locks, and files that cannot be written


def lock_of(path: Path, **changed: object) -> files.Lock:
    """A lock file that names another holder."""
    holder = dataclasses.asdict(files._Holder.current()) | changed
    path.with_suffix(".lock").write_text(json.dumps(holder))
    return files.Lock(path.with_suffix(".lock"), path)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_its_holder_and_is_released(tmp_path: Path) -> None:
    lock = files.Lock(tmp_path / "deep" / "run.lock", tmp_path / "run")
    with lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
        assert not lock.held_elsewhere
    assert not lock.path.exists()
    lock.acquire()
    del lock  # an object that is deleted
    gc.collect()
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("changed", [{"pid": 0}, {"started": "1"}], ids=["dead", "number reused"])
def test_the_lock_of_a_process_that_has_ended_is_taken_over(
    changed: dict[str, object], tmp_path: Path
) -> None:
    if "pid" in changed:
        changed = {"pid": dead_process()}
    lock = lock_of(tmp_path / "run", **changed, time=time.time() - 7300.0)
    assert not lock.held_elsewhere
    with (
        pytest.warns(RuntimeWarning, match=r"by process \d+ .* took it 2 h ago"),
        lock,
    ):
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"host": "elsewhere", "pid": 3}, "in use by process 3 on elsewhere, since 5 min: wait"),
        ({"namespace": "pid:[1]", "pid": 4}, "in use by process 4 on .*, since 5 min: .*delete"),
        ({"pid": os.getppid()}, "in use by process"),
        (None, "in use by a process, since"),
    ],
)
def test_a_lock_that_may_be_held_is_not_taken_over(
    changed: dict[str, object] | None, said: str, tmp_path: Path
) -> None:
    """On another machine or in another container nothing is known of the process."""
    if changed is not None and changed == {"pid": os.getppid()}:
        changed = {**changed, "started": files._started(os.getppid())}
    lock = lock_of(tmp_path / "run", **(changed or {}), time=time.time() - 300.0)
    if changed is None:
        lock.path.write_text("")  # before its holder has written it
    content = lock.path.read_text()
    assert lock.held_elsewhere
    with pytest.raises(FileError, match=said) as caught:
        lock.acquire()
    assert caught.value.path == tmp_path / "run"
    assert lock.path.read_text() == content


def test_a_lock_is_of_one_object(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with (
        files.Lock(path, path),
        pytest.raises(FileError, match="in use by another object of this process"),
    ):
        files.Lock(path, path).acquire()
    assert not path.exists()


def test_the_lock_of_the_next_holder_is_not_released(tmp_path: Path) -> None:
    """Somebody deleted the lock file, and another process has taken the lock."""
    path = tmp_path / "run.lock"
    with files.Lock(path, path):
        path.unlink()
        lock_of(tmp_path / "run", host="elsewhere")
        content = path.read_text()
    assert path.read_text() == content


def test_a_fork_does_not_hold_the_locks_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with files.Lock(path, path) as lock:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            said = "taken"
            try:
                files.Lock(path, path).acquire()
            except FileError as error:
                said = f"{lock.held_elsewhere} {error}"
            os.write(writer, said.encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reader, 10_000).decode()
        os.close(reader)
        os.close(writer)
        assert f"True {path}: it is in use by process {os.getpid()} on " in said


def test_processes_that_take_one_lock_take_turns(tmp_path: Path) -> None:
    """Many take over the lock of a dead process at once: one holds it at a time."""
    lock_of(tmp_path / "run", pid=dead_process())
    script = """
        import sys, time, warnings
        from pathlib import Path
        from pyroebm.core.files import FileError, Lock
        warnings.simplefilter("ignore")
        folder, taken = Path(sys.argv[1]), 0
        print(flush=True)
        sys.stdin.readline()
        while taken < 20:
            try:
                with Lock(folder / "run.lock", folder / "run"):
                    with open(folder / "alone", "x"):
                        pass
                    (folder / "alone").unlink()
                    taken += 1
            except FileError:
                pass
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:  # all have imported
        process.stdout.readline()  # type: ignore[union-attr]
    for process in processes:
        process.communicate("go\n", timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_what_cannot_be_written_raises_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "folder", tmp_path / ("a" * 250)):
        with pytest.raises(FileError, match="cannot be written") as caught:
            files.check_writable(path)
        assert caught.value.path == path
        with pytest.raises(FileError, match="cannot be written"):
            files.write_tensors(path, {"x": torch.ones(1)})
    files.check_writable(tmp_path / "deep" / "er" / "a")
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_damaged_settings_are_found(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_settings(path, {"seed": 3, "kernel": "NUTS"})
    path.write_text(path.read_text().replace("3", "5", 1))
    with pytest.raises(FileError, match="its checksum does not match"):
        files.read_settings(path)
