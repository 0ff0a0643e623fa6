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
# # Define an energy, sample it, see whether it mixed
#
# An energy-based model is a density known up to a constant,
# $$p(x) = \frac{e^{-E(x)}}{Z}, \qquad Z = \int e^{-E(x)}\,dx .$$
# You write the energy $E$; the rest is sampling, and knowing when to believe the samples. The energy of this page is a double well,
# $E(x) = x^4 - 4x^2 + x$: two valleys, the left one deeper. How much of the probability is in the right one?

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

az = arviz()  # ArviZ, without its announcement of the next release
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


energy = DoubleWell().double()  # parameters or not, an energy has a dtype and a device
energy(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))

# %%
grid = torch.linspace(-2.3, 2.1, 300, dtype=torch.float64)
ax = plt.subplots(figsize=(5, 3), layout="constrained")[1]
ax.plot(grid, energy(grid), color="black")
ax.set(xlabel="x", ylabel="E(x)", ylim=(-7, 4), title="two wells, one barrier")
# %% [markdown]
# ## Many chains at once
#
# 64 chains of NUTS in one process. Warm-up finds a step size and a metric from all chains together.

# %%
mcmc = MCMC(NUTS(), num_samples=1000, warmup_steps=300, num_chains=64, seed=0)
mcmc.run(energy)
mcmc.summary()

# %% [markdown]
# The table is ArviZ's. Look at $\hat R$: above 1.01 the chains do not agree with each other yet. The diagnosis says it in words:

# %%
print(mcmc.diagnose())

# %% [markdown]
# Each chain crosses the barrier only every hundred draws or so, so the time it happened to spend on the right still differs from chain
# to chain. ArviZ's rank plot shows it: if all chains saw the same distribution, every chain's bars would be level. Here are four of them.

# %%
data = mcmc.to_arviz()
az.plot_rank(data.sel(chain=[0, 1, 2, 3]), var_names="x");
# %% [markdown]
# The divergences are the quartic walls, where a step that suits the valleys is too long; asking warm-up for a higher acceptance rate makes
# it shorter. For the rest the remedy is time: `run_more` goes on from where the chains stand, exactly as one longer run would have.

# %%
mcmc = MCMC(NUTS(), 1000, warmup_steps=300, num_chains=64, seed=0, adaptation=WindowAdaptation(target_acceptance=0.95))
mcmc.run(energy)
mcmc.run_more(9000)
data = mcmc.to_arviz()
print(mcmc.diagnose())
az.plot_rank(data.sel(chain=[0, 1, 2, 3]), var_names="x");
# %% [markdown]
# ArviZ's energy plot compares the Hamiltonians that the chains visit with their changes from one draw to the next. If the changes were
# much narrower, momenta would explore the energies slowly (the number in the legend is the BFMI; below 0.3 is bad).

# %%
az.plot_energy(data.sel(chain=range(8)));
# %% [markdown]
# ## Is it right?
#
# The same energy stands among the targets, which know their truth: $\log Z$, moments, and the mass of each well by quadrature.

# %%
truth = KnownDoubleWell()
right = (mcmc.get_samples(group_by_chain=True)["x"] > truth.barrier).double()
error = float(mcse_mean(right))
print(f"P(right well): {float(right.mean()):.4f} +- {error:.4f} (one standard error), truth {truth.right_mass:.4f}")
assert abs(float(right.mean()) - truth.right_mass) < 5 * error

# %% [markdown]
# ## The same energy through Pyro's own NUTS
#
# `PotentialFn` is what Pyro's kernels take: a dict of unconstrained values to a scalar. For a constrained support the Jacobian is
# inside, and `transforms` maps the draws back.

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
# As the distribution `Boltzmann(energy)` it is a prior like any other. Suppose that x is seen through noise, as y = 1.2. An energy has no
# sampler of its own, and Pyro must start somewhere: `initial_states` lets it start from `energy.initial()`.


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
ax.set(xlabel="x", title="after seeing y = 1.2, the right well is the likely one")
ax.legend(frameon=False)

# %% [markdown]
# ## Where to go on
#
# `make demo` fits NICE flows to this energy and corrects them by importance sampling. To try another energy, change `forward`; to try
# another kernel, put `MALA()` or `HMC()` where `NUTS()` stands; to try one whose truth is known, look into `pyroebm.targets`.
