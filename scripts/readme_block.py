"""Extract the code blocks of a Markdown page.

`python scripts/readme_block.py README.md 1` prints the first Python block. A block is skipped if
the HTML comment `<!-- skip: reason -->` is right before it.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})\s*(?P<info>[^`]*)$")
SKIP = re.compile(r"^\s*<!--\s*skip:\s*(?P<reason>.+?)\s*-->\s*$")
PYTHON = ("python", "py", "python3")


class Block(NamedTuple):
    """A fenced block: language, line of its source (from 1), source, reason to skip it."""

    language: str
    line: int
    source: str
    skip: str | None


def code_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    at, skip = 0, None
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            comment = SKIP.match(lines[at])
            if comment or lines[at].strip():
                skip = comment["reason"] if comment else None
            at += 1
            continue
        start = at + 1
        closing = re.compile(rf"^\s*`{{{len(fence['ticks'])},}}\s*$")
        end = next((n for n in range(start, len(lines)) if closing.match(lines[n])), None)
        if end is None:
            raise ValueError(f"the code block that opens on line {start} is never closed")
        source = textwrap.dedent("\n".join(lines[start:end])) + "\n"
        words = fence["info"].split()
        found.append(Block(words[0].lower() if words else "", start + 1, source, skip))
        at, skip = end + 1, None
    return found


def python_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a page, in order, with the skipped ones."""
    return [block for block in code_blocks(text) if block.language in PYTHON]


def main(page: str, number: str = "1") -> int:
    """Print the page's Python block ``number`` (from 1, without skipped blocks)."""
    runnable = [
        block
        for block in python_blocks(Path(page).read_text(encoding="utf-8"))
        if block.skip is None
    ]
    if not 1 <= int(number) <= len(runnable):
        print(
            f"{page} has {len(runnable)} Python blocks that run, so no block {number}",
            file=sys.stderr,
        )
        return 1
    sys.stdout.write(runnable[int(number) - 1].source)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
