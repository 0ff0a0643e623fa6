"""Chains and updates of a 2-128-128-1 network, compared with torchebm and ebmkit.

    python -m benchmarks.training [--quick] [--threads N] [--out DIR]

The limit is the time of the matrix products and activations alone. All libraries run alternately in
one process, by default on one core, with the same weights and starts in float32. The results are
milliseconds for 60 Langevin steps of 256 chains, for an update of persistent contrastive divergence
with 20 of them (a batch of 256, Adam), and for 10 trajectories of 10 leapfrog steps; medians of
rounds. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from benchmarks.samplers import QUICK_RESULTS, RESULTS, write
from benchmarks.suite.measure import Row, row
from pyroebm.energies import NeuralEnergy
from pyroebm.kernels import HMC, ULA, CompiledKernel, Kernel
from pyroebm.nn import mlp
from pyroebm.objectives import ReplayBufferCD
from pyroebm.objectives.contrastive import run_chains
from pyroebm.training import Trainer

CHAINS, EPS = 256, 0.1
#: Case: Langevin steps, Langevin steps of an update, trajectories and their leapfrog steps.
WORK = {
    "langevin": {"steps": 60},
    "pcd update": {"steps": 20, "batch": 256},
    "hmc": {"steps": 10, "leapfrogs": 10},
}
Timed = Callable[[], Any]


def net() -> nn.Sequential:
    """Return the network."""
    return mlp(
        2,
        1,
        (128, 128),
        zero_last=False,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )


def starts(n: int = CHAINS) -> Tensor:
    """Return the initial states of the chains."""
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


def bare(x: Tensor, layers: nn.Sequential) -> Tensor:
    """Compute the gradient of the network in x by hand.

    It takes three products forward, three backward, the activations and their derivatives.
    """
    (w1, b1), (w2, b2), (w3, b3) = [
        (layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)
    ]
    a1 = torch.addmm(b1, x, w1.mT)
    a2 = torch.addmm(b2, nn.functional.silu(a1), w2.mT)
    torch.addmm(b3, nn.functional.silu(a2), w3.mT)
    back = torch.ops.aten.silu_backward(w3.expand(len(x), -1), a2)
    return torch.ops.aten.silu_backward(back @ w2, a1) @ w1


def limit(gradients: int, update: bool) -> Timed:
    """Compute only the gradients of the chains; for an update, also those of the loss."""
    layers, x = net(), starts()

    def run() -> None:
        with torch.no_grad():
            for _ in range(gradients):
                bare(x, layers)
        if update:
            layers.zero_grad()
            layers(torch.cat([x, x])).mean().backward()

    return run


def our_energy() -> NeuralEnergy:
    """Return the network as an energy of this library."""
    with warnings.catch_warnings():
        # no envelope: the peers' nets have none, and the chains are short
        warnings.simplefilter("ignore", UserWarning)
        return NeuralEnergy(net(), (2,))


def our_chains(kernel: Kernel[Any], steps: int, compiled: bool) -> Timed:
    """Run chains of this library."""
    energy = our_energy()
    x = starts()
    generator = torch.Generator().manual_seed(2)
    kernel = CompiledKernel(kernel) if compiled else kernel
    return lambda: run_chains(energy, kernel, x, steps, generator)


def our_update(compiled: bool) -> Timed:
    """Train by the public loop, with all of its checks; the chains exist already."""
    energy, kernel = our_energy(), ULA(EPS)
    objective = ReplayBufferCD(
        CHAINS, WORK["pcd update"]["steps"], CompiledKernel(kernel) if compiled else kernel
    )
    objective.chains = starts()
    trainer = Trainer(energy, objective, starts(4096), num_steps=10**9, batch_size=CHAINS)
    return trainer.step


def torchebm_model() -> Any:
    """Return the network as a model of torchebm."""
    from torchebm.core import BaseModel

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = self.net(x).squeeze(-1)
            return values

    return Model()


def torchebm_chains(hmc: bool) -> Timed:
    """Run chains of torchebm."""
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    model, x = torchebm_model(), starts()
    if hmc:
        sampler = HamiltonianMonteCarlo(
            model, step_size=EPS, n_leapfrog_steps=WORK["hmc"]["leapfrogs"]
        )
    else:
        sampler = LangevinDynamics(model, step_size=EPS**2 / 2)
    return lambda: sampler.sample(x=x, n_steps=WORK["hmc" if hmc else "langevin"]["steps"])


def torchebm_update() -> Timed:
    """Run an update of torchebm."""
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import LangevinDynamics

    model, data = torchebm_model(), starts()
    objective = ContrastiveDivergence(
        model,
        LangevinDynamics(model, step_size=EPS**2 / 2),
        k_steps=WORK["pcd update"]["steps"],
        persistent=True,
        buffer_size=CHAINS,
        init_steps=0,
        new_sample_ratio=0.0,
        energy_reg_weight=0.0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        objective(data)[0].backward()
        optimizer.step()

    return run


def ebmkit_energy() -> Any:
    """Return the network as an energy of ebmkit."""
    from ebm.nets import MLPEnergy

    energy = MLPEnergy(2, (128, 128))
    energy.net.load_state_dict(copy.deepcopy(net().state_dict()))
    return energy


def ebmkit_chains(hmc: bool) -> Timed:
    """Run chains of ebmkit."""
    import ebm

    energy, x = ebmkit_energy(), starts()
    if hmc:
        sampler = ebm.HMC(EPS, WORK["hmc"]["leapfrogs"], WORK["hmc"]["steps"])
    else:
        sampler = ebm.LangevinDynamics(step_size=EPS**2 / 2, steps=WORK["langevin"]["steps"])
    return lambda: sampler.sample(energy, x)


def ebmkit_update() -> Timed:
    """Run single steps of ebmkit's trainer, with its replay buffer."""
    import ebm

    sampler = ebm.LangevinDynamics(step_size=EPS**2 / 2, steps=WORK["pcd update"]["steps"])
    objective = ebm.ContrastiveDivergence(
        sampler, buffer=ebm.ReplayBuffer(CHAINS, (2,), reinit_prob=0.0)
    )
    trainer, data = ebm.Trainer(ebmkit_energy(), objective, lr=1e-3, device="cpu"), starts(4096)
    return lambda: trainer.fit(data, steps=1, batch_size=CHAINS, verbose=False)


