"""Tempered sequential Monte Carlo: weighted particles for an energy, with an estimate of log Z."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroebm.core.annealing_path import DistributionEnergy, GeometricPath
from pyroebm.core.energy import Energy, check_energy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import uniform
from pyroebm.core.statistics import Estimate, Kind, effective, log_mean, too_few
from pyroebm.core.supports import to_support
from pyroebm.core.wrappers import eval_mode, unconstrain
from pyroebm.kernels.adaptation.step_size import find_step_size
from pyroebm.kernels.base import Kernel, check_kernel

__all__ = ["SMCResult", "systematic", "tempered_smc"]

#: Conditional effective sample size to keep from one temperature to the next, as a fraction of the
#: particles.
TARGET_ESS = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class SMCResult:
    r"""Weighted particles for :math:`p(x) = e^{-U(x)} / Z`, from :func:`tempered_smc`.

    There are G islands of N particles, and L temperatures above 0.

    Attributes:
        x: particles, shape ``(G * N, *event)``, those of one island adjacent.
        log_weights: log weights in nats, float64, shape ``(G * N,)``; their mean weight is the
            estimate of Z.
        log_z: log of the mean of the islands' estimates of Z, with a standard error from the spread
            of the islands (delta method): NaN for one island, ``inf`` if less than a quarter of the
            islands dominate. Its kind is "lower" if Z is unbiased, so that log Z is low on average
            (Jensen): a run with the temperatures and step sizes of a ``pilot``. It is "estimate" if
            they were adapted to the particles: Z then has a bias of order 1 / (G N).
        island_log_z: log Z of each island, shape ``(G,)``.
        betas: inverse temperatures, from 0 to 1, shape ``(L + 1,)``.
        step_sizes: step size of the kernel at each temperature, shape ``(L,)``; NaN if it has none.
        ess: effective sample size of an island at each temperature before resampling, mean over
            islands, shape ``(L,)``.
        acceptance: mean acceptance rate of the moves at each temperature, shape ``(L,)``.

    Example:
        >>> from pyroebm import MALA
        >>> from pyroebm.targets import Gaussian
        >>> result = tempered_smc(
        ...     Gaussian(torch.ones(2)), Gaussian(torch.zeros(2), scale=2.0), MALA(), 128
        ... )
        >>> mean, se = result.expectation(lambda x: x)
        >>> bool(((mean - 1.0).abs() < 5 * se).all()), result.log_z.kind
        (True, 'estimate')
    """

    x: Tensor
    log_weights: Tensor
    log_z: Estimate
    island_log_z: Tensor
    betas: Tensor
    step_sizes: Tensor
    ess: Tensor
    acceptance: Tensor

    def expectation(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        r"""Estimate :math:`E_p[f(x)]`, with a standard error from the spread of the islands.

        Islands are independent of each other; the particles of one island are not.

        Args:
            f: function of the particles, ``(n, *event) -> (n, *shape)``.

        Returns:
            value and standard error, float64, both of shape ``shape``.
        """
        values = f(self.x).double()
        islands, shape = len(self.island_log_z), values.shape[1:]
        weights = self.log_weights.softmax(0).reshape(islands, -1, 1)
        sums = (weights * values.reshape(islands, weights.shape[1], -1)).sum(1)  # (G, prod shape)
        mean = sums.sum(0)
        error = (sums - weights.sum(1) * mean).square().sum(0).sqrt() * math.sqrt(
            islands / max(islands - 1, 1)
        )
        if islands < 2 or too_few(effective(self.island_log_z), islands):
            error = torch.full_like(error, math.nan if islands < 2 else math.inf)
        return mean.reshape(shape), error.reshape(shape)


def tempered_smc(
    energy: Energy,
    base: Energy | Distribution,
    kernel: Kernel[Any],
    num_particles: int = 1024,
    *,
    num_islands: int = 8,
    num_moves: int = 5,
    pilot: SMCResult | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> SMCResult:
    r"""Run tempered SMC from ``base`` to ``energy`` and estimate log Z.

    The path is :math:`E_\beta = (1 - \beta) V + \beta U`, and the estimate of Z is

    .. math::

        \hat Z
        = Z_V \prod_{l=1}^{L} \sum_i W_i^{(l-1)} e^{-(\beta_l - \beta_{l-1}) (U - V)(x_i^{(l-1)})}
    (Del Moral, Doucet and Jasra, 2006). The next temperature is the largest step that keeps the
    conditional effective sample size at 0.9 of the particles (Zhou, Johansen and Aston, 2016),
    found by bisection. An island whose effective sample size falls below half is resampled
    systematically. Then the kernel takes ``num_moves`` steps, and its step size is adapted towards
    its target acceptance rate after each. Islands are independent except for temperatures and step
    sizes, which they share.

    Args:
        energy: U; a constrained support is sampled in unconstrained coordinates.
        base: V, with exact draws and a known log Z, whose support contains that of the energy: an
            energy such as :class:`pyroebm.targets.Gaussian`, or a Pyro distribution.
        kernel: kernel of the moves; it must be exact.
        num_particles: N, number of particles of one island.
        num_islands: G, at least 2 for a standard error.
        num_moves: number of steps of the kernel at each temperature.
        pilot: an earlier result, whose temperatures and step sizes are used; Z is then unbiased.
        generator: source of randomness; None is torch's default generator.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second.

    Returns:
        the particles, their weights and log Z.

    Raises:
        ValueError: if a setting is out of its range, if ``base`` does not fit, or if the kernel is
            not exact.
        FloatingPointError: if an energy is NaN or -inf at a draw of the base, or if it is infinite
            at all draws of an island.

    Example:
        >>> from pyroebm import HMC
        >>> from pyroebm.targets import DoubleWell, Gaussian
        >>> energy = DoubleWell()
        >>> result = tempered_smc(energy, Gaussian(0.0, scale=2.0), HMC(num_steps=5), 256)
        >>> abs(result.log_z.value - energy.log_z) < 5 * result.log_z.standard_error
        True
    """
    check_energy(energy)
    check_kernel(kernel)
    for name, value, least in (
        ("num_particles", num_particles, 2),
        ("num_islands", num_islands, 1),
        ("num_moves", num_moves, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {name}={value}")
    if not kernel.exact:
        raise ValueError(
            f"kernel must leave its target invariant, but {type(kernel).__name__} is not exact; use"
            " an exact one, such as HMC()"
        )
    base = DistributionEnergy(base, dtype=energy.dtype) if isinstance(base, Distribution) else base
    if not (isinstance(base, Energy) and base.has_exact_draws and base.log_z is not None):
        raise ValueError(
            "base must be a distribution, or an Energy with exact draws and a known log_z, such as"
            f" pyroebm.targets.Gaussian, got {base}"
        )
    target, reference = unconstrain(energy), unconstrain(base)
    known = None if pilot is None else len(pilot.step_sizes)
    with eval_mode(energy), Progress(known, "SMC", "temperature", progress) as shown:
        run = _Run(target, reference, kernel, (num_islands, num_particles), generator)
        run.discard_infinite()
        level = 0
        while run.beta < 1.0:
            run.advance(run.next_beta() if pilot is None else float(pilot.betas[level + 1]))
            run.move(num_moves, None if pilot is None else float(pilot.step_sizes[level]))
            level += 1
            shown.note(beta=run.beta, acceptance=run.acceptance[-1])
            shown.update()
    x = to_support(energy.support)(run.x)
    return run.result(x, base.log_z, "estimate" if pilot is None else "lower")


class _Run:
    """Particles of all islands ``(G * N, *event)``, log weights ``(G, N)`` and log Z of a run.

    The log weights are normalized.
    """

    def __init__(
        self,
        target: Energy,
        reference: Energy,
        kernel: Kernel[Any],
        shape: tuple[int, int],
        generator: torch.Generator | None,
    ) -> None:
        self.target = target
        self.reference = reference
        self.kernel = kernel
        self.shape = shape
        self.generator = generator
        self.x = reference.sample(math.prod(shape), generator)
        self.beta = 0.0
        self.log_weights = torch.full(
            shape, -math.log(shape[1]), dtype=torch.float64, device=self.x.device
        )
        self.log_z = self.log_weights.new_zeros(shape[0])
        self.slope = self._slope()
        self.betas = [0.0]
        self.step_sizes = list[float]()
        self.ess = list[float]()
        self.acceptance = list[float]()

    def _slope(self) -> Tensor:
        return (
            GeometricPath(self.target, self.beta, self.reference)
            .slope(self.x)
            .double()
            .reshape(self.shape)
        )

    def discard_infinite(self) -> None:
        """Give weight 0 to draws of the base at which the energy is infinite, and resample."""
        wrong = int((self.slope.isnan() | (self.slope == -math.inf)).sum())
        if wrong:
            raise FloatingPointError(
                f"energy is NaN or -inf at {wrong} of {self.slope.numel()} draws of the base"
            )
        outside = self.slope.isinf()
        if bool(outside.any()):
            self._reweight(torch.where(outside, -math.inf, 0.0).double())
            self._resample(outside.any(1))

    def next_beta(self) -> float:
        """Return the largest temperature that keeps the conditional ESS, averaged over islands."""
        weights = self.log_weights.exp()

        def conditional_ess(step: float) -> float:
            log_ratio = -step * self.slope
            ratio = (log_ratio - log_ratio.amax(1, keepdim=True)).exp()
            return float(
                ((weights * ratio).sum(1).square() / (weights * ratio.square()).sum(1)).mean()
            )

        low, high = 0.0, 1.0 - self.beta
        if conditional_ess(high) >= TARGET_ESS:
            return 1.0
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if conditional_ess(middle) >= TARGET_ESS else (low, middle)
        return self.beta + high

    def advance(self, beta: float) -> None:
        """Reweight the particles for a new temperature and resample islands with a small ESS."""
        self._reweight(-(beta - self.beta) * self.slope)
        self.beta = beta
        self.betas.append(beta)
        ess = self.log_weights.exp().square().sum(1).reciprocal()
        self.ess.append(float(ess.mean()))
        self._resample(ess < 0.5 * self.shape[1])

    def _reweight(self, log_ratio: Tensor) -> None:
        weights = self.log_weights + log_ratio
        total = weights.logsumexp(1)
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(
                f"all particles of {int((~torch.isfinite(total)).sum())} of {self.shape[0]}"
                " islands have weight 0, because the base rarely draws where the energy is finite;"
                " use another base, or raise num_particles"
            )
        self.log_z, self.log_weights = self.log_z + total, weights - total.unsqueeze(1)

    def _resample(self, which: Tensor) -> None:
        if not bool(which.any()):
            return
        islands, n = self.shape
        offset = uniform((islands,), self.generator, torch.float64, self.x.device)
        index = torch.where(
            which.unsqueeze(1),
            systematic(self.log_weights.exp(), offset),
            torch.arange(n, device=which.device),
        )
        first = n * torch.arange(islands, device=which.device).unsqueeze(1)
        self.x, self.slope = self.x[(first + index).flatten()], self.slope.gather(1, index)
        self.log_weights = torch.where(which.unsqueeze(1), -math.log(n), self.log_weights)

    def move(self, moves: int, step_size: float | None) -> None:
        """Run the kernel at this temperature, with a given step size or an adapted one."""
        path, kernel = GeometricPath(self.target, self.beta, self.reference), self.kernel
        state, aim = kernel.init(path, self.x, self.generator), kernel.target_acceptance
        tuned = aim is not None and step_size is None
        if step_size is not None and kernel.step_size is not None:
            kernel = kernel.replace(step_size=step_size)
        elif tuned and not self.step_sizes:
            kernel = kernel.replace(step_size=find_step_size(kernel, path, state, self.generator))
        rates = []
        for _ in range(moves):
            state, info = kernel.step(path, state, self.generator)
            rates.append(float(info.acceptance_rate.double().mean()))
            if aim is not None and tuned and kernel.step_size is not None:
                size = float(kernel.step_size) * math.exp(rates[-1] - aim)
                kernel = kernel.replace(step_size=size)
        self.kernel, self.x = kernel, state.x
        self.slope = self._slope()
        self.acceptance.append(sum(rates) / moves)
        self.step_sizes.append(math.nan if kernel.step_size is None else float(kernel.step_size))

    def result(self, x: Tensor, base_log_z: float, kind: Kind) -> SMCResult:
        islands = base_log_z + self.log_z
        found = log_mean(islands)
        return SMCResult(
            x=x,
            log_weights=(
                islands.unsqueeze(1) + self.log_weights + math.log(self.shape[1])
            ).flatten(),
            log_z=Estimate(found.value, found.standard_error, kind),
            island_log_z=islands,
            betas=torch.tensor(self.betas, dtype=torch.float64),
            step_sizes=torch.tensor(self.step_sizes, dtype=torch.float64),
            ess=torch.tensor(self.ess, dtype=torch.float64),
            acceptance=torch.tensor(self.acceptance, dtype=torch.float64),
        )


def systematic(weights: Tensor, offset: Tensor) -> Tensor:
    r"""Resample systematically (Kitagawa, 1996).

    Index j is drawn :math:`\lfloor N w_j \rfloor` times or once more.

    Args:
        weights: float64, shape ``(islands, n)``, not necessarily normalized.
        offset: one uniform number in [0, 1) for each island, shape ``(islands,)``.

    Returns:
        indices of the particles kept, int64, shape ``(islands, n)``.

    Example:
        >>> systematic(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([0.3]))
        tensor([[0, 0, 2, 3]])
    """
    edges = weights.cumsum(1)
    total = edges[:, -1:]
    points = (
        torch.arange(weights.shape[1], dtype=weights.dtype, device=weights.device)
        + offset.unsqueeze(1)
    ) / weights.shape[1]
    # Stay below the total despite rounding, so that no particle of weight 0 is kept.
    points = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(edges, points, right=True)
