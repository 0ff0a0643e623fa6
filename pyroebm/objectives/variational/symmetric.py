"""The reverse KL divergence of a symmetrised flow, summed over its group."""

from __future__ import annotations

from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow
from pyroebm.flows.symmetrized import Symmetrized
from pyroebm.objectives.variational.reverse_kl import ReverseKL

__all__ = ["SymmetrizedKL"]


class SymmetrizedKL(ReverseKL):
    r"""The bound :math:`J_R` of :class:`ReverseKL` with the draw of the group element replaced by
    its mean.

    .. math:: J_R - \log C = E_z \sum_g \pi_g \big(U(g x_0) + \log q(g x_0)\big)

    The choice of g adds no noise, and its weights :math:`\pi` get their gradient, which no single
    draw can carry. Each draw costs G energies.

    Args:
        energy, num_samples, beta_start, anneal: as in :class:`ReverseKL`.

    Raises:
        ValueError: as :class:`ReverseKL`, and if the flow is not
            :class:`~pyroebm.flows.Symmetrized`.

    Example:
        >>> import torch
        >>> from pyroebm.flows import NICE, sign_flips
        >>> from pyroebm.targets import Gaussian
        >>> flow = Symmetrized(NICE(1), sign_flips(1), "learned")
        >>> loss, metrics = SymmetrizedKL(Gaussian(torch.zeros(1)), num_samples=8)(flow)
        >>> abs(float(metrics["augmented_kl"])) < 1e-6
        True
    """

    def __init__(
        self,
        energy: Energy,
        num_samples: int = 512,
        *,
        beta_start: float = 0.1,
        anneal: float = 0.4,
    ) -> None:
        super().__init__(
            energy, num_samples, gradient="total", beta_start=beta_start, anneal=anneal
        )

    def estimate(self, flow: Flow, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`Symmetrized.terms <pyroebm.flows.Symmetrized.terms>`, and the mean first."""
        if not isinstance(flow, Symmetrized):
            raise ValueError(f"flow must be Symmetrized, got {type(flow).__name__}")
        summands, augmented, xy = flow.terms(self.target, z)
        return summands.mean(), summands, augmented, xy
