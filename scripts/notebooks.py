"""Run the notebooks and write them with new outputs.

`python scripts/notebooks.py [NAME ...]` writes notebooks/NAME.ipynb from NAME.py. A notebook is a
percent script (`# %%` before each cell). Each runs in its own kernel and in an empty folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a reader sees the figures inline
    # tqdm's, on Pyro's import, where there are no widgets
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


def read(script: Path) -> NotebookNode:
    """Return the notebook of a percent script, not executed; the ids of its cells are stable."""
    notebook: NotebookNode = jupytext.read(script)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def execute(script: Path, folder: Path) -> NotebookNode:
    """Execute a script's cells in a new kernel with the working directory ``folder``.

    Any error raises.
    """
    notebook = read(script)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        # else it warns that it listens on the loopback interface
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(env=os.environ | ENVIRONMENT)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not only_compiling(output)]
    return notebook


def only_compiling(output: NotebookNode) -> bool:
    """Return whether an output is only a message about compilation.

    Such messages depend on the caches of the machine and are left out.
    """
    return (
        output.output_type == "stream"
        and output.name == "stderr"
        and all(line.startswith("compiling ") for line in output.text.splitlines())
    )


def main(*names: str) -> int:
    """Run the named notebooks, or all of them, and write each."""
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    scripts = [FOLDER / f"{name}.py" for name in names] or sorted(FOLDER.glob("[0-9]*.py"))
    for script in scripts:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(script, Path(folder))
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(
            f"{script.stem}: {len(notebook.cells)} cells in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
