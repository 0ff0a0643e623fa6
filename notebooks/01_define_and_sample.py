# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Define an energy, sample it, diagnose convergence
#
# An energy-based model is a density known up to a constant,
# $$p(x) = \frac{e^{-E(x)}}{Z}, \qquad Z = \int e^{-E(x)}\,dx .$$
# This notebook defines an energy $E$, draws samples from it, and checks their convergence. The example is a double well,
# $E(x) = x^4 - 4x^2 + x$, whose left well is deeper. The quantity of interest is the probability of the right well.

# %%
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyroebm import MCMC, NUTS, Boltzmann, Energy
from pyroebm.core import PotentialFn
from pyroebm.diagnostics import arviz, mcse_mean
from pyroebm.kernels import WindowAdaptation
from pyroebm.ppl import initial_states
from pyroebm.targets import DoubleWell as KnownDoubleWell

az = arviz()  # ArviZ, without its notice about the next release
warnings.filterwarnings("ignore", category=UserWarning, module="arviz")

# %% [markdown]
# ## An energy in five lines
#
# `forward` maps a batch of events to a batch of energies: `(*batch, *event)` to `(*batch)`. A scalar variable has the event shape `()`.


# %%
class DoubleWell(Energy):
    event_shape = ()

    def forward(self, x):
        return x**4 - 4 * x**2 + x


energy = DoubleWell().double()  # an energy has a dtype and a device, even without parameters
energy(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))

# %%
grid = torch.linspace(-2.3, 2.1, 300, dtype=torch.float64)
ax = plt.subplots(figsize=(5, 3), layout="constrained")[1]
ax.plot(grid, energy(grid), color="black")
ax.set(xlabel="x", ylabel="E(x)", ylim=(-7, 4), title="double well")
# %% [markdown]
# ## Many chains at once
#
# 64 chains of NUTS run in one process. Warm-up adapts the step size of each chain, and a metric from the draws of all chains.

# %%
mcmc = MCMC(NUTS(), num_samples=1000, warmup_steps=300, num_chains=64, seed=0)
mcmc.run(energy)
mcmc.summary()

# %% [markdown]
# The table is ArviZ's. An $\hat R$ above 1.01 means that the chains do not agree yet. `diagnose` states the problems in words:

# %%
print(mcmc.diagnose())

# %% [markdown]
# Each chain crosses the barrier only about once in a hundred draws, so the fraction of draws in the right well differs between chains.
# ArviZ's rank plot shows this: if all chains had the same distribution, the bars of each chain would have equal heights. Four chains:

# %%
data = mcmc.to_arviz()
az.plot_rank(data.sel(chain=[0, 1, 2, 3]), var_names="x");
# %% [markdown]
# The divergences occur at the steep quartic walls, where the step size that suits the wells is too large. A higher target acceptance rate
# in warm-up makes it smaller. The other problems need more draws: `run_more` continues the chains, and gives the draws of one longer run.

# %%
mcmc = MCMC(NUTS(), 1000, warmup_steps=300, num_chains=64, seed=0, adaptation=WindowAdaptation(target_acceptance=0.95))
mcmc.run(energy)
mcmc.run_more(9000)
data = mcmc.to_arviz()
print(mcmc.diagnose())
az.plot_rank(data.sel(chain=[0, 1, 2, 3]), var_names="x");
# %% [markdown]
# ArviZ's energy plot compares the distribution of the Hamiltonian with that of its changes between draws. If the changes were much
# narrower, the chains would explore the energies slowly. The legend shows the BFMI; values below 0.3 are bad.

# %%
az.plot_energy(data.sel(chain=range(8)));
# %% [markdown]
# ## Compare with exact values
#
# The same energy is one of the targets in `pyroebm.targets`, whose $\log Z$, moments and masses of the wells are known (here by quadrature).

# %%
truth = KnownDoubleWell()
right = (mcmc.get_samples(group_by_chain=True)["x"] > truth.barrier).double()
error = float(mcse_mean(right))
print(f"P(right well): {float(right.mean()):.4f} +- {error:.4f} (one standard error), truth {truth.right_mass:.4f}")
assert abs(float(right.mean()) - truth.right_mass) < 5 * error

# %% [markdown]
# ## The same energy through Pyro's own NUTS
#
# `PotentialFn` makes a potential for Pyro's kernels: a function from a dict of unconstrained values to a scalar. For a constrained support
# it includes the Jacobian, and `transforms` maps the draws back.

# %%
pyro.set_rng_seed(0)
potential = PotentialFn(energy)
theirs = pyro.infer.MCMC(
    pyro.infer.NUTS(potential_fn=potential),
    num_samples=2000,
    warmup_steps=300,
    initial_params=potential.initial_params(),
    transforms=potential.transforms,
    disable_progbar=True,
)
theirs.run()
x = theirs.get_samples(group_by_chain=True)["x"]
print(
    f"P(right well): {float((x > truth.barrier).double().mean()):.3f} +- {float(mcse_mean(x > truth.barrier)):.3f}, from one chain"
)

# %% [markdown]
# ## An energy inside a Pyro model
#
# The distribution `Boltzmann(energy)` can be used as a prior. Here x is observed with noise, as y = 1.2. An energy has no direct sampler, so
# `initial_states` makes Pyro's chains start from `energy.initial()`.


# %%
def model(y):
    x = pyro.sample("x", Boltzmann(energy))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


pyro.set_rng_seed(1)
posterior = pyro.infer.MCMC(pyro.infer.NUTS(initial_states(model)), num_samples=1000, warmup_steps=300, disable_progbar=True)
posterior.run(torch.tensor(1.2, dtype=torch.float64))
x = posterior.get_samples(group_by_chain=True)["x"]

density = torch.exp(-energy(grid) - 2 * (1.2 - grid) ** 2)
density /= torch.trapezoid(density, grid)
ax = plt.subplots(figsize=(5, 3), layout="constrained")[1]
ax.hist(x.flatten().numpy(), bins=50, density=True, color="tab:red", alpha=0.4, label="Pyro's NUTS on the model")
ax.plot(grid, density, color="black", label="exact, by quadrature")
ax.set(xlabel="x", title="posterior given y = 1.2")
ax.legend(frameon=False)

# %% [markdown]
# ## Next steps
#
# `make demo` fits NICE flows to this energy and corrects them by importance sampling. Change `forward` to use another energy, replace
# `NUTS()` by `MALA()` or `HMC()` for another kernel, or use a target with known answers from `pyroebm.targets`.
