"""Report what a pytest run covered, from its JUnit file.

`python scripts/ci_report.py build/junit.xml` fails unless all tests passed, and tests, docstring
examples, blocks of the README and every notebook ran: a run that collects nothing, or skips all of
a kind, fails.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def kind_of(case: ET.Element) -> str:
    """Return the kind of a test case, from the path where it was collected."""
    module = case.get("classname", "")
    if module.split(".")[0] == "pyroebm":
        return "docstring examples"
    if module.endswith("test_readme"):
        return "README and docs"
    return "notebooks" if module.endswith("test_notebooks") else "tests"


def main(report: str) -> int:
    """Print one line for each kind of test.

    Returns 1 if a test failed, or if a required kind did not run.
    """
    rows: dict[str, list[tuple[str, str, float]]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        fate = next(
            (tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed"
        )
        rows.setdefault(kind_of(case), []).append(
            (case.get("name", ""), fate, float(case.get("time", "0")))
        )
    for kind, cases in sorted(rows.items()):
        counts = {
            fate: sum(f == fate for _, f, _ in cases)
            for fate in ("passed", "skipped", "failure", "error")
        }
        told = ", ".join(f"{n} {fate}" for fate, n in counts.items() if n)
        print(f"  {kind:20} {told}; {sum(seconds for *_, seconds in cases):.0f} s")
    passed = {name for cases in rows.values() for name, fate, _ in cases if fate == "passed"}
    wanted = ["test_blocks_run[README.md]"]
    wanted += [
        f"test_runs[{script.stem}]" for script in sorted((ROOT / "notebooks").glob("[0-9]*.py"))
    ]
    missing = [name for name in wanted if name not in passed]
    missing += [
        kind
        for kind in ("tests", "docstring examples")
        if all(fate != "passed" for _, fate, _ in rows.get(kind, []))
    ]
    for name in missing:
        print(f"  did not run and pass: {name}", file=sys.stderr)
    broken = any(fate in ("failure", "error") for cases in rows.values() for _, fate, _ in cases)
    return 1 if missing or broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
