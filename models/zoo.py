"""Make the entries of the zoo: train by the recipes, evaluate, draw, write files and cards.

- python -m models.zoo NAME ...: make entries, in runs/zoo/NAME and pyroebm/zoo/entries/NAME
- python -m models.zoo --table: write the README's table and every card.md from the cards

To add an entry, add it to ``ENTRIES``. Trainings that have finished in runs/zoo/NAME are not
repeated, recipes with checkpoints continue from them, and the reference draws of an entry are kept:
remove its folders to make it from the start.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import matplotlib

matplotlib.use("Agg")  # without a display

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.axes import Axes
from torch import Tensor, nn

import pyroebm
from models.toy2d import TOYS, global_moves
from pyroebm import MCMC, Energy, load, zoo
from pyroebm.core import seeded_generator
from pyroebm.core.files import copy_file, file_checksum
from pyroebm.core.statistics import Estimate
from pyroebm.diagnostics.plots import plot_images
from pyroebm.flows import Flow, FlowEnergy
from pyroebm.targets import DoubleWell
from pyroebm.zoo.cards import shown
from pyroebm.zoo.registry import CARD, MODEL, REFERENCE
from pyroebm.zoo.registry import ENTRIES as PACKAGED

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
NUM_CHAINS, NUM_DRAWS = 10, 1000


@dataclasses.dataclass(frozen=True)
class Stated:
    """A number of a card: how it is computed, and what it means."""

    name: str
    computation: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Draws:
    """Reference draws ``(chains, draws, *event)``, with the number of divergences."""

    x: Tensor
    num_divergences: int = 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry: recipe, settings, and what its card says.

    Args:
        recipe: module of ``models``.
        settings: arguments of its ``main``.
        model: file of the trained model in the recipe's folder, with ``{seed}``.
        title: one line.
        description: what it is and what it may be used for.
        data: of the training.
        log_z: how log Z is computed.
        metrics: what is stated.
        picture: plots the model and its reference draws.
        draws: makes reference draws; None for none.
        moments: whether the draws are compared with quadrature.
        known_failures: what it does wrong.
        seeds: the first one is the entry's, the others show the spread.
    """

    recipe: str
    settings: dict[str, Any]
    model: str
    title: str
    description: str
    data: zoo.Data
    log_z: tuple[Stated, ...]
    metrics: tuple[Stated, ...]
    picture: Callable[[nn.Module, Tensor, Axes], Any]
    draws: Callable[[Energy], Draws] | None = None
    moments: bool = False
    known_failures: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


def exact_draws(energy: Energy) -> Draws:
    """Draw independent samples."""
    x = energy.sample(NUM_CHAINS * NUM_DRAWS, seeded_generator(0))
    return Draws(x.reshape(NUM_CHAINS, NUM_DRAWS, *energy.event_shape))


def moons_draws(energy: Energy) -> Draws:
    """Run chains of Langevin steps and global proposals, which move between the two moons.

    NUTS needs about 40 steps from one moon to the other. Many short chains cost as much as few, for
    they are one batch.
    """
    toy = TOYS["moons"]
    data = toy.make().sample(8192, seeded_generator(0))
    mcmc = MCMC(
        global_moves(toy, data),
        num_samples=100,
        num_chains=100,
        thinning=45,
        seed=0,
    )
    mcmc.run(energy)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    return Draws(x, int(mcmc.get_stats()["diverging"].sum()))


