"""Chains that never moved after warm-up: detection and description."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["describe_chains", "describe_range", "describe_stuck", "stuck_chains"]

#: Minimum acceptance rate assumed of a chain.
MIN_RATE = 0.1


def stuck_chains(moves: Tensor, num_steps: int) -> list[int]:
    r"""Return the numbers of chains that never moved, if this is significant.

    If each step is accepted with probability 1/10 or more, some of C chains does not move in n
    steps with a probability of at most :math:`C \, 0.9^n`. If this is below .01, which takes 57
    steps of 4 chains and 84 of 64, chains that never moved are stuck.

    Args:
        moves: number of steps in which each chain moved, shape ``(chains,)``.
        num_steps: n.

    Example:
        >>> stuck_chains(torch.tensor([80, 0, 75, 90]), 100)
        [1]
        >>> stuck_chains(torch.tensor([2, 0, 1, 2]), 3)
        []
    """
    if len(moves) * (1.0 - MIN_RATE) ** num_steps >= 0.01:
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
    """Describe the chains that never moved, their energies and a remedy; "" if there are none.

    Args:
        stuck: numbers of chains, as :func:`stuck_chains` returns them.
        num_chains: number of all chains.
        energies: current energy of each chain, shape ``(chains,)``; None omits energies.
        first: number of the first of these chains in the run, if a rank has some of its chains.
        total: number of all chains of the run.

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
            " warm up longer, change a fixed step size, or check the energy."
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
        f"{named} never moved after warm-up{where}. Start {it} elsewhere (initial=, or another"
        " seed), warm up longer, change a fixed step size, or reparametrize the model where"
        f" {they} started."
    )


def describe_chains(numbers: Sequence[int], total: int | None = None) -> str:
    """Format the numbers of chains.

    Example:
        >>> describe_chains([3]), describe_chains([0, 3], 8)
        ('Chain 3', 'Chains 0, 3 of 8')
    """
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    listed = ", ".join(map(str, numbers[:10])) + more
    of = "" if total is None else f" of {total}"
    return f"{'Chain' if len(numbers) == 1 else 'Chains'} {listed}{of}"


def describe_range(values: Tensor) -> str:
    """Format the range of some numbers, with three digits.

    Example:
        >>> describe_range(torch.tensor([2.0, 3.5]))
        '2 to 3.5'
    """
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"{low} to {high}"
