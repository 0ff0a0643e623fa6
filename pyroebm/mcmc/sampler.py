"""MCMC driver: warm-up, sampling, results and diagnostics of many chains."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import select_samples
from torch import Tensor

from pyroebm import diagnostics
from pyroebm.core._checks import check_counts, stacklevel_of_user
from pyroebm.core.compilation import choose_compiled, is_compiled
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import fresh_seed, seeded_generator
from pyroebm.core.serialization import from_text, to_text
from pyroebm.core.statistics import embed_angles
from pyroebm.core.supports import to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.diagnostics.arviz_data import Coords, Dims
from pyroebm.diagnostics.convergence import Observables
from pyroebm.diagnostics.energy_probes import find_lost_mass
from pyroebm.diagnostics.pyro_model import model_groups
from pyroebm.diagnostics.streaming import StreamingMoments
from pyroebm.diagnostics.stuck import describe_stuck, stuck_chains
from pyroebm.kernels.adaptation.starts import draw_starts
from pyroebm.kernels.adaptation.windows import Adaptation, WindowAdaptation, resolve
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.mcmc.chains import (
    ChainBatch,
    Layout,
    Plan,
    Record,
    announce_size,
    bytes_per_draw,
    check_initial,
)
from pyroebm.mcmc.storage import Store

__all__ = ["MCMC"]


def _joined(states: list[Any]) -> Any:
    parts = ([getattr(state, name) for state in states] for name in states[0]._fields)
    return type(states[0])(
        *(torch.cat(part) if isinstance(part[0], Tensor) else _joined(part) for part in parts)
    )


def _mean_of(parts: list[Tensor]) -> float:
    return float(torch.cat([part.double().flatten() for part in parts]).mean())


@contextlib.contextmanager
def _threads(number: int) -> Iterator[Callable[..., Iterator[int]]]:
    """Yield a ``map`` over several threads; all threads are joined on exit, even after Ctrl-C."""
    if number == 1:
        yield map
        return
    inference = torch.is_inference_mode_enabled()  # a property of each thread

    def each(function: Callable[[ChainBatch], int], batches: list[ChainBatch]) -> Iterator[int]:
        def within(batch: ChainBatch) -> int:
            with torch.inference_mode(inference):
                return function(batch)

        return pool.map(within, batches)

    pool = ThreadPoolExecutor(number)
    try:
        yield each
    finally:
        again = True
        while again:
            try:
                pool.shutdown(wait=True, cancel_futures=True)
                again = False
            except KeyboardInterrupt:
                continue


def _check_names(sites: Mapping[str, Tensor], stored: bool) -> None:
    """Check that variables can be stored beside the dimensions of ArviZ's containers.

    Args:
        sites: values of the variables, shape ``(chains, *shape)``.
        stored: whether they are written to netCDF files.

    Raises:
        ValueError: if a name is that of a dimension, or a stored one has a slash.
    """
    dimensions = {"chain", "draw"} | {
        f"{name}_dim_{k}" for name, value in sites.items() for k in range(value.dim() - 1)
    }
    if taken := sorted(dimensions & set(sites)):
        raise ValueError(
            f"site {taken[0]!r} must not have the name of a dimension of ArviZ's containers, here"
            f" {sorted(dimensions)[:6]}: rename the site"
        )
    slashed = [name for name in sites if "/" in name]
    if stored and slashed:
        raise ValueError(
            f"site {slashed[0]!r} must not have a slash in a run with a store, since it separates"
            " groups in netCDF files: rename the site, or run without store"
        )


#: Number of starting states at which the edges of a support are examined.
NUM_PROBED = 3

#: Bytes of draws that a run with ``store`` holds in memory, over all chain batches.
BUFFER_BYTES = 2**28

#: Maximum number of steps of one turn of asynchronous chains.
MAX_TURN_STEPS = 1024

#: Seconds between writes of draws and states to the folder of a run.
CHECKPOINT_EVERY = 60.0


class MCMC(AbstractMCMC):
    """Sample an energy with many chains in one process.

    The chains are the batch axis of every tensor.
    Chains are divided into chain batches, each with its own random numbers and its own adaptation.
    With the same seed and ``chain_batch_size``, the draws of a batch depend neither on the number
    of other batches nor on the thread or process that runs it.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        num_samples: number of draws of each chain.
        warmup_steps: number of warm-up steps, in which step size and metric are adapted.
        num_chains: number of chains.
        seed: seed of all randomness of the run; None draws one. It is recorded in ``.seed``. No
            global generator is used.
        thinning: number of steps from one kept draw to the next; divergences and gradient counts of
            the steps between are included.
        compile: whether to compile the gradient (for :class:`NUTS`) or the kernel's inner loops
            (for others): True, False, or "auto", which compiles if the planned steps of one batch
            save the time of compilation. Compiling a gradient takes seconds, once for a model on
            this machine; inner loops take half a minute. Draws are the same up to rounding.
            ``.compiled`` is the choice.
        adaptation: "default", the kernel's own adaptation or a
            :class:`pyroebm.kernels.WindowAdaptation`; an instance; None does not change the kernel.
        save_warmup: whether to keep the draws of the warm-up.
        keep: ``"draws"``, or ``"moments"``: means and variances of each chain instead of draws, see
            :meth:`get_moments`.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second. With several ranks the first shows it.
        chain_batch_size: number of chains of one batch. Larger batches share the overhead of a step
            and one adaptation.
        num_threads: number of threads for the batches. The draws do not depend on it. Compiled
            gradients and :class:`NUTS` run concurrently in several threads; kernels and energies in
            Python do not.
        ranks: (number of this process, number of processes) that share the batches, as from
            :func:`pyroebm.training.ranks`. Results in memory are those of this process's chains.

    Attributes:
        interrupted: True if Ctrl-C ended the run early; the draws made are kept. If batches have
            different numbers of draws, results are of the draws that all have.

    Raises:
        ValueError: if a count is too small or an argument has the wrong kind.

    Example:
        >>> from pyroebm import MCMC, NUTS
        >>> from pyroebm.targets import DoubleWell
        >>> mcmc = MCMC(NUTS(), num_samples=100, warmup_steps=100, num_chains=16, seed=0)
        >>> mcmc.run(DoubleWell())
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([16, 100])
    """

    @property
    def _single_steps(self) -> bool:
        """Whether hooks run after each step instead of after several."""
        return False

    def __init__(
        self,
        kernel: Kernel[Any],
        num_samples: int = 1000,
        warmup_steps: int = 1000,
        num_chains: int = 4,
        *,
        seed: int | None = None,
        thinning: int = 1,
        adaptation: Adaptation | Literal["default"] | None = "default",
        compile: bool | Literal["auto"] = "auto",
        save_warmup: bool = True,
        keep: Literal["draws", "moments"] = "draws",
        progress: bool | None = None,
        chain_batch_size: int = 64,
        num_threads: int = 1,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        check_kernel(kernel)
        check_counts(
            {"num_samples": 1, "num_chains": 1, "thinning": 1}, num_samples, num_chains, thinning
        )
        check_counts(
            {"warmup_steps": 0, "chain_batch_size": 1, "num_threads": 1},
            warmup_steps,
            chain_batch_size,
            num_threads,
        )
        self.layout = Layout(num_chains, chain_batch_size, ranks)
        if ranks[1] > 1 and seed is None:
            raise ValueError(
                "seed must be given, the same for all, where several ranks share a run; got"
                " seed=None"
            )
        if keep not in ("draws", "moments"):
            raise ValueError(f'keep must be "draws" or "moments", got keep={keep!r}')
        self.plan = Plan(
            kernel,
            resolve(kernel, adaptation),
            warmup_steps,
            thinning,
            save_warmup and keep == "draws",
        )
        self.num_samples = num_samples
        self.num_chains = num_chains
        self._given_seed = seed
        self.seed = fresh_seed(seed)
        self.keep = keep
        self.progress = progress
        self.transforms = {}
        self.compile = compile
        self.num_threads = num_threads
        self.interrupted = False
        self._goal = 0
        self._stopped = False  # while compiling
        self._batches: list[ChainBatch] = []
        self._store: Store | None = None

    @property
    def kernel(self) -> Kernel[Any]:
        """The kernel as adapted by the first chain batch; before a run the kernel given."""
        return self._batches[0].kernel if self._batches else self.plan.kernel

    @property
    def kernels(self) -> list[Kernel[Any]]:
        """The kernel of each chain batch, as adapted."""
        return [batch.kernel for batch in self._batches]

    @property
    def compiled(self) -> bool | None:
        """Whether the last run was compiled; None before the first."""
        return is_compiled(self._batches[0].moving) if self._batches else None

    def run(
        self,
        energy: Energy,
        initial: Tensor | np.ndarray | None = None,
        *,
        store: str | Path | None = None,
    ) -> None:
        """Run the warm-up and draw samples.

        Args:
            energy: the energy to sample; a constrained support is sampled in unconstrained
                coordinates, a discrete one directly.
            initial: starting states ``(num_chains, *event)`` in the energy's own (constrained)
                space; None draws them with ``energy.initial``, for gradient kernels again, up to
                50 times, until a trial step is accepted.
            store: a folder to stream the draws to, for runs that do not fit in memory or may be
                interrupted: :func:`pyroebm.open_run` opens it, :meth:`resume` continues it. Draws
                and states are written every minute. None keeps the draws in memory.

        Raises:
            ValueError: if ``energy`` is not an Energy or the kernel does not move on its support,
                or if ``initial`` does not fit it or holds a state of non-finite energy.
            FileError: if ``store`` already holds a run, is in use by another process, or cannot be
                written.
        """
        target = self._target_of(energy)
        zeros = torch.zeros((1, *target.event_shape), dtype=target.dtype, device=target.device)
        _check_names(target.named(zeros), store is not None)
        folder = None if store is None else Store(store, target.named)
        # before the work, so that a folder that cannot be used is known at once
        with folder.start(self.layout, self._attributes()) if folder else contextlib.nullcontext():
            self._run(energy, target, initial, folder)

    def _run(
        self,
        energy: Energy,
        target: Energy,
        initial: Tensor | np.ndarray | None,
        folder: Store | None,
    ) -> None:
        if self.plan.kernel.runs_ahead(target):
            self._compile_driver(target.dtype)
        with eval_mode(energy):
            if initial is not None:
                initial = check_initial(energy, initial, self.num_chains)
            batches = []
            for number in self.layout.batches:
                chains, generator = (
                    self.layout.chains(number),
                    seeded_generator(self.seed, energy.device, number),
                )
                if initial is None:
                    adapts = self.plan.warmup_steps > 0 and self.plan.adaptation is not None
                    if isinstance(self.plan.adaptation, WindowAdaptation):
                        adapts = adapts and self.plan.adaptation.step_size is not None
                    x = draw_starts(self.plan.kernel, target, len(chains), generator, adapts)
                else:
                    x = to_support(energy.support).inv(initial[chains.start : chains.stop])
                batches.append(self._new_batch(number, target, x, generator, folder))
            if batches:
                self._warn_of_edges(target, batches[0].state.x)
        self._compile(target, batches, self.num_samples)
        # Replace the previous run only now, so that an error above leaves it unchanged.
        self._target = target
        self._batches = batches
        self._store = folder
        self._advance(self.num_samples)

    def run_more(self, num_samples: int) -> None:
        """Continue the chains for ``num_samples`` more draws: the same as one longer run.

        Energies and gradients are recomputed first, so an energy that was trained in between is
        sampled with its current parameters.

        Args:
            num_samples: number of further draws of each chain.

        Raises:
            ValueError: if there is no run with a finished warm-up, or ``num_samples`` < 1.
        """
        if not self._batches or any(batch.warm_left for batch in self._batches):
            raise ValueError(
                "run_more continues a run that finished its warm-up: call run(energy) first, or"
                " resume()"
            )
        check_counts({"num_samples": 1}, num_samples)
        goal = min(batch.count for batch in self._batches) + num_samples
        with self._store.resume(self.layout) if self._store else contextlib.nullcontext():
            self._compile(self._target, self._batches, goal)
            with eval_mode(self._target):
                for batch in self._batches:
                    batch.refresh()
            self._advance(goal)

    def resume(
        self,
        energy: Energy | None = None,
        store: str | Path | None = None,
    ) -> None:
        """Finish an interrupted run, with the same draws as an uninterrupted one.

        They are the same bit for bit on one machine. The settings must be those of the run, except
        that a larger ``num_samples`` extends it. The seed is that of the run, which another
        seed that is given must not contradict.

        Args:
            energy: the energy of the run.
            store: the folder of the run. Without ``energy`` and ``store`` the run in memory is
                continued (after Ctrl-C or :meth:`load_state_dict`).

        Raises:
            ValueError: if there is no run to continue, or if the run in the folder has other
                settings, another seed than the one given, more draws or another energy.
            FileError: if a file of the run is missing or damaged, or another process uses it.
        """
        if (energy is None) != (store is None):
            raise ValueError(
                f"resume requires energy and store, or neither, got energy={energy} and"
                f" store={store!r}"
            )
        folder, target = self._store, None
        if energy is not None and store is not None:
            target = self._target_of(energy)
            folder = Store(store, target.named)
        with folder.resume(self.layout) if folder else contextlib.nullcontext():
            if folder is not None and target is not None:
                here = self._attributes()
                if self._given_seed is None:
                    del here["seed"]
                _check_same(folder.attributes, here, "in the folder")
                states = {number: folder.load(number) for number in self.layout.batches}
                self._load(
                    {f"{n}.{k}": v for n, state in states.items() for k, v in state.items()},
                    target,
                    folder,
                )
            if not self._batches:
                raise ValueError(
                    "there is nothing to resume: call run(energy) or load_state_dict(state, energy)"
                    " first"
                )
            if not self.compiled:
                self._compile(self._target, self._batches, self.num_samples)
            self._advance(max(self._goal, self.num_samples))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what :meth:`resume` and :meth:`run_more` need, and all draws, as tensors.

        safetensors can store them.

        Raises:
            ValueError: if there was no run.
        """
        if not self._batches:
            raise ValueError("there are no draws: call run(energy) first")
        states = {
            number: self._state_of(batch)
            for number, batch in zip(self.layout.batches, self._batches, strict=True)
        }
        return {
            f"{number}.{name}": value
            for number, state in states.items()
            for name, value in state.items()
        }

    def load_state_dict(self, state: dict[str, Tensor], energy: Energy) -> None:
        """Restore a saved run of the same settings, during or after its warm-up.

        Args:
            state: what :meth:`state_dict` returned.
            energy: the energy of the run.

        Raises:
            ValueError: if the state is of other settings (kernel, chains, thinning), or of another
                energy.
        """
        self._load(state, self._target_of(energy), None)

    def _load(self, state: dict[str, Tensor], target: Energy, store: Store | None) -> None:
        needed = {
            f"{n}.{name}"
            for n in self.layout.batches
            for name in ("settings", "metadata", "rng", "state.x", "state.energy")
        }
        if not needed <= set(state):
            raise ValueError(
                f"state must come from MCMC.state_dict(), with {sorted(needed)}, got keys"
                f" {sorted(state)}"
            )
        batches = []
        for number in self.layout.batches:
            own = {
                k.removeprefix(f"{number}."): v
                for k, v in state.items()
                if k.startswith(f"{number}.")
            }
            saved = from_text(own["settings"].cpu())
            seed, settings = saved.pop("seed"), self._settings(target, saved["warm_left"])
            _check_same(saved, settings, "in the state" if store is None else "in the folder")
            with eval_mode(target):
                x, generator = (
                    own["state.x"].to(target.device),
                    seeded_generator(self.seed, target.device),
                )
                batch = self._new_batch(number, target, x, generator, store)
                batch.load_state_dict(own)
                if store is not None and batch.count > self.num_samples:
                    raise ValueError(
                        f"num_samples must be at least {batch.count}, the number of draws of each"
                        f" chain in the folder, got num_samples={self.num_samples}; open_run(store)"
                        " reads draws without continuing the run"
                    )
                energies = batch.kernel.refresh(target, batch.state).energy
                # Compiled energies may differ by rounding.
                if not torch.allclose(energies, batch.state.energy, rtol=1e-4, atol=1e-4):
                    raise ValueError(
                        "state must be of the energy given: its energies differ from those saved"
                        " with the draws; pass the energy of the saved run"
                    )
            batches.append(batch)
        self._target = target
        self._batches = batches
        self._store = store
        self.seed = seed
        self._goal, self.interrupted = 0, False

    def _settings(self, target: Energy, warm_left: int) -> dict[str, Any]:
        return self.plan.settings(warm_left) | {
            "num_chains": self.num_chains,
            "chain_batch_size": len(self.layout.chains(0)),
            "keep": self.keep,
            "runs_ahead": self.plan.kernel.runs_ahead(target),
        }

    def _state_of(self, batch: ChainBatch, draws: bool = True) -> dict[str, Tensor]:
        settings = self._settings(batch.target, batch.warm_left) | {"seed": self.seed}
        return batch.state_dict(draws) | {"settings": to_text(settings)}

    def _target_of(self, energy: Energy) -> Energy:
        check_energy(energy)
        target = unconstrain(energy)
        self.plan.kernel.check_support(target)
        return target

    def _warn_of_edges(self, target: Energy, x: Tensor) -> None:
        """Warn before the run of mass that numbers of the energy's dtype cannot represent."""
        lost = find_lost_mass(target, x[:NUM_PROBED])
        if lost is not None:
            name = "float32" if x.dtype == torch.float32 else "float64"
            fix = "use float64, or sample" if x.dtype == torch.float32 else "sample"
            warnings.warn(
                f"site {lost.site!r}: {100.0 * lost.share:.2g} % of the mass is closer to an edge"
                f" of the support than numbers in {name} can be, because the density increases"
                f" there as for a concentration of {lost.concentration:.2g}; means will be biased:"
                f" {fix} the"
                " logarithm or logit of the variable, or choose a larger concentration",
                UserWarning,
                stacklevel=3,
            )

    def _compile(self, target: Energy, batches: list[ChainBatch], goal: int) -> None:
        """Choose the energy on which the kernels move: the target or its compiled view.

        The choice depends only on settings, not on this rank's batches or on the progress of the
        run.
        """
        chains, steps = (
            len(self.layout.chains(0)),
            self.plan.warmup_steps + goal * self.plan.thinning,
        )
        kernel = self.plan.kernel
        try:
            with eval_mode(target):
                sizes = [len(batch.state.x) for batch in batches]
                moving = choose_compiled(
                    target, self.compile, kernel, chains, steps, self._print, sizes
                )
        except KeyboardInterrupt:  # raised again, and reported, by _advance
            self._stopped = True
            return
        for batch in batches:
            batch.moving = moving

    def _compile_driver(self, dtype: torch.dtype) -> None:
        """Compile the driver of NUTS with numba; print a line if it takes longer than a second."""
        from pyroebm.kernels.nuts.driver import compile_for

        text = "compiling NUTS, about 4 s, once on this machine"
        timer = threading.Timer(1.0, self._print, [text])
        timer.daemon = True
        timer.start()
        try:
            compile_for(dtype)
        finally:
            timer.cancel()

    def _print(self, text: str) -> None:
        if self.progress is not False and self.layout.ranks[0] == 0:
            print(text, file=sys.stderr)

    def _new_batch(
        self,
        number: int,
        target: Energy,
        start: Tensor,
        generator: torch.Generator,
        store: Store | None,
    ) -> ChainBatch:
        if self.keep == "moments":
            return ChainBatch(
                self.plan,
                target,
                start,
                generator,
                named=lambda x: embed_angles(target.named(x), target.angles()),
            )
        if store is None:
            return ChainBatch(self.plan, target, start, generator)
        affordable = BUFFER_BYTES // (
            len(self.layout.batches) * len(start) * bytes_per_draw(target)
        )
        return ChainBatch(
            self.plan,
            target,
            start,
            generator,
            store.parts(number, self.layout.chains(number).start),
            max(1, affordable),
        )

    def _advance(self, goal: int) -> None:
        """Finish the warm-up, then draw until every chain has ``goal`` draws."""
        self.interrupted = False
        self._goal = goal
        phase = "compilation" if self._stopped else "warm-up"
        if self.keep == "draws":
            draws, chains = (
                goal + self.plan.warmup_steps * self.plan.save_warmup,
                sum(len(b.state.x) for b in self._batches),
            )
            announce_size(draws, chains, self._target, self._store is not None)
        stopped, self._stopped = self._stopped, False
        try:
            if stopped:
                raise KeyboardInterrupt
            with eval_mode(self._target):
                for batch in self._batches:
                    batch.reserve(goal)
                self._save()
                most = 1 if self._single_steps else MAX_TURN_STEPS
                self._take_turns(
                    "warm-up", lambda batch: batch.warm_up(most), lambda batch: batch.warm_left
                )
                phase = "sampling"
                self._take_turns(
                    "sample",
                    lambda batch: batch.draw(goal, most),
                    lambda batch: goal - batch.count,
                )
            self._warn_of_stuck_chains()
        except KeyboardInterrupt:
            self.interrupted = True
            kept = min(batch.count for batch in self._batches)
            warnings.warn(
                f"interrupted during {phase}: {kept} draws of each chain were kept",
                RuntimeWarning,
                stacklevel=stacklevel_of_user(),
            )
        finally:
            self._save()

    def _take_turns(
        self, label: str, step: Callable[[ChainBatch], int], left: Callable[[ChainBatch], int]
    ) -> None:
        """Run some steps of each chain batch in turn, so that an interrupt stops them together."""
        behind, turn = [batch for batch in self._batches if left(batch) > 0], 0
        show = self.progress if self.layout.ranks[0] == 0 else False
        total = sum(left(batch) * len(batch.state.x) for batch in behind)
        for batch in behind:
            batch.divergences = torch.zeros_like(batch.divergences)
        with (
            Progress(total, f"{label}, {self.num_chains} chains", "draw", show) as shown,
            _threads(self.num_threads) as each,
        ):
            shown.note(
                divergences=lambda: int(sum(batch.divergences for batch in self._batches)),
                acceptance=lambda: _mean_of(
                    [batch.info.acceptance_rate for batch in self._batches if batch.info]
                ),
            )
            while behind:
                for batch, number in zip(behind, each(step, behind), strict=True):
                    shown.update(number * len(batch.state.x))
                self._after_turn(label, turn)
                behind, turn = [batch for batch in behind if left(batch) > 0], turn + 1

    def _after_turn(self, label: str, turn: int) -> None:
        """Run between turns; a hook for subclasses.

        ``label`` is ``"warm-up"`` or ``"sample"``, and ``turn`` counts from 0 in each.
        """
        if time.monotonic() - self._saved >= CHECKPOINT_EVERY:
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._store is not None:
            for number, batch in zip(self.layout.batches, self._batches, strict=True):
                batch.warmup.flush()
                batch.record.flush()
                self._store.save(number, self._state_of(batch, draws=False))

    @property
    def state(self) -> Any:
        """Current states of all chains, as one state.

        Raises:
            ValueError: if there was no run.
        """
        if not self._batches:
            raise ValueError("there are no draws: call run(energy) first")
        return _joined([batch.state for batch in self._batches])

    def _records(self, warmup: bool = False) -> list[Record]:
        if not self._batches:
            raise ValueError("there are no draws: call run(energy) first")
        if self.keep == "moments":
            raise ValueError(
                'keep="moments" keeps no draws: get_moments() returns means, variances and R-hat'
            )
        if not warmup and min(batch.count for batch in self._batches) == 0:
            raise ValueError(
                "the run ended before its first draw (its warm-up is in get_samples(warmup=True)):"
                " call resume() or run(energy) again"
            )
        return [batch.warmup if warmup else batch.record for batch in self._batches]

    def _draws(self, warmup: bool = False) -> Tensor:
        records = self._records(warmup)
        common = min(record.count for record in records)
        return torch.cat([record.draws()[:, :common] for record in records])

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, warmup: bool = False
    ) -> dict[str, Tensor]:
        """Return draws in the energy's own space.

        Args:
            num_samples: number of draws, resampled with replacement by torch's default generator
                (as in Pyro); None returns all.
            group_by_chain: keep the chain axis: ``(chains, draws, *event)``, else ``(chains *
                draws, *event)``.
            warmup: return the draws of the warm-up instead.
        """
        draws = self._draws(warmup)
        samples: dict[str, Tensor] = select_samples(
            self._target.named(draws), num_samples, group_by_chain
        )
        return samples

    def get_stats(self, warmup: bool = False) -> dict[str, Tensor]:
        """Return statistics of each draw, ``(chains, draws)``.

        They are ``lp``, ``energy`` (the Hamiltonian), ``acceptance_rate`` and other fields of
        :class:`pyroebm.kernels.Info`.

        Args:
            warmup: return those of the warm-up instead.
        """
        records = self._records(warmup)
        common = min(record.count for record in records)
        stats = [record.stats() for record in records]
        return {name: torch.cat([each[name][:, :common] for each in stats]) for name in stats[0]}

    def get_moments(self) -> dict[str, StreamingMoments]:
        """Return means, variances, R-hat and nested R-hat of each variable and statistic.

        For runs with ``keep="moments"``. Those of an angle x are of ``cos(x)`` and ``sin(x)``.

        Raises:
            ValueError: if nothing was drawn, or if the run keeps its draws.
        """
        kept = [batch.moments for batch in self._batches]
        if not kept or not all(kept):
            raise ValueError(
                f'get_moments requires a run with keep="moments" that has draws, got'
                f" keep={self.keep!r}; use get_samples()"
            )
        return {name: StreamingMoments.joined([each[name] for each in kept]) for name in kept[0]}

    def to_arviz(
        self,
        *,
        log_likelihood: bool = False,
        prior: Mapping[str, Tensor] | None = None,
        posterior_predictive: Mapping[str, Tensor] | None = None,
        dims: Dims | None = None,
        coords: Coords | None = None,
    ) -> Any:
        """Convert draws and statistics, warm-up included, to ArviZ.

        For a Pyro model (:class:`pyroebm.ModelEnergy`) the container has also its deterministic
        sites, ``observed_data`` and ``constant_data``, and plates are named dimensions.

        Args:
            log_likelihood: whether to add the log-density of each observation of a Pyro model at
                each draw, for ``arviz.loo``.
            prior: draws from the prior, shape ``(n, *event)``, such as those of
                ``Predictive(model, num_samples=n)``. Sites that are not in the posterior are in
                ``prior_predictive``.
            posterior_predictive: draws from the posterior predictive distribution, shape ``(chains
                * draws, *event)``, such as those of ``Predictive(model, mcmc.get_samples())``.
            dims: names of the dimensions of variables, before those of plates.
            coords: labels along dimensions, also along plates.

        Returns:
            ArviZ's InferenceData (DataTree from ArviZ 1.0 on).

        Raises:
            ValueError: if nothing was drawn; if ``log_likelihood`` is asked for without a Pyro
                model; if draws, ``dims`` or ``coords`` do not fit.
        """
        warm = all(record.count for record in self._records(warmup=True))
        groups = model_groups(
            self._target,
            self.get_samples(group_by_chain=True),
            log_likelihood=log_likelihood,
            prior=prior,
            posterior_predictive=posterior_predictive,
            dims=dims,
        )
        return diagnostics.to_arviz(
            sample_stats=self.get_stats(),
            warmup_posterior=self.get_samples(group_by_chain=True, warmup=True) if warm else None,
            warmup_sample_stats=self.get_stats(warmup=True) if warm else None,
            coords=coords,
            attrs=self._attributes(),
            **groups,
        )

    def stuck_chains(self) -> list[int]:
        """Return the numbers of this process's chains that never moved after warm-up.

        See :func:`pyroebm.diagnostics.stuck_chains`.
        """
        if not self._batches:
            raise ValueError("there are no draws: call run(energy) first")
        moves, first = (
            torch.cat([batch.moves for batch in self._batches]),
            self.layout.chains(self.layout.batches[0]).start,
        )
        return [
            first + chain
            for chain in stuck_chains(moves, min(batch.count for batch in self._batches))
        ]

    def _warn_of_stuck_chains(self) -> None:
        energies, first = self.state.energy, self.layout.chains(self.layout.batches[0]).start
        stuck = [number - first for number in self.stuck_chains()]
        if message := describe_stuck(stuck, len(energies), energies, first, self.num_chains):
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel_of_user())

    def _attributes(self) -> dict[str, Any]:
        attributes = {
            "kernel": type(self.plan.kernel).__name__,
            "seed": str(self.seed),
            "thinning": self.plan.thinning,
        }
        return attributes | {
            "num_chains": self.num_chains,
            "chain_batch_size": len(self.layout.chains(0)),
        }

    def summary(self, **options: Any) -> Any:
        """Return ArviZ's summary table (a DataFrame) of the draws; warn of chains that never moved.

        Args:
            **options: passed to ``arviz.summary``.
        """
        self._warn_of_stuck_chains()
        draws = diagnostics.to_arviz(self.get_samples(group_by_chain=True))
        return diagnostics.summary(draws, **options)

    def diagnose(
        self,
        max_r_hat: float = 1.01,
        min_ess: float = 400.0,
        *,
        observables: Observables | None = None,
    ) -> diagnostics.Diagnosis:
        """Diagnose the draws; see :func:`pyroebm.diagnostics.diagnose`.

        Args:
            max_r_hat: threshold of R-hat.
            min_ess: threshold of the effective sample size.
            observables: functions of the samples, by name, that are diagnosed in place of the
                sites, as in the example. A function takes the
                dictionary that ``get_samples(group_by_chain=True)`` returns, and returns values of
                shape ``(chains, draws, ...)``.

        Raises:
            ValueError: if ``observables`` is no dictionary, or a function does not fit.

        Example:
            >>> from pyroebm import MCMC, NUTS
            >>> from pyroebm.targets import DoubleWell
            >>> mcmc = MCMC(NUTS(), num_samples=500, warmup_steps=200, num_chains=8, seed=0)
            >>> mcmc.run(DoubleWell())
            >>> diagnosis = mcmc.diagnose(observables={"square": lambda sites: sites["x"] ** 2})
            >>> diagnosis.r_hat < 1.05
            True
        """
        with eval_mode(self._target):
            return diagnostics.diagnose(
                self._draws(),
                self.get_stats(),
                max_r_hat,
                min_ess,
                kernel=self.plan.kernel,
                energy=self._target,
                named=self._target.named,
                observables=observables,
                angles=self._target.angles(),
                first_chain=self.layout.chains(self.layout.batches[0]).start,
                num_chains=self.num_chains,
            )

    def diagnostics(self) -> dict[str, Any]:
        """Return effective sample size and R-hat of each site, and divergences, as Pyro does.

        Divergences and acceptance rates are given for each chain.
        """
        samples, stats = self.get_samples(group_by_chain=True), self.get_stats()
        chains = [f"chain {c}" for c in range(len(stats["diverging"]))]
        return {
            **{
                site: {
                    "n_eff": torch.as_tensor(diagnostics.ess_bulk(draws)),
                    "r_hat": torch.as_tensor(diagnostics.r_hat(draws)),
                }
                for site, draws in samples.items()
            },
            "divergences": {
                name: row.nonzero().flatten().tolist()
                for name, row in zip(chains, stats["diverging"], strict=True)
            },
            "acceptance rate": {
                name: float(row.mean())
                for name, row in zip(chains, stats["acceptance_rate"], strict=True)
            },
        }


def _check_same(saved: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Check settings, those of a saved run among others.

    Raises:
        ValueError: with those that differ; the options of another kernel are not compared.
    """
    differ = [name for name, value in here.items() if saved.get(name, "not set") != value]
    if "kernel" in differ:
        differ = [name for name in differ if name in saved]
    if differ:
        listed = "; ".join(
            f"{name} differs: {saved.get(name, 'not set')} {where}, {here[name]} here"
            for name in differ
        )
        raise ValueError(f"{listed}; construct MCMC with the settings of the saved run")
