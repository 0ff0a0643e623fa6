"""The command line: ``pyroebm demo``, ``pyroebm zoo``, ``pyroebm version``."""

from __future__ import annotations

from pathlib import Path

import tyro

from pyroebm import __version__
from pyroebm.cli.zoo import run_zoo

__all__ = [
    "main",
]


def run_demo_command(
    out: Path = Path("demo"), seed: int = 0, quick: bool = False, progress: bool | None = None
) -> None:
    """Sample the double well x^4 - 4x^2 + x with NUTS, and fit NICE with auxiliary variables to it.

    Args:
        out: folder for report.json, double_well.png, trace.png, rank.png, energy.png and chains.nc.
        seed: seed of all random numbers.
        quick: a few seconds instead of a minute or two; the numbers are then inaccurate.
        progress: show progress; by default after one second.
    """
    import torch

    from pyroebm.cli.demo import run_demo  # the import takes seconds, which --help does not need

    # small tensors do not profit from more threads
    torch.set_num_threads(1)
    run_demo(out, seed, quick, progress)


def print_version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line, the entry point of the console script."""
    tyro.extras.subcommand_cli_from_dict(
        {"demo": run_demo_command, "zoo": run_zoo, "version": print_version},
        description="Energy-based models on Pyro.",
    )
