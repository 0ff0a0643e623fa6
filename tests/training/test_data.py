"""What data `fit` takes, what it converts, and what it refuses with the row, the column and the
call that mends it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyroebm import Energy
from pyroebm.core.supports import spin
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    ClassifierEnergy,
    DeepBoltzmannMachine,
    Ising,
    MLPEnergy,
)
from pyroebm.flows import NICE, RedundantNICE
from pyroebm.objectives import (
    ContrastiveDivergence,
    CrossEntropy,
    DenoisingScoreMatching,
    ExactLikelihood,
    Hybrid,
    Objective,
    PersistentCD,
    Pseudolikelihood,
    ReplayBufferCD,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyroebm.targets import Gaussian
from pyroebm.training import Trainer, fit, pretrain_belief_network, pretrain_boltzmann_machine
from pyroebm.training.data import batches_of

F64 = torch.float64
NUMBERS = torch.randn(10, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


class Flat(Energy):
    """Zero everywhere, on any support."""

    def __init__(self, shape: tuple[int, ...], support: Any = constraints.real) -> None:
        super().__init__(shape, support)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(x.dim() - len(self.event_shape), x.dim()))
        return self.weight * (x.sum(dims) if dims else x)


def whole(data: Any, module: nn.Module, rows: int = 10) -> Any:
    """All rows, in their own order."""
    batches = batches_of(data, module, rows)
    order = batches.numbers(0).argsort()  # type: ignore[union-attr]
    found = batches(0)
    return tuple(p[order] for p in found) if isinstance(found, tuple) else found[order]


class Rows(Dataset[Any]):
    """A Dataset of pairs."""

    def __init__(self, pairs: bool = False) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(NUMBERS)

    def __getitem__(self, k: int) -> Any:
        return (NUMBERS[k].numpy(), k) if self.pairs else NUMBERS[k]


# --------------------------------------------------------------------------------------------------
# Conversions


@pytest.mark.parametrize(
    "data",
    [
        NUMBERS,
        NUMBERS.float().double(),
        NUMBERS.numpy(),
        np.asfortranarray(NUMBERS.numpy())[:, ::1],
        NUMBERS.numpy().astype(">f8"),
        pd.DataFrame(NUMBERS.numpy(), columns=list("abc")),
        TensorDataset(NUMBERS),
        Rows(),
    ],
    ids=[
        "tensor",
        "rounded",
        "array",
        "columns first",
        "big endian",
        "frame",
        "tensors",
        "dataset",
    ],
)
def test_every_form_of_the_same_rows_gives_the_same_batch(data: Any) -> None:
    found = whole(data, MLPEnergy((3,)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, NUMBERS.float())


def test_a_read_only_array_is_copied_and_left_alone() -> None:
    array = NUMBERS.numpy().copy()
    array.setflags(write=False)
    torch.testing.assert_close(whole(array, MLPEnergy((3,), dtype=F64)), NUMBERS)


def check_bytes() -> None:
    """0..255 of images are levels in [0, 1]; 0 and 1 stay."""
    levels = torch.arange(120, dtype=torch.uint8).reshape(10, 3, 4) * 2
    found = whole(levels, Flat((1, 3, 4)))
    torch.testing.assert_close(found, levels.float().reshape(10, 1, 3, 4) / 255)
    torch.testing.assert_close(whole(levels, Flat((12,))), levels.float().flatten(1) / 255)
    bits = levels % 4 // 2
    torch.testing.assert_close(whole(bits, Flat((12,))), bits.float().flatten(1))
    torch.testing.assert_close(whole(bits, BernoulliRBM(12, 2)), bits.float().flatten(1))
    counts = Flat((3, 4), constraints.integer_interval(0, 255))
    torch.testing.assert_close(whole(levels, counts), levels.float())


def test_bytes_of_images() -> None:
    check_bytes()


def test_bytes_of_a_table_may_be_counts() -> None:
    ages = torch.full((10, 3), 77, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"grey levels or counts: give data / 255\.0 or data \* 1"):
        batches_of(ages, Flat((3,)), 5)
    frame = pd.DataFrame(ages.numpy(), columns=["age", "size", "years"])
    torch.testing.assert_close(whole(frame, Flat((3,))), ages.float())
    torch.testing.assert_close(whole(ages.long(), Flat((3,))), ages.float())
    torch.testing.assert_close(whole(ages > 3, Flat((3,))), torch.ones(10, 3))


class Images(Dataset[Any]):
    """A Dataset of uint8 images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> Tensor:
        return self.images[k]


