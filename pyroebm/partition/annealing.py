"""Annealed importance sampling, forward and in reverse, and both as a bracket."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core._checks import check_counts
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.wrappers import eval_mode
from pyroebm.energies.layered import LayeredEnergy, LayeredMachine
from pyroebm.energies.layers import Layers
from pyroebm.kernels import Kernel
from pyroebm.kernels.base import check_kernel
from pyroebm.partition.bases import base_energy, base_rates
from pyroebm.partition.bridging import bennett_acceptance_ratio
from pyroebm.partition.layered import LayeredPath, Walkers
from pyroebm.partition.result import BidirectionalAIS, LogZ, from_weights
from pyroebm.partition.walk import KernelPath, as_betas, default_kernel, increments, total_weight
from pyroebm.smc import tempered_smc

__all__ = ["Base", "ais", "bidirectional_ais", "reverse_ais", "schedule"]

#: Even steps of the short run by which :func:`schedule` chooses temperatures.
PILOT_STEPS = 200

Base = Layers | Energy | Distribution | None


def ais(
    energy: Energy,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    betas: int | Tensor = 1000,
    *,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    r"""Annealed importance sampling (Neal, 2001; Salakhutdinov and Murray, 2008): chains go from a
    base to the energy.

    .. math::

        \hat Z = \frac{Z_0}{n} \sum_{i=1}^n \prod_{k=0}^{K-1}
        e^{E_{\beta_k}(x_k^i) - E_{\beta_{k+1}}(x_k^i)}, \qquad E_\beta = (1 - \beta) E_0 + \beta E

    with :math:`x_0` drawn from the base, and :math:`x_k` by a move that leaves
    :math:`e^{-E_{\beta_k}}` unchanged. Z is unbiased, and so its logarithm is low on average: a
    likelihood with an AIS value in it looks too good.

    A machine made of layers, without a kernel, is annealed by block Gibbs with half of its layers
    summed out (:class:`pyroebm.partition.LayeredPath`). Otherwise the kernel moves whole events,
    continuous ones in unconstrained coordinates.

    Args:
        energy: E.
        base: :math:`E_0`: what :func:`base_rates` makes of the energy and its data, an energy with
            exact draws and a known ``log_z``, or a Pyro distribution. None is
            ``base_rates(energy)``, uniform; for real numbers there is none.
        kernel: None takes block Gibbs for layers, ``Gibbs()`` for other discrete energies, and for
            continuous ones ``HMC(num_steps=5)`` with the step sizes of a small SMC run beforehand.
        betas: number K of even steps, or a schedule :math:`0 = \beta_0 < \dots < \beta_K = 1`,
            shape ``(K + 1,)``, for example that of :func:`schedule`.
        num_chains: n.
        generator: source of the draws; None is torch's default generator.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Returns:
        kind "lower"; "estimate" with a kernel that is not exact.

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
    steps = _front_door(energy, kernel, betas, num_chains)
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
    start: Tensor | None = None,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    betas: int | Tensor = 1000,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LogZ:
    r"""AIS from the energy to the base (Burda, Grosse and Salakhutdinov, 2015; Grosse, Ghahramani
    and Adams, 2015).

    .. math::

        \log \hat Z = \log Z_0
        - \log \frac1n \sum_{i=1}^n \prod_{k=K}^{1} e^{E_{\beta_k}(x_k^i) - E_{\beta_{k-1}}(x_k^i)}

    With :math:`x_K` drawn exactly from the energy the mean weight is unbiased for :math:`Z_0 / Z`,
    so :math:`\log \hat Z` is high on average. States of a Markov chain give no bound: where the
    chain missed a mode, so does the weight.

    Args:
        energy: E.
        start: :math:`x_K`, states of the energy ``(n, *event)`` from a Markov chain; for an RBM
            visible states ``(n, n_0)`` or those of all units ``(n, n_0 + n_1)``. None draws
            ``num_chains`` exactly, where ``energy.has_exact_draws``.
        base, kernel, betas, num_chains, generator, progress: as for :func:`ais`; ``betas``
            rises here too.

    Returns:
        kind "upper" if ``start`` is None and the kernel is exact, else "estimate".

    Raises:
        ValueError: as :func:`ais`, and if there are no exact draws or ``start`` has another shape.
        FloatingPointError: as :func:`ais`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(3, 2, weight=torch.ones(3, 2))
        >>> reverse_ais(rbm).kind, reverse_ais(rbm, rbm.initial(10)).kind
        ('upper', 'estimate')
    """
    steps = _front_door(energy, kernel, betas, num_chains)[::-1]
    if start is None and not energy.has_exact_draws:
        raise ValueError(
            f"start must be given: {type(energy).__name__} has no exact draws. Draw states with"
            " MCMC, and let it run for long"
        )
    with eval_mode(energy), torch.no_grad():
        path = _path(energy, base, kernel, generator, progress)
        if isinstance(path, LayeredPath):
            walkers, exact = _enter(path, energy, start, num_chains, generator), True
            log_weights = total_weight(path, walkers, steps, generator, progress)
        else:
            if start is not None:
                energy.check_states(start, "start")
            x = energy.sample(num_chains, generator) if start is None else start
            log_weights, exact = (
                path.total_weight(path.transform.inv(x), steps, generator, progress),
                path.kernel.exact,
            )
    return from_weights(
        log_weights,
        path.log_z,
        "upper" if start is None and exact else "estimate",
        "reverse AIS",
        -1,
    )


