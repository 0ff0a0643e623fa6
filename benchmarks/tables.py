"""Write the tables of docs/benchmarks.md from the JSON files of benchmarks/results.

    python -m benchmarks.tables [--results DIR] [--page FILE]

A table is between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a case of
benchmarks/samplers.py, benchmarks/boltzmann.py or benchmarks/flows.py, `training`, `starts`,
`stopwatch`, `examples`, `metrics`, `truth`, `efficiency`, `gradients` or a curve. Its previous
content is replaced. A table without results says "Not measured yet".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

from benchmarks.metrics import METHOD, METRICS
from benchmarks.starts import CASES as STARTS_CASES
from benchmarks.suite.cases import CASES, MODEL_CASES
from benchmarks.suite.example_models import EXAMPLES
from benchmarks.suite.flow_cases import FLOW_CASES
from benchmarks.suite.measure import Row
from benchmarks.suite.posteriordb import DENSITIES

__all__ = ["fill", "read_rows"]

ROOT = Path(__file__).resolve().parents[1]
SLOT = re.compile(r"(<!-- table: (?P<name>[\w -]+) -->\n).*?(<!-- end -->)", flags=re.S)
NOTHING = "Not measured yet.\n"

#: Cases of benchmarks/boltzmann.py.
MACHINE_CASES = ("pcd", "ais")

#: Cases of benchmarks/training.py, which are one table.
TRAINING_CASES = {
    "langevin": "60 Langevin steps",
    "pcd update": "update with 20 Langevin steps",
    "hmc": "10 x 10 leapfrog steps",
}

#: Cases of benchmarks/flows.py that are steps of training of the same additive couplings.
NICE_CASES = ("nice 2", "nice 32")

#: Columns of a fitted flow's table: heading, metric.
FLOW_COLUMNS = (
    ("error of log Z", "log_z_error"),
    ("its s.e.", "log_z_se"),
    ("ESS", "ess"),
    ("forward ESS", "forward_ess"),
    ("EUBO - log Z", "eubo_gap"),
    ("coverage", "coverage_entropy"),
    ("steps", "steps"),
    ("evaluations", "evaluations"),
    ("s", "seconds"),
)

#: Cases of benchmarks/stopwatch.py and benchmarks/metrics.py.
MODEL_TITLES = {name: case.title for name, case in {**MODEL_CASES, **DENSITIES}.items()}

#: The stopwatch's two processes: metric, heading.
STOPWATCH_PHASES = {
    "seconds_empty_caches": "empty caches",
    "seconds_second_process": "second process",
}

#: Columns of the stopwatch's table after its seconds: heading, metric.
STOPWATCH_COLUMNS = (
    ("sampling s", "sampling_seconds"),
    ("gradients", "gradients"),
    ("ESS", "min_ess"),
    ("R-hat", "worst_r_hat"),
    ("divergences", "divergences"),
    ("largest \\|z\\|", "worst_z"),
)

#: Columns of the metrics' table: heading, metric.
METRIC_COLUMNS = (
    ("warm-up gradients", "warmup_gradients"),
    ("gradients", "gradients"),
    ("divergences", "divergences"),
)

#: Columns of a case's table: heading, metric, whether its spread is shown.
COLUMNS = (
    ("ESS/s", "ess_per_second", True),
    ("with warm-up", "ess_per_second_with_warmup", True),
    ("with compiling", "ess_per_second_with_compile", False),
    ("ESS/gradient", "ess_per_gradient", False),
    ("compile s", "compile_seconds", False),
    ("largest \\|z\\|", "worst_z", False),
)


def read_rows(folder: Path) -> list[Row]:
    """Read the results of every JSON file in a folder."""
    return [
        row
        for path in sorted(folder.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def number(value: float | None) -> str:
    """Format a number with three figures and thousands separators; a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:#.3g}".rstrip(".")


