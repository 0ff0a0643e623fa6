"""The targets of ``models.boltzmann_flows``, with their flows and training."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models import particles
from models.recipe import counted
from pyroebm import HMC, MCMC, FlowGuide
from pyroebm.core import Energy, seeded_generator
from pyroebm.flows import (
    NICE,
    AutoregressiveFlow,
    Flow,
    FlowReport,
    RealNVP,
    RedundantNICE,
    SplineFlow,
    evaluate_flow,
)
from pyroebm.objectives import AnnealedReweighting, FlowObjective, ReverseKL
from pyroebm.targets import DoubleWell, Funnel, GaussianMixture, ManyWell, Phi4
from pyroebm.training import fit

__all__ = ["CASES", "Case", "Fitted"]

#: Metrics beside those of the report, each with its standard error.
Metrics = dict[str, tuple[float, float | None]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted flow, its target in float64, and the cost of the fit.

    ``draws`` are those of chains, where the target has no exact draws.
    """

    flow: Flow
    energy: Energy
    evaluations: int
    seconds: float
    draws: Tensor | None = None
    draws_evaluations: int = 0
    particles: particles.Case | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A target of the table.

    Args:
        title: target and flow, as in the table.
        fit: called with a seed, and whether the run is quick; returns the fitted flow.
        label: of the figure's axis.
        observable: what is plotted there, ``(n, *event) -> (n,)`` or ``(n, 2)``.
        metrics: metrics that the report does not have, from the report and the target.
        evaluate: replaces :func:`evaluate_flow`: from a fit, the number of draws, a seed and
            whether the run is quick, to the report and further metrics.
    """

    title: str
    fit: Callable[[int, bool], Fitted]
    label: str
    observable: Callable[[Tensor], Tensor]
    metrics: Callable[[FlowReport, Energy], Metrics] = lambda report, energy: {}
    evaluate: Callable[[Fitted, int, int, bool], tuple[FlowReport, Metrics]] | None = None

    def report(self, fitted: Fitted, n: int, seed: int, quick: bool) -> tuple[FlowReport, Metrics]:
        """Return the report on a flow, and further metrics."""
        if self.evaluate is not None:
            return self.evaluate(fitted, n, seed, quick)
        report = evaluate_flow(
            fitted.flow,
            fitted.energy,
            n,
            draws=fitted.draws,
            num_distances=min(n, 4000),
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
        return report, self.metrics(report, fitted.energy)


def train(
    make: Callable[[torch.dtype], Energy],
    flow: Flow,
    seed: int,
    quick: bool,
    draws: Callable[[Energy, int, bool], Tensor] | None = None,
    *,
    objective: Callable[..., FlowObjective] = ReverseKL,
    num_steps: int,
    num_samples: int = 512,
    lr: float | None = None,
    **settings: Any,
) -> Fitted:
    """Train a flow in its own dtype by an objective with these settings.

    Returns:
        the flow and its target in float64.
    """
    if quick:
        num_steps, num_samples = 5, 64
    energy, began = make(flow.dtype), time.process_time()
    with counted(energy) as rows:
        made = objective(energy, num_samples=num_samples, **settings)
        fit(flow, made, num_steps=num_steps, lr=lr, seed=seed, progress=False)
    seconds, exact = time.process_time() - began, make(torch.float64)
    with counted(exact) as reference_rows:
        reference = None if draws is None else draws(exact, seed + 1000, quick)
    return Fitted(flow.double(), exact, rows[0], seconds, reference, reference_rows[0])


def double_well(seed: int, quick: bool) -> Fitted:
    flow = RedundantNICE(1, 2, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    return train(lambda dtype: DoubleWell(dtype=dtype), flow, seed, quick, num_steps=2000)


def right_mass(report: FlowReport, energy: Energy) -> Metrics:
    value, error = report.weighted.expectation(lambda x: (x > DoubleWell.barrier).double())
    return {"error of the right mass": (float(value) - energy.right_mass, float(error))}  # type: ignore[arg-type, operator]


class RotatedManyWell(ManyWell):
    """A many-well target in coordinates x = R (a_1, b_1, ...), with a random orthogonal R."""

    turn: Tensor

    def __init__(self, pairs: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(pairs, dtype=dtype)
        noise = torch.randn(
            2 * pairs, 2 * pairs, dtype=torch.float64, generator=seeded_generator(0)
        )
        self.register_buffer("turn", torch.linalg.qr(noise).Q.to(self.dtype))

    def unrotated(self, x: Tensor) -> Tensor:
        """Return the coordinates of the wells."""
        return x @ self.turn

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.unrotated(x))

    def mode_of(self, x: Tensor) -> Tensor:
        return super().mode_of(self.unrotated(x))

    @property
    def mean(self) -> Tensor:
        return self.turn @ super().mean

    @property
    def variance(self) -> Tensor:
        return self.turn.square() @ super().variance

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return super()._draw(n, generator) @ self.turn.T


def many_well(kind: type[ManyWell], pairs: int, seed: int, quick: bool) -> Fitted:
    flow = SplineFlow(
        2 * pairs,
        num_layers=4,
        hidden_sizes=(128,),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(seed),
    )
    settings: dict[str, Any] = {
        "gradient": "total",
        "num_steps": 2000,
        "num_samples": 256,
        "lr": 3e-3,
    }
    return train(lambda dtype: kind(pairs, dtype=dtype), flow, seed, quick, **settings)


def left_masses(report: FlowReport, energy: Energy) -> Metrics:
    """Return the mass of a < 0, averaged over the pairs, and of the pair with the largest error."""
    unrotate = getattr(energy, "unrotated", lambda x: x)
    left: Callable[[Tensor], Tensor] = lambda x: (unrotate(x)[:, ::2] < 0.0).double()  # noqa: E731
    each, errors = report.weighted.expectation(left)
    mean, error = report.weighted.expectation(lambda x: left(x).mean(1))
    farthest = int((each - energy.left_mass).abs().argmax())  # type: ignore[operator]
    return {
        "P(a < 0)": (float(mean), float(error)),
        "P(a < 0), pair with the largest error": (float(each[farthest]), float(errors[farthest])),
    }


def mixture(
    make: Callable[..., GaussianMixture], scale: float, beta_start: float, seed: int, quick: bool
) -> Fitted:
    flow = SplineFlow(
        2,
        num_layers=4,
        hidden_sizes=(64, 64),
        num_bins=16,
        scale=scale,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(seed),
    )
    settings: dict[str, Any] = {
        "objective": AnnealedReweighting,
        "num_steps": 600,
        "lr": 3e-3,
        "beta_start": beta_start,
    }
    return train(lambda dtype: make(dtype=dtype), flow, seed, quick, **settings)


def funnel(seed: int, quick: bool) -> Fitted:
    flow = AutoregressiveFlow(
        10,
        num_layers=2,
        hidden_sizes=(32, 32),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(seed),
    )
    settings: dict[str, Any] = {
        "num_steps": 2000,
        "num_samples": 256,
        "lr": 5e-3,
        "beta_start": 1.0,
    }
    return train(lambda dtype: Funnel(dtype=dtype), flow, seed, quick, **settings)


def ring(seed: int, quick: bool) -> Fitted:
    flow = SplineFlow(
        16,
        num_layers=2,
        hidden_sizes=(128, 128),
        autoregressive=True,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(seed),
    )
    settings: dict[str, Any] = {
        "gradient": "total",
        "num_steps": 2000,
        "num_samples": 256,
        "lr": 3e-3,
    }
    return train(lambda dtype: Phi4(16, dtype=dtype), flow, seed, quick, flipped_chains, **settings)


def flipped_chains(energy: Energy, seed: int, quick: bool) -> Tensor:
    """Return states of HMC with random signs: the energy of a field and its negative are equal."""
    mcmc = MCMC(
        HMC(num_steps=8),
        5 if quick else 50,
        5 if quick else 300,
        400,
        thinning=2,
        seed=seed,
        progress=False,
    )
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    signs = torch.randint(2, (*x.shape[:2], 1), generator=torch.Generator().manual_seed(seed))
    return x * (2 * signs - 1)


def free_field(seed: int, quick: bool) -> Fitted:
    flow = NICE(
        16, num_layers=0, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    settings: dict[str, Any] = {
        "num_steps": 3000,
        "num_samples": 128,
        "lr": 1e-2,
        "beta_start": 1.0,
    }
    return train(
        lambda dtype: Phi4(16, m2=1.0, lam=0.0, dtype=dtype), flow, seed, quick, **settings
    )


EFFECTS, ERRORS = (
    (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0),
    (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
)
#: Means and means of squares of the 10,000 reference draws of posteriordb's
#: eight_schools-eight_schools_noncentered.
REFERENCE = {
    "mu": (4.4105, 30.403),
    "tau": (3.6021, 23.204),
    "theta 1": (6.1505, 69.363),
    "theta 8": (4.8840, 52.128),
}


def schools(effects: Tensor, errors: Tensor) -> None:
    """Rubin's eight schools (1981), non-centered, with posteriordb's priors."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * z, errors), obs=effects)


