"""Saving: every energy, machine, classifier, flow and layer of the tables comes back as it was."""

from __future__ import annotations

import abc
import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import pickle
import resource
import runpy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lib.flow_cases import noise, stirred
from lib.scripts import ROOT
from torch import Tensor, nn
from torch.distributions import constraints

from pyroebm import Energy, load, save
from pyroebm.core import (
    Conditioned,
    DistributionEnergy,
    GeometricPath,
    LogRegularized,
    Relaxed,
    Tempered,
    Unconstrained,
    Unnormalized,
)
from pyroebm.core.files import FileError, read_tensors, write_tensors
from pyroebm.core.saving import _CLASSES, Saveable
from pyroebm.energies import (
    BernoulliRBM,
    BoltzmannMachine,
    ClassifierEnergy,
    ConvEnergy,
    DeepBeliefNetwork,
    FeatureLatentEnergy,
    MLPEnergy,
    NeuralEnergy,
    ProductOfExpertsEnergy,
    TiedRBM,
    Tilted,
)
from pyroebm.flows import (
    NICE,
    Flow,
    FlowEnergy,
    Loft,
    MixtureBase,
    PullbackEnergy,
    RealNVP,
    RedundantNICE,
    Shift,
    ZukoTransform,
)
from pyroebm.nn import MLPGenerator, mlp
from pyroebm.targets import DoubleWell, Gaussian, GaussianMixture
from pyroebm.training import Classifier

F64 = torch.float64
Make = Callable[[], nn.Module]


def table(path: str, name: str) -> dict[str, Callable[..., Any]]:
    """A table of constructors of another test."""
    return runpy.run_path(str(ROOT / "tests" / path))[name]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*widths: int) -> nn.Sequential:
    layers = (nn.Linear(a, b, dtype=F64) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])


def prior(base: Any) -> Tilted:
    """A learned correction of a known density."""
    return Tilted(base, net(2, 4, 1), dtype=F64)


def wells() -> GaussianMixture:
    return GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], scale=0.5, dtype=F64)