def table(headings: list[str], body: list[list[str]]) -> str:
    """Format a Markdown table whose first column is aligned to the left."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _with_spread(row: Row | None, shown: bool) -> str:
    if row is None or row["value"] is None:
        return "-"
    low, high = row["spread"]
    return number(row["value"]) + (
        f" ({number(low)} to {number(high)})" if shown and high > low else ""
    )


def case_table(case: str, rows: list[Row]) -> str:
    """Return a table with one line per sampler and number of chains.

    The ratio is to NumPyro's NUTS with as many chains.
    """
    found: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["case"] == case and row["metric"] != "gradient_us":
            key = (
                row["library"],
                row["version"],
                row["settings"]["method"],
                row["settings"]["chains"],
            )
            found.setdefault(key, {})[row["metric"]] = row
    if not found:
        return NOTHING
    rivals = {
        chains: metrics["ess_per_second"]["value"]
        for (library, _, method, chains), metrics in found.items()
        if (library, method) == ("numpyro", "NUTS")
    }
    body = []
    for (library, version, method, chains), metrics in sorted(
        found.items(), key=lambda item: (item[0][3], item[0])
    ):
        own, rival = metrics["ess_per_second"]["value"], rivals.get(chains)
        ratio = number(own / rival) if own and rival else "-"
        settings = metrics["ess_per_second"]["settings"]
        cells = [_with_spread(metrics.get(metric), shown) for _, metric, shown in COLUMNS]
        told = "".join(f" {name}={value}" for name, value in settings.get("kernel", {}).items())
        body.append(
            [
                f"{library} {version} {method}{told}",
                str(chains),
                cells[0],
                ratio,
                *cells[1:],
                str(settings["repeats"]),
            ]
        )
    headings = [heading for heading, *_ in COLUMNS]
    return table(["sampler", "chains", headings[0], "x NumPyro", *headings[1:], "runs"], body)


def gradients_table(rows: list[Row]) -> str:
    """Return a table of microseconds per gradient, with one line per case."""
    found = {
        (row["case"], row["settings"]["mode"], row["settings"]["chains"]): row
        for row in rows
        if row["metric"] == "gradient_us"
    }
    columns = [(mode, chains) for chains in (1, 256) for mode in ("eager", "compiled")]
    body = [
        [CASES[case].title, *(_with_spread(found.get((case, *column)), True) for column in columns)]
        for case in CASES
        if any(key[0] == case for key in found)
    ]
    return (
        table(["case", *(f"{mode}, {chains} chains" for mode, chains in columns)], body)
        if body
        else NOTHING
    )


def curve_table(name: str, rows: list[Row]) -> str:
    """Return a table of microseconds per leapfrog step of one chain, one line per point."""
    found = sorted(
        (row["settings"]["chains"], row["settings"]["dim"], _with_spread(row, True))
        for row in rows
        if row["case"] == name
    )
    return (
        table(["chains", "dimensions", "us"], [[str(c), str(d), text] for c, d, text in found])
        if found
        else NOTHING
    )


def flow_table(case: str, rows: list[Row]) -> str:
    """Return a table with one line per flow and the columns :data:`FLOW_COLUMNS`.

    With several seeds the range of the error is shown.
    """
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["case"] == case:
            found.setdefault((row["library"], row["version"], row["settings"]["method"]), {})[
                row["metric"]
            ] = row
    body = []
    for (library, version, method), metrics in found.items():
        cells = [
            _with_spread(metrics.get(metric), metric == "log_z_error") for _, metric in FLOW_COLUMNS
        ]
        body.append([f"{library} {version}: {method}", *cells])
    return table(["", *(heading for heading, _ in FLOW_COLUMNS)], body) if body else NOTHING


def nice_table(rows: list[Row]) -> str:
    """Return a table with one line per library: time, speed relative to the limit, compile time."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["case"] in NICE_CASES:
            key = (row["library"], row["version"], row["settings"]["method"])
            found.setdefault(key, {})[row["case"], row["metric"]] = row
    limits = {
        case: metrics[case, "milliseconds"]["value"]
        for metrics in list(found.values())[:1]
        for case in NICE_CASES
    }
    body = []
    for (library, version, method), metrics in found.items():
        cells = [f"{library} {version}: {method}"]
        for case in NICE_CASES:
            own = metrics[case, "milliseconds"]
            cells += [_with_spread(own, True), f"{limits[case] / own['value']:.0%}"]
        body.append([*cells, _with_spread(metrics.get((NICE_CASES[0], "compile_seconds")), False)])
    headings = [
        f"{unit}, D = {case.split()[1]}" for case in NICE_CASES for unit in ("ms", "speed / limit")
    ]
    return table(["batches of 512, float32", *headings, "compile s"], body) if body else NOTHING


