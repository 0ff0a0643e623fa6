"""Densities of posteriordb (Magnusson et al., 2021), from a file of the user.

The file is JSON: for each posterior, named as in posteriordb, the `data` of its Stan program, and
as `reference`, for each of its parameters, `mean`, `mean_square` and their Monte Carlo standard
errors `mcse_mean` and `mcse_mean_square`. The non-centered eight schools are in
:data:`benchmarks.suite.cases.CASES`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.cases import Array, Case, first_and_second_moments

__all__ = ["DENSITIES", "posteriordb_cases"]


def _as_they_are(draws: Array) -> Array:
    return draws


@dataclasses.dataclass(frozen=True)
class Density:
    """One posterior.

    Args:
        posterior: its name in the file.
        title: as in the docs.
        sites: shape of each variable, in the order of the coordinates.
        arguments: from the data of the Stan program to what the models are called with.
        parameters: from draws ``(chains, draws, dim)`` to the parameters of the Stan program, in
            the order of the reference.
    """

    posterior: str
    title: str
    sites: Mapping[str, tuple[int, ...]]
    arguments: Callable[[Mapping[str, Any]], tuple[Array, ...]]
    parameters: Callable[[Array], Array] = _as_they_are


def _lags(data: Mapping[str, Any]) -> tuple[Array, Array]:
    order, y = data["K"], np.array(data["y"], dtype=float)
    lags = [y[order - lag : len(y) - lag] for lag in range(1, order + 1)]
    return np.column_stack(lags), y[order:]


def _arma(data: Mapping[str, Any]) -> tuple[Array]:
    return (np.array(data["y"], dtype=float),)


def _garch(data: Mapping[str, Any]) -> tuple[Array, Array]:
    return np.array(data["y"], dtype=float), np.array(data["sigma1"], dtype=float)


def _garch_parameters(draws: Array) -> Array:
    """Return the parameters; the model's last site is beta1 / (1 - alpha1)."""
    mu, alpha0, alpha1, share = np.moveaxis(draws, -1, 0)
    return np.stack([mu, alpha0, alpha1, share * (1.0 - alpha1)], axis=-1)


def _iq(data: Mapping[str, Any]) -> tuple[Array, Array]:
    iq, score = (np.array(data[name], dtype=float) for name in ("mom_iq", "kid_score"))
    return np.column_stack([np.ones_like(iq), iq]), score


def _iq_and_school(data: Mapping[str, Any]) -> tuple[Array, Array]:
    school, iq, score = (
        np.array(data[name], dtype=float) for name in ("mom_hs", "mom_iq", "kid_score")
    )
    school, iq = school - school.mean(), iq - iq.mean()
    return np.column_stack([np.ones_like(iq), school, iq, school * iq]), score


def _earnings(data: Mapping[str, Any]) -> tuple[Array, Array]:
    height, male, earn = (np.array(data[name], dtype=float) for name in ("height", "male", "earn"))
    return np.column_stack([np.ones_like(height), height, male, height * male]), np.log(earn)


def _regression(data: Mapping[str, Any]) -> tuple[Array, Array]:
    return np.array(data["X"], dtype=float), np.array(data["y"], dtype=float)


def _curve(data: Mapping[str, Any]) -> tuple[Array, Array]:
    return np.array(data["x"], dtype=float), np.array(data["y"], dtype=float)


def _mixture_parameters(draws: Array) -> Array:
    """Return the parameters; the model's second site is the distance of the means."""
    return np.concatenate(
        [draws[..., :1], draws[..., :1] + draws[..., 1:2], draws[..., 2:]], axis=-1
    )


LINEAR = {"beta": (4,), "sigma": ()}

DENSITIES = {
    "ark": Density(
        "arK-arK", "posteriordb: AR(5)", {"alpha": (), "beta": (5,), "sigma": ()}, _lags
    ),
    "arma": Density(
        "arma-arma11",
        "posteriordb: ARMA(1, 1)",
        {"mu": (), "phi": (), "theta": (), "sigma": ()},
        _arma,
    ),
    "garch": Density(
        "garch-garch11",
        "posteriordb: GARCH(1, 1)",
        {"mu": (), "alpha0": (), "alpha1": (), "share": ()},
        _garch,
        _garch_parameters,
    ),
    "kidscore_iq": Density(
        "kidiq-kidscore_momiq", "posteriordb: kidscore, IQ", {"beta": (2,), "sigma": ()}, _iq
    ),
    "kidscore_interaction": Density(
        "kidiq_with_mom_work-kidscore_interaction_c",
        "posteriordb: kidscore, interaction",
        LINEAR,
        _iq_and_school,
    ),
    "gp_regression": Density(
        "gp_pois_regr-gp_regr",
        "posteriordb: Gaussian process, 11 points",
        {"rho": (), "alpha": (), "sigma": ()},
        _curve,
    ),
    "mixture": Density(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        "posteriordb: mixture of two normals",
        {"mu": (), "gap": (), "sigma": (2,), "theta": ()},
        _arma,
        _mixture_parameters,
    ),
    "blr": Density(
        "sblri-blr",
        "posteriordb: linear regression",
        {"beta": (5,), "sigma": ()},
        _regression,
    ),
    "earnings": Density(
        "earnings-logearn_interaction",
        "posteriordb: log earnings, interaction",
        LINEAR,
        _earnings,
    ),
}


def _case(name: str, density: Density, content: Mapping[str, Any]) -> Case:
    data, reference = content["data"], list(content["reference"].values())

    def column(first: str, second: str) -> Array:
        return np.array([row[key] for key in (first, second) for row in reference])

    return Case(
        name,
        density.title,
        density.sites,
        lambda draws: first_and_second_moments(density.parameters(draws)),
        lambda: column("mean", "mean_square"),
        lambda: column("mcse_mean", "mcse_mean_square"),
        lambda: density.arguments(data),
    )


def posteriordb_cases(path: Path) -> dict[str, Case]:
    """Return the cases of :data:`DENSITIES`, from a file of the user."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: _case(name, density, content[density.posterior])
        for name, density in DENSITIES.items()
    }
