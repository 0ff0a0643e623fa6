"""Linear layers: an invertible matrix in PLU factors, a shift, a permutation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroebm.flows.bijection import Bijection, check_event

__all__ = ["PLULinear", "Permutation", "Shift"]


class PLULinear(Bijection):
    r"""An invertible matrix :math:`x = S z` with :math:`S = P L U` (Kingma and Dhariwal, 2018).

    P is a fixed permutation, L unit lower triangular, U upper triangular with diagonal :math:`s_i
    e^{u_i}` and fixed signs s. S is invertible for all values of the parameters, and

    .. math:: \log|\det S| = \sum_i u_i.

    Args:
        matrix: initial S, shape ``(D, D)``, floating point; P and s are those of its pivoted PLU
            factorization.

    Raises:
        ValueError: if ``matrix`` is not square, not floating point, or singular.

    Example:
        >>> S = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> layer = PLULinear(S)
        >>> layer(torch.tensor([1.0, 3.0])).detach()
        tensor([6., 1.])
        >>> layer.log_abs_det().detach()
        tensor(0.6931)
    """

    order: Tensor
    signs: Tensor

    def __init__(self, matrix: Tensor) -> None:
        if (
            matrix.dim() != 2
            or matrix.shape[0] != matrix.shape[1]
            or not matrix.is_floating_point()
        ):
            raise ValueError(
                f"matrix must be square and floating point, got shape {tuple(matrix.shape)} and"
                f" dtype {matrix.dtype}"
            )
        permutation, lower, upper = torch.linalg.lu(matrix.detach())
        diagonal = upper.diagonal()
        if not bool((diagonal != 0).all() & torch.isfinite(diagonal).all()):
            raise ValueError(
                f"matrix must be invertible, but the factor U of P L U has the diagonal"
                f" {diagonal.tolist()}"
            )
        super().__init__(matrix.shape[0])
        self.register_buffer("order", permutation.argmax(dim=1))  # (P v)_i = v[order_i]
        self.register_buffer("signs", diagonal.sign())
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.below = nn.Parameter(lower.tril(-1))
        self.above = nn.Parameter(upper.triu(1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return L and U, each ``(D, D)``."""
        lower = self.below.tril(-1) + torch.eye(
            self.dim, dtype=self.below.dtype, device=self.below.device
        )
        return lower, self.above.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())

    def matrix(self) -> Tensor:
        """Return S, shape ``(D, D)``."""
        lower, upper = self.factors()
        return (lower @ upper)[self.order]

    def log_abs_det(self) -> Tensor:
        r"""Return :math:`\log|\det S|`, a scalar."""
        return self.log_diagonal.sum()

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(z, self.dim)
        return z @ self.matrix().T, self.log_abs_det().expand(z.shape[:-1])

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(x, self.dim)
        lower, upper = self.factors()
        columns = x[..., self.order.argsort()].reshape(-1, self.dim).T
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        z = torch.linalg.solve_triangular(upper, columns, upper=True).T.reshape(x.shape)
        return z, self.log_abs_det().expand(x.shape[:-1])

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, the log-determinant and the score at x, in closed form."""
        with torch.no_grad():
            lower, upper = self.factors()
            columns = torch.linalg.solve_triangular(
                upper.T, score.reshape(-1, self.dim).T, upper=False
            )
            columns = torch.linalg.solve_triangular(
                lower.T, columns, upper=True, unitriangular=True
            )
        return *self.with_log_det(z), columns[self.order].T.reshape(score.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return :meth:`log_abs_det` for every event: ``(*batch, D), (*batch, D) -> (*batch)``."""
        return self.log_abs_det().expand(x.shape[:-1])


class Shift(Bijection):
    r"""A learned translation :math:`x = z + c`, with :math:`\log|\det \partial x/\partial z| = 0`.

    The other layers of NICE (Dinh, Krueger and Bengio, 2014) do not shift the mean in one
    dimension.

    Args:
        offset: initial c, shape ``(D,)``, floating point.

    Raises:
        ValueError: if ``offset`` is no floating-point vector.

    Example:
        >>> Shift(torch.tensor([1.0, -1.0]))(torch.zeros(2)).detach()
        tensor([ 1., -1.])
    """

    def __init__(self, offset: Tensor) -> None:
        if offset.dim() != 1 or not offset.is_floating_point():
            raise ValueError(
                f"offset must be a vector and floating point, got shape {tuple(offset.shape)} and"
                f" dtype {offset.dtype}"
            )
        super().__init__(len(offset))
        self.offset = nn.Parameter(offset.detach().clone())

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(z, self.dim)
        return z + self.offset, z.new_zeros(z.shape[:-1])

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(x, self.dim)
        return x - self.offset, x.new_zeros(x.shape[:-1])

    def with_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, the log-determinant and the score at x, in closed form."""
        return *self.with_log_det(z), score

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros: ``(*batch, D), (*batch, D) -> (*batch)``."""
        return x.new_zeros(x.shape[:-1])


class Permutation(Bijection):
    r"""A fixed permutation :math:`x_i = z_{\pi(i)}`, used between couplings to mix all entries.

    Args:
        order: :math:`\pi`, a permutation of 0, ..., D - 1.

    Raises:
        ValueError: if ``order`` is no permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        if sorted(order) != list(range(len(order))):
            raise ValueError(
                f"order must be a permutation of 0, ..., D - 1, got order={list(order)}"
            )
        super().__init__(len(order))
        index = torch.tensor(list(order))
        self.register_buffer("order", index, persistent=False)
        self.register_buffer("back", index.argsort(), persistent=False)

    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(z, self.dim)
        return z.index_select(-1, self.order), z.new_zeros(z.shape[:-1])

    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant: ``(*batch, D) -> (*batch, D), (*batch)``."""
        check_event(x, self.dim)
        return x.index_select(-1, self.back), x.new_zeros(x.shape[:-1])
