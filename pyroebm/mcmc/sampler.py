"""Many chains at once: warm up, draw, keep everything, go on, and ask what came of it."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import select_samples
from torch import Tensor

from pyroebm import diagnostics
from pyroebm.core._checks import check_counts
from pyroebm.core.compilation import choose_compiled, is_compiled
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import fresh_seed, seeded_generator
from pyroebm.core.serialization import from_text, to_text
from pyroebm.core.supports import to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.diagnostics.streaming import StreamingMoments
from pyroebm.diagnostics.stuck import describe_stuck, stuck_chains
from pyroebm.kernels.adaptation.starts import draw_starts
from pyroebm.kernels.adaptation.windows import Adaptation, WindowAdaptation, resolve
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.mcmc.chains import Block, Layout, Plan, Record, announce, bytes_per_draw, check_initial
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
    """A ``map`` over a number of threads. All of them have stopped when it is left, after a second
    Ctrl-C too.
    """
    if number == 1:
        yield map
        return
    inference = torch.is_inference_mode_enabled()  # which belongs to a thread

    def each(function: Callable[[Block], int], blocks: list[Block]) -> Iterator[int]:
        def within(block: Block) -> int:
            with torch.inference_mode(inference):
                return function(block)

        return pool.map(within, blocks)

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


#: Bytes of draws that a run which streams to a folder holds in memory, all blocks together.
BUFFER = 2**28

#: Most steps of one turn, where chains run ahead of each other.
AT_ONCE = 1024


class MCMC(AbstractMCMC):
    """Sample an energy with many chains in one process. The chains are the batch axis of every
    tensor.

    Chains come in blocks, each with its own random numbers and its own adaptation: the draws of a
    chain do not depend on how many blocks there are beside its own, nor on which process runs them.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        num_samples: draws to keep of each chain.
        warmup_steps: steps of warm-up, in which step size and metric are adapted.
        num_chains: number of chains.
        seed: seed of every random number of the run; None takes a fresh one, kept in ``.seed``. No
            global generator is used.
        thinning: keep one draw in so many steps; divergences and gradient counts of the others are
            kept with it.
        compile: whether the gradient (of :class:`NUTS`) or the kernel's inner loops (of others) are
            compiled: True, False, or "auto", which compiles where the steps planned for one block
            repay it. Compiling a gradient takes seconds, once for a model on this machine; inner
            loops take half a minute. Draws are the same up to rounding. ``.compiled`` tells the
            choice.
        adaptation: how to adapt: the kernel's own way, or a
            :class:`pyroebm.kernels.WindowAdaptation`; None leaves it as it is.
        save_warmup: whether to keep the draws of the warm-up too.
        keep: ``"draws"``, or ``"moments"``: means and variances of each chain in place of any draw,
            see :meth:`get_moments`.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.
            Of several ranks the first shows it.
        site: name of the variable in the results.
        chain_batch_size: chains of one block. More of them share one step's overhead, and one
            adaptation.
        num_threads: threads among which the blocks are shared. The draws do not depend on it.
            Compiled gradients and :class:`NUTS` run at the same time in several threads; kernels
            and energies in Python take turns.
        ranks: number of this process and of all, which share the blocks; see
            :func:`pyroebm.training.ranks`. Results in memory are of this process's chains.

    Attributes:
        interrupted: True if Ctrl-C ended the run early; what was drawn is there. Where blocks have
            been drawn to different lengths, results are of the draws that all have.

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
    def _one_by_one(self) -> bool:
        """Whether what is done between turns is done after each step, and not after some."""
        return False

    def __init__(
        self,
        kernel: Kernel[Any],
        num_samples: int,
        warmup_steps: int = 500,
        num_chains: int = 1,
        *,
        seed: int | None = None,
        thinning: int = 1,
        adaptation: Adaptation | Literal["default"] | None = "default",
        compile: bool | Literal["auto"] = "auto",
        save_warmup: bool = True,
        keep: Literal["draws", "moments"] = "draws",
        progress: bool | None = None,
        site: str = "x",
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
        self.seed = fresh_seed(seed)
        self.keep = keep
        self.progress = progress
        self.site = site
        self.transforms = {}
        self.compile = compile
        self.num_threads = num_threads
        self.interrupted = False
        self._goal = 0
        self._stopped = False  # while compiling
        self._blocks: list[Block] = []
        self._store: Store | None = None

    @property
    def kernel(self) -> Kernel[Any]:
        """The kernel as adapted by the first block; before a run the one that was given."""
        return self._blocks[0].kernel if self._blocks else self.plan.kernel

    @property
    def kernels(self) -> list[Kernel[Any]]:
        """The kernel of each block, as adapted."""
        return [block.kernel for block in self._blocks]

    @property
    def compiled(self) -> bool | None:
        """Whether the last run was compiled; None before the first."""
        return is_compiled(self._blocks[0].moving) if self._blocks else None

    def run(
        self,
        energy: Energy,
        initial: Tensor | None = None,
        *,
        store: str | Path | None = None,
        checkpoint_every: float = 60.0,
    ) -> None:
        """Warm up and draw.

        Args:
            energy: the energy to sample; a constrained support is sampled in unconstrained
                coordinates, a discrete one as it is.
            initial: starting states ``(num_chains, *event)`` in the energy's own (constrained)
                space; None takes ``energy.initial``, for each chain the first candidate from which
                a trial leapfrog step is accepted.
            store: a folder to stream the draws to, for runs larger than memory or longer than a
                machine stays up: :func:`pyroebm.open_run` opens it, :meth:`resume` goes on from it.
                None keeps the draws in memory.
            checkpoint_every: seconds after which draws and states are written to the folder again.

        Raises:
            ValueError: if ``energy`` is no Energy or its support is not one that the kernel moves
                on, if ``initial`` does not fit it or holds a state of non-finite energy, or if
                ``store`` holds a run already.
        """
        target = self._bound(energy)
        folder = (
            None if store is None else Store(store, functools.partial(target.named, site=self.site))
        )
        if self.plan.kernel.runs_ahead(target):
            self._compile_driver(target.dtype)
        with eval_mode(energy):
            if initial is not None:
                check_initial(energy, initial, self.num_chains)
            blocks = []
            for number in self.layout.blocks:
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
                blocks.append(self._block(number, target, x, generator, folder))
        self._compile(target, blocks, self.num_samples)
        if folder is not None:
            folder.begin(self.layout, self._facts())
        # Only now is the run before this one let go: whatever was refused above has left it as it
        # was.
        self._target = target
        self._blocks = blocks
        self._store = folder
        self._advance(self.num_samples, checkpoint_every)

    def run_more(self, num_samples: int, *, checkpoint_every: float = 60.0) -> None:
        """Draw ``num_samples`` more from where the chains stand: the same as one longer run.

        Energies and gradients are taken anew there, so an energy that was trained in between is
        sampled as it now is.

        Raises:
            ValueError: if there is no finished warm-up to go on from, or ``num_samples`` < 1.
        """
        if not self._blocks or any(block.warm_left for block in self._blocks):
            raise ValueError(
                "run_more goes on from a run that finished its warm-up: call run(energy) first, or"
                " resume()"
            )
        check_counts({"num_samples": 1}, num_samples)
        goal = min(block.count for block in self._blocks) + num_samples
        self._compile(self._target, self._blocks, goal)
        with eval_mode(self._target):
            for block in self._blocks:
                block.refresh()
        self._advance(goal, checkpoint_every)

    def resume(
        self,
        energy: Energy | None = None,
        store: str | Path | None = None,
        *,
        checkpoint_every: float = 60.0,
    ) -> None:
        """Finish a run that was broken off: the draws are those of one that was not, bit for bit on
        one machine.

        Args:
            energy: the energy of the run, and
            store: the folder it streamed to. Without them, the run in memory goes on (after Ctrl-C
                or :meth:`load_state_dict`).
            checkpoint_every: as in :meth:`run`.

        Raises:
            ValueError: if there is no run to go on from, or if that in the folder is of other
                settings or of another energy.
        """
        if (energy is None) != (store is None):
            raise ValueError(
                f"resume takes energy and store, or neither, got energy={energy} and"
                f" store={store!r}"
            )
        if energy is not None and store is not None:
            target = self._bound(energy)
            folder = Store(store, functools.partial(target.named, site=self.site))
            states = {number: folder.load(number) for number in self.layout.blocks}
            self._load(
                {f"{n}.{k}": v for n, state in states.items() for k, v in state.items()},
                target,
                folder,
            )
        if not self._blocks:
            raise ValueError(
                "there is nothing to resume: call run(energy) or load_state_dict(state, energy)"
                " first"
            )
        if not self.compiled:
            self._compile(self._target, self._blocks, self.num_samples)
        self._advance(max(self._goal, self.num_samples), checkpoint_every)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`resume` and :meth:`run_more` need, and every draw, as tensors
        alone (safetensors can hold it).

        Raises:
            ValueError: if there was no run.
        """
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        states = {
            number: self._state_of(block)
            for number, block in zip(self.layout.blocks, self._blocks, strict=True)
        }
        return {
            f"{number}.{name}": value
            for number, state in states.items()
            for name, value in state.items()
        }

    def load_state_dict(self, state: dict[str, Tensor], energy: Energy) -> None:
        """Stand where a run of the same settings stood, in its warm-up or after, so that it can go
        on as it would have.

        Raises:
            ValueError: if the state is of other settings (kernel, chains, thinning), or of another
                energy.
        """
        self._load(state, self._bound(energy), None)

    def _load(self, state: dict[str, Tensor], target: Energy, store: Store | None) -> None:
        needed = {
            f"{n}.{name}"
            for n in self.layout.blocks
            for name in ("settings", "said", "rng", "state.x", "state.energy")
        }
        if not needed <= set(state):
            raise ValueError(
                f"state must come from MCMC.state_dict(), with {sorted(needed)}, got keys"
                f" {sorted(state)}"
            )
        blocks = []
        for number in self.layout.blocks:
            own = {
                k.removeprefix(f"{number}."): v
                for k, v in state.items()
                if k.startswith(f"{number}.")
            }
            saved = from_text(own["settings"].cpu())
            seed, settings = saved.pop("seed"), self._settings(target, saved["warm_left"])
            if saved != settings:
                raise ValueError(
                    f"the state must be of the settings of this run, {settings}, got {saved}"
                )
            with eval_mode(target):
                x, generator = (
                    own["state.x"].to(target.device),
                    seeded_generator(self.seed, target.device),
                )
                block = self._block(number, target, x, generator, store)
                block.load_state_dict(own)
                energies = block.kernel.refresh(target, block.state).energy
                # compiled ones may differ a little
                if not torch.allclose(energies, block.state.energy, rtol=1e-4, atol=1e-4):
                    raise ValueError(
                        "the state must be of the energy given: its energies differ from those"
                        " kept with the draws"
                    )
            blocks.append(block)
        self._target = target
        self._blocks = blocks
        self._store = store
        self.seed = seed
        self._goal, self.interrupted = 0, False

    def _settings(self, target: Energy, warm_left: int) -> dict[str, Any]:
        return self.plan.settings(warm_left) | {
            "num_chains": self.num_chains,
            "chain_batch_size": self.layout.size,
            "keep": self.keep,
            "runs_ahead": self.plan.kernel.runs_ahead(target),
        }

    def _state_of(self, block: Block, draws: bool = True) -> dict[str, Tensor]:
        settings = self._settings(block.target, block.warm_left) | {"seed": self.seed}
        return block.state_dict(draws) | {"settings": to_text(settings)}

    def _bound(self, energy: Energy) -> Energy:
        check_energy(energy)
        target = unconstrain(energy)
        self.plan.kernel.check_support(target)
        return target

    def _compile(self, target: Energy, blocks: list[Block], goal: int) -> None:
        """Choose what the kernels move on. What decides is the same whatever blocks are here and
        whatever is done already.
        """
        chains, steps = (
            len(self.layout.chains(0)),
            self.plan.warmup_steps + goal * self.plan.thinning,
        )
        kernel = self.plan.kernel
        try:
            with eval_mode(target):
                sizes = [len(block.state.x) for block in blocks]
                moving = choose_compiled(
                    target, self.compile, kernel, chains, steps, self._say, sizes
                )
        except KeyboardInterrupt:  # raised again, and reported, by _advance
            self._stopped = True
            return
        for block in blocks:
            block.moving = moving

    def _compile_driver(self, dtype: torch.dtype) -> None:
        """Let numba compile what moves NUTS's chains, and say so if it takes longer than a
        second.
        """
        from pyroebm.kernels.nuts.driver import compile_for

        said = "compiling NUTS, about 4 s, once on this machine"
        timer = threading.Timer(1.0, self._say, [said])
        timer.daemon = True
        timer.start()
        try:
            compile_for(dtype)
        finally:
            timer.cancel()

    def _say(self, text: str) -> None:
        if self.progress is not False and self.layout.ranks[0] == 0:
            print(text, file=sys.stderr)

    def _block(
        self,
        number: int,
        target: Energy,
        start: Tensor,
        generator: torch.Generator,
        store: Store | None,
    ) -> Block:
        if self.keep == "moments":
            return Block(
                self.plan,
                target,
                start,
                generator,
                named=functools.partial(target.named, site=self.site),
            )
        if store is None:
            return Block(self.plan, target, start, generator)
        room = BUFFER // (len(self.layout.blocks) * len(start) * bytes_per_draw(target))
        return Block(
            self.plan,
            target,
            start,
            generator,
            store.parts(number, self.layout.chains(number).start),
            max(1, room),
        )

    def _advance(self, goal: int, checkpoint_every: float) -> None:
        """Finish the warm-up, then draw until every chain has ``goal`` draws."""
        self.interrupted = False
        self._goal = goal
        self._every = checkpoint_every
        phase = "compilation" if self._stopped else "warm-up"
        if self.keep == "draws":
            draws, chains = (
                goal + self.plan.warmup_steps * self.plan.save_warmup,
                sum(len(b.state.x) for b in self._blocks),
            )
            announce(draws, chains, self._target, self._store is not None)
        stopped, self._stopped = self._stopped, False
        try:
            if stopped:
                raise KeyboardInterrupt
            with eval_mode(self._target):
                for block in self._blocks:
                    block.make_room(goal)
                self._save()
                most = 1 if self._one_by_one else AT_ONCE
                self._take_turns(
                    "warm-up", lambda block: block.warm_up(most), lambda block: block.warm_left
                )
                phase = "sampling"
                self._take_turns(
                    "sample",
                    lambda block: block.draw(goal, most),
                    lambda block: goal - block.count,
                )
            self._warn_of_stuck_chains(stacklevel=4)
        except KeyboardInterrupt:
            self.interrupted = True
            kept = min(block.count for block in self._blocks)
            warnings.warn(
                f"interrupted during {phase}: {kept} draws of each chain were kept",
                RuntimeWarning,
                stacklevel=3,
            )
        finally:
            self._save()

    def _take_turns(
        self, label: str, step: Callable[[Block], int], left: Callable[[Block], int]
    ) -> None:
        """Some steps of each block in turn, so that an interrupt finds all of them about equally
        far.
        """
        behind, turn = [block for block in self._blocks if left(block) > 0], 0
        show = self.progress if self.layout.ranks[0] == 0 else False
        total = sum(left(block) * len(block.state.x) for block in behind)
        for block in behind:
            block.divergences = torch.zeros_like(block.divergences)
        with (
            Progress(total, f"{label}, {self.num_chains} chains", "draw", show) as shown,
            _threads(self.num_threads) as each,
        ):
            shown.note(
                divergences=lambda: int(sum(block.divergences for block in self._blocks)),
                acceptance=lambda: _mean_of([block.acceptance for block in self._blocks]),
            )
            while behind:
                for block, number in zip(behind, each(step, behind), strict=True):
                    shown.update(number * len(block.state.x))
                self._after_turn(label, turn)
                behind, turn = [block for block in behind if left(block) > 0], turn + 1

    def _after_turn(self, label: str, turn: int) -> None:
        """What is done between turns: ``label`` is ``"warm-up"`` or ``"sample"``, and ``turn``
        counts from 0 in each.
        """
        if time.monotonic() - self._saved >= self._every:
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._store is not None:
            for number, block in zip(self.layout.blocks, self._blocks, strict=True):
                block.warmup.spill()
                block.record.spill()
                self._store.save(number, self._state_of(block, draws=False))

    @property
    def state(self) -> Any:
        """Where the chains stand: the states of all blocks as one.

        Raises:
            ValueError: if there was no run.
        """
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        return _joined([block.state for block in self._blocks])

    def _records(self, warmup: bool = False) -> list[Record]:
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        if self.keep == "moments":
            raise ValueError(
                'keep="moments" keeps no draws: get_moments() has their means, variances and R-hat'
            )
        if not warmup and min(block.count for block in self._blocks) == 0:
            raise ValueError(
                "the run ended before its first draw (its warm-up is in get_samples(warmup=True)):"
                " resume() or run(energy) again"
            )
        return [block.warmup if warmup else block.record for block in self._blocks]

    def _draws(self, warmup: bool = False) -> Tensor:
        records = self._records(warmup)
        common = min(record.count for record in records)
        return torch.cat([record.draws()[:, :common] for record in records])

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, warmup: bool = False
    ) -> dict[str, Tensor]:
        """Draws in the energy's own space.

        Args:
            num_samples: so many, drawn again with replacement by torch's global generator (as in
                Pyro); None gives all.
            group_by_chain: keep the chain axis: ``(chains, draws, *event)``, else ``(chains *
                draws, *event)``.
            warmup: the warm-up's draws instead.
        """
        draws = self._draws(warmup)
        samples: dict[str, Tensor] = select_samples(
            self._target.named(draws, self.site), num_samples, group_by_chain
        )
        return samples

    def get_stats(self, warmup: bool = False) -> dict[str, Tensor]:
        """Statistics of each draw, ``(chains, draws)``: ``lp``, ``energy`` (the Hamiltonian),
        ``acceptance_rate``, ...
        """
        records = self._records(warmup)
        common = min(record.count for record in records)
        stats = [record.stats() for record in records]
        return {name: torch.cat([each[name][:, :common] for each in stats]) for name in stats[0]}

    def get_moments(self) -> dict[str, StreamingMoments]:
        """Means, variances, R-hat and nested R-hat of each variable and statistic, of a run with
        ``keep="moments"``.

        Raises:
            ValueError: if nothing was drawn, or if the run keeps its draws.
        """
        kept = [block.moments for block in self._blocks]
        if not kept or not all(kept):
            raise ValueError(
                f'get_moments is for runs with keep="moments" that have draws, got'
                f" keep={self.keep!r}"
            )
        return {name: StreamingMoments.joined([each[name] for each in kept]) for name in kept[0]}

    def to_arviz(self) -> Any:
        """Draws and statistics, warm-up included, as ArviZ's InferenceData (DataTree from ArviZ 1.0
        on).
        """
        samples, stats = self.get_samples(group_by_chain=True), self.get_stats()
        warm = all(record.count for record in self._records(warmup=True))
        return diagnostics.to_arviz(
            samples,
            stats,
            warmup_posterior=self.get_samples(group_by_chain=True, warmup=True) if warm else None,
            warmup_sample_stats=self.get_stats(warmup=True) if warm else None,
            attrs=self._facts(),
        )

    def stuck_chains(self) -> list[int]:
        """Numbers of the chains (of this process) that never moved after warm-up; see
        :func:`pyroebm.diagnostics.stuck_chains`.
        """
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        moves, first = (
            torch.cat([block.moves for block in self._blocks]),
            self.layout.chains(self.layout.blocks[0]).start,
        )
        return [
            first + chain
            for chain in stuck_chains(moves, min(block.count for block in self._blocks))
        ]

    def _warn_of_stuck_chains(self, stacklevel: int) -> None:
        energies, first = self.state.energy, self.layout.chains(self.layout.blocks[0]).start
        stuck = [number - first for number in self.stuck_chains()]
        if said := describe_stuck(stuck, len(energies), energies, first, self.num_chains):
            warnings.warn(said, RuntimeWarning, stacklevel=stacklevel)

    def _facts(self) -> dict[str, Any]:
        facts = {
            "kernel": type(self.plan.kernel).__name__,
            "seed": str(self.seed),
            "thinning": self.plan.thinning,
        }
        return facts | {"num_chains": self.num_chains, "chain_batch_size": self.layout.size}

    def summary(self, **options: Any) -> Any:
        """ArviZ's summary table (a DataFrame) of the draws; options go to ``arviz.summary``. Warns
        of chains that never moved.
        """
        self._warn_of_stuck_chains(stacklevel=3)
        return diagnostics.summary(self.to_arviz(), **options)

    def diagnose(self, max_r_hat: float = 1.01, min_ess: float = 400.0) -> diagnostics.Diagnosis:
        """Find what is wrong with the draws; see :func:`pyroebm.diagnostics.diagnose`."""
        with eval_mode(self._target):
            return diagnostics.diagnose(
                self._draws(),
                self.get_stats(),
                max_r_hat,
                min_ess,
                kernel=self.plan.kernel,
                energy=self._target,
                named=functools.partial(self._target.named, site=self.site),
                first_chain=self.layout.chains(self.layout.blocks[0]).start,
                num_chains=self.num_chains,
            )

    def diagnostics(self) -> dict[str, Any]:
        """As Pyro's: effective sample size and R-hat of each site, divergences and acceptance rates
        of each chain.
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
