"""A training step of the same additive flow in each library.

A step is a batch, the energy, reverse KL, its gradient, and Adam.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm import Energy
from pyroebm.flows import NICE
from pyroebm.objectives import CompiledKL, ReverseKL
from pyroebm.training import Trainer

__all__ = ["COUPLINGS", "HIDDEN", "CONTESTANTS", "bare"]

COUPLINGS = 6
HIDDEN = (64, 64)
LR = 2e-3
Step = Callable[[], Any]


def _widths(inputs: int, outputs: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([inputs, *HIDDEN, outputs]))


def _net(inputs: int, outputs: int) -> nn.Sequential:
    """Return linear layers with SiLU between them, as in pyroebm."""
    layers = [nn.Linear(*widths) for widths in _widths(inputs, outputs)]
    return nn.Sequential(
        layers[0], *itertools.chain.from_iterable((nn.SiLU(), layer) for layer in layers[1:])
    )


def bare(
    x: Tensor, layers: list[tuple[Tensor, Tensor]], grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Compute a conditioner at x by hand.

    With the gradient ``grad`` of its output, compute those of x and of the weights too.
    """
    inputs, sums = [x], []
    for k, (weight, bias) in enumerate(layers):
        sums.append(torch.addmm(bias, inputs[-1], weight.mT))
        if k + 1 < len(layers):
            inputs.append(nn.functional.silu(sums[-1]))
    grads = []
    for k in reversed(range(len(layers))):
        grads += [grad.mT @ inputs[k], grad.sum(0)]
        grad = grad @ layers[k][0]
        if k:
            grad = torch.ops.aten.silu_backward(grad, sums[k - 1])
    return grad, grads


def products(energy: Energy, batch: int) -> Step:
    """Compute only the conditioners: products, activations, and their gradients."""
    half = energy.event_shape[0] // 2
    layers = [(torch.randn(b, a), torch.randn(b)) for a, b in _widths(half, half)]
    x, grad = torch.randn(batch, half), torch.randn(batch, half)

    def run() -> None:
        for _ in range(COUPLINGS):
            bare(x, layers, grad)

    return run


def ours(objective: type[ReverseKL], gradient: str, energy: Energy, batch: int) -> Step:
    """Train by the public loop, with all of its checks; the last layer is a linear map."""
    dim = energy.event_shape[0]
    made = objective(energy, batch, gradient=gradient, beta_start=1.0)
    flow = NICE(dim, COUPLINGS, HIDDEN)
    return Trainer(flow, made, num_steps=10**9, lr=LR).step


def _loop(parameters: Any, loss: Callable[[], Tensor], fused: bool) -> Step:
    """Train by the loop in the documentation of the other libraries."""
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def with_normflows(score_fn: bool, fused: bool, energy: Energy, batch: int) -> Step:
    import normflows as nf

    class Density(nf.distributions.Target):  # type: ignore[misc]
        def log_prob(self, z: Tensor) -> Tensor:
            return -energy(z)

    dim = energy.event_shape[0]
    modes = ("channel", "channel_inv")
    parts = [
        nf.flows.AffineCouplingBlock(
            _net(dim // 2, dim - dim // 2), scale=False, split_mode=modes[k % 2]
        )
        for k in range(COUPLINGS)
    ]
    parts.append(nf.flows.AffineConstFlow((dim,)))
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(dim, trainable=False), parts, Density()
    )
    return _loop(model.parameters(), lambda: model.reverse_kld(batch, score_fn=score_fn), fused)


def with_zuko(fused: bool, energy: Energy, batch: int) -> Step:
    import zuko

    dim = energy.event_shape[0]
    flow = zuko.flows.NICE(
        dim,
        transforms=COUPLINGS,
        hidden_features=HIDDEN,
        activation=nn.SiLU,
        univariate=zuko.transforms.AdditiveTransform,
        shapes=((),),
    )
    scaled = zuko.flows.UnconditionalTransform(
        lambda shift, scale: zuko.transforms.DependentTransform(
            zuko.transforms.MonotonicAffineTransform(shift, scale), 1
        ),
        torch.zeros(dim),
        torch.zeros(dim),
    )
    flow = zuko.flows.Flow([scaled, *flow.transform.transforms], flow.base)

    def loss() -> Tensor:
        x, log_q = flow().rsample_and_log_prob((batch,))
        mean: Tensor = (log_q + energy(x)).mean()
        return mean

    return _loop(flow.parameters(), loss, fused)


class _ShiftAlone(nn.Module):
    """A network for AffineCoupling that returns a shift, and 0 as the logarithm of the scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = _net(inputs, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.net(x)
        return mean, torch.zeros_like(mean)


def with_pyro(energy: Energy, batch: int) -> Step:
    """Train AutoNormalizingFlow by SVI, with all particles in one batch."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormalizingFlow

    dim = energy.event_shape[0]

    def model() -> None:
        with pyro.poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.factor("energy", -energy(x))

    def transform(size: int) -> Any:
        parts: list[Any] = []
        for _ in range(COUPLINGS):
            parts += [
                dist.transforms.AffineCoupling(size // 2, _ShiftAlone(size // 2, size - size // 2)),
                dist.transforms.Permute(torch.arange(size).flip(0)),
            ]
        return dist.transforms.ComposeTransformModule(parts)

    pyro.clear_param_store()
    guide = AutoNormalizingFlow(model, transform)
    elbo = Trace_ELBO(num_particles=batch, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), elbo)
    svi.step()
    return svi.step


#: Library, what of it, how a step is made of an energy and the size of a batch; the limit comes
#: first.
CONTESTANTS: tuple[tuple[str, str, Callable[[Energy, int], Step]], ...] = (
    ("torch", "products and activations alone", products),
    ("pyroebm", "NICE, path gradient", functools.partial(ours, ReverseKL, "stl")),
    ("pyroebm", "NICE, total gradient", functools.partial(ours, ReverseKL, "total")),
    ("pyroebm", "NICE, compiled, path gradient", functools.partial(ours, CompiledKL, "stl")),
    ("pyroebm", "NICE, compiled, total gradient", functools.partial(ours, CompiledKL, "total")),
    (
        "normflows",
        "AffineCouplingBlock, reverse_kld without score",
        functools.partial(with_normflows, False, False),
    ),
    (
        "normflows",
        "AffineCouplingBlock, reverse_kld",
        functools.partial(with_normflows, True, False),
    ),
    (
        "normflows",
        "AffineCouplingBlock, reverse_kld, fused Adam",
        functools.partial(with_normflows, True, True),
    ),
    ("zuko", "NICE, additive", functools.partial(with_zuko, False)),
    ("zuko", "NICE, additive, fused Adam", functools.partial(with_zuko, True)),
    ("pyro", "SVI, AutoNormalizingFlow of AffineCoupling", with_pyro),
)
