"""The layout: imports point down and make no circle, one module reads files, nothing unpickles."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyroebm"

# From the bottom up. A row's groups do not import each other; the modules within one group may, in
# no circle. `pyroebm` is the package's own __init__. The same picture stands in
# docs/architecture.md.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("nn",),
    ("targets", "data", "energies", "flows", "kernels"),
    ("diagnostics",),
    ("mcmc", "smc"),
    ("partition", "objectives"),
    ("training", "ppl"),
    ("infer",),
    ("calibration", "zoo"),
    ("pyroebm",),
    ("cli",),
    ("__main__",),
)
PLACE = {
    name: (level, group)
    for level, row in enumerate(LAYERS)
    for group in row
    for name in group.split()
}
# they run from a checkout: nothing here needs them
OUTSIDE = ("models", "benchmarks", "notebooks", "tests", "scripts")

SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(
    path
    for folder in ("models", "benchmarks", "notebooks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def noun(module: str) -> str:
    """The row's word for a dotted module: `pyroebm.kernels.nuts.lockstep` is `kernels`, `pyroebm`
    is itself."""
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


def imported_modules(
    source: str, module: str, is_package: bool, known: frozenset[str]
) -> list[tuple[int, str]]:
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
            # `from pyroebm import energy` imports the module energy; `from pyroebm import Energy`
            # the package's __init__
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in known else base))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", ""))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def violations(
    source: str, module: str, is_package: bool = False, known: frozenset[str] = frozenset()
) -> list[str]:
    """What this module's imports break, in words."""
    if noun(module) not in PLACE:
        return [
            f"{module} has no layer: add `{noun(module)}` to LAYERS in tests/test_layers.py and to"
            " docs/architecture.md"
        ]
    level, group = PLACE[noun(module)]
    wrong = []
    for line, other in imported_modules(source, module, is_package, known):
        top = other.split(".")[0]
        if top in OUTSIDE:
            wrong.append(f"{module}:{line} imports {other}, which is not part of the library")
        if top != "pyroebm":
            continue
        if noun(other) not in PLACE:
            wrong.append(
                f"{module}:{line} imports {other}, which has no layer: add `{noun(other)}` to"
                " LAYERS"
            )
            continue
        their_level, their_group = PLACE[noun(other)]
        if their_level > level:
            wrong.append(f"{module}:{line} imports {other}, from a layer above its own")
        elif their_level == level and their_group != group:
            wrong.append(f"{module}:{line} imports {other}, a neighbor in its own layer")
    return wrong