def milliseconds_table(case: str, rows: list[Row]) -> str:
    """Return a table with one line per library and its speed relative to the matrix products.

    The row of the products is the first one.
    """
    found = [row for row in rows if row["case"] == case and row["metric"] == "milliseconds"]
    if not found:
        return NOTHING
    limit = next(row["value"] for row in found if row["library"] == "torch")
    body = [
        [
            f"{row['library']} {row['version']}: {row['settings']['method']}",
            row["settings"]["dtype"],
            _with_spread(row, True),
            f"{limit / row['value']:.0%}",
        ]
        for row in found
    ]
    return table(["", "dtype", "ms", "speed / matrix products"], body)


def training_table(rows: list[Row]) -> str:
    """Return a table with one line per case and library.

    The columns are time, speed relative to the limit, and compile time.
    """
    body = []
    for case, title in TRAINING_CASES.items():
        found = {
            (row["library"], row["settings"]["method"], row["metric"]): row
            for row in rows
            if row["case"] == case
        }
        limit = next((row["value"] for key, row in found.items() if key[0] == "torch"), None)
        for (library, method, metric), row in found.items():
            if metric == "milliseconds":
                compiling = found.get((library, method, "compile_seconds"))
                name = f"{library} {row['version']}: {method}"
                share = f"{limit / row['value']:.0%}" if limit else "-"
                body.append(
                    [title, name, _with_spread(row, True), share, _with_spread(compiling, False)]
                )
    return (
        table(["256 chains, float32", "", "ms", "speed / limit", "compile s"], body)
        if body
        else NOTHING
    )


