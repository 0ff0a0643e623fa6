"""The history of a training, Ctrl-C, validation with early stopping and the best weights,
optimizers by name; mutants of these are in test_mutants.py."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyroebm import Energy
from pyroebm.energies import BernoulliRBM, MLPEnergy
from pyroebm.flows import NICE
from pyroebm.kernels import ULA
from pyroebm.objectives import (
    AdversarialFlow,
    ContrastiveDivergence,
    Hybrid,
    Objective,
    PersistentCD,
    Pseudolikelihood,
    ReplayBufferCD,
    ReverseKL,
    ShortRun,
)
from pyroebm.training import History, Trainer, fit, fit_steps, read_log
from pyroebm.training.checkpoint import saved_seed

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]
DATA = torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(3)) + 1.0
OTHERS = torch.randn(10, 2, dtype=F64, generator=torch.Generator().manual_seed(4)) + 1.0


class Well(Energy):
    """E(x) = (x - m)^2 / 2."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__((2,))
        self.mean = nn.Parameter(torch.full((2,), start, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x - self.mean).square().sum(-1)


class Energies(Objective):
    """The mean energy of the data; ``odd`` only at odd calls."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._calls += 1
        loss = energy(batch).mean()
        odd = {"odd": torch.tensor(float(self._calls))} if self._calls % 2 else {}
        return loss, {"energy_data": loss.detach()} | odd


class Script(Objective):
    """A loss of the data that is 0 for training and follows a list of values in validation."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=F64))

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values: Any = self.values
        return values[round(float(energy.mean[0].detach()))], {}  # type: ignore[union-attr, index]


class Count(Objective):
    """A gradient that moves each mean by one a step, with plain steps of rate 1."""

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -energy.mean.sum(), {}  # type: ignore[operator, union-attr]


class Pressed(Objective):
    """Ctrl-C within some calls."""

    def __init__(self, at: tuple[int, ...], twice: bool = False) -> None:
        super().__init__()
        self._at = at
        self._twice = twice
        self._calls = 0

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self._calls in self._at:
            for _ in range(1 + self._twice):
                os.kill(os.getpid(), signal.SIGINT)
        self._calls += 1
        return energy(batch).mean(), {}


STEP: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0}


# --------------------------------------------------------------------------------------------------
# History


def test_a_history_has_each_metric_as_an_array() -> None:
    history = fit(Well(), Energies(), DATA, num_steps=4, batch_size=24)
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert set(history) == {"loss", "energy_data", "odd", "grad_norm", "lr"}
    assert np.array_equal(history["loss"], history["energy_data"])
    assert np.array_equal(history["odd"], [1.0, np.nan, 3.0, np.nan], equal_nan=True)
    assert (np.diff(history["loss"]) < 0.0).all()
    with pytest.raises(KeyError, match=r"'energy': the recorded metrics are \['loss'"):
        history["energy"]
    steps = list(fit_steps(Well(), Energies(), DATA, num_steps=4, batch_size=24))
    assert [step.loss for step in steps] == history["loss"].tolist()
    assert steps[2].metrics["odd"] == 3.0
    assert steps[2].number == 2


def test_a_history_is_shown_and_exported() -> None:
    history = fit(Well(), Energies(), DATA, num_steps=40, validation=OTHERS, log_every=3, seed=5)
    assert history.steps.tolist() == list(range(0, 40, 3))
    axes = history.plot("loss", "lr")
    assert [ax.get_ylabel() for ax in axes] == ["loss", "lr"]
    assert axes[-1].get_xlabel() == "step"
    assert [len(ax.lines) for ax in axes] == [2, 1]
    assert np.array_equal(axes[0].lines[1].get_ydata(), history.validation["loss"])
    with pytest.raises(KeyError, match="nothing"):
        history.plot("nothing")
    plt.close("all")
    data = history.to_dataset()
    assert np.array_equal(data["loss"].sel(step=3), history["loss"][1])
    assert np.array_equal(data["validation_loss"], history.validation["loss"])
    assert data["validation_step"].values.tolist() == history.validation.steps.tolist()
    assert data.attrs["seed"] == "5"
    first, *rest = repr(history).splitlines()
    assert first == "History: 14 recorded steps, best validation at step 39, seed 5"
    assert len(rest) <= 6
    assert "<table>" in history._repr_html_()
    assert "validation loss" in history._repr_html_()


