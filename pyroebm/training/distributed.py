"""Distributed runs with ``torchrun``: chain batches, shares of batches, averaged gradients."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "ProcessError",
    "agree",
    "average_gradients",
    "connected_ranks",
    "gather_bytes",
    "process_group",
    "ranks",
    "reason_of_end",
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


STOPPED = (
    "process {} gave no sign of life for {:g} s: it is stopped, or its machine is not reachable"
)


class ProcessError(RuntimeError):
    """Another process of the group failed, was killed or is stopped, and this one ends with it.

    Example:
        >>> raise ProcessError("process 1 failed at step 3: ValueError: ...")
        Traceback (most recent call last):
        pyroebm.training.distributed.ProcessError: process 1 failed at step 3: ValueError: ...
    """


class _Watch:
    """Signs of life of all processes, in the store of ``torchrun``.

    Collectives of gloo wait for a process that is stopped, or that takes no part because of an
    error, without end.

    Args:
        rank: of this process.
        world: number of processes.
        timeout: seconds without a sign of life after which a process counts as stopped.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.period = min(1.0, timeout / 5.0)
        #: Why the group cannot continue; None while it can.
        self.failure: str | None = None
        #: The processes that wait at the end of :func:`process_group`.
        self.left: list[int] = []
        #: Whether a collective was left while it waits for another process.
        self.pending = False
        self._prefix = f"pyroebm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=timeout),
        )
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        beats, seen = 0, {other: (b"", time.monotonic()) for other in range(self.world)}
        del seen[self.rank]
        while self.failure is None and not self._ended.wait(self.period):
            beats += 1
            try:
                self._set(f"alive/{self.rank}", str(beats))
                reason = self._get("failed")
                self.left = [other for other in seen if self._get(f"left/{other}")]
                for other, (before, since) in seen.items():
                    beat = self._get(f"alive/{other}")
                    if beat != before:
                        seen[other] = beat, time.monotonic()
                    elif time.monotonic() - since > self.timeout:
                        reason = reason or STOPPED.format(other, self.timeout).encode()
                if reason:
                    self._set(f"seen/{self.rank}", "yes")
            except RuntimeError:  # the store has ended with its process
                reason = b"the store of the processes is not reachable: process 0 has ended"
            if reason:
                self.failure = reason.decode()

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(f"{self._prefix}/{key}", value)

    def _get(self, key: str) -> bytes:
        with self._lock:
            key = f"{self._prefix}/{key}"
            return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def fail(self, reason: str) -> None:
        """Tell all processes why this one ends, and wait until they have read it."""
        with contextlib.suppress(RuntimeError):
            self._set("failed", reason)
            others = [f"seen/{k}" for k in range(self.world) if k != self.rank]
            end = time.monotonic() + 3.0 * self.period
            while time.monotonic() < end and not all(map(self._get, others)):
                time.sleep(0.1 * self.period)

    def wait(self, work: torch.distributed.Work, last: bool = False) -> None:
        """Wait for a collective; raise ProcessError if another process cannot take part.

        Args:
            work: the collective.
            last: whether it is that of processes which leave the group.
        """
        begin = time.monotonic()
        while not work.is_completed():
            try:
                work.wait(datetime.timedelta(seconds=self.period))
            except RuntimeError:  # it takes longer, or has failed
                failure = self.failure
                if not last and self.left and time.monotonic() - begin > self.timeout:
                    failure = f"process {self.left[0]} left the group, and this one did not"
                if failure is not None and not work.is_completed():
                    self.pending = True
                    raise ProcessError(failure) from None
        try:
            work.wait()
        except RuntimeError as error:
            reason = self.reason() or f"another process has ended: {error}"
            raise ProcessError(reason) from error

    def reason(self) -> str | None:
        """Return why the group cannot continue, which may come after the end of a connection."""
        end = time.monotonic() + 2.0 * self.period
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.1 * self.period)
        return self.failure

    def leave(self) -> None:
        """Tell the others that this process leaves the group, and wait until they do."""
        self._set(f"left/{self.rank}", "yes")
        self.wait(torch.distributed.barrier(async_op=True), last=True)

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()


