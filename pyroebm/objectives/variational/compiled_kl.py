"""The reverse KL divergence of a flow with its gradient as one compiled graph."""

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
    r"""The bound :math:`J_R` of :class:`ReverseKL` by TorchInductor: loss, metrics and gradient in
    one call, of the same numbers.

    A step of a small flow is mostly the bookkeeping of automatic differentiation, which is done
    once here, while tracing. What it takes to compile, about half a minute, is paid once for each
    flow, energy and number of draws: worth it from some ten thousand steps on. The graph reads the
    parameters and buffers of the flow and the energy, so that changing them in place is seen. It is
    made anew where one of them or a module is replaced, where what is trained changes, and between
    training and evaluation. What else Python decided while tracing (attributes, such as the
    ``steps`` of :class:`~pyroebm.flows.EquivariantFlow`, and branches) is not looked at again, nor
    another ``.data`` of a tensor that is not trained, as ``energy.double()`` puts there; and hooks,
    such as counters of calls, do not run. The gradient is that in the flow's parameters alone, and
    there are no second derivatives.

    Args:
        energy, num_samples, entropy, gradient, beta_start, anneal: as in :class:`ReverseKL`.

    Raises:
        ValueError: as :class:`ReverseKL`.
        RuntimeError: when called, if the flow or the energy cannot be traced or compiled.

    Example:
        >>> from pyroebm.targets import Gaussian
        >>> objective = CompiledKL(Gaussian(torch.zeros(2)))  # compiles at the first loss
    """

    # the last graph, with what it was made of
    _known: (
        tuple[tuple[Any, ...], list[Tensor], _Traced, Callable[..., tuple[Tensor, ...]]] | None
    ) = None

    def estimate(self, flow: Flow, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        modules, tensors = held_by(flow, self.energy)
        switches = (
            [module.training for module in modules],
            [tensor.requires_grad for tensor in tensors],
        )
        key = (modules, switches, [*map(id, tensors)], z.shape, z.dtype, z.device, z.requires_grad)
        if self._known is None or self._known[0] != key:
            with torch.no_grad():
                # what an energy computes once is computed before
                kl_summands(flow, self.energy, z, self.entropy)
            traced = _Traced(flow, self.energy, self.entropy, self.gradient)
            # the tensors stay alive with the graph, so that no other gets the id of one
            self._known = key, tensors, traced, traced.compiled(z, z.new_tensor(self.beta))
        _, _, traced, call = self._known
        loss, terms, extended, xy, *gradients = call(
            z.detach(), z.new_tensor(self.beta), *(p.detach() for p in traced.trained)
        )
        # a base with parameters draws outside the graph, so that z has a gradient too
        sought = [*traced.trained, z] if z.requires_grad else traced.trained
        return _WithGradient.apply(loss, gradients, *sought), terms, extended, xy


class _Traced(nn.Module):
    """The estimate as a function of noise, inverse temperature and trained parameters, which it
    puts in place of the flow's."""

    def __init__(self, flow: Flow, energy: Energy, entropy: str, gradient: str) -> None:
        super().__init__()
        self.flow = flow
        self.energy = energy
        self.options = entropy, gradient
        trained = {f"flow.{name}": p for name, p in flow.named_parameters() if p.requires_grad}
        self.names, self.trained = list(trained), list(trained.values())

    def compiled(self, z: Tensor, beta: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                inputs = (z, beta, *self.trained)
                examples = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
                # rows of hidden units fill the widest registers
                return compiled_call(self.gradients, tuple(examples), options={})
        # tracing and compiling fail in as many ways as there are flows, energies and machines
        except Exception as error:
            names = f"{type(self.flow).__name__} with {type(self.energy).__name__}"
            raise RuntimeError(
                f"{names} cannot be compiled; use ReverseKL, of the same numbers"
            ) from error

    def gradients(self, z: Tensor, beta: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.functional_call(
            self, dict(zip(self.names, parameters, strict=True)), (z, beta)
        )
        sought = [*parameters, z] if z.requires_grad else parameters
        gradients = torch.autograd.grad(found[0], sought, materialize_grads=True)
        return *(tensor.detach() for tensor in found), *gradients

    def forward(self, z: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return estimate_kl(self.flow, _Scaled(self.energy, beta), z, *self.options)


class _Scaled(Energy):
    """:math:`\\beta E` with an inverse temperature that is an input of the graph."""

    def __init__(self, energy: Energy, beta: Tensor) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy, self.beta = energy, beta

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * self.energy(x)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *sought: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *multiply_each(ctx.gradients, out[0])
