"""Training in two processes: averaged gradients are those of one, each has chains of its own, and a
resumed run is the same."""

from __future__ import annotations

import functools
import json
import os
import re
import signal  # noqa: F401 - this and the next are used by FAILS
import socket  # noqa: F401
import subprocess
import sys
import textwrap
import time  # noqa: F401
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pyroebm.energies import BernoulliRBM, MLPEnergy
from pyroebm.kernels import ULA
from pyroebm.objectives import Centering, ExactLikelihood, ReplayBufferCD
from pyroebm.training import Batches, Guard, distributed, fit, fit_steps, read_log

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)
# the last batch is uneven
BITS = (torch.rand(23, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) < 0.4).to(F64)


def rbm(seed: int = 0) -> BernoulliRBM:
    weight = 0.3 * torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return BernoulliRBM(4, 3, weight=weight, dtype=F64)


def exactly(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """A training whose loss is a mean over rows, and its metrics."""
    machine = rbm(seed)
    history = fit(
        machine, ExactLikelihood(), BITS, num_steps=9, batch_size=10, optimizer=SGD, **options
    )
    return {
        **machine.state_dict(),
        "log_likelihood": torch.from_numpy(history["log_likelihood"]),
    }


def centered() -> dict[str, Tensor]:
    """Gradients of means over rows, transformed by offsets that are means over rows."""
    machine, centering = rbm(), Centering(rate=0.3)
    loss = ExactLikelihood()
    fit(machine, Means(loss), BITS, num_steps=6, batch_size=10, optimizer=SGD, transform=centering)
    return {**machine.state_dict(), **centering.state_dict()}


class Means(torch.nn.Module):
    """The exact likelihood, saying the mean units that :class:`Centering` reads."""

    def __init__(self, inner: ExactLikelihood) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, energy: BernoulliRBM, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.inner(energy, batch)
        hidden = torch.sigmoid(batch @ energy.weight + energy.hidden_bias).detach()
        return loss, metrics | {"mean_0": batch.mean(0), "mean_1": hidden.mean(0)}


def chained(
    folder: Path | None, steps: int = 12, stop: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Persistent chains with a buffer, a guard, a checkpoint and a log."""
    energy = MLPEnergy(
        (2,), (8,), scale=2.0, dtype=F64, generator=torch.Generator().manual_seed(seed)
    )
    objective = ReplayBufferCD(5, 2, ULA(0.3), buffer_size=20, restart=0.1)
    data = torch.randn(30, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = (
        {}
        if folder is None
        else {"checkpoint": folder / "run.safetensors", "log": folder / "run.jsonl"}
    )
    run = fit_steps(
        energy,
        objective,
        data,
        num_steps=steps,
        batch_size=8,
        resume=folder is not None,
        guard=Guard(rollback=True),
        **options,
    )
    losses = []
    for step in run:
        losses.append(step.loss)
        if step.number == stop:
            break
    run.close()  # type: ignore[attr-defined]
    return {**energy.state_dict(), **objective.state_dict(), "losses": torch.tensor(losses)}


SCRIPT = """
    import sys
    sys.path[:0] = ["tests", "tests/training"]
    from safetensors.torch import save_file
    from test_distributed import *
    folder, out = Path(sys.argv[1]), {}
    with distributed.process_group() as (rank, world):
        assert world == 2
        # all begin where the first does
        out |= {f"exactly.{k}": v for k, v in exactly(seed=rank).items()}
        out |= {f"centered.{k}": v for k, v in centered().items()}
        out |= {f"whole.{k}": v for k, v in chained(None).items()}
        chained(folder, stop=4)
        out |= {f"resumed.{k}": v for k, v in chained(folder, seed=7).items()}
        gradient = [torch.nn.Parameter(torch.zeros(shape, dtype=F64)) for shape in ((2,), ())]
        gradient[0].grad = torch.full((2,), 1.0 + rank, dtype=F64)
        metrics = {"n": torch.tensor(float(rank))}
        metrics = distributed.average_gradients(gradient, metrics, 1.0 + 2.0 * rank)
        assert gradient[1].grad is None
        out |= {"averaged": gradient[0].grad, "metric": metrics["n"]}
        assert distributed.gather_bytes(bytes([rank] * (rank + 1))) == [b"\\0", b"\\1\\1"]
    # the group is gone, else its threads could abort the process while the interpreter ends
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names
    save_file({k: v.contiguous() for k, v in out.items()}, folder / f"rank{rank}.safetensors")
"""


def torchrun(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = torchrun(str(folder / "script.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def part(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in found.items() if k.startswith(f"{name}.")}


def test_averaged_gradients_are_those_of_one_process(two: Any) -> None:
    """Nine steps on batches of 10 rows and 3, shared 5 and 5 and 2 and 1: parameters and metrics as
    one process has them."""
    _, found = two
    for rank in found:
        torch.testing.assert_close(part(rank, "exactly"), exactly(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part(rank, "centered"), centered(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank["averaged"], torch.full((2,), 1.75, dtype=F64))
        assert float(rank["metric"]) == 0.75


def test_an_unweighted_average_is_caught() -> None:
    """The last batch has two rows in one process and one in the other: the plain mean of their
    gradients is another number."""
    machine = rbm()
    batches = [Batches(BITS, 10, ranks=(rank, 2))(2) for rank in range(2)]
    assert [len(batch) for batch in batches] == [2, 1]
    whole = Batches(BITS, 10)(2)
    grads = [
        torch.autograd.grad(ExactLikelihood()(machine, batch)[0], machine.visible_bias)[0]
        for batch in (*batches, whole)
    ]
    torch.testing.assert_close((2 * grads[0] + grads[1]) / 3, grads[2])
    assert not torch.allclose((grads[0] + grads[1]) / 2, grads[2], atol=1e-3)


def test_chains_are_each_process_s_own(two: Any) -> None:
    _, (first, second) = two
    for name in ("whole", "resumed"):
        one, other = part(first, name), part(second, name)
        assert not (one["chains"] == other["chains"]).any()
        for key in set(one) - {"chains"}:
            assert torch.equal(one[key], other[key]), f"{key} differs between processes"


def test_two_processes_resume_bit_for_bit(two: Any) -> None:
    folder, found = two
    for rank in found:
        whole, resumed = part(rank, "whole"), part(rank, "resumed")
        for key in set(whole) - {"losses"}:
            assert torch.equal(whole[key], resumed[key]), f"{key} differs after an interruption"
        assert torch.equal(whole["losses"][5:], resumed["losses"])
    assert sorted(path.name for path in folder.glob("run*")) == ["run.jsonl", "run.safetensors"]
    assert [line["step"] for line in read_log(folder / "run.jsonl")] == list(range(12))
    with pytest.raises(
        ValueError, match=r"(?s)settings of this training.*ranks is 2 in the checkpoint and 1 here"
    ):
        chained(folder)


def test_shares_make_the_batch() -> None:
    whole = Batches(BITS, 10, seed=3)
    shares = [Batches(BITS, 10, seed=3, ranks=(rank, 3)) for rank in range(3)]
    for step in range(7):
        together = torch.cat([share.numbers(step) for share in shares])
        assert together.sort().values.tolist() == whole.numbers(step).sort().values.tolist()
    with pytest.raises(ValueError, match="each of 4 processes needs a row"):
        Batches(BITS, 10, ranks=(0, 4))


def test_one_process_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a group, whatever torchrun has set, a training is one process's own."""
    truth = exactly()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.testing.assert_close(exactly(), truth, rtol=0, atol=0)
    assert distributed.connected_ranks() == (0, 1)
    assert distributed.gather_bytes(b"abc") == [b"abc"]


# --------------------------------------------------------------------------------------------------
# One process fails

#: What process 1 (or 0) does after step 3, and the reason with which the other one ends.
FAILURES = {
    "objective": "StepError: fit: at step 4 RuntimeError .* process 1: ValueError: no chain left",
    "error": "ProcessError: process 1 failed: LookupError: no such image",
    "error of the first": "ProcessError: process 0 failed: LookupError: no such image",
    "break": "ProcessError: process 1 left the training before step 4, and this one goes on",
    "leave": "ProcessError: process 1 left the group, and this one did not",
    "kill": "ProcessError: another process has ended",
    "stop": "ProcessError: process 1 gave no sign of life for 2 s: it is stopped",
    "slow": "",
}
FAILS = """
    import atexit, sys, traceback
    sys.path[:0] = ["tests", "tests/training"]
    import torch._dynamo, torch.distributed.nn  # once, before the processes are forked
    from pyroebm.training import Trainer
    from test_distributed import *

    class Fails(ExactLikelihood):
        calls = 0

        def forward(self, energy, batch, *, generator=None):
            self.calls += 1
            if how == "objective" and rank == 1 and self.calls == 5:
                raise ValueError("no chain left")
            return super().forward(energy, batch, generator=generator)

    def train():
        with distributed.process_group(timeout=2.0) as (_, world):
            trainer = Trainer(rbm(), Fails(), BITS, num_steps=9, batch_size=10)
            for step in trainer.steps():
                if step.number != 3 or rank != ("first" not in how):
                    continue
                if "error" in how:
                    raise LookupError("no such image")
                if how in ("kill", "stop"):
                    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                if how == "leave":
                    trainer._leave = lambda: None
                if how in ("break", "leave"):
                    break
                if how == "slow":
                    time.sleep(5.0)

    folder, processes = Path(sys.argv[1]), {}
    for how in FAILURES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            processes[how, rank] = os.fork()
            if not processes[how, rank]:
                own = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in own.items()}
                file = os.open(folder / f"{how} {rank}", os.O_CREAT | os.O_WRONLY)
                os.dup2(file, 2)
                code = 0
                try:
                    train()
                except Exception:
                    traceback.print_exc()
                    code = 1
                # a forked process may wait for threads of its parent when it ends
                atexit._run_exitfuncs()
                os._exit(code)
    ends, begin = {}, time.monotonic()
    # one is stopped and never ends
    while len(ends) < len(processes) - 1 and time.monotonic() < begin + 40.0:
        for key, process in processes.items():
            if key not in ends:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    ends[key] = os.waitstatus_to_exitcode(status), time.monotonic() - begin
        time.sleep(0.1)
    for key in processes.keys() - ends.keys():
        os.kill(processes[key], signal.SIGKILL)
    ends = [[how, rank, *end] for (how, rank), end in ends.items()]
    (folder / "ends.json").write_text(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Any]]:
    """What two processes end with, one of which fails in each of several ways."""
    folder = tmp_path_factory.mktemp("fails")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", textwrap.dedent(FAILS), str(folder)]
    done = subprocess.run(
        script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads((folder / "ends.json").read_text())
    return folder, {(how, rank): end for how, rank, *end in ends}


@pytest.mark.parametrize("how", FAILURES)
def test_a_process_that_fails_ends_the_other_with_its_reason(how: str, failures: Any) -> None:
    folder, ends = failures
    survivor = int("first" in how)
    said = (folder / f"{how} {survivor}").read_text()
    assert (how, survivor) in ends, f"it never ended; {said}"
    code, seconds = ends[how, survivor]
    assert code == (how != "slow"), said
    assert seconds < 30.0
    assert re.search(FAILURES[how], said), said
    assert ((how, 1 - survivor) in ends) == (how != "stop")


def test_a_recipe_under_torchrun(tmp_path: Path) -> None:
    """The first process alone speaks and writes."""
    done = torchrun("-m", "models.boltzmann_machine", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("172.42") == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["name"] == "boltzmann_machine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors") == [
        "boltzmann_machine.png",
        "metrics.json",
    ]
