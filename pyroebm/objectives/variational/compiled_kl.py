"""The reverse KL divergence of a flow, with loss and gradient compiled as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyroebm.core._torch_private import held_by, multiply_each
from pyroebm.core.compilation import compiled_call
from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow
from pyroebm.objectives.variational.reverse_kl import ReverseKL, estimate_kl, kl_summands

__all__ = ["CompiledKL"]


class CompiledKL(ReverseKL):
    r"""The bound :math:`J_R` of :class:`ReverseKL`, compiled by TorchInductor with its gradient.

    The numbers are those of :class:`ReverseKL`. For small flows most of the time of a step is the
    overhead of automatic differentiation, which is removed by tracing once. Compiling takes about
    half a minute for each flow, energy and number of draws, and pays from about ten thousand steps
    on.

    The graph reads the parameters and buffers of the flow and the energy, so in-place changes take
    effect. It is compiled again if one of them or a submodule is replaced, if ``requires_grad``
    changes, and on switching between training and evaluation mode. Other changes have no effect
    after tracing: attributes, such as the ``steps`` of :class:`~pyroebm.flows.EquivariantFlow`,
    branches in Python code, a new ``.data`` of a tensor that is not trained, as by
    ``energy.double()``, and hooks. Only the parameters of the flow have a gradient, and there are
    no second derivatives.

    Args:
        energy: as in :class:`ReverseKL`.
        num_samples: as in :class:`ReverseKL`.
        gradient: as in :class:`ReverseKL`.
        beta_start: as in :class:`ReverseKL`.
        anneal: as in :class:`ReverseKL`.

    Raises:
        ValueError: as :class:`ReverseKL`.
        RuntimeError: when called, if the flow or the energy cannot be traced or compiled.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> objective = CompiledKL(Gaussian(torch.zeros(2)))  # compiles at the first loss
    """

    # the last compiled graph, with its key and the tensors that it reads
    _cached: (
        tuple[tuple[Any, ...], list[Tensor], _Traced, Callable[..., tuple[Tensor, ...]]] | None
    ) = None

    def estimate(self, flow: Flow, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute what :meth:`ReverseKL.estimate` returns by the compiled graph."""
        modules, tensors = held_by(flow, self.energy)
        switches = (
            [module.training for module in modules],
            [tensor.requires_grad for tensor in tensors],
        )
        key = (modules, switches, [*map(id, tensors)], z.shape, z.dtype, z.device, z.requires_grad)
        if self._cached is None or self._cached[0] != key:
            with torch.no_grad():
                # an energy may cache what it computes at its first call: outside of tracing
                kl_summands(flow, self.energy, z)
            traced = _Traced(flow, self.energy, self.gradient)
            # keep the tensors alive, so that their ids are not reused
            self._cached = key, tensors, traced, traced.compiled(z, z.new_tensor(self.beta))
        _, _, traced, call = self._cached
        loss, terms, extended, xy, *gradients = call(
            z.detach(), z.new_tensor(self.beta), *(p.detach() for p in traced.trained)
        )
        # a base with parameters is sampled outside the graph, so z needs a gradient too
        sought = [*traced.trained, z] if z.requires_grad else traced.trained
        return _WithGradient.apply(loss, gradients, *sought), terms, extended, xy


class _Traced(nn.Module):
    """The estimate as a pure function of noise, inverse temperature and trained parameters."""

    def __init__(self, flow: Flow, energy: Energy, gradient: str) -> None:
        super().__init__()
        self.flow = flow
        self.energy = energy
        self.gradient = gradient
        trained = {f"flow.{name}": p for name, p in flow.named_parameters() if p.requires_grad}
        self.names, self.trained = list(trained), list(trained.values())

    def compiled(self, z: Tensor, beta: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                inputs = (z, beta, *self.trained)
                examples = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
                # no limit on the vector width: rows of hidden units fill the widest registers
                return compiled_call(self.gradients, tuple(examples), options={})
        # tracing and compiling raise exceptions of many types
        except Exception as error:
            names = f"{type(self.flow).__name__} with {type(self.energy).__name__}"
            raise RuntimeError(
                f"{names} cannot be compiled; use ReverseKL, which computes the same numbers"
            ) from error

    def gradients(self, z: Tensor, beta: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.functional_call(
            self, dict(zip(self.names, parameters, strict=True)), (z, beta)
        )
        sought = [*parameters, z] if z.requires_grad else parameters
        gradients = torch.autograd.grad(found[0], sought, materialize_grads=True)
        return *(tensor.detach() for tensor in found), *gradients

    def forward(self, z: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return estimate_kl(self.flow, _Scaled(self.energy, beta), z, self.gradient)


class _Scaled(Energy):
    r"""The energy :math:`\beta E` with the inverse temperature an input of the graph."""

    def __init__(self, energy: Energy, beta: Tensor) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy, self.beta = energy, beta

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * self.energy(x)


class _WithGradient(torch.autograd.Function):
    """A loss with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *sought: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *multiply_each(ctx.gradients, out[0])
