"""What every flow can do for an energy: draw with its density, extend the energy by latents, give
the marginal of x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import Tensor
from torch.distributions import Transform

from pyroebm.core.energy import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.core.saving import Saveable
from pyroebm.flows.base import Base, StandardNormal
from pyroebm.flows.bijection import Bijection
from pyroebm.flows.extended import Extended
from pyroebm.flows.networks import ConditionalGaussian
from pyroebm.nn.mlp import frozen

__all__ = ["Flow"]


class Flow(Saveable):
    r"""A normalised density :math:`q(x, y)` on :math:`R^D`: a draw z of a base, pushed through
    bijections.

    .. math:: \log q(x, y) = \log p(z) - \log |\det \partial (x, y) / \partial z|

    The first d entries are x, the variable of an energy. The rest, y, are redundant: a learned
    :math:`N(y \mid M(x), \Sigma(x))` stands for :math:`q(y \mid x)`. Calling the flow gives the
    Pyro distribution.

    Args:
        transforms: bijections of :math:`R^D` with event dimension 1, in the order from z to (x, y).
        dim: d.
        total_dim: D.
        conditional: the Gaussian of y given x, of ``D - d`` entries; None where D = d.
        base: the density p of z; None is the standard normal.

    Raises:
        ValueError: if 1 <= d <= D does not hold, if ``conditional``, ``base`` or a transform does
            not fit them, or if their parameters have several dtypes.

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
                f"conditional must be of dim={dim} and extra={total_dim - dim} (None where extra"
                " is 0), got"
                f" {None if conditional is None else given}"
            )
        for transform in transforms:
            if not transform.bijective or (
                transform.domain.event_dim,
                transform.codomain.event_dim,
            ) != (1, 1):
                raise ValueError(
                    "transforms must be bijections of event dimension 1 (put an elementwise one in"
                    " an IndependentTransform), got"
                    f" {type(transform).__name__} from {transform.domain} to {transform.codomain}"
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
                f"the parts of a flow must have one dtype, got {sorted(map(str, dtypes))}; convert"
                " them with .to()"
            )
        # an empty buffer knows the dtype and the device that .to() gave, without a walk over the
        # parameters
        first = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("_anchor", first.new_empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._anchor.device

    def forward(self, stl: bool = False) -> dist.Distribution:
        """The joint Pyro distribution over (x, y), event shape ``(D,)``.

        Args:
            stl: let Pyro's ELBOs take the path derivative alone ("sticking the landing", Roeder, Wu
                and Duvenaud, 2017).
        """
        if stl:
            return _PathDerivative(self)
        return dist.TransformedDistribution(
            self.base.distribution(self.dtype, self.device), list(self.transform.parts)
        )

    def rsample_base(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """``num_samples`` draws of z, shape ``(n, D)``, with gradients in the parameters of the
        base where it has any."""
        return self.base.rsample(num_samples, self.dtype, self.device, generator)

    def forward_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""(x, y) and :math:`\log q(x, y)` of z, without any inverse: ``(*batch, D) -> (*batch, D),
        (*batch)``."""
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
        r""":math:`\log q(x, y)`, through the inverse: ``(*batch, D) -> (*batch)``."""
        self._check(xy, "xy", self.total_dim)
        log_det: Tensor | float = 0.0
        for transform in reversed(self.transform.parts):
            if isinstance(transform, Bijection):
                z, stretch = transform.inverse_with_log_det(xy)
            else:
                z = transform.inv(xy)
                stretch = transform.log_abs_det_jacobian(z, xy)
            xy, log_det = z, log_det + stretch
        return self.base.log_prob(xy) - log_det

    def path_log_prob(self, xy: Tensor) -> Tensor:
        r""":math:`\log q(x, y)` with the parameters held constant: its gradient flows through (x,
        y) only.

        In place of ``log_prob`` in an ELBO it leaves out the score :math:`\nabla_\theta \log q`,
        whose mean is 0, and with it all the noise of the gradient once q is the target ("sticking
        the landing", Roeder, Wu and Duvenaud, 2017).
        """
        # a copy: transforms that cache would hand back z with the graph that rsample left,
        # parameters and all
        with frozen(self):
            return self.log_prob(xy.clone())

    def forward_and_path_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`forward_and_log_prob`, and :meth:`path_log_prob` of what it gives: of layers that
        are a :class:`Bijection` in one pass."""
        layers = [layer for layer in self.transform.parts if isinstance(layer, Bijection)]
        # the layers are not all of it then
        own = (
            type(self).forward_and_log_prob is not Flow.forward_and_log_prob
            or type(self).log_prob is not Flow.log_prob
        )
        if own or len(layers) < len(self.transform.parts) or not torch.is_grad_enabled():
            xy, log_q = self.forward_and_log_prob(z)
            return xy, log_q, self.path_log_prob(xy)
        self._check(z, "z", self.total_dim)
        z = z if z.requires_grad else z.detach().requires_grad_()
        log_q = self.base.log_prob(z)
        with frozen(self.base):
            there = z.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.base.log_prob(there).sum(), there)
        for layer in layers:
            z, log_det, score = layer.with_score(z, score)
            log_q = log_q - log_det
        # the value of log q, and its gradient in (x, y) alone
        return z, log_q, log_q.detach() + (score * (z - z.detach())).sum(-1)

    def extend(self, energy: Energy) -> Extended:
        r"""The energy over (x, y) to fit this flow to: :math:`U(x) - \log N(y \mid M(x),
        \Sigma(x))`.

        Raises:
            ValueError: if the energy's event has not d entries, if its support is not real, or if
                its dtype or device is not the flow's.
        """
        extended = Extended(energy, self.conditional, self.dim)
        for what, theirs, ours in (
            ("dtype", energy.dtype, self.dtype),
            ("device", energy.device, self.device),
        ):
            if theirs != ours:
                raise ValueError(
                    f"the flow and the energy must have one {what}: {type(self).__name__} has"
                    f" {ours},"
                    f" {type(energy).__name__} has {theirs}; convert one of them with .to()"
                )
        return extended

    def joint_entropy(self) -> Tensor:
        r"""Entropy of (x, y) in nats, where it has a closed form.

        Raises:
            NotImplementedError: for a flow whose Jacobian determinant is not known to be constant.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no closed form of its entropy: average -log_prob over draws"
        )

    def log_prob_x(
        self,
        x: Tensor,
        num_samples: int = 256,
        method: str = "auto",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""The marginal :math:`\log q(x) = \log \int q(x, y)\, dy`, or a lower bound of it.

        * D = d: the density itself, exact.
        * ``"grid"``, for D - d = 1: quadrature over y, refined until it settles; exact to about the
          root of the dtype's epsilon, and without gradients.
        * ``"bound"``: a lower bound in the mean, tighter with K (Burda, Grosse and Salakhutdinov,
        2016),

        .. math::

            \log \frac1K \sum_k \frac{q(x, y_k)}{N(y_k \mid M(x), \Sigma(x))}, \qquad
            y_k \sim N(M(x), \Sigma(x)).

        Args:
            x: shape ``(*batch, d)``.
            num_samples: K, for the bound.
            method: ``"auto"`` is exact where it can be (D - d < 2) and the bound elsewhere.
            generator: source of the y, for the bound.

        Returns:
            shape ``(*batch)``, in nats.

        Raises:
            ValueError: if a shape, dtype or number is wrong, if ``method`` is unknown, or a grid is
                asked for where D - d > 1.
            ArithmeticError: if the quadrature does not settle.
        """
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
                "method='grid' integrates over one redundant latent, but total_dim - dim ="
                f" {extra}; use 'bound'"
            )
        if extra == 1 and method != "bound":
            return self._log_marginal(x)
        y = self.conditional.sample(x, num_samples, generator)
        x = x.expand(num_samples, *x.shape)
        log_ratio = self.log_prob(torch.cat((x, y), dim=-1)) - self.conditional.log_prob(y, x)
        return log_ratio.logsumexp(0) - math.log(num_samples)

    def score_samples(self, x: Tensor) -> Tensor:
        r"""Log-density :math:`\log q(x)` in nats, as scikit-learn's density estimators call it.

        Args:
            x: shape ``(*batch, d)``.

        Returns:
            shape ``(*batch)``.

        Raises:
            ValueError: if D - d > 1: :meth:`log_prob_x` has a lower bound then.
        """
        if self.total_dim - self.dim > 1:
            raise ValueError(
                f"the density of x is an integral over {self.total_dim - self.dim} latent entries:"
                ' log_prob_x(x, method="bound") is a lower bound of it'
            )
        return self.log_prob_x(x)

    @torch.no_grad()
    def _log_marginal(self, x: Tensor) -> Tensor:
        y = self.forward_and_log_prob(self.rsample_base(4096, seeded_generator(0, self.device)))[0][
            :, -1
        ]
        flat = x.reshape(-1, self.dim)

        # (points,) -> (points, rows), a few thousand evaluations at a time
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
    """A flow's distribution that gives Pyro's ELBOs the entropy term with constant parameters."""

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
    """log of the integral of exp(log_f) over the line by the trapezoidal rule, which is spectrally
    accurate on tails that vanish.

    The window starts as twice [low, high]; it is doubled while the ends matter and the step halved
    until the value settles.
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
        f"the quadrature over y did not settle on {points // 2} points; use method='bound'"
    )