def eight_schools(make: Callable[[int], Flow], seed: int, quick: bool) -> Fitted:
    guide = FlowGuide(schools, make(seed))
    settings: dict[str, Any] = {
        "num_steps": 1000,
        "num_samples": 256,
        "lr": 5e-3,
        "beta_start": 1.0,
    }
    energy = guide.energy(torch.tensor(EFFECTS).double(), torch.tensor(ERRORS).double())
    return train(lambda dtype: energy, guide.flow, seed, quick, **settings)


def moments(report: FlowReport, energy: Energy) -> Metrics:
    """Return weighted means minus reference means, with the combined standard errors.

    The last metric is the largest deviation in units of these.
    """

    def named(x: Tensor) -> Tensor:
        sites = energy.constrain(x)  # type: ignore[operator]
        theta = sites["mu"][:, None] + sites["tau"][:, None] * sites["z"]
        return torch.stack([sites["mu"], sites["tau"], theta[:, 0], theta[:, 7]], 1)

    powers = [report.weighted.expectation(lambda x, k=k: named(x) ** k) for k in (1, 2, 4)]  # type: ignore[misc]
    (mean, error), (square, square_error), (fourth, _) = powers
    theirs = torch.tensor(list(REFERENCE.values())).double()
    first = ((square - mean**2) / 10_000 + error**2).sqrt()
    second = ((fourth - square**2) / 10_000 + square_error**2).sqrt()
    z = torch.cat([(mean - theirs[:, 0]) / first, (square - theirs[:, 1]) / second])
    metrics: Metrics = {
        f"E[{name}] less the reference": (float(mean[k] - theirs[k, 0]), float(first[k]))
        for k, name in enumerate(REFERENCE)
    }
    # undefined without a standard error
    largest = float(z.abs().max()) if bool(error.isfinite().all()) else math.nan
    return metrics | {"largest of eight moments' deviations, in standard errors": (largest, None)}