def flow() -> RealNVP:
    return RealNVP(2, 2, (4,), dtype=F64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def deep() -> DeepBeliefNetwork:
    return DeepBeliefNetwork([4, 3, 2], dtype=F64)


def classifier() -> ClassifierEnergy:
    return ClassifierEnergy(net(2, 4, 3), (2,), 3, scale=2.0)


COMPOSED: dict[str, Make] = {
    "sum": lambda: wells() + MLPEnergy((2,), (4,), dtype=F64),
    "sum-with-itself": lambda: (e := MLPEnergy((2,), (4,), dtype=F64)) + 0.5 * e,
    "tempered": lambda: 0.5 * wells(),
    "conditioned": lambda: Conditioned(wells(), vector(0.0, 1.0), torch.tensor([False, True])),
    "path": lambda: GeometricPath(wells(), 0.3, Gaussian(vector(0.0, 0.0))),
    "unconstrained": lambda: Unconstrained(table("targets/test_targets.py", "TARGETS")["gamma"]()),
    "relaxed": lambda: Relaxed(BernoulliRBM(3, 2)),
    "compressed": lambda: LogRegularized(wells(), 10.0),
    "unnormalized": lambda: Unnormalized(net(2, 4, 1).append(nn.Flatten(0)), "softplus", (2,)),
    "interval": lambda: NeuralEnergy(net(2, 4, 1), (2,), support=constraints.interval(-1.0, 2.0)),
    "simplex": lambda: NeuralEnergy(net(3, 4, 1), (3,), support=constraints.simplex),
    "tensor-scale": lambda: NeuralEnergy(net(2, 4, 1), (2,), scale=vector(1.0, 2.0)),
    "mlp-image": lambda: MLPEnergy((1, 2, 3), (4,), generator=seeded()),
    "convolutions": lambda: ConvEnergy((1, 8, 8), (2, 3), spectral_norm=True),
    "spectral-norm": lambda: NeuralEnergy(mlp(2, 1, (4,), spectral_norm=True), (2,), scale=2.0),
    "features": lambda: FeatureLatentEnergy(net(2, 4, 3), (2,), 3, weight=noise(3, 3)),
    "experts": lambda: ProductOfExpertsEnergy(net(2, 4, 3), 3, (2,), 5),
    "tilted-energy": lambda: prior(wells()),
    "tilted-flow": lambda: prior(FlowEnergy(flow())),
    "tilted-normal": lambda: prior(dist.Normal(vector(0.0, 1.0), 2.0).to_event(1)),
    "tilted-dense": lambda: prior(
        dist.MultivariateNormal(vector(0.0, 1.0), vector(2.0, 0.5, 0.5, 1.0).reshape(2, 2))
    ),
    "mixture": lambda: DistributionEnergy(
        dist.MixtureSameFamily(
            dist.Categorical(vector(0.3, 0.7)), dist.Normal(vector(-1.0, 1.0), 0.5)
        ),
        dtype=F64,
    ),
    "log-normal": lambda: DistributionEnergy(
        dist.LogNormal(vector(1.0, 2.0), 1.0).to_event(1), dtype=F64
    ),
    "gamma-of-torch": lambda: DistributionEnergy(
        torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(3.0))
    ),
    "flow-energy": lambda: FlowEnergy(flow()),
    "masks-drawn": lambda: RealNVP(5, 6, (4,), generator=seeded(3)),
    "transported": lambda: PullbackEnergy(flow(), wells()),
    "extended": lambda: RedundantNICE(2, 3, 2, (4,), dtype=F64).extend(wells()),
    "flow-of-layers": lambda: Flow(
        [Shift(vector(1.0, 2.0)), Loft(2)], 2, 2, base=MixtureBase(2, 3, dtype=F64)
    ),
    "boltzmann": lambda: BoltzmannMachine(3, 2, dtype=F64),
    "boltzmann-spins": lambda: BoltzmannMachine(3, units="spins", bias=vector(1.0, 0.0, -1.0)),
    "marginal": lambda: BoltzmannMachine(3, 2, dtype=F64).marginal(),
    "tied": lambda: TiedRBM(BernoulliRBM(3, 2), (2, 1)),
    "joint": lambda: BernoulliRBM(3, 2).joint(),
    "belief": deep,
    "belief-joint": lambda: deep().joint(),
    "classifier": classifier,
    "given-class": lambda: classifier().given(1),
    "fine-tuned": lambda: Classifier(deep(), 3),
    "generator": lambda: MLPGenerator((2,), 3, (4,), batch_norm=True, sigma=0.1),
}
TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "target": table("targets/test_targets.py", "TARGETS"),
    "machine": table("energies/test_boltzmann.py", "MACHINES"),
    "lattice": table("energies/test_lattice.py", "LATTICES"),
    "flow": table("flows/test_flows.py", "FLOWS"),
    "layer": table("flows/test_flows.py", "TRANSFORMS"),
    "composed": COMPOSED,
}
CASES: dict[str, Callable[..., Any]] = {
    f"{kind} {name}": make for kind, cases in TABLES.items() for name, make in cases.items()
}
#: Made of parts of other libraries, which a file cannot hold.
FOREIGN = ["flow pyro_affine"] + [
    f"layer {name}" for name, make in TABLES["layer"].items() if isinstance(make(), ZukoTransform)
]
every_case = pytest.mark.parametrize("name", [name for name in CASES if name not in FOREIGN])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(
        itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
    )


@torch.no_grad()
def values(module: Any) -> Iterator[Any]:
    """Energies, densities and draws."""
    if isinstance(module, Energy):
        draw = module.sample if module.has_exact_draws else module.initial
        x = draw(5, seeded(1))
        yield from (x, module(x), module.log_z, module.event_shape, str(module.support))
    elif isinstance(module, Flow):
        yield from module.forward_and_log_prob(module.rsample_base(4, seeded(3)))
    elif isinstance(module, dist.Distribution | torch.distributions.Transform):
        yield from module.with_log_det(noise(4, module.dim))
    elif isinstance(module, Classifier):
        yield module(torch.ones(2, 4, dtype=F64))
    elif isinstance(module, MLPGenerator):
        yield module.sample(3, seeded(4))


