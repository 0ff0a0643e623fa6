"""Base distributions of flows: the standard normal, Gaussian mixtures, Student's t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyroebm.core._checks import check_counts
from pyroebm.core.rng import drawing_from, standard_normal, uniform
from pyroebm.core.saving import Saveable
from pyroebm.flows.networks import LOG_2PI

__all__ = ["Base", "Drawn", "MixtureBase", "StandardNormal", "StudentBase"]

#: Lower bound of the degrees of freedom, above which the variance is finite.
MIN_DF = 2.0


class Base(Saveable):
    r"""A density of z on :math:`R^D` with reparameterized draws.

    Subclasses define :meth:`rsample` and :meth:`log_prob`.

    Args:
        dim: D.

    Raises:
        ValueError: if ``dim`` < 1.
    """

    def __init__(self, dim: int) -> None:
        check_counts({"dim": 1}, dim)
        super().__init__()
        self.dim = dim

    def rsample(
        self,
        num_samples: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z with gradients in the parameters, shape ``(num_samples, D)``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define rsample(num_samples, dtype, device, generator) -> z"
        )

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log density in nats: ``(*batch, D) -> (*batch)``."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(z)")

    def distribution(self, dtype: torch.dtype, device: torch.device) -> dist.Distribution:
        """Return the Pyro distribution of z, event shape ``(D,)``."""
        return Drawn(lambda n: self.rsample(n, dtype, device), self.log_prob, self.dim)


class StandardNormal(Base):
    r"""The standard normal distribution, without parameters.

    .. math:: \log N(z \mid 0, I) = -\tfrac12 |z|^2 - \tfrac D2 \log 2\pi

    Args:
        dim: D.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def rsample(
        self,
        num_samples: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw with gradients in the parameters."""
        return standard_normal((num_samples, self.dim), generator, dtype, device)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log density in nats."""
        return -0.5 * (z.square().sum(-1) + self.dim * LOG_2PI)

    def distribution(self, dtype: torch.dtype, device: torch.device) -> dist.Distribution:
        """Return the Pyro distribution of z, event shape ``(D,)``."""
        zero = torch.zeros(self.dim, dtype=dtype, device=device)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


class MixtureBase(Base):
    r"""A mixture of K Gaussians with diagonal covariances.

    .. math:: p(z) = \sum_k w_k N(z \mid \mu_k, \mathrm{diag}(\sigma_k^2))

    Means and scales are learned. A draw is :math:`\mu_k + \sigma_k \epsilon` with k drawn from the
    weights, which gives no gradient in w. If w is learned too, its gradient is added by implicit
    reparameterization (Figurnov, Mohamed and Mnih, 2018), which keeps the conditional distribution
    functions :math:`F_i(z_i \mid z_{<i})` constant,

    .. math:: \frac{d z_i}{d w} = -\frac{1}{p(z_i \mid z_{<i})} \Big(\frac{\partial F_i}{\partial w}
        + \sum_{j<i} \frac{\partial F_i}{\partial z_j} \frac{d z_j}{d w}\Big)

    This gradient is unbiased, but has a large variance if the components are well separated, since
    p is small between them. The weights of separated modes are better learned with losses that
    evaluate :meth:`log_prob` at given points (forward KL, log-variance).

    Args:
        dim: D.
        num_components: K.
        spread: standard deviation of the initial means, in units of the initial scale 1.
        learn_weights: whether to learn w; otherwise it is uniform.
        dtype: dtype of the parameters; None is torch's default.
        generator: source of the initial means; None is torch's default generator.

    Raises:
        ValueError: if ``dim`` or ``num_components`` < 1, or ``spread`` is negative.

    Example:
        >>> base = MixtureBase(2, num_components=3)
        >>> base.rsample(5, torch.float32, torch.device("cpu")).shape, base.weights
        (torch.Size([5, 2]), tensor([0.3333, 0.3333, 0.3333]))
    """

    def __init__(
        self,
        dim: int,
        num_components: int,
        spread: float = 2.0,
        learn_weights: bool = False,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_counts({"num_components": 1}, num_components)
        if not spread >= 0.0:
            raise ValueError(f"spread must be nonnegative, got spread={spread}")
        super().__init__(dim)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        noise = standard_normal((num_components, dim), generator, dtype, torch.device("cpu"))
        self.loc = nn.Parameter(spread * noise)
        self.log_scale = nn.Parameter(torch.zeros(num_components, dim, dtype=dtype))
        logits = torch.zeros(num_components, dtype=dtype)
        self.logits: Tensor
        if learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)

    @property
    def weights(self) -> Tensor:
        """The weights w, shape ``(K,)``."""
        return self.logits.softmax(0)

    def rsample(
        self,
        num_samples: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw with gradients in the parameters."""
        u = uniform((num_samples, 1), generator, dtype, device)
        # the last cumulative sum may be below u, by rounding
        k = (u > self.weights.detach().cumsum(0)).sum(-1).clamp(max=len(self.logits) - 1)
        z = self.loc[k] + self.log_scale[k].exp() * standard_normal(
            (num_samples, self.dim), generator, dtype, device
        )
        if not self.logits.requires_grad:
            return z
        moved = self._moved_by_weights(z.detach())
        return z + (moved - moved.detach())

    def _moved_by_weights(self, z: Tensor) -> Tensor:
        """Return z with its implicit derivative in the weights."""
        loc, scale = self.loc.detach(), self.log_scale.detach().exp()
        # unnormalized log weights of the components given the previous entries
        log_w = self.logits.log_softmax(0).expand(len(z), -1)
        done: list[Tensor] = []
        for i in range(self.dim):
            below = (
                log_w.softmax(-1) * torch.special.ndtr((z[:, i : i + 1] - loc[:, i]) / scale[:, i])
            ).sum(-1)
            density = (
                log_w.detach().softmax(-1)
                * _log_normal(z[:, i : i + 1], loc[:, i], scale[:, i]).exp()
            ).sum(-1)
            entry = z[:, i] - (below - below.detach()) / density
            log_w = log_w + _log_normal(entry.unsqueeze(-1), loc[:, i], scale[:, i])
            done.append(entry)
        return torch.stack(done, dim=-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log density in nats."""
        parts = _log_normal(z.unsqueeze(-2), self.loc, self.log_scale.exp()).sum(-1)
        return (self.logits.log_softmax(0) + parts).logsumexp(-1)


def _log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * (((z - loc) / scale).square() + LOG_2PI) - scale.log()


class StudentBase(Base):
    r"""Independent Student's t distributions of the entries, for targets with heavy tails.

    .. math::

        z_i = \epsilon_i \big/ \sqrt{\chi^2_{\nu_i} / \nu_i}, \qquad
        \nu_i = 2 + \mathrm{softplus}(r_i)

    More than two degrees of freedom keep the variance finite. The gradient in :math:`\nu` is
    torch's implicit gradient of the gamma distribution. Lipschitz flows cannot change the tail
    index, so the base must have the tails of the target (Jaini, Kobyzev, Yu and Brubaker, 2020).

    Args:
        dim: D.
        df: initial degrees of freedom of each entry, above 2.
        learn_df: whether to learn the degrees of freedom.
        dtype: dtype of the parameters; None is torch's default.

    Raises:
        ValueError: if ``dim`` < 1, or ``df`` is not above 2 and finite.

    Example:
        >>> StudentBase(2, df=4.0).df.detach()
        tensor([4., 4.])
    """

    def __init__(
        self,
        dim: int,
        df: float = 5.0,
        learn_df: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not MIN_DF < df < math.inf:
            raise ValueError(f"df must be above {MIN_DF:g} and finite, got df={df}")
        super().__init__(dim)
        # in float64, so that softplus inverts it to full precision
        above = torch.full((dim,), df - MIN_DF, dtype=torch.float64)
        raw = (above + (-(-above).expm1()).log()).to(
            torch.get_default_dtype() if dtype is None else dtype
        )
        self.raw: Tensor
        if learn_df:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)

    @property
    def df(self) -> Tensor:
        r"""The degrees of freedom :math:`\nu`, shape ``(D,)``."""
        return MIN_DF + softplus(self.raw)

    def _student(self) -> dist.StudentT:
        return dist.StudentT(self.df, validate_args=False)

    def rsample(
        self,
        num_samples: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw with gradients in the parameters."""
        with drawing_from(generator):
            return self._student().rsample((num_samples,))

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log density in nats."""
        return self._student().log_prob(z).sum(-1)


class Drawn(dist.TorchDistribution):
    """A Pyro distribution over vectors, given by functions.

    Args:
        draw: a function from n to draws ``(n, D)``, which uses torch's default generator.
        log_density: the log density, ``(*batch, D) -> (*batch)``.
        dim: D.
        path: the same log density with constant parameters, with which Pyro's ELBOs use the path
            derivative alone.
        has_rsample: False if draws do not have all gradients; Pyro then uses the score function
            estimator.
        batch_shape: batch shape of the distribution.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        log_density: Callable[[Tensor], Tensor],
        dim: int,
        path: Callable[[Tensor], Tensor] | None = None,
        has_rsample: bool = True,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self._args = (draw, log_density, dim, path, has_rsample)
        self.has_rsample = has_rsample
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Drawn:
        """Return the distribution with another batch shape."""
        return Drawn(*self._args, batch_shape=batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw with gradients in the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._args[0](math.prod(shape[:-1])).reshape(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log density in nats."""
        log_p = self._args[1](value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the terms of Pyro's ELBO gradients."""
        path = self._args[3]
        if path is None or not self.has_rsample:
            return super().score_parts(x, *args, **kwargs)
        log_q = path(x)
        return ScoreParts(log_prob=log_q, score_function=0, entropy_term=log_q)  # type: ignore[arg-type]  # Pyro's own zero
