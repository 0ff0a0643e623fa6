"""Simulation-based calibration of Pyro models and samplers."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray
from matplotlib.figure import Figure
from pyro import poutine
from pyro.poutine.messenger import Messenger
from scipy import special, stats
from torch import Tensor

from pyroebm.core._checks import check_counts, stacklevel_of_user
from pyroebm.core.energy import Energy
from pyroebm.core.rng import drawing_from, fresh_seed, seeded_generator
from pyroebm.core.rowwise import RowwiseEnergy
from pyroebm.core.statistics import ess_bulk, ess_tail
from pyroebm.kernels import NUTS, WindowAdaptation
from pyroebm.kernels.base import Kernel
from pyroebm.mcmc.sampler import MCMC
from pyroebm.ppl.model import ModelEnergy

__all__ = ["SBCResult", "Uniformity", "sbc"]

#: Name of the log-density of latent variables and data among the ranks.
LOG_DENSITY = "lp"

#: The draws count as independent if their effective sample size is at least this fraction of their
#: number. Below it the ranks of 1,000 simulations would differ from uniform ones measurably.
INDEPENDENT = 0.9

#: Number of steps from one ranked draw to the next: at first, and at most.
THINNING, MAX_THINNING = 2, 32

#: Number of simulations whose chains the effective sample size is computed from.
ESS_CHAINS = 100


class _Sampled(Messenger):
    """Draw the observed sites from their distributions, and collect their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        added = msg["infer"].get("is_auxiliary") or msg["infer"].get("_deterministic")
        if msg["is_observed"] and not added:  # pyro.factor and pyro.deterministic add such sites
            self.names.append(msg["name"])
            msg["is_observed"] = msg["done"] = False
            msg["value"] = None


