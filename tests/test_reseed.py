"""The option --reseed: every generator draws other numbers, nothing else changes; and what is
marked statistical."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from lib.checks import within_se
from lib.reseed import (
    STRIDE,
    fixed_problem,
    is_statistical,
    problem_generator,
    seeds_shifted,
    shifted,
    tenth_of,
)
from lib.scripts import load_script

from pyroebm.core.rng import seeded_generator
from pyroebm.targets import DoubleWell

ROOT = Path(__file__).resolve().parents[1]


def from_torch(seed: int) -> Any:
    torch.manual_seed(seed)
    return torch.rand(3).tolist()


def from_torch_random(seed: int) -> Any:
    torch.random.manual_seed(seed)
    return torch.rand(3).tolist()


def from_pyro(seed: int) -> Any:
    pyro.set_rng_seed(seed)
    return torch.rand(3).tolist()


#: Every way by which a seed reaches a generator in the tests and the package.
WAYS: dict[str, Callable[[int], Any]] = {
    "torch.Generator": lambda seed: torch.rand(
        3, generator=torch.Generator().manual_seed(seed)
    ).tolist(),
    "torch.manual_seed": from_torch,
    "torch.random.manual_seed": from_torch_random,
    "pyro.set_rng_seed": from_pyro,
    "numpy.random.default_rng": lambda seed: np.random.default_rng(seed).random(3).tolist(),
    "seeded_generator": lambda seed: torch.rand(
        3, generator=seeded_generator(seed, spawned=1)
    ).tolist(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_shift_draws_other_numbers_and_the_same_ones_again(way: str) -> None:
    drawn = []
    with torch.random.fork_rng():
        for shift in (0, 1, 0, 1, 2):
            with seeds_shifted(shift):
                drawn.append([WAYS[way](seed) for seed in (0, 1)])
    before, one, again, twin, two = drawn
    assert before == again
    assert one == twin
    different = [*before, *one, *two]
    assert all(a != b for k, a in enumerate(different) for b in different[:k])


def replaced() -> list[Any]:
    return [
        torch.Generator,
        torch.manual_seed,
        torch.random.manual_seed,
        np.random.default_rng,
        torch.get_rng_state().tolist(),
    ]


def test_no_shift_replaces_nothing() -> None:
    kept = replaced()
    with seeds_shifted(0):
        assert replaced() == kept
    with seeds_shifted(3):
        assert all(a != b for a, b in zip(replaced(), kept, strict=True))
    assert replaced() == kept


def test_a_shifted_generator_is_one() -> None:
    with seeds_shifted(1):
        made, twin = torch.Generator().manual_seed(7), torch.Generator()
        for generator in (made, twin, torch.default_generator, made.clone_state()):
            assert isinstance(generator, torch.Generator)
        assert made.initial_seed() == shifted(7, 1) == 7 + STRIDE
        assert problem_generator(7).initial_seed() == 7
        with fixed_problem():
            assert torch.Generator().manual_seed(7).initial_seed() == 7
            assert torch.equal(torch.rand(3), torch.rand(3, generator=problem_generator(0)))
        twin.set_state(made.get_state())
        assert torch.equal(torch.rand(3, generator=twin), torch.rand(3, generator=made))
        # None is no seed
        assert np.random.default_rng().random() != np.random.default_rng().random()
        with pytest.raises(RuntimeError, match="expected a long"):
            torch.Generator().manual_seed("seven")  # type: ignore[arg-type]


def other_seeds(source: str) -> Iterator[str]:
    """Ways by which a seed would reach a generator past the shift."""
    wrong = ("RandomState", "Philox", "PCG64", "MT19937", "Random", "SystemRandom")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in (
            "torch",
            "torch.random",
            "numpy.random",
            "random",
        ):
            yield from (
                f"{node.lineno}: imports {name.name}"
                for name in node.names
                if name.name in SHIFTED or node.module == "random"
            )
        if not isinstance(node, ast.Call):
            continue
        called, name = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        if name in wrong or (
            name == "seed"
            and called.startswith(("random.", "np.random.", "numpy.random.", "torch."))
        ):
            yield f"{node.lineno}: {called}"
        if name == "manual_seed" and called.startswith(("torch.default_generator", "torch.cuda")):
            yield f"{node.lineno}: {called}"
        yield from (
            f"{node.lineno}: random_state" for word in node.keywords if word.arg == "random_state"
        )


SHIFTED = {"Generator", "manual_seed", "default_rng"}
#: With the reason.
ALLOWED = {
    "pyroebm/data/datasets.py": 1,  # scikit-learn's split of its digits, which the docstring names
    "tests/targets/test_toys.py": 3,  # seeded by numbers drawn from a generator
}


def test_no_seed_goes_past_the_shift() -> None:
    found = {}
    for folder in ("tests", "pyroebm", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            ways = list(other_seeds(path.read_text(encoding="utf-8")))
            if len(ways) != ALLOWED.get(path.relative_to(ROOT).as_posix(), 0):
                found[path.relative_to(ROOT).as_posix()] = ways
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "np.random.RandomState(0)",
        "random.seed(0)",
        "np.random.seed(0)",
        "random.Random(0)",
        "make_moons(9, random_state=0)",
        "from torch import Generator",
        "from numpy.random import default_rng",
        "torch.default_generator.manual_seed(0)",
        "np.random.Generator(np.random.PCG64(0))",
    ],
)
def test_other_seeds_are_seen(source: str) -> None:
    assert list(other_seeds(source))


# --------------------------------------------------------------------------------------------------
# Which tests are statistical


def measured() -> None:
    within_se(0.0, 0.0, 1.0)


def by_a_helper() -> None:
    measured()


def by_a_table() -> None:
    for check in TABLE.values():
        check(1.0)


def ordered() -> None:
    assert float(torch.rand((), generator=torch.Generator().manual_seed(0))) < 1.0


def ordered_in_a_file(tmp_path: Path) -> None:
    ordered()


def exact() -> None:
    assert torch.equal(
        *(torch.rand(3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    )


def ordered_without_a_seed() -> None:
    assert float(DoubleWell()(torch.zeros(()))) < 1.0


TABLE = {"a": functools.partial(within_se, truth=0.0, se=1.0)}


def test_what_is_statistical() -> None:
    assert all(
        is_statistical(function) for function in (measured, by_a_helper, by_a_table, ordered)
    )
    assert is_statistical(exact, by_a_helper)  # a parameter
    assert not any(
        is_statistical(function) for function in (exact, ordered_without_a_seed, ordered_in_a_file)
    )


def test_marks_are_on_the_tests_of_this_run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "flows")
    from test_importance import test_flow_weights_are_unbiased_and_errors_calibrated as marked

    assert is_statistical(marked)
    assert request.node.get_closest_marker("statistical") is None


def test_a_tenth_is_a_tenth_and_does_not_move() -> None:
    counts = np.bincount(
        [tenth_of(f"tests/test_x.py::test_{k}") for k in range(10_000)], minlength=10
    )
    assert counts.min() > 850
    assert tenth_of("tests/test_kernels.py::test_x") == 5


def test_the_script_reads_shifts_and_knows_a_commit() -> None:
    script = load_script("reseed_tests")
    assert script.shifts_of("1-3 7") == [1, 2, 3, 7]
    shift, tenth = script.of_commit()
    assert (shift, tenth) == script.of_commit()
    assert 1 <= shift < 1000
    assert 0 <= tenth < 10


def test_the_script_counts_what_fails_and_says_why(tmp_path: Path) -> None:
    """A coin that the seed tosses: the option reaches each process, failures are counted, the exit
    status says that there are."""
    coin = tmp_path / "test_coin.py"
    coin.write_text(
        "import torch\n\ndef test_coin():\n"
        "    drawn = float(torch.rand((), generator=torch.Generator().manual_seed(0)))\n"
        "    assert drawn < 0.5, f'tails {drawn}'\n"
    )
    expected = {}
    for shift in range(8):
        with seeds_shifted(shift):
            expected[shift] = float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    tails = {shift: drawn for shift, drawn in expected.items() if drawn >= 0.5}
    assert 0 < len(tails) < 8
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": "-p conftest"}
    command = [
        sys.executable,
        str(ROOT / "scripts" / "reseed_tests.py"),
        "--shifts",
        "0-7",
        f"{coin}::test_coin",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert f"fails with {len(tails)} of 8 shifts" in done.stdout
    for shift, drawn in expected.items():
        failed = int(shift in tails)
        assert f"shift {shift}: {1 - failed} passed, {failed} failed" in done.stdout
        assert (f"tails {drawn}" in done.stdout) is bool(failed)