def check_same(module: nn.Module, again: nn.Module) -> None:
    ours, theirs = tensors(module), tensors(again)
    assert ours.keys() == theirs.keys()
    assert type(module) is type(again)
    for name, tensor in ours.items():
        other = theirs[name]
        assert type(tensor) is type(other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
        assert torch.equal(tensor, other), name
    shared = [(a, b) for a, b in itertools.combinations(ours, 2) if ours[a] is ours[b]]
    assert shared == [
        (a, b) for a, b in itertools.combinations(theirs, 2) if theirs[a] is theirs[b]
    ]
    assert [m.training for m in module.modules()] == [m.training for m in again.modules()]
    for a, b in zip(values(copy.deepcopy(module)), values(again), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@every_case
def test_it_comes_back_and_a_second_file_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    module = CASES[name]()
    if not name.startswith("target"):
        stirred(module).eval()
    before = torch.get_rng_state()
    save(module, tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    save(again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    check_same(module, again)
    save(copy.deepcopy(module), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def reloaded(module: nn.Module, folder: Path, **kwargs: Any) -> Any:
    save(module, folder / "file")
    return load(folder / "file", **kwargs)


class Learned(Energy):
    """A user's energy."""

    def __init__(
        self,
        width: int,
        *,
        shape: tuple[int, ...] = (2,),
        names: Any = (),
        start: Callable[[Tensor], Tensor] = nn.init.ones_,
        **options: float,
    ) -> None:
        super().__init__(shape)
        self.options = options
        self.names = names
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        start(self.net[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) + 0.5 * x.square().sum(-1)


class Deeper(Learned):
    """One without a constructor of its own."""


class Quartic(Energy):
    """A name that a class of the library could have, and no constructor."""

    def forward(self, x: Tensor) -> Tensor:
        return x**4


class Function(Energy):
    """Takes anything."""

    def __init__(self, argument: Any) -> None:
        super().__init__()
        self.number = len(str(argument))

    def forward(self, x: Tensor) -> Tensor:
        return x**2


class Mixin:
    """A constructor that is not wrapped, before one that is."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power


class Power(Mixin, Quartic):
    pass


class Abstract(Quartic, abc.ABC):
    """A class with another metaclass."""


@pytest.mark.parametrize(
    "make", [lambda: Learned(3, names=["a", {"b": (1, None)}], rate=0.5), lambda: Deeper(2)]
)
def test_classes_of_the_user_come_back_by_name(make: Make, tmp_path: Path) -> None:
    module: Any = stirred(make())
    kind = type(module)
    check_same(module, again := reloaded(module, tmp_path, classes={kind.__name__: kind}))
    assert (again.names, again.options) == (module.names, module.options)
    check_same(
        module + wells().float(),
        reloaded(module + wells().float(), tmp_path, classes={kind.__name__: kind}),
    )
    with pytest.raises(FileError, match=rf"class '{kind.__name__}'.*classes={{") as caught:
        load(tmp_path / "file")
    assert caught.value.path == tmp_path / "file"


def test_near_names_are_listed(tmp_path: Path) -> None:
    save(Quartic(), tmp_path / "file")
    with pytest.raises(FileError, match=r"got classes of \['Quartik'\]; near ones: \['Quartik'"):
        load(tmp_path / "file", classes={"Quartik": Quartic})


def test_a_class_of_the_user_is_not_one_of_the_library(tmp_path: Path) -> None:
    theirs = type("DoubleWell", (Quartic,), {"__module__": "notebook"})
    save(theirs(), tmp_path / "file")
    assert type(load(tmp_path / "file", classes={"DoubleWell": theirs})) is theirs
    with pytest.raises(FileError, match=r"near ones: .*targets\.DoubleWell"):
        load(tmp_path / "file")


def test_constructors_keep_their_signatures_and_may_be_of_any_kind(tmp_path: Path) -> None:
    assert list(inspect.signature(Learned).parameters) == [
        "width",
        "shape",
        "names",
        "start",
        "options",
    ]
    assert inspect.signature(NICE.__init__).parameters["hidden_sizes"].default == (64, 64)
    classes: dict[str, type[nn.Module]] = {"Power": Power, "Abstract": Abstract}
    assert reloaded(Power(3), tmp_path, classes=classes).power == 3
    assert type(reloaded(Abstract(), tmp_path, classes=classes)) is Abstract


def test_dtypes_flags_and_modes_are_as_they_were(tmp_path: Path) -> None:
    module = nn.Sequential(NICE(2, 2, (4,)).double(), DoubleWell().double(), nn.Dropout(0.2).eval())
    module[0].transform.parts[0].requires_grad_(False)
    module[0].transform.parts[1].eval()
    check_same(module, again := reloaded(module, tmp_path))
    assert again[1].dtype == F64
    half = Learned(2).to(torch.bfloat16)
    check_same(half, reloaded(half, tmp_path, classes={"Learned": Learned}))


class Third(Quartic):
    """A number that torch's default dtype rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.third = float(torch.ones(()) / 3)


@pytest.mark.usefixtures("float64")
def test_the_default_dtype_is_that_of_the_construction(tmp_path: Path) -> None:
    module = Third()
    save(module, tmp_path / "file")
    torch.set_default_dtype(torch.float32)
    again = load(tmp_path / "file", classes={"Third": Third})
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)
    assert again.third == module.third == 1 / 3
    check_same(module, again)


def test_shared_parameters_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    first, second = (MLPEnergy((2,), (64, 64)) for _ in range(2))
    second.net[2].weight = first.net[2].weight
    both = first + 2.0 * second
    check_same(both, again := reloaded(both, tmp_path))
    assert again.parts[1].energy.net[2].weight is again.parts[0].net[2].weight
    size = (tmp_path / "file").stat().st_size
    save(first + 2.0 * copy.deepcopy(second), tmp_path / "apart")
    assert (tmp_path / "apart").stat().st_size - size == pytest.approx(4 * 64 * 64, abs=1000)


def test_shared_modules_are_shared_again(tmp_path: Path) -> None:
    prior, well = FlowEnergy(flow()), wells()
    module = nn.Sequential(prior, PullbackEnergy(prior.flow, well), well + well)
    check_same(module, again := reloaded(module, tmp_path))
    assert again[0].flow is again[1].flow
    assert again[2].parts[0] is again[2].parts[1] is again[1].augmented.energy


def test_attributes_that_were_assigned_later_are_saved(tmp_path: Path) -> None:
    tempered: Any = 0.5 * wells()
    tempered.beta = 0.25
    tempered.remark = ("learned", {"at": vector(1.0)})
    tempered._cache = {"function": print}
    again = reloaded(tempered, tmp_path)
    assert again.beta == 0.25
    assert again.remark == tempered.remark
    assert "_cache" not in vars(again)
    check_same(tempered, again)


class Initializing(Energy):
    """Changes the network that it is given."""

    def __init__(self, net: nn.Sequential, mean: Tensor) -> None:
        super().__init__((2,))
        nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
        self.net = net.to(torch.float32)
        self.register_buffer("mean", mean.zero_())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.mean).squeeze(-1)


def test_constructors_that_change_their_arguments_change_nothing(tmp_path: Path) -> None:
    module = stirred(Initializing(net(2, 3, 1), vector(1.0, 2.0))).double()
    module.mean.fill_(3.0)
    before = copy.deepcopy(tensors(module))
    again = reloaded(module, tmp_path, classes={"Initializing": Initializing})
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(module).items())
    check_same(module, again)


class Centered(Energy):
    """Holds its argument in a closure, and parameters that start with the same values."""

    def __init__(self, scale: Tensor) -> None:
        if not bool((scale >= 0).all()):
            raise ValueError("scale must be >= 0")
        super().__init__((2,))
        self.shift = nn.Parameter(torch.zeros(2))
        self.scaled = lambda x: x * (1 + scale)

    def forward(self, x: Tensor) -> Tensor:
        return (self.scaled(x) - self.shift).square().sum(-1)


class Several(Energy):
    """Positional arguments before one whose name a parameter has."""

    def __init__(self, *means: Tensor, scale: Tensor) -> None:
        super().__init__((2,))
        self.scale = nn.Parameter(scale.clone())
        self.total = sum(means).tolist()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sum(-1)


class Aliased(Energy):
    """Holds its argument itself, or a view of all of it, under other names."""

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__((2,))
        self.register_buffer("location", mean)
        self.gain = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * (x - self.location)).sum(-1)


@pytest.mark.parametrize("value", [3.0, -1.0])
@torch.no_grad()
def test_an_argument_is_no_parameter_that_starts_with_its_values(
    value: float, tmp_path: Path
) -> None:
    centered = Centered(torch.zeros(2))
    centered.shift.fill_(value)
    again = reloaded(centered, tmp_path, classes={"Centered": Centered})
    check_same(centered, again)
    x = torch.ones(1, 2)
    assert again(x).item() == centered(x).item() == 2 * (1 - value) ** 2
    several = Several(torch.ones(2), torch.ones(2), scale=torch.ones(2))
    several.scale.fill_(value)
    again = reloaded(several, tmp_path, classes={"Several": Several})
    check_same(several, again)
    assert again.total == [2.0, 2.0]


def test_a_copy_of_an_argument_keeps_its_values(tmp_path: Path) -> None:
    scale = torch.zeros(2)
    several = Several(scale, scale=torch.ones(2))
    scale.fill_(5.0)
    assert torch.equal(several._construction.args[0], torch.zeros(2))
    again = reloaded(several, tmp_path, classes={"Several": Several})
    assert again.total == several.total == [0.0, 0.0]


def test_an_argument_that_the_module_holds_itself_is_stored_once(tmp_path: Path) -> None:
    aliased = Aliased(torch.zeros(2), torch.zeros(2))
    names = [argument.name for argument in aliased._construction.args]
    assert names == ["location", "gain"]
    check_same(stirred(aliased), reloaded(aliased, tmp_path, classes={"Aliased": Aliased}))


class Mode(str, enum.Enum):  # noqa: UP042  Python 3.10 has no StrEnum
    PLAIN = "plain"


class Level(enum.IntEnum):
    HIGH = 1


class Real(float):
    pass


@pytest.mark.parametrize("value", [Mode.PLAIN, Level.HIGH, Real(1.0), {Mode.PLAIN: 1}])
def test_subclasses_of_strings_and_numbers_are_refused(value: Any, tmp_path: Path) -> None:
    kind = type(value).__name__
    with pytest.raises(
        ValueError, match=rf"Function\.argument is {kind}, which a file cannot hold"
    ):
        save(Function(value), tmp_path / "file")
    energy = Holder()
    energy.held = value
    with pytest.raises(ValueError, match=rf"held is {kind}, which a file cannot hold"):
        save(energy, tmp_path / "file")


@dataclasses.dataclass
class Options:
    rate: float = 1.0
    at: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))


