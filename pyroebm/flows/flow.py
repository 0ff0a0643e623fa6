"""The base class of flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import Tensor
from torch.distributions import Transform

from pyroebm.core.arrays import as_tensor
from pyroebm.core.energy import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.core.saving import Saveable
from pyroebm.flows.augmented import AugmentedEnergy
from pyroebm.flows.base import Base, StandardNormal
from pyroebm.flows.bijection import Bijection
from pyroebm.flows.networks import ConditionalGaussian
from pyroebm.nn.mlp import frozen

__all__ = ["Flow"]


class Flow(Saveable):
    r"""A normalizing flow: the density of a base, transformed by bijections of :math:`R^D`.

    .. math:: \log q(x, y) = \log p(z) - \log |\det \partial (x, y) / \partial z|

    The first d entries are x, the variable of an energy. The others, y, are auxiliary variables;
    :math:`q(y \mid x)` is approximated by a learned :math:`N(y \mid M(x), \Sigma(x))`. Calling the
    flow returns its Pyro distribution.

    Args:
        transforms: bijections of :math:`R^D` with event dimension 1, in the order from z to (x, y).
        dim: d.
        total_dim: D.
        conditional: the Gaussian of y given x, with ``D - d`` entries; None if D = d.
        base: the density p of z; None is the standard normal.

    Raises:
        ValueError: if 1 <= d <= D does not hold, if ``conditional``, ``base`` or a transform has
            other dimensions, or if their parameters have different dtypes.

    Example:
        >>> from pyro.distributions.transforms import affine_coupling
        >>> flow = Flow([affine_coupling(2)], dim=2, total_dim=2)
        >>> flow().event_shape
        torch.Size([2])
    """

    _anchor: Tensor

    def __init__(
        self,
        transforms: Sequence[Transform],
        dim: int,
        total_dim: int,
        conditional: ConditionalGaussian | None = None,
        base: Base | None = None,
    ) -> None:
        if not 1 <= dim <= total_dim:
            raise ValueError(
                f"dim and total_dim must satisfy 1 <= dim <= total_dim, got dim={dim},"
                f" total_dim={total_dim}"
            )
        given = (dim, 0) if conditional is None else (conditional.dim, conditional.extra)
        if given != (dim, total_dim - dim):
            raise ValueError(
                f"conditional must be of dim={dim} and extra={total_dim - dim} (None if extra is"
                f" 0), got {None if conditional is None else given}"
            )
        for transform in transforms:
            if not transform.bijective or (
                transform.domain.event_dim,
                transform.codomain.event_dim,
            ) != (1, 1):
                raise ValueError(
                    "transforms must be bijections of event dimension 1 (wrap an elementwise one in"
                    f" IndependentTransform), got {type(transform).__name__} from"
                    f" {transform.domain} to {transform.codomain}"
                )
        for part in (base, *transforms):
            if isinstance(part, (Base, Bijection)) and part.dim != total_dim:
                raise ValueError(
                    f"{type(part).__name__} must be of total_dim={total_dim} entries, got"
                    f" dim={part.dim}"
                )
        super().__init__()
        self.dim = dim
        self.total_dim = total_dim
        self.conditional = conditional
        self.transform = ComposeTransformModule(list(transforms))
        self.base = StandardNormal(total_dim) if base is None else base
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        if len(dtypes) > 1:
            raise ValueError(
                "transforms, conditional and base must have the same dtype, got"
                f" {sorted(map(str, dtypes))}; convert them with .to()"
            )
        # an empty buffer follows .to(), so dtype and device are known without traversing parameters
        first = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("_anchor", first.new_empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._anchor.device

    def forward(self, stl: bool = False) -> dist.Distribution:
        """Return the joint Pyro distribution of (x, y), event shape ``(D,)``.

        Args:
            stl: whether Pyro's ELBOs use the path derivative alone ("sticking the landing", Roeder,
                Wu and Duvenaud, 2017).
        """
        if stl:
            return _PathDerivative(self)
        return dist.TransformedDistribution(
            self.base.distribution(self.dtype, self.device), list(self.transform.parts)
        )

    def rsample_base(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw z, shape ``(num_samples, D)``, with gradients in the parameters of the base."""
        return self.base.rsample(num_samples, self.dtype, self.device, generator)

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Transform z, and compute the log density at the image, without an inverse.

        Args:
            z: shape ``(*batch, D)``.

        Returns:
            (x, y) ``(*batch, D)`` and :math:`\log q(x, y)` ``(*batch)``.
        """
        self._check(z, "z", self.total_dim)
        log_q = self.base.log_prob(z)
        for transform in self.transform.parts:
            if isinstance(transform, Bijection):
                image, log_det = transform.with_log_det(z)
            else:
                image = transform(z)
                log_det = transform.log_abs_det_jacobian(z, image)
            z, log_q = image, log_q - log_det
        return z, log_q

    def log_prob(self, xy: Tensor) -> Tensor:
        r"""Compute :math:`\log q(x, y)` through the inverse: ``(*batch, D) -> (*batch)``."""
        self._check(xy, "xy", self.total_dim)
        log_det: Tensor | float = 0.0
        for transform in reversed(self.transform.parts):
            if isinstance(transform, Bijection):
                z, layer_log_det = transform.inverse_with_log_det(xy)
            else:
                z = transform.inv(xy)
                layer_log_det = transform.log_abs_det_jacobian(z, xy)
            xy, log_det = z, log_det + layer_log_det
        return self.base.log_prob(xy) - log_det

    def path_log_prob(self, xy: Tensor) -> Tensor:
        r"""Compute :math:`\log q(x, y)` with constant parameters.

        Its gradient is in (x, y) alone.
        In an ELBO it replaces ``log_prob`` to omit the score :math:`\nabla_\theta \log q`, whose
        mean is 0. The gradient then has no variance where q is the target ("sticking the landing",
        Roeder, Wu and Duvenaud, 2017).
        """
        # a copy: transforms with a cache would return the z of rsample, with its graph
        with frozen(self):
            return self.log_prob(xy.clone())

    def forward_and_path_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return :meth:`forward_and_log_prob`, and :meth:`path_log_prob` at the image.

        If all layers are a :class:`Bijection`, both are computed in one pass.
        """
        layers = [layer for layer in self.transform.parts if isinstance(layer, Bijection)]
        # a subclass may transform by more than its layers
        overridden = (
            type(self).forward_and_log_prob is not Flow.forward_and_log_prob
            or type(self).log_prob is not Flow.log_prob
        )
        if overridden or len(layers) < len(self.transform.parts) or not torch.is_grad_enabled():
            xy, log_q = self.forward_and_log_prob(z)
            return xy, log_q, self.path_log_prob(xy)
        self._check(z, "z", self.total_dim)
        z = z if z.requires_grad else z.detach().requires_grad_()
        log_q = self.base.log_prob(z)
        with frozen(self.base):
            leaf = z.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.base.log_prob(leaf).sum(), leaf)
        for layer in layers:
            z, log_det, score = layer.with_score(z, score)
            log_q = log_q - log_det
        # the value of log q with a gradient in (x, y) alone
        return z, log_q, log_q.detach() + (score * (z - z.detach())).sum(-1)

    def extend(self, energy: Energy) -> AugmentedEnergy:
        r"""Return the energy over (x, y) to which the flow is fitted.

        .. math:: U(x, y) = U(x) - \log N(y \mid M(x), \Sigma(x))

        Raises:
            ValueError: if the events of the energy do not have d entries, its support is not real,
                or its dtype or device differs from that of the flow.
        """
        extended = AugmentedEnergy(energy, self.conditional, self.dim)
        for what, theirs, ours in (
            ("dtype", energy.dtype, self.dtype),
            ("device", energy.device, self.device),
        ):
            if theirs != ours:
                raise ValueError(
                    f"the flow and the energy must have the same {what}: {type(self).__name__} has"
                    f" {ours}, {type(energy).__name__} has {theirs}; convert one of them with .to()"
                )
        return extended

    def joint_entropy(self) -> Tensor:
        r"""Return the entropy of (x, y) in nats, if it has a closed form.

        Raises:
            NotImplementedError: if the Jacobian determinant of the flow is not constant.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no closed form of its entropy: average -log_prob over draws"
        )

    def log_prob_x(
        self,
        x: Tensor | np.ndarray,
        num_samples: int = 256,
        method: str = "auto",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Compute the marginal :math:`\log q(x) = \log \int q(x, y)\, dy`, or a lower bound on it.

        * D = d: the density itself, exact.
        * ``"grid"``, for D - d = 1: quadrature over y, refined until it converges, with a relative
          error of about the square root of the dtype's epsilon, and without gradients.
        * ``"bound"``: a lower bound in expectation, tighter for larger K (Burda, Grosse and
          Salakhutdinov, 2016),

        .. math::

            \log \frac1K \sum_k \frac{q(x, y_k)}{N(y_k \mid M(x), \Sigma(x))}, \qquad
            y_k \sim N(M(x), \Sigma(x)).

        Args:
            x: shape ``(*batch, d)``.
            num_samples: K, for the bound.
            method: ``"grid"``, ``"bound"`` or ``"auto"``, which is exact if D - d < 2 and the bound
                otherwise.
            generator: source of the y, for the bound; None is torch's default generator.

        Returns:
            The log densities in nats, shape ``(*batch)``.

        Raises:
            ValueError: if a shape, dtype or number is wrong, ``method`` is unknown, or ``method``
                is "grid" with D - d > 1.
            ArithmeticError: if the quadrature does not converge.
        """
        x = as_tensor(x, self.dtype, self.device)
        self._check(x, "x", self.dim)
        if method not in ("auto", "grid", "bound"):
            raise ValueError(f"method must be 'auto', 'grid' or 'bound', got method={method!r}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got num_samples={num_samples}")
        if self.conditional is None:
            return self.log_prob(x)
        extra = self.total_dim - self.dim
        if method == "grid" and extra > 1:
            raise ValueError(
                "method='grid' must have one auxiliary variable, but total_dim - dim ="
                f" {extra}; use 'bound'"
            )
        if extra == 1 and method != "bound":
            return self._log_marginal(x)
        y = self.conditional.sample(x, num_samples, generator)
        x = x.expand(num_samples, *x.shape)
        log_ratio = self.log_prob(torch.cat((x, y), dim=-1)) - self.conditional.log_prob(y, x)
        return log_ratio.logsumexp(0) - math.log(num_samples)

    def score_samples(self, x: Tensor | np.ndarray) -> Tensor:
        r"""Compute the log density :math:`\log q(x)` in nats (scikit-learn's name).

        Args:
            x: shape ``(*batch, d)``, of the flow's dtype, or a NumPy array.

        Returns:
            The log densities, shape ``(*batch)``.

        Raises:
            ValueError: if D - d > 1; use the lower bound of :meth:`log_prob_x`.
        """
        if self.total_dim - self.dim > 1:
            raise ValueError(
                "score_samples must have at most one auxiliary variable, to integrate over, but"
                f" total_dim - dim = {self.total_dim - self.dim}: use the lower bound"
                ' log_prob_x(x, method="bound")'
            )
        return self.log_prob_x(x)

    @torch.no_grad()
    def _log_marginal(self, x: Tensor) -> Tensor:
        y = self.forward_and_log_prob(self.rsample_base(4096, seeded_generator(0, self.device)))[0][
            :, -1
        ]
        flat = x.reshape(-1, self.dim)

        # (points,) -> (points, rows), about 65,536 evaluations at a time
        def log_joint(grid: Tensor) -> Tensor:
            columns = grid[:, None, None].expand(-1, len(flat), 1)
            rows = flat.expand(len(grid), *flat.shape)
            parts = [
                self.log_prob(part)
                for part in torch.cat((rows, columns), dim=-1).split(
                    max(1, 65536 // max(1, len(flat)))
                )
            ]
            return torch.cat(parts)

        return _log_integral(log_joint, y.min(), y.max()).reshape(x.shape[:-1])

    def _check(self, value: Tensor, name: str, size: int) -> None:
        if value.dim() < 1 or value.shape[-1] != size:
            raise ValueError(
                f"{name} must have shape (*batch, {size}), got shape {tuple(value.shape)}"
            )
        if value.dtype != self.dtype or value.device != self.device:
            raise ValueError(
                f"{name} must have the flow's dtype and device, {self.dtype} and {self.device},"
                f" got {value.dtype} and"
                f" {value.device}"
            )


class _PathDerivative(dist.TransformedDistribution):
    """The distribution of a flow whose entropy term in Pyro's ELBOs has constant parameters."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        super().__init__(
            flow.base.distribution(flow.dtype, flow.device), list(flow.transform.parts)
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        new = self.__new__(type(self)) if _instance is None else _instance
        new.flow = self.flow
        return super().expand(batch_shape, new)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        log_q = self.flow.path_log_prob(x)
        return ScoreParts(log_prob=log_q, score_function=0, entropy_term=log_q)  # type: ignore[arg-type]  # Pyro's own zero


def _log_integral(log_f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Compute the log of the integral of exp(log_f) over the line by the trapezoidal rule.

    It converges spectrally for smooth functions whose tails vanish. The window starts as twice
    [low, high] and is doubled until the ends are negligible; then the step is halved until the
    value converges.
    """
    tolerance = math.sqrt(torch.finfo(low.dtype).eps)
    middle, half = 0.5 * (low + high), high - low
    last, points = torch.tensor(math.nan), 129
    while points < 2**17:
        grid = middle + half * torch.linspace(-1.0, 1.0, points, dtype=low.dtype, device=low.device)
        values = log_f(grid)
        ends = torch.maximum(values[0], values[-1]) - values.amax(0)
        now = values.logsumexp(0) + (2.0 * half / (points - 1)).log()
        points = 2 * points - 1
        if bool((ends > math.log(tolerance)).any()):
            half, last = 2.0 * half, last.new_tensor(math.nan)
        elif bool(((now - last).abs() <= tolerance * now.abs().clamp(min=1.0)).all()):
            return now
        else:
            last = now
    raise ArithmeticError(
        f"the quadrature over y did not converge with {points // 2} points; use method='bound'"
    )