def system(name: str, seed: int, quick: bool) -> Fitted:
    """Run chains of a system of particles and fit a flow to half of them.

    The other half is for the evaluation.
    """
    done = particles.case(name, seed, quick)
    return Fitted(
        done.flow,
        done.energy,
        done.evaluations,
        done.seconds,
        done.reference.half(1),
        particles=done,
    )


def against_chains(fitted: Fitted, n: int, seed: int, quick: bool) -> tuple[FlowReport, Metrics]:
    """Return the report, two other estimates of log Z, and distances between pair distances."""
    if fitted.particles is None:
        raise ValueError("fitted must be a system of particles")
    found, chains = particles.evaluate(fitted.particles, quick=quick), fitted.particles.reference
    return found.report, {
        "log Z by bridge sampling": (found.bridge.value, found.bridge.standard_error),
        "log Z by SMC": (found.smc.value, found.smc.standard_error),
        "energy distance of pair distances": (
            found.distances.value,
            found.distances.standard_error,
        ),
        "energy distance of pair distances after weighting": (
            found.weighted_distances.value,
            found.weighted_distances.standard_error,
        ),
        "energy distance of pair distances between halves of the chains": (
            found.noise.value,
            found.noise.standard_error,
        ),
        "largest R-hat of the chains": (max(chains.r_hat.values()), None),
        "smallest ESS of the chains": (min(chains.ess.values()), None),
        "Stein's identity of the chains less its degrees of freedom": (
            chains.stein.value - fitted.flow.dim,
            chains.stein.standard_error,
        ),
        "largest error of the inverse": (found.inversion, None),
        "largest change of log q by half the steps": (found.integration, None),
        "evaluations to judge, with the other ways": (found.evaluations, None),
    }


CASES: dict[str, Case] = {
    "double-well": Case(
        "double well, NICE with auxiliary variables, D = 2",
        double_well,
        "x",
        lambda x: x,
        right_mass,
    ),
    **{
        name: Case(
            title, functools.partial(many_well, kind, pairs), label, lambda x: x[:, 0], left_masses
        )
        for name, title, kind, pairs, label in (
            ("many-well-6", "Many-Well-6, splines", ManyWell, 3, "$a_1$"),
            ("many-well-6-rotated", "Many-Well-6, rotated, splines", RotatedManyWell, 3, "$x_1$"),
            ("many-well-32", "Many-Well-32, splines", ManyWell, 16, "$a_1$"),
        )
    },
    "grid-9": Case(
        "9 modes, splines",
        lambda s, q: mixture(GaussianMixture.grid, 1.5, 0.02, s, q),
        "x",
        lambda x: x,
    ),
    "gmm40": Case(
        "GMM40 (torch, seed 0), splines",
        lambda s, q: mixture(GaussianMixture.gmm40, 12.0, 0.01, s, q),
        "x",
        lambda x: x,
    ),
    "funnel": Case(
        "funnel, variance 9, inverse autoregressive", funnel, r"$\theta$", lambda x: x[:, 0]
    ),
    "phi4": Case(
        "phi^4 ring, L = 16, autoregressive splines", ring, "mean field", lambda x: x.mean(1)
    ),
    "free-field": Case("free field, L = 16, linear", free_field, "mean field", lambda x: x.mean(1)),
    **{
        name.replace(" ", "-").lower(): Case(
            f"{name}, equivariant",
            functools.partial(system, name),
            "energy",
            known.make(),
            evaluate=against_chains,
        )
        for name, known in particles.SYSTEMS.items()
    },
    "schools": Case(
        "eight schools, RealNVP",
        lambda s, q: eight_schools(
            lambda seed: RealNVP(
                10,
                num_layers=4,
                hidden_sizes=(32,),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            ),
            s,
            q,
        ),
        r"$\mu$",
        lambda x: x[:, 0],
        moments,
    ),
    "schools-redundant": Case(
        "eight schools, NICE with auxiliary variables, D = 12",
        lambda s, q: eight_schools(
            lambda seed: RedundantNICE(
                10,
                12,
                num_layers=4,
                hidden_sizes=(32,),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            ),
            s,
            q,
        ),
        r"$\mu$",
        lambda x: x[:, 0],
        moments,
    ),
}
