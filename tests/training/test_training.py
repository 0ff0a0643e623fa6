"""The training loop: what it reaches, what it logs, what it refuses; interrupted and resumed bit
for bit; mutants."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyroebm import Energy
from pyroebm.data import bars_and_stripes
from pyroebm.energies import BernoulliRBM, ClassifierEnergy, MLPEnergy
from pyroebm.flows import NICE
from pyroebm.kernels import ULA, IndependenceMetropolis
from pyroebm.objectives import (
    Centering,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ExactLikelihood,
    ForwardKL,
    Hybrid,
    NoiseContrastive,
    PersistentCD,
    Pseudolikelihood,
    ReplayBufferCD,
    ReverseKL,
    Sparsity,
)
from pyroebm.targets import Gaussian
from pyroebm.training import Batches, Step, fit, fit_steps, optimizers
from pyroebm.training.checkpoint import Checkpoint, settings_of
from pyroebm.training.optimizers import parameter_groups

F64 = torch.float64
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.5, fused=True)
DATA = bars_and_stripes(2, dtype=F64)


def rbm(hidden: int = 3, seed: int = 0) -> BernoulliRBM:
    noise = torch.Generator().manual_seed(seed)
    return BernoulliRBM(
        4, hidden, weight=0.1 * torch.randn(4, hidden, dtype=F64, generator=noise), dtype=F64
    )


class Bowl(Energy):
    """A continuous energy of a small network."""

    def __init__(self) -> None:
        super().__init__((2,))
        noise = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(0.3 * torch.randn(2, 8, dtype=F64, generator=noise))
        self.outer = nn.Parameter(0.3 * torch.randn(8, dtype=F64, generator=noise))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x**2).sum(-1) + torch.tanh(x @ self.inner) @ self.outer


class Exploding(nn.Module):
    """A loss that is not finite at its fourth call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(
        self, energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = energy(batch).mean() * (math.nan if self.calls == 4 else 1.0)
        return loss, {"calls": torch.tensor(float(self.calls))}


def last(steps: Iterator[Step]) -> Step:
    return list(steps)[-1]


# --------------------------------------------------------------------------------------------------
# What it does


@pytest.mark.parametrize("centered", [False, True])
def test_exact_training_reaches_the_ceiling(centered: bool) -> None:
    """Bars and stripes: the mean log-likelihood comes within .02 nats of the entropy of the
    data."""
    machine = rbm(hidden=6)
    steps = fit_steps(
        machine,
        ExactLikelihood(),
        DATA,
        num_steps=1500,
        batch_size=8,
        optimizer=functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        transform=Centering() if centered else None,
    )
    step = last(steps)
    loss, metrics = step.loss, step.metrics
    assert loss == pytest.approx(1.732868, abs=0.02)
    assert loss > 1.732867
    assert metrics["log_likelihood"] == -loss


def test_pcd_training_raises_the_likelihood() -> None:
    """To -1.798, with a standard deviation of .007 over 14 seeds, as the rate falls to 0; with a
    constant one it wanders."""
    machine = rbm(hidden=6)
    before = float(machine.log_likelihood(DATA).mean().detach())
    options = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.3, fused=True),
        "schedule": functools.partial(
            torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=3500
        ),
        "transform": Centering(),
    }
    last(fit_steps(machine, PersistentCD(100), DATA, num_steps=3500, batch_size=8, **options))
    after = float(machine.log_likelihood(DATA).mean().detach())
    assert after > max(-1.95, before + 0.5), (before, after)


def test_data_energy_falls_against_the_rest() -> None:
    energy = Bowl()
    data = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(3)) + torch.tensor(
        [2.0, 0.0]
    )
    far = -data
    before = float((energy(data).mean() - energy(far).mean()).detach())
    last(fit_steps(energy, ContrastiveDivergence(k=5), data, num_epochs=20, batch_size=16))
    assert float((energy(data).mean() - energy(far).mean()).detach()) < before - 0.1