def test_binary_bytes_of_a_dataset_are_ambiguous() -> None:
    """As a tensor they are binary; a batch of a Dataset may be one of dark grey levels."""
    bits = (torch.arange(120) % 2).to(torch.uint8).reshape(10, 3, 4)
    torch.testing.assert_close(whole(bits, Flat((12,))), bits.float().flatten(1))
    for data in (Images(bits), DataLoader(bits, batch_size=5)):
        with pytest.raises(ValueError, match=r"give images\.float\(\).* images / 255\.0"):
            batches_of(data, Flat((12,)), 5)(0)
    torch.testing.assert_close(whole(Images(bits), BernoulliRBM(12, 2)), bits.float().flatten(1))
    levels = 200 * bits
    found = whole(Images(levels), Flat((12,)))
    torch.testing.assert_close(found, levels.float().flatten(1) / 255)


def test_dark_rows_of_a_table_of_grey_levels_are_levels() -> None:
    levels = torch.zeros(5000, 2, 2, dtype=torch.uint8)
    levels[-1] = 255
    levels[0] = 1
    assert float(whole(levels, Flat((4,)), 5000)[0, 0]) == pytest.approx(1 / 255)


def test_masked_entries_are_not_finite() -> None:
    masked = np.ma.masked_array(np.arange(30).reshape(10, 3))
    torch.testing.assert_close(whole(masked, Flat((3,))), torch.arange(30.0).reshape(10, 3))
    for dtype in (np.int64, np.float32, object):
        holes = masked.astype(dtype)
        holes[6, 1] = np.ma.masked
        with pytest.raises(ValueError, match=r"got nan in row 6, column 1: data\[~numpy\.ma"):
            batches_of(holes, Flat((3,)), 5)
        kept = holes[~np.ma.getmaskarray(holes).any(1)]
        assert len(whole(kept, Flat((3,)), 9)) == 9
    labels = np.ma.masked_array(np.arange(10), mask=np.arange(10) == 4)
    with pytest.raises(ValueError, match="got nan in row 4"):
        batches_of((NUMBERS, labels), nn.Linear(3, 2), 5)


def test_unsigned_integers_do_not_wrap_around() -> None:
    big = np.full((10, 3), 2**64 - 2**11, dtype=np.uint64)
    torch.testing.assert_close(
        whole(big, Flat((3,))), torch.full((10, 3), 2.0**64), rtol=1e-6, atol=0.0
    )
    _, labels = whole((NUMBERS, np.arange(10, dtype=np.uint64)), nn.Linear(3, 2))
    assert labels.dtype == torch.int64


def test_an_overflow_in_the_dtype_of_the_module_is_named() -> None:
    data = NUMBERS.clone()
    data[6, 1] = 1e300
    for given in (data, DataLoader(data, batch_size=10)):
        with pytest.raises(
            ValueError, match=r"torch\.float32.*got 1e\+300 in row 6, column 1, whi"
        ):
            batches_of(given, MLPEnergy((3,)), 10)(0)
    torch.testing.assert_close(whole(data, MLPEnergy((3,), dtype=F64)), data)


@pytest.mark.parametrize(
    ("given", "event"),
    [
        ((4, 4), (1, 4, 4)),
        ((4, 4), (16,)),
        ((1, 4, 4), (16,)),
        ((4, 4, 1), (1, 4, 4)),
        ((1, 4, 4), (4, 4)),
        ((), (1,)),
        ((1,), ()),
        ((3, 4, 4), (48,)),
    ],
)
def test_shapes_that_hold_the_same_numbers(given: tuple[int, ...], event: tuple[int, ...]) -> None:
    x = torch.randn(10, *given)
    torch.testing.assert_close(whole(x, Flat(event)), x.reshape(10, *event))


