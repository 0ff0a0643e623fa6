r"""Save energies, machines, classifiers and flows, and load them, without pickle.

A file holds tensors and a description in JSON: the class and the constructor's arguments of each
module, with the parts of a module before it. :func:`load` calls the constructors and then assigns
the tensors. It calls only public classes of this library, layers of :mod:`torch.nn`, distributions
and constraints of torch and Pyro, and the classes that the caller names.

**Recording of arguments.** A subclass of :class:`Saveable` needs no code for it:
``__init_subclass__`` wraps ``__init__``, and the wrapper of the class that is constructed records
the arguments. (A metaclass would conflict with those of users' classes, such as :class:`abc.ABC`;
``__new__`` would have to keep every argument alive, since the module does not exist yet.) After
``__init__``, a tensor argument is recorded by the name of the parameter or buffer that it is: one
of the same memory, or an equal one that has the argument's name. Other tensors are copied, since a
parameter that only starts with the values of an argument is not that argument. A generator is not
recorded, since its draws are in the tensors. An argument that no file can hold, such as a function,
is recorded by its name for the error message. So a record can be copied and pickled whenever the
module can.

**Modules that cannot be rebuilt** raise an error in :func:`save`, which rebuilds the module and
compares the two. Numbers, strings and tensors that were assigned to attributes after construction
are saved too; other attributes that differ raise an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as pyro_distributions
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property
from torch.nn.utils import parametrizations, parametrize

from pyroebm.core._torch_private import (
    BoundedAllocation,
    SpectralNorm,
    is_functorch_wrapped_tensor,
    outside_transforms,
    storage_of,
)
from pyroebm.core.files import FileError, checksum, read_tensors, write_tensors
from pyroebm.core.rng import drawing_from, seeded_generator
from pyroebm.core.supports import spin

__all__ = ["Saveable", "describe_call", "load", "save"]

#: Format of the description. A file of another format raises an error.
FORMAT = 1
#: The end of each error message of :func:`save`.
REMEDY = (
    "Give a subclass of Energy with numbers, strings, tensors and modules as arguments, which"
    " load(path, classes={...}) constructs; or save(..., tensors_only=True), which load(path,"
    " into=module) reads"
)
#: Attributes that each module has: those of torch, and the record.
OWN = (vars(nn.Module()).keys() | {"_construction"}) - {"training"}

#: Classes of torch and Pyro that a description may name, by the module that has them.
NAMESPACES: dict[str, tuple[Any, tuple[type, ...]]] = {
    "torch.nn": (nn, (nn.Module,)),
    "torch.distributions": (torch.distributions, (Distribution, Transform)),
    "torch.distributions.constraints": (constraints, (Constraint,)),
    "pyro.distributions": (pyro_distributions, (Distribution, Transform)),
}
#: Arguments that are stored in attributes of another name.
ATTRIBUTES = {"base_distribution": "base_dist", "scale_tril": "_unbroadcasted_scale_tril"}
#: Classes of this library, by subpackage and name.
_CLASSES: dict[str, type[Saveable]] = {}


@dataclasses.dataclass(frozen=True)
class _Construction:
    """The arguments with which a module was constructed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    default_dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class _Own:
    """A tensor argument that the module holds as a parameter or buffer."""

    name: str
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """An argument that no file can hold."""

    name: str


