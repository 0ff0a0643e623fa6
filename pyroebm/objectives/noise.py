"""The noise that data are told apart from: any normalised law with draws, held fixed."""

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
    r"""A normalised law :math:`q`, held fixed: draws with their :math:`\log q`, and :math:`\log q`
    of data.

    Args:
        law: a distribution of Pyro or torch with batch shape (), a :class:`~pyroebm.flows.Flow` of
            as many dimensions as an event has entries, or an energy that knows its ``log_z`` and
            has exact draws.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> import pyro.distributions as dist
        >>> noise = Noise(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> x, log_q = noise.draw(3, Energy((2,)))
        >>> x.shape, log_q.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, law: Distribution | Flow | Energy) -> None:
        self.law: Energy | Flow
        if isinstance(law, Distribution):
            with drawing_from(seeded_generator(0)), torch.no_grad():
                dtype = law.log_prob(law.sample()).dtype
            self.law = DistributionEnergy(law, dtype=dtype)
        elif isinstance(law, Flow):
            if law.total_dim != law.dim:
                raise ValueError(
                    "noise needs an exact log_prob of x alone, but this flow has redundant"
                    f" latents: dim={law.dim},"
                    f" total_dim={law.total_dim}"
                )
            self.law = law
        elif isinstance(law, Energy) and law.has_exact_draws and law.log_z is not None:
            self.law = law
        else:
            raise ValueError(
                "noise must be a distribution of Pyro or torch, a Flow, or an Energy with a known"
                " log_z and exact draws, got"
                f" {type(law).__name__}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of its draws."""
        return self.law.dtype

    @property
    def device(self) -> torch.device:
        """Device of its draws."""
        return self.law.device

    @property
    def name(self) -> str:
        """What it was made of."""
        return type(
            self.law.distribution if isinstance(self.law, DistributionEnergy) else self.law
        ).__name__

    def draw(
        self, num_samples: int, energy: Energy, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""``num_samples`` events of the energy's shape, and their :math:`\log q`, ``(n,)``;
        detached.

        Raises:
            ValueError: if the noise has not the event shape, dtype or device of the energy, or
                leaves its support.
        """
        self._check(energy)
        with torch.no_grad():
            if isinstance(self.law, Flow):
                x, log_q = self.law.forward_and_log_prob(
                    self.law.rsample_base(num_samples, generator)
                )
                x = x.reshape(num_samples, *energy.event_shape)
            else:
                x = self.law.sample(num_samples, generator)
                log_q = -self.law(x) - self._log_z
        if not bool(inside(energy.support, x, len(energy.event_shape)).all()):
            raise ValueError(
                f"noise must lie in the energy's support={energy.support}, but {self.name} draws"
                " outside of it"
            )
        return x, log_q

    def log_prob(self, x: Tensor, energy: Energy) -> Tensor:
        r""":math:`\log q` of data ``(n, *event)``, shape ``(n,)``; detached.

        Raises:
            ValueError: if data or noise do not fit the energy, or the noise has no mass where a row
                of data is.
        """
        self.check(energy, x)
        with torch.no_grad():
            log_q = (
                self.law.log_prob(x.reshape(len(x), -1))
                if isinstance(self.law, Flow)
                else -self.law(x) - self._log_z
            )
        self.check_mass(log_q, x)
        return log_q

    def check(self, energy: Energy, batch: Tensor) -> None:
        """ValueError unless the batch holds rows of the energy's events, and the noise is a law of
        such."""
        energy.check_states(batch, "batch")
        if batch.dim() != len(energy.event_shape) + 1 or len(batch) < 1:
            raise ValueError(
                "batch must have at least one row, (n, *event_shape), got shape"
                f" {tuple(batch.shape)}"
            )
        self._check(energy)

    def check_mass(self, log_q: Tensor, batch: Tensor) -> None:
        r"""ValueError unless :math:`\log q` of every row is finite."""
        bad = ~log_q.isfinite()
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"noise must have a finite log_prob where there are data, but {self.name} gives"
                f" {float(log_q[row])} at"
                f" {int(bad.sum())} of {len(batch)} rows, the first is row {row} with"
                f" {batch[row].tolist()}: the data are not"
                " finite there, or the noise has no mass"
            )

    @property
    def _log_z(self) -> float:
        return 0.0 if isinstance(self.law, Flow) or self.law.log_z is None else self.law.log_z

    def _check(self, energy: Energy) -> None:
        if isinstance(self.law, Flow):
            check_flow(self.law, energy)
        elif self.law.event_shape != energy.event_shape:
            raise ValueError(
                f"noise must have the event shape of the energy: {type(energy).__name__} has"
                f" {tuple(energy.event_shape)},"
                f" {self.name} has {tuple(self.law.event_shape)}; write .to_event() to make a"
                " batch an event"
            )
        check_same(type(energy).__name__, "dtype", energy.dtype, "noise", self.dtype)
        check_same(type(energy).__name__, "device", energy.device, "noise", self.device)


def check_flow(flow: Flow, energy: Energy) -> None:
    """ValueError unless the flow's x has as many entries as an event, on all of R^d."""
    if flow.dim != energy.event_shape.numel() or not is_real(energy.support):
        raise ValueError(
            f"a flow is a law on R^d, with d the entries of an event: it has dim={flow.dim},"
            f" {type(energy).__name__} has"
            f" event_shape {tuple(energy.event_shape)} and support {energy.support}"
        )


def gaussian_noise(data: Tensor, scale: float = 1.0) -> Distribution:
    r"""The normal law with the mean and the covariance of data, :math:`N(m, s^2 \Sigma)`: the
    common noise of :class:`NoiseContrastive`.

    Args:
        data: rows ``(N, *event)``; the law has their event shape.
        scale: :math:`s`, a factor of standard deviations. Noise too narrow leaves regions of the
            data without a draw.

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
