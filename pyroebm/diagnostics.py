"""What the draws say: ArviZ's statistics, its data structure, masses of modes, and a verdict in plain words."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyroebm.stuck import describe_stuck, stuck_chains

__all__ = [
    "arviz",
    "r_hat",
    "ess_bulk",
    "ess_tail",
    "mcse_mean",
    "bfmi",
    "summary",
    "to_arviz",
    "from_datasets",
    "mode_masses",
    "pareto_k",
    "Verdict",
    "verdict",
]


@functools.cache
def arviz() -> Any:
    """ArviZ, imported on first use (it takes seconds) without the announcement that its 0.23 line prints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        return importlib.import_module("arviz")


def _is_new_line() -> bool:
    return int(arviz().__version__.split(".")[0]) >= 1


def _array(draws: Tensor | np.ndarray, name: str = "draws") -> np.ndarray:
    array = draws.detach().cpu().numpy() if isinstance(draws, Tensor) else np.asarray(draws)
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (chains, draws, *event), got shape {array.shape}")
    return array


def _statistic(name: str, draws: Tensor | np.ndarray, **options: Any) -> np.ndarray:
    array = _array(draws)
    if np.issubdtype(array.dtype, np.bool_):
        array = array.astype(np.float64)
    compute = getattr(arviz(), name)
    flat = array.reshape(*array.shape[:2], -1)
    with warnings.catch_warnings():  # a constant entry has no R-hat: NaN says so, NumPy's division warning adds nothing
        warnings.simplefilter("ignore", RuntimeWarning)
        # `item`: beside numba, ArviZ 0.23 returns some of its numbers in an array of shape (1,)
        values = [np.asarray(compute(np.ascontiguousarray(flat[..., k]), **options)).item() for k in range(flat.shape[-1])]
    return np.asarray(values).reshape(array.shape[2:])


def r_hat(draws: Tensor | np.ndarray) -> np.ndarray:
    r"""Rank-normalised split :math:`\hat R` (Vehtari et al., 2021), by ArviZ.

    Args:
        draws: shape ``(chains, draws, *event)``, at least two chains and four draws.

    Returns:
        one value for each entry of an event, shape ``event``; near 1 is good, above 1.01 is not.

    Example:
        >>> bool(r_hat(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) < 1.01)
        True
    """
    return _statistic("rhat", draws)


def ess_bulk(draws: Tensor | np.ndarray) -> np.ndarray:
    """Bulk effective sample size (Vehtari et al., 2021), by ArviZ; arguments and shape as :func:`r_hat`.

    Example:
        >>> bool(ess_bulk(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) > 1500)
        True
    """
    return _statistic("ess", draws, method="bulk")


def ess_tail(draws: Tensor | np.ndarray) -> np.ndarray:
    """Tail effective sample size (Vehtari et al., 2021), by ArviZ; arguments and shape as :func:`r_hat`.

    Example:
        >>> bool(ess_tail(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) > 1000)
        True
    """
    return _statistic("ess", draws, method="tail", prob=(0.05, 0.95))


def mcse_mean(draws: Tensor | np.ndarray) -> np.ndarray:
    """Monte Carlo standard error of the mean (Vehtari et al., 2021), by ArviZ; arguments and shape as :func:`r_hat`.

    Example:
        >>> bool(mcse_mean(torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))) < 0.02)
        True
    """
    return _statistic("mcse", draws, method="mean")


def bfmi(energy: Tensor | np.ndarray) -> np.ndarray:
    """Bayesian fraction of missing information (Betancourt, 2016) of each chain, by ArviZ, from Hamiltonians ``(chains, draws)``.

    Example:
        >>> bfmi(torch.randn(2, 500, generator=torch.Generator().manual_seed(0))).shape
        (2,)
    """
    array = _array(energy, "energy")
    return np.asarray(arviz().bfmi(array))


