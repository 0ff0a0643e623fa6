"""Fully Bayesian Gaussian processes of BoTorch, sampled in PyTorch.

BoTorch samples them with NumPyro from version 0.18 on, in JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.kernels import NUTS, WindowAdaptation
from pyroebm.mcmc.sampler import MCMC
from pyroebm.ppl.model import ModelEnergy

__all__ = ["fit_fully_bayesian_model"]


def fit_fully_bayesian_model(
    model: Any,
    max_tree_depth: int = 6,
    warmup_steps: int = 512,
    num_samples: int = 256,
    *,
    thinning: int = 16,
    num_chains: int = 4,
    seed: int | None = None,
    progress: bool | None = None,
) -> MCMC:
    """Sample the hyperparameters of a fully Bayesian model of BoTorch, and load them into it.

    It replaces ``botorch.fit.fit_fully_bayesian_model_nuts``, whose arguments and defaults it has.
    The prior is that of the model: SAAS (Eriksson and Jankowiak, 2021), dimension-scaled Matern or
    linear, with inferred or given noise, and with or without input warping. For BoTorch before
    0.18, whose models are Pyro's, any model is sampled.

    Args:
        model: a ``SaasFullyBayesianSingleTaskGP``, ``FullyBayesianSingleTaskGP`` or
            ``FullyBayesianLinearSingleTaskGP``.
        max_tree_depth: maximum number of doublings of a trajectory.
        warmup_steps: number of warm-up steps of each chain, which adapt the step sizes and a dense
            metric.
        num_samples: number of draws of all chains together.
        thinning: every ``thinning``-th draw of a chain is loaded: ``num_samples / thinning`` sets
            of hyperparameters.
        num_chains: number of chains.
        seed: seed of the run; None draws one. It is recorded in ``.seed`` of the result.
        progress: True shows a progress bar, False does not, None shows it if the run takes longer
            than a second.

    Returns:
        the run, with all draws: ``.diagnose()`` checks its convergence.

    Raises:
        ValueError: if ``num_samples`` is not a multiple of ``num_chains * thinning``, or if the
            prior of the model is not one of these.

    Example:
        >>> X, Y = torch.rand(12, 3).double(), torch.randn(12, 1).double()
        >>> model = SaasFullyBayesianSingleTaskGP(X, Y)  # doctest: +SKIP
        >>> run = fit_fully_bayesian_model(model, seed=0)  # doctest: +SKIP
        >>> model.posterior(X).mixture_mean  # doctest: +SKIP
    """
    check_counts(
        {"num_samples": 1, "thinning": 1, "num_chains": 1}, num_samples, thinning, num_chains
    )
    if num_samples % (num_chains * thinning):
        raise ValueError(
            "num_samples must be a multiple of num_chains * thinning, got"
            f" num_samples={num_samples}, num_chains={num_chains} and thinning={thinning}"
        )
    sample, loaded = _pyro_model(model.pyro_model)
    mcmc = MCMC(
        NUTS(max_tree_depth=max_tree_depth),
        num_samples // num_chains,
        warmup_steps,
        num_chains,
        seed=seed,
        adaptation=WindowAdaptation(metric="dense"),
        progress=progress,
    )
    mcmc.run(ModelEnergy(sample))
    draws = {
        name: values[:, thinning - 1 :: thinning].flatten(0, 1)
        for name, values in mcmc.get_samples(group_by_chain=True).items()
    }
    model.train()  # BoTorch's: it removes the hyperparameters of an earlier fit
    model.load_mcmc_samples(loaded(draws))
    model.eval()
    return mcmc


Draws = dict[str, Tensor]


def _pyro_model(prior: Any) -> tuple[Callable[[], None], Callable[[Draws], Draws]]:
    """Return a Pyro model, and what maps its draws to those that BoTorch loads.

    Args:
        prior: the ``pyro_model`` of a model of BoTorch.
    """
    if not hasattr(prior, "train_X_jax"):
        return prior.sample, prior.postprocess_mcmc_samples
    from botorch.models import fully_bayesian

    kinds: dict[type, tuple[Callable[..., None], Callable[[Draws], Draws]]] = {
        fully_bayesian.SaasPyroModel: (_saas, _saas_lengthscales),
        fully_bayesian.MaternPyroModel: (_matern, dict),
        fully_bayesian.LinearPyroModel: (_linear, _linear_variances),
    }
    if type(prior) not in kinds:
        raise ValueError(
            f"the pyro_model of the model must be one of {[kind.__name__ for kind in kinds]}, got"
            f" {type(prior).__name__}, whose prior is written in JAX: fit it with"
            " botorch.fit.fit_fully_bayesian_model_nuts"
        )
    sample, loaded = kinds[type(prior)]
    return lambda: sample(prior, fully_bayesian.MIN_INFERRED_NOISE_LEVEL), loaded


def _saas(prior: Any, min_noise: float) -> None:
    x = prior.train_X
    global_scale = pyro.sample("kernel_tausq", dist.HalfCauchy(x.new_tensor(0.1)))
    local = pyro.sample(
        "_kernel_inv_length_sq", dist.HalfCauchy(x.new_ones(x.shape[-1])).to_event(1)
    )
    _observe_matern(prior, (global_scale * local).rsqrt(), min_noise)


def _saas_lengthscales(draws: Draws) -> Draws:
    squares = draws.pop("kernel_tausq").unsqueeze(-1) * draws.pop("_kernel_inv_length_sq")
    return draws | {"lengthscale": squares.rsqrt()}


def _matern(prior: Any, min_noise: float) -> None:
    x = prior.train_X
    loc = x.new_full(x.shape[-1:], math.sqrt(2.0) + 0.5 * math.log(x.shape[-1]))
    lengthscale = pyro.sample("lengthscale", dist.LogNormal(loc, math.sqrt(3.0)).to_event(1))
    _observe_matern(prior, lengthscale, min_noise)


def _observe_matern(prior: Any, lengthscale: Tensor, min_noise: float) -> None:
    shape, rate = prior._outputscale_prior_concentration, prior._outputscale_prior_rate
    scale: Tensor | float = 1.0
    if shape is not None and rate is not None:
        scale = _gamma("outputscale", shape, rate, prior)
    x = _inputs(prior) / lengthscale
    squares = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    distance = (5.0 * squares.clamp_min(1e-30)).sqrt()  # the root has no gradient at 0
    kernel = (1.0 + distance + 5.0 / 3.0 * squares) * torch.exp(-distance)
    _observe(prior, scale * kernel, min_noise)


def _linear(prior: Any, min_noise: float) -> None:
    x = prior.train_X
    global_scale = pyro.sample("tau_sq", dist.HalfCauchy(x.new_tensor(0.1)))
    local = pyro.sample("_weight_variance_sq", dist.HalfCauchy(x.new_ones(x.shape[-1])).to_event(1))
    centered = _inputs(prior) - 0.5
    _observe(prior, (centered * (global_scale * local).sqrt()) @ centered.mT, min_noise)


def _linear_variances(draws: Draws) -> Draws:
    squares = draws.pop("tau_sq").unsqueeze(-1) * draws.pop("_weight_variance_sq")
    return draws | {"weight_variance": squares.sqrt()}


def _gamma(name: str, shape: float, rate: float, prior: Any) -> Tensor:
    x = prior.train_X
    return pyro.sample(name, dist.Gamma(x.new_tensor(shape), x.new_tensor(rate)))


def _inputs(prior: Any) -> Tensor:
    """Return the inputs, warped by the distribution function of Kumaraswamy if the model does."""
    x: Tensor = prior.train_X
    if not prior.use_input_warping:
        return x
    indices = list(range(x.shape[-1])) if prior.indices is None else list(prior.indices)
    zero, spread = x.new_zeros(len(indices)), math.sqrt(0.1)
    a, b = (pyro.sample(name, dist.LogNormal(zero, spread).to_event(1)) for name in ("c0", "c1"))
    warped = 1.0 - (1.0 - x[:, indices].clamp(prior._eps, 1.0 - prior._eps) ** a) ** b
    columns = list(x.unbind(-1))
    for index, column in zip(indices, warped.unbind(-1), strict=True):
        columns[index] = column
    return torch.stack(columns, -1)


def _observe(prior: Any, kernel: Tensor, min_noise: float) -> None:
    x, y = prior.train_X, prior.train_Y.squeeze(-1)
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
    if prior.train_Yvar is None:
        noise = (min_noise + _gamma("noise", 0.9, 10.0, prior)).expand(len(y))
    else:
        noise = prior.train_Yvar.squeeze(-1)
    covariance = kernel + noise.diag_embed()
    pyro.sample("Y", dist.MultivariateNormal(mean.expand(len(y)), covariance), obs=y)