KNOWN = frozenset(module_name(path) for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    wrong = violations(
        path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py", KNOWN
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("pyroebm.core.energy", "import pyroebm.mcmc", "layer above"),
        (
            "pyroebm.core.energy",
            "def f():\n    from pyroebm.mcmc import MCMC",
            "pyroebm.core.energy:2 imports pyroebm.mcmc",
        ),
        (
            "pyroebm.core.energy",
            "from pyroebm import Energy",
            "imports pyroebm, from a layer above",
        ),
        (
            "pyroebm.core.energy",
            "from pyroebm import targets",
            "imports pyroebm.targets, from a layer above",
        ),
        ("pyroebm.core.energy", "from .. import targets", "layer above"),
        ("pyroebm.kernels.hmc", "from ..mcmc import MCMC", "layer above"),
        ("pyroebm.kernels.hmc", "from pyroebm.flows.nice import NICE", "neighbor"),
        (
            "pyroebm.core.energy",
            "import importlib\nimportlib.import_module('pyroebm.cli')",
            "layer above",
        ),
        (
            "pyroebm.core.energy",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import pyroebm.cli",
            "layer above",
        ),
        ("pyroebm.cli.demo", "from models.rbm import main", "not part of the library"),
        (
            "pyroebm.novelty",
            "",
            "pyroebm.novelty has no layer: add `novelty` to LAYERS in tests/test_layers.py",
        ),
        ("pyroebm.cli.demo", "import pyroebm.novelty", "has no layer"),
    ],
)
def test_checker_catches(module: str, source: str, said: str) -> None:
    wrong = violations(source, module, known=KNOWN)
    assert len(wrong) == 1, wrong
    assert said in wrong[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyroebm.targets.base", "import torch\nfrom pyroebm.core.energy import Energy"),
        ("pyroebm.core.energy", "if TYPE_CHECKING:\n    from pyroebm.mcmc import MCMC"),
        ("pyroebm.core.energy", "def f():\n    from pyroebm.core.wrappers import PotentialFn"),
        ("pyroebm.kernels.hmc", "from pyroebm.kernels.base import Kernel\nfrom .base import State"),
        ("pyroebm.cli.demo", "from pyroebm import __version__\nimport pyroebm.cli.demo_report"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(source, module, known=KNOWN) == []


def graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """The modules that each module imports, among those given as (source, whether it is a
    package)."""
    known = frozenset(sources)
    return {
        module: {other for _, other in imported_modules(source, module, is_package, known)}
        & known - {module}
        for module, (source, is_package) in sources.items()
    }


def test_no_circle_of_imports() -> None:
    """Between modules, those imported within functions included."""
    sources = {
        module_name(p): (p.read_text(encoding="utf-8"), p.name == "__init__.py") for p in SOURCES
    }
    assert len(list(graphlib.TopologicalSorter(graph(sources)).static_order())) == len(SOURCES)


def test_circle_checker_catches() -> None:
    sources = {
        "p": ("", True),
        "p.a": ("from p import b", False),
        "p.b": ("def f():\n    from p.a import x", False),
    }
    with pytest.raises(graphlib.CycleError, match=r"p\.[ab]"):
        list(graphlib.TopologicalSorter(graph(sources)).static_order())


def test_a_table_of_contents() -> None:
    """`ls pyroebm` has at most 20 folders and modules, and each of them a layer."""
    entries = [
        path
        for path in PACKAGE.iterdir()
        if path.name not in ("__pycache__", "__init__.py", "__main__.py", "py.typed")
    ]
    assert len(entries) <= 20
    assert {path.stem for path in entries} == set(PLACE) - {"pyroebm", "__main__"}


def test_subpackages_are_attributes() -> None:
    """After `import pyroebm` alone, in a process of its own; none is imported before it is
    named."""
    code = f"""
import sys, pyroebm
names = {sorted(set(PLACE) - {"pyroebm", "__main__"})}
assert set(names) <= set(dir(pyroebm))
assert not {{"torch._dynamo", "torch._inductor", "matplotlib.pyplot"}} & set(sys.modules)
assert not [n for n in ("cli", "partition") if f"pyroebm.{{n}}" in sys.modules]
print(*[getattr(pyroebm, name).__name__ for name in names])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [
        f"pyroebm.{name}" for name in sorted(set(PLACE) - {"pyroebm", "__main__"})
    ], done.stderr


def test_layers_are_the_documented_ones() -> None:
    """The table above and the block `layers` of docs/architecture.md are one picture."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("```layers\n")[1].split("```")[0]
    drawn = tuple(
        tuple(group.strip() for group in row.split("|")) for row in block.strip().splitlines()
    )
    assert drawn == LAYERS


# Loading a pickle runs whatever is in it. Weights are safetensors, arrays are npz, settings are
# JSON.
UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
LOADERS = (
    "torch.load",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.jit.load",
    "pandas.read_pickle",
    "pyro.get_param_store.load",
)


def _aliases(tree: ast.AST) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(
                {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            )
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
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            wrong += [
                f"line {node.lineno}: imports {m}" for m in modules if m.split(".")[0] in UNPICKLERS
            ]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            positional = called == "numpy.load" and len(node.args) > 2
            if called in LOADERS or positional:
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
        "import numpy as np\nnp.load('x', None, True)",
        "import torch\ntorch.serialization.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import pyro\npyro.get_param_store().load('x')",
    ],
)
def test_pickle_checker_catches(source: str) -> None:
    assert len(pickle_loading(source)) == 1


def test_pickle_checker_allows() -> None:
    assert (
        pickle_loading(
            "import numpy as np, json\nnp.load('x.npz')\nnp.load('x',"
            " allow_pickle=False)\njson.load(f)"
        )
        == []
    )


# One place for each hazard: files, and what torch calls private.
FILE_CALLS = {
    *("open", "os.replace", "os.remove", "os.rename", "json.load", "json.dump", "h5py.File"),
    *(f"numpy.{name}" for name in ("load", "save", "savez", "savez_compressed")),
    *("numpy.loadtxt", "numpy.savetxt", "torch.save", "matplotlib.pyplot.imsave"),
    *("zipfile.ZipFile", "tarfile.open"),
    *(f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move", "rmtree")),
    *("xarray.open_dataset", "xarray.open_mfdataset", "xarray.load_dataset"),
}
FILE_METHODS = {
    *("open", "read_bytes", "read_text", "write_bytes", "write_text", "unlink", "rename"),
    *("savefig", "to_netcdf", "to_csv", "to_json", "tofile"),
}
FILE_MODULES = ("gzip", "safetensors", "tempfile")


def _imports(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted modules of an import, and for `from a import b` what is imported."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module or ''}.{alias.name}" for alias in node.names]


def file_access(source: str) -> list[str]:
    """Lines that read or write a file."""
    tree = ast.parse(source)
    names, wrong = _aliases(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = [m for m in _imports(node) if m.split(".")[0] in FILE_MODULES]
            wrong += [f"line {node.lineno}: imports {m}" for m in found[:1]]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            method = isinstance(node.func, ast.Attribute) and node.func.attr in FILE_METHODS
            if method or called in FILE_CALLS:
                wrong.append(f"line {node.lineno}: calls {called}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_read_and_written_in_one_module(path: Path) -> None:
    if module_name(path) != "pyroebm.core.files":
        assert file_access(path.read_text(encoding="utf-8")) == [], "use pyroebm.core.files"


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "Path('x').write_text('')",
        "figure.savefig('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.savez_compressed('x')",
        "import torch\ntorch.save({}, 'x')",
        "from json import load\nload(f)",
        "import os\nos.replace('x', 'y')",
        "path.unlink()",
        "from safetensors.torch import load_file, save_file",
        "import xarray\nxarray.open_dataset('x')",
    ],
)
def test_file_checker_catches(source: str) -> None:
    assert len(file_access(source)) == 1


#: Private attributes of tensors and modules.
PRIVATE = {"_version", "_parameters", "_buffers", "_modules"}


def private_torch(source: str) -> list[str]:
    """Lines that name a private part of torch."""
    tree = ast.parse(source)
    names, wrong = _aliases(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for imported in _imports(node):
                first, *parts = imported.split(".")
                if first == "torch" and any(part.startswith("_") for part in parts):
                    wrong.append(f"line {node.lineno}: imports {imported}")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            dotted = _dotted(node, names)
            own = dotted.split(".")[0] in ("self", "cls")
            of_torch = dotted.split(".")[0] == "torch" and not node.attr.startswith("__")
            if of_torch or (node.attr in PRIVATE and not own):
                wrong.append(f"line {node.lineno}: names {dotted}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_private_torch_is_in_one_module(path: Path) -> None:
    if module_name(path) != "pyroebm.core._torch_private":
        assert private_torch(path.read_text(encoding="utf-8")) == [], (
            "use pyroebm.core._torch_private"
        )


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_norm([])",
        "from torch import nn\nnn.modules.batchnorm._BatchNorm",
        "from torch._inductor import compile",
        "import torch._dynamo",
        "import torch._inductor.config as c",
        "def f(tensor):\n    return tensor._version",
        "from torch.utils._pytree import tree_leaves",
    ],
)
def test_private_checker_catches(source: str) -> None:
    assert len(private_torch(source)) == 1


def test_parallel_assignment_is_of_two_at_most() -> None:
    """One statement a line: `a, b, c = 1, 2, 3` hides what becomes of what."""
    wrong = []
    for path in [*SOURCES, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tuples = isinstance(node, ast.Assign) and all(
                isinstance(side, ast.Tuple) for side in (node.targets[0], node.value)
            )
            if tuples and len(node.value.elts) > 2:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_assert_statement(path: Path) -> None:
    """`python -O` removes asserts, and their messages are nobody's: users get a ValueError, type
    checkers a cast."""
    lines = [
        n.lineno
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Assert)
    ]
    assert not lines, f"{path.relative_to(ROOT)} has assert statements on lines {lines}"


def test_progress_is_shown_by_one_module() -> None:
    using = {module_name(path) for path in (*SOURCES, *SCRIPTS) if "tqdm" in path.read_text()}
    using -= {"scripts.notebooks"}  # which names it in a comment
    assert using == {"pyroebm.core.progress"}
