"""The command line: ``pyroebm demo``, ``pyroebm version``."""

from __future__ import annotations

from pathlib import Path

import tyro

from pyroebm import __version__

__all__ = [
    "main",
]


def run_demo_command(
    out: Path = Path("demo"), seed: int = 0, quick: bool = False, progress: bool | None = None
) -> None:
    """Sample the double well x^4 - 4x^2 + x with NUTS, fit NICE and redundant NICE to it, and
    report what mixed.

    Args:
        out: folder for report.json, double_well.png, trace.png, rank.png, energy.png and chains.nc.
        seed: seed of everything.
        quick: a few seconds in place of a minute or two; the numbers are then rough.
        progress: show progress; by default of what takes longer than a second.
    """
    import torch

    from pyroebm.cli.demo import run_demo  # takes seconds to import: not for --help

    # tensors this small gain nothing from two, and lose much where a core is busy
    torch.set_num_threads(1)
    run_demo(out, seed, quick, progress)


def print_version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point of the console script."""
    tyro.extras.subcommand_cli_from_dict(
        {"demo": run_demo_command, "version": print_version},
        description="Energy-based models on Pyro.",
    )
