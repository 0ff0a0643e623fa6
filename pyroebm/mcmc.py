"""Many chains at once: warm up, draw, keep everything, go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import select_samples
from torch import Tensor
from tqdm import tqdm

from pyroebm import diagnostics
from pyroebm.compiled import choose_compiled, is_compiled
from pyroebm.energy import Energy, check_energy
from pyroebm.front_door import check_counts
from pyroebm.kernels.adaptation import Adaptation, resolve
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.kernels.metric import metric_from
from pyroebm.randomness import fresh_seed, seeded_generator
from pyroebm.record import Record, flatten, merged, unflatten
from pyroebm.supports import inside
from pyroebm.views import Unconstrained, eval_mode

__all__ = ["MCMC"]


class MCMC(AbstractMCMC):
    """Sample an energy with many chains in one process. The chains are the batch axis of every tensor.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        num_samples: draws to keep of each chain.
        warmup_steps: steps of warm-up, in which step size and metric are adapted.
        num_chains: number of chains.
        seed: seed of every random number of the run; None takes a fresh one, kept in ``.seed``. No global generator is used.
        thinning: keep one draw in so many steps; divergences and gradient counts of the others are kept with it.
        compile: whether the kernel's inner loops become compiled blocks: True, False, or "auto", which compiles where the steps
            planned repay the half minute that it may take. Draws are the same up to rounding. ``.compiled`` tells the choice.
        adaptation: how to adapt: the kernel's own way, or a :class:`pyroebm.WindowAdaptation`; None leaves it as it is.
        save_warmup: whether to keep the draws of the warm-up too.
        progress: show a progress bar; None shows one on a terminal.
        site: name of the variable in the results.

    Attributes:
        kernel: the kernel as adapted.
        interrupted: True if Ctrl-C ended the run early; what was drawn is there.

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

    kernel: Kernel[Any]
    num_chains: int
    _moving: Energy

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
        progress: bool | None = None,
        site: str = "x",
    ) -> None:
        check_kernel(kernel)
        check_counts({"num_samples": 1, "num_chains": 1, "thinning": 1}, num_samples, num_chains, thinning)
        check_counts({"warmup_steps": 0}, warmup_steps)
        super().__init__(kernel, num_chains, {})
        self.start_kernel, self.num_samples, self.warmup_steps, self.thinning = kernel, num_samples, warmup_steps, thinning
        self.seed = fresh_seed(seed)
        self.adaptation = resolve(kernel, adaptation)
        self.compile, self.save_warmup, self.progress, self.site = compile, save_warmup, progress, site
        self.interrupted = False
        self._record: Record | None = None
        self._warmup: Record | None = None

    @property
    def compiled(self) -> bool | None:
        """Whether the last run used compiled blocks; None before the first."""
        return is_compiled(self._moving) if "_moving" in vars(self) else None

    @property
    def state(self) -> Any:
        """Where the chains stand: the state of the kernel."""
        self._kept()
        return self._state

    def run(self, energy: Energy, initial: Tensor | None = None) -> None:
        """Warm up and draw.

        Args:
            energy: the energy to sample; a constrained support is sampled in unconstrained coordinates, a discrete one as it is.
            initial: starting states ``(num_chains, *event)`` in the energy's own (constrained) space; None takes
                ``energy.initial``.

        Raises:
            ValueError: if ``energy`` is no Energy or its support is not one that the kernel moves on, or if ``initial`` does not
                fit it or holds a state of non-finite energy.
        """
        target, generator = self._bound(energy)
        with eval_mode(energy):
            if initial is None:
                initial = energy.initial(self.num_chains, generator)
            self._check_initial(energy, initial)
            state = self.start_kernel.init(target, target.unconstrain(initial), generator)
            steps = self.warmup_steps + self.num_samples * self.thinning
            moving = choose_compiled(target, self.compile, self.start_kernel, self.num_chains, steps)
            # Only now is the run before this one let go: whatever was refused above has left it as it was.
            self._target, self._moving, self._generator = target, moving, generator
            self._state, self.kernel = state, self.start_kernel
            self._record = Record(self.num_samples, state)
            self._warmup = Record(self.warmup_steps if self.save_warmup else 0, state)
            self.interrupted = False
            with self._keeping("warm-up"):
                self._warm_up(self._warmup)
            if not self.interrupted:
                with self._keeping("sampling"):
                    self._draw(self._record, self.num_samples)

    def run_more(self, num_samples: int) -> None:
        """Draw ``num_samples`` more from where the chains stand: the same as one longer run.

        Energies and gradients are taken anew there, so an energy that was trained in between is sampled as it now is. (A run
        interrupted within a thinning interval begins that interval again.)

        Raises:
            ValueError: if there is no finished warm-up to go on from, or ``num_samples`` < 1.
        """
        if self._record is None or (self.interrupted and self._record.count == 0):
            raise ValueError("run_more goes on from a run that finished its warm-up: call run(energy) first")
        check_counts({"num_samples": 1}, num_samples)
        with eval_mode(self._target):
            self._moving = choose_compiled(self._target, self.compile, self.kernel, self.num_chains, num_samples * self.thinning)
            self._state = self.kernel.refresh(self._target, self._state)
            self.interrupted = False
            self._record.grow(num_samples)
            with self._keeping("sampling"):
                self._draw(self._record, num_samples)

    def _bound(self, energy: Energy) -> tuple[Unconstrained, torch.Generator]:
        check_energy(energy)
        return Unconstrained(energy, keep_discrete=self.start_kernel.discrete), seeded_generator(self.seed, energy.device)

    def _check_initial(self, energy: Energy, initial: Tensor) -> None:
        if not isinstance(initial, Tensor) or initial.dim() != 1 + len(energy.event_shape) or len(initial) != self.num_chains:
            shape = tuple(initial.shape) if isinstance(initial, Tensor) else type(initial).__name__
            raise ValueError(f"initial must hold one state for each of num_chains={self.num_chains}, got shape {shape}")
        energy.check_states(initial, "initial")
        legal = inside(energy.support, initial, len(energy.event_shape))
        if not bool(legal.all()):
            row = int((~legal).nonzero()[0])
            raise ValueError(
                f"initial must lie in support={energy.support}: {int((~legal).sum())} of {len(initial)} rows do not, the first"
                f" is row {row} with {initial[row].tolist()}"
            )

    def _warm_up(self, record: Record) -> None:
        plan = self.adaptation
        if plan is not None and self.warmup_steps > 0:
            self.kernel, memory = plan.start(self.kernel, self._moving, self._state, self._generator)
        for _ in self._bar(self.warmup_steps, "warm-up"):
            if plan is None:
                self._state, info = self.kernel.step(self._moving, self._state, self._generator)
            else:
                self.kernel, self._state, info, memory = plan.step(
                    self.kernel, self._moving, self._state, memory, self.warmup_steps, self._generator
                )
            if self.save_warmup:
                record.append(self._state, info)

    def _draw(self, record: Record, num_samples: int) -> None:
        for _ in self._bar(num_samples, "sample"):
            infos = []
            for _ in range(self.thinning):
                self._state, info = self.kernel.step(self._moving, self._state, self._generator)
                infos.append(info)
            record.append(self._state, merged(infos))

    def _bar(self, steps: int, label: str) -> Any:
        disable = None if self.progress is None else not self.progress
        return tqdm(range(steps), desc=f"{label} ({self.num_chains} chains)", disable=disable)

    @contextlib.contextmanager
    def _keeping(self, phase: str) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            kept = self._record.count if self._record is not None else 0
            warnings.warn(f"interrupted during {phase}: {kept} draws of each chain were kept", RuntimeWarning, stacklevel=4)

    def _kept(self) -> Record:
        if self._record is None:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        if self._record.count == 0:
            raise ValueError("the run ended before its first draw (the warm-up is get_samples(warmup=True)): run(energy) again")
        return self._record

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, warmup: bool = False
    ) -> dict[str, Tensor]:
        """Draws in the energy's own space.

        Args:
            num_samples: so many, drawn again with replacement by torch's global generator (as in Pyro); None gives all.
            group_by_chain: keep the chain axis: ``(chains, draws, *event)``, else ``(chains * draws, *event)``.
            warmup: the warm-up's draws instead.
        """
        record = self._warmup if warmup and self._warmup is not None else self._kept()
        draws = self._target.energy.named(self._target.constrain(record.draws()), self.site)
        samples: dict[str, Tensor] = select_samples(draws, num_samples, group_by_chain)
        return samples

    def get_stats(self, warmup: bool = False) -> dict[str, Tensor]:
        """Statistics of each draw, ``(chains, draws)``: ``lp``, ``energy`` (the Hamiltonian), ``acceptance_rate``, ..."""
        return (self._warmup if warmup and self._warmup is not None else self._kept()).stats()

    def to_arviz(self) -> Any:
        """Draws and statistics, warm-up included, as ArviZ's InferenceData (DataTree from ArviZ 1.0 on)."""
        warm = self._warmup is not None and self._warmup.count > 0
        return diagnostics.to_arviz(
            self.get_samples(group_by_chain=True),
            self.get_stats(),
            self.get_samples(group_by_chain=True, warmup=True) if warm else None,
            self.get_stats(warmup=True) if warm else None,
            {"kernel": type(self.kernel).__name__, "seed": str(self.seed), "thinning": self.thinning},
        )

    def summary(self, **options: Any) -> Any:
        """ArviZ's summary table (a DataFrame) of the draws; options go to ``arviz.summary``."""
        return diagnostics.summary(self.to_arviz(), **options)

    def verdict(self, max_r_hat: float = 1.01, min_ess: float = 400.0) -> diagnostics.Verdict:
        """Whether the chains mixed, in plain words; see :func:`pyroebm.diagnostics.verdict`."""
        return diagnostics.verdict(self._kept().draws(), self.get_stats(), max_r_hat, min_ess, self.kernel)

    def diagnostics(self) -> dict[str, Any]:
        """As Pyro's: effective sample size and R-hat of each site, divergences and acceptance rates of each chain."""
        samples, stats = self.get_samples(group_by_chain=True), self.get_stats()
        chains = [f"chain {c}" for c in range(self.num_chains)]
        table = {
            site: {"n_eff": torch.as_tensor(diagnostics.ess_bulk(x)), "r_hat": torch.as_tensor(diagnostics.r_hat(x))}
            for site, x in samples.items()
        }
        return table | {
            "divergences": {name: row.nonzero().flatten().tolist() for name, row in zip(chains, stats["diverging"], strict=True)},
            "acceptance rate": {name: float(row.mean()) for name, row in zip(chains, stats["acceptance_rate"], strict=True)},
        }

    def _settings(self) -> dict[str, Any]:
        plain = {f.name: getattr(self.start_kernel, f.name) for f in dataclasses.fields(self.start_kernel)}
        learned = self.start_kernel.learned
        plain = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in plain.items() if k not in learned}
        return {"kernel": type(self.kernel).__name__, **plain, "num_chains": self.num_chains, "thinning": self.thinning}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that ``run_more`` needs, and every draw, as tensors alone (safetensors can hold it)."""
        record = self._kept()
        parts = {f"state.{k}": v for k, v in flatten(self._state).items()} | {f"stats.{k}": v for k, v in record.stats().items()}
        parts |= {"x": record.draws(), "rng": self._generator.get_state()}
        metric = getattr(self.kernel, "inverse_mass", None)
        written = self._settings() | {"seed": self.seed, "metric": type(metric).__name__}
        parts["settings"] = torch.tensor(list(json.dumps(written).encode()), dtype=torch.uint8)
        numbers = [name for name in self.kernel.learned if name != "inverse_mass"]
        parts |= {name: torch.as_tensor(getattr(self.kernel, name), dtype=torch.float64) for name in numbers}
        if metric is not None:
            parts |= {f"metric.{k}": v for k, v in (flatten(metric) if isinstance(metric, tuple) else {"0": metric}).items()}
        return {name: value.detach().clone().contiguous() for name, value in parts.items()}

    def load_state_dict(self, state: dict[str, Tensor], energy: Energy) -> None:
        """Stand where a run of the same settings stood, so that ``run_more`` goes on as it would have.

        Raises:
            ValueError: if the state is of other settings (kernel, chains, thinning), or of another energy.
        """
        if not {"settings", "x", "rng", "state.x", "state.energy"} <= set(state):
            raise ValueError(f"state must come from MCMC.state_dict(), got keys {sorted(state)}")
        settings = json.loads(bytes(state["settings"].tolist()))
        seed, metric = settings.pop("seed"), settings.pop("metric")
        if settings != self._settings():
            raise ValueError(f"the state must be of the settings of this run, {self._settings()}, got {settings}")
        target, generator = self._bound(energy)
        energy.check_states(target.constrain(state["x"]), "state['x']")
        parts = lambda prefix: {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}  # noqa: E731
        with eval_mode(energy):
            at = unflatten(self.start_kernel.init(target, state["state.x"], generator), parts("state."))
            if not torch.allclose(self.start_kernel.refresh(target, at).energy, at.energy):
                raise ValueError("the state must be of the energy given: its energies differ from those kept with the draws")
        generator.set_state(state["rng"])
        learned: dict[str, Any] = {}
        for name in self.start_kernel.learned:
            if name == "inverse_mass":
                learned[name] = metric_from(metric, parts("metric."))
            else:
                learned[name] = state[name] if state[name].dim() else float(state[name])
        self.kernel = self.start_kernel.replace(**learned)
        self._target, self._generator, self._state, self.seed, self.interrupted = target, generator, at, seed, False
        self._record, self._warmup = Record(0, at), Record(0, at)
        self._record.load(state["x"], parts("stats."))
