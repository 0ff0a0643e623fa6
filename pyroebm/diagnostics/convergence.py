"""Whether chains mixed: masses of modes with their errors, and a diagnosis of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.statistics import bfmi, ess_bulk, ess_tail, mcse_mean, r_hat
from pyroebm.diagnostics.stuck import describe_stuck, stuck_chains

__all__ = ["mode_masses", "Diagnosis", "diagnose"]


def mode_masses(modes: Tensor, num_modes: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of draws in each mode, with standard errors that know of autocorrelation.

    Args:
        modes: index of the mode of each draw, integers of shape ``(chains, draws)``.
        num_modes: number of modes known; one without a draw has mass 0 and standard error NaN, for
            nothing was measured.

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
class Diagnosis:
    """Whether a run can be trusted, and why not.

    Args:
        mixed: True if nothing was found wrong.
        r_hat, ess_bulk, ess_tail: the worst over all entries.
        min_bfmi: the worst over chains; NaN where no Hamiltonian was kept.
        divergences: number of diverging draws.
        problems: a sentence for each thing that is wrong, with what to try.
        stein_z: how far the draws are from fitting the gradient of the energy, in standard errors;
            NaN where nobody looked.

    Example:
        >>> print(Diagnosis(True, 1.001, 5000.0, 4000.0, 0.9, 0, ()))
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
        facts = (
            f"R-hat {self.r_hat:.3f}, bulk ESS {self.ess_bulk:.0f}, tail ESS {self.ess_tail:.0f}, "
            + (f"{self.divergences} divergences" if self.divergences else "no divergences")
        )
        return (
            f"Mixed: {facts}." if self.mixed else f"Not mixed: {facts}. " + " ".join(self.problems)
        )


class KernelFacts(Protocol):
    """What a diagnosis asks of a kernel."""

    @property
    def exact(self) -> bool: ...
    @property
    def has_momentum(self) -> bool: ...


def diagnose(
    draws: Tensor,
    stats: Mapping[str, Tensor],
    max_r_hat: float = 1.01,
    min_ess: float = 400.0,
    kernel: KernelFacts | None = None,
    stein_z: float = float("nan"),
) -> Diagnosis:
    r"""Judge a run by R-hat, effective sample size, BFMI and divergences (thresholds of Vehtari et
    al., 2021, and Stan).

    Agreement between chains is all that this can see: a mode that no chain has visited leaves no
    trace in it.

    Args:
        draws: shape ``(chains, draws, *event)``.
        stats: ``energy`` and ``diverging`` of shape ``(chains, draws)``, as :class:`pyroebm.MCMC`
            keeps them.
        max_r_hat: worst :math:`\hat R` to accept.
        min_ess: least bulk and tail effective sample size to accept.
        kernel: what made the draws: whether it is exact (agreement of chains cannot see a bias that
            all share) and whether its ``energy`` is a Hamiltonian; None is an exact kernel with
            momenta.
        stein_z: what :func:`pyroebm.diagnostics.stein_z` found; above 5 is too much.

    Example:
        >>> x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> diagnose(x, {"diverging": torch.zeros(4, 500, dtype=torch.bool)}).mixed
        True
    """
    chains, count = draws.shape[:2]
    problems = []
    moves = (draws[:, 1:] != draws[:, :-1]).unsqueeze(2).flatten(2).any(2).sum(1)
    if stuck := stuck_chains(moves, count - 1):
        problems.append(
            describe_stuck(stuck, chains, -stats["lp"][:, -1] if "lp" in stats else None)
        )
    worst_r_hat = float(np.max(r_hat(draws)))
    bulk = float(np.min(ess_bulk(draws)))
    tail = float(np.min(ess_tail(draws)))
    if chains < 2:
        problems.append("One chain alone cannot show that it mixed; run at least 4.")
    elif not np.isfinite(worst_r_hat):
        problems.append("R-hat is not defined: too few draws, or an entry that never moved.")
    elif not worst_r_hat < max_r_hat:
        problems.append(
            f"R-hat should be below {max_r_hat}: the chains disagree; draw more, or temper between"
            " modes."
        )
    if not (bulk >= min_ess and tail >= min_ess):
        problems.append(f"The effective sample size should be at least {min_ess:.0f}; draw more.")
    diverging = int(stats["diverging"].sum())
    free = torch.ones(chains, dtype=torch.bool, device=draws.device)
    free[stuck] = False
    if among := int(stats["diverging"][free.to(stats["diverging"].device)].sum()):
        problems.append(
            f"{among} of {chains * count} draws diverged: lower the step size, or reparametrise."
        )
    if (
        "acceptance_rate" in stats
        and (rate := float(stats["acceptance_rate"].double().mean())) < 0.2
    ):
        way_out = "the step size is too large; lower it, or warm up longer"
        if "step_size" not in stats:
            way_out = (
                "the kernel hardly moves, and has no step size to lower; take another one,"
                " or temper"
            )
        problems.append(f"The mean acceptance rate is {rate:.2g}: {way_out}.")
    if kernel is not None and not kernel.exact:
        problems.append(
            "The kernel is not exact: its bias grows with its step size, and no agreement between"
            " chains shows it."
        )
    has_momentum = (kernel is None or kernel.has_momentum) and "energy" in stats
    least_bfmi = float(np.min(bfmi(stats["energy"]))) if has_momentum else float("nan")
    if least_bfmi < 0.3:
        problems.append(
            f"BFMI {least_bfmi:.2f} is below 0.3: momenta explore the energies slowly;"
            " reparametrise heavy tails."
        )
    if stein_z > 5.0:
        problems.append(
            f"The Stein residual is {stein_z:.1f} standard errors: the draws do not fit the"
            " gradient of the energy (a bias of the"
            " kernel, chains that have not settled, or an energy that jumps); lower the step size,"
            " take an exact kernel, or warm"
            " up longer."
        )
    return Diagnosis(
        not problems, worst_r_hat, bulk, tail, least_bfmi, diverging, tuple(problems), stein_z
    )
