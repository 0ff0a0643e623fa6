"""Kill a run that streams to a folder, resume it, and read it back.

`python scripts/store_check.py FOLDER`, with pyroebm installed. The draws must be those of an
uninterrupted run in memory, bit for bit, in the store and in a netCDF file.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pyroebm import MALA, MCMC, open_run
from pyroebm.core.statistics import arviz
from pyroebm.mcmc import sampler as sampler_module
from pyroebm.targets import DoubleWell


def sampler() -> MCMC:
    """Return a sampler with two chain batches, which write alternately."""
    return MCMC(MALA(), num_samples=1000, warmup_steps=20, num_chains=6, seed=0, chain_batch_size=3)


def main(folder: str, role: str = "parent") -> int:
    """Run all checks; AssertionError if draws differ.

    The child process runs the part that the parent kills.
    """
    store = Path(folder) / "store"
    if role == "child":
        sampler_module.CHECKPOINT_EVERY = 0.0  # after every turn of the chain batches
        sampler().run(DoubleWell(), store=store)
        return 0
    with subprocess.Popen([sys.executable, __file__, folder, "child"]) as child:
        while len(list(store.glob("*-draws-*.nc"))) < 4:
            if child.poll() is not None:
                raise RuntimeError(f"the run ended with {child.returncode} before it was killed")
            time.sleep(0.01)
        child.kill()
    if child.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {child.returncode} before it was killed")
    killed_at = open_run(store).posterior.sizes["draw"]
    resumed, whole = sampler(), sampler()
    resumed.resume(DoubleWell(), store)
    whole.run(DoubleWell())
    truth = whole.get_samples(group_by_chain=True)["x"].numpy()
    np.testing.assert_array_equal(open_run(store).posterior["x"].values, truth)
    file = str(Path(folder) / "chains.nc")
    whole.to_arviz().to_netcdf(file)
    np.testing.assert_array_equal(arviz().from_netcdf(file).posterior["x"].values, truth)
    print(
        f"killed after {killed_at} of {truth.shape[1]} draws, resumed, opened, written and read:"
        " the same draws"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
