"""Notebooks are percent scripts notebooks/NN_name.py, each with its executed NN_name.ipynb beside
it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from lib.scripts import load_script
from nbformat import NotebookNode

runner = load_script("notebooks")
FOLDER = runner.FOLDER
SCRIPTS = sorted(FOLDER.glob("*.py"))
REFRESH = "run `make notebooks`"


def unpaired(folder: Path) -> list[str]:
    """Names in a folder that have a script without a notebook, or the other way round."""
    scripts, notebooks = ({p.stem for p in folder.glob(pattern)} for pattern in ("*.py", "*.ipynb"))
    return [f"{name}.ipynb is missing" for name in sorted(scripts - notebooks)] + [
        f"{name}.py is missing" for name in sorted(notebooks - scripts)
    ]


def cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def faults(notebook: NotebookNode) -> list[str]:
    """Why a committed notebook is not an executed one."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    said = []
    if not any(cell.outputs for cell in code):
        said.append(f"no cell has an output: {REFRESH}")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        said.append(f"its cells were not run once each from the top: {REFRESH}")
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                said.append(f"a committed error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                said.append(f"a committed warning or log: {output.text.strip()[:200]}")
    return said


@pytest.fixture
def kernel_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The kernel of this environment, not one that the user has registered; an empty folder to run
    in."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


def test_every_notebook_has_its_pair() -> None:
    assert unpaired(FOLDER) == []


def test_names_are_numbered() -> None:
    assert [p.name for p in SCRIPTS if not p.name[:2].isdigit() or p.name[2:3] != "_"] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_pair_is_in_sync(script: Path) -> None:
    committed = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert cells(runner.read(script)) == cells(committed), (
        f"{script.stem}.py and .ipynb differ: {REFRESH}"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_committed_notebook_is_executed(script: Path) -> None:
    assert faults(nbformat.read(script.with_suffix(".ipynb"), as_version=4)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs(script: Path, kernel_environment: Path) -> None:
    runner.execute(script, kernel_environment)


def test_checks_notice(tmp_path: Path, kernel_environment: Path) -> None:
    """A script without a notebook, one never run and one that fails are all noticed."""
    script = tmp_path / "01_fails.py"
    script.write_text("# %% [markdown]\n# Words\n\n# %%\nprint(1)\n\n# %%\n1 / 0\n")
    assert unpaired(tmp_path) == ["01_fails.ipynb is missing"]
    notebook = runner.read(script)
    assert cells(notebook) == [("markdown", "Words"), ("code", "print(1)"), ("code", "1 / 0")]
    assert len(faults(notebook)) == 2
    with pytest.raises(Exception, match="ZeroDivisionError"):
        runner.execute(script, kernel_environment)
    script.write_text("# %%\nimport os\nopen('left.txt', 'w').close()\nprint(os.getcwd())\n")
    ran = runner.execute(script, kernel_environment)
    assert faults(ran) == []
    assert ran.cells[0].outputs[0].text.strip() == str(kernel_environment)
    assert (kernel_environment / "left.txt").exists()
