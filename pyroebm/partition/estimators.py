"""Estimates of log Z by tempered SMC and by thermodynamic integration with parallel tempering."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.progress import Progress
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.energies.layered import LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.kernels import Kernel, ParallelTempering
from pyroebm.kernels.adaptation import warmup
from pyroebm.kernels.base import check_kernel
from pyroebm.partition.annealing import Base
from pyroebm.partition.bases import base_energy
from pyroebm.partition.kernel_path import default_kernel
from pyroebm.partition.result import LogZ
from pyroebm.smc import SMCResult, tempered_smc

__all__ = ["smc", "thermodynamic_integration"]


def smc(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    num_particles: int = 1024,
    num_islands: int = 8,
    pilot: SMCResult | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    """Estimate log Z by tempered SMC, with adaptive temperatures.

    The result of :func:`pyroebm.smc.tempered_smc` as a :class:`LogZ`. A machine with layers is
    sampled over all its units by :class:`LayerGibbs`, unless a kernel or another base is given.

    Args:
        energy: a discrete or continuous energy.
        base: as for :func:`pyroebm.partition.ais`.
        kernel: transition of the particles; None uses block Gibbs for layers, Gibbs for other
            discrete energies, and HMC for continuous ones.
        num_particles: as for :func:`pyroebm.smc.tempered_smc`.
        num_islands: as for :func:`pyroebm.smc.tempered_smc`.
        pilot: as for :func:`pyroebm.smc.tempered_smc`.
        generator: as for :func:`pyroebm.smc.tempered_smc`.
        progress: as for :func:`pyroebm.smc.tempered_smc`.

    Returns:
        an estimate of kind "lower" with the temperatures of a ``pilot``, or "estimate" if they were
        adapted.

    Raises:
        ValueError: as :func:`pyroebm.smc.tempered_smc`.
        FloatingPointError: as :func:`pyroebm.smc.tempered_smc`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> result = smc(BernoulliRBM(3, 2, weight=torch.zeros(3, 2)), num_particles=16)
        >>> round(result.value, 4), result.kind  # 5 log 2
        (3.4657, 'estimate')
    """
    energy, reference, moving = _sampled(energy, base, kernel)
    with torch.no_grad():
        found = tempered_smc(
            energy,
            reference,
            moving,
            num_particles,
            num_islands=num_islands,
            pilot=pilot,
            generator=generator,
            progress=progress,
        )
    ess = float((2 * found.log_weights.logsumexp(0) - (2 * found.log_weights).logsumexp(0)).exp())
    return LogZ(
        *found.log_z,
        f"SMC, {len(found.betas)} temperatures",
        ess,
        found.log_weights,
    )


def thermodynamic_integration(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    num_temperatures: int = 16,
    num_samples: int = 500,
    warmup_steps: int = 250,
    num_chains: int = 32,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    r"""Estimate log Z by thermodynamic integration, with :class:`pyroebm.ParallelTempering`.

    .. math::

        \log \frac{Z}{Z_0} = -\int_0^1 m(\beta)\, d\beta
        \approx -\sum_k \Bigl[\frac{h_k}{2} (m_k + m_{k+1}) + \frac{h_k^2}{12} (v_{k+1} - v_k)\Bigr]
    with mean :math:`m_k` and variance :math:`v_k` of :math:`E - E_0` at :math:`\beta_k`, and
    :math:`h_k = \beta_{k+1} - \beta_k` (Kirkwood, 1935; Gelman and Meng, 1998). It is the
    trapezoidal rule with its first correction, because :math:`m' = -v` (Friel, Hurn and Wyse,
    2014). Warm-up chooses temperatures of equal swap rates.

    Args:
        energy: as for :func:`smc`.
        base: as for :func:`smc`.
        kernel: as for :func:`smc`.
        num_temperatures: number of temperatures of each chain, including 0 and 1.
        num_samples: number of steps over which :math:`E - E_0` is averaged.
        warmup_steps: number of warm-up steps.
        num_chains: number of independent copies, at least 2 for a standard error.
        generator: source of randomness; None is torch's default generator.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second.

    Returns:
        an estimate of kind "estimate". The standard error is from the spread of the chains. It does
        not include the error of the rule, which decreases with more temperatures.

    Raises:
        ValueError: if an argument is out of its range, or the base does not fit.
        FloatingPointError: if a mean energy is not finite.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import exact
        >>> rbm = BernoulliRBM(3, 2, weight=torch.full((3, 2), 2.0))
        >>> result = thermodynamic_integration(
        ...     rbm, num_temperatures=8, num_samples=200, warmup_steps=100
        ... )
        >>> abs(result.value - exact(rbm).value) < 5 * result.standard_error
        True
    """
    least = {"num_temperatures": 2, "num_samples": 2, "warmup_steps": 0, "num_chains": 1}
    check_counts(least, num_temperatures, num_samples, warmup_steps, num_chains)
    energy, reference, moving = _sampled(energy, base, kernel)
    tempering = ParallelTempering(
        moving, torch.linspace(1.0, 0.0, num_temperatures, dtype=torch.float64), reference
    )
    target = unconstrain(energy)
    slopes = []
    with (
        eval_mode(energy),
        torch.no_grad(),
        Progress(warmup_steps + num_samples, "tempering", show=progress) as shown,
    ):
        state = tempering.init(target, target.initial(num_chains, generator), generator)
        warm, state = warmup(
            tempering, target, state, warmup_steps, generator=generator, after_step=shown.update
        )
        tempering = cast(ParallelTempering, warm)
        for _ in range(num_samples):
            before = state.slopes
            state, _ = tempering.step(target, state, generator)
            slopes.append(state.slopes - before)
            shown.update()
    each = _integral(torch.stack(slopes), tempering.betas.to(energy.device))
    if not bool(torch.isfinite(each).all()):
        raise FloatingPointError(
            f"the mean of E - E_0 is not finite in {int((~torch.isfinite(each)).sum())} of"
            f" {num_chains} chains, because the base draws states at which the energy is infinite;"
            " use another base"
        )
    error = float(each.std()) / math.sqrt(num_chains) if num_chains > 1 else math.nan
    value = float(reference.log_z or 0.0) + float(each.mean())
    return LogZ(
        value, error, "estimate", f"thermodynamic integration, {num_temperatures} temperatures"
    )


def _integral(slopes: Tensor, betas: Tensor) -> Tensor:
    """Integrate slopes ``(steps, chains, R)`` over falling temperatures ``(R,)``.

    Returns:
        log Z of each chain relative to the base.
    """
    mean = slopes.mean(0)
    variance = (slopes - slopes.mean((0, 1))).square().mean(0)
    step = -betas.diff()
    trapezoid = 0.5 * step * (mean[:, 1:] + mean[:, :-1])
    return -(trapezoid + step.square() / 12.0 * (variance[:, :-1] - variance[:, 1:])).sum(1)


def _sampled(
    energy: Energy, base: Base, kernel: Kernel[Any] | None
) -> tuple[Energy, Energy, Kernel[Any]]:
    """Return the energy to sample, the base and the kernel.

    A machine with layers is sampled over all units, with the same log Z.
    """
    check_energy(energy)
    if (
        isinstance(energy, LayeredMachine)
        and kernel is None
        and (base is None or isinstance(base, Layers))
    ):
        energy = energy.joint()
    kernel = default_kernel(energy) if kernel is None else kernel
    check_kernel(kernel)
    return energy, base_energy(energy, base), kernel
