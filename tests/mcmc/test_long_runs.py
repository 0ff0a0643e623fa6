"""Long runs: blocks, checkpoints in files, draws that stream, several processes. Stopped and
resumed equals uninterrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lib.counted import Stops, driven
from lib.discrete_cases import DISCRETE
from lib.discrete_cases import build as discrete_energy
from lib.kernel_cases import KERNELS, build
from lib.scripts import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyroebm import HMC, MALA, MCMC, NUTS, ChEES, Energy, ModelEnergy, open_run
from pyroebm.core.compilation import CompiledGradient
from pyroebm.core.files import FileError
from pyroebm.core.serialization import from_text, pack, to_text, unpack
from pyroebm.kernels import Kernel, LockstepNUTS
from pyroebm.mcmc import chains as record
from pyroebm.mcmc import sampler as driver
from pyroebm.mcmc.chains import Layout
from pyroebm.mcmc.storage import Store
from pyroebm.targets import DoubleWell, Exponential
from pyroebm.training import distributed


def assert_same(a: MCMC, b: MCMC) -> None:
    """Every draw and every statistic, warm-up included, bit for bit."""
    for warmup in (False, True):
        left, right = (
            {**m.get_samples(group_by_chain=True, warmup=warmup), **m.get_stats(warmup)}
            for m in (a, b)
        )
        assert set(left) == set(right)
        for name, value in left.items():
            assert torch.equal(value, right[name]), (name, warmup)


# Blocks


def test_a_chain_does_not_depend_on_the_blocks_beside_its_own() -> None:
    few, many = driven(NUTS(), 3), driven(NUTS(), 8)
    few.run(Stops())
    many.run(Stops())
    a, b = (m.get_samples(group_by_chain=True)["x"] for m in (few, many))
    assert b.shape == (8, 6, 2)
    assert torch.equal(a, b[:3])
    assert not torch.equal(b[:3], b[3:6])
    assert len({float(kernel.step_size) for kernel in many.kernels}) == 3  # type: ignore[attr-defined]
    assert many.kernel is many.kernels[0]
    assert many.state.grad.shape == (8, 2)
    assert torch.equal(many.state.x, b[:, -1])


def test_starting_states_are_dealt_to_their_chains() -> None:
    x = torch.arange(16.0, dtype=torch.float64).reshape(8, 2) / 10
    mcmc = driven(MALA(1e-9), adaptation=None, warmup_steps=0)
    mcmc.run(Stops().double(), x)
    torch.testing.assert_close(
        mcmc.get_samples(group_by_chain=True)["x"][:, 0], x, atol=1e-6, rtol=0
    )


def test_ctrl_c_finds_the_blocks_equally_far_and_nothing_is_lost() -> None:
    whole = driven(MALA(0.5), adaptation=None, warmup_steps=0)
    whole.run(Stops())
    for at in range(24, 30):  # anywhere within a draw, in any block
        mcmc = driven(MALA(0.5), adaptation=None, warmup_steps=0)
        with pytest.warns(
            RuntimeWarning, match="interrupted during sampling: [34] draws of each chain"
        ):
            mcmc.run(Stops(at))
        counts = [block.record.count for block in mcmc._batches]
        assert max(counts) - min(counts) <= 1
        assert mcmc.get_samples(group_by_chain=True)["x"].shape == (8, min(counts), 2)
        mcmc.resume()
        assert_same(mcmc, whole)


def test_the_layout_gives_every_block_to_one_rank() -> None:
    for chains, world in ((640, 3), (130, 3), (64, 1)):
        layouts = [Layout(chains, 64, (rank, world)) for rank in range(world)]
        assert [
            chain
            for layout in layouts
            for block in layout.batches
            for chain in layout.chains(block)
        ] == list(range(chains))
        sizes = [len(layout.batches) for layout in layouts]
        assert max(sizes) - min(sizes) <= 1
    # none of one chain beside others
    for chains, blocks in ((1, [1]), (64, [64]), (65, [65]), (66, [64, 2]), (129, [64, 65])):
        layout = Layout(chains)
        assert [len(layout.chains(block)) for block in layout.batches] == blocks
    assert [len(Layout(3, 1).chains(block)) for block in Layout(3, 1).batches] == [1, 1, 1]
    for ranks in ((1, 1), (-1, 2), (0, 4), (0, 0)):
        with pytest.raises(ValueError, match=r"ranks must be \(rank, world\)"):
            Layout(130, 64, ranks)
    with pytest.raises(ValueError, match="seed must be given"):
        MCMC(NUTS(), 5, num_chains=128, ranks=(0, 2))
    with pytest.raises(ValueError, match="chain_batch_size must be an integer of at least 1"):
        MCMC(NUTS(), 5, chain_batch_size=0)


def test_a_chain_left_over_is_warmed_up_with_others() -> None:
    mcmc = MCMC(ChEES(), 2, 5, num_chains=9, seed=0, chain_batch_size=4, progress=False)
    mcmc.run(Stops())
    assert [len(block.state.x) for block in mcmc._batches] == [4, 5]


# Stopped and resumed equals uninterrupted


def assert_resumes(kernel: Kernel, energy: Callable[[], Energy], folder: Path) -> None:
    """Ctrl-C at some evaluation of the warm-up or of the sampling, all that is known to a file, and
    on in another object."""
    marks: list[int] = []

    def watched(at: int = -1) -> tuple[Energy, list[None]]:
        made, calls = energy(), list[None]()

        def look(*_: object) -> None:
            calls.append(None)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)

        made.register_forward_pre_hook(look)
        return made, calls

    counted, calls = watched()

    whole = driven(kernel, 5)
    whole._take_turns = lambda *a: marks.extend(
        (len(calls), MCMC._take_turns(whole, *a), len(calls))[::2]
    )  # type: ignore
    whole.run(counted)
    begun, warm, _, total = marks
    for at in (begun + (warm - begun) // 3, warm - 5, (warm + total) // 2):
        broken = driven(kernel, 5)
        with pytest.warns(RuntimeWarning, match="interrupted during"):
            broken.run(watched(at)[0])
        save_file(broken.state_dict(), folder / "state.safetensors")
        other = driven(kernel, 5, seed=99)
        other.load_state_dict(load_file(folder / "state.safetensors"), energy())
        other.resume()
        assert_same(other, whole)


@pytest.mark.parametrize("name", KERNELS)
def test_stopped_saved_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    assert_resumes(build(name, (2,)), lambda: Stops().double(), tmp_path)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_kernels_resume_as_if_uninterrupted(name: str, tmp_path: Path) -> None:
    assert_resumes(DISCRETE[name](), lambda: discrete_energy(name, "bits"), tmp_path)


def test_each_block_tunes_a_ladder_of_its_own() -> None:
    mcmc = driven(build("tempering", (2,)), 6)
    mcmc.run(Stops().double())
    first, second = (kernel.betas for kernel in mcmc.kernels)  # type: ignore[attr-defined]
    assert not torch.equal(first, second)
    assert mcmc.state.replica.shape == (6, 3)
    assert torch.equal(mcmc.state.inner.x[:, 0], mcmc.state.x)


class Ends(MCMC):
    """Ctrl-C after turn 40 of the warm-up."""

    def _after_turn(self, label: str, turn: int) -> None:
        super()._after_turn(label, turn)
        if label == "warm-up" and turn == 40:
            raise KeyboardInterrupt


def test_a_compiled_run_resumes_from_its_folder_as_if_uninterrupted(tmp_path: Path) -> None:
    energy = DoubleWell()
    settings = {"warmup_steps": 62, "num_chains": 6, "chain_batch_size": 3, "compile": True}
    whole = MCMC(MALA(), 6, seed=5, **settings)
    broken = Ends(MALA(), 6, seed=5, **settings)
    again = MCMC(MALA(), 6, **settings)
    whole.run(energy)
    with pytest.warns(RuntimeWarning, match="interrupted during warm-up"):
        broken.run(energy, store=tmp_path)
    again.resume(energy, tmp_path)
    assert again.compiled
    assert_same(again, whole)


@pytest.mark.parametrize("forgotten", ["rng", "adaptation_state", "kernel"])
def test_mutants_that_forget_a_part_of_the_state_are_caught(forgotten: str) -> None:
    whole = driven(HMC())
    broken = driven(HMC())
    other = driven(HMC())
    early = driven(HMC())
    whole.run(Stops())
    for mcmc, at in ((broken, 500), (early, 200)):
        with pytest.warns(RuntimeWarning, match="interrupted during warm-up"):
            mcmc.run(Stops(at))
    state, older = broken.state_dict(), early.state_dict()
    if forgotten == "rng":
        state["0.rng"] = older["0.rng"]
    else:
        said, old = from_text(state["0.metadata"]), from_text(older["0.metadata"])
        state["0.metadata"] = to_text(said | {forgotten: old[forgotten]})
        state |= {k: v for k, v in older.items() if k.startswith(f"0.{forgotten}")}
    other.load_state_dict(state, Stops())
    other.resume()
    with pytest.raises(AssertionError):
        assert_same(other, whole)


def test_a_state_in_the_midst_of_warm_up_needs_the_same_warm_up() -> None:
    broken = driven(HMC())
    with pytest.warns(RuntimeWarning, match="interrupted during warm-up"):
        broken.run(Stops(100))
    with pytest.raises(
        ValueError, match=r"^warmup_steps differs: 62 in the state, 63 here; constr"
    ):
        driven(HMC(), warmup_steps=63).load_state_dict(broken.state_dict(), Stops())
    with pytest.raises(ValueError, match="finished its warm-up"):
        broken.run_more(3)
    with pytest.raises(ValueError, match="nothing to resume"):
        driven(HMC()).resume()
    with pytest.raises(ValueError, match="energy and store, or neither"):
        driven(HMC()).resume(Stops())


def test_what_is_packed_comes_back_as_it_was_and_strangers_are_refused() -> None:
    tensors: dict[str, Tensor] = {}
    value = {
        "kernel": NUTS(step_size=0.3, inverse_mass=torch.ones(2)),
        "list": [1, 2.5, None, True, "a"],
        "pair": (torch.zeros(1), ()),
    }
    said = json.loads(json.dumps(pack(value, "v", tensors)))
    back = unpack(said, {"kernel": NUTS()}, tensors)
    assert back["list"] == value["list"]
    assert isinstance(back["pair"], tuple)
    assert back["kernel"].step_size == 0.3
    assert torch.equal(back["kernel"].inverse_mass, torch.ones(2))
    assert from_text(to_text(said)) == said
    with pytest.raises(ValueError, match="holds a NUTS, but a HMC is made of"):
        unpack(pack(NUTS(), "k", {}), HMC(), {})
    with pytest.raises(ValueError, match=r"must hold k\.inverse_mass"):
        unpack(pack(NUTS(inverse_mass=torch.ones(2)), "k", {}), NUTS(), {})


# Streaming


def test_a_run_that_streams_is_the_run_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        driver, "BUFFER_BYTES", 3 * 3 * 58 * 4
    )  # room for four draws of a block of three
    energy = Exponential(2.0).double()
    memory, stored = driven(NUTS(), warmup_steps=10), driven(NUTS(), warmup_steps=10)
    memory.run(energy)
    stored.run(energy, store=tmp_path)
    # memory is bounded whatever the length
    assert {len(block.record.x) for block in stored._batches} == {4, 6}
    assert_same(memory, stored)
    assert str(memory.diagnose()) == str(stored.diagnose())
    a, b = memory.to_arviz(), open_run(tmp_path)
    for group in ("posterior", "sample_stats", "warmup_posterior", "warmup_sample_stats"):
        assert set(a[group].data_vars) == set(b[group].data_vars)
        for name in a[group].data_vars:
            np.testing.assert_array_equal(a[group][name].values, b[group][name].values)
    assert b.posterior.chain.values.tolist() == list(range(8))
    np.testing.assert_allclose(
        np.log(b.posterior["x"]), b.unconstrained_posterior["x"], rtol=1e-12, atol=1e-14
    )
    assert b.attrs["inference_library"] == "pyroebm"
    thin = open_run(tmp_path, thinning=3)
    assert thin.posterior.draw.values.tolist() == [2, 5]
    np.testing.assert_array_equal(thin.posterior["x"], a.posterior["x"][:, 2::3])
    for mcmc in (memory, stored):
        mcmc.run_more(3)
    assert_same(memory, stored)
    assert open_run(tmp_path).posterior["x"].shape == (8, 9)
    later = driven(NUTS(), num_samples=9, warmup_steps=10)
    later.resume(energy, tmp_path)
    assert_same(later, memory)


def test_the_sites_of_a_model_stream_under_their_names(tmp_path: Path) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1))

    energy = ModelEnergy(model)
    whole, stored, later = (driven(NUTS(), 4, warmup_steps=10) for _ in range(3))
    whole.run(energy)
    stored.run(energy, store=tmp_path)
    later.resume(energy, tmp_path)
    assert_same(later, whole)
    a, b = whole.to_arviz().posterior, open_run(tmp_path).posterior
    assert set(b.data_vars) == {"scale", "x"}
    for site in b.data_vars:
        assert a[site].dims == b[site].dims
        np.testing.assert_array_equal(a[site].values, b[site].values)


def test_a_folder_says_what_it_holds_and_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        open_run(tmp_path)
    with pytest.raises(FileError, match="holds no run: start one"):
        driven(MALA()).resume(Stops(), tmp_path)
    half = driven(MALA(), warmup_steps=0, ranks=(0, 2))
    half.run(Stops(), store=tmp_path)
    with pytest.raises(ValueError, match=r"draws of chain batches 0 to 2, got none of \[1, 2\]"):
        open_run(tmp_path)
    for again in (half, driven(MALA(), seed=6, ranks=(1, 2))):
        with pytest.raises(ValueError, match="holds a run already"):
            again.run(Stops(), store=tmp_path)
    with pytest.raises(ValueError, match="thinning must be"):
        open_run(tmp_path, thinning=0)


def test_ranks_may_begin_at_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Store(tmp_path, dict), Store(tmp_path, dict)
    replace, seen = os.replace, list[str]()

    def meanwhile(source: Path, target: Path) -> None:
        seen.append(source.name)
        if len(seen) == 1:
            with second.start(Layout(128, 64, (1, 2)), {"num_chains": 128}):
                pass
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    with first.start(Layout(128, 64, (0, 2)), {"num_chains": 128}):
        pass
    assert len(set(seen)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_part_that_cannot_be_read_is_named_and_not_left_out(tmp_path: Path) -> None:
    driven(MALA(0.5), warmup_steps=0).run(Stops(), store=tmp_path)
    part = next(tmp_path.glob("batch00001-draws-*.nc"))
    part.write_bytes(part.read_bytes()[:500])
    with pytest.raises(FileError, match=r"batch00001-draws-000000000.nc: the file must be a compl"):
        open_run(tmp_path)


def test_a_write_that_is_broken_off_loses_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short() -> MCMC:
        return driven(MALA(0.5), 5, warmup_steps=0, num_samples=3)

    whole = short()
    whole.run(Stops())
    monkeypatch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
    replace = os.replace
    for broken_at in (2, 5, 6, 10, 13):
        folder, calls = tmp_path / str(broken_at), 0

        def dies(source: Path, target: Path, at: int = broken_at) -> None:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise OSError("the machine went down")
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="went down"):
            short().run(Stops(), store=folder)
        monkeypatch.setattr(os, "replace", replace)
        again = short()
        if broken_at == 2:  # before the last block's first state was there
            with pytest.raises(FileError, match=r"no state of chain batch.*start it with run"):
                again.resume(Stops(), folder)
            again.run(Stops(), store=folder)
        else:
            again.resume(Stops(), folder)
        assert_same(again, whole)


def test_a_large_run_says_beforehand_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driven(MALA(), warmup_steps=0).run(Stops())
    assert "GiB" not in capsys.readouterr().err
    # six draws of eight chains of 2 + 4 numbers and 17 bytes
    monkeypatch.setattr(record, "ANNOUNCE_BYTES", 6 * 8 * 41 - 1)
    mcmc = driven(MALA(), warmup_steps=0)
    mcmc.run(Stops())
    assert (
        "6 draws of 8 chains will take 0.0 GiB in memory; run(energy, store=folder)"
        in capsys.readouterr().err
    )
    mcmc.run_more(3)
    assert "9 draws of 8 chains will take" in capsys.readouterr().err


# Processes

KILLED = """
    import itertools, os, signal, sys
    from pyroebm.mcmc import sampler
    from lib.counted import Stops, driven
    from pyroebm import NUTS
    # a clock that is looked at once in every turn of the blocks
    sampler.time.monotonic = itertools.count().__next__
    energy = Stops(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    sampler.CHECKPOINT_EVERY = 4
    driven(NUTS(), 4).run(energy, store=sys.argv[1])
"""
RANK = """
    import sys
    import torch.distributed as dist
    import torch.distributed.nn  # before the group, which it would keep to the end
    from pyroebm.training import distributed
    from lib.counted import Stops, driven
    from pyroebm import NUTS
    method = "file://" + sys.argv[1] + ".rendezvous"
    dist.init_process_group("gloo", init_method=method, rank=int(sys.argv[2]), world_size=2)
    driven(NUTS(), ranks=distributed.ranks()).run(Stops(), store=sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
"""


def start(script: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def test_a_killed_process_loses_no_draw_that_was_written(tmp_path: Path) -> None:
    whole, counted = driven(NUTS(), 4), Stops()
    whole.run(counted)
    process = start(KILLED, str(tmp_path), str(counted.calls - 4))
    assert process.wait(120) == -signal.SIGKILL
    assert len(list(tmp_path.glob("batch00000-warmup-*.nc"))) > 5
    kept = open_run(tmp_path).posterior["x"].values
    assert 0 < kept.shape[1] < 6
    np.testing.assert_array_equal(
        kept, whole.get_samples(group_by_chain=True)["x"][:, : kept.shape[1]]
    )
    again = driven(NUTS(), 4)
    with pytest.warns(RuntimeWarning, match=f"process {process.pid} .* is taken over"):
        again.resume(Stops(), tmp_path)
    assert_same(again, whole)
    assert not [*tmp_path.glob("*.lock"), *tmp_path.glob("*.part")]


KILLED_AT_START = """
    import os, signal, sys
    from lib.counted import Stops, driven
    from pyroebm import MALA
    replace, left = os.replace, int(sys.argv[2])

    def dies(*paths):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = dies
    driven(MALA(0.5), 5, warmup_steps=0, num_samples=3, seed=None).run(Stops(), store=sys.argv[1])
"""


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_start_that_is_killed_is_started_again_as_the_message_says(
    files: int, tmp_path: Path
) -> None:
    """Killed before ``run.json``, before the first state, and before that of the last batch."""
    process = start(KILLED_AT_START, str(tmp_path), str(files))
    assert process.wait(120) == -signal.SIGKILL
    # another seed, as if none is given
    again = driven(MALA(0.5), 5, warmup_steps=0, num_samples=3, seed=6)
    with (
        pytest.warns(RuntimeWarning, match="taken over") if files else contextlib.nullcontext(),
        pytest.raises(FileError, match=r"start (one|it) with (MCMC.)?run"),
    ):
        again.resume(Stops(), tmp_path)
    with contextlib.nullcontext() if files else pytest.warns(RuntimeWarning, match="taken over"):
        again.run(Stops(), store=tmp_path)
    whole = driven(MALA(0.5), 5, warmup_steps=0, num_samples=3, seed=6)
    whole.run(Stops())
    np.testing.assert_array_equal(
        open_run(tmp_path).posterior["x"], whole.get_samples(group_by_chain=True)["x"]
    )
    with pytest.raises(FileError, match="holds a run already: continue it with resume"):
        again.run(Stops(), store=tmp_path)


def test_a_missing_or_foreign_part_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
    short = {"warmup_steps": 0, "num_samples": 3}
    for folder, seed in (("run", 5), ("other", 6)):
        mcmc = driven(MALA(0.5), 3, **short, seed=seed)
        mcmc.run(Stops(), store=tmp_path / folder)
    parts = [f"batch00000-draws-{start:09}.nc" for start in range(3)]
    for part in parts:
        path = tmp_path / "run" / part
        kept = path.read_bytes()
        path.unlink()
        for read in (
            lambda: open_run(tmp_path / "run"),
            lambda: driven(MALA(0.5), 3, **short).resume(Stops(), tmp_path / "run"),
        ):
            with pytest.raises(FileError, match="there is no such file, and") as caught:
                read()
            assert caught.value.path == path
        for wrong in (tmp_path / "other" / part, tmp_path / "run" / parts[part == parts[0]]):
            path.write_bytes(wrong.read_bytes())
            with pytest.raises(FileError, match=r"it must be the part \{'seed': '5', 'batch': 0"):
                open_run(tmp_path / "run")
        path.write_bytes(kept)
    assert open_run(tmp_path / "run").posterior["x"].shape == (3, 3, 2)


def test_a_run_is_resumed_with_its_settings_alone(tmp_path: Path) -> None:
    def like(**changed: Any) -> MCMC:
        settings = {"num_samples": 6, "num_chains": 8, "chain_batch_size": 4, "warmup_steps": 0}
        return MCMC(MALA(0.5), progress=False, **(settings | changed))  # type: ignore[arg-type]

    whole, run = like(seed=5, num_samples=9), like(seed=5)
    wide = like(seed=5, chain_batch_size=8)
    whole.run(Stops())
    run.run(Stops(), store=tmp_path / "run")
    wide.run(Stops(), store=tmp_path / "wide")
    for changed, message in (
        ({"chain_batch_size": 64}, "^chain_batch_size differs: 4 in the folder, 8 here; construct"),
        ({"chain_batch_size": 2}, "^chain_batch_size differs: 4 in the folder, 2 here; construct"),
        ({"seed": 6}, "^seed differs: 5 in the folder, 6 here; construct"),
        ({"num_samples": 5}, "num_samples must be at least 6, .* got num_samples=5"),
    ):
        with pytest.raises(ValueError, match=message):
            like(**changed).resume(Stops(), tmp_path / "run")
    longer = like(num_samples=9)
    longer.resume(Stops(), tmp_path / "run")
    assert longer.seed == 5
    assert_same(longer, whole)
    same = like(chain_batch_size=64)  # above the number of chains: one batch
    same.resume(Stops(), tmp_path / "wide")
    assert_same(same, wide)


def test_a_run_whose_state_was_removed_is_not_continued(tmp_path: Path) -> None:
    run = driven(MALA(0.5), 3, warmup_steps=0, num_samples=3)
    run.run(Stops(), store=tmp_path)
    path = tmp_path / "batch00000.safetensors"
    path.unlink()
    with pytest.raises(FileError, match="there is no such file") as caught:
        run.run_more(2)
    assert caught.value.path == path


def test_a_run_that_another_continued_is_not_continued_from_memory(tmp_path: Path) -> None:
    first, second = (driven(MALA(0.5), 3, warmup_steps=0, num_samples=3) for _ in range(2))
    first.run(Stops(), store=tmp_path)
    second.resume(Stops(), tmp_path)
    second.run_more(2)
    with pytest.raises(FileError, match="another process continued this run"):
        first.run_more(2)
    assert open_run(tmp_path).posterior["x"].shape == (3, 5, 2)


def test_a_run_in_progress_is_not_run_twice(tmp_path: Path) -> None:
    """Neither by another object nor by another process, whose host, process and age are named."""
    said = []

    def again() -> None:
        for call in ("run", "resume"):
            with pytest.raises(FileError, match="in use by another object of this process"):
                getattr(driven(MALA(0.5), 3), call)(Stops(), store=tmp_path)
        script = """
            import sys
            from lib.counted import Stops, driven
            from pyroebm import MALA
            driven(MALA(0.5), 3).resume(Stops(), sys.argv[1])
        """
        process = start(script, str(tmp_path), stderr=subprocess.PIPE)
        said.append(process.communicate(timeout=120)[1].decode())

    driven(MALA(0.5), 3, warmup_steps=0).run(Stops(4, again), store=tmp_path)
    assert f"in use by process {os.getpid()} on {socket.gethostname()}, since" in said[0]
    driven(MALA(0.5), 3, warmup_steps=0).resume(Stops(), tmp_path)


def test_folders_that_cannot_be_written_are_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    energy = Stops()
    with pytest.raises(FileError, match="cannot be written"):
        driven(MALA(0.5)).run(energy, store=tmp_path / "file" / "run")
    assert energy.calls == -(10**9)


def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    whole = driven(NUTS())
    whole.run(Stops())
    processes = [start(RANK, str(tmp_path / "run"), str(rank)) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    np.testing.assert_array_equal(
        open_run(tmp_path / "run").posterior["x"], whole.get_samples(group_by_chain=True)["x"]
    )


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.ranks() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert distributed.ranks() == (2, 3)
    mcmc = MCMC(MALA(), 5, 0, num_chains=6, seed=0, chain_batch_size=2, ranks=distributed.ranks())
    mcmc.run(DoubleWell())
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (2, 5)


def model(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, scale).expand([len(y)]).to_event(1), obs=y)


def branching(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    wide = float(scale.detach()) > 1.0  # runs chain by chain, in Python
    pyro.sample("y", dist.Normal(0.0, scale if wide else scale**2).expand([3]).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore:the model 'branching' cannot be:RuntimeWarning")
@pytest.mark.parametrize("name", ["energy", "hmc", "model", "branching"])
def test_threads_change_no_draw(name: str) -> None:
    y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    energy: Energy = DoubleWell().double()
    if name in ("model", "branching"):
        energy = ModelEnergy({"model": model, "branching": branching}[name], y)
    kernel = HMC() if name == "hmc" else NUTS()
    found = []
    for threads in (1, 3):
        mcmc = MCMC(
            kernel, 12, 25, 7, seed=0, chain_batch_size=2, num_threads=threads, compile=False
        )
        mcmc.run(energy)
        mcmc.run_more(5)
        found.append(next(iter(mcmc.get_samples(group_by_chain=True).values())))
    assert found[0].shape == (7, 17)
    assert torch.equal(*found)


def test_a_run_goes_on_under_the_implementation_that_began_it() -> None:
    mcmc, energy = MCMC(NUTS(), 10, 10, 4, seed=0), DoubleWell().double()
    mcmc.run(energy)
    other = MCMC(LockstepNUTS(), 10, 10, 4, seed=0)
    with pytest.raises(ValueError, match="kernel differs: NUTS in the state, Lockstep"):
        other.load_state_dict(mcmc.state_dict(), energy)


def test_without_numba_chains_move_in_lock_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what numba's chains drew is not continued."""
    energy, state = DoubleWell().double(), None
    found = []
    for has_numba in (True, False):
        monkeypatch.setattr("pyroebm.kernels.nuts.kernel._has_numba", lambda h=has_numba: h)
        mcmc = MCMC(NUTS(), 10, 10, 4, seed=0)
        mcmc.run(energy)
        found.append(mcmc.get_samples()["x"])
        if state is not None:
            with pytest.raises(ValueError, match="runs_ahead differs: True in the state"):
                MCMC(NUTS(), 10, 10, 4, seed=0).load_state_dict(state, energy)
        state = mcmc.state_dict()
    lockstep = MCMC(LockstepNUTS(), 10, 10, 4, seed=0)
    lockstep.run(energy)
    assert torch.equal(found[1], lockstep.get_samples()["x"])
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [5, 20, 40, 60])
def test_a_state_inside_a_window_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, cut: int, dtype: torch.dtype
) -> None:
    """The step sizes that each chain tunes by itself are kept in full."""
    energy = DoubleWell().to(dtype)
    monkeypatch.setattr(MCMC, "_single_steps", True)

    def driven_(**options: Any) -> MCMC:
        return MCMC(NUTS(), 20, 100, 5, seed=0, **options)

    whole, part = driven_(), driven_()
    rest = driven_()
    whole.run(energy)
    after_turn = part._after_turn

    def stop(label: str, turn: int) -> None:
        after_turn(label, turn)
        if label == "warm-up" and turn == cut:
            raise KeyboardInterrupt

    part._after_turn = stop  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="interrupted during warm-up"):
        part.run(energy)
    rest.load_state_dict(part.state_dict(), energy)
    rest.resume()
    assert_same(whole, rest)


def test_threads_take_the_mode_of_the_caller() -> None:
    energy = DoubleWell().double()
    with torch.inference_mode():
        mcmc = MCMC(NUTS(), 5, 5, 4, seed=0, chain_batch_size=2, num_threads=2)
        mcmc.run(energy)
    assert mcmc.get_samples()["x"].shape == (20,)


def test_an_exception_in_a_thread_is_raised_and_leaves_none_behind() -> None:
    class Broken(DoubleWell):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 200:
                raise ZeroDivisionError("broken")
            return super().forward(x)

    before = threading.active_count()
    mcmc = MCMC(NUTS(), 50, 50, 6, seed=0, chain_batch_size=2, num_threads=3, compile=False)
    with pytest.raises(ZeroDivisionError, match="broken"):
        mcmc.run(Broken().double())
    assert threading.active_count() == before


def test_every_size_of_block_is_compiled() -> None:
    mcmc = MCMC(NUTS(), 5, 5, 7, seed=0, chain_batch_size=4, compile=True, progress=False)
    mcmc.run(DoubleWell().double())
    (view,) = {block.moving for block in mcmc._batches}
    assert isinstance(view, CompiledGradient)
    assert set(view._calls) == {torch.Size([4]), torch.Size([3])}
