"""The cases: data, starting states, and quantities with exactly known means.

They use NumPy alone, for all libraries. Draws are ``(chains, draws, dim)`` in the same order of
coordinates for all libraries, scales on their positive axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from math import prod

import numpy as np

__all__ = [
    "CASES",
    "MODEL_CASES",
    "Case",
    "eight_schools_data",
    "eight_schools_truth",
    "first_and_second_moments",
    "gp_data",
    "logistic_data",
    "net_weights",
    "slopes_data",
]

Array = np.ndarray
# of the net: E(x) = f(x) + |x|^2 / (2 * 1.5^2), whose Z is finite since f grows linearly
CONFINEMENT = 1.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One density.

    Args:
        name: as on the command line.
        title: as in the docs.
        sites: shape of each variable, in the order of the coordinates.
        quantities: from draws ``(chains, draws, dim)`` to ``(chains, draws, k)`` functions of them.
        truth: their exact means, shape ``(k,)``; None where they are not known.
        truth_error: standard errors of ``truth``, where it is an estimate itself.
        arguments: what the case's model is called with; None where it is an energy, not a model.
    """

    name: str
    title: str
    sites: Mapping[str, tuple[int, ...]]
    quantities: Callable[[Array], Array]
    truth: Callable[[], Array] | None
    truth_error: Callable[[], Array | float] = lambda: 0.0
    arguments: Callable[[], tuple[Array, ...]] | None = None

    @property
    def dim(self) -> int:
        """The number of coordinates."""
        return sum(prod(shape) for shape in self.sites.values())

    def starts(self, chains: int, seed: int) -> Array:
        """Return starts uniform on (-2, 2) in unconstrained coordinates, ``(chains, dim)``.

        Pyro and NumPyro start in this way.
        """
        return np.random.default_rng([seed, chains]).uniform(-2.0, 2.0, (chains, self.dim))

    def split(self, flat: Array) -> dict[str, Array]:
        """Split ``(*batch, dim)`` into one array for each site, ``(*batch, *shape)``."""
        sizes = [prod(shape) for shape in self.sites.values()]
        parts = np.split(flat, np.cumsum(sizes)[:-1], axis=-1)
        return {
            n: p.reshape((*flat.shape[:-1], *s))
            for (n, s), p in zip(self.sites.items(), parts, strict=True)
        }

    def join(self, samples: Mapping[str, Array]) -> Array:
        """Join arrays of sites, ``(chains, draws, *shape)``, into ``(chains, draws, dim)``."""
        return np.concatenate(
            [np.asarray(samples[n]).reshape(*samples[n].shape[:2], -1) for n in self.sites], axis=-1
        )


SCALES = np.logspace(-1.0, 1.0, 50)


def first_and_second_moments(draws: Array) -> Array:
    """Return each coordinate and its square."""
    return np.concatenate([draws, draws**2], axis=-1)


def _funnel_whitened(draws: Array) -> Array:
    theta, rest = draws[..., :1], draws[..., 1:]
    return first_and_second_moments(
        np.concatenate([theta / 3.0, rest * np.exp(-theta / 2.0)], axis=-1)
    )


@cache
def eight_schools_data() -> tuple[Array, Array]:
    """Return estimated effects and their standard errors (Rubin, 1981)."""
    return np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]), np.array(
        [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    )


# mu, tau, theta_1, ..., theta_8 from the non-centered coordinates
def _effects(draws: Array) -> Array:
    mu = draws[..., :1]
    tau = draws[..., 1:2]
    eta = draws[..., 2:]
    return np.concatenate([mu, tau, mu + tau * eta], axis=-1)


def eight_schools_truth() -> Array:
    """Return posterior means of mu, tau and the effects.

    Given tau all variables are normal, so one quadrature over log tau suffices.
    """
    y, sigma = eight_schools_data()
    log_tau = np.linspace(-15.0, 12.0, 20_001)
    tau = np.exp(log_tau)
    variance = sigma**2 + tau[:, None] ** 2
    precision = 1.0 / 25.0 + (1.0 / variance).sum(-1)
    mu = (y / variance).sum(-1) / precision
    log_weight = -0.5 * (
        np.log(variance).sum(-1) + np.log(precision) + (y**2 / variance).sum(-1) - precision * mu**2
    )
    log_weight += log_tau - np.log1p((tau / 5.0) ** 2)
    weight = np.exp(log_weight - log_weight.max())
    theta = (y * tau[:, None] ** 2 + mu[:, None] * sigma**2) / variance
    return np.average(np.column_stack([mu, tau, theta]), axis=0, weights=weight)


@cache
def logistic_data() -> tuple[Array, Array]:
    """Return covariates ``(1000, 25)`` and labels ``(1000,)`` of a logistic regression.

    The coefficients are drawn from their prior.
    """
    rng = np.random.default_rng(0)
    x, beta = rng.standard_normal((1000, 25)), rng.standard_normal(25)
    return x, (rng.uniform(size=1000) < 1.0 / (1.0 + np.exp(-x @ beta))).astype(np.float64)


def _stein(draws: Array) -> Array:
    """Return the gradient of U, whose mean is 0, and x . grad U, whose mean is d.

    Both are exact for densities that vanish at infinity (Stein's identity).
    """
    x, y = logistic_data()
    found = []
    for chain in draws:
        residual = 1.0 / (1.0 + np.exp(-chain @ x.T)) - y
        grad = residual @ x + chain
        found.append(np.column_stack([grad, (chain * grad).sum(-1)]))
    return np.stack(found)


@cache
def slopes_data() -> tuple[Array, Array, Array]:
    """Return group, covariate and response of 20 observations in each of 15 groups.

    Their shapes are ``(300,)``. Intercepts and slopes of the groups are correlated.
    """
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(15), 20)
    scales, correlation = np.array([1.0, 0.5]), np.array([[1.0, 0.5], [0.5, 1.0]])
    covariance = correlation * np.outer(scales, scales)
    intercept, slope = rng.multivariate_normal([1.0, -0.5], covariance, size=15).T
    x = rng.standard_normal(group.size)
    return group, x, intercept[group] + slope[group] * x + 0.5 * rng.standard_normal(group.size)


