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
from pyroebm.kernels.base import Kernel, check_kernel

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
        self.kernel = self.start_kernel
        self.warmup_steps = warmup_steps
        self._step = 0
        self._acceptance, self._divergences = 0.0, list[int]()
        device = self.target.device
        self._generator = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
        with eval_mode(self.target):
            adapts = self.adaptation is not None and warmup_steps > 0
            if self._initial is None:
                u = draw_starts(self.kernel, self.target, 1, self._generator, adapts)
            else:
                u = self._initial.unsqueeze(0)
            self._state = self.kernel.init(self.target, u, self._generator)
            self._adaptation_state: Any = None

    def cleanup(self) -> None:
        """Forget the initial state."""
        self._initial = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """The state at which the chain starts, in unconstrained coordinates."""
        return {self.site: self._state.x[0]}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial = params[self.site].detach()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step from ``params``, in unconstrained coordinates."""
        with eval_mode(self.target):  # the adaptation evaluates the energy too
            return self._sample(params)

    def _sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if not torch.equal(params[self.site], self._state.x[0]):  # the caller changed the state
            self._state = self.kernel.init(
                self.target, params[self.site].detach().unsqueeze(0), self._generator
            )
        if self._step < self.warmup_steps:
            self.kernel, self._state, info, self._adaptation_state = warmup_step(
                self.kernel,
                self.target,
                self._state,
                self._adaptation_state,
                self.warmup_steps,
                self.adaptation,
                self._generator,
            )
        else:
            self._state, info = self.kernel.step(self.target, self._state, self._generator)
        if self._step >= self.warmup_steps:
            self._acceptance += float(info.acceptance_rate)
            if bool(info.diverging):
                self._divergences.append(self._step - self.warmup_steps)
        self._step += 1
        return {self.site: self._state.x[0]}

    def _acceptance_rate(self) -> float:
        return self._acceptance / max(self._step - self.warmup_steps, 1)

    def logging(self) -> OrderedDict[str, str]:
        """Return the acceptance rate and the step size, for the progress bar."""
        entries = OrderedDict([("acc. prob", f"{self._acceptance_rate():.3f}")])
        if (size := self.kernel.step_size) is not None:
            entries["step size"] = f"{float(torch.as_tensor(size).mean()):.2e}"
        return entries

    def diagnostics(self) -> dict[str, Any]:
        """Return the divergent transitions and the acceptance rate after warm-up."""
        return {"divergences": self._divergences, "acceptance rate": self._acceptance_rate()}