def pareto_k(log_weights: Tensor | np.ndarray) -> float:
    """Shape of the tail of importance weights (Vehtari, Simpson, Gelman, Yao and Gabry, 2024), by ArviZ's PSIS.

    Args:
        log_weights: log weights, shape ``(n,)``.

    Returns:
        k; above 0.7 the estimates cannot be trusted. ``inf`` where fewer than five weights make the tail, ``-inf`` where all
        weights are equal and there is none.

    Example:
        >>> pareto_k(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1) < 0.5
        True
    """
    logs = np.array(log_weights.detach().cpu().numpy() if isinstance(log_weights, Tensor) else log_weights, dtype=np.float64)
    if np.ptp(logs) < 1e-12:
        return -np.inf
    with np.errstate(over="ignore", invalid="ignore"):  # the tail's fit compares likelihoods further apart than float64 holds
        try:
            if _is_new_line():  # it takes the negative of the log weights
                data_array = importlib.import_module("xarray").DataArray
                k = float(data_array(-logs, dims="sample").azstats.psislw(dim="sample")[1])
            else:
                k = float(arviz().psislw(logs)[1])
        except (IndexError, ValueError):  # ArviZ 1.x, where there is no tail to fit
            return np.inf
    return np.inf if np.isnan(k) else k


def to_arviz(
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, Tensor] | None = None,
    warmup_posterior: Mapping[str, Tensor] | None = None,
    warmup_sample_stats: Mapping[str, Tensor] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Draws and statistics in ArviZ's own structure: InferenceData on its 0.x line, DataTree from 1.0 on.

    Args:
        posterior: draws of each site, shape ``(chains, draws, *event)``.
        sample_stats: statistics, shape ``(chains, draws)``.
        warmup_posterior, warmup_sample_stats: the same for the warm-up.
        attrs: facts of the run, strings and numbers.

    Example:
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
    arrays = {name: {k: _array(v, k) for k, v in group.items()} for name, group in groups.items() if group}
    with warnings.catch_warnings():  # many short chains are what this library is for
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension", category=UserWarning)
        build = arviz().from_dict
        data = build(arrays, save_warmup=True) if _is_new_line() else build(**arrays, save_warmup=True)
    data.attrs.update({"inference_library": "pyroebm", **(attrs or {})})
    return data


