"""The reverse KL divergence of a symmetrized flow, summed over its group."""

from __future__ import annotations

from torch import Tensor

from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow
from pyroebm.flows.symmetrized import Symmetrized
from pyroebm.objectives.variational.reverse_kl import ReverseKL

__all__ = ["SymmetrizedKL"]


class SymmetrizedKL(ReverseKL):
    r"""The bound :math:`J_R` of :class:`ReverseKL` with an exact sum over the group elements.

    .. math:: J_R - \log C = E_z \sum_g \pi_g \big(U(g x_0) + \log q(g x_0)\big)

    The sum removes the variance due to g, and gives the weights :math:`\pi` a gradient. Each draw
    costs G evaluations of the energy.

    Args:
        energy: as in :class:`ReverseKL`.
        num_samples: as in :class:`ReverseKL`.
        beta_start: as in :class:`ReverseKL`.
        anneal: as in :class:`ReverseKL`.

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
        """Return the mean of the summands, and :meth:`pyroebm.flows.Symmetrized.terms`."""
        if not isinstance(flow, Symmetrized):
            raise ValueError(f"flow must be Symmetrized, got {type(flow).__name__}")
        summands, augmented, xy = flow.terms(self.target, z)
        return summands.mean(), summands, augmented, xy
