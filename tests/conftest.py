"""Policy for every test: one thread, no display, no traces left behind.

Tests say `dtype=torch.float64` where they mean it, or take the fixture `float64`; a test that is
about float32 says so. What a test leaves changed (torch's default dtype or threads, gradient mode)
fails it, because the next test would see it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

# before the first import of torch; notebook kernels inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib as mpl
import pyro
import pytest
import torch
from lib import reseed

mpl.use("Agg")
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and its children with it; tests of interrupted runs must
# not depend on that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reseed", type=int, default=0, metavar="N", help="shift every seed of the tests"
    )
    parser.addoption(
        "--tenth",
        type=int,
        choices=range(10),
        metavar="K",
        help="run one tenth of the tests, by name",
    )


def pytest_configure(config: pytest.Config) -> None:
    shift = reseed.seeds_shifted(config.getoption("reseed"))
    shift.__enter__()  # from here on: test modules draw while they are imported
    config.add_cleanup(lambda: shift.__exit__(None, None, None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reseed.mark_statistical(items)
    tenth = config.getoption("tenth")
    if tenth is not None:
        config.hook.pytest_deselected(
            items=[item for item in items if reseed.tenth_of(item.nodeid) != tenth]
        )
        items[:] = [item for item in items if reseed.tenth_of(item.nodeid) == tenth]


def _globals() -> dict[str, Any]:
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """A seed for what draws from torch's default generator, an empty Pyro parameter store before
    and after, no figure left open, torch's globals as they were."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    before = _globals()
    yield
    pyro.clear_param_store()
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        plt.close("all")
    after = _globals()
    torch.set_default_dtype(before["torch.get_default_dtype()"])
    torch.set_num_threads(before["torch.get_num_threads()"])
    torch.set_grad_enabled(before["torch.is_grad_enabled()"])
    changed = [
        f"{name} was {before[name]}, is {after[name]}"
        for name in before
        if after[name] != before[name]
    ]
    if changed:
        pytest.fail("the test left changed: " + "; ".join(changed), pytrace=False)


@pytest.fixture
def float64(_no_traces: None) -> Iterator[torch.dtype]:
    """torch's default dtype is float64 within the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
