"""Checkpoints of a training, as one safetensors file with JSON, without pickle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyroebm.core.energy import Energy
from pyroebm.core.files import (
    SafetensorError,
    checksum,
    from_bytes,
    read_tensors,
    to_bytes,
    write_tensors,
)
from pyroebm.core.saving import describe_call
from pyroebm.core.serialization import from_text, pack, to_text, unpack
from pyroebm.flows.flow import Flow
from pyroebm.kernels.base import Kernel
from pyroebm.objectives.base import Objective
from pyroebm.objectives.noise import Noise
from pyroebm.training.distributed import connected_ranks, gather_bytes

__all__ = ["Checkpoint", "TrainingState", "saved_seed", "settings_of"]


class TrainingState:
    """The state of a training, which is saved as tensors and restored from them.

    Args:
        modules: modules by name, of which the ``state_dict`` is saved.
        optimizers: optimizers by name.
        schedules: learning rate schedules by name.
        generator: source of the training's random numbers.

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
        """Return a copy of the state."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        states = pack(self._dicts(), "states", tensors)
        for name, module in self.modules.items():
            tensors |= {
                f"module.{name}.{key}": value.detach().clone()
                for key, value in module.state_dict().items()
            }
        return tensors | {"states": to_text(states)}

    def restore(self, tensors: Mapping[str, Tensor], *, learned_only: bool = False) -> None:
        """Restore the state.

        Args:
            tensors: a copy made by :meth:`tensors`.
            learned_only: whether to keep the present states of the generator and the schedules and
                the settings of the optimizers.

        Raises:
            ValueError: if the state is that of other modules.
        """
        device = self.generator.device  # buffers that are None before are created on this device
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
                raise ValueError(f"the state must be that of this {name}: {error}") from error
        states = unpack(from_text(tensors["states"]), self._dicts(), dict(tensors))
        for key, optimizer in self.optimizers.items():
            state = states["optimizers"][key]
            # the keys are numbers of parameters, but JSON has only strings as keys
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
    """A file with the state of a training, from which :func:`pyroebm.training.fit` continues.

    In distributed training the first process writes the file, with a part for each process.

    Args:
        path: the file, to which all processes must have access; its folder is created if needed.
        state: the state to save.
        settings: settings, as JSON values, which must be equal on restoring.

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
        """Whether the file exists."""
        return self.path.exists()

    def save(self, step: int, more: Mapping[str, Tensor] | None = None) -> None:
        """Write the state atomically: to a temporary file, which is then renamed.

        Args:
            step: number of steps that are done.
            more: further tensors to save.
        """
        tensors = self.state.tensors() | {
            f"more.{name}": value for name, value in (more or {}).items()
        }
        parts = gather_bytes(to_bytes(tensors), self.state.generator.device)
        if connected_ranks()[0] == 0:
            file = {
                f"rank{k}": torch.frombuffer(bytearray(part), dtype=torch.uint8)
                for k, part in enumerate(parts)
            }
            file["header"] = to_text({"settings": self.settings, "step": step})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, file)
        # a barrier: no process continues before the file is written
        gather_bytes(b".", self.state.generator.device)

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Restore the state.

        Returns:
            The number of steps that were done, and the further tensors.

        Raises:
            ValueError: if the file does not exist, is damaged or no checkpoint, or has other
                settings or modules.
        """
        try:
            file, header = _read(self.path)
            same = header["settings"] == self.settings
            tensors = (
                from_bytes(file[f"rank{connected_ranks()[0]}"].numpy().tobytes()) if same else {}
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} must be a file that fit wrote, whole, got {error}"
            ) from error
        if not same:
            raise ValueError(
                f"checkpoint={str(self.path)!r} must be of the settings of this training, but"
                f" differs:\n{_differences(header['settings'], self.settings)}"
            )
        more = {
            k.removeprefix("more."): tensors.pop(k) for k in list(tensors) if k.startswith("more.")
        }
        try:
            self.state.restore(tensors)
        except ValueError as error:
            raise ValueError(f"checkpoint={str(self.path)!r} does not fit: {error}") from error
        return int(header["step"]), more


def saved_seed(path: str | Path) -> int:
    """Return the seed of the training in a checkpoint.

    Raises:
        ValueError: if the file does not exist, or is damaged or no checkpoint.
    """
    return int(_read(path)[1]["settings"]["seed"])


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, and its header with settings and number of steps."""
    try:
        file, _ = read_tensors(path)
        return file, from_text(file["header"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"checkpoint={str(path)!r} must be a file that fit wrote, whole, got {error}"
        ) from error


def settings_of(
    name: str, part: object, trained: AbstractSet[int] = frozenset(), seen: set[int] | None = None
) -> dict[str, Any]:
    """Return the settings of an objective or a module, and of its parts, as JSON values.

    They are what a training does not change, by which a checkpoint recognizes its training: the
    classes of all parts and the arguments of their constructors; the numbers, strings, tuples and
    kernels among the attributes of objectives; a checksum of the tensors that no training changes,
    which are those of energies and flows that are not trained, such as the target of a flow, and
    the draws that an objective was given (:attr:`~pyroebm.objectives.Objective.constants`).

    Args:
        name: name of the part, with which the names of the settings begin.
        part: the objective or the module.
        trained: identities of the trained parameters.
        seen: identities of the modules that were described before, which are left out.

    Example:
        >>> from pyroebm.objectives import ContrastiveDivergence, Hybrid
        >>> settings_of("objective", Hybrid(ContrastiveDivergence(k=5)))["objective.generative.k"]
        5
    """
    seen = set() if seen is None else seen
    seen.add(id(part))
    found: dict[str, Any] = {}
    if not isinstance(part, nn.Module) or isinstance(part, Objective):
        for key, value in vars(part).items():
            if key[0] == "_" or key == "training":
                continue
            if type(value) in (int, float, str, bool):
                found[f"{name}.{key}"] = value
            elif isinstance(value, tuple | Kernel):
                # memory addresses differ between processes
                found[f"{name}.{key}"] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if not isinstance(part, nn.Module):
        return found
    found[f"{name}.call"] = describe_call(part)
    constants: Iterable[Tensor | None] = ()
    if isinstance(part, Objective):
        constants = [getattr(part, key) for key in part.constants]
    elif isinstance(part, Energy | Flow) and trained.isdisjoint(map(id, part.parameters())):
        constants = part.state_dict().values()
    if kept := [tensor for tensor in constants if tensor is not None]:
        found[f"{name}.tensors"] = checksum(kept)
    # parts that are not registered are held, and not trained, such as the energy of a flow
    held = {
        key.lstrip("_"): value.density if isinstance(value, Noise) else value
        for key, value in vars(part).items()
        if isinstance(value, nn.Module | Noise)
    }
    for key, child in {**dict(part.named_children()), **held}.items():
        if id(child) not in seen:
            found |= settings_of(f"{name}.{key}", child, trained, seen)
    return found


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Describe the settings that differ, one a line."""
    lines = []
    for name in sorted(saved.keys() | given.keys()):
        theirs, ours = saved.get(name, "missing"), given.get(name, "missing")
        if theirs != ours:
            lines.append(f"{name} is {theirs} in the checkpoint and {ours} here")
    return "\n".join(lines)
