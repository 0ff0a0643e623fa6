"""How the numbers of cards are computed, when an entry is made and when it is verified."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm import data as data_sets
from pyroebm import targets as known_targets
from pyroebm.core.energy import Energy
from pyroebm.core.statistics import Estimate
from pyroebm.energies import LayeredMachine
from pyroebm.flows import Flow, FlowEnergy, importance_sample
from pyroebm.objectives import estimate_augmented_kl
from pyroebm.partition import LogZ, ais, base_rates, exact, expectation, quadrature, reverse_ais
from pyroebm.targets import Target

__all__ = ["COMPUTATIONS", "Context", "MissingData", "compute", "load_data"]


class MissingData(Exception):  # noqa: N818
    """Data that does not come with the package, and whose path was not given.

    Args:
        name: of the data.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} does not come with the package: give its path")
        self.name = name


@dataclasses.dataclass(frozen=True)
class Context:
    """What a computation may use.

    Args:
        model: the entry in float64, without gradients.
        log_z: the log Z of its card: one exact number, or a lower bound and an upper one.
        data: the data that the metric names; None for none.
        reference: reference draws ``(chains, draws, *event)``; None for none.
        generator: source of randomness; None for torch's default one.
    """

    model: nn.Module
    log_z: Sequence[Estimate] = ()
    data: Tensor | None = None
    reference: Tensor | None = None
    generator: torch.Generator | None = None

    @property
    def energy(self) -> Energy:
        """The model, which must be an energy."""
        if not isinstance(self.model, Energy):
            raise ValueError(f"model must be an energy, got {type(self.model).__name__}")
        return self.model

    @property
    def flow(self) -> Flow:
        """The model, which must be a flow."""
        if not isinstance(self.model, Flow):
            raise ValueError(f"model must be a flow, got {type(self.model).__name__}")
        return self.model

    @property
    def rows(self) -> Tensor:
        """The data, which must be given."""
        if self.data is None:
            raise ValueError("the metric must name its data, got data=None")
        return self.data


def load_data(name: str, path: Path | None = None) -> Tensor:
    """Load the data that a metric names, in float64.

    Args:
        name: the data and its part, such as "digits/test", "bars-and-stripes/3", "mnist/test".
        path: of data that does not come with the package.

    Raises:
        MissingData: if ``path`` is needed and not given.
        ValueError: if the name is not known.

    Example:
        >>> load_data("digits/test").shape
        torch.Size([360, 64])
    """
    source, _, part = name.partition("/")
    if source == "bars-and-stripes":
        return data_sets.bars_and_stripes(int(part), dtype=torch.float64)
    if source in ("digits", "mnist") and part in ("train", "test"):
        if source == "digits":
            split = data_sets.digits(dtype=torch.float64)
        elif path is None:
            raise MissingData(source)
        else:
            split = data_sets.load_binary(path, dtype=torch.float64)
        rows: Tensor = getattr(split, part)
        return rows
    raise ValueError(f"data must be digits, mnist or bars-and-stripes with its part, got {name!r}")


def _of_log_z(found: LogZ) -> Estimate:
    return Estimate(found.value, found.standard_error, found.kind)


def enumeration(context: Context) -> Estimate:
    """Compute log Z by a sum over all states."""
    return _of_log_z(exact(context.energy, progress=False))


def integral(context: Context, tolerance: float = 1e-6) -> Estimate:
    """Compute log Z by quadrature; its numerical error is below the tolerance."""
    found = quadrature(context.energy, tolerance=tolerance, progress=False)
    return Estimate(found.value, 0.0 if found.kind == "exact" else found.standard_error, found.kind)


def normalized(context: Context) -> Estimate:
    """Return log Z = 0 of a flow."""
    return Estimate(FlowEnergy(context.flow).log_z, 0.0, "exact")


def forward_annealing(context: Context, num_temperatures: int, num_chains: int) -> Estimate:
    """Estimate log Z by AIS from the base rates of the data."""
    energy = context.energy
    joint = energy.joint() if isinstance(energy, LayeredMachine) else energy
    found = ais(
        joint,
        base_rates(joint, context.rows),
        betas=num_temperatures,
        num_chains=num_chains,
        generator=context.generator,
        progress=False,
    )
    return _of_log_z(found)


def reverse_annealing(context: Context, num_temperatures: int, num_chains: int) -> Estimate:
    """Estimate log Z by reverse AIS from exact draws, else from the reference draws."""
    energy = context.energy
    joint = energy.joint() if isinstance(energy, LayeredMachine) else energy
    draws = None
    if not energy.has_exact_draws:
        if context.reference is None:
            raise ValueError(f"{type(energy).__name__} needs exact or reference draws, got neither")
        draws = context.reference.flatten(0, 1)
        order = torch.randperm(len(draws), generator=context.generator)
        draws = draws[order[:num_chains]]
    found = reverse_ais(
        joint if draws is None else energy,
        base_rates(joint if draws is None else energy, context.rows),
        draws=draws,
        betas=num_temperatures,
        num_chains=num_chains,
        generator=context.generator,
        progress=False,
    )
    return _of_log_z(found)


