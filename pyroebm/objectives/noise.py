"""The noise distribution of noise-contrastive objectives."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_same
from pyroebm.core.annealing_path import DistributionEnergy
from pyroebm.core.energy import Energy
from pyroebm.core.rng import drawing_from, seeded_generator
from pyroebm.core.supports import inside, is_real
from pyroebm.flows import Flow

__all__ = ["Noise", "check_flow", "gaussian_noise"]


class Noise:
    r"""A fixed normalized density :math:`q`, which is sampled and evaluated.

    Args:
        density: a distribution of Pyro or torch with batch shape (); a
            :class:`~pyroebm.flows.Flow` with as many dimensions as an event has entries; or an
            energy with a known ``log_z`` and exact draws.

    Raises:
        ValueError: if ``density`` is none of these.

    Example:
        >>> import pyro.distributions as dist
        >>> noise = Noise(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> x, log_q = noise.draw(3, Energy((2,)))
        >>> x.shape, log_q.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, density: Distribution | Flow | Energy) -> None:
        self.density: Energy | Flow
        if isinstance(density, Distribution):
            with drawing_from(seeded_generator(0)), torch.no_grad():
                dtype = density.log_prob(density.sample()).dtype
            self.density = DistributionEnergy(density, dtype=dtype)
        elif isinstance(density, Flow):
            if density.total_dim != density.dim:
                raise ValueError(
                    "noise must have an exact log_prob of x, but this flow has auxiliary variables:"
                    f" dim={density.dim}, total_dim={density.total_dim}; use a flow with"
                    " total_dim=dim, such as NICE"
                )
            self.density = density
        elif isinstance(density, Energy) and density.has_exact_draws and density.log_z is not None:
            self.density = density
        else:
            raise ValueError(
                "noise must be a distribution of Pyro or torch, a Flow, or an Energy with a known"
                f" log_z and exact draws, got {type(density).__name__}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the draws."""
        return self.density.dtype

    @property
    def device(self) -> torch.device:
        """Device of the draws."""
        return self.density.device

    @property
    def name(self) -> str:
        """Class name of the density, for error messages."""
        return type(
            self.density.distribution
            if isinstance(self.density, DistributionEnergy)
            else self.density
        ).__name__

    def draw(
        self, num_samples: int, energy: Energy, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draw events of the energy's shape.

        Returns:
            The events, ``(num_samples, *event)``, and their :math:`\log q`, ``(num_samples,)``;
            detached.

        Raises:
            ValueError: if event shape, dtype or device of the noise differ from those of the
                energy, or a draw is outside its support.
        """
        self._check(energy)
        with torch.no_grad():
            if isinstance(self.density, Flow):
                x, log_q = self.density.forward_and_log_prob(
                    self.density.rsample_base(num_samples, generator)
                )
                x = x.reshape(num_samples, *energy.event_shape)
            else:
                x = self.density.sample(num_samples, generator)
                log_q = -self.density(x) - self._log_z
        if not bool(inside(energy.support, x, len(energy.event_shape)).all()):
            raise ValueError(
                f"noise must lie in the energy's support={energy.support}, but {self.name} has"
                " draws outside of it"
            )
        return x, log_q

    def log_prob(self, x: Tensor, energy: Energy) -> Tensor:
        r"""Evaluate :math:`\log q` at data ``(n, *event)``; shape ``(n,)``, detached.

        Raises:
            ValueError: if data or noise do not fit the energy, or the density is not finite and
                positive at a row of the data.
        """
        self.check(energy, x)
        with torch.no_grad():
            log_q = (
                self.density.log_prob(x.reshape(len(x), -1))
                if isinstance(self.density, Flow)
                else -self.density(x) - self._log_z
            )
        self.check_mass(log_q, x)
        return log_q

    def check(self, energy: Energy, batch: Tensor) -> None:
        """Raise ValueError unless the batch has events of the energy, and the noise fits them."""
        energy.check_states(batch, "batch")
        if batch.dim() != len(energy.event_shape) + 1 or len(batch) < 1:
            raise ValueError(
                "batch must have at least one row, (n, *event_shape), got shape"
                f" {tuple(batch.shape)}"
            )
        self._check(energy)

    def check_mass(self, log_q: Tensor, batch: Tensor) -> None:
        r"""Raise ValueError unless :math:`\log q` of every row is finite."""
        bad = ~log_q.isfinite()
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"noise must have a finite log_prob at all data, but log_prob of {self.name} is"
                f" {float(log_q[row])} at {int(bad.sum())} of {len(batch)} rows, the first is row"
                f" {row} with {batch[row].tolist()}: the data are not finite there, or outside the"
                " support of the noise"
            )

    @property
    def _log_z(self) -> float:
        return (
            0.0
            if isinstance(self.density, Flow) or self.density.log_z is None
            else self.density.log_z
        )

    def _check(self, energy: Energy) -> None:
        if isinstance(self.density, Flow):
            check_flow(self.density, energy)
        elif self.density.event_shape != energy.event_shape:
            raise ValueError(
                f"noise must have the event shape of the energy: {type(energy).__name__} has"
                f" {tuple(energy.event_shape)},"
                f" {self.name} has {tuple(self.density.event_shape)}; write .to_event() to make a"
                " batch an event"
            )
        check_same(type(energy).__name__, "dtype", energy.dtype, "noise", self.dtype)
        check_same(type(energy).__name__, "device", energy.device, "noise", self.device)


def check_flow(flow: Flow, energy: Energy) -> None:
    """Raise ValueError unless the flow's x has as many entries as an event, on all of R^d."""
    if flow.dim != energy.event_shape.numel() or not is_real(energy.support):
        raise ValueError(
            "a flow must have as many dimensions as an event has entries, and the energy real"
            f" support: the flow has dim={flow.dim}, {type(energy).__name__} has event_shape"
            f" {tuple(energy.event_shape)} and support {energy.support}"
        )


def gaussian_noise(data: Tensor, scale: float = 1.0) -> Distribution:
    r"""Fit a normal distribution to data, the usual noise of :class:`NoiseContrastive`.

    .. math:: q = N(m, s^2 \Sigma)

    with m and :math:`\Sigma` the mean and covariance of the data.

    Args:
        data: rows ``(N, *event)``.
        scale: s, a factor on the standard deviations. If it is too small, regions of the data are
            without noise draws.

    Returns:
        The distribution, with the event shape of the data.

    Raises:
        ValueError: if there are fewer than two rows, ``scale`` is not positive, or the data do not
            vary in every direction.

    Example:
        >>> noise = gaussian_noise(
        ...     torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), scale=2.0
        ... )
        >>> noise.covariance_matrix.diagonal()
        tensor([2., 8.])
    """
    if data.dim() < 1 or len(data) < 2 or not data.is_floating_point():
        raise ValueError(
            f"data must be at least two rows of floats, got shape {tuple(data.shape)}, {data.dtype}"
        )
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got scale={scale}")
    data = data.detach()
    event = data.shape[1:]
    flat = data.reshape(len(data), -1)
    covariance = scale**2 * torch.cov(flat.mT, correction=0).reshape(flat.shape[1], flat.shape[1])
    if not bool(covariance.isfinite().all()) or int(torch.linalg.cholesky_ex(covariance)[1]):
        raise ValueError(
            f"data must be finite and vary in every direction, but the covariance of {len(data)}"
            " rows is not positive definite"
        )
    if not event:
        return dist.Normal(flat.mean(), covariance.sqrt().squeeze())
    normal = dist.MultivariateNormal(flat.mean(0), covariance_matrix=covariance)
    if len(event) == 1:
        return normal
    return dist.TransformedDistribution(
        normal, torch.distributions.ReshapeTransform(flat.shape[1:], event)
    )
