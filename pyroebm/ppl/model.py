"""A Pyro model as an energy over its continuous latent variables in unconstrained coordinates.

Discrete latent variables are enumerated and summed out.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.distributions import Transform

from pyroebm.core._torch_private import BoundedResults, Dependents, tree_leaves
from pyroebm.core.energy import unchecked_value_and_grad
from pyroebm.core.rng import LOCK, drawing_from, seeded_generator, uniform
from pyroebm.core.rowwise import RowsFailAlone, RowsInABatch, RowwiseEnergy
from pyroebm.core.supports import bijection_of, circular, is_discrete
from pyroebm.ppl.distribution import initial_states
from pyroebm.ppl.sum_product import log_marginal

__all__ = ["ModelEnergy", "NoLatentsError"]

#: Number of attempts to draw a finite initial state.
MAX_ATTEMPTS = 100

#: Maximum number of entries of a tensor of an enumeration, for each chain.
MAX_ENTRIES = 2**27


class NoLatentsError(ValueError):
    """A model without a latent variable, which has no energy."""


class _Substitute(Messenger):
    """Substitute latent variables, given in constrained or unconstrained coordinates.

    The bijection of a site is that of its support in this run of the model. The log-determinants of
    the Jacobians are summed.
    """

    def __init__(
        self,
        given: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        plates: Mapping[str, list[int]],
        inverse: bool,
    ) -> None:
        super().__init__()
        self.given = given
        self.shapes = shapes
        self.plates = plates
        self.inverse = inverse
        self.images: dict[str, Tensor] = {}
        self.transforms: dict[str, Transform] = {}
        self.log_det: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.plates:
            msg["value"] = self.plates[name]
        if name not in self.given:
            if not msg["is_observed"] and _is_enumerable(msg["fn"]):
                # exact sums, whichever way the model's author chose
                msg["infer"].update(enumerate="parallel", num_samples=None)
            return
        transform = self.transforms[name] = bijection_of(msg["fn"])
        if self.inverse:
            x = self.given[name]
            u = self.images[name] = transform.inv(x)
        else:
            u = self.given[name]
            x = self.images[name] = transform(u)
        if x.shape != self.shapes[name]:
            raise ValueError(
                f"the support of site {name!r} must not depend on a discrete site that is summed"
                f" out, but its values have shape {tuple(x.shape)} instead of"
                f" {tuple(self.shapes[name])}: use a distribution of fixed support and pyro.factor"
            )
        self.log_det = self.log_det + transform.log_abs_det_jacobian(u, x).sum()
        msg["value"], msg["is_observed"] = x, True


class _Detached(Messenger):
    """Detach values of ``pyro.param``."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def _of_continuous(strategy: Callable[..., Any]) -> InitMessenger:
    """Start continuous sites by a strategy of Pyro, and draw discrete ones."""

    def start(site: Any) -> Any:
        fn = site["fn"]
        discrete = _is_enumerable(fn) or is_discrete(fn.support)
        return fn.sample() if discrete else strategy(site)

    return InitMessenger(start)


