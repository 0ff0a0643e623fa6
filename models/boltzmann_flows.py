"""Flows fitted to Boltzmann densities, with forward and reverse evaluation. About 60 minutes.

For each target of ``models.flow_cases``, over three seeds: the error of log Z with its standard
error, effective sample sizes in both directions, modes found, distances between samples, and cost.
A table in Markdown is written beside the metrics.

python -m models.boltzmann_flows [--only NAME ...] [--seeds K] [--quick] [--out DIR]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from models.flow_cases import CASES, Case, Fitted, Metrics
from models.recipe import Recipe, run
from pyroebm.core import Progress, seeded_generator
from pyroebm.flows import FlowReport

#: Columns of the table: heading, metric.
COLUMNS = {
    "error of log Z": "error of log Z",
    "ESS": "extended ESS",
    "of x alone": "ESS of x alone",
    "forward ESS": "forward ESS",
    "EUBO - ELBO": "EUBO less ELBO",
    "Pareto k": "Pareto k",
    "coverage": "mode-coverage entropy",
    "energy distance, weighted": "energy distance after weighting",
    "evaluations": "evaluations to fit",
    "minutes": "minutes to fit",
}


def metrics_of(report: FlowReport, fitted: Fitted, more: Metrics) -> Metrics:
    """Return the metrics of one seed, with their standard errors."""
    weighted = report.weighted
    found: Metrics = {"log Z": (weighted.log_z.value, weighted.log_z.standard_error)}
    if report.log_z is not None:
        found["error of log Z"] = (
            weighted.log_z.value - report.log_z,
            weighted.log_z.standard_error,
        )
    found |= {
        "extended ESS": (weighted.ess_fraction, None),
        "ESS of x alone": (report.marginal_ess, None),
        "Pareto k": (weighted.pareto_k, None),
        "ELBO": (report.elbo.value, report.elbo.standard_error),
    }
    if report.eubo is not None and report.forward_ess is not None:
        found |= {
            "forward ESS": (report.forward_ess, None),
            "EUBO": (report.eubo.value, report.eubo.standard_error),
            "EUBO less ELBO": (
                report.eubo.value - report.elbo.value,
                math.hypot(report.eubo.standard_error, report.elbo.standard_error),
            ),
        }
    if report.coverage_entropy is not None:
        found |= {
            "mode-coverage entropy": (report.coverage_entropy, None),
            "missing modes": (len(report.missing), None),
        }
    for key, distance in (
        ("energy distance", report.energy_distance),
        ("energy distance after weighting", report.corrected_distance),
        ("squared discrepancy", report.discrepancy),
    ):
        if distance is not None:
            found[key] = (distance.value, distance.standard_error)
    return (
        found
        | more
        | {
            "evaluations to fit": (fitted.evaluations, None),
            "evaluations to judge": (report.evaluations, None),
            "evaluations of chains to judge by": (fitted.draws_evaluations, None),
            "minutes to fit": (fitted.seconds / 60.0, None),
        }
    )


def cell(name: str, values: Sequence[tuple[float, float | None]]) -> str:
    """Format a metric over the seeds.

    Errors of log Z are listed; of other metrics the smallest and the largest value are shown, with
    the largest standard error.
    """
    if name == "error of log Z":
        return ", ".join(f"{value:+.2g} ± {error:.1g}" for value, error in values)
    low, high = (f"{limit(value for value, _ in values):.3g}" for limit in (min, max))
    largest = max((error for _, error in values if error is not None), default=None)
    return (low if low == high else f"{low} to {high}") + (
        "" if largest is None else f" ± {largest:.1g}"
    )


def table(found: dict[str, list[Metrics]]) -> str:
    """Return the table of all targets in Markdown, with a dash for missing metrics."""
    lines = ["| target, flow | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, seeds in found.items():
        cells = [
            cell(key, [metrics[key] for metrics in seeds]) if key in seeds[0] else "-"
            for key in COLUMNS.values()
        ]
        lines.append(f"| {CASES[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(ax: Axes, case: Case, report: FlowReport, truth: Tensor | None) -> None:
    """Plot the observable of a case for draws of the flow, weighted draws, and the target."""
    x = case.observable(report.weighted.x)
    if x.dim() == 2:
        ax.plot(*x[:2000].mT.numpy(), ".", markersize=1.5, label="flow")
        if truth is not None:
            ax.plot(
                *case.observable(truth)[:2000].mT.numpy(),
                ".",
                markersize=1.5,
                alpha=0.6,
                label="target",
            )
    else:
        shown = x if truth is None else case.observable(truth)
        low, high = (
            float(v)
            for v in torch.quantile(shown[:100_000].double(), torch.tensor([0.001, 0.999]).double())
        )
        style = {"bins": 80, "range": (low, high), "density": True, "histtype": "step"}
        ax.hist(x.numpy(), **style, label="flow")
        ax.hist(x.numpy(), weights=report.weighted.weights.numpy(), **style, label="weighted")
        if truth is not None:
            ax.hist(
                case.observable(truth).numpy(),
                **style,
                color="black",
                linewidth=0.8,
                label="target",
            )
    ax.set(title=case.title, xlabel=case.label)
    ax.title.set_fontsize(8)


def main(
    only: tuple[str, ...] = tuple(CASES),
    seeds: int = 3,
    n: int = 100_000,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    progress: bool | None = None,
) -> None:
    """Fit and evaluate the flows.

    Args:
        only: targets to run.
        seeds: fits of each.
        n: draws for the evaluation of a flow.
        seed: the first of the seeds.
        quick: a few steps only, to test that everything runs.
        out: folder of metrics.json, the table and the figure; None is runs/boltzmann_flows.
        progress: show progress; None shows that of what takes longer than a second.
    """
    if unknown := set(only) - set(CASES):
        raise ValueError(f"only must be of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    if quick:
        seeds, n = 1, 2000
    recipe = Recipe("boltzmann_flows", out, seed, only=only, seeds=seeds, n=n, quick=quick)
    wide = min(4, len(only))
    fig, axes = plt.subplots(
        -(-len(only) // wide),
        wide,
        figsize=(4 * wide, 3 * -(-len(only) // wide)),
        layout="constrained",
        squeeze=False,
    )
    found: dict[str, list[Metrics]] = {}
    with Progress(len(only) * seeds, "boltzmann_flows", "fit", progress) as shown:
        for ax, name in zip(axes.flat, only, strict=False):
            case = CASES[name]
            for number in range(seed, seed + seeds):
                torch.manual_seed(number)
                fitted = case.fit(number, quick)
                recipe.model(f"{name}-{number}", fitted.flow)
                report, more = case.report(fitted, n, number, quick)
                found.setdefault(name, []).append(metrics_of(report, fitted, more))
                if number == seed:
                    truth = None if fitted.draws is None else fitted.draws.flatten(0, 1)
                    if truth is None and fitted.energy.has_exact_draws:
                        truth = fitted.energy.sample(min(n, 100_000), seeded_generator(number))
                    draw(ax, case, report, truth)
                    print(f"\n{case.title}\n{report}", flush=True)
                shown.update()
            for key in found[name][0]:
                values = [metrics[key] for metrics in found[name]]
                numbers = torch.tensor([value for value, _ in values], dtype=torch.float64)
                if not bool(
                    numbers.isfinite().all()
                ):  # such as Pareto k where all weights are equal
                    print(f"{name}: {key} is {numbers.tolist()}, no metric")
                    continue
                spread = numbers.std() / math.sqrt(seeds) if seeds > 1 else values[0][1]
                note = (
                    ""
                    if seeds == 1
                    else "seeds: "
                    + ", ".join(
                        f"{v:.5g}" + ("" if e is None else f" +- {e:.1g}") for v, e in values
                    )
                )
                recipe.add(f"{name}: {key}", numbers.mean(), spread, "estimate", note)
            recipe.text("table.md", table(found))
    for ax in axes.flat[len(only) :]:
        ax.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    recipe.figure("boltzmann_flows", fig)
    print(table(found))
    recipe.write()


if __name__ == "__main__":
    run(main)
