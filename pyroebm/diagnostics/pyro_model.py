"""What a Pyro model adds to the draws of its latent variables, and containers of Pyro's runs.

The model is run once for each draw, with the draw's values of the latent variables. All these runs
are one vectorized call where the model allows it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyroebm.core._checks import stacklevel_of_user
from pyroebm.core.rowwise import map_rows
from pyroebm.diagnostics.arviz_data import Coords, Dims, to_arviz

__all__ = ["HasModel", "ModelCall", "from_pyro", "model_groups", "trace_draws", "trace_model"]

#: Number of entries of all sites of a model that are computed together.
MAX_ENTRIES = 2**22
#: Plates of these names would hide the dimensions of ArviZ.
TAKEN = ("chain", "draw", "sample")


@runtime_checkable
class HasModel(Protocol):
    """Protocol of what has a Pyro model and its arguments, such as ``pyroebm.ModelEnergy``."""

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""

    @property
    def args(self) -> Sequence[Any]:
        """Its positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


class ModelCall(NamedTuple):
    """A Pyro model and its arguments."""

    model: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}


#: An effect handler, around a model with given values.
Handler = Callable[[Callable[..., Any]], Callable[..., Any]]


def trace_model(
    call: HasModel, values: Mapping[str, Tensor], handler: Handler | None = None
) -> poutine.Trace:
    """Run a model with given values of sites, and return its trace without plates."""
    model = poutine.condition(call.model, dict(values))
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(handler(model) if handler else model).get_trace(
            *call.args, **call.kwargs
        )
    return prune_subsample_sites(trace)