class Saveable(nn.Module):
    """A module that :func:`save` and :func:`load` can construct again.

    It records the arguments of its constructor. Energies, flows, their layers and bases are such
    modules, and so are users' subclasses of them.

    Example:
        >>> class Quartic(Saveable):
        ...     def __init__(self, height, *, shift=0.0):
        ...         super().__init__()
        >>> Quartic(2.0)._construction
        _Construction(args=(2.0,), kwargs={}, default_dtype=torch.float32)
    """

    _construction: _Construction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the first __init__ in the MRO may be that of a mixin without the wrapper
        if not hasattr(cls.__init__, "_recorded"):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]
        package, _, rest = cls.__module__.partition(".")
        if package == "pyroebm" and not cls.__name__.startswith("_"):
            _CLASSES[f"{rest.partition('.')[0]}.{cls.__name__}"] = cls


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that it records its arguments.

    Only the constructor of the class that is constructed records, not those of its base classes.
    """
    parameters = inspect.signature(init).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional][1:]
    unnamed = itertools.repeat("")

    @functools.wraps(init)
    def recorded(self: Saveable, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is recorded:
            vars(self)["_construction"] = _Construction(
                tuple(
                    _kept(value, self, name)
                    for value, name in zip(args, itertools.chain(names, unnamed), strict=False)
                ),
                {name: _kept(value, self, name) for name, value in kwargs.items()},
                torch.get_default_dtype(),
            )

    recorded._recorded = True  # type: ignore[attr-defined]
    return recorded


def _kept(value: Any, module: nn.Module, name: str) -> Any:
    """Return the recorded form of an argument of a name, or of an item of it."""
    if value is None or isinstance(value, Number | str | torch.dtype | np.ndarray | np.generic):
        return value
    if isinstance(value, nn.Module | Constraint | Distribution | Transform):
        return value
    if isinstance(value, Tensor):
        held = (
            held
            for held, own in _tensors(module)
            if own is value or _share(own, value) or (held == name and _equal(own, value))
        )
        first = next(held, None)
        return value.detach().clone() if first is None else _Own(first, value.dtype)
    if type(value) in (range, torch.Size):
        return value
    if type(value) in (list, tuple):
        kept = [_kept(v, module, name) for v in value]
        return kept if isinstance(value, list) else tuple(kept)
    if type(value) is dict:
        return {k: _kept(v, module, name) for k, v in value.items()}
    if isinstance(value, torch.Generator):
        return None
    return _Opaque(_name_of(value))


def _name_of(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _share(own: Tensor, value: Tensor) -> bool:
    """Whether two tensors are the same entries in memory."""
    return (
        _comparable(own, value)
        and own.dtype == value.dtype
        and storage_of(own) == storage_of(value)
        and own.storage_offset() == value.storage_offset()
        and own.stride() == value.stride()
    )


def _equal(own: Tensor, value: Tensor) -> bool:
    """Whether a parameter or buffer is a copy of an argument, of any dtype and device."""
    if not _comparable(own, value) or own.is_complex() != value.is_complex():
        return False
    with outside_transforms(), torch.no_grad():
        return torch.equal(own, value.to(own))


def _comparable(own: Tensor, value: Tensor) -> bool:
    return (
        {type(own), type(value)} <= {Tensor, nn.Parameter}
        and own.shape == value.shape
        and own.layout == value.layout == torch.strided
        and not any(t.is_meta or is_functorch_wrapped_tensor(t) for t in (own, value))
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def describe_call(module: nn.Module) -> str:
    """Describe a module by its class and the settings with which it was constructed.

    The description does not change when the module is trained. Modules among the arguments are
    described by their classes; initial values of tensors that the module holds are left out.

    Example:
        >>> from pyroebm.targets import DoubleWell
        >>> describe_call(0.5 * DoubleWell())
        'Tempered(energy=DoubleWell, beta=0.5)'
    """
    name = type(module).__name__
    call: _Construction | None = vars(module).get("_construction")
    if call is None:
        of_torch = type(module).__module__.startswith("torch.")
        return f"{name}({module.extra_repr()})" if of_torch else name
    bound = inspect.signature(type(module)).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    settings = [
        f"{key}={_described_argument(value)}"
        for key, value in bound.arguments.items()
        if not (value is None or isinstance(value, _Own))
    ]
    return f"{name}({', '.join(settings)})"


def _described_argument(value: Any) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return f"tensor {checksum([value])}"
    if isinstance(value, _Own | _Opaque):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described_argument, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_described_argument(v)}' for k, v in value.items())}}}"
    if isinstance(value, Number | str | range | torch.dtype | Constraint | None):
        return str(value)
    if isinstance(value, Distribution) and _torch_name(type(value)) is not None:
        arguments = _attributes_of(value, type(value), type(value).__name__)
        described = ", ".join(f"{k}={_described_argument(v)}" for k, v in arguments.items())
        return f"{type(value).__name__}({described})"
    return _name_of(value)


def save(module: nn.Module, path: str | Path, *, tensors_only: bool = False) -> None:
    """Save an energy, machine, classifier, flow or layer as one safetensors file.

    The file has the arguments of the constructors, every parameter and buffer with its dtype, which
    parameters are trained, and the mode (train or eval) of each module. A parameter that two
    modules share is stored once. The file has a checksum, and is written atomically: to a temporary
    file, then renamed.

    Args:
        module: the energy, machine, classifier, flow or layer.
        path: the file, usually ``*.safetensors``; it is overwritten.
        tensors_only: leave out how the module is constructed, for modules that JSON cannot
            describe: ``load(path, into=module)`` reads such a file.

    Raises:
        ValueError: if the module cannot be constructed again from JSON: a function or an
            enumeration among the arguments, a class that is neither a :class:`Saveable` nor one of
            torch's layers, a part that was replaced after construction, an attribute that was
            changed after construction and that JSON cannot describe, a module in a plain list.

    Example:
        >>> import tempfile
        >>> from pyroebm.targets import DoubleWell
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(0.5 * DoubleWell(), f"{folder}/well.safetensors")
        ...     load(f"{folder}/well.safetensors")
        Tempered(
          beta=0.5
          (energy): DoubleWell()
        )
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be an energy, a flow or a part of one, got {module!r}")
    writer = _Writer(module)
    if tensors_only:
        nodes = [{"class": type(module).__name__, **writer.state(module, "")}]
    else:
        writer.add(module, type(module).__name__)
        nodes = writer.nodes
        try:
            described = json.loads(json.dumps(nodes))
            rebuilt = _Reader(described, writer.tensors(), writer.classes).build()
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} cannot be constructed again from its arguments:"
                f" {error}. {REMEDY}"
            ) from error
        nodes[-1]["attributes"] = writer.changes(module, rebuilt)
    metadata = {"format": FORMAT, "version": _version(), "modules": nodes}
    write_tensors(path, writer.tensors(), metadata)