def test_a_fresh_seed_is_recorded_and_repeats_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_steps": 6, "batch_size": 5, "checkpoint": tmp_path / "run"}
    rbm, bits = BernoulliRBM(2, 2, dtype=F64), (DATA > 1.0).double()
    state = {k: v.clone() for k, v in rbm.state_dict().items()}
    first = fit(rbm, PersistentCD(4), bits, seed=None, **options)
    assert saved_seed(tmp_path / "run") == first.seed
    rbm.load_state_dict(state)
    again = fit(rbm, PersistentCD(4), bits, num_steps=6, batch_size=5, seed=first.seed)
    assert np.array_equal(first["energy_gap"], again["energy_gap"])
    other = fit(rbm, PersistentCD(4), bits, num_steps=1, seed=None)
    assert other.seed != first.seed
    longer = fit(rbm, PersistentCD(4), bits, seed=None, resume=True, **options | {"num_steps": 8})
    assert longer.seed == first.seed
    assert longer.steps.tolist() == list(range(8))
    assert np.array_equal(longer["energy_gap"][:6], first["energy_gap"])


# --------------------------------------------------------------------------------------------------
# A training as an object


def test_steps_by_hand() -> None:
    trainer = Trainer(Well(), Energies(), DATA, num_steps=2)
    assert [trainer.step().number, trainer.step().number] == [0, 1]
    assert trainer.finished
    with pytest.raises(ValueError, match="finished after 2 steps"):
        trainer.step()
    with pytest.raises(ValueError, match="checkpoint must be given"):
        trainer.save()


def test_save_and_restore_within_a_run(tmp_path: Path) -> None:
    energy = Well()
    trainer = Trainer(energy, Energies(), DATA, num_steps=9, checkpoint=tmp_path / "run")
    for _ in range(3):
        trainer.step()
    trainer.save()
    kept, ends = energy.mean.detach().clone(), []
    for _ in range(2):
        ends.append([trainer.step().loss for _ in range(3)])
        trainer.restore()
        assert trainer.steps_done == 3
        assert trainer.history.steps.tolist() == [0, 1, 2]
        assert torch.equal(energy.mean, kept)
    assert ends[0] == ends[1]


def test_objectives_prepare_each_step_and_have_defaults() -> None:
    class Annealed(Objective):
        lr = 0.02
        schedule = "cosine"

        def begin_step(self, step: int, num_steps: int) -> None:
            self._share = step / num_steps

        def forward(self, flow: NICE, batch: None, *, generator: Any = None) -> Any:
            assert batch is None
            z = flow.rsample_base(16, generator)
            return -flow.log_prob(z).mean(), {"share": torch.tensor(self._share)}

    history = fit(NICE(2), Annealed(), num_steps=4)
    assert history["share"].tolist() == [0.0, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(
        history["lr"], [0.01 * (1.0 + math.cos(math.pi * k / 4)) for k in range(4)]
    )
    told = fit(NICE(2), Annealed(), num_steps=4, lr=0.1, schedule="constant")
    assert told["lr"].tolist() == [0.1] * 4


# --------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_finishes_the_step_and_keeps_everything(tmp_path: Path) -> None:
    energy, path = Well(), tmp_path / "run.safetensors"
    options: dict[str, Any] = {"num_steps": 20, "batch_size": 5}
    options |= {"optimizer": "adamw", "lr": 0.1, "schedule": "cosine"}
    with pytest.warns(RuntimeWarning, match="interrupted after 4 of 20 steps"):
        history = fit(energy, Pressed((3,)), DATA, checkpoint=path, **options)
    assert history.interrupted
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole, resumed = Well(), Well()
    truth = fit(whole, Pressed(()), DATA, **options)
    rest = fit(resumed, Pressed(()), DATA, checkpoint=path, resume=True, **options)
    assert torch.equal(whole.mean, resumed.mean)
    assert not rest.interrupted
    assert list(rest) == list(truth)
    assert np.array_equal(rest["loss"], truth["loss"])


@pytest.mark.filterwarnings("ignore:interrupted after")
def test_flows_resume_bit_for_bit(tmp_path: Path) -> None:
    """Their temperature and their rate are those of the step."""

    class Interrupted(ReverseKL):
        def begin_step(self, step: int, num_steps: int) -> None:
            super().begin_step(step, num_steps)
            if step == 4 and first:
                os.kill(os.getpid(), signal.SIGINT)

    first = False

    def trained(**options: Any) -> tuple[NICE, History]:
        flow = NICE(2, dtype=F64, generator=torch.Generator().manual_seed(0))
        objective = Interrupted(Well(1.0), num_samples=16)
        return flow, fit(flow, objective, num_steps=9, **options)

    whole, truth = trained()
    first = True
    trained(checkpoint=tmp_path / "flow")
    first = False
    resumed, found = trained(checkpoint=tmp_path / "flow", resume=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert all(np.array_equal(found[name], truth[name]) for name in ("loss", "beta", "lr"))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Well(), Pressed((3,), twice=True), DATA, num_steps=20, checkpoint=path)
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_fit_runs_in_other_threads() -> None:
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fit(Well(), Energies(), DATA, num_steps=2, progress=False))
    )
    thread.start()
    thread.join()
    assert isinstance(found[0], History)


