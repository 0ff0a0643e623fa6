"""StreamingMCMC with Pyro's arguments: statistics of draws that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro.infer.mcmc.api
from pyro.ops.streaming import CountMeanVarianceStats, StatsOfDict, StreamingStats
from torch import Tensor

from pyroebm.infer.driver import Driver, Vectorized, is_vectorized
from pyroebm.infer.kernels import HMC
from pyroebm.infer.potential import PotentialEnergy
from pyroebm.ppl.model import ModelEnergy

__all__ = ["StreamingMCMC"]


class StreamingMCMC(Vectorized, pyro.infer.mcmc.api.StreamingMCMC):
    """``pyro.infer.mcmc.StreamingMCMC`` that moves all chains of NUTS and HMC as one batch.

    Each draw of each chain is given to ``statistics`` and not kept. Other kernels of Pyro are run
    by Pyro's driver. It is a subclass of Pyro's class, whose results it has: ``get_statistics`` and
    ``diagnostics``.

    Args:
        kernel: as for :class:`MCMC`.
        num_samples: as for :class:`MCMC`.
        warmup_steps: as for :class:`MCMC`.
        initial_params: as for :class:`MCMC`.
        statistics: what to compute, updated with a dict from ``(chain, site)`` to a draw; None is
            the count, mean and variance of each site.
        num_chains: as for :class:`MCMC`.
        hook_fn: as for :class:`MCMC`.
        disable_progbar: as for :class:`MCMC`.
        disable_validation: as for :class:`MCMC`.
        transforms: as for :class:`MCMC`.
        save_params: names of the sites of which statistics are computed; None takes all.
        seed: as for :class:`MCMC`.
        compile: as for :class:`MCMC`.

    Raises:
        ValueError: as :class:`MCMC`.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroebm.infer import NUTS
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> mcmc = StreamingMCMC(NUTS(model), num_samples=50, warmup_steps=50, num_chains=2)
        >>> mcmc.run()
        >>> mcmc.get_statistics()[0, "x"]["count"]
        50
    """

    def __init__(
        self,
        kernel: HMC | Any,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        statistics: StreamingStats | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
        *,
        seed: int | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        self._check_kernel(kernel, seed=seed, compile=compile)
        if not is_vectorized(kernel):
            super().__init__(
                kernel,
                num_samples,
                warmup_steps,
                initial_params,
                statistics,
                num_chains,
                hook_fn,
                disable_progbar,
                disable_validation,
                transforms,
                save_params,
            )
            return
        pyro.infer.mcmc.api.AbstractMCMC.__init__(self, kernel, num_chains, transforms)
        self._statistics = statistics or StatsOfDict(default=CountMeanVarianceStats)
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
            "moments",
        )

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the warm-up, and update the statistics with each draw.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        if is_vectorized(self.kernel):
            self._sample(args, kwargs, self._updates)
        else:
            super().run(*args, **kwargs)

    def _updates(self, energy: ModelEnergy | PotentialEnergy) -> Callable[[Tensor], object]:
        """Return the function that updates the statistics with draws ``(chains, dim)``."""
        names = sorted(self.save_params or energy.shapes)

        def update(x: Tensor) -> None:
            sites = energy.named(x)
            for chain in range(self.num_chains):
                draw = {(chain, name): sites[name][chain] for name in names}
                self._statistics.update(draw)

        return update

    def _collect(self, run: Driver) -> None:
        self._diagnostics = [chain.diagnostics() for chain in run.chains]

    def diagnostics(self) -> dict[str, Any]:
        """Return R-hat of each site, from its mean and variance, and divergences, as Pyro does.

        Divergences and acceptance rates are given for each chain.
        """
        return self._named_diagnostics(super().diagnostics)