@pytest.mark.parametrize(
    ("given", "event", "said"),
    [
        ((4, 4, 3), (3, 4, 4), r"permute\(0, 3, 1, 2\)"),
        ((16,), (4, 4), r"must have shape \(N, 4, 4\) for Flat, got \(N, 16\)"),
        ((4, 2), (2, 4), r"must have shape \(N, 2, 4\)"),
        ((5,), (3,), r"must have shape \(N, 3\) for Flat, got \(N, 5\)"),
        ((2,), (), r"must have shape \(N,\) for Flat, got \(N, 2\)"),
    ],
)
def test_other_shapes_are_refused(
    given: tuple[int, ...], event: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        batches_of(torch.zeros(10, *given), Flat(event), 5)


def test_labels_stay_labels() -> None:
    energy = ClassifierEnergy(nn.Linear(3, 2), (3,), 2, scale=1.0)
    for labels in (torch.arange(10) % 2, np.arange(10) % 2, pd.Series(np.arange(10) % 2)):
        x, y = whole((NUMBERS.numpy(), labels), energy)
        assert x.dtype == torch.float32
        assert y.tolist() == [0, 1] * 5
        assert y.dtype == torch.int64
    x, y = whole(Rows(pairs=True), energy)
    torch.testing.assert_close(x, NUMBERS.float())
    assert y.tolist() == list(range(10))
    fit(energy, Hybrid(), (NUMBERS.numpy(), np.arange(10) % 2), num_steps=1)
    history = fit(nn.Linear(3, 2), CrossEntropy(), (NUMBERS, np.arange(10) % 2), num_steps=1)
    assert 0.0 <= float(history["error"][0]) <= 1.0


def test_machines_take_visible_units_and_their_means() -> None:
    bits = (NUMBERS > 0).double()
    for machine in (BoltzmannMachine(3, 2, dtype=F64), DeepBoltzmannMachine([3, 2, 2], dtype=F64)):
        torch.testing.assert_close(whole(bits, machine), bits)
        wrong = bits.clone()
        wrong[4, 1] = 2.0
        with pytest.raises(ValueError, match=r"support of \w+Machine.*got 2 in row 4, column 1"):
            batches_of(wrong, machine, 5)
    torch.testing.assert_close(whole(0.3 * bits, BernoulliRBM(3, 2, dtype=F64)), 0.3 * bits)


def test_visible_units_of_another_kind_than_the_hidden_ones() -> None:
    """Normal visible units and binary hidden ones: real numbers, alone and with the others."""
    machine = pretrain_boltzmann_machine(
        [3, 4, 2], NUMBERS, ContrastiveDivergence(), visible="gaussian", num_steps=1
    )
    torch.testing.assert_close(whole(NUMBERS, machine), NUMBERS)
    fit(machine, PersistentCD(5), NUMBERS, num_steps=1)
    units = torch.cat([NUMBERS, torch.ones(10, 6, dtype=F64)], 1)
    torch.testing.assert_close(whole(units, machine), units)
    with pytest.raises(ValueError, match="support of DeepBoltzmannMachine"):
        batches_of(0.5 * units, machine, 5)


def test_a_flow_takes_its_x() -> None:
    torch.testing.assert_close(whole(NUMBERS[:, :2], RedundantNICE(2, 3)), NUMBERS[:, :2].float())
    with pytest.raises(ValueError, match=r"\(N, 2\) for RedundantNICE, got \(N, 3\)"):
        batches_of(NUMBERS, RedundantNICE(2, 3), 5)


# --------------------------------------------------------------------------------------------------
# Refusals


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"height": np.ones(10), "weight": np.ones(10), "age": np.ones(10)} | columns
    )


