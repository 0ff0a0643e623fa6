"""A flow as the guide of a Pyro model, trained by SVI or by the objectives of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible, init_to_uniform
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyroebm.core.rng import drawing_from, seeded_generator
from pyroebm.core.supports import event_numel
from pyroebm.flows.flow import Flow
from pyroebm.ppl.distribution import initial_states
from pyroebm.ppl.model import ModelEnergy

__all__ = ["FlowGuide"]

#: Number of draws for quantiles.
QUANTILE_DRAWS = 10_000


class FlowGuide(AutoContinuous):
    r"""A flow as the guide of a Pyro model with continuous latent variables.

    .. math:: q(\theta) = q(x)\, |\det \partial T / \partial x|^{-1}, \qquad \theta = T(x)

    x is the vector of all latent variables in unconstrained coordinates, in the order of the model,
    and T the bijection of each to its support. The class is a subclass of Pyro's
    ``AutoContinuous``. A flow with D = d is the guide of the model itself. A flow with auxiliary
    variables, D > d, is the guide of :meth:`augmented`, the model with an additional site :math:`y
    \sim N(M(x), \Sigma(x))`, which has the same posterior of :math:`\theta`. In both cases the
    negative ELBO is :math:`J_R - \log C` of :class:`pyroebm.objectives.ReverseKL` on :meth:`energy`
    at the same draws. ``SVI`` and :func:`pyroebm.training.fit` train the same parameters, those of
    ``guide.flow``.

    With D = d the guide can be used in ``pyro.infer.reparam.NeuTraReparam`` after its first call.
    With any D kernels of this package sample :class:`pyroebm.flows.PullbackEnergy`. The ELBO does
    not show missed modes: use importance weights (:func:`pyroebm.flows.importance_sample`) and
    :func:`pyroebm.flows.evaluate_flow`.

    Args:
        model: a Pyro model; data may be subsampled if no latent variable is in the plate.
        flow: a flow whose dim is the number of unconstrained entries d of the model; or a function
            that makes a flow of d, which is called at the first call of the guide. There is no
            ``guide.flow`` before.
        stl: whether SVI omits the score from the gradient ("sticking the landing", Roeder, Wu and
            Duvenaud, 2017).

    Raises:
        ValueError: at the first call, if the flow has another d, a latent variable is discrete or
            in a plate that subsamples, or its support depends on another latent variable.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyroebm.flows import NICE, importance_sample
        >>> from pyroebm.objectives import ReverseKL
        >>> from pyroebm.training import fit
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> y = torch.tensor([2.0, 4.0, 3.0])
        >>> guide = FlowGuide(model, NICE(1))
        >>> loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(y)
        >>> energy = guide.energy(y)
        >>> history = fit(guide.flow, ReverseKL(energy, 64), num_steps=200, lr=2e-2)
        >>> weighted = importance_sample(
        ...     guide.flow, energy, 10_000
        ... )  # the posterior is Gamma(11, 4)
        >>> mean, se = weighted.expectation(lambda x: energy.constrain(x)["rate"])
        >>> abs(float(mean) - 11 / 4) < 5 * float(se), guide.sample(3)["rate"].shape
        (True, torch.Size([3]))
    """

    flow: Flow

    def __init__(
        self, model: Callable[..., Any], flow: Flow | Callable[[int], Flow], stl: bool = False
    ) -> None:
        super().__init__(initial_states(model), init_loc_fn=init_to_feasible)
        self._plain = (model,)  # a tuple, so that a module's parameters are not the guide's
        self.stl = stl
        if isinstance(flow, Flow):
            self.flow = flow
        else:
            self._make_flow = flow

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with drawing_from(seeded_generator(0)):
            super()._setup_prototype(*args, **kwargs)
            # set only after all checks have passed
            prototype, self.prototype_trace = self.prototype_trace, None
            second_model = InitMessenger(init_to_uniform)(initial_states(self._plain[0]))
            second = poutine.block(poutine.trace(second_model).get_trace)(*args, **kwargs)
        self._transforms: dict[str, Transform] = {}
        for name, site in prototype.iter_stochastic_nodes():
            self._transforms[name] = _fixed_transform(
                name, site, second, self._unconstrained_shapes[name]
            )
        if "flow" not in self._modules:
            self.flow = self._make_flow(self.latent_dim)
        if self.flow.dim != self.latent_dim:
            sizes = {name: event_numel(shape) for name, shape in self._unconstrained_shapes.items()}
            raise ValueError(
                f"flow must have dim={self.latent_dim}, the number of unconstrained entries of the"
                f" latent variables {sizes}, got dim={self.flow.dim}"
            )
        self.prototype_trace = prototype

    def _check_ready(self) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                "the guide must have run once to know the sites of its model: call guide(*args),"
                " guide.energy(*args) or the step of SVI"
            )

    def get_base_dist(self) -> dist.Distribution:
        """Return the distribution of z."""
        return self.flow.base.distribution(self.flow.dtype, self.flow.device)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the map from z to x; raise NotImplementedError with auxiliary variables."""
        if self.flow.conditional is not None:
            raise NotImplementedError(
                f"a flow with auxiliary variables (dim={self.flow.dim},"
                f" total_dim={self.flow.total_dim}) is no transform of the latent variables of the"
                " model: run kernels of this package on pyroebm.flows.PullbackEnergy(guide.flow,"
                " guide.energy(*args))"
            )
        return self.flow.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
        """Return the distribution of (x, y)."""
        return self.flow(self.stl)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw x in unconstrained coordinates, and y as a site of its own."""
        xy = super().sample_latent(*args, **kwargs)
        if self.flow.conditional is not None:
            pyro.sample(self._y, dist.Delta(xy[..., self.flow.dim :], event_dim=1))
        return xy[..., : self.flow.dim]

    @property
    def _y(self) -> str:
        return f"_{self._pyro_name}_y"

    def augmented(self, *args: Any, **kwargs: Any) -> Any:
        r"""Run the model with the additional site :math:`y \sim N(M(x), \Sigma(x))`.

        It is the model for SVI with this guide: ``SVI(guide.augmented, guide, ...)``. For D = d it
        is the model itself.

        Returns:
            What the model returns.
        """
        with poutine.trace() as tracer:
            result = self._plain[0](*args, **kwargs)
        self._check_ready()
        if self.flow.conditional is not None:
            pyro.sample(self._y, self.flow.conditional(self._pack_latent(tracer.trace)))
        return result

    def _pack_latent(self, trace: poutine.Trace) -> Tensor:
        """Return the latent variables of a trace as x, the inverse of ``_unpack_latent``.

        Plates around the model are batch dimensions of x.
        """
        parts = []
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            u, shape = (
                self._transforms[name].inv(trace.nodes[name]["value"]),
                self._unconstrained_shapes[name],
            )
            outer = u.shape[: u.dim() - len(shape)]
            plates = site["value"].dim() - site["fn"].event_dim
            parts.append(u.reshape(*outer, *[1] * (plates if outer else 0), event_numel(shape)))
        return torch.cat(parts, -1)

    def energy(self, *args: Any, **kwargs: Any) -> ModelEnergy:
        """Return the posterior of the model, given its arguments, as an energy over x.

        Raises:
            ValueError: if the model has no fixed density (a plate that subsamples), or its dtype
                differs from that of the flow.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        energy = ModelEnergy(self._plain[0], *args, **kwargs)
        self.flow.extend(energy)
        return energy

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Map x ``(*batch, d)`` to the sites of the model, a dict of ``(*batch, *shape)``."""
        self._check_ready()
        shapes = self._unconstrained_shapes
        parts = x.split([event_numel(shape) for shape in shapes.values()], -1)
        return {
            name: self._transforms[name](part.reshape(x.shape[:-1] + shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw from the guide, without importance weights: a dict of ``(num_samples, *shape)``."""
        self._check_ready()
        xy, _ = self.flow.forward_and_log_prob(self.flow.rsample_base(num_samples, generator))
        return self.constrain(xy[:, : self.flow.dim])

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Estimate quantiles of each entry of each site, a dict of ``(len(quantiles), *shape)``.

        They are computed from 10,000 draws with a fixed seed.
        """
        self._check_ready()
        draws = self.sample(QUANTILE_DRAWS, seeded_generator(0, self.flow.device))
        return {
            name: x.quantile(torch.as_tensor(quantiles, dtype=x.dtype, device=x.device), 0)
            for name, x in draws.items()
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Estimate the median of each entry of each site, as :meth:`quantiles` does."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}


def _fixed_transform(name: str, site: Any, second: Any, shape: torch.Size) -> Transform:
    """Return the bijection of a latent variable, if it does not depend on the others.

    ``second`` is a trace of the model with other values of the latent variables.
    """
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ValueError(
                f"latent {name!r} must not be in a plate that subsamples, but plate"
                f" {frame.name!r} draws {frame.size} of {frame.full_size} rows at every call:"
                " subsample data only, or drop subsample_size"
            )
    transform = biject_to(site["fn"].support)
    if name not in second.nodes:
        raise ValueError(
            f"latent {name!r} must be in every run of the model, but is missing in one: do not"
            " branch on latent variables"
        )
    u = torch.ones(shape, dtype=site["value"].dtype, device=site["value"].device)
    if not torch.equal(transform(u), biject_to(second.nodes[name]["fn"].support)(u)):
        raise ValueError(
            f"the support of latent {name!r} must not depend on other latent variables, but does."
            " Write it as a function of a latent variable of fixed support (for Uniform(0, b):"
            " b * pyro.sample(..., Uniform(0, 1)))"
        )
    return transform
