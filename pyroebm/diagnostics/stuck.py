"""Chains that never moved after warm-up: which they are, and what to say of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["describe_chains", "describe_range", "describe_stuck", "stuck_chains"]

#: Acceptance rate that a chain is supposed to have at least.
LEAST_RATE = 0.1


def stuck_chains(moves: Tensor, num_steps: int) -> list[int]:
    r"""Numbers of the chains that never moved, if that is no chance.

    Where each step is accepted with probability 1/10 or more, all of C chains move at least once in
    n steps but for a probability of at most :math:`C \, 0.9^n`. Once that is below .01, which takes
    57 steps of 4 chains and 84 of 64, chains that never moved are stuck.

    Args:
        moves: steps in which each chain moved, shape ``(chains,)``.
        num_steps: n.

    Example:
        >>> stuck_chains(torch.tensor([80, 0, 75, 90]), 100)
        [1]
        >>> stuck_chains(torch.tensor([2, 0, 1, 2]), 3)
        []
    """
    if len(moves) * (1.0 - LEAST_RATE) ** num_steps >= 0.01:
        return []
    found: list[int] = (moves == 0).nonzero().flatten().tolist()
    return found


def describe_stuck(
    stuck: list[int],
    num_chains: int,
    energies: Tensor | None = None,
    first: int = 0,
    total: int = 0,
) -> str:
    """Say which chains never moved, their energies beside the others', and what to do; an empty
    text if there is none.

    Args:
        stuck: numbers of chains, as :func:`stuck_chains` gives them.
        num_chains: number of all chains.
        energies: the energy of each chain where it is, shape ``(chains,)``; None says nothing of
            it.
        first, total: number of the first of these chains, and of all chains of the run, where a
            rank has some of them.

    Example:
        >>> describe_stuck([1], 3, torch.tensor([2.0, 812.5, 3.5])).split(". ")[0]
        'Chain 1 of 3 never moved after warm-up (energy 812, median of the others 2)'
    """
    if not stuck:
        return ""
    if len(stuck) == num_chains:
        where = f" (energy {describe_range(energies)})" if energies is not None else ""
        return (
            f"None of {num_chains} chains moved after warm-up{where}. Start elsewhere (initial=),"
            f" warm"
            " up longer, take another step"
            " size where it is fixed, or check the energy."
        )
    where = ""
    if energies is not None:
        mask = torch.zeros(num_chains, dtype=torch.bool, device=energies.device)
        mask[stuck] = True
        median = float(energies[~mask].median())
        where = f" (energy {describe_range(energies[mask])}, median of the others {median:.3g})"
    it, they = ("it", "it") if len(stuck) == 1 else ("them", "they")
    named = describe_chains([first + chain for chain in stuck], total or num_chains)
    return (
        f"{named} never moved after warm-up{where}. Start {it}"
        " elsewhere (initial=, or another"
        " seed), warm up longer, take another step size where it is fixed, or reparametrize the"
        f" model where {they} started."
    )


def describe_chains(numbers: Sequence[int], total: int | None = None) -> str:
    """Chains by their numbers, of so many.

    Example:
        >>> describe_chains([3]), describe_chains([0, 3], 8)
        ('Chain 3', 'Chains 0, 3 of 8')
    """
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    listed = ", ".join(map(str, numbers[:10])) + more
    of = "" if total is None else f" of {total}"
    return f"{'Chain' if len(numbers) == 1 else 'Chains'} {listed}{of}"


def describe_range(values: Tensor) -> str:
    """The range of some numbers, to three digits.

    Example:
        >>> describe_range(torch.tensor([2.0, 3.5]))
        '2 to 3.5'
    """
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"{low} to {high}"