#: The watch of the group of :func:`process_group`, if there is one.
_watch: _Watch | None = None


@contextlib.contextmanager
def process_group(timeout: float = 20.0) -> Iterator[tuple[int, int]]:
    """Initialize the process group of ``torchrun``, and destroy it afterwards.

    Within the context :func:`pyroebm.training.fit` trains in all processes. The backends are gloo
    for CPU tensors and nccl for GPU tensors; each process uses the GPU of its local rank. In a
    process that ``torchrun`` did not start, or if a group exists already, the context does nothing.

    If a process raises an error, leaves the training, is killed or is stopped, the others raise
    :class:`ProcessError` with the reason.

    Args:
        timeout: seconds without a sign of life after which a process counts as stopped. A process
            that computes gives signs of life.

    Yields:
        The rank of this process, and the number of processes.

    Raises:
        ProcessError: if another process fails.

    Example:
        >>> with process_group() as (rank, world):
        ...     rank, world
        (0, 1)
    """
    global _watch
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
    watch = _watch = _Watch(*ranks(), timeout)
    try:
        yield ranks()
        # no process leaves the group while another still communicates
        watch.leave()
    except BaseException as error:
        if not isinstance(error, ProcessError):
            watch.fail(f"process {watch.rank} failed: {type(error).__name__}: {error}")
        raise
    finally:
        watch.end()
        _watch = None
        if watch.pending:
            # The group waits for its collective when it is destroyed, and when Python exits.
            atexit.register(_exit_at_once)
        else:
            torch.distributed.destroy_process_group()


def _exit_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _finish(work: torch.distributed.Work | None, device: str = "cpu") -> None:
    """Wait for a collective of tensors on a device."""
    if work is None:
        return
    if _watch is None or device != "cpu":  # nccl has a watch of its own
        work.wait()
    else:
        _watch.wait(work)


def reason_of_end() -> str | None:
    """Return the reason that a process gave for its end, if one comes soon."""
    return None if _watch is None else _watch.reason()


def agree(code: int) -> list[int]:
    """Exchange a number with all processes, and return those of all.

    Each step of a training begins with it, so that a process that fails or ends the training meets
    the others in the same collective.
    """
    rank, world = connected_ranks()
    codes = torch.zeros(world, dtype=torch.int64)
    codes[rank] = code
    if torch.distributed.get_backend() == "nccl":
        codes = codes.cuda()
    _all_reduce(codes)
    return [int(code) for code in codes]


def _all_reduce(tensor: Tensor) -> None:
    work = torch.distributed.all_reduce(tensor, async_op=True)
    _finish(work, tensor.device.type)


def connected_ranks() -> tuple[int, int]:
    """Return :func:`ranks` if a process group is initialized, else ``(0, 1)``."""
    return ranks() if _connected() else (0, 1)


def same_start(parameters: Sequence[nn.Parameter]) -> None:
    """Broadcast the parameters of the first process to all."""
    for parameter in parameters:
        work = torch.distributed.broadcast(parameter.data, 0, async_op=True)
        _finish(work, parameter.device.type)


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
    length = torch.tensor([len(own)], device=device)
    _finish(torch.distributed.all_gather(sizes, length, async_op=True), own.device.type)
    longest = int(torch.cat(sizes).max())
    parts = [own.new_empty(longest) for _ in range(world)]
    padded = torch.cat([own, own.new_zeros(longest - len(own))])
    _finish(torch.distributed.all_gather(parts, padded, async_op=True), own.device.type)
    return [
        part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
    ]


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_processes(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over all processes, in one message."""
    flat = torch.cat([part.flatten() for part in parts])
    _all_reduce(flat)
    return [
        total.reshape(part.shape)
        for total, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    ]
