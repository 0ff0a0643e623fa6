"""MCMC with Pyro's arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro.infer.mcmc.api
from torch import Tensor

from pyroebm.diagnostics.arviz_data import Coords, Dims, to_arviz
from pyroebm.diagnostics.convergence import Diagnosis, Observables
from pyroebm.diagnostics.pyro_model import from_pyro, model_groups
from pyroebm.diagnostics.stuck import describe_stuck
from pyroebm.infer.driver import Driver, Vectorized, is_vectorized
from pyroebm.infer.kernels import HMC

__all__ = ["MCMC"]


class MCMC(Vectorized, pyro.infer.mcmc.api.MCMC):
    """``pyro.infer.MCMC`` that moves all chains of :class:`NUTS` and :class:`HMC` as one batch.

    It is a subclass of Pyro's class, whose results it has: ``get_samples``, ``diagnostics``,
    ``summary``. ``pyro.set_rng_seed`` determines a run, unless ``seed`` is given. Ctrl-C and an
    exception of ``hook_fn`` are raised by :meth:`run` as in Pyro; the draws that all chains have
    finished are kept.

    Other kernels of Pyro (``RandomWalkKernel``, a subclass of NUTS with a ``setup`` or ``sample``
    of its own) are run by Pyro's driver.

    Args:
        kernel: :class:`NUTS` or :class:`HMC` of this module, or another kernel of Pyro.
        num_samples: number of draws of each chain.
        warmup_steps: number of warm-up steps, whose draws are not kept; None uses ``num_samples``.
        initial_params: starting values in unconstrained coordinates, with a leading chain axis if
            ``num_chains`` > 1.
        num_chains: number of chains.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` for each chain after each step,
            with its unconstrained values, the stage ``"Warmup"`` or ``"Sample"`` (with several
            chains ``"Warmup [0]"``, the number of the chain), and the number of the step in the
            stage. If it changes a value in place, the chain continues from the changed value, and
            the draw is that value.
        mp_context: ignored, for kernels of this module.
        disable_progbar: do not show the progress bar, which otherwise appears after a second in a
            terminal, a notebook or a log file.
        disable_validation: run the model without validation of its distributions' arguments; False
            validates its first run, None keeps the global setting. The density itself is always
            evaluated without validation.
        transforms: as those of the kernel, which they replace.
        save_params: names of the sites to keep; None keeps all.
        seed: seed of the run, which then does not depend on torch's default generator.
        compile: whether to compile the gradient, as for :class:`pyroebm.MCMC`.
        store: a folder to stream the draws to; :func:`pyroebm.open_run` opens it, and
            :meth:`resume` finishes a run that was interrupted.

    Raises:
        ValueError: if an argument has the wrong kind; if ``potential_fn`` is given without
            ``initial_params``, or these do not have one row for each chain.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyroebm.infer import NUTS
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
        kernel: HMC | Any,
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
        *,
        seed: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        store: str | Path | None = None,
    ) -> None:
        self._check_kernel(kernel, seed=seed, compile=compile, store=store)
        if not is_vectorized(kernel):
            super().__init__(
                kernel,
                num_samples,
                warmup_steps,
                initial_params,
                num_chains,
                hook_fn,
                mp_context,
                disable_progbar,
                disable_validation,
                transforms,
                save_params,
            )
            return
        # not that of Pyro's MCMC, which starts processes
        pyro.infer.mcmc.api.AbstractMCMC.__init__(self, kernel, num_chains, transforms)
        self._configure(
            num_samples,
            warmup_steps,
            initial_params,
            hook_fn,
            disable_progbar,
            disable_validation,
            save_params,
            seed,
            compile,
            "draws",
            store,
        )

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the warm-up and draw samples.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        if is_vectorized(self.kernel):
            self._sample(args, kwargs)
        else:
            super().run(*args, **kwargs)

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Finish the interrupted run in ``store``, with the same draws as an uninterrupted one.

        Args:
            *args: arguments of the model, those of the run.
            **kwargs: keyword arguments of the model, those of the run.

        Raises:
            ValueError: without ``store``, or if the run in the folder has other settings or another
                density.
            FileError: if the folder holds no run, a file of it is missing or damaged, or another
                process uses it.
        """
        if self.store is None:
            raise ValueError(
                "resume requires the folder of a run, got store=None: construct"
                " MCMC(..., store=folder)"
            )
        self._sample(args, kwargs, resume=True)

    def run_more(self, num_samples: int) -> None:
        """Continue the chains of the last run for more draws: the same as one longer run.

        Args:
            num_samples: number of further draws of each chain.
        """
        run = self._ours()
        self._finish(run, lambda: run.run_more(num_samples))

    def _collect(self, run: Driver) -> None:
        samples = run.get_samples(group_by_chain=True)
        self._samples = {name: samples[name] for name in self.save_params or sorted(samples)}
        stats = run.get_stats()
        self._diagnostics = [
            {
                "divergences": diverging.nonzero().flatten().tolist(),
                "acceptance rate": float(rates.mean()),
            }
            for diverging, rates in zip(stats["diverging"], stats["acceptance_rate"], strict=True)
        ]

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """Return draws of each site in its own space.

        Args:
            num_samples: number of draws, resampled with replacement; None returns all.
            group_by_chain: keep the chain axis.
        """
        self._check_drawn()
        samples: dict[str, Tensor] = super().get_samples(num_samples, group_by_chain)
        return samples

    def get_stats(self) -> dict[str, Tensor]:
        """Return statistics of each draw, as :meth:`pyroebm.MCMC.get_stats`."""
        return self._ours().get_stats()

    def diagnostics(self) -> dict[str, Any]:
        """Return effective sample size and R-hat of each site, and divergences, as Pyro does.

        Divergences and acceptance rates are given for each chain.
        """
        return self._named_diagnostics(super().diagnostics)

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's summary table of each site, and the number of divergences.

        Args:
            prob: mass of the interval.
        """
        self._check_drawn()
        super().summary(prob)
        run = self._run
        if run is not None and (
            message := describe_stuck(run.stuck_chains(), self.num_chains, run.state.energy)
        ):
            print(message)

    def to_arviz(
        self,
        *,
        log_likelihood: bool = False,
        prior: Mapping[str, Tensor] | None = None,
        posterior_predictive: Mapping[str, Tensor] | None = None,
        dims: Dims | None = None,
        coords: Coords | None = None,
    ) -> Any:
        """Convert draws and statistics to ArviZ's InferenceData (DataTree from ArviZ 1.0 on).

        Arguments and groups are those of :meth:`pyroebm.MCMC.to_arviz`. The posterior has the sites
        of ``save_params`` and the deterministic ones.
        """
        self._check_drawn()
        given: dict[str, Any] = {
            "log_likelihood": log_likelihood,
            "prior": prior,
            "posterior_predictive": posterior_predictive,
            "dims": dims,
        }
        run = self._run
        if run is None:  # another kernel, with draws of Pyro's driver
            return from_pyro(self, coords=coords, **given)
        groups = model_groups(
            run.energy, run.get_samples(group_by_chain=True), keep=self.save_params, **given
        )
        attributes = {"kernel": type(self.kernel).__name__, "seed": str(run.seed)}
        return to_arviz(sample_stats=run.get_stats(), coords=coords, attrs=attributes, **groups)

    def diagnose(
        self,
        max_r_hat: float = 1.01,
        min_ess: float = 400.0,
        *,
        observables: Observables | None = None,
    ) -> Diagnosis:
        """Diagnose the draws; see :func:`pyroebm.diagnostics.diagnose`.

        Args:
            max_r_hat: threshold of R-hat.
            min_ess: threshold of the effective sample size.
            observables: functions of the draws to diagnose instead of the variables.
        """
        return self._ours().diagnose(max_r_hat, min_ess, observables=observables)

    def _check_drawn(self) -> None:
        if self._samples is None:
            raise ValueError("there are no draws: call run(...) first")

    def _ours(self) -> Driver:
        self._check_drawn()
        if self._run is None:
            raise ValueError(
                "this needs draws of NUTS or HMC of pyroebm.infer for a model with latent"
                f" variables, got draws of {type(self.kernel).__name__} without a record"
            )
        return self._run
