"""Restricted Boltzmann machines with binary or Gaussian visible units.

As energies they are free energies of the visible units.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyroebm.core.arrays import as_tensor
from pyroebm.energies.layered import LayeredMachine, check_sizes, parameter
from pyroebm.energies.layers import Layers

__all__ = ["BernoulliRBM", "GaussianRBM", "RBM"]


class RBM(LayeredMachine):
    """Base class of restricted Boltzmann machines, with a visible and a hidden layer.

    Example:
        >>> issubclass(BernoulliRBM, RBM), issubclass(GaussianRBM, RBM)
        (True, True)
    """

    weight: nn.Parameter
    visible_bias: nn.Parameter
    hidden_bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.layers().free_energy([x, None])

    def fit_visible(self, data: Tensor | np.ndarray) -> None:
        """Set the parameters of the visible units from data, for a machine without hidden units.

        Args:
            data: visible states, shape ``(n, num_visible)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define fit_visible(data)")

    def marginal(self) -> RBM:
        """Return this energy, in which the hidden units are summed out."""
        return self

    def hidden_given(self, visible: Tensor) -> Distribution:
        """Return :math:`p(h | v)`: independent binary units, batch shape that of ``visible``."""
        layers = self.layers()
        return layers.distribution(1, layers.field(1, [visible, None]))

    def visible_given(self, hidden: Tensor) -> Distribution:
        """Return :math:`p(v | h)`: independent units, with the batch shape of ``hidden``."""
        layers = self.layers()
        return layers.distribution(0, layers.field(0, [None, hidden]))

    def log_likelihood(self, x: Tensor, log_z: float | Tensor | None = None) -> Tensor:
        r"""Compute :math:`\log p(v) = -F(v) - \log Z`, shape of the batch.

        Args:
            x: visible states, shape ``(*batch, num_visible)``.
            log_z: :math:`\log Z`; None enumerates the smaller layer (:meth:`log_partition`).
        """
        return -self(x) - (self.log_partition() if log_z is None else log_z)


def check_data(machine: RBM, data: Tensor | np.ndarray, width: int, min_events: int = 1) -> Tensor:
    """Return data of shape ``(n, width)`` with enough events as a tensor.

    Raises:
        ValueError: otherwise.
    """
    data = as_tensor(data, machine.dtype, machine.device, "data")
    if data.dim() != 2 or data.shape[1] != width or len(data) < min_events:
        raise ValueError(
            f"data must have shape (n, {width}), n at least {min_events}, got {tuple(data.shape)}"
        )
    return data


