"""Draws from predictive distributions with Pyro's arguments, vectorized over the draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.infer
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyroebm.diagnostics.pyro_model import ModelCall, trace_draws, trace_model

__all__ = ["Predictive"]

#: Name of the site of a trace that has the value that the model returns.
RETURN = "_RETURN"


class Predictive(pyro.infer.Predictive):
    """Draw from the predictive distribution with the arguments of ``pyro.infer.Predictive``.

    The model is run once for each draw of the posterior, with the latent variables set to that
    draw; sites without draws are sampled. All runs are one vectorized call (``torch.func.vmap``),
    and the model needs no plates for it. A model that cannot be vectorized, since it branches on a
    latent variable, is run draw by draw, with a RuntimeWarning that states the reason.

    Names and shapes of the results are those of Pyro. Random numbers come from torch's default
    generator, in another order than in Pyro. A call of the object returns the draws;
    ``get_vectorized_trace`` is Pyro's, and needs plates.

    Args:
        model: a Pyro model. Observed sites are drawn if their data are None in the call.
        posterior_samples: draws of sites, shape ``(num_samples, *shape)``; None draws from the
            prior.
        guide: a guide, which is run with the model's arguments in place of ``posterior_samples``.
        num_samples: number of draws, if ``posterior_samples`` has none.
        return_sites: names of the sites to return, among them ``"_RETURN"`` for what the model
            returns; by default all without posterior draws, and all with a ``guide``.
        parallel: ignored; draws are always vectorized.
        infer_discrete: draw the discrete latent variables without draws from their distribution
            given the data and the draws of the others, as NumPyro's argument of this name does:
            the labels of a mixture whose labels were summed out. They are drawn jointly, by
            ``pyro.infer.infer_discrete``, and then the continuous sites without draws.

    Raises:
        ValueError: if neither ``posterior_samples`` nor ``num_samples`` is given; if the posterior
            samples have different numbers of draws; in the call, if ``infer_discrete`` would need
            draws of a continuous variable, on which data depend.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> x = torch.tensor([1.0, 2.0])
        >>> pyro.set_rng_seed(0)
        >>> predictive = Predictive(model, {"slope": torch.full((1000,), 3.0)})
        >>> predictive(x)["y"].shape, [round(m) for m in predictive(x)["y"].mean(0).tolist()]
        (torch.Size([1000, 2]), [3, 6])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable[..., Any] | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = (),
        parallel: bool = False,
        *,
        infer_discrete: bool = False,
    ) -> None:
        sizes = {name: len(value) for name, value in (posterior_samples or {}).items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"posterior_samples must have one number of draws, got {sizes}: give"
                " mcmc.get_samples()"
            )
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self.infer_discrete = infer_discrete

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the predictive distribution, and return a dict of ``(num_samples, *shape)``.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        samples, sites = self.posterior_samples, self.return_sites
        if self.guide is not None:
            sites = sites or None
            samples, _ = self._draw(ModelCall(self.guide, args, kwargs), samples, None)
        call = ModelCall(self.model, args, kwargs)
        found, first = self._draw(call, samples, sites, self.infer_discrete)
        nodes: Any = first.nodes
        for name, value in found.items():  # Pyro's shapes: as many batch dimensions as plates
            if name != RETURN:
                missing = max(0, _nesting(first) - len(nodes[name]["fn"].batch_shape))
                found[name] = value.reshape(len(value), *[1] * missing, *value.shape[1:])
        return found

    def _draw(
        self,
        call: ModelCall,
        samples: Mapping[str, Tensor],
        sites: Collection[str] | None,
        infer_discrete: bool = False,
    ) -> tuple[dict[str, Tensor], poutine.Trace]:
        """Return draws of the sites to return, and the trace of one run."""
        first = trace_model(call, {name: value[0] for name, value in samples.items()})
        names = [
            name
            for name in (*first.stochastic_nodes, *first.observation_nodes)
            if (name in sites if sites else sites is None or name not in samples)
        ]
        if sites and RETURN in sites:
            names.append(RETURN)
            if not isinstance(first.nodes[RETURN]["value"], Tensor):
                raise ValueError(
                    f"the model must return a tensor for return_sites=[{RETURN!r}], got"
                    f" {type(first.nodes[RETURN]['value']).__name__}"
                )

        def values(trace: poutine.Trace) -> dict[str, Tensor]:
            nodes: Any = trace.nodes
            return {name: nodes[name]["value"] for name in names}

        def given_data(model: Callable[..., Any]) -> Callable[..., Any]:
            nesting = _nesting(first)
            return pyro.infer.infer_discrete(
                pyro.infer.config_enumerate(_WithoutEvidence(nesting)(model)),
                first_available_dim=-1 - nesting,
                temperature=1,
            )

        if infer_discrete:
            _check_evidence(call, {name: value[0] for name, value in samples.items()}, first)

        found = trace_draws(
            call,
            samples,
            self.num_samples,
            values,
            first,
            random_values=True,
            handler=given_data if infer_discrete else None,
        )
        return found, first


class _WithoutEvidence(Messenger):
    """Set the density of free sites to 1 in both runs of ``infer_discrete``.

    The first run enumerates the discrete sites, the second one has draws of them. A value that does
    not depend on them is that of the first run, the others are drawn again.

    Args:
        nesting: number of nested plates of the model.
    """

    def __init__(self, nesting: int) -> None:
        super().__init__()
        self.nesting = nesting
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if _is_free(msg):
            msg["mask"] = False
            msg["value"] = self.values.get(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_free(msg):
            batch = msg["fn"].batch_shape
            if batch[: max(0, len(batch) - self.nesting)].numel() == 1:
                self.values[msg["name"]] = msg["value"]


def _is_free(site: Any) -> bool:
    """Whether a site is drawn, and not enumerated."""
    fn = site["fn"]
    return not (
        site["is_observed"]
        or isinstance(fn, _Subsample)
        or getattr(fn, "has_enumerate_support", False)
    )


def _check_evidence(call: ModelCall, values: Mapping[str, Tensor], first: poutine.Trace) -> None:
    """Raise ValueError if discrete sites must be drawn given sites without draws that they explain.

    A continuous site without draws must have no data below it, and not be between discrete sites.
    """
    sites: dict[str, Any] = {n: s for n, s in first.nodes.items() if s["type"] == "sample"}
    free = {name for name, site in sites.items() if _is_free(site)}
    if not free:
        return
    given = poutine.condition(call.model, dict(values))
    with poutine.block():
        found: Any = get_dependencies(given, tuple(call.args), dict(call.kwargs))
    parents: dict[str, dict[str, Any]] = found["prior_dependencies"]
    discrete = {n for n in parents if n not in free and not sites[n]["is_observed"]}
    above: dict[str, set[str]] = {}
    for name in parents:  # in the order of the model
        direct = parents[name].keys() - {name}
        above[name] = direct.union(*(above[parent] for parent in direct))
        if name in free:
            continue
        for latent in sorted(above[name] & free):
            if name not in discrete or above[latent] & discrete:
                raise ValueError(
                    "infer_discrete=True requires draws of continuous variables on which data, or"
                    " discrete variables below other ones, depend, but site"
                    f" {name!r} depends on {latent!r}, which has none: give"
                    f" posterior_samples={{{latent!r}: ...}}"
                )


def _nesting(trace: poutine.Trace) -> int:
    """Return the number of nested plates of a model."""
    sites: Any = trace.nodes.values()
    frames = [frame for site in sites for frame in site.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)