class ModelEnergy(RowwiseEnergy):
    r"""The posterior of a Pyro model as an energy over its continuous latent variables.

    .. math:: E(u) = -\log p(T(u), y) - \log |\det \partial T / \partial u|

    u is the vector of all continuous latent variables in unconstrained coordinates, and T the
    bijection ``biject_to(support)`` of each; von Mises sites are angles from -pi to pi. Observed
    sites, ``pyro.factor``, plates, ``poutine.scale`` and masks are treated as in Pyro;
    ``pyro.param`` and the parameters of modules are constants.

    Discrete latent variables are summed out, as in :class:`pyro.infer.MCMC`: each site whose
    distribution has ``has_enumerate_support`` is enumerated in parallel, with or without
    :func:`pyro.infer.config_enumerate`, and a site that asks for ``"sequential"`` enumeration or
    for ``num_samples`` too. Every batch dimension of a site must be a plate, and the steps of a
    hidden Markov model must be in :func:`pyro.markov`. To infer the discrete variables, condition
    the model on draws and use :func:`pyro.infer.infer_discrete`.

    All chains are evaluated in one call: the model runs under ``torch.func.vmap``, and its
    operations are recorded as a graph, which is replayed (see
    :class:`pyroebm.core.rowwise.RowwiseEnergy`). If a tensor among the arguments, or a parameter of
    the store or of a module, is replaced or changed in place, the next call uses the new values.
    Other data, such as globals and closures, are read only once.

    Latent variables may be assigned to slices of tensors (``v = torch.zeros(3); v[:2] = latent``),
    constant masks may be indices, and Python may branch on what does not depend on latent
    variables. A model that ``vmap`` cannot run (branches on a latent variable, shapes that depend
    on one) is run chain by chain, with a RuntimeWarning that states the reason.

    Args:
        model: a Pyro model.
        args: positional arguments of the model.
        max_plate_nesting: number of dimensions, from the right, that are left to plates by the
            enumeration; None uses the plates of one run, as Pyro does. It is not passed to the
            model.
        kwargs: keyword arguments of the model.

    Attributes:
        sites: names and shapes of the continuous latent variables in their constrained space, in
            the order of the model.
        enumerated: names of the discrete latent variables, which are summed out.
        max_plate_nesting: as given or found; ``infer_discrete`` takes ``first_available_dim=-1 -
            max_plate_nesting``.
        event_shape: ``(dim,)``, number of unconstrained entries.
        batching: ``"graph"``, ``"vmap"`` or ``"loop"``.

    Raises:
        ValueError: if the model has no continuous latent variable, a discrete one that cannot be
            enumerated, a plate that subsamples, or a random density; if an enumeration has too many
            values, a batch dimension that is no plate, or crossing plates that depend on each
            other.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroebm import MCMC, NUTS
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> energy = ModelEnergy(model, torch.tensor([1.0, -2.0, 0.5]))
        >>> energy.sites, energy(torch.zeros(4, 1)).shape
        ({'scale': torch.Size([])}, torch.Size([4]))
        >>> mcmc = MCMC(NUTS(), num_samples=50, warmup_steps=50, num_chains=8, seed=0)
        >>> mcmc.run(energy)
        >>> mcmc.get_samples(group_by_chain=True)["scale"].shape
        torch.Size([8, 50])
        >>> def mixture(y):
        ...     shift = pyro.sample("shift", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.3))
        ...         pyro.sample("y", dist.Normal(shift * z, 1.0), obs=y)
        >>> energy = ModelEnergy(mixture, torch.tensor([0.1, 2.9, -0.4]))
        >>> energy.sites, energy.enumerated
        ({'shift': torch.Size([])}, ['z'])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        /,
        *args: Any,
        max_plate_nesting: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise ValueError(
                "model must be a Pyro model, a callable with pyro.sample statements, got"
                f" {type(model).__name__}"
            )
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with LOCK, torch.random.fork_rng(devices):
            start = _of_continuous(init_to_feasible)(initial_states(model))
            with poutine.block(), torch.no_grad():
                trace = poutine.trace(start).get_trace(*args, **kwargs)
                trace.compute_log_prob()
        sites: dict[str, Any] = {
            name: node for name, node in trace.nodes.items() if node["type"] == "sample"
        }
        latents, self.enumerated = _latents(sites)
        if not latents:
            if self.enumerated:
                raise ValueError(
                    "the model must have a continuous latent sample site, but has only discrete"
                    f" ones: {self.enumerated}; to infer them, use pyro.infer.infer_discrete"
                )
            raise NoLatentsError(
                "the model must have a latent sample site, but every pyro.sample is observed or"
                " there is none: remove obs= from the sites to infer"
            )
        like = torch.as_tensor(trace.log_prob_sum())
        for site in latents.values():
            like = like.to(torch.promote_types(like.dtype, site["value"].dtype))
        super().__init__(
            {name: bijection_of(s["fn"]).inv(s["value"]).shape for name, s in latents.items()},
            like,
        )
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.sites = {name: site["value"].shape for name, site in latents.items()}
        nodes = trace.nodes.values()
        frames = {frame for node in nodes for frame in node.get("cond_indep_stack", ())}
        # A sequential plate indexes a tensor, which cannot be captured: substitute integers.
        self._plates = {f.name: list(range(f.size)) for f in frames if not f.vectorized}
        given = max_plate_nesting if self.enumerated else None
        self.max_plate_nesting = _plate_nesting(given, frames)
        self._angles = tuple(
            name for name, s in latents.items() if bijection_of(s["fn"]).codomain is circular
        )
        self._params = [name for name, node in trace.nodes.items() if node["type"] == "param"]
        rows = (
            2.0 * uniform((2, *self.event_shape), seeded_generator(0), self.dtype, self.device)
            - 1.0
        )
        if self.enumerated:
            self._check_enumeration(sites, rows[0])
        self._transforms = self._fixed_transforms(rows[0])
        self.batch_by(rows)

    def _check_enumeration(self, sites: Mapping[str, Any], u: Tensor) -> None:
        """Raise ValueError unless all shapes are those of plates, and the sum fits in memory."""
        nesting = self.max_plate_nesting
        for name, site in sites.items():
            if isinstance(site["fn"], _Subsample):
                continue
            check_site_shape(site, nesting)
            shape = site["log_prob"].shape
            if shape[: max(0, len(shape) - nesting)].numel() > 1:
                raise ValueError(
                    f"each batch dimension of a site must be a plate, since {self._name()} has"
                    f" enumerated sites, but site {name!r} has batch shape {tuple(shape)} in"
                    f" {nesting} plates: enclose it in pyro.plate, or call .to_event"
                )
        try:
            with torch.no_grad(), RowsFailAlone(), BoundedResults(MAX_ENTRIES):
                self.row_energy(u)
        except MemoryError as error:
            counts = [
                f"{name!r} ({len(sites[name]['fn'].enumerate_support(expand=False))} values)"
                for name in self.enumerated
            ]
            raise ValueError(
                f"the enumeration of all sites together needs {error} for each chain, of at most"
                f" {MAX_ENTRIES}: sites {', '.join(counts[:6])}"
                + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")
                + ". Declare which sites are independent, by pyro.markov (time steps) or"
                " pyro.plate (rows), or marginalize some by hand"
            ) from None

    def _fixed_transforms(self, u: Tensor) -> dict[str, Transform] | None:
        """Return the bijections, or None if they depend on latent variables.

        An example is ``Uniform(0, x)`` with a latent x. All operations are followed, since values
        at some states do not show a dependence at others (``x.clamp(min=5)``). A model that
        branches on a latent variable cannot be followed.
        """
        u = u.clone()  # the values of the input are those of its memory
        with torch.no_grad(), RowsFailAlone(), Dependents(u) as dependents:
            transforms = self._run(self.split(u))[1].transforms
        fixed = not dependents.read and not any(map(dependents.has, _tensors(transforms.values())))
        return transforms if fixed else None

    def _run(
        self, given: Mapping[str, Tensor], inverse: bool = False
    ) -> tuple[poutine.Trace, _Substitute]:
        enumeration = poutine.enum(first_available_dim=-1 - self.max_plate_nesting)
        with (
            LOCK,
            pyro.validation_enabled(False),
            poutine.block(),
            enumeration if self.enumerated else contextlib.nullcontext(),
            _Substitute(given, self.sites, self._plates, inverse) as places,
            _Detached(),
        ):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        return trace, places

    def row_energy(self, u: Tensor) -> Tensor:
        """Return the energy of one row ``(dim,)``, shape ``()``."""
        trace, places = self._run(self.split(u))
        with LOCK, pyro.validation_enabled(False):
            total = log_marginal(trace) if self.enumerated else trace.log_prob_sum()
            return -(torch.as_tensor(total) + places.log_det)

    def constants(self) -> list[Tensor]:
        """Return the tensors that are watched for changes: arguments and parameters."""
        store = dict(pyro.get_param_store().named_parameters()) if self._params else {}
        watched = super().constants() + [store[name] for name in self._params if name in store]
        model, given = inspect.unwrap(self.model), list[Any]((self.args, self.kwargs))
        while isinstance(model, functools.partial):
            given += [model.args, model.keywords]
            model = inspect.unwrap(model.func)
        owner = getattr(model, "__self__", model)  # of a method
        for leaf in (owner, *tree_leaves(given)):
            if isinstance(leaf, Tensor):
                watched.append(leaf)
            elif isinstance(leaf, nn.Module):
                watched += [*leaf.parameters(), *leaf.buffers()]
        return watched

    @property
    def transforms(self) -> dict[str, Transform] | None:
        """The bijection from unconstrained values of each latent variable.

        None if one depends on other latent variables, as that of ``Uniform(0, x)`` with a latent x,
        or may do, since the model branches on a latent variable.
        """
        return self._transforms

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Map u ``(*batch, dim)`` to the latent variables, a dict of ``(*batch, *shape)``."""
        self.batch_shape(u)
        if self._transforms is not None:
            return {name: self._transforms[name](part) for name, part in self.split(u).items()}
        return self._mapped(self.split(u), u.shape[:-1], inverse=False)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Map latent variables to u, the inverse of :meth:`constrain`.

        Raises:
            ValueError: if a site is missing or unknown, or a shape does not fit.
        """
        if set(values) != set(self.sites):
            raise ValueError(
                f"values must have the sites {sorted(self.sites)}, got {sorted(values)}"
            )
        values = {
            name: torch.as_tensor(value, dtype=self.dtype, device=self.device)
            for name, value in values.items()
        }
        for name, shape in self.sites.items():
            if values[name].shape[values[name].dim() - len(shape) :] != shape:
                raise ValueError(
                    f"site {name!r} must have shape (*batch, *{tuple(shape)}), got"
                    f" {tuple(values[name].shape)}"
                )
        if self._transforms is not None:
            return self.join(
                {name: self._transforms[name].inv(value) for name, value in values.items()}
            )
        name, shape = next(iter(self.sites.items()))
        batch = values[name].shape[: values[name].dim() - len(shape)]
        return self.join(self._mapped(values, batch, inverse=True))

    def _mapped(
        self, given: dict[str, Tensor], batch: torch.Size, inverse: bool
    ) -> dict[str, Tensor]:
        """Run the model for each row, since the support of a latent variable depends on another."""
        flat = {name: part.reshape(-1, *part.shape[len(batch) :]) for name, part in given.items()}

        def images(parts: dict[str, Tensor]) -> dict[str, Tensor]:
            with RowsFailAlone(), RowsInABatch(next(iter(parts.values()))):
                return self._run(parts, inverse)[1].images

        with torch.no_grad():
            if self.batching == "loop":
                found = [
                    images(dict(zip(flat, row, strict=True)))
                    for row in zip(*flat.values(), strict=True)
                ]
                mapped = {name: torch.stack([row[name] for row in found]) for name in flat}
            else:
                mapped = torch.vmap(images, chunk_size=4096)(flat)
        return {name: part.reshape(batch + part.shape[1:]) for name, part in mapped.items()}

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sites of the model, under which :class:`pyroebm.MCMC` stores draws."""
        return self.constrain(x)

    def angles(self) -> tuple[str, ...]:
        """Return the names of the von Mises sites."""
        return self._angles

    @property
    def angle_mask(self) -> Tensor | None:
        """Entries of von Mises sites."""
        if not self._angles:
            return None
        return torch.cat(
            [
                torch.full((shape.numel(),), name in self._angles, device=self.device)
                for name, shape in self.shapes.items()
            ]
        )

    def initial(
        self,
        num_chains: int,
        generator: torch.Generator | None = None,
        init_strategy: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Draw initial states of finite energy and gradient, shape ``(num_chains, dim)``.

        States with a non-finite energy or gradient are drawn again.

        Args:
            num_chains: number of states.
            generator: source of the draws; None is torch's default generator.
            init_strategy: a strategy of Pyro (``init_to_median``, ``init_to_value(values=...)``,
                ...), which is run for each chain; None is uniform on (-2, 2) in unconstrained
                coordinates, as Pyro's ``init_to_uniform``.

        Raises:
            ValueError: if 100 attempts find no finite state for a chain; the message has the site
                and its value. Also if ``init_to_value`` names a site that the model does not have.
        """
        if num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got num_chains={num_chains}")
        states = self._start(num_chains, generator, init_strategy)
        for _ in range(MAX_ATTEMPTS):
            values, grad = unchecked_value_and_grad(self, states)
            bad = ~(torch.isfinite(values) & torch.isfinite(grad).all(-1))
            if not bool(bad.any()):
                return states
            failed = states[bad][0], float(values[bad][0]), grad[bad][0]
            states[bad] = self._start(int(bad.sum()), generator, init_strategy)
        raise ValueError(
            f"no initial state of finite energy and gradient was found for {int(bad.sum())} of"
            f" num_chains={num_chains} chains in {MAX_ATTEMPTS} attempts. {self._why(*failed)}"
            " Check the data and the scales of this site, or give initial values"
            " (init_strategy=init_to_value(values=...), or initial=energy.unconstrain({...}))"
        )

    def _start(
        self, n: int, generator: torch.Generator | None, strategy: Callable[..., Any] | None
    ) -> Tensor:
        if strategy is None:
            return 4.0 * uniform((n, *self.event_shape), generator, self.dtype, self.device) - 2.0
        model, rows = _of_continuous(strategy)(initial_states(self.model)), []
        with LOCK, drawing_from(generator):
            for _ in range(n):
                with pyro.validation_enabled(False), poutine.block(), torch.no_grad():
                    trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
                _check_values(strategy, trace.nodes)
                rows.append(
                    self.unconstrain(
                        {name: cast(Tensor, trace.nodes[name]["value"]) for name in self.sites}
                    )
                )
        return torch.stack(rows)

    def _why(self, u: Tensor, value: float, grad: Tensor) -> str:
        """Describe what is not finite at u."""
        with LOCK, torch.no_grad(), pyro.validation_enabled(False), RowsFailAlone():
            trace, places = self._run(self.split(u))
            trace.compute_log_prob()
        at, nodes = (
            {name: image.tolist() for name, image in places.images.items()},
            cast(dict[str, Any], trace.nodes),
        )
        for name, site in nodes.items():
            if site["type"] != "sample":
                continue
            log_prob = site["log_prob"]
            if enumerated := list(range(log_prob.dim() - self.max_plate_nesting)):
                log_prob = log_prob.amax(enumerated)  # some values may be impossible
            if not bool(torch.isfinite(log_prob).all()):
                return (
                    f"The log-density of site {name!r} was {float(log_prob.sum())} where the"
                    f" latents were {at}."
                )
        for name, part in self.split(grad).items():
            if not bool(torch.isfinite(part).all()):
                return (
                    f"The energy was {value} and its gradient in site {name!r} {part.tolist()}"
                    f" where the latents were {at}."
                )
        return f"The energy was {value} at u={u.tolist()}."

    def _name(self) -> str:
        return f"the model {getattr(self.model, '__name__', type(self.model).__name__)!r}"


def _check_values(strategy: Callable[..., Any], sites: Collection[str]) -> None:
    """Raise ValueError if ``init_to_value`` names a site that the model does not have."""
    values = strategy.keywords.get("values") if isinstance(strategy, functools.partial) else None
    for unknown in (values or {}).keys() - set(sites):
        own = [name for name in sites if not name.startswith("_")]
        near = difflib.get_close_matches(unknown, own) or own
        raise ValueError(
            f"values of init_to_value must be of sites of the model, got {unknown!r}; near ones:"
            f" {near}"
        )


def _tensors(transforms: Iterable[Transform]) -> Iterator[Tensor]:
    """Yield the tensors of which transforms are made."""
    left, seen = list[object](transforms), list[object]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            left.extend(value)
        elif isinstance(value, Transform) and not any(value is other for other in seen):
            seen.append(value)  # a transform and its inverse refer to each other
            left.extend(vars(value).values())


def _is_enumerable(fn: Any) -> bool:
    return bool(getattr(fn, "has_enumerate_support", False))


def _latents(sites: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the continuous latent sites, and the names of the discrete ones."""
    continuous, enumerated = {}, []
    for name, site in sites.items():
        fn = site["fn"]
        if isinstance(fn, _Subsample):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"plate {name!r} must not subsample, since MCMC needs a fixed density, but it"
                    f" draws {fn.subsample_size} of {fn.size} rows at every call: drop"
                    " subsample_size, or use SVI"
                )
        elif site["is_observed"]:
            continue
        elif _is_enumerable(fn):
            enumerated.append(name)
        elif is_discrete(fn.support):
            raise ValueError(
                f"site {name!r} must be continuous or have a finite support to be summed out, but"
                f" {type(_base(fn)).__name__} has support {fn.support}"
                + (
                    ": enclose the site in pyro.plate instead of calling .to_event"
                    if _is_enumerable(_base(fn))
                    else ": truncate it to a Categorical, or marginalize it, by a compound"
                    " distribution (GammaPoisson, BetaBinomial, ...) or by pyro.factor"
                )
            )
        else:
            continuous[name] = site
    return continuous, enumerated


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _plate_nesting(given: int | None, frames: Iterable[Any]) -> int:
    """Return the number of dimensions of plates, as Pyro counts them."""
    nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
    if given is not None and given < nesting:
        raise ValueError(
            f"max_plate_nesting must be at least {nesting}, the plates of the model, got"
            f" max_plate_nesting={given}"
        )
    return nesting if given is None else given
