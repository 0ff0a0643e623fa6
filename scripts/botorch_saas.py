"""Compare `pyroebm.ppl.botorch.fit_fully_bayesian_model` with BoTorch's own sampler.

It needs a release of BoTorch that samples with NumPyro (0.18 or newer), and prints, for SAAS models
of 12 x 3 and 50 x 20 data, seconds (compilation included) and the agreement of the posterior
predictive mean and variance at 100 test points. Before, it compares log densities at random points
for every kind of model. It writes `build/botorch.json` and exits with 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import torch
from botorch.fit import fit_fully_bayesian_model_nuts
from botorch.models import fully_bayesian
from torch import Tensor

from pyroebm.ppl.botorch import _pyro_model, fit_fully_bayesian_model
from pyroebm.ppl.model import ModelEnergy

SIZES = ((12, 3), (50, 20))


def data(count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs in the unit cube and standardized values that depend on two of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, dim, generator=generator, dtype=torch.float64)
    y = torch.sin(6.0 * x[:, :1]) + x[:, 1:2] ** 2
    y = y + 0.05 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return x, (y - y.mean()) / y.std()


def density_difference(model: Any, num_points: int = 10) -> float:
    """Return the largest relative difference of our density from NumPyro's at random points."""
    from numpyro.infer.util import log_density

    sample, _ = _pyro_model(model.pyro_model)
    energy = ModelEnergy(sample)
    u = 2.0 * torch.rand(num_points, *energy.event_shape, dtype=torch.float64) - 1.0
    values = energy.constrain(u)
    ours = -energy(u)
    for name, transform in (energy.transforms or {}).items():
        part = energy.split(u)[name]
        ours = ours - transform.log_abs_det_jacobian(part, values[name]).reshape(
            num_points, -1
        ).sum(1)
    theirs = []
    for i in range(num_points):
        point = {name: jax.numpy.array(value[i].numpy()) for name, value in values.items()}
        theirs.append(float(log_density(model.pyro_model.sample, (), {}, point)[0]))
    return float((torch.tensor(theirs, dtype=ours.dtype) - ours).abs().max() / ours.abs().max())


def predict(model: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return means and variances at ``x`` of each set of hyperparameters, ``(sets, points)``."""
    with torch.no_grad():
        posterior = model.posterior(x)
        mean, variance = posterior.mean, posterior.variance
    return mean.squeeze(-1).numpy(), variance.squeeze(-1).numpy()


def compare(count: int, dim: int, num_samples: int) -> dict[str, Any]:
    """Fit one model with both, and compare seconds and predictions."""
    x, y = data(count, dim)
    test_x = torch.rand(100, dim, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    options = {"num_samples": num_samples, "thinning": 16}
    found: dict[str, Any] = {"size": f"{count} x {dim}", "num_samples": num_samples}
    predictions = []
    for name in ("pyroebm", "botorch"):
        model = fully_bayesian.SaasFullyBayesianSingleTaskGP(x, y)
        began, cpu = time.monotonic(), time.process_time()
        if name == "pyroebm":
            run = fit_fully_bayesian_model(model, seed=0, progress=False, **options)
            found["divergences"] = int(run.get_stats()["diverging"].sum())
        else:
            fit_fully_bayesian_model_nuts(model, disable_progbar=True, **options)
        found[f"{name}_seconds"] = round(time.monotonic() - began, 1)
        found[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 1)
        predictions.append(predict(model, test_x))
    for what, ours, theirs in zip(("mean", "variance"), *predictions, strict=True):
        # the standard error of a mean over thinned draws, which are nearly independent
        error = np.hypot(*(each.std(0, ddof=1) / len(each) ** 0.5 for each in (ours, theirs)))
        gap = np.abs(ours.mean(0) - theirs.mean(0))
        found[f"{what}_rms_difference"] = float(np.sqrt((gap**2).mean()))
        found[f"{what}_rms_error"] = float(np.sqrt((error**2).mean()))
        found[f"{what}_largest_z"] = float((gap / error).max())
    return found


def main() -> int:
    """Compare densities, then fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--x64", action="store_true", help="let JAX compute in float64")
    parser.add_argument("--out", type=Path, default=Path("build/botorch.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    torch.manual_seed(0)
    x, y = data(12, 3)
    densities = {}
    for cls in (
        fully_bayesian.SaasFullyBayesianSingleTaskGP,
        fully_bayesian.FullyBayesianSingleTaskGP,
        fully_bayesian.FullyBayesianLinearSingleTaskGP,
    ):
        for case, given in {
            "": {},
            ", given noise": {"train_Yvar": 0.01 * torch.ones_like(y)},
            ", warped": {"use_input_warping": True},
            ", two inputs warped": {"use_input_warping": True, "indices_to_warp": [0, 2]},
        }.items():
            densities[cls.__name__ + case] = density_difference(cls(x, y, **given))
    for name, difference in densities.items():
        print(f"{name}: relative difference of densities {difference:.1g}")
    jax.config.update("jax_enable_x64", options.x64)
    results = []
    for size in SIZES:
        results.append(compare(*size, options.num_samples))
        print(results[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"densities": densities, "fits": results}, indent=1) + "\n")
    differ = max(densities.values()) > 1e-10
    return int(
        differ or any(r[f"{w}_largest_z"] > 5.0 for r in results for w in ("mean", "variance"))
    )


if __name__ == "__main__":
    sys.exit(main())
