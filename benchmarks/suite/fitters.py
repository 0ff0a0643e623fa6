"""Flows of each library and their training, by reverse KL unless stated otherwise.

All use batches of :data:`BATCH` draws, Adam with a cosine schedule to 0, an inverse temperature
that increases from 0.1 to 1 over the first 40 % of the steps, gradients clipped to a norm of 100,
and the same scale of the initial draws. Steps that are not finite are skipped, or the last good
state is restored; Pyro's SVI does neither.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suite.flow_cases import Counted
from pyroebm.flows import AutoregressiveFlow, Flow, RealNVP, RedundantNICE, SplineFlow, Symmetrized
from pyroebm.objectives import (
    AlphaBootstrap,
    AnnealedReweighting,
    FlowObjective,
    ReverseKL,
    SymmetrizedKL,
)
from pyroebm.training import Guard, Trainer

__all__ = ["BATCH", "FITTERS", "Fitter", "Training"]

BATCH = 512
LR = 2e-3
HIDDEN = (64, 64)
CLIP = 100.0


@dataclasses.dataclass(frozen=True)
class Training:
    """A flow in training: its step, and what its evaluation needs."""

    step: Callable[[], Any]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    log_weights: Callable[[Tensor], Tensor]


#: From the energy, the scale of the initial draws and the number of steps to a training.
Fitter = Callable[[Counted, float, int], Training]


def temperature(step: int, steps: int) -> float:
    return min(1.0, 0.1 + 0.9 * step / (0.4 * steps))


def ours(
    make: Callable[[int, float], Flow],
    objective: Callable[[Counted, int], FlowObjective],
    energy: Counted,
    scale: float,
    steps: int,
) -> Training:
    flow = make(energy.event_shape[0], scale)
    target = flow.extend(energy)
    trainer = Trainer(
        flow,
        objective(energy, BATCH),
        num_steps=steps,
        lr=LR,
        max_grad_norm=CLIP,
        guard=Guard(rollback=True, max_rollbacks=steps),
        seed=torch.initial_seed(),
    )

    def draw(n: int) -> tuple[Tensor, Tensor]:
        xy, log_q = flow.forward_and_log_prob(flow.rsample_base(n))
        return xy[:, : flow.dim], -target(xy) - log_q

    def log_weights(x: Tensor) -> Tensor:
        xy = target.augment(x)
        return -target(xy) - flow.log_prob(xy)

    return Training(trainer.step, draw, log_weights)


def _by_hand(
    parameters: list[Tensor],
    loss: Callable[[float], Tensor],
    draw: Callable[[int], tuple[Tensor, Tensor]],
    log_q: Callable[[Tensor], Tensor],
    energy: Counted,
    steps: int,
) -> Training:
    """Train by the loop in the documentation of normflows and zuko."""
    optimizer = torch.optim.Adam(parameters, lr=LR)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer.zero_grad()
        value = loss(temperature(done, steps))
        if bool(torch.isfinite(value)):
            value.backward()
            if bool(torch.isfinite(nn.utils.clip_grad_norm_(parameters, CLIP))):
                optimizer.step()
        falling.step()
        done += 1

    def weighed(n: int) -> tuple[Tensor, Tensor]:
        x, log_density = draw(n)
        return x, -energy(x) - log_density

    return Training(step, weighed, lambda x: -energy(x) - log_q(x))


def with_normflows(
    splines: bool, alpha: bool, energy: Counted, scale: float, steps: int
) -> Training:
    """Train RealNVP as in its README, or coupled rational-quadratic splines with LU layers.

    The number of layers is that of pyroebm's flow.
    """
    import normflows as nf

    class Density(nf.distributions.Target):  # type: ignore[misc]
        def log_prob(self, z: Tensor) -> Tensor:
            return -energy(z)

    dim, parts = energy.event_shape[0], list[Any]()
    for k in range(6 if not splines else 4):
        if dim == 1:
            parts.append(
                nf.flows.AutoregressiveRationalQuadraticSpline(
                    1, 1, HIDDEN[0], num_bins=8, tail_bound=5
                )
            )
        elif splines:
            layer = nf.flows.CoupledRationalQuadraticSpline(
                dim, 1, HIDDEN[0], num_bins=8, tail_bound=5.0, reverse_mask=bool(k % 2)
            )
            parts += [layer, nf.flows.LULinearPermute(dim)]
        else:
            net = nf.nets.MLP([dim // 2, *HIDDEN, dim], init_zeros=True)
            parts += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="swap")]
    last = nf.flows.AffineConstFlow((dim,))
    nn.init.constant_(last.s, math.log(scale))
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(dim, trainable=False), [*parts, last], Density()
    )

    def loss(beta: float) -> Tensor:
        value: Tensor = (
            model.reverse_alpha_div(BATCH, alpha=2, dreg=True)
            if alpha
            else model.reverse_kld(BATCH, beta=beta)
        )
        return value

    return _by_hand(list(model.parameters()), loss, model.sample, model.log_prob, energy, steps)


def with_zuko(splines: bool, energy: Counted, scale: float, steps: int) -> Training:
    """Train NSF or MAF, inverted for fast draws.

    This follows its tutorial on training from an energy.
    """
    import zuko

    dim = energy.event_shape[0]
    kind = zuko.flows.NSF if splines else zuko.flows.MAF
    flow = kind(dim, transforms=4, **({"hidden_features": HIDDEN} if dim > 1 else {}))
    scaled = zuko.flows.UnconditionalTransform(
        lambda shift, log_scale: zuko.transforms.DependentTransform(
            zuko.transforms.MonotonicAffineTransform(shift, log_scale), 1
        ),
        torch.zeros(dim),
        torch.full((dim,), -math.log(scale)),
    )
    flow = zuko.flows.Flow([scaled, flow.transform.inv], flow.base)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = flow().rsample_and_log_prob((n,))
        return made

    def loss(beta: float) -> Tensor:
        x, log_q = draw(BATCH)
        return (log_q + beta * energy(x)).mean()

    return _by_hand(
        list(flow.parameters()), loss, draw, lambda x: flow().log_prob(x), energy, steps
    )


def with_pyro(what: str, energy: Counted, scale: float, steps: int) -> Training:
    """Train one of Pyro's guides by SVI, with the density as a factor."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormalizingFlow

    dim, done = energy.event_shape[0], 0

    def model() -> None:
        with pyro.poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.factor("energy", -temperature(done, steps) * energy(x))

    def splines(size: int) -> Any:
        parts: list[Any] = (
            [dist.transforms.Spline(1, count_bins=8, bound=5.0) for _ in range(4)]
            if size == 1
            else []
        )
        for _ in range(4 if size > 1 else 0):
            order = torch.randperm(size)
            parts += [
                dist.transforms.spline_coupling(size, hidden_dims=list(HIDDEN), bound=5.0),
                dist.transforms.Permute(order if size > 2 else torch.tensor([1, 0])),
            ]
        return dist.transforms.ComposeTransformModule(
            [*parts, dist.transforms.AffineTransform(0.0, scale, event_dim=1)]
        )

    pyro.clear_param_store()
    makers: dict[str, Callable[[], Any]] = {
        "AutoNormalizingFlow": lambda: AutoNormalizingFlow(model, splines),
        "AutoIAFNormal": lambda: AutoIAFNormal(model, hidden_dim=list(HIDDEN), num_transforms=3),
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model, init_scale=scale),
    }
    guide = makers[what]()
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "T_max": steps}
    optimizer = pyro.optim.CosineAnnealingLR(options, {"clip_norm": CLIP})
    svi = SVI(
        model,
        guide,
        optimizer,
        Trace_ELBO(num_particles=BATCH, vectorize_particles=True, max_plate_nesting=0),
    )

    def step() -> None:
        nonlocal done
        svi.step()
        optimizer.step()
        done += 1

    def draw(n: int) -> tuple[Tensor, Tensor]:
        posterior = guide.get_posterior()
        x = posterior.sample((n,))
        return x, -energy(x) - posterior.log_prob(x)

    return Training(step, draw, lambda x: -energy(x) - guide.get_posterior().log_prob(x))


