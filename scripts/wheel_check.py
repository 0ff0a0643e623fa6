"""Build the wheel, install it in a new environment, and run the README's first example.

`python scripts/wheel_check.py [PAGE]`, from the checkout; needs the packages `build` and
`hatchling`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

from readme_block import python_blocks

ROOT = Path(__file__).resolve().parents[1]
#: Maximum size of the wheel in bytes: it has the trained models of the zoo.
MAX_BYTES = 15_000_000
#: A small entry of the zoo, which is verified.
ENTRY = "boltzmann-machine-bars"
WHERE = "import pathlib, pyroebm; print(pathlib.Path(pyroebm.__file__).resolve().parent)"


def run(*command: str | Path, cwd: Path, more: Mapping[str, str] | None = None) -> str:
    """Run a command without the checkout in its environment and return its output.

    Raises RuntimeError with the output if it fails.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    }
    env |= {"MPLBACKEND": "Agg", **(more or {})}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def build(folder: Path) -> Path:
    """Build the wheel in ``folder`` from the source distribution and check its contents."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    check_contents(wheel)
    return wheel


def check_contents(wheel: Path) -> None:
    """Check the wheel: the package, type marker and license, nothing else, and its size."""
    if (size := wheel.stat().st_size) > MAX_BYTES:
        raise RuntimeError(f"{wheel.name} has {size:,} bytes, more than {MAX_BYTES:,}")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    strangers = sorted(top for top in tops if top != "pyroebm" and not top.endswith(".dist-info"))
    if strangers:
        raise RuntimeError(f"{wheel.name} would install {strangers} beside pyroebm")
    for wanted in ("pyroebm/__init__.py", "pyroebm/py.typed", "LICENSE", "entry_points.txt"):
        if not any(name.endswith(wanted) for name in names):
            raise RuntimeError(f"{wheel.name} lacks {wanted}")
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "pyroebm").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    if missing := sorted(ours - set(names)):
        raise RuntimeError(f"{wheel.name} lacks {missing}, which the checkout has")


def install(
    environment: Path, *requirements: str | Path, more: Mapping[str, str] | None = None
) -> None:
    """Install into a virtual environment by its own pip."""
    pip = (environment / "bin" / "python", "-m", "pip")
    run(
        *pip,
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        *requirements,
        cwd=environment,
        more=more,
    )


def check_installed(environment: Path, empty: Path) -> None:
    """Check the environment, the origin of pyroebm, its command, and an entry of the zoo."""
    run(environment / "bin" / "python", "-m", "pip", "check", cwd=empty)
    at = Path(run(environment / "bin" / "python", "-c", WHERE, cwd=empty).strip())
    if not at.is_relative_to(environment.resolve()):
        raise RuntimeError(f"pyroebm was imported from {at}, not from {environment}")
    run(environment / "bin" / "pyroebm", "--help", cwd=empty)
    run(environment / "bin" / "pyroebm", "zoo", "verify", ENTRY, cwd=empty)


def run_example(environment: Path, page: Path, empty: Path) -> str:
    """Run the first Python block of a page in an empty folder and return its output."""
    example = next(
        (b for b in python_blocks(page.read_text(encoding="utf-8")) if b.skip is None), None
    )
    if example is None:
        raise RuntimeError(
            f"{page} has no Python block that runs: the installed wheel must run its first one"
        )
    (empty / "example.py").write_text(example.source, encoding="utf-8")
    return run(environment / "bin" / "python", "example.py", cwd=empty)


def main(page: str = str(ROOT / "README.md")) -> int:
    """Run all checks; return 1 and print the reason if one fails."""
    try:
        with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
            scratch = Path(name)
            for folder in ("dist", "empty"):
                (scratch / folder).mkdir()
            print("building the source distribution, and the wheel from it ...", flush=True)
            wheel = build(scratch / "dist")
            print(f"installing {wheel.name} in a clean environment ...", flush=True)
            venv.create(scratch / "venv", with_pip=True)
            install(scratch / "venv", "-c", ROOT / "constraints.txt", wheel)
            check_installed(scratch / "venv", scratch / "empty")
            print(
                f"running the first example of {Path(page).name} in an empty folder ...", flush=True
            )
            print(run_example(scratch / "venv", Path(page), scratch / "empty"), end="")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{wheel.name}: built, installed with the pins of constraints.txt, the example and"
        " `pyroebm zoo verify` run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
