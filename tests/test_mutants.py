"""Mutants of the package's source, each with the tests that must fail on it.

Other mutants are subclasses and patched functions beside the tests that catch them. These are
changes of a line of the source: the package is copied, changed, and the tests run on the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lib.scripts import ROOT

#: Name: (file, what stands there, what the mutant has, tests of which one must fail).
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "the base counts outside the domain too": (
        "partition/estimators.py",
        "value = float(reference.log_z or 0.0) + log_mass + float(each.mean())",
        "value = float(reference.log_z or 0.0) + float(each.mean())",
        "tests/partition/test_hard_cases.py",
    ),
    "reverse AIS ends at the whole base": (
        "partition/annealing.py",
        "path.log_z + log_mass,",
        "path.log_z,",
        "tests/partition/test_hard_cases.py",
    ),
    "a heavy tail has a standard error": (
        "core/statistics.py",
        "if MAX_PARETO_K < k < math.inf:",
        "if False:",
        "tests/partition/test_hard_cases.py",
    ),
    "chains that never moved are a sample": (
        "partition/bridging.py",
        "constant = (draws == draws[:, :1]).flatten(1).all(1)",
        "constant = draws.new_zeros(len(draws), dtype=torch.bool)",
        "tests/partition/test_hard_cases.py",
    ),
    "mass beyond the numbers is not counted": (
        "diagnostics/energy_probes.py",
        "if least is not None and least.share > MAX_LOST_MASS:",
        "if least is not None and least.share > 1.0:",
        "tests/mcmc/test_edges.py",
    ),
    "angles are not wrapped": (
        "core/supports.py",
        "turns = torch.ceil((x - math.pi) / (2.0 * math.pi))",
        "turns = torch.zeros_like(x)",
        "tests/mcmc/test_angles.py",
    ),
    "a negative discriminant of a spline": (
        "flows/zuko_flows.py",
        "torch.where(square <= 0.0, torch.finfo(y.dtype).tiny, square).sqrt()",
        "square.sqrt()",
        "tests/flows/test_architectures.py",
    ),
    "a chain enters where its gradient is not finite": (
        "kernels/stochastic.py",
        "(torch.isfinite(q) & torch.isfinite(ahead)).all(1)",
        "torch.isfinite(q).all(1)",
        "tests/kernels/test_continuous_kernels.py",
    ),
    "two writers share a temporary file": (
        "core/files.py",
        'return path.with_name(f"{path.name}.{os.getpid()}-{next(_TEMPORARY)}.part")',
        'return path.with_name(f"{path.name}.part")',
        "tests/core/test_files.py",
    ),
    "the rate never forgets": (
        "core/progress.py",
        "kept = math.exp(-seconds / RATE_SECONDS)",
        "kept = 1.0",
        "tests/core/test_progress.py",
    ),
    "the rate counts what was done before": (
        "core/progress.py",
        "(self.count - self._done) / seconds",
        "self.count / seconds",
        "tests/core/test_progress.py",
    ),
    "predictive draws share their random numbers": (
        "core/rowwise.py",
        'batched, randomness="different", chunk_size=chunk_size',
        'batched, randomness="same", chunk_size=chunk_size',
        "tests/infer/test_predictive.py",
    ),
    "a number drawn in place is one for all draws": (
        "core/rowwise.py",
        'if getattr(func, "__name__", "") in _RANDOM or any(',
        "if any(",
        "tests/infer/test_predictive.py",
    ),
    "draws of NumPy are shared": (
        "core/rowwise.py",
        "if _foreign_generators() != generators:",
        "if False:",
        "tests/infer/test_predictive.py",
    ),
    "discrete latents ignore the draws": (
        "diagnostics/pyro_model.py",
        "model = poutine.condition(call.model, dict(values))",
        "model = poutine.condition(handler(call.model) if handler else call.model, dict(values))",
        "tests/infer/test_predictive.py",
    ),
    "likelihoods without masks and scales": (
        "diagnostics/pyro_model.py",
        'site["log_prob"], site["log_prob"].new_empty',
        'site["unscaled_log_prob"], site["log_prob"].new_empty',
        "tests/diagnostics/test_pyro_model.py",
    ),
    "chain 10 comes before chain 2": (
        "diagnostics/pyro_model.py",
        'for chain, at in diagnostics["divergences"].items():\n'
        '            stats["diverging"][int(chain.split()[-1]), at] = True',
        'for row, chain in enumerate(sorted(diagnostics["divergences"])):\n'
        '            stats["diverging"][row, diagnostics["divergences"][chain]] = True',
        "tests/diagnostics/test_pyro_model.py",
    ),
    "a plate of another size names a dimension": (
        "diagnostics/pyro_model.py",
        "if batch[at] == frame.size:",
        "if True:",
        "tests/diagnostics/test_pyro_model.py",
    ),
    "fit shows no progress": (
        "training/trainer.py",
        'with Progress(self.num_steps, "fit", show=show, done=self.steps_done) as shown:',
        'with Progress(self.num_steps, "fit", show=False, done=self.steps_done) as shown:',
        "tests/core/test_progress.py",
    ),
    "bytes of images are not divided": (
        "training/data.py",
        "events = events / 255.0",
        "events = events / 1.0",
        "tests/training/test_data.py",
    ),
    "data outside the support": (
        "training/data.py",
        "if not bool(fits.all()):",
        "if False:",
        "tests/training/test_data.py",
    ),
    "a row is counted within its chunk": (
        "training/data.py",
        "else chunk[0], start)",
        "else chunk[0], 0)",
        "tests/training/test_data.py",
    ),
    "validation weighs batches alike": (
        "training/validation.py",
        "number = rows_of(batch)",
        "number = 1",
        "tests/training/test_fit.py",
    ),
    "validation moves the chains": (
        "training/validation.py",
        "objective = copy.deepcopy(self.objective, {id(module): module})",
        "objective = self.objective",
        "tests/training/test_fit.py",
    ),
    "patience never ends": (
        "training/validation.py",
        "self.waited += 1",
        "self.waited = 1",
        "tests/training/test_fit.py",
    ),
    "the best weights are the last": (
        "training/validation.py",
        "if loss < self.lowest:",
        "if True:",
        "tests/training/test_fit.py",
    ),
    "a checkpoint without the best weights": (
        "training/trainer.py",
        "self._validation.restore(kept)",
        "pass",
        "tests/training/test_fit.py",
    ),
    "a recorded kernel is left out": (
        "core/_torch_private.py",
        "for call in tape:",
        "for call in tape[:-1]:",
        "tests/kernels/test_compiled.py",
    ),
    "no cap on step sizes that are shared": (
        "kernels/adaptation/step_size.py",
        "<= math.log(2.0)",
        "<= math.log(1e9)",
        "tests/kernels/test_adaptation.py pyroebm/kernels/adaptation/step_size.py",
    ),
    "starts without a trial": (
        "kernels/adaptation/starts.py",
        "waiting = waiting & ~(finite & info.accepted)",
        "waiting = waiting & ~finite",
        "tests/kernels/test_starts.py",
    ),
    "error bars of few weights": (
        "core/statistics.py",
        "return ess <= min(0.25 * num_samples, ENOUGH)",
        "return ess < 0.0",
        "tests/flows/test_importance.py pyroebm/core/statistics.py",
    ),
    "temperatures evenly in log beta": (
        "kernels/tempering.py",
        "even = np.linspace(0.0, barrier[-1], len(old))",
        "even = barrier",
        "tests/kernels/test_tempering.py",
    ),
    "a chain that moved counts as stuck": (
        "mcmc/chains.py",
        "moves = self.moves + (path[1:] != path[:-1]).unsqueeze(2).flatten(2).any(2).sum(0)",
        "moves = self.moves",
        "tests/kernels/test_starts.py tests/mcmc/test_mcmc.py",
    ),
    "the reference keeps its weight": (
        "core/annealing_path.py",
        "beta * self.energy(x) + (1.0 - beta) * self.reference(x)",
        "beta * self.energy(x) + self.reference(x)",
        "tests/kernels/test_tempering.py tests/test_smc.py",
    ),
    "Stein's identity without its constant": (
        "diagnostics/stein.py",
        "products = (x - x.mean((0, 1))) * s + 1.0",
        "products = (x - x.mean((0, 1))) * s",
        "tests/diagnostics/test_stein.py",
    ),
    "draws after the checkpoint are kept": (
        "mcmc/storage.py",
        "if start >= num_draws:",
        "if start < 0:",
        "tests/mcmc/test_storage.py",
    ),
    "gradient counts of thinned steps are lost": (
        "mcmc/chains.py",
        "n_steps=torch.stack([i.n_steps for i in infos]).sum(0),",
        "n_steps=last.n_steps,",
        "tests/mcmc/test_mcmc.py",
    ),
    "images halved in the first layer too": (
        "nn/conv.py",
        "stride = 1 if k == 0 else 2",
        "stride = 2",
        "tests/nn/test_conv.py",
    ),
    "the first leaf's momentum is left out between the ends": (
        "kernels/nuts/driver.py",
        "way += a - vectors[row, before, i]",
        "way -= vectors[row, before, i]",
        "tests/kernels/test_driver.py",
    ),
    "the newer half is always taken": (
        "kernels/nuts/driver.py",
        "< numbers[row, SUB_WEIGHT] - numbers[row, WEIGHT]:",
        "< np.inf:",
        "tests/kernels/test_driver.py",
    ),
    "half a kick is a kick": (
        "kernels/nuts/driver.py",
        "p = vectors[row, end + 1, i] - 0.5 * step",
        "p = vectors[row, end + 1, i] - 1.0 * step",
        "tests/kernels/test_driver.py",
    ),
    "a leaf weighs as much as any": (
        "kernels/nuts/driver.py",
        "weight = _log_add(numbers[row, SUB_WEIGHT], -error)",
        "weight = _log_add(numbers[row, SUB_WEIGHT], 0.0)",
        "tests/kernels/test_driver.py",
    ),
    "momenta are 5 % too large": (
        "kernels/nuts/driver.py",
        "math.sqrt(-2.0 * math.log(_unit(a)))",
        "1.05 * math.sqrt(-2.0 * math.log(_unit(a)))",
        "tests/kernels/test_driver.py",
    ),
    "what is learned depends on how many steps come together": (
        "kernels/adaptation/windows.py",
        "_on_circle(rows(taken.x[i]), periodic)",
        "_on_circle(rows(taken.x[-1]), periodic)",
        "tests/kernels/test_driver.py",
    ),
    "a checksum is not compared": (
        "core/files.py",
        "if stored != computed:",
        "if False:",
        "tests/core/test_files.py",
    ),
    "shared parameters are apart after loading": (
        "core/saving.py",
        "if key not in self.parameters:",
        "if True:",
        "tests/core/test_saving.py",
    ),
    "what constructors do to their arguments stays": (
        "core/saving.py",
        "parameter.data = self.tensors[key]",
        "pass",
        "tests/core/test_saving.py",
    ),
    "attributes assigned after construction are lost": (
        "core/saving.py",
        'nodes[-1]["attributes"] = writer.changes(module, rebuilt)',
        "writer.changes(module, rebuilt)",
        "tests/core/test_saving.py",
    ),
    "frozen parameters are trained after loading": (
        "core/saving.py",
        'requires_grad_(name not in node["frozen"])',
        "requires_grad_(True)",
        "tests/core/test_saving.py",
    ),
    "constructors use the default dtype of the reader": (
        "core/saving.py",
        "torch.set_default_dtype(_dtype(name))",
        "pass",
        "tests/core/test_saving.py",
    ),
    "a record copies the tensors that the module holds": (
        "core/saving.py",
        "if own is value or _share(own, value) or (held == name and _equal(own, value))",
        "if False",
        "tests/core/test_saving.py",
    ),
    "an argument is each parameter that starts with its values": (
        "core/saving.py",
        "(held == name and _equal(own, value))",
        "_equal(own, value)",
        "tests/core/test_saving.py",
    ),
    "a record follows later writes to an argument": (
        "core/saving.py",
        "value.detach().clone() if first",
        "value.detach() if first",
        "tests/core/test_saving.py",
    ),
    "enumerations are saved as strings": (
        "core/saving.py",
        "type(value) in (bool, int, float, str):",
        "isinstance(value, bool | int | float | str):",
        "tests/core/test_saving.py",
    ),
    "functions of one code are equal": (
        "core/saving.py",
        "and self.same(_bound_values(a), _bound_values(b))",
        "",
        "tests/core/test_saving.py",
    ),
    "a state outside of the support has a density": (
        "core/energy.py",
        "torch.where(valid, -self(torch.where(rows, x, x[valid][0])), -math.inf)",
        "-self(torch.where(rows, x, x[valid][0]))",
        "tests/core/test_arrays.py",
    ),
    "a checkpoint does not know its data": (
        "training/trainer.py",
        '"data": _fingerprint(self._batches),',
        '"data": None,',
        "tests/training/test_training.py",
    ),
    "a checkpoint does not know the target of a flow": (
        "training/checkpoint.py",
        'found[f"{name}.tensors"] = checksum(kept)',
        "pass",
        "tests/training/test_training.py",
    ),
    "a size loads as a tuple": (
        "core/saving.py",
        "return torch.Size(content)",
        "return tuple(content)",
        "tests/core/test_saving.py",
    ),
    "a file's group is read whole": (
        "core/files.py",
        "groups[name] = data.isel(draw=draws).load()",
        "groups[name] = data.load()",
        "tests/core/test_files.py",
    ),
    "the lock of a living process is taken over": (
        "core/files.py",
        "if holder is not None and holder.is_dead():",
        "if holder is not None:",
        "tests/core/test_files.py",
    ),
    "a process is known by its number alone": (
        "core/files.py",
        "return _started(self.pid) != self.started",
        "return False",
        "tests/core/test_files.py",
    ),
    "the checksum of a part is not compared": (
        "core/files.py",
        "if seal.removeprefix(SEAL) != _checksum_of_begin(path, size):",
        "if False:",
        "tests/core/test_damaged_files.py",
    ),
    "a compressed file may take any memory": (
        "core/files.py",
        "if size > limit:",
        "if False:",
        "tests/core/test_damaged_files.py",
    ),
    "threads swap the default generator together": (
        "core/rng.py",
        "    with LOCK:\n        outer = get()",
        "    if True:\n        outer = get()",
        "tests/core/test_rng.py",
    ),
    "a missing part is left out": (
        "mcmc/storage.py",
        "if start != count:",
        "if False:",
        "tests/mcmc/test_long_runs.py",
    ),
    "a start that was killed is a run": (
        "mcmc/storage.py",
        "started = all(",
        "started = any(",
        "tests/mcmc/test_long_runs.py",
    ),
    "updates to infinity pass": (
        "training/trainer.py",
        'return "the updated parameters are not finite"',
        "return None",
        "tests/training/test_blow_ups.py",
    ),
    "weights of a failed step stay": (
        "training/guards.py",
        "self.state.restore(self.kept, learned_only=True)",
        "pass",
        "tests/training/test_blow_ups.py",
    ),
    "a stopped process is waited for": (
        "training/distributed.py",
        "elif time.monotonic() - since > self.timeout:",
        "elif False:",
        "tests/training/test_distributed.py",
    ),
}


def run_on_a_copy(folder: Path, tests: list[str], change: tuple[str, str, str] | None) -> int:
    """The exit code of tests in a copy of the checkout, of which one file may be changed."""
    for name in ("pyroebm", "tests", "scripts"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    if change is not None:
        file, right, wrong = change
        source = (folder / "pyroebm" / file).read_text(encoding="utf-8")
        (folder / "pyroebm" / file).write_text(source.replace(right, wrong), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "MPLBACKEND": "Agg"}
    where = [sys.executable, "-c", "import pyroebm; print(pyroebm.__file__)"]
    imported = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True)
    assert Path(imported.stdout.strip()).is_relative_to(folder), imported.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout[-2000:])
    return done.returncode


@pytest.mark.slow
def test_without_a_change_the_tests_pass(tmp_path: Path) -> None:
    tests = sorted({test for *_, named in MUTANTS.values() for test in named.split()})
    assert run_on_a_copy(tmp_path, tests, None) == pytest.ExitCode.OK


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, tmp_path: Path) -> None:
    *change, tests = MUTANTS[name]
    code = run_on_a_copy(tmp_path, tests.split(), (change[0], change[1], change[2]))
    assert code == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_a_line_that_is_there(name: str) -> None:
    file, right, wrong, tests = MUTANTS[name]
    assert (ROOT / "pyroebm" / file).read_text(encoding="utf-8").count(right) == 1
    assert right != wrong
    assert all((ROOT / test).exists() for test in tests.split())
