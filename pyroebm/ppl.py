"""The bridge to Pyro: an energy as a distribution in a model, and our kernels inside Pyro's own MCMC.

The third way, ``energy.potential_fn()`` for Pyro's NUTS and HMC, is in :mod:`pyroebm.views`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.energy import Energy, check_energy
from pyroebm.kernels.adaptation import Adaptation, resolve
from pyroebm.kernels.base import Kernel, check_kernel
from pyroebm.kernels.starts import draw_starts
from pyroebm.supports import event_numel
from pyroebm.views import Unconstrained, eval_mode

__all__ = ["Boltzmann", "PyroKernel", "initial_states"]


class Boltzmann(TorchDistribution):
    r"""The distribution :math:`p(x) = e^{-E(x)} / Z` of an energy, to stand in a Pyro model.

    ``log_prob`` is normalised when :math:`\log Z` is given or the energy knows it (``energy.log_z``); else it is
    :math:`-E(x)`, enough for MCMC and for SVI over x. ``sample`` draws exactly where the energy can and raises elsewhere:
    inference on a model then starts from ``energy.initial``, see :func:`initial_states`.

    An energy with trainable or latent parameters needs :math:`\log Z` as a tensor that depends on them: without it the gradient
    of ``log_prob`` in the parameters would lack that of :math:`\log Z` (a doubly intractable model), so it is refused. What is
    seen is autograd's graph: inference that takes no gradients (importance sampling, random walks) over parameters of an energy
    cannot be told apart, and neither can a ``log_z`` that depends on other parameters than the energy's.

    Args:
        energy: the energy E.
        log_z: :math:`\log Z`, a number or a tensor of shape (); None takes ``energy.log_z``.
        validate_args: as in Pyro's distributions.

    Raises:
        ValueError: if the energy has trainable or latent parameters and ``log_z`` carries no gradient; if
            ``log_z`` is not one finite number.
        NotImplementedError: from ``sample`` if the energy has no exact draws.

    Example:
        >>> import pyro
        >>> from pyroebm.targets import DoubleWell
        >>> p = Boltzmann(DoubleWell())
        >>> p.normalized, round(float(p.log_prob(torch.tensor(-1.0))), 4)
        (True, -1.0323)
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = False

    def __init__(self, energy: Energy, log_z: float | Tensor | None = None, validate_args: bool | None = None) -> None:
        check_energy(energy)
        self.energy = energy
        self.log_z = energy.log_z if log_z is None else log_z
        if self.log_z is not None:
            number = torch.as_tensor(self.log_z).detach()
            if number.dim() != 0 or not bool(torch.isfinite(number)):
                raise ValueError(f"log_z must be one finite number, got log_z={log_z}")
        if any(parameter.requires_grad for parameter in energy.parameters()):
            self._refuse_unless_log_z_carries_gradients()
        super().__init__(torch.Size(), torch.Size(energy.event_shape), validate_args=validate_args)

    @property
    def normalized(self) -> bool:
        """Whether ``log_prob`` has log Z in it."""
        return self.log_z is not None

    @property
    def support(self) -> Constraint:
        support = self.energy.support
        missing = len(self.event_shape) - support.event_dim
        return constraints.independent(support, missing) if missing > 0 else support

    def expand(self, batch_shape: Sequence[int], _instance: Boltzmann | None = None) -> Boltzmann:
        new = self._get_checked_instance(Boltzmann, _instance)
        new.energy, new.log_z = self.energy, self.log_z
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        values = self.energy(value)
        if values.requires_grad and self._depends_on_more_than(value):
            self._refuse_unless_log_z_carries_gradients()
        log_prob = -values if self.log_z is None else -values - self.log_z
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _depends_on_more_than(self, value: Tensor) -> bool:
        return self.energy(value.detach().reshape(-1, *self.event_shape)[:1]).requires_grad

    def _refuse_unless_log_z_carries_gradients(self) -> None:
        if isinstance(self.log_z, Tensor) and self.log_z.requires_grad:
            return
        raise ValueError(
            f"the energy {type(self.energy).__name__} has trainable or latent parameters, and log Z (log_z={self.log_z}) does not"
            " depend on them: log_prob would be silently wrong in them. Ways out: give log_z as a tensor computed from the"
            " parameters (exact or estimated); train them with an objective made for it (contrastive divergence, score matching,"
            " noise-contrastive estimation); or freeze them with energy.requires_grad_(False)"
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        if not self.energy.has_exact_draws:
            raise NotImplementedError(
                f"{type(self.energy).__name__} has no exact draws. To run NUTS, HMC or a guide on a model with it, let Pyro start"
                " from energy.initial: NUTS(pyroebm.initial_states(model)). To draw from the energy alone, use pyroebm.MCMC"
            )
        return self.energy.sample(event_numel(shape)).reshape(shape + self.event_shape)

    def initial(self) -> Tensor:
        """A legal starting state, **not a draw**, of the shape that one call would give."""
        return self.energy.initial(event_numel(self.batch_shape)).reshape(self.batch_shape + self.event_shape)


class _InitialStates(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
            fn = fn.base_dist
        if isinstance(fn, Boltzmann) and msg["value"] is None and not fn.energy.has_exact_draws:
            msg["value"] = fn.initial()


def initial_states(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose :class:`Boltzmann` sites without exact draws start from ``energy.initial``, for NUTS, HMC or a guide.

    Pyro runs a model once to find its sites, and for that it calls ``sample``, which such a site refuses. The values put in their
    place are starting states and not draws: do not use the wrapped model to simulate.

    Args:
        model: a Pyro model.

    Example:
        >>> import pyro
        >>> from pyroebm import Energy
        >>> quartic = Energy.from_unnormalized(lambda x: -x**4)
        >>> def model():
        ...     return pyro.sample("x", Boltzmann(quartic))
        >>> initial_states(model)().shape
        torch.Size([])
    """
    wrapped: Callable[..., Any] = _InitialStates()(model)
    return wrapped


class PyroKernel(MCMCKernel):
    """A kernel of ours inside ``pyro.infer.MCMC``: one chain a process, as Pyro runs them.

    Warm-up adapts as :class:`pyroebm.MCMC` does. Random numbers come from a generator of its own, seeded from Pyro's at the
    start of each chain: ``pyro.set_rng_seed`` decides the run. For many chains at once use :class:`pyroebm.MCMC`.

    Args:
        kernel: a kernel of :mod:`pyroebm.kernels`.
        energy: the energy to sample; constrained supports are sampled unconstrained and mapped back by Pyro.
        site: name of the variable.
        adaptation: how to adapt in warm-up; None leaves the kernel as it is.

    Example:
        >>> import pyro
        >>> from pyroebm import NUTS
        >>> from pyroebm.targets import DoubleWell
        >>> mcmc = pyro.infer.MCMC(PyroKernel(NUTS(), DoubleWell()), num_samples=20, warmup_steps=20, disable_progbar=True)
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
        self.start_kernel, self.site, self.adaptation = kernel, site, resolve(kernel, adaptation)
        self.target = Unconstrained(energy, keep_discrete=kernel.discrete)
        self.transforms = {} if kernel.discrete else energy.potential_fn(site).transforms
        self._initial: Tensor | None = None

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self.kernel, self.warmup_steps, self._step = self.start_kernel, warmup_steps, 0
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
            if self.adaptation is not None and adapts:
                self.kernel, self._memory = self.adaptation.start(self.kernel, self.target, self._state, self._generator)

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
            self._state = self.kernel.init(self.target, params[self.site].detach().unsqueeze(0), self._generator)
        if self._step < self.warmup_steps and self.adaptation is not None:
            self.kernel, self._state, info, self._memory = self.adaptation.step(
                self.kernel, self.target, self._state, self._memory, self.warmup_steps, self._generator
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
        if (size := getattr(self.kernel, "step_size", None)) is not None:
            facts["step size"] = f"{float(torch.as_tensor(size).mean()):.2e}"
        return facts

    def diagnostics(self) -> dict[str, Any]:
        return {"divergences": self._divergences, "acceptance rate": self._acceptance_rate()}
