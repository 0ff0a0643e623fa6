"""One run of benchmarks/stopwatch.py in its own process, on one core.

`python -m benchmarks.suite.stopwatch_worker CONTENT.json ANSWER.json`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the job and write its answer."""
    began = time.perf_counter()  # before the first import of what is measured
    from benchmarks.suite.answers import measured
    from benchmarks.suite.worker import pin

    source, target = (Path(argument) for argument in sys.argv[1:])
    pinned = pin()
    answer = measured(began=began, **json.loads(source.read_text(encoding="utf-8")))
    target.write_text(json.dumps(answer | {"pinned": pinned}, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