def contestants() -> Iterator[tuple[str, str, str, str, Callable[[], Timed]]]:
    """Return case, distribution, module, method and factory of each entry, the limit first."""
    gradients = {"langevin": 60, "pcd update": 20, "hmc": 100}
    for case in WORK:
        update, hmc = case == "pcd update", case == "hmc"
        bare_run = functools.partial(limit, gradients[case], update)
        yield case, "torch", "torch", "products and activations alone", bare_run
        for compiled in (True, False):
            kernel = HMC(EPS, num_steps=WORK["hmc"]["leapfrogs"]) if hmc else ULA(EPS)
            chains = functools.partial(our_chains, kernel, WORK[case]["steps"], compiled)
            made = functools.partial(our_update, compiled) if update else chains
            name = "fit, PersistentCD" if update else type(kernel).__name__
            yield case, "pyroebm", "pyroebm", f"{name}, {'compiled' if compiled else 'eager'}", made
        for library, module, chains_of, update_of, names in (
            (
                "torchebm",
                "torchebm",
                torchebm_chains,
                torchebm_update,
                ("LangevinDynamics", "HamiltonianMonteCarlo"),
            ),
            ("ebmkit", "ebm", ebmkit_chains, ebmkit_update, ("LangevinDynamics", "HMC")),
        ):
            what = "ContrastiveDivergence, persistent" if update else names[hmc]
            yield (
                case,
                library,
                module,
                what,
                update_of if update else functools.partial(chains_of, hmc),
            )


def measure(calls: int, rounds: int, threads: int) -> list[Row]:
    """Run all entries alternately, round by round.

    The first calls, which may compile, are reported separately.
    """
    torch.set_num_threads(threads)
    ready, first = [], []
    versions = {}
    for case, library, module, what, make in contestants():
        if importlib.util.find_spec(module) is None:
            print(
                f"{case}: {library} {what}: missing, no row (pip install -c"
                " benchmarks/constraints.txt -e '.[bench]')"
            )
            continue
        versions[library] = importlib.import_module(module).__version__
        run = make()
        begin = time.perf_counter()
        run()
        first.append(time.perf_counter() - begin)
        ready.append((case, library, what, run))
    seconds: list[list[float]] = [[] for _ in ready]
    for number in range(rounds + 1):
        for (*_, run), found in zip(ready, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            if number:
                found.append((time.perf_counter() - begin) / calls)
    rows = []
    for (case, library, what, _), found, once in zip(ready, seconds, first, strict=True):
        settings = {
            "method": what,
            "chains": CHAINS,
            "threads": threads,
            "dtype": "float32",
            "statistic": "median, [min, max]",
        }
        settings |= {"repeats": rounds, "calls": calls, **WORK[case]}
        rows.append(row(case, library, "milliseconds", [1e3 * s for s in found], settings))
        if what.endswith("compiled"):
            rows.append(
                row(
                    case,
                    library,
                    "compile_seconds",
                    [once - statistics.median(found)],
                    settings | {"repeats": 1},
                )
            )
        fastest = next(r["value"] for r in rows if r["case"] == case)
        print(
            f"{case}: {library} {what}: {1e3 * statistics.median(found):.2f} ms,"
            f" {fastest / statistics.median(found) / 10:.0f} %"
        )
    return [made | {"version": versions[made["library"]]} for made in rows]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"a few calls, to {QUICK_RESULTS}: no timings"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; set OMP_NUM_THREADS to the same"
    )
    parser.add_argument("--out", type=Path, help=f"folder of training.json (default {RESULTS})")
    options = parser.parse_args()
    rows = measure(*((1, 1) if options.quick else (3, 15)), options.threads)
    path = (options.out or (QUICK_RESULTS if options.quick else RESULTS)) / "training.json"
    write(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
