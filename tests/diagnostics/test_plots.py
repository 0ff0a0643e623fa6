"""Figures take Axes and return them, and show the numbers they were given."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyroebm.diagnostics import plots, to_arviz
from pyroebm.targets import DoubleWell

DRAWS = torch.randn(5, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLOTS = {
    "potential": lambda ax: plots.plot_potential(DoubleWell(), DRAWS, 5.03, ax=ax),
    "masses": lambda ax: plots.plot_mode_masses(
        {"a": (0.1, 0.02), "b": (0.0, math.nan)}, 0.12, ax=ax
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_on_the_axes_it_is_given_and_returns_them(name: str) -> None:
    ax = plt.subplots()[1]
    assert PLOTS[name](ax) is ax
    assert ax.has_data()
    assert PLOTS[name](None) is not ax


def test_the_potential_from_exact_draws_is_the_true_one_with_gaps_where_nothing_is_known() -> None:
    energy = DoubleWell().double()
    x = energy.sample(400_000, torch.Generator().manual_seed(0))
    ax = plots.plot_potential(energy, x, energy.log_z, limits=(-1.9, -1.0), bins=20)
    line = ax.get_lines()[1]
    at, estimate = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    inside = ((x > -1.9) & (x < -1.0)).sum().item() / len(x)
    # the histogram is of draws within the limits, divided by all of them: no renormalisation hides
    # a missing mode
    width = 0.9 / 20
    counts = np.exp(-(energy(torch.as_tensor(at)).numpy() + energy.log_z)) * width * len(x)
    assert np.all(
        np.abs(estimate - energy(torch.as_tensor(at)).numpy()) < 5 / np.sqrt(counts) + 0.01
    )
    assert 0.5 < inside < 1
    gaps = (
        plots.plot_potential(energy, torch.tensor([-1.0, 1.0]), 0.0, bins=10)
        .get_lines()[1]
        .get_ydata()
    )
    assert np.isnan(np.asarray(gaps)).sum() == 8


def test_weights_move_the_estimate() -> None:
    x = torch.tensor([0.0] * 50 + [1.0] * 50)
    log_weights = torch.where(x == 0, math.log(3.0), 0.0)
    line = plots.plot_potential(lambda x: x, x, 0.0, log_weights, bins=2).get_lines()[1]
    left, right = np.asarray(line.get_ydata())
    assert math.isclose(right - left, math.log(3.0), rel_tol=1e-6)


def test_traces_ranks_and_energies_are_figures_of_arviz() -> None:
    data = to_arviz({"x": DRAWS}, {"energy": DRAWS})
    for name in ("plot_trace", "plot_rank", "plot_energy"):
        figure = plots.arviz_figure(name, data)
        assert any(ax.has_data() for ax in figure.axes)
        plt.close(figure)
    for name in ("trace", "plot_nothing"):
        with pytest.raises(ValueError, match=f"name must be a plot of ArviZ, .* got name='{name}'"):
            plots.arviz_figure(name, data)
