"""The report of the demo: figures, a table, and a conclusion in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from pyroebm.core.files import write_figure
from pyroebm.diagnostics import plots, to_arviz
from pyroebm.flows import ImportanceResult
from pyroebm.mcmc.sampler import MCMC
from pyroebm.targets import DoubleWell

__all__ = ["conclusion", "draw_figures", "table"]

Metrics = dict[str, Any]

LABELS = {
    "truth": "truth",
    "nuts": "NUTS",
    "pyro_nuts": "Pyro's NUTS",
    "nice": "NICE, D = 1",
    "redundant_nice": "redundant NICE, D = 2",
    "redundant_nice_weighted": "redundant NICE, D = 2, weighted",
}


#: Columns of the table: heading, key in the report, format.
COLUMNS = [
    ("mean", "mean", ".4f"),
    ("var", "var", ".4f"),
    ("right mass", "right_mass", ".5f"),
    ("+-", "right_mass_se", ".5f"),
    ("log Z", "log_z", ".4f"),
    ("J", "j", ".4f"),
    ("J_R", "j_r", ".4f"),
    ("ESS/n", "ess_fraction", ".3f"),
    ("Pareto k", "pareto_k", ".2f"),
    ("bulk ESS", "ess_bulk", ".0f"),
    ("R-hat", "r_hat", ".4f"),
    ("seconds", "seconds", ".1f"),
]


def draw_figures(
    out: Path,
    energy: DoubleWell,
    report: Metrics,
    mcmc: MCMC,
    x: Tensor,
    weighted: ImportanceResult,
) -> None:
    """Write the figures of the demo as files in ``out``."""
    limits = (-2.25, 1.95)
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    plots.plot_potential(
        energy,
        x,
        report["truth"]["log_z"],
        limits=limits,
        label="redundant NICE, direct draws",
        ax=axes[0],
    )
    plots.plot_potential(
        energy,
        weighted.x,
        weighted.log_z.value,
        weighted.log_weights,
        limits,
        label="the same, importance weighted",
        ax=axes[1],
    )
    axes[0].set_title("(a) direct samples")
    axes[1].set_title("(b) importance sampling")
    for ax in axes[:2]:
        ax.set_ylim(-7.2, 3.0)
    masses = {
        LABELS[name]: (metrics["right_mass"], metrics["right_mass_se"] or float("nan"))
        for name, metrics in report.items()
    }
    plots.plot_mode_masses(
        {k: v for k, v in masses.items() if k != "truth"},
        energy.right_mass,
        "P(x > 0.126) +- 2 standard errors",
        axes[2],
    )
    axes[2].set_title("(c) mass of the right well")
    write_figure(out / "double_well.png", fig)
    plt.close(fig)

    draws, stats = mcmc.get_samples(group_by_chain=True)["x"], mcmc.get_stats()
    shown = {
        "trace": to_arviz({"x": draws[:3, :1000]}),
        "rank": to_arviz({"x": draws[:4]}),
        "energy": to_arviz({"x": draws[:4]}, {"energy": stats["energy"][:4]}),
    }
    for name, data in shown.items():
        fig = plots.arviz_figure(f"plot_{name}", data)
        fig.set_size_inches(10.0, 5.0)
        write_figure(out / f"{name}.png", fig)
        plt.close(fig)


def table(report: Metrics) -> str:
    """Format the report as a table of text."""
    lines: list[tuple[str, Metrics]] = []
    for name, metrics in report.items():
        if "at_1000_draws" in metrics:
            lines.append(
                (
                    f"{LABELS[name]}, first {metrics['at_1000_draws']['draws']:,} draws",
                    metrics["at_1000_draws"],
                )
            )
        lines.append((LABELS[name], metrics))
        if "d_3" in metrics:
            lines.append((LABELS[name].replace("D = 2", "D = 3"), metrics["d_3"]))
    cells = [["", *(heading for heading, _, _ in COLUMNS)]]
    cells += [
        [
            label,
            *(format(metrics[key], spec) if key in metrics else "-" for _, key, spec in COLUMNS),
        ]
        for label, metrics in lines
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def conclusion(report: Metrics) -> str:
    """Summarize the report in a sentence."""
    truth, nuts, nice, weighted = (
        report[name] for name in ("truth", "nuts", "nice", "redundant_nice_weighted")
    )

    def with_error(metrics: Metrics) -> str:
        mass, error = metrics["right_mass"], metrics["right_mass_se"]
        if not math.isfinite(error):
            return f"{mass:.4f} (no standard error)"
        deviation = abs(mass - truth["right_mass"]) / error if error else float("inf")
        return f"{mass:.4f} +- {error:.4f} ({deviation:.1f} standard errors off)"

    log_z, log_z_error = weighted["log_z"], weighted["log_z_se"]
    found = f"{log_z:.4f}" + (
        f" +- {log_z_error:.4f}" if math.isfinite(log_z_error) else " (no standard error)"
    )

    missed = [LABELS[name] for name, metrics in report.items() if metrics["missed_modes"]]
    first = nuts["at_1000_draws"]
    return (
        f"The right well holds {truth['right_mass']:.4f} of the mass: NUTS finds"
        f" {with_error(nuts)}, with R-hat {nuts['r_hat']:.3f}"
        f" after {nuts['draws']:,} draws of {nuts['chains']} chains where the first"
        f" {first['draws']:,} left {first['r_hat']:.2f},"
        f" and weighted redundant NICE finds {with_error(weighted)}, with log Z"
        f" {found}"
        f" where the truth is {truth['log_z']:.4f}; NICE with D = 1, a Gaussian, stays at J ="
        f" {nice['j']:.4f}; the right well"
        f" was missed by {' and '.join(missed) or 'no method'}."
    )
