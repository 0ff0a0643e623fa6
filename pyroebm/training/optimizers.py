"""Optimizers and learning rate schedules, by name, factory or instance, for each loss."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyroebm.core._torch_private import norm_of_each
from pyroebm.objectives.base import HasLosses, Objective

__all__ = ["Player", "make_optimizer", "make_players", "make_schedule", "parameter_groups"]

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]
AnyOptimizer = str | MakeOptimizer | Optimizer
AnySchedule = str | MakeSchedule

#: The optimizers of ``torch.optim`` by their lowercase names.
NAMES: dict[str, Callable[..., Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}

#: Optimizers with a fused implementation for all devices, which is faster.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters that require a gradient by whether they decay.

    Weights, with two or more dimensions, decay; biases and scales do not. Without weight decay
    there is one group, to which the default of the optimizer applies.

    Example:
        >>> [
        ...     len(group["params"])
        ...     for group in parameter_groups([nn.Linear(2, 3)], weight_decay=1e-4)
        ... ]
        [1, 1]
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trained}] if trained else []
    weights, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    optimizer: AnyOptimizer, lr: float | None, default_lr: float, groups: list[dict[str, Any]]
) -> Optimizer:
    """Make an optimizer of parameter groups.

    Args:
        optimizer: the name of a class of ``torch.optim``, case-insensitive; a function from the
            groups to an optimizer; or an optimizer, which must have all parameters of the groups.
        lr: learning rate of a named optimizer; None is ``default_lr``.
        default_lr: the learning rate of the objective.
        groups: the parameters, from :func:`parameter_groups`.

    Raises:
        ValueError: if no optimizer has the name, ``lr`` is not positive or given without a name, or
            an optimizer misses parameters.

    Example:
        >>> groups = parameter_groups([nn.Linear(2, 3)], 0.0)
        >>> type(make_optimizer("sgd", 0.1, 1e-3, groups)).__name__
        'SGD'
    """
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got lr={lr}")
    if isinstance(optimizer, str):
        kind = NAMES.get(optimizer.lower())
        if kind is None:
            similar = difflib.get_close_matches(optimizer.lower(), NAMES, 3, 0.3)
            raise ValueError(
                f"optimizer must be the name of a class of torch.optim, got {optimizer!r}; similar"
                f" names: {similar or sorted(NAMES)}"
            )
        options = {"lr": default_lr if lr is None else lr}
        return kind(groups, **options | ({"fused": True} if kind in FUSED else {}))
    if lr is not None:
        raise ValueError(
            f"lr must be None unless optimizer is a name, got lr={lr}: set the learning rate of the"
            " optimizer itself"
        )
    if not isinstance(optimizer, Optimizer):
        return optimizer(groups)
    if any("weight_decay" in group for group in groups):
        raise ValueError(
            "weight_decay must be 0.0 with an instance of an optimizer, which has its own: set it"
            " in the optimizer"
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for group in groups for p in group["params"] if id(p) not in own]
    if missing:
        raise ValueError(
            "optimizer must have all trained parameters, also those of the objective, but"
            f" it misses {len(missing)} of shapes {[tuple(p.shape) for p in missing]}: make it of"
            ' [*module.parameters(), *objective.parameters()], or give a name such as "adam"'
        )
    return optimizer


def make_schedule(
    schedule: AnySchedule | None, optimizer: Optimizer, num_steps: int
) -> LRScheduler | None:
    """Make a learning rate schedule.

    Args:
        schedule: "cosine", which decreases to 0 along a half cosine over ``num_steps``; "constant";
            or a function from the optimizer to a schedule. None is "constant".
        optimizer: the optimizer.
        num_steps: number of steps of the training.

    Returns:
        The schedule, or None for a constant learning rate.

    Raises:
        ValueError: if no schedule has the name.

    Example:
        >>> optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.2)
        >>> schedule, rates = make_schedule("cosine", optimizer, num_steps=2), []
        >>> for step in range(2):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.2, 0.1]
    """
    if schedule is None or schedule == "constant":
        return None
    if isinstance(schedule, str):
        if schedule != "cosine":
            raise ValueError(
                'schedule must be None, "constant", "cosine" or a function from the optimizer to a'
                f" torch.optim.lr_scheduler, got {schedule!r}"
            )
        return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / num_steps)))
    return schedule(optimizer)


@dataclasses.dataclass(frozen=True)
class Player:
    """The parameters of a loss, with their optimizer and schedule."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler | None

    def norm(self, max_norm: float | None) -> Tensor:
        """Return the norm of the gradient, and clip it to ``max_norm``; 0 without gradients."""
        if max_norm is not None:
            return nn.utils.clip_grad_norm_(self.parameters, max_norm)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.stack(norm_of_each(gradients)).norm() if gradients else torch.zeros(())


def make_players(
    module: nn.Module,
    objective: Any,
    optimizer: AnyOptimizer | Mapping[str, AnyOptimizer],
    lr: float | Mapping[str, float] | None,
    schedule: AnySchedule | Mapping[str, AnySchedule] | None,
    weight_decay: float,
    num_steps: int,
) -> dict[str, Player]:
    """Make the optimizers of all losses, by the names of the losses.

    An objective with one loss, "energy", trains the module and its own parameters.
    """
    parts: dict[str, list[nn.Module]] = {
        "energy": [part for part in (module, objective) if isinstance(part, nn.Module)]
    }
    if isinstance(objective, HasLosses):
        trained = objective.trained(module)  # type: ignore[arg-type]
        parts = {key: [nn.ParameterList(own)] for key, own in trained.items()}
    for name, given in (("optimizer", optimizer), ("lr", lr), ("schedule", schedule)):
        if isinstance(given, Mapping) and not (
            set(given) <= set(parts) and (name != "optimizer" or set(given) == set(parts))
        ):
            raise ValueError(
                f"{name} must be one value, or a dict with the losses {sorted(parts)}, got"
                f" {sorted(given)}"
            )
    defaults = objective if isinstance(objective, Objective) else Objective()
    players = {}
    for key, modules in parts.items():
        groups = parameter_groups(modules, weight_decay)
        if not groups:
            raise ValueError(
                f"{type(module).__name__} must have a parameter that requires a gradient, but has"
                " none: call requires_grad_()"
            )
        chosen = make_optimizer(
            optimizer[key] if isinstance(optimizer, Mapping) else optimizer,
            lr.get(key) if isinstance(lr, Mapping) else lr,
            defaults.lr,
            groups,
        )
        plan = make_schedule(
            schedule.get(key)
            if isinstance(schedule, Mapping)
            else defaults.schedule
            if schedule is None
            else schedule,
            chosen,
            num_steps,
        )
        if isinstance(chosen, torch.optim.LBFGS) or isinstance(plan, ReduceLROnPlateau):
            raise ValueError(
                f"optimizer and schedule must not evaluate the loss, as {type(chosen).__name__}"
                f" with {type(plan).__name__} does: use an optimizer other than LBFGS, and a"
                " schedule that counts steps"
            )
        players[key] = Player([p for group in groups for p in group["params"]], chosen, plan)
    all_ids = [id(p) for player in players.values() for p in player.parameters]
    if "energy" not in players or len(set(all_ids)) < len(all_ids):
        raise ValueError(
            "trained() must have the loss 'energy' and no parameter twice, got the losses"
            f" {list(players)} and {len(all_ids)} parameters, of which {len(set(all_ids))} differ"
        )
    return players
