"""Multi-layer perceptrons, and the activations and initial weights of all networks."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrizations

from pyroebm.core.rng import drawing_from

__all__ = [
    "ACTIVATIONS",
    "frozen",
    "mlp",
    "check_activation",
    "check_widths",
    "bound_by_spectral_norm",
    "initialize_weights",
]

#: Activations by name. ReLU is piecewise linear, so that the second derivatives of the energy are 0
#: almost everywhere; such energies warn.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze the parameters of a module in this context: no gradient is computed in them."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def mlp(
    in_features: int,
    out_features: int,
    hidden_sizes: Sequence[int],
    *,
    activation: str = "silu",
    spectral_norm: bool = False,
    zero_last: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    r"""Build a multi-layer perceptron, whose last layer is zero by default.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_sizes: widths of the hidden layers, at least one.
        activation: one of :data:`ACTIVATIONS`.
        spectral_norm: divide each hidden weight by its largest singular value (Miyato et al.,
            2018).
        zero_last: whether the last layer is initialized to zero, so that the network starts as the
            zero function.
        dtype: floating-point type of the parameters; None for torch's default.
        generator: source of the initial hidden weights, of variance 1 / fan-in (LeCun et al.,
            "Efficient BackProp", 1998): torch's default variance is a third of that, which makes a
            network of few inputs too smooth. None for torch's default one.

    Raises:
        ValueError: if ``hidden_sizes`` is empty or not positive, or if ``activation`` is unknown.

    Example:
        >>> mlp(2, 3, (8,))(torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """
    check_widths("hidden_sizes", hidden_sizes)
    check_activation(activation)
    widths = [in_features, *hidden_sizes, out_features]
    # skip_init, since the initialization of nn.Linear draws from torch's default generator
    linear = [
        nn.utils.skip_init(nn.Linear, a, b, dtype=dtype) for a, b in itertools.pairwise(widths)
    ]
    initialize_weights(linear, generator, zero_last)
    if spectral_norm:
        bound_by_spectral_norm(linear[:-1], generator)
    activate = ACTIVATIONS[activation]
    return nn.Sequential(
        linear[0], *itertools.chain.from_iterable((activate(), layer) for layer in linear[1:])
    )


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Check that widths of layers are positive.

    Raises:
        ValueError: if there are none, or if one is below 1.
    """
    if not widths or min(widths) < 1:
        raise ValueError(
            f"{name} must hold at least one positive width, got {name}={tuple(widths)}"
        )


def check_activation(activation: str) -> None:
    """Check that an activation is known.

    Raises:
        ValueError: otherwise.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got activation={activation!r}"
        )


def initialize_weights(
    layers: Sequence[nn.Module], generator: torch.Generator | None, zero_last: bool
) -> None:
    """Initialize weights uniformly with variance 1 / fan-in, the last layer to zero if asked."""
    for layer in layers:
        weight, *bias = layer.parameters()
        bound = math.sqrt(3.0 / weight[0].numel())
        for parameter in (weight, *bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    if zero_last:
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)


def bound_by_spectral_norm(layers: Sequence[nn.Module], generator: torch.Generator | None) -> None:
    """Apply spectral normalization to layers; its power iteration starts from random vectors."""
    with drawing_from(generator):
        for layer in layers:
            parametrizations.spectral_norm(layer)