def _couplings(dim: int, scale: float) -> Flow:
    return RealNVP(dim, scale=scale, generator=torch.Generator().manual_seed(torch.initial_seed()))


def _autoregressive(dim: int, scale: float) -> Flow:
    return AutoregressiveFlow(
        dim,
        num_layers=2,
        hidden_sizes=(32, 32),
        scale=scale,
        generator=torch.Generator().manual_seed(torch.initial_seed()),
    )


def _splines(dim: int, scale: float) -> Flow:
    return SplineFlow(
        dim,
        num_layers=4,
        scale=scale,
        generator=torch.Generator().manual_seed(torch.initial_seed()),
    )


def _fine_splines(dim: int, scale: float) -> Flow:
    return SplineFlow(
        dim,
        num_layers=min(dim, 2),
        num_bins=16,
        scale=scale,
        autoregressive=dim > 1,
        generator=torch.Generator().manual_seed(torch.initial_seed()),
    )


def _narrow_splines(dim: int, scale: float) -> Flow:
    # so that the modes are within the bins, 5 on either side
    return SplineFlow(
        dim,
        num_layers=4,
        num_bins=16,
        scale=0.4 * scale,
        generator=torch.Generator().manual_seed(torch.initial_seed()),
    )


def _even(dim: int, scale: float) -> Flow:
    return Symmetrized(
        RealNVP(dim, scale=scale, generator=torch.Generator().manual_seed(torch.initial_seed())),
        torch.stack([torch.eye(dim), -torch.eye(dim)]),
    )