@cache
def gp_data() -> tuple[Array, Array]:
    """Return inputs and noisy values of a smooth function, ``(50,)`` each."""
    rng = np.random.default_rng(2)
    x = np.sort(rng.uniform(0.0, 10.0, 50))
    return x, np.sin(x) + 0.3 * x + 0.3 * rng.standard_normal(50)


@cache
def net_weights() -> list[tuple[Array, Array]]:
    """Return weights and biases of a 2-128-128-1 network.

    Standard deviations are gain / sqrt(fan in) and gain. The density has a skewed peak and a
    shoulder.
    """
    rng = np.random.default_rng(3)
    widths = (2, 128, 128, 1)
    gains = (3.0, 2.0, 1.0)
    return [
        (gain * rng.standard_normal((out, into)) / np.sqrt(into), gain * rng.standard_normal(out))
        for gain, into, out in zip(gains, widths[:-1], widths[1:], strict=True)
    ]


def net_energy(x: Array) -> Array:
    """Compute the energy in NumPy: ``(n, 2) -> (n,)``."""
    h, layers = x, net_weights()
    for k, (weight, bias) in enumerate(layers):
        h = h @ weight.T + bias
        h = h / (1.0 + np.exp(-h)) if k + 1 < len(layers) else h
    return h[:, 0] + 0.5 * (x**2).sum(-1) / CONFINEMENT**2


def _net_truth() -> Array:
    """Return the exact means by quadrature.

    For a smooth density that vanishes at infinity the trapezoidal rule is exact to rounding.
    """
    axis = np.linspace(-20.0, 20.0, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    energy = net_energy(grid)
    return np.average(first_and_second_moments(grid), axis=0, weights=np.exp(energy.min() - energy))


CASES = {
    case.name: case
    for case in (
        Case(
            "normal",
            "50-d normal, scales 0.1 to 10",
            {"x": (50,)},
            first_and_second_moments,
            lambda: np.concatenate([np.zeros(50), SCALES**2]),
        ),
        Case(
            "eight_schools",
            "Eight schools, non-centered",
            {"mu": (), "tau": (), "eta": (8,)},
            _effects,
            eight_schools_truth,
            arguments=eight_schools_data,
        ),
        Case(
            "logistic",
            "Logistic regression, 1,000 x 25",
            {"beta": (25,)},
            _stein,
            lambda: np.append(np.zeros(25), 25.0),
            arguments=logistic_data,
        ),
        Case(
            "funnel",
            "Funnel, d = 10, variance 9",
            {"x": (10,)},
            _funnel_whitened,
            lambda: np.repeat([0.0, 1.0], 10),
        ),
        Case("net", "2-128-128-1 SiLU net", {"x": (2,)}, first_and_second_moments, _net_truth),
    )
}

#: The cases that a person writes as a model in each library, for benchmarks/stopwatch.py. Another
#: table than CASES, since two of them have no known truth and two have other sites.
MODEL_CASES = {
    case.name: case
    for case in (
        CASES["eight_schools"],
        Case(
            "slopes",
            "Varying slopes, LKJ, 15 x 20",
            {"mu": (2,), "scales": (2,), "chol": (2, 2), "z": (15, 2), "noise": ()},
            first_and_second_moments,
            None,
            arguments=slopes_data,
        ),
        CASES["logistic"],
        Case(
            "gp",
            "Gaussian process, 50 points",
            {"length": (), "amplitude": (), "noise": ()},
            first_and_second_moments,
            None,
            arguments=gp_data,
        ),
        dataclasses.replace(CASES["funnel"], sites={"theta": (), "x": (9,)}, arguments=lambda: ()),
        dataclasses.replace(
            CASES["net"], arguments=lambda: tuple(array for pair in net_weights() for array in pair)
        ),
    )
}