def load(
    path: str | Path,
    *,
    classes: Mapping[str, type[nn.Module]] | None = None,
    into: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a module that :func:`save` wrote.

    Nothing is unpickled, and no code is executed except the constructors of known classes. The
    result has the dtypes, ``requires_grad`` and training mode of the saved module.

    Args:
        path: the file.
        classes: the user's classes, by the names that they had when the module was saved.
        into: a module of the same parameters and buffers, which are overwritten in place. No
            module is constructed then, and its other attributes are unchanged.
        device: device of the result; ignored if ``into`` is given.

    Returns:
        the module; ``into`` if it is given.

    Raises:
        FileError: if the file is missing, damaged, of another format or not one of :func:`save`; if
            it names a class that is not known; if a constructor raises; if ``into`` has parameters
            or buffers of other names, shapes or dtypes.
        ValueError: if ``classes`` is not a dict.

    Example:
        >>> import tempfile
        >>> from pyroebm import Energy
        >>> class Quartic(Energy):
        ...     def __init__(self, height: float) -> None:
        ...         super().__init__()
        ...         self.height = height
        ...
        ...     def forward(self, x):
        ...         return self.height * x**4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Quartic(2.0), f"{folder}/quartic.safetensors")
        ...     load(f"{folder}/quartic.safetensors", classes={"Quartic": Quartic}).height
        2.0
    """
    if classes is not None and not isinstance(classes, Mapping):
        raise ValueError(
            f"classes must be a dict of classes by their names, got {type(classes).__name__}: write"
            ' classes={"MyEnergy": MyEnergy}'
        )
    tensors, description = read_tensors(
        path, "cpu" if into is not None else str(torch.device(device))
    )
    if description.get("format") != FORMAT or "modules" not in description:
        raise FileError(
            path,
            f"the file must be written by save in format {FORMAT}, got format"
            f" {description.get('format')} of pyroebm {description.get('version')}, and this is"
            f" pyroebm {_version()}",
        )
    try:
        if into is not None:
            return _filled(into, description["modules"][-1], tensors)
        if "arguments" not in description["modules"][-1]:
            raise ValueError(
                "the file has tensors only (tensors_only=True): call load(path, into=module)"
            )
        return _Reader(description["modules"], tensors, classes or {}).build()
    except Exception as error:  # raised by a constructor, or by a malformed description
        raise FileError(path, f"the module cannot be loaded: {error}") from error


def _version() -> str:
    return str(sys.modules["pyroebm"].__version__)


class _Writer:
    """Builds the description of modules, with the parts of a module before it."""

    def __init__(self, root: nn.Module) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.numbers: dict[int, int] = {}
        #: Classes of the user, by name.
        self.classes: dict[str, type[nn.Module]] = {}
        #: Names in the file by the identity of a tensor, and the tensors by name.
        self.keys: dict[int, str] = {}
        self.held: dict[str, Tensor] = {}
        first_names: dict[int, str] = {}
        for name, tensor in _tensors(root):
            self.key(tensor, name)
        for name, parameter in root.named_parameters():
            other = first_names.setdefault(storage_of(parameter), name)
            if other != name and parameter.numel():
                raise ValueError(
                    f"the parameters {other} and {name} must be one parameter or not share memory,"
                    " got two that share memory"
                )

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.held.items()}

    def key(self, tensor: Tensor, name: str) -> str:
        """Return the name of a tensor in the file, which holds each tensor once."""
        if id(tensor) not in self.keys:
            while name in self.held:
                name += "'"
            self.keys[id(tensor)] = name
            self.held[name] = tensor
        return self.keys[id(tensor)]

    def state(self, module: nn.Module, prefix: str) -> dict[str, Any]:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = module.named_buffers(remove_duplicate=False)
        return {
            "parameters": {name: self.key(p, prefix + name) for name, p in parameters.items()},
            "buffers": {name: self.key(b, prefix + name) for name, b in buffers},
            "frozen": [name for name, p in parameters.items() if not p.requires_grad],
        }

    def add(self, module: nn.Module, where: str) -> int:
        """Describe a module, once, and return its number."""
        if id(module) in self.numbers:
            return self.numbers[id(module)]
        node: dict[str, Any] = {"arguments": {}}
        given: Collection[str] = ()
        if isinstance(module, Saveable):
            call: _Construction | None = vars(module).get("_construction")
            if call is None:
                raise ValueError(
                    f"{where} was not constructed by the __init__ that its class was defined with."
                    f" {REMEDY}"
                )
            bound = inspect.signature(type(module)).bind(*call.args, **call.kwargs)
            given = set(bound.arguments)
            bound.apply_defaults()
            arguments: Mapping[str, Any] = bound.arguments
            node["class"] = _library_name(type(module)) or self.user_class(type(module))
            node["default_dtype"] = _name_of_dtype(call.default_dtype)
        else:
            plain = parametrize.type_before_parametrizations(module)
            node["class"] = _torch_name(plain)
            if node["class"] is None:
                raise ValueError(
                    f"{where} is a {type(module).__name__}, which is neither an energy, a flow or"
                    f" a part of one nor a layer of torch.nn. {REMEDY}"
                )
            given = arguments = _attributes_of(module, plain, where)
            if parametrize.is_parametrized(module):
                node["spectral_norm"] = _spectral_norms(module, where)
        # the parts of a module come before it
        for name, value in arguments.items():
            try:
                node["arguments"][name] = self.described(value, f"{where}.{name}", module)
            except ValueError:
                # a default that cannot be described, such as a function, is left out
                if name in given:
                    raise
        self.numbers[id(module)] = len(self.nodes)
        node |= self.state(module, f"{len(self.nodes)}.")
        self.nodes.append(node)
        return len(self.nodes) - 1

    def user_class(self, kind: type[nn.Module]) -> str:
        """Return the name of a user's class, which :func:`load` looks up in ``classes``."""
        if kind.__module__.startswith("pyroebm."):
            raise ValueError(f"{kind.__name__} is internal to pyroebm and cannot be saved")
        if self.classes.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(
                f"classes must have different names, got two called {kind.__name__}: rename one"
            )
        return kind.__name__

    def described(self, value: Any, where: str, module: nn.Module | None = None) -> Any:
        """Describe a value in JSON; its tensors are added to the file.

        Raises:
            ValueError: if JSON cannot describe it.
        """
        if isinstance(value, np.generic):
            value = value.item()
        # a subclass, such as an enumeration of strings, would be loaded as its base class
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, _Own) and module is not None:
            own = dict(_tensors(module))[value.name]
            return {"tensor": self.key(own, where), "dtype": _name_of_dtype(value.dtype)}
        if module is None and isinstance(value, nn.Module | nn.Parameter):
            kind = "Module" if isinstance(value, nn.Module) else "Parameter"
            raise ValueError(
                f"{where} is a {type(value).__name__} in an attribute that is no registered part,"
                f" so load would not restore it: hold it in an nn.{kind}List or nn.{kind}Dict only"
            )
        if isinstance(value, Tensor):
            return {"tensor": self.key(value, where), "dtype": _name_of_dtype(value.dtype)}
        if isinstance(value, np.ndarray):
            return {"array": self.key(torch.from_numpy(value), where)}
        if isinstance(value, nn.Module):
            return {"module": self.add(value, where)}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if type(value) in (list, tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.described(v, f"{where}[{i}]", module) for i, v in enumerate(value)]}
        if type(value) is dict and all(type(k) is str for k in value):
            items = value.items()
            return {"dict": {k: self.described(v, f"{where}.{k}", module) for k, v in items}}
        if isinstance(value, torch.dtype):
            return {"dtype": _name_of_dtype(value)}
        if isinstance(value, type(spin)):
            return {"constant": "spin"}
        if isinstance(value, Constraint) and (name := _constant_name(value)):
            return {"constant": name}
        if (known := _torch_name(type(value))) is not None:
            arguments = _attributes_of(value, type(value), where)
            return {
                "class": known,
                "arguments": {
                    k: self.described(v, f"{where}.{k}", module) for k, v in arguments.items()
                },
            }
        name = value.name if isinstance(value, _Opaque) else _name_of(value)
        raise ValueError(f"{where} is {name}, which a file cannot hold. {REMEDY}")

    def changes(self, module: nn.Module, rebuilt: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the attributes of each part that its constructor does not set.

        Raises:
            ValueError: if a part is of another class, if such an attribute cannot be described, or
                if it holds a module or parameter that is not registered.
        """
        parts = dict(module.named_modules(remove_duplicate=False))
        others = dict(rebuilt.named_modules(remove_duplicate=False))
        for name in parts.keys() | others.keys():
            kinds = [type(m.get(name)).__qualname__ for m in (parts, others)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"the part {name!r} of {type(module).__name__} is a {kinds[0]}, and its"
                    f" constructor gives a {kinds[1]}: a part was replaced. {REMEDY}"
                )
        same = _Comparison(module, rebuilt).same
        found: dict[str, dict[str, Any]] = {}
        for name, part in parts.items():
            made = vars(others[name])
            for attribute, value in vars(part).items():
                if attribute in OWN or (attribute in made and same(value, made[attribute])):
                    continue
                if attribute not in made and attribute.startswith("_"):
                    continue  # private attributes that are set later are caches
                where = f"{name}.{attribute}".lstrip(".")
                found.setdefault(name, {})[attribute] = self.described(value, where)
        return found


class _Comparison:
    """Compares the attributes of a module with those of the module that was rebuilt."""

    def __init__(self, module: nn.Module, rebuilt: nn.Module) -> None:
        #: Counterparts of the registered modules, parameters and buffers.
        self.pairs: dict[int, Any] = {}
        for find in (functools.partial(nn.Module.named_modules, remove_duplicate=False), _tensors):
            others: dict[str, Any] = dict(find(rebuilt))
            self.pairs |= {id(own): others.get(name) for name, own in find(module)}
        #: Results of pairs of objects. A pair under comparison counts as equal: an object may refer
        #: to itself.
        self.results: dict[tuple[int, int], bool] = {}

    def same(self, a: Any, b: Any) -> bool:
        """Whether two values are equal; functions are equal if their code and closures are."""
        if type(a) is not type(b):
            return False
        if isinstance(a, nn.Module | nn.Parameter):
            return self.pairs.get(id(a)) is b
        if a is b or isinstance(a, torch.Generator):
            return True
        if isinstance(a, Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and _equal_or_nan(a.cpu(), b.cpu())
        if isinstance(a, np.ndarray):
            has_nan = a.dtype.kind in "fc"
            return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=has_nan)
        if isinstance(a, Number):
            return bool(a == b or (a != a and b != b))
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(self.same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.same(a[k], b[k]) for k in a)
        pair = id(a), id(b)
        if pair not in self.results:
            self.results[pair] = True
            self.results[pair] = self.same_objects(a, b)
        return self.results[pair]

    def same_objects(self, a: Any, b: Any) -> bool:
        if isinstance(a, Constraint | Distribution):
            # a distribution computes some attributes lazily
            shared = vars(a).keys() & vars(b).keys()
            return all(self.same(vars(a)[k], vars(b)[k]) for k in shared)
        if isinstance(a, types.FunctionType):
            return a.__code__ == b.__code__ and self.same(_bound_values(a), _bound_values(b))
        if isinstance(a, types.MethodType):
            return self.same(a.__func__, b.__func__) and self.same(a.__self__, b.__self__)
        if isinstance(a, functools.partial):
            return all(
                self.same(getattr(a, k), getattr(b, k)) for k in ("func", "args", "keywords")
            )
        if dataclasses.is_dataclass(a):
            fields = [field.name for field in dataclasses.fields(a)]
            return all(self.same(getattr(a, name), getattr(b, name)) for name in fields)
        kind: Any = type(a)
        if kind.__eq__ is object.__eq__ and hasattr(a, "__dict__"):
            return self.same(vars(a), vars(b))
        return bool(a == b)


def _equal_or_nan(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _bound_values(function: types.FunctionType) -> tuple[Any, ...]:
    """Return the values that a function holds: its defaults, closure and attributes."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__defaults__, function.__kwdefaults__, cells, vars(function)


def _library_name(kind: type[Saveable]) -> str | None:
    """Return the name of a class of this library in a file; None for a user's class."""
    return next((f"pyroebm.{name}" for name, known in _CLASSES.items() if known is kind), None)


def _torch_name(kind: type) -> str | None:
    """Return the name of a class of torch or Pyro in a file; None for other classes."""
    for place, (namespace, bases) in NAMESPACES.items():
        for name, known in vars(namespace).items():
            if known is kind and issubclass(kind, bases) and not name.startswith("_"):
                return f"{place}.{name}"
    return None


def _constant_name(value: Constraint) -> str | None:
    """Return the name of a constraint of torch without arguments, such as ``real``."""
    return next(
        (
            name
            for name, known in vars(constraints).items()
            if isinstance(known, Constraint) and type(known) is type(value) and not vars(known)
        ),
        None,
    )


def _name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attributes_of(value: Any, kind: type, where: str) -> dict[str, Any]:
    """Return the arguments of a constructor of torch or Pyro, read from its attributes."""
    if kind is nn.Sequential:
        return {"args": tuple(value)}
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_variadic or name in ("device", "dtype", "validate_args"):
            continue
        names = [n for n in (name, f"_{name}", ATTRIBUTES.get(name)) if n is not None]
        held = next((getattr(value, n) for n in names if _has(value, n)), parameter.empty)
        if held is not parameter.empty:
            # the argument of a layer is a flag, its attribute the bias itself
            is_flag = name == "bias" and isinstance(value, nn.Module)
            found[name] = held is not None if is_flag else held
        elif parameter.default is parameter.empty:
            raise ValueError(f"{where} is a {kind.__qualname__} without {name}. {REMEDY}")
    # one of the alternative arguments was given; the others were computed lazily
    if "scale_tril" in found:
        computed = {"covariance_matrix", "precision_matrix"}
    else:
        computed = {k for k in ("probs", "logits") if found.get(k) is not vars(value).get("_param")}
    return {name: held for name, held in found.items() if name not in computed}


def _has(value: Any, name: str) -> bool:
    """Whether an object has an attribute that is not computed lazily."""
    held = inspect.getattr_static(value, name, None)
    return not isinstance(held, lazy_property) and hasattr(value, name)


def _spectral_norms(module: nn.Module, where: str) -> list[str]:
    """Return the names of the weights of a layer that have spectral normalization."""
    lists: Any = module.parametrizations
    for name, parametrization in lists.items():
        if [type(p) for p in parametrization] != [SpectralNorm]:
            raise ValueError(f"{where}.{name} has an unknown parametrization. {REMEDY}")
    return list(lists)


class _Reader:
    """Rebuilds modules from a description and the tensors of a file."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        tensors: Mapping[str, Tensor],
        classes: Mapping[str, type[nn.Module]],
    ) -> None:
        self.nodes = nodes
        self.tensors = tensors
        self.classes = classes
        self.made: list[nn.Module] = []
        self.parameters: dict[str, nn.Parameter] = {}

    def build(self) -> Any:
        """Return the last module, after constructing those before it."""
        entries = sum(tensor.numel() for tensor in self.tensors.values())
        bound = BoundedAllocation(2**27 + 16 * entries, 2 * 10**4 + 100 * len(self.tensors))
        # the file's tensors replace what the constructors draw; their warnings were shown before
        with drawing_from(seeded_generator(0)), warnings.catch_warnings(), bound:
            warnings.simplefilter("ignore")
            for node in self.nodes:
                self.made.append(self.module(node))
        root, last = self.made[-1], self.nodes[-1]
        # a constructor may have initialized or converted a module among its arguments
        for key, parameter in self.parameters.items():
            parameter.data = self.tensors[key]
        for name, key in last["buffers"].items():
            _assign(root, name, self.tensors[key])
        for name, attributes in last.get("attributes", {}).items():
            if not OWN.isdisjoint(attributes):
                raise ValueError(f"the description must not set {sorted(OWN & attributes.keys())}")
            vars(root.get_submodule(name)).update(
                {key: self.value(value) for key, value in attributes.items()}
            )
        return root

    def module(self, node: dict[str, Any]) -> nn.Module:
        kind = self.find(node["class"], nn.Module)
        # the tensors of a layer of torch are replaced, so no memory is allocated for them
        place = "cpu" if "default_dtype" in node else "meta"
        with torch.device(place), _default_dtype(node.get("default_dtype", "float32")):
            module: nn.Module = self.call(kind, node["arguments"])
            for name in node.get("spectral_norm", ()):
                parametrizations.spectral_norm(module, name)
        for name, key in node["parameters"].items():
            if key not in self.parameters:
                self.parameters[key] = nn.Parameter(self.tensors[key].clone(), requires_grad=False)
            self.parameters[key].requires_grad_(name not in node["frozen"])
            _assign(module, name, self.parameters[key])
        for name, key in node["buffers"].items():
            _assign(module, name, self.tensors[key].clone())
        wrong = dict(_tensors(module)).keys() ^ (node["parameters"].keys() | node["buffers"].keys())
        if wrong:
            raise ValueError(
                f"{node['class']} and the file must have the same parameters and buffers, got"
                f" {sorted(wrong)} of one of them"
            )
        return module

    def call(self, kind: type, arguments: dict[str, Any]) -> Any:
        signature = inspect.signature(kind)
        unknown = sorted(arguments.keys() - signature.parameters.keys())
        if unknown:
            raise ValueError(f"{kind.__name__} takes no arguments {unknown}, which the file has")
        values = {name: self.value(argument) for name, argument in arguments.items()}
        bound = inspect.BoundArguments(signature, values)
        return kind(*bound.args, **bound.kwargs)

    def value(self, described: Any) -> Any:
        """Rebuild a value that :meth:`_Writer.described` described."""
        if not isinstance(described, dict):
            return described
        if "class" in described:
            return self.call(self.find(described["class"], object), described["arguments"])
        if "tensor" in described:
            return self.tensors[described["tensor"]].to(_dtype(described["dtype"]), copy=True)
        ((kind, content),) = described.items()
        if kind == "module":
            return self.made[content]
        if kind == "array":
            return self.tensors[content].clone().numpy(force=True)
        if kind in ("list", "tuple"):
            return {"list": list, "tuple": tuple}[kind](map(self.value, content))
        if kind == "range":
            return range(*content)
        if kind == "size":
            return torch.Size(content)
        if kind == "dict":
            return {k: self.value(v) for k, v in content.items()}
        if kind == "dtype":
            return _dtype(content)
        if kind == "constant":
            constant = spin if content == "spin" else getattr(constraints, content)
            if isinstance(constant, Constraint):
                return constant
        raise ValueError(f"the description has an unknown entry {kind!r}")

    def find(self, name: str, base: type) -> type:
        """Return the class of a name.

        Raises:
            ValueError: if the class is not known or may not be constructed here.
        """
        place, _, last = name.rpartition(".")
        known: Any = None
        if place in NAMESPACES:
            namespace, bases = NAMESPACES[place]
            known = vars(namespace).get(last)
            known = known if isinstance(known, type) and issubclass(known, bases) else None
        elif place.startswith("pyroebm."):
            subpackage = place.removeprefix("pyroebm.")
            getattr(sys.modules["pyroebm"], subpackage, None)  # which imports it
            known = _CLASSES.get(f"{subpackage}.{last}")
        else:
            known = self.classes.get(name)
        if isinstance(known, type) and issubclass(known, base):
            return known
        candidates = {n.rpartition(".")[2]: n for n in (*_CLASSES, *self.classes)}
        near = difflib.get_close_matches(last, candidates, 5)
        raise ValueError(
            f"the file names the class {name!r}, which is neither in pyroebm nor in classes, got"
            f" classes of {sorted(self.classes)}; near ones: {[candidates[n] for n in near]}. Call"
            f' load(path, classes={{"{last}": {last}}})'
        )


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    part = module.get_submodule(owner)
    if not hasattr(part, last):
        raise ValueError(f"the constructor of {type(module).__name__} creates no {name}")
    made = getattr(part, last)
    if isinstance(made, Tensor) and made.shape != tensor.shape:
        raise ValueError(
            f"the file has {name} of shape {tuple(tensor.shape)}, and the constructor of"
            f" {type(module).__name__} creates {tuple(made.shape)}"
        )
    setattr(part, last, tensor)


def _filled(module: nn.Module, node: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Overwrite the parameters and buffers of a module with those of the file."""
    keys: dict[str, str] = node["parameters"] | node["buffers"]
    own = dict(_tensors(module))
    ours, theirs = (
        {name: f"{name} {tuple(t.shape)} {_name_of_dtype(t.dtype)}" for name, t in found.items()}
        for found in (own, {name: tensors[key] for name, key in keys.items()})
    )
    if ours != theirs:
        wrong = [
            sorted(set(a.values()) - set(b.values())) for a, b in ((ours, theirs), (theirs, ours))
        ]
        raise ValueError(
            f"into and the file must have the same parameters and buffers, got {wrong[0]} only in"
            f" into and {wrong[1]} only in the file"
        )
    shared: dict[int, str] = {}
    for name, tensor in own.items():
        first = shared.setdefault(id(tensor), name)
        if keys[first] != keys[name]:
            raise ValueError(
                f"into must share the tensors that the file shares, got {first} and {name}, which"
                " only into shares"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[keys[name]])
    return module


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the description has an unknown dtype {name!r}")
    return dtype