TWO = """
    import os, signal, sys
    sys.path[:0] = ["tests", "tests/training"]
    from test_fit import *
    from pyroebm.training import process_group
    with process_group() as (rank, world):
        objective = Pressed((3,) if rank == 1 else ())
        with pytest.warns(RuntimeWarning, match="interrupted after 4 of 20 steps"):
            history = fit(
                Well(), objective, DATA, num_steps=20, checkpoint=sys.argv[1] + "/run", seed=None,
                validation=OTHERS, validate_every=2, validation_objective=Energies(),
            )
        seed = torch.tensor(history.seed % 2**60)
        torch.distributed.all_reduce(seed, torch.distributed.ReduceOp.MAX)
        assert int(seed) == history.seed % 2**60
        one = fit(Well(), Energies(), DATA, num_steps=2, validation=OTHERS, validate_every=1)
    np.testing.assert_allclose(one.validation["loss"][0], FIRST)
"""


def test_ctrl_c_in_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    truth = fit(Well(), Energies(), DATA, num_steps=1, validation=OTHERS, validate_every=1)
    first = float(truth.validation["loss"][0])
    script = textwrap.dedent(TWO).replace("FIRST", repr(first))
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Validation


def test_validation_is_the_mean_over_all_rows() -> None:
    """Ten rows in batches of 4, 4 and 2."""
    energy = Well()
    history = fit(
        energy, Energies(), DATA, num_epochs=3, batch_size=4, validation=OTHERS, optimizer="sgd"
    )
    assert history.validation.steps.tolist() == [5, 11, 17]
    with torch.no_grad():
        truth = float(energy(OTHERS).mean())
    assert history.validation["loss"][-1] == pytest.approx(truth, rel=1e-12)
    assert history.best_step == 17


def test_when_it_is_evaluated() -> None:
    def steps(**options: Any) -> list[int]:
        found = fit(Well(), Energies(), DATA, validation=OTHERS, batch_size=8, **options)
        return found.validation.steps.tolist()

    assert steps(num_steps=60) == list(range(2, 60, 3))
    assert steps(num_epochs=2) == [2, 5]
    assert steps(num_steps=7, validate_every=3) == [2, 5, 6]


def test_validation_leaves_the_training_alone() -> None:
    """Chains, random numbers and modes are those of a training without it."""

    class Moody(Well):
        def forward(self, x: Tensor) -> Tensor:
            modes.add(self.training)
            return super().forward(x)

    ends = []
    for validation in (None, OTHERS):
        modes: set[bool] = set()
        energy, objective = Moody(), ReplayBufferCD(5, 2, ULA(0.3))
        energy.train()
        fit(energy, objective, DATA, num_steps=8, batch_size=6, validation=validation)
        assert objective.chains is not None
        ends.append([energy.mean.detach(), objective.chains])
        assert energy.training
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_another_objective_judges() -> None:
    rbm, bits = BernoulliRBM(2, 2, dtype=F64), (DATA > 1.0).double()
    history = fit(
        rbm,
        PersistentCD(5),
        bits,
        num_steps=3,
        validation=bits,
        validation_objective=Pseudolikelihood(),
    )
    assert set(history.validation) == {"loss", "energy_data", "pseudo_log_likelihood"}
    with torch.no_grad():
        assert history.validation["loss"][-1] == pytest.approx(
            float(Pseudolikelihood()(rbm, bits)[0])
        )


