"""Figures in matplotlib. Every function takes Axes (or makes them) and returns them; draws come as
tensors or arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.stats import rankdata
from torch import Tensor

__all__ = [
    "plot_energy_levels",
    "plot_images",
    "plot_mode_masses",
    "plot_potential",
    "plot_rank",
    "plot_trace",
]

TRUTH, ESTIMATE = "black", "tab:red"


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(5, 3.5), layout="constrained")[1] if ax is None else ax


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def plot_potential(
    energy: Callable[[Tensor], Tensor],
    draws: Tensor | np.ndarray,
    log_z: float,
    log_weights: Tensor | np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
    bins: int = 60,
    label: str = "estimate",
    ax: Axes | None = None,
) -> Axes:
    r"""A potential of one variable beside its estimate from draws, :math:`\hat U(x) = -\log \hat
    p(x) - \log Z`.

    Args:
        energy: the potential U of a scalar variable.
        draws: draws, any shape.
        log_z: :math:`\log Z`, known or estimated, in nats.
        log_weights: log importance weights, shape of ``draws``; None for equal ones.
        limits: range of x; None takes that of the draws.
        bins: bins of the histogram :math:`\hat p`; an empty one leaves a gap, for nothing is known
            there.
        label: name of the estimate in the legend.
        ax: axes to draw on.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> energy = DoubleWell()
        >>> ax = plot_potential(
        ...     energy, energy.sample(1000, torch.Generator().manual_seed(0)), energy.log_z
        ... )
        >>> ax.get_ylabel()
        'U(x)'
    """
    ax = _axes(ax)
    x = _array(draws).reshape(-1)
    weights = None
    if log_weights is not None:
        logs = _array(log_weights).reshape(-1)
        weights = np.exp(logs - logs.max())
    low, high = limits if limits is not None else (float(x.min()), float(x.max()))
    counts, edges = np.histogram(x, bins=bins, range=(low, high), weights=weights)
    total = len(x) if weights is None else weights.sum()
    density = counts / (total * np.diff(edges))
    with np.errstate(divide="ignore"):
        estimate = np.where(density > 0, -np.log(density) - log_z, np.nan)
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    ax.plot(grid.numpy(), _array(energy(grid)), color=TRUTH, lw=2, label="U, true")
    ax.plot(
        0.5 * (edges[1:] + edges[:-1]),
        estimate,
        color=ESTIMATE,
        lw=1.4,
        marker=".",
        ms=4,
        label=label,
    )
    ax.set(xlabel="x", ylabel="U(x)")
    ax.legend(frameon=False)
    return ax


def plot_mode_masses(
    masses: dict[str, tuple[float, float]],
    truth: float | None = None,
    label: str = "mass",
    ax: Axes | None = None,
) -> Axes:
    """The mass that each method gives to one mode, with two standard errors, and the truth as a
    line.

    Args:
        masses: for each method its mass and standard error; a standard error of NaN draws no bar.
        truth: the true mass.
        label: label of the axis.
        ax: axes to draw on.

    Example:
        >>> ax = plot_mode_masses(
        ...     {"NUTS": (0.066, 0.002), "flow": (0.0, float("nan"))}, truth=0.0665
        ... )
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['NUTS', 'flow']
    """
    ax = _axes(ax)
    for row, (mass, error) in enumerate(masses.values()):
        bar = None if np.isnan(error) else 2.0 * error
        ax.errorbar(mass, row, xerr=bar, fmt="o", color=ESTIMATE, capsize=4, ms=6)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.annotate(
            f"{mass:.4f}",
            (mass, row),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
            bbox=box,
        )
    if truth is not None:
        ax.axvline(truth, color=TRUTH, lw=1.5, zorder=0)
    ax.set_yticks(range(len(masses)), list(masses))
    ax.set_ylim(len(masses) - 0.4, -0.6)
    ax.set_xlabel(label if truth is None else f"{label}\ntruth {truth:.4f}")
    return ax


def plot_trace(
    draws: Tensor | np.ndarray,
    chains: Sequence[int] = (0, 1, 2),
    name: str = "x",
    ax: Axes | None = None,
) -> Axes:
    """The path of a few chains.

    Args:
        draws: one variable, shape ``(chains, draws)``.
        chains: which chains to show.
        name: name of the variable.
        ax: axes to draw on.

    Example:
        >>> plot_trace(torch.zeros(4, 100)).get_xlabel()
        'draw'
    """
    ax, x = _axes(ax), _array(draws)
    for chain in chains:
        if chain < len(x):
            ax.plot(x[chain], lw=0.6, alpha=0.8, label=f"chain {chain}")
    ax.set(xlabel="draw", ylabel=name)
    ax.legend(frameon=False, loc="upper right", fontsize=8)
    return ax


def plot_rank(draws: Tensor | np.ndarray, bins: int = 20, ax: Axes | None = None) -> Axes:
    """Ranks of each chain's draws among those of all chains (Vehtari et al., 2021): level lines
    mean that the chains agree.

    Args:
        draws: one variable, shape ``(chains, draws)``.
        bins: number of bins of ranks.
        ax: axes to draw on.

    Example:
        >>> plot_rank(torch.randn(4, 100, generator=torch.Generator().manual_seed(0))).get_xlabel()
        'rank among all draws'
    """
    ax, x = _axes(ax), _array(draws)
    ranks = rankdata(x).reshape(x.shape) / x.size
    edges = np.linspace(0.0, 1.0, bins + 1)
    shares = np.array([np.histogram(chain, edges)[0] / len(chain) for chain in ranks]) * bins
    ax.stairs(
        np.quantile(shares, 0.95, axis=0),
        edges,
        baseline=np.quantile(shares, 0.05, axis=0),
        fill=True,
        alpha=0.3,
        color=ESTIMATE,
    )
    ax.stairs(
        np.median(shares, axis=0), edges, color=ESTIMATE, lw=1.5, label="median and 90 % of chains"
    )
    ax.axhline(1.0, color=TRUTH, lw=1, ls="--", label="all chains alike")
    ax.set(
        xlabel="rank among all draws", ylabel="share of a chain's draws / even", ylim=(0.0, None)
    )
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_energy_levels(energy: Tensor | np.ndarray, bins: int = 60, ax: Axes | None = None) -> Axes:
    """Hamiltonians about their mean and their changes from draw to draw (Betancourt, 2016): much
    narrower changes are slow.

    Args:
        energy: Hamiltonians, shape ``(chains, draws)``.
        bins: bins of the histograms.
        ax: axes to draw on.

    Example:
        >>> energy = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        >>> plot_energy_levels(energy).get_xlabel()
        'Hamiltonian - mean'
    """
    ax, levels = _axes(ax), _array(energy)
    centered = (levels - levels.mean()).reshape(-1)
    changes = np.diff(levels, axis=1).reshape(-1)
    low, high = np.quantile(np.concatenate([centered, changes]), [0.001, 0.999])
    edges = np.linspace(low, high, bins + 1)
    for values, color, label in ((centered, TRUTH, "marginal"), (changes, ESTIMATE, "change")):
        ax.stairs(
            np.histogram(values, edges, density=True)[0], edges, color=color, lw=1.5, label=label
        )
    ax.set(xlabel="Hamiltonian - mean", ylabel="density")
    ax.legend(frameon=False)
    return ax


def plot_images(
    images: Tensor | np.ndarray,
    shape: tuple[int, int],
    columns: int | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Images side by side on a grid: data, samples, receptive fields, completions.

    Args:
        images: shape ``(n, pixels)``.
        shape: height and width of one, in pixels.
        columns: images of one row; None makes the grid about square.
        limits: values that are black and white; None scales each image by its own largest absolute
            value, 0 in the middle, as receptive fields want it.
        ax: axes to draw on.

    Raises:
        ValueError: if ``images`` has other than height times width pixels.

    Example:
        >>> plot_images(torch.rand(10, 6), (2, 3)).get_title()
        ''
    """
    ax, rows = _axes(ax), _array(images)
    height, width = shape
    if rows.ndim != 2 or rows.shape[1] != height * width or not len(rows):
        raise ValueError(
            f"images must have shape (n, {height * width}) for shape={shape}, got {rows.shape}"
        )
    columns = int(np.ceil(np.sqrt(len(rows)))) if columns is None else columns
    if limits is None:
        largest = np.abs(rows).max(1, keepdims=True)
        rows, limits = rows / np.where(largest > 0.0, largest, 1.0), (-1.0, 1.0)
    lines = -(-len(rows) // columns)
    canvas = np.full((lines * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for k, image in enumerate(rows):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image.reshape(height, width)
    ax.set_facecolor("lightsteelblue")  # what shows between the images
    ax.imshow(canvas, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
