"""Random numbers: explicit generators, seeds spawned by NumPy's SeedSequence, noise.

Noise is drawn on the device of its generator.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "draw_from",
    "drawing_from",
    "fresh_seed",
    "seeded_generator",
    "standard_normal",
    "subset",
    "uniform",
]

#: Minimum number of normal draws for which the transform of Box and Muller (1958) on whole tensors
#: is faster than torch.randn.
MANY = 1024

#: Held while state that all threads share is changed: torch's default generator is replaced, or a
#: model runs (Pyro's stack of effect handlers). One lock for both, since each is done within the
#: other.
LOCK = threading.RLock()


def fresh_seed(seed: int | None) -> int:
    """Return ``seed``, or a new one from the operating system if it is None.

    A run that records the returned seed can be repeated.
    """
    return int(np.random.SeedSequence(seed).entropy)  # type: ignore[arg-type]


def seeded_generator(
    seed: int, device: torch.device | str = "cpu", spawned: int | tuple[int, ...] | None = None
) -> torch.Generator:
    """Return a new generator, seeded from ``seed`` by ``numpy.random.SeedSequence``.

    torch's default generator is not changed.

    Args:
        seed: an integer of at least 0.
        device: device of the generator.
        spawned: number of a child of ``seed``; the streams of different children are independent. A
            tuple of numbers is a child of a child. None takes ``seed`` itself.
    """
    key = () if spawned is None else (spawned,) if isinstance(spawned, int) else spawned
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) % 2**63)


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw standard normal noise on the generator's device, and move it to ``device``.

    Args:
        shape: shape of the result.
        generator: source of randomness; None for torch's default one.
        dtype: floating-point type.
        device: device of the result.
    """
    where, shape = device if generator is None else generator.device, tuple(shape)
    count = math.prod(shape)
    if where.type != "cpu" or dtype != torch.float64 or count < MANY:
        return torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device)
    # torch.randn applies the same transform number by number, which takes three times as long
    u = torch.rand((2, (count + 1) // 2), generator=generator, dtype=dtype, device=where)
    radius, angle = torch.log1p(-u[0]).mul_(-2.0).sqrt_(), u[1].mul_(2.0 * math.pi)
    return (
        torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]
        .reshape(shape)
        .to(device)
    )


def uniform(
    shape: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw noise uniform on [0, 1) on the generator's device, and move it to ``device``.

    Args:
        shape: shape of the result.
        generator: source of randomness; None for torch's default one.
        dtype: floating-point type.
        device: device of the result.
    """
    where = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=where).to(device)


def subset(
    total: int, size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw ``size`` different integers below ``total``; all subsets are equally likely."""
    where = device if generator is None else generator.device
    return torch.randperm(total, generator=generator, device=where)[:size].to(device)


def draw_from(
    distribution: Distribution, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from a distribution of torch or Pyro, shape ``(num_samples, *event_shape)``.

    Such distributions take no generator. With a generator, torch's default generators are seeded
    from it during the draw, under a lock, and restored afterwards; another thread that draws from
    them at the same time is not reproducible. With None, torch's default generators are used as
    they are.
    """
    if generator is None:
        return distribution.sample(torch.Size([num_samples]))
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with LOCK, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return distribution.sample(torch.Size([num_samples]))


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Replace torch's default generator by ``generator`` in this context.

    It is for code that takes no generator. The default generator is restored at the end. None
    changes nothing. Only one thread at a time can be in this context.
    """
    if generator is None:
        yield
        return
    cuda = generator.device.type == "cuda"

    def get() -> Tensor:
        return torch.cuda.get_rng_state(generator.device) if cuda else torch.get_rng_state()

    def put(state: Tensor) -> None:
        torch.cuda.set_rng_state(state, generator.device) if cuda else torch.set_rng_state(state)

    with LOCK:
        outer = get()
        put(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(get())
            put(outer)
