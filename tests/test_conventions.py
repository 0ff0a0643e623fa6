"""The conventions of the interface: the table in docs/architecture.md, checked on every
`__all__`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyroebm

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = "torch.Generator | None"

#: Argument: what the package calls it.
BANNED = {
    "hidden_dims": "hidden_sizes",
    "hidden_units": "hidden_sizes",
    "act": "activation",
    "nonlinearity": "activation",
    "learning_rate": "lr",
    "random_state": "generator",
    "rng": "generator",
    "rng_key": "generator",
    "centre": "center",
    "colour": "color",
}
#: Integers that are counts, beside those with a plural name.
COUNTS = {"n", "m", "num", "count"}
#: Plural names of integers that are no counts, or those of another library.
NOT_COUNTS = {
    "warmup_steps",  # Pyro's
    "event_dims",
    "in_features",  # torch's
    "out_features",
    "bins",  # matplotlib's
    "columns",
}
#: What drives a run takes a seed and records it; all else takes a generator.
DRIVERS = {
    "pyroebm.cli*",
    "pyroebm.mcmc.sampler.MCMC",
    "pyroebm.training.loop.fit",
    "pyroebm.core.rng.fresh_seed",
    "pyroebm.core.rng.seeded_generator",
}
#: What is trained or evaluated, if it is an argument, is the first one ...
FIRST = ("flow", "machine", "model", "energy")
#: ... or it follows what is adapted or weighed with it.
BEFORE = ("kernel", "proposal")
#: Options that may be given by position; `generator` may follow the arguments of any function.
POSITIONAL_OPTIONS = 3
#: Never by position, in functions and constructors that users call.
KEYWORD_ONLY = {"dtype", "progress", "seed"}

#: Qualified names (with wildcards), the rules that they break, and why.
EXEMPT: dict[str, tuple[str, str]] = {
    "pyroebm.infer.*": ("*", "the names and arguments are Pyro's"),
    "pyroebm.data.readers.load_binary": ("randomness", "its seed is part of the data's record"),
    "pyroebm.targets.normals.GaussianMixture.gmm40": ("randomness", "the seed of the paper"),
    "pyroebm.mcmc.sampler.MCMC.load_state_dict": ("order", "torch's name and order"),
    "pyroebm.diagnostics.convergence.Diagnosis": ("counts", "a result"),
    "pyroebm.flows.report.FlowReport": ("counts", "a result"),
    "pyroebm.training.*": ("*", "being rewritten"),
    "pyroebm.objectives.variational.*": ("*", "being rewritten"),
    "pyroebm.kernels.adaptation.windows.*": ("counts", "being rewritten"),
    "pyroebm.kernels.*Adaptation.step": ("counts", "being rewritten"),
    "pyroebm.core.compilation.choose_compiled": ("counts", "being rewritten"),
}


@dataclasses.dataclass(frozen=True)
class Breach:
    """One rule broken at one place."""

    place: str
    rule: str
    said: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.said}"


def annotation_of(parameter: inspect.Parameter) -> str:
    said = parameter.annotation
    said = getattr(said, "__forward_arg__", said)
    return said if isinstance(said, str) else getattr(said, "__name__", str(said))


def is_record(thing: object) -> bool:
    """A named tuple: its fields are read, and nobody but the library makes one."""
    return isinstance(thing, type) and issubclass(thing, tuple) and hasattr(thing, "_fields")


def functions_of(name: str, thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function, or the constructor and the public methods that a class itself defines."""
    if not inspect.isclass(thing):
        yield name, thing
        return
    if not is_record(thing):
        yield name, thing
    for key, member in vars(thing).items():
        member = getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(member):
            yield f"{name}.{key}", member