def holed(dtype: Any = float) -> Any:
    return pd.Series([1.0] * 6 + [None] + [1.0] * 3, dtype=dtype)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (frame(weight=holed()), r"got nan in row 6, column 'weight': data\.dropna\(\)"),
        (frame(weight=holed("object")), r"got nan in row 6, column 'weight'"),
        (frame(name=["a"] * 10), r"column 'name' of \w+ with 'a' in row 0: drop it"),
        (frame(more=1.0), r"its columns are \['height', 'weight', 'age', 'more'\]: select 3"),
        (np.array([["1", "2", "3"]]), "must be numbers, got an array of <U1 with '1'"),
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.inf, 3.0]]), r"got inf in row 1, column 1"),
        (np.ones((2, 3), dtype=complex), r"of complex128 with '\(1\+0j\)': its \.real and \.imag"),
        (np.array([[1.0, 2.0, 1j]], dtype=object), r"must be numbers, got an array of object"),
        (frame(age=pd.to_timedelta([1] * 10, "s")), r"column 'age' of timedelta64.*divide it by"),
        (np.empty((0, 3), dtype="U1"), "must be numbers, got an array of <U1: drop"),
        (
            pd.DataFrame(np.ones((10, 3)), columns=list("aba")),
            r"columns of different names, got \['a'\] more than once in \['a', 'b', 'a'\]",
        ),
        (torch.eye(3).to_sparse(), r"data\.to_dense\(\)"),
        (torch.eye(3).to(torch.complex64), "must be real numbers"),
        ([[1.0, 2.0, 3.0]], r"torch\.as_tensor"),
        (torch.tensor(1.0), "a single number"),
        ("rows.csv", "a Dataset or a DataLoader, got str"),
    ],
)
def test_tables_that_are_no_data_are_refused(data: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(MLPEnergy((3,)), ContrastiveDivergence(), data, num_steps=1)


def test_the_row_is_counted_over_the_whole_table() -> None:
    data = torch.zeros(10_000, 3)
    data[9_000, 2] = torch.nan
    with pytest.raises(ValueError, match="got nan in row 9000, column 2"):
        batches_of(data, MLPEnergy((3,)), 5)


def check_supports() -> None:
    bits = (NUMBERS > 0).double()
    grey = 255.0 * bits
    machines = (
        (BernoulliRBM(3, 2, dtype=F64), PersistentCD(4)),
        (BoltzmannMachine(3, dtype=F64), ReplayBufferCD(4)),
    )
    for machine, chains in machines:
        for objective in (ContrastiveDivergence(), chains):
            for data, said in (
                (grey, r"got 255 in row \d, column \d.*: \(data > 127.5\) \* 1\.0"),
                (2.0 * bits - 1.0, r"got -1 in row \d, column \d.*: \(data \+ 1\) / 2"),
            ):
                with pytest.raises(ValueError, match=said):
                    fit(machine, objective, data, num_steps=1)
            fit(machine, objective, bits, num_steps=1)


def test_binary_machines_refuse_grey_levels_and_spins() -> None:
    check_supports()


@pytest.mark.parametrize(
    ("energy", "data", "said"),
    [
        (Ising((3,), 0.3), (NUMBERS > 0).float(), r"2\.0 \* data - 1 maps 0 and 1 to -1 and \+1"),
        (BoltzmannMachine(3), 0.3 * (NUMBERS > 0), r"\(data > 0\.5\) \* 1\.0"),
        (Flat((3,), constraints.positive), NUMBERS.float(), r"got -\d.* in row \d, column \d"),
        (Flat((3,), constraints.simplex), NUMBERS.float(), r"support of Flat, .*got row \d"),
        (Flat((3,), spin), NUMBERS.float(), r"support of Flat"),
    ],
)
def test_other_supports(energy: Energy, data: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batches_of(data, energy, 5)


def test_labels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pandas\.factorize"):
        batches_of((NUMBERS, np.array(["cat"] * 10)), nn.Linear(3, 2), 5)


def test_columns_of_validation_data_are_those_of_the_training_data() -> None:
    names = ["height", "weight", "age"]
    train = pd.DataFrame(NUMBERS.numpy(), columns=names)
    options: dict[str, Any] = {"num_steps": 1}
    energy, objective = MLPEnergy((3,), dtype=F64), ScoreMatching()
    again = copy.deepcopy(energy)
    ours = fit(energy, objective, train, validation=train, **options)
    theirs = fit(again, objective, train, validation=train[names[::-1]], **options)
    torch.testing.assert_close(theirs.validation["loss"], ours.validation["loss"])
    other = train.rename(columns={"age": "years"})
    said = r"columns of the training data, \['height', 'weight', 'age'\], got .*'years'\]"
    with pytest.raises(ValueError, match=f"validation must have the {said}"):
        fit(energy, objective, train, validation=other, **options)
    fit(energy, objective, NUMBERS, validation=other, **options)


@pytest.mark.parametrize(
    "objective",
    [
        DenoisingScoreMatching(sigma=0.5),
        ScoreMatching(),
        SlicedScoreMatching(),
        ContrastiveDivergence(),
        PersistentCD(4),
        ReplayBufferCD(4),
        Pseudolikelihood(),
        ExactLikelihood(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_labels_are_refused_by_objectives_of_events(objective: Objective) -> None:
    energy = MLPEnergy((3,), dtype=F64)
    said = f"must be one tensor of events for {type(objective).__name__}, got a tuple of 2"
    pair = (NUMBERS, torch.arange(10))
    tables = [(pair, ""), (list(pair), ""), (TensorDataset(*pair), r"\.tensors")]
    for data, part in tables:
        with pytest.raises(ValueError, match=rf"data {said}: give data{part}\[0\]"):
            Trainer(energy, objective, data, num_steps=1)
    with pytest.raises(ValueError, match=rf"validation {said}: give validation\[0\]"):
        Trainer(energy, objective, NUMBERS, validation=pair, num_steps=1)
    for loaded in (Rows(pairs=True), DataLoader(TensorDataset(*pair), batch_size=5)):
        trainer = Trainer(energy, objective, loaded, num_steps=1)
        with pytest.raises(ValueError, match=f"data {said}: give the events alone in each item"):
            trainer.step()


def test_a_tuple_of_one_part_is_that_part() -> None:
    energy = MLPEnergy((3,), dtype=F64)

    class Single(Rows):
        def __getitem__(self, k: int) -> Any:
            return (super().__getitem__(k),)

    expected = NUMBERS[:5]
    loader = DataLoader(TensorDataset(NUMBERS), batch_size=5)
    torch.testing.assert_close(batches_of(loader, energy, 5)(0), expected)
    whole = batches_of(NUMBERS, energy, 5)(0)
    for data in ((NUMBERS,), [NUMBERS.numpy()], TensorDataset(NUMBERS), Single()):
        torch.testing.assert_close(batches_of(data, energy, 5)(0), whole)
    history = fit(energy, ContrastiveDivergence(), loader, validation=loader, num_epochs=1)
    assert len(history.steps) == 2
    with pytest.raises(ValueError, match="must be finite, got nan"):
        fit(energy, ContrastiveDivergence(), (NUMBERS * torch.nan,), num_steps=1)


def test_functions_and_objectives_of_labels_take_tuples() -> None:
    def mean_energy(energy: Energy, batch: Any, *, generator: Any = None) -> Any:
        return energy(batch[0]).mean(), {}

    pair = (NUMBERS, torch.arange(10) % 2)
    fit(MLPEnergy((3,)), mean_energy, pair, validation=pair, num_steps=1)
    fit(nn.Linear(3, 2), CrossEntropy(), pair, validation=pair, num_steps=1)
    with pytest.raises(ValueError, match="validation must be one tensor of events for Pseudo"):
        fit(
            MLPEnergy((3,)),
            mean_energy,
            pair,
            validation=pair,
            validation_objective=Pseudolikelihood(),
            num_steps=1,
        )


# --------------------------------------------------------------------------------------------------
# Datasets and loaders


def test_a_dataset_resumes_and_is_shared_as_rows_are() -> None:
    energy = MLPEnergy((3,), dtype=F64)
    ours, theirs = batches_of(NUMBERS, energy, 4, seed=3), batches_of(Rows(), energy, 4, seed=3)
    for step in (5, 0, 3):
        torch.testing.assert_close(ours(step), theirs(step))
    share = batches_of(Rows(), energy, 4, seed=3, ranks=(1, 2))
    torch.testing.assert_close(share(1), theirs(1)[1::2])


def test_batches_of_datasets_are_checked_as_they_come() -> None:
    class Holed(Rows):
        def __getitem__(self, k: int) -> Any:
            return NUMBERS[k] * (torch.nan if k == 7 else 1.0)

    class Words(Rows):
        def __getitem__(self, k: int) -> Any:
            return {"x": NUMBERS[k]}

    with pytest.raises(ValueError, match="must be finite, got nan"):
        fit(MLPEnergy((3,)), ContrastiveDivergence(), Holed(), num_epochs=1)
    with pytest.raises(ValueError, match="tensors or tuples of tensors, got a dict"):
        fit(MLPEnergy((3,)), ContrastiveDivergence(), Words(), num_epochs=1)


def test_a_loader_is_iterated_as_it_is(tmp_path: Any) -> None:
    loader = DataLoader(NUMBERS.float(), batch_size=4)
    seen = []

    def objective(energy: Energy, batch: Tensor, *, generator: Any = None) -> Any:
        seen.append(batch)
        return energy(batch).mean(), {}

    history = fit(MLPEnergy((3,)), objective, loader, num_epochs=2)
    assert [len(x) for x in seen] == [4, 4, 2] * 2
    torch.testing.assert_close(torch.cat(seen), NUMBERS.float().repeat(2, 1))
    assert len(history["loss"]) == 6
    options: dict[str, Any] = {"num_epochs": 1, "checkpoint": tmp_path / "run.safetensors"}
    fit(MLPEnergy((3,)), objective, loader, **options)
    with pytest.raises(ValueError, match="must not be a DataLoader with resume=True"):
        fit(MLPEnergy((3,)), objective, loader, resume=True, **options)
    with pytest.raises(ValueError, match="must have batches, got none"):
        fit(MLPEnergy((3,)), objective, DataLoader(NUMBERS[:0]), num_steps=1)
    with pytest.raises(ValueError, match="in 2 processes"):
        batches_of(loader, MLPEnergy((3,)), 4, ranks=(0, 2))


def test_a_stream_needs_a_loader() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(NUMBERS.float())

    with pytest.raises(ValueError, match="wrap it in a DataLoader"):
        batches_of(Stream(), MLPEnergy((3,)), 4)
    loader = DataLoader(Stream(), batch_size=4)
    history = fit(MLPEnergy((3,)), ContrastiveDivergence(), loader, num_steps=5)
    assert len(history["loss"]) == 5
    with pytest.raises(ValueError, match=r"must have a length for num_epochs.*give num_steps"):
        fit(MLPEnergy((3,)), ContrastiveDivergence(), loader, num_epochs=1)


# --------------------------------------------------------------------------------------------------
# What else takes data


def test_scores_of_samples_are_log_densities() -> None:
    distribution = Gaussian(torch.zeros(2, dtype=F64), scale=2.0)
    truth = torch.distributions.Normal(0.0, 2.0).log_prob(NUMBERS[:, :2]).sum(1)
    torch.testing.assert_close(distribution.score_samples(NUMBERS[:, :2]), truth)
    energy = MLPEnergy((3,), dtype=F64)
    torch.testing.assert_close(energy.score_samples(NUMBERS), -energy(NUMBERS))
    flow = NICE(2, dtype=F64)
    torch.testing.assert_close(flow.score_samples(NUMBERS[:, :2]), flow.log_prob(NUMBERS[:, :2]))
    flow = RedundantNICE(1, 2, dtype=F64)
    torch.testing.assert_close(flow.score_samples(NUMBERS[:, :1]), flow.log_prob_x(NUMBERS[:, :1]))
    with pytest.raises(ValueError, match="at most one auxiliary variable"):
        RedundantNICE(1, 3).score_samples(torch.zeros(1, 1))


def test_pretraining_has_files_for_each_layer(tmp_path: Any) -> None:
    bits = (NUMBERS > 0).double()
    options: dict[str, Any] = {"num_epochs": 2, "resume": True}
    options |= {"checkpoint": tmp_path / "net.safetensors", "log": tmp_path / "net.jsonl"}
    first = pretrain_belief_network([3, 2, 2], bits, PersistentCD(5), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"net-{layer}.{kind}" for layer in (1, 2) for kind in ("jsonl", "safetensors")
    ]
    again = pretrain_belief_network([3, 2, 2], bits, PersistentCD(5), **options)
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
