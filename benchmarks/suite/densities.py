"""Compare the density of each case between the libraries.

`python -m benchmarks.suite.densities [POSTERIORDB]` compares differences of log densities between
random states, in constrained coordinates, so that the choice of unconstrained ones does not matter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_ENABLE_X64", "1")

import jax
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import torch
from numpyro.infer.util import initialize_model, log_density
from pyro import poutine

from benchmarks.suite import in_numpyro, in_pymc, in_pyro
from benchmarks.suite.cases import MODEL_CASES, Array, Case
from benchmarks.suite.posteriordb import posteriordb_cases

__all__ = ["largest_difference"]

State = dict[str, Array]


def _states(case: Case, count: int) -> list[State]:
    """Draw states uniform on (-2, 2) in NumPyro's unconstrained coordinates."""
    keys = jax.random.split(jax.random.PRNGKey(7), count)
    model, arguments = in_numpyro.MODELS[case.name], case.arguments()
    info = initialize_model(keys, model, model_args=arguments, dynamic_args=False)
    found = jax.vmap(info.postprocess_fn)(info.param_info.z)
    return [{name: np.asarray(found[name][i]) for name in case.sites} for i in range(count)]


def _in_numpyro(case: Case, state: State) -> float:
    model = in_numpyro.MODELS[case.name]
    return float(log_density(model, case.arguments(), {}, state)[0])


def _in_pyro(case: Case, state: State) -> float:
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
    model = poutine.condition(in_pyro.MODELS[case.name], data=given)
    arguments = in_pyro.tensors(case.arguments())
    return float(poutine.trace(model).get_trace(*arguments).log_prob_sum())


def _in_pymc(case: Case, states: list[State]) -> list[float]:
    with pm.Model() as model:
        in_pymc.MODELS[case.name](*case.arguments())
    density = model.compile_logp(jacobian=False)
    found = []
    for state in states:
        point, correction = {}, 0.0
        for variable in model.free_RVs:
            if variable.name == "factor":  # the covariance's Cholesky factor, by rows
                (_, scale), rho = state["scales"], state["chol"][1, 0]
                factor = state["scales"][:, None] * state["chol"]
                value = factor[np.tril_indices(2)]
                correction = np.log(scale) - 0.5 * np.log1p(-(rho**2))
            else:
                value = state[variable.name]
            transform = model.rvs_to_transforms[variable]
            if transform is not None:
                value = transform.forward(pt.as_tensor(value), *variable.owner.inputs).eval()
            point[model.rvs_to_values[variable].name] = value
        found.append(float(density(point)) + correction)
    return found


def largest_difference(case: Case, count: int = 8) -> dict[str, float]:
    """Return the largest relative difference from NumPyro's log densities, up to a constant."""
    torch.set_default_dtype(torch.float64)
    states = _states(case, count)
    truth = np.array([_in_numpyro(case, state) for state in states])
    others: dict[str, Any] = {"pyro": [_in_pyro(case, state) for state in states]}
    if case.name in in_pymc.MODELS:
        others["pymc"] = _in_pymc(case, states)
    scale = np.abs(truth - truth[0]).max() + 1.0
    return {
        name: float(np.abs((np.array(values) - values[0]) - (truth - truth[0])).max() / scale)
        for name, values in others.items()
    }


def main() -> int:
    cases = MODEL_CASES | (posteriordb_cases(Path(sys.argv[1])) if sys.argv[1:] else {})
    wrong = 0
    for case in cases.values():
        found = largest_difference(case)
        wrong += any(not difference < 1e-8 for difference in found.values())
        told = ", ".join(f"{name} {difference:.1e}" for name, difference in found.items())
        print(f"{case.name}: relative difference from numpyro: {told}", flush=True)
    print(f"{wrong} of {len(cases)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