def trace_draws(
    call: HasModel,
    draws: Mapping[str, Tensor],
    num_draws: int,
    values: Callable[[poutine.Trace], dict[str, Tensor]],
    first: poutine.Trace,
    random_values: bool,
    handler: Handler | None = None,
) -> dict[str, Tensor]:
    """Run a model for each draw, and return what ``values`` reads from the traces.

    Args:
        call: the model and its arguments.
        draws: values of sites, shape ``(num_draws, *shape)``; the other sites are drawn.
        num_draws: number of draws.
        values: from a trace to named tensors.
        first: trace of one draw, for the size of the model.
        random_values: whether the values may be random.
        handler: an effect handler around the model with the values of a draw.
    """

    def of_one(row: dict[str, Tensor]) -> dict[str, Tensor]:
        with pyro.validation_enabled(False):
            return values(trace_model(call, row, handler))

    entries = sum(_value(site).numel() for _, site in _sites(first))
    return map_rows(
        of_one,
        draws,
        num_draws,
        name=f"the model {getattr(call.model, '__name__', type(call.model).__name__)!r}",
        chunk_size=max(1, MAX_ENTRIES // max(1, entries)),
        random_values=random_values,
    )


def _sites(trace: poutine.Trace) -> Iterable[tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            yield name, site


def _value(site: Any) -> Tensor:
    return torch.as_tensor(site["value"])  # an observation may be a number


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic", False))


class _Sites(NamedTuple):
    """The sites of a model by their kinds, from one trace with given values of the draws."""

    shapes: dict[str, torch.Size]
    dims: dict[str, list[str | None]]
    observed: dict[str, Tensor]
    deterministic: list[str]
    #: Latent variables without draws.
    missing: list[str]

    @classmethod
    def of(cls, trace: poutine.Trace, drawn: Iterable[str]) -> _Sites:
        shapes: dict[str, torch.Size] = {}
        dims: dict[str, list[str | None]] = {}
        observed: dict[str, Tensor] = {}
        deterministic: list[str] = []
        missing: list[str] = []
        for name, site in _sites(trace):
            shapes[name] = _value(site).shape
            dims[name] = _plates(site)
            if name in drawn:
                continue
            if _is_deterministic(site):
                deterministic.append(name)
            elif not site["is_observed"]:
                missing.append(name)
            elif not site["infer"].get("is_auxiliary", False):  # pyro.factor observes nothing
                observed[name] = _value(site)
        return cls(shapes, dims, observed, deterministic, missing)


def _plates(site: Any) -> list[str | None]:
    """Return the name of the plate of each dimension of a site's value, None where it has none."""
    shape, event_dim = _value(site).shape, site["fn"].event_dim
    if _is_deterministic(site) and event_dim == len(shape):  # Pyro's default, also within plates
        event_dim = 0
    batch = shape[: len(shape) - event_dim]
    names: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= len(batch) and frame.name not in TAKEN:
            at = len(batch) + frame.dim
            if batch[at] == frame.size:
                names[at] = frame.name
    return names


def _log_likelihood(trace: poutine.Trace, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the log-density of each observation, with scales and masks, as in the posterior."""
    trace.compute_log_prob(site_filter=lambda name, site: name in names)
    sites: Any = {name: trace.nodes[name] for name in names}
    return {
        name: torch.broadcast_tensors(
            site["log_prob"], site["log_prob"].new_empty(site["fn"].batch_shape)
        )[0]
        for name, site in sites.items()
    }


def _tensor_arguments(call: HasModel) -> dict[str, Tensor]:
    """Return the arguments of a model that are tensors, by their names."""
    function = call.model.forward if isinstance(call.model, nn.Module) else call.model
    try:
        bound = inspect.signature(function).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _grouped(
    what: str, draws: Mapping[str, Tensor], sizes: tuple[int, int], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Give draws the shape ``(chains, draws, *event)``.

    Dimensions of size 1 that ``Predictive`` adds to the left of an event are removed.
    """
    grouped = {}
    for name, value in draws.items():
        if value.shape[:1] == (sizes[0] * sizes[1],):
            value = value.reshape(*sizes, *value.shape[1:])
        elif value.shape[:2] != sizes:
            raise ValueError(
                f"{what}[{name!r}] must have shape ({sizes[0] * sizes[1]}, *event) or"
                f" {(*sizes, '*event')}, one value for each draw of {sizes[0]} chains, got shape"
                f" {tuple(value.shape)}"
            )
        extra = value.dim() - 2 - len(shapes[name]) if name in shapes else 0
        while extra > 0 and value.shape[2] == 1:
            value, extra = value.squeeze(2), extra - 1
        grouped[name] = value
    return grouped


def model_groups(
    call: object,
    posterior: Mapping[str, Tensor],
    *,
    log_likelihood: bool = False,
    prior: Mapping[str, Tensor] | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
    dims: Dims | None = None,
    keep: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the groups of :func:`pyroebm.diagnostics.to_arviz` that a model adds to its draws.

    Args:
        call: the model and its arguments (:class:`HasModel`), or an energy without a model.
        posterior: draws of the latent variables, shape ``(chains, draws, *event)``.
        log_likelihood: whether to compute the log-density of each observation at each draw.
        prior: draws from the prior, shape ``(n, *event)``, such as those of ``Predictive``. Sites
            that are not in the posterior are in the group ``prior_predictive``.
        posterior_predictive: draws from the posterior predictive distribution, shape ``(chains *
            draws, *event)`` or ``(chains, draws, *event)``.
        dims: names of dimensions by variable, before those of plates.
        keep: latent variables to return; None is all.

    Returns:
        the arguments ``posterior`` (with deterministic sites), ``dims`` and groups of ``to_arviz``.

    Raises:
        ValueError: if there are no draws; if ``log_likelihood`` is asked for without a model, or
            without draws of a latent variable of it; if given draws do not fit the number of chains
            and draws.
    """
    if not posterior:
        raise ValueError("the model must have latent variables with draws, but there are none")
    sizes = cast(tuple[int, int], tuple(next(iter(posterior.values())).shape[:2]))
    sites, groups = _Sites({}, {}, {}, [], []), dict[str, Any]()
    if isinstance(call, HasModel):
        flat = {name: value.flatten(0, 1) for name, value in posterior.items()}
        first = trace_model(call, {name: value[0] for name, value in flat.items()})
        sites = _Sites.of(first, posterior)
        groups = _from_model(call, flat, sizes, first, sites, log_likelihood)
    elif log_likelihood:
        raise ValueError(
            "log_likelihood=True requires a Pyro model with observed sites, but the draws are"
            " those of an energy or a potential: run a pyroebm.ModelEnergy, or a kernel with"
            " model=..."
        )
    kept = {name: posterior[name] for name in (posterior if keep is None else keep)}
    groups["posterior"] = kept | groups.pop("deterministic", {})
    if prior:
        size = len(next(iter(prior.values())))
        all_prior = _grouped("prior", prior, (1, size), sites.shapes)
        latent = {n: v for n, v in all_prior.items() if n in {*posterior, *groups["posterior"]}}
        groups["prior"] = latent
        groups["prior_predictive"] = {n: v for n, v in all_prior.items() if n not in latent}
    if posterior_predictive:
        groups["posterior_predictive"] = _grouped(
            "posterior_predictive", posterior_predictive, sizes, sites.shapes
        )
    shown = {
        name
        for group in groups.values()
        for name in group
        if any(sites.dims.get(name, ())) and name not in (dims or {})
    }
    groups["dims"] = {**{name: sites.dims[name] for name in shown}, **(dims or {})}
    return groups


def _from_model(
    call: HasModel,
    flat: Mapping[str, Tensor],
    sizes: tuple[int, int],
    first: poutine.Trace,
    sites: _Sites,
    log_likelihood: bool,
) -> dict[str, Any]:
    """Return the groups that are computed from runs of the model."""
    if log_likelihood and sites.missing:
        raise ValueError(
            f"log_likelihood=True requires draws of all latent variables, but {sites.missing} have"
            " none: keep their draws, or marginalize discrete ones in the model (a mixture"
            " distribution)"
        )
    # without draws of a latent variable a deterministic site would be a random value
    computed = [] if sites.missing else sites.deterministic
    if left_out := sites.deterministic if sites.missing else []:
        warnings.warn(
            f"the deterministic sites {left_out} are left out, since the latent variables"
            f" {sites.missing} have no draws: keep their draws, or draw discrete ones by"
            " pyroebm.infer.Predictive(..., infer_discrete=True)",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )
    likelihoods = list(sites.observed) if log_likelihood else []

    def values(trace: poutine.Trace) -> dict[str, Tensor]:
        nodes = cast(dict[str, Any], trace.nodes)
        found = {f"value {name}": nodes[name]["value"] for name in computed}
        for name, log_prob in _log_likelihood(trace, likelihoods).items():
            found[f"log {name}"] = log_prob
        return found

    each: dict[str, Tensor] = {}
    if computed or likelihoods:
        each = trace_draws(call, flat, sizes[0] * sizes[1], values, first, random_values=False)
        each = {name: value.unflatten(0, sizes) for name, value in each.items()}
    seen = {id(value) for value in sites.observed.values()}
    return {
        "deterministic": {name: each[f"value {name}"] for name in computed},
        "log_likelihood": {name: each[f"log {name}"] for name in likelihoods},
        "observed_data": sites.observed,
        "constant_data": {
            name: value
            for name, value in _tensor_arguments(call).items()
            if id(value) not in seen and name not in sites.shapes
        },
    }


def from_pyro(
    mcmc: AbstractMCMC,
    *,
    log_likelihood: bool = False,
    prior: Mapping[str, Tensor] | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
    dims: Dims | None = None,
    coords: Coords | None = None,
) -> Any:
    """Convert a finished run of ``pyro.infer.MCMC`` to ArviZ, 0.x or 1.x.

    The groups are ``posterior`` with deterministic sites, ``sample_stats``, ``observed_data``,
    ``constant_data`` (arguments of the model that are tensors and not observed) and those asked
    for. The statistics are ``diverging`` and ``acceptance_rate``, as far as the kernel reports
    them. Pyro keeps only the mean acceptance rate of each chain, which is repeated for its draws.

    Args:
        mcmc: the run.
        log_likelihood: whether to add the log-density of each observation at each draw, for
            ``arviz.loo``. ``pyro.factor`` is not an observation.
        prior: draws from the prior, shape ``(n, *event)``, such as those of ``Predictive(model,
            num_samples=n)``. Sites that are not in the posterior are in ``prior_predictive``.
        posterior_predictive: draws from the posterior predictive distribution, shape ``(chains *
            draws, *event)``, such as those of ``Predictive(model, mcmc.get_samples())``.
        dims: names of the dimensions of variables; by default the plates of the model.
        coords: labels along dimensions, also along plates.

    Returns:
        ArviZ's InferenceData (DataTree from ArviZ 1.0 on).

    Raises:
        ValueError: if ``log_likelihood`` is asked for without a model, or without draws of a latent
            variable; if draws, ``dims`` or ``coords`` do not fit.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("city", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> mcmc = MCMC(NUTS(model), 20, 20, disable_progbar=True)
        >>> mcmc.run(torch.tensor([1.0, -2.0, 0.5]))
        >>> data = from_pyro(mcmc, log_likelihood=True, coords={"city": ["Bern", "Rome", "Oslo"]})
        >>> data.log_likelihood["y"].dims, data.log_likelihood["y"].shape
        (('chain', 'draw', 'city'), (1, 20, 3))
    """
    run: Any = mcmc  # whose attributes Pyro does not declare in the base class
    posterior = run.get_samples(group_by_chain=True)
    model = getattr(run.kernel, "model", None)
    call = None if model is None else ModelCall(model, run._args, run._kwargs)
    groups = model_groups(
        call,
        posterior,
        log_likelihood=log_likelihood,
        prior=prior,
        posterior_predictive=posterior_predictive,
        dims=dims,
    )
    chains, draws = next(iter(posterior.values())).shape[:2]
    return to_arviz(
        sample_stats=_statistics(mcmc.diagnostics(), chains, draws),
        coords=coords,
        attrs={"inference_library": "pyro", "kernel": type(mcmc.kernel).__name__},
        **groups,
    )


def _statistics(diagnostics: Mapping[str, Any], chains: int, draws: int) -> dict[str, Tensor]:
    """Convert Pyro's diagnostics, whose chains are named ``"chain 0"``, to statistics of draws."""
    stats = {}
    if "divergences" in diagnostics:
        stats["diverging"] = torch.zeros(chains, draws, dtype=torch.bool)
        for chain, at in diagnostics["divergences"].items():
            stats["diverging"][int(chain.split()[-1]), at] = True
    if "acceptance rate" in diagnostics:
        rates = torch.zeros(chains, 1, dtype=torch.float64)
        for chain, rate in diagnostics["acceptance rate"].items():
            rates[int(chain.split()[-1])] = rate
        stats["acceptance_rate"] = rates.expand(chains, draws)
    return stats