def bidirectional_ais(
    energy: Energy,
    start: Tensor | None = None,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    betas: int | Tensor = 1000,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> BidirectionalAIS:
    """:func:`ais` and :func:`reverse_ais` with one schedule, and the acceptance ratio of their
    weights. Prints as three lines.

    Args:
        energy, start, base, kernel, betas, num_chains, generator, progress: as for
            :func:`reverse_ais`.

    Raises:
        ValueError, FloatingPointError: as :func:`reverse_ais`.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> result = bidirectional_ais(BernoulliRBM(3, 2, weight=torch.ones(3, 2)), betas=100)
        >>> result.forward.kind, result.reverse.kind, result.width < 0.1
        ('lower', 'upper', True)
    """
    reverse = reverse_ais(
        energy,
        start,
        base,
        kernel,
        betas=betas,
        num_chains=num_chains,
        generator=generator,
        progress=progress,
    )
    forward = ais(
        energy, base, kernel, betas, num_chains=num_chains, generator=generator, progress=progress
    )
    return BidirectionalAIS(forward, reverse, bennett_acceptance_ratio(forward, reverse))


def schedule(
    energy: Energy,
    num_temperatures: int,
    base: Base = None,
    kernel: Kernel[Any] | None = None,
    *,
    num_chains: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Temperatures at which the weights of AIS vary equally much.

    The increments of the log weights of a short run have a standard deviation :math:`s(\beta) \,
    d\beta` over chains: the speed along the path. The schedule divides :math:`\int
    s(\beta)\,d\beta` evenly, which is the best one if moves mix well (Gelman and Meng, 1998). As it
    comes of random numbers of its own, the weights of a run along it are unbiased.

    Args:
        num_temperatures: K, steps of the schedule.
        energy, base, kernel, num_chains, generator, progress: as for :func:`ais`.

    Returns:
        betas, float64, shape ``(num_temperatures + 1,)``, for :func:`ais`.

    Raises:
        ValueError: as :func:`ais`.
        FloatingPointError: if the weights have no finite spread.

    Example:
        >>> from pyroebm.energies import BernoulliRBM
        >>> rbm = BernoulliRBM(3, 2, weight=torch.full((3, 2), 3.0))
        >>> schedule(rbm, 4).diff().argmin()  # half-way the units begin to hold together
        tensor(1)
    """
    check_counts({"num_temperatures": 1, "num_chains": 2}, num_temperatures, num_chains)
    steps = _front_door(energy, kernel, PILOT_STEPS, num_chains)
    with eval_mode(energy), torch.no_grad():
        path: Any = _path(energy, base, kernel, generator, progress)
        if isinstance(path, LayeredPath):
            state: Any = path.draw_base(num_chains, generator)
        else:
            state = path.reference.sample(num_chains, generator)
            state = state[path.alive(state, *steps[:2])]
        speed = [float(term.std()) for term in increments(path, state, steps, generator, progress)]
    if not np.isfinite(speed).all():
        raise FloatingPointError(
            "the weights of the short run have no finite spread: an energy is not finite, or one"
            " chain is left"
        )
    # a stretch without any spread still gets a temperature now and then
    length = np.concatenate([[0.0], np.cumsum(np.maximum(speed, 1e-2 * max(max(speed), 1e-12)))])
    betas = torch.as_tensor(
        np.interp(np.linspace(0.0, length[-1], num_temperatures + 1), length, steps)
    )
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _front_door(
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
    """Layers are walked side by side where nothing else was asked for; all else by a kernel."""
    if (
        isinstance(energy, LayeredMachine)
        and kernel is None
        and (base is None or isinstance(base, Layers))
    ):
        start = base_rates(energy) if base is None else base
        return LayeredPath(start, energy.layers())  # type: ignore[arg-type]  # of a layered machine, base_rates are Layers
    reference = base_energy(energy, base)
    moves = default_kernel(energy) if kernel is None else kernel
    # of random numbers that no chain sees: given its step sizes, the weights are unbiased
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


def _enter(
    path: LayeredPath,
    energy: Energy,
    start: Tensor | None,
    n: int,
    generator: torch.Generator | None,
) -> Walkers:
    """Walkers at exact draws of the target, or at the states given; hidden units not given are
    drawn given the visible ones.
    """
    layers = path.target
    if start is None:
        return path.enter(energy.draw_layers(n, generator))  # type: ignore[operator]
    visible, units = layers.sizes[0], sum(layers.sizes)
    short = isinstance(energy, LayeredEnergy) or len(layers.sizes) > 2
    if (
        start.dim() != 2
        or start.shape[1] not in ({units} if short else {visible, units})
        or not len(start)
    ):
        shapes = f"(n, {units})" if short else f"(n, {visible}) or (n, {units})"
        raise ValueError(
            f"start must have shape {shapes} for {type(energy).__name__}, got {tuple(start.shape)}"
        )
    if start.dtype != energy.dtype or start.device != energy.device:
        raise ValueError(
            f"start must be {energy.dtype} on {energy.device}, got {start.dtype} on {start.device}"
        )
    bits = start[:, visible:] if layers.precision is not None else start
    if not bool(start.isfinite().all()) or not bool(((bits == 0.0) | (bits == 1.0)).all()):
        raise ValueError(
            f"start must hold states of {type(energy).__name__}, bits or finite real numbers, got"
            " others"
        )
    if start.shape[1] == units:
        return path.enter(layers.split(start))
    return path.enter([start, layers.draw(1, layers.field(1, [start, None]), generator)])
