"""Mass matrices in Pyro's form: a dict from tuples of sites to tensors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pyroebm.core.supports import event_numel
from pyroebm.kernels.metric import Dense, Metric

__all__ = ["Blocks", "MassMatrixAdapter", "check_full_mass"]


def check_full_mass(full_mass: object) -> None:
    """Raise ValueError unless ``full_mass`` is a bool or a list of tuples of site names."""
    if isinstance(full_mass, bool):
        return
    tuples = full_mass if isinstance(full_mass, list) else [()]
    names = [name for block in tuples for name in (block if isinstance(block, tuple) else [None])]
    named = all(isinstance(name, str) for name in names) and all(tuples)
    if not named or len(set(names)) < len(names):
        raise ValueError(
            "full_mass must be True, False, or a list of tuples of names of sites, each site at"
            f" most once, such as [('a', 'b')], got full_mass={full_mass!r}"
        )


class Blocks:
    """Blocks of a mass matrix: tuples of sites, and their entries in the flat event.

    As in Pyro, the sites that are in no dense block are one more block, of variances, in the order
    of their names.

    Args:
        full_mass: whether there is one dense block of all sites, or the dense blocks.
        shapes: unconstrained shape of each site, in the order of the flat event.

    Raises:
        ValueError: if a site is unknown.

    Example:
        >>> shapes = {"b": torch.Size([2]), "a": torch.Size([]), "c": torch.Size([])}
        >>> Blocks([("a", "c")], shapes).entries
        {('a', 'c'): [2, 3], ('b',): [0, 1]}
    """

    def __init__(
        self, full_mass: bool | Sequence[tuple[str, ...]], shapes: Mapping[str, torch.Size]
    ) -> None:
        everything = tuple(sorted(shapes))
        dense = [everything] if full_mass is True else list(full_mass or [])
        unknown = [name for block in dense for name in block if name not in shapes]
        if unknown:
            near = difflib.get_close_matches(unknown[0], shapes, 3, 0.3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"full_mass must name latent sites, {sorted(shapes)}, got {unknown}{hint}"
            )
        inside = {name for block in dense for name in block}
        rest = tuple(name for name in everything if name not in inside)
        offsets, at = {}, 0
        for name, shape in shapes.items():
            offsets[name] = range(at, at + event_numel(shape))
            at += event_numel(shape)
        self.dense = dense
        self.dim = at
        self.entries = {
            block: [entry for name in block for entry in offsets[name]]
            for block in [*dense, *([rest] if rest else [])]
        }

    @property
    def correlated(self) -> tuple[tuple[int, ...], ...] | None:
        """Entries of each dense block; None if one block has all."""
        if len(self.dense) == 1 and len(self.entries) == 1:
            return None
        return tuple(tuple(self.entries[block]) for block in self.dense)

    def matrices(
        self, inverse_mass: Tensor | Metric | None, like: Tensor
    ) -> dict[tuple[str, ...], Tensor]:
        """Return the inverse mass of each block: a matrix if it is dense, else a vector.

        Args:
            inverse_mass: of a kernel.
            like: a tensor of the dtype and device of the states.
        """
        if isinstance(inverse_mass, Dense):
            whole = inverse_mass.factor @ inverse_mass.factor.mT
            variances = whole.diagonal()
        else:
            flat = inverse_mass if isinstance(inverse_mass, Tensor) else like.new_ones(self.dim)
            variances = flat.reshape(-1)
            whole = variances.diag() if self.dense else variances
        return {
            block: whole[entries][:, entries] if block in self.dense else variances[entries]
            for block, entries in self.entries.items()
        }

    def inverse_mass(self, matrices: Mapping[tuple[str, ...], Tensor]) -> Tensor | Dense:
        """Return the inverse mass of a kernel from that of each block."""
        like = next(iter(matrices.values()))
        if not self.dense:
            variances = like.new_ones(self.dim)
            for block, entries in self.entries.items():
                variances[entries] = matrices[block]
            return variances
        whole = like.new_zeros(self.dim, self.dim)
        for block, entries in self.entries.items():
            index = torch.tensor(entries)
            matrix = matrices[block]
            whole[index.unsqueeze(1), index] = matrix if matrix.dim() == 2 else matrix.diag()
        return Dense.of_covariance(whole)


class MassMatrixAdapter(BlockMassMatrix):
    """The metric of a kernel as Pyro's ``mass_matrix_adapter``; the kernel adapts it by itself.

    Args:
        matrices: inverse mass of each block.
        assign: called with the inverse mass of all blocks after an assignment to
            ``inverse_mass_matrix``.
    """

    def __init__(
        self,
        matrices: Mapping[tuple[str, ...], Tensor],
        assign: Callable[[Mapping[tuple[str, ...], Tensor]], None],
    ) -> None:
        super().__init__()
        self._assign: Callable[[Mapping[tuple[str, ...], Tensor]], None] | None = None
        self.inverse_mass_matrix = matrices
        self._assign = assign

    @property
    def mass_matrix_size(self) -> dict[tuple[str, ...], int]:
        """Number of entries of each block."""
        return {block: len(matrix) for block, matrix in self.inverse_mass_matrix.items()}

    @property
    def inverse_mass_matrix(self) -> dict[tuple[str, ...], Tensor]:
        """Inverse mass of each block: a matrix if it is dense, else a vector."""
        matrices: dict[tuple[str, ...], Any] = super().inverse_mass_matrix
        return matrices

    @inverse_mass_matrix.setter
    def inverse_mass_matrix(self, value: Mapping[tuple[str, ...], Tensor]) -> None:
        cast(Any, BlockMassMatrix).inverse_mass_matrix.fset(self, value)
        if self._assign is not None:
            self._assign(self.inverse_mass_matrix)
