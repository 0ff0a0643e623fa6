"""Runs in a folder: draws in netCDF parts, written atomically, and states of the chain batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.files import (
    read_group,
    read_json,
    read_tensors,
    remove,
    write_groups,
    write_json,
    write_tensors,
)
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
    atomically: to a temporary file, then renamed.

    Args:
        folder: the folder; created if it does not exist.
        named: function from draws in unconstrained coordinates to the variables of the results.
    """

    def __init__(self, folder: str | Path, named: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.folder, self.named = Path(folder), named
        run_file = self.folder / RUN_FILE
        #: of the run, written to each file
        self.attributes: dict[str, Any] = read_json(run_file) if run_file.exists() else {}

    def begin(self, layout: Layout, attributes: dict[str, Any]) -> None:
        """Prepare the folder for a run; other ranks may do the same for theirs.

        Args:
            layout: division of the chains.
            attributes: attributes of the run, written to every file.

        Raises:
            ValueError: if it already holds these chain batches, or those of another run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self._state(batch).exists() for batch in layout.batches) or self.attributes not in (
            {},
            attributes,
        ):
            raise ValueError(
                f"store={str(self.folder)!r} holds a run already: continue it with resume(energy,"
                " store=...), or pass a new folder"
            )
        self.attributes = attributes
        # Other ranks may write the same file.
        write_json(self.folder / RUN_FILE, attributes, by=f".{layout.ranks[0]}")

    def parts(self, batch: int, first_chain: int) -> tuple[Part, Part]:
        """Return the parts of a chain batch: that of its warm-up and that of its draws."""
        warmup, draws = (Part(self, batch, first_chain, phase) for phase in PHASES)
        return warmup, draws

    def save(self, batch: int, state: dict[str, Tensor]) -> None:
        """Write the state of a chain batch."""
        write_tensors(self._state(batch), state)

    def load(self, batch: int) -> dict[str, Tensor]:
        """Read the state of a chain batch; raise ValueError if there is none."""
        if not self._state(batch).exists():
            raise ValueError(
                f"store={str(self.folder)!r} holds no state of chain batch {batch}: start a run"
                " with run(energy, store=...)"
            )
        return read_tensors(self._state(batch))[0]

    def _state(self, batch: int) -> Path:
        return self.folder / f"batch{batch:05}.safetensors"


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
        path = self.store.folder / f"batch{self.batch:05}-{self.phase}-{start:09}.nc"
        datasets = {name: _dataset(variables, chains, draws) for name, variables in groups.items()}
        write_groups(path, datasets, self.store.attributes)

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the unconstrained draws and their statistics."""
        files = _files(self.store.folder, self.batch, self.phase)
        raw = _group("unconstrained_posterior", self.phase)
        x = _joined(files, raw)
        (draws,) = (
            _joined(files, _group("posterior", self.phase)) if x is None else x
        ).data_vars.values()
        stats = _joined(files, _group("sample_stats", self.phase))
        return torch.from_numpy(draws.values), {
            str(k): torch.from_numpy(v.values) for k, v in stats.data_vars.items()
        }

    def cut(self, num_draws: int) -> None:
        """Remove the files of the draws after the first ``num_draws``.

        They were written after the state that is resumed.
        """
        for start, path in _files(self.store.folder, self.batch, self.phase):
            if start >= num_draws:
                remove(path)


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
        ValueError: if the folder holds no run, or no draws of a chain batch.

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
        raise ValueError(
            f"folder={str(folder)!r} holds no run: write one with MCMC.run(energy, store=folder)"
        )
    attributes = read_json(folder / RUN_FILE)
    batches = Layout(attributes["num_chains"], attributes["chain_batch_size"]).batches
    groups = {}
    for phase in PHASES:
        files = [_files(folder, batch, phase) for batch in batches]
        if phase == "draws" and not all(files):
            missing = [batch for batch, found in zip(batches, files, strict=True) if not found]
            raise ValueError(
                f"folder={str(folder)!r} must have draws of chain batches 0 to {len(batches) - 1},"
                f" got none of {missing}; finish the run with MCMC.resume(energy, store=folder)"
            )
        for name in ("posterior", "sample_stats", "unconstrained_posterior"):
            parts = [_joined(found, _group(name, phase), thinning) for found in files]
            if all(part is not None for part in parts):
                common = min(part.sizes["draw"] for part in parts)
                groups[_group(name, phase)] = _concat(
                    [part.isel(draw=slice(common)) for part in parts], "chain"
                )
    return from_datasets(groups, attributes)


def _group(name: str, phase: str) -> str:
    return f"warmup_{name}" if phase == "warmup" else name


def _files(folder: Path, batch: int, phase: str) -> list[tuple[int, Path]]:
    return sorted(
        (int(path.stem.rpartition("-")[2]), path)
        for path in folder.glob(f"batch{batch:05}-{phase}-*.nc")
    )


def _joined(files: list[tuple[int, Path]], group: str, thinning: int = 1) -> Any:
    """Concatenate a group of all files to one dataset in memory, or return None if there is none.

    Files are read lazily, so draws removed by thinning are never loaded.
    """
    found = []
    for start, path in files:
        try:
            found.append(
                read_group(path, group, slice((thinning - 1 - start) % thinning, None, thinning))
            )
        except OSError as error:  # no such group
            if "unconstrained" in group:  # written only if it differs from the variables
                return None
            raise ValueError(
                f"{path} cannot be read, or lacks the group {group!r}: it is not a part of a run"
                " written by this library"
            ) from error
    return _concat(found, "draw") if found else None


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
