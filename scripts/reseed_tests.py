"""Run tests with shifted seeds and count the failures.

`python scripts/reseed_tests.py --shifts 1-20` runs the statistical tests. Repeat a failed test by
its name with `--shifts 1-100`: two failures are a defect, of the test's standard error or of the
library. Each shift runs in its own process, forked after the slow imports.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parents[1]


class _Outcomes:
    """A plugin that records how many tests passed, and the last line of each failure."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, dict[str, str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = crash.message if crash else str(report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)


def run(shift: int, arguments: list[str]) -> tuple[int, int, dict[str, str], float]:
    """Run the tests with one shift in this process.

    Returns:
        the shift, the number of passed tests, the messages of failed ones, and seconds.
    """
    began, outcomes = time.monotonic(), _Outcomes()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main(
            [*arguments, "--reseed", str(shift), "-q", "-p", "no:cacheprovider"], plugins=[outcomes]
        )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not outcomes.failed:
        outcomes.failed["pytest"] = f"ended with {code!r}"
    return shift, outcomes.passed, outcomes.failed, time.monotonic() - began


def shifts_of(text: str) -> list[int]:
    """Parse shifts.

    Example:
        >>> shifts_of("1-3 7")
        [1, 2, 3, 7]
    """
    ranges = [part.partition("-")[::2] for part in text.split()]
    return [shift for first, last in ranges for shift in range(int(first), int(last or first) + 1)]


def of_commit() -> tuple[int, int]:
    """Return a shift from 1 to 999 and a tenth of the tests, from the commit's hash.

    Without git they depend on the version's name.
    """
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        head = (ROOT / "CHANGELOG.md").read_bytes()
    number = zlib.crc32(head)
    return 1 + number // 10 % 999, number % 10


def main() -> int:
    """Print a line for each shift and each failure, then the failures of each test.

    Returns 1 if one failed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "tests",
        nargs="*",
        default=["tests"],
        help="files, of which the statistical tests, or node ids",
    )
    parser.add_argument(
        "--shifts",
        default="",
        help="such as 1-20, or '3 8'; without them one shift and a tenth, of the commit",
    )
    parser.add_argument("--jobs", type=int, default=1, help="shifts at the same time")
    options = parser.parse_args()
    arguments = (
        options.tests
        if any("::" in name for name in options.tests)
        else [*options.tests, "-m", "statistical"]
    )
    shifts = shifts_of(options.shifts)
    if not shifts:
        shift, tenth = of_commit()
        shifts, arguments = [shift], [*arguments, "--tenth", str(tenth)]
        print(f"tenth {tenth}")
    os.chdir(ROOT)
    import arviz, matplotlib.pyplot, pyro, sklearn, torch  # noqa: E401, F401, I001  # nothing that draws at import

    failures = collections.Counter[str]()
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        runs = [pool.apply_async(run, (shift, arguments)) for shift in shifts]
        for done in runs:
            shift, passed, failed, seconds = done.get()
            print(
                f"shift {shift}: {passed} passed, {len(failed)} failed, {seconds:.0f} s", flush=True
            )
            for name, message in failed.items():
                print(f"  {name}\n    {' '.join(message.split())[:400]}", flush=True)
            failures.update(failed.keys())
    for name, count in failures.most_common():
        print(f"{name} fails with {count} of {len(shifts)} shifts")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
