"""Wrappers of energies: conditioned, unnormalized, relaxed, unconstrained, and Pyro's potential."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyroebm.core.conditionals import Index, blocks_of, conditional_of, restricted
from pyroebm.core.energy import Energy, SharesLogZ, View
from pyroebm.core.supports import base_constraint, event_sum, is_discrete, is_real, unconstraining

__all__ = [
    "LogRegularized",
    "Conditioned",
    "check_weighable",
    "Unnormalized",
    "Relaxed",
    "Unconstrained",
    "PotentialFn",
    "eval_mode",
    "unconstrain",
]


class Conditioned(Energy):
    r"""Conditional density :math:`p(x_{free} \mid x_{obs}) \propto e^{-E(x_{free}, x_{obs})}`.

    Args:
        energy: the energy over whole events.
        observed: values of the clamped entries, shape ``event_shape``; the other entries are
            ignored.
        mask: True where an entry is clamped, shape ``event_shape``.

    Raises:
        ValueError: if a shape differs from ``event_shape``, if no entry is free, if the support
            couples entries, or if an observed value is outside the support.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> e = Conditioned(
        ...     Gaussian(torch.zeros(2)), torch.tensor([3.0, 0.0]), torch.tensor([True, False])
        ... )
        >>> e.event_shape, e(torch.zeros(1, 1))
        (torch.Size([1]), tensor([4.5000]))
    """

    observed: Tensor
    mask: Tensor

    def __init__(self, energy: Energy, observed: Tensor, mask: Tensor) -> None:
        shape = tuple(energy.event_shape)
        if tuple(observed.shape) != shape or tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"observed and mask (boolean) must have shape {shape}, the event_shape, got shapes"
                f" {tuple(observed.shape)}"
                f" and {tuple(mask.shape)}, mask of dtype {mask.dtype}"
            )
        if bool(mask.all()):
            raise ValueError(
                f"mask must leave at least one entry free, got all {mask.numel()} clamped"
            )
        support = base_constraint(energy.support)
        if support.event_dim or any(
            isinstance(bound, Tensor) and bound.dim() for bound in vars(support).values()
        ):
            raise ValueError(
                f"support={energy.support} couples the entries of an event, or bounds each"
                " differently: they cannot be clamped"
                " one by one"
            )
        if not bool(support.check(observed)[mask].all()) or not bool(
            torch.isfinite(observed[mask]).all()
        ):
            raise ValueError(
                f"observed must lie in support={energy.support} where it is clamped, got"
                f" {observed[mask].tolist()}"
            )
        super().__init__((int((~mask).sum()),), support)
        self.energy = energy
        self.register_buffer(
            "observed", observed.detach().to(energy.device, energy.dtype, copy=True)
        )
        self.register_buffer("mask", mask.to(energy.device, copy=True))

    def complete(self, x: Tensor) -> Tensor:
        """Insert the observed entries: ``(*batch, n_free) -> (*batch, *event_shape)``."""
        whole = self.observed.expand(*self.batch_shape(x), *self.observed.shape)
        return whole.masked_scatter(~self.mask.expand(whole.shape), x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.energy(self.complete(x))

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        # the starting states of the energy can be better than those of the support
        states = self.energy.initial(num_chains, generator)[:, ~self.mask]
        with torch.no_grad():
            return (
                states
                if torch.isfinite(self(states)).all()
                else super().initial(num_chains, generator)
            )

    def site_logits(self, x: Tensor, site: Tensor) -> Tensor:
        """Return the log-probabilities of the values of one site of each chain, ``(chains, K)``."""
        free = (~self.mask).flatten().nonzero().squeeze(1)
        return self.energy.site_logits(self.complete(x), free[site])

    def _free(self, block: Index) -> tuple[Tensor, Tensor]:
        """Return the free entries of a block.

        They are given as numbers among all free entries, and as a mask of the block's entries.
        """
        free = ~self.mask.flatten()
        entries = torch.arange(len(free), device=free.device)[block]
        return (free.cumsum(0) - 1)[entries[free[entries]]], free[entries]

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Free entries of each Gibbs block of the energy, without blocks that have none."""
        blocks = {name: self._free(index)[0] for name, index in blocks_of(self.energy).items()}
        return {name: entries for name, entries in blocks.items() if len(entries)}

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the conditional of the energy's Gibbs block, on its free entries."""
        whole = conditional_of(self.energy, block, self.complete(x))
        return restricted(whole, self._free(blocks_of(self.energy)[block])[1])


