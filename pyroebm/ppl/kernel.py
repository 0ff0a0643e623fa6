"""A kernel of this package inside Pyro's own MCMC."""

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
    """A kernel of ours inside ``pyro.infer.MCMC``: one chain a process, as Pyro runs them.

    Warm-up adapts as :class:`pyroebm.MCMC` does. Random numbers come from a generator of its own,
    seeded from Pyro's at the start of each chain: ``pyro.set_rng_seed`` decides the run. For many
    chains at once use :class:`pyroebm.MCMC`.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        energy: the energy to sample; constrained supports are sampled unconstrained and mapped back
            by Pyro.
        site: name of the variable.
        adaptation: how to adapt in warm-up; None leaves the kernel as it is.

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

    model = None  # Pyro's driver asks for it

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
            self._memory: Any = None

    def cleanup(self) -> None:
        self._initial = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return {self.site: self._state.x[0]}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial = params[self.site].detach()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        with eval_mode(self.target):  # the adaptation looks at the energy too
            return self._sample(params)

    def _sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if not torch.equal(params[self.site], self._state.x[0]):  # the caller moved the chain
            self._state = self.kernel.init(
                self.target, params[self.site].detach().unsqueeze(0), self._generator
            )
        if self._step < self.warmup_steps:
            self.kernel, self._state, info, self._memory = warmup_step(
                self.kernel,
                self.target,
                self._state,
                self._memory,
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
        facts = OrderedDict([("acc. prob", f"{self._acceptance_rate():.3f}")])
        if (size := self.kernel.step_size) is not None:
            facts["step size"] = f"{float(torch.as_tensor(size).mean()):.2e}"
        return facts

    def diagnostics(self) -> dict[str, Any]:
        return {"divergences": self._divergences, "acceptance rate": self._acceptance_rate()}
