"""Conditional distributions of Gibbs blocks, in sums and tempered energies too."""

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
    "independent_sites",
    "product_of_powers",
    "restricted",
    "sites_of",
]

#: Entries of a block in the flat event.
Index: TypeAlias = slice | Tensor


@runtime_checkable
class HasBlocks(Protocol):
    """Protocol of an energy with named Gibbs blocks, each of which can be drawn given the others.

    Sums, tempered energies, annealing paths and conditioned energies have the blocks of the
    energies they are made of. Their conditionals are products of powers, so the entries of a block
    must be independent: a Pyro ``Bernoulli``, ``OneHotCategorical`` or
    :class:`pyroebm.core.spins.SpinBernoulli` with ``.to_event(1)``.

    Example:
        >>> from pyroebm.energies import Ising
        >>> checkerboard = Ising((4, 4))
        >>> isinstance(checkerboard, HasBlocks), list(blocks_of(0.5 * checkerboard))
        (True, ['even', 'odd'])
    """

    @property
    def blocks(self) -> Mapping[str, Index]:
        """Entries of each block in the flat event, in the order of a sweep.

        Each is a slice, an index tensor or a boolean mask. Empty for an energy without blocks.
        """

    def conditional(self, block: str, x: Tensor) -> Distribution:
        """Return the distribution of a block given the other entries of ``x``.

        Its batch shape is ``(chains,)`` and its event is the block's entries. The entries of ``x``
        in the block itself are ignored.

        Args:
            block: name of the block.
            x: states, shape ``(chains, *event)``.
        """


def blocks_of(energy: object) -> Mapping[str, Index]:
    """Return the Gibbs blocks of an energy; empty if it has none."""
    return energy.blocks if isinstance(energy, HasBlocks) else {}


def common_blocks(energies: Sequence[object]) -> Mapping[str, Index]:
    """Return the blocks that all energies have, with the same entries under the same names.

    Empty if the energies differ.
    """
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
    """Return the conditional distribution of a block.

    Raises:
        ValueError: if the energy has no block of that name.
    """
    blocks = blocks_of(energy)
    if not isinstance(energy, HasBlocks) or block not in blocks:
        raise ValueError(f"block must be one of {list(blocks)}, got block={block!r}")
    return energy.conditional(block, x)


def sites_of(block: Index, event_shape: torch.Size, width: int) -> Tensor:
    """Return the numbers of the sites of a block, of ``width`` entries each."""
    index = block.cpu() if isinstance(block, Tensor) else block
    return torch.arange(event_shape.numel())[index][::width] // width


#: Distributions of independent entries, the parameter in which a product of powers is a sum, and
#: the distribution to make of it.
_FAMILIES: tuple[tuple[type[Any], str, Any], ...] = (
    (Bernoulli, "logits", dist.Bernoulli),
    (OneHotCategorical, "logits", dist.OneHotCategorical),
    (SpinBernoulli, "field", SpinBernoulli),
)


def _family(distributions: Sequence[Distribution]) -> tuple[str, Any, list[Tensor]]:
    entries: list[Any] = [d.base_dist for d in distributions if isinstance(d, Independent)]
    for kind, name, make in _FAMILIES:
        if len(entries) == len(distributions) and all(isinstance(each, kind) for each in entries):
            return name, make, [getattr(each, name) for each in entries]
    raise ValueError(
        "the conditional of a block must be of independent entries (Bernoulli, OneHotCategorical or"
        f" SpinBernoulli, with .to_event(1)) to be combined, got"
        f" {distributions}; Gibbs() draws one site at"
        " a time from any discrete energy"
    )


def product_of_powers(*terms: tuple[Distribution, float | Tensor]) -> Distribution:
    r"""Return the distribution proportional to :math:`\prod_i p_i(x)^{w_i}`, entry by entry.

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
    name, make, parameters = _family([distribution for distribution, _ in terms])
    total: Any = sum(
        (power.reshape(-1, *[1] * (each.dim() - 1)) if isinstance(power, Tensor) else power) * each
        for (_, power), each in zip(terms, parameters, strict=True)
    )
    product: Distribution = make(**{name: total}, validate_args=False).to_event(1)
    return product


def restricted(distribution: Distribution, kept: Tensor) -> Distribution:
    """Return the distribution of some of its independent entries, given by index or mask."""
    name, make, (parameter,) = _family([distribution])
    some: Distribution = make(**{name: parameter[:, kept]}, validate_args=False).to_event(1)
    return some


def independent_sites(support: Constraint, log_p: Tensor) -> Distribution:
    """Return the distribution of independent sites with the given log-probabilities.

    Args:
        support: boolean, spin or one-hot constraint.
        log_p: log-probabilities of the values of each site, shape ``(chains, sites, K)``.

    Raises:
        ValueError: if the support is none of these.
    """
    base, make = base_constraint(support), dict[str, Any](validate_args=False)
    if isinstance(base, type(constraints.boolean)):
        sites: Any = dist.Bernoulli(logits=log_p[..., 1] - log_p[..., 0], **make)
    elif isinstance(base, type(spin)):
        sites = SpinBernoulli(0.5 * (log_p[..., 1] - log_p[..., 0]), **make)
    elif isinstance(base, type(constraints.one_hot)):
        sites = dist.OneHotCategorical(logits=log_p, **make)
    else:
        raise ValueError(
            f"support={support} has no family of independent sites: it must be boolean, spin or"
            " one_hot"
        )
    joint: Distribution = sites.to_event(1)
    return joint
