"""Imputation of partly observed examples: clamp the known entries and sample the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyroebm.core._checks import check_counts
from pyroebm.core.arrays import as_tensor
from pyroebm.core.conditionals import Index, blocks_of, conditional_of
from pyroebm.core.energy import Energy, View
from pyroebm.core.supports import inside, is_discrete, is_real
from pyroebm.kernels import NUTS, BlockGibbs, Gibbs
from pyroebm.kernels.base import Kernel
from pyroebm.mcmc.sampler import MCMC

__all__ = ["Clamped", "HasJoint", "impute"]


@runtime_checkable
class HasJoint(Protocol):
    """A machine with an energy over all its units, of which the first ``num_visible`` are visible.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), HasJoint)
        True
    """

    def joint(self) -> Energy:
        """Return the energy over all units."""


class Clamped(View):
    r"""An energy with some entries clamped, in each row: :math:`E(o_{known}, x_{free})`.

    The density of the free entries is :math:`p(x_{free} \mid o)`. The values of x in known entries
    are ignored. For real support they have an independent standard normal density, so that the
    density over all entries is normalizable.

    Args:
        energy: energy over all entries, of discrete or real support.
        observed: values of the known entries, shape ``(rows, *event)``; the others are ignored.
        known: whether an entry is known, boolean, shape ``(rows, *event)``.

    Example:
        >>> from pyroebm.targets import BernoulliProduct
        >>> known = torch.tensor([[True, False]])
        >>> e = Clamped(BernoulliProduct([1.0, 2.0]), torch.tensor([[1.0, 0.0]]), known)
        >>> e(torch.tensor([[0.0, 1.0]]))
        tensor([-3.])
    """

    observed: Tensor
    known: Tensor

    def __init__(self, energy: Energy, observed: Tensor, known: Tensor) -> None:
        super().__init__(energy)
        self.register_buffer("observed", observed)
        self.register_buffer("known", known)
        blocks = blocks_of(energy)
        #: the Gibbs blocks of the energy, if the entries of each are conditionally independent
        self.blocks: Mapping[str, Index] = (
            blocks
            if all(isinstance(conditional_of(energy, b, observed), Independent) for b in blocks)
            else {}
        )

    def clamp(self, x: Tensor) -> Tensor:
        """Substitute the known entries in ``x``, ``(rows, ..., *event)``."""
        cut = x.dim() - self.observed.dim()
        shape = (len(self.observed), *[1] * cut, *self.event_shape)
        return torch.where(self.known.reshape(shape), self.observed.reshape(shape), x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies ``(rows, ...)`` of ``x``, shape ``(rows, ..., *event)``."""
        values = self.energy(self.clamp(x))
        if not is_real(self.support):
            return values
        cut = x.dim() - self.observed.dim()
        known = self.known.reshape(len(self.observed), *[1] * cut, *self.event_shape)
        return values + 0.5 * torch.where(known, x, 0.0).square().flatten(cut + 1).sum(-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial states of chains, with the known entries substituted."""
        return self.clamp(self.energy.initial(num_chains, generator))

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the conditional distribution of a Gibbs block, given the known entries."""
        return conditional_of(self.energy, block, self.clamp(x))


def impute(
    model: Energy | HasJoint,
    observed: Tensor | np.ndarray,
    known: Tensor | np.ndarray,
    *,
    num_sweeps: int = 200,
    kernel: Kernel[Any] | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Impute the unknown entries of examples by a draw from :math:`p(x_{free} \mid x_{known})`.

    Each example has a chain of its own. For images this is known as inpainting.

    Args:
        model: an energy, or a machine with ``joint()``: any Boltzmann machine or deep belief
            network, whose hidden units are sampled too.
        observed: examples, shape ``(n, *visible)`` or of all units, n at least 1; the values of
            unknown entries are ignored.
        known: whether an entry is known, boolean, shape ``(n, *visible)`` or ``visible``.
        num_sweeps: number of steps of each chain, whose last state is the result.
        kernel: kernel of the chains; None is block Gibbs for layered machines, single-site Gibbs on
            other discrete supports, and NUTS on real support, which adapts in all but the last
            step.
        generator: source of all random numbers; None is torch's default generator.
        progress: True shows progress, False hides it, None shows it after one second.

    Returns:
        The examples with imputed entries, shape of ``observed``; known entries are unchanged.

    Raises:
        ValueError: if ``observed`` does not fit the model, ``known`` does not fit ``observed``, or
            ``num_sweeps`` < 1.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(
        ...     2,
        ...     1,
        ...     weight=torch.tensor([[20.0], [20.0]]),
        ...     hidden_bias=torch.tensor([-20.0]),
        ...     visible_bias=torch.tensor([-10.0, -10.0]),
        ... )  # both units on, or both off
        >>> impute(
        ...     rbm,
        ...     torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        ...     torch.tensor([True, False]),
        ...     progress=False,
        ... )
        tensor([[1., 1.],
                [0., 0.]])
    """
    energy = model.joint() if isinstance(model, HasJoint) else model
    check_counts({"num_sweeps": 1}, num_sweeps)
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    observed = as_tensor(observed, energy.dtype, energy.device, "observed")
    states, mask = _over_all_units(energy, model, observed, known)
    clamped = Clamped(energy, states, mask)
    if kernel is None:
        discrete = BlockGibbs() if clamped.blocks else Gibbs()
        kernel = discrete if is_discrete(energy.support) else NUTS()
    mcmc = MCMC(
        kernel,
        num_samples=1,
        warmup_steps=num_sweeps - 1,
        num_chains=len(states),
        seed=seed,
        chain_batch_size=len(states),
        compile=False,
        progress=progress,
    )
    mcmc.run(clamped)
    drawn = clamped.clamp(mcmc.get_samples()["x"])
    return drawn.flatten(1)[:, : observed[0].numel()].reshape(observed.shape)


def _over_all_units(
    energy: Energy, model: Any, observed: Tensor, known: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return observed values and mask over all units; hidden units are not known."""
    known, events = torch.as_tensor(known), {tuple(energy.event_shape)}
    if isinstance(model, HasJoint):
        joint: Any = energy
        events.add((joint.num_visible,))
    if observed.dim() < 1 or not len(observed) or tuple(observed.shape[1:]) not in events:
        shapes = " or ".join(f"(n, {', '.join(map(str, event))})" for event in sorted(events))
        raise ValueError(
            f"observed must have shape {shapes}, n at least 1, for {type(model).__name__}, got"
            f" {tuple(observed.shape)}"
        )
    if known.dtype != torch.bool or tuple(known.shape) not in (
        tuple(observed.shape),
        tuple(observed.shape[1:]),
    ):
        raise ValueError(
            f"known must be boolean, of shape {tuple(observed.shape)} or"
            f" {tuple(observed.shape[1:])}, got shape {tuple(known.shape)} and dtype {known.dtype}"
        )
    known = known.expand(observed.shape)
    entries, visible = energy.event_shape.numel(), observed[0].numel()
    flat = observed.to(energy.device, energy.dtype).flatten(1)
    filler = energy.initial(len(flat), torch.Generator(energy.device).manual_seed(0)).flatten(1)
    mask = torch.zeros(len(flat), entries, dtype=torch.bool, device=energy.device)
    mask[:, :visible] = known.flatten(1)
    whole = filler.clone()
    whole[:, :visible] = torch.where(mask[:, :visible], flat, filler[:, :visible])
    whole = whole.reshape(len(flat), *energy.event_shape)
    if not bool(inside(energy.support, whole, len(energy.event_shape)).all()):
        raise ValueError(
            f"observed must lie in the support={energy.support} of {type(energy).__name__} at all"
            " known entries, got other values"
        )
    return whole, mask.reshape(whole.shape)
