"""The entries of the zoo: those of this package, and those of others by entry points."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from pyroebm.core.energy import Energy, View
from pyroebm.core.files import FileError, file_checksum, read_arrays, reading
from pyroebm.core.saving import load as load_module
from pyroebm.flows.density import FlowEnergy
from pyroebm.flows.flow import Flow
from pyroebm.zoo.cards import Card, read_card

__all__ = ["KnownLogZ", "card", "find", "list", "load", "reference_draws", "target", "targets"]

#: The entries that ship with this package, a folder each.
ENTRIES = Path(__file__).resolve().parent / "entries"
#: Group of entry points. Each names a folder of entries, a ``str`` or a ``Path``.
GROUP = "pyroebm.zoo"
MODEL = "model.safetensors"
CARD = "card.json"
REFERENCE = "reference.npz"
CONFIG = "config.json"
#: The entry of ``config.json`` that has the card of an exported entry.
CONFIG_KEY = "pyroebm_card"


def folders() -> dict[str, Path]:
    """Return the folder of each entry by its name.

    Raises:
        ValueError: if two packages have an entry of the same name.
        FileError: if an entry point names no folder.
    """
    sources = {"pyroebm": ENTRIES}
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.value
        folder = Path(point.load())
        if not folder.is_dir():
            raise FileError(
                folder, f"the entry point {point.name!r} of {package} must name a folder"
            )
        sources[f"{package} ({point.name})"] = folder
    found: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for source, folder in sources.items():
        for path in sorted(folder.iterdir()):
            if not path.is_dir() or path.name.startswith((".", "_")):
                continue
            if path.name in found:
                raise ValueError(
                    f"names of entries must be unique, but {owners[path.name]} and {source} both"
                    f" have {path.name!r}: rename or uninstall one of them"
                )
            found[path.name] = path
            owners[path.name] = source
    return found


def find(name: str | Path) -> Path:
    """Return the folder of an entry, or an exported folder itself.

    Raises:
        ValueError: if there is no such entry; the message has near names.
    """
    entries = folders()
    if str(name) in entries:
        return entries[str(name)]
    if (Path(name) / CONFIG).is_file() or (Path(name) / CARD).is_file():
        return Path(name)
    near = difflib.get_close_matches(str(name), entries, 3, cutoff=0.4)
    raise ValueError(
        f"name must be an entry of the zoo or a folder that export wrote, got {str(name)!r};"
        f" {'near names: ' + ', '.join(near) if near else 'no name is near'}. Call"
        " pyroebm.zoo.list()"
    )


def list(pattern: str = "*") -> tuple[str, ...]:
    """Return the names of all entries that match a pattern, in alphabetical order.

    Args:
        pattern: such as ``"rbm*"``.

    Example:
        >>> from pyroebm import zoo
        >>> zoo.list("rbm-digits-1*")
        ('rbm-digits-16',)
    """
    return tuple(name for name in sorted(folders()) if fnmatch.fnmatchcase(name, pattern))


def card(name: str | Path) -> Card:
    """Read the card of an entry.

    Args:
        name: of the entry, or a folder that :func:`export` wrote.

    Raises:
        ValueError: if there is no such entry.
        FileError: if the card is missing or damaged.

    Example:
        >>> from pyroebm import zoo
        >>> zoo.card("rbm-digits-16").model
        'BernoulliRBM'
    """
    folder = find(name)
    config = folder / CONFIG
    found = read_card(config, CONFIG_KEY) if config.is_file() else read_card(folder / CARD)
    if folder.parent == ENTRIES and found.name != folder.name:
        raise FileError(folder, f"the card must be that of {folder.name!r}, got {found.name!r}")
    return found


def checked_file(name: str | Path, file: str) -> Path:
    """Return a file of an entry after comparing it with the checksum in the card.

    Raises:
        FileError: if it is missing or is not the one that the card describes.
    """
    path, found = find(name) / file, card(name)
    if file not in found.files:
        raise FileError(path, f"{found.name} has no such file, but {sorted(found.files)}")
    if file_checksum(path) != found.files[file]:
        raise FileError(path, "the file is not the one that the card describes: it was changed")
    return path


def load(name: str | Path) -> nn.Module:
    """Load the model of an entry: an energy, a machine or a flow.

    Args:
        name: of the entry, or a folder that :func:`export` wrote.

    Returns:
        the model in the dtype of its training, without gradients.

    Raises:
        ValueError: if there is no such entry.
        FileError: if a file is missing, damaged, or not the one that the card describes.

    Example:
        >>> from pyroebm import zoo
        >>> rbm = zoo.load("rbm-digits-16")
        >>> rbm.sample(3).shape, abs(rbm.log_z - zoo.card("rbm-digits-16").exact_log_z) < 1e-6
        (torch.Size([3, 64]), True)
    """
    module: nn.Module = load_module(checked_file(name, MODEL))
    return module.requires_grad_(False)


def reference_draws(name: str | Path) -> Tensor:
    """Load the reference draws of an entry, shape ``(chains, draws, *event)``, in float64.

    Their criteria are in the card's ``checks``. Draws of discrete energies are stored as small
    integers, others in float32.

    Args:
        name: of the entry, or a folder that :func:`export` wrote.

    Raises:
        ValueError: if there is no such entry.
        FileError: if the entry has no reference draws, or the file is damaged.

    Example:
        >>> from pyroebm import zoo
        >>> zoo.reference_draws("rbm-digits-16").shape
        torch.Size([10, 1000, 64])
    """
    path = checked_file(name, REFERENCE)
    with reading(path):
        arrays, _ = read_arrays(path, ("draws",))
        draws = torch.from_numpy(arrays["draws"]).double()
    shape = card(name).event_shape
    if tuple(draws.shape[2:]) != shape:
        raise FileError(
            path, f"draws must have events of shape {shape}, got {tuple(draws.shape[2:])}"
        )
    return draws


class KnownLogZ(View):
    """An energy whose log Z was computed and stored.

    Args:
        energy: the energy.
        log_z: its log Z, in nats.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> KnownLogZ(2.0 * DoubleWell(), 9.95).log_z
        9.95
    """

    def __init__(self, energy: Energy, log_z: float) -> None:
        super().__init__(energy)
        self.value = float(log_z)

    @property
    def log_z(self) -> float:
        """Log of the normalizing constant, in nats."""
        return self.value

    def forward(self, x: Tensor) -> Tensor:
        """Return the energy of each event, in nats: ``(*batch, *event) -> (*batch)``."""
        return self.energy(x)


def target(name: str | Path) -> Energy:
    """Return an entry as a target for samplers: an energy in float64, without gradients.

    ``log_z`` is the exact value of the card. It is None where the card has a bracket:
    ``card(name).log_z``. A flow is the energy of its density over all of its D entries, whose log Z
    is 0.

    Args:
        name: of the entry, or a folder that :func:`export` wrote.

    Raises:
        ValueError: if there is no such entry, or it is neither an energy nor a flow.
        FileError: as :func:`load`.

    Example:
        >>> from pyroebm import zoo
        >>> zoo.target("nice-double-well").log_z
        0.0
    """
    model = load(name).double()
    energy = FlowEnergy(model) if isinstance(model, Flow) else model
    if not isinstance(energy, Energy):
        raise ValueError(f"name must be that of an energy or a flow, got a {type(model).__name__}")
    log_z = card(name).exact_log_z
    return KnownLogZ(energy, log_z) if energy.log_z is None and log_z is not None else energy


def targets(pattern: str = "*") -> dict[str, Energy]:
    """Return the entries that match a pattern as targets for samplers, see :func:`target`.

    Args:
        pattern: such as ``"rbm*"``.

    Returns:
        the energies by name.

    Raises:
        FileError: as :func:`load`.

    Example:
        >>> from pyroebm import zoo
        >>> all(energy.log_z is not None for energy in zoo.targets("*-moons").values())
        True
    """
    return {name: target(name) for name in list(pattern)}