class BernoulliRBM(RBM):
    r"""Restricted Boltzmann machine with binary units (Smolensky, 1986; Hinton, 2002).

    .. math::

        E(v, h) = -v^\top W h - b \cdot v - c \cdot h, \qquad
        F(v) = -b \cdot v - \sum_j \log(1 + e^{c_j + (v^\top W)_j})

    As an energy it is F, over the visible units; :meth:`joint` is E. If one layer is small, log Z,
    likelihoods and draws are exact.

    Args:
        num_visible: number of units of v.
        num_hidden: number of units of h.
        weight: W, shape ``(num_visible, num_hidden)``; None draws normal numbers of standard
            deviation 0.01 (Hinton, 2012).
        visible_bias: b, shape ``(num_visible,)``; None for 0.
        hidden_bias: c, shape ``(num_hidden,)``; None for 0.
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: if a size is below 1, or a parameter has another shape or is not finite.

    Example:
        >>> rbm = BernoulliRBM(4, 3, weight=torch.ones(4, 3))
        >>> rbm.hidden_given(torch.ones(2, 4)).mean[0].detach()
        tensor([0.9820, 0.9820, 0.9820])
        >>> round(float(rbm.log_likelihood(torch.ones(4)).detach()), 4)
        -0.2151
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        weight: Tensor | None = None,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_sizes("BernoulliRBM", num_visible=num_visible, num_hidden=num_hidden)
        super().__init__((num_visible,), constraints.boolean)
        self.weight = parameter("weight", weight, (num_visible, num_hidden), 0.01, dtype, generator)
        self.visible_bias = parameter("visible_bias", visible_bias, (num_visible,), 0.0, dtype)
        self.hidden_bias = parameter("hidden_bias", hidden_bias, (num_hidden,), 0.0, dtype)

    def layers(self) -> Layers:
        """Return the layers in natural parameters."""
        return Layers((self.weight,), (self.visible_bias, self.hidden_bias))

    @torch.no_grad()
    def fit_visible(self, data: Tensor | np.ndarray, pseudocount: float = 1.0) -> None:
        r"""Set the visible biases to the log-odds of the frequencies of ones (Hinton, 2012).

        With W = 0 this is the best model of independent units.

        Args:
            data: binary states or probabilities, shape ``(n, num_visible)``.
            pseudocount: number added to the counts of zeros and of ones, so that no bias is
                infinite.

        Raises:
            ValueError: if the data have another shape, or entries that are not from 0 to 1.
        """
        data = check_data(self, data, self.event_shape[0])
        if not bool(((data >= 0.0) & (data <= 1.0)).all()):
            raise ValueError(
                "data must be zeros and ones or probabilities, got values outside [0, 1]"
            )
        ones = data.double().sum(0) + pseudocount
        self.visible_bias.copy_(torch.logit(ones / (len(data) + 2.0 * pseudocount)))


class GaussianRBM(RBM):
    r"""Restricted Boltzmann machine with Gaussian visible and binary hidden units.

    The variances of the visible units are parameters.

    .. math::

        E(v, h) = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - \sum_{ij} \frac{v_i}{s_i} W_{ij} h_j
        - c \cdot h

    with :math:`s = \sigma` in the convention ``"hinton"`` (Hinton and Salakhutdinov, 2006) and
    :math:`s = \sigma^2` in that of ``"cho"`` (Cho, Ilin and Raiko, 2011): :math:`v_i | h` is normal
    of variance :math:`\sigma_i^2` and mean :math:`b_i + \sigma_i (W h)_i` or :math:`b_i + (W h)_i`.
    As an energy it is the free energy of v, that of a mixture of :math:`2^{n_h}` normals of one
    covariance; :meth:`joint` is E. If there are few hidden units, log Z, likelihoods and draws are
    exact.

    Args:
        num_visible: number of units of v.
        num_hidden: number of units of h.
        convention: ``"hinton"`` or ``"cho"``.
        weight: W, shape ``(num_visible, num_hidden)``; None draws normal numbers of standard
            deviation 0.01.
        visible_bias: b, shape ``(num_visible,)``, in the unit of v; None for 0.
        hidden_bias: c, shape ``(num_hidden,)``; None for 0.
        log_sigma: :math:`\log \sigma`, shape ``(num_visible,)``; None for 0.
        dtype: floating-point type; None for torch's default.
        generator: source of the initial weights; None for torch's default one.

    Raises:
        ValueError: if a size is below 1, if the convention is unknown, or if a parameter has
            another shape or is not finite.

    Example:
        >>> rbm = GaussianRBM(2, 1, weight=torch.tensor([[2.0], [0.0]]))
        >>> rbm.visible_given(torch.ones(1)).mean.detach()
        tensor([2., 0.])
        >>> rbm.sample(3).shape, round(rbm.log_z, 4)  # log(2 pi (1 + e^2))
        (torch.Size([3, 2]), 3.9648)
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        convention: Literal["hinton", "cho"] = "hinton",
        weight: Tensor | None = None,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
        log_sigma: Tensor | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_sizes("GaussianRBM", num_visible=num_visible, num_hidden=num_hidden)
        if convention not in ("hinton", "cho"):
            raise ValueError(
                f'GaussianRBM: convention must be "hinton" or "cho", got convention={convention!r}'
            )
        super().__init__((num_visible,), constraints.real)
        self.convention = convention
        self.weight = parameter("weight", weight, (num_visible, num_hidden), 0.01, dtype, generator)
        self.visible_bias = parameter("visible_bias", visible_bias, (num_visible,), 0.0, dtype)
        self.hidden_bias = parameter("hidden_bias", hidden_bias, (num_hidden,), 0.0, dtype)
        self.log_sigma = parameter("log_sigma", log_sigma, (num_visible,), 0.0, dtype)

    def layers(self) -> Layers:
        """Return the layers in natural parameters."""
        precision = torch.exp(-2.0 * self.log_sigma)
        scale = precision if self.convention == "cho" else torch.exp(-self.log_sigma)
        offset = 0.5 * (precision * self.visible_bias**2).sum()
        return Layers(
            (self.weight * scale.unsqueeze(1),),
            (self.visible_bias * precision, self.hidden_bias),
            precision,
            offset,
        )

    @torch.no_grad()
    def fit_visible(self, data: Tensor | np.ndarray) -> None:
        """Set b and sigma to the means and standard deviations of data.

        Args:
            data: visible states, shape ``(n, num_visible)``, n at least 2.

        Raises:
            ValueError: if the data have another shape, or if a standard deviation is 0.
        """
        data = check_data(self, data, self.event_shape[0], min_events=2)
        deviation = data.double().std(0)
        if not bool((deviation > 0.0).all()):
            raise ValueError(
                "data must vary in every column, but columns"
                f" {(~(deviation > 0)).nonzero().flatten().tolist()} do not"
            )
        self.visible_bias.copy_(data.double().mean(0))
        self.log_sigma.copy_(deviation.log())

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"convention={self.convention!r}"