def starts_table(rows: list[Row]) -> str:
    """Return a table with one line per case and rule of benchmarks/starts.py.

    It shows the number of seeds with a stuck chain, and extremes over seeds and chains.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["case"].startswith("starts "):
            found.setdefault((row["case"].removeprefix("starts "), row["settings"]["method"]), {})[
                row["metric"]
            ] = row

    def extreme(metrics: dict[str, Row], name: str, end: int) -> str:
        return (
            number(metrics[name]["spread"][end])
            if name in metrics and metrics[name]["spread"]
            else "-"
        )

    body = []
    for case in STARTS_CASES:
        for method, metrics in (
            (method, metrics) for (known, method), metrics in found.items() if known == case
        ):
            counts = [
                f"{metrics[name]['value']:.0f}" for name in ("seeds_left_behind", "seeds_outside")
            ]
            cells = [
                *counts,
                extreme(metrics, "min_acceptance", 0),
                extreme(metrics, "max_acceptance", 1),
            ]
            cells += [extreme(metrics, name, 1) for name in ("r_hat", "worst_z", "z_of_all_seeds")]
            cells.append(number(metrics["gradients_per_draw"]["value"]))
            body.append(
                [
                    STARTS_CASES[case].title,
                    method,
                    str(metrics["min_acceptance"]["settings"]["repeats"]),
                    *cells,
                ]
            )
    headings = [
        "rule",
        "seeds",
        "seeds with a stuck chain",
        "outside .4 to .98",
        "minimum acceptance",
        "maximum acceptance",
        "largest R-hat",
        "largest \\|z\\| of a seed",
        "z over all seeds",
        "gradients/draw",
    ]
    return table(["case", *headings], body) if body else NOTHING


def stopwatch_table(rows: list[Row]) -> str:
    """Return a table with one line per case and library of benchmarks/stopwatch.py.

    It shows seconds with empty caches and in a second process, each also relative to NumPyro's
    faster mode, and the quality of the draws. The cases in which pyroebm is slower are listed below
    it.
    """
    found: dict[str, dict[tuple[str, str, str], dict[str, Row]]] = {}
    for row in rows:
        if row["case"].startswith("stopwatch "):
            key = (row["library"], row["version"], row["settings"]["method"])
            of_case = found.setdefault(row["case"].removeprefix("stopwatch "), {})
            of_case.setdefault(key, {})[row["metric"]] = row
    compared = 0
    body: list[list[str]] = []
    losses: list[str] = []
    for case, title in MODEL_TITLES.items():
        own = found.get(case, {})
        for (library, version, method), metrics in own.items():
            settings = metrics["seconds_empty_caches"]["settings"]
            steps = f"4 x ({settings['num_warmup']:,} + {settings['num_samples']:,})"
            scale = settings.get("sampling_scaled_by")
            scaled = f", seconds of sampling x {scale}" if scale else ""
            cells = [title, f"{library} {version} {method}, {steps}{scaled}"]
            for phase, label in STOPWATCH_PHASES.items():
                rival = min(
                    (m[phase]["value"] for k, m in own.items() if k[0] == "numpyro"), default=None
                )
                ratio = metrics[phase]["value"] / rival if rival else None
                cells += [_with_spread(metrics[phase], True), number(ratio)]
                if library == "pyroebm" and ratio is not None:
                    compared += 1
                    losses += [f"{title} ({label}: {number(ratio)})"] if ratio > 1.0 else []
            cells += [_with_spread(metrics.get(name), False) for _, name in STOPWATCH_COLUMNS]
            body.append([*cells, str(settings["repeats"])])
    if not body:
        return NOTHING
    headings = [h for label in STOPWATCH_PHASES.values() for h in (f"s, {label}", "/ NumPyro")]
    headings += [heading for heading, _ in STOPWATCH_COLUMNS]
    slower = "; ".join(
        [f"Slower than NumPyro's faster mode in {len(losses)} of {compared}", *losses]
    )
    return f"{table(['case', '', *headings, 'runs'], body)}\n{slower}.\n"


def examples_table(rows: list[Row]) -> str:
    """Return a table with one line per example of Pyro of benchmarks/pyro_examples.py.

    It shows the seconds of both libraries, with ratios, their ESS and R-hat, and the largest
    difference of two means. Below it is what was reached.
    """
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["case"].startswith("example "):
            of_case = found.setdefault(row["case"].removeprefix("example "), {})
            of_case[row["library"], row["metric"]] = row
    body: list[list[str]] = []
    fast = long = 0
    for name, example in EXAMPLES.items():
        if (own := found.get(name)) is None:
            continue
        pyro = own["pyro", "seconds_empty_caches"]
        settings = pyro["settings"]
        steps = f"4 x ({settings['num_warmup']} + {settings['num_samples']})"
        scale = settings.get("sampling_scaled_by")
        notes = ([f"Pyro draws 1/{scale}"] if scale else []) + (
            [f"of {example.reduced}"] if example.reduced else []
        )
        cells = [example.title, ", ".join([steps, *notes]), number(pyro["value"])]
        ratios = []
        for phase in STOPWATCH_PHASES:
            seconds = own["pyroebm", phase]["value"]
            ratios.append(pyro["value"] / seconds)
            cells += [number(seconds), number(ratios[-1])]
        long += pyro["value"] > 60.0
        fast += pyro["value"] > 60.0 and ratios[0] >= 3.0
        for metric in ("min_ess", "worst_r_hat"):
            pair = (own[library, metric]["value"] for library in ("pyro", "pyroebm"))
            cells.append(" / ".join(map(number, pair)))
        body.append([*cells, number(own["pyroebm", "largest_difference"]["value"])])
    if not body:
        return NOTHING
    headings = [h for label in STOPWATCH_PHASES.values() for h in (f"s, {label}", "Pyro's s / s")]
    made = table(
        ["example", "steps", "Pyro s", *headings, "ESS, Pyro / pyroebm", "R-hat", "difference"],
        body,
    )
    said = f"Pyro takes more than a minute on {long} of {len(body)} examples; pyroebm is at least 3"
    return f"{made}\n{said} times as fast, with empty caches, on {fast} of these.\n"


def metrics_table(rows: list[Row]) -> str:
    """Return a table with one line per case and metric of benchmarks/metrics.py.

    It shows ESS per gradient, also relative to the first metric, the cost of warm-up, and the
    quality of the draws. Below it is the median of the ratios over the cases.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["case"].startswith("metrics "):
            metric = row["settings"]["method"].removeprefix(METHOD)
            key = (row["case"].removeprefix("metrics "), metric)
            found.setdefault(key, {})[row["metric"]] = row
    first, *others = METRICS
    ratios: dict[str, list[float]] = {metric: [] for metric in METRICS}
    body: list[list[str]] = []
    for case, title in MODEL_TITLES.items():
        base = found.get((case, first), {}).get("ess_per_gradient")
        for metric in METRICS:
            if (own := found.get((case, metric))) is None:
                continue
            ess = own.get("ess_per_gradient")
            ratio = ess["value"] / base["value"] if ess and base else None
            ratios[metric] += [] if ratio is None else [ratio]
            cells = [_with_spread(own.get(name), False) for _, name in METRIC_COLUMNS]
            r_hat = number(own["worst_r_hat"]["spread"][1]) if "worst_r_hat" in own else "-"
            seeds = str(own["divergences"]["settings"]["repeats"])
            line = [title, metric, _with_spread(ess, True), number(ratio), *cells, r_hat, seeds]
            body.append(line)
    if not body:
        return NOTHING
    headings = [heading for heading, _ in METRIC_COLUMNS]
    made = table(
        [
            "case",
            "metric from",
            "ESS/gradient",
            f"/ {first}",
            *headings,
            "largest R-hat",
            "seeds",
        ],
        body,
    )
    medians = "".join(
        f"\nMedian over {len(ratios[metric])} cases of the ratio of ESS/gradient, {metric} to"
        f" {first}:"
        f" {statistics.median(ratios[metric]):.3f} ({min(ratios[metric]):.3f} to"
        f" {max(ratios[metric]):.3f}).\n"
        for metric in others
        if ratios[metric]
    )
    return made + medians