def images(width: int) -> Callable[[nn.Module, Tensor, Axes], Any]:
    """Return a function that plots 100 of the draws as square images of a width."""

    def plot(model: nn.Module, draws: Tensor, ax: Axes) -> None:
        plot_images(
            draws[:, :: NUM_DRAWS // 10].flatten(0, 1)[:, : width * width], (width, width), ax=ax
        )

    return plot


def plane(model: nn.Module, draws: Tensor, ax: Axes) -> None:
    """Plot a density in two dimensions, and some of the draws."""
    axis = torch.linspace(-2.0, 3.0, 241, dtype=torch.float64)
    density = torch.exp(-model(torch.cartesian_prod(axis, axis)).reshape(241, 241).mT)
    ax.imshow(density.numpy(), origin="lower", extent=(-2.0, 3.0, -2.0, 3.0), cmap="magma")
    ax.plot(*draws[:, ::5].flatten(0, 1).mT.numpy(), ".", markersize=1, color="white")


def wells(model: nn.Module, draws: Tensor, ax: Axes) -> None:
    """Plot a histogram of draws of a flow, and the density of the double well."""
    target, x = DoubleWell(dtype=torch.float64), torch.linspace(-2.5, 2.5, 400, dtype=torch.float64)
    flow_draws = FlowEnergy(cast(Flow, model)).sample(100_000, seeded_generator(1))
    ax.hist(flow_draws[:, 0].numpy(), bins=200, density=True, label="draws of the flow")
    ax.plot(x.numpy(), target.score_samples(x).exp().numpy(), label="double well")
    ax.legend()


DIGITS = zoo.Data(
    name="scikit-learn's digits, 8 x 8, 1,437 training and 360 test images",
    binarization="thresholded at 8",
    license="CC BY 4.0",
    source="Alpaydin and Kaynak (1998), UCI Machine Learning Repository",
    ships=True,
)
MOONS = zoo.Data(
    name="two moons, 8,192 points",
    binarization="none",
    license="generated",
    source="pyroebm.targets.TwoMoons, the distribution of scikit-learn's make_moons",
    ships=True,
)
ENUMERATED = (Stated("log Z", "enumeration"),)
INTEGRATED = (Stated("log Z", "integral", {"tolerance": 1e-5}),)
MOONS_KL = Stated(
    "KL divergence from the two moons", "divergence_from_target", {"target": "TwoMoons"}
)
WELL = {"target": "DoubleWell", "num_samples": 100_000}

ENTRIES: dict[str, Entry] = {
    "boltzmann-machine-bars": Entry(
        recipe="boltzmann_machine",
        settings={},
        model="bars-and-stripes-6-hidden-units",
        title="A Boltzmann machine of 9 visible and 6 hidden units, on bars and stripes.",
        description="All units are coupled. It was trained by exact maximum likelihood. Small"
        " enough to enumerate, and multimodal: a test of samplers of discrete states.",
        data=zoo.Data(
            name="bars and stripes, 3 x 3, all 16 patterns",
            binarization="binary",
            license="generated",
            source="MacKay (2003), pyroebm.data.bars_and_stripes",
            ships=True,
        ),
        log_z=ENUMERATED,
        metrics=(
            Stated(
                "KL divergence from the data",
                "divergence_from_data",
                data="bars-and-stripes/3",
                note="0 is the maximum of the likelihood",
            ),
            Stated(
                "probability that a draw is a pattern of the data",
                "mass_of_data",
                data="bars-and-stripes/3",
            ),
        ),
        picture=images(3),
        draws=exact_draws,
    ),
    "rbm-digits-16": Entry(
        recipe="rbm",
        settings={"seeds": 1},
        model="rbm-{seed}",
        title="A restricted Boltzmann machine of 64 visible and 16 hidden units, on binary digits.",
        description="It was trained by persistent contrastive divergence with centered gradients."
        " log Z and draws are exact, by a sum over the hidden states.",
        data=DIGITS,
        log_z=ENUMERATED,
        metrics=(
            Stated(
                "test log-likelihood",
                "mean_log_likelihood",
                data="digits/test",
                note="nats; that of independent pixels is -25.249",
            ),
            Stated("training log-likelihood", "mean_log_likelihood", data="digits/train"),
        ),
        picture=images(8),
        draws=exact_draws,
        known_failures=(
            "To the eye, fewer than half of 100 exact draws are a digit (mostly 0 and 1); the"
            " others are strokes of digits without their shape.",
        ),
    ),
    "score-moons": Entry(
        recipe="toy2d",
        settings={"only": ("moons", "score")},
        model="moons-score",
        title="A network 2-128-128-1 as an energy, trained on two moons by score matching.",
        description="The energy is a network plus a Gaussian envelope. log Z is by quadrature.",
        data=MOONS,
        log_z=INTEGRATED,
        metrics=(MOONS_KL,),
        picture=plane,
        draws=moons_draws,
        moments=True,
        known_failures=(
            "The density varies along the two arcs, on which the true one is even: the score does"
            " not determine the weights of regions that are nearly separated.",
        ),
    ),
    "nce-moons": Entry(
        recipe="toy2d",
        settings={"only": ("moons", "NCE")},
        model="moons-NCE",
        title="A network 2-128-128-1 as an energy, trained on two moons by noise contrast.",
        description="Noise-contrastive estimation with 4 draws of a normal distribution for each"
        " example. The energy is a network plus a Gaussian envelope. log Z is by quadrature.",
        data=MOONS,
        log_z=INTEGRATED,
        metrics=(MOONS_KL,),
        picture=plane,
        draws=moons_draws,
        moments=True,
    ),
    "nice-double-well": Entry(
        recipe="boltzmann_flows",
        settings={"only": ("double-well",), "seeds": 1},
        model="double-well-{seed}",
        title="NICE with one auxiliary variable, fitted to the double well x^4 - 4 x^2 + x.",
        description="A flow: it draws independent samples, and importance weights correct them."
        " Its log Z is 0; that of the double well, 5.032284, is estimated by the weights.",
        data=zoo.Data(
            name="none: fitted to the energy pyroebm.targets.DoubleWell",
            binarization="none",
            license="none",
            source="none",
            ships=True,
        ),
        log_z=(Stated("log Z", "normalized"),),
        metrics=(
            Stated(
                "J_R, a bound on the KL divergence to the double well", "augmented_divergence", WELL
            ),
            Stated("effective sample size / number of draws", "importance_efficiency", WELL),
            Stated("log Z of the double well, less the true one", "importance_log_z_error", WELL),
            Stated(
                "mass of the right well without weights",
                "mode_mass",
                {**WELL, "mode": 1},
                note="the truth is 0.06648",
            ),
        ),
        picture=wells,
        known_failures=(
            "The importance weights have a heavy tail (Pareto k of 0.56 in one sample of 100,000):"
            " a single draw can move the estimate of log Z by 0.01, and its error shows it.",
        ),
    ),
}


def train(name: str, entry: Entry, seed: int, out: Path, progress: bool | None) -> Path:
    """Run the recipe of an entry unless it has finished with these settings; return its folder."""
    folder = out / name / f"seed-{seed}"
    marker, asked = folder / "settings.json", json.dumps([entry.recipe, entry.settings, seed])
    if not marker.is_file() or marker.read_text(encoding="utf-8") != asked:
        recipe = importlib.import_module(f"models.{entry.recipe}")
        recipe.main(seed=seed, out=folder, progress=progress, **entry.settings)
        marker.write_text(asked, encoding="utf-8")
    return folder


def evaluate(
    stated: Sequence[Stated], model: nn.Module, log_z: Sequence[Estimate], reference: Tensor | None
) -> list[Estimate]:
    """Compute the stated numbers of a model."""
    return [
        zoo.compute(
            each.computation,
            zoo.Context(
                model,
                log_z,
                None if each.data is None else zoo.load_data(each.data),
                reference,
                seeded_generator(0),
            ),
            each.arguments,
        )
        for each in stated
    ]


def metrics(
    stated: Sequence[Stated], found: Sequence[Sequence[Estimate]]
) -> tuple[zoo.Metric, ...]:
    """Return the metrics of a card, from the estimates of each seed."""
    return tuple(
        zoo.Metric(
            name=each.name,
            value=seeds[0].value,
            standard_error=seeds[0].standard_error,
            kind=seeds[0].kind,
            computation=each.computation,
            arguments=each.arguments,
            data=each.data,
            over_seeds=tuple(estimate.value for estimate in seeds),
            note=each.note,
        )
        for each, seeds in zip(stated, zip(*found, strict=True), strict=True)
    )


def kept_draws(folder: Path) -> Draws | None:
    """Return the reference draws that an entry already has; None if it has none."""
    if not (folder / REFERENCE).is_file():
        return None
    found = {check.name: check.value for check in zoo.card(folder).checks}
    return Draws(zoo.reference_draws(folder), int(found["divergences"]))


def make(name: str, out: Path, entries: Path, progress: bool | None) -> zoo.Card:
    """Train, evaluate and write an entry.

    Raises:
        ValueError: if the folder has an entry of this name with another density, or if the
            reference draws do not meet a criterion.
    """
    entry, folder = ENTRIES[name], entries / name
    trained = [train(name, entry, seed, out, progress) for seed in entry.seeds]
    files = [
        where / f"{entry.model.format(seed=seed)}.safetensors"
        for seed, where in zip(entry.seeds, trained, strict=True)
    ]
    if (folder / MODEL).is_file() and file_checksum(folder / MODEL) != file_checksum(files[0]):
        raise ValueError(
            f"{folder} has an entry with another density, and a changed density is a new name:"
            " rename the new entry, or remove the folder if it was never released"
        )
    models = [load(file).double().requires_grad_(False) for file in files]
    draws = None if entry.draws is None else kept_draws(folder) or entry.draws(models[0])
    reference = None if draws is None else draws.x
    checks: tuple[zoo.Check, ...] = ()
    if draws is not None:
        checks = zoo.check_draws(models[0], draws.x, draws.num_divergences)
        if entry.moments:
            checks += (zoo.compare_moments(models[0], draws.x),)
    log_z = [evaluate(entry.log_z, model, (), reference) for model in models]
    found = [
        evaluate(entry.metrics, model, z, reference) for model, z in zip(models, log_z, strict=True)
    ]
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    with torch.no_grad():
        entry.picture(models[0], torch.empty(0) if reference is None else reference, ax)
    fig.savefig(out / name / "draws.png", dpi=120)
    plt.close(fig)
    if failed := [check for check in checks if not check.passed]:
        raise ValueError(f"the reference draws of {name} must meet their criteria, got {failed}")

    folder.mkdir(parents=True, exist_ok=True)
    copy_file(files[0], folder / MODEL)
    names = [MODEL]
    if draws is not None:
        zoo.write_draws(models[0], draws.x, folder / REFERENCE)
        names.append(REFERENCE)
    seconds = json.loads((trained[0] / "metrics.json").read_text(encoding="utf-8"))["seconds"]
    model = models[0]
    energy = FlowEnergy(model) if isinstance(model, Flow) else model
    card = zoo.Card(
        name=name,
        title=entry.title,
        description=entry.description,
        model=type(model).__name__,
        event_shape=tuple(energy.event_shape),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=sum((folder / file).stat().st_size for file in names),
        data=entry.data,
        training=zoo.Training(
            command=f"python -m models.zoo {name}",
            recipe=f"models.{entry.recipe}",
            settings=entry.settings,
            seeds=entry.seeds,
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            minutes=round(seconds / 60.0, 2),
            versions={
                "Python": platform.python_version(),
                "torch": torch.__version__,
                "pyroebm": pyroebm.__version__,
            },
        ),
        log_z=metrics(entry.log_z, log_z[:1]),  # of other densities it has no meaning
        metrics=metrics(entry.metrics, found),
        checks=checks,
        known_failures=entry.known_failures,
        files={file: file_checksum(folder / file) for file in names},
    )
    card.write(folder / CARD)
    return card


def table(cards: Sequence[zoo.Card]) -> str:
    """Return the README's table of all entries."""
    lines = ["| entry | model and data | log Z | first metric | spread over seeds | size |"]
    lines.append("|---|---|---|---|---|---|")
    for card in cards:
        first = card.metrics[0]
        spread = "" if first.spread is None else f"{first.spread:.2g}"
        log_z = ", ".join(shown(metric) for metric in card.log_z)
        page = f"pyroebm/zoo/entries/{card.name}/card.md"
        lines.append(
            f"| [`{card.name}`]({page}) | {card.title} | {log_z} | {first.name}: {shown(first)} |"
            f" {spread} | {card.num_bytes / 1024:.0f} KiB |"
        )
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Return what the README and every card.md must contain."""
    cards = [zoo.card(name) for name in zoo.list() if (PACKAGED / name).is_dir()]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {README: f"{before}{BEGIN}\n{table(cards)}\n{END}{after}"}
    for card in cards:
        wanted[PACKAGED / card.name / "card.md"] = zoo.card_markdown(card)
    return wanted


def write_pages() -> None:
    """Write the README's table and every card.md from the cards."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    table: bool = False,
    out: Path = Path("runs/zoo"),
    progress: bool | None = None,
) -> None:
    """Make entries, and write the README's table and the pages of all cards.

    Args:
        names: entries to make.
        table: write the table and the pages without making an entry.
        out: folder of the trainings and of a picture of the draws.
        progress: show progress; None shows that of what takes longer than a second.
    """
    if unknown := [name for name in names if name not in ENTRIES]:
        raise ValueError(f"names must be of {', '.join(ENTRIES)}, got {', '.join(unknown)}")
    if not names and not table:
        raise ValueError(f"give names of {', '.join(ENTRIES)}, or --table")
    for name in names:
        card = make(name, out, PACKAGED, progress)
        for metric in (*card.log_z, *card.metrics):
            print(f"{name}: {metric.name} {shown(metric)}, over seeds {metric.over_seeds}")
    write_pages()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    tyro.cli(main)
