"""Conversion of draws and data to ArviZ's containers, and its summary table."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyroebm.core.statistics import arviz, as_array, is_new_arviz

__all__ = ["from_datasets", "summary", "to_arviz"]

#: Groups of ArviZ's schema that have data, without chains and draws.
DATA_GROUPS = ("observed_data", "constant_data")
#: Groups that :func:`to_arviz` takes beside the posterior and its statistics.
GROUPS = (
    *("warmup_posterior", "warmup_sample_stats", "log_likelihood", "posterior_predictive"),
    *("prior", "prior_predictive", *DATA_GROUPS),
)

#: Names of the entries of each dimension of variables, and labels of these entries.
Dims = Mapping[str, Sequence[str | None]]
Coords = Mapping[str, Sequence[Any] | np.ndarray]


def to_arviz(
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, Tensor] | None = None,
    *,
    dims: Dims | None = None,
    coords: Coords | None = None,
    attrs: Mapping[str, Any] | None = None,
    **groups: Mapping[str, Tensor] | None,
) -> Any:
    """Convert draws and statistics to ArviZ's InferenceData (0.x) or DataTree (1.0 on).

    Args:
        posterior: draws of each site, shape ``(chains, draws, *event)``.
        sample_stats: statistics, shape ``(chains, draws)``.
        dims: names of the dimensions of the event of variables, in any group. None or a missing
            name is ``NAME_dim_K``. A pointwise log-likelihood has those of its site that remain.
        coords: labels along the named dimensions; a dimension without labels has 0, 1, 2, ....
        attrs: attributes of the run, strings and numbers.
        **groups: other groups of ArviZ's schema. ``warmup_posterior``, ``warmup_sample_stats``,
            ``log_likelihood``, ``posterior_predictive``, ``prior`` and ``prior_predictive`` have
            shape ``(chains, draws, *event)``; ``observed_data`` and ``constant_data`` have any.

    Raises:
        ValueError: if a group is unknown; if ``dims`` or ``coords`` name something that is in no
            group, or do not fit the shapes; if a variable has the name of a dimension.

    Example:
        >>> import torch
        >>> data = to_arviz({"x": torch.zeros(2, 10, 3)}, dims={"x": ["city"]})
        >>> data.posterior["x"].dims, data.posterior["x"].shape
        (('chain', 'draw', 'city'), (2, 10, 3))
    """
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise ValueError(f"groups must be of {list(GROUPS)}, got {unknown}")
    given = {
        name: group
        for name, group in {"posterior": posterior, "sample_stats": sample_stats, **groups}.items()
        if group
    }
    dims, coords = dims or {}, coords or {}
    variables = {name for group in given.values() for name in group}
    if unknown := sorted(set(dims) - variables):
        raise ValueError(f"dims must name variables of {sorted(variables)}, got {unknown}")
    datasets = {name: _dataset(name, group, dims, coords) for name, group in given.items()}
    found = {str(dim) for dataset in datasets.values() for dim in dataset.dims}
    if unknown := sorted(set(coords) - found):
        raise ValueError(f"coords must name dimensions of {sorted(found)}, got {unknown}")
    return from_datasets(datasets, attrs or {})


def _dataset(group: str, variables: Mapping[str, Tensor], dims: Dims, coords: Coords) -> Any:
    """Return an xarray Dataset of a group."""
    xarray = importlib.import_module("xarray")
    leading = [] if group in DATA_GROUPS else ["chain", "draw"]
    arrays, sizes = {}, dict[str, int]()
    for name, value in variables.items():
        array = as_array(value, name) if leading else np.asarray(value.detach().cpu())
        event = array.shape[len(leading) :]
        named = [*dims.get(name, ())]
        if len(named) > len(event) and group != "log_likelihood":
            raise ValueError(
                f"dims[{name!r}] must have at most {len(event)} names, one for each dimension of"
                f" the event of {name!r} in {group}, whose shape is {tuple(event)}, got {named}"
            )
        named += [None] * (len(event) - len(named))
        own = [dim or f"{name}_dim_{k}" for k, dim in enumerate(named[: len(event)])]
        for dim, size in zip([*leading, *own], array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"dimension {dim!r} must have one size in {group}, got {sizes[dim]} and, in"
                    f" {name!r}, {size}: give another name in dims"
                )
        arrays[name] = ([*leading, *own], array)
    if clash := sorted(set(sizes) & set(arrays)):
        raise ValueError(
            f"a variable must not have the name of a dimension, got {clash} in {group}: rename the"
            " site"
        )
    for dim, size in sizes.items():
        if dim in coords and len(coords[dim]) != size:
            raise ValueError(
                f"coords[{dim!r}] must have {size} labels for {group}, got {len(coords[dim])}"
            )
    labels = {dim: np.asarray(coords.get(dim, np.arange(size))) for dim, size in sizes.items()}
    return xarray.Dataset(arrays, coords=labels)


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
