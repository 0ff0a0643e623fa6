"""The one choke point of randomness: explicit generators, seeds spread by NumPy's SeedSequence,
noise drawn where they live."""

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

#: Normal numbers from which on the transform of Box and Muller (1958) is worth its few operations.
MANY = 1024

#: Held while torch's default generator stands in for another one.
_LOCK = threading.RLock()


def fresh_seed(seed: int | None) -> int:
    """``seed``, or one from the operating system in place of None: written down, it repeats the
    run."""
    return int(np.random.SeedSequence(seed).entropy)  # type: ignore[arg-type]


def seeded_generator(
    seed: int, device: torch.device | str = "cpu", spawned: int | tuple[int, ...] | None = None
) -> torch.Generator:
    """A new generator whose stream is spread from ``seed`` by ``numpy.random.SeedSequence``;
    torch's global one is untouched.

    ``spawned`` takes the child of that number in place of ``seed`` itself: as many independent
    streams as there are numbers. Of a tuple of numbers it takes the child of the child.
    """
    key = () if spawned is None else (spawned,) if isinstance(spawned, int) else spawned
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) % 2**63)


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Normal noise on ``device``, drawn where the generator lives (None: torch's global one)."""
    where, shape = device if generator is None else generator.device, tuple(shape)
    count = math.prod(shape)
    if where.type != "cpu" or dtype != torch.float64 or count < MANY:
        return torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device)
    # What torch.randn does too, number by number; whole tensors take a third of its time.
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
    """Noise uniform on [0, 1) on ``device``, drawn where the generator lives (None: torch's global
    one)."""
    where = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=where).to(device)


def subset(
    total: int, size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """``size`` different numbers below ``total``, each such set equally likely, drawn where the
    generator lives."""
    where = device if generator is None else generator.device
    return torch.randperm(total, generator=generator, device=where)[:size].to(device)


def draw_from(
    distribution: Distribution, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws of a distribution of torch or Pyro, ``(num_samples, *event_shape)``.

    Such distributions take no generator. With one, torch's default generators are seeded from it
    for the time of the draw, under a lock, and put back: another thread that draws from them
    meanwhile is not reproducible. None draws from them as they are.
    """
    if generator is None:
        return distribution.sample(torch.Size([num_samples]))
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with _LOCK, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return distribution.sample(torch.Size([num_samples]))


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """For code that takes no generator: inside, torch's default one continues the stream of
    ``generator``.

    Outside it is as before; None leaves it alone. One thread at a time is inside.
    """
    if generator is None:
        yield
        return
    cuda = generator.device.type == "cuda"

    def get() -> Tensor:
        return torch.cuda.get_rng_state(generator.device) if cuda else torch.get_rng_state()

    def put(state: Tensor) -> None:
        torch.cuda.set_rng_state(state, generator.device) if cuda else torch.set_rng_state(state)

    with _LOCK:
        outer = get()
        put(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(get())
            put(outer)
