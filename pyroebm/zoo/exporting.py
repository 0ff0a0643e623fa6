"""Export of an entry to a folder in the form of a repository of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyroebm.core.files import copy_file, write_settings, write_text
from pyroebm.zoo.cards import Card, card_markdown
from pyroebm.zoo.registry import CONFIG, CONFIG_KEY, card, checked_file

__all__ = ["export"]


def export(name: str | Path, folder: str | Path) -> Path:
    """Write an entry as ``config.json``, ``model.safetensors`` and ``README.md``.

    ``README.md`` has the metrics as ``model-index``. :func:`load`, :func:`card` and :func:`verify`
    take the folder instead of a name. Nothing is sent over a network.

    Args:
        name: of the entry.
        folder: written to; it must be empty or not exist.

    Returns:
        the folder.

    Raises:
        ValueError: if there is no such entry, or the folder is not empty.
        FileError: if a file of the entry is missing or damaged.

    Example:
        >>> import tempfile
        >>> from pyroebm import zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = zoo.export("boltzmann-machine-bars", Path(folder, "bars"))
        ...     sorted(file.name for file in path.iterdir()), type(zoo.load(path)).__name__
        (['README.md', 'config.json', 'model.safetensors', 'reference.npz'], 'BoltzmannMachine')
    """
    found, target = card(name), Path(folder)
    files = [checked_file(name, file) for file in found.files]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder must be empty or not exist, got {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        copy_file(file, target / file.name)
    config = {
        "library_name": "pyroebm",
        "architectures": [found.model],
        CONFIG_KEY: found.to_dict(),
    }
    write_settings(target / CONFIG, config)
    write_text(target / "README.md", _front_matter(found) + card_markdown(found))
    return target


def _front_matter(found: Card) -> str:
    """Return the metadata of a card as YAML, whose lists and strings are those of JSON."""
    metrics: list[dict[str, Any]] = [
        {
            "type": metric.computation,
            "name": f"{metric.name} ({metric.kind})",
            "value": metric.value,
            "args": {**metric.arguments, "standard_error": metric.standard_error},
        }
        for metric in (*found.log_z, *found.metrics)
    ]
    results = {
        "task": {"type": "density-estimation", "name": "density estimation"},
        "dataset": {"type": found.data.name, "name": found.data.name},
        "metrics": metrics,
    }
    fields = {
        "library_name": "pyroebm",
        "license": "apache-2.0",
        "tags": ["energy-based-model", "pyro", found.model],
        "model-index": [{"name": found.name, "results": [results]}],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", "", ""])
