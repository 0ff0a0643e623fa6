"""Build the wheel, install it in a clean environment, run the README's first example there from an empty folder.

`python scripts/wheel_check.py [PAGE]`, from the checkout; needs the packages `build` and `hatchling`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from readme_block import python_blocks

ROOT = Path(__file__).resolve().parents[1]
WHERE = "import pathlib, pyroebm; print(pathlib.Path(pyroebm.__file__).resolve().parent)"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command with nothing of the checkout in its environment; its output, or SystemExit with it."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env | {"MPLBACKEND": "Agg"}, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """The wheel holds the package, its type marker and its license, and nothing beside the package."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    strangers = sorted(top for top in tops if top != "pyroebm" and not top.endswith(".dist-info"))
    if strangers:
        raise SystemExit(f"{wheel.name} would install {strangers} beside pyroebm")
    for wanted in ("pyroebm/__init__.py", "pyroebm/py.typed", "LICENSE", "entry_points.txt"):
        if not any(name.endswith(wanted) for name in names):
            raise SystemExit(f"{wheel.name} lacks {wanted}")
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pyroebm").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    if missing := sorted(ours - set(names)):
        raise SystemExit(f"{wheel.name} lacks {missing}, which the checkout has")


def main(page: str = str(ROOT / "README.md")) -> int:
    """Do all of it; SystemExit with the reason where something is wrong."""
    example = next((b for b in python_blocks(Path(page).read_text(encoding="utf-8")) if b.skip is None), None)
    if example is None:
        raise SystemExit(f"{page} has no Python block that runs: its first one is the example that the installed wheel must run")
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
        scratch = Path(name)
        print("building the source distribution, and the wheel from it ...", flush=True)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch / "dist", ROOT, cwd=scratch)
        (wheel,) = (scratch / "dist").glob("*.whl")
        check_contents(wheel)
        print(f"installing {wheel.name} in a clean environment ...", flush=True)
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
        run(*pip[:3], "install", *pip[3:], "-c", ROOT / "constraints.txt", wheel, cwd=scratch)
        run(*pip[:3], "check", cwd=scratch)
        empty = scratch / "empty"
        empty.mkdir()
        at = Path(run(python, "-c", WHERE, cwd=empty).strip())
        if not at.is_relative_to((scratch / "venv").resolve()):
            raise SystemExit(f"pyroebm was imported from {at}, not from the clean environment")
        print(f"running the first example of {Path(page).name} (line {example.line}) in an empty folder ...", flush=True)
        source = scratch / "example" / "example.py"
        source.parent.mkdir()
        source.write_text(example.source, encoding="utf-8")
        print(run(python, source, cwd=empty), end="")
        run(scratch / "venv" / "bin" / "pyroebm", "--help", cwd=empty)
    print(f"{wheel.name}: built, installed with the pins of constraints.txt, the example and `pyroebm --help` run")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
