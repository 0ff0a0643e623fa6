"""Annealed importance sampling: forward, reverse and bidirectional."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_counts
from pyroebm.core.arrays import as_tensor
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.wrappers import eval_mode
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.kernels import Kernel
from pyroebm.kernels.base import check_kernel
from pyroebm.partition.bases import base_energy, base_rates
from pyroebm.partition.bridging import bennett_acceptance_ratio
from pyroebm.partition.kernel_path import (
    KernelPath,
    as_betas,
    default_kernel,
    increments,
    total_weight,
)
from pyroebm.partition.layered import LayeredPath, LayeredState
from pyroebm.partition.result import BidirectionalAIS, LogZ, check_exact_draws, from_weights
from pyroebm.smc import tempered_smc

__all__ = ["Base", "ais", "bidirectional_ais", "reverse_ais", "schedule"]

#: Number of chains and of even steps of the pilot run of :func:`schedule`.
PILOT_CHAINS = 100
PILOT_STEPS = 200

Base = Layers | Energy | Distribution | None


def ais(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    betas: int | Tensor = 1000,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    r"""Estimate log Z by annealed importance sampling (AIS), from a base to the energy.

    .. math::

        \hat Z = \frac{Z_0}{n} \sum_{i=1}^n \prod_{k=0}^{K-1}
        e^{E_{\beta_k}(x_k^i) - E_{\beta_{k+1}}(x_k^i)}, \qquad E_\beta = (1 - \beta) E_0 + \beta E
    with :math:`x_0` drawn from the base, and :math:`x_k` by a transition that leaves
    :math:`e^{-E_{\beta_k}}` invariant (Neal, 2001; Salakhutdinov and Murray, 2008). Z is unbiased,
    so its logarithm is low on average, and a likelihood computed with it is too high on average.

    A machine with layers, without a kernel, is annealed by block Gibbs with half of its layers
    summed out (:class:`pyroebm.partition.LayeredPath`). Otherwise the kernel moves whole events,
    continuous ones in unconstrained coordinates.

    Args:
        energy: E.
        base: :math:`E_0`: the result of :func:`base_rates` for the energy and its data, an energy
            with exact draws and a known ``log_z``, or a Pyro distribution. None is
            ``base_rates(energy)``, which is uniform; real supports have no such default. It must
            cover all modes of the energy: a mode that no chain reaches is missing in log Z, and
            the standard error does not show it.
        kernel: transition of the chains; None uses block Gibbs for layers, ``Gibbs()`` for other
            discrete energies, and ``HMC(num_steps=5)`` for continuous ones, with the step sizes of
            a small SMC run.
        betas: number K of even steps, or a schedule :math:`0 = \beta_0 < \dots < \beta_K = 1`,
            shape ``(K + 1,)``, for example that of :func:`schedule`.
        num_chains: n, number of chains.
        generator: source of randomness; None is torch's default generator.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second.

    Returns:
        an estimate of kind "lower", or "estimate" with a kernel that is not exact.

    Raises:
        ValueError: if an argument is out of its range, or the base does not fit.
        FloatingPointError: if a weight is NaN or +inf, or if all are 0.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> from pyroebm.partition import base_rates, exact
        >>> generator = torch.Generator().manual_seed(0)
        >>> data = (torch.rand(50, 6, generator=generator) < 0.3).float()
        >>> rbm = BernoulliRBM(6, 4, weight=torch.randn(6, 4, generator=generator))
        >>> result = ais(rbm, base_rates(rbm, data), betas=200)
        >>> result.kind, abs(result.value - exact(rbm).value) < 5 * result.standard_error
        ('lower', True)
    """
    steps = _check_arguments(energy, kernel, betas, num_chains)
    with eval_mode(energy), torch.no_grad():
        path = _path(energy, base, kernel, generator, progress)
        if isinstance(path, LayeredPath):
            log_weights = total_weight(
                path, path.draw_base(num_chains, generator), steps, generator, progress
            )
            return from_weights(log_weights, path.log_z, "lower", "AIS")
        log_weights = path.total_weight(
            path.reference.sample(num_chains, generator), steps, generator, progress
        )
        return from_weights(
            log_weights, path.log_z, "lower" if path.kernel.exact else "estimate", "AIS"
        )


def reverse_ais(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    draws: Tensor | np.ndarray | None = None,
    betas: int | Tensor = 1000,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    r"""Estimate log Z by AIS in reverse, from the energy to the base.

    .. math::

        \log \hat Z = \log Z_0
        - \log \frac1n \sum_{i=1}^n \prod_{k=K}^{1} e^{E_{\beta_k}(x_k^i) - E_{\beta_{k-1}}(x_k^i)}
    With :math:`x_K` drawn exactly from the energy the mean weight is unbiased for :math:`Z_0 / Z`,
    so :math:`\log \hat Z` is high on average (Burda, Grosse and Salakhutdinov, 2015; Grosse,
    Ghahramani and Adams, 2015). States of a Markov chain give no bound: if the chain missed a mode,
    so does the weight.

    Args:
        energy: E.
        base: as for :func:`ais`.
        kernel: as for :func:`ais`.
        draws: :math:`x_K`, draws of the energy ``(n, *event)`` from a Markov chain; for an RBM
            visible states ``(n, n_0)`` or those of all units ``(n, n_0 + n_1)``. None draws
            ``num_chains`` exactly, if ``energy.has_exact_draws``.
        betas: as for :func:`ais`, rising from 0 to 1.
        num_chains: as for :func:`ais`.
        generator: as for :func:`ais`.
        progress: as for :func:`ais`.

    Returns:
        an estimate of kind "upper" if ``draws`` is None and the kernel is exact, else "estimate".

    Raises:
        ValueError: as :func:`ais`, and if there are no exact draws or ``draws`` have another shape.
        FloatingPointError: as :func:`ais`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(3, 2, weight=torch.ones(3, 2))
        >>> reverse_ais(rbm).kind, reverse_ais(rbm, draws=rbm.initial(10)).kind
        ('upper', 'estimate')
    """
    steps = _check_arguments(energy, kernel, betas, num_chains)[::-1]
    if draws is None:
        check_exact_draws(energy)
    else:
        draws = as_tensor(draws, energy.dtype, energy.device, "draws")
    with eval_mode(energy), torch.no_grad():
        path = _path(energy, base, kernel, generator, progress)
        if isinstance(path, LayeredPath):
            state, exact = _layered_draws(path, energy, draws, num_chains, generator), True
            log_weights = total_weight(path, state, steps, generator, progress)
        else:
            if draws is not None:
                energy.check_states(draws, "draws")
            x = energy.sample(num_chains, generator) if draws is None else draws
            log_weights, exact = (
                path.total_weight(path.transform.inv(x), steps, generator, progress),
                path.kernel.exact,
            )
    return from_weights(
        log_weights,
        path.log_z,
        "upper" if draws is None and exact else "estimate",
        "reverse AIS",
        -1,
    )


def bidirectional_ais(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    draws: Tensor | np.ndarray | None = None,
    betas: int | Tensor = 1000,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> BidirectionalAIS:
    """Run :func:`ais` and :func:`reverse_ais` with one schedule and combine them.

    The combined estimate is Bennett's acceptance ratio of their weights. The result prints as three
    lines (bidirectional Monte Carlo; Grosse, Ghahramani and Adams, 2015).

    Args:
        energy: as for :func:`reverse_ais`.
        base: as for :func:`reverse_ais`.
        kernel: as for :func:`reverse_ais`.
        draws: as for :func:`reverse_ais`.
        betas: as for :func:`reverse_ais`.
        num_chains: as for :func:`reverse_ais`.
        generator: as for :func:`reverse_ais`.
        progress: as for :func:`reverse_ais`.

    Returns:
        the forward, the reverse and the combined estimate.

    Raises:
        ValueError: as :func:`reverse_ais`.
        FloatingPointError: as :func:`reverse_ais`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> result = bidirectional_ais(BernoulliRBM(3, 2, weight=torch.ones(3, 2)), betas=100)
        >>> result.forward.kind, result.reverse.kind, result.width < 0.1
        ('lower', 'upper', True)
    """
    reverse = reverse_ais(
        energy,
        base,
        kernel,
        draws=draws,
        betas=betas,
        num_chains=num_chains,
        generator=generator,
        progress=progress,
    )
    forward = ais(
        energy,
        base,
        kernel,
        betas=betas,
        num_chains=num_chains,
        generator=generator,
        progress=progress,
    )
    return BidirectionalAIS(forward, reverse, bennett_acceptance_ratio(forward, reverse))


def schedule(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    num_temperatures: int,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Choose temperatures at which the log weights of AIS have increments of equal variance.

    In a short pilot run, the increments of the log weights have a standard deviation
    :math:`s(\beta) \, d\beta` over chains. The schedule divides :math:`\int s(\beta)\,d\beta`
    evenly, which is optimal if chains mix well (Gelman and Meng, 1998). The pilot uses random
    numbers of its own, so the weights of a run with the schedule are unbiased.

    Args:
        energy: as for :func:`ais`.
        base: as for :func:`ais`.
        kernel: as for :func:`ais`.
        num_temperatures: K, number of steps of the schedule.
        generator: as for :func:`ais`.
        progress: as for :func:`ais`.

    Returns:
        betas, float64, shape ``(num_temperatures + 1,)``, for :func:`ais`.

    Raises:
        ValueError: as :func:`ais`.
        FloatingPointError: if the weights have no finite spread.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(3, 2, weight=torch.full((3, 2), 3.0))
        >>> # units become correlated in the middle
        >>> schedule(rbm, num_temperatures=4).diff().argmin()
        tensor(1)
    """
    check_counts({"num_temperatures": 1}, num_temperatures)
    steps = _check_arguments(energy, kernel, PILOT_STEPS, PILOT_CHAINS)
    with eval_mode(energy), torch.no_grad():
        path: Any = _path(energy, base, kernel, generator, progress)
        if isinstance(path, LayeredPath):
            state: Any = path.draw_base(PILOT_CHAINS, generator)
        else:
            state = path.reference.sample(PILOT_CHAINS, generator)
            state = state[path.alive(state, *steps[:2])]
        speed = [float(term.std()) for term in increments(path, state, steps, generator, progress)]
    if not np.isfinite(speed).all():
        raise FloatingPointError(
            "the log weights of the pilot run must have a finite standard deviation: an energy is"
            " not finite, or only one chain has a finite weight; use another base"
        )
    # An interval without variance still gets some temperatures.
    length = np.concatenate([[0.0], np.cumsum(np.maximum(speed, 1e-2 * max(max(speed), 1e-12)))])
    betas = torch.as_tensor(
        np.interp(np.linspace(0.0, length[-1], num_temperatures + 1), length, steps)
    )
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _check_arguments(
    energy: Energy, kernel: Kernel[Any] | None, betas: int | Tensor, num_chains: int
) -> list[float]:
    check_energy(energy)
    if kernel is not None:
        check_kernel(kernel)
    check_counts({"num_chains": 1}, num_chains)
    return as_betas(betas)


