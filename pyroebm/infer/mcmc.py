"""MCMC with Pyro's arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import diagnostics as pyro_diagnostics
from pyro.infer.mcmc.util import print_summary, select_samples
from torch import Tensor

from pyroebm.core.rng import seeded_generator
from pyroebm.core.rowwise import RowwiseEnergy
from pyroebm.diagnostics.arviz_data import to_arviz
from pyroebm.diagnostics.convergence import Diagnosis
from pyroebm.diagnostics.stuck import describe_stuck
from pyroebm.infer.kernels import HMC, NUTS, Settings
from pyroebm.kernels.base import ContinuousKernel
from pyroebm.mcmc import sampler as mcmc
from pyroebm.ppl.model import ModelEnergy

__all__ = ["MCMC"]


class PotentialEnergy(RowwiseEnergy):
    """A ``potential_fn`` of Pyro as an energy over all chains.

    Pyro's function maps a dict of unconstrained tensors of one chain to a scalar.

    Args:
        potential_fn: the potential.
        params: starting values, with a leading chain axis, which define names and shapes.
        transforms: maps from a site's own space to the unconstrained one, applied to the draws
            only.
    """

    def __init__(
        self,
        potential_fn: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        transforms: Mapping[str, Any],
    ) -> None:
        super().__init__(
            {name: value.shape[1:] for name, value in params.items()}, next(iter(params.values()))
        )
        self.potential, self.transforms = potential_fn, transforms
        first = self.join(params)[0].detach()
        self.batch_by(torch.stack([first, 0.9 * first + 0.1]))

    def row_energy(self, u: Tensor) -> Tensor:
        """Compute the energy of one chain."""
        with pyro.validation_enabled(False):
            return self.potential(self.split(u))

    def _name(self) -> str:
        return "the potential_fn"

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Split states into sites in their own spaces."""
        parts = self.split(x)
        return {
            name: self.transforms[name].inv(part) if name in self.transforms else part
            for name, part in parts.items()
        }


class _Hooked(mcmc.MCMC):
    """The library's driver, with a function called after each step."""

    after_step: Callable[[str, int], None] | None = None

    @property
    def _single_steps(self) -> bool:
        return self.after_step is not None

    def step_size(self) -> float:
        """Return the current step size: the median over chains."""
        return float(torch.as_tensor(cast(ContinuousKernel[Any], self.kernel).step_size).median())

    def _after_turn(self, label: str, turn: int) -> None:
        super()._after_turn(label, turn)
        if self.after_step is not None:
            self.after_step("Warmup" if label == "warm-up" else "Sample", turn)