class Plain:
    """An object that is compared by its attributes, and that refers to itself."""

    def __init__(self, level: int = 0) -> None:
        self.level = level
        self.again = self

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.level


def scaling(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: by * x


class Holder(Energy):
    """Sets an attribute of each kind."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.layer = nn.Linear(2, 1)
        self.held: Any = None
        self.sites = {0}
        self.options = Options()
        self.plain = Plain()
        self.method = Plain().shifted
        self.function = torch.relu
        self.closure = scaling(2.0)
        self.partial = functools.partial(torch.add, 1.0)
        self.generator = torch.Generator()
        self.aliases: list[Any] = [self.layer]
        self.missing = vector(torch.nan, 0.0)
        self.missing_array = np.array([np.nan, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1)


CHANGES: dict[str, tuple[Any, str]] = {
    "sites": ({0, 1}, "sites is set, which"),
    "options": (Options(5.0), "options is Options, which"),
    "plain": (Plain(1), "plain is Plain, which"),
    "method": (Plain(1).shifted, "method is shifted, which"),
    "function": (torch.tanh, "function is tanh, which"),
    "closure": (scaling(3.0), "closure is <lambda>, which"),
    "partial": (functools.partial(torch.add, 2.0), "partial is partial, which"),
    "aliases": ([nn.Linear(2, 1)], r"aliases\[0\] is a Linear .*hold it in an nn.ModuleList"),
    "held": ({"a": nn.Parameter(vector(1.0))}, "held.a is a Parameter .*nn.ParameterList"),
}


def test_attributes_that_the_constructor_sets_again_are_no_changes(tmp_path: Path) -> None:
    module = stirred(Holder())
    again = reloaded(module, tmp_path, classes={"Holder": Holder})
    check_same(module, again)
    assert again.aliases[0] is again.layer
    assert read_tensors(tmp_path / "file")[1]["modules"][-1]["attributes"] == {}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_attributes_that_no_file_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    module = Holder()
    value, said = CHANGES[name]
    setattr(module, name, value)
    with pytest.raises(ValueError, match=said):
        save(module, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_missing_values_differ_from_zeros_and_infinities(tmp_path: Path) -> None:
    module = Holder()
    for values in ([0.0, torch.nan], [0.0, 0.0], [torch.finfo(F64).max, 0.0]):
        module.missing, module.missing_array = vector(*values), np.array(values)
        again = reloaded(module, tmp_path, classes={"Holder": Holder})
        np.testing.assert_array_equal(module.missing, again.missing)
        np.testing.assert_array_equal(module.missing_array, again.missing_array)


class Unregistered(Energy):
    """Holds a layer in a plain list."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.nets = [nn.Linear(2, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](x).squeeze(-1)


def test_a_layer_in_a_plain_list_is_refused(tmp_path: Path) -> None:
    """Also a second name of a parameter in a list, which the loaded module would not share."""
    with pytest.raises(ValueError, match=r"nets\[0\] is a Linear in an attribute"):
        save(Unregistered(), tmp_path / "file")
    module = Learned(2)
    module.names = [module.net[0].weight]
    with pytest.raises(ValueError, match=r"names\[0\] is a Parameter in an attribute"):
        save(module, tmp_path / "file")


def test_names_of_tensors_do_not_collide(tmp_path: Path) -> None:
    """The classifier's copy and the machine that it was made from are numbered as the parts of a
    sequence are."""
    module = nn.Sequential(Classifier(stirred(deep()), 3), stirred(nn.Linear(2, 2)))
    check_same(module, reloaded(module, tmp_path))


def test_a_record_holds_no_second_copy(tmp_path: Path) -> None:
    weight = torch.randn(30, 5)
    gone = weakref.ref(weight)
    rbm = BernoulliRBM(30, 5, weight=weight, hidden_bias=torch.ones(5))
    del weight
    assert gone() is None
    assert not any(isinstance(kept, Tensor) for kept in rbm._construction.kwargs.values())
    stirred(rbm)
    check_same(rbm, reloaded(rbm, tmp_path))
    check_same(rbm.double(), reloaded(rbm.double(), tmp_path))


def test_modules_are_still_exported_vectorized_and_pickled() -> None:
    module = Learned(3)
    x = torch.randn(4, 2)
    exported = torch.export.export(module.requires_grad_(False), (x,)).module()
    assert torch.equal(exported(x), module(x))
    means = torch.randn(3, 2)
    moved = torch.vmap(lambda mean: Unshaped(mean)(mean))(means)
    assert torch.equal(moved, means.square().sum(-1))
    again = pickle.loads(pickle.dumps(Function(len)))
    assert again._construction.args[0].name == "len"
    with torch.device("meta"):
        Unshaped(torch.ones(2))


class Unshaped(Energy):
    """Holds a copy of its argument, which may be a tensor of any kind."""

    event_shape = torch.Size((2,))

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.mean).sum(-1)