def efficiency_table(rows: list[Row]) -> str:
    """Return a table of ESS per gradient, with one line per case and one column per rule."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["case"].startswith("efficiency "):
            found.setdefault(
                (row["case"].removeprefix("efficiency "), row["settings"]["method"]), {}
            )[row["metric"]] = row["value"]
    rules = list(dict.fromkeys(method for _, method in found))
    body = []
    for case in dict.fromkeys(case for case, _ in found):
        cells = []
        for rule in rules:
            own = found.get((case, rule))
            cells.append(
                f"{own['ess_per_gradient']:.4f} +- {own['standard_error']:.4f}" if own else "-"
            )
        body.append([CASES[case].title, *cells])
    return table(["ESS/gradient, 64 chains", *rules], body) if body else NOTHING


def truth_table(rows: list[Row]) -> str:
    """Return a table with one line per case, method and number of chains of benchmarks/truth.py."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["case"].startswith("truth "):
            settings = row["settings"]
            key = row["case"].removeprefix("truth "), settings["method"], settings["chains"]
            found.setdefault(key, {})[row["metric"]] = row
    body = [
        [
            MODEL_TITLES[case] + method.removeprefix("NUTS"),
            str(chains),
            *(number(metrics[name]["value"]) for name in ("worst_z", "divergences", "worst_r_hat")),
            str(metrics["worst_z"]["settings"]["repeats"]),
        ]
        for (case, method, chains), metrics in found.items()
    ]
    headings = ["case", "chains", "largest \\|z\\|", "divergences", "R-hat", "seeds"]
    return table(headings, body) if body else NOTHING


def fill(page: str, rows: list[Row]) -> str:
    """Return the page with every table replaced.

    Raises:
        ValueError: if a marker names no table.
    """

    def made(slot: re.Match[str]) -> str:
        name = slot["name"]
        if name in CASES:
            text = case_table(name, rows)
        elif name.endswith(" curve"):
            text = curve_table(name, rows)
        elif name in MACHINE_CASES:
            text = milliseconds_table(name, rows)
        elif name in FLOW_CASES:
            text = flow_table(name, rows)
        elif name == "nice":
            text = nice_table(rows)
        elif name == "training":
            text = training_table(rows)
        elif name == "starts":
            text = starts_table(rows)
        elif name == "stopwatch":
            text = stopwatch_table(rows)
        elif name == "examples":
            text = examples_table(rows)
        elif name == "metrics":
            text = metrics_table(rows)
        elif name == "truth":
            text = truth_table(rows)
        elif name == "efficiency":
            text = efficiency_table(rows)
        elif name == "gradients":
            text = gradients_table(rows)
        else:
            raise ValueError(f"a marker must name a case, a curve or `gradients`, got `{name}`")
        return f"{slot[1]}\n{text}\n{slot[3]}"

    return SLOT.sub(made, page)


def main() -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=ROOT / "docs" / "benchmarks.md",
        help="Markdown file with markers",
    )
    options = parser.parse_args()
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(fill(page, read_rows(options.results)), encoding="utf-8")
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