class _Observed(Messenger):
    """Observe the sites in ``values``."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.dtypes = {name: value.dtype for name, value in values.items()}
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]].to(self.dtypes[msg["name"]])
            msg["is_observed"] = True


class _Joint(RowwiseEnergy):
    """Energy of latent variables in unconstrained coordinates, followed by the data."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], data: Sequence[Mapping[str, Tensor]]
    ) -> None:
        observed = _Observed(dict(data[0]))
        posterior = ModelEnergy(observed(model), *args)
        super().__init__(
            {"latent": posterior.event_shape} | {f"data/{k}": v.shape for k, v in data[0].items()},
            posterior._reference(),
        )
        self.observed = observed
        self.posterior = posterior
        latents = posterior.initial(2, seeded_generator(0, posterior.device))
        self.batch_by(torch.cat([latents, self.rows(data[:2])], -1))

    def rows(self, data: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return data sets as rows of numbers, shape ``(len(data), entries)``."""
        return torch.stack(
            [torch.cat([v.reshape(-1).to(self._anchor) for v in each.values()]) for each in data]
        )

    def row_energy(self, u: Tensor) -> Tensor:
        latent, *data = self.split(u).values()
        before = self.observed.values
        self.observed.values = dict(zip(before, data, strict=True))
        try:
            return self.posterior.row_energy(latent)
        finally:
            self.observed.values = before

    def constants(self) -> list[Tensor]:
        return self.posterior.constants()

    def _name(self) -> str:
        return self.posterior._name()


class _Simulations(MCMC):
    """A run on the posteriors of many data sets."""

    def _warn_of_edges(self, target: Energy, x: Tensor) -> None:
        # on lines of states, on which these posteriors, one for each chain, cannot be evaluated
        if isinstance(target, _Posteriors):
            super()._warn_of_edges(target.joint.posterior, x)


class _Posteriors(Energy):
    """The posteriors of many data sets: chain i moves on that of data set i.

    It is evaluated on all chains, in order.
    """

    data: Tensor

    def __init__(self, joint: _Joint, data: Tensor) -> None:
        super().__init__(joint.posterior.event_shape)
        self.joint = joint
        self.register_buffer("data", data)

    def forward(self, x: Tensor) -> Tensor:
        return self.joint(torch.cat([x, self.data.expand(*x.shape[:-1], -1)], -1))

    def initial(self, num_chains: int, generator: torch.Generator | None = None) -> Tensor:
        return self.joint.posterior.initial(num_chains, generator)

    def named(self, x: Tensor) -> dict[str, Tensor]:
        return self.joint.posterior.named(x)


class Uniformity(NamedTuple):
    """Result of the test that ranks are uniform.

    Args:
        p_value: probability, if all ranks are uniform, of an entry as extreme as the most extreme
            one: the smallest p-value times the number of entries (Bonferroni), at most 1.
        p_values: p-value of each entry of each site; NaN for entries that are constant.
        worst: name of the entry with the smallest p-value, such as ``"theta[3]"``.
    """

    p_value: float
    p_values: dict[str, np.ndarray]
    worst: str


class SBCResult:
    """Ranks of parameters among draws of their posteriors, from :func:`sbc`.

    Args:
        ranks: number of draws below the value that generated the data, an integer from 0 to
            ``num_draws``; ``(num_simulations, *shape)`` for each site.
        values: the values that generated the data, of the same shapes.
        num_draws: number of ranked draws of each simulation.
        thinning: number of steps of the sampler from one ranked draw to the next.
        ess: smallest effective sample size (bulk or tail) of the ranked draws over the entries of
            each site, as a mean over simulations; before thinning to ``num_draws`` draws.
        divergences: number of divergent steps of each simulation.
        seed: the seed of the run.
    """

    def __init__(
        self,
        ranks: dict[str, np.ndarray],
        values: dict[str, np.ndarray],
        num_draws: int,
        thinning: int,
        ess: dict[str, float],
        divergences: np.ndarray,
        seed: int,
    ) -> None:
        self.ranks = ranks
        self.values = values
        self.num_draws = num_draws
        self.thinning = thinning
        self.ess = ess
        self.divergences = divergences
        self.seed = seed

    @property
    def num_simulations(self) -> int:
        """Number of simulations."""
        return len(self.divergences)

    def __repr__(self) -> str:
        return (
            f"SBCResult({self.num_simulations} simulations, {self.num_draws} draws,"
            f" thinning {self.thinning}, {int(self.divergences.sum())} divergences,"
            f" p-value {self.test().p_value:.3g})"
        )

    def test(self) -> Uniformity:
        """Test whether the ranks are uniform.

        The test statistic of an entry is the most extreme value of its empirical distribution
        function (Säilynoja, Bürkner and Vehtari, 2022): the smallest two-sided binomial probability
        over all ranks. Its p-value is exact, from a recursion over the ranks.

        Example:
            >>> ranks = np.random.default_rng(0).integers(0, 100, (500, 2))
            >>> values = np.random.default_rng(1).normal(size=(500, 2))
            >>> zeros = np.zeros(500, int)
            >>> result = SBCResult({"x": ranks}, {"x": values}, 99, 1, {"x": 99.0}, zeros, 0)
            >>> result.test().p_value > 0.05
            True
        """
        p_values = {
            name: np.array(
                [
                    math.nan if constant else _p_value(column, self.num_draws)
                    for column, constant in self._columns(name)
                ]
            ).reshape(ranks.shape[1:])
            for name, ranks in self.ranks.items()
        }
        named = [
            (float(p), f"{name}{list(index)}" if index else name)
            for name, array in p_values.items()
            for index, p in np.ndenumerate(array)
            if not math.isnan(p)
        ]
        smallest, worst = min(named)
        return Uniformity(min(1.0, smallest * len(named)), p_values, worst)

    def _columns(self, name: str) -> list[tuple[np.ndarray, bool]]:
        """Return the ranks of each entry, and whether the entry is constant."""
        ranks, values = (
            array.reshape(self.num_simulations, -1)
            for array in (self.ranks[name], self.values[name])
        )
        constant = (values == values[:1]).all(0) & (self.num_simulations > 1)
        return list(zip(ranks.T, constant, strict=True))

    def plot(self, kind: Literal["ecdf", "histogram"] = "ecdf", *, level: float = 0.95) -> Figure:
        """Plot the ranks of each site, one line for each entry.

        Args:
            kind: "ecdf", the empirical distribution function of the ranks minus that of the uniform
                distribution; "histogram", the number of simulations in bins of ranks.
            level: for "ecdf", probability that the gray bands contain all lines if all ranks are
                uniform (at least; by Bonferroni); for "histogram", probability of each bin.

        Returns:
            the figure.

        Raises:
            ValueError: if ``kind`` is not one of these.
        """
        if kind not in ("ecdf", "histogram"):
            raise ValueError(f'kind must be "ecdf" or "histogram", got kind={kind!r}')
        lines = {
            name: [column for column, constant in self._columns(name) if not constant]
            for name in self.ranks
        }
        lines = {name: columns for name, columns in lines.items() if columns}
        across = 2 if len(lines) == 4 else min(len(lines), 3)
        down = -(-len(lines) // across)
        figure, axes = plt.subplots(
            down,
            across,
            figsize=(3.2 * across, 2.5 * down),
            layout="constrained",
            squeeze=False,
            sharex=True,
            sharey=True,
        )
        draw = self._plot_ecdf if kind == "ecdf" else self._plot_histogram
        alpha = (1.0 - level) / (sum(map(len, lines.values())) if kind == "ecdf" else 1)
        for ax, (name, columns) in zip(axes.flat, lines.items(), strict=False):
            draw(ax, columns, alpha)
            ax.set_title(name)
        for ax in axes.flat[len(lines) :]:
            ax.set_visible(False)
        for ax in [*axes[-1], *axes[-2 if down > 1 else -1][len(lines) % across or across :]]:
            ax.set_xlabel("rank / number of draws" if kind == "ecdf" else "rank")
            ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel("ECDF difference" if kind == "ecdf" else "simulations")
        return figure

    def _plot_ecdf(self, ax: Any, columns: list[np.ndarray], alpha: float) -> None:
        total, size = self.num_simulations, self.num_draws
        uniform = np.arange(1, size + 1) / (size + 1)
        low, high = _band(total, size, alpha)
        x = np.arange(size) / size
        ax.fill_between(x, low / total - uniform, high / total - uniform, color="0.85", step="post")
        for column in columns:
            ax.step(x, _counts(column, size) / total - uniform, where="post", lw=1.0)

    def _plot_histogram(self, ax: Any, columns: list[np.ndarray], alpha: float) -> None:
        edges = np.linspace(0, self.num_draws + 1, min(20, self.num_draws + 1) + 1).round()
        share = np.diff(edges) / (self.num_draws + 1)
        low, high = (
            stats.binom.ppf(q, self.num_simulations, share) for q in (alpha / 2, 1 - alpha / 2)
        )
        ax.stairs(high, edges - 0.5, baseline=low, fill=True, color="0.85")
        for column in columns:
            ax.stairs(np.histogram(column, edges - 0.5)[0], edges - 0.5, lw=1.0)

    def to_dataset(self) -> xarray.Dataset:
        """Return ranks, values (``NAME_value``) and divergences as an xarray Dataset.

        The dimensions are ``simulation`` and, for a site with a shape, ``NAME_dim_0`` and so on.
        """
        variables: dict[str, Any] = {"divergences": ("simulation", self.divergences)}
        for name, ranks in self.ranks.items():
            dims = ("simulation", *(f"{name}_dim_{i}" for i in range(ranks.ndim - 1)))
            variables |= {name: (dims, ranks), f"{name}_value": (dims, self.values[name])}
        names = ("num_draws", "thinning", "seed")
        attrs = {name: str(getattr(self, name)) for name in names}
        return xarray.Dataset(variables, attrs=attrs)


def sbc(
    model: Callable[..., Any],
    *args: Any,
    observed: Sequence[str] = (),
    num_simulations: int = 1000,
    num_draws: int = 99,
    warmup_steps: int = 500,
    kernel: Kernel[Any] | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> SBCResult:
    r"""Check a model and its sampler by simulation-based calibration (Talts et al., 2018).

    Parameters and data are drawn from the model. For each data set the posterior is sampled, and
    each parameter that generated the data is ranked among the draws. If the density of the model is
    that of its simulations and the sampler is right, the ranks are uniform. The log-density of
    parameters and data is ranked too (``"lp"``): it detects posteriors that ignore the data (Modrák
    et al., 2023).

    All data sets are sampled at once, one chain for each. A chain starts from a random state and,
    with the default kernel, has its own step size; the metric is common. The draws are thinned
    until they are nearly independent: their effective sample size (a mean over simulations) is at
    least 0.9 of their number. A RuntimeWarning says if this is not reached.

    Args:
        model: a Pyro model that draws all its latent and observed sites from proper distributions.
        args: arguments of the model. Observed values among them are replaced by simulated ones of
            the same shape.
        observed: names of the sites that are data, beside those that ``obs=`` marks.
        num_simulations: number of data sets.
        num_draws: number of ranked draws of each posterior: ranks are from 0 to ``num_draws``.
        warmup_steps: number of warm-up steps of each chain.
        kernel: the sampler to check, a kernel of :mod:`pyroebm.kernels`, with its default
            adaptation; None is :class:`pyroebm.NUTS`.
        seed: seed of all randomness; None draws one. It is recorded in the result.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second.

    Raises:
        ValueError: if the model has no data, cannot be simulated, has data whose shape changes, a
            site named "lp", or a density that is not finite where it was simulated.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> result = sbc(
        ...     model, torch.zeros(5), num_simulations=64, num_draws=19, warmup_steps=100, seed=0
        ... )
        >>> result.ranks["mean"].shape, result.test().p_value > 0.01
        ((64,), True)
    """
    check_counts(
        {"num_simulations": 2, "num_draws": 1, "warmup_steps": 0},
        num_simulations,
        num_draws,
        warmup_steps,
    )
    seed = fresh_seed(seed)
    with drawing_from(seeded_generator(seed, spawned=(1, 0))):
        traces, data = _simulate(model, args, observed, num_simulations)
    joint = _Joint(model, args, data)
    energy = _Posteriors(joint, joint.rows(data))
    sites = joint.posterior.sites
    if LOG_DENSITY in sites:
        raise ValueError(
            f"model must have no site named {LOG_DENSITY!r}, the name of the log-density among the"
            " ranks: rename the site"
        )
    truth = {name: torch.stack([trace[name] for trace in traces]) for name in sites}
    with torch.no_grad():
        truth[LOG_DENSITY] = -energy(joint.posterior.unconstrain(truth))
    _check_finite(truth)
    thinning = THINNING
    mcmc = _Simulations(
        NUTS() if kernel is None else kernel,
        num_draws * thinning,
        warmup_steps,
        num_simulations,
        seed=seed,
        adaptation=WindowAdaptation(step_size="per_chain") if kernel is None else "default",
        save_warmup=False,
        progress=progress,
        chain_batch_size=num_simulations,
    )
    mcmc.run(energy)
    draws = _named_draws(mcmc)
    ess = _mean_ess(draws)
    while min(ess.values()) < INDEPENDENT * num_draws and thinning < MAX_THINNING:
        needed = math.ceil(thinning * num_draws / min(ess.values()))
        more = min(max(needed, thinning + 1), MAX_THINNING) - thinning
        mcmc.run_more(num_draws * more)
        thinning += more
        draws = _named_draws(mcmc)
        ess = _mean_ess(draws)
    _warn_of_dependence(ess, num_draws, thinning)
    ties = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, 1)))
    return SBCResult(
        {n: _ranks(draws[n][:, thinning - 1 :: thinning], truth[n], ties) for n in truth},
        {n: value.detach().cpu().numpy() for n, value in truth.items()},
        num_draws,
        thinning,
        ess,
        mcmc.get_stats()["diverging"].sum(1).cpu().numpy(),
        seed,
    )


def _simulate(
    model: Callable[..., Any], args: tuple[Any, ...], observed: Sequence[str], number: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Draw all sites, and those of them that are data."""
    sampled = _Sampled()
    traces, data = [], []
    for _ in range(number):
        sampled.names = list(observed)
        with poutine.block(), torch.no_grad():
            try:
                trace = poutine.trace(sampled(model)).get_trace(*args)
            except NotImplementedError as error:
                raise ValueError(
                    "model must draw each of its sites from a proper distribution, but one cannot"
                    f" be drawn: {error}"
                ) from error
        nodes = cast(dict[str, Any], trace.nodes)
        values = {name: node["value"] for name, node in nodes.items() if node["type"] == "sample"}
        if missing := [name for name in sampled.names if name not in values]:
            raise ValueError(
                f"observed must be names of sample sites, {sorted(values)}, got {missing}"
            )
        traces.append(values)
        data.append({name: values[name] for name in dict.fromkeys(sampled.names)})
        _check_data(data[0], data[-1])
    return traces, data


def _check_data(first: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Raise ValueError unless there are data, of the same sites and shapes in both."""
    if not first:
        raise ValueError(
            "model must have data: no site has obs=; name the sites that are data with"
            ' observed=["y"]'
        )
    shapes, others = ({k: tuple(v.shape) for k, v in each.items()} for each in (first, other))
    if shapes != others:
        raise ValueError(
            "the data of all simulations must have the same sites and shapes, got"
            f" {shapes} and {others}"
        )


def _check_finite(truth: dict[str, Tensor]) -> None:
    bad = ~torch.isfinite(truth[LOG_DENSITY])
    if bool(bad.any()):
        at = {name: value[bad][0].tolist() for name, value in truth.items()}
        raise ValueError(
            "the log-density must be finite where the model was simulated, but is not in"
            f" {int(bad.sum())} of {len(bad)} simulations; the first has {at}. A value may be"
            " rounded to the bound of its support (use float64), or the density is not that of the"
            " simulation"
        )


def _named_draws(mcmc: MCMC) -> dict[str, Tensor]:
    if mcmc.interrupted:
        raise KeyboardInterrupt
    return mcmc.get_samples(group_by_chain=True) | {LOG_DENSITY: mcmc.get_stats()["lp"]}


def _mean_ess(draws: dict[str, Tensor]) -> dict[str, float]:
    """Return the smallest effective sample size over the entries of each site.

    It is a mean over simulations. The draws of each chain are replaced by their ranks within the
    chain, since the chains have different posteriors. Chains with constant draws are left out.
    """
    found = {}
    for name, values in draws.items():
        x = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        sizes = []
        for entry in x[:: max(1, len(x) // ESS_CHAINS)].unbind(2):
            moving = entry[(entry != entry[:, :1]).any(1)]
            if len(moving) > 1:
                ranks = moving.argsort(1).argsort(1)
                sizes += [float(size(ranks)) / len(ranks) for size in (ess_bulk, ess_tail)]
        if sizes:
            found[name] = min(sizes)
    return {LOG_DENSITY: 1.0} | found  # it is constant where no chain moved


def _warn_of_dependence(ess: dict[str, float], num_draws: int, thinning: int) -> None:
    name = min(ess, key=lambda key: ess[key])
    if ess[name] < INDEPENDENT * num_draws:
        warnings.warn(
            f"the draws of {name!r} are dependent after thinning by {thinning}: their effective"
            f" sample size is {ess[name]:.0f}, less than num_draws={num_draws}. Ranks of dependent"
            " draws are not uniform even if the sampler is right: reparametrize the model, lower"
            " num_draws, or raise warmup_steps",
            RuntimeWarning,
            stacklevel=stacklevel_of_user(),
        )


def _ranks(draws: Tensor, truth: Tensor, ties: np.random.Generator) -> np.ndarray:
    """Return the number of draws below the truth; ties are broken at random."""
    x, value = draws.cpu().numpy(), truth.cpu().numpy()[:, None]
    below, equal = (x < value).sum(1), (x == value).sum(1)
    return below + ties.integers(0, equal, endpoint=True)


# --------------------------------------------------------------------------------------------------
# The test of uniformity


def _counts(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Return the number of ranks up to i, for i from 0 to ``num_draws - 1``."""
    return np.bincount(ranks, minlength=num_draws + 1).cumsum()[:-1]


@functools.lru_cache(maxsize=8)
def _two_sided(total: int, num_draws: int) -> np.ndarray:
    """Return two-sided probabilities of counts of uniform ranks, ``(num_draws, total + 1)``.

    Entry (i, k) is that of k of ``total`` ranks up to i.
    """
    share = np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    counts = np.arange(total + 1)
    tails = stats.binom.cdf(counts, total, share), stats.binom.sf(counts - 1, total, share)
    return np.minimum(1.0, 2.0 * np.minimum(*tails))


def _p_value(ranks: np.ndarray, num_draws: int) -> float:
    """Return the exact p-value of the test of uniformity."""
    smallest = _two_sided(len(ranks), num_draws)[np.arange(num_draws), _counts(ranks, num_draws)]
    return _exceeding(len(ranks), num_draws, float(smallest.min()))


def _interval(total: int, num_draws: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest counts whose two-sided probability is above ``gamma``."""
    inside = _two_sided(total, num_draws) > gamma * (1.0 + 1e-9)
    return inside.argmax(1), total - inside[:, ::-1].argmax(1)


def _exceeding(total: int, num_draws: int, gamma: float) -> float:
    """Return the probability that a two-sided probability of uniform ranks is ``gamma`` or less.

    The counts of ranks up to i are a Markov chain: given that k of ``total`` ranks are up to i, the
    number that equals i + 1 is binomial. The recursion keeps the probability of each count inside
    the interval.
    """
    low, high = _interval(total, num_draws, gamma)
    if not (_two_sided(total, num_draws) > gamma * (1.0 + 1e-9)).any(1).all():
        return 1.0
    log_factorial = special.gammaln(np.arange(total + 1) + 1.0)
    before, weight = np.zeros(1, int), np.ones(1)
    for i in range(num_draws):
        chance = 1.0 / (num_draws + 1 - i)  # of a rank above i - 1 to be i
        now = np.arange(low[i], high[i] + 1)
        more, left = now[:, None] - before, total - before
        valid = (more >= 0) & (more <= left)
        more = np.where(valid, more, 0)
        log_step = (
            log_factorial[left] - log_factorial[more] - log_factorial[left - more]
        ) + more * math.log(chance)
        log_step += (left - more) * math.log1p(-chance)
        weight = np.where(valid, np.exp(log_step), 0.0) @ weight
        before = now
    return float(np.clip(1.0 - weight.sum(), 0.0, 1.0))


@functools.lru_cache(maxsize=8)
def _band(total: int, num_draws: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest counts of a simultaneous band of level ``1 - alpha``."""
    low, high = math.log(alpha / num_draws) - 1.0, math.log(alpha)
    for _ in range(20):
        middle = 0.5 * (low + high)
        if _exceeding(total, num_draws, math.exp(middle)) > alpha:
            high = middle
        else:
            low = middle
    return _interval(total, num_draws, math.exp(low))
