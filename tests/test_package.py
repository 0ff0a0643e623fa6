"""The package as others meet it: its version, its public names, its marker, its pages; and this
suite's own tools."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from lib.checks import mean_and_se, within_se

import pyroebm

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = sorted(set(pyroebm.__all__) - {"__version__"})
SKIPPED_FOLDERS = {".venv", "build", "demo", "dist", "runs", ".pytest_cache"}
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not SKIPPED_FOLDERS & set(p.relative_to(ROOT).parts)
)


def test_version_is_the_metadata_s() -> None:
    assert pyroebm.__version__ == importlib.metadata.version("pyroebm")


def test_version_has_a_changelog_entry() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{pyroebm.__version__}]" in text


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pyroebm.__version__}\n" in text


def test_all_has_no_duplicates() -> None:
    assert len(pyroebm.__all__) == len(set(pyroebm.__all__))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name: str) -> None:
    """A public class or function has its own docstring with an example that the doctests run."""
    thing = getattr(pyroebm, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return
    # an inherited docstring is not its own
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own, f"{name} has no docstring"
    assert "Example:" in own, f"{name}'s docstring has no Example:"
    assert ">>> " in own, f"{name}'s docstring has no doctest"


def test_type_marker_is_shipped() -> None:
    assert (Path(pyroebm.__file__).parent / "py.typed").exists()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENGINES = {"h5netcdf", "h5py"}  # xarray imports them, when a netCDF file is written or read


def _names(requirements: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;(]", r)[0]).lower() for r in requirements}


RUNTIME = _names(PROJECT["dependencies"])
EXTRAS = {extra: _names(names) for extra, names in PROJECT["optional-dependencies"].items()}


def test_constraints_pin_every_dependency() -> None:
    """A name in pyproject.toml without a pin would be fetched in whatever version is newest,
    PyTorch's CUDA build first.

    The extra `bench` has pins of its own: JAX is no business of a developer's environment.
    """
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", pin)] == []
    assert (RUNTIME | EXTRAS["flows"] | EXTRAS["dev"]) - _names(pins) == set()


def imported(source: str, *, everywhere: bool) -> set[str]:
    """Top-level names of the modules that a source imports; without ``everywhere``, those that its
    own import needs."""
    tree = ast.parse(source)
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "importorskip")
        ):
            found |= {
                str(a.value).split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)
            }
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


# it reads the files of every package
distributions = functools.cache(importlib.metadata.packages_distributions)


def undeclared(source: str, declared: set[str], *, everywhere: bool = True) -> set[str]:
    """Packages that a source imports and that are not among those declared. ``sys.path`` gives the
    scripts their neighbors."""
    ours = {
        "pyroebm",
        "models",
        "lib",
        *(p.stem for folder in ("tests", "scripts") for p in (ROOT / folder).rglob("*.py")),
    }
    modules = imported(source, everywhere=everywhere) - set(sys.stdlib_module_names) - ours
    return {name for name in modules if not _names(distributions().get(name, [name])) & declared}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pyroebm").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_what_the_package_imports_is_declared(path: Path) -> None:
    """`pip install pyroebm` is enough to import all of it; what an extra brings is imported where
    it is used."""
    source = path.read_text(encoding="utf-8")
    assert undeclared(source, RUNTIME, everywhere=False) == set()
    assert undeclared(source, RUNTIME | EXTRAS["flows"] | EXTRAS["botorch"]) == set()


@pytest.mark.parametrize("folder", ["tests", "scripts", "notebooks", "models"])
def test_what_a_developer_imports_is_declared(folder: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))]
    allowed = (
        RUNTIME
        | EXTRAS["flows"]
        | EXTRAS["dev"]
        | (EXTRAS["bench"] | {"benchmarks"} if folder == "tests" else set())
        | (EXTRAS["botorch"] | EXTRAS["clients"] if folder == "scripts" else set())
    )
    assert set().union(*(undeclared(source, allowed) for source in sources)) == set()


def test_what_is_declared_is_imported() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pyroebm").rglob("*.py")]
    unused = {
        name
        for name in RUNTIME - ENGINES
        if not any(undeclared(source, RUNTIME - {name}) for source in sources)
    }
    assert unused == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pandas", {"pandas"}),
        ("def f():\n    from pandas import read_csv", {"pandas"}),
        ("if TYPE_CHECKING:\n    import pandas.core", {"pandas"}),
        ("import importlib\nimportlib.import_module('arviz_stats.base')", {"arviz_stats"}),
        (
            "import sklearn.datasets, torch, math\nfrom . import pandas\nfrom pyroebm import"
            " Energy",
            set(),
        ),
    ],
)
def test_import_checker(source: str, found: set[str]) -> None:
    assert undeclared(source, RUNTIME) == found


def test_import_checker_tells_what_only_a_call_needs() -> None:
    source = "def f():\n    import zuko\nclass A:\n    import pandas"
    assert undeclared(source, RUNTIME, everywhere=False) == {"pandas"}


def _slugs(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(
        r"^#{1,6}\s+(.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a Markdown page that lead nowhere."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", prose
    )
    broken = []
    for link in found:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        anchors = (
            _slugs(target.read_text(encoding="utf-8"))
            if target.suffix == ".md" and target.exists()
            else set()
        )
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_link_checker_catches(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# One two\n[a](b.md) [b](#one-two) [c](#three) `[d](e.md)` ![f](g.png) [h](mailto:x@y.z)"
        " [i](a.md)\n"
    )
    assert broken_links(page) == ["b.md", "#three", "g.png"]


def test_within_se() -> None:
    within_se(torch.tensor([1.0, 2.0]), [1.04, 2.0], 0.01)
    within_se(1.0, 1.0, 1e-12)
    for estimate, truth, se in [
        (math.nan, 0.0, 1.0),
        (0.0, math.nan, 1.0),
        (0.0, 0.0, math.nan),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, math.inf),
        (math.inf, math.inf, 1.0),
        (0.6, 0.0, 0.1),
        ([0.0, math.nan], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [[0.0], [0.0]], 1.0),
        ([], [], 1.0),
    ]:
        with pytest.raises(AssertionError):
            within_se(estimate, truth, se)
    with pytest.raises(
        AssertionError, match=r"estimate\[1\] nan is not within 5 standard errors of 0"
    ):
        within_se([9.0, math.nan], [0.0, 0.0], 1.0)


def test_mean_and_se() -> None:
    mean, se = mean_and_se(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert (mean.tolist(), se.tolist()) == ([1.0, 1.0], [1.0, 0.0])
