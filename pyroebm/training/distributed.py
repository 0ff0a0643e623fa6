"""Distributed runs with ``torchrun``: chain batches, shares of batches, averaged gradients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "average_gradients",
    "connected_ranks",
    "gather_bytes",
    "process_group",
    "ranks",
    "same_start",
]


def ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of processes.

    They come from ``torch.distributed`` if it is initialized, else from the environment variables
    of ``torchrun``. With ``ranks=ranks()`` :class:`pyroebm.MCMC` distributes its chain batches over
    the processes. Draws do not depend on the number of processes. Each process writes its own part
    of the store.

    Example:
        >>> import tempfile
        >>> from pyroebm import MALA, MCMC, open_run
        >>> from pyroebm.targets import DoubleWell
        >>> with tempfile.TemporaryDirectory() as folder:  # the same script in each process
        ...     mcmc = MCMC(MALA(), 10, 10, num_chains=128, seed=0, ranks=ranks())
        ...     mcmc.run(DoubleWell(), store=folder)
        ...     open_run(folder).posterior["x"].shape
        (128, 10)
    """
    if _connected():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Initialize the process group of ``torchrun``, and destroy it afterwards.

    Within the context :func:`pyroebm.training.fit` trains in all processes. The backends are gloo
    for CPU tensors and nccl for GPU tensors; each process uses the GPU of its local rank. In a
    process that ``torchrun`` did not start, or if a group exists already, the context does nothing.

    Yields:
        The rank of this process, and the number of processes.

    Example:
        >>> with process_group() as (rank, world):
        ...     rank, world
        (0, 1)
    """
    if "RANK" not in os.environ or _connected():
        yield ranks()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # Imported before the group exists: the default arguments of its functions would otherwise hold
    # the group and its threads until the interpreter exits, which then aborts.
    from torch.distributed.nn import functional  # noqa: F401

    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield ranks()
        # no process leaves the group while another still communicates
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def connected_ranks() -> tuple[int, int]:
    """Return :func:`ranks` if a process group is initialized, else ``(0, 1)``."""
    return ranks() if _connected() else (0, 1)


def same_start(parameters: Sequence[nn.Parameter]) -> None:
    """Broadcast the parameters of the first process to all."""
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, 0)


def average_gradients(
    parameters: Sequence[nn.Parameter], metrics: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    r"""Average gradients, in place, and metrics over the processes.

    .. math:: \bar g = \sum_r w_r g_r \Big/ \sum_r w_r

    With the number of rows of each share as weights, the gradient of a mean over rows is that of
    one process with all rows. ``DistributedDataParallel`` is not used, since it supports neither
    parameters without a gradient (an additive constant in score matching) nor double backward.
    A parameter without a gradient in all processes has none afterwards.

    Args:
        parameters: the parameters, in the same order in each process.
        metrics: metrics of any shape, with the same names in each process.
        weight: w of this process.

    Returns:
        The averaged metrics.
    """
    for dtype, device in sorted({(p.dtype, p.device) for p in parameters}, key=str):
        own = [p for p in parameters if (p.dtype, p.device) == (dtype, device)]
        has_gradient = torch.tensor([p.grad is not None for p in own], dtype=dtype, device=device)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own]
        )
        *summed, has_gradient, total = _sum_over_processes(
            [weight * flat, has_gradient, flat.new_tensor(weight)]
        )
        for p, grad, anywhere in zip(
            own, (summed[0] / total).split([p.numel() for p in own]), has_gradient > 0, strict=True
        ):
            p.grad = grad.reshape(p.shape) if bool(anywhere) else None
    names = sorted(metrics)
    if not names:
        return {}
    device = metrics[names[0]].device
    numbers = [weight * metrics[name].to(device, torch.float64) for name in names]
    *values, total = _sum_over_processes(
        [*numbers, torch.tensor(weight, dtype=torch.float64, device=device)]
    )
    return {
        name: (value / total).to(metrics[name].dtype)
        for name, value in zip(names, values, strict=True)
    }


def gather_bytes(data: bytes, device: torch.device | str = "cpu") -> list[bytes]:
    """Gather the data of all processes, in the order of their ranks.

    They are sent as tensors on ``device``.
    """
    _, world = connected_ranks()
    if world == 1:
        return [data]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    torch.distributed.all_gather(sizes, torch.tensor([len(own)], device=device))
    longest = int(torch.cat(sizes).max())
    parts = [own.new_empty(longest) for _ in range(world)]
    torch.distributed.all_gather(parts, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [
        part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
    ]


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_processes(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over all processes, in one message."""
    flat = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(flat)
    return [
        total.reshape(part.shape)
        for total, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    ]