class MCMC(AbstractMCMC):
    """Run NUTS or HMC with the arguments of ``pyro.infer.MCMC``; all chains are one batch.

    ``pyro.set_rng_seed`` determines the run: its seed is drawn from torch's default generator.
    Ctrl-C keeps the draws that all chains have finished. To continue a run, or to stream draws to a
    folder, run :class:`pyroebm.ModelEnergy` with :class:`pyroebm.MCMC`.

    Args:
        kernel: :class:`NUTS` or :class:`HMC` of this module.
        num_samples: number of draws of each chain.
        warmup_steps: number of warm-up steps, whose draws are not kept; None uses ``num_samples``.
        initial_params: starting values in unconstrained coordinates, with a leading chain axis if
            ``num_chains`` > 1.
        num_chains: number of chains.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after each step, with unconstrained
            values (with a leading chain axis if ``num_chains`` > 1), the stage ``"Warmup"`` or
            ``"Sample"``, and the number of the step in the stage.
        mp_context: ignored.
        disable_progbar: do not show the progress bar, which otherwise appears after a second in a
            terminal, a notebook or a log file.
        disable_validation: run the model without validation of its distributions' arguments; False
            validates its first run, None keeps the global setting. The density itself is always
            evaluated without validation.
        transforms: as those of the kernel, which they replace.
        save_params: names of the sites to keep; None keeps all.

    Raises:
        ValueError: if an argument has the wrong kind; if ``potential_fn`` is given without
            ``initial_params``, or these do not have one row for each chain.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> mcmc = MCMC(NUTS(model), num_samples=50, warmup_steps=50, num_chains=8)
        >>> mcmc.run(torch.tensor([1.0, 2.0, 3.0]))
        >>> mcmc.get_samples()["mean"].shape, mcmc.get_samples(group_by_chain=True)["mean"].shape
        (torch.Size([400]), torch.Size([8, 50]))
    """

    def __init__(
        self,
        kernel: NUTS | HMC,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(kernel, Settings):
            raise ValueError(
                "kernel must be a NUTS or HMC of pyroebm.infer, got"
                f" {type(kernel).__module__}.{type(kernel).__name__}"
            )
        if kernel.potential_fn is not None and not initial_params:
            raise ValueError(
                "potential_fn requires initial_params, a dict of starting values, for the names and"
                f" shapes of its sites, got initial_params={initial_params}"
            )
        if initial_params and num_chains == 1:
            initial_params = {name: value.unsqueeze(0) for name, value in initial_params.items()}
        if any(
            value.dim() == 0 or len(value) != num_chains
            for value in (initial_params or {}).values()
        ):
            shapes = {name: tuple(value.shape) for name, value in (initial_params or {}).items()}
            raise ValueError(
                f"initial_params must have a leading axis of num_chains={num_chains}, got shapes"
                f" {shapes}"
            )
        super().__init__(
            kernel, num_chains, kernel.transforms if transforms is None else transforms
        )
        self.num_samples, self.warmup_steps = (
            num_samples,
            num_samples if warmup_steps is None else warmup_steps,
        )
        self.initial_params = initial_params
        self.hook_fn = hook_fn
        self.save_params = save_params
        self.progress, self.disable_validation = (
            False if disable_progbar else None,
            disable_validation,
        )
        self._driver()  # checks the counts here instead of in run
        self._run: _Hooked | None = None
        self._samples: dict[str, Tensor] = {}

    def _driver(self, seed: int = 0) -> _Hooked:
        return _Hooked(
            self.kernel.build(),
            self.num_samples,
            self.warmup_steps,
            self.num_chains,
            seed=seed,
            adaptation=self.kernel.adaptation,
            save_warmup=False,
            progress=self.progress,
            chain_batch_size=self.num_chains,
        )

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the warm-up and draw samples.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        seed, start = torch.randint(2**63 - 1, (2,)).tolist()
        off = self.disable_validation
        with contextlib.nullcontext() if off is None else pyro.validation_enabled(not off):
            energy = self._energy(*args, **kwargs)
            run, initial = (
                self._driver(seed),
                self._initial(energy, seeded_generator(start, energy.device)),
            )
            if self.hook_fn is not None:
                run.after_step = functools.partial(self._call_hook, self.hook_fn, run, energy)
            run.run(energy, initial)
        samples = run.get_samples(group_by_chain=True)
        if unknown := set(self.save_params or ()) - set(samples):
            raise ValueError(
                f"save_params must name sites of {sorted(samples)}, got {sorted(unknown)}"
            )
        self._run, self.kernel.step_size = run, run.step_size()
        self._samples = {name: samples[name] for name in self.save_params or samples}

    def _call_hook(
        self, hook: Callable[..., Any], run: _Hooked, energy: RowwiseEnergy, stage: str, i: int
    ) -> None:
        self.kernel.step_size = run.step_size()
        hook(
            self.kernel,
            energy.split(run.state.x if self.num_chains > 1 else run.state.x[0]),
            stage,
            i,
        )

    def _energy(self, *args: Any, **kwargs: Any) -> RowwiseEnergy:
        if self.kernel.potential_fn is not None:
            return PotentialEnergy(
                self.kernel.potential_fn, self.initial_params or {}, self.transforms or {}
            )
        return ModelEnergy(self.kernel.model, *args, **kwargs)

    def _initial(self, energy: RowwiseEnergy, generator: torch.Generator) -> Tensor | None:
        if isinstance(energy, ModelEnergy) and not self.initial_params:
            strategy = self.kernel.init_strategy
            return (
                None
                if strategy is init_to_uniform
                else energy.initial(self.num_chains, generator, strategy)
            )
        given, known = self.initial_params or {}, self.transforms or {}
        if isinstance(energy, ModelEnergy) and known:
            own = energy.constrain(energy.join(given))
            return energy.unconstrain(
                {
                    name: known[name].inv(given[name]) if name in known else own[name]
                    for name in given
                }
            )
        return energy.join(given)

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """Return draws of each site in its own space.

        Args:
            num_samples: number of draws, resampled with replacement; None returns all.
            group_by_chain: keep the chain axis.
        """
        self._finished()
        samples: dict[str, Tensor] = select_samples(self._samples, num_samples, group_by_chain)
        return samples

    def get_stats(self) -> dict[str, Tensor]:
        """Return statistics of each draw, as :meth:`pyroebm.MCMC.get_stats`."""
        return self._finished().get_stats()

    def diagnostics(self) -> dict[str, Any]:
        """Return effective sample size and R-hat of each site, and divergences, as Pyro does.

        Divergences and acceptance rates are given for each chain.
        """
        stats, chains = self.get_stats(), [f"chain {c}" for c in range(self.num_chains)]
        return {
            **pyro_diagnostics(self._samples),
            "divergences": {
                name: row.nonzero().flatten().tolist()
                for name, row in zip(chains, stats["diverging"], strict=True)
            },
            "acceptance rate": {
                name: float(row.mean())
                for name, row in zip(chains, stats["acceptance_rate"], strict=True)
            },
        }

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's summary table of each site, and the number of divergences.

        Args:
            prob: mass of the interval.
        """
        divergences = int(self.get_stats()["diverging"].sum())
        print_summary(self._samples, prob=prob)
        print(f"Number of divergences: {divergences}")
        if message := describe_stuck(
            self._finished().stuck_chains(), self.num_chains, self._finished().state.energy
        ):
            print(message)

    def to_arviz(self) -> Any:
        """Convert draws and statistics to ArviZ's InferenceData (DataTree from ArviZ 1.0 on)."""
        run = self._finished()
        attributes = {"kernel": type(self.kernel).__name__, "seed": str(run.seed)}
        return to_arviz(self._samples, run.get_stats(), attrs=attributes)

    def diagnose(self, max_r_hat: float = 1.01, min_ess: float = 400.0) -> Diagnosis:
        """Diagnose the draws; see :func:`pyroebm.diagnostics.diagnose`.

        Args:
            max_r_hat: threshold of R-hat.
            min_ess: threshold of the effective sample size.
        """
        return self._finished().diagnose(max_r_hat, min_ess)

    def _finished(self) -> _Hooked:
        if self._run is None:
            raise ValueError("there are no draws: call run(...) first")
        return self._run
