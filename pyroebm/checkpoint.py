"""Where a training stands, as one file of tensors: safetensors, with one text of JSON among them. No pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyroebm.serial import from_text, pack, to_text, unpack
from pyroebm.store import written_whole

__all__ = ["Checkpoint"]


class Checkpoint:
    """What :func:`pyroebm.training.fit` needs to go on, saved and loaded together.

    Args:
        path: the file; its folder is made if it is not there.
        modules: by name; their ``state_dict`` is kept.
        optimizer: and
        schedule: keep their own states, and
        generator: its stream.
        settings: what must be the same when a training goes on, as JSON can say it.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = Checkpoint(f"{folder}/net.safetensors", {"net": net}, optimizer, None, torch.Generator(), {"seed": 0})
        ...     kept.save(7)
        ...     kept.load()
        7
    """

    def __init__(
        self,
        path: str | Path,
        modules: Mapping[str, nn.Module],
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        generator: torch.Generator,
        settings: Mapping[str, Any],
    ) -> None:
        self.path, self.modules, self.settings = Path(path), modules, dict(settings)
        self.optimizer, self.schedule, self.generator = optimizer, schedule, generator

    @property
    def exists(self) -> bool:
        """Whether something was saved there."""
        return self.path.exists()

    def save(self, step: int) -> None:
        """Keep all states, and how many steps are done; the file is the old one or the new one, whole, at any moment."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        said = pack({"optimizer": self.optimizer.state_dict(), "schedule": self._schedule()}, "states", tensors)
        for name, module in self.modules.items():
            tensors |= {f"module.{name}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
        tensors["said"] = to_text({"states": said, "settings": self.settings, "step": step})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)

    def load(self) -> int:
        """Put all states back; the number of steps that were done.

        Raises:
            ValueError: if there is no such file, it is damaged or no checkpoint, or it is one of other settings or modules.
        """
        try:
            tensors = load_file(self.path)
            said = from_text(tensors.pop("said"))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"checkpoint={str(self.path)!r} must be a file that fit wrote, whole, got {error}") from error
        if said["settings"] != self.settings:
            raise ValueError(f"the checkpoint must be of the settings of this training, {self.settings}, got {said['settings']}")
        device = self.generator.device  # chains are made anew where they are loaded
        for name, module in self.modules.items():
            start = f"module.{name}."
            state = {k.removeprefix(start): v.to(device) for k, v in tensors.items() if k.startswith(start)}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"checkpoint={str(self.path)!r} is of another {name} than this: {error}") from error
        like = {"optimizer": self.optimizer.state_dict(), "schedule": self._schedule()}
        states = unpack(said["states"], like, tensors)
        # JSON has no keys but text; an optimizer numbers its parameters.
        states["optimizer"]["state"] = {int(k): v for k, v in states["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(states["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(states["schedule"])
        self.generator.set_state(tensors["generator"])
        return int(said["step"])

    def _schedule(self) -> dict[str, Any] | None:
        return None if self.schedule is None else self.schedule.state_dict()
