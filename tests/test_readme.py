"""Every Python block of the README and of the docs runs; every command they name exists.

The blocks of one page share a namespace, in order, in an empty folder. `<!-- skip: reason -->`
right before a block skips it.
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from lib.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("bash", "console", "sh", "shell")


helper = load_script("readme_block")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_page(path: Path, name: str = "page") -> int:
    """Run a page's Python blocks in the current folder; how many ran. A traceback names the page
    and its line."""
    # a module of its own, so that dataclasses and pickles find their names
    module = types.ModuleType(name)
    sys.modules[name] = module
    ran = 0
    try:
        for block in helper.python_blocks(path.read_text(encoding="utf-8")):
            if block.skip is None:
                padded = "\n" * (block.line - 1) + block.source
                exec(compile(padded, str(path), "exec"), module.__dict__)
                ran += 1
    finally:
        del sys.modules[name]
    return ran


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.M))


def missing_commands(text: str, targets: set[str]) -> list[str]:
    """What a page's shell blocks call that is not there: make targets, and modules and scripts of
    the checkout."""
    missing = []
    for block in helper.code_blocks(text):
        if block.language not in SHELLS or block.skip is not None:
            continue
        prompts = any(line.startswith("$ ") for line in block.source.splitlines())
        for offset, line in enumerate(block.source.splitlines()):
            if prompts and not line.startswith("$ "):
                continue  # output
            where = f"line {block.line + offset}"
            for command in re.split(r"&&|\|\||[;|]", line.removeprefix("$ ").split("#")[0]):
                words = [word for word in shlex.split(command) if "=" not in word]
                if words[:1] == ["make"]:
                    asked = [word for word in words[1:] if not word.startswith("-")]
                    missing += [
                        f"{where}: make has no target {word}"
                        for word in asked
                        if word not in targets
                    ]
                module = re.search(r"python3? -m ((?:models|benchmarks)[\w.]*)", command)
                if (
                    module
                    and module[1].islower()
                    and not (ROOT / (module[1].replace(".", "/") + ".py")).exists()
                ):
                    missing.append(f"{where}: no module {module[1]}")
                script = re.search(r"(?:python3?|bash) ((?:scripts|examples|\.ci)/\S+)", command)
                if script and not (ROOT / script[1]).exists():
                    missing.append(f"{where}: no file {script[1]}")
    return missing


WITH_PYTHON = [
    p for p in PAGES if p.name == "README.md" or helper.python_blocks(p.read_text(encoding="utf-8"))
]
SKIPPED = [
    (p, b)
    for p in PAGES
    for b in helper.python_blocks(p.read_text(encoding="utf-8"))
    if b.skip is not None
]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=page_id)
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_page(path)
    assert ran > 0 or path.name != "README.md", "the README has no Python block that runs"


if SKIPPED:  # each is one skipped test, so that the summary tells what does not run

    @pytest.mark.parametrize(
        ("path", "block"), SKIPPED, ids=[f"{page_id(p)}:{b.line}" for p, b in SKIPPED]
    )
    def test_skipped_block(path: Path, block: types.SimpleNamespace) -> None:
        pytest.skip(f"{page_id(path)}: {block.skip}")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_commands_exist(path: Path) -> None:
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert missing_commands(path.read_text(encoding="utf-8"), targets) == []


def test_readme_starts_with_the_two_commands() -> None:
    """`make demo` and `make test` are the first commands a newcomer meets."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    called = [
        line.removeprefix("$ ").split("#")[0].strip()
        for block in helper.code_blocks(text)
        if block.language in SHELLS
        for line in block.source.splitlines()
    ]
    made = [line for line in called if line.startswith("make ")]
    assert made[:2] == ["make demo", "make test"]


PAGE = """\
```python
import dataclasses
x = 1
```
<!-- skip: needs a GPU -->

```python
raise RuntimeError
```
- in a list
  ```python
  @dataclasses.dataclass
  class A:
      y: int = x + 1
  assert A().y == 2
  ```
```console
$ make nonsense JOBS=3 && make test
make output
$ python -m models.nothing --help
```
"""


def test_helper_reads_blocks() -> None:
    blocks = helper.code_blocks(PAGE)
    assert [(b.language, b.line, b.skip) for b in blocks] == [
        ("python", 2, None),
        ("python", 8, "needs a GPU"),
        ("python", 12, None),
        ("console", 18, None),
    ]
    with pytest.raises(ValueError, match="line 1 is never closed"):
        helper.code_blocks("```python\nx = 1\n")


def test_helper_prints_the_nth_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert helper.main(str(page), "1") == 0
    assert capsys.readouterr().out == "import dataclasses\nx = 1\n"
    assert helper.main(str(page), "3") == 1
    assert "has 2 Python blocks that run, so no block 3" in capsys.readouterr().err


def test_blocks_share_a_namespace_and_errors_name_the_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert run_page(page) == 2
    page.write_text(PAGE + "```python\ny = x\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page)
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == (
        "page.md",
        page.read_text().splitlines().index("1 / 0") + 1,
    )


def test_missing_commands_are_found() -> None:
    assert missing_commands(PAGE, {"test"}) == [
        "line 18: make has no target nonsense",
        "line 20: no module models.nothing",
    ]