@pytest.mark.parametrize("form", ["fit", "steps"])
def test_early_stopping_and_the_best_weights(form: str) -> None:
    """Validation losses 5, 3, 4, 4, 2, ...: with patience 2 it stops after the fourth evaluation,
    and the weights are those after the second."""
    energy = Well()
    options: dict[str, Any] = {
        "num_steps": 6,
        "validation": OTHERS,
        "validation_objective": Script(9.0, 5.0, 3.0, 4.0, 4.0, 2.0, 1.0),
        "validate_every": 1,
        "patience": 2,
        **STEP,
    }
    history = fit(energy, Count(), DATA, **options)
    assert history.validation["loss"].tolist() == [5.0, 3.0, 4.0, 4.0]
    assert history.stopped_early
    assert not history.interrupted
    assert history.best_step == 1
    assert energy.mean.tolist() == [4.0, 4.0]
    assert "stopped early" in repr(history)

    energy = Well()
    if form == "fit":
        fit(energy, Count(), DATA, keep_best=True, **options)
    else:
        steps = list(fit_steps(energy, Count(), DATA, keep_best=True, **options))
        assert [step.metrics["validation_loss"] for step in steps] == [5.0, 3.0, 4.0, 4.0]
    assert energy.mean.tolist() == [2.0, 2.0]
    whole = fit(Well(), Count(), DATA, **options | {"patience": None})
    assert not whole.stopped_early
    assert whole.best_step == 5


