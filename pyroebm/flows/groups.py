"""Finite groups of volume-preserving linear maps, for symmetrized flows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts

__all__ = ["generated_group", "multiplication_table", "permutations", "sign_flips"]

#: Largest number of elements of a group, over which each density is summed.
MAX_ELEMENTS = 5040


def sign_flips(dim: int, entries: Sequence[int] | None = None, jointly: bool = False) -> Tensor:
    """Return the reflections of coordinates, shape ``(G, dim, dim)``.

    Args:
        dim: d.
        entries: the entries that change sign; None is all.
        jointly: whether they change sign together, G = 2; otherwise independently, G = 2 to the
            power of their number.

    Raises:
        ValueError: if there are more than 5040 elements, or an entry is not below ``dim``.

    Example:
        >>> sign_flips(1)
        tensor([[[ 1.]],
        <BLANKLINE>
                [[-1.]]])
    """
    entries = tuple(range(dim)) if entries is None else tuple(entries)
    if not entries or not all(0 <= entry < dim for entry in entries):
        raise ValueError(f"entries must be some of 0, ..., {dim - 1}, got entries={entries}")
    _check_size(2 if jointly else 2 ** len(entries), f"the sign flips of {len(entries)} entries")
    choices = (
        [(1.0,), (-1.0,)] if jointly else list(itertools.product((1.0, -1.0), repeat=len(entries)))
    )
    diagonal = torch.ones(len(choices), dim)
    diagonal[:, list(entries)] = torch.tensor(choices).expand(-1, len(entries))
    return torch.diag_embed(diagonal)


def permutations(num_particles: int, num_coordinates: int = 1, cyclic: bool = False) -> Tensor:
    """Return the permutations of identical particles, shape ``(G, n k, n k)``.

    Args:
        num_particles: n.
        num_coordinates: k, number of consecutive entries of x that belong to a particle.
        cyclic: whether to return the n cyclic shifts only, G = n; otherwise all permutations, G =
            n!.

    Raises:
        ValueError: if there are more than 5040 elements. A random subset is no group, and a density
            that is summed over it is not symmetric; use a subgroup, such as the cyclic one, or an
            equivariant flow.

    Example:
        >>> permutations(3, num_coordinates=2).shape, permutations(3, cyclic=True).shape
        (torch.Size([6, 6, 6]), torch.Size([3, 3, 3]))
    """
    check_counts({"num_particles": 1, "num_coordinates": 1}, num_particles, num_coordinates)
    _check_size(
        num_particles if cyclic else math.factorial(num_particles),
        f"the permutations of {num_particles} particles",
    )
    if cyclic:
        orders = [
            [(i + shift) % num_particles for i in range(num_particles)]
            for shift in range(num_particles)
        ]
    else:
        orders = [list(order) for order in itertools.permutations(range(num_particles))]
    matrices = torch.eye(num_particles)[torch.tensor(orders)]
    return torch.stack([torch.kron(matrix, torch.eye(num_coordinates)) for matrix in matrices])


def generated_group(generators: Tensor) -> Tensor:
    """Return the group that the given maps generate, shape ``(G, d, d)``.

    Args:
        generators: linear maps, shape ``(m, d, d)``.

    Raises:
        ValueError: if ``generators`` has another shape, or the group has more than 5040 elements.

    Example:
        >>> quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
        >>> len(generated_group(quarter))
        4
    """
    _check_square(generators)
    size = generators.shape[-1]
    found = new = torch.eye(size, dtype=generators.dtype).unsqueeze(0)
    while len(new):
        products = (generators.unsqueeze(1) @ new).reshape(-1, size, size)
        products = products[~_same(products, found).any(1)]
        new = products[~_same(products, products).tril(-1).any(1)]
        found = torch.cat((found, new))
        _check_size(len(found), "the group that these maps generate")
    return found


def multiplication_table(elements: Tensor) -> Tensor:
    """Return the index of the product of elements a and b at ``[a, b]``, shape ``(G, G)``.

    Args:
        elements: linear maps, shape ``(G, d, d)``.

    Raises:
        ValueError: if the elements are no complete group, without repetitions.

    Example:
        >>> multiplication_table(sign_flips(1))
        tensor([[0, 1],
                [1, 0]])
    """
    _check_square(elements)
    _check_size(len(elements), "a group")
    rows = []
    for element in elements:
        near = _same(element @ elements, elements)
        if not bool((near.sum(1) == 1).all()):
            raise ValueError(
                "group must have every product of its elements exactly once: of"
                f" {len(elements)} elements one has products that occur"
                f" {sorted(set(near.sum(1).tolist()))} times. A density that is summed over a part"
                " of a group is not symmetric; generated_group() completes it"
            )
        rows.append(near.int().argmax(1))
    return torch.stack(rows)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Compare all maps of a and b, up to rounding: ``(A, d, d), (B, d, d) -> (A, B)``."""
    return (
        torch.cdist(a.flatten(1), b.flatten(1), p=torch.inf)
        < 100.0 * torch.finfo(a.dtype).eps ** 0.75
    )


def _check_square(elements: Tensor) -> None:
    if (
        elements.dim() != 3
        or elements.shape[1] != elements.shape[2]
        or not elements.numel()
        or not elements.is_floating_point()
    ):
        raise ValueError(
            "maps must have shape (G, d, d) and be floating point, got shape"
            f" {tuple(elements.shape)} and dtype {elements.dtype}"
        )


def _check_size(size: int, what: str) -> None:
    if size > MAX_ELEMENTS:
        raise ValueError(
            f"{what} must have at most {MAX_ELEMENTS} elements, over which each density is summed,"
            f" got at least {size}. Use a subgroup (a random part does not make the density"
            " symmetric), or an equivariant flow"
        )
