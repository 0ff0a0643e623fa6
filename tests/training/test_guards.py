"""Several losses, guards that stop or go back, logs; killed at any moment and resumed; mutants."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyroebm import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.energies import MLPEnergy
from pyroebm.kernels import ULA
from pyroebm.objectives import ContrastiveDivergence, HasLosses, Objective, ReplayBufferCD
from pyroebm.training import (
    Batches,
    Guard,
    Step,
    TrainingLog,
    fit,
    fit_steps,
    guards,
    read_log,
)

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]
DATA = torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(3)) + 1.0
SGD = functools.partial(torch.optim.SGD, lr=0.05)


def net(seed: int = 0) -> MLPEnergy:
    return MLPEnergy(
        (2,), (8,), scale=2.0, dtype=F64, generator=torch.Generator().manual_seed(seed)
    )


class Duel(Objective):
    """An energy against a generator; one number of theirs is in both losses, with gradients of
    opposite sign."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Parameter(torch.tensor([[0.5, -0.3], [0.1, 0.7]], dtype=F64))

    def losses(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        noise = torch.randn(len(batch), 2, dtype=F64, generator=generator)
        data, model = energy(batch).mean(), energy(noise @ self.generator).mean()
        gap = (data - model).detach()
        return {"energy": data - model, "generator": model + self.generator.square().sum()}, {
            "energy_gap": gap
        }

    def trained(self, energy: Energy) -> dict[str, list[nn.Parameter]]:
        return {"energy": list(energy.parameters()), "generator": [self.generator]}


class Shaken(ReplayBufferCD):
    """Persistent chains with a loss that is no number, or a gap out of bounds, at some calls."""

    def __init__(self, at: tuple[int, ...] = (), wrong: float = math.nan) -> None:
        super().__init__(num_chains=6, kernel=ULA(0.3))
        self._at = at
        self._wrong = wrong
        self._calls = 0

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(energy, batch, generator=generator)
        self._calls += 1
        if self._calls - 1 not in self._at:
            return loss, metrics
        return (
            (loss * math.nan, metrics)
            if math.isnan(self._wrong)
            else (loss, metrics | {"energy_gap": torch.tensor(self._wrong)})
        )


def end(run: Iterator[Step]) -> list[Step]:
    return list(run)


# --------------------------------------------------------------------------------------------------
# Several losses


def check_duel() -> None:
    """Two steps of each player by hand, from gradients at one point; each loss moves its own
    parameters alone."""
    energy, duel = net(), Duel()
    found = end(
        fit_steps(
            energy,
            duel,
            DATA,
            num_steps=2,
            batch_size=24,
            optimizer={"energy": SGD, "generator": functools.partial(SGD, lr=0.2)},
        )
    )
    again, hand = net(), Duel()
    noise = seeded_generator(0)
    for step in range(2):
        losses, _ = hand.losses(again, Batches(DATA, 24)(step), generator=noise)
        mine = torch.autograd.grad(losses["energy"], list(again.parameters()), retain_graph=True)
        theirs = torch.autograd.grad(losses["generator"], hand.generator)[0]
        metrics = found[step].metrics
        assert (
            metrics["loss_energy"]
            == found[step].loss
            == pytest.approx(float(losses["energy"].detach()))
        )
        assert metrics["loss_generator"] == pytest.approx(float(losses["generator"].detach()))
        assert (
            metrics["grad_norm_energy"]
            == metrics["grad_norm"]
            == pytest.approx(float(torch.cat([g.flatten() for g in mine]).norm()))
        )
        assert metrics["grad_norm_generator"] == pytest.approx(float(theirs.norm()))
        with torch.no_grad():
            for parameter, gradient in zip(again.parameters(), mine, strict=True):
                parameter -= 0.05 * gradient
            hand.generator -= 0.2 * theirs
    torch.testing.assert_close(dict(energy.state_dict()), dict(again.state_dict()))
    torch.testing.assert_close(duel.generator, hand.generator)


def test_each_loss_trains_its_own() -> None:
    assert isinstance(Duel(), HasLosses)
    assert not isinstance(ReplayBufferCD(), HasLosses)
    check_duel()


def test_a_loss_that_leaks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all losses in all parameters."""
    own = Tensor.backward

    def leaking(self: Tensor, inputs: Any = None, **options: Any) -> None:
        own(self, **options)

    monkeypatch.setattr(Tensor, "backward", leaking)
    with pytest.raises(AssertionError):
        check_duel()


def test_schedules_of_several_losses() -> None:
    plan = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    found = end(
        fit_steps(net(), Duel(), DATA, num_steps=3, optimizer=SGD, schedule={"energy": plan})
    )
    assert [step.metrics["lr"] for step in found] == [0.05, 0.025, 0.0125]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": {"energy": SGD}}, r"a dict with the losses \['energy', 'generator'\]"),
        ({"schedule": {"critic": SGD}}, "a dict with the losses"),
    ],
)
def test_players_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(net(), Duel(), DATA, num_steps=1, **options)


def test_players_share_nothing() -> None:
    class Twice(Duel):
        def trained(self, energy: Energy) -> dict[str, list[nn.Parameter]]:
            return {"energy": list(energy.parameters()), "generator": list(energy.parameters())}

    class Headless(Duel):
        def trained(self, energy: Energy) -> dict[str, list[nn.Parameter]]:
            return {"generator": [self.generator]}

    class Silent(Duel):
        def losses(self, *args: Any, **options: Any) -> Any:
            losses, metrics = super().losses(*args, **options)
            return {"energy": losses["energy"]}, metrics

    for duel in (Twice(), Headless()):
        with pytest.raises(ValueError, match="no parameter twice"):
            fit(net(), duel, DATA, num_steps=1)
    with pytest.raises(ValueError, match="losses\\(\\) must have the names of trained"):
        end(fit_steps(net(), Silent(), DATA, num_steps=1))


def test_a_parameter_without_gradient() -> None:
    """An additive constant under score matching: it stays, all else is trained; also where there is
    nothing but it."""

    def slope(
        energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0].square().mean(), {}

    energy = net()
    with torch.no_grad():
        energy.net[-1].weight.fill_(0.3)
    for options in ({}, {"max_grad_norm": 0.1}):
        found = end(fit_steps(energy, slope, DATA, num_steps=3, **options))
        assert found[-1].loss < found[0].loss
        assert not bool(energy.net[-1].bias.detach().any())
    energy.requires_grad_(False)
    energy.net[-1].bias.requires_grad_()
    x = DATA.clone().requires_grad_()

    def constant(
        energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return x.square().mean(), {}

    assert end(fit_steps(energy, constant, DATA, num_steps=2))[-1].metrics["grad_norm"] == 0.0


# --------------------------------------------------------------------------------------------------
# Guards


def test_a_rollback_goes_back_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, momenta and chains of the last kept step; the random numbers and the data of the
    next."""
    monkeypatch.setattr(guards, "COPY_EVERY", 3)
    energy, objective = net(), Shaken((7,))
    states: dict[int, dict[str, Tensor]] = {}
    run = fit_steps(energy, objective, DATA, num_steps=12, batch_size=6, guard=Guard(rollback=True))
    found = []

    def watch() -> None:
        for step in run:
            found.append((step.number, step.loss, step.metrics["rollbacks"]))
            states[step.number] = {
                k: v.clone() for k, v in {**energy.state_dict(), **objective.state_dict()}.items()
            }

    with pytest.warns(
        RuntimeWarning,
        match=r"at step 7 loss is nan.*restored .* after step 5 \(rollback 1 of at most 10\)",
    ):
        watch()
    assert [step for step, _, _ in found] == list(range(12))
    assert [math.isnan(loss) for _, loss, _ in found] == [step == 7 for step in range(12)]
    assert [count for _, _, count in found] == [0.0] * 7 + [1.0] * 5
    torch.testing.assert_close(states[7], states[5], rtol=0, atol=0)
    assert not torch.equal(states[8]["chains"], states[6]["chains"]), (
        "the same random numbers came again"
    )


def test_schedules_go_on_through_a_rollback() -> None:
    plan = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    with pytest.warns(RuntimeWarning, match="rollback 1"):
        found = end(
            fit_steps(
                net(),
                Shaken((3,)),
                DATA,
                num_steps=6,
                optimizer=SGD,
                schedule=plan,
                guard=Guard(rollback=True),
            )
        )
    assert [step.metrics["lr"] for step in found] == [0.05 * 0.5**k for k in range(6)]


def test_rollbacks_come_to_an_end() -> None:
    run = fit_steps(
        net(),
        Shaken(tuple(range(3, 50))),
        DATA,
        num_steps=50,
        guard=Guard(rollback=True, max_rollbacks=2),
    )
    with (
        pytest.warns(RuntimeWarning, match="rollback"),
        pytest.raises(FloatingPointError, match="step 5 after 2 rollbacks loss is nan"),
    ):
        end(run)
    with pytest.raises(FloatingPointError, match="at step 0 loss is nan"):
        end(fit_steps(net(), Shaken((0,)), DATA, num_steps=5, guard=Guard(rollback=True)))


def test_a_gap_out_of_bounds() -> None:
    with pytest.raises(
        FloatingPointError, match=r"at step 2 energy_gap is -1e\+06, beyond max_energy_gap=100"
    ):
        end(
            fit_steps(
                net(), Shaken((2,), -1e6), DATA, num_steps=5, guard=Guard(max_energy_gap=100.0)
            )
        )
    with pytest.warns(RuntimeWarning, match="energy_gap is"):
        found = end(
            fit_steps(
                net(),
                Shaken((2,), 1e6),
                DATA,
                num_steps=5,
                guard=Guard(rollback=True, max_energy_gap=100.0),
            )
        )
    assert found[-1].metrics["rollbacks"] == 1.0

    def silent(
        energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return energy(batch).mean(), {}

    with pytest.raises(ValueError, match="without the metric energy_gap"):
        end(fit_steps(net(), silent, DATA, num_steps=1, guard=Guard(max_energy_gap=1.0)))


@pytest.mark.parametrize(
    "options",
    [{"max_rollbacks": 0}, {"max_energy_gap": -1.0}, {"max_energy_gap": math.nan}],
)
def test_guards_at_the_front_door(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Guard(**options)


# --------------------------------------------------------------------------------------------------
# Logs


def without_seconds(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(path)]


def test_a_log_has_a_line_for_a_step(tmp_path: Path) -> None:
    found = end(
        fit_steps(
            net(),
            ContrastiveDivergence(),
            DATA,
            num_steps=7,
            log=tmp_path / "deep" / "run.jsonl",
            log_every=3,
        )
    )
    lines = without_seconds(tmp_path / "deep" / "run.jsonl")
    assert lines == [
        {"step": step.number, "loss": step.loss, **step.metrics}
        for step in found
        if step.number in (0, 3, 6)
    ]
    with pytest.raises(ValueError, match=r"log=.* must be a new file"):
        fit(net(), ContrastiveDivergence(), DATA, num_steps=7, log=tmp_path / "deep" / "run.jsonl")
    with pytest.raises(ValueError, match="log_every must be"):
        fit(
            net(),
            ContrastiveDivergence(),
            DATA,
            num_steps=7,
            log=tmp_path / "other.jsonl",
            log_every=0,
        )


def test_numbers_that_are_not_finite_are_in_the_log(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="rollback"):
        end(
            fit_steps(
                net(),
                Shaken((2,)),
                DATA,
                num_steps=4,
                guard=Guard(rollback=True),
                log=tmp_path / "run.jsonl",
            )
        )
    assert [math.isnan(line["loss"]) for line in read_log(tmp_path / "run.jsonl")] == [
        False,
        False,
        True,
        False,
    ]


def test_tensorboard_is_written_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        fit(net(), ContrastiveDivergence(), DATA, num_steps=1, tensorboard=tmp_path)
    written = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append("closed")

    stand_in: Any = type(sys)("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    log = TrainingLog(None, tmp_path, done=4)
    log.write(4, 1.5, {"lr": 0.1})
    log.close()
    assert written == [(str(tmp_path), 4), ("loss", 4), ("lr", 4), "closed"]


# --------------------------------------------------------------------------------------------------
# Killed


CASES = {
    "replay": "ReplayBufferCD(8, 3, ULA(0.3), buffer_size=40, restart=0.2)",
    "players": "Duel()",
    "rolled back": "Shaken((4, 14))",
}
SCRIPT = """
    import os, signal, sys, warnings
    sys.path[:0] = ["tests", "tests/training"]
    from test_guards import *
    from pyroebm.training import trainer
    warnings.simplefilter("ignore")
    folder, kill = sys.argv[1], int(sys.argv[3])
    objective, energy = eval(CASES[sys.argv[2]]), net()
    options = dict(checkpoint=folder + "/run.safetensors", log=folder + "/run.jsonl")
    trainer.CHECKPOINT_EVERY, guards.COPY_EVERY = 0.0 if kill % 2 else 1e9, 5
    guard = Guard(rollback=True)
    options |= dict(num_steps=20, batch_size=7, resume=True, guard=guard)
    for step in fit_steps(energy, objective, DATA, **options):
        if step.number == kill:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def whole(case: str, log: Path) -> dict[str, Tensor]:
    energy, objective = net(), eval(CASES[case])
    end(
        fit_steps(
            energy,
            objective,
            DATA,
            num_steps=20,
            batch_size=7,
            guard=Guard(rollback=True),
            log=log,
        )
    )
    return {
        **energy.state_dict(),
        **{f"objective.{k}": v for k, v in objective.state_dict().items()},
    }


@pytest.mark.filterwarnings("ignore:fit. at step")
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_uninterrupted(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a step, its line written and its checkpoint too; resumed, parameters, buffers
    and log are the same."""
    monkeypatch.setattr(guards, "COPY_EVERY", 5)
    truth = whole(case, tmp_path / "whole.jsonl")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), case, "11"]
    killed = subprocess.run(command, cwd=ROOT, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 0.0}\n{"step": 13, "lo')  # of steps after the checkpoint
    energy, objective = net(seed=9), eval(CASES[case])
    if case == "rolled back":
        objective._calls = 12  # what is no tensor is the user's
    options = {
        "checkpoint": tmp_path / "run.safetensors",
        "resume": True,
        "guard": Guard(rollback=True),
    }
    rest = end(
        fit_steps(
            energy,
            objective,
            DATA,
            num_steps=20,
            batch_size=7,
            log=tmp_path / "run.jsonl",
            **options,
        )
    )
    assert [step.number for step in rest] == list(range(12, 20))
    found = {
        **energy.state_dict(),
        **{f"objective.{k}": v for k, v in objective.state_dict().items()},
    }
    assert set(found) == set(truth)
    for name, value in truth.items():
        assert torch.equal(found[name], value), f"{name} differs after a kill"
    assert json.dumps(without_seconds(tmp_path / "run.jsonl")) == json.dumps(
        without_seconds(tmp_path / "whole.jsonl")
    )
