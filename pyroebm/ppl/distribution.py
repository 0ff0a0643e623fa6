"""An energy as a distribution in a Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.supports import event_numel

__all__ = ["Boltzmann", "initial_states"]


class Boltzmann(TorchDistribution):
    r"""The distribution :math:`p(x) = e^{-E(x)} / Z` of an energy, for use in a Pyro model.

    ``log_prob`` is normalized if :math:`\log Z` is given or known to the energy
    (``energy.log_z``). Otherwise it is :math:`-E(x)`, which suffices for MCMC and for SVI over x.
    ``sample`` returns exact draws if the energy has them and raises otherwise; inference in such a
    model starts from ``energy.initial``, see :func:`initial_states`.

    An energy with trainable or latent parameters needs :math:`\log Z` as a tensor that depends on
    them. Otherwise the gradient of ``log_prob`` in the parameters would lack that of :math:`\log Z`
    (a doubly intractable model), and a ValueError is raised. This check uses the autograd graph: it
    detects neither parameters in inference without gradients (importance sampling, random walks),
    nor a ``log_z`` that depends on the wrong parameters.

    Args:
        energy: the energy E.
        log_z: :math:`\log Z`, a number or a tensor of shape (); None is ``energy.log_z``.
        validate_args: as in Pyro's distributions.

    Raises:
        ValueError: if the energy has trainable or latent parameters and ``log_z`` has no gradient,
            or ``log_z`` is no finite scalar.
        NotImplementedError: by ``sample``, if the energy has no exact draws.

    Example:
        >>> import pyro
        >>> from pyroebm.targets import DoubleWell
        >>> p = Boltzmann(DoubleWell())
        >>> p.normalized, round(float(p.log_prob(torch.tensor(-1.0))), 4)
        (True, -1.0323)
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = False

    def __init__(
        self, energy: Energy, log_z: float | Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        check_energy(energy)
        self.energy = energy
        self.log_z = energy.log_z if log_z is None else log_z
        if self.log_z is not None:
            number = torch.as_tensor(self.log_z).detach()
            if number.dim() != 0 or not bool(torch.isfinite(number)):
                raise ValueError(f"log_z must be a finite scalar, got log_z={log_z}")
        if any(parameter.requires_grad for parameter in energy.parameters()):
            self._check_gradient_of_log_z()
        super().__init__(torch.Size(), torch.Size(energy.event_shape), validate_args=validate_args)

    @property
    def normalized(self) -> bool:
        """Whether ``log_prob`` includes log Z."""
        return self.log_z is not None

    @property
    def support(self) -> Constraint:
        """The support of the energy."""
        support = self.energy.support
        missing = len(self.event_shape) - support.event_dim
        return constraints.independent(support, missing) if missing > 0 else support

    def expand(self, batch_shape: Sequence[int], _instance: Boltzmann | None = None) -> Boltzmann:
        """Return the distribution with another batch shape."""
        new = self._get_checked_instance(Boltzmann, _instance)
        new.energy, new.log_z = self.energy, self.log_z
        TorchDistribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Compute :math:`-E(x) - \log Z`, or :math:`-E(x)` if log Z is unknown."""
        if self._validate_args:
            self._validate_sample(value)
        values = self.energy(value)
        if values.requires_grad and self._depends_on_more_than(value):
            self._check_gradient_of_log_z()
        log_prob = -values if self.log_z is None else -values - self.log_z
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _depends_on_more_than(self, value: Tensor) -> bool:
        return self.energy(value.detach().reshape(-1, *self.event_shape)[:1]).requires_grad

    def _check_gradient_of_log_z(self) -> None:
        if isinstance(self.log_z, Tensor) and self.log_z.requires_grad:
            return
        raise ValueError(
            f"log_z must depend on the trainable or latent parameters of the energy"
            f" {type(self.energy).__name__}, got log_z={self.log_z}: the gradient of log_prob in"
            " them would be wrong. Give log_z as a tensor computed from the parameters (exact or"
            " estimated); or train them with an objective (contrastive divergence, score matching,"
            " noise-contrastive estimation); or freeze them with energy.requires_grad_(False)"
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw exactly; raise NotImplementedError if the energy has no exact draws."""
        shape = torch.Size(sample_shape) + self.batch_shape
        if not self.energy.has_exact_draws:
            raise NotImplementedError(
                f"{type(self.energy).__name__} has no exact draws. To run NUTS, HMC or a guide on"
                " a model with it, start from energy.initial:"
                " NUTS(pyroebm.ppl.initial_states(model)). To sample the energy alone, use"
                " pyroebm.MCMC"
            )
        return self.energy.sample(event_numel(shape)).reshape(shape + self.event_shape)

    def initial(self) -> Tensor:
        """Return a valid initial state, **not a draw**, of the shape of ``sample()``."""
        return self.energy.initial(event_numel(self.batch_shape)).reshape(
            self.batch_shape + self.event_shape
        )


class _InitialStates(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
            fn = fn.base_dist
        if isinstance(fn, Boltzmann) and msg["value"] is None and not fn.energy.has_exact_draws:
            msg["value"] = fn.initial()


def initial_states(model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model so that its :class:`Boltzmann` sites start from ``energy.initial``.

    This concerns sites without exact draws. Pyro runs a model once to find its sites, and calls
    ``sample``, which raises for such a site.
    Use the wrapped model in NUTS, HMC or a guide. The values of these sites are initial states and
    no draws: do not use the wrapped model for simulation.

    Args:
        model: a Pyro model.

    Returns:
        The wrapped model.

    Example:
        >>> import pyro
        >>> from pyroebm.core import Unnormalized
        >>> quartic = Unnormalized(lambda x: -(x**4))
        >>> def model():
        ...     return pyro.sample("x", Boltzmann(quartic))
        >>> initial_states(model)().shape
        torch.Size([])
    """
    wrapped: Callable[..., Any] = _InitialStates()(model)
    return wrapped