def replaced() -> nn.Module:
    energy = MLPEnergy((2,), (4,))
    energy.net[1] = nn.Tanh()
    return energy


def views() -> nn.Module:
    energy = MLPEnergy((2,), (2, 2))
    energy.net[2].weight = nn.Parameter(energy.net[0].weight.detach().mT)
    return energy


def without_a_record() -> nn.Module:
    energy = Quartic()
    del energy._construction
    return energy


def grown() -> nn.Module:
    energy = Learned(2)
    energy.register_parameter("more", nn.Parameter(torch.zeros(1)))
    return energy


def called_the_same() -> nn.Module:
    other = type("Quartic", (Quartic,), {"__module__": "notebook"})
    return Quartic() + other()


def assigned() -> nn.Module:
    energy = 0.5 * wells()
    energy.function = print  # type: ignore[assignment]
    return energy


class OwnNet(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


REFUSED: dict[str, tuple[Make, str]] = {
    "function": (lambda: 2.0 * Tilted(wells(), torch.sin), r"Tempered\.energy\.f is sin, which"),
    "lambda": (lambda: Unnormalized(lambda x: -x), r"Unnormalized\.g is .*<lambda>, which"),
    "object": (lambda: Function(object()), r"Function\.argument is object, which"),
    "set": (lambda: Function([{1}]), r"Function\.argument\[0\] is set, which"),
    "net": (lambda: NeuralEnergy(OwnNet(), (2,), scale=1.0), r"NeuralEnergy\.net is a OwnNet"),
    "replaced": (replaced, r"part 'net.1' of MLPEnergy is a Tanh.* gives a SiLU"),
    "views": (views, r"net.0.weight and net.2.weight must be one"),
    "without-a-record": (without_a_record, "Quartic was not constructed by the __init__"),
    "grown": (grown, "constructor of Learned creates no more"),
    "called-the-same": (called_the_same, "got two called Quartic"),
    "assigned": (assigned, "function is .*, which a file cannot hold"),
    "no-module": (lambda: torch.sin, "module must be"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_by_save(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as caught:
        save(make(), tmp_path / "file")
    if case not in ("views", "called-the-same", "no-module"):
        assert "classes={...}" in str(caught.value)
        assert "into=module" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FOREIGN)
def test_parts_of_other_libraries_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nor a layer of torch"):
        save(CASES[name](), tmp_path / "file")


def test_tensors_alone_fill_a_module_of_the_user(tmp_path: Path) -> None:
    def make() -> Tilted:
        return Tilted(MLPEnergy((2,), (4,)), OwnNet())

    module, into = stirred(make()), make()
    save(module, tmp_path / "file", tensors_only=True)
    assert load(tmp_path / "file", into=into) is into
    check_same(module, into)
    with pytest.raises(FileError, match=r"tensors_only.*into="):
        load(tmp_path / "file")
    full, other = stirred(MLPEnergy((2,), (4,))), MLPEnergy((2,), (4,))
    before = other.net[0].weight
    save(full, tmp_path / "file")
    load(tmp_path / "file", into=other)
    assert other.net[0].weight is before
    check_same(full, other)


def test_into_names_the_differences(tmp_path: Path) -> None:
    save(MLPEnergy((2,), (4,)), tmp_path / "file")
    for other, said in (
        (MLPEnergy((2,), (5,)), r"\['net.0.bias \(5,\) float32'.* only in the file"),
        (MLPEnergy((2,), (4,)).double(), "net.0.weight .* float64.*net.0.weight .* float32"),
        (MLPEnergy((2,), (4, 4)), r"'net.4.bias \(1,\) float32'"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(FileError, match=said):
            load(tmp_path / "file", into=other)
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    apart, tied = (MLPEnergy((2,), (4, 4, 4)) for _ in range(2))
    tied.net[2].weight = tied.net[4].weight
    save(apart, tmp_path / "file")
    with pytest.raises(FileError, match=r"got net\.2\.weight and net\.4\.weight, which only into"):
        load(tmp_path / "file", into=tied)


def test_a_damaged_file_raises_one_error(tmp_path: Path) -> None:
    module, path = RealNVP(2, 2, (4,)), tmp_path / "file"
    save(module, path)
    content = path.read_bytes()
    places = torch.randint(len(content), (200,), generator=seeded()).tolist()
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged if number % 2 else content[:place])
        with pytest.raises(FileError):
            load(path)
    with pytest.raises(FileError, match="no such file"):
        load(tmp_path / "nowhere")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A file with another description, and the right checksum."""
    content, metadata = read_tensors(path)
    change(metadata)
    write_tensors(path, content, metadata)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save(DoubleWell(), path)
    rewritten(path, lambda said: said.update(format=2, version="9.1"))
    with pytest.raises(FileError, match=r"format 1, got format 2 of pyroebm 9\.1"):
        load(path)
    write_tensors(path, {"x": torch.ones(1)}, {"class": "NICE"})
    with pytest.raises(FileError, match="format None"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "system",
        "builtins.eval",
        "pyroebm.mcmc.MCMC",
        "pyroebm.core.files",
        "pyroebm._x.y",
        "torch.nn.init",
        "torch.nn.functional.relu",
        "torch.nn.Module.__init__",
        "torch.distributions.Normal",
        "",
        3,
    ],
)
def test_only_known_classes_are_called(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    save(DoubleWell(), path)
    rewritten(path, lambda said: said["modules"][0].update({"class": name}))
    with pytest.raises(FileError):
        load(path)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: RealNVP(2, 2, (4,)), {"num_layers": 10**7}),
        (lambda: BernoulliRBM(3, 2), {"num_visible": 10**6, "num_hidden": 10**6}),
        (lambda: MLPEnergy((2,), (4,)), {"hidden_sizes": {"tuple": [10**6, 10**6]}}),
        (lambda: MixtureBase(2, 3), {"num_components": 10**10}),
        (lambda: NICE(2), {"hidden_sizes": {"tuple": [2] * 10**4}}),
        (lambda: NICE(2), {"hidden_sizes": 3}),
        (lambda: NICE(2), {"hidden_sizes": {"module": 7}}),
        (lambda: NICE(2), {"hidden_sizes": {"tensor": "none", "dtype": "float32"}}),
        (lambda: NICE(2), {"dtype": {"dtype": "nn"}}),
        (lambda: NICE(2), {"more": 1}),
        (lambda: net(2, 3), {"args": {"tuple": []}}),
        (lambda: nn.Sequential(nn.Linear(2, 3)), {"out_features": 4}),
    ],
)
def test_what_a_description_may_ask_for_is_bounded(
    make: Make, arguments: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    save(make(), path)
    node = 0 if "out_features" in arguments else -1
    rewritten(path, lambda said: said["modules"][node]["arguments"].update(arguments))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileError):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_each_class_of_the_library_has_a_name_of_its_own() -> None:
    left: list[type] = [Saveable]
    for kind in left:  # which grows
        left += kind.__subclasses__()
    public = {
        kind
        for kind in left[1:]
        if kind.__module__.startswith("pyroebm.") and not kind.__name__.startswith("_")
    }
    assert {BernoulliRBM, NICE, Tilted, Classifier, Tempered} <= public
    for kind in public:
        assert _CLASSES[f"{kind.__module__.split('.')[1]}.{kind.__name__}"] is kind


@pytest.mark.gpu
def test_devices(tmp_path: Path) -> None:
    path = GeometricPath(wells().cuda(), 0.3, Gaussian(vector(0.0, 0.0)).cuda())
    check_same(path, reloaded(path, tmp_path, device="cuda"))
    on_cpu = load(tmp_path / "file")
    assert on_cpu.device.type == "cpu"
    x = noise(3, 2)
    torch.testing.assert_close(on_cpu(x), path(x.cuda()).cpu())


def test_classes_are_a_dict(tmp_path: Path) -> None:
    save(DoubleWell(), tmp_path / "well.safetensors")
    with pytest.raises(ValueError, match=r'got list: write classes=\{"MyEnergy": MyEnergy\}'):
        load(tmp_path / "well.safetensors", classes=[DoubleWell])  # type: ignore[arg-type]


def test_sizes_and_ranges_keep_their_types(tmp_path: Path) -> None:
    """As arguments, within others, and as attributes that were assigned later."""

    class Grid(Energy):
        def __init__(self, shape: Any, steps: Any) -> None:
            super().__init__((2,))
            self.shape, self.steps = shape, steps

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1)

    grid = Grid(torch.Size([2, 3]), [range(1, 9, 2)])
    grid.later = (torch.Size([4]), range(3))
    save(grid, tmp_path / "grid.safetensors")
    found = load(tmp_path / "grid.safetensors", classes={"Grid": Grid})
    for ours, theirs in (
        (found.shape, torch.Size([2, 3])),
        (found.steps[0], range(1, 9, 2)),
        (found.later[0], torch.Size([4])),
        (found.later[1], range(3)),
    ):
        assert ours == theirs
        assert type(ours) is type(theirs)
