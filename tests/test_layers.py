"""What the house stands on: imports point down only, nothing unpickles, nothing asserts, files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyroebm"

# From the bottom up. A row's groups do not import each other; the modules within one group (words of one string) may.
# `pyroebm` is the package's own __init__. The same picture stands in docs/architecture.md.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("randomness", "diagnostics stuck", "front_door", "networks", "distances", "distributed", "weights"),
    ("supports", "enumeration"),
    ("energy derivatives views compiled minibatch paths",),
    ("targets", "energies", "kernels", "flows", "datasets readers", "generators"),
    ("objectives", "partition smc", "mcmc block record results serial stein store streaming", "ppl model_energy rowwise guides"),
    ("infer", "completion", "pretraining", "plotting", "training batches guards training_log checkpoint discriminative", "zoo"),
    ("pyroebm",),
    ("demo demo_report cli __main__",),
)
PLACE = {name: (level, group) for level, row in enumerate(LAYERS) for group in row for name in group.split()}
OUTSIDE = ("models", "benchmarks", "notebooks", "tests", "scripts")  # they run from a checkout: nothing here needs them

SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in ("models", "benchmarks", "notebooks", "scripts") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def noun(module: str) -> str:
    """The row's word for a dotted module: `pyroebm.kernels.nuts.lockstep` is `kernels`, `pyroebm` is itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what stands under `if TYPE_CHECKING:` does not."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _nodes(other)
        else:
            yield from _nodes(child)


def imported_modules(source: str, module: str, is_package: bool, known: frozenset[str]) -> list[tuple[int, str]]:
    """(line, dotted module) of every import that runs, at module level or inside functions."""
    found: list[tuple[int, str]] = []
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                up = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*up, *base.split(".")] if base else up)
            # `from pyroebm import energy` imports the module energy; `from pyroebm import Energy` the package's __init__
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in known else base))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def violations(source: str, module: str, is_package: bool = False, known: frozenset[str] = frozenset()) -> list[str]:
    """What this module's imports break, in words."""
    if noun(module) not in PLACE:
        return [f"{module} has no layer: add `{noun(module)}` to LAYERS in tests/test_layers.py and to docs/architecture.md"]
    level, group = PLACE[noun(module)]
    wrong = []
    for line, other in imported_modules(source, module, is_package, known):
        top = other.split(".")[0]
        if top in OUTSIDE:
            wrong.append(f"{module}:{line} imports {other}, which is not part of the library")
        if top != "pyroebm":
            continue
        if noun(other) not in PLACE:
            wrong.append(f"{module}:{line} imports {other}, which has no layer: add `{noun(other)}` to LAYERS")
            continue
        their_level, their_group = PLACE[noun(other)]
        if their_level > level:
            wrong.append(f"{module}:{line} imports {other}, from a layer above its own")
        elif their_level == level and their_group != group:
            wrong.append(f"{module}:{line} imports {other}, a neighbour in its own layer")
    return wrong


KNOWN = frozenset(module_name(path) for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    wrong = violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py", KNOWN)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("pyroebm.core.energy", "import pyroebm.mcmc.sampler", "layer above"),
        (
            "pyroebm.core.energy",
            "def f():\n    from pyroebm.mcmc.sampler import MCMC",
            "pyroebm.core.energy:2 imports pyroebm.mcmc.sampler",
        ),
        ("pyroebm.core.energy", "from pyroebm import Energy", "imports pyroebm, from a layer above"),
        ("pyroebm.core.energy", "from pyroebm import targets", "imports pyroebm.targets, from a layer above"),
        ("pyroebm.core.energy", "from . import targets", "layer above"),
        ("pyroebm.kernels.nuts.lockstep", "from ..mcmc import MCMC", "layer above"),
        ("pyroebm.kernels.nuts.lockstep", "from pyroebm.flows.nice import NICE", "neighbour"),
        ("pyroebm.core.energy", "import importlib\nimportlib.import_module('pyroebm.cli')", "layer above"),
        ("pyroebm.core.energy", "if TYPE_CHECKING:\n    pass\nelse:\n    import pyroebm.cli", "layer above"),
        ("pyroebm.cli", "from models.rbm import main", "not part of the library"),
        ("pyroebm.novelty", "", "pyroebm.novelty has no layer: add `novelty` to LAYERS in tests/test_layers.py"),
        ("pyroebm.cli", "import pyroebm.novelty", "has no layer"),
    ],
)
def test_checker_catches(module: str, source: str, said: str) -> None:
    wrong = violations(source, module, known=KNOWN | {"pyroebm.targets", "pyroebm.mcmc.sampler"})
    assert len(wrong) == 1, wrong
    assert said in wrong[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyroebm.targets", "import torch\nfrom pyroebm.core.energy import Energy"),
        ("pyroebm.core.energy", "if TYPE_CHECKING:\n    from pyroebm.mcmc.sampler import MCMC"),
        ("pyroebm.core.energy", "def f():\n    from pyroebm.core.wrappers import PotentialFn"),
        ("pyroebm.kernels.nuts.lockstep", "from pyroebm.kernels.base import Kernel\nfrom .base import State"),
        ("pyroebm.cli", "from pyroebm import __version__\nimport pyroebm.cli.demo"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(source, module, known=KNOWN) == []


def test_layers_are_the_documented_ones() -> None:
    """The table above and the block `layers` of docs/architecture.md are one picture."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("```layers\n")[1].split("```")[0]
    drawn = tuple(tuple(group.strip() for group in row.split("|")) for row in block.strip().splitlines())
    assert drawn == LAYERS


# Loading a pickle runs whatever is in it. Weights are safetensors, arrays are npz, settings are JSON.
UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
LOADERS = ("torch.load", "torch.hub.load", "torch.jit.load", "pandas.read_pickle", "pyro.get_param_store.load")


def _aliases(tree: ast.AST) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Call):  # pyro.get_param_store().load(...)
        return _dotted(node.func, names)
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def pickle_loading(source: str) -> list[str]:
    """Lines that load a pickle, or could."""
    tree = ast.parse(source)
    names, wrong = _aliases(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [f"line {node.lineno}: imports {m}" for m in modules if m.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            if called in LOADERS:
                wrong.append(f"line {node.lineno}: calls {called}")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not off:
                    wrong.append(f"line {node.lineno}: calls {called} with allow_pickle")
    return wrong


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_pickle_is_loaded(path: Path) -> None:
    assert pickle_loading(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "import pickle",
        "from joblib import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import pyro\npyro.get_param_store().load('x')",
    ],
)
def test_pickle_checker_catches(source: str) -> None:
    assert len(pickle_loading(source)) == 1


def test_pickle_checker_allows() -> None:
    assert pickle_loading("import numpy as np, json\nnp.load('x.npz')\nnp.load('x', allow_pickle=False)\njson.load(f)") == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_assert_statement(path: Path) -> None:
    """`python -O` removes asserts, and their messages are nobody's: users get a ValueError, type checkers a cast."""
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Assert)]
    assert not lines, f"{path.relative_to(ROOT)} has assert statements on lines {lines}"
