"""NICE for energies: a volume-preserving network, an invertible matrix, and redundant latents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyroebm.flows.coupling import AdditiveCoupling
from pyroebm.flows.flow import Flow
from pyroebm.flows.linear import PLULinear, Shift
from pyroebm.flows.networks import LOG_2PI, ConditionalGaussian
from pyroebm.randomness import seeded_generator

__all__ = ["NICE", "RedundantNICE"]


class RedundantNICE(Flow):
    r"""NICE with redundant latents: :math:`(x, y) = S F(z) + c`, z standard normal in :math:`R^D`.

    F is a chain of additive couplings (:class:`AdditiveCoupling`; Dinh, Krueger and Bengio, "NICE: Non-linear Independent
    Components Estimation", 2014), so its determinant is 1; S is an invertible matrix (:class:`PLULinear`):

    .. math:: \log q(x, y) = \log N(z \mid 0, I) - \log |\det S|

    A map that preserves volume carries the heights of the normal to x as they are, so it cannot fit most targets alone
    (D = d). With D > d the Gaussian of y given x may be wide where q(x) is high: the marginal of x becomes flexible.

    A fresh flow is :math:`(x, y) = z`, and its :math:`N(y \mid M(x), \Sigma(x))` is standard.

    Args:
        dim: d, entries of x (1 for a scalar energy).
        total_dim: D; equal to ``dim`` there are no latents, as in :class:`NICE`.
        couplings: number of additive couplings, alternating; none where D = 1, which has nothing to couple.
        hidden: widths of the hidden layers of every network.
        shift: learn c; without it c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        dtype: of the parameters (default torch's).
        seed: of the initial hidden weights; torch's global generator is not used.

    Raises:
        ValueError: if a number is out of range or an activation unknown.

    Example:
        >>> flow = RedundantNICE(dim=1, total_dim=2)
        >>> xy = flow().sample((5,))
        >>> xy.shape, flow.log_prob_x(xy[:, :1]).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        total_dim: int,
        couplings: int = 6,
        hidden: Sequence[int] = (64, 64),
        shift: bool = True,
        *,
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if couplings < 0:
            raise ValueError(f"couplings must not be negative, got couplings={couplings}")
        if not 1 <= dim <= total_dim:
            raise ValueError(f"dim and total_dim must satisfy 1 <= dim <= total_dim, got dim={dim}, total_dim={total_dim}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        generator = seeded_generator(seed)
        layers: list[Any] = [
            AdditiveCoupling(total_dim, flip=bool(k % 2), hidden=hidden, activation=activation, dtype=dtype, generator=generator)
            for k in range(couplings if total_dim > 1 else 0)
        ]
        layers.append(PLULinear(torch.eye(total_dim, dtype=dtype)))
        if shift:
            layers.append(Shift(torch.zeros(total_dim, dtype=dtype)))
        conditional = None
        if total_dim > dim:
            conditional = ConditionalGaussian(
                dim, total_dim - dim, hidden, activation=activation, dtype=dtype, generator=generator
            )
        super().__init__(layers, dim, total_dim, conditional)
        self._config = {
            "dim": dim,
            "total_dim": total_dim,
            "couplings": couplings,
            "hidden": list(hidden),
            "shift": shift,
            "activation": activation,
            "seed": seed,
        }

    @property
    def linear(self) -> PLULinear:
        """The layer of S."""
        return next(part for part in self.transform.parts if isinstance(part, PLULinear))

    def log_abs_det(self) -> Tensor:
        r""":math:`\log|\det S|`, that of the whole map z to (x, y), a scalar."""
        return self.linear.log_abs_det()

    def joint_entropy(self) -> Tensor:
        r"""Entropy of (x, y) in nats: :math:`\log|\det S| + \tfrac D2 (1 + \log 2\pi)`, a scalar."""
        return self.log_abs_det() + 0.5 * self.total_dim * (1.0 + LOG_2PI)

    def entropy(self) -> Tensor:
        r"""Entropy of x in nats, :math:`\log|\det S| + H(z)`, a scalar: for D = d.

        Raises:
            NotImplementedError: for D > d, where x is a marginal of the flow and only the joint has a closed form.
        """
        if self.total_dim > self.dim:
            raise NotImplementedError(
                f"H(x) = log|det S| + H(z) holds for total_dim = dim; here dim={self.dim}, total_dim={self.total_dim}: x is a"
                " marginal of the flow. joint_entropy() is that of (x, y); average -log_prob_x(x) over draws for that of x"
            )
        return self.joint_entropy()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON can hold them; with the state_dict it is the whole flow."""
        return {**self._config, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A fresh flow from what :meth:`config` gave."""
        return cls(**{**config, "dtype": getattr(torch, config["dtype"])})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of the state_dict, with the class and :meth:`config` in its metadata.

        Args:
            path: the file, usually ``*.safetensors``; overwritten.
        """
        metadata = {"class": type(self).__name__, "config": json.dumps(self.config())}
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """The flow that :meth:`save` wrote; no pickle is read.

        Args:
            path: the file.
            device: where to.

        Raises:
            ValueError: if the file holds no flow, or one of another class.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("class") != cls.__name__ or "config" not in metadata:
                raise ValueError(f"{path} must hold a flow of class {cls.__name__}, its metadata name {metadata.get('class')!r}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        flow = cls.from_config(json.loads(metadata["config"])).to(device)
        flow.load_state_dict(state)
        return flow


class NICE(RedundantNICE):
    r"""NICE for an energy: :math:`x = S F(z) + c`, the case D = d of :class:`RedundantNICE`, with the same methods.

    .. math:: \log q(x) = \log N(z \mid 0, I) - \log|\det S|, \qquad H(x) = \log|\det S| + H(z)

    In one dimension there is nothing to couple: x = S z + c is a Gaussian.

    Args:
        dim: d, entries of x.
        couplings: number of additive couplings, alternating; none where d = 1.
        hidden: widths of their networks' hidden layers.
        shift: learn c; without it c = 0.
        activation: ``"silu"`` or ``"tanh"``.
        dtype: of the parameters (default torch's).
        seed: of the initial hidden weights; torch's global generator is not used.

    Raises:
        ValueError: if a number is out of range or an activation unknown.

    Example:
        >>> flow = NICE(dim=3)
        >>> flow.entropy().detach()
        tensor(4.2568)
    """

    def __init__(
        self,
        dim: int,
        couplings: int = 6,
        hidden: Sequence[int] = (64, 64),
        shift: bool = True,
        *,
        activation: str = "silu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, dim, couplings, hidden, shift, activation=activation, dtype=dtype, seed=seed)
        del self._config["total_dim"]
