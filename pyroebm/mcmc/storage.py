"""A run in a folder: draws in netCDF parts, written whole or not at all, and what each block of
chains needs to go on.
"""

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

if TYPE_CHECKING:  # half a second that only runs with files wait for
    import xarray

__all__ = ["Part", "Store", "open_run"]

PHASES = ("warmup", "draws")
ABOUT = "run.json"


class Store:
    """A folder with the draws of a run and the states of its blocks.

    Parts are ``block00000-draws-000000500.nc``: which block, which phase, the number of the first
    draw in it. Each is a netCDF file with ArviZ's groups and opens alone; :func:`open_run` opens
    all as one. ``block00000.safetensors`` is where the block stood when its last part was written.
    Every file is written beside its place and moved there, so that a process killed at any moment
    leaves whole files only.

    Args:
        folder: the folder; made if it is not there.
        named: draws in unconstrained coordinates as the variables of the results.
    """

    def __init__(self, folder: str | Path, named: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.folder, self.named = Path(folder), named
        about = self.folder / ABOUT
        #: of the run, said in each file
        self.facts: dict[str, Any] = read_json(about) if about.exists() else {}

    def begin(self, layout: Layout, facts: dict[str, Any]) -> None:
        """Make the folder ready for a run; other ranks may be doing the same for theirs.

        Raises:
            ValueError: if it holds these blocks of a run already, or those of another run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self._state(block).exists() for block in layout.blocks) or self.facts not in (
            {},
            facts,
        ):
            raise ValueError(
                f"store={str(self.folder)!r} holds a run already: go on with resume(energy,"
                " store=...), or name a new folder"
            )
        self.facts = facts
        # other ranks may be writing the same
        write_json(self.folder / ABOUT, facts, by=f".{layout.ranks[0]}")

    def parts(self, block: int, first_chain: int) -> tuple[Part, Part]:
        """Where a block's draws go: those of its warm-up, and those after it."""
        warmup, draws = (Part(self, block, first_chain, phase) for phase in PHASES)
        return warmup, draws

    def save(self, block: int, state: dict[str, Tensor]) -> None:
        """Keep where a block stands."""
        write_tensors(self._state(block), state)

    def load(self, block: int) -> dict[str, Tensor]:
        """Where a block stood; ValueError if nothing was kept of it."""
        if not self._state(block).exists():
            raise ValueError(
                f"store={str(self.folder)!r} holds no state of block {block}: run(energy,"
                " store=...) begins a run there"
            )
        return read_tensors(self._state(block))[0]

    def _state(self, block: int) -> Path:
        return self.folder / f"block{block:05}.safetensors"


class Part:
    """The draws of one block in one phase, in as many files as there were moments of writing.

    Args:
        store: the folder.
        block: number of the block.
        first_chain: number of its first chain among those of the run.
        phase: ``warmup`` or ``draws``.
    """

    def __init__(self, store: Store, block: int, first_chain: int, phase: str) -> None:
        self.store = store
        self.block = block
        self.first_chain = first_chain
        self.phase = phase

    def write(self, start: int, x: Tensor, stats: dict[str, Tensor]) -> None:
        """Write draws ``(chains, draws, *event)`` from number ``start`` on."""
        named = self.store.named(x)
        groups: dict[str, dict[str, Tensor]] = {
            _group("posterior", self.phase): named,
            _group("sample_stats", self.phase): stats,
        }
        # what the kernel saw; the same draws where nothing is transformed
        if not any(value is x for value in named.values()):
            groups[_group("unconstrained_posterior", self.phase)] = {"x": x}
        chains, draws = self.first_chain + np.arange(x.shape[0]), start + np.arange(x.shape[1])
        path = self.store.folder / f"block{self.block:05}-{self.phase}-{start:09}.nc"
        datasets = {name: _dataset(variables, chains, draws) for name, variables in groups.items()}
        write_groups(path, datasets, self.store.facts)

    def read(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The draws that the kernel saw, and their statistics."""
        files = _files(self.store.folder, self.block, self.phase)
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
        """Remove the files of the draws after the first ``num_draws``: they were written after the
        state that is gone on from.
        """
        for start, path in _files(self.store.folder, self.block, self.phase):
            if start >= num_draws:
                remove(path)


def open_run(folder: str | Path, thinning: int = 1) -> Any:
    """The draws of a run that streamed to a folder, parts of all blocks and ranks as one, as
    ArviZ's InferenceData or DataTree.

    Chains are in order, each with the draws that all of them have. It can be called while the run
    is going on.

    Args:
        folder: what was given to ``MCMC.run(energy, store=folder)``.
        thinning: read one draw in so many: a run larger than memory can be looked at.

    Raises:
        ValueError: if the folder holds no draws, or none of some block.

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
    if not (folder / ABOUT).exists():
        raise ValueError(
            f"folder={str(folder)!r} holds no run: MCMC.run(energy, store=folder) writes one"
        )
    facts = read_json(folder / ABOUT)
    blocks = Layout(facts["num_chains"], facts["chain_batch_size"]).blocks
    groups = {}
    for phase in PHASES:
        files = [_files(folder, block, phase) for block in blocks]
        if phase == "draws" and not all(files):
            missing = [block for block, found in zip(blocks, files, strict=True) if not found]
            raise ValueError(
                f"folder={str(folder)!r} must have draws of blocks 0 to {len(blocks) - 1}, got"
                f" none of {missing}"
            )
        for name in ("posterior", "sample_stats", "unconstrained_posterior"):
            parts = [_joined(found, _group(name, phase), thinning) for found in files]
            if all(part is not None for part in parts):
                common = min(part.sizes["draw"] for part in parts)
                groups[_group(name, phase)] = _concat(
                    [part.isel(draw=slice(common)) for part in parts], "chain"
                )
    return from_datasets(groups, facts)


def _group(name: str, phase: str) -> str:
    return f"warmup_{name}" if phase == "warmup" else name


def _files(folder: Path, block: int, phase: str) -> list[tuple[int, Path]]:
    return sorted(
        (int(path.stem.rpartition("-")[2]), path)
        for path in folder.glob(f"block{block:05}-{phase}-*.nc")
    )


def _joined(files: list[tuple[int, Path]], group: str, thinning: int = 1) -> Any:
    """A group of all files as one dataset in memory, or None where there is none. Each file is read
    lazily: what is thinned out is never in memory.
    """
    found = []
    for start, path in files:
        try:
            found.append(
                read_group(path, group, slice((thinning - 1 - start) % thinning, None, thinning))
            )
        except OSError as error:  # no such group
            if "unconstrained" in group:  # which is only there where it differs from what is shown
                return None
            raise ValueError(
                f"{path} cannot be read, or lacks the group {group!r}: no part of a run written by"
                " this library"
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
