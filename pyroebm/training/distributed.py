"""One run in several processes, as ``torchrun`` starts them: blocks of chains, shares of batches,
averaged gradients."""

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
    """The number of this process and of all: from ``torch.distributed`` if it is initialised, else
    as ``torchrun`` set them.

    Given to :class:`pyroebm.MCMC`, they divide a run's blocks among the processes. No draw depends
    on that, and none is sent: each process writes its own parts, which open as one.

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
    """Within it the processes of ``torchrun`` can talk to each other, and
    :func:`pyroebm.training.fit` trains with all of them.

    Tensors on CPUs go through gloo, those on GPUs through nccl, each process with the GPU of its
    local number. In a process that ``torchrun`` did not start, or where a group is there already,
    it does nothing.

    Yields:
        the number of this process, and of all.

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
    # Before the group: its functions take the group that is there at import as their default and
    # so keep it, and its threads, to the end of the interpreter, where they abort the process.
    from torch.distributed.nn import functional  # noqa: F401

    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield ranks()
        # none leaves while another still listens to it
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def connected_ranks() -> tuple[int, int]:
    """:func:`ranks` of processes that can talk to each other; a process that cannot is the only
    one."""
    return ranks() if _connected() else (0, 1)


def same_start(parameters: Sequence[nn.Parameter]) -> None:
    """Give all processes the parameters of the first."""
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, 0)


def average_gradients(
    parameters: Sequence[nn.Parameter], metrics: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    r"""Replace gradients by :math:`\sum_r w_r g_r / \sum_r w_r` over the processes r, and give the
    metrics averaged likewise.

    With the rows of each share as weights, the gradient of a mean over rows is that of one process
    with all rows. It is not ``DistributedDataParallel``, whose hooks never hear of a parameter
    without gradient (an additive constant under score matching) nor of gradients within gradients.
    A parameter without gradient in all processes stays without.

    Args:
        parameters: the same, in the same order, in each process.
        metrics: numbers by the same names in each process, of any shape.
        weight: w of this process.
    """
    for dtype, device in sorted({(p.dtype, p.device) for p in parameters}, key=str):
        own = [p for p in parameters if (p.dtype, p.device) == (dtype, device)]
        there = torch.tensor([p.grad is not None for p in own], dtype=dtype, device=device)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own]
        )
        *summed, there, total = _summed([weight * flat, there, flat.new_tensor(weight)])
        for p, grad, somewhere in zip(
            own, (summed[0] / total).split([p.numel() for p in own]), there > 0, strict=True
        ):
            p.grad = grad.reshape(p.shape) if bool(somewhere) else None
    names = sorted(metrics)
    if not names:
        return {}
    device = metrics[names[0]].device
    numbers = [weight * metrics[name].to(device, torch.float64) for name in names]
    *values, total = _summed([*numbers, torch.tensor(weight, dtype=torch.float64, device=device)])
    return {
        name: (value / total).to(metrics[name].dtype)
        for name, value in zip(names, values, strict=True)
    }


def gather_bytes(data: bytes, device: torch.device | str = "cpu") -> list[bytes]:
    """What each process gives, in the order of their numbers; ``device`` is that of the tensors
    which carry it."""
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


def _summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """The sum over all processes of each part, in one message."""
    flat = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(flat)
    return [
        total.reshape(part.shape)
        for total, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    ]
