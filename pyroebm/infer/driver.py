"""The library's driver with Pyro's arguments, hooks and results: what MCMC classes share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyroebm.core.rng import LOCK, seeded_generator
from pyroebm.infer.kernels import HMC, transforms_of
from pyroebm.infer.potential import PotentialEnergy
from pyroebm.kernels.base import ContinuousKernel, Info
from pyroebm.mcmc import sampler
from pyroebm.ppl.kernel import PyroKernel
from pyroebm.ppl.model import ModelEnergy

__all__ = ["ChainName", "Driver", "Vectorized", "is_vectorized"]

Hook = Callable[[Any, dict[str, Tensor], str, int], object]


class ChainName(str):
    """Name of a chain, a string that sorts by its number: "chain 2" before "chain 10".

    ArviZ's ``from_pyro`` takes the chains in the order of their sorted names.
    """

    number: int

    def __new__(cls, number: int) -> ChainName:
        """Return the name of chain ``number``."""
        name = super().__new__(cls, f"chain {number}")
        name.number = number
        return name

    def __lt__(self, other: str) -> bool:
        return self.number < other.number if isinstance(other, ChainName) else str(self) < other


def is_vectorized(kernel: object) -> bool:
    """Whether a kernel is an HMC or NUTS of this package with our own setup and sample.

    A subclass that overrides them is a kernel for Pyro's driver, which calls them.
    """
    return (
        isinstance(kernel, HMC)
        and type(kernel).setup is HMC.setup
        and type(kernel).sample is HMC.sample
    )


def _chain(values: Any, number: int) -> Any:
    """Return the fields of a state or a report for one chain."""
    parts = (None if part is None else part[number : number + 1] for part in values)
    return type(values)(*parts)


class Driver(sampler.MCMC):
    """The library's driver, which shows each chain after each step as a chain of Pyro's."""

    hook: Hook | None = None
    receive: Callable[[Tensor], object] | None = None

    def watch(
        self,
        shown: HMC,
        energy: ModelEnergy | PotentialEnergy,
        hook: Hook | None,
        receive: Callable[[Tensor], object] | None = None,
    ) -> None:
        """Set what is called after each step.

        Args:
            shown: the kernel in whose attributes the chains are shown.
            energy: the energy of the run.
            hook: called as Pyro's ``hook_fn`` for each chain.
            receive: called with the draws of all chains, ``(chains, dim)``.
        """
        self.shown, self.energy = shown, energy
        self.hook, self.receive = hook, receive
        self.chains = list[PyroKernel]()

    @property
    def _single_steps(self) -> bool:
        return self.hook is not None or self.receive is not None

    @property
    def drawn(self) -> int:
        """Number of draws that all chains have."""
        return min((batch.count for batch in self._batches), default=0)

    def chain(self, number: int) -> PyroKernel:
        """Return a record of one chain that begins at its current state."""
        kernel = self.plan.kernel
        chain = PyroKernel(kernel, self.energy, adaptation=None)
        chain.begin(self.plan.warmup_steps, _chain(self.state, number))
        chain.kernel = self._kernel_of(number)
        return chain

    def _kernel_of(self, number: int | None = None) -> Any:
        """Return the kernel of a chain; of None with the median step size."""
        kernel = cast(ContinuousKernel[Any], self.kernel)
        sizes = torch.as_tensor(kernel.step_size)
        if number is None or sizes.dim() == 0:
            return kernel.replace(step_size=float(sizes.median()))
        return kernel.replace(step_size=float(sizes[number]))

    def show(self) -> None:
        """Show the adapted settings of the run, and its first chain, in the kernel."""
        if self.chains:
            chain = self.chains[0]
        else:
            chain, stats = self.chain(0), self.get_stats()
            chain.add_draws(stats["acceptance_rate"][0], stats["diverging"][0])
        chain.kernel = self._kernel_of()
        self.shown.show(self.energy, chain)

    def _after_turn(self, label: str, turn: int) -> None:
        if self._single_steps:
            self._show_step(label == "warm-up")
        super()._after_turn(label, turn)

    def _show_step(self, warms: bool) -> None:
        (batch,) = self._batches
        if not self.chains:
            self.chains = [self.chain(number) for number in range(self.num_chains)]
        stage = "Warmup" if warms else "Sample"
        done = self.plan.warmup_steps - batch.warm_left if warms else batch.count
        x = batch.state.x.clone()
        after, changed = list[Tensor](), False
        for number, chain in enumerate(self.chains):
            kernel, state = self._kernel_of(number), _chain(batch.state, number)
            chain.follow(kernel, state, _chain(cast(Info, batch.info), number))
            params = self.energy.split(x[number])
            if self.hook is not None:
                self.shown.show(self.energy, chain)
                suffix = f" [{number}]" if self.num_chains > 1 else ""
                self.hook(self.shown, params, stage + suffix, done - 1)
                changed |= chain.state is not state  # clear_cache
                if chain.kernel is not kernel:  # an assignment to the mass matrix
                    adapted = cast(ContinuousKernel[Any], batch.kernel)
                    inverse_mass = cast(ContinuousKernel[Any], chain.kernel).inverse_mass
                    batch.kernel, changed = adapted.replace(inverse_mass=inverse_mass), True
            after.append(self.energy.join(params))
        x = torch.stack(after)
        if changed or not torch.equal(x, batch.state.x):  # or a hook changed a value
            batch.move(x)
        if self.receive is not None and not warms:
            self.receive(x)


class Vectorized:
    """What MCMC and StreamingMCMC share: settings, the energy, and a run of the driver."""

    kernel: Any
    num_chains: int
    num_samples: int
    warmup_steps: int
    transforms: Any
    disable_validation: bool | None
    _args: Any
    _kwargs: Any
    _samples: dict[str, Tensor] | None
    _diagnostics: list[dict[str, Any] | None]
    _run: Driver | None = None
    store: str | Path | None = None

    def _check_kernel(self, kernel: object, **ours: object) -> None:
        """Raise ValueError unless the kernel is one of Pyro's, with options that apply to it."""
        if not isinstance(kernel, MCMCKernel):
            raise ValueError(
                "kernel must be a kernel of Pyro, such as NUTS or HMC of pyroebm.infer, got"
                f" {type(kernel).__module__}.{type(kernel).__name__}"
            )
        given = {name: value for name, value in ours.items() if value not in (None, "auto")}
        if given and not is_vectorized(kernel):
            raise ValueError(
                f"{', '.join(given)} requires a kernel that runs in this package, NUTS or HMC of"
                f" pyroebm.infer, but Pyro's driver runs {type(kernel).__name__}"
            )

    def _configure(
        self,
        num_samples: int,
        warmup_steps: int | None,
        initial_params: Mapping[str, Tensor] | None,
        hook_fn: Hook | None,
        disable_progbar: bool,
        disable_validation: bool | None,
        save_params: Sequence[str] | None,
        seed: int | None,
        compile: bool | Literal["auto"],
        keep: Literal["draws", "moments"],
        store: str | Path | None = None,
    ) -> None:
        num_chains, kernel = self.num_chains, self.kernel
        if initial_params is not None:  # numbers and arrays of NumPy too
            initial_params = {n: torch.as_tensor(value) for n, value in initial_params.items()}
        if kernel._given_potential is not None and initial_params is None:
            initial_params = kernel.initial_params
            if initial_params is None:
                raise ValueError(
                    "potential_fn requires initial_params, a dict of starting values, for the names"
                    f" and shapes of its sites, got initial_params={initial_params}"
                )
            initial_params = self._repeated(initial_params)
        elif initial_params and num_chains == 1:
            initial_params = self._repeated(initial_params)
        shapes = {name: tuple(value.shape) for name, value in (initial_params or {}).items()}
        if any(shape[:1] != (num_chains,) for shape in shapes.values()):
            raise ValueError(
                f"initial_params must have a leading axis of num_chains={num_chains}, got shapes"
                f" {shapes}"
            )
        self._requested = num_samples
        self.num_samples = num_samples
        self.warmup_steps = num_samples if warmup_steps is None else warmup_steps
        self.initial_params = initial_params
        self._given_transforms = self.transforms
        self.hook_fn = hook_fn
        self.save_params = save_params
        self.disable_validation = disable_validation
        self.seed = seed
        self.compile = compile
        self.store = store
        self._progress = False if disable_progbar else None
        self._keep: Literal["draws", "moments"] = keep
        self._args = self._kwargs = None
        self._forget()
        self._driver(0, None)  # checks the counts here instead of in run

    def _forget(self) -> None:
        """Drop the results of the last run."""
        self._run = self._samples = None
        self._diagnostics = [None] * self.num_chains

    def _repeated(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.expand(self.num_chains, *value.shape) for name, value in params.items()}

    def _driver(self, seed: int | None, energy: ModelEnergy | PotentialEnergy | None) -> Driver:
        return Driver(
            self.kernel.build(),
            self._requested,
            self.warmup_steps,
            self.num_chains,
            seed=seed,
            adaptation=None if energy is None else self.kernel.adaptation(energy),
            compile=self.compile,
            save_warmup=False,
            keep=self._keep,
            progress=self._progress,
            chain_batch_size=self.num_chains,
        )

    def _validation(self) -> contextlib.AbstractContextManager[Any]:
        off = self.disable_validation
        enabled: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if off is None else pyro.validation_enabled(not off)
        )
        return enabled

    def _sample(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        receiver: Callable[..., Callable[[Tensor], object]] | None = None,
        resume: bool = False,
    ) -> None:
        """Run the warm-up and draw samples; without latent variables there are none.

        With ``resume`` the run in the folder ``store`` is finished.

        What the run drew is kept also if Ctrl-C or a hook's exception ends it early. The draws of
        the run before are dropped first, since they are not of these arguments.
        """
        self._forget()
        self._args, self._kwargs = tuple(args), dict(kwargs)
        seed = int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed
        kernel, initial = self.kernel, self.initial_params
        if initial is None and kernel.initial_params is not None:
            initial = self._repeated(kernel.initial_params)
        generator = seeded_generator(seed, spawned=1)
        with LOCK, self._validation(), poutine.block():
            energy, start = kernel.target(
                args, kwargs, initial, self.num_chains, self._given_transforms, generator
            )
        self.transforms = (None if energy is None else transforms_of(energy)) or {}
        if energy is None:
            self._idle()
            return
        if unknown := set(self.save_params or ()) - set(energy.shapes):
            raise ValueError(
                f"save_params must name sites of {sorted(energy.shapes)}, got {sorted(unknown)}"
            )
        # a run that is finished keeps its seed
        run = self._driver(self.seed if resume else seed, energy)
        run.watch(kernel, energy, self.hook_fn, receiver and receiver(energy))
        if resume:
            self._finish(run, lambda: run.resume(energy, self.store))
        else:
            self._finish(run, lambda: run.run(energy, start, store=self.store))

    def _finish(self, run: Driver, draw: Callable[[], None]) -> None:
        try:
            draw()
        finally:
            if run.drawn:
                self._run = run
                self.num_samples = run.drawn
                run.show()
                self._collect(run)
            self.kernel.cleanup()
        if run.interrupted:
            raise KeyboardInterrupt

    def _collect(self, run: Driver) -> None:
        """Keep the results of a run that has draws."""
        raise NotImplementedError

    def _idle(self) -> None:
        """Run the steps of a model without latent variables, as Pyro does."""
        for number in range(self.num_chains):
            suffix = f" [{number}]" if self.num_chains > 1 else ""
            for stage, count in (("Warmup", self.warmup_steps), ("Sample", self._requested)):
                for i in range(count if self.hook_fn is not None else 0):
                    cast(Hook, self.hook_fn)(self.kernel, {}, stage + suffix, i)
        self.num_samples, self._samples = self._requested, {}
        self._diagnostics = [
            {"divergences": [], "acceptance rate": 1.0} for _ in range(self.num_chains)
        ]

    def _named_diagnostics(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return Pyro's diagnostics with names of chains that sort by number."""
        if self._diagnostics[0] is None:
            raise ValueError("there are no draws: call run(...) first")
        found = compute()
        for name in self._diagnostics[0]:
            found[name] = {ChainName(n): row for n, row in enumerate(found[name].values())}
        return found
