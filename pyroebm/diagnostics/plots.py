"""Figures in matplotlib.

Traces, ranks and energies are ArviZ's (:func:`arviz_figure`). The other functions take Axes (or
create them) and return them; draws are tensors or arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyroebm.core.statistics import arviz, is_new_arviz

__all__ = [
    "arviz_figure",
    "plot_images",
    "plot_mode_masses",
    "plot_potential",
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
    r"""Plot a potential of one variable and its estimate from draws.

    The estimate is :math:`\hat U(x) = -\log \hat p(x) - \log Z`.

    Args:
        energy: the potential U of a scalar variable.
        draws: draws, any shape.
        log_z: :math:`\log Z`, known or estimated, in nats.
        log_weights: log importance weights, shape of ``draws``; None for equal weights.
        limits: range of x; None uses that of the draws.
        bins: number of bins of the histogram :math:`\hat p`; an empty one leaves a gap.
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
    """Plot the mass of one mode by each method, with two standard errors, and the true mass.

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


def arviz_figure(name: str, data: Any, **options: Any) -> Figure:
    """Make one of ArviZ's plots with matplotlib, with any version of ArviZ.

    Args:
        name: such as "plot_trace", "plot_rank" or "plot_energy".
        data: draws and statistics, the result of :func:`pyroebm.diagnostics.to_arviz` or
            :meth:`pyroebm.MCMC.to_arviz`.
        **options: passed to ArviZ.

    Raises:
        ValueError: if ArviZ has no plot of that name.

    Example:
        >>> from pyroebm.diagnostics import to_arviz
        >>> x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        >>> len(arviz_figure("plot_rank", to_arviz({"x": x})).axes) > 0
        True
    """
    plot = getattr(arviz(), name, None) if name.startswith("plot_") else None
    if plot is None:
        raise ValueError(
            'name must be a plot of ArviZ, such as "plot_trace", "plot_rank" or "plot_energy", got'
            f" name={name!r}"
        )
    with warnings.catch_warnings():  # ArviZ 0.23 uses deprecated functions of matplotlib
        warnings.simplefilter("ignore", DeprecationWarning)
        made = plot(data, backend="matplotlib", **options)
    figure: Figure = made.viz["figure"].item() if is_new_arviz() else np.ravel(made)[0].figure
    return figure


def plot_images(
    images: Tensor | np.ndarray,
    shape: tuple[int, int],
    columns: int | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Plot images on a grid: data, samples, receptive fields, imputations.

    Args:
        images: shape ``(n, pixels)``.
        shape: height and width of one image, in pixels.
        columns: number of images in a row; None makes the grid approximately square.
        limits: values of black and white; None scales each image by its own largest absolute value,
            with 0 in the middle, for receptive fields.
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
    ax.set_facecolor("lightsteelblue")  # the lines between the images
    ax.imshow(canvas, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