def exported(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """What the package defines of the names in a module's `__all__`."""
    package = module.__name__.partition(".")[0]
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        home = getattr(thing, "__module__", "") or ""
        if callable(thing) and home.partition(".")[0] == package:
            yield f"{home}.{name}", thing


def signature_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a protocol, or made in C
        return []
    return [p for p in parameters if p.name not in ("self", "cls")]


def breaches_of(place: str, function: Callable[..., Any], public: bool) -> Iterator[Breach]:
    """The rules that a signature breaks; some hold for what users call alone."""
    parameters = signature_of(function)
    for parameter in parameters:
        name, said = parameter.name, annotation_of(parameter)
        plain = said.removesuffix(" | None")
        if name in BANNED:
            yield Breach(place, "names", f"{name} is called {BANNED[name]}")
        if re.match(r"n_\w", name):
            yield Breach(place, "names", f"{name} is called num_{name[2:]}")
        counts = name in COUNTS or (
            name.endswith("s") and not name.startswith(("num_", "max_", "min_"))
        )
        if plain == "int" and counts and name not in NOT_COUNTS:
            yield Breach(place, "counts", f"{name} is a count, called num_*")
        if name.startswith("num_") and plain != "int":
            yield Breach(place, "counts", f"{name} must be an int, not {said}")
        if name == "hidden" and plain in ("int", "Sequence[int]"):
            yield Breach(place, "names", "hidden is called hidden_sizes")
        if name == "seed" and not any(fnmatchcase(place, driver) for driver in DRIVERS):
            yield Breach(place, "randomness", "takes a generator; drivers alone take a seed")
        if name == "generator":
            if public and said != GENERATOR:
                yield Breach(place, "randomness", f"generator must be {GENERATOR}, not {said}")
            if public and parameter.default is not None:
                yield Breach(place, "randomness", "generator must be None by default")
        if public and name in KEYWORD_ONLY and by_position(parameter) and has_default(parameter):
            yield Breach(place, "order", f"{name} must be keyword-only")
    if not public:
        return
    names = [p.name for p in parameters if by_position(p)]
    first = [name for name in FIRST if name in names]
    if first and names[0] not in FIRST + BEFORE:
        yield Breach(place, "order", f"{first[0]} must come first")
    options = [p.name for p in parameters if by_position(p) and has_default(p)]
    options = [name for name in options if name != "generator"]
    if len(options) > POSITIONAL_OPTIONS:
        yield Breach(
            place, "order", f"at most {POSITIONAL_OPTIONS} options by position, not {options}"
        )


def by_position(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)


def has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def estimate_breaches(place: str, thing: type) -> Iterator[Breach]:
    """An estimate has a value, a standard error and a kind, called so."""
    fields = {*getattr(thing, "_fields", ()), *getattr(thing, "__dataclass_fields__", ())}
    if "standard_error" in fields and not {"value", "kind"} <= fields:
        yield Breach(place, "estimates", f"value, standard_error and kind, not {sorted(fields)}")
    for field in sorted(fields):
        if re.search(r"(_se|_error|_err|_std_error|stderr)$", field) and field != "standard_error":
            yield Breach(place, "estimates", f"{field} is the standard_error of an estimate")


def breaches(modules: list[types.ModuleType]) -> Iterator[Breach]:
    """All that the names of some modules break; a name that several export is judged once."""
    users = {
        name for module in modules if hasattr(module, "__path__") for name, _ in exported(module)
    }
    seen = set()
    for module in modules:
        for name, thing in exported(module):
            if name in seen:
                continue
            seen.add(name)
            if inspect.isclass(thing):
                yield from estimate_breaches(name, thing)
            for place, function in functions_of(name, thing):
                yield from breaches_of(place, function, name in users)


def all_modules(package: types.ModuleType) -> list[types.ModuleType]:
    """Every module of a package but the private ones."""
    found = [package]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not re.search(r"\._", info.name):
            found.append(importlib.import_module(info.name))
    return found


def exempted(breach: Breach) -> str | None:
    """The entry of the table that covers a breach."""
    for pattern, (rule, _) in EXEMPT.items():
        if rule in ("*", breach.rule) and fnmatchcase(breach.place, pattern):
            return pattern
    return None


def test_the_package_keeps_the_conventions() -> None:
    found = list(breaches(all_modules(pyroebm)))
    left = [str(breach) for breach in found if exempted(breach) is None]
    assert not left, "\n".join(left)
    idle = set(EXEMPT) - {exempted(breach) for breach in found}
    assert not idle, f"exemptions that nothing needs: {sorted(idle)}"