def _path(
    energy: Energy,
    base: Base,
    kernel: Kernel[Any] | None,
    generator: torch.Generator | None,
    progress: bool | None,
) -> LayeredPath | KernelPath:
    """Return a path by layers if neither kernel nor another base is given, else one by a kernel."""
    if (
        isinstance(energy, LayeredMachine)
        and kernel is None
        and (base is None or isinstance(base, Layers))
    ):
        start = base_rates(energy) if base is None else base
        return LayeredPath(start, energy.layers())  # type: ignore[arg-type]  # of a layered machine, base_rates are Layers
    reference = base_energy(energy, base)
    moves = default_kernel(energy) if kernel is None else kernel
    # The pilot uses random numbers of its own: given its step sizes, the weights are unbiased.
    tunes = kernel is None and moves.target_acceptance is not None
    pilot = (
        tempered_smc(
            energy,
            reference,
            moves,
            256,
            num_islands=2,
            num_moves=3,
            generator=generator,
            progress=progress,
        )
        if tunes
        else None
    )
    return KernelPath(energy, reference, moves, pilot)


def _layered_draws(
    path: LayeredPath,
    energy: Energy,
    draws: Tensor | None,
    n: int,
    generator: torch.Generator | None,
) -> LayeredState:
    """Return layered states at exact draws of the target, or at the draws given.

    Hidden units that are not given are drawn conditionally on the visible ones.
    """
    layers = path.target
    if draws is None:
        return path.enter(energy.draw_layers(n, generator))  # type: ignore[operator]
    visible, units = layers.sizes[0], sum(layers.sizes)
    short = isinstance(energy, LayeredEnergy) or len(layers.sizes) > 2
    if (
        draws.dim() != 2
        or draws.shape[1] not in ({units} if short else {visible, units})
        or not len(draws)
    ):
        shapes = f"(n, {units})" if short else f"(n, {visible}) or (n, {units})"
        raise ValueError(
            f"draws must have shape {shapes} for {type(energy).__name__}, got {tuple(draws.shape)}"
        )
    if draws.dtype != energy.dtype or draws.device != energy.device:
        raise ValueError(
            f"draws must be {energy.dtype} on {energy.device}, got {draws.dtype} on {draws.device}"
        )
    bits = draws[:, visible:] if layers.precision is not None else draws
    if not bool(draws.isfinite().all()) or not bool(((bits == 0.0) | (bits == 1.0)).all()):
        raise ValueError(
            f"draws must hold states of {type(energy).__name__}, bits or finite real numbers, got"
            " other values"
        )
    if draws.shape[1] == units:
        return path.enter(layers.split(draws))
    return path.enter([draws, layers.draw(1, layers.field(1, [draws, None]), generator)])
