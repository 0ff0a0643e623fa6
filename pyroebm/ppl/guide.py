"""A flow as the guide of a Pyro model: trained by SVI or by our objectives, with the same
parameters."""

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

#: Draws behind a quantile.
DRAWS = 10_000


class FlowGuide(AutoContinuous):
    r"""A flow as the guide of a Pyro model with continuous latents; an ``AutoContinuous`` guide, so
    all that takes one takes it.

    .. math:: q(\theta) = q(x)\, |\det \partial T / \partial x|^{-1}, \qquad \theta = T(x)

    x is all latents in one unconstrained vector, in the order of the model, and T the bijection of
    each to its support. A flow with D = d is the guide of the model itself. One with redundant
    latents, D > d, is the guide of :meth:`extended`, the model with a site :math:`y \sim N(M(x),
    \Sigma(x))` more, whose posterior of :math:`\theta` is the model's own. Either way minus the
    ELBO is :math:`J_R - \log C`, draw by draw, of :class:`pyroebm.objectives.ReverseKL` on
    :meth:`energy`. ``SVI`` and :func:`pyroebm.training.fit` train the same parameters, those
    of ``guide.flow``.

    With D = d it goes into ``pyro.infer.reparam.NeuTraReparam`` once it has been called; with any D
    our kernels run on :class:`pyroebm.flows.PullbackEnergy`. The fit may have missed a mode, which no
    ELBO shows: weight its draws (:func:`pyroebm.flows.importance_sample`) and evaluate it
    (:func:`pyroebm.flows.evaluate_flow`).

    Args:
        model: a Pyro model; rows of data may be subsampled if no latent is among them.
        flow: the flow, of as many x as the model has unconstrained entries; or what makes one of
            their number d, at the first call. There is no ``guide.flow`` until then.
        stl: let SVI leave the score out of the gradient ("sticking the landing", Roeder, Wu and
            Duvenaud, 2017).

    Raises:
        ValueError: at the first call, if the flow has another d; if a latent is discrete or in a
            plate that subsamples, or if the support of one depends on another.

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
        self._plain = (model,)  # in a tuple, so that a module's parameters stay the model's
        self.stl = stl
        if isinstance(flow, Flow):
            self.flow = flow
        else:
            self._make_flow = flow

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with drawing_from(seeded_generator(0)):
            super()._setup_prototype(*args, **kwargs)
            # a guide that is refused is not set up
            prototype, self.prototype_trace = self.prototype_trace, None
            elsewhere = InitMessenger(init_to_uniform)(initial_states(self._plain[0]))
            other = poutine.block(poutine.trace(elsewhere).get_trace)(*args, **kwargs)
        self._transforms: dict[str, Transform] = {}
        for name, site in prototype.iter_stochastic_nodes():
            self._transforms[name] = _fixed_transform(
                name, site, other, self._unconstrained_shapes[name]
            )
        if "flow" not in self._modules:
            self.flow = self._make_flow(self.latent_dim)
        if self.flow.dim != self.latent_dim:
            sizes = {name: event_numel(shape) for name, shape in self._unconstrained_shapes.items()}
            raise ValueError(
                f"flow must have dim={self.latent_dim}, the unconstrained entries of the latents"
                f" {sizes}, got dim={self.flow.dim}"
            )
        self.prototype_trace = prototype

    def _ready(self) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                "the guide has not seen its model's sites yet: call guide(*args),"
                " guide.energy(*args) or SVI's step"
            )

    def get_base_dist(self) -> dist.Distribution:
        return self.flow.base.distribution(self.flow.dtype, self.flow.device)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        if self.flow.conditional is not None:
            raise NotImplementedError(
                f"a flow with redundant latents (dim={self.flow.dim},"
                f" total_dim={self.flow.total_dim}) is no transform of the"
                " model's latents: run our kernels on pyroebm.flows.PullbackEnergy(guide.flow,"
                " guide.energy(*args))"
            )
        return self.flow.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
        """The law of (x, y)."""
        return self.flow(self.stl)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw of x in unconstrained coordinates; y, where there is one, goes to its site."""
        xy = super().sample_latent(*args, **kwargs)
        if self.flow.conditional is not None:
            pyro.sample(self._y, dist.Delta(xy[..., self.flow.dim :], event_dim=1))
        return xy[..., : self.flow.dim]

    @property
    def _y(self) -> str:
        return f"_{self._pyro_name}_y"

    def extended(self, *args: Any, **kwargs: Any) -> Any:
        r"""The model with the site :math:`y \sim N(M(x), \Sigma(x))`: what SVI takes with this
        guide.

        Where D = d it is the model. It returns what the model returns. In ``SVI(guide.extended,
        guide, ...)`` the guide runs first, as it must.
        """
        with poutine.trace() as seen:
            result = self._plain[0](*args, **kwargs)
        self._ready()
        if self.flow.conditional is not None:
            pyro.sample(self._y, self.flow.conditional(self._packed(seen.trace)))
        return result

    def _packed(self, trace: poutine.Trace) -> Tensor:
        """The latents of a trace as x, the inverse of ``_unpack_latent``: plates around the model
        are its batch."""
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
        """The model's posterior given these arguments over x: what our objectives, kernels and
        importance weights take.

        Raises:
            ValueError: if the model has no fixed density (a plate that subsamples); if its dtype is
                not the flow's.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        energy = ModelEnergy(self._plain[0], *args, **kwargs)
        self.flow.extend(energy)
        return energy

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """x as the model's sites: ``(*batch, d)`` to a dict of ``(*batch, *shape)``."""
        self._ready()
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
        """``num_samples`` draws of the guide, unweighted, as a dict of ``(n, *shape)``."""
        self._ready()
        xy, _ = self.flow.forward_and_log_prob(self.flow.rsample_base(num_samples, generator))
        return self.constrain(xy[:, : self.flow.dim])

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each entry of each site, from 10 000 draws of a fixed seed: a dict of
        ``(len(quantiles), *shape)``."""
        self._ready()
        draws = self.sample(DRAWS, seeded_generator(0, self.flow.device))
        return {
            name: x.quantile(torch.as_tensor(quantiles, dtype=x.dtype, device=x.device), 0)
            for name, x in draws.items()
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each entry of each site, as :meth:`quantiles` has it."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}


def _fixed_transform(name: str, site: Any, other: Any, shape: torch.Size) -> Transform:
    """The bijection of a latent, if it is the same wherever the other latents are."""
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ValueError(
                f"latent {name!r} is in plate {frame.name!r}, which draws {frame.size} of"
                f" {frame.full_size} rows anew at every"
                " call: a flow has no entry for the rows that were not drawn (subsample data only,"
                " or drop subsample_size)"
            )
    transform = biject_to(site["fn"].support)
    if name not in other.nodes:
        raise ValueError(
            f"latent {name!r} is not in every run of the model: a guide needs the same latents in"
            " each"
        )
    u = torch.ones(shape, dtype=site["value"].dtype, device=site["value"].device)
    if not torch.equal(transform(u), biject_to(other.nodes[name]["fn"].support)(u)):
        raise ValueError(
            f"the support of latent {name!r} depends on other latents: a guide needs one that is"
            " fixed. Write it as a function"
            " of a latent of fixed support (for Uniform(0, b): b * pyro.sample(..., Uniform(0, 1)))"
        )
    return transform
