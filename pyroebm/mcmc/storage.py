"""Runs in a folder: draws in netCDF parts, written atomically, and states of the chain batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.files import (
    FileError,
    Lock,
    read_groups,
    read_settings,
    read_tensors,
    reading,
    remove,
    write_groups,
    write_settings,
    write_tensors,
)
from pyroebm.core.serialization import from_text
from pyroebm.diagnostics.arviz_data import from_datasets
from pyroebm.mcmc.chains import Layout

if TYPE_CHECKING:  # the import takes half a second and is only needed with files
    import xarray

__all__ = ["Part", "Store", "open_run"]

PHASES = ("warmup", "draws")
RUN_FILE = "run.json"


class Store:
    """Folder with the draws of a run and the states of its chain batches.

    Parts are ``batch00000-draws-000000500.nc``: number of the chain batch, phase, number of the
    first draw. Each is a netCDF file with ArviZ's groups; :func:`open_run` opens all as one.
    ``batch00000.safetensors`` is the state of the batch after its last part. Every file is written
    atomically: to a temporary file, then renamed. While a process runs a chain batch, it holds the
    lock ``batch00000.lock``.

    Args:
        folder: the folder; created if it does not exist.
        named: function from draws in unconstrained coordinates to the variables of the results.
    """

    def __init__(self, folder: str | Path, named: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.folder, self.named = Path(folder), named
        #: of the run, written to each file
        self.attributes: dict[str, Any] = {}
        #: What identifies the state of each batch that this process wrote or read last.
        self._known: dict[int, tuple[int, ...]] = {}

    @contextlib.contextmanager
    def start(self, layout: Layout, attributes: dict[str, Any]) -> Iterator[None]:
        """Prepare the folder for a run, and lock it in this context.

        Other ranks may do the same for their batches. A run that was killed before the first
        states of its batches were written is started anew.

        Args:
            layout: division of the chains.
            attributes: attributes of the run, written to every file.

        Raises:
            FileError: if it already holds these chain batches, or those of another run; if another
                process runs them; or if the folder cannot be written.
        """
        with self._locked(layout.batches):
            own = [self._files_of(batch) for batch in layout.batches]
            started = all(self._state(batch).exists() for batch in layout.batches)
            if started or any(path.suffix == ".nc" for path in itertools.chain(*own)):
                self._refuse_to_start()
            run_file = self.folder / RUN_FILE
            if run_file.exists() and self._others(layout) and read_settings(run_file) != attributes:
                self._refuse_to_start()
            for path in itertools.chain(*own):
                remove(path)
            self.attributes = attributes
            write_settings(run_file, attributes)
            yield

    @contextlib.contextmanager
    def resume(self, layout: Layout) -> Iterator[None]:
        """Lock the folder, to continue the run that it holds.

        Raises:
            FileError: if it holds no run or not the states of these batches; if another process
                runs them, or has continued them since this object wrote or read them.
        """
        if not (self.folder / RUN_FILE).exists():
            raise FileError(
                self.folder, "it holds no run: start one with MCMC.run(energy, store=folder)"
            )
        with self._locked(layout.batches):
            self.attributes = read_settings(self.folder / RUN_FILE)
            missing = [b for b in layout.batches if not self._state(b).exists()]
            if missing and not any(
                path.suffix == ".nc" for batch in layout.batches for path in self._files_of(batch)
            ):
                raise FileError(
                    self.folder,
                    f"it holds no state of chain batch {missing[0]}: the run ended before its first"
                    " states were written; start it with run(energy, store=folder)",
                )
            for batch, known in self._known.items():
                if _identity(self._state(batch)) != known:
                    raise FileError(
                        self._state(batch),
                        "another process continued this run: continue that one with"
                        " resume(energy, store=folder)",
                    )
            yield

    @contextlib.contextmanager
    def _locked(self, batches: range) -> Iterator[None]:
        with contextlib.ExitStack() as locks:
            for batch in batches:
                locks.enter_context(self._lock(batch))
                for path in self._files_of(batch):
                    if path.suffix == ".part":  # of a process that was killed
                        remove(path)
            yield

    def _lock(self, batch: int) -> Lock:
        return Lock(self.folder / f"{_name(batch)}.lock", self.folder)

    def _files_of(self, batch: int) -> list[Path]:
        """Return the files of a batch, without its lock."""
        found = self.folder.glob(f"{_name(batch)}[-.]*")
        return [path for path in found if path.suffix != ".lock"]

    def _others(self, layout: Layout) -> bool:
        """Whether the folder has states of other batches, or another process runs such."""
        states, locks = self.folder.glob("batch*.safetensors"), self.folder.glob("batch*.lock")
        own = {self._state(batch) for batch in layout.batches}
        return any(path not in own for path in states) or any(
            Lock(path, self.folder).held_elsewhere for path in locks
        )

    def _refuse_to_start(self) -> None:
        raise FileError(
            self.folder,
            "store holds a run already: continue it with resume(energy, store=...), that of"
            " pyroebm.infer.MCMC with resume(...) and the arguments of the model, or pass a new"
            " folder",
        )

    def parts(self, batch: int, first_chain: int) -> tuple[Part, Part]:
        """Return the parts of a chain batch: that of its warm-up and that of its draws."""
        warmup, draws = (Part(self, batch, first_chain, phase) for phase in PHASES)
        return warmup, draws

    def save(self, batch: int, state: dict[str, Tensor]) -> None:
        """Write the state of a chain batch."""
        write_tensors(self._state(batch), state, self._place(batch))
        self._known[batch] = _identity(self._state(batch))

    def load(self, batch: int) -> dict[str, Tensor]:
        """Read the state of a chain batch.

        Raises:
            FileError: if there is none, or it is damaged or that of another batch or run.
        """
        path = self._state(batch)
        state, place = read_tensors(path)
        if place != self._place(batch):
            raise FileError(path, f"it must be the state of {self._place(batch)}, got {place}")
        self._known[batch] = _identity(path)
        return state

    def _place(self, batch: int) -> dict[str, Any]:
        return {"seed": self.attributes["seed"], "batch": batch}

    def _state(self, batch: int) -> Path:
        return self.folder / f"{_name(batch)}.safetensors"


class Part:
    """Draws of one chain batch in one phase, with one file per write.

    Args:
        store: the folder.
        batch: number of the chain batch.
        first_chain: number of its first chain in the run.
        phase: ``warmup`` or ``draws``.
    """

    def __init__(self, store: Store, batch: int, first_chain: int, phase: str) -> None:
        self.store = store
        self.batch = batch
        self.first_chain = first_chain
        self.phase = phase

    def write(self, start: int, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Write draws ``(chains, draws, *event)`` from number ``start`` on."""
        named = self.store.named(x)
        groups: dict[str, dict[str, Tensor]] = {
            _group("posterior", self.phase): named,
            _group("sample_stats", self.phase): stats,
        }
        # Unconstrained draws are written only if they differ from the variables.
        if not any(value is x for value in named.values()):
            groups[_group("unconstrained_posterior", self.phase)] = {"x": x}
        chains, draws = self.first_chain + np.arange(x.shape[0]), start + np.arange(x.shape[1])
        path = _part(self.store.folder, self.batch, self.phase, start)
        datasets = {name: _dataset(variables, chains, draws) for name, variables in groups.items()}
        place = {
            "batch": self.batch,
            "phase": self.phase,
            "start": start,
            "stop": start + len(draws),
        }
        write_groups(path, datasets, self.store.attributes | place)

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the unconstrained draws and their statistics.

        Raises:
            FileError: if a file is missing or damaged.
        """
        names = ("unconstrained_posterior", "posterior", "sample_stats")
        raw, named, stats = (_group(name, self.phase) for name in names)
        groups = self._joined((raw, named, stats), 0)
        (draws,) = groups[raw if raw in groups else named].data_vars.values()
        return torch.from_numpy(draws.values), {
            str(k): torch.from_numpy(v.values) for k, v in groups[stats].data_vars.items()
        }

    def cut(self, num_draws: int) -> None:
        """Remove the files of the draws after the first ``num_draws``.

        They were written after the state that is resumed.

        Raises:
            FileError: if a file of the other draws is missing or damaged.
        """
        for start, path in _files(self.store.folder, self.batch, self.phase):
            if start >= num_draws:
                remove(path)
        self._joined((), num_draws)

    def _joined(self, names: Collection[str], written: int) -> dict[str, Any]:
        attributes = self.store.attributes
        return _joined(self.store.folder, attributes, self.batch, self.phase, names, written)


def open_run(folder: str | Path, thinning: int = 1) -> Any:
    """Open the draws of a run in a folder, all parts of all chain batches and ranks as one.

    Chains are in order, each with the draws that all of them have. The run may still be in
    progress.

    Args:
        folder: the ``store`` of ``MCMC.run(energy, store=folder)``.
        thinning: read one of so many draws, for a run that does not fit in memory.

    Returns:
        ArviZ's InferenceData (DataTree from ArviZ 1.0 on).

    Raises:
        ValueError: if ``thinning`` is not a positive integer.
        FileError: if the folder holds no run or no draws of a chain batch, or if a file is missing
            or damaged.

    Example:
        >>> import tempfile
        >>> from pyroebm import MALA, MCMC, open_run
        >>> from pyroebm.targets import DoubleWell
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     MCMC(MALA(), num_samples=10, warmup_steps=10, num_chains=4, seed=0).run(
        ...         DoubleWell(), store=folder
        ...     )
        ...     open_run(folder).posterior["x"].shape
        (4, 10)
    """
    if not isinstance(thinning, int) or thinning < 1:
        raise ValueError(f"thinning must be an integer of at least 1, got thinning={thinning}")
    folder = Path(folder)
    if not (folder / RUN_FILE).exists():
        raise FileError(folder, "it holds no run: write one with MCMC.run(energy, store=folder)")
    with reading(folder / RUN_FILE):
        attributes = read_settings(folder / RUN_FILE)
        layout = Layout(attributes["num_chains"], attributes["chain_batch_size"])
        batches = layout.batches
    # the file may name any number of chains
    there = {path.name.partition("-")[0] for path in folder.glob("batch*-draws-*.nc")}
    missing = list(itertools.islice((b for b in batches if _name(b) not in there), 10))
    if missing:
        raise FileError(
            folder,
            f"it must have draws of chain batches 0 to {batches.stop - 1}, got none of {missing};"
            " finish the run with MCMC.resume(energy, store=folder)",
        )
    groups = {}
    for phase in PHASES:
        names = tuple(
            _group(name, phase) for name in ("posterior", "sample_stats", "unconstrained_posterior")
        )
        parts = []
        for batch in batches:
            # before the parts, of which a run in progress may write more
            written = _written(folder, batch, phase)
            parts.append(_joined(folder, attributes, batch, phase, names, written, thinning))
            chains = {data.sizes["chain"] for data in parts[-1].values()}
            if chains - {len(layout.chains(batch))}:
                count = len(layout.chains(batch))
                raise FileError(
                    folder, f"{_name(batch)} must have {count} chains by {RUN_FILE}, got {chains}"
                )
        for name in names:
            if all(name in found for found in parts):
                common = min(found[name].sizes["draw"] for found in parts)
                groups[name] = _concat(
                    [found[name].isel(draw=slice(common)) for found in parts], "chain"
                )
    return from_datasets(groups, attributes)


def _group(name: str, phase: str) -> str:
    return f"warmup_{name}" if phase == "warmup" else name


def _name(batch: int) -> str:
    return f"batch{batch:05}"


def _part(folder: Path, batch: int, phase: str, start: int) -> Path:
    return folder / f"{_name(batch)}-{phase}-{start:09}.nc"


def _files(folder: Path, batch: int, phase: str) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob(f"{_name(batch)}-{phase}-*.nc"):
        with reading(path):
            found.append((int(path.stem.rpartition("-")[2]), path))
    return sorted(found)


def _written(folder: Path, batch: int, phase: str) -> int:
    """Return the number of draws that were written before the state of a batch was."""
    path = folder / f"{_name(batch)}.safetensors"
    if not path.exists():
        return 0
    with reading(path):
        return int(from_text(read_tensors(path)[0]["metadata"])[f"{phase}_count"])


def _identity(path: Path) -> tuple[int, ...]:
    """Return numbers that change when a file is written again.

    Raises:
        FileError: if there is no such file.
    """
    with reading(path):
        stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _joined(
    folder: Path,
    attributes: Mapping[str, Any],
    batch: int,
    phase: str,
    names: Collection[str],
    written: int,
    thinning: int = 1,
) -> dict[str, Any]:
    """Read groups of all files of a chain batch in one phase, as one dataset for each group.

    Files are read lazily, so draws removed by thinning are never loaded.

    Raises:
        FileError: if a file is missing or damaged, or if there are fewer than ``written`` draws.
    """
    count, parts = 0, []
    for start, path in _files(folder, batch, phase):
        if start != count:
            raise FileError(
                _part(folder, batch, phase, count),
                f"there is no such file, and the next part is {path.name}",
            )
        draws = slice((thinning - 1 - start) % thinning, None, thinning)
        found, groups = read_groups(path, names, draws)
        with reading(path):
            place = {"seed": attributes["seed"], "batch": batch, "phase": phase, "start": start}
            count = int(found["stop"])
            if {key: found[key] for key in place} != place or count <= start:
                raise FileError(path, f"it must be the part {place}, got {dict(found)}")
        parts.append(groups)
    if count < written:
        raise FileError(
            _part(folder, batch, phase, count),
            f"there is no such file, and {_name(batch)}.safetensors is the state after {written}"
            " draws",
        )
    return {
        name: _concat([groups[name] for groups in parts], "draw")
        for name in names
        if parts and all(name in groups for groups in parts)
    }


def _concat(parts: list[Any], dim: str) -> Any:
    import xarray

    return xarray.concat(
        parts, dim, data_vars="all", coords="minimal", compat="override", join="override"
    )


def _dataset(variables: dict[str, Tensor], chains: np.ndarray, draws: np.ndarray) -> xarray.Dataset:
    import xarray

    shaped = {}
    for name, value in variables.items():
        dims = ("chain", "draw", *(f"{name}_dim_{i}" for i in range(value.dim() - 2)))
        shaped[name] = (dims, value.detach().cpu().numpy())
    return xarray.Dataset(shaped, coords={"chain": chains, "draw": draws})
