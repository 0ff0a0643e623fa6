"""Fitting a flow to an energy by reverse KL divergence: the loss, the loop, and an estimate of what
was reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from pyroebm.core._torch_private import copy_each, norm_of_each
from pyroebm.core.energy import Energy
from pyroebm.core.progress import Progress
from pyroebm.core.rng import seeded_generator
from pyroebm.core.wrappers import check_weighable, eval_mode
from pyroebm.flows.flow import Flow
from pyroebm.objectives.base import Objective

__all__ = ["ReverseKL", "evaluate_j", "fit_flow"]


class ReverseKL(Objective):
    r"""The bound :math:`J_R \ge KL(q(x) \| p) \ge 0` of a flow on the divergence of its x from
    :math:`p(x) = e^{-U(x)} / C`.

    .. math::
        J_R = E[U(x)] - \log|\det S| + \tfrac12 E[\log\det \Sigma(x)]
        + \tfrac12 E[(y - M(x))^\top \Sigma(x)^{-1} (y - M(x))] + \tfrac{D - d}{2} \log 2\pi
        - H(z) + \log C

    For D = d it is the divergence J itself. It is minus the ELBO of the model :math:`p(x) N(y \mid
    M(x), \Sigma(x))` with the flow as guide (:mod:`pyroebm.ppl.svi`). An estimate may fall below 0
    by its noise.

    Args:
        entropy: ``"sampled"``: :math:`-\log N(z)` of the drawn z stands for H(z), of the same mean
            and, near the optimum, of far smaller variance, since there it cancels what varies;
            ``"exact"``: H(z) in closed form. The gradients agree.
        gradient: ``"stl"``: the path derivative of "sticking the landing" (Roeder, Wu and Duvenaud,
            2017), without noise where the flow is the target; or ``"total"``, of the same mean, two
            thirds of the cost and more steps to the same fit.

    Raises:
        ValueError: if an option is unknown.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> loss, facts = ReverseKL()(NICE(2), Gaussian(torch.zeros(2)), num_samples=8)
        >>> abs(float(facts["j_r"])) < 1e-6  # a fresh flow is the standard normal, in each draw
        True
    """

    def __init__(self, entropy: str = "sampled", gradient: str = "stl") -> None:
        super().__init__()
        known = {"entropy": ("sampled", "exact"), "gradient": ("stl", "total")}
        for name, value in (("entropy", entropy), ("gradient", gradient)):
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {known[name]}, got {name}={value!r}")
        self.entropy, self.gradient = entropy, gradient

    def forward(
        self,
        flow: Flow,
        energy: Energy,
        num_samples: int = 512,
        *,
        z: Tensor | None = None,
        beta: float = 1.0,
        log_z: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The loss and its facts.

        Args:
            flow: q.
            energy: U.
            num_samples: number of draws.
            z: noise ``(n, D)`` in place of fresh draws.
            beta: inverse temperature: :math:`\beta U` takes the place of U.
            log_z: log C of :math:`\beta U` where the energy does not know it.
            generator: source of z.

        Returns:
            :math:`J_R - \log C`, a scalar, and detached facts: ``j_r_minus_log_z`` (the same),
            ``standard_error`` of it, ``extended_energy`` (mean of :math:`\beta U(x) - \log N(y \mid
            M, \Sigma)`), and ``j_r`` only where log C is known.

        Raises:
            ValueError: if the flow does not fit the energy, or a number is out of range.
        """
        if num_samples < 2:
            raise ValueError(
                "num_samples must be at least 2, for a standard error, got"
                f" num_samples={num_samples}"
            )
        energy = energy if beta == 1.0 else beta * energy
        z = flow.draw_noise(num_samples, generator) if z is None else z
        loss, terms, extended, _ = self.estimate(flow, energy, z)
        facts = {
            "j_r_minus_log_z": loss.detach(),
            "standard_error": terms.detach().std() / math.sqrt(len(terms)),
            "extended_energy": extended.detach().mean(),
        }
        log_z = energy.log_z if log_z is None else log_z
        if log_z is not None:
            facts["j_r"] = loss.detach() + log_z
        return loss, facts

    def terms(self, flow: Flow, energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""What is averaged over z ``(n, D)``: the summands of :math:`J_R - \log C`; the extended
        energies; and (x, y)."""
        xy, log_q = flow.push(z)
        return *self._terms(flow, energy, xy, log_q), xy

    def estimate(
        self, flow: Flow, energy: Energy, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean of :meth:`terms`, with the gradient that was asked for, and then
        :meth:`terms`."""
        if self.gradient == "total":
            terms, extended, xy = self.terms(flow, energy, z)
            return terms.mean(), terms, extended, xy
        xy, log_q, path_log_q = flow.push_path(z)
        terms, extended = self._terms(flow, energy, xy, log_q)
        path = (extended + path_log_q).mean()
        return path + (terms.mean() - path).detach(), terms, extended, xy

    def _terms(
        self, flow: Flow, energy: Energy, xy: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        extended = flow.extend(energy)(xy)
        return (
            extended + log_q if self.entropy == "sampled" else extended - flow.joint_entropy(),
            extended,
        )


def _adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def _grad_norm(parameters: list[nn.Parameter], most: float | None) -> Tensor:
    """The norm of the gradient, which is then clipped to ``most``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError(
            "the loss of objective reaches no parameter of the flow that requires a gradient: each"
            " has grad None"
        )
    if most is not None:
        return nn.utils.clip_grad_norm_(parameters, most)
    return torch.linalg.vector_norm(torch.stack(norm_of_each(gradients)))


def fit_flow(
    flow: Flow,
    energy: Energy,
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None,
    *,
    steps: int = 3000,
    num_samples: int = 512,
    lr: float = 2e-3,
    beta_start: float = 0.1,
    warmup: float = 0.4,
    max_grad_norm: float | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    on_nonfinite: str = "raise",
    seed: int = 0,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[int, float, dict[str, float]]]:
    r"""Train a flow on an energy, in place, one step for each turn of your loop.

    The temperature falls while :math:`\beta` rises linearly from ``beta_start`` to 1 over the first
    ``warmup`` of the steps, which keeps modes from being missed; the step size of the optimizer
    falls to 0 along a half cosine.

    Args:
        flow: q; its parameters are trained, the energy's are left alone.
        energy: U.
        objective: called as ``objective(flow, energy, num_samples=, beta=, generator=)``;
            :class:`ReverseKL` by default.
        steps: number of steps.
        num_samples: draws in each step.
        lr: largest step size of Adam.
        beta_start: inverse temperature of the first step, in (0, 1].
        warmup: fraction of the steps in which :math:`\beta` rises.
        max_grad_norm: clip the gradient's norm to this; None does not.
        optimizer: from parameters to an optimizer, in place of Adam; ``lr`` is then its own.
        on_nonfinite: ``"raise"``, or ``"skip"`` and count; either way the parameters go back to the
            last that gave a finite loss and gradient.
        seed: of a generator on the flow's device; torch's global one is not used.
        generator: in place of ``seed``.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Yields:
        step, loss and facts: those of the objective, ``beta``, ``lr``, ``grad_norm`` and
            ``skipped`` (steps skipped so far).

    Raises:
        ValueError: if an argument is out of range, or the flow does not fit the energy; at the
            call, not in the loop. In the loop, if the loss reaches no parameter of the flow.
        FloatingPointError: in the loop, if a loss or gradient is not finite, naming step and facts.

    Example:
        >>> from pyroebm.flows import RedundantNICE
        >>> from pyroebm.targets import DoubleWell
        >>> flow = RedundantNICE(dim=1, total_dim=2)
        >>> for step, loss, facts in fit_flow(flow, DoubleWell(), steps=3):
        ...     print(step, facts["beta"] <= 1.0)
        0 True
        1 True
        2 True
    """
    for name, value in (("steps", steps), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if not (0.0 < beta_start <= 1.0 and 0.0 <= warmup <= 1.0):
        raise ValueError(
            f"0 < beta_start <= 1 and 0 <= warmup <= 1 must hold, got beta_start={beta_start},"
            f" warmup={warmup}"
        )
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(
            f"max_grad_norm must be positive, or None, got max_grad_norm={max_grad_norm}"
        )
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(
            f"on_nonfinite must be 'raise' or 'skip', got on_nonfinite={on_nonfinite!r}"
        )
    flow.extend(energy)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(flow).__name__} has no parameter that requires a gradient: there is nothing to"
            " train"
        )
    objective = ReverseKL() if objective is None else objective
    chosen = _adam(parameters, lr) if optimizer is None else optimizer(parameters)
    generator = seeded_generator(seed, flow.device) if generator is None else generator

    def loop() -> Iterator[tuple[int, float, dict[str, float]]]:
        finite, skipped = [p.detach().clone() for p in parameters], 0
        top = [group["lr"] for group in chosen.param_groups]
        with Progress(steps, "fit_flow", show=progress) as shown:
            for step in range(steps):
                rising = step / (warmup * steps) if step < warmup * steps else 1.0
                beta, fall = (
                    beta_start + (1.0 - beta_start) * rising,
                    0.5 * (1.0 + math.cos(math.pi * step / steps)),
                )
                for group, most in zip(chosen.param_groups, top, strict=True):
                    group["lr"] = most * fall
                chosen.zero_grad()
                with eval_mode(energy):
                    loss, seen = objective(
                        flow, energy, num_samples=num_samples, beta=beta, generator=generator
                    )
                if loss.requires_grad:
                    loss.backward(inputs=parameters)
                norm = float(_grad_norm(parameters, max_grad_norm))
                value, facts = (
                    float(loss.detach()),
                    {name: float(fact) for name, fact in seen.items()},
                )
                facts |= {"beta": beta, "lr": top[0] * fall, "grad_norm": norm}
                ok = math.isfinite(value) and math.isfinite(norm)
                with torch.no_grad():
                    copy_each(*((finite, parameters) if ok else (parameters, finite)))
                if ok:
                    chosen.step()
                elif on_nonfinite == "raise":
                    raise FloatingPointError(
                        f"fit_flow: at step {step} the loss is {value} and the gradient's norm"
                        f" {norm}; the parameters were put back to the last finite ones. Facts:"
                        f" {facts}"
                    )
                else:
                    skipped += 1
                shown.note(loss=value)
                shown.update()
                yield step, value, facts | {"skipped": float(skipped)}

    return loop()


@torch.no_grad()
def evaluate_j(
    flow: Flow,
    energy: Energy,
    num_samples: int = 100_000,
    *,
    log_z: float | None = None,
    entropy: str = "sampled",
    batch_size: int = 65_536,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[float, float]:
    r"""An estimate of :math:`J_R` (of J where D = d) from fresh draws, and its standard error, in
    nats.

    Args:
        flow: q.
        energy: U.
        num_samples: number of draws.
        log_z: log C; None takes ``energy.log_z``. Give 0.0 for :math:`J_R - \log C`, which needs no
            log C.
        entropy: as in :class:`ReverseKL`.
        batch_size: draws evaluated at once.
        seed: of the draws.
        progress: True shows it, False hides it, None shows it where it takes longer than a second.

    Raises:
        ValueError: if log C is neither given nor known, or a number is out of range.

    Example:
        >>> from pyroebm.flows import NICE
        >>> from pyroebm.targets import Gaussian
        >>> value, error = evaluate_j(
        ...     NICE(1), Gaussian(1.0), 10_000
        ... )  # KL(N(0, 1) || N(1, 1)) = 0.5
        >>> abs(value - 0.5) < 5 * error
        True
    """
    log_z = energy.log_z if log_z is None else log_z
    if log_z is None:
        raise ValueError(
            f"log C of {type(energy).__name__} is not known: give log_z, or log_z=0.0 for J_R -"
            " log C"
        )
    if min(num_samples, batch_size) < 2:
        raise ValueError(
            f"num_samples and batch_size must be at least 2, got {num_samples} and {batch_size}"
        )
    check_weighable(energy)
    generator, objective = seeded_generator(seed, flow.device), ReverseKL(entropy)
    parts = []
    with eval_mode(energy), Progress(num_samples, "evaluate_j", "draw", progress) as shown:
        for start in range(0, num_samples, batch_size):
            z = flow.draw_noise(min(batch_size, num_samples - start), generator)
            parts.append(objective.terms(flow, energy, z)[0].double())
            shown.update(len(z))
    terms = torch.cat(parts)
    return float(terms.mean()) + log_z, float(terms.std()) / math.sqrt(num_samples)
