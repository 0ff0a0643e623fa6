"""Conversion of draws to ArviZ's containers, and its summary table."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyroebm.core.statistics import arviz, as_array, is_new_arviz

__all__ = ["to_arviz", "from_datasets", "summary"]


def to_arviz(
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, Tensor] | None = None,
    *,
    warmup_posterior: Mapping[str, Tensor] | None = None,
    warmup_sample_stats: Mapping[str, Tensor] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Convert draws and statistics to ArviZ's InferenceData (0.x) or DataTree (1.0 on).

    Args:
        posterior: draws of each site, shape ``(chains, draws, *event)``.
        sample_stats: statistics, shape ``(chains, draws)``.
        warmup_posterior: draws of the warm-up.
        warmup_sample_stats: statistics of the warm-up.
        attrs: attributes of the run, strings and numbers.

    Example:
        >>> import torch
        >>> data = to_arviz({"x": torch.zeros(2, 10, 3)}, {"lp": torch.zeros(2, 10)})
        >>> data.posterior["x"].shape, data.sample_stats["lp"].shape
        ((2, 10, 3), (2, 10))
    """
    groups = {
        "posterior": posterior,
        "sample_stats": sample_stats,
        "warmup_posterior": warmup_posterior,
        "warmup_sample_stats": warmup_sample_stats,
    }
    arrays = {
        name: {k: as_array(v, k) for k, v in group.items()}
        for name, group in groups.items()
        if group
    }
    with warnings.catch_warnings():  # many short chains are intended
        warnings.filterwarnings(
            "ignore", message="More chains|Found chain dimension", category=UserWarning
        )
        build = arviz().from_dict
        data = (
            build(arrays, save_warmup=True) if is_new_arviz() else build(**arrays, save_warmup=True)
        )
    data.attrs.update({"inference_library": "pyroebm", **(attrs or {})})
    return data


def from_datasets(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """Build the structure of :func:`to_arviz` from xarray Datasets, by name of the group."""
    data = (
        importlib.import_module("xarray").DataTree.from_dict(groups)
        if is_new_arviz()
        else arviz().InferenceData(**groups)
    )
    data.attrs.update({"inference_library": "pyroebm", **attrs})
    return data


def summary(data: Any, **options: Any) -> Any:
    """Return ArviZ's summary table of the result of :func:`to_arviz`.

    An entry that never moved has R-hat NaN, without a warning.

    Args:
        data: result of :func:`to_arviz`.
        **options: passed to ``arviz.summary``.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> len(summary(to_arviz({"x": x})))
        3
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return arviz().summary(data, **options)