# where a step of the path gradient costs twice that of the total one, or more, short trainings are
# better off without
_total = functools.partial(ReverseKL, gradient="total")
_OURS: dict[str, dict[str, Fitter]] = {
    "double well": {
        "RedundantNICE, D = 2": functools.partial(
            ours,
            lambda dim, scale: RedundantNICE(
                dim, dim + 1, generator=torch.Generator().manual_seed(torch.initial_seed())
            ),
            ReverseKL,
        ),
        "SplineFlow, 16 bins": functools.partial(ours, _fine_splines, _total),
    },
    "many-well": {
        "SplineFlow": functools.partial(ours, _splines, _total),
        "RealNVP, AlphaBootstrap": functools.partial(ours, _couplings, AlphaBootstrap),
    },
    "grid": {
        "SplineFlow, 16 bins, autoregressive": functools.partial(ours, _fine_splines, _total),
        "SplineFlow, 16 bins, AnnealedReweighting": functools.partial(
            ours,
            _narrow_splines,
            functools.partial(AnnealedReweighting, beta_start=0.02),
        ),
    },
    "funnel flow": {
        "RealNVP": functools.partial(ours, _couplings, ReverseKL),
        "AutoregressiveFlow": functools.partial(ours, _autoregressive, _total),
    },
    "phi4": {
        "SplineFlow": functools.partial(ours, _splines, _total),
        "SplineFlow, 16 bins, autoregressive": functools.partial(ours, _fine_splines, _total),
        "Symmetrized RealNVP": functools.partial(ours, _even, SymmetrizedKL),
    },
}


def _peers(case: str) -> dict[tuple[str, str], Fitter]:
    found: dict[tuple[str, str], Fitter] = {
        ("normflows", "NSF"): functools.partial(with_normflows, True, False)
    }
    found["zuko", "NSF"] = functools.partial(with_zuko, True)
    found["pyro", "AutoNormalizingFlow of splines"] = functools.partial(
        with_pyro, "AutoNormalizingFlow"
    )
    if case != "double well":  # in one dimension affine layers give normal distributions
        found["normflows", "RealNVP"] = functools.partial(with_normflows, False, False)
        found["zuko", "MAF"] = functools.partial(with_zuko, False)
        found["pyro", "AutoIAFNormal"] = functools.partial(with_pyro, "AutoIAFNormal")
    if case in ("many-well", "grid"):
        found["normflows", "RealNVP, reverse_alpha_div"] = functools.partial(
            with_normflows, False, True
        )
    found["pyro", "AutoMultivariateNormal"] = functools.partial(with_pyro, "AutoMultivariateNormal")
    return dict(sorted(found.items()))


#: Case: library and method, and the maker of a training.
FITTERS: dict[str, dict[tuple[str, str], Fitter]] = {
    case: {**{("pyroebm", method): fitter for method, fitter in methods.items()}, **_peers(case)}
    for case, methods in _OURS.items()
}
