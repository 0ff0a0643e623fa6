"""The base class of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pyroebm.core.arrays import as_tensor, tensor_of_numbers
from pyroebm.core.energy import Energy
from pyroebm.flows.flow import Flow

__all__ = ["HasLosses", "Objective", "module_dtype"]


def module_dtype(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of a module.

    They are the attributes of an energy or a flow, else those of the first floating-point parameter
    or buffer.
    """
    if isinstance(module, Energy | Flow):
        return module.dtype, module.device
    tensors = (*module.parameters(), *module.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return first.dtype, first.device


class Objective(nn.Module):
    """Turn a module, such as an energy or a flow, and a batch of data into a loss.

    What an objective learns besides the module are its parameters; its chains are buffers. Numbers,
    strings, tuples and kernels among its attributes are settings: they do not change during
    training, and a checkpoint can only be restored with the same settings.

    A subclass defines ``forward``, which returns a scalar loss and detached metrics. An objective
    with several losses implements :class:`HasLosses`; one that fits flows is a
    :class:`~pyroebm.objectives.FlowObjective`.

    Attributes:
        lr: default learning rate of :func:`pyroebm.training.fit`.
        schedule: default schedule of the learning rate: None, or ``"cosine"``, which falls to 0
            along a half cosine.
        takes_labels: whether a batch is a tuple, such as events and labels; otherwise it is one
            tensor of events, and tuples are an error.
        measures_fit: whether losses of different steps can be compared, so that a lower one is a
            better fit. If not, early stopping needs another ``validation_objective``.
        constants: names of the buffers that do not change during training, such as given draws; a
            checkpoint can only be restored with the same ones.

    Example:
        >>> from pyroebm.objectives import ReverseKL
        >>> issubclass(ReverseKL, Objective), Objective.lr, ReverseKL.schedule
        (True, 0.001, 'cosine')
    """

    lr: float = 1e-3
    schedule: str | None = None
    takes_labels: ClassVar[bool] = False
    constants: ClassVar[tuple[str, ...]] = ()
    measures_fit: bool = True

    def __call__(self, module: Any, batch: Any = None, /, **options: Any) -> Any:
        """Call :meth:`forward`; NumPy arrays of a batch are converted to tensors."""
        arrays = isinstance(batch, np.ndarray) or (
            isinstance(batch, tuple) and any(isinstance(part, np.ndarray) for part in batch)
        )
        if arrays:
            batch = _tensors(batch, *module_dtype(module))
        return super().__call__(module, batch, **options)

    def begin_step(self, step: int, num_steps: int) -> None:
        """Prepare step ``step`` of ``num_steps``, counted from 0.

        ``fit`` calls it before each step. By default it does nothing.
        """

    def end_training(self) -> None:
        """Undo what :meth:`begin_step` changed.

        ``fit`` calls it when a training ends or is stopped. By default it does nothing.
        """

    def forward(
        self, module: Any, batch: Any, /, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics.

        Args:
            module: the trained module: an energy, a flow or a classifier.
            batch: a batch of data; None if the objective takes no data.
            generator: source of all draws; None is torch's default generator.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(module, batch, *, generator) -> (loss,"
            " metrics)"
        )


def _tensors(batch: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Convert the arrays of a batch; those after the events keep integers, which are labels."""
    if not isinstance(batch, tuple):
        return as_tensor(batch, dtype, device, "batch")
    first, *others = batch
    tensors = [
        tensor_of_numbers(part, "batch") if isinstance(part, np.ndarray) else part
        for part in others
    ]
    return (
        as_tensor(first, dtype, device, "batch"),
        *(part.to(device, dtype if part.is_floating_point() else part.dtype) for part in tensors),
    )


@runtime_checkable
class HasLosses(Protocol):
    """An objective with several named losses, each of which trains its own parameters.

    ``losses`` returns the losses by name and the metrics. ``trained`` returns the parameters that
    each loss trains, by the same names; no parameter occurs twice. The loss of the energy is named
    ``"energy"``. :func:`pyroebm.training.fit` has an optimizer for each loss. All gradients are
    computed before any optimizer takes a step.

    Example:
        >>> class Duel(Objective):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.generator = nn.Linear(1, 2)
        ...
        ...     def losses(self, energy, batch, *, generator=None):
        ...         made = self.generator(torch.randn(len(batch), 1, generator=generator))
        ...         data, model = energy(batch).mean(), energy(made).mean()
        ...         return {"energy": data - model, "generator": model}, {
        ...             "energy_data": data.detach()
        ...         }
        ...
        ...     def trained(self, energy):
        ...         return {
        ...             "energy": list(energy.parameters()),
        ...             "generator": list(self.generator.parameters()),
        ...         }
        >>> isinstance(Duel(), HasLosses)
        True
    """

    def losses(
        self, energy: Energy, batch: Any, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """Return the losses by name, and the metrics."""
        ...

    def trained(self, energy: Energy) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return the parameters that each loss trains, by name."""
        ...