def test_metrics_and_order() -> None:
    machine, seen = rbm(), []
    plan = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    options = {"optimizer": SGD, "schedule": plan, "penalties": [Sparsity(0.1, 1.0)]}
    for step in fit_steps(
        machine, ContrastiveDivergence(), DATA, num_epochs=2, batch_size=3, **options
    ):
        metrics = step.metrics
        seen.append((step.number, metrics["lr"]))
        assert step.loss == pytest.approx(metrics["energy_gap"] + metrics["penalty"])
        assert set(metrics) == {
            "energy_data",
            "energy_model",
            "energy_gap",
            "penalty",
            "grad_norm",
            "lr",
        }
    assert seen == [(0, 0.05), (1, 0.05), (2, 0.025), (3, 0.025), (4, 0.0125), (5, 0.0125)]


def test_each_epoch_has_every_row_once() -> None:
    batches = Batches((torch.arange(10), torch.arange(10) * 2), batch_size=4, seed=3)
    epochs = [[batches(3 * epoch + k) for k in range(3)] for epoch in range(2)]
    orders = [torch.cat([x for x, _ in epoch]) for epoch in epochs]
    assert all(torch.equal(2 * x, y) for epoch in epochs for x, y in epoch)
    assert all(order.sort().values.tolist() == list(range(10)) for order in orders)
    assert not torch.equal(*orders)
    assert torch.equal(batches(1)[0], epochs[0][1][0]), "a batch depends on its step alone"


