"""Trained models that ship with the package, with their log Z, metrics and reference draws.

Another package adds its entries by an entry point of the group ``pyroebm.zoo`` that names a folder
(a ``str`` or a ``Path``) with one folder for each entry::

    [project.entry-points."pyroebm.zoo"]
    mine = "my_package.trained:FOLDER"

Each has ``model.safetensors``, written by :func:`pyroebm.save`, and ``card.json``, written by
:meth:`Card.write`. No two entries may have one name.
"""

from pyroebm.zoo.cards import Card, Check, Data, Metric, Training, card_markdown
from pyroebm.zoo.computations import COMPUTATIONS, Context, compute, load_data
from pyroebm.zoo.exporting import export
from pyroebm.zoo.references import check_draws, compare_moments, write_draws
from pyroebm.zoo.registry import KnownLogZ, card, list, load, reference_draws, target, targets
from pyroebm.zoo.verification import Verification, verify

__all__ = [
    "COMPUTATIONS",
    "Card",
    "Check",
    "Context",
    "Data",
    "KnownLogZ",
    "Metric",
    "Training",
    "Verification",
    "card",
    "card_markdown",
    "check_draws",
    "compare_moments",
    "compute",
    "export",
    "list",
    "load",
    "load_data",
    "reference_draws",
    "target",
    "targets",
    "verify",
    "write_draws",
]
