"""A failure in a step of a training is one kind of failure, wherever it is: it is rolled back and
counted, or one error with the step, the metrics and the row of the data that is at fault."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyroebm.energies import MLPEnergy
from pyroebm.flows import NICE
from pyroebm.kernels import MALA, ULA
from pyroebm.objectives import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ReplayBufferCD,
    ReverseKL,
)
from pyroebm.targets import Gaussian
from pyroebm.training import Batches, Guard, StepError, fit, guards

F64 = torch.float64
DATA = torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
#: The step that fails.
AT = 5


def net() -> MLPEnergy:
    return MLPEnergy((2,), (8,), scale=2.0, dtype=F64, generator=torch.Generator().manual_seed(0))


class Once:
    """Whether this is the call of the step that fails, counted from 0."""

    def __init__(self) -> None:
        self.calls = -1

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == AT


def raising(error: Exception, call: Any = None) -> Callable[..., Any]:
    """A function that raises an error at its sixth call."""
    now = Once()

    def function(*arguments: Any, **options: Any) -> Any:
        if now():
            raise error
        return None if call is None else call(*arguments, **options)

    return function


class Wrong(ReplayBufferCD):
    """Persistent chains, of which one call does something wrong."""

    def __init__(self, act: Callable[[MLPEnergy, Tensor, Tensor], Tensor]) -> None:
        super().__init__(num_chains=6, kernel=ULA(0.3))
        self._act, self._now = act, Once()

    def forward(self, energy: Any, batch: Any, *, generator: Any = None) -> Any:
        loss, metrics = super().forward(energy, batch, generator=generator)
        return (self._act(energy, batch, loss) if self._now() else loss), metrics


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient raises an error or is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Exception | None) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.error is not None:
            raise ctx.error
        return gradients[0] * math.nan, None


class Rows(Dataset[Tensor]):
    """Rows of which one is wrong when it is read in a step."""

    def __init__(self, wrong: Any) -> None:
        self.wrong, self.calls = wrong, 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, k: int) -> Tensor:
        self.calls += 1
        if self.calls != 6 * AT + 3:
            return DATA[k]
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return torch.as_tensor(self.wrong, dtype=F64).expand(2)


class SGD(torch.optim.SGD):
    """An optimizer, of which one step does something else."""

    def __init__(self, parameters: Any, act: Callable[[Any], None]) -> None:
        super().__init__(parameters, lr=0.01, momentum=0.5)
        self.act, self.now = act, Once()

    def step(self, closure: Any = None) -> Any:
        if self.now():
            self.act(self)
        return super().step(closure)


def fill(value: float) -> Callable[[Any], None]:
    def act(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(value)

    return act


def rate(value: float) -> Callable[[Any], None]:
    def act(optimizer: Any) -> None:
        kept = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = value
        torch.optim.SGD.step(optimizer)
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            group["lr"] = before["lr"]

    return act


def half_a_step(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0].data.add_(1.0)
    raise RuntimeError("out of memory")


def scaled(value: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """Weights that are broken when the objective sees them, as after an update too large."""

    def act(energy: Any, batch: Any, loss: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.mul_(value)
        return loss + energy(batch).mean()

    return act


ERRORS: list[Exception] = [
    ValueError("chains must start where the energy is finite"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    FloatingPointError("overflow"),
    ZeroDivisionError("division by zero"),
    torch.linalg.LinAlgError("not positive definite"),
    IndexError("index 7 is out of bounds"),
    KeyError("no such key"),
    StopIteration(),
    OSError("no such image"),
]
#: Objective, data and further arguments of each blow-up.
Made = tuple[Any, Any, dict[str, Any]]
BLOW_UPS: dict[str, Callable[[], Made]] = {}


def add(name: str, make: Callable[[], Made]) -> None:
    BLOW_UPS[name] = make


def chains() -> ReplayBufferCD:
    return ReplayBufferCD(num_chains=6, kernel=ULA(0.3))


def raise_it(error: Exception) -> Callable[..., Tensor]:
    def act(*_: Any) -> Tensor:
        raise error

    return act


for error in ERRORS:
    kind = type(error).__name__
    add(f"objective {kind}", lambda e=error: (Wrong(raise_it(e)), DATA, {}))
    add(
        f"backward {kind}",
        lambda e=error: (Wrong(lambda energy, x, loss: NoGradient.apply(loss, e)), DATA, {}),
    )
    add(
        f"penalty {kind}",
        lambda e=error: (chains(), DATA, {"penalties": [raising(e, lambda m, x: m(x).mean())]}),
    )
    add(f"transform {kind}", lambda e=error: (chains(), DATA, {"transform": raising(e)}))
    add(
        f"optimizer {kind}",
        lambda e=error: (
            chains(),
            DATA,
            {"optimizer": functools.partial(SGD, act=lambda _, e=e: raise_it(e)())},
        ),
    )
    add(f"dataset {kind}", lambda e=error: (chains(), Rows(e), {}))
for value in (math.nan, math.inf, -math.inf):
    add(f"row {value}", lambda v=value: (chains(), Rows(v), {}))
    add(f"loss {value}", lambda v=value: (Wrong(lambda energy, x, loss: loss + v), DATA, {}))
    add(
        f"rate {value}",
        lambda v=value: (chains(), DATA, {"optimizer": functools.partial(SGD, act=rate(v))}),
    )
    add(
        f"weights {value}",
        lambda v=value: (chains(), DATA, {"optimizer": functools.partial(SGD, act=fill(v))}),
    )
    add(f"broken weights {value}", lambda v=value: (Wrong(scaled(v)), DATA, {}))
add("weights 1e200", lambda: (Wrong(scaled(1e200)), DATA, {}))
add("gradient", lambda: (Wrong(lambda e, x, loss: NoGradient.apply(loss, None)), DATA, {}))
add(
    "half a step",
    lambda: (chains(), DATA, {"optimizer": functools.partial(SGD, act=half_a_step)}),
)
add(
    "rows of a loader",
    lambda: (chains(), DataLoader(Rows(math.nan), batch_size=6), {"batch_size": 100}),
)


def run(name: str, guard: Guard) -> tuple[MLPEnergy, Any]:
    objective, data, options = BLOW_UPS[name]()
    energy = net()
    options = {"batch_size": 6, "num_steps": 12, "guard": guard, **options}
    return energy, functools.partial(fit, energy, objective, data, **options)


def test_there_are_sixty() -> None:
    assert len(BLOW_UPS) >= 60


@pytest.fixture(autouse=True)
def _copies_every_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "COPY_EVERY", 2)


@pytest.mark.parametrize("name", BLOW_UPS)
def test_a_blow_up_is_rolled_back_and_counted(name: str) -> None:
    energy, train = run(name, Guard(rollback=True))
    with pytest.warns(
        RuntimeWarning, match=rf"at step {AT} .*; restored .* \(rollback 1 of"
    ) as said:
        history = train()
    assert len([w for w in said if "rollback" in str(w.message)]) == 1
    assert history["rollbacks"].tolist() == [0.0] * AT + [1.0] * (12 - AT)
    assert all(
        bool(p.isfinite().all()) and float(p.detach().abs().max()) < 1e3
        for p in energy.parameters()
    )
    assert math.isfinite(history["loss"][-1])


@pytest.mark.parametrize("name", BLOW_UPS)
def test_a_blow_up_is_one_error(name: str) -> None:
    _, train = run(name, Guard())
    with pytest.raises(StepError, match=rf"at step {AT} .* Metrics: {{'") as caught:
        train()
    assert caught.value.step == AT
    assert "grad_norm" in caught.value.metrics


class Fails(DenoisingScoreMatching):
    """It fails before a step."""

    def begin_step(self, step: int, num_steps: int) -> None:
        if step == AT:
            raise LookupError("no such step")


def test_an_exception_before_a_step_or_in_the_validation_is_a_step_error() -> None:
    with pytest.raises(StepError, match="at step 5 LookupError was raised: no such") as caught:
        fit(net(), Fails(0.5), DATA, num_steps=12)
    assert isinstance(caught.value.__cause__, LookupError)
    energy = net()
    states: list[dict[str, Tensor]] = []

    class Second(DenoisingScoreMatching):
        """It fails at the second evaluation on validation data."""

        def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            states.append({k: v.clone() for k, v in module.state_dict().items()})
            if len(states) == 2:
                raise LookupError("no such row")
            return super().forward(module, *args, **kwargs)

    with pytest.raises(StepError, match="at step 5 LookupError was raised in the vali") as caught:
        fit(
            energy,
            DenoisingScoreMatching(0.5),
            DATA,
            num_steps=12,
            validation=DATA,
            validation_objective=Second(0.5),
            validate_every=3,
            keep_best=True,
        )
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.step == AT
    assert "grad_norm" in caught.value.metrics
    # the weights after step 2, the only ones whose loss is known
    torch.testing.assert_close(energy.state_dict(), states[0], rtol=0, atol=0)


def test_a_training_is_closed_after_an_exception() -> None:
    objective = ReverseKL(Gaussian(torch.zeros(2)), beta_start=0.1, anneal=1.0)

    def fail(*_: Any) -> None:
        if objective.beta > 0.15:
            raise LookupError("no such step")

    with pytest.raises(StepError):
        fit(NICE(2), objective, num_steps=12, transform=fail)
    assert objective.beta == 1.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, LookupError("no such image")])
def test_a_row_of_a_dataset_is_named(wrong: Any) -> None:
    rows = Rows(wrong)
    with pytest.raises(StepError, match=rf"at step {AT} data\[\d+\]: ") as caught:
        fit(net(), chains(), rows, num_steps=12, batch_size=6)
    expected = int(Batches(rows, 6).numbers(AT)[2])
    assert caught.value.row == expected
    assert f"data[{expected}]" in str(caught.value)


@pytest.mark.parametrize("size", [1e25, 1e30])
def test_a_row_whose_energy_is_not_finite_is_named(size: float) -> None:
    """It is finite itself, so it passes the check of the data."""
    data = DATA.float().clone()
    data[17] = size
    energy = MLPEnergy((2,), (8,), scale=2.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StepError, match="not finite at row 17 of the data") as caught:
        fit(energy, chains(), data, num_steps=12, batch_size=6)
    assert caught.value.row == 17


def test_energies_that_become_infinite_in_a_kernel_are_rolled_back() -> None:
    """The weights are blown up by an update, and the chains of the next step start nowhere."""
    energy = net()
    cd = ContrastiveDivergence(k=2, kernel=MALA(0.3))
    now = Once()

    def blow_up(module: Any, batch: Any, metrics: Any) -> None:
        if now():
            for parameter in module.parameters():
                parameter.data.mul_(1e200)

    with pytest.warns(RuntimeWarning, match="rollback 1 of"):
        history = fit(
            energy,
            cd,
            DATA,
            num_steps=12,
            batch_size=6,
            transform=blow_up,
            guard=Guard(rollback=True),
        )
    assert history["rollbacks"][-1] == 1.0
    assert all(float(p.detach().abs().max()) < 1e3 for p in energy.parameters())


def test_when_rollbacks_end_the_weights_are_those_that_were_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy, before = net(), net()
    monkeypatch.setattr(guards, "COPY_EVERY", 100)
    objective, now = Wrong(scaled(math.inf)), Once()
    objective._now = lambda: now() or now.calls > AT  # type: ignore[assignment]
    with (
        pytest.warns(RuntimeWarning, match="rollback"),
        pytest.raises(
            StepError, match=r"after 3 rollbacks .* restored the parameters of the start"
        ),
    ):
        fit(
            energy,
            objective,
            DATA,
            num_steps=12,
            batch_size=6,
            guard=Guard(rollback=True, max_rollbacks=3),
        )
    torch.testing.assert_close(energy.state_dict(), before.state_dict(), rtol=0, atol=0)
