"""Warm-up: step sizes by dual averaging, metrics in windows, and the choice of starting states."""

from pyroebm.kernels.adaptation.starts import draw_starts
from pyroebm.kernels.adaptation.step_size import DualAveraging, find_step_size
from pyroebm.kernels.adaptation.windows import Adaptation, WindowAdaptation, warmup

__all__ = [
    "Adaptation",
    "DualAveraging",
    "WindowAdaptation",
    "draw_starts",
    "find_step_size",
    "warmup",
]
