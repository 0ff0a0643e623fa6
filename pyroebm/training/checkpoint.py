"""Where a training stands, as one file of tensors: safetensors, with one text of JSON among them.
No pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyroebm.core.files import SafetensorError, from_bytes, read_tensors, to_bytes, write_tensors
from pyroebm.core.serialization import from_text, pack, to_text, unpack
from pyroebm.kernels.base import Kernel
from pyroebm.objectives.base import Objective
from pyroebm.training.distributed import connected_ranks, gather_bytes

__all__ = ["Checkpoint", "TrainingState", "saved_seed", "settings_of"]


class TrainingState:
    """All that moves in a training, as tensors and back.

    Args:
        modules: by name; their ``state_dict`` is kept.
        optimizers: by name, and
        schedules: keep their own states, and
        generator: its stream.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> state = TrainingState({"net": net}, {"energy": optimizer}, {}, torch.Generator())
        >>> kept = state.tensors()
        >>> nn.init.zeros_(net.bias)
        Parameter containing:
        tensor([0.], requires_grad=True)
        >>> state.restore(kept)
        >>> bool(net.bias == 0)
        False
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        schedules: Mapping[str, LRScheduler],
        generator: torch.Generator,
    ) -> None:
        self.modules = modules
        self.optimizers = optimizers
        self.schedules = schedules
        self.generator = generator

    def tensors(self) -> dict[str, Tensor]:
        """A copy of it all."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        said = pack(self._dicts(), "states", tensors)
        for name, module in self.modules.items():
            tensors |= {
                f"module.{name}.{key}": value.detach().clone()
                for key, value in module.state_dict().items()
            }
        return tensors | {"states": to_text(said)}

    def restore(self, tensors: Mapping[str, Tensor], *, learned_only: bool = False) -> None:
        """Put it back; ``learned_only`` leaves the generator, the schedules and the optimizers'
        settings as they are now.

        Raises:
            ValueError: if it is of other modules.
        """
        device = self.generator.device  # chains are made anew where they are loaded
        for name, module in self.modules.items():
            start = f"module.{name}."
            state = {
                k.removeprefix(start): v.to(device)
                for k, v in tensors.items()
                if k.startswith(start)
            }
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"the state is of another {name} than this: {error}") from error
        states = unpack(from_text(tensors["states"]), self._dicts(), dict(tensors))
        for key, optimizer in self.optimizers.items():
            state = states["optimizers"][key]
            # JSON has no keys but text; an optimizer numbers its parameters.
            state["state"] = {int(k): v for k, v in state["state"].items()}
            if learned_only:
                state["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
        if learned_only:
            return
        for key, schedule in self.schedules.items():
            schedule.load_state_dict(states["schedules"][key])
        self.generator.set_state(tensors["generator"])

    def _dicts(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, Mapping[str, Any]] = {
            "optimizers": self.optimizers,
            "schedules": self.schedules,
        }
        return {
            name: {key: part.state_dict() for key, part in named.items()}
            for name, named in parts.items()
        }


class Checkpoint:
    """A file of what :func:`pyroebm.training.fit` needs to go on. Of several processes the first
    writes it, with a part for each.

    Args:
        path: the file; its folder is made if it is not there. All processes must see it.
        state: what is kept.
        settings: what must be the same when a training goes on, as JSON can say it.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 1)
        >>> state = TrainingState({"net": net}, {}, {}, torch.Generator())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = Checkpoint(f"{folder}/net.safetensors", state, {"seed": 0})
        ...     kept.save(7, {"best": torch.tensor(0.5)})
        ...     kept.load()
        (7, {'best': tensor(0.5000)})
    """

    def __init__(self, path: str | Path, state: TrainingState, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.state = state
        self.settings = dict(settings)

    @property
    def exists(self) -> bool:
        """Whether something was saved there."""
        return self.path.exists()

    def save(self, step: int, more: Mapping[str, Tensor] | None = None) -> None:
        """Keep the state, how many steps are done and what ``more`` there is; the file is the old
        one or the new one, whole, at any moment."""
        tensors = self.state.tensors() | {
            f"more.{name}": value for name, value in (more or {}).items()
        }
        parts = gather_bytes(to_bytes(tensors), self.state.generator.device)
        if connected_ranks()[0] == 0:
            file = {
                f"rank{k}": torch.frombuffer(bytearray(part), dtype=torch.uint8)
                for k, part in enumerate(parts)
            }
            file["said"] = to_text({"settings": self.settings, "step": step})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, file)
        # no process goes on, perhaps to load it, before it is there
        gather_bytes(b".", self.state.generator.device)

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Put the state back; the number of steps that were done, and what more was kept.

        Raises:
            ValueError: if there is no such file, it is damaged or no checkpoint, or it is one of
                other settings or modules.
        """
        try:
            file, said = _read(self.path)
            same = said["settings"] == self.settings
            tensors = (
                from_bytes(file[f"rank{connected_ranks()[0]}"].numpy().tobytes()) if same else {}
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} must be a file that fit wrote, whole, got {error}"
            ) from error
        if not same:
            raise ValueError(
                f"the checkpoint must be of the settings of this training, {self.settings}, got"
                f" {said['settings']}"
            )
        more = {
            k.removeprefix("more."): tensors.pop(k) for k in list(tensors) if k.startswith("more.")
        }
        try:
            self.state.restore(tensors)
        except ValueError as error:
            raise ValueError(f"checkpoint={str(self.path)!r} does not fit: {error}") from error
        return int(said["step"]), more


def saved_seed(path: str | Path) -> int:
    """The seed of the training in a checkpoint.

    Raises:
        ValueError: if there is no such file, or it is damaged or no checkpoint.
    """
    return int(_read(path)[1]["settings"]["seed"])


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and what it says of settings and steps."""
    try:
        file, _ = read_tensors(path)
        return file, from_text(file["said"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"checkpoint={str(path)!r} must be a file that fit wrote, whole, got {error}"
        ) from error


def settings_of(name: str, objective: object) -> dict[str, Any]:
    """Settings of an objective, and of objectives inside it, as JSON can say them: numbers, words,
    tuples, and kernels in words.

    Example:
        >>> from pyroebm.objectives import ContrastiveDivergence, Hybrid
        >>> settings_of("objective", Hybrid(ContrastiveDivergence(k=5)))["objective.generative.k"]
        5
    """
    modules = (
        objective.named_modules(prefix=name)
        if isinstance(objective, nn.Module)
        else [(name, objective)]
    )
    found: dict[str, Any] = {}
    for path, module in modules:
        if module is not objective and not isinstance(module, Objective):
            continue  # a network: its state says what it is
        for key, value in vars(module).items():
            if key[0] == "_" or key == "training":
                continue
            if type(value) in (int, float, str, bool):
                found[f"{path}.{key}"] = value
            elif isinstance(value, tuple | Kernel):
                # addresses are another's in each process
                found[f"{path}.{key}"] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return found
