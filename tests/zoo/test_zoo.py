"""Trained models that ship: each is what its card says, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lib.checks import within_se

from pyroebm import Energy, zoo
from pyroebm.cli import main
from pyroebm.core.files import FileError, file_checksum, read_settings, write_settings
from pyroebm.core.saving import save
from pyroebm.energies import BernoulliRBM
from pyroebm.partition import exact, quadrature
from pyroebm.zoo import registry
from pyroebm.zoo.cards import read_card
from pyroebm.zoo.verification import agree

NAMES = zoo.list()
BARS = "boltzmann-machine-bars"
DATA = zoo.Data(name="none", binarization="none", license="none", source="none", ships=True)
TRAINING = zoo.Training(
    command="none", recipe="none", settings={}, seeds=(0,), machine="none", minutes=0.0, versions={}
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_entry(folder: Path, log_z: tuple[zoo.Metric, ...] | None = None, **changed: Any) -> Path:
    """An entry with a small machine and a card without metrics."""
    folder.mkdir(parents=True)
    machine = BernoulliRBM(6, 3, weight=0.5 * torch.randn(6, 3, generator=seeded())).double()
    save(machine, folder / "model.safetensors")
    if log_z is None:
        value = exact(machine.requires_grad_(False)).value
        log_z = (stated(value, computation="enumeration"),)
    card = zoo.Card(
        name=folder.name,
        title="title",
        description="description",
        model="BernoulliRBM",
        event_shape=(6,),
        num_parameters=27,
        num_bytes=1,
        data=DATA,
        training=TRAINING,
        log_z=log_z,
        metrics=(),
        checks=(),
        known_failures=(),
        files={"model.safetensors": file_checksum(folder / "model.safetensors")},
    )
    dataclasses.replace(card, **changed).write(folder / "card.json")
    return folder


def stated(value: float, error: float = 0.0, kind: str = "exact", **rest: Any) -> zoo.Metric:
    return zoo.Metric(
        **{
            "name": "number",
            "value": value,
            "standard_error": error,
            "kind": kind,
            "computation": "enumeration",
            **rest,
        }
    )


# --------------------------------------------------------------------------------------------------
# Every entry


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_what_their_cards_say(name: str) -> None:
    found = zoo.verify(name, generator=seeded(1))
    assert found.passed, str(found)
    assert all(row.status == "holds" for row in found.rows), str(found)


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_complete(name: str) -> None:
    card = zoo.card(name)
    folder = registry.ENTRIES / name
    model = zoo.load(name)
    assert card.name == name
    assert type(model).__name__ == card.model
    assert sum(p.numel() for p in model.parameters()) == card.num_parameters
    assert sum((folder / file).stat().st_size for file in card.files) == card.num_bytes
    assert all(check.passed for check in card.checks)
    assert card.metrics
    assert all(len(m.over_seeds) == len(card.training.seeds) for m in card.metrics)
    assert all(m.over_seeds[0] == m.value for m in (*card.log_z, *card.metrics))


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_targets_whose_log_z_is_right(name: str) -> None:
    energy = zoo.target(name)
    assert energy.dtype == torch.float64
    x = energy.initial(3, seeded())
    assert energy(x).shape == (3,)
    if zoo.card(name).data.name.startswith("two moons"):
        found = quadrature(energy.energy, [(-6.0, 6.0)] * 2, tolerance=1e-5)  # type: ignore[union-attr]
        assert energy.log_z == pytest.approx(found.value, abs=1e-4)
    else:
        assert energy.log_z == pytest.approx(zoo.card(name).log_z[0].value, abs=1e-9)


def test_exact_log_z_is_the_sum_over_all_states() -> None:
    """Of the smallest machine, by its energy alone."""
    energy = zoo.target(BARS)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 15)
    assert zoo.card(BARS).exact_log_z == pytest.approx(
        float(torch.logsumexp(-energy(states), 0)), abs=1e-9
    )


def test_reference_draws_have_the_distribution() -> None:
    """Frequencies of visible units against all states."""
    energy, draws = zoo.target(BARS), zoo.reference_draws(BARS)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 15)
    truth = torch.softmax(-energy(states), 0) @ states
    flat = draws.flatten(0, 1)
    within_se(flat.mean(0), truth, flat.std(0) / len(flat) ** 0.5)


def test_all_entries_together_are_small() -> None:
    files = [p for p in registry.ENTRIES.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12e6  # the wheel must be below 15 MB


# --------------------------------------------------------------------------------------------------
# Names, other packages


def test_wrong_names_have_near_ones() -> None:
    with pytest.raises(ValueError, match="near names: rbm-digits-16"):
        zoo.load("rbm-digit-16")
    assert zoo.list("no-such*") == ()


def entry_point(folder: Path, name: str = "more") -> Any:
    return SimpleNamespace(
        name=name, value="x:y", dist=SimpleNamespace(name="other"), load=lambda: folder
    )


def test_other_packages_add_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_entry(tmp_path / "mine")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point(tmp_path)])
    assert "mine" in zoo.list()
    assert zoo.verify("mine").passed
    assert zoo.target("mine").log_z is not None


def test_a_clash_of_names_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_entry(tmp_path / BARS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point(tmp_path)])
    with pytest.raises(ValueError, match=rf"pyroebm and other \(more\) both have '{BARS}'"):
        zoo.list()


def test_an_entry_point_without_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [entry_point(tmp_path / "nowhere")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with pytest.raises(FileError, match="'more' of other must name a folder"):
        zoo.list()


# --------------------------------------------------------------------------------------------------
# Damaged and foreign files


@pytest.mark.parametrize("file", ["model.safetensors", "reference.npz", "config.json"])
def test_a_changed_bit_is_found(file: str, tmp_path: Path) -> None:
    folder = zoo.export(BARS, tmp_path / "bars")
    content = bytearray((folder / file).read_bytes())
    for place in (len(content) // 3, len(content) // 2, len(content) - 9):
        changed = content.copy()
        changed[place] ^= 1
        (folder / file).write_bytes(changed)
        with pytest.raises(FileError, match=file):
            zoo.verify(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "reference.npz"])
def test_a_missing_file_is_named(file: str, tmp_path: Path) -> None:
    folder = zoo.export(BARS, tmp_path / "bars")
    (folder / file).unlink()
    with pytest.raises(FileError, match=file):
        zoo.verify(folder)


def test_another_density_under_the_same_name_is_found(tmp_path: Path) -> None:
    folder = make_entry(tmp_path / "rbm")
    save(BernoulliRBM(6, 3, weight=torch.zeros(6, 3)), folder / "model.safetensors")
    with pytest.raises(FileError, match="not the one that the card describes"):
        zoo.load(folder)


def rewritten(folder: Path, change: Any) -> None:
    """Change the fields of a card, with the checksum of the changed card."""
    content = read_settings(folder / "card.json")
    change(content)
    write_settings(folder / "card.json", content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(colour="red"), r"unknown \['colour'\]"),
        (lambda c: c.pop("title"), r"without \['title'\]"),
        (lambda c: c.update(num_bytes="many"), "card.num_bytes must be of type"),
        (lambda c: c["data"].update(more=1), r"card.data must have the fields .* \['more'\]"),
        (lambda c: c["log_z"][0].update(kind="sure"), r"card.log_z\[0\].kind"),
        (lambda c: c["log_z"][0].update(standard_error=0.1), "must be 0"),
        (lambda c: c.update(log_z=[]), "exact number, or a lower bound and an upper"),
        (lambda c: c.update(format=2), "must have format 1, got format 2"),
        (lambda c: c.update(event_shape=["6"]), r"card.event_shape\[0\]"),
    ],
)
def test_a_wrong_card_names_the_field(change: Any, said: str, tmp_path: Path) -> None:
    folder = make_entry(tmp_path / "rbm")
    rewritten(folder, change)
    with pytest.raises(FileError, match=said):
        zoo.card(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '"x"', "{", "\x00"])
def test_foreign_files_are_no_cards(text: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(FileError):
        read_card(path)


def test_cards_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = make_entry(tmp_path / "rbm", known_failures=("one", "two"))
    card = zoo.card(folder)
    card.write(tmp_path / "again.json")
    assert read_card(tmp_path / "again.json") == card
    assert card.known_failures == ("one", "two")


# --------------------------------------------------------------------------------------------------
# Verification


def test_a_wrong_number_fails(tmp_path: Path) -> None:
    truth = zoo.target(make_entry(tmp_path / "right")).log_z or 0.0
    wrong = make_entry(tmp_path / "wrong", log_z=(stated(truth + 1e-4),))
    found = zoo.verify(wrong)
    assert not found.passed
    assert [row.status for row in found.rows] == ["fails"]
    assert "wrong: fails" in str(found)


def test_numbers_without_their_data_need_it(tmp_path: Path) -> None:
    number = stated(-100.0, computation="mean_log_likelihood", data="mnist/test")
    found = zoo.verify(make_entry(tmp_path / "rbm", metrics=(number,)))
    assert [row.status for row in found.rows] == ["holds", "needs data"]
    assert found.passed


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (stated(0.0, computation="guess"), "computation must be one of"),
        (stated(0.0, computation="normalized"), "model must be a flow"),
        (stated(0.0, computation="mass_of_data"), "must name its data"),
        (stated(0.0, computation="mass_of_data", data="letters/all"), "data must be"),
    ],
)
def test_what_cannot_be_computed_says_why(number: zoo.Metric, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        zoo.verify(make_entry(tmp_path / "rbm", metrics=(number,)))


def test_estimates_agree_within_five_errors() -> None:
    one = stated(1.0, 0.1, "estimate").estimate
    assert agree(one, stated(1.6, 0.1, "estimate").estimate)
    assert not agree(one, stated(1.8, 0.1, "estimate").estimate)
    assert not agree(stated(1.0).estimate, stated(1.001).estimate)


def test_log_z_is_bracketed_by_annealing(tmp_path: Path) -> None:
    """Both bounds are on their sides of the exact value, and so are those of the likelihood."""
    machine = zoo.load("rbm-digits-16").double()
    data = zoo.load_data("digits/train")
    truth, test = exact(machine), zoo.load_data("digits/test")
    likelihood = float(-machine(test).mean()) - truth.value
    arguments = {"num_temperatures": 300, "num_chains": 50}
    bracket = [
        zoo.compute(name, zoo.Context(machine, (), data, None, seeded(k)), arguments)
        for k, name in enumerate(("forward_annealing", "reverse_annealing"))
    ]
    assert [found.kind for found in bracket] == ["lower", "upper"]
    for found in bracket:
        within_se(found.value, truth.value, found.standard_error)
    for bound, found in (("upper", bracket[0]), ("lower", bracket[1])):
        result = zoo.compute(
            "mean_log_likelihood", zoo.Context(machine, bracket, test), {"bound": bound}
        )
        assert result.kind == bound
        assert result.standard_error == found.standard_error
        within_se(result.value, likelihood, result.standard_error)


# --------------------------------------------------------------------------------------------------
# Criteria of reference draws


class Normal(Energy):
    event_shape = (1,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.square().sum(-1)


def test_criteria_pass_independent_draws_and_fail_others() -> None:
    good = torch.randn(10, 1000, 1, generator=seeded(), dtype=torch.float64)
    assert all(check.passed for check in zoo.check_draws(Normal(), good))
    assert zoo.compare_moments(Normal(), good).passed

    def failing(draws: torch.Tensor, divergences: int = 0) -> set[str]:
        checks = zoo.check_draws(Normal(), draws, divergences)
        return {check.name.split(",")[0] for check in checks if not check.passed}

    sticky = (good[:, 1:] + 0.1 * good[:, :-1]) / 1.01**0.5
    assert failing(sticky) == {"largest autocorrelation of lag 1"}
    assert "largest R-hat" in failing(good + torch.linspace(-0.5, 0.5, 10).reshape(10, 1, 1))
    assert failing(good, 1) == {"divergences"}
    assert not zoo.compare_moments(Normal(), 1.05 * good).passed


# --------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_entry_is_read_back(name: str, tmp_path: Path) -> None:
    folder = zoo.export(name, tmp_path / "export")
    assert zoo.card(folder) == zoo.card(name)
    mine, theirs = zoo.load(folder).state_dict(), zoo.load(name).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_front_matter_is_a_model_index(tmp_path: Path) -> None:
    folder = zoo.export(BARS, tmp_path / "export")
    _, front, page = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found, card = yaml.safe_load(front), zoo.card(BARS)
    (index,) = found["model-index"]
    (result,) = index["results"]
    assert index["name"] == BARS
    assert [m["value"] for m in result["metrics"]] == [
        m.value for m in (*card.log_z, *card.metrics)
    ]
    assert {"task", "dataset", "metrics"} <= result.keys()
    assert page.strip() == zoo.card_markdown(card).strip()
    assert json.loads((folder / "config.json").read_text())["architectures"] == [card.model]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="folder must be empty"):
        zoo.export(BARS, tmp_path)


# --------------------------------------------------------------------------------------------------
# The command line


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pyroebm", "zoo", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "list", "*bars") == 0
    assert capsys.readouterr().out.startswith(BARS)
    assert command(monkeypatch, "list", "nothing*") == 1
    assert command(monkeypatch, "show", BARS) == 0
    assert "## Metrics" in capsys.readouterr().out
    assert command(monkeypatch, "verify", BARS) == 0
    assert f"{BARS}: holds" in capsys.readouterr().out
    assert command(monkeypatch, "sample", BARS, "--num-samples", "7", "--out", "x.npz") == 0
    assert np.load("x.npz")["draws"].shape == (7, 15)
    assert command(monkeypatch, "export", BARS, "bars") == 0
    assert command(monkeypatch, "verify", "bars") == 0
    capsys.readouterr()
    assert command(monkeypatch, "show", "boltzmann-machine-bar") == 2
    assert f"near names: {BARS}" in capsys.readouterr().err
    Path("bars", "model.safetensors").write_bytes(b"")
    assert command(monkeypatch, "verify", "bars") == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_a_failed_verification_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_entry(tmp_path / "wrong", log_z=(stated(0.0),))
    assert command(monkeypatch, "verify", str(tmp_path / "wrong")) == 1


def test_chains_sample_what_has_no_exact_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.npz"
    words = ("sample", "score-moons", "--num-samples", "10", "--warmup-steps", "10")
    assert command(monkeypatch, *words, "--out", str(out)) == 0
    assert np.load(out)["draws"].shape == (10, 2)


# --------------------------------------------------------------------------------------------------
# The builder, the README


def test_each_entry_is_in_the_builders_table() -> None:
    from models import zoo as builder

    assert set(builder.ENTRIES) == {p.name for p in registry.ENTRIES.iterdir()}


def test_the_readme_and_the_pages_are_those_of_the_cards() -> None:
    from models import zoo as builder

    stale = [p for p, text in builder.pages().items() if p.read_text(encoding="utf-8") != text]
    assert not stale, f"run `python -m models.zoo --table`: {stale}"


def test_a_changed_density_is_a_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import zoo as builder

    entry = dataclasses.replace(builder.ENTRIES[BARS], seeds=(5,), settings={"quick": True})
    monkeypatch.setitem(builder.ENTRIES, BARS, entry)
    shutil.copytree(registry.ENTRIES / BARS, tmp_path / "entries" / BARS)
    with pytest.raises(ValueError, match="a changed density is a new name"):
        builder.make(BARS, tmp_path / "runs", tmp_path / "entries", False)


def test_an_entry_is_made_and_a_finished_training_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import zoo as builder

    entry = dataclasses.replace(builder.ENTRIES[BARS], seeds=(5, 6), settings={"quick": True})
    monkeypatch.setitem(builder.ENTRIES, BARS, entry)
    card = builder.make(BARS, tmp_path / "runs", tmp_path / "entries", False)
    assert zoo.verify(tmp_path / "entries" / BARS).passed
    assert card.metrics[0].spread is not None
    monkeypatch.setattr("models.boltzmann_machine.main", None)
    assert builder.make(BARS, tmp_path / "runs", tmp_path / "entries", False) == zoo.card(
        tmp_path / "entries" / BARS
    )