def from_datasets(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """ArviZ's structure as :func:`to_arviz` gives it, of xarray Datasets by the name of their group."""
    data = importlib.import_module("xarray").DataTree.from_dict(groups) if _is_new_line() else arviz().InferenceData(**groups)
    data.attrs.update({"inference_library": "pyroebm", **attrs})
    return data


def summary(data: Any, **options: Any) -> Any:
    """ArviZ's summary table of what :func:`to_arviz` gives; an entry that never moved has R-hat NaN, without a warning.

    Example:
        >>> len(summary(to_arviz({"x": torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0))})))
        3
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return arviz().summary(data, **options)


def mode_masses(modes: Tensor, num_modes: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of draws in each mode, with standard errors that know of autocorrelation.

    Args:
        modes: index of the mode of each draw, integers of shape ``(chains, draws)``.
        num_modes: number of modes known; one without a draw has mass 0 and standard error NaN, for nothing was measured.

    Returns:
        masses and standard errors, both ``(num_modes,)``.

    Example:
        >>> mode_masses(torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]]), 3)[0]
        array([0.5, 0.5, 0. ])
    """
    inside = torch.nn.functional.one_hot(modes.long(), num_modes).double()
    masses = inside.mean((0, 1)).cpu().numpy()
    errors = mcse_mean(inside)
    errors[(masses == 0.0) | (masses == 1.0)] = np.nan
    return masses, errors


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a run can be trusted, and why not.

    Args:
        mixed: True if nothing was found wrong.
        r_hat, ess_bulk, ess_tail: the worst over all entries.
        min_bfmi: the worst over chains; NaN where no Hamiltonian was kept.
        divergences: number of diverging draws.
        problems: a sentence for each thing that is wrong, with what to try.
        stein_z: how far the draws are from fitting the gradient of the energy, in standard errors; NaN where nobody looked.

    Example:
        >>> print(Verdict(True, 1.001, 5000.0, 4000.0, 0.9, 0, ()))
        Mixed: R-hat 1.001, bulk ESS 5000, tail ESS 4000, no divergences.
    """

    mixed: bool
    r_hat: float
    ess_bulk: float
    ess_tail: float
    min_bfmi: float
    divergences: int
    problems: tuple[str, ...]
    stein_z: float = float("nan")

    def __str__(self) -> str:
        facts = f"R-hat {self.r_hat:.3f}, bulk ESS {self.ess_bulk:.0f}, tail ESS {self.ess_tail:.0f}, " + (
            f"{self.divergences} divergences" if self.divergences else "no divergences"
        )
        return f"Mixed: {facts}." if self.mixed else f"Not mixed: {facts}. " + " ".join(self.problems)


class KernelFacts(Protocol):
    """What a verdict asks of a kernel."""

    @property
    def exact(self) -> bool: ...
    @property
    def has_momentum(self) -> bool: ...


def verdict(
    draws: Tensor,
    stats: Mapping[str, Tensor],
    max_r_hat: float = 1.01,
    min_ess: float = 400.0,
    kernel: KernelFacts | None = None,
    stein_z: float = float("nan"),
) -> Verdict:
    r"""Judge a run by R-hat, effective sample size, BFMI and divergences (thresholds of Vehtari et al., 2021, and Stan).

    Agreement between chains is all that this can see: a mode that no chain has visited leaves no trace in it.

    Args:
        draws: shape ``(chains, draws, *event)``.
        stats: ``energy`` and ``diverging`` of shape ``(chains, draws)``, as :class:`pyroebm.MCMC` keeps them.
        max_r_hat: worst :math:`\hat R` to accept.
        min_ess: least bulk and tail effective sample size to accept.
        kernel: what made the draws: whether it is exact (agreement of chains cannot see a bias that all share) and whether its
            ``energy`` is a Hamiltonian; None is an exact kernel with momenta.
        stein_z: what :func:`pyroebm.stein.stein_z` found; above 5 is too much.

    Example:
        >>> x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> verdict(x, {"diverging": torch.zeros(4, 500, dtype=torch.bool)}).mixed
        True
    """
    chains, count = draws.shape[:2]
    problems = []
    moves = (draws[:, 1:] != draws[:, :-1]).unsqueeze(2).flatten(2).any(2).sum(1)
    if stuck := stuck_chains(moves, count - 1):
        problems.append(describe_stuck(stuck, chains, -stats["lp"][:, -1] if "lp" in stats else None))
    worst_r_hat, bulk, tail = (float(np.max(r_hat(draws))), float(np.min(ess_bulk(draws))), float(np.min(ess_tail(draws))))
    if chains < 2:
        problems.append("One chain alone cannot show that it mixed; run at least 4.")
    elif not np.isfinite(worst_r_hat):
        problems.append("R-hat is not defined: too few draws, or an entry that never moved.")
    elif not worst_r_hat < max_r_hat:
        problems.append(f"R-hat should be below {max_r_hat}: the chains disagree; draw more, or temper between modes.")
    if not (bulk >= min_ess and tail >= min_ess):
        problems.append(f"The effective sample size should be at least {min_ess:.0f}; draw more.")
    diverging = int(stats["diverging"].sum())
    free = torch.ones(chains, dtype=torch.bool, device=draws.device)
    free[stuck] = False
    if among := int(stats["diverging"][free.to(stats["diverging"].device)].sum()):
        problems.append(f"{among} of {chains * count} draws diverged: lower the step size, or reparametrise.")
    if "acceptance_rate" in stats and (rate := float(stats["acceptance_rate"].double().mean())) < 0.2:
        way_out = "the step size is too large; lower it, or warm up longer"
        if "step_size" not in stats:
            way_out = "the kernel hardly moves, and has no step size to lower; take another one, or temper"
        problems.append(f"The mean acceptance rate is {rate:.2g}: {way_out}.")
    if kernel is not None and not kernel.exact:
        problems.append("The kernel is not exact: its bias grows with its step size, and no agreement between chains shows it.")
    has_momentum = (kernel is None or kernel.has_momentum) and "energy" in stats
    least_bfmi = float(np.min(bfmi(stats["energy"]))) if has_momentum else float("nan")
    if least_bfmi < 0.3:
        problems.append(f"BFMI {least_bfmi:.2f} is below 0.3: momenta explore the energies slowly; reparametrise heavy tails.")
    if stein_z > 5.0:
        problems.append(
            f"The Stein residual is {stein_z:.1f} standard errors: the draws do not fit the gradient of the energy (a bias of the"
            " kernel, chains that have not settled, or an energy that jumps); lower the step size, take an exact kernel, or warm"
            " up longer."
        )
    return Verdict(not problems, worst_r_hat, bulk, tail, least_bfmi, diverging, tuple(problems), stein_z)