def test_clipping_and_learned_objectives() -> None:
    class Scaled(ContrastiveDivergence):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=F64))

        def forward(
            self, energy: Energy, batch: Tensor, *, generator: Any = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = super().forward(energy, batch, generator=generator)
            return loss + self.scale**2, metrics

    machine, objective = rbm(), Scaled()
    start = [p.detach().clone() for p in (*machine.parameters(), *objective.parameters())]
    metrics = last(
        fit_steps(
            machine,
            objective,
            DATA,
            num_steps=1,
            optimizer=functools.partial(torch.optim.SGD, lr=1.0),
            max_grad_norm=0.01,
        )
    ).metrics
    moved = torch.cat(
        [
            (p - q).flatten()
            for p, q in zip((*machine.parameters(), *objective.parameters()), start, strict=True)
        ]
    )
    assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(objective.scale.detach()) < 1.0
    assert metrics["grad_norm"] > 1.0, "the norm is the one before clipping"


def check_decay() -> None:
    """Without a gradient, weights decay by the rate and biases stay."""
    machine = rbm()
    with torch.no_grad():
        machine.visible_bias += 1.0

    def nothing(
        energy: Energy, batch: Tensor, *, generator: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return 0.0 * sum(p.sum() for p in energy.parameters()), {}

    weight = machine.weight.detach().clone()
    last(
        fit_steps(
            machine,
            nothing,
            DATA,
            num_steps=1,
            weight_decay=0.1,
            optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        )
    )
    torch.testing.assert_close(machine.weight.detach(), 0.95 * weight)
    torch.testing.assert_close(machine.visible_bias.detach(), torch.ones(4, dtype=F64))


def test_weights_decay_and_biases_do_not() -> None:
    check_decay()


def test_decay_of_biases_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_alike(modules: Any, weight_decay: float) -> list[dict[str, Any]]:
        return [group | {"weight_decay": 0.1} for group in parameter_groups(modules, weight_decay)]

    monkeypatch.setattr(optimizers, "parameter_groups", all_alike)
    with pytest.raises(AssertionError):
        check_decay()


def test_global_generator_is_left_alone() -> None:
    machine = rbm()
    before = torch.get_rng_state()
    last(fit_steps(machine, PersistentCD(5), DATA, num_steps=3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_repeats_a_run() -> None:
    ends = []
    for seed in (0, 0, 1):
        machine = rbm()
        last(fit_steps(machine, PersistentCD(5), DATA, num_steps=5, batch_size=3, seed=seed))
        ends.append(machine.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# --------------------------------------------------------------------------------------------------
# Guards


def test_a_loss_that_is_not_finite_raises_with_the_metrics() -> None:
    machine = rbm()
    steps = fit_steps(machine, Exploding(), DATA, num_steps=10, optimizer=SGD)
    assert [next(steps).number for _ in range(3)] == [0, 1, 2]
    kept = machine.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"at step 3 loss is nan.*'calls': 4"):
        next(steps)
    assert torch.equal(machine.weight.detach(), kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either num_steps or num_epochs"),
        ({"num_steps": 1, "num_epochs": 1}, "either num_steps or num_epochs"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_steps": 1, "batch_size": 0}, "batch_size must be"),
        ({"num_steps": 1, "resume": True}, "give checkpoint"),
        ({"num_steps": 1, "data": DATA[:0]}, "must have rows"),
        ({"num_steps": 1, "data": [1.0]}, "torch.as_tensor"),
        ({"num_epochs": 1, "data": None}, "num_epochs must be None without data"),
        ({"num_steps": 1, "module": "rbm"}, "must be a torch.nn.Module"),
        (
            {"num_steps": 1, "module": rbm().requires_grad_(False)},
            "must have a parameter that requires a gradient",
        ),
        (
            {"num_steps": 1, "optimizer": lambda groups: torch.optim.LBFGS(groups[0]["params"])},
            "must not evaluate the loss",
        ),
        (
            {"num_steps": 1, "schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "must not evaluate the loss",
        ),
    ],
)
def test_bad_input_is_refused_at_the_call(options: dict[str, Any], said: str) -> None:
    arguments = {"module": rbm(), "objective": ContrastiveDivergence(), "data": DATA} | options
    with pytest.raises(ValueError, match=said):
        fit(**arguments)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def everything(
    machine: Energy, path: Path | None, steps: int, objective: Any = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A run with all that has a state: chains at two temperatures, momentum, schedule, offsets,
    average."""
    parts: dict[str, Any] = {
        "objective": PersistentCD(6, betas=(1.0, 0.5)) if objective is None else objective(),
        "transform": Centering(rate=0.1) if isinstance(machine, BernoulliRBM) else None,
        "average": AveragedModel(machine, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    }
    plan = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.95)
    run = fit_steps(
        machine,
        data=DATA[:, : machine.event_shape[0]],
        num_steps=steps,
        batch_size=3,
        schedule=plan,
        checkpoint=path,
        seed=5,
        **parts,
        **options,
    )
    return run, parts


def end(run: Any, machine: Energy, parts: dict[str, Any]) -> dict[str, Tensor]:
    step = last(run)
    states = {
        f"{k}.{n}": v
        for k, part in parts.items()
        if part is not None
        for n, v in part.state_dict().items()
    }
    return (
        states
        | dict(machine.state_dict())
        | {"last": torch.tensor([step.number, step.loss], dtype=F64)}
    )


def check_resumed(tmp_path: Path, make: Callable[[], Energy], **options: Any) -> None:
    whole = make()
    truth = end(*_with(whole, everything(whole, None, 17, **options)))
    first = make()
    run, _ = everything(first, tmp_path / "run.safetensors", 17, **options)
    for step in run:
        if step.number == 7:  # in the middle of an epoch
            break
    run.close()
    second = make()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()  # all that counts comes from the file
    found = end(
        *_with(second, everything(second, tmp_path / "run.safetensors", 17, resume=True, **options))
    )
    assert set(found) == set(truth)
    for name, value in truth.items():
        assert torch.equal(found[name], value), f"{name} differs after an interruption"


def _with(machine: Energy, made: tuple[Any, dict[str, Any]]) -> tuple[Any, Energy, dict[str, Any]]:
    return made[0], machine, made[1]


@pytest.mark.parametrize("optimizer", [SGD, "adam"], ids=["momentum", "adam"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, optimizer: Any) -> None:
    check_resumed(tmp_path, rbm, optimizer=optimizer)


@pytest.mark.parametrize("objective", [ReplayBufferCD, ContrastiveDivergence], ids=["pcd", "cd"])
def test_neural_energies_resume_too(tmp_path: Path, objective: Callable[[], Any]) -> None:
    check_resumed(tmp_path, Bowl, objective=objective)


def test_a_forgotten_generator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Checkpoint.load

    def forgetful(self: Checkpoint) -> Any:
        step = load(self)
        self.state.generator.manual_seed(0)
        return step

    monkeypatch.setattr(Checkpoint, "load", forgetful)
    with pytest.raises(AssertionError, match="differs after an interruption"):
        check_resumed(tmp_path, rbm)


def test_an_error_within_a_step_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    run = fit_steps(rbm(), Exploding(), DATA, num_steps=10, checkpoint=path)
    with pytest.raises(FloatingPointError):
        list(run)
    assert not path.exists()


def test_checkpoints_at_the_front_door(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.safetensors"
    options: dict[str, Any] = {"checkpoint": path, "batch_size": 4}
    # nothing there yet: it begins
    last(fit_steps(rbm(), ContrastiveDivergence(), DATA, num_steps=2, resume=True, **options))
    assert not list(path.parent.glob("*.part"))
    with pytest.raises(ValueError, match=r"checkpoint=.* must be a new file"):
        fit(rbm(), ContrastiveDivergence(), DATA, num_steps=4, **options)
    with pytest.raises(ValueError, match="settings of this training"):
        fit(rbm(), Pseudolikelihood(), DATA, num_steps=4, resume=True, **options)
    with pytest.raises(ValueError, match="settings of this training"):
        fit(rbm(), ContrastiveDivergence(k=2), DATA, num_steps=4, resume=True, **options)
    with pytest.raises(ValueError, match="settings of this training"):
        fit(
            rbm().float(),
            ContrastiveDivergence(),
            DATA.float(),
            num_steps=4,
            resume=True,
            **options,
        )
    with pytest.raises(ValueError, match=r"module.call is .*num_hidden=3.* and .*num_hidden=7"):
        fit(
            BernoulliRBM(DATA.shape[1], 7, dtype=DATA.dtype),
            ContrastiveDivergence(),
            DATA,
            num_steps=4,
            resume=True,
            **options,
        )
    run = fit_steps(rbm(), ContrastiveDivergence(), DATA, num_steps=4, resume=True, **options)
    assert [step.number for step in run] == [2, 3]

    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a file that fit wrote"):
        fit(rbm(), ContrastiveDivergence(), DATA, num_steps=6, resume=True, **options)


def test_a_checkpoint_is_of_one_kernel_and_of_the_objectives_inside(tmp_path: Path) -> None:
    data = (torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)
    options: dict[str, Any] = {
        "batch_size": 10,
        "checkpoint": tmp_path / "kept.safetensors",
        "progress": False,
    }

    def run(k: int, size: float, steps: int, resume: bool) -> None:
        energy = ClassifierEnergy(torch.nn.Linear(2, 3), (2,), 3, scale=1.0)
        last(
            fit_steps(
                energy,
                Hybrid(ContrastiveDivergence(k, ULA(size))),
                data,
                num_steps=steps,
                resume=resume,
                **options,
            )
        )

    run(2, 0.1, 2, False)
    run(2, 0.1, 3, True)  # another kernel of the same settings
    for k, size in ((3, 0.1), (2, 0.2)):
        with pytest.raises(ValueError, match="settings of this training"):
            run(k, size, 4, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": -1.0},
        {"max_grad_norm": math.nan},
        {"weight_decay": -0.1},
    ],
)
def test_numbers_that_would_turn_a_step_around_are_refused(wrong: dict[str, Any]) -> None:
    """A negative bound on the norm makes torch climb, and NaN fills the parameters behind the
    guard's back."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fit(rbm(), ContrastiveDivergence(), DATA, num_steps=1, **wrong)


def test_where_an_object_lies_in_memory_is_no_setting() -> None:
    class Proposal:
        rsample_base = forward_and_log_prob = log_prob = print

    said = [
        settings_of("o", ReplayBufferCD(5, 1, IndependenceMetropolis(Proposal()))) for _ in range(2)
    ]
    assert said[0] == said[1]
    assert "IndependenceMetropolis" in said[0]["o.kernel"]


@pytest.mark.parametrize("changed", [{"sigma": (0.1, 0.3)}, {"control_variate": True}])
def test_a_checkpoint_is_of_one_ladder_and_one_estimator(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    """Settings that are tuples and truths count, as numbers and words do."""
    energy = MLPEnergy((2,), hidden_sizes=(4,), dtype=torch.float64)
    options: dict[str, Any] = {"checkpoint": tmp_path / "run.safetensors", "batch_size": 4}
    data = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = {"sigma": (0.1, 0.2), "control_variate": False}
    last(fit_steps(energy, DenoisingScoreMatching(**given), data, num_steps=2, **options))
    last(
        fit_steps(
            energy, DenoisingScoreMatching(**given), data, num_steps=3, resume=True, **options
        )
    )
    with pytest.raises(ValueError, match="settings of this training"):
        fit(
            energy,
            DenoisingScoreMatching(**given | changed),
            data,
            num_steps=4,
            resume=True,
            **options,
        )


def test_a_checkpoint_knows_its_data_module_and_target(tmp_path: Path) -> None:
    """Whatever a training does not change and that differs is named with both values."""
    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"checkpoint": tmp_path / "a.safetensors", "resume": True}

    def net(**settings: Any) -> MLPEnergy:
        return MLPEnergy((2,), **{"hidden_sizes": (4,), "activation": "silu"} | settings)

    def run(energy: Energy, rows: Any, steps: int, **more: Any) -> None:
        fit(energy, DenoisingScoreMatching(0.1), rows, num_steps=steps, **options, **more)

    run(net(), data, 2, validation=data)
    # other initial weights, and the same rows in another form: both are the checkpoint's
    run(MLPEnergy((2,), (4,)), data.double().numpy(), 3, validation=data)
    other = data.clone()
    other[-1] += 1.0
    for energy, rows, held, message in (
        (net(), other, data, "data is .* checksum .* in the checkpoint and"),
        (net(), data[:7], data, r"data is \(8, 2\), .* and \(7, 2\), .* here"),
        (net(), data, other, "validation is"),
        (net(activation="tanh"), data, data, "module.call is .*silu.* and .*tanh.* here"),
        (net(activation="tanh"), data, data, r"module\.net\.\S* is SiLU\(\).* and Tanh"),
    ):
        with pytest.raises(ValueError, match=f"(?s)settings of this training.*{message}"):
            run(energy, rows, 4, validation=held)


@pytest.mark.parametrize(
    ("kept", "changed", "message"),
    [
        (
            lambda: ReverseKL(Gaussian(torch.zeros(2))),
            lambda: ReverseKL(Gaussian(torch.ones(2))),
            "objective.energy.tensors is",
        ),
        (
            lambda: ReverseKL(Gaussian(torch.zeros(2))),
            lambda: ReverseKL(Gaussian(torch.zeros(2)) * 0.5),
            r"objective.energy.call is Gaussian.* and Tempered\(energy=Gaussian, beta=0.5\) here",
        ),
        (
            lambda: ForwardKL(torch.zeros(5, 2)),
            lambda: ForwardKL(torch.ones(5, 2)),
            "objective.tensors is",
        ),
    ],
    ids=["parameters", "temperature", "draws"],
)
def test_a_checkpoint_knows_the_target_of_a_flow(
    kept: Any, changed: Any, message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "flow.safetensors", "resume": True}
    objective, flow = kept(), NICE(2)
    fit(flow, objective, num_steps=2, **options)
    fit(flow, objective, num_steps=3, **options)  # trained objects, in the same process
    fit(NICE(2), kept(), num_steps=4, **options)
    with pytest.raises(ValueError, match=f"(?s)settings of this training.*{message}"):
        fit(NICE(2), changed(), num_steps=5, **options)


def gaussian_energy(scale: float) -> Energy:
    return Gaussian(torch.zeros(2), scale=scale)


def gaussian_distribution(scale: float) -> Any:
    return dist.Normal(torch.zeros(2), scale).to_event(1)


@pytest.mark.parametrize("noise", [gaussian_energy, gaussian_distribution])
def test_a_checkpoint_knows_the_noise_of_its_contrast(noise: Any, tmp_path: Path) -> None:
    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    def run(scale: float, steps: int) -> None:
        fit(
            MLPEnergy((2,), (4,)),
            NoiseContrastive(noise(scale)),
            data,
            num_steps=steps,
            checkpoint=tmp_path / "noise.safetensors",
            resume=True,
        )

    run(1.0, 1)
    run(1.0, 2)
    with pytest.raises(ValueError, match=r"(?s)settings of this training.*objective.\S* is "):
        run(2.0, 3)
