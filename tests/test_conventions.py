"""The conventions of the interface: the table in docs/architecture.md, checked on every
`__all__`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

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
    "pyroebm.calibration.*",
    "pyroebm.mcmc.sampler.MCMC",
    "pyroebm.ppl.botorch.fit_fully_bayesian_model",
    "pyroebm.training.fit.fit*",
    "pyroebm.training.selection.select_total_dim",
    "pyroebm.training.trainer.Trainer",
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
    "pyroebm.mcmc.sampler.MCMC.load_state_dict": ("order", "torch's name and order"),
    "pyroebm.diagnostics.convergence.Diagnosis": ("counts", "a result"),
    "pyroebm.flows.report.FlowReport": ("counts", "a result"),
    "pyroebm.training.data.*": ("randomness", "any step's batch can be had at once"),
    "pyroebm.training.validation.Validation": ("randomness", "the same numbers each time"),
    "pyroebm.training.history.History": ("randomness", "a result"),
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


def estimate_breaches(place: str, thing: type, public: bool) -> Iterator[Breach]:
    """An estimate has a value, a standard error and a kind, called so."""
    if not public:
        return
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
                yield from estimate_breaches(name, thing, name in users)
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


# --------------------------------------------------------------------------------------------------
# Sources: every draw names its generator


#: Functions of torch that draw, and take a generator.
DRAWS = {
    "torch.bernoulli",
    "torch.multinomial",
    "torch.normal",
    "torch.poisson",
    "torch.rand",
    "torch.randint",
    "torch.randn",
    "torch.randperm",
    "nn.init.kaiming_normal_",
    "nn.init.kaiming_uniform_",
    "nn.init.normal_",
    "nn.init.uniform_",
    "nn.init.xavier_normal_",
    "nn.init.xavier_uniform_",
}
#: Functions that reseed torch's default generator, in the one module that may, under its lock.
RESEEDS = re.compile(r"torch\.(random\.|cuda\.)?(manual_seed|seed|set_rng_state|fork_rng)")
RANDOMNESS = "pyroebm/core/rng.py"


def hidden_draws(source: str) -> Iterator[str]:
    """Calls that draw from torch's default generator whatever the caller gives, or reseed it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in DRAWS and not any(word.arg == "generator" for word in node.keywords):
            yield f"{node.lineno}: {called} without a generator"
        if RESEEDS.fullmatch(called):
            yield f"{node.lineno}: {called}"


#: Files of the package that may, and why.
MAY_DRAW = {
    "pyroebm/cli/demo.py": "Pyro draws in it: the driver forks torch's default generator",
    "pyroebm/core/spins.py": "a distribution of Pyro",
    "pyroebm/infer/driver.py": "Pyro's generator decides: pyro.set_rng_seed",
    "pyroebm/ppl/kernel.py": "the same",
    "pyroebm/ppl/model.py": "Pyro draws in it",
}


def test_every_draw_names_its_generator() -> None:
    found = {}
    for path in sorted((ROOT / "pyroebm").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name != RANDOMNESS and (said := list(hidden_draws(path.read_text(encoding="utf-8")))):
            found[name] = said
    assert {name: said for name, said in found.items() if name not in MAY_DRAW} == {}
    assert set(MAY_DRAW) <= set(found), "these files draw no more"


# --------------------------------------------------------------------------------------------------
# Planted breaches are found


def planted(source: str) -> types.ModuleType:
    """A package of one file whose `__all__` has all that the source defines."""
    package = types.ModuleType("planted")
    package.__path__ = []
    sys.modules["planted"] = package  # dataclasses look there
    try:
        exec(
            "from __future__ import annotations\nimport dataclasses, typing\n" + source,
            vars(package),
        )
    finally:
        del sys.modules["planted"]
    names = [node.name for node in ast.parse(source).body if hasattr(node, "name")]
    package.__all__ = names  # type: ignore[attr-defined]
    return package


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(steps: int): ...", "counts: steps"),
        ("def f(n: int): ...", "counts: n is a count"),
        ("def f(epochs: int | None = None): ...", "counts: epochs"),
        ("def f(n_samples: float): ...", "names: n_samples is called num_samples"),
        ("def f(num_steps: float): ...", "counts: num_steps must be an int"),
        ("def f(hidden: Sequence[int] = (64,)): ...", "names: hidden"),
        ("def f(learning_rate: float): ...", "names: learning_rate is called lr"),
        ("def f(x, *, seed: int = 0): ...", "randomness: takes a generator"),
        ("def f(generator: torch.Generator = None): ...", "randomness: generator must be torch"),
        ("def f(generator: torch.Generator | None): ...", "randomness: generator must be None"),
        ("def f(data, energy): ...", "order: energy must come first"),
        ("def f(x, dtype=None): ...", "order: dtype must be keyword-only"),
        ("def f(x, a=1, b=2, c=3, d=4): ...", "order: at most 3 options"),
        ("class C:\n def __init__(self, chains: int): ...", "planted.C: counts: chains"),
        ("class C:\n def draw(self, chains: int): ...", "planted.C.draw: counts: chains"),
        ("class C:\n @classmethod\n def make(cls, particles: int): ...", "C.make: counts"),
        ("@dataclasses.dataclass\nclass C:\n layers: int = 2", "planted.C: counts: layers"),
        ("class E(typing.NamedTuple):\n value: float\n standard_error: float", "estimates"),
        (
            "@dataclasses.dataclass\nclass R:\n log_z: float\n log_z_se: float",
            "estimates: log_z_se",
        ),
    ],
)
def test_planted_breaches_are_found(source: str, said: str) -> None:
    found = [str(breach) for breach in breaches([planted(source)])]
    assert len(found) == 1
    assert said in found[0]


def test_what_keeps_the_conventions_is_left_alone() -> None:
    source = """
def f(energy, kernel=None, num_steps: int = 5, *, lr: float = 0.1, dtype=None,
      generator: torch.Generator | None = None, max_steps: int = 3): ...
class Estimate(typing.NamedTuple):
    value: float
    standard_error: float
    kind: str
class State(typing.NamedTuple):
    steps: int
class Sampler:
    def __init__(self, hidden_sizes=(64, 64), warmup_steps: int = 10): ...
    def _private(self, n: int): ...
"""
    assert list(breaches([planted(source)])) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.randn(3)", 1),
        ("torch.randn(3, generator=None)", 0),
        ("nn.init.normal_(w)", 1),
        ("torch.manual_seed(0)", 1),
        ("torch.Generator().manual_seed(0)", 0),
        ("with torch.random.fork_rng(): pass", 1),
    ],
)
def test_hidden_draws_are_found(source: str, count: int) -> None:
    assert len(list(hidden_draws(source))) == count


def test_exemptions_are_for_what_breaks_a_rule() -> None:
    breach = Breach("pyroebm.infer.kernels.NUTS", "counts", "")
    assert exempted(breach) == "pyroebm.infer.*"
    assert exempted(dataclasses.replace(breach, place="pyroebm.kernels.hmc.HMC")) is None
    assert exempted(Breach("pyroebm.data.readers.load_binary", "counts", "")) is None