def _log_likelihoods(context: Context, rows: Tensor, log_z: float) -> Tensor:
    log_likelihood = getattr(context.model, "log_likelihood", None)
    if log_likelihood is not None:
        values: Tensor = log_likelihood(rows, log_z)
        return values
    return -context.energy(rows) - log_z


def mean_log_likelihood(context: Context, bound: str = "exact") -> Estimate:
    """Compute the mean log-likelihood of the data.

    Args:
        context: the entry.
        bound: "exact"; "upper" from the lower bound on log Z, or "lower" from the upper one.
    """
    log_z = context.log_z[-1 if bound == "lower" else 0]
    value = float(_log_likelihoods(context, context.rows, log_z.value).mean())
    if log_z.kind == "exact":
        return Estimate(value, 0.0, "exact")
    # the side of a bound on log Z is opposite in the likelihood
    kind = {"lower": "upper", "upper": "lower"}.get(log_z.kind, "estimate")
    return Estimate(value, log_z.standard_error, kind)  # type: ignore[arg-type]


def divergence_from_data(context: Context) -> Estimate:
    """Compute KL(data || model) of a discrete model; 0 if it is the distribution of the data."""
    rows, counts = context.rows.unique(dim=0, return_counts=True)
    p = counts.double() / counts.sum()
    log_likelihoods = _log_likelihoods(context, rows, context.log_z[0].value)
    return Estimate(float((p * (p.log() - log_likelihoods)).sum()), 0.0, context.log_z[0].kind)


def mass_of_data(context: Context) -> Estimate:
    """Compute the probability that a draw is one of the examples in the data."""
    log_likelihoods = _log_likelihoods(context, context.rows.unique(dim=0), context.log_z[0].value)
    return Estimate(float(log_likelihoods.exp().sum()), 0.0, context.log_z[0].kind)


def _target(name: str) -> Target:
    kind = getattr(known_targets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Target)):
        raise ValueError(f"target must be a class of pyroebm.targets, got {name!r}")
    return kind(dtype=torch.float64)


def divergence_from_target(context: Context, target: str, tolerance: float = 1e-5) -> Estimate:
    """Compute KL(target || model) in one or two dimensions by quadrature."""
    truth = _target(target)
    if truth.log_z is None:
        raise ValueError(f"target must have a known log_z, got {target}")
    offset = context.log_z[0].value - truth.log_z
    found, error = expectation(
        truth,
        lambda x: context.energy(x) - truth(x) + offset,
        tolerance=tolerance,
        progress=False,
    )
    within = error <= tolerance
    return Estimate(float(found), 0.0 if within else error, "exact" if within else "estimate")


def importance_log_z_error(context: Context, target: str, num_samples: int) -> Estimate:
    """Estimate log Z of the target with the flow, less the true value."""
    truth = _target(target)
    found = importance_sample(
        context.flow, truth, num_samples, generator=context.generator, progress=False
    ).log_z
    return Estimate(found.value - (truth.log_z or 0.0), found.standard_error, found.kind)


def importance_efficiency(context: Context, target: str, num_samples: int) -> Estimate:
    """Estimate the effective sample size of the weights as a fraction, from 20 samples."""
    truth = _target(target)
    parts = [
        importance_sample(
            context.flow, truth, num_samples // 20, generator=context.generator, progress=False
        ).ess_fraction
        for _ in range(20)
    ]
    return Estimate.of(torch.tensor(parts, dtype=torch.float64))


def augmented_divergence(context: Context, target: str, num_samples: int) -> Estimate:
    """Estimate J_R, an upper bound on KL(x-marginal of the flow || target)."""
    value, error = estimate_augmented_kl(
        context.flow, _target(target), num_samples, generator=context.generator, progress=False
    )
    return Estimate(value, error)


def mode_mass(context: Context, target: str, mode: int, num_samples: int) -> Estimate:
    """Estimate the mass that draws of the flow, without weights, have in a mode of the target."""
    truth = _target(target)
    x = importance_sample(
        context.flow, truth, num_samples, generator=context.generator, progress=False
    ).x
    p = float((truth.mode_of(x) == mode).double().mean())
    return Estimate(p, math.sqrt(max(p * (1.0 - p), 1.0 / num_samples) / num_samples))


#: The computations by the names that cards have.
COMPUTATIONS: Mapping[str, Callable[..., Estimate]] = {
    function.__name__: function
    for function in (
        enumeration,
        integral,
        normalized,
        forward_annealing,
        reverse_annealing,
        mean_log_likelihood,
        divergence_from_data,
        mass_of_data,
        divergence_from_target,
        importance_log_z_error,
        importance_efficiency,
        augmented_divergence,
        mode_mass,
    )
}


def compute(
    computation: str,
    context: Context,
    arguments: Mapping[str, Any],
) -> Estimate:
    """Run a computation by its name.

    Raises:
        ValueError: if there is no such computation.
    """
    if computation not in COMPUTATIONS:
        raise ValueError(
            f"computation must be one of {', '.join(COMPUTATIONS)}, got {computation!r}"
        )
    with torch.no_grad():
        return COMPUTATIONS[computation](context, **arguments)
