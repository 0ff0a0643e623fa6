"""Completion of partly observed examples: clamp what is known, sample the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyroebm.core.conditionals import Index, blocks_of, conditional_of
from pyroebm.core.energy import Energy, View
from pyroebm.core.supports import inside, is_discrete, is_real
from pyroebm.kernels import NUTS, BlockGibbs, Gibbs
from pyroebm.kernels.base import Kernel
from pyroebm.mcmc.sampler import MCMC

__all__ = ["Clamped", "HasJoint", "complete"]


@runtime_checkable
class HasJoint(Protocol):
    """What has an energy over all its units, in which the visible ones, ``num_visible`` of them,
    come first.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> isinstance(BernoulliRBM(4, 3), HasJoint)
        True
    """

    def joint(self) -> Energy:
        """The energy over all units."""


class Clamped(View):
    r"""An energy with some entries held, row by row: :math:`E(o_{known}, x_{free})`.

    The free entries have the law :math:`p(x_{free} \mid o)`. What x has in a known entry counts for
    nothing; where entries are real numbers it has a standard normal law of its own, so that the
    density stays one.

    Args:
        energy: over all entries, of discrete or real support.
        observed: values of the known entries, shape ``(rows, *event)``; the others are ignored.
        known: True where an entry is held, shape ``(rows, *event)``.

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
        #: those of the energy, if the entries of each are independent given the other blocks
        self.blocks: Mapping[str, Index] = (
            blocks
            if all(isinstance(conditional_of(energy, b, observed), Independent) for b in blocks)
            else {}
        )

    def whole(self, x: Tensor) -> Tensor:
        """``x`` with the known entries put in; rows first, ``(rows, ..., *event)``."""
        cut = x.dim() - self.observed.dim()
        shape = (len(self.observed), *[1] * cut, *self.event_shape)
        return torch.where(self.known.reshape(shape), self.observed.reshape(shape), x)

    def forward(self, x: Tensor) -> Tensor:
        values = self.energy(self.whole(x))
        if not is_real(self.support):
            return values
        cut = x.dim() - self.observed.dim()
        known = self.known.reshape(len(self.observed), *[1] * cut, *self.event_shape)
        return values + 0.5 * torch.where(known, x, 0.0).square().flatten(cut + 1).sum(-1)

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self.whole(self.energy.initial(num_chains, generator))

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """That of the energy, given the known entries of the other blocks."""
        return conditional_of(self.energy, block, self.whole(x))


def complete(
    model: Energy | HasJoint,
    observed: Tensor,
    known: Tensor,
    *,
    steps: int = 200,
    kernel: Kernel[Any] | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> Tensor:
    r"""Draw what is not known of each example from :math:`p(x_{free} \mid x_{known})`, one chain a
    row.

    Args:
        model: an energy, or what has ``joint()``: a Boltzmann machine of any kind, a deep belief
            network. Hidden units are sampled along.
        observed: examples, shape ``(n, *visible)``, n at least 1; entries that are not known may
            hold anything. Examples of all units will do too.
        known: True where an entry is known, shape ``(n, *visible)`` or ``visible``.
        steps: steps of each chain; the result is its last state.
        kernel: None takes block Gibbs where the energy has layers, single-site Gibbs on other
            discrete ones, and else NUTS, which adapts for all but the last step.
        seed: of all random numbers; None takes a fresh one.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Returns:
        completed examples, shape ``(n, *visible)``; known entries are those of ``observed``.

    Raises:
        ValueError: if ``observed`` does not fit the model, ``known`` does not fit ``observed``, or
            ``steps`` < 1.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(
        ...     2,
        ...     1,
        ...     weight=torch.tensor([[20.0], [20.0]]),
        ...     hidden_bias=torch.tensor([-20.0]),
        ...     visible_bias=torch.tensor([-10.0, -10.0]),
        ... )  # both bits on, or both off
        >>> complete(
        ...     rbm,
        ...     torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        ...     torch.tensor([True, False]),
        ...     progress=False,
        ... )
        tensor([[1., 1.],
                [0., 0.]])
    """
    energy = model.joint() if isinstance(model, HasJoint) else model
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got steps={steps}")
    whole, clamp = _over_all_units(energy, model, observed, known)
    held = Clamped(energy, whole, clamp)
    if kernel is None:
        discrete = BlockGibbs() if held.blocks else Gibbs()
        kernel = discrete if is_discrete(energy.support) else NUTS()
    mcmc = MCMC(
        kernel,
        num_samples=1,
        warmup_steps=steps - 1,
        num_chains=len(whole),
        seed=seed,
        chain_batch_size=len(whole),
        compile=False,
        progress=progress,
    )
    mcmc.run(held)
    drawn = held.whole(mcmc.get_samples()["x"])
    return drawn.flatten(1)[:, : observed[0].numel()].reshape(observed.shape)


def _over_all_units(
    energy: Energy, model: Any, observed: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Observed values and mask over every entry of the energy's events: entries that are not
    visible are not known."""
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
            f"known must be boolean, of the shape of observed {tuple(observed.shape)} or of one"
            " example, got shape"
            f" {tuple(known.shape)} and dtype {known.dtype}"
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
        raise ValueError(f"observed must lie in support={energy.support} where it is known")
    return whole, mask.reshape(whole.shape)
