"""A kernel of this package for Pyro's own MCMC."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.wrappers import PotentialFn, eval_mode, unconstrain
from pyroebm.kernels.adaptation.starts import draw_starts
from pyroebm.kernels.adaptation.windows import Adaptation, resolve, warmup_step
from pyroebm.kernels.base import Info, Kernel, check_kernel

__all__ = ["PyroKernel"]


class PyroKernel(MCMCKernel):
    """A kernel of this package for ``pyro.infer.MCMC``, which runs one chain in each process.

    Warm-up adapts the kernel as :class:`pyroebm.MCMC` does. Each chain has a generator, seeded from
    torch's default generator, so ``pyro.set_rng_seed`` reproduces the run. For many chains in one
    process use :class:`pyroebm.MCMC`.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        energy: the energy; constrained supports are sampled in unconstrained coordinates and mapped
            back by Pyro.
        site: name of the variable.
        adaptation: adaptation in warm-up; None does not adapt.

    Example:
        >>> import pyro
        >>> from pyroebm import NUTS
        >>> from pyroebm.targets import DoubleWell
        >>> mcmc = pyro.infer.MCMC(
        ...     PyroKernel(NUTS(), DoubleWell()),
        ...     num_samples=20,
        ...     warmup_steps=20,
        ...     disable_progbar=True,
        ... )
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([20])
    """

    model = None  # read by Pyro's driver

    def __init__(
        self,
        kernel: Kernel[Any],
        energy: Energy,
        site: str = "x",
        adaptation: Adaptation | Literal["default"] | None = "default",
    ) -> None:
        check_kernel(kernel)
        check_energy(energy)
        self.start_kernel = kernel
        self.site = site
        self.adaptation = resolve(kernel, adaptation)
        self.target = unconstrain(energy)
        kernel.check_support(self.target)
        self.transforms = {} if kernel.discrete else PotentialFn(energy, site).transforms
        self._initial: Tensor | None = None

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Draw an initial state and start a chain."""
        device = self.target.device
        self._generator = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
        with eval_mode(self.target):
            if self._initial is None:
                adapts = self.adaptation is not None and warmup_steps > 0
                u = draw_starts(self.start_kernel, self.target, 1, self._generator, adapts)
            else:
                u = self._initial.unsqueeze(0)
            state = self.start_kernel.init(self.target, u, self._generator)
        self.begin(warmup_steps, state)
        self._adaptation_state: Any = None

    def begin(self, warmup_steps: int, state: Any) -> None:
        """Start a record of a chain at ``state``, a state of one chain, before its warm-up."""
        self.kernel = self.start_kernel
        self.warmup_steps = warmup_steps
        self.state: Any = state
        self._step = 0
        self._acceptance = 0.0
        self._divergences = list[int]()

    def follow(self, kernel: Kernel[Any], state: Any, info: Info) -> None:
        """Record a step: one of :meth:`sample`, or of a driver that moves many chains.

        Args:
            kernel: the kernel of the next step.
            state: the state after the step, of one chain.
            info: the report of the step, of one chain.
        """
        if self._step == self.warmup_steps:
            self._acceptance = 0.0  # the rate is that of the draws from here on
        self.kernel, self.state = kernel, state
        self._acceptance += float(info.acceptance_rate)
        if self._step >= self.warmup_steps and bool(info.diverging):
            self._divergences.append(self._step - self.warmup_steps)
        self._step += 1

    def add_draws(self, acceptance_rate: Tensor, diverging: Tensor) -> None:
        """Record all draws of a driver, after :meth:`begin`.

        Args:
            acceptance_rate: of each draw, shape ``(draws,)``.
            diverging: of each draw, shape ``(draws,)``.
        """
        self._step = self.warmup_steps + len(diverging)
        self._acceptance = float(acceptance_rate.sum())
        self._divergences = diverging.nonzero().flatten().tolist()

    def refresh(self) -> None:
        """Evaluate the energy and its gradient at the current state again."""
        self.state = self.kernel.refresh(self.target, self.state)

    def cleanup(self) -> None:
        """Forget the initial state."""
        self._initial = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """The state at which the chain starts, in unconstrained coordinates."""
        return {self.site: self.state.x[0].clone()}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial = params[self.site].detach()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step from ``params``, in unconstrained coordinates.

        The energy and the gradient at ``params`` are those of the step before, unless ``params`` is
        another state than it returned.
        """
        u = params[self.site].detach().unsqueeze(0)
        with eval_mode(self.target):  # the adaptation evaluates the energy too
            if not torch.equal(u, self.state.x):
                self.state = self.kernel.init(self.target, u, self._generator)
            warms = self._step < self.warmup_steps
            kernel, state, info, self._adaptation_state = warmup_step(
                self.kernel,
                self.target,
                self.state,
                self._adaptation_state,
                self.warmup_steps,
                self.adaptation if warms else None,
                self._generator,
            )
        self.follow(kernel, state, info)
        # a copy, since the caller may change it in place
        return {self.site: state.x[0].clone()}

    def _acceptance_rate(self) -> float:
        warms = self._step <= self.warmup_steps
        return self._acceptance / max(self._step - (0 if warms else self.warmup_steps), 1)

    def logging(self) -> OrderedDict[str, str]:
        """Return the step size and the acceptance rate of this stage, for the progress bar."""
        entries = OrderedDict[str, str]()
        if (size := self.kernel.step_size) is not None:
            entries["step size"] = f"{float(torch.as_tensor(size).mean()):.2e}"
        entries["acc. prob"] = f"{self._acceptance_rate():.3f}"
        return entries

    def diagnostics(self) -> dict[str, Any]:
        """Return the divergent transitions and the acceptance rate after warm-up."""
        return {"divergences": self._divergences, "acceptance rate": self._acceptance_rate()}
