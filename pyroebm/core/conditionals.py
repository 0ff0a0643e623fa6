"""Conditionals of parts of an event, and how they go through sums and temperatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical, constraints
from torch.distributions.constraints import Constraint

from pyroebm.core.spins import SpinBernoulli
from pyroebm.core.supports import base_constraint, spin

__all__ = [
    "HasBlocks",
    "blocks_of",
    "common_blocks",
    "conditional_of",
    "independent_law",
    "product_of_powers",
    "restricted",
    "sites_of",
]

#: Where a block lies in the flat event.
Index: TypeAlias = slice | Tensor


@runtime_checkable
class HasBlocks(Protocol):
    """An energy whose events fall into named blocks, each of which can be drawn given the others.

    Sums, tempered energies, annealing paths and conditioned energies have the blocks of what they
    are made of. Their conditionals are products of powers of those, so they ask for blocks of
    independent entries: a Pyro ``Bernoulli``, ``OneHotCategorical`` or
    :class:`pyroebm.core.spins.SpinBernoulli` with ``.to_event(1)``.

    Example:
        >>> from pyroebm.energies import Ising
        >>> checkerboard = Ising((4, 4))
        >>> isinstance(checkerboard, HasBlocks), list(blocks_of(0.5 * checkerboard))
        (True, ['even', 'odd'])
    """

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Where each block lies in the flat event, in the order of a sweep: a slice, or indices or
        a boolean mask. Empty where there are none."""

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """The distribution of a block given the rest of ``x`` ``(chains, *event)``: batch shape
        ``(chains,)``, events the block's entries.

        What ``x`` has in the block itself is ignored.
        """


def blocks_of(energy: object) -> Mapping[str, Index]:
    """The blocks of an energy, empty where it has none."""
    return energy.blocks if isinstance(energy, HasBlocks) else {}


def common_blocks(energies: Sequence[object]) -> Mapping[str, Index]:
    """The blocks that all of some energies have, with the same entries under the same names; empty
    where they differ."""
    first, *rest = map(blocks_of, energies)
    same = all(_same_blocks(first, other) for other in rest)
    return first if same else {}


def _same_blocks(a: Mapping[str, Index], b: Mapping[str, Index]) -> bool:
    return a is b or (list(a) == list(b) and all(_same_index(a[name], b[name]) for name in a))


def _same_index(a: Index, b: Index) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    return type(a) is type(b) and a == b


def conditional_of(energy: object, block: str, x: Tensor) -> Distribution:
    """The conditional of a block; ValueError if the energy has no block of that name."""
    blocks = blocks_of(energy)
    if not isinstance(energy, HasBlocks) or block not in blocks:
        raise ValueError(f"block must be one of {list(blocks)}, got block={block!r}")
    return energy.conditional(block, x)


def sites_of(block: Index, event_shape: torch.Size, width: int) -> Tensor:
    """The numbers of the sites of a block, of ``width`` entries each."""
    index = block.cpu() if isinstance(block, Tensor) else block
    return torch.arange(event_shape.numel())[index][::width] // width


#: Distributions of independent entries, the parameter in which a product of powers is a sum, and
#: the distribution to make of it.
_FAMILIES: tuple[tuple[type[Any], str, Any], ...] = (
    (Bernoulli, "logits", dist.Bernoulli),
    (OneHotCategorical, "logits", dist.OneHotCategorical),
    (SpinBernoulli, "field", SpinBernoulli),
)


def _family(laws: Sequence[Distribution]) -> tuple[str, Any, list[Tensor]]:
    entries: list[Any] = [law.base_dist for law in laws if isinstance(law, Independent)]
    for kind, name, make in _FAMILIES:
        if len(entries) == len(laws) and all(isinstance(each, kind) for each in entries):
            return name, make, [getattr(each, name) for each in entries]
    raise ValueError(
        "the conditional of a block must be of independent entries (Bernoulli, OneHotCategorical or"
        f" SpinBernoulli, with .to_event(1)) to be combined, got {laws}; Gibbs() draws one site at"
        " a time from any discrete energy"
    )


def product_of_powers(*terms: tuple[Distribution, float | Tensor]) -> Distribution:
    r"""The distribution proportional to :math:`\prod_i p_i(x)^{w_i}`, entry by entry.

    Args:
        terms: distributions of independent entries of one family, batch shape ``(chains,)``, each
            with its power w: a number, or one for each chain.

    Raises:
        ValueError: if the distributions are not of independent entries, or of different families.

    Example:
        >>> coin = dist.Bernoulli(logits=torch.tensor([[2.0]])).to_event(1)
        >>> product_of_powers((coin, 0.5), (coin, torch.tensor([0.25]))).base_dist.logits
        tensor([[1.5000]])
    """
    name, make, parameters = _family([law for law, _ in terms])
    total: Any = sum(
        (power.reshape(-1, *[1] * (each.dim() - 1)) if isinstance(power, Tensor) else power) * each
        for (_, power), each in zip(terms, parameters, strict=True)
    )
    law: Distribution = make(**{name: total}, validate_args=False).to_event(1)
    return law


def restricted(law: Distribution, kept: Tensor) -> Distribution:
    """The distribution of some of independent entries, ``kept`` numbers or a mask of them."""
    name, make, (parameter,) = _family([law])
    some: Distribution = make(**{name: parameter[:, kept]}, validate_args=False).to_event(1)
    return some


def independent_law(support: Constraint, log_p: Tensor) -> Distribution:
    """Independent sites, from the log-probabilities ``(chains, sites, K)`` of their values.

    Raises:
        ValueError: if the sites are no bits, spins or one-hot rows.
    """
    base, make = base_constraint(support), dict[str, Any](validate_args=False)
    if isinstance(base, type(constraints.boolean)):
        law: Any = dist.Bernoulli(logits=log_p[..., 1] - log_p[..., 0], **make)
    elif isinstance(base, type(spin)):
        law = SpinBernoulli(0.5 * (log_p[..., 1] - log_p[..., 0]), **make)
    elif isinstance(base, type(constraints.one_hot)):
        law = dist.OneHotCategorical(logits=log_p, **make)
    else:
        raise ValueError(
            f"support={support} has no family of independent sites: it must be boolean, spin or"
            " one_hot"
        )
    joint: Distribution = law.to_event(1)
    return joint
