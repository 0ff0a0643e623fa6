"""Shift the seeds of tests: `pytest --reseed N`, and the mark `statistical`.

A test with a fixed seed is one random draw. Chains amplify rounding, so another CPU, instruction
set or version of torch is another draw; a shift of the seeds has the same effect on one machine.
Tests need no change for it: the shift is applied where seeds reach a generator, in
``torch.Generator.manual_seed``, ``torch.manual_seed`` (``pyro.set_rng_seed`` calls it) and
``numpy.random.default_rng``. Equal seeds remain equal and different seeds remain different.
Processes that a test starts use the seeds that they are given. ``-m statistical`` selects the tests
whose result depends on the seed.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parents[1]
PLAIN = torch.Generator
#: Between two shifts lie more seeds than any test counts through. Odd, since torch's generator
#: takes 32 bits of a seed.
STRIDE = 1_000_003


def shifted(seed: Any, shift: int) -> Any:
    """Shift an integer seed.

    Other values are unchanged, so that they raise an error, or are read from the system, as before.

    Example:
        >>> shifted(7, 0), shifted(7, 1), shifted(None, 1)
        (7, 1000010, None)
    """
    return (int(seed) + STRIDE * shift) % 2**63 if isinstance(seed, int | np.integer) else seed


def problem_generator(seed: int) -> torch.Generator:
    """Return a generator whose seed is not shifted, for the parameters of a problem.

    With other couplings chains may not mix, and importance weights may have infinite variance.
    """
    return PLAIN().manual_seed(seed)


@contextlib.contextmanager
def fixed_problem() -> Iterator[None]:
    """Disable the shift within this context, for the parameters of flows and networks.

    torch's default generator has the seed 0 in it.
    """
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(torch, "Generator", PLAIN)
        torch.set_rng_state(PLAIN().manual_seed(0).get_state())
        yield


@contextlib.contextmanager
def seeds_shifted(shift: int) -> Iterator[None]:
    """Shift every seed within this context; 0 replaces nothing."""
    if not shift:
        yield
        return
    manual_seed, default_rng = torch.manual_seed, np.random.default_rng

    class AnyGenerator(type(PLAIN)):  # type: ignore[misc]
        # torch makes plain ones: the default one, copies
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, PLAIN)

    class Generator(PLAIN, metaclass=AnyGenerator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(shifted(seed, shift))

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(torch, "Generator", Generator)
        for module in (torch, torch.random):
            patch.setattr(
                module,
                "manual_seed",
                functools.wraps(manual_seed)(lambda seed: manual_seed(shifted(seed, shift))),
            )
        patch.setattr(np.random, "default_rng", lambda seed=None: default_rng(shifted(seed, shift)))
        # for tests that draw from the global generator as they find it
        torch.manual_seed(torch.initial_seed())
        yield


# --------------------------------------------------------------------------------------------------
# Which tests are statistical

#: Names of seeds, and of the comparisons with a measured standard error.
SEEDS = {"manual_seed", "seeded_generator", "set_rng_seed", "default_rng", "seed"}
MEASURED = {"within_se", "mean_and_se"}
#: Their draws are those of the eager code, number by number.
COMPILED = {"test_compiled", "test_compiled_kernel", "test_compiled_kl"}


def _of_tests(thing: Any) -> Iterator[types.FunctionType]:
    """Return the functions of the tests that a global refers to.

    They are itself, its methods, or entries of a table.
    """
    thing = inspect.unwrap(thing.func if isinstance(thing, functools.partial) else thing)
    if isinstance(thing, types.FunctionType):
        if TESTS in Path(thing.__code__.co_filename).parents:
            yield thing
    elif isinstance(thing, type):
        if (
            TESTS
            in Path(getattr(sys.modules.get(thing.__module__), "__file__", None) or "/").parents
        ):
            for member in vars(thing).values():
                yield from _of_tests(member)
    elif isinstance(thing, dict | list | tuple):
        for entry in thing.values() if isinstance(thing, dict) else thing:
            yield from _of_tests(entry)


@functools.cache
def _own(function: types.FunctionType) -> tuple[frozenset[str], tuple[types.FunctionType, ...]]:
    """Return names that a function uses, and the functions of the tests among them.

    "<" stands for any comparison of order.
    """
    codes, names = [function.__code__], {function.__name__}
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for constant in code.co_consts:
            if isinstance(constant, tuple):  # names of keyword arguments
                names |= {name for name in constant if isinstance(name, str)}
        names |= {*code.co_names, *code.co_varnames}
        if any(
            step.opname == "COMPARE_OP" and set(str(step.argval)) & set("<>")
            for step in dis.get_instructions(code)
        ):
            names.add("<")
    found = [
        thing
        for name in names
        if name in function.__globals__
        for thing in _of_tests(function.__globals__[name])
    ]
    return frozenset(names), tuple(found)


def reached_names(functions: list[types.FunctionType]) -> set[str]:
    """Return names that these functions use, or functions of the tests that they call."""
    seen: dict[types.FunctionType, None] = dict.fromkeys(functions)
    names, todo = set[str](), list(seen)
    while todo:
        own, calls = _own(todo.pop())
        names |= own
        todo += [function for function in calls if function not in seen]
        seen |= dict.fromkeys(calls)
    return names


def is_statistical(function: Callable[..., Any], *parameters: Any) -> bool:
    """Return whether a test compares with a standard error, or compares random numbers.

    A test that writes files may compare other numbers, so it must compare with a standard error.
    """
    names = reached_names(
        [found for thing in (function, *parameters) for found in _of_tests(thing)]
    )
    return bool(names & MEASURED or ("<" in names and names & SEEDS and "tmp_path" not in names))


def mark_statistical(items: list[pytest.Item]) -> None:
    """Mark the statistical tests.

    Excluded are slow and GPU tests, and those of compiled code, whose draws are those of eager
    code.
    """
    for item in items:
        left_out = (
            item.get_closest_marker("slow")
            or item.get_closest_marker("gpu")
            or item.path.stem in COMPILED
        )
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if (
            isinstance(item, pytest.Function)
            and not left_out
            and is_statistical(item.function, *parameters)
        ):
            item.add_marker("statistical")


def tenth_of(nodeid: str) -> int:
    """Return a number from 0 to 9, the same in every process and on every machine."""
    return zlib.crc32(nodeid.encode()) % 10