def _log_softplus(g: Tensor) -> Tensor:
    # log softplus(g) = log log(1 + e^g). For large negative g softplus underflows, and log
    # softplus(g) = g - e^g / 2 + ... The branch not taken is evaluated at -15 by `where`, since the
    # gradient of `clamp` at its bound is 1 or 0 by torch's version.
    left = g < -15.0
    series = g - 0.5 * torch.exp(torch.where(left, g, -15.0))
    return torch.where(left, series, torch.log(nn.functional.softplus(torch.where(left, -15.0, g))))


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda g: g,
    "square": lambda g: 2.0 * torch.log(torch.abs(g)),
    "abs": lambda g: torch.log(torch.abs(g)),
    "softplus": _log_softplus,
}


class Unnormalized(Energy):
    r"""The energy :math:`E(x) = -\log h(g(x))` of a density proportional to :math:`h(g(x)) \ge 0`.

    Args:
        g: function (or module) of a batch, ``(*batch, *event) -> (*batch)``, any real value.
        link: :math:`h`, one of ``exp`` (:math:`E = -g`), ``square`` (:math:`g^2`), ``abs``
            (:math:`|g|`) or ``softplus`` (:math:`\log(1 + e^g)`). Where :math:`h = 0` the energy is
            :math:`+\infty`.
        event_shape: shape of one event.
        support: constraint of one event.

    Raises:
        ValueError: if ``link`` is not one of the four.

    Example:
        >>> e = Unnormalized(lambda x: -(x**2) / 2)
        >>> e(torch.tensor([2.0]))
        tensor([2.])
    """

    def __init__(
        self,
        g: Callable[[Tensor], Tensor],
        link: str = "exp",
        event_shape: Sequence[int] = (),
        support: Constraint = constraints.real,
    ) -> None:
        if link not in LINKS:
            raise ValueError(f"link must be one of {sorted(LINKS)}, got link={link!r}")
        super().__init__(event_shape, support)
        self.g, self.link = g, link

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return -LINKS[self.link](self.g(x))

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"link={self.link!r}"


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode (no dropout), and restore the modes at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Relaxed(View):
    r"""An energy of discrete support, extended to real numbers so that it has a gradient in x.

    The extension is that of the energy's :meth:`forward`. The gradient :math:`\nabla E(x)` predicts
    the change of energy of every single-site move from x, :math:`E(x') - E(x) \approx \nabla E(x)
    \cdot (x' - x)` (Grathwohl et al., 2021). The kernels that use it stay on the discrete support.
    The energies between the discrete states are not those of a density.

    Args:
        energy: an energy whose ``forward`` accepts real numbers and is differentiable in x.

    Example:
        >>> from pyroebm.core import value_and_grad
        >>> from pyroebm.targets import BernoulliProduct
        >>> value_and_grad(Relaxed(BernoulliProduct([1.0, 2.0])), torch.tensor([[1.0, 0.0]]))
        (tensor([-1.]), tensor([[-1., -2.]]))
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy, constraints.real)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.energy(x)


class LogRegularized(View):
    r"""Log-regularized energy: above a height it grows as a logarithm (Noé et al., 2019).

    .. math::

        E'(x) = E(x) \text{ if } E(x) \le h, \qquad h + \log(1 + E(x) - h) \text{ otherwise}

    A state far from the mass then has no huge gradient; the direction of the gradient is unchanged.
    The energy is for training only: importance weights computed from it would be wrong, and the
    functions that compute weights raise ValueError (:func:`pyroebm.flows.importance_sample`).

    Args:
        energy: the energy.
        height: h, in nats.

    Raises:
        ValueError: if ``height`` is not finite.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> LogRegularized(Gaussian(0.0), 10.0)(torch.tensor([2.0, 1000.0]))
        tensor([ 2.0000, 23.1223])
    """

    def __init__(self, energy: Energy, height: float) -> None:
        if not -math.inf < height < math.inf:
            raise ValueError(f"height must be finite, got height={height}")
        super().__init__(energy)
        self.height = float(height)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        values = self.energy(x)
        # clamped, since the branch not taken is differentiated too
        above = torch.log1p((values - self.height).clamp(min=0.0)) + self.height
        return torch.where(values > self.height, above, values)  # NaN stays NaN


def check_weighable(energy: Energy) -> None:
    """Check that importance weights can be computed from an energy.

    Raises:
        ValueError: if the energy, or one that it is made of, is :class:`LogRegularized`.
    """
    if any(isinstance(module, LogRegularized) for module in energy.modules()):
        raise ValueError(
            "energy must not be LogRegularized: weights computed from its values would be wrong;"
            " give the energy that it wraps"
        )


class Unconstrained(SharesLogZ):
    r"""An energy on :math:`R^d` through the bijection :math:`x = T(u)` of its support.

    .. math:: E_u(u) = E(T(u)) - \log |\det \partial T / \partial u|

    The partition function is unchanged. Where the transform underflows (in float32 ``exp(u)`` is 0
    below u = -104), the energy is that at the boundary of the support; kernels reject states of
    infinite energy. :func:`unconstrain` returns an ``Unconstrained`` where one is needed.

    Args:
        energy: an energy of continuous support.

    Raises:
        ValueError: if the support is discrete or no bijection is known.

    Example:
        >>> from pyroebm.targets import Exponential
        >>> Unconstrained(Exponential())(torch.zeros(1))
        tensor([1.])
    """

    def __init__(self, energy: Energy) -> None:
        transform = unconstraining(energy.support)
        super().__init__(transform.inverse_shape(torch.Size(energy.event_shape)))
        self.energy, self.transform = energy, transform

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` exact independent samples, shape ``(num_samples, *event)``."""
        return self.unconstrain(self.energy.sample(num_samples, generator))

    def forward(self, u: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        x = self.transform(u)
        log_det = self.transform.log_abs_det_jacobian(u, x)
        return self.energy(x) - event_sum(
            log_det, len(self.event_shape) - self.transform.domain.event_dim
        )

    def constrain(self, u: Tensor) -> Tensor:
        """Return the states on the support: ``(*batch, *unconstrained) -> (*batch, *event)``."""
        x: Tensor = self.transform(u)
        return x

    def unconstrain(self, x: Tensor) -> Tensor:
        """Return the unconstrained coordinates of states: the inverse of :meth:`constrain`."""
        u: Tensor = self.transform.inv(x)
        return u

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw starting states of finite energy, shape ``(num_chains, *event)``."""
        return self.unconstrain(self.energy.initial(num_chains, generator))

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the states as a dictionary of named variables."""
        return self.energy.named(self.constrain(x))

    @property
    def _source(self) -> Energy:
        return self.energy._source

    def subsample(self, generator: torch.Generator | None = None) -> Energy:
        """Return an unbiased estimate of the energy on a random minibatch."""
        return Unconstrained(self.energy.subsample(generator))


def unconstrain(energy: Energy) -> Energy:
    """Return the energy in the unconstrained coordinates in which kernels move.

    It is :class:`Unconstrained`, and the energy itself where its support is real or discrete.
    ``pyroebm.core.supports.to_support(energy.support)`` maps states back.

    Raises:
        ValueError: if no bijection is known for its support.

    Example:
        >>> from pyroebm.targets import DoubleWell, Exponential
        >>> energy = DoubleWell()
        >>> unconstrain(energy) is energy, unconstrain(Exponential()).support
        (True, Real())
    """
    unchanged = is_real(energy.support) or is_discrete(energy.support)
    return energy if unchanged else Unconstrained(energy)


class PotentialFn:
    """``potential_fn`` of Pyro's kernels: ``{site: u} -> scalar`` in unconstrained coordinates.

    It includes the log-Jacobian of a constrained support; ``transforms`` only maps the draws back.

    Args:
        energy: the energy of one event.
        site: name of the latent variable in Pyro's dicts.

    Attributes:
        transforms: argument ``transforms`` of ``pyro.infer.MCMC``, so that draws are constrained.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> potential = PotentialFn(DoubleWell())
        >>> potential({"x": torch.tensor(1.0)})
        tensor(-2.)
    """

    def __init__(self, energy: Energy, site: str = "x") -> None:
        transform = unconstraining(energy.support)
        self.unconstrained, self.site = unconstrain(energy), site
        self.transforms = {} if is_real(energy.support) else {site: transform.inv}

    def __call__(self, params: dict[str, Any]) -> Tensor:
        """Return the energy of one event, given by site name."""
        if set(params) != {self.site}:
            raise ValueError(
                f"params must have one site named {self.site!r}, got sites {sorted(params)}"
            )
        u = params[self.site]
        if tuple(u.shape) != tuple(self.unconstrained.event_shape):
            raise ValueError(
                f"params[{self.site!r}] must be one event in unconstrained coordinates, shape"
                f" {tuple(self.unconstrained.event_shape)}, got shape {tuple(u.shape)}"
            )
        return self.unconstrained(u.unsqueeze(0)).squeeze(0)

    def initial_params(
        self, num_chains: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw starting values for ``pyro.infer.MCMC``.

        Args:
            num_chains: number of chains.
            generator: source of randomness; None for torch's default one.

        Returns:
            one event for one chain, else events with a leading chain dimension, by site name.
        """
        u = self.unconstrained.initial(num_chains, generator)
        return {self.site: u[0] if num_chains == 1 else u}