@pytest.mark.parametrize(
    "objective",
    [
        PersistentCD(5),
        Hybrid(ContrastiveDivergence(1, ULA(0.1))),
        ShortRun(2, ULA(0.1)),
        AdversarialFlow(NICE(2)),
    ],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.parametrize("options", [{"patience": 2}, {"keep_best": True}])
def test_early_stopping_needs_a_loss_that_measures_the_fit(
    objective: Objective, options: dict[str, Any]
) -> None:
    name = type(objective).__name__
    said = f"{next(iter(options))} needs a validation_objective .* got {name}"
    data: Any = torch.eye(2)
    data = (data, torch.tensor([0, 1])) if objective.takes_labels else data
    options = options | {"validation": data, "num_steps": 1}
    with pytest.raises(ValueError, match=said):
        fit(MLPEnergy((2,)), objective, data, **options)
    with pytest.raises(ValueError, match=said):
        fit(Well(), Count(), torch.eye(2), validation_objective=objective, **options)
    assert Hybrid().measures_fit


def test_the_metrics_of_the_validation_can_be_seen_by_name() -> None:
    history = fit(
        BernoulliRBM(2, 1), Pseudolikelihood(), torch.eye(2), num_steps=4, validation=torch.eye(2)
    )
    assert repr(history.validation).startswith("Metrics: 4 recorded steps\n  loss: ")
    (ax,) = history.plot("validation_loss")
    assert [line.get_label() for line in ax.lines] == ["validation"]
    assert ax.get_ylabel() == "validation_loss"
    (ax,) = history.plot("loss")
    assert [line.get_label() for line in ax.lines] == ["training", "validation"]
    with pytest.raises(KeyError, match=r"'validation_los': .*'validation_loss'"):
        history.plot("validation_los")


@pytest.mark.parametrize("call", [fit, fit_steps])
def test_a_wrong_argument_is_named_with_the_function_that_was_called(call: Any) -> None:
    name = call.__name__
    with pytest.raises(TypeError, match=rf"^{name}\(\) .* 'epochs': did you mean num_epochs"):
        call(Well(), Count(), DATA, epochs=3)
    with pytest.raises(TypeError, match=rf"^{name}\(\) takes no argument 'zzz'$"):
        call(Well(), Count(), DATA, zzz=3)
    with pytest.raises(TypeError, match=rf"^{name}\(\): missing a required argument: 'objective'"):
        call(Well())


def test_best_weights_and_patience_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Broken off after the third step, resumed by other objects: the same end."""
    options: dict[str, Any] = {
        "num_steps": 6,
        "validation": OTHERS,
        "validation_objective": Script(9.0, 5.0, 3.0, 4.0, 4.0, 2.0, 1.0),
        "validate_every": 1,
        "patience": 2,
        "keep_best": True,
        "checkpoint": tmp_path / "run",
        "log": tmp_path / "log",
        **STEP,
    }
    first = Well()
    for step in fit_steps(first, Count(), DATA, **options):
        if step.number == 2:
            break
    resumed = Well()
    history = fit(resumed, Count(), DATA, resume=True, **options)
    assert history.validation["loss"].tolist() == [5.0, 3.0, 4.0, 4.0]
    assert history.stopped_early
    assert resumed.mean.tolist() == [2.0, 2.0]
    assert [line["validation_loss"] for line in read_log(tmp_path / "log")] == [5.0, 3.0, 4.0, 4.0]
    again = fit(Well(), Count(), DATA, resume=True, **options)
    assert len(again["loss"]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patience": 3}, "patience needs validation data"),
        ({"keep_best": True}, "keep_best needs validation data"),
        ({"validate_every": 3, "patience": 1}, "validate_every and patience needs validation"),
        ({"validation": OTHERS, "patience": 0}, "patience must be"),
        ({"validation": OTHERS, "validate_every": 0}, "validate_every must be"),
        ({"validation": OTHERS[:, :1]}, r"validation must have shape \(N, 2\)"),
        ({"objective": Energies}, r"such as Energies\(\), got Energies"),
        ({"objective": 3}, "objective must be an instance"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    arguments = {"objective": Energies(), "data": DATA, "num_steps": 3} | options
    with pytest.raises(ValueError, match=said):
        fit(Well(), **arguments)


# --------------------------------------------------------------------------------------------------
# Optimizers


@pytest.mark.parametrize("name", ["adam", "Adam", "SGD", "adamw", "RMSprop", "nadam"])
def test_optimizers_by_name(name: str) -> None:
    named, made = Well(), Well()
    kind = {k.lower(): v for k, v in vars(torch.optim).items()}[name.lower()]
    fit(named, Energies(), DATA, num_steps=5, optimizer=name, lr=0.05)
    fit(made, Energies(), DATA, num_steps=5, optimizer=functools.partial(kind, lr=0.05))
    torch.testing.assert_close(named.mean, made.mean)


def test_an_instance_is_taken_as_it_is() -> None:
    energy, made = Well(), Well()
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.05, momentum=0.9)
    history = fit(energy, Energies(), DATA, num_steps=5, optimizer=optimizer)
    fit(
        made,
        Energies(),
        DATA,
        num_steps=5,
        optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )
    assert torch.equal(energy.mean, made.mean)
    assert history["lr"].tolist() == [0.05] * 5


class Scaled(ContrastiveDivergence):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "adm"}, r"got 'adm'; similar names: \['adam'"),
        (
            {"optimizer": functools.partial(torch.optim.Adam), "lr": 0.1},
            "lr must be None unless optimizer is a name",
        ),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": {"critic": 0.1}}, r"lr must be one value, or a dict with the losses \['energy'\]"),
        ({"schedule": "linear"}, 'must be None, "constant", "cosine"'),
        ({"optimizer": "instance", "lr": 0.1}, "lr must be None unless optimizer is a name"),
        ({"optimizer": "instance", "weight_decay": 0.1}, "weight_decay must be 0.0"),
        ({"optimizer": "instance", "objective": Scaled()}, r"misses 1 of shapes \[\(3,\)\]"),
        ({"optimizer": "lbfgs"}, "must not evaluate the loss"),
    ],
)
def test_optimizers_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    energy = Well()
    if options.get("optimizer") == "instance":
        options = options | {"optimizer": torch.optim.SGD(energy.parameters(), lr=0.1)}
    arguments = {"objective": Energies(), "data": DATA, "num_steps": 3} | options
    with pytest.raises(ValueError, match=said):
        fit(energy, **arguments)
